"""Agent sessions of 30 turns (12 in the short run) in the shape of Claude Code and Codex, with
seeded faults on the way.

The clients here do what the real ones do: they keep the history themselves, send all of it each
time, drop what a broken answer gave, and ask again.
"""
from __future__ import annotations

import json
import random
import unittest
from typing import Any

from support import SLOW, Proxy, ProxyCase, TestClock
import copilot_proxy as cp
from fake_upstream import Answer, extra

TURNS, SEEDS = (30, range(12)) if SLOW else (12, range(1))
FAULTS = ("expired_token", "cut", "early_cut", "limited", "model_switch", "restart", "interrupt",
          "compact", "refused_field")
STARTS = {
    "/v1/messages": b'event: message_start\ndata: {"type":"message_start","message":{"id":"m",'
                    b'"type":"message","role":"assistant","model":"x","content":[],'
                    b'"usage":{}}}\n\n',
    "/responses": b'event: response.created\ndata: {"type":"response.created","response":{"id":"r",'
                  b'"status":"in_progress","output":[]}}\n\n',
    "/chat/completions": b'data: {"id":"c","model":"x","created":1,"choices":[{"index":0,"delta":'
                         b'{"role":"assistant","content":"Let me"}}]}\n\n'}
SCHEMA = {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object",
          "properties": {"city": {"type": "string"}}, "additionalProperties": False}


class SessionCase(ProxyCase):
    """One client's session: faults, checks at the end."""

    models: tuple[tuple[str, str], ...] = ()             # (model, path that serves it)

    def setUp(self) -> None:
        super().setUp()
        self.clock = TestClock()
        self.do_restart()

    def run_session(self, seed: int) -> None:
        self.rng, self.place, self.results, self.seed = random.Random(seed), 0, 0, seed
        self.model, self.path = self.models[0]
        self.faults: dict[str, int] = dict.fromkeys(FAULTS, 0)
        self.begin()
        plan = list(FAULTS) + [self.rng.choice(FAULTS + ("",) * 6)
                               for _ in range(TURNS - len(FAULTS))]
        self.rng.shuffle(plan)
        for turn, fault in enumerate(plan):
            self.human("Turn %d: use the tool please." % turn)
            self.strike(fault)
            calls = self.ask()
            self.assertTrue(calls, "turn %d brought no tool call" % turn)
            if fault == "interrupt":                      # the human stops it and says more
                self.human("Stop, something else.")
                self.assertEqual(self.ask(), [])
                continue
            for call_id in calls:
                self.results += 1
                self.answer(call_id, "RESULT-%d-%d." % (seed, self.results))
            self.strike(self.rng.choice(("", "", "", "cut", "early_cut", "expired_token")))
            self.assertEqual(self.ask(), [])
            if fault == "compact":
                self.compact()
        self.human("Thanks.")
        self.ask()
        self.assertEqual(self.delivered(), self.expected(seed))
        self.assertTrue(all(self.faults.values()), self.faults)

    def expected(self, seed: int) -> list[str]:
        """The results that the upstream must have got once with the last request."""
        return ["RESULT-%d-%d." % (seed, number) for number in range(1, self.results + 1)]

    def delivered(self) -> list[str]:
        """The tools' results in the newest request, in its order; those made up are left out."""
        body = self.fake.last(self.path).json
        found = []
        for node in cp.walk_objects(body.get("messages") or body.get("input")):
            kind = str(node.get("type"))
            if kind == "tool_result" or kind.endswith("_call_output") or node.get("role") == "tool":
                content = node.get("output", node.get("content"))
                found.append(content if isinstance(content, str) else cp.text_of(content))
        return [text for text in found if text != cp.INTERRUPTED]

    # -- what goes wrong

    def strike(self, fault: str) -> None:
        """Let something happen to the next request."""
        if fault:
            self.faults[fault] += 1
            getattr(self, "do_" + fault)()

    def do_expired_token(self) -> None:
        self.fake.revoke_tokens()

    def do_cut(self) -> None:
        self.fake.script(self.path, Answer(chunks=[STARTS[self.path]], end=False,
                                           reset=self.rng.random() < 0.5))

    def do_early_cut(self) -> None:
        self.fake.script(self.path, Answer(drop="after"))

    def do_limited(self) -> None:
        self.fake.script(self.path, Answer(429, {"retry-after": "30"}, {
            "error": {"message": "slow down", "code": "rate_limited"}}))

    def do_refused_field(self) -> None:
        """From now on a field that the client sends is refused wherever it arrives."""
        def refuse(ask: Any) -> None:
            if "invented" in (ask.body.get("metadata") or {}):
                raise extra("metadata.invented")
        self.fake.refusals = [refuse]

    def do_model_switch(self) -> None:
        self.place += 1
        self.model, self.path = self.models[self.place % len(self.models)]

    def do_restart(self) -> None:
        """The old process ends, a new one serves; nothing but the login is kept."""
        self.proxy = self.enter(Proxy(self.fake, clock=self.clock, **self.settings))

    def do_interrupt(self) -> None:
        """See run_session."""

    def do_compact(self) -> None:
        """See run_session."""

    # -- the client

    def exchange(self, path: str, body: Any, terminal: tuple[str, ...], **headers: str) -> Any:
        """The events of an answer that came to its end; asks again as often as clients do."""
        seen: list[Any] = []
        for _ in range(4):
            reply = self.proxy.stream(path, body, **headers)
            events = reply.events if reply.status == 200 else []
            if events and events[-1]["type"] in terminal:
                return events
            if reply.status == 200:
                self.assertIn(events[-1]["type"], ("error", "response.failed"), "a silent end")
            else:
                self.assertIn(reply.status, (429, 502), reply)
            seen.append(reply)
            pause_s = float(reply.headers.get("retry-after", 0))     # the client waits so long
            self.clock.monotonic_offset_s += pause_s
            self.clock.wall_offset_s += pause_s
        raise AssertionError("no whole answer in four tries: %s" % seen)

    def begin(self) -> None:
        raise NotImplementedError

    def human(self, text: str) -> None:
        """The human says something."""
        raise NotImplementedError

    def ask(self) -> list[str]:
        """Send the history, keep the answer; the ids of its calls."""
        raise NotImplementedError

    def answer(self, call_id: str, text: str) -> None:
        """A tool has run."""
        raise NotImplementedError

    def compact(self) -> None:
        """The history becomes short."""


