"""What a request becomes before it goes up to a model of its own dialect, and what of it decides
the headers (section 7)."""
from __future__ import annotations

import copy
import json
import random
import unittest
from typing import Any

from fake_upstream import default_models
from support import SLOW, cp, places, with_value
from wire import (CATALOGUE, assistant, user, chat_of as chat, message_of as message,
                  response_of as response)

MODELS, LIST = CATALOGUE, list(CATALOGUE.values())
GPT, MINI, CODEX = MODELS["gpt-4.1"], MODELS["gpt-5-mini"], MODELS["gpt-5.3-codex"]
SONNET, HAIKU, OPUS7 = (MODELS["claude-" + n] for n in ("sonnet-4.6", "haiku-4.5", "opus-4.7"))
GEMINI = MODELS["gemini-3.1-pro-preview"]
PNG = "data:image/png;base64,iVBORw0KGgo="
SOURCE = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
SCHEMA = {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "properties": {}}
PLAIN_SCHEMA = {"type": "object", "properties": {}}


def prepared(dialect: Any, body: Any, model: Any) -> Any:
    """The Edit after `prepare`; `changed` must tell the truth."""
    before = json.dumps(body)
    edit = cp.BodyEdit(copy.deepcopy(body))
    dialect.prepare(edit, model)
    if not edit.changed:
        assert json.dumps(edit.body) == before, "changed without saying so"
    return edit


class Requests(unittest.TestCase):
    dialect: Any = None

    def becomes(self, model: Any, body: Any, want: Any, losses: Any = ()) -> None:
        """`want` is compared in the keys that it has; ABSENT means that the key is gone."""
        edit = prepared(self.dialect, body, model)
        for key, value in want.items():
            self.assertEqual(edit.body.get(key, ABSENT), value, key)
        self.assertEqual(sorted({name for name, _ in edit.losses}), sorted(losses))

    def refused(self, model: Any, body: Any, *words: str) -> cp.BadRequest:
        with self.assertRaises(cp.BadRequest) as caught:
            prepared(self.dialect, body, model)
        self.assertEqual(caught.exception.status, 400)
        for word in words:
            self.assertIn(word, str(caught.exception))
        return caught.exception

    def unchanged(self, model: Any, body: Any) -> None:
        edit = prepared(self.dialect, body, model)
        self.assertFalse(edit.changed, edit.body)
        self.assertEqual(edit.losses, [])


ABSENT = "(absent)"


class ChatRequests(Requests):
    dialect = cp.CHAT

    def test_fit_bodies_stay_untouched(self) -> None:
        tool = {"type": "function", "function": {"name": "a", "parameters": PLAIN_SCHEMA}}
        for model, body in (
                (GPT, chat(temperature=0.5, top_p=1, seed=3, user="u", n=1, max_tokens=100)),
                (GPT, chat(user([{"type": "image_url", "image_url": {"url": PNG}}]), tools=[tool],
                           tool_choice="auto", parallel_tool_calls=False)),
                (GPT, chat(stream=True, stream_options={"include_usage": True})),
                (MINI, chat({"role": "developer", "content": "x"}, user("a"),
                            reasoning_effort="minimal", max_completion_tokens=5)),
                (SONNET, chat(max_tokens=5, stop=["x"])),
                (GEMINI, chat(max_tokens=5, response_format={"type": "json_object"}))):
            with self.subTest(body=body):
                self.unchanged(model, body)

    def test_fields_that_are_refused_upstream_go(self) -> None:
        self.becomes(GPT, chat(store=True, service_tier="auto", metadata={"a": "b"}, user="u"),
                     {"store": ABSENT, "service_tier": ABSENT, "metadata": {"a": "b"}, "user": "u"})

    def test_usage_is_always_asked_for_in_streams(self) -> None:
        for given in ({}, {"stream_options": None}, {"stream_options": {"include_usage": False}}):
            self.becomes(GPT, chat(stream=True, **given), {"stream_options": {
                "include_usage": True}})
        self.becomes(GPT, chat(stream=True, stream_options={"x": 1}),
                     {"stream_options": {"x": 1, "include_usage": True}})
        self.becomes(GPT, chat(stream=False), {"stream_options": ABSENT})

    def test_max_tokens_takes_the_name_of_the_family(self) -> None:
        for model, body, want in (
                (MINI, {"max_tokens": 7}, {"max_completion_tokens": 7, "max_tokens": ABSENT}),
                (GPT, {"max_tokens": 7}, {"max_tokens": 7, "max_completion_tokens": ABSENT}),
                (SONNET, {"max_completion_tokens": 7},
                 {"max_tokens": 7, "max_completion_tokens": ABSENT}),
                (GEMINI, {"max_completion_tokens": 7}, {"max_tokens": 7}),
                (SONNET, {}, {"max_tokens": 16000}), (SONNET, {"stream": True},
                                                      {"max_tokens": 32000}),
                (GEMINI, {}, {"max_tokens": 64000}), (GPT, {}, {"max_tokens": ABSENT}),
                (MINI, {}, {"max_completion_tokens": ABSENT, "max_tokens": ABSENT}),
                (GPT, {"max_tokens": -1}, {"max_tokens": ABSENT}),
                (GPT, {"max_tokens": None}, {"max_tokens": ABSENT}),
                (SONNET, {"max_tokens": None}, {"max_tokens": 16000}),
                (SONNET, {"max_completion_tokens": -1}, {"max_tokens": 16000})):
            with self.subTest(model=model.id, body=body):
                self.becomes(model, chat(**body), want)

    def test_developer_turns_become_system_turns_where_unknown(self) -> None:
        turn = {"role": "developer", "content": "Be brief."}
        for model, role in ((GPT, "system"), (MODELS["gpt-4o"], "system"), (SONNET, "system"),
                            (GEMINI, "system"), (MODELS["grok-code-fast-1"], "system"),
                            (MINI, "developer"), (MODELS["gpt-3.5-turbo"], "system")):
            with self.subTest(model=model.id):
                edit = prepared(cp.CHAT, chat(turn, user("a"), max_tokens=1), model)
                self.assertEqual(edit.body["messages"][0], {"role": role, "content": "Be brief."})

    def test_images_are_inline_or_the_upstreams_own(self) -> None:
        for url in (PNG, "DATA:image/png;base64,AA", cp.ATTACHMENTS_URL + "1"):
            self.unchanged(GPT, chat(user([{"type": "image_url", "image_url": {"url": url}}])))
        for url in ("https://example.com/a.png", "http://127.0.0.1/a", "file:///etc/passwd", "",
                    "https://github.com/github-copilot/chat/other"):
            error = self.refused(GPT, chat(user("a"), user([
                {"type": "image_url", "image_url": {"url": url}}])), "base64")
            self.assertEqual(error.param, "messages[1]")

    def test_schema_marks_and_empty_tools_go(self) -> None:
        tool = {"type": "function", "function": {"name": "a", "parameters": SCHEMA}}
        self.becomes(GPT, chat(tools=[tool]), {"tools": [
            {"type": "function", "function": {"name": "a", "parameters": PLAIN_SCHEMA}}]})
        for choice, losses in ((None, ()), ("auto", ()), ("none", ()), ("required",
                                                                        ("tool_choice",))):
            self.becomes(GPT, chat(tools=[], tool_choice=choice, parallel_tool_calls=True),
                         {"tools": ABSENT, "tool_choice": ABSENT, "parallel_tool_calls": ABSENT},
                         losses)

    def test_our_reasoning_content_does_not_go_back(self) -> None:
        turn = dict(assistant("Hi"), reasoning_text="a", reasoning_opaque="b",
                    reasoning_content="a")
        edit = prepared(cp.CHAT, chat(user("a"), turn, user("b")), GPT)
        self.assertEqual(edit.body["messages"][1], dict(assistant("Hi"), reasoning_text="a",
                                                        reasoning_opaque="b"))

    def test_what_cannot_be_served_is_refused_with_its_name(self) -> None:
        for body, param in (({"model": "m"}, "messages"), (chat(messages=[]), "messages"),
                            (chat(messages="Hi"), "messages"), (chat("Hi"), "messages[0]"),
                            (chat(user("a"), None), "messages[1]"), (chat(n=2), "n")):
            with self.subTest(body=body):
                self.assertEqual(self.refused(GPT, body).param, param)


