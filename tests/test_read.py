"""What is read from every shape that PROVIDERS.md lists: one logical mail, one record.

The bodies are in webhooks/PROVIDER/ as the providers send them; the few that carry binary parts
are built here. What a provider changes from try to try is written with the marks in TRY, so that
`again` can make the second try of any of them.
"""

import base64
import copy
import hashlib
import json
import re
import sqlite3
from pathlib import Path
from typing import NamedTuple
from unittest.mock import ANY
from urllib.parse import parse_qs, urlencode

import pytest

from conftest import SECRET, URL

WEBHOOKS = Path(__file__).parent / "webhooks"
JSON, FORM = "application/json", "application/x-www-form-urlencoded"
MIME, SNS = "message/rfc822", "text/plain; charset=UTF-8"
BOUNDARY = "----provider-boundary"
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"

# The logical mail ---------------------------------------------------------------------------------

PDF = b"%PDF-1.4\r\n\x00\xff\xfe\x80 Rechnung 17\r\n--\r\n%%EOF\r\n"
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01"
TEXT = ("Guten Tag,\n\ndie Größe stimmt nicht: 50 € für den Drucker?\n\n"
        "Viele Grüße\nZoë\n\n> Was kostet er?\n")
HTML = ('<p>Guten Tag,</p><p>die Größe stimmt nicht: 50 € für den Drucker?</p>'
        '<p><img src="cid:logo@customer.example" alt=""></p>')
FROM = '"Zoë Müller, Sales" <zoe@customer.example>'
SUBJECT = "Größe: 50 € für den Drucker"
MESSAGE_ID = "<CAF+real-id@customer.example>"
PARENTS = ["<parent-1@customer.example>", "<parent-2@customer.example>"]
ENVELOPE_FROM, ADDRESS = "zoe+bounce@customer.example", "support@helpdesk.example"

TRY = [(b"1790000001", b"1790000399"), (b"14:13:21", b"14:49:53"),
       (b"14%3A13%3A21", b"14%3A49%3A53"), (b"f1f1f1f1", b"a2a2a2a2")]


def digest(content):
    return hashlib.sha256(content).hexdigest()


def attachment(filename, content_type, content_id, content):
    return {"filename": filename, "content_type": content_type, "content_id": content_id,
            "size": len(content), "sha256": digest(content), "noted": False}


INVOICE = attachment("rechnung.pdf", "application/pdf", "", PDF)
LOGO = attachment("logo.png", "image/png", "logo@customer.example", PNG)
NOT_KEPT = {"sha256": None, "size": ANY, "noted": True}
NO_ID = {"content_id": ""}
NO_FILES = {"pdf": None, "png": None}


def expected(envelope_from=ENVELOPE_FROM, references=PARENTS, seen=("one", "two"), pdf={}, png={}):
    """The record of every shape, but for what its provider does not tell; None = no such file."""
    return {
        "message_id": MESSAGE_ID, "in_reply_to": PARENTS[1], "references": list(references),
        "from": "zoe@customer.example", "from_name": "Zoë Müller, Sales",
        "envelope_from": envelope_from, "subject": SUBJECT, "text": TEXT.strip(),
        "seen": list(seen),
        "attachments": [file | change for file, change in ((LOGO, png), (INVOICE, pdf))
                        if change is not None]}


# Bodies -------------------------------------------------------------------------------------------

def read(path):
    return (WEBHOOKS / path).read_bytes()


def changed(path, change):
    """The JSON below webhooks/ after `change` has been at it."""
    body = json.loads(read(path))
    change(body)
    return body


def mandrill_events(path):
    return json.loads(parse_qs(read(path).decode())["mandrill_events"][0])


def again(body):
    """The same post as the provider's second try: other times, tokens, signatures, own ids."""
    for first, second in TRY:
        body = body.replace(first, second)
    return body


def multipart(*parts):
    """multipart/form-data of (name, value) and (name, bytes, filename, content type)."""
    out = b""
    for name, value, *file in parts:
        out += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"'.encode()
        if file:
            out += f'; filename="{file[0]}"\r\nContent-Type: {file[1]}'.encode()
        out += b"\r\n\r\n" + (value.encode() if isinstance(value, str) else value) + b"\r\n"
    return out + f"--{BOUNDARY}--\r\n".encode()


def whole_mail():
    """The mail as a provider passes it on: without a Return-Path."""
    return json.loads(read("forwardemail/message.json"))["raw"]


def cloudmailin_deprecated():
    """The format that CloudMailin calls `original`: the whole mail, and what it took out of it."""
    return multipart(
        ("plain", TEXT), ("html", HTML), ("reply_plain", "Guten Tag"), ("disposable", ""),
        ("to", ADDRESS), ("recipients", json.dumps([ADDRESS])), ("from", ENVELOPE_FROM),
        ("x_to_header", ADDRESS), ("x_from_header", '["zoe@customer.example"]'),
        ("subject", SUBJECT), ("message", whole_mail()), ("signature", "f1f1f1f1"),
        ("spf[result]", "pass"), ("spf[domain]", "customer.example"))


def cloudmailin_multipart():
    received = "by mx.provider.example id f1f1f1f1; Mon, 21 Sep 2026 14:13:21 +0000"
    return multipart(
        ("envelope[to]", ADDRESS), ("envelope[recipients][0]", ADDRESS),
        ("envelope[from]", ENVELOPE_FROM), ("envelope[helo_domain]", "mx.customer.example"),
        ("envelope[remote_ip]", "192.0.2.7"), ("envelope[spf][result]", "pass"),
        ("headers[return_path]", ENVELOPE_FROM),
        ("headers[received][0]", received), ("headers[received][1]", "by relay.customer.example"),
        ("headers[x_seen][0]", "one"), ("headers[x_seen][1]", "two"), ("headers[from]", FROM),
        ("headers[to]", ADDRESS), ("headers[subject]", SUBJECT),
        ("headers[message_id]", MESSAGE_ID),
        ("headers[in_reply_to]", PARENTS[1]), ("headers[references]", " ".join(PARENTS)),
        ("plain", TEXT), ("html", HTML), ("reply_plain", "Guten Tag"),
        ("attachments[]", PDF, "rechnung.pdf", "application/pdf"),
        ("attachments[]", PNG, "logo.png", "image/png"))


def mailgun_multipart(*more):
    """The fields of parsed.form, as Mailgun sends them when the mail has attachments."""
    fields = parse_qs(read("mailgun/parsed.form").decode(), keep_blank_values=True)
    return multipart(
        *((name, value) for name, values in fields.items() for value in values),
        ("attachment-count", "2"),
        ("content-id-map", '{"<logo@customer.example>": "attachment-2"}'),
        ("attachment-1", PDF, "rechnung.pdf", "application/pdf"),
        ("attachment-2", PNG, "logo.png", "image/png"), *more)


def sendgrid(*more, subject=(SUBJECT, "iso-8859-15"), text=(TEXT, "windows-1252"), charsets={}):
    """SendGrid's parsed post, each field in a charset of its own; `charsets` = what it claims."""
    named = {"to": "UTF-8", "html": "utf-8", "from": "UTF-8",
             "subject": subject[1], "text": text[1]}
    named = {name: charset for name, charset in (named | charsets).items() if charset}
    info = {
        "attachment1": {"filename": "rechnung.pdf", "name": "rechnung.pdf",
                        "type": "application/pdf"},
        "attachment2": {"filename": "logo.png", "name": "logo.png", "type": "image/png",
                        "content-id": "logo@customer.example"}}
    return multipart(
        ("headers", read("sendgrid/headers.txt")), ("dkim", "{@customer.example : pass}"),
        ("to", ADDRESS), ("html", HTML), ("from", FROM), ("text", text[0].encode(text[1])),
        ("sender_ip", "192.0.2.7"), ("spam_report", "Spam detection software"),
        ("subject", subject[0].encode(subject[1])), ("spam_score", "0.1"),
        ("envelope", json.dumps({"to": [ADDRESS], "from": ENVELOPE_FROM})), ("SPF", "pass"),
        ("attachments", "2"), ("attachment-info", json.dumps(info)),
        ("content-ids", '{"logo@customer.example": "attachment2"}'),
        ("charsets", json.dumps(named)),
        ("attachment1", PDF, "rechnung.pdf", "application/pdf"),
        ("attachment2", PNG, "logo.png", "image/png"), *more)


def customers_mail_cloud():
    headers = [{"name": "return-path", "value": ENVELOPE_FROM}] + json.loads(
        read("lettermint/message.json"))["data"]["headers"]
    return multipart(
        ("api_key", "f1f1f1f1"), ("server_composition", "helpdesk"), ("filter", "support"),
        ("headers", json.dumps(headers)), ("subject", SUBJECT), ("envelope-from", ENVELOPE_FROM),
        ("envelope-to", ADDRESS), ("text", TEXT), ("html", HTML), ("attachments", "2"),
        ("attachment1", PDF, "rechnung.pdf", "application/pdf"),
        ("attachment2", PNG, "logo.png", "image/png"))


def mailcast():
    return multipart(
        ("message_id", MESSAGE_ID), ("date", "2026-09-21T14:13:21Z"),
        ("return_path", ENVELOPE_FROM), ("delivered_to", ADDRESS), ("recipients[]", ADDRESS),
        ("to[]", ADDRESS), ("from", "zoe@customer.example"), ("from_name", "Zoë Müller, Sales"),
        ("subject", SUBJECT), ("text_part", TEXT), ("html_part", HTML),
        ("attachments[]", PDF, "rechnung.pdf", "application/pdf"),
        ("attachments[]", PNG, "logo.png", "image/png"), ("email", whole_mail()))


def agentmail_of_an_sdk():
    """What Python SDKs make of it: `from` is a keyword there."""
    def rename(body):
        body["message"]["from_"] = body["message"].pop("from")

    return json.dumps(changed("agentmail/message.json", rename)).encode()


class Shape(NamedTuple):
    """One way to post the mail: path below webhooks/ or builder; `differs` is for `expected`."""

    body: object
    content_type: str
    differs: dict = {}
    members: int = 1

    def read(self):
        return self.body() if callable(self.body) else read(self.body)

    @property
    def is_batch(self):
        return str(self.body).startswith(("mandrill/", "sparkpost/", "brevo/"))


