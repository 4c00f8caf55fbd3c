"""The command line: SPEC 6. Exit codes, one line for an error, JSON with --json, safe to print."""

import email
import email.policy
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import inbound
from conftest import HEADER, SECRET

FIRST = "<first@customer.example>"
MESSAGE_KEYS = {
    "direction", "message_id", "in_reply_to", "references", "from", "from_name", "envelope_from",
    "to", "cc", "subject", "text", "html", "headers", "kind", "reason", "confirmation",
    "attachments", "notes", "received_at"}
TICKET_KEYS = {"reference", "queue", "status", "subject", "requester", "messages", "last_writer",
               "created_at", "updated_at"}


@pytest.fixture
def filled(desk):
    """A desk with one ticket, its queued confirmation and one rejected post."""
    file = {"filename": "a.txt", "content_type": "text/plain", "content": "YQ=="}
    desk.reference = desk.post(desk.mail(attachments=[file]))["ticket"]
    desk.request({"text": "no sender"})
    return desk


def printed(desk, *argv, **more):
    return json.loads(desk.run(*argv, "--json", **more))


def fails(desk, *argv, status=1, **more):
    """Assert that the verb fails in one line; return the line."""
    line = desk.run(*argv, status=status, **more)
    assert re.fullmatch(r"inbound: [^\n]{10,}\n", line), line
    return line


def mail_of(desk, at=-1):
    """A mail of the outbox, parsed as a mail reader would."""
    contents = desk.sql("SELECT content FROM outbox ORDER BY id")
    return email.message_from_bytes(contents[at][0], policy=email.policy.default)


# Every verb ---------------------------------------------------------------------------------------

SECRET_KEYS = {"address", "inbound_secret", "previous_secret", "previous_secret_until"}
OUTBOX_KEYS = {"id", "ticket", "to", "state", "attempts", "next_attempt_at", "last_error"}
REJECTED_KEYS = {"id", "received_at", "status", "reason", "content_type", "size"}
SHOW_KEYS = {"reference", "queue", "status", "subject", "requester", "messages"}

# Each verb of --help that prints data, {} = the reference; what it prints; keys of its JSON, which
# is an object or (in a list) a list of them. The settings of `account` are columns, and grow.
VERBS = [
    ("secret", SECRET, SECRET_KEYS),
    ("secret show", SECRET, SECRET_KEYS),
    ("secret set another-secret-0123456789", "another-secret-0123456789", SECRET_KEYS),
    ("secret rotate", "[a-z][A-Za-z0-9_-]{31,}\n", SECRET_KEYS),
    ("secret rotate --keep 1h", "[a-z][A-Za-z0-9_-]{31,}\n", SECRET_KEYS),
    ("account", "address=support@helpdesk.example\n", None),
    ("account show", "queue=Support\n", None),
    ("account list", "support@helpdesk.example  Support", [
        {"address", "display_name", "smtp_host"}]),
    ("account add sales@helpdesk.example", "address=sales@helpdesk.example\ninbound_secret=[a-z]",
     {"address", "inbound_secret"}),
    ("account set display_name=Help", "display_name=Help\n$", {"display_name"}),
    ("tickets", "{}  Support  open  Printer on fire", [TICKET_KEYS]),
    ("tickets waiting", "{}  Support  open  Printer on fire", [TICKET_KEYS]),
    ("show {}", r"{} \(open, Support\): Printer on fire(?s:.)*It burns", SHOW_KEYS),
    ("reply {}", "to=ada@customer.example\n", {"reference", "to", "message_id"}),
    ("close {}", "reference={}\nstatus=closed\n", {"reference", "status"}),
    ("reopen {}", "reference={}\nstatus=open\n", {"reference", "status"}),
    ("outbox", "1  {}  ada@customer.example  queued", [OUTBOX_KEYS]),
    ("outbox list", "1  {}  ada@customer.example  queued", [OUTBOX_KEYS]),
    ("outbox show 1", "To: ada@customer.example\n", OUTBOX_KEYS | {"content"}),
    ("outbox send", "nothing is due\n", set()),
    ("outbox retry 1", "1  queued\n", [{"id", "state"}]),
    ("outbox retry all", "nothing has failed\n", []),
    ("rejected", "422", [REJECTED_KEYS]),
    ("rejected list", "422", [REJECTED_KEYS]),
    ("rejected show 1", 'body={{"text": "no sender"}}', REJECTED_KEYS | {
        "body", "body_sha256", "email_account", "tries"}),
    ("rejected replay", "1  refused", [{"id", "status", "reason"}]),
    ("rejected replay 1", "1  refused", [{"id", "status", "reason"}]),
    ("rejected delete 1", "id=1\nreason=", {"id", "reason"}),
]
SECOND = "show|set|rotate|list|add|send|retry|replay|delete"
NAMES = sorted({re.match(f"[a-z]+(?: (?:{SECOND}))?", line)[0]
                for line, *_ in VERBS})


@pytest.mark.parametrize("line, words, keys", VERBS)
def test_every_verb_prints_words_or_json(filled, line, words, keys):
    argv = shlex.split(line.format(filled.reference))
    words = words.replace("{}", filled.reference).replace("{{", "{").replace("}}", "}")
    assert re.search(words, filled.run(*argv, stdin="Hello"), re.M)


@pytest.mark.parametrize("line, words, keys", VERBS)
def test_every_verb_has_json(filled, line, words, keys):
    shown = printed(filled, *shlex.split(line.format(filled.reference)), stdin="Hello")
    if keys is None:
        columns = filled.records("SELECT * FROM email_account")[0].keys()
        keys = {name for name in columns if name != "id" and "_secret" not in name}
    if isinstance(keys, list):
        assert [member.keys() for member in shown] == keys
    else:
        assert shown.keys() == keys


