"""Searches of the web in the middle of an answer, made by the proxy (sections 7, 9, 20)."""
from __future__ import annotations

import unittest
from typing import Any
from unittest import mock

from support import ProxyCase, chat, cp, message, response
from fake_upstream import CHAT, MESSAGES, RESPONSES, Answer


class LateRefusalTest(ProxyCase):
    """A second try that cannot be made, once a keep-alive has begun the stream."""
    settings = dict(keepalive_s=0.05, fallback="text-embedding-3-small")  # which cannot chat

    def test_the_stream_ends_with_an_error_of_its_dialect(self) -> None:
        usual = cp.fall_back

        async def slowly(exchange: Any, *given: Any) -> Any:
            while not exchange.started:
                await cp.wait(cp.Pause(0.01))
            return await usual(exchange, *given)

        for path, upstream, body, sign in (
                ("/v1/chat/completions", CHAT, chat("a", stream=True), '{"error":'),
                ("/v1/messages", MESSAGES, message("a", stream=True), "event: error"),
                ("/v1/responses", RESPONSES, response("a", stream=True), "response.failed")):
            with self.subTest(path), mock.patch.object(cp, "fall_back", slowly):
                self.fake.script(upstream, Answer(402, body={"error": {
                    "message": "none left", "code": "quota_exceeded"}}))
                reply = self.proxy.post(path, body)
                self.assertEqual(reply.status, 200)        # it came with a keep-alive
                self.assertIn(sign, reply.body.decode())
                self.assertIn("is not accessible via", reply.body.decode())


if __name__ == "__main__":
    unittest.main()