UNTOLD = {"envelope_from": None}
BREVO = UNTOLD | {"pdf": NOT_KEPT, "png": NOT_KEPT}
MANDRILL = UNTOLD | {"png": {"content_id": ANY}}
POSTAL = {"seen": (), "png": NO_ID}
BY_URL = {"pdf": NOT_KEPT, "png": NOT_KEPT}
SHAPES = {
    "raw mail": Shape("raw/mail.eml", MIME),
    "raw mail under another content type": Shape("raw/mail.eml", "text/plain"),
    "socketlabs": Shape("socketlabs/message.json", JSON),
    "postmark": Shape("postmark/message.json", JSON),
    "postmark with RawEmail, a later Return-Path": Shape("postmark/with-raw.json", JSON, UNTOLD),
    "cloudmailin normalised": Shape("cloudmailin/normalised.json", JSON),
    "cloudmailin original": Shape("cloudmailin/original.json", JSON),
    "cloudmailin stored": Shape("cloudmailin/stored.json", JSON,
                                {"pdf": NOT_KEPT, "png": NOT_KEPT}),
    "cloudmailin multipart": Shape(cloudmailin_multipart, MULTIPART, {"png": NO_ID}),
    "cloudmailin deprecated": Shape(cloudmailin_deprecated, MULTIPART),
    "cloudmailin raw": Shape("cloudmailin/raw.multipart", MULTIPART),
    "mailgun parsed": Shape("mailgun/parsed.form", FORM, NO_FILES),
    "mailgun multipart": Shape(mailgun_multipart, MULTIPART),
    "mailgun body-mime": Shape("mailgun/mime.form", FORM),
    "mailgun stored": Shape("mailgun/stored.form", FORM,
                            {"pdf": NOT_KEPT, "png": NOT_KEPT | {"content_id": ANY}}),
    "sendgrid": Shape(sendgrid, MULTIPART),
    "sendgrid raw": Shape("sendgrid/raw.multipart", MULTIPART),
    "mandrill": Shape("mandrill/one.form", FORM, MANDRILL),
    "mandrill with raw_msg": Shape("mandrill/raw-msg.form", FORM, MANDRILL),
    "mandrill several": Shape("mandrill/several.form", FORM, MANDRILL, 2),
    "sparkpost": Shape("sparkpost/one.json", JSON),
    "sparkpost base64": Shape("sparkpost/base64.json", JSON),
    "sparkpost two": Shape("sparkpost/two.json", JSON, {}, 2),
    "brevo": Shape("brevo/one.json", JSON, BREVO),
    "brevo several": Shape("brevo/several.json", JSON, BREVO, 2),
    "mailjet": Shape("mailjet/message.json", JSON),
    "ses base64": Shape("ses/base64.json", SNS),
    "ses utf8": Shape("ses/utf8.json", SNS),
    "ses raw delivery": Shape("ses/delivered-raw.json", SNS),
    "mailersend": Shape("mailersend/message.json", JSON),
    "postal": Shape("postal/hash.json", JSON, POSTAL),
    "postal form": Shape("postal/hash.form", FORM, POSTAL),
    "postal raw": Shape("postal/raw.json", JSON),
    "postal raw form": Shape("postal/raw.form", FORM),
    "forward email": Shape("forwardemail/message.json", JSON),
    "forward email, one reference": Shape("forwardemail/single-reference.json", JSON,
                                          {"references": PARENTS[1:]}),
    "improvmx": Shape("improvmx/message.json", JSON, {"png": NO_ID}),
    "ahasend": Shape("ahasend/message.json", JSON, UNTOLD),
    "lettermint": Shape("lettermint/message.json", JSON, UNTOLD),
    "mailpace": Shape("mailpace/message.json", JSON, UNTOLD),
    "mox": Shape("mox/message.json", JSON, BY_URL | {"seen": ()}),
    "maileroo": Shape("maileroo/message.json", JSON, BY_URL),
    "inbound.new": Shape("inbound-new/message.json", JSON,
                         UNTOLD | BY_URL | {"png": NOT_KEPT | NO_ID}),
    "agentmail": Shape("agentmail/message.json", JSON, UNTOLD | BY_URL | {"seen": ("two",)}),
    "agentmail of an SDK": Shape(agentmail_of_an_sdk, JSON,
                                 UNTOLD | BY_URL | {"seen": ("two",)}),
    "mailparser": Shape("mailparser/message.json", JSON, UNTOLD),
    "postal-mime": Shape("postal-mime/message.json", JSON, UNTOLD),
    "customers mail cloud": Shape(customers_mail_cloud, MULTIPART, {"png": NO_ID}),
    "mailcast.io": Shape(mailcast, MULTIPART),
    "canonical": Shape("canonical/mail.json", JSON),
    "canonical, header pairs": Shape("canonical/header-pairs.json", JSON, UNTOLD),
    "canonical, header objects": Shape("canonical/header-objects.json", JSON),
    "canonical, ids as strings": Shape("canonical/strings.json", JSON, UNTOLD),
}


def shapes(*names):
    """Parametrize with the named shapes; with none, all of them."""
    return pytest.mark.parametrize(
        "shape", [pytest.param(SHAPES[name], id=name) for name in names or SHAPES])


# Deliver and look ---------------------------------------------------------------------------------

def send(desk, body, content_type=JSON):
    # WebTest encodes a multipart body anew unless the content type comes as a header.
    headers = {"X-Mobieus-Inbound-Secret": SECRET, "Content-Type": content_type}
    return desk.request(body, headers=headers, content_type=None)


def deliver(desk, body, content_type=JSON):
    """Post it; return the answers, one for each message in it."""
    response = send(desk, body, content_type)
    assert response.status_int == 200, response.text
    answer = response.json
    return answer["messages"] if answer["status"] == "batch" else [answer]


def received(desk, reference):
    """The first message of the ticket that came in."""
    messages = desk.show(reference)["messages"]
    return next(message for message in messages if message["direction"] == "in")


def message(desk, body, content_type=JSON):
    """Post it, assert that its first message opened a ticket, return it as `show` prints it."""
    answer = deliver(desk, body, content_type)[0]
    assert answer["status"] == "created", answer
    return received(desk, answer["ticket"])


def record(shown):
    """What `expected` has, of a message as `show` prints it."""
    fields = ("message_id", "in_reply_to", "references", "from", "from_name", "envelope_from",
              "subject")
    return {name: shown[name] for name in fields} | {
        "text": shown["text"].replace("\r\n", "\n").strip(),
        "seen": values(shown, "X-Seen"),
        "attachments": [
            {"filename": file["filename"], "content_type": file["content_type"],
             "content_id": file["content_id"] or "", "size": file["size"], "sha256": file["sha256"],
             "noted": bool(file["note"])}
            for file in sorted(shown["attachments"], key=lambda file: file["filename"])]}


def values(shown, name):
    return [value for found, value in shown["headers"] if found.lower() == name.lower()]


def kept(desk):
    """(status, body) of every rejected post."""
    return [(status, bytes(body)) for status, body in desk.sql("SELECT status, body FROM rejected")]


def refuse(desk, body, status, content_type=JSON):
    """Post it; assert the refusal, its sentence, that it is kept and that no ticket was made."""
    if isinstance(body, (dict, list)):
        body = json.dumps(body)
    body = body.encode() if isinstance(body, str) else body
    response = send(desk, body, content_type)
    assert response.status_int == status, response.text
    assert len(response.json["error"]) > 10
    assert kept(desk) == [(status, body)]
    assert desk.count("ticket") == 0
    return response.json


def ignore(desk, body, content_type=JSON):
    """Post it; assert that it is answered and makes no ticket."""
    response = send(desk, body, content_type)
    assert response.status_int == 200, response.text
    assert response.json["status"] == "ignored"
    assert len(response.json["reason"]) > 10
    assert desk.count("ticket") == 0


# Every shape --------------------------------------------------------------------------------------

@shapes()
def test_every_shape_makes_the_same_record(desk, shape):
    response = send(desk, shape.read(), shape.content_type)
    assert response.status_int == 200, response.text
    assert (response.json["status"] == "batch") == shape.is_batch
    answers = response.json["messages"] if shape.is_batch else [response.json]
    assert [answer["status"] for answer in answers] == ["created"] * shape.members
    shown = received(desk, answers[0]["ticket"])
    assert record(shown) == expected(**shape.differs)
    assert "Größe" in shown["html"] and "cid:logo@customer.example" in shown["html"]
    assert desk.count("rejected") == 0


@shapes()
def test_another_try_of_the_same_post_is_a_duplicate(desk, shape):
    first = deliver(desk, shape.read(), shape.content_type)
    second = deliver(desk, again(shape.read()), shape.content_type)
    assert [answer["status"] for answer in second] == ["duplicate"] * shape.members
    assert [answer["ticket"] for answer in second] == [answer["ticket"] for answer in first]
    assert desk.count("ticket") == desk.count("message WHERE direction = 'in'") == shape.members


@pytest.mark.parametrize("name", ["mandrill several", "sparkpost two", "brevo several"])
def test_the_second_mail_of_a_batch_is_a_ticket_of_its_own(desk, name):
    shape = SHAPES[name]
    first, second = deliver(desk, shape.read(), shape.content_type)
    assert first["ticket"] != second["ticket"]
    shown = received(desk, second["ticket"])
    assert (shown["message_id"], shown["subject"]) == ("<other-id@customer.example>", "Noch etwas")
    assert (shown["in_reply_to"] or "", shown["references"]) == ("", [])
    assert shown["from_name"] == "Zoë Müller, Sales"


def test_a_mandrill_attachment_that_is_text_is_kept_as_utf8(desk):
    second = deliver(desk, read("mandrill/several.form"), FORM)[1]
    [file] = received(desk, second["ticket"])["attachments"]
    assert (file["filename"], file["sha256"]) == ("notiz.txt", digest("Größe\n".encode()))


# What we do not need costs no mail ----------------------------------------------------------------

# Where a provider is known by its keys, or the mail itself is: all else may be absent, null or
# nonsense. A path ending in `*` stands for all below it too.
NEEDED = {
    "socketlabs/message.json": "InboundMailFrom Message",
    "postmark/message.json": "FromFull Headers",
    "postmark/with-raw.json": "FromFull Headers",
    "cloudmailin/normalised.json": "envelope headers",
    "cloudmailin/original.json": "envelope headers",
    "cloudmailin/stored.json": "envelope headers",
    "mandrill/one.form": "0 0.event 0.msg",
    "mandrill/raw-msg.form": "0 0.event 0.msg",
    "sparkpost/one.json": "0 0.msys 0.msys.relay_message 0.msys.relay_message.content",
    "brevo/one.json": "items items.0 items.0.Uuid items.0.Uuid.0",
    "mailjet/message.json": "Sender Recipient Headers",
    "ses/utf8.json": "Type TopicArn Message Message.notificationType Message.mail Message.receipt "
                     "Message.content",
    "mailersend/message.json": "type data",
    "postal/hash.json": "rcpt_to mail_from",
    "forwardemail/message.json": "headerLines session",
    "forwardemail/single-reference.json": "headerLines session",
    "improvmx/message.json": "return-path message-id",
    "ahasend/message.json": "type data",
    "lettermint/message.json": "event data",
    "mailpace/message.json": "raw headers*",
    "mox/message.json": "MessageID Meta Meta.MailFrom Meta.RcptTo",
    "maileroo/message.json": "envelope_sender recipients recipients.0 body",
    "inbound-new/message.json": "event email",
    "agentmail/message.json": "event_type message",
    "mailparser/message.json": "headerLines",
    "postal-mime/message.json": "headers from messageId",
}
ABSENT = "absent"
DAMAGES = [ABSENT, None, 17, True, "x", ["x", 17, None], {"a": 1}]
# Where the mail's text is, or what it is in: damaged, it is another text or none, but still a mail.
HOLDS_THE_TEXT = re.compile("(?i)raw|text|html|plain|body|content|email_rfc822|parsedData")


def opened(path):
    """The JSON of a post, with the JSON inside it opened; `closed` is the way back."""
    if path.endswith(".form"):
        return mandrill_events(path)
    body = json.loads(read(path))
    if isinstance(body, dict) and path.startswith("ses/"):
        body["Message"] = json.loads(body["Message"])
    return body


def closed(path, body):
    if path.endswith(".form"):
        return urlencode({"mandrill_events": json.dumps(body)}).encode()
    if isinstance(body, dict) and path.startswith("ses/"):
        body = body | {"Message": json.dumps(body["Message"])}
    return json.dumps(body, ensure_ascii=False).encode()


def places(value, way=()):
    """Every way to a part of a JSON value; of a list, to its last member alone.

    The first is what some providers are known by.
    """
    keys = []
    if isinstance(value, dict):
        keys = list(value)
    if isinstance(value, list) and value:
        keys = [len(value) - 1]
    for key in keys:
        yield (*way, key)
        yield from places(value[key], (*way, key))


def damaged(body, way, damage):
    body = copy.deepcopy(body)
    part = body
    for step in way[:-1]:
        part = part[step]
    if damage is ABSENT:
        del part[way[-1]]
    else:
        part[way[-1]] = damage
    return body


def is_needed(path, way):
    name = ".".join(map(str, way))
    return any(name == needed or (needed.endswith("*") and name.startswith(needed[:-1]))
               for needed in NEEDED[path].split())


def another(body, number):
    """The same mail with an id and a text of its own."""
    return body.replace(b"real-id", b"id-%d" % number).replace(b"stimmt", b"stimmt%d" % number)


def lost(desk):
    """[(status, reason)] of what was kept for review."""
    return desk.sql("SELECT status, reason FROM rejected")


# Once more without the whole mail in them, so that the fields beside it are what is read.
WHOLE_MAIL = {"forwardemail/message.json": "raw", "mailersend/message.json": "data.raw",
              "sparkpost/one.json": "0.msys.relay_message.content.email_rfc822"}


@pytest.mark.slow
@pytest.mark.parametrize("path, without", [*((path, "") for path in NEEDED), *WHOLE_MAIL.items()])
def test_no_part_that_we_do_not_need_costs_the_mail(desk, path, without):
    body = opened(path)
    if without:
        [whole] = [way for way in places(body) if ".".join(map(str, way)) == without]
        body = damaged(body, whole, ABSENT)
    content_type = FORM if path.endswith(".form") else JSON
    tried = [(way, damage) for way in places(body) if not is_needed(path, way)
             for damage in (DAMAGES if len(way) < 6 else DAMAGES[:3])]
    assert len(tried) > 50
    for number, (way, damage) in enumerate(tried):
        post = another(closed(path, damaged(body, way, damage)), number)
        response = send(desk, post, content_type)
        where = (way, damage, response.text, lost(desk))
        assert response.status_int == 200, where
        for answer in response.json.get("messages", [response.json]):
            assert answer["status"] == "created", where
        [[text]] = desk.sql("SELECT text FROM message WHERE direction = 'in' "
                         "ORDER BY id DESC LIMIT 1")
        if not any(HOLDS_THE_TEXT.search(str(step)) for step in way):
            assert "Größe stimmt" in text, where
    assert desk.count("rejected") == 0


