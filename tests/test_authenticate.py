"""Who may post, and what HTTP answers: SPEC 2, from outside.

Every refusal is asserted to have stored nothing and to name no secret.
"""

import base64
import contextlib
import io
import json
import logging
import os
import shutil
import socket
import sqlite3
import tempfile
from collections import namedtuple
from pathlib import Path
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
import webtest

import inbound
from conftest import DAY, HEADER, LONG, SECRET, URL, WRONG

OTHER = "another-secret-of-the-tests-9876"
ODD = "p@ss w/rd:+&=%41 0123456789"


def basic(password, user="inbound"):
    credentials = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {credentials}"}


def raw_basic(credentials):
    return {"Authorization": "Basic " + base64.b64encode(credentials).decode()}


def nothing_is_stored(desk):
    return (desk.count("ticket"), desk.count("message"), desk.count("rejected")) == (0, 0, 0)


def ask(desk, headers, query=""):
    return desk.request(desk.mail(), url=URL + query, headers=headers)


def refuse(desk, headers, query=""):
    """Post a good mail without the right secret; assert the whole of the 401."""
    response = ask(desk, headers, query)
    assert response.status_int == 401, response.text
    assert response.content_type == "application/json" and len(response.json["error"]) > 10
    assert response.headers["WWW-Authenticate"] == 'Basic realm="inbound"'
    assert SECRET not in response.text and WRONG not in response.text
    assert nothing_is_stored(desk)


# Where the secret is looked for -------------------------------------------------------------------

# (headers, query): every way to tell the right secret.
KNOWN = [
    ({HEADER: SECRET}, ""),
    ({HEADER.lower(): SECRET}, ""),
    ({}, f"?secret={SECRET}"),
    ({}, f"?a=1&secret={SECRET}&b="),
    ({}, "?secret=" + "".join(f"%{byte:02x}" for byte in SECRET.encode())),
    (basic(SECRET), ""),
    (basic(SECRET, user=""), ""),
    (basic(SECRET, user="Ada Lövelace"), ""),
    (raw_basic(b"\xff:" + SECRET.encode()), ""),
    ({"Authorization": basic(SECRET)["Authorization"].replace("Basic", "basic")}, ""),
    ({"Authorization": basic(SECRET)["Authorization"].replace("Basic", "BASIC")}, ""),
    # The first place decides: header, query, Basic.
    ({HEADER: SECRET}, "?secret="),
    ({HEADER: SECRET}, f"?secret={WRONG}"),
    ({HEADER: SECRET}, f"?secret={SECRET}&secret={SECRET}"),
    ({HEADER: SECRET} | basic(WRONG), ""),
    (basic(WRONG), f"?secret={SECRET}"),
    ({"Authorization": "Basic ???"}, f"?secret={SECRET}"),
    ({"Authorization": "Bearer x"}, f"?secret={SECRET}"),
]


@pytest.mark.parametrize("headers, query", KNOWN)
def test_the_right_secret_is_known_in_each_place(desk, headers, query):
    assert ask(desk, headers, query).json["status"] == "created"