def test_every_verb_of_the_table_is_in_the_help():
    verbs = {name.split()[0] for name in inbound.VERBS}
    assert verbs > {name.split()[0] for name in NAMES}
    assert verbs == {*re.findall(r"^  ([a-z]+)\b", inbound.__doc__, re.M)}


def test_every_function_that_is_documented_as_a_verb_is_in_the_table():
    documented = {function for function in vars(inbound).values()
                  if str(function.__doc__).startswith("inbound ")}
    assert documented == {*inbound.VERBS.values()}


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_docstring_and_behind_a_verb_that_verbs(desk, flag):
    assert desk.run(flag) == inbound.__doc__.strip() + "\n"
    for name in [*NAMES, "serve", "relay", "attachment"]:
        for argv in ([*name.split(), flag], [flag, *name.split()]):
            usage, words = desk.run(*argv).split("\n\n", 1)
            assert re.match(f"Usage: inbound {name}\\b", usage) and words.strip()
    assert desk.run("show", "T-0000-0000", flag).startswith("Usage: inbound show REF")


def test_version_is_said_and_help_and_version_need_no_database(tmp_path, capsys):
    for argv in (["--version"], ["--help"], ["tickets", "--help"]):
        assert inbound.main(["--db", str(tmp_path / "none.db"), *argv]) == 0
        out, err = capsys.readouterr()
        assert out and err == ""
        assert argv != ["--version"] or re.fullmatch(r"inbound \d+\.\d+\.\d+\n", out)
    assert [*tmp_path.iterdir()] == []


def test_without_a_verb_it_names_the_help_and_exits_2(capsys):
    assert inbound.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"inbound: .*inbound --help\n", err)


# Keys of the JSON ---------------------------------------------------------------------------------

def test_show_prints_the_keys_that_are_promised(filled):
    shown = printed(filled, "show", filled.reference)
    assert shown.keys() == SHOW_KEYS
    for message in shown["messages"]:
        assert message.keys() == MESSAGE_KEYS
        lists = ("references", "to", "cc", "headers", "notes", "attachments")
        assert all(isinstance(message[name], list) for name in lists)
    [file] = shown["messages"][0]["attachments"]
    assert file.keys() == {"id", "filename", "content_type", "content_id", "size", "sha256", "note"}


def test_show_prints_a_ticket_whole_with_the_oldest_message_first(filled):
    shown = filled.show(filled.reference)
    incoming, outgoing = shown["messages"]
    assert shown | {"messages": []} == {
        "reference": filled.reference, "queue": "Support", "status": "open", "messages": [],
        "subject": "Printer on fire", "requester": "ada@customer.example"}
    assert (incoming["direction"], outgoing["direction"]) == ("in", "out")
    assert incoming["message_id"] == FIRST
    assert outgoing["in_reply_to"] == FIRST and outgoing["references"] == [FIRST]
    assert outgoing["to"] == ["ada@customer.example"] and outgoing["kind"] is None
    assert re.fullmatch("<[0-9a-z.]+@helpdesk.example>", outgoing["message_id"])


def test_tickets_are_listed_with_the_keys_that_are_promised(filled):
    assert printed(filled, "tickets") == [{
        "reference": filled.reference, "queue": "Support", "status": "open", "messages": 2,
        "subject": "Printer on fire", "requester": "ada@customer.example",
        "last_writer": "customer", "created_at": filled.clock(), "updated_at": filled.clock()}]


def test_the_outbox_is_listed_with_the_keys_that_are_promised(filled):
    assert printed(filled, "outbox", "list") == [{
        "id": 1, "ticket": filled.reference, "to": "ada@customer.example", "state": "queued",
        "attempts": 0, "next_attempt_at": filled.clock(), "last_error": ""}]


def test_rejected_posts_are_listed_with_the_keys_that_are_promised(filled):
    [row] = printed(filled, "rejected", "list")
    assert row.pop("reason")
    assert row == {"id": 1, "received_at": filled.clock(), "status": 422,
                   "content_type": "application/json", "size": len('{"text": "no sender"}')}


@pytest.mark.parametrize("line, words", [
    ("tickets", ""), ("outbox", ""), ("rejected", ""), ("rejected replay", "nothing was rejected"),
    ("outbox retry all", "nothing has failed")])
def test_an_empty_list_is_an_empty_list_and_what_has_nothing_to_do_says_so(desk, line, words):
    assert printed(desk, *line.split()) == []
    assert desk.run(*line.split()).strip() == words


# tickets and show ---------------------------------------------------------------------------------

@pytest.fixture
def four(desk):
    """A desk with four tickets, one an hour, the second closed; {name: reference}."""
    desk.run("account", "add", "sales@helpdesk.example")
    sales = desk.run("secret", "--account", "sales@helpdesk.example").strip()
    desk.references = {}
    for name, fields, secret in [
            ("first", {}, SECRET),
            ("closed", {"subject": "Solved"}, SECRET),
            ("bob", {"from": "Bob@customer.example", "text": "It BURNS, and smells."}, SECRET),
            ("sales", {"subject": "A price"}, sales)]:
        body = desk.mail(**{"message_id": f"<{name}@customer.example>"} | fields)
        desk.references[name] = desk.post(body, headers={HEADER: secret})["ticket"]
        desk.clock.advance(3600)
    desk.run("close", desk.references["closed"])
    desk.execute("INSERT INTO queue (name) VALUES ('Repairs')")
    desk.execute("UPDATE ticket SET queue = (SELECT id FROM queue WHERE name = 'Repairs')"
                 " WHERE reference = ?", desk.references["bob"])
    return desk