FORMS = {
    "mailgun parsed": "timestamp token signature message-headers",
    "mailgun multipart": "timestamp token signature message-headers",
    "mailgun body-mime": "timestamp token signature body-mime",
    "sendgrid": "envelope headers",
    "sendgrid raw": "envelope email",
    "cloudmailin multipart": "envelope[to] envelope[from] headers[from]",
    "cloudmailin raw": "envelope[to] envelope[from] message",
    "cloudmailin deprecated": "message to from plain x_to_header signature",
    "postal form": "rcpt_to mail_from plain_body html_body",
    "customers mail cloud": "server_composition envelope-from headers",
    "mailcast.io": "email return_path recipients[]",
}
FORM_DAMAGES = [ABSENT, "", "17", "x", "null", "true", "[17]", '[["x"]]', '{"a": 1}', "{"]


def fields_posted(shape):
    """[(name, value, filename and content type of a file)] of a form."""
    body = shape.read()
    if shape.content_type == FORM:
        fields = parse_qs(body.decode(), keep_blank_values=True)
        return [(name, value) for name, values in fields.items() for value in values]
    fields = []
    for part in (b"\r\n" + body).split(f"\r\n--{BOUNDARY}".encode())[1:-1]:
        head, _, value = part.partition(b"\r\n\r\n")
        words = re.findall(r'name="(.*?)"|Content-Type: (\S+)', head.decode())
        fields.append((words[0][0], value, *(word[0] or word[1] for word in words[1:])))
    return fields


def form_of(shape, fields):
    return urlencode(fields).encode() if shape.content_type == FORM else multipart(*fields)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_no_field_of_a_form_that_we_do_not_need_costs_the_mail(desk, name):
    shape = SHAPES[name]
    fields = fields_posted(shape)
    assert form_of(shape, fields) == shape.read() or shape.content_type == FORM
    number = 0
    for place, (field, *_) in enumerate(fields):
        if field in FORMS[name].split():
            continue
        for damage in FORM_DAMAGES:
            number += 1
            instead = [] if damage is ABSENT else [(field, damage)]
            post = form_of(shape, fields[:place] + instead + fields[place + 1:])
            response = send(desk, another(post, number), shape.content_type)
            where = (field, damage, response.text, lost(desk))
            assert response.status_int == 200, where
            assert response.json["status"] == "created", where
    assert number > 20
    assert desk.count("rejected") == 0


def test_a_part_of_a_mailjet_post_without_a_content_ref_is_no_attachment(desk):
    def contain(body):
        container = {"Headers": {"Content-Type": 'multipart/mixed; boundary="outer"'}}
        body["Parts"][:0] = [container, container | {"ContentRef": None}, {}, None, 17]

    shown = message(desk, changed("mailjet/message.json", contain))
    assert record(shown) == expected()


def test_a_mox_mail_that_mox_knows_to_be_automatic_is_not_answered(desk):
    # There is no header in its posts: Meta.Automated is all that they say of it.
    body = changed("mox/message.json", lambda body: body["Meta"].update(Automated=True))
    assert deliver(desk, body)[0]["confirmation"] == "withheld"


def test_ahasends_own_field_tells_an_automatic_reply(desk):
    def drop_headers(body):
        del body["data"]["headers"]             # an option of the route
        body["data"]["auto_submitted"] = "auto-replied"

    assert deliver(desk, changed("ahasend/message.json", drop_headers))[0]["kind"] == "auto-reply"


# Ids and headers ----------------------------------------------------------------------------------

IN_TEXT = [name for name, shape in SHAPES.items() if shape.members == 1 and not name.startswith(
    ("canonical", "ses base64", "ses raw", "sparkpost base64", "postal raw"))]
ID_IN_ANY_SPELLING = re.compile(
    rb"(?:<|%3C)?CAF(?:\+|%2B)real-id(?:@|%40)customer\.example(?:>|%3E)?")


@shapes(*IN_TEXT)
def test_a_missing_message_id_is_made_of_the_content(desk, shape):
    body, found = ID_IN_ANY_SPELLING.subn(b"", shape.read())
    assert found
    [first] = deliver(desk, body, shape.content_type)
    made = received(desk, first["ticket"])["message_id"]
    assert re.fullmatch("<[0-9a-f]{32}@missing.invalid>", made)
    [second] = deliver(desk, again(body), shape.content_type)
    assert (second["status"], second["ticket"]) == ("duplicate", first["ticket"])
    assert desk.count("ticket") == 1


@pytest.mark.parametrize("path, field", [
    ("postmark/message.json", "Headers"), ("mailersend/message.json", "data.headers"),
    ("mailjet/message.json", "Headers"), ("cloudmailin/original.json", "headers")])
def test_a_message_id_header_that_is_not_there_at_all_is_made_too(desk, path, field):
    def drop(body):
        *way, last = field.split(".")
        for step in way:
            body = body[step]
        if isinstance(body[last], list):
            body[last] = [pair for pair in body[last] if pair["Name"] != "Message-ID"]
        else:
            del body[last]["Message-ID"]
        body.pop("raw", None)

    assert message(desk, changed(path, drop))["message_id"].endswith("@missing.invalid>")


@pytest.mark.parametrize("header, fallback, read_as", [
    (MESSAGE_ID, "17", MESSAGE_ID), (MESSAGE_ID, "<other@customer.example>", MESSAGE_ID),
    (None, "<other@customer.example>", "<other@customer.example>")])
def test_socketlabs_own_field_stands_in_for_a_missing_header(desk, header, fallback, read_as):
    def change(body):
        mail = body["Message"]
        mail["MessageId"] = fallback
        for pair in mail["CustomHeaders"]:
            if pair["Name"] == "Message-ID":
                pair["Value"] = header

    assert message(desk, changed("socketlabs/message.json", change))["message_id"] == read_as


@pytest.mark.parametrize("spell", [bytes.upper, bytes.lower])
@shapes("raw mail", "socketlabs", "postmark", "cloudmailin original", "mailgun parsed", "sendgrid",
        "sendgrid raw", "mandrill", "sparkpost", "brevo", "mailjet", "ses utf8", "mailersend",
        "lettermint", "mailpace", "maileroo", "inbound.new", "customers mail cloud", "mailcast.io",
        "cloudmailin deprecated")
def test_header_names_are_read_in_any_case(desk, shape, spell):
    names = re.compile(rb'(?i)(?:message-id|in-reply-to|references|x-seen)(?=[":=]|%22)')
    body, found = names.subn(lambda name: spell(name[0]), shape.read())
    assert found
    assert record(message(desk, body, shape.content_type)) == expected(**shape.differs)


@shapes("raw mail", "postmark", "mandrill", "sparkpost", "mailersend", "forward email", "ses utf8",
        "mailparser", "mailpace", "lettermint", "customers mail cloud")
def test_headers_are_shown_decoded_and_unfolded(desk, shape):
    shown = message(desk, shape.read(), shape.content_type)
    [subject] = values(shown, "Subject") or [SUBJECT]
    [references] = values(shown, "References")
    assert subject == SUBJECT
    assert references.split() == PARENTS
    assert "\n" not in references


def test_encoded_words_are_decoded_in_subject_and_name(desk):
    shown = message(desk, desk.mail(
        subject="=?utf-8?b?R3LDtsOfZQ==?=: =?iso-8859-1?q?f=FCr?= =?iso-8859-1?q?_alle?=",
        **{"from": "=?utf-8?q?Zo=C3=AB_M=C3=BCller=2C_Sales?= <zoe@customer.example>"}))
    assert shown["subject"] == "Größe: für alle"
    assert (shown["from_name"], shown["from"]) == ("Zoë Müller, Sales", "zoe@customer.example")


HEADER_PAIRS = {
    "key": lambda name, value: {"key": name, "value": value},
    "Key": lambda name, value: {"Key": name, "Value": value},
    "name": lambda name, value: {"name": name, "value": value},
    "Name": lambda name, value: {"Name": name, "Value": value},
    "postal-mime": lambda name, value: {
        "value": value, "key": name.lower(), "originalKey": name},
    "a list of two": lambda name, value: [name, value],
    "an object of one": lambda name, value: {name: value},
}


@pytest.mark.parametrize("pair", HEADER_PAIRS)
@pytest.mark.parametrize("path, way", [
    ("canonical/mail.json", "headers"), ("postmark/message.json", "Headers"),
    ("mailersend/message.json", "data.headers"), ("lettermint/message.json", "data.headers"),
    ("ahasend/message.json", "data.headers"), ("agentmail/message.json", "message.headers"),
    ("inbound-new/message.json", "email.parsedData.headers")])
def test_a_list_of_headers_is_read_however_its_pairs_are_named(desk, path, way, pair):
    def rename(body):
        *steps, last = way.split(".")
        for step in steps:
            body = body[step]
        headers = [("Message-ID", MESSAGE_ID), ("Auto-Submitted", "auto-replied"),
                   ("X-Seen", "one"), ("X-Seen", "two")]
        body[last] = [HEADER_PAIRS[pair](name, value) for name, value in headers]
        body.pop("raw", None)

    [answer] = deliver(desk, changed(path, rename))
    assert (answer["status"], answer["kind"]) == ("created", "auto-reply")
    shown = received(desk, answer["ticket"])
    assert (shown["message_id"], values(shown, "X-Seen")) == (MESSAGE_ID, ["one", "two"])
    assert not {"key", "name", "value"} & {name.lower() for name, _ in shown["headers"]}


@pytest.mark.parametrize("headers", [
    [{"header": "Auto-Submitted", "content": "auto-replied"}], [{"value": "x", "position": 1}],
    [{"key": None, "value": "x"}], [{"key": "", "value": "x"}]])
def test_a_list_of_headers_without_names_is_a_note_and_makes_no_header(desk, headers):
    shown = message(desk, desk.mail(headers=headers))
    assert [name for name, _ in shown["headers"] if not name or name.lower() in (
        "key", "value", "header", "content", "position")] == []
    assert "header" in " ".join(shown["notes"]).lower()


@pytest.mark.parametrize("replied_to, headers, read_as", [
    ("", [], []), ("help@customer.example", [], ["help@customer.example"]),
    ("help@customer.example", ["other@customer.example"], ["other@customer.example"])])
def test_postmarks_date_and_reply_to_are_kept_as_headers(desk, replied_to, headers, read_as):
    def reply_to(body):
        body["ReplyTo"] = replied_to
        body["Headers"] += [{"Name": "Reply-To", "Value": value} for value in headers]

    shown = message(desk, changed("postmark/message.json", reply_to))
    assert values(shown, "Date") == ["Mon, 21 Sep 2026 16:12:07 +0200"]
    assert values(shown, "Reply-To") == read_as


def test_a_date_that_is_among_postmarks_headers_is_not_doubled(desk):
    def date(body):
        body["Headers"].append({"Name": "date", "Value": "Tue, 22 Sep 2026 16:12:07 +0200"})

    shown = message(desk, changed("postmark/message.json", date))
    assert values(shown, "Date") == ["Tue, 22 Sep 2026 16:12:07 +0200"]


@pytest.mark.parametrize("unusable", ["", "not json", "[", "17", "null", "[17]", '{"a": {}}'])
def test_mailguns_own_fields_stand_in_for_headers_that_cannot_be_read(desk, unusable):
    posted = parse_qs(read("mailgun/parsed.form").decode())
    fields = {name: found[0] for name, found in posted.items()}
    fields |= {"message-headers": unusable, "Auto-Submitted": "auto-replied"}
    [answer] = deliver(desk, urlencode(fields).encode(), FORM)
    assert (answer["status"], answer["kind"]) == ("created", "auto-reply")
    shown = received(desk, answer["ticket"])
    assert (shown["message_id"], shown["in_reply_to"]) == (MESSAGE_ID, PARENTS[1])
    assert shown["references"] == PARENTS
    assert values(shown, "In-Reply-To") == [PARENTS[1]]
    assert [value.split() for value in values(shown, "References")] == [PARENTS]
    assert values(shown, "Auto-Submitted") == ["auto-replied"]


