"""Anthropic's cache marks in a Chat request, where opencode writes them (sections 7 and 8)."""
from __future__ import annotations

import json
import unittest
from typing import Any

from cases import SharedCase

MARK = {"cache_control": {"type": "ephemeral"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {
    "name": "f", "parameters": {"type": "object", "properties": {}}}}


def conversation(place: str) -> list[dict[str, Any]]:
    """A turn with a tool, marked on its messages or somewhere in them."""
    on_message, on_part = (MARK if place == one else {} for one in ("message", "part"))
    call = dict(CALL, **(MARK if place == "call" else {}))
    call["function"] = dict(CALL["function"], **(MARK if place == "function" else {}))
    parts = [dict({"type": "text", "text": "use it"}, **on_part)]
    result = [dict({"type": "text", "text": "done"}, **on_part)]
    return [dict({"role": "system", "content": "s"}, **on_message),
            dict({"role": "user", "content": parts}, **on_message),
            dict({"role": "assistant", "content": None, "tool_calls": [call]}, **on_message),
            dict({"role": "tool", "tool_call_id": "c1", "content": result}, **on_message)]


class MarksTest(SharedCase):
    def ask(self, model: str, place: str) -> Any:
        """What goes up, at the first try and without a loss."""
        before = len(self.fake.requests)
        reply = self.proxy.post("/v1/chat/completions", {
            "model": model, "messages": conversation(place), "tools": [TOOL]})
        self.assertEqual(reply.status, 200, reply.body)
        self.assertNotIn("x-copilot-proxy-lossy", reply.headers)
        self.assertNotIn("x-copilot-proxy-repaired", reply.headers)
        sent = [one for one in self.fake.requests[before:] if one.method == "POST"]
        return [one for one in sent if not one.path.startswith("/login")][-1].json

    def test_claude_has_them_in_its_own_words(self) -> None:
        for model, word in (("claude-sonnet-4.6", '"copilot_cache_control"'),
                            ("claude-opus-4.7", '"cache_control"')):
            for place, count in (("message", 4), ("part", 2), ("call", 1), ("function", 1)):
                with self.subTest(model=model, place=place):
                    sent = json.dumps(self.ask(model, place)["messages"])
                    if place in ("message", "part") or "opus" not in model:
                        self.assertIn(word, sent)
                    if "opus" not in model:
                        self.assertEqual(sent.count(word), count)
                        self.assertNotIn('"cache_control"', sent)

    def test_others_have_none(self) -> None:
        for model in ("gpt-5-mini", "gpt-5.3-codex", "gemini-3.1-pro-preview"):
            for place in ("message", "part", "call", "function"):
                with self.subTest(model=model, place=place):
                    self.assertNotIn("cache_control", json.dumps(self.ask(model, place)))


if __name__ == "__main__":
    unittest.main()
