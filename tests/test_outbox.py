"""The outbox: the states of schema.sql's table, against real SMTP on real sockets.

`sink` is a server that behaves; `relay` makes one that says and does what a test wants.
"""

import base64
import contextlib
import email
import email.header
import email.policy
import email.utils
import json
import re
import signal
import socket
import sqlite3
import ssl
import subprocess
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import inbound
from conftest import DAY, LONG, NOON, Sink, eventually, need, started

# What the tests share -----------------------------------------------------------------------------

FINE = {"CONNECT": "220 relay.example", "EHLO": "250 relay.example", "STARTTLS": "220 go on",
        "MAIL": "250 ok", "RCPT": "250 ok", "DATA": "354 go on", "BODY": "250 ok", "RSET": "250 ok",
        "QUIT": "221 bye"}


class Relay:
    """An SMTP server on a free port. `replies`: verb → line, None = hang up, or f(relay, socket).

    Verbs are those of SMTP, and CONNECT, and BODY for what follows the end of DATA.
    """

    def __init__(self, replies, context=None, is_tls=False):
        self.replies = FINE | replies
        self.context, self.is_tls = context, is_tls
        self.commands, self.bodies, self.connections = [], [], 0
        self.is_over, self.is_weary = threading.Event(), threading.Event()
        self.threads = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.spawn(self.listen)

    def spawn(self, work, *args):
        self.threads.append(threading.Thread(target=work, args=args, daemon=True))
        self.threads[-1].start()

    def listen(self):
        with contextlib.suppress(OSError):
            while True:
                connection = self.listener.accept()[0]
                self.connections += 1
                self.spawn(self.converse, connection)

    def converse(self, connection):
        connection.settimeout(LONG)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(lambda: connection.close())
            if self.is_tls:
                connection = self.context.wrap_socket(connection, server_side=True)
            lines, verb = connection.makefile("rb"), "CONNECT"
            stack.callback(lambda: lines.close())
            while self.answer(connection, verb):
                if verb == "STARTTLS" and self.replies[verb].startswith("220"):
                    lines.close()
                    connection = self.context.wrap_socket(connection, server_side=True)
                    lines = connection.makefile("rb")
                if verb == "DATA" and self.replies["DATA"].startswith("354"):
                    self.bodies.append(body_of(lines))
                    verb = "BODY"
                    continue
                command = lines.readline().decode().strip()
                if not command:
                    return
                self.commands.append(command)
                verb = command.split(" ")[0].split(":")[0].upper()

    def answer(self, connection, verb):
        """Say what the verb's reply is; return whether the conversation goes on."""
        reply = self.replies.get(verb, "502 what?")
        if callable(reply):
            reply = reply(self, connection)
        if reply is not None:
            connection.sendall(reply.encode("latin-1") + b"\r\n")
        return reply is not None and verb != "QUIT"

    def said(self, verb):
        return [command for command in self.commands if command.upper().startswith(verb)]

    def stop(self):
        self.is_over.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def body_of(lines):
    """What stands between DATA and the lone dot, dots unstuffed."""
    body = b""
    while (line := lines.readline()) not in (b".\r\n", b""):
        body += line.removeprefix(b".") if line.startswith(b"..") else line
    return body


def drips(relay, connection):
    """A server that says a byte now and then, for longer than anybody should listen."""
    for _ in range(60):
        if relay.is_over.wait(0.1):
            return
        connection.sendall(b"2")
    relay.is_weary.set()


def hangs(relay, connection):
    if not relay.is_over.wait(6):
        relay.is_weary.set()


def hangs_on(relay, connection):
    relay.is_over.wait(LONG)


@pytest.fixture
def relay():
    """Start a Relay: relay(MAIL="451 later", …)."""
    running = []

    def start(context=None, is_tls=False, **replies):
        running.append(Relay(replies, context, is_tls))
        return running[-1]

    yield start
    for server in running:
        server.stop()
        for thread in server.threads:
            thread.join(LONG)


