"""Never in a loop: running copies of the desk and the machines they meet, with real SMTP between.

The mail world is an SMTP server that every desk sends to. It posts what it takes to the desk that
owns the address, as an MTA's pipe would, or gives it to a correspondent who answers by rule. The
correspondents answer every mail, also where the real ones hold back after the first.
What needs no second party, bounces of our mail and the caps, is posted to a desk in this process.

`python tests/test_loops.py` prints what two desks say to each other.
"""

import concurrent.futures
import contextlib
import email
import email.message
import email.policy
import email.utils
import http.client
import itertools
import json
import queue
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections import namedtuple
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))   # as a script, pytest's pythonpath is unset

from doors import DOORS, deliver

import inbound
from conftest import LONG, NOON, SECRET, URL, Served, Sink, eventually

ONE, TWO, THEM = "support@one.example", "support@two.example", "office@them.example"
MARKS = ("Auto-Submitted", "X-Auto-Response-Suppress", "Precedence", "Return-Path")
IDS = ("In-Reply-To", "References")
NUMBERS = itertools.count(1)

# A mail that the world brought somewhere; `answer` is the desk's, {} where a correspondent got it.
Delivery = namedtuple("Delivery", "envelope_from to mail answer")


# The mail world -----------------------------------------------------------------------------------

class World(Sink):
    """Takes what the desks send, and brings it to the desk or correspondent of the address.

    `lost` names headers that do not survive the way; with "Return-Path" nobody hears of MAIL FROM.
    """

    def __init__(self, lost=()):
        self.desks, self.people, self.lost = {}, {}, lost
        self.deliveries, self.troubles, self.waiting = [], [], queue.Queue()
        self.carrier = threading.Thread(target=self.carry)
        super().__init__()

    async def handle_DATA(self, server, session, envelope):
        for address in envelope.rcpt_tos:
            self.send(envelope.mail_from.strip("<>"), address, envelope.content)
        return "250 OK"

    def send(self, envelope_from, to, content):
        self.waiting.put((envelope_from, to, content))

    def carry(self):
        """Bring what waits where it belongs, one after the other, until None comes."""
        while work := self.waiting.get():
            try:
                self.bring(*work)
            except Exception as error:      # `settle` shows it: a thread has nobody to raise it to
                self.troubles.append(error)
            finally:
                self.waiting.task_done()

    def bring(self, envelope_from, to, content):
        mail, answer = email.message_from_bytes(content, policy=email.policy.SMTP), {}
        if to in self.desks:
            for name in self.lost:
                del mail[name]
            received = f"from relay.example by mx.{to.partition('@')[2]}; {mail['Date']}"
            trace = f"Return-Path: <{envelope_from}>\r\nReceived: {received}\r\n"
            trace = trace if "Return-Path" not in self.lost else ""
            answer = self.desks[to].post(trace.encode() + mail.as_bytes())
        else:
            for response in self.people[to](envelope_from, mail):
                self.send(*response)
        self.deliveries.append(Delivery(envelope_from, to, mail, answer))

    def is_still(self):
        """Whether nothing is on its way: in no outbox, nor here, all through the question."""
        count = len(self.deliveries)
        return not (self.waiting.unfinished_tasks or any(desk.mail_to_go() for desk in
                    self.desks.values()) or self.waiting.unfinished_tasks
                    or count != len(self.deliveries))

    def settle(self):
        """Wait until it is still, and see that it stays so when every outbox is sent by force."""
        eventually(self.is_still)
        count = len(self.deliveries)
        for desk in self.desks.values():
            desk.run("outbox", "send")
        eventually(self.is_still)
        assert (self.troubles, len(self.deliveries)) == ([], count)

    def traffic(self):
        """(from, to, kind, confirmation) of each delivery; kind None where no desk got it."""
        return [(str(mail["From"].addresses[0].addr_spec), to, answer.get("kind"),
                 answer.get("confirmation")) for _, to, mail, answer in self.deliveries]

    def close(self):
        self.stop()
        self.waiting.put(None)
        self.carrier.join(LONG)


class Copy:
    """A running `serve` with an address and a database of its own, whose relay is the world."""

    def __init__(self, served, world, address):
        self.served, self.address = served, address
        self.execute("""UPDATE email_account SET inbound_secret = ?, address = ?, smtp_port = ?,
            smtp_host = '127.0.0.1', smtp_security = 'none'""", SECRET, address, world.port)
        world.desks[address] = self

    def post(self, content):
        """POST a raw mail; return the answer's object."""
        connection = http.client.HTTPConnection("127.0.0.1", self.served.port, timeout=LONG)
        with contextlib.closing(connection):
            connection.request("POST", URL, content, {
                "X-Mobieus-Inbound-Secret": SECRET, "Content-Type": "message/rfc822"})
            response = connection.getresponse()
            words = response.read()
        assert response.status == 200, words
        return json.loads(words)

    def run(self, *argv, stdin=""):
        """Run the command line in a process of its own; return what it printed."""
        command = [sys.executable, inbound.__file__, "--db", str(self.served.path), *argv]
        return subprocess.run(command, input=stdin, check=True, capture_output=True, text=True,
                              timeout=LONG).stdout

    def reply(self, reference):
        """An agent answers; what waits is sent at once, not at the courier's next look."""
        self.run("reply", reference, stdin="We are on our way.\n")
        self.run("outbox", "send")

    def execute(self, statement, *parameters):
        with contextlib.closing(sqlite3.connect(self.served.path, timeout=LONG)) as db, db:
            return db.execute(statement, parameters).fetchall()

    def mail_to_go(self):
        return self.execute("SELECT id FROM outbox WHERE state IN ('queued', 'sending')")

    def kept(self):
        """(message_id, kind, confirmation) of all that came in."""
        return self.execute("""SELECT message_id, kind, confirmation FROM message
            WHERE direction = 'in' ORDER BY id""")


