"""Normalising: one shape for what clients write in many, before anything is planned."""
from __future__ import annotations

import base64
import copy
import json
import unittest
from typing import Any

from support import ProxyCase, chat, message
import copilot_proxy as cp
from fake_upstream import default_models

MODEL = cp.Model("gpt-5-mini", vendor="OpenAI")
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"\0" * 16).decode()
JPEG = base64.b64encode(b"\xff\xd8\xff\xe0" + b"\0" * 16).decode()
SCHEMA: Any = {"type": "object", "properties": {"x": {"type": "string"}}}
FORMAT: Any = {"name": "thing", "schema": SCHEMA, "strict": True}
FREEFORM: Any = {"type": "object", "properties": {"input": {"type": "string"}},
                 "required": ["input"]}


def function(**more: Any) -> Any:
    return dict({"name": "f", "description": "d", "parameters": SCHEMA}, **more)


#: (symptom, dialect, what the client wrote, what is to become of it; None: the field goes)
FIELDS: Any = [
    ("a token limit by Responses' name", "chat", {"max_output_tokens": 50},
     {"max_completion_tokens": 50, "max_output_tokens": None}),
    ("the own field wins", "chat", {"max_output_tokens": 50, "max_completion_tokens": 60},
     {"max_completion_tokens": 60, "max_output_tokens": None}),
    ("an effort by Responses' name", "chat", {"reasoning": {"effort": "low"}},
     {"reasoning_effort": "low", "reasoning": None}),
    ("a flat schema", "chat", {"response_format": dict(FORMAT, type="json_schema")},
     {"response_format": {"type": "json_schema", "json_schema": FORMAT}}),
    ("a schema by Responses' name", "chat", {"text": {"format": dict(FORMAT, type="json_schema")}},
     {"response_format": {"type": "json_schema", "json_schema": FORMAT}, "text": None}),
    ("a token limit by Chat's name", "responses", {"max_tokens": 50},
     {"max_output_tokens": 50, "max_tokens": None}),
    ("a nested schema", "responses", {"response_format": {"type": "json_schema",
                                                          "json_schema": FORMAT}},
     {"text": {"format": dict(FORMAT, type="json_schema")}, "response_format": None}),
    ("an effort by Chat's name", "responses", {"reasoning_effort": "high", "verbosity": "low"},
     {"reasoning": {"effort": "high"}, "text": {"verbosity": "low"}, "reasoning_effort": None}),
    ("a field that was a beta once", "messages", {"output_format": {
        "type": "json_schema", "schema": SCHEMA}},
     {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
      "output_format": None}),
    ("the token limit of old completions", "messages", {"max_tokens": None,
                                                        "max_tokens_to_sample": 70},
     {"max_tokens": 70, "max_tokens_to_sample": None}),
    ("stop sequences by OpenAI's name", "messages", {"stop": "END"},
     {"stop_sequences": ["END"], "stop": None}),
    ("functions", "chat", {"functions": [function()], "function_call": {"name": "f"}},
     {"tools": [{"type": "function", "function": function()}], "functions": None,
      "function_call": None, "tool_choice": {"type": "function", "function": {"name": "f"}}}),
    ("flat tools", "chat", {"tools": [dict(function(), type="function")]},
     {"tools": [{"type": "function", "function": function()}]}),
    ("Anthropic's tools", "chat", {"tools": [{"name": "f", "description": "d",
                                              "input_schema": SCHEMA}]},
     {"tools": [{"type": "function", "function": function()}]}),
    ("a freeform tool of Responses", "chat", {"tools": [{"type": "custom", "name": "exec",
                                                         "format": {"type": "text"}}]},
     {"tools": [{"type": "custom", "custom": {"name": "exec", "format": {"type": "text"}}}]}),
    ("null beside a schema", "chat", {"tools": [{"type": "function",
                                                 "function": function(strict=None)}]},
     {"tools": [{"type": "function", "function": function()}]}),
    ("null inside a schema stays", "chat", {"tools": [{"type": "function", "function": {
        "name": "f", "parameters": {"type": "object", "default": None}}}]},
     {"tools": [{"type": "function", "function": {
         "name": "f", "parameters": {"type": "object", "default": None}}}]}),
    ("nested tools", "responses", {"tools": [{"type": "function", "function": function()}]},
     {"tools": [dict(function(), type="function")]}),
    ("a nested freeform tool", "responses", {"tools": [{"type": "custom",
                                                        "custom": {"name": "exec"}}]},
     {"tools": [{"type": "custom", "name": "exec"}]}),
    ("OpenAI's tools", "messages", {"tools": [{"type": "function", "function": function()}]},
     {"tools": [{"name": "f", "description": "d", "input_schema": SCHEMA}]}),
    ("a freeform tool", "messages", {"tools": [{"type": "custom", "name": "exec"}]},
     {"tools": [{"name": "exec", "input_schema": FREEFORM}]}),
    ("a choice in Anthropic's words", "chat", {"tool_choice": {"type": "tool", "name": "f"}},
     {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
    ("any tool in Anthropic's words", "chat", {"tool_choice": {"type": "any"}},
     {"tool_choice": "required"}),
    ("a nested choice", "responses", {"tool_choice": {"type": "function",
                                                      "function": {"name": "f"}}},
     {"tool_choice": {"type": "function", "name": "f"}}),
    ("a choice in OpenAI's words", "messages", {"tool_choice": "required"},
     {"tool_choice": {"type": "any"}}),
    ("a named choice in OpenAI's words", "messages",
     {"tool_choice": {"type": "function", "function": {"name": "f"}}},
     {"tool_choice": {"type": "tool", "name": "f"}}),
    ("a system text beside messages", "chat", {"system": "be kind"},
     {"system": None, "messages": [{"role": "system", "content": "be kind"},
                                   {"role": "user", "content": "hi"}]}),
    ("a system text by Anthropic's name", "responses", {"system": [{"type": "text", "text": "s"}]},
     {"system": None, "instructions": "s"}),
    ("messages on the route of input", "responses",
     {"input": None, "messages": [{"role": "user", "content": "hi"}]},
     {"messages": None, "input": [{"role": "user", "content": "hi"}]}),
    ("a bare text as input", "messages", {"messages": None, "input": "hi"},
     {"input": None, "messages": [{"role": "user", "content": "hi"}]}),
]

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
#: (symptom, dialect, one turn of a client, the turns that are to become of it)
TURNS: Any = [
    ("parts of Responses", "chat", {"role": "user", "content": [
        {"type": "input_text", "text": "a"}, {"type": "input_image", "detail": "low",
                                              "image_url": "data:image/png;base64," + PNG}]},
     [{"role": "user", "content": [{"type": "text", "text": "a"}, {
         "type": "image_url",
         "image_url": {"url": "data:image/png;base64," + PNG, "detail": "low"}}]}]),
    ("a part that is no list", "chat", {"role": "user", "content": {"type": "text", "text": "a"}},
     [{"role": "user", "content": [{"type": "text", "text": "a"}]}]),
    ("strings among parts", "chat", {"role": "user", "content": ["a", "b"]},
     [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]),
    ("a bare string as turn", "responses", "a", [{"role": "user", "content": "a"}]),
    ("Anthropic's image", "chat", {"role": "user", "content": [{"type": "image", "source": {
        "type": "base64", "media_type": "image/png", "data": PNG}}]},
     [{"role": "user", "content": [{"type": "image_url", "image_url": {
         "url": "data:image/png;base64," + PNG}}]}]),
    ("Anthropic's tool use", "chat", {"role": "assistant", "content": [
        {"type": "text", "text": "a"},
        {"type": "tool_use", "id": "c1", "name": "f", "input": {}}]},
     [{"role": "assistant", "content": "a", "tool_calls": [CALL]}]),
    ("Anthropic's tool result", "chat", {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "c1", "content": "ok"}]},
     [{"role": "tool", "tool_call_id": "c1", "content": "ok"}]),
    ("an item of Responses", "chat", {"type": "function_call", "call_id": "c1", "name": "f",
                                      "arguments": "{}"},
     [{"role": "assistant", "content": None, "tool_calls": [CALL]}]),
    ("a result of Responses", "chat", {"type": "function_call_output", "call_id": "c1",
                                       "output": "ok"},
     [{"role": "tool", "tool_call_id": "c1", "content": "ok"}]),
    ("Chat's parts", "responses", {"role": "user", "content": [{"type": "text", "text": "a"}]},
     [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]),
    ("Chat's parts of an answer", "responses", {"role": "assistant", "content": [
        {"type": "text", "text": "a"}]},
     [{"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}]),
    ("Chat's calls", "responses", {"role": "assistant", "content": None, "tool_calls": [CALL]},
     [{"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}]),
    ("Chat's results", "responses", {"role": "tool", "tool_call_id": "c1", "content": "ok"},
     [{"type": "function_call_output", "call_id": "c1", "output": "ok"}]),
    ("Chat's calls for Claude", "messages", {"role": "assistant", "content": None,
                                             "tool_calls": [CALL]},
     [{"role": "assistant", "content": [
         {"type": "tool_use", "id": "c1", "name": "f", "input": {}}]}]),
    ("Chat's results for Claude", "messages", {"role": "tool", "tool_call_id": "c1",
                                               "content": "ok"},
     [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1",
                                    "content": [{"type": "text", "text": "ok"}]}]}]),
    ("Chat's image for Claude", "messages", {"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PNG}}]},
     [{"role": "user", "content": [{"type": "image", "source": {
         "type": "base64", "media_type": "image/png", "data": PNG}}]}]),
    ("a label with another spelling", "messages", {"role": "user", "content": [
        {"type": "image", "source": {"type": "base64", "media_type": "image/jpg", "data": JPEG}}]},
     [{"role": "user", "content": [{"type": "image", "source": {
         "type": "base64", "media_type": "image/jpeg", "data": JPEG}}]}]),
    ("JPEG labelled PNG", "chat", {"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + JPEG}}]},
     [{"role": "user", "content": [{"type": "image_url", "image_url": {
         "url": "data:image/jpeg;base64," + JPEG}}]}]),
    ("capitals in a label", "responses", {"role": "user", "content": [
        {"type": "input_image", "image_url": "data:IMAGE/JPEG;base64," + JPEG}]},
     [{"role": "user", "content": [{"type": "input_image",
                                    "image_url": "data:image/jpeg;base64," + JPEG}]}]),
    ("no label", "chat", {"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:;base64," + PNG}}]},
     [{"role": "user", "content": [{"type": "image_url", "image_url": {
         "url": "data:image/png;base64," + PNG}}]}]),
    ("bare base64", "chat", {"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": PNG}}]},
     [{"role": "user", "content": [{"type": "image_url", "image_url": {
         "url": "data:image/png;base64," + PNG}}]}]),
]

