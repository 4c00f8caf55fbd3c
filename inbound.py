"""inbound: email in, tickets out.

    provider, relay, MTA ─ POST ▶ authenticate ▶ read ▶ normalise ▶ classify ▶ thread ▶ store ▶ 200
                                                                                  │ one transaction
    customer ◀── SMTP ◀── courier thread ◀── outbox ◀─────────────────────────────┘

Four promises:
  1. A 200 means it is on disk: ticket, message, attachments and outbox row, in one transaction.
  2. The same message twice changes nothing, at once or a week later.
  3. Nothing that proved it knew the secret is lost: what was not understood is kept in `rejected`.
  4. Automatic mail is kept and never answered.

Usage: inbound [--db FILE] [--json] VERB        (FILE: $INBOUND_DB, else inbound.db)

  serve [--listen 127.0.0.1:8080]     make the database if there is none, answer, send the outbox
  secret [show | set VALUE | rotate [--keep 24h]]           what callers of the endpoint must know
  account [show | add ADDRESS | set KEY=VALUE ...]          address, queue, SMTP, template, more
  tickets                             all tickets, newest first
  show REF                            a ticket: its messages, and why each was treated as it was
  reply REF                           answer the requester with the text on standard input
  close REF                           close a ticket; a person's reply opens it again
  relay URL [--sender ADDRESS] [--secret-file FILE]         post the mail on standard input
  outbox [list | show ID | send | retry ID]                 mail on its way out
  rejected [list | show ID | replay [ID] | delete ID]       posts that could not become a message

Where there are several accounts, --account ADDRESS says which (default: the default one).
Errors are one line on standard error, exit 1; wrong usage exits 2.
As a WSGI application for another server: `inbound:app` (database from $INBOUND_DB), with
`inbound outbox send` from cron.
"""

import argparse
import base64
import concurrent.futures
import contextlib
import email.header
import email.message
import email.policy
import email.utils
import functools
import hashlib
import hmac
import html
import http.client
import json
import logging
import os
import re
import secrets
import signal
import smtplib
import sqlite3
import ssl
import sys
import threading
import time
import urllib.parse
from collections import Counter, deque, namedtuple
from pathlib import Path

ENDPOINT = "/api/helpdesk/inbound-email"
log = logging.getLogger("inbound")

# -------------------------------------------------------------------------------------------------
# Limits: each with its unit, what happens past it, and where the number comes from.

MAX_BODY = int(os.environ.get("INBOUND_MAX_BODY", 72 * 2**20))  # bytes; 413. 50 MB mail in base64
MAX_ADDRESS_HEADER = 998    # characters; the rest is not looked at. RFC 5322 2.1.1: a line's length
MAX_OWN_ID = 250            # characters; a longer id is stored but never enters our own headers
FIRST_REFERENCES, LAST_REFERENCES = 20, 80  # ids; those between do not count. The last = parent
BUSY_TIMEOUT = 2.0          # seconds one waits for SQLite's lock, then 503; with a queue before it
                            # a request may wait twice that, and SIGTERM leaves it 5 s
REFUSALS_SHOWN = 3600       # seconds for which /healthz warns of a refused secret
# Seconds: a courier's lease of a row, then it is anybody's again; one delivery in all, past it it
# is tried again; between two looks at the outbox when nothing wakes the courier.
LEASE, DELIVERY, LOOK = 45, 30, 5
# Seconds: undelivered mail is failed after the first; the second try comes after the second,
# doubled with each try up to the third.
GIVE_UP, FIRST_WAIT, MAX_WAIT = 24 * 3600, 60, 3600


# -------------------------------------------------------------------------------------------------
# Types: frozen, without behaviour.

class Refused(Exception):
    """The one error that answers HTTP: a status, a sentence with the value and what was expected.

    `more` goes into the answer: `fields` maps a canonical body's faulty fields to what is wrong.
    """

    def __init__(self, status, reason, **more):
        super().__init__(reason)
        self.status, self.reason, self.more = status, reason, more


# One request that proved it knew an account's secret: row of email_account, header, bytes.
Post = namedtuple("Post", "account content_type body")

# What a body turned out to be: `members`, each a canonical dict once `to_mail` has read it; without
# any, `ignored` says why, and `is_kept` whether an admin has to see it.
Reading = namedtuple("Reading", "provider members to_mail is_batch ignored is_kept",
                     defaults=("", (), dict, False, "", False))

# A mail as we understand it, text without NUL or lone surrogates. The names are columns of
# `message`, and schema.sql says what each is (what is JSON or words there is a list here); but for
# the last three: rows of `attachment`; how many mailboxes From names; the provider's word on spam.
Message = namedtuple("Message", """message_id digest in_reply_to references from_address from_name
    envelope_from to cc subject text html headers notes attachments from_count verdict""")


# -------------------------------------------------------------------------------------------------
# The app: one WSGI callable. Whatever happens inside, one answer and one log line come out.

ANSWER_HEADERS = {401: [("WWW-Authenticate", 'Basic realm="inbound"')],
                  405: [("Allow", "GET, HEAD, POST")], 503: [("Retry-After", "10")]}