# (headers, query): none of these may post.
UNKNOWN = [
    ({}, ""),
    ({}, f"?Secret={SECRET}"),
    ({}, f"?secrets={SECRET}"),
    ({"X-Inbound-Secret": SECRET}, ""),
    ({HEADER: ""}, ""),
    ({HEADER: WRONG}, ""),
    ({HEADER: "é" * 20}, ""),
    ({HEADER: SECRET[:-1] + "é"}, ""),
    ({HEADER: "None"}, ""),
    ({HEADER: f"{SECRET}, {SECRET}"}, ""),
    ({HEADER: f"{SECRET},{WRONG}"}, ""),
    ({}, "?secret="),
    ({}, "?secret"),
    ({}, f"?secret={WRONG}"),
    ({}, "?secret=%C3%A9%C3%A9"),
    ({}, "?secret=%FF%FE%80"),
    ({}, f"?secret={SECRET}%00"),
    ({}, f"?secret=%00{SECRET}"),
    ({}, f"?secret={SECRET}%0A"),
    ({}, "?secret=" + SECRET.replace("-", "%E2%80%90")),
    ({}, f"?secret={SECRET}&secret={SECRET}"),
    ({}, f"?secret={SECRET}&secret={WRONG}"),
    ({}, f"?secret=&secret={SECRET}"),
    ({}, f"?secret={SECRET}&secret="),
    (basic(""), ""),
    (basic(WRONG), ""),
    (basic("é" * 20), ""),
    (basic(SECRET + ":"), ""),
    (basic("x", user=SECRET), ""),
    (raw_basic(b"\xff\xfe:\xff\xfe"), ""),
    (raw_basic(SECRET.encode()), ""),  # no colon
    (raw_basic(b""), ""),
    ({"Authorization": "Basic"}, ""),
    ({"Authorization": "Basic "}, ""),
    ({"Authorization": "Basic ???"}, ""),
    ({"Authorization": "Basic é"}, ""),
    ({"Authorization": basic(SECRET)["Authorization"].rstrip("=")[:-1]}, ""),
    ({"Authorization": f"Basic :{SECRET}"}, ""),
    ({"Authorization": f"Bearer {SECRET}"}, ""),
    ({"Authorization": basic(SECRET)["Authorization"].replace("Basic", "Digest")}, ""),
    ({"Authorization": SECRET}, ""),
    # The first place that is present decides, even when it is empty.
    ({HEADER: ""}, f"?secret={SECRET}"),
    ({HEADER: WRONG}, f"?secret={SECRET}"),
    ({HEADER: ""} | basic(SECRET), ""),
    ({HEADER: WRONG} | basic(SECRET), ""),
    (basic(SECRET), "?secret="),
    (basic(SECRET), f"?secret={WRONG}"),
    (basic(SECRET), f"?secret={SECRET}&secret={SECRET}"),
]


@pytest.mark.parametrize("headers, query", UNKNOWN)
def test_a_missing_wrong_or_repeated_secret_is_401_and_nothing_is_stored(desk, headers, query):
    refuse(desk, headers, query)


def near_misses():
    yield from (SECRET[:at] + "!" + SECRET[at + 1:] for at in range(len(SECRET)))
    yield from (SECRET[:-1], SECRET[1:], SECRET + "x", "x" + SECRET, SECRET * 2, SECRET * 100)
    yield from (SECRET.upper(), SECRET.title(), SECRET[::-1], SECRET.replace("-", "_"))


def test_a_secret_that_is_wrong_by_one_character_is_wrong(desk):
    for secret in near_misses():
        refuse(desk, {HEADER: secret})
        refuse(desk, {}, f"?secret={secret}")
        refuse(desk, basic(secret))


@pytest.mark.parametrize("secret", [ODD, " leading and trailing 0 ", ":" * 16, "a" * 500])
def test_any_printable_secret_fits_a_query_and_http_basic(desk, secret):
    desk.execute("UPDATE email_account SET inbound_secret = ?", secret)
    quoted = "".join(f"%{byte:02X}" for byte in secret.encode())
    assert ask(desk, {}, f"?secret={quoted}").status_int == 200
    assert ask(desk, basic(secret)).status_int == 200
    desk.execute("UPDATE email_account SET inbound_secret = ?", SECRET)
    assert ask(desk, {}, f"?secret={quoted}").status_int == 401


def test_the_body_is_not_looked_at_before_the_secret_was_right(desk):
    for body in (b"", b"\xff", b"{" * 5000, json.dumps({"SecretKey": SECRET})):
        response = desk.request(body, headers={HEADER: WRONG})
        assert response.status_int == 401
        assert desk.request(body, headers={}).status_int == 401
    assert nothing_is_stored(desk)


# Which secrets there are --------------------------------------------------------------------------

