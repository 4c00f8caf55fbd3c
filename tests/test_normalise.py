"""From what was posted to what is kept: SPEC 3.1. Parsers by one-line check tables.

The tables go through the door, most of them through both, and look at what `show` prints.
"""

import base64
import json
import time

import pytest
from doors import DOORS, deliver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import inbound
from conftest import HERE, SECRET

ADA = "ada@customer.example"
LONG = "x" * 10_000


def shown(desk, mail, door="json"):
    """Deliver a first mail; return its message as `show` prints it."""
    answer = deliver(desk, mail, door)
    assert answer["status"] == "created", answer
    messages = desk.show(answer["ticket"])["messages"]
    return next(message for message in messages if message["direction"] == "in")


def shown_by_both(desk, mail):
    """The same through each door, where they have to agree in what a sender wrote."""
    found = []
    for door in DOORS:
        desk.forget_all()
        found.append(shown(desk, mail, door))
    names = ("message_id", "in_reply_to", "references", "from", "from_name", "to", "cc", "subject",
             "text")
    for name in names:
        assert found[0][name] == found[1][name], name
    return found[0]


def raw(*headers, body=b"It burns.\n", kind=b"text/plain; charset=utf-8"):
    """A raw mail of these header lines, bytes, on top of the usual ones."""
    lines = [b"Received: by mx.helpdesk.example", b"From: ada@customer.example",
             b"Message-ID: <raw@customer.example>", *headers, b"MIME-Version: 1.0"]
    lines += [b"Content-Type: " + kind] if kind else []
    return b"\r\n".join([*lines, b"", body])


# Addresses ----------------------------------------------------------------------------------------

# (From, name, address)
SENDERS = [
    ("ada@x.example", "", "ada@x.example"),
    ("<ada@x.example>", "", "ada@x.example"),
    ("  <ada@x.example>  ", "", "ada@x.example"),
    ("Ada <ada@x.example>", "Ada", "ada@x.example"),
    ("Ada Lovelace<ada@x.example>", "Ada Lovelace", "ada@x.example"),
    ('"Ada" <ada@x.example>', "Ada", "ada@x.example"),
    ('"Lovelace, Ada" <ada@x.example>', "Lovelace, Ada", "ada@x.example"),
    ("Lovelace, Ada <ada@x.example>", "Lovelace, Ada", "ada@x.example"),
    (r'"Ada \"the\" L" <ada@x.example>', 'Ada "the" L', "ada@x.example"),
    ('"ada@y.example" <ada@x.example>', "ada@y.example", "ada@x.example"),
    ("ada@y.example <ada@x.example>", "ada@y.example", "ada@x.example"),
    ("ada@x.example (Ada)", "Ada", "ada@x.example"),
    ("=?utf-8?q?Zo=C3=AB?= <zoe@x.example>", "Zoë", "zoe@x.example"),
    ('"=?utf-8?q?Zo=C3=AB?=" <zoe@x.example>', "Zoë", "zoe@x.example"),
    ("=?utf-8?q?eve=40y=2Eexample=2C?= <a@x.example>", "eve@y.example,", "a@x.example"),
    ("=?utf-8?q?a=0D=0Ab?= <a@x.example>", "a b", "a@x.example"),
    ("Ada\x1b[31m <ada@x.example>", "Ada [31m", "ada@x.example"),
    ("Zoë Müller <zoë@müller.example>", "Zoë Müller", "zoë@müller.example"),
    ("o'neill+tag@x.example", "", "o'neill+tag@x.example"),
    ('"ada lovelace"@x.example', "", '"ada lovelace"@x.example'),
    ("ada@[192.0.2.1]", "", "ada@[192.0.2.1]"),
]


@pytest.mark.parametrize("header, name, address", SENDERS)
def test_a_sender_is_read_as_people_mean_it(bare, header, name, address):
    found = shown_by_both(bare, bare.mail(**{"from": header}))
    assert (found["from_name"], found["from"]) == (name, address)


# (From, address): no brackets around it, but only one thing in it can be the address.
LONE = [
    ("Big Bug bb@bug.example", "bb@bug.example"),
    ('"Big Bug" bb@bug.example', "bb@bug.example"),
    ('"Bug, Big" bb@bug.example', "bb@bug.example"),
    ("bb@bug.example Big Bug", "bb@bug.example"),
    ("Big Bug [bb@bug.example]", "bb@bug.example"),
    ("Big Bug <bb@bug.example", "bb@bug.example"),
    ("=?utf-8?q?Gro=C3=9F?= bb@bug.example", "bb@bug.example"),
]


@pytest.mark.parametrize("header, address", LONE)
def test_the_one_address_in_a_broken_from_is_the_address(bare, header, address):
    for door in DOORS:
        bare.forget_all()
        assert shown(bare, bare.mail(**{"from": header}), door)["from"] == address


# (To, addresses)
RECIPIENTS = [
    ("a@x.example, b@x.example", ["a@x.example", "b@x.example"]),
    ("A <a@x.example>, B <b@x.example>", ["a@x.example", "b@x.example"]),
    ('"A, B" <a@x.example>, b@x.example', ["a@x.example", "b@x.example"]),
    ("all: a@x.example, b@x.example;", ["a@x.example", "b@x.example"]),
    ("undisclosed-recipients:;", []),
    ("", []),
]


@pytest.mark.parametrize("header, addresses", RECIPIENTS)
def test_several_recipients_are_told_apart(bare, header, addresses):
    found = shown_by_both(bare, bare.mail(to=header, cc=header))
    assert (found["to"], found["cc"]) == (addresses, addresses)


NOBODY = ["", " ", "<>", "Ada", "Ada <>", "Ada <Ada>", "@x.example", "ada@", "undisclosed:;",
          "(" * 5000]


@pytest.mark.parametrize("header", NOBODY)
def test_a_from_that_names_nobody_is_a_fault_of_json_and_none_of_a_mail(bare, header):
    body = bare.post(bare.mail(**{"from": header}), status=422)
    assert "from" in body["fields"] and bare.count("ticket") == 0
    found = shown(bare, bare.mail(**{"from": header}), "raw")
    assert any("from" in note.lower() for note in found["notes"])
    assert (found["kind"], found["confirmation"]) == ("human", "withheld")