def make_app(store):
    """Return the WSGI application (PEP 3333) that files mail in `store`."""

    def app(environ, start_response):
        began, text = time.perf_counter(), None
        try:
            status, content, text = respond(store, environ)
        except Refused as refusal:
            status, content = refusal.status, {"error": refusal.reason, **refusal.more}
        except Exception:
            log.exception("while answering")
            status, content = 500, {"error": "unexpected: nothing was stored, send it again"}
        kind = "application/json" if text is None else "text/plain"
        body = (json.dumps(content) + "\n" if text is None else text).encode()
        # The remark is escaped and capped: nobody outside writes a line of this log.
        log.info("%d %sB %.0fms %s", status, environ.get("CONTENT_LENGTH") or 0,
                 1000 * (time.perf_counter() - began), ascii(remark_of(content))[1:-1][:300])
        start_response(f"{status} {http.HTTPStatus(status).phrase}", [
            ("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(body))),
            *ANSWER_HEADERS.get(status, ())])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return app


def app(environ, start_response):
    """The WSGI application for other servers: database from $INBOUND_DB, made on first use."""
    return app_of(os.environ.get("INBOUND_DB") or "inbound.db")(environ, start_response)


app_of = functools.cache(lambda path: make_app(Store(path)))


def remark_of(content):
    """What the log says of an answer: status, ticket and why; `app` escapes and caps it."""
    names = ("status", "ticket", "kind", "confirmation", "reason", "error")
    return "; ".join(" ".join(str(item[name]) for name in names if item.get(name))
                     for item in content.get("messages", [content]))


def respond(store, environ):
    """Return (status, JSON object, text to send in its place or None); Refused for the rest."""
    path, method = environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"]
    if path == "/healthz" and method in ("GET", "HEAD"):
        return health(store)
    if path not in (ENDPOINT, ENDPOINT + "/"):
        raise Refused(404, f"there is nothing here; mail is posted to {ENDPOINT}")
    if method in ("GET", "HEAD"):   # some providers probe the URL before they use it
        return 200, {"status": "probed"}, "inbound: post received mail here\n"
    if method != "POST":
        raise Refused(405, f"{method[:20]!r} is not answered here; mail arrives by POST")
    read_body = functools.cache(lambda: body_of(environ))
    account = authenticate(store, environ, read_body)
    post = Post(account, environ.get("CONTENT_TYPE", ""), read_body())
    by_body = presented_secret(environ) is None
    try:
        provider, content = receive(store, post)
    except Refused as refusal:
        if refusal.status == 503 or not by_body:
            raise
        provider, content = "SocketLabs", {"status": "refused", "reason": refusal.reason}
    # SocketLabs wants its Validation Key as the body of every answer (SPEC 2).
    return 200, content, account["validation_key"] if by_body or provider == "SocketLabs" else None


def body_of(environ):
    """Return the request's body, bytes; Refused 413 over MAX_BODY, 400 when it ends early."""
    length = environ.get("CONTENT_LENGTH") or ("" if environ.get("wsgi.input_terminated") else "0")
    body = environ["wsgi.input"].read(min(int(length or MAX_BODY + 1), MAX_BODY + 1))
    if len(body) > MAX_BODY:
        raise Refused(413, f"the body is larger than {MAX_BODY} bytes")
    if len(body) < int(length or 0):
        raise Refused(400, f"the body ends after {len(body)} of {length} bytes")
    return body


def receive(store, post):
    """Make messages of a post and store them; return (provider, answer).

    What could not be understood is kept in `rejected` before Refused 400, 415, 422 or `quarantined`
    says so. `rejected replay` comes this way too.
    """
    reading = Reading()
    try:
        providers, signs = store.known(store.now() // 10)
        reading = read(post.content_type, post.body, providers)
        addresses = [account["address"] for account in store.accounts()]
        mails = [understand(reading, member, signs, addresses, post) for member in reading.members]
        results = store.write(file_all, post, addresses, mails)
    except Refused as refusal:      # the value that it names may be the secret itself
        reason = starred(post.account, refusal.reason)
        if refusal.status in (400, 415, 422):
            store.write(keep, safe(post), refusal.status, reason)
        faults = {"fields": {name: starred(post.account, fault) for name, fault in faults.items()}
                  for faults in refusal.more.values()}
        raise Refused(refusal.status, reason, **faults)
    except Exception as error:
        results = [store.write(quarantine, post, error)]
    if not results:
        if reading.is_kept:
            store.write(keep, safe(post), 200, reading.ignored)
        return reading.provider, {"status": "ignored", "reason": reading.ignored}
    if any(result["confirmation"] == "queued" for result in results):
        store.has_mail.set()
    answer = {"status": "batch", "messages": results} if reading.is_batch else results[0]
    return reading.provider, answer


def understand(reading, member, signs, addresses, post):
    """Return (Message, kind, reason, reason to withhold) of a member, or what it raised."""
    try:
        message = normalise(reading.to_mail(member), is_strict=reading.provider == "canonical")
        return message, *classify(message, signs, addresses, post.account["trusted_forwarders"])
    except Refused:
        raise
    except Exception as error:
        return error


def health(store):
    """GET /healthz: 503 with reasons when mail is not taken or not sent; the rest is a warning."""
    reasons, warnings = [], []
    try:
        store.write(lambda db, now: None)
        for row in store.rows("SELECT is_urgent, words FROM trouble"):
            (reasons if row["is_urgent"] else warnings).append(row["words"])
        disk = os.statvfs(Path(store.path).resolve().parent)
        if disk.f_bavail < disk.f_blocks * 0.05:
            reasons.append(f"disk: {disk.f_bavail / disk.f_blocks:.1%} free, expected 5 % or more")
    except (Refused, OSError) as error:
        reasons.append(str(error))
    if refused := sum(moment > store.now() - REFUSALS_SHOWN for moment in [*store.refusals]):
        warnings.append(f"{refused} posts had a wrong secret in the last hour")
    return ((503, {"status": "degraded", "reasons": reasons}, None) if reasons else
            (200, {"status": "ok", "warnings": warnings}, None))


# -------------------------------------------------------------------------------------------------
# Authenticate: the first place that holds a secret decides, even when it is empty there. The
# secrets of all accounts are compared, always, so that the time tells nothing.

def authenticate(store, environ, read_body):
    """Return the email_account row whose secret the caller knows.

    `read_body` is called only when no other place holds a secret and some account uses SocketLabs.
    Refused 503 while no account has a secret (so that providers keep the mail), else 401.
    """
    known = store.rows("SELECT * FROM valid_secret WHERE until > ?", [store.now()])
    presented, found = presented_secret(environ), None
    if not known:
        raise Refused(503, "no secret is set yet: run `inbound secret rotate`")
    if in_body := presented is None and any(account["validation_key"] for account in known):
        with contextlib.suppress(Exception):    # SocketLabs' SecretKey, from anybody so far
            fields = fields_of(environ.get("CONTENT_TYPE", ""), read_body())
            presented = str(at(fields, "SecretKey") or "").encode("utf-8", "replace")
    for account in known:       # digests: compare_digest takes longer for a longer argument
        ours, theirs = map(hashlib.sha256, (account["secret"].encode(), presented or b""))
        is_same = hmac.compare_digest(ours.digest(), theirs.digest())
        if is_same and not found and (account["validation_key"] or not in_body):
            found = account
    if found is None:
        store.refusals.append(store.now())
        raise Refused(401, "no right secret in X-Mobieus-Inbound-Secret, ?secret= or HTTP Basic")
    return found


def presented_secret(environ):
    """The secret's bytes from header, query or HTTP Basic; b"" when unusable, None when in none."""
    if (header := environ.get("HTTP_X_MOBIEUS_INBOUND_SECRET")) is not None:
        return header.encode("latin-1")     # PEP 3333. A repeated header arrives joined: no match.
    query = urllib.parse.parse_qs(environ.get("QUERY_STRING", ""), True, encoding="latin-1")
    if in_query := query.get("secret"):
        return in_query[0].encode("latin-1") if len(in_query) == 1 else b""
    scheme, _, credentials = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    with contextlib.suppress(ValueError):   # RFC 7617 2: user-id ":" password. Any user-id will do.
        return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    return b""


# -------------------------------------------------------------------------------------------------
# Read: bytes → canonical dict(s). Who posted is recognised from the body alone. A provider is a row
# in schema.sql's table `provider`: what its posts bear, and where each canonical field lives. Here
# is only how to walk there. A post that carries the whole mail (`raw`) is read from that alone.

class Form(dict):
    """The fields of a form, or of a list as `events`: never a canonical body."""


FORM = "application/x-www-form-urlencoded"
RAW_FIELDS = ("email", "message", "body-mime")      # of forms: a whole mail has charsets of its own
FROM_HEADERS = ("from", "to", "cc", "subject")      # fields that a header stands in for
MISSING = object()
MBOX = rb"\A(?:>?From [^\n]*\n)+"


def read(content_type, body, providers):
    """Return the Reading of a body; `providers` are the rows of that table.

    Refused 400: not decodable, 415: no type that mail comes in, 422: no mail in it, and what to do.
    """
    fields = fields_of(content_type, body)
    if isinstance(fields, bytes):
        return Reading("raw", [fields], mail_of_mime)
    fields = Form(events=fields) if isinstance(fields, list) else fields
    if matches(fields, "TopicArn Type=Notification !message_id"):   # SNS: the post is inside
        fields = loaded(fields.get("Message")) or {"notificationType": "no JSON"}
    for row in providers:
        if not matches(fields, row["marks"]):
            continue
        if row["status"] == 422:
            raise Refused(422, row["answer"])
        if row["answer"]:
            return Reading(row["name"], ignored=row["answer"], is_kept=row["status"] == 202)
        is_batch = row["members"] is not None
        members = at(fields, row["members"]) if is_batch else [fields]
        if not isinstance(members := loaded(members, members), list):
            raise Refused(400, f"{row['members']!r} is not a JSON list")
        marks, path = row["member_marks"], row["member"]
        members = [at(member, path) for member in members if matches(member, marks)]
        to_mail = functools.partial(mail_of, row["fields"])
        return Reading(row["name"], members, to_mail, is_batch, f"{row['name']} posted no mail")
    if isinstance(fields, Form):
        raise Refused(400, "no provider posts such a form or list; expected an object with `from`")
    return Reading("canonical", [fields])


def matches(fields, marks):
    """Whether a post bears all marks; schema.sql has their grammar at `provider`."""
    def bears(mark):
        path, _, wanted = mark.strip("!{}[]~").partition("=")
        value = walk(fields, path)
        kind = {"}": dict, "]": list, "~": str}.get(mark[-1], object)
        is_there = value is not MISSING and isinstance(value, kind) and wanted in ("", value)
        return is_there != mark.startswith("!")

    return all(any(map(bears, either.split("|"))) for either in marks.split())


def walk(value, path):
    """The value at a path like `a.b.0`, through JSON text too; MISSING when there is none."""
    for step in filter(None, path.split(".")):
        value = loaded(value, value) if isinstance(value, str) else value
        try:
            value = value[int(step) if isinstance(value, list) else step]
        except (LookupError, TypeError, ValueError):
            return MISSING
    return value


def at(fields, paths):
    """The value at a path, or None; of `a|b` the first that holds something, of `a+b` all items."""
    if "+" in paths:
        items = [item for path in paths.split("+") for item in items_of(at(fields, path))]
        return "\n".join(items) if all(isinstance(item, str) for item in items) else items
    values = [walk(fields, path) for path in paths.split("|")]
    values = [value for value in values if value not in (MISSING, None)]
    return next((value for value in values if value not in ("", [])), values[0] if values else None)


def loaded(text, default=None):
    """The JSON object or list in a field of text; else `default`, or {}."""
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        if text.lstrip()[:1] in ("{", "["):
            return json.loads(text)
    return {} if default is None else default


def fields_of(content_type, body):
    """Return the JSON object or list of a body, the Form, or the bytes of a raw message."""
    header = email.message.Message(Bytewise())
    header["Content-Type"] = clean(content_type).strip() or "application/json"
    kind = header.get_content_type()
    if kind == "message/rfc822" and body.strip():
        return body
    if kind == "multipart/form-data":
        return form_of(parts_of(body, header.get_boundary()))
    if kind not in ("application/json", "text/json", "text/plain", FORM):
        raise Refused(415, f"content type {kind!r} carries no mail; expected application/json")
    if "json" not in kind and not re.match(rb"(?:\xef\xbb\xbf)?\s*[{\[]", body):
        if re.match(rb"From |[!-9;-~]+:(?:[ \t]|\r?\n[ \t])", body):        # a header line
            return body
        if kind == FORM:            # latin-1 keeps the bytes: the charset comes later
            pairs = urllib.parse.parse_qsl(body.decode("latin-1"), True, encoding="latin-1")
            return form_of((name, None, value.encode("latin-1")) for name, value in pairs)
    return parse_json(body)


def parse_json(body):
    """Return the object or list in `body`, strict UTF-8; Refused 400.

    We do not give json.loads the bytes: it guesses UTF-16 and lets lone surrogates through.
    """
    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=int)    # int("NaN") raises
    except (ValueError, RecursionError) as error:       # UnicodeDecodeError is a ValueError
        raise Refused(400, f"the body is not JSON in UTF-8: {ascii(str(error))[1:-1][:200]}")
    if not isinstance(value, (dict, list)):
        raise Refused(400, f"the body is {type(value).__name__}; expected a JSON object")
    return value


def parts_of(body, boundary):
    """Yield (name, headers if it is a file, content) of multipart/form-data (RFC 7578), as posted.

    We do not use email.parser on the whole: it descends into a file that is itself a mail.
    """
    chunks = (b"\r\n" + body).split(b"\r\n--" + (boundary or "").encode("latin-1", "replace"))
    if not boundary or len(chunks) < 3:
        raise Refused(400, f"the body is not cut by its boundary {boundary!r}")
    for chunk in chunks[1:]:
        if chunk.startswith(b"--"):
            return
        head, _, content = chunk.partition(b"\r\n\r\n")
        header = email.message_from_string(decode(head.lstrip(), "utf-8"), policy=Bytewise())
        name = str(header.get_param("name", "", "content-disposition"))
        yield name, header if header.get_filename() is not None else None, content


def form_of(parts):
    """Return the Form of (name, headers if it is a file, content) triples; files stand in `files`.

    `envelope[to]` and `attachments[0][filename]` become objects, as their senders mean them.
    """
    parts, form = list(parts), Form()
    files = [{"field": name, "filename": header.get_filename(), "type": header.get_content_type(),
              "data": content} for name, header, content in parts if header]
    charsets = loaded(b"".join(part[2] for part in parts if part[0] == "charsets").decode("latin1"))
    for name, _, content in (part for part in parts if not part[1]):
        # SendGrid: what does not fit its charset stands in the headers too.
        misfit = "" if name in FROM_HEADERS else None
        value = content if name in RAW_FIELDS else decode(content, at(charsets, name), misfit)
        *branches, leaf = name.replace("]", "").split("[")[:4]
        branch = form
        for key in branches:
            branch = branch.setdefault(key, {}) if isinstance(branch.get(key, {}), dict) else {}
        is_more = isinstance(branch.get(leaf), str) and isinstance(value, str)
        branch[leaf] = f"{branch[leaf]}\n{value}" if is_more else value   # Mailgun may split a body
    mapped = [(field, known) for known, field in loaded(form.get("content-id-map")).items()]
    infos = loaded(form.get("attachment-info"))
    for file in files:
        info = at(infos, f"{file['field']}.content-id")
        file["cid"] = info or next((known for field, known in mapped if field == file["field"]), "")
    form["files"] = files
    return form


def items_of(value):
    """A list, what stands for one (`a[0]`, `a[1]` in a form, Mandrill's by name), or one value."""
    if isinstance(value, dict) and all(key.isdigit() or type(value[key]) is dict for key in value):
        return [*value.values()]
    return value if isinstance(value, list) else [value] if value else []


def mail_of(where, fields):
    """Return the canonical dict of a post whose fields live `where` its row of `provider` says."""
    if not isinstance(fields, dict):
        raise ValueError(f"a mail of the batch is {type(fields).__name__}, expected an object")
    pairs = (word.partition("=") for word in where.split())
    mail = {name: at(fields, path or name) for name, _, path in pairs}
    envelope, raw = mail.pop("envelope", None), mail.pop("raw", None)
    if isinstance(envelope, list):              # Postmark has it in its headers
        envelope = return_path(raw_headers_of(envelope, {}))
    extra = {"envelope": {"from": envelope}, "verdict": str(mail.pop("spam", None) or "")}
    if raw:                                     # no base64 has a colon, and no mail is without one
        raw = raw.encode("utf-8", "ignore") if isinstance(raw, str) else raw
        return mail_of_mime(raw if b":" in raw[:2000] else base64.b64decode(raw)) | extra
    headers = raw_headers_of(mail.get("headers"), {})
    headers += [[name, value] for name, value in mail.items() if name[0].isupper() and value]
    first = {name.lower(): value for name, value in reversed(headers)}
    mail |= {name: mailbox_texts(mail.get(name)) for name in ("from", "to", "cc")}
    mail |= {name: mail.get(name) or first.get(name) for name in FROM_HEADERS}
    mail["attachments"] = items_of(loaded(mail.get("attachments"), mail.get("attachments") or []))
    if "Parts" in fields:                       # Mailjet: names in one place, contents in another
        mail["attachments"] = [mailjet_part(fields, part) for part in mail["attachments"]
                               if at(part, "ContentRef") not in ("Text-part", "Html-part")]
    mail["message_id"] = first.get("message-id") or mail.get("message_id")
    return mail | extra | {"headers": headers}


def mailjet_part(fields, part):
    header = email.message.Message(Bytewise())
    for name, value in raw_headers_of(part.get("Headers"), {}):
        header[name] = clean(value)
    return {"filename": header.get_filename(), "type": header.get_content_type(),
            "cid": header["Content-ID"], "content": fields.get(part["ContentRef"])}


def mailbox_texts(value):
    """An address header's text, from text, {name, address} in any spelling, or a list of such."""
    texts = []
    for item in items_of(value):
        if isinstance(item, dict):
            name = str(at(item, "name|Name|FriendlyName") or "").replace('"', "'")
            address = at(item, "address|Address|email|Email|EmailAddress")
            item = f'"{name}" <{address}>' if address else ""
        texts += item[:1] if isinstance(item, list) else [item]     # Mandrill: [address, name]
    return ", ".join(text for text in texts if text and isinstance(text, str))


class Bytewise(email.policy.Compat32):
    """The old policy, as the new one's address parser is quadratic; with 8-bit headers as text."""

    def header_fetch_parse(self, name, value):
        value = decode(value.encode("utf-8", "surrogateescape"), "utf-8")
        is_long = len(value) > 9999 or value.count(";") > 99    # email's parameters are quadratic
        return value.partition(";")[0] if is_long and name.lower()[:8] == "content-" else value


def mail_of_mime(content):
    """Return the canonical dict of a raw mail (RFC 5322, RFC 2045), read as far as it goes."""
    content = re.sub(MBOX, b"", content.lstrip(b"\xef\xbb\xbf \t\r\n"))
    head, *body = re.split(rb"(?=\r?\n\r?\n)", content, maxsplit=1)
    # email.parser ends the headers at the first line that is none, and hides all below it.
    head = re.sub(rb"\r(?!\n)", b" ", head)
    head = re.sub(rb"(?m)^(?![!-9;-~]+:|[ \t]|\r?$)(?:([!-9;-~]+)[ \t]+:)?",      # RFC 5322 4.5.8
                  lambda line: line[1] + b":" if line[1] else b"X-Malformed: ", head)
    if len(re.findall(rb"(?i)boundary\s*=", content)) > 100:        # each line is held against each
        raise ValueError("more than 100 boundaries")
    content = b"".join([head, *body])
    texts, attachments = {"text": [], "html": []}, []
    mail = email.message_from_bytes(content, policy=Bytewise())
    for part in leaves_of(mail):
        kind, filename = part.get_content_type(), part.get_filename()
        content = part.get_payload(decode=True) or b""
        if part.is_multipart():     # an attached mail or report, as it was written
            content = b"\n".join(inner.as_bytes() for inner in part.get_payload())
        is_body = filename is None and part.get_content_disposition() != "attachment"
        if is_body and re.fullmatch("text/(?:plain|html)|multipart/.*", kind):
            pieces = texts["html" if kind == "text/html" else "text"]
            pieces.append(decode(content, part.get_content_charset()))
        else:
            attachments.append({"filename": filename, "type": kind, "content": content,
                                "cid": part["Content-ID"]})
    return {
        "headers": [*map(list, mail.items())], "attachments": attachments,
        "message_id": mail["Message-ID"], "envelope": {"from": return_path(mail.items())},
        **{name: mail[name] for name in FROM_HEADERS},
        **{name: "\n".join(pieces) for name, pieces in texts.items()}}


def leaves_of(part):
    """The parts of a mail that are not multipart, in order; an attached mail is one of them."""
    if part.is_multipart() and part.get_content_maintype() == "multipart":
        return [leaf for inner in part.get_payload() for leaf in leaves_of(inner)]
    return [part]


def return_path(headers):
    """MAIL FROM as the last server wrote it: only the first header can be its, none below it."""
    if headers and headers[0][0].lower() == "return-path" and headers[0][1].strip():
        return headers[0][1]
    return None


# -------------------------------------------------------------------------------------------------
# Normalise: canonical dict → Message. Text is cleaned once, here, and trusted from here on.

# Quoted local parts and address literals are stored, but never written to.
ADDR_SPEC = re.compile(r'(?:[^\s<>()\[\],;:\\"@]+|"[^"\r\n]+")'
                       r'@(?:[^\s<>()\[\],;:\\"@]+|\[[^\s\[\]<>]+\])|mailer-daemon', re.I)
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
NAME_ADDR = re.compile(r'((?:"(?:[^"\\]|\\.)*"|[^"<>])*)<([^<>]*)>\s*(?:\([^()]*\))?')
MESSAGE_IDS = re.compile(r'<([^<>]+)>|([^\s<>,;"()]+)')
WORD = r"=\?[^?\s]+\?[bq]\?(?:[^=?]|=(?!\?[^=])|\?(?!=))*\?="     # it ends before the next `=?`
WORDS = re.compile(rf"{WORD}(?:\s*{WORD}){{0,99}}", re.I)           # decode_header is quadratic
CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]+ ?")  # RFC 5322 2.2.3: a fold is one space
# To the end where they are not closed, so that nothing is ever looked at twice.
HIDDEN = re.compile(r"(?is)<!--(?:>|.*?-->|.*)|<(script|style|title)\b(?:.*?</\1\s*>|.*)|&#\d{8,}")