class ResponsesRequests(Requests):
    dialect = cp.RESPONSES

    def test_fit_bodies_stay_untouched(self) -> None:
        include = ["reasoning.encrypted_content"]
        tools = [{"type": "function", "name": "a", "parameters": PLAIN_SCHEMA, "strict": False},
                 {"type": "custom", "name": "apply_patch"}, {"type": "local_shell"},
                 {"type": "web_search"}, {"type": "namespace", "name": "n", "tools": []}]
        for body in (response(store=False, include=include),
                     response(store=False, include=include, tools=tools, stream=True,
                              text={"verbosity": "low"}, prompt_cache_key="k", truncation="auto",
                              reasoning={"effort": "minimal", "summary": "auto"},
                              max_output_tokens=16, context_management=[{"type": "compaction"}]),
                     response({"role": "user", "content": "a"},
                              {"type": "message", "role": "assistant", "content": [],
                               "phase": "commentary"},
                              {"type": "reasoning", "encrypted_content": "gA", "summary": []},
                              {"type": "compaction", "encrypted_content": "gA"},
                              {"type": "function_call", "call_id": "c" * 64, "name": "a",
                               "arguments": "{}"},
                              {"type": "function_call_output", "call_id": "c" * 64, "output": [
                                  {"type": "input_image", "image_url": PNG, "detail": "high"}]},
                              store=False, include=include)):
            with self.subTest(body=body):
                self.unchanged(CODEX, body)

    def test_nothing_is_stored_upstream(self) -> None:
        for given in ({}, {"store": True}, {"store": None}):
            self.becomes(CODEX, response(service_tier="auto", **given),
                         {"store": False, "service_tier": ABSENT})

    def test_stored_state_is_refused_with_its_name(self) -> None:
        for key, value in (("background", True), ("conversation", "conv_1"),
                           ("prompt", {"id": "pmpt_1"})):
            self.assertEqual(self.refused(CODEX, response(**{key: value}), key).param, key)
        for key in ("background", "conversation", "prompt", "previous_response_id"):
            self.becomes(CODEX, response(**{key: None}), {})
        error = self.refused(CODEX, response(previous_response_id="resp_1"), "resp_1")
        self.assertEqual(error.code, "previous_response_not_found")

    def test_encrypted_reasoning_is_asked_for(self) -> None:
        want = "reasoning.encrypted_content"
        for model, given, include in ((CODEX, {}, [want]), (CODEX, {"include": None}, [want]),
                                      (CODEX, {"include": ["x"]}, ["x", want]),
                                      (CODEX, {"include": [want]}, [want]), (GPT, {}, ABSENT)):
            self.becomes(model, response(**given), {"include": include})

    def test_output_limit_has_a_least(self) -> None:
        for given, want in ((1, 16), (15, 16), (16, 16), (500, 500), (None, None)):
            self.becomes(CODEX, response(max_output_tokens=given), {"max_output_tokens": want})

    def test_tools_that_are_not_offered_are_lost_with_a_record(self) -> None:
        keep = {"type": "function", "name": "a", "parameters": SCHEMA}
        kept = dict(keep, parameters=PLAIN_SCHEMA)
        self.becomes(CODEX, response(tools=[keep, {"type": "image_generation"},
                                            {"type": "code_interpreter", "container": {}}]),
                     {"tools": [kept]}, ["tools"])
        self.becomes(CODEX, response(tools=[{"type": "image_generation"}], tool_choice="auto"),
                     {"tools": ABSENT, "tool_choice": ABSENT}, ["tools"])
        self.becomes(CODEX, response(tools=[]), {"tools": ABSENT})

    def items(self, *given: Any) -> Any:
        return prepared(cp.RESPONSES, response(*given), CODEX).body["input"]

    def test_ids_of_items_go_and_call_ids_stay(self) -> None:
        for item in ({"type": "message", "role": "user", "content": "a"},
                     {"role": "assistant", "content": "a", "phase": "final_answer"},
                     {"type": "function_call", "call_id": "c", "name": "a", "arguments": "{}"},
                     {"type": "custom_tool_call", "call_id": "c", "name": "a", "input": ""},
                     {"type": "function_call_output", "call_id": "c", "output": "x"},
                     {"type": "custom_tool_call_output", "call_id": "c", "output": "x"},
                     {"type": "compaction", "encrypted_content": "x"},
                     {"type": "reasoning", "encrypted_content": "x", "summary": []},
                     {"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}]}):
            with self.subTest(item=item):
                given = dict(item, id="A/b+" * 100, internal_chat_message_metadata_passthrough={})
                self.assertEqual(self.items(given), [item])

    def test_items_that_cannot_be_replayed_go(self) -> None:
        hi = {"role": "user", "content": "a"}
        for item in ({"type": "reasoning", "id": "rs_1", "summary": []},
                     {"type": "reasoning"}, {"type": "reasoning", "encrypted_content": None},
                     {"type": "reasoning", "summary": [{"type": "summary_text", "text": ""}]}):
            with self.subTest(item=item):
                self.assertEqual(self.items(hi, item), [hi])
        self.becomes(CODEX, response(hi, {"type": "item_reference", "id": "rs_1"}),
                     {"input": [hi]}, ["input[1]"])

    def test_long_call_ids_are_shortened_alike(self) -> None:
        long = "call_" + "x" * 90
        call, output, other = self.items(
            {"type": "function_call", "call_id": long, "name": "a", "arguments": "{}"},
            {"type": "function_call_output", "call_id": long, "output": ""},
            {"type": "function_call_output", "call_id": long + "y", "output": ""})
        self.assertLessEqual(len(call["call_id"]), 64)
        self.assertEqual(call["call_id"], output["call_id"])
        self.assertNotEqual(call["call_id"], other["call_id"])

    def test_images_are_inline_with_a_known_detail(self) -> None:
        image = {"type": "input_image", "image_url": PNG, "detail": "original"}
        high = dict(image, detail="high")
        self.assertEqual(self.items({"role": "user", "content": [image]}),
                         [{"role": "user", "content": [high]}])
        self.assertEqual(self.items({"type": "function_call_output", "call_id": "c",
                                     "output": [image]}),
                         [{"type": "function_call_output", "call_id": "c", "output": [high]}])
        for key in ("content", "output"):
            self.refused(CODEX, response({"role": "user", key: [
                {"type": "input_image", "image_url": "https://example.com/a"}]}), "base64")

    def test_input_must_be_there(self) -> None:
        for body in ({"model": "m"}, response(input=None), response(input=5), response(input={}),
                     response("a"), response({"role": "user"}, 5)):
            self.assertTrue(self.refused(CODEX, body).param.startswith("input"))


def block(text: str, **more: Any) -> Any:
    return dict({"type": "text", "text": text}, **more)


def result(content: Any = "ok", call_id: str = "t1", **more: Any) -> Any:
    return dict({"type": "tool_result", "tool_use_id": call_id, "content": content}, **more)


def thinking(text: str = "Hm", signature: Any = "EqQB") -> Any:
    return {"type": "thinking", "thinking": text, "signature": signature}


REMINDED = "<system-reminder>\n%s\n</system-reminder>"


class MessagesRequests(Requests):
    dialect = cp.MESSAGES

    def test_fit_bodies_stay_untouched(self) -> None:
        tool = {"name": "a", "input_schema": PLAIN_SCHEMA, "type": "custom"}
        use = {"type": "tool_use", "id": "t1", "name": "a", "input": {"$schema": 1}}
        for model, body in (
                (SONNET, message(user("a"), assistant("b"), user([block("c")]), temperature=1,
                                 metadata={"user_id": "u"}, stop_sequences=["x"])),
                (SONNET, message(user("a"), assistant([thinking(), block("b"), use]),
                                 user([result(), block("c")]), tools=[tool], stream=True,
                                 tool_choice={"type": "auto"}, system=[block("s")])),
                (SONNET, message(thinking={"type": "adaptive"},
                                 output_config={"effort": "high", "format": {}})),
                (SONNET, message(max_tokens=4000, thinking={"type": "enabled",
                                                            "budget_tokens": 2000})),
                (HAIKU, message(user("a"), assistant("prefill"))),
                (HAIKU, message(thinking={"type": "disabled"}, top_k=5)),
                (SONNET, message(user([{"type": "image", "source": SOURCE},
                                       {"type": "document", "source": SOURCE},
                                       result([{"type": "image", "source": SOURCE}])])))):
            with self.subTest(body=body):
                self.unchanged(model, body)

    def test_refused_fields_go_and_losses_are_recorded(self) -> None:
        fields = {"context_management": {"edits": []}, "inference_geo": "eu", "speed": "fast",
                  "container": "c", "mcp_servers": [{}], "betas": ["a"], "contextTier": "x",
                  "service_tier": "auto", "cache_control": {"type": "ephemeral"}}
        self.becomes(SONNET, message(**fields), dict.fromkeys(fields, ABSENT), list(fields))
        self.becomes(SONNET, message(**dict.fromkeys(fields)), dict.fromkeys(fields, ABSENT))

    def test_threads_are_refused_so_that_sdks_fall_back(self) -> None:
        error = self.refused(SONNET, message(thread={"type": "create"}))
        self.assertEqual(cp.MESSAGES.error_body(error, "r")["error"]["details"],
                         {"error_code": "thread_unsupported_request"})

    def test_system_becomes_blocks(self) -> None:
        for given, want in (("Be brief.", [block("Be brief.")]), ("", ABSENT), (None, ABSENT),
                            ([], ABSENT), ([block(" ")], ABSENT),
                            ([block("a"), block("")], [block("a")])):
            with self.subTest(given=given):
                self.becomes(SONNET, message(system=given), {"system": want})

    def test_system_turns_fold_into_the_next_user_turn(self) -> None:
        note = {"role": "system", "content": "note"}
        for given, want in (
                ([user("a"), note, user("b")],
                 [user("a"), user([block("b"), block(REMINDED % "note")])]),
                ([note, user([result()])], [user([result(), block(REMINDED % "note")])]),
                ([user("a"), assistant("b"), note],
                 [user("a"), assistant("b"), user([block(REMINDED % "note")])]),
                ([user("a"), note, assistant("b"), user("c")],
                 [user("a"), user([block(REMINDED % "note")]), assistant("b"), user("c")]),
                ([user("a"), {"role": "system", "content": [block("x")]}, note, user("b")],
                 [user("a"), user([block("b"), block(REMINDED % "x"), block(REMINDED % "note")])])):
            with self.subTest(given=given):
                self.becomes(SONNET, message(*given), {"messages": want})

    def test_empty_text_goes(self) -> None:
        self.becomes(SONNET, message(user([block(""), block("a"), block(" \n")]),
                                     assistant([block("")]), user([result([block("")])])),
                     {"messages": [user([block("a")]), user([result([])])]})

    def test_images_and_documents_by_address_are_refused(self) -> None:
        for source in ({"type": "url", "url": "https://example.com/a"},
                       {"type": "file", "file_id": "file_1"}):
            for kind in ("image", "document"):
                part = {"type": kind, "source": source}
                self.refused(SONNET, message(user([part])), "base64")
                self.refused(SONNET, message(user([result([part])])), "base64")

    def test_thinking_of_others_is_left_out(self) -> None:
        for given in (thinking(signature="a@b"), thinking(signature=""),
                      thinking(signature=None), thinking(signature=5),
                      {"type": "thinking", "thinking": "x"}):
            with self.subTest(given=given):
                self.becomes(SONNET, message(user("a"), assistant([given, block("b")]), user("c")),
                             {"messages": [user("a"), assistant([block("b")]), user("c")]},
                             ["reasoning"])
        placeholder = thinking("Thinking...")  # nothing is lost of it
        self.becomes(SONNET, message(user("a"), assistant([placeholder, block("b")]), user("c")),
                     {"messages": [user("a"), assistant([block("b")]), user("c")]})
        for own in ({"type": "redacted_thinking", "data": "x"}, thinking("")):
            self.unchanged(SONNET, message(user("a"), assistant([own, block("b")]), user("c")))

    def test_server_tools_go_and_their_history_is_told_as_text(self) -> None:
        tool = {"name": "a", "input_schema": SCHEMA}
        search = {"type": "web_search_20250305", "name": "web_search"}
        self.unchanged(SONNET, message(tools=[search]))      # a refusal of it is told
        web = {"type": "web_fetch_20250910", "name": "web_fetch"}
        self.becomes(SONNET, message(tools=[web, tool]),
                     {"tools": [{"name": "a", "input_schema": PLAIN_SCHEMA}]}, ["tools"])
        self.becomes(SONNET, message(tools=[web], tool_choice={"type": "auto"}),
                     {"tools": ABSENT, "tool_choice": ABSENT}, ["tools"])
        self.becomes(SONNET, message(tools=[web], tool_choice={"type": "tool", "name": "x"}),
                     {"tools": ABSENT, "tool_choice": ABSENT}, ["tools", "tool_choice"])
        use = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "q"}}
        found = {"type": "web_search_tool_result", "tool_use_id": "s1", "content": [{"url": "u"}]}
        edit = prepared(cp.MESSAGES, message(user("a"), assistant([use, found]), user("b")), SONNET)
        blocks = edit.body["messages"][1]["content"]
        self.assertEqual([b["type"] for b in blocks], ["text", "text"])
        self.assertIn('"q"', blocks[0]["text"])
        self.assertEqual(sorted(name for name, _ in edit.losses),
                         ["server_tool_use", "web_search_tool_result"])

    def test_refused_tool_fields_go(self) -> None:
        tool = {"name": "a", "input_schema": PLAIN_SCHEMA}
        more = {"eager_input_streaming": True, "defer_loading": True, "input_examples": [],
                "strict": True}
        self.becomes(SONNET, message(tools=[dict(tool, **more)]), {"tools": [tool]})

    def test_cache_marks_are_plain_and_at_most_four(self) -> None:
        mark = {"type": "ephemeral", "ttl": "1h", "scope": "global"}
        plain = {"type": "ephemeral"}
        body = message(
            user([block("a", cache_control=mark), result([block("r", cache_control=mark)])]),
            assistant([dict(thinking(), cache_control=mark), block("b", cache_control=None)]),
            user([block("c", cache_control=mark)]), system=[block("s", cache_control=mark)],
            tools=[{"name": "t", "input_schema": PLAIN_SCHEMA, "cache_control": mark}])
        edit = prepared(cp.MESSAGES, body, SONNET)
        marks = [o["cache_control"] for o in cp.walk_objects(edit.body) if "cache_control" in o]
        self.assertEqual(marks, [dict(plain, ttl="1h")] * 4)
        self.assertNotIn("cache_control", edit.body["tools"][0])
        self.assertNotIn("cache_control", edit.body["messages"][1]["content"][0])
        self.assertEqual([name for name, _ in edit.losses], ["cache_control"])
        self.unchanged(SONNET, message(user([block("a", cache_control=plain)])))

    def test_thinking_fits_the_model(self) -> None:
        on = {"type": "enabled", "budget_tokens": 10000}
        adaptive = {"type": "adaptive"}
        effort = {"output_config": {"effort": "high"}}
        roomy = {"max_tokens": 20000}
        for model, body, want, losses in (
                (SONNET, {"thinking": on, **roomy}, {"thinking": on}, ()),
                (SONNET, {"thinking": adaptive}, {"thinking": adaptive}, ()),
                (OPUS7, {"thinking": on}, {"thinking": adaptive,
                                           "output_config": {"effort": "medium"}}, ()),
                (OPUS7, {"thinking": dict(on, budget_tokens=2000)},
                 {"output_config": {"effort": "low"}}, ()),
                (OPUS7, {"thinking": dict(on, budget_tokens=31999)},
                 {"output_config": {"effort": "high"}}, ()),
                (OPUS7, {"thinking": on, **effort}, effort, ()),
                (HAIKU, {"thinking": on, **roomy}, {"thinking": on}, ()),
                (HAIKU, {"thinking": dict(on, budget_tokens=5), **roomy},
                 {"thinking": dict(on, budget_tokens=1024)}, ()),
                (HAIKU, {"thinking": dict(on, budget_tokens=90000), "max_tokens": 64000},
                 {"thinking": dict(on, budget_tokens=32000)}, ()),
                (HAIKU, {"thinking": dict(on, budget_tokens=9000), "max_tokens": 5000},
                 {"thinking": dict(on, budget_tokens=4999)}, ()),
                (HAIKU, {"thinking": on, "max_tokens": 1024}, {"thinking": ABSENT}, ["thinking"]),
                (HAIKU, {"thinking": adaptive, **roomy, **effort},
                 {"thinking": {"type": "enabled", "budget_tokens": 16384},
                  "output_config": ABSENT}, ["effort"]),
                (HAIKU, {"thinking": adaptive, **roomy},
                 {"thinking": {"type": "enabled", "budget_tokens": 8192}}, ()),
                (GPT, {"thinking": on}, {"thinking": ABSENT}, ["thinking"]),
                (GPT, {"thinking": None}, {"thinking": ABSENT}, ())):
            with self.subTest(model=model.id, body=body):
                self.becomes(model, message(**body), want, losses)

    def test_thinking_budget_stays_below_max_tokens_as_sent(self) -> None:
        on = {"type": "enabled", "budget_tokens": 32000}
        for model in (SONNET, HAIKU):
            for given in ({}, {"max_tokens": None}, {"max_tokens": 64000}, {"max_tokens": 999999},
                          {"max_tokens": 32000}, {"max_tokens": 1025}):
                for stream in (True, False):
                    with self.subTest(model=model.id, given=given, stream=stream):
                        body = dict(message(thinking=on, stream=stream))
                        del body["max_tokens"]
                        sent = prepared(cp.MESSAGES, dict(body, **given), model).body
                        self.assertLess(sent["thinking"]["budget_tokens"], sent["max_tokens"])

    def test_thinking_display_survives_and_foreign_fields_do_not(self) -> None:
        shown = {"type": "enabled", "budget_tokens": 2000, "display": "summarized"}
        for model in (SONNET, OPUS7):
            sent = prepared(cp.MESSAGES, message(max_tokens=9000, thinking=shown), model).body
            self.assertEqual(sent["thinking"].get("display"), "summarized", model.id)
        for given in ({"type": "adaptive"}, {"type": "enabled", "budget_tokens": 2000}):
            sent = prepared(cp.MESSAGES, message(max_tokens=9000, thinking=dict(
                given, budget_tokens_max=5)), SONNET).body
            self.assertNotIn("budget_tokens_max", sent["thinking"])

    def test_effort_is_clamped_to_the_listed(self) -> None:
        for model, wish, want in ((SONNET, "xhigh", "high"), (SONNET, "max", "high"),
                                  (SONNET, "low", "low"), (OPUS7, "max", "high")):
            self.becomes(model, message(output_config={"effort": wish}),
                         {"output_config": {"effort": want}})
        self.becomes(HAIKU, message(output_config={"effort": "high"}),
                     {"output_config": ABSENT}, ["effort"])
        self.becomes(HAIKU, message(output_config={"effort": "high", "format": {"a": 1}}),
                     {"output_config": {"format": {"a": 1}}}, ["effort"])
        self.assertEqual(cp.clamp_effort("medium", ["low", "high"]), "low")
        self.assertEqual([cp.budget_to_effort(n) for n in (1024, 4095, 4096, 16383, 16384, 99999)],
                         ["low", "low", "medium", "medium", "high", "high"])

    def test_sampling_fields_give_way(self) -> None:
        sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 5}
        on = {"thinking": {"type": "adaptive"}}
        gone = dict.fromkeys(sampling, ABSENT)
        self.becomes(SONNET, message(**sampling, **on), gone, list(sampling))
        self.becomes(SONNET, message(temperature=1, **on), {"temperature": 1})
        self.becomes(SONNET, message(temperature=0.5, top_p=0.9),
                     {"temperature": 0.5, "top_p": ABSENT}, ["top_p"])
        self.becomes(SONNET, message(top_p=0.9), {"top_p": 0.9})

    def test_max_tokens_is_filled_and_capped(self) -> None:
        for model, given, want in ((SONNET, {}, 16000), (SONNET, {"stream": True}, 32000),
                                   (SONNET, {"max_tokens": None}, 16000),
                                   (SONNET, {"max_tokens": 64000, "stream": True}, 32000),
                                   (SONNET, {"max_tokens": 5}, 5)):
            body = message()
            del body["max_tokens"]
            self.becomes(model, dict(body, **given), {"max_tokens": want})

    def test_answer_begun_by_the_client_is_asked_to_go_on(self) -> None:
        body = message(user("a"), assistant("Once upon"))
        for model in (SONNET, OPUS7):
            edit = prepared(cp.MESSAGES, body, model)
            self.assertEqual(edit.body["messages"][:2], body["messages"])
            self.assertEqual(edit.body["messages"][2]["role"], "user")
            self.assertEqual([name for name, _ in edit.losses], ["messages"])
        self.unchanged(HAIKU, body)

    def test_count_takes_the_counted_fields_only(self) -> None:
        edit = cp.BodyEdit(message(system="s", tools=[{"name": "a", "input_schema": PLAIN_SCHEMA}],
                               tool_choice={"type": "auto"}, thinking={"type": "adaptive"},
                               stream=True, metadata={}))
        cp.prepare_body(edit, cp.MESSAGES, SONNET)
        cp.MESSAGES.prepare_count(edit)
        self.assertEqual(set(edit.body), {"model", "messages", "system", "tools", "tool_choice"})

    def test_what_cannot_be_read_is_refused_with_its_name(self) -> None:
        for body, param in (({"model": "m"}, "messages"), (message(messages="a"), "messages"),
                            (message(5), "messages[0]"), (message(system=5), "system"),
                            (message(system=["a"]), "system[0]"),
                            (message(tools={"a": 1}), "tools"),
                            (message(tools=["a"]), "tools[0]"),
                            (message(user(["a"])), "messages[0].content")):
            with self.subTest(body=body):
                self.assertEqual(self.refused(SONNET, body).param, param)


