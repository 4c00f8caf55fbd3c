"""inbound: email in, tickets out.

    provider, relay, MTA ─ POST ▶ authenticate ▶ read ▶ normalise ▶ classify ▶ thread ▶ store ▶ 200
                                                                           │ same transaction
    customer ◀── SMTP ◀── courier thread ◀── outbox ◀──────────────────────┘

Five promises:
  1. A 200 means it is on disk: ticket, message, attachments and outbox row, in one transaction.
  2. The same message twice changes nothing, at once or a week later.
  3. Nothing that proved it knew the secret is lost: what became no message is in `rejected`.
  4. Automatic mail is kept and never answered.
  5. Nobody can stop it with a mail, or from outside: whatever is parsed has a budget, and
     nothing is parsed for a stranger.

Usage: inbound [--db FILE] VERB               (FILE: $INBOUND_DB, else inbound.db)

  serve [--listen 127.0.0.1:8080]     make the database if there is none, answer, send
  secret [show | set VALUE | rotate [--keep 24h]]     what callers of the endpoint must know
  account [list | show | add ADDRESS | set KEY=VALUE ...]   address, queue, relay, template
  tickets [open | closed | all]       list them; --queue, --from, --search, --limit
  show REF [--last N]                 a ticket: its messages, and why each was treated so
  attachment ID [FILE]                write an attachment to FILE or standard output
  reply REF [--to ADDRESS]            answer with the text on standard input
  close REF                           close a ticket; its requester's reply opens it again
  reopen REF                          open a closed ticket
  relay URL [--sender ADDRESS] [--secret-file FILE]   post the mail on standard input
  outbox [list | show ID | send | retry ID | retry all]     mail on its way out
  rejected [list | show ID | replay [ID] | delete ID]       posts that became no message

`inbound VERB --help` says more of one; `--json` prints what a program reads. Where there are
several accounts, `--account ADDRESS` says which (default: the default one).
Errors are one line on standard error, exit 1; wrong usage exits 2.
As a WSGI application for another server: `inbound:app` (database from $INBOUND_DB), with
`inbound outbox send` from cron.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import concurrent.futures
import contextlib
import difflib
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
import json
import logging
import os
import re
import secrets
import shutil
import signal
import smtplib
import socket
import sqlite3
import ssl
import sys
import threading
import time
import urllib.parse
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

VERSION = "2.0.0"
ENDPOINT = "/api/helpdesk/inbound-email"
log = logging.getLogger("inbound")

# -----------------------------------------------------------------------------------------
# Limits: each with its unit, what happens past it, and where the number comes from.

MAX_BODY = int(os.environ.get("INBOUND_MAX_BODY", 72 * 2**20))  # bytes; 413. 50 MB as base64
HEAVY = 2**20               # bytes; larger posts are understood one at a time …
HEAVY_WAIT = 4              # … and wait so many seconds for each other, then 503

# What one mail may be made of. Past a bound it is a ticket with what could be read, and the
# whole of it is kept as an attachment (SPEC 3.0).
MAX_DEPTH = 10              # multiparts inside each other
MAX_PARTS = 1000            # of a mail, or attachments of a post
MAX_HEADER_LINES = 1000     # of a mail and its parts together
MAX_HEADER_BYTES = 2**18    # likewise; Postfix stops at 100 KB
MAX_FIELDS = 1000           # of a form; the rest is not looked at
MAX_VALUES = 200_000        # strings, lists and objects of a JSON text: 15 MB of memory
MAX_HTML = 2**18            # characters that the text is made of; the HTML is stored whole

MAX_ADDRESS_HEADER = 998    # characters; the rest is not looked at. RFC 5322 2.1.1: a line
MAX_OWN_ID = 250            # characters; a longer id is stored but enters no header of ours
FIRST_REFERENCES = 20       # ids of References that are looked at from its beginning …
LAST_REFERENCES = 80        # … and from its end, where the parent stands

THREADS = 12                # of the server
BUSY_TIMEOUT = 2.0          # seconds one waits for SQLite's lock, then 503. SIGTERM leaves 5 s
REFUSALS_SHOWN = 3600       # seconds for which /healthz warns of a refused secret
LEASE = 45                  # seconds a courier has a row, then it is anybody's again
DELIVERY = 30               # seconds for one delivery in all, then it is tried again
LOOK = 5                    # seconds between two looks at the outbox when nothing wakes us
GIVE_UP = 24 * 3600         # seconds after which undelivered mail is failed
FIRST_WAIT = 60             # seconds before the second try, doubled with each …
MAX_WAIT = 3600             # … up to this
MAX_REPLY = 2**16           # bytes of one SMTP reply; past it the session is over


# -----------------------------------------------------------------------------------------
# Types: frozen, without behaviour.

Row = dict[str, Any]        # a row of a table, or an object of JSON
Mail = dict[str, Any]       # a canonical body (SPEC 2), before anything in it is trusted
Headers = list[list[str]]   # [[name, value], …], order and repeats kept
Faults = dict[str, str]     # field → what is wrong with it
DB = sqlite3.Connection


class Refused(Exception):
    """An error that is answered: HTTP status, a sentence with the value and what was expected.

    `fields` are a canonical body's faults.
    """

    def __init__(self, status: int, reason: str, fields: Faults | None = None):
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.fields = fields or {}


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
    members: list[Any]
    to_mail: Callable[[Any], Mail] = dict
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
    """A mail as we understand it: text without NUL or lone surrogates, ids with brackets."""

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
    from_count: int = 1                 # mailboxes that From names; 0 = another stands for it
    verdict: str = ""                   # the provider's word on spam


@dataclass(frozen=True)
class Filing:
    """A member of a post, ready to be stored; or the `fault` why it was not understood."""

    message: Message
    kind: str
    reason: str                         # why this kind
    withheld: str = ""                  # why it is not to be confirmed; "" = it may be


Draft = tuple[Message, bytes]           # a mail of ours: its row, and the bytes that go out


# -----------------------------------------------------------------------------------------
# The app: one WSGI callable. Whatever happens inside, one answer and one log line come out.

ANSWER_HEADERS = {
    401: [("WWW-Authenticate", 'Basic realm="inbound"')],
    405: [("Allow", "GET, HEAD, POST")],
    503: [("Retry-After", "10")]}
HEAVY_LOCK = threading.Lock()
Answer = tuple[int, Row, "str | None"]      # status, JSON object, text in its place
Start = Callable[..., Any]                  # WSGI's start_response
Wsgi = Callable[[Row, Start], list[bytes]]


def make_app(store: Store) -> Wsgi:
    """Return the WSGI application (PEP 3333) that files mail in `store`."""

    def app(environ: Row, start_response: Start) -> list[bytes]:
        began = time.perf_counter()
        text = None
        try:
            status, content, text = respond(store, environ)
        except Refused as refusal:
            status, content = refusal.status, {"error": refusal.reason}
            if refusal.fields:
                content["fields"] = refusal.fields
        except Exception:
            log.exception("while answering")
            status = 500
            content = {"error": "unexpected: nothing was stored, send it again"}
        line = json.dumps(content)
        # Escaped and capped: nobody outside writes a line of this log.
        log.info("%d %sB %.0fms %s %s", status, environ.get("CONTENT_LENGTH") or 0,
                 1000 * (time.perf_counter() - began), environ.get("REMOTE_ADDR"),
                 printable(line[1:-1])[:300])
        kind = "text/plain" if text else "application/json"
        body = (text or line + "\n").encode()
        start_response(f"{status} {http.HTTPStatus(status).phrase}", [
            ("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(body))),
            *ANSWER_HEADERS.get(status, [])])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return app


def app(environ: Row, start_response: Start) -> list[bytes]:
    """The WSGI application for other servers: on $INBOUND_DB, which is made at need."""
    return app_of(os.environ.get("INBOUND_DB") or "inbound.db")(environ, start_response)


@functools.cache
def app_of(path: str) -> Wsgi:
    return make_app(Store(path))


def printable(text: str) -> str:
    return ascii(text)[1:-1]


def respond(store: Store, environ: Row) -> Answer:
    """Route a request; Refused 404, 405 and what the rest of the way refuses."""
    path, method = environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"]
    if path == "/healthz" and method in ("GET", "HEAD"):
        return health(store)
    # As it was sent: `//api` and `/api%2F` are one path to servers, not to proxies' rules.
    sent = environ.get("REQUEST_URI") or environ.get("RAW_URI") or path
    is_plain = sent.partition("?")[0] == environ.get("SCRIPT_NAME", "") + path
    if path not in (ENDPOINT, ENDPOINT + "/") or not is_plain:
        raise Refused(404, f"there is nothing here; mail is posted to {ENDPOINT}")
    if method in ("GET", "HEAD"):   # some providers probe the URL before they use it
        return 200, {"status": "probed"}, "inbound: post received mail here\n"
    if method != "POST":
        raise Refused(405, f"{method[:20]!r} is not answered here; mail arrives by POST")
    post, by_body = authenticate(store, environ)
    token = query_of(environ).get("validationToken")
    if token and not post.body:     # Microsoft Graph probes so
        return 200, {"status": "probed"}, token[0]
    try:
        provider, content = receive(store, post)
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


def receive(store: Store, post: Post) -> tuple[str, Row]:
    """Make messages of a post and store them; return (provider, answer).

    What could not be understood is kept in `rejected` before Refused 400, 415, 422 or
    `quarantined` says so. `rejected replay` comes this way too.
    """
    reading = Reading("unread", [])
    try:
        with one_heavy_at_a_time(post.body):
            reading = read(post, store.own_providers)
            filings = [understand(reading, member, post) for member in reading.members]
        has_faults = any(isinstance(filing, str) for filing in filings)
        answers = store.write(file_post, post, filings, safe(post) if has_faults else post)
    except Refused as refusal:      # the value that it names may be the secret
        reason = starred(post.account, refusal.reason)
        if refusal.status in (400, 415, 422):
            store.write(keep, safe(post), refusal.status, reason)
        raise Refused(refusal.status, reason, {
            name: starred(post.account, fault)
            for name, fault in refusal.fields.items()}) from None
    except Exception as error:
        fault = fault_of(error, post, reading.provider)
        answers = store.write(file_post, post, [fault], safe(post))
    if not answers:
        if reading.is_kept:
            store.write(keep, safe(post), 200, reading.notice)
        return reading.provider, {"status": "ignored", "reason": reading.notice}
    if any(answer["confirmation"] == "queued" for answer in answers):
        store.has_mail.set()
    batch = {"status": "batch", "messages": answers}
    return reading.provider, batch if reading.is_batch else answers[0]


@contextlib.contextmanager
def one_heavy_at_a_time(body: bytes) -> Iterator[None]:
    """Let one large post be understood while others wait; Refused 503 after HEAVY_WAIT."""
    is_heavy = len(body) > HEAVY
    if is_heavy and not HEAVY_LOCK.acquire(timeout=HEAVY_WAIT):
        raise Refused(503, "too many large messages at once: send it again")
    try:
        yield
    finally:
        if is_heavy:
            HEAVY_LOCK.release()


def understand(reading: Reading, member: Any, post: Post) -> Filing | str:
    """Normalise and classify a member of a post; or say what a bug of ours made of it."""
    try:
        mail = reading.to_mail(member)
        if reading.cut and member is reading.members[-1]:   # what is missing is at the end
            kept = safe(post)
            mail["whole"] = (reading.cut, "post", kept.content_type, kept.body)
        message = normalise(mail, is_strict=reading.provider == "canonical")
        forwarders = post.account["trusted_forwarders"] or ""
        return Filing(message, *classify(message, post.own_addresses, forwarders))
    except Refused:
        raise
    except Exception as error:
        return fault_of(error, post, reading.provider)


def fault_of(error: Exception, post: Post, where: str) -> str:
    """What is kept of an unexpected error: enough to look for, too little to leak mail."""
    words = printable(f"{type(error).__name__}: {error}"[:180])
    return starred(post.account, f"{words} ({where})")


def health(store: Store) -> Answer:
    """GET /healthz: 503 with reasons when mail is not taken or sent; else warnings."""
    try:
        store.write(rehearse)
        reasons, warnings = troubles(store)
    except Refused as refusal:
        reasons, warnings = [refusal.reason], []
    if reasons:
        return 503, {"status": "degraded", "reasons": reasons}, None
    return 200, {"status": "ok", "warnings": warnings}, None


TROUBLES = """
    SELECT 1 AS is_urgent, 'no secret is set: run `inbound secret rotate`' AS words
    WHERE NOT EXISTS (SELECT 1 FROM email_account WHERE inbound_secret IS NOT NULL)
    UNION ALL SELECT 1, 'the outbox waits for over an hour: run `inbound outbox`'
    WHERE EXISTS (SELECT 1 FROM outbox
        WHERE state IN ('queued', 'sending') AND created_at < :now - 3600)
    UNION ALL SELECT 1, 'disk: ' || round(:free, 1) || ' % free, expected 5 % or more'
    WHERE :free < 5
    UNION ALL SELECT 0, address || ' has no relay: run `inbound account set smtp_host=…`'
    FROM email_account WHERE smtp_host IS NULL
    UNION ALL SELECT 0, address || ' is nobody''s: run `inbound account set address=…`'
    FROM email_account WHERE address = 'support@localhost'
    UNION ALL SELECT 0, count(*) || ' rejected posts are waiting: run `inbound rejected`'
    FROM (SELECT 1 FROM rejected LIMIT 1000) HAVING count(*)
    UNION ALL SELECT 0, count(*) || ' mails could not be sent: run `inbound outbox`'
    FROM (SELECT 1 FROM outbox WHERE state = 'failed' LIMIT 1000) HAVING count(*)
    UNION ALL SELECT 0, :refused || ' posts had a wrong secret in the last hour'
    WHERE :refused"""


def troubles(store: Store) -> tuple[list[str], list[str]]:
    """What /healthz and `doctor` say of the service: (what is urgent, what can wait)."""
    now = store.now()
    disk = shutil.disk_usage(Path(store.path).resolve().parent)
    rows = store.rows(TROUBLES, {
        "now": now, "free": 100 * disk.free / disk.total,
        "refused": sum(at > now - REFUSALS_SHOWN for at, _ in [*store.refusals])})
    urgent = [row["words"] for row in rows if row["is_urgent"]]
    return urgent, [row["words"] for row in rows if not row["is_urgent"]]


# -----------------------------------------------------------------------------------------
# Authenticate: the first place that holds a secret decides, even when it is empty there.
# The secrets of all accounts are compared, always, so that the time tells nothing. Of a
# stranger's post nothing but header lines is looked at.

SECRETS = """
    SELECT *, inbound_secret AS secret FROM email_account
    UNION ALL SELECT *, previous_secret FROM email_account
    WHERE previous_secret_until > ?"""


def authenticate(store: Store, environ: Row) -> tuple[Post, bool]:
    """Return the post, and whether its secret was in the body.

    Refused 503 while no account has a secret (so that providers keep the mail), else 401.
    """
    accounts = store.rows(SECRETS, [store.now()])
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
        store.refusals.append((store.now(), environ.get("REMOTE_ADDR", "")))
        raise Refused(
            401, "no right secret in X-Mobieus-Inbound-Secret, ?secret= or HTTP Basic")
    if not by_body:
        body = body_of(environ)
    own_addresses = [account["address"] for account in accounts]
    return Post(found[0], own_addresses, content_type, body), by_body


def presented_secret(environ: Row) -> bytes | None:
    """The secret of header, query or HTTP Basic; None when in none of them.

    One that is repeated is joined, as servers join headers, with what is in no secret.
    """
    header: str | None = environ.get("HTTP_X_MOBIEUS_INBOUND_SECRET")
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
        with contextlib.suppress(Refused), one_heavy_at_a_time(body):
            fields = fields_of(content_type, body)
            if isinstance(fields, dict):
                return str(fields.get("SecretKey")).encode("utf-8", "replace")
    return b""


def body_of(environ: Row) -> bytes:
    """Return the request's body; Refused 413 over MAX_BODY, 400 when it ends early."""
    length = int(environ.get("CONTENT_LENGTH") or 0)
    is_open_ended = not length and environ.get("wsgi.input_terminated")
    most = MAX_BODY + 1 if is_open_ended else min(length, MAX_BODY + 1)
    body: bytes = environ["wsgi.input"].read(most)
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

JSON_MARK = re.compile(r'\\.|["\[\]{},]', re.S)
FORM = "application/x-www-form-urlencoded"
RAW_FIELDS = ("email", "message", "body-mime")  # of forms: a mail has charsets of its own
FROM_HEADERS = ("from", "to", "cc", "subject")  # fields that a header stands in for


class Fields(Row):
    """The fields of a body; only what was a JSON object may be the canonical body."""

    is_json = False
    cut = ""                    # which bound of the budget it went past


def fields_of(content_type: str, body: bytes) -> Fields | bytes:
    """Take a body apart; Refused 400: not decodable, 415: no type that mail comes in."""
    header = content_headers([["Content-Type", clean(content_type) or "application/json"]])
    kind = header.get_content_type()
    if kind in ("message/rfc822", "message/global"):    # RFC 6532: the same in UTF-8
        if not body.strip():
            raise Refused(400, f"the {kind} is empty; expected a mail")
        return body
    if kind == "multipart/form-data":
        return form_of(multipart_fields(body, header.get_boundary() or ""))
    is_json = kind.endswith(("/json", "+json"))
    if not is_json and kind not in ("text/plain", FORM):
        raise Refused(415, f"content type {kind!r} carries no mail; expected application/json")
    if not is_json and not re.match(rb"(?:\xef\xbb\xbf)?\s*[{\[]", body):
        if re.match(rb"From |[!-9;-~]+:(?:[ \t]|\r?\n[ \t])", body):    # a header line
            return body
        if kind == FORM:
            return form_of(url_encoded_fields(body))
    return parse_json(body)


def parse_json(body: bytes) -> Fields:
    """The object in `body`, or its list as `events`; strict UTF-8, Refused 400.

    We do not give json.loads the bytes: it guesses UTF-16 and lets lone surrogates through.
    """
    try:
        text = body.decode("utf-8-sig")
        within = within_json_budget(text)
        value = json.loads(within, parse_constant=int)      # int("NaN") raises
    except (ValueError, RecursionError) as error:           # UnicodeDecodeError is the former
        reason = f"the body is not JSON in UTF-8: {printable(str(error))[:200]}"
        raise Refused(400, reason) from None
    if not isinstance(value, (dict, list)):
        raise Refused(400, f"the body is {type(value).__name__}; expected a JSON object")
    fields = Fields(value if isinstance(value, dict) else {"events": value})
    fields.is_json = isinstance(value, dict)
    fields.cut = "" if within is text else f"more than {MAX_VALUES} values in the JSON"
    return fields


