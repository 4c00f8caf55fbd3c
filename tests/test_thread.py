"""Which ticket a message belongs to: SPEC 3.4, AUTOMATIC.md C. Ids first, the tag last.

What a mail program writes comes through both doors; a reply goes through the one that is named.
"""

import contextlib
import json
import secrets
import sqlite3
import time

import pytest
from doors import DOORS, deliver

from conftest import SECRET, mail_from

FIRST = "<first@customer.example>"
OTHER = "another-secret-of-the-tests-9876"
STRANGER = "mallory@elsewhere.example"
ADA, BOB = "ada@customer.example", "bob@customer.example"
both_doors = pytest.mark.parametrize("door", DOORS)


def opened(desk, **fields):
    """Post a mail that opens a ticket; return the reference."""
    answer = desk.post(desk.mail(**fields))
    assert answer["status"] == "created", answer
    return answer["ticket"]


def answer_to(desk, door="json", **fields):
    """Deliver a mail with another subject and text; return what it was answered."""
    number = desk.count("message")
    mail = {"message_id": f"<reply-{number}@customer.example>", "subject": "Something else",
            "text": f"Reply {number}."}
    return deliver(desk, desk.mail(**(mail | fields)), door)


def appended(desk, reference, door="json", **fields):
    """Assert that such a mail is appended to the ticket; return the message as `show` prints it."""
    before = desk.count("ticket"), desk.count("outbox")
    answer = answer_to(desk, door, **fields)
    assert (answer["status"], answer["ticket"]) == ("appended", reference), answer
    assert answer["confirmation"] == "not due"
    assert (desk.count("ticket"), desk.count("outbox")) == before
    return desk.show(reference)["messages"][-1]


def opens_another(desk, reference, door="json", **fields):
    answer = answer_to(desk, door, **fields)
    assert answer["status"] == "created" and answer["ticket"] != reference, answer
    return answer["ticket"]


def sent_id(desk, at=-1):
    return desk.sql("SELECT message_id FROM message WHERE direction = 'out' ORDER BY id")[at][0]


# Ids ----------------------------------------------------------------------------------------------

# Fields of a reply to FIRST, all of which find its ticket.
FOUND = [
    {"in_reply_to": FIRST},
    {"references": FIRST},
    {"references": [FIRST]},
    {"in_reply_to": [FIRST]},
    {"in_reply_to": "first@customer.example"},
    {"in_reply_to": f"  {FIRST}  "},
    {"in_reply_to": f"<none@x> {FIRST}"},
    {"in_reply_to": "<none@x>", "references": FIRST},
    {"in_reply_to": "", "references": f"{FIRST} <none@x>"},
    {"references": f"<none@x>,{FIRST},<none@y>"},
    {"references": f"<none@x>{FIRST}<none@y>"},
    {"references": f"<none@x>\r\n\t{FIRST}\r\n <none@y>"},
    {"headers": {"In-Reply-To": FIRST}},
    {"headers": {"REFERENCES": FIRST}},
    {"headers": {"References": ["<none@x>", FIRST]}},
    {"headers": [["References", "<none@x>"], ["References", FIRST]]},
    # Exchange's vacation replies and receipts have no In-Reply-To.
    {"headers": {"X-MS-Exchange-Parent-Message-Id": FIRST}},
    {"headers": {"x-ms-exchange-parent-message-id": "first@customer.example"}},
    {"headers": {"X-MS-Exchange-Parent-Message-Id": FIRST, "Auto-Submitted": "auto-generated"}},
    {"headers": {"X-MS-Exchange-Parent-Message-Id": FIRST}, "in_reply_to": "<none@x>"},
    # Mangled on the way.
    {"in_reply_to": "<first@customer.\r\n example>"},
    {"in_reply_to": "<first@ customer.example>"},
    {"in_reply_to": "&lt;first@customer.example&gt;"},
    {"in_reply_to": '"<first@customer.example>"'},
    {"in_reply_to": "<<first@customer.example>>"},
    {"in_reply_to": "<first@customer.example"},
    {"in_reply_to": "first@customer.example>"},
    {"in_reply_to": "<FIRST@Customer.Example>"},
    {"in_reply_to": "<first@customer.example.>"},
    {"references": f"<trunc {FIRST} <none@cut.exam"},
    {"references": f"{FIRST} <none@cut"},
    {"references": f"<none@x> <> <@> < > {FIRST}"},
    # RFC 5322 4.5.4: phrases are ignored.
    {"in_reply_to": f'Your message of "Mon, 21 Sep 2026" {FIRST}'},
    {"in_reply_to": f"Message from Ada Lovelace of Monday {FIRST}"},
    {"in_reply_to": f"ada@customer.example's mail {FIRST}"},
    {"in_reply_to": f"{FIRST} (from Ada)"},
]