def test_mailguns_own_fields_do_not_double_the_headers(desk):
    shown = message(desk, read("mailgun/parsed.form"), FORM)
    names = [name.lower() for name, _ in shown["headers"]]
    for name in ("in-reply-to", "references", "message-id", "from", "to", "subject"):
        assert names.count(name) <= 1, name


# Senders ------------------------------------------------------------------------------------------

ENVELOPE_IN_ANY_SPELLING = re.compile(
    rb"(?:<|%3C)?zoe(?:\+|%2B)bounce(?:@|%40)customer\.example(?:>|%3E)?")
TELL_BARE = ("socketlabs", "cloudmailin normalised", "cloudmailin multipart", "cloudmailin raw",
             "mailgun parsed", "mailgun multipart", "mailgun body-mime", "sendgrid", "sendgrid raw",
             "sparkpost", "mailjet", "ses base64", "ses utf8", "ses raw delivery", "mailersend",
             "postal", "postal form", "postal raw", "forward email", "canonical", "improvmx", "mox",
             "maileroo", "customers mail cloud", "mailcast.io", "cloudmailin deprecated")


@shapes(*TELL_BARE, "raw mail", "postmark")
def test_a_null_sender_in_angle_brackets_is_an_empty_string(desk, shape):
    brackets = b"%3C%3E" if shape.content_type == FORM else b"<>"
    body = ENVELOPE_IN_ANY_SPELLING.sub(brackets, shape.read())
    assert message(desk, body, shape.content_type)["envelope_from"] == ""


@shapes(*TELL_BARE)
def test_an_empty_null_sender_is_an_empty_string(desk, shape):
    body = ENVELOPE_IN_ANY_SPELLING.sub(b"", shape.read())
    assert message(desk, body, shape.content_type)["envelope_from"] == ""


@shapes("socketlabs", "cloudmailin normalised", "mailjet", "ses raw delivery", "mailersend",
        "postal", "forward email", "canonical", "improvmx", "mox", "maileroo")
def test_an_envelope_sender_that_is_json_null_is_unknown(desk, shape):
    body = shape.read().replace(b'"zoe+bounce@customer.example"', b"null")
    assert body != shape.read()
    assert message(desk, body, shape.content_type)["envelope_from"] is None


def no_from_postmark(body):
    body |= {"From": "", "FromName": "", "FromFull": {"Email": "", "Name": "", "MailboxHash": ""}}


def no_from_socketlabs(body):
    body["Message"]["From"] = None


def no_from_postal(body):
    body["from"] = "undisclosed"


def no_from_mailjet(body):
    body["From"] = body["Headers"]["From"] = ""


@pytest.mark.parametrize("first, sender", [
    ("<>", ""), ("<zoe@customer.example>", "zoe@customer.example"), ("", None)])
def test_postmark_tells_the_envelope_sender_above_its_headers_with_the_whole_mail_too(
        desk, first, sender):
    def put_first(body):
        body["Headers"].insert(0, {"Name": "Return-Path", "Value": first})

    shown = message(desk, changed("postmark/with-raw.json", put_first))
    assert shown["envelope_from"] == sender
    assert (shown["confirmation"] == "withheld") == (sender == "")


@pytest.mark.parametrize("path, change", [
    ("postmark/message.json", no_from_postmark), ("socketlabs/message.json", no_from_socketlabs),
    ("postal/hash.json", no_from_postal), ("mailjet/message.json", no_from_mailjet)])
def test_an_unusable_from_is_the_envelope_sender_or_else_mailer_daemon(desk, path, change):
    body = changed(path, change)
    assert message(desk, body)["from"] == ENVELOPE_FROM
    null = json.dumps(body).replace(ENVELOPE_FROM, "").replace("real-id", "second-id")
    assert message(desk, null)["from"].lower().startswith("mailer-daemon")


@pytest.mark.parametrize("header", [
    b"", b"From:\r\n", b"From: undisclosed\r\n", b"From: <>\r\n"])
def test_a_raw_mail_without_a_usable_from_is_its_return_paths_or_mailer_daemons(desk, header):
    rest = header + b"Subject: Lost\r\n\r\nIt did not arrive.\r\n"
    returned = b"Return-Path: <zoe+bounce@customer.example>\r\nMessage-ID: <1@customer.example>\r\n"
    assert message(desk, returned + rest, MIME)["from"] == ENVELOPE_FROM
    null = b"Return-Path: <>\r\nMessage-ID: <2@customer.example>\r\n"
    assert message(desk, null + rest, MIME)["from"].lower().startswith("mailer-daemon")
    unknown = b"Message-ID: <3@customer.example>\r\n"
    assert message(desk, unknown + rest, MIME)["from"].lower().startswith("mailer-daemon")


def test_a_blank_return_path_is_unknown_and_no_null_sender(desk):
    body = read("raw/mail.eml").replace(b"<zoe+bounce@customer.example>", b"")
    assert message(desk, body, MIME)["envelope_from"] is None


def test_the_envelope_stands_in_for_a_missing_canonical_from(desk):
    shown = message(desk, desk.mail(**{"from": None}, envelope={"from": "<zoe@customer.example>"}))
    assert shown["from"] == shown["envelope_from"] == "zoe@customer.example"


# Where a provider says what it takes a mail for: (body, path, value that says spam).
VERDICTS = [
    ("socketlabs/message.json", "SpamScore", 9.5),
    ("cloudmailin/normalised.json", "envelope.spamd", {"success": True, "score": "9.5"}),
    ("brevo/one.json", "items.0.SpamScore", 9.5),
    ("mailjet/message.json", "SpamAssassinScore", "9.5"),
    ("postal/hash.json", "spam_status", "Spam"),
    ("ahasend/message.json", "data.spam_score", 9.5),
    ("lettermint/message.json", "data.is_spam", True),
    ("lettermint/message.json", "data.spam_score", 9.5),
    ("maileroo/message.json", "is_spam", True),
    ("ses/delivered-raw.json", "receipt.spamVerdict.status", "FAIL"),
    ("ses/delivered-raw.json", "receipt.dmarcVerdict", {"status": "FAIL"})]


@pytest.mark.parametrize("body, path, value", VERDICTS)
def test_what_the_provider_takes_for_spam_is_a_ticket_without_a_confirmation(
        bare, body, path, value):
    def take_for_spam(post):
        *steps, last = path.split(".")
        for step in steps:
            post = post[int(step) if step.isdigit() else step]
        post[last] = value

    [answer] = deliver(bare, json.dumps(changed(body, take_for_spam)))
    assert (answer["status"], answer["kind"], answer["confirmation"]) == (
        "created", "human", "withheld")
    assert "the provider takes it for spam" in answer["reason"]


# SocketLabs' handshake ----------------------------------------------------------------------------

HANDSHAKE = pytest.mark.parametrize("path, content_type, tickets", [
    ("socketlabs/validation.form", FORM, 0), ("socketlabs/validation.json", JSON, 0),
    ("socketlabs/delivered.json", JSON, 0), ("socketlabs/message.json", JSON, 1)])


@pytest.fixture
def socketlabs(desk):
    desk.execute("UPDATE email_account SET validation_key = 'the-validation-key'")
    return desk


def assert_bare_key(response):
    assert response.status_int == 200, response.text
    assert response.content_type == "text/plain"
    assert response.body == b"the-validation-key"


@HANDSHAKE
def test_whoever_knows_the_secret_key_gets_the_bare_validation_key(
        socketlabs, path, content_type, tickets):
    for body in (read(path), again(read(path))):
        assert_bare_key(socketlabs.request(body, content_type, headers={}))
        assert socketlabs.count("ticket") == tickets


def test_the_validation_type_is_read_in_any_case(socketlabs):
    body = urlencode({"secretKey": "not looked at", "SecretKey": SECRET, "Type": "validation"})
    assert_bare_key(socketlabs.request(body, FORM, headers={}))
    assert socketlabs.count("ticket") == 0


@HANDSHAKE
@pytest.mark.parametrize("wrong", [b"", b"a-secret-of-the-tests-0123456780", b"a-secret"])
def test_a_wrong_secret_key_is_401_and_nothing_is_stored(
        socketlabs, path, content_type, tickets, wrong):
    body = read(path).replace(SECRET.encode(), wrong)
    response = socketlabs.request(body, content_type, headers={})
    assert response.status_int == 401
    assert b"the-validation-key" not in response.body
    assert (socketlabs.count("ticket"), socketlabs.count("rejected")) == (0, 0)


@HANDSHAKE
def test_without_a_validation_key_the_body_is_no_place_for_a_secret(
        desk, path, content_type, tickets):
    assert desk.request(read(path), content_type, headers={}).status_int == 401
    assert (desk.count("ticket"), desk.count("rejected")) == (0, 0)


def test_an_empty_header_decides_before_the_right_secret_key(socketlabs):
    for headers in ({"X-Mobieus-Inbound-Secret": ""}, {"X-Mobieus-Inbound-Secret": "wrong"}):
        response = socketlabs.request(read("socketlabs/message.json"), JSON, headers=headers)
        assert response.status_int == 401
    assert socketlabs.count("ticket") == 0


@pytest.mark.parametrize("body", [
    "", "{", "[]", "17", '{"SecretKey": null}', '{"SecretKey": 17}', '{"SecretKey": ["a"]}',
    pytest.param("[" * 100_000, id="deep")])
def test_a_body_without_a_readable_secret_key_is_401(socketlabs, body):
    assert socketlabs.request(body, JSON, headers={}).status_int == 401
    assert (socketlabs.count("ticket"), socketlabs.count("rejected")) == (0, 0)


# What is no mail ----------------------------------------------------------------------------------

@pytest.mark.parametrize("path, content_type", [
    ("sparkpost/ping.json", JSON), ("sparkpost/event.json", JSON), ("mandrill/empty.form", FORM),
    ("mandrill/no-mail.form", FORM), ("mailgun/tracking.json", JSON),
    ("postmark/delivery.json", JSON), ("socketlabs/delivered.json", JSON),
    ("ses/not-json.json", SNS), ("ses/bounce.json", SNS), ("ses/unsubscribed.json", SNS)])
def test_pings_and_outbound_events_are_answered_and_ignored(desk, path, content_type):
    ignore(desk, read(path), content_type)