@pytest.fixture
def make_world():
    worlds = []

    def make(*more):
        worlds.append(World(*more))
        worlds[-1].start()
        worlds[-1].carrier.start()
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.fixture
def one(make_world, serve):
    """The desk ONE in a world of its own, `one.world`."""
    world = make_world()
    desk = Copy(serve("one.db"), world, ONE)
    desk.world = world
    return desk


def two_desks(world, serve):
    return Copy(serve("one.db"), world, ONE), Copy(serve("two.db"), world, TWO)


def letter(sender, to, subject, headers=(), text="It burns.\n"):
    """A mail's bytes."""
    mail = email.message.EmailMessage(email.policy.SMTP)
    basic = {"From": sender, "To": to, "Subject": subject, "Date": email.utils.formatdate(),
             "Message-ID": f"<{next(NUMBERS)}.test@{sender.rpartition('@')[2]}>"}
    for name, value in {**basic, **dict(headers)}.items():
        mail[name] = value
    mail.set_content(text)
    return mail.as_bytes()


def all_is_kept(world):
    """Every mail that a desk was brought is a message of its own there, in the order of arrival."""
    for address, desk in world.desks.items():
        brought = [(str(mail["Message-ID"]), answer["kind"], answer["confirmation"])
                   for _, to, mail, answer in world.deliveries if to == address]
        assert desk.kept() == brought
        assert desk.execute("SELECT * FROM rejected") == []
    return True


# Two desks ----------------------------------------------------------------------------------------

def test_two_desks_exchange_one_confirmation_and_fall_silent(make_world, serve):
    world = make_world()
    one, two = two_desks(world, serve)
    world.send(TWO, ONE, letter(TWO, ONE, "Printer on fire"))
    world.settle()
    assert world.traffic() == [
        (TWO, ONE, "human", "queued"),
        (ONE, TWO, "auto-reply", "withheld")]
    confirmation = world.deliveries[1]
    assert (confirmation.envelope_from, confirmation.mail["Auto-Submitted"]) == ("", "auto-replied")
    assert all_is_kept(world)
    assert two.execute("SELECT queue.name FROM ticket JOIN queue ON queue.id = queue") == [
        ("Automatic",)]


def test_they_do_so_where_the_relays_refuse_the_null_sender(make_world, serve):
    world = make_world()
    for desk in two_desks(world, serve):
        desk.execute("UPDATE email_account SET confirmation_envelope_from = address")
    world.send(TWO, ONE, letter(TWO, ONE, "Printer on fire"))
    world.settle()
    assert world.traffic() == [
        (TWO, ONE, "human", "queued"),
        (ONE, TWO, "auto-reply", "withheld")]
    assert [delivery.envelope_from for delivery in world.deliveries] == [TWO, ONE]
    assert all_is_kept(world)


@pytest.mark.parametrize("mark, kind", [
    ("Return-Path", "human"), ("Auto-Submitted", "auto-reply"), ("Precedence", "bulk"),
    ("X-Auto-Response-Suppress", "human")])
def test_one_mark_of_our_confirmation_is_enough_where_the_others_are_lost(
        make_world, serve, mark, kind):
    world = make_world([name for name in MARKS if name != mark])
    two_desks(world, serve)
    world.send(TWO, ONE, letter(TWO, ONE, "Printer on fire"))
    world.settle()
    assert world.traffic() == [(TWO, ONE, "human", "queued"), (ONE, TWO, kind, "withheld")]
    assert all_is_kept(world)


def test_one_confirmation_each_way_is_the_end_where_every_mark_is_lost(make_world, serve):
    world = make_world(MARKS)
    two_desks(world, serve)
    world.send(TWO, ONE, letter(TWO, ONE, "Printer on fire"))
    world.settle()
    assert world.traffic() == [
        (TWO, ONE, "human", "queued"),
        (ONE, TWO, "human", "queued"),
        (TWO, ONE, "human", "not due")]     # it names a mail of ours
    assert all_is_kept(world)


def test_the_caps_are_the_end_where_every_mark_and_every_id_is_lost(make_world, serve):
    world = make_world((*MARKS, *IDS))
    two_desks(world, serve)
    world.send(TWO, ONE, letter(TWO, ONE, "Printer on fire"))
    world.settle()
    assert world.traffic() == [
        *[(TWO, ONE, "human", "queued"), (ONE, TWO, "human", "queued")] * 3,
        (TWO, ONE, "human", "withheld")]    # three of ours went there, and three of theirs came
    assert "confirmations_per_address_hour" in world.deliveries[-1].answer["reason"]
    assert all_is_kept(world)


