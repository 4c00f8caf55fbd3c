"""Faults: what breaks in operation, done to a running `inbound serve`, and what it cost.

    python tests/faults.py [--scale 1] [--sizes 1,4] [--seed N] [NAME ...]
    python tests/faults.py --mutants [NAME ...]

Each fault starts the program of the folder above as a user does, posts over HTTP, reads the file
with SQLite and takes the mail at a relay of its own; nothing of the program is imported. One table
is printed; exit 1 when a promise broke. `--mutants` runs programs that were broken on purpose and
says which were caught: a fault that catches none shows nothing.

Linux. `calls` and `power` need strace; a part of `full` and `readonly` needs root, and is done
another way or said to be left out without it.
"""

import argparse
import base64
import collections
import contextlib
import dataclasses
import functools
import http.client
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import socketserver
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent.parent / "inbound.py"
URL = "/api/helpdesk/inbound-email"
SECRET = "a-secret-of-the-faults-0123456789"
VALIDATION_KEY = "a-key-of-the-faults"
MB = 1_000_000

# What is allowed, where a promise has a number.
LAST_REFUSAL = 6        # seconds from the first 503 to the last, 60 posts before a locked database
PROBE = 1               # seconds for another client's GET beside a slow post; SPEC 3.0
PROBE_LOCKED = 5        # seconds for a GET while all wait for the lock: two lock time-outs and some
LOCKED = 16             # seconds of a lock that begins before a 250 can be noted
EXIT = 6                # seconds from SIGTERM to the end; FAULTS 4, T15
CPU_PER_MB = 0.5        # processor seconds, and this many of its bytes in memory: SPEC 3.0
CPU_ALLOWANCE = 0.1     # seconds, whatever the size
MEMORY_FACTOR = 5
MEMORY_ALLOWANCE = 8    # MB, whatever the size
BOMB = 32               # MB that a relay's words may cost
GIVE_UP_AFTER = 90      # seconds in which a server that can no longer write ends itself

# The only places that know more of the schema than SPEC 5 fixes.
UNCONFIRMED = """SELECT reference FROM ticket WHERE NOT EXISTS (SELECT 1 FROM outbox
    JOIN message ON message.id = outbox.message WHERE message.ticket = ticket.id)"""
WAITING = "SELECT count(*) FROM outbox WHERE state IN ('queued', 'sending')"
MAKE_DUE = "UPDATE outbox SET next_attempt_at = 0 WHERE state IN ('queued', 'sending')"


# The ground -------------------------------------------------------------------------------------

@dataclasses.dataclass
class Result:
    """A row of the table. `broken`: a sentence for each promise that did not hold."""

    cycles: int = 0
    acknowledged: int = 0
    lost: int = 0
    twice: int = 0
    extra: int | None = None        # confirmations more than one a ticket; None: not looked at
    seconds: float | None = None    # of processor, the worst input
    memory: float | None = None     # MB over idle, the worst input
    broken: list = dataclasses.field(default_factory=list)
    notes: list = dataclasses.field(default_factory=list)

    def require(self, is_kept, sentence):
        if not is_kept:
            self.broken.append(sentence)


class Relay(socketserver.ThreadingTCPServer):
    """An SMTP server that keeps every mail; `fault()` is asked once a mail what goes wrong."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), RelaySession)
        self.lock = threading.Lock()
        self.reset()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self, fault=lambda: ""):
        """Forget all mail. `fault` returns '' or rcpt, data (451), drop, reset, hang (after DATA),
        slow (half a second before the 250), ehlo or endless (a reply without end)."""
        with self.lock:
            self.fault, self.drops, self.arrived = fault, 0, threading.Event()
            self.received = collections.defaultdict(list)       # Message-ID → its copies

    def keep(self, mail):
        message_id = re.search(rb"(?im)^message-id:\s*(<[^>]+>)", mail)[1].decode()
        with self.lock:
            self.received[message_id].append(mail)

    def copies(self):
        with self.lock:
            return {message_id: [*mails] for message_id, mails in self.received.items()}


class RelaySession(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True

    def say(self, line):
        self.wfile.write(line.encode() + b"\r\n")

    def handle(self):
        with contextlib.suppress(OSError):
            self.talk()

    def talk(self):
        fault = ""
        self.say("220 relay.example")
        for line in self.rfile:
            verb = line[:4].upper()
            if verb == b"EHLO" and self.server.fault() == "ehlo":
                return self.say_endlessly()
            if verb == b"MAIL":
                fault = self.server.fault()
            if verb == b"QUIT":
                return self.say("221 bye")
            if verb == b"RCPT" and fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                           struct.pack("ii", 1, 0))
                return None
            if verb == b"DATA":
                self.say("354 go on")
                if not self.take(fault):
                    return None
            else:
                self.say("451 later" if verb == b"RCPT" and fault == "rcpt" else "250 ok")
        return None

    def take(self, fault):
        """Read a mail and answer; return whether the session goes on."""
        mail = b""
        while (line := self.rfile.readline()) != b".\r\n":
            if not line:        # the client was killed: no mail
                return False
            mail += line.removeprefix(b".")
        if fault == "data":
            self.say("451 later")
            return True
        if fault == "hang":
            time.sleep(60)
            return False
        if fault == "endless":
            return self.say_endlessly()
        self.server.keep(mail)
        if fault == "slow":
            self.server.arrived.set()
            time.sleep(0.5)
        if fault == "drop":
            with self.server.lock:
                self.server.drops += 1
            return False
        self.say("250 taken")
        return True

    def say_endlessly(self):
        while True:
            self.wfile.write(b"250-and another thing\r\n" * 1000)


class Served:
    """`inbound serve` in a process of its own, on a free port, its log beside the database."""

    def __init__(self, path, *prefix, env):
        self.log = None
        if os.access(path.parent, os.W_OK):
            self.log = open(f"{path}.log", "ab")    # noqa: SIM115 (closed with the server)
        self.server = subprocess.Popen(
            [*prefix, sys.executable, PROGRAM, "--db", path, "serve", "--listen", "127.0.0.1:0"],
            env=env, text=True, stdout=subprocess.PIPE, stderr=self.log or subprocess.DEVNULL)
        self.pid, self.greeting, self.port = self.server.pid, "", None
        while self.port is None:
            line = self.server.stdout.readline()
            if not line:
                raise NotServed(f"serve ended with {self.server.wait()} before it listened")
            self.greeting += line
            if found := re.search(r"127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
        threading.Thread(target=self.read_on, daemon=True).start()

    def read_on(self):
        with contextlib.suppress(ValueError):
            for line in self.server.stdout:
                self.greeting += line

    def post(self, body, **more):
        return post(self.port, body, **more)

    def is_alive(self):
        return self.server.poll() is None

    def end(self, signum=signal.SIGKILL, timeout=20):
        """Send the signal, wait, return (exit code, seconds); killed in the end, whatever comes."""
        began = time.monotonic()
        if self.is_alive():
            self.server.send_signal(signum)
        try:
            code = self.server.wait(timeout)
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.wait()
            code = "never"
        if self.log:
            self.log.close()
        return code, time.monotonic() - began

    def cpu(self):
        """Seconds of processor that it has used, all threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self, name):
        """MB of VmRSS (now) or VmHWM (the most since `forget_peak`)."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+)", status)[1]) * 1024 / MB

    def forget_peak(self):
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")


class NotServed(Exception):
    """`serve` ended before it listened."""


class Ground:
    """What one fault stands on: a folder, a relay, a scale, and what makes a mutant."""

    def __init__(self, folder, relay, *, scale=1.0, sizes=(1, 4), hook="", prepare="", inputs=""):
        self.folder, self.relay, self.scale, self.sizes = Path(folder), relay, scale, sizes
        self.hook, self.prepare, self.inputs = hook, prepare, inputs
        self.running, self.table = [], []
        (self.folder / "spool").mkdir()
        self.env = {**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(self.folder / "spool")}
        relay.reset()

    def scaled(self, count):
        return max(1, round(count * self.scale))

    def database(self, name="desk"):
        """A folder of its own with a database that has the secret and the relay; its path."""
        path = self.folder / name / "inbound.db"
        shutil.copytree(template(self.relay), path.parent, dirs_exist_ok=True)
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.executescript(self.prepare)
        return path

    def serve(self, path, *prefix, hook=""):
        """Start a server; `hook` and the mutant's run in it before the program does."""
        folder = self.folder / "hook"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(hook + self.hook)
        env = self.env | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        served = Served(path, *prefix, env=env)
        self.running.append(served)
        return served

    def end_all(self):
        for served in self.running:
            served.end()


