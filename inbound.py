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
Answer = tuple[int, Row, "str | None"]      # status, JSON object, text that is sent in its place
Wsgi = Callable[[Row, Callable[..., Any]], list[bytes]]


def make_app(store: Store) -> Wsgi:
    """Return the WSGI application (PEP 3333) that files mail in `store`."""

    def app(environ: Row, start_response: Callable[..., Any]) -> list[bytes]:
        began = time.perf_counter()
        try:
            status, content, text = respond(store, environ)
        except Refused as refusal:
            fields = {"fields": refusal.fields} if refusal.fields else {}
            status, content, text = refusal.status, {"error": refusal.reason, **fields}, None
        except Exception:
            log.exception("while answering")
            error = "unexpected: nothing was stored, send it again"
            status, content, text = 500, {"error": error}, None
        line = json.dumps(content)
        # Escaped and capped: nobody outside writes a line of this log.
        log.info("%d %sB %.0fms %s %s", status, environ.get("CONTENT_LENGTH") or 0,
                 1000 * (time.perf_counter() - began), environ.get("REMOTE_ADDR") or "-",
                 printable(line[1:-1])[:300])
        body = (line + "\n" if text is None else text).encode()
        kind = "application/json" if text is None else "text/plain"
        start_response(f"{status} {http.HTTPStatus(status).phrase}", [
            ("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(body))),
            *ANSWER_HEADERS.get(status, [])])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return app


def app(environ: Row, start_response: Callable[..., Any]) -> list[bytes]:
    """The WSGI application for other servers: database from $INBOUND_DB, made on first use."""
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
    # As it was sent: servers make `//api` and `/api%2F` the same path, proxies' rules do not.
    sent = environ.get("REQUEST_URI") or environ.get("RAW_URI") or path
    is_plain = sent.partition("?")[0] == environ.get("SCRIPT_NAME", "") + path
    if path not in (ENDPOINT, ENDPOINT + "/") or not is_plain:
        raise Refused(404, f"there is nothing here; mail is posted to {ENDPOINT}")
    if method in ("GET", "HEAD"):   # some providers probe the URL before they use it
        return 200, {"status": "probed"}, "inbound: post received mail here\n"
    if method != "POST":
        raise Refused(405, f"{method[:20]!r} is not answered here; mail arrives by POST")
    account, body, by_body = authenticate(store, environ)
    query = urllib.parse.parse_qs(environ.get("QUERY_STRING", ""))
    if "validationToken" in query:  # Microsoft Graph probes so
        return 200, {"status": "probed"}, query["validationToken"][0]
    post = Post(account, store.own_addresses(), environ.get("CONTENT_TYPE", ""), body)
    try:
        provider, content = receive(store, post)
    except Refused as refusal:
        if refusal.status == 503 or not by_body:
            raise
        provider, content = "SocketLabs", {"status": "refused", "reason": refusal.reason}
    # SocketLabs wants its Validation Key as the body of every answer (SPEC 2).
    is_theirs = by_body or provider == "SocketLabs"
    return 200, content, account["validation_key"] if is_theirs else None


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


def receive(store: Store, post: Post) -> tuple[str, Row]:
    """Make messages of a post and store them; return (provider, answer).

    What could not be understood is kept in `rejected` before Refused 400, 415, 422 or
    `quarantined` says so. `rejected replay` comes this way too.
    """
    reading = Reading("", [])
    try:
        with one_heavy_at_a_time(post.body):
            reading = read(post, store.own_providers)
            filings = [understand(reading, member, post) for member in reading.members]
            kept = safe(post) if any(isinstance(each, str) for each in filings) else post
        results = store.write(file_post, post, filings, kept)
    except Refused as refusal:
        reason = starred(post.account, refusal.reason)  # the value it names may be the secret
        if refusal.status in (400, 415, 422):
            store.write(keep, safe(post), refusal.status, reason)
        faults = {name: starred(post.account, fault) for name, fault in refusal.fields.items()}
        raise Refused(refusal.status, reason, faults) from None
    except Exception as error:
        results = [store.write(quarantine, safe(post), [fault_of(error, post, reading.provider)])]
    if not results:
        if reading.is_kept:
            store.write(keep, safe(post), 200, reading.notice)
        return reading.provider, {"status": "ignored", "reason": reading.notice}
    if any(result["confirmation"] == "queued" for result in results):
        store.has_mail.set()
    return reading.provider, (
        {"status": "batch", "messages": results} if reading.is_batch else results[0])


@contextlib.contextmanager
def one_heavy_at_a_time(body: bytes) -> Iterator[None]:
    """Let one large post be understood and the others wait; Refused 503 when that takes long."""
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
        if reading.cut:
            mail["whole"] = (reading.cut, "post.json", "application/json", safe(post).body)
        message = normalise(mail, is_strict=reading.provider == "canonical")
        forwarders = post.account["trusted_forwarders"] or ""
        return Filing(message, *classify(message, post.own_addresses, forwarders))
    except Refused:
        raise
    except Exception as error:
        return fault_of(error, post, reading.provider)


def fault_of(error: Exception, post: Post, provider: str) -> str:
    """What is kept of an unexpected error: enough to look for, too little to leak a mail."""
    words = printable(f"{type(error).__name__}: {error}"[:180])
    return starred(post.account, f"{words} ({provider or 'unread'})")


def health(store: Store) -> Answer:
    """GET /healthz: 503 with reasons when mail is not taken or sent; the rest is a warning."""
    reasons: list[str] = []
    warnings: list[str] = []
    try:
        store.write(rehearse)
        reasons, warnings = troubles(store)
    except Refused as refusal:
        reasons.append(refusal.reason)
    if reasons:
        return 503, {"status": "degraded", "reasons": reasons}, None
    return 200, {"status": "ok", "warnings": warnings}, None


TROUBLES = """
    SELECT 1 AS is_urgent, 'no secret is set: run `inbound secret rotate`' AS words
    WHERE NOT EXISTS (SELECT 1 FROM email_account WHERE inbound_secret IS NOT NULL)
    UNION ALL SELECT 1, 'the outbox waits for over an hour: run `inbound outbox`'
    WHERE EXISTS (SELECT 1 FROM outbox
        WHERE state IN ('queued', 'sending') AND created_at < :now - 3600)
    UNION ALL SELECT 0, address || ' sends nothing: run `inbound account set address=… smtp_host=…`'
    FROM email_account WHERE smtp_host IS NULL OR address = 'support@localhost'
    UNION ALL SELECT 0, count(*) || ' rejected posts are waiting: run `inbound rejected`'
    FROM (SELECT 1 FROM rejected LIMIT 1000) HAVING count(*)
    UNION ALL SELECT 0, count(*) || ' mails could not be sent: run `inbound outbox`'
    FROM (SELECT 1 FROM outbox WHERE state = 'failed' LIMIT 1000) HAVING count(*)"""


def troubles(store: Store) -> tuple[list[str], list[str]]:
    """What /healthz and `doctor` say of the service: (what is urgent, what can wait)."""
    reasons: list[str] = []
    warnings: list[str] = []
    now = store.now()
    disk = shutil.disk_usage(Path(store.path).resolve().parent)
    if disk.free < disk.total / 20:
        reasons.append(f"disk: {disk.free / disk.total:.1%} free, expected 5 % or more")
    for row in store.rows(TROUBLES, {"now": now}):
        (reasons if row["is_urgent"] else warnings).append(row["words"])
    refused = sum(at > now - REFUSALS_SHOWN for at, _ in [*store.refusals])
    if refused:
        warnings.append(f"{refused} posts had a wrong secret in the last hour")
    return reasons, warnings


# -----------------------------------------------------------------------------------------
# Authenticate: the first place that holds a secret decides, even when it is empty there. The
# secrets of all accounts are compared, always, so that the time tells nothing. Of a
# stranger's post nothing but header lines is looked at.

def authenticate(store: Store, environ: Row) -> tuple[Row, bytes, bool]:
    """Return (email_account row of the secret, body, whether the body held the secret).

    Refused 503 while no account has a secret (so that providers keep the mail), else 401.
    """
    accounts, body = store.accounts(), b""
    known = [(account["inbound_secret"], account) for account in accounts] + [
        (account["previous_secret"], account) for account in accounts
        if (account["previous_secret_until"] or 0) > store.now()]
    known = [(secret.encode(), account) for secret, account in known if secret]
    if not known:
        raise Refused(503, "no secret is set yet: run `inbound secret rotate`")
    presented = presented_secret(environ)
    by_body = presented is None
    if presented is None:       # SocketLabs' may be in the body, of accounts that have its key
        known = [(secret, account) for secret, account in known if account["validation_key"]]
        body = body_of(environ) if known else b""
        presented = secret_in(environ.get("CONTENT_TYPE", ""), body, known)
    theirs = hashlib.sha256(presented).digest()
    found = [(secret, account) for secret, account in known     # digests: all of one length
             if hmac.compare_digest(hashlib.sha256(secret).digest(), theirs)]
    if not found:
        store.refusals.append((store.now(), environ.get("REMOTE_ADDR") or "-"))
        raise Refused(401, "no right secret in X-Mobieus-Inbound-Secret, ?secret= or HTTP Basic")
    return found[0][1], body if by_body else body_of(environ), by_body


def presented_secret(environ: Row) -> bytes | None:
    """The secret of header, query or HTTP Basic; b"" when unusable, None when in none."""
    header = environ.get("HTTP_X_MOBIEUS_INBOUND_SECRET")
    if header is not None:      # PEP 3333. A repeated header arrives joined: no match.
        return str(header).encode("latin-1")
    query = urllib.parse.parse_qs(environ.get("QUERY_STRING", ""), True, encoding="latin-1")
    if "secret" in query:
        return query["secret"][0].encode("latin-1") if len(query["secret"]) == 1 else b""
    scheme, _, credentials = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    with contextlib.suppress(ValueError):   # RFC 7617 2: user-id ":" password. Any user-id.
        return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    return b""


def secret_in(content_type: str, body: bytes, known: list[tuple[bytes, Row]]) -> bytes:
    """`SecretKey` of a body; before it is parsed a known secret has to stand in its bytes."""
    if any(spellings(secret).search(body) for secret, _ in known):
        with contextlib.suppress(Refused), one_heavy_at_a_time(body):
            fields = fields_of(content_type, body)
            if isinstance(fields, dict):
                return str(fields.get("SecretKey")).encode("utf-8", "replace")
    return b""


@functools.lru_cache(100)
def spellings(secret: bytes) -> re.Pattern[bytes]:
    """Find a text in bytes, however JSON or a URL spells it.

    Each branch begins with a literal, so that re looks for first characters in C.
    """
    pattern = b""
    for char in secret:
        digits = b"%x[%x%X]" % (char >> 4, char & 15, char & 15)
        itself = re.escape(b"%c" % char)
        blank = rb"|\+" if char == 32 else b""
        pattern += rb"(?:%b|\\%b|%%%b|\\u00%b%b)" % (itself, itself, digits, digits, blank)
    return re.compile(pattern)


# -----------------------------------------------------------------------------------------
# Read, bodies: bytes → fields, or the bytes of a raw mail. JSON, forms and multiparts are
# taken apart here, each within its budget; who posted is recognised from the body alone.

FORM = "application/x-www-form-urlencoded"
RAW_FIELDS = ("email", "message", "body-mime")  # of forms: a mail has charsets of its own
FROM_HEADERS = ("from", "to", "cc", "subject")  # fields that a header stands in for
HEADER_START = re.compile(rb"From |[!-9;-~]+:(?:[ \t]|\r?\n[ \t])")
JSON_MARK = re.compile(r'\\.|["\[\]{},]', re.S)
CLOSERS = {"[": "]", "{": "}"}


OwnProviders = Callable[[], list[tuple[str, Row]]]


class Fields(Row):
    """The fields of a body; only what was a JSON object may be the canonical body."""

    is_object = False
    cut = ""                    # which bound of the budget it went past


def read(post: Post, own_providers: OwnProviders) -> Reading:
    """Tell what a post carries; `own_providers` returns the rows of that table.

    Refused 400: not decodable, 415: no type that mail comes in, 422: no mail in it, and
    what to do about it.
    """
    fields = fields_of(post.content_type, post.body)
    if isinstance(fields, bytes):
        return Reading("raw", [fields], mail_of_mime)
    provider = provider_of(fields, own_providers)
    if provider is None:
        if notice := notice_in(fields):
            return Reading("", [], notice=notice, is_kept="SubscribeURL" in fields)
        if not fields.is_object:
            raise Refused(400, (
                "no provider known posts such a form, list or value; expected a JSON "
                "object"))
        if fields and not CANONICAL.keys() & fields.keys():
            raise Refused(422, (
                "no known provider posts this; it is kept: describe it in the table "
                "`provider`, then `inbound rejected replay`, or send the canonical body "
                "(`from`, `message_id`, …)"))
        provider = CANONICAL_BODY
    members = members_of(provider, fields) if provider.batch else [fields]
    return Reading(
        provider.name, members,
        to_mail=functools.partial(mail_of, provider),
        is_batch=bool(provider.batch),
        notice=f"{provider.name} posted no mail",
        cut=fields.cut)


def fields_of(content_type: str, body: bytes) -> Fields | bytes:
    """Take a body apart; Refused 400: not decodable, 415: no type that mail comes in."""
    content_type = clean(content_type) or "application/json"
    header = content_headers([["Content-Type", content_type]])
    kind = header.get_content_type()
    if kind in ("message/rfc822", "message/global"):    # RFC 6532: the same in UTF-8
        if not re.search(rb"\S", body):
            raise Refused(400, f"the {kind} is empty; expected a mail")
        return body
    if kind == "multipart/form-data":
        boundary = header.get_boundary() or ""
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


FormField = tuple[str, "Row | None", bytes]         # name, what tells of a file, content


def multipart_field(part: memoryview) -> FormField:
    """A field of multipart/form-data (RFC 7578); a file, too, where it has no name."""
    headers, content = MimeReader().head_of(part)
    header = content_headers(headers)
    name = str(header.get_param("name", "", "content-disposition"))
    value = bytes(content)
    if header.get_filename() is None and header.get_content_maintype() == "text":
        return name, None, value
    return name, file_of(header, value), value


def url_encoded_field(pair: bytes) -> FormField:
    """A field of a form; a bare name is a field without a value.

    Percent-encoding is quoted-printable with another sign. We do not use urllib: it makes
    an object of each escape, 17 times the size.
    """
    quoted = pair.replace(b"+", b" ").replace(b"=", b"%3D").replace(b"%", b"=")
    name, _, value = binascii.a2b_qp(quoted).partition(b"=")
    return decode(name, None), None, value


def form_of(pieces: list[Any], field_of: Callable[[Any], FormField]) -> Fields:
    """The fields of a form by name, its files in `files`.

    `envelope[to]` and `attachments[0][filename]` become objects, as they are meant.
    """
    form = Fields()
    files = []
    texts: dict[str, list[bytes]] = {}
    for piece in pieces[:MAX_FIELDS]:
        name, file, content = field_of(piece)
        if file:
            files.append(file | {"field": name})
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
    if charsets and name in FROM_HEADERS:
        with contextlib.suppress(LookupError, ValueError):
            return content.decode(codec_of(charset)[0])
        return ""
    return decode(content, charset)


def parse_json(body: bytes) -> Fields:
    """The object in `body`, or else its value as `events`; strict UTF-8, Refused 400.

    We do not give json.loads the bytes: it guesses UTF-16 and lets lone surrogates through.
    """
    try:
        text = body.decode("utf-8-sig")
        within = within_json_budget(text)
        value = json.loads(within, parse_constant=int)      # int("NaN") raises
    except (ValueError, RecursionError) as error:       # UnicodeDecodeError is the former
        reason = printable(str(error))[:200]
        raise Refused(400, f"the body is not JSON in UTF-8: {reason}") from None
    is_object = isinstance(value, dict)
    if is_object and "TopicArn" in value:       # SNS: what was published is inside
        value = json_in(value.get("Message")) or value
    fields = Fields(value if isinstance(value, dict) else {"events": value})
    fields.is_object = is_object
    fields.cut = "" if within is text else f"more than {MAX_VALUES} values in the JSON"
    return fields


def within_json_budget(text: str) -> str:
    """A JSON text, or as much of its beginning as MAX_VALUES allows, closed properly.

    Python takes up to 60 bytes for each of the 3 in `[],`.
    """
    if sum(text.count(mark) for mark in '[{"') < MAX_VALUES:
        return text
    closers: list[str] = []
    values = 0
    is_string = False
    for found in JSON_MARK.finditer(text):
        mark = found[0]
        if mark == '"':
            is_string = not is_string
            values += is_string
        elif is_string:
            continue
        elif mark in CLOSERS:
            closers.append(CLOSERS[mark])
            values += 1
        elif mark == "," and values > MAX_VALUES:
            return text[:found.start()] + "".join(reversed(closers))
        elif mark in "]}" and closers:
            closers.pop()
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
    if isinstance(path, tuple):
        found = [at(value, each) for each in path]
        return next(filter(None, found), missing)
    if path is None:
        return missing
    for step in filter(None, path.split(".")):
        if isinstance(value, str):
            value = json_in(value)
        if isinstance(value, list):
            value = {str(place): item for place, item in enumerate(value)}
        if not isinstance(value, dict) or step not in value:
            return missing
        value = value[step]
    return value


def items_of(value: Any) -> list[Any]:
    """A list, what stands for one (a form's `a[0]`, Mandrill's by name), or one value."""
    if isinstance(value, dict) and all(
            key.isdigit() or isinstance(value[key], dict)
            for key in value):
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

# The first two match everywhere, if only nothing, or the end.
MBOX = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:>?From [^\n]*\n)*")
END_OF_HEAD = re.compile(rb"(?m)^[ \t]*\r?\n|\Z")           # a line of blanks is an end too
HEADER_LINE = re.compile(r"(?s)\A(?:([!-9;-~]+)[ \t]*:)?(.*)")     # RFC 5322 4.5: blanks
SHOWN = re.compile("text/(?:plain|html)|multipart/.*")          # as far as it is inline