def test_a_previous_secret_is_valid_until_its_time(desk):
    desk.run("secret", "rotate", "--keep", "1h")
    [(secret,)] = desk.sql("SELECT inbound_secret FROM email_account")
    assert secret != SECRET and len(secret) >= 16
    desk.clock.advance(3599)
    assert ask(desk, {HEADER: SECRET}).json["status"] == "created"
    assert ask(desk, {HEADER: secret}).json["status"] == "duplicate"
    desk.clock.advance(2)
    assert ask(desk, {HEADER: SECRET}).status_int == 401
    assert ask(desk, {HEADER: secret}).json["status"] == "duplicate"


def test_a_rotated_secret_is_kept_for_a_day_unless_told_otherwise(desk):
    desk.run("secret", "rotate")
    desk.clock.advance(DAY - 1)
    assert ask(desk, {HEADER: SECRET}).status_int == 200
    desk.clock.advance(2)
    assert ask(desk, {HEADER: SECRET}).status_int == 401


def test_a_secret_set_by_hand_ends_the_old_one_at_once(desk):
    desk.run("secret", "rotate")
    desk.run("secret", "set", OTHER)
    assert ask(desk, {HEADER: OTHER}).status_int == 200
    assert ask(desk, {HEADER: SECRET}).status_int == 401


def test_a_secret_changed_by_sql_is_in_force_for_the_next_request(desk):
    assert ask(desk, {HEADER: OTHER}).status_int == 401
    desk.execute("UPDATE email_account SET inbound_secret = ? WHERE is_default", OTHER)
    assert ask(desk, {HEADER: OTHER}).status_int == 200
    assert ask(desk, {HEADER: SECRET}).status_int == 401
    desk.execute("UPDATE email_account SET inbound_secret = NULL, previous_secret = ?,"
                 " previous_secret_until = ?", SECRET, desk.clock() + 60)
    assert ask(desk, {HEADER: OTHER}).status_int == 401
    assert ask(desk, {HEADER: SECRET}).status_int == 200


def second_account(desk, address="sales@helpdesk.example"):
    desk.run("account", "add", address)
    desk.run("--account", address, "secret", "set", OTHER)
    desk.run("--account", address, "account", "set", "queue=Sales")


def test_the_secret_says_which_account_a_message_is_for(desk):
    second_account(desk)
    for secret, text in ((SECRET, "one"), (OTHER, "two")):
        assert desk.post(desk.mail(text=text), headers={HEADER: secret})["status"] == "created"
    rows = desk.sql("SELECT address, queue.name FROM ticket JOIN queue ON queue.id = ticket.queue"
                    " JOIN email_account ON email_account.id = email_account ORDER BY ticket.id")
    assert rows == [("support@helpdesk.example", "Support"), ("sales@helpdesk.example", "Sales")]
    assert desk.sql("SELECT count(DISTINCT email_account) FROM message") == [(2,)]


def test_a_previous_secret_says_which_account_too(desk):
    second_account(desk)
    desk.run("--account", "sales@helpdesk.example", "secret", "rotate")
    desk.post(desk.mail(), headers={HEADER: OTHER})
    assert desk.sql("SELECT address FROM ticket JOIN email_account"
                    " ON email_account.id = ticket.email_account") == [("sales@helpdesk.example",)]


@pytest.mark.parametrize("headers, query", [
    ({}, ""), ({HEADER: ""}, ""), ({HEADER: SECRET}, ""), ({}, "?secret="), (basic(""), ""),
    ({}, "?secret=None")])
def test_while_no_account_has_a_secret_every_post_is_503(desk, headers, query):
    desk.execute("UPDATE email_account SET inbound_secret = NULL")
    response = ask(desk, headers, query)
    assert response.status_int == 503
    assert int(response.headers["Retry-After"]) > 0 and len(response.json["error"]) > 10
    assert nothing_is_stored(desk)


@pytest.mark.parametrize("secret", ["", "None", "NULL", "null", "0"])
def test_an_unset_secret_never_matches_anything(desk, secret):
    second_account(desk)
    desk.execute("UPDATE email_account SET inbound_secret = NULL WHERE is_default")
    for headers, query in (({HEADER: secret}, ""), ({}, f"?secret={secret}"), (basic(secret), "")):
        refuse(desk, headers, query)


