"""inbound: email in, tickets out.

    provider, relay, MTA
      │ POST
      ▼
    authenticate ▶ read ▶ normalise ▶ classify ▶ thread ▶ store ──▶ 200
                                                            │ the same transaction
    customer ◀── SMTP ◀── courier ◀── outbox ◀──────────────┘

Five promises:
  1. A 200 means it is on disk: ticket, message, attachments and outbox row, all or none.
  2. The same message twice changes nothing, at once or a week later.
  3. Nothing that proved it knew the secret is lost: what is no message is in `rejected`.
  4. Automatic mail is kept and never answered.
  5. Nobody can stop it with a mail, or from outside: whatever is parsed has a budget, and
     nothing is parsed for a stranger.

Usage: inbound [--db FILE] VERB      (FILE: $INBOUND_DB, else inbound.db, in the
                                      $STATE_DIRECTORY where systemd sets one)

  serve [--listen 127.0.0.1:8080 | unix:/path]    make the database if there is none,
                                      answer, send
  secret [show | set VALUE | rotate [--keep 24h]]     what callers of the endpoint must know
  account [list | show | add ADDRESS | set KEY=VALUE ...]   address, queue, relay, template
  tickets [open | waiting | closed | all]   list them; --queue, --from, --search, --limit
  show REF [--last N]                 a ticket: its messages, and why each was treated so
  attachment ID [FILE]                write an attachment to FILE or standard output
  reply REF [--to ADDRESS]            answer with the text on standard input
  close REF                           close a ticket; its requester's reply opens it again
  reopen REF                          open a closed ticket
  relay URL [--sender ADDRESS] [--secret-file FILE]   post the mail on standard input
  outbox [list | show ID | send | retry ID | retry all]     mail on its way out
  rejected [list | show ID | replay [ID] | delete ID]       posts that became no message
  import PATH                         bring in an mbox or a Maildir, confirming nothing
  doctor [--url URL]                  check everything, say what to do, exit 1 on a FAIL
  backup FILE                         a whole copy of the live database
  forget ADDRESS                      erase a person

`inbound VERB --help` says more of one; `--json` prints what a program reads. Where there
are several accounts, `--account ADDRESS` says which (default: the default one).
Errors are one line on standard error, exit 1; wrong usage exits 2.
As a WSGI application for another server: `inbound:app` (database from $INBOUND_DB), with
`inbound outbox send` from cron.
"""

from __future__ import annotations

import atexit
import base64
import binascii
import codecs
import contextlib
import ctypes
import difflib
import email.contentmanager
import email.header
import email.message
import email.policy
import email.utils
import functools
import getopt
import hashlib
import hmac
import html
import http.client
import inspect
import io
import ipaddress
import json
import logging
import math
import os
import queue
import re
import resource
import secrets
import shlex
import shutil
import signal
import smtplib
import socket
import sqlite3
import ssl
import sys
import textwrap
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

VERSION = "2.0.0"
ENDPOINT = "/api/helpdesk/inbound-email"
log = logging.getLogger("inbound")

# -----------------------------------------------------------------------------------------
# Limits: each with its unit, what happens past it, and where the number comes from.

if not os.environ.get("INBOUND_MAX_BODY", "1").isdecimal():
    sys.exit("inbound: $INBOUND_MAX_BODY is a number of bytes, like 75497472")
MAX_BODY = int(os.environ.get("INBOUND_MAX_BODY", 72 * 2**20))  # bytes; 413. 50 MB, base64
HEAVY = 2**20               # bytes; larger posts are understood one at a time …
HEAVY_WAIT = 4              # … and wait so many seconds, then 503; `serve` has a queue

# What one mail may be made of. Past a bound it is a ticket with what could be read, and the
# whole of it is kept as an attachment (SPEC 3.0).
MAX_DEPTH = 10              # multiparts inside each other
MAX_PARTS = 1000            # of a mail, or attachments of a post
MAX_HEADER_LINES = 1000     # of a mail and its parts together
MAX_HEADER_BYTES = 2**18    # likewise; Postfix stops at 100 KB
MAX_FIELDS = 1000           # of a form; the rest is not looked at
MAX_VALUES = 100_000        # strings, lists and objects of a JSON text: 8 MB of memory
MAX_MEMBERS = 10_000        # mails of one post; past it 400 and kept. Mandrill posts 1,000
MAX_HTML = 2**18            # characters that the text is made of; the HTML is stored whole

MAX_ADDRESS_HEADER = 998    # characters; the rest is not looked at. RFC 5322 2.1.1: a line
MAX_OWN_ID = 250            # characters; a longer id is stored but enters no header of ours
FIRST_REFERENCES = 20       # ids of References that are looked at from its beginning …
LAST_REFERENCES = 80        # … and from its end, where the parent stands

THREADS = 96                # of the server, of which one leads; so many wait out a lock …
PATIENCE = 0.05             # … and another where it is away for so many seconds
LINGER = 0.002              # seconds in which it reads on, as long as requests come
GROUP = 2**19               # bytes of posts that share a sync …
LARGE = 2**17               # … and of one past which it is served beside, one by one
DESCRIPTORS = 4096          # that may be open
BUSY_TIMEOUT = 2.0          # seconds to wait for SQLite's lock, then 503. SIGTERM leaves 5
REPLICATION = 2             # seconds to wait for the second machine, then 503
REFUSALS_SHOWN = 3600       # seconds for which /healthz warns of a refused secret
HOPELESS = 60               # seconds without a successful read or write: the server ends
LEASE = 45                  # seconds a courier has a row, then it is anybody's again
DELIVERY = 30               # seconds for one delivery in all, then it is tried again
LOOK = 5                    # seconds between two looks at the outbox when nothing wakes us
GIVE_UP = 24 * 3600         # seconds after which undelivered mail is failed
FIRST_WAIT = 60             # seconds before the second try, doubled with each …
MAX_WAIT = 3600             # … up to this
MAX_REPLY = 2**16           # bytes of one SMTP reply; past it the session is over
TELL = 60                   # seconds between two lines on progress, where no terminal is

MAX_TOLD = 2**14            # characters of a text in a notice; `show` has the rest
MAX_ANSWER = 10 * 2**20     # bytes of its attachments; past it refused. Relays take 10 MB
ANSWERS_PER_HOUR = 20       # to one requester; past it refused: no people are that quick


# -----------------------------------------------------------------------------------------
# Types: frozen, without behaviour.

Row = dict[str, Any]        # a row of a table, or an object of JSON
Mail = dict[str, Any]       # a canonical body (SPEC 2), before anything in it is trusted
Headers = list[list[str]]   # [[name, value], …], order and repeats kept
Faults = dict[str, str]     # field → what is wrong with it
DB = sqlite3.Connection


@dataclass(eq=False)
class Refused(Exception):
    """An error that is answered: a sentence with the value and what was expected."""

    status: int                         # of HTTP
    reason: str
    fields: Faults = field(default_factory=dict)    # a canonical body's

    def __str__(self) -> str:
        return self.reason


class Usage(Exception):
    """A command line that means nothing: exit 2."""


@dataclass(frozen=True)
class Post:
    """One request that proved it knew an account's secret."""

    account: Row                        # of email_account
    own_addresses: list[str]            # of all accounts
    content_type: str                   # header of the request, as it came
    body: bytes
    received_at: int = 0                # of a post that is replayed; 0 = now


@dataclass(frozen=True)
class Reading:
    """What a body turned out to be: members that are mails, or a notice without any."""

    provider: str
    members: list[Callable[[], Mail]]   # each is read on its own
    is_batch: bool = False
    notice: str = ""                    # why there is no mail in it
    is_kept: bool = False               # whether an admin has to see the notice
    cut: str = ""                       # which bound of the budget the body went past


@dataclass(frozen=True)
class Attachment:
    """A row of that table; schema.sql says what each column is."""

    filename: str
    content_type: str
    content_id: str
    content: bytes | None
    note: str = ""

    @functools.cached_property
    def sha256(self) -> str | None:
        return None if self.content is None else hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True)
class Message:
    """A mail as we understand it: text without NUL, lone surrogates; ids with brackets."""

    message_id: str
    digest: str                         # SHA-256, hex, of what the sender wrote; "" = ours
    in_reply_to: list[str]
    references: list[str]
    from_address: str
    from_name: str
    envelope_from: str | None           # MAIL FROM; "" = null sender, None = nobody told us
    to: list[str]
    cc: list[str]
    subject: str
    text: str
    html: str | None
    headers: Headers
    notes: list[str] = field(default_factory=list)
    attachments: list[Attachment] = field(default_factory=list)
    from_count: int = 1                 # mailboxes that From names; 0 = another stands in
    verdict: str = ""                   # the provider's word on spam
    content: bytes = b""                # what goes out, of a mail of ours


@dataclass(frozen=True)
class Filing:
    """A member of a post, ready to be stored."""

    message: Message
    kind: str
    reason: str                         # why this kind
    withheld: str = ""                  # why it is not to be confirmed; "" = it may be


# -----------------------------------------------------------------------------------------
# The app: one WSGI callable. Whatever happens inside, one answer and one log line come out.

ANSWER_HEADERS = {
    401: [("WWW-Authenticate", 'Basic realm="inbound"')],
    405: [("Allow", "GET, HEAD, POST")],
    503: [("Retry-After", "10")]}
HEAVY_LOCK = threading.Lock()
TRUSTED_PROXY = os.environ.get("INBOUND_TRUSTED_PROXY", "")
LOOPBACK = ("127.0.0.1", "::1")
# Work on a request: it yields what it wants written, (Work, *args), and is sent the result.
Steps = Generator[tuple[Any, ...], Any, Any]
Start = Callable[..., Any]                  # WSGI's start_response
Wsgi = Callable[[Row, Start], list[bytes]]
PROGRESS = "inbound.progress"               # of a request; keys of its environ
SHARED = "inbound.shared"                   # what requests read that came together


def make_app(store: Store) -> Wsgi:
    """Return the WSGI application (PEP 3333) that files mail in `store`."""

    def app(environ: Row, start_response: Start) -> list[bytes]:
        # Our own server brings several requests as far as their commit, then comes here.
        progress = environ.get(PROGRESS) or Progress(answered(store, environ))
        status, content, text = progress.finish(store)
        line = json.dumps(content)
        # Escaped and capped: nobody outside writes a line of this log.
        level = logging.ERROR if status >= 500 else logging.INFO
        log.log(level, "%d %sB %.0fms %s %s", status, environ.get("CONTENT_LENGTH") or 0,
                 1000 * (time.perf_counter() - progress.began), environ.get("REMOTE_ADDR"),
                 printable(line[1:-1])[:300])
        kind = "text/plain" if text else "application/json"
        body = (text or line + "\n").encode()
        start_response(f"{status} {http.HTTPStatus(status).phrase}", [
            ("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(body))),
            *ANSWER_HEADERS.get(status, [])])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return app


class Progress:
    """How far steps came: to a `job` that has to be committed, or to their `value`."""

    def __init__(self, steps: Steps):
        self.began = time.perf_counter()
        self.steps = steps
        self.job: Job | None = None
        self.value: Any = None
        self.go_on()

    def go_on(self) -> None:
        """Go on from the start, or from a committed job, which may have failed."""
        try:
            if self.job is None:
                wanted = next(self.steps)
            elif self.job.error:
                wanted = self.steps.throw(self.job.error)
            else:
                wanted = self.steps.send(self.job.result)
            self.job = Job(*wanted)
        except StopIteration as end:
            self.job, self.value = None, end.value

    def finish(self, store: Store) -> Any:
        """Go to the end; return the value, or raise what the steps raise."""
        while self.job:
            if not self.job.is_done:
                store.commit([self.job])
            self.go_on()
        return self.value


def app(environ: Row, start_response: Start) -> list[bytes]:
    """The WSGI application for other servers: on $INBOUND_DB, which is made at need."""
    return app_of(default_path())(environ, start_response)


@functools.cache
def app_of(path: str) -> Wsgi:
    start_log(path)
    return make_app(Store(path))


def default_path() -> str:
    """Where the database is if nobody says it: systemd names a service's own folder."""
    # systemd.exec(5): of several, with colons between them, the first.
    folder = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    return os.environ.get("INBOUND_DB") or os.path.join(folder, "inbound.db")


def start_log(path: str) -> None:
    """Log on standard error, in UTC; where journald adds the time, a level stands for it.

    Under a server that has a log of its own the lines go there, as it writes them.
    """
    layout = "%(asctime)sZ %(message)s"
    stream = os.environ.get("JOURNAL_STREAM")       # systemd.exec(5): device:inode
    if stream and stream == "{0.st_dev}:{0.st_ino}".format(os.fstat(2)):
        layout = "%(levelname)s%(message)s"
        for level, priority in ((20, 6), (30, 4), (40, 3), (50, 2)):    # sd-daemon(3)
            logging.addLevelName(level, f"<{priority}>")
    formatter = logging.Formatter(layout, "%FT%T")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler])
    logging.getLogger("waitress.queue").setLevel("ERROR")   # a line for each that waits
    log.setLevel("INFO")
    log.info("start: inbound %s on %s", VERSION, path)
    atexit.register(log.info, "stop")


def client_of(environ: Row, trusted_proxy: str) -> str:
    """The address of the client: as the trusted proxy says, or who is connected.

    Only what the proxy itself added counts, the last of X-Forwarded-For, and only an
    address. We do not leave it to waitress, which refuses a request for a broken one.
    """
    peer = environ.get("REMOTE_ADDR") or "localhost"       # at the end of a socket
    if peer == trusted_proxy or trusted_proxy == "localhost" and peer in LOOPBACK:
        last = environ.get("HTTP_X_FORWARDED_FOR", "").rpartition(",")[2]
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_address(last.partition("%")[0].strip()))
    return peer


def printable(text: str) -> str:
    return ascii(text)[1:-1]


def answered(store: Store, environ: Row) -> Steps:
    """Return (status, JSON object, text in its place), whatever happens on the way."""
    environ["REMOTE_ADDR"] = client_of(environ, store.trusted_proxy)
    try:
        return (yield from respond(store, environ))
    except Refused as refusal:
        content: Row = {"error": refusal.reason}
        if refusal.fields:
            content["fields"] = refusal.fields
        return refusal.status, content, None
    except Exception:
        log.exception("while answering")
        return 500, {"error": "unexpected: nothing was stored, send it again"}, None


def respond(store: Store, environ: Row) -> Steps:
    """Route a request; Refused 404, 405 and what the rest of the way refuses."""
    path, method = environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"]
    if path == "/healthz" and method in ("GET", "HEAD"):
        return (yield from health(store))
    # As it was sent: `//api` and `/api%2F` are one path to servers, not to proxies' rules.
    sent = environ.get("REQUEST_URI") or environ.get("RAW_URI") or path
    sent = re.sub("^(?i:https?)://[^/?]*", "", sent)    # RFC 9112 3.2.2: MUST be accepted
    is_plain = sent.partition("?")[0] == environ.get("SCRIPT_NAME", "") + path
    if path.removesuffix("/") != ENDPOINT or not is_plain:
        raise Refused(404, f"there is nothing here; mail is posted to {ENDPOINT}")
    if method in ("GET", "HEAD"):   # some providers probe the URL before they use it
        return 200, {"status": "probed"}, "inbound: post received mail here\n"
    if method != "POST":
        raise Refused(405, f"{method[:20]!r} is not answered here; mail arrives by POST")
    post, by_body = authenticate(store, environ)
    if not post.body and (token := query_of(environ).get("validationToken")):
        return 200, {"status": "probed"}, token[0]      # Microsoft Graph probes so
    try:
        provider, content = yield from receive(store, post)
    except Refused as refusal:
        if refusal.status == 503 or not by_body:
            raise
        provider, content = "SocketLabs", {"status": "refused", "reason": refusal.reason}
    # SocketLabs wants its Validation Key as the body of every answer (SPEC 2).
    is_theirs = by_body or provider == "SocketLabs"
    return 200, content, post.account["validation_key"] if is_theirs else None


def query_of(environ: Row) -> dict[str, list[str]]:
    """The values in the URL by name; as Latin-1, in which every byte is something."""
    return urllib.parse.parse_qs(environ.get("QUERY_STRING", ""), True, encoding="latin-1")


def receive(store: Store, post: Post) -> Steps:
    """Make messages of a post and have them stored; return (provider, answer).

    What could not be understood is kept in `rejected` before Refused 400, 415, 422 or
    `quarantined` says so. `rejected replay` comes this way too.
    """
    reading = Reading("unread", [])
    try:
        with one_heavy_at_a_time(post.body):
            reading = read(post, store.own_providers)
            filings = [understand(reading, member, post) for member in reading.members]
            reading.members.clear()     # of a large mail each copy counts
    except Refused as refusal:      # the value that it names may be the secret
        reason = starred(post.account, refusal.reason)
        if refusal.status != 503:
            yield keep, safe(post), refusal.status, reason
        raise Refused(refusal.status, reason, {
            name: starred(post.account, fault) for name, fault in refusal.fields.items()})
    except Exception as error:
        filings = [fault_of(error, post, reading.provider)]
    try:
        answers = yield file_post, post, filings
    except Exception as error:
        if isinstance(error, Refused) and error.status == 503:
            raise           # nothing can be stored now; else one of them cannot be filed
        answers = yield file_post, post, filings, in_savepoint
    if len(post.body) > HEAVY:
        store.let_go()
    if not answers:
        notice = starred(post.account, reading.notice)
        if reading.is_kept:
            yield keep, safe(post), 200, notice
        return reading.provider, {"status": "ignored", "reason": notice}
    if post.account["staff"] or any(row["confirmation"] == "queued" for row in answers):
        store.has_mail.set()
    batch = {"status": "batch", "messages": answers}
    return reading.provider, batch if reading.is_batch else answers[0]


@contextlib.contextmanager
def one_heavy_at_a_time(body: bytes) -> Iterator[None]:
    """Let one large post be understood while others wait; Refused 503 after HEAVY_WAIT."""
    if len(body) > HEAVY and not HEAVY_LOCK.acquire(timeout=HEAVY_WAIT):
        raise Refused(503, "too many large messages at once: send it again")
    try:
        yield
    finally:
        if len(body) > HEAVY:
            HEAVY_LOCK.release()


def understand(reading: Reading, member: Callable[[], Mail], post: Post) -> Filing | str:
    """Normalise and classify a member of a post; or say why this one of many cannot be."""
    try:
        mail = member()
        if reading.cut and member is reading.members[-1]:   # what is missing is at the end
            kept = safe(post)
            mail["whole"] = (reading.cut, "post", kept.content_type, kept.body)
        return classify(normalise(mail, is_strict=reading.provider == "canonical"), post)
    except Exception as error:
        if not reading.is_batch:
            raise
        return fault_of(error, post, reading.provider)


def fault_of(error: Exception, post: Post, where: str) -> str:
    """What is kept of an unexpected error: enough to look for, too little to leak mail."""
    words = printable(f"{type(error).__name__}: {error}"[:2000])
    return f"{starred(post.account, words)[:180]} ({where})"


def health(store: Store) -> Steps:
    """GET /healthz: 503 with reasons when mail is not taken or sent; else warnings."""
    now = store.now()
    try:
        yield (rehearse,)
        disk = shutil.disk_usage(store.path)
        rows = store.rows(TROUBLES, {
            "now": now, "free": 100 * disk.free / disk.total,
            "refused": sum(at > now - REFUSALS_SHOWN for at, _ in [*store.refusals])})
    except (Refused, OSError) as error:
        rows = [{"is_urgent": 1, "words": str(error)}]
    urgent = [row["words"] for row in rows if row["is_urgent"]]
    if urgent:
        return 503, {"status": "degraded", "reasons": urgent}, None
    return 200, {"status": "ok", "warnings": [row["words"] for row in rows]}, None


TROUBLES = """
    SELECT 1 AS is_urgent, 'no secret is set: run `inbound secret rotate`' AS words
    WHERE NOT EXISTS (SELECT 1 FROM email_account WHERE inbound_secret IS NOT NULL)
    UNION ALL SELECT 1, 'the outbox waits for over an hour: run `inbound outbox`'
    WHERE EXISTS (SELECT 1 FROM outbox
        WHERE next_attempt_at IS NOT NULL AND created_at < :now - 3600)
    UNION ALL SELECT 1, 'disk: ' || round(:free, 1) || ' % free, expected 5 % or more'
    WHERE :free < 5
    UNION ALL SELECT 0, address || ' has no relay: run `inbound account set --account '
        || address || ' smtp_host=…`' FROM email_account WHERE smtp_host IS NULL
    UNION ALL SELECT 0, address || ' is nobody''s: run `inbound account set address=…`'
    FROM email_account WHERE address = 'support@localhost'
    UNION ALL SELECT 0, count(*) || ' rejected posts are waiting: run `inbound rejected`'
    FROM (SELECT 1 FROM rejected LIMIT 1000) HAVING count(*)
    UNION ALL SELECT 0, count(*) || ' mails could not be sent: run `inbound outbox`'
    FROM (SELECT 1 FROM outbox WHERE state = 'failed' LIMIT 1000) HAVING count(*)
    UNION ALL SELECT 0, :refused || ' posts had a wrong secret in the last hour'
    WHERE :refused"""


# -----------------------------------------------------------------------------------------
# Authenticate: the first place that holds a secret decides, even when it is empty there.
# The secrets of all accounts are compared, always, so that the time tells nothing. Of a
# stranger's post nothing but header lines is looked at.

DOCTOR = "inbound doctor"       # User-Agent of `doctor`, which tries to be refused


def authenticate(store: Store, environ: Row) -> tuple[Post, bool]:
    """Return the post, and whether its secret was in the body.

    Refused 503 while no account has a secret (so that providers keep the mail), else 401.
    """
    shared = environ.get(SHARED, {})
    accounts = shared.get("accounts") or store.rows("""
        SELECT *, inbound_secret AS secret FROM email_account
        UNION ALL SELECT *, previous_secret FROM email_account
        WHERE previous_secret_until > ?""", [store.now()])
    shared["accounts"] = accounts
    known = [account for account in accounts if account["secret"]]
    if not known:
        raise Refused(503, "no secret is set yet: run `inbound secret rotate`")
    content_type, body = environ.get("CONTENT_TYPE", ""), b""
    presented = presented_secret(environ)
    by_body = presented is None
    if presented is None:       # SocketLabs' may be in the body, where we have its key
        known = [account for account in known if account["validation_key"]]
        body = body_of(environ) if known else b""
        presented = secret_in(content_type, body, known)
    found = [account for account in known
             if hmac.compare_digest(account["secret"].encode(), presented)]
    if not found:
        if environ.get("HTTP_USER_AGENT") != DOCTOR:
            for refusals in (store.refusals, store.uncounted):
                refusals.append((store.now(), environ.get("REMOTE_ADDR", "")))
        raise Refused(
            401, "no right secret in X-Mobieus-Inbound-Secret, ?secret= or HTTP Basic")
    if not by_body:
        body = body_of(environ)
    if found[0]["secret"] != found[0]["inbound_secret"]:
        store.uses_of_previous[found[0]["id"]] = store.now()
    own_addresses = [account["address"] for account in accounts]
    return Post(found[0], own_addresses, content_type, body), by_body


def presented_secret(environ: Row) -> bytes | None:
    """The secret of header, query or HTTP Basic; None when in none of them.

    One that is repeated is joined, as servers join headers, with what is in no secret.
    """
    header = environ.get("HTTP_X_MOBIEUS_INBOUND_SECRET")
    if header is not None:
        return header.encode("latin-1")     # PEP 3333
    query = query_of(environ)
    if "secret" in query:
        return "\n".join(query["secret"]).encode("latin-1")
    scheme, _, credentials = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:        # RFC 7617 2: user-id ":" password. Any user-id.
        return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    except ValueError:
        return b""


def secret_in(content_type: str, body: bytes, known: list[Row]) -> bytes:
    """`SecretKey` of a body; it is parsed only when a known secret stands in its bytes."""
    text = body.decode("latin-1")
    if any(spellings(account["secret"]).search(text) for account in known):
        with one_heavy_at_a_time(body), contextlib.suppress(Refused):
            fields = fields_of(content_type, body)
            if isinstance(fields, dict):
                return str(fields.get("SecretKey")).encode("utf-8", "replace")
    return b""


def body_of(environ: Row) -> bytes:
    """Return the request's body; Refused 413 over MAX_BODY, 400 when it ends early."""
    length = int(environ.get("CONTENT_LENGTH") or 0)
    is_open_ended = not length and environ.get("wsgi.input_terminated")
    most = MAX_BODY + 1 if is_open_ended else min(length, MAX_BODY + 1)
    try:
        body = environ["wsgi.input"].read(most)
    except OSError as error:    # who hung up is told so by other servers than waitress
        raise Refused(400, f"the body cannot be read: {error}")
    if len(body) > MAX_BODY:
        raise Refused(413, f"the body is larger than {MAX_BODY} bytes")
    if len(body) < length:
        raise Refused(400, f"the body ends after {len(body)} of {length} bytes")
    return body


@functools.lru_cache(100)
def spellings(secret: str) -> re.Pattern[str]:
    """Find a secret (ASCII), however JSON or a URL spells it, in any case."""
    pattern = ""
    for char in secret:
        itself, digits = re.escape(char), f"{ord(char):02x}"
        blank = r"|\+" if char == " " else ""
        pattern += rf"(?:{itself}|\\{itself}|%{digits}|\\u00{digits}{blank})"
    return re.compile(pattern, re.I)


# -----------------------------------------------------------------------------------------
# Read, bodies: bytes → fields, or the bytes of a raw mail. JSON, forms and multiparts are
# taken apart here, each within its budget; who posted is recognised from the body alone.

