"""How requests wait: in their order, for half-closed clients, and for threads that are all busy
(sections 13, 17 and 18)."""
from __future__ import annotations

import socket
import threading
import unittest
from typing import Any
from unittest import mock

from cases import SharedCase
from fake_upstream import CHAT, MESSAGES, RESPONSES, Answer
from support import REQUESTS, ProxyCase, RawClient, chat, cp, long_run, post, release, wait_until

UPSTREAM = {"/v1/chat/completions": CHAT, "/v1/responses": RESPONSES, "/v1/messages": MESSAGES}

ENDINGS = {"/v1/chat/completions": b"[DONE]", "/v1/responses": b"response.completed",
           "/v1/messages": b"message_stop"}


class Script:
    """A driver without clock, socket or thread: the test says what each wait ends with."""

    def __init__(self, work: Any) -> None:
        self.work = work
        self.what: Any = None
        self.is_done = False
        self.result: Any = None
        self.go()

    def go(self, value: Any = None, error: BaseException | None = None) -> None:
        """Resume it until it waits again or ends."""
        self.what = None
        try:
            self.what = self.work.send(value) if error is None else self.work.throw(error)
        except StopIteration as end:
            self.is_done, self.result = True, end.value
        except cp.ClientGone:
            self.is_done = True


class RateLineTest(unittest.TestCase):
    """--rate-limit --wait."""

    def setUp(self) -> None:
        patch = mock.patch.object(cp.time, "monotonic", lambda: 1000.0)
        patch.start()
        self.addCleanup(patch.stop)
        self.limiter = cp.RateLimiter(10.0, True)
        self.first = self.wait()
        self.first.go(True)
        self.assertTrue(self.first.is_done)

    def wait(self) -> Script:
        return Script(self.limiter.admit())

    def test_who_leaves_gives_up_his_turn(self) -> None:
        second, third, fourth = self.wait(), self.wait(), self.wait()
        second.go(True)                                     # it is its turn, at 1010
        self.assertIsInstance(second.what, cp.Pause)
        self.assertFalse(third.what.is_set)
        second.go(error=cp.ClientGone())
        self.assertTrue(third.what.is_set, "the place of who has left stays empty")
        third.go(True)
        self.assertEqual(third.what._until, 1010.0)
        self.assertFalse(fourth.what.is_set)

    def test_who_leaves_in_the_middle_keeps_nobody_waiting(self) -> None:
        second, third, fourth = self.wait(), self.wait(), self.wait()
        third.go(error=cp.ClientGone())
        second.go(True)
        second.go()
        self.assertTrue(second.is_done and fourth.what.is_set)

    def test_they_go_in_the_order_of_their_arrival(self) -> None:
        waiting = [self.wait() for _ in range(5)]
        for place, one in enumerate(waiting):
            self.assertEqual([other.what.is_set for other in waiting[place:]],
                             [True] + [False] * (4 - place))
            one.go(True)
            one.go()
            self.assertTrue(one.is_done)

    def test_the_line_is_bounded(self) -> None:
        with mock.patch.object(cp, "RATE_QUEUE", 3):
            waiting = [self.wait() for _ in range(3)]
            with self.assertRaises(cp.RateLimited) as caught:
                self.wait()
        self.assertEqual(caught.exception.headers["retry-after"], "41")
        for one in waiting:
            one.work.close()


class HalfClosedTest(SharedCase):
    """A client that stops sending, as `nc -N` does, still gets its answer."""

    def client(self) -> RawClient:
        client: RawClient = self.enter(RawClient(self.proxy.port))
        client.sock.settimeout(5.0)
        return client

    def test_an_answer_that_the_upstream_thinks_about(self) -> None:
        for path, make in REQUESTS:
            for stream in (False, True):
                with self.subTest(path, stream=stream):
                    self.fake.script(UPSTREAM[path], Answer(status=0, hold=True))
                    client = self.client()
                    client.send(post(path, make("half", stream=stream)))
                    wait_until(lambda: self.fake.holding == 1, "the upstream has the request")
                    client.sock.shutdown(socket.SHUT_WR)
                    wait_until(lambda: any(one.at_end for one in
                                           list(self.proxy.server.loop.clients)), "it is seen")
                    release(self.fake)
                    answer = client.answer()
                    self.assertEqual(answer.status, 200, answer.body)
                    self.assertTrue(client.is_closed())

    def test_a_stream_goes_on_to_its_end(self) -> None:
        for path, make in REQUESTS:
            with self.subTest(path):
                client = self.client()
                client.send(post(path, make("@@events=5 stall=2@@", stream=True)))
                self.assertTrue(self.fake.wait_for(lambda: self.fake.open_streams == 1))
                wait_until(lambda: any(one.exchange and one.exchange.started for one in
                                       list(self.proxy.server.loop.clients)), "it has begun")
                client.sock.shutdown(socket.SHUT_WR)
                wait_until(lambda: any(one.at_end for one in
                                       list(self.proxy.server.loop.clients)), "it is seen")
                release(self.fake)
                answer = client.answer()
                self.assertEqual(answer.status, 200)
                self.assertIn(ENDINGS[path], answer.body)

    def test_requests_sent_ahead_are_answered_before_the_end(self) -> None:
        client = self.client()
        client.send(b"".join(post("/v1/chat/completions", chat("turn %d" % at))
                             for at in range(3)))
        client.sock.shutdown(socket.SHUT_WR)
        for at in range(3):
            self.assertIn(b"turn %d" % at, client.answer().body)
        self.assertTrue(client.is_closed())


class BusyTest(ProxyCase):
    """The threads are bounded, and so is what waits for one."""

    def test_where_no_thread_is_left_the_answer_is_503_in_the_dialect(self) -> None:
        self.assertEqual(self.proxy.get("/v1/models").status, 200)
        large = "b" * (2 * cp.INLINE_BYTES)
        with mock.patch.object(cp, "WORKER_QUEUE", 0):
            for path, make in REQUESTS:
                with self.subTest(path):
                    reply = self.proxy.post(path, make(large))
                    self.assertEqual(reply.status, 503, reply.body)
                    self.assertEqual("type" in reply.json, path == "/v1/messages")
                    self.assertEqual(reply.headers["retry-after"], "1")
                    self.assertEqual(self.proxy.post(path, make("small")).status, 200)
        for path, make in REQUESTS:
            self.assertEqual(self.proxy.post(path, make(large)).status, 200)

    @long_run
    def test_many_large_requests_use_few_threads(self) -> None:
        large = "b" * (2 * cp.INLINE_BYTES)
        statuses: list[int] = []
        askers = [threading.Thread(target=lambda: statuses.append(
            self.proxy.post("/v1/chat/completions", chat(large)).status)) for _ in range(20)]
        for asker in askers:
            asker.start()
        most = 0
        while any(asker.is_alive() for asker in askers):
            most = max(most, sum(thread.name == "worker" for thread in threading.enumerate()))
            askers[0].join(0.002)
        self.assertEqual(statuses, [200] * 20)
        self.assertLessEqual(most, cp.MAX_WORKERS)


if __name__ == "__main__":
    unittest.main()