@pytest.mark.parametrize("column", ["inbound_secret", "previous_secret"])
@pytest.mark.parametrize("secret", ["", "short", "x" * 15, "é" * 16, "a\n" * 8])
def test_the_schema_refuses_a_secret_that_is_short_or_does_not_fit_a_header(desk, column, secret):
    with pytest.raises(sqlite3.IntegrityError):
        desk.execute(f"UPDATE email_account SET {column} = ?, previous_secret_until = 1", secret)


def test_two_accounts_cannot_share_a_secret(desk):
    second_account(desk)
    with pytest.raises(sqlite3.IntegrityError):
        desk.execute("UPDATE email_account SET inbound_secret = ?", SECRET)


# Secrets stay secret ------------------------------------------------------------------------------

def test_no_secret_is_in_a_log_line_or_an_answer(desk, caplog):
    caplog.set_level(logging.DEBUG)
    for headers, query in (*KNOWN, *UNKNOWN):
        assert SECRET not in ask(desk, headers, query).text
    for path in (f"/{SECRET}", "/healthz"):
        desk.app.get(f"{path}?secret={WRONG}", expect_errors=True)
    assert WRONG not in caplog.text and SECRET not in caplog.text


# (body, content type): each is refused with the secret somewhere in it.
WITH_SECRET = [
    (json.dumps({"text": SECRET, "x": [SECRET]}), "application/json"),
    (f"no json {SECRET}", "application/json"),
    (f"a={SECRET}&b=1", "application/x-www-form-urlencoded"),
    (f"{SECRET}", "image/png"),
]


@pytest.mark.parametrize("body, content_type", WITH_SECRET)
def test_in_a_kept_body_the_secret_is_starred_out(desk, body, content_type):
    assert desk.request(body, content_type).status_int in (400, 415, 422)
    [(kept,)] = desk.sql("SELECT body FROM rejected")
    assert kept.decode() == body.replace(SECRET, "*" * len(SECRET))
    assert desk.count("ticket") == 0


def test_no_row_but_its_own_holds_a_secret(desk):
    desk.request({"text": SECRET})
    desk.request("{" + SECRET)
    desk.run("secret", "rotate")
    desk.request({"text": SECRET}, headers={HEADER: SECRET})
    dump = [line for line in desk.dump() if 'INTO "email_account"' not in line]
    assert desk.count("rejected") == 2        # the last repeats the first
    assert not [line for line in dump if SECRET in line or SECRET.encode().hex() in line.lower()]


@pytest.mark.parametrize("body, content_type", [
    ({"from": SECRET, "message_id": "<1@x>"}, "application/json"), ({}, f"image/{SECRET}"),
    ("{", f"application/json; x={SECRET}"),
    *[({"from": 1, "headers": [{"a": "x" * number + SECRET, "b": 1}]}, "application/json")
      for number in (60, 75, 90)]])
def test_no_refusal_repeats_the_secret_in_its_reason(desk, caplog, body, content_type):
    caplog.set_level(logging.DEBUG)
    response = desk.request(body, content_type)
    assert response.status_int in (400, 415, 422)
    kept = str(desk.sql("SELECT reason, content_type FROM rejected"))
    for text in (response.text, caplog.text, kept):
        assert SECRET[:6] not in text       # what is cut shows no beginning of it either
    assert desk.count("ticket") == 0


@pytest.mark.parametrize("number", [0, 60, 75, 90, 150, 160])
def test_what_is_said_of_a_post_without_mail_or_of_a_bug_repeats_no_secret(desk, caplog, number):
    def explode(*_):
        raise RuntimeError("x" * number + SECRET)

    caplog.set_level(logging.DEBUG)
    event = desk.post({"event": "processed" + "x" * number + SECRET})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inbound, "classify", explode)
        bug = desk.post(desk.mail())
    assert (event["status"], bug["status"]) == ("ignored", "quarantined")
    kept = str(desk.sql("SELECT reason, content_type FROM rejected"))
    for text in (str(event), str(bug), caplog.text, kept):
        assert SECRET[:6] not in text


