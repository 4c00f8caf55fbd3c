"""Two doors, one mail: the raw message that an MTA pipes, and the JSON a provider makes of it.

`canonical_of` reads MIME with a reader of its own, not with the one that is tested: what a careful
provider posts comes from a careful provider's reading.
"""

import base64
import email.errors
import email.header
import email.message
import re

DOORS = ("raw", "json")
RECEIVED = ("from mx.customer.example (mx.customer.example [192.0.2.7])\r\n"
            "\tby mail.helpdesk.example with ESMTPS id 4D7A; Mon, 21 Sep 2026 16:13:21 +0200")
# No text of a test has a line that begins with it.
BOUNDARY = "a-door-of-the-tests"
# What these labels mean to whoever reads mail (WHATWG Encoding 4.2).
LABELS = {"gb2312": "gb18030", "gbk": "gb18030", "euc-kr": "cp949", "ks_c_5601-1987": "cp949",
          "shift_jis": "cp932", "big5": "big5hkscs", "iso-8859-1": "cp1252"}


def deliver(desk, mail, door, **more):
    """Post `mail`, raw bytes or canonical fields, through `door`; return the answer's object."""
    if door == "raw":
        raw = mail if isinstance(mail, bytes) else raw_of(mail)
        return desk.post(raw, "message/rfc822", **more)
    return desk.post(json_of(mail) if isinstance(mail, bytes) else mail, **more)


def by_both_doors(desk, mail, **more):
    """Deliver one mail through each door, to a desk that knows no other; return the one answer.

    Kind, confirmation and reason have to be the same. Fields go as they are, as a raw mail, and as
    the JSON that a provider makes of that: there every header stands in the list, From and
    Content-Type too.
    """
    ways = {"raw": (mail, "raw"), "json": (mail, "json")}
    if isinstance(mail, dict):
        ways["a provider's json"] = raw_of(mail), "json"
    fates = {}
    for way, (content, door) in ways.items():
        desk.forget_all()
        answer = deliver(desk, content, door, **more)
        assert answer["status"] == "created", (way, answer)
        fates[way] = answer["kind"], answer["confirmation"], answer["reason"]
    assert len({*fates.values()}) == 1, fates
    return answer


# Raw → JSON ---------------------------------------------------------------------------------------

def json_of(raw):
    """The canonical body of a raw mail; CloudMailin's where the canonical one would be a 422."""
    body = canonical_of(raw)
    sender = body.get("envelope", {}).get("from") or body.get("from", "")
    if body.get("message_id", "").strip(" <>") and re.search(r"[^\s<>@]@[^\s<>@]", sender):
        return body
    return cloudmailin_of(body)


def canonical_of(raw):
    """The canonical body of a raw mail, as a careful provider makes it; no field that is absent."""
    raw = re.sub(rb"\A(?:\s*>?From [^\r\n]*\r?\n)?", b"", raw)     # an mbox separator
    headers, parts = headers_of(raw), [*leaves_of(raw)]
    texts = {"text/plain": [], "text/html": []}
    attachments = []
    inline = [part for part, _ in parts
              if part.get_content_type() in texts and not is_attached(part)]
    # RFC 2183 2.1: an inline part is shown; one with a file name where there is no other.
    shown = [part for part in inline if not part.get_filename()] or inline
    for part, content in parts:
        if part in shown:
            texts[part.get_content_type()].append(text_in(content, part.get_content_charset()))
            continue
        attachments.append({
            "filename": part.get_filename(), "content_type": part.get_content_type(),
            "content_id": part["Content-ID"], "content": base64.b64encode(content).decode()})
    known = {}
    for name, value in headers:
        known.setdefault(name.lower(), value)
    fields = {
        "headers": headers, "from": known.get("from"), "to": known.get("to"),
        "cc": known.get("cc"), "message_id": known.get("message-id"),
        "subject": words_in(known["subject"]) if "subject" in known else None,
        "text": "\n".join(texts["text/plain"]) or None,
        "html": "\n".join(texts["text/html"]) or None, "attachments": attachments or None}
    # MAIL FROM is what the receiving server wrote on top; a Return-Path further down is anybody's.
    if headers and headers[0][0].lower() == "return-path" and headers[0][1]:
        fields["envelope"] = {"from": headers[0][1].strip("<>")}
    return {name: value for name, value in fields.items() if value is not None}


def cloudmailin_of(body):
    """What CloudMailin would have posted instead of a canonical body: it asks for no field."""
    headers = {}
    for name, value in body["headers"]:
        headers.setdefault(name, []).append(value)
    return {"headers": headers, "envelope": body.get("envelope", {}),
            "plain": body.get("text", ""), "html": body.get("html", ""),
            "attachments": [{
                "file_name": item["filename"], "content_type": item["content_type"],
                "content_id": item["content_id"], "content": item["content"]}
                for item in body.get("attachments", [])]}


def head_and_body(raw):
    """The header block and what stands behind the empty line; one of blanks is empty too."""
    if found := re.match(rb"[ \t]*\r?\n", raw):
        return b"", raw[found.end():]
    head, *body = re.split(rb"\r?\n[ \t]*\r?\n", raw, maxsplit=1)
    return head, b"".join(body)


def headers_of(raw):
    """[[name, value], …] in order: unfolded, 8-bit bytes as text, encoded words as they are."""
    head, _ = head_and_body(raw)
    pairs = []
    for line in head.splitlines():
        name, colon, value = line.partition(b":")
        if line[:1] in (b" ", b"\t") and pairs:
            pairs[-1][1] += b" " + line.strip()
        elif colon and re.fullmatch(rb"[!-9;-~]+", name.rstrip()):
            pairs.append([name.rstrip(), value.strip()])
    charset = None
    for name, value in pairs:
        if name.lower() == b"content-type":
            charset = header(name, value.decode("latin-1")).get_content_charset()
    return [[name.decode(), text_in(value.strip(), charset, "utf-8")] for name, value in pairs]