FORM = "application/x-www-form-urlencoded"
RAW_FIELDS = ("email", "message", "body-mime")  # of forms: a mail has charsets of its own
FROM_HEADERS = ("from", "to", "cc", "subject")  # fields that a header stands in for
HEADER_START = re.compile(rb"From |[!-9;-~]+:(?:[ \t]|\r?\n[ \t])")
STRICT_JSON = json.JSONDecoder(parse_constant=int)      # int("NaN") raises
JSON_MARK = re.compile(r'\\.|["\[\]{},]', re.S)
PLACE = re.compile("0|[1-9][0-9]{0,8}")
EMOJI = re.compile(rb"\xf0[\x80-\xbf]{3}")       # begins with a byte, not a set: found in C
CLOSERS = {"[": "]", "{": "}", '"': '"'}


class Fields(Row):
    """The fields of a body; only what was a JSON object may be the canonical body."""

    is_object = False
    cut = ""                    # which bound of the budget it went past


def read(post: Post, own_providers: Callable[[], Any]) -> Reading:
    """Tell what a post carries; `own_providers` returns the rows of that table.

    Refused 400: not decodable, 415: no type that mail comes in, 422: no mail in it, and
    what to do about it.
    """
    fields = fields_of(post.content_type, post.body)
    if isinstance(fields, bytes):
        return Reading("raw", [functools.partial(mail_of_mime, fields)])
    provider = provider_of(fields, own_providers)
    if provider is None:
        if notice := notice_in(fields):
            return Reading("", [], notice=notice, is_kept="SubscribeURL" in fields)
        if not fields.is_object:
            raise Refused(400, "no provider known posts such a form, list or value; "
                               "expected a JSON object")
        if fields and not CANONICAL.keys() & fields.keys():
            raise Refused(422, "no known provider posts this; it is kept: describe it in "
                               "the table `provider`, then `inbound rejected replay`, or "
                               "send the canonical body (`from`, `message_id`, …)")
        provider = CANONICAL_BODY
    is_batch = provider.member is not None
    members = members_of(provider, fields) if is_batch else [fields]
    return Reading(
        provider.name, [functools.partial(mail_of, provider, each) for each in members],
        is_batch, notice=f"{provider.name} posted no mail", cut=fields.cut)


def fields_of(content_type: str, body: bytes) -> Fields | bytes:
    """Take a body apart; Refused 400: not decodable, 415: no type that mail comes in."""
    content_type = clean(content_type) or "application/json"
    kind, boundary = media_type_of(content_type)
    if kind in ("message/rfc822", "message/global"):    # RFC 6532: the same in UTF-8
        if not re.search(rb"\S", body):
            raise Refused(400, f"the {kind} is empty; expected a mail")
        return body
    if kind == "multipart/form-data":
        return form_of(split_parts(memoryview(body), boundary, MAX_FIELDS), multipart_field)
    is_json = kind.endswith(("/json", "+json"))
    if not is_json and kind not in ("text/plain", FORM):
        # As it was sent, and whole: a secret in it is starred out in its own spelling.
        raise Refused(415, f"content type {content_type!r} carries no mail; "
                           "expected application/json")
    if not is_json and not re.match(rb"(?:\xef\xbb\xbf)?\s*[{\[]", body):
        if HEADER_START.match(body):
            return body
        if kind == FORM:
            return form_of(body.split(b"&", MAX_FIELDS), url_encoded_field)
    return parse_json(body)


@functools.lru_cache(100)
def media_type_of(content_type: str) -> tuple[str, str]:
    """(type in lower case, boundary or "") of a Content-Type."""
    header = content_headers([["Content-Type", content_type]])
    return header.get_content_type(), header.get_boundary() or ""


FormField = tuple[str, "Row | bytes"]       # name, and a file or the bytes of a text


def multipart_field(part: memoryview) -> FormField:
    """A field of multipart/form-data (RFC 7578); a file, too, where it has no name."""
    headers, content = MimeReader().head_of(part)
    header = content_headers(headers)
    name = str(header.get_param("name", "", "content-disposition"))
    if header.get_filename() is None and header.get_content_maintype() == "text":
        return name, bytes(content)
    return name, file_of(header, bytes(content)) | {"field": name}


def url_encoded_field(pair: bytes) -> FormField:
    """A field of a form; a bare name is a field without a value.

    Percent-encoding is quoted-printable with another sign. We do not use urllib: it makes
    an object of each escape, 17 times the size.
    """
    quoted = pair.replace(b"+", b" ").replace(b"=", b"%3D").replace(b"%", b"=")
    name, _, value = binascii.a2b_qp(quoted).partition(b"=")
    return decode(name, None), value


def form_of(pieces: list[Any], field_of: Callable[[Any], FormField]) -> Fields:
    """The fields of a form by name, its files in `files`.

    `envelope[to]` and `attachments[0][filename]` become objects, as they are meant.
    """
    form = Fields()
    files = []
    texts: dict[str, list[bytes]] = {}
    for piece in pieces[:MAX_FIELDS]:
        name, content = field_of(piece)
        if isinstance(content, dict):
            files.append(content)
        else:
            texts.setdefault(name, []).append(content)      # Mailgun may repeat a body
    charsets = json_in(decode(b"".join(texts.get("charsets", [])), None))
    for name, contents in texts.items():
        *branches, leaf = name.replace("]", "").split("[", 4)[:4]
        branch: Row = form
        for key in branches:
            inner = branch.setdefault(key, {})
            branch = inner if isinstance(inner, dict) else {}
        branch[leaf] = form_value(name, b"\n".join(contents), charsets)
    form["files"] = files
    if len(pieces) > MAX_FIELDS:
        form.cut = f"more than {MAX_FIELDS} fields"
    return form


def form_value(name: str, content: bytes, charsets: Any) -> str | bytes:
    """A field's text. SendGrid: what does not fit its charset stands in the headers too."""
    if name in RAW_FIELDS:
        return content
    charset = str(at(charsets, name) or "utf-8")
    with contextlib.suppress(LookupError, ValueError):
        return content.decode(codec_of(charset)[0])
    return "" if charsets and name in FROM_HEADERS else decode(content, charset)


def parse_json(body: bytes) -> Fields:
    """The object in `body`, or else its value as `events`; strict UTF-8, Refused 400.

    We do not give json.loads the bytes: it guesses UTF-16 and lets lone surrogates through.
    """
    try:
        text = narrowed(body).decode("utf-8-sig")
        within = within_json_budget(text)
        value = STRICT_JSON.decode(within)
    except (ValueError, RecursionError) as error:       # UnicodeDecodeError is the former
        raise Refused(400, f"the body is not JSON in UTF-8: {error}")
    is_object = isinstance(value, dict)
    if is_object and "TopicArn" in value:       # SNS: what was published is inside
        value = json_in(value.get("Message")) or value
    fields = Fields(value if isinstance(value, dict) else {"events": value})
    fields.is_object = is_object
    fields.cut = "" if within is text else f"more than {MAX_VALUES} values in the JSON"
    return fields


def narrowed(body: bytes) -> bytes:
    """A large JSON text, its emojis escaped if few: one makes four bytes of each other."""
    if len(body) < HEAVY or body.count(b"\xf0") > 10_000:
        return body
    return EMOJI.sub(lambda found: json.dumps(found[0].decode())[1:-1].encode(), body)


def within_json_budget(text: str) -> str:
    """A JSON text, or as much of its beginning as MAX_VALUES allows, closed properly.

    Python takes up to 60 bytes for each of the 3 in `[],`.
    """
    if len(text) < MAX_VALUES or sum(map(text.count, '[{"')) < MAX_VALUES:
        return text
    closers = [""]              # of what is open, the innermost last
    values = 0
    for found in JSON_MARK.finditer(text):
        mark = found[0]
        if mark == closers[-1]:
            closers.pop()
        elif closers[-1] == '"':
            continue
        elif mark in CLOSERS:
            closers.append(CLOSERS[mark])
            values += 1
        elif mark == "," and values > MAX_VALUES:
            return text[:found.start()] + "".join(reversed(closers))
    return text


def json_in(text: Any) -> Any:
    """The JSON object or list in a field of text; {} where there is none."""
    if isinstance(text, str) and re.match(r"\s*[\[{]", text):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(within_json_budget(text))
    return {}


def at(value: Any, path: Any, missing: Any = None) -> Any:
    """What stands at a path like `a.b.0`, through JSON text too; the path "" is here.

    Of a tuple of paths the first that holds something.
    """
    if path in CANONICAL and isinstance(value, dict):   # the usual way, without the walk
        return value.get(path, missing)
    if path is None:
        return missing
    if isinstance(path, tuple):
        found = [at(value, each) for each in path]
        return next(filter(None, found), missing)
    for step in filter(None, path.split(".")):
        if isinstance(value, str):
            value = json_in(value)
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and PLACE.fullmatch(step) and int(step) < len(value):
            value = value[int(step)]
        else:
            return missing
    return value


def items_of(value: Any) -> list[Any]:
    """A list, what stands for one (a form's `a[0]`, Mandrill's by name), or one value."""
    if isinstance(value, dict) and all(
            key.isdigit() or isinstance(value[key], dict) for key in value):
        return [*value.values()]
    if isinstance(value, list):
        return value
    return [value] if value else []


# -----------------------------------------------------------------------------------------
# Read, raw mail (RFC 5322, RFC 2045), as far as it goes and its budget reaches.
#
# We do not use email.parser: it looks at each line in Python, 1 to 5 s and up to 140 MB a
# megabyte of short lines, and ends the headers at the first line that is none. Here regular
# expressions cut views of the same bytes; email.message reads the parameters.

BROKEN_END = re.compile(rb"[^\r\n]*(\r\r\n|\r(?=[^\n]*\Z))")
# The first two match everywhere, if only nothing, or the end.
MBOX = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:>?From [^\n]*\n)*")
END_OF_HEAD = re.compile(rb"(?m)^[ \t]*\r?\n|\Z")           # a line of blanks is an end too
HEADER_LINE = re.compile(r"(?s)\A(?:([!-9;-~]+)[ \t]*:)?(.*)")     # RFC 5322 4.5: blanks
# RFC 2045 5.1: a type, without the blanks and comments that may stand in and behind it.
TYPE = re.compile(r"\A\s*([\w.+-]+)(?:\s*(/)\s*([\w.+-]+))?\s*(?:[(,][^;]*)?(?=;|\Z)", re.A)
META = re.compile(rb"(?i)<meta\b[^<>]{0,200}?\bcharset\s*=\s*[\"']?([\w-]+)")
SHOWN = re.compile("text/(?:plain|html)|multipart/.*")          # as far as it is inline


def mail_of_mime(content: bytes) -> Mail:
    """The canonical dict of a raw mail; what stands in its headers is left there."""
    # Line ends that lost or won something on the way: all of the mail would be headers.
    if end := BROKEN_END.match(content):
        content = content.replace(end[1], b"\n")
    start = next(MBOX.finditer(content)).end()
    reader = MimeReader()
    raw_headers, body = reader.head_of(memoryview(content)[start:])
    leaves = [*reader.leaves(raw_headers, body)]
    inline = [fields for fields, *_ in leaves
              if SHOWN.fullmatch(fields.get_content_type())
              and fields.get_content_disposition() != "attachment"]
    # RFC 2183 2.1: inline is shown; a named one when there is no other.
    texts = [fields for fields in inline if fields.get_filename() is None] or inline
    shown: list[tuple[int, bool, str]] = []     # (choice, whether it is HTML, words)
    attachments = []
    for fields, part, choice in leaves:
        decoded = transfer_decoded(fields, part)
        if fields in texts:
            is_html = fields.get_content_type() == "text/html"
            claimed = fields.get_content_charset()
            meta = META.search(decoded[:1024])      # so far browsers look
            if is_html and meta and not claimed:
                claimed = meta[1].decode()
            shown.append((choice, is_html, decode(decoded, claimed)))
        else:
            attachments.append(file_of(fields, decoded))
    text = [words for _, is_html, words in shown if not is_html]
    markup = [words for _, is_html, words in shown if is_html]
    charset = texts[0].get_content_charset() if texts else None
    mail: Mail = {
        "headers": [[name, header_text(value, charset)] for name, value in raw_headers],
        "text": "\n".join(text), "html": "\n".join(markup), "attachments": attachments}
    # RFC 2046 5.1.4: HTML is left to programs that show it where there is the same as text.
    read = {choice for choice, is_html, words in shown if not is_html and words.strip()}
    lone = [words for choice, is_html, words in shown if is_html and choice not in read]
    if read and lone:
        text.insert(0 if shown[0][1] else len(text), html_to_text("\n".join(lone)))
        mail["shown"] = "\n".join(text)
    if reader.cut:
        mail["whole"] = (reader.cut, "message.eml", "message/rfc822", content)
    return mail


@dataclass
class MimeReader:
    """One walk over a raw mail; `cut` names a bound of its budget that it went past."""

    parts: int = MAX_PARTS              # how much is left
    lines: int = MAX_HEADER_LINES
    size: int = MAX_HEADER_BYTES
    cut: str = ""

    def head_of(self, content: memoryview) -> tuple[Headers, memoryview]:
        """Headers, with their folds and surrogates for what is no UTF-8, and body."""
        start, end = next(END_OF_HEAD.finditer(content)).span()
        size = min(start, self.size)
        head = str(content[:size], "utf-8", "surrogateescape").strip("\r\n")
        lines = re.split(r"\r?\n(?![ \t])", head, maxsplit=self.lines + 1)
        if start > size or len(lines) > self.lines:
            self.cut = f"over {MAX_HEADER_LINES} lines or 256 KB of headers"
        headers = []
        for line in filter(str.strip, lines[:self.lines]):
            [(name, value)] = HEADER_LINE.findall(line)
            headers.append([name or "X-Malformed", value.strip()])
        self.size -= size
        self.lines -= len(headers)
        return headers, content[end:]

    def leaves(self, headers: Headers, body: memoryview, default: str = "text/plain",
               depth: int = 0, choice: int = 0) -> Iterator[tuple[Any, memoryview, int]]:
        """(Content- headers, body, choice) of all in a part that holds no parts itself.

        What one multipart/alternative holds has one number as its choice.
        """
        fields = content_headers(headers)
        fields.set_default_type(default)
        kind = fields.get_content_type()
        boundary = fields.get_boundary() if kind.startswith("multipart/") else None
        parts = split_parts(body, boundary or "", self.parts)
        if parts and depth == MAX_DEPTH:
            self.cut = f"more than {MAX_DEPTH} multiparts inside each other"
            parts = []
        if kind == "multipart/alternative":
            choice = choice or self.parts
        if not parts:
            yield fields, body, choice or self.parts
        # RFC 2046 5.1.5: what a digest holds is a mail unless it says otherwise.
        default = "message/rfc822" if kind == "multipart/digest" else "text/plain"
        for part in parts:
            if not self.parts:
                self.cut = f"more than {MAX_PARTS} parts"
                break
            self.parts -= 1
            yield from self.leaves(*self.head_of(part), default, depth + 1, choice)


def split_parts(content: memoryview, boundary: str, most: int) -> list[memoryview]:
    """The parts between the lines of a boundary (RFC 2046 5.1.1), at most `most` + 1.

    The line end before a boundary is the boundary's. A missing last line ends nothing, nor
    does one that more parts follow: programs give what is inside the boundary of the whole.
    """
    parts: list[memoryview] = []
    start = 0
    mark = b"--" + re.escape(boundary.encode("utf-8", "replace"))
    # It begins with the mark itself, which re then looks for in C.
    line = rb"%b(?<![^\n]%b)(--)?[ \t]*\r?(?:\n|\Z)" % (mark, mark)
    for found in re.finditer(line, content) if boundary else ():
        if start:
            end = found.start() - 1
            if content[end - 1:end] == b"\r":
                end -= 1
            parts.append(content[start:end])
        start = 0 if found[1] else found.end()
        if len(parts) > most:
            return parts
    if start:
        parts.append(content[start:])
    return parts


def content_headers(headers: Headers) -> email.message.Message:
    """The headers that begin with Content-, for email.message to read their parameters.

    Where that raises, as for `boundary*=undefined''b` (RFC 2231), they have none.
    """
    fields = email.message.Message()
    for name, value in headers:
        if name[:8].lower() == "content-":
            value = CONTROLS.sub(" ", header_text(value, None))
            value = TYPE.sub(r"\1\2\3", value[:9999])
            # Its parameters are read in quadratic time.
            fields[name] = ";".join(value.split(";")[:99])
    for name in ("Content-Type", "Content-Disposition"):
        try:
            for _, parameter in fields.get_params([], name):
                email.utils.collapse_rfc2231_value(parameter)
        except (ValueError, TypeError, LookupError):
            fields.replace_header(name, fields[name].partition(";")[0])
    return fields


def file_of(fields: email.message.Message, content: Any) -> Row:
    """An attachment, as `attachments` holds it, of a part with these headers."""
    return {
        "filename": fields.get_filename(), "type": fields.get_content_type(),
        "cid": fields.get("Content-ID"), "content": content}


def header_text(value: str, charset: str | None) -> str:
    """A header's value; bytes in it that are no UTF-8 are in the charset of the body."""
    if not UNSTORABLE.search(value):
        return value
    return decode(value.encode("utf-8", "surrogateescape"), charset)


def transfer_decoded(fields: email.message.Message, content: memoryview) -> bytes:
    """A part's content without base64 or quoted-printable (RFC 2045 6), else as it is."""
    encoding = str(fields.get("Content-Transfer-Encoding")).lower().strip("; ")
    if encoding == "base64":
        return base64_decoded(content)
    return binascii.a2b_qp(content) if encoding == "quoted-printable" else bytes(content)


def base64_decoded(content: bytes | memoryview) -> bytes:
    """RFC 2045 6.8: what is no base64 does not count; an end that is missing is made up."""
    with contextlib.suppress(binascii.Error):
        return binascii.a2b_base64(b"".join([content, b"==="]))
    return binascii.a2b_base64(b"".join([content, b"A=="]))


# -----------------------------------------------------------------------------------------
# Read, providers: a card, and how its posts are recognised. What providers call the same
# thing is one table; what is odd about one is a function, `mend`. Where the mail lies
# deeper in the post, `place` is the path. A post with the whole mail (`raw`) is read from
# that alone.

# Canonical name → what it has to be, in words and in types. A number is a string, too.
CANONICAL: dict[str, tuple[str, tuple[Any, ...]]] = {
    **dict.fromkeys(
        ("from", "to", "cc"), ("a mailbox or a list of them", (str, list, dict))),
    **dict.fromkeys(
        ("from_name", "subject", "text", "html", "message_id"), ("a string", (str,))),
    **dict.fromkeys(
        ("in_reply_to", "references"), ("a string or a list", (str, list))),
    "headers": ("an object of names and values", (dict, list, str)),
    "envelope": ("an object whose `from` is a string or null", (dict,)),
    "attachments": ("a list of objects", (list,))}
# Canonical name, or header (with a capital) → what providers call it, in lower case and
# without punctuation; of several the first that holds something.
SPELLINGS = {name: tuple(words.split()) for name, words in {
    "from": "fromfull fromemail from", "from_name": "fromname", "subject": "subject",
    "to": "tofull to recipients.to.data", "cc": "ccfull cc",
    "text": "textbody rawtextbody textpart bodyplain plainbody plain text body.text "
            "body.plaintext parseddata.textBody",
    "html": "htmlbody rawhtmlbody htmlpart bodyhtml html body.html parseddata.htmlBody",
    "message_id": "messageid", "In-Reply-To": "inreplyto", "References": "references",
    "headers": "messageheaders customheaders headerlines headers parseddata.headers",
    "Date": "date sentatdate", "Reply-To": "replyto", "Auto-Submitted": "autosubmitted",
    "X-Postal-Bounce": "bounce",
}.items()}
VERDICT = ("spamscore", "spamstatus", "spamreport.score", "spamassassinscore", "isspam",
           "envelope.spamd.score", "receipt.spamVerdict.status",
           "receipt.dmarcVerdict.status")
FILES = ("files", "attachments", "images", "inlines", "embeddedmedia",
         "parseddata.attachments")


@dataclass(frozen=True)
class Provider:
    """How a provider posts mail."""

    name: str
    keys: str                           # the fields that each of its posts has …
    mark: str = ""                      # … the value of the first, if that tells it …
    when: Callable[[Fields], Any] = bool    # … and what else has to hold
    member: str | None = None           # path of each mail in the first field; None: one
    place: str | None = ""              # path of the mail; None: only `fields` are read
    envelope_from: str = ""             # path of MAIL FROM
    raw: str | None = None              # path of the whole mail
    mend: Callable[[Row, Mail], Any] | None = None      # (post, what was found in it)
    fields: Row = field(default_factory=dict)           # canonical name → path, if another


def spelled(value: Any) -> Row:
    """An object by its names in lower case, without punctuation; none for another value."""
    if not isinstance(value, dict):
        return {}
    return {re.sub("[^a-z0-9]", "", name.lower()): value[name] for name in value}


def mend_files(post: Row, mail: Mail) -> None:
    """Mailgun's files have their ids in a map beside them, SendGrid's their names, too."""
    # {content-id: field} has keys that repeat: json.loads would keep the last.
    pairs = re.findall(r'"([^"]*)"\s*:\s*"([^"]*)"', str(post.get("content-id-map")))
    ids = {place: content_id for content_id, place in pairs}
    infos = json_in(post.get("attachment-info"))
    for file in mail["attachments"]:
        place = str(file.get("field"))
        info = at(infos, place)
        file["filename"] = file.get("filename") or at(info, ("filename", "name"))
        file["cid"] = ids.get(place) or at(info, "content-id")


def mend_postal(post: Row, mail: Mail) -> None:
    """What its option strip_replies cut off is put back."""
    replies = post.get("replies_from_plain_body")
    if replies:
        mail["text"] = f"{mail['text'] or ''}\n{replies}"


def mend_mailjet(post: Row, mail: Mail) -> None:
    """Its attachments have their names in one place, their contents in another."""
    mail["attachments"] = []
    for part in items_of(post.get("Parts")):
        place = at(part, "ContentRef")      # a part that holds parts has none
        if isinstance(place, str) and place not in ("Text-part", "Html-part"):
            fields = content_headers(raw_headers_of(part.get("Headers"), {}))
            mail["attachments"].append(file_of(fields, post.get(place)))


def mend_mox(post: Row, mail: Mail) -> None:
    mail["attachments"] = [*named_parts(post.get("Structure"))]
    if at(post, "Meta.Automated") is True:
        mail["Auto-Submitted"] = "auto-generated"


def named_parts(part: Any) -> Iterator[Row]:
    if at(part, "Filename"):
        yield part
    for inner in items_of(at(part, "Parts")):
        yield from named_parts(inner)


# The canonical body (SPEC 2): what is unknown in it is not looked at.
CANONICAL_BODY = Provider(
    "canonical", "from message_id", when=lambda post: post.is_object, place=None,
    fields={name: name for name in CANONICAL})