def test_a_reply_from_desk_to_desk_is_confirmed_once_and_opens_nothing_again(make_world, serve):
    world = make_world()
    one, two = two_desks(world, serve)
    world.send(TWO, ONE, letter(TWO, ONE, "Printer on fire"))
    world.settle()
    reference = world.deliveries[0].answer["ticket"]
    one.run("close", reference)
    one.reply(reference)
    world.settle()
    assert world.traffic()[2:] == [
        (ONE, TWO, "human", "queued"),
        (TWO, ONE, "auto-reply", "not due")]
    assert world.deliveries[3].answer["ticket"] == reference
    assert one.execute("SELECT status FROM ticket") == [("closed",)]

    two.reply(world.deliveries[2].answer["ticket"])
    world.settle()
    assert world.traffic()[4:] == [(TWO, ONE, "human", "not due")]
    assert world.deliveries[4].answer["ticket"] == reference
    assert one.execute("SELECT status FROM ticket") == [("open",)]     # a person wrote it
    assert all_is_kept(world)


# Desks that are each other's team -----------------------------------------------------------------

def ring_of(names, world, serve):
    """Desks of which each has the next one for its team; THEM takes mail and is silent."""
    world.people[THEM] = lambda envelope_from, mail: []
    desks = [Copy(serve(f"{name}.db"), world, f"support@{name}.example") for name in names]
    for desk, its_team in zip(desks, [*desks[1:], desks[0]]):
        desk.run("account", "set", f"staff={its_team.address}")
    return desks


@pytest.mark.parametrize("names", [["one", "two"], ["one", "two", "three"]])
def test_what_is_told_to_another_desk_ends_there(make_world, serve, names):
    world = make_world()
    ring_of(names, world, serve)
    world.send(THEM, ONE, letter(THEM, ONE, "Printer on fire"))
    world.settle()
    assert world.traffic() == [
        (THEM, ONE, "human", "queued"), (ONE, THEM, None, None), (ONE, TWO, "machine", "withheld")]
    assert all_is_kept(world)


@pytest.mark.parametrize("names", [["one", "two"], ["one", "two", "three"]])
def test_it_ends_there_too_where_only_our_own_mark_is_left(make_world, serve, names):
    world = make_world(MARKS)
    ring_of(names, world, serve)
    world.send(THEM, ONE, letter(THEM, ONE, "Printer on fire"))
    world.settle()
    # A confirmation without a mark is a person's mail, and so the team's answer.
    assert world.traffic() == [
        (THEM, ONE, "human", "queued"), (ONE, THEM, None, None), (ONE, TWO, "human", "queued"),
        (TWO, ONE, "human", "not due"), (ONE, THEM, None, None)]


def test_a_person_at_the_other_desk_answers_for_it(make_world, serve):
    world = make_world()
    one, two = ring_of(["one", "two"], world, serve)
    world.send(THEM, ONE, letter(THEM, ONE, "Printer on fire"))
    world.settle()
    two.reply(world.deliveries[2].answer["ticket"])
    world.settle()
    assert world.traffic()[3:] == [(TWO, ONE, "human", "not due"), (ONE, THEM, None, None)]
    assert "We are on our way." in world.deliveries[-1].mail.get_content()


# A desk and a machine that answers every mail -----------------------------------------------------
# Each function plays one: the mail it got → (MAIL FROM, subject, headers) of its answer.

def zendesk(mail):
    """All of Zendesk's mail bears these."""
    return THEM, f"[Request received] {mail['Subject']}", {
        "Auto-Submitted": "auto-generated", "X-Auto-Response-Suppress": "All",
        "X-Mailer": "Zendesk Mailer"}


def freescout(mail):
    """app/Jobs/SendAutoReply.php, app/Mail/AutoReply.php: no Auto-Submitted, no null sender."""
    return THEM, f"Re: {mail['Subject']}", {
        "In-Reply-To": mail["Message-ID"], "References": mail["Message-ID"],
        "Message-ID": f"<autoreply-{next(NUMBERS)}-0cc175b9c0f1b6a8@them.example>"}


def exchange(mail):
    """Out of office of Exchange Online."""
    return "", f"Automatic reply: {mail['Subject']}", {
        "X-Auto-Response-Suppress": "All", "X-MS-Exchange-Inbox-Rules-Loop": THEM,
        "auto-submitted": "auto-generated",
        "x-ms-exchange-generated-message-source": "Mailbox Rules Agent",
        "x-ms-exchange-parent-message-id": mail["Message-ID"]}


def exchange_rule(mail):
    """A rule with a template: its own subject, and only Exchange's own id threads."""
    return exchange(mail)[0], "Our office is closed", exchange(mail)[2]


def rule_of_old(mail):
    """The same of an Exchange that writes no id at all."""
    headers = exchange(mail)[2]
    del headers["x-ms-exchange-parent-message-id"]
    return "", "Our office is closed", headers


def gmail(mail):
    """Gmail's vacation responder: an envelope sender, no In-Reply-To."""
    return THEM, f"{mail['Subject']}", {
        "Precedence": "bulk", "X-Autoreply": "yes", "Auto-Submitted": "auto-replied"}


