"""Plans of plain conversations take short ways: what goes up is the same as by the long ones.

The short ways stand in sections 7, 8 and 9 of copilot_proxy.py."""
from __future__ import annotations

import json
import random
import unittest
import unittest.mock
from dataclasses import replace
from typing import Any

from support import SLOW, cp
from wire import MODEL

COUNT = 4000 if SLOW else 1500
EVERY_PATH = frozenset(("/chat/completions", "/responses", "/v1/messages"))
MODELS = tuple(
    replace(MODEL, id=name, vendor=vendor, endpoints=paths)
    for name, vendor in (
        ("claude-sonnet-4", "Anthropic"), ("claude-sonnet-4.6", "Anthropic"),
        ("claude-opus-5", "Anthropic"), ("gpt-4.1", "OpenAI"),
        ("gpt-5.4", "OpenAI"), ("gemini-3-pro", "Google"), ("kimi-k2", "Moonshot"))
    for paths in (*(frozenset((path,)) for path in EVERY_PATH), EVERY_PATH))

TEXTS = ("Hi", "", " ", " \n\t", "\u00a0", "\u2003", "\ufeff", "\ud83d", "\x00", "a\x1fb",
         "x-anthropic-billing-header: 1", "x-anthropic-billing-header: 1\n",
         "x-anthropic-billing-header: 1\nBe kind", "x-anthropic-billing-header:\n \n",
         "<system-reminder>a</system-reminder>", "data:image/png;base64,AAAA")
ROLES = ("system", "user", "assistant", "developer", "tool", "function", "User", "", None, 7,
         ["user"], {})
ODD: tuple[Any, ...] = (None, [], {}, "", " ", "auto", "none", 0, 1, -1, True, False, 1.5, 10**30,
                        ["a"], [None], [[]], {"type": "text", "text": "t"},
                        {"type": "json_object"}, {"type": "auto"}, {"a": None})
FIELDS = ("system", "instructions", "input", "messages", "prompt", "tools", "tool_choice",
          "parallel_tool_calls", "functions", "function_call", "max_tokens", "stop",
          "max_completion_tokens", "max_output_tokens", "stream", "stream_options", "temperature",
          "top_p", "thinking", "output_config", "reasoning", "reasoning_effort", "text",
          "response_format", "metadata", "user", "n", "store", "service_tier", "stop_sequences",
          "cache_control", "context_management", "previous_response_id", "include", "betas",
          "contents", "verbosity", "top_k", "logprobs", "unknown", "output_format",
          "max_tokens_to_sample", "conversation", "prompt_cache_key", "modalities", "seed",
          "functionCall", "anthropic_beta", "mcp_servers", "container", "safety_identifier")
TOOLS: tuple[Any, ...] = (
    [{"type": "function", "function": {"name": "a b", "parameters": {"type": "object"}}}],
    [{"type": "function", "name": "f", "parameters": {}}],
    [{"name": "f", "input_schema": {"type": "object"}}],
    [{"type": "custom", "name": "c"}], [{"type": "web_search_20250305", "name": "web_search"}],
    [{"type": "web_search"}], [None], [{}], ["x"])


def some_content(rng: random.Random) -> Any:
    if rng.random() < 0.75:
        return rng.choice(TEXTS[:1] * 20 + TEXTS)
    return rng.choice((None, [], 5, {}, {"type": "text", "text": "x"},
                       [{"type": "text", "text": rng.choice(TEXTS)}],
                       [{"type": "input_text", "text": "x"}], ["words"], [None]))


def some_turn(rng: random.Random) -> Any:
    if rng.random() < 0.03:
        return rng.choice((None, "words", [], 5, {}))
    role = rng.choice(ROLES[:3] * 12 + ROLES)
    turn = {"role": role, "content": some_content(rng)}
    if rng.random() < 0.06:
        turn[rng.choice(("name", "type", "id", "tool_calls", "cache_control", "status"))] = (
            rng.choice(ODD + ("message", "function_call_output")))
    if rng.random() < 0.03:
        del turn[rng.choice(list(turn))]
    return turn


def some_body(rng: random.Random, client: cp.Dialect) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "asked"}
    if rng.random() < 0.95:
        body[client.turns_key] = [some_turn(rng) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 5)))]
    if client is cp.MESSAGES and rng.random() < 0.8:
        body["max_tokens"] = rng.choice((1, 1000, 100_000))
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 4))):
        field = rng.choice(FIELDS)
        body[field] = rng.choice(ODD + TEXTS)
        if field == "tools":
            body[field] = rng.choice(TOOLS)
        if field in ("system", "instructions", "input") and rng.random() < 0.4:
            body[field] = [{"type": "text", "text": rng.choice(TEXTS)}]
    return body


def planned(client: cp.Dialect, data: bytes, model: cp.Model) -> tuple[Any, ...]:
    """What goes up for a body, by which way, and what is lost; or the words of the refusal."""
    body = json.loads(data)
    try:
        plain = cp.is_plain(body, client)
        has_files = not plain and client.has_files(body)
        images = {"Copilot-Vision-Request": "true"}
        if plain or not client.has_images(body):
            images = {}
        upstream = cp.choose_upstream(client, model, set(), has_files)
        plan = cp.Plan.make(client, upstream, body, model, 1790000000, "a key", known_plain=plain)
        plan.attach(images, [], {})
        sent = cp.fit_model(data, plan.edit, model.id)
        if plan.is_translated:
            sent = cp.rewrite(plan.edit.body, data)
        return (upstream.name, plan.is_translated, plan.streams, plan.headers, sent,
                sorted(plan.edit.losses), plan.edit.names, client.interaction(json.loads(data)))
    except cp.ProxyError as error:
        return type(error).__name__, error.status, str(error)


class LongWays:
    """Nothing is plain, and no turn is words alone: each step looks at everything."""

    def __enter__(self) -> None:
        self._patches = (unittest.mock.patch.object(cp, "is_words", lambda item: False),
                         unittest.mock.patch.object(cp, "is_plain", lambda body, client: False))
        for patch in self._patches:
            patch.start()

    def __exit__(self, *error: object) -> None:
        for patch in self._patches:
            patch.stop()


class EarlyExitTest(unittest.TestCase):
    def check(self, client: cp.Dialect, body: dict[str, Any], model: cp.Model) -> bool:
        """Is it planned at all?"""
        data = json.dumps(body).encode()
        short = planned(client, data, model)
        with LongWays():
            long = planned(client, data, model)
        if short != long:
            where = f"{client.name} on {model.id} {sorted(model.endpoints)}: {data.decode()}"
            self.assertEqual(short, long, where)
        return len(short) > 3

    def test_short_ways_and_long_ways_send_the_same(self) -> None:
        rng = random.Random(20261127)
        done = 0
        for _ in range(COUNT):
            client = rng.choice((cp.CHAT, cp.RESPONSES, cp.MESSAGES))
            done += self.check(client, some_body(rng, client), rng.choice(MODELS))
        self.assertGreater(done, COUNT // 2)    # most are no refusals


if __name__ == "__main__":
    unittest.main()