PROVIDERS = (
    # Postal. Requires: an HTTP endpoint. Authenticates by: ?secret= or Basic. Answers: 2xx;
    # 4xx bounces, 5xx is tried again. Configure: Routing › HTTP endpoints. It has all that
    # the canonical body needs, and so stands before it.
    Provider("Postal", "rcpt_to mail_from", envelope_from="mail_from", raw="message",
             mend=mend_postal),
    CANONICAL_BODY,
    # Mandrill. Requires: an inbound domain. Authenticates by: ?secret=. Answers: 200, else
    # tried again. Configure: Inbound › Domains › Routes. It probes the URL with HEAD first.
    Provider("Mandrill", "mandrill_events", member="msg", raw="raw_msg"),
    # Mailgun. Requires: a route. Authenticates by: ?secret=. Answers: 200; 406 is final,
    # all else tried again for 8 h. Configure: Receiving › Routes › forward(). A URL that
    # ends in `mime` gets the whole mail.
    Provider("Mailgun", "timestamp token signature", when=lambda post: "event" not in post,
             envelope_from="sender", raw="body-mime", mend=mend_files),
    # SendGrid. Requires: Inbound Parse. Authenticates by: ?secret= or Basic. Answers: 2xx;
    # 5xx is tried again for 3 days, 4xx is final. Configure: Settings › Inbound Parse.
    Provider("SendGrid", "envelope", when=lambda post: isinstance(post["envelope"], str)
             and {"headers", "email"} & post.keys(),
             envelope_from="envelope.from", raw="email", mend=mend_files),
    # CloudMailin. Requires: an address. Authenticates by: Basic or ?secret=. Answers: 2xx;
    # 4xx bounces the mail, 5xx lets the sender's server try again. Configure: the target.
    Provider("CloudMailin", "envelope", envelope_from="envelope.from", raw="message",
             when=lambda post: isinstance(post["envelope"], dict)
             and {"headers", "message"} & post.keys()
             and {"from", "text", "message_id"}.isdisjoint(post)),
    # Its deprecated multipart format "original".
    Provider("CloudMailin", "message plain", envelope_from="from", raw="message",
             when=lambda post: isinstance(post["message"], bytes)),
    # SparkPost. Requires: a relay webhook. Authenticates by: ?secret=, Basic or a custom
    # header. Answers: 200, else tried again. Configure: POST /api/v1/relay-webhooks.
    Provider("SparkPost", "events", member="msys.relay_message",
             when=lambda post: any(at(event, "msys") is not None
                                   for event in items_of(post["events"])),
             place="content", envelope_from="msg_from", raw="content.email_rfc822",
             fields={"from": "friendly_from"}),
    # Amazon SES. Requires: a receipt rule whose SNS action carries the mail (150 KB at
    # most). Authenticates by: ?secret= or Basic. Answers: 200; 5xx is tried again.
    # Configure: an HTTPS subscription, then open the SubscribeURL that `inbound rejected`
    # shows.
    Provider("Amazon SES", "notificationType content", envelope_from="mail.source",
             raw="content"),
    # SocketLabs. Requires: `account set validation_key=…`, and its Secret Key as our
    # secret. Authenticates by: SecretKey in the body. Answers: 200, always with the
    # Validation Key. Configure: Inbound API › the URL as it is.
    Provider("SocketLabs", "InboundMailFrom Message", place="Message",
             envelope_from="InboundMailFrom"),
    # Postmark. Requires: an inbound stream. Authenticates by: ?secret= or Basic. Answers:
    # 200; all but 403 is tried again for 10 h. Configure: the stream's webhook. MessageID
    # is its own.
    Provider("Postmark", "FromFull Headers", raw="RawEmail", fields={"message_id": None}),
    # Brevo. Requires: inbound parsing. Authenticates by: ?secret=, Basic or a header.
    # Answers: 2xx; 4xx is final. Configure: POST /v3/webhooks, type inbound. Of attachments
    # only the names are posted.
    Provider("Brevo", "items", member="", when=lambda post: any(
        at(item, "Uuid") for item in items_of(post["items"]))),
    # Mailjet. Requires: the Parse API. Authenticates by: ?secret= or Basic. Answers: 200,
    # else tried again. Configure: POST /v3/REST/parseroute with the Url.
    Provider("Mailjet", "Recipient Sender Headers", envelope_from="Sender",
             mend=mend_mailjet),
    # MailerSend. Requires: an inbound route. Authenticates by: ?secret=. Answers: 2xx
    # within 3 s; all else is final. Configure: the route's POST URL. data.id is
    # MailerSend's own.
    Provider("MailerSend", "type", "inbound.message", place="data",
             envelope_from="data.sender.email", raw="data.raw"),
    # Forward Email. Requires: a webhook as an alias's recipient. Authenticates by:
    # ?secret=. Answers: exactly 200. Configure: the alias.
    Provider("Forward Email", "session headerLines", envelope_from="session.sender"),
    # mailparser, the parser of Node's nodemailer, in a script of your own.
    Provider("mailparser", "headerLines",
             when=lambda post: isinstance(post["headerLines"], list)),
    # ImprovMX. Requires: an alias that is a webhook. Authenticates by: ?secret=. Answers:
    # 2xx, else tried three times in all. Configure: the alias's destination.
    Provider("ImprovMX", "message-id return-path", envelope_from="return-path.email"),
    # AhaSend. Requires: an inbound route. Authenticates by: ?secret=. Answers: 2xx.
    # Configure: the route's webhook. data.id is AhaSend's own.
    Provider("AhaSend", "type", "message.routing", place="data"),
    # Lettermint. Requires: an inbound route. Authenticates by: ?secret=. Answers: 2xx.
    # Configure: the route's webhook. data.message_id is its own.
    Provider("Lettermint", "event", "message.inbound", place="data",
             fields={"message_id": None}),
    # Inbound.new. Requires: an endpoint. Authenticates by: ?secret=. Answers: 2xx.
    # Configure: the endpoint's URL. Attachments are posted by URL.
    Provider("Inbound.new", "event email", "email.received", place="email"),
    # AgentMail. Requires: an inbox. Authenticates by: ?secret=. Answers: 2xx. Configure: a
    # webhook for message.received. Attachments are not in the post.
    Provider("AgentMail", "event_type", "message.received", place="message"),
    # MailPace. Requires: an inbound endpoint. Authenticates by: ?secret=. Answers: 2xx.
    # Configure: the domain's inbound URL.
    Provider("MailPace", "raw headers", raw="raw"),
    # mox, a mail server. Requires: an account's incoming webhook. Authenticates by:
    # ?secret= or its Authorization setting. Answers: 200. It posts neither headers nor
    # attachments.
    Provider("mox", "Meta MessageID", envelope_from="Meta.MailFrom", mend=mend_mox),
    # Maileroo. Requires: inbound routing. Authenticates by: ?secret=. Answers: 2xx.
    # Configure: the route's webhook. Attachments are posted by URL.
    Provider("Maileroo", "envelope_sender", envelope_from="envelope_sender"),
    # Customers Mail Cloud (HENNGE). Requires: a webhook. Authenticates by: ?secret=.
    # Answers: 200. Configure: the domain's receive webhook.
    Provider("Customers Mail Cloud", "server_composition", envelope_from="envelope-from"),
    # mailcast.io. Requires: a route with the fields email and return_path. Authenticates
    # by: ?secret=. Answers: 2xx.
    Provider("mailcast.io", "return_path email", envelope_from="return_path", raw="email"),
    # postal-mime, what a Cloudflare Email Worker posts. Authenticates by: ?secret= or a
    # header.
    Provider("postal-mime", "headers from", envelope_from="returnPath",
             when=lambda post: isinstance(post["from"], dict)),
)


def provider_of(fields: Fields, own_providers: Callable[[], Any]) -> Provider | None:
    """Whose post this is: ours are asked first, then the rows of the table."""
    for provider in PROVIDERS:
        keys = provider.keys.split()
        has_keys = fields.keys() >= {*keys}
        if has_keys and provider.mark in ("", fields[keys[0]]) and provider.when(fields):
            return provider
    for name, paths in own_providers():
        needed = [at(fields, paths.get(each), fields) for each in ("from", "message_id")]
        if not any(value is fields for value in needed):
            return Provider(name, "", place=None, fields=paths)
    return None


def members_of(provider: Provider, post: Row) -> list[Any]:
    """The mails of a batch, without the events among them; Refused 400: no such list.

    What is neither is left for `mail_of` to refuse, by itself.
    """
    items = post[provider.keys]
    if isinstance(items, str):
        items = json_in(items)
    if not isinstance(items, list) or len(items) > MAX_MEMBERS:
        raise Refused(400, f"{provider.keys} is no list of {provider.name}'s, which has "
                           f"{MAX_MEMBERS} mails at most")
    members = [at(item, provider.member) if isinstance(item, dict) else item
               for item in items if at(item, "event") in (None, "inbound")]
    return [member for member in members if member is not None]


# What brings no mail: events, by their names; and what only says that there is a mail.
EVENT = re.compile(
    r"(?i)(?:.*(?:activity|bounce|click|complain|contact.(?:cre|upd|del)|deferred|deliver|"
    r"domain|drop|fail|held|list_|open|process|queued|sent|spam_report|subscri|suppress|"
    r"track).*|webhook\..*|validation)")
METADATA_ONLY = {
    "Resend": "data.email_id", "Nylas": "specversion", "Emailit": "data.object",
    "Mailtrap": "events.0.event", "MailSlurp": "emailId", "Gmail": "subscription",
    "Microsoft Graph": "value.0.subscriptionId",
    "Amazon SES's S3 action (its SNS action posts the mail)": "receipt"}


def notice_in(post: Row) -> str:
    """What a post without a mail is, in words; Refused 422: it only tells of a mail."""
    if "SubscribeURL" in post:
        return "an SNS subscription: open the SubscribeURL that `rejected show` prints"
    name = at(post, (
        "event_type", "event", "type", "RecordType", "Type", "notificationType",
        "event-data.event", "events.0.event"))
    may_be_mail = not {"from", "text", "html"}.isdisjoint(post)
    if isinstance(name, str) and not may_be_mail and (
            "TopicArn" in post or EVENT.fullmatch(name[:200])):
        return f"an event, no mail: {name if len(name) < 100 else 'its name is long'}"
    for provider, path in METADATA_ONLY.items():
        if at(post, path) is not None:
            raise Refused(422, (
                f"{provider} posts neither text nor headers, only that there is a mail: "
                "have it forwarded to another provider or `inbound relay`"))
    return ""


def mail_of(provider: Provider, post: Any) -> Mail:
    """The canonical dict of a post whose fields live where `provider` says."""
    if not isinstance(post, dict):
        raise ValueError(f"a mail is {type(post).__name__}, expected an object")
    named = {name: at(post, path) for name, path in provider.fields.items()
             if name in CANONICAL}
    if provider.place is None:
        # A form's files stand apart from its fields.
        if isinstance(post, Fields) and not post.is_object:
            named["attachments"] = named.get("attachments") or post.get("files")
        return named
    known = spelled(at(post, provider.place))
    raw = raw_mail_of(at(post, provider.raw))
    if raw:
        mail = mail_of_mime(raw)
        # Postmark's MAIL FROM stands above the headers that it posts beside the mail.
        first = raw_headers_of(known.get("headers"), {})[:1]
        mail["headers"][:0] = [pair for pair in first if pair[0] == "Return-Path"]
    else:
        mail = {name: at(known, paths) for name, paths in SPELLINGS.items()}
        listed = [at(known, name) for name in FILES]
        mail["attachments"] = [
            file for files in listed for file in items_of(json_in(files) or files)
            if isinstance(file, dict)]
        mail |= named
        if provider.mend:
            provider.mend(post, mail)
        if not any(mail.values()):
            raise Refused(422, f"nothing in it reads as a mail of {provider.name}")
    if provider.place:          # SocketLabs' stands beside the mail
        known = spelled(post) | known
    mail["verdict"] = "\n".join(str(at(known, path))[:99] for path in VERDICT)
    if provider.envelope_from:
        mail["envelope"] = {"from": at(post, provider.envelope_from)}
    return mail


def raw_mail_of(value: Any) -> bytes:
    """A whole mail, from text, bytes or base64; b"" where there is none."""
    content = value.encode("utf-8", "ignore") if isinstance(value, str) else value
    if not isinstance(content, bytes):
        return b""
    # No base64 has a colon, and no mail is without one.
    return content if b":" in content[:2000] else base64_decoded(content)


# -----------------------------------------------------------------------------------------
# Normalise: canonical dict → Message. Text is cleaned once, here, and trusted from here on.

# Quoted local parts and address literals are stored, but never written to.
ATOM = r'[^\s<>()\[\],;:\\"@]+'
ADDR_SPEC = rf'(?:{ATOM}|"[^"\r\n]+")@(?:{ATOM}|\[[^\s\[\]<>]+\])|mailer-daemon'
QUOTED = r'"(?:[^"\\]|\\.)*"'
# Name <address>, or address (name). Providers post decoded names without their quotes: in
# `Doe, John <j@example.org>` the comma is the name's, in `a@example.org, <b@example.org>`
# not.
MAILBOX = re.compile(
    rf'(?<![^>,;)])((?:{QUOTED}|[^"<>,])*|(?:{QUOTED}|[^"<>@])*)'
    rf'<\s*({ADDR_SPEC})\s*>(?:\s*\([^()]*\))?'
    rf'|({ADDR_SPEC})(?:\s*\(([^()]*)\))?', re.I)
MESSAGE_IDS = re.compile(
    r"""<([^<>]+)>|(?<![^\s<>,;"'()])([^\s<>,;"'()@]+@[^\s<>,;"'()]+)""")
WORD = r"=\?[^?\s]+\?[bq]\?(?:[^=?]|=(?!\?[^=])|\?(?!=))*\?="    # ends before the next `=?`
WORDS = re.compile(rf"{WORD}(?:\s*{WORD}){{0,99}}", re.I)       # decode_header is quadratic
CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]+ ?")  # RFC 5322 2.2.3: a fold is one
PLAIN = re.compile(r"(?:[ -<>-~]|=(?!\?))*")                    # a value with nothing to do
UNSTORABLE = re.compile("[\0\ud800-\udfff]")
UNQUOTE = re.compile(r'\\(.)|"')
BASE64 = bytes.maketrans(b"-_", b"+/")      # RFC 4648 5


def normalise(mail: Mail, is_strict: bool) -> Message:
    """The Message that a canonical dict describes.

    `is_strict` is for the canonical body itself: Refused 422 lists every field that is
    missing or of the wrong type. Elsewhere such a field costs nothing but a note.
    """
    faults: Faults = {}
    notes: list[str] = []
    fields = typed(mail, faults)
    headers = [[one_line(name), one_line(value)]
               for name, value in headers_of(mail, fields, is_strict, faults)]
    envelope_from = envelope_sender(fields["envelope"], faults)
    from_count, name, address = author_of(fields["from"], envelope_from, faults, notes)
    # RFC 5322 3.6: one From; mail programs differ in which of two they show.
    from_count += len(header_values(headers, "from")[1:])
    subject = one_line(fields["subject"]) or "(no subject)"
    text, markup = fields["text"], fields["html"]
    attachments = [attachment_of(item) for item in fields["attachments"][:MAX_PARTS]]
    if len(fields["attachments"]) > MAX_PARTS:
        faults["other attachments"] = f"not kept, there are more than {MAX_PARTS}"
    digest = digest_of(address, subject, text, markup, attachments)
    message_id = message_id_of(fields["message_id"], digest, headers, faults)
    notes += [f"{name}: {fault}" for name, fault in faults.items()]
    if is_strict and CANONICAL.keys() & faults.keys():
        raise Refused(422, "; ".join(notes), faults)
    if "whole" in mail:
        cut, filename, kind, content = mail["whole"]
        attachments.append(Attachment(filename, kind, "", content))
        notes.append(f"{cut}: the whole of it is attached as {filename}")
    if "shown" in mail or not text or text.isspace():
        text = mail.get("shown") or html_to_text(markup)
        if len(markup) > MAX_HTML:
            notes.append(f"the text is made of at most {MAX_HTML} characters of the HTML")
    return Message(
        message_id=message_id, digest=digest,
        in_reply_to=ids_of(fields["in_reply_to"] or header_values(headers, "in-reply-to")),
        references=ids_of(fields["references"] or header_values(headers, "references")),
        from_address=address, envelope_from=envelope_from,
        from_name=one_line(fields["from_name"]) or name,
        to=[address for _, address in mailboxes_of(fields["to"])],
        cc=[address for _, address in mailboxes_of(fields["cc"])],
        subject=subject, text=text, html=markup or None,
        headers=headers, notes=notes, attachments=attachments,
        from_count=from_count, verdict=str(mail.get("verdict") or "")[:500])


def typed(mail: Mail, faults: Faults) -> Mail:
    """The canonical fields of a mail, each of its type: empty if null or of another."""
    fields: Mail = {}
    for name, (expected, types) in CANONICAL.items():
        value = mail.get(name)
        if isinstance(value, bytes):    # a form's `email` or `message` may be a whole mail
            value = decode(value, None)
        if types[0] is str and type(value) in (str, int, float):
            value = clean(str(value))
        elif value is not None and not isinstance(value, types):
            faults[name] = f"expected {expected}, not {type(value).__name__}"
            value = None
        fields[name] = value or types[0]()
    return fields


def headers_of(mail: Mail, fields: Mail, is_strict: bool, faults: Faults) -> Headers:
    """The headers, with what is posted beside them; they stand in for empty `fields`.

    From, Subject and Message-ID have to be fields of the canonical body (`is_strict`).
    """
    headers = raw_headers_of(fields["headers"], faults)
    first = {name.lower(): value for name, value in reversed(headers)}
    headers += raw_headers_of({
        name: value for name, value in mail.items()
        if value and name[:1].isupper() and name.lower() not in first}, faults)
    for name in ("to", "cc") if is_strict else FROM_HEADERS:
        fields[name] = fields[name] or first.get(name, "")
    if not is_strict:
        fields["message_id"] = first.get("message-id") or fields["message_id"]
    if "envelope" not in mail and headers and headers[0][0].lower() == "return-path":
        # As the last server wrote it: only the first header can be its, none below it.
        fields["envelope"] = {"from": headers[0][1] or None}
    return headers


def raw_headers_of(value: Any, faults: Faults) -> Headers:
    """[[name, value], …] as posted, order and repeats kept, at most MAX_HEADER_LINES.

    From an object (values string, list or null), a list of pairs, of {Name, Value}, of
    {line}, of one-key objects or of lines; as text, a JSON list of these or a header block.
    """
    if isinstance(value, str):
        block = memoryview(value.encode("utf-8", "ignore"))
        value = json_in(value) or MimeReader().head_of(block)[0]
    if isinstance(value, dict):
        # CloudMailin writes message_id; beside a hyphen `_` is the sender's own.
        dash = "_" if "-" in "".join(value) else "-"
        value = [[name.replace("_", dash), value[name]]
                 for name in [*value][:MAX_HEADER_LINES + 1]]
    headers = []
    for item in items_of(value):
        name, content = header_pair(item)
        if not name:
            faults["a header"] = f"expected a name and a value, not {type(item).__name__}"
            continue
        for text in items_of(content) or [content]:
            if text is not None:
                headers.append([str(name), clean(str(text))])
    if len(headers) > MAX_HEADER_LINES:
        faults["other headers"] = f"not kept, there are more than {MAX_HEADER_LINES}"
    return headers[:MAX_HEADER_LINES]


def header_pair(item: Any) -> Iterable[Any]:
    """The name and value of an item of a header list, however its provider writes one."""
    if isinstance(item, dict):
        known = spelled(item)
        name = at(known, ("name", "key"))
        if "line" in item:
            item = item["line"]
        elif name:
            return name, known.get("value")
        elif len(item) == 1:
            [item] = item.items()
    if isinstance(item, str):
        return item.partition(":")[::2]
    if isinstance(item, (list, tuple)) and len(item) == 2:
        return item
    return "", None


def header_values(headers: Headers, name: str) -> list[str]:
    """All values of the header `name` (lower case), in order."""
    return [value for header, value in headers if header.lower() == name]


def envelope_sender(envelope: Row, faults: Faults) -> str | None:
    """MAIL FROM of `{from, to}`: "" = null sender, None = unknown."""
    value = envelope.get("from")
    if not isinstance(value, str):
        if value is not None:
            faults["envelope"] = "expected an object whose `from` is a string or null"
        return None
    for _, address in mailboxes_of(value):
        return address
    return "" if value.strip() in ("", "<>") else None


def author_of(written: Any, envelope_from: str | None, faults: Faults,
              notes: list[str]) -> tuple[int, str, str]:
    """(mailboxes that From names, name, address); of another, where it names none."""
    mailboxes = mailboxes_of(written)
    if mailboxes:
        return len(mailboxes), *mailboxes[0]
    shown = repr(written) if len(str(written)) < 100 else "a long text"
    fault = f"expected an address, not {shown}" if written else "required"
    if envelope_from:
        notes.append(f"from: {fault}; the envelope sender stands for it")
        return 0, "", envelope_from
    faults.setdefault("from", fault)
    return 0, "", "MAILER-DAEMON"


def mailboxes_of(value: Any) -> list[tuple[str, str]]:
    """[(name, addr-spec), …] of an address header (RFC 5322 3.4); [] where it is unclear.

    Of text, of {name, address} in any spelling, or of a list of such. We do not use
    email.utils: `alice@example.org)bob@example.net` is Alice to some versions
    (CVE-2023-27043). Here each @ that is not a name's has to be part of an address.
    """
    mailboxes: list[tuple[str, str]] = []
    if not value:
        return mailboxes
    if isinstance(value, str):
        text = value[:MAX_ADDRESS_HEADER].replace("&lt;", "<").replace("&gt;", ">")
        text = CONTROLS.sub(" ", clean(text))
        found = [*MAILBOX.finditer(text)]
        if text.count("@") > sum(match[0].count("@") for match in found):
            return []
        for name, address, bare, comment in (match.groups("") for match in found):
            name = UNQUOTE.sub(r"\1", name).strip(" ,;") or comment
            mailboxes.append((one_line(name), address or bare))
        return mailboxes
    for item in items_of(at(value, ("value", "addresses")) or value)[:MAX_FIELDS]:
        if isinstance(item, list):      # Mandrill: [address, name]
            item = next(iter(item), "")
        known = spelled(item)
        text = at(known, ("address", "email", "emailaddress")) if known else item
        for name, address in mailboxes_of(text) if isinstance(text, str) else ():
            name = at(known, ("name", "friendlyname")) or name
            mailboxes.append((one_line(str(name)), address))
    return mailboxes


def message_id_of(written: str, digest: str, headers: Headers, faults: Faults) -> str:
    """The Message-ID, of any length, with brackets; made of the content where it lacks."""
    for found in ids_of(written) or ids_of("<" + written.strip(' <>"') + ">"):
        return found
    faults.setdefault("message_id", "required")
    # The Date, where there is one, tells two mails of the same words apart.
    seed = "".join([digest, *header_values(headers, "date"),
                    *header_values(headers, "x-malformed")])
    return f"<{hashlib.sha256(seed.encode()).hexdigest()[:32]}@missing.invalid>"


def ids_of(value: Any) -> list[str]:
    """The message-ids of In-Reply-To or References: each once, in order, with brackets.

    RFC 5322 3.6.4, and what is seen: lists, folding inside the brackets, `&lt;`, missing
    brackets. Of many, the first 20 and the last 80.
    """
    if not value:       # most mails are no reply
        return []
    text = " ".join(text for text in items_of(value) if isinstance(text, str))
    text = clean(text).replace("&lt;", "<").replace("&gt;", ">")
    ids = dict.fromkeys("".join(bracketed.split()) or bare
                        for bracketed, bare in MESSAGE_IDS.findall(text))
    known = [f"<{each}>" for each in ids if each]
    return known[:FIRST_REFERENCES] + known[FIRST_REFERENCES:][-LAST_REFERENCES:]


def attachment_of(posted: Any) -> Attachment:
    """The attachment of an object, whatever its provider calls its fields."""
    item = spelled(posted)
    name, kind, content_id = (one_line(str(at(item, names) or "")) for names in (
        ("filename", "name"), ("contenttype", "mimetype", "type"), ("contentid", "cid")))
    content = None
    with contextlib.suppress(ValueError, TypeError, KeyError):
        content = content_in(item)
    return Attachment(
        # A name is text to show, never a path: cut off is all before the last separator.
        filename=re.split(r"[/\\]", name)[-1],
        content_type=kind.partition(";")[0].strip().lower() or "application/octet-stream",
        content_id=content_id.strip("<> "), content=content,
        note="not kept: its content is not posted, or broken" if content is None else "")


def content_in(item: Row) -> bytes | None:
    """An attachment's bytes, of base64 in both alphabets, with padding or without."""
    content = item.get("content", item.get("data"))
    if isinstance(content, dict):       # Node's Buffer: {"type": "Buffer", "data": [ints]}
        return bytes([*content["data"]])
    if not isinstance(content, str):
        return content if isinstance(content, bytes) else None
    if item.get("base64") is False or item.get("encoding") == "utf8":
        return content.encode("utf-8", "ignore")
    if content.startswith("data:"):
        content = content.rpartition(",")[2]
    encoded = content.encode("ascii")
    if any(odd in encoded for odd in b"-_ \t\r\n"):
        encoded = encoded.translate(BASE64, b" \t\r\n")     # RFC 2045 6.8: no line ends
    return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)


def digest_of(from_address: str, subject: str, text: str, markup: str,
              attachments: list[Attachment]) -> str:
    """SHA-256 of what the sender wrote, and of nothing that changes with the next try.

    The same in every version, or a repeat of an older mail would be a second message.
    """
    files = [f"{item.filename}:{item.sha256}" for item in attachments]
    parts = [from_address.lower(), subject, text, markup, *files]
    written = json.dumps(parts)
    if any("\r" in part or "\\" in part for part in parts):      # else there is no \r\n
        written = written.replace(r"\r\n", r"\n")
    return hashlib.sha256(written.encode()).hexdigest()


def clean(text: str) -> str:
    """Drop what SQLite, SMTP and JSON each stumble over: NUL and lone surrogates."""
    return text.replace("\0", "") if text.isascii() else UNSTORABLE.sub("", text)


def one_line(text: str) -> str:
    """A header's value in one line: unfolded, RFC 2047 words decoded, controls blanked."""
    if not PLAIN.fullmatch(text):
        text = WORDS.sub(decoded_words, CONTROLS.sub(" ", clean(text)))
        text = CONTROLS.sub(" ", clean(text))
    return text.strip()


def decoded_words(run: re.Match[str]) -> str:
    """Decode a run of RFC 2047 encoded-words; what is broken stays as it is."""
    with contextlib.suppress(ValueError, email.errors.MessageError):
        return "".join(word if isinstance(word, str) else decode(word, charset)
                       for word, charset in email.header.decode_header(run[0]))
    return run[0]


# What mail calls a charset, by the codec that it means: the WHATWG encoding standard's
# labels. The last four decode in quadratic time or run escapes, and nobody writes mail in
# them.
CODECS = {label: codec for codec, labels in (
    ("cp1252", "iso-8859-1 iso8859-1 latin1 latin-1"), ("cp1254", "iso-8859-9"),
    ("cp874", "iso-8859-11 tis-620 windows-874 dos-874"),
    ("iso8859-6", "iso-8859-6-i iso-8859-6-e"),
    ("iso8859-8", "iso-8859-8-i iso-8859-8-e logical visual"),
    ("koi8-u", "koi8-ru"), ("mac-roman", "x-mac-roman mac"),
    ("mac-cyrillic", "x-mac-cyrillic x-mac-ukrainian"),
    ("gb18030", "gb2312 gb-2312 gb-2312-80 csgb2312 gbk x-gbk euc-cn cp936"),
    ("cp949", "euc-kr cseuckr ks-c-5601-1987 ks-c-5601-1989 ks-c-5601 ksc5601 korean "
              "windows-949"),
    ("iso2022-jp-ext", "iso-2022-jp csiso2022jp iso-2022-jp-ms cp50220 cp50221"),
    ("euc-jp", "x-euc-jp eucjp-ms eucjp-win"),
    ("cp932", "shift-jis sjis x-sjis windows-31j ms-kanji"),
    ("big5hkscs", "big5 x-x-big5 cn-big5"),
    ("utf-8", "us-ascii ascii unknown-8bit x-unknown"),
    ("utf-8", "punycode idna unicode-escape raw-unicode-escape"),
) for label in labels.split()}
ONE_BYTE = re.compile("cp1|cp8|iso8859|koi8|mac")
MULTIBYTE = re.compile("gb|cp932|cp949|big5|euc|hz|iso2022|johab|utf-16|utf-32")


@functools.lru_cache(200)
def codec_of(charset: str) -> tuple[str, str]:
    """Python's name of a charset as mail labels it, and what to do with a broken byte.

    A label of several bytes a character is believed all the same, any other is not.
    LookupError when nobody knows it.
    """
    charset = charset.lower()[:100].partition("*")[0]       # RFC 2231 5: and a language
    label = re.sub("[^a-z0-9]+", "-", charset).strip("-")
    label = CODECS.get(label, re.sub("^(?:cp-|x-cp|win-)", "cp", label))
    name = codecs.lookup(label).name
    return name, "replace" if MULTIBYTE.match(name) else "strict"