@both_doors
@pytest.mark.parametrize("fields", FOUND)
def test_a_known_id_finds_its_ticket_however_it_is_written(bare, door, fields):
    appended(bare, opened(bare), door, **fields)


# Fields of a mail that find no ticket.
NOT_FOUND = [
    {},
    {"in_reply_to": "", "references": []},
    {"in_reply_to": "<first@customer.exampl>"},
    {"in_reply_to": "<irst@customer.example>"},
    {"in_reply_to": "<first@customer.example.org>"},
    {"in_reply_to": "<first>"},
    {"in_reply_to": "<%@customer.example>"},
    {"in_reply_to": "<_irst@customer.example>"},
    {"in_reply_to": "<*>"},
    {"in_reply_to": "Your message of Monday"},
    {"subject": "Re: Printer on fire"},
    {"text": "> first@customer.example\n> Message-ID: <first@customer.example>"},
    {"headers": {"X-References": FIRST}},
    {"headers": {"Message-ID": FIRST}},
]


@pytest.mark.parametrize("fields", NOT_FOUND)
def test_no_other_id_no_subject_and_no_text_finds_a_ticket(bare, fields):
    opens_another(bare, opened(bare), **fields)


@pytest.mark.parametrize("fields", [fields for fields in NOT_FOUND if "Message-ID" not in
                                    fields.get("headers", ())])
def test_nor_does_it_in_a_raw_mail(bare, fields):
    opens_another(bare, opened(bare), "raw", **fields)


def test_an_id_without_an_at_sign_is_looked_up_as_it_is(desk):
    reference = opened(desk, message_id="<Ac0SKyO0aBcDeFgH==>")
    appended(desk, reference, references="<none@x> <Ac0SKyO0aBcDeFgH==>")
    opens_another(desk, reference, references="<Ac0SKyO0aBcDeFgX==>")


def test_an_id_of_any_length_threads(desk):
    long = f"<{'x' * 10_000}@customer.example>"
    reference = opened(desk, message_id=long)
    assert appended(desk, reference, in_reply_to=long)["in_reply_to"] == long


def test_in_reply_to_goes_before_references(desk):
    one = opened(desk)
    two = opened(desk, message_id="<two@customer.example>", text="Two.")
    appended(desk, one, in_reply_to=FIRST, references="<two@customer.example>")
    appended(desk, two, in_reply_to="<two@customer.example>", references=FIRST)
    appended(desk, two, in_reply_to="<none@x>", references="<two@customer.example>")


@both_doors
def test_exchange_s_parent_comes_after_what_the_standards_know(desk, door):
    one = opened(desk)
    two = opened(desk, message_id="<two@customer.example>", text="Two.")
    parent = {"X-MS-Exchange-Parent-Message-Id": FIRST}
    appended(desk, two, door, in_reply_to="<two@customer.example>", headers=parent)
    appended(desk, one, door, in_reply_to="<none@x>", headers=parent)


def test_references_are_read_from_the_right(desk):
    one = opened(desk)
    two = opened(desk, message_id="<two@customer.example>", text="Two.")
    appended(desk, two, references=f"{FIRST} <two@customer.example>")
    appended(desk, one, references=f"<two@customer.example> {FIRST} <none@x>")


def test_several_parents_are_read_from_the_left(desk):
    one = opened(desk)
    opened(desk, message_id="<two@customer.example>", text="Two.")
    appended(desk, one, in_reply_to=f"{FIRST} <two@customer.example>")


def test_every_message_of_a_ticket_leads_to_it(desk):
    reference = opened(desk)
    for _ in range(4):
        parent = desk.sql("SELECT message_id FROM message ORDER BY id DESC")[0][0]
        appended(desk, reference, in_reply_to=parent)