def within_json_budget(text: str) -> str:
    """A JSON text itself, or as much of its beginning as MAX_VALUES allows, closed properly.

    Python takes up to 60 bytes for each of the 3 in `[],`.
    """
    marks = text.count("[") + text.count("{") + text.count('"') - text.count('\\"')
    if marks < 2 * MAX_VALUES:
        return text
    closers: list[str] = []
    values, is_string = 0, False
    for found in JSON_MARK.finditer(text):
        mark = found[0]
        if mark == '"':
            is_string = not is_string
            values += is_string
        elif is_string or mark[0] == "\\":
            continue
        elif mark in "[{":
            closers.append("]" if mark == "[" else "}")
            values += 1
        elif mark in "]}" and closers:
            closers.pop()
        elif mark == "," and values > MAX_VALUES:
            return text[:found.start()] + "".join(reversed(closers))
    return text


def json_in(text: Any) -> Any:
    """The JSON object or list in a field of text; {} where there is none."""
    if isinstance(text, str) and text.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(within_json_budget(text))
    return {}


FormField = tuple[str, "email.message.Message | None", bytes]   # name, headers of a file, content


def url_encoded_fields(body: bytes) -> Iterator[FormField]:
    """The fields of a form; a bare name is a field without a value.

    Percent-encoding is quoted-printable with another sign. We do not use urllib: it makes an
    object of each escape, 17 times the size.
    """
    for pair in body.split(b"&", MAX_FIELDS)[:MAX_FIELDS]:
        name, _, value = (binascii.a2b_qp(text.replace(b"+", b" ")
                                             .replace(b"=", b"%3D").replace(b"%", b"="))
                          for text in pair.partition(b"="))
        if name:
            yield decode(name, None), None, value


def multipart_fields(body: bytes, boundary: str) -> Iterator[FormField]:
    """The fields and files of multipart/form-data (RFC 7578), their contents as posted."""
    parts = split_parts(memoryview(body), boundary, MAX_FIELDS)
    if not parts:
        raise Refused(400, f"the body is not cut by its boundary {boundary!r}")
    for part in parts[:MAX_FIELDS]:
        headers, content = MimeReader().head_of(part)
        header = content_headers(headers)
        name = str(header.get_param("name", "", "content-disposition"))
        yield name, header if header.get_filename() is not None else None, bytes(content)


def form_of(parts: Iterable[FormField]) -> Fields:
    """The fields of a form by name, its files in `files`.

    `envelope[to]` and `attachments[0][filename]` become objects, as their senders mean them.
    """
    form, files = Fields(), []
    texts: dict[str, list[bytes]] = {}
    for name, header, content in parts:
        if header is None:
            texts[name] = [*texts.get(name, []), content]   # Mailgun may repeat a body
        else:
            files.append({"field": name, "filename": header.get_filename(),
                          "type": header.get_content_type(), "content": content})
    charsets = json_in(b"".join(texts.get("charsets", [])).decode("latin-1"))
    for name, contents in texts.items():
        value: Any = b"\n".join(contents)
        if name not in RAW_FIELDS:
            value = form_text(name, value, at(charsets, name))
        *branches, leaf = name.replace("]", "").split("[", 4)[:4]
        branch: Any = form
        for key in branches:
            inner = branch.setdefault(key, {})
            branch = inner if isinstance(inner, dict) else {}
        branch[leaf] = value
    form["files"] = files
    return form


def form_text(name: str, content: bytes, charset: Any) -> str:
    """A field's text. SendGrid: what does not fit its charset stands in the headers too."""
    if name in FROM_HEADERS and isinstance(charset, str):
        with contextlib.suppress(LookupError, ValueError):
            return content.decode(codec_of(charset))
        return ""
    return decode(content, charset if isinstance(charset, str) else None)


def read(post: Post, own_providers: Callable[[], list[tuple[str, Row]]]) -> Reading:
    """Tell what a post carries; `own_providers` returns the rows of that table.

    Refused 400: not decodable, 415: no type that mail comes in, 422: no mail in it, and what
    to do about it.
    """
    fields = fields_of(post.content_type, post.body)
    if isinstance(fields, bytes):
        return Reading("raw", [fields], mail_of_mime)
    cut, is_json = fields.cut, fields.is_json
    if "TopicArn" in fields and fields.get("Type") == "Notification":   # SNS: it is inside
        fields = Fields(json_in(fields.get("Message")) or {"notificationType": "no JSON"})
    for provider in PROVIDERS:
        if provider.key in fields and provider.when(fields):
            to_mail = functools.partial(mail_of, provider)
            if provider.members is None:
                return Reading(provider.name, [fields], to_mail, cut=cut)
            members, notice = provider.members(fields), f"{provider.name} posted no mail"
            return Reading(provider.name, members, to_mail, True, notice, cut=cut)
    is_canonical = {"from", "message_id"} <= fields.keys()
    for name, paths in () if is_canonical else own_providers():
        if has(fields, paths.get("from")) and has(fields, paths.get("message_id")):
            to_mail = functools.partial(mail_of, Provider(name, "", fields=paths))
            return Reading(name, [fields], to_mail, cut=cut)
    if not is_canonical and (notice := notice_in(fields)):
        return Reading("", [], notice=notice, is_kept="SubscribeURL" in fields)
    if not is_json:
        raise Refused(400, "no provider known posts such a form or list; expected an object")
    if fields and not CANONICAL & fields.keys():
        raise Refused(422, (
            "no known provider posts this; it is kept: describe it in the table `provider`, then "
            "`inbound rejected replay`, or send the canonical body (`from`, `message_id`, …)"))
    return Reading("canonical", [fields], canonical_mail, cut=cut)


def at(value: Any, path: Any) -> Any:
    """What stands at a path like `a.b.0`, through JSON text too, or None.

    Of a tuple of paths the first that holds something.
    """
    if isinstance(path, tuple):
        found = [at(value, each) for each in path]
        return next((each for each in found if each not in (None, "", [], {})), None)
    for step in path.split(".") if path else ():
        value = json_in(value) if isinstance(value, str) else value
        if isinstance(value, list):
            value = value[int(step)] if step.isdigit() and int(step) < len(value) else None
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return value if path else None


def has(value: Any, path: str | None) -> bool:
    """Whether something, if only null, stands at a path."""
    place, _, name = (path or "").rpartition(".")
    value = at(value, place) if place else value
    return name in value if isinstance(value, dict) else at(value, name) is not None


def items_of(value: Any) -> list[Any]:
    """A list, what stands for one (`a[0]`, `a[1]` of a form, Mandrill's by name), or one value."""
    if isinstance(value, dict) and all(
            key.isdigit() or isinstance(value[key], dict) for key in value):
        return [*value.values()]
    return value if isinstance(value, list) else [value] if value else []


# -----------------------------------------------------------------------------------------
# Read, raw mail (RFC 5322, RFC 2045), as far as it goes and its budget reaches.
#
# We do not use email.parser: it looks at each line in Python, 1 to 5 s and up to 140 MB a
# megabyte of short lines, and ends the headers at the first line that is none. Here regular
# expressions cut views of the same bytes; email.message reads the parameters.

MBOX = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:>?From [^\n]*\n)*")
BLANK_LINE = re.compile(rb"(?m)^[ \t]*\r?(?:\n|\Z)")
TRANSFER_CODECS = {"quoted-printable": "quopri", "x-uuencode": "uu", "uuencode": "uu"}


class MimeReader:
    """One walk over a raw mail; `cut` names the first bound that it went past."""

    def __init__(self) -> None:
        self.parts, self.lines, self.size = MAX_PARTS, MAX_HEADER_LINES, MAX_HEADER_BYTES
        self.cut = ""
        self.charset: str | None = None         # of the first text
        self.texts: dict[str, list[str]] = {"text/plain": [], "text/html": []}
        self.attachments: list[Row] = []

    def head_of(self, content: memoryview) -> tuple[Headers, memoryview]:
        """Headers, values as Latin-1 with folds, and body. A line of blanks is an end too."""
        found = BLANK_LINE.search(content)
        start, end = found.span() if found else (len(content), len(content))
        head = bytes(content[:min(start, self.size)]).decode("latin-1").strip("\r\n")
        lines = re.split(r"\r?\n(?![ \t])", head, self.lines + 1)
        if start > self.size or len(lines) > self.lines:
            self.cut = self.cut or f"over {MAX_HEADER_LINES} lines or 256 KB of headers"
        headers = []
        for line in lines[:self.lines]:
            name, colon, value = line.partition(":")    # RFC 5322 4.5: blanks before the colon
            if colon and re.fullmatch(r"[!-9;-~]+[ \t]*", name):
                headers.append([name.strip(), value.strip()])
            elif line.strip():
                headers.append(["X-Malformed", line.strip()])
        self.size -= min(start, self.size)
        self.lines -= len(headers)
        return headers, content[end:]

    def walk(self, headers: Headers, body: memoryview, default: str = "text/plain",
             depth: int = 0) -> None:
        """Collect the texts and attachments of a part and all that is in it."""
        fields = content_headers(headers)
        fields.set_default_type(default)
        kind = fields.get_content_type()
        parts = []
        if kind[:10] == "multipart/" and depth < MAX_DEPTH:
            parts = split_parts(body, fields.get_boundary() or "", self.parts)
        elif kind[:10] == "multipart/":
            self.cut = self.cut or f"more than {MAX_DEPTH} multiparts inside each other"
        # RFC 2046 5.1.5: what a digest holds is a mail unless it says otherwise.
        default = "message/rfc822" if kind == "multipart/digest" else "text/plain"
        for part in parts:
            self.parts -= 1
            if self.parts < 0:
                self.cut = self.cut or f"more than {MAX_PARTS} parts"
                break
            self.walk(*self.head_of(part), default, depth + 1)
        if not parts:
            self.add(fields, kind, transfer_decoded(fields, body))

    def add(self, fields: email.message.Message, kind: str, content: bytes) -> None:
        is_text = kind in self.texts or kind[:10] == "multipart/"
        is_inline = is_text and fields.get_content_disposition() != "attachment"
        if is_inline and fields.get_filename() is None:
            self.charset = self.charset or fields.get_content_charset()
            text = decode(content, fields.get_content_charset())
            self.texts["text/html" if kind == "text/html" else "text/plain"].append(text)
        else:
            self.attachments.append({
                "filename": fields.get_filename(), "type": kind, "content": content,
                "cid": fields.get("Content-ID"),
                "inline": is_inline and decode(content, fields.get_content_charset())})


def mail_of_mime(content: bytes) -> Mail:
    """The canonical dict of a raw mail."""
    if b"\n" not in content:
        content = content.replace(b"\r", b"\n")
    reader = MimeReader()
    raw_headers, body = reader.head_of(memoryview(content)[end_of_mbox_lines(content):])
    reader.walk(raw_headers, body)
    headers = [[name, header_text(value, reader.charset)] for name, value in raw_headers]
    mail: Mail = {name.lower(): value for name, value in reversed(headers)}
    text, markup = ("\n".join(pieces) for pieces in reader.texts.values())
    if not text and not markup:         # RFC 2183 2.1: inline is shown, named or not
        text = next((item["inline"] for item in reader.attachments if item["inline"]), "")
    mail = {name: mail.get(name) for name in FROM_HEADERS} | {
        "text": text, "html": markup, "attachments": reader.attachments, "headers": headers,
        "message_id": mail.get("message-id"), "envelope": {"from": return_path(headers)}}
    if reader.cut:
        mail |= {"whole": (reader.cut, "message.eml", "message/rfc822", content),
                 "seed": hashlib.sha256(body).hexdigest()}
    return mail


def end_of_mbox_lines(content: bytes) -> int:
    found = MBOX.match(content)
    return found.end() if found else 0


def split_parts(content: memoryview, boundary: str, most: int) -> list[memoryview]:
    """The parts between the lines of a boundary (RFC 2046 5.1.1), `most` + 1 of them at most.

    The line end before a boundary is the boundary's. A missing last line ends nothing.
    """
    delimiter = b"--" + re.escape(boundary.encode("latin-1", "replace"))
    parts: list[memoryview] = []
    start = -1
    for found in re.finditer(delimiter + rb"(--)?[ \t]*\r?(?:\n|\Z)", content) if boundary else ():
        end = found.start()
        if end and content[end - 1:end] != b"\n":
            continue
        if start >= 0:
            end -= 2 if content[end - 2:end] == b"\r\n" else 1
            parts.append(content[start:max(start, end)])
        start = found.end()
        if found[1] or len(parts) > most:
            return parts
    return parts if start < 0 else [*parts, content[start:]]


def content_headers(headers: Headers) -> email.message.Message:
    """Those headers that begin with Content-, for email.message to read their parameters."""
    fields = email.message.Message()
    for name, value in headers:
        if name[:8].lower() == "content-":
            value = CONTROLS.sub(" ", header_text(value, None)).strip()
            if len(value) > 9999 or value.count(";") > 99:  # email's parameters are quadratic
                value = value[:9999].partition(";")[0]
            fields[name] = value
    return fields


def header_text(value: str, charset: str | None) -> str:
    """A header's 8-bit bytes, here as Latin-1, in UTF-8 or else the charset of the body."""
    is_bytes = not value.isascii() and max(value) <= "\xff"
    return decode(value.encode("latin-1"), "utf-8", charset) if is_bytes else value


def transfer_decoded(fields: email.message.Message, content: memoryview) -> bytes:
    """A part's content without its transfer encoding (RFC 2045 6); what is broken as it is."""
    name = str(fields.get("Content-Transfer-Encoding", "")).strip().lower()
    with contextlib.suppress(ValueError):
        if name == "base64":
            return base64_decoded(content)
        if name in TRANSFER_CODECS:
            return codecs.decode(content, TRANSFER_CODECS[name])
    return bytes(content)


def base64_decoded(content: memoryview) -> bytes:
    """RFC 2045 6.8: what is no base64 does not count; an end that is missing is cut off."""
    with contextlib.suppress(binascii.Error):
        return binascii.a2b_base64(content)
    letters = re.sub(rb"[^A-Za-z0-9+/]", b"", content)
    return binascii.a2b_base64(letters[:len(letters) - (len(letters) % 4 == 1)] + b"===")


def return_path(headers: Headers) -> str | None:
    """MAIL FROM as the last server wrote it: only the first header can be its, none below it."""
    is_first = headers and headers[0][0].lower() == "return-path" and headers[0][1].strip()
    return headers[0][1] if is_first else None


# -----------------------------------------------------------------------------------------
# Read, providers: a card, and how its posts are recognised. What providers call the same
# thing is one table; what is odd about one is a function, `mend`. Where the mail lies deeper
# in the post, `place` is the path. A post with the whole mail (`raw`) is read from that alone.

CANONICAL = {"from", "from_name", "subject", "text", "html", "message_id", "in_reply_to",
             "references", "headers", "envelope", "to", "cc", "attachments"}
# Canonical name, or header (with a capital) → what providers call it, in lower case and without
# punctuation; of several the first that holds something.
SPELLINGS = {name: tuple(words.split()) for name, words in {
    "from": "fromfull fromemail from", "from_name": "fromname", "subject": "subject",
    "to": "tofull to recipients.to.data", "cc": "ccfull cc",
    "text": "textbody rawtextbody textpart bodyplain plainbody plain text body.text "
            "body.plaintext parseddata.textBody",
    "html": "htmlbody rawhtmlbody htmlpart bodyhtml html body.html parseddata.htmlBody",
    "message_id": "messageid", "In-Reply-To": "inreplyto", "References": "references",
    "headers": "messageheaders customheaders headerlines headers parseddata.headers",
    "verdict": "spamscore spamstatus spamreport.score spamassassinscore isspam "
               "receipt.dmarcVerdict.status",
    "Date": "date sentatdate", "Reply-To": "replyto", "Auto-Submitted": "autosubmitted",
    "X-Postal-Bounce": "bounce",
}.items()}
FILES = ("files", "attachments", "images", "inlines", "embeddedmedia", "parseddata.attachments")


@dataclass(frozen=True)
class Provider:
    """How a provider posts mail; `key` is a field that each of its posts has."""

    name: str
    key: str
    when: Callable[[Row], Any] = bool
    place: str = ""                                     # path of the mail in a post
    envelope_from: str = ""                             # path of MAIL FROM
    raw: str = ""                                       # path of the whole mail
    members: Callable[[Row], list[Any]] | None = None   # the mails of a batch
    mend: Callable[[Row, Mail], Any] | None = None      # (post, what was found in it)
    fields: Row = field(default_factory=dict)           # canonical name → path, if another


