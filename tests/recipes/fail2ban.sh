as_written service
. /etc/profile.d/inbound.sh
as_written fail2ban
until_true fail2ban-client status inbound
is_banned() { fail2ban-client status inbound | grep 198.51.100.7; }
for _ in $(seq 25); do
    client guess http://127.0.0.1:8080/api/helpdesk/inbound-email 198.51.100.7
done
until_true is_banned
SECRET=$(inbound secret); export SECRET
client post http://127.0.0.1:8080/api/helpdesk/inbound-email "By who is not banned"
shown "By who is not banned"
told "$(fail2ban-client status inbound | tail -n 1)"
versions fail2ban
