"""The token estimate against counts measured with o200k (fixture tokens.json), and its rules."""
from __future__ import annotations

import base64
import json
import os
import statistics
import struct
import unittest
from typing import Any, Callable

from support import HERE, cp
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


def jpeg(wide: int, high: int) -> bytes:
    """A camera's file: its preview, a JPEG of 160 x 120, stands before its own size."""
    preview = b"\xff\xd8\xff\xc0\x00\x11\x08" + struct.pack(">HH", 120, 160) + b"\x03" * 5000
    return (b"\xff\xd8\xff\xe1" + struct.pack(">H", len(preview) + 2) + preview
            + b"\xff\xdb\x00\x05\x00\x01\x02\xff\xc2\x00\x11\x08" + struct.pack(">HH", high, wide)
            + b"\x03\x01\x22\x00")


def small(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


HEADS: dict[str, Callable[[int, int], bytes]] = {
    "png": lambda wide, high: b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(
        ">IIBBBBB", wide, high, 8, 6, 0, 0, 0),
    "gif": lambda wide, high: b"GIF89a" + struct.pack("<HHBBB", wide, high, 0xf7, 0, 0),
    "jpeg": jpeg,
    "webp-extended": lambda wide, high: b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + small(
        wide - 1, 3) + small(high - 1, 3),
    "webp-lossy": lambda wide, high: b"RIFF\0\0\0\0WEBPVP8 \0\0\0\0\x30\1\0\x9d\1\x2a" + small(
        wide, 2) + small(high, 2),
    "webp-lossless": lambda wide, high: b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0\x2f" + small(
        wide - 1 | high - 1 << 14, 4)}


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

    def test_images_by_their_pixels(self) -> None:
        for wide, high, claude, tiles in (
                (1, 1, 1, 1), (200, 200, 54, 1), (512, 512, 350, 1), (513, 512, 351, 2),
                (1000, 1000, 1334, 4), (1092, 1092, 1590, 4), (1920, 1080, 1600, 6),
                (8000, 400, 1600, 4), (4096, 8192, 1600, 6), (16000, 1, 22, 4)):
            for kind, head in HEADS.items():
                data = base64.b64encode(head(wide, high) + b"\xff\xc0" * 300_000).decode()
                url = "data:image/%s;base64,%s" % (kind.split("-")[0], data)
                with self.subTest(kind=kind, wide=wide, high=high):
                    self.assertEqual(cp.image_tokens(url, True), claude)
                    self.assertEqual(cp.image_tokens(url, False), 85 + 170 * tiles)

    def test_small_images_count_little_in_every_dialect(self) -> None:
        data = base64.b64encode(HEADS["png"](200, 200)).decode()
        url = "data:image/png;base64," + data
        source = {"type": "base64", "media_type": "image/png", "data": data}
        for part in ({"type": "image_url", "image_url": {"url": url}},
                     {"type": "input_image", "image_url": url},
                     {"type": "image", "source": source}):
            for is_claude, wanted in ((True, 54), (False, 255)):
                cost = (estimate_tokens(chat([part]), is_claude)
                        - estimate_tokens(chat([]), is_claude))
                self.assertAlmostEqual(cost, wanted, delta=20, msg=part["type"])

    def test_images_that_do_not_tell_their_size(self) -> None:
        jpeg = b"\xff\xd8\xff\xe0"
        for head in (b"", b"\x89PNG", b"GIF89a", b"RIFF\0\0\0\0WEBPVP8", b"BM" + b"\0" * 60, jpeg,
                     jpeg + b"\0\0" * 50_000, jpeg + b"\xff\xff" * 50_000,
                     jpeg + b"\0\2" + b"\xff\xe1\0\2" * 50_000):
            for data in (base64.b64encode(head).decode(), "%%%" + "A" * 400, "A"):
                for is_claude in (True, False):
                    found = cp.image_tokens("data:image/png;base64," + data, is_claude)
                    self.assertTrue(1 <= found <= 1600, (head[:20], found))
        self.assertEqual(cp.image_tokens("https://example.com/a.png", True), 1600)
        self.assertEqual(cp.image_tokens("data:", False), 1600)

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
