"""What known clients put on the wire, by plain HTTP, one test for each habit that trips proxies.

Versions whose requests were seen: Claude Code 2.1, Codex 0.169, opencode 1.18, the openai and
anthropic SDKs for Python and Node, AI SDK 6, litellm, aider.  The official Python SDKs themselves
run in test_sdk.py.
"""
from __future__ import annotations

import base64
import gzip
import json
import struct
import sys
import threading
import unittest
from typing import Any

from support import Proxy, ProxyCase, Reply, chat, cp, message, response, wait_until
from fake_upstream import CHAT, COUNT_TOKENS, MESSAGES, RESPONSES, Answer
from socket_client import Socket
from wire import chunk, read_body, sse, user, whole_of

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
FUNCTION = {"type": "function", "name": "get_weather", "parameters": SCHEMA}
CODEX, SONNET = "gpt-5.3-codex", "claude-sonnet-4.6"
#: a model of every family, and each way to be reached
FAMILIES = ("gpt-4.1", CODEX, "gpt-5-mini", SONNET, "claude-haiku-4.5", "claude-opus-4.7",
            "gemini-3.1-pro-preview", "grok-code-fast-1")


def finished(reply: Reply) -> Any:
    """The response in the last event of a /responses stream."""
    assert reply.status == 200, reply
    assert reply.events[-1]["type"] == "response.completed", reply
    return reply.events[-1]["response"]


class ClientCase(ProxyCase):
    def losses(self, reply: Reply) -> set[str]:
        return set(filter(None, reply.headers.get("x-copilot-proxy-lossy", "").split(", ")))