class ClaudeCodeTest(SessionCase):
    """Messages with a nonce, betas, thinking, marks and reminders."""

    models = (("claude-sonnet-4-6", "/v1/messages"), ("gpt-5.4", "/responses"),
              ("claude-haiku-4-5-20251001", "/v1/messages"),
              ("gemini-3.1-pro-preview", "/chat/completions"))

    def test_sessions_reach_their_end(self) -> None:
        for seed in SEEDS:
            with self.subTest(seed=seed):
                self.run_session(seed)

    def begin(self) -> None:
        self.messages: list[Any] = []

    def human(self, text: str) -> None:
        self.messages.append({"role": "user", "content": [
            {"type": "text", "text": "<system-reminder>Today is a day.</system-reminder>"},
            {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]})

    def ask(self) -> list[str]:
        nonce = "x-anthropic-billing-header: cc_version=2.1; cch=%05x;" % self.rng.getrandbits(20)
        body = {
            "model": self.model, "max_tokens": 32000, "messages": self.messages,
            "system": [{"type": "text", "text": nonce},
                       {"type": "text", "text": "You are a coding agent.",
                        "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
            "tools": [{"name": "Weather", "description": "d", "input_schema": SCHEMA,
                       "eager_input_streaming": True},
                      {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}],
            "metadata": {"user_id": "user_0_account__session_0"},
            "thinking": {"type": "enabled", "budget_tokens": 4000},
            "context_management": {"edits": []}}
        if self.faults.get("refused_field"):
            body["metadata"] = {"user_id": "user_0", "invented": 1}
        events = self.exchange("/v1/messages?beta=true", body, ("message_stop",), **{
            "anthropic-version": "2023-06-01", "anthropic-beta":
            "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27"})
        content: list[Any] = []
        for event in events:
            delta = event.get("delta") or {}
            if event["type"] == "content_block_start":
                content.append(dict(event["content_block"]))
                arguments = ""
            elif delta.get("type") == "input_json_delta":
                arguments += delta["partial_json"]
                content[-1]["input"] = json.loads(arguments) if arguments.endswith("}") else {}
            elif event["type"] == "content_block_delta":
                name = {"text_delta": "text", "thinking_delta": "thinking"}.get(
                    delta["type"], "signature")
                content[-1][name] = content[-1].get(name, "") + delta[name]
        self.messages.append({"role": "assistant", "content": content})
        return [block["id"] for block in content if block["type"] == "tool_use"]

    def answer(self, call_id: str, text: str) -> None:
        self.messages.append({"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": call_id, "content": [
                {"type": "text", "text": text}]},
            {"type": "text", "text": "<system-reminder>Mind the list.</system-reminder>"}]})

    def compact(self) -> None:
        """Claude Code asks for a summary with a prompt of its own; here it only goes on."""


class CodexTest(SessionCase):
    """Responses with items, encrypted reasoning, freeform tools and remote compaction."""

    models = (("gpt-5.4", "/responses"), ("claude-opus-4.7", "/v1/messages"),
              ("gpt-5.3-codex", "/responses"), ("gemini-3.1-pro-preview", "/chat/completions"))

    def test_sessions_reach_their_end(self) -> None:
        for seed in SEEDS:
            with self.subTest(seed=seed):
                self.run_session(seed)

    def begin(self) -> None:
        self.first_result = 1
        self.items: list[Any] = [{"type": "message", "role": "developer", "content": [
            {"type": "input_text", "text": "You are a coding agent."}]}]

    def human(self, text: str) -> None:
        self.items.append({"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": text}]})

    def body(self, items: list[Any]) -> dict[str, Any]:
        tool = {"type": "function", "name": "shell", "strict": False, "parameters": SCHEMA}
        patch = {"type": "custom", "name": "apply_patch", "format": {
            "type": "grammar", "syntax": "lark", "definition": "start: x"}}
        kinds = [patch, tool] if self.rng.random() < 0.5 else [tool, patch]
        return {"model": self.model, "input": items, "tools": kinds + [
            {"type": "namespace", "name": "fs", "description": "d",
             "tools": [dict(tool, name="ls")]},
            {"type": "image_generation"}], "tool_choice": "auto", "parallel_tool_calls": True,
            "reasoning": {"effort": "high", "summary": "auto"}, "store": False,
            "include": ["reasoning.encrypted_content"], "prompt_cache_key": "session-1",
            "client_metadata": {"originator": "codex"}}

    def ask(self) -> list[str]:
        body = self.body(self.items)
        if self.faults.get("refused_field"):
            body["metadata"] = {"invented": "1"}
        events = self.exchange("/v1/responses", body, ("response.completed",))
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        self.items += done
        return [item["call_id"] for item in done if "call_id" in item]

    def answer(self, call_id: str, text: str) -> None:
        kind = next(item["type"] for item in self.items if item.get("call_id") == call_id)
        self.items.append({"type": kind + "_output", "call_id": call_id, "output": text})

    def compact(self) -> None:
        """Exactly one item takes the place of what was there, as Codex insists."""
        events = self.exchange("/v1/responses", self.body(
            self.items + [{"type": "compaction_trigger"}]), ("response.completed",))
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        self.assertEqual([item["type"] for item in done], ["compaction"])
        self.assertEqual(self.delivered(), self.expected(self.seed), "lost before the compaction")
        self.items, self.first_result = self.items[:1] + done, self.results + 1

    def expected(self, seed: int) -> list[str]:
        """Results from before the last compaction live on in its summary only."""
        return super().expected(seed)[self.first_result - 1:]


if __name__ == "__main__":
    unittest.main()
