"""The Dispatcher that stands in waitress's place: who leads, who shares a sync and with whom."""

import base64
import contextlib
import inspect
import json
import os
import re
import socket
import threading
import time
from pathlib import Path

import pytest
import waitress.server
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel

import inbound
from conftest import (
    HEADER,
    LONG,
    SECRET,
    URL,
    at_least_once,
    eventually,
    is_answered,
    mail_from,
)

pytestmark = pytest.mark.slow


def post_of(name, secret=SECRET, **fields):
    """The bytes of a request."""
    body = json.dumps(mail_from(name, **fields)).encode()
    return (f"POST {URL} HTTP/1.1\r\nHost: x\r\n{HEADER}: {secret}\r\n"
            "Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n").encode() + body


class Loop:
    """waitress with a Dispatcher, and clients that have sent what they are given."""

    def __init__(self, desk):
        self.dispatcher = inbound.Dispatcher(desk.store)
        self.server = inbound.create_server(desk.store, self.dispatcher, "127.0.0.1:0")
        self.clients = []

    def send(self, *pieces):
        """Connect for each piece in their order, and have waitress read it."""
        for piece in pieces:
            client = socket.create_connection(("127.0.0.1", self.server.effective_port))
            client.settimeout(LONG)
            client.sendall(piece)
            self.clients.append(client)
            eventually(self.has_read)

    def has_read(self):
        self.turn()
        read = len(self.dispatcher.waiting) + self.dispatcher.large.qsize()
        return read == len(self.clients)

    def turn(self):
        waitress.wasyncore.poll2(0.01, self.dispatcher.sockets)

    def answers(self):
        """The status of each client's answer; TimeoutError where one gets none."""
        return [client.recv(65536).split(b" ")[1].decode() for client in self.clients]

    def close(self):
        for client in self.clients:
            client.close()
        waitress.wasyncore.close_all(self.dispatcher.sockets)


@pytest.fixture
def loop(desk):
    """A Loop whose Dispatcher was not started: the test reads, takes and serves itself."""
    made = Loop(desk)
    yield made
    made.close()


def test_what_is_relied_on_of_waitress_is_there():
    assert Adjustments(listen="127.0.0.1:0").send_bytes == 1
    assert HTTPChannel.task_class.get_environment and HTTPChannel.service
    assert HTTPChannel._flush_some_if_lockable and HTTPChannel.total_outbufs_len == 0
    arguments = inspect.signature(waitress.server.create_server).parameters
    assert {"map", "_dispatcher"} <= arguments.keys()
    assert [*inspect.signature(waitress.wasyncore.poll2).parameters] == ["timeout", "map"]


def test_who_waits_at_the_sockets_can_be_woken(loop):
    assert [each for each in loop.dispatcher.sockets.values() if hasattr(each, "pull_trigger")]
    loop.server.pull_trigger()
    began = time.monotonic()
    waitress.wasyncore.poll2(20, loop.dispatcher.sockets)
    assert time.monotonic() - began < 10


def test_requests_that_wait_share_a_commit_and_each_has_its_answer(desk, loop):
    statements = []
    desk.store.write(lambda db, now: db.set_trace_callback(statements.append))
    loop.send(*(post_of(f"n{number}") for number in range(8)), b"GET /healthz HTTP/1.0\r\n\r\n",
              post_of("stranger", secret="w" * 32), b"nonsense\r\n\r\n",
              post_of("broken", **{"from": "nobody at all"}))
    group = loop.dispatcher.take()
    statements.clear()
    loop.dispatcher.serve(group)
    loop.turn()
    assert loop.answers() == ["200"] * 9 + ["401", "400", "422"]
    assert statements.count("COMMIT") == 1
    assert desk.count("ticket") == 8 and desk.count("rejected") == 1


def test_who_needs_no_commit_does_not_wait_for_one(
        desk, loop, impatient, monkeypatch):
    loop.send(post_of("ada"), post_of("stranger", secret="w" * 32))
    group = loop.dispatcher.take()
    with desk.locked():
        order = []
        service = HTTPChannel.service
        monkeypatch.setattr(
            HTTPChannel, "service", lambda self: (order.append(self), service(self)))
        loop.dispatcher.serve(group)
        loop.turn()
    assert loop.answers() == ["503", "401"]
    assert order == [group[1], group[0]]


