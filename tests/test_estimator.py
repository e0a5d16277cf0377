"""The token estimate against counts measured with o200k (fixture tokens.json), and its rules."""
from __future__ import annotations

import json
import os
import statistics
import unittest
from typing import Any

from support import HERE
from copilot_proxy import count_text, estimate_tokens

MIX = {"english", "code", "json", "chinese", "japanese", "numbers"}
TRAPS = {"cyrillic", "hex", "entities"}
WORDS = "The quick brown fox jumps over the lazy dog while seven wizards wait for tea. " * 40


def load_fixture() -> list[dict[str, Any]]:
    """[{kind, tokens, text}]: texts written or generated for this test, tokens by gpt-tokenizer."""
    with open(os.path.join(HERE, "fixtures", "tokens.json"), encoding="utf-8") as file:
        found: list[dict[str, Any]] = json.load(file)
        return found


def chat(content: Any, **more: Any) -> dict[str, Any]:
    """A Chat Completions request with one user message."""
    return dict({"model": "m", "messages": [{"role": "user", "content": content}]}, **more)


class CountText(unittest.TestCase):
    def setUp(self) -> None:
        self.texts = load_fixture()

    def errors(self, kinds: set[str]) -> tuple[float, float, float]:
        """(median, ninth of ten, sum of estimates / sum of counts) of the texts of these kinds."""
        pairs = [(count_text(t["text"]), t["tokens"]) for t in self.texts if t["kind"] in kinds]
        off = sorted(abs(guess / true - 1) for guess, true in pairs)
        return (statistics.median(off), off[int(0.9 * len(off))],
                sum(guess for guess, _ in pairs) / sum(true for _, true in pairs))

    def test_fixture_is_what_it_should_be(self) -> None:
        self.assertEqual({t["kind"] for t in self.texts}, MIX | TRAPS)
        self.assertTrue(all(250 <= len(t["text"]) <= 3000 for t in self.texts))

    def test_mix(self) -> None:
        for kinds in (MIX, MIX | TRAPS):
            median, ninth, total = self.errors(kinds)
            self.assertLessEqual(median, 0.06)
            self.assertLessEqual(ninth, 0.15)
            self.assertGreaterEqual(total, 1.0)
            self.assertLess(total, 1.08)

    def test_every_kind_leans_high(self) -> None:
        for kind in sorted(MIX | TRAPS):
            with self.subTest(kind):
                self.assertGreaterEqual(self.errors({kind})[2], 1.0)
                self.assertLess(self.errors({kind})[0], 0.12)

    def test_small_and_odd_texts(self) -> None:
        self.assertEqual(count_text(""), 0)
        self.assertLessEqual(count_text("Hello"), 2)
        self.assertLessEqual(count_text("-" * 80), 4)
        self.assertLess(count_text(" " * 100_000), 3000)
        self.assertGreater(count_text("\U0001f600" * 100), 80)
        self.assertGreater(count_text("\ud800" * 10), 5)
        self.assertGreater(count_text("x" * 100_000), 10_000)

    def test_pieces_of_any_kind_have_a_weight(self) -> None:
        every = "".join(map(chr, range(0x30000)))
        self.assertGreater(count_text(every), 100_000)
        self.assertGreater(sum(count_text(" " + c + c) for c in every[:0x3000]), 0x3000)

    def test_ascii_and_other_chunks_agree(self) -> None:
        self.assertAlmostEqual(count_text(WORDS), count_text(WORDS + "\xe9"), delta=3)