@pytest.fixture
def refusing():
    """A port that nobody listens on, as long as the test runs."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def confirmed(desk, name="first", **fields):
    """Post a person's mail, assert that it is confirmed; every name is another person's."""
    answer = desk.post(desk.mail(message_id=f"<{name}@customer.example>", **{
        "from": f"{name}@customer.example"} | fields))
    assert answer["confirmation"] == "queued", answer
    return answer


def outbox(desk):
    """All rows of the outbox, the oldest first."""
    return desk.records("SELECT * FROM outbox ORDER BY id")


def states(desk):
    return [row["state"] for row in outbox(desk)]


def send(desk):
    inbound.send_due(desk.store)
    return outbox(desk)[0]


# queued → sent ------------------------------------------------------------------------------------

def test_mail_waits_while_there_is_no_relay_and_is_sent_once_there_is_one(desk, clock, sink):
    confirmed(desk)
    row = send(desk)
    assert (row["state"], row["attempts"], row["last_error"]) == ("queued", 0, "")
    assert "We received your message" in desk.run("outbox", "show", str(row["id"]))
    clock.advance(3600)
    desk.send_to(sink.port)
    row = send(desk)
    assert (row["state"], row["attempts"], row["next_attempt_at"]) == ("sent", 1, None)
    assert [envelope.content for envelope in sink.received] == [row["content"]]
    send(desk)
    clock.advance(DAY)
    assert send(desk)["state"] == "sent"
    assert len(sink.received) == 1


def test_the_command_line_sends_too_and_says_how_many(desk, sink):
    confirmed(desk)
    desk.send_to(sink.port)
    assert json.loads(desk.run("outbox", "send", "--json")) == {"sent": 1}
    assert desk.run("outbox", "send", "--json").strip() == "{}"
    assert len(sink.received) == 1


def test_a_burst_ends_when_its_relay_is_taken_away(desk, relay):
    for name in ("a", "b", "c"):
        confirmed(desk, name)

    def take_away(*_):
        desk.execute("UPDATE email_account SET smtp_host = NULL")
        return "250 taken"

    desk.send_to(relay(BODY=take_away).port)
    send(desk)
    assert states(desk) == ["sent", "queued", "queued"]


def test_a_burst_goes_over_one_connection(desk, relay):
    server = relay()
    desk.send_to(server.port)
    for number in range(10):
        confirmed(desk, f"n{number}")
    inbound.send_due(desk.store)
    assert states(desk) == ["sent"] * 10
    assert (server.connections, len(server.bodies)) == (1, 10)
    assert sorted(server.bodies) == sorted(row["content"] for row in outbox(desk))
    assert [word.upper() for word in server.said("QUIT")] == ["QUIT"]


# queued → queued: what may pass -------------------------------------------------------------------

def test_a_refused_connection_is_tried_again_after_waits_that_grow(desk, clock, refusing):
    confirmed(desk)
    desk.send_to(refusing)
    waits = []
    for attempt in range(1, 12):
        row = send(desk)
        assert (row["state"], row["attempts"]) == ("queued", attempt)
        assert "efused" in row["last_error"]
        assert send(desk) == row    # not yet due
        waits.append(row["next_attempt_at"] - clock.now)
        clock.now = row["next_attempt_at"] - 1
        assert send(desk) == row
        clock.advance(1)
    assert all(later > earlier for earlier, later in zip(waits[:6], waits[1:]))
    assert 30 <= waits[0] <= 90 and max(waits) <= 5400


def test_the_waits_are_jittered(desk, refusing):
    confirmed(desk)
    desk.send_to(refusing)
    waits = set()
    for _ in range(12):
        desk.execute("UPDATE outbox SET attempts = 3, next_attempt_at = ?", NOON)
        waits.add(send(desk)["next_attempt_at"])
    assert len(waits) > 3


def test_one_look_tries_an_unusable_relay_once_not_once_a_mail(desk, refusing):
    for number in range(5):
        confirmed(desk, f"n{number}")
    desk.send_to(refusing)
    inbound.send_due(desk.store)
    assert sum(row["attempts"] for row in outbox(desk)) == 1


@pytest.mark.parametrize("verb", ["CONNECT", "MAIL", "RCPT", "DATA", "BODY"])
@pytest.mark.parametrize("reply", ["451 4.7.1 greylisted, come back", "421 4.3.2 closing", None])
def test_a_4xx_or_a_hang_up_keeps_the_mail_for_later(desk, clock, relay, verb, reply):
    if verb == "DATA" and reply is None:
        verb = "RSET"       # hangs up in the middle of a refusal instead
    server = relay(**{verb: reply} | ({"RCPT": "450 later"} if verb == "RSET" else {}))
    desk.send_to(server.port)
    confirmed(desk)
    row = send(desk)
    assert (row["state"], row["attempts"]) == ("queued", 1)
    assert (reply or "") in row["last_error"] != ""
    assert clock.now < row["next_attempt_at"] <= clock.now + 90
    server.replies |= FINE
    clock.now = row["next_attempt_at"]
    assert send(desk)["state"] == "sent"
    assert server.bodies[-1] == row["content"]


def test_after_a_421_the_other_mails_keep_the_relays_own_words(desk, relay):
    server = relay(MAIL="421 4.3.2 service shutting down")
    desk.send_to(server.port)
    for number in range(4):
        confirmed(desk, f"n{number}")
    inbound.send_due(desk.store)
    assert states(desk) == ["queued"] * 4
    tried = [row for row in outbox(desk) if row["attempts"]]
    assert tried and len(server.said("MAIL")) == len(tried)
    assert all("421 4.3.2 service shutting down" in row["last_error"] for row in tried)
    assert {row["last_error"] for row in outbox(desk)} <= {tried[0]["last_error"], ""}
    server.replies |= FINE
    desk.clock.advance(100)
    inbound.send_due(desk.store)
    assert states(desk) == ["sent"] * 4


def test_a_relay_that_takes_one_mail_a_connection_still_gets_them_all(desk, clock, relay):
    def one(server, connection):
        server.taken = getattr(server, "taken", 0) + 1
        return "250 ok" if server.taken % 2 else "421 one is enough"

    server = relay(MAIL=one)
    desk.send_to(server.port)
    for number in range(5):
        confirmed(desk, f"n{number}")
    for _ in range(12):
        inbound.send_due(desk.store)
        clock.advance(200)
    assert server.taken > 5, "it never refused"
    assert states(desk) == ["sent"] * 5
    assert sorted(server.bodies) == sorted(row["content"] for row in outbox(desk))


def test_one_greylisted_mail_does_not_hold_up_the_others(desk, relay):
    def choosy(server, connection):
        return "450 greylisted" if "n1@" in server.commands[-1] else "250 ok"

    server = relay(RCPT=choosy)
    desk.send_to(server.port)
    for number in range(4):
        confirmed(desk, f"n{number}")
    inbound.send_due(desk.store)
    assert states(desk) == ["sent", "queued", "sent", "sent"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["CONNECT", "EHLO", "MAIL", "BODY"])
@pytest.mark.parametrize("misbehaves", [drips, hangs])
def test_a_server_that_drips_or_hangs_is_cut_off_in_time(
        desk, relay, impatient, where, misbehaves):
    server = relay(**{where: misbehaves})
    desk.send_to(server.port)
    confirmed(desk)
    row = send(desk)
    assert not server.is_weary.is_set()     # we hung up first
    assert (row["state"], row["attempts"]) == ("queued", 1)
    assert row["last_error"] != ""


@pytest.mark.slow
def test_doctor_does_not_wait_for_a_server_that_drips(desk, relay, impatient):
    server = relay(CONNECT=drips)
    desk.send_to(server.port)
    assert "FAIL relay of support@helpdesk.example" in desk.run("doctor", status=1)
    assert not server.is_weary.is_set()


def test_a_silent_tls_handshake_is_cut_off_in_time(desk, relay, impatient):
    server = relay(CONNECT=hangs)
    desk.send_to(server.port, smtp_security="tls")
    confirmed(desk)
    assert send(desk)["state"] == "queued"
    assert not server.is_weary.is_set() and server.commands == []


# queued → failed ----------------------------------------------------------------------------------

@pytest.mark.parametrize("verb", ["MAIL", "RCPT", "DATA", "BODY"])
def test_a_5xx_fails_the_mail_with_the_servers_own_words(desk, clock, relay, verb):
    server = relay(**{verb: "550 5.1.1 no such user here"})
    desk.send_to(server.port)
    confirmed(desk)
    row = send(desk)
    assert (row["state"], row["attempts"], row["next_attempt_at"]) == ("failed", 1, None)
    assert row["last_error"] == "550 5.1.1 no such user here"
    clock.advance(3600)
    server.replies[verb] = "250 ok"
    assert send(desk) == row


def test_the_servers_words_are_kept_in_one_harmless_line(desk, relay):
    server = relay(RCPT="550-first\r\n550-\x1b[31msecond \xfc\r\n550 " + "long " * 300)
    desk.send_to(server.port)
    confirmed(desk)
    row = send(desk)
    assert row["state"] == "failed" and row["last_error"].startswith("550 first")
    assert "second \xfc" in row["last_error"] and len(row["last_error"]) <= 600
    assert not re.search("[\0-\x1f\x7f]", row["last_error"])


def test_a_failed_mail_does_not_hold_up_the_others(desk, relay):
    def choosy(server, connection):
        return "550 no" if "n1@" in server.commands[-1] else "250 ok"

    server = relay(RCPT=choosy)
    desk.send_to(server.port)
    for number in range(4):
        confirmed(desk, f"n{number}")
    inbound.send_due(desk.store)
    assert states(desk) == ["sent", "failed", "sent", "sent"]
    assert server.connections == 1


def test_a_relay_that_hangs_up_after_a_5xx_costs_the_next_mail_no_try(desk, relay):
    confirmed(desk)
    confirmed(desk, "second")
    desk.send_to(relay(RCPT="550 no such user", RSET=lambda *_: None).port)
    for _look in range(2):
        send(desk)
    assert [(row["state"], row["attempts"], row["last_error"]) for row in outbox(desk)] == (
        2 * [("failed", 1, "550 no such user")])


def test_mail_is_given_up_after_24_hours_and_not_before(desk, clock, refusing):
    confirmed(desk)
    desk.send_to(refusing)
    while clock.now < NOON + DAY - 7200:
        row = send(desk)
        assert row["state"] == "queued"
        clock.now = row["next_attempt_at"]
    clock.now = NOON + DAY - 1
    assert send(desk)["state"] == "queued"
    clock.advance(1)
    row = send(desk)
    assert (row["state"], row["next_attempt_at"]) == ("failed", None)
    assert "24 h" in row["last_error"] and "efused" in row["last_error"]


def test_mail_that_never_had_a_relay_is_given_up_too(desk, clock, sink):
    confirmed(desk)
    clock.advance(DAY)
    row = send(desk)
    assert row["state"] == "failed" and "smtp_host" in row["last_error"]
    desk.send_to(sink.port)
    assert send(desk)["state"] == "failed" and sink.received == []


def test_a_bounce_fails_the_mail_that_came_back(desk, sink):
    confirmed(desk)
    desk.send_to(sink.port)
    row = send(desk)
    ours = email.message_from_bytes(row["content"])["Message-ID"]
    desk.post(f"""From: MAILER-DAEMON@mx.example\r