MAIL_EVENT = {"email": "zoe@customer.example", "time": 1790000001, "Message_GUID": "f1f1f1f1"}
EVENTS = {
    "Resend": [
        {"type": "email.delivered", "created_at": "2026-09-21T14:13:21Z", "data": {
            "email_id": "f1f1f1f1", "from": ADDRESS, "to": ["zoe@customer.example"],
            "subject": "Hello", "message_id": "<out-1@helpdesk.example>"}},
        {"type": "email.clicked", "data": {"email_id": "f1f1f1f1", "click": {"link": "x"}}},
        {"type": "contact.created", "data": {"id": "f1f1f1f1", "email": "zoe@customer.example"}},
        {"type": "domain.updated", "data": {"id": "f1f1f1f1", "name": "helpdesk.example"}}],
    "MailerSend": [
        {"type": "activity.delivered", "domain_id": "d1", "webhook_id": "f1f1f1f1",
         "url": "https://provider.example/", "created_at": "2026-09-21T14:13:21Z",
         "data": {"object": "activity", "id": "f1f1f1f1", "type": "delivered",
                  "email": {"object": "email", "from": ADDRESS, "subject": "Hello"}}},
        {"type": "activity.clicked_unique", "domain_id": "d1", "webhook_id": "f1f1f1f1",
         "data": {"object": "activity", "id": "f1f1f1f1", "type": "clicked_unique"}}],
    "Brevo": [
        {"event": "delivered", "email": "zoe@customer.example", "id": 26224, "ts": 1790000001,
         "date": "2026-09-21 14:13:21", "message-id": "<out-1@helpdesk.example>",
         "ts_event": 1790000001, "subject": "Hello", "tags": ["x"], "sending_ip": "192.0.2.1"},
        {"event": "click", "email": "zoe@customer.example", "id": 26224, "ts": 1790000001,
         "message-id": "<out-1@helpdesk.example>", "link": "https://helpdesk.example/"},
        {"event": "contact_updated", "email": "zoe@customer.example", "id": 17,
         "content": [{"name": "x"}], "ts": 1790000001},
        {"event": "list_addition", "email": ["zoe@customer.example"], "id": 17, "list_id": [2],
         "ts": 1790000001}],
    "SendGrid": [
        [{"email": "zoe@customer.example", "timestamp": 1790000001, "event": "delivered",
          "smtp-id": "<out-1@helpdesk.example>", "sg_event_id": "f1", "sg_message_id": "f1f1f1f1"},
         {"email": "zoe@customer.example", "timestamp": 1790000001, "event": "click",
          "sg_event_id": "f2", "sg_message_id": "f1f1f1f1", "url": "https://helpdesk.example/"}],
        [{"event": "open", "sg_message_id": "f1f1f1f1"}]],
    "Mailjet": [
        MAIL_EVENT | {"event": "sent", "MessageID": 19421777835146490, "smtp_reply": "250 OK"},
        MAIL_EVENT | {"event": "click", "MessageID": 17, "url": "https://helpdesk.example/"},
        [MAIL_EVENT | {"event": "open", "MessageID": 17}, {"event": "sent", "MessageID": 18}]],
    "Postal": [
        {"event": "MessageSent", "timestamp": 1790000001.5, "uuid": "f1f1f1f1", "payload": {
            "status": "Sent", "output": "250 OK", "message": {
                "id": 12, "token": "f1f1f1f1", "direction": "outgoing", "to": "z@customer.example",
                "message_id": "out-1@helpdesk.example", "from": ADDRESS, "subject": "Hello"}}},
        {"event": "MessageLinkClicked", "payload": {}}, {"event": "DomainDNSError", "payload": {}}],
    "AhaSend": [
        {"type": "message.delivered", "webhook_id": "f1f1f1f1", "timestamp": "2026-09-21T14:13:21Z",
         "data": {"account_id": "a1", "event": "on_delivered", "from": ADDRESS,
                  "recipient": "zoe@customer.example", "subject": "Hello", "id": "f1f1f1f1"}},
        {"type": "message.clicked", "timestamp": "2026-09-21T14:13:21Z", "data": {"id": "x"}}],
    "AgentMail": [
        {"type": "event", "event_type": "message.delivered", "event_id": "f1f1f1f1", "delivery": {
            "inbox_id": ADDRESS, "message_id": "<out-1@helpdesk.example>"}},
        {"type": "event", "event_type": "message.sent", "event_id": "f1f1f1f1",
         "send": {"inbox_id": ADDRESS}},
        {"type": "event", "event_type": "domain.verified", "event_id": "f1f1f1f1", "domain": {}}],
    "Lettermint": [
        {"id": "f1f1f1f1", "event": "message.delivered", "timestamp": "2026-09-21T14:13:21Z",
         "data": {"message_id": "m1", "recipient": "zoe@customer.example", "metadata": {}}},
        {"id": "f1f1f1f1", "event": "suppression.added", "data": {"type": "email", "value": "x"}},
        {"id": "f1f1f1f1", "event": "webhook.test", "data": {"message": "Test"}}],
    "Inbound.new": [
        {"event": "email.delivered", "timestamp": "2026-09-21T14:13:21Z",
         "email": {"id": "f1f1f1f1", "messageId": "<out-1@helpdesk.example>"}, "endpoint": {}}],
}


@pytest.mark.parametrize("body", [
    pytest.param(body, id=f"{name}-{number}")
    for name, bodies in EVENTS.items() for number, body in enumerate(bodies)])
def test_an_event_of_a_listed_provider_is_ignored_and_not_kept(desk, body):
    ignore(desk, json.dumps(body))
    assert desk.count("rejected") == 0


@pytest.mark.parametrize("body", [
    {"type": "opened", "from": "zoe@customer.example", "text": TEXT},       # no message_id
    {"event": "contact", "from": "zoe@customer.example"}, {"type": "delivery", "html": HTML},
    {"type": "contact_form", "absender": FROM, "mid": MESSAGE_ID}])
def test_what_may_be_mail_is_kept_whatever_it_says_of_its_type(desk, body):
    refuse(desk, body, 422)
    assert len(kept(desk)) == 1


WAITING = {"id": "f1f1f1f1", "from": "zoe@customer.example", "to": ADDRESS, "subject": SUBJECT}
METADATA_ONLY = {
    "Resend": json.loads(read("resend/received.json")),
    "Mailtrap": {"events": [{
        "event": "inbound.message_received", "event_id": "f1f1f1f1", "timestamp": 1790000001,
        "inbound_inbox_id": 17, "message_id": "<CAF+real-id@customer.example>",
        "from": "zoe@customer.example", "to": [ADDRESS], "subject": SUBJECT}]},
    "Emailit": {
        "event_id": "evt_f1f1f1f1", "type": "email.received", "object": WAITING,
        "data": {"object": WAITING | {"object": "email"}}},
    "MailSlurp": {
        "eventName": "NEW_EMAIL", "messageId": "f1f1f1f1-1", "webhookId": "w1", "inboxId": "i1",
        "emailId": "f1f1f1f1-2", "from": "zoe@customer.example", "to": [ADDRESS], "cc": [],
        "subject": SUBJECT, "createdAt": "2026-09-21T14:13:21Z", "attachmentMetaDatas": []},
    "Gmail": {
        "message": {"messageId": "2070443601311540", "publishTime": "2026-09-21T14:13:21Z",
                    "data": "eyJlbWFpbEFkZHJlc3MiOiJzdXBwb3J0QGhlbHBkZXNrLmV4YW1wbGUifQ=="},
        "subscription": "projects/helpdesk/subscriptions/inbound"},
    "Microsoft Graph": {"value": [{
        "subscriptionId": "f1f1f1f1", "changeType": "created", "clientState": "x",
        "subscriptionExpirationDateTime": "2026-09-22T14:13:21Z", "tenantId": "t1",
        "resource": "Users/u1/Messages/m1", "resourceData": {"id": "m1"}}]},
    "Nylas": {
        "specversion": "1.0", "type": "message.created", "source": "/google/emails/realtime",
        "id": "f1f1f1f1", "time": 1790000001, "webhook_delivery_attempt": 1,
        "data": {"application_id": "a1", "object": {
            "id": "m1", "object": "message", "grant_id": "g1", "subject": SUBJECT, "body": HTML,
            "from": [{"name": "Zoë", "email": "zoe@customer.example"}],
            "to": [{"name": "", "email": ADDRESS}], "attachments": []}}},
}


@pytest.mark.parametrize("name", METADATA_ONLY)
def test_a_post_that_only_tells_of_a_mail_is_422_and_names_who_posts_such(desk, name):
    answer = refuse(desk, METADATA_ONLY[name], 422)
    assert name in answer["error"]
    assert len(answer["error"].split()) >= 5
    assert "fields" not in answer


TOKEN = "Validation: Testing client application reachability for subscription f1f1+/f1=="
ASK = urlencode({"secret": SECRET, "validationToken": TOKEN})


def test_microsoft_graph_gets_its_validation_token_back_from_who_holds_the_secret(desk):
    response = desk.request("", "text/plain; charset=utf-8", url=f"{URL}?{ASK}", headers={})
    assert (response.status_int, response.content_type) == (200, "text/plain")
    assert response.body == TOKEN.encode()
    assert (desk.count("ticket"), desk.count("rejected")) == (0, 0)


@pytest.mark.parametrize("query", [
    ASK.replace(SECRET, "wrong"), ASK.replace(SECRET, ""), urlencode({"validationToken": TOKEN}),
    f"{ASK}&secret={SECRET}"])
def test_without_the_secret_no_token_is_sent_back(desk, query):
    response = desk.request("", "text/plain", url=f"{URL}?{query}", headers={})
    assert response.status_int == 401
    assert b"reachability" not in response.body


def test_a_token_in_the_url_of_an_ordinary_post_costs_no_mail(desk):
    # Graph asks with an empty body; a mail is a mail whatever its URL says.
    url = f"{URL}?{urlencode({'validationToken': ''})}"
    headers = {"X-Mobieus-Inbound-Secret": SECRET}
    assert desk.post(desk.mail(), url=url, headers=headers)["status"] == "created"


def test_a_subscription_waits_in_rejected_for_the_admin_to_open_its_url(desk):
    ignore(desk, read("ses/confirmation.json"), SNS)
    [(status, body)] = kept(desk)
    assert status == 200
    assert b"https://sns.eu-west-1.amazonaws.com/?Action=ConfirmSubscription&Token=2336412f" in body


@pytest.mark.parametrize("path, content_type", [
    ("resend/received.json", JSON), ("ses/s3.json", SNS)])
def test_a_post_without_the_mail_in_it_is_422_and_kept(desk, path, content_type):
    assert len(refuse(desk, read(path), 422, content_type)["error"].split()) >= 5


# Batches ------------------------------------------------------------------------------------------

def mandrill_broken():
    sent, one, sync, other = mandrill_events("mandrill/several.form")
    events = [one, sent, {"event": "inbound", "ts": 1790000001, "msg": "no object"}, sync, other]
    return urlencode({"mandrill_events": json.dumps(events)}), FORM


def sparkpost_broken():
    def spoil(body):
        body.insert(1, {"msys": {"relay_message": 17}})

    return changed("sparkpost/two.json", spoil), JSON


def brevo_broken():
    def spoil(body):
        body["items"].insert(1, 17)

    return changed("brevo/several.json", spoil), JSON


@pytest.mark.parametrize("build", [mandrill_broken, sparkpost_broken, brevo_broken])
def test_a_broken_member_of_a_batch_costs_only_itself(desk, build):
    body, content_type = build()
    statuses = [answer["status"] for answer in deliver(desk, body, content_type)]
    assert statuses == ["created", "quarantined", "created"]
    assert (desk.count("ticket"), desk.count("rejected")) == (2, 1)
    statuses = [answer["status"] for answer in deliver(desk, body, content_type)]
    assert statuses == ["duplicate", "quarantined", "duplicate"]
    assert (desk.count("ticket"), desk.count("rejected")) == (2, 1)


def mandrill_of(*broken):
    return urlencode({"mandrill_events": json.dumps(
        [{"event": "inbound", "ts": 1790000001, "msg": mail} for mail in broken])}), FORM


def sparkpost_of(*broken):
    return json.dumps([{"msys": {"relay_message": mail}} for mail in broken]), JSON


def brevo_of(*broken):
    first, = json.loads(read("brevo/one.json"))["items"]
    return json.dumps({"items": [first, *broken]}), JSON


@pytest.mark.parametrize("build", [mandrill_of, sparkpost_of, brevo_of])
def test_one_row_of_rejected_names_the_reasons_of_all_bad_members(desk, build):
    alone = []
    for broken in (17, "no object"):
        deliver(desk, *build(broken))
        alone += desk.sql("SELECT reason FROM rejected")
        desk.execute("DELETE FROM rejected")
    assert len(set(alone)) == 2
    statuses = [answer["status"] for answer in deliver(desk, *build(17, "no object"))]
    assert statuses[-2:] == ["quarantined"] * 2
    [[reason]] = desk.sql("SELECT reason FROM rejected")
    for [each] in alone:
        assert each in reason


# Forms and charsets -------------------------------------------------------------------------------

@pytest.mark.parametrize("charset, word", [
    ("iso-8859-1", "Größe"), ("cp850", "Größe"), ("windows-1251", "Привет"), ("UTF-8", "Größe €")])
def test_sendgrid_fields_are_read_in_the_charset_that_they_name(desk, charset, word):
    shown = message(desk, sendgrid(subject=(word, charset), text=(word, charset)), MULTIPART)
    assert (shown["subject"], shown["text"].strip()) == (word, word)


@pytest.mark.parametrize("claimed", [None, "UTF-8", "no-such-charset", "zlib_codec"])
def test_a_subject_that_does_not_fit_its_charset_is_read_from_the_header_block(desk, claimed):
    body = sendgrid(subject=("Größe: 50", "cp850"), charsets={"subject": claimed})
    assert message(desk, body, MULTIPART)["subject"] == SUBJECT


@pytest.mark.parametrize("claimed", ["us-ascii", "x-unknown", "unknown-8bit"])
def test_a_sendgrid_charset_that_says_nothing_is_utf_8(desk, claimed):
    body = sendgrid(subject=("Größe: 50", "utf-8"), charsets={"subject": claimed})
    assert message(desk, body, MULTIPART)["subject"] == "Größe: 50"