# Python versions differ in what they make of these; none may be taken for one address.
AMBIGUOUS = ["alice@x.example)eve@y.example", "eve@y.example, <ada@x.example>", "a@b@c.example",
             "a@x.example\r\nBcc: eve@y.example", "<a@x.example> <eve@y.example>",
             "a@x.example>,<eve@y.example", "a@x.example;eve@y.example",
             "<ada@x.example\r\nRCPT TO:<eve@y.example>>"]


@pytest.mark.parametrize("header", AMBIGUOUS)
def test_what_may_be_two_addresses_is_never_taken_for_one(bare, header):
    answer = bare.request(bare.mail(**{"from": header}))
    assert answer.status_int == 422 or answer.json["confirmation"] == "withheld"
    assert bare.count("outbox") == 0
    bare.forget_all()
    folded = header.replace("\r\n", "\r\n ")
    assert deliver(bare, bare.mail(**{"from": folded}), "raw")["confirmation"] == "withheld"
    assert bare.count("outbox") == 0


# Message-ids --------------------------------------------------------------------------------------

# (In-Reply-To or References, ids)
IDS = [
    ("<a@b>", ["<a@b>"]),
    ("<a@b> <c@d>", ["<a@b>", "<c@d>"]),
    ("<a@b>,<c@d>", ["<a@b>", "<c@d>"]),
    ("<a@b><c@d>", ["<a@b>", "<c@d>"]),
    ("<a@b>\r\n\t<c@d>\r\n", ["<a@b>", "<c@d>"]),
    ("<a@b> <c@d> <a@b>", ["<a@b>", "<c@d>"]),
    ("<A@b> <a@b>", ["<A@b>", "<a@b>"]),
    ("<a@\r\n b>", ["<a@b>"]),
    ("< a@b >", ["<a@b>"]),
    ("&lt;a@b&gt;", ["<a@b>"]),
    ("a@b", ["<a@b>"]),
    ("a@b, c@d", ["<a@b>", "<c@d>"]),
    ('"<a@b>"', ["<a@b>"]),
    ("<<a@b>>", ["<a@b>"]),
    ("<a@b", ["<a@b>"]),
    ("a@b>", ["<a@b>"]),
    ("<a@b> <cut", ["<a@b>"]),
    ("<a@b.>", ["<a@b.>"]),
    ("<Ac0SKyO0==>", ["<Ac0SKyO0==>"]),
    ("Ac0SKyO0==", []),
    ('Your message of "Mon, 21 Sep" <a@b>', ["<a@b>"]),
    ("Message from Ada of Monday", []),
    ("", []),
    ("<>", []),
    ("< >", []),
    (f"<{LONG}@b>", [f"<{LONG}@b>"]),
    (["<a@b>", "<c@d>"], ["<a@b>", "<c@d>"]),
    (["<a@b> <c@d>", "e@f"], ["<a@b>", "<c@d>", "<e@f>"]),
    (["<a@b>", None, 17, ["<x@y>"], "<c@d>"], ["<a@b>", "<c@d>"]),
    (["", "<a@b>"], ["<a@b>"]),
    ([], []),
    (None, []),
]


@pytest.mark.parametrize("value, expected", IDS)
def test_message_ids_are_found_however_they_are_written(bare, value, expected):
    found = shown(bare, bare.mail(references=value, in_reply_to=value))
    assert found["references"] == expected
    assert (found["in_reply_to"] or "").split() == expected
    bare.forget_all()
    if isinstance(value, str):
        written = value.strip()
        found = shown(bare, bare.mail(references=written, in_reply_to=written), "raw")
        assert found["references"] == expected


@pytest.mark.parametrize("value", ["<a\0@b>", "<a\ud800@b>"])
def test_what_no_database_takes_is_taken_out_of_an_id(bare, value):
    assert shown(bare, bare.mail(references=value))["references"] == ["<a@b>"]


# (Message-ID, what it is)
MESSAGE_ID = [
    ("<a@b>", "<a@b>"),
    ("a@b", "<a@b>"),
    ("  <a@b>\r\n", "<a@b>"),
    ("<a@\r\n b>", "<a@b>"),
    ("< a@b >", "<a@b>"),
    ("<<a@b>>", "<a@b>"),
    ('"a@b"', "<a@b>"),
    ("<a@b", "<a@b>"),
    ("a@b>", "<a@b>"),
    ("<a@b> (comment)", "<a@b>"),
    ("<a@b> <c@d>", "<a@b>"),
    ("no-at-sign", "<no-at-sign>"),
    ("<A@B>", "<A@B>"),
    ("<ä@b>", "<ä@b>"),
    (f"<{LONG}@b>", f"<{LONG}@b>"),
    # None at all: what is kept is made of the content.
    ("", None),
    (" ", None),
    ("<>", None),
    ("< >", None),
    ('""', None),
]


@pytest.mark.parametrize("value, expected", MESSAGE_ID)
def test_a_message_id_keeps_its_brackets_and_loses_what_is_around_them(bare, value, expected):
    found = shown(bare, bare.mail(message_id=value.strip()), "raw")["message_id"]
    if expected is None:
        assert found.endswith("@missing.invalid>")
        assert "message_id" in bare.post(bare.mail(message_id=value), status=422)["fields"]
        return
    bare.forget_all()
    assert found == shown(bare, bare.mail(message_id=value))["message_id"] == expected


@pytest.mark.parametrize("value, expected", [row for row in MESSAGE_ID if "@" in (row[1] or "")])
def test_a_reply_names_a_message_as_the_message_names_itself(bare, value, expected):
    reference = bare.post(bare.mail(message_id=value))["ticket"]
    answer = bare.post(bare.mail(message_id="<reply@x>", in_reply_to=value, subject="x"))
    assert (answer["status"], answer["ticket"]) == ("appended", reference)


# Text ---------------------------------------------------------------------------------------------

