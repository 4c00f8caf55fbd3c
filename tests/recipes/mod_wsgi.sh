by_server mod_wsgi https://help.example.org
tail -n 5 /var/log/apache2/*
lacks "$SECRET" /var/log/apache2/*
versions apache2 libapache2-mod-wsgi-py3