def mail_of_mime(content: bytes) -> Mail:
    """The canonical dict of a raw mail; what stands in its headers is left there."""
    start = next(MBOX.finditer(content)).end()
    reader = MimeReader()
    raw_headers, body = reader.head_of(memoryview(content)[start:])
    leaves = [*reader.leaves(raw_headers, body)]
    inline = [fields for fields, _ in leaves
              if SHOWN.fullmatch(fields.get_content_type())
              and fields.get_content_disposition() != "attachment"]
    # RFC 2183 2.1: inline is shown; a named one when there is no other.
    unnamed = [fields for fields in inline if fields.get_filename() is None]
    texts = unnamed or inline
    text: list[str] = []
    markup: list[str] = []
    attachments = []
    for fields, part in leaves:
        decoded = transfer_decoded(fields, part)
        if fields in texts:
            pieces = markup if fields.get_content_type() == "text/html" else text
            pieces.append(decode(decoded, fields.get_content_charset()))
        else:
            attachments.append(file_of(fields, decoded))
    charset = texts[0].get_content_charset() if texts else None
    mail: Mail = {
        "headers": [[name, header_text(value, charset)] for name, value in raw_headers],
        "text": "\n".join(text),
        "html": "\n".join(markup),
        "attachments": attachments}
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
               depth: int = 0) -> Iterator[tuple[email.message.Message, memoryview]]:
        """(Content- headers, body) of all that is in a part and holds no parts itself."""
        fields = content_headers(headers)
        fields.set_default_type(default)
        kind = fields.get_content_type()
        parts: list[memoryview] = []
        if kind.startswith("multipart/"):
            parts = split_parts(body, fields.get_boundary() or "", self.parts)
        if parts and depth == MAX_DEPTH:
            self.cut = f"more than {MAX_DEPTH} multiparts inside each other"
            parts = []
        if not parts:
            yield fields, body
        # RFC 2046 5.1.5: what a digest holds is a mail unless it says otherwise.
        default = "message/rfc822" if kind == "multipart/digest" else "text/plain"
        for part in parts:
            if not self.parts:
                self.cut = f"more than {MAX_PARTS} parts"
                break
            self.parts -= 1
            yield from self.leaves(*self.head_of(part), default, depth + 1)


