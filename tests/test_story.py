"""The story from the first start to the last, over real sockets: POST in, rows, mail at the relay.

Everything is compared whole; what is random or the clock's is told apart first.
"""

import contextlib
import email
import hashlib
import http.client
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from unittest.mock import ANY

import pytest

import inbound
from conftest import HEADER, LONG, SECRET, URL, at_least_once, eventually

pytestmark = pytest.mark.slow

ADDRESS, ADA = "support@helpdesk.example", "ada@customer.example"
REFERENCE = re.compile(r"T-[0-9A-HJKMNP-TV-Z]{4}-[0-9A-HJKMNP-TV-Z]{4}")
TEMPLATE = """Hello,

we have received your message and opened a ticket for it.

Your reference: {}

To add something, just reply to this mail.
"""
FILE = b"%PDF-1.4\r\n\0\xff"
PRINTER = {"from": f"Ada Lovelace <{ADA}>", "to": ADDRESS, "subject": "Printer on fire",
           "text": "It burns.\r\n", "message_id": "<first@customer.example>",
           "references": "<zero@customer.example>", "envelope": {"from": ADA},
           "attachments": [{"filename": "fire.pdf", "content_type": "application/pdf",
                            "content": "JVBERi0xLjQNCgD/"}]}


# What the tests do --------------------------------------------------------------------------------

def greeting_of(served):
    """The greeting up to the end of its curl command, and that command as it stands."""
    while not is_whole(command := "".join(served.greeting.partition("curl ")[1:])):
        line = served.process.stdout.readline()
        assert line, served.greeting
        served.greeting += line
    return served.greeting, command


def is_whole(command):
    """Whether a shell would run it now: it asks for no further line."""
    try:
        return bool(shlex.split(command)) and not command.endswith("\\\n")
    except ValueError:  # a quotation or a line goes on
        return False


def shell(served, *argv, stdin=""):
    """Run `inbound` as a user does beside the server; return what it prints."""
    command = [sys.executable, inbound.__file__, "--db", str(served.path), *argv]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=LONG)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def secret_of(served):
    return shell(served, "secret").strip()


def is_now(seconds):
    assert abs(seconds - time.time()) < 60
    return seconds


def as_arrived(envelope):
    """(headers in order, unfolded; text) of a mail as the relay got it."""
    assert envelope.content.isascii() and b"\n" not in envelope.content.replace(b"\r\n", b"")
    mail = email.message_from_bytes(envelope.content)
    headers = [(name, re.sub(r"\r?\n\s+", " ", value)) for name, value in mail.items()]
    text = mail.get_payload(decode=True).decode(mail.get_content_charset())
    return headers, text.replace("\r\n", "\n")


# Chapter one: the first start ---------------------------------------------------------------------

def test_the_first_start_prints_a_curl_that_makes_a_ticket(serve):
    served = serve()
    greeting, curl = greeting_of(served)
    secret = secret_of(served)
    words = shlex.split(curl)
    assert f"X-Mobieus-Inbound-Secret: {secret}" in words
    assert f"http://127.0.0.1:{served.port}{URL}" in words
    assert f"  {secret}\n" in greeting
    environment = os.environ | {"no_proxy": "127.0.0.1"}
    for status in ("created", "duplicate"):
        done = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, env=environment)
        answer = json.loads(done.stdout)
        assert (done.returncode, answer["status"]) == (0, status)
    [ticket] = served.records("SELECT * FROM inbox")
    assert ticket["reference"] == answer["ticket"]
    assert served.stop() == 0
    assert secret not in served.log_text()


def test_a_second_start_prints_no_secret(serve):
    served = serve()
    greeting_of(served)
    secret = secret_of(served)
    served.stop()
    again = serve()
    assert secret_of(again) == secret
    assert again.stop() == 0
    assert secret not in again.greeting and str(again.port) in again.greeting
    assert secret not in again.log_text()


# Chapter two: a mail comes in ---------------------------------------------------------------------

def columns(row, expected):
    """Those of a row that SPEC 5 names and the test expects; there may be more."""
    return {name: row[name] for name in expected}


def ticket_row(reference, created_at):
    return {"id": 1, "reference": reference, "queue": 1, "email_account": 1, "status": "open",
            "subject": "Printer on fire", "requester": ADA, "requester_name": "Ada Lovelace",
            "last_writer": "customer", "created_at": created_at, "updated_at": created_at}


def incoming_row(answer, received_at):
    return {
        "id": answer["message"], "ticket": 1, "direction": "in", "in_reply_to": None,
        "message_id": "<first@customer.example>", "from_address": ADA, "from_name": "Ada Lovelace",
        "envelope_from": ADA, "subject": "Printer on fire", "text": "It burns.\r\n", "html": None,
        "headers": "[]", "kind": "human", "reason": answer["reason"], "received_at": received_at}


