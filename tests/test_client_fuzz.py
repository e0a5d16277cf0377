"""Mangled requests of Gemini and Ollama clients, and mangled upstream streams on their way to them.

A request is understood or refused with 400, a stream always ends, and what is sent can be parsed.
"""
from __future__ import annotations

import collections
import copy
import json
import random
import unittest
from typing import Any, Iterator

from support import SLOW, cp
from cases import SharedCase
from client_wire import GeminiWriter, OllamaWriter, gemini_pieces, ollama_pieces, stream_of
from wire import MODEL, PARALLEL, PIXEL, SCHEMA, events_of, mangle

ROUNDS = 6_000 if SLOW else 300
ODD: tuple[Any, ...] = (None, True, 0, -1, 1e300, 2 ** 70, "", "x", "\ud800", [], {}, [[]], [None],
                        [5], ["x"], {"a": 1}, {"parts": 5}, [{"text": 5}], {"role": 5}, "==", "é",
                        {"type": ["STRING", 5]}, {"functionCall": {"args": []}})


def bodies() -> list[tuple[cp.Dialect, dict[str, Any]]]:
    answer = {"calls": [("c1", "get_weather", {}), ("", "other", {})], "raw": {
        "candidates": [{"content": {"role": "model", "parts": [
            {"text": "hm", "thought": True},
            {"functionCall": {"name": "get_weather", "args": {}}, "thoughtSignature": "Y3B4MS4="},
            {"functionCall": {"name": "other"}}, {"executableCode": {"code": "1"}}]}}],
        "message": {"role": "assistant", "content": "x", "thinking": "hm", "tool_calls": [
            {"function": {"name": "get_weather", "arguments": {}}}, {"function": {}}]}}}
    gemini = GeminiWriter().system("s").tool().think().schema().say("hi").image()
    gemini.replay(answer).results(answer, "a", "b").say("x", {"fileData": {
        "fileUri": "https://example.com/a.png", "mimeType": "image/png"}})
    gemini.config.update(responseSchema={"type": "OBJECT", "nullable": True, "properties": {
        "a": {"type": "STRING", "enum": ["x"], "minLength": "1"}}}, topK=3, seed=1)
    gemini.body["toolConfig"] = {"functionCallingConfig": {
        "mode": "ANY", "allowedFunctionNames": ["get_weather"]}}
    ollama = OllamaWriter().system("s").tool().think().schema().say("hi").image()
    ollama.replay(answer).results(answer, "a", "b")
    ollama.body.update(options={"temperature": 1, "stop": ["x"], "num_predict": 9}, keep_alive=0)
    generate = {"prompt": "p", "system": "s", "images": [PIXEL], "format": SCHEMA, "think": True}
    return [(cp.GEMINI, gemini.body), (cp.OLLAMA, ollama.body), (cp.OLLAMA_GENERATE, generate)]


def places(value: Any, found: list[Any]) -> list[Any]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        found.append((value, key))
        if isinstance(inner, (dict, list)):
            places(inner, found)
    return found


def mutate(rng: random.Random, body: Any) -> Any:
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        where, key = rng.choice(places(body, []) or [({}, "x")])
        if rng.random() < 0.2 and isinstance(where, dict):
            where.pop(key, None)
        else:
            where[key] = copy.deepcopy(rng.choice(ODD))
    return body


