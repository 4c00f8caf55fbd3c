"""The team: told by mail, answers by mail, and never in a loop.

Ada is the customer, Bob and Cleo are the team. What Bob sends is made of the notice that he got, as
a mail program makes it. All that is read from mail comes by both doors.
"""

import base64
import email
import email.policy
import email.utils
import itertools
import json
import os
import re

import pytest
from doors import DOORS, deliver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import inbound
from conftest import HEADER, NOON, SECRET, eventually, mail_from

US, ADA, BOB, CLEO = ("support@helpdesk.example", "ada@customer.example", "bob@team.example",
                      "cleo@team.example")
NUMBERS = itertools.count(1)
FILE = {"filename": "plug.pdf", "content_type": "application/pdf",
        "content": base64.b64encode(b"%PDF-1.4\r\n\0\xff").decode()}


@pytest.fixture
def team(desk):
    """A desk with Bob and Cleo for its team."""
    desk.run("account", "set", f"staff={BOB},{CLEO}")
    return desk


def told(desk, to=None, purpose="notice"):
    """The notices (or other mails) in the outbox, parsed as a mail reader would."""
    rows = desk.sql("SELECT content FROM outbox WHERE purpose = ? AND recipient = ifnull(?,"
                    " recipient) ORDER BY id", purpose, to)
    return [email.message_from_bytes(content, policy=email.policy.default) for content, in rows]


def sent(desk):
    """(purpose, recipient) of all mails in the outbox, oldest first."""
    return desk.sql("SELECT purpose, recipient FROM outbox ORDER BY id")


def marks(desk):
    """Notes of the messages on the desk, oldest first, without those that have none."""
    return [note for notes, in desk.sql("SELECT notes FROM message ORDER BY id")
            for note in json.loads(notes)]


def reply_to(mail, text, sender=BOB, **fields):
    """The canonical body of a reply to `mail`, with its ids and its subject."""
    ids = [*(mail["References"] or "").split(), mail["Message-ID"]]
    return {"from": sender, "to": US, "subject": f"Re: {mail['Subject']}", "text": text,
            "message_id": f"<{next(NUMBERS)}.reply@team.example>", "in_reply_to": ids[-1],
            "references": ids} | fields


def text_of(mail):
    """The text of a mail or of a part, with the line ends of this machine."""
    return mail.get_body().get_content().replace("\r\n", "\n")


def quoted(mail):
    """A mail's text as mail programs quote it."""
    lines = [f"> {line}" for line in text_of(mail).splitlines()]
    return f"On Tuesday {mail['From']} wrote:\n" + "\n".join(lines) + "\n"


def status_of(desk):
    return desk.sql("SELECT status, last_writer FROM ticket")[0]


# The setting --------------------------------------------------------------------------------------

@pytest.mark.parametrize("value, shown", [
    ("", ""), (BOB, BOB), (f"{BOB},{CLEO}", f"{BOB},{CLEO}"), (f"{BOB}, {CLEO}", f"{BOB}, {CLEO}")])
def test_staff_are_set(desk, value, shown):
    assert desk.run("account", "set", f"staff={value}") == f"staff={shown}\n"


@pytest.mark.parametrize("value, words", [
    (US, "our own"), ("Support+x@helpdesk.example", "our own"),
    ("sales@helpdesk.example", "our own"),
    (f"{BOB},{US}", repr(US)), ("bob", "'bob'"), ("bob@localhost", "write to"),
    ("b ob@team.example", "'b'"), ("jürgen@team.example", "write to"),
    ("bob@[192.0.2.7]", "write to"),
    ("=?utf-8?q?a?=@team.example", "write to"), (",", "staff are addresses between commas")])
def test_who_cannot_be_told_is_refused_in_a_sentence(desk, value, words):
    desk.run("account", "add", "sales@helpdesk.example")
    said = desk.run("account", "set", f"staff={value}", status=1)
    assert re.fullmatch("inbound: [^\n]+\n", said) and words in said
    assert desk.sql("SELECT DISTINCT staff FROM email_account") == [(None,)]


def test_nobody_is_told_where_nobody_is_set(desk):
    desk.post(desk.mail())
    assert sent(desk) == [("confirmation", ADA)]


# The notice ---------------------------------------------------------------------------------------

def test_a_notice_is_what_it_has_to_be(team):
    answer = team.post(team.mail(attachments=[FILE]))
    [mail] = told(team, BOB)
    reference = answer["ticket"]
    assert [(name, str(value)) for name, value in mail.items() if name not in (
        "Date", "Message-ID", "Content-Type", "Content-Transfer-Encoding", "MIME-Version")] == [
            ("From", f"Ada Lovelace via Support <{US}>"), ("To", BOB),
            ("Subject", f"[{reference}] Printer on fire"),
            ("References", mail["Message-ID"]), ("Auto-Submitted", "auto-generated"),
            ("X-Auto-Response-Suppress", "All"), ("Precedence", "bulk"),
            ("X-Inbound-Notice", reference)]
    assert re.fullmatch("<[0-9a-f]{32}@helpdesk.example>", mail["Message-ID"])
    assert text_of(mail) == f"""\
[inbound] {ADA} wrote:

It burns.

[inbound] why: no sign of automatic mail; no id of a known message,
[inbound] so a new ticket; confirmation queued
[inbound] 'plug.pdf', 12 bytes
[inbound] inbound attachment 1 FILE
[inbound] Your reply to this mail goes to {ADA},
[inbound] without these lines. With `close` alone on its first line
[inbound] it closes the ticket.
"""
    assert team.run("attachment", "1", str(team.path) + ".pdf") == ""


def test_each_of_the_team_is_told_under_an_id_of_their_own(team):
    team.post(team.mail())
    assert sent(team) == [("confirmation", ADA), ("notice", BOB), ("notice", CLEO)]
    ids = {mail["Message-ID"] for mail in told(team)}
    known = team.sql("SELECT message_id FROM message")
    assert len(ids) == 2 and ids.isdisjoint(message_id for message_id, in known)
    assert {*team.sql("SELECT own_message_id FROM outbox WHERE purpose = 'notice'")} == {
        (id,) for id in ids}