#: (dialect, turn that only some vendor knows): its words must arrive whole
UNKNOWN: Any = [
    ("responses", {"type": "mcp_list_tools", "server_label": "s", "tools": [{"name": "WORDS"}]}),
    ("responses", {"type": "mcp_approval_request", "name": "WORDS"}),
    ("responses", {"type": "ghost_snapshot", "ghost_commit": {"id": "WORDS"}}),
    ("responses", {"type": "invented_call", "call_id": "c9", "text": "WORDS"}),
    ("messages", {"role": "user", "content": [{"type": "tool_reference", "tool_name": "WORDS"}]}),
    ("messages", {"role": "assistant", "content": [
        {"type": "mcp_tool_use", "id": "m1", "name": "WORDS", "input": {}}]}),
    ("messages", {"role": "assistant", "content": [{"type": "compaction", "content": "WORDS"}]}),
    ("messages", {"role": "user", "content": [{"type": "container_upload", "file_id": "WORDS"}]}),
    ("messages", {"role": "user", "content": [{"type": "document", "source": {
        "type": "content", "content": [{"type": "text", "text": "WORDS"}]}}]}),
    ("messages", {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "t", "content": [
            {"type": "search_result", "source": "s", "title": "t", "content": [
                {"type": "text", "text": "WORDS" * 2000}]}]}]}),
    ("chat", {"role": "user", "content": [{"type": "invented", "text": "WORDS"}]}),
]


