"""The file: SPEC 5. Names are public, illegal states cannot be written, old files are migrated."""

import concurrent.futures
import contextlib
import io
import json
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import webtest

import inbound
from conftest import HEADER, SECRET, URL, Clock, Desk, File

PUBLIC = {
    "queue": "id name is_default",
    "email_account": "id address display_name queue is_default inbound_secret previous_secret"
                     " previous_secret_until validation_key smtp_host smtp_port smtp_security"
                     " smtp_username smtp_password staff notices_per_hour replica_socket",
    "ticket": "id reference queue email_account subject requester requester_name status created_at"
              " updated_at last_writer",
    "message": "id ticket direction message_id in_reply_to from_address from_name envelope_from"
               " subject text html headers kind reason received_at",
    "attachment": "id message filename content_type content_id size content",
    "outbox": "state attempts created_at next_attempt_at last_error purpose own_message_id",
    "rejected": "id received_at status reason content_type body",
    "provider": "name fields",
    "inbox": "reference queue subject requester",
}


@contextlib.contextmanager
def connected(path):
    """A connection that holds to foreign keys and commits each statement."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA foreign_keys = ON")
        yield db


@pytest.fixture
def filled(desk):
    """A desk with one ticket, two messages, an attachment, an outbox row and a rejected post."""
    file = {"filename": "a.txt", "content_type": "text/plain", "content": "YQ=="}
    desk.post(desk.mail(attachments=[file]))
    desk.request({"text": "no sender"})
    return desk


# Names --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(desk, name):
    columns = {row[1] for row in desk.sql(f"PRAGMA table_info({name})")}
    assert {*PUBLIC[name].split()} <= columns


def test_every_table_is_strict(desk):
    tables = desk.sql("SELECT name, strict FROM pragma_table_list WHERE type = 'table'"
                      " AND schema = 'main' AND name NOT LIKE 'sqlite_%'")
    assert {name for name, strict in tables} >= {*PUBLIC} - {"inbox"}
    assert [name for name, strict in tables if not strict] == []


def test_a_column_that_points_to_a_row_has_the_table_s_name(desk):
    for (table,) in desk.sql("SELECT name FROM sqlite_schema WHERE type = 'table'"):
        for row in desk.sql(f"PRAGMA foreign_key_list({table})"):
            assert row[2] == row[3]


def test_a_new_file_has_one_account_and_one_default_queue(tmp_path, clock):
    with contextlib.closing(inbound.Store(str(tmp_path / "new.db"), clock)) as store:
        assert store.open() is True and store.open() is False
    with connected(tmp_path / "new.db") as db:
        [(secret, is_default)] = db.execute("SELECT inbound_secret, is_default FROM email_account")
        assert len(secret) >= 16 and is_default == 1
        assert db.execute("SELECT name FROM queue WHERE is_default").fetchall() == [("Support",)]
        for table in ("ticket", "message", "attachment", "outbox", "rejected"):
            assert db.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


def test_no_two_new_files_have_the_same_secret(tmp_path):
    secrets = set()
    for name in ("a.db", "b.db", "c.db"):
        with contextlib.closing(inbound.Store(str(tmp_path / name))) as store:
            store.open()
            secrets.add(store.accounts()[0]["inbound_secret"])
    assert len(secrets) == 3


def test_times_are_whole_seconds_and_the_inbox_s_are_readable(filled):
    for table, column in (("ticket", "created_at"), ("ticket", "updated_at"),
                          ("message", "received_at"), ("outbox", "created_at"),
                          ("outbox", "next_attempt_at"), ("rejected", "received_at")):
        values = filled.sql(f"SELECT {column} FROM {table}")
        assert {value for (value,) in values} == {filled.clock()}
    [row] = filled.sql("SELECT * FROM inbox")
    assert [word for word in row if re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", str(word))]


def test_the_inbox_holds_open_tickets_newest_first(desk):
    references = []
    for number in range(3):
        answer = desk.post(desk.mail(message_id=f"<{number}@x>", text=str(number)))
        references.insert(0, answer["ticket"])
        desk.clock.advance(60)
    desk.run("close", references[1])
    assert [row[0] for row in desk.sql("SELECT reference FROM inbox")] == references[::2]


# Illegal states -----------------------------------------------------------------------------------

ILLEGAL = [
    "INSERT INTO queue (name) VALUES ('Support')",
    "INSERT INTO queue (name) VALUES (NULL)",
    "INSERT INTO queue (name, is_default) VALUES ('Other', 1)",
    "INSERT INTO queue (name, is_default) VALUES ('Other', 2)",
    "DELETE FROM queue",
    "UPDATE email_account SET address = ''",
    "UPDATE email_account SET address = 'support'",
    "UPDATE email_account SET address = 'a b@x.example'",
    "UPDATE email_account SET address = 'Support <a@x.example>'",
    "UPDATE email_account SET address = 'a@x.example, b@x.example'",
    "UPDATE email_account SET address = 'a@x.example' || char(10)",
    "UPDATE email_account SET address = 'jürgen@x.example'",
    "UPDATE email_account SET queue = 99",
    "UPDATE email_account SET queue = NULL",
    "UPDATE email_account SET is_default = 2",
    "UPDATE email_account SET inbound_secret = '0123456789abcde'",
    "UPDATE email_account SET inbound_secret = ''",
    "UPDATE email_account SET inbound_secret = '0123456789abcdefé'",
    "UPDATE email_account SET inbound_secret = x'30313233343536373839616263646566'",
    "UPDATE email_account SET previous_secret = 'too-short', previous_secret_until = 1",
    "UPDATE email_account SET previous_secret = '0123456789abcdef', previous_secret_until = NULL",
    "UPDATE email_account SET previous_secret_until = 'tomorrow'",
    "UPDATE email_account SET validation_key = ''",
    "UPDATE email_account SET smtp_host = ''",
    "UPDATE email_account SET smtp_port = 0",
    "UPDATE email_account SET smtp_port = 65536",
    "UPDATE email_account SET smtp_port = 'smtp'",
    "UPDATE email_account SET smtp_security = 'ssl'",
    "UPDATE email_account SET smtp_security = NULL",
    "UPDATE email_account SET smtp_security = 'none', smtp_username = 'ada'",
    "UPDATE email_account SET template = NULL",
    "UPDATE email_account SET confirmations_per_hour = -1",
    "UPDATE email_account SET confirmations_per_address_hour = NULL",
    "UPDATE email_account SET confirmations_per_address_day = 'many'",
    "INSERT INTO email_account (address, queue) SELECT upper(address), queue FROM email_account",
    "DELETE FROM email_account",
    "UPDATE ticket SET reference = 'T-1234'",
    "UPDATE ticket SET reference = 't-7f3k-9q2m'",
    "UPDATE ticket SET reference = 'T-IIII-LLLL'",
    "UPDATE ticket SET reference = 'T-7F3K-9Q2M-'",
    "UPDATE ticket SET reference = NULL",
    "UPDATE ticket SET status = 'deleted'",
    "UPDATE ticket SET status = NULL",
    "UPDATE ticket SET queue = 99",
    "UPDATE ticket SET email_account = 99",
    "UPDATE ticket SET requester = NULL",
    "UPDATE ticket SET subject = x'00'",
    "UPDATE ticket SET created_at = 'now'",
    "UPDATE ticket SET created_at = 1.5",
    "UPDATE message SET ticket = 99",
    "UPDATE message SET direction = 'sideways'",
    "UPDATE message SET direction = 'out' WHERE direction = 'in'",
    "UPDATE message SET direction = 'in' WHERE direction = 'out'",
    "UPDATE message SET kind = 'spam'",
    "UPDATE message SET kind = NULL WHERE direction = 'in'",
    "UPDATE message SET confirmation = 'sent' WHERE direction = 'in'",
    "UPDATE message SET confirmation = NULL WHERE direction = 'in'",
    "UPDATE message SET message_id = NULL",
    "UPDATE message SET reason = NULL",
    "UPDATE message SET headers = 'From: ada'",
    "INSERT INTO message SELECT 99, ticket, email_account, direction, message_id, digest,"
    " in_reply_to, \"references\", from_address, from_name, envelope_from, \"to\", cc, subject,"
    " text, html, headers, kind, reason, confirmation, notes, received_at FROM message LIMIT 1",
    "UPDATE attachment SET message = 99",
    "UPDATE attachment SET size = -1",
    "UPDATE attachment SET sha256 = NULL",
    "UPDATE attachment SET content = NULL",
    "UPDATE attachment SET content = 'text'",
    "UPDATE outbox SET state = 'lost'",
    "UPDATE outbox SET state = 'sent'",
    "UPDATE outbox SET state = 'failed', next_attempt_at = NULL",
    "UPDATE outbox SET state = 'failed', last_error = '550'",
    "UPDATE outbox SET next_attempt_at = NULL",
    "UPDATE outbox SET state = 'sending', next_attempt_at = NULL",
    "UPDATE outbox SET attempts = -1",
    "UPDATE outbox SET purpose = 'spam'",
    "UPDATE outbox SET message = 99",
    "UPDATE outbox SET content = NULL",
    "UPDATE rejected SET body = NULL",
    "UPDATE rejected SET status = 'bad'",
    "UPDATE rejected SET email_account = 99",
    "INSERT INTO provider (name, fields) VALUES ('Ours', 'from=absender')",
    "INSERT INTO provider (name, fields) VALUES ('Ours', '[\"absender\"]')",
    "INSERT INTO provider (name, fields) VALUES ('Ours', NULL)",
    "UPDATE queue SET name = ' ' WHERE is_default",
    "UPDATE email_account SET template = 'no reference'",
    "UPDATE email_account SET trusted_forwarders = 'nobody'",
    "UPDATE email_account SET confirmations_per_domain_hour = -1",
    "UPDATE email_account SET staff = 'bob'",
    "UPDATE email_account SET staff = ''",
    "UPDATE email_account SET notices_per_hour = -1",
    "UPDATE email_account SET notices_per_hour = NULL",
    "UPDATE email_account SET replica_socket = ''",
    "UPDATE ticket SET last_writer = 'nobody'",
    "UPDATE ticket SET last_writer = NULL",
    "UPDATE outbox SET own_message_id = NULL",
]


@pytest.mark.parametrize("statement", ILLEGAL)
def test_an_illegal_state_is_refused(filled, statement):
    with connected(filled.path) as db, pytest.raises(sqlite3.IntegrityError):
        db.execute(statement)


LEGAL = [
    "UPDATE email_account SET inbound_secret = 'my-new-secret-0123456789' WHERE is_default",
    "UPDATE email_account SET inbound_secret = NULL, previous_secret = NULL",
    "UPDATE email_account SET smtp_host = 'mail.example', smtp_port = NULL, smtp_security = 'tls'",
    "UPDATE email_account SET smtp_security = 'starttls', smtp_username = 'ada'",
    "UPDATE email_account SET confirmations_per_hour = 0",
    "UPDATE email_account SET display_name = NULL",
    "UPDATE ticket SET status = 'closed'",
    "UPDATE ticket SET reference = 'T-7F3K-9Q2M'",
    "UPDATE outbox SET state = 'sending'",
    "UPDATE outbox SET state = 'sent', next_attempt_at = NULL",
    "UPDATE outbox SET state = 'failed', next_attempt_at = NULL, last_error = '550'",
    "DELETE FROM ticket",
    "DELETE FROM rejected",
    "UPDATE queue SET name = 'Help' WHERE is_default",
    "UPDATE email_account SET staff = 'bob@team.example, cleo@team.example'",
    "UPDATE email_account SET staff = NULL, notices_per_hour = 0, replica_socket = '/run/l.sock'",
    "UPDATE ticket SET last_writer = 'team'",
    "INSERT INTO provider (name, fields) VALUES ('Ours', '{\"from\": \"absender\"}')",
]


@pytest.mark.parametrize("statement", LEGAL)
def test_what_an_admin_does_by_sql_is_taken(filled, statement):
    with connected(filled.path) as db:
        assert db.execute(statement).rowcount == 1


def test_with_a_ticket_goes_all_that_belongs_to_it(filled):
    with connected(filled.path) as db:
        db.execute("DELETE FROM ticket")
    for table in ("message", "attachment", "outbox"):
        assert filled.count(table) == 0


def test_a_new_default_account_replaces_the_old_one(desk):
    desk.run("account", "add", "sales@helpdesk.example")
    desk.execute("UPDATE email_account SET is_default = 1 WHERE address LIKE 'sales%'")
    assert desk.sql("SELECT address FROM email_account WHERE is_default") == [
        ("sales@helpdesk.example",)]


# The file -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_file_and_its_companions_are_the_owner_s_alone(tmp_path, umask):
    before = os.umask(umask)
    try:
        with contextlib.closing(inbound.Store(str(tmp_path / "new.db"))) as store:
            store.open()
            store.write(lambda db, now: db.execute("UPDATE email_account SET smtp_host = 'x'"))
            files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert files == {"new.db": 0o600, "new.db-wal": 0o600, "new.db-shm": 0o600}


def test_the_file_is_in_wal_mode_and_marked_as_ours(desk):
    assert desk.sql("PRAGMA journal_mode") == [("wal",)]
    assert desk.sql("PRAGMA application_id") == [(int.from_bytes(b"inbd", "big"),)]
    assert desk.sql("PRAGMA user_version") == [(inbound.SCHEMA_VERSION,)]
    assert desk.sql("PRAGMA integrity_check") == [("ok",)]
    assert desk.sql("PRAGMA foreign_key_check") == []


def test_the_writer_syncs_each_commit_and_holds_to_foreign_keys(desk):
    def settings(db, now):
        names = ("synchronous", "foreign_keys")
        return [{**db.execute(f"PRAGMA {name}").fetchone()} for name in names]

    assert desk.store.write(settings) == [{"synchronous": 2}, {"foreign_keys": 1}]


# Versions -----------------------------------------------------------------------------------------

def refused(path):
    """Open the file and close it; return the one sentence that it is refused with."""
    store = inbound.Store(str(path))
    with contextlib.closing(store), pytest.raises(inbound.Refused) as caught:
        store.open()
    assert "\n" not in caught.value.reason and path.name in caught.value.reason
    return caught.value.reason


def version_of(path):
    with connected(path) as db:
        return db.execute("PRAGMA user_version").fetchone()[0]


HERE = Path(__file__).parent
# What the program knew of and kept in tables of its own; it stands in inbound.py now.
PROGRAM = {"provider", "sign", "command"}


def file_of_version(version, folder):
    """A file made by that version's own code, with tickets, settings and rows of an admin."""
    file = File(folder / "old.db")
    dump = (HERE / f"version-{version}.db.sql").read_text(encoding="utf-8")
    with contextlib.closing(sqlite3.connect(file.path)) as db:     # a dump's order heeds no keys
        db.executescript(dump)
        db.execute("PRAGMA journal_mode = WAL")
    return file


