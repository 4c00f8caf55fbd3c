"""What the recipes are tried with, inside the machine: mail by HTTPS and by SMTP, slow sockets.

    client.py post URL SUBJECT [MEGABYTES [chunked]]    prints the status and the answer
    client.py guess URL ADDRESS                         likewise, as ADDRESS behind a proxy
    client.py slow HOST COUNT URL SUBJECT               likewise, while COUNT sockets are slow
    client.py smtp RECIPIENT SUBJECT [SENDER]           to port 25 here, SENDER "" for a bounce

The secret is in $SECRET; the URL may hold it instead.
"""

import base64
import contextlib
import email.message
import email.utils
import http.client
import json
import os
import resource
import smtplib
import socket
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

STRANGER = "192.0.2.1"      # of this machine, but of no network that a mail server trusts


def post(url, subject, megabytes="0", way=""):
    mail = {"from": "ada@example.net", "subject": subject, "text": "Through a proxy.",
            "message_id": email.utils.make_msgid()}
    if int(megabytes):
        content = base64.b64encode(os.urandom(int(megabytes) * 10**6)).decode()
        mail["attachments"] = [{"filename": "large.bin", "content": content}]
    headers = {"Content-Type": "application/json"}
    if "secret=" not in url:
        headers["X-Mobieus-Inbound-Secret"] = os.environ["SECRET"]
    split = urllib.parse.urlsplit(url)
    kind = {"https": http.client.HTTPSConnection, "http": http.client.HTTPConnection}[split.scheme]
    connection = kind(split.netloc, timeout=30)
    path = split.path + f"?{split.query}" * bool(split.query)
    body = json.dumps(mail).encode()
    if way == "chunked":
        body = iter([body[at:at + 2**16] for at in range(0, len(body), 2**16)])
    # A server that refuses a large body answers before it is sent, and hangs up.
    with contextlib.suppress(OSError):
        connection.request("POST", path, body, headers)
    response = connection.getresponse()
    print(response.status, response.read().decode(errors="replace").strip(), flush=True)


def guess(url, address):
    request = urllib.request.Request(url, b"{}", {
        "X-Mobieus-Inbound-Secret": "a-guess", "X-Forwarded-For": address})
    try:
        urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        print(error.code)


def slow(host, count, url, subject):
    """Four in five say nothing; of the others half stop in the header, half in the body."""
    resource.setrlimit(resource.RLIMIT_NOFILE, [resource.getrlimit(resource.RLIMIT_NOFILE)[1]] * 2)
    context = ssl.create_default_context()
    held = []
    for number in range(int(count)):
        with contextlib.suppress(OSError):
            connection = socket.create_connection(("127.0.0.1", 443), timeout=20)
            held.append(connection)
            if number < int(count) // 5:
                held[-1] = connection = context.wrap_socket(connection, server_hostname=host)
                connection.sendall(f"POST {url} HTTP/1.1\r\nHost: {host}\r\n".encode())
                if number % 2:
                    connection.sendall(b"Content-Length: 1000\r\n\r\n{")
    began = time.monotonic()
    post(f"https://{host}{url}", subject)
    took = time.monotonic() - began
    print(f"answered in {took:.2f} s while {sum(map(is_open, held))} of {count} were open")


def is_open(connection):
    connection.setblocking(False)
    try:
        return bool(connection.recv(1))
    except (BlockingIOError, ssl.SSLWantReadError):
        return True
    except OSError:
        return False


def smtp(recipient, subject, sender="ada@example.net"):
    mail = email.message.EmailMessage()
    mail["From"] = sender or "MAILER-DAEMON@example.net"
    mail["To"] = recipient
    mail["Subject"] = subject
    mail["Message-ID"] = email.utils.make_msgid()
    mail.set_content("By way of a mail server.")
    with smtplib.SMTP("127.0.0.1", 25, source_address=(STRANGER, 0)) as session:
        try:
            session.sendmail(sender, [recipient], mail.as_bytes())
            print("accepted")
        except smtplib.SMTPRecipientsRefused as error:
            print("refused", error.recipients)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
