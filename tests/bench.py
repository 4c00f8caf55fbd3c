"""How fast, how small, how flat: measured against the same work. Nothing is asserted here.

    python tests/bench.py [quick | full] [intake stages growth size burst start] [--in DIR]

Needs waitress; flask and sqlalchemy too for the peer. Takes 5 minutes (quick: 1; full: 40, mostly
to make a million tickets). DIR (default: /var/tmp) has to be on the disk that is measured; a DIR
that you name keeps the grown files for the next run. A run of all sections writes bench.txt and
bench.svg beside this file. Leave the machine alone meanwhile.

Four servers are loaded turn about by one generator, this process; its clients are keep-alive:
  inbound   `inbound serve`
  parse     a ceiling: waitress with serve's settings, which reads the body and calls json.loads
  sync      the same, and one write and fdatasync of the body, shared by all who wait for one
  Flask     tests/peer_flask.py
"""

import argparse
import collections
import contextlib
import dataclasses
import email.message
import hashlib
import http.client
import io
import json
import logging
import math
import os
import random
import re
import select
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import wsgiref.util
from importlib.metadata import version
from pathlib import Path

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)     # what is installed is compiled but once
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
ENDPOINT = "/api/helpdesk/inbound-email"
SECRET = "a-secret-of-the-bench-0123456789"
CLIENTS = [1, 8, 32]
REPLIES = 0.4           # of all mails; the others open tickets
BATCH = 200             # tickets in one transaction while a file is grown
HOUR = 10 * BATCH       # tickets in an hour of a grown file's life; the first 200 are confirmed
# What the console script does: `python inbound.py` would compile the file anew each time.
CONSOLE = (f"import sys; sys.path.insert(0, {str(HERE.parent)!r}); import inbound; "
           "sys.exit(inbound.main())")
# The same, then its peak memory on standard error. Not wait4's, which counts its parent's too.
WATCHED = ("import atexit, re, sys; atexit.register(lambda: print(re.search(r'VmHWM:\\s+(\\d+)', "
           f"open('/proc/self/status').read())[1], file=sys.stderr)); {CONSOLE}")


@dataclasses.dataclass(frozen=True)
class Plan:
    rounds: int             # of each measurement, turn about
    seconds: float          # of each measurement
    tickets: list           # sizes of the grown file, ascending
    megabytes: list         # sizes of one heavy post
    burst: int              # mails


PLANS = {"quick": Plan(1, 1.5, [0, 4_000], [1, 10], 1_000),
         "": Plan(3, 2.5, [0, 100_000], [1, 10, 35], 5_000),
         "full": Plan(5, 5, [0, 100_000, 1_000_000], [1, 10, 35], 5_000)}


# -------------------------------------------------------------------------------------------------
# The mails. Each has a name of 24 hex digits, random or the hash of a key, from which sender and
# Message-ID follow: ids are scattered over the index as in life (in sequence they would hide the
# size of a file), and a grown file's can be worked out again for a reply.

TEXT = json.dumps("It burns. The printer, I mean, again.\n" * 310).encode() + b"}"  # 12 KB in all


def name_of(key):
    return hashlib.blake2b(str(key).encode(), digest_size=12).hexdigest()


def address_of(name):
    return f"ada@{name[:8]}.example"    # a domain each, for confirmations to one are capped


def canonical(name, parent=None):
    """The canonical body of a new mail, or of a reply to the mail named `parent`."""
    reply = f'"in_reply_to": "<{parent}@customer.example>", ' if parent else ""
    return (f'{{"from": "Ada Lovelace <{address_of(parent or name)}>", "subject": "Printer", '
            f'"message_id": "<{name}@customer.example>", {reply}"headers": {{"Date": '
            '"Mon, 21 Sep 2026 16:12:07 +0200", "MIME-Version": "1.0"}, "text": ').encode() + TEXT


def relayed(name, parent=None):
    """The same without its long text as SparkPost posts it, in batches."""
    headers = [{"From": f"Ada Lovelace <{address_of(parent or name)}>"}, {"MIME-Version": "1.0"},
               {"Message-ID": f"<{name}@customer.example>"}]
    if parent:
        headers.append({"In-Reply-To": f"<{parent}@customer.example>"})
    return {"msys": {"relay_message": {
        "msg_from": address_of(parent or name), "rcpt_to": "support@helpdesk.example", "content": {
            "headers": headers, "subject": "Printer on fire",
            "text": "It burns. The printer, I mean, again.\n" * 8}}}}