def test_the_exact_id_goes_before_one_of_another_case(desk):
    lower = opened(desk)
    upper = opened(desk, message_id="<FIRST@customer.example>", **{"from": BOB})
    for _ in range(2):
        appended(desk, lower, in_reply_to=FIRST)
        appended(desk, upper, in_reply_to="<FIRST@customer.example>")
        appended(desk, lower, in_reply_to=FIRST, **{"from": BOB})


def test_an_id_in_another_case_is_another_message_and_each_is_kept_once(desk):
    ids = [FIRST, FIRST.upper(), FIRST.title()]
    for status in ("created", "duplicate"):
        assert [desk.post(desk.mail(message_id=each))["status"] for each in ids] == [status] * 3
    assert desk.sql("SELECT message_id FROM message WHERE direction = 'in'") == [
        (each,) for each in ids]


# What we sent -------------------------------------------------------------------------------------

def test_a_reply_to_our_confirmation_finds_its_ticket(desk):
    reference = opened(desk)
    assert desk.count("message WHERE direction = 'out'") == 1
    appended(desk, reference, in_reply_to=sent_id(desk))
    appended(desk, reference, references=f"<none@x> {sent_id(desk)}")
    appended(desk, reference, in_reply_to=sent_id(desk).upper())


def test_a_reply_to_our_reply_finds_its_ticket(desk):
    reference = opened(desk)
    desk.run("reply", reference, stdin="Which printer?")
    appended(desk, reference, in_reply_to=sent_id(desk))


def test_an_id_that_our_relay_overwrote_does_not_lose_the_reply(desk):
    """Some relays put their own Message-ID on our mail: the customer's own id still stands."""
    reference = opened(desk)
    relayed = "<0100018f-relay@eu-central-1.relay.example>"
    shown = appended(desk, reference, in_reply_to=relayed, references=f"{FIRST} {relayed}",
                     subject=f"Re: [{reference}] We received your message")
    assert (shown["in_reply_to"], shown["references"]) == (relayed, [FIRST, relayed])


@both_doors
@pytest.mark.parametrize("from_address", ["Support <support@helpdesk.example>", ADA, STRANGER])
def test_a_mail_that_bears_an_id_of_ours_is_kept_on_its_ticket_and_marked(bare, door, from_address):
    """A list that sends our mail back, or somebody who writes our id on a mail: either is kept."""
    reference = opened(bare)
    fields = {"message_id": sent_id(bare), "from": from_address, "subject": "[Talk] Hello"}
    marked = appended(bare, reference, door, **fields, text="Ours, with a footer.")
    assert marked["message_id"] == sent_id(bare)
    assert marked["notes"]
    before = bare.count("message"), bare.count("outbox")
    again = answer_to(bare, door, **fields, text="Ours, with a footer.")
    assert (again["status"], again["ticket"]) == ("duplicate", reference)
    assert (bare.count("message"), bare.count("outbox")) == before
    appended(bare, reference, door, **fields, text="And with another.")


@both_doors
def test_our_own_mail_that_comes_back_reopens_nothing(bare, door):
    reference = opened(bare)
    bare.run("close", reference)
    appended(bare, reference, door, message_id=sent_id(bare), text="Ours, with a footer.",
             **{"from": "Support <support@helpdesk.example>"})
    assert status_of(bare, reference) == "closed"


@both_doors
def test_an_id_of_ours_goes_before_what_the_mail_says_it_answers(bare, door):
    one = opened(bare)
    opened(bare, message_id="<two@customer.example>", text="Two.")
    appended(bare, one, door, message_id=sent_id(bare, 0), in_reply_to="<two@customer.example>",
             text="Ours, with a footer.")


def test_a_made_up_message_id_does_not_thread(desk):
    """Two mails without a Message-ID share no parent."""
    first = "From: ada@customer.example\nSubject: one\n\nOne.\n"
    second = "From: ada@customer.example\nSubject: two\n\nTwo.\n"
    answers = [desk.post(mail, "message/rfc822") for mail in (first, second)]
    assert [answer["status"] for answer in answers] == ["created"] * 2


# The same id on several tickets -------------------------------------------------------------------

def test_an_id_on_two_tickets_leads_to_its_own_requester_s(desk):
    ada = opened(desk, text="Ada's.")
    bob = opened(desk, text="Bob's.", **{"from": BOB})
    assert desk.sql("SELECT DISTINCT message_id FROM message WHERE direction = 'in'") == [(FIRST,)]
    appended(desk, ada, in_reply_to=FIRST)
    appended(desk, bob, in_reply_to=FIRST, **{"from": "Bob <BOB@customer.example>"})
    appended(desk, ada, references=FIRST, **{"from": f"Ada <{ADA}>"})