def test_a_sendgrid_post_whose_charsets_are_no_json_is_still_a_mail(desk):
    body = re.sub(rb'\{"to": "UTF-8".*?\}', b"not json", sendgrid(text=(TEXT, "utf-8")))
    assert b"not json" in body
    assert message(desk, body, MULTIPART)["message_id"] == MESSAGE_ID


@pytest.mark.parametrize("named", [b"", b'; filename=""'])
def test_a_sendgrid_file_without_a_name_has_the_name_of_its_attachment_info(desk, named):
    body = sendgrid()
    for name in (b"rechnung.pdf", b"logo.png"):
        assert body.count(b'; filename="%s"' % name) == 1
        body = body.replace(b'; filename="%s"' % name, named)
    assert record(message(desk, body, MULTIPART)) == expected()


def test_every_file_of_a_mailgun_content_id_map_with_repeated_keys_has_its_id(desk):
    body = mailgun_multipart(("attachment-3", b"x", "again.png", "image/png")).replace(
        b'{"<logo@customer.example>": "attachment-2"}',
        b'{"": "attachment-1", "<logo@customer.example>": "attachment-2",'
        b' "<logo@customer.example>": "attachment-3"}')
    shown = message(desk, body, MULTIPART)
    ids = {file["filename"]: file["content_id"] or "" for file in shown["attachments"]}
    logo = "logo@customer.example"
    assert ids == {"rechnung.pdf": "", "logo.png": logo, "again.png": logo}


PARTS = [
    ("letter.eml", MIME, b"From: a@b.example\r\nContent-Type: text/html\r\n\r\n<p>inner</p>\r\n"),
    ("two.mime", "multipart/mixed; boundary=x", b"--x\r\n\r\ninner\r\n--x--\r\n"),
    ("crlf.bin", "application/octet-stream", b"\r\n\r\n--\r\n----provider\r\n\r\n"),
    ("empty.txt", "text/plain", b""),
    ("utf-16.txt", "text/plain; charset=utf-16", "ö\r\n".encode("utf-16")),
]


@pytest.mark.parametrize("filename, content_type, content", PARTS)
@pytest.mark.parametrize("build", [sendgrid, mailgun_multipart])
def test_the_bytes_of_a_posted_file_are_kept_as_they_are(
        desk, build, filename, content_type, content):
    name = {sendgrid: "attachment3", mailgun_multipart: "attachment-3"}[build]
    shown = message(desk, build((name, content, filename, content_type)), MULTIPART)
    [file] = [file for file in shown["attachments"] if file["filename"] == filename]
    assert (file["size"], file["sha256"]) == (len(content), digest(content))
    assert shown["text"].replace("\r\n", "\n").strip() == TEXT.strip()


def test_a_posted_file_name_may_be_utf8(desk):
    body = mailgun_multipart(("attachment-3", b"x", "Größe.txt", "text/plain"))
    shown = message(desk, body, MULTIPART)
    assert "Größe.txt" in [file["filename"] for file in shown["attachments"]]


@pytest.mark.parametrize("content_type", [
    f'multipart/form-data; boundary="{BOUNDARY}"',
    f"Multipart/Form-Data; charset=utf-8; Boundary={BOUNDARY}"])
def test_the_boundary_is_found_however_it_is_written(desk, content_type):
    assert record(message(desk, sendgrid(), content_type)) == expected()


def test_a_preamble_and_an_epilogue_of_a_multipart_body_do_not_count(desk):
    body = b"This is MIME.\r\n" + sendgrid() + b"\r\nEnd.\r\n"
    assert record(message(desk, body, MULTIPART)) == expected()


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=",
                                          "multipart/form-data; boundary=another"])
def test_a_multipart_body_that_cannot_be_taken_apart_is_400(desk, content_type):
    refuse(desk, sendgrid(), 400, content_type)


@pytest.mark.parametrize("body", ["a=1&b=2", "mandrill_events=%5B", "mandrill_events=17", "", "&&"])
def test_a_form_that_nobody_sends_is_400(desk, body):
    refuse(desk, body, 400, FORM)


# MIME as it is ------------------------------------------------------------------------------------

HEAD = (b"From: Zoe <zoe@customer.example>\r\nTo: support@helpdesk.example\r\n"
        b"Message-ID: <odd@customer.example>\r\n")
PLAIN = b"Content-Type: text/plain; charset=%s\r\n\r\n%s\r\n"


def nested(levels):
    body = b"Content-Type: text/plain\r\n\r\nInnermost.\r\n"
    for level in range(levels):
        name = b"level%d" % level
        body = (b"Content-Type: multipart/mixed; boundary=" + name + b"\r\n\r\n"
                b"--" + name + b"\r\n" + body + b"--" + name + b"--\r\n")
    return body


@pytest.mark.parametrize("mail, field, contains", [
    pytest.param(mail, field, contains, id=title) for title, mail, field, contains in [
        ("no charset, UTF-8", b"\r\nGr\xc3\xb6\xc3\x9fe\r\n", "text", "Größe"),
        ("no charset, Latin-1", b"\r\nBitte: Gr\xf6\xdfe\r\n", "text", "Bitte: Gr"),
        ("unknown charset", PLAIN % (b"x-nobody", b"Gr\xc3\xb6\xc3\x9fe"), "text", "Größe"),
        ("charset of another codec", PLAIN % (b"hex_codec", b"Hallo"), "text", "Hallo"),
        ("wrong charset", PLAIN % (b"us-ascii", b"Bitte: Gr\xf6\xdfe"), "text", "Bitte: Gr"),
        ("broken UTF-8", PLAIN % (b"utf-8", b"Bitte \xff\xfe!"), "text", "Bitte"),
        ("windows-1252", PLAIN % (b"windows-1252", b"50 \x80"), "text", "50 €"),
        ("gb2312", PLAIN % (b"gb2312", "你好".encode("gb2312")), "text", "你好"),
        ("iso-2022-jp", PLAIN % (b"iso-2022-jp", "日本".encode("iso-2022-jp")), "text", "日本"),
        ("UTF-8 subject", b"Subject: Gr\xc3\xb6\xc3\x9fe\r\n\r\n.\r\n", "subject", "Größe"),
        ("Latin-1 subject", b"Subject: Bitte Gr\xf6\xdfe\r\n\r\n.\r\n", "subject", "Bitte Gr"),
        ("broken base64 word", b"Subject: =?utf-8?b?R3L?= ok\r\n\r\n.\r\n", "subject", "ok"),
        ("unknown word charset", b"Subject: =?x-nobody?q?Hallo?= ok\r\n\r\n.\r\n", "subject", "ok"),
        ("unfinished word", b"Subject: =?utf-8?q?Hallo ok\r\n\r\n.\r\n", "subject", "ok"),
        ("broken bytes in a word", b"Subject: =?utf-8?q?=FF=FE?= ok\r\n\r\n.\r\n", "subject", "ok"),
        ("a character cut in two words",
         b"Subject: =?utf-8?b?R3LD?= =?utf-8?b?tsOfZQ==?=\r\n\r\n.\r\n", "subject", "Größe"),
        ("no subject", b"\r\nHallo\r\n", "subject", "(no subject)"),
        ("no body", b"", "text", ""), ("no body, one blank line", b"\r\n", "text", ""),
        ("broken quoted-printable",
         b"Content-Transfer-Encoding: quoted-printable\r\n\r\nA=ZZ B=\r\n", "text", "B"),
        ("unknown transfer encoding", b"Content-Transfer-Encoding: x-nobody\r\n\r\nHallo\r\n",
         "text", "Hallo"),
        ("multipart without a boundary",
         b"Content-Type: multipart/mixed\r\n\r\nHallo\r\n", "text", "Hallo"),
        ("multipart that never ends",
         b"Content-Type: multipart/mixed; boundary=x\r\n\r\n--x\r\n\r\nHallo\r\n", "text", "Hallo"),
        ("broken content type", b"Content-Type: ;;;/=\r\n\r\nHallo\r\n", "text", "Hallo"),
        ("30 levels", nested(30), "text", "Innermost."),
        ("a line that is no header", b"no header at all\r\n\r\nHallo\r\n", "text", "Hallo"),
    ]])
def test_an_odd_mail_is_read_as_far_as_it_goes(desk, mail, field, contains):
    assert contains in message(desk, HEAD + mail, MIME)[field]


@pytest.mark.parametrize("levels", [100, 2000])
def test_a_mail_nested_without_end_is_kept_one_way_or_another(desk, levels):
    [answer] = deliver(desk, HEAD + nested(levels), MIME)
    assert answer["status"] in ("created", "quarantined")
    assert desk.count("ticket") + desk.count("rejected") == 1


@pytest.mark.parametrize("eol", [b"\n", b"\r\n"])
@pytest.mark.parametrize("before", [b"", b"From zoe@customer.example Mon Sep 21 14:12:07 2026\n"])
def test_mbox_lines_and_either_line_end_are_read(desk, before, eol):
    body = before + read("raw/mail.eml").replace(b"\r\n", eol)
    assert record(message(desk, body, MIME)) == expected()


def test_a_raw_mail_without_a_message_id_gets_one_and_its_retry_is_a_duplicate(desk):
    body = re.sub(rb"Message-ID: .*\r\n", b"", read("raw/mail.eml"))
    first, second = deliver(desk, body, MIME)[0], deliver(desk, again(body), MIME)[0]
    assert (second["status"], second["ticket"]) == ("duplicate", first["ticket"])
    made = received(desk, first["ticket"])["message_id"]
    assert re.fullmatch("<[0-9a-f]{32}@missing.invalid>", made)


def test_text_after_an_inline_picture_is_not_lost(desk):
    shown = message(desk, HEAD + b"Content-Type: multipart/mixed; boundary=x\r\n\r\n"
                    b"--x\r\nContent-Type: text/plain\r\n\r\nBefore.\r\n"
                    b"--x\r\nContent-Type: image/png\r\nContent-Disposition: inline\r\n\r\npng\r\n"
                    b"--x\r\nContent-Type: text/plain\r\n\r\nAfter.\r\n--x--\r\n", MIME)
    assert "Before." in shown["text"]
    assert "After." in shown["text"] or "text/plain" in [
        file["content_type"] for file in shown["attachments"]]


# Attachments --------------------------------------------------------------------------------------

INNER = (b"From: Bob <bob@customer.example>\r\nSubject: Inner\r\n"
         b"Message-ID: <inner@customer.example>\r\n\r\nInner text.\r\n")


def with_part(part):
    """A mail that says `See attached.` and carries the part (its headers, blank line, body)."""
    return (HEAD + b"Subject: Outer\r\nContent-Type: multipart/mixed; boundary=x\r\n\r\n"
            b"--x\r\nContent-Type: text/plain\r\n\r\nSee attached.\r\n"
            b"--x\r\n" + part + b"\r\n--x--\r\n")


@pytest.mark.parametrize("part, differs", [pytest.param(*row, id=title) for title, *row in [
    ("a mail", b"Content-Type: message/rfc822\r\n\r\n" + INNER, {"content_type": MIME}),
    ("winmail.dat", b"Content-Type: application/ms-tnef; name=winmail.dat\r\n"
     b"Content-Transfer-Encoding: base64\r\n\r\neJ8+IgE=",
     {"filename": "winmail.dat", "content_type": "application/ms-tnef", "size": 5,
      "sha256": digest(b"\x78\x9f\x3e\x22\x01")}),
    ("text that is an attachment", b"Content-Type: text/plain\r\nContent-Disposition: attachment;"
     b" filename=log.txt\r\n\r\nlog", {"filename": "log.txt", "content_type": "text/plain"}),
    ("RFC 2231 name", b"Content-Type: image/png\r\nContent-Disposition: attachment;"
     b" filename*=utf-8''Gr%C3%B6%C3%9Fe.png\r\n\r\n.", {"filename": "Größe.png"}),
    ("RFC 2231 name in pieces", b"Content-Type: image/png\r\nContent-Disposition: attachment;\r\n"
     b' filename*0="Rech";\r\n filename*1="nung.png"\r\n\r\n.', {"filename": "Rechnung.png"}),
    ("encoded word as a name", b"Content-Type: image/png\r\nContent-Disposition: attachment;"
     b' filename="=?utf-8?q?Gr=C3=B6=C3=9Fe=2Epng?="\r\n\r\n.', {"filename": "Größe.png"}),
    ("a name in the content type only", b"Content-Type: image/png; name=a.png\r\n\r\n.",
     {"filename": "a.png"}),
    ("no name", b"Content-Type: image/png\r\n\r\n.", {"content_type": "image/png"}),
    ("a type in capitals", b"Content-Type: IMAGE/PNG\r\n\r\n.", {"content_type": "image/png"}),
    ("an id", b"Content-Type: image/png\r\nContent-ID: <a@b>\r\n\r\n.", {"content_id": "a@b"}),
    ("broken base64", b"Content-Type: image/png; name=a.png\r\n"
     b"Content-Transfer-Encoding: base64\r\n\r\nA%%%", {"filename": "a.png"}),
    ("an appointment", b"Content-Type: text/calendar; name=a.ics\r\n\r\nBEGIN:VCALENDAR",
     {"filename": "a.ics", "content_type": "text/calendar"}),
]])
def test_an_attachment_of_a_mail_is_listed_and_is_not_its_text(desk, part, differs):
    shown = message(desk, with_part(part), MIME)
    assert (shown["subject"], shown["text"].strip()) == ("Outer", "See attached.")
    [file] = shown["attachments"]
    assert {name: file[name] for name in differs} == differs
    assert file["sha256"] or file["note"]