def header(name, value):
    """A Message that bears one header, for its parameters."""
    message = email.message.Message()
    message[name if isinstance(name, str) else name.decode()] = value
    return message


def leaves_of(raw, default="text/plain"):
    """(headers, decoded content) of each part that is no multipart; message/* as it was written."""
    part = email.message.Message()
    part.set_default_type(default)
    for name, value in headers_of(raw):
        part[name] = value
    _, body = head_and_body(raw)
    boundary = part.get_boundary()
    if part.get_content_maintype() != "multipart" or not boundary:
        yield part, content_of(part, body)
        return
    inner = "message/rfc822" if part.get_content_type() == "multipart/digest" else "text/plain"
    mark = rb"(?:\A|\r?\n)--" + re.escape(boundary.encode())
    body = re.split(mark + rb"--", body, maxsplit=1)[0]
    for piece in re.split(mark + rb"[ \t]*(?=\r?\n)", body)[1:]:
        yield from leaves_of(re.sub(rb"\A\r?\n", b"", piece), inner)


def content_of(part, body):
    encoding = (part["Content-Transfer-Encoding"] or "").strip().lower()
    if part.get_content_maintype() == "message" and encoding not in ("base64", "quoted-printable"):
        return body
    part.set_payload(body.decode("ascii", "surrogateescape"))
    return part.get_payload(decode=True)


def is_attached(part):
    return part.get_content_disposition() == "attachment"


def text_in(content, *charsets):
    """Bytes as text: in the first charset that fits them."""
    for charset in filter(None, (*charsets, "utf-8")):
        try:
            return content.decode(LABELS.get(charset.lower(), charset))
        except (LookupError, UnicodeError):
            pass
    return content.decode("cp1252", "replace")


def words_in(value):
    """A subject with its encoded words decoded, as providers post it; broken ones as they are."""
    try:
        return str(email.header.make_header(email.header.decode_header(value)))
    except (LookupError, ValueError, email.errors.MessageError):
        return value


# JSON → raw ---------------------------------------------------------------------------------------

def raw_of(fields):
    """The raw mail that canonical fields describe; `envelope.from` is its first header."""
    sender = (fields.get("envelope") or {}).get("from")
    headers = [] if sender is None else [("Return-Path", f"<{sender.strip('<>')}>")]
    # Without one of our own a Return-Path among the headers would stand first, and be believed.
    headers.append(("Received", RECEIVED))
    kind = ""
    for name, value in pairs_of(fields.get("headers") or {}):
        if name.lower() == "content-type":
            kind = value
        elif name.lower() != "mime-version":
            headers.append((name, value))
    for field, name in (("from", "From"), ("to", "To"), ("cc", "Cc"), ("subject", "Subject"),
                        ("message_id", "Message-ID"), ("in_reply_to", "In-Reply-To"),
                        ("references", "References")):
        value = fields.get(field)
        if value is not None:
            joint = ", " if field in ("to", "cc") else " "
            headers.append((name, joint.join(value) if isinstance(value, list) else value))
    parts = parts_of(fields)
    if not kind:
        kind = parts[0][0] if len(parts) == 1 else "multipart/mixed"
    if kind.lower().startswith("multipart/") and "boundary" not in kind.lower():
        kind += f'; boundary="{BOUNDARY}"'
    headers += [("MIME-Version", "1.0"), ("Content-Type", kind)]
    body = body_of(parts, kind, headers)
    head = "".join(f"{name}: {checked(value)}\r\n" for name, value in headers)
    return head.encode() + b"\r\n" + body


def pairs_of(headers):
    """(name, value) of headers as the canonical body takes them: an object or a list of pairs."""
    pairs = []
    for name, value in headers.items() if isinstance(headers, dict) else headers:
        for text in value if isinstance(value, list) else [value]:
            if text is not None:
                pairs.append((name, text))
    return pairs


def parts_of(fields):
    """(Content-Type, file name, content) of what the mail holds: its text, its HTML, its files."""
    parts = []
    if fields.get("text") is not None or not fields.get("html"):
        parts.append(("text/plain; charset=utf-8", None, (fields.get("text") or "").encode()))
    if fields.get("html"):
        parts.append(("text/html; charset=utf-8", None, fields["html"].encode()))
    for item in fields.get("attachments") or ():
        content = base64.b64decode(item.get("content") or "")
        kind = item.get("content_type", "application/octet-stream")
        parts.append((kind, item.get("filename") or "", content))
    return parts


def body_of(parts, kind, headers):
    if "boundary" not in kind.lower():
        headers.append(("Content-Transfer-Encoding", "8bit"))
        return parts[0][2]
    boundary = header("Content-Type", kind).get_boundary().encode()
    pieces = []
    for part_type, filename, content in parts:
        lines = [b"--" + boundary, b"Content-Type: " + part_type.encode()]
        if filename:
            lines.append(f'Content-Disposition: attachment; filename="{filename}"'.encode())
        if not part_type.startswith(("text/", "message/")):
            lines.append(b"Content-Transfer-Encoding: base64")
            content = base64.encodebytes(content)
        pieces += [*lines, b"", content]
    return b"\r\n".join([*pieces, b"--" + boundary + b"--", b""])


def checked(value):
    """The value, if it is one: a line end in it that is no fold would begin another header."""
    if re.search(r"\r?\n(?![ \t])", value):
        raise ValueError(f"this value is no header's: {value!r}")
    return value