def decode(content: bytes, charset: str | None) -> str:
    """The text of bytes in the charset claimed, else in UTF-8, else the claimed broken.

    That is Windows-1252 where the claim is none of one byte a character.
    """
    codec = ""
    with contextlib.suppress(LookupError, ValueError):
        codec, errors = codec_of(charset or "utf-8")
        return content.decode(codec, errors)
    text = content.decode("utf-8", "replace")
    if re.search("[^\0-\x7f\ufffd]", text):     # UTF-8 but for a broken byte
        return text
    return content.decode(codec if ONE_BYTE.match(codec) else "cp1252", "replace")


def html_to_text(markup: str) -> str:
    """The text of HTML: no scripts or styles, links and line breaks kept, cells apart.

    We do not use html.parser: it takes 11 s for 160 KB of `<!--` and raises on `<![<![`
    (measured, Python 3.11.7).
    """
    for pattern, shown in MARKUP:
        markup = re.sub(pattern, shown, markup, flags=re.I | re.S)[:MAX_HTML]
    lines = html.unescape(markup).split("\n")
    text = "\n".join(" ".join(line.split()) for line in lines)
    text = re.sub("\n{3,}", "\n\n", text).strip()
    return text.translate(str.maketrans("\0\1", " \t"))


def verbatim(preformatted: re.Match[str]) -> str:
    """A `pre` with its blanks as what no text has, which nothing takes for blanks."""
    return re.sub(">[^<]*", lambda text: text[0].translate(VERBATIM), preformatted[0])


def with_link(found: re.Match[str]) -> str:
    """The text of a link and, unless it says so itself, where it leads."""
    _, written, text = found.groups()
    # In an attribute `&copy=` is no character to browsers; to html.unescape it is one.
    link = re.sub(r"&(?!#|\w+;)", "&amp;", written)
    text = text.replace(written, link)
    return text if link in text or link[0] == "#" else f"{text} ({link})"


# What is shown of markup, in this order. What is not closed goes to the end, and a tag that
# has no end is text before its attributes are looked for: nothing is ever looked at twice.
VERBATIM = str.maketrans({" ": "\0", "\t": "\1", "\n": "<br>"})     # for blanks that count
MARKUP: tuple[tuple[str, Any], ...] = (
    (r"<!--(?:-?>|.*?--!?>|.*)|<(script|style|title)\b(?:.*?</\1\s*>|.*)", ""),
    (r"<pre\b[^<>]*>.*?(?:</pre\s*>|\Z)", verbatim),
    (r"\s+", " "),
    (r"""<img\b(?=[^<>]*>)[^<>]*?\salt\s*=\s*(["']?)([^<>]*?)\1(?:\s[^<>]*)?/?>""", r"\2"),
    (r"</?t[dh]\b[^<>]*>", " "),
    (r"</?(?:address|article|aside|blockquote|br|caption|center|dd|details|div|dl|dt|"
     r"fieldset|figcaption|figure|footer|form|h[1-6]|header|hr|legend|li|main|nav|ol|"
     r"option|p|pre|section|summary|table|tr|ul)\b[^<>]*>", "\n"),
    (r"<(?!/?a\b)[/!?a-z][^<>]*>", ""),
    (r"""<a\b(?=[^<>]*>)[^<>]*?\shref\s*=\s*(["']?)(?:mailto:)?([^<>]*?)\1(?:\s[^<>]*)?>"""
     r"(.*?)(?=</?a\b|\Z)", with_link),
    (r"</?a\b[^<>]*>", ""),
    (r"&#(?:[0-9]{8,}|x[0-9a-f]{8,});?", "\ufffd"))


# -----------------------------------------------------------------------------------------
# Classify: one table, from the surest sign to the weakest; the first that holds decides.
# Only the outermost headers count. What a sender writes in headers (`header`) is looked up
# apart from what we know ourselves. No sign is ever a reason to drop a mail: it says who is
# not answered, and where the mail goes.

class Evidence:
    """What the signs look at, of a message."""

    def __init__(self, message: Message):
        self.headers: dict[str, list[str]] = {}     # by lower-case name, values as written
        for name, value in message.headers:
            self.headers.setdefault(name.lower(), []).append(value[:2000])
        self.author = local_part(message.from_address) if message.from_count else ""
        self.envelope_from = (message.envelope_from or "").lower()  # "" = null or unknown
        self.sender = local_part(self.envelope_from)
        self.is_null = message.envelope_from == ""
        self.subject = message.subject[:2000]
        self.types = {attachment.content_type for attachment in message.attachments}
        self.verdicts = message.verdict.split("\n")

    def first(self, name: str) -> str:
        return next(iter(self.headers.get(name, ())), "")


Test = Callable[[Evidence], object]


def keyword(value: str) -> str:
    """The first token of a header's value, lower case.

    RFC 3834 5.1: comments may stand before and after the keyword, parameters behind a
    semicolon. A stray colon before it is seen in the wild.
    """
    value = value[:300]     # a keyword stands in front; nested comments cost a pass each
    while (stripped := re.sub(r"\([^()]*\)", " ", value)) != value:
        value = stripped
    return value.partition(";")[0].strip(' \t:"\'').lower()


def has(names: str, pattern: str, by: Callable[..., str] = keyword) -> Test:
    """Whether of these headers (lower case) a value, read by `by`, matches as a whole."""
    matches = re.compile(pattern, re.I).fullmatch
    keys = frozenset(names.split())
    return lambda mail: not keys.isdisjoint(mail.headers) and any(
        matches(by(value)) for key in keys for value in mail.headers.get(key, ()))


is_daemon = re.compile("mailer-daemon|mail-daemon|mdaemon").fullmatch
is_postmaster = re.compile("post[-_.]?master").fullmatch
is_list_sender = re.compile(
    "owner-.+|.+[-+]owner(?:[-+].*)?|.+-request|.+-bounces?(?:[+=].*)?|"
    "bounces?(?:[+=-].*)?|.*noreply.*|(?:.*[-_.+])?no[-_.]repl(?:y|ies).*").fullmatch
is_robot = re.compile(
    ".*do[-_.]?not[-_.]?reply.*|mailerdaemon|no[-_.]?respond.*|nobody|abuse|root|listserv|"
    "auto[-_.]?(?:reply|responder)|majordomo|mailman|feedbackloop|"
    "(?:prvs|srs[01])=.*").fullmatch    # rewritten envelopes
REPLY = r"(?!\s*(?:re|aw|sv|antw(?:ort)?|res|fwd?|wg|tr|rv|enc|i)\s*:)"    # what it is not
is_vacation = re.compile(
    REPLY + r"(?:(?:\[[^\]]*\]\s*)*(?:"
    "automatic reply|auto(?:matic)?[- ]?(?:reply|response)|"
    "out of (?:the )?office(?: autoreply| reply)?|"
    "abwesenheitsnotiz|automatische antwort|réponse automatique|absence du bureau|"
    "respuesta automática|resposta automática|fuori sede|risposta automatica|"
    "automatiskt? svar|frånvaro|automatisch antwoord|automaattinen vastaus|"
    "automatická odpověď|automatikus válasz|automatyczna odpowiedź|"
    "automatická odpoveď|automatski odgovor|otomatik yanıt|răspuns automat|"
    "αυτόματη απάντηση|автоматич(?:еский ответ|на відповідь)|"
    "自動応答|自动(?:回复|答复)|自動回覆|자동 회신"
    r")\s*(?:[:：].*|$)|(?:\[[^\]]*\]\s*)*auto\s*[:：].*|"
    r".* is out of the office(?:\.| until .*| ?\(returning.*)?)", re.I).fullmatch
may_be_vacation = re.compile(
    REPLY + ".*(?:fuera de (?:la )?oficina|fora do escritório|"
    r"\bausência\b|\bausencia\b|\bis out of (?:the )?office(?=\W*$| until\b)|"
    r"\best absente?\b|message d['’]absence|\babwesend\b).*", re.I).fullmatch
is_bounce = re.compile(
    REPLY + ".*(?:undeliver|returned mail|failure notice|unzustellbar|non remis|"
    "delivery (?:status notification|failure|has failed|incomplete)|"
    "mail delivery (?:failed|failure|system)).*", re.I).fullmatch
is_spam = re.compile(
    r"\s*(?:(?:fail|spam|yes|true)\b.*|(?:[5-9]|\d\d+)(?:\.\d+)?\s*)", re.I).fullmatch

LIST_HEADERS = (
    "list-id list-post list-owner list-archive list-help list-subscribe mailing-list "
    "x-beenthere x-mailman-version")
BULK_HEADERS = (
    "list-unsubscribe list-unsubscribe-post feedback-id x-campaignid x-csa-complaints")
is_automatic = has("auto-submitted", "(?!no$).+")
is_refusal = has("auto-submitted", ".*rejected.*", str)
is_report = has("content-type", "multipart/report.*", str)
is_receipt = has("content-type", "multipart/report.*disposition-notification.*", str)
is_of_rules_agent = has("x-ms-exchange-generated-message-source", "mailbox rules agent")
wants_no_answer = has(
    "x-auto-response-suppress", r"(?:.*[,;\s])?(?:all|autoreply)(?:[,;\s].*)?", str)


def is_bounce_like(mail: Evidence) -> object:
    """A second sign of a bounce, where the first is none by itself."""
    return (mail.is_null or is_bounce(mail.subject) or is_daemon(mail.sender)
            or is_automatic(mail) or is_report(mail))


def is_exchange_vacation(mail: Evidence) -> object:
    """Its Mailbox Rules Agent also redirects people's mail (RFC 5322 3.6.6)."""
    is_redirected = any(name.startswith("resent-") for name in mail.headers)
    is_silent = mail.is_null or wants_no_answer(mail)
    return is_silent and not is_redirected and is_of_rules_agent(mail)


# Kind, whether it holds, reason with the source.
SIGNS: tuple[tuple[str, Test, str], ...] = (
    ("bounce", has("content-type", "multipart/report.*delivery-status.*", str),
     "a delivery status report (RFC 3464 2)"),
    ("bounce", has("content-type", "multipart/report.*feedback-report.*", str),
     "an abuse report (RFC 5965)"),
    ("bounce", lambda mail: is_receipt(mail) and is_refusal(mail),
     "a refusal in the form of a receipt (RFC 5429)"),
    ("auto-reply", is_receipt, "a receipt (RFC 8098 2)"),
    ("bounce", has("x-failed-recipients", ".+"), "X-Failed-Recipients (Exim, Gmail)"),
    # Before Auto-Submitted: daemons write auto-replied too (RFC 3834 5.2 knows the misuse).
    ("bounce", lambda mail: is_daemon(mail.author), "From is a mailer daemon"),
    # RFC 3834 5: any keyword but "no" is automatic.
    ("auto-reply", has("auto-submitted", "(?!(?:no|auto-generated|auto-notified)$).+"),
     "Auto-Submitted (RFC 3834 5.2)"),
    ("auto-reply", has(
        "x-autoreply x-auto-reply x-autorespond x-autoresponder x-autoresponse "
        "x-autoreply-from x-mail-autoreply x-vacation x-fc-machinegenerated",
        "(?!(?:no|false|0)$).+"),
     "an autoresponder's own header"),
    ("auto-reply", has("precedence x-precedence preference", "auto_reply"),
     "Precedence: auto_reply"),
    ("auto-reply", has("x-autogenerated", "reply"), "X-Autogenerated: reply (Communigate)"),

    ("auto-reply", has("x-post-messageclass", r"9\b.*|.*autoresponder.*", str),
     "X-POST-MessageClass (Mailtraq)"),
    ("auto-reply", has("delivered-to", "autoresponder"),
     "Delivered-To: Autoresponder (qmail)"),
    ("auto-reply", has("x-apple-action", "vacation.*"),
     "X-Apple-Action: VACATION (iCloud)"),
    ("auto-reply", is_exchange_vacation, "Exchange's Mailbox Rules Agent"),
    # Alone the header may stand on what a rule forwarded for a person.
    ("auto-reply", lambda mail: mail.headers.get("x-ms-exchange-inbox-rules-loop") and (
        wants_no_answer(mail) or is_automatic(mail)),
     "an Exchange rule's own mail, or one without answer"),
    # RFC 3834 3.1.5 warns of it as proof; nine of fourteen notices have nothing else.
    ("auto-reply", lambda mail: is_vacation(mail.subject),
     "the subject of a vacation notice"),
    ("bounce", lambda mail: is_daemon(mail.sender),
     "the envelope sender is a mailer daemon (RFC 3834 7)"),
    ("bounce", has("x-postal-bounce", "true|1"), "the provider takes it for a bounce"),
    ("bounce", lambda mail: "message/delivery-status" in mail.types and (
        is_bounce_like(mail) or is_postmaster(mail.author)),
     "it carries a delivery status"),
    ("bounce", lambda mail: is_postmaster(mail.author) and is_bounce_like(mail),
     "postmaster, and a sign of a bounce"),
    ("bounce", lambda mail: (mail.is_null or not mail.author) and is_bounce(mail.subject),
     "from nobody, with the subject of a bounce"),
    ("machine", has("auto-submitted", "auto-generated|auto-notified"),
     "Auto-Submitted: nobody typed it (RFC 3834 5.1)"),
    ("machine", has("x-ms-exchange-generated-message-source", "(?!mailbox rules agent$).+"),
     "made by an Exchange agent"),
    ("machine", has("x-arf feedback-type", "(?!no$).+"),
     "an abuse report (X-ARF, RFC 5965)"),
    ("list", has("precedence x-precedence", "list"), "Precedence: list (RFC 3834 2)"),
    ("list", has(LIST_HEADERS, ".+"), "a mailing list's header (RFC 2919, RFC 5230 4.6)"),
    ("bulk", has("precedence x-precedence", r"(?:bulk|junk)\b.*"),
     "Precedence: bulk or junk (RFC 3834 2)"),
    ("bulk", has(BULK_HEADERS, ".+"), "a mass mailing's header"),
    # From here on it is a person's mail that is not confirmed; the last row's is.
    ("human", lambda mail: mail.is_null, "the envelope sender is null (RFC 3834 2)"),
    ("human", lambda mail: (is_robot(mail.author) or is_postmaster(mail.author)
                            or is_list_sender(mail.author)),
     "From is an address that is never answered (RFC 3834 2, RFC 5230 4.6)"),
    ("human", lambda mail: is_list_sender(mail.sender),
     "the envelope sender is one that is never answered (RFC 3834 7)"),
    # Not the envelope sender, which only the first header tells; yet nobody writes it idly.
    ("human", has("return-path", "<>", str), "Return-Path is null (RFC 3834 2)"),
    ("human", lambda mail: is_bounce(mail.subject) and not mail.first("in-reply-to"),
     "the subject of a bounce"),
    ("human", lambda mail: may_be_vacation(mail.subject),
     "the subject may be a vacation notice's"),
    ("human", has("x-loop x-auto-generated", "yes|true|hd-.*"),
     "another helpdesk marks its mail so"),
    ("human", has(
        "x-rt-loop-prevention x-roundup-loop x-otrs-loop x-hmxmroriginalrecipient", ".*"),
     "another helpdesk's own mail, or a complaint"),
    ("human", wants_no_answer,
     "X-Auto-Response-Suppress asks for none (MS-OXCMAIL 2.1.3.2.20)"),
    # Of these headers only the first can be our own server's.
    ("human", lambda mail: any(map(is_spam, [*mail.verdicts, *map(mail.first, (
        "x-spam-flag", "x-spam-status", "x-mailgun-sflag"))])),
     "the provider takes it for spam"),
    ("human", lambda mail: re.search(
        r"\bdmarc\s*=\s*fail", mail.first("authentication-results"), re.I),
     "From may be forged, DMARC failed (RFC 8601 5)"),
    ("human", lambda mail: True, ""))


def classify(message: Message, post: Post) -> Filing:
    """The message with its kind, and why it has that and is or is not to be confirmed."""
    mail = Evidence(message)
    take_off_stamps(mail, post)
    kind, _, reason = next(sign for sign in SIGNS if sign[1](mail))
    if kind == "human":
        return Filing(message, kind, "no sign of automatic mail", reason)
    return Filing(message, kind, reason, f"never for {kind} mail (RFC 3834 2)")


# name → word that is taken off; "" = whatever it says.
LIST_STAMPS = dict.fromkeys(LIST_HEADERS.split(), "") | {
    "list-unsubscribe": "", "list-unsubscribe-post": "",
    "precedence": "list", "x-precedence": "list"}
FORWARDER_STAMPS = LIST_STAMPS | {
    "x-ms-exchange-inbox-rules-loop": "", "auto-submitted": "auto-generated",
    "x-ms-exchange-generated-message-source": ""}
FORWARDER_MARKS = (
    "x-ms-exchange-inbox-rules-loop", "resent-from", "x-forwarded-for", "x-forwarded-to")


def take_off_stamps(mail: Evidence, post: Post) -> None:
    """Take off what our own groups and trusted forwarders stamped on a person's mail.

    Through them every customer's mail has a List-Id or an Auto-Submitted.
    """
    forwarders = {*ADDRESSES((post.account["trusted_forwarders"] or "").lower())}
    ours = forwarders.union(map(str.lower, post.own_addresses))
    ours |= {address.replace("@", ".") for address in ours}     # <help.example.org>
    if mail.envelope_from in forwarders or names_one_of(mail, FORWARDER_MARKS, forwarders):
        stamps = FORWARDER_STAMPS
    elif names_one_of(mail, LIST_STAMPS, ours):
        stamps = LIST_STAMPS
    else:
        return
    if not is_daemon(mail.sender):
        mail.sender = ""
    for name, word in stamps.items():
        mail.headers[name] = [value for value in mail.headers.get(name, ())
                              if word and keyword(value) != word]


def names_one_of(mail: Evidence, names: Iterable[str], addresses: set[str]) -> bool:
    """Whether an address stands in one of the headers, in <brackets> where it has any."""
    for name in names:
        for value in map(str.lower, mail.headers.get(name, ())):
            words = re.findall("<(?:mailto:)?([^<>]*)>", value)
            if not addresses.isdisjoint(words or re.split(r"[\s;,]+", value)):
                return True
    return False


def local_part(address: str) -> str:
    return address.rpartition("@")[0].lower() or address.lower()


# -----------------------------------------------------------------------------------------
# Thread: which ticket a message belongs to. By ids first; by the subject's tag for a party
# to it alone.

# In brackets of any width or none, and folded by mail programs between the halves.
SUBJECT_TAG = re.compile(
    r"(?<![\w-])(T-)\s?([0-9A-Z]{4}-)\s?([0-9A-Z]{4})(?![\w-])", re.I | re.A)
# What a report sends back, in its parts or (a provider's JSON) in its text.
returned_ids = re.compile(
    r"^[> \t]*(?:x-)?(?:original-)?message-id:\s*(<[^<>\s]+>)", re.I | re.M).findall
PLACES = ("In-Reply-To", "References", "Exchange's parent id", "the returned message")
# The first id that we know; of its messages the one as written, then of its own requester,
# then the liveliest. Servers change an id's case and lose a trailing dot, hence the second
# spelling. CROSS JOIN: an index look-up for each id, never a scan. Ids of messages are
# asked for first, then those of mails that tell of one.
THREAD = tuple(f"""
    SELECT ticket.*, place.key AS place FROM json_each(?) AS place
    CROSS JOIN json_each(place.value) AS named CROSS JOIN {mail}
    ON mail.email_account = ? AND mail.message_id COLLATE NOCASE
        IN (named.value, rtrim(rtrim(named.value, '>'), '.') || '>')
    JOIN ticket ON ticket.id = mail.ticket ORDER BY place.key, named.key,
        mail.message_id = named.value DESC, requester = ? DESC, updated_at DESC LIMIT 1"""
    for mail in ("message AS mail", """(
        SELECT outbox.email_account, own_message_id AS message_id, ticket
        FROM outbox JOIN message ON message.id = outbox.message
        WHERE purpose NOT IN ('confirmation', 'reply')) AS mail"""))


def thread(db: DB, account: Row, message: Message, kind: str) -> tuple[Row | None, str]:
    """Return (ticket row or None, reason). Every id that the account got or sent counts."""
    # RFC 5322 3.6.4: In-Reply-To names the parent, and so does the last of References.
    # RFC 3464 2, RFC 8098 3.2.5: reports and receipts carry the mail that came back.
    exchange = header_values(message.headers, "x-ms-exchange-parent-message-id")
    may_return = kind in ("bounce", "auto-reply")
    ids = [message.in_reply_to, message.references[::-1], ids_of(exchange),
           returned_ids(report_of(message))[:20] if may_return else []]
    for query in THREAD if any(ids) else ():
        ticket = db.execute(query, [ids, account["id"], message.from_address]).fetchone()
        if ticket:
            return ticket, f"{PLACES[ticket['place']]} names a message of this ticket"
    for halves in SUBJECT_TAG.findall(message.subject)[:5]:
        ticket = db.execute(
            "SELECT * FROM ticket WHERE reference = ? AND email_account = ?",
            ["".join(halves).upper(), account["id"]]).fetchone()
        if ticket and is_party(db, ticket, message.from_address):
            return ticket, "a party to it wrote this ticket's tag in the subject"
    return None, "no id of a known message, so a new ticket"


def is_party(db: DB, ticket: Row, address: str) -> bool:
    """Whether it is the requester's, or one that a mail of ours on the ticket went to."""
    mailbox = mailbox_key(address)
    return mailbox == mailbox_key(ticket["requester"]) or bool(
        mails_about(db, ticket, mailbox, ["confirmation", "reply", "answer"], 1))


def report_of(message: Message) -> str:
    """The beginnings of the parts that a report sends back, and of its text."""
    texts = [decode((attachment.content or b"")[:2**16], None)
             for attachment in message.attachments[:20]
             if attachment.content_type.startswith(("message/", "text/"))]
    return "\n".join([*texts, message.text[:2**16]])


def mailbox_key(address: str) -> str:
    """What the spellings of one mailbox have in common, as its provider counts it.

    Lower case, without a +tag (RFC 5233), at Google without dots.
    """
    local, _, domain = address.lower().rpartition("@")
    local = local.partition("+")[0] or local
    if domain in ("gmail.com", "googlemail.com"):
        local, domain = local.replace(".", ""), "gmail.com"
    return f"{local}@{domain}"


# -----------------------------------------------------------------------------------------
# Store: one reader, one writer. What waits for the writer shares one transaction and one
# fsync. A message *is* stored when COMMIT returns and the file is still the one that stands
# at the path.
#
# When one of those raises, all is undone and done again with a SAVEPOINT each, which then
# is undone alone. Not from the start: in one SQLite copies each page before it changes.
#
# WAL with synchronous=FULL: SQLite's defaults lose acknowledged rows on a power cut. Of a
# process only the writer checkpoints: before 3.51.3 SQLite may corrupt a file that two do
# it to at once. At 2,000 pages, 8 MB of -wal: at more all wait longer for it, at less it
# writes more, for a page that many mails change is then written back once.
#
# Where there is a second machine, stored means there, too: Litestream copies the file, and
# nobody is told 200 before it has.

SCHEMA = Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")
SCHEMA_VERSION, APPLICATION_ID = 3, 1768841828      # schema.sql's
# These very classes: their heirs, IntegrityError and DataError, are the message's fault.
TROUBLE = (sqlite3.OperationalError, sqlite3.DatabaseError, sqlite3.InternalError)
# (connection, seconds UTC, *args) → result. It may be done anew: it changes nothing else.
Work = Callable[..., Any]
NO_ACCOUNT = "there is no account: run `inbound account add ADDRESS`"
# Lists stand in the file as JSON; most are empty.
sqlite3.register_adapter(list, lambda value: json.dumps(value) if value else "[]")


class Job:
    """Work for the writer, and what became of it."""

    def __init__(self, work: Work, *args: Any):
        self.work = work
        self.args = args
        self.result: Any = None
        self.error: Exception | None = None
        self.is_done = False