def split_parts(content: memoryview, boundary: str, most: int) -> list[memoryview]:
    """The parts between the lines of a boundary (RFC 2046 5.1.1), at most `most` + 1.

    The line end before a boundary is the boundary's. A missing last line ends nothing.
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
        start = found.end()
        if found[1] or len(parts) > most:
            return parts
    if start:
        parts.append(content[start:])
    return parts


def content_headers(headers: Headers) -> email.message.Message:
    """The headers that begin with Content-, for email.message to read their parameters."""
    fields = email.message.Message()
    for name, value in headers:
        if name[:8].lower() == "content-":
            value = CONTROLS.sub(" ", header_text(value, None))
            # Its parameters are read in quadratic time.
            fields[name] = ";".join(value[:9999].split(";")[:99])
    return fields


def file_of(fields: email.message.Message, content: Any) -> Row:
    """An attachment, as `attachments` holds it, of a part with these headers."""
    return {
        "filename": fields.get_filename(),
        "type": fields.get_content_type(),
        "cid": fields.get("Content-ID"),
        "content": content}


def header_text(value: str, charset: str | None) -> str:
    """A header's value; bytes in it that are no UTF-8 are in the charset of the body."""
    if not UNSTORABLE.search(value):
        return value
    return decode(value.encode("utf-8", "surrogateescape"), charset)


def transfer_decoded(fields: email.message.Message, content: memoryview) -> bytes:
    """A part's content without its transfer encoding (RFC 2045 6); broken, as it is."""
    encoding = str(fields.get("Content-Transfer-Encoding")).lower()
    with contextlib.suppress(ValueError):
        if encoding == "base64":
            return base64_decoded(content)
        if encoding == "quoted-printable":
            return binascii.a2b_qp(content)
    return bytes(content)


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
CANONICAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("from", "to", "cc"), ("a mailbox or a list of them", str, list, dict)),
    **dict.fromkeys(
        ("from_name", "subject", "text", "html", "message_id"), ("a string", str)),
    **dict.fromkeys(
        ("in_reply_to", "references"), ("a string or a list", str, list)),
    "headers": ("an object of names and values", dict, list, str),
    "envelope": ("an object whose `from` is a string or null", dict),
    "attachments": ("a list of objects", list)}
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
    batch: str = ""                     # path of the list, where it posts several mails …
    member: str = ""                    # … and of the mail in each of its items
    place: str | None = ""              # path of the mail; None: only `fields` are read
    envelope_from: str = ""             # path of MAIL FROM
    raw: str = ""                       # path of the whole mail
    mend: Callable[[Row, Mail], Any] | None = None      # (post, what was found in it)
    fields: Row = field(default_factory=dict)           # canonical name → path, if another