def test_a_group_of_strangers_does_not_wait_for_another_s_commit(desk, loop):
    loop.send(post_of("a", secret="w" * 32), post_of("b", secret="w" * 32))
    group = loop.dispatcher.take()
    serving = threading.Thread(target=loop.dispatcher.serve, args=[group])
    with desk.store._lock:      # as it is while one waits for the lock or the disk
        serving.start()
        serving.join(LONG)
        assert not serving.is_alive()


def test_requests_that_come_together_read_the_settings_once_and_the_next_anew(
        desk, loop, monkeypatch):
    read, rows = [], desk.store.rows
    monkeypatch.setattr(desk.store, "rows", lambda query, parameters=(): (
        read.append("secret" in query), rows(query, parameters))[1])
    loop.send(*(post_of(f"n{number}") for number in range(3)), post_of("x", secret="w" * 32))
    loop.dispatcher.serve(loop.dispatcher.take())
    assert read.count(True) == 1
    desk.set_account(inbound_secret="w" * 32)
    while loop.clients:
        loop.clients.pop().close()
    loop.send(post_of("a"), post_of("b", secret="w" * 32))
    loop.dispatcher.serve(loop.dispatcher.take())
    loop.turn()
    assert loop.answers() == ["401", "200"]


def test_one_look_at_the_sockets_takes_little_of_each(desk, loop):
    """waitress copies all that it has read for each tiny request, or chunk, that is in it."""
    loop.send(2**12 * b"GET / HTTP/1.1\r\n\r\n")
    [channel] = loop.dispatcher.take()
    assert len(channel.requests) < 2**9


def test_no_more_connect_than_there_are_descriptors_for_with_their_bodies(desk, monkeypatch):
    """waitress logs 6 MB a second of who cannot be accepted."""
    monkeypatch.setattr(inbound.resource, "getrlimit", lambda _: (64, 64))
    with contextlib.closing(Loop(desk)) as loop:
        assert 2 < loop.server.adj.connection_limit < 25


def test_what_strangers_send_on_all_connections_takes_little_memory(loop):
    most = loop.server.adj.inbuf_overflow + loop.server.adj.max_request_header_size
    assert loop.server.adj.connection_limit * most < 100 * 2**20


def test_posts_share_a_sync_up_to_a_size_and_a_large_one_is_alone(loop):
    most = "x" * (inbound.LARGE - 2**9)     # which leave room for the rest of a post
    fit = inbound.GROUP // inbound.LARGE
    loop.send(*(post_of(f"n{number}", text=most) for number in range(fit + 1)),
              post_of("large", text=inbound.LARGE * "x"), post_of("small"))
    sizes = []
    while group := loop.dispatcher.take():
        sizes.append(len(group))
        loop.dispatcher.serve(group)
    assert sizes == [fit, 2] and loop.dispatcher.large.qsize() == 1
    loop.dispatcher.serve([loop.dispatcher.large.get()])    # which closes its file


def test_the_threads_last_as_long_as_the_lock_and_the_replica():
    """Each leader that posts keep at the lock is replaced after PATIENCE."""
    assert inbound.THREADS * inbound.PATIENCE > inbound.BUSY_TIMEOUT + inbound.REPLICATION


def test_large_posts_take_no_thread_from_who_is_quick(loop, monkeypatch):
    monkeypatch.setattr(inbound, "LARGE", 2**10)
    monkeypatch.setattr(inbound, "HEAVY", 2**10)
    monkeypatch.setattr(inbound, "HEAVY_WAIT", 2 * LONG)
    with inbound.HEAVY_LOCK:        # as it is while a large one is understood
        loop.send(*(post_of(f"n{number}", text=2**10 * "x") for number in range(inbound.THREADS)),
                  b"GET / HTTP/1.1\r\n\r\n")
        loop.dispatcher.start()
        quick = loop.clients.pop()
        assert quick.recv(65536).startswith(b"HTTP/1.1 404")        # or a time-out
    assert loop.answers() == inbound.THREADS * ["200"]
    loop.dispatcher.shutdown()
    quick.close()


def test_what_a_request_held_is_given_back(loop):
    loop.send(post_of("ada"))
    [channel] = loop.dispatcher.take()
    loop.dispatcher.serve([channel])
    assert channel.requests == [] and "task_class" not in vars(channel)


def test_a_bug_before_the_commit_is_answered_and_costs_nobody_else(desk, loop, monkeypatch):
    loop.send(post_of("a"), post_of("b"))
    group = loop.dispatcher.take()
    monkeypatch.setattr(group[0].task_class, "get_environment", fails_for(group[0]))
    loop.dispatcher.serve(group)
    loop.turn()
    assert loop.answers() == ["500", "200"]
    assert desk.count("ticket") == 1