def body_of(dialect: str, **more: Any) -> Any:
    body: Any = {"model": MODEL.id, "messages": [{"role": "user", "content": "hi"}]}
    if dialect == "responses":
        body = {"model": MODEL.id, "input": [{"role": "user", "content": "hi"}]}
    if dialect == "messages":
        body["max_tokens"] = 100
    return dict(body, **copy.deepcopy(more))


def normalised(dialect: str, body: Any) -> Any:
    edit = cp.BodyEdit(body)
    cp.normalise(edit, cp.DIALECTS[dialect], MODEL)
    return edit


class NormaliseTest(unittest.TestCase):
    def test_fields_tools_and_choices_of_other_shapes_become_the_dialects_own(self) -> None:
        for symptom, dialect, given, want in FIELDS:
            with self.subTest(symptom, dialect=dialect):
                edit = normalised(dialect, body_of(dialect, **given))
                self.assertEqual({key: edit.body.get(key) for key in want}, want)

    def test_turns_and_parts_of_other_shapes_become_the_dialects_own(self) -> None:
        for symptom, dialect, given, want in TURNS:
            key = cp.DIALECTS[dialect].turns_key
            with self.subTest(symptom, dialect=dialect):
                edit = normalised(dialect, body_of(dialect, **{key: [given]}))
                self.assertEqual(edit.body[key], want)

    def test_functions_of_old_clients_are_paired_with_their_results(self) -> None:
        called = {"role": "assistant", "content": None,
                  "function_call": {"name": "f", "arguments": "{}"}}
        answered = {"role": "function", "name": "f", "content": "ok"}
        edit = normalised("chat", body_of("chat", messages=[
            called, answered, {"role": "user", "content": "go on"}]))
        call, result, _ = edit.body["messages"]
        self.assertEqual(call["tool_calls"][0]["function"], called["function_call"])
        self.assertEqual((result["role"], result["tool_call_id"]),
                         ("tool", call["tool_calls"][0]["id"]))

    def test_what_no_dialect_knows_stays_as_text_and_is_recorded(self) -> None:
        for dialect, turn in UNKNOWN:
            key = cp.DIALECTS[dialect].turns_key
            words = json.dumps(turn).count("WORDS")
            with self.subTest(dialect=dialect, turn=str(turn)[:60]):
                edit = normalised(dialect, body_of(dialect, **{key: [turn]}))
                self.assertEqual(json.dumps(edit.body).count("WORDS"), words)
                if "document" not in str(turn):
                    self.assertTrue(edit.losses)

    def test_it_is_done_after_one_pass(self) -> None:
        bodies = [(d, body_of(d, **given)) for _, d, given, _ in FIELDS]
        bodies += [(d, body_of(d, **{cp.DIALECTS[d].turns_key: [turn]}))
                   for _, d, turn, _ in TURNS]
        bodies += [(d, body_of(d, **{cp.DIALECTS[d].turns_key: [turn]})) for d, turn in UNKNOWN]
        for dialect, body in bodies:
            with self.subTest(dialect=dialect, body=str(body)[:80]):
                once = normalised(dialect, body)
                again = normalised(dialect, copy.deepcopy(once.body))
                self.assertEqual(again.body, once.body)
                self.assertFalse(again.changed)

    def test_a_body_in_its_own_shape_is_left_alone(self) -> None:
        own = [("chat", {"role": "assistant", "content": "a", "tool_calls": [CALL]}),
               ("chat", {"role": "tool", "tool_call_id": "c1", "content": "ok"}),
               ("chat", {"role": "user", "name": "n", "content": [
                   {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]}),
               ("responses", {"type": "function_call_output", "call_id": "c1", "output": "ok"}),
               ("responses", {"type": "reasoning", "summary": [{"type": "summary_text",
                                                                "text": "a"}]}),
               ("messages", {"role": "assistant", "content": [
                   {"type": "thinking", "thinking": "", "signature": "s"},
                   {"type": "tool_use", "id": "t", "name": "f", "input": {"null": None}}]})]
        for dialect, turn in own:
            body = body_of(dialect, **{cp.DIALECTS[dialect].turns_key: [turn]})
            with self.subTest(dialect=dialect, turn=str(turn)):
                edit = normalised(dialect, copy.deepcopy(body))
                self.assertEqual((edit.changed, edit.body), (False, body))

    def test_every_step_says_why_it_is_there(self) -> None:
        for step in (*cp.FIELD_STEPS, *cp.TURN_STEPS):
            self.assertGreater(len(step.__doc__ or ""), 40, step.__name__)


class UpstreamRulesTest(ProxyCase):
    """What strict upstreams refuse, on the diagonal as well."""

    def setUp(self) -> None:
        super().setUp()
        claude = next(e for e in default_models() if e["id"] == "claude-sonnet-4.6")
        self.fake.models.append(dict(claude, id="claude-only-4.6",
                                     supported_endpoints=["/v1/messages"]))

    def sent(self, path: str, body: Any, upstream: str) -> Any:
        reply = self.proxy.post(path, body)
        self.assertEqual(reply.status, 200, reply.body)
        return self.fake.last(upstream).json

    def test_images_of_tools_move_behind_the_results_on_chat(self) -> None:
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PNG}}
        body = chat("hi")
        calls = [dict(CALL, id=call_id) for call_id in ("c1", "c2")]
        body["messages"] += [
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c1", "content": [image]},
            {"role": "tool", "tool_call_id": "c2", "content": "ok"}]
        messages = self.sent("/v1/chat/completions", body, "/chat/completions")["messages"]
        self.assertEqual([m["role"] for m in messages[-4:]], ["assistant", "tool", "tool", "user"])
        self.assertIsInstance(messages[-3]["content"], str)
        self.assertIn(image, messages[-1]["content"])

    def test_a_conversation_of_a_system_text_alone_has_a_turn(self) -> None:
        body: Any = {"messages": [{"role": "system", "content": "s"}]}
        for model, path in (("claude-only-4.6", "/v1/messages"),
                            ("claude-sonnet-4.6", "/chat/completions")):
            sent = self.sent("/v1/chat/completions", dict(body, model=model), path)
            self.assertEqual(sent["messages"][0]["role"], "user")
        body["model"] = "gpt-5.3-codex"
        sent = self.sent("/v1/chat/completions", body, "/responses")
        self.assertEqual(len(sent["input"]), 1)

    def test_cache_marks_inside_a_result_move_to_the_result(self) -> None:
        mark = {"type": "ephemeral"}
        body = message("hi", model="claude-sonnet-4.6")
        body["messages"] += [
            {"role": "assistant", "content": [
                {"type": "tool_use", "id": "t1", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [
                {"type": "text", "text": "ok", "cache_control": mark}]}]}]
        sent = self.sent("/v1/messages", body, "/v1/messages")
        result = sent["messages"][-1]["content"][0]
        self.assertEqual(result["cache_control"], mark)
        self.assertNotIn("cache_control", result["content"][0])

    def test_fields_about_tools_go_with_the_last_tool(self) -> None:
        for fields in ({"parallel_tool_calls": True}, {"tools": [], "tool_choice": "auto"}):
            sent = self.sent("/v1/chat/completions", dict(chat("hi"), **fields),
                             "/chat/completions")
            self.assertTrue(set(sent).isdisjoint(
                {"tools", "tool_choice", "parallel_tool_calls"}), sent)

    def test_a_forced_tool_that_is_not_offered_is_refused(self) -> None:
        body = dict(message("hi", model="claude-sonnet-4.6"), tools=[
            {"type": "code_execution_20250522", "name": "code_execution"},
            {"name": "f", "input_schema": SCHEMA}],
            tool_choice={"type": "tool", "name": "code_execution"})
        reply = self.proxy.post("/v1/messages", body)
        self.assertEqual(reply.status, 400)
        self.assertIn("code_execution", reply.json["error"]["message"])

    def test_images_have_a_detail_that_the_target_knows(self) -> None:
        url = "data:image/png;base64," + PNG
        for model, path in (("gpt-5.3-codex", "/responses"), ("gpt-4.1", "/chat/completions")):
            body = {"model": model, "input": [{"role": "user", "content": [
                {"type": "input_image", "image_url": url, "detail": "original"}]}]}
            sent = self.sent("/v1/responses", body, path)
            self.assertIn('"detail": "high"', json.dumps(sent), model)
        del body["input"][0]["content"][0]["detail"]
        sent = self.sent("/v1/responses", dict(body, model="gpt-5.3-codex"), "/responses")
        self.assertEqual(sent["input"][0]["content"][0]["detail"], "auto")

    def test_turns_without_a_word_are_left_out_for_claude(self) -> None:
        body = message("hi", model="claude-sonnet-4.6")
        body["messages"] += [{"role": "assistant", "content": ""}, {"role": "user", "content": []},
                             {"role": "user", "content": " \n"}]
        sent = self.sent("/v1/messages", body, "/v1/messages")
        self.assertEqual(len(sent["messages"]), 1)