def squeezed(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def spelled(value: Any) -> Row:
    """An object by its squeezed names; what is no object has none."""
    if not isinstance(value, dict):
        return {}
    return {squeezed(name): value[name] for name in value}


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
    Provider("Mandrill", "mandrill_events", batch="mandrill_events", member="msg",
             raw="raw_msg"),
    # Mailgun. Requires: a route. Authenticates by: ?secret=. Answers: 200; 406 is final,
    # all else tried again for 8 h. Configure: Receiving › Routes › forward(). A URL that
    # ends in `mime` gets the whole mail.
    Provider("Mailgun", "timestamp token signature", when=lambda post: "event" not in post,
             envelope_from="sender", raw="body-mime", mend=mend_files),
    # SendGrid. Requires: Inbound Parse. Authenticates by: ?secret= or Basic. Answers: 2xx;
    # 5xx is tried again for 3 days, 4xx is final. Configure: Settings › Inbound Parse.
    Provider("SendGrid", "envelope", when=lambda post: isinstance(post["envelope"], str),
             envelope_from="envelope.from", raw="email", mend=mend_files),
    # CloudMailin. Requires: an address. Authenticates by: Basic or ?secret=. Answers: 2xx;
    # 4xx bounces the mail, 5xx lets the sender's server try again. Configure: the target.
    Provider("CloudMailin", "envelope", envelope_from="envelope.from", raw="message",
             when=lambda post: isinstance(post["envelope"], dict)
             and {"from", "text", "message_id"}.isdisjoint(post)),
    # Its deprecated multipart format "original".
    Provider("CloudMailin", "message plain", envelope_from="from", raw="message",
             when=lambda post: isinstance(post["message"], bytes)),
    # SparkPost. Requires: a relay webhook. Authenticates by: ?secret=, Basic or a custom
    # header. Answers: 200, else tried again. Configure: POST /api/v1/relay-webhooks.
    Provider("SparkPost", "events", batch="events", member="msys.relay_message",
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
    Provider("Postmark", "FromFull", raw="RawEmail", fields={"message_id": None}),
    # Brevo. Requires: inbound parsing. Authenticates by: ?secret=, Basic or a header.
    # Answers: 2xx; 4xx is final. Configure: POST /v3/webhooks, type inbound. Of attachments
    # only the names are posted.
    Provider("Brevo", "items", batch="items", when=lambda post: "from" not in post),
    # Mailjet. Requires: the Parse API. Authenticates by: ?secret= or Basic. Answers: 200,
    # else tried again. Configure: POST /v3/REST/parseroute with the Url.
    Provider("Mailjet", "Recipient Sender", envelope_from="Sender", mend=mend_mailjet),
    # MailerSend. Requires: an inbound route. Authenticates by: ?secret=. Answers: 2xx
    # within 3 s; all else is final. Configure: the route's POST URL. data.id is
    # MailerSend's own.
    Provider("MailerSend", "type", "inbound.message", place="data",
             envelope_from="data.sender.email", raw="data.raw"),
    # Forward Email. Requires: a webhook as an alias's recipient. Authenticates by:
    # ?secret=. Answers: exactly 200. Configure: the alias.
    Provider("Forward Email", "session headerLines", envelope_from="session.sender"),
    # mailparser, the parser of Node's nodemailer, in a script of your own.
    Provider("mailparser", "headerLines"),
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
    Provider("MailPace", "raw", raw="raw"),
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


def provider_of(fields: Fields, own_providers: OwnProviders) -> Provider | None:
    """Whose post this is: ours are asked first, then the rows of the table."""
    for provider in PROVIDERS:
        keys = provider.keys.split()
        if not fields.keys() >= {*keys}:
            continue
        if provider.mark in ("", fields[keys[0]]) and provider.when(fields):
            return provider
    for name, paths in own_providers():
        needed = [at(fields, paths.get(each), fields) for each in ("from", "message_id")]
        if not any(value is fields for value in needed):
            return Provider(name, "", place=None, fields=paths)
    return None


def members_of(provider: Provider, post: Row) -> list[Any]:
    """The mails of a batch, without the events among them; Refused 400 for no list.

    What is neither is left for `mail_of` to refuse, by itself.
    """
    items = at(post, provider.batch)
    if isinstance(items, str):
        items = json_in(items)
    if not isinstance(items, list):
        raise Refused(400, f"{provider.batch} is no list of {provider.name}'s")
    members = []
    for item in items:
        if isinstance(item, dict):
            is_mail = at(item, "event") in (None, "inbound")
            item = at(item, provider.member) if is_mail else None
        if item is not None:
            members.append(item)
    return members


# What brings no mail: events, by their names; and what only says that there is a mail.
EVENT = re.compile(
    r"(?i)(?:.*(?:activity|bounce|click|complain|contact|deferred|deliver|domain|drop|fail|"
    r"held|list_|open|process|queued|sent|spam_report|subscri|suppress|track).*|"
    r"webhook\..*|validation)")
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
    if isinstance(name, str) and ("TopicArn" in post or EVENT.fullmatch(name)):
        return f"an event, no mail: {printable(name)[:80]}"
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
    known = spelled(at(post, provider.place))
    raw = raw_mail_of(at(post, provider.raw))
    if raw:
        mail = mail_of_mime(raw)
    else:
        mail = {name: at(known, paths) for name, paths in SPELLINGS.items() if known}
        listed = [at(known, name) for name in FILES]
        mail["attachments"] = [
            file for files in listed
            for file in items_of(json_in(files) or files)
            if isinstance(file, dict)]
        mail |= {
            name: at(post, path) for name, path in provider.fields.items()
            if name in CANONICAL}
        if provider.mend:
            provider.mend(post, mail)
        if provider.place is not None and not any(mail.values()):
            raise ValueError("nothing in it reads as a mail")
    mail["verdict"] = at(known, VERDICT)
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
BASE64 = str.maketrans("-_", "+/", " \t\r\n")   # RFC 4648 5; RFC 2045 6.8: no line ends


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
    if not text.strip():
        text = html_to_text(markup)
        if len(markup) > MAX_HTML:
            notes.append(f"the text is made of at most {MAX_HTML} characters of the HTML")
    return Message(
        message_id=message_id, digest=digest,
        in_reply_to=ids_of(fields["in_reply_to"] or header_values(headers, "in-reply-to")),
        references=ids_of(fields["references"] or header_values(headers, "references")),
        from_address=address, from_count=from_count,
        from_name=one_line(fields["from_name"]) or name,
        envelope_from=envelope_from,
        to=addresses_of(fields["to"]),
        cc=addresses_of(fields["cc"]),
        subject=subject, text=text, html=markup or None,
        headers=headers, notes=notes, attachments=attachments,
        verdict=str(mail.get("verdict") or "")[:500])


def typed(mail: Mail, faults: Faults) -> Mail:
    """The canonical fields of a mail, each of its type: empty if null or of another."""
    fields: Mail = {}
    for name, (expected, *types) in CANONICAL.items():
        value = mail.get(name)
        if types[0] is str and type(value) in (str, int, float):
            value = clean(str(value))
        if value is not None and not isinstance(value, tuple(types)):
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
        value = [[name.replace("_", dash), value[name]] for name in value]
    headers = []
    for item in items_of(value):
        name, content = header_pair(item)
        if not name:
            shown = printable(str(item))[:99]
            faults["a header"] = f"expected a name and a value, not {shown}"
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
        name = at(item, ("name", "Name", "key", "Key"))
        if "line" in item:
            item = item["line"]
        elif name:
            return name, at(item, ("value", "Value"))
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
    if isinstance(value, str):
        text = value[:MAX_ADDRESS_HEADER].replace("&lt;", "<").replace("&gt;", ">")
        text = CONTROLS.sub(" ", clean(text))
        if "@" in MAILBOX.sub("", text):
            return []
        for name, address, bare, comment in MAILBOX.findall(text):
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


def addresses_of(value: Any) -> list[str]:
    """The addresses of To or Cc, for display."""
    return [address for _, address in mailboxes_of(value)]


def message_id_of(written: str, digest: str, headers: Headers, faults: Faults) -> str:
    """The Message-ID, of any length, with brackets; made of the content where it lacks."""
    for found in ids_of(written) or ids_of("<" + written.strip(' <>"') + ">"):
        return found
    faults.setdefault("message_id", "required")
    # The Date, where there is one, tells two mails of the same words apart.
    seed = "".join([digest, *header_values(headers, "date")])
    return f"<{hashlib.sha256(seed.encode()).hexdigest()[:32]}@missing.invalid>"


def ids_of(value: Any) -> list[str]:
    """The message-ids of In-Reply-To or References: each once, in order, with brackets.

    RFC 5322 3.6.4, and what is seen: lists, folding inside the brackets, `&lt;`, missing
    brackets. Of many, the first 20 and the last 80.
    """
    text = " ".join(text for text in items_of(value) if isinstance(text, str))
    text = clean(text).replace("&lt;", "<").replace("&gt;", ">")
    ids = dict.fromkeys(
        "".join(bracketed.split()) or bare
        for bracketed, bare in MESSAGE_IDS.findall(text))
    known = [f"<{each}>" for each in ids if each]
    return known[:FIRST_REFERENCES] + known[FIRST_REFERENCES:][-LAST_REFERENCES:]


def attachment_of(posted: Any) -> Attachment:
    """The attachment of an object, whatever its provider calls its fields."""
    item = spelled(posted)
    name, kind, content_id = (
        one_line(str(at(item, names) or "")) for names in (
            ("filename", "name"),
            ("contenttype", "mimetype", "type"),
            ("contentid", "cid")))
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
    content = content.translate(BASE64)
    return base64.b64decode(content + "=" * (-len(content) % 4), validate=True)


def digest_of(from_address: str, subject: str, text: str, markup: str,
              attachments: list[Attachment]) -> str:
    """SHA-256 of what the sender wrote, and of nothing that changes with the next try.

    The same in every version, or a repeat of an older mail would be a second message.
    """
    files = [f"{item.filename}:{item.sha256}" for item in attachments]
    written = json.dumps([from_address.lower(), subject, text, markup, *files])
    return hashlib.sha256(written.replace(r"\r\n", r"\n").encode()).hexdigest()


def clean(text: str) -> str:
    """Drop what SQLite, SMTP and JSON each stumble over: NUL and lone surrogates."""
    return UNSTORABLE.sub("", text)


def one_line(text: str) -> str:
    """A header's value in one line: unfolded, RFC 2047 words decoded, controls blanked."""
    if not PLAIN.fullmatch(text):
        text = WORDS.sub(decoded_words, CONTROLS.sub(" ", clean(text)))
        text = CONTROLS.sub(" ", clean(text))
    return text.strip()


def decoded_words(run: re.Match[str]) -> str:
    """Decode a run of RFC 2047 encoded-words; what is broken stays as it is."""
    with contextlib.suppress(ValueError, email.errors.MessageError):
        return "".join(
            word if isinstance(word, str) else decode(word, charset)
            for word, charset in email.header.decode_header(run[0]))
    return run[0]


# What mail calls a charset, by the codec that it means: the WHATWG encoding standard's
# labels. The last four decode in quadratic time or run escapes, and nobody writes mail in
# them.
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
MULTIBYTE = re.compile("gb|cp932|cp949|big5|euc|hz|iso2022|johab|utf-16|utf-32")


@functools.lru_cache(200)
def codec_of(charset: str) -> tuple[str, str]:
    """Python's name of a charset as mail labels it, and what to do with a broken byte.

    A label of several bytes a character is believed all the same, any other is not.
    LookupError when nobody knows it.
    """
    label = re.sub("[^a-z0-9]+", "-", charset.lower()[:100]).strip("-")
    label = CODECS.get(label, re.sub("^cp-", "cp", label))
    name = codecs.lookup(label).name
    b"".decode(name)        # LookupError for what is no text
    return name, "replace" if MULTIBYTE.match(name) else "strict"


def decode(content: bytes, charset: str | None) -> str:
    """The text of bytes in the charset claimed, else in UTF-8 or in Windows-1252."""
    with contextlib.suppress(LookupError, ValueError):
        return content.decode(*codec_of(charset or "utf-8"))
    text = content.decode("utf-8", "replace")
    if re.search("[^\0-\x7f\ufffd]", text):     # UTF-8 but for a broken byte
        return text
    return content.decode("cp1252", "replace")


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
    _, link, text = found.groups()
    return text if link in text or link[0] == "#" else f"{text} ({link})"


# What is shown of markup, in this order. What is not closed goes to the end, and a tag that
# has no end is text before its attributes are looked for: nothing is ever looked at twice.
VERBATIM = str.maketrans({" ": "\0", "\t": "\1", "\n": "<br>"})     # for blanks that count
MARKUP: tuple[tuple[str, Any], ...] = (
    (r"<!--(?:>|.*?-->|.*)|<(script|style|title)\b(?:.*?</\1\s*>|.*)", ""),
    (r"<pre\b[^<>]*>.*?(?:</pre\s*>|\Z)", verbatim),
    (r"\s+", " "),
    (r"""<img\b(?=[^<>]*>)[^<>]*?\salt\s*=\s*(["']?)([^<>]*?)\1(?:\s[^<>]*)?/?>""", r"\2"),
    (r"</?t[dh]\b[^<>]*>", " "),
    (r"</?(?:address|article|aside|blockquote|br|caption|dd|div|dl|dt|figcaption|figure|"
     r"footer|form|h[1-6]|header|hr|li|main|nav|ol|p|pre|section|table|tr|ul)\b[^<>]*>",
     "\n"),
    (r"<(?!/?a\b)[/!?a-z][^<>]*>", ""),
    (r"""<a\b(?=[^<>]*>)[^<>]*?\shref\s*=\s*(["']?)(?:mailto:)?([^<>]*?)\1(?:\s[^<>]*)?>"""
     r"(.*?)(?=</?a\b|\Z)", with_link),
    (r"</?a\b[^<>]*>", ""),
    (r"&#(?:[0-9]{8,}|x[0-9a-f]{8,});?", "\ufffd"))


# -----------------------------------------------------------------------------------------
# Classify: one table, from the surest sign to the weakest; the first that holds decides. Only
# the outermost headers count. What a sender writes in headers (`Sign`) is looked up apart
# from what we know ourselves (`Fact`). No sign is ever a reason to drop a mail: it says who
# is not answered, and where the mail goes.

class Evidence:
    """What the tables look at, of a message."""

    def __init__(self, message: Message):
        self.headers: dict[str, list[str]] = {}     # by lower-case name, values as written
        for name, value in message.headers:
            self.headers.setdefault(name.lower(), []).append(value[:2000])
        self.author = local_part(message.from_address) if message.from_count else ""
        self.sender = (message.envelope_from or "").lower()     # MAIL FROM, "" = unknown too
        self.is_null = message.envelope_from == ""
        self.subject = message.subject[:2000]
        self.parts = [attachment.content_type for attachment in message.attachments]
        self.verdict = message.verdict

    def has(self, name: str, pattern: str) -> bool:
        return any(re.fullmatch(pattern, value, re.I) for value in self.headers.get(name, ()))

    def first(self, name: str) -> str:
        return self.headers.get(name, [""])[0]


def keyword(value: str) -> str:
    """The first token of a header's value, lower case.

    RFC 3834 5.1: comments may stand before and after the keyword, parameters behind a
    semicolon. A stray colon before it is seen in the wild.
    """
    value = value[:300]     # a keyword stands in front; nested comments cost a pass each
    while (stripped := re.sub(r"\([^()]*\)", " ", value)) != value:
        value = stripped
    return value.partition(";")[0].strip(' \t:"\'').lower()


@dataclass(frozen=True)
class Sign:
    """Headers (lower case) of which a value, read by `by`, matches as a whole, in any case."""

    kind: str
    headers: str
    pattern: str
    reason: str                         # in words, with the source
    by: Callable[[str], str] = keyword


@dataclass(frozen=True)
class Fact:
    """What we know of a message ourselves, or more than one header tells."""

    kind: str
    holds: Callable[[Evidence], object]
    reason: str


def any_of(*phrases: str) -> str:
    return "(?:" + "|".join(phrases) + ")"


DAEMON = re.compile("mailer-daemon|mail-daemon|mdaemon")
POSTMASTER = re.compile("post[-_.]?master")
REPLY = r"(?!\s*(?:re|aw|sv|antw(?:ort)?|res|fwd?|wg|tr|rv|enc|i)\s*:)"    # what it is not
NO_ANSWER = r"(?:.*[,;\s])?(?:all|autoreply)(?:[,;\s].*)?"
VACATION_SUBJECT = re.compile(REPLY + any_of(
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
    r".* is out of the office(?:\.| until .*| ?\(returning.*)?"), re.I)
MAYBE_VACATION_SUBJECT = re.compile(REPLY + ".*" + any_of(
    "fuera de (?:la )?oficina", "fora do escritório", r"\bausência\b", r"\bausencia\b",
    r"\bis out of (?:the )?office(?=\W*$)", r"\best absente?\b", "message d['’]absence",
    r"\babwesend\b") + ".*", re.I)
BOUNCE_SUBJECT = re.compile(REPLY + ".*" + any_of(
    "undeliver", "returned mail", "failure notice", "unzustellbar", "non remis",
    "delivery (?:status notification|failure|has failed|incomplete)",
    "mail delivery (?:failed|failure|system)") + ".*", re.I)


def is_bounce_like(mail: Evidence) -> bool:
    """A second sign of a bounce, where the first is none by itself."""
    return bool(mail.is_null or BOUNCE_SUBJECT.fullmatch(mail.subject)
                or DAEMON.fullmatch(local_part(mail.sender))
                or any(keyword(value) not in ("", "no")
                       for value in mail.headers.get("auto-submitted", ()))
                or mail.has("content-type", "multipart/report.*"))


def is_exchange_vacation(mail: Evidence) -> bool:
    """Its Mailbox Rules Agent also redirects people's mail (RFC 5322 3.6.6)."""
    return (mail.has("x-ms-exchange-generated-message-source", "mailbox rules agent")
            and (mail.is_null or mail.has("x-auto-response-suppress", NO_ANSWER))
            and not any(name.startswith("resent-") for name in mail.headers))


def is_exchange_rule(mail: Evidence) -> bool:
    """Alone the header may stand on what a rule forwarded for a person."""
    return "x-ms-exchange-inbox-rules-loop" in mail.headers and (
        mail.has("x-auto-response-suppress", NO_ANSWER)
        or mail.has("auto-submitted", r"(?!no\b).+"))


def whole(value: str) -> str:
    return value


SIGNS: tuple[Sign | Fact, ...] = (
    Sign("bounce", "content-type", "multipart/report.*delivery-status.*",
         "a delivery status report (RFC 3464 2)", whole),
    Sign("bounce", "content-type", "multipart/report.*feedback-report.*",
         "an abuse report (RFC 5965)", whole),
    Fact("bounce", lambda mail: mail.has(
        "content-type", "multipart/report.*disposition-notification.*")
        and mail.has("auto-submitted", ".*rejected.*"),
        "a refusal in the form of a receipt (RFC 5429)"),
    Sign("auto-reply", "content-type", "multipart/report.*disposition-notification.*",
         "a receipt (RFC 8098 2)", whole),
    Sign("bounce", "x-failed-recipients", ".+", "X-Failed-Recipients (Exim, Gmail)"),
    # Before Auto-Submitted: daemons write auto-replied too (RFC 3834 5.2 knows the misuse).
    Fact("bounce", lambda mail: DAEMON.fullmatch(mail.author), "From is a mailer daemon"),
    # RFC 3834 5: any keyword but "no" is automatic.
    Sign("auto-reply", "auto-submitted", "(?!(?:no|auto-generated|auto-notified)$).+",
         "Auto-Submitted (RFC 3834 5.2)"),
    Sign("auto-reply", "x-autoreply x-auto-reply x-autorespond x-autoresponder x-autoresponse "
         "x-autoreply-from x-mail-autoreply x-vacation", "(?!(?:no|false|0)$).+",
         "an autoresponder's own header"),
    Sign("auto-reply", "precedence x-precedence preference", "auto_reply",
         "Precedence: auto_reply"),
    Sign("auto-reply", "x-autogenerated", "reply", "X-Autogenerated: reply (Communigate)"),
    Sign("auto-reply", "x-fc-machinegenerated", "true", "X-FC-MachineGenerated (FirstClass)"),
    Sign("auto-reply", "x-post-messageclass", r"9\b.*|.*autoresponder.*",
         "X-POST-MessageClass (Mailtraq)", whole),
    Sign("auto-reply", "delivered-to", "autoresponder", "Delivered-To: Autoresponder (qmail)"),
    Sign("auto-reply", "x-apple-action", "vacation.*", "X-Apple-Action: VACATION (iCloud)"),
    Fact("auto-reply", is_exchange_vacation, "Exchange's Mailbox Rules Agent"),
    Fact("auto-reply", is_exchange_rule, "an Exchange rule's own mail, or one without answer"),
    # RFC 3834 3.1.5 warns of it as proof; nine of fourteen vacation notices have nothing else.
    Fact("auto-reply", lambda mail: VACATION_SUBJECT.fullmatch(mail.subject),
         "the subject of a vacation notice"),
    Fact("bounce", lambda mail: DAEMON.fullmatch(local_part(mail.sender)),
         "the envelope sender is a mailer daemon (RFC 3834 7)"),
    Sign("bounce", "x-postal-bounce", "true|1", "the provider takes it for a bounce"),
    Fact("bounce", lambda mail: "message/delivery-status" in mail.parts and (
        is_bounce_like(mail) or POSTMASTER.fullmatch(mail.author)), "it carries a delivery status"),
    Fact("bounce", lambda mail: POSTMASTER.fullmatch(mail.author) and is_bounce_like(mail),
         "postmaster, and a sign of a bounce"),
    Fact("bounce", lambda mail: (mail.is_null or not mail.author) and (
        BOUNCE_SUBJECT.fullmatch(mail.subject)), "from nobody, with the subject of a bounce"),
    Sign("machine", "auto-submitted", "auto-generated|auto-notified",
         "Auto-Submitted: nobody typed it (RFC 3834 5.1)"),
    Sign("machine", "x-ms-exchange-generated-message-source", "(?!mailbox rules agent$).+",
         "made by an Exchange agent"),
    Sign("machine", "x-arf feedback-type", "(?!no$).+", "an abuse report (X-ARF, RFC 5965)"),
    Sign("list", "precedence x-precedence", "list", "Precedence: list (RFC 3834 2)"),
    Sign("list", "list-id list-post list-owner list-archive list-help list-subscribe "
         "mailing-list x-beenthere x-mailman-version", ".*",
         "a mailing list's header (RFC 2919, RFC 5230 4.6)"),
    Sign("bulk", "precedence x-precedence", r"(?:bulk|junk)\b.*",
         "Precedence: bulk or junk (RFC 3834 2)"),
    Sign("bulk", "list-unsubscribe list-unsubscribe-post feedback-id x-campaignid "
         "x-csa-complaints", ".*", "a mass mailing's header"))

# What forbids the confirmation of a person's mail, and classifies nothing.
LIST_SENDERS = any_of(
    "owner-.+", ".+[-+]owner(?:[-+].*)?", ".+-request", ".+-bounces?", "bounces?(?:[+=-].*)?",
    ".*noreply.*", "(?:.*[-_.+])?no[-_.]repl(?:y|ies).*")
NEVER_ANSWERED = re.compile(any_of(
    LIST_SENDERS, DAEMON.pattern, POSTMASTER.pattern, ".*do[-_.]?not[-_.]?reply.*", "mailerdaemon",
    "no[-_.]?respond.*", "auto[-_.]?(?:reply|responder)", "nobody", "abuse", "root", "listserv",
    "majordomo", "mailman", "feedbackloop",
    "(?:prvs|srs[01])=.*"))     # rewritten envelopes, no one's mailbox
SPAM = re.compile(r"\s*(?:(?:fail|spam|yes|true)\b.*|(?:[5-9]|\d\d+)(?:\.\d+)?\s*)", re.I)
WITHHOLDING: tuple[Sign | Fact, ...] = (
    Fact("", lambda mail: mail.is_null, "the envelope sender is null (RFC 3834 2)"),
    Fact("", lambda mail: NEVER_ANSWERED.fullmatch(mail.author),
         "From is an address that is never answered (RFC 3834 2, RFC 5230 4.6)"),
    Fact("", lambda mail: re.fullmatch(LIST_SENDERS, local_part(mail.sender)),
         "the envelope sender is one that is never answered (RFC 3834 7)"),
    # Not the envelope sender, which only the first header can tell; yet nobody writes it idly.
    Sign("", "return-path", "<>", "Return-Path is null (RFC 3834 2)", whole),
    Fact("", lambda mail: BOUNCE_SUBJECT.fullmatch(mail.subject)
         and not mail.first("in-reply-to"), "the subject of a bounce"),
    Fact("", lambda mail: MAYBE_VACATION_SUBJECT.fullmatch(mail.subject),
         "the subject may be a vacation notice's"),
    Sign("", "x-loop x-auto-generated", "yes|true|hd-.*", "another helpdesk marks its mail so"),
    Sign("", "x-rt-loop-prevention x-roundup-loop x-otrs-loop x-hmxmroriginalrecipient", ".*",
         "another helpdesk's own mail, or a complaint"),
    Sign("", "x-auto-response-suppress", NO_ANSWER,
         "X-Auto-Response-Suppress asks for none (MS-OXCMAIL 2.1.3.2.20)", whole),
    # Of these only the first can be our own server's.
    Fact("", lambda mail: any(SPAM.fullmatch(line) for line in (
        *mail.verdict.split("\n"), mail.first("x-spam-flag"), mail.first("x-spam-status"),
        mail.first("x-mailgun-sflag"))), "the provider takes it for spam"),
    Fact("", lambda mail: re.search(
        r"\bdmarc\s*=\s*fail", mail.first("authentication-results"), re.I),
        "From may be forged, DMARC failed (RFC 8601 5)"))


class Table:
    """Rows of signs and facts, compiled once and found by the headers that are there."""

    def __init__(self, rows: tuple[Sign | Fact, ...]):
        self.facts = [(place, row) for place, row in enumerate(rows) if isinstance(row, Fact)]
        self.signs: dict[str, list[tuple[int, Sign, re.Pattern[str]]]] = {}
        for place, row in enumerate(rows):
            if isinstance(row, Sign):
                pattern = re.compile(row.pattern, re.I)
                for name in row.headers.split():
                    self.signs.setdefault(name, []).append((place, row, pattern))

    def first_row(self, mail: Evidence) -> Sign | Fact | None:
        """The first row that holds."""
        held: list[tuple[int, Sign | Fact]] = []
        for name in self.signs.keys() & mail.headers.keys():
            for place, sign, pattern in self.signs[name]:
                if any(pattern.fullmatch(sign.by(value)) for value in mail.headers[name]):
                    held.append((place, sign))
        first = min(held, key=lambda each: each[0], default=(sys.maxsize, None))
        for place, fact in self.facts:
            if place < first[0] and fact.holds(mail):
                return fact
        return first[1]


SIGN_TABLE, WITHHOLDING_TABLE = Table(SIGNS), Table(WITHHOLDING)


def classify(message: Message, own_addresses: list[str], trusted: str) -> tuple[str, str, str]:
    """Return (kind, reason, why it is not to be confirmed or ""), the latter two in words.

    `trusted` are the account's forwarders, addresses between commas.
    """
    mail = Evidence(message)
    forwarders = {word.strip().lower() for word in trusted.split(",")} - {""}
    take_off_stamps(mail, {address.lower() for address in own_addresses}, forwarders)
    if found := SIGN_TABLE.first_row(mail):
        return found.kind, found.reason, f"never for {found.kind} mail (RFC 3834 2)"
    withheld = WITHHOLDING_TABLE.first_row(mail)
    return "human", "no sign of automatic mail", withheld.reason if withheld else ""


LIST_STAMPS = (
    "list-id list-post list-owner list-archive list-help list-subscribe list-unsubscribe "
    "list-unsubscribe-post mailing-list x-beenthere x-mailman-version feedback-id x-campaignid "
    "x-csa-complaints").split()
FORWARDER_MARKS = ("x-ms-exchange-inbox-rules-loop", "resent-from", "x-forwarded-for",
                   "x-forwarded-to")
FORWARDER_STAMPS = ("x-ms-exchange-inbox-rules-loop", "x-ms-exchange-generated-message-source")


def take_off_stamps(mail: Evidence, own: set[str], forwarders: set[str]) -> None:
    """Take off what our own groups and trusted forwarders stamped on a person's mail.

    Through them every customer's mail has a List-Id or an Auto-Submitted.
    """
    ours = own | forwarders
    ours |= {address.replace("@", ".") for address in ours}     # List-Id: <support.example.org>
    is_forwarded = mail.sender in forwarders or names_one_of(mail, FORWARDER_MARKS, forwarders)
    if not is_forwarded and not names_one_of(mail, LIST_STAMPS, ours):
        return
    if not DAEMON.fullmatch(local_part(mail.sender)):
        mail.sender = ""
    dropped = [*LIST_STAMPS, *(FORWARDER_STAMPS if is_forwarded else ())]
    words = {"precedence": "list", "x-precedence": "list"}
    if is_forwarded:
        words["auto-submitted"] = "auto-generated"
    mail.headers = {
        name: [value for value in values if keyword(value) != words.get(name)]
        for name, values in mail.headers.items() if name not in dropped}


def names_one_of(mail: Evidence, names: Iterable[str], addresses: set[str]) -> bool:
    """Whether one of the addresses stands in a header: in its <brackets> where it has any."""
    for name in names:
        for value in mail.headers.get(name, ()):
            words = re.findall("<([^<>]*)>", value) or re.split(r"[\s;,]+", value)
            if any(word.lower().removeprefix("mailto:") in addresses for word in words):
                return True
    return False


def local_part(address: str) -> str:
    return address.rpartition("@")[0].lower() or address.lower()


# -----------------------------------------------------------------------------------------
# Thread: which ticket a message belongs to. By ids first; by the subject's tag for its
# requester alone.

# In brackets of any width or none, and folded by mail programs between the halves.
SUBJECT_TAG = re.compile(r"(?<![\w-])(T-)\s?([0-9A-Z]{4}-)\s?([0-9A-Z]{4})(?![\w-])", re.I | re.A)
RETURNED_ID = re.compile(
    r"^[> \t]*(?:x-)?(?:original-)?message-id:\s*(<[^<>\s]+>)", re.I | re.M)


def thread(db: DB, account: Row, message: Message, kind: str) -> tuple[Row | None, str]:
    """Return (ticket row or None, reason). All ids count that this account received or sent."""
    # RFC 5322 3.6.4: In-Reply-To names the parent, and so does the last of References.
    # RFC 3464 2, RFC 8098 3.2.5: reports and receipts carry the mail that came back.
    exchange = header_values(message.headers, "x-ms-exchange-parent-message-id")
    for place, ids in (("In-Reply-To", message.in_reply_to),
                       ("References", message.references[::-1]),
                       ("Exchange's parent id", ids_of(exchange)),
                       ("the returned message", returned_ids(message, kind))):
        for message_id in ids:
            # As written, then of its own requester, then the liveliest. Servers change an id's
            # case and lose a trailing dot, hence NOCASE and the second spelling.
            ticket = db.execute("""SELECT ticket.* FROM message
                JOIN ticket ON ticket.id = message.ticket
                WHERE message.email_account = ? AND message_id COLLATE NOCASE IN (?, ?)
                ORDER BY message_id = ? DESC, requester = ? DESC, updated_at DESC LIMIT 1""", [
                    account["id"], message_id, message_id[:-1].rstrip(".") + ">", message_id,
                    message.from_address]).fetchone()
            if ticket:
                return ticket, f"{place} names a message of this ticket"
    for halves in SUBJECT_TAG.findall(message.subject)[:5]:
        ticket = db.execute("SELECT * FROM ticket WHERE reference = ? AND email_account = ?", [
            "".join(halves).upper(), account["id"]]).fetchone()
        if ticket and mailbox_key(ticket["requester"]) == mailbox_key(message.from_address):
            return ticket, "the requester wrote it with this ticket's tag in the subject"
    return None, "no id of a known message, so a new ticket"


def returned_ids(message: Message, kind: str) -> list[str]:
    """Message-ids of what a report sends back: in its parts, or its text (a provider's JSON)."""
    is_report = kind in ("bounce", "auto-reply")
    return RETURNED_ID.findall(report_of(message))[:20] if is_report else []


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
# process only the writer checkpoints: before 3.51.3 SQLite may corrupt a file that two do it
# to at once.

SCHEMA = Path(__file__).with_name("schema.sql")
SCHEMA_VERSION, APPLICATION_ID = 2, 1768841828      # schema.sql's
# These very classes: their heirs, IntegrityError and DataError, are the message's fault.
TROUBLE = (sqlite3.OperationalError, sqlite3.DatabaseError, sqlite3.InternalError)
Work = Callable[..., Any]       # (connection, seconds UTC, *args) → result
Job = tuple[Work, tuple[Any, ...], "concurrent.futures.Future[Any]"]


class Store:
    """The database file at `path`; `clock` returns seconds UTC. Only who serves `checkpoints`."""

    def __init__(self, path: str, clock: Callable[[], float] = time.time,
                 checkpoints: bool = True):
        self.path = path
        self.now = lambda: int(clock())
        self.checkpoints = checkpoints
        self.has_mail = threading.Event()               # wakes the courier
        self.refusals: deque[tuple[int, str]] = deque(maxlen=1000)  # (time, client) of 401s
        self.uses_of_previous: dict[int, int] = {}      # email_account → time of a use
        self.failing_since = 0.0                        # monotonic; 0 = the last write did not
        self._is_open = False
        self._jobs: deque[Job] = deque()
        self._lock = threading.Lock()                   # of the writer and all below
        self._writer: DB | None = None
        self._files: list[Any] = []                     # identity of file and -wal when opened
        self._locked_until = 0.0                        # monotonic
        self._reader_lock = threading.Lock()
        self._reader: DB | None = None

    def open(self, create: bool = True) -> bool:
        """Make the file if there is none, migrate an old one; return whether it was made.

        Refused when it is not ours, newer than this program, or missing and `create` is false.
        """
        try:
            if not os.path.exists(self.path):
                if not create:
                    raise Refused(503, f"no database at {self.path!r}: `inbound serve` makes one; "
                                       "--db FILE or $INBOUND_DB names another")
                # Before SQLite does, so that its -wal and -shm get the same mode.
                os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))
            with contextlib.closing(connect(self.path)) as db:
                was_made = migrate(db, self.path)
        except (OSError, sqlite3.Error) as error:
            raise Refused(503, f"cannot open the database {self.path!r}: {error}") from None
        self._is_open = True
        return was_made

    def rows(self, query: str, parameters: Any = ()) -> list[Row]:
        """All rows of a query; Refused 503."""
        try:
            with self._reader_lock:
                if self._reader is None:
                    if not self._is_open:
                        self.open(create=not self._files)
                    self._reader = connect(self.path)
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
        """Run `work(connection, now, *args)` in the next transaction; return its result, synced.

        What `work` raises is raised here and undone alone. Refused 503 if nothing was stored.
        """
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
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
        """One transaction for all that waits."""
        jobs: list[Job] = []
        results: list[Any] = []
        try:
            writer = self._writer_in_transaction()
            jobs = self._take_jobs()    # not before: who came meanwhile shares the lock's fate
            for work, args, future in jobs:
                try:
                    results.append(in_savepoint(writer, work, self.now(), *args))
                except Exception as error:
                    if not writer.in_transaction:       # a full disk ends the whole of it
                        raise
                    results.append(None)
                    future.set_exception(error)
            writer.execute("COMMIT")
            self._refuse_if_replaced()
        except Exception as error:
            self._note_failure(error)
            for _, _, future in jobs or self._take_jobs():
                if not future.done():
                    future.set_exception(error)
            return
        self.failing_since = 0.0
        for (_, _, future), result in zip(jobs, results):
            if not future.done():
                future.set_result(result)

    def _take_jobs(self) -> list[Job]:
        return [self._jobs.popleft() for _ in range(len(self._jobs))]

    def _writer_in_transaction(self) -> DB:
        if time.monotonic() < self._locked_until:
            raise sqlite3.OperationalError("database is locked, as it was just now")
        if self._writer is None:
            if not self._is_open:
                self.open(create=not self._files)
            self._writer = connect(self.path, self.checkpoints)
            self._writer.execute("BEGIN IMMEDIATE")
            self._files = self._identity()
        else:
            self._writer.execute("BEGIN IMMEDIATE")
        return self._writer

    def _note_failure(self, error: Exception) -> None:
        """Never a second fsync on a descriptor whose first failed: the next write opens anew."""
        self._close_writer()
        if "locked" in str(error):      # who waits behind us would wait as long: for a second no
            self._locked_until = time.monotonic() + 1
        elif isinstance(error, sqlite3.Error):
            self.failing_since = self.failing_since or time.monotonic()

    def _identity(self) -> list[Any]:
        """Device and inode of the file and its -wal; None for what is not there."""
        found: list[Any] = []
        for name in (self.path, self.path + "-wal"):
            status = os.stat(name) if os.path.exists(name) else None
            found.append(status and (status.st_dev, status.st_ino))
        return found

    def _refuse_if_replaced(self) -> None:
        """Refused 503 when file or -wal is no longer the one that was opened; close both."""
        found = self._identity()
        if found == self._files:
            return
        self.close()
        if found[0] != self._files[0] and found[1] == self._files[1]:
            # Our -wal belongs to the file that is gone: SQLite would read it into the new one.
            os.replace(self.path + "-wal", self.path + "-wal.of-the-replaced-file")
        self._is_open = False
        raise Refused(503, f"the database {self.path!r} was replaced or deleted while we served")

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def close(self) -> None:
        self._close_writer()
        with self._reader_lock:
            if self._reader is not None:
                self._reader.close()
                self._reader = None


