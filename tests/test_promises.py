"""The four promises of SPEC 1, each under the faults that would break it.

Real `serve` processes are killed, starved of disk, locked out and made to fail at the nth system
call. What was answered with 200 has to be in the file afterwards, once, and confirmed once.
"""

import base64
import collections
import concurrent.futures
import contextlib
import functools
import http.client
import json
import random
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
import urllib.parse

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import inbound
from conftest import (
    HEADER,
    LONG,
    SECRET,
    URL,
    WRONG,
    Sink,
    at_least_once,
    eventually,
    is_answered,
    mail_from,
    missing,
    need,
    started,
)

# What the tests share -----------------------------------------------------------------------------

def stored(file):
    """{Message-ID: [reference, …]} of all received messages, repeats kept."""
    found = collections.defaultdict(list)
    for message_id, reference in file.sql("""SELECT message_id, reference FROM message
            JOIN ticket ON ticket.id = message.ticket WHERE direction = 'in'"""):
        found[message_id].append(reference)
    return found


def is_sound(file):
    return (file.sql("PRAGMA integrity_check"), file.sql("PRAGMA foreign_key_check")) == (
        [("ok",)], [])


def unconfirmed(file):
    """Tickets that a person opened and that have not exactly one confirmation in the outbox."""
    return file.sql("""SELECT reference FROM ticket WHERE (SELECT count(*) FROM outbox
        JOIN message ON message.id = outbox.message
        WHERE message.ticket = ticket.id AND purpose = 'confirmation') <> 1""")


@contextlib.contextmanager
def traced(served, *options):
    """Run strace on a live server; yields the lines that it has written, complete at the end."""
    need("strace")
    trace, lines = f"{served.path}.trace", []
    strace = subprocess.Popen(["strace", "-f", "-y", "-s", "20", "-o", trace, *options, "-p",
                               str(served.process.pid)], stderr=subprocess.PIPE, text=True)
    with strace:
        first = strace.stderr.readline()
        if "attached" not in first:
            strace.terminate()
            missing(f"strace may not attach to a process here: {first.strip()}")
        try:
            yield lines
        finally:
            strace.terminate()      # it lets go of the server, which goes on
            strace.communicate(timeout=LONG)
    with open(trace) as file:
        lines += file


# 1. A 200 means it is on disk ---------------------------------------------------------------------

class Clients:
    """Threads that post mail after mail, each again and again until it is answered with 200."""

    def __init__(self, count):
        self.served, self.acknowledged, self.troubles = None, {}, []
        self.is_over, self.moved = threading.Event(), threading.Condition()
        self.threads = [threading.Thread(target=self.run, args=(f"c{number}",))
                        for number in range(count)]

    def run(self, name):
        parent, number = None, 0
        while not self.is_over.is_set():
            number += 1
            fields = {"in_reply_to": f"<{parent}@customer.example>"} if number % 3 == 0 else {}
            parent = f"{name}n{number}"
            try:
                self.acknowledged[parent] = self.insist(mail_from(parent, **fields))["ticket"]
            except Exception as error:
                self.troubles.append(repr(error))
                return

    def insist(self, body):
        for _ in range(1000):
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, _, answer = self.served.post(body)
                if status == 200:
                    return answer
                if status != 503:
                    raise AssertionError((status, answer))
            with self.moved:
                self.moved.wait(0.05)
        raise AssertionError("never answered")

    def move(self, served):
        with self.moved:
            self.served = served
            self.moved.notify_all()


class Moody(Sink):
    """A sink that now and then is busy, or hangs up after it has taken a mail."""

    seen, drops, is_calm = 0, 0, False

    async def handle_DATA(self, server, session, envelope):
        self.seen += 1
        if self.seen % 7 == 3 and not self.is_calm:
            return "451 busy"
        answer = await super().handle_DATA(server, session, envelope)
        if self.seen % 11 == 5 and not self.is_calm:
            self.drops += 1
            server.transport.close()
        return answer


@pytest.fixture
def moody():
    with started(Moody()) as sink:
        yield sink


