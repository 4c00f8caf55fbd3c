by_mail opensmtpd "smtpctl schedule all"
versions opensmtpd
