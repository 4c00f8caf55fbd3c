"""The Dispatcher that stands in waitress's place: who shares a sync, and who waits for whom."""

import base64
import json
import os
import re
import socket
import threading
from pathlib import Path

import pytest
import waitress.server
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel

import inbound
from conftest import HEADER, SECRET, URL, eventually, mail_from

pytestmark = pytest.mark.slow


def post_of(name, secret=SECRET, **fields):
    """The bytes of a request."""
    body = json.dumps(mail_from(name, **fields)).encode()
    return (f"POST {URL} HTTP/1.1\r\nHost: x\r\n{HEADER}: {secret}\r\n"
            "Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n").encode() + body


@pytest.fixture
def dispatcher(desk):
    made = inbound.Dispatcher(desk.store)
    yield made
    made.shutdown()


class Loop:
    """waitress with a dispatcher, and clients that have sent what they are given."""

    def __init__(self, desk, dispatcher):
        self.server = waitress.server.create_server(
            inbound.make_app(desk.store), map={}, _dispatcher=dispatcher, listen="127.0.0.1:0",
            asyncore_use_poll=True)
        self.server.adj.send_bytes = 4096
        self.clients = []

    def send(self, *pieces):
        """Connect for each piece in their order, and have waitress read it."""
        for piece in pieces:
            client = socket.create_connection(("127.0.0.1", self.server.effective_port))
            client.settimeout(10)
            client.sendall(piece)
            self.clients.append(client)
            eventually(self.has_read)

    def has_read(self):
        self.turn()
        dispatcher = self.server.task_dispatcher
        return dispatcher.threads or len(dispatcher.waiting) == len(self.clients)

    def turn(self):
        waitress.wasyncore.poll2(0.01, self.server._map)

    def answers(self):
        """The status of each client's answer."""
        found = []
        for client in self.clients:
            client.setblocking(False)
            try:
                found.append(client.recv(65536).split(b" ")[1].decode())
            except BlockingIOError:
                found.append("")
        return found

    def close(self):
        for client in self.clients:
            client.close()
        waitress.wasyncore.close_all(self.server._map)


@pytest.fixture
def loop(desk, monkeypatch):
    """A Loop whose dispatcher has no threads: the test takes and serves itself."""
    monkeypatch.setattr(inbound, "THREADS", 0)
    made = Loop(desk, inbound.Dispatcher(desk.store))
    yield made
    made.close()


def test_what_is_relied_on_of_waitress_is_there():
    assert Adjustments(listen="127.0.0.1:0").send_bytes == 1
    assert HTTPChannel.task_class.get_environment and HTTPChannel.service
    assert "_dispatcher" in waitress.server.create_server.__code__.co_varnames


def test_requests_that_wait_share_a_commit_and_each_has_its_answer(desk, loop):
    statements = []
    desk.store.write(lambda db, now: db.set_trace_callback(statements.append))
    loop.send(*(post_of(f"n{number}") for number in range(8)), b"GET /healthz HTTP/1.0\r\n\r\n",
              post_of("stranger", secret="w" * 32), b"nonsense\r\n\r\n",
              post_of("broken", **{"from": "nobody at all"}))
    group = loop.server.task_dispatcher.take()
    statements.clear()
    loop.server.task_dispatcher.serve(group)
    loop.turn()
    assert loop.answers() == ["200"] * 9 + ["401", "400", "422"]
    assert statements.count("COMMIT") == 1
    assert desk.count("ticket") == 8 and desk.count("rejected") == 1


def test_who_needs_no_commit_does_not_wait_for_one(
        desk, loop, impatient, monkeypatch):
    loop.send(post_of("ada"), post_of("stranger", secret="w" * 32))
    group = loop.server.task_dispatcher.take()
    with desk.locked():
        order = []
        service = HTTPChannel.service
        monkeypatch.setattr(
            HTTPChannel, "service", lambda self: (order.append(self), service(self)))
        loop.server.task_dispatcher.serve(group)
        loop.turn()
    assert loop.answers() == ["503", "401"]
    assert order == [group[1], group[0]]


def test_a_group_of_strangers_does_not_wait_for_another_s_commit(desk, loop):
    loop.send(post_of("a", secret="w" * 32), post_of("b", secret="w" * 32))
    group = loop.server.task_dispatcher.take()
    serving = threading.Thread(target=loop.server.task_dispatcher.serve, args=[group])
    with desk.store._lock:      # as it is while one waits for the lock or the disk
        serving.start()
        serving.join(10)
        assert not serving.is_alive()