def test_an_id_on_two_tickets_leads_a_stranger_to_the_liveliest(desk):
    ada = opened(desk, text="Ada's.")
    bob = opened(desk, text="Bob's.", **{"from": BOB})
    for reference, address in ((ada, ADA), (bob, BOB)):
        desk.clock.advance(60)
        appended(desk, reference, in_reply_to=FIRST, **{"from": address})
        appended(desk, reference, in_reply_to=FIRST, **{"from": STRANGER})


def test_the_same_message_id_with_another_text_is_another_ticket(desk):
    first = opened(desk)
    opens_another(desk, first, message_id=FIRST, text="It still burns.")
    assert desk.count("message WHERE direction = 'in'") == 2


# Accounts -----------------------------------------------------------------------------------------

def second_account(desk):
    desk.run("account", "add", "sales@helpdesk.example")
    desk.run("--account", "sales@helpdesk.example", "secret", "set", OTHER)
    return {"X-Mobieus-Inbound-Secret": OTHER}


def test_two_accounts_that_get_the_same_mail_have_a_ticket_each(desk):
    ours, theirs = {"X-Mobieus-Inbound-Secret": SECRET}, second_account(desk)
    tickets = {}
    for name, headers in (("ours", ours), ("theirs", theirs)):
        answer = desk.post(desk.mail(), headers=headers)
        assert answer["status"] == "created"
        tickets[name] = answer["ticket"]
        assert desk.post(desk.mail(), headers=headers)["status"] == "duplicate"
    assert tickets["ours"] != tickets["theirs"]
    reply = desk.mail(message_id="<2@customer.example>", in_reply_to=FIRST)
    for name, headers in (("theirs", theirs), ("ours", ours)):
        answer = desk.post(reply, headers=headers)
        assert (answer["status"], answer["ticket"]) == ("appended", tickets[name])


def test_no_id_and_no_tag_leads_to_another_account_s_ticket(desk):
    theirs, reference = second_account(desk), opened(desk)
    for number, fields in enumerate(({"in_reply_to": FIRST}, {"references": sent_id(desk)},
                                     {"subject": f"Re: [{reference}] Printer"})):
        mail = desk.mail(message_id=f"<{number}@customer.example>", **fields)
        answer = desk.post(mail, headers=theirs)
        assert answer["status"] == "created" and answer["ticket"] != reference


# The subject's tag --------------------------------------------------------------------------------

# (subject, From): the requester is ada@customer.example.
TAGGED = [
    ("[{}] Printer", ADA),
    ("Re: [{}] We received your message", ADA),
    ("AW: WG: [{}]", ADA),
    ("Printer [{}]", "Ada <ADA@Customer.Example>"),
    ("Re:[{}]Printer", "ada+helpdesk@customer.example"),
    ("[T-0000-0000] [{}]", ADA),
    # As an input method for Chinese or Japanese turns the brackets, and as people retype them.
    ("Re: \uff3b{}\uff3d Printer", ADA),
    ("\u3010{}\u3011Printer", ADA),
    ("{} Printer", ADA),
    ("Re: {}: Printer", ADA),
    ("Printer, {}", ADA),
    ("({}) Printer", ADA),
    ("[{}", ADA),
    ("[#{}]", ADA),
]


@both_doors
@pytest.mark.parametrize("subject, from_address", TAGGED)
def test_the_requester_s_tag_finds_the_ticket(bare, door, subject, from_address):
    reference = opened(bare)
    for tag in (reference, reference.lower()):
        appended(bare, reference, door, subject=subject.format(tag), **{"from": from_address})


@both_doors
def test_so_does_the_tag_of_one_whom_a_mail_of_ours_on_it_went_to(bare, door):
    reference = opened(bare)
    bare.run("reply", reference, "--to", BOB, stdin="What do you think?")
    bare.run("close", reference)
    appended(bare, reference, door, subject=f"[{reference}] Printer", **{"from": BOB})
    assert status_of(bare, reference) == "open"


