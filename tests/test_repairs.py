"""What the upstream refuses is repaired once and remembered; limits are kept to and told in the
words that clients act on."""
from __future__ import annotations

import contextlib
import json
import random
import re
import threading
import time
import unittest
from typing import Any, Callable, List, NamedTuple, Optional
from unittest import mock

from support import SLOW, Proxy, ProxyCase, Reply, TestClock, chat, message, response
import copilot_proxy as cp
from fake_upstream import (CHAT, ENABLED_REFUSED, MESSAGES, PREFILL, RESPONSES, Answer, Ask,
                           FakeUpstream, Refuse, bad, bad_message, default_models, make_claude)
from wire import assistant, user

PATHS = {CHAT: "/v1/chat/completions", RESPONSES: "/v1/responses", MESSAGES: "/v1/messages"}
MAKERS: dict[str, Callable[..., dict[str, Any]]] = {
    CHAT: chat, RESPONSES: response, MESSAGES: message}
SONNET, HAIKU, MINI, CODEX = ("claude-sonnet-4.6", "claude-haiku-4.5", "gpt-5-mini",
                              "gpt-5.3-codex")
ABLE = "claude-able-9"                                # finds tools that are loaded later
TERMINAL = {CHAT: b"data: [DONE]\n\n", RESPONSES: b"event: response.completed",
            MESSAGES: b"event: message_stop"}
LONG_ID = "call_" + "x" * 55


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def picture(mark: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + mark * 40}}


def source(mark: str) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                        "data": mark * 40}}


