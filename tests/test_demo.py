"""start --demo (section 21): everything that page and clients show is seen without an account."""
from __future__ import annotations

import sys
import time
import unittest
from typing import Any
from unittest import mock

from support import cp, wait_until, Proxy, chat, message, response


class Demo(unittest.TestCase):
    """A proxy on the make-believe upstream, as the command starts it."""

    def setUp(self) -> None:
        settings = cp.Settings(demo=True)
        upstream = cp.start_demo(settings)
        self.addCleanup(upstream.app.close)
        self.addCleanup(upstream.finish, 0.0)

        class Fake:
            url = upstream.url
        fake: Any = Fake()
        self.proxy = Proxy(fake, demo=True, no_history=False, github_token="ghu_demo")
        patch = mock.patch.object(cp, "DEMO_PAUSE_S", 0.0)    # long answers are not waited for
        patch.start()
        self.addCleanup(patch.stop)
        self.proxy.__enter__()
        self.addCleanup(self.proxy.__exit__, None, None, None)

    def row(self, count: int = 1) -> dict[str, Any]:
        found = wait_until(lambda: (lambda rows: len(rows) >= count and rows)(
            self.proxy.get("/history").json["rows"]))
        return found[0]  # type: ignore[no-any-return]

    def test_every_dialect_reports_credits_cache_and_reasoning(self) -> None:
        number = 0
        for path, make in (("/v1/chat/completions", chat), ("/v1/messages", message),
                           ("/v1/responses", response)):
            for stream in (False, True):
                for model in ("gpt-5-mini", "claude-sonnet-4.6", "gpt-5.3-codex"):
                    with self.subTest(path=path, stream=stream, model=model):
                        number += 1
                        reply = self.proxy.post(path, make(
                            "please think about " + "this " * 1500, model, stream=stream))
                        self.assertEqual(reply.status, 200, reply)
                        row = self.row(number)
                        self.assertGreater(row["credits"], 0)
                        self.assertAlmostEqual(row["credits"], row["estimated_credits"], 6)
                        self.assertGreater(row["cache_read"], row["input"])
                        self.assertGreater(row["output"], 10)

    def test_reasoning_is_counted_where_the_api_counts_it(self) -> None:
        reply = self.proxy.post("/v1/responses", response("think", "gpt-5.3-codex"))
        self.assertEqual(reply.status, 200, reply)
        self.assertGreater(self.row()["reasoning"], 0)

    def test_the_web_is_searched(self) -> None:
        tool = {"type": "web_search_20250305", "name": "web_search"}
        for stream in (False, True):
            reply = self.proxy.post("/v1/messages", message(
                "search for cats", "claude-sonnet-4.6", stream=stream, tools=[tool]))
            self.assertEqual(reply.status, 200, reply)
            self.assertIn("web_search_tool_result", reply.body.decode())
            self.assertIn("https://example.com/demo", reply.body.decode())
            for model in ("gpt-5.3-codex", "claude-sonnet-5"):
                reply = self.proxy.post("/v1/responses", response(
                    "search for cats", model, stream=stream, tools=[{"type": "web_search"}]))
                self.assertIn("web_search_call", reply.body.decode())
                self.assertIn("url_citation", reply.body.decode())
        reply = self.proxy.post("/v1/messages", message(   # as Claude Code does
            "Perform a web search for the query: cats", "claude-sonnet-5", tools=[tool],
            tool_choice={"type": "tool", "name": "web_search"}))
        self.assertEqual([block["type"] for block in reply.json["content"]], [
            "server_tool_use", "web_search_tool_result", "text"])
        own = {"name": "WebSearch", "input_schema": {"type": "object", "properties": {}}}
        reply = self.proxy.post("/v1/messages", message("search for cats", "claude-sonnet-5",
                                                        tools=[own]))
        self.assertEqual(reply.json["content"][0]["input"], {"query": "search for cats"})

    def test_words_of_the_prompt_make_trouble(self) -> None:
        reply = self.proxy.post("/v1/chat/completions", chat("please fail", "gpt-5-mini"))
        self.assertEqual(reply.status, 400)
        self.assertIn("since the prompt says so", reply.json["error"]["message"])
        reply = self.proxy.post("/v1/messages", message("rate limit", "claude-haiku-4.5"))
        self.assertEqual(reply.status, 429)
        self.assertEqual(reply.headers["retry-after"].isdigit(), True)
        self.assertEqual([rest["scope"] for rest in self.proxy.get("/stats").json["limits"]],
                         ["claude-haiku-4.5"])

    def test_two_weeks_of_history_are_there_and_marked(self) -> None:
        cp.seed_demo(self.proxy.app.ledger.history, time.time())
        wait_until(lambda: self.proxy.get("/history/summary").json["total"]["requests"] > 300)
        told = self.proxy.get("/history/summary?days=15&sessions=1").json
        self.assertGreaterEqual(len(told["by_day"]), 14)
        self.assertGreater(told["total"]["credits"], 10)
        self.assertLess(told["total"]["errors"], told["total"]["requests"] / 10)
        self.assertIn("Claude Code", {line["client"] for line in told["by_client"]})
        rows = self.proxy.get("/history?limit=500").json["rows"]
        self.assertTrue(all(row["id"].startswith("demo-") for row in rows))
        self.assertTrue(all(row["at"] < time.time() for row in rows))
        names = {model["id"] for model in cp.DEMO_MODELS}
        self.assertLessEqual({row["model"] for row in rows}, names)

    def test_the_quota_ends_with_the_month(self) -> None:
        self.proxy.get("/usage")
        lane = next(lane for lane in self.proxy.get("/stats").json["quotas"]
                    if not lane["unlimited"])
        self.assertTrue(0 < lane["resets_at"] - time.time() < 32 * 86400, lane)


if __name__ == "__main__":
    sys.exit(unittest.main())
