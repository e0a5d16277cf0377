"""Wishes that the proxy fulfils itself: stop sequences, no thinking."""
from __future__ import annotations

import json
import random
import unittest
from typing import Any

from support import ProxyCase, chat, message
import copilot_proxy as cp
from fake_upstream import default_models

WORDS = "one two three END four \n\nfive END"


def cut(pieces: list[str], stops: list[str]) -> tuple[str, cp.ResponseEnd]:
    """The text and the end of an answer whose text comes in these pieces."""
    meter = cp.UsageMeter()
    cutter = cp.StopCutter(stops, meter)
    events: list[cp.Event] = [cp.ResponseStart("r", "m"), cp.PartStart(0, cp.Text(""))]
    events += [cp.PartDelta(0, piece) for piece in pieces]
    events += [cp.PartEnd(0), cp.ResponseEnd("stop", cp.Usage(1))]
    passed = [out for event in events for out in cutter.feed(event)]
    text = "".join(event.text for event in passed if isinstance(event, cp.PartDelta))
    (end,) = [event for event in passed if isinstance(event, cp.ResponseEnd)]
    if passed[-1] is not end:
        raise AssertionError("something came behind the end")
    return text, end


def cuts_of(rng: random.Random, text: str) -> list[str]:
    places = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(9)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]


class StopCutterTest(unittest.TestCase):
    def test_any_cut_of_the_stream_ends_at_the_same_place(self) -> None:
        rng = random.Random(7)
        for stops, want, sequence in (
                (["END"], "one two three ", "END"), (["\n"], "one two three END four ", "\n"),
                (["five", "four"], "one two three END ", "four"), (["nowhere"], WORDS, None),
                (["ENDE", "END", "EN"], "one two three ", "EN"), (["o", "one"], "", "o")):
            for _ in range(300):
                text, end = cut(cuts_of(rng, WORDS), stops)
                with self.subTest(stops=stops):
                    self.assertEqual((text, end.stop_sequence), (want, sequence))
                    self.assertEqual(end.stop, "stop_sequence" if sequence else "stop")

    def test_one_character_at_a_time(self) -> None:
        self.assertEqual(cut(list(WORDS), ["END"])[0], "one two three ")
        self.assertEqual(cut(list("aab"), ["ab"])[0], "a")
        self.assertEqual(cut(list("aaa"), ["ab"])[0], "aaa")

    def test_open_parts_are_closed_before_the_end(self) -> None:
        cutter = cp.StopCutter(["END"], cp.UsageMeter())
        cutter.feed(cp.PartStart(0, cp.Text("")))
        cutter.feed(cp.PartStart(1, cp.ToolCall("c", "f")))
        kinds = [type(event).__name__ for event in cutter.feed(cp.PartDelta(0, "aEND"))]
        self.assertEqual(kinds, ["PartDelta", "PartEnd", "PartEnd", "ResponseEnd"])


