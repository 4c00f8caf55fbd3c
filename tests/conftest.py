"""What the tests stand on: a desk in this process, a real server in its own, a real SMTP sink.

`desk` is the WSGI callable between wsgiref.validate and WebTest, with a database file of its own
and a clock that only moves when it is told to. `serve` starts the command as a user would.

A test that starts a process is marked `slow`, by itself or because it uses `serve` or
`certificates`; one that is not marked and starts one fails. Without them all takes 20 s.
"""

import contextlib
import http.client
import io
import json
import os
import re
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from wsgiref.validate import validator

import pytest
import webtest
from aiosmtpd.controller import Controller
from hypothesis import settings

import inbound

HERE = Path(__file__).parent
URL = "/api/helpdesk/inbound-email"
HEADER = "X-Mobieus-Inbound-Secret"
SECRET = "a-secret-of-the-tests-0123456789"
WRONG = "b-secret-of-the-tests-0123456789"
NOON = 1_790_000_000
DAY = 86400

settings.register_profile("ci", derandomize=True)   # what failed there fails here too
if os.environ.get("CI"):
    settings.load_profile("ci")


# What is slow -------------------------------------------------------------------------------------

START_PROCESSES = {"serve", "certificates"}
running_test = {"that is quick": None}


def pytest_collection_modifyitems(items):
    for item in items:
        if START_PROCESSES & {*item.fixturenames}:
            item.add_marker("slow")


@sys.addaudithook
def refuse_processes(event, args):
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn") and running_test["that is quick"]:
        raise RuntimeError(f"{running_test['that is quick']} starts a process: mark it slow")


@pytest.fixture(autouse=True)
def quick_tests_start_no_process(request):
    is_slow = request.node.get_closest_marker("slow")
    running_test["that is quick"] = None if is_slow else request.node.name
    yield
    running_test["that is quick"] = None


def missing(reason):
    """Skip for want of something on this machine. In CI, where all of it has to be, fail."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def need(program):
    if not shutil.which(program):
        missing(f"{program} is not installed")


# Limits -------------------------------------------------------------------------------------------

class Used:
    """Processor seconds of a process: `seconds` since it was made, and up to `stop`."""

    def __init__(self, pid):
        self.pid, self.seconds = pid, None
        self.began = self.now()

    def now(self):
        if self.pid is None:
            return time.process_time()
        # proc(5): utime and stime are fields 14 and 15; the 2nd, in brackets, may hold blanks.
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self):
        self.seconds = self.now() - self.began


@contextlib.contextmanager
def processor_seconds(pid=None):
    """Measure what the block costs this process, or process `pid`; `.seconds` is set at its end.

    A limit on work is one of processor time: a busy machine has no say in it.
    """
    used = Used(pid)
    yield used
    used.stop()


LONG = 60       # seconds: what has not come by then never comes, however busy the machine is


def eventually(condition, timeout=LONG):
    """Poll `condition` until it is true; return its value. For what another process does."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.02)
    return value


def at_least_once(attempt, tries=4):
    """Assert that `attempt()` is true in one of some tries: a machine that stalls spoils a try.

    For what has to come before something that takes seconds: where it does not, no try is true.
    """
    assert any(attempt() for _ in range(tries)), "it came too late, each time"


@pytest.fixture
def impatient(monkeypatch):
    """Shorten the waits of SPEC 2 and 4 by the names they have; without, a test takes longer."""
    monkeypatch.setattr(inbound, "BUSY_TIMEOUT", 0.1, raising=False)
    monkeypatch.setattr(inbound, "DELIVERY", 0.2, raising=False)


# A database file ----------------------------------------------------------------------------------

class File:
    """A database file, looked into and changed from outside, as an admin does."""

    def __init__(self, path):
        self.path = Path(path)

    def sql(self, query, *parameters):
        """All rows of `query`, each a tuple, on a connection of its own."""
        with contextlib.closing(sqlite3.connect(self.path, timeout=LONG)) as connection:
            return connection.execute(query, parameters).fetchall()

    def records(self, query, *parameters):
        """The same, each a dict."""
        with contextlib.closing(sqlite3.connect(self.path, timeout=LONG)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(query, parameters)]

    def execute(self, statement, *parameters):
        """Change the database."""
        with contextlib.closing(sqlite3.connect(self.path, timeout=LONG)) as connection, connection:
            connection.execute(statement, parameters)

    def count(self, table):
        return self.sql(f"SELECT count(*) FROM {table}")[0][0]

    def set_account(self, **columns):
        """Set columns of every email account."""
        sets = ", ".join(f"{name} = ?" for name in columns)
        self.execute(f"UPDATE email_account SET {sets}", *columns.values())

    def send_to(self, port, **columns):
        """Make what listens on `port` here the relay, unencrypted if `columns` say nothing else."""
        self.set_account(**{"smtp_host": "127.0.0.1", "smtp_port": port,
                            "smtp_security": "none"} | columns)

    @contextlib.contextmanager
    def locked(self):
        """Another process' write transaction, as `sqlite3 inbound.db` with an open BEGIN is one."""
        with contextlib.closing(sqlite3.connect(
                self.path, timeout=LONG, isolation_level=None)) as holder:
            holder.execute("BEGIN IMMEDIATE")
            yield holder
            if holder.in_transaction:
                holder.execute("ROLLBACK")

    def dump(self):
        """The whole content, as lines of SQL."""
        with contextlib.closing(sqlite3.connect(self.path, timeout=LONG)) as connection:
            return list(connection.iterdump())


