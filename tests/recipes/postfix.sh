by_mail postfix "postqueue -f"
versions postfix