def connect(path: str, checkpoints: bool = False) -> DB:
    """A connection with our settings, which begins its transactions itself; rows are dicts."""
    db = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
    db.row_factory = lambda cursor, row: {
        column[0]: value for column, value in zip(cursor.description, row)}
    for setting in ("synchronous=FULL", "secure_delete=ON", "foreign_keys=ON",
                    "trusted_schema=OFF", f"wal_autocheckpoint={1000 * checkpoints}"):
        db.execute(f"PRAGMA {setting}")
    return db


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
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA foreign_keys = OFF")
    db.execute("PRAGMA trusted_schema = ON")    # for json_valid in a CHECK
    db.execute("BEGIN IMMEDIATE")       # two processes may start at once
    try:
        found = db.execute("""SELECT application_id, user_version
            FROM pragma_application_id, pragma_user_version""").fetchone()
        version, names = found["user_version"], names_in(db)
        if names and found["application_id"] != APPLICATION_ID:
            raise Refused(503, f"{path!r} is the database of another program")
        if version > SCHEMA_VERSION:
            raise Refused(503, f"{path!r} has the newer schema version {version}: update inbound")
        if not names:
            run_script(db)
            db.execute("UPDATE email_account SET inbound_secret = ?", [new_secret()])
        for step in range(version, SCHEMA_VERSION) if names else ():
            MIGRATIONS[step](db, path)
        refuse_unreleased(db, path, re.findall(r"^CREATE TABLE (\w+)", SCHEMA.read_text(), re.M))
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return not names