def naive(mail):
    """A script that answers every mail like a person, without any mark."""
    return THEM, f"Re: {mail['Subject']}", {}


def forgetful(mail):
    """The same, and with a subject of its own: nothing tells it from a person's new matter."""
    return THEM, "Thank you for your mail", {}


def plays(machine):
    """The correspondent THEM who answers each mail as `machine` does."""
    def respond(envelope_from, mail):
        path, subject, headers = machine(mail)
        to = mail["From"].addresses[0].addr_spec
        return [(path, to, letter(THEM, to, subject, headers, "We got your mail.\n"))]
    return respond


# (machine, its answers' kind, and what becomes of their confirmation)
MACHINES = [
    (freescout, "human", "not due"),                # no mark at all, but it threads
    (exchange, "auto-reply", "not due"),            # threads by the tag that its subject repeats
    (exchange_rule, "auto-reply", "not due"),       # threads by Exchange's own header
    (rule_of_old, "auto-reply", "withheld"),        # opens a ticket in Automatic, unanswered
    (gmail, "auto-reply", "not due"),
    (naive, "human", "not due")]


@pytest.mark.parametrize("machine, kind, confirmation", MACHINES)
def test_a_machine_that_answers_all_gets_one_confirmation_and_no_answer(
        one, machine, kind, confirmation):
    world = one.world
    world.people[THEM] = plays(machine)
    world.send(THEM, ONE, letter(THEM, ONE, "Printer on fire"))
    world.settle()
    exchanged = [(ONE, THEM, None, None), (THEM, ONE, kind, confirmation)]
    assert world.traffic() == [(THEM, ONE, "human", "queued"), *exchanged]
    one.reply(world.deliveries[0].answer["ticket"])
    world.settle()
    assert world.traffic()[3:] == exchanged
    assert all_is_kept(world)
    queues = [("Support",), *[("Automatic",)] * (2 if confirmation == "withheld" else 0)]
    assert one.execute("SELECT queue.name FROM ticket JOIN queue ON queue.id = queue"
                       " ORDER BY ticket.id") == queues


def test_a_desk_that_marks_all_its_mail_as_generated_gets_a_ticket_and_no_answer(one):
    world = one.world
    world.people[THEM] = plays(zendesk)
    _, _, marks = zendesk(email.message.EmailMessage())
    world.send(THEM, ONE, letter(THEM, ONE, "Printer on fire", marks))
    world.settle()
    assert world.traffic() == [(THEM, ONE, "machine", "withheld")]
    one.reply(world.deliveries[0].answer["ticket"])
    world.settle()
    assert world.traffic()[1:] == [(ONE, THEM, None, None), (THEM, ONE, "machine", "not due")]
    assert all_is_kept(world)
    assert one.execute("SELECT queue, messages FROM inbox") == [("Support", 3)]


def test_the_cap_ends_what_no_sign_tells_from_a_person(one):
    world = one.world
    world.people[THEM] = plays(forgetful)
    world.send(THEM, ONE, letter(THEM, ONE, "Printer on fire"))
    world.settle()
    assert world.traffic() == [
        *[(THEM, ONE, "human", "queued"), (ONE, THEM, None, None)] * 3,
        (THEM, ONE, "human", "withheld")]
    assert all_is_kept(world)


# Lists and bounces --------------------------------------------------------------------------------

def redistribute(is_munged):
    """A list that sends what it gets to its members, of which ONE is one, with a footer.

    Mailman keeps the Message-ID and From; one that munges From for DMARC may write its own id.
    """
    def respond(envelope_from, mail):
        headers = {name: value for name, value in mail.items() if name in (*MARKS, *IDS)}
        headers |= {"Precedence": "list", "List-Id": "<talk.them.example>",
                    "List-Post": f"<mailto:{THEM}>", "X-BeenThere": THEM}
        if not is_munged:
            headers |= {"Message-ID": mail["Message-ID"]}
        sender = THEM if is_munged else ONE
        text = f"{mail.get_content()}-- \nTalk mailing list, to leave it write to {THEM}\n"
        subject = f"[Talk] {mail['Subject']}"
        return [("talk-bounces@them.example", ONE, letter(sender, ONE, subject, headers, text))]
    return respond


def test_a_list_that_sends_our_confirmation_back_is_kept_and_not_answered(one):
    world = one.world
    world.people[THEM] = redistribute(is_munged=True)
    world.send(THEM, ONE, letter(THEM, ONE, "Printer on fire"))     # no list header: it is answered
    world.settle()
    assert world.traffic() == [
        (THEM, ONE, "human", "queued"), (ONE, THEM, None, None),
        (THEM, ONE, "auto-reply", "not due")]
    assert all_is_kept(world)


def test_our_own_mail_that_a_list_sends_back_is_known_by_its_id(one):
    world = one.world
    world.people[THEM] = redistribute(is_munged=False)
    world.send(THEM, ONE, letter(THEM, ONE, "Printer on fire"))
    world.settle()
    reference = world.deliveries[0].answer["ticket"]
    # SPEC 3.2: with the list's footer it is another message, and so it is kept, on that ticket.
    assert [(to, answer.get("status"), answer.get("ticket"), answer.get("confirmation"))
            for _, to, _, answer in world.deliveries][1:] == [
                (THEM, None, None, None), (ONE, "appended", reference, "not due")]
    assert one.execute("SELECT direction, notes <> '[]' FROM message ORDER BY id") == [
        ("in", 0), ("out", 0), ("in", 1)]