LISTED = [
    ("tickets", "sales bob first"),
    ("tickets open", "sales bob first"),
    ("tickets closed", "closed"),
    ("tickets all", "closed sales bob first"),
    ("tickets --limit 2", "sales bob"),
    ("tickets all --limit 0", "closed sales bob first"),
    ("tickets --queue Repairs", "bob"),
    ("tickets --queue Nobody", ""),
    ("tickets --from ADA@customer.example", "sales first"),
    ("tickets --from bob@customer.example", "bob"),
    ("tickets --search burns", "sales bob first"),
    ("tickets --search 'SMELLS burns'", "bob"),
    ("tickets --search 'price'", "sales"),
    ("tickets --search 'price smells'", ""),
    ("tickets all --search bob@", "bob"),
    ("tickets --account sales@helpdesk.example", "sales"),
    ("tickets all --account support@helpdesk.example --from ada@customer.example", "closed first"),
]


@pytest.mark.parametrize("line, expected", LISTED)
def test_tickets_are_those_that_are_asked_for_and_the_latest_message_is_first(
        four, line, expected):
    names = {reference: name for name, reference in four.references.items()}
    shown = printed(four, *shlex.split(line))
    assert [names[row["reference"]] for row in shown] == expected.split()


def test_a_new_message_brings_its_ticket_to_the_top(four):
    four.post(four.mail(message_id="<2@x>", in_reply_to=FIRST, text="Again."))
    assert printed(four, "tickets")[0]["reference"] == four.references["first"]


def test_show_prints_the_last_messages_only_when_told_so(filled):
    filled.post(filled.mail(message_id="<2@x>", in_reply_to=FIRST, text="Still."))
    everything = filled.show(filled.reference)["messages"]
    last = printed(filled, "show", filled.reference, "--last", "2")["messages"]
    assert len(everything) == 3 and last == everything[1:]
    assert printed(filled, "show", filled.reference, "--last", "9")["messages"] == everything


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [100, 140, 500])
def test_on_a_terminal_a_list_has_a_header_and_columns_that_fit(four, monkeypatch, columns):
    four.execute("UPDATE ticket SET subject = ?", "long " * 40)
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert inbound.main(["--db", str(four.path), "tickets"], clock=four.clock) == 0
    header, *lines = terminal.getvalue().splitlines()
    assert header.split()[:2] == ["REFERENCE", "QUEUE"] and len(lines) == 3
    assert all(len(line) <= columns for line in [header, *lines])
    assert all(line[header.index("QUEUE"):][:7] in ("Repairs", "Support") for line in lines)
    assert all((" ".join(["long"] * 40) in line) == (columns == 500) for line in lines)


# attachment ---------------------------------------------------------------------------------------

def test_an_attachment_is_written_by_the_id_that_show_prints(filled, tmp_path, capsysbinary):
    [file] = filled.show(filled.reference)["messages"][0]["attachments"]
    assert f"attachment {file['id']}: a.txt" in filled.run("show", filled.reference)
    target = tmp_path / "a.txt"
    filled.run("attachment", str(file["id"]), str(target))
    assert target.read_bytes() == b"a"
    assert inbound.main(["--db", str(filled.path), "attachment", str(file["id"])]) == 0
    assert capsysbinary.readouterr().out == b"a"


