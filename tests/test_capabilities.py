"""What is sent only to models that can do it: context editing, cache times, tools that are found;
ids and sampling of Kimi, how many images, the reviewer's model of Codex."""
from __future__ import annotations

import tempfile
import unittest
from typing import Any

from support import ProxyCase, message, response, run_main
import copilot_proxy as cp
from fake_upstream import CHAT, COUNT_TOKENS, MESSAGES, RESPONSES, make_claude, make_model, \
    today_models

EDITS = {"edits": [{"type": "clear_thinking_20251015", "keep": {"type": "thinking_turns",
                                                                "value": 1}}]}
PIXEL = {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                     "data": "iVBORw0KGgo="}}


class CapabilityCase(ProxyCase):
    """An account of late 2026."""

    def setUp(self) -> None:
        super().setUp()
        self.fake.models = today_models()
        self.fake.models.append(make_claude("claude-able-9", (MESSAGES,), context_editing=True,
                                            tool_search=True))

    def sent(self, path: str) -> Any:
        return [r for r in self.fake.requests if r.path == path][-1]

    def ask(self, model: str, **more: Any) -> Any:
        reply = self.proxy.post("/v1/messages", message("hello", model=model, **more))
        self.assertEqual(reply.status, 200, reply.body)
        return self.sent(MESSAGES)


class MessagesTest(CapabilityCase):
    """Fields of Messages."""

    def test_context_management_goes_where_it_is_offered_and_brings_its_beta(self) -> None:
        record = self.ask("claude-able-9", context_management=EDITS)
        self.assertEqual(record.json["context_management"], EDITS)
        self.assertIn("context-management-2025-06-27", record.headers["anthropic-beta"])
        record = self.ask("claude-sonnet-5", context_management=EDITS)
        self.assertNotIn("context_management", record.json)
        self.assertNotIn("anthropic-beta", record.headers)

    def test_context_management_that_is_refused_all_the_same_goes(self) -> None:
        del self.fake.models[-1]["capabilities"]["supports"]["context_editing"]
        self.proxy.get("/v1/models")
        self.proxy.app.login.account.catalogue.value.find("claude-able-9", {}).supports[
            "context_editing"] = True
        record = self.ask("claude-able-9", context_management=EDITS)
        self.assertNotIn("context_management", record.json)
        self.assertEqual(self.fake.count(MESSAGES), 2)

    def test_the_time_of_the_cache_is_kept(self) -> None:
        for ttl in ("1h", "5m"):
            mark = {"type": "ephemeral", "ttl": ttl}
            record = self.ask("claude-sonnet-5", system=[
                {"type": "text", "text": "a", "cache_control": mark}])
            self.assertEqual(record.json["system"][0]["cache_control"], mark)

    def test_an_odd_time_is_none(self) -> None:
        for odd in ("2h", 5, None, [], {}):
            mark = {"type": "ephemeral", "ttl": odd}
            record = self.ask("claude-sonnet-5", system=[
                {"type": "text", "text": "a", "cache_control": mark}])
            self.assertEqual(record.json["system"][0]["cache_control"], {"type": "ephemeral"})

    def test_tokens_with_a_time_are_counted(self) -> None:
        mark = {"type": "ephemeral", "ttl": "1h"}
        reply = self.proxy.post("/v1/messages/count_tokens", message(
            "hello", model="claude-sonnet-5",
            system=[{"type": "text", "text": "a", "cache_control": mark}]))
        self.assertEqual(reply.status, 200)
        self.assertEqual(self.fake.count(COUNT_TOKENS), 1)

    def test_tools_that_are_found_later_go_where_that_is_offered(self) -> None:
        tools = [{"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"},
                 {"name": "a", "description": "d", "input_schema": {"type": "object"},
                  "defer_loading": True}]
        record = self.ask("claude-able-9", tools=tools)
        self.assertEqual(record.json["tools"][0]["type"], tools[0]["type"])
        self.assertEqual(record.json["tools"][1], tools[1])     # a mark of the cache is refused
        self.assertIn("advanced-tool-use-2025-11-20", record.headers["anthropic-beta"])
        record = self.ask("claude-sonnet-5", tools=tools)
        self.assertEqual([tool["name"] for tool in record.json["tools"]], ["a"])
        self.assertNotIn("defer_loading", record.json["tools"][0])