class Store:
    """The database file at `path`; `clock` returns seconds UTC; a server `checkpoints`."""

    def __init__(self, path: str, clock: Callable[[], float] = time.time,
                 checkpoints: bool = True):
        self.path = path
        self.now = lambda: int(clock())
        self.checkpoints = checkpoints
        self.trusted_proxy = TRUSTED_PROXY              # of the requests that bring mail
        self.has_mail = threading.Event()               # wakes the courier
        self.refusals: deque[tuple[int, str]] = deque(maxlen=1000)  # (time, client) of 401s
        self.uncounted = self.refusals.copy()           # those not yet in `refused_caller`
        self.uses_of_previous: dict[int, int] = {}      # email_account → when it was used
        self.failing_since = self.blind_since = 0.0     # monotonic; 0: writes, reads work
        self._was_open = False
        self._jobs: deque[Job] = deque()
        self._lock = threading.RLock()                  # of the writer and all below
        self._writer: DB | None = None
        self._files: Row = {}                           # `files_at` when it was opened
        self._locked_until = 0.0                        # monotonic
        self._replica = Replica("")
        self._reader_lock = threading.Lock()
        self._reader: DB | None = None

    def open(self, create: bool = True) -> bool:
        """Make the file if there is none, migrate an old one; return whether it was made.

        Refused when it is not ours, of no version that we know, or missing: if `create` is
        false or it was there before.
        """
        try:
            # sqlite3 makes an empty one where a name is mistyped.
            if not os.path.exists(self.path) or not (
                    create or os.path.getsize(self.path)):
                if self._was_open or not create:
                    raise Refused(503, f"no database at {self.path!r}: `inbound serve` "
                                       "makes one; --db FILE or $INBOUND_DB names another")
                # Before SQLite does, so that its -wal and -shm get the same mode.
                Path(self.path).touch(0o600)
            with contextlib.closing(self._connect()) as db:
                was_made = migrate(db, self.path)
        except (OSError, sqlite3.Error) as error:
            raise Refused(503, f"cannot open the database {self.path!r}: {error}")
        self._was_open = True
        return was_made

    def _connect(self) -> DB:
        """A connection that begins no transaction by itself and whose rows are dicts."""
        db = sqlite3.connect(
            self.path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
        db.row_factory = lambda cursor, row: {
            column[0]: value for column, value in zip(cursor.description, row)}
        # We do not set trusted_schema=OFF: SQLite 3.40 then refuses json_valid in a CHECK.
        for setting in ("synchronous = FULL", "secure_delete = ON", "foreign_keys = ON",
                        f"wal_autocheckpoint = {2_000 * self.checkpoints}"):
            db.execute(f"PRAGMA {setting}")
        return db

    def rows(self, query: str, parameters: Any = ()) -> list[Row]:
        """All rows of a query; Refused 503."""
        if not self._reader_lock.acquire(timeout=BUSY_TIMEOUT):
            raise Refused(503, "the database cannot be read: it has not answered others")
        try:
            self.blind_since = self.blind_since or time.monotonic()
            if self._reader is None:
                self.open()
                self._reader = self._connect()
            found = self._reader.execute(query, parameters).fetchall()
            self.blind_since = 0.0
            return found
        except sqlite3.Error as error:
            raise Refused(503, f"the database cannot be read: {error}")
        finally:
            self._reader_lock.release()

    def accounts(self, first: int | None = None) -> list[Row]:
        """All accounts, that with the id `first` before the default one; Refused: none."""
        found = self.rows("""SELECT * FROM email_account
            ORDER BY id = ? DESC, is_default DESC, id""", [first])
        if not found:
            raise Refused(503, NO_ACCOUNT)
        return found

    def own_providers(self) -> list[tuple[str, Row]]:
        """(name, {field: path}) of the rows of `provider`, as far as they make sense."""
        return [(row["name"], {name: path for name, path in json_in(row["fields"]).items()
                               if isinstance(path, str)})
                for row in self.rows("SELECT name, fields FROM provider")]

    def replica_socket(self) -> str:
        """The path of Litestream's control socket; "" = there is one machine."""
        set_here = self.rows("SELECT max(replica_socket) AS path FROM email_account")
        return os.environ.get("INBOUND_REPLICA") or set_here[0]["path"] or ""

    def write(self, work: Work, *args: Any) -> Any:
        """Return the result of `work(connection, now, *args)` once it is synced.

        What it raises is raised here and undone alone. Refused 503 if nothing was stored.
        """
        job = Job(work, *args)
        self.commit([job])
        if job.error:
            raise job.error
        return job.result

    def commit(self, jobs: list[Job]) -> None:
        """Do jobs and all that waits in one transaction; each has its result or error."""
        self._jobs.extend(jobs)
        with self._lock:
            if not all(job.is_done for job in jobs):    # as when another took them along
                self._commit()
        for job in jobs:
            if type(job.error) in TROUBLE:
                job.error = Refused(503, f"the database cannot be written: {job.error}")

    def _commit(self) -> None:
        """One transaction for all that waits, and for who comes before its end."""
        jobs: list[Job] = []
        try:
            writer = self._begin()
            self._do(writer, jobs)
            writer.execute("COMMIT")
            self._refuse_if_replaced()
            if writer.total_changes:    # a look for mail that finds none proves nothing
                self.failing_since = 0.0
            if fault := self._replica.path and self._replica.fault(writer, self.path):
                for job in jobs:
                    job.error = job.error or Refused(503, fault)
        except Exception as error:
            # No second fsync on a descriptor whose first failed: the next write opens anew.
            self._close_writer()
            if "readonly" in str(error):    # a process opens it so while one of it is open
                self.close()
            if "locked" in str(error):
                self._locked_until = time.monotonic() + 1
            if "full" not in str(error):    # room is made by an admin, not by a new process
                self.failing_since = self.failing_since or time.monotonic()
            while self._jobs:       # who waits behind us shares the fate
                jobs.append(self._jobs.popleft())
            for job in jobs:
                job.error = job.error or error
        for job in jobs:
            job.is_done = True

    def _do(self, writer: DB, jobs: list[Job]) -> None:
        """Do all that waits, and who comes meanwhile; it is then in `jobs`."""
        run = at_once
        while self._jobs:
            job = self._jobs.popleft()
            jobs.append(job)
            try:
                job.result = run(writer, job.work, self.now(), *job.args)
            except Exception as error:
                # A full disk ends all of it. What SQLite may not write it opens to read,
                # without a word, and tells so only here.
                is_readonly = type(error) in TROUBLE and "readonly" in str(error)
                if is_readonly or not writer.in_transaction:
                    raise
                if run is in_savepoint:
                    job.error = error
                    continue
                run = in_savepoint
                writer.execute("ROLLBACK")
                writer.execute("BEGIN IMMEDIATE")
                self._jobs.extendleft(reversed(jobs))
                jobs.clear()

    def _begin(self) -> DB:
        """The writer in a transaction. Nobody waits for a lock that was there just now."""
        replica_socket = self.replica_socket()
        if replica_socket != self._replica.path:
            self._close_writer()
        if self._writer is None:
            self.open()
            self._files = {"": files_at(self.path).get("")}
            self._writer = self._connect()
            self._replica = Replica(replica_socket)
            if self._replica.path:      # Litestream checkpoints what it has copied
                self._writer.execute("PRAGMA wal_autocheckpoint = 0")
        wait = BUSY_TIMEOUT if time.monotonic() > self._locked_until else 0
        self._writer.execute(f"PRAGMA busy_timeout = {1000 * wait:.0f}")
        self._writer.execute("BEGIN IMMEDIATE")
        self._locked_until = 0.0        # the next lock is another's, and may be short
        if len(self._files) == 1:       # now there is a -wal, too
            self._files = files_at(self.path) | self._files
        return self._writer

    def _refuse_if_replaced(self) -> None:
        """Refused 503, and all is closed, when file or -wal is not what was opened."""
        found = files_at(self.path)
        if found == self._files:
            return
        self.close()
        same = dict(found.items() & self._files.items())
        if "" not in same:
            # SQLite leaves a -wal whose file is gone, and would read it into the new one.
            for end in same:
                os.replace(self.path + end, f"{self.path}{end}.of-the-replaced-file")
        raise Refused(503, f"the database {self.path!r} was replaced or deleted in use")

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._replica.close()

    def let_go(self) -> None:
        """Give back the writer's copy of what it stored last, which its statement holds."""
        with self._lock:
            self._close_writer()

    def close(self) -> None:
        """Close when nobody is at work: SQLite crashes when closed under a query."""
        with self._lock, self._reader_lock:
            self._close_writer()
            if self._reader is not None:
                self._reader.close()
                self._reader = None


class Replica(http.client.HTTPConnection):
    """Litestream, by the control socket at `path`; the connection is kept."""

    def __init__(self, path: str):
        super().__init__("localhost", timeout=REPLICATION)
        self.path = path
        self.copied: Any = None

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)

    def fault(self, db: DB, path: str) -> str:
        """Wait until all that is committed is copied; return why it is not, "" if it is.

        A repeat writes nothing, and waits nevertheless if what it repeats was not copied,
        whichever process wrote that.
        """
        words = ""
        changes = db.total_changes, db.execute("PRAGMA data_version").fetchone()
        if changes == self.copied:
            return ""
        try:
            self.request("POST", "/sync", json.dumps(
                {"path": os.path.abspath(path), "wait": True, "timeout": REPLICATION}))
            words = decode(self.getresponse().read(MAX_REPLY), None)
            reply = json.loads(words)
            if reply["replicated_txid"] >= reply["txid"] > 0:
                self.copied = changes
                return ""
        except (OSError, http.client.HTTPException,
                ValueError, TypeError, LookupError) as error:
            words = words or repr(error)
        self.close()
        why = printable(str(at(words, "error", words)))[:200]
        return f"stored, but not on the replica: {why}"


def files_at(path: str) -> dict[str, Any]:
    """(inode, device) of a database and its companions, as far as they are there."""
    found = {}
    for end in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            found[end] = os.stat(path + end)[1:3]
    return found


def at_once(db: DB, work: Work, *args: Any) -> Any:
    return work(db, *args)


def in_savepoint(db: DB, work: Work, *args: Any) -> Any:
    """Run `work(db, *args)`; undo it alone if it raises."""
    db.execute("SAVEPOINT alone")
    try:
        return work(db, *args)
    except Exception:
        if db.in_transaction:
            db.execute("ROLLBACK TO alone")
        raise
    finally:
        if db.in_transaction:       # which a full disk ends
            db.execute("RELEASE alone")


def migrate(db: DB, path: str) -> bool:
    """Bring the file to SCHEMA_VERSION in one transaction; return whether it was empty."""
    is_current = version_of(db, path) == SCHEMA_VERSION
    # A restored copy lacks it. Two processes may start at once, and this waits for no lock:
    # then the other sets it.
    with contextlib.suppress(sqlite3.OperationalError):
        db.execute("PRAGMA journal_mode = WAL")
    if is_current:              # no lock: who only reads waits for none
        return False
    db.execute("PRAGMA foreign_keys = OFF")
    db.execute("BEGIN IMMEDIATE")
    first = version_of(db, path)
    while (version := version_of(db, path)) != SCHEMA_VERSION:
        MIGRATIONS[version](db)
    db.execute("COMMIT")
    return first == 0


def version_of(db: DB, path: str) -> int:
    """The version of a file, 0 when it is empty; Refused when no step leads on from it."""
    # Of what calls itself version 1 only the released one has this view.
    found = db.execute("""SELECT iif(size, user_version, 0) AS version,
        CASE WHEN NOT size THEN ''
        WHEN application_id <> ? THEN 'is the database of another program'
        WHEN user_version > ?
            THEN 'has the newer schema version ' || user_version || ': update inbound'
        WHEN user_version < 1 OR user_version = 1 AND NOT view
            THEN 'comes from no released version of inbound' ELSE '' END AS fault
        FROM pragma_application_id, pragma_user_version, (
            SELECT count(*) AS size, sum(name = 'valid_secret') AS view
            FROM sqlite_schema)""", [APPLICATION_ID, SCHEMA_VERSION]).fetchone()
    if found["fault"]:
        raise Refused(503, f"{path!r} {found['fault']}")
    return found["version"]


def new_file(db: DB) -> None:
    run_script(db, SCHEMA)
    db.execute("UPDATE email_account SET inbound_secret = ?", [new_secret()])


def run_script(db: DB, script: str) -> None:
    """Run statements inside the open transaction, which `executescript` would commit."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""


def from_version_1(db: DB) -> None:
    """Version 1 held tables of providers, signs and commands, and views that rendered text.

    All rows that people wrote and all settings are carried into tables made anew, so that
    what stands in the file is what schema.sql says. An admin's own signs mean nothing any
    more; they are kept to be read.
    """
    # The first 21 were the program's own, as were 42 signs. Two may bear one name.
    providers = db.execute("""SELECT fields,
        name || iif(count(*) OVER (PARTITION BY name) > 1, ' ' || id, '') AS name
        FROM provider WHERE id > 21 AND fields IS NOT NULL""").fetchall()
    carry_over(db, """
        CREATE TABLE sign_of_version_1 AS SELECT * FROM sign WHERE id > 42;
        DROP TABLE provider;
        DROP TABLE sign;
        DROP TABLE command;
        -- What version 2 takes no more.
        UPDATE queue SET name = 'Queue ' || id WHERE trim(name) = '';
        UPDATE email_account SET trusted_forwarders = iif(
            trusted_forwarders LIKE '_%@_%', trusted_forwarders, NULL);
        UPDATE email_account SET template = template || '{reference}' || char(10)
        WHERE NOT instr(template, '{reference}');
        """)
    for row in providers:
        pairs = [word.partition("=") for word in row["fields"].split()]
        fields = {name: path or name for name, _, path in pairs}
        insert(db, "provider", name=row["name"], fields=json.dumps(fields))
    if not db.execute("SELECT 1 FROM sign_of_version_1").fetchone():
        db.execute("DROP TABLE sign_of_version_1")


def carry_over(db: DB, mend: str = "") -> None:
    """Carry our tables, once the script `mend` has run, into such as schema.sql makes.

    Without one it is the step from version 2, which knew no team, and no mail of ours but
    of a message of its own.
    """
    names = re.findall(r"CREATE TABLE (\w+)", SCHEMA)
    for part in db.execute("""SELECT name, type FROM sqlite_schema
            WHERE sql IS NOT NULL AND type <> 'table'
            AND (tbl_name IN (SELECT value FROM json_each(?)) OR ?)""", [
                [*names, "inbox"], bool(mend)]).fetchall():
        # What belongs to an admin's own tables stays. A view's triggers go with it.
        db.execute('DROP {type} IF EXISTS "{name}"'.format(**part))
    run_script(db, mend + """
        PRAGMA legacy_alter_table = ON;     -- references keep their tables' names
        ALTER TABLE outbox ADD COLUMN own_message_id TEXT;
        UPDATE outbox SET own_message_id = (
            SELECT message_id FROM message WHERE id = message);
        """)
    tables = [name for name in names
              if db.execute(f"PRAGMA table_info({name})").fetchall()]
    for table in tables:
        db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    run_script(db, SCHEMA)
    # What a new file begins with goes; its `Automatic` is replaced.
    db.execute("DELETE FROM email_account")
    db.execute("DELETE FROM queue WHERE name <> 'Automatic'")
    for table in tables:
        old = db.execute(f"PRAGMA table_info(old_{table})").fetchall()
        columns = ", ".join(f'"{column["name"]}"' for column in old)
        db.execute(f"""INSERT OR REPLACE INTO {table} ({columns})
            SELECT {columns} FROM old_{table}""")
        db.execute(f"DROP TABLE old_{table}")
    db.execute("""UPDATE ticket SET last_writer = 'team' WHERE 'reply' = (
        SELECT ifnull(purpose, kind) AS what FROM message
        LEFT JOIN outbox ON outbox.message = message.id WHERE ticket = ticket.id
            AND what NOT IN ('confirmation', 'auto-reply', 'bounce')
        ORDER BY message.id DESC LIMIT 1)""")


# version → what makes a later one of it
MIGRATIONS = {0: new_file, 1: from_version_1, 2: carry_over}


def new_secret() -> str:
    """A random secret. None begins with a hyphen: command lines take that for an option."""
    return "s" + secrets.token_urlsafe(24)


# -----------------------------------------------------------------------------------------
# File: what happens to one message inside the transaction, and what is kept of a post that
# became none.

def file_post(db: DB, now: int, post: Post, filings: list[Filing | str],
              run: Callable[..., Any] = at_once) -> list[Row]:
    """Store each member of a post; one that was not understood has it kept, once.

    What cannot be filed raises; run `in_savepoint` it costs nothing but this member.
    """
    answers: list[Row] = []
    faults: list[str] = []
    for filing in filings:
        try:
            if isinstance(filing, Filing):
                answers.append(run(db, file_message, now, post, filing))
                continue
            fault = filing
        except Exception as error:
            if run is at_once or type(error) in TROUBLE:
                raise
            fault = fault_of(error, post, "filing")
        faults.append(fault)
        answers.append({
            "status": "quarantined", "ticket": None, "message": None, "kind": None,
            "confirmation": None, "reason": f"kept: {fault}"})
    if faults:
        keep(db, now, safe(post), 200, "; ".join(dict.fromkeys(faults))[:2000])
    return answers


def file_message(db: DB, now: int, post: Post, filing: Filing) -> Row:
    """Thread and store one message; return the answer's object.

    UNIQUE (email_account, message_id, digest) settles a repeat. It is asked for first,
    which the writer's lock makes safe: so a repeat writes nothing and costs no fsync.
    """
    account, message = post.account, filing.message
    is_imported = post.content_type == IMPORTED
    if is_imported:
        now = date_of(message, now)
        post = replace(post, received_at=now)
        filing = replace(filing, withheld=filing.withheld or "it was imported")
    known = db.execute("""SELECT ticket.*, message.id AS message, direction, digest, kind
        FROM message JOIN ticket ON ticket.id = message.ticket
        WHERE message.email_account = ? AND message_id = ?
        ORDER BY digest = ? DESC, direction DESC LIMIT 1""", [
            account["id"], message.message_id, message.digest]).fetchone()
    if known and known["digest"] == message.digest:
        return {"status": "duplicate", "ticket": known["reference"],
                "message": known["message"], "kind": known["kind"] or "human",
                "confirmation": "not due", "reason": "stored before"}
    ours = known if known and known["direction"] == "out" else None
    if account["staff"] and not known:      # a notice, or an answer as it went out
        ours = db.execute(THREAD[1], [[[message.message_id]], account["id"], ""]).fetchone()
    if ours:
        found = "it bears the Message-ID of a mail of ours"
        add_note(message, found)
        answer = file_mail(db, now, post, filing, ours, found)
        # A word of ours that comes back is nobody's last.
        db.execute("UPDATE ticket SET last_writer = ? WHERE id = ?", [
            ours["last_writer"], ours["id"]])
        return answer
    ticket, found = thread(db, account, message, filing.kind)
    if account["staff"] and not is_imported:
        return file_for_team(db, now, post, filing, ticket, found)
    return file_mail(db, now, post, filing, ticket, found)


def file_mail(db: DB, now: int, post: Post, filing: Filing, ticket: Row | None,
              found: str) -> Row:
    """Store a message on its ticket, or on a new one and confirm that."""
    message, kind = filing.message, filing.kind
    draft, due = None, "no confirmation: it opened no ticket"
    if ticket:
        status, confirmation = "appended", "not due"
        is_news = post.content_type != IMPORTED or now > ticket["updated_at"]
        touch_ticket(db, now, ticket, filing, is_news)
    else:
        ticket, status = open_ticket(db, now, post.account, message, kind), "created"
        draft, due = confirm(db, now, post, ticket, message, filing.withheld)
        confirmation = "queued" if draft else "withheld"
    reason = f"{filing.reason}; {found}; {due}"
    row = insert_message(
        db, post.received_at or now, ticket, message, reason, kind, confirmation)
    if draft:
        send_later(db, now, ticket, draft, "confirmation")
    elif kind == "bounce":
        fail_bounced(db, post.account, message)
    return {"status": status, "ticket": ticket["reference"], "message": row, "kind": kind,
            "confirmation": confirmation, "reason": reason}


IMPORTED = "message/rfc822; imported=yes"       # Content-Type of what `import` posts


def date_of(message: Message, now: int) -> int:
    """When a mail says it was written; now, where that makes no sense or is yet to come."""
    written = 0
    for date in header_values(message.headers, "date")[:1]:
        with contextlib.suppress(ValueError, OverflowError, IndexError):
            parsed = email.utils.parsedate_tz(date[:200])
            written = email.utils.mktime_tz(parsed) if parsed else 0
    return written if 378_691_200 < written < now else now      # 1982, as is RFC 822


def open_ticket(db: DB, now: int, account: Row, message: Message, kind: str) -> Row:
    """Insert a ticket; automatic replies and bounces go to the queue `Automatic`."""
    ticket: Row | None = None
    while ticket is None:       # among a million one in a million references is taken
        letters = "".join(CROCKFORD[byte % 32] for byte in secrets.token_bytes(8))
        ticket = db.execute("""INSERT INTO ticket (reference, queue, email_account, subject,
            requester, requester_name, created_at, updated_at)
            VALUES (:reference, iif(:kind IN ('auto-reply', 'bounce'),
                (SELECT id FROM queue WHERE name = 'Automatic'), :queue), :id, :subject,
                :from_address, :from_name, :now, :now)
            ON CONFLICT (reference) DO NOTHING RETURNING *""", {
                **account, **vars(message), "kind": kind, "now": now,
                "reference": f"T-{letters[:4]}-{letters[4:]}"}).fetchone()
    return ticket


CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def touch_ticket(db: DB, now: int, ticket: Row, filing: Filing, is_news: bool) -> None:
    """A party's own words open a closed ticket again; no machine's, and no stranger's."""
    author = filing.message.from_address
    is_known = is_party(db, ticket, author)
    is_reaction = filing.kind in ("bounce", "auto-reply")
    if not is_known and not is_reaction:
        add_note(filing.message, f"written by a stranger to this ticket: {author}")
    db.execute("""UPDATE ticket SET updated_at = ?, status = iif(?, 'open', status),
        last_writer = iif(?, last_writer, 'customer') WHERE id = ? AND ?""", [
            now, filing.kind == "human" and is_known, is_reaction, ticket["id"], is_news])


def insert_message(db: DB, now: int, ticket: Row, message: Message, reason: str,
                   kind: str | None = None, confirmation: str | None = None) -> int:
    """Insert a message and its attachments; return its id. Without a kind it is ours."""
    columns = vars(message) | {"in_reply_to": " ".join(message.in_reply_to) or None}
    for name in ("attachments", "from_count", "verdict", "content"):
        del columns[name]
    row = insert(db, "message", ticket=ticket["id"], email_account=ticket["email_account"],
                 direction="in" if kind else "out", kind=kind, reason=reason,
                 confirmation=confirmation, received_at=now, **columns)
    for item in message.attachments:
        columns = vars(item) | {"sha256": item.sha256}
        insert(db, "attachment", message=row, size=len(item.content or b""), **columns)
    return row


def add_note(message: Message, note: str) -> None:
    """Note it once, however often the message is filed before it is stored."""
    if note not in message.notes:
        message.notes.append(note)


def insert(db: DB, table: str, **row: Any) -> int:
    """Insert a row; return its id."""
    columns, marks = '", "'.join(row), ", ".join("?" * len(row))
    return db.execute(f'INSERT INTO {table} ("{columns}") VALUES ({marks})',
                      [*row.values()]).lastrowid or 0


DELAYED = re.compile(
    "delay|warning: (?:message|could not send)|still being retried|not yet been delivered|"
    "temporar|verzögert|will (?:continue|retry)", re.I)
# RFC 3464 2.3.3; and what complains of a mail that did arrive (RFC 5965 3.1).
NOT_FINAL = {"delayed", "delivered", "relayed", "expanded",
             "abuse", "fraud", "virus", "other"}


def fail_bounced(db: DB, account: Row, message: Message) -> None:
    """Mark our mail that a bounce brings back failed, unless the bounce is not final.

    Where no action is told, codes that may pass and words of a delay are not final either.
    """
    report = report_of(message)
    codes = re.findall(         # RFC 3463
        r"(?<![\w.])(?:[245]\.\d{1,3}\.\d{1,3}|55\d)(?![\w.])", report)
    actions = re.findall(r"^(?:action|feedback-type):\s*(\w+)", report.lower(), re.M)
    is_delayed = {code[0] for code in codes} == {"4"} and DELAYED.search(
        message.subject + report)
    if NOT_FINAL.issuperset(actions) if actions else is_delayed:
        return
    ids = [*returned_ids(report)[:20], *message.in_reply_to, *message.references]
    code = next((code for code in codes if code[0] == "5"), "no code")
    # +: found by those messages, not by looking through all that was ever sent. A bounce
    # may be here before we have noted that the relay took the mail.
    db.execute("""WITH named AS (SELECT value FROM json_each(:ids)) UPDATE outbox
        SET state = 'failed', last_error = :error, next_attempt_at = NULL
        WHERE +state IN ('sending', 'sent') AND own_message_id COLLATE NOCASE IN named
        AND message IN (SELECT id FROM message WHERE email_account = :account
                AND direction = 'out' AND message_id COLLATE NOCASE IN named
            UNION ALL SELECT message FROM outbox WHERE email_account = :account
                AND own_message_id COLLATE NOCASE IN named
                AND purpose NOT IN ('confirmation', 'reply'))""", {
                    "error": f"bounced: {code}", "account": account["id"], "ids": ids})


def starred(account: Row, text: str) -> str:
    """`text` with the secrets of the account starred out."""
    for secret in (account["inbound_secret"], account["previous_secret"]):
        if secret:
            text = spellings(secret).sub(lambda found: "*" * len(found[0]), text)
    return text


def safe(post: Post) -> Post:
    """The post as it may be kept, without the secret. As Latin-1 a byte is a character."""
    body = starred(post.account, post.body.decode("latin-1")).encode("latin-1")
    return replace(
        post, body=body, content_type=starred(post.account, clean(post.content_type)))


def keep(db: DB, now: int, post: Post, status: int, reason: str) -> None:
    """Keep a safe post that became no message; the same body again updates its row."""
    db.execute("""INSERT INTO rejected (received_at, email_account, status, reason,
            content_type, body, body_sha256) VALUES (?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT DO UPDATE SET tries = tries + 1, received_at = excluded.received_at,
            status = excluded.status, reason = excluded.reason,
            content_type = excluded.content_type""", [
        post.received_at or now, post.account["id"], status, clean(reason),
        post.content_type, post.body, hashlib.sha256(post.body).hexdigest()])


def rehearse(db: DB, now: int) -> None:
    """Try all that storing a message needs, and undo it."""
    account = db.execute("SELECT * FROM email_account ORDER BY is_default DESC").fetchone()
    if not account:
        raise Refused(503, NO_ACCOUNT)
    post = Post(account | {"staff": None}, [], "", b"rehearsal")
    message = normalise({"from": "rehearsal@inbound.example", "text": secrets.token_hex(),
                         "attachments": [{"content": ""}]}, is_strict=False)
    db.execute("SAVEPOINT rehearsal")
    file_message(db, now, post, Filing(message, "human", "rehearsal"))
    keep(db, now, post, 200, "rehearsal")
    db.execute("ROLLBACK TO rehearsal")
    db.execute("RELEASE rehearsal")


# -----------------------------------------------------------------------------------------
# Confirm: whether, and the mail itself. It goes to an address that anyone can forge: none
# of the sender's words are in it, and caps are counted in the transaction that stores it.

LABEL = "(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
DELIVERABLE = re.compile(
    r"(?=.{3,254}$)(?!.*=\?)[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}"
    rf"@(?:{LABEL}\.)+(?![0-9]){LABEL}")
# An id that may stand in a header of ours: printable ASCII but < and >, no encoded-word,
# and not made up by us for a mail without one.
OWN_ID = re.compile(rf"(?!.*=\?)<[!-;=?-~]{{1,{MAX_OWN_ID - 2}}}(?<!@missing\.invalid)>")
# (column of email_account, seconds, column of outbox that is counted by); first the one
# that stops a flood from everywhere
CAPS = (
    ("confirmations_per_hour", 3600, "email_account"),
    ("confirmations_per_address_hour", 3600, "mailbox"),
    ("confirmations_per_address_day", 86400, "mailbox"),
    ("confirmations_per_domain_hour", 3600, "domain"))
