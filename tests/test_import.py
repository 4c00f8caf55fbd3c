"""`import`: an mbox or a Maildir comes in as if posted, of its own dates; nobody is told."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import threading

import pytest

import inbound
from conftest import DAY, LONG, NOON, eventually, mail_from

FROM = "From ada@customer.example Thu Jan  1 00:00:00 2026\n"


def mail(name, *headers, text="", date="Tue, 15 Sep 2026 10:00:00 +0200"):
    """A mail of a person, as a mailbox holds it."""
    lines = [f"From: {name}@{name}.example", f"Message-ID: <{name}@customer.example>",
             f"Subject: subject {name}", *([f"Date: {date}"] if date else []), *headers, "",
             text or f"text {name}", ""]
    return "\n".join(lines)


WRITTEN = 1789459200     # of those without another date


def mbox_of(*mails):
    return "".join(f"{FROM}{each}\n" for each in mails).encode()


@pytest.fixture
def bring_in(desk, tmp_path):
    """Import what is given as an mbox; return the counts that are not 0."""
    def run(content, *argv):
        (tmp_path / "mbox").write_bytes(content)
        counts = json.loads(desk.run("import", str(tmp_path / "mbox"), *argv, "--json"))
        return {name: count for name, count in counts.items() if count}
    return run


def texts(desk):
    return [text for text, in desk.sql("SELECT text FROM message ORDER BY id")]


# What comes in ------------------------------------------------------------------------------------

def test_an_mbox_becomes_tickets_with_the_dates_of_its_mails(desk, bring_in):
    answer = mail("bob", "In-Reply-To: <ada@customer.example>",
                  date="Wed, 16 Sep 2026 10:00:00 +0200")
    assert bring_in(mbox_of(mail("ada"), answer, mail("eve"))) == {"created": 2, "appended": 1}
    assert desk.sql("SELECT requester, status, created_at, updated_at FROM ticket") == [
        ("ada@ada.example", "open", WRITTEN, WRITTEN + DAY),
        ("eve@eve.example", "open", WRITTEN, WRITTEN)]
    assert desk.sql("SELECT received_at FROM message") == [
        (WRITTEN,), (WRITTEN + DAY,), (WRITTEN,)]
    assert texts(desk) == ["text ada\n", "text bob\n", "text eve\n"]


def test_nobody_is_written_to_and_the_reason_says_why(desk, bring_in):
    bring_in(mbox_of(mail("ada")))
    assert desk.count("outbox") == 0
    [(confirmation, reason)] = desk.sql("SELECT confirmation, reason FROM message")
    assert confirmation == "withheld" and "imported" in reason
    assert desk.health()[1]["warnings"] == [
        "support@helpdesk.example has no relay: run `inbound account set --account "
        "support@helpdesk.example smtp_host=…`"]


def test_a_second_import_changes_nothing_and_one_that_was_cut_off_goes_on(desk, bring_in):
    mails = [mail(name) for name in ("ada", "bob", "eve")]
    assert bring_in(mbox_of(*mails[:2])) == {"created": 2}
    assert bring_in(mbox_of(*mails)) == {"created": 1, "duplicate": 2}
    before = desk.dump()
    assert bring_in(mbox_of(*mails)) == {"duplicate": 3}
    assert desk.dump() == before


def test_what_was_posted_before_is_known_and_what_was_imported_is_when_it_is_posted(
        desk, bring_in):
    desk.post(mail("ada").encode(), "message/rfc822")
    assert bring_in(mbox_of(mail("ada"), mail("bob"))) == {"duplicate": 1, "created": 1}
    assert desk.post(mail("bob").encode(), "message/rfc822")["status"] == "duplicate"


def test_a_maildir_and_one_mail_come_in_likewise(desk, tmp_path):
    for folder in ("cur", "new", "tmp"):
        (tmp_path / "box" / folder).mkdir(parents=True)
    (tmp_path / "box/cur/1000.a:2,S").write_text(mail("ada"))
    (tmp_path / "box/new/0999.b").write_text(mail("bob"))
    (tmp_path / "box/new/1001.c").write_text("")
    (tmp_path / "box/cur/.hidden").write_text(mail("hidden"))
    (tmp_path / "box/cur/0000.folder").mkdir()
    (tmp_path / "box/cur/0000.gone").symlink_to("nowhere")
    (tmp_path / "box/tmp/1.half").write_text(mail("half"))
    (tmp_path / "one.eml").write_text(mail("eve").replace("\n", "\r\n"))
    assert "created=2\n" in desk.run("import", str(tmp_path / "box"))
    assert "created=1\n" in desk.run("import", str(tmp_path / "one.eml"))
    assert texts(desk) == ["text bob\n", "text ada\n", "text eve\r\n"]


def test_it_comes_to_the_account_that_is_named(desk, bring_in):
    desk.run("account", "add", "sales@helpdesk.example")
    bring_in(mbox_of(mail("ada")), "--account", "sales@helpdesk.example")
    assert desk.sql("""SELECT address FROM ticket
        JOIN email_account ON email_account.id = ticket.email_account""") == [
            ("sales@helpdesk.example",)]


@pytest.mark.parametrize("make, words", [
    (lambda folder: (folder / "box/new").mkdir(parents=True), "folder without mails"),
    (lambda folder: None, "No such file")])
def test_what_is_no_mailbox_is_refused_in_a_sentence(desk, tmp_path, make, words):
    make(tmp_path)
    line = desk.run("import", str(tmp_path / "box"), status=1)
    assert re.fullmatch(f"inbound: .*{words}.*\n", line)
    assert "there is no account" in desk.run("import", "x", "--account", "a@b", status=1)


def test_mails_that_come_in_share_commits_or_the_wal_grows_five_times_as_large(
        desk, bring_in, monkeypatch):
    commits, commit = [], inbound.Store._commit
    monkeypatch.setattr(inbound.Store, "_commit", lambda store: commits.append(commit(store)))
    assert bring_in(mbox_of(*(mail(f"n{number}") for number in range(50)))) == {"created": 50}
    assert len(commits) < 5
    large = [mail(f"l{number}", text=inbound.GROUP * "x") for number in range(3)]
    assert bring_in(mbox_of(*large)) == {"created": 3}
    assert len(commits) > 3


# How an mbox is taken apart -----------------------------------------------------------------------

MBOXES = [      # content, the texts of its mails
    (mbox_of(mail("a", text="x\n>From here\n>>From there\n> From\nFromage")),
     ["x\nFrom here\n>From there\n> From\nFromage\n"]),
    (mbox_of(mail("a", text="From here on it burns\n\nFrom there, too")),
     ["From here on it burns\n\nFrom there, too\n"]),
    (mbox_of(mail("a", text="x\n\n"), mail("b")), ["x\n\n\n", "text b\n"]),
    (mbox_of(mail("a"), mail("b")).replace(b"\n", b"\r\n"), ["text a\r\n", "text b\r\n"]),
    (mbox_of(mail("a"), mail("b"))[:-2], ["text a\n", "text b"]),
    (mbox_of(mail("a"), "", mail("b")), ["text a\n", "text b\n"]),
    (mbox_of(mail("a")) + b"From - Mon Jan 01 12:00:00 2024\n" + mail("b").encode(),
     ["text a\n", "text b"]),
    (mbox_of(mail("a"), mail("b", text="y" * 3_000_000)), ["text a\n", "y" * 3_000_000 + "\n"]),
    (b"", []),
]


@pytest.mark.parametrize("content, expected", MBOXES)
def test_an_mbox_is_cut_at_its_lines_and_its_quoting_taken_off(desk, bring_in, content, expected):
    bring_in(content)
    assert texts(desk) == expected


def test_an_mbox_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(inbound, "MAX_BODY", 1000)
    (tmp_path / "mbox").write_bytes(mbox_of(mail("a", text="x\n" * 10**6), "y" * 10**6, "z"))
    sizes = [len(each) for each in inbound.mails_in(tmp_path / "mbox")]
    assert len(sizes) == 3 and max(sizes) <= 2000


def test_a_mail_that_is_too_large_is_counted_and_costs_no_other(desk, bring_in, monkeypatch):
    monkeypatch.setattr(inbound, "MAX_BODY", 1000)
    found = bring_in(mbox_of(mail("a"), mail("b", text="x\n" * 1000), mail("c")))
    assert found == {"created": 2, "too_large": 1}
    assert texts(desk) == ["text a\n", "text c\n"] and desk.count("rejected") == 0


def test_what_cannot_be_understood_is_kept_and_counted_and_stays_imported(
        desk, bring_in, monkeypatch):
    with monkeypatch.context() as bug:
        bug.setattr(inbound, "mail_of_mime", lambda content: {}["a bug"])
        assert bring_in(mbox_of(mail("ada"))) == {"quarantined": 1}
    assert desk.count("rejected") == 1 and desk.count("ticket") == 0
    desk.run("rejected", "replay")
    assert desk.count("rejected") == 0 and desk.count("outbox") == 0
    assert desk.sql("SELECT created_at FROM ticket") == [(WRITTEN,)]


# When it was --------------------------------------------------------------------------------------

DATES = [       # the header Date, the time that is stored
    ("Tue, 15 Sep 2026 10:00:00 +0200", WRITTEN),
    ("15 Sep 2026 08:00:00 -0000", WRITTEN),
    ("15 Sep 2026 08:00", WRITTEN),
    ("15 Sep 26 08:00:00 GMT (a comment)", WRITTEN),
    ("Fri, 1 Jan 1983 00:00:00 +0000", 410227200),
    ("Thu, 1 Jan 1970 00:00:00 +0000", NOON),
    ("Fri, 1 Jan 2038 00:00:00 +0000", NOON),
    ("Tue, 99 Foo 2026 99:99:99 +9999", NOON),
    ("Tue, 15 Sep 999999999999999999999 10:00:00 +0200", NOON),
    ("Tue, 15 Sep 2026 10:00:00 +99999999999999999999", NOON),
    ("yesterday", NOON), (" ", NOON), ("", NOON), (None, NOON), ("," * 900, NOON),
]


@pytest.mark.parametrize("date, stored", DATES)
def test_a_mail_is_of_its_date_or_of_now_where_that_makes_no_sense(desk, bring_in, date, stored):
    assert bring_in(mbox_of(mail("ada", date=date))) == {"created": 1}
    assert desk.sql("SELECT created_at, updated_at FROM ticket") == [(stored, stored)]
    assert desk.sql("SELECT received_at FROM message") == [(stored,)]


def test_old_mail_neither_reopens_a_ticket_nor_changes_when_it_was_last_written_to(
        desk, bring_in):
    reference = desk.post(mail_from("ada"))["ticket"]
    desk.run("close", reference)
    old = mail("old", "In-Reply-To: <ada@customer.example>").replace("old@old", "ada@ada")
    assert bring_in(mbox_of(old)) == {"appended": 1}
    assert desk.sql("SELECT status, updated_at FROM ticket") == [("closed", NOON)]
    assert desk.sql("SELECT received_at FROM message ORDER BY id DESC LIMIT 1") == [(WRITTEN,)]


def test_what_came_after_it_was_closed_opens_it_again(desk, bring_in):
    reference = desk.post(mail_from("ada"))["ticket"]
    desk.run("close", reference)
    desk.clock.advance(DAY)
    late = mail("late", "In-Reply-To: <ada@customer.example>",
                date="Mon, 21 Sep 2026 14:13:21 +0000").replace("late@late", "ada@ada")
    bring_in(mbox_of(late))
    assert desk.sql("SELECT status, updated_at FROM ticket") == [("open", NOON + 1)]


def test_our_own_mails_in_it_find_their_ticket_and_are_answered_by_nobody(desk, bring_in):
    reference = desk.post(mail_from("ada"))["ticket"]
    desk.run("reply", reference, stdin="It is out.")
    ours = [content for content, in desk.sql("SELECT content FROM outbox ORDER BY id")]
    desk.run("close", reference)
    before = desk.count("outbox")
    found = bring_in(b"".join(FROM.encode() + each + b"\n" for each in ours))
    assert found == {"appended": 2} and desk.count("outbox") == before
    assert desk.sql("SELECT reference, status FROM ticket") == [(reference, "closed")]
    assert desk.sql("SELECT DISTINCT state FROM outbox") == [("queued",)]


# Progress -----------------------------------------------------------------------------------------

def on_a_terminal(command):
    """Run it with a terminal for its errors: (exit code, its output, what the terminal showed).

    A terminal that nobody reads holds 4 KB; then who writes to it waits.
    """
    master, terminal = pty.openpty()
    with open(master, "rb", 0) as screen, subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=terminal, text=True) as running:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):      # EIO is the end: Linux, nobody has it open
            while piece := screen.read(4096):
                shown += piece
        printed = running.communicate(timeout=LONG)[0]
    return running.returncode, printed, shown.decode()


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["import", "backup"])
def test_a_terminal_sees_a_bar_and_a_pipe_none(desk, tmp_path, verb):
    mails = [mail(f"a{number}", text="x" * 9000) for number in range(20)]
    (tmp_path / "mbox").write_bytes(mbox_of(*mails))
    argument = str(tmp_path / ("mbox" if verb == "import" else "copy.db"))
    command = [sys.executable, inbound.__file__, "--db", str(desk.path), verb, argument]
    code, printed, shown = on_a_terminal(command)
    assert code == 0 and "#" not in printed
    assert re.fullmatch(r"(\[[# ]{40}\] +\d+%\r)+\n", shown)
    assert verb != "import" or re.search(r"\[#{38,40}\] +(9\d|100)%\r\n$", shown)
    quiet = subprocess.run(command, capture_output=True, text=True, timeout=LONG)
    assert (quiet.returncode, quiet.stderr) == (0, "")


@pytest.mark.parametrize("done, line", [
    (0.5, f"[{'#' * 20:40}]  50%"), (2**10, f"[{'#' * 40}] 100%")])     # of a pipe: no size
def test_where_no_terminal_is_a_line_tells_how_far_it_is_now_and_then(
        monkeypatch, capsys, done, line):
    monkeypatch.setattr(inbound, "TELL", 0.001)
    has_told = threading.Event()

    def share():
        has_told.set()
        return done
    with inbound.progress_bar(share):
        assert has_told.wait(LONG)
    lines = capsys.readouterr().err.splitlines()
    assert {*lines} == {line}


@pytest.mark.slow
def test_an_import_that_is_interrupted_says_nothing_and_can_be_gone_on_with(desk, tmp_path):
    half = inbound.GROUP // 2 * "x"
    content = mbox_of(*(mail(f"a{number}", text=half) for number in range(5)))
    pipe, whole = tmp_path / "pipe", tmp_path / "mbox"
    whole.write_bytes(content)
    os.mkfifo(pipe)
    command = [sys.executable, inbound.__file__, "--db", str(desk.path), "import", str(pipe)]
    desk.store.close()
    with (subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running,
          pipe.open("wb") as writing):
        writing.write(content)
        writing.flush()         # and says nothing more: the last mail has no end
        eventually(lambda: desk.count("ticket") == 4)
        running.send_signal(2)
        assert running.communicate(timeout=LONG)[1] == ""
    assert running.returncode == 130 and desk.count("ticket") == 4
    assert "duplicate=4" in desk.run("import", str(whole))
    assert desk.count("ticket") == desk.count("message") == 5