def normalise(mail, is_strict):
    """Return the Message that a canonical dict describes.

    `is_strict` is for the canonical body itself: Refused 422 lists every field that is missing or
    of the wrong type. Elsewhere such a field costs nothing but a note.
    """
    faults, notes = {}, []
    text, markup, subject, from_text, from_name, own_id = (text_of(mail, name, faults) for name in (
        "text", "html", "subject", "from", "from_name", "message_id"))
    headers = headers_of(mail.get("headers"), faults)
    attachments = attachments_of(mail.get("attachments"), faults)
    envelope_from = envelope_sender(mail.get("envelope"), faults)
    for name in ("in_reply_to", "references", "to", "cc"):
        if not isinstance(mail.get(name), (str, list, type(None))):
            faults[name] = f"expected a string or a list, not {type(mail[name]).__name__}"
    parents = ids_of(mail.get("in_reply_to") or header_values(headers, "in-reply-to"))
    references = ids_of(mail.get("references") or header_values(headers, "references"))
    named = mailboxes_of(from_text)
    name, address = [*named, ("", envelope_from or "MAILER-DAEMON")][0]
    if not named and envelope_from:
        notes.append("From is unusable: the envelope sender stands for it")
    elif not named:
        shown = from_text if len(from_text) < 100 else "…"
        faults.setdefault("from", f"expected an address, not {shown!r}" if shown else "required")
    subject = one_line(subject) or "(no subject)"
    digest = digest_of(address, subject, text, markup, attachments)
    if not (message_id := message_id_of(own_id)):
        faults.setdefault("message_id", "required")
        # The Date, where there is one, tells two mails of the same words apart.
        seed = "".join([digest, *header_values(headers, "date")])
        message_id = f"<{hashlib.sha256(seed.encode()).hexdigest()[:32]}@missing.invalid>"
    if not (named or own_id or text or markup or attachments or mail.get("subject") or is_strict):
        raise ValueError("nothing in it reads as a mail")
    sentences = [f"{field}: {fault}" for field, fault in faults.items()]
    if faults and is_strict:
        raise Refused(422, "; ".join(sentences), fields=faults)
    return Message(
        message_id=message_id, digest=digest, in_reply_to=parents, references=references,
        from_address=address, from_count=len(named), from_name=one_line(from_name) or name,
        envelope_from=envelope_from, subject=subject, html=markup or None, headers=headers,
        to=addresses_of(mail.get("to")), cc=addresses_of(mail.get("cc")), attachments=attachments,
        text=text if text.strip() else html_to_text(markup), notes=notes + sentences,
        verdict="" if is_strict else mail.get("verdict", ""))


def clean(text):
    """Drop what SQLite, SMTP and JSON each stumble over: NUL and lone surrogates."""
    return text.replace("\0", "").encode("utf-8", "ignore").decode()


def one_line(text):
    """A header's value in one line: unfolded, RFC 2047 words decoded, controls blanked."""
    text = WORDS.sub(lambda run: decode_words(run[0]), CONTROLS.sub(" ", clean(text)))
    return CONTROLS.sub(" ", clean(text)).strip()


def text_of(mail, name, faults):
    """The cleaned text of a field, '' when absent. A number is its text, another type a fault."""
    value = mail.get(name)
    value = str(value) if type(value) in (int, float) else value
    if value is not None and not isinstance(value, str):
        faults[name], value = f"expected a string, not {type(value).__name__}", None
    return clean(value or "")