def heavy(kind, megabytes):
    """Return (content type, body of so many MB), most of it one attachment."""
    mail = email.message.EmailMessage()
    mail["From"], mail["Message-ID"] = "ada@customer.example", f"<{megabytes}@customer.example>"
    mail.set_content("See the log.")
    mail.add_attachment(os.urandom(megabytes * 737_000), "application", "zip", filename="log.zip")
    if kind == "raw":
        return "message/rfc822", mail.as_bytes()
    content = next(mail.iter_attachments()).get_payload()
    return "application/json", json.dumps({
        "from": mail["From"], "message_id": mail["Message-ID"], "text": "See the log.",
        "attachments": [{"filename": "log.zip", "content": content.replace("\n", "")}]}).encode()


class Mailbag:
    """Mails for one server: a reply goes to any of the `grown` tickets of its file, or to a mail
    that was answered since."""

    def __init__(self, grown=0):
        self.grown, self.answered, self.drawn = grown, [], 0

    def draw(self):
        """Return (its name if it opens a ticket, else None; body)."""
        self.drawn += 1
        name, known = f"{random.getrandbits(96):024x}", self.grown + len(self.answered)
        if not known or random.random() >= REPLIES:
            return name, canonical(name)
        place = random.randrange(known)
        is_old = place < self.grown
        parent = name_of(place) if is_old else self.answered[place - self.grown]
        return None, canonical(name, parent)


# -------------------------------------------------------------------------------------------------
# The servers, each in a process of its own, whose figures the kernel keeps in /proc.