class ClaudeCode(ClientCase):
    PATH = "/v1/messages?beta=true"
    HEADERS = {
        "authorization": "Bearer dummy", "anthropic-version": "2023-06-01", "x-app": "cli",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,"
                          "context-management-2025-06-27,prompt-caching-scope-2026-01-05,"
                          "effort-2025-11-24",
        "user-agent": "claude-cli/2.1.197 (external, cli)", "x-stainless-lang": "js",
        "x-stainless-retry-count": "0", "accept-encoding": "gzip, deflate, br, zstd",
        "anthropic-dangerous-direct-browser-access": "true"}
    NAMES = ("Bash", "BodyEdit", "Read", "Task", "Glob", "Grep", "Write", "TodoWrite", "WebFetch")

    def body(self, **more: Any) -> dict[str, Any]:
        """The first request of a session: 115 KB, most of it tools, for a one-word prompt."""
        mark = {"type": "ephemeral", "scope": "global", "ttl": "1h"}
        tools: list[Any] = [{
            "name": name, "description": "Tool %s. " % name + "Use it with care. " * 600,
            "input_schema": dict(SCHEMA, additionalProperties=False, **{
                "$schema": "https://json-schema.org/draft/2020-12/schema"}),
            "eager_input_streaming": True} for name in self.NAMES]
        body: dict[str, Any] = {
            "model": "claude-opus-4-6[1m]", "max_tokens": 32000, "stream": True,
            "system": [
                {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=00abc;"},
                {"type": "text", "text": "You are a CLI agent.", "cache_control": mark},
                {"type": "text", "text": "# Environment " + "y" * 14000, "cache_control": mark}],
            "messages": [
                user([{"type": "text", "text": "<system-reminder>\ndate\n</system-reminder>"},
                      {"type": "text", "text": "use a tool please", "cache_control": mark}]),
                {"role": "system", "content": "Plan mode is on: use a tool."}],
            "tools": tools + [{"type": "web_search_20250305", "name": "web_search",
                               "max_uses": 8}],
            "metadata": {"user_id": json.dumps({"device_id": "d", "account_uuid": "",
                                                "session_id": "s"})},
            "thinking": {"type": "adaptive"}, "output_config": {"effort": "high"},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}}
        return dict(body, **more)

    def ask(self, body: dict[str, Any], path: str = PATH) -> Reply:
        reply = self.proxy.request("POST", path, body, self.HEADERS)
        self.assertEqual(reply.status, 200, reply)
        return reply

    def said(self, reply: Reply, model: str) -> dict[str, Any]:
        self.assertEqual(reply.events[0]["message"]["model"], model)
        return read_body("messages", whole_of("messages", reply.body))

    def test_first_request(self) -> None:
        self.assertEqual(self.proxy.request("HEAD", "/").status, 200)
        body = self.body()
        self.assertGreater(len(json.dumps(body)), 110_000)
        answer = self.said(self.ask(body), "claude-opus-4-6[1m]")
        self.assertEqual((answer["stop"], answer["calls"][0][1]), ("tool_use", "Bash"))
        sent = self.fake.last(MESSAGES)
        self.assertEqual(sent.json["model"], "claude-opus-4.6")
        self.assertEqual(sent.json["thinking"], {"type": "adaptive"})
        self.assertEqual(sent.json["output_config"], {"effort": "high"})
        self.assertEqual(sent.headers["anthropic-beta"], "interleaved-thinking-2025-05-14")
        self.assertEqual(sent.headers["x-initiator"], "user")
        self.assertEqual(len(sent.json["system"]), 2)
        self.assertNotIn(b"billing-header", sent.body)
        self.assertNotIn("context_management", sent.json)
        self.assertIn(b"Plan mode is on", sent.body)
        self.assertEqual([tool["name"] for tool in sent.json["tools"]],
                         [*self.NAMES, "web_search"])

    def test_second_turn(self) -> None:
        """A tool's result with a reminder beside it, and a system turn in the middle."""
        first = self.said(self.ask(self.body()), "claude-opus-4-6[1m]")["raw"]["content"]
        self.assertEqual([block["type"] for block in first], ["thinking", "text", "tool_use"])
        result = {"type": "tool_result", "tool_use_id": first[2]["id"], "is_error": False,
                  "content": [{"type": "text", "text": "done"}],
                  "cache_control": {"type": "ephemeral", "scope": "global"}}
        reminder = {"type": "text", "text": "<system-reminder>todo</system-reminder>"}
        self.ask(self.body(messages=self.body()["messages"] + [
            {"role": "assistant", "content": first}, user([result, reminder]),
            {"role": "system", "content": [{"type": "text", "text": "Plan mode is off."}]}]))
        sent = self.fake.last(MESSAGES)
        self.assertEqual(sent.headers["x-initiator"], "agent", "no human wrote that system turn")
        self.assertIn(b"Plan mode is off.", sent.body)
        self.assertIn(first[0]["signature"].encode(), sent.body)
        self.assertLessEqual(sent.body.count(b'"cache_control"'), 4)

    def test_names_newer_than_the_list(self) -> None:
        for asked, used in (("claude-opus-4-8", "claude-opus-4.7"),
                            ("claude-sonnet-5", "claude-sonnet-4.6"),
                            ("claude-haiku-5-20261001", "claude-haiku-4.5"),
                            ("sonnet", "claude-sonnet-4.6"), ("opus", "claude-opus-4.7"),
                            ("gpt-5.9-codex", CODEX)):
            with self.subTest(asked=asked):
                reply = self.ask(self.body(model=asked))
                named = asked if asked in ("sonnet", "opus") else used    # a class means its newest
                self.assertEqual(reply.events[0]["message"]["model"], named)
                self.assertEqual(self.fake.last().json["model"], used)

    def test_other_families_get_their_own_effort(self) -> None:
        for model, path, field, wanted in (
                (CODEX, RESPONSES, "reasoning", "high"), ("gpt-5-mini", RESPONSES, "reasoning",
                                                          "high"),
                ("gemini-3.1-pro-preview", CHAT, "reasoning_effort", "high"),
                ("gpt-4.1", CHAT, "reasoning_effort", None),
                ("grok-code-fast-1", CHAT, "reasoning_effort", None)):
            with self.subTest(model=model):
                tools = [dict(tool, input_schema=SCHEMA) for tool in self.body()["tools"][:2]]
                reply = self.ask(self.body(model=model, tools=tools))
                answer = self.said(reply, model)
                self.assertEqual(answer["calls"][0][1], "Bash")
                sent = self.fake.last(path).json
                effort = sent.get(field)
                self.assertEqual(effort["effort"] if field == "reasoning" else effort, wanted)
                self.assertNotIn("thinking", sent)
                self.assertEqual("effort" in self.losses(reply), wanted is None)
                self.assertEqual(answer["reasoning"],
                                 "The user wants an echo." if wanted else "")

    def test_around_it(self) -> None:
        probe = {"model": "claude-haiku-4-5-20251001", "max_tokens": 1, "messages": [user("quota")],
                 "metadata": {"user_id": "user_0a_account_1b_session_2c"}}
        self.assertEqual(self.ask(probe).json["model"], "claude-haiku-4-5-20251001")
        counting = self.body()
        for key in ("max_tokens", "stream"):
            del counting[key]
        counted = self.ask(counting, "/v1/messages/count_tokens?beta=true").json["input_tokens"]
        self.assertGreater(counted, 0)
        self.assertEqual(self.fake.count(COUNT_TOKENS), 1)
        self.ask({"events": []}, "/api/event_logging/batch")
        listed = self.proxy.request("GET", "/v1/models?limit=1000", None, self.HEADERS).json
        self.assertEqual((listed["has_more"], listed["first_id"], listed["last_id"]), (
            False, listed["data"][0]["id"], listed["data"][-1]["id"]))
        for entry in listed["data"]:
            self.assertEqual(entry["type"], "model")
            self.assertTrue(entry["display_name"] and entry["created_at"])

    def test_roots_and_credentials(self) -> None:
        for path in ("/v1/messages", "/messages", "//messages", "/v1/v1/messages/"):
            for name, value in (("x-api-key", "any"), ("authorization", "Bearer dummy")):
                reply = self.proxy.request("POST", path, message("hi"), {name: value})
                self.assertEqual((path, reply.status), (path, 200))
        self.assertNotIn("dummy", self.fake.last(MESSAGES).headers["authorization"])

    def test_the_local_count_is_that_of_the_model_behind_the_name(self) -> None:
        self.fake.count_tokens_fails = True
        body = message("word " * 400)
        with Proxy(self.fake, model_alias=("best=" + SONNET, "claude-cheap=gpt-4.1")) as proxy:
            counts = {name: proxy.post("/v1/messages/count_tokens", dict(body, model=name)).json[
                "input_tokens"] for name in (SONNET, "best", "sonnet", "gpt-4.1", "claude-cheap")}
        self.assertEqual(len({counts[name] for name in (SONNET, "best", "sonnet")}), 1, counts)
        self.assertEqual(counts["gpt-4.1"], counts["claude-cheap"])
        self.assertAlmostEqual(counts["best"], counts["gpt-4.1"] * 1.25, delta=5)
        self.assertEqual(self.fake.count(COUNT_TOKENS) > 0, True)