def test_an_attachment_is_never_written_over_what_is_there(filled, tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("mine")
    fails(filled, "attachment", "1", str(target))
    fails(filled, "attachment", "1", str(tmp_path / "no folder" / "a.txt"))
    assert target.read_text() == "mine"


def test_an_attachment_that_could_not_be_decoded_is_not_written(desk, tmp_path):
    desk.post(desk.mail(attachments=[{"filename": "a.txt", "content": "!"}]))
    fails(desk, "attachment", "1", str(tmp_path / "a.txt"))
    assert [*tmp_path.iterdir()] == [desk.path] or [*tmp_path.iterdir()] == []


# Errors and usage ---------------------------------------------------------------------------------

# What cannot be done, and a word of the sentence that says so.
FAILS = [
    ("show T-0000-0000", "T-0000-0000"),
    ("show x", "no ticket 'x'"),
    ("reply T-0000-0000", "T-0000-0000"),
    ("reply {} --to nonsense", "nonsense"),
    ("close T-0000-0000", "T-0000-0000"),
    ("reopen T-0000-0000", "T-0000-0000"),
    ("attachment 99", "99"),
    ("attachment x", "'x'"),
    ("outbox show 99", "99"),
    ("outbox show x", "'x'"),
    ("outbox retry 99", "99"),
    ("rejected show 99", "99"),
    ("rejected replay 99", "99"),
    ("rejected delete 99", "99"),
    ("secret set short", "16 or more printable"),
    ("secret set ' 0123456789abcdef '", "no space"),
    ("secret set 'ümlaut-0123456789-0123'", "16 or more printable"),
    ("account add support@helpdesk.example", "address is another's already"),
    ("account add nonsense", "an address looks like"),
    ("account add 'a b@x.example'", "an address looks like"),
    ("account set address=", "address cannot be unset"),
    ("account set address=nonsense", "an address looks like"),
    ("account set queue=", "a queue needs a name"),
    ("account set smtp_port=0", "a port is a number"),
    ("account set smtp_port=99999", "a port is a number"),
    ("account set smtp_port=x", "number"),
    ("account set smtp_port=99999999999999999999", "number"),
    ("account set smtp_security=ssl", "none, starttls or tls"),
    ("account set smtp_security=", "smtp_security cannot be unset"),
    ("account set smtp_security=none smtp_username=ada", "no password goes over plain text"),
    ("account set template=", "template"),
    ("account set template=Hello", "a template needs {{reference}} in it"),
    ("account set confirmations_per_hour=x", "confirmations_per_hour is a number"),
    ("account set confirmations_per_hour=-1", "confirmations_per_hour"),
    ("account set confirmation_envelope_from='a b'", "confirmation_envelope_from is an address"),
    ("account set confirmation_envelope_from=x", "confirmation_envelope_from is an address"),
    ("account set smtp_password=pässwort", "smtp_password is ASCII"),
    ("account set trusted_forwarders=x", "trusted_forwarders are addresses"),
    ("--account nobody@x.example secret", "no account 'nobody@x.example'"),
    ("--account nobody@x.example tickets", "no account 'nobody@x.example'"),
]
SQLITE = re.compile(
    r"constraint|CHECK|NULL\b|STRICT|UNIQUE|email_account|column|datatype|cannot store")
# Wrong usage, and what the line names: the verb's usage, or the nearest verb, or both.
WRONG = [
    ("nonsense", "inbound --help"),
    ("tickest", "did you mean 'tickets'"),
    ("shwo T-0000-0000", "did you mean 'show'"),
    ("atachment 1 file", "did you mean 'attachment'"),
    ("outbox retyr 1", "did you mean 'outbox retry'"),
    ("secret nonsense", "'secret nonsense'"),
    ("rejected reply 1", "did you mean 'rejected replay'"),
    ("--nonsense tickets", "--nonsense"),
    ("tickets --nonsense", "--nonsense"),
    ("--db", "--db"),
    ("tickets extra", "'extra' is no status"),
    ("tickets open closed", "inbound tickets"),
    ("tickets --limit x", "inbound tickets"),
    ("tickets --limit -1", "inbound tickets"),
    ("show", "inbound show REF"),
    ("show a b", "inbound show REF"),
    ("show {} --last x", "inbound show REF"),
    ("reply", "inbound reply REF"),
    ("close", "inbound close REF"),
    ("reopen {} now", "inbound reopen REF"),
    ("attachment", "inbound attachment ID"),
    ("attachment 1 a b", "inbound attachment ID"),
    ("secret set", "inbound secret set VALUE"),
    ("secret rotate --keep soon", "inbound secret rotate"),
    ("outbox show", "inbound outbox show ID"),
    ("outbox retry", "inbound outbox retry ID"),
    ("rejected show", "inbound rejected show ID"),
    ("rejected delete", "inbound rejected delete ID"),
    ("account add", "inbound account add ADDRESS"),
    ("account set", "inbound account set KEY=VALUE"),
    ("account set nonsense", "inbound account set KEY=VALUE"),
    ("account set nonsense=1", "'nonsense' is no setting"),
    ("account set smtp_prot=25", "did you mean 'smtp_port'"),
    ("account set id=2", "'id' is no setting"),
    ("account set inbound_secret=0123456789abcdef", "'inbound_secret' is no setting"),
    ("show {} --limit 3", "--limit means nothing here: inbound show REF"),
    ("tickets --keep 1h", "--keep means nothing here: inbound tickets"),
    ("tickets --to ada@x.example", "--to means nothing here: inbound tickets"),
    ("close {} --account support@helpdesk.example", "--account means nothing here"),
    ("outbox --account support@helpdesk.example", "--account means nothing here"),
    ("attachment 1 --json", "--json means nothing here"),
    ("serve --json", "--json means nothing here: inbound serve"),
]


@pytest.mark.parametrize("line, words", FAILS)
def test_what_cannot_be_done_is_one_line_and_exit_1(filled, line, words):
    said = fails(filled, *shlex.split(line.format(filled.reference)), stdin="Hello")
    assert words.format() in said and not SQLITE.search(said)
    assert filled.sql("SELECT inbound_secret, address FROM email_account") == [
        (SECRET, "support@helpdesk.example")]
    assert (filled.count("ticket"), filled.count("outbox"), filled.count("rejected")) == (1, 1, 1)


@pytest.mark.parametrize("line, words", WRONG)
def test_wrong_usage_is_one_line_and_exit_2(filled, line, words):
    before = filled.dump()
    said = fails(filled, *shlex.split(line.format(filled.reference)), status=2)
    assert words in said
    assert filled.dump() == before


@pytest.mark.slow
def test_errors_go_to_standard_error_and_data_to_standard_output(filled, capfd):
    command = [sys.executable, inbound.__file__, "--db", str(filled.path)]
    good = subprocess.run([*command, "tickets"], capture_output=True, text=True)
    bad = subprocess.run([*command, "show", "T-0000-0000"], capture_output=True, text=True)
    assert (good.returncode, good.stderr) == (0, "") and filled.reference in good.stdout
    assert (bad.returncode, bad.stdout) == (1, "") and bad.stderr.startswith("inbound: ")


@pytest.mark.parametrize("line", [line for line, *_ in VERBS] + ["attachment 1"])
def test_only_serve_makes_a_database_any_other_verb_says_how_to_name_one(tmp_path, capsys, line):
    path = tmp_path / "none.db"
    argv = shlex.split(line.format("T-0000-0000"))
    assert inbound.main(["--db", str(path), *argv]) == 1
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"inbound: no database at \S*none\.db\S*: .*--db.*\n", err)
    assert [*tmp_path.iterdir()] == []


def test_an_empty_file_is_no_database_but_to_serve(tmp_path, clock, capsys):
    path = tmp_path / "none.db"
    path.touch()
    assert inbound.main(["--db", str(path), "tickets"]) == 1
    assert "no database at" in capsys.readouterr().err and path.read_bytes() == b""
    assert inbound.Store(str(path), clock).open()