def test_kill_9_under_load_loses_nothing_doubles_nothing_and_confirms_each(file, serve, moody):
    file.send_to(moody.port, confirmations_per_hour=1_000_000)
    chance, clients, kills, more = random.Random(7), Clients(4), 8, 5
    served = serve()
    clients.move(served)
    for thread in clients.threads:
        thread.start()
    try:
        for _ in range(kills):
            enough = len(clients.acknowledged) + more
            eventually(lambda enough=enough: (
                len(clients.acknowledged) >= enough or clients.troubles))
            threading.Event().wait(chance.uniform(0.02, 0.5))
            served.stop(signal.SIGKILL)
            served = serve()
            clients.move(served)
    finally:
        clients.is_over.set()
        for thread in clients.threads:
            thread.join(LONG)
        served.stop()
    assert clients.troubles == []
    assert len(clients.acknowledged) >= more * kills
    found = stored(file)
    assert found == {f"<{name}@customer.example>": [ticket]
                     for name, ticket in clients.acknowledged.items()}
    for name, ticket in clients.acknowledged.items():
        thread, _, number = name.partition("n")
        if int(number) % 3 == 0:        # it replied to the mail before it
            assert ticket == clients.acknowledged[f"{thread}n{int(number) - 1}"]
    assert is_sound(file) and unconfirmed(file) == []
    assert_each_is_confirmed(file, moody, copies=1 + kills + moody.drops)


def assert_each_is_confirmed(file, sink, copies):
    """Send what is left, as if all leases and waits had run out; compare sink and outbox."""
    sink.is_calm = True
    with contextlib.closing(inbound.Store(str(file.path), lambda: time.time() + 7200)) as later:
        inbound.send_due(later)
    assert {state for state, in file.sql("SELECT state FROM outbox")} == {"sent"}
    arrived = collections.defaultdict(list)
    for envelope in sink.received:
        arrived[re.search(rb"^Message-ID: (\S+)", envelope.content, re.M)[1].decode()].append(
            envelope.content)
    assert {name: set(contents) for name, contents in arrived.items()} == {
        message_id: {content} for message_id, content in file.sql("""SELECT message_id, content
            FROM outbox JOIN message ON message.id = outbox.message""")}
    assert max(map(len, arrived.values())) <= copies


@pytest.mark.parametrize("fault", [
    # The second is the folder's, once it has a -wal: SQLite does not look at its result.
    *(f"fsync,fdatasync:error=EIO:when={nth}" for nth in ("1", "3", "4", "2+")),
    *(f"pwrite64:error=ENOSPC:when={nth}" for nth in ("1", "2", "5", "11", "3+"))])
def test_no_200_for_what_is_missing_after_the_nth_system_call_failed(file, serve, fault):
    served, acknowledged, statuses = serve(), {}, []
    # strace counts each thread's calls apart, and a slow sync passes the lead on: it may take all
    # threads until one comes to its nth.
    enough = 5 * inbound.THREADS
    with traced(served, "-e", f"trace={fault.partition(':')[0]}", "-e", f"inject={fault}") as lines:
        for number in range(enough):
            if number >= 40 and 503 in statuses:
                break
            status, headers, answer = served.post(mail_from(f"n{number}", text="x" * 5000))
            statuses.append(status)
            if status == 200:
                acknowledged[f"<n{number}@customer.example>"] = [answer["ticket"]]
            else:
                assert status == 503 and int(headers["Retry-After"]) > 0, (status, answer)
        served.stop(signal.SIGKILL)
    assert any("(INJECTED)" in line for line in lines), "the fault was never made"
    assert 503 in statuses
    assert is_sound(file)
    assert acknowledged.items() <= stored(file).items()
    assert not any(len(tickets) > 1 for tickets in stored(file).values())
    served = serve()
    for number in range(len(statuses)):
        status, _, answer = served.post(mail_from(f"n{number}", text="x" * 5000))
        assert status == 200
        known = acknowledged.get(f"<n{number}@customer.example>")
        assert known in (None, [answer["ticket"]])
    assert len(stored(file)) == len(statuses) and unconfirmed(file) == []


def test_the_writing_connection_syncs_fully_and_writes_ahead(desk):
    for name, expected in (("synchronous", 2), ("journal_mode", "wal"), ("foreign_keys", 1)):
        [found] = desk.store.write(
            lambda db, now, name=name: db.execute(f"PRAGMA {name}").fetchone().values())
        assert (name, found) == (name, expected)


