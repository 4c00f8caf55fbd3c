"""`serve` under systemd and behind a proxy: sockets, readiness, whose address counts, the log."""

import contextlib
import http.client
import io
import json
import logging
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest

import inbound
from conftest import HEADER, LONG, SECRET, URL, WRONG, File, eventually, mail_from

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ "


class Unit:
    """`inbound serve` as systemd starts it: it says on NOTIFY_SOCKET when it is ready."""

    def __init__(self, folder, *argv, address="\0inbound-tests-", env=None):
        self.systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.systemd.settimeout(LONG)
        self.systemd.bind(address + str(os.getpid()) if address[0] == "\0" else address)
        self.log = folder / "log"
        name = self.systemd.getsockname()
        name = name if isinstance(name, str) else "@" + name[1:].decode()
        with self.log.open("ab") as log:
            at = os.fstat(log.fileno())
            env = {name: value.format(at) for name, value in (env or {}).items()}
            environment = {name: value for name, value in os.environ.items()
                           if not name.startswith("INBOUND_")}
            self.process = subprocess.Popen(
                [sys.executable, inbound.__file__, "serve", *argv], cwd=folder, text=True,
                stdout=subprocess.PIPE, stderr=log,
                env=environment | {"PYTHONUNBUFFERED": "1", "NOTIFY_SOCKET": name} | env)

    def said(self):
        return self.systemd.recv(99)

    def stop(self):
        """End it; return what it printed."""
        with contextlib.closing(self.systemd):
            self.process.send_signal(signal.SIGTERM)
            return self.process.communicate(timeout=LONG)[0]


@pytest.fixture
def start(tmp_path):
    units = []

    def started(*argv, **more):
        units.append(Unit(tmp_path, *argv, **more))
        assert units[-1].said() == b"READY=1"
        return units[-1]

    yield started
    for unit in units:
        unit.stop()