def test_what_is_no_database_is_said_in_one_line(tmp_path, capsys):
    (tmp_path / "x.db").write_text("no database" * 500)
    assert inbound.main(["--db", str(tmp_path / "x.db"), "tickets"]) == 1
    assert re.fullmatch(r"inbound: .+\n", capsys.readouterr().err)


def test_db_account_and_json_stand_before_or_after_the_verb(filled, capsys):
    db, found = ["--db", str(filled.path)], []
    for argv in ([*db, "--json", "tickets"], ["tickets", *db, "--json"], ["--json", "tickets", *db],
                 [*db, "tickets", "--json"], ["--db", "none.db", "tickets", "--json", *db]):
        assert inbound.main(argv) == 0
        found.append(json.loads(capsys.readouterr().out)[0]["reference"])
    assert {*found} == {filled.reference}
    who = ["--account", "SUPPORT@helpdesk.example"]
    assert filled.run(*who, "secret") == filled.run("secret", *who) == SECRET + "\n"


def test_the_database_is_that_of_the_environment_unless_told(filled, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("INBOUND_DB", str(filled.path))
    assert inbound.main(["tickets"]) == 0 and filled.reference in capsys.readouterr().out
    assert inbound.main(["--db", str(tmp_path / "none.db"), "tickets"]) == 1
    monkeypatch.delenv("INBOUND_DB")
    monkeypatch.chdir(filled.path.parent)   # the desk's file is named inbound.db
    assert inbound.main(["tickets"]) == 0 and filled.reference in capsys.readouterr().out


# secret and account -------------------------------------------------------------------------------

def test_account_list_names_all_and_the_default_one_first(desk):
    desk.run("account", "add", "sales@helpdesk.example")
    desk.run("account", "set", "smtp_host=mail.x.example", "--account", "sales@helpdesk.example")
    assert printed(desk, "account", "list") == [
        {"address": "support@helpdesk.example", "display_name": "Support", "smtp_host": None},
        {"address": "sales@helpdesk.example", "display_name": "Support",
         "smtp_host": "mail.x.example"}]
    assert printed(desk, "account")["smtp_host"] is None


def test_account_set_prints_what_it_changed(desk):
    said = desk.run("account", "set", "display_name=The Desk", "smtp_port=2525", "validation_key=")
    assert said == "display_name=The Desk\nsmtp_port=2525\nvalidation_key=\n"
    said = desk.run("account", "set", "smtp_password=horse", "address=help@x.example")
    assert said == "smtp_password=(set)\naddress=help@x.example\n"


def test_secret_shows_sets_and_rotates(desk):
    assert desk.run("secret") == desk.run("secret", "show") == SECRET + "\n"
    assert "16" in fails(desk, "secret", "set", "x" * 15)
    assert desk.run("secret", "set", "x" * 16) == "x" * 16 + "\n"
    new = desk.run("secret", "rotate", "--keep", "90m").strip()
    assert len(new) >= 16 and new != "x" * 16
    assert desk.sql("SELECT inbound_secret, previous_secret, previous_secret_until"
                    " FROM email_account") == [(new, "x" * 16, desk.clock() + 5400)]


def test_each_account_has_a_secret_of_its_own(desk):
    desk.run("account", "add", "sales@helpdesk.example")
    sales = desk.run("secret", "--account", "sales@helpdesk.example").strip()
    assert len(sales) >= 16 and sales != SECRET
    assert desk.run("secret").strip() == SECRET
    fails(desk, "--account", "sales@helpdesk.example", "secret", "set", SECRET)


def test_account_sets_several_keys_at_once_or_none(desk):
    settings = ["address=help@x.example", "display_name=Help, Desk", "queue=Repairs",
                "smtp_host=mail.x.example", "smtp_port=2525", "smtp_security=starttls",
                "smtp_username=ada", "smtp_password=a=b c", "template=Hello {reference}",
                "validation_key=key-1"]
    shown = printed(desk, "account", "set", *settings)
    expected = dict(setting.split("=", 1) for setting in settings)
    assert shown == expected | {"smtp_password": "(set)", "smtp_port": 2525}
    assert desk.sql("SELECT smtp_password FROM email_account") == [("a=b c",)]
    everything = printed(desk, "account")
    assert everything == everything | shown
    fails(desk, "account", "set", "display_name=No", "smtp_port=0")
    assert printed(desk, "account") == everything
    assert printed(desk, "account", "set", "smtp_host=")["smtp_host"] is None


def test_account_set_is_in_force_for_the_next_mail(desk):
    desk.run("account", "set", "queue=Repairs", "template=Your number is {reference}.")
    answer = desk.post(desk.mail())
    assert desk.show(answer["ticket"])["queue"] == "Repairs"
    assert mail_of(desk).get_content().strip() == f"Your number is {answer['ticket']}."


def test_no_account_command_prints_a_secret_or_a_password(desk):
    desk.run("account", "set", "smtp_password=hunter2")
    for argv in (["account"], ["account", "--json"], ["account", "set", "display_name=x"]):
        out = desk.run(*argv)
        assert SECRET not in out and "hunter2" not in out


# reply, close and reopen --------------------------------------------------------------------------

def test_a_reply_goes_to_the_requester_or_to_whom_it_is_told(filled):
    said = filled.run("reply", filled.reference, "--to", "bob@partner.example", stdin="Hello")
    assert "to=bob@partner.example\n" in said and mail_of(filled)["To"] == "bob@partner.example"
    assert filled.sql("SELECT recipient FROM outbox") == [
        ("ada@customer.example",), ("bob@partner.example",)]


def test_a_reply_warns_when_another_wrote_last(filled, capsys):
    assert "wrote last" not in filled.run("reply", filled.reference, stdin="Hello")
    filled.post(filled.mail(**{
        "from": "mallory@evil.example", "message_id": "<2@x>", "in_reply_to": FIRST}))
    said = filled.run("reply", filled.reference, stdin="Hello")
    assert "inbound: mallory@evil.example wrote last, this goes to ada@customer.example\n" in said
    assert mail_of(filled)["To"] == "ada@customer.example"
    said = filled.run("reply", filled.reference, "--to", "mallory@evil.example", stdin="Hello")
    assert "wrote last" not in said and mail_of(filled)["To"] == "mallory@evil.example"


def test_a_reply_goes_out_where_the_mail_that_it_answers_was_deleted(filled):
    filled.execute("DELETE FROM message WHERE direction = 'in'")
    assert "to=ada@customer.example" in filled.run("reply", filled.reference, stdin="Hello")


def test_a_reply_threads_and_goes_through_the_outbox(filled):
    shown = printed(filled, "reply", filled.reference, stdin="Which printer?\nGrüße\n")
    mail = mail_of(filled)
    assert mail["In-Reply-To"] == FIRST and mail["References"].split()[-1] == FIRST
    assert mail["Subject"] == f"[{filled.reference}] Re: Printer on fire"
    assert mail["To"] == "ada@customer.example"
    assert "support@helpdesk.example" in mail["From"]
    assert mail["Auto-Submitted"] is None and mail["Precedence"] is None
    assert mail.get_content().splitlines() == ["Which printer?", "Grüße"]
    assert mail["Message-ID"] in json.dumps(shown)
    last = filled.show(filled.reference)["messages"][-1]
    assert (last["direction"], last["message_id"], last["in_reply_to"]) == (
        "out", mail["Message-ID"], FIRST)
    assert [row["state"] for row in printed(filled, "outbox")] == ["queued", "queued"]


def test_a_reply_names_the_last_message_and_its_line_of_ancestors(filled):
    filled.post(filled.mail(message_id="<2@x>", in_reply_to=FIRST, references=FIRST, text="Two."))
    filled.run("reply", filled.reference.lower(), stdin="Hello")
    mail = mail_of(filled)
    assert (mail["In-Reply-To"], mail["References"].split()) == ("<2@x>", [FIRST, "<2@x>"])


@pytest.mark.parametrize("subject", ["Re: Printer", "RE: re: Printer", "Printer"])
def test_a_reply_has_one_re(desk, subject):
    reference = desk.post(desk.mail(subject=subject))["ticket"]
    desk.run("reply", reference, stdin="Hello")
    assert mail_of(desk)["Subject"] == f"[{reference}] Re: Printer"


HOSTILE = [
    "=?utf-8?q?a=0D=0ABcc:_eve@y.example?=",
    "=?utf-8?q?=3D=3Futf-8=3Fq=3Fa=3D0D=3D0ABcc:_eve=40y.example=3F=3D?=",
    "=?utf-8?b?PT91dGYtOD9xP2E9MEQ9MEFCY2M6X2V2ZT89?=",
    "a\r\nBcc: eve@y.example\r\n\r\nbody",
    "a\nBcc: eve@y.example", "a\x0bBcc: eve@y.example", "a\u2028Bcc: eve@y.example",
    "a\x85Bcc: eve@y.example", "x" * 5000, "ä" * 5000, "日本語 " * 500, "=?" * 500,
    "\x1b]0;x\x07",
]


@pytest.mark.parametrize("subject", HOSTILE)
def test_a_hostile_subject_stays_one_header(desk, subject):
    reference = desk.post(desk.mail(subject=subject))["ticket"]
    desk.run("reply", reference, stdin="Hello")
    [(content,)] = desk.sql("SELECT content FROM outbox ORDER BY id DESC LIMIT 1")
    head = content.partition(b"\r\n\r\n")[0]
    names = re.findall(rb"^([^\s:]+):", head, re.M)
    assert len(names) == len({*names}) and b"Bcc" not in names and content.isascii()
    mail = mail_of(desk)
    assert mail["Subject"].startswith(f"[{reference}] Re: ") and mail["Bcc"] is None
    assert "\n" not in mail["Subject"] and mail.get_content().strip() == "Hello"


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_an_empty_reply_is_not_sent(filled, text):
    fails(filled, "reply", filled.reference, stdin=text)
    assert filled.count("outbox") == 1


@pytest.mark.parametrize("text", ["x" * 5000, ".\n..\n", "From ada\n", "a\r\nb\rc\n",
                                  "日本\n" * 100])
def test_any_text_of_a_reply_arrives_as_it_was_written(filled, text):
    filled.run("reply", filled.reference, stdin=text)
    content = mail_of(filled).get_content()
    assert content.split() == text.split()


def test_nobody_can_reply_to_a_mailer_daemon(desk):
    reference = desk.post("Subject: x\nMessage-ID: <1@x>\n\nx\n", "message/rfc822")["ticket"]
    fails(desk, "reply", reference, stdin="Hello")
    assert desk.count("outbox") == 0


def test_close_closes(filled):
    filled.clock.advance(5)
    filled.run("close", filled.reference)
    assert filled.sql("SELECT status, updated_at FROM ticket") == [("closed", filled.clock())]
    assert filled.count("inbox") == 0


def test_reopen_opens(filled):
    filled.run("close", filled.reference)
    filled.clock.advance(5)
    filled.run("reopen", filled.reference.lower())
    assert filled.sql("SELECT status, updated_at FROM ticket") == [("open", filled.clock())]
    assert filled.count("inbox") == 1


# outbox and rejected ------------------------------------------------------------------------------

def test_outbox_show_prints_the_mail_as_it_is(filled):
    [(content,)] = filled.sql("SELECT content FROM outbox")
    assert filled.run("outbox", "show", "1").strip() == (
        content.decode().replace("\r\n", "\n").strip())


def test_outbox_retry_makes_a_row_due_now(filled):
    filled.execute("UPDATE outbox SET state = 'failed', next_attempt_at = NULL, last_error = 'x'")
    filled.clock.advance(3600)
    filled.run("outbox", "retry", "1")
    [row] = printed(filled, "outbox")
    assert (row["state"], row["next_attempt_at"]) == ("queued", filled.clock())
    filled.execute("UPDATE outbox SET state = 'sent', next_attempt_at = NULL")
    fails(filled, "outbox", "retry", "1")


def test_outbox_retry_all_makes_what_failed_due_and_nothing_else(filled):
    for number in range(3):
        filled.post(filled.mail(message_id=f"<{number}@x>", **{"from": f"n{number}@x.example"}))
    for identifier, state in enumerate(["failed", "sent", "failed", "queued"], 1):
        due = filled.clock() + 99 if state == "queued" else None
        filled.execute("UPDATE outbox SET state = ?, next_attempt_at = ?, last_error = 'x'"
                       " WHERE id = ?", state, due, identifier)
    filled.clock.advance(7)
    assert printed(filled, "outbox", "retry", "all") == [
        {"id": 1, "state": "queued"}, {"id": 3, "state": "queued"}]
    assert [(row["state"], row["next_attempt_at"]) for row in printed(filled, "outbox")] == [
        ("queued", filled.clock()), ("sent", None), ("queued", filled.clock()),
        ("queued", filled.clock() + 92)]


def test_rejected_replay_says_why_and_keeps_what_is_still_refused(filled):
    [result] = printed(filled, "rejected", "replay")
    assert result["id"] == 1 and result["reason"]
    assert filled.count("rejected") == 1 and filled.count("ticket") == 1


def test_rejected_replay_files_what_can_be_read_now(desk, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("not today")

    with monkeypatch.context() as patch:
        patch.setattr(inbound, "html_to_text", broken)
        answer = desk.post(desk.mail(text=None, html="<p>x</p>"))
    assert answer["status"] == "quarantined" and desk.count("ticket") == 0
    assert "not today" in printed(desk, "rejected")[0]["reason"]
    [result] = printed(desk, "rejected", "replay", "1")
    assert result["status"] == "created"
    assert (desk.count("ticket"), desk.count("rejected")) == (1, 0)


def test_rejected_replay_never_changes_when_a_post_was_received(desk, monkeypatch):
    noon = desk.clock()
    with monkeypatch.context() as patch:
        patch.setattr(inbound, "html_to_text", None)
        assert desk.post(desk.mail(text=None, html="<p>x</p>"))["status"] == "quarantined"
        desk.clock.advance(3600)
        assert printed(desk, "rejected", "replay")[0]["status"] == "quarantined"
        assert printed(desk, "rejected")[0]["received_at"] == noon
    desk.clock.advance(3600)
    [result] = printed(desk, "rejected", "replay")
    assert desk.show(result["ticket"])["messages"][0]["received_at"] == noon


@pytest.mark.parametrize("meanwhile", ["before", "after"])
def test_rejected_replay_goes_on_when_a_row_vanishes_meanwhile(filled, monkeypatch, meanwhile):
    for number in range(3):
        filled.post({"absender": "ada@customer.example", "mid": f"<{number}@x>"}, status=422)
    filled.execute("INSERT INTO provider VALUES ('Ours', ?)",
                   '{"from": "absender", "message_id": "mid"}')
    receive, done = inbound.receive, []

    def racing(*args):
        done.append(args)
        if len(done) == 2:          # the second row is in work, the third is to come
            filled.execute("DELETE FROM rejected WHERE id = ?", 4 if meanwhile == "before" else 2)
        return receive(*args)

    monkeypatch.setattr(inbound, "receive", racing)
    found = {row["id"]: row["status"] for row in printed(filled, "rejected", "replay")}
    assert found == {1: "refused", 2: "created", 3: "created",
                     4: "refused" if meanwhile == "before" else "created"}


def test_rejected_replay_reads_a_post_by_the_content_type_that_it_came_with_last(desk):
    desk.post({"absender": "ada@customer.example", "mid": "<1@x>"}, "text/html", status=415)
    desk.post({"absender": "ada@customer.example", "mid": "<1@x>"}, status=422)
    desk.execute("INSERT INTO provider VALUES ('Ours', ?)",
                 '{"from": "absender", "message_id": "mid"}')
    assert printed(desk, "rejected", "replay")[0]["status"] == "created"


def test_rejected_show_and_delete(filled):
    assert '{"text": "no sender"}' in filled.run("rejected", "show", "1")
    assert printed(filled, "rejected", "show", "1")["body"] == '{"text": "no sender"}'
    filled.run("rejected", "delete", "1")
    assert filled.count("rejected") == 0
    fails(filled, "rejected", "delete", "1")


# What is printed ----------------------------------------------------------------------------------

ESCAPES = "\x1b]0;pwned\x07 \x1b[31mred\x1b[0m \x9b2J \x08\x08 \x7f \x85"


def test_no_mail_drives_a_terminal(desk):
    hostile = {"subject": ESCAPES, "text": ESCAPES, "from": f"{ESCAPES} <ada@customer.example>",
               "attachments": [{"filename": ESCAPES, "content_type": ESCAPES, "content": "!"}]}
    reference = desk.post(desk.mail(**hostile))["ticket"]
    desk.request(ESCAPES.encode("utf-8"), "text/plain")
    desk.request({"from": ESCAPES, "message_id": "<1@x>"})
    desk.execute("UPDATE outbox SET last_error = ?", ESCAPES)
    for line in ("tickets", f"show {reference}", "outbox", "rejected", "outbox show 1",
                 "rejected show 1", "rejected show 2", "account"):
        for more in ([], ["--json"]):
            out = desk.run(*line.split(), *more)
            assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f]", out), (line, more, out)


def test_text_with_crlf_is_printed_as_lines(desk):
    reference = desk.post(desk.mail(text="one\r\ntwo\r\n"))["ticket"]
    out = desk.run("show", reference)
    assert "one\ntwo" in out and "\N{REPLACEMENT CHARACTER}" not in out
    assert desk.show(reference)["messages"][0]["text"] == "one\r\ntwo\r\n"


@pytest.mark.slow
def test_tickets_piped_into_head_ends_without_a_traceback(desk):
    desk.post(desk.mail())
    desk.execute("""WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000)
        INSERT INTO ticket (reference, queue, email_account, subject, requester, requester_name,
            created_at, updated_at)
        SELECT printf('T-0000-%04d', i), 1, 1, printf('%.200c', 'x'), 'a@x', '', i, i FROM n""")
    command = shlex.join([sys.executable, inbound.__file__, "--db", str(desk.path), "tickets"])
    for more in ("", " --json"):
        script = f"{command}{more} | head -1; exit ${{PIPESTATUS[0]}}"
        result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.count("\n") == 1


@pytest.mark.slow
def test_words_outside_ascii_are_printed_whatever_the_locale(desk):
    reference = desk.post(desk.mail(subject="Größe: 50 € 日本", text="Grüße"))["ticket"]
    for environment in ({"LC_ALL": "C"}, {"LC_ALL": "C.UTF-8"}, {"PYTHONIOENCODING": "ascii"},
                        {"PYTHONIOENCODING": "latin-1"}):
        result = subprocess.run(
            [sys.executable, inbound.__file__, "--db", str(desk.path), "show", reference],
            capture_output=True, env={"PATH": "/usr/bin:/bin"} | environment)
        assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("line, status", [
    ("tickets >&-", 0), ("backup {}.copy >&- 2>&-", 0), ("backup {}.copy 2>&-", 0),
    ("attachment 1 >&-", 0), ("reply {ticket} <&-", 1), ("relay http://127.0.0.1:1/ <&-", 75)])
def test_a_stream_that_is_closed_is_an_empty_one(filled, line, status):
    line = line.format(shlex.quote(str(filled.path)), ticket=filled.reference)
    command = shlex.join([sys.executable, inbound.__file__, "--db", str(filled.path)])
    result = subprocess.run(["bash", "-c", f"{command} {line}"], capture_output=True, text=True)
    assert (result.returncode, "Traceback" in result.stderr) == (status, False)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["72M", "", "-1"])
