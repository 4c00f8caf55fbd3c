# What each NAME.sh begins with; `bash lib.sh NAME` runs it inside the machine.
set -euo pipefail
cd /root/inbound
exec 2>&1
trap '[ $? = 0 ] || journalctl --no-pager --lines 20' EXIT

as_written() {      # NAME: the blocks of the README's recipe, line by line
    echo "== $1, as the README has it"
    bash -euxo pipefail "/recipes/$1.written"
}

versions() {        # PACKAGE…: what was installed
    echo "VERSIONS: $(dpkg-query -W -f '${Package} ${Version} ' "$@")"
}

until_true() {      # COMMAND…: within 90 s
    local ends=$((SECONDS + 90))
    while [ $SECONDS -lt $ends ]; do "$@" > /tmp/tried 2>&1 && return; sleep 0.2; done
    cat /tmp/tried
    echo "never true: $*"
    exit 1
}

client() { python3 /recipes/client.py "$@"; }

holds() {           # WORDS FILE…: of the log lines
    if ! grep -q -e "$1" "${@:2}"; then
        tail -n 30 "${@:2}"; echo "$1 is missing in ${*:2}"; exit 1
    fi
}

lacks() {           # WORDS FILE…: the secret, in logs
    if grep -n -e "$1" "${@:2}"; then echo "$1 is in ${*:2}"; exit 1; fi
}

shown() {           # WORDS: the ticket that was made
    inbound tickets --search "$1" > /tmp/found
    grep -q T- /tmp/found || { echo "no ticket says $1"; inbound tickets; exit 1; }
    told "$(tail -n 1 /tmp/found)"
}

told() { echo "TOLD: $1"; }     # WORDS for the table

certificate() {     # of our own making, where the recipes look for it
    local folder=/etc/letsencrypt/live/help.example.org
    mkdir -p $folder
    ln -sfn $folder /etc/letsencrypt/live/example.com
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
        -subj /CN=help.example.org -addext 'subjectAltName=DNS:help.example.org,DNS:*.example.com' \
        -keyout $folder/privkey.pem -out $folder/fullchain.pem 2> /dev/null
    export SSL_CERT_FILE=$folder/fullchain.pem
}

behind_a_proxy() {  # COUNT FILE…: small, large and too large mail, COUNT slow sockets, and FILEs
    local host=https://help.example.org url=/api/helpdesk/inbound-email
    until_true client post "$host$url?secret=$SECRET" "The secret in the URL"
    client post $host$url/ "The secret in a header" | tee /tmp/answer
    holds '^200' /tmp/answer
    client post "$host$url?secret=$SECRET" "25 MB" 25 | tee /tmp/answer
    holds '^200 .*created' /tmp/answer
    client post "$host$url?secret=$SECRET" "80 MB" 60 | tee /tmp/answer
    holds '^413 {"error"' /tmp/answer
    client post "$host$url?secret=$SECRET" "80 MB" 60 chunked | tee /tmp/answer
    holds '^413 {"error"' /tmp/answer
    client post "$host$url?secret=wrong-$SECRET" "A wrong secret" | tee /tmp/answer
    holds '^401' /tmp/answer
    { inbound doctor --url $host$url || true; } | grep https: | tee /tmp/answer
    lacks FAIL /tmp/answer
    client slow help.example.org "$1" "$url?secret=$SECRET" "While $1 were slow" | tee /tmp/slow
    holds '^200' /tmp/slow
    systemctl stop inbound
    client post "$host$url?secret=$SECRET" "Nobody at home" | tee /tmp/answer
    holds '^502' /tmp/answer
    systemctl start inbound
    shown "While $1 were slow"
    told "$(tail -n 1 /tmp/slow)"
    journalctl --no-pager > /tmp/journal
    lacks "$SECRET" /tmp/journal "${@:2}"
    tail -qn 3 /tmp/journal "${@:2}"
}

by_mail() {         # NAME: a mail server's recipe; its own confirmations leave by it, too
    for recipe in service pipe "$1"; do as_written $recipe; done
    . /etc/profile.d/inbound.sh
    inbound account set address=support@example.org smtp_host=localhost smtp_security=none
    ip address add 192.0.2.1/32 dev lo
    until_true client smtp support@example.org "It is up"
    client smtp support@example.org "By $1"
    until_true made "By $1"
    client smtp support@example.org "A bounce by $1" ""
    until_true made "A bounce by $1"
    inbound tickets --queue Automatic | tee /tmp/answer
    holds "A bounce by $1" /tmp/answer
    client smtp nobody-here@example.org "To nobody" | tee /tmp/answer
    holds '^refused.*55' /tmp/answer
    echo a-wrong-secret-0123456789 > /etc/inbound.secret
    client smtp support@example.org "While the secret was wrong"
    until_true journal_says 401
    inbound secret > /etc/inbound.secret
    $2
    until_true made "While the secret was wrong"
    until_true is_sent
    shown "While the secret was wrong"
}

by_server() {       # NAME ORIGIN: another WSGI server's recipe, and the timer
    local url=$2/api/helpdesk/inbound-email
    as_written service
    certificate
    . /etc/profile.d/inbound.sh
    as_written "$1"
    as_written timer
    python3 -W ignore -m smtpd -n -c DebuggingServer 127.0.0.1:2525 > /tmp/sink 2>&1 &
    inbound account set address=support@example.org smtp_host=localhost smtp_port=2525 \
        smtp_security=none
    SECRET=$(inbound secret)
    export SECRET
    until_true client post "$url?secret=$SECRET" "By $1"
    client post "$url" "25 MB by $1" 25 | tee /tmp/answer
    holds '^200 .*created' /tmp/answer
    client post "$url" "Too large for $1" 60 | tee /tmp/answer
    holds '^413' /tmp/answer
    client post "$url?secret=wrong-$SECRET" "A wrong secret" | tee /tmp/answer
    holds '^401' /tmp/answer
    until_true is_sent
    shown "25 MB by $1"
    told "$(inbound outbox | tail -n 1)"
    journalctl --no-pager | tee /tmp/journal | tail -n 20
    lacks "$SECRET" /tmp/journal
}

made() { inbound tickets --search "$1" | grep T-; }
journal_says() { journalctl --no-pager | grep " $1 "; }
is_sent() { inbound outbox | grep sent; }

. "/recipes/$1.sh"
