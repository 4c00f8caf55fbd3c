"""`inbound relay`: a mail on standard input becomes a post, the answer an exit code (SPEC 6).

The command runs as an MTA's pipe runs it, in a process of its own. `serve` is the real endpoint;
`scripted` is whatever else may listen there.
"""

import contextlib
import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading

import pytest

import inbound
from conftest import SECRET, URL, WRONG

pytestmark = pytest.mark.slow

STORED, USAGE, DATA, LATER, DENIED = 0, 2, 65, 75, 77       # sysexits.h says so
CLEAN = {name: value for name, value in os.environ.items()
         if not re.search("(?i)^inbound_|_proxy$|^sender$", name)}
MAIL = (b"From: Ada Lovelace <ada@customer.example>\r\nSubject: Printer on fire\r\n"
        b"Message-ID: <first@customer.example>\r\n\r\nIt burns.\r\n")
FORGED = b"Return-Path: <forged@evil.example>\r\n"


def mail(number, extra=b""):
    """MAIL with an id of its own and with more header lines at its end."""
    return MAIL.replace(b"first", b"n%d" % number).replace(b"\r\n\r\n", b"\r\n" + extra + b"\r\n")


@pytest.fixture
def pipe(tmp_path):
    """Run `relay URL`, assert its exit code (None: any but 0), return what it said."""
    here = tmp_path / "queue"
    here.mkdir()

    def run(url, *argv, code=STORED, content=MAIL, **env):
        done = subprocess.run(
            [sys.executable, inbound.__file__, "relay", url, *argv], input=content, timeout=60,
            capture_output=True, cwd=here,
            env=CLEAN | {"PYTHONWARNINGS": "error", "INBOUND_SECRET": SECRET} | env)
        said, complaint = done.stdout.decode(), done.stderr.decode()
        assert done.returncode == code or (code is None and done.returncode), (
            done.returncode, said, complaint)
        assert "Traceback" not in complaint and not (complaint if code == STORED else said)
        return said + complaint

    run.here = here
    return run


@pytest.fixture
def endpoint(desk, serve):
    """The URL of the real endpoint; `desk` looks into its database."""
    return f"http://127.0.0.1:{serve().port}{URL}"


class Scripted(http.server.ThreadingHTTPServer):
    """Says `answer`, bytes as they are, whatever it is asked; `asked` has (verb, headers, body)."""

    daemon_threads = True

    def __init__(self):
        self.asked, self.answer = [], b""
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}{URL}"