class TextTest(ProxyCase):
    """Text is valid Unicode at the edge."""

    def test_half_of_an_emoji_becomes_one_character_and_is_recorded(self) -> None:
        for path, body, upstream in (
                ("/v1/chat/completions", chat("TEXT"), "/chat/completions"),
                ("/v1/chat/completions", chat("TEXT", "gpt-5.3-codex"), "/responses"),
                ("/v1/messages", message("TEXT", model="claude-sonnet-4.6"), "/v1/messages")):
            for text, want in (("a\\ud83d", "a\ufffd"), ("\\uDE00b", "\ufffdb"),
                               ("\\ud83d\\ud83d\\ude00", "\ufffd\U0001f600"),
                               ("\\ud83d\\\\ude00", "\ufffd\\ude00")):
                data = json.dumps(body).replace("TEXT", text).encode()
                with self.subTest(path=path, text=text):
                    reply = self.proxy.post(path, data)
                    self.assertEqual(reply.status, 200, reply.body)
                    sent = json.dumps(self.fake.last(upstream).json, ensure_ascii=False)
                    self.assertIn(json.dumps(want, ensure_ascii=False)[1:-1], sent)
                    self.assertIn("text", reply.headers["x-copilot-proxy-lossy"])

    def test_whole_pairs_and_texts_about_escapes_go_up_as_the_clients_own_bytes(self) -> None:
        for text in (b'"\\ud83d\\ude00"', b'"\\\\ud83d"', b'"\\n\\ud83D\\uDE00\\u0041"'):
            self.assertIs(cp.valid_text(text), text)