def test_the_log_is_synced_between_the_request_and_its_200(file, serve):
    served = serve()
    with traced(served, "-e", "trace=fsync,fdatasync,recvfrom,sendto") as lines:
        for number in range(5):
            assert served.post(mail_from(f"n{number}"))[0] == 200
    story = ""      # one letter for what happened: Request, Sync of the log, Answer
    syncing = set()
    for line in lines:
        thread = line.split()[0]
        if "sync(" in line and "-wal" in line:
            syncing.add(thread)
        if "sync" in line and line.rstrip().endswith("= 0") and thread in syncing:
            syncing.remove(thread)
            story += "S"
        if '"POST ' in line:
            story += "R"
        if 'sendto' in line and '"HTTP/1.1 200' in line:
            story += "A"
    assert re.fullmatch("(RS+A){5}", story), (story, lines)


def assert_full_then_fine(served, is_full, make_room):
    """Post big mails until the disk is full: 503, the process lives; with room again: stored."""
    is_full()
    refused = None
    for number in range(40):
        body = mail_from(f"n{number}", text="x" * 100_000)
        status, headers, answer = served.post(body)
        if status != 200:
            refused = body
            break
    assert refused, "the disk was never full"
    assert status == 503 and int(headers["Retry-After"]) > 0, (status, answer)
    assert served.post(refused)[0] == 503
    assert refused["message_id"] not in stored(served)
    assert served.process.poll() is None
    make_room()
    assert served.post(refused)[2]["status"] == "created"
    assert served.post(refused)[2]["status"] == "duplicate"
    assert is_sound(served) and unconfirmed(served) == []


def test_no_file_may_grow_503_then_it_works_again(file, serve):
    served = serve()
    assert served.post(mail_from("before"))[0] == 200
    limit = functools.partial(resource.prlimit, served.process.pid, resource.RLIMIT_FSIZE)
    size = file.path.stat().st_size
    assert_full_then_fine(served, lambda: limit((size + 250_000, resource.RLIM_INFINITY)),
                          lambda: limit((resource.RLIM_INFINITY, resource.RLIM_INFINITY)))


def test_a_full_file_system_503_then_it_works_again(tmp_path, serve, file):
    small = tmp_path / "small"
    small.mkdir()
    if not shutil.which("mount") or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(small)],
            stderr=subprocess.DEVNULL).returncode:
        pytest.skip("not root: no file system of our own to fill")
    try:
        shutil.move(file.path, small / "inbound.db")
        served, ballast = serve("small/inbound.db"), small / "ballast"

        def fill():
            ballast.write_bytes(b"x" * 5_000_000)

        try:
            assert_full_then_fine(served, fill, ballast.unlink)
            assert served.stop() == 0
        finally:
            served.stop(signal.SIGKILL)
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


# Locks --------------------------------------------------------------------------------------------

def test_a_short_lock_of_another_process_is_waited_for(file, serve):
    def is_waited_for():
        served = serve()        # one that has not seen the lock: it waits for none twice
        with concurrent.futures.ThreadPoolExecutor() as pool, file.locked() as holder:
            answer = pool.submit(served.post, mail_from("patient"))
            concurrent.futures.wait([answer], inbound.BUSY_TIMEOUT / 4)
            has_waited = not answer.done()
            holder.execute("ROLLBACK")
            status, _, content = answer.result()
            return has_waited and (status, content.get("status")) == (200, "created")

    at_least_once(is_waited_for)
    assert list(stored(file)) == ["<patient@customer.example>"]