def squeezed(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def mend_mailgun(post: Row, mail: Mail) -> None:
    """{content-id: field} has keys that repeat; json.loads would keep the last."""
    pairs: list[Any] = []
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        json.loads(str(post.get("content-id-map"))[:HEAVY], object_pairs_hook=pairs.extend)
    names = {field: key for key, field in pairs if isinstance(field, str)}
    for file in post.get("files", ()):
        file["cid"] = names.get(file["field"])


def mend_sendgrid(post: Row, mail: Mail) -> None:
    infos = json_in(post.get("attachment-info"))
    for file in post.get("files", ()):
        info = at(infos, file["field"])
        file["cid"] = at(info, "content-id")
        file["filename"] = file["filename"] or at(info, ("filename", "name"))


def mend_postal(post: Row, mail: Mail) -> None:     # what strip_replies cut off is put back
    texts = [post.get("plain_body"), post.get("replies_from_plain_body")]
    mail["text"] = "\n".join(text for text in texts if text and isinstance(text, str))


def mend_mailjet(post: Row, mail: Mail) -> None:    # names in one place, contents in another
    mail["attachments"] = []
    for part in items_of(post.get("Parts")):
        place = at(part, "ContentRef")      # a part that holds parts has none
        if isinstance(place, str) and place not in ("Text-part", "Html-part"):
            fields = content_headers(raw_headers_of(part.get("Headers"), {}))
            mail["attachments"].append({
                "filename": fields.get_filename(), "type": fields.get_content_type(),
                "cid": fields.get("Content-ID"), "content": post.get(place)})


def mend_mox(post: Row, mail: Mail) -> None:
    mail["attachments"] = named_parts(post.get("Structure"))
    if at(post, "Meta.Automated") is True:
        mail["Auto-Submitted"] = "auto-generated"


def named_parts(part: Any) -> list[Any]:
    inner = [each for part in items_of(at(part, "Parts")) for each in named_parts(part)]
    return [part] if at(part, "Filename") else inner


PROVIDERS = (
    # Mandrill. Requires: an inbound domain. Authenticates by: ?secret=. Answers: 200, else
    # tried again. Configure: Inbound › Domains › Routes. It probes the URL with HEAD first.
    Provider("Mandrill", "mandrill_events", raw="raw_msg",
             when=lambda post: isinstance(json_in(post["mandrill_events"]), list),
             members=lambda post: [
                 at(event, "msg") for event in json_in(post["mandrill_events"])
                 if at(event, "event") in (None, "inbound") and at(event, "type") is None]),
    # Mailgun. Requires: a route. Authenticates by: ?secret=. Answers: 200; 406 is final, all
    # else tried again for 8 h. Configure: Receiving › Routes › forward(). A URL that ends in
    # `mime` gets the whole mail.
    Provider("Mailgun", "timestamp", envelope_from="sender", raw="body-mime", mend=mend_mailgun,
             when=lambda post: "signature" in post and {"body-mime", "message-headers"} & {*post}),
    # SendGrid. Requires: Inbound Parse. Authenticates by: ?secret= or Basic. Answers: 2xx; 5xx
    # is tried again for 3 days, 4xx is final. Configure: Settings › Inbound Parse.
    Provider("SendGrid", "envelope", envelope_from="envelope.from", raw="email",
             mend=mend_sendgrid,
             when=lambda post: isinstance(post["envelope"], str) and "message_id" not in post),
    # CloudMailin. Requires: an address. Authenticates by: Basic or ?secret=. Answers: 2xx; 4xx
    # bounces the mail, 5xx lets the sender's server try again. Configure: the target.
    Provider("CloudMailin", "envelope", envelope_from="envelope.from", raw="message",
             when=lambda post: isinstance(post["envelope"], dict) and not (
                 {"from", "text", "message_id"} & {*post})),
    # Its deprecated multipart format "original".
    Provider("CloudMailin", "message", envelope_from="from", raw="message",
             when=lambda post: isinstance(post["message"], bytes) and "plain" in post),
    # Postal. Requires: an HTTP endpoint. Authenticates by: ?secret= or Basic. Answers: 2xx;
    # 4xx bounces, 5xx is tried again. Configure: Routing › HTTP endpoints.
    Provider("Postal", "rcpt_to", envelope_from="mail_from", raw="message", mend=mend_postal,
             when=lambda post: "mail_from" in post),
    # SparkPost. Requires: a relay webhook. Authenticates by: ?secret=, Basic or a custom
    # header. Answers: 200, else tried again. Configure: POST /api/v1/relay-webhooks.
    Provider("SparkPost", "events", place="content", envelope_from="msg_from",
             raw="content.email_rfc822", fields={"from": "friendly_from"},
             when=lambda post: any(at(event, "msys") is not None for event in post["events"]),
             members=lambda post: [
                 at(event, "msys.relay_message") for event in post["events"]
                 if at(event, "msys.relay_message") is not None or at(event, "msys") is None]),
    # Amazon SES. Requires: a receipt rule whose SNS action carries the mail (150 KB at most).
    # Authenticates by: ?secret= or Basic. Answers: 200; 5xx is tried again. Configure: an
    # HTTPS subscription, then open the SubscribeURL that `inbound rejected` shows.
    Provider("Amazon SES", "notificationType", envelope_from="mail.source", raw="content",
             when=lambda post: post["notificationType"] == "Received" and "content" in post),
    # SocketLabs. Requires: `account set validation_key=…`, and its Secret Key as our secret.
    # Authenticates by: SecretKey in the body. Answers: 200, always with the Validation Key.
    # Configure: Inbound API › the URL as it is.
    Provider("SocketLabs", "InboundMailFrom", place="Message", envelope_from="InboundMailFrom",
              when=lambda post: "Message" in post),
    # Postmark. Requires: an inbound stream. Authenticates by: ?secret= or Basic. Answers: 200;
    # all but 403 is tried again for 10 h. Configure: the stream's webhook. MessageID is its own.
    Provider("Postmark", "FromFull", raw="RawEmail", fields={"message_id": ""}),
    # Brevo. Requires: inbound parsing. Authenticates by: ?secret=, Basic or a header. Answers:
    # 2xx; 4xx is final. Configure: POST /v3/webhooks, type inbound. Of attachments only the
    # names are posted.
    Provider("Brevo", "items", when=lambda post: "from" not in post,
             members=lambda post: items_of(post["items"])),
    # Mailjet. Requires: the Parse API. Authenticates by: ?secret= or Basic. Answers: 200, else
    # tried again. Configure: POST /v3/REST/parseroute with the Url.
    Provider("Mailjet", "Recipient", envelope_from="Sender", mend=mend_mailjet,
             when=lambda post: "Sender" in post),
    # MailerSend. Requires: an inbound route. Authenticates by: ?secret=. Answers: 2xx within
    # 3 s; all else is final. Configure: the route's POST URL. data.id is MailerSend's own.
    Provider("MailerSend", "type", place="data", envelope_from="data.sender.email",
             raw="data.raw", when=lambda post: post["type"] == "inbound.message"),
    # Forward Email. Requires: a webhook as an alias's recipient. Authenticates by: ?secret=.
    # Answers: exactly 200. Configure: the alias.
    Provider("Forward Email", "session", envelope_from="session.sender",
             when=lambda post: "headerLines" in post),
    # mailparser, the parser of Node's nodemailer, in a script of your own.
    Provider("mailparser", "headerLines"),
    # ImprovMX. Requires: an alias that is a webhook. Authenticates by: ?secret=. Answers: 2xx,
    # else tried three times in all. Configure: the alias's destination.
    Provider("ImprovMX", "message-id", envelope_from="return-path.email",
             when=lambda post: "return-path" in post),
    # AhaSend. Requires: an inbound route. Authenticates by: ?secret=. Answers: 2xx.
    # Configure: the route's webhook. data.id is AhaSend's own.
    Provider("AhaSend", "type", place="data",
             when=lambda post: post["type"] == "message.routing"),
    # Lettermint. Requires: an inbound route. Authenticates by: ?secret=. Answers: 2xx.
    # Configure: the route's webhook. data.message_id is its own.
    Provider("Lettermint", "event", place="data", fields={"message_id": ""},
             when=lambda post: post["event"] == "message.inbound"),
    # Inbound.new. Requires: an endpoint. Authenticates by: ?secret=. Answers: 2xx. Configure:
    # the endpoint's URL. Attachments are posted by URL.
    Provider("Inbound.new", "email", place="email",
             when=lambda post: post.get("event") == "email.received"),
    # AgentMail. Requires: an inbox. Authenticates by: ?secret=. Answers: 2xx. Configure: a
    # webhook for message.received. Attachments are not in the post.
    Provider("AgentMail", "event_type", place="message",
             when=lambda post: str(post["event_type"]).startswith("message.received")),
    # MailPace. Requires: an inbound endpoint. Authenticates by: ?secret=. Answers: 2xx.
    # Configure: the domain's inbound URL.
    Provider("MailPace", "raw", raw="raw", when=lambda post: "message_id" not in post),
    # mox, a mail server. Requires: an account's incoming webhook. Authenticates by: ?secret=
    # or its Authorization setting. Answers: 200. It posts neither headers nor attachments.
    Provider("mox", "Meta", envelope_from="Meta.MailFrom", mend=mend_mox,
             when=lambda post: "MessageID" in post),
    # Maileroo. Requires: inbound routing. Authenticates by: ?secret=. Answers: 2xx.
    # Configure: the route's webhook. Attachments are posted by URL.
    Provider("Maileroo", "envelope_sender", envelope_from="envelope_sender"),
    # Customers Mail Cloud (HENNGE). Requires: a webhook. Authenticates by: ?secret=. Answers:
    # 200. Configure: the domain's receive webhook.
    Provider("Customers Mail Cloud", "server_composition", envelope_from="envelope-from"),
    # mailcast.io. Requires: a route with the fields email and return_path. Authenticates by:
    # ?secret=. Answers: 2xx.
    Provider("mailcast.io", "return_path", envelope_from="return_path", raw="email",
             when=lambda post: "email" in post),
    # postal-mime, what a Cloudflare Email Worker posts. Authenticates by: ?secret= or a header.
    Provider("postal-mime", "headers", envelope_from="returnPath",
             when=lambda post: isinstance(post.get("from"), dict) and "message_id" not in post),
)

# What brings no mail: events, by their names; and what only says that there is a mail.
EVENT = re.compile(
    r"(?i)(?:email\.|message\.?)?(?:.*(?:activity|click|complain|contact|deferred|deliver|domain|list_|"
    r"drop|fail|held|open|process|sent|spam_report|subscri|bounce|track|queued).*|validation)")
METADATA_ONLY = {
    "Resend": "data.email_id", "Emailit": "data.object", "Mailtrap": "events.0.event",
    "MailSlurp": "emailId", "Gmail": "subscription", "Nylas": "specversion",
    "Microsoft Graph": "value.0.subscriptionId"}


def notice_in(post: Row) -> str:
    """What a post without a mail is, in words; Refused 422 for one that tells of a mail only."""
    if "SubscribeURL" in post:
        return "an SNS subscription: open the SubscribeURL that `inbound rejected show` prints"
    if "notificationType" in post and post["notificationType"] == "Received":
        raise Refused(422, "this SES notice has no `content`: use an SNS action, not S3")
    name = at(post, ("event", "type", "event_type", "RecordType", "Type", "notificationType",
                     "event-data.event", "events.0.event"))
    if isinstance(name, str) and ("TopicArn" in post or EVENT.fullmatch(name)):
        return f"an event, no mail: {printable(name)[:80]}"
    for provider, path in METADATA_ONLY.items():
        if at(post, path) is not None:
            raise Refused(422, f"{provider} posts neither text nor headers, only that there is a "
                               "mail: have it forwarded to another provider or `inbound relay`")
    return ""


def mail_of(provider: Provider, post: Any) -> Mail:
    """The canonical dict of a post whose fields live where `provider` says."""
    if not isinstance(post, dict):
        raise ValueError(f"a mail of the batch is {type(post).__name__}, expected an object")
    found = at(post, provider.place) if provider.place else post if provider.key else {}
    known = {squeezed(name): value for name, value in found.items()} if isinstance(
        found, dict) else {}
    mail: Mail = {name: at(known, paths) for name, paths in SPELLINGS.items()}
    mail["attachments"] = [file for name in FILES for file in items_of(
        json_in(at(known, name)) or at(known, name)) if isinstance(file, dict)]
    mail |= {name: at(post, path) for name, path in provider.fields.items()}
    if provider.mend:
        provider.mend(post, mail)
    if not any(mail.values()) and not provider.raw:
        raise ValueError("nothing in it reads as a mail")
    told = {"verdict": str(mail["verdict"] or "")[:500]}
    if provider.envelope_from:
        told["envelope"] = {"from": at(post, provider.envelope_from)}
    if raw := raw_mail_of(at(post, provider.raw)):
        return {"envelope": None} | mail_of_mime(raw) | told
    headers = raw_headers_of(mail.get("headers"), {})
    first = {name.lower(): value for name, value in reversed(headers)}
    for name in [name for name in mail if name[0].isupper()]:
        value = mail.pop(name)
        if value and name.lower() not in first:
            headers += raw_headers_of({name: value}, {})
    for name in ("from", "to", "cc"):
        mail[name] = mailbox_texts(mail.get(name)) or first.get(name)
    mail["subject"] = mail.get("subject") or first.get("subject")
    mail["message_id"] = first.get("message-id") or mail.get("message_id")
    return mail | {"headers": headers, "envelope": {"from": return_path(headers)}} | told


def canonical_mail(fields: Row) -> Mail:
    """The canonical body with what harmlessly reads: mailboxes as objects, To in the headers."""
    mail = {**fields, "verdict": ""}
    for name in ("from", "to", "cc"):
        if isinstance(mail.get(name), (dict, list)):
            mail[name] = mailbox_texts(mail[name]) or mail[name]
        elif name != "from" and not mail.get(name):
            headers = raw_headers_of(mail.get("headers"), {})
            mail[name] = ", ".join(header_values(headers, name))
    return mail


def raw_mail_of(value: Any) -> bytes:
    """A whole mail, from text, bytes or base64; b"" where there is none."""
    content = value.encode("utf-8", "ignore") if isinstance(value, str) else value
    if not isinstance(content, bytes):
        return b""
    # No base64 has a colon, and no mail is without one.
    return content if b":" in content[:2000] else base64_decoded(memoryview(content))


def mailbox_texts(value: Any) -> str:
    """An address header's text, of text, {name, address} in any spelling, or a list of such."""
    texts = []
    value = at(value, ("value", "addresses")) or value      # mailparser's, Inbound.new's
    for item in items_of(value):
        item = item[0] if isinstance(item, list) and item else item     # Mandrill: [address, name]
        if isinstance(item, dict):
            known = {squeezed(name): each for name, each in item.items()}
            name = str(at(known, ("name", "friendlyname")) or "").translate(UNQUOTED)
            address = at(known, ("address", "email", "emailaddress"))
            item = f'"{name}" <{address}>' if address else ""
        if isinstance(item, str) and item:
            texts.append(item)
    return ", ".join(texts)


UNQUOTED = str.maketrans({'"': "'", "\\": None})


# -----------------------------------------------------------------------------------------
# Normalise: canonical dict → Message. Text is cleaned once, here, and trusted from here on.

# Quoted local parts and address literals are stored, but never written to.
ADDR_SPEC = re.compile(r'(?:[^\s<>()\[\],;:\\"@]+|"[^"\r\n]+")'
                       r'@(?:[^\s<>()\[\],;:\\"@]+|\[[^\s\[\]<>]+\])|mailer-daemon', re.I)
LONE_ADDR_SPEC = re.compile(r'[^@]*?([^\s<>()\[\],;:\\"\'@]+@[^\s<>()\[\],;:\\"\'@]+)[^@]*')
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
NAME_ADDR = re.compile(r'((?:"(?:[^"\\]|\\.)*"|[^"<>])*)<([^<>]*)>\s*(?:\([^()]*\))?')
MESSAGE_IDS = re.compile(r'<([^<>]+)>|([^\s<>,;"()]+)')
WORD = r"=\?[^?\s]+\?[bq]\?(?:[^=?]|=(?!\?[^=])|\?(?!=))*\?="     # ends before the next `=?`
WORDS = re.compile(rf"{WORD}(?:\s*{WORD}){{0,99}}", re.I)       # decode_header is quadratic
CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]+ ?")  # RFC 5322 2.2.3: a fold is a space
PLAIN = re.compile(r"(?:[ -<>-~]|=(?!\?))*")                    # a value with nothing to do
UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def normalise(mail: Mail, is_strict: bool) -> Message:
    """The Message that a canonical dict describes.

    `is_strict` is for the canonical body itself: Refused 422 lists every field that is missing
    or of the wrong type. Elsewhere such a field costs nothing but a note.
    """
    faults: Faults = {}
    notes: list[str] = []
    text, markup, subject, from_name = (text_of(mail, name, faults) for name in (
        "text", "html", "subject", "from_name"))
    headers = [[one_line(name), one_line(value)]
               for name, value in raw_headers_of(mail.get("headers"), faults)]
    attachments = attachments_of(mail.get("attachments"), faults)
    envelope_from = envelope_sender(mail.get("envelope"), faults)
    from_count, name, address = author_of(mail, envelope_from, faults, notes)
    subject = one_line(subject) or "(no subject)"
    digest = digest_of(address, subject, text, markup, attachments, mail.get("seed"))
    message_id = message_id_of(mail, digest, headers, faults)
    for each in ("in_reply_to", "references", "to", "cc"):
        if not isinstance(mail.get(each), (str, list, type(None))):
            faults[each] = f"expected a string or a list, not {type(mail[each]).__name__}"
    sentences = [f"{name}: {fault}" for name, fault in faults.items()]
    if is_strict and CANONICAL & faults.keys():
        raise Refused(422, "; ".join(sentences), faults)
    if "whole" in mail:
        cut, filename, kind, content = mail["whole"]
        attachments.append(Attachment(filename, kind, "", content))
        notes.append(f"{cut}: the whole of it is attached as {filename}")
    parents = mail.get("in_reply_to") or header_values(headers, "in-reply-to")
    references = mail.get("references") or header_values(headers, "references")
    return Message(
        message_id=message_id, digest=digest, in_reply_to=ids_of(parents),
        references=ids_of(references), from_address=address, from_count=from_count,
        from_name=one_line(from_name) or name, envelope_from=envelope_from,
        to=addresses_of(mail.get("to")), cc=addresses_of(mail.get("cc")), subject=subject,
        text=text if text.strip() else html_to_text(markup, notes), html=markup or None,
        headers=headers, notes=notes + sentences, attachments=attachments,
        verdict=mail.get("verdict", ""))


def author_of(mail: Mail, envelope_from: str | None, faults: Faults,
              notes: list[str]) -> tuple[int, str, str]:
    """(mailboxes that From names, name, address); where it names none, another stands for it."""
    written = text_of(mail, "from", faults)
    lone = LONE_ADDR_SPEC.fullmatch(written[:MAX_ADDRESS_HEADER])
    mailboxes = mailboxes_of(written) or ([("", lone[1])] if lone else [])
    if mailboxes:
        return len(mailboxes), *mailboxes[0]
    shown = repr(written) if len(written) < 100 else "a long text"
    fault = f"expected an address, not {shown}" if written else "required"
    if not envelope_from:
        faults.setdefault("from", fault)
        return 0, "", "MAILER-DAEMON"
    notes.append(f"from: {fault}; the envelope sender stands for it")
    return 0, "", envelope_from


def message_id_of(mail: Mail, digest: str, headers: Headers, faults: Faults) -> str:
    """The Message-ID with its brackets, of any length; one made of the content where it lacks."""
    written = text_of(mail, "message_id", faults)
    for found in ids_of(written) or ids_of("<%s>" % written.strip(' <>"')):
        return found
    faults.setdefault("message_id", "required")
    # The Date, where there is one, tells two mails of the same words apart.
    seed = "".join([digest, *header_values(headers, "date")])
    return f"<{hashlib.sha256(seed.encode()).hexdigest()[:32]}@missing.invalid>"