@pytest.fixture
def old(folder):
    return file_of_version(1, folder)


@pytest.fixture
def second(folder):
    return file_of_version(2, folder)


def rows_of(file):
    """{table: its rows, each a dict}."""
    tables = file.sql("SELECT name FROM sqlite_schema WHERE type = 'table'")
    return {table: file.records(f"SELECT * FROM {table} ORDER BY rowid") for (table,) in tables}


def schema_of(file):
    return {*file.sql("SELECT type, name, tbl_name, sql FROM sqlite_schema")}


def migrated(file):
    with contextlib.closing(inbound.Store(str(file.path), Clock())) as store:
        assert store.open() is False
        assert store.open() is False        # once is enough
    assert file.sql("PRAGMA integrity_check") == [("ok",)]
    assert file.sql("PRAGMA foreign_key_check") == []
    assert version_of(file.path) == inbound.SCHEMA_VERSION


def test_a_file_of_version_1_keeps_every_row_and_every_setting(old):
    before = rows_of(old)
    migrated(old)
    after = rows_of(old)
    for table in before.keys() - PROGRAM:
        carried = [{name: row[name] for name in first} for row, first in
                   zip(after[table], before[table])]
        assert carried == before[table] and len(after[table]) == len(before[table]), table
        assert before[table], f"{table} has nothing to lose"
    assert after["provider"] == [{"name": "Ours", "fields": json.dumps({
        "from": "absender", "subject": "betreff", "text": "inhalt.0", "message_id": "mid"})}]
    assert [row["names"] for row in after["sign_of_version_1"]] == ["x-ours"]