def names_in(db: DB) -> dict[str, str]:
    """{name: type} of tables, views, triggers and indexes."""
    return {row["name"]: row["type"] for row in db.execute(
        "SELECT name, type FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'")}


def refuse_unreleased(db: DB, path: str, expected: Iterable[str]) -> None:
    missing = {*expected} - {*names_in(db)}
    if missing:
        raise Refused(503, f"{path!r} comes from no released version: it lacks {min(missing)!r}")


def run_script(db: DB) -> None:
    """Run schema.sql inside the open transaction, which `executescript` would commit."""
    statement = ""
    for line in SCHEMA.read_text(encoding="utf-8").splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""


def from_version_1(db: DB, path: str) -> None:
    """Version 1 held tables of providers, signs and commands, and views that rendered text.

    All rows that people wrote and all settings are carried into tables made anew, so that
    what stands in the file is what schema.sql says.
    """
    names = names_in(db)
    refuse_unreleased(db, path, ("valid_secret", "sign", "provider", "command"))
    providers = db.execute("SELECT name, fields FROM provider WHERE id > 21").fetchall()
    for name, kind in names.items():
        if kind != "table":
            db.execute(f'DROP {kind} IF EXISTS "{name}"')
    # An admin's own signs mean nothing any more; they are kept to be read.
    db.execute("DELETE FROM sign WHERE id <= 42")
    if db.execute("SELECT 1 FROM sign").fetchone():
        db.execute("ALTER TABLE sign RENAME TO sign_of_version_1")
    for name in ("provider", "sign", "command"):
        db.execute(f"DROP TABLE IF EXISTS {name}")
    carried = ("queue", "email_account", "ticket", "message", "attachment", "outbox", "rejected")
    db.execute("PRAGMA legacy_alter_table = ON")    # references keep their tables' names
    for name in carried:
        db.execute(f"ALTER TABLE {name} RENAME TO old_{name}")
    run_script(db)
    db.execute("""UPDATE old_email_account SET template = template || '{reference}
'
        WHERE NOT instr(template, '{reference}')""")
    db.execute("""UPDATE old_email_account SET trusted_forwarders = NULL
        WHERE trusted_forwarders NOT LIKE '_%@_%'""")
    db.execute("DELETE FROM email_account")
    db.execute("DELETE FROM queue")
    for name in carried:
        columns = ", ".join(
            f'"{row["name"]}"' for row in db.execute(f"PRAGMA table_info(old_{name})"))
        db.execute(f"INSERT INTO {name} ({columns}) SELECT {columns} FROM old_{name}")
    for name in reversed(carried):
        db.execute(f"DROP TABLE old_{name}")
    for row in providers:
        pairs = [word.partition("=") for word in (row["fields"] or "").split()]
        insert(db, "provider", name=row["name"], fields=json.dumps(
            {name: path or name for name, _, path in pairs}))


