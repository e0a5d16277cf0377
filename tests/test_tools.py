"""Tools are who runs them: vendors' types that the client runs, tools carried by items, choices."""
from __future__ import annotations

import copy
import json
import unittest
from typing import Any

from support import ProxyCase, chat, message, translated
import copilot_proxy as cp
from fake_upstream import default_models

CLAUDE = cp.Model("claude-sonnet-4.5", vendor="Anthropic", endpoints=("/v1/messages",))
GEMINI = cp.Model("gemini-3.1-pro-preview", vendor="Google", endpoints=("/chat/completions",))
GPT = cp.Model("gpt-5.3-codex", vendor="OpenAI", endpoints=("/responses",))
SCHEMA: Any = {"type": "object", "properties": {"x": {"type": "string"}}}
FAMILIES = (("messages", CLAUDE), ("chat", GEMINI))
USER = {"role": "user", "content": "go"}
#: a tool of Responses that the client runs, a call's arguments, the item that it is to become
VENDOR_TOOLS: Any = [
    ({"type": "tool_search", "execution": "client", "description": "Find.",
      "parameters": SCHEMA}, {"x": "git"},
     {"type": "tool_search_call", "execution": "client", "arguments": {"x": "git"}}),
    ({"type": "local_shell"}, {"command": ["ls"]},
     {"type": "local_shell_call", "action": {"type": "exec", "env": {}, "command": ["ls"]}}),
    ({"type": "shell"}, {"commands": ["ls"]},
     {"type": "shell_call", "action": {"commands": ["ls"]}}),
    ({"type": "apply_patch"}, {"type": "delete_file", "path": "a"},
     {"type": "apply_patch_call", "operation": {"type": "delete_file", "path": "a"}}),
    ({"type": "computer_use_preview", "display_width": 1}, {"type": "screenshot"},
     {"type": "computer_call", "pending_safety_checks": [], "action": {"type": "screenshot"}}),
]


def names(upstream: str, body: Any) -> list[str]:
    """The functions that go up."""
    return [as_function["name"] for as_function in cp.DIALECTS[upstream].function_tools(body)]


def answer_of(call: cp.ToolCall, request: cp.Request) -> list[Any]:
    """(the item of a whole answer, the item of a streamed one) for a call that the model made."""
    response = cp.Response("r", "m", [call], "tool_use", cp.Usage(1))
    whole = cp.RESPONSES.encode_response(response, request)
    encoder = cp.RESPONSES.stream_encoder(request)
    data = b"".join(encoder.feed(event) for event in cp.unfold(response))
    events = [json.loads(frame.data) for frame in cp.SSEDecoder().feed(data)]
    (item,) = [event["item"] for event in events
               if event["type"] == "response.output_item.done"]
    return [whole["output"][0], item]