RICH: tuple[tuple[Any, Any], ...] = (
    (cp.CHAT, chat({"role": "developer", "content": "s"},
                   user([{"type": "text", "text": "a"},
                         {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}}]),
                   {"role": "assistant", "content": None, "reasoning_content": "x", "tool_calls": [
                       {"id": "c", "type": "function",
                        "function": {"name": "a", "arguments": "{}"}}]},
                   {"role": "tool", "tool_call_id": "c", "content": "ok"},
                   stream=True, stream_options={"include_usage": True}, max_tokens=5, n=1,
                   max_completion_tokens=5, store=True, service_tier="auto", tool_choice="auto",
                   tools=[{"type": "function", "function": {"name": "a", "parameters": SCHEMA}}],
                   parallel_tool_calls=True, reasoning_effort="low", temperature=1)),
    (cp.RESPONSES, response(
        {"role": "user", "content": [{"type": "input_text", "text": "a"},
                                     {"type": "input_image", "image_url": PNG,
                                      "detail": "original"}]},
        {"type": "reasoning", "id": "rs", "encrypted_content": "x", "summary": [{"text": "a"}]},
        {"type": "function_call", "id": "fc", "call_id": "c" * 70, "name": "a", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c" * 70, "output": [
            {"type": "input_image", "image_url": PNG}]},
        {"type": "item_reference", "id": "x"}, {"role": "user", "content": "b"},
        instructions="s", stream=True, store=True, background=False, conversation=None,
        prompt=None, previous_response_id=None, include=["x"], max_output_tokens=5,
        tools=[{"type": "function", "name": "a", "parameters": SCHEMA},
               {"type": "image_generation"}], tool_choice="auto", reasoning={"effort": "low"},
        text={"format": {"type": "text"}}, service_tier="auto")),
    (cp.MESSAGES, message(
        user([block("a", cache_control={"type": "ephemeral", "ttl": "1h"}),
              {"type": "image", "source": SOURCE}]),
        assistant([thinking(), block("b"), {"type": "tool_use", "id": "t1", "name": "a",
                                            "input": {"x": 1}},
                   {"type": "server_tool_use", "id": "s", "name": "w", "input": {}}]),
        user([result([block("r"), {"type": "image", "source": SOURCE}]),
              block("<system-reminder>x</system-reminder>")]),
        {"role": "system", "content": [block("s")]}, user("c"), assistant("d"),
        system=[block("s", cache_control={"type": "ephemeral"})], stream=True, temperature=0.5,
        tools=[{"name": "a", "input_schema": SCHEMA, "strict": True, "type": "custom"},
               {"type": "web_search_20250305", "name": "web_search"}],
        tool_choice={"type": "tool", "name": "a"}, top_p=0.5, top_k=3, metadata={"user_id": "u"},
        thinking={"type": "enabled", "budget_tokens": 2000, "display": "summarized"},
        output_config={"effort": "max"}, context_management={"edits": []}, speed="fast")),
)
WILD: tuple[Any, ...] = (None, True, False, 0, -1, 10 ** 30, 1.5, "", "x", [], [None], [[{}]],
                         ["x"], {}, {"type": "text"}, {"a": {"b": [1, {"type": []}]}})