def test_what_an_admin_added_to_a_file_of_version_2_stays(second):
    with contextlib.closing(sqlite3.connect(second.path)) as connection:
        connection.executescript("""
            CREATE TABLE mine (a UNIQUE, b);
            CREATE INDEX mine_b ON mine (b);
            CREATE VIEW mine_open AS SELECT reference FROM ticket WHERE status = 'open';
            CREATE TRIGGER mine_too AFTER INSERT ON mine BEGIN SELECT 1; END;""")
    migrated(second)
    with contextlib.closing(sqlite3.connect(second.path)) as connection:
        names = connection.execute("SELECT name FROM sqlite_schema WHERE name LIKE 'mine%'")
        assert {name for name, in names} == {"mine", "mine_b", "mine_open", "mine_too"}
        connection.execute("SELECT * FROM mine_open").fetchall()


def test_a_file_of_version_2_keeps_every_row_and_every_setting(second):
    before = rows_of(second)
    migrated(second)
    after = rows_of(second)
    for table in before:
        carried = [{name: row[name] for name in first} for row, first in
                   zip(after[table], before[table])]
        assert carried == before[table] and len(after[table]) == len(before[table]), table
        assert before[table], f"{table} has nothing to lose"


@pytest.mark.parametrize("version", [1, 2])
def test_its_schema_is_that_of_a_new_file(folder, new_file, version):
    file = file_of_version(version, folder)
    if version == 1:    # what cannot be carried is kept apart
        file.execute("DELETE FROM sign WHERE names = 'x-ours'")
    migrated(file)
    assert schema_of(file) == schema_of(new_file)


