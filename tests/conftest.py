"""What the tests stand on: a desk in this process, a real server in its own, a real SMTP sink.

`desk` is the WSGI callable under WebTest (whose lint is wsgiref.validate's) with a database file of its
own and a clock that only moves when it is told to. `serve` starts the installed command as a user would.
"""

import contextlib
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import webtest
from aiosmtpd.controller import Controller

import inbound

HERE = Path(__file__).parent
URL = "/api/helpdesk/inbound-email"
SECRET = "a-secret-of-the-tests-0123456789"
NOON = 1_790_000_000


class Clock:
    """Seconds UTC that stand still until `advance` is called."""

    def __init__(self):
        self.now = NOON

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


class Desk:
    """One database file with the app in front of it, and the command line beside it."""

    def __init__(self, path, clock):
        self.path, self.clock = path, clock
        self.store = inbound.Store(str(path), clock)
        self.store.open()
        self.app = webtest.TestApp(inbound.make_app(self.store))
        self.execute("UPDATE email_account SET inbound_secret = ?, address = ?", SECRET,
                     "support@helpdesk.example")

    def request(self, body, content_type="application/json", *, url=URL, headers=None):
        """POST `body` (dict or list as JSON, str or bytes as they are); return WebTest's response."""
        if isinstance(body, (dict, list)):
            body = json.dumps(body)
        if isinstance(body, str):
            body = body.encode("utf-8", "surrogatepass")
        headers = {"X-Mobieus-Inbound-Secret": SECRET} if headers is None else headers
        return self.app.post(url, body, headers=headers, content_type=content_type,
                             expect_errors=True)

    def post(self, body, content_type="application/json", *, status=200, **more):
        """POST `body`, assert the HTTP status, return the answer's JSON object."""
        response = self.request(body, content_type, **more)
        assert response.status_int == status, response.text
        return response.json

    def mail(self, **fields):
        """A canonical body of a person's first mail, with `fields` put over it (None takes a field away)."""
        body = {"from": "Ada Lovelace <ada@customer.example>", "subject": "Printer on fire",
                "text": "It burns.", "message_id": "<first@customer.example>"} | fields
        return {name: value for name, value in body.items() if value is not None}

    def post_file(self, path, content_type="message/rfc822", **more):
        """POST a file below tests/ as it is."""
        return self.post((HERE / path).read_bytes(), content_type, **more)

    def run(self, *argv, stdin="", status=0):
        """Run the command line in this process on this database; return what it printed."""
        out, err = io.StringIO(), io.StringIO()
        before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8")
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = inbound.main(["--db", str(self.path), *argv], clock=self.clock)
        finally:
            sys.stdin = before
        assert code == status, (code, out.getvalue(), err.getvalue())
        return out.getvalue() + err.getvalue()

    def show(self, reference):
        """What `show REFERENCE --json` prints, parsed."""
        return json.loads(self.run("show", reference, "--json"))

    def sql(self, query, *parameters):
        """All rows of `query`, each a tuple, on a connection of its own."""
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            return connection.execute(query, parameters).fetchall()

    def execute(self, statement, *parameters):
        """Change the database as an admin would, from outside."""
        with contextlib.closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute(statement, parameters)

    def count(self, table):
        return self.sql(f"SELECT count(*) FROM {table}")[0][0]


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def desk(tmp_path, clock):
    desk = Desk(tmp_path / "inbound.db", clock)
    yield desk
    desk.store.close()


class Sink(Controller):
    """A real SMTP server on a free port that keeps every mail; `answers` holds its refusals."""

    def __init__(self):
        self.received, self.answers, self.arrived = [], {}, threading.Condition()
        super().__init__(self, hostname="127.0.0.1", port=0)

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

    def wait(self, count, timeout=20):
        """Block until `count` mails have been accepted; return them."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.received) >= count, timeout), self.received
            return list(self.received)


@pytest.fixture
def sink():
    sink = Sink()
    sink.start()
    yield sink
    sink.stop()


class Served:
    """`inbound serve` in a process of its own, on a free port."""

    def __init__(self, path, *argv, env=None):
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "error"} | (env or {})
        self.log = open(f"{path}.log", "ab")
        self.process = subprocess.Popen(
            [sys.executable, inbound.__file__, "--db", str(path), "serve",
             "--listen", "127.0.0.1:0", *argv],
            stdout=subprocess.PIPE, stderr=self.log, env=environment, text=True)
        self.path, self.greeting = Path(path), ""
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", self.greeting)):
            line = self.process.stdout.readline()
            assert line, Path(f"{path}.log").read_text()
            self.greeting += line
        self.port = int(found[1])

    def stop(self, signum=signal.SIGTERM):
        """Send `signum`, wait for the end, return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        self.greeting += self.process.communicate(timeout=20)[0]
        self.log.close()
        return self.process.returncode


@pytest.fixture
def serve(tmp_path):
    running = []

    def start(name="inbound.db", *argv, **more):
        running.append(Served(tmp_path / name, *argv, **more))
        return running[-1]

    yield start
    for served in running:
        served.stop()


def eventually(condition, timeout=20):
    """Poll `condition` until it is true; return its value. For what another process does."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.02)
    return value
