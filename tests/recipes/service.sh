as_written service
. /etc/profile.d/inbound.sh
SECRET=$(inbound secret)
export SECRET
systemd-analyze verify inbound.service
ls -la /var/lib/inbound
client post http://127.0.0.1:8080/api/helpdesk/inbound-email "By systemd"
systemctl restart inbound
client post http://127.0.0.1:8080/api/helpdesk/inbound-email "After a restart" 25
made "After a restart"

as_written upgrade
as_written restore
systemctl is-active inbound
shown "After a restart"
journalctl -u inbound --no-pager -o cat | tail -n 20
versions systemd python3
told "$(systemd-analyze security inbound.service --no-pager | tail -n 1)"
