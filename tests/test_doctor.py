"""The verbs for a bad day: doctor, backup, forget; and what they have to know for it."""

import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
import urllib.request

import pytest

import inbound
from conftest import LONG, NOON, SECRET, URL, eventually, mail_from

ADA, BOB = "ada@customer.example", "bob@elsewhere.example"


@pytest.fixture
def ready(desk, sink):
    """A desk that lacks nothing: a relay that answers, and a file that is its owner's alone."""
    desk.set_account(smtp_host="127.0.0.1", smtp_port=sink.port, smtp_security="none")
    os.chmod(desk.path, 0o600)
    return desk


def checks(desk, *argv, status):
    """What `doctor` prints: {check: words}, of those that failed; the exit code is asserted."""
    rows = json.loads(desk.run("doctor", "--json", *argv, status=status))
    assert len(rows) > 5
    return {row["check"]: row["words"] for row in rows if not row["is_ok"]}


def failed(desk, *argv):
    found = checks(desk, *argv, status=1)
    assert all(len(words) > 10 for words in found.values())
    return found


def test_a_desk_that_lacks_nothing_is_ok_line_by_line(ready):
    assert checks(ready, status=0) == {}
    lines = ready.run("doctor").splitlines()
    assert len(lines) > 5 and all(line.startswith("ok ") for line in lines)
    assert any(sqlite3.sqlite_version in line for line in lines)


# (statement that breaks something, a word of the check, a word of what to do)
BROKEN = [
    ("UPDATE email_account SET inbound_secret = NULL", "secret", "inbound secret"),
    ("UPDATE email_account SET inbound_secret = 'aaaaaaaaaaaaaaaa'", "secret", "inbound secret"),
    ("UPDATE email_account SET address = 'support@localhost'", "", "inbound account set"),
    ("UPDATE email_account SET smtp_host = NULL", "", "inbound account set"),
    ("UPDATE email_account SET smtp_port = 1", "relay", "inbound account set"),
    ("UPDATE email_account SET smtp_host = 'no-such-host.invalid'", "relay", "inbound account"),
    ("UPDATE outbox SET state = 'failed', next_attempt_at = NULL, last_error = 'x'", "", "outbox"),
    (f"UPDATE outbox SET created_at = {NOON - 3601}", "", "inbound outbox"),
    ("INSERT INTO rejected (received_at, status, reason, content_type, body, body_sha256)"
     " VALUES (1, 400, 'x', 'x', x'00', 'x')", "", "inbound rejected"),
    (f"UPDATE message SET received_at = {NOON + 7200}", "clock", "clock"),
    ("INSERT INTO provider (name, fields) VALUES ('Ours', '{\"from\": \"a\"}')", "Ours",
     "message_id"),
    ("ALTER TABLE attachment RENAME TO gone", "", "attachment"),
]


@pytest.mark.parametrize("statement, check, words", BROKEN, ids=[row[0][:60] for row in BROKEN])
def test_what_is_broken_is_a_fail_that_says_what_to_do(ready, statement, check, words):
    ready.post(ready.mail())
    ready.execute(statement)
    found = failed(ready)
    assert any(check in name and words in what for name, what in found.items()), found
    text = ready.run("doctor", status=1)
    assert sum(line.startswith("FAIL") for line in text.splitlines()) == len(found)


@pytest.mark.parametrize("setting", [
    "inbound_secret = NULL", "smtp_host = NULL", "smtp_host = 'no-such-host.invalid'"])
def test_what_to_do_names_the_account_that_it_is_to_be_done_to(ready, setting):
    ready.run("account", "add", "sales@helpdesk.example")
    ready.execute("UPDATE email_account SET smtp_host = 'localhost', smtp_port = 1")
    ready.execute(f"UPDATE email_account SET {setting} WHERE NOT is_default")
    told = [words for words in re.findall("`inbound [^`]*`", ready.run("doctor", status=1))
            if "sales@" in words]
    assert told and all("--account sales@helpdesk.example" in words for words in told)


