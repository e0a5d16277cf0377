"""From the selector to the endpoint: when a request counts as arrived, whose turn it is, and how
long the keys that were looked at hold (sections 12, 17, 18)."""
from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import time
import unittest
import uuid
from typing import Any, Iterator
from unittest import mock

from socket_client import Socket
from support import DEADLINE_S, REQUESTS, ProxyCase, chat, cp, response, wait_until

WORK_S = 0.06                # that a slow endpoint computes


class ArrivalTest(ProxyCase):
    def setUp(self) -> None:
        super().setUp()
        self.records: list[cp.RequestRecord] = []
        patched = mock.patch.dict(cp.ROUTES, {"/slow": {"GET": self.compute},
                                              "/a/*": {"GET": self.answer},
                                              "/b/*": {"GET": self.answer}})
        patched.start()
        self.addCleanup(patched.stop)

    def answer(self, exchange: Any) -> None:
        self.records.append(exchange.record)
        exchange.reply(b"{}")

    def compute(self, exchange: Any) -> None:
        time.sleep(WORK_S)
        self.answer(exchange)

    def connect(self, count: int) -> list[socket.socket]:
        """So many connections that the loop watches already."""
        clients = [socket.create_connection(("127.0.0.1", self.proxy.port), timeout=DEADLINE_S)
                   for _ in range(count)]
        for client in clients:
            self.addCleanup(client.close)
        self.until_they_wait(count)
        return clients

    def until_they_wait(self, count: int) -> None:
        def waiting() -> int:
            clients = self.proxy.server.loop.clients.copy()
            return sum(isinstance(one.task.what, cp.News) for one in clients if one.task)

        wait_until(lambda: waiting() == count, "all wait for a request")

    @contextlib.contextmanager
    def one_round(self) -> Iterator[None]:
        """The loop finds all that is sent meanwhile in one round."""
        stands, goes_on = threading.Event(), threading.Event()
        self.proxy.server.loop.post(lambda: (stands.set(), goes_on.wait(DEADLINE_S)))
        self.assertTrue(stands.wait(DEADLINE_S))
        yield
        goes_on.set()

    def test_the_time_until_its_turn_belongs_to_a_request(self) -> None:
        clients = self.connect(3)
        with self.one_round():
            for client in clients:
                client.sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for client in clients:
            self.assertEqual(client.recv(12), b"HTTP/1.1 200")
        wait_until(lambda: all(record.total_ms for record in self.records), "all are over")
        for number, record in enumerate(self.records, 1):
            self.assertGreaterEqual(record.total_ms, number * WORK_S * 1000)

    def test_requests_that_came_together_take_turns_with_those_of_others(self) -> None:
        clients = dict(zip("ab", self.connect(2)))
        with self.one_round():
            for name, client in clients.items():
                client.sendall(b"".join(
                    b"GET /%b/%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % (name.encode(), number)
                    for number in range(20)))
        wait_until(lambda: len(self.records) == 40, "all are answered")
        order = "".join(record.asked.path[1] for record in self.records)
        self.assertNotIn("aaa", order)
        self.assertNotIn("bbb", order)

    def test_a_request_that_waits_for_its_turn_at_the_shutdown_is_answered(self) -> None:
        server, busy = self.proxy.server, []
        waits, idle = self.connect(2)
        with self.one_round():
            waits.sendall(b"GET /a/1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            server.loop.post(server._close_idle)
            server.loop.post(lambda: busy.append(server._is_busy()))
        self.assertEqual(waits.recv(12), b"HTTP/1.1 200")
        self.assertEqual(idle.recv(12), b"")
        self.assertEqual(busy, [True])
        self.proxy.settle()
        self.assertFalse(server._is_busy())

    def test_half_a_request_does_not_hold_the_shutdown_up(self) -> None:
        server = self.proxy.server
        (half,) = self.connect(1)
        half.sendall(b"GET /a/1 HTTP/1.1\r\n")
        wait_until(lambda: any(one.ahead for one in server.loop.clients.copy()), "it is read")
        self.until_they_wait(1)
        self.assertFalse(server._is_busy())
        server.loop.post(server._close_idle)
        self.assertEqual(half.recv(12), b"")

    def test_a_message_that_waits_for_its_turn_at_the_shutdown_is_answered(self) -> None:
        server = self.proxy.server
        client, idle = (self.enter(Socket(self.proxy.port)) for _ in range(2))
        self.until_they_wait(2)
        with self.one_round():
            client.create(response("hi"))
            server.loop.post(server._close_idle)
        self.assertEqual(client.event()["type"], "response.created")
        self.assertEqual(idle.wait_closed().code, 1001)

    def test_ids_are_random_and_never_the_same(self) -> None:
        ledger = self.proxy.app.ledger
        asked = cp.AskedFor("POST", "/messages", {}, 0.0, 0.0)
        ids = [ledger.new_record(asked).id for _ in range(5 * cp.IDS_AT_ONCE)]
        self.assertEqual(len(set(ids)), len(ids))
        self.assertEqual([str(uuid.UUID(text)) for text in ids], ids)
        self.assertEqual({uuid.UUID(text).version for text in ids}, {4})


class WakeTest(unittest.TestCase):
    """Who is resumed at once, and who in its turn."""

    def resumed_by(self, work: Any) -> str:
        """The method of the loop that resumes this coroutine of a client after an event."""
        loop = mock.Mock(now=5.0)
        mine, theirs = socket.socketpair()
        self.addCleanup(mine.close)
        self.addCleanup(theirs.close)
        client = cp.ClientConnection(mine, ("127.0.0.1", 1), cp.Settings(), loop)
        client.out += b"x" * (cp.MAX_OUT_BYTES + 1)
        coroutine = work(client)
        self.addCleanup(coroutine.close)
        news = coroutine.send(None)
        news.begin(loop, client.task)
        loop.reset_mock()
        client.wake()
        client.wake()
        (call,) = loop.method_calls
        self.assertEqual(call[1], (client.task, news, 5.0))
        return str(call[0])

    def test_a_request_waits_for_its_turn(self) -> None:
        self.assertEqual(self.resumed_by(lambda client: client.read_head()), "wake_in_turn")
        self.assertEqual(self.resumed_by(lambda client: client.read_body(9, False)),
                         "wake_in_turn")

    def test_a_stream_that_waited_for_a_slow_client_goes_on_at_once(self) -> None:
        self.assertEqual(self.resumed_by(lambda client: client.room()), "resume")
        self.assertEqual(self.resumed_by(lambda client: client.flushed()), "resume")


class SharedHeadTest(ProxyCase):
    def test_no_request_changes_the_head_that_it_shares_with_others(self) -> None:
        parsed = []

        def parse(raw: bytes) -> Any:
            parsed.append((raw, usual(raw)))
            return parsed[-1][1]

        usual = cp.parse_request_head
        fields = {"x-initiator": "agent", "anthropic-beta": "a-1", "user-agent": "tool/1",
                  "anthropic-version": "2023-06-01", "origin": self.proxy.url}
        with mock.patch.object(cp, "parse_request_head", parse):
            for path, make in REQUESTS:
                for _ in range(2):
                    self.assertEqual(self.proxy.post(path, make("hi"), **fields).status, 200)
                self.proxy.stream(path, make("hi", stream=True))
            with Socket(self.proxy.port) as opened:
                opened.turn(response("hi"))
            self.proxy.get("/stats")
        self.assertGreater(len(parsed), 10)
        for raw, (head, length) in parsed:
            self.assertEqual((head, length), cp._parse_request_head(raw))


class KeyTest(ProxyCase):
    def test_a_key_that_another_process_deletes_is_refused_on_open_connections(self) -> None:
        path = os.path.join(self.proxy.data_dir, "proxy_accounts.json")
        elsewhere = cp.KeyFile(path, "github.com", ())
        keys = {name: cp.new_key() for name in ("kept", "deleted")}
        made = {name: elsewhere.add(key) for name, key in keys.items()}
        raw = (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nx-api-key: %b\r\n"
               b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b")
        body = cp.dumps(chat("hi"))
        clients = {}
        for name in keys:
            clients[name] = socket.create_connection(
                ("127.0.0.1", self.proxy.port), timeout=DEADLINE_S)
            self.addCleanup(clients[name].close)

        def status(name: str) -> bytes:
            clients[name].sendall(raw % (keys[name].encode(), len(body), body))
            answer = clients[name].recv(65536)
            while b"}" not in answer:
                answer += clients[name].recv(65536)
            return answer[9:12]

        for _ in range(3):
            self.assertEqual([status("kept"), status("deleted")], [b"200", b"200"])
        elsewhere.delete([made["deleted"].id])
        wait_until(lambda: status("deleted") == b"401", "the deletion is noticed")
        self.assertEqual(status("kept"), b"200")


class KeyFileTest(unittest.TestCase):
    def test_many_requests_at_once_look_at_the_file_once(self) -> None:
        clock = mock.Mock(monotonic=lambda: self.now, time=time.time)
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(cp, "time", clock):
            self.now = 100.0
            path = os.path.join(folder, "k.json")
            mine, other = (cp.KeyFile(path, "github.com", ()) for _ in range(2))
            self.assertEqual(mine.lately(), [])
            other.add("one")
            self.assertEqual(mine.lately(), [])
            self.now += 2 * cp.KEYS_HOLD_S
            self.assertEqual(len(mine.lately()), 1)
            mine.add("two")
            self.assertEqual(len(mine.lately()), 2)


if __name__ == "__main__":
    unittest.main()