@pytest.mark.parametrize("is_counted", [False, True])
def test_healthz_warns_of_refused_secrets_for_an_hour(ready, is_counted):
    assert ready.health() == FINE
    refuse(ready, {HEADER: WRONG})
    refuse(ready, {})
    if is_counted:
        inbound.write_counts(ready.store)       # as the courier of `serve` does
    status, answer = ready.health()
    assert (status, answer["status"]) == (200, "ok")
    [warning] = answer["warnings"]
    assert "secret" in warning and "2" in warning
    ready.clock.advance(3601)
    assert ready.health() == FINE


def test_refused_secrets_are_logged_and_told_by_doctor_with_the_address_they_came_from(
        desk, caplog):
    caplog.set_level(logging.INFO)
    for _ in range(3):      # 198.51.100.7 is nobody's: RFC 5737
        desk.app.post(URL, b"{}", headers={HEADER: WRONG}, status=401,
                      extra_environ={"REMOTE_ADDR": "198.51.100.7"})
    lines = [line for line in lines_of(caplog) if "401" in line]
    assert len(lines) == 3 and all("198.51.100.7" in line for line in lines)
    inbound.write_counts(desk.store)        # as the courier of `serve` does
    # It has no relay yet, hence a FAIL and exit 1.
    said = [line for line in desk.run("doctor", status=1).splitlines() if "198.51.100.7" in line]
    assert len(said) == 1 and "3" in said[0].replace("198.51.100.7", "")


# The other requests -------------------------------------------------------------------------------

@pytest.mark.parametrize("path", [URL, URL + "/", URL + "?secret=x"])
def test_a_probe_by_get_or_head_is_answered_in_one_line_of_text(desk, path):
    got, head = desk.app.get(path), desk.app.head(path)
    for response in (got, head):
        assert (response.status_int, response.content_type) == (200, "text/plain")
    assert got.text.strip() and got.text.count("\n") <= 1 and head.body == b""


@pytest.mark.parametrize("slash", ["", "/"])
def test_mail_is_posted_with_or_without_a_trailing_slash(desk, slash):
    assert desk.post(desk.mail(), url=URL + slash)["status"] == "created"


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_405_and_told_which_are_allowed(desk, method):
    headers = {HEADER: SECRET}
    for path in (URL, URL + "/"):
        response = desk.app.request(path, method=method, headers=headers, expect_errors=True)
        assert response.status_int == 405 and len(response.json["error"]) > 10
        assert {*response.headers["Allow"].split(", ")} == {"GET", "HEAD", "POST"}
    assert nothing_is_stored(desk)


@pytest.mark.parametrize("path", ["/", "/api", URL[:-1], URL + "s", URL + "//", URL + "/x",
                                  "/healthz/", "/favicon.ico", "/%00", "/%ff", URL.upper()])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_path_is_404_in_json(desk, path, method):
    headers = {HEADER: SECRET}
    response = desk.app.request(path, method=method, headers=headers, expect_errors=True)
    assert (response.status_int, response.content_type) == (404, "application/json")
    assert len(response.json["error"]) > 10 and nothing_is_stored(desk)


def test_every_json_answer_is_one_object_in_utf8(desk):
    for response in (ask(desk, {HEADER: SECRET}), ask(desk, {}),
                     desk.app.get("/healthz", expect_errors=True),
                     desk.app.get("/none", expect_errors=True)):
        assert response.headers["Content-Type"] in ("application/json; charset=utf-8",
                                                    "application/json")
        assert isinstance(json.loads(response.body.decode("utf-8")), dict)


# The body's length --------------------------------------------------------------------------------

def test_a_body_over_the_limit_is_413_and_nothing_is_stored(desk, monkeypatch):
    body = json.dumps(desk.mail())
    monkeypatch.setattr(inbound, "MAX_BODY", len(body) - 1)
    response = desk.request(body)
    assert response.status_int == 413 and str(len(body) - 1) in response.json["error"]
    assert nothing_is_stored(desk)
    monkeypatch.setattr(inbound, "MAX_BODY", len(body))
    assert desk.post(body)["status"] == "created"


