"""Searches of the web: Claude Code's, and Codex' own, made by a small GPT of the account."""
from __future__ import annotations

import unittest
from typing import Any
from unittest import mock

from support import Proxy, ProxyCase, cp, message
from fake_upstream import MESSAGES, RESPONSES, Answer, bad, today_models

RESULTS = [("One", "https://one.example/a"), ("Two", "https://two.example/b"),
           ("One again", "https://one.example/a")]
TOOL = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
MODEL = "claude-sonnet-5"


def search_usage(count: int) -> Any:
    """As Anthropic's SDK wants it when it is strict."""
    return {"web_search_requests": count, "web_fetch_requests": 0}


class SearchCase(ProxyCase):
    """An account of late 2026 whose GPTs search."""

    def setUp(self) -> None:
        super().setUp()
        self.fake.models = today_models()
        self.fake.search_results = RESULTS

    def ask(self, stream: bool = False, proxy: Any = None, **tool: Any) -> Any:
        reply = (proxy or self.proxy).post("/v1/messages", message(
            "Perform a web search for the query: cats", MODEL, stream=stream,
            tools=[dict(TOOL, **tool)], tool_choice={"type": "tool", "name": "web_search"}))
        self.assertEqual(reply.status, 200, reply.body)
        return reply

    def sent(self) -> Any:
        return [r for r in self.fake.requests if r.path == RESPONSES]


class ClaudeCodeTest(SearchCase):
    """A request of its own, answered without Claude."""

    def check_content(self, content: list[Any]) -> None:
        use, result, words = content
        self.assertEqual(use, {"type": "server_tool_use", "id": result["tool_use_id"],
                               "name": "web_search", "input": {"query": "cats"}})
        self.assertTrue(use["id"].startswith("srvtoolu_"))
        self.assertEqual([(one["url"], one["title"]) for one in result["content"]],
                         [("https://one.example/a", "One"), ("https://two.example/b", "Two")])
        for one in result["content"]:
            self.assertEqual(set(one), {"type", "url", "title", "page_age", "encrypted_content"})
            self.assertTrue(one["encrypted_content"])
        self.assertIn("Echo: cats", words["text"])
        self.assertIn("- One: https://one.example/a", words["text"])

    def test_whole(self) -> None:
        reply = self.ask()
        self.check_content(reply.json["content"])
        self.assertEqual(reply.json["stop_reason"], "end_turn")
        self.assertEqual(reply.json["model"], MODEL)
        self.assertEqual(reply.json["usage"]["server_tool_use"], search_usage(1))
        self.assertEqual(reply.headers["x-copilot-proxy-search"], "gpt-5-mini")

    def test_streamed_in_the_order_of_the_api(self) -> None:
        events = self.ask(stream=True).events
        kinds = [event["type"] for event in events if event["type"] != "ping"]
        self.assertEqual(kinds, [
            "message_start", "content_block_start", "content_block_delta", "content_block_stop",
            "content_block_start", "content_block_stop", "content_block_start",
            "content_block_delta", "content_block_stop", "message_delta", "message_stop"])
        starts = [e["content_block"] for e in events if e["type"] == "content_block_start"]
        deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
        self.assertEqual((starts[0]["input"], deltas[0]["type"]), ({}, "input_json_delta"))
        self.assertEqual(deltas[0]["partial_json"].replace(" ", ""), '{"query":"cats"}')
        self.check_content([dict(starts[0], input={"query": "cats"}), starts[1],
                            dict(starts[2], text=deltas[1]["text"])])
        [end] = [e for e in events if e["type"] == "message_delta"]
        self.assertEqual(end["usage"]["server_tool_use"], search_usage(1))

    def test_the_search_is_a_step_of_an_agent_and_claude_is_asked_once_at_most(self) -> None:
        for _ in range(3):
            self.ask()
        self.assertEqual(self.fake.count(MESSAGES), 1)             # its refusal is learned
        self.assertEqual(len(self.sent()), 3)
        for record in self.sent():
            self.assertEqual(record.headers["x-initiator"], "agent")
        self.assertEqual(self.proxy.get("/stats").json["searches"], {"gpt-5-mini": 3})
        self.assertEqual(self.proxy.get("/stats").json["recent"][0]["model"], "gpt-5-mini")

    def test_filters_and_place_are_passed(self) -> None:
        place = {"type": "approximate", "city": "Paris", "country": "FR"}
        self.ask(allowed_domains=["one.example"], user_location=place)
        self.assertEqual(self.sent()[-1].json["tools"], [{
            "type": "web_search", "filters": {"allowed_domains": ["one.example"]},
            "user_location": place}])

    def test_a_refused_filter_goes(self) -> None:
        def refuse(ask: Any) -> None:
            if ask.record.path == RESPONSES and "blocked_domains" in str(ask.body.get("tools")):
                raise bad("Unknown parameter: 'tools[0].filters.blocked_domains'.",
                          "unknown_parameter", "tools[0].filters.blocked_domains")
        self.fake.refusals = [refuse]
        self.check_content(self.ask(blocked_domains=["bad.example"]).json["content"])
        self.assertEqual(len(self.sent()), 2)

    def test_replay_of_its_blocks_becomes_text(self) -> None:
        content = self.ask().json["content"]
        reply = self.proxy.post("/v1/messages", message("", MODEL, messages=[
            {"role": "user", "content": "a"}, {"role": "assistant", "content": content},
            {"role": "user", "content": "go on"}]))
        self.assertEqual(reply.status, 200, reply.body)
        sent = [r for r in self.fake.requests if r.path == MESSAGES][-1].json
        self.assertEqual({part["type"] for part in sent["messages"][1]["content"]}, {"text"})