@pytest.mark.parametrize("version, last", [
    (1, {"Printer on fire": "team"}), (2, {"Printer on fire": "team", "Again": "customer"})])
def test_its_mails_have_their_ids_and_its_tickets_who_wrote_last(folder, version, last):
    file = file_of_version(version, folder)
    migrated(file)
    # Ada's last word is her vacation's, Bob's is his own.
    assert last.items() <= {**dict(file.sql("SELECT subject, last_writer FROM ticket"))}.items()
    assert dict(file.sql("SELECT subject, last_writer FROM ticket"))["日本語 ünd"] == "customer"
    ids = file.sql("SELECT own_message_id, message_id FROM outbox"
                   " JOIN message ON message.id = outbox.message")
    assert ids and all(ours == theirs for ours, theirs in ids)


def test_a_migrated_desk_goes_on_where_it_stopped(old, clock):
    desk = Desk(old.path, clock)
    with contextlib.closing(desk.store):
        again = desk.post(desk.mail(attachments=[
            {"filename": "smoke.txt", "content_type": "text/plain", "content": "c21va2U="},
            {"filename": "broken.bin", "content": "?"}]))
        assert again["status"] == "duplicate"
        [(reference,)] = desk.sql("SELECT reference FROM ticket WHERE status = 'closed'")
        answer = desk.post(desk.mail(message_id="<9@customer.example>", text="It burns again.",
                                     in_reply_to="<second@customer.example>"))
        assert (answer["status"], answer["ticket"]) == ("appended", reference)
        desk.post({"absender": "ada@customer.example", "betreff": "B", "inhalt": ["C"],
                   "mid": "<10@customer.example>"})
        assert desk.sql("SELECT subject, text FROM message ORDER BY id DESC LIMIT 1 OFFSET 1") == [
            ("B", "C")]