NAMES = ["../../etc/passwd", r"C:\x\y.txt", "/etc/passwd", r"..\..\boot.ini", "a/b\\c", "x\u0000/y"]


@pytest.mark.parametrize("name", NAMES)
def test_no_attachment_name_is_a_path(desk, name):
    shown = message(desk, desk.mail(attachments=[{"filename": name, "content": "eA=="}]))
    [file] = shown["attachments"]
    assert file["filename"] and not set(file["filename"]) & set("/\\\0")
    assert desk.sql("SELECT filename FROM attachment") == [(file["filename"],)]


@pytest.mark.parametrize("name", [name for name in NAMES if "\0" not in name])
def test_no_attachment_name_in_a_raw_mail_or_a_form_is_a_path(desk, name):
    quoted = name.replace("\\", "\\\\")
    disposition = f'Content-Disposition: attachment; filename="{quoted}"'.encode()
    raw = with_part(b"Content-Type: image/png\r\n" + disposition + b"\r\n\r\n.")
    form = sendgrid().replace(b'filename": "logo.png"', f'filename": "{quoted}"'.encode()).replace(
        b'filename="logo.png"', f'filename="{quoted}"'.encode())
    for body, content_type in ((raw, MIME), (form, MULTIPART)):
        for file in message(desk, body, content_type)["attachments"]:
            assert file["filename"] and not set(file["filename"]) & set("/\\")


@pytest.mark.parametrize("content", ["%%%", "abcde", "ö", "data:", "data:text/plain;base64,%%%"])
def test_an_attachment_that_cannot_be_decoded_is_listed_with_a_note(desk, content):
    shown = message(desk, desk.mail(attachments=[{"filename": "a.bin", "content": content}]))
    [file] = shown["attachments"]
    assert (file["filename"], file["sha256"], bool(file["note"])) == ("a.bin", None, True)
    assert shown["text"].strip() == "It burns."


@pytest.mark.parametrize("content", ["QUJD", "QU\r\nJD\r\n", " QUJD ", "QUJD\n"])
def test_base64_may_hold_white_space(desk, content):
    shown = message(desk, desk.mail(attachments=[{"filename": "a.bin", "content": content}]))
    assert shown["attachments"][0]["sha256"] == digest(b"ABC")


BINARY = base64.b64decode("++//Pj8=")


@pytest.mark.parametrize("content", [
    "++//Pj8=", "++//Pj8", "--__Pj8=", "--__Pj8", "data:application/pdf;base64,++//Pj8=",
    "data:;base64,--__Pj8", "data:text/plain;charset=utf-8;base64,\r\n++//Pj8="])
def test_base64_may_lack_padding_be_url_safe_or_stand_in_a_data_uri(desk, content):
    shown = message(desk, desk.mail(attachments=[{"filename": "a.bin", "content": content}]))
    [file] = shown["attachments"]
    assert (file["size"], file["sha256"], file["note"] or "") == (5, digest(BINARY), "")


# Content types ------------------------------------------------------------------------------------

@pytest.mark.parametrize("content_type", [
    JSON, "text/plain", "text/plain; charset=UTF-8", "", "Application/JSON; charset=utf-8"])
def test_json_is_known_by_its_body_under_the_content_types_that_it_comes_in(desk, content_type):
    assert message(desk, json.dumps(desk.mail()), content_type)["subject"] == "Printer on fire"


@pytest.mark.parametrize("content_type", [
    "application/vnd.mail+json", "application/cloudevents+json; charset=utf-8",
    "Application/LD+JSON"])
def test_json_of_a_kind_is_json(desk, content_type):
    assert message(desk, json.dumps(desk.mail()), content_type)["subject"] == "Printer on fire"


@pytest.mark.parametrize("content_type", ["message/global", "message/global; charset=utf-8"])
def test_a_mail_in_utf8_as_a_whole_is_a_raw_mail(desk, content_type):
    # RFC 6532 3.7: message/global is what message/rfc822 is, with UTF-8 in its headers.
    body = ("From: Zoë Müller <zoë@customer.example>\r\nSubject: Größe\r\n"
            "Message-ID: <1@customer.example>\r\n\r\n50 €\r\n").encode()
    shown = message(desk, body, content_type)
    assert (shown["subject"], shown["from_name"], shown["text"].strip()) == (
        "Größe", "Zoë Müller", "50 €")


@pytest.mark.parametrize("content_type", [MIME, "message/global"])
@pytest.mark.parametrize("body", [b"", b"\r\n \r\n"])
def test_an_empty_raw_mail_is_told_that_it_is_empty(desk, body, content_type):
    assert "empty" in refuse(desk, body, 400, content_type)["error"]


def test_a_byte_order_mark_before_json_does_no_harm(desk):
    body = b"\xef\xbb\xbf" + json.dumps(desk.mail()).encode()
    assert message(desk, body)["subject"] == "Printer on fire"


@pytest.mark.parametrize("content_type", ["image/png", "video/mp4", "application/pdf"])
def test_a_content_type_that_nobody_sends_mail_in_is_415(desk, content_type):
    refuse(desk, PNG, 415, content_type)


@pytest.mark.parametrize("body", [
    pytest.param(body, id=title) for title, body in [
        ("empty", ""), ("cut off", '{"a":'), ("an array of nothing known", '[{"a": 1}]'),
        ("an array of numbers", "[1, 2]"), ("a number", "17"), ("a string", '"mail"'),
        ("null", "null"),
        ("NaN", '{"from": "a@b.example", "message_id": "<1@b.example>", "subject": NaN}'),
        ("Infinity", '{"from": "a@b.example", "message_id": "<1@b.example>", "x": -Infinity}'),
        ("an array without end", "[" * 100_000), ("objects without end", '{"a":' * 100_000),
        ("a number without end", '{"a": ' + "9" * 5_000 + "}"),
        ("no UTF-8", b'{"from": "\xff@b.example"}'), ("UTF-16", '{"a": 1}'.encode("utf-16")),
        ("more than one object", "{}{}"), ("prose", "Hello"),
    ]])
def test_a_body_that_is_no_json_object_is_400(desk, body):
    refuse(desk, body, 400)


# The canonical body -------------------------------------------------------------------------------

@pytest.mark.parametrize("fields, missing", [
    ({"from": None}, {"from"}), ({"message_id": None}, {"message_id"}), ({"from": ""}, {"from"}),
    ({"message_id": ""}, {"message_id"}), ({"message_id": "<>"}, {"message_id"}),
    ({"message_id": "   "}, {"message_id"}), ({"from": "nobody"}, {"from"}),
    ({"from": None, "message_id": None}, {"from", "message_id"})])
def test_a_canonical_body_without_from_or_message_id_is_422_and_names_them(desk, fields, missing):
    answer = refuse(desk, desk.mail(**fields), 422)
    assert set(answer["fields"]) == missing
    if None in fields.values():
        assert set(answer["fields"].values()) == {"required"}


@pytest.mark.parametrize("body", [
    "{}", '{"subject": "Hello"}', '{"a": 1, "text": "Hello"}', '{"from": null}', '{"headers": {}}'])
def test_an_object_with_any_canonical_name_is_read_as_a_canonical_body(desk, body):
    assert set(refuse(desk, body, 422)["fields"]) == {"from", "message_id"}


@pytest.mark.parametrize("body", [
    {"a": 1}, {"absender": "zoe@customer.example", "betreff": "Hallo"}, {"mail": {"from": "a@b.c"}},
    {"Subject": "Hello"}, {"data": {"from": "zoe@customer.example", "text": "Hello"}}])
def test_json_that_nobody_posts_is_422_and_told_how_to_describe_it(desk, body):
    answer = refuse(desk, body, 422)
    assert answer["error"].startswith("no known provider posts this")
    for word in ("provider", "canonical", "kept"):
        assert word in answer["error"]
    assert "fields" not in answer


MAILBOX = "Zoë Müller, Sales", "zoe@customer.example"
MAILBOXES = [
    {"name": MAILBOX[0], "address": MAILBOX[1]}, {"name": MAILBOX[0], "email": MAILBOX[1]},
    [{"name": MAILBOX[0], "address": MAILBOX[1]}], [{"name": MAILBOX[0], "email": MAILBOX[1]}],
    [FROM], FROM, '"Zoë Müller, Sales" &lt;zoe@customer.example&gt;',
    "=?utf-8?q?Zo=C3=AB_M=C3=BCller=2C_Sales?= &lt;zoe@customer.example&gt;"]


@pytest.mark.parametrize("written", MAILBOXES)
def test_a_canonical_from_may_be_an_object_a_list_or_escaped(desk, written):
    shown = message(desk, desk.mail(**{"from": written}))
    assert (shown["from_name"], shown["from"]) == MAILBOX


@pytest.mark.parametrize("written", [
    {"address": MAILBOX[1]}, [{"email": MAILBOX[1], "name": None}],
    {"name": "", "email": MAILBOX[1]},
    "&lt;zoe@customer.example&gt;", "&lt;zoe@customer.example>"])
def test_a_canonical_from_needs_no_name(desk, written):
    shown = message(desk, desk.mail(**{"from": written}))
    assert (shown["from_name"] or "", shown["from"]) == ("", MAILBOX[1])


@pytest.mark.parametrize("unusable", [{"a": 1}, {}, [], [{}], [17], {"name": "Zoe"}])
def test_a_canonical_from_without_an_address_in_it_is_422_and_named(desk, unusable):
    assert set(refuse(desk, desk.mail(**{"from": unusable}), 422)["fields"]) == {"from"}


@pytest.mark.parametrize("field", ["to", "cc"])
@pytest.mark.parametrize("written", MAILBOXES)
def test_canonical_recipients_may_be_objects_lists_or_escaped(desk, field, written):
    assert MAILBOX[1] in json.dumps(message(desk, desk.mail(**{field: written}))[field])


def test_several_canonical_recipients_are_all_kept(desk):
    written = [{"name": "Support", "address": ADDRESS}, "Ada <ada@customer.example>",
               {"email": "bob@customer.example"}]
    kept_as = json.dumps(message(desk, desk.mail(to=written))["to"])
    for address in (ADDRESS, "ada@customer.example", "bob@customer.example"):
        assert kept_as.count(address) == 1


@pytest.mark.parametrize("field", ["to", "cc"])
def test_canonical_recipients_fall_back_to_the_headers(desk, field):
    headers = {field.title(): "Support <support@helpdesk.example>, ada@customer.example"}
    shown = message(desk, desk.mail(headers=headers))[field]
    own = {"headers": {field.title(): "other@helpdesk.example"}, field: headers[field.title()],
           "message_id": "<second@customer.example>", "text": "Another."}
    assert message(desk, desk.mail(**own))[field] == shown
    assert "ada@customer.example" in json.dumps(shown) and ADDRESS in json.dumps(shown)


WRONG = {"from": {"a": 1}, "message_id": ["x"], "subject": {"a": 1}, "text": ["x"],
         "html": {"a": 1}, "from_name": [1], "in_reply_to": {"a": 1}, "references": {"a": 1},
         "headers": 17, "envelope": "zoe", "attachments": "x"}


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_type_is_422_and_names_the_field(desk, field):
    assert set(refuse(desk, desk.mail(**{field: WRONG[field]}), 422)["fields"]) == {field}


def test_all_wrong_types_are_named_at_once(desk):
    assert set(refuse(desk, desk.mail(**WRONG), 422)["fields"]) == set(WRONG)