def call(desk, body, **environ):
    """Call the app as a server would, but with a Content-Length of our own; return the status."""
    environ = {"REQUEST_METHOD": "POST", "SCRIPT_NAME": "", "PATH_INFO": URL,
               "CONTENT_TYPE": "application/json", "QUERY_STRING": f"secret={SECRET}",
               "wsgi.input": io.BytesIO(body)} | environ
    setup_testing_defaults(environ)
    answers = []

    def start_response(status, headers, exc_info=None):
        answers.append(int(status[:3]))

    result = validator(inbound.make_app(desk.store))(environ, start_response)
    assert isinstance(json.loads(b"".join(result)), dict)
    result.close()
    return answers[0]


@pytest.mark.parametrize("sent, status", [
    (URL, 200), (URL + "?to=//x", 200), ("http://help.example.org" + URL, 200),
    ("HTTPS://help.example.org:443" + URL + "?x", 200), ("/" + URL, 404), (URL + "%2F", 404),
    ("http://help.example.org/" + URL, 404)])
def test_a_path_counts_as_it_was_sent_with_or_without_a_host_before_it(desk, sent, status):
    body = json.dumps(desk.mail()).encode()
    assert call(desk, body, CONTENT_LENGTH=str(len(body)), REQUEST_URI=sent) == status


def test_a_body_shorter_than_its_content_length_is_no_mail(desk):
    body = json.dumps(desk.mail()).encode()
    assert call(desk, body, CONTENT_LENGTH=str(len(body) + 1)) == 400
    assert call(desk, b"", CONTENT_LENGTH="5") == 400
    assert desk.count("ticket") == 0
    assert call(desk, body, CONTENT_LENGTH=str(len(body))) == 200


def test_a_body_longer_than_its_content_length_is_read_no_further(desk):
    body = json.dumps(desk.mail()).encode()
    assert call(desk, body + b"GET / HTTP/1.1", CONTENT_LENGTH=str(len(body))) == 200


def test_a_missing_body_is_400(desk):
    assert call(desk, b"", CONTENT_LENGTH="") == 400
    assert call(desk, b"", CONTENT_LENGTH="0") == 400
    assert desk.count("ticket") == 0


# What /healthz says -------------------------------------------------------------------------------

FINE = (200, {"status": "ok", "warnings": []})


@pytest.fixture
def ready(desk):
    """A desk that /healthz has nothing to say of: it has a secret, an address and a relay."""
    desk.set_account(smtp_host="relay.example")
    return desk


def degraded(desk, word):
    """Assert that /healthz is degraded for one reason that has `word` in it, HEAD too."""
    status, answer = desk.health()
    assert (status, answer["status"]) == (503, "degraded")
    [reason] = answer["reasons"]
    assert word in reason.lower()
    head = desk.app.head("/healthz", expect_errors=True)
    assert (head.status_int, head.body) == (503, b"")


def warned(desk, word):
    status, answer = desk.health()
    assert (status, answer["status"]) == (200, "ok")
    [warning] = answer["warnings"]
    assert word in warning


def test_healthz_of_a_desk_that_is_set_up_is_ok_for_get_and_head(ready):
    assert ready.health() == FINE
    head = ready.app.head("/healthz")
    assert (head.status_int, head.body, head.content_type) == (200, b"", "application/json")


def test_healthz_is_degraded_without_a_secret(ready):
    ready.set_account(inbound_secret=None)
    degraded(ready, "secret")


def test_healthz_is_degraded_when_the_outbox_head_is_an_hour_old(ready):
    ready.post(ready.mail())
    ready.clock.advance(3590)
    assert ready.health() == FINE
    ready.clock.advance(20)
    degraded(ready, "outbox")
    ready.execute("UPDATE outbox SET state = 'sent', next_attempt_at = NULL")
    assert ready.health() == FINE