# (HTML, text)
HTML = [
    ("", ""),
    ("plain", "plain"),
    ("<p>one</p><p>two</p>", "one\n\ntwo"),
    ("one<br>two<br/>three<BR />four", "one\ntwo\nthree\nfour"),
    ("<div>one</div><div>two</div>", "one\n\ntwo"),
    ("a\n  b\t c", "a b c"),
    ("a<b>b</b>c <i>d</i>", "abc d"),
    ("&lt;b&gt; &amp; &euro;&#8364;&#x20AC; &nbsp;x", "<b> & €€€ x"),
    ("&amp;lt;", "&lt;"),
    ("&nosuch; &", "&nosuch; &"),
    ("<script>alert(1)</script>x", "x"),
    ("<SCRIPT type='a'>if (a < b) {}</SCRIPT >x", "x"),
    ("<style>p { color: red }</style>x", "x"),
    ("<head><title>T</title><style>a</style></head><body>x</body>", "x"),
    ("a<!-- no -->b", "ab"),
    ("a<!-- <p>no</p> -->b", "ab"),
    ("a<!--[if mso]><p>no</p><![endif]-->b", "ab"),
    ("a<!-->b", "ab"),
    ("a<!--->b<!-- no --!>c<!-- no -->d", "abcd"),
    ("<!DOCTYPE html><html><body>x</body></html>", "x"),
    ('<?xml version="1.0"?>x', "x"),
    ('<a href="https://x.example/">here</a>', "here (https://x.example/)"),
    ("<a href='https://x.example/'>here</a> now", "here (https://x.example/) now"),
    ("<a class=b href=https://x.example/ id=c>here</a>", "here (https://x.example/)"),
    ('<A HREF="https://x.example/?a=1&amp;b=2">x</A>', "x (https://x.example/?a=1&b=2)"),
    ('<a href="https://x.example/?a=1&region=eu&copy=2">x</a>',
     "x (https://x.example/?a=1&region=eu&copy=2)"),
    ('<a href="https://x.example/?a=1&times=2">https://x.example/?a=1&times=2</a>',
     "https://x.example/?a=1&times=2"),
    ('<a href="https://x.example/"><b>bold</b></a>', "bold (https://x.example/)"),
    ('<a href="https://x.example/">https://x.example/</a>', "https://x.example/"),
    ('<a href="mailto:ada@x.example">ada@x.example</a>', "ada@x.example"),
    ('<a href="#top">up</a>', "up"),
    ("<a name=x>here</a>", "here"),
    ('<abbr href="https://x.example/">x</abbr>', "x"),
    ("<ul><li>one</li><li>two</li></ul>", "one\n\ntwo"),
    ('<img src="cid:1" alt="Logo"> x', "Logo x"),
    ("<img src='cid:1' alt='Rock &amp; Roll'> x", "Rock & Roll x"),
    ("<img alt=Logo src=cid:1> x", "Logo x"),
    ('<img src="cid:1" alt=""> x', "x"),
    ('<img src="cid:1"> x', "x"),
    ('<img src="cid:1" data-alt="no"> x', "x"),
    ('<a href="https://x.example/"><img src=a alt="Home"></a>', "Home (https://x.example/)"),
    ("1 < 2", "1 < 2"),
    ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"),
    ("a <- b", "a <- b"),
    ("unclosed <p>x", "unclosed\nx"),
    ("<p\nclass=x\n>x</p>", "x"),
    ("日本<br>語", "日本\n語"),
]


@pytest.mark.parametrize("markup, expected", HTML)
def test_html_becomes_text(markup, expected):
    assert inbound.html_to_text(markup) == expected


# (HTML, its lines that are not empty): what stands apart on the screen stands apart in the text.
APART = [
    ("<table><tr><td>Name</td><td>Ana</td></tr></table>", ["Name Ana"]),
    ("<table><tr><th>Name</th><td>Ana</td></tr><tr><th>Room</th><td>214</td></tr></table>",
     ["Name Ana", "Room 214"]),
    ("<table><tr><td>Name</td>\n<td>Ana</td></tr></table>", ["Name Ana"]),
    ("<table><tbody><tr><td><b>Name</b></td><td><i>Ana</i></td></tr></tbody></table>",
     ["Name Ana"]),
    ("<TABLE><TR><TD>Name<TD>Ana<TR><TD>Room<TD>214</TABLE>", ["Name Ana", "Room 214"]),
    ("<table><tr><td>a</td><td></td><td>c</td></tr></table>", ["a c"]),
    ("<dl><dt>Name</dt><dd>Ana</dd><dt>Room</dt><dd>214</dd></dl>", ["Name", "Ana", "Room", "214"]),
    ("<section>one</section><section>two</section>", ["one", "two"]),
    ("<article>one</article><article>two</article>", ["one", "two"]),
    ("<header>one</header><main>two</main><footer>three</footer>", ["one", "two", "three"]),
    ("<nav>one</nav><aside>two</aside>", ["one", "two"]),
    ("<address>one</address>two", ["one", "two"]),
    ("<center>one</center><center>two</center>", ["one", "two"]),
    ("<select><option>one<option>two</select>", ["one", "two"]),
    ("<details><summary>one</summary>two</details>", ["one", "two"]),
    ("<fieldset><legend>one</legend>two</fieldset>", ["one", "two"]),
    ("<figure><img alt=Fire><figcaption>It burns</figcaption></figure>", ["Fire", "It burns"]),
    ("one<pre>two\nthree</pre>four", ["one", "two", "three", "four"]),
    ("<pre>a\n  b   c\n\td</pre>", ["a", "  b   c", "\td"]),
    ("<pre>if (a &lt; b) {\n    return <b>0</b>;\n}</pre>", ["if (a < b) {", "    return 0;", "}"]),
    ("<p>a\n  b</p><pre>a\n  b</pre><p>a\n  b</p>", ["a b", "a", "  b", "a b"]),
    ("<PRE class=x>a\n b</PRE>", ["a", " b"]),
    ("<pre>one\r\n  two</pre>", ["one", "  two"]),
    ("<pre>never closed\n  x", ["never closed", "  x"]),
]


@pytest.mark.parametrize("markup, expected", APART)
def test_what_html_sets_apart_stays_apart(markup, expected):
    lines = inbound.html_to_text(markup).splitlines()
    assert [line for line in lines if line.strip()] == expected