@pytest.mark.parametrize("name", ["inbound.db", "inbound.db-wal", "inbound.db.copy"])
def test_a_file_that_others_may_read_is_a_fail(ready, name):
    ready.post(ready.mail())
    file = ready.path.with_name(name)
    ready.path.with_name("inbound.db.link").symlink_to("nowhere")
    file.touch()
    file.chmod(0o644)
    assert any(name in check and "chmod" in words for check, words in failed(ready).items())


def test_a_relay_that_refuses_the_log_in_is_a_fail(ready):
    ready.set_account(smtp_security="starttls", smtp_username="ada", smtp_password="hunter2")
    found = failed(ready)
    assert any("relay" in check for check in found)
    assert "hunter2" not in json.dumps(found)


def test_callers_with_a_wrong_secret_are_told_with_their_addresses(ready):
    for client, posts in (("203.0.113.7", 3), ("203.0.113.9", 1)):
        for _ in range(posts):
            ready.app.post(URL, b"{}", headers={"X-Mobieus-Inbound-Secret": "w" * 20},
                           extra_environ={"REMOTE_ADDR": client}, expect_errors=True)
    inbound.write_counts(ready.store)
    found = failed(ready)
    [words] = [what for name, what in found.items() if "203.0.113.7" in name]
    assert "3" in words
    ready.clock.advance(2 * 3600)
    assert checks(ready, status=0) == {}


def test_refused_callers_are_counted_once_the_file_can_be_written_again(ready, impatient):
    ready.app.post(URL, b"{}", headers={"X-Mobieus-Inbound-Secret": "w" * 20},
                   extra_environ={"REMOTE_ADDR": "203.0.113.7"}, expect_errors=True)
    with ready.locked(), pytest.raises(inbound.Refused):
        inbound.write_counts(ready.store)
    assert ready.count("refused_caller") == 0
    for _ in range(2):
        inbound.write_counts(ready.store)
    assert ready.sql("SELECT client, posts FROM refused_caller") == [("203.0.113.7", 1)]


def test_a_flood_of_refused_callers_leaves_a_bounded_table(ready):
    for number in range(1500):
        ready.store.uncounted.append((ready.clock(), f"10.0.{number // 250}.{number % 250}"))
    inbound.write_counts(ready.store)
    assert 0 < ready.count("refused_caller") <= 1000


def test_a_rotated_secret_that_is_still_in_use_is_told_until_it_ends(ready):
    ready.run("secret", "rotate", "--keep", "2h")
    assert checks(ready, status=0) == {}
    ready.clock.advance(600)
    ready.post(ready.mail(), headers={"X-Mobieus-Inbound-Secret": SECRET})
    inbound.write_counts(ready.store)
    assert ready.sql("SELECT previous_secret_used_at FROM email_account") == [(NOON + 600,)]
    assert any("previous secret" in name for name in failed(ready))
    ready.clock.advance(7200)
    assert not any("previous secret" in name for name in checks(ready, status=1))


@pytest.mark.parametrize("another", [("set", "another-secret-0123456789"), ("rotate",)])
def test_a_rotated_secret_is_not_in_use_once_another_is_set(ready, another):
    ready.run("secret", "rotate", "--keep", "2h")
    ready.post(ready.mail(), headers={"X-Mobieus-Inbound-Secret": SECRET})
    inbound.write_counts(ready.store)
    assert any("previous secret" in name for name in failed(ready))
    ready.run("secret", *another)
    assert checks(ready, status=0) == {}


@pytest.mark.slow
def test_the_url_is_tried_as_providers_see_it(serve, file):
    served = serve()
    url = f"http://127.0.0.1:{served.port}"
    found = tries(file, url + URL)
    assert len(found) == 4 and all(row["is_ok"] for row in found), found
    found = tries(file, url + "/elsewhere")
    assert not any(row["is_ok"] for row in found)
    # It leaves nothing that the next doctor would complain of.
    assert file.count("ticket") == file.count("rejected") == 0
    with urllib.request.urlopen(f"{url}/healthz") as answer:
        assert "wrong secret" not in answer.read().decode()


def tries(file, url):
    out = file.path.with_name("doctor.json")
    with open(out, "w") as stream, contextlib.redirect_stdout(stream), \
            contextlib.suppress(SystemExit):
        inbound.main(["--db", str(file.path), "doctor", "--json", "--url", url])
    return [row for row in json.loads(out.read_text()) if url in row["check"]]