def test_the_notices_of_a_ticket_are_one_thread_for_each_of_the_team(team):
    for number in range(3):
        team.post(team.mail(message_id=f"<{number}@x>", text=str(number), in_reply_to="<0@x>"))
    for one in (BOB, CLEO):
        first, second, third = told(team, one)
        assert first["In-Reply-To"] is None
        assert second["In-Reply-To"] == first["Message-ID"]
        assert third["In-Reply-To"] == second["Message-ID"]
        assert third["References"].split() == [
            first["Message-ID"], second["Message-ID"], third["Message-ID"]]
        assert {mail["Subject"] for mail in (first, second, third)} == {first["Subject"]}


# (headers of the mail, whether the team is told of it)
KINDS = [
    ({}, True), ({"Auto-Submitted": "auto-generated"}, True), ({"Precedence": "list"}, True),
    ({"Precedence": "bulk"}, True), ({"X-Spam-Flag": "YES"}, True),
    ({"Auto-Submitted": "auto-replied"}, False), ({"X-Failed-Recipients": "x@y.example"}, False),
    ({"X-Inbound-Notice": "T-0000-0000"}, False)]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("headers, is_told", KINDS)
def test_people_machines_and_lists_are_told_of_and_no_answer_of_a_machine(
        team, door, headers, is_told):
    deliver(team, team.mail(headers=headers), door)
    assert len(told(team)) == 2 * is_told
    deliver(team, team.mail(headers=headers, message_id="<2@x>", text="Two.",
                            in_reply_to="<first@customer.example>"), door)
    assert len(told(team)) == 4 * is_told


def test_what_lies_in_automatic_is_told_to_nobody(team):
    team.post(team.mail(headers={"Auto-Submitted": "auto-replied"}))
    team.post(team.mail(message_id="<2@x>", text="Two.", in_reply_to="<first@customer.example>"))
    assert team.sql("SELECT name FROM ticket JOIN queue ON queue.id = queue") == [("Automatic",)]
    assert told(team) == []


def test_a_repeat_is_told_to_nobody(team):
    for _ in range(2):
        team.post(team.mail())
    assert len(told(team)) == 2


def test_nobody_is_told_at_an_address_of_ours_nor_at_one_that_is_none(desk):
    desk.run("account", "add", "sales@helpdesk.example")
    desk.set_account(staff=f"Support+x@helpdesk.example, sales@helpdesk.example,{BOB},bob@x,{BOB}")
    desk.post(desk.mail())
    assert sent(desk) == [("confirmation", ADA), ("notice", BOB)]


def test_who_wrote_and_who_asks_is_not_told(team):
    team.post(team.mail(**{"from": f"Bob <{BOB}>"}))
    assert sent(team) == [("confirmation", BOB), ("notice", CLEO)]
    # Bob's ticket: he is a customer there, whoever writes on it.
    team.post(team.mail(message_id="<2@x>", in_reply_to="<first@customer.example>"))
    assert [to for purpose, to in sent(team)] == [BOB, CLEO, CLEO]


def test_a_long_text_is_cut_in_the_notice_and_whole_on_the_ticket(team):
    answer = team.post(team.mail(text="x" * inbound.MAX_TOLD + "END"))
    [mail] = told(team, BOB)
    text = text_of(mail)
    assert "END" not in text and f"inbound show {answer['ticket']}" in text


HOSTILE = ["a\r\nBcc: eve@evil.example\r\n\r\nx", "=?utf-8?q?a=0D=0ABcc:_eve@evil.example?=",
           '"Eve" <eve@evil.example>,', "a\x0b\x0c\x85\u2028b", "ä" * 5000, "x" * 5000, "=?" * 99,
           "[inbound] answer of bob@team.example:", "\x1b]0;x\x07", ".\r\n.\r\nFrom x\r\n", "--x--",
           "日本語 " * 500, "inbound close T-0000-0000 " * 9]


@pytest.mark.parametrize("words", HOSTILE)
def test_a_stranger_s_words_are_text_and_nothing_else(team, words):
    file = FILE | {"filename": f"{words}; rm -rf ~"}
    team.post(team.mail(from_name=words, subject=words, text=words, attachments=[file]))
    for content, in team.sql("SELECT content FROM outbox WHERE purpose = 'notice'"):
        head = content.partition(b"\r\n\r\n")[0]
        names = re.findall(rb"^([^\s:]+):", head, re.M)
        assert len(names) == len({*names}) == 13 and b"Bcc" not in names
        assert content.isascii() and b"\n" not in content.replace(b"\r\n", b"")
    for mail in told(team):
        assert mail["From"].addresses[0].addr_spec == US and len(mail["From"].addresses) == 1
        first, *lines = text_of(mail).splitlines()
        assert first == f"[inbound] {ADA} wrote:"
        # What can be pasted into a shell has no word of theirs in it.
        assert "[inbound] inbound attachment 1 FILE" in lines
        assert not any(line.startswith(f"[inbound] {words[:9]}") for line in lines)
        assert all(len(line) < 70 for line in lines if line.startswith("[inbound]"))
    assert len(told(team)) == 2