@pytest.mark.slow
@pytest.mark.parametrize("piece", ["<!--", "<", "<a href=", "<![", "<![<![", "</", "<script>", "&",
                                   "<!-- -->", "<a href='", "\n", "<a href=b></a>", "<br", "<pre>",
                                   "<pre", "<td>", "<img alt=a>", "<img alt='", "</pre>"])
def test_two_megabytes_of_broken_html_take_less_than_two_seconds(piece):
    start = time.process_time()
    inbound.html_to_text(piece * (2_000_000 // len(piece)))
    assert time.process_time() - start < 2


# (bytes, charset that is claimed, text)
DECODE = [
    (b"Gr\xc3\xb6\xc3\x9fe", "utf-8", "Größe"),
    (b"Gr\xc3\xb6\xc3\x9fe", None, "Größe"),
    (b"Gr\xc3\xb6\xc3\x9fe", "UTF-8", "Größe"),
    (b"Gr\xc3\xb6\xc3\x9fe", "utf8", "Größe"),
    (b"Gr\xc3\xb6\xc3\x9fe", "no-such-charset", "Größe"),
    (b"Gr\xc3\xb6\xc3\x9fe", '""', "Größe"),
    (b"Gr\xf6\xdfe", "iso-8859-1", "Größe"),
    (b"Gr\xf6\xdfe", "latin1", "Größe"),
    (b"Gr\xf6\xdfe", None, "Größe"),
    (b"Gr\xf6\xdfe", "us-ascii", "Größe"),
    (b"50 \x80", "iso-8859-1", "50 €"),
    (b"50 \x80", "us-ascii", "50 €"),
    (b"50 \xa4", "iso-8859-15", "50 €"),
    (b"50 \x80 \xfe", "iso-8859-9", "50 € ş"),
    (b"Gr\x94\xe1e", "cp-850", "Größe"),
    (b"Gr\x94\xe1e", "ibm850", "Größe"),
    (b"\xf0\xd2\xc9\xce\xd4\xc5\xd2", "KOI8-R", "Принтер"),
    (b"\xcf\xf0\xe8\xed\xf2\xe5\xf0", "windows-1251", "Принтер"),
    (b"\xcf\xf0\xe8\xed\xf2\xe5\xf0", "cp-1251", "Принтер"),
    (b"\x93\xfa\x96{", "shift_jis", "日本"),
    (b"\x1b$BF|K\\\x1b(B", "iso-2022-jp", "日本"),
    (b"\xc6\xfc\xcb\xdc", "euc-jp", "日本"),
    # Each label means the larger set that mail programs send under it (WHATWG Encoding 4.2).
    (b"\xb4\xf2\xd3\xa1 \xe9F", "gb2312", "打印 镕"),
    (b"\xb4\xf2\xd3\xa1 \xe9F", "GB_2312-80", "打印 镕"),
    (b"\xb4\xf2\xd3\xa1 \x819\xee9", "gbk", "打印 㐀"),
    (b"\xb4\xf2\xd3\xa1 \x819\xee9", "x-gbk", "打印 㐀"),
    (b"\xc7\xc1\xb8\xb0\xc5\xcd \x8cc", "euc-kr", "프린터 똠"),
    (b"\xc7\xc1\xb8\xb0\xc5\xcd \x8cc", "ks_c_5601-1987", "프린터 똠"),
    (b"\x93\xfa\x96{ \x87@", "shift_jis", "日本 ①"),
    (b"\x93\xfa\x96{ \x87@", "x-sjis", "日本 ①"),
    (b"\x93\xfa\x96{ \x87@", "windows-31j", "日本 ①"),
    (b"\xb4\xf2 \x9d\xef", "big5", "湖 嘅"),
    (b"\xc7\xc1\xb8\xb0\xc5\xcd \x8cc", "csEUCKR", "프린터 똠"),
    (b"\xb4\xf2\xd3\xa1 \xe9F", "csGB2312", "打印 镕"),
    (b"\xf9\xec\xe5\xed", "iso-8859-8-i", "שלום"),        # Outlook's label of Hebrew
    (b"\xe5\xd1\xcd\xc8\xc7", "iso-8859-6-i", "مرحبا"),
    (b"\xca\xc7\xd1\xca\xb4\xd5", "windows-874", "สวัสดี"),
    (b"\xcf\xf0\xe8\xed\xf2\xe5\xf0", "win-1251", "Принтер"),
    (b"\xcf\xf0\xe8\xed\xf2\xe5\xf0", "x-cp1251", "Принтер"),
    (b"\xcf\xf0\xe8\xed\xf2\xe5\xf0", "windows-1251*ru", "Принтер"),
    (b"Gr\x9a\xa7e", "x-mac-roman", "Größe"),
    (b"\x1b$BF|K\\\x1b(IQR\x1b(B", "iso-2022-jp", "日本ﾑﾒ"),
    (b"\x1b$BF|K\\\x1b(B", "cp50220", "日本"),
    (b"\xc6\xfc\xcb\xdc", "x-euc-jp", "日本"),
    (b"\xb4\xf2 \x9d\xef", "Big5-HKSCS", "湖 嘅"),
    (b"Gr\xef\xbf\xbd\xef\xbf\xbde", "us-ascii", "Gr\ufffd\ufffde"),     # broken before it came
    # A byte that is broken costs a character; Windows-1252 would make rubbish of all of them.
    (b"\xb4\xf2\xff\xd3\xa1", "gb2312", "打\ufffd印"),
    (b"\xc7\xc1\xff ok", "euc-kr", "프\ufffd ok"),
    (b"\x93\xfa\x96{ \x81 ok", "shift_jis", "日本 \ufffd ok"),
    (b"\xb4\xf2\xff ok", "big5", "湖\ufffd ok"),
    (b"\xc6\xfc\xff\xcb\xdc", "euc-jp", "日\ufffd本"),
    (b"\xcf\xf0\xe8\xed\xf2\xe5\xf0 \x98", "windows-1251", "Принтер \ufffd"),
    (b"\xf9\xec\xe5\xed \xd9", "windows-1255", "שלום \ufffd"),
    (b"\xc3\xe5\xe9\xdc \xff", "iso-8859-7", "Γειά \ufffd"),
    (b"Gr\xc3\xb6\xc3\x9fe \xff ok", "utf-8", "Größe \ufffd ok"),
    (b"\x1b$BF|K\\\x1b(B \xff ok", "iso-2022-jp", "日本 \ufffd ok"),
    (b"Gr\xc3\xb6", "iso-2022-jp", "Gr\ufffd\ufffd"),     # seven bits: what has eight is no UTF-8
    # No charset of text, or a trap for who asks Python.
    (b"+AGE-", "utf-7", "a"),
    (b"plain", "hex", "plain"),
    (b"plain", "zlib", "plain"),
    (b"plain", "rot13", "plain"),
    (b"plain", "unicode_escape", "plain"),
    (b"plain", "x" * 10_000, "plain"),
    (b"plain", "undefined", "plain"),
]


@pytest.mark.parametrize("content, charset, expected", DECODE)
def test_bytes_are_decoded_by_their_charset_or_what_fits(bare, content, charset, expected):
    kind = b"text/plain" + (f"; charset={charset}".encode() if charset else b"")
    assert shown(bare, raw(kind=kind, body=content), "raw")["text"].strip() == expected


@pytest.mark.parametrize("content, charset, expected", [
    row for row in DECODE if row[1] and row[1][:1] != '"' and row[1] != "us-ascii"
    and len(row[1]) < 60])
def test_an_encoded_word_is_decoded_by_the_same_rule(bare, content, charset, expected):
    word = f"=?{charset}?B?{base64.b64encode(content).decode()}?="
    for door in DOORS:
        bare.forget_all()
        assert shown(bare, bare.mail(subject=word), door)["subject"] == expected


# (header bytes, Content-Type, text): RFC 5322 allows none of these; all arrive.
UNLABELLED = [
    (b"Gr\xc3\xb6\xc3\x9fe", b"text/plain; charset=utf-8", "Größe"),
    (b"Gr\xc3\xb6\xc3\x9fe", b"text/plain; charset=koi8-r", "Größe"),
    (b"Gr\xf6\xdfe", b"text/plain; charset=iso-8859-1", "Größe"),
    (b"Gr\xf6\xdfe", b"text/plain; charset=utf-8", "Größe"),
    (b"Gr\xf6\xdfe", None, "Größe"),
    (b"\xf0\xd2\xc9\xce\xd4\xc5\xd2", b"text/plain; charset=koi8-r", "Принтер"),
    (b"\xf0\xd2\xc9\xce\xd4\xc5\xd2", b"text/html; charset=\"KOI8-R\"", "Принтер"),
    (b"\xcf\xf0\xe8\xed\xf2\xe5\xf0", b"text/plain; charset=windows-1251", "Принтер"),
    (b"\xb4\xf2\xd3\xa1", b"text/plain; charset=gb2312", "打印"),
    (b"\x93\xfa\x96{", b"text/plain; charset=shift_jis", "日本"),
]


@pytest.mark.parametrize("content, kind, expected", UNLABELLED)
def test_bytes_of_a_header_are_utf_8_or_in_the_body_s_charset(bare, content, kind, expected):
    mail = raw(b"Subject: " + content, kind=kind)
    mail = mail.replace(b"From: ada", b"From: " + content + b" <ada", 1)
    mail = mail.replace(b"customer.example\r\n", b"customer.example>\r\n", 1)
    found = shown(bare, mail, "raw")
    assert (found["subject"], found["from_name"]) == (expected, expected)
    assert found["from"] == ADA


def test_the_body_s_charset_is_that_of_its_first_text(bare):
    body = (b"--b\r\nContent-Type: text/plain; charset=koi8-r\r\n\r\n\xf0\xd2\r\n"
            b"--b\r\nContent-Type: text/html; charset=koi8-r\r\n\r\n<p>\xf0\xd2\r\n--b--\r\n")
    mail = raw(b"Subject: \xf0\xd2\xc9\xce\xd4\xc5\xd2", body=body,
               kind=b"multipart/alternative; boundary=b")
    assert shown(bare, mail, "raw")["subject"] == "Принтер"


@pytest.mark.parametrize("charset", [b"punycode", b"idna", b"utf-7", b"unicode_escape", b"utf-16",
                                     b"iso-2022-jp"])
def test_no_charset_makes_decoding_slow(bare, charset):
    for body in (b"a-" * 500_000, b"\x1b$B" + b"-!" * 500_000):
        start = time.process_time()
        shown(bare, raw(kind=b"text/plain; charset=" + charset, body=body), "raw")
        assert time.process_time() - start < 2


# MIME ---------------------------------------------------------------------------------------------

FILE = (b"Content-Type: image/png; name=a.png\r\nContent-Transfer-Encoding: base64\r\n\r\n"
        b"iVBORw0K\r\n")
TWO = b"--b\r\nContent-Type: text/plain\r\n\r\nThe text.\r\n--b\r\n" + FILE + b"--b--\r\n"
NAMED = (b"--b\r\nContent-Type: text/plain; name=a.txt\r\nContent-Disposition: inline;\r\n"
         b" filename=a.txt\r\n\r\nIt has a name.\r\n")
LETTER = b"--b\r\nContent-Type: text/plain\r\n\r\nThe text.\r\n"
ATTACHED = (b"--b\r\nContent-Type: text/plain\r\nContent-Disposition: attachment;\r\n"
            b" filename=a.txt\r\n\r\nA file.\r\n")

RICH = b"--b\r\nContent-Type: text/html\r\n\r\n<p>It <b>burns</b>.\r\n"
EITHER = (b"--b\r\nContent-Type: multipart/alternative; boundary=c\r\n\r\n"
          + (LETTER + RICH).replace(b"--b", b"--c") + b"--c--\r\n")

# (Content-Type, body, text, file names)
STRUCTURES = [
    (b"multipart/mixed; boundary=b", TWO, "The text.", ["a.png"]),
    (b'multipart/mixed;\r\n\tboundary="b"', TWO, "The text.", ["a.png"]),
    (b'multipart/mixed; boundary=\r\n "b"', TWO, "The text.", ["a.png"]),
    (b'multipart/mixed; boundary\r\n\t=\r\n\t"b"', TWO, "The text.", ["a.png"]),
    (b'multipart/mixed\r\n ; boundary="b"', TWO, "The text.", ["a.png"]),
    (b'\r\n multipart/mixed; boundary="b"', TWO, "The text.", ["a.png"]),
    (b'multipart/mixed; type="text/plain";\r\n\tBOUNDARY="b"', TWO, "The text.", ["a.png"]),
    # RFC 5322 2.2.3: unfolding takes the line end away and nothing else.
    (b'multipart/mixed; boundary="a\r\n b"', TWO.replace(b"--b", b"--a b"), "The text.", ["a.png"]),
    (b"multipart/mixed; boundary=b", NAMED + b"--b\r\n" + FILE + b"--b--", "It has a name.",
     ["a.png"]),
    (b"multipart/mixed; boundary=b", NAMED + LETTER + b"--b--", "The text.", ["a.txt"]),
    (b"multipart/mixed; boundary=b", LETTER + NAMED + b"--b--", "The text.", ["a.txt"]),
    (b"multipart/mixed; boundary=b", ATTACHED + b"--b--", "", ["a.txt"]),
    # A list's or a scanner's lines below a mail that is nothing but HTML.
    (b"multipart/mixed; boundary=b", RICH + LETTER + b"--b--", "It burns.\nThe text.", []),
    (b"multipart/mixed; boundary=b", LETTER + RICH + b"--b--", "The text.\nIt burns.", []),
    (b"multipart/mixed; boundary=b", LETTER + EITHER + b"--b--", "The text.\nThe text.", []),
    (b"multipart/alternative; boundary=b", LETTER + RICH + b"--b--", "The text.", []),
    (b"multipart/mixed; boundary=b", EITHER + RICH + b"--b--", "The text.\nIt burns.", []),
    (b"multipart/mixed; boundary=b", LETTER + EITHER.replace(b"The text.", b" ") + b"--b--",
     "The text.\n \nIt burns.", []),
    # RFC 2045 5.1 and 6.1: comments, and what is no comment but seen.
    (b"text/plain (a (nested) comment); charset=utf-8", b"The text.", "The text.", []),
    (b"text / plain; charset=utf-8", b"The text.", "The text.", []),
    (b"text/plain, charset=utf-8", b"The text.", "The text.", []),
    (b"text/plain\r\nContent-Transfer-Encoding: base64 (so)", b"VGhlIHRleHQu", "The text.", []),
    (b"text/plain\r\nContent-Transfer-Encoding: base64;", b"VGhlIHRleHQu", "The text.", []),
    (b"text/html", b'<meta charset="windows-1251"><p>\xcf\xf0\xe8\xed\xf2\xe5\xf0', "Принтер", []),
    (b"text/html", b'<meta http-equiv=Content-Type content="text/html; charset=gb2312">\xb4\xf2',
     "打", []),
    (b"text/html; charset=utf-8", b"<meta charset=gb2312>Gr\xc3\xb6\xc3\x9fe", "Größe", []),
    # One boundary for what is inside each other.
    (b"multipart/mixed; boundary=b", EITHER.replace(b"c", b"b") + b"--b\r\n" + FILE + b"--b--",
     "The text.\nIt burns.", ["a.png"]),
    (b"text/plain; name=a.txt", b"It has a name.", "It has a name.", []),
]


@pytest.mark.parametrize("kind, body, text, names", STRUCTURES)
@pytest.mark.parametrize("line_end", [b"\r\n", b"\n", b"\r", b"\r\r\n"])
def test_a_mail_is_taken_apart_as_it_was_put_together(bare, kind, body, text, names, line_end):
    mail = raw(kind=kind, body=body).replace(b"\r\n", line_end)
    found = shown(bare, mail, "raw")
    assert found["text"].strip() == text
    assert [item["filename"] for item in found["attachments"]] == names


SAME_BY_BOTH = ("message_id", "in_reply_to", "references", "from", "from_name", "envelope_from",
                "to", "cc", "subject")


@pytest.mark.slow
def test_what_another_reader_makes_of_the_mails_is_what_we_make_of_them(bare):
    """`doors.canonical_of` reads MIME by itself: where the two differ, one of them is wrong."""
    differences = {}
    for file in sorted((HERE / "mail").iterdir()):
        read = []
        for door in DOORS:
            bare.forget_all()
            found = shown(bare, file.read_bytes(), door)
            texts = [(found[name] or "").strip().replace("\r\n", "\n") for name in ("text", "html")]
            # A report's line ends are the boundary's as much as its own.
            files = [(item["filename"], item["content_type"], item["content_id"],
                      0 if item["content_type"].startswith("message/") else item["size"])
                     for item in found["attachments"]]
            read.append([*(found[name] for name in SAME_BY_BOTH), *texts, files])
        if read[0] != read[1]:
            differences[file.name] = [pair for pair in zip(*read) if pair[0] != pair[1]]
    assert not differences, differences


@pytest.mark.parametrize("blank", [b"", b" ", b"\t", b"  \t  "])
@pytest.mark.parametrize("line_end", [b"\r\n", b"\n"])
def test_a_line_of_blanks_ends_the_headers_too(bare, blank, line_end):
    mail = line_end.join([b"From: ada@customer.example", b"Message-ID: <blank@customer.example>",
                          b"Subject: Printer", blank, b"Subject: no header", b"",
                          b"It burns.", b""])
    found = shown(bare, mail, "raw")
    assert found["subject"] == "Printer"
    assert found["text"].split() == ["Subject:", "no", "header", "It", "burns."]
    part = line_end.join([b"--b", b"Content-Type: text/plain", blank, b"The text.", b"--b--", b""])
    again = raw(kind=b"multipart/mixed; boundary=b", body=part)
    assert shown(bare, again, "raw")["text"].strip() == "The text."


# (header, text)
WORDS = [
    ("plain", "plain"),
    ("=?utf-8?q?Gr=C3=B6=C3=9Fe?=", "Größe"),
    ("=?UTF-8?B?R3LDtsOfZQ==?=", "Größe"),
    ("=?utf-8?q?a?= =?utf-8?q?b?=", "ab"),
    ("=?utf-8?q?a?= b", "a b"),
    ("a =?utf-8?q?b?= c", "a b c"),
    ("=?iso-8859-1?q?50_=80?=", "50 €"),
    ("=?utf-8*en?q?a?=", "a"),
    ("=?no-such?q?a?=", "a"),
    ("=?utf-8?b?a?=", "=?utf-8?b?a?="),
    ("=?utf-8?x?a?=", "=?utf-8?x?a?="),
    ("=?", "=?"),
    ("=?utf-8?q?unclosed", "=?utf-8?q?unclosed"),
    ("1 =? 2", "1 =? 2"),
]


@pytest.mark.parametrize("header, expected", WORDS)
def test_encoded_words_are_decoded_and_broken_ones_stay(bare, header, expected):
    for door in DOORS:
        bare.forget_all()
        assert shown(bare, bare.mail(subject=header), door)["subject"] == expected


# (header, text)
LINES = [
    ("plain", "plain"),
    ("  plain  ", "plain"),
    ("a\r\n b", "a b"),
    ("a\r\nBcc: b", "a Bcc: b"),
    ("=?utf-8?q?a=0D=0ABcc:_b?=", "a Bcc: b"),
    ("a\x1b[31mb", "a [31mb"),
    ("a\x7f\x85\u2028\u2029b", "a b"),
    ("a\0b", "ab"),
    ("a\ud800b", "ab"),
    ("=?utf-8?q?a=00b?=", "ab"),
    ("=?utf-8?b?7aCA?=x", "x"),
    ("日本", "日本"),
]


@pytest.mark.parametrize("header, expected", LINES)
def test_a_header_becomes_one_clean_line(bare, header, expected):
    found = shown(bare, bare.mail(subject=header))["subject"]
    if "7aCA" in header:  # a surrogate in UTF-8: whatever it is read as, it can be stored
        assert found.endswith("x")
    else:
        assert found == expected


# Through the door ---------------------------------------------------------------------------------

def test_a_mail_of_html_alone_gets_a_text_and_keeps_its_html(desk):
    markup = '<p>It <a href="https://x.example/">burns</a>.</p><script>x</script>'
    for fields in ({"text": None}, {"text": ""}, {"text": " \r\n "}):
        mail = desk.mail(**fields, html=markup, message_id=f"<{len(str(fields))}@x>")
        found = shown(desk, mail)
        assert (found["text"], found["html"]) == ("It burns (https://x.example/).", markup)


def test_a_text_is_kept_whole_beside_its_html(desk):
    text = "  It burns.\r\n\r\n> quoted\r\n-- \r\nAda\r\n" + "x" * 100_000 + "\n"
    found = shown(desk, desk.mail(text=text, html="<p>Other</p>"))
    assert (found["text"], found["html"]) == (text, "<p>Other</p>")


@pytest.mark.parametrize("subject", [None, "", " ", "\r\n", "=?utf-8?q??=", "\0"])
def test_a_mail_without_a_subject_is_told_so(desk, subject):
    found = shown(desk, desk.mail(subject=subject))
    assert found["subject"] == "(no subject)"
    assert desk.sql("SELECT subject FROM ticket") == [("(no subject)",)]


def test_a_mail_without_text_is_kept(desk):
    assert shown(desk, desk.mail(text=None))["text"] == ""


def test_of_many_references_the_first_twenty_and_last_eighty_are_looked_at(desk):
    ids = [f"<{number}@x>" for number in range(300)]
    joined = " ".join(ids)
    found = shown(desk, desk.mail(references=joined, headers={"References": joined}))
    assert found["references"] == ids[:20] + ids[-80:]
    kept = shown(desk, desk.mail(references=ids[:100], message_id="<2@x>"))
    assert kept["references"] == ids[:100]


def test_a_message_id_of_any_length_is_stored_whole_and_never_sent(desk):
    message_id = f"<{LONG}@customer.example>"
    found = shown(desk, desk.mail(message_id=message_id))
    assert found["message_id"] == message_id
    [(mail,)] = desk.sql("SELECT content FROM outbox")
    assert b"xxxxxxxx" not in mail and b"In-Reply-To" not in mail
    assert desk.post(desk.mail(message_id=message_id))["status"] == "duplicate"


# What a provider may add from try to try: each row is the same mail once more.
SAME = [
    {"headers": {"Received": "by mx2.example; Mon, 21 Sep 2026 14:49:53 +0000"}},
    {"headers": [["Received", "one"], ["Received", "two"], ["X-Spam-Score", "0.2"]]},
    {"headers": {"Authentication-Results": "mx; dkim=pass", "X-Try": "2"}},
    {"envelope": {"from": "ada+bounce@customer.example", "to": ["support@helpdesk.example"]}},
    {"text": "It burns.\nBadly.\n"},
    {"text": "It burns.\r\nBadly.\r\n"},
    {"from": "ADA@Customer.Example"},
    {"unknown_field": 17},
    {"to": "support@helpdesk.example", "cc": "bob@customer.example"},
]
OTHERS = [{"text": "It still burns.\r\n"}, {"subject": "Printer"}, {"html": "<p>x</p>"},
          {"from": "bob@customer.example"}, {"attachments": [{"filename": "a", "content": "AA=="}]},
          {"attachments": [{"filename": "a", "content": "AQ=="}]},
          {"attachments": [{"filename": "b", "content": "AA=="}]}]


@pytest.mark.parametrize("fields", SAME)
def test_what_a_provider_adds_makes_no_other_mail(desk, fields):
    first = desk.post(desk.mail(text="It burns.\r\nBadly.\r\n"))
    again = desk.post(desk.mail(**({"text": "It burns.\r\nBadly.\r\n"} | fields)))
    assert (again["status"], again["ticket"]) == ("duplicate", first["ticket"])
    assert (desk.count("ticket"), desk.count("message"), desk.count("outbox")) == (1, 2, 1)


def test_the_same_message_id_with_other_words_is_another_mail(desk):
    tickets = [desk.post(desk.mail(**fields))["ticket"] for fields in ({}, *OTHERS)]
    assert len({*tickets}) == 1 + len(OTHERS)
    again = [desk.post(desk.mail(**fields)) for fields in ({}, *OTHERS)]
    assert [answer["status"] for answer in again] == ["duplicate"] * len(again)
    assert [answer["ticket"] for answer in again] == tickets


def test_a_raw_mail_with_either_line_end_is_the_same_mail(desk):
    mail = (b"From: ada@customer.example\nSubject: x\nMessage-ID: <1@x>\n"
            b"Content-Type: multipart/mixed; boundary=b\n\n--b\n\nText\nof two lines\n"
            b"--b\nContent-Type: text/html\n\n<p>\nx\n--b--\n")
    first = desk.post(mail, "message/rfc822")
    again = desk.post(mail.replace(b"\n", b"\r\n"), "message/rfc822")
    later = desk.post(b"Received: by mx2\nX-Try: 2\n" + mail, "message/rfc822")
    assert [answer["status"] for answer in (first, again, later)] == [
        "created", "duplicate", "duplicate"]


@pytest.mark.slow
@pytest.mark.parametrize("value", ["(" * 10_000 + ")" * 10_000, "(" * 500_000, "()" * 250_000,
                                   "=?utf-8?q?a?= " * 5_000, " " * 500_000, ";" * 500_000])
def test_a_hostile_header_costs_less_than_two_seconds(desk, value):
    headers = dict.fromkeys(("Auto-Submitted", "Precedence", "List-Id", "X-Any"), value)
    start = time.process_time()
    desk.post(desk.mail(headers=headers))
    assert time.process_time() - start < 2


# Anything at all ----------------------------------------------------------------------------------

anything = settings(max_examples=100, deadline=None, database=None, derandomize=True,
                    suppress_health_check=list(HealthCheck))
SPECIALS = '<>@,;:"\\()=?[]{}! -./&#\r\n\0\ud800\u2028aAäutfq8b日'
marked = st.text(alphabet=st.sampled_from(SPECIALS))
texts = st.one_of(st.text(), marked, marked.map(lambda text: f"<a href={text}</a>"))


@settings(anything, max_examples=40)
@given(text=texts)
def test_no_text_breaks_a_parser(desk, text):
    body = {"from": ADA, "message_id": "<a@x>"}
    for fields in ({"subject": text, "in_reply_to": text, "references": text, "from_name": text,
                    "html": text, "to": text, "cc": text}, {"from": text}, {"message_id": text},
                   {"headers": text}, {"headers": {text: text}}, {"envelope": {"from": text}}):
        lands(desk, json.dumps(body | fields).encode(), "application/json")
    for subject, headers in desk.sql("SELECT subject, headers FROM message WHERE direction = 'in'"):
        assert subject.splitlines() == [subject]
        assert all(len(value.splitlines()) < 2 for _, value in json.loads(headers))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["Name", "Value", "name", "value", "line", "From", ""]) | st.text(),
        inner, max_size=4), max_leaves=12)