class SchemaTest(unittest.TestCase):
    """Schemas of tools as OpenAI's validator wants them."""

    def fitted(self, schema: Any, **more: Any) -> Any:
        tool = {"type": "function", "name": "f", "parameters": copy.deepcopy(schema), **more}
        edit = cp.BodyEdit({"model": "m", "input": "hi", "tools": [tool]})
        cp.fit_openai_tools(edit, cp.RESPONSES)
        return edit

    def test_objects_have_properties_and_arrays_have_items_at_any_depth(self) -> None:
        deep = {"type": "object", "properties": {"properties": {"anyOf": [
            {"type": "array"}, {"type": "object"}]}}, "$defs": {"d": {"type": "array"}}}
        for given in ({"type": "object"}, {"type": "array"}, deep):
            tool = self.fitted(given).body["tools"][0]
            for node in cp.schema_nodes(tool["parameters"]):
                self.assertTrue(node.get("type") != "object" or "properties" in node)
                self.assertTrue(node.get("type") != "array" or "items" in node)

    def test_a_strict_tool_with_optional_properties_is_not_strict(self) -> None:
        edit = self.fitted(SCHEMA, strict=True)
        self.assertEqual((edit.body["tools"][0]["strict"], edit.losses[0][0]), (False, "strict"))
        self.assertTrue(self.fitted(dict(SCHEMA, required=["x"]), strict=True).body["tools"][0]
                        ["strict"])

    def test_a_schema_that_is_fine_is_left_alone(self) -> None:
        self.assertFalse(self.fitted(SCHEMA).changed)