# A desk -------------------------------------------------------------------------------------------

def mail_from(name, **fields):
    """A canonical body that nobody else sends: `name` is in every part of it.

    Each has a domain of its own, or a cap on confirmations to one domain would be felt.
    """
    return {"from": f"{name}@{name}.example", "subject": f"subject {name}", "text": f"text {name}",
            "message_id": f"<{name}@customer.example>"} | fields


class Clock:
    """Seconds UTC that stand still until `advance` is called."""

    def __init__(self):
        self.now = NOON

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


class Desk(File):
    """One database file with the app in front of it, and the command line beside it."""

    def __init__(self, path, clock):
        super().__init__(path)
        self.clock = clock
        self.store = inbound.Store(str(path), clock)
        self.store.open()
        self.app = webtest.TestApp(validator(inbound.make_app(self.store)), lint=False)

    def request(self, body, content_type="application/json", *, url=URL, headers=None):
        """POST `body` (dict or list as JSON, str or bytes as they are): WebTest's response."""
        if isinstance(body, (dict, list)):
            body = json.dumps(body)
        if isinstance(body, str):
            body = body.encode("utf-8", "surrogatepass")
        headers = {HEADER: SECRET} if headers is None else headers
        return self.app.post(url, body, headers=headers, content_type=content_type,
                             expect_errors=True)

    def post(self, body, content_type="application/json", *, status=200, **more):
        """POST `body`, assert the HTTP status, return the answer's JSON object."""
        response = self.request(body, content_type, **more)
        assert response.status_int == status, response.text
        return response.json

    def mail(self, **fields):
        """A canonical body of a person's first mail; `fields` stand over it, None removes one."""
        body = {"from": "Ada Lovelace <ada@customer.example>", "subject": "Printer on fire",
                "text": "It burns.", "message_id": "<first@customer.example>"} | fields
        return {name: value for name, value in body.items() if value is not None}

    def post_file(self, path, content_type="message/rfc822", **more):
        """POST a file below tests/ as it is."""
        return self.post((HERE / path).read_bytes(), content_type, **more)

    def forget_all(self):
        """Take every ticket and all that belongs to it out of the database."""
        def work(db, now):
            for table in ("outbox", "attachment", "message", "ticket"):
                db.execute(f"DELETE FROM {table}")
        self.store.write(work)

    def health(self):
        """GET /healthz: (status, object)."""
        response = self.app.get("/healthz", expect_errors=True)
        assert response.content_type == "application/json"
        return response.status_int, response.json

    def run(self, *argv, stdin="", status=0):
        """Run the command line in this process on this database; return what it printed."""
        out, err = io.StringIO(), io.StringIO()
        before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8")
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = inbound.main(["--db", str(self.path), *argv], clock=self.clock)
        except SystemExit as end:       # argparse ends like this
            code = end.code
        finally:
            sys.stdin = before
        assert code == status, (code, out.getvalue(), err.getvalue())
        return out.getvalue() + err.getvalue()

    def show(self, reference):
        """What `show REFERENCE --json` prints, parsed."""
        return json.loads(self.run("show", reference, "--json"))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(scope="session")
def new_file(tmp_path_factory):
    """A database with the tests' secret and address that nobody has open. Tests copy it."""
    file = File(tmp_path_factory.mktemp("new") / "inbound.db")
    with contextlib.closing(inbound.Store(str(file.path), Clock())) as store:
        store.open()
    file.set_account(inbound_secret=SECRET, address="support@helpdesk.example")
    return file


@pytest.fixture
def folder(request):
    """Where the test's database is: for quick tests in memory, where a sync takes no time."""
    if request.node.get_closest_marker("slow") or not os.path.isdir("/dev/shm"):
        yield request.getfixturevalue("tmp_path")
    else:
        with tempfile.TemporaryDirectory(prefix="inbound-", dir="/dev/shm") as name:
            yield Path(name)


