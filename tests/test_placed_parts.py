"""Parts that stand where the upstream knows none such, and tools of foreign types: their words go
up, or the loss is named; the upstream's 400 is never the answer.
Of sections 7, 8 and 10."""
from __future__ import annotations

import json
import unittest
from typing import Any

from support import SLOW, ProxyCase, combinations
from fake_upstream import RESPONSES, Answer, today_models

WORDS = "MARKED WORDS"
PIXEL = {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                     "data": "iVBORw0KGgo="}}
MODELS = ("gpt-5.4", "gemini-3.6-flash", "claude-sonnet-5") + (
    ("gpt-5-mini", "claude-sonnet-4.6") if SLOW else ())
FUNCTIONS: dict[str, Any] = {
    "/v1/chat/completions": {"type": "function", "function": {
        "name": "f", "parameters": {"type": "object"}}},
    "/v1/responses": {"type": "function", "name": "f", "parameters": {"type": "object"}},
    "/v1/messages": {"name": "f", "input_schema": {"type": "object"}}}


def simple(path: str) -> dict[str, Any]:
    """A body of one word of the user."""
    if path == "/v1/responses":
        return {"input": [{"role": "user", "content": "hello"}]}
    return {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1000}


def with_result(path: str, parts: Any) -> dict[str, Any]:
    """A body whose last turn is a tool's result of these parts."""
    body = simple(path)
    if path == "/v1/responses":
        body["input"] += [
            {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": parts}]
    elif path == "/v1/messages":
        body["messages"] += [
            {"role": "assistant", "content": [
                {"type": "tool_use", "id": "call_1", "name": "f", "input": {}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "call_1", "content": parts}]}]
    else:
        body["messages"] += [
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "call_1", "type": "function",
                 "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": parts}]
    return dict(body, tools=[FUNCTIONS[path]])


class PlacedCase(ProxyCase):
    """An account of late 2026."""

    def setUp(self) -> None:
        super().setUp()
        self.fake.models = today_models()

    def ask(self, path: str, model: str, body: dict[str, Any]) -> tuple[str, str]:
        """What went up, as JSON, and the losses."""
        for stream in (True, False) if SLOW else (False,):
            reply = self.proxy.post(path, dict(body, model=model, stream=stream))
            self.assertEqual(reply.status, 200, reply.body)
            self.assertNotIn(b'"error":{', reply.body)
        return (json.dumps(self.fake.requests[-1].json),
                reply.headers.get("x-copilot-proxy-lossy", ""))


class DocumentTest(PlacedCase):
    """A document that holds parts of its own."""

    def test_its_parts_are_sent_in_its_place_and_the_loss_is_named(self) -> None:
        for content in (WORDS, [{"type": "text", "text": WORDS}, dict(PIXEL)]):
            document = {"type": "document", "title": "A title", "citations": {"enabled": True},
                        "source": {"type": "content", "content": content}}
            for model in MODELS:
                user = dict(simple("/v1/messages"), messages=[
                    {"role": "user", "content": [document, {"type": "text", "text": "hi"}]}])
                for body in (user, with_result("/v1/messages", [document])):
                    with self.subTest(model=model, body=body):
                        sent, losses = self.ask("/v1/messages", model, body)
                        self.assertIn(WORDS, sent)
                        self.assertIn("A title", sent)
                        self.assertEqual("iVBORw0KGgo=" in sent, content is not WORDS)
                        self.assertIn("document.source", losses)


def block(text: str = WORDS) -> dict[str, Any]:
    return {"type": "text", "text": text}


#: parts of all dialects that stand where they do not belong; the name of the loss if the words go
MISPLACED: tuple[tuple[Any, str], ...] = (
    ({"type": "tool_result", "tool_use_id": "call_1", "content": WORDS}, ""),
    ({"type": "tool_result", "tool_use_id": "call_9", "content": [block()]}, ""),
    ({"type": "tool_result", "tool_use_id": "call_9", "content": [
        {"type": "tool_result", "tool_use_id": "call_1", "content": [block()]}]}, ""),
    ({"type": "refusal", "refusal": WORDS}, ""),
    ({"type": "tool_use", "id": "t", "name": "f", "input": {"a": WORDS}}, ""),
    ({"type": "invented", "text": WORDS}, ""),
    ({"type": "search_result", "source": "s", "title": "t", "content": [block()]}, ""),
    ({"type": "document", "source": {"type": "text", "media_type": "text/plain",
                                     "data": WORDS}}, ""),
    ({"type": "document", "source": {"type": "content", "content": [block()]}}, ""),
    ({"type": "input_text", "text": WORDS}, ""),
    ({"type": "output_text", "text": WORDS}, ""),
    ({"type": "thinking", "thinking": WORDS, "signature": ""}, "reasoning"),
    ({"type": "redacted_thinking", "data": WORDS}, "reasoning"),
)


class MisplacedTest(PlacedCase):
    """Parts in a tool's result and in a system text that can stand in neither."""

    def check(self, path: str, model: str, body: dict[str, Any], loss: str) -> None:
        with self.subTest(path=path, model=model, body=body):
            sent, losses = self.ask(path, model, body)
            if loss:
                self.assertIn(loss, losses)
            else:
                self.assertIn(WORDS, sent)

    def test_in_the_result_of_a_tool(self) -> None:
        for (part, loss), path, model, before in combinations(
                MISPLACED, FUNCTIONS, MODELS, ([], [block("more")])):
            self.check(path, model, with_result(path, [*before, part]), loss)

    def test_in_a_system_turn(self) -> None:
        for (part, loss), path, role, model in combinations(
                MISPLACED, FUNCTIONS, ("system", "developer"), MODELS):
            body = simple(path)
            turns = body.get("input") or body["messages"]
            turns[:] = [*turns, {"role": role, "content": [part]}, *turns]
            self.check(path, model, body, loss)

    def test_in_the_system_prompt_of_messages(self) -> None:
        for part, loss in MISPLACED:
            for model in MODELS:
                self.check("/v1/messages", model, dict(
                    simple("/v1/messages"), system=[block("be good"), part]), loss)

    def test_an_image_in_a_system_text_is_a_loss_and_not_announced(self) -> None:
        for path in FUNCTIONS:
            body = simple(path)
            turns = body.get("input") or body["messages"]
            turns.insert(0, {"role": "system", "content": [dict(PIXEL), block()]})
            bodies = [body]
            if path == "/v1/messages":
                bodies.append(dict(simple(path), system=[block(), dict(PIXEL)]))
            for body in bodies:
                for model in MODELS:
                    with self.subTest(path=path, model=model):
                        sent, losses = self.ask(path, model, body)
                        self.assertIn(WORDS, sent)
                        self.assertIn("image", losses)
                        self.assertNotIn("copilot-vision-request",
                                         self.fake.requests[-1].headers)


class VendorResultTest(PlacedCase):
    """Results of tools that have a form of their own."""

    ROUNDS: tuple[tuple[Any, Any], ...] = (
        ({"type": "shell_call", "action": {"commands": ["ls"]}},
         {"type": "shell_call_output", "output": [
             {"stdout": WORDS, "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]}),
        ({"type": "computer_call", "action": {"type": "screenshot"}},
         {"type": "computer_call_output", "output": {
             "type": "computer_screenshot", "image_url": "data:image/png;base64,iVBORw0KGgo="}}),
        ({"type": "local_shell_call", "action": {"type": "exec", "command": ["ls"]}},
         {"type": "local_shell_call_output", "output": WORDS}))

    def items(self, call: Any, result: Any) -> dict[str, Any]:
        return {"input": [{"role": "user", "content": "hello"}, dict(call, call_id="call_1"),
                          dict(result, call_id="call_1")]}

    def test_they_go_to_responses_as_they_are(self) -> None:
        for call, result in self.ROUNDS:
            for model in ("gpt-5.4", "gpt-5-mini"):
                with self.subTest(call=call, model=model):
                    self.ask("/v1/responses", model, self.items(call, result))
                    sent = self.fake.requests[-1].json["input"][-1]
                    self.assertEqual(sent["output"], result["output"])

    def test_elsewhere_words_are_text_and_a_screenshot_is_an_image(self) -> None:
        for call, result in self.ROUNDS:
            for model in ("gemini-3.6-flash", "claude-sonnet-4.6", "claude-sonnet-5"):
                with self.subTest(call=call, model=model):
                    sent, _ = self.ask("/v1/responses", model, self.items(call, result))
                    self.assertNotIn("computer_screenshot", sent)
                    self.assertNotIn("None", sent)
                    seen = self.fake.requests[-1].headers.get("copilot-vision-request")
                    if call["type"] == "computer_call":
                        self.assertIn("iVBORw0KGgo=", sent)
                        self.assertEqual(seen, "true")
                    else:
                        self.assertIn(WORDS, sent)
                        self.assertIsNone(seen)


class ForeignToolTest(PlacedCase):
    """Types of tools that no one knows, more of them than there are repairs."""

    TOOLS: list[Any] = [{"type": "vendor_%d" % at, "name": "v%d" % at} for at in range(4)] + [
        {"type": "plain_%d" % at} for at in range(4)] + [
        {"type": "mcp", "server_label": "x"}, {"type": "file_search"}, {"type": "computer_use"},
        {"type": "image_generation"}, {"googleSearch": {}}, {"url_context": {}}]

    def test_they_go_and_the_function_stays(self) -> None:
        for path, function in FUNCTIONS.items():
            for model in MODELS:
                with self.subTest(path=path, model=model):
                    sent, losses = self.ask(path, model, dict(
                        simple(path), tools=self.TOOLS + [function]))
                    self.assertIn('"f"', sent)
                    self.assertIn("tools", losses)

    def test_an_upstream_that_refuses_one_after_the_other_gets_none_in_the_end(self) -> None:
        for kind in ("vendor_0", "plain_1"):
            self.fake.script(RESPONSES, Answer(400, body={"error": {
                "message": "Unsupported tool type: '%s'" % kind, "code": "x"}}))
        sent, losses = self.ask("/v1/responses", "gpt-5.4", dict(
            simple("/v1/responses"), tools=self.TOOLS + [FUNCTIONS["/v1/responses"]]))
        self.assertEqual(self.fake.count(RESPONSES), 4 if SLOW else 3)   # then whole, too
        first = [r for r in self.fake.requests if r.path == RESPONSES][2]
        self.assertEqual([tool["type"] for tool in first.json["tools"]], ["function"])

    def test_anthropics_tools_of_the_client_are_functions_for_every_client(self) -> None:
        for path in FUNCTIONS:
            for model in MODELS:
                with self.subTest(path=path, model=model):
                    sent, _ = self.ask(path, model, dict(simple(path), tools=[
                        {"type": "bash_20250124", "name": "bash"}]))
                    self.assertIn("Run a command in a bash session", sent)


if __name__ == "__main__":
    unittest.main()