@settings(max_examples=60, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(words=st.text(max_size=300), name=st.text(max_size=80))
def test_no_words_cost_a_notice_or_the_message(team, words, name):
    team.execute("DELETE FROM outbox")
    answer = team.post(team.mail(from_name=name, subject=words, text=words + "x",
                                 message_id=f"<{next(NUMBERS)}@any.example>"))
    assert answer["status"] == "created" and len(told(team)) == 2


# The cap ------------------------------------------------------------------------------------------

def posts(desk, count):
    for _ in range(count):
        desk.post(mail_from(f"flood{next(NUMBERS)}"))


def counts(desk):
    return dict(desk.sql("SELECT purpose, count(*) FROM outbox WHERE purpose <> 'confirmation'"
                         " GROUP BY purpose"))


def test_a_flood_is_one_summary_for_each_and_then_silence_until_it_is_calmer(team):
    team.set_account(notices_per_hour=3)
    posts(team, 20)
    assert counts(team) == {"notice": 6, "summary": 2}
    [summary] = told(team, BOB, "summary")
    assert "More than 3 messages" in text_of(summary)
    assert "inbound tickets waiting" in text_of(summary)
    team.clock.advance(3599)
    posts(team, 1)
    assert counts(team) == {"notice": 6, "summary": 2}
    team.clock.advance(1)
    posts(team, 5)
    assert counts(team) == {"notice": 12, "summary": 4}


def test_a_thousand_posts_are_sixty_notices_and_a_summary_for_each(team):
    posts(team, 1000)
    assert counts(team) == {"notice": 120, "summary": 2}
    assert team.count("ticket") == 1000


def test_a_cap_of_nothing_leaves_the_summary(team):
    team.set_account(notices_per_hour=0)
    posts(team, 3)
    assert counts(team) == {"summary": 2}


# The answer ---------------------------------------------------------------------------------------

@pytest.fixture
def asked(team):
    """The team's desk with a ticket of Ada's; `notice` is Bob's."""
    team.reference = team.post(team.mail())["ticket"]
    [team.notice] = told(team, BOB)
    return team


@pytest.mark.parametrize("door", DOORS)
def test_a_reply_to_a_notice_goes_to_the_customer(asked, door):
    text = f"Pull the plug.\n\n-- \nBob\n\n{quoted(asked.notice)}"
    answer = deliver(asked, reply_to(asked.notice, text, attachments=[FILE]), door)
    assert answer == {
        "status": "appended", "ticket": asked.reference, "message": answer["message"],
        "kind": "human", "confirmation": "not due", "reason": f"answer of {BOB}"}
    [mail] = told(asked, ADA, "answer")
    assert [(name, str(value)) for name, value in mail.items() if name not in (
        "Date", "Message-ID", "Content-Type", "MIME-Version")] == [
            ("From", f"Support <{US}>"), ("To", ADA),
            ("Subject", f"[{asked.reference}] Re: Printer on fire"),
            ("In-Reply-To", "<first@customer.example>"), ("References", "<first@customer.example>")]
    body, file = mail.iter_parts()
    assert text_of(body).splitlines() == [
        "Pull the plug.", "", "-- ", "Bob", "", f"On Tuesday {asked.notice['From']} wrote:",
        "> ", "> It burns.", "> "]
    assert (file.get_filename(), file.get_content_type(), file.get_content()) == (
        "plug.pdf", "application/pdf", b"%PDF-1.4\r\n\0\xff")
    assert asked.sql("SELECT recipient, domain FROM outbox WHERE purpose = 'answer'") == [
        (ADA, "customer.example")]
    assert status_of(asked) == ("open", "team")


@pytest.mark.parametrize("door", DOORS)
def test_an_answer_is_known_where_the_relay_wrote_another_message_id(asked, door):
    """As Amazon SES does; the other headers stay as they are, and replies name what is in them."""
    ids = ["<0102-9a@eu-west-1.amazonses.com>", asked.notice["References"]]
    body = reply_to(asked.notice, "Pull the plug.")
    body |= {"in_reply_to": ids[0], "references": ids[::-1]}
    assert deliver(asked, body, door)["reason"] == f"answer of {BOB}"


def test_an_answer_stands_on_the_ticket_as_it_came(asked):
    body = reply_to(asked.notice, f"Pull the plug.\n{quoted(asked.notice)}", attachments=[FILE])
    asked.post(body | {"from": f"Bob <{BOB}>"})
    last = asked.show(asked.reference)["messages"][-1]
    assert (last["direction"], last["from"], last["from_name"], last["kind"]) == (
        "out", BOB, "Bob", None)
    assert (last["message_id"], last["text"], last["reason"]) == (
        body["message_id"], body["text"], f"answer of {BOB}")
    assert [file["filename"] for file in last["attachments"]] == ["plug.pdf"]
    assert f"--- out 2026-09-21 14:13:20Z Bob <{BOB}>" in asked.run("show", asked.reference)


def test_the_others_are_told_of_an_answer_and_the_customer_is_not_told_of_anything(asked):
    asked.post(reply_to(asked.notice, "Pull the plug.", **{"from": f"Bob <{BOB}>"}))
    assert sent(asked)[3:] == [("answer", ADA), ("notice", CLEO)]
    first, second = told(asked, CLEO)
    assert text_of(second).startswith(f"[inbound] answer of {BOB}:\n\nPull the plug.\n\n")
    assert second["From"].addresses[0].display_name == "Bob via Support"
    assert second["In-Reply-To"] == first["Message-ID"]


def test_the_answer_has_an_id_of_its_own_and_no_notice_s_id_anywhere(asked):
    asked.post(asked.mail(message_id="<2@x>", text="Still.", in_reply_to="<first@customer.example>",
                          references="<first@customer.example>"))
    first, second = told(asked, BOB)
    text = f"Message-ID: {second['Message-ID']}\nReferences: {first['Message-ID']}"
    body = reply_to(second, text, attachments=[
        FILE, mail_file("notice.eml", second.as_bytes()),
        mail_file("notice.msg", second["Message-ID"].encode("utf-16-le"))])
    asked.post(body)
    [(content, message_id)] = asked.sql(
        "SELECT content, own_message_id FROM outbox WHERE purpose = 'answer'")
    [mail] = told(asked, ADA, "answer")
    assert mail["Message-ID"] == message_id != body["message_id"]
    assert [part.get_filename() for part in mail.iter_attachments()] == ["plug.pdf"]
    assert mail["References"].split() == ["<first@customer.example>", "<2@x>"]
    for notice in (first, second):
        assert notice["Message-ID"].strip("<>").encode() not in content
        assert notice["Message-ID"].strip("<>") not in text_of(mail)


def mail_file(name, content):
    return {"filename": name, "content_type": "application/octet-stream",
            "content": base64.b64encode(content).decode()}


def test_an_answer_is_in_the_customer_s_thread_whoever_wrote_last(asked):
    asked.post(asked.mail(**{"from": "dan@partner.example", "message_id": "<dan@partner.example>",
                             "in_reply_to": "<first@customer.example>", "text": "Me too."}))
    assert "why: " in text_of(told(asked, BOB)[1]) and "stranger" in text_of(told(asked, BOB)[1])
    asked.post(reply_to(asked.notice, "Pull the plug."))
    assert told(asked, ADA, "answer")[0]["In-Reply-To"] == "<first@customer.example>"


@pytest.mark.parametrize("size, encoding", [(1000, "quoted-printable"), (2**17, "base64")])
def test_an_answer_of_any_length_arrives_whole(asked, size, encoding):
    asked.post(reply_to(asked.notice, "ä" * size))
    [mail] = told(asked, ADA, "answer")
    assert text_of(mail).strip() == "ä" * size and mail["Content-Transfer-Encoding"] == encoding


def test_nor_does_a_later_reply_name_one(asked):
    """A mail of Bob's that was refused has the notice's id in its References, or is the notice."""
    asked.post(reply_to(asked.notice, "Out.", headers={"X-Auto-Response-Suppress": "All"}))
    asked.post(asked.notice.as_bytes(), "message/rfc822")
    for to in ([], ["--to", "dan@partner.example"]):
        asked.run("reply", asked.reference, *to, stdin="Hello")
    for content, in asked.sql("SELECT content FROM outbox WHERE purpose = 'reply'"):
        assert asked.notice["Message-ID"].encode() not in content


def test_an_answer_of_a_customer_s_reply_reaches_both_and_opens_the_ticket(asked):
    asked.post(reply_to(asked.notice, "close\n\nPull the plug."))
    [mail] = told(asked, ADA, "answer")
    assert status_of(asked) == ("closed", "team")
    before = len(told(asked))
    answer = asked.post(reply_to(mail, "It still burns.", ADA, references=None))
    assert (answer["status"], answer["ticket"]) == ("appended", asked.reference)
    assert "In-Reply-To names" in answer["reason"]
    assert status_of(asked) == ("open", "customer")
    assert len(told(asked)) == before + 2
    assert "stranger" not in str(marks(asked))


def test_a_notice_may_be_answered_twice_and_one_answer_comes_once(asked):
    body = reply_to(asked.notice, "Pull the plug.")
    assert asked.post(body)["status"] == "appended"
    again = asked.post(body)
    assert (again["status"], again["ticket"], again["kind"]) == (
        "duplicate", asked.reference, "human")
    assert [text_of(mail) for mail in told(asked, ADA, "answer")] == ["Pull the plug.\n"]
    asked.post(reply_to(asked.notice, "And call me."))
    assert len(told(asked, ADA, "answer")) == 2


def test_a_copy_of_an_answer_with_other_words_is_kept_and_not_sent(asked):
    """As a list sends it that has us among its members, with its footer."""
    body = reply_to(asked.notice, "Pull the plug.")
    asked.post(body)
    before = sent(asked)
    answer = asked.post(body | {"text": "Pull the plug.\n-- \nTeam list"})
    assert (answer["status"], answer["ticket"]) == ("appended", asked.reference)
    assert "bears the Message-ID of a mail of ours" in answer["reason"]
    assert sent(asked) == before


def test_an_answer_to_a_closed_ticket_goes_out_and_leaves_it_closed(asked):
    asked.run("close", asked.reference)
    asked.post(reply_to(asked.notice, "By the way: done."))
    assert status_of(asked) == ("closed", "team")
    assert len(told(asked, ADA, "answer")) == 1


OUTLOOK = """

________________________________
Von: Ada Lovelace via Support <support@helpdesk.example>
Gesendet: Dienstag, 24. November 2026 12:00
An: bob@team.example
Betreff: [T-0000-0000] Printer on fire

[inbound] ada@customer.example wrote:

It burns.

[inbound] Your reply to this mail goes to ada@customer.example, without
[inbound] these lines.
"""
GMAIL = """

On Tue, Nov 24, 2026 at 12:00 PM Ada Lovelace via Support <
support@helpdesk.example> wrote:

> [inbound] ada@customer.example wrote:
>
> It burns.
>
> [inbound] Your reply to this mail goes to ada@customer.example, without
> [inbound] these lines.
"""
THUNDERBIRD = """

Am 24.11.26 um 12:00 schrieb Ada Lovelace via Support:
> [inbound] ada@customer.example wrote:
>
> It burns.
"""
# (text, what the customer gets of it or None, status of the ticket)
CLOSING = [
    ("close\n\nPull the plug.\n", "Pull the plug.", "closed"),
    ("Close \r\nPull the plug.\r\n", "Pull the plug.", "closed"),
    ("\n\nclose\nPull the plug.", "Pull the plug.", "closed"),
    ("close", None, "closed"), ("close!", None, "closed"), ("CLOSE!\n\n", None, "closed"),
    ("close!\n\nPull the plug.\n", "Pull the plug.", "closed"),
    ("close" + OUTLOOK, None, "closed"), ("close" + GMAIL, None, "closed"),
    ("close" + THUNDERBIRD, None, "closed"), ("close!" + OUTLOOK, None, "closed"),
    ("close\n\n-- \nBob, Team\n" + GMAIL, None, "closed"),
    ("close" + THUNDERBIRD + " ", None, "closed"),
    (f"close\n\n*De :* Ada via Support ({US})\nA : bob\n\nIt burns.", None, "closed"),
    (f"close\n\nFrom: Ada [mailto:{US}]\nSent: today\n\nIt burns.", None, "closed"),
    (f"close\n\nAda via Support <\n{US}> wrote:\n\nIt burns.", None, "closed"),
    ("close" + THUNDERBIRD.replace("\n>", "\n >"), None, "closed"),
    ("close\r\n\r\n-- \r\nBob, Team\r\n", None, "closed"),
    ("close\n\nPull the plug." + OUTLOOK, "Pull the plug.", "closed"),
    ("close" + GMAIL + "\nPull the plug.", "Pull the plug.", "closed"),
    ("Please close the door.", "Please close the door.", "open"),
    (f"Write to {US}.", f"Write to {US}.", "open"),
    (f"close\n\nWrite to {US}.{OUTLOOK}", f"Write to {US}.", "closed"),
    ("close it", "close it", "open"), ("Pull it.\nclose", "Pull it.\nclose", "open"),
    ("> close\n\nPull the plug.", "> close\n\nPull the plug.", "open")]


# The line as programs quote it, and what is left of it.
QUOTED = [
    ("a\n> [inbound] x\nb", "a\nb"), ("a\n>> [inbound] x\nb", "a\nb"), ("[inbound] x", ""),
    ("a\n| > [inbound] x\nb", "a\nb"), ("a\n\xa0[inbound]\xa0x\nb", "a\nb"),
    ("a\n> [inbound]\nb", "a\nb"), ("a\r\n> [inbound] x\r\nb\r\n", "a\nb"),
    ("a\nsee [inbound] x\nb", "a\nsee [inbound] x\nb"), ("[inbound]x\nb", "[inbound]x\nb"),
    ("a\n> [inbound] x\n\n> [inbound] y\nb", "a\n\nb")]


@pytest.mark.parametrize("text, left", QUOTED)
def test_a_line_of_ours_is_dropped_however_it_is_quoted_and_no_other(asked, text, left):
    asked.post(reply_to(asked.notice, text, attachments=[FILE]))
    assert text_of(told(asked, ADA, "answer")[0]).strip() == left


HTML = """<html><body><div>close</div><div><br></div><div>{}</div><hr><div>
<b>Von:</b> Ada Lovelace via Support &lt;Support@helpdesk.example&gt;<br><b>An:</b> bob<br></div>
<div>[inbound] ada@customer.example wrote:<br><br>It burns.<br><br>[inbound] Your reply</div>"""


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("words", ["", "Pull the plug."])
def test_a_mail_that_is_nothing_but_html_is_read_as_one_of_text(asked, door, words):
    body = reply_to(asked.notice, None, html=HTML.format(words))
    del body["text"]
    deliver(asked, body, door)
    mails = told(asked, ADA, "answer")
    assert status_of(asked) == ("closed", "team") and len(mails) == bool(words)
    assert all(text_of(mail).startswith("Pull the plug.\n") for mail in mails)
    assert all("[inbound]" not in text_of(mail) for mail in mails)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("text, gets, status", CLOSING)
def test_close_on_the_first_line_closes_and_is_not_sent(asked, door, text, gets, status):
    answer = deliver(asked, reply_to(asked.notice, text), door)
    assert (answer["status"], answer["kind"]) == ("appended", "human")
    bodies = [text_of(mail) for mail in told(asked, ADA, "answer")]
    assert status_of(asked) == (status, "team")
    if gets is None:
        assert bodies == [] and answer["reason"] == f"closed by {BOB}, without an answer"
        assert text_of(told(asked, CLEO)[-1]).startswith(f"[inbound] closed by {BOB}")
    else:
        [body] = bodies
        assert gets in body and "[inbound]" not in body
        assert not body.lower().startswith("close\n")


def test_an_attachment_alone_is_an_answer_but_not_the_notice_itself(asked):
    asked.post(reply_to(asked.notice, "close", attachments=[
        mail_file("notice.eml", asked.notice.as_bytes())]))
    assert told(asked, ADA, "answer") == []
    asked.post(reply_to(asked.notice, "close", attachments=[FILE]))
    [mail] = told(asked, ADA, "answer")
    assert [part.get_filename() for part in mail.iter_attachments()] == ["plug.pdf"]


@pytest.mark.parametrize("posted, name, kind", [
    (FILE | {"filename": ""}, "attachment", "application/pdf"),
    (FILE | {"filename": "Grüße \"a\"\r\nBcc: x"}, 'Grüße "a" Bcc: x', "application/pdf"),
    (FILE | {"filename": "=?utf-8?q?a=0D=0ABcc:_x?="}, "a Bcc: x", "application/pdf"),
    (FILE | {"filename": "x" * 5000}, "x" * 100, "application/pdf"),
    (FILE | {"content_type": "message/rfc822"}, "plug.pdf", "application/octet-stream"),
    (FILE | {"content_type": "multipart/mixed"}, "plug.pdf", "application/octet-stream"),
    (FILE | {"content_type": "text/csv"}, "plug.pdf", "application/octet-stream"),
    (FILE | {"content_type": "nonsense"}, "plug.pdf", "application/octet-stream"),
    (FILE | {"content_type": "image/png"}, "plug.pdf", "image/png")])
def test_an_attachment_arrives_as_bytes_whatever_it_is_called(asked, posted, name, kind):
    asked.post(reply_to(asked.notice, "Look.", attachments=[posted]))
    [mail] = told(asked, ADA, "answer")
    [part] = mail.iter_attachments()
    assert (part.get_filename(), part.get_content_type()) == (name, kind)
    assert part.get_payload(decode=True) == base64.b64decode(FILE["content"])
    assert mail["Bcc"] is None and part["Bcc"] is None


# What is no answer --------------------------------------------------------------------------------

def refusals(desk):
    return [(str(mail["To"]), " ".join(text_of(mail).split()))
            for mail in told(desk, None, "refusal")]


# name: (fields of the reply, notice's owner, part of its note, who gets a refusal)
FORGERIES = {
    "a stranger with the right subject": (
        {"from": "mallory@evil.example", "in_reply_to": None, "references": None}, BOB, None, None),
    "a stranger with a staff From and the right subject": (
        {"from": BOB, "in_reply_to": None, "references": None}, BOB, "answers no notice", None),
    "a stranger with a staff From and the confirmation's id": (
        {"from": BOB, "in_reply_to": "confirmation", "references": None}, BOB, "stranger", None),
    "a stranger with a staff From and a made up id": (
        {"from": BOB, "in_reply_to": f"<{'0' * 32}@helpdesk.example>", "references": None},
        BOB, "not kept any more", BOB),
    "staff with another's notice": ({"from": BOB}, CLEO, "no notice that went to this", BOB),
    "a stranger with Bob's notice": (
        {"from": "mallory@evil.example"}, BOB, "no notice that went to this",
        "mallory@evil.example"),
    "a stranger with Bob's notice, who may be another": (
        {"from": "mallory@evil.example", "headers": {"X-Spam-Flag": "YES"}}, BOB,
        "no notice that went to this", None),
    "From of two": ({"from": f"{BOB}, mallory@evil.example"}, BOB, "From is not one", None),
    "DMARC fail": (
        {"headers": {"Authentication-Results": "mx.helpdesk.example; dmarc=fail"}},
        BOB, "DMARC failed", BOB),
    "spam": ({"headers": {"X-Spam-Flag": "YES"}}, BOB, "takes it for spam", BOB),
    "a vacation reply": ({"headers": {"Auto-Submitted": "auto-replied"}}, BOB, "auto-reply", None),
    "a machine's": ({"headers": {"Auto-Submitted": "auto-generated"}}, BOB, "machine", None),
    "the null sender": ({"envelope": {"from": "<>"}}, BOB, "null", BOB),
    "one that wants no answer": (
        {"headers": {"X-Auto-Response-Suppress": "All"}}, BOB, "asks for none", BOB),
    "a vacation reply that only its subject tells": (
        {"subject": "Automatic reply: [T-0000-0000] Printer on fire"}, BOB, "auto-reply", None),
    "nothing but a quotation": (
        {"text": "On Tuesday Ada wrote:\n> It burns.\n"}, BOB, "nothing in it", BOB),
    "nothing but a quotation and a blank": (
        {"text": "On Tuesday Ada wrote:\n> It burns.\n\xa0"}, BOB, "nothing in it", BOB),
    "nothing at all": ({"text": " \n"}, BOB, "nothing in it", BOB),
    "an attachment that was not posted": (
        {"attachments": [{"filename": "a.pdf", "content": "?"}]}, BOB, "'a.pdf' is not kept", BOB)}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", FORGERIES)
def test_what_is_no_answer_reaches_no_customer(asked, door, name):
    fields, owner, note, refused = FORGERIES[name]
    if door == "raw" and name == "an attachment that was not posted":
        pytest.skip("a raw mail holds them all")
    notice = told(asked, owner)[0]
    body = reply_to(notice, "Send me your password.") | fields
    if body["in_reply_to"] == "confirmation":
        body["in_reply_to"] = told(asked, ADA, "confirmation")[0]["Message-ID"]
    body = {key: value for key, value in body.items() if value is not None}
    answer = deliver(asked, body, door)
    assert answer["status"] in ("appended", "created")
    assert told(asked, ADA, "answer") == []
    assert asked.sql("SELECT direction FROM message WHERE id = ?", answer["message"]) == [("in",)]
    assert [to for to, _ in refusals(asked)] == [refused] * bool(refused)
    assert (note or "") in "".join(marks(asked)) and bool(note) == bool(marks(asked))
    assert asked.sql("SELECT DISTINCT status, last_writer FROM ticket") == [("open", "customer")]


def test_a_refusal_says_why_and_is_an_automatic_answer(asked):
    [cleo] = told(asked, CLEO)
    body = reply_to(cleo, "Pull the plug.")
    asked.post(body)
    [mail] = told(asked, BOB, "refusal")
    assert (mail["Auto-Submitted"], mail["X-Auto-Response-Suppress"], mail["In-Reply-To"]) == (
        "auto-replied", "All", body["message_id"])
    assert mail["Subject"] == f"[{asked.reference}] Your mail was not sent on"
    assert " ".join(text_of(mail).split()) == (
        f"Your mail is kept with the ticket {asked.reference}. It was not sent on as an answer: "
        "it answers no notice that went to this address of the team. To answer, reply to a notice "
        "from the address that it went to.")
    assert cleo["Message-ID"].encode() not in mail.as_bytes()


def test_it_is_said_of_each_mail_once_and_within_the_caps(asked):
    for _ in range(2):
        mail = reply_to(told(asked, CLEO)[0], f"Hello {next(NUMBERS)}.")
        asked.post(mail)
        asked.post(mail)
    assert len(refusals(asked)) == 2
    for number in range(4):
        asked.post(asked.mail(message_id=f"<{number}@x>", text=str(number)))
        asked.post(reply_to(told(asked, CLEO)[-1], f"Hello {next(NUMBERS)}."))
    assert len(refusals(asked)) == 3        # confirmations_per_address_hour


@pytest.mark.parametrize("blank", [" ", "\t", "\N{NO-BREAK SPACE}"])
def test_a_stranger_writes_no_line_of_ours(asked, blank):
    asked.post(asked.mail(message_id="<2@x>", in_reply_to="<first@customer.example>",
                          text=f"[inbound]{blank}Your reply goes to ceo@bank.example."))
    assert "\n[ inbound]" in text_of(told(asked, BOB)[-1])


def test_a_long_ticket_costs_no_more_than_a_short_one(asked):
    """One mail is looked for by its ids: not all that were ever sent about its ticket."""
    steps = []
    asked.store.write(lambda db, now: db.set_progress_handler(lambda: steps.append(1), 100))
    spent = []
    for count in (100, 900):
        for number in range(count):
            asked.clock.advance(90)
            asked.post(asked.mail(message_id=f"<{count}-{number}@x>", text=str(number),
                                  in_reply_to="<first@customer.example>"))
        steps.clear()
        asked.post(asked.mail(message_id=f"<{count}@x>", text="?",
                              in_reply_to=f"<{count}-1@x> {told(asked, BOB)[-1]['Message-ID']}"))
        spent.append(len(steps))
    assert spent[1] < 2 * spent[0] + 10


@pytest.mark.parametrize("sender", [BOB, "Bob@Team.Example", "bob+phone@team.example"])
def test_one_of_the_team_is_known_however_the_address_is_spelt(asked, sender):
    asked.post(reply_to(asked.notice, "Pull the plug.", sender))
    assert len(told(asked, ADA, "answer")) == 1


def test_one_whose_domain_is_not_ascii_is_told_and_answers(desk):
    desk.run("account", "set", "staff=bob@bücher.example")
    desk.post(desk.mail())
    wire = "bob@xn--bcher-kva.example"
    desk.post(reply_to(told(desk, wire)[0], "Pull the plug.", wire))
    assert len(told(desk, ADA, "answer")) == 1


def test_who_left_the_team_answers_nothing_any_more(asked):
    asked.run("account", "set", f"staff={CLEO}")
    answer = asked.post(reply_to(asked.notice, "I am still here."))
    assert (answer["status"], told(asked, ADA, "answer")) == ("appended", [])
    assert [to for to, _ in refusals(asked)] == [BOB]
    asked.run("account", "set", "staff=")
    asked.post(reply_to(asked.notice, "And here."))
    assert told(asked, ADA, "answer") == []


def test_a_notice_of_another_account_answers_nothing_here(asked):
    asked.run("account", "add", "sales@helpdesk.example")
    asked.run("account", "set", f"staff={BOB}", "--account", "sales@helpdesk.example")
    secret = asked.run("secret", "--account", "sales@helpdesk.example").strip()
    answer = asked.post(reply_to(asked.notice, "Pull the plug."),
                        headers={"X-Mobieus-Inbound-Secret": secret})
    assert answer["status"] == "created" and told(asked, ADA, "answer") == []


def test_a_reply_to_a_summary_is_no_answer(team):
    team.set_account(notices_per_hour=0)
    team.post(team.mail())
    answer = team.post(reply_to(told(team, BOB, "summary")[0], "Which?"))
    assert answer["status"] == "appended" and "no notice" in str(marks(team))
    assert told(team, ADA, "answer") == []


def test_a_customer_who_was_put_in_copy_is_a_customer(asked):
    """Bob pressed Reply All and Ada was on it: she has his notice's id."""
    answer = asked.post(reply_to(asked.notice, "Thank you!", ADA))
    assert (answer["status"], answer["ticket"]) == ("appended", asked.reference)
    assert (marks(asked), refusals(asked), told(asked, ADA, "answer")) == ([], [], [])
    assert status_of(asked) == ("open", "customer")


def test_too_much_for_a_relay_is_refused(asked, monkeypatch):
    monkeypatch.setattr(inbound, "MAX_ANSWER", 2**20)
    big = mail_file("a.bin", os.urandom(2**19))
    asked.post(reply_to(asked.notice, "Look.", attachments=[big, big, FILE]))
    assert told(asked, ADA, "answer") == [] and "over 1 MB" in refusals(asked)[0][1]
    asked.post(reply_to(asked.notice, "Look.", attachments=[big, big]))
    assert len(told(asked, ADA, "answer")) == 1


def test_nobody_can_answer_a_mailer_daemon(team):
    team.post("Subject: x\nMessage-ID: <1@x>\n\nx\n", "message/rfc822")
    [notice] = told(team, BOB)
    team.post(reply_to(notice, "Hello?"))
    assert "not an address that we can write to" in refusals(team)[0][1]
    assert team.sql("SELECT direction FROM message ORDER BY id") == [("in",), ("in",)]


# Never in a loop ----------------------------------------------------------------------------------

VACATION = {"headers": {"Auto-Submitted": "auto-replied"}, "text": "I am away."}
WEAK = {"headers": {"X-Auto-Response-Suppress": "All"}, "text": "I am away."}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("away, refused", [(VACATION, 0), (WEAK, 1)])
def test_staff_on_vacation_is_told_to_nobody(asked, door, away, refused):
    before = sent(asked)
    for one in (BOB, CLEO):
        for notice in told(asked, one):
            answer = deliver(asked, reply_to(notice, "", one) | away, door)
            assert (answer["status"], answer["ticket"]) == ("appended", asked.reference)
    assert [purpose for purpose, _ in sent(asked)[len(before):]] == ["refusal"] * 2 * refused


def test_a_customer_on_vacation_is_told_to_nobody_and_leaves_the_team_the_last_word(asked):
    asked.post(reply_to(asked.notice, "Pull the plug."))
    before = sent(asked)
    asked.post(reply_to(told(asked, ADA, "answer")[0], "", ADA) | VACATION)
    assert (sent(asked), status_of(asked)) == (before, ("open", "team"))


def test_autoresponders_that_nothing_marks_meet_a_limit(asked):
    """All three answer every mail, like people: Ada with her mails, Bob and Cleo with answers."""
    asked.set_account(notices_per_hour=1000)
    seen = set()
    for _ in range(1000):
        waiting = asked.sql("SELECT id, recipient, content FROM outbox ORDER BY id")
        waiting = [row for row in waiting if row[0] not in seen]
        if not waiting:
            break
        for row, recipient, content in waiting:
            seen.add(row)
            mail = email.message_from_bytes(content, policy=email.policy.default)
            asked.post(reply_to(mail, f"I am away {row}.", recipient))
    assert not waiting
    assert len(told(asked, ADA, "answer")) == inbound.ANSWERS_PER_HOUR


def test_a_staff_address_that_bounces_is_a_failed_mail_and_no_news(asked):
    before = sent(asked)
    asked.execute("UPDATE outbox SET state = 'sent', next_attempt_at = NULL")
    headers = "".join(f"{name}: {value}\n" for name, value in asked.notice.items())
    answer = asked.post(
        "Return-Path: <>\nFrom: MAILER-DAEMON@mx.team.example\nMessage-ID: <1@mx.team.example>\n"
        "Subject: Undelivered Mail Returned to Sender\n\n<bob@team.example>: unknown (#5.1.1)\n"
        f"--- Below this line is a copy of the message.\n\n{headers}\n", "message/rfc822")
    assert (answer["kind"], answer["ticket"]) == ("bounce", asked.reference)
    failed = asked.sql("SELECT purpose, recipient, last_error FROM outbox WHERE state = 'failed'")
    assert failed == [("notice", BOB, "bounced: 5.1.1")]
    assert (sent(asked), status_of(asked)) == (before, ("open", "customer"))
    assert "1 mails could not be sent: run `inbound outbox`" in asked.run("doctor", status=1)


def test_a_bounced_answer_is_failed_and_no_other_mail_about_it(asked):
    body = reply_to(asked.notice, "Pull the plug.")
    asked.post(body)
    asked.execute("UPDATE outbox SET state = 'sent', next_attempt_at = NULL")
    [mail] = told(asked, ADA, "answer")
    for number, message_id in enumerate((body["message_id"], mail["Message-ID"])):
        asked.post(f"Return-Path: <>\nFrom: MAILER-DAEMON@x.example\nMessage-ID: <{number}@x>\n"
                   "Subject: Undelivered Mail Returned to Sender\n\nunknown (#5.1.1)\n\n"
                   f"Message-ID: {message_id}\n", "message/rfc822")
    assert asked.sql("SELECT purpose FROM outbox WHERE state = 'failed'") == [("answer",)]


def test_a_notice_that_comes_back_is_known_and_no_news(asked):
    """Bob's mailbox forwards all of it to us."""
    before = sent(asked)
    answer = asked.post(asked.notice.as_bytes(), "message/rfc822")
    assert (answer["status"], answer["ticket"]) == ("appended", asked.reference)
    assert "bears the Message-ID of a mail of ours" in answer["reason"]
    assert sent(asked) == before


def test_an_answer_that_comes_back_is_known_and_no_news(asked):
    asked.post(reply_to(asked.notice, "Pull the plug."))
    before = sent(asked)
    answer = asked.post(told(asked, ADA, "answer")[0].as_bytes(), "message/rfc822")
    assert (answer["status"], answer["ticket"]) == ("appended", asked.reference)
    assert "bears the Message-ID of a mail of ours" in answer["reason"]
    assert (sent(asked), status_of(asked)) == (before, ("open", "team"))


def test_staff_who_ask_as_customers_are_answered_as_customers(team):
    reference = team.post(team.mail(**{"from": BOB}))["ticket"]
    [notice] = told(team, CLEO)
    team.post(reply_to(notice, "Have you tried turning it off?", CLEO))
    assert sent(team) == [("confirmation", BOB), ("notice", CLEO), ("answer", BOB)]
    [mail] = told(team, BOB, "answer")
    answer = team.post(reply_to(mail, "Yes."))
    assert answer["ticket"] == reference
    assert {*marks(team)} == {"its From is the team's, but it answers no notice"}
    assert sent(team)[3:] == [("notice", CLEO)]


def test_an_answer_to_a_forgotten_ticket_is_refused_and_said(asked):
    asked.run("forget", ADA)
    answer = asked.post(reply_to(asked.notice, "Pull the plug."))
    assert (answer["status"], answer["confirmation"]) == ("created", "withheld")
    assert answer["ticket"] != asked.reference
    assert [to for to, _ in refusals(asked)] == [BOB] and "not kept" in refusals(asked)[0][1]
    assert sent(asked) == [("refusal", BOB)]


def test_a_customer_of_a_forgotten_ticket_opens_a_new_one(asked):
    [confirmation] = told(asked, ADA, "confirmation")
    asked.run("forget", ADA)
    answer = asked.post(reply_to(confirmation, "It still burns.", ADA))
    assert (answer["status"], answer["confirmation"], marks(asked)) == ("created", "queued", [])


# Who wrote last -----------------------------------------------------------------------------------

def waiting(desk):
    return [row["reference"] for row in json.loads(desk.run("tickets", "waiting", "--json"))]


def test_waiting_are_the_open_tickets_whose_customer_wrote_last(asked):
    other = asked.post(mail_from("dan"))["ticket"]
    asked.clock.advance(60)
    assert waiting(asked) == [other, asked.reference]
    asked.post(reply_to(asked.notice, "Pull the plug."))
    assert waiting(asked) == [other]
    asked.run("reply", other, stdin="Hello")
    assert waiting(asked) == []
    rows = json.loads(asked.run("tickets", "--json"))
    assert [(row["reference"], row["last_writer"], row["updated_at"]) for row in rows] == [
        (other, "team", NOON + 60), (asked.reference, "team", NOON + 60)]
    asked.post(asked.mail(message_id="<2@x>", in_reply_to="<first@customer.example>"))
    assert waiting(asked) == [asked.reference]
    asked.run("close", asked.reference)
    assert waiting(asked) == []
    assert f"{asked.reference}  Support  closed" in asked.run("tickets", "closed")


def test_a_reply_from_the_shell_is_told_to_the_team(asked):
    asked.run("reply", asked.reference, stdin="Pull the plug.\n")
    assert sent(asked)[3:] == [("reply", ADA), ("notice", BOB), ("notice", CLEO)]
    mail = told(asked, BOB)[-1]
    assert text_of(mail).startswith(
        "[inbound] answer from the command line:\n\nPull the plug.\n\n")
    assert status_of(asked) == ("open", "team")


# forget -------------------------------------------------------------------------------------------

def test_to_forget_one_of_the_team_leaves_the_customer_s_words(asked):
    asked.post(reply_to(asked.notice, "Pull the plug."))
    asked.run("forget", BOB)
    assert [text for text, in asked.sql("SELECT text FROM message WHERE direction = 'in'")] == [
        "It burns."]
    assert "Pull the plug" not in "".join(asked.dump())
    assert BOB not in str(asked.sql("SELECT * FROM outbox"))


def test_to_forget_the_customer_takes_the_notices_along(asked):
    asked.post(reply_to(asked.notice, "Pull the plug.\n> It burns."))
    asked.run("forget", ADA)
    assert (asked.count("message"), asked.count("outbox")) == (0, 0)


# The whole day, over real SMTP --------------------------------------------------------------------

def written(sender, text, parent=None, **fields):
    """The raw mail that a mail program makes, in reply to `parent` where there is one."""
    mail = email.message.EmailMessage(email.policy.SMTP)
    mail["From"], mail["To"], mail["Date"] = sender, US, email.utils.formatdate(NOON)
    mail["Message-ID"] = f"<{next(NUMBERS)}.day@{sender.rpartition('@')[2].strip('>')}>"
    for name, value in fields.items():
        mail[name] = value
    if parent:
        body = reply_to(parent, "")
        mail["Subject"], mail["In-Reply-To"] = body["subject"], body["in_reply_to"]
        mail["References"] = " ".join(body["references"])
        text += "\n" + quoted(parent)
    mail.set_content(text)
    return mail


def test_a_day_in_the_life_of_a_ticket(serve, sink):
    served = serve()
    served.set_account(inbound_secret=SECRET, address=US, staff=f"{BOB},{CLEO}")
    served.send_to(sink.port)
    came = {}       # recipient → the mails that arrived there, oldest first

    def post(mail, count):
        """Post a mail as an MTA's pipe does, send all, until so many mails have come in all."""
        status, _, answer = served.post(mail.as_bytes(), headers={
            HEADER: SECRET, "Content-Type": "message/rfc822"})
        assert status == 200 and inbound.main(["--db", str(served.path), "outbox", "send"]) == 0
        arrived = sink.wait(count)
        assert len(arrived) == count
        came.clear()
        for envelope in arrived:
            mail = email.message_from_bytes(envelope.content, policy=email.policy.default)
            assert envelope.mail_from == (US if mail["Auto-Submitted"] is None else "<>")
            came.setdefault(envelope.rcpt_tos[0], []).append(mail)
        return answer

    first = post(written(f"Ada Lovelace <{ADA}>", "It burns.\n", Subject="Printer on fire"), 3)
    assert (first["status"], sorted(came)) == ("created", [ADA, BOB, CLEO])

    mail = written(f"Bob <{BOB}>", "close\n\nPull the plug, as in the picture.\n", came[BOB][0])
    mail.add_attachment(b"\x89PNG\r\n\x1a\n", maintype="image", subtype="png", filename="plug.png")
    answer = post(mail, 5)
    assert (answer["ticket"], answer["reason"]) == (
        first["ticket"], f"answer of {BOB}, who closed the ticket")
    ours = came[ADA][1]
    body, file = ours.iter_parts()
    assert text_of(body).startswith("Pull the plug, as in the picture.\n")
    assert "[inbound]" not in text_of(body)
    assert (file.get_filename(), file.get_content()) == ("plug.png", b"\x89PNG\r\n\x1a\n")
    assert f"[inbound] answer of {BOB}, who closed the" in text_of(came[CLEO][1])
    assert served.sql("SELECT status, last_writer FROM ticket") == [("closed", "team")]

    again = post(written(f"Ada Lovelace <{ADA}>", "It still burns.\n", ours), 7)
    assert (again["status"], again["ticket"]) == ("appended", first["ticket"])
    assert served.sql("SELECT status, last_writer FROM ticket") == [("open", "customer")]
    assert [len(came[one]) for one in (ADA, BOB, CLEO)] == [2, 2, 3]
    assert came[BOB][1]["In-Reply-To"] == came[BOB][0]["Message-ID"]
    eventually(lambda: {*served.sql("SELECT state FROM outbox")} == {("sent",)})
    assert served.stop() == 0