# Where so many people have their mailboxes that a domain says nothing.
LARGE_PROVIDERS = frozenset(re.findall(r"\S+", """
    126.com 163.com aol.com att.net bluewin.ch btinternet.com comcast.net daum.net
    fastmail.com free.fr freenet.de gmail.com gmx.at gmx.ch gmx.de gmx.net googlemail.com
    hanmail.net hotmail.com icloud.com laposte.net libero.it live.com mac.com mail.com
    mail.ru me.com msn.com naver.com orange.fr outlook.com proton.me protonmail.com qq.com
    rediffmail.com sbcglobal.net seznam.cz t-online.de verizon.net web.de wp.pl
    yahoo.co.jp yahoo.com yandex.ru ymail.com zoho.com"""))
# RFC 3834 3.1.7: auto-replied. Precedence: vacation(1) and Dovecot look for it.
AUTOMATIC = {"Auto-Submitted": "auto-replied", "X-Auto-Response-Suppress": "All",
             "Precedence": "bulk"}


def confirm(db: DB, now: int, post: Post, ticket: Row, message: Message,
            withheld: str) -> tuple[Message | None, str]:
    """Return (draft, reason) of a new ticket's confirmation; no draft if a rule forbids."""
    reference = ticket["reference"]
    try:
        if not withheld:
            return draft_automatic(
                db, now, post, message, "confirmation",
                subject=f"[{reference}] We received your message",
                text=post.account["template"].replace("{reference}", reference),
                ancestors=[*message.references, message.message_id]), "confirmation queued"
    except Refused as refusal:
        withheld = refusal.reason
    return None, f"confirmation withheld: {withheld}"


def draft_automatic(db: DB, now: int, post: Post, message: Message, purpose: str,
                    **parts: Any) -> Message:
    """An automatic answer to a mail, of `parts` as draft_mail takes them.

    Refused where it may have none, signs on the mail apart.
    """
    recipient = deliverable(message.from_address)
    mailbox = mailbox_key(recipient or message.from_address)
    if mailbox in map(mailbox_key, post.own_addresses):
        raise Refused(403, "the mail comes from our own address")
    if message.from_count > 1 or not recipient:
        raise Refused(403, "From is not one address that we write to (RFC 3834 3.1.3)")
    counted = {"mailbox": mailbox, "domain": domain_key(mailbox),
               "email_account": post.account["id"]}
    for cap, seconds, column in CAPS:
        if counted[column] not in LARGE_PROVIDERS and sent_lately(
                db, now, purpose, counted[column], column, seconds) >= post.account[cap]:
            raise Refused(429, f"the cap {cap} is reached")
    return draft_mail(post.account, now, recipient, AUTOMATIC, **parts)


def sent_lately(db: DB, now: int, purpose: str, to: Any, column: str = "mailbox",
                seconds: int = 3600) -> int:
    """How many mails of a purpose went to a mailbox, or to whom another column says.

    Until now: what a clock that was wrong dated into the future does not count.
    """
    return db.execute(f"""SELECT count(*) AS n FROM outbox WHERE {column} = ?
        AND purpose = ? AND created_at BETWEEN ? AND ?""", [
            to, purpose, now - seconds + 1, now]).fetchone()["n"]


def domain_key(mailbox: str) -> str:
    """Whose domain it is, without sub-domains: two labels, or three as in example.co.uk.

    A large provider's sub-domain is a customer's: Ada has all of ada.fastmail.com.
    """
    is_shared = re.search(
        r"\.(?:com?|org|net|gov|edu|ac|or|ne|go|gob|gv|nom)\.[^.]{2}$", mailbox)
    domain = mailbox.rpartition("@")[2]
    owner = ".".join(domain.split(".")[-3 if is_shared else -2:])
    return domain if owner in LARGE_PROVIDERS else owner


def deliverable(address: str) -> str:
    """The address as it goes on the wire, ASCII; "" for what we do not write to.

    We do not write to quoted local parts, address literals, non-ASCII local parts (they
    need SMTPUTF8) or encoded words (mail programs would decode them).
    """
    local, _, domain = address.rpartition("@")
    if not domain.isascii():        # and stays so where this fails
        with contextlib.suppress(UnicodeError):
            wire = domain.lower()[:254].encode("idna")
            # The codec is IDNA 2003: what it maps to another name (ß to ss) may be others'.
            if wire.decode("idna") == domain.lower():
                address = f"{local}@{wire.decode()}"
    return address if DELIVERABLE.fullmatch(address) else ""


def draft_mail(account: Row, now: int, address: str, extra: dict[str, str], *, subject: str,
               text: str, ancestors: list[str], name: str = "",
               files: Iterable[Attachment] = ()) -> Message:
    """A text/plain mail of ours; Refused unless these headers and clean lines result.

    `ancestors` are the ids for References, the parent's last; `name` stands in From.
    """
    recipient = deliverable(address)
    if not recipient:
        raise Refused(400, f"{address!r} is not an address that we can write to")
    ours = account["address"]
    # 128 random bits; the message row, not the id, says which ticket.
    own_id = f"<{secrets.token_hex(16)}@{ours.rpartition('@')[2].lower()}>"
    known = [parent for parent in ancestors if OWN_ID.fullmatch(parent)]
    parents = [parent for parent in ancestors[-1:] if parent in known]
    # A notice names itself: relays as Amazon SES write another Message-ID.
    known = known[:1] + known[1:][-9:] + ([own_id] if TOLD in extra else [])
    # `=?` is broken up: mail programs would decode what stands behind it. The name has to
    # fit a line, encoded.
    name = one_line(name or account["display_name"] or "").replace("=?", "= ?")[:150]
    subject = subject.replace("=?", "= ?")
    mail = email.message.EmailMessage(Verbatim())
    for header, value in {
            "From": email.utils.formataddr((name, ours)), "To": recipient,
            "Subject": subject, "Date": email.utils.formatdate(now),
            "Message-ID": own_id, "In-Reply-To": "".join(parents),
            "References": " ".join(known), **extra}.items():
        if value:
            mail[header] = value
    # Quoted-printable is what people can read, and takes up to 2 s a megabyte.
    mail.set_content(text, cte="quoted-printable" if len(text) < 2**16 else "base64")
    for file in files:
        mail.add_attachment(file.content, *file.content_type.split("/"),
                            filename=file.filename)
    content = mail.as_bytes()
    head = content.partition(b"\r\n\r\n")[0]
    if (email.message_from_bytes(head).keys() != mail.keys()
            or re.search(rb"[\0\x80-\xff]|[^\r]\n|\r[^\n]", content)
            or max(map(len, content.split(b"\r\n"))) > 998):
        raise Refused(400, "the mail cannot be written safely")
    return Message(
        message_id=own_id, digest="", in_reply_to=parents, references=known,
        from_address=ours, from_name=name, to=[recipient], cc=[], subject=subject,
        envelope_from=(account["confirmation_envelope_from"] or "") if extra else ours,
        text=text, html=None, headers=[[*pair] for pair in mail.items()], content=content)


class Verbatim(email.policy.Compat32):
    """Headers stand as they are, ids one a line; other than ASCII is made encoded-words.

    The newer policy makes of a long In-Reply-To an encoded-word that threads nowhere, and
    of a long quoted name with commas in From several mailboxes.
    """

    linesep = "\r\n"
    content_manager = email.contentmanager.raw_data_manager

    def fold_binary(self, name: str, value: str) -> bytes:
        if not value.isascii():
            return super().fold_binary(name, value)
        return f"{name}: {value}\r\n".replace("> <", ">\r\n <").encode()


def send_later(db: DB, now: int, ticket: Row, draft: Message, purpose: str,
               row: int | None = None) -> int:
    """Put a mail into the outbox; its bytes never change any more.

    It is about message `row`, or else a message itself. Return the id of that message.
    """
    if row is None:
        row = insert_message(db, now, ticket, draft, f"our {purpose}")
    [recipient] = draft.to
    mailbox = mailbox_key(recipient)
    insert(db, "outbox", message=row, own_message_id=draft.message_id, purpose=purpose,
           email_account=ticket["email_account"], recipient=recipient, mailbox=mailbox,
           domain=domain_key(mailbox), content=draft.content, created_at=now,
           next_attempt_at=now, give_up_at=now + GIVE_UP)
    return row


# -----------------------------------------------------------------------------------------
# Team: the people who answer are told by mail, and answer by mail. A notice of a message
# goes to each of an account's staff, under an id that nobody else gets to know; a mail that
# names it, from that very person, is the team's answer and goes to the requester. What
# anybody can write proves nothing: From, a subject, an id that a customer knows.

ADDRESSES = re.compile(r"[^\s,]+").findall      # of a setting that holds some, with commas
# RFC 3834 5.1: a notice answers nobody. Its own header is for other installations, which
# may have our address among their staff: what was told once is told to nobody again.
NOTICE = AUTOMATIC | {"Auto-Submitted": "auto-generated"}
TOLD = "X-Inbound-Notice"
PREFIX = "[inbound] "           # of our lines in a notice; an answer loses each …
# … however it is quoted.
OUR_LINE = re.compile(r"^[^\w\n]{0,40}\[inbound\](?:[^\S\n].*)?(?:\n|\Z)", re.M)
HEAD_OF_QUOTATION = r"(?m)(?:<\s*|^\W*\w+ ?:.*)"      # and our address: `From: Ada <us@…>`
CLOSE = re.compile(r"\A(?i:close)!?[^\S\n]*(?:\n+|\Z)")     # a first line that closes
# Types that are more than bytes of no charset, or none at all.
NO_BYTES = re.compile(r"\A(?!(?:application|audio|image|video)/[a-z0-9.+-]{1,99}\Z).*")
HOW_TO_ANSWER = (
    "Your reply to this mail goes to {requester}, without these lines. With `close` alone "
    "on its first line it closes the ticket.")
SUMMARY = """More than {} messages have come within an hour; the next are not told by mail.
What waits for an answer: inbound tickets waiting
"""
REFUSAL = """Your mail is kept with the ticket {}. It was not sent on as an answer:
{}. To answer, reply to a notice from the address that it went to.
"""


def staff_of(db: DB, account: Row) -> Row:
    """{mailbox: address} of whom the account tells; an address of ours would be a loop."""
    named = filter(None, map(deliverable, ADDRESSES(account["staff"] or "")))
    staff = {mailbox_key(each): each for each in named}
    for ours in db.execute("SELECT address FROM email_account"):
        staff.pop(mailbox_key(ours["address"]), None)
    return staff


def mails_about(db: DB, ticket: Row, mailbox: str, purposes: list[str],
                most: int) -> list[str]:
    """Ids of the last mails that went to a person about a ticket, the latest last."""
    # +: by the ticket, not by all that ever went to one of the team.
    rows = db.execute("""SELECT own_message_id FROM message
        JOIN outbox ON outbox.message = message.id WHERE ticket = ?
            AND +mailbox = ? AND purpose IN (SELECT value FROM json_each(?))
        ORDER BY message.id DESC LIMIT ?""", [ticket["id"], mailbox, purposes, most])
    return [row["own_message_id"] for row in rows][::-1]


def file_for_team(db: DB, now: int, post: Post, filing: Filing, ticket: Row | None,
                  found: str) -> Row:
    """Send on what is the team's answer; store all else, and tell the team of it."""
    account, message = post.account, filing.message
    is_staff = mailbox_key(message.from_address) in staff_of(db, account)
    refusal = ""
    try:
        if ticket and is_answer(db, filing, ticket, is_staff):
            return file_answer(db, now, post, ticket, message)
        end = "@" + account["address"].lower().rpartition("@")[2]
        if not ticket and is_staff and any(each.endswith(end) for each in our_ids(message)):
            raise Refused(404, "the ticket that it answers is not kept any more")
        if is_staff:
            add_note(message, "its From is the team's, but it answers no notice")
    except Refused as error:
        refusal = error.reason
        add_note(message, f"not sent on as an answer: {refusal}")
    withheld = filing.withheld or refusal
    answer = file_mail(db, now, post, replace(filing, withheld=withheld), ticket, found)
    ticket = db.execute("""SELECT ticket.*, name FROM ticket JOIN queue ON queue.id = queue
        WHERE reference = ?""", [answer["ticket"]]).fetchone()
    # From of staff is no stranger's, even where it may be forged: they want to know.
    if refusal and filing.kind == "human" and (is_staff or not filing.withheld):
        with contextlib.suppress(Refused):
            send_later(db, now, ticket, draft_automatic(
                db, now, post, message, "refusal",
                subject=f"[{ticket['reference']}] Your mail was not sent on",
                text=REFUSAL.format(ticket["reference"], refusal),
                ancestors=[message.message_id]), "refusal", answer["message"])
    # Two of the team on vacation do not tell each other so.
    if not (is_staff and withheld or filing.kind in ("auto-reply", "bounce")
            or ticket["name"] == "Automatic"
            or header_values(message.headers, TOLD.lower())):
        tell(db, now, account, ticket, answer["message"], message, [
            f"{message.from_address} wrote:", f"why: {answer['reason']}", *message.notes])
    return answer


def is_answer(db: DB, filing: Filing, ticket: Row, is_staff: bool) -> bool:
    """Whether a mail is the team's answer; Refused if it answers a notice and is none."""
    message = filing.message
    mailbox = mailbox_key(message.from_address)
    ids = message.in_reply_to + message.references
    # By the ids' index: +, and what its WHERE says.
    notices = db.execute("""SELECT mailbox, purpose FROM outbox JOIN message
        ON message.id = message WHERE ticket = ? AND outbox.email_account = ?
        AND own_message_id COLLATE NOCASE IN (SELECT value FROM json_each(?))
        AND +purpose IN ('notice', 'summary') AND purpose NOT IN ('confirmation', 'reply')
        """, [ticket["id"], ticket["email_account"], ids]).fetchall()
    if mailbox == mailbox_key(ticket["requester"]) or not notices:
        return False
    if not is_staff or {"mailbox": mailbox, "purpose": "notice"} not in notices:
        raise Refused(403, "it answers no notice that went to this address of the team")
    if filing.withheld or message.from_count != 1:
        raise Refused(403, filing.withheld or "From is not one address")
    return True


def our_ids(message: Message) -> list[str]:
    """Ids that a mail answers and that look as if we had made them; without brackets."""
    ids = " ".join(message.in_reply_to + message.references).lower()
    return re.findall(r"<([0-9a-f]{32}@[^<>\s]+)>", ids)


def file_answer(db: DB, now: int, post: Post, ticket: Row, message: Message) -> Row:
    """Store an answer, send it to the requester, close the ticket if it says so.

    Refused when it cannot be sent; nothing is stored then.
    """
    account, author = post.account, message.from_address
    text = OUR_LINE.sub("", message.text.replace("\r\n", "\n")).lstrip()
    is_closing = bool(CLOSE.match(text))
    text = CLOSE.sub("", text)
    for each in our_ids(message):       # who quotes the notice with all its headers
        text = text.replace(each, "…")
    draft, reason = None, f"closed by {author}, without an answer"
    files = files_of(message)
    if files or has_words(text, account["address"].lower()):
        draft = draft_answer(db, now, account, ticket, ticket["requester"], text, files)
        reason = f"answer of {author}" + (", who closed the ticket" if is_closing else "")
        if sent_lately(db, now, "answer", mailbox_key(draft.to[0])) >= ANSWERS_PER_HOUR:
            raise Refused(429, f"{ANSWERS_PER_HOUR} answers went there within an hour")
    elif not is_closing:
        raise Refused(422, "there is nothing in it but what it quotes")
    row = insert_message(db, post.received_at or now, ticket, message, reason)
    if draft:
        send_later(db, now, ticket, draft, "answer", row)
    shown = replace(message, text=text)
    team_wrote(db, now, account, ticket, row, shown, reason, is_closing)
    return {"status": "appended", "ticket": ticket["reference"], "message": row,
            "kind": "human", "confirmation": "not due", "reason": reason}


def has_words(text: str, ours: str) -> bool:
    """Whether a person wrote more than a signature, and the line above what they quote."""
    is_marked = re.search(r"(?m)^[^\S\n]*>", text)
    for paragraph in re.split(r"\n\s*\n", re.split("(?m)^-- ?$", text)[0]):
        head = "\n".join(paragraph.lower().split("\n")[:2])
        # Outlook's From: line, all below is quoted; in a sentence it is an address.
        if not is_marked and re.search(HEAD_OF_QUOTATION + re.escape(ours), head):
            return False
        lines = re.findall(r"(?m)^[^\S\n]*[^\s>].*", paragraph)
        if lines and not lines[-1].rstrip().endswith(":"):
            return True
    return False


def files_of(message: Message) -> list[Attachment]:
    """The attachments of an answer, but not the notice itself: its id would go along."""
    marks = [each.encode(charset) for each in our_ids(message)
             for charset in ("ascii", "utf-16-le")]     # Outlook's .msg is in the latter
    files = []
    for file in message.attachments:
        content = file.content
        if content is None:
            raise Refused(422, f"its attachment {file.filename!r} is {file.note}")
        if not any(mark in content for mark in marks):
            files.append(replace(
                file, filename=file.filename[:100] or "attachment",
                content_type=NO_BYTES.sub("application/octet-stream", file.content_type)))
    if sum(len(file.content or b"") for file in files) > MAX_ANSWER:
        raise Refused(413, f"its attachments are over {MAX_ANSWER >> 20} MB together")
    return files


def draft_answer(db: DB, now: int, account: Row, ticket: Row, to: str, text: str,
                 files: Iterable[Attachment] = ()) -> Message:
    """A mail of the team to somebody, in reply to the last that came from there.

    Of another's not even the id goes into its headers: it may be a notice that came back,
    whose id is what an answer is known by.
    """
    ancestors: list[str] = []
    for parent in db.execute("""SELECT message_id, "references" FROM message
            WHERE ticket = ? AND direction = 'in' AND from_address = ?
            ORDER BY id DESC LIMIT 1""", [ticket["id"], to]):
        ancestors = [*json.loads(parent["references"]), parent["message_id"]]
    subject = re.sub(r"^(?:re:\s*)+", "", ticket["subject"], flags=re.I)[:200]
    return draft_mail(account, now, to, {}, text=text, files=files, ancestors=ancestors,
                      subject=f"[{ticket['reference']}] Re: {subject}")


def send_reply(db: DB, now: int, account: Row, ticket: Row, to: str, text: str) -> Message:
    """Answer from the command line."""
    draft = draft_answer(db, now, account, ticket, to, text)
    row = send_later(db, now, ticket, draft, "reply")
    team_wrote(db, now, account, ticket, row, draft, "answer from the command line")
    return draft


def team_wrote(db: DB, now: int, account: Row, ticket: Row, row: int, message: Message,
               reason: str, is_closing: bool = False) -> None:
    """Say so on the ticket, and tell the others, so that nobody answers twice."""
    db.execute("""UPDATE ticket SET last_writer = 'team', updated_at = ?,
        status = iif(?, 'closed', status) WHERE id = ?""", [now, is_closing, ticket["id"]])
    tell(db, now, account, ticket, row, message, [f"{reason}:"])


def tell(db: DB, now: int, account: Row, ticket: Row, row: int, message: Message,
         words: list[str]) -> None:
    """Put a notice of message `row` into the outbox for each of the team.

    Not for who wrote it, nor for the requester, who is no team on a ticket of their own.
    """
    involved = {mailbox_key(message.from_address), mailbox_key(ticket["requester"])}
    author, us = message.from_name or message.from_address, account["display_name"]
    notice = notice_text(db, ticket, row, message, words)
    for mailbox, address in staff_of(db, account).items():
        if mailbox in involved:
            continue
        purpose, text = "notice", notice
        if sent_lately(db, now, "notice", mailbox) >= account["notices_per_hour"]:
            purpose, text = "summary", SUMMARY.format(account["notices_per_hour"])
            if sent_lately(db, now, "summary", mailbox):
                continue
        with contextlib.suppress(Refused):      # no notice is worth the message
            send_later(db, now, ticket, draft_mail(
                account, now, address, NOTICE | {TOLD: ticket["reference"]}, text=text,
                name=f"{author[:60]} via {us or account['address']}",
                subject=f"[{ticket['reference']}] {ticket['subject'][:200]}",
                ancestors=mails_about(db, ticket, mailbox, ["notice"], 10)), purpose, row)


def notice_text(db: DB, ticket: Row, row: int, message: Message, words: list[str]) -> str:
    """A message's text between lines of ours, each short enough to be quoted unbroken."""
    for file in db.execute("SELECT * FROM attachment WHERE message = ? ORDER BY id", [row]):
        # The name begins no line, and is in no command: a stranger wrote it.
        words.append(f"{file['filename'][:40]!r}, {file['size']} bytes {file['note']}")
        words.append(f"inbound attachment {file['id']} FILE")
    if len(message.text) > MAX_TOLD:
        words.append(f"the whole text: inbound show {ticket['reference']}")
    first, *last = [
        textwrap.fill(each, 68, initial_indent=PREFIX, subsequent_indent=PREFIX)
        for each in [*words, HOW_TO_ANSWER.format(**ticket)]]
    text = message.text[:MAX_TOLD].replace(PREFIX.strip(), "[ inbound]").rstrip()
    return "\n".join([first, "", text, "", *last, ""])


# -----------------------------------------------------------------------------------------
# Outbox: claim, deliver, settle. The states stand in schema.sql. A mail is sent when the
# relay said 250 and that is committed: a crash between the two repeats it, with the same
# Message-ID, and never loses it.

def claim(db: DB, now: int, account: Row) -> Any:
    """Lease the account's next due row for LEASE seconds; None if nothing is due."""
    values = {"now": now, "lease": now + LEASE, "far": now + 2 * MAX_WAIT,
              "give_up": GIVE_UP, **account}
    db.execute("""UPDATE outbox SET state = 'queued' WHERE state = 'sending'
        AND email_account = :id AND next_attempt_at NOT BETWEEN :now + 1 AND :lease""",
               values)
    db.execute("""UPDATE outbox SET state = 'failed', next_attempt_at = NULL,
        last_error = 'not delivered in 24 h; '
            || iif(last_error = '', 'no smtp_host was set', last_error)
        WHERE +state = 'queued' AND next_attempt_at IS NOT NULL
        AND created_at <= :now - :give_up AND give_up_at <= :now""", values)
    # What is due far later than we ever wait is due now: the clock was set back.
    db.execute("""UPDATE outbox SET next_attempt_at = :now WHERE state = 'queued'
        AND email_account = :id AND next_attempt_at > :far""", values)
    return db.execute("""UPDATE outbox
        SET state = 'sending', attempts = attempts + 1, next_attempt_at = :lease
        WHERE id = (SELECT id FROM outbox WHERE state = 'queued' AND email_account = :id
            AND next_attempt_at <= :now
            AND :smtp_host = (SELECT smtp_host FROM email_account WHERE id = :id)
            ORDER BY next_attempt_at, id LIMIT 1)
        RETURNING *, iif(purpose IN ('reply', 'answer'), :address,
            ifnull(:confirmation_envelope_from, '')) AS envelope_from""", values).fetchone()


def settle(db: DB, now: int, row: Row, state: str, error: str) -> None:
    """Record what became of a claimed row, unless its lease ran out and another has it."""
    wait = min(MAX_WAIT, FIRST_WAIT * 2 ** min(row["attempts"] - 1, 10))
    due = now + wait * (75 + secrets.randbelow(51)) // 100
    db.execute("""UPDATE outbox SET state = :state, last_error = :error,
        next_attempt_at = iif(:state = 'queued', :due, NULL)
        WHERE id = :id AND state = 'sending' AND attempts = :attempts""", {
            **row, "state": state, "error": error, "due": due})


def send_due(store: Store) -> Counter[str]:
    """Deliver all that is due; return a Counter of outcomes."""
    return Counter(
        state for account in store.accounts() for state in send_for(store, account))


def send_for(store: Store, account: Row) -> Iterator[str]:
    """Deliver what is due of one account, in one session; yield the state of each."""
    with contextlib.closing(Relay(account)) as relay:
        while row := store.write(claim, account):       # nothing due: nothing is written
            state, error = relay.deliver(row)
            log.info("outbox %d to %s %s: %s",
                     row["id"], row["recipient"], state, printable(error))
            settle_for_sure(store, row, state, error)
            yield state
            if relay.smtp is None:      # one try at a look, not one a row
                break


def settle_for_sure(store: Store, row: Row, state: str, error: str) -> None:
    """Settle before the next claim: the mail has left, and no lock may make us forget it.

    After LEASE the row is anybody's again.
    """
    ends = time.monotonic() + LEASE
    while time.monotonic() < ends:
        with contextlib.suppress(Refused):
            store.write(settle, row, state, error)
            return
        time.sleep(0.2)