class FailureTest(SearchCase):
    """What fails is the dialect's own error."""

    def check(self, reply: Any, code: str = "unavailable") -> None:
        _, result, words = reply.json["content"]
        self.assertEqual(result["content"], {"type": "web_search_tool_result_error",
                                             "error_code": code})
        self.assertIn("Web search failed", words["text"])
        self.assertEqual(reply.json["usage"]["server_tool_use"], search_usage(0))

    def test_a_model_that_did_not_search(self) -> None:
        self.fake.search_results = None
        self.check(self.ask())

    def test_a_refusal(self) -> None:
        self.fake.script(RESPONSES, Answer(403, body={"error": {
            "message": "web search is disabled by policy", "code": "policy"}}))
        self.check(self.ask())
        self.assertEqual(len(self.sent()), 1)

    def test_a_limit(self) -> None:
        self.fake.script(RESPONSES, *[Answer(429, body={"error": {
            "message": "slow down", "code": "user_model_rate_limited"}})] * 3)
        self.check(self.ask(), "too_many_requests")

    def test_switched_off(self) -> None:
        with Proxy(self.fake, no_web_search=True) as proxy:
            reply = self.ask(proxy=proxy)
            self.check(reply)
            self.assertIn("--no-web-search", reply.json["content"][2]["text"])
            self.assertEqual(self.sent(), [])

    def test_a_model_of_ones_own(self) -> None:
        with Proxy(self.fake, search_model="gpt-5.4") as proxy:
            self.assertEqual(self.ask(proxy=proxy).headers["x-copilot-proxy-search"], "gpt-5.4")

    def test_no_model_searches(self) -> None:
        self.fake.models = [e for e in self.fake.models if e["id"] == MODEL]
        self.check(self.ask())


class LateFailureTest(SearchCase):
    settings = dict(keepalive_s=0.05)

    def test_a_limit_that_is_met_behind_a_keep_alive_ends_the_stream_properly(self) -> None:
        async def search(exchange: Any, copilot: Any, wish: Any) -> Any:
            while not exchange.started:
                await cp.wait(cp.Pause(0.01))
            raise cp.RateLimited("no more searches today")

        with mock.patch.object(cp.Job, "search", staticmethod(search)):
            events = self.ask(stream=True).events
        self.assertEqual(events[-1]["type"], "message_stop")
        self.assertIn("no more searches today", str(events))

    def test_a_limit_that_is_met_at_once_is_told_by_its_status(self) -> None:
        async def search(exchange: Any, copilot: Any, wish: Any) -> Any:
            raise cp.RateLimited("no more searches today")

        with mock.patch.object(cp.Job, "search", staticmethod(search)):
            reply = self.proxy.post("/v1/messages", message(
                "Perform a web search for the query: cats", MODEL, stream=True, tools=[TOOL]))
        self.assertEqual(reply.status, 429)


class AlphaTest(SearchCase):
    """POST /v1/alpha/search."""

    def test_all_queries_take_one_call(self) -> None:
        reply = self.proxy.post("/v1/alpha/search", {
            "id": "1", "model": "gpt-5.4", "commands": {"search_query": [
                {"q": "cats", "domains": ["one.example"]}, {"q": "dogs"}]}})
        self.assertEqual(reply.status, 200, reply.body)
        self.assertIsNone(reply.json["encrypted_output"])
        self.assertIn("Echo: cats\ndogs", reply.json["output"])
        self.assertIn("https://two.example/b", reply.json["output"])
        [record] = self.sent()
        self.assertEqual(record.json["tools"][0]["filters"], {"allowed_domains": ["one.example"]})

    def test_what_cannot_be_done_is_said(self) -> None:
        reply = self.proxy.post("/alpha/search", {
            "id": "1", "model": "m", "commands": {"open": [{"ref_id": "https://a.example"}]}})
        self.assertEqual(reply.json["output"], "Only search_query is supported here.")
        self.assertEqual(self.sent(), [])

    def test_odd_bodies_are_no_error_of_the_proxys(self) -> None:
        for odd in ({}, {"commands": 5}, {"commands": {"search_query": "x"}},
                    {"commands": {"search_query": [5, {"q": 5}]}}, {"input": [5]},
                    {"input": "cats", "settings": [], "model": {}},
                    {"commands": {"search_query": [{"q": "a", "domains": {"b": 1}}]},
                     "settings": {"filters": "x", "user_location": 5}}):
            with self.subTest(odd):
                self.assertIn(self.proxy.post("/v1/alpha/search", odd).status, (200, 400))


if __name__ == "__main__":
    unittest.main()
