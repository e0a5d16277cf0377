"""A request that is over leaves nothing in memory: its body must not wait for the collector, which
may come by after hundreds of others."""
from __future__ import annotations

import gc
import unittest
from typing import Any

from support import ProxyCase, chat, cp, message, response, wait_until
from fake_upstream import CHAT, Answer

CHAT_PATH = "/v1/chat/completions"
REFUSAL = {"error": {"message": "bad"}}


class LetGoTest(ProxyCase):
    settings = dict(hiccup_pause_s=0.001)

    def setUp(self) -> None:
        super().setUp()
        self.assertEqual(self.proxy.post(CHAT_PATH, chat("first")).status, 200)
        gc.collect()
        gc.freeze()                 # of the tests' own things nothing is walked again
        gc.disable()
        self.addCleanup(gc.enable)

    def still_there(self, kind: Any = cp.HttpExchange) -> list[Any]:
        return [one for one in gc.get_objects() if isinstance(one, kind)]

    def assert_let_go(self, path: str, body: Any, status: int) -> None:
        gc.collect()
        for _ in range(3):
            self.assertEqual(self.proxy.post(path, body).status, status)
        wait_until(lambda: not self.still_there(), "end of the requests")

    def test_answers(self) -> None:
        for stream in (False, True):
            for path, make in ((CHAT_PATH, chat), ("/v1/messages", message),
                               ("/v1/responses", response)):
                for model in ("gpt-4.1", "claude-sonnet-4.6", "gpt-5.3-codex"):
                    with self.subTest(path=path, model=model, stream=stream):
                        self.assert_let_go(path, make("a", model, stream=stream), 200)

    def test_refused_requests(self) -> None:
        for path, body, status in (
                (CHAT_PATH, {"model": "gpt-4.1", "messages": []}, 400),
                (CHAT_PATH, chat("a", "no-such-model"), 404), (CHAT_PATH, b"{x", 400),
                (CHAT_PATH, b"[" * 5000, 400),
                ("/v1/messages", message("a", messages=5), 400),
                ("/v1/models", chat("a"), 405), ("/v1/none", chat("a"), 404)):
            with self.subTest(path=path, status=status):
                self.assert_let_go(path, body, status)

    def test_refusals_of_the_upstream(self) -> None:
        for status in (400, 403, 422, 500, 503):
            with self.subTest(status=status):
                self.fake.script(CHAT, *[Answer(status, body=REFUSAL)] * 9)
                self.assert_let_go(CHAT_PATH, chat("a"), status)
                self.fake._scripts.clear()

    def test_a_limit_that_lasts(self) -> None:
        self.fake.script(CHAT, Answer(429, body=REFUSAL, headers={"retry-after": "3000"}))
        self.assert_let_go(CHAT_PATH, chat("a"), 429)

    def test_connections_that_break(self) -> None:
        self.fake.script(CHAT, *[Answer(drop="after")] * 9)
        self.assert_let_go(CHAT_PATH, chat("a"), 502)

    def test_connections_that_the_upstream_closes(self) -> None:
        gc.collect()
        self.fake.script(CHAT, *[Answer(0, drop="after")] * 5)
        for _ in range(5):
            self.proxy.post(CHAT_PATH, chat("a"))
        wait_until(lambda: len(self.still_there(cp.HttpConnection)) <= 1, "end of the connections")

    def test_a_refusal_that_is_cured(self) -> None:
        self.fake.script(CHAT, Answer(503, body=REFUSAL), Answer(401, body=REFUSAL))
        self.assert_let_go(CHAT_PATH, chat("a"), 200)

    def test_a_refusal_that_is_repaired(self) -> None:
        words = {"error": {"message": "Unsupported parameter: 'top_p' is not supported"}}
        self.fake.script(CHAT, Answer(400, body=words))
        self.assert_let_go(CHAT_PATH, chat("a", top_p=0.5), 200)
        self.assertNotIn("top_p", self.fake.last(CHAT).json)

    def test_streams_that_end_badly(self) -> None:
        for marks in ("@@cut=1@@", "@@error=1@@", "@@rst=1 cut=1@@", "@@noend=1@@"):
            for path, make in ((CHAT_PATH, chat), ("/v1/messages", message)):
                with self.subTest(marks=marks, path=path):
                    self.assert_let_go(path, make("a " + marks, "gpt-4.1", stream=True), 200)


if __name__ == "__main__":
    unittest.main()