@dataclass
class Relay:
    """An SMTP session with an account's relay, opened with the first mail of a burst."""

    account: Row
    smtp: Any = None

    def deliver(self, row: Row | None) -> tuple[str, str]:
        """Return (state, error): sent, failed (5xx for it), queued (all that may pass).

        A session that cannot be used any more is closed: `smtp` is None again. Without a
        row it is opened, and that is all.
        """
        is_ready = False
        # smtplib has no deadline in all: a server that drips bytes would hold us for ever.
        watchdog = threading.Timer(DELIVERY, self.abort)
        watchdog.daemon = True
        watchdog.start()
        try:
            if self.smtp is None:
                self.connect()
            if not watchdog.is_alive():     # it could not cut short what DNS took
                raise TimeoutError(f"no session within {DELIVERY} s")
            is_ready = True
            if row:
                self.smtp.sendmail(row["envelope_from"], [row["recipient"]], row["content"])
            return "sent", ""
        except smtplib.SMTPRecipientsRefused as error:
            [(code, words)] = error.recipients.values()
        except (OSError, ValueError) as error:      # SMTPException is an OSError
            code = getattr(error, "smtp_code", 0)
            words = getattr(error, "smtp_error", (str(error) or repr(error)).encode())
        finally:
            watchdog.cancel()
        text = one_line(f"{code or ''} {decode(words, None)}")[:300]
        # RFC 5321 4.2.1: 5yz is permanent, 4yz may pass; 3.8: a 421 ends the session.
        if is_ready and code not in (0, 421):
            if self.smtp.sock is None:      # it hung up after that
                self.close()
            return "failed" if code >= 500 else "queued", text
        # A wrong password is not this mail's fault: it waits for the admin, or the network.
        self.close()
        return "queued", f"cannot use the relay {self.account['smtp_host']}: {text}"

    def connect(self) -> None:
        """Open the session that the account asks for. Certificates are verified."""
        account = self.account
        host, security = account["smtp_host"], account["smtp_security"]
        # Reading all certificates takes 20 ms.
        context = None if security == "none" else ssl.create_default_context()
        # The name is for EHLO: smtplib would ask DNS for one, which may take longer than
        # the delivery. Made before it connects: the watchdog finds the socket in it.
        self.smtp = (TerseSMTPS if security == "tls" else TerseSMTP)(
            local_hostname=account["address"].rpartition("@")[2], timeout=DELIVERY)
        self.smtp.context = context     # `tls` checks the certificate by it …
        self.smtp._host = host          # … and both kinds check it against this name
        port = account["smtp_port"] or {"none": 25, "starttls": 587, "tls": 465}[security]
        code, words = self.smtp.connect(host, port)
        if code != 220:
            raise smtplib.SMTPConnectError(code, words)
        self.smtp.ehlo_or_helo_if_needed()
        if security == "starttls":
            self.smtp.starttls(context=context)
        if account["smtp_username"] is not None:    # the schema forbids it without TLS
            self.smtp.login(account["smtp_username"], account["smtp_password"] or "")

    def abort(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.smtp.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Say QUIT, whatever comes back: every mail is settled by now."""
        with contextlib.suppress(OSError, AttributeError), contextlib.closing(self.smtp):
            self.smtp.sock.settimeout(2)
            self.smtp.quit()
        self.smtp = None


class TerseSMTP(smtplib.SMTP):
    """smtplib's session, which keeps each line of an endless reply; here one has an end."""

    def getreply(self) -> tuple[int, bytes]:
        if self.file is None:
            self.file = self.sock.makefile("rb")     # type: ignore[union-attr]
        reply = b""
        while len(reply) < MAX_REPLY:
            line = self.file.readline(MAX_REPLY)
            if not line[:3].isdigit():
                break
            reply += line[4:]
            if line[3:4] != b"-":
                return int(line[:3]), reply
        self.close()
        raise smtplib.SMTPServerDisconnected("it hung up, or what it said is no reply")


class TerseSMTPS(TerseSMTP, smtplib.SMTP_SSL):
    pass


# -----------------------------------------------------------------------------------------
# Serve: waitress in front, for which one thread does the work, the courier beside.

GREETING = """A new database. Whoever posts mail has to know this secret:\n\n  {secret}\n
Paste this into your provider's inbound webhook, with your own https host name in it:\n
  {url}?secret={secret}\n\nTry it:\n
  curl {at}-H 'X-Mobieus-Inbound-Secret: {secret}' \
-H 'Content-Type: application/json' {url} \\
    -d '{{"from": "ada@example.org", "text": "It works.", \
"message_id": "<first@example.org>"}}'
"""
LISTENING = "listening: {at}{url} (`inbound secret` prints the secret)"
ANEW = signal.SIGUSR1       # ends the server as a failure, so that it is started anew


def serve(store: Store, *, listen: str = "127.0.0.1:8080",
          trusted_proxy: str = TRUSTED_PROXY) -> None:
    """inbound serve [--listen 127.0.0.1:8080 | unix:/path] [--trusted-proxy ADDRESS]

    Make the database if there is none, answer the endpoint, and send the outbox.

    The socket at unix:/path is for its owner and group. --trusted-proxy is the address of
    the proxy whose X-Forwarded-For names the client, or localhost: a socket's other end.
    """
    keep_no_memory()
    have_descriptors()
    dispatcher = Dispatcher(store)
    try:
        if trusted_proxy not in ("", "localhost"):
            ipaddress.ip_address(trusted_proxy)
        store.trusted_proxy = trusted_proxy
        server = create_server(store, dispatcher, listen)
    except (OSError, ValueError) as error:
        raise Refused(503, f"cannot listen on {listen!r}: {error}")
    for number in (signal.SIGTERM, signal.SIGINT, ANEW):    # SystemExit: what began ends
        signal.signal(number, lambda number, _: sys.exit(number == ANEW))
    stopping = threading.Event()
    courier = threading.Thread(target=run_courier, args=(store, stopping), daemon=True)
    try:
        # It listens before it opens: a taken port shall not use up the greeting.
        greeting = GREETING if store.open() else LISTENING
        start_log(store.path)
        courier.start()
        greet(greeting, listen, server, store.accounts()[0]["inbound_secret"])
        notify("READY=1")
        dispatcher.start()
        while not stopping.wait(1):     # a signal ends it: this thread alone gets those,
            pass                        # and one just before it falls asleep a second late
    finally:
        notify("STOPPING=1")
        if listen.startswith("unix:"):  # first: while we listen it is nobody else's
            Path(listen[5:]).unlink(missing_ok=True)
        dispatcher.shutdown()
        stopping.set()
        store.has_mail.set()
        server.close()
        if courier.is_alive():      # what it is sending is sent again when its lease ends
            courier.join(LOOK)


def create_server(store: Store, dispatcher: Dispatcher, listen: str) -> Any:
    """waitress, listening, for `dispatcher` to read what comes; OSError, ValueError."""
    import waitress  # the only verb that needs it
    server = waitress.create_server(
        make_app(store), map=dispatcher.sockets, _dispatcher=dispatcher, **place_of(listen),
        channel_timeout=30, cleanup_interval=5,
        # Two descriptors each, with a body: waitress logs without end of who gets none.
        connection_limit=min(1000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 3),
        # Of tiny requests many are read at once, and all wait: no more than its default.
        recv_bytes=2**13, max_request_header_size=16384,
        inbuf_overflow=2**16,       # past it a body is on disk; any stranger sends one
        max_request_body_size=MAX_BODY + 1, clear_untrusted_proxy_headers=False)
    server.adj.send_bytes = 200     # over any header: an answer goes out whole
    dispatcher.poll = waitress.wasyncore.poll2
    return server


def keep_no_memory() -> None:
    """Have glibc give back what a large mail took, and keep one heap for all threads.

    mallopt(3): a block once freed raises M_MMAP_THRESHOLD; M_ARENA_MAX is 8 a core.
    """
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**17)
        libc.mallopt(-8, 1)


def have_descriptors() -> None:
    """Raise the soft limit: 1,000 connections, the files of their bodies, the database."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(hard, max(soft, DESCRIPTORS))
    with contextlib.suppress(ValueError):       # where it is forbidden
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def place_of(listen: str) -> Row:
    """--listen as waitress takes it; OSError where another server listens on the socket.

    What a dead one left there waitress replaces. It would a live one's, too.
    """
    if not listen.startswith("unix:"):
        port = listen.rpartition(":")[2]    # of a larger one getaddrinfo(3) takes a part
        if not port.isdecimal() or int(port) > 65535:
            raise ValueError("expected HOST:PORT with a port up to 65535, or unix:/path")
        return {"listen": listen}
    path = listen[5:]
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as client:
        client.settimeout(1)
        try:
            client.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return {"unix_socket": path, "unix_socket_perms": "660"}
    raise OSError("another server listens there")


def greet(greeting: str, listen: str, server: Any, secret: str) -> None:
    """Print where mail is posted to, as arguments of curl."""
    port = getattr(server, "effective_port", None) or server.effective_listen[0][1]
    at, host = "", f"{listen.rpartition(':')[0]}:{port}"
    if listen.startswith("unix:"):
        at, host = f"--unix-socket {shlex.quote(listen[5:])} ", "localhost"
    url = f"http://{host}{ENDPOINT}"
    print(greeting.format(at=at, url=url, secret=secret), flush=True)


def notify(state: str) -> None:
    """Tell systemd, where it asks for it (sd_notify(3)), that we are ready or stopping."""
    address = re.sub("^@", "\0", os.environ.get("NOTIFY_SOCKET", ""))
    if address:
        with (contextlib.suppress(OSError),
              socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd):
            systemd.sendto(state.encode(), address)


class Dispatcher:
    """In the place of waitress's: of its threads one leads, the others stand by.

    Threads that work at once gain nothing in Python and fight for the interpreter. Who
    leads reads what has come, brings it as far as its commit, has all of it committed by
    one sync, answers each, and reads again. Another takes the lead where it is away from
    the sockets for long, as for a lock. (Leader/Followers: Schmidt, POSA 2.) Large posts
    are served beside, one by one.
    """

    def __init__(self, store: Store):
        self.store = store
        self.sockets: Row = {}                  # waitress's, by descriptor …
        self.poll: Callable[[float, Row], Any]  # … and what reads them, and calls add_task
        self.waiting: deque[Any] = deque()      # of them the channels with a request …
        self.large: queue.SimpleQueue[Any] = queue.SimpleQueue()    # … with a large one
        self.changed = threading.Condition()
        self.leader: threading.Thread | None = None
        self.left_at = 0.0                      # monotonic; inf = it is at the sockets
        self.is_watched = False                 # whether a thread looks if it is away
        self.is_over = False
        self.next = threading.Lock()            # of who watches, while the rest sleeps
        self.threads = [threading.Thread(target=self.run, args=[work], daemon=True)
                        for work in (self.serve_large, *THREADS * [self.follow])]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def add_task(self, channel: Any) -> None:
        """waitress has read a request, which is the first of `channel.requests`."""
        if size_of(channel) > LARGE:
            self.large.put(channel)
        else:
            self.waiting.append(channel)

    def run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:       # of the poll: nobody would read any more
            log.critical("ending, to start anew", exc_info=True)
            os.kill(os.getpid(), ANEW)

    def serve_large(self) -> None:
        """Serve large posts in their turn: of many none takes a thread from the quick."""
        for channel in iter(self.large.get, None):
            self.serve([channel])

    def follow(self) -> None:
        while self.stand_by():
            while self.lead():
                pass

    def stand_by(self) -> bool:
        """Return True once it is this thread's turn to lead, False at the end."""
        with self.next, self.changed:
            while not self.is_over:
                patience = self.left_at + PATIENCE - time.monotonic()
                if patience <= 0:
                    self.leader, self.left_at = threading.current_thread(), math.inf
                    return True
                self.is_watched = patience < math.inf
                self.changed.wait(patience if self.is_watched else None)
                self.is_watched = False
        return False

    def lead(self) -> bool:
        """Read and serve once; return whether this thread leads still."""
        if not self.is_over:
            self.read()
        if group := self.take():
            with self.changed:
                self.left_at = time.monotonic()
                if not self.is_watched:
                    self.changed.notify()
            self.serve(group)
            with self.changed:
                if self.leader is not threading.current_thread():
                    return False
                self.left_at = math.inf
        return bool(self.waiting) or not self.is_over

    def read(self) -> None:
        """Wait for requests, then read what comes right behind: it shares their sync."""
        known = len(self.waiting)
        self.poll(0 if known else 1, self.sockets)
        until = time.monotonic() + LINGER
        while known < len(self.waiting) and time.monotonic() < until:
            known = len(self.waiting)
            self.poll(0, self.sockets)

    def take(self) -> list[Any]:
        """The channels that are to be served together."""
        group: list[Any] = []
        size = 0
        while self.waiting:
            size += size_of(self.waiting[0])
            if group and size > GROUP:
                break
            group.append(self.waiting.popleft())
        return group

    def serve(self, group: list[Any]) -> None:
        jobs: dict[Any, Job] = {}
        shared: Row = {}
        for channel in group:
            if job := self.begin(channel, shared):
                jobs[channel] = job
            else:
                self.answer(channel)
        if jobs:                # a commit of nothing would wait for the lock all the same
            self.store.commit([*jobs.values()])
        for channel in jobs:
            self.answer(channel)

    def answer(self, channel: Any) -> None:
        try:
            is_refused = channel.requests[0].error      # by waitress, which hangs up, too
            channel.service()
            if is_refused and not channel.total_outbufs_len:
                hang_up_slowly(channel)
            if channel.requests and channel.total_outbufs_len:  # a poll would not send it
                channel._flush_some_if_lockable(do_close=False)
        except Exception:       # waitress: a 100 Continue to who has hung up
            log.exception("while answering")

    def begin(self, channel: Any, shared: Row) -> Job | None:
        """Bring a request as far as it comes without a commit; return what it wants."""
        if channel.requests[0].error:       # waitress answers that itself
            return None
        task = channel.task_class(channel, channel.requests[0])

        def same_task(*_: Any) -> Any:
            del channel.task_class
            return task

        channel.task_class = same_task      # for channel.service(), which makes its own
        with contextlib.suppress(Exception):        # is raised, logged and answered there
            environ = task.get_environment()
            environ[SHARED] = shared
            progress = environ[PROGRESS] = Progress(answered(self.store, environ))
            return progress.job
        return None

    def shutdown(self) -> None:
        """Finish and send what has begun; at most for LOOK seconds."""
        with self.changed:
            self.is_over = True
            self.changed.notify_all()
        self.large.put(None)
        for each in [*self.sockets.values()]:       # wake who waits for requests
            if hasattr(each, "pull_trigger"):
                each.pull_trigger()
        ends = time.monotonic() + LOOK
        for thread in self.threads:
            if thread.is_alive():
                thread.join(max(0, ends - time.monotonic()))
        for each in [*self.sockets.values()]:
            if each.writable():
                each.handle_write()


def size_of(channel: Any) -> int:
    """Bytes of its request's body; one that is refused may have none."""
    return len(channel.requests[0].body_rcv or b"")


def hang_up_slowly(channel: Any) -> None:
    """Send no more, and read what is still sent, until the other end or a time-out closes.

    RFC 9112 9.6: a close with bytes unread is a reset, which overtakes the answer; of a
    413 a proxy would make a 502, and mail that is too large would come again for ever.
    """
    answered_at = channel.last_activity

    def discard(_: bytes) -> None:
        channel.last_activity = answered_at

    channel.received = discard
    channel.close_when_flushed = False
    with contextlib.suppress(OSError):      # it has hung up itself
        channel.socket.shutdown(socket.SHUT_WR)


def run_courier(store: Store, stopping: threading.Event) -> None:
    """Send what is due until `stopping` is set: at a commit, and every LOOK seconds.

    A thread for each account that has a relay: nobody waits for another's.
    """
    threads: dict[int, threading.Thread] = {}
    while not stopping.is_set():
        store.has_mail.clear()
        try:
            write_counts(store)
            for account in store.accounts():
                thread = threads.get(account["id"])
                if thread is None or not thread.is_alive():
                    threads[account["id"]] = threading.Thread(
                        target=deliver_for, args=(store, account), daemon=True)
                    threads[account["id"]].start()
        except Refused:
            pass            # said in the log by who tried to write
        except Exception:
            log.exception("the courier goes on after this")
        # SQLite answers "locking protocol" for good after a failed unlock: start anew.
        # But never for want of the file: a new process would make an empty one.
        since = store.failing_since or store.blind_since
        if since and time.monotonic() - since > HOPELESS and os.path.exists(store.path):
            log.critical("no read or no write for %d s: ending, to start anew", HOPELESS)
            os.kill(os.getpid(), ANEW)
        store.has_mail.wait(LOOK)


def deliver_for(store: Store, account: Row) -> None:
    try:
        if store.failing_since:     # still? Where nothing is due nothing else would tell
            store.write(rehearse)
        if "sent" in [*send_for(store, account)]:
            store.has_mail.set()    # it may have been set while we said QUIT
    except Refused as refusal:
        log.error("courier: %s", printable(refusal.reason))
    except Exception:
        log.exception("the courier goes on after this")


def write_counts(store: Store) -> None:
    """Keep what `doctor` shows of refused callers and of old secrets in use."""
    refusals, uses = [*store.uncounted], {**store.uses_of_previous}
    if refusals or uses:
        store.write(add_counts, refusals, uses)     # what it refuses is counted later
        store.uses_of_previous.clear()
    for _ in refusals:
        store.uncounted.popleft()


def add_counts(db: DB, now: int, refusals: list[Any], uses: dict[int, int]) -> None:
    db.executemany("""INSERT INTO refused_caller (last_at, client, posts)
        VALUES (?, substr(?, 1, 100), 1) ON CONFLICT (client)
        DO UPDATE SET posts = posts + 1, last_at = excluded.last_at""", refusals)
    db.execute("""DELETE FROM refused_caller WHERE client NOT IN (
        SELECT client FROM refused_caller ORDER BY last_at DESC LIMIT 1000)""")
    db.executemany("UPDATE email_account SET previous_secret_used_at = ? WHERE id = ?",
                   [(at, account) for account, at in uses.items()])


# -----------------------------------------------------------------------------------------
# Verbs: one function each, in the order of --help; `serve` stands above. It takes the
# store, the words behind its name, and its options by their names. It returns what is
# printed: a row or rows, or (that, the text that stands for it where nobody asked for
# JSON). Its docstring is its help, the first paragraph of that its usage.

def secret_show(store: Store, *, account: str = "") -> Any:
    """inbound secret show [--account ADDRESS] [--json]

    Print the secret that callers of the endpoint must know.
    """
    row = chosen_account(store, account)
    names = ("address", "inbound_secret", "previous_secret", "previous_secret_until")
    return {name: row[name] for name in names}, row["inbound_secret"]


def secret_set(store: Store, value: str, *, account: str = "") -> Any:
    """inbound secret set VALUE [--account ADDRESS] [--json]

    Set the secret; the one before ends at once.
    """
    if value != value.strip():
        raise Refused(400, "a secret has no space at its ends: a header would lose it")
    change_account(store, account, {"inbound_secret": value, "previous_secret": None})
    return secret_show(store, account=account)


def secret_rotate(store: Store, *, keep: str = "24h", account: str = "") -> Any:
    """inbound secret rotate [--keep 24h] [--account ADDRESS] [--json]

    Make a new secret; the old one stays valid for --keep, the one before that ends.
    """
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(keep[-1:])
    if not unit or not re.fullmatch("[0-9]{1,6}", keep[:-1]):
        raise Usage("--keep is a number and s, m, h or d, like 24h")
    change_account(store, account, {
        "previous_secret": chosen_account(store, account)["inbound_secret"],
        "previous_secret_until": store.now() + int(keep[:-1]) * unit,
        "previous_secret_used_at": None, "inbound_secret": new_secret()})
    return secret_show(store, account=account)


def change_account(store: Store, account: str, values: Row) -> None:
    store.write(update_account, values | {"id": chosen_account(store, account)["id"]})


def update_account(db: DB, now: int, values: Row) -> None:
    staff = staff_of(db, {"staff": None, **values})
    for each in ADDRESSES(values.get("staff") or ""):
        if mailbox_key(deliverable(each)) not in staff:
            raise Refused(400, f"nobody can be told at {each!r}: expected an address that "
                               "we can write to, and none that is our own")
    envelope_from = values.get("confirmation_envelope_from")
    if envelope_from and "@" not in envelope_from:
        raise Refused(400, "confirmation_envelope_from is an address, or empty for <>")
    for name in ("smtp_username", "smtp_password"):
        if not (values.get(name) or "").isascii():
            raise Refused(400, f"{name} is ASCII: Python's smtplib sends nothing else")
    if "queue" in values:       # a name that is new makes a queue
        values = values | db.execute("""INSERT INTO queue (name) VALUES (?)
            ON CONFLICT (name) DO UPDATE SET is_default = is_default RETURNING id AS queue
            """, [values["queue"] or ""]).fetchone()
    columns = ", ".join(f"{name} = :{name}" for name in values)
    db.execute(f"UPDATE email_account SET {columns} WHERE id = :id", values)


def run_one(db: DB, now: int, statement: str, parameters: Any) -> list[Row]:
    """The rows that one statement returns, as work for the writer."""
    return db.execute(statement, parameters).fetchall()


def chosen_account(store: Store, address: str) -> Row:
    """The account of --account, else the default one; queue by name, password hidden."""
    store.accounts()        # or Refused: there is none
    return one_of(store.rows("""SELECT email_account.*, queue.name AS queue,
        iif(smtp_password IS NULL, NULL, '(set)') AS smtp_password FROM email_account
        JOIN queue ON queue.id = email_account.queue WHERE ifnull(address = ?, 1)
        ORDER BY email_account.is_default DESC, email_account.id""", [address or None]),
        f"account {address!r}: see `inbound account list`")


def one_of(rows: list[Row], what: str) -> Row:
    if not rows:
        raise Refused(404, f"there is no {what}")
    return rows[0]


def account_list(store: Store) -> Any:
    """inbound account list [--json]

    List the accounts, the default one first.
    """
    return store.rows("""SELECT address, display_name, smtp_host FROM email_account
        ORDER BY is_default DESC, id""")


def account_show(store: Store, *, account: str = "") -> Any:
    """inbound account show [--account ADDRESS] [--json]

    Print an account's settings, as `account set` takes them.
    """
    return {name: value for name, value in chosen_account(store, account).items()
            if name != "id" and "_secret" not in name}


def account_add(store: Store, address: str) -> Any:
    """inbound account add ADDRESS [--json]

    Add an account, with a secret and so a URL of its own.
    """
    return store.write(run_one, """INSERT INTO email_account (address, inbound_secret,
        queue) SELECT ?, ?, id FROM queue ORDER BY is_default DESC, id LIMIT 1
        RETURNING address, inbound_secret""", [address, new_secret()])[0]


def account_set(store: Store, setting: str, *more: str, account: str = "") -> Any:
    """inbound account set KEY=VALUE ... [--account ADDRESS] [--json]

    Change settings and print them; an empty VALUE unsets one.
    """
    known = account_show(store, account=account)
    values: Row = {}
    for each in (setting, *more):
        name, equals, value = each.partition("=")
        if not equals or name not in known:
            raise Usage(f"{name!r} is no setting{nearest(name, known)}: expected KEY=VALUE "
                        f"with a KEY of {', '.join(known)}")
        values[name] = value or None
    change_account(store, account, values)
    changed = account_show(store, account=values.get("address", account))
    return {name: changed[name] for name in values}


STATUSES = {"open": "status = 'open'", "closed": "status = 'closed'", "all": "true",
            "waiting": "status = 'open' AND last_writer = 'customer'"}


def tickets(store: Store, status: str = "open", *, search: str = "", limit: int = 50,
            account: str = "", **equal: str) -> Any:
    """inbound tickets [open|waiting|closed|all] [--queue NAME] [--from ADDRESS]
    [--search WORDS] [--limit 50] [--account ADDRESS] [--json]

    List tickets, those with the latest message first; --limit 0 lists all. Waiting are open
    ones whose customer wrote last.
    """
    if status not in STATUSES:
        raise Usage(f"{status!r} is no status")
    asked = {"words": search.split(), "limit": limit, "queue": None, **equal,
             "account": account and chosen_account(store, account)["id"]}
    where = STATUSES[status]
    if "from" in asked:
        where += " AND requester = :from"
    return store.rows(f"""SELECT reference, queue.name AS queue, status, subject, requester,
        (SELECT count(*) FROM message WHERE message.ticket = ticket.id) AS messages,
        last_writer, created_at, updated_at
        FROM ticket CROSS JOIN queue ON queue.id = ticket.queue
        WHERE {where} AND :account IN (email_account, '')
        AND queue.name = ifnull(:queue, queue.name)
        AND NOT EXISTS (SELECT 1 FROM json_each(:words) WHERE NOT EXISTS (
            SELECT 1 FROM message WHERE message.ticket = ticket.id
            AND instr(lower(from_address || ' ' || subject || ' ' || text), lower(value))))
        ORDER BY updated_at DESC, ticket.id DESC LIMIT :limit""", asked)


MESSAGE = """SELECT direction, message_id, in_reply_to, "references",
    from_address AS "from", from_name, envelope_from, "to", cc, subject, text, html,
    headers, kind, reason, confirmation, notes, received_at FROM message WHERE id = ?"""
MESSAGE_HEAD = "\n--- {direction} {received_at} {from_name} <{from}> {kind}\n    {reason}\n"
ATTACHMENT_LINE = "    attachment {id}: {filename} ({content_type}, {size} bytes) {note}\n"


def show(store: Store, reference: str, *, last: int = -1) -> Any:
    """inbound show REF [--last N] [--json]

    Print a ticket: its messages, and why each was treated as it was.
    """
    ticket = ticket_of(store, reference)
    names = ("reference", "queue", "status", "subject", "requester")
    text = "{reference} ({status}, {queue}): {subject} <{requester}>".format(**ticket)
    return {name: ticket[name] for name in names}, text, messages_of(store, ticket, last)


def messages_of(store: Store, ticket: Row, last: int) -> Iterator[tuple[Row, str]]:
    """(object, text) of each message of a ticket, one by one: there may be thousands."""
    ids = store.rows("SELECT id FROM message WHERE ticket = ? ORDER BY id DESC LIMIT ?", [
        ticket["id"], last])
    for row in reversed(ids):
        for message in store.rows(MESSAGE, [row["id"]]):    # none: it was just erased
            for name in ("references", "to", "cc", "headers", "notes"):
                message[name] = json.loads(message[name])
            message["attachments"] = store.rows("""SELECT id, filename, content_type,
                content_id, size, sha256, note FROM attachment WHERE message = ?
                ORDER BY id""", [row["id"]])
            text = MESSAGE_HEAD.format(**readable(message))
            for note in message["notes"]:
                text += f"    note: {note}\n"
            for each in message["attachments"]:
                text += ATTACHMENT_LINE.format(**each)
            yield message, f"{text}\n{message['text'].rstrip()}"


def ticket_of(store: Store, reference: str) -> Row:
    return one_of(store.rows("""SELECT ticket.*, queue.name AS queue FROM ticket
        JOIN queue ON queue.id = ticket.queue WHERE reference = ?""", [reference.upper()]),
        f"ticket {reference!r}: see `inbound tickets all`")