REPORT = """From: Mail Delivery System <MAILER-DAEMON@them.example>
To: {to}
Subject: Undelivered Mail Returned to Sender
Date: {date}
Message-ID: <{number}.dsn@them.example>
Auto-Submitted: auto-replied
MIME-Version: 1.0
Content-Type: multipart/report; report-type=delivery-status; boundary="dsn"

--dsn
Content-Type: text/plain; charset=us-ascii

<office@them.example>: user unknown

--dsn
Content-Type: message/delivery-status

Reporting-MTA: dns; mx.them.example

Final-Recipient: rfc822; office@them.example
Action: failed
Status: 5.1.1
Diagnostic-Code: smtp; 550 5.1.1 user unknown

--dsn
Content-Type: text/rfc822-headers

{headers}
--dsn--
"""


def bounce(envelope_from, mail):
    """Postfix: a report to MAIL FROM, and none to the null sender (RFC 5321 6.1)."""
    if not envelope_from:
        return []
    headers = "".join(f"{name}: {value}\n" for name, value in mail.items())
    report = REPORT.format(to=envelope_from, date=mail["Date"], number=next(NUMBERS),
                           headers=headers)
    return [("", envelope_from, report.replace("\n", "\r\n").encode())]


def states(one):
    return one.execute("SELECT purpose, state, last_error FROM outbox ORDER BY id")


def test_nobody_reports_back_to_our_null_sender_and_a_reply_that_bounced_has_failed(one):
    world = one.world
    world.people[THEM] = bounce
    world.send(THEM, ONE, letter(THEM, ONE, "Printer on fire"))
    world.settle()
    assert world.traffic() == [(THEM, ONE, "human", "queued"), (ONE, THEM, None, None)]
    reference = world.deliveries[0].answer["ticket"]
    one.run("close", reference)
    one.reply(reference)
    world.settle()
    assert world.traffic()[2:] == [
        (ONE, THEM, None, None), ("MAILER-DAEMON@them.example", ONE, "bounce", "not due")]
    assert world.deliveries[3].answer["ticket"] == reference
    assert states(one) == [("confirmation", "sent", ""), ("reply", "failed", "bounced: 5.1.1")]
    assert one.execute("SELECT status FROM ticket") == [("closed",)]
    assert all_is_kept(world)


def test_a_confirmation_with_an_envelope_sender_that_bounced_has_failed_and_that_is_all(one):
    one.execute("UPDATE email_account SET confirmation_envelope_from = address")
    world = one.world
    world.people[THEM] = bounce
    world.send(THEM, ONE, letter(THEM, ONE, "Printer on fire"))
    world.settle()
    assert world.traffic() == [
        (THEM, ONE, "human", "queued"), (ONE, THEM, None, None),
        ("MAILER-DAEMON@them.example", ONE, "bounce", "not due")]
    assert states(one) == [("confirmation", "failed", "bounced: 5.1.1")]
    assert all_is_kept(world)


# What a bounce of our confirmation looks like ----------------------------------------------------

DAEMON = "Mail Delivery System <MAILER-DAEMON@mx.customer.example>"
NOTICE = "Undelivered Mail Returned to Sender"


def notice(text, sender=DAEMON, subject=NOTICE, headers=(), path="<>"):
    """A bounce of plain text; {id} and {headers} in it are those of our mail."""
    top = {"Return-Path": path, "Received": "by mx.helpdesk.example", "From": sender,
           "To": "support@helpdesk.example", "Subject": subject, **dict(headers)}
    lines = [f"{name}: {value}" for name, value in top.items() if value is not None]
    return "\n".join([*lines, "Message-ID: <report@mx.customer.example>", "", text])


def report(action, status, subject=NOTICE, kind="multipart/report; report-type=delivery-status",
           text="About ada@customer.example.", **more):
    """A delivery report; status None leaves the field out."""
    lines = [f"Action: {action}"] + ([f"Status: {status}"] if status else [])
    fields = "\n".join(lines)
    body = f"""--dsn
Content-Type: text/plain; charset=us-ascii

{text}
--dsn
Content-Type: message/delivery-status

Reporting-MTA: dns; mx.customer.example

Final-Recipient: rfc822; ada@customer.example
{fields}
--dsn
Content-Type: text/rfc822-headers

{{headers}}
--dsn--
"""
    mime = {"MIME-Version": "1.0", "Content-Type": f'{kind}; boundary="dsn"'}
    return notice(body, subject=subject, headers=mime, **more)


def returned(text, sender, subject):
    """A bounce without any status: a text, and our mail behind it as message/rfc822."""
    body = f"""--up
Content-Type: text/plain

{text}
--up
Content-Type: message/rfc822

{{headers}}

Hello,
--up--
"""
    mime = {"MIME-Version": "1.0", "Content-Type": 'multipart/mixed; boundary="up"'}
    return notice(body, sender, subject, mime)