# Where a mail program folded it: T-7F3K-9Q2M is T, 7F3K and 9Q2M here.
FOLDED = ["Re: [{}-{}-\r\n {}] Printer", "Re: [{}-{}-\r\n\t{}] Printer",
          "Re: [{}-\r\n {}-{}] Printer",
          "Re: [{}-{}- {}] Printer", "Re: [\r\n {}-{}-{}\r\n ] Printer",
          "Re: \uff3b{}-{}-\r\n {}\uff3d Printer"]


@both_doors
@pytest.mark.parametrize("subject", FOLDED)
def test_a_tag_that_was_folded_finds_the_ticket_of_its_requester(bare, door, subject):
    reference = opened(bare)
    written = subject.format(*reference.split("-"))
    appended(bare, reference, door, subject=written)
    opens_another(bare, reference, door, subject=written, **{"from": STRANGER})


@both_doors
@pytest.mark.parametrize("subject", [subject for subject, _ in TAGGED])
def test_no_spelling_of_a_tag_lets_a_stranger_in(bare, door, subject):
    reference = opened(bare)
    written = subject.format(reference)
    opens_another(bare, reference, door, subject=written, **{"from": STRANGER})


@pytest.mark.parametrize("from_address", [STRANGER, "ada@elsewhere.example", "ad@customer.example",
                                          "bada@customer.example", "ada@customer.example.org",
                                          "ada@customer.example <mallory@elsewhere.example>"])
def test_a_stranger_s_tag_opens_a_new_ticket(desk, from_address):
    reference = opened(desk)
    opens_another(desk, reference, subject=f"Re: [{reference}] Printer", **{"from": from_address})
    assert len(desk.show(reference)["messages"]) == 2


@pytest.mark.parametrize("subject", ["[T-0000-0000] Printer", "[{}9]", "9{} Printer", "X{}",
                                     "{}-0000", "[T-%-%]", "[T-____-____]", "[T-IIII-LLLL]"])
def test_an_unknown_or_broken_tag_opens_a_new_ticket(desk, subject):
    reference = opened(desk)
    opens_another(desk, reference, subject=subject.format(reference))


def test_an_id_goes_before_the_tag(desk):
    one, two = opened(desk), opened(desk, message_id="<two@customer.example>", text="Two.")
    appended(desk, two, subject=f"[{one}]", in_reply_to="<two@customer.example>")
    appended(desk, one, subject=f"[{one}]", in_reply_to="<none@x>")


# What becomes of the ticket -----------------------------------------------------------------------

def status_of(desk, reference):
    return desk.show(reference)["status"]


# (From, headers, status of the closed ticket then). SPEC 3.4: by a person who is a party to it.
REOPEN = [
    (ADA, {}, "open"),
    ("Ada <ADA@Customer.Example>", {}, "open"),
    ("ada+helpdesk@customer.example", {}, "open"),
    (ADA, {"X-Auto-Response-Suppress": "All"}, "open"),
    (STRANGER, {}, "closed"),
    (BOB, {}, "closed"),
    ("ada@elsewhere.example", {}, "closed"),
    ("ad@customer.example", {}, "closed"),
    (ADA, {"Auto-Submitted": "auto-replied"}, "closed"),
    (ADA, {"Precedence": "list"}, "closed"),
    (STRANGER, {"Auto-Submitted": "auto-replied"}, "closed"),
    ("mailer-daemon@mx.example", {}, "closed"),
]


@both_doors
@pytest.mark.parametrize("from_address, headers, status", REOPEN)
def test_a_closed_ticket_is_reopened_by_its_own_people_only(bare, door, from_address, headers,
                                                            status):
    reference = opened(bare)
    bare.run("close", reference)
    appended(bare, reference, door, in_reply_to=FIRST, headers=headers, **{"from": from_address})
    assert status_of(bare, reference) == status


@both_doors
def test_a_stranger_on_a_closed_ticket_is_kept_there_and_marked(bare, door):
    reference = opened(bare)
    bare.run("close", reference)
    for number in range(2):     # also the second time: to write does not make a party of anybody
        marked = appended(bare, reference, door, in_reply_to=FIRST, text=f"Let me in, {number}.",
                          **{"from": STRANGER})
        assert any("stranger" in note for note in marked["notes"])
        assert status_of(bare, reference) == "closed"


def test_a_tag_reopens_too(desk):
    reference = opened(desk)
    desk.run("close", reference)
    appended(desk, reference, subject=f"[{reference}]")
    assert status_of(desk, reference) == "open"


