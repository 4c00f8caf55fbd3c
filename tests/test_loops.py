"""Never in a loop: running copies of the desk and the machines they meet, with real SMTP between.

The mail world is an SMTP server that every desk sends to. It posts what it takes to the desk that
owns the address, as an MTA's pipe would, or gives it to a correspondent who answers by rule. The
correspondents answer every mail, also where the real ones hold back after the first.

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

import inbound  # noqa: E402
from conftest import SECRET, URL, Served, Sink, eventually  # noqa: E402

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
        self.carrier.join(20)


class Copy:
    """A running `serve` with an address and a database of its own, whose relay is the world."""

    def __init__(self, served, world, address):
        self.served, self.address = served, address
        self.execute("""UPDATE email_account SET inbound_secret = ?, address = ?, smtp_port = ?,
            smtp_host = '127.0.0.1', smtp_security = 'none'""", SECRET, address, world.port)
        world.desks[address] = self

    def post(self, content):
        """POST a raw mail; return the answer's object."""
        connection = http.client.HTTPConnection("127.0.0.1", self.served.port, timeout=20)
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
                              timeout=60).stdout

    def reply(self, reference):
        """An agent answers; what waits is sent at once, not at the courier's next look."""
        self.run("reply", reference, stdin="We are on our way.\n")
        self.run("outbox", "send")

    def execute(self, statement, *parameters):
        with contextlib.closing(sqlite3.connect(self.served.path, timeout=20)) as db, db:
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
    assert two.execute("SELECT queue FROM tickets") == [("Automatic",)]


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
    ("Return-Path", "bounce"), ("Auto-Submitted", "auto-reply"), ("Precedence", "bulk"),
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
    """A rule with a template: its own subject, and no id that threads."""
    return exchange(mail)[0], "Our office is closed", exchange(mail)[2]


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
    (exchange_rule, "auto-reply", "withheld"),      # opens a ticket in Automatic, unanswered
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
    assert one.execute("SELECT queue, messages FROM tickets") == [("Support", 3)]


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
    assert [(to, answer.get("status"), answer.get("reason")) for _, to, _, answer
            in world.deliveries][1:] == [(THEM, None, None), (ONE, "duplicate", "sent by us")]
    assert one.execute("SELECT direction FROM message ORDER BY id") == [("in",), ("out",)]


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