class EndpointTest(ProxyCase):
    """The endpoint is chosen by what the request needs."""

    PDF = "data:application/pdf;base64,JVBERi0="

    def test_a_file_of_a_chat_client_goes_to_the_endpoint_that_takes_it(self) -> None:
        part = {"type": "file", "file": {"filename": "a.pdf", "file_data": self.PDF}}
        for model, path in (("claude-sonnet-4.6", "/v1/messages"), ("gpt-5-mini", "/responses")):
            body = dict(chat("hi", model))
            self.assertEqual(self.proxy.post("/v1/chat/completions", body).status, 200)
            self.assertEqual(self.fake.requests[-1].path, "/chat/completions")
            body["messages"] = [{"role": "user", "content": [part]}]
            reply = self.proxy.post("/v1/chat/completions", body)
            self.assertEqual((reply.status, self.fake.requests[-1].path), (200, path))
            self.assertIn("JVBERi0=", json.dumps(self.fake.requests[-1].json))

    def test_a_beta_header_for_a_wide_context_chooses_the_wide_sibling(self) -> None:
        entry = next(e for e in default_models() if e["id"] == "claude-sonnet-4.6")
        self.fake.models.append(dict(entry, id="claude-sonnet-4.6-1m"))
        body = message("hi", model="claude-sonnet-4.6")
        for beta, want in (("", "claude-sonnet-4.6"),
                           ("context-1m-2025-08-07", "claude-sonnet-4.6-1m")):
            headers = {"anthropic-beta": beta} if beta else {}
            self.assertEqual(self.proxy.post("/v1/messages", body, **headers).status, 200)
            self.assertEqual(self.fake.last("/v1/messages").json["model"], want)