class WrongTypes(unittest.TestCase):
    """Every value of a rich request replaced by every kind of wrong one."""

    def test_nothing_but_a_bad_request_is_ever_raised(self) -> None:
        chance = random.Random(2)
        models = {"chat": (GPT, SONNET, MINI), "responses": (CODEX, GPT),
                  "messages": (SONNET, HAIKU, OPUS7, GPT)}
        for dialect, rich in RICH:
            for path in places(rich):
                for wild in WILD if SLOW else chance.sample(WILD, 6):
                    body = with_value(rich, path, copy.deepcopy(wild))
                    self.survives(dialect, body, chance.choice(models[dialect.name]),
                                  "%s = %r" % (path, wild))

    def survives(self, dialect: Any, body: Any, model: Any, what: str) -> None:
        try:
            self.assertIn(dialect.initiator(body), ("user", "agent"))
            self.assertIsInstance(dialect.has_images(body), bool)
            dialect.stream("a", body)
            self.assertGreater(cp.estimate_tokens(body), 0)
            edit = cp.BodyEdit(body)
            try:
                dialect.prepare(edit, model)
                cp.dumps(edit.body)
            except cp.BadRequest as error:
                self.assertIsInstance(cp.dumps(dialect.error_body(error, "r")), bytes)
        except Exception as error:  # noqa: BLE001
            self.fail("%s %s %s: %r" % (dialect.name, model.id, what, error))

    def test_catalogue_entries_are_read_leniently(self) -> None:
        for entry in default_models():
            for path in places(entry):
                for wild in (None, 5, "x", [1], {"a": 1}):
                    odd = with_value(entry, path, wild)
                    model = cp.Model.from_entry(odd)
                    self.assertIsInstance((model.efforts, model.version, model.is_listed,
                                           model.output_cap(True), model.output_cap(False)), tuple)

    def test_key_order_is_kept(self) -> None:
        body = {"stream": True, "store": True, "messages": [user("a")], "temperature": 1,
                "max_tokens": 5, "model": "m"}
        edit = prepared(cp.CHAT, body, SONNET)
        order = [key for key in edit.body if key in body]
        self.assertEqual(order, [key for key in body if key in edit.body])

    def test_edit_says_changed_only_when_it_is(self) -> None:
        edit = cp.BodyEdit({"a": 1, "l": [1, 2]})
        edit.set(edit.body, "a", 1)
        edit.drop(edit.body, "b", "reason")
        edit.replace(edit.body, "l", list(edit.body["l"]))
        self.assertEqual((edit.changed, edit.losses), (False, []))
        edit.set(edit.body, "a", True)
        self.assertTrue(edit.changed)
        edit.lose("x", "y")
        edit.lose("x", "y")
        self.assertEqual(edit.losses, [("x", "y")])


