as_written service
. /etc/profile.d/inbound.sh
SECRET=$(inbound secret); export SECRET
certificate
as_written nginx
behind_a_proxy 10000 /var/log/nginx/*
versions nginx
