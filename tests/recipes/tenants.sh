for recipe in service nginx; do certificate; as_written $recipe; done
as_written tenants
systemd-analyze verify inbound@acme.service
url=/api/helpdesk/inbound-email
for tenant in acme umbrella; do
    export INBOUND_DB=/var/lib/inbound/$tenant/inbound.db
    secret=$(inbound secret rotate --keep 0h)
    client post "https://$tenant.example.com$url?secret=$secret" "For $tenant"
    shown "For $tenant"
done
client post "https://acme.example.com$url?secret=$secret" "For another" | tee /tmp/answer
holds '^401' /tmp/answer
journalctl -u inbound@acme --no-pager | tee /tmp/journal
lacks "$secret" /tmp/journal /var/log/nginx/*
ls -lR /run/inbound /var/lib/inbound
runuser -u www-data -- test ! -r /var/lib/inbound/acme/inbound.db
versions nginx