@pytest.mark.parametrize("setting, before, after", [
    ("template", "Hello.", "Hello.{reference}\n"), ("trusted_forwarders", "nobody", None)])
def test_a_setting_that_is_not_allowed_any_more_is_mended(old, setting, before, after):
    old.set_account(**{setting: before})
    migrated(old)
    assert {*old.sql(f"SELECT {setting} FROM email_account")} == {(after,)}


def test_two_providers_of_one_name_are_both_carried_over(old):
    old.execute("INSERT INTO provider (name, marks, fields) VALUES ('Ours', 'a', 'from=a text')")
    migrated(old)
    assert {json.loads(fields)["from"] for (fields,) in old.sql("SELECT fields FROM provider")} == {
        "absender", "a"}
    assert old.sql("SELECT count(DISTINCT name) FROM provider") == [(2,)]


def test_queues_that_an_admin_renamed_or_deleted_stay_so(old):
    old.execute("UPDATE email_account SET queue = (SELECT id FROM queue WHERE name = 'Sales')")
    old.execute("UPDATE ticket SET queue = (SELECT id FROM queue WHERE name = 'Sales')")
    old.execute("DELETE FROM queue WHERE is_default")
    old.execute("UPDATE queue SET name = 'Post', is_default = 1 WHERE name = 'Sales'")
    before = old.sql("SELECT * FROM queue")
    migrated(old)
    assert old.sql("SELECT * FROM queue") == before