To: support@helpdesk.example\r
Subject: Undelivered\r
Message-ID: <dsn@mx.example>\r
In-Reply-To: {ours}\r
Content-Type: multipart/report; report-type=delivery-status; boundary=b\r
\r
--b\r
Content-Type: text/plain\r
\r
It came back.\r
--b\r
Content-Type: message/delivery-status\r
\r
Reporting-MTA: dns; mx.example\r
\r
Final-Recipient: rfc822; first@customer.example\r
Action: failed\r
Status: 5.1.1\r
\r
--b--\r
""", "message/rfc822")
    row = outbox(desk)[0]
    assert row["state"] == "failed" and "5.1.1" in row["last_error"]
    assert desk.count("ticket") == 1 and desk.count("outbox") == 1


# retry --------------------------------------------------------------------------------------------

def test_retry_makes_a_failed_mail_due_now_for_another_24_hours(desk, clock, relay):
    server = relay(RCPT="550 no")
    desk.send_to(server.port)
    confirmed(desk)
    identifier = str(send(desk)["id"])
    clock.advance(3 * DAY)
    desk.run("outbox", "retry", identifier)
    row = outbox(desk)[0]
    assert (row["state"], row["next_attempt_at"]) == ("queued", clock.now)
    server.replies["RCPT"] = "450 later"
    clock.advance(DAY - 1)
    assert send(desk)["state"] == "queued"
    server.replies["RCPT"] = "250 ok"
    desk.run("outbox", "retry", identifier)
    assert send(desk)["state"] == "sent"
    assert server.bodies == [row["content"]]


def test_retry_makes_a_waiting_mail_due_now(desk, clock, refusing, sink):
    desk.send_to(refusing)
    confirmed(desk)
    for _ in range(6):
        clock.now = send(desk)["next_attempt_at"]
    row = send(desk)
    assert row["next_attempt_at"] > clock.now + 600
    desk.send_to(sink.port)
    assert send(desk)["state"] == "queued"
    desk.run("outbox", "retry", str(row["id"]))
    assert send(desk)["state"] == "sent" and len(sink.received) == 1


def test_retry_of_a_sent_or_unknown_mail_is_refused(desk, sink):
    desk.send_to(sink.port)
    confirmed(desk)
    row = send(desk)
    assert desk.run("outbox", "retry", str(row["id"]), status=1).startswith("inbound: ")
    assert desk.run("outbox", "retry", "999", status=1).startswith("inbound: ")
    assert send(desk) == row and len(sink.received) == 1


def test_retry_of_a_mail_that_is_just_being_sent_does_not_send_it_twice(desk, relay):
    held, gate = threading.Event(), threading.Event()

    def waits(server, connection):
        held.set()
        gate.wait(LONG)
        return "250 ok"

    server = relay(BODY=waits)
    desk.send_to(server.port)
    confirmed(desk)
    sender = threading.Thread(target=inbound.send_due, args=(desk.store,))
    sender.start()
    assert held.wait(LONG)
    argv = ["--db", str(desk.path), "outbox", "retry", str(outbox(desk)[0]["id"])]
    inbound.main(argv, clock=desk.clock)        # refused or not
    gate.set()
    sender.join(LONG)
    assert send(desk)["state"] == "sent"
    assert len(server.bodies) == 1


# sending: the lease -------------------------------------------------------------------------------

@pytest.mark.parametrize("reply", [
    "500 what?", "421 closing", None, pytest.param(hangs, marks=pytest.mark.slow)])   # 2 s
def test_a_rude_goodbye_after_the_250_changes_nothing(desk, clock, relay, reply):
    server = relay(QUIT=reply)
    desk.send_to(server.port)
    confirmed(desk)
    row = send(desk)
    assert (row["state"], row["attempts"], row["last_error"]) == ("sent", 1, "")
    clock.advance(DAY)
    assert send(desk) == row and len(server.bodies) == 1


def test_two_senders_never_send_the_same_mail(desk, relay):
    arrived = threading.Barrier(2)

    def both(server, connection):       # each holds a mail while the other looks for one
        with contextlib.suppress(threading.BrokenBarrierError):
            arrived.wait(20)        # the two pair off: 12 mails are 6 pairs
        return "250 ok"

    server = relay(BODY=both)
    desk.send_to(server.port)
    for number in range(12):
        confirmed(desk, f"n{number}")
    other = inbound.Store(str(desk.path), desk.clock)
    with contextlib.closing(other):
        other.open()
        senders = [threading.Thread(target=inbound.send_due, args=(store,))
                   for store in (desk.store, other)]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join(LONG)
    assert states(desk) == ["sent"] * 12 and server.connections == 2
    assert sorted(server.bodies) == sorted(row["content"] for row in outbox(desk))
    assert {row["attempts"] for row in outbox(desk)} == {1}


def test_a_lease_is_respected_until_it_runs_out(desk, clock, sink):
    desk.send_to(sink.port)
    confirmed(desk)
    desk.execute("""UPDATE outbox SET state = 'sending', attempts = 1,
        next_attempt_at = ?""", NOON + 45)
    clock.advance(44)
    assert send(desk)["state"] == "sending" and sink.received == []
    clock.advance(1)
    row = send(desk)
    assert (row["state"], row["attempts"]) == ("sent", 2) and len(sink.received) == 1


def test_the_lease_is_at_most_45_seconds_and_stands_in_the_row(desk, clock, relay):
    seen = []

    def look(server, connection):
        seen.extend(outbox(desk))
        return "250 ok"

    server = relay(BODY=look)
    desk.send_to(server.port)
    confirmed(desk)
    assert send(desk)["state"] == "sent"
    assert seen[0]["state"] == "sending"
    assert clock.now + 30 < seen[0]["next_attempt_at"] <= clock.now + 45


def test_a_clock_that_was_set_back_does_not_hold_mail_up(desk, clock, sink, refusing):
    desk.send_to(refusing)
    confirmed(desk)
    send(desk)
    clock.advance(-7 * DAY)
    desk.send_to(sink.port)
    assert send(desk)["state"] == "sent"


class Deadly(Sink):
    """A sink that kills a process after it has taken a mail and before it says so."""

    async def handle_DATA(self, server, session, envelope):
        answer = await super().handle_DATA(server, session, envelope)
        if self.victim:
            self.victim.process.send_signal(signal.SIGKILL)
            self.victim.process.wait(LONG)
            self.victim = None
        return answer


def test_a_crash_before_the_commit_repeats_the_mail_byte_for_byte(desk, clock, serve):
    with started(Deadly()) as deadly:
        desk.send_to(deadly.port)
        confirmed(desk)      # NOON is in the future: due for `serve`, whose clock is the machine's
        now = int(time.time())
        desk.execute("UPDATE outbox SET created_at = ?, next_attempt_at = ?, give_up_at = ?",
                     now, now, now + 86400)
        deadly.victim = served = serve()
        deadly.wait(1)
        assert served.stop() == -signal.SIGKILL
        assert states(desk) == ["sending"]
        clock.now = int(time.time())
        assert send(desk)["state"] == "sending"
        clock.advance(46)
        row = send(desk)
        assert (row["state"], row["attempts"]) == ("sent", 2)
        assert [envelope.content for envelope in deadly.received] == [row["content"]] * 2


def test_a_database_locked_after_the_250_is_waited_for_and_the_mail_not_repeated(
        desk, relay, monkeypatch):
    monkeypatch.setattr(inbound, "BUSY_TIMEOUT", 0.1)
    holder = sqlite3.connect(desk.path, isolation_level=None, check_same_thread=False)
    release = threading.Timer(0.3, lambda: holder.execute("ROLLBACK"))

    def lock(server, connection):
        holder.execute("BEGIN IMMEDIATE")
        release.start()
        return "250 ok"

    server = relay(BODY=lock)
    desk.send_to(server.port)
    confirmed(desk)
    with contextlib.closing(holder):
        assert send(desk)["state"] == "sent"
        release.join()
    assert len(server.bodies) == 1


# The courier of a real server ---------------------------------------------------------------------

def test_the_courier_sends_within_seconds_of_a_post_or_of_anothers_reply(desk, serve, sink):
    desk.send_to(sink.port)
    desk.clock.now = int(time.time())
    served = serve()
    reference = served.post(desk.mail())[2]["ticket"]
    sink.wait(1)
    desk.run("reply", reference, stdin="We are on our way.")       # another process, for the server
    assert b"We are on our way." in sink.wait(2)[1].content   # it looks every 5 s
    eventually(lambda: states(desk) == ["sent", "sent"])


def test_a_relay_that_hangs_never_slows_a_post(desk, serve, relay):
    server = relay(CONNECT=hangs_on)
    desk.send_to(server.port)
    served = serve()
    assert served.post(desk.mail())[0] == 200
    eventually(lambda: server.connections)      # from here on the courier hangs
    for number in range(5):
        mail = desk.mail(message_id=f"<{number}@customer.example>", text=f"{number}")
        assert served.post(mail, timeout=inbound.DELIVERY / 2)[0] == 200
    server.stop()


# TLS and log-in -----------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """host name → (context of a server with a self-signed certificate for it, the certificate)."""
    need("openssl")
    directory, made = tmp_path_factory.mktemp("tls"), {}
    for name, alternative in (("here", "IP:127.0.0.1"), ("elsewhere", "DNS:elsewhere.example")):
        key, certificate = directory / f"{name}.key", directory / f"{name}.pem"
        subprocess.run([
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
            "-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj",
            f"/CN={name}.example", "-addext", f"subjectAltName={alternative}"],
            check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        made[name] = context, str(certificate)
    return made


def secured(relay, context, security, **replies):
    """A Relay that offers STARTTLS, or speaks TLS from the start, and AUTH."""
    def greets(server, connection):
        if isinstance(connection, ssl.SSLSocket):
            return "250-relay.example\r\n250 AUTH PLAIN"
        return "250-relay.example\r\n250 STARTTLS"

    return relay(context, security == "tls", **{"EHLO": greets} | replies)


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_certificates_are_verified(desk, clock, relay, certificates, monkeypatch, security):
    context, certificate = certificates["here"]
    server = secured(relay, context, security)
    desk.send_to(server.port, smtp_security=security)
    confirmed(desk)
    row = send(desk)
    assert row["state"] == "queued" and "certificate" in row["last_error"].lower()
    assert server.said("MAIL") == []
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    clock.now = row["next_attempt_at"]
    assert send(desk)["state"] == "sent" and len(server.bodies) == 1


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_trusted_certificate_for_another_host_is_not_enough(
        desk, relay, certificates, monkeypatch, security):
    context, certificate = certificates["elsewhere"]
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    server = secured(relay, context, security)
    desk.send_to(server.port, smtp_security=security)
    confirmed(desk)
    row = send(desk)
    assert row["state"] == "queued" and "mismatch" in row["last_error"]
    assert server.said("MAIL") == []


@pytest.mark.parametrize("replies", [
    {}, {"EHLO": "250-relay\r\n250 STARTTLS", "STARTTLS": "454 no"}])
def test_a_relay_without_starttls_gets_nothing_in_clear(desk, relay, replies):
    server = relay(**replies)
    desk.send_to(server.port, smtp_security="starttls")
    confirmed(desk)
    assert send(desk)["state"] == "queued"
    assert server.said("MAIL") == server.said("AUTH") == []


def test_a_wrong_password_waits_for_the_admin_and_the_right_one_sends(
        desk, clock, relay, certificates, monkeypatch):
    def checks(server, connection):
        given = base64.b64decode(server.commands[-1].split()[2])
        return "235 welcome" if given == b"\0desk\0right horse" else "535 5.7.8 bad credentials"

    context, certificate = certificates["here"]
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    server = secured(relay, context, "starttls", AUTH=checks)
    desk.send_to(server.port, smtp_security="starttls", smtp_username="desk",
            smtp_password="wrong horse")
    confirmed(desk)
    row = send(desk)
    assert row["state"] == "queued" and "535 5.7.8 bad credentials" in row["last_error"]
    assert "horse" not in row["last_error"] and server.said("MAIL") == []
    desk.execute("UPDATE email_account SET smtp_password = 'right horse'")
    clock.now = row["next_attempt_at"]
    assert send(desk)["state"] == "sent"


def test_no_log_in_goes_over_plain_text(desk, refusing):
    with pytest.raises(sqlite3.IntegrityError):
        desk.send_to(refusing, smtp_username="desk", smtp_password="horse")
    said = desk.run("account", "set", "smtp_security=none", "smtp_username=desk", status=1)
    assert said.startswith("inbound: ") and said.count("\n") == 1
    assert desk.sql("SELECT smtp_username FROM email_account") == [(None,)]


# What is sent -------------------------------------------------------------------------------------

ALWAYS = ["Content-Transfer-Encoding", "Content-Type", "Date", "From", "MIME-Version", "Message-ID",
          "Subject", "To"]
AUTOMATIC = ["Auto-Submitted", "Precedence", "X-Auto-Response-Suppress"]
THREADS = ["In-Reply-To", "References"]


def parsed(content):
    return email.message_from_bytes(content, policy=email.policy.default)


def assert_harmless(content, names, may=()):
    """A mail with exactly these header names, each once, ASCII, CRLF, no line over 998."""
    raw = email.message_from_bytes(content)
    found = sorted(raw.keys())
    assert len(set(found)) == len(found) and set(names) <= set(found) <= {*names, *may}, found
    assert content.isascii() and b"\0" not in content
    assert not re.search(rb"(?<!\r)\n|\r(?!\n)", content)
    assert max(map(len, content.split(b"\r\n"))) <= 998


def test_the_confirmation_is_exactly_this(desk, clock):
    desk.execute("UPDATE email_account SET display_name = 'The Desk'")
    answer = desk.post(desk.mail(references=["<root@customer.example>"]))
    [row] = outbox(desk)
    mail = parsed(row["content"])
    assert_harmless(row["content"], ALWAYS + AUTOMATIC + THREADS)
    assert {name: mail[name] for name in mail.keys() if name not in ("Message-ID", "Date")} == {
        "From": "The Desk <support@helpdesk.example>", "To": "ada@customer.example",
        "Subject": f"[{answer['ticket']}] We received your message",
        "In-Reply-To": "<first@customer.example>",
        "References": "<root@customer.example> <first@customer.example>",
        "Auto-Submitted": "auto-replied", "X-Auto-Response-Suppress": "All", "Precedence": "bulk",
        "MIME-Version": "1.0", "Content-Type": 'text/plain; charset="utf-8"',
        "Content-Transfer-Encoding": "quoted-printable"}
    assert int(mail["Date"].datetime.timestamp()) == clock.now
    assert re.fullmatch("<[!-;=?-~]{20,}@helpdesk.example>", mail["Message-ID"])
    assert answer["ticket"] in mail.get_content()
    for theirs in ("Lovelace", "Printer", "fire", "burns"):
        assert theirs.lower() not in row["content"].decode().lower()


def test_message_ids_of_ours_are_unguessable_and_distinct(desk):
    for number in range(5):
        confirmed(desk, f"n{number}")
    ids = [parsed(row["content"])["Message-ID"] for row in outbox(desk)]
    assert len(set(ids)) == 5
    for answer_id, (reference,) in zip(ids, desk.sql("SELECT reference FROM ticket")):
        assert reference.lower() not in answer_id.lower()


def test_a_reply_to_the_confirmation_threads(desk):
    first = desk.post(desk.mail())
    ours = parsed(outbox(desk)[0]["content"])["Message-ID"]
    for number, fields in enumerate([
            {"in_reply_to": ours}, {"references": ["<x@y.example>", ours]}]):
        again = desk.post(desk.mail(message_id=f"<{number}@customer.example>", **fields))
        assert (again["status"], again["ticket"]) == ("appended", first["ticket"])
        assert again["confirmation"] == "not due"
    assert desk.count("outbox") == 1


@pytest.mark.parametrize("setting, expected", [
    (None, "<>"), ("bounces@helpdesk.example", "bounces@helpdesk.example")])
def test_the_envelope_sender_of_confirmations_is_null_or_as_set(desk, sink, setting, expected):
    desk.send_to(sink.port, confirmation_envelope_from=setting)
    answer = confirmed(desk)
    desk.run("reply", answer["ticket"], stdin="Hello")
    inbound.send_due(desk.store)
    confirmation, reply = sink.wait(2)
    assert (confirmation.mail_from, confirmation.rcpt_tos) == (
        expected, ["first@customer.example"])
    assert (reply.mail_from, reply.rcpt_tos) == (
        "support@helpdesk.example", ["first@customer.example"])
    assert_harmless(reply.content, ALWAYS + THREADS)


HOSTILE_IDS = ["<" + "x" * 250 + "@customer.example>", "<=?utf-8?q?=0d=0aBcc:x?=@customer.example>",
               "<a\r\nBcc: b@evil.example>", "<a\r\n\r\nbuy@evil.example>", "<a b@evil.example>",
               "<\u00e4@customer.example>", "<a\x0bb\x85c\u2028d@evil.example>", "<>", "<<>>",
               "a, b"]


@pytest.mark.parametrize("field", ["message_id", "in_reply_to", "references"])
@pytest.mark.parametrize("hostile", HOSTILE_IDS)
def test_a_hostile_id_never_becomes_a_header_of_ours(desk, sink, hostile, field):
    desk.send_to(sink.port)
    response = desk.request(desk.mail(**{field: hostile}))
    if response.status_int != 200:
        assert field == "message_id" and response.status_int == 422 and desk.count("ticket") == 0
        return
    assert response.json["confirmation"] == "queued", response.json
    assert send(desk)["state"] == "sent"
    [envelope] = sink.received
    assert_harmless(envelope.content, ALWAYS + AUTOMATIC, may=THREADS)
    assert envelope.rcpt_tos == ["ada@customer.example"]
    raw = email.message_from_bytes(envelope.content)
    for name in THREADS:
        assert all(re.fullmatch("<[!-;=?-~]{1,248}>", word) for word in raw.get(name, "").split())
        assert "=?" not in raw.get(name, "") and "xxxxx" not in raw.get(name, "")


def test_a_long_but_sound_id_is_written_as_it_is(desk, sink):
    parent = "<" + "a" * 200 + "@customer.example>"
    desk.send_to(sink.port)
    desk.post(desk.mail(message_id=parent))
    assert send(desk)["state"] == "sent"
    assert f"In-Reply-To: {parent}\r\n".encode() in sink.received[0].content


@pytest.mark.parametrize("display_name", [
    None, "", "K\u00e4se \u201eDesk\u201c", 'Desk, "Berlin"', "desk@evil.example",
    "\u6f22\u5b57, \u00e4" * 9,
    "K\u00e4se, Desk, of Example, Incorporated, Department of Fire, Berlin",
    "The Support Desk of Example, Incorporated, Department of Printers, and Fire, Berlin, Germany",
    "evil@evil.example, " * 12])
def test_from_is_the_accounts_address_alone_whatever_its_name(desk, display_name):
    desk.execute("UPDATE email_account SET display_name = ?", display_name)
    confirmed(desk)
    raw = email.message_from_bytes(outbox(desk)[0]["content"])["From"]
    [(name, address)] = email.utils.getaddresses([raw])
    assert address == "support@helpdesk.example"
    shown = str(email.header.make_header(email.header.decode_header(name)))
    assert "".join(shown.split()) == "".join((display_name or "")[:150].split())
    assert_harmless(outbox(desk)[0]["content"], ALWAYS + AUTOMATIC + THREADS)


@pytest.mark.parametrize("display_name", [
    "Desk\r\nBcc: b@evil.example", "=?utf-8?q?Desk=0d=0aBcc:_b@evil.example?=", "Desk\x00", "\x85",
    "Desk" * 250, "\u6f22" * 250, '"' * 400])
def test_a_display_name_that_would_break_the_header_costs_no_mail(desk, display_name):
    desk.execute("UPDATE email_account SET display_name = ?", display_name)
    answer = desk.post(desk.mail())
    assert (answer["status"], answer["confirmation"]) == ("created", "queued")
    [row] = outbox(desk)
    assert_harmless(row["content"], ALWAYS + AUTOMATIC + THREADS)
    assert parsed(row["content"])["From"].addresses[0].addr_spec == "support@helpdesk.example"


@pytest.mark.parametrize("template", [
    "Gr\u00fc\u00dfe, Ihr Zeichen: {reference}\n\u2014 \u6f22\u5b57 \U0001f600\n", "{reference}",
    "{reference} {subject} {0} {{}} {",
    ".\n..\n.x {reference}\n", "long " * 900 + "{reference}\n",
    "one\r\ntwo\rthree\n{reference}\n", "From here\n{reference}\n"])
def test_any_template_arrives_as_it_was_written(desk, sink, template):
    desk.send_to(sink.port, template=template)
    answer = confirmed(desk)
    assert send(desk)["state"] == "sent"
    [envelope] = sink.received
    assert_harmless(envelope.content, ALWAYS + AUTOMATIC + THREADS)
    expected = template.replace("{reference}", answer["ticket"])
    assert parsed(envelope.content).get_content().splitlines() == expected.splitlines()


@pytest.mark.parametrize("theirs, wire", [
    ("ada@m\u00fcller.example", "ada@xn--mller-kva.example"), ("O'Hara+x=y@a-b.example", None)])
def test_unusual_but_sound_addresses_are_confirmed(desk, sink, theirs, wire):
    desk.send_to(sink.port)
    desk.post(desk.mail(**{"from": theirs}))
    assert send(desk)["state"] == "sent"
    assert sink.received[0].rcpt_tos == [wire or theirs]


@pytest.mark.parametrize("theirs", [
    '"a b"@customer.example', "ada@[127.0.0.1]", "\u00e4da@customer.example", "a@b",
    "=?utf-8?q?=0d=0aBcc:x?=@customer.example", "ada@-x.example", "x" * 65 + "@customer.example",
    "ada@" + "x." * 150 + "example", "a@b.example> SIZE=1"])
def test_what_we_cannot_safely_write_to_is_stored_and_not_confirmed(desk, theirs):
    answer = desk.post(desk.mail(**{"from": theirs, "envelope": {"from": "x@customer.example"}}))
    assert answer["status"] == "created" and desk.count("ticket") == 1
    assert {row["recipient"] for row in outbox(desk)} <= {      # the sound remainder of it, at most
        "x@customer.example", "a@b.example", "x?=@customer.example"}


PIECES = st.sampled_from([
    "\r\nBcc: b@evil.example\r\n", "\r\n\r\n", "\n", "\r", "\0", "=?utf-8?q?=0d=0aBcc:_x?=",
    "=?utf-8?b?DQpCY2M6IHg=?=", "<", ">", '"', ",", ";", ":", "@", "(", ")", "\\", " ", "\x0b",
    "\x85", "\u2028", "\ud800", "\u00e4", "a@b.example", "<a@b.example>", "Re: ", "[T-0000-0000]",
    "x" * 80, "x" * 300])
TEXTS = st.lists(PIECES | st.text(max_size=8), max_size=8).map("".join)
ADDRESSES = TEXTS | TEXTS.map(lambda name: f"{name} <ada@customer.example>") | st.tuples(
    TEXTS, TEXTS).map(lambda two: f"{two[0]} <{two[1]}@customer.example>")


@pytest.mark.slow
@given(sender=ADDRESSES, name=TEXTS, subject=TEXTS, message_id=TEXTS | TEXTS.map(
    lambda text: f"<{text}@customer.example>"), references=st.lists(TEXTS, max_size=4))
@settings(max_examples=150, deadline=None, suppress_health_check=[
    HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_nothing_that_a_stranger_writes_shapes_our_mail(
        desk, sender, name, subject, message_id, references):
    for table in ("outbox", "message", "ticket"):
        desk.execute(f"DELETE FROM {table}")
    response = desk.request({"from": sender, "from_name": name, "subject": subject, "text": "x",
                             "message_id": message_id, "references": references})
    assert response.status_int in (200, 422), response.text
    if response.status_int == 422:
        assert desk.count("ticket") == 0
        return
    assert response.json["status"] == "created"
    if response.json["confirmation"] == "queued":
        desk.run("reply", response.json["ticket"], stdin="Hello")
    for row in outbox(desk):
        is_reply = row["purpose"] == "reply"
        assert_harmless(row["content"], ALWAYS + ([] if is_reply else AUTOMATIC), may=THREADS)
        raw = email.message_from_bytes(row["content"])
        assert raw["To"] == row["recipient"] and raw["From"] == "Support <support@helpdesk.example>"
        assert re.fullmatch(r"[!-~]+@[a-zA-Z0-9.-]+", row["recipient"])
        assert is_reply or raw["Subject"] == f"[{response.json['ticket']}] We received your message"
        assert parsed(row["content"]).get_content().startswith("Hello")