def decode_words(text):
    """Decode a run of RFC 2047 encoded-words; what is broken stays as it is."""
    with contextlib.suppress(ValueError, email.errors.MessageError):
        return "".join(word if isinstance(word, str) else decode(word, charset)
                       for word, charset in email.header.decode_header(text))
    return text


def decode(content, charset, misfit=None):
    """The text of bytes: in the charset claimed, else `misfit`, else as UTF-8 or Windows-1252."""
    # What is labelled Latin-1 holds Windows-1252 (the WHATWG encoding standard reads it so).
    # punycode and idna decode in quadratic time, and nobody writes mail in them.
    name = re.sub("[^a-z0-9]+", "-", (charset or "utf-8").lower()).strip("-")
    name = {"iso-8859-1": "cp1252", "punycode": "utf-8", "idna": "utf-8"}.get(name, name)
    for candidate in (name, "utf-8") if misfit is None else (name,):
        with contextlib.suppress(LookupError, ValueError):
            return content.decode(candidate)
    return content.decode("cp1252", "replace") if misfit is None else misfit


def headers_of(value, faults):
    """[[name, value], …] like `raw_headers_of`, decoded and each in one line."""
    return [[one_line(name), one_line(text)] for name, text in raw_headers_of(value, faults)]


def raw_headers_of(value, faults):
    """Return [[name, value], …] as posted, order and repeats kept.

    From an object (values string, list or null), a list of pairs, of {Name, Value}, of {line} or of
    one-key objects; as text, a JSON list of these or a header block.
    """
    if isinstance(value, str):
        block = email.message_from_string(value, policy=Bytewise())
        value = loaded(value) or [*map(list, block.items())]
    pairs = []
    for item in value if isinstance(value, list) else [value] if value is not None else ():
        if isinstance(item, dict) and (name := at(item, "name|Name")) and isinstance(value, list):
            pairs.append((name, at(item, "value|Value")))
        elif isinstance(item, dict) and "line" in item and "key" in item:
            pairs.append(str(item["line"]).partition(":")[::2])
        elif isinstance(item, dict) or isinstance(item, list) and len(item) == 2:
            pairs += item.items() if isinstance(item, dict) else [item]
        else:
            faults["headers"] = f"expected an object of names and values, not {type(item).__name__}"
    # CloudMailin writes message_id; beside a name with a hyphen an underscore is the sender's own.
    dash = "_" if any("-" in str(name) for name, _ in pairs) else "-"
    return [[str(name).replace("_", dash), str(text)] for name, content in pairs
            for text in (items_of(content) or [content]) if text is not None]


def header_values(headers, name):
    """All values of the header `name` (lower case), in order."""
    return [value for header, value in headers if header.lower() == name]


def mailboxes_of(value):
    """Return [(name, addr-spec), …] of an address header (RFC 5322 3.4); [] where it is unclear.

    Providers post decoded names without their quotes (`Doe, John <j@example.org>`), so one address
    in brackets at the end is taken for what it looks like before email.utils is asked.
    """
    value = CONTROLS.sub(" ", value)[:MAX_ADDRESS_HEADER].strip()
    found = NAME_ADDR.fullmatch(f"<{value}>" if ADDR_SPEC.fullmatch(value) else value)
    if found and not ("," in (bare := QUOTED.sub("", found[1])) and "@" in bare):
        name = QUOTED.sub(lambda quoted: re.sub(r"\\(.)", r"\1", quoted[1]), found[1])
        pairs = [(name, found[2].strip())]
    else:
        pairs = []
        with contextlib.suppress(ValueError, RecursionError, IndexError):
            pairs = email.utils.getaddresses([value])
        # `alice@example.org)bob@example.net` is Alice to some versions (CVE-2023-27043): each @
        # that is not in quotes or a comment has to be part of one of the addresses.
        bare = QUOTED.sub("", re.sub(r"\([^()]*\)", "", value))
        if bare.count("@") != sum("@" in address for _, address in pairs):
            return []
    return [(one_line(name), address) for name, address in pairs if ADDR_SPEC.fullmatch(address)]


def addresses_of(value):
    """The addresses of To or Cc, for display: from a header's text or a list of such."""
    return [address for text in items_of(value) if isinstance(text, str)
            for _, address in mailboxes_of(clean(text))]


def envelope_sender(envelope, faults):
    """MAIL FROM of `{from, to}`: '' = null sender, None = unknown."""
    value = envelope.get("from") if isinstance(envelope, dict) else envelope
    if value is not None and not (isinstance(value, str) and isinstance(envelope, dict)):
        faults["envelope"], value = "expected an object whose `from` is a string or null", None
    value = value and clean(value).strip()
    mailboxes = mailboxes_of(value or "")
    return mailboxes[0][1] if mailboxes else "" if value in ("", "<>") else None


def message_id_of(value):
    """The Message-ID with its brackets, of any length; '' when `value` holds none."""
    return next(iter(ids_of(value) or ids_of("<%s>" % value.strip(' <>"'))), "")


def ids_of(value):
    """The message-ids of In-Reply-To or References: each once, in order, with brackets.

    RFC 5322 3.6.4, and what is seen: lists, folding inside the brackets, `&lt;`, missing brackets.
    Of many, the first 20 and the last 80.
    """
    text = " ".join(text for text in items_of(value) if isinstance(text, str))
    found = MESSAGE_IDS.findall(clean(text).replace("&lt;", "<").replace("&gt;", ">"))
    ids = (re.sub(r"\s", "", bracketed) or bare.strip("'") for bracketed, bare in found
           if bracketed or "@" in bare[1:-1])
    known = [*dict.fromkeys(f"<{identifier}>" for identifier in ids if identifier)]
    return known[:FIRST_REFERENCES] + known[FIRST_REFERENCES:][-LAST_REFERENCES:]


def attachments_of(value, faults):
    """Rows of `attachment` from a list of objects, whatever a provider calls their fields."""
    if value is not None and not isinstance(value, list):
        faults["attachments"] = f"expected a list, not {type(value).__name__}"
    rows = []
    for item in value if isinstance(value, list) else ():
        if not isinstance(item, dict):
            faults["attachments"] = f"expected objects in it, not {type(item).__name__}"
            continue
        known = {re.sub("[^a-z0-9]", "", key.lower()): part for key, part in item.items()}
        name, kind, content_id = (one_line(str(at(known, names) or "")) for names in (
            "filename|name", "contenttype|type", "contentid|cid"))
        content, note = at(known, "content|data"), "not kept: its content is not in the post"
        try:
            if isinstance(content, dict):       # Node's Buffer: {"type": "Buffer", "data": [ints]}
                content = bytes([*content["data"]])
            elif isinstance(content, str):      # Mandrill; RFC 2045 6.8: line breaks do not count
                content = (content.encode() if known.get("base64") is False else
                           base64.b64decode(re.sub(r"\s", "", content), validate=True))
        except (ValueError, TypeError, KeyError) as error:
            content, note = None, f"not kept, its content is broken: {error}"
        is_kept = isinstance(content, bytes)
        rows.append({
            # A name is text to show, never a path: cut off is all before the last separator.
            "filename": re.split(r"[/\\]", name)[-1], "content_id": content_id.strip("<> "),
            "content_type": kind.partition(";")[0].strip().lower() or "application/octet-stream",
            "size": len(content) if is_kept else 0, "content": content if is_kept else None,
            "sha256": hashlib.sha256(content).hexdigest() if is_kept else None,
            "note": "" if is_kept else note})
    return rows


def digest_of(from_address, subject, text, markup, attachments):
    """SHA-256 of what the sender wrote; nothing in it changes when the mail is posted again."""
    parts = [from_address.lower(), subject, text, markup]
    parts += [f"{item['filename']}:{item['sha256']}" for item in attachments]
    parts = [part.replace("\r\n", "\n") for part in parts]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def html_to_text(markup):
    """The text of HTML: no scripts or styles, links and line breaks kept.

    One pass over tags and text. We do not use html.parser: it takes 11 s for 160 KB of `<!--` and
    raises on `<![<![` (measured, Python 3.11.7).
    """
    pieces, link = [], ""
    for piece in re.split("(<[/!?a-zA-Z][^<>]*>)", HIDDEN.sub("", markup)):
        found = re.match(r"</?([a-zA-Z!?][a-zA-Z0-9-]*)", piece)
        tag = found[1].lower() if found else ""
        if tag == "a":
            pieces.append(f" ({link})" if link and link not in "".join(pieces[-3:]) else "")
            href = re.search(r"""\shref\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""", piece, re.I)
            link = html.unescape(next(filter(None, href.groups()), "")).strip() if href else ""
            link = "" if link.startswith("#") else link.removeprefix("mailto:")
        elif re.fullmatch("br|p|div|tr|li|ul|ol|table|blockquote|hr|h[1-6]", tag):
            pieces.append("\n")
        elif not tag:
            pieces.append(re.sub(r"\s+", " ", html.unescape(piece)))
    lines = (" ".join(line.split()) for line in "".join(pieces).split("\n"))
    return re.sub("\n{3,}", "\n\n", "\n".join(lines)).strip()


# -------------------------------------------------------------------------------------------------
# Classify: the rows of schema.sql's table `sign`, each with its reason; the first to hold decides.
# Only the outermost headers count. No sign is ever a reason to drop a mail: it says who is not
# answered, and where the mail goes.

def classify(message, rows, own_addresses, trusted_forwarders):
    """Return (kind, reason, why a person's mail is not confirmed or ''), in our own words.

    What our own groups and forwarders (`trusted_forwarders`: addresses between commas) stamped on
    it does not count: through them every customer's mail has a List-Id or an Auto-Submitted.
    """
    signs = signs_of(message)
    forwarders = {word.strip().lower() for word in (trusted_forwarders or "").split(",")} - {""}
    ours = forwarders | {address.lower() for address in own_addresses}
    ours |= {address.replace("@", ".") for address in ours}     # List-Id: <support.example.org>
    names = {kind: {name for row in rows if row["kind"] == kind for name in row["names"].split()}
             for kind in ("list", "bulk", "forwarded")}
    lists = (names["list"] | names["bulk"]) - {"precedence", "x-precedence"}
    is_forwarded = named_in(signs, names["forwarded"] | {"mail-from"}, forwarders)
    if is_forwarded or named_in(signs, [f"raw-{name}" for name in lists], ours):
        signs = {name: values for name, values in signs.items() if name not in lists | {"path"}}
        drop(signs, "precedence", "list")
    if is_forwarded:
        signs.pop("x-ms-exchange-inbox-rules-loop", None)
        drop(signs, "auto-submitted", "auto-generated")
    signs["weak"] = [row["reason"] for row in rows if row["kind"] == "weak" and holds(row, signs)]
    found = [row for row in rows if row["kind"] not in ("weak", "forwarded") and holds(row, signs)]
    for row in found:
        if row["kind"] != "withhold":
            return row["kind"], row["reason"], f"never for {row['kind']} mail (RFC 3834 2)"
    return "human", "no sign of automatic mail", found[0]["reason"] if found else ""