def test_a_long_lock_is_503_for_all_in_time_stores_nothing_and_then_all_are_created(file, serve):
    # In time is before a provider gives up and not only each for himself: one wait for the lock
    # refuses all who wait. 2 s are expected; where each waits in turn the 60th has 20 s and more.
    names, running = [f"n{number}" for number in range(60)], []

    def are_refused_in_time():
        running.append(serve())     # one that has not seen the lock: it waits for none twice
        with concurrent.futures.ThreadPoolExecutor(60) as pool, file.locked() as holder:
            began = time.monotonic()
            answers = [pool.submit(running[-1].post, mail_from(name)) for name in names]
            for status, headers, content in (answer.result() for answer in answers):
                assert status == 503 and int(headers["Retry-After"]) > 0, content
            assert holder.execute("SELECT count(*) FROM message").fetchone() == (0,)
            return time.monotonic() - began < 15

    at_least_once(are_refused_in_time)
    assert stored(file) == {} and file.count("rejected") == 0
    statuses = [running[-1].post(mail_from(name))[2]["status"] for name in names]
    assert statuses == ["created"] * 60


def test_who_comes_late_to_a_lock_waits_no_longer_than_who_came_first(file, serve):
    served = serve()
    with concurrent.futures.ThreadPoolExecutor(6) as pool, file.locked():
        answers = []
        for number in range(6):
            answers.append(pool.submit(served.post, mail_from(f"n{number}")))
            threading.Event().wait(0.4)
        assert [answer.result()[0] for answer in answers] == [503] * 6
    assert stored(file) == {}


def test_a_lock_stops_neither_the_probe_nor_the_401(file, serve):
    def are_answered_first():
        served = serve()        # one that has not seen the lock: it waits for none twice
        with file.locked(), contextlib.closing(served.send(mail_from("waits"))) as waits:
            for ask, status in (("GET", 200), ("POST", 401)):
                connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=LONG)
                with contextlib.closing(connection):
                    connection.request(ask, URL, None, {HEADER: WRONG})
                    assert connection.getresponse().status == status
            return not is_answered(waits)

    at_least_once(are_answered_first)
    assert stored(file).keys() <= {"<waits@customer.example>"}


# 2. The same message twice changes nothing --------------------------------------------------------

def test_sixteen_identical_posts_at_once_are_one_ticket_and_one_confirmation(file, serve, sink):
    file.send_to(sink.port)
    served, start = serve(), threading.Barrier(16)

    def post_it(_):
        start.wait(LONG)
        return served.post(mail_from("same"))

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(post_it, range(16)))
    assert [status for status, _, _ in answers] == [200] * 16
    contents = [content for _, _, content in answers]
    assert collections.Counter(content["status"] for content in contents) == {
        "created": 1, "duplicate": 15}
    assert len({(content["ticket"], content["message"]) for content in contents}) == 1
    assert stored(file) == {"<same@customer.example>": [contents[0]["ticket"]]}
    assert len(file.sql("SELECT * FROM ticket")) == 1
    eventually(lambda: file.sql("SELECT state FROM outbox") == [("sent",)])
    served.stop()
    assert len(sink.received) == 1


def test_a_week_later_the_same_message_writes_nothing(desk, clock):
    first = desk.post(desk.mail())
    before = desk.dump()
    clock.advance(7 * 86400)
    again = desk.post(desk.mail())
    assert (again["status"], again["ticket"], again["message"]) == (
        "duplicate", first["ticket"], first["message"])
    assert desk.dump() == before


def test_the_same_id_with_other_words_is_another_message(desk):
    first, other = desk.post(desk.mail()), desk.post(desk.mail(text="Something else."))
    assert other["status"] == "created" and other["message"] != first["message"]
    assert desk.sql("SELECT text FROM message WHERE direction = 'in' ORDER BY id") == [
        ("It burns.",), ("Something else.",)]


# The writer ---------------------------------------------------------------------------------------

def write_together(store, works):
    """Queue all `works` while another write is under way; return each result or exception."""
    gate, held = threading.Event(), threading.Event()

    def submit(work):
        try:
            return store.write(work)
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(works) + 1) as pool:
        first = pool.submit(store.write, lambda db, now: (held.set(), gate.wait(LONG)))
        assert held.wait(LONG)
        outcomes = []
        for count, work in enumerate(works, 1):
            outcomes.append(pool.submit(submit, work))
            eventually(lambda count=count: len(store._jobs) == count)
        gate.set()
        first.result()
        return [outcome.result() for outcome in outcomes]


def adds(name, fails=None):
    """Work that inserts a queue and then fails, if it does."""
    def work(db, now):
        db.execute("INSERT INTO queue (name) VALUES (?)", (name,))
        if isinstance(fails, str):
            db.execute(fails)
        elif fails:
            raise fails
        return name
    return work