def clean(text: str) -> str:
    """Drop what SQLite, SMTP and JSON each stumble over: NUL and lone surrogates."""
    return UNSTORABLE.sub("", text) if UNSTORABLE.search(text) else text


def one_line(text: str) -> str:
    """A header's value in one line: unfolded, RFC 2047 words decoded, controls blanked."""
    if not PLAIN.fullmatch(text):
        text = WORDS.sub(lambda run: decoded_words(run[0]), CONTROLS.sub(" ", clean(text)))
        text = CONTROLS.sub(" ", clean(text))
    return text.strip()


def text_of(mail: Mail, name: str, faults: Faults) -> str:
    """The cleaned text of a field, "" when absent. A number is its text, another type a fault."""
    value = mail.get(name)
    if type(value) in (int, float):
        value = str(value)
    if not isinstance(value, (str, type(None))):
        faults[name] = f"expected a string, not {type(value).__name__}"
        value = None
    return clean(value or "")


def decoded_words(text: str) -> str:
    """Decode a run of RFC 2047 encoded-words; what is broken stays as it is."""
    with contextlib.suppress(ValueError, email.errors.MessageError):
        return "".join(word if isinstance(word, str) else decode(word, charset)
                       for word, charset in email.header.decode_header(text))
    return text


# What mail calls a charset, by the codec that it means: the WHATWG encoding standard's labels.
# The last four decode in quadratic time or run escapes, and nobody writes mail in them.
CODECS = {label: codec for codec, labels in (
    ("cp1252", "iso-8859-1 iso8859-1 latin1 latin-1"), ("cp1254", "iso-8859-9"),
    ("cp874", "iso-8859-11 tis-620"),
    ("gb18030", "gb2312 gb-2312-80 gbk x-gbk euc-cn cp936"),
    ("cp949", "euc-kr ks-c-5601-1987 ks-c-5601 ksc5601 korean windows-949"),
    ("cp932", "shift-jis sjis x-sjis windows-31j ms-kanji"),
    ("big5hkscs", "big5 x-x-big5 cn-big5"),
    ("utf-8", "us-ascii ascii unknown-8bit x-unknown"),
    ("utf-8", "punycode idna unicode-escape raw-unicode-escape"),
) for label in labels.split()}
MULTIBYTE = ("gb", "cp932", "cp949", "big5", "euc", "hz", "iso2022", "johab", "utf-16", "utf-32")


@functools.lru_cache(200)
def codec_of(charset: str) -> str:
    """Python's name of a charset as mail labels it; LookupError when nobody knows it."""
    label = re.sub("[^a-z0-9]+", "-", charset.lower()[:100]).strip("-")
    label = CODECS.get(label, re.sub("^cp-", "cp", label))
    name = codecs.lookup(label).name
    b"".decode(name)        # LookupError for what is no text
    return name


def decode(content: bytes, charset: str | None, fallback: str | None = None) -> str:
    """The text of bytes in the charset claimed; unlabelled, as UTF-8 or else in `fallback`.

    A label of several bytes a character is believed where a byte is broken, any other is not.
    """
    for each in (charset or "utf-8", fallback):
        with contextlib.suppress(LookupError, ValueError):
            name = codec_of(each or "")
            return content.decode(name, "replace" if name.startswith(MULTIBYTE) else "strict")
    text = content.decode("utf-8", "replace")
    is_utf_8 = re.search("[^\0-\x7f\ufffd]", text)        # but for a broken byte
    return text if is_utf_8 else content.decode("cp1252", "replace")


def raw_headers_of(value: Any, faults: Faults) -> Headers:
    """[[name, value], …] as posted, order and repeats kept, at most MAX_HEADER_LINES.

    From an object (values string, list or null), a list of pairs, of {Name, Value}, of {line},
    of one-key objects or of lines; as text, a JSON list of these or a header block.
    """
    if isinstance(value, str):
        block = value.encode("utf-8", "ignore")
        value = json_in(value) or [[name, header_text(text, None)]
                                   for name, text in MimeReader().head_of(memoryview(block))[0]]
    if not isinstance(value, (dict, list, type(None))):
        faults["headers"] = f"expected an object of names and values, not {type(value).__name__}"
    pairs: list[Any] = [*value.items()] if isinstance(value, dict) else []
    for item in value if isinstance(value, list) else ():
        pairs += header_pairs(item, faults)
    # CloudMailin writes message_id; beside a name with a hyphen `_` is the sender's own.
    dash = "_" if any("-" in str(name) for name, _ in pairs) else "-"
    headers = [[str(name).replace("_", dash), str(text)] for name, content in pairs
               for text in (items_of(content) or [content]) if text is not None]
    if len(headers) > MAX_HEADER_LINES:
        faults["headers"] = f"more than {MAX_HEADER_LINES} of them: the rest is not kept"
    return headers[:MAX_HEADER_LINES]


def header_pairs(item: Any, faults: Faults) -> list[Any]:
    """(name, value) pairs of an item of a header list, however its provider writes one."""
    line = at(item, "line") or item
    if isinstance(line, str):
        return [line.partition(":")[::2]]
    if isinstance(item, list) and len(item) == 2:
        return [item]
    if isinstance(item, dict):
        if name := at(item, ("name", "Name", "key", "Key")):
            return [(name, at(item, ("value", "Value")))]
        if len(item) == 1 and "value" not in item:
            return [*item.items()]
    faults["a header"] = f"expected a name and a value, not {printable(str(item))[:99]}"
    return []


def header_values(headers: Headers, name: str) -> list[str]:
    """All values of the header `name` (lower case), in order."""
    return [value for header, value in headers if header.lower() == name]


def mailboxes_of(value: str) -> list[tuple[str, str]]:
    """[(name, addr-spec), …] of an address header (RFC 5322 3.4); [] where it is unclear.

    Providers post decoded names without their quotes (`Doe, John <j@example.org>`), so one
    address in brackets at the end is taken for what it looks like before email.utils is asked.
    """
    value = value[:9999].replace("&lt;", "<").replace("&gt;", ">")
    value = CONTROLS.sub(" ", value)[:MAX_ADDRESS_HEADER].strip()
    found = NAME_ADDR.fullmatch(f"<{value}>" if ADDR_SPEC.fullmatch(value) else value)
    if found and not ("," in (bare := QUOTED.sub("", found[1])) and "@" in bare):
        name = QUOTED.sub(lambda quoted: re.sub(r"\\(.)", r"\1", quoted[1]), found[1])
        pairs = [(name, found[2].strip())]
    else:
        pairs = []
        with contextlib.suppress(ValueError, RecursionError, IndexError):
            pairs = email.utils.getaddresses([value])
        # `alice@example.org)bob@example.net` is Alice to some versions (CVE-2023-27043): each
        # @ that is not in quotes or a comment has to be part of one of the addresses.
        bare = QUOTED.sub("", re.sub(r"\([^()]*\)", "", value))
        if bare.count("@") != sum("@" in address for _, address in pairs):
            return []
    # The library makes `bb@bug.exampleBigBug` of an address with words behind it.
    return [(one_line(name), address) for name, address in pairs
            if ADDR_SPEC.fullmatch(address) and address in value]


def addresses_of(value: Any) -> list[str]:
    """The addresses of To or Cc, for display: from a header's text or a list of such."""
    return [address for text in items_of(value)[:MAX_FIELDS] if isinstance(text, str)
            for _, address in mailboxes_of(clean(text))]


def envelope_sender(envelope: Any, faults: Faults) -> str | None:
    """MAIL FROM of `{from, to}`: "" = null sender, None = unknown."""
    value = envelope.get("from") if isinstance(envelope, dict) else envelope
    if value is None:
        return None
    if not isinstance(value, str) or not isinstance(envelope, dict):
        faults["envelope"] = "expected an object whose `from` is a string or null"
        return None
    value = clean(value).strip()
    for _, address in mailboxes_of(value):
        return address
    return "" if value in ("", "<>") else None


def ids_of(value: Any) -> list[str]:
    """The message-ids of In-Reply-To or References: each once, in order, with brackets.

    RFC 5322 3.6.4, and what is seen: lists, folding inside the brackets, `&lt;`, missing
    brackets. Of many, the first 20 and the last 80.
    """
    text = " ".join(text for text in items_of(value) if isinstance(text, str))
    ids: dict[str, None] = {}
    text = clean(text).replace("&lt;", "<").replace("&gt;", ">")
    for bracketed, bare in MESSAGE_IDS.findall(text) if text else ():
        identifier = "".join(bracketed.split()) or "@" in bare[1:-1] and bare.strip("'")
        if identifier:
            ids[f"<{identifier}>"] = None
    known = [*ids]
    return known[:FIRST_REFERENCES] + known[FIRST_REFERENCES:][-LAST_REFERENCES:]


def attachments_of(value: Any, faults: Faults) -> list[Attachment]:
    """The attachments of a list of objects, whatever a provider calls their fields."""
    if not isinstance(value, (list, type(None))):
        faults["attachments"] = f"expected a list, not {type(value).__name__}"
        return []
    attachments = []
    for item in (value or [])[:MAX_PARTS]:
        if isinstance(item, dict):
            attachments.append(attachment_of({squeezed(key): item[key] for key in item}))
        else:
            faults["attachments"] = f"expected objects in it, not {type(item).__name__}"
    return attachments


def attachment_of(item: Row) -> Attachment:
    """The attachment of an object whose names are squeezed."""
    name, kind, content_id = (one_line(str(at(item, names) or "")) for names in (
        ("filename", "name"), ("contenttype", "mimetype", "type"), ("contentid", "cid")))
    content, note = item.get("content", item.get("data")), "not kept: its content is not posted"
    try:
        if isinstance(content, dict):       # Node's Buffer: {"type": "Buffer", "data": [ints]}
            content = bytes(content["data"])
        elif isinstance(content, str):
            is_text = item.get("base64") is False or item.get("encoding") == "utf8"
            content = content.encode("utf-8", "ignore") if is_text else base64_of(content)
    except (ValueError, TypeError, KeyError) as error:
        content, note = None, f"not kept, its content is broken: {error}"
    is_kept = isinstance(content, bytes)
    return Attachment(
        # A name is text to show, never a path: cut off is all before the last separator.
        filename=re.split(r"[/\\]", name)[-1],
        content_type=kind.partition(";")[0].strip().lower() or "application/octet-stream",
        content_id=content_id.strip("<> "),
        content=content if is_kept else None,
        note="" if is_kept else note)


def base64_of(text: str) -> bytes:
    """Base64 in JSON, in both alphabets (RFC 4648 5), without padding, or as a `data:` URI."""
    if text.startswith("data:"):
        text = text[text.index(",") + 1:]
    if not text.isalnum():      # RFC 2045 6.8: line breaks do not count
        text = "".join(text.split()).replace("-", "+").replace("_", "/")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def digest_of(from_address: str, subject: str, text: str, markup: str,
              attachments: list[Attachment], seed: str | None) -> str:
    """SHA-256 of what the sender wrote; nothing in it changes when the mail is posted again.

    The same in every version, or a repeat of an older mail would be a second message.
    """
    parts = [from_address.lower(), subject, text, markup]
    parts += [f"{item.filename}:{item.sha256}" for item in attachments] + [seed or ""][:bool(seed)]
    parts = [part.replace("\r\n", "\n") for part in parts]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# To the end where they are not closed, so that nothing is ever looked at twice.
HIDDEN = re.compile(r"(?is)<!--(?:>|.*?-->|.*)|<(script|style|title)\b(?:.*?</\1\s*>|.*)")
BREAKS = frozenset((
    "address article aside blockquote br caption dd div dl dt figcaption figure footer form h1 h2 "
    "h3 h4 h5 h6 header hr li main nav ol p pre section table tr ul").split())
LONG_NUMBER = re.compile("&#(?:[0-9]{8,}|[xX][0-9a-fA-F]{8,});?")


VERBATIM = {ord(" "): 0, ord("\t"): 1}        # what no text has stands for blanks that count


def html_to_text(markup: str, notes: list[str] | None = None) -> str:
    """The text of HTML: no scripts or styles, links and line breaks kept, cells apart.

    One pass over tags and text. We do not use html.parser: it takes 11 s for 160 KB of `<!--`
    and raises on `<![<![` (measured, Python 3.11.7).
    """
    visible = HIDDEN.sub("", markup)
    if len(visible) > MAX_HTML and notes is not None:
        notes.append(f"the text is made of the first {MAX_HTML} characters of the HTML")
    pieces, link, is_verbatim = [], "", False
    for piece in re.split("(<[/!?a-zA-Z][^<>]*>)", visible[:MAX_HTML]):
        found = re.match("</?([a-zA-Z!?][a-zA-Z0-9-]*)", piece)
        tag = found[1].lower() if found else ""
        if not tag:
            text = html.unescape(LONG_NUMBER.sub("\ufffd", piece))
            pieces.append(text.translate(VERBATIM) if is_verbatim else re.sub(r"\s+", " ", text))
        elif tag == "a":
            if link and link not in "".join(pieces[-3:]):
                pieces.append(f" ({link})")
            link = attribute_of(piece, "href").removeprefix("mailto:")
            link = "" if link.startswith("#") else link
        elif tag == "img":
            pieces.append(attribute_of(piece, "alt"))
        elif tag in ("td", "th"):
            pieces.append(" ")
        elif tag in BREAKS:
            pieces.append("\n")
            is_verbatim = piece[1] != "/" if tag == "pre" else is_verbatim
    lines = [" ".join(line.split()) for line in "".join(pieces).split("\n")]
    text = re.sub("\n{3,}", "\n\n", "\n".join(lines)).strip()
    return text.translate({new: old for old, new in VERBATIM.items()})


def attribute_of(tag: str, name: str) -> str:
    found = re.search(rf"""\s{name}\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""", tag, re.I)
    value = next(filter(None, found.groups()), "") if found else ""
    return html.unescape(LONG_NUMBER.sub("\ufffd", value)).strip()


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
        return self.headers.get(name, [""])[0]


Test = Callable[[Evidence], object]
Sign = tuple[str, Test, str]        # kind, whether it holds, reason with the source


def keyword(value: str) -> str:
    """The first token of a header's value, lower case.

    RFC 3834 5.1: comments may stand before and after the keyword, parameters behind a
    semicolon. A stray colon before it is seen in the wild.
    """
    value = value[:300]     # a keyword stands in front; nested comments cost a pass each
    while (stripped := re.sub(r"\([^()]*\)", " ", value)) != value:
        value = stripped
    return value.partition(";")[0].strip(' \t:"\'').lower()


def matching(names: str, pattern: str, by: Callable[..., str] = keyword) -> Test:
    """Whether of these headers (lower case) a value, read by `by`, matches as a whole."""
    compiled = re.compile(pattern, re.I)
    keys = names.split()

    def holds(mail: Evidence) -> bool:
        for key in keys:
            for value in mail.headers.get(key, ()):
                if compiled.fullmatch(by(value)):
                    return True
        return False

    return holds


def header(kind: str, names: str, pattern: str, reason: str,
           by: Callable[..., str] = keyword) -> Sign:
    return kind, matching(names, pattern, by), reason


def any_of(*phrases: str) -> str:
    return "(?:" + "|".join(phrases) + ")"


DAEMON = "mailer-daemon|mail-daemon|mdaemon"
POSTMASTER = "post[-_.]?master"
LIST_SENDER = any_of(
    "owner-.+", ".+[-+]owner(?:[-+].*)?", ".+-request", ".+-bounces?",
    "bounces?(?:[+=-].*)?", ".*noreply.*", "(?:.*[-_.+])?no[-_.]repl(?:y|ies).*")
is_daemon = re.compile(DAEMON).fullmatch
is_postmaster = re.compile(POSTMASTER).fullmatch
is_list_sender = re.compile(LIST_SENDER).fullmatch
is_never_answered = re.compile(any_of(
    LIST_SENDER, DAEMON, POSTMASTER, ".*do[-_.]?not[-_.]?reply.*",
    "mailerdaemon", "no[-_.]?respond.*", "auto[-_.]?(?:reply|responder)", "nobody", "abuse",
    "root", "listserv", "majordomo", "mailman", "feedbackloop",
    "(?:prvs|srs[01])=.*")).fullmatch       # rewritten envelopes, no one's mailbox
REPLY = r"(?!\s*(?:re|aw|sv|antw(?:ort)?|res|fwd?|wg|tr|rv|enc|i)\s*:)"    # what it is not
is_vacation = re.compile(REPLY + any_of(
    r"(?:\[[^\]]*\]\s*)*" + any_of(
        "automatic reply", "auto(?:matic)?[- ]?(?:reply|response)",
        "out of (?:the )?office(?: autoreply| reply)?",
        "abwesenheitsnotiz", "automatische antwort",
        "réponse automatique", "absence du bureau",
        "respuesta automática", "resposta automática",
        "fuori sede", "risposta automatica",
        "automatiskt? svar", "frånvaro", "automatisch antwoord", "automaattinen vastaus",
        "automatická odpověď", "automatikus válasz", "automatyczna odpowiedź",
        "автоматический ответ", "自動応答", "自动回复", "自動回覆",
    ) + r"\s*(?:[:：].*|$)",
    r"(?:\[[^\]]*\]\s*)*auto\s*[:：].*",
    r".* is out of the office(?:\.| until .*| ?\(returning.*)?"), re.I).fullmatch
may_be_vacation = re.compile(REPLY + ".*" + any_of(
    "fuera de (?:la )?oficina", "fora do escritório", r"\bausência\b", r"\bausencia\b",
    r"\bis out of (?:the )?office(?=\W*$| until\b)", r"\best absente?\b",
    "message d['’]absence", r"\babwesend\b") + ".*", re.I).fullmatch
is_bounce = re.compile(REPLY + ".*" + any_of(
    "undeliver", "returned mail", "failure notice", "unzustellbar", "non remis",
    "delivery (?:status notification|failure|has failed|incomplete)",
    "mail delivery (?:failed|failure|system)") + ".*", re.I).fullmatch
is_spam = re.compile(
    r"\s*(?:(?:fail|spam|yes|true)\b.*|(?:[5-9]|\d\d+)(?:\.\d+)?\s*)", re.I).fullmatch

LIST_HEADERS = (
    "list-id list-post list-owner list-archive list-help list-subscribe mailing-list "
    "x-beenthere x-mailman-version")
BULK_HEADERS = (
    "list-unsubscribe list-unsubscribe-post feedback-id x-campaignid x-csa-complaints")