def confirmation_row(reference, message_id, received_at):
    return {
        "id": ANY, "ticket": 1, "direction": "out", "in_reply_to": "<first@customer.example>",
        "message_id": message_id, "from_address": ADDRESS, "from_name": "Support",
        "envelope_from": "", "subject": f"[{reference}] We received your message",
        "text": TEMPLATE.format(reference), "html": None, "headers": ANY, "kind": None,
        "reason": ANY, "received_at": received_at}


def incoming_shown(answer, received_at):
    """The message as `show --json` prints it: SPEC 6 names all of its keys."""
    file = {"id": 1, "filename": "fire.pdf", "content_type": "application/pdf", "content_id": "",
            "size": len(FILE), "sha256": hashlib.sha256(FILE).hexdigest(), "note": ""}
    return {
        "direction": "in", "message_id": "<first@customer.example>", "in_reply_to": None,
        "references": ["<zero@customer.example>"], "from": ADA, "from_name": "Ada Lovelace",
        "envelope_from": ADA, "to": [ADDRESS], "cc": [], "subject": "Printer on fire",
        "text": "It burns.\r\n", "html": None, "headers": [], "kind": "human",
        "reason": answer["reason"], "confirmation": "queued", "attachments": [file], "notes": [],
        "received_at": received_at}


def a_mail_comes_in(served):
    """Post the first mail while no relay is set; compare every row; return the reference."""
    status, _, answer = served.post(PRINTER)
    assert (status, answer) == (200, {
        "status": "created", "ticket": ANY, "message": ANY, "kind": "human",
        "confirmation": "queued", "reason": ANY})
    assert REFERENCE.fullmatch(answer["ticket"]) and len(answer["reason"]) > 10
    [ticket] = served.records("SELECT * FROM ticket")
    now = is_now(ticket["created_at"])
    assert ticket == ticket_row(answer["ticket"], now)
    incoming, confirmation = served.records("SELECT * FROM message ORDER BY direction")
    expected = incoming_row(answer, now)
    assert columns(incoming, expected) == expected
    expected = confirmation_row(answer["ticket"], confirmation["message_id"], now)
    assert columns(confirmation, expected) == expected
    assert re.fullmatch("<[0-9a-z.]{32,}@helpdesk.example>", confirmation["message_id"])
    expected = {"state": "queued", "attempts": 0, "created_at": now, "next_attempt_at": now,
                "last_error": ""}
    [mail] = served.records("SELECT * FROM outbox")
    assert columns(mail, expected) == expected
    assert served.sql("""SELECT id, message, filename, content_type, content_id, size, content
        FROM attachment""") == [
            (1, answer["message"], "fire.pdf", "application/pdf", "", len(FILE), FILE)]
    assert served.count("rejected") == 0
    shown = json.loads(shell(served, "show", answer["ticket"], "--json"))
    assert shown["messages"][0] == incoming_shown(answer, now)
    return answer["ticket"]


# Chapter three: our answers and theirs ------------------------------------------------------------

def the_confirmation_arrives(served, sink, reference):
    """Set the relay; compare the confirmation whole; return its Message-ID."""
    shell(served, "account", "set", "smtp_host=127.0.0.1", f"smtp_port={sink.port}",
          "smtp_security=none")
    [envelope] = sink.wait(1)
    assert (envelope.mail_from, envelope.rcpt_tos) == ("<>", [ADA])     # RFC 5321 4.5.5
    [stored] = served.records("SELECT message_id FROM message WHERE direction = 'out'")
    headers, text = as_arrived(envelope)
    date = email.utils.parsedate_to_datetime(dict(headers)["Date"])
    is_now(date.timestamp())
    assert headers == [
        ("From", f"Support <{ADDRESS}>"), ("To", ADA),
        ("Subject", f"[{reference}] We received your message"), ("Date", ANY),
        ("Message-ID", stored["message_id"]), ("In-Reply-To", "<first@customer.example>"),
        ("References", "<zero@customer.example> <first@customer.example>"),
        ("Auto-Submitted", "auto-replied"), ("X-Auto-Response-Suppress", "All"),
        ("Precedence", "bulk"), ("Content-Type", 'text/plain; charset="utf-8"'),
        ("Content-Transfer-Encoding", "quoted-printable"), ("MIME-Version", "1.0")]
    assert text == TEMPLATE.format(reference)
    state = "SELECT state, attempts, next_attempt_at, last_error FROM outbox"
    eventually(lambda: served.records(state)[0]["state"] == "sent")
    assert served.records(state) == [
        {"state": "sent", "attempts": 1, "next_attempt_at": None, "last_error": ""}]
    return stored["message_id"]