PARTS = st.sampled_from([
    b"From: a@x.example\n", b"Subject: =?utf-8?q?a=00?=\n", b"Content-Type: multipart/mixed;",
    b" boundary=b\n", b"\n--b\n", b"\n--b--\n", b"Content-Type: message/rfc822\n", b"\n", b"\r\n",
    b"Content-Transfer-Encoding: base64\n", b"Content-Type: text/plain; charset=utf-7\n", b"From ",
    b"Content-Type: text/html; charset*=''x\n", b"Content-Disposition: attachment; filename*0=a\n",
    b"Content-Type: message/delivery-status\n", b"Message-ID: <a\xff@b>\n", b"\x00",
    b"====", b"\xe4"])
mails = st.one_of(st.binary(), st.lists(PARTS, max_size=30).map(b"".join))


@anything
@given(content=mails)
def test_no_bytes_break_the_reading_of_a_mail(desk, content):
    # SPEC 3.0: what cannot be read whole is a ticket with what could be read.
    assert lands(desk, content, "message/rfc822").get("status") != "quarantined"


def lands(desk, body, content_type):
    """Post it; assert that what is answered is so: it is a message, or it waits in `rejected`.

    Returns the answer's object.
    """
    headers = {"X-Mobieus-Inbound-Secret": SECRET, "Content-Type": content_type}
    response = desk.request(body, headers=headers, content_type=None)
    assert response.status_int in (200, 400, 413, 415, 422), response.text
    answer = response.json
    for item in answer.get("messages", [answer]) if response.status_int == 200 else ():
        if item["status"] in ("created", "appended", "duplicate"):
            assert desk.sql("SELECT count(*) FROM message WHERE id = ?", item["message"]) == [(1,)]
        elif item["status"] == "quarantined":
            assert kept(desk, body), (item, body)
        else:
            assert item["status"] == "ignored"
    assert response.status_int == 200 or kept(desk, body), (answer, body)
    assert desk.count("rejected WHERE body IS NULL") == 0
    return answer


