as_written service
. /etc/profile.d/inbound.sh
SECRET=$(inbound secret); export SECRET
certificate
as_written caddy
sed -i '1,/{/s/{/{\n    local_certs/' /etc/caddy/Caddyfile       # no Let's Encrypt in here
systemctl restart caddy
until_true test -e /var/lib/caddy/.local/share/caddy/pki/authorities/local/root.crt
cp /var/lib/caddy/.local/share/caddy/pki/authorities/local/root.crt /tmp/caddy.pem
SSL_CERT_FILE=/tmp/caddy.pem
behind_a_proxy 10000
journalctl -u caddy --no-pager | grep 502 | tee /tmp/caddy.log
holds '"uri": "/api/helpdesk/inbound-email"' /tmp/caddy.log
versions caddy