def test_a_limit_that_is_no_number_of_bytes_is_one_line_and_exit_1(desk, size):
    result = subprocess.run(
        [sys.executable, inbound.__file__, "--db", str(desk.path), "tickets"],
        capture_output=True, text=True, env={"INBOUND_MAX_BODY": size})
    assert result.returncode == 1
    assert re.fullmatch("inbound: .*INBOUND_MAX_BODY.*bytes.*\n", result.stderr)


def test_account_set_that_is_refused_makes_no_queue(desk):
    desk.run("account", "set", "queue=New", "smtp_port=0", status=1)
    desk.run("account", "set", "queue=New", "staff=nobody", status=1)
    assert desk.sql("SELECT name FROM queue ORDER BY name") == [("Automatic",), ("Support",)]


def test_show_reads_nothing_after_the_file_is_closed(desk, monkeypatch):
    reference = desk.post(desk.mail())["ticket"]
    closed, close, connect = [], inbound.Store.close, inbound.Store._connect
    monkeypatch.setattr(inbound.Store, "close", lambda store: closed.append(store) or close(store))

    def connect_once(store):
        assert store not in closed
        return connect(store)

    monkeypatch.setattr(inbound.Store, "_connect", connect_once)
    assert "It burns." in desk.run("show", reference)
    assert len(closed) == 1


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_long_ticket_is_shown_in_little_memory(desk, flags):
    reference = desk.post(desk.mail())["ticket"]
    peaks = []
    for messages in (20, 1000):
        desk.store.write(lambda db, now, count=messages: db.execute("""
            WITH RECURSIVE counted(n) AS (
                SELECT 1 UNION ALL SELECT n + 1 FROM counted WHERE n < ?)
            INSERT INTO message SELECT NULL, ticket, email_account, direction, message_id || n,
                digest, in_reply_to, "references", from_address, from_name, envelope_from, "to", cc,
                subject, hex(zeroblob(50000)), html, headers, kind, reason, confirmation, notes,
                received_at
            FROM counted JOIN message ON message.id = 1""", [count]))
        script = ("import inbound, re, sys; inbound.main(); "
                  "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])")
        shown = subprocess.run(
            [sys.executable, "-c", script, "--db", str(desk.path), "show", reference, *flags],
            capture_output=True, text=True, check=True, cwd=Path(inbound.__file__).parent).stdout
        body, _, peak = shown.rstrip().rpartition("\n")
        assert shown.count("0" * 100_000) == messages
        assert not flags or len(json.loads(body)["messages"]) == desk.count("message")
        peaks.append(int(peak))
        desk.store.write(lambda db, now: db.execute("DELETE FROM message WHERE id > 2"))
    assert peaks[1] < peaks[0] + 10_000, peaks      # KB
