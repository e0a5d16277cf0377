"""Tools that are loaded later, found by the client or by the upstream: what a history says of them
goes as it is to a model that knows it, and as text to all others.
Of section 7."""
from __future__ import annotations

import unittest
from typing import Any

from support import ProxyCase, message
from fake_upstream import CHAT, MESSAGES, RESPONSES, make_claude, today_models

LATER = {"name": "mcp__notes__write", "description": "d", "input_schema": {"type": "object"},
         "defer_loading": True}
NOW = {"name": "ToolSearch", "description": "d", "input_schema": {"type": "object"}}
OWN_SEARCH = {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"}
LOST = "tool_reference|server_tool_use, tool_search_tool_result"
FAR_MODELS = (("gpt-5.4", RESPONSES), ("gemini-3.6-flash", CHAT), ("grok-4.5", CHAT),
              ("gpt-5-mini", None))


def by_client(name: str = LATER["name"]) -> list[Any]:
    """As Claude Code sends it with ENABLE_TOOL_SEARCH=true."""
    return [
        {"role": "user", "content": "use the tool"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1",
                                           "name": "ToolSearch", "input": {"query": "w"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": [
                {"type": "tool_reference", "tool_name": name}]},
            {"type": "text", "text": "Tool loaded."}]}]


def by_upstream(name: str = LATER["name"], result_id: str = "srvtoolu_1") -> list[Any]:
    """As Anthropic's own search tool answers, replayed."""
    return [
        {"role": "user", "content": "use the tool"},
        {"role": "assistant", "content": [
            {"type": "server_tool_use", "id": "srvtoolu_1", "name": "tool_search_tool_regex",
             "input": {"query": "w"}},
            {"type": "tool_search_tool_result", "tool_use_id": result_id, "content": {
                "type": "tool_search_tool_search_result", "tool_references": [
                    {"type": "tool_reference", "tool_name": name}]}},
            {"type": "text", "text": "found"}]},
        {"role": "user", "content": "go on"}]


class ToolSearchCase(ProxyCase):
    def setUp(self) -> None:
        super().setUp()
        self.fake.models = today_models() + [
            make_claude("claude-able-9", (MESSAGES,), tool_search=True)]

    def ask(self, model: str, turns: list[Any], *tools: Any, stream: bool = False) -> Any:
        """The conversation as it went up, whole, and the reply."""
        body = message("", model=model, messages=turns, tools=list(tools), stream=stream)
        reply = self.proxy.post("/v1/messages", body)
        self.assertEqual(reply.status, 200, reply.body)
        return self.fake.requests[-1].json, reply

    def kinds(self, sent: Any) -> set[str]:
        found: set[str] = set()
        todo = [sent["messages"]]
        while todo:
            value = todo.pop()
            if isinstance(value, dict):
                found.add(str(value.get("type")))
                todo += value.values()
            elif isinstance(value, list):
                todo += value
        return found


class FoundToolTest(ToolSearchCase):
    def test_what_the_client_found_goes_up_as_it_is_and_can_be_called(self) -> None:
        for stream in (False, True):
            with self.subTest(stream=stream):
                sent, reply = self.ask("claude-able-9", by_client(), NOW, LATER, stream=stream)
                self.assertEqual(sent["messages"][2]["content"][0]["content"],
                                 [{"type": "tool_reference", "tool_name": LATER["name"]}])
                self.assertTrue(sent["tools"][1]["defer_loading"])
                self.assertNotIn("x-copilot-proxy-lossy", reply.headers)
                beta = self.fake.requests[-1].headers["anthropic-beta"]
                self.assertIn("advanced-tool-use", beta)

    def test_what_the_upstream_found_goes_back_to_it_as_it_is(self) -> None:
        sent, reply = self.ask("claude-able-9", by_upstream(), OWN_SEARCH, LATER)
        self.assertEqual(sent["messages"][1]["content"], by_upstream()[1]["content"])
        self.assertNotIn("x-copilot-proxy-lossy", reply.headers)

    def test_a_tool_that_is_not_there_any_more_is_named_in_text(self) -> None:
        for turns in (by_client("gone"), by_upstream("gone"), by_upstream(result_id="srvtoolu_2")):
            with self.subTest(turns=turns):
                sent, reply = self.ask("claude-able-9", turns, OWN_SEARCH, NOW, LATER)
                self.assertFalse(self.kinds(sent) & {
                    "tool_reference", "server_tool_use", "tool_search_tool_result"})
                self.assertRegex(reply.headers["x-copilot-proxy-lossy"], LOST)

    def test_models_that_find_no_tools_get_all_tools_and_the_history_as_text(self) -> None:
        for model in ("claude-sonnet-5", "claude-sonnet-4.6", *dict(FAR_MODELS)):
            for turns in (by_client(), by_upstream()):
                with self.subTest(model=model, turns=turns):
                    sent, reply = self.ask(model, turns, OWN_SEARCH, NOW, LATER)
                    tools = str(sent["tools"])
                    self.assertIn(LATER["name"], tools)
                    self.assertNotIn("defer_loading", tools)
                    turns_sent = str(sent.get("messages", sent.get("input")))
                    self.assertIn(LATER["name"], turns_sent)
                    self.assertNotIn("'type': 'tool_reference'", turns_sent)
                    self.assertRegex(reply.headers["x-copilot-proxy-lossy"], LOST)

    def test_a_reference_outside_a_result_is_text(self) -> None:
        turns = [{"role": "user", "content": [
            {"type": "tool_reference", "tool_name": LATER["name"]},
            {"type": "text", "text": "hello"}]}]
        sent, reply = self.ask("claude-able-9", turns, NOW, LATER)
        self.assertEqual(self.kinds(sent) & {"tool_reference"}, set())
        self.assertIn("tool_reference", reply.headers["x-copilot-proxy-lossy"])


if __name__ == "__main__":
    unittest.main()