def test_healthz_is_degraded_while_the_database_is_locked(ready, impatient):
    with ready.locked():
        degraded(ready, "locked")
        response = ready.request(ready.mail())
        assert response.status_int == 503 and int(response.headers["Retry-After"]) > 0
    assert nothing_is_stored(ready)
    assert ready.health() == FINE


def test_healthz_is_degraded_when_the_database_is_none_any_more(ready):
    ready.store.close()
    ready.path.write_bytes(b"no database any more" * 500)
    degraded(ready, "database")
    assert ready.request(ready.mail()).status_int == 503


@contextlib.contextmanager
def without_privileges():
    """Be nobody for a while where we are root, who may write everything."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_healthz_is_degraded_when_the_file_is_read_only(ready, clock):
    ready.store.close()
    with tempfile.TemporaryDirectory() as folder:       # tmp_path is root's alone
        path = shutil.copy(ready.path, folder)
        os.chmod(path, 0o444)
        os.chmod(folder, 0o555)
        with without_privileges(), contextlib.closing(inbound.Store(path, clock)) as store:
            app = webtest.TestApp(inbound.make_app(store))
            answer = app.get("/healthz", status=503).json
            assert answer["status"] == "degraded" and "read" in answer["reasons"][0]
            app.post_json(URL, ready.mail(), headers={HEADER: SECRET}, status=503)
        os.chmod(folder, 0o755)


def test_a_file_that_was_read_only_for_a_while_is_written_as_soon_as_it_may_be(ready, clock):
    # SQLite opens such a file to read, without an error, and would stay with that.
    ready.post(ready.mail())    # loads what nobody may not: root's Python
    ready.store.close()
    mail = ready.mail(text="Again.")
    with tempfile.TemporaryDirectory() as folder:
        path = shutil.copy(ready.path, folder)
        os.chmod(folder, 0o777)
        os.chmod(path, 0o444)
        with without_privileges(), contextlib.closing(inbound.Store(path, clock)) as store:
            app = webtest.TestApp(inbound.make_app(store))
            app.get("/healthz", status=503)
            app.post_json(URL, mail, headers={HEADER: SECRET}, status=503)
            if os.getuid() == 0:
                os.seteuid(0)
            for file in Path(folder).iterdir():     # -wal and -shm got the file's mode
                os.chmod(file, 0o666)
            if os.getuid() == 0:
                os.seteuid(65534)
            app.get("/healthz", status=200)
            answer = app.post_json(URL, mail, headers={HEADER: SECRET}).json
            assert answer["status"] == "created"


@pytest.mark.parametrize("table", ["ticket", "message", "attachment", "outbox"])
def test_healthz_is_degraded_when_the_file_lacks_what_a_message_needs(ready, table):
    assert ready.health() == FINE
    ready.execute(f"DROP TABLE {table}")
    status, answer = ready.health()
    assert (status, answer["status"]) == (503, "degraded")
    assert table in " ".join(answer["reasons"])


def test_the_rehearsal_of_healthz_leaves_nothing_behind(ready):
    before = ready.dump()
    assert ready.health() == FINE
    assert ready.dump() == before
    assert ready.post(ready.mail())["message"] == 1     # nor does it use up numbers


def test_healthz_is_degraded_when_the_disk_is_almost_full(ready, monkeypatch):
    disk = namedtuple("disk", "f_blocks f_bfree f_bavail f_frsize")
    monkeypatch.setattr("os.statvfs", lambda path: disk(1000, 49, 49, 4096))
    degraded(ready, "disk")
    monkeypatch.setattr("os.statvfs", lambda path: disk(1000, 51, 51, 4096))
    assert ready.health() == FINE


def test_healthz_only_warns_of_rejected_mail(ready):
    ready.request({})
    warned(ready, "rejected")


def test_healthz_only_warns_of_failed_confirmations(ready):
    ready.post(ready.mail())
    ready.execute("UPDATE outbox SET state = 'failed', next_attempt_at = NULL, last_error = '550'")
    warned(ready, "sent")


def test_healthz_only_warns_of_what_is_not_set_up(ready):
    ready.set_account(smtp_host=None)
    warned(ready, "relay")
    ready.set_account(smtp_host="relay.example", address="support@localhost")
    warned(ready, "support@localhost")


# A refusal that comes again, and the log ----------------------------------------------------------

def test_a_body_rejected_again_unchanged_updates_its_row(desk):
    for _ in range(3):
        assert desk.request({"text": "no sender"}).status_int == 422
        desk.clock.advance(60)
    assert desk.sql("SELECT tries, received_at, status FROM rejected") == [
        (3, desk.clock() - 60, 422)]
    assert desk.request({"text": "no sender!"}).status_int == 422
    assert desk.count("rejected") == 2 and desk.count("ticket") == 0


def lines_of(caplog):
    return [record.getMessage() for record in caplog.records]


def test_each_request_makes_one_log_line_and_nobody_forges_one(desk, caplog):
    caplog.set_level(logging.INFO)
    for path in ("/a%0aFAKE", "/a%0d%0aFAKE", "/%1b[31mFAKE", "/a%c2%85FAKE", "/%e2%80%a8FAKE"):
        caplog.clear()
        response = desk.app.get(path, expect_errors=True)
        assert response.status_int == 404
        [line] = lines_of(caplog)
        assert line.isascii() and line.isprintable() and "404" in line


def test_the_log_holds_neither_subject_nor_text_of_the_mail(desk, caplog):
    caplog.set_level(logging.DEBUG)
    words = {"subject": "Waldmeister", "text": "Rhabarber", "html": "<p>Holunder</p>"}
    desk.post(desk.mail(**words))
    desk.post(desk.mail(**words))
    desk.post(desk.mail(**words, message_id="<2@x>", in_reply_to="<first@customer.example>"))
    desk.request(desk.mail(**words, attachments="Rhabarber", cc=5))
    desk.request("Rhabarber", "text/plain")
    assert len(lines_of(caplog)) == 5
    assert not any(word in caplog.text for word in ("Waldmeister", "Rhabarber", "Holunder"))


# Over real sockets --------------------------------------------------------------------------------

def exchange(port, request, close=False):
    """Send bytes to the server, return all that it answers until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=LONG) as connection:
        connection.sendall(request)
        if close:
            connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").read()