def test_a_number_where_a_string_belongs_is_its_text(desk):
    shown = message(desk, desk.mail(subject=17, text=2.5, from_name=4, headers={"X-Count": 3}))
    assert (shown["subject"], shown["text"].strip(), shown["from_name"]) == ("17", "2.5", "4")
    assert values(shown, "X-Count") == ["3"]


def test_null_is_the_same_as_absent(desk):
    absent = ("html", "from_name", "in_reply_to", "references", "headers", "envelope", "to", "cc",
              "attachments")
    assert message(desk, desk.mail() | dict.fromkeys(absent))["envelope_from"] is None
    assert deliver(desk, desk.mail())[0]["status"] == "duplicate"


def test_nul_and_lone_surrogates_are_dropped(desk):
    dirt = "\u0000\ud800"
    shown = message(desk, desk.mail(
        subject=f"Dru{dirt}cker", text=f"A{dirt}B", html=f"<p>C{dirt}D</p>", from_name=f"Z{dirt}oe",
        message_id=f"<dirt{dirt}y@customer.example>", headers={f"X-{dirt}A": f"1{dirt}2"},
        attachments=[{"filename": f"a{dirt}.txt", "content": "eA=="}]))
    assert (shown["subject"], shown["text"].strip()) == ("Drucker", "AB")
    assert shown["html"] == "<p>CD</p>"
    assert (shown["from_name"], shown["message_id"]) == ("Zoe", "<dirty@customer.example>")
    assert values(shown, "X-A") == ["12"]
    assert shown["attachments"][0]["filename"] == "a.txt"


def test_a_pair_of_surrogates_is_the_character_that_it_spells(desk):
    assert message(desk, desk.mail(subject="\U0001f5a8"))["subject"] == "\U0001f5a8"


@pytest.mark.parametrize("references", [
    PARENTS, " ".join(PARENTS), ",".join(PARENTS), "\r\n ".join(PARENTS),
    [parent.strip("<>") for parent in PARENTS], [" ".join(PARENTS)]])
def test_references_may_be_a_list_or_a_string(desk, references):
    assert message(desk, desk.mail(references=references))["references"] == PARENTS


@pytest.mark.parametrize("headers", [
    {"In-Reply-To": PARENTS[1], "References": " ".join(PARENTS)},
    {"in-reply-to": [PARENTS[1]], "REFERENCES": PARENTS},
    [["In-Reply-To", PARENTS[1]], ["References", "\r\n ".join(PARENTS)]],
    [{"Name": "In-Reply-To", "Value": PARENTS[1]},
     {"Name": "References", "Value": " ".join(PARENTS)}],
    [{"name": "In-Reply-To", "value": PARENTS[1]},
     {"name": "References", "value": " ".join(PARENTS)}]])
def test_parents_are_found_in_the_headers_too(desk, headers):
    shown = message(desk, desk.mail(headers=headers))
    assert (shown["in_reply_to"], shown["references"]) == (PARENTS[1], PARENTS)


@pytest.mark.parametrize("item, kept", [
    ({"name": "X-A"}, []), ({"Name": "X-A", "Value": None}, []), ({"X-A": "1"}, ["1"]),
    ({"line": "X-A: 1"}, ["1"]), ({"Key": "X-A", "Value": ["1", "2"]}, ["1", "2"]),
    (["X-A", "1"], ["1"]), ("X-A: 1", ["1"])])
def test_an_item_of_a_header_list_is_a_name_and_its_values(desk, item, kept):
    shown = message(desk, desk.mail(headers=[item]))
    assert (values(shown, "X-A"), len(shown["headers"])) == (kept, len(kept))


@pytest.mark.parametrize("envelope, read_as", [
    (None, None), ({}, None), ({"from": None}, None), ({"from": ""}, ""), ({"from": "<>"}, ""),
    ({"from": "a@customer.example"}, "a@customer.example"),
    ({"from": "<a@customer.example>"}, "a@customer.example")])
def test_the_canonical_envelope_tells_null_from_unknown(desk, envelope, read_as):
    assert message(desk, desk.mail(envelope=envelope))["envelope_from"] == read_as


# Providers of an admin's own ----------------------------------------------------------------------

OURS = {"from": "absender", "subject": "betreff", "text": "inhalt", "message_id": "mid"}
POST = {"absender": FROM, "betreff": SUBJECT, "inhalt": TEXT, "mid": MESSAGE_ID, "nummer": 17}


def describe(desk, fields, name="Ours"):
    """Add a row of `provider` as an admin would."""
    fields = fields if isinstance(fields, str) else json.dumps(fields)
    desk.execute("INSERT INTO provider (name, fields) VALUES (?, ?)", name, fields)


@pytest.mark.parametrize("content_type", [FORM, MULTIPART])
def test_a_row_of_provider_reads_a_form_whatever_its_fields_are_called(desk, content_type):
    describe(desk, {"from": "email", "message_id": "body-mime", "text": "message"})
    fields = {"email": FROM, "body-mime": MESSAGE_ID, "message": TEXT}
    body = urlencode(fields) if content_type == FORM else multipart(*fields.items())
    shown = message(desk, body, content_type)
    assert (shown["from_name"], shown["from"]) == MAILBOX
    assert (shown["message_id"], shown["text"], shown["notes"]) == (MESSAGE_ID, TEXT, [])


@pytest.mark.parametrize("fields", [OURS, OURS | {"attachments": "datei"}])
def test_what_is_read_of_a_form_by_a_row_of_provider_has_its_files(desk, fields):
    describe(desk, fields)
    body = multipart(("absender", FROM), ("mid", MESSAGE_ID),
                     ("datei", PDF, "rechnung.pdf", "application/pdf"))
    [file] = message(desk, body, MULTIPART)["attachments"]
    assert (file["filename"], file["size"]) == ("rechnung.pdf", len(PDF))


@pytest.mark.parametrize("alike", [
    {"items": [{"Sku": 17}]}, {"items": "two"}, {"raw": "size: 9 mm"}, {"FromFull": "Zoë"},
    {"Sender": "Zoë", "Recipient": "us"}, {"headerLines": 3},
    {"envelope": {"from": ENVELOPE_FROM, "to": ADDRESS}}, {"envelope": "C5"}])
def test_a_field_that_some_provider_has_too_makes_no_post_of_that_provider(desk, alike):
    describe(desk, OURS)
    shown = message(desk, POST | alike)
    assert (shown["message_id"], shown["text"]) == (MESSAGE_ID, TEXT)


def test_a_row_of_provider_is_in_force_for_the_next_request_and_gone_with_it(desk):
    refuse(desk, POST, 422)
    describe(desk, OURS)
    shown = message(desk, POST)
    assert (shown["from_name"], shown["from"]) == MAILBOX
    assert (shown["subject"], shown["text"].strip()) == (SUBJECT, TEXT.strip())
    assert (shown["message_id"], shown["envelope_from"]) == (MESSAGE_ID, None)
    assert deliver(desk, POST)[0]["status"] == "duplicate"
    desk.execute("UPDATE provider SET fields = replace(fields, 'absender', 'von')")
    assert send(desk, json.dumps(POST)).status_int == 422
    desk.execute("UPDATE provider SET fields = replace(fields, 'von', 'absender')")
    assert deliver(desk, POST)[0]["status"] == "duplicate"
    desk.execute("DELETE FROM provider")
    assert send(desk, json.dumps(POST)).status_int == 422


def test_paths_lead_through_objects_and_lists(desk):
    describe(desk, {"from": "mails.0.von.adresse", "subject": "mails.0.betreff.1",
                    "message_id": "mails.0.kopf.id", "text": "mails.0.teile.0.text",
                    "headers": "mails.0.kopfzeilen", "attachments": "mails.0.anlagen",
                    "in_reply_to": "mails.0.kopf.antwort", "references": "mails.0.kopf.bezug"})
    canonical = json.loads(read("canonical/mail.json"))
    shown = message(desk, {"mails": [{
        "von": {"adresse": FROM}, "betreff": ["Alt", SUBJECT], "teile": [{"text": TEXT}],
        "kopf": {"id": MESSAGE_ID, "antwort": PARENTS[1], "bezug": PARENTS},
        "kopfzeilen": [{"key": "X-Seen", "value": "one"}, {"key": "X-Seen", "value": "two"}],
        "anlagen": canonical["attachments"]}]})
    assert record(shown) == expected(envelope_from=None)


@pytest.mark.parametrize("mid", ["", None, "  "])
def test_a_described_post_with_an_empty_message_id_gets_one(desk, mid):
    describe(desk, OURS)
    assert message(desk, POST | {"mid": mid})["message_id"].endswith("@missing.invalid>")
    assert deliver(desk, POST | {"mid": mid})[0]["status"] == "duplicate"


@pytest.mark.parametrize("field", ["betreff", "inhalt", "absender"])
@pytest.mark.parametrize("odd", [None, 17, True, "", [], ["x"], {}, {"a": 1}])
def test_no_odd_part_of_a_described_post_costs_the_mail(desk, field, odd):
    describe(desk, OURS)
    [answer] = deliver(desk, POST | {field: odd})
    assert (answer["status"], desk.count("rejected")) == ("created", 0)


@pytest.mark.parametrize("absent", ["absender", "mid"])
def test_a_post_without_the_paths_of_from_and_message_id_is_still_unknown(desk, absent):
    describe(desk, OURS)
    body = {name: value for name, value in POST.items() if name != absent}
    assert refuse(desk, body, 422)["error"].startswith("no known provider posts this")


def test_a_described_post_is_no_canonical_body(desk):
    describe(desk, {"from": "from", "text": "text", "message_id": "id"})
    body = {"from": FROM, "text": "Hallo", "id": MESSAGE_ID}
    assert message(desk, body)["message_id"] == MESSAGE_ID


@shapes("postmark", "ahasend", "mox", "postal")
def test_a_row_never_takes_the_post_of_a_provider_that_we_know(desk, shape):
    for number, fields in enumerate([
            {"from": "FromFull.Email", "message_id": "MessageID", "text": "MessageStream"},
            {"from": "data.to", "message_id": "data.id"},
            {"from": "Meta.RcptTo", "message_id": "Meta.MsgID"},
            {"from": "to", "message_id": "id"}]):
        describe(desk, fields, f"Ours {number}")
    assert record(message(desk, shape.read())) == expected(**shape.differs)


@pytest.mark.parametrize("fields", [
    "", "x", "17", '"a"', "null", "true", "[]", '["from"]', "{", None])
def test_fields_that_are_no_json_object_are_refused_by_the_schema(desk, fields):
    describe(desk, OURS)
    with pytest.raises(sqlite3.IntegrityError):
        desk.execute("INSERT INTO provider (name, fields) VALUES ('Ours', ?)", fields)


SENSELESS = [
    {}, {"from": 17, "message_id": ["mid"]}, {"from": None, "message_id": {}}, {"x": "y"},
    {"from": "", "message_id": ""}, {"from": "...", "message_id": "."}, {"subject": "betreff"},
    {"from": "absender", "message_id": True}, {"from": "absender.0.x", "message_id": "mid.-1"},
    {"FROM": "absender", "Message-ID": "mid"},
    {"from": "liste." + "9" * 5000, "message_id": "liste.٠"}]


@pytest.mark.parametrize("fields", SENSELESS)
def test_a_senseless_row_costs_no_mail_neither_ours_nor_theirs(desk, fields):
    describe(desk, fields, "Senseless")
    describe(desk, OURS)
    assert record(message(desk, read("postmark/message.json"))) == expected()
    assert message(desk, desk.mail())["subject"] == "Printer on fire"
    post = POST | {"mid": "<own@customer.example>", "liste": [FROM]}
    assert message(desk, post)["subject"] == SUBJECT
    assert desk.count("rejected") == 0


@pytest.mark.parametrize("fields", [
    {"from": 17, "message_id": "mid"}, {"x": "y"}, {},
    {"from": "from", "message_id": "message_id", "text": "body"}])      # never asked: canonical
def test_the_doctor_names_a_row_that_makes_no_sense(desk, fields):
    describe(desk, fields, "Senseless")
    assert "FAIL provider Senseless" in desk.run("doctor", status=1)


def test_two_mails_without_a_header_are_two(desk):
    statuses = [desk.post(content, "message/rfc822")["status"] for content in (
        b"aaaa my printer burns", b"bbbb another", b"not a header\r\n\r\nhello",
        b"not a header\r\n\r\nhello")]
    assert statuses == ["created", "created", "created", "duplicate"]