is_automatic = matching("auto-submitted", "(?!no$).+")
is_refusal = matching("auto-submitted", ".*rejected.*", str)
is_report = matching("content-type", "multipart/report.*", str)
is_receipt = matching("content-type", "multipart/report.*disposition-notification.*", str)
is_of_rules_agent = matching(
    "x-ms-exchange-generated-message-source", "mailbox rules agent")
wants_no_answer = matching(
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


SIGNS: tuple[Sign, ...] = (
    header("bounce", "content-type", "multipart/report.*delivery-status.*",
           "a delivery status report (RFC 3464 2)", str),
    header("bounce", "content-type", "multipart/report.*feedback-report.*",
           "an abuse report (RFC 5965)", str),
    ("bounce", lambda mail: is_receipt(mail) and is_refusal(mail),
     "a refusal in the form of a receipt (RFC 5429)"),
    ("auto-reply", is_receipt, "a receipt (RFC 8098 2)"),
    header("bounce", "x-failed-recipients", ".+", "X-Failed-Recipients (Exim, Gmail)"),
    # Before Auto-Submitted: daemons write auto-replied too (RFC 3834 5.2 knows the misuse).
    ("bounce", lambda mail: is_daemon(mail.author), "From is a mailer daemon"),
    # RFC 3834 5: any keyword but "no" is automatic.
    header("auto-reply", "auto-submitted", "(?!(?:no|auto-generated|auto-notified)$).+",
           "Auto-Submitted (RFC 3834 5.2)"),
    header("auto-reply", "x-autoreply x-auto-reply x-autorespond x-autoresponder "
           "x-autoresponse x-autoreply-from x-mail-autoreply x-vacation",
           "(?!(?:no|false|0)$).+",
           "an autoresponder's own header"),
    header("auto-reply", "precedence x-precedence preference", "auto_reply",
           "Precedence: auto_reply"),
    header("auto-reply", "x-autogenerated", "reply",
           "X-Autogenerated: reply (Communigate)"),
    header("auto-reply", "x-fc-machinegenerated", "true",
           "X-FC-MachineGenerated (FirstClass)"),
    header("auto-reply", "x-post-messageclass", r"9\b.*|.*autoresponder.*",
           "X-POST-MessageClass (Mailtraq)", str),
    header("auto-reply", "delivered-to", "autoresponder",
           "Delivered-To: Autoresponder (qmail)"),
    header("auto-reply", "x-apple-action", "vacation.*",
           "X-Apple-Action: VACATION (iCloud)"),
    ("auto-reply", is_exchange_vacation, "Exchange's Mailbox Rules Agent"),
    # Alone the header may stand on what a rule forwarded for a person.
    ("auto-reply", lambda mail: "x-ms-exchange-inbox-rules-loop" in mail.headers and (
        wants_no_answer(mail) or is_automatic(mail)),
     "an Exchange rule's own mail, or one without answer"),
    # RFC 3834 3.1.5 warns of it as proof; nine of fourteen notices have nothing else.
    ("auto-reply", lambda mail: is_vacation(mail.subject),
     "the subject of a vacation notice"),
    ("bounce", lambda mail: is_daemon(mail.sender),
     "the envelope sender is a mailer daemon (RFC 3834 7)"),
    header("bounce", "x-postal-bounce", "true|1", "the provider takes it for a bounce"),
    ("bounce", lambda mail: "message/delivery-status" in mail.types and (
        is_bounce_like(mail) or is_postmaster(mail.author)),
     "it carries a delivery status"),
    ("bounce", lambda mail: is_postmaster(mail.author) and is_bounce_like(mail),
     "postmaster, and a sign of a bounce"),
    ("bounce", lambda mail: (mail.is_null or not mail.author) and is_bounce(mail.subject),
     "from nobody, with the subject of a bounce"),
    header("machine", "auto-submitted", "auto-generated|auto-notified",
           "Auto-Submitted: nobody typed it (RFC 3834 5.1)"),
    header("machine", "x-ms-exchange-generated-message-source",
           "(?!mailbox rules agent$).+", "made by an Exchange agent"),
    header("machine", "x-arf feedback-type", "(?!no$).+",
           "an abuse report (X-ARF, RFC 5965)"),
    header("list", "precedence x-precedence", "list", "Precedence: list (RFC 3834 2)"),
    header("list", LIST_HEADERS, ".*", "a mailing list's header (RFC 2919, RFC 5230 4.6)"),
    header("bulk", "precedence x-precedence", r"(?:bulk|junk)\b.*",
           "Precedence: bulk or junk (RFC 3834 2)"),
    header("bulk", BULK_HEADERS, ".*", "a mass mailing's header"),
    # From here on it is a person's mail that is not confirmed; the last row's is.
    ("human", lambda mail: mail.is_null, "the envelope sender is null (RFC 3834 2)"),
    ("human", lambda mail: is_never_answered(mail.author),
     "From is an address that is never answered (RFC 3834 2, RFC 5230 4.6)"),
    ("human", lambda mail: is_list_sender(mail.sender),
     "the envelope sender is one that is never answered (RFC 3834 7)"),
    # Not the envelope sender, which only the first header tells; yet nobody writes it idly.
    header("human", "return-path", "<>", "Return-Path is null (RFC 3834 2)", str),
    ("human", lambda mail: is_bounce(mail.subject) and not mail.first("in-reply-to"),
     "the subject of a bounce"),
    ("human", lambda mail: may_be_vacation(mail.subject),
     "the subject may be a vacation notice's"),
    header("human", "x-loop x-auto-generated", "yes|true|hd-.*",
           "another helpdesk marks its mail so"),
    header("human", "x-rt-loop-prevention x-roundup-loop x-otrs-loop "
           "x-hmxmroriginalrecipient", ".*", "another helpdesk's own mail, or a complaint"),
    ("human", wants_no_answer,
     "X-Auto-Response-Suppress asks for none (MS-OXCMAIL 2.1.3.2.20)"),
    # Of these headers only the first can be our own server's.
    ("human", lambda mail: any(map(is_spam, (
        *mail.verdicts, mail.first("x-spam-flag"), mail.first("x-spam-status"),
        mail.first("x-mailgun-sflag")))), "the provider takes it for spam"),
    ("human", lambda mail: re.search(
        r"\bdmarc\s*=\s*fail", mail.first("authentication-results"), re.I),
     "From may be forged, DMARC failed (RFC 8601 5)"),
    ("human", lambda mail: True, ""))


def classify(message: Message, own_addresses: list[str],
             trusted: str) -> tuple[str, str, str]:
    """Return (kind, reason, why it is not to be confirmed or ""), the latter two in words.

    `trusted` are the account's forwarders, addresses between commas.
    """
    mail = Evidence(message)
    take_off_stamps(mail, own_addresses, trusted)
    kind, _, reason = next(sign for sign in SIGNS if sign[1](mail))
    if kind == "human":
        return kind, "no sign of automatic mail", reason
    return kind, reason, f"never for {kind} mail (RFC 3834 2)"


# name → word that is taken off; "" = whatever it says.
LIST_STAMPS = dict.fromkeys(f"{LIST_HEADERS} {BULK_HEADERS}".split(), "") | {
    "precedence": "list", "x-precedence": "list"}
FORWARDER_STAMPS = LIST_STAMPS | {
    "x-ms-exchange-inbox-rules-loop": "",
    "x-ms-exchange-generated-message-source": "",
    "auto-submitted": "auto-generated"}
FORWARDER_MARKS = (
    "x-ms-exchange-inbox-rules-loop", "resent-from", "x-forwarded-for", "x-forwarded-to")


def take_off_stamps(mail: Evidence, own_addresses: list[str], trusted: str) -> None:
    """Take off what our own groups and trusted forwarders stamped on a person's mail.

    Through them every customer's mail has a List-Id or an Auto-Submitted.
    """
    forwarders = set(re.findall(r"[^\s,]+", trusted.lower()))
    ours = forwarders.union(map(str.lower, own_addresses))
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
        values = mail.headers.pop(name, [])
        left = [value for value in values if word and keyword(value) != word]
        if left:
            mail.headers[name] = left


def names_one_of(mail: Evidence, names: Iterable[str], addresses: set[str]) -> bool:
    """Whether an address stands in one of the headers, in <brackets> where it has any."""
    for name in names:
        for value in mail.headers.get(name, ()):
            words = re.findall("<(?:mailto:)?([^<>]*)>", value.lower())
            if not addresses.isdisjoint(words or re.split(r"[\s;,]+", value.lower())):
                return True
    return False


def local_part(address: str) -> str:
    return address.rpartition("@")[0].lower() or address.lower()


# -----------------------------------------------------------------------------------------
# Thread: which ticket a message belongs to. By ids first; by the subject's tag for its
# requester alone.

# In brackets of any width or none, and folded by mail programs between the halves.
SUBJECT_TAG = re.compile(
    r"(?<![\w-])(T-)\s?([0-9A-Z]{4}-)\s?([0-9A-Z]{4})(?![\w-])", re.I | re.A)
RETURNED_ID = re.compile(
    r"^[> \t]*(?:x-)?(?:original-)?message-id:\s*(<[^<>\s]+>)", re.I | re.M)
PLACES = ("In-Reply-To", "References", "Exchange's parent id", "the returned message")
# The first id that we know; of its messages the one as written, then of its own requester,
# then the liveliest. Servers change an id's case and lose a trailing dot, hence the second
# spelling. CROSS JOIN: an index look-up for each id, never a scan.
THREAD = """
    SELECT ticket.*, place.key AS place
    FROM json_each(?) AS place CROSS JOIN json_each(place.value) AS named CROSS JOIN message
    ON message.email_account = ? AND message_id COLLATE NOCASE
        IN (named.value, rtrim(rtrim(named.value, '>'), '.') || '>')
    JOIN ticket ON ticket.id = message.ticket
    ORDER BY place.key, named.key, message_id = named.value DESC, requester = ? DESC,
        updated_at DESC LIMIT 1"""


def thread(db: DB, account: Row, message: Message, kind: str) -> tuple[Row | None, str]:
    """Return (ticket row or None, reason). Every id that the account got or sent counts."""
    # RFC 5322 3.6.4: In-Reply-To names the parent, and so does the last of References.
    # RFC 3464 2, RFC 8098 3.2.5: reports and receipts carry the mail that came back.
    exchange = header_values(message.headers, "x-ms-exchange-parent-message-id")
    ids = [message.in_reply_to, message.references[::-1], ids_of(exchange),
           returned_ids(message) if kind in ("bounce", "auto-reply") else []]
    ticket = any(ids) and db.execute(THREAD, [
        ids, account["id"], message.from_address]).fetchone()
    if ticket:
        return ticket, f"{PLACES[ticket['place']]} names a message of this ticket"
    for halves in SUBJECT_TAG.findall(message.subject)[:5]:
        ticket = db.execute(
            "SELECT * FROM ticket WHERE reference = ? AND email_account = ?",
            ["".join(halves).upper(), account["id"]]).fetchone()
        if ticket and mailbox_key(ticket["requester"]) == mailbox_key(message.from_address):
            return ticket, "the requester wrote it with this ticket's tag in the subject"
    return None, "no id of a known message, so a new ticket"


def returned_ids(message: Message) -> list[str]:
    """Message-ids of what a report sends back: in its parts or (a provider's JSON) text."""
    return RETURNED_ID.findall(report_of(message))[:20]


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
# Store: one reader, one writer. A request hands its work over and waits; all that waits
# shares one transaction and one fsync, with a SAVEPOINT each. A message *is* stored when
# COMMIT returns and the file is still the one that stands at the path.
#
# WAL with synchronous=FULL: SQLite's defaults lose acknowledged rows on a power cut. Of a
# process only the writer checkpoints: before 3.51.3 SQLite may corrupt a file that two do
# it to at once.

SCHEMA = Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")
SCHEMA_VERSION, APPLICATION_ID = 2, 1768841828      # schema.sql's
# These very classes: their heirs, IntegrityError and DataError, are the message's fault.
TROUBLE = (sqlite3.OperationalError, sqlite3.DatabaseError, sqlite3.InternalError)
Work = Callable[..., Any]       # (connection, seconds UTC, *args) → result
Future = concurrent.futures.Future[Any]
sqlite3.register_adapter(list, json.dumps)      # lists stand in the file as JSON


class Store:
    """The database file at `path`; `clock` returns seconds UTC; a server `checkpoints`."""

    def __init__(self, path: str, clock: Callable[[], float] = time.time,
                 checkpoints: bool = True):
        self.path = path
        self.now = lambda: int(clock())
        self.checkpoints = checkpoints
        self.has_mail = threading.Event()               # wakes the courier
        self.refusals: deque[tuple[int, str]] = deque(maxlen=1000)  # (time, client) of 401s
        self._was_open = False
        self._jobs: deque[tuple[Work, tuple[Any, ...], Future]] = deque()
        self._lock = threading.RLock()                  # of the writer and all below
        self._writer: DB | None = None
        self._files: Row = {}                           # `files_at` when it was opened
        self._locked_until = 0.0                        # monotonic
        self._reader_lock = threading.Lock()
        self._reader: DB | None = None

    def open(self, create: bool = True) -> bool:
        """Make the file if there is none, migrate an old one; return whether it was made.

        Refused when it is not ours, of no version that we know, or missing: if `create` is
        false or it was there before.
        """
        try:
            if not os.path.exists(self.path):
                if self._was_open or not create:
                    raise Refused(
                        503, f"no database at {self.path!r}: `inbound serve` makes one; "
                        "--db FILE or $INBOUND_DB names another")
                # Before SQLite does, so that its -wal and -shm get the same mode.
                os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))
            with contextlib.closing(self._connect()) as db:
                was_made = migrate(db, self.path)
        except (OSError, sqlite3.Error) as error:
            raise Refused(503, f"cannot open the database {self.path!r}: {error}") from None
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
                        f"wal_autocheckpoint = {1000 * self.checkpoints}"):
            db.execute(f"PRAGMA {setting}")
        return db

    def rows(self, query: str, parameters: Any = ()) -> list[Row]:
        """All rows of a query; Refused 503."""
        try:
            with self._reader_lock:
                if self._reader is None:
                    self.open()
                    self._reader = self._connect()
                return self._reader.execute(query, parameters).fetchall()
        except sqlite3.Error as error:
            raise Refused(503, f"the database cannot be read: {error}") from None

    def accounts(self) -> list[Row]:
        return self.rows("SELECT * FROM email_account ORDER BY is_default DESC, id")

    def own_addresses(self) -> list[str]:
        return [account["address"] for account in self.accounts()]

    def own_providers(self) -> list[tuple[str, Row]]:
        """(name, {field: path}) of the rows of `provider`, as far as they make sense."""
        return [(row["name"], {name: path for name, path in json_in(row["fields"]).items()
                               if isinstance(path, str)})
                for row in self.rows("SELECT name, fields FROM provider")]

    def write(self, work: Work, *args: Any) -> Any:
        """Return the result of `work(connection, now, *args)` once it is synced.

        What it raises is raised here and undone alone. Refused 503 if nothing was stored.
        """
        future = Future()
        self._jobs.append((work, args, future))
        with self._lock:
            if not future.done():       # nobody before us took it along
                self._commit()
        try:
            return future.result()
        except sqlite3.Error as error:
            if type(error) in TROUBLE:
                raise Refused(503, f"the database cannot be written: {error}") from None
            raise

    def _commit(self) -> None:
        """One transaction for all that waits, and for who comes before its end."""
        results: dict[Future, Any] = {}
        try:
            writer = self._begin()
            while self._jobs:
                work, args, future = self._jobs.popleft()
                results[future] = None
                try:
                    results[future] = in_savepoint(writer, work, self.now(), *args)
                except Exception as error:
                    # A full disk ends all of it. What SQLite may not write it opens to
                    # read, without a word, and tells so only here.
                    if not writer.in_transaction or "readonly" in str(error):
                        raise
                    future.set_exception(error)
            writer.execute("COMMIT")
            self._refuse_if_replaced()
        except Exception as error:
            # No second fsync on a descriptor whose first failed: the next write opens anew.
            self._close_writer()
            if "readonly" in str(error):    # a process opens it so while one of it is open
                self.close()
            if "locked" in str(error):
                self._locked_until = time.monotonic() + 1
            while self._jobs:       # who waits behind us shares the fate
                results[self._jobs.popleft()[2]] = None
            for future in results:
                if not future.done():
                    future.set_exception(error)
        for future, result in results.items():
            if not future.done():
                future.set_result(result)

    def _begin(self) -> DB:
        """The writer in a transaction. Nobody waits for a lock that was there just now."""
        is_new = self._writer is None
        if self._writer is None:
            self.open()
            self._writer = self._connect()
        wait = BUSY_TIMEOUT if time.monotonic() > self._locked_until else 0
        self._writer.execute(f"PRAGMA busy_timeout = {1000 * wait:.0f}")
        self._writer.execute("BEGIN IMMEDIATE")
        if is_new:
            self._files = files_at(self.path)
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

    def close(self) -> None:
        """Close when nobody is at work: SQLite crashes when closed under a query."""
        with self._lock, self._reader_lock:
            self._close_writer()
            if self._reader is not None:
                self._reader.close()
                self._reader = None


def files_at(path: str) -> dict[str, Any]:
    """(inode, device) of a database and its companions, as far as they are there."""
    return {end: os.stat(path + end)[1:3] for end in ("", "-wal", "-shm")
            if os.path.exists(path + end)}


def in_savepoint(db: DB, work: Work, *args: Any) -> Any:
    """Run `work(db, *args)`; undo it alone if it raises."""
    db.execute("SAVEPOINT alone")
    try:
        result = work(db, *args)
    except Exception:
        if db.in_transaction:
            db.execute("ROLLBACK TO alone")
            db.execute("RELEASE alone")
        raise
    db.execute("RELEASE alone")
    return result


def migrate(db: DB, path: str) -> bool:
    """Bring the file to SCHEMA_VERSION in one transaction; return whether it was empty."""
    if version_of(db, path) == SCHEMA_VERSION:  # no lock: who only reads waits for none
        return False
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA foreign_keys = OFF")
    db.execute("BEGIN IMMEDIATE")       # two processes may start at once
    first = version = version_of(db, path)
    while version != SCHEMA_VERSION:
        MIGRATIONS[version](db)
        version = version_of(db, path)
    db.execute("COMMIT")
    return first == 0