class AnthropicSdk(ClientCase):
    def test_thread_is_refused_so_that_the_full_history_comes(self) -> None:
        for model in (SONNET, CODEX, "gpt-4.1"):
            for stream in (False, True):
                reply = self.proxy.post("/v1/messages", message(
                    "hi", model, thread={"type": "create"}, stream=stream))
                self.assertEqual(reply.status, 400)
                self.assertEqual((reply.json["type"], reply.json["error"]["details"]),
                                 ("error", {"error_code": "thread_unsupported_request"}))
        self.assertEqual([r for r in self.fake.requests if r.path in (CHAT, RESPONSES, MESSAGES)],
                         [])


class OpenAISdk(ClientCase):
    def test_every_chunk_is_whole_and_of_one_answer(self) -> None:
        for model in FAMILIES:
            for prompt in ("hi", "use parallel tool calls"):
                with self.subTest(model=model, prompt=prompt):
                    reply = self.proxy.stream("/v1/chat/completions",
                                              chat(prompt, model, tools=[TOOL]))
                    self.assertTrue(reply.is_done)
                    self.check_chunks(reply, model)

    def check_chunks(self, reply: Reply, model: str) -> None:
        """What `.stream()` of the SDK asserts, and what it strings together."""
        self.assertEqual({(e["object"], e["model"]) for e in reply.events},
                         {("chat.completion.chunk", model)})
        self.assertEqual(len({e["id"] for e in reply.events}), 1)
        choices = [choice for event in reply.events for choice in event["choices"]]
        self.assertEqual({choice["index"] for choice in choices}, {0})
        self.assertEqual([c["finish_reason"] for c in choices[:-1] if c["finish_reason"]], [])
        self.assertIn(choices[-1]["finish_reason"], ("stop", "tool_calls"))
        roles = [choice["delta"]["role"] for choice in choices if "role" in choice["delta"]]
        self.assertEqual(roles, ["assistant"])
        calls = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
        for index in {call["index"] for call in calls}:
            mine = [call for call in calls if call["index"] == index]
            self.assertEqual(sum("id" in call for call in mine), 1)
            self.assertEqual(sum("name" in call["function"] for call in mine), 1)

    def test_fragments_repeat_neither_role_nor_id_nor_name(self) -> None:
        def call(arguments: str, name: str | None = "get_weather") -> dict[str, Any]:
            return {"role": "assistant", "tool_calls": [{
                "index": 1, "id": "a",
                "function": dict({"arguments": arguments}, **({"name": name} if name else {}))}]}

        for first in ("get_weather", "", None):
            self.fake.script(CHAT, Answer(chunks=[sse(
                chunk({"role": "assistant", "content": ""}), chunk(call("", first)),
                chunk(call('{"city"')), chunk(call(':"Paris"}')), chunk({"role": "assistant"}),
                chunk({"role": "assistant", "content": ""}, "tool_calls"), "[DONE]")]))
            reply = self.proxy.stream("/v1/chat/completions", chat("a", tools=[TOOL]))
            self.check_names(reply)

    def check_names(self, reply: Reply) -> None:
        deltas = [choice["delta"] for event in reply.events for choice in event["choices"]]
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        self.assertEqual("".join(call.get("id", "") for call in calls), "a")
        self.assertEqual(calls[0]["type"], "function")
        self.assertEqual("".join(call["function"].get("name") or "" for call in calls),
                         "get_weather")
        self.assertEqual("".join(call["function"]["arguments"] for call in calls),
                         '{"city":"Paris"}')
        self.assertEqual([delta["role"] for delta in deltas if "role" in delta], ["assistant"])

    def test_a_response_keeps_one_identity(self) -> None:
        for model in FAMILIES:
            with self.subTest(model=model):
                reply = self.proxy.stream("/v1/responses", response("hi", model))
                ids = {event["response"]["id"] for event in reply.events if "response" in event}
                self.assertEqual(len(ids), 1)
                self.assertTrue(ids.pop().startswith("resp_"))
                self.assertEqual(finished(reply)["model"], model)

    def test_base64_embeddings_are_made_here(self) -> None:
        body = {"model": "text-embedding-3-small", "input": ["a", "b"]}
        plain = self.proxy.post("/v1/embeddings", body).json["data"]
        packed = self.proxy.post("/v1/embeddings", dict(body, encoding_format="base64")).json
        for one, other in zip(plain, packed["data"]):
            data = base64.b64decode(other["embedding"])
            numbers = struct.unpack("<%df" % (len(data) // 4), data)
            self.assertEqual(len(numbers), len(one["embedding"]))
            self.assertAlmostEqual(numbers[0], one["embedding"][0], places=6)

    def test_developer_role(self) -> None:
        for model in FAMILIES:
            body = chat("hi", model)
            body["messages"].insert(0, {"role": "developer", "content": "Be kind."})
            self.assertEqual(self.proxy.post("/v1/chat/completions", body).status, 200, model)
            self.assertIn("Be kind.", json.dumps(self.fake.last().json))


class ChatClients(ClientCase):
    """pydantic-ai, litellm, langchain, AI SDK, aider, Cline, Open WebUI, Cursor."""

    def test_whole_claude_answers_have_index_and_object(self) -> None:
        for model in (SONNET, "claude-opus-4.7"):
            answer = self.proxy.post("/v1/chat/completions", chat("hi", model)).json
            self.assertEqual(answer["object"], "chat.completion")
            self.assertTrue(answer["id"])
            self.assertIsInstance(answer["created"], int)
            self.assertEqual([choice["index"] for choice in answer["choices"]], [0])
            self.assertEqual(answer["choices"][0]["finish_reason"], "stop")

    def test_choices_are_merged(self) -> None:
        """The upstream gives Claude's text and each of its calls as a choice of its own."""
        self.assertIn("split_choices", self.fake.quirks)
        for stream in (False, True):
            body = chat("use parallel tool calls", SONNET, tools=[TOOL], stream=stream)
            reply = self.proxy.post("/v1/chat/completions", body)
            if stream:
                answer = whole_of("chat", reply.body.replace(SONNET.encode(), b"asked"))
                answer["usage"] = {"prompt_tokens": 0, "completion_tokens": 0}
            else:
                answer = reply.json
            found = read_body("chat", answer)
            self.assertEqual(found["text"], "Let me look.")
            self.assertEqual(found["stop"], "tool_calls")
            self.assertEqual([json.loads(call[2]) for call in found["calls"]],
                             [{"city": "Paris"}] * 2)

    def test_reasoning_is_found_as_reasoning_content(self) -> None:
        for model in (SONNET, CODEX, "gpt-5-mini", "gemini-3.1-pro-preview", "claude-opus-4.7"):
            for stream in (False, True):
                with self.subTest(model=model, stream=stream):
                    more = {"reasoning_effort": "high"} if model != SONNET else {}
                    reply = self.proxy.post("/v1/chat/completions",
                                            chat("hi", model, stream=stream, **more))
                    self.assertEqual(reply.status, 200, reply)
                    spots = [choice.get("message") or choice["delta"] for event in (
                        reply.events if stream else [reply.json]) for choice in event["choices"]]
                    self.assertEqual("".join(s.get("reasoning_content") or "" for s in spots),
                                     "The user wants an echo.")

    def test_the_prefix_of_a_provider(self) -> None:
        for path, asked, body in (
                ("/v1/responses", "openai/" + CODEX, response("hi")),
                ("/v1/chat/completions", "openai/gpt-4.1", chat("hi")),
                ("/v1/chat/completions", "anthropic/claude-sonnet-4-6", chat("hi")),
                ("/v1/messages", "anthropic/" + SONNET, message("hi"))):
            reply = self.proxy.post(path, dict(body, model=asked))
            self.assertEqual((reply.status, reply.json["model"]), (200, asked))

    def test_no_limit_no_tools_no_content(self) -> None:
        tool_turn = {"role": "assistant", "content": None, "tool_calls": [{
            "id": "call_1", "type": "function",
            "function": {"name": "get_weather", "arguments": "{}"}}]}
        for model in FAMILIES:
            for limit in (-1, None):
                with self.subTest(model=model, limit=limit):
                    body = chat("hi", model, max_tokens=limit, tools=[], stop=None, user=None,
                                stream_options=None, temperature=None)
                    reply = self.proxy.post("/v1/chat/completions", body)
                    self.assertEqual(reply.status, 200, reply)
                    self.assertNotIn("tools", self.fake.last().json)
                    body = chat("hi", model, max_tokens=limit, tools=[TOOL])
                    body["messages"] += [tool_turn, {"role": "tool", "tool_call_id": "call_1",
                                                     "content": "sun"}]
                    reply = self.proxy.post("/v1/chat/completions", body)
                    self.assertEqual(reply.status, 200, reply)
                    self.assertIn("tool result: sun", reply.body.decode())

    def test_a_body_of_responses_on_the_chat_route(self) -> None:
        """Cursor sends `input` and flat tools there and reads a chat answer."""
        for model in (SONNET, CODEX, "gpt-4.1"):
            for stream in (False, True):
                with self.subTest(model=model, stream=stream):
                    body = {"model": model, "input": [
                        {"role": "system", "content": "Be kind."},
                        user([{"type": "input_text", "text": "use the tool"}])],
                        "tools": [FUNCTION], "stream": stream}
                    reply = self.proxy.post("/v1/chat/completions", body)
                    self.assertEqual(reply.status, 200, reply)
                    self.assertIn("Be kind.", json.dumps(self.fake.last().json))
                    if stream:
                        self.assertTrue(reply.is_done)
                        parts = [choice["delta"] for event in reply.events
                                 for choice in event["choices"]]
                    else:
                        parts = [reply.json["choices"][0]["message"]]
                    names = [call["function"].get("name") for part in parts
                             for call in part.get("tool_calls") or ()]
                    self.assertEqual(names[0], "get_weather")

    def test_titles_and_tags_at_once(self) -> None:
        """Open WebUI asks for them side by side behind each answer."""
        replies: list[Reply] = []
        threads = [threading.Thread(target=lambda text=text: replies.append(self.proxy.post(
            "/v1/chat/completions", chat(text)))) for text in ("title", "tags", "follow-ups")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        self.assertEqual({reply.json["choices"][0]["message"]["content"] for reply in replies},
                         {"Echo: title", "Echo: tags", "Echo: follow-ups"})

    def test_gemini_cli_is_answered_in_its_dialect(self) -> None:
        path = "/v1beta/models/gemini-3.1-pro-preview:%s?alt=sse"
        said = [{"parts": [{"text": "hi"}]}]
        for method, contents, status in (("streamGenerateContent", said, 200),
                                         ("streamGenerateContent", [], 400), ("predict", [], 404)):
            reply = self.proxy.request("POST", path % method, {"contents": contents},
                                       {"x-goog-api-key": "any"})
            self.assertEqual(reply.status, status, reply)
            if status != 200:
                self.assertEqual(reply.json["error"]["code"], status)


class ResponsesClients(ClientCase):
    """AI SDK and agent frameworks: they leave `store` on and name earlier answers by id."""

    def talk(self, model: str, given: Any, **more: Any) -> dict[str, Any]:
        reply = self.proxy.post("/v1/responses", response(given, model, **more))
        self.assertEqual(reply.status, 200, reply)
        answer: dict[str, Any] = reply.json
        return answer

    def test_earlier_items_by_reference(self) -> None:
        for model in (CODEX, "gpt-4.1", SONNET):
            with self.subTest(model=model):
                one = self.talk(model, [user("use the tool")], tools=[FUNCTION])
                kinds = [item["type"] for item in one["output"]]
                call = one["output"][kinds.index("function_call")]
                two = self.talk(model, [user("use the tool")] + [
                    {"type": "item_reference", "id": item["id"]} for item in one["output"]] + [
                    {"type": "function_call_output", "call_id": call["call_id"],
                     "output": "sun"}], tools=[FUNCTION])
                self.assertIn("tool result: sun", json.dumps(two["output"]))
                three = self.talk(model, "and now?", previous_response_id=two["id"])
                sent = json.dumps(self.fake.last().json)
                for word in ("use the tool", "get_weather", "sun", "and now?"):
                    self.assertIn(word, sent)
                self.assertEqual(three["status"], "completed")

    def test_input_items_page_by_page(self) -> None:
        one = self.talk(CODEX, [user("%02d" % at) for at in range(45)])
        path = "/v1/responses/%s/input_items" % one["id"]

        def texts(query: str) -> tuple[list[str], dict[str, Any]]:
            reply = self.proxy.get(path + query)
            self.assertEqual((reply.status, reply.json["object"]), (200, "list"), reply)
            return [item["content"] for item in reply.json["data"]], reply.json

        newest = ["%02d" % at for at in range(44, -1, -1)]
        self.assertEqual(texts("")[0], newest[:20])
        self.assertEqual(texts("?limit=100&order=asc")[0], newest[::-1])
        found: list[str] = []
        query = "?limit=20"
        for has_more in (True, True, False):
            page, answer = texts(query)
            found += page
            self.assertIs(answer["has_more"], has_more)
            self.assertEqual((answer["first_id"], answer["last_id"]),
                             (answer["data"][0]["id"], answer["data"][-1]["id"]))
            query = "?limit=20&after=" + answer["last_id"]
        self.assertEqual(found, newest)
        self.assertEqual(texts(query), ([], {"object": "list", "data": [], "has_more": False,
                                             "first_id": None, "last_id": None}))
        for wrong in ("limit=0", "limit=101", "limit=x", "limit=-1", "limit=%C2%B2",
                      "order=up", "after=item_nobody"):
            reply = self.proxy.get(path + "?" + wrong)
            self.assertEqual(reply.status, 400, wrong)
            self.assertIn(wrong.partition("=")[0], reply.json["error"]["message"])

    def test_an_answer_is_its_own_accounts_and_keys(self) -> None:
        one = self.talk(CODEX, "mine")
        path = "/v1/responses/" + one["id"]
        self.assertEqual(self.proxy.get(path).status, 200)
        self.assertEqual(self.proxy.get(path, authorization="Bearer other").status, 404)
        self.assertEqual(self.proxy.get(path, **{"x-api-key": "other"}).status, 404)
        reply = self.proxy.request("POST", "/v1/responses", response(
            "a", previous_response_id=one["id"]), {"authorization": "Bearer other"})
        self.assertEqual(reply.json["error"]["code"], "previous_response_not_found")
        owners = {owner for owner, _ in self.proxy.app.store._responses}
        self.assertEqual([len(owner) for owner in owners], [32])
        self.assertNotIn("ghu_fake", repr(self.proxy.app.store._responses.keys()))
        self.assertEqual(self.proxy.request("DELETE", path).json["deleted"], True)
        self.assertEqual(self.proxy.get(path).status, 404)


class Codex(ClientCase):
    HEADERS = {
        "authorization": "Bearer dummy", "user-agent": "codex_exec/0.169.0 (Debian; x86_64)",
        "originator": "codex_exec", "session_id": "0199-aa", "conversation_id": "0199-aa",
        "accept": "text/event-stream", "x-codex-turn-metadata": "{}", "version": "0.169.0",
        "openai-beta": "responses=experimental"}
    START: list[Any] = [
        {"type": "message", "role": "developer", "content": [
            {"type": "input_text", "text": "<permissions>read only</permissions>"}]},
        {"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": "<environment_context/>"}]},
        {"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": "use the tool"}],
         "internal_chat_message_metadata_passthrough": {"turn_id": "t"}}]
    PATCH = {"type": "custom", "name": "apply_patch", "description": "Edit files.",
             "format": {"type": "grammar", "syntax": "lark", "definition": "start: patch"}}
    FILES = {"type": "namespace", "name": "mcp__files", "description": "Files.", "tools": [
        {"type": "function", "name": "read", "strict": False, "parameters": SCHEMA}]}
    OTHERS = [{"type": "function", "name": "exec_command", "description": "Run.", "strict": False,
               "parameters": SCHEMA}, {"type": "web_search", "external_web_access": True},
              {"type": "image_generation", "output_format": "png"}]

    def ask(self, items: list[Any], tools: list[Any], model: str = CODEX,
            initiator: str = "user") -> tuple[dict[str, Any], Reply]:
        """One turn; no `instructions`, as Codex has it -> (its final response, the reply)."""
        body = {"model": model, "input": items, "tools": tools, "tool_choice": "auto",
                "parallel_tool_calls": True, "reasoning": {"effort": "medium", "summary": "auto"},
                "store": False, "stream": True, "include": ["reasoning.encrypted_content"],
                "prompt_cache_key": "0199-aa", "text": {"verbosity": "low"},
                "client_metadata": {"x-codex-installation-id": "i"}}
        reply = self.proxy.request("POST", "/v1/responses", body, self.HEADERS)
        self.assertFalse(reply.is_done, "no [DONE] in this dialect")
        final = finished(reply)
        self.assertIsInstance(final["usage"]["total_tokens"], int)
        done = [e["item"] for e in reply.events if e["type"] == "response.output_item.done"]
        self.assertEqual(done, final["output"])
        for event in reply.events:
            if "item_id" in event:
                self.assertEqual(event["item_id"], final["output"][event["output_index"]]["id"])
        sent = self.fake.last()
        self.assertEqual(sent.headers["x-initiator"], initiator)
        self.assertIn("<permissions>", json.dumps(sent.json))
        self.assertIn("tools", self.losses(reply))
        return final, reply

    def test_a_session_on_its_own_model(self) -> None:
        tools, items = [self.PATCH, self.FILES, *self.OTHERS], list(self.START)
        final, _ = self.ask(items, tools)
        self.assertEqual([item["type"] for item in final["output"]],
                         ["reasoning", "custom_tool_call"])
        call = final["output"][1]
        self.assertEqual((call["name"], call["input"]), ("apply_patch", "city: Paris"))
        items += final["output"]                            # ids included, as Codex sends them
        items.append({"type": "custom_tool_call_output", "call_id": call["call_id"],
                      "output": "Success"})
        final, _ = self.ask(items, tools, initiator="agent")
        self.assertIn("tool result: Success", final["output"][1]["content"][0]["text"])
        items += final["output"] + [{"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": "thanks"}]}]
        final, _ = self.ask(items, tools)
        self.assertEqual(final["output"][1]["content"][0]["text"], "Echo: thanks")
        sent = self.fake.last(RESPONSES).json
        self.assertEqual(sum("encrypted_content" in item for item in sent["input"]), 2)
        self.assertEqual([tool["type"] for tool in sent["tools"]],
                         ["custom", "namespace", "function", "web_search"])
        self.assertEqual((sent["prompt_cache_key"], sent["store"]), ("0199-aa", False))

    def test_namespaces_and_freeform_tools_on_every_other_model(self) -> None:
        for model, path in (("gpt-4.1", CHAT), (SONNET, CHAT), ("gemini-3.1-pro-preview", CHAT),
                            ("claude-opus-4.7", MESSAGES)):
            for first, kind, name in ((self.PATCH, "custom_tool_call", "apply_patch"),
                                      (self.FILES, "function_call", "read")):
                with self.subTest(model=model, kind=kind):
                    tools = [first, self.FILES if first is self.PATCH else self.PATCH]
                    self.check_tool(model, path, tools + self.OTHERS, kind, name)

    def check_tool(self, model: str, path: str, tools: list[Any], kind: str, name: str) -> None:
        items = list(self.START)
        final, _ = self.ask(items, tools, model)
        call = next(item for item in final["output"] if item["type"] == kind)
        self.assertEqual(call["name"], name)
        self.assertEqual(call.get("namespace"), "mcp__files" if name == "read" else None)
        sent = self.fake.last(path).json
        flat = {(tool.get("function") or tool)["name"] for tool in sent["tools"]}
        self.assertEqual(flat, {"apply_patch", "mcp__files__read", "exec_command", "web_search"})
        for field in ("client_metadata", "include", "store", "verbosity", "text"):
            self.assertNotIn(field, sent)
        items += final["output"] + [{"type": kind + "_output", "call_id": call["call_id"],
                                     "output": "Success"}]
        final, _ = self.ask(items, tools, model, "agent")
        self.assertIn("tool result: Success", json.dumps(final["output"]))

    def test_a_request_without_a_model_means_the_sessions_last_one(self) -> None:
        body = response("hi", "gpt-5.4")
        nameless = {"input": "again"}
        for headers, more in (({"session_id": "s1"}, {}), ({"conversation_id": "s2"}, {}),
                              ({"x-session-id": "s3"}, {}), ({}, {"prompt_cache_key": "s4"})):
            with self.subTest(headers=headers, more=more):
                first = self.proxy.request("POST", "/v1/responses", dict(nameless, **more), headers)
                self.assertEqual(first.status, 400, first)
                self.assertEqual(first.json["error"]["param"], "model")
                self.proxy.request("POST", "/v1/responses", dict(body, **more), headers)
                for given in (nameless, dict(nameless, model=None)):
                    reply = self.proxy.request("POST", "/v1/responses", dict(given, **more),
                                               headers)
                    self.assertEqual((reply.status, reply.json.get("model")), (200, "gpt-5.4"))
                    self.assertEqual(self.fake.last(RESPONSES).json["model"], "gpt-5.4")
        self.assertEqual(self.proxy.post("/v1/responses", nameless).status, 400)
        self.assertEqual(self.proxy.request("POST", "/v1/responses", nameless,
                                            {"session_id": "s5"}).status, 400)

    def test_sessions_are_bounded_and_odd_keys_do_no_harm(self) -> None:
        sessions = self.proxy.app.sessions
        sessions.update(("n%d" % at, "gpt-4.1") for at in range(cp.MAX_SESSIONS))
        for odd in ([], {"a": 1}, 5, "x" * 100, None, ["y"]):
            reply = self.proxy.post("/v1/responses", response("hi", prompt_cache_key=odd))
            self.assertNotEqual(reply.status, 500, reply)
        self.assertEqual(len(sessions), cp.MAX_SESSIONS)
        self.assertNotIn("n0", sessions)
        self.assertIn("n9", sessions)

    def test_its_list_of_models(self) -> None:
        reply = self.proxy.request("GET", "/v1/models?client_version=0.169.0", None, self.HEADERS)
        self.assertEqual((reply.status, reply.json["models"]), (200, []))
        self.assertIn(CODEX, [model["id"] for model in reply.json["data"]])

    def test_its_websocket_is_served(self) -> None:
        with Socket(self.proxy.port, *("%s: %s" % pair for pair in self.HEADERS.items())) as opened:
            events = opened.turn(response("hi", generate=False, store=False))
            warm = events[-1]["response"]["id"]
            events = opened.turn(response("hi", store=False), previous_response_id=warm)
        self.assertEqual(events[-1]["type"], "response.completed")

    def test_compressed_requests(self) -> None:
        packed = gzip.compress(json.dumps(response("hi")).encode())
        reply = self.proxy.request("POST", "/v1/responses", packed,
                                   {"content-encoding": "gzip"})
        self.assertEqual(reply.status, 200, reply)
        if sys.version_info < (3, 14):
            reply = self.proxy.request("POST", "/v1/responses", b"(\xb5/\xfd", {
                "content-encoding": "zstd"})
            self.assertEqual(reply.status, 415)
            self.assertIn("zstd", reply.json["error"]["message"])

    def test_a_name_of_its_own_by_an_alias(self) -> None:
        with Proxy(self.fake, model_alias=("codex-auto-review=gpt-5-mini",)) as proxy:
            reply = proxy.post("/v1/responses", response("hi", "codex-auto-review"))
            self.assertEqual((reply.status, reply.json["model"]), (200, "codex-auto-review"))
            self.assertEqual(self.fake.last(RESPONSES).json["model"], "gpt-5-mini")


class EveryHeader(ClientCase):
    def test_what_clients_say_of_themselves_does_not_go_upstream(self) -> None:
        headers = dict(ClaudeCode.HEADERS, **Codex.HEADERS)
        headers.update({"x-api-key": "sk-mine", "x-session-affinity": "s", "cookie": "a=b",
                        "openai-organization": "o", "x-goog-api-key": "g"})
        for path, body in (("/v1/messages", message("hi")), ("/v1/responses", response("hi")),
                           ("/v1/chat/completions", chat("hi"))):
            self.assertEqual(self.proxy.request("POST", path, body, headers).status, 200)
            sent = self.fake.last()
            for value in ("sk-mine", "0199-aa", "codex_exec", "claude-cli", "a=b", "dummy"):
                self.assertNotIn(value, " ".join(sent.headers.values()))
        wait_until(lambda: self.proxy.log_text().count("status=200") == 3)
        self.assertNotIn("sk-mine", self.proxy.log_text())


if __name__ == "__main__":
    unittest.main()