@pytest.mark.slow
def test_without_an_account_everything_says_so(ready):
    ready.store.write(lambda db, now: db.execute("DELETE FROM email_account"))
    assert ready.request(ready.mail()).status_int == 503
    status, health = ready.health()
    assert status == 503 and "inbound account add" in str(health)
    for verb in (["doctor"], ["doctor", "--url", "http://localhost:1"], ["import", __file__]):
        assert "inbound account add" in ready.run(*verb, status=1), verb
    ended = subprocess.run([sys.executable, inbound.__file__, "--db", str(ready.path), "serve",
                            "--listen", "127.0.0.1:0"], capture_output=True, timeout=LONG)
    assert ended.returncode == 1 and b"inbound account add" in ended.stderr
    assert b"Traceback" not in ended.stderr
    ready.run("account", "add", "help@x.example")
    assert ready.health()[0] == 200


# backup -------------------------------------------------------------------------------------------

def test_a_backup_is_whole_its_owner_s_alone_and_serves(ready, folder):
    reference = ready.post(ready.mail())["ticket"]
    copy = folder / "copy.db"
    (folder / "copy.db.part").touch(0o644)      # somebody else's, who would read it
    assert "1" in ready.run("backup", str(copy)) or copy.exists()
    assert copy.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in folder.glob("copy.db*")) == ["copy.db"]
    ready.post(ready.mail(message_id="<later@customer.example>"))
    restored = inbound.Store(str(copy), ready.clock)
    with contextlib.closing(restored):
        assert restored.open(create=False) is False
        assert [row["reference"] for row in restored.rows("SELECT * FROM ticket")] == [reference]
        assert restored.accounts() == ready.store.accounts()
        restored.write(inbound.rehearse)
        assert restored.rows("PRAGMA journal_mode") == [{"journal_mode": "wal"}]


def test_a_newer_backup_takes_the_place_of_the_older(ready, folder):
    copy = folder / "copy.db"
    copy.write_bytes(b"older")
    ready.post(ready.mail())
    ready.run("backup", str(copy))
    with contextlib.closing(sqlite3.connect(copy)) as db:
        assert db.execute("SELECT count(*) FROM ticket").fetchone() == (1,)


@pytest.mark.parametrize("target", [
    "inbound.db", "inbound.db-wal", "no-such-folder/copy.db", "pipe", "folder"])
def test_a_backup_that_cannot_be_made_says_so_and_leaves_nothing(ready, folder, target):
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")      # as /dev/stdout may be one, and /dev/null is no file either
    before = ready.path.read_bytes(), sorted(folder.iterdir())
    out = ready.run("backup", str(folder / target), status=1)
    assert out.startswith("inbound: ") and out.count("\n") == 1
    assert (ready.path.read_bytes(), sorted(folder.iterdir())) == before