def called(content: Any) -> list[dict[str, Any]]:
    """A round of one tool in Messages' words."""
    return [user("a"), assistant([{"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}]),
            user([{"type": "tool_result", "tool_use_id": "toolu_1", "content": content}])]


TOOL = {"name": "f", "description": "F.", "input_schema": {"type": "object", "properties": {}}}
REASONING = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAforeign"}
STATEFUL = [user("a"), REASONING, {"type": "message", "role": "assistant", "content": [
    {"type": "output_text", "text": "b"}]}, user("c")]


class Case(NamedTuple):
    """One refusal: `path` refuses with `refusal` as long as `holds(body)`; None: it does so by
    itself.  `body` is the client's request; `losses`: is anything lost by the repair?"""

    name: str
    path: str
    body: dict[str, Any]
    holds: Callable[[Ask], Any]
    refusal: Optional[Refuse]
    headers: dict[str, str] = {}
    calls: int = 2


def has(*keys: str) -> Callable[[Ask], bool]:
    """Is there something at this path of the body?"""
    def holds(ask: Ask) -> bool:
        value: Any = ask.body
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value is not None
    return holds


def holds_text(words: str) -> Callable[[Ask], bool]:
    return lambda ask: words in json.dumps(ask.body)


def at(path: str) -> Callable[[Ask], bool]:
    return lambda ask: ask.record.path == path


def images_of(ask: Ask) -> int:
    return json.dumps(ask.body).count("data:image/png;base64,") + json.dumps(ask.body).count(
        '"type": "base64"')


def extra(path: str) -> Refuse:
    return bad_message(path + ": Extra inputs are not permitted")


CASES = (
    Case("endpoint", CHAT, chat("hi", MINI), at(CHAT), bad(
        'model "gpt-5-mini" is not accessible via the /chat/completions endpoint',
        "unsupported_api_for_model")),
    Case("reasoning state", RESPONSES, response("", CODEX, input=STATEFUL), at(""), None),
    Case("reasoning state", RESPONSES, response("", CODEX, input=STATEFUL),
         holds_text("encrypted_content\": \"g"), Refuse(401, {"error": {
             "message": "input item ID does not belong to this connection",
             "code": "unauthorized"}})),
    Case("reasoning state", RESPONSES, response("", CODEX, input=[*STATEFUL[:1], {
        "type": "compaction", "encrypted_content": "gAAAAold"}, user("c")]),
        holds_text("gAAAAold"), bad(
            "The encrypted content gAAA... could not be verified. Reason: Encrypted content could "
            "not be decrypted or parsed.", "invalid_encrypted_content")),
    Case("reasoning state", RESPONSES, response("", CODEX, input=[
        user("a"), {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [
            {"type": "encrypted_content", "encrypted_content": "gAAAAsub"}]}]),
        holds_text("gAAAAsub"), bad(
            "Encrypted function output content could not be decrypted or decoded.",
            "bad_request")),
    Case("reasoning state", RESPONSES, response("", CODEX, input=STATEFUL),
         holds_text("\"reasoning\", "), bad("Item 'rs_1' of type 'reasoning' was provided without "
                                            "its required following item.")),
    Case("reasoning state", MESSAGES, message("", SONNET, messages=[
        user("a"), assistant([{"type": "thinking", "thinking": "t", "signature": "foreign"},
                              text("b")]), user("c")]), at(""), None),
    Case("reasoning state", MESSAGES, message("", SONNET, messages=[
        user("a"), assistant([{"type": "redacted_thinking", "data": "foreign"}, text("b")]),
        user("c")]), holds_text("redacted_thinking"), bad_message(
            "messages.1.content.0: `thinking` or `redacted_thinking` blocks in the latest assistant"
            " message cannot be modified.")),
    Case("reasoning state", CHAT, chat("", SONNET, messages=[
        user("a"), assistant("b", reasoning_text="t", reasoning_opaque="foreign"), user("c")]),
        holds_text("reasoning_opaque"), bad(
            "The encrypted content foreign could not be verified.", "invalid_encrypted_content")),
    Case("thinking", MESSAGES, message("", SONNET, messages=called("r"), tools=[TOOL],
                                       thinking={"type": "enabled", "budget_tokens": 1024},
                                       max_tokens=4000),
         has("thinking"), bad_message(
             "messages.1.content.0.type: Expected `thinking` or `redacted_thinking`, but found "
             "`tool_use`. When `thinking` is enabled, a final `assistant` message must start with a"
             " thinking block.")),
    Case("thinking", MESSAGES, message("hi", SONNET, max_tokens=4000, thinking={
        "type": "enabled", "budget_tokens": 2000}),
        lambda ask: ask.body["thinking"]["type"] == "enabled", bad_message(ENABLED_REFUSED)),
    Case("thinking", MESSAGES, message("hi", SONNET, max_tokens=4000, thinking={
        "type": "adaptive"}), lambda ask: ask.body["thinking"]["type"] == "adaptive", bad_message(
            "adaptive thinking is not supported on this model")),
    Case("thinking", MESSAGES, message("hi", SONNET, thinking={"type": "disabled"}),
         has("thinking"), bad_message(
             "\"thinking.type.disabled\" is not supported for this model.")),
    Case("effort", RESPONSES, response("hi", CODEX, reasoning={"effort": "xhigh"}),
         lambda ask: ask.body["reasoning"]["effort"] == "xhigh", bad(
             "Unsupported value: 'xhigh' is not supported with the 'gpt-5.3-codex' model. Supported"
             " values are: 'low', 'medium', and 'high'.", "unsupported_value",
             "reasoning.effort")),
    Case("effort", MESSAGES, message("hi", SONNET, output_config={"effort": "high"}),
         lambda ask: ask.body["output_config"]["effort"] == "high", bad(
             "output_config.effort: 'high' is not supported. Supported values: low, medium",
             "invalid_reasoning_effort")),
    Case("effort", CHAT, chat("hi", MINI, reasoning_effort="high"),
         lambda ask: ask.body["reasoning_effort"] == "high", bad(
             "this value is not accepted", "invalid_reasoning_effort")),
    Case("effort", MESSAGES, message("hi", SONNET, output_config={"effort": "low"}),
         has("output_config"), bad_message("This model does not support the effort parameter.")),
    Case("limit", CHAT, chat("hi", max_tokens=50), has("max_tokens"), bad(
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
        "'max_completion_tokens' instead.", param="max_tokens")),
    Case("limit", CHAT, chat("hi", max_completion_tokens=50), has("max_completion_tokens"),
         bad("Unknown parameter: 'max_completion_tokens'.", "unknown_parameter")),
    Case("limit", CHAT, chat("hi", max_tokens=20000),
         lambda ask: ask.body["max_tokens"] > 9000, bad(
             "max_tokens is too large: 20000. This model supports at most 9000 completion tokens, "
             "whereas you provided 20000.", "invalid_value", "max_tokens")),
    Case("limit", MESSAGES, message("hi", SONNET, max_tokens=16000),
         lambda ask: ask.body["max_tokens"] > 9000, bad_message(
             "max_tokens: 16000 > 9000, which is the maximum allowed number of output tokens for "
             "claude-sonnet-4.6")),
    Case("limit", MESSAGES, message("hi", SONNET, top_k=900),
         lambda ask: ask.body["top_k"] > 500, bad_message(
             "top_k: Input should be less than or equal to 500")),
    Case("limit", RESPONSES, response("hi", CODEX, max_output_tokens=16),
         lambda ask: ask.body["max_output_tokens"] < 32, bad(
             "Invalid 'max_output_tokens': integer below minimum value. Expected a value >= 32, but"
             " got 16 instead.", "integer_below_min_value", "max_output_tokens")),
    Case("sampling", CHAT, chat("hi", SONNET, temperature=0.5, top_p=0.5),
         lambda ask: "temperature" in ask.body and "top_p" in ask.body, bad(
             "`temperature` and `top_p` cannot both be specified for this model. Please use only "
             "one.")),
    Case("field", MESSAGES, message("hi", SONNET, temperature=0.5), has("temperature"),
         bad_message("`temperature` is deprecated for this model.")),
    Case("field", MESSAGES, message("hi", SONNET, top_p=3.5), has("top_p"),
         bad_message("top_p: range: 0..1")),
    Case("field", CHAT, chat("hi", temperature=0.5), has("temperature"), bad(
        "Unsupported value: 'temperature' does not support 0.5 with this model. Only the default "
        "(1) value is supported.", "unsupported_value", "temperature")),
    Case("field", CHAT, chat("hi", frequency_penalty=0.5), has("frequency_penalty"), bad(
        "'gpt-4.1' does not support the 'frequency_penalty' parameter.")),
    Case("tool", RESPONSES, response("hi", CODEX, tools=[
        {"type": "web_search_preview"}, {"type": "function", "name": "f", "parameters": {}}]),
        holds_text("web_search_preview"), bad(
            "The requested tool web_search_preview is not supported.", "unsupported_value",
            "tools")),
    Case("tool", RESPONSES, response("hi", CODEX, tools=[{"type": "local_shell"}]),
         lambda ask: "local_shell" in [tool["type"] for tool in ask.body.get("tools", ())],
         bad("Hosted tool 'local_shell' is not supported with gpt-5.3-codex.")),
    Case("tool", RESPONSES, response("hi", CODEX, tools=[{"type": "mcp", "server_label": "m"}]),
         holds_text("\"mcp\""), bad("Unsupported tool type: 'mcp'")),
    Case("tool", RESPONSES, response("use a tool", CODEX, tools=[
        {"type": "custom", "name": "apply_patch", "description": "Patch."}]),
        holds_text("\"custom\""), bad(
            "Invalid value: 'custom'. Supported values are: 'function', 'web_search'.",
            "invalid_value", "tools[0].type")),
    Case("tool", MESSAGES, message("hi", ABLE, messages=called([
        {"type": "tool_reference", "tool_name": "later"}]), tools=[
            TOOL, dict(TOOL, name="later", defer_loading=True)]),
        holds_text("\"tool_reference\""), bad_message(
            "messages.2.content.0.tool_result.content.0: Input tag 'tool_reference' found using "
            "'type' does not match any of the expected tags")),
    Case("tool", MESSAGES, message("hi", SONNET, tools=[
        TOOL, {"type": "web_search_20250305", "name": "web_search"}]), at(""), None),
    Case("tool", MESSAGES, message("hi", SONNET, tools=[
        TOOL, {"type": "web_search_20250305", "name": "web_search"}]),
        holds_text("web_search_20250305"), bad(
            "The use of the web search tool is not supported.", "unsupported_value")),
    Case("beta", MESSAGES, message("hi", SONNET),
         lambda ask: "advanced" in ask.headers.get("anthropic-beta", ""), bad_message(
             "Unexpected value(s) `advanced-tool-use-2025-11-20` for the `anthropic-beta` header."),
         {"anthropic-beta": "interleaved-thinking-2025-05-14,advanced-tool-use-2025-11-20"}),
    Case("beta", MESSAGES, message("hi", SONNET), lambda ask: "anthropic-beta" in ask.headers,
         bad_message("invalid beta flag"), {"anthropic-beta": "advanced-tool-use-2025-11-20"}),
    Case("cache time", MESSAGES, message("", SONNET, messages=[
        user([dict(text("hi"), cache_control={"type": "ephemeral", "ttl": "1h"})])],
        system=[dict(text("a"), cache_control={"type": "ephemeral", "ttl": "1h"})]),
        holds_text('"ttl"'), extra("system.0.cache_control.ephemeral.ttl")),
    Case("prefill", CHAT, chat("", messages=[user("a"), assistant("b")]),
         lambda ask: ask.body["messages"][-1]["role"] == "assistant", bad(PREFILL)),
    Case("prefill", MESSAGES, message("", HAIKU, messages=[user("a"), assistant("b")]),
         lambda ask: ask.body["messages"][-1]["role"] == "assistant", bad_message(PREFILL)),
    Case("images", CHAT, chat("", messages=[
        user([picture("a")]), assistant("b"), user([picture("c"), picture("d")]), assistant("b"),
        user("e")]), lambda ask: images_of(ask) > 2,
        Refuse(400, "too many URL images in request (max 2)")),
    Case("images", MESSAGES, message("", SONNET, messages=[
        *called([source("a"), source("b")]), assistant("ok"), user("go on")]),
        holds_text("aaaa"), bad_message(
            "messages.2.content.0.tool_result.content.0.image.source.base64: image exceeds 5 MB "
            "maximum: 5316852 bytes > 5242880 bytes")),
    Case("images", RESPONSES, response("", CODEX, input=[
        user([{"type": "input_image", "image_url": picture(mark)["image_url"]["url"]}])
        for mark in "abc"]), holds_text("aaaa"), Refuse(413, "Request Entity Too Large")),
    Case("images", CHAT, chat("", messages=[user([picture("a"), text("look")]), assistant("b"),
                                            user("c")]),
         lambda ask: images_of(ask), Refuse(413, "failed to parse request")),
    Case("field", MESSAGES, message("", SONNET, brand_new={"a": 1}, tools=[dict(TOOL, fresh=True)],
                                    messages=[user([dict(text("hi"), odd=1)])]), at(""), None,
         calls=4),
    Case("field", CHAT, chat("hi", safety_identifier="u"), has("safety_identifier"), bad(
        "Unsupported parameter: 'safety_identifier'", "unsupported_parameter")),
    Case("field", CHAT, chat("hi", seed=1), has("seed"),
         Refuse(400, "failed to parse request: unknown field `seed`, expected one of `model`")),
    Case("field", RESPONSES, response("", CODEX, input=[dict(user("hi"), odd=1)]),
         holds_text("odd"), bad("Unknown parameter: 'input[0].odd'.", "unknown_parameter")),
    Case("field", CHAT, chat("hi", logit_bias={}), has("logit_bias"),
         bad("Additional properties are not allowed ('logit_bias' was unexpected)")),
    Case("field", CHAT, chat("hi", logprobs=True), has("logprobs"),
         bad("logprobs is not supported")),
    Case("field", CHAT, chat("hi", logprobs=True), has("logprobs"),
         bad("Log probabilities are not supported here.", "unsupported_parameter", "logprobs")),
    Case("field", RESPONSES, response("hi", CODEX, context_management=[{"type": "compaction"}]),
         has("context_management"), bad("context_management is not supported",
                                        "unsupported_parameter", "context_management")),
    Case("field", RESPONSES, response("hi", CODEX, reasoning={"effort": "low",
                                                              "summary": "detailed"}),
         has("reasoning", "summary"), bad(
             "Unsupported value: 'detailed' is not supported with the 'gpt-5.3-codex' model. "
             "Supported values are: 'auto'.", "unsupported_value", "reasoning.summary")),
)


def rule(case: Case) -> Callable[[Ask], None]:
    """The fake's refusal: exactly as long as the request has what is refused."""
    def refuse(ask: Ask) -> None:
        if case.refusal is None or ask.record.path != case.path:
            return
        try:
            holds = case.holds(ask)
        except (KeyError, TypeError):
            return
        if holds:
            raise case.refusal
    return refuse


class Posting(ProxyCase):
    """Proxies on a fake that refuses what a case says."""

    def setUp(self) -> None:
        super().setUp()
        self.fake.models.append(make_claude(ABLE, (MESSAGES,), tool_search=True))

    def calls(self, fake: FakeUpstream) -> int:
        return sum(fake.count(path) for path in PATHS)

    def post(self, proxy: Proxy, case: Case, **more: Any) -> Reply:
        return proxy.post(PATHS[case.path], dict(case.body, **more), **case.headers)


class TableTest(Posting):
    """Every row: success at once, one call the next time, streamed or not (in the plain run every
    other row is streamed first)."""

    def test_every_refusal_is_cured_and_the_lesson_kept(self) -> None:
        fired = self.watch_rows()
        orders = ((False, True), (True, False))
        for at, case in enumerate(CASES):
            self.fake.refusals = [rule(case)]
            for first, second in orders if SLOW else orders[at % 2:][:1]:
                with self.subTest(case.name, body=case.body, stream=first):
                    proxy = self.proxy
                    proxy.app.login.account.memory = cp.LearnedRepairs()  # type: ignore[union-attr]
                    before = self.calls(self.fake)
                    reply = self.post(proxy, case, stream=first)
                    self.assertEqual(reply.status, 200, reply.body)
                    self.assertEqual(self.calls(self.fake) - before, case.calls)
                    self.assertIn(case.name.split()[0], reply.headers["x-copilot-proxy-repaired"])
                    self.check_end(case, reply, first)
                    before = self.calls(self.fake)
                    reply = self.post(proxy, case, stream=second)
                    self.assertEqual(reply.status, 200, reply.body)
                    self.assertEqual(self.calls(self.fake) - before, 1)
                    self.check_end(case, reply, second)
                    self.assertIn(case.name, proxy.get("/stats").json["repairs"])
        self.assertEqual([row.pattern for row in cp.REPAIRS if row.pattern not in fired], [])

    def watch_rows(self) -> set[str]:
        """The patterns of the rows that changed something."""
        fired: set[str] = set()

        def watched(row: Any) -> Any:
            def patch(plan: Any, *words: str) -> Any:
                found = row.patch(plan, *words)
                if found is not None:
                    fired.add(row.pattern)
                return found
            return row._replace(patch=patch)
        rows = cp.REPAIRS
        self.addCleanup(setattr, cp, "REPAIRS", rows)
        cp.REPAIRS = tuple(map(watched, rows))
        return fired

    def check_end(self, case: Case, reply: Reply, stream: bool) -> None:
        if stream:
            self.assertIn(TERMINAL[case.path], reply.body)
        self.assertNotIn(b'"error":{', reply.body)

    def test_translated_requests_are_repaired_as_well(self) -> None:
        effort = next(case for case in CASES if case[:2] == ("effort", RESPONSES))
        cases = [
            Case("effort", RESPONSES, {}, *effort[3:5]),
            Case("limit", RESPONSES, {}, lambda ask: ask.body["max_output_tokens"] > 900, bad(
                "max_output_tokens is too large: 1000. This model supports at most 900 completion "
                "tokens")),
            Case("field", RESPONSES, {}, has("parallel_tool_calls"), bad(
                "Unknown parameter: 'parallel_tool_calls'.", "unknown_parameter"))]
        bodies = {
            CHAT: chat("hi", CODEX, reasoning_effort="xhigh", max_tokens=1000,
                       parallel_tool_calls=True, tools=[{"type": "function", "function": {
                           "name": "t", "parameters": {"type": "object", "properties": {}}}}]),
            MESSAGES: message("hi", CODEX, output_config={"effort": "xhigh"}, tools=[TOOL],
                              tool_choice={"type": "auto", "disable_parallel_tool_use": True})}
        self.fake.refusals = [rule(case) for case in cases]
        for client, body in bodies.items():
            for stream in (False, True):
                with self.subTest(client, stream=stream), Proxy(self.fake) as proxy:
                    before = self.fake.count(RESPONSES)
                    reply = proxy.post(PATHS[client], dict(body, stream=stream))
                    self.assertEqual(reply.status, 200, reply.body)
                    self.assertEqual(reply.headers["x-copilot-proxy-repaired"],
                                     "effort, field, limit")
                    self.assertEqual(self.fake.count(RESPONSES), before + 4)
                    reply = proxy.post(PATHS[client], dict(body, stream=stream))
                    self.assertEqual((reply.status, self.fake.count(RESPONSES)), (200, before + 5))

    def test_what_the_client_asked_for_is_still_done(self) -> None:
        """Freeform tools become functions upstream and come back as they were."""
        case = next(c for c in CASES if "apply_patch" in json.dumps(c.body))
        self.fake.refusals = [rule(case)]
        for stream in (False, True):
            reply = self.post(self.proxy, case, stream=stream)
            self.assertEqual(self.fake.last(RESPONSES).json["tools"][0]["type"], "function")
            output = reply.events[-1]["response"]["output"] if stream else reply.json["output"]
            self.assertEqual([item["name"] for item in output
                              if item["type"] == "custom_tool_call"], ["apply_patch"])

    def test_new_state_and_new_images_are_welcome_after_a_refusal(self) -> None:
        case = CASES[1]
        self.assertEqual(self.post(self.proxy, case).status, 200)
        good = dict(REASONING, encrypted_content=self.fake.seal("reasoning", "x"))
        body = response("", CODEX, input=[*STATEFUL, good, *STATEFUL[2:]])
        before = self.fake.count(RESPONSES)
        self.assertEqual(self.proxy.post("/v1/responses", body).status, 200)
        sent = [item.get("encrypted_content") for item in self.fake.last(RESPONSES).json["input"]]
        self.assertEqual([state for state in sent if state], [good["encrypted_content"]])
        self.assertEqual(self.fake.count(RESPONSES), before + 1)

    def test_a_field_is_removed_from_all_elements_and_nowhere_else(self) -> None:
        def refuse(ask: Ask) -> None:
            for number, tool in enumerate(ask.body["tools"]):
                if "cache_hint" in tool:
                    raise extra("tools.%d.custom.cache_hint" % number)
        self.fake.refusals, self.fake.lenient = [refuse], {"tools"}
        schema = {"type": "object", "properties": {"cache_hint": {"type": "string"}}}
        tools = [dict(TOOL, name=name, cache_hint=1, input_schema=schema) for name in "ab"]
        reply = self.proxy.post("/v1/messages", message("hi", SONNET, tools=tools))
        self.assertEqual((reply.status, self.fake.count(MESSAGES)), (200, 2))
        sent = self.fake.last(MESSAGES).json["tools"]
        sent[-1].pop("cache_control")
        self.assertEqual(sent, [dict(TOOL, name=name, input_schema=schema) for name in "ab"])


class PatchTest(unittest.TestCase):
    """The patches by themselves."""

    def test_no_patch_ever_fails_whatever_the_body(self) -> None:
        chance = random.Random(7)
        wild: tuple[Any, ...] = (None, True, -1, 10 ** 30, 1.5, "", "x", [], [None], [[{}]], ["x"],
                                 {}, {"type": "text"}, {"a": {"b": [1, {"type": []}]}})
        model = cp.Model.from_entry(next(e for e in default_models() if e["id"] == SONNET))

        def raised(refusal: Refuse) -> cp.UpstreamError:
            about = refusal.body["error"] if isinstance(refusal.body, dict) else {}
            error = cp.UpstreamError(about.get("message", refusal.body), refusal.status,
                                     about.get("code"), about.get("param"))
            error.answered = True
            return error

        refusals = [case.refusal for case in CASES if case.refusal]
        repaired: set[str] = set()
        for case in CASES:
            own = [case.refusal] if case.refusal else []
            dialect = next(d for d in cp.DIALECTS.values() if d.path == case.path)
            for number in range(60 if SLOW else 3):
                body = json.loads(json.dumps(case.body))
                plan = cp.Plan.make(dialect, dialect, body, model, 0, "k")
                if number:
                    plan.edit.body = self.mutilated(case.body, wild, chance)
                memory = cp.LearnedRepairs()
                memory.prepare(plan)
                for refusal in own + chance.sample(refusals, 12):
                    error = raised(refusal)
                    with contextlib.suppress(cp.BadRequest):     # tools that are no objects
                        memory.repair(plan, error)
                memory.learn(plan)
                repaired.update(plan.repairs.names)
                plan.edit.body = self.mutilated(case.body, wild, chance)
                with contextlib.suppress(cp.BadRequest):
                    memory.prepare(plan)
                self.assertEqual(cp.loads(cp.dumps(plan.edit.body)), plan.edit.body)
        self.assertEqual({repair.name for repair in cp.REPAIRS} - repaired, {"beta"})   # a header

    def mutilated(self, body: Any, wild: tuple[Any, ...], chance: random.Random) -> dict[str, Any]:
        """A copy with some values replaced by nonsense."""
        def change(value: Any, depth: int) -> Any:
            if depth and chance.random() < 0.12:
                return json.loads(json.dumps(chance.choice(wild)))
            if isinstance(value, dict):
                return {k: change(v, depth + 1) for k, v in value.items()}
            return [change(v, depth + 1) for v in value] if isinstance(value, list) else value
        return change(body, 0)                               # type: ignore[no-any-return]

    def test_places(self) -> None:
        body = {"a": [{"type": "t", "b": {"c": 1}}, {"type": "u", "b": {"c": 2}}, 3], "t": {"t": 4}}
        for path, wanted in (("a.0.b.c", [1, 2]), ("a[1].b.c", [1, 2]), ("a.0.t.b.c", [1]),
                             ("a.9.u.b.c", [2]), ("a.b", []), ("a.0", []), ("t.t", [4]),
                             ("x.y", []), ("", []), ("...", []), ("t.t.", [4]), ("[[", [])):
            with self.subTest(path):
                self.assertEqual([holder[key] for holder, key in cp.places(body, path)], wanted)


class CousinTest(Posting):
    """What cannot be repaired comes back as the upstream said it, in the client's dialect."""

    def check(self, client: str, reply: Reply, words: str, status: int, calls: int) -> None:
        self.assertEqual(reply.status, status, reply.body)
        self.assertEqual(set(reply.json), {"type", "error", "request_id"}
                         if client == MESSAGES else {"error"})
        self.assertIn(words, reply.json["error"]["message"])
        self.assertLessEqual(calls, 1 if "accessible" not in words else cp.MAX_CALLS)

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_the_same_words_about_nothing_are_told(self) -> None:
        for case in CASES:
            if case.refusal is None:
                continue
            error = case.refusal.body if isinstance(case.refusal.body, str) \
                else case.refusal.body["error"]["message"]
            for client, make in MAKERS.items():
                for stream in (False, True):
                    with self.subTest(error, client=client, stream=stream):
                        self.refuse_all(case.refusal)
                        before = self.calls(self.fake)
                        reply = self.proxy.post(PATHS[client], make("hi", stream=stream))
                        self.check(client, reply, error, case.refusal.status,
                                   self.calls(self.fake) - before)

    def test_a_long_refusal_is_not_looked_through_to_its_end(self) -> None:
        """10 kB of quotes took 8 s."""
        seen: List[int] = []
        with mock.patch.object(cp.re, "finditer", lambda pattern, text, *more: seen.append(
                len(text)) or iter(())):
            error = cp.UpstreamError("x" * 2000, 400)
            error.answered = True
            plan = mock.Mock(repairs=cp.PlanRepairs())
            self.assertFalse(cp.LearnedRepairs().repair(plan, error))
        self.assertTrue(seen and max(seen) <= cp.REPAIR_TEXT_CHARS)

    def refuse_all(self, refusal: Refuse) -> None:
        def refuse(ask: Ask) -> None:
            raise refusal
        self.fake.refusals = [refuse]
        self.proxy.app.login.account.memory = cp.LearnedRepairs()      # type: ignore[union-attr]

    def test_what_carries_the_meaning_stays(self) -> None:
        schema = {"type": "json_schema", "json_schema": {"name": "o", "schema": {"type": "object"}}}
        plan = {"type": "json_schema", "schema": {"type": "object", "properties": {}}}
        hosted = [{"type": "web_search"}]
        cases = (
            (CHAT, chat("hi", response_format=schema), bad(
                "Unsupported parameter: 'response_format' is not supported with this model.",
                param="response_format")),
            (CHAT, chat("hi", response_format=schema), bad(
                "Unsupported value: 'json_schema' is not supported.",
                param="response_format.type")),
            (RESPONSES, dict(response("hi", CODEX), text={"format": dict(plan, name="o")}), bad(
                "Unknown parameter: 'text'.", "unknown_parameter", "text")),
            (MESSAGES, message("hi", SONNET, output_config={"format": plan}),
             extra("output_config.format")),
            (MESSAGES, message("hi", SONNET, output_config={"format": plan}),
             extra("output_config")),
            (MESSAGES, message("hi", SONNET, tools=[TOOL], tool_choice={
                "type": "tool", "name": "f"}), extra("tool_choice")),
            (RESPONSES, response("hi", CODEX, tools=hosted, tool_choice={"type": "web_search"}),
             bad("The requested tool web_search is not supported.", param="tools")),
            (MESSAGES, message("hi", SONNET), extra("messages.0.content")),
            (CHAT, chat("", messages=[user([text("what is it?"), picture("a")])]),
             Refuse(413, "Request Entity Too Large")))
        for path, body, refusal in cases:
            with self.subTest(path, body=body):
                self.refuse_all(refusal)
                before = self.calls(self.fake)
                reply = self.proxy.post(PATHS[path], body)
                words = refusal.body if isinstance(refusal.body, str) \
                    else refusal.body["error"]["message"]
                self.check(path, reply, words, refusal.status, self.calls(self.fake) - before)

    def test_too_many_tools_are_told_with_their_number(self) -> None:
        tools = [{"type": "function", "function": {"name": "f%d" % n, "parameters": {}}}
                 for n in range(150)]
        self.refuse_all(bad("Invalid 'tools': array too long. Expected an array with maximum length"
                            " 128, but got an array with length 150 instead.",
                            "array_above_max_length", "tools"))
        reply = self.proxy.post("/v1/chat/completions", chat("hi", tools=tools))
        self.assertEqual((reply.status, reply.json["error"]["param"]), (400, "tools"))
        for count in ("128", "150"):
            self.assertIn(count, reply.json["error"]["message"])
        self.assertEqual(self.fake.count(CHAT), 1)

    def test_never_more_than_five_calls_and_nothing_is_learned_from_a_failure(self) -> None:
        numbers = iter(range(100))

        def refuse(ask: Ask) -> None:
            raise extra("field_%d" % next(numbers))
        self.fake.refusals = [refuse]
        self.fake.script(MESSAGES, Answer(status=0), Answer(status=503, body="busy"))
        body = message("hi", SONNET, **{"field_%d" % n: n for n in range(9)})
        reply = self.proxy.post("/v1/messages", body)
        self.assertEqual(reply.status, 400)
        self.assertEqual(self.fake.count(MESSAGES), 5)       # three repairs and one hiccup
        self.fake.refusals, self.fake.lenient = [], {"fields"}
        self.assertEqual(self.proxy.post("/v1/messages", body).status, 200)
        self.assertIn("field_0", self.fake.last(MESSAGES).json)

    def test_nothing_is_replayed_once_the_client_has_a_byte(self) -> None:
        def refuse(ask: Ask) -> None:
            if "odd" in ask.body:
                raise extra("odd")
        self.fake.refusals = [refuse]
        self.fake.script(MESSAGES, Answer(status=0, hold=True))
        with Proxy(self.fake, keepalive_s=0.02) as proxy:
            replies: list[Reply] = []
            thread = threading.Thread(target=lambda: replies.append(
                proxy.stream("/v1/messages", message("hi", SONNET, odd=1))))
            thread.start()
            self.assertTrue(self.fake.wait_for(lambda: self.fake.holding))
            time.sleep(0.1)                                  # some keep-alives have gone out
            self.fake.release()
            thread.join(5)
            self.assertEqual(replies[0].status, 200)
            self.assertEqual(replies[0].events[-1]["error"]["message"],
                             "odd: Extra inputs are not permitted")
            self.assertEqual(self.fake.count(MESSAGES), 1)


class LimitTest(Posting):
    """429 and 402 are kept to: what must be refused is refused here."""

    def limited(self, status: int = 429, code: str = "rate_limited", words: str = "slow down",
                **headers: str) -> Answer:
        return Answer(status, {k.replace("_", "-"): v for k, v in headers.items()},
                      {"error": {"message": words, "code": code}})

    def test_twenty_clients_make_five_calls_at_most(self) -> None:
        wanted = {"max_concurrency": 4} if "max_concurrency" in cp.Settings.__dataclass_fields__ \
            else {}

        def refuse(ask: Ask) -> None:
            raise Refuse(429, {"error": {"message": "slow down", "code": "rate_limited"}},
                         {"retry-after": "60"})
        self.fake.refusals = [refuse]
        for first in ((), (1,)):
            with Proxy(self.fake, **wanted) as proxy:
                before, replies = self.fake.count(CHAT), []
                for _ in first if wanted else (1,):          # without a queue all go up at once
                    proxy.post("/v1/chat/completions", chat("hi"))
                threads = [threading.Thread(target=lambda n=n: replies.append(proxy.post(
                    "/v1/chat/completions", chat("hi", stream=n % 2 == 0)))) for n in range(20)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(20)
                self.assertEqual([reply.status for reply in replies], [429] * 20)
                self.assertLessEqual(self.fake.count(CHAT) - before, 5)
                for reply in replies:
                    self.assertIn(int(reply.headers["retry-after"]), range(50, 61))
                    self.assertRegex(reply.json["error"]["message"], r"slow down \(a limit of model"
                                     r" gpt-4.1 until \d{4}-\d\d-\d\d \d\d:\d\d:\d\d local time")

    def test_a_limit_of_a_model_ends_and_leaves_others_alone(self) -> None:
        clock = TestClock()
        with Proxy(self.fake, clock=clock) as proxy:
            self.fake.script(CHAT, self.limited(retry_after="50"))
            for _ in range(3):
                self.assertEqual(proxy.post("/v1/chat/completions", chat("a")).status, 429)
            self.assertEqual(self.fake.count(CHAT), 1)
            self.assertEqual(proxy.post("/v1/messages", message("a")).status, 200)
            self.assertEqual(proxy.post("/v1/chat/completions", chat("a", "gpt-4o")).status, 200)
            clock.monotonic_offset_s += 49
            reply = proxy.post("/v1/messages", message("a", "gpt-4.1"))
            self.assertEqual((reply.status, reply.headers["retry-after"]), (429, "1"))
            clock.monotonic_offset_s += 2
            self.assertEqual(proxy.post("/v1/chat/completions", chat("a")).status, 200)

    def test_a_limit_of_the_account_holds_for_all_models_and_endpoints(self) -> None:
        for code, words in (("user_global_rate_limited:pro", "try again in 2 hours"),
                            ("rate_limited", "user_global_rate_limited: wait 7200 seconds"),
                            ("user_weekly_rate_limited", "Please retry after 120 minutes.")):
            with self.subTest(code), Proxy(self.fake) as proxy:
                before = len(self.fake.requests)
                self.fake.script(CHAT, self.limited(429, code, words))
                reply = proxy.post("/v1/chat/completions", chat("a"))
                self.assertEqual((reply.status, reply.headers["retry-after"]), (429, "7200"))
                mark = len(self.fake.requests)
                self.assertGreater(mark, before)
                for path, make in MAKERS.items():
                    reply = proxy.post(PATHS[path], make("a"))
                    self.assertEqual((reply.status, reply.headers["retry-after"]), (429, "60"))
                    self.assertIn("a limit of the account until", reply.json["error"]["message"])
                    self.assertIn(code, (reply.json["error"].get("code"), code))
                self.assertEqual(proxy.post("/v1/embeddings", {
                    "model": "text-embedding-3-small", "input": "a"}).status, 429)
                self.assertEqual(proxy.post("/v1/messages/count_tokens", message("a")).status, 200)
                self.assertEqual(proxy.get("/v1/models").status, 200)
                self.assertEqual(len(self.fake.requests), mark)

    def test_a_quota_is_out_until_its_reset(self) -> None:
        self.fake.script(CHAT, self.limited(
            402, "quota_exceeded", "You have no quota",
            x_quota_snapshot_premium_interactions="ent=300&ov=0.0&ovPerm=false&rem=0.0&rst="
            + time.strftime("%Y-%m-%dT%H%%3A%M%%3A%SZ", time.gmtime(time.time() + 86400))))
        for least, most in ((86300, 86400), (50, 60)):       # its reset; then the next probe
            reply = self.proxy.post("/v1/chat/completions", chat("a"))
            self.assertEqual((reply.status, reply.json["error"]["code"]), (402, "quota_exceeded"))
            self.assertIn(int(reply.headers["retry-after"]), range(least, most + 1))
        self.assertEqual(self.fake.count(CHAT), 1)

    def test_how_long_a_limit_lasts(self) -> None:
        now = 1790000000.0                                   # 2026-09-21T14:13:20Z
        cases: tuple[tuple[str, str, int, float], ...] = (
            ("60", "", 429, 60), ("0.5", "", 429, 1), ("-30", "", 429, 1), ("0", "", 429, 1),
            ("1" * 500, "", 429, cp.LIMIT_S), ("9999999", "", 402, cp.QUOTA_LIMIT_S),
            ("Mon, 21 Sep 2026 14:23:20 GMT", "", 429, 600),
            ("Sun, 20 Sep 2026 14:23:20 GMT", "", 429, 1),
            ("Mon, 99 Sep 99999 99:99:99 GMT", "", 429, cp.LIMIT_PAUSE_S),
            ("soon", "", 429, cp.LIMIT_PAUSE_S), ("", "", 402, cp.QUOTA_PAUSE_S),
            ("", "Please try again in 2 hours.", 429, 7200),
            ("", "retry after 45 seconds", 429, 45), ("", "try again in 1h30m", 429, 5400),
            ("", "Try again in 1 hour and 5 minutes", 429, 3900),
            ("", "please wait 42 seconds", 429, 42), ("", "try again in 250ms", 429, 1),
            ("", "Please try again in 6.5s.", 429, 6.5), ("", "retry in 3 days", 429, 259200),
            ("", "your limit resets at 2026-09-21T15:13:20Z", 429, 3600),
            ("", "it resets on 2026-09-22", 429, 35200), ("", "resets on 2026-99-99", 429, 10),
            ("", "you sent 300 requests in 5 minutes", 429, cp.LIMIT_PAUSE_S),
            ("7", "try again in 2 hours", 429, 7))
        for given, words, status, wanted in cases:
            with self.subTest(given=given, words=words):
                error = cp.UpstreamError(words, status, headers={"retry-after": given})
                self.assertEqual(cp.limit_s(error, now), wanted)

    def test_fallback_answers_for_a_quota_and_for_nothing_else(self) -> None:
        with Proxy(self.fake, fallback="gpt-4o") as proxy:
            self.fake.script(CHAT, self.limited(402, "quota_exceeded", "You have no quota"))
            for calls, stream in ((2, False), (3, True)):
                reply = proxy.post("/v1/chat/completions", chat("a", stream=stream))
                self.assertEqual((reply.status, self.fake.count(CHAT)), (200, calls))
                answer = reply.events[-1] if stream else reply.json
                self.assertEqual(answer["model"], "gpt-4o")
                self.assertEqual(reply.headers["x-copilot-proxy-fallback"], "gpt-4.1 -> gpt-4o")
            self.assertIn("gpt-4o answers (--fallback)", proxy.log_text())
            reply = proxy.post("/v1/messages", message("a", "gpt-4.1"))
            self.assertEqual((reply.status, reply.json["model"]), (200, "gpt-4o"))
            self.fake.script(RESPONSES, self.limited(429, "quota_exceeded"))
            reply = proxy.post("/v1/responses", response("a"))
            self.assertEqual((reply.status, reply.json["model"]), (200, "gpt-4o"))
            for status, code in ((400, "model_not_supported"), (403, "x"), (429, "rate_limited")):
                self.fake.script(MESSAGES, self.limited(status, code))
                reply = proxy.post("/v1/messages", message("a", HAIKU))
                self.assertEqual(reply.status, status)
                self.assertNotIn("x-copilot-proxy-fallback", reply.headers)
            self.fake.script(CHAT, *[self.limited(402, "quota_exceeded", "none left")] * 2)
            reply = proxy.post("/v1/chat/completions", chat("a", "grok-code-fast-1"))
            self.assertEqual((reply.status, reply.json["error"]["code"]), (402, "quota_exceeded"))

    def test_a_fallback_that_does_not_exist_changes_nothing(self) -> None:
        with Proxy(self.fake, fallback="no-such-thing") as proxy:
            self.fake.script(CHAT, self.limited(402, "quota_exceeded", "You have no quota"))
            self.assertEqual(proxy.post("/v1/chat/completions", chat("a")).status, 402)


OVERFLOWS = (
    ("prompt token count of 210000 exceeds the limit of 128000", 210000, 128000),
    ("input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000", 210000, 200000),
    ("prompt is too long: 210000 tokens > 200000 maximum", 210000, 200000),
    ("This model's maximum context length is 128000 tokens. However, your messages resulted in "
     "130001 tokens.", 130001, 128000),
    ("This model's maximum context length is 128000 tokens. However, you requested 138912 tokens "
     "(128912 in the messages, 10000 in the completion).", 138912, 128000),
    ("Request body is too large for model context window", 0, 0),
    ("Your input exceeds the context window of this model.", 0, 0))


class OverflowTest(Posting):
    """Too long a prompt, in the words that make a client compact."""

    def check(self, client: str, error: Any, counts: tuple[int, int], words: str) -> None:
        if client == MESSAGES:
            self.assertEqual(error["type"], "invalid_request_error")
            found = re.match(r"prompt is too long: (\d+) tokens > (\d+) maximum\Z",
                             error["message"])
            assert found, error
            n, most = map(int, found.groups())
            self.assertGreater(n, most)
            self.assertIn(counts, ((0, 0), (n, most)))
        else:
            self.assertEqual(error["code"], "context_length_exceeded")
            self.assertIn(words, error["message"])

    def test_before_the_answer(self) -> None:
        for words, *counts in OVERFLOWS:
            for client, make in MAKERS.items():
                for model in ("gpt-4.1", CODEX, SONNET):
                    for stream in (False, True):
                        with self.subTest(words, client=client, model=model, stream=stream):
                            self.refuse_all(words)
                            reply = self.proxy.post(PATHS[client], make("hi", model,
                                                                        stream=stream))
                            if client == RESPONSES and stream:
                                self.assertEqual(reply.status, 200)
                                self.assertEqual(reply.events[-1]["type"], "response.failed")
                                error = reply.events[-1]["response"]["error"]
                            else:
                                self.assertEqual(reply.status, 400)
                                error = reply.json["error"]
                            self.check(client, error, tuple(counts), words)

    def refuse_all(self, words: str) -> None:
        def refuse(ask: Ask) -> None:
            raise bad(words, "model_max_prompt_tokens_exceeded") \
                if ask.record.path != MESSAGES else bad_message(words)
        self.fake.refusals = [refuse]

    def test_within_a_stream(self) -> None:
        words = OVERFLOWS[0][0]
        error = {"message": words, "code": "model_max_prompt_tokens_exceeded"}
        frames = {
            CHAT: [b'data: {"error":%s}\n\n'],
            RESPONSES: [b'event: error\ndata: {"type":"error","error":%s}\n\n',
                        b'event: response.failed\ndata: {"type":"response.failed","response":'
                        b'{"id":"r","status":"failed","error":%s}}\n\n'],
            MESSAGES: [b'event: error\ndata: {"type":"error","error":%s}\n\n']}
        for path, model in ((CHAT, "gpt-4.1"), (RESPONSES, CODEX), (MESSAGES, "claude-opus-4.7")):
            for frame in frames[path]:
                for client, make in MAKERS.items():
                    with self.subTest(client, path=path, frame=frame):
                        self.fake.script(path, Answer(
                            chunks=[frame % json.dumps(error).encode()]))
                        reply = self.proxy.stream(PATHS[client], make("hi", model))
                        # nothing was shown, so it is a real refusal; Codex reads a stream only
                        self.assertEqual(reply.status, 200 if client == RESPONSES else 400)
                        told = reply.events[-1] if client == RESPONSES else reply.json
                        if client == RESPONSES:
                            self.assertEqual(told["type"], "response.failed")
                        self.check(client, told.get("response", told)["error"],
                                   OVERFLOWS[0][1:], words)

    def test_models_tell_their_limits(self) -> None:
        entry = self.proxy.get("/v1/models/" + SONNET).json
        self.assertEqual((entry["context_window"], entry["max_input_tokens"],
                          entry["max_output_tokens"]), (200000, 168000, 32000))


class HiccupTest(Posting):
    settings = dict(hiccup_pause_s=0.001)

    def test_the_second_try_takes_a_fresh_connection(self) -> None:
        for _ in range(3):                                   # kept connections
            self.assertEqual(self.proxy.post("/v1/chat/completions", chat("a")).status, 200)
        self.fake.script(CHAT, Answer(status=502, body="<html>"))
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("a")).status, 200)
        first, second = [r.connection for r in self.fake.requests if r.path == CHAT][-2:]
        self.assertGreater(second, first)

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_a_request_that_was_cut_while_it_was_sent_is_sent_again(self) -> None:
        self.fake.script(CHAT, Answer(drop="before", reset=True))
        reply = self.proxy.post("/v1/chat/completions", chat("@@events=1@@" + "x" * (12 << 20)))
        self.assertEqual((reply.status, self.fake.count(CHAT)), (200, 2))

    def test_a_request_that_was_sent_whole_is_not_sent_again(self) -> None:
        self.proxy.get("/v1/models")
        self.proxy.app.upstream.pool.clear()                 # else the connection was a reused one
        self.fake.script(CHAT, Answer(drop="after", reset=True))
        reply = self.proxy.post("/v1/chat/completions", chat("a"))
        self.assertEqual((reply.status, self.fake.count(CHAT)), (502, 1))

    def test_nobody_waits_for_a_client_that_has_left(self) -> None:
        with Proxy(self.fake, hiccup_pause_s=60.0) as proxy:
            self.fake.script(CHAT, Answer(status=502, body="busy"))
            body = json.dumps(chat("a")).encode()
            with proxy.connect() as sock:
                sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                             b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                             % (len(body), body))
                self.assertTrue(self.fake.wait_for(lambda: self.fake.count(CHAT)))
            deadline = time.monotonic() + 10
            while "route=passthrough" not in proxy.log_text() and time.monotonic() < deadline:
                time.sleep(0.01)
            self.assertIn("route=passthrough", proxy.log_text())
            self.assertEqual(self.fake.count(CHAT), 1)


class SearchTest(Posting):
    """Claude Code's search: a tool error where the upstream has no search."""
    settings = {"no_web_search": True}
    SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}

    def check(self, model: str, calls: int, stream: bool) -> None:
        before = self.calls(self.fake)
        reply = self.proxy.post("/v1/messages", message(
            "Perform a web search for the query: x", model, tools=[self.SEARCH], stream=stream))
        self.assertEqual(reply.status, 200, reply.body)
        self.assertEqual(self.calls(self.fake) - before, calls)
        if stream:
            blocks = [e["content_block"] for e in reply.events if e["type"] ==
                      "content_block_start"]
            texts = [e["delta"].get("text", "") for e in reply.events
                     if e["type"] == "content_block_delta"]
            blocks[-1]["text"] += "".join(texts)
            self.assertEqual(reply.events[-1]["type"], "message_stop")
            self.assertEqual(reply.events[0]["message"]["model"], model)
        else:
            blocks = reply.json["content"]
        use, result, words = blocks
        self.assertEqual((use["type"], result["type"]), ("server_tool_use",
                                                         "web_search_tool_result"))
        self.assertEqual(use["id"], result["tool_use_id"])
        self.assertEqual(result["content"], {"type": "web_search_tool_result_error",
                                             "error_code": "unavailable"})
        self.assertIn("search failed", words["text"])

    def test_a_refused_search_is_a_tool_error(self) -> None:
        for calls, stream in ((1, False), (0, True), (0, False)):
            self.check(SONNET, calls, stream)
        self.check("claude-opus-4.7", 1, True)
        self.check("gpt-4.1", 0, False)
        self.check(CODEX, 0, True)

    def test_a_model_that_serves_it_is_asked(self) -> None:
        self.fake.lenient = {"tools"}
        reply = self.proxy.post("/v1/messages", message("hi", tools=[self.SEARCH]))
        self.assertEqual(reply.json["content"][-1]["text"], "Echo: hi")
        self.assertEqual(self.fake.last(MESSAGES).json["tools"],
                         [dict(self.SEARCH, cache_control={"type": "ephemeral"})])


if __name__ == "__main__":
    unittest.main()