class InitiatorTest(unittest.TestCase):
    """Requests that no human wrote count as the agent's."""

    def test_side_requests_are_known_by_their_marks(self) -> None:
        for row in cp.SIDE_REQUESTS:
            words = "\n".join(row.marks) + ("" if row.how == "is" else " and more")
            system, user = (words, "x") if row.place == "system" else ("y", words)
            for dialect, body in (
                    ("messages", {"system": [{"type": "text", "text": "You are a client."},
                                             {"type": "text", "text": system}],
                                  "messages": [{"role": "user", "content": user}]}),
                    ("chat", {"messages": [{"role": "system", "content": system},
                                           {"role": "user", "content": user}]}),
                    ("responses", {"instructions": system, "input": user})):
                if dialect == "responses" and row.place == "user":
                    body["input"] = [{"role": "user", "content": user}]
                with self.subTest(mark=row.marks[0][:40], dialect=dialect):
                    self.assertEqual(cp.DIALECTS[dialect].initiator(body), "agent")

    def test_a_human_who_quotes_a_mark_stays_the_user(self) -> None:
        for row in cp.SIDE_REQUESTS:
            if row.how != "holds":
                body = {"messages": [{"role": "user", "content": "I read: " + row.marks[0]}]}
                self.assertEqual(cp.CHAT.initiator(body), "user", row.marks[0])


if __name__ == "__main__":
    unittest.main()