def version_of(db: DB, path: str) -> int:
    """The version of a file, 0 when it is empty; Refused when no step leads on from it."""
    found = db.execute(VERSION, [APPLICATION_ID]).fetchone()
    version: int = found["version"]
    if not found["is_ours"]:
        raise Refused(503, f"{path!r} is the database of another program")
    if version > SCHEMA_VERSION:
        raise Refused(
            503, f"{path!r} has the newer schema version {version}: update inbound")
    if version < 0:
        raise Refused(503, f"{path!r} comes from no released version of inbound")
    return version


# Of what calls itself version 1 only the released one has this view.
VERSION = """
    SELECT NOT size OR application_id = ? AS is_ours,
        CASE WHEN NOT size THEN 0 WHEN user_version > 1 OR view THEN user_version
            ELSE -1 END AS version
    FROM pragma_application_id, pragma_user_version,
        (SELECT count(*) AS size, sum(name = 'valid_secret') AS view FROM sqlite_schema)"""


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
    parts = db.execute("""SELECT name, type FROM sqlite_schema
        WHERE type <> 'table' AND sql IS NOT NULL""").fetchall()
    for part in parts:      # a view's triggers go with it
        db.execute('DROP {type} IF EXISTS "{name}"'.format(**part))
    run_script(db, OUT_OF_VERSION_1)
    run_script(db, SCHEMA)
    run_script(db, INTO_VERSION_2)
    for row in db.execute("SELECT * FROM old_provider").fetchall():
        pairs = [word.partition("=") for word in row["fields"].split()]
        fields = {name: path or name for name, _, path in pairs}
        insert(db, "provider", name=row["name"], fields=json.dumps(fields))
    db.execute("DROP TABLE old_provider")
    if not db.execute("SELECT 1 FROM sign_of_version_1").fetchone():
        db.execute("DROP TABLE sign_of_version_1")


OUT_OF_VERSION_1 = """
    PRAGMA legacy_alter_table = ON;     -- references keep their tables' names
    ALTER TABLE queue RENAME TO old_queue;
    ALTER TABLE email_account RENAME TO old_email_account;
    ALTER TABLE ticket RENAME TO old_ticket;
    ALTER TABLE message RENAME TO old_message;
    ALTER TABLE attachment RENAME TO old_attachment;
    ALTER TABLE outbox RENAME TO old_outbox;
    ALTER TABLE rejected RENAME TO old_rejected;
    -- Of providers the first 21 were the program's own, of signs 42. Two may bear one name.
    CREATE TABLE old_provider AS
        SELECT name || iif(count(*) OVER (PARTITION BY name) > 1, ' ' || id, '') AS name,
            fields FROM provider WHERE id > 21 AND fields IS NOT NULL;
    CREATE TABLE sign_of_version_1 AS SELECT * FROM sign WHERE id > 42;
    DROP TABLE provider;
    DROP TABLE sign;
    DROP TABLE command;
    """
INTO_VERSION_2 = """
    DELETE FROM email_account;
    DELETE FROM queue WHERE name <> 'Automatic';
    INSERT OR REPLACE INTO queue
    SELECT id, iif(trim(name) = '', 'Queue ' || id, name), is_default FROM old_queue;
    INSERT INTO email_account (id, address, display_name, queue, is_default, inbound_secret,
        previous_secret, previous_secret_until, validation_key, smtp_host, smtp_port,
        smtp_security, smtp_username, smtp_password, confirmation_envelope_from, template,
        confirmations_per_address_hour, confirmations_per_address_day,
        confirmations_per_hour, trusted_forwarders)
    SELECT id, address, display_name, queue, is_default, inbound_secret,
        previous_secret, previous_secret_until, validation_key, smtp_host, smtp_port,
        smtp_security, smtp_username, smtp_password, confirmation_envelope_from,
        template || iif(instr(template, '{reference}'), '', '{reference}' || char(10)),
        confirmations_per_address_hour, confirmations_per_address_day,
        confirmations_per_hour,
        iif(trusted_forwarders LIKE '_%@_%', trusted_forwarders, NULL)
    FROM old_email_account;
    INSERT INTO ticket SELECT * FROM old_ticket;
    INSERT INTO message SELECT * FROM old_message;
    INSERT INTO attachment SELECT * FROM old_attachment;
    INSERT INTO outbox (id, message, email_account, purpose, recipient, mailbox, content,
        state, attempts, created_at, next_attempt_at, give_up_at, last_error)
    SELECT id, message, email_account, purpose, recipient, mailbox, content,
        state, attempts, created_at, next_attempt_at, give_up_at, last_error
    FROM old_outbox;
    INSERT INTO rejected SELECT * FROM old_rejected;
    DROP TABLE old_queue;
    DROP TABLE old_email_account;
    DROP TABLE old_ticket;
    DROP TABLE old_message;
    DROP TABLE old_attachment;
    DROP TABLE old_outbox;
    DROP TABLE old_rejected;
    """
MIGRATIONS = {0: new_file, 1: from_version_1}   # version → what makes a later one of it


def new_secret() -> str:
    """A random secret. None begins with a hyphen: command lines take that for an option."""
    return secrets.choice("abcdefghijklmnopqrstuvwxyz") + secrets.token_urlsafe(24)


# -----------------------------------------------------------------------------------------
# File: what happens to one message inside the transaction, and what is kept of a post that
# became none.

def file_post(db: DB, now: int, post: Post, filings: list[Filing | str],
              kept: Post) -> list[Row]:
    """Store each member of a post; if one was not understood the post is `kept`, once."""
    answers: list[Row] = []
    faults: list[str] = []
    for filing in filings:
        try:
            if isinstance(filing, Filing):
                answers.append(in_savepoint(db, file_message, now, post, filing))
                continue
            fault = filing
        except Exception as error:
            if type(error) in TROUBLE:
                raise
            fault, kept = fault_of(error, post, "filing"), safe(post)
        faults.append(fault)
        answers.append({
            "status": "quarantined", "ticket": None, "message": None, "kind": None,
            "confirmation": None, "reason": f"kept: {fault}"})
    if faults:
        keep(db, now, kept, 200, "; ".join(dict.fromkeys(faults))[:2000])
    return answers


KNOWN = """
    SELECT ticket.*, message.id AS message, direction, digest, kind
    FROM message JOIN ticket ON ticket.id = message.ticket
    WHERE message.email_account = ? AND message_id = ?
    ORDER BY digest = ? DESC, direction DESC LIMIT 1"""


def file_message(db: DB, now: int, post: Post, filing: Filing) -> Row:
    """Thread, store and confirm one message; return the answer's object.

    UNIQUE (email_account, message_id, digest) settles a repeat. It is asked for first,
    which the writer's lock makes safe: so a repeat writes nothing and costs no fsync.
    """
    account, message, kind = post.account, filing.message, filing.kind
    known = db.execute(KNOWN, [
        account["id"], message.message_id, message.digest]).fetchone()
    if known and known["digest"] == message.digest:
        return {
            "status": "duplicate", "ticket": known["reference"],
            "message": known["message"], "kind": known["kind"],
            "confirmation": "not due", "reason": "stored before"}
    if known and known["direction"] == "out":
        ticket, found = known, "it bears the Message-ID of a mail of ours"
        message.notes.append(found)
    else:
        ticket, found = thread(db, account, message, kind)
    status, confirmation, draft = "appended", "not due", None
    due = "no confirmation: it opened no ticket"
    if ticket:
        touch_ticket(db, now, ticket, message, kind)
    else:
        ticket, status = open_ticket(db, now, account, message, kind), "created"
        draft, due = confirm(db, now, post, ticket, message, filing.withheld)
        confirmation = "queued" if draft else "withheld"
    reason = f"{filing.reason}; {found}; {due}"
    row = insert_message(
        db, post.received_at or now, ticket, message, reason, kind, confirmation)
    if draft:
        send_later(db, now, account, ticket, draft, "confirmation")
    elif kind == "bounce":
        fail_bounced(db, account, message)
    return {"status": status, "ticket": ticket["reference"], "message": row, "kind": kind,
            "confirmation": confirmation, "reason": reason}


def open_ticket(db: DB, now: int, account: Row, message: Message, kind: str) -> Row:
    """Insert a ticket; automatic replies and bounces go to the queue `Automatic`."""
    letters = "".join(secrets.choice("0123456789ABCDEFGHJKMNPQRSTVWXYZ") for _ in range(8))
    ticket: Row = db.execute(NEW_TICKET, account | vars(message) | {
        "reference": f"T-{letters[:4]}-{letters[4:]}", "kind": kind, "now": now}).fetchone()
    return ticket


NEW_TICKET = """
    INSERT INTO ticket (reference, queue, email_account, subject, requester, requester_name,
        created_at, updated_at)
    VALUES (:reference, iif(:kind IN ('auto-reply', 'bounce'),
            (SELECT id FROM queue WHERE name = 'Automatic'), :queue), :id, :subject,
        :from_address, :from_name, :now, :now)
    RETURNING *"""


def touch_ticket(db: DB, now: int, ticket: Row, message: Message, kind: str) -> None:
    """A party's own words open a closed ticket again; no machine's, and no stranger's.

    Parties are the requester and whom a mail of ours on the ticket went to.
    """
    mailbox = mailbox_key(message.from_address)
    is_party = mailbox == mailbox_key(ticket["requester"]) or db.execute(
        """SELECT 1 FROM message JOIN outbox ON outbox.message = message.id
        WHERE message.ticket = ? AND outbox.mailbox = ?""",
        [ticket["id"], mailbox]).fetchone()
    if not is_party and kind not in ("bounce", "auto-reply"):
        message.notes.append(
            f"written by a stranger to this ticket: {message.from_address}")
    db.execute(
        "UPDATE ticket SET updated_at = ?, status = iif(?, 'open', status) WHERE id = ?",
        [now, kind == "human" and bool(is_party), ticket["id"]])


def insert_message(db: DB, now: int, ticket: Row, message: Message, reason: str,
                   kind: str | None = None, confirmation: str | None = None) -> int:
    """Insert a message and its attachments; return its id. Without a kind it is ours."""
    row = db.execute(NEW_MESSAGE, ticket | vars(message) | {
        "now": now, "reason": reason, "kind": kind, "confirmation": confirmation}).lastrowid
    for item in message.attachments:
        db.execute(NEW_ATTACHMENT, vars(item) | {"message": row, "sha256": item.sha256})
    return row or 0


NEW_MESSAGE = """
    INSERT INTO message (ticket, email_account, direction, message_id, digest, in_reply_to,
        "references", from_address, from_name, envelope_from, "to", cc, subject, text, html,
        headers, kind, reason, confirmation, notes, received_at)
    VALUES (:id, :email_account, iif(:kind IS NULL, 'out', 'in'), :message_id, :digest,
        (SELECT group_concat(value, ' ') FROM json_each(:in_reply_to)),
        :references, :from_address, :from_name, :envelope_from, :to, :cc, :subject, :text,
        :html, :headers, :kind, :reason, :confirmation, :notes, :now)"""
NEW_ATTACHMENT = """
    INSERT INTO attachment (message, filename, content_type, content_id, size, sha256,
        content, note)
    VALUES (:message, :filename, :content_type, :content_id, ifnull(length(:content), 0),
        :sha256, :content, :note)"""


def insert(db: DB, table: str, **row: Any) -> None:
    """Insert a row."""
    columns, marks = ", ".join(row), ", ".join("?" * len(row))
    db.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})", [*row.values()])


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
        r"(?<![\d.])(?:[245]\.\d{1,3}\.\d{1,3}|55\d)(?![\d.])", report)
    actions = re.findall(r"^(?:action|feedback-type):\s*(\w+)", report.lower(), re.M)
    if actions:
        is_final = not NOT_FINAL.issuperset(actions)
    else:
        is_final = {code[0] for code in codes} != {"4"} or not DELAYED.search(
            message.subject + report)
    if not is_final:
        return
    ids = [*returned_ids(message), *message.in_reply_to, *message.references]
    code = next((code for code in codes if code[0] == "5"), "no code")
    db.execute("""UPDATE outbox SET state = 'failed', last_error = ? WHERE state = 'sent'
        AND message IN (SELECT id FROM message WHERE email_account = ? AND direction = 'out'
            AND message_id COLLATE NOCASE IN (SELECT value FROM json_each(?)))""", [
                f"bounced: {code}", account["id"], ids])


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
    db.execute("""INSERT INTO rejected
            (received_at, email_account, status, reason, content_type, body, body_sha256)
        VALUES (?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT (email_account, body_sha256) DO UPDATE SET tries = tries + 1,
            received_at = excluded.received_at, status = excluded.status,
            reason = excluded.reason""", [
        post.received_at or now, post.account["id"], status, clean(reason),
        post.content_type, post.body, hashlib.sha256(post.body).hexdigest()])


def rehearse(db: DB, now: int) -> None:
    """Try all that storing a message needs, and undo it."""
    account = db.execute("SELECT * FROM email_account ORDER BY is_default DESC").fetchone()
    post = Post(account, [], "", b"rehearsal")
    message = normalise({"from": "rehearsal@inbound.example", "text": secrets.token_hex(),
                         "attachments": [{"content": ""}]}, is_strict=False)
    db.execute("SAVEPOINT rehearsal")
    file_message(db, now, post, Filing(message, "human", "rehearsal"))
    keep(db, now, post, 200, "rehearsal")
    db.execute("ROLLBACK TO rehearsal")


# -----------------------------------------------------------------------------------------
# Confirm: whether, and the mail itself. It goes to an address that anyone can forge: none of
# the sender's words are in it, and there are caps, counted in the transaction that stores it.

LABEL = "(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
DELIVERABLE = re.compile(
    rf"[A-Za-z0-9!#$%&'*+/=?^_`{{|}}~.-]{{1,64}}@(?:{LABEL}\.)+(?![0-9]){LABEL}")
OWN_ID = re.compile("<[!-;=?-~]{1,%d}>" % (MAX_OWN_ID - 2))     # printable ASCII but < and >
# (column of email_account, seconds, column of outbox that is counted by)
CAPS = (
    ("confirmations_per_address_hour", 3600, "mailbox"),
    ("confirmations_per_address_day", 86400, "mailbox"),
    ("confirmations_per_domain_hour", 3600, "domain"),
    ("confirmations_per_hour", 3600, "email_account"))
# Where so many people have their mailboxes that a domain says nothing.
LARGE_PROVIDERS = frozenset((
    "126.com 163.com aol.com att.net bluewin.ch btinternet.com comcast.net daum.net fastmail.com "
    "free.fr freenet.de gmail.com gmx.at gmx.ch gmx.de gmx.net googlemail.com hanmail.net "
    "hotmail.com icloud.com laposte.net libero.it live.com mac.com mail.com mail.ru me.com msn.com "
    "naver.com orange.fr outlook.com proton.me protonmail.com qq.com rediffmail.com sbcglobal.net "
    "seznam.cz t-online.de verizon.net web.de wp.pl yahoo.co.jp yahoo.com yandex.ru ymail.com "
    "zoho.com").split())
# RFC 3834 3.1.7: auto-replied. Precedence: vacation(1) and Dovecot look for it.
AUTOMATIC = {
    "Auto-Submitted": "auto-replied",
    "X-Auto-Response-Suppress": "All",
    "Precedence": "bulk"}


def confirm(db: DB, now: int, post: Post, ticket: Row, message: Message,
            withheld: str) -> tuple[Draft | None, str]:
    """Return (draft, reason) of a new ticket's confirmation; no draft when a rule forbids it."""
    account = post.account
    withheld = withheld or reason_to_withhold(db, now, post, message)
    try:
        draft = None if withheld else draft_mail(
            account, now, deliverable(message.from_address) or "", AUTOMATIC,
            subject=f"[{ticket['reference']}] We received your message",
            text=account["template"].replace("{reference}", ticket["reference"]),
            ancestors=[*message.references, message.message_id])
    except ValueError as error:
        draft, withheld = None, str(error)
    return draft, f"confirmation withheld: {withheld}" if withheld else "confirmation queued"


def reason_to_withhold(db: DB, now: int, post: Post, message: Message) -> str:
    """Why a person's new ticket is not confirmed, signs on the mail apart; "" when it may be."""
    recipient = deliverable(message.from_address)
    mailbox = mailbox_key(recipient or message.from_address)
    if mailbox in map(mailbox_key, post.own_addresses):
        return "the mail comes from our own address"
    if message.from_count > 1 or recipient is None:
        return "From is not one address that we write to (RFC 3834 3.1.3)"
    counted = {
        "mailbox": mailbox, "domain": domain_key(mailbox), "email_account": post.account["id"]}
    for cap, seconds, column in CAPS:
        if counted[column] in LARGE_PROVIDERS:
            continue
        # Until now: what a clock that was wrong dated into the future does not count.
        sent = db.execute(f"""SELECT count(*) AS n FROM outbox WHERE {column} = ?
            AND purpose = 'confirmation' AND created_at BETWEEN ? AND ?""", [
                counted[column], now - seconds + 1, now]).fetchone()["n"]
        if sent >= post.account[cap]:
            return f"the cap {cap} is reached"
    return ""


def domain_key(mailbox: str) -> str:
    """Whose domain it is, sub-domains taken off: two labels, or three as in example.co.uk."""
    labels = mailbox.rpartition("@")[2].split(".")
    is_shared = len(labels[-1]) == 2 and labels[-2:-1] and labels[-2] in (
        "co com org net gov edu ac or ne go gob gv nom").split()
    return ".".join(labels[-3:] if is_shared else labels[-2:])


def deliverable(address: str) -> str | None:
    """The address as it goes on the wire, ASCII; None for what we do not write to.

    We do not write to quoted local parts, address literals, non-ASCII local parts (they need
    SMTPUTF8) or encoded words (EmailMessage would decode them).
    """
    local, _, domain = address.rpartition("@")
    try:
        wire = domain if domain.isascii() else domain.lower()[:254].encode("idna").decode()
        # The codec is IDNA 2003: what it maps to another name (ß to ss) may be another's.
        if wire != domain and wire.encode().decode("idna") != domain.lower():
            return None
    except UnicodeError:
        return None
    address = f"{local}@{wire}"
    is_safe = len(address) <= 254 and "=?" not in local and DELIVERABLE.fullmatch(address)
    return address if is_safe else None