# name: bounce. After which our confirmation has failed.
FINAL = {
    "Postfix": report("failed", "5.1.1"),
    "a report that expired": report("failed", "4.4.7"),
    "a report without Status": report("failed", None),
    "a report in upper case": report("FAILED", "5.2.2"),
    "a report without report-type": report("failed", "5.1.1", kind="multipart/report"),
    "a report whose text speaks of a delay": report(
        "failed", "5.4.7", text="Delivery was delayed for five days, and now it has failed."),
    "Exim": notice("""This message was created automatically by mail delivery software.

A message that you sent could not be delivered to one or more of its recipients.
The following address(es) failed:

  ada@customer.example
    Unrouteable address

------ This is a copy of the message's headers. ------

{headers}
""", "Mail Delivery System <Mailer-Daemon@exim.customer.example>",
                   "Mail delivery failed: returning message to sender",
                   {"X-Failed-Recipients": "ada@customer.example",
                    "Auto-Submitted": "auto-replied"}),
    "qmail": notice("""Hi. This is the program at qmail.customer.example.
I wasn't able to deliver your message to the following addresses.

<ada@customer.example>:
Sorry, no mailbox here by that name. (#5.1.1)

--- Below this line is a copy of the message.

{headers}

Hello,
""", "MAILER-DAEMON@qmail.customer.example", "failure notice"),
    "qmail, at the end of its queue": notice("""Hi. This is the program at qmail.customer.example.
I wasn't able to deliver your message to the following addresses.

<ada@customer.example>:
CNAME lookup failed. (#4.4.3)
I'm not going to try again; this message has been in the queue too long.

--- Below this line is a copy of the message.

{headers}
""", "MAILER-DAEMON@qmail.customer.example", "failure notice"),
    "Exchange 2003": returned("""Your message did not reach some or all of its recipients.

      Subject:  We received your message

The following recipient(s) could not be reached:

      ada@customer.example
            The e-mail account does not exist at this organization.
            <mx.customer.example #5.1.1>
""", "System Administrator <postmaster@customer.example>", "Undeliverable: We got your message"),
    "Gmail of old": notice("""Delivery to the following recipient failed permanently:

     ada@customer.example

Technical details of permanent failure:
DNS Error: Domain name not found

----- Original message -----

{headers}

Hello,
""", "Mail Delivery Subsystem <mailer-daemon@bigmail.example>",
                           "Delivery Status Notification (Failure)",
                           {"X-Failed-Recipients": "ada@customer.example"}),
    "Google Groups": notice("""Hello support@helpdesk.example,

The group ada may not exist, or you may not have permission to post to it.
""", "Mail Delivery Subsystem <mailer-daemon@groups.example>",
                            "Delivery Status Notification (Failure)",
                            {"In-Reply-To": "{id}", "References": "{id}"}),
    "Notes": returned("""Your message

  Subject: We received your message

was not delivered to:

  ada@customer.example

because:

  User ada (ada@customer.example) not listed in the directory
""", "Postmaster <postmaster@notes.customer.example>",
                      "DELIVERY FAILURE: User ada (ada@customer.example) not listed"),
    "Zoho": notice("""This message was created automatically by mail delivery software.
A message that you sent could not be delivered to one or more of its recipients.

ada@customer.example Invalid Address, ERROR_CODE :550, ERROR_CODE :Relaying denied

Received:from mx.helpdesk.example; Mon, 21 Sep 2026 16:13:21 +0200
Message-ID:{id}
Subject:We received your message
""", "mailer-daemon@mail.zoho.example", "Undelivered Mail Returned to Sender"),
    "1&1": notice("""This message was created automatically by mail delivery software.

A message that you sent could not be delivered to one or more of
its recipients. The following addresses failed:

<ada@customer.example>:
unknown user.

--- The header of the original message is following. ---

{headers}
""", "Mail Delivery System <mailer-daemon@kundenserver.example>",
                  "Mail delivery failed: returning message to sender"),
    "one that quotes our mail": notice("""We do not know ada@customer.example.

> From: Support <support@helpdesk.example>
> Message-ID: {id}
> Subject: We received your message
"""),
    "one that only answers it": notice("No such mailbox.", headers={"In-Reply-To": "{id}"}),
    "one that says 4.x.x and gave up": notice(
        "ada@customer.example: 452 4.2.2 over quota. We have given up.\n\nMessage-ID: {id}\n"),
    "one that names both kinds of code": notice(
        "Delayed at first: 421 4.4.1 no answer. Then: 550 5.1.1 unknown.\n\nMessage-ID: {id}\n"),
}

# name: bounce. After which our confirmation is what it was: it may still arrive, or it has.
NOT_FINAL = {
    "a delay": report("delayed", "4.4.1", "Delayed Mail (still being retried)"),
    "a delay with a final code": report("delayed", "5.4.1", "Delayed Mail (still being retried)"),
    "a delay under a subject of failure": report("delayed", "4.4.1"),
    "a delay, in odd case": report("Delayed (will be retried)", "4.2.2"),
    "a delivery": report("delivered", "2.0.0", "Successful Mail Delivery Report"),
    "a relay": report("relayed", "2.1.9", "Successful Mail Delivery Report"),
    "an expansion": report("expanded", "2.0.0", "Successful Mail Delivery Report"),
    "a warning in the subject": notice(
        "ada@customer.example: 421 4.4.1 no answer from mx.customer.example\n\nMessage-ID: {id}\n",
        subject="Warning: message delayed 24 hours"),
    "a warning in the text": notice(
        "Delivery is delayed; we will keep trying for 4 days. (#4.4.1)\n\nMessage-ID: {id}\n"),
    "a warning, and digits of an id that look like a code": notice(
        "Delivery is delayed. (#4.4.1)\n\nMessage-ID: {id}\nReferences: <a552f@x.example>\n"),
    "somebody else's mail": notice(
        "No such user. 550 5.1.1\n\nMessage-ID: <never.sent@helpdesk.example>\n"),
}


