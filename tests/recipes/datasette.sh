as_written service
. /etc/profile.d/inbound.sh
SECRET=$(inbound secret); export SECRET
as_written datasette
client post http://127.0.0.1:8080/api/helpdesk/inbound-email "Seen by Datasette"
get() {
    python3 -c 'import sys, urllib.request as web; print(web.urlopen(sys.argv[1]).read().decode())' \
        "http://127.0.0.1:8001$1"
}
refused() { { get "$1" 2>&1 || true; } | grep 'HTTP Error 40[34]'; }
now_shown() { get /inbound/open_tickets.csv | grep "After a restart"; }
until_true get /inbound/open_tickets.json
get "/inbound/open_tickets.csv" | tee /tmp/page
holds "Seen by Datasette" /tmp/page
get "/inbound/messages_with.csv?words=proxy" | tee /tmp/page
holds "Through a proxy" /tmp/page
get / > /tmp/page
get /inbound >> /tmp/page
lacks "$SECRET" /tmp/page
tables=$(sqlite3 $INBOUND_DB "SELECT '/' || name FROM sqlite_schema WHERE type = 'table'")
for page in $tables '?sql=select+*+from+email_account' .db; do
    refused /inbound$page
done
client post http://127.0.0.1:8080/api/helpdesk/inbound-email "While it is read"
get "/inbound/open_tickets.csv" | tee /tmp/page
holds "While it is read" /tmp/page
systemctl restart inbound
client post http://127.0.0.1:8080/api/helpdesk/inbound-email "After a restart"
until_true now_shown
systemctl restart inbound-datasette
until_true now_shown
shown "Seen by Datasette"
versions python3
echo "VERSIONS: $(/opt/datasette/bin/datasette --version)"
