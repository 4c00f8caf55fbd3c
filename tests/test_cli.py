"""The command line: SPEC 6. Exit codes, one line for an error, JSON with --json, safe to print."""

import email
import email.policy
import json
import re
import shlex
import subprocess
import sys

import inbound
import pytest
from conftest import SECRET

FIRST = "<first@customer.example>"
MESSAGE_KEYS = {
    "direction", "message_id", "in_reply_to", "references", "from", "from_name", "envelope_from",
    "to", "cc", "subject", "text", "html", "headers", "kind", "reason", "confirmation",
    "attachments", "notes", "received_at"}
TICKET_KEYS = {"reference", "queue", "status", "subject", "requester", "messages", "created_at",
               "updated_at"}


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

# Each verb of --help, {} = the reference; and a word that it prints.
VERBS = [
    ("secret", SECRET),
    ("secret show", SECRET),
    ("secret set another-secret-0123456789", "another-secret-0123456789"),
    ("secret rotate", ""),
    ("secret rotate --keep 1h", ""),
    ("account", "support@helpdesk.example"),
    ("account show", "support@helpdesk.example"),
    ("account add sales@helpdesk.example", "sales@helpdesk.example"),
    ("account set display_name=Help", "Help"),
    ("tickets", "Printer on fire"),
    ("show {}", "It burns."),
    ("reply {}", ""),
    ("close {}", ""),
    ("outbox", "queued"),
    ("outbox list", "queued"),
    ("outbox show 1", "ada@customer.example"),
    ("outbox send", ""),
    ("outbox retry 1", ""),
    ("rejected", "422"),
    ("rejected list", "422"),
    ("rejected show 1", "no sender"),
    ("rejected replay", ""),
    ("rejected replay 1", ""),
    ("rejected delete 1", ""),
]


@pytest.mark.parametrize("line, word", VERBS)
def test_every_verb_prints_words_or_json(filled, line, word):
    argv = shlex.split(line.format(filled.reference))
    out = filled.run(*argv, stdin="Hello")
    assert word in out and not out.startswith("inbound:")


@pytest.mark.parametrize("line, word", VERBS)
def test_every_verb_has_json(filled, line, word):
    argv = shlex.split(line.format(filled.reference))
    out = filled.run(*argv, "--json", stdin="Hello")
    assert isinstance(json.loads(out), (dict, list)) and word in out


def test_every_verb_of_the_table_is_in_the_help():
    verbs = {line.split()[0] for line, _ in VERBS} | {"serve"}
    assert verbs <= {*re.findall(r"^  ([a-z]+)\b", inbound.__doc__, re.M)}


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_docstring_wherever_it_is_asked_for(desk, flag):
    for argv in ([flag], ["tickets", flag], ["nonsense", flag]):
        assert desk.run(*argv) == inbound.__doc__.strip() + "\n"


def test_without_a_verb_it_prints_the_help_and_exits_2(capsys):
    assert inbound.main([]) == 2
    assert "serve" in "".join(capsys.readouterr())


# Keys of the JSON ---------------------------------------------------------------------------------

def test_show_prints_the_keys_that_are_promised(filled):
    shown = printed(filled, "show", filled.reference)
    assert shown.keys() == {"reference", "queue", "status", "subject", "requester", "messages"}
    for message in shown["messages"]:
        assert message.keys() == MESSAGE_KEYS
        lists = ("references", "to", "cc", "headers", "notes", "attachments")
        assert all(isinstance(message[name], list) for name in lists)
    [file] = shown["messages"][0]["attachments"]
    assert file.keys() == {"filename", "content_type", "content_id", "size", "sha256", "note"}


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


def test_tickets_are_listed_newest_first_with_the_keys_that_are_promised(filled):
    filled.clock.advance(60)
    second = filled.post(filled.mail(message_id="<2@x>", text="Two."))["ticket"]
    filled.run("close", second)
    rows = printed(filled, "tickets")
    assert [row["reference"] for row in rows] == [second, filled.reference]
    assert all(row.keys() == TICKET_KEYS for row in rows)
    assert [row["status"] for row in rows] == ["closed", "open"]
    assert rows[1] == {
        "reference": filled.reference, "queue": "Support", "status": "open", "messages": 2,
        "subject": "Printer on fire", "requester": "ada@customer.example",
        "created_at": filled.clock() - 60, "updated_at": filled.clock() - 60}