def kept(desk, body):
    return desk.sql("SELECT count(*) FROM rejected WHERE body = ?", body) == [(1,)]


FIELDS = ["from", "from_name", "subject", "text", "html", "message_id", "in_reply_to", "references",
          "headers", "envelope", "to", "cc", "attachments", "Type", "SecretKey", "Message", "items",
          "events", "data", "type", "FromFull", "Headers", "Sender", "mandrill_events", "plain"]
bodies = st.one_of(
    json_values,
    st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=8),
    st.fixed_dictionaries({"from": st.just(ADA), "message_id": st.just("<a@x>")},
                          optional=dict.fromkeys(FIELDS[6:13], json_values)))


@anything
@given(body=bodies)
def test_any_json_is_answered_and_kept(desk, body):
    lands(desk, json.dumps(body).encode(), "application/json")


TYPES = ["application/json", "text/plain", "message/rfc822", "multipart/form-data; boundary=b",
         "multipart/form-data", "application/x-www-form-urlencoded", "image/png", "", ";;",
         "x/y; a=\xe4"]


@anything
@given(body=mails, content_type=st.sampled_from(TYPES))
def test_any_bytes_are_answered_and_kept(desk, body, content_type):
    lands(desk, body, content_type)


def test_base64_of_a_mail_is_no_mail(desk):
    body = base64.b64encode(b"From: ada@customer.example\n\nx")
    assert desk.request(body, "text/plain").status_int == 400 and desk.count("ticket") == 0