def drop(signs, name, word):
    signs[name] = [value for value in signs.get(name, ()) if value != word]


def holds(row, signs):
    """Whether a value of one of a row's names matches its pattern, and so with the second test."""
    tests = ((row["names"], row["pattern"]), (row["and_names"], row["and_pattern"]))
    return all(any(re.fullmatch(pattern, value, re.I) for name in names.split()
                   for value in signs.get(name, ())) for names, pattern in tests if names)


def signs_of(message):
    """What the rows of `sign` look at: name → values."""
    signs = {"from": [local_part(message.from_address)], "subject": [message.subject],
             "verdict": [message.verdict], "mail-from": [message.envelope_from or ""],
             "part": [item["content_type"] for item in message.attachments]}
    for name, value in message.headers:
        signs.setdefault(name.lower(), []).append(keyword(value))
        signs.setdefault(f"raw-{name.lower()}", []).append(value)
        signs.setdefault(f"top-{name.lower()}", [value])
    if message.envelope_from is not None:
        signs["envelope"] = signs["path"] = [local_part(message.envelope_from) or "<>"]
    return signs


def keyword(value):
    """The first token of a header's value, lower case.

    RFC 3834 5.1: comments may stand before and after the keyword, parameters behind a semicolon.
    """
    value = value[:300]     # a keyword stands in front; nested comments cost a pass each
    while (stripped := re.sub(r"\([^()]*\)", " ", value)) != value:
        value = stripped
    return value.partition(";")[0].strip(' \t"\'').lower()


def named_in(signs, names, addresses):
    """Whether one of the addresses stands in a header: in its <brackets> where there are any."""
    return any(word.lower().removeprefix("mailto:") in addresses
               for name in names for value in signs.get(name, ())
               for word in re.findall("<([^<>]*)>", value) or re.split(r"[\s;,]+", value))


def local_part(address):
    return address.rpartition("@")[0].lower() or address.lower()


# -------------------------------------------------------------------------------------------------
# Thread: which ticket a message belongs to. By ids first; by the subject's tag for its requester.

SUBJECT_TAG = re.compile(r"\[(T-[0-9A-Z]{4}-[0-9A-Z]{4})\]", re.I)
RETURNED_ID = re.compile(r"^[> \t]*(?:x-)?(?:original-)?message-id:\s*(<[^<>\s]+>)", re.I | re.M)


def thread(db, account, message, kind):
    """Return (ticket row or None, reason). All ids count that this account received or sent."""
    # RFC 5322 3.6.4: In-Reply-To names the parent, and so does the last of References.
    # RFC 3464 2, RFC 8098 3.2.5: reports and receipts carry the mail that came back.
    returned = returned_ids(message) if kind in ("bounce", "auto-reply") else []
    places = [("In-Reply-To", message.in_reply_to), ("References", message.references[::-1]),
              ("the returned message", returned)]
    for place, ids in places:
        for message_id in ids:
            # As written, then of its own requester, then the liveliest. Servers change an id's case
            # and lose a trailing dot, hence NOCASE and the second spelling.
            if ticket := db.execute("""SELECT * FROM known_id
                    WHERE email_account = :account AND message_id COLLATE NOCASE IN (:id, :other)
                    ORDER BY message_id = :id DESC, requester = :from DESC, updated_at DESC""", {
                        "account": account["id"], "from": message.from_address, "id": message_id,
                        "other": message_id[:-1].rstrip(".") + ">"}).fetchone():
                return ticket, f"{place} names a message of this ticket"
    for tag in SUBJECT_TAG.findall(message.subject)[:5]:
        ticket = db.execute("SELECT * FROM ticket WHERE reference = ? AND email_account = ?",
                            [tag.upper(), account["id"]]).fetchone()
        if ticket and mailbox_key(ticket["requester"]) == mailbox_key(message.from_address):
            return ticket, "the requester wrote it with this ticket's tag in the subject"
    return None, "no id of a known message, so a new ticket"


def returned_ids(message):
    """Message-ids of what a report sends back: in its parts, or its text (a provider's JSON)."""
    texts = [decode(item["content"] or b"", "") for item in message.attachments
             if item["content_type"].startswith(("message/", "text/"))] + [message.text]
    return [message_id for text in texts for message_id in RETURNED_ID.findall(text[:65536])][:20]


def mailbox_key(address):
    """What two spellings of one mailbox have in common: lower case, without a +tag (RFC 5233)."""
    local, _, domain = address.lower().rpartition("@")
    return f"{local.partition('+')[0]}@{domain}"


# -------------------------------------------------------------------------------------------------
# Store: any number of readers, one writer. A request hands its work over and waits; all that waits
# shares one transaction and one fsync, with a SAVEPOINT each. A message *is* stored when COMMIT
# returns.
#
# WAL with synchronous=FULL: SQLite's defaults lose acknowledged rows on a power cut. Of a process
# only the writer checkpoints: before 3.51.3 SQLite may corrupt a file that two do it to at once.

SCHEMA_VERSION, APPLICATION_ID = 1, 1768841828      # schema.sql's
MIGRATIONS = {}                 # user_version → the SQL that makes the next version of it
# These very classes: their heirs, IntegrityError and DataError, are the message's fault.
TROUBLE = (sqlite3.OperationalError, sqlite3.DatabaseError, sqlite3.InternalError)


class Store:
    """The database file at `path`; `clock` returns seconds UTC. Only who serves `checkpoints`."""

    def __init__(self, path, clock=time.time, checkpoints=True):
        self.path, self.now, self.checkpoints = path, lambda: int(clock()), checkpoints
        self.has_mail = threading.Event()       # wakes the courier
        self.refusals = deque(maxlen=1000)      # times of 401 answers
        # Kept for 10 s: read for each message, 60 rows, they cost a third of all its time.
        self.known = functools.lru_cache(1)(lambda moment: [
            self.rows(f"SELECT * FROM {table} ORDER BY id") for table in ("provider", "sign")])
        self._jobs, self._lock, self._writer = deque(), threading.Lock(), None
        self._local, self._readers, self._is_open = threading.local(), [], False

    def open(self, create=True):
        """Make the file if there is none, migrate an old one; return whether it was made.

        Refused when it is not ours, newer than this program, or missing and `create` is false.
        """
        try:
            if not Path(self.path).exists():
                if not create:
                    raise Refused(503, f"no database at {self.path!r}: `inbound serve` makes one")
                # Before SQLite does, so that its -wal and -shm get the same mode.
                os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))
            plain = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT, isolation_level=None)
            with contextlib.closing(plain):
                was_made = migrate(plain, self.path)
        except (OSError, sqlite3.Error) as error:
            if "already exists" not in str(error):      # another process has just made it, whole
                raise Refused(503, f"cannot open the database {self.path!r}: {error}")
            was_made = False
        self._is_open = True
        return was_made

    def rows(self, query, parameters=()):
        """All rows of a query, each a dict, read on this thread's own connection; Refused 503."""
        try:
            if getattr(self._local, "db", None) is None:
                self._is_open or self.open()
                self._local.db = connect(self.path)
                self._readers.append(self._local.db)
            return [dict(row) for row in self._local.db.execute(query, parameters)]
        except sqlite3.Error as error:
            raise Refused(503, f"the database cannot be read: {error}")

    def accounts(self):
        return self.rows("SELECT * FROM email_account ORDER BY is_default DESC, id")

    def write(self, work, *args):
        """Run `work(connection, now, *args)` in the next transaction; return its result, synced.

        What `work` raises is raised here and undone alone. Refused 503 if nothing could be stored.
        """
        future = concurrent.futures.Future()
        self._jobs.append((work, args, future))
        with self._lock:
            if not future.done():   # nobody before us took it along
                self._commit()
        try:
            return future.result()
        except sqlite3.Error as error:
            if type(error) in TROUBLE:
                raise Refused(503, f"the database cannot be written: {error}")
            raise

    def _commit(self):
        take, jobs, results = lambda: [self._jobs.popleft() for _ in range(len(self._jobs))], [], []
        try:
            self._is_open or self.open()
            self._writer = self._writer or connect(self.path, self.checkpoints)
            self._writer.execute("BEGIN IMMEDIATE")
            jobs = take()       # not before: who came while we waited for the lock shares its fate
            for work, args, future in jobs:
                results.append((future, *attempt(self._writer, work, self.now(), *args)))
            self._writer.execute("COMMIT")
        except Exception as error:
            results = [(future, None, error) for _, _, future in jobs or take()]
            # Never a second fsync on a descriptor whose first failed: the next write opens anew.
            self._writer = self._writer and self._writer.close()
        for future, result, error in results:
            future.set_exception(error) if error else future.set_result(result)

    def close(self):
        for db in filter(None, [*self._readers, self._writer]):
            db.close()


def connect(path, checkpoints=False):
    db = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    db.executescript(f"""PRAGMA synchronous=FULL; PRAGMA secure_delete=ON; PRAGMA foreign_keys=ON;
        PRAGMA trusted_schema=OFF; PRAGMA wal_autocheckpoint={1000 * checkpoints}""")
    return db


def attempt(db, work, *args):
    """Return (result, None) of `work(db, *args)`, or (None, what it raised) with all undone."""
    db.execute("SAVEPOINT attempt")
    try:
        result = work(db, *args)
        db.execute("RELEASE attempt")
        return result, None
    except Exception as error:
        if not db.in_transaction:       # a full disk ends the whole of it
            raise
        db.execute("ROLLBACK TO attempt")
        db.execute("RELEASE attempt")
        return None, error