@functools.cache
def template(relay):
    """The folder of a database as an admin sets it up: by the first `serve` and the verbs."""
    folder = Path(tempfile.mkdtemp(prefix="inbound-template-"))
    path = folder / "inbound.db"
    served = Served(path, env=os.environ)
    try:
        verb(path, "secret", "set", SECRET)
        verb(path, "account", "set", "address=support@helpdesk.example", "smtp_host=127.0.0.1",
             f"smtp_port={relay.server_address[1]}", "smtp_security=none",
             "confirmations_per_hour=1000000", f"validation_key={VALIDATION_KEY}")
    finally:
        served.end(signal.SIGTERM)
    Path(f"{path}.log").unlink()
    return folder


def verb(path, *words):
    """Run a verb of the program on the database, as an admin does; return what it printed."""
    return subprocess.run([sys.executable, PROGRAM, "--db", path, *words], capture_output=True,
                          text=True, check=True).stdout


def say(*words):
    print(time.strftime("%H:%M:%S"), *words, file=sys.stderr, flush=True)


# Posting and looking ----------------------------------------------------------------------------

def mail(name, parent=None, **fields):
    """A person's mail that nobody else sends, as JSON; each from a domain of its own."""
    body = {"from": f"ada@{name}.example", "subject": f"subject {name}",
            "text": f"text {name} " * 100, "message_id": id_of(name)}
    if parent:
        body["in_reply_to"] = id_of(parent)
    return json.dumps(body | fields).encode()


def id_of(name):
    return f"<{name}@{name}.example>"


def post(port, body, *, content_type="application/json", secret=SECRET, timeout=30):
    """POST; (status, JSON object). (0, {}) when no whole answer came: nothing was promised then."""
    headers = {"Content-Type": content_type}
    if secret is not None:
        headers["X-Mobieus-Inbound-Secret"] = secret
    status, text = request(port, "POST", URL, body, headers, timeout)
    try:
        return status, json.loads(text)
    except ValueError:
        return (status if status != 200 else 0), {}