def fails_for(channel):
    whole = HTTPChannel.task_class.get_environment

    def get_environment(task):
        if task.channel is channel:
            raise ValueError("a bug")
        return whole(task)

    return get_environment


def test_another_thread_steps_in_where_the_one_is_away(serve):
    def are_answered_meanwhile():
        served = serve()        # one that has not seen the lock: it waits for none twice
        served.set_account(inbound_secret=SECRET)
        with served.locked(), contextlib.closing(served.send(mail_from("late"))) as late:
            # The lock is waited for, for two seconds; meanwhile others are answered.
            for _ in range(3):
                assert served.post(b"{}", headers={HEADER: "w" * 32})[0] == 401
            return not is_answered(late)

    at_least_once(are_answered_meanwhile)


class Work:
    """What a poll brings: `count` channels, whose requests do nothing, one at each look."""

    def __init__(self, dispatcher, count):
        self.dispatcher, self.count = dispatcher, count
        self.at_work, self.most, self.done = [], [], threading.Semaphore(0)

    def poll(self, seconds, sockets):
        with busy(self):
            if self.count:
                self.count -= 1
                self.dispatcher.add_task(Channel(self))
            else:
                time.sleep(min(seconds, 0.01))      # as select does while nothing comes

    def answer(self):
        with busy(self):
            self.done.release()


@contextlib.contextmanager
def busy(work):
    work.at_work.append(threading.current_thread())
    work.most.append(len(work.at_work))
    yield
    work.at_work.pop()


class Channel:
    requests = [type("Request", (), {"body_rcv": b"x", "error": None})]
    total_outbufs_len = 0

    def __init__(self, work):
        self.service = work.answer

    def task_class(self, *_):
        return type("Task", (), {"get_environment": lambda task: 1 / 0})()


def test_one_thread_reads_and_serves(desk, monkeypatch):
    monkeypatch.setattr(inbound, "PATIENCE", 10)    # or one that is kept waiting is away
    dispatcher = inbound.Dispatcher(desk.store)
    work = Work(dispatcher, 200)
    dispatcher.poll = work.poll
    dispatcher.start()
    for _ in range(200):
        assert work.done.acquire(timeout=LONG)
    dispatcher.shutdown()
    assert max(work.most) == 1


def test_who_comes_back_to_a_lead_that_another_took_stands_by(desk, monkeypatch):
    """Two are at work then, but only one is at the sockets."""
    dispatcher = inbound.Dispatcher(desk.store)
    at_sockets, most, away, back = [], [], threading.Event(), threading.Event()
    wanted, served = threading.Semaphore(1), threading.Semaphore(0)

    def poll(seconds, sockets):
        at_sockets.append(1)
        most.append(len(at_sockets))
        if wanted.acquire(timeout=min(seconds, 0.01)):
            dispatcher.waiting.append("quick" if away.is_set() else "slow")
        at_sockets.pop()

    def serve(group):
        if "slow" in group:
            away.set()
            back.wait(LONG)
        served.release()

    monkeypatch.setattr(dispatcher, "take", lambda: [
        dispatcher.waiting.popleft() for _ in range(len(dispatcher.waiting))])
    monkeypatch.setattr(dispatcher, "serve", serve)
    dispatcher.poll = poll
    dispatcher.start()
    assert away.wait(LONG)
    for _quick in range(20):
        wanted.release()
        assert served.acquire(timeout=LONG)       # while the slow one is away
    back.set()
    assert served.acquire(timeout=LONG)
    for _quick in range(20):
        wanted.release()
        assert served.acquire(timeout=LONG)
    dispatcher.shutdown()
    assert max(most) == 1
    eventually(lambda: not any(thread.is_alive() for thread in dispatcher.threads))


def test_a_poll_that_fails_ends_the_server_loudly(desk, monkeypatch, caplog):
    killed = threading.Event()
    monkeypatch.setattr(inbound.os, "kill", lambda *_: killed.set())
    dispatcher = inbound.Dispatcher(desk.store)
    dispatcher.poll = lambda *_: 1 / 0
    dispatcher.start()
    assert killed.wait(LONG)
    dispatcher.shutdown()
    assert "ending, to start anew" in caplog.text