def migrate(db, path):
    """Bring the file to SCHEMA_VERSION, a transaction each step; return whether it was empty."""
    version, ours, tables = (db.execute(query).fetchone()[0] for query in (
        "PRAGMA user_version", "PRAGMA application_id", "SELECT count(*) FROM sqlite_schema"))
    if tables and ours != APPLICATION_ID:
        raise Refused(503, f"{path!r} is the database of another program")
    if version > SCHEMA_VERSION:
        raise Refused(503, f"{path!r} has the newer schema version {version}: update inbound")
    if not tables:
        db.execute("PRAGMA journal_mode = WAL")
        schema = Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")
        db.executescript(f"BEGIN IMMEDIATE;\n{schema}")
        db.execute("UPDATE email_account SET inbound_secret = ?", [secrets.token_urlsafe(24)])
        db.execute("COMMIT")
    for step in range(version, SCHEMA_VERSION) if tables else ():
        db.executescript(f"BEGIN IMMEDIATE;\n{MIGRATIONS[step]};\n"
                         f"PRAGMA user_version = {step + 1};\nCOMMIT")
    return not tables


def file_all(db, now, post, addresses, mails):
    """Store each member of a post as `understand` returned it; what failed is kept, alone."""
    results = []
    for mail in mails:
        result, error = None, mail
        if not isinstance(mail, Exception):
            result, error = attempt(db, file_message, now, post.account, addresses, *mail)
        if type(error) in TROUBLE:
            raise error
        results.append(quarantine(db, now, post, error) if error else result)
    return results


def file_message(db, now, account, addresses, message, kind, why, why_not):
    """Thread, store and confirm one Message inside the transaction; return the answer's object.

    UNIQUE (email_account, message_id, digest) settles a repeat. It is asked for first, which the
    writer's lock makes safe, so that a repeat writes nothing and costs no fsync.
    """
    known = db.execute("""SELECT * FROM known_id WHERE email_account = ? AND message_id = ?
        AND (direction = 'out' OR digest = ?)""", [
            account["id"], message.message_id, message.digest]).fetchone()
    if known:
        kind, why = known["kind"] or kind, "stored before" if known["kind"] else "sent by us"
        return answer_of("duplicate", known, known["message"], kind, "not due", why)
    ticket, found = thread(db, account, message, kind)
    status, confirmation, draft = "appended", "not due", None
    due = "no confirmation: it opened no ticket"
    if ticket is None:
        ticket, status = open_ticket(db, now, account, message, kind), "created"
        draft, due = confirm(db, now, account, addresses, ticket, message, why_not)
        confirmation = "queued" if draft else "withheld"
    reason = f"{why}; {found}; {due}"
    row = insert_message(db, now, account, ticket, message, kind, reason, confirmation)
    if draft:
        send_later(db, now, account, ticket, draft, "confirmation")
    elif kind == "bounce":
        fail_bounced(db, account, message)
    return answer_of(status, ticket, row, kind, confirmation, reason)


def answer_of(status, ticket, row, kind, confirmation, reason):
    return {"status": status, "ticket": ticket["reference"], "message": row, "kind": kind,
            "confirmation": confirmation, "reason": reason}


def open_ticket(db, now, account, message, kind):
    """Insert a ticket and return it: automatic replies and bounces go to the queue `Automatic`."""
    queue = account["queue"]
    if kind in ("auto-reply", "bounce"):
        [[queue]] = db.execute("SELECT id FROM queue WHERE name = 'Automatic'")
    letters = "".join(secrets.choice("0123456789ABCDEFGHJKMNPQRSTVWXYZ") for _ in range(8))
    row = {"reference": f"T-{letters[:4]}-{letters[4:]}", "queue": queue, "created_at": now,
           "updated_at": now, "email_account": account["id"], "subject": message.subject,
           "requester": message.from_address, "requester_name": message.from_name}
    return row | {"id": insert(db, "ticket", **row)}


def insert_message(db, now, account, ticket, message, kind, reason, confirmation=None):
    """Insert a message and its attachments; return its id."""
    row = dict(zip(Message._fields[:-3], message))
    is_strange = mailbox_key(message.from_address) != mailbox_key(ticket["requester"])
    if is_strange and kind not in (None, "bounce", "auto-reply"):
        stranger = f"written by a stranger to this ticket: {message.from_address}"
        row["notes"] = [*message.notes, stranger]
    row |= {"ticket": ticket["id"], "email_account": account["id"], "received_at": now,
            "direction": "in" if kind else "out", "kind": kind, "reason": reason,
            "confirmation": confirmation, "in_reply_to": " ".join(message.in_reply_to) or None}
    identifier = insert(db, "message", **row)
    for attachment in message.attachments:
        insert(db, "attachment", message=identifier, **attachment)
    return identifier


def insert(db, table, **row):
    """Insert a row, lists in it as JSON; return its id."""
    names, marks = ", ".join(f'"{name}"' for name in row), ", ".join("?" * len(row))
    values = [json.dumps(value) if isinstance(value, list) else value for value in row.values()]
    return db.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", values).lastrowid


def fail_bounced(db, account, message):
    """Mark our mail that a bounce brings back failed, if its action (RFC 3464) or code says so."""
    report = "\n".join([*(decode(item["content"] or b"", "") for item in message.attachments
                          if item["content_type"] == "message/delivery-status"), message.text])
    code = re.search(r"\b5\.\d{1,3}\.\d{1,3}\b|\b55\d\b", report)     # RFC 3463, RFC 5321 4.2.3
    action = re.search(r"^action:\s*(\w+)", report, re.I | re.M)
    if action[1].lower() == "failed" if action else code:
        ids = [*returned_ids(message), *message.in_reply_to, *message.references]
        db.execute("""UPDATE outbox SET state = 'failed', last_error = ? WHERE state = 'sent' AND
            message IN (SELECT id FROM message WHERE email_account = ? AND message_id IN
                (SELECT value FROM json_each(?)))""", [
                    f"bounced: {code[0] if code else 'no code'}", account["id"], json.dumps(ids)])


def starred(account, text):
    """`text` with the secrets of the account starred out, however JSON or a URL spells them."""
    for secret in filter(None, (account["inbound_secret"], account["previous_secret"])):
        pattern = "".join(rf"(?:\\?{re.escape(char)}|%{ord(char):02x}|\\u00{ord(char):02x})"
                          for char in secret).replace(r"\\?\ ", "[ +]")
        text = re.sub(f"(?i){pattern}", lambda found: "*" * len(found[0]), text)
    return text


def safe(post):
    """The post as it may be kept: without the secret."""
    body = starred(post.account, post.body.decode("latin-1")).encode("latin-1")
    return post._replace(body=body, content_type=starred(post.account, clean(post.content_type)))


def keep(db, now, post, status, reason):
    """Keep a safe post that could not become a message; a trigger keeps the same body only once."""
    insert(db, "rejected", received_at=now, email_account=post.account["id"], status=status,
           reason=clean(reason), content_type=post.content_type, body=post.body,
           body_sha256=hashlib.sha256(post.body).hexdigest())


def quarantine(db, now, post, error):
    """Keep a post that raised something unexpected; return the answer's object."""
    # The last line of the traceback, shortened: enough to look for, too little to leak a mail.
    reason = ascii(starred(post.account, f"{type(error).__name__}: {error}"))[1:-1][:200]
    keep(db, now, safe(post), 200, reason)
    return answer_of("quarantined", {"reference": None}, None, None, None, f"kept: {reason}")


# -------------------------------------------------------------------------------------------------
# Confirm: whether, and the mail itself. It goes to an address that anyone can forge: none of the
# sender's words are in it, and there are caps, counted in the transaction that stores it.

LABEL = "(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
DELIVERABLE = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}"
                         rf"@(?:{LABEL}\.)+(?![0-9]){LABEL}")
OWN_ID = re.compile("<[!-;=?-~]{1,%d}>" % (MAX_OWN_ID - 2))     # printable ASCII but < and >
CAPS = [("per_address_hour", 3600, "mailbox"), ("per_address_day", 86400, "mailbox"),
        ("per_hour", 3600, "email_account")]
# RFC 3834 3.1.7: auto-replied. Precedence: vacation(1) and Dovecot look for it.
AUTOMATIC = {"Auto-Submitted": "auto-replied", "X-Auto-Response-Suppress": "All",
             "Precedence": "bulk"}


def confirm(db, now, account, addresses, ticket, message, why_not):
    """Return (draft, reason) of a new ticket's confirmation; no draft when a rule forbids it."""
    try:
        if why_not := why_not or reason_to_withhold(db, now, account, addresses, message):
            raise ValueError(why_not)
        return draft_mail(
            account, now, deliverable(message.from_address), AUTOMATIC,
            f"[{ticket['reference']}] We received your message",
            account["template"].replace("{reference}", ticket["reference"]),
            [*message.references, message.message_id]), "confirmation queued"
    except ValueError as error:
        return None, f"confirmation withheld: {error}"


def reason_to_withhold(db, now, account, addresses, message):
    """Why a person's new ticket is not confirmed, signs on the mail apart; '' when it may be."""
    recipient = deliverable(message.from_address)
    if mailbox_key(recipient or message.from_address) in map(mailbox_key, addresses):
        return "the mail comes from our own address"
    if message.from_count > 1 or recipient is None:
        return "From is not one address that we write to (RFC 3834 3.1.3)"
    for cap, seconds, column in CAPS:
        value = mailbox_key(recipient) if column == "mailbox" else account["id"]
        [sent] = db.execute(f"""SELECT count(*) FROM outbox WHERE {column} = ? AND created_at > ?
            AND purpose = 'confirmation'""", [value, now - seconds]).fetchone()
        if sent >= account[f"confirmations_{cap}"]:
            return f"the cap confirmations_{cap} is reached"
    return ""


def deliverable(address):
    """The address as it goes on the wire, ASCII; None for what we do not write to.

    We do not write to quoted local parts, address literals, non-ASCII local parts (they need
    SMTPUTF8) or encoded words (EmailMessage would decode them).
    """
    local, _, domain = address.rpartition("@")
    try:
        ascii_domain = domain.lower()[:254].encode("idna").decode()
        # The codec is IDNA 2003: what it maps to another name (ß to ss) may be somebody else's.
        if not domain.isascii() and ascii_domain.encode().decode("idna") != domain.lower():
            return None
    except UnicodeError:
        return None
    address = f"{local}@{domain if domain.isascii() else ascii_domain}"
    is_safe = len(address) <= 254 and "=?" not in local and DELIVERABLE.fullmatch(address)
    return address if is_safe else None