def test_a_large_post_is_alone(loop):
    loop.send(post_of("a"), post_of("large", text="x" * inbound.GROUP), post_of("b"), post_of("c"))
    first = loop.server.task_dispatcher.take()
    dispatcher = loop.server.task_dispatcher
    assert [len(group) for group in (first, dispatcher.take(), dispatcher.take())] == [1, 1, 2]
    assert not dispatcher.waiting


def test_what_a_request_held_is_given_back(loop):
    loop.send(post_of("ada"))
    [channel] = loop.server.task_dispatcher.take()
    loop.server.task_dispatcher.serve([channel])
    assert channel.requests == [] and "task_class" not in vars(channel)


def test_a_bug_before_the_commit_is_answered_and_costs_nobody_else(desk, loop, monkeypatch):
    loop.send(post_of("a"), post_of("b"))
    group = loop.server.task_dispatcher.take()
    monkeypatch.setattr(group[0].task_class, "get_environment", fails_for(group[0]))
    loop.server.task_dispatcher.serve(group)
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
    served = serve()
    served.set_account(inbound_secret=SECRET)
    with served.locked():
        late = threading.Thread(target=served.post, args=[mail_from("late")])
        late.start()
        # The lock is waited for, for two seconds; meanwhile others are answered.
        for _ in range(3):
            assert served.post(b"{}", headers={HEADER: "w" * 32})[0] == 401
        assert late.is_alive()
    late.join(20)
    assert not late.is_alive()


def test_threads_do_not_work_at_once(desk, dispatcher):
    """Of many that are woken one works; `changed` is where the others stand by."""
    at_work, most = [], []

    class Channel:
        server = type("Server", (), {"active_channels": {}})
        requests = [type("Request", (), {"body_rcv": b"x", "error": None})]

        def task_class(self, *_):
            return type("Task", (), {"request": self.requests[0],
                                     "get_environment": lambda task: 1 / 0})()

        def service(self):
            at_work.append(self)
            most.append(len(at_work))
            at_work.remove(self)
            done.release()

    done = threading.Semaphore(0)
    for _ in range(200):
        dispatcher.add_task(Channel())
    for _ in range(200):
        assert done.acquire(timeout=10)
    assert max(most) == 1


def test_requests_in_one_piece_are_answered_in_their_order(serve):
    served = serve()
    served.set_account(inbound_secret=SECRET)
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        client.sendall(post_of("a") + post_of("b", secret="w" * 32) + post_of("c"))
        received = b""
        while received.count(b"HTTP/1.1") < 3 or not received.endswith(b"}\n"):
            received += client.recv(65536)
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"401", b"200"]


def test_an_answer_leaves_in_one_piece(serve):
    served = serve()
    served.set_account(inbound_secret=SECRET)
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        client.sendall(post_of("ada"))
        assert client.recv(65536).endswith(b"}\n")


def test_a_stop_sends_the_answers_that_were_due(desk, monkeypatch):
    monkeypatch.setattr(inbound, "THREADS", 1)
    made = Loop(desk, inbound.Dispatcher(desk.store))
    made.send(post_of("ada"))

    def is_stored():
        made.turn()
        return desk.count("ticket")

    eventually(is_stored)
    made.server.task_dispatcher.shutdown()      # after which waitress's loop turns no more
    assert made.clients[0].recv(65536).startswith(b"HTTP/1.1 200")
    made.close()


def test_the_memory_of_a_large_mail_is_given_back(serve):
    served = serve()
    served.set_account(inbound_secret=SECRET)
    served.post(mail_from("first"))
    before = resident(served)
    for megabytes in (8, 24):
        content = base64.b64encode(os.urandom(megabytes * 2**20)).decode()
        assert served.post(mail_from(f"n{megabytes}", attachments=[{"content": content}]))[0] == 200
        eventually(lambda: resident(served) - before < 8 * 2**20, timeout=5)


def resident(served):
    """Bytes of memory that a server has."""
    status = Path(f"/proc/{served.process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])


def test_what_waitress_raises_ends_no_thread_and_costs_nobody_else(desk, loop, monkeypatch):
    loop.send(post_of("a", secret="w" * 32), post_of("b"), post_of("c"))
    group = loop.server.task_dispatcher.take()
    service = HTTPChannel.service

    def service_of(channel):
        service(channel)
        if channel in group[:2]:        # as send_continue() does for who has hung up
            raise ValueError("Can't skip 255 bytes in buffer of 0 bytes")

    monkeypatch.setattr(HTTPChannel, "service", service_of)
    loop.server.task_dispatcher.serve(group)
    loop.turn()
    assert loop.answers() == ["401", "200", "200"]