def test_requests_in_one_piece_are_answered_in_their_order(serve):
    served = serve()
    served.set_account(inbound_secret=SECRET)
    with socket.create_connection(("127.0.0.1", served.port), timeout=LONG) as client:
        client.sendall(post_of("a") + post_of("b", secret="w" * 32) + post_of("c"))
        received = b""
        while received.count(b"HTTP/1.1") < 3 or not received.endswith(b"}\n"):
            received += client.recv(65536)
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"401", b"200"]


def test_a_short_answer_does_not_wait_for_the_next_in_its_connection(serve):
    def comes_before_the_lock_is_given_up():
        served = serve()        # one that has not seen the lock: it waits for none twice
        served.set_account(inbound_secret=SECRET)
        with socket.create_connection(("127.0.0.1", served.port), timeout=LONG) as client:
            with served.locked():
                client.sendall(b"HEAD /x HTTP/1.1\r\n\r\n" + post_of("ada"))
                received = client.recv(65536)
            while received.count(b"HTTP/1.1") < 2:
                piece = client.recv(65536)
                assert piece, received
                received += piece
        first, second = re.findall(rb"HTTP/1.1 (\d+)", received)
        assert first == b"404"
        return second == b"200"

    at_least_once(comes_before_the_lock_is_given_up)


def test_many_descriptors_may_be_open(serve):
    limits = Path(f"/proc/{serve().process.pid}/limits").read_text()
    soft, hard = re.search(r"Max open files\s+(\d+)\s+(\d+)", limits).groups()
    assert int(soft) >= min(inbound.DESCRIPTORS, int(hard))


def test_a_refusal_is_read_before_the_connection_ends(serve):
    served = serve()
    head = post_of("large").partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    for refused in (re.sub(rb"(?<=Length: )\d+", b"%d" % (inbound.MAX_BODY + 2), head),
                    re.sub(rb"(?<=Length: )\d+", b"x", head)):
        with socket.create_connection(("127.0.0.1", served.port), timeout=LONG) as client:
            client.sendall(refused + bytes(2**16))
            received = b""
            while piece := client.recv(65536):
                received += piece
            assert re.match(rb"HTTP/1.[01] 4(?:13|00) ", received)
            for _ in range(64):         # no reset
                client.sendall(bytes(2**16))
    with socket.create_connection(("127.0.0.1", served.port), timeout=LONG) as client:
        client.sendall(b"nonsense\r\n\r\n")
        assert client.recv(65536) and client.recv(65536) == b""


def test_an_answer_leaves_in_one_piece(serve):
    served = serve()
    served.set_account(inbound_secret=SECRET)
    with socket.create_connection(("127.0.0.1", served.port), timeout=LONG) as client:
        client.sendall(post_of("ada"))
        assert client.recv(65536).endswith(b"}\n")


def test_a_stop_serves_what_was_read_and_sends_the_answers(desk, loop, monkeypatch):
    loop.send(post_of("ada"), b"GET / HTTP/1.0\r\n\r\n")     # whose answer is short
    stopped = threading.Event()
    loop.dispatcher.poll = lambda seconds, sockets: stopped.wait(LONG)
    loop.dispatcher.start()
    monkeypatch.setattr(loop.server.trigger, "pull_trigger", stopped.set)
    loop.dispatcher.shutdown()
    loop.turn()
    assert loop.answers() == ["200", "404"]


def test_the_memory_of_a_large_mail_is_given_back(serve):
    served = serve()
    served.set_account(inbound_secret=SECRET)
    served.post(mail_from("first"))
    before = resident(served)
    for megabytes in (8, 24):
        content = base64.b64encode(os.urandom(megabytes * 2**20)).decode()
        assert served.post(mail_from(f"n{megabytes}", attachments=[{"content": content}]))[0] == 200
        eventually(lambda: resident(served) - before < 8 * 2**20)


def resident(served):
    """Bytes of memory that a server has."""
    status = Path(f"/proc/{served.process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])


def test_what_waitress_raises_ends_no_thread_and_costs_nobody_else(desk, loop, monkeypatch):
    loop.send(post_of("a", secret="w" * 32), post_of("b"), post_of("c"))
    group = loop.dispatcher.take()
    service = HTTPChannel.service

    def service_of(channel):
        service(channel)
        if channel in group[:2]:        # as send_continue() does for who has hung up
            raise ValueError("Can't skip 255 bytes in buffer of 0 bytes")

    monkeypatch.setattr(HTTPChannel, "service", service_of)
    loop.dispatcher.serve(group)
    loop.turn()
    assert loop.answers() == ["401", "200", "200"]