def request_of(body=b"", *headers, method="POST", path=URL):
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def status_of(answer):
    return int(answer.split(b" ")[1]) if answer else None


def test_real_sockets_get_the_same_answers(serve):
    served = serve(env={"INBOUND_MAX_BODY": "1000"})
    [(secret,)] = served.sql("SELECT inbound_secret FROM email_account")
    mail = json.dumps({"from": "ada@customer.example", "message_id": "<1@x>"}).encode()
    ours, wrong = f"{HEADER}: {secret}", f"{HEADER}: {WRONG}"
    length = f"Content-Length: {len(mail)}"
    for status, request in [
            (401, request_of(mail, length)),
            (401, request_of(mail, length, ours, ours)),
            (401, request_of(mail, length, ours, wrong)),
            (401, request_of(mail, length, wrong)),
            (413, request_of(b"x" * 2000, "Content-Length: 2000", ours)),
            (413, request_of(b"7d0\r\n" + b"x" * 2000 + b"\r\n0\r\n\r\n",
                             "Transfer-Encoding: chunked", ours)),
            (404, request_of(method="GET", path="/a%0aFAKE")),
            (405, request_of(method="DELETE"))]:
        assert status_of(exchange(served.port, request)) == status, request
    short = request_of(mail[:-1], length, ours)
    assert status_of(exchange(served.port, short, close=True)) in (None, 400)
    assert served.sql("SELECT count(*) FROM ticket") == [(0,)]
    head = exchange(served.port, request_of(method="HEAD"))
    assert status_of(head) == 200 and head.endswith(b"\r\n\r\n")
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(mail), mail)
    answer = exchange(served.port, request_of(chunked, "Transfer-Encoding: chunked", ours))
    assert status_of(answer) == 200 and b'"created"' in answer
    served.stop()
    log = served.log_text()
    assert secret not in log and WRONG not in log and "\nFAKE" not in log