def test_one_bad_write_never_costs_its_neighbours(desk):
    bad = [ValueError("no"), RecursionError("deep"), "INSERT INTO queue (name) VALUES ('Support')",
           "no SQL at all", "SELECT json('{')"]
    works = [adds(f"good {number}") for number in range(5)]
    works += [adds(f"bad {number}", fails) for number, fails in enumerate(bad)]
    works += [adds(f"good {number}") for number in range(5, 10)]
    outcomes = write_together(desk.store, works)
    good = [f"good {number}" for number in range(10)]
    assert outcomes[:5] + outcomes[10:] == good
    assert all(isinstance(outcome, Exception) for outcome in outcomes[5:10])
    assert isinstance(outcomes[5], ValueError)
    assert [name for name, in desk.sql("SELECT name FROM queue ORDER BY name")] == [
        "Automatic", "Support", *good]


def test_what_is_done_again_for_a_bad_neighbour_is_stored_and_noted_once(desk):
    first = desk.post(desk.mail())
    [account] = desk.store.accounts()
    post = inbound.Post(account, [account["address"]], "application/json", json.dumps(desk.mail(
        **{"from": "eve@elsewhere.example"}, message_id="<second@elsewhere.example>",
        in_reply_to="<first@customer.example>")).encode())
    progress = inbound.Progress(inbound.receive(desk.store, post))
    bad = inbound.Job(adds("bad", ValueError("no")))
    desk.store.commit([progress.job, bad])
    _, answer = progress.finish(desk.store)
    assert isinstance(bad.error, ValueError)
    assert (answer["status"], answer["ticket"]) == ("appended", first["ticket"])
    [_, (notes,)] = desk.sql("SELECT notes FROM message WHERE direction = 'in' ORDER BY id")
    assert len(json.loads(notes)) == 1 and "stranger" in notes


def test_a_savepoint_is_only_opened_where_something_raised(desk):
    statements = []
    desk.store.write(lambda db, now: db.set_trace_callback(statements.append))
    desk.post(desk.mail())
    assert any(each.startswith("COMMIT") for each in statements)
    assert not any("SAVEPOINT" in each for each in statements)
    statements.clear()
    desk.app.get("/healthz", expect_errors=True)
    assert [each.split()[0] for each in statements if each.endswith(" rehearsal")] == [
        "SAVEPOINT", "ROLLBACK", "RELEASE"]


def test_writers_that_wait_share_a_commit(desk):
    statements = []
    desk.store.write(lambda db, now: db.set_trace_callback(statements.append))
    outcomes = write_together(desk.store, [adds(f"n{number}") for number in range(12)])
    assert outcomes == [f"n{number}" for number in range(12)]
    commits = sum(statement.startswith("COMMIT") for statement in statements)
    assert 2 <= commits < 8, statements
    assert desk.count("queue") == 14


def test_a_commit_that_fails_is_told_to_every_writer_of_it(desk, impatient):
    with desk.locked(), concurrent.futures.ThreadPoolExecutor(8) as pool:
        outcomes = [pool.submit(desk.store.write, adds(f"n{number}")) for number in range(8)]
        for outcome in outcomes:
            with pytest.raises(inbound.Refused) as refusal:
                outcome.result(timeout=LONG)
            assert refusal.value.status == 503
    assert desk.count("queue") == 2
    assert desk.store.write(adds("later")) == "later"


def test_a_short_lock_right_after_a_long_one_is_waited_for(desk, impatient, monkeypatch):
    with desk.locked(), pytest.raises(inbound.Refused):
        desk.store.write(adds("at the long one"))
    desk.store.write(adds("between them"))
    monkeypatch.setattr(inbound, "BUSY_TIMEOUT", 20)
    with concurrent.futures.ThreadPoolExecutor() as pool, desk.locked() as holder:
        outcome = pool.submit(desk.store.write, adds("at the short one"))
        with pytest.raises(concurrent.futures.TimeoutError):
            outcome.result(timeout=0.1)
        holder.execute("ROLLBACK")
        assert outcome.result() == "at the short one"