def draft_mail(account, now, recipient, extra, subject, text, ancestors):
    """Return (Message, bytes) of a text/plain mail; ValueError when it cannot be written safely.

    `ancestors` are the ids for References, the parent's last. EmailMessage decodes encoded-words in
    what it is given and writes the CR LF it finds there into the header block, so the result is
    parsed again before anybody trusts it.
    """
    known = [parent for parent in ancestors if OWN_ID.fullmatch(parent) and "=?" not in parent
             and not parent.endswith("@missing.invalid>")]
    parents = known[-1:] if known[-1:] == ancestors[-1:] else []
    known = known[:1] + known[1:][-9:]
    # `=?` is broken up: mail programs would decode what stands behind it.
    name, address = one_line(account["display_name"] or "").replace("=?", "= ?"), account["address"]
    headers = {
        "From": email.utils.formataddr((name, address)), "To": recipient, "Subject": subject,
        "Date": email.utils.formatdate(now),
        # 128 random bits; the message row, not the id, says which ticket.
        "Message-ID": f"<{secrets.token_hex(16)}@{address.rpartition('@')[2].lower()}>",
        "In-Reply-To": "".join(parents), "References": " ".join(known), **extra}
    headers = {name: value for name, value in headers.items() if value}
    mail = email.message.EmailMessage(Verbatim(linesep="\r\n"))
    for header, value in headers.items():
        mail[header] = value
    mail.set_content(text, cte="quoted-printable")
    content = mail.as_bytes()
    parsed = email.message_from_bytes(content)
    expected = {*headers, "Content-Type", "Content-Transfer-Encoding", "MIME-Version"}
    if (len(parsed) != len(expected) or {*parsed.keys()} != expected or not content.isascii()
            or any(parsed[header].split() != headers[header].split() for header in headers
                   if header in Verbatim.names)
            or re.search(rb"\0|[^\r]\n|\r[^\n]|[^\r\n]{999}", content)):
        raise ValueError("the mail cannot be written safely")
    return Message(
        headers["Message-ID"], "", parents, known, address, name,
        account["confirmation_envelope_from"] or "" if extra else address, [recipient], [], subject,
        text, None, [*map(list, headers.items())], [], [], 1, ""), content


class Verbatim(email.policy.EmailPolicy):
    """EmailMessage's policy, but these headers are neither parsed nor folded.

    The stock one makes of a long In-Reply-To an encoded-word that threads nowhere, and of a long
    quoted name with commas in From several mailboxes.
    """

    names = ("From", "To", "Message-ID", "In-Reply-To", "References")

    def header_store_parse(self, name, value):
        return (name, value) if name in self.names else super().header_store_parse(name, value)

    def fold_binary(self, name, value):
        if name not in self.names:
            return super().fold_binary(name, value)
        return f"{name}: {value}\r\n".replace("> <", ">\r\n <").encode("ascii")


def send_later(db, now, account, ticket, draft, purpose):
    """Store a drafted mail as message and outbox row; its bytes never change from here on."""
    message, content = draft
    row = insert_message(db, now, account, ticket, message, None, f"our {purpose}")
    insert(db, "outbox", message=row, email_account=account["id"], purpose=purpose,
           recipient=message.to[0], mailbox=mailbox_key(message.to[0]), content=content,
           created_at=now, next_attempt_at=now, give_up_at=now + GIVE_UP)


# -------------------------------------------------------------------------------------------------
# Outbox: claim, deliver, settle. The states stand in schema.sql. A mail is sent when the relay said
# 250 and that is committed: a crash between the two repeats it, with the same Message-ID, and never
# loses it.

def claim(db, now, account):
    """Lease the account's next due row for LEASE seconds and return it; None if nothing is due."""
    db.execute("""UPDATE outbox SET state = 'queued'
        WHERE state = 'sending' AND next_attempt_at NOT BETWEEN ? AND ?""", [now + 1, now + LEASE])
    db.execute("""UPDATE outbox SET state = 'failed', next_attempt_at = NULL, last_error =
        'not delivered in 24 h; ' || iif(last_error = '', 'no smtp_host was set', last_error)
        WHERE state = 'queued' AND give_up_at <= ?""", [now])
    # What is due far later than we ever wait is due now: the clock was set back.
    return account["smtp_host"] and db.execute("""UPDATE outbox
        SET state = 'sending', attempts = attempts + 1, next_attempt_at = ?
        WHERE id = (SELECT id FROM outbox WHERE state = 'queued' AND email_account = ?
                    AND next_attempt_at NOT BETWEEN ? AND ? ORDER BY next_attempt_at, id LIMIT 1)
        RETURNING *""", [now + LEASE, account["id"], now + 1, now + 2 * MAX_WAIT]).fetchone()


def settle(db, now, row, state, error):
    """Record what became of a claimed row, unless its lease ran out and somebody else has it."""
    wait = min(MAX_WAIT, FIRST_WAIT * 2 ** min(row["attempts"] - 1, 10))
    due = now + wait * (75 + secrets.randbelow(51)) // 100 if state == "queued" else None
    db.execute("""UPDATE outbox SET state = ?, next_attempt_at = ?, last_error = ? WHERE id = ?
        AND state = 'sending' AND attempts = ?""", [state, due, error, row["id"], row["attempts"]])


def send_due(store):
    """Deliver all that is due, a session for each account; return a Counter of the outcomes."""
    outcomes = Counter()
    for account in store.accounts():
        with contextlib.closing(Relay(account)) as relay:
            while row := store.write(claim, account):       # nothing to claim: nothing is written
                state, error = relay.deliver(row)
                for _ in range(5):      # the mail has left: only a database locked for long forgets
                    with contextlib.suppress(Refused):
                        store.write(settle, row, state, error)
                        break
                outcomes[state] += 1
                log.info("outbox %d %s: %s", row["id"], state, ascii(error)[1:-1])
                if not relay.is_ready:  # one try at a look, not one a row
                    break
    return outcomes


class Relay:
    """An SMTP session with an account's relay, opened with the first mail and kept for a burst."""

    def __init__(self, account):
        self.account, self.smtp, self.is_ready = account, None, False

    def deliver(self, row):
        """Return (state, error): sent, failed (5xx for this mail), queued (all that may pass)."""
        # smtplib has no total deadline: a server that drips bytes would hold us for ever.
        watchdog = threading.Timer(DELIVERY, self.abort)
        watchdog.daemon = True
        watchdog.start()
        column = {"confirmation": "confirmation_envelope_from", "reply": "address"}[row["purpose"]]
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
            code, words = getattr(error, "smtp_code", 0), f"{type(error).__name__}: {error}"
            words = getattr(error, "smtp_error", words)
        finally:
            watchdog.cancel()
        words = decode(words, "") if isinstance(words, bytes) else words
        words = one_line(f"{code or ''} {words}")[:300]
        # RFC 5321 4.2.1: 5yz is permanent, 4yz may pass; 3.8: after a 421 the session is over.
        if self.is_ready and code not in (0, 421):
            return "failed" if code >= 500 else "queued", words
        # A wrong password is not this mail's fault: it waits for the admin, as for the network.
        self.close()
        return "queued", f"cannot use the relay {self.account['smtp_host']}: {words}"

    def connect(self):
        """Open the session that the account's settings ask for. Certificates are verified."""
        host, port, security, username, password, address = (self.account[name] for name in (
            "smtp_host", "smtp_port", "smtp_security", "smtp_username", "smtp_password", "address"))
        kind, more = smtplib.SMTP, {}
        if security == "tls":
            kind, more = smtplib.SMTP_SSL, {"context": ssl.create_default_context()}
        # Made before its constructor connects, so that the watchdog finds the socket in it. The
        # name is for EHLO: smtplib would ask DNS for one, which may take longer than the delivery.
        self.smtp = kind.__new__(kind)
        self.smtp.__init__(host, port or {"none": 25, "starttls": 587, "tls": 465}[security],
                           local_hostname=address.rpartition("@")[2], timeout=DELIVERY, **more)
        self.smtp.ehlo_or_helo_if_needed()
        if security == "starttls":
            self.smtp.starttls(context=ssl.create_default_context())
        if username is not None:        # the schema has it that security is not 'none' here
            self.smtp.login(username, password or "")

    def abort(self):
        with contextlib.suppress(OSError, AttributeError):
            self.smtp.sock.shutdown(2)

    def close(self):
        """Say QUIT, whatever comes back: every mail is settled by now."""
        for last_words in ("quit", "close"):
            with contextlib.suppress(OSError, smtplib.SMTPException, AttributeError):
                self.smtp.sock.settimeout(2)
                getattr(self.smtp, last_words)()
        self.smtp, self.is_ready = None, False


def run_courier(store, stopping):
    """Send what is due until `stopping` is set: woken by a commit, and every LOOK seconds."""
    while not stopping.is_set():
        store.has_mail.clear()
        try:
            send_due(store)
        except Exception:
            log.exception("the courier goes on after this")
        store.has_mail.wait(LOOK)


# -------------------------------------------------------------------------------------------------
# Command line: what a single statement does is a row of schema.sql's table `command`. Here is the
# rest, a function each, in the order of --help; each takes the parsed arguments and the store.