def draft_mail(account: Row, now: int, recipient: str, extra: dict[str, str], *, subject: str,
               text: str, ancestors: list[str]) -> Draft:
    """A text/plain mail of ours; ValueError when it cannot be written safely.

    `ancestors` are the ids for References, the parent's last.
    """
    known = [parent for parent in ancestors if OWN_ID.fullmatch(parent) and "=?" not in parent
             and not parent.endswith("@missing.invalid>")]
    parents = known[-1:] if known[-1:] == ancestors[-1:] else []
    known = known[:1] + known[1:][-9:]
    # `=?` is broken up: mail programs would decode what stands behind it.
    name = one_line(account["display_name"] or "").replace("=?", "= ?")
    address = account["address"]
    headers = {
        "From": email.utils.formataddr((name, address)), "To": recipient, "Subject": subject,
        "Date": email.utils.formatdate(now),
        # 128 random bits; the message row, not the id, says which ticket.
        "Message-ID": f"<{secrets.token_hex(16)}@{address.rpartition('@')[2].lower()}>",
        "In-Reply-To": "".join(parents), "References": " ".join(known), **extra}
    headers = {header: value for header, value in headers.items() if value}
    mail = email.message.EmailMessage(Verbatim(linesep="\r\n"))
    for header, value in headers.items():
        mail[header] = value
    mail.set_content(text, cte="quoted-printable")
    refuse_unsafe(mail.as_bytes(), headers)
    envelope_from = account["confirmation_envelope_from"] or "" if extra else address
    return Message(
        message_id=headers["Message-ID"], digest="", in_reply_to=parents, references=known,
        from_address=address, from_name=name, envelope_from=envelope_from, to=[recipient], cc=[],
        subject=subject, text=text, html=None,
        headers=[[*pair] for pair in headers.items()]), mail.as_bytes()


def refuse_unsafe(content: bytes, headers: dict[str, str]) -> None:
    """ValueError unless a mail of ours has these headers, no others, and clean lines.

    EmailMessage decodes encoded-words in what it is given and writes the CR LF that it finds
    there into the header block, so what was built is parsed again before anybody trusts it.
    """
    parsed = email.message_from_bytes(content)
    expected = [*headers, "Content-Type", "Content-Transfer-Encoding", "MIME-Version"]
    is_same = all(str(parsed[name]).split() == headers[name].split()
                  for name in Verbatim.names if name in headers)
    if sorted(parsed.keys()) != sorted(expected) or not is_same or not content.isascii() or (
            re.search(rb"\0|[^\r]\n|\r[^\n]|[^\r\n]{999}", content)):
        raise ValueError("the mail cannot be written safely")


class Verbatim(email.policy.EmailPolicy):
    """EmailMessage's policy, but these headers are neither parsed nor folded.

    The stock one makes of a long In-Reply-To an encoded-word that threads nowhere, and of a
    long quoted name with commas in From several mailboxes.
    """

    names = ("From", "To", "Message-ID", "In-Reply-To", "References")

    def header_store_parse(self, name: str, value: Any) -> tuple[str, Any]:
        return (name, value) if name in self.names else super().header_store_parse(name, value)

    def fold_binary(self, name: str, value: Any) -> bytes:
        if name not in self.names:
            return super().fold_binary(name, value)
        return f"{name}: {value}\r\n".replace("> <", ">\r\n <").encode("ascii")


def send_later(db: DB, now: int, account: Row, ticket: Row, draft: Draft, purpose: str) -> None:
    """Store a drafted mail as message and outbox row; its bytes never change from here on."""
    message, content = draft
    mailbox = mailbox_key(message.to[0])
    insert(db, "outbox", message=insert_message(db, now, ticket, message, f"our {purpose}"),
           email_account=account["id"], purpose=purpose, recipient=message.to[0],
           mailbox=mailbox, domain=domain_key(mailbox), content=content, created_at=now,
           next_attempt_at=now, give_up_at=now + GIVE_UP)


# -----------------------------------------------------------------------------------------
# Outbox: claim, deliver, settle. The states stand in schema.sql. A mail is sent when the relay
# said 250 and that is committed: a crash between the two repeats it, with the same Message-ID,
# and never loses it.

def claim(db: DB, now: int, account: Row) -> Any:
    """Lease the account's next due row for LEASE seconds; None if nothing is due."""
    db.execute("""UPDATE outbox SET state = 'queued'
        WHERE state = 'sending' AND next_attempt_at NOT BETWEEN ? AND ?""", [
            now + 1, now + LEASE])
    db.execute("""UPDATE outbox SET state = 'failed', next_attempt_at = NULL, last_error =
        'not delivered in 24 h; ' || iif(last_error = '', 'no smtp_host was set', last_error)
        WHERE state = 'queued' AND give_up_at <= ?""", [now])
    if not account["smtp_host"]:
        return None
    # What is due far later than we ever wait is due now: the clock was set back.
    return db.execute("""UPDATE outbox
        SET state = 'sending', attempts = attempts + 1, next_attempt_at = ?
        WHERE id = (SELECT id FROM outbox WHERE state = 'queued' AND email_account = ?
            AND next_attempt_at NOT BETWEEN ? AND ? ORDER BY next_attempt_at, id LIMIT 1)
        RETURNING *""", [
            now + LEASE, account["id"], now + 1, now + 2 * MAX_WAIT]).fetchone()


def settle(db: DB, now: int, row: Row, state: str, error: str) -> None:
    """Record what became of a claimed row, unless its lease ran out and another has it."""
    due = None
    if state == "queued":
        wait = min(MAX_WAIT, FIRST_WAIT * 2 ** min(row["attempts"] - 1, 10))
        due = now + wait * (75 + secrets.randbelow(51)) // 100
    db.execute("""UPDATE outbox SET state = ?, next_attempt_at = ?, last_error = ? WHERE id = ?
        AND state = 'sending' AND attempts = ?""", [
            state, due, error, row["id"], row["attempts"]])


def send_due(store: Store, accounts: list[Row] | None = None) -> Counter[str]:
    """Deliver all that is due, a session for each account; return a Counter of the outcomes."""
    outcomes: Counter[str] = Counter()
    for account in accounts or store.accounts():
        with contextlib.closing(Relay(account)) as relay:
            while row := store.write(claim, account):       # nothing to claim: nothing is written
                state, error = relay.deliver(row)
                settle_for_sure(store, row, state, error)
                outcomes[state] += 1
                log.info("outbox %d to %s %s: %s", row["id"], row["recipient"], state,
                         printable(error))
                if not relay.is_ready:      # one try at a look, not one a row
                    break
    return outcomes


def settle_for_sure(store: Store, row: Row, state: str, error: str) -> None:
    """Settle before the next claim: the mail has left, and no lock may make us forget it.

    After LEASE the row is anybody's again.
    """
    ends = time.monotonic() + LEASE
    while True:
        try:
            return store.write(settle, row, state, error)
        except Refused as refusal:
            if time.monotonic() > ends:
                raise Refused(503, f"mail {row['id']} is {state}, and that was not kept: "
                                   f"{refusal.reason}") from None
            time.sleep(0.2)