# 3. Nothing that proved it knew the secret is lost -----------------------------------------------

def explode(*args, **kwargs):
    raise RuntimeError("a fault that nobody thought of")


def test_what_filing_refuses_is_kept_and_never_a_4xx(desk):
    def refuse(*args):
        raise inbound.Refused(400, "no mail of ours can be written")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inbound, "open_ticket", refuse)
        assert desk.post(desk.mail())["status"] == "quarantined"
    assert (desk.count("ticket"), desk.count("rejected")) == (0, 1)


@pytest.mark.parametrize("stage", ["read", "normalise", "classify", "thread", "confirm"])
def test_what_raises_while_it_is_understood_is_kept_and_replayed(desk, stage):
    body = json.dumps(desk.mail(text="caf\u00e9"), ensure_ascii=False, indent=3).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inbound, stage, explode)
        answer = desk.post(body)
        assert answer["status"] == "quarantined"
        assert desk.post(body)["status"] == "quarantined"
    assert (desk.count("ticket"), desk.count("message"), desk.count("outbox")) == (0, 0, 0)
    [(identifier, status, reason, kept, tries)] = desk.sql(
        "SELECT id, status, reason, body, tries FROM rejected")
    assert (status, kept, tries) == (200, body, 2)
    assert "RuntimeError" in reason and "nobody thought of" in reason
    assert desk.run("rejected", "replay", str(identifier))
    assert (desk.count("rejected"), desk.count("ticket"), desk.count("outbox")) == (0, 1, 1)
    assert desk.post(body)["status"] == "duplicate"


def test_what_the_database_refuses_is_kept_and_its_neighbours_are_stored(desk):
    desk.execute("""CREATE TRIGGER refuses BEFORE INSERT ON message WHEN NEW.subject = 'bad' BEGIN
        SELECT RAISE(ABORT, 'not this one'); END""")
    answer = desk.post({"items": [
        {"Uuid": ["u"], "MessageId": f"<{subject}@customer.example>", "Subject": subject,
         "From": {"Address": f"{subject}@customer.example", "Name": ""}, "RawTextBody": "text"}
        for subject in ("good", "bad", "fine")]})
    assert [member["status"] for member in answer["messages"]] == [
        "created", "quarantined", "created"]
    assert desk.sql("SELECT subject FROM ticket ORDER BY id") == [("good",), ("fine",)]
    assert desk.count("outbox") == 2 and desk.count("rejected") == 1
    desk.execute("DROP TRIGGER refuses")
    desk.run("rejected", "replay")
    assert desk.count("ticket") == 3 and desk.count("rejected") == 0


@pytest.mark.parametrize("body", ["no JSON", "{}", '{"from": 1'])
def test_where_not_even_rejected_can_be_written_the_answer_is_never_200(desk, body):
    desk.execute("""CREATE TRIGGER refuses BEFORE INSERT ON rejected BEGIN
        SELECT RAISE(ABORT, 'not here either'); END""")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inbound, "normalise", explode)
        for content in (body, desk.mail()):
            assert desk.request(content).status_int in (500, 503)
    assert desk.count("ticket") == desk.count("rejected") == 0
    desk.execute("DROP TRIGGER refuses")
    assert desk.post(desk.mail())["status"] == "created"


@pytest.mark.slow
@given(body=st.binary(max_size=300) | st.text(max_size=300).map(
    lambda text: text.encode("utf-8", "surrogatepass")) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["from", "message_id", "subject", "text", "html", "headers", "envelope", "attachments",
         "to", "references", "content", "filename"]), inner, max_size=6)).map(
             lambda value: json.dumps(value).encode()),
       content_type=st.sampled_from(["application/json", "message/rfc822", "text/plain", "", "x",
                                     "application/x-www-form-urlencoded", "image/png",
                                     "multipart/form-data; boundary=b"]))