def request(port, method, url, body=None, headers=None, timeout=30):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        with contextlib.closing(connection):
            connection.request(method, url, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""


def health(served):
    return request(served.port, "GET", "/healthz")[0]


class Prober(threading.Thread):
    """Another client, that asks for the endpoint's line again and again: `worst` of its waits."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.port, self.worst, self.stopping = port, 0.0, threading.Event()

    def run(self):
        while not self.stopping.wait(0.02):
            began = time.monotonic()
            status, _ = request(self.port, "GET", URL, timeout=60)
            taken = time.monotonic() - began
            self.worst = max(self.worst, taken if status == 200 else 60)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.join()


class Load:
    """Senders as providers are: each repeats the same bytes until they are answered with 200."""

    def __init__(self, senders=4, name="m", secret=SECRET):
        self.port, self.stopping, self.acknowledged = None, threading.Event(), {}
        self.name, self.secret, self.parents = name, secret, {}
        self.threads = [threading.Thread(target=self.send, args=(number,), daemon=True)
                        for number in range(senders)]

    def start(self, port):
        self.port = port
        for thread in self.threads:
            thread.start()
        return self

    def send(self, sender):
        """Every third mail answers the one before, so that it has a ticket to go to."""
        previous = None
        for count in itertools.count():
            name = f"{self.name}{sender}-{count}"
            parent = previous if count % 3 == 2 else None
            # Who answers is who wrote: a stranger's reply is another case.
            more = {"from": f"ada@{parent}.example"} if parent else {}
            body = mail(name, parent, **more)
            while True:
                if self.stopping.is_set():
                    return
                status, answer = post(self.port, body, secret=self.secret, timeout=10)
                if status == 200:
                    break
                self.stopping.wait(0.01)
            self.acknowledged[id_of(name)] = answer
            if parent:
                self.parents[id_of(name)] = id_of(parent)
            previous = name

    def wait(self, count, timeout):
        """Block until so many are acknowledged, or the time is over."""
        eventually(lambda: len(self.acknowledged) >= count, timeout)

    def stop(self):
        self.stopping.set()
        for thread in self.threads:
            thread.join()
        return self.acknowledged


def rows(path, query, *parameters):
    with contextlib.closing(sqlite3.connect(path, timeout=10)) as connection:
        return connection.execute(query, parameters).fetchall()


def execute(path, statement):
    with contextlib.closing(sqlite3.connect(path, timeout=10)) as connection, connection:
        connection.execute(statement)


def stored(path):
    """{Message-ID: [reference, …]} of all received messages, repeats kept."""
    found = collections.defaultdict(list)
    for message_id, reference in rows(path, """SELECT message_id, reference FROM message
            JOIN ticket ON ticket.id = message.ticket WHERE direction = 'in'"""):
        found[message_id].append(reference)
    return found


def audit(result, path, acknowledged, parents=None):
    """Hold what was answered with 200 against the file; add up in `result`."""
    try:
        found = stored(path)
        sound = rows(path, "PRAGMA integrity_check") == [("ok",)]
    except sqlite3.Error as error:
        result.broken.append(f"the file cannot be read: {error}")
        result.lost += len(acknowledged)
        return
    lost = [known for known in acknowledged if known not in found]
    result.acknowledged += len(acknowledged)
    result.lost += len(lost)
    result.twice += sum(len(places) > 1 for places in found.values())
    wrong = [known for known, answer in acknowledged.items()
             if known in found and answer.get("ticket") not in found[known]]
    wrong += [known for known, parent in (parents or {}).items()
              if known in found and parent in found and found[known] != found[parent]]
    result.require(sound, "integrity_check finds the file malformed")
    result.require(not rows(path, "PRAGMA foreign_key_check"), "foreign keys point nowhere")
    result.require(not wrong, f"{len(wrong)} messages are on another ticket than was answered")
    bare = rows(path, UNCONFIRMED)
    result.require(not bare, f"{len(bare)} tickets without an outbox row")


def eventually(condition, timeout):
    """Poll until it is true or the time is over; return its last value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return value


def drained(path, timeout=30):
    return eventually(lambda: rows(path, WAITING) == [(0,)], timeout)


@contextlib.contextmanager
def mounted(folder, *commands):
    """Run mount commands on a folder and undo them; yields whether they worked (root)."""
    done = [subprocess.run(command, capture_output=True).returncode == 0 for command in commands]
    try:
        yield all(done)
    finally:
        for _ in filter(None, done[:1]):
            subprocess.run(["umount", "-l", str(folder)], capture_output=True)


# The faults -------------------------------------------------------------------------------------

def kill(ground):
    """kill -9 every 20 to 600 ms under four senders; the relay fails a fifth of all mail."""
    result, path, choose = Result(extra=0), ground.database(), random.Random(random.random())
    faults = ["rcpt", "data", "drop", "reset"]
    ground.relay.reset(lambda: choose.choice(faults) if choose.random() < 0.2 else "")
    load, result.cycles = Load(), ground.scaled(40)
    for cycle in range(result.cycles):
        served = ground.serve(path)
        load.port = served.port
        if cycle == 0:
            load.start(served.port)
        time.sleep(choose.uniform(0.02, 0.6))
        served.end()
        if cycle % 10 == 9:
            say(f"kill: {cycle + 1} kills, {len(load.acknowledged)} acknowledged")
    load.stop()
    ground.relay.fault = lambda: ""
    execute(path, MAKE_DUE)     # else a retry comes due after a minute, a dead lease after 45 s
    served = ground.serve(path)
    result.require(drained(path), f"{rows(path, WAITING)[0][0]} confirmations never left")
    served.end(signal.SIGTERM)
    audit(result, path, load.acknowledged, load.parents)
    copies, ours = ground.relay.copies(), rows(
        path, "SELECT message_id FROM message WHERE direction = 'out'")
    missing = sum(own not in copies for own, in ours)
    result.require(not missing, f"{missing} confirmations are lost")
    result.extra = sum(len(mails) - 1 for mails in copies.values())
    # One courier has one mail under way when it is killed, and a drop hides the 250 of one.
    allowed = result.cycles + ground.relay.drops
    result.require(result.extra <= allowed, f"{result.extra} extra copies, {allowed} at most")
    result.require(all(len(set(mails)) == 1 for mails in copies.values()),
                   "copies of one confirmation differ")
    most = max(map(len, copies.values()), default=0)
    result.notes.append(f"{ground.relay.drops} drops after DATA, at most {most} copies of one")
    return result


# Locks first: a server that cannot write any more has a minute to end, while the rest is done.
INJECTIONS = [("fcntl", "error=EIO"), ("pwrite64,write", "error=ENOSPC"),
              ("pwrite64,write", "error=EIO"), ("fdatasync,fsync", "error=EIO"),
              ("pread64,read", "error=EIO"), ("pwrite64", "signal=KILL"),
              ("fdatasync,fsync", "signal=KILL")]


def calls(ground):
    """The n-th write, sync, read, lock or unlock of SQLite's files fails, once or from then on."""
    result = Result()
    if not shutil.which("strace"):
        result.notes.append("left out: strace is not installed")
        return result
    desks, waiting, depth, refused = [Attacked(ground, "calls-0")], [], ground.scaled(12), 0
    for system_calls, fault in INJECTIONS:
        before = refused
        for number in range(1, depth + 1):
            desk = desks[-1]
            when = f"{number}{'+' * (number % 2 == 0)}"
            with traced(desk.served, *desk.options(), "-e", f"trace={system_calls}", "-e",
                        f"inject={system_calls}:{fault}:when={when}") as is_traced:
                result.require(is_traced, "strace may not attach here")
                refused += desk.refusals()
            result.cycles += 1
            if not desk.served.is_alive():
                desk.served = ground.serve(desk.path)
            elif not desk.recovers():
                waiting.append(threading.Thread(target=desk.wait_for_end, daemon=True))
                waiting[-1].start()
                desks.append(Attacked(ground, f"calls-{len(desks)}"))
            if len(waiting) == 3 and system_calls == "fcntl":
                break       # each costs half a minute of time-outs
        say(f"calls: {fault} on {system_calls}, n to {depth}: {refused - before} posts refused")
    for thread in waiting:
        thread.join()
    for desk in desks:
        desk.served.end()
        desk.served = ground.serve(desk.path)       # it recovers by itself
        result.require(desk.post(), "no 200 after the restart")
        desk.served.end(signal.SIGTERM)
        audit(result, desk.path, desk.acknowledged)
    endless = sum(desk.is_endless for desk in desks)
    result.require(refused, "no post was refused: nothing was tried")
    result.require(not endless, f"{endless} servers that could write no more went on for "
                   f"{GIVE_UP_AFTER} s and more")
    result.notes.append(f"{refused} posts refused; {len(waiting)} of {result.cycles} times nothing "
                        "could be written for 3 s and more")
    return result


class Attacked:
    """A server under `calls`, its database, and what it acknowledged."""

    def __init__(self, ground, name):
        self.path, self.acknowledged, self.is_endless = ground.database(name), {}, False
        self.served, self.count = ground.serve(self.path), itertools.count()

    def options(self):
        """strace's: only calls on SQLite's files are counted."""
        return [word for end in ("", "-wal", "-shm") for word in ("-P", f"{self.path}{end}")]

    def post(self):
        """Post a mail, always another: a repeat is answered without a write."""
        return post_all(self.served, self.acknowledged, [f"call-{next(self.count)}"])

    def refusals(self):
        """Post twelve, so that each thread comes to its n-th call; count the refused."""
        refused = 0
        for _ in range(12):
            began = time.monotonic()
            if not self.post():
                refused += 1
            # Killed, or the others would wait as long.
            if not self.served.is_alive() or time.monotonic() - began > 4:
                break
        return refused

    def recovers(self):
        return eventually(lambda: self.post() or not self.served.is_alive(), 3)

    def wait_for_end(self):
        """A server that cannot write any more ends itself in a minute or so, for its unit."""
        deadline = time.monotonic() + GIVE_UP_AFTER
        while self.served.is_alive() and not self.post():
            if time.monotonic() > deadline:
                self.is_endless = True
                return
            time.sleep(1)


def post_all(served, acknowledged, names):
    """Post a mail of each name; note the acknowledged; return whether all were."""
    is_whole = True
    for name in names:
        status, answer = served.post(mail(name), timeout=5)
        if status == 200:
            acknowledged[id_of(name)] = answer
        is_whole = is_whole and status == 200
    return is_whole


@contextlib.contextmanager
def traced(served, *options):
    """Run strace on a live server for a while; yields whether it attached."""
    with subprocess.Popen(["strace", "-f", "-o", "/dev/null", *map(str, options), "-p",
                           str(served.pid)], stderr=subprocess.PIPE, text=True) as strace:
        is_attached = "attached" in strace.stderr.readline()
        try:
            yield is_attached
        finally:
            strace.terminate()      # it lets go of the server, which goes on
            try:
                strace.wait(2)
            except subprocess.TimeoutExpired:   # it waits for one that it has killed
                strace.kill()


def power(ground):
    """A power cut at every acknowledgement, on what the running server wrote and synced."""
    result = Result()
    if not shutil.which("strace"):
        result.notes.append("left out: strace is not installed")
        return result
    fresh = ground.folder / "fresh" / "inbound.db"
    fresh.parent.mkdir()
    for path in (fresh, ground.database("lived")):
        before = {str(file): file.read_bytes() for file in path.parent.iterdir()}
        trace = ground.folder / f"{path.parent.name}.trace"
        # -D: the server is our child, strace its shadow. -xx: every byte as \xNN.
        served = ground.serve(path, "strace", "-D", "-f", "--seccomp-bpf", "-y", "-xx",
                              "-s", "4000000", "-o", trace, "-e", "trace=openat,open,creat,write,"
                              "pwrite64,ftruncate,fsync,fdatasync,rename,unlink,unlinkat,sendto")
        # The fresh one is made under the trace; its secret stands in its greeting.
        secret = secret_of(served) if path is fresh else SECRET
        load = Load(name=path.parent.name, secret=secret).start(served.port)
        load.wait(ground.scaled(150), 60)
        load.stop()
        served.end(signal.SIGTERM)
        eventually(functools.partial(is_written, trace), 5)
        say(f"power: {len(load.acknowledged)} acknowledged on the {path.parent.name} database")
        known = result.acknowledged
        cut_everywhere(result, Disk(before, path.parent), trace, ground.folder / "cut")
        result.require(result.acknowledged - known >= len(load.acknowledged) > 0,
                       "the trace does not show every answer: nothing was tried")
    return result


def is_written(trace):
    """Whether strace has written its last line."""
    return b"+++ exited" in trace.read_bytes()[-200:]


def secret_of(served):
    """The secret that the very first `serve` prints."""
    pattern = re.compile(r"X-Mobieus-Inbound-Secret: ([^'\s]+)")
    return eventually(lambda: pattern.search(served.greeting), 10)[1]


class Disk:
    """What a disk may hold after a cut: what was synced, and any part of what was not.

    A name (created, renamed, removed) is durable once its folder was synced (`strict`, POSIX), or
    once anything was (`ext4`: one journal for all names).
    """

    def __init__(self, files, folder):
        self.folder = str(folder)
        self.names = {name: Inode(content) for name, content in files.items()}
        self.durable = {"strict": {**self.names}, "ext4": {**self.names}}

    def is_ours(self, name):
        return name.startswith(self.folder) and not name.endswith(("-shm", ".log"))

    def apply(self, call, names, texts, numbers):
        """One system call that succeeded."""
        name = names[-1] if names else ""
        if call in ("open", "openat", "creat") and self.is_ours(name):
            if name not in self.names:
                self.names[name] = Inode(b"")
        elif call in ("pwrite64", "write") and name in self.names:
            inode = self.names[name]
            inode.write(numbers[-1] if call == "pwrite64" else inode.length(), texts[-1])
        elif call == "ftruncate" and name in self.names:
            self.names[name].truncate(numbers[-1])
        elif call in ("fsync", "fdatasync"):
            if name in self.names:
                self.names[name].sync()
            if name == self.folder:
                self.durable["strict"] = {**self.names}
            if name == self.folder or name in self.names:
                self.durable["ext4"] = {**self.names}
        elif call in ("unlink", "unlinkat"):
            self.names.pop(texts[-1].decode(), None)
        elif call == "rename" and texts[0].decode() in self.names:
            self.names[texts[1].decode()] = self.names.pop(texts[0].decode())

    def states(self, choose):
        """Yield (words, {name: bytes}) of what a cut now could leave behind."""
        for names in ("strict", "ext4"):
            yield f"{names}, only what was synced", {
                name: inode.after(lambda: False) for name, inode in self.durable[names].items()}
        share = choose.choice((0.1, 0.5, 0.9))
        yield f"ext4, {share:.0%} of the unsynced sectors", {
            name: inode.after(lambda: choose.random() < share)
            for name, inode in self.durable["ext4"].items()}
        yield "all that was written", {
            name: inode.after(lambda: True) for name, inode in self.names.items()}


class Inode:
    SECTOR = 512

    def __init__(self, content):
        self.synced, self.pending = bytes(content), []

    def write(self, offset, text):
        self.pending.append((offset, text))

    def truncate(self, length):
        self.pending.append((length, None))

    def length(self):
        return len(self.after(lambda: True))

    def sync(self):
        self.synced, self.pending = self.after(lambda: True), []

    def after(self, is_written):
        """The bytes when of the unsynced sectors those are written for which it says so."""
        content = bytearray(self.synced)
        for offset, text in self.pending:
            if text is None:
                if is_written():
                    content[offset:] = bytes(max(0, offset - len(content)))
                continue
            for start in range(0, len(text), self.SECTOR):
                if is_written():
                    piece, at = text[start:start + self.SECTOR], offset + start
                    content.extend(bytes(max(0, at - len(content))))
                    content[at:at + len(piece)] = piece
        return bytes(content)


CALL = re.compile(r"(\d+) +(?:<\.\.\. )?(\w+)(?:\(| resumed>)(.*?)"
                  r"(?: <unfinished \.\.\.>|\) += (-?\d+).*)")


def calls_of(trace):
    """Yield (call, paths, strings, numbers, is_done) of strace's lines, each as it happened.

    A call that another thread interrupted has two lines; what it does is done with the second.
    """
    started = {}
    for line in trace.read_text().splitlines():
        if not (found := CALL.fullmatch(line)):
            continue
        thread, call, words, answer = found.groups()
        if answer is None:
            started[thread] = words
            yield call, *parsed(words), False
            continue
        if "resumed>" in line[:40]:
            words = started.pop(thread, "") + words
        else:
            yield call, *parsed(words), False
        if int(answer) >= 0:
            yield call, *parsed(words), True


def parsed(words):
    """(paths, strings, numbers) in a call's arguments; an openat names its file by a string."""
    unhex = lambda text: bytes.fromhex(text.replace("\\x", ""))     # noqa: E731
    texts = [unhex(text) for text in re.findall(r'"([^"]*)"', words)]
    names = [unhex(text).decode("utf-8", "replace") for text in re.findall(r"<([^>]*)>", words)]
    if words.startswith("AT_FDCWD") and texts:
        names.append(os.path.join(names[0], texts[0].decode("utf-8", "replace")))
    rest = re.sub(r'"[^"]*"|<[^>]*>', "", words)
    return names, texts, [int(number) for number in re.findall(r"(?<!\w)\d+(?!\w)", rest)]


def cut_everywhere(result, disk, trace, folder):
    """Replay a trace; at each answered 200 try every state that a cut could leave."""
    choose, acknowledged, seen, syncs = random.Random(1), {}, {}, 0
    damage, lost = collections.Counter(), set()
    for call, names, texts, numbers, is_done in calls_of(trace):
        if is_done:
            disk.apply(call, names, texts, numbers)
            syncs += call in ("fsync", "fdatasync") and names[-1].endswith("inbound.db")
        elif call == "sendto" and (answer := answer_in(texts[0])):
            acknowledged[answer["message"]] = answer["ticket"]
            for words, files in disk.states(choose):
                result.cycles += 1
                known = hash((len(acknowledged), *sorted(files.items())))
                if known not in seen:
                    seen[known] = damage_of(files, acknowledged, folder)
                fault, gone = seen[known]
                lost |= gone
                if fault:
                    damage[f"{fault} ({words})"] += 1
    result.acknowledged += len(acknowledged)
    result.lost += len(lost)
    result.broken += [f"{count} cuts: {sentence}" for sentence, count in damage.items()]
    result.notes.append(f"{syncs} syncs of the main file, {len(seen)} different states")


def answer_in(text):
    """The JSON object in what was sent, if it says that a message is stored; else None.

    Head and body may leave in one call or in two: the client knows with the body.
    """
    with contextlib.suppress(ValueError):
        answer = json.loads(text[text.find(b'{"'):])
        return answer if answer.get("ticket") else None
    return None


def damage_of(files, acknowledged, folder):
    """(what is wrong with a database that starts from these files or '', ids that it lost)."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / Path(name).name).write_bytes(content)
    try:
        with contextlib.closing(sqlite3.connect(folder / "inbound.db")) as db:
            sound = db.execute("PRAGMA quick_check").fetchall() == [("ok",)]
            found = dict(db.execute("""SELECT message.id, reference FROM message
                JOIN ticket ON ticket.id = message.ticket"""))
    except sqlite3.Error as error:
        return f"unreadable: {error}", set(acknowledged)
    lost = {message for message, ticket in acknowledged.items() if found.get(message) != ticket}
    return ("acknowledged messages are gone" if lost else "" if sound else "malformed"), lost


def full(ground):
    """The disk is full, then there is room again."""
    result, folder = Result(cycles=1), ground.folder / "small"
    folder.mkdir()
    with mounted(folder, ["mount", "-t", "tmpfs", "-o", "size=3m", "none", folder]) as is_small:
        path = ground.database("small")
        served = ground.serve(path)
        if not is_small:
            room = path.stat().st_size + MB
            resource.prlimit(served.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            result.notes.append("by RLIMIT_FSIZE, as mount is for root")
        acknowledged, refused, healths = {}, 0, []
        for number in range(600):
            name = f"full-{number}"
            status, answer = served.post(mail(name, text="x" * 20000))
            if status == 200:
                acknowledged[id_of(name)] = answer
            else:
                refused += 1
                result.require(status == 503, f"{status} on a full disk")
                healths.append(health(served))
            if refused == 20:
                break
        result.require(refused, "the disk was never full: nothing was tried")
        # A limit of the process is not to be seen from a write that is undone again.
        result.require({*healths} == {503} or not is_small,
                       f"/healthz said {set(healths)} on a full disk")
        if is_small:
            subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        else:
            resource.prlimit(served.pid, resource.RLIMIT_FSIZE,
                             (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        result.require(served.is_alive() and eventually(
            lambda: post_all(served, acknowledged, ["room"]), 15), "no 200 when there was room")
        result.require(health(served) == 200, f"/healthz says {health(served)} with room")
        served.end(signal.SIGTERM)
        audit(result, path, acknowledged)
    return result


def locks(ground):
    """The database is locked: for a second; with 60 waiting; from a relay's 250 on."""
    result, path = Result(cycles=3, extra=0), ground.database()
    served, acknowledged = ground.serve(path), {}
    with locked(path, 1):
        result.require(post_all(served, acknowledged, ["short"]), "no 200 after a lock of 1 s")
    with Prober(served.port) as prober, locked(path):
        outcomes = post_at_once(served, 60)
    result.require(prober.worst < PROBE_LOCKED, f"a probe took {prober.worst:.1f} s")
    refused = sorted(ended for status, _, ended in outcomes.values() if status == 503)
    statuses = collections.Counter(status for status, *_ in outcomes.values())
    result.require(statuses.keys() <= {200, 503}, f"answers {dict(statuses)}")
    result.require(refused, "nobody was refused: nothing was tried")
    if refused:
        spread = refused[-1] - refused[0]
        result.notes.append(f"first 503 after {refused[0]:.1f} s, last {spread:.1f} s later, "
                            f"worst probe {prober.worst:.1f} s")
        result.require(refused[0] < LAST_REFUSAL, f"the first 503 came after {refused[0]:.0f} s")
        result.require(spread < LAST_REFUSAL, f"the last 503 came {spread:.0f} s after the first")
    result.require(eventually(lambda: post_all(served, acknowledged, ["again"]), 10),
                   "no 200 once the lock was gone")
    drained(path)
    ground.relay.reset(lambda: "slow")
    post_all(served, acknowledged, ["taken"])
    ground.relay.arrived.wait(10)
    with locked(path):
        time.sleep(LOCKED)
    drained(path, 60)       # where the 250 was forgotten, the lease has to run out first
    result.extra = sum(len(mails) - 1 for mails in ground.relay.copies().values())
    result.require(not result.extra, "a confirmation was sent twice without a crash")
    served.end(signal.SIGTERM)
    acknowledged |= {id_of(name): answer for name, (status, answer, _) in outcomes.items()
                     if status == 200}
    audit(result, path, acknowledged)
    return result


@contextlib.contextmanager
def locked(path, seconds=10**6):
    """Hold the write lock for some seconds, at most to the end of the block."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    db.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(seconds, db.rollback)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        db.rollback()
        db.close()


def post_at_once(served, count):
    """Post so many mails at once; {name: (status, answer, seconds until it)}."""
    outcomes, began = {}, time.monotonic()

    def send(name):
        status, answer = served.post(mail(name), timeout=90)
        outcomes[name] = status, answer, time.monotonic() - began

    threads = [threading.Thread(target=send, args=(f"wait-{i}",)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def readonly(ground):
    """A file that cannot be written, from the start or from some time on; a lost table."""
    result, path = Result(cycles=0), ground.database("before")
    folder = str(path.parent)
    bind = ["mount", "--bind", folder, folder]
    with mounted(folder, bind, ["mount", "-o", "remount,bind,ro", folder]) as is_mounted:
        if not is_mounted:
            path.chmod(0o400)
            path.parent.chmod(0o500)
        if os.access(path, os.W_OK):
            result.notes.append("before the start: left out, nothing here makes a file read-only")
        else:
            result.cycles += 1
            expect_refusals(result, ground, path, "a file that was read-only at the start")
        if not is_mounted:
            path.parent.chmod(0o700)
    path = ground.database("below")
    served = ground.serve(path)
    acknowledged = {}
    post_all(served, acknowledged, ["before"])
    # Not the -shm: it is mapped, and a page that cannot be written ends any program by SIGBUS.
    files = [str(path), f"{path}-wal"]
    if subprocess.run(["chattr", "+i", *files], capture_output=True).returncode == 0:
        try:
            result.cycles += 1
            words = "a file that became read-only"
            acknowledged |= refusals(result, served, words, is_known=False)
        finally:
            subprocess.run(["chattr", "-i", *files], check=True)
        result.require(eventually(lambda: post_all(served, acknowledged, ["after"]), 10),
                       "no 200 once the file could be written again")
    else:
        result.notes.append("below the server: left out, chattr +i is refused here")
    execute(path, "ALTER TABLE attachment RENAME TO away")
    result.cycles += 1
    refusals(result, served, "a file that lacks a table", statuses=(500, 503, 200))
    served.end(signal.SIGTERM)
    execute(path, "ALTER TABLE away RENAME TO attachment")
    audit(result, path, acknowledged)
    return result


def expect_refusals(result, ground, path, words):
    """A server that starts on such a file either says so and ends, or refuses."""
    try:
        served = ground.serve(path)
    except NotServed as error:
        result.notes.append(f"{words}: {error}")
        return
    refusals(result, served, words)
    served.end(signal.SIGTERM)


def refusals(result, served, words, *, statuses=(503,), is_known=True):
    """Each post and /healthz has to be refused now; return what is acknowledged all the same.

    What became read-only below open files shows first in a commit: not `is_known`, /healthz has to
    know it from the first refused post on.
    """
    name, acknowledged, said = f"refused-{result.cycles}", {}, []
    if is_known:
        said.append(health(served))
    attachment = {"filename": "a", "content_type": "text/plain", "content": "eA=="}
    status, answer = served.post(mail(name, attachments=[attachment]))
    if answer.get("status") == "created":
        acknowledged[id_of(name)] = answer
    result.require(status in statuses and not acknowledged,
                   f"{words}: a post was answered {status} {answer.get('status', '')}")
    said.append(health(served))
    result.require({*said} == {503}, f"{words}: /healthz said {said}")
    return acknowledged


def replaced(ground):
    """The file below the running server is removed, replaced by a copy, or loses its -wal."""
    result = Result()
    for what, change in (("rm inbound.db", remove), ("mv copy.db inbound.db", move_copy),
                         ("rm inbound.db-wal", remove_wal)):
        result.cycles += 1
        path = ground.database(f"replaced-{result.cycles}")
        served = ground.serve(path)
        post_all(served, {}, [f"before-{i}" for i in range(10)])
        copied = change(path)
        later, said = {}, set()
        for number in range(20):
            post_all(served, later, [f"later-{number}"])
            said.add(health(served))
        result.acknowledged += len(later)
        now = found_in(path)
        lost = [message_id for message_id in later if message_id not in now]
        result.lost += len(lost)
        result.require(not lost, f"{what}: {len(lost)} of {len(later)} acknowledged are not in it")
        result.require(503 in said or not lost, f"{what}: /healthz said {said} all along")
        result.require(len(later) or 503 in said, f"{what}: posts refused, /healthz said {said}")
        served.end(signal.SIGTERM)
        now = found_in(path)
        result.require(not [known for known in later if known not in now],
                       f"{what}: acknowledged are gone after the end")
        result.require(copied <= set(now), f"{what}: {len(copied - set(now))} of the copy's "
                       f"{len(copied)} messages are gone, or it is malformed")
    return result


def remove(path):
    path.unlink()
    return set()


def move_copy(path):
    copy = path.with_name("copy.db")
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("VACUUM INTO ?", [str(copy)])
    known = set(stored(copy))
    copy.rename(path)
    return known


def remove_wal(path):
    Path(f"{path}-wal").unlink()
    return set()


def found_in(path):
    """What another program finds now in the file at that path; {} when there is no whole one."""
    folder = path.parent / "seen"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        if not file.name.endswith((".log", "-shm")):
            shutil.copy(file, folder)
    try:
        copy = folder / path.name
        return stored(copy) if rows(copy, "PRAGMA integrity_check") == [("ok",)] else {}
    except sqlite3.Error:
        return {}


CLOCK = """
import pathlib, time
real, file = time.time, pathlib.Path(FILE)
time.time = lambda: real() + float(file.read_text() or 0)
time.time_ns = lambda: int(time.time() * 1e9)
"""


def clock(ground):
    """The clock jumps a day forward and back: mail still leaves, confirmations are not silenced."""
    result, path, day = Result(cycles=2, extra=0), ground.database(), 86400
    offset = ground.folder / "clock"
    offset.write_text("0")
    served = ground.serve(path, hook=CLOCK.replace("FILE", repr(str(offset))))
    acknowledged = {}

    def confirmed(name, sender, words):
        status, answer = served.post(mail(name, **{"from": sender}))
        if status == 200:
            acknowledged[id_of(name)] = answer
        result.require(answer.get("confirmation") == "queued",
                       f"{words}: {status} confirmation {answer.get('confirmation')}")

    def set_clock(seconds):
        offset.write_text(str(seconds))

    confirmed("now", "ada@now.example", "before the jump")
    result.require(drained(path, 15), "before the jump: mail does not leave")
    set_clock(day)
    confirmed("tomorrow", "ada@tomorrow.example", "a day forward")
    result.require(drained(path, 15), "a day forward: mail does not leave")
    for number in range(2):     # with the one above, all that its mailbox may have in an hour
        confirmed(f"capped-{number}", "ada@tomorrow.example", "a day forward, again")
    drained(path, 15)
    ground.relay.fault = lambda: "rcpt"
    confirmed("waiting", "ada@waiting.example", "a day forward, relay down")
    eventually(lambda: "451" in str(rows(path, "SELECT max(last_error) FROM outbox")), 10)
    ground.relay.fault = lambda: ""
    set_clock(0)
    confirmed("back", "ada@back.example", "a day back")
    confirmed("silenced", "ada@tomorrow.example", "a day back, a mailbox of the future")
    result.require(drained(path, 20), "a day back: mail does not leave")
    served.end(signal.SIGTERM)
    audit(result, path, acknowledged)
    copies = ground.relay.copies()
    result.extra = sum(len(mails) - 1 for mails in copies.values())
    result.require(result.extra == 0, f"{result.extra} confirmations were sent twice")
    return result


def sigterm(ground):
    """SIGTERM under four senders, every other time with a relay that hangs."""
    result, worst = Result(), 0.0
    for cycle in range(ground.scaled(6)):
        result.cycles += 1
        ground.relay.reset((lambda: "hang") if cycle % 2 else (lambda: ""))
        path = ground.database(f"sigterm-{cycle}")
        served = ground.serve(path)
        load = Load().start(served.port)
        load.wait(20, 10)
        code, seconds = served.end(signal.SIGTERM)
        load.stop()
        worst = max(worst, seconds)
        result.require(code == 0, f"exit code {code}")
        result.require(seconds < EXIT, f"it took {seconds:.1f} s to end")
        audit(result, path, load.acknowledged, load.parents)
    result.notes.append(f"slowest end {worst:.1f} s")
    return result


def bomb(ground):
    """A relay whose reply never ends, to EHLO and to the mail: memory stays bounded."""
    result = Result(memory=0.0)
    for fault in ("ehlo", "endless"):
        result.cycles += 1
        ground.relay.reset(lambda fault=fault: fault)
        path = ground.database(f"bomb-{fault}")
        served = ground.serve(path)
        idle, acknowledged = served.memory("VmRSS"), {}
        post_all(served, acknowledged, [f"bomb-{fault}"])
        grown, deadline = 0, time.monotonic() + 5
        while grown < 500 and time.monotonic() < deadline:      # enough to see
            time.sleep(0.1)
            grown = served.memory("VmHWM") - idle
        result.memory = max(result.memory, grown)
        result.require(grown < BOMB, f"250- without end to {fault}: {grown:.0f} MB in 5 s or less")
        result.require(post_all(served, acknowledged, ["meanwhile"]), "no 200 meanwhile")
        served.end()
        audit(result, path, acknowledged)
    return result


# Inputs that grow -------------------------------------------------------------------------------

TOP = (b"From: ada@customer.example\r\nMessage-ID: <grown@customer.example>\r\n"
       b"Subject: grown\r\nMIME-Version: 1.0\r\n")
RAW, FORM = "message/rfc822", "application/x-www-form-urlencoded"
JSON_HEAD = b'{"from": "ada@customer.example", "message_id": "<grown@customer.example>", '


def multipart(top, piece, size):
    """A mail in one multipart, with `piece` until it is large enough."""
    head = TOP + b'Content-Type: multipart/mixed; boundary="b"\r\n\r\n' + top
    return head + piece * (size // len(piece)) + b"\r\n--b--\r\n"


def nested_multiparts(size):
    nest = b"".join(b'Content-Type: multipart/mixed; boundary="b%d"\r\n\r\n--b%d\r\n' % (i, i)
                    for i in range(99))
    return TOP + nest + b"\r\n" + b"x\r\n" * (size // 3)


def nested_mails(size):
    return TOP + b"Content-Type: message/rfc822\r\n\r\n" * 2000 + b"\r\n" + b"word " * (size // 5)


def quoted_boundaries(size):
    return TOP + b"\r\n" + b'> boundary="b"\r\n' * 101 + b"And so on.\r\n" * (size // 12)


def in_json(name, value):
    return JSON_HEAD + b'"%s": ' % name + value + b"}"


def numbered(size, form, opening, closing):
    """Many small things that differ, as JSON; `form` has a %d in it."""
    count = size // (len(form % 10**6) + 2)
    return opening + b", ".join(form % number for number in range(count)) + closing


def id_map(size):
    """Mailgun's form: half of it a map that names no file, half small files."""
    fields = {b"timestamp": b"1", b"token": b"t", b"signature": b"s", b"sender": b"ada@x.example",
              b"From": b"ada@customer.example", b"Message-Id": b"<grown@customer.example>",
              b"body-plain": b"It grew.", b"message-headers": b"[]",
              b"content-id-map": numbered(size // 2, b'"<%d@x>": "no-file"', b"{", b"}")}
    parts = [b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % item
             for item in fields.items()]
    file = (b'--b\r\nContent-Disposition: form-data; name="attachment-%d"; filename="a.txt"\r\n'
            b"Content-Type: text/plain\r\n\r\nx\r\n")
    parts += [file % number for number in range(size // 2 // len(file))]
    return b"".join(parts) + b"--b--\r\n"


def attached(size):
    return (TOP + b"Content-Type: application/octet-stream; name=a\r\n"
            b"Content-Transfer-Encoding: base64\r\n\r\n"
            + base64.encodebytes(bytes(size * 56 // 77)).replace(b"\n", b"\r\n"))


def attached_json(size):
    content = base64.b64encode(bytes(size * 3 // 4))
    return in_json(b"attachments", b'[{"filename": "a", "content_type": "application/octet-stream",'
                   b' "content": "%s"}]' % content)


def emoji_text(size):
    return in_json(b"text", b'"\\u263a \xf0\x9f\x98\x80 ' + b"word " * (size // 5) + b'"')


@dataclasses.dataclass
class Input:
    """Something that grows. `build(size)` → bytes; a stranger has no secret and is refused."""

    name: str
    build: object
    content_type: str = "application/json"
    is_stranger: bool = False
    sizes: tuple = ()       # MB; () = the command line's
    clients: int = 1        # that post it at once, each its own


def repeated(top, piece, bottom=b""):
    return lambda size: top + piece * (size // len(piece)) + bottom


def of_html(piece, top=b"", bottom=b""):
    return repeated(TOP + b"Content-Type: text/html\r\n\r\n" + top, piece, bottom)


PARENTHESES = b"X-Note: " + b"(" * 145 + b")" * 145 + b"\r\n"
MULTIPART_FORM = "multipart/form-data; boundary=b"
INPUTS = [
    Input("99 nested multiparts, short lines", nested_multiparts, RAW),
    Input("header lines that are none", repeated(TOP, b"x\r\n", b"\r\nbody"), RAW),
    Input("the same, by four at once", repeated(TOP, b"x\r\n", b"\r\nbody"), RAW, clients=4),
    Input("headers `a:`", repeated(TOP, b"a:\r\n", b"\r\nbody"), RAW),
    Input("empty parts", lambda size: multipart(b"", b"--b\r\n\r\n", size), RAW),
    Input("HTML <p><p>", of_html(b"<p>"), RAW),
    Input("HTML <p><p> in JSON", lambda size: in_json(b"html", b'"%s"' % (b"<p>" * (size // 3)))),
    Input("HTML digits cut by comments", of_html(b"1<!---->", b"<p>&#", b";"), RAW),
    Input("headers of 145 parentheses", repeated(TOP, PARENTHESES, b"\r\nbody"), RAW),
    Input("a body of `a`", repeated(TOP + b"\r\n", b"a\n"), RAW),
    Input("101 quoted boundary= lines", quoted_boundaries, RAW),
    Input("2,000 nested message/rfc822", nested_mails, RAW),
    Input("JSON [[],[],…]", lambda size: in_json(b"more", b"[%s[]]" % (b"[]," * (size // 3)))),
    Input("JSON objects as headers", lambda size: in_json(b"headers", b"[%s{}]" % (
        b'{"Name": "a", "Value": ""}, ' * (size // 28)))),
    Input("JSON headers of distinct names",
          lambda size: in_json(b"headers", numbered(size, b'"h%d": ""', b"{", b"}"))),
    Input("form content-id-map", id_map, MULTIPART_FORM),
    Input("attachment, raw", attached, RAW, sizes=(9, 35)),
    Input("attachment, JSON", attached_json, sizes=(9, 35)),
    Input("text with an emoji", emoji_text, sizes=(9, 35)),
    Input("stranger: form a=x&", repeated(b"", b"a=x&"), FORM, True),
    Input("stranger: form a+a+…", repeated(b"", b"a+", b"=x"), FORM, True),
    Input("stranger: wrong SecretKey", repeated(b"SecretKey=no-such-key-0123456789&", b"a=x&"),
          FORM, True),
    Input("stranger: JSON [[],[],…]", repeated(b'{"SecretKey": "", "a": [', b"[],", b"[]]}"),
          is_stranger=True),
    Input("stranger: empty parts", lambda size: b"--b\r\n\r\n" * (size // 7) + b"--b--",
          MULTIPART_FORM, True),
]


def blowup(ground):
    """Inputs that grow: processor and memory of each at two sizes, and another client meanwhile."""
    result = Result(seconds=0.0, memory=0.0)
    chosen = [case for case in INPUTS if ground.inputs in case.name]
    for case in chosen:
        measured = []
        for size in case.sizes or ground.sizes:
            if measured and measured[-1].seconds * size / measured[-1].size > 40:
                result.notes.append(f"{case.name}: {size:g} MB left out, it would take a minute")
                continue
            measured.append(measure(ground, case, size))
            result.cycles += 1
            say(f"blowup: {measured[-1].line()}")
        ground.table += measured
        result.seconds = max(result.seconds, *(one.seconds for one in measured))
        result.memory = max(result.memory, *(one.memory for one in measured))
        faults = {fault for one in measured for fault in one.faults}
        result.require(not faults, f"{case.name}: {', '.join(sorted(faults))}")
    return result


@dataclasses.dataclass
class Measured:
    """What one input cost: MB, processor seconds, MB over idle, seconds of the worst probe."""

    name: str
    size: float
    expected: str
    outcome: str
    seconds: float
    memory: float
    probe: float

    @property
    def faults(self):
        """What is past its goal, in a word each."""
        found = []
        if self.outcome != self.expected:
            found.append(self.outcome)
        if self.seconds > CPU_PER_MB * self.size + CPU_ALLOWANCE:
            found.append("processor")
        if self.memory > MEMORY_FACTOR * self.size + MEMORY_ALLOWANCE:
            found.append("memory")
        if self.probe > PROBE:
            found.append("others wait")
        return found

    def line(self):
        """A row under INPUT_COLUMNS."""
        return INPUT_ROW.format(
            self.name, f"{self.size:.1f}", self.outcome, f"{self.seconds:.2f}",
            f"{self.seconds / self.size:.2f}", f"{self.memory:.0f}",
            f"{self.memory / self.size:.1f}", f"{self.probe:.2f}", ", ".join(self.faults) or "met")


INPUT_COLUMNS = ("input", "MB", "answer", "s", "s/MB", "MB used", "x size", "probe s", "goal")
INPUT_ROW = "| {:33} | {:>4} | {:15} | {:>5} | {:>5} | {:>7} | {:>6} | {:>7} | {:30} |"


def measure(ground, case, size):
    """Post one input of `size` MB to a fresh server that has seen a mail of each kind."""
    path = ground.database("blowup")
    served = ground.serve(path)
    for content_type, body in (("application/json", mail("warm")), (RAW, TOP + b"\r\nwarm"),
                               (FORM, b"a=b")):
        served.post(body, content_type=content_type)
    bodies = [case.build(int(size * MB / case.clients)) for _ in range(case.clients)]
    outcomes = {}
    threads = [threading.Thread(target=send_to, args=(served, case, bodies, number, outcomes))
               for number in range(case.clients)]
    served.forget_peak()
    idle, began = served.memory("VmRSS"), served.cpu()
    with Prober(served.port) as prober:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    measured = Measured(
        name=case.name, size=sum(map(len, bodies)) / MB,
        expected="401" if case.is_stranger else "200 created",
        outcome=", ".join({*outcomes.values()}), seconds=served.cpu() - began,
        memory=served.memory("VmHWM") - idle, probe=prober.worst)
    served.end()
    shutil.rmtree(path.parent)
    return measured


def send_to(served, case, bodies, number, outcomes):
    body = bodies[number] + b"%d" % number if number else bodies[number]
    status, answer = served.post(body, content_type=case.content_type, timeout=60,
                                 secret=None if case.is_stranger else SECRET)
    outcomes[number] = f"{status or 'no answer'} {answer.get('status', '')}".strip()


# The mutants ------------------------------------------------------------------------------------

@dataclasses.dataclass
class Mutant:
    """A program broken on purpose, without a word of its source, so that rewrites do not matter.

    `hook` runs in the server before the program does; `prepare` is SQL on the database; `inputs`
    picks those of `blowup`.
    """

    fault: str
    name: str
    hook: str
    prepare: str = ""
    inputs: str = ""
    scale: float = 0.5


# Sees every statement: `around(connection, sql, run)` stands for it; it calls run(sql) or does not.
STATEMENTS = """
import re, sqlite3
class Cursor(sqlite3.Cursor):
    def execute(self, sql, *more):
        return around(self.connection, sql, lambda sql: super(Cursor, self).execute(sql, *more))
class Connection(sqlite3.Connection):
    def cursor(self, factory=Cursor):
        return super().cursor(factory)
    def execute(self, sql, *more):
        return self.cursor().execute(sql, *more)
    def commit(self):
        if self.in_transaction:
            self.execute("COMMIT")
    def plain(self, sql):
        return super().cursor(sqlite3.Cursor).execute(sql)
    def executescript(self, sql):
        return super().executescript(script(sql))
script = lambda sql: sql
stock = sqlite3.connect
sqlite3.connect = lambda *args, **options: stock(*args, **{**options, "factory": Connection})
"""
BEFORE_BEGIN = STATEMENTS + """
def around(connection, sql, run):
    if sql.lstrip().upper().startswith("BEGIN"):
        connection.plain("PRAGMA synchronous = %s")
    return run(sql)
"""
SWALLOWED = STATEMENTS + """
def around(connection, sql, run):
    try:
        return run(sql)
    except sqlite3.OperationalError as error:
        if not re.match(r"\\s*(COMMIT|INSERT|SAVEPOINT|RELEASE|ROLLBACK|UPDATE|BEGIN)", sql):
            raise
        return connection.plain("SELECT 1 WHERE 0")
"""
MUTANTS = [
    Mutant("kill", "every 20th commit is undone", STATEMENTS + """
count = 0
def around(connection, sql, run):
    global count
    count += sql == "COMMIT"
    return run("ROLLBACK" if sql == "COMMIT" and count % 20 == 0 else sql)
"""),
    Mutant("kill", "the digest changes with a restart", """
import hashlib, os
stock_sha256, salt = hashlib.sha256, str(os.getpid()).encode()
hashlib.sha256 = lambda *args, **more: stock_sha256(*(salt + arg for arg in args), **more)
"""),
    Mutant("kill", "the outbox row is a transaction of its own", STATEMENTS + """
import time
open_savepoints = []
def around(connection, sql, run):
    words = sql.split()
    if words[:1] == ["SAVEPOINT"]:
        open_savepoints.append(words[1])
    if words[:1] == ["RELEASE"]:
        open_savepoints.pop()
    if words[:3] == ["INSERT", "INTO", "outbox"]:
        connection.plain("COMMIT")
        time.sleep(0.02)
        connection.plain("BEGIN IMMEDIATE")
        for name in open_savepoints:
            connection.plain(f"SAVEPOINT {name}")
    return run(sql)
"""),
    Mutant("kill", "every 20th mail is called sent and is not", """
import itertools, smtplib
stock_data, count = smtplib.SMTP.data, itertools.count(1)
smtplib.SMTP.data = lambda self, mail: (
    (250, b"taken") if next(count) % 20 == 0 else stock_data(self, mail))
"""),
    Mutant("kill", "every mail is sent twice", """
import smtplib
stock_sendmail = smtplib.SMTP.sendmail
def sendmail(self, *args, **more):
    stock_sendmail(self, *args, **more)
    return stock_sendmail(self, *args, **more)
smtplib.SMTP.sendmail = sendmail
"""),
    Mutant("calls", "errors of SQLite are swallowed", SWALLOWED),
    Mutant("power", "synchronous=NORMAL", BEFORE_BEGIN % "NORMAL"),
    Mutant("power", "synchronous=OFF", BEFORE_BEGIN % "OFF"),
    Mutant("power", "journal DELETE with FULL", STATEMENTS + """
script = lambda sql: re.sub(r"(?i)journal_mode\\s*=\\s*WAL", "journal_mode=DELETE", sql)
around = lambda connection, sql, run: run(script(sql))
""", prepare="PRAGMA journal_mode=DELETE"),
    Mutant("full", "errors of SQLite are swallowed", SWALLOWED),
    Mutant("locks", "waits 20 s for the lock", STATEMENTS + """
script = lambda sql: re.sub(r"(?i)(busy_timeout\\s*=\\s*)\\d+", r"\\g<1>20000", sql)
around = lambda connection, sql, run: run(script(sql))
patient = sqlite3.connect
sqlite3.connect = lambda *args, **options: patient(*args, **{**options, "timeout": 20})
"""),
    Mutant("readonly", "errors of SQLite are swallowed", SWALLOWED),
    Mutant("replaced", "stat never sees a change", """
import os
stock_stat, seen = os.stat, {}
def stat(path, *args, **more):
    found = stock_stat(path, *args, **more) if str(path) not in seen else seen[str(path)]
    if ".db" in str(path):
        seen[str(path)] = found
    return found
os.stat = stat
"""),
    Mutant("clock", "the clock never goes back", """
import time
forward, latest = time.time, 0
def never_back():
    global latest
    latest = max(latest, forward())
    return latest
time.time = never_back
"""),
    Mutant("sigterm", "SIGTERM has no handler", """
import signal
signal.signal = lambda *args: None
"""),
    Mutant("blowup", "JSON costs a second and 8 x its size a megabyte", """
import json, time
stock_decode = json.JSONDecoder.decode
def decode(self, text, *more):
    copies, end = [bytes(text, "utf-8") + b"%d" % i for i in range(8)], time.process_time()
    end += len(text) / 1e6
    while time.process_time() < end:
        pass
    return stock_decode(self, text, *more)
json.JSONDecoder.decode = decode
""", inputs="attachment, JSON"),
    Mutant("bomb", "what a relay says is kept ten thousand times", """
import socket
stock_readinto, hoard = socket.SocketIO.readinto, []
def readinto(self, buffer):
    length = stock_readinto(self, buffer)
    hoard.append(bytes(buffer[:length or 0]) * 10000)
    return length
socket.SocketIO.readinto = readinto
"""),
]


# The command ------------------------------------------------------------------------------------

FAULTS = {fault.__name__: fault for fault in (
    kill, calls, power, full, locks, readonly, replaced, clock, sigterm, blowup, bomb)}


def run(name, relay, **more):
    """Run one fault on fresh ground; return (Result, the lines of what was measured)."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"inbound-{name}-") as folder:
        ground = Ground(folder, relay, **more)
        try:
            result = FAULTS[name](ground)
        except NotServed as error:
            result = Result(broken=[str(error)])
        finally:
            ground.end_all()
    result.require(not result.lost, f"{result.lost} acknowledged messages lost")
    result.require(not result.twice, f"{result.twice} messages stored twice")
    result.notes.append(f"{time.monotonic() - began:.0f} s")
    return result, ground.table


def shown(value):
    if value is None:
        return "–"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def print_table(results):
    columns = "| {:9} | {:>6} | {:>12} | {:>4} | {:>5} | {:>5} | {:>9} | {:>6} | {:7} |"
    print(columns.format("fault", "cycles", "acknowledged", "lost", "twice", "extra",
                         "processor", "memory", "verdict"))
    print(re.sub("[^|]", "-", columns.format(*9 * [""])))
    for name, result in results.items():
        print(columns.format(name, *map(shown, (
            result.cycles, result.acknowledged, result.lost, result.twice, result.extra,
            result.seconds, result.memory)), "BROKEN" if result.broken else "held"))
    for name, result in results.items():
        print(f"\n{name}: {'; '.join(result.notes)}")
        for sentence in result.broken:
            print(f"  broken: {sentence}")


def run_faults(names, relay, options):
    results, table = {}, []
    for name in names:
        say(f"{name}: {' '.join(FAULTS[name].__doc__.split())}")
        results[name], measured = run(name, relay, scale=options.scale, sizes=options.sizes)
        table += measured
        say(f"{name}: {'; '.join(results[name].broken) or 'held'}")
    print_table(results)
    if table:
        print(f"\nblowup, by input. Goal: {CPU_PER_MB} s of processor a MB; {MEMORY_FACTOR} x its "
              f"size and {MEMORY_ALLOWANCE} MB; another client's GET within {PROBE} s.\n")
        print(INPUT_ROW.format(*INPUT_COLUMNS))
        print(re.sub("[^|]", "-", INPUT_ROW.format(*9 * [""])))
        for one in table:
            print(one.line())
    return any(result.broken for result in results.values())


def run_mutants(names, relay, options):
    """Run each mutant under its fault; caught: a promise broke that holds without it."""
    missed, sound = [], {}
    for mutant in (mutant for mutant in MUTANTS if mutant.fault in names):
        scale = options.scale * mutant.scale
        more = {"scale": scale, "sizes": options.sizes, "inputs": mutant.inputs}
        if mutant.fault not in sound:
            say(f"{mutant.fault}: the program as it is")
            sound[mutant.fault], _ = run(mutant.fault, relay, **more)
        say(f"{mutant.fault}: {mutant.name}")
        result, _ = run(mutant.fault, relay, hook=mutant.hook, prepare=mutant.prepare, **more)
        known = {without_numbers(sentence) for sentence in sound[mutant.fault].broken}
        news = [sentence for sentence in result.broken if without_numbers(sentence) not in known]
        verdict = "caught" if news else "MISSED"
        if not news and result.broken:
            verdict = "no worse than the program as it is, which breaks the promise itself"
        if not news:
            missed.append(mutant)
        print(f"{mutant.fault:9} {mutant.name}: {verdict}"
              + "".join(f"\n          {sentence}" for sentence in news or result.broken),
              flush=True)
    return bool(missed)


def without_numbers(sentence):
    return re.sub(r"[\d.]+", "#", sentence)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FAULTS))
    parser.add_argument("--mutants", action="store_true", help="run programs broken on purpose")
    parser.add_argument("--scale", type=float, default=1, help="so many times the cycles")
    parser.add_argument("--sizes", default="1,4", help="MB of the growing inputs")
    parser.add_argument("--seed", type=int, default=None, help="of what is random here")
    options = parser.parse_args()
    options.sizes = [float(size) for size in options.sizes.split(",")]
    if unknown := [name for name in options.names if name not in FAULTS]:
        parser.error(f"no fault {unknown[0]!r}: expected some of {', '.join(FAULTS)}")
    random.seed(options.seed)
    relay = Relay()
    names = options.names or [*FAULTS]
    try:
        is_broken = (run_mutants if options.mutants else run_faults)(names, relay, options)
    finally:
        shutil.rmtree(template(relay))
    return int(is_broken)


if __name__ == "__main__":
    sys.exit(main())