@pytest.fixture
def file(new_file, folder):
    """A database file of the test's own that nobody has open yet; `serve` serves this one."""
    return File(shutil.copy(new_file.path, folder / "inbound.db"))


@pytest.fixture
def desk(file, clock):
    desk = Desk(file.path, clock)
    yield desk
    desk.store.close()


@pytest.fixture(scope="module")
def desk_of_all(new_file, tmp_path_factory):
    """A desk that the tests of a module share, made as `desk` is."""
    place = "/dev/shm" if os.path.isdir("/dev/shm") else tmp_path_factory.mktemp("all")
    with tempfile.TemporaryDirectory(prefix="inbound-", dir=place) as name:
        desk = Desk(shutil.copy(new_file.path, Path(name) / "inbound.db"), Clock())
        yield desk
        desk.store.close()


@pytest.fixture
def bare(desk_of_all):
    """`desk_of_all` without a ticket; for tables of tests that change no setting."""
    desk_of_all.forget_all()
    return desk_of_all


# SMTP ---------------------------------------------------------------------------------------------

class Sink(Controller):
    """A real SMTP server on a free port that keeps every mail; `answers` holds its refusals."""

    def __init__(self):
        self.received, self.answers, self.arrived = [], {}, threading.Condition()
        super().__init__(self, hostname="127.0.0.1", port=0, ready_timeout=LONG)

    async def handle_RCPT(self, server, session, envelope, address, options):
        envelope.rcpt_tos.append(address)
        return self.answers.get("RCPT", "250 OK")

    async def handle_DATA(self, server, session, envelope):
        answer = self.answers.get("DATA", "250 OK")
        if answer.startswith("250"):
            with self.arrived:
                self.received.append(envelope)
                self.arrived.notify_all()
        return answer

    def _trigger_server(self):
        # aiosmtpd connects to the port it was asked for; ours is 0 until the kernel has chosen one.
        self.port = self.server.sockets[0].getsockname()[1]
        super()._trigger_server()

    def wait(self, count, timeout=LONG):
        """Block until `count` mails have been accepted; return them."""
        with self.arrived:
            has_come = self.arrived.wait_for(lambda: len(self.received) >= count, timeout)
            assert has_come, self.received
            return list(self.received)


@contextlib.contextmanager
def started(sink):
    sink.start()
    yield sink
    sink.stop()


@pytest.fixture
def sink():
    with started(Sink()) as sink:
        yield sink


# A server -----------------------------------------------------------------------------------------

class Served(File):
    """`inbound serve` in a process of its own, on a free port."""

    def __init__(self, path, *argv, env=None):
        super().__init__(path)
        # At the end waitress leaves it to the process to close what clients have not closed.
        environment = {**os.environ, "PYTHONUNBUFFERED": "1",
                       "PYTHONWARNINGS": "error,ignore::ResourceWarning"}
        with Path(f"{path}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, inbound.__file__, "--db", str(path), "serve",
                 "--listen", "127.0.0.1:0", *argv],
                stdout=subprocess.PIPE, stderr=log, env=environment | (env or {}), text=True)
        self.greeting = ""
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", self.greeting)):
            line = self.process.stdout.readline()
            assert line, self.log_text()
            self.greeting += line
        self.port = int(found[1])

    def post(self, body, *, url=URL, headers=None, timeout=LONG):
        """POST over a socket of its own: (status, headers, object). The body: a dict, or bytes.

        OSError or HTTPException when the server is gone.
        """
        with contextlib.closing(self.send(body, url, headers, timeout)) as connection:
            response = connection.getresponse()
            return response.status, response.headers, json.loads(response.read())

    def send(self, body, url=URL, headers=None, timeout=LONG):
        """The same, but wait for no answer: the connection."""
        if isinstance(body, dict):
            body = json.dumps(body)
        headers = {HEADER: SECRET} if headers is None else headers
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("POST", url, body, {"Content-Type": "application/json"} | headers)
        except OSError:
            connection.close()
            raise
        return connection

    def log_text(self):
        return Path(f"{self.path}.log").read_text()

    def stop(self, signum=signal.SIGTERM):
        """Send `signum`, wait for the end, return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        self.greeting += self.process.communicate(timeout=LONG)[0]
        return self.process.returncode


def is_answered(connection):
    """Whether an answer has begun to come; or the end."""
    return bool(select.select([connection.sock], [], [], 0)[0])


@pytest.fixture
def serve(tmp_path):
    running = []

    def start(name="inbound.db", *argv, **more):
        running.append(Served(tmp_path / name, *argv, **more))
        return running[-1]

    yield start
    for served in running:
        served.stop()