@example(body=b'{"envelope": {}}', content_type="application/json")
@settings(max_examples=120, deadline=None, suppress_health_check=[
    HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_body_with_the_secret_is_a_message_or_kept_byte_for_byte(desk, body, content_type):
    # Not `desk.request`: WebTest's post() reads forms and writes them anew.
    response = desk.app.request(URL, method="POST", body=body, content_type=content_type, headers={
        "X-Mobieus-Inbound-Secret": SECRET}, expect_errors=True)
    assert response.status_int in (200, 400, 415, 422), response.text
    assert response.json.get("status") != "quarantined"     # that is for our own bugs
    for answer in response.json.get("messages", [response.json]):
        if answer.get("status") in ("created", "appended", "duplicate"):
            assert desk.sql("SELECT 1 FROM message WHERE id = ?", answer["message"])
        else:
            assert desk.sql("SELECT 1 FROM rejected WHERE body = ?", body)
            assert answer.get("ticket") is None


HARD = "a secret/with+odd & \"quoted\" \\ 100% characters"
SPELLINGS = {
    "raw": HARD,
    "quote": urllib.parse.quote(HARD),
    "encodeURIComponent": urllib.parse.quote(HARD, safe="!'()*~"),
    "form": urllib.parse.quote_plus(HARD),
    "lower-case hex": re.sub("%..", lambda hit: hit[0].lower(), urllib.parse.quote_plus(HARD)),
    "JSON": json.dumps(HARD)[1:-1],
    "JSON with escaped slashes": json.dumps(HARD)[1:-1].replace("/", "\\/"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("column", ["inbound_secret", "previous_secret"])
def test_no_spelling_of_the_secret_stays_in_a_kept_body(desk, spelling, column):
    desk.execute(f"UPDATE email_account SET previous_secret_until = 9999999999, {column} = ?", HARD)
    secret = desk.sql("SELECT inbound_secret FROM email_account")[0][0]
    body = f'{{"before": 1, "SecretKey": "{SPELLINGS[spelling]}", "after": 2'
    desk.post(body, status=400, headers={"X-Mobieus-Inbound-Secret": secret})
    [(kept,)] = desk.sql("SELECT body FROM rejected")
    assert SPELLINGS[spelling].encode() not in kept
    assert kept.startswith(b'{"before": 1, "SecretKey": "*') and kept.endswith(b'*", "after": 2')
    assert desk.count("ticket") == 0


def test_no_secret_and_no_word_of_a_mail_in_a_log_line_or_an_answer(file, serve):
    served, guess, private = serve(), "a-wrong-guess-of-somebody-012345", mail_from("private")
    ours = {HEADER: SECRET}
    basic = base64.b64encode(f"any:{SECRET}".encode()).decode()
    rejected = b'{"text": "a private word", "secret": "%s"' % SECRET.encode()
    posts = [
        (private, "", ours), (private, f"?secret={SECRET}", {}),
        (private, "", {"Authorization": f"Basic {basic}"}),
        (rejected, "", ours), (rejected, f"?secret={SECRET}", {}), (b"{}", "", ours),
        (private, f"?secret={guess}", {}),
        (private, f"?secret={SECRET}&secret=b", {}),
        (private, "", {HEADER: guess}),
        (private, f"?secret={SECRET}%0aFORGED", {})]
    answers = [served.post(body, url=URL + query, headers=headers)
               for body, query, headers in posts]
    assert [status for status, _, _ in answers] == [
        200, 200, 200, 400, 400, 422, 401, 401, 401, 401]
    served.stop()
    log = served.log_text() + served.greeting
    for text in (log, json.dumps([content for _, _, content in answers])):
        for word in (SECRET, guess, basic, "private word", "private@", "FORGED"):
            assert word not in text
    assert log.count("\n") > len(answers)


@pytest.mark.parametrize("slip", ["&secret=", "/", "/?", ";secret="])
def test_a_secret_that_slipped_into_the_path_is_in_no_log_line(file, serve, slip):
    served = serve()
    status = served.post(mail_from("x"), url=f"{URL}{slip}{SECRET}", headers={})[0]
    assert status in (401, 404) and stored(file) == {}
    served.stop()
    assert SECRET not in served.log_text()


def test_a_forged_path_writes_no_line_of_the_log(file, serve):
    served = serve()
    assert served.post(b"{}", url="/x%0a2026-01-01T00:00:00Z%20200%20FORGED")[0] == 404
    served.stop()
    assert not re.search("^2026-01-01", served.log_text(), re.M)


# 4. Automatic mail is kept and never answered ---------------------------------------------------

@pytest.mark.parametrize("kind, fields", [
    ("auto-reply", {"headers": {"Auto-Submitted": "auto-replied"}}),
    ("machine", {"headers": {"Auto-Submitted": "auto-generated"}}),
    ("list", {"headers": {"List-Id": "<talk.example.org>"}}),
    ("bulk", {"headers": {"Precedence": "bulk"}}),
    ("bounce", {"from": "MAILER-DAEMON@mx.example", "envelope": {"from": ""}, "headers": {
        "Content-Type": "multipart/report; report-type=delivery-status; boundary=b"}}),
])
def test_automatic_mail_is_kept_and_never_answered_however_often_it_comes(
        desk, clock, kind, fields):
    for number in range(4):
        body = desk.mail(message_id=f"<{number}@auto.example>", text=f"number {number}") | fields
        for status, confirmation in (("created", "withheld"), ("duplicate", "not due")):
            answer = desk.post(body)
            assert (answer["status"], answer["kind"], answer["confirmation"]) == (
                status, kind, confirmation)
        clock.advance(3600)
    assert desk.count("message") == 4 and desk.count("outbox") == 0


def test_automatic_mail_that_raises_is_kept_and_not_answered_when_it_is_replayed(desk):
    body = desk.mail(headers={"Auto-Submitted": "auto-replied"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inbound, "classify", explode)
        assert desk.post(body)["status"] == "quarantined"
    desk.run("rejected", "replay")
    assert (desk.count("message"), desk.count("outbox"), desk.count("rejected")) == (1, 0, 0)


# Seconds without a write (failing) or a read (blind); whether the file is there.
@pytest.mark.parametrize(("trouble", "is_there", "ends"), [
    ({}, True, False),
    ({"failing_since": 61}, True, True),
    ({"blind_since": 61}, True, True),
    ({"failing_since": 9, "blind_since": 9}, True, False),
    ({"failing_since": 61, "blind_since": 61}, False, False),   # it would make an empty one
])
def test_a_server_ends_when_only_a_new_process_can_help(
        tmp_path, monkeypatch, trouble, is_there, ends):
    path = tmp_path / "inbound.db"
    store = inbound.Store(str(path))
    store.open()
    store.close()
    monkeypatch.setattr(store, "rows", refuse)
    for name, seconds in trouble.items():
        setattr(store, name, time.monotonic() - seconds)
    if not is_there:
        path.unlink()
    signals, stopping = [], threading.Event()
    monkeypatch.setattr(inbound.os, "kill", lambda *args: signals.append(args[1]))
    monkeypatch.setattr(store.has_mail, "wait", lambda seconds: stopping.set())
    inbound.run_courier(store, stopping)
    assert signals == [signal.SIGUSR1] * ends


def test_a_server_with_nothing_to_do_finds_out_that_it_can_write_again(desk):
    desk.store.failing_since = time.monotonic() - 9     # somebody held the lock for a while
    [account] = desk.store.accounts()
    inbound.deliver_for(desk.store, account)
    assert desk.store.failing_since == 0
    assert desk.count("message") == 0


def refuse(*_):
    raise inbound.Refused(503, "the database cannot be read: disk I/O error")


def test_a_read_that_fails_is_timed_until_one_succeeds(tmp_path):
    store = inbound.Store(str(tmp_path / "inbound.db"))
    store.open()
    with pytest.raises(inbound.Refused):
        store.rows("SELECT * FROM missing")
    began = store.blind_since
    with pytest.raises(inbound.Refused):
        store.rows("SELECT * FROM missing")
    assert 0 < began == store.blind_since
    store.accounts()
    assert store.blind_since == 0
    store.close()


def test_nobody_waits_long_behind_a_read_that_does_not_end(tmp_path, monkeypatch):
    store = inbound.Store(str(tmp_path / "inbound.db"))
    store.open()
    monkeypatch.setattr(inbound, "BUSY_TIMEOUT", 0.05)
    with store._reader_lock, pytest.raises(inbound.Refused, match="has not answered others"):
        store.accounts()
    assert len(store.accounts()) == 1
    store.close()