class FamilyTest(CapabilityCase):
    """Oddities of families."""

    def test_images_beyond_the_limit_of_a_family_become_words_the_oldest_first(self) -> None:
        for model, most in (("claude-sonnet-5", 20), ("gemini-3.6-flash", 10)):
            turns: list[Any] = []
            for _ in range(25):
                turns += [{"role": "user", "content": [dict(PIXEL), {"type": "text", "text": "x"}]},
                          {"role": "assistant", "content": "y"}]
            body = message("", model=model, messages=turns + [
                {"role": "user", "content": [dict(PIXEL), {"type": "text", "text": "x"}]}])
            reply = self.proxy.post("/v1/messages", body)
            with self.subTest(model):
                self.assertEqual(reply.status, 200, reply.body)
                sent = self.fake.requests[-1].json
                parts = list(cp.content_parts(sent))
                images = [part for part in parts if part["type"] in cp.IMAGE_TYPES]
                self.assertEqual(len(images), most)
                last = sent["messages"][-1]["content"]
                self.assertIn(last[0]["type"], cp.IMAGE_TYPES)
                self.assertIn("images", reply.headers["x-copilot-proxy-lossy"])

    def test_too_many_images_in_the_last_turn_are_told(self) -> None:
        body = message("", model="claude-sonnet-5", messages=[
            {"role": "user", "content": [dict(PIXEL) for _ in range(21)]}])
        reply = self.proxy.post("/v1/messages", body)
        self.assertEqual(reply.status, 400)
        self.assertIn("at most 20 images", reply.json["error"]["message"])
        self.assertEqual(self.fake.count(MESSAGES), 0)

    def kimi(self, model: str, **more: Any) -> Any:
        def round_of(name: str, call_id: str) -> list[Any]:
            call = {"id": call_id, "type": "function",
                    "function": {"name": name, "arguments": "{}"}}
            return [{"role": "assistant", "content": None, "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": call_id, "content": "x"}]
        turns = [{"role": "user", "content": "a"}, *round_of("look", "call_1"),
                 *round_of("edit", "toolu_2"), *round_of("look", "call_3")]
        reply = self.proxy.post("/v1/chat/completions", {
            "model": model, "messages": turns, "tools": [
                {"type": "function", "function": {"name": name, "parameters": {
                    "type": "object"}}} for name in ("look", "edit")], **more})
        self.assertEqual(reply.status, 200, reply.body)
        return self.sent(CHAT).json

    def test_calls_of_kimi_have_its_own_ids(self) -> None:
        self.fake.models.append(make_model("kimi-k2.7-code", "Moonshot AI", (CHAT,)))
        for model, expected in (
                ("kimi-k3", ["look:0", "edit:1", "look:2"]),
                ("kimi-k2.7-code", ["functions.look:0", "functions.edit:1", "functions.look:2"])):
            turns = self.kimi(model)["messages"]
            with self.subTest(model):
                self.assertEqual([call["id"] for turn in turns
                                  for call in turn.get("tool_calls") or ()], expected)
                self.assertEqual([turn["tool_call_id"] for turn in turns
                                  if turn["role"] == "tool"], expected)

    def test_kimi_has_its_own_sampling(self) -> None:
        body = self.kimi("kimi-k3", temperature=0, top_p=1)
        self.assertEqual((body["temperature"], body["top_p"]), (1, 0.95))

    def test_the_reviewer_of_codex_is_a_small_gpt(self) -> None:
        for strict in (False, True):
            self.proxy.settings.strict_models = strict
            reply = self.proxy.post("/v1/responses", response("ok?", model="codex-auto-review"))
            self.assertEqual(reply.status, 200, reply.body)
            self.assertEqual(reply.headers["x-copilot-proxy-model"], "gpt-5.6-luna")
            self.assertEqual(self.sent(RESPONSES).json["model"], "gpt-5.6-luna")

    def test_categories_of_price_and_promotions_are_listed(self) -> None:
        entry = self.fake.models[0]
        entry["model_picker_price_category"] = "low"
        entry["billing"]["promo"] = {"id": "x", "discount_percent": 25}
        listed = self.proxy.get("/v1/models").json["data"][0]
        self.assertEqual((listed["price_category"], listed["promo"]), ("low", "25 % off"))

    def test_the_table_of_models_shows_them_and_what_will_go(self) -> None:
        small, second, third = self.fake.models[:3]
        small["model_picker_price_category"] = "very_high"
        second["billing"]["promo"] = {"id": "x", "message": "half price until Sunday"}
        third["info_messages"] = [{"code": "pending_deprecation", "message": "goes in March"}]
        with tempfile.TemporaryDirectory() as home:
            code, text = run_main(home, "models", "--github-url", self.fake.url, "-g", "ghu_fake")
        self.assertEqual(code, 0, text)
        lines = {line.split()[0]: line for line in text.splitlines()}
        self.assertIn("price very high", lines[small["id"]])
        self.assertIn("promotion", lines[second["id"]])
        self.assertIn("half price until Sunday", lines[second["id"] + ":"])
        self.assertIn("retiring", lines[third["id"]])
        self.assertIn("goes in March", lines[third["id"] + ":"])


if __name__ == "__main__":
    unittest.main()
