"""What is read from every shape that PROVIDERS.md lists: one logical mail, one record.

The bodies are in webhooks/PROVIDER/ as the providers send them; the few that carry binary parts
are built here. What a provider changes from try to try is written with the marks in TRY, so that
`again` can make the second try of any of them.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple
from unittest.mock import ANY
from urllib.parse import parse_qs, urlencode

import pytest
from conftest import SECRET

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
        "sendgrid raw", "mandrill", "sparkpost", "brevo", "mailjet", "ses utf8", "mailersend")
def test_header_names_are_read_in_any_case(desk, shape, spell):
    names = re.compile(rb'(?i)(?:message-id|in-reply-to|references|x-seen)(?=[":=]|%22)')
    body, found = names.subn(lambda name: spell(name[0]), shape.read())
    assert found
    assert record(message(desk, body, shape.content_type)) == expected(**shape.differs)


@shapes("raw mail", "postmark", "mandrill", "sparkpost", "mailersend", "forward email", "ses utf8")
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


# Senders ------------------------------------------------------------------------------------------

ENVELOPE_IN_ANY_SPELLING = re.compile(
    rb"(?:<|%3C)?zoe(?:\+|%2B)bounce(?:@|%40)customer\.example(?:>|%3E)?")
TELL_BARE = ("socketlabs", "cloudmailin normalised", "cloudmailin multipart", "cloudmailin raw",
             "mailgun parsed", "mailgun multipart", "mailgun body-mime", "sendgrid", "sendgrid raw",
             "sparkpost", "mailjet", "ses base64", "ses utf8", "ses raw delivery", "mailersend",
             "postal", "postal form", "postal raw", "forward email", "canonical")


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
        "postal", "forward email", "canonical")
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


def test_a_sendgrid_post_whose_charsets_are_no_json_is_still_a_mail(desk):
    body = re.sub(rb'\{"to": "UTF-8".*?\}', b"not json", sendgrid(text=(TEXT, "utf-8")))
    assert b"not json" in body
    assert message(desk, body, MULTIPART)["message_id"] == MESSAGE_ID


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


@pytest.mark.parametrize("content", ["%%%", "abc", "ö"])
def test_an_attachment_that_cannot_be_decoded_is_listed_with_a_note(desk, content):
    shown = message(desk, desk.mail(attachments=[{"filename": "a.bin", "content": content}]))
    [file] = shown["attachments"]
    assert (file["filename"], file["sha256"], bool(file["note"])) == ("a.bin", None, True)
    assert shown["text"].strip() == "It burns."


@pytest.mark.parametrize("content", ["QUJD", "QU\r\nJD\r\n", " QUJD ", "QUJD\n"])
def test_base64_may_hold_white_space(desk, content):
    shown = message(desk, desk.mail(attachments=[{"filename": "a.bin", "content": content}]))
    assert shown["attachments"][0]["sha256"] == digest(b"ABC")


# Content types ------------------------------------------------------------------------------------

@pytest.mark.parametrize("content_type", [
    JSON, "text/plain", "text/plain; charset=UTF-8", "", "Application/JSON; charset=utf-8"])
def test_json_is_known_by_its_body_under_the_content_types_that_it_comes_in(desk, content_type):
    assert message(desk, json.dumps(desk.mail()), content_type)["subject"] == "Printer on fire"


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


@pytest.mark.parametrize("body", ["{}", '{"a": 1}', '{"subject": "Hello"}'])
def test_an_object_of_nobody_is_read_as_a_canonical_body(desk, body):
    assert set(refuse(desk, body, 422)["fields"]) == {"from", "message_id"}


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


@pytest.mark.parametrize("envelope, read_as", [
    (None, None), ({}, None), ({"from": None}, None), ({"from": ""}, ""), ({"from": "<>"}, ""),
    ({"from": "a@customer.example"}, "a@customer.example"),
    ({"from": "<a@customer.example>"}, "a@customer.example")])
def test_the_canonical_envelope_tells_null_from_unknown(desk, envelope, read_as):
    assert message(desk, desk.mail(envelope=envelope))["envelope_from"] == read_as