def test_a_repeat_reopens_nothing(desk):
    reference = opened(desk)
    desk.run("close", reference)
    answer = desk.post(desk.mail())
    assert (answer["status"], answer["ticket"]) == ("duplicate", reference)
    assert status_of(desk, reference) == "closed"


@pytest.mark.parametrize("pragma", ["foreign_keys = ON", "foreign_keys = OFF"])
def test_a_reply_to_a_deleted_ticket_opens_a_new_one(desk, pragma):
    gone = opened(desk)
    ours = sent_id(desk)
    with contextlib.closing(sqlite3.connect(desk.path, isolation_level=None)) as db:
        db.execute(f"PRAGMA {pragma}")
        db.execute("DELETE FROM ticket")
    reference = opens_another(desk, gone, in_reply_to=FIRST, references=ours)
    appended(desk, reference, in_reply_to=sent_id(desk))


@both_doors
def test_a_stranger_with_a_known_id_is_appended_and_marked(bare, door):
    reference = opened(bare)
    marked = appended(bare, reference, door, in_reply_to=FIRST,
                      **{"from": f"Mallory <{STRANGER}>"})
    assert any("stranger" in note for note in marked["notes"])
    assert (marked["from"], marked["from_name"]) == (STRANGER, "Mallory")
    for address in (ADA, "ada+tag@customer.example", "ADA@CUSTOMER.EXAMPLE"):
        own = appended(bare, reference, door, in_reply_to=FIRST, **{"from": address})
        assert own["notes"] == []


def test_the_requester_never_changes(desk):
    reference = opened(desk)
    appended(desk, reference, in_reply_to=FIRST, cc="eve@x.example", **{"from": STRANGER})
    desk.run("close", reference)
    appended(desk, reference, in_reply_to=FIRST, **{"from": "ada+x@customer.example"})
    assert desk.show(reference)["requester"] == ADA
    assert desk.sql("SELECT requester, requester_name FROM ticket") == [(ADA, "Ada Lovelace")]
    desk.run("reply", reference, stdin="Hello")
    assert desk.sql("SELECT DISTINCT recipient FROM outbox") == [(ADA,)]


# Bounds -------------------------------------------------------------------------------------------

def test_a_thousand_references_cost_less_than_a_second(desk):
    opened(desk)
    ids = [f"<{number}.{'x' * 60}@customer.example>" for number in range(1000)]
    start = time.process_time()
    answer = answer_to(desk, references=" ".join(ids), in_reply_to=ids)
    assert time.process_time() - start < 1
    assert answer["status"] == "created"
    [(references,)] = desk.sql('SELECT "references" FROM message WHERE id = ?', answer["message"])
    assert json.loads(references) == ids[:20] + ids[-80:]


@pytest.mark.parametrize("at, is_found", [(0, True), (19, True), (20, False), (919, False),
                                          (920, True), (999, True)])
def test_of_a_thousand_references_the_ends_are_looked_at(desk, at, is_found):
    reference = opened(desk)
    ids = [f"<{number}@x>" for number in range(1000)]
    ids[at] = FIRST
    (appended if is_found else opens_another)(desk, reference, references=ids)


@pytest.mark.slow
@pytest.mark.parametrize("junk", ["x" * 30_000, "x@" * 250_000, "<" * 500_000, "<x" * 250_000,
                                  "x " * 250_000, "(" * 500_000, '"' * 500_000])
@pytest.mark.parametrize("field", ["in_reply_to", "references", "message_id"])
def test_a_long_run_of_anything_for_an_id_costs_less_than_a_second(desk, field, junk):
    start = time.process_time()
    answer = desk.request(desk.mail(**{field: junk}))
    assert time.process_time() - start < 1
    assert answer.status_int in (200, 422)


def test_a_reference_that_is_taken_is_no_reason_to_lose_a_ticket(desk, monkeypatch):
    drawn = iter([bytes(8), bytes(8), bytes(8), b"\1" * 8])
    draw = secrets.token_bytes
    monkeypatch.setattr(
        secrets, "token_bytes", lambda length: next(drawn) if length == 8 else draw(length))
    references = [desk.post(mail_from(name))["ticket"] for name in ("a", "b")]
    assert references == ["T-0000-0000", "T-1111-1111"]