def the_customer_answers(served, reference, number, parent, references):
    """Post Ada's answer to a mail of ours; assert that it is appended and gets no mail."""
    before = served.records("SELECT count(*) AS n FROM outbox")
    status, _, answer = served.post({
        "from": ADA, "subject": f"Re: whatever {number}", "text": f"Answer {number}.",
        "message_id": f"<answer-{number}@customer.example>", "in_reply_to": parent,
        "references": [*references, parent]})
    assert (status, answer) == (200, {
        "status": "appended", "ticket": reference, "message": ANY, "kind": "human",
        "confirmation": "not due", "reason": ANY})
    assert served.records("SELECT count(*) AS n FROM outbox") == before
    [ticket] = served.records("SELECT status, subject, requester FROM ticket")
    assert ticket == {"status": "open", "subject": "Printer on fire", "requester": ADA}


def we_reply(served, sink, reference, references):
    """Reply from the shell; compare the mail whole; return its Message-ID."""
    shell(served, "reply", reference, stdin="Pull the plug.\n\n-- \nGrüße\n")
    envelope = sink.wait(2)[1]
    assert (envelope.mail_from, envelope.rcpt_tos) == (ADDRESS, [ADA])
    headers, text = as_arrived(envelope)
    message_id = dict(headers)["Message-ID"]
    assert headers == [
        ("From", f"Support <{ADDRESS}>"), ("To", ADA),
        ("Subject", f"[{reference}] Re: Printer on fire"), ("Date", ANY), ("Message-ID", ANY),
        ("In-Reply-To", references[-1]), ("References", " ".join(references)),
        ("Content-Type", 'text/plain; charset="utf-8"'),
        ("Content-Transfer-Encoding", "quoted-printable"), ("MIME-Version", "1.0")]
    assert text == "Pull the plug.\n\n-- \nGrüße\n"
    [row] = served.records("SELECT * FROM message WHERE direction = 'out' ORDER BY id DESC LIMIT 1")
    assert (row["message_id"], row["in_reply_to"]) == (message_id, references[-1])
    return message_id


def test_a_talk_from_the_first_mail_to_a_closed_ticket_that_opens_again(serve, sink):
    served = serve()
    shell(served, "secret", "set", SECRET)
    shell(served, "account", "set", f"address={ADDRESS}")
    reference = a_mail_comes_in(served)
    first, zero = "<first@customer.example>", "<zero@customer.example>"
    confirmation = the_confirmation_arrives(served, sink, reference)
    the_customer_answers(served, reference, 1, confirmation, [zero, first])
    line = [zero, first, confirmation, "<answer-1@customer.example>"]
    ours = we_reply(served, sink, reference, line)
    the_customer_answers(served, reference, 2, ours, line)
    shell(served, "close", reference)
    assert served.records("SELECT * FROM inbox") == []
    the_customer_answers(served, reference, 3, ours, line)
    shown = json.loads(shell(served, "show", reference, "--json"))
    assert shown["status"] == "open"
    assert [(message["direction"], message["message_id"]) for message in shown["messages"]] == [
        ("in", first), ("out", confirmation), ("in", "<answer-1@customer.example>"), ("out", ours),
        ("in", "<answer-2@customer.example>"), ("in", "<answer-3@customer.example>")]
    status, _, answer = served.post(PRINTER)
    assert (status, answer["status"], answer["ticket"]) == (200, "duplicate", reference)
    assert served.stop() == 0
    assert len(sink.received) == 2


# The end ------------------------------------------------------------------------------------------

def answers(served, timeout=LONG):
    """Whether the server still takes part in the talk."""
    try:
        client = http.client.HTTPConnection("127.0.0.1", served.port, timeout=timeout)
        with contextlib.closing(client):
            client.request("GET", URL)
            return client.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def test_sigterm_ends_it_and_what_is_in_flight_is_answered(file, serve):
    def is_stored():
        served = serve()
        client = http.client.HTTPConnection("127.0.0.1", served.port, timeout=LONG)
        with contextlib.closing(client), file.locked() as admin:    # so that the request must wait
            client.request("POST", URL, json.dumps(PRINTER), {
                HEADER: SECRET, "Content-Type": "application/json"})
            assert answers(served)  # accepted after ours, so ours has been read
            served.process.terminate()
            eventually(lambda: not answers(served, 0.2))
            admin.execute("ROLLBACK")
            response = client.getresponse()
            answer = json.loads(response.read())
        assert served.process.wait(LONG) == 0
        return (response.status, answer.get("status")) == (200, "created")

    at_least_once(is_stored)
    assert file.sql("SELECT subject FROM ticket") == [("Printer on fire",)]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_server_ends_at_once_and_in_peace(serve, signum):
    def ends_before_the_courier_looks_again():
        served = serve()
        assert answers(served)
        began = time.monotonic()
        served.process.send_signal(signum)
        assert served.process.wait(LONG) == 0
        assert "Traceback" not in served.log_text()
        return time.monotonic() - began < inbound.LOOK - 1      # 0.2 s are expected

    at_least_once(ends_before_the_courier_looks_again)


def test_whoever_has_read_the_greeting_may_already_stop_it(serve):
    assert [serve(f"{number}.db").stop() for number in range(3)] == [0, 0, 0]