def serve(args, store):
    import waitress     # the only verb that needs it

    logging.Formatter.converter = time.gmtime
    logging.basicConfig(format="%(asctime)sZ %(message)s", datefmt="%FT%T", level="INFO")
    logging.getLogger("waitress.queue").setLevel("ERROR")   # a line for each request that waits
    try:
        server = waitress.create_server(
            make_app(store), listen=args.listen, channel_timeout=30, max_request_header_size=16384,
            asyncore_use_poll=True, max_request_body_size=MAX_BODY + 1)
    except (OSError, ValueError) as error:
        raise Refused(503, f"cannot listen on {args.listen!r}: {error}")
    for number in (signal.SIGTERM, signal.SIGINT):      # SystemExit lets what is in flight finish
        signal.signal(number, lambda *_: sys.exit(0))
    port = getattr(server, "effective_port", None) or server.effective_listen[0][1]
    url = f"http://{args.listen.rpartition(':')[0]}:{port}{ENDPOINT}"
    text = GREETING if store.open() else "listening: {url} (`inbound secret` prints the secret)"
    print(text.format(url=url, id=secrets.token_hex(8),
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


GREETING = """A new database. Whoever posts mail has to know this secret:\n\n  {secret}\n
Paste this into your provider's inbound webhook, with your own https host name in it:\n
  {url}?secret={secret}\n\nTry it:\n
  curl -H 'X-Mobieus-Inbound-Secret: {secret}' -H 'Content-Type: application/json' {url} \\
    -d '{{"from": "ada@example.org", "text": "It works.", "message_id": "<{id}@example.org>"}}'
"""


def set_account(args, store):
    words = dict(word.partition("=")[::2] for word in args.words[2:] if "=" in word)
    settable = [column["name"] for column in store.rows("PRAGMA table_info(account)")][1:]
    if len(words) < len(args.words) - 2 or not words.keys() <= {*settable}:
        raise Refused(2, f"account set KEY=VALUE: expected a KEY of {', '.join(settable)}")
    values = ", ".join(f"{name} = ?" for name in words)
    known = [*(value or None for value in words.values()), args.account["id"]]
    store.write(lambda db, now: db.execute(f"UPDATE account SET {values} WHERE id = ?", known))
    out(args, store.rows("SELECT * FROM account WHERE id = ?", known[-1:]))


def show(args, store):
    ticket = chosen_ticket(args, store)
    messages = store.rows("SELECT * FROM conversation WHERE ticket = ?", [ticket["id"]])
    for message in messages:
        for name in ("references", "to", "cc", "headers", "notes"):
            message[name] = json.loads(message[name])
        message["attachments"] = store.rows("""SELECT filename, content_type, content_id, size,
            sha256, note FROM attachment WHERE message = ? ORDER BY id""", [message.pop("id")])
        del message["ticket"]
    names = ("reference", "queue", "status", "subject", "requester")
    shown = {name: ticket[name] for name in names} | {"messages": messages}
    texts = store.rows("SELECT words FROM transcript WHERE ticket = ?", [ticket["id"]])
    out(args, [shown], "\n".join(["{reference} ({status}, {queue}): {subject} <{requester}>".format(
        **shown), *(row["words"] for row in texts)]))


def reply(args, store):
    ticket, text = chosen_ticket(args, store), clean(decode(sys.stdin.buffer.read(), ""))
    if not text.strip():
        raise Refused(400, "the reply is empty: expected its text on standard input")
    if not (recipient := deliverable(ticket["requester"])):
        raise Refused(400, f"{ticket['requester']!r} is not an address that we can write to")
    # `=?` is broken up: EmailMessage would decode the sender's words into our header.
    subject = re.sub(r"^(?:re:\s*)+", "", ticket["subject"], flags=re.I).replace("=?", "= ?")[:200]

    def work(db, now):
        [row] = db.execute("SELECT * FROM email_account WHERE id = ?", [ticket["email_account"]])
        parent = db.execute("""SELECT * FROM message WHERE ticket = ? AND direction = 'in'
            ORDER BY id DESC LIMIT 1""", [ticket["id"]]).fetchone()
        draft = draft_mail(row, now, recipient, {}, f"[{ticket['reference']}] Re: {subject}", text,
                           [*json.loads(parent["references"]), parent["message_id"]])
        send_later(db, now, row, ticket, draft, "reply")
        return draft[0].message_id

    message_id = store.write(work)
    out(args, [{"reference": ticket["reference"], "to": recipient, "message_id": message_id}])


def relay(args, store):
    """Post the mail on standard input; exit as sysexits.h says, for Postfix, Exim and OpenSMTPD."""
    mail_from = os.environ.get("SENDER") if args.sender is None else args.sender
    line = "" if mail_from is None else f"Return-Path: <{mail_from.strip('<>')}>\r\n"
    mail = os.fsencode(line) + re.sub(MBOX, b"", sys.stdin.buffer.read())
    try:
        url = urllib.parse.urlsplit(args.known["url"])
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        secret = os.environ.get("INBOUND_SECRET") or Path(args.secret_file).read_text()
        secret = secret.strip().partition("\n")[0].strip()
        with contextlib.closing(kind(url.netloc, timeout=60)) as connection:    # no redirects
            target = urllib.parse.urlunsplit(("", "", *url[2:4], ""))
            connection.request("POST", target, mail, {
                "Content-Type": "message/rfc822", "X-Mobieus-Inbound-Secret": secret})
            response = connection.getresponse()
            words = decode(response.read(), "")
        code = {200: 0, 401: 77, 400: 65, 413: 65, 415: 65, 422: 65}.get(response.status, 75)
        if not at(loaded(words), "status" if code == 0 else "error") and response.status != 413:
            code = 75       # somebody else's page
    except (OSError, ValueError, http.client.HTTPException) as error:
        code, words = 75, f"{type(error).__name__}: {error}"
    print(words.strip(), file=sys.stderr if code else sys.stdout)
    raise SystemExit(code)


def replay_all(args, store):
    """Post kept bodies again, from inside; drop a row once all of it is stored."""
    rows = store.rows("SELECT * FROM rejected WHERE id = ifnull(?, id)", [args.known.get("id")])
    if not rows and "id" in args.known:
        raise Refused(404, f"rejected has no row {args.known['id']}")
    results, owners = [], {account["id"]: account for account in store.accounts()}
    for row in rows:
        try:
            account = owners.get(row["email_account"], args.account)
            _, answer = receive(store, Post(account, row["content_type"], row["body"]))
        except Refused as refusal:
            answer = {"status": "refused", "reason": refusal.reason}
        results.append({"id": row["id"], **answer})
        outcomes = {item["status"] for item in answer.get("messages", [answer])}
        if outcomes <= {"created", "appended", "duplicate"}:
            store.write(lambda db, _: db.execute("DELETE FROM rejected WHERE id = ?", [row["id"]]))
    out(args, results, is_list=True)


def chosen_ticket(args, store):
    rows = store.rows("""SELECT tickets.*, ticket.id, email_account FROM tickets JOIN ticket
        USING (reference) WHERE reference = ?""", [args.known["ref"].upper()])
    if not rows:
        raise Refused(404, f"there is no ticket {args.known['ref']!r}: see inbound tickets")
    return rows[0]


def seconds_of(text):
    if not (found := re.fullmatch("([0-9]{1,6})([smhd])", text)):
        raise Refused(2, f"{text!r} is no time; expected a number and s, m, h or d, like 24h")
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def out(args, rows, text=None, is_list=False):
    """Print rows as JSON with --json, else `text` or their fields; nothing drives the terminal.

    A single row is an object in JSON and a line a field in text, unless `is_list`.
    """
    def shown(name, content):
        if name.endswith("_at") and content:
            return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(content))
        return "" if content is None else str(content)

    if args.json:
        text = json.dumps(rows if is_list else rows[0], ensure_ascii=False, indent=1)
    elif is_list:
        text = "\n".join("  ".join(shown(*item) for item in row.items()) for row in rows)
    elif text is None:
        text = "\n".join(f"{name}={shown(name, value)}" for name, value in rows[0].items())
    text = re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f]", "?", text.replace("\r\n", "\n").rstrip("\n"))
    print(text)


def run_statement(args, store, statement):
    """Run the statement of a row of `command` and print the rows that it returns."""
    known = args.known | {"account": args.account["id"], "token": secrets.token_urlsafe(24),
                          "now": store.now(), "until": store.now() + seconds_of(args.keep)}
    if statement.startswith("SELECT"):
        rows = store.rows(statement, known)
    else:
        rows = store.write(lambda db, now: [*map(dict, db.execute(statement, known))])
    is_list = args.words[-1] in ("tickets", "outbox", "rejected", "list")
    if not rows and not is_list:
        raise Refused(404, f"{' '.join(args.words)}: there is no such row, or it was sent")
    for row in rows:
        row |= {name: decode(value, "") for name, value in row.items() if isinstance(value, bytes)}
    text = "inbound_secret" if args.words[0] == "secret" else "content"
    out(args, rows, None if is_list else rows[0].get(text), is_list)


# What is not a single statement; those are in schema.sql's table `command`.
FUNCTIONS = {
    "serve": serve, "account set KEY=VALUE": set_account, "show REF": show, "reply REF": reply,
    "relay URL": relay, "rejected replay [ID]": replay_all,
    "outbox send": lambda args, store: out(args, [dict(send_due(store))])}


def command_of(commands, words):
    """Return (function or statement, {name: word}) of a command line's words; None if unknown."""
    for usage, command in commands.items():
        names, least = re.sub(r"[\[\]]", "", usage).split(), len(usage.partition("[")[0].split())
        most = len(words) if command is set_account else len(names)
        pairs = [*zip(names, words)]
        if least <= len(words) <= most and all(a.isupper() or a == word for a, word in pairs):
            return command, {name.lower(): word for name, word in pairs if name.isupper()}
    return None, {}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Refused(2, f"{message.partition(':')[0]}: see inbound --help")   # no values


def main(argv=None, clock=time.time):
    """Run one verb; return the exit code: 0, 1 for an error, 2 for wrong usage, one line each."""
    argv = sys.argv[1:] if argv is None else argv
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")
    if not argv or {"-h", "--help"} & {*argv}:
        print(__doc__.strip())
        return 0 if argv else 2
    parser = Parser(prog="inbound", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    for name, default in (("--db", os.environ.get("INBOUND_DB") or "inbound.db"), ("--account", ""),
                          ("--listen", "127.0.0.1:8080"), ("--keep", "24h"), ("--sender", None),
                          ("--secret-file", "inbound.secret")):
        parser.add_argument(name, default=default)
    parser.add_argument("--json", action="store_true")
    try:
        args = parser.parse_intermixed_args(argv)
        command, args.known = command_of(FUNCTIONS, args.words)
        with contextlib.closing(Store(args.db, clock, checkpoints=command is serve)) as store:
            # `serve` listens before it opens: a taken port shall not use up the greeting.
            if command not in (serve, relay):
                store.open(create=args.words[:1] in (["secret"], ["account"]))
                accounts = {row["address"].lower(): row for row in reversed(store.accounts())}
                args.account = accounts.get(args.account.lower() or [*accounts][-1])
                if args.account is None:
                    raise Refused(404, "there is no such account")
            if command:
                command(args, store)
                return 0
            rows = {row["usage"]: row["statement"] for row in store.rows("SELECT * FROM command")}
            statement, args.known = command_of(rows, args.words)
            if not statement:
                raise Refused(2, f"no such use of {args.words[:1]}: see inbound --help")
            run_statement(args, store, statement)
        return 0
    except (Refused, sqlite3.IntegrityError) as error:      # the latter: a CHECK or UNIQUE of ours
        print(f"inbound: {error}", file=sys.stderr)
        return 2 if getattr(error, "status", 1) == 2 else 1
    except BrokenPipeError:                     # `inbound tickets | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