class FuzzTest(unittest.TestCase):
    def test_requests(self) -> None:
        rng = random.Random(21)
        models = [MODEL, cp.Model("claude-x-4.6", vendor="Anthropic", supports=MODEL.supports),
                  cp.Model("gemini-3-x", vendor="Google", supports=MODEL.supports)]
        for client, body in bodies():
            for _ in range(ROUNDS):
                odd = dict(mutate(rng, body), model="m")
                upstream = rng.choice(sorted(cp.DIALECTS))
                with self.subTest(client=type(client).__name__, upstream=upstream, body=odd):
                    client.interaction(odd)
                    client.has_images(odd)
                    try:
                        edit = cp.BodyEdit(copy.deepcopy(odd))
                        made, _ = cp.translate_request(client, cp.DIALECTS[upstream], edit,
                                                       rng.choice(models))
                        json.loads(cp.dumps(made.body))
                    except cp.ProxyError as error:
                        self.assertEqual(error.status, 400)

    def test_streams(self) -> None:
        rng = random.Random(22)
        readers = ((cp.GEMINI, gemini_pieces), (cp.OLLAMA, ollama_pieces),
                   (cp.GEMINI_ARRAY, json.loads), (cp.OLLAMA_GENERATE, ollama_pieces))
        for client, read in readers:
            for upstream in cp.DIALECTS:
                events = events_of(PARALLEL[upstream])
                for _ in range(ROUNDS // 7):
                    odd = list(events)
                    at = rng.randrange(len(odd))
                    if isinstance(odd[at], dict):
                        odd[at] = mutate(rng, odd[at])
                    data = b"".join(b"data: %b\n\n" % (
                        event.encode() if isinstance(event, str) else cp.dumps(event))
                        for event in odd)
                    with self.subTest(client=type(client).__name__, upstream=upstream, data=data):
                        out, pipe = stream_of(client, upstream, data)
                        self.assertTrue(pipe.ended)
                        last = read(out)[-1]
                        is_good = last.get("done") or "finishReason" in json.dumps(last)
                        self.assertEqual(bool(is_good), not pipe.failure)

    def test_depth_and_number(self) -> None:
        deep: Any = {"text": "x"}
        for _ in range(400):
            deep = {"functionResponse": {"name": "f", "parts": [deep]}}
        schema: Any = {"type": "STRING"}
        for _ in range(400):
            schema = {"type": "ARRAY", "items": schema}
        for body in ({"contents": [{"parts": [deep]}]},
                     {"contents": "x", "tools": [{"functionDeclarations": [
                         {"name": "f", "parameters": schema}]}]}):
            cp.GEMINI.has_images(body)
            request = cp.GEMINI.decode_request(body)
            self.assertTrue(request.turns)


class NdjsonFuzz(SharedCase):
    """Mangled requests to Ollama's routes on a real socket, on a fake that cuts, fails or goes
    astray: what comes back is whole lines of JSON, and the last one is the end or an error."""

    COUNT = 3_000 if SLOW else 150
    ENDS = ("", "@@events=9 cut=4@@", "@@events=9 error=4@@", "@@events=9 noend=1@@",
            "@@events=9 bytewise=1@@", "@@events=9 odd=1 crlf=1@@", "@@events=9 split=1@@")

    def requests(self, rng: random.Random) -> Iterator[tuple[bytes, bytes]]:
        """(path, body)"""
        models = ("gpt-4.1", "gpt-5.3-codex", "claude-sonnet-4.6")
        for _ in range(self.COUNT):
            text, model = rng.choice(self.ENDS), rng.choice(models)
            writer = OllamaWriter().system("s").tool().say("hi " + text)
            yield rng.choice((
                (b"/api/chat", cp.dumps(dict(writer.body, model=model))),
                (b"/api/generate", cp.dumps({"model": model, "prompt": "hi " + text})),
                (b"/api/embed", cp.dumps({"model": "text-embedding-3-small", "input": ["a"]})),
                (b"/api/show", cp.dumps({"model": model}))))

    def test_mangled_requests(self) -> None:
        rng, outcomes = random.Random(23), collections.Counter()
        for number, (path, body) in enumerate(self.requests(rng)):
            if number % 3:
                body = mangle(rng, body)
            with self.subTest(path=path, body=body):
                reply = self.proxy.post(path.decode(), body)
                self.assertNotEqual(reply.status, 500, reply)
                if reply.status != 200:
                    self.assertTrue(json.loads(reply.body)["error"])
                    outcomes["refused"] += 1
                    continue
                lines = [json.loads(line) for line in reply.body.splitlines()]
                if "ndjson" in reply.headers["content-type"]:
                    self.assertTrue(reply.body.endswith(b"\n"))
                    ends = [bool(line.get("done") or "error" in line) for line in lines]
                    self.assertEqual(ends, [False] * (len(lines) - 1) + [True])
                    outcomes["failed" if "error" in lines[-1] else "streamed"] += 1
                else:
                    self.assertEqual(len(lines), 1)
                    outcomes["whole"] += 1
            for account in self.proxy.app.accounts.all():
                account.limits.clear()
        for outcome in ("refused", "failed", "streamed", "whole"):
            self.assertGreater(outcomes[outcome], 0, outcomes)
        self.assertEqual([r.getMessage() for r in self.proxy.logs if r.exc_info], [])


if __name__ == "__main__":
    unittest.main()