@pytest.mark.slow
def test_a_backup_under_load_holds_all_that_was_acknowledged_before_it(serve, file):
    served, is_over, acknowledged = serve(), threading.Event(), []

    def load(name):
        number = 0
        while not is_over.is_set():
            number += 1
            mail = mail_from(f"{name}n{number}")
            assert served.post(mail)[0] == 200
            acknowledged.append(mail["message_id"])

    threads = [threading.Thread(target=load, args=(f"t{number}",)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(5):
            enough = len(acknowledged) + 2
            eventually(lambda enough=enough: len(acknowledged) >= enough)
            before = list(acknowledged)
            copy = file.path.with_name(f"copy-{number}.db")
            assert inbound.main(["--db", str(file.path), "backup", str(copy)]) == 0
            with contextlib.closing(sqlite3.connect(copy)) as db:
                stored = {row[0] for row in db.execute("SELECT message_id FROM message")}
                assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert {*before} <= stored
    finally:
        is_over.set()
        for thread in threads:
            thread.join(LONG)


# forget -------------------------------------------------------------------------------------------

def with_two_people(desk):
    """Ada's ticket with a word of Bob's, Bob's with one of Ada's, and a rejected post each."""
    first = {"message_id": "<ada-1@customer.example>", "from": f"Ada <{ADA}>"}
    hers = desk.post(desk.mail(**first, text="ada's own words"))["ticket"]
    his = desk.post(desk.mail(message_id="<bob-1@elsewhere.example>", text="bob's own words",
                              attachments=[{"filename": "bob.txt", "content": "Ym9i"}],
                              **{"from": f"Bob <{BOB}>"}))["ticket"]
    desk.post(desk.mail(message_id="<ada-2@customer.example>", text="ada's word to bob",
                        in_reply_to="<bob-1@elsewhere.example>",
                        **{"from": "ADA+x@customer.example"}))
    desk.post(desk.mail(message_id="<bob-2@elsewhere.example>", text="bob's word to ada",
                        in_reply_to="<ada-1@customer.example>", **{"from": BOB}))
    desk.run("reply", his, "--to", ADA, stdin="our words to ada")
    desk.post({"from": 17, "text": f"a fault of {ADA}"}, status=422)
    desk.post({"from": 17, "text": f"a fault of {BOB}"}, status=422)
    return hers, his


@pytest.mark.parametrize("address", ["Ada@Customer.Example", f"Ada Lovelace <{ADA}>", f" {ADA}"])
def test_a_person_is_erased_and_nobody_else(ready, address):
    hers, his = with_two_people(ready)
    printed = ready.run("forget", address, "--json")
    counts = json.loads(printed.partition("inbound:")[0])
    assert counts["tickets"] == 1 and counts["messages"] >= 1 and counts["rejected"] == 1
    ready.run("show", hers, status=1)
    texts = [message["text"] for message in ready.show(his)["messages"]]
    assert "bob's own words" in texts and not any("ada" in text for text in texts)
    for table in ("ticket", "message", "outbox", "rejected"):
        for row in ready.records(f"SELECT * FROM {table}"):
            # A whole word: one of 4,096 of our own Message-IDs ends in …ada.
            assert not re.search(r"\bada(?:\+x)?@", str(row).lower()), (table, row)
    assert ready.count("attachment") == 1 and ready.count("rejected") == 1


# (a rejected post, whether it names ann@x.example)
NAMES_ANN = [
    ("ann@x.example", True), ("<ann@x.example>", True), ("To ANN@x.example.", True),
    (r'{"to": "ann@x.example"}', True), (r'"a\nann@x.example"', True),
    (r'"\u003cann@x.example\u003e"', True), ("from=%3cann%40x.example%3e", True),
    ("from=ann%40x.example&a=b", True), ("mailto:ann@x.example, jo@x.example", True),
    ("joann@x.example", False), ("jo.ann@x.example", False), ("jo-ann@x.example", False),
    ("jo+ann@x.example", False), ("ann@x.example.org", False), ("ann@x.examples", False),
    ("from=joann%40x.example", False), ("ann@x.example-shop.example", False)]


@pytest.mark.parametrize("body, is_named", NAMES_ANN)
def test_a_rejected_post_of_a_person_is_erased_and_none_of_a_longer_address(ready, body, is_named):
    ready.post(body, "text/html", status=415)
    ready.run("forget", "ann@x.example")
    assert ready.count("rejected") == (not is_named)


def test_nothing_of_a_forgotten_person_is_left_in_the_file(ready):
    with_two_people(ready)
    ready.run("forget", ADA)
    ready.store.close()
    for file in ready.path.parent.glob("inbound.db*"):
        content = file.read_bytes().lower()
        assert b"ada's own words" not in content and b"ada's word to bob" not in content, file


def test_forget_says_what_still_holds_it(ready):
    assert "backups" in ready.run("forget", ADA)


@pytest.mark.parametrize("address", ["customer.example", "ada@", f"{ADA}, {BOB}"])
def test_forget_wants_an_address(ready, address):
    ready.run("forget", address, status=1)


def test_a_mail_of_a_forgotten_person_opens_a_new_ticket(ready):
    hers, _ = with_two_people(ready)
    ready.run("forget", ADA)
    answer = ready.post(ready.mail(message_id="<ada-3@customer.example>",
                                   in_reply_to="<ada-1@customer.example>"))
    assert answer["status"] == "created" and answer["ticket"] != hers