def test_the_outbox_is_listed_with_the_keys_that_are_promised(filled):
    assert printed(filled, "outbox", "list") == [{
        "id": 1, "ticket": filled.reference, "to": "ada@customer.example", "state": "queued",
        "attempts": 0, "next_attempt_at": filled.clock(), "last_error": ""}]


def test_rejected_posts_are_listed_with_the_keys_that_are_promised(filled):
    [row] = printed(filled, "rejected", "list")
    assert row.pop("reason")
    assert row == {"id": 1, "received_at": filled.clock(), "status": 422,
                   "content_type": "application/json", "size": len('{"text": "no sender"}')}


@pytest.mark.parametrize("argv", [["tickets"], ["outbox"], ["rejected"], ["rejected", "replay"]])
def test_an_empty_list_is_an_empty_list(desk, argv):
    assert printed(desk, *argv) == []
    assert desk.run(*argv).strip() == ""


# Errors and usage ---------------------------------------------------------------------------------

FAILS = ["show T-0000-0000", "show x", "reply T-0000-0000", "close T-0000-0000", "outbox show 99",
         "outbox retry 99", "rejected show 99", "rejected replay 99", "rejected delete 99",
         "secret set short", "account add support@helpdesk.example",
         "account add nonsense", "account add 'a b@x.example'", "account set smtp_port=0",
         "account set smtp_security=ssl", "account set address=", "account set queue=",
         "--account nobody@x.example secret"]
WRONG = ["nonsense", "--nonsense tickets", "tickets extra", "tickets --nonsense", "show", "reply",
         "close", "secret nonsense", "secret set", "secret rotate --keep soon", "outbox show",
         "outbox retry", "rejected show", "rejected delete", "outbox nonsense",
         "account add", "account set", "account set nonsense", "account set nonsense=1",
         "account set id=2", "account set inbound_secret=0123456789abcdef", "--db", "show a b"]


@pytest.mark.parametrize("line", FAILS)
def test_what_cannot_be_done_is_one_line_and_exit_1(filled, line):
    fails(filled, *shlex.split(line), stdin="Hello")
    assert filled.sql("SELECT inbound_secret, address FROM email_account") == [
        (SECRET, "support@helpdesk.example")]
    assert (filled.count("ticket"), filled.count("outbox"), filled.count("rejected")) == (1, 1, 1)


@pytest.mark.parametrize("line", WRONG)
def test_wrong_usage_is_one_line_and_exit_2(filled, line):
    fails(filled, *shlex.split(line), status=2)
    assert (filled.count("email_account"), filled.count("rejected")) == (1, 1)


def test_errors_go_to_standard_error_and_data_to_standard_output(filled, capfd):
    command = [sys.executable, inbound.__file__, "--db", str(filled.path)]
    good = subprocess.run([*command, "tickets"], capture_output=True, text=True)
    bad = subprocess.run([*command, "show", "T-0000-0000"], capture_output=True, text=True)
    assert (good.returncode, good.stderr) == (0, "") and filled.reference in good.stdout
    assert (bad.returncode, bad.stdout) == (1, "") and bad.stderr.startswith("inbound: ")


@pytest.mark.parametrize("argv", [["tickets"], ["show", "T-0000-0000"], ["outbox"], ["rejected"]])
def test_a_missing_database_is_said_in_one_line_and_not_made(tmp_path, capsys, argv):
    path = tmp_path / "none.db"
    assert inbound.main(["--db", str(path), *argv]) == 1
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"inbound: .*none\.db.*\n", err) and not path.exists()


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
    assert {name: str(shown[name]) for name in expected} == expected | {"smtp_password": "(set)"}
    assert desk.sql("SELECT smtp_password FROM email_account") == [("a=b c",)]
    assert printed(desk, "account") == shown
    fails(desk, "account", "set", "display_name=No", "smtp_port=0")
    assert printed(desk, "account") == shown
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


# reply and close ----------------------------------------------------------------------------------

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


def test_words_outside_ascii_are_printed_whatever_the_locale(desk):
    reference = desk.post(desk.mail(subject="Größe: 50 € 日本", text="Grüße"))["ticket"]
    for environment in ({"LC_ALL": "C"}, {"LC_ALL": "C.UTF-8"}, {"PYTHONIOENCODING": "ascii"},
                        {"PYTHONIOENCODING": "latin-1"}):
        result = subprocess.run(
            [sys.executable, inbound.__file__, "--db", str(desk.path), "show", reference],
            capture_output=True, env={"PATH": "/usr/bin:/bin"} | environment)
        assert result.returncode == 0, result.stderr