def test_a_file_of_a_version_in_between_is_refused_in_a_sentence_and_left_alone(old, clock):
    old.execute("DROP VIEW valid_secret")
    before = old.dump()
    assert "no released version" in refused(old.path)
    store = inbound.Store(str(old.path), clock)
    with contextlib.closing(store):
        app = webtest.TestApp(inbound.make_app(store))
        answer = app.get("/healthz", status=503).json
        assert "no released version" in answer["reasons"][0]
        app.post_json(URL, {}, headers={HEADER: SECRET}, status=503)
    for verb in ("tickets", "secret"):
        out = io.StringIO()
        with contextlib.redirect_stderr(out):
            assert inbound.main(["--db", str(old.path), verb], clock=clock) == 1
        assert re.fullmatch("inbound: .*no released version.*\n", out.getvalue())
    assert old.dump() == before


@pytest.mark.slow
def test_serve_refuses_it_too(old):
    old.execute("DROP VIEW valid_secret")
    command = [sys.executable, inbound.__file__, "--db", str(old.path), "serve", "--listen",
               "127.0.0.1:0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert re.fullmatch("inbound: .*no released version.*\n", result.stderr)


def test_a_file_of_a_version_that_no_step_leads_on_from_is_refused(desk):
    desk.store.close()
    desk.execute("PRAGMA user_version = 0")
    refused(desk.path)
    assert version_of(desk.path) == 0


def steps(monkeypatch, *statements):
    """Make each of `statements` a step to the next version; a step may be several of them."""
    def step(version, script):
        def take(db):
            for statement in script.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {version}")
        return take

    first = version = inbound.SCHEMA_VERSION
    for script in statements:
        monkeypatch.setitem(inbound.MIGRATIONS, version, step(version + 1, script))
        version += 1
    monkeypatch.setattr(inbound, "SCHEMA_VERSION", version)
    return first


def test_several_steps_are_taken_in_order(filled, monkeypatch):
    filled.store.close()
    steps(monkeypatch,
          "ALTER TABLE ticket ADD COLUMN rank INTEGER; CREATE INDEX one ON ticket (rank)",
          "ALTER TABLE ticket RENAME COLUMN rank TO weight")
    migrated(filled)
    assert filled.sql("SELECT subject, weight FROM ticket") == [("Printer on fire", None)]


def test_a_step_that_fails_leaves_the_old_version_and_can_be_tried_again(desk, monkeypatch):
    desk.store.close()
    for script in ("CREATE TABLE half (a INTEGER) STRICT; no sql",
                   "CREATE TABLE half (a INTEGER); INSERT INTO queue (name) VALUES ('Support')"):
        with monkeypatch.context() as patch:
            first = steps(patch, script)
            refused(desk.path)
        assert version_of(desk.path) == first
        assert desk.sql("SELECT name FROM sqlite_schema WHERE name = 'half'") == []
    steps(monkeypatch, "CREATE TABLE whole (a INTEGER) STRICT")
    migrated(desk)


def test_two_processes_may_make_one_file_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setattr(inbound, "BUSY_TIMEOUT", 20)    # to make it takes some syncs
    stores = [inbound.Store(str(tmp_path / "new.db")) for _ in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        outcomes = [*pool.map(lambda store: store.open(), stores)]
    assert sorted(outcomes) == [False, False, False, True]
    assert len(stores[0].accounts()) == 1
    for store in stores:
        store.close()


# A file that is replaced --------------------------------------------------------------------------

def replace(desk, clock):
    """Put a copy with one ticket, made a while ago, in the place of the file in use."""
    with contextlib.closing(sqlite3.connect(f"{desk.path}.copy")) as copy, \
            connected(desk.path) as db:
        db.backup(copy)
    for number in range(3):
        desk.post(desk.mail(message_id=f"<{number}@later.example>", text=f"later {number}"))
    os.replace(f"{desk.path}.copy", desk.path)


def delete(desk, clock):
    desk.path.unlink()


def delete_the_log(desk, clock):
    Path(f"{desk.path}-wal").unlink()


@pytest.mark.parametrize("fault", [replace, delete, delete_the_log])
def test_no_200_for_what_a_replaced_file_took_along(desk, clock, fault):
    desk.post(desk.mail())
    fault(desk, clock)
    lost = desk.request(desk.mail(message_id="<lost@customer.example>", text="Lost?"))
    assert lost.status_int == 503 and desk.path.name in lost.json["error"]


@pytest.mark.parametrize("fault", ["a copy in its place", "deleted"])
def test_no_200_where_the_file_is_replaced_while_it_is_opened(desk, monkeypatch, fault):
    desk.post(desk.mail())
    desk.store.let_go()                             # the writer; the reader stays
    copy = desk.path.with_suffix(".copy")
    copy.write_bytes(desk.path.read_bytes())
    connect = inbound.Store._connect

    def connect_late(store):
        db = connect(store)
        db.execute("SELECT * FROM queue").fetchall()
        if desk.path.stat().st_ino != copy.stat().st_ino:
            os.replace(copy, desk.path) if fault != "deleted" else desk.path.unlink()
        return db

    monkeypatch.setattr(inbound.Store, "_connect", connect_late)
    monkeypatch.setattr(inbound.Store, "open", lambda store: None)
    assert desk.request(desk.mail(message_id="<lost@customer.example>")).status_int == 503


def test_what_is_gone_after_the_rehearsal_is_a_503_too(desk, monkeypatch):
    monkeypatch.setattr(inbound.shutil, "disk_usage", lambda path: os.stat(path + ".gone"))
    status, answer = desk.health()
    assert status == 503 and "inbound.db.gone" in str(answer)


def test_a_copy_put_in_the_file_s_place_is_used_as_it_is(desk, clock):
    desk.post(desk.mail())
    replace(desk, clock)
    assert desk.health()[0] == 503
    # The second try finds the copy; nothing of the old file's log is read into it.
    answer = desk.post(desk.mail(message_id="<new@customer.example>", text="New."))
    assert answer["status"] == "created"
    assert desk.sql("PRAGMA integrity_check") == [("ok",)]
    assert [text for text, in desk.sql("SELECT text FROM message WHERE direction = 'in'")] == [
        "It burns.", "New."]


def test_a_deleted_file_is_not_made_anew_in_silence(desk, clock):
    desk.post(desk.mail())
    delete(desk, clock)
    for _ in range(3):
        assert desk.request(desk.mail(text="Two.")).status_int == 503
        assert desk.health()[0] == 503
    assert not desk.path.exists()


def test_a_deleted_log_costs_nothing(desk, clock):
    desk.post(desk.mail())
    delete_the_log(desk, clock)
    assert desk.request(desk.mail(text="Two.")).status_int == 503
    assert desk.post(desk.mail(text="Two."))["status"] in ("created", "duplicate")
    assert desk.count("ticket") == 2
    assert desk.sql("PRAGMA integrity_check") == [("ok",)]


def test_a_newer_file_is_refused_in_one_sentence(desk):
    desk.store.close()
    with connected(desk.path) as db:
        db.execute("PRAGMA user_version = 99")
    assert "99" in refused(desk.path)
    assert desk.run("tickets", status=1).startswith("inbound: ")
    assert version_of(desk.path) == 99


def test_another_program_s_database_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "other.db"
    with connected(path) as db:
        db.execute("CREATE TABLE bookmark (url TEXT)")
    before = path.read_bytes()
    refused(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"no database", b"\0" * 4096,
                                     b"SQLite format 3\0" + b"x" * 4096])
def test_what_is_no_database_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "inbound.db"
    path.write_bytes(content)
    refused(path)
    assert path.read_bytes() == content


def test_a_directory_and_a_path_that_leads_nowhere_are_refused(tmp_path):
    refused(tmp_path)
    refused(tmp_path / "none" / "inbound.db")


# By the sqlite3 shell -----------------------------------------------------------------------------

needs_shell = pytest.mark.skipif(not shutil.which("sqlite3"), reason="there is no sqlite3 shell")


def shell(path, command):
    result = subprocess.run(["sqlite3", str(path), command], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@pytest.mark.slow
@needs_shell
def test_the_one_liners_work_while_the_desk_is_at_work(filled):
    [(reference,)] = filled.sql("SELECT reference FROM ticket")
    assert shell(filled.path, "SELECT * FROM inbox").startswith(f"{reference}|")
    shell(filled.path, "UPDATE email_account SET inbound_secret = 'my-new-secret-0123456789'"
                       " WHERE is_default")
    headers = {"X-Mobieus-Inbound-Secret": "my-new-secret-0123456789"}
    assert filled.post(filled.mail(text="Two."), headers=headers)["status"] == "created"
    assert filled.request(filled.mail()).status_int == 401
    assert len(shell(filled.path, "SELECT * FROM inbox").splitlines()) == 2


@pytest.mark.slow
@needs_shell
def test_the_comments_are_in_the_schema_of_a_live_file(desk):
    printed = shell(desk.path, ".schema")
    for words in ("queued → sending → sent", "NULL = unset", "null sender", "T-XXXX-XXXX"):
        assert words in printed


def test_each_table_explains_itself_in_its_own_words(desk):
    tables = desk.sql("SELECT name, sql FROM sqlite_schema WHERE type = 'table'"
                      " AND name NOT LIKE 'sqlite_%'")
    assert [name for name, sql in tables if "--" not in sql] == []
    [sql] = [sql for name, sql in tables if name == "outbox"]
    for state in ("queued", "sending", "sent", "failed"):
        assert re.search(rf"-- .*\b{state}\b", sql)


# Cost ---------------------------------------------------------------------------------------------

GROWING = "ticket|message|attachment|outbox|rejected"


@pytest.fixture
def traced(desk, monkeypatch):
    """A desk, and the statements that it has executed, with their values in them."""
    statements = []
    connect = inbound.Store._connect

    def connect_traced(store):
        connection = connect(store)
        connection.set_trace_callback(statements.append)
        return connection

    monkeypatch.setattr(inbound.Store, "_connect", connect_traced)
    desk.store.close()
    return desk, statements


# `forget`, `tickets --search`, `backup` and doctor's check of the file look at all by their nature.
def test_no_query_looks_through_a_table_that_grows(traced, sink):
    desk, statements = traced
    desk.set_account(staff="ada@staff.example,bob@staff.example")
    desk.send_to(sink.port)
    reference = desk.post(desk.mail())["ticket"]
    desk.post(desk.mail(message_id="<2@x>", in_reply_to="<first@customer.example>", text="more"))
    desk.post(desk.mail(message_id="<3@x>", subject=f"Re: [{reference}]", attachments=[
        {"filename": "a", "content": "YQ=="}], **{"from": "else@where.example"}))
    desk.post({"from": "nobody"}, status=422)
    inbound.send_due(desk.store)
    own = desk.sql("SELECT own_message_id FROM outbox")[0][0]
    desk.post(desk.mail(message_id="<4@x>", subject="failure", in_reply_to=own, headers={
        "Auto-Submitted": "auto-replied"}, **{"from": "MAILER-DAEMON@x.example"}))
    for argv in (["tickets"], ["tickets", "waiting"], ["tickets", "closed"], ["tickets", "all"],
                 ["tickets", "--from", "ada@customer.example"], ["tickets", "all", "--limit", "0"],
                 ["show", reference], ["close", reference], ["reopen", reference], ["outbox"],
                 ["outbox", "show", "1"], ["outbox", "retry", "all"], ["rejected"],
                 ["rejected", "show", "1"], ["rejected", "replay", "1"], ["account"], ["secret"]):
        desk.run(*argv)
    desk.run("doctor", status=1)
    desk.run("reply", reference, stdin="Hello")
    desk.app.get("/healthz")
    queries = dict.fromkeys(query for query in statements if re.match(
        r"\s*(?:WITH|SELECT|UPDATE|DELETE|INSERT)", query))
    assert len(queries) > 60
    assert {query: plan for query in queries if (plan := slow_plan(desk, query))} == {}


def slow_plan(desk, query):
    """The plan of a query that looks at all rows of a table that grows, or sorts them; else []."""
    plan = [row[3] for row in desk.sql(f"EXPLAIN QUERY PLAN {query}")]
    if not any(re.match(rf"SCAN (?:{GROWING}|mail)\b", step) for step in plan):
        return []
    # Read in the order of an index, or of the id, it ends at its limit; that many may be sorted.
    is_sorted = any("TEMP B-TREE" in step for step in plan) and "CO-ROUTINE" not in plan[0]
    return plan if is_sorted or "LIMIT" not in query else []
