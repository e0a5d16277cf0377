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

    def test_reasoning_is_seen_in_every_dialect_streamed_and_whole(self) -> None:
        for path, make, mark in (("/v1/chat/completions", chat, "reasoning"),
                                 ("/v1/messages", message, "thinking"),
                                 ("/v1/responses", response, "reasoning")):
            for stream in (False, True):
                for model in ("gpt-5-mini", "gpt-5.3-codex", "claude-sonnet-5"):
                    with self.subTest(path=path, stream=stream, model=model):
                        more: dict[str, Any] = {"stream": stream}
                        if path == "/v1/messages":
                            more["thinking"] = {"type": "enabled", "budget_tokens": 1024,
                                                "display": "summarized"}
                            more["max_tokens"] = 4096
                        reply = self.proxy.post(path, make("please think", model, **more))
                        text = reply.body.decode()
                        self.assertEqual(reply.status, 200, text)
                        self.assertIn(mark, text)
                        self.assertIn("pretends", text)

    def test_a_tool_is_called_and_its_result_is_answered_in_every_dialect(self) -> None:
        schema = {"type": "object", "properties": {"place": {"type": "string"}}}
        for model in ("gpt-5-mini", "gpt-5.3-codex", "claude-sonnet-5"):
            with self.subTest("chat", model=model):
                tool: dict[str, Any] = {"type": "function", "function": {
                    "name": "get_weather", "parameters": schema}}
                body = chat("use the tool", model, tools=[tool])
                said = self.proxy.post("/v1/chat/completions", body).json["choices"][0]
                self.assertEqual(said["finish_reason"], "tool_calls")
                call = said["message"]["tool_calls"][0]
                self.assertEqual(call["function"]["name"], "get_weather")
                body["messages"] += [said["message"], {
                    "role": "tool", "tool_call_id": call["id"], "content": "it rains"}]
                said = self.proxy.post("/v1/chat/completions", body).json["choices"][0]
                self.assertIn("The tool answered: it rains", said["message"]["content"])
            with self.subTest("messages", model=model):
                body = message("use the tool", model, tools=[
                    {"name": "get_weather", "input_schema": schema}])
                reply = self.proxy.post("/v1/messages", body).json
                self.assertEqual(reply["stop_reason"], "tool_use")
                use = next(part for part in reply["content"] if part["type"] == "tool_use")
                body["messages"] += [{"role": "assistant", "content": reply["content"]}, {
                    "role": "user", "content": [{"type": "tool_result", "tool_use_id": use["id"],
                                                 "content": "it rains"}]}]
                reply = self.proxy.post("/v1/messages", body).json
                self.assertIn("it rains", reply["content"][-1]["text"])
            with self.subTest("responses", model=model):
                body = response("use the tool", model, tools=[
                    {"type": "function", "name": "get_weather", "parameters": schema}])
                reply = self.proxy.post("/v1/responses", body).json
                item = next(i for i in reply["output"] if i["type"] == "function_call")
                body["input"] = [{"role": "user", "content": "use the tool"}, item, {
                    "type": "function_call_output", "call_id": item["call_id"],
                    "output": "it rains"}]
                reply = self.proxy.post("/v1/responses", body).json
                self.assertIn("it rains", reply["output"][-1]["content"][0]["text"])

    def test_what_claude_code_reminds_of_calls_no_tool(self) -> None:
        """Its reminders beside the prompt tell of tools, of searching and of thinking."""
        reminder = "<system-reminder>\nUse a tool: search, think, fail slow.\n</system-reminder>"
        parts = [{"type": "text", "text": words} for words in (reminder, reminder, "Say hi")]
        reply = self.proxy.post("/v1/messages", {
            "model": "claude-sonnet-5", "max_tokens": 99,
            "messages": [{"role": "user", "content": parts},
                         {"role": "system", "content": "Tools to search with, and to think."}],
            "tools": [{"name": name, "input_schema": {"type": "object", "properties": {}}}
                      for name in ("Agent", "WebSearch")]})
        (part,) = reply.json["content"]
        self.assertTrue(part["text"].endswith("You said: Say hi"), part)

    def test_auto_is_listed_and_the_answer_names_the_real_model(self) -> None:
        self.assertIn("auto", [m["id"] for m in self.proxy.get("/v1/models").json["data"]])
        for path, make in (("/v1/chat/completions", chat), ("/v1/messages", message),
                           ("/v1/responses", response)):
            for stream in (False, True):
                with self.subTest(path=path, stream=stream):
                    reply = self.proxy.post(path, make("hello", "auto", stream=stream))
                    self.assertEqual(reply.status, 200, reply)
                    self.assertIn("gpt-5-mini", reply.body.decode())
        row = self.row(6)
        self.assertEqual((row["asked"], row["model"]), ("auto", "gpt-5-mini"))
        self.assertAlmostEqual(row["credits"], row["estimated_credits"], 6)    # its discount, too

    def test_slow_streams_come_word_by_word(self) -> None:
        pauses = []

        def pause(seconds: float) -> cp.Pause:
            pauses.append(seconds)
            return original(0.0)
        original = cp.Pause
        with mock.patch.object(cp, "Pause", pause):
            for path, make in (("/v1/chat/completions", chat), ("/v1/messages", message),
                               ("/v1/responses", response)):
                for text, wanted in (("slow, please", cp.DEMO_SLOW_PAUSE_S), ("quick", 0.0)):
                    with self.subTest(path=path, text=text):
                        del pauses[:]
                        reply = self.proxy.stream(path, make(text, "gpt-5-mini"))
                        self.assertEqual(reply.status, 200)
                        self.assertGreater(pauses.count(wanted), 8)

    def test_a_running_stream_says_from_its_start_how_long_the_prompt_is(self) -> None:
        reply = self.proxy.stream("/v1/messages", message("hello " * 500, "claude-sonnet-5"))
        begun = next(event for event in reply.events if event["type"] == "message_start")
        self.assertGreater(begun["message"]["usage"]["input_tokens"], 400)

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