class VendorToolTest(unittest.TestCase):
    def test_a_tool_that_the_client_runs_is_a_function_and_its_calls_come_back_as_items(
            self) -> None:
        for upstream, model in FAMILIES:
            for tool, arguments, item in VENDOR_TOOLS:
                with self.subTest(tool=tool["type"], upstream=upstream):
                    edit, request = translated("responses", upstream, {
                        "model": "m", "input": [USER], "tools": [copy.deepcopy(tool)]}, model)
                    (name,) = names(upstream, edit.body)
                    call = cp.ToolCall("c1", name, json.dumps(arguments))
                    for shown in answer_of(call, request):
                        self.assertEqual({key: shown[key] for key in item}, item)
                        self.assertEqual(shown["call_id"], "c1")

    def test_histories_of_such_calls_stay_calls_with_their_results(self) -> None:
        for upstream, model in FAMILIES:
            for tool, arguments, item in VENDOR_TOOLS:
                call = dict(item, call_id="c1", id="i1", status="completed")
                kind = call["type"] + "_output"
                kind = "tool_search_output" if kind == "tool_search_call_output" else kind
                body = {"model": "m", "tools": [tool], "input": [
                    USER, call, {"type": kind, "call_id": "c1", "output": "WORDS", "tools": [
                        {"type": "function", "name": "found", "parameters": SCHEMA}]}]}
                if kind != "tool_search_output":
                    del body["input"][-1]["tools"]
                with self.subTest(tool=tool["type"], upstream=upstream):
                    edit, _ = translated("responses", upstream, copy.deepcopy(body), model)
                    request = cp.RESPONSES.decode_request(copy.deepcopy(body))
                    (made,) = [part for turn in request.turns for part in turn.parts
                               if isinstance(part, cp.ToolCall)]
                    (result,) = [part for turn in request.turns for part in turn.parts
                                 if isinstance(part, cp.ToolResult)]
                    self.assertEqual((made.id, result.call_id), ("c1", "c1"))
                    self.assertEqual(made.name, names(upstream, edit.body)[0])
                    self.assertNotIn("interrupted", json.dumps(edit.body))
                    if kind == "tool_search_output":
                        self.assertIn("found", names(upstream, edit.body))
                    else:
                        self.assertIn("WORDS", json.dumps(edit.body))

    def test_a_shell_call_answered_as_a_function_is_paired(self) -> None:
        body = {"model": "m", "input": [
            USER, {"type": "local_shell_call", "call_id": "c1", "action": {
                "type": "exec", "command": ["ls"]}},
            {"type": "function_call_output", "call_id": "c1", "output": "WORDS"}],
            "tools": [{"type": "local_shell"}]}
        edit, _ = translated("responses", "chat", body, GEMINI)
        self.assertEqual([m["role"] for m in edit.body["messages"]], ["user", "assistant", "tool"])

    def test_anthropics_tools_of_the_client_have_their_published_schema_everywhere(self) -> None:
        tools = [{"type": "bash_20250124", "name": "bash"},
                 {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
                 {"type": "memory_20250818", "name": "memory"},
                 {"type": "computer_20250124", "name": "computer", "display_width_px": 1}]
        body = {"model": "m", "max_tokens": 10, "messages": [USER], "tools": tools,
                "tool_choice": {"type": "tool", "name": "bash"}}
        for upstream, model in (("chat", GEMINI), ("responses", GPT)):
            edit, _ = translated("messages", upstream, copy.deepcopy(body), model)
            self.assertEqual(names(upstream, edit.body), [tool["name"] for tool in tools])
            for holder, key in cp.DIALECTS[upstream].tool_schemas(edit.body):
                self.assertTrue(holder[key]["properties"])
        edit = cp.BodyEdit(copy.deepcopy(body))
        cp.normalise(edit, cp.MESSAGES, CLAUDE)
        cp.prepare_body(edit, cp.MESSAGES, CLAUDE)
        self.assertEqual(names("messages", edit.body), [tool["name"] for tool in tools])
        self.assertEqual(edit.body["tool_choice"]["name"], "bash")


class CarriedToolTest(unittest.TestCase):
    CARRIER: Any = {"type": "additional_tools", "role": "developer", "tools": [
        {"type": "namespace", "name": "functions", "tools": [
            {"type": "custom", "name": "exec"},
            {"type": "function", "name": "wait", "parameters": SCHEMA}]},
        {"type": "function", "name": "plan", "parameters": SCHEMA}]}

    def test_tools_that_an_item_carries_arrive(self) -> None:
        for upstream, model in (*FAMILIES, ("responses", GPT)):
            with self.subTest(upstream=upstream):
                body: Any = {"model": "m", "input": [copy.deepcopy(self.CARRIER), USER]}
                if upstream == "responses":
                    edit = cp.BodyEdit(body)
                    cp.normalise(edit, cp.RESPONSES, model)
                    self.assertEqual(edit.body["tools"], self.CARRIER["tools"])
                    self.assertEqual(edit.body["input"], [USER])
                else:
                    edit, request = translated("responses", upstream, body, model)
                    self.assertEqual(names(upstream, edit.body),
                                     ["functions__exec", "functions__wait", "plan"])
                    call = cp.ToolCall("c", "functions__exec", '{"input": "ls"}')
                    for item in answer_of(call, request):
                        self.assertEqual(
                            (item["type"], item["name"], item["namespace"], item["input"]),
                            ("custom_tool_call", "exec", "functions", "ls"))

    def test_tools_in_both_forms_come_once(self) -> None:
        body = {"model": "m", "input": [copy.deepcopy(self.CARRIER), USER,
                                        copy.deepcopy(self.CARRIER)],
                "tools": copy.deepcopy(self.CARRIER["tools"])}
        edit, _ = translated("responses", "chat", body, GEMINI)
        self.assertEqual(names("chat", edit.body), ["functions__exec", "functions__wait", "plan"])


class ChoiceTest(unittest.TestCase):
    TOOLS: Any = [{"type": "function", "name": "a", "parameters": SCHEMA},
                  {"type": "function", "name": "b", "parameters": SCHEMA},
                  {"type": "namespace", "name": "mcp__db", "tools": [
                      {"type": "function", "name": "q", "parameters": SCHEMA}]}]

    def sent(self, choice: Any, upstream: str = "chat", model: cp.Model = GEMINI,
             tools: Any = None) -> Any:
        body = {"model": "m", "input": [USER], "tools": copy.deepcopy(tools or self.TOOLS),
                "tool_choice": choice}
        return translated("responses", upstream, body, model)[0].body

    def test_a_choice_that_allows_some_tools_does_not_widen_to_all(self) -> None:
        for mode, want in (("auto", "auto"), ("required", "required")):
            sent = self.sent({"type": "allowed_tools", "mode": mode, "tools": [
                {"type": "function", "name": "b"}]})
            self.assertEqual((names("chat", sent), sent["tool_choice"]), (["b"], want))

    def test_a_forced_tool_of_a_namespace_is_forced(self) -> None:
        choice = {"type": "function", "name": "q", "namespace": "mcp__db"}
        self.assertEqual(self.sent(choice)["tool_choice"]["function"]["name"], "mcp__db__q")
        sent = self.sent(choice, "messages", CLAUDE)
        self.assertEqual(sent["tool_choice"]["name"], "mcp__db__q")

    def test_a_forced_tool_that_is_not_there_is_refused_by_name(self) -> None:
        for choice in ({"type": "function", "name": "nope"}, {"type": "web_search"},
                       {"type": "code_interpreter"}):
            with self.subTest(choice=choice), self.assertRaises(cp.BadRequest) as caught:
                self.sent(choice, tools=[*self.TOOLS, {"type": "web_search"},
                                         {"type": "code_interpreter", "container": {}}])
            self.assertEqual(caught.exception.param, "tool_choice")

    def test_a_vendors_tool_can_be_forced(self) -> None:
        sent = self.sent({"type": "apply_patch"}, tools=[*self.TOOLS, {"type": "apply_patch"}])
        self.assertEqual(sent["tool_choice"]["function"]["name"], "apply_patch")


class FreeformChatTest(ProxyCase):
    """Freeform tools of Chat clients: native for OpenAI's models, functions for all others."""

    def setUp(self) -> None:
        super().setUp()
        claude = next(e for e in default_models() if e["id"] == "claude-sonnet-4.6")
        self.fake.models.append(dict(claude, id="claude-only-4.6",
                                     supported_endpoints=["/v1/messages"]))
        self.body: Any = chat("go", "gpt-5-mini",
                             tools=[{"type": "custom", "custom": {"name": "exec"}}])

    def test_they_go_up_as_they_are_where_the_model_has_them(self) -> None:
        for stream in (False, True):
            body = dict(self.body, stream=stream, tool_choice="required")
            reply = self.proxy.post("/v1/chat/completions", body)
            self.assertEqual(reply.status, 200, reply.body)
            self.assertIn(b'"custom":{"', reply.body.replace(b": ", b":"))
            self.assertEqual(self.fake.last("/chat/completions").json["tools"],
                             self.body["tools"])

    def test_elsewhere_they_are_functions_and_their_calls_come_back_freeform(self) -> None:
        for model in ("claude-sonnet-4.6", "claude-only-4.6", "gpt-5.3-codex", "gpt-4.1"):
            for stream in (False, True):
                body = dict(self.body, model=model, stream=stream, tool_choice="required")
                with self.subTest(model=model, stream=stream):
                    reply = self.proxy.post("/v1/chat/completions", body)
                    self.assertEqual(reply.status, 200, reply.body)
                    self.assertIn(b'"custom":{"name":"exec"', reply.body)
                    self.assertNotIn(b'"function"', reply.body)

    def test_the_next_turn_has_the_call_and_its_result(self) -> None:
        call = {"id": "c1", "type": "custom", "custom": {"name": "exec", "input": "WORDS"}}
        self.body["messages"] += [{"role": "assistant", "content": None, "tool_calls": [call]},
                                  {"role": "tool", "tool_call_id": "c1", "content": "done"}]
        reply = self.proxy.post("/v1/chat/completions", dict(self.body, model="claude-only-4.6"))
        self.assertEqual(reply.status, 200, reply.body)
        sent = self.fake.last("/v1/messages").json["messages"]
        self.assertEqual(sent[1]["content"][0]["input"], {"input": "WORDS"})
        self.assertEqual(sent[2]["content"][0]["tool_use_id"], "c1")


class ForcedToolTest(ProxyCase):
    def test_a_forced_hosted_tool_is_a_400_in_the_clients_words_and_nothing_goes_up(self) -> None:
        before = len(self.fake.requests)
        body = dict(message("hi", model="gpt-5-mini"), tools=[
            {"type": "code_execution_20250522", "name": "code_execution"},
            {"name": "f", "input_schema": SCHEMA}],
            tool_choice={"type": "tool", "name": "code_execution"})
        reply = self.proxy.post("/v1/messages", body)
        self.assertEqual((reply.status, reply.json["type"]), (400, "error"))
        sent = [record.path for record in self.fake.requests[before:]]
        self.assertEqual([path for path in sent if "chat" in path or "responses" in path], [])


if __name__ == "__main__":
    unittest.main()