MIGRATIONS = {1: from_version_1}        # user_version → what makes the next version of it


def new_secret() -> str:
    """A random secret; none begins with a hyphen, which command lines take for an option."""
    return secrets.choice("abcdefghijklmnopqrstuvwxyz") + secrets.token_urlsafe(24)


# -----------------------------------------------------------------------------------------
# File: what happens to one message inside the transaction, and what is kept of a post that
# became none.

def file_post(db: DB, now: int, post: Post, filings: list[Filing | str], kept: Post) -> list[Row]:
    """Store each member of a post; of those that were not understood the post is `kept`, once."""
    answers, faults = [], []
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
        answers.append(quarantined(fault))
    if faults:
        quarantine(db, now, kept, faults)
    return answers


def file_message(db: DB, now: int, post: Post, filing: Filing) -> Row:
    """Thread, store and confirm one message; return the answer's object.

    UNIQUE (email_account, message_id, digest) settles a repeat. It is asked for first, which
    the writer's lock makes safe, so that a repeat writes nothing and costs no fsync.
    """
    account, message, kind = post.account, filing.message, filing.kind
    known = db.execute("""SELECT ticket.*, message.id AS message, direction, digest, kind
        FROM message JOIN ticket ON ticket.id = message.ticket
        WHERE message.email_account = ? AND message_id = ?
        ORDER BY digest = ? DESC, direction DESC LIMIT 1""", [
            account["id"], message.message_id, message.digest]).fetchone()
    if known and known["digest"] == message.digest:
        return answer_of("duplicate", known, known["message"], known["kind"], "not due",
                         "stored before")
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
    row = insert_message(db, post.received_at or now, ticket, message, reason, kind, confirmation)
    if draft:
        send_later(db, now, account, ticket, draft, "confirmation")
    elif kind == "bounce":
        fail_bounced(db, account, message)
    return answer_of(status, ticket, row, kind, confirmation, reason)