REMINDER = "<system-reminder>\nTodo list is empty.\n</system-reminder>\n"
COMPACTION = ("CRITICAL: Respond with TEXT ONLY. Do NOT call any tools.\n\nYour task is to create "
              "a detailed summary of the conversation so far ...\n7. Pending Tasks:\n")
CONTINUED = ("This session is being continued from a previous conversation that ran out of "
             "context. The summary follows.")
GO_ON = "Continue if you have next steps, or stop and ask for clarification"


class Initiators(unittest.TestCase):

    def check(self, dialect: Any, cases: tuple[tuple[Any, str], ...]) -> None:
        for body, want in cases:
            with self.subTest(dialect=dialect.name, body=body):
                self.assertEqual(dialect.initiator(body), want)

    def test_chat_goes_by_the_last_message(self) -> None:
        tool = {"role": "tool", "tool_call_id": "c", "content": "x"}
        self.check(cp.CHAT, (
            (chat(user("a")), "user"), (chat(user("a"), assistant("b"), user("c")), "user"),
            (chat(user("a"), assistant("b")), "agent"), (chat(user("a"), tool), "agent"),
            (chat({"role": "system", "content": "s"}), "agent"),
            (chat(user(COMPACTION)), "agent"), (chat(user([{"type": "text", "text": CONTINUED}])),
                                                "agent")))

    def test_responses_goes_by_the_last_item(self) -> None:
        self.check(cp.RESPONSES, (
            (response(), "user"), (response(user("a")), "user"),
            (response({"role": "developer", "content": "a"}), "user"),
            (response({"role": "system", "content": "a"}), "user"),
            (response(user("a"), assistant("b")), "agent"),
            (response(user("a"), {"type": "function_call_output", "call_id": "c"}), "agent"),
            (response(user("a"), {"type": "reasoning"}), "agent"),
            (response(user([{"type": "input_text", "text": COMPACTION}])), "agent"),
            (response(user(GO_ON)), "agent")))

    def test_messages_ignores_tool_results_and_reminders(self) -> None:
        self.check(cp.MESSAGES, (
            (message(user("a")), "user"), (message(user("a"), assistant("b")), "agent"),
            (message(user([result()])), "agent"), (message(user([result(), result()])), "agent"),
            (message(user([result(), block("and now?")])), "user"),
            (message(user([result(), block(REMINDER)])), "agent"),
            (message(user([result(), block(REMINDER + REMINDER)])), "agent"),
            (message(user([result(), block(REMINDER + "go on")])), "user"),
            (message(user([block(REMINDER), block("hello")])), "user"),
            (message(user([result(), {"type": "image", "source": SOURCE}])), "user")))

    def test_machine_turns_are_the_agents(self) -> None:
        summarizer = "You are a helpful AI assistant tasked with summarizing conversations."
        anchored = "You are an anchored context summarization assistant for coding sessions."
        too_big = "The previous request exceeded the provider's size limit due to images."
        for text in (COMPACTION, COMPACTION.replace("Pending Tasks:", "Current Work:"), CONTINUED,
                     GO_ON, "\n" + GO_ON + "\n", too_big):
            for dialect, body in ((cp.CHAT, chat(user(text))), (cp.RESPONSES, response(input=text)),
                                  (cp.RESPONSES, response(user(text))),
                                  (cp.MESSAGES, message(user([block(REMINDER), block(text)])))):
                if body["model"] and isinstance(body.get("input"), str):
                    continue                # a plain string is a human turn by the rule
                with self.subTest(dialect=dialect.name, text=text):
                    self.assertEqual(dialect.initiator(body), "agent")
        for system in (summarizer, anchored):
            self.assertEqual(cp.CHAT.initiator(chat({"role": "system", "content": system},
                                                    user("a"))), "agent")
            self.assertEqual(cp.RESPONSES.initiator(response(user("a"), instructions=system)),
                             "agent")
            self.assertEqual(cp.MESSAGES.initiator(message(system=[block(system)])), "agent")

    def test_human_turns_that_speak_of_it_stay_human(self) -> None:
        for text in ("Please explain: " + CONTINUED, GO_ON + " please", "Pending Tasks: none",
                     "What does <system-reminder> mean?", "CRITICAL: Respond with TEXT ONLY."):
            for dialect, body in ((cp.CHAT, chat(user(text))), (cp.RESPONSES, response(user(text))),
                                  (cp.MESSAGES, message(user(text))),
                                  (cp.MESSAGES, message(user([block(text)])))):
                with self.subTest(dialect=dialect.name, text=text):
                    self.assertEqual(dialect.initiator(body), "user")

    def test_one_prompt_with_eight_tool_rounds_is_one_user_call(self) -> None:
        rounds: dict[str, tuple[Any, list[Any]]] = {
            "chat": (chat, [{"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]},
                            {"role": "tool", "tool_call_id": "c", "content": "ok"}]),
            "responses": (response, [{"type": "function_call", "call_id": "c", "name": "a"},
                                     {"type": "function_call_output", "call_id": "c"}]),
            "messages": (message, [assistant([{"type": "tool_use", "id": "t1", "name": "a"}]),
                                   user([result(), block(REMINDER)])])}
        for name, (make, more) in rounds.items():
            history = [user("Fix the bug")]
            said = []
            for _ in range(9):
                said.append(cp.DIALECTS[name].initiator(make(*history)))
                history += more
            self.assertEqual(said, ["user"] + ["agent"] * 8, name)


class Vision(unittest.TestCase):

    def test_images_are_found_also_inside_tool_results(self) -> None:
        chat_image = {"type": "image_url", "image_url": {"url": PNG}}
        image = {"type": "input_image", "image_url": PNG}
        native = {"type": "image", "source": SOURCE}
        for dialect, body, want in (
                (cp.CHAT, chat(user("image_url")), False),
                (cp.CHAT, chat(user([chat_image]), assistant("a"), user("b")), True),
                (cp.CHAT, chat({"role": "tool", "content": [chat_image]}), True),
                (cp.RESPONSES, response(), False),
                (cp.RESPONSES, response(user([{"type": "input_text", "text": "a"}])), False),
                (cp.RESPONSES, response(user([image]), user("a")), True),
                (cp.RESPONSES, response({"type": "function_call_output", "output": [image]}), True),
                (cp.MESSAGES, message(user([block("a")])), False),
                (cp.MESSAGES, message(user([native])), True),
                (cp.MESSAGES, message(user([result([block("a"), native])])), True),
                (cp.MESSAGES, message(user([result("image")])), False)):
            with self.subTest(dialect=dialect.name, body=body):
                self.assertIs(dialect.has_images(body), want)


class Betas(unittest.TestCase):

    def test_known_betas_pass_and_others_go(self) -> None:
        for given, want in (
                ("", ""), ("claude-code-20250219", ""),
                ("interleaved-thinking-2025-05-14", "interleaved-thinking-2025-05-14"),
                ("claude-code-20250219, interleaved-thinking-2025-05-14,context-1m-2025-08-07,"
                 " advanced-tool-use-2025-11-20,,",
                 "interleaved-thinking-2025-05-14,advanced-tool-use-2025-11-20"),
                ("context-management-2025-06-27", ""), ("x-interleaved-thinking-1", "")):
            self.assertEqual(cp.filter_betas(given), want)


if __name__ == "__main__":
    unittest.main()