class StopTest(ProxyCase):
    """The fake repeats what it is told: the sequence stands in the middle of its answer."""

    def setUp(self) -> None:
        super().setUp()
        claude = next(e for e in default_models() if e["id"] == "claude-sonnet-4.6")
        self.fake.models.append(dict(claude, id="claude-only-4.6",
                                     supported_endpoints=["/v1/messages"]))
        self.whole = self.answer("/v1/chat/completions", chat("say a b c"))
        self.assertGreater(len(self.whole), 8)

    def answer(self, path: str, body: Any) -> str:
        reply = self.proxy.post(path, body)
        self.assertEqual(reply.status, 200, reply.body)
        if path.endswith("messages"):
            return "".join(block.get("text", "") for block in reply.json["content"])
        return reply.json["choices"][0]["message"]["content"] or ""

    def events(self, path: str, body: Any) -> list[Any]:
        reply = self.proxy.post(path, dict(body, stream=True))
        self.assertEqual(reply.status, 200, reply.body)
        frames = cp.SSEDecoder().feed(reply.body)
        return [json.loads(frame.data) for frame in frames if frame.data != b"[DONE]"]

    def test_a_claude_client_gets_reason_and_sequence_from_every_family(self) -> None:
        stop = self.whole[4:7]
        want = self.whole[:self.whole.index(stop)]
        for model in ("gpt-5.3-codex", "gpt-5-mini", "gpt-4.1", "gemini-3.1-pro-preview"):
            body = message("say a b c", model=model, stop_sequences=[stop])
            with self.subTest(model=model):
                reply = self.proxy.post("/v1/messages", body).json
                self.assertEqual((reply["stop_reason"], reply["stop_sequence"]),
                                 ("stop_sequence", stop))
                self.assertEqual(self.answer("/v1/messages", body), want)
                events = self.events("/v1/messages", body)
                text = "".join(event["delta"].get("text", "") for event in events
                               if event["type"] == "content_block_delta")
                (end,) = [e["delta"] for e in events if e["type"] == "message_delta"]
                self.assertEqual((text, end["stop_sequence"]), (want, stop))
                self.assertEqual(events[-1]["type"], "message_stop")

    def test_more_than_four_and_those_that_a_model_refuses_are_kept_on_chat(self) -> None:
        stop = self.whole[4:7]
        want = self.whole[:self.whole.index(stop)]
        for model, stops in (("gpt-4.1", ["v", "w", "x!", "y!", "z!", stop]),
                             ("gpt-5-mini", [stop]), ("claude-only-4.6", ["\n\n\n", stop])):
            body = chat("say a b c", model, stop=stops)
            with self.subTest(model=model):
                self.assertEqual(self.answer("/v1/chat/completions", body)[:len(want)], want)
                events = self.events("/v1/chat/completions", body)
                reasons = [c["finish_reason"] for e in events for c in e["choices"]]
                self.assertEqual(reasons[-1], "stop")

    def test_white_space_alone_is_watched_for_by_the_proxy_for_claude(self) -> None:
        body = message("say a b c", model="claude-sonnet-4.6", stop_sequences=["\n", "END"])
        self.assertEqual(self.proxy.post("/v1/messages", body).status, 200)
        self.assertNotIn("stop_sequences", self.fake.last("/v1/messages").json)


class NoThinkingTest(ProxyCase):
    MODELS = ("gpt-5.3-codex", "gpt-5-mini", "gemini-3.1-pro-preview")

    def blocks(self, body: Any) -> list[str]:
        reply = self.proxy.post("/v1/messages", body)
        self.assertEqual(reply.status, 200, reply.body)
        return [block["type"] for block in reply.json["content"]]

    def test_a_claude_client_that_asked_for_no_thinking_gets_text_first(self) -> None:
        for model in self.MODELS:
            for wish in ({}, {"thinking": {"type": "disabled"}}):
                body = message("think and say hi", model=model, **wish)
                with self.subTest(model=model, wish=wish):
                    self.assertNotIn("thinking", self.blocks(body))
                    stream = self.proxy.post("/v1/messages", dict(body, stream=True)).body
                    self.assertNotIn(b'"thinking"', stream)
                    self.assertIn(b"message_stop", stream)

    def test_who_asks_for_it_gets_it(self) -> None:
        body = message("think and say hi", model="gpt-5.3-codex", max_tokens=4000,
                       thinking={"type": "enabled", "budget_tokens": 2000})
        self.assertIn("thinking", self.blocks(body))

    def test_no_effort_is_the_lowest_one_without_a_summary(self) -> None:
        self.proxy.post("/v1/messages", message("think", model="gpt-5.3-codex",
                                                thinking={"type": "disabled"}))
        sent = self.fake.last("/responses").json
        listed = next(e for e in self.fake.models if e["id"] == "gpt-5.3-codex")
        efforts = listed["capabilities"]["supports"]["reasoning_effort"]
        self.assertIn(sent["reasoning"]["effort"], efforts[:2])
        self.assertNotIn("summary", sent["reasoning"])


if __name__ == "__main__":
    unittest.main()