def over(path, method="GET", url="/healthz", *more):
    """A request to a unix socket: (status, object)."""
    connection = http.client.HTTPConnection("localhost", timeout=LONG)
    connection.sock = socket.socket(socket.AF_UNIX)
    with contextlib.closing(connection):
        connection.sock.connect(str(path))
        connection.request(method, url, *more)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def serve_fails(folder, *argv):
    """Assert that `serve` ends with one line of words; return them."""
    done = subprocess.run([sys.executable, inbound.__file__, "serve", *argv], cwd=folder,
                          capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done
    [words] = re.findall("^inbound: (.+)\n$", done.stderr)
    return words


# Where it listens ---------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_socket_is_for_the_owner_and_its_group_and_goes_with_the_server(start, tmp_path):
    path = tmp_path / "inbound.sock"
    unit = start("--listen", f"unix:{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert over(path)[0] == 200
    unit.stop()
    assert not path.exists()


@pytest.mark.slow
def test_the_curl_that_is_printed_reaches_a_socket_too(start, tmp_path):
    unit = start("--listen", f"unix:{tmp_path}/with blank.sock")
    printed = ""
    while "-d '" not in printed:
        printed += unit.process.stdout.readline()
    done = subprocess.run(shlex.split("curl " + printed.partition("curl ")[2]),
                          capture_output=True, text=True, timeout=LONG)
    assert json.loads(done.stdout)["status"] == "created", done
    unit.stop()
    again = start("--listen", "unix:short.sock")
    assert "listening: --unix-socket short.sock http://localhost/api/" in again.stop()


@pytest.mark.slow
def test_what_a_dead_server_left_is_replaced(start, tmp_path):
    path = tmp_path / "inbound.sock"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(path))
    start("--listen", f"unix:{path}")
    assert over(path)[0] == 200


@pytest.mark.slow
def test_a_live_servers_socket_is_left_alone(start, tmp_path):
    path = tmp_path / "inbound.sock"
    start("--listen", f"unix:{path}")
    assert "another server listens there" in serve_fails(tmp_path, "--listen", f"unix:{path}")
    assert over(path)[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize("place, words", [
    ("unix:file", "'unix:file': .*in use"), ("unix:none/here.sock", "No such file"),
    ("unix:" + "x" * 200, "too long"), ("unix:", "cannot listen"), ("unix:.", "in use"),
    ("", "expected HOST:PORT"), ("127.0.0.1:99999", "port up to 65535"),
    ("127.0.0.1:none", "cannot listen")])
def test_what_is_no_place_to_listen_at_is_refused_in_a_sentence(tmp_path, place, words):
    file = tmp_path / "file"
    file.write_text("a letter")
    assert re.search(words, serve_fails(tmp_path, "--listen", place))
    assert file.read_text() == "a letter" and not (tmp_path / "inbound.db").exists()


# Under systemd ------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("abstract", [True, False])
def test_systemd_is_told_when_it_answers_and_when_it_stops(start, tmp_path, abstract):
    address = "\0inbound-tests-" if abstract else str(tmp_path / "notify")
    unit = start("--listen", "unix:inbound.sock", address=address)
    assert over(tmp_path / "inbound.sock")[0] == 200
    unit.process.send_signal(signal.SIGTERM)
    assert unit.said() == b"STOPPING=1"


@pytest.mark.slow
def test_a_server_that_wants_to_be_started_anew_ends_with_a_failure(start):
    """Units and containers that restart on failure take 0 for what was wanted."""
    unit = start("--listen", "unix:inbound.sock")
    unit.process.send_signal(signal.SIGUSR1)
    assert unit.said() == b"STOPPING=1" and unit.process.wait(20) == 1


@pytest.mark.slow
def test_nobody_at_the_notify_socket_costs_nothing(tmp_path, serve):
    served = serve(env={"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    assert served.stop() == 0


@pytest.mark.parametrize("environment, path", [
    ({}, "inbound.db"), ({"INBOUND_DB": ""}, "inbound.db"), ({"INBOUND_DB": "a"}, "a"),
    ({"STATE_DIRECTORY": "/var/lib/inbound"}, "/var/lib/inbound/inbound.db"),
    ({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b"}, "/var/lib/a/inbound.db"),
    ({"STATE_DIRECTORY": "/var/lib/inbound", "INBOUND_DB": "/b.db"}, "/b.db")])
def test_the_database_is_where_the_environment_says(monkeypatch, environment, path):
    for name in ("INBOUND_DB", "STATE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert inbound.default_path() == path


@pytest.mark.slow
def test_a_service_has_its_database_in_its_state_directory(start, tmp_path):
    (tmp_path / "state").mkdir()
    start("--listen", "unix:inbound.sock", env={"STATE_DIRECTORY": str(tmp_path / "state")})
    assert (tmp_path / "state/inbound.db").exists() and not (tmp_path / "inbound.db").exists()


# The log ------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_start_stop_and_each_request_are_a_line_with_the_time_in_utc(start, tmp_path):
    began = time.strftime("%FT%H", time.gmtime())
    unit = start("--listen", "unix:inbound.sock", env={"TZ": "Asia/Tokyo"})
    over(tmp_path / "inbound.sock", "POST", URL)
    unit.stop()
    begin, request, end = unit.log.read_text().splitlines()
    assert re.fullmatch(rf"{TIME}start: inbound {inbound.VERSION} on inbound\.db", begin)
    assert re.fullmatch(TIME + '401 0B [0-9]+ms localhost "error": "no right secret .*"', request)
    assert re.fullmatch(f"{TIME}stop", end)
    assert began <= begin[:13] <= time.strftime("%FT%H", time.gmtime())


@pytest.mark.slow
def test_journald_gets_a_level_and_no_second_time(start, tmp_path):
    unit = start("--listen", "unix:inbound.sock",
                 env={"JOURNAL_STREAM": "{0.st_dev}:{0.st_ino}"})
    over(tmp_path / "inbound.sock", "POST", URL)
    (tmp_path / "inbound.db").rename(tmp_path / "gone.db")
    assert over(tmp_path / "inbound.sock")[0] == 503
    unit.stop()
    first = [line.partition(" ")[0] for line in unit.log.read_text().splitlines()]
    assert "<3>503" in first        # and the courier may have been at work, too
    assert [word for word in first if word[:3] == "<6>"] == ["<6>start:", "<6>401", "<6>stop"]
    assert {word[:3] for word in first} == {"<6>", "<3>"}


@pytest.mark.slow
def test_where_the_log_goes_elsewhere_than_to_the_journal_it_has_its_time(start):
    unit = start("--listen", "unix:inbound.sock", env={"JOURNAL_STREAM": "1:1"})
    unit.stop()
    assert re.match(f"{TIME}start", unit.log.read_text())


@pytest.mark.slow
def test_another_server_gets_the_same_lines(file, tmp_path):
    """Any server that configures no logging: wsgiref's, that logs its own requests beside."""
    script = """if True:
        import http.client, inbound, threading, wsgiref.simple_server as simple
        server = simple.make_server("127.0.0.1", 0, inbound.app)
        threading.Thread(target=server.handle_request).start()
        client = http.client.HTTPConnection("127.0.0.1", server.server_port)
        client.request("POST", "/x", headers={"X-Forwarded-For": "198.51.100.7"})
        client.getresponse().read()
        server.server_close()
        """
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=LONG,
        env={**os.environ, "INBOUND_DB": str(file.path), "INBOUND_TRUSTED_PROXY": "127.0.0.1"})
    lines = [line for line in done.stderr.splitlines() if re.match(TIME, line)]
    assert re.fullmatch(f"{TIME}start: inbound .*", lines[0])
    assert re.fullmatch(rf'{TIME}404 0B \d+ms 198\.51\.100\.7 "error": .*', lines[1])
    assert re.fullmatch(f"{TIME}stop", lines[2]) and "Traceback" not in done.stderr


def is_read_only(desk):
    desk.store.write(lambda db, now: db.execute("PRAGMA query_only = 1"))


def is_gone(desk):
    desk.store.close()
    desk.path.unlink()


@pytest.mark.parametrize("words, trouble", [
    ("readonly", is_read_only), ("no database at", is_gone), ("locked", File.locked),
    ("replaced or deleted", lambda desk: desk.path.unlink())])
def test_a_known_fault_is_one_line_and_no_traceback(desk, caplog, impatient, words, trouble):
    desk.post(mail_from("before"))
    caplog.set_level(logging.INFO)
    with trouble(desk) or contextlib.nullcontext():
        desk.post(mail_from("during"), status=503)
    [record] = [record for record in caplog.records if record.name == "inbound"]
    assert words in record.getMessage() and record.levelno == logging.ERROR
    assert record.exc_info is None


def test_a_client_that_hangs_up_is_one_line_and_no_traceback(desk, caplog):
    class Broken(io.BytesIO):
        def read(self, size=-1):
            raise OSError("client disconnected")
    caplog.set_level(logging.INFO)
    answers = []
    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": URL, "CONTENT_LENGTH": "9",
               "HTTP_X_MOBIEUS_INBOUND_SECRET": SECRET, "wsgi.input": Broken()}
    inbound.make_app(desk.store)(environ, lambda status, headers: answers.append(status))
    assert answers == ["400 Bad Request"]
    [record] = [record for record in caplog.records if record.name == "inbound"]
    assert "client disconnected" in record.getMessage() and record.exc_info is None


# Whose address counts -----------------------------------------------------------------------------

CLIENTS = [     # who is trusted, who is connected, X-Forwarded-For, who is the client
    ("", "192.0.2.1", "198.51.100.7", "192.0.2.1"),
    ("192.0.2.1", "192.0.2.1", "198.51.100.7", "198.51.100.7"),
    ("192.0.2.1", "192.0.2.9", "198.51.100.7", "192.0.2.9"),
    ("192.0.2.1", "192.0.2.1", None, "192.0.2.1"),
    ("192.0.2.1", "192.0.2.1", "203.0.113.1, 198.51.100.7", "198.51.100.7"),
    ("192.0.2.1", "192.0.2.1", "203.0.113.1,  198.51.100.7 ", "198.51.100.7"),
    ("192.0.2.1", "192.0.2.1", "2001:DB8::7", "2001:db8::7"),
    ("192.0.2.1", "192.0.2.1", "fe80::7%eth0 401 forged", "fe80::7"),
    ("192.0.2.1", "192.0.2.1", "", "192.0.2.1"),
    ("192.0.2.1", "192.0.2.1", "198.51.100.7,", "192.0.2.1"),
    ("192.0.2.1", "192.0.2.1", "unknown", "192.0.2.1"),
    ("192.0.2.1", "192.0.2.1", '"[::1', "192.0.2.1"),
    ("192.0.2.1", "192.0.2.1", "\xff\x00" * 2000, "192.0.2.1"),
    ("::1", "::1", "198.51.100.7", "198.51.100.7"),
    ("localhost", "", "198.51.100.7", "198.51.100.7"),
    ("localhost", None, "198.51.100.7", "198.51.100.7"),
    ("localhost", "localhost", "198.51.100.7", "198.51.100.7"),
    ("localhost", "127.0.0.1", "198.51.100.7", "198.51.100.7"),
    ("localhost", "::1", "198.51.100.7", "198.51.100.7"),
    ("localhost", "192.0.2.1", "198.51.100.7", "192.0.2.1"),
    ("", "", "198.51.100.7", "localhost"),
    ("", None, "198.51.100.7", "localhost"),
]


@pytest.mark.parametrize("trusted, peer, forwarded, client", CLIENTS)
def test_the_client_is_who_the_trusted_proxy_saw(trusted, peer, forwarded, client):
    environ = {"REMOTE_ADDR": peer, "HTTP_X_FORWARDED_FOR": forwarded}
    environ = {name: value for name, value in environ.items() if value is not None}
    assert inbound.client_of(environ, trusted) == client


@pytest.mark.slow
def test_a_proxys_client_is_logged_and_counted_and_a_broken_header_costs_no_mail(file, serve):
    served = serve("inbound.db", "--trusted-proxy", "127.0.0.1")
    for number, forwarded in enumerate([
            "203.0.113.1, 198.51.100.7", 'x"[,', "unknown", ",,", "[::1", "", "1.2.3.4:5:6"]):
        headers = {HEADER: SECRET, "X-Forwarded-For": forwarded, "X-Forwarded-Proto": "a,b",
                   "Forwarded": 'for="', "X-Forwarded-Port": "1,2"}
        assert served.post(mail_from(f"mail{number}"), headers=headers)[0] == 200, forwarded
    refused = {HEADER: WRONG, "X-Forwarded-For": "203.0.113.1, 198.51.100.9"}
    assert served.post({}, headers=refused)[0] == 401
    eventually(lambda: file.sql("SELECT client FROM refused_caller") == [("198.51.100.9",)])
    served.stop()
    log = served.log_text()
    assert re.search(r"^\S+ 200 \d+B \d+ms 198\.51\.100\.7 ", log, re.M)
    assert re.search(r"^\S+ 401 \d+B \d+ms 198\.51\.100\.9 ", log, re.M)
    assert "203.0.113.1" not in log


@pytest.mark.slow
def test_a_stranger_gives_himself_no_other_address(file, serve):
    served = serve()
    headers = {HEADER: WRONG, "X-Forwarded-For": "198.51.100.9"}
    assert served.post({}, headers=headers)[0] == 401
    served.stop()
    assert "198.51.100.9" not in served.log_text() and " 127.0.0.1 " in served.log_text()


@pytest.mark.slow
def test_a_proxy_at_the_socket_is_trusted_by_the_name_localhost(start, tmp_path):
    unit = start("--listen", "unix:inbound.sock", "--trusted-proxy", "localhost")
    over(tmp_path / "inbound.sock", "POST", URL, "", {"X-Forwarded-For": "198.51.100.7"})
    unit.stop()
    assert re.search(r" 401 0B \d+ms 198\.51\.100\.7 ", unit.log.read_text())


@pytest.mark.slow
def test_a_trusted_proxy_that_is_no_address_is_refused(tmp_path):
    assert "'proxy.example' does not" in serve_fails(tmp_path, "--trusted-proxy", "proxy.example")