class Server:
    def __init__(self, name, path, *command):
        self.name, self.path, self.greeting = name, path, ""
        with open(f"{path}.log", "ab") as log:
            self.process = subprocess.Popen([sys.executable, *map(str, command)], text=True,
                                            stdout=subprocess.PIPE, stderr=log)
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", self.greeting)):
            line = self.process.stdout.readline()
            if not line:
                self.process.wait()
                raise OSError(f"{name} does not start: {Path(f'{path}.log').read_text()[-2000:]}")
            self.greeting += line
        self.port = int(found[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()

    def memory(self, name="VmRSS"):
        """MB resident now, or with VmHWM at most so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1000

    def processor(self):
        """Seconds of processor time so far, of all its threads."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def ask(self, method, path, body=None, content_type="application/json"):
        """Return (status, seconds it took)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        began = time.perf_counter()
        connection.request(method, path, body, {
            "Content-Type": content_type, "X-Mobieus-Inbound-Secret": SECRET})
        response = connection.getresponse()
        response.read()
        connection.close()
        return response.status, time.perf_counter() - began


def sql(path, statement, *parameters):
    with contextlib.closing(sqlite3.connect(path, timeout=10)) as connection, connection:
        return connection.execute(statement, parameters).fetchall()


def set_up(path):
    sql(path, "UPDATE email_account SET inbound_secret = ?, address = 'support@helpdesk.example'",
        SECRET)


def inbound(path):
    is_new = not Path(path).exists()
    server = Server("inbound", path, "-c", CONSOLE, "--db", path, "serve", "--listen",
                    "127.0.0.1:0")
    if is_new:
        set_up(path)
    return server


def ceiling(path, is_synced):
    """Serve what no server can beat that reads its body and, with `is_synced`, keeps it."""
    import waitress
    size, place, waiting, lock = 64 * 2**20, 0, collections.deque(), threading.Lock()
    if is_synced:   # blocks that exist already, written round and round: syncs fastest
        Path(path).write_bytes(bytes(size))
        file = os.open(path, os.O_WRONLY)
        os.fsync(file)

    def keep(body):
        nonlocal place
        mine = threading.Event()
        waiting.append((body, mine))
        with lock:
            if mine.is_set():       # somebody before us took it along
                return
            group = [waiting.popleft() for _ in range(len(waiting))]
            content = b"".join(body for body, _ in group)
            place = place if place + len(content) <= size else 0
            place += os.pwrite(file, content, place)
            os.fdatasync(file)
            for _, kept in group:
                kept.set()

    def app(environ, start_response):
        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        json.loads(body)
        if is_synced:
            keep(body)
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", "2")])
        return [b"{}"]

    create, settings = waitress.create_server, settings_of_serve(path)
    print(settings)
    server = create(app, listen="127.0.0.1:0", asyncore_use_poll=True, **settings)
    server.adj.send_bytes = 200         # as serve does, which helps a ceiling as much
    print(f"http://127.0.0.1:{server.effective_port}/", flush=True)
    server.run()


def settings_of_serve(path):
    """What `serve` gives to waitress.create_server, but for what is waitress's own affair."""
    import waitress
    taken = {}

    def take(app=None, **settings):
        taken.update(settings)
        raise KeyboardInterrupt

    # This process is a ceiling's, and has kept the real one.
    waitress.create_server = waitress.server.create_server = take
    import inbound as program
    with contextlib.suppress(KeyboardInterrupt), contextlib.redirect_stdout(io.StringIO()):
        program.main(["--db", f"{path}.db", "serve", "--listen", "127.0.0.1:0"])
    taken = taken or {"threads": 4}     # serve goes another way
    places = ("listen", "host", "port", "sockets", "unix_socket", "unix_socket_perms", "map")
    return {name: value for name, value in taken.items() if not name.startswith("_")
            and name not in places}


# -------------------------------------------------------------------------------------------------
# The load: each client posts, waits for the answer, posts again.

@dataclasses.dataclass(frozen=True)
class Run:
    rate: float             # answers a second
    latencies: list         # ms, ascending
    faults: int             # answers other than a 200 for a mail that was understood and new
    threaded: int           # replies that found their ticket
    processor: float        # µs a mail, the server's

    def __len__(self):
        return len(self.latencies)

    def within(self, part):
        return self.latencies[min(int(part * len(self.latencies)), len(self.latencies) - 1)]


class Client:
    def __init__(self, server):
        self.socket = socket.create_connection(("127.0.0.1", server.port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received = b""

    def post(self, bag):
        self.name, body = bag.draw()
        head = (f"POST {ENDPOINT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"X-Mobieus-Inbound-Secret: {SECRET}\r\nContent-Length: {len(body)}\r\n\r\n")
        self.sent = time.perf_counter()
        self.socket.sendall(head.encode() + body)

    def answer(self):
        """Return the whole answer, or b"" while some of it is still to come."""
        piece = self.socket.recv(65536)
        if not piece:
            raise ConnectionError("the server hung up")
        self.received += piece
        head, end, body = self.received.partition(b"\r\n\r\n")
        if not end or len(body) < int(re.search(rb"(?i)content-length: *(\d+)", head)[1]):
            return b""
        whole, self.received = self.received, b""
        return whole


def drive(server, bag, clients, seconds=0.0, count=0):
    """Post for so long, or so many; return the Run."""
    poll, everyone, latencies, faults, threaded = select.epoll(), {}, [], 0, 0
    last, processor, began = bag.drawn + count, server.processor(), time.perf_counter()
    for client in [Client(server) for _ in range(clients)]:
        everyone[client.socket.fileno()] = client
        poll.register(client.socket, select.EPOLLIN)
        client.post(bag)
    posting = clients
    while posting:
        for descriptor, _ in poll.poll():
            client = everyone[descriptor]
            answer = client.answer()
            if not answer:
                continue
            now = time.perf_counter()
            latencies.append(1000 * (now - client.sent))
            if answer[9:12] != b"200" or b"quarantined" in answer or b"duplicate" in answer:
                faults += 1
            elif client.name:
                bag.answered.append(client.name)
            threaded += b"appended" in answer
            if now < began + seconds or bag.drawn < last:
                client.post(bag)
            else:
                posting -= 1
    took = time.perf_counter() - began
    for client in everyone.values():
        client.socket.close()
    poll.close()
    return Run(rate=len(latencies) / took, latencies=sorted(latencies), faults=faults,
               threaded=threaded,
               processor=1e6 * (server.processor() - processor) / len(latencies))


class Others(threading.Thread):
    """What else goes on while something is measured: every 10 ms a probe and a small post."""

    def __init__(self, server):
        super().__init__()
        self.server, self.bag, self.over = server, Mailbag(), threading.Event()
        self.slowest, self.faults = {"GET": 0.0, "POST": 0.0}, 0    # ms

    def run(self):
        while not self.over.wait(0.01):
            for asked in (("GET", "/healthz"), ("POST", ENDPOINT, self.bag.draw()[1])):
                status, took = self.server.ask(*asked)
                self.slowest[asked[0]] = max(self.slowest[asked[0]], 1000 * took)
                self.faults += status != 200

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()


# -------------------------------------------------------------------------------------------------
# The sections: each prints its tables and leaves panels for the picture.

LINES, PANELS = [], []      # what was printed; (title, marks, {name: a value for each mark})


def say(line=""):
    print(line, flush=True)
    LINES.append(line)


def shown(cell):
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:,.0f}" if cell >= 100 else f"{cell:.3g}"


def table(*rows):
    texts = [[shown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts)]
    for first, *others in texts:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        say("  ".join(["", first.ljust(widths[0]), *cells]))


def middle(runs):
    """[mails a second, p50, p99, µs of processor time] of the runs' medians."""
    figures = [(run.rate, run.within(0.5), run.within(0.99), run.processor) for run in runs]
    return [statistics.median(column) for column in zip(*figures)]


def ratio(ours, theirs):
    """The median of the rounds' ratios: what slows the machine for a while slows both."""
    return statistics.median(a.rate / b.rate for a, b in zip(ours, theirs))


def intake(plan, folder):
    say(f"\nINTAKE: 12 KB of canonical JSON, {REPLIES:.0%} replies, ids scattered; medians of "
        f"{plan.rounds} rounds of {plan.seconds} s.\n`of best` is the share of the fastest ceiling "
        "of the run, at any number of clients.")
    runs = collections.defaultdict(list)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(server) for server in contenders(folder)]
        bags, idle = [Mailbag() for _ in servers], [server.memory() for server in servers]
        for server, bag in zip(servers, bags):
            drive(server, bag, 8, seconds=0.5)
        for clients in CLIENTS * plan.rounds:
            for server, bag in zip(servers, bags):
                run = drive(server, bag, clients, plan.seconds)
                runs[server.name, clients].append(run)
        names = [server.name for server in servers]
        memory = [[server.name, before, server.memory("VmHWM"), *kept(server.path)]
                  for server, before in zip(servers, idle)]
    ceilings = [runs[name, clients] for name in ("parse", "sync") for clients in CLIENTS]
    best, rows = max(ceilings, key=middle), []
    for clients in CLIENTS:
        for name in names:
            mine = runs[name, clients]
            others = [best, *(runs[other, clients] for other in ("parse", "sync", "Flask"))]
            rows.append([f"{clients:2} {name}", *middle(mine),
                         *(ratio(mine, theirs) if theirs else "-" for theirs in others),
                         f"{sum(run.threaded for run in mine) / sum(map(len, mine)):.0%}",
                         sum(run.faults for run in mine)])
    table(["clients", "mails/s", "p50 ms", "p99 ms", "CPU µs", "of best", "of parse", "of sync",
           "x Flask", "threaded", "faults"], *rows)
    say()
    table(["memory", "idle MB", "peak MB", "mails", "bytes a mail"], *memory)
    for place, title in ((0, "mails a second"), (2, "p99, ms")):
        PANELS.append((f"{title}, over clients", CLIENTS, {
            name: [middle(runs[name, clients])[place] for clients in CLIENTS] for name in names}))


def contenders(folder):
    """Start them, each on a file of its own; the peer only where its libraries are."""
    yield inbound(f"{folder}/inbound.db")
    yield Server("parse", f"{folder}/parse", __file__, "--child", "ceiling", f"{folder}/parse", "")
    synced = Server("sync", f"{folder}/sync", __file__, "--child", "ceiling", f"{folder}/sync", "1")
    say(f"serve sets waitress to {synced.greeting.splitlines()[0]}")
    yield synced
    try:
        yield Server("Flask", f"{folder}/flask.db", HERE / "peer_flask.py", f"{folder}/flask.db",
                     SECRET)
    except OSError as error:
        say(f"WITHOUT THE PEER (pip install flask sqlalchemy): {str(error).splitlines()[-1]}")


def kept(path):
    """[mails in a database, bytes of it for each]."""
    if not path.endswith(".db"):
        return ["-", "-"]
    [[mails]] = sql(path, "SELECT count(*) FROM message")
    [[size]] = sql(path, "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size")
    return [mails, size / mails]


STAGES = ["authenticate", "read", "normalise", "classify", "draft_mail"]    # functions of inbound
KINDS = ["new", "reply", "repeat", "confirmed"]


def stages(plan, folder):
    say("\nSTAGES: one mail at a time, in one process, with a stopwatch that takes some itself; µs "
        "a mail, the\nleast of 5 batches. `confirmed` opens a ticket and is confirmed; `new` comes "
        "when the cap of the hour\nis reached, as nearly all of the intake.")
    output = subprocess.run([sys.executable, __file__, "--child", "stages", folder], check=True,
                            stdout=subprocess.PIPE, text=True)
    missing, spent = json.loads(output.stdout)
    rows = []
    for stage in spent["confirmed"]:
        processor, wall = zip(*(spent[kind].get(stage, [0.0, 0.0]) for kind in KINDS))
        rows.append([stage, *processor, wall[0]])
    rows.sort(key=lambda row: -row[1])
    sums = [sum(column) for column in list(zip(*rows))[1:]]
    table(["CPU of", *KINDS, "new, wall"], *rows, ["all", *sums])
    if missing:
        say(f"  inbound has no {', '.join(missing)}: what they cost is within other stages.")


class Stopwatch:
    """Processor and wall time of each stage, without what the stages inside it took."""

    def __init__(self):
        self.inside, self.owner = ["the rest"], threading.get_ident()
        self.start()

    def start(self):
        self.spent = collections.defaultdict(lambda: [0.0, 0.0])
        self.last = time.process_time(), time.perf_counter()

    def tick(self):
        now = time.process_time(), time.perf_counter()
        for place in (0, 1):
            self.spent[self.inside[-1]][place] += now[place] - self.last[place]
        self.last = now

    def timed(self, stage, function, *args, **more):
        if threading.get_ident() != self.owner:
            return function(*args, **more)
        self.tick()
        self.inside.append(stage)
        try:
            return function(*args, **more)
        finally:
            self.tick()
            self.inside.pop()

    def wrap(self, owner, name, stage):
        function = getattr(owner, name)
        setattr(owner, name, lambda *args, **more: self.timed(stage, function, *args, **more))


def measure_stages(folder):
    """Print [names that inbound does not have, {kind: {stage: [processor, wall] µs}}]."""
    import inbound as program
    void = open(os.devnull, "w")    # noqa: SIM115 (to the end of the process)
    logging.basicConfig(stream=void, format="%(asctime)sZ %(message)s", level=20)
    watch, now, connect = Stopwatch(), [int(time.time())], sqlite3.connect

    class Connection(sqlite3.Connection):
        def execute(self, query, *args):
            stage = "COMMIT" if query == "COMMIT" else "SQL"
            return watch.timed(stage, super().execute, query, *args)

    def post(kind, number):
        """Post 150 mails of a kind; return {stage: [processor, wall] µs a mail}."""
        names = [name_of(f"{kind} {number} {place}") for place in range(150)]
        news = [name_of(f"new {number} {place}") for place in range(150)]
        bodies = [canonical(name) for name in (news if kind == "repeat" else names)]
        if kind == "reply":
            bodies = [canonical(name, parent) for name, parent in zip(names, news)]
        now[0] += 3600 * (kind == "confirmed")      # another hour, another cap
        watch.start()
        for body in bodies:
            call(app, body)
        watch.tick()
        return {stage: [1e6 / 150 * part for part in parts] for stage, parts in watch.spent.items()}

    missing = [name for name in STAGES if not hasattr(program, name)]
    for name in set(STAGES) - set(missing):
        watch.wrap(program, name, name)
    watch.wrap(program.Store, "write", "store")
    watch.wrap(logging.Logger, "info", "log")
    sqlite3.connect = lambda *args, **more: connect(*args, **{"factory": Connection} | more)
    store, spent = program.Store(f"{folder}/stages.db", lambda: now[0]), {}
    store.open()
    set_up(store.path)
    app = program.make_app(store)
    for kind in ["first", *KINDS]:      # the first reach the cap
        spent[kind] = {}
        for number in range(5):
            for stage, parts in post(kind, number).items():
                least = spent[kind].get(stage, parts)
                spent[kind][stage] = [*map(min, least, parts)]
    print(json.dumps([missing, spent]))


def call(app, body, expected="200"):
    """Post to a WSGI application in this process; another status than expected ends it all."""
    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": ENDPOINT, "CONTENT_TYPE": "application/json",
               "CONTENT_LENGTH": str(len(body)), "HTTP_X_MOBIEUS_INBOUND_SECRET": SECRET,
               "wsgi.input": io.BytesIO(body)}
    wsgiref.util.setup_testing_defaults(environ)
    answers = []
    content = b"".join(app(environ, lambda status, headers, *_: answers.append(status)))
    if answers[0][:3] != expected or b"quarantined" in content:
        raise SystemExit(f"{answers}: {content[:500]!r}")


def growth(plan, folder):
    say("\nGROWTH: tickets of 3 mails, a tenth of them confirmed, 1 rejected post for 200, made by "
        "the program.\nThen 8 clients as above, replies to any ticket; turn about with an empty "
        "file, after a round to warm both.")
    rows, verbs, figures, before = [], [], [], 0
    with (tempfile.TemporaryDirectory(dir=folder) as aside,
          inbound(f"{aside}/empty.db") as empty):
        for tickets in plan.tickets:
            path = f"{aside}/{tickets}.db"      # a copy, for the grown file may be kept
            shutil.copyfile(grown(folder, before, tickets), path)
            before, megabytes = tickets, Path(path).stat().st_size / 1e6
            verbs.append([f"{tickets:,}", *timed_verbs(path, tickets)])
            with inbound(path) as server:
                health = [1000 * server.ask("GET", "/healthz")[1] for _ in range(20)]
                bags, runs = {server: Mailbag(tickets), empty: Mailbag()}, {server: [], empty: []}
                for _ in range(1 + plan.rounds):
                    for one in (server, empty):
                        runs[one].append(drive(one, bags[one], 8, plan.seconds))
                faults, peak = sum(run.faults for run in runs[server]), server.memory("VmHWM")
            verbs[-1] += [f"{health[0]:.1f} ms, then {statistics.median(health):.1f}"]
            figures.append(middle(runs[server][1:]))
            rows.append([f"{tickets:,}", megabytes, *figures[-1],
                         ratio(runs[server][1:], runs[empty][1:]), peak, faults])
            os.remove(path)
    table(["tickets", "file MB", "mails/s", "p50 ms", "p99 ms", "CPU µs", "of empty", "peak MB",
           "faults"], *rows)
    say()
    table(["tickets", *VERBS, "/healthz"], *verbs)
    for place, title in ((0, "mails a second"), (2, "p99, ms")):
        PANELS.append((f"{title}, over tickets", [row[0] for row in rows],
                       {"inbound": [figure[place] for figure in figures]}))


VERBS = ["tickets", "show REF", "outbox", "rejected"]


def timed_verbs(path, tickets):
    """What each verb takes, the median of three, as "seconds, peak MB"."""
    found = sql(path, "SELECT reference FROM ticket WHERE id >= ? LIMIT 1", tickets // 2)
    reference = found[0][0] if found else "T-0000-0000"
    for verb in VERBS:
        runs = []
        for _ in range(3):
            began = time.perf_counter()
            output = subprocess.run([sys.executable, "-c", WATCHED, "--db", path,
                                     *verb.replace("REF", reference).split()], text=True,
                                    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            runs.append((time.perf_counter() - began, int(output.stderr.split()[-1]) / 1000))
        seconds, peak = map(statistics.median, zip(*runs))
        yield f"{seconds:.2f} s, {peak:.0f} MB"


def grown(folder, before, tickets):
    """Return the path of a file with so many tickets, made of the one with those `before`."""
    path = f"{folder}/grown-{tickets}.db"
    if not Path(path).exists():
        if before:
            shutil.copyfile(f"{folder}/grown-{before}.db", f"{path}-new")
        subprocess.run([sys.executable, __file__, "--child", "grow", f"{path}-new", str(before),
                        str(tickets)], check=True)
        os.rename(f"{path}-new", path)
    return path


def grow(path, first, last):
    """File tickets `first` to `last`: in a transaction the new ones and two rounds of replies."""
    import inbound as program
    first, last, began = int(first), int(last), time.time()
    now = [int(began)]
    store = program.Store(path, lambda: now[0])
    store.open()
    set_up(path)
    app = program.make_app(store)
    for start in range(first, last + 2 * BATCH if last else 0, BATCH):
        now[0] = int(began) - (2_000_000 - start) // HOUR * 3600
        mails = [relayed(name_of(place)) for place in range(start, min(start + BATCH, last))]
        for back in (BATCH, 2 * BATCH):
            for place in range(max(first, start - back), min(start - back + BATCH, last)):
                mails.append(relayed(name_of(f"reply {back} {place}"), name_of(place)))
        call(app, json.dumps(mails).encode())
        call(app, b"no mail %d" % start, "400")
        progress(f"growing to {last:,} tickets", (start + BATCH - first) / (last - first), began)
    store.close()
    sql(path, "UPDATE outbox SET state = 'sent', next_attempt_at = NULL WHERE state = 'queued'")
    sql(path, "PRAGMA wal_checkpoint(TRUNCATE)")
    [[tickets]] = sql(path, "SELECT count(*) FROM ticket")
    if tickets < last:
        raise SystemExit(f"{path} has {tickets:,} tickets, expected {last:,}: see its `rejected`")


def progress(text, part, began):
    part = min(1, part)
    left = (time.time() - began) * (1 / part - 1)
    if sys.stderr.isatty():
        bar = f"  {text} [{'#' * int(30 * part):30}] {left:4.0f} s left"
        sys.stderr.write(f"\r{bar}" if part < 1 else "\r\033[K")


def size(plan, folder):
    say("\nSIZE: one post of so many MB; and the slowest that others see, who probe and post "
        "meanwhile, every 10 ms.")
    rows, took, peak = [], collections.defaultdict(list), collections.defaultdict(list)
    for kind in ("raw", "JSON"):
        for megabytes in plan.megabytes:
            content_type, body = heavy(kind, megabytes)
            with inbound(f"{folder}/{kind}-{megabytes}.db") as server:
                with Others(server) as others:
                    status, seconds = server.ask("POST", ENDPOINT, body, content_type)
                took[kind].append(seconds)
                peak[kind].append(server.memory("VmHWM"))
                time.sleep(1)       # it may give memory back after its answer
                rows.append([f"{kind} {megabytes}", status, seconds, peak[kind][-1],
                             peak[kind][-1] * 1e6 / len(body), server.memory(),
                             others.slowest["GET"], others.slowest["POST"], others.faults])
    table(["kind, MB", "status", "s", "peak MB", "x body", "MB after", "probe ms", "post ms",
           "faults"], *rows)
    PANELS.append(("one post: seconds, over MB", plan.megabytes, took))
    PANELS.append(("one post: peak MB of memory, over MB", plan.megabytes, peak))


def burst(plan, folder):
    say(f"\nBURST: {plan.burst:,} mails of 32 clients as fast as they come, without a relay and "
        "with one that\naccepts connections and then says nothing.")
    rows = []
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        for relay in ("none", "hangs"):
            path = f"{folder}/burst-{relay}.db"
            with inbound(path) as server:
                if relay == "hangs":
                    sql(path, "UPDATE email_account SET smtp_host = '127.0.0.1', smtp_port = ?, "
                        "smtp_security = 'none'", silent.getsockname()[1])
                with Others(server) as others:
                    run = drive(server, Mailbag(), 32, count=plan.burst)
            rows.append([relay, len(run.latencies) / run.rate, run.rate, run.within(0.5),
                         run.within(0.99), run.within(1), others.slowest["GET"],
                         run.faults + others.faults])
    table(["relay", "s", "mails/s", "p50 ms", "p99 ms", "slowest ms", "probe ms", "faults"], *rows)


def start(plan, folder):
    path, times = f"{folder}/start.db", collections.defaultdict(list)
    with inbound(path) as server:
        drive(server, Mailbag(), 8, count=1000)
    for turn in range(7):
        began = time.perf_counter()
        with inbound(path) as server:
            status, _ = server.ask("POST", ENDPOINT, canonical(name_of(turn)))
            if status != 200:
                raise SystemExit(f"the first answer after serve is {status}")
            times["serve"].append(time.perf_counter() - began)
        for name, *program in (("help", CONSOLE, "--help"), ("bare", "pass")):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", *program], stdout=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - began)
    served, helped, bare = (1000 * statistics.median(taken) for taken in times.values())
    say(f"\nSTART: the first 200 {served:.0f} ms after `serve` on a file of 1,000 mails; --help "
        f"{helped:.0f} ms, {bare:.0f} of them Python's.")


# -------------------------------------------------------------------------------------------------
# The picture: a panel for each figure, logarithmic upwards. No background, and tones that can be
# read on white and on black, for GitHub shows it on both.

COLOURS = {"inbound": "#e5484d", "parse": "#8b8d98", "sync": "#4f8fd6", "Flask": "#30a46c",
           "raw": "#e5484d", "JSON": "#4f8fd6"}
WIDTH, HEIGHT = 400, 250


def picture():
    height = HEIGHT * math.ceil(len(PANELS) / 2)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {height}" '
             'font-family="system-ui, sans-serif" font-size="11" fill="#7d828a">']
    for place, contents in enumerate(PANELS):
        x, y = place % 2 * WIDTH, place // 2 * HEIGHT
        parts += [f'<g transform="translate({x} {y})">', *panel(*contents), "</g>"]
    return "\n".join([*parts, "</svg>\n"])


def panel(title, marks, curves):
    """The SVG lines of one panel; `curves` maps a name to a value for each mark."""
    logs = [math.log10(value) for curve in curves.values() for value in curve]
    spare = max(0.1, (1 - max(logs) + min(logs)) / 2)       # at least a factor of ten is shown
    low, span = min(logs) - spare, max(logs) - min(logs) + 2 * spare
    across = [75 + round(260 * place / max(1, len(marks) - 1)) for place in range(len(marks))]
    heights = {name: [round(210 - 155 * (math.log10(value) - low) / span) for value in curve]
               for name, curve in curves.items()}
    yield f'<text x="40" y="20" font-size="13" font-weight="600">{title}</text>'
    yield '<path d="M40 50V210H370" fill="none" stroke="#7d828a" stroke-opacity=".5"/>'
    for place, name in enumerate(curves):
        line = " ".join(f"{x},{y}" for x, y in zip(across, heights[name]))
        yield f'<text x="{40 + 80 * place}" y="38" fill="{COLOURS[name]}">&#9632; {name}</text>'
        yield f'<polyline points="{line}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>'
    for place, (mark, x) in enumerate(zip(marks, across)):
        yield f'<text x="{x}" y="226" text-anchor="middle">{mark}</text>'
        label = 999
        for name in sorted(curves, key=lambda name: curves[name][place]):   # upwards
            y = heights[name][place]
            label = min(y - 6, label - 11)      # above the label below
            value = shown(float(curves[name][place]))
            yield (f'<g fill="{COLOURS[name]}"><circle cx="{x}" cy="{y}" r="3"/>'
                   f'<text x="{x}" y="{label}" text-anchor="middle">{value}</text></g>')


SECTIONS = {"intake": intake, "stages": stages, "growth": growth, "size": size, "burst": burst,
            "start": start}
CHILDREN = {"ceiling": ceiling, "stages": measure_stages, "grow": grow}


def say_where(folder):
    """What the figures belong to, and what speaks against them."""
    git = ["git", "-C", HERE, "describe", "--always", "--dirty"]
    model = ["sed", "-n", "s/^model name.*: //p;T;q", "/proc/cpuinfo"]
    commit, processor, disk = (
        subprocess.run(command, capture_output=True, text=True).stdout.strip()
        for command in (git, model, ["stat", "-f", "-c", "%T", folder]))
    say(f"{time.strftime('%F')}, inbound {commit}; {os.cpu_count()} x {processor}, Linux "
        f"{os.uname().release}, {disk};\nPython {sys.version.split()[0]}, SQLite "
        f"{sqlite3.sqlite_version}, waitress {version('waitress')}")
    if disk == "tmpfs":
        say("NO DISK: here a sync costs nothing. Name a folder on a disk with --in.")
    if os.getloadavg()[0] > 0.5:
        say(f"NOT ALONE: the machine was busy before this began (load {os.getloadavg()[0]:.1f}).")


def main():
    if sys.argv[1:2] == ["--child"]:
        CHILDREN[sys.argv[2]](*sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="quick, full, sections")
    parser.add_argument("--in", dest="folder", metavar="DIR")
    args = parser.parse_args()
    if unknown := set(args.words) - {*PLANS, *SECTIONS}:
        parser.error(f"expected quick, full, {', '.join(SECTIONS)}; not {', '.join(unknown)}")
    sections = [word for word in args.words if word in SECTIONS]
    plan = PLANS["".join(word for word in args.words if word in PLANS)]
    with tempfile.TemporaryDirectory(dir=args.folder or "/var/tmp", prefix="bench-") as folder:
        say_where(folder)
        for name in sections or SECTIONS:
            SECTIONS[name](plan, args.folder if name == "growth" and args.folder else folder)
    if not sections:
        (HERE / "bench.txt").write_text("\n".join(LINES) + "\n", "utf-8")
        (HERE / "bench.svg").write_text(picture(), "utf-8")


if __name__ == "__main__":
    main()