class Answers(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.asked.append((self.command, self.headers, body))
        self.wfile.write(self.server.answer)
        self.close_connection = True

    do_GET = do_POST

    def log_message(self, *args):
        pass


@pytest.fixture
def scripted():
    """Start a Scripted: scripted(answer)."""
    with contextlib.ExitStack() as stack:
        def start(answer):
            server = stack.enter_context(Scripted())
            server.answer = answer
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return server
        yield start


def page(status, body="", *lines):
    head = "\r\n".join([f"HTTP/1.0 {status} Words", *lines])
    return f"{head}\r\n\r\n{body}".encode()


def envelopes(desk):
    return [row[0] for row in desk.sql("""SELECT envelope_from FROM message
        WHERE direction = 'in' ORDER BY id""")]


# The mail -----------------------------------------------------------------------------------------

def test_a_mail_becomes_a_ticket_and_its_repeat_changes_nothing(desk, endpoint, pipe):
    first = json.loads(pipe(endpoint, "--sender", "bounce@customer.example"))
    assert first["status"] == "created"
    message = desk.show(first["ticket"])["messages"][0]
    assert (message["subject"], message["text"].strip()) == ("Printer on fire", "It burns.")
    assert (message["from"], message["envelope_from"]) == (
        "ada@customer.example", "bounce@customer.example")
    again = json.loads(pipe(endpoint, "--sender", "bounce@customer.example"))
    assert (again["status"], again["ticket"]) == ("duplicate", first["ticket"])
    assert (desk.count("ticket"), envelopes(desk)) == (1, ["bounce@customer.example"])


# Arguments, $SENDER, and the envelope sender that is stored.
SENDERS = [
    (["--sender", "a@b.example"], None, "a@b.example"),
    (["--sender=a@b.example"], None, "a@b.example"),
    (["--sender=<a@b.example>"], None, "a@b.example"),
    (["--sender=-a@b.example"], None, "-a@b.example"),
    (['--sender="a b"@c.example'], None, '"a b"@c.example'),
    (["--sender=jürgen@b.example"], None, "jürgen@b.example"),
    ([], "a@b.example", "a@b.example"),
    (["--sender=a@b.example"], "c@d.example", "a@b.example"),
    (["--sender", ""], None, ""),
    (["--sender="], None, ""),
    (["--sender", "<>"], None, ""),
    ([], "", ""),
    ([], "<>", ""),
    (["--sender="], "c@d.example", ""),
    ([], None, None),
]


def test_the_envelope_sender_is_the_option_else_the_variable_else_unknown(desk, endpoint, pipe):
    for number, (argv, variable, _) in enumerate(SENDERS):
        env = {} if variable is None else {"SENDER": variable}
        pipe(endpoint, *argv, content=mail(number), **env)
    assert envelopes(desk) == [expected for *_, expected in SENDERS]


# Arguments, what stands before MAIL, what stands below in its header, the envelope sender.
PATHS = [
    (["--sender=a@b.example"], FORGED, b"", "a@b.example"),
    (["--sender=a@b.example"], b"", FORGED, "a@b.example"),
    (["--sender="], FORGED, b"", ""),
    (["--sender="], b"", FORGED, ""),
    ([], b"", FORGED, None),
    ([], b"Return-Path: <mta@b.example>\r\n", FORGED, "mta@b.example"),
    ([], b"Return-Path: <>\r\n", FORGED, ""),
    ([], b"From x@y.example Mon Sep  1 10:00:00 2025\nReturn-Path: <mta@b.example>\n", b"",
     "mta@b.example"),
]


def test_a_return_path_that_the_sender_wrote_counts_for_nothing(desk, endpoint, pipe):
    for number, (argv, above, below, _) in enumerate(PATHS):
        pipe(endpoint, *argv, content=above + mail(number, below))
    assert envelopes(desk) == [expected for *_, expected in PATHS]


@pytest.mark.parametrize("line", [
    b"From ada@customer.example Mon Sep  1 10:00:00 2025\n",
    b"From MAILER-DAEMON Mon Sep  1 10:00:00 2025\r\n",
    b">From ada@customer.example  Mon Sep  1 10:00:00 2025 remote from mx\nFrom x\n"])
def test_an_mbox_line_before_the_headers_is_no_part_of_the_mail(desk, endpoint, pipe, line):
    content = line + MAIL + b"From here on it is text.\r\n"
    answer = json.loads(pipe(endpoint, "--sender=a@b.example", content=content))
    message = desk.show(answer["ticket"])["messages"][0]
    assert message["headers"] == [
        ["Return-Path", "<a@b.example>"], ["From", "Ada Lovelace <ada@customer.example>"],
        ["Subject", "Printer on fire"], ["Message-ID", "<first@customer.example>"]]
    assert message["text"].splitlines() == ["It burns.", "From here on it is text."]


def test_eight_bit_bytes_arrive_unchanged(desk, endpoint, pipe):
    content = bytes(range(128, 256)) * 8 + b"\r\n\0\r\n.\r\n\xff"
    head = MAIL.partition(b"\r\n\r\n")[0]
    answer = json.loads(pipe(endpoint, "--sender=", content=head + b"""
Content-Type: multipart/mixed; boundary=b\n\n--b
Content-Type: text/plain; charset=iso-8859-1\nContent-Transfer-Encoding: 8bit\n
Gr\xfc\xdfe\n--b
Content-Type: application/octet-stream; name=raw.bin\nContent-Transfer-Encoding: binary\n
""" + content + b"\n--b--\n"))
    [message] = desk.show(answer["ticket"])["messages"]
    assert message["text"].strip() == "Grüße"
    [file] = message["attachments"]
    assert (file["filename"], file["size"]) == ("raw.bin", len(content))
    assert file["sha256"] == hashlib.sha256(content).hexdigest()


def test_the_post_is_the_mail_byte_for_byte_below_its_return_path(pipe, scripted):
    server = scripted(page(200, '{"status": "created"}'))
    content = MAIL + bytes(range(256)) + b"\n\r\r\n.\n"
    pipe(server.url, "--sender=a@b.example", content=content)
    pipe(server.url, content=content)
    assert [body for *_, body in server.asked] == [
        b"Return-Path: <a@b.example>\r\n" + content, content]
    assert {headers["Content-Type"] for _, headers, _ in server.asked} == {"message/rfc822"}


def test_relay_neither_needs_nor_makes_a_database(endpoint, pipe):
    pipe(endpoint, INBOUND_DB="/nonexistent/inbound.db")
    pipe(endpoint)
    assert [*pipe.here.iterdir()] == []


# The secret ---------------------------------------------------------------------------------------

# Arguments, $INBOUND_SECRET (empty = none), what FILE holds (None = there is none), exit code.
SECRETS = [
    ([], SECRET, None, STORED),
    (["--secret-file", "FILE"], "", SECRET.encode(), STORED),
    (["--secret-file", "FILE"], "", SECRET.encode() + b"\r\n", STORED),
    (["--secret-file", "FILE"], SECRET, None, STORED),
    ([], WRONG, None, DENIED),
    (["--secret-file", "FILE"], "", WRONG.encode(), DENIED),
    (["--secret-file", "FILE"], "", b"\n", DENIED),
    (["--secret-file", "FILE"], "", None, LATER),
    (["--secret-file", "."], "", None, LATER),
    (["--secret-file", "FILE"], "", b"\xff\xfe-no-text-at-all", LATER),
    (["--secret-file", "FILE"], "", "€-is-in-no-header-of-http".encode(), LATER),
    ([], "", None, LATER),
]


@pytest.mark.parametrize("argv, variable, content, code", SECRETS)
def test_the_secret_is_the_variables_else_the_files(
        desk, endpoint, pipe, argv, variable, content, code):
    if content is not None:
        (pipe.here / "FILE").write_bytes(content)
    said = pipe(endpoint, *argv, code=code, INBOUND_SECRET=variable)
    assert desk.count("ticket") == (code == STORED)
    assert said.strip() and WRONG not in said


def test_without_an_option_the_file_is_inbound_secret_here(desk, endpoint, pipe):
    (pipe.here / "inbound.secret").write_text(SECRET + "\n")
    pipe(endpoint, INBOUND_SECRET="")
    assert desk.count("ticket") == 1


# Arguments after the endpoint's URL, {} = the right secret, and what follows the URL; exit codes.
ARGUMENTS = [
    ("", ["{}"], USAGE),
    ("", ["--inbound-secret={}"], USAGE),
    ("", ["--secret", "{}"], None),
    ("", ["--secret={}"], None),
    ("?secret={}", [], LATER),
    ("?secret={}", ["--secret-file", "/dev/null"], DENIED),
]


@pytest.mark.parametrize("query, words, code", ARGUMENTS)
def test_the_secret_is_never_taken_from_the_command_line(
        desk, endpoint, pipe, query, words, code):
    argv = [word.format(SECRET) for word in (endpoint + query, *words)]
    pipe(*argv, code=code, INBOUND_SECRET="", INBOUND_DB=str(desk.path))
    assert desk.count("ticket") == 0


SAID = [
    ([], f"\n{SECRET}-old\n{SECRET}\n"),
    (["--secret", SECRET], None),
    ([SECRET], None),
    ([], SECRET + "-and-more"),
    ([], SECRET + "€"),
]


@pytest.mark.parametrize("argv, content", SAID)
def test_no_complaint_shows_the_secret(desk, endpoint, pipe, argv, content):
    if content:
        (pipe.here / "inbound.secret").write_text(content, "utf-8")
    said = pipe(endpoint, *argv, code=None, INBOUND_SECRET="", INBOUND_DB=str(desk.path))
    assert SECRET not in said


# The exit code ------------------------------------------------------------------------------------

OURS = '{"status": "created", "ticket": "T-7F3K-9Q2M", "message": 17}'
ELSEWHERE = "Location: http://127.0.0.1:9/"
# Exit code, the server's whole answer.
ANSWERS = [
    (STORED, page(200, OURS)),
    (STORED, page(200, OURS.replace("created", "appended"))),
    (STORED, page(200, OURS.replace("created", "duplicate"))),
    (STORED, page(200, OURS.replace("created", "quarantined"))),
    (DENIED, page(401, '{"error": "the secret"}')),
    (DATA, page(400, '{"error": "not JSON"}')),
    (DATA, page(413, "Request Entity Too Large")),
    (DATA, page(415, '{"error": "content type"}')),
    (DATA, page(422, '{"error": "from"}')),
    (LATER, b""),
    (LATER, page(503, '{"error": "locked"}', "Retry-After: 30")),
    (LATER, page(500)),
    (LATER, page(502, "<h1>Bad Gateway</h1>")),
    (LATER, page(403, "<h1>Forbidden</h1>")),
    (LATER, page(404, '{"error": "nothing here"}')),
    (LATER, page(405)),
    (LATER, page(429)),
    (LATER, page(200)),
    (LATER, page(200, "ok")),
    (LATER, page(200, "<h1>Welcome to nginx!</h1>")),
    (LATER, page(204)),
    (LATER, page(200, "{}")),
    (LATER, page(301, "", ELSEWHERE)),
    (LATER, page(302, "", ELSEWHERE)),
    (LATER, page(307, "", ELSEWHERE)),
    (LATER, page(308, "", ELSEWHERE)),
    (LATER, page(302)),
    (LATER, page(200, '{"error": "log in first"}')),
    (LATER, page(200, '["a", "b"]')),
    (LATER, b"SSH-2.0-OpenSSH_9.2\r\n"),
    (LATER, page(200, '{"sta', "Content-Length: 99")),
    (LATER, page(503, '{"err', "Content-Length: 99")),
    (LATER, page(200, OURS, "X: " + "y" * 70000)),
]


@pytest.mark.parametrize("code, answer", ANSWERS, ids=lambda value: str(value)[:40])
def test_each_answer_has_its_exit_code(pipe, scripted, code, answer):
    server = scripted(answer)
    pipe(server.url, code=code)
    assert server.asked[0][0] == "POST"


def test_a_refused_connection_is_for_later(pipe):
    with socket.socket() as bound:      # nobody listens there, and nobody else can
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        assert "refused" in pipe(f"http://127.0.0.1:{port}{URL}", code=LATER)


@pytest.mark.parametrize("url, code", [
    ("127.0.0.1:9", LATER), ("http:///x", LATER), ("gopher://127.0.0.1/", LATER),
    ("http://[::1/", LATER), ("http://127.0.0.1:9/a b", LATER),
    ("http://127.0.0.1:port/", LATER)])
def test_a_url_that_cannot_be_posted_to_keeps_the_mail(pipe, url, code):
    pipe(url, code=code)


def test_a_desk_without_a_secret_says_503_and_the_mail_waits(desk, endpoint, pipe):
    desk.execute("UPDATE email_account SET inbound_secret = NULL")
    assert "no secret is set" in pipe(endpoint, code=LATER)
    desk.execute("UPDATE email_account SET inbound_secret = ?", SECRET)
    pipe(endpoint)
    assert desk.count("ticket") == 1


def test_a_mail_over_the_limit_is_refused_for_good(desk, serve, pipe):
    url = f"http://127.0.0.1:{serve(env={'INBOUND_MAX_BODY': '1000'}).port}{URL}"
    pipe(url, code=DATA, content=MAIL + b"x" * 2000)
    assert desk.count("ticket") == 0
    pipe(url)
    assert desk.count("ticket") == 1


@pytest.mark.parametrize("status", [
    301, 302, 303, 307, 308])
def test_a_redirect_does_not_carry_the_secret_elsewhere(pipe, scripted, status):
    elsewhere = scripted(page(200, OURS))
    server = scripted(page(status, "", f"Location: {elsewhere.url}"))
    pipe(server.url, code=LATER)
    assert len(server.asked) == 1 and elsewhere.asked == []