def answer_of(status: str, ticket: Row, message: int | None, kind: str | None,
              confirmation: str | None, reason: str) -> Row:
    return {"status": status, "ticket": ticket["reference"], "message": message, "kind": kind,
            "confirmation": confirmation, "reason": reason}


def open_ticket(db: DB, now: int, account: Row, message: Message, kind: str) -> Row:
    """Insert a ticket; automatic replies and bounces go to the queue `Automatic`."""
    queue = account["queue"]
    if kind in ("auto-reply", "bounce"):
        queue = db.execute("SELECT id FROM queue WHERE name = 'Automatic'").fetchone()["id"]
    letters = "".join(secrets.choice("0123456789ABCDEFGHJKMNPQRSTVWXYZ") for _ in range(8))
    ticket = {
        "reference": f"T-{letters[:4]}-{letters[4:]}", "queue": queue,
        "email_account": account["id"], "subject": message.subject,
        "requester": message.from_address, "requester_name": message.from_name,
        "created_at": now, "updated_at": now}
    return ticket | {"id": insert(db, "ticket", **ticket)}


def touch_ticket(db: DB, now: int, ticket: Row, message: Message, kind: str) -> None:
    """A party's own words open a closed ticket again; no machine's, and no stranger's.

    Parties are the requester and whom a mail of ours on the ticket went to.
    """
    mailbox = mailbox_key(message.from_address)
    is_party = mailbox == mailbox_key(ticket["requester"]) or db.execute(
        """SELECT 1 FROM message JOIN outbox ON outbox.message = message.id
        WHERE message.ticket = ? AND outbox.mailbox = ?""", [ticket["id"], mailbox]).fetchone()
    if not is_party and kind not in ("bounce", "auto-reply"):
        message.notes.append(f"written by a stranger to this ticket: {message.from_address}")
    status = "open" if kind == "human" and is_party else ticket["status"]
    db.execute("UPDATE ticket SET updated_at = ?, status = ? WHERE id = ?", [
        now, status, ticket["id"]])


def insert_message(db: DB, now: int, ticket: Row, message: Message, reason: str,
                   kind: str | None = None, confirmation: str | None = None) -> int:
    """Insert a message and its attachments; return its id. Without a kind it is ours."""
    identifier = insert(
        db, "message", ticket=ticket["id"], email_account=ticket["email_account"],
        direction="in" if kind else "out", kind=kind, reason=reason, confirmation=confirmation,
        received_at=now, in_reply_to=" ".join(message.in_reply_to) or None,
        **{name: getattr(message, name) for name in MESSAGE_COLUMNS})
    for item in message.attachments:
        insert(db, "attachment", message=identifier, size=len(item.content or b""),
               **{name: getattr(item, name) for name in (
                   "filename", "content_type", "content_id", "sha256", "content", "note")})
    return identifier


MESSAGE_COLUMNS = ("message_id", "digest", "references", "from_address", "from_name",
                   "envelope_from", "to", "cc", "subject", "text", "html", "headers", "notes")


def insert(db: DB, table: str, **row: Any) -> int:
    """Insert a row, lists in it as JSON; return its id."""
    values = [json.dumps(value) if isinstance(value, list) else value for value in row.values()]
    return db.execute(insert_statement(table, *row), values).lastrowid or 0


@functools.lru_cache(20)
def insert_statement(table: str, *names: str) -> str:
    columns = ", ".join(f'"{name}"' for name in names)
    return f"INSERT INTO {table} ({columns}) VALUES ({', '.join('?' * len(names))})"


DELAYED = re.compile(r"delay|warning: (?:message|could not send)|still being retried|"
                     r"not yet been delivered|temporar|verzögert|will (?:continue|retry)", re.I)


def fail_bounced(db: DB, account: Row, message: Message) -> None:
    """Mark our mail that a bounce brings back failed, unless the bounce is not final.

    RFC 3464 2.3.3: these actions are not. Where none is told, codes that may pass and words of
    a delay are not final either.
    """
    report = report_of(message)
    codes = re.findall(r"(?<![\d.])(?:[245]\.\d{1,3}\.\d{1,3}|55\d)(?![\d.])", report)  # RFC 3463
    actions = re.findall(r"^action:\s*(\w+)", report.lower(), re.M)
    if actions:
        is_final = not {*actions} <= {"delayed", "delivered", "relayed", "expanded"}
    else:
        is_final = {code[0] for code in codes} != {"4"} or not DELAYED.search(
            message.subject + report)
    if is_final:
        ids = [*returned_ids(message, "bounce"), *message.in_reply_to, *message.references]
        code = next((code for code in codes if code[0] == "5"), "no code")
        db.execute("""UPDATE outbox SET state = 'failed', last_error = ? WHERE state = 'sent'
            AND message IN (SELECT id FROM message WHERE email_account = ? AND direction = 'out'
                AND message_id COLLATE NOCASE IN (SELECT value FROM json_each(?)))""", [
                    f"bounced: {code}", account["id"], json.dumps(ids)])


def starred(account: Row, text: str) -> str:
    """`text` with the secrets of the account starred out."""
    return starred_bytes(account, text.encode("utf-8", "ignore")).decode("utf-8", "ignore")


def starred_bytes(account: Row, content: bytes) -> bytes:
    for secret in (account["inbound_secret"], account["previous_secret"]):
        if secret:
            content = spellings(secret.encode()).sub(lambda found: b"*" * len(found[0]), content)
    return content


def safe(post: Post) -> Post:
    """The post as it may be kept: without the secret."""
    return replace(post, body=starred_bytes(post.account, post.body),
                   content_type=starred(post.account, clean(post.content_type)))


def keep(db: DB, now: int, post: Post, status: int, reason: str) -> None:
    """Keep a safe post that could not become a message; the same body again updates its row."""
    db.execute("""INSERT INTO rejected
            (received_at, email_account, status, reason, content_type, body, body_sha256)
        VALUES (?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT (email_account, body_sha256) DO UPDATE SET tries = tries + 1,
            received_at = excluded.received_at, status = excluded.status,
            reason = excluded.reason""", [
        post.received_at or now, post.account["id"], status, clean(reason), post.content_type,
        post.body, hashlib.sha256(post.body).hexdigest()])


def quarantine(db: DB, now: int, post: Post, faults: list[str]) -> Row:
    """Keep a safe post that raised something unexpected; return the answer's object."""
    reason = "; ".join(dict.fromkeys(faults))[:2000]
    keep(db, now, post, 200, reason)
    return quarantined(reason)


def quarantined(reason: str) -> Row:
    nobody = {"reference": None}
    return answer_of("quarantined", nobody, None, None, None, f"kept: {reason}")


def rehearse(db: DB, now: int) -> None:
    """Try all that storing a message needs, and undo it."""
    account = db.execute("SELECT * FROM email_account ORDER BY is_default DESC").fetchone()
    db.execute("SAVEPOINT rehearsal")
    try:
        post = Post(account, [], "", b"rehearsal")
        message = normalise({"from": "rehearsal@inbound.example", "text": secrets.token_hex(),
                             "attachments": [{"content": ""}]}, is_strict=False)
        file_message(db, now, post, Filing(message, "human", "rehearsal"))
        keep(db, now, post, 200, "rehearsal")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK TO rehearsal")
            db.execute("RELEASE rehearsal")


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
    mail = os.fsencode(line) + mail[next(MBOX.finditer(mail)).end():]
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