def deliver_bounce(desk, template, ours, door):
    """Deliver this bounce of our mail; return the answer."""
    ours = email.message_from_bytes(ours)
    headers = "\n".join(f"{name}: {value}" for name, value in ours.items())
    raw = template.replace("{headers}", headers).replace("{id}", ours["Message-ID"])
    return deliver(desk, raw.encode(), door)


def bounced(desk, sink, door, template):
    """Send a confirmation, deliver this bounce of it; return the answer, outbox and ticket."""
    desk.execute("""UPDATE email_account SET smtp_host = '127.0.0.1', smtp_port = ?,
        smtp_security = 'none'""", sink.port)
    reference = desk.post(desk.mail())["ticket"]
    inbound.send_due(desk.store)
    assert desk.sql("SELECT state FROM outbox") == [("sent",)]
    answer = deliver_bounce(desk, template, sink.received[0].content, door)
    return answer, desk.sql("SELECT state, last_error FROM outbox"), reference


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", FINAL)
def test_a_final_bounce_marks_our_confirmation_failed(desk, sink, door, name):
    answer, [(state, error)], reference = bounced(desk, sink, door, FINAL[name])
    assert (answer["kind"], answer["confirmation"]) == ("bounce", "not due"), answer["reason"]
    assert (answer["status"], answer["ticket"]) == ("appended", reference)
    assert state == "failed" and "bounce" in error


@pytest.mark.parametrize("door", DOORS)
def test_a_bounce_may_come_before_we_have_noted_that_the_relay_took_our_mail(desk, door):
    desk.execute("UPDATE email_account SET smtp_host = '127.0.0.1'")
    desk.post(desk.mail())
    [account] = desk.store.accounts()
    row = desk.store.write(inbound.claim, account)
    assert deliver_bounce(desk, FINAL["Postfix"], row["content"], door)["kind"] == "bounce"
    desk.store.write(inbound.settle, row, "sent", "")
    assert desk.sql("SELECT state, last_error, next_attempt_at FROM outbox") == [
        ("failed", "bounced: 5.1.1", None)]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", NOT_FINAL)
def test_a_bounce_that_is_not_final_or_not_ours_marks_nothing(desk, sink, door, name):
    answer, outbox, reference = bounced(desk, sink, door, NOT_FINAL[name])
    assert answer["kind"] == "bounce"
    assert (answer["ticket"] == reference) == (name != "somebody else's mail")
    assert outbox == [("sent", "")]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("headers", [{"Auto-Submitted": "auto-replied"}, {}])
def test_what_is_no_bounce_fails_nothing_whatever_it_quotes(desk, sink, door, headers):
    text = "I am away. Error 550 5.1.1 unknown user.\n\nMessage-ID: {id}\n"
    vacation = notice(text, "Ada <ada@customer.example>", "About your message",
                      headers | {"In-Reply-To": "{id}"}, path="<ada@customer.example>")
    answer, outbox, reference = bounced(desk, sink, door, vacation)
    assert (answer["status"], answer["ticket"]) == ("appended", reference)
    assert answer["kind"] == ("auto-reply" if headers else "human")
    assert outbox == [("sent", "")]


# Caps ---------------------------------------------------------------------------------------------

def fates(desk, addresses):
    """Post one first mail from each address; return (confirmation, reason) of each."""
    found = []
    for address in addresses:
        mail = desk.mail(**{"from": address, "message_id": f"<{next(NUMBERS)}@caps.example>"})
        answer = desk.post(mail)
        assert (answer["status"], answer["kind"]) == ("created", "human")
        found.append((answer["confirmation"], answer["reason"]))
    return found


def confirmations(desk, addresses):
    return [confirmation for confirmation, _ in fates(desk, addresses)]


# Spellings of one mailbox, as its provider counts.
ONE_MAILBOX = [
    ["ada.lovelace@gmail.com", "adalovelace@gmail.com", "a.d.a.lovelace@gmail.com"],
    ["adalovelace@gmail.com", "adalovelace@googlemail.com", "ada.lovelace@googlemail.com"],
    ["adalovelace+x@gmail.com", "AdaLovelace@GMail.com", "ada.lovelace+y@GoogleMail.com"],
    ["ada@customer.example", "ada+x@customer.example", "ADA+y+z@Customer.Example"],
    ["ada@outlook.com", "ada+x@outlook.com", "Ada+y@Outlook.com"],
]