class EstimateTokens(unittest.TestCase):
    def test_dialects_agree(self) -> None:
        call, result = '{"path": "a.txt"}', "first line\nsecond line"
        schema = {"type": "object", "properties": {"path": {"type": "string"}}}
        bodies: list[dict[str, Any]] = [
            {"messages": [
                {"role": "system", "content": WORDS}, {"role": "user", "content": "Read a.txt"},
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "c" * 60, "type": "function",
                     "function": {"name": "read", "arguments": call}}]},
                {"role": "tool", "tool_call_id": "c" * 60, "content": result}],
             "tools": [{"type": "function", "function": {"name": "read", "parameters": schema}}]},
            {"instructions": WORDS, "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Read a.txt"}]},
                {"type": "function_call", "call_id": "c" * 60, "name": "read", "arguments": call},
                {"type": "function_call_output", "call_id": "c" * 60, "output": result}],
             "tools": [{"type": "function", "name": "read", "parameters": schema}]},
            {"system": [{"type": "text", "text": WORDS, "cache_control": {"type": "ephemeral"}}],
             "messages": [
                {"role": "user", "content": "Read a.txt"},
                {"role": "assistant", "content": [
                    {"type": "tool_use", "id": "c" * 60, "name": "read",
                     "input": json.loads(call)}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "c" * 60, "content": result}]}],
             "tools": [{"name": "read", "input_schema": schema}]}]
        counts = [estimate_tokens(body) for body in bodies]
        self.assertLess(max(counts) - min(counts), 25, counts)
        self.assertGreater(min(counts), count_text(WORDS) + count_text(call + result))

    def test_tools_and_claude(self) -> None:
        tools = [{"name": "t%d" % n, "description": WORDS} for n in range(5)]
        plain, with_tools = estimate_tokens(chat("hi")), estimate_tokens(chat("hi", tools=tools))
        self.assertGreater(with_tools - plain, 5 * count_text(WORDS))
        text = estimate_tokens(chat(WORDS))
        self.assertAlmostEqual(estimate_tokens(chat(WORDS), is_claude=True), text * 1.25, delta=9)
        claude = estimate_tokens(chat("hi", tools=tools), is_claude=True)
        self.assertGreater(claude, with_tools + 300)

    def test_images_of_every_dialect(self) -> None:
        for size in (1000, 3_000_000):
            data = "A" * size
            url = "data:image/png;base64," + data
            source = {"type": "base64", "media_type": "image/png", "data": data}
            for part in ({"type": "image_url", "image_url": {"url": url}},
                         {"type": "input_image", "image_url": url},
                         {"type": "image", "source": source},
                         {"type": "tool_result", "tool_use_id": "t", "content": [
                             {"type": "image", "source": source}]}):
                cost = estimate_tokens(chat([part])) - estimate_tokens(chat([]))
                self.assertAlmostEqual(cost, 1600, delta=20, msg=part["type"])

    def test_links_files_and_sealed_state(self) -> None:
        base = estimate_tokens(chat([]))
        link = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
        self.assertAlmostEqual(estimate_tokens(chat([link])) - base, 1600, delta=15)
        pdf = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf",
                                              "data": "A" * 800_000}}
        self.assertAlmostEqual(estimate_tokens(chat([pdf])) - base, 31_600, delta=100)
        note = {"type": "document", "source": {"type": "text", "media_type": "text/plain",
                                               "data": WORDS}}
        self.assertAlmostEqual(estimate_tokens(chat([note])) - base, count_text(WORDS), delta=15)
        thought = {"type": "thinking", "thinking": "", "signature": "Ab3" * 1000}
        self.assertLess(estimate_tokens(chat([thought])) - base, 250)
        call = {"type": "tool_use", "id": "t", "name": "get", "input": {"url": "https://x.test"}}
        self.assertLess(estimate_tokens(chat([call])) - base, 40)

    def test_malformed_bodies_are_counted_not_refused(self) -> None:
        deep: Any = "x"
        for _ in range(5000):
            deep = {"input": deep}
        bodies: list[dict[str, Any]] = [
            {}, {"messages": None}, {"messages": "text"}, {"tools": 3, "input": 4.5},
            {"messages": [None, 1, [], {"content": {"type": ["x"]}}]},
            {"tools": [None, "x", deep]}, {"messages": [{"input": deep}]},
            {"messages": [{"type": "base64"}, {"type": {}, "url": 3}]}]
        for body in bodies:
            self.assertGreaterEqual(estimate_tokens(body), 3)


if __name__ == "__main__":
    unittest.main()