def attachment(store: Store, identifier: str, file: str = "") -> None:
    """inbound attachment ID [FILE]

    Write an attachment to FILE, never over an existing one, or to standard output.
    """
    row = one_of(store.rows("SELECT * FROM attachment WHERE id = ?", [identifier]),
                 f"attachment {identifier!r}: see `inbound show REF`")
    if row["content"] is None:
        raise Refused(404, f"attachment {identifier} was {row['note']}")
    with open(file, "xb") if file else contextlib.nullcontext(sys.stdout.buffer) as output:
        output.write(row["content"])


def reply(store: Store, reference: str, *, to: str = "") -> Any:
    """inbound reply REF [--to ADDRESS] [--json]

    Answer the requester, or --to, with the text on standard input.
    """
    ticket = ticket_of(store, reference)
    text = clean(decode(sys.stdin.buffer.read(), None))
    if not text.strip():
        raise Refused(400, "the reply is empty: expected its text on standard input")
    account = store.accounts(ticket["email_account"])[0]
    last = store.rows("""SELECT from_address AS author FROM message WHERE ticket = ?
        AND direction = 'in' ORDER BY id DESC LIMIT 1""", [ticket["id"]])
    draft = store.write(send_reply, account, ticket, to or ticket["requester"], text)
    [recipient] = draft.to
    author = last[0]["author"] if last else recipient       # none: it was erased
    if mailbox_key(author) != mailbox_key(recipient):
        print(f"inbound: {author} wrote last, this goes to {recipient}", file=sys.stderr)
    return {"reference": ticket["reference"], "to": recipient,
            "message_id": draft.message_id}


def close(store: Store, reference: str) -> Any:
    """inbound close REF [--json]

    Close a ticket; a reply of its requester opens it again.
    """
    return set_status(store, reference, "closed")


def reopen(store: Store, reference: str) -> Any:
    """inbound reopen REF [--json]

    Open a closed ticket.
    """
    return set_status(store, reference, "open")


def set_status(store: Store, reference: str, status: str) -> Row:
    ticket = ticket_of(store, reference)
    return store.write(run_one, """UPDATE ticket SET status = ?, updated_at = ? WHERE id = ?
        RETURNING reference, status""", [status, store.now(), ticket["id"]])[0]


def relay(store: Store, url: str, *, sender: str | None = None,
          secret_file: str = "inbound.secret") -> None:
    """inbound relay URL [--sender ADDRESS] [--secret-file inbound.secret]

    Post the mail on standard input; for Postfix, Exim and OpenSMTPD.

    The envelope sender is --sender or $SENDER, the secret $INBOUND_SECRET or in
    --secret-file. Exit (sysexits.h) 0: stored. 75: try again. 77: wrong secret. 65: never
    accepted.
    """
    mail = MBOX.sub(b"", sys.stdin.buffer.read(), 1)
    sender = os.environ.get("SENDER") if sender is None else sender
    if sender is not None:
        mail = os.fsencode(f"Return-Path: <{sender.strip('<>')}>\r\n") + mail
    code = 75
    try:
        secret = os.environ.get("INBOUND_SECRET") or Path(secret_file).read_text()
        status, words = post_to(url, mail, secret.strip().partition("\n")[0])
        # An answer without either is somebody else's page.
        if status == 413 or at(words, "status" if status == 200 else "error"):
            code = {200: 0, 401: 77, 400: 65, 413: 65, 415: 65, 422: 65}.get(status, 75)
    except (OSError, ValueError, http.client.HTTPException) as error:
        # Without the name of the file, which might be a secret that was given in its place.
        words = (f"{getattr(error, 'strerror', None) or error}: expected an http(s) URL, "
                 "and the secret in $INBOUND_SECRET or --secret-file")
    print(words.strip(), file=sys.stderr if code else sys.stdout)
    raise SystemExit(code)


def post_to(url: str, mail: bytes, secret: str,
            agent: str = "inbound relay") -> tuple[int, str]:
    """POST a mail; return (HTTP status, answer)."""
    opener = urllib.request.OpenerDirector()    # has no handler for redirects and proxies
    for handler in (urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
                    urllib.request.UnknownHandler):
        opener.add_handler(handler())
    request = urllib.request.Request(url, mail, {
        "Content-Type": "message/rfc822", "X-Mobieus-Inbound-Secret": secret,
        "User-Agent": agent})
    with opener.open(request, timeout=60) as response:
        return response.status, decode(response.read(), None)


OUTBOX = """SELECT outbox.id, reference AS ticket, recipient AS "to", state, attempts,
    next_attempt_at, last_error, content FROM outbox
    JOIN message ON message.id = outbox.message JOIN ticket ON ticket.id = message.ticket"""


def outbox_list(store: Store, *, limit: int = 500) -> Any:
    """inbound outbox list [--limit 500] [--json]

    List mail on its way out, the latest last.
    """
    return store.rows(f"""SELECT id, ticket, "to", state, attempts, next_attempt_at,
        last_error FROM ({OUTBOX} ORDER BY outbox.id DESC LIMIT ?) ORDER BY id""", [limit])


def outbox_show(store: Store, identifier: str) -> Any:
    """inbound outbox show ID [--json]

    Print a mail as it goes out.
    """
    row = one_of(store.rows(f"{OUTBOX} WHERE outbox.id = ?", [identifier]),
                 f"mail {identifier!r}: see `inbound outbox`")
    row["content"] = decode(row["content"], None)
    return row, row["content"]


def outbox_send(store: Store) -> Any:
    """inbound outbox send [--json]

    Send what is due now; for cron, where another server than `serve` runs the app.
    """
    return dict(send_due(store)) or ({}, "nothing is due")


def outbox_retry(store: Store, which: str) -> Any:
    """inbound outbox retry ID|all [--json]

    Make a mail due now, or all that failed.
    """
    meant = "state = 'failed'" if which == "all" else "id = :which"
    rows = store.write(run_one, f"""UPDATE outbox SET state = 'queued',
        next_attempt_at = :now, give_up_at = :now + :wait WHERE {meant}
        AND (state IN ('queued', 'failed') OR state = 'sending' AND next_attempt_at <= :now)
        RETURNING id, state""", {"now": store.now(), "wait": GIVE_UP, "which": which})
    if not rows and which != "all":
        raise Refused(404, f"mail {which} is {outbox_show(store, which)[0]['state']}")
    return rows or ([], "nothing has failed")


def rejected_list(store: Store, *, limit: int = 500) -> Any:
    """inbound rejected list [--limit 500] [--json]

    List posts that could not become a message, the latest last.
    """
    return store.rows("""SELECT id, received_at, status, reason, content_type,
        length(body) AS size FROM rejected ORDER BY id DESC LIMIT ?""", [limit])[::-1]


def rejected_show(store: Store, identifier: str) -> Any:
    """inbound rejected show ID [--json]

    Print a post as it is kept, secrets starred out.
    """
    row = rejected_row(store, identifier)
    return row | {"body": decode(row["body"], None), "size": len(row["body"])}


def rejected_row(store: Store, identifier: str | int) -> Row:
    return one_of(store.rows("SELECT * FROM rejected WHERE id = ?", [identifier]),
                  f"rejected post {identifier!r}: see `inbound rejected`")


def rejected_replay(store: Store, identifier: str = "") -> Any:
    """inbound rejected replay [ID] [--json]

    Post kept bodies again, from inside; drop a row once all of it is stored.
    """
    if identifier:
        rows = [rejected_row(store, identifier)]
    else:
        rows = store.rows("SELECT id FROM rejected ORDER BY id")
    return [replay(store, row["id"]) for row in rows] or ([], "nothing was rejected")


def replay(store: Store, identifier: int) -> Row:
    try:
        row = rejected_row(store, identifier)       # or it was replayed or deleted just now
        post = post_from_inside(store, row["email_account"], row["content_type"],
                                row["body"], row["received_at"])
        _, answer = Progress(receive(store, post)).finish(store)
        outcomes = {item["status"] for item in answer.get("messages", [answer])}
        if outcomes <= {"created", "appended", "duplicate"}:
            store.write(run_one, "DELETE FROM rejected WHERE id = ?", [identifier])
    except Refused as refusal:
        answer = {"status": "refused", "reason": refusal.reason}
    return {"id": identifier, **answer}


def post_from_inside(store: Store, account: int | None, content_type: str,
                     body: bytes = b"", received_at: int = 0) -> Post:
    """A post for an account; for the default one, where that is gone."""
    accounts = store.accounts(account)
    own = [account["address"] for account in accounts]
    return Post(accounts[0], own, content_type, body, received_at)


def rejected_delete(store: Store, identifier: str) -> Any:
    """inbound rejected delete ID [--json]

    Delete a kept post.
    """
    row = rejected_row(store, identifier)
    return store.write(run_one, "DELETE FROM rejected WHERE id = ? RETURNING id, reason", [
        row["id"]])[0]


def import_(store: Store, path: str, *, account: str = "") -> Any:
    """inbound import PATH [--account ADDRESS] [--json]

    Bring in an mbox, a Maildir (its folders cur and new) or one mail: as if posted, with
    the mails' own dates, and confirming nothing. What is there already is not stored
    again: run it once more to go on where it ended.
    """
    post = post_from_inside(store, chosen_account(store, account)["id"], IMPORTED)
    found = [*Path(path).glob("cur/[!.]*"), *Path(path).glob("new/[!.]*")]
    files = [*filter(Path.is_file, found)] or [Path(path)]
    if files[0].is_dir():
        raise Refused(404, f"{path!r} is a folder without mails in `cur` and `new`")
    size = sum(file.stat().st_size for file in files) or 1
    outcomes = ("created", "appended", "duplicate", "quarantined", "too_large")
    counts = dict.fromkeys(outcomes, 0)
    done = 0
    with progress_bar(lambda: done / size):
        for group in groups_of(files):
            begun = [Progress(receive(store, replace(post, body=mail)))
                     for mail in group if len(mail) <= MAX_BODY]
            counts["too_large"] += len(group) - len(begun)
            store.commit([progress.job for progress in begun if progress.job])
            for progress in begun:
                counts[progress.finish(store)[1]["status"]] += 1
            done += sum(map(len, group))
    return counts


def groups_of(files: list[Path]) -> Iterator[list[bytes]]:
    """The mails of all files, as many as share a commit: each takes pages of the -wal."""
    group: list[bytes] = []
    size = 0
    for file in sorted(files, key=lambda file: file.name):      # begins with the time
        for mail in filter(bytes.strip, mails_in(file)):
            group.append(mail)
            size += len(mail)
            if size > GROUP:
                yield group
                group, size = [], 0
    yield group


# With a time: some programs leave a `From ` in a text as it is.
FROM_LINE = re.compile(b"From .{,300}[0-9]:[0-9][0-9]")


def mails_in(file: Path) -> Iterator[bytes]:
    """Each mail of an mbox (mboxrd), or the one that a file is; cut off past MAX_BODY."""
    with open(file, "rb") as lines:
        line = lines.readline(1000)
        if not FROM_LINE.match(line):
            yield line + lines.read(MAX_BODY)
            return
        mail = bytearray()
        while line:
            line = lines.readline(MAX_BODY)
            if not line or FROM_LINE.match(line):   # the line end before it is its own
                yield bytes(mail).removesuffix(b"\n").removesuffix(b"\r")
                mail.clear()
            elif len(mail) < MAX_BODY + 3:
                mail += line[1:] if re.match(b">+From ", line) else line


@contextlib.contextmanager
def progress_bar(share: Callable[[], float]) -> Iterator[None]:
    """Show how far the work is: a bar on a terminal, elsewhere a line now and then."""
    is_terminal = sys.stderr.isatty()
    is_over = threading.Event()

    def show() -> None:
        is_last = False
        while not is_last:
            is_last = is_over.wait(0.1 if is_terminal else TELL)
            if is_terminal or not is_last:
                part = min(1, share())      # a pipe is larger than it says
                bar = "#" * round(40 * part)
                print(f"[{bar:40}] {part:4.0%}", file=sys.stderr, flush=True,
                      end="\r" if is_terminal and not is_last else "\n")

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def doctor(store: Store, *, url: str = "") -> Any:
    """inbound doctor [--url URL] [--json]

    Check everything; each line says ok or FAIL and what to do; exit 1 on any FAIL.

    --url posts to the endpoint as providers see it, with no, a wrong and the right secret.
    """
    checks = [*checks_of(store), *(checks_of_url(store, url) if url else ())]
    rows = [{"check": name, "is_ok": is_ok, "words": "" if is_ok else words}
            for name, is_ok, words in checks]
    lines = [f"ok   {name}" if is_ok else f"FAIL {name}: {words}"
             for name, is_ok, words in checks]
    return rows, "\n".join(lines)


Check = tuple[str, bool, str]       # what is checked, whether it is ok, else what to do


def checks_of(store: Store) -> Iterator[Check]:
    _, content, _ = Progress(health(store)).finish(store)
    for words in content.get("reasons") or content["warnings"]:
        yield "state", False, words
    if store.replica_socket():
        yield (f"replica by {store.replica_socket()}", "the replica" not in str(content),
               "see Litestream's log")
    is_mended = sqlite3.sqlite_version_info >= (3, 51, 3)
    fix = "has" if is_mended else "lacks, as all before 3.51.3 but 3.50.7 and 3.44.6,"
    yield f"SQLite {sqlite3.sqlite_version} {fix} the fix of the WAL-reset bug", True, ""
    words = store.rows("PRAGMA quick_check(1)")[0]["quick_check"]
    yield "file", words == "ok", f"{words}: stop, restore a backup"
    newest = store.rows("SELECT received_at FROM message ORDER BY id DESC LIMIT 1")
    yield ("clock", all(row["received_at"] <= store.now() + 60 for row in newest),
           "the newest message is of the future: set the clock")
    path = Path(store.path).resolve()
    for file in sorted(filter(Path.is_file, path.parent.glob(path.name + "*"))):
        yield (f"mode of {file.name}", not file.stat().st_mode & 0o077,
               f"others may read everybody's mail: chmod 600 {file}")
    for name, paths in store.own_providers():
        is_sound = {"from", "message_id"} <= paths.keys() <= CANONICAL.keys()
        is_asked = {*map(paths.get, ("from", "message_id"))} != {"from", "message_id"}
        yield (f"provider {name}", is_sound and is_asked,
               "expected paths of from, message_id (by other names than the canonical "
               "body's, one of them at least), and fields of a mail")
    for row in store.rows("""SELECT * FROM refused_caller WHERE last_at > ?
            ORDER BY posts DESC LIMIT 5""", [store.now() - REFUSALS_SHOWN]):
        why = f"{row['posts']} posts with a wrong secret: if it is yours, give it the right"
        yield f"caller {row['client']}", False, why
    for account in store.accounts():
        yield from checks_of_account(store, account)


def checks_of_account(store: Store, account: Row) -> Iterator[Check]:
    address = account["address"]
    yield (f"secret of {address}", len({*(account["inbound_secret"] or "")}) >= 8,
           f"unset or easily guessed: run `inbound secret rotate --account {address}`")
    used, until = account["previous_secret_used_at"], account["previous_secret_until"]
    if account["previous_secret"] and used and until > store.now():
        yield (f"previous secret of {address}", False,
               "still in use: paste the new URL everywhere")
    if account["smtp_host"]:
        with contextlib.closing(Relay(account)) as session:
            _, words = session.deliver(None)
        yield (f"relay of {address}", not words,
               f"{words}: see `inbound account set --account {address} smtp_…`")


def checks_of_url(store: Store, url: str) -> Iterator[Check]:
    """Whether posts are answered as they should be, through whatever proxy is before us."""
    secret = store.accounts()[0]["inbound_secret"] or ""
    for name, body, given, expected in (
            ("no secret", b"", "", 401), ("a wrong secret", b"", "w" * 32, 401),
            ("the right secret and no mail", b"", secret, 200),
            ("5 MB and a wrong secret", bytes(5 * 2**20), "w" * 32, 401)):
        try:
            # Microsoft Graph's probe, of which nothing is kept.
            probe = url + ("&" if "?" in url else "?") + "validationToken=doctor"
            answer = str(post_to(probe, body, given, DOCTOR)[0])
        except (OSError, ValueError, http.client.HTTPException) as error:
            answer = printable(str(error))
        yield (f"{url} with {name}", answer == str(expected),
               f"{answer}, expected {expected}: see the proxy's rules and limits")


def backup(store: Store, file: str) -> Any:
    """inbound backup FILE [--json]

    Write a whole copy of the live database to FILE: mode 0600, verified, then renamed.
    """
    target, ours = os.path.realpath(file), os.path.realpath(store.path)
    part = Path(target + ".part")
    try:
        # It takes the place of no /dev/null, nor of what /dev/stdout stands for.
        if target in (ours, ours + "-wal", ours + "-shm") or (
                os.path.exists(target) and not os.path.isfile(target)):
            raise OSError(f"{file!r} is the database itself, or no file")
        part.unlink(missing_ok=True)    # another's, who could read it, or of one that died
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        [size] = store.rows("""SELECT (page_count - freelist_count) * page_size AS bytes
            FROM pragma_page_count, pragma_freelist_count, pragma_page_size""")
        with progress_bar(lambda: part.stat().st_size / size["bytes"]):
            store.rows("VACUUM INTO ?", [str(part)])    # one read transaction: nobody waits
        with contextlib.closing(sqlite3.connect(part)) as copy:
            [words] = copy.execute("PRAGMA integrity_check(1)").fetchone()
            [messages] = copy.execute("SELECT count(*) FROM message").fetchone()
        if words != "ok":
            raise OSError(f"the copy is not whole: {words}")
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        os.replace(part, target)
    except (OSError, sqlite3.Error) as error:
        raise Refused(503, f"no backup was made: {error}")
    finally:
        part.unlink(missing_ok=True)
    return {"file": file, "messages": messages}


def forget(store: Store, address: str) -> Any:
    """inbound forget ADDRESS [--json]

    Erase a person: their tickets, their messages elsewhere, outbox and rejected posts.
    """
    mailboxes = mailboxes_of(address)
    if len(mailboxes) != 1 or "@" not in address:
        raise Refused(400, f"{address!r} is no address: expected one like ada@example.org")
    counts = store.write(erase, mailboxes[0][1])
    print("inbound: backups hold it until they expire, the -wal file until it is written "
          "over or the server stops", file=sys.stderr)
    return counts


def erase(db: DB, now: int, address: str) -> Row:
    """Delete what a person wrote and what was written to them; secure_delete overwrites it.

    Returns how many of each: {"tickets": 1, …}.
    """
    key = mailbox_key(address)
    # The end of another's address is none; before a whole one may stand an escape.
    # (?=: at every byte the four looks back would cost three times as much.
    itself = spellings(address).pattern
    start = r"(?:(?<![\w.+-])|(?<=\\[nrt])|(?<=%[0-9a-f]{2})|(?<=\\u00[0-9a-f]{2}))"
    find = re.compile(rf"(?={itself}){start}{itself}(?!\.?[\w-])", re.I).search
    db.create_function("theirs", 1, lambda other: mailbox_key(other) == key)
    db.create_function("names_them", 1, lambda body: bool(find(body.decode("latin-1"))))
    gone = {
        "tickets": "ticket WHERE theirs(requester)",
        "messages": "message WHERE theirs(from_address)",
        "mails": """message WHERE id IN (SELECT message FROM outbox
            WHERE theirs(recipient) AND purpose IN ('confirmation', 'reply', 'answer'))""",
        "notices": "outbox WHERE theirs(recipient)",
        "rejected": "rejected WHERE names_them(body)"}
    return {name: db.execute(f"DELETE FROM {rows}").rowcount for name, rows in gone.items()}


# -----------------------------------------------------------------------------------------
# Command line: parsing and printing. Nothing that is printed drives a terminal.

# A verb is a function whose docstring says how it is used.
VERBS = {name.replace("_", " ").strip(): function for name, function in [*vars().items()]
         if str(function.__doc__).startswith("inbound ")}
# What the first word of two means alone.
ALONE = {"secret": "show", "account": "show", "outbox": "list", "rejected": "list"}


def main(argv: list[str] | None = None, clock: Callable[[], float] = time.time) -> int:
    """Run one verb; return the exit code: 0, 1 for an error, 2 for wrong usage."""
    # None: who started us had closed it.
    sys.stdin = sys.stdin or os.fdopen(os.open(os.devnull, os.O_RDONLY))
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        given, words = parse(sys.argv[1:] if argv is None else argv)
        if "version" in given:
            print(f"inbound {VERSION}")
        elif not given.keys() & {"help", "h"}:
            run_verb(given, words, clock)
        elif words:
            print(f"Usage: {inspect.getdoc(VERBS[verb_of(words)[0]])}")
        else:
            print((__doc__ or "").strip())
        sys.stdout.flush()
    except KeyboardInterrupt:                   # a long import or backup is ended
        return 130
    except BrokenPipeError:                     # `inbound tickets | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Refused, Usage, OSError, UnicodeError, sqlite3.IntegrityError) as error:
        print(f"inbound: {words_of(error)}", file=sys.stderr)
        return 2 if isinstance(error, Usage) else 1
    return 0


def parse(argv: list[str]) -> tuple[Row, list[str]]:
    """(options as they were given, words) of a command line."""
    usages = " ".join(map(usage_of, VERBS.values()))
    valued = [f"{name}=" for name in re.findall("--([a-z-]+) ", f"--db {usages}")]
    try:
        given, words = getopt.gnu_getopt(argv, "h", ["help", "json", "version", *valued])
    except getopt.GetoptError as error:
        raise Usage(f"{error}: see inbound --help")
    return {name.lstrip("-"): value for name, value in given}, words


def usage_of(function: Any) -> str:
    """The first paragraph of its docstring, in one line."""
    return " ".join(function.__doc__.partition("\n\n")[0].split())


def run_verb(given: Row, words: list[str], clock: Callable[[], float]) -> None:
    """Call the verb and print what it returns."""
    name, words = verb_of(words)
    function = VERBS[name]
    path = given.pop("db", "") or default_path()
    try:
        options = options_of(function, given, words)
        with contextlib.closing(Store(path, clock, checkpoints=name == "serve")) as store:
            if name not in ("serve", "relay"):      # `serve` opens when it listens
                store.open(create=False)
            result = function(store, *words, **options)
            if result is not None:
                print_result(result, "json" in given)
    except Usage as error:
        raise Usage(f"{error}: {usage_of(function)}")
    if name == "doctor" and not all(row["is_ok"] for row in result[0]):
        raise SystemExit(1)


def verb_of(words: list[str]) -> tuple[str, list[str]]:
    """(name of the verb, the words behind it)."""
    name, *rest = words or [""]
    if name in ALONE:
        second, *rest = rest or [ALONE[name]]
        name = f"{name} {second}"
    if name not in VERBS:
        raise Usage(f"there is no verb {name!r}{nearest(name, VERBS)}: see inbound --help")
    return name, rest


def nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, known, 1, 0.5)
    return f"; did you mean {found[0]!r}" if found else ""


def options_of(function: Any, given: Row, words: list[str]) -> Row:
    """The options as the function takes them; Usage if it does not, or not these words."""
    strange = given.keys() - re.findall("--([a-z-]+)", usage_of(function))
    if strange:
        raise Usage(f"--{min(strange)} means nothing here")
    options = {name.replace("-", "_"): given[name] for name in given if name != "json"}
    for name in options.keys() & {"limit", "last"}:
        if not re.fullmatch("[0-9]{1,18}", options[name]):
            raise Usage(f"--{name} is a number")
        options[name] = int(options[name]) or -1        # what SQLite calls no limit
    try:
        inspect.signature(function).bind(None, *words)
    except TypeError as error:
        raise Usage(str(error))
    return options


def print_result(result: Any, is_json: bool) -> None:
    """Print what a verb returned: rows; a text in their place; messages, one by one."""
    rows, text, *more = result if isinstance(result, tuple) else (result, None)
    if is_json:
        text = as_json(rows)
        if more:
            text = text.removesuffix("\n}") + ',\n "messages": ['
    elif text is None and isinstance(rows, list):
        text = table_of(rows)
    elif text is None:
        text = "\n".join(map("=".join, readable(rows).items()))
    print(harmless(text))
    for messages in more:
        for place, (message, text) in enumerate(messages):
            if is_json:
                text = ("," if place else "") + as_json(message)
            print(harmless(text))
        if is_json:
            print("]}")


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1).replace("\x7f", r"\u007f")


def harmless(text: str) -> str:
    """A text whose control characters do not reach the terminal."""
    text = text.replace("\r\n", "\n").rstrip("\n")
    return re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f]", "?", text)


def readable(row: Row) -> dict[str, str]:
    """A row's values as text: times in UTC, NULL as nothing."""
    shown = {}
    for name, value in row.items():
        if name.endswith(("_at", "_until")) and value:
            value = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(value))
        shown[name] = "" if value is None else str(value)
    return shown


def table_of(rows: list[Row]) -> str:
    """A line a row; on a terminal columns with a header, the widest cut until all fit."""
    lines = [[*map(one_line, readable(row).values())] for row in rows]
    if rows and sys.stdout.isatty():
        lines.insert(0, [name.upper() for name in rows[0]])
        widths = [max(map(len, column)) for column in zip(*lines)]
        room = shutil.get_terminal_size().columns - 2 * len(widths)
        while sum(widths) > room and max(widths) > 8:
            widths[widths.index(max(widths))] -= 1
        for line in lines:
            line[:] = [cell[:width].ljust(width) for cell, width in zip(line, widths)]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def words_of(error: Exception) -> str:
    """Ours for a broken constraint: schema.sql names its CHECKs with sentences."""
    kind, _, name = str(error).partition(" constraint failed: ")
    if kind == "CHECK" or not isinstance(error, sqlite3.IntegrityError):
        return name or kind
    words = {"UNIQUE": "is another's already", "NOT NULL": "cannot be unset"}
    return f"{str(error).rpartition('.')[2]} {words.get(kind, 'is a number')}"


if __name__ == "__main__":
    sys.exit(main())