@pytest.mark.parametrize("spellings", ONE_MAILBOX)
def test_a_mailbox_is_counted_as_its_provider_counts_it(desk, spellings):
    assert confirmations(desk, spellings) == ["queued"] * 3
    for again in spellings:
        [(confirmation, reason)] = fates(desk, [again])
        assert confirmation == "withheld" and "confirmations_per_address_hour" in reason


def test_a_dot_makes_another_mailbox_where_the_provider_says_so(desk):
    names = ["ada.lovelace", "adalovelace", "a.dalovelace", "adal.ovelace"]
    assert confirmations(desk, [f"{name}@customer.example" for name in names]) == ["queued"] * 4


def test_one_domain_gets_thirty_confirmations_an_hour(desk):
    crowd = [f"customer{number}@{name}" for number, name in
             enumerate(["crowd.example", "Crowd.Example"] * 15)]
    assert confirmations(desk, crowd) == ["queued"] * 30
    [(confirmation, reason)] = fates(desk, ["another@crowd.example"])
    assert confirmation == "withheld" and "confirmations_per_domain_hour" in reason
    assert confirmations(desk, ["ada@customer.example"]) == ["queued"]
    desk.clock.advance(3601)
    assert confirmations(desk, ["another@crowd.example"]) == ["queued"]


@pytest.mark.parametrize("domain", ["gmail.com", "googlemail.com", "outlook.com", "hotmail.com",
                                    "yahoo.com", "icloud.com", "gmx.de", "GMail.com"])
def test_a_large_provider_s_domain_has_no_cap_of_its_own(desk, domain):
    desk.execute("UPDATE email_account SET confirmations_per_domain_hour = 2")
    crowd = [f"customer{number}@{domain}" for number in range(5)]
    assert confirmations(desk, crowd) == ["queued"] * 5
    assert confirmations(desk, [f"{name}@customer.example" for name in "abc"]) == [
        "queued", "queued", "withheld"]


def test_a_large_provider_s_sub_domain_is_one_person_s(desk):
    desk.execute("UPDATE email_account SET confirmations_per_domain_hour = 2")
    assert confirmations(desk, [f"{name}@ada.fastmail.com" for name in "abc"]) == [
        "queued", "queued", "withheld"]
    assert confirmations(desk, ["ada@fastmail.com", "bob@bob.fastmail.com"]) == ["queued"] * 2


def test_the_domain_s_cap_is_a_column_in_force_for_the_next_mail(desk):
    assert desk.sql("SELECT confirmations_per_domain_hour FROM email_account") == [(30,)]
    desk.execute("UPDATE email_account SET confirmations_per_domain_hour = 0")
    assert confirmations(desk, ["ada@customer.example"]) == ["withheld"]


@pytest.mark.parametrize("cap", ["confirmations_per_address_hour", "confirmations_per_address_day",
                                 "confirmations_per_domain_hour", "confirmations_per_hour"])
def test_a_clock_that_was_in_the_future_silences_nobody(desk, cap):
    desk.execute(f"UPDATE email_account SET {cap} = 1")
    ada = ["ada@customer.example"]
    desk.clock.advance(10 * 365 * 86400)
    assert confirmations(desk, ada * 2) == ["queued", "withheld"]
    desk.clock.now = NOON
    assert confirmations(desk, ada * 2) == ["queued", "withheld"]


# A flood ------------------------------------------------------------------------------------------

def test_fifty_mails_forged_in_one_name_send_it_three_and_lose_none(one):
    world = one.world
    world.people[THEM] = lambda *_: []
    mails = [letter(THEM, ONE, f"Number {number}") for number in range(50)]
    trace = f"Return-Path: <{THEM}>\r\n".encode()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda mail: one.post(trace + mail), mails))
    world.settle()
    assert world.traffic() == [(ONE, THEM, None, None)] * 3
    withheld = [answer for answer in answers if answer["confirmation"] == "withheld"]
    assert len(withheld) == 47
    assert all("confirmations_per_address_hour" in answer["reason"] for answer in withheld)
    assert len({answer["ticket"] for answer in answers}) == 50
    assert one.execute("SELECT count(*), count(DISTINCT subject) FROM inbox") == [(50, 50)]


# The transcript -----------------------------------------------------------------------------------

def print_transcript():
    """Case (1), as a Markdown table."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        world = World()
        world.start()
        world.carrier.start()
        stack.callback(world.close)

        def serve(name):
            served = Served(Path(folder) / name)
            stack.callback(served.stop)
            return served

        two_desks(world, serve)
        world.send(TWO, ONE, letter(TWO, ONE, "Printer on fire"))
        world.settle()
        print("| # | MAIL FROM | From | To | Subject | Auto-Submitted | kind | confirmation "
              "| reason |\n|---|---|---|---|---|---|---|---|---|")
        for number, (envelope_from, to, mail, answer) in enumerate(world.deliveries, 1):
            print("|", " | ".join([
                str(number), f"`<{envelope_from}>`", f"`{mail['From']}`", to, mail["Subject"],
                mail["Auto-Submitted"] or "-", answer["kind"], answer["confirmation"],
                answer["reason"]]), "|")
        print(f"\nThen silence: {len(world.deliveries)} mails in all, also after another forced "
              "`outbox send` on both sides; no outbox holds one.")


if __name__ == "__main__":
    print_transcript()
