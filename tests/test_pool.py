"""Connections to the upstream: used again, replaced, never shared wrongly (section 13)."""
from __future__ import annotations

import unittest
from typing import Any

from support import PATHS, REQUESTS, ProxyCase, chat, said
from fake_upstream import CHAT, Answer


class PoolTest(ProxyCase):
    def ask(self, text: str = "a") -> Any:
        return self.proxy.post("/v1/chat/completions", chat(text))

    def test_fifty_requests_need_few_connections(self) -> None:
        for number in range(50):
            path, make = REQUESTS[number % 3]
            self.assertEqual(self.proxy.post(path, make("a", stream=number % 2 == 0)).status, 200)
        self.assertLessEqual(self.fake.connections, 4)

    def test_a_connection_is_reused_after_an_error_answer(self) -> None:
        self.ask()
        for _ in range(5):
            self.fake.script(CHAT, Answer(status=400, body={"error": {"message": "no"}}))
            self.assertEqual(self.ask().status, 400)
        self.assertLessEqual(self.fake.connections, 3)

    def test_a_connection_that_closed_unannounced_is_replaced_silently(self) -> None:
        for _ in range(5):
            self.fake.script(CHAT, Answer(stale=True, body={"id": "a", "choices": [
                {"message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}]}))
            self.assertEqual(said(self.ask()), "x")
            self.assertEqual(said(self.ask("again")), "Echo: again")

    def test_connections_that_all_closed_are_replaced_silently(self) -> None:
        for stream in (False, True):
            for path, make in REQUESTS:
                self.proxy.post(path, make("a"))
                self.fake.hang_up()
                reply = self.proxy.post(path, make("b", stream=stream))
                self.assertEqual(reply.status, 200, reply.body)

    def test_a_connection_with_unread_bytes_is_never_reused(self) -> None:
        for announced in (3, 12):
            stray = {"transfer-encoding": "identity", "content-length": str(announced),
                     "content-type": "application/json"}
            self.fake.script(CHAT, Answer(headers=stray, chunks=[b'{"choices":[]}' * 20]))
            self.assertEqual(self.ask().status, 502)
            number = self.fake.last(CHAT).connection
            for text in ("b", "c"):
                self.assertEqual(said(self.ask(text)), "Echo: " + text)
                self.assertNotEqual(self.fake.last(CHAT).connection, number)

    def test_a_connection_is_not_reused_after_a_cut_stream(self) -> None:
        self.proxy.stream("/v1/chat/completions", chat("@@events=5 error=2@@"))
        self.proxy.stream("/v1/chat/completions", chat("@@events=5 cut=2@@"))
        number = self.fake.last(CHAT).connection
        self.assertEqual(said(self.ask("b")), "Echo: b")
        self.assertNotEqual(self.fake.last(CHAT).connection, number)

    def test_a_hang_up_after_the_request_was_sent_is_not_replayed(self) -> None:
        """The upstream may have begun to work: a second try could be billed twice."""
        self.proxy.get("/v1/models")
        self.proxy.app.upstream.pool.clear()
        for path, make in REQUESTS:
            self.fake.script(PATHS[path], Answer(drop="after"))
            reply = self.proxy.post(path, make("a"))
            self.assertEqual(reply.status, 502, reply.body)
            self.assertEqual(self.fake.count(PATHS[path]), 1)
            self.proxy.app.upstream.pool.clear()


if __name__ == "__main__":
    unittest.main()