class Relay:
    """An SMTP session with an account's relay, opened with the first mail, kept for a burst."""

    def __init__(self, account: Row):
        self.account = account
        self.smtp: Any = None
        self.is_ready = False

    def deliver(self, row: Row) -> tuple[str, str]:
        """Return (state, error): sent, failed (5xx for this mail), queued (all that may pass)."""
        # smtplib has no total deadline: a server that drips bytes would hold us for ever.
        watchdog = threading.Timer(DELIVERY, self.abort)
        watchdog.daemon = True
        watchdog.start()
        column = {"confirmation": "confirmation_envelope_from"}.get(row["purpose"], "address")
        try:
            if not self.is_ready:
                self.connect()
            if not watchdog.is_alive():     # it could not cut short what DNS took
                raise TimeoutError(f"no session within {DELIVERY} s")
            self.is_ready = True
            self.smtp.sendmail(self.account[column] or "", [row["recipient"]], row["content"])
            return "sent", ""
        except smtplib.SMTPRecipientsRefused as error:
            code, words = error.recipients[row["recipient"]]
        except (OSError, ValueError, smtplib.SMTPException) as error:
            code = getattr(error, "smtp_code", 0)
            words = getattr(error, "smtp_error", f"{type(error).__name__}: {error}")
        finally:
            watchdog.cancel()
        text = decode(words, None) if isinstance(words, bytes) else str(words)
        text = one_line(f"{code or ''} {text}")[:300]
        # RFC 5321 4.2.1: 5yz is permanent, 4yz may pass; 3.8: after a 421 the session is over.
        if self.is_ready and code not in (0, 421):
            return "failed" if code >= 500 else "queued", text
        # A wrong password is not this mail's fault: it waits for the admin, as for the network.
        self.close()
        return "queued", f"cannot use the relay {self.account['smtp_host']}: {text}"

    def connect(self) -> None:
        """Open the session that the account's settings ask for. Certificates are verified."""
        host, port, security, username, password = (self.account[f"smtp_{name}"] for name in (
            "host", "port", "security", "username", "password"))
        # The name is for EHLO: smtplib would ask DNS for one, which may take longer than the
        # delivery. Made before it connects, so that the watchdog finds the socket in it.
        more: Row = {"context": ssl.create_default_context()} if security == "tls" else {}
        self.smtp = (TerseSMTPS if security == "tls" else TerseSMTP)(
            local_hostname=self.account["address"].rpartition("@")[2], timeout=DELIVERY, **more)
        self.smtp._host = host          # starttls and TLS check the certificate against it
        code, words = self.smtp.connect(
            host, port or {"none": 25, "starttls": 587, "tls": 465}[security])
        if code != 220:
            raise smtplib.SMTPConnectError(code, words)
        self.smtp.ehlo_or_helo_if_needed()
        if security == "starttls":
            self.smtp.starttls(context=ssl.create_default_context())
        if username is not None:        # the schema has it that security is not none here
            self.smtp.login(username, password or "")

    def abort(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.smtp.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Say QUIT, whatever comes back: every mail is settled by now."""
        with contextlib.suppress(OSError, smtplib.SMTPException, AttributeError):
            self.smtp.sock.settimeout(2)
            self.smtp.quit()
        with contextlib.suppress(OSError, AttributeError):
            self.smtp.close()
        self.smtp, self.is_ready = None, False


class TerseSMTP(smtplib.SMTP):
    """smtplib's session, which keeps each line of an endless reply; here one has an end."""

    def getreply(self) -> tuple[int, bytes]:
        if self.file is None and self.sock is not None:
            self.file = TerseFile(self.sock.makefile("rb"))
        if self.file is not None:
            self.file.left = MAX_REPLY
        return super().getreply()


class TerseSMTPS(TerseSMTP, smtplib.SMTP_SSL):
    pass


class TerseFile:
    """Lines of a file, until `left` bytes of it are read."""

    def __init__(self, file: Any):
        self.file = file
        self.close = file.close
        self.left = MAX_REPLY

    def readline(self, size: int) -> Any:
        line = self.file.readline(size)
        self.left -= len(line)
        if self.left < 0:
            raise OSError(f"a reply of more than {MAX_REPLY} bytes")
        return line


# -----------------------------------------------------------------------------------------
# Serve: waitress in front, the courier beside it.

GREETING = """A new database. Whoever posts mail has to know this secret:\n\n  {secret}\n
Paste this into your provider's inbound webhook, with your own https host name in it:\n
  {url}?secret={secret}\n\nTry it:\n
  curl -H 'X-Mobieus-Inbound-Secret: {secret}' -H 'Content-Type: application/json' {url} \\
    -d '{{"from": "ada@example.org", "text": "It works.", "message_id": "<{id}@example.org>"}}'
"""


def run_server(listen: str, store: Store) -> None:
    """Answer at `listen` and send the outbox until SIGTERM or SIGINT."""
    import waitress     # the only verb that needs it

    logging.Formatter.converter = time.gmtime
    logging.basicConfig(format="%(asctime)sZ %(message)s", datefmt="%FT%T", level="INFO")
    logging.getLogger("waitress.queue").setLevel("ERROR")   # a line for each that waits
    try:
        server = waitress.create_server(
            make_app(store), listen=listen, threads=THREADS, channel_timeout=30,
            cleanup_interval=5, max_request_header_size=16384, connection_limit=1000,
            asyncore_use_poll=True, max_request_body_size=MAX_BODY + 1)
    except (OSError, ValueError) as error:
        raise Refused(503, f"cannot listen on {listen!r}: {error}") from None
    for number in (signal.SIGTERM, signal.SIGINT):  # SystemExit lets what is in flight finish
        signal.signal(number, lambda *_: sys.exit(0))
    port = getattr(server, "effective_port", None) or server.effective_listen[0][1]
    # It listens before it opens: a taken port shall not use up the greeting.
    text = GREETING if store.open() else "listening: {url} (`inbound secret` prints the secret)"
    print(text.format(url=f"http://{listen.rpartition(':')[0]}:{port}{ENDPOINT}",
                      id=secrets.token_hex(8),
                      secret=store.accounts()[0]["inbound_secret"]), flush=True)
    stopping = threading.Event()
    courier = threading.Thread(target=run_courier, args=(store, stopping), daemon=True)
    courier.start()
    try:
        server.run()
    finally:
        stopping.set()
        store.has_mail.set()
        server.close()
        courier.join(LOOK)      # what it was sending then is sent again when its lease ends


def run_courier(store: Store, stopping: threading.Event) -> None:
    """Send what is due until `stopping` is set: woken by a commit, and every LOOK seconds."""
    while not stopping.is_set():
        store.has_mail.clear()
        try:
            send_due(store)
        except Refused as refusal:
            log.error("courier: %s", printable(refusal.reason))
        except Exception:
            log.exception("the courier goes on after this")
        store.has_mail.wait(LOOK)


# -----------------------------------------------------------------------------------------
# Verbs: one function each, in the order of --help; each takes the options, the store and the
# words that stand behind its name. What it prints goes through `show_rows` or `show_one`.

Verb = Callable[..., None]
Options = SimpleNamespace
VERBS: dict[str, tuple[str, Verb]] = {}         # name → usage, function


def verb(usage: str) -> Callable[[Verb], Verb]:
    """Register a function under the lower-case words that its usage begins with."""
    def register(function: Verb) -> Verb:
        VERBS[re.findall(r"^[a-z]+(?: [a-z]+\b)*", usage)[0]] = usage, function
        return function
    return register


@verb("serve [--listen 127.0.0.1:8080]")
def serve(options: Options, store: Store) -> None:
    """Make the database if there is none, answer the endpoint, and send the outbox."""
    run_server(options.listen, store)


@verb("secret show [--account ADDRESS] [--json]")
def secret_show(options: Options, store: Store) -> None:
    """Print the secret that callers of the endpoint must know."""
    account = chosen_account(options, store)
    names = ("address", "inbound_secret", "previous_secret", "previous_secret_until")
    show_one(options, {name: account[name] for name in names}, account["inbound_secret"])


@verb("secret set VALUE [--account ADDRESS] [--json]")
def secret_set(options: Options, store: Store, value: str) -> None:
    """Set the secret; the one before ends at once."""
    change_account(options, store, inbound_secret=value, previous_secret=None)
    secret_show(options, store)


@verb("secret rotate [--keep 24h] [--account ADDRESS] [--json]")
def secret_rotate(options: Options, store: Store) -> None:
    """Make a new secret; the old one stays valid for --keep."""
    change_account(options, store, inbound_secret=new_secret(),
                   previous_secret=chosen_account(options, store)["inbound_secret"],
                   previous_secret_until=store.now() + seconds_of(options.keep))
    secret_show(options, store)


def change_account(options: Options, store: Store, **values: Any) -> None:
    columns = ", ".join(f"{name} = ?" for name in values)
    identifier = chosen_account(options, store)["id"]
    store.write(lambda db, now: db.execute(
        f"UPDATE email_account SET {columns} WHERE id = ?", [*values.values(), identifier]))


@verb("account list [--json]")
def account_list(options: Options, store: Store) -> None:
    """List the accounts."""
    show_rows(options, [{name: account[name] for name in ("address", "display_name", "smtp_host")}
                        for account in store.accounts()])


@verb("account show [--account ADDRESS] [--json]")
def account_show(options: Options, store: Store) -> None:
    """Print an account's settings, as `account set` takes them."""
    show_one(options, settings_of(options, store))


@verb("account add ADDRESS [--json]")
def account_add(options: Options, store: Store, address: str) -> None:
    """Add an account, with a secret and so a URL of its own."""
    row = {"address": address, "inbound_secret": new_secret()}
    store.write(lambda db, now: insert(
        db, "email_account", **row, queue=store.accounts()[0]["queue"]))
    show_one(options, row)


@verb("account set KEY=VALUE ... [--account ADDRESS] [--json]")
def account_set(options: Options, store: Store, *settings: str) -> None:
    """Change settings and print what changed; an empty VALUE unsets one."""
    before = settings_of(options, store)
    values: Row = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in before:
            raise Usage(f"{name!r} is no setting{nearest(name, before)}: expected KEY=VALUE with "
                        f"a KEY of {', '.join(before)}")
        values[name] = value or None
    if "queue" in values:       # a name that is new makes a queue
        values["queue"] = store.write(queue_named, values["queue"])
    if values:
        change_account(options, store, **values)
    options.account = values.get("address", options.account)
    after = settings_of(options, store)
    changed = [f"{name}={readable(name, after[name])}" for name in values
               if after[name] != before[name] or name == "smtp_password"]
    show_one(options, after, "\n".join(changed) or "nothing changed")


def queue_named(db: DB, now: int, name: str) -> int:
    db.execute("INSERT OR IGNORE INTO queue (name) VALUES (?)", [name])
    row = db.execute("SELECT id FROM queue WHERE name = ?", [name]).fetchone()
    if row is None:
        raise Refused(400, "a queue needs a name")
    return int(row["id"])


def settings_of(options: Options, store: Store) -> Row:
    """What may be shown of an account: the columns that are neither ids nor secrets."""
    account = chosen_account(options, store)
    [queue] = store.rows("SELECT name FROM queue WHERE id = ?", [account["queue"]])
    shown = account | {"queue": queue["name"]}
    if shown["smtp_password"] is not None:
        shown["smtp_password"] = "(set)"
    return {name: value for name, value in shown.items()
            if name != "id" and "_secret" not in name}


def chosen_account(options: Options, store: Store) -> Row:
    """The account of --account, else the default one."""
    for account in store.accounts():
        if options.account is None or account["address"].lower() == options.account.lower():
            return account
    raise Refused(404, f"there is no account {options.account!r}: see `inbound account list`")


TICKETS = """SELECT ticket.reference, queue.name AS queue, ticket.status, ticket.subject,
    ticket.requester,
    (SELECT count(*) FROM message WHERE message.ticket = ticket.id) AS messages,
    ticket.created_at, ticket.updated_at
    FROM ticket JOIN queue ON queue.id = ticket.queue"""


@verb("tickets [open|closed|all] [--queue NAME] [--from ADDRESS] [--search WORDS] [--limit 50] "
      "[--account ADDRESS] [--json]")
def tickets(options: Options, store: Store, status: str = "open") -> None:
    """List tickets, those with the latest message first; --limit 0 lists all."""
    if status not in ("open", "closed", "all"):
        raise Usage(f"{status!r} is no status: expected open, closed or all")
    account = chosen_account(options, store)["id"] if options.account else None
    tests = [(test, value) for test, value in (
        ("ticket.status = ?", status if status != "all" else None),
        ("queue.name = ?", options.queue), ("ticket.requester = ?", getattr(options, "from")),
        ("ticket.email_account = ?", account)) if value]
    tests += [("""ticket.id IN (SELECT ticket FROM message
        WHERE instr(lower(from_address || ' ' || subject || ' ' || text), lower(?)))""", word)
        for word in (options.search or "").split()]
    show_rows(options, store.rows(
        f"""{TICKETS} WHERE {' AND '.join(['true', *(test for test, _ in tests)])}
        ORDER BY ticket.updated_at DESC, ticket.id DESC LIMIT ?""", [
            *(value for _, value in tests), number_of(options.limit) or -1]))


@verb("show REF [--last N] [--json]")
def show(options: Options, store: Store, reference: str) -> None:
    """Print a ticket: its messages, and why each was treated as it was."""
    ticket = ticket_of(store, reference)
    messages = store.rows("""SELECT direction, message_id, in_reply_to, "references",
        from_address AS "from", from_name, envelope_from, "to", cc, subject, text, html, headers,
        kind, reason, confirmation, notes, received_at, id FROM message WHERE ticket = ?
        ORDER BY id DESC LIMIT ?""", [ticket["id"], number_of(options.last or "0") or -1])[::-1]
    lines = ["{reference} ({status}, {queue}): {subject} <{requester}>".format(**ticket)]
    for message in messages:
        for name in ("references", "to", "cc", "headers", "notes"):
            message[name] = json.loads(message[name])
        message["attachments"] = store.rows("""SELECT id, filename, content_type, content_id,
            size, sha256, note FROM attachment WHERE message = ?""", [message.pop("id")])
        kind = f"{message['kind']}: " if message["kind"] else ""
        lines += ["", "--- {direction} {} {from_name} <{from}>".format(
            readable("_at", message["received_at"]), **message), f"    {kind}{message['reason']}"]
        lines += [f"    note: {note}" for note in message["notes"]]
        lines += ["    attachment {id}: {filename} ({content_type}, {size} bytes) {note}".format(
            **each).rstrip() for each in message["attachments"]]
        lines += ["", message["text"].rstrip("\n")]
    names = ("reference", "queue", "status", "subject", "requester")
    show_one(options, {name: ticket[name] for name in names} | {"messages": messages},
             "\n".join(lines))


def ticket_of(store: Store, reference: str) -> Row:
    rows = store.rows("""SELECT ticket.*, queue.name AS queue FROM ticket
        JOIN queue ON queue.id = ticket.queue WHERE reference = ?""", [reference.upper()])
    return one_of(rows, f"ticket {reference!r}", "inbound tickets all")


def one_of(rows: list[Row], what: str, where: str) -> Row:
    if not rows:
        raise Refused(404, f"there is no {what}: see `{where}`")
    return rows[0]


@verb("attachment ID [FILE]")
def attachment(options: Options, store: Store, identifier: str, file: str = "") -> None:
    """Write an attachment to FILE, never over an existing one, or to standard output."""
    row = one_of(store.rows("SELECT content, note FROM attachment WHERE id = ?", [
        number_of(identifier)]), f"attachment {identifier}", "inbound show REF")
    if row["content"] is None:
        raise Refused(404, f"attachment {identifier} was {row['note']}")
    try:
        with open(file, "xb") if file else contextlib.nullcontext(sys.stdout.buffer) as output:
            output.write(row["content"])
    except OSError as error:
        raise Refused(400, f"cannot write {file!r}: {error.strerror}") from None


@verb("reply REF [--to ADDRESS] [--json]")
def reply(options: Options, store: Store, reference: str) -> None:
    """Answer the requester, or --to, with the text on standard input."""
    ticket = ticket_of(store, reference)
    text = clean(decode(sys.stdin.buffer.read(), None))
    if not text.strip():
        raise Refused(400, "the reply is empty: expected its text on standard input")
    address = options.to or ticket["requester"]
    recipient = deliverable(address)
    if recipient is None:
        raise Refused(400, f"{address!r} is not an address that we can write to")
    message_id, author = store.write(send_reply, ticket, recipient, text)
    if mailbox_key(author) != mailbox_key(recipient):
        print(f"inbound: {author} wrote last, this goes to {recipient}", file=sys.stderr)
    show_one(options, {
        "reference": ticket["reference"], "to": recipient, "message_id": message_id})


def send_reply(db: DB, now: int, ticket: Row, recipient: str, text: str) -> tuple[str, str]:
    """Put a reply into the outbox; return its Message-ID and who wrote what it answers."""
    account = db.execute("SELECT * FROM email_account WHERE id = ?", [
        ticket["email_account"]]).fetchone()
    parent = db.execute("""SELECT * FROM message WHERE ticket = ? AND direction = 'in'
        ORDER BY id DESC LIMIT 1""", [ticket["id"]]).fetchone()
    # `=?` is broken up: EmailMessage would decode the sender's words into our header.
    subject = re.sub(r"^(?:re:\s*)+", "", ticket["subject"], flags=re.I).replace("=?", "= ?")
    draft = draft_mail(
        account, now, recipient, {}, subject=f"[{ticket['reference']}] Re: {subject[:200]}",
        text=text, ancestors=[*json.loads(parent["references"]), parent["message_id"]])
    send_later(db, now, account, ticket, draft, "reply")
    return draft[0].message_id, parent["from_address"]


@verb("close REF [--json]")
def close(options: Options, store: Store, reference: str) -> None:
    """Close a ticket; a reply of its requester opens it again."""
    set_status(options, store, reference, "closed")


@verb("reopen REF [--json]")
def reopen(options: Options, store: Store, reference: str) -> None:
    """Open a closed ticket."""
    set_status(options, store, reference, "open")


def set_status(options: Options, store: Store, reference: str, status: str) -> None:
    ticket = ticket_of(store, reference)
    store.write(lambda db, now: db.execute(
        "UPDATE ticket SET status = ?, updated_at = ? WHERE id = ?", [status, now, ticket["id"]]))
    show_one(options, {"reference": ticket["reference"], "status": status})


@verb("relay URL [--sender ADDRESS] [--secret-file inbound.secret]")
def relay(options: Options, store: Store, url: str) -> None:
    """Post the mail on standard input; for Postfix, Exim and OpenSMTPD.

    The envelope sender is --sender or $SENDER, the secret $INBOUND_SECRET or in --secret-file.
    Exit (sysexits.h) 0: stored. 75: try again. 77: wrong secret. 65: never accepted.
    """
    mail_from = os.environ.get("SENDER") if options.sender is None else options.sender
    line = "" if mail_from is None else f"Return-Path: <{mail_from.strip('<>')}>\r\n"
    mail = sys.stdin.buffer.read()
    mail = os.fsencode(line) + mail[end_of_mbox_lines(mail):]
    try:
        secret = os.environ.get("INBOUND_SECRET") or Path(options.secret_file).read_text()
        status, words = post_to(url, mail, secret.strip().partition("\n")[0].strip())
        code = {200: 0, 401: 77, 400: 65, 413: 65, 415: 65, 422: 65}.get(status, 75)
        if status != 413 and not at(words, "error" if code else "status"):
            code = 75           # somebody else's page
    except (OSError, ValueError, http.client.HTTPException) as error:
        code, words = 75, f"{type(error).__name__}: {error}: expected an http(s) URL, and the " \
            "secret in $INBOUND_SECRET or --secret-file"
    print(words.strip(), file=sys.stderr if code else sys.stdout)
    raise SystemExit(code)


def post_to(address: str, body: bytes, secret: str, kind: str = "message/rfc822") -> tuple[
        int, str]:
    """POST without following redirects; return (HTTP status, answer)."""
    url = urllib.parse.urlsplit(address)
    https = url.scheme == "https"
    connect_to = http.client.HTTPSConnection if https else http.client.HTTPConnection
    with contextlib.closing(connect_to(url.netloc, timeout=60)) as connection:
        target = urllib.parse.urlunsplit(("", "", url.path, url.query, ""))
        connection.request("POST", target, body, {
            "Content-Type": kind, "X-Mobieus-Inbound-Secret": secret})
        response = connection.getresponse()
        return response.status, decode(response.read(), None)


OUTBOX = """SELECT outbox.id, ticket.reference AS ticket, outbox.recipient AS "to", outbox.state,
    outbox.attempts, outbox.next_attempt_at, outbox.last_error
    FROM outbox JOIN message ON message.id = outbox.message
    JOIN ticket ON ticket.id = message.ticket"""


@verb("outbox list [--limit 500] [--json]")
def outbox_list(options: Options, store: Store) -> None:
    """List mail on its way out, the latest last."""
    show_rows(options, store.rows(f"{OUTBOX} ORDER BY outbox.id DESC LIMIT ?", [
        number_of(options.limit) or -1])[::-1])


@verb("outbox show ID [--json]")
def outbox_show(options: Options, store: Store, identifier: str) -> None:
    """Print a mail as it goes out."""
    row = outbox_row(store, identifier)
    [found] = store.rows("SELECT content FROM outbox WHERE id = ?", [row["id"]])
    content = decode(found["content"], None)
    show_one(options, row | {"content": content}, content)


def outbox_row(store: Store, identifier: str) -> Row:
    rows = store.rows(f"{OUTBOX} WHERE outbox.id = ?", [number_of(identifier)])
    return one_of(rows, f"mail {identifier}", "inbound outbox")


@verb("outbox send [--json]")
def outbox_send(options: Options, store: Store) -> None:
    """Send what is due now; for cron, where another server than `serve` runs the app."""
    outcomes = dict(send_due(store))
    show_one(options, outcomes, None if outcomes else "nothing is due")


@verb("outbox retry ID|all [--json]")
def outbox_retry(options: Options, store: Store, which: str) -> None:
    """Make a mail due now, or all that failed."""
    test = "state = 'failed'" if which == "all" else f"id = {number_of(which)}"
    rows = store.write(retry, test)
    if which == "all":
        show_rows(options, rows, "nothing has failed")
    elif rows:
        show_one(options, rows[0])
    else:
        raise Refused(404, f"mail {which} is {outbox_row(store, which)['state']}")


def retry(db: DB, now: int, test: str) -> list[Row]:
    return db.execute(f"""UPDATE outbox SET state = 'queued', next_attempt_at = ?, give_up_at = ?
        WHERE {test} AND (state IN ('queued', 'failed')
            OR state = 'sending' AND next_attempt_at <= ?)
        RETURNING id, state""", [now, now + GIVE_UP, now]).fetchall()


@verb("rejected list [--limit 500] [--json]")
def rejected_list(options: Options, store: Store) -> None:
    """List posts that could not become a message, the latest last."""
    show_rows(options, store.rows("""SELECT id, received_at, status, reason, content_type,
        length(body) AS size FROM rejected ORDER BY id DESC LIMIT ?""", [
            number_of(options.limit) or -1])[::-1])


@verb("rejected show ID [--json]")
def rejected_show(options: Options, store: Store, identifier: str) -> None:
    """Print a post as it is kept, secrets starred out."""
    row = rejected_row(store, identifier)
    row |= {"size": len(row["body"]), "body": decode(row["body"], None)}
    show_one(options, row)


def rejected_row(store: Store, identifier: str) -> Row:
    rows = store.rows("SELECT * FROM rejected WHERE id = ?", [number_of(identifier)])
    return one_of(rows, f"rejected post {identifier}", "inbound rejected")


@verb("rejected replay [ID] [--json]")
def rejected_replay(options: Options, store: Store, identifier: str = "") -> None:
    """Post kept bodies again, from inside; drop a row once all of it is stored."""
    identifiers = [identifier] if identifier else [
        str(row["id"]) for row in store.rows("SELECT id FROM rejected ORDER BY id")]
    results = []
    for each in identifiers:
        row = rejected_row(store, each)
        owner = [account for account in store.accounts() if account["id"] == row["email_account"]]
        post = Post([*owner, *store.accounts()][0], store.own_addresses(), row["content_type"],
                    row["body"], row["received_at"])
        try:
            answer = receive(store, post)[1]
        except Refused as refusal:
            answer = {"status": "refused", "reason": refusal.reason}
        results.append({"id": row["id"], **answer})
        outcomes = {item["status"] for item in answer.get("messages", [answer])}
        if outcomes <= {"created", "appended", "duplicate"}:
            store.write(delete_rejected, row["id"])
    show_rows(options, results, "nothing was rejected")


@verb("rejected delete ID [--json]")
def rejected_delete(options: Options, store: Store, identifier: str) -> None:
    """Delete a kept post."""
    row = rejected_row(store, identifier)
    store.write(delete_rejected, row["id"])
    show_one(options, {"id": row["id"], "reason": row["reason"]})


def delete_rejected(db: DB, now: int, identifier: int) -> None:
    db.execute("DELETE FROM rejected WHERE id = ?", [identifier])


# -----------------------------------------------------------------------------------------
# Command line: parsing and printing. Nothing that is printed drives a terminal.

FIRST_VERBS = {"secret": "show", "account": "show", "outbox": "list", "rejected": "list"}


def parse(argv: list[str]) -> tuple[str, Options, list[str]]:
    """(verb, options, words behind it) of a command line; Usage when it means nothing."""
    valued = {name for usage, _ in VERBS.values() for name in re.findall(r"--([\w-]+) ", usage)}
    try:
        given, words = getopt.gnu_getopt(argv, "h", [
            "db=", "help", "json", "version", *(f"{name}=" for name in valued)])
    except getopt.GetoptError as error:
        raise Usage(f"{error}: see inbound --help") from None
    known = {name.lstrip("-"): value for name, value in given}
    if {"help", "h", "version"} & {*known} and not words:
        return "version" if "version" in known else "help", Options(), []
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in VERBS:
            break
    else:
        length, name = 1, " ".join([*words[:1], FIRST_VERBS.get(" ".join(words), "")]).strip()
    if name not in VERBS:
        typed = " ".join(words[:2])
        raise Usage(f"there is no verb {typed!r}{nearest(typed, VERBS)}: see inbound --help")
    usage, function = VERBS[name]
    if {"help", "h"} & {*known}:
        print(f"Usage: inbound {usage}\n\n{inspect.getdoc(function)}")
        return "", Options(), []
    db = known.pop("db", os.environ.get("INBOUND_DB") or "inbound.db")
    accepted = {option: None if default.isupper() else default
                for option, default in re.findall(r"--([\w-]+) ?([^\s\]]*)", usage)}
    if strange := known.keys() - accepted:
        raise Usage(f"--{min(strange)} means nothing here: inbound {usage}")
    named = {option.replace("-", "_"): value for option, value in {**accepted, **known}.items()}
    options = Options(**{"account": None, **named, "db": db, "json": "json" in known})
    try:
        inspect.signature(function).bind(options, None, *words[length:])
    except TypeError:
        raise Usage(f"too few or too many words: inbound {usage}") from None
    return name, options, words[length:]


def nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, [*known], 1, 0.5)
    return f"; did you mean {found[0]!r}" if found else ""


def number_of(word: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", word):
        raise Usage(f"{word!r} is no number")
    return int(word)


def seconds_of(text: str) -> int:
    found = re.fullmatch("([0-9]{1,6})([smhd])", text)
    if not found:
        raise Usage(f"{text!r} is no time; expected a number and s, m, h or d, like 24h")
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def show_one(options: Options, row: Row, text: str | None = None) -> None:
    """Print a row: as JSON with --json, else `text` or a line a field."""
    if text is None:
        text = "\n".join(f"{name}={readable(name, value)}" for name, value in row.items())
    if options.json:
        text = json.dumps(row, ensure_ascii=False, indent=1)
    text = text.replace("\r\n", "\n").rstrip("\n")
    print(re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f]", "?", text))


def show_rows(options: Options, rows: list[Row], nothing: str = "") -> None:
    """Print rows: a JSON list, lines into a pipe, on a terminal a table cut to its width."""
    if options.json:
        print(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    lines = [[one_line(readable(name, value)) for name, value in row.items()] for row in rows]
    if rows and sys.stdout.isatty():
        lines = [[name.upper() for name in rows[0]], *lines]
        widths = [max(map(len, column)) for column in zip(*lines)]
        room = shutil.get_terminal_size().columns - 2 * len(widths)
        while sum(widths) > room and max(widths) > 8:
            widths[widths.index(max(widths))] -= 1
        lines = [[cell[:width].ljust(width) for cell, width in zip(line, widths)]
                 for line in lines]
    print("\n".join("  ".join(line).rstrip() for line in lines) or nothing)


def readable(name: str, value: Any) -> str:
    if name.endswith(("_at", "_until")) and value:
        return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(value))
    return "" if value is None else str(value)


def words_of(error: sqlite3.IntegrityError) -> str:
    """Our words for a broken constraint: schema.sql names its CHECKs with sentences."""
    kind, _, name = str(error).partition(" constraint failed: ")
    return f"{name.rpartition('.')[2]} is another's already" if kind == "UNIQUE" else name or kind


def main(argv: list[str] | None = None, clock: Callable[[], float] = time.time) -> int:
    """Run one verb; return the exit code: 0, 1 for an error, 2 for wrong usage."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        name, options, words = parse(sys.argv[1:] if argv is None else argv)
        if name in ("help", "version"):
            print((__doc__ or "").strip() if name == "help" else f"inbound {VERSION}")
        elif name:
            with contextlib.closing(Store(options.db, clock, name == "serve")) as store:
                if name not in ("serve", "relay"):      # `serve` opens when it listens
                    store.open(create=False)
                VERBS[name][1](options, store, *words)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:                     # `inbound tickets | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except sqlite3.IntegrityError as error:
        print(f"inbound: {words_of(error)}", file=sys.stderr)
    except (Refused, Usage) as error:
        print(f"inbound: {error}", file=sys.stderr)
        return 2 if isinstance(error, Usage) else 1
    return 1


if __name__ == "__main__":
    sys.exit(main())
