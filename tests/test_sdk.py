"""The official `openai` and `anthropic` packages through the proxy, for models of their dialect.

Skips itself where these packages are not installed (they need a newer Python than the proxy does).
Clients parse strictly: an answer that does not fit the SDK's own model of it is a failure (but for
embeddings, where the SDK's own default, base64, does not fit, and for failed responses, whose error
codes are a closed list there).
"""
from __future__ import annotations

import asyncio
import copy
import json
import os
import sys
import unittest
import unittest.mock
from typing import Any, AsyncIterator, Awaitable, Callable, Iterable

import fake_upstream
from fake_upstream import AUTO, CHAT, EMBEDDINGS, MESSAGES, RESPONSES, Answer, make_vector
from support import Proxy, ProxyCase
from wire import user

try:
    import anthropic
    import openai
    import pydantic
except ImportError as error:
    raise unittest.SkipTest("needs the packages openai and anthropic: %s" % error) from None

CHAT_MODELS = ("gpt-4.1", "gpt-5-mini", "claude-sonnet-4.6", "gemini-3.1-pro-preview",
               "grok-code-fast-1")
CODEX, SONNET, HAIKU = "gpt-5.3-codex", "claude-sonnet-4.6", "claude-haiku-4.5"
PIXEL = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5E"
         "rkJggg==")
PIXEL_URL = "data:image/png;base64," + PIXEL
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}},
                          "required": ["city"], "additionalProperties": False}
PLAIN_SCHEMA = {key: value for key, value in SCHEMA.items() if key != "additionalProperties"}
CHAT_TOOL: Any = {"type": "function", "function": {
    "name": "get_weather", "description": "The weather.", "parameters": PLAIN_SCHEMA}}
STRICT_PLAIN: Any = {"type": "function", "function": {     # Gemini refuses additionalProperties
    "name": "get_weather", "strict": True, "parameters": PLAIN_SCHEMA}}
STRICT_TOOL: Any = {"type": "function", "function": {
    "name": "get_weather", "strict": True, "parameters": SCHEMA}}
FUNCTION: Any = {"type": "function", "name": "get_weather", "strict": False, "parameters": SCHEMA}
CUSTOM: Any = {"type": "custom", "name": "apply_patch", "description": "Apply a patch."}
MESSAGE_TOOL: Any = {"name": "get_weather", "description": "The weather.", "input_schema": SCHEMA}
ENCRYPTED: Any = ["reasoning.encrypted_content"]
CLIENTS_AT_ONCE = 10


class City(pydantic.BaseModel):
    """What the typed parsers ask for."""

    city: str


def field(item: Any, name: str) -> Any:
    """An attribute that not every class of a union has."""
    return getattr(item, name, None)


class SdkCase(ProxyCase):
    """A proxy, a fake upstream, and clients that know nothing of this machine's environment."""

    def setUp(self) -> None:
        patch = unittest.mock.patch.dict(os.environ)
        patch.start()
        self.addCleanup(patch.stop)
        for name in list(os.environ):
            if name.upper().endswith("_PROXY") or name.startswith(("OPENAI_", "ANTHROPIC_")):
                del os.environ[name]
        super().setUp()

    def openai_client(self, proxy: Proxy | None = None, strict: bool = True) -> openai.OpenAI:
        return self.enter(openai.OpenAI(
            base_url=(proxy or self.proxy).url + "/v1", api_key="any", max_retries=0, timeout=20,
            _strict_response_validation=strict))

    def anthropic_client(self, proxy: Proxy | None = None) -> anthropic.Anthropic:
        return self.enter(anthropic.Anthropic(
            base_url=(proxy or self.proxy).url, api_key="any", max_retries=0, timeout=20,
            _strict_response_validation=True))

    def async_openai(self, strict: bool = True) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.proxy.url + "/v1", api_key="any", max_retries=0,
                                  timeout=20, _strict_response_validation=strict)

    def async_anthropic(self) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(base_url=self.proxy.url, auth_token="any", max_retries=0,
                                        timeout=20, _strict_response_validation=True)

    def each(self, models: Iterable[str]) -> Iterable[str]:
        for model in models:
            with self.subTest(model=model):
                yield model


class OpenAIChat(SdkCase):
    def setUp(self) -> None:
        super().setUp()
        self.client = self.openai_client()

    def test_create(self) -> None:
        for model in self.each(CHAT_MODELS):
            answer = self.client.chat.completions.create(model=model, messages=[user("hi")])
            self.assertEqual(answer.choices[0].message.content, "Echo: hi")
            self.assertEqual(answer.choices[0].finish_reason, "stop")
            self.assertEqual((len(answer.choices), answer.model), (1, model))
            assert answer.usage is not None
            self.assertEqual(answer.usage.total_tokens,
                             answer.usage.prompt_tokens + answer.usage.completion_tokens)

    def test_stream(self) -> None:
        for model in self.each(CHAT_MODELS):
            chunks = list(self.client.chat.completions.create(
                model=model, messages=[user("count to three")], stream=True))
            text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            self.assertEqual(text, "Echo: count to three")
            self.assertEqual({c.object for c in chunks}, {"chat.completion.chunk"})
            self.assertEqual({c.model for c in chunks}, {model})
            self.assertEqual(len({c.id for c in chunks}), 1)
            self.assertEqual([c.choices[0].finish_reason for c in chunks
                              if c.choices and c.choices[0].finish_reason], ["stop"])
            self.assertEqual([c for c in chunks if c.usage], [], "nobody asked for usage")

    def test_stream_with_usage(self) -> None:
        for model in self.each(CHAT_MODELS):
            chunks = list(self.client.chat.completions.create(
                model=model, messages=[user("hi")], stream=True,
                stream_options={"include_usage": True}))
            counted = [c for c in chunks if c.usage]
            self.assertEqual(len(counted), 1)
            self.assertIs(counted[0], chunks[-1])
            self.assertEqual(counted[0].choices, [])
            self.assertGreater(field(counted[0].usage, "total_tokens"), 0)

    def test_accumulator(self) -> None:
        for model in self.each(CHAT_MODELS):
            with self.client.chat.completions.stream(
                    model=model, messages=[user("hello there")]) as stream:
                kinds = [event.type for event in stream]
                final = stream.get_final_completion()
            self.assertEqual(final.choices[0].message.content, "Echo: hello there")
            self.assertIn("content.done", kinds)

    def test_accumulator_with_parallel_tools(self) -> None:
        for model in self.each(("gpt-4.1", SONNET)):
            with self.client.chat.completions.stream(
                    model=model, messages=[user("two parallel tool calls")],
                    tools=[STRICT_TOOL]) as stream:
                done = [e for e in stream if e.type == "tool_calls.function.arguments.done"]
                final = stream.get_final_completion()
            calls = final.choices[0].message.tool_calls or []
            self.assertEqual([c.function.parsed_arguments for c in calls], [{"city": "Paris"}] * 2)
            self.assertEqual([e.index for e in done], [0, 1])
            self.assertEqual(final.choices[0].finish_reason, "tool_calls")

    def test_tool_loop(self) -> None:
        for model in self.each(CHAT_MODELS):
            for prompt, count in (("use the tool", 1), ("use parallel tool calls", 2)):
                history: list[Any] = [{"role": "system", "content": "Be brief."}, user(prompt)]
                answer = self.client.chat.completions.create(model=model, messages=history,
                                                             tools=[CHAT_TOOL])
                message = answer.choices[0].message
                calls = message.tool_calls or []
                self.assertEqual(len(calls), count)
                self.assertEqual(answer.choices[0].finish_reason, "tool_calls")
                history.append(message)
                for number, call in enumerate(calls):
                    self.assertEqual(json.loads(field(call, "function").arguments),
                                     {"city": "Paris"})
                    history.append({"role": "tool", "tool_call_id": call.id,
                                    "content": "sun %d" % number})
                answer = self.client.chat.completions.create(model=model, messages=history,
                                                             tools=[CHAT_TOOL])
                self.assertIn("tool result: sun %d" % (count - 1),
                              answer.choices[0].message.content or "")
                self.assertEqual(self.fake.last(CHAT).headers["x-initiator"], "agent")

    def test_streamed_tool_calls(self) -> None:
        for model in self.each(CHAT_MODELS):
            calls: dict[int, Any] = {}
            chunks = self.client.chat.completions.create(
                model=model, messages=[user("use parallel tool calls")], tools=[CHAT_TOOL],
                tool_choice="auto", stream=True)
            for chunk in chunks:
                for choice in chunk.choices:
                    self.assertEqual(choice.index, 0)
                    for part in choice.delta.tool_calls or []:
                        call = calls.setdefault(part.index, {"id": part.id, "text": ""})
                        call["text"] += field(part.function, "arguments") or ""
            self.assertEqual(sorted(calls), [0, 1])
            self.assertEqual([json.loads(c["text"]) for c in calls.values()],
                             [{"city": "Paris"}] * 2)
            self.assertEqual(len({c["id"] for c in calls.values()}), 2)

    def test_vision(self) -> None:
        content = [{"type": "text", "text": "what is it?"},
                   {"type": "image_url", "image_url": {"url": PIXEL_URL}}]
        for model in self.each(("gpt-4.1", SONNET)):
            answer = self.client.chat.completions.create(model=model, messages=[user(content)])
            self.assertEqual(answer.choices[0].message.content, "Echo: what is it?")
            self.assertEqual(self.fake.last(CHAT).headers["copilot-vision-request"], "true")

    def test_reasoning_is_found_under_the_usual_name(self) -> None:
        answer = self.client.chat.completions.create(model="gpt-5-mini", messages=[user("hi")],
                                                     reasoning_effort="low")
        self.assertEqual(field(answer.choices[0].message, "reasoning_content"),
                         "The user wants an echo.")

    def test_limits_and_developer_role(self) -> None:
        for model in self.each(CHAT_MODELS):
            for limit in ("max_tokens", "max_completion_tokens"):
                more: Any = {limit: 100}
                answer = self.client.chat.completions.create(
                    model=model, messages=[{"role": "developer", "content": "Be brief."},
                                           user("hi")], **more)
                self.assertEqual(answer.choices[0].message.content, "Echo: hi")

    def test_odd_framing_of_the_upstream(self) -> None:
        for marks in ("bytewise=1", "crlf=1", "odd=1", "split=1", "odd=1 crlf=1 bytewise=1"):
            with self.subTest(marks=marks):
                chunks = self.client.chat.completions.create(
                    model="gpt-4.1", messages=[user("héllo 🎉 @@%s@@" % marks)], stream=True)
                text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
                self.assertEqual(text, "Echo: héllo 🎉")


class FreePlan(SdkCase):
    """An account on which `auto` alone works: nine rounds of a tool, one question to /auto."""

    ROUNDS = 9

    def setUp(self) -> None:
        super().setUp()
        self.fake.auto_models = ["gpt-5-mini"]
        self.fake.auto_only = True

    def check(self, path: str) -> None:
        self.assertEqual(self.fake.count(AUTO), 1)
        self.assertEqual(self.fake.count(path), self.ROUNDS)
        selectors = {r.headers.get("copilot-session-token") for r in self.fake.requests
                     if r.path == path}
        self.assertEqual(selectors, set(self.fake.selectors))

    def test_a_model_by_name_is_refused(self) -> None:
        with self.assertRaises(openai.BadRequestError):
            self.openai_client().chat.completions.create(
                model="gpt-5-mini", messages=[{"role": "user", "content": "hi"}])

    def test_openai(self) -> None:
        client, messages = self.openai_client(), [{"role": "user", "content": "the tool, please"}]
        for _ in range(self.ROUNDS):
            answer = client.chat.completions.create(
                model="auto", messages=messages, tools=[CHAT_TOOL],  # type: ignore[arg-type]
                tool_choice="required")
            (call,) = answer.choices[0].message.tool_calls or ()
            messages += [answer.choices[0].message.model_dump(exclude_none=True),
                         {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
                         {"role": "user", "content": "the tool again"}]
        self.assertEqual(answer.model, "gpt-5-mini")
        self.check(CHAT)

    def test_anthropic(self) -> None:
        client, messages = self.anthropic_client(), [
            {"role": "user", "content": "the tool, please"}]
        for _ in range(self.ROUNDS):
            answer = client.messages.create(
                model="auto", max_tokens=1000, tools=[MESSAGE_TOOL],
                messages=messages, tool_choice={"type": "any"})    # type: ignore[arg-type]
            (call,) = [block for block in answer.content if block.type == "tool_use"]
            messages += [{"role": "assistant", "content": answer.content},   # type: ignore
                         {"role": "user", "content": [
                             {"type": "tool_result", "tool_use_id": call.id,
                              "content": "sunny"},
                             {"type": "text", "text": "the tool again"}]}]   # type: ignore
        self.assertEqual(answer.model, "gpt-5-mini")
        self.check(CHAT if self.fake.count(CHAT) else RESPONSES)


class OpenAIErrors(SdkCase):
    def test_unknown_model(self) -> None:
        client = self.openai_client()
        for call in (lambda: client.chat.completions.create(model="gtp-4.1",
                                                            messages=[user("hi")]),
                     lambda: client.chat.completions.create(model="gtp-4.1", stream=True,
                                                            messages=[user("hi")]),
                     lambda: client.responses.create(model="gtp-4.1", input="hi"),
                     lambda: client.embeddings.create(model="gtp-4.1", input="hi"),
                     lambda: client.models.retrieve("gtp-4.1")):
            with self.assertRaises(openai.NotFoundError) as caught:
                call()
            self.assertIn("gpt-4.1", caught.exception.message)
            self.assertIn("gtp-4.1", caught.exception.message)
            self.assertEqual(caught.exception.code, "model_not_found")
            self.assertEqual(caught.exception.type, "invalid_request_error")

    def test_a_model_that_does_not_chat_is_a_clear_400(self) -> None:
        with self.assertRaises(openai.BadRequestError) as caught:
            self.openai_client().chat.completions.create(model="text-embedding-3-small",
                                                           messages=[user("hi")])
        self.assertIn("/embeddings", caught.exception.message)
        self.assertEqual(caught.exception.param, "model")

    def test_nobody_logged_in(self) -> None:
        self.fake.device.outcomes.extend(["pending"] * 3)
        self.fake.device.interval = 60
        client = self.openai_client(self.enter(Proxy(self.fake, login=False)))
        with self.assertRaises(openai.AuthenticationError) as caught:
            client.chat.completions.create(model="gpt-4.1", messages=[user("hi")])
        self.assertIn("copilot_proxy.py auth", caught.exception.message)
        self.assertEqual(caught.exception.type, "authentication_error")

    def test_rate_limit_of_the_upstream(self) -> None:
        self.fake.script(CHAT, Answer(
            status=429, headers={"retry-after": "7"},
            body={"error": {"message": "slow down please", "code": "user_global_rate_limited"}}))
        with self.assertRaises(openai.RateLimitError) as caught:
            self.openai_client().chat.completions.create(model="gpt-4.1", messages=[user("hi")])
        self.assertIn("slow down please", caught.exception.message)
        self.assertEqual(caught.exception.code, "user_global_rate_limited")
        self.assertEqual(caught.exception.response.headers["retry-after"], "7")
        self.assertEqual(self.fake.count(CHAT), 1)

    def test_every_error_has_a_request_id(self) -> None:
        with self.assertRaises(openai.BadRequestError) as caught:
            self.openai_client().responses.create(model=CODEX, input="hi", background=True)
        self.assertTrue(caught.exception.request_id)
        self.assertEqual(caught.exception.param, "background")

    def test_cut_stream_raises(self) -> None:
        client = self.openai_client()
        for model in self.each(CHAT_MODELS):
            for marks in ("cut=2", "cut=0", "cut=2 rst=1", "noend=1", "error=2"):
                with self.assertRaises(openai.APIError, msg=marks):
                    list(client.chat.completions.create(
                        model=model, messages=[user("a long answer @@%s events=9@@" % marks)],
                        stream=True))

    def test_cut_response_stream_fails(self) -> None:
        client = self.openai_client(strict=False)
        for marks in ("cut=2", "cut=1", "cut=2 rst=1", "noend=1", "error=2 fail=1"):
            with self.subTest(marks=marks):
                prompt = "a long answer @@%s events=9@@" % marks
                events = list(client.responses.create(model=CODEX, input=prompt, stream=True))
                self.assertEqual(events[-1].type, "response.failed")
                failed = field(events[-1], "response")
                self.assertEqual((failed.status, failed.model), ("failed", CODEX))
                self.assertTrue(failed.error.message)
                for name in ("tools", "tool_choice", "parallel_tool_calls", "created_at"):
                    self.assertIsNotNone(field(failed, name), name)
                with self.assertRaises((RuntimeError, openai.APIError)):
                    with client.responses.stream(model=CODEX, input=prompt) as stream:
                        stream.get_final_response()


class OpenAIResponses(SdkCase):
    def setUp(self) -> None:
        super().setUp()
        self.client = self.openai_client()

    def test_create(self) -> None:
        for model in self.each((CODEX, "gpt-5.4", "gpt-5-mini")):
            answer = self.client.responses.create(model=model, input="hi", instructions="Be brief.")
            self.assertEqual(answer.output_text, "Echo: hi")
            self.assertEqual((answer.status, answer.model), ("completed", model))
            assert answer.usage is not None
            self.assertEqual(answer.usage.total_tokens,
                             answer.usage.input_tokens + answer.usage.output_tokens)

    def test_compact(self) -> None:
        for model in self.each((CODEX, SONNET, "gemini-3.1-pro-preview")):
            made = self.client.responses.compact(model=model, input=[user("The word is maple.")])
            self.assertEqual((made.object, [item.type for item in made.output]),
                             ("response.compaction", ["compaction"]))
            answer = self.client.responses.create(model=model, input=[
                *[item.model_dump() for item in made.output], user("hi")])
            self.assertEqual(answer.output_text, "Echo: hi")
            events = list(self.client.responses.create(model=model, stream=True, input=[
                user("hi"), {"type": "compaction_trigger"}]))
            self.assertEqual([item.type for item in events[-1].response.output], ["compaction"])

    def test_stream(self) -> None:
        events = list(self.client.responses.create(model=CODEX, input="use the tool",
                                                   tools=[FUNCTION], stream=True))
        self.assertEqual(events[0].type, "response.created")
        self.assertEqual(events[-1].type, "response.completed")
        self.assertEqual([e.sequence_number for e in events], list(range(len(events))))
        ids: dict[int, set[str]] = {}
        for event in events:
            item = field(event, "item")
            if field(event, "output_index") is not None:
                ids.setdefault(field(event, "output_index"), set()).add(
                    item.id if item is not None else field(event, "item_id"))
        final = field(events[-1], "response")
        self.assertEqual(ids, {at: {item.id} for at, item in enumerate(final.output)})
        self.assertEqual(len({field(e, "response").id for e in events if field(e, "response")}), 1)
        self.assertTrue(all(len(i) <= 64 for found in ids.values() for i in found))

    def test_accumulator(self) -> None:
        with self.client.responses.stream(model=CODEX, input="hello there") as stream:
            text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
            final = stream.get_final_response()
        self.assertEqual((text, final.output_text), ("Echo: hello there",) * 2)
        self.assertEqual([item.type for item in final.output], ["reasoning", "message"])
        self.assertTrue(field(final.output[0], "encrypted_content"))

    def test_accumulator_with_tools(self) -> None:
        for tools, kind in (([FUNCTION], "function_call"), ([CUSTOM], "custom_tool_call")):
            with self.subTest(kind=kind):
                with self.client.responses.stream(model=CODEX, input="use parallel tool calls",
                                                  tools=tools) as stream:
                    list(stream)
                    final = stream.get_final_response()
                calls = [item for item in final.output if item.type == kind]
                self.assertEqual(len(calls), 2)
                self.assertEqual(len({field(call, "call_id") for call in calls}), 2)
                wanted = "city: Paris" if kind == "custom_tool_call" else '{"city": "Paris"}'
                self.assertEqual([field(c, "arguments") or field(c, "input") for c in calls],
                                 [wanted] * 2)

    def test_accumulator_against_each_quirk(self) -> None:
        every = set(self.fake.quirks)
        for quirk in ("cipher_deltas", "obfuscation", "no_sequence_numbers", "early_done",
                      "empty_output", "no_total_tokens", "plain_ids"):
            for quirks in ({quirk}, every - {quirk}, every | {quirk}):
                with self.subTest(quirk=quirk, others=len(quirks)):
                    self.fake.quirks = quirks | ({"obfuscation"} & quirks)
                    if "cipher_deltas" in quirks:
                        self.fake.quirks |= {"obfuscation"}
                    with self.client.responses.stream(model=CODEX, input="use the tool",
                                                      tools=[FUNCTION]) as stream:
                        final = stream.get_final_response()
                    self.assertEqual(field(final.output[-1], "arguments"), '{"city": "Paris"}')

    def test_parse(self) -> None:
        class City(pydantic.BaseModel):
            name: str
            people: int

        part = {"type": "output_text", "text": '{"name":"Paris","people":2}', "annotations": []}
        scripted = {"id": "resp_1", "object": "response", "created_at": 1, "status": "completed",
                    "model": CODEX, "output": [{"type": "message", "id": "msg_1",
                                                "role": "assistant", "status": "completed",
                                                "content": [part]}],
                    "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
                    "usage": {"input_tokens": 3, "output_tokens": 4}}
        self.fake.script(RESPONSES, Answer(headers={"content-type": "application/json"},
                                           body=scripted))
        answer = self.client.responses.parse(model=CODEX, input="a city", text_format=City)
        self.assertEqual(answer.output_parsed, City(name="Paris", people=2))
        sent = self.fake.last(RESPONSES).json["text"]["format"]
        self.assertEqual((sent["type"], sent["name"]), ("json_schema", "City"))

    def test_three_turns_with_reasoning(self) -> None:
        for streamed in (False, True):
            for tools, kind in (([FUNCTION, CUSTOM], "function_call"),
                                ([CUSTOM, FUNCTION], "custom_tool_call")):
                with self.subTest(kind=kind, streamed=streamed):
                    self._three_turns(tools, kind, streamed)

    def _ask(self, history: list[Any], tools: list[Any], streamed: bool) -> Any:
        if streamed:
            events = self.client.responses.create(
                model=CODEX, input=history, tools=tools, store=False, include=ENCRYPTED,
                stream=True)
            answer = [field(e, "response") for e in events][-1]
        else:
            answer = self.client.responses.create(
                model=CODEX, input=history, tools=tools, store=False, include=ENCRYPTED)
        history.extend(answer.output)
        return answer

    def _three_turns(self, tools: list[Any], kind: str, streamed: bool) -> None:
        history: list[Any] = [user("use parallel tool calls")]
        first = self._ask(history, tools, streamed)
        self.assertEqual([item.type for item in first.output], ["reasoning", kind, kind])
        for call in first.output[1:]:
            history.append({"type": kind + "_output", "call_id": call.call_id, "output": "sun"})
        second = self._ask(history, tools, streamed)
        self.assertIn("tool result: sun", second.output_text)
        self.assertEqual(self.fake.last(RESPONSES).headers["x-initiator"], "agent")
        history.append(user("and now?"))
        third = self._ask(history, tools, streamed)
        self.assertEqual(third.output_text, "Echo: and now?")
        sent = self.fake.last(RESPONSES).json["input"]
        self.assertEqual(sum("encrypted_content" in item for item in sent), 2)
        self.assertEqual([item for item in sent if "id" in item], [])

    def test_a_search_on_a_model_without_one(self) -> None:
        self.fake.search_results = [("A page", "https://a.example/")]
        how: Any = dict(model=SONNET, input="cats @@searches=1@@", tools=[{"type": "web_search"}])
        whole = self.client.responses.create(**how)
        with self.client.responses.stream(**how) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        self.assertIn("response.web_search_call.searching", kinds)
        for answer in (whole, final):
            call, said = [item for item in answer.output if item.type != "reasoning"][-2:]
            self.assertEqual((call.type, call.action.query), ("web_search_call", "cats 1"))
            self.assertEqual(call.action.sources[0].url, "https://a.example/")
            self.assertEqual(said.content[0].annotations[0].title, "A page")

    def test_store_is_off_upstream(self) -> None:
        self.client.responses.create(model=CODEX, input="hi", store=True, service_tier="auto")
        self.assertIs(self.fake.last(RESPONSES).json["store"], False)

    def test_vision(self) -> None:
        content = [{"type": "input_text", "text": "what is it?"},
                   {"type": "input_image", "image_url": PIXEL_URL, "detail": "auto"}]
        answer = self.client.responses.create(model=CODEX, input=[user(content)])
        self.assertEqual(answer.output_text, "Echo: what is it?")
        self.assertEqual(self.fake.last(RESPONSES).headers["copilot-vision-request"], "true")

    def test_length(self) -> None:
        with self.client.responses.stream(model=CODEX, input="hi @@length=1@@") as stream:
            kinds = [event.type for event in stream]
        self.assertEqual(kinds[-1], "response.incomplete")


class OpenAISocket(SdkCase):
    """Responses over a WebSocket, by the SDK's own `connect`."""

    def setUp(self) -> None:
        super().setUp()
        try:
            import websockets                                       # noqa: F401
        except ImportError as error:
            raise unittest.SkipTest("needs the package websockets: %s" % error) from None
        client = self.openai_client()
        if not hasattr(client.responses, "connect"):
            raise unittest.SkipTest("this SDK opens no WebSocket")
        self.connection = self.enter(client.responses.connect())

    def turn(self, **body: Any) -> Any:
        """The last event of an answer."""
        self.connection.response.create(**body)
        return next(event for event in self.connection
                    if event.type in ("response.completed", "response.failed", "error"))

    def test_a_conversation(self) -> None:
        for model in self.each((CODEX, SONNET, "gpt-4.1")):
            first = self.turn(model=model, input="one", store=False)
            self.assertEqual(first.response.output_text, "Echo: one")
            second = self.turn(model=model, input="two", previous_response_id=first.response.id)
            self.assertEqual(second.response.output_text, "Echo: two")
            self.assertIn("Echo: one", json.dumps(self.fake.requests[-1].json))

    def test_a_tool(self) -> None:
        for model in self.each((CODEX, SONNET, "gpt-4.1")):
            answer = self.turn(model=model, input="use the tool", tools=[FUNCTION]).response
            call = next(item for item in answer.output if item.type == "function_call")
            told = self.turn(model=model, tools=[FUNCTION], previous_response_id=answer.id, input=[
                {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}])
            self.assertIn("Sunny.", told.response.output_text)

    def test_a_warm_up_and_a_lane(self) -> None:
        warm = self.turn(model=CODEX, input="before", generate=False, stream_id="a")
        self.assertEqual((warm.response.output, warm.stream_id), ([], "a"))
        answer = self.turn(model=CODEX, input="hi", previous_response_id=warm.response.id)
        self.assertEqual(answer.response.output_text, "Echo: hi")

    def test_an_error_keeps_the_connection(self) -> None:
        error = self.turn(model="no-such-model", input="hi")
        self.assertEqual((error.type, error.status, error.error.code),
                         ("error", 404, "model_not_found"))
        self.assertEqual(self.turn(model=CODEX, input="hi").response.output_text, "Echo: hi")


class OpenAIOthers(SdkCase):
    MODEL = "text-embedding-3-small"

    def setUp(self) -> None:
        super().setUp()
        self.client = self.openai_client(strict=False)

    def test_embedding_of_a_string(self) -> None:
        for more in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            with self.subTest(**more):
                given: Any = more
                answer = self.client.embeddings.create(model=self.MODEL, input="a", **given)
                self.assertEqual(answer.model, self.MODEL)
                if more.get("encoding_format") != "base64":
                    self.assertEqual(answer.data[0].embedding, make_vector("a", 16))

    def test_embeddings_of_many(self) -> None:
        for count, calls in ((3, 1), (512, 1), (600, 2)):
            with self.subTest(count=count):
                before = self.fake.count(EMBEDDINGS)
                texts = ["text %d" % number for number in range(count)]
                answer = self.client.embeddings.create(model=self.MODEL, input=texts, dimensions=8)
                self.assertEqual([item.embedding for item in answer.data],
                                 [make_vector(text, 8) for text in texts])
                self.assertEqual([item.index for item in answer.data], list(range(count)))
                self.assertEqual(self.fake.count(EMBEDDINGS) - before, calls)
                self.assertEqual(answer.usage.prompt_tokens,
                                 sum(len(text) // 4 + 1 for text in texts))

    def test_token_arrays_are_refused(self) -> None:
        with self.assertRaises(openai.BadRequestError) as caught:
            self.client.embeddings.create(model=self.MODEL, input=[1, 2, 3])
        self.assertEqual(caught.exception.param, "input")

    def test_models(self) -> None:
        client = self.openai_client()
        ids = [model.id for model in client.models.list()]
        self.assertEqual(len(ids), len(set(ids)))
        for model in (CODEX, SONNET, self.MODEL):
            self.assertIn(model, ids)
        for hidden in ("gpt-3.5-turbo", "gpt-5.2"):
            self.assertNotIn(hidden, ids)
        for name in (CODEX, SONNET, "claude-sonnet-4-6"):
            self.assertEqual(client.models.retrieve(name).id, name)


class AnthropicMessages(SdkCase):
    def setUp(self) -> None:
        super().setUp()
        self.client = self.anthropic_client()

    def ask(self, messages: list[Any], model: str = SONNET, **more: Any) -> Any:
        values: dict[str, Any] = dict({"max_tokens": 2000}, **more)
        return self.client.messages.create(model=model, messages=messages, **values)

    def gather(self, messages: list[Any], model: str = SONNET, **more: Any) -> Any:
        """The same by the accumulator of a stream."""
        values: dict[str, Any] = dict({"max_tokens": 2000}, **more)
        with self.client.messages.stream(model=model, messages=messages, **values) as stream:
            return stream.get_final_message()

    def both(self) -> Iterable[Callable[..., Any]]:
        for call in (self.ask, self.gather):
            with self.subTest(call=call.__name__):
                yield call

    def test_create(self) -> None:
        for call in self.both():
            for model in (SONNET, "claude-sonnet-4-6", HAIKU, "claude-haiku-4-5-20251001"):
                answer = call([user("hi")], model, system="Be brief.")
                self.assertEqual(answer.content[0].text, "Echo: hi")
                self.assertEqual((answer.stop_reason, answer.model), ("end_turn", model))
                self.assertGreater(answer.usage.input_tokens, 0)
                self.assertGreater(answer.usage.output_tokens, 0)

    def test_raw_stream(self) -> None:
        events = list(self.ask([user("hi")], stream=True))
        self.assertEqual(events[0].type, "message_start")
        self.assertEqual(events[-1].type, "message_stop")
        self.assertEqual("".join(e.delta.text for e in events if e.type == "content_block_delta"),
                         "Echo: hi")

    def test_text_stream(self) -> None:
        with self.client.messages.stream(model=SONNET, max_tokens=100,
                                         messages=[user("hello there")]) as stream:
            self.assertEqual("".join(stream.text_stream), "Echo: hello there")
            self.assertEqual(stream.get_final_text(), "Echo: hello there")

    def test_tool_loop(self) -> None:
        for call in self.both():
            for prompt, count in (("use the tool", 1), ("use parallel tool calls", 2)):
                history = [user(prompt)]
                answer = call(history, tools=[MESSAGE_TOOL])
                uses = [block for block in answer.content if block.type == "tool_use"]
                self.assertEqual([use.input for use in uses], [{"city": "Paris"}] * count)
                self.assertEqual(answer.stop_reason, "tool_use")
                history += [{"role": "assistant", "content": answer.content},
                            user([{"type": "tool_result", "tool_use_id": use.id, "content": "sun"}
                                  for use in uses])]
                answer = call(history, tools=[MESSAGE_TOOL])
                self.assertIn("tool result: sun", answer.content[0].text)
                self.assertEqual(self.fake.last(MESSAGES).headers["x-initiator"], "agent")

    def test_hosted_search(self) -> None:
        self.fake.search_results = [("A page", "https://a.example/")]
        tools: Any = [MESSAGE_TOOL, {"type": "web_search_20250305", "name": "web_search"}]
        for call in self.both():
            answer = call([user("cats @@searches=2@@")], tools=tools)
            results = [b for b in answer.content if b.type == "web_search_tool_result"]
            self.assertEqual([b.content[0].url for b in results], ["https://a.example/"] * 2)
            self.assertEqual(answer.usage.server_tool_use.web_search_requests, 2)
            again = call([user("cats"), {"role": "assistant", "content": answer.content},
                          user("more")], tools=tools)
            self.assertEqual(again.content[-1].text, "Echo: more")

    def test_tool_runner(self) -> None:
        @anthropic.beta_tool
        def get_weather(city: str) -> str:
            """The weather of a city."""
            return "sun in " + city

        runner = self.client.beta.messages.tool_runner(
            model=SONNET, max_tokens=500, tools=[get_weather], messages=[user("use the tool")])
        answers = list(runner)
        self.assertEqual(answers[0].stop_reason, "tool_use")
        self.assertIn("tool result: sun in Paris", field(answers[-1].content[0], "text"))

    def test_vision(self) -> None:
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                             "data": PIXEL}}
        for call in self.both():
            answer = call([user([image, {"type": "text", "text": "what is it?"}])])
            self.assertEqual(answer.content[0].text, "Echo: what is it?")
            self.assertEqual(self.fake.last(MESSAGES).headers["copilot-vision-request"], "true")
            first = call([user("use the tool")], tools=[MESSAGE_TOOL])
            use = first.content[-1]
            answer = call([user("use the tool"), {"role": "assistant", "content": first.content},
                           user([{"type": "tool_result", "tool_use_id": use.id,
                                  "content": [image]}])], tools=[MESSAGE_TOOL])
            self.assertEqual(self.fake.last(MESSAGES).headers["copilot-vision-request"], "true")

    def test_image_by_url_is_refused(self) -> None:
        image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/a.png"}}
        with self.assertRaises(anthropic.BadRequestError) as caught:
            self.ask([user([image])])
        self.assertIn("base64", str(caught.exception))

    def test_thinking_loop(self) -> None:
        cases: tuple[tuple[str, dict[str, Any]], ...] = (
            (SONNET, {"thinking": {"type": "adaptive"}}),
            (SONNET, {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}),
            (SONNET, {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
            (HAIKU, {"thinking": {"type": "enabled", "budget_tokens": 1024},
                     "extra_body": {"temperature": 0.5}}),
            (HAIKU, {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}),
            ("claude-opus-4.7", {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
            ("claude-opus-4.7", {"thinking": {"type": "adaptive", "display": "summarized"}}),
            ("claude-opus-4.7", {"thinking": {"type": "adaptive"}}))
        for call in self.both():
            for model, more in cases:
                with self.subTest(model=model, **more):
                    self._think(call, model, more)

    def _think(self, call: Callable[..., Any], model: str, more: dict[str, Any]) -> None:
        history = [user("use the tool")]
        answer = call(history, model, tools=[MESSAGE_TOOL], **more)
        self.assertEqual([block.type for block in answer.content],
                         ["thinking", "text", "tool_use"])
        self.assertTrue(answer.content[0].signature)
        history += [{"role": "assistant", "content": answer.content},
                    user([{"type": "tool_result", "tool_use_id": answer.content[2].id,
                           "content": "sun"}])]
        again = call(history, model, tools=[MESSAGE_TOOL], **more)
        self.assertIn("tool result: sun", again.content[-1].text)
        sent = self.fake.last(MESSAGES).json["messages"][1]["content"]
        signatures = [block["signature"] for block in sent if block["type"] == "thinking"]
        if answer.content[0].thinking:
            self.assertEqual(signatures, [answer.content[0].signature])
        history += [{"role": "assistant", "content": again.content}, user("thanks")]
        self.assertEqual(call(history, model, **more).content[-1].text, "Echo: thanks")

    def test_count_tokens(self) -> None:
        counted = self.client.messages.count_tokens(
            model=SONNET, messages=[user("how many?")], system="Be brief.", tools=[MESSAGE_TOOL],
            thinking={"type": "adaptive"})
        self.assertGreater(counted.input_tokens, 0)
        self.fake.count_tokens_fails = True
        for model in (SONNET, "gpt-4.1"):
            counted = self.client.messages.count_tokens(model=model, messages=[user("how many?")])
            self.assertGreater(counted.input_tokens, 0)

    def test_models(self) -> None:
        page = self.client.models.list(limit=1000)
        ids = [model.id for model in page]
        self.assertIn(SONNET, ids)
        self.assertEqual(len(ids), len(set(ids)))
        self.assertIs(page.has_more, False)
        self.assertEqual((page.first_id, page.last_id), (ids[0], ids[-1]))
        for name in (SONNET, "claude-sonnet-4-6", "claude-haiku-4-5-20251001"):
            model = self.client.models.retrieve(name)
            self.assertEqual((model.id, model.type), (name, "model"))
            self.assertTrue(model.display_name)
            self.assertEqual(model.created_at.utcoffset(), model.created_at - model.created_at)


class AnthropicErrors(SdkCase):
    def setUp(self) -> None:
        super().setUp()
        self.client = self.anthropic_client()

    def ask(self, **more: Any) -> Any:
        values: dict[str, Any] = dict({"model": SONNET, "max_tokens": 100,
                                       "messages": [user("hi")]}, **more)
        return self.client.messages.create(**values)

    def check(self, error: anthropic.APIStatusError, kind: str) -> None:
        body: Any = error.body
        self.assertEqual(body["type"], "error")
        self.assertEqual(body["error"]["type"], kind)
        self.assertTrue(body["error"]["message"])
        self.assertTrue(error.request_id)
        self.assertEqual(body["request_id"], error.request_id)

    def test_what_it_does_not_know_is_no_bad_request(self) -> None:
        """A bare text is a turn, and a block that nobody knows stays as text."""
        for messages in ("hi", [user([{"type": "unheard_of", "text": "hi"}])]):
            self.assertTrue(self.ask(messages=messages).content)

    def test_bad_requests(self) -> None:
        cases: tuple[dict[str, Any], ...] = (
            {"messages": []}, {"messages": 5}, {"messages": [{"role": "user", "content": []}]},
            {"messages": [user([{"type": "image", "source": {"type": "file"}}])]},
            {"max_tokens": -1},
            {"model": "text-embedding-3-small"}, {"extra_body": {"thread": {"type": "create"}}})
        for more in cases:
            for stream in (False, True):
                with self.subTest(stream=stream, **more):
                    with self.assertRaises(anthropic.BadRequestError) as caught:
                        self.ask(stream=stream, **more)
                    self.check(caught.exception, "invalid_request_error")

    def test_unknown_model(self) -> None:
        for call in (lambda: self.ask(model="clod-sonnet-4.6"),
                     lambda: self.client.models.retrieve("clod-sonnet-4.6")):
            with self.assertRaises(anthropic.NotFoundError) as caught:
                call()
            self.check(caught.exception, "not_found_error")
            self.assertIn(SONNET, str(caught.exception))

    def test_nobody_logged_in(self) -> None:
        self.fake.device.interval = 60
        self.client = self.anthropic_client(self.enter(Proxy(self.fake, login=False)))
        with self.assertRaises(anthropic.AuthenticationError) as caught:
            self.ask()
        self.check(caught.exception, "authentication_error")

    def test_rate_limit_of_the_upstream(self) -> None:
        self.fake.script(MESSAGES, Answer(
            status=429, headers={"retry-after": "7"},
            body={"error": {"message": "slow down please", "code": "rate_limited"}}))
        with self.assertRaises(anthropic.RateLimitError) as caught:
            self.ask()
        self.check(caught.exception, "rate_limit_error")
        self.assertEqual(caught.exception.response.headers["retry-after"], "7")

    def test_cut_stream_raises(self) -> None:
        for marks in ("cut=2", "cut=0", "cut=2 rst=1", "noend=1", "error=2"):
            with self.subTest(marks=marks):
                messages = [user("a long answer @@%s events=9@@" % marks)]
                with self.assertRaises(anthropic.APIError):
                    list(self.ask(messages=messages, stream=True))
                with self.assertRaises(anthropic.APIError):
                    with self.client.messages.stream(model=SONNET, max_tokens=100,
                                                     messages=messages) as stream:
                        stream.get_final_message()


class AsyncClients(SdkCase):
    def run_async(self, work: Awaitable[None]) -> None:
        async def limited() -> None:
            await asyncio.wait_for(work, 60)
        asyncio.run(limited())

    async def open_streams(self, prompt: str) -> AsyncIterator[Any]:
        """A running stream in each dialect, one after the other."""
        async with self.async_openai(strict=False) as client, self.async_anthropic() as claude:
            yield await client.chat.completions.create(
                model="gpt-4.1", messages=[user(prompt)], stream=True)
            yield await client.responses.create(model=CODEX, input=prompt, stream=True)
            yield await claude.messages.create(
                model=SONNET, max_tokens=500, messages=[user(prompt)], stream=True)

    def test_streams_to_their_ends(self) -> None:
        async def work() -> None:
            async for stream in self.open_streams("@@events=40@@"):
                events = [event async for event in stream]
                self.assertGreater(len(events), 40)
        self.run_async(work())
        self.assertEqual(self.fake.aborted, 0)

    def test_accumulators(self) -> None:
        async def work() -> None:
            async with self.async_openai() as client, self.async_anthropic() as claude:
                async with client.chat.completions.stream(
                        model=SONNET, messages=[user("hello")]) as chat:
                    done = await chat.get_final_completion()
                self.assertEqual(done.choices[0].message.content, "Echo: hello")
                async with client.responses.stream(model=CODEX, input="hello") as response:
                    final = await response.get_final_response()
                self.assertEqual(final.output_text, "Echo: hello")
                async with claude.messages.stream(model=SONNET, max_tokens=100,
                                                  messages=[user("hello")]) as message:
                    self.assertEqual(await message.get_final_text(), "Echo: hello")
        self.run_async(work())

    def test_lists_and_embeddings(self) -> None:
        async def work() -> None:
            async with self.async_openai(strict=False) as client, \
                    self.async_anthropic() as claude:
                self.assertIn(CODEX, [m.id async for m in client.models.list()])
                self.assertIn(SONNET, [m.id async for m in claude.models.list()])
                answer = await client.embeddings.create(model="text-embedding-3-small", input="a")
                self.assertEqual(answer.data[0].embedding, make_vector("a", 16))
                counted = await claude.messages.count_tokens(model=SONNET, messages=[user("hi")])
                self.assertGreater(counted.input_tokens, 0)
        self.run_async(work())

    def test_closed_midway_ends_upstream(self) -> None:
        async def work() -> None:
            async for stream in self.open_streams("@@events=9 stall=3@@"):
                await stream.__anext__()
                await stream.close()
        self.run_async(work())
        self.assertTrue(self.fake.wait_for(lambda: self.fake.aborted == 3))
        self.assertTrue(self.fake.wait_for(lambda: self.fake.open_streams == 0))

    def test_cancelled_task_ends_upstream(self) -> None:
        async def work() -> None:
            async for stream in self.open_streams("@@events=9 stall=3@@"):
                began = asyncio.Event()

                async def read(stream: Any = stream, began: asyncio.Event = began) -> None:
                    async with stream:
                        async for _ in stream:
                            began.set()

                task = asyncio.ensure_future(read())
                await began.wait()
                task.cancel()
                with self.assertRaises(asyncio.CancelledError):
                    await task
        self.run_async(work())
        self.assertTrue(self.fake.wait_for(lambda: self.fake.aborted == 3))

    def test_cancelled_before_the_first_byte_ends_upstream(self) -> None:
        self.fake.script(MESSAGES, Answer(status=0, hold=True))

        async def work() -> None:
            async with self.async_anthropic() as claude:
                task = asyncio.ensure_future(claude.messages.create(
                    model=SONNET, max_tokens=500, messages=[user("hi")]))
                held = await asyncio.get_running_loop().run_in_executor(
                    None, lambda: self.fake.wait_for(lambda: self.fake.holding == 1))
                self.assertTrue(held)
                task.cancel()
                with self.assertRaises(asyncio.CancelledError):
                    await task
        self.run_async(work())
        self.assertTrue(self.fake.wait_for(lambda: self.fake.aborted == 1))

    def test_cut_streams_raise(self) -> None:
        async def work() -> None:
            events: list[Any] = []
            raised = 0
            async for stream in self.open_streams("@@events=9 cut=3@@"):
                try:
                    async for event in stream:
                        events.append(event)
                except (openai.APIError, anthropic.APIError):
                    raised += 1
            self.assertEqual(raised, 2)
            self.assertEqual([e.type for e in events if field(e, "response")][-1:],
                             ["response.failed"])
        self.run_async(work())

    def test_ten_clients_at_once(self) -> None:
        async def one(number: int) -> str:
            prompt = "number %d @@bytewise=%d@@" % (number, number % 2)
            if number % 3 == 0:
                async with self.async_openai() as client:
                    chunks = await client.chat.completions.create(
                        model="gpt-4.1", messages=[user(prompt)], stream=True)
                    return "".join([c.choices[0].delta.content or ""
                                    async for c in chunks if c.choices])
            if number % 3 == 1:
                async with self.async_openai() as client:
                    async with client.responses.stream(model=CODEX, input=prompt) as stream:
                        return (await stream.get_final_response()).output_text
            async with self.async_anthropic() as claude:
                async with claude.messages.stream(model=SONNET, max_tokens=100,
                                                  messages=[user(prompt)]) as message:
                    return await message.get_final_text()

        async def work() -> None:
            texts = await asyncio.gather(*[one(number) for number in range(CLIENTS_AT_ONCE)])
            self.assertEqual(texts, ["Echo: number %d" % n for n in range(CLIENTS_AT_ONCE)])
        self.run_async(work())
        self.assertEqual(self.fake.exchanges, 1)


class EveryFamily(SdkCase):
    """Each SDK's accumulator and types on a model of every family, whatever endpoint it has: text,
    one and two tool calls, their results, reasoning; streams and bodies."""

    #: (model, does it show reasoning when it is asked with an effort)
    FAMILIES = (("gpt-4.1", False), (CODEX, True), ("gpt-5-mini", True), (SONNET, True),
                (HAIKU, True), ("claude-opus-4.7", True), ("claude-only-4.6", True),
                ("gemini-3.1-pro-preview", True), ("grok-code-fast-1", False))
    PROMPTS = (("hi", 0), ("use the tool", 1), ("use parallel tool calls", 2))
    THOUGHT = "The user wants an echo."
    FUNCTION: Any = dict(FUNCTION, parameters=PLAIN_SCHEMA)
    TOOL: Any = dict(MESSAGE_TOOL, input_schema=PLAIN_SCHEMA)

    def setUp(self) -> None:
        super().setUp()
        sonnet = next(entry for entry in self.fake.models if entry["id"] == SONNET)
        self.fake.models.append(dict(sonnet, id="claude-only-4.6",
                                     supported_endpoints=[MESSAGES]))

    def each_case(self, check: Callable[[str, bool, str, int, bool], None]) -> None:
        for model, reasons in self.FAMILIES:
            for prompt, count in self.PROMPTS:
                for streamed in (True, False):
                    with self.subTest(model=model, prompt=prompt, streamed=streamed):
                        check(model, reasons, prompt, count, streamed)

    def check(self, model: str, answer_model: str, calls: list[tuple[str, Any]], count: int,
              thought: str, reasons: bool) -> None:
        self.assertEqual(answer_model, model)
        self.assertEqual([arguments for _, arguments in calls], [{"city": "Paris"}] * count)
        self.assertEqual(len({call_id for call_id, _ in calls}), count)
        self.assertEqual(thought, self.THOUGHT if reasons else "")

    def test_chat(self) -> None:
        client = self.openai_client()

        def ask(history: list[Any], model: str, reasons: bool, streamed: bool) -> Any:
            more: Any = {"reasoning_effort": "high"} if reasons and model != HAIKU else {}
            if not streamed:
                return client.chat.completions.create(
                    model=model, messages=history, tools=[CHAT_TOOL], **more)
            with client.chat.completions.stream(
                    model=model, messages=history, tools=[STRICT_PLAIN],
                    stream_options={"include_usage": True}, **more) as stream:
                kinds = [event.type for event in stream]
                self.assertIn("chunk", kinds)
                return stream.get_final_completion()

        def check(model: str, reasons: bool, prompt: str, count: int, streamed: bool) -> None:
            history: list[Any] = [user(prompt)]
            answer = ask(history, model, reasons, streamed)
            self.assertEqual(len(answer.choices), 1)
            choice = answer.choices[0]
            calls = choice.message.tool_calls or []
            self.check(model, answer.model, [
                (call.id, json.loads(field(call, "function").arguments)) for call in calls], count,
                field(choice.message, "reasoning_content") or "", reasons)
            self.assertEqual(choice.finish_reason, "tool_calls" if count else "stop")
            self.assertGreater(field(answer.usage, "total_tokens"), 0)
            history += [choice.message.to_dict()] + [
                {"role": "tool", "tool_call_id": call.id, "content": "sun"} for call in calls]
            if count:
                answer = ask(history, model, reasons, streamed)
                self.assertIn("tool result: sun", answer.choices[0].message.content or "")
            else:
                self.assertEqual(choice.message.content, "Echo: hi")

        self.each_case(check)

    def test_responses(self) -> None:
        client = self.openai_client()

        def ask(history: list[Any], model: str, reasons: bool, streamed: bool) -> Any:
            more: Any = {"reasoning": {"effort": "high", "summary": "auto"}} if reasons else {}
            if not streamed:
                return client.responses.create(model=model, input=history, tools=[self.FUNCTION],
                                               **more)
            with client.responses.stream(model=model, input=history, tools=[self.FUNCTION],
                                         **more) as stream:
                self.assertEqual([event.type for event in stream][-1], "response.completed")
                return stream.get_final_response()

        def check(model: str, reasons: bool, prompt: str, count: int, streamed: bool) -> None:
            history: list[Any] = [user(prompt)]
            answer = ask(history, model, reasons, streamed)
            calls = [item for item in answer.output if item.type == "function_call"]
            thought = "".join(part.text for item in answer.output if item.type == "reasoning"
                              for part in item.summary)
            self.check(model, answer.model, [
                (call.call_id, json.loads(call.arguments)) for call in calls], count, thought,
                reasons)
            self.assertEqual(answer.status, "completed")
            self.assertGreater(field(answer.usage, "total_tokens"), 0)
            history += [item.to_dict() for item in answer.output] + [
                {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
                for call in calls]
            if count:
                self.assertIn("tool result: sun",
                              ask(history, model, reasons, streamed).output_text)
            else:
                self.assertEqual(answer.output_text, "Echo: hi")

        self.each_case(check)

    def test_messages(self) -> None:
        client = self.anthropic_client()

        def ask(history: list[Any], model: str, reasons: bool, streamed: bool) -> Any:
            more: Any = {}
            if reasons:
                more = {"thinking": {"type": "enabled", "budget_tokens": 2000}}
                if model == "claude-opus-4.7":               # hides it otherwise
                    more = {"thinking": {"type": "adaptive", "display": "summarized"}}
            if not streamed:
                return client.messages.create(model=model, max_tokens=4000, messages=history,
                                              tools=[self.TOOL], **more)
            with client.messages.stream(model=model, max_tokens=4000, messages=history,
                                        tools=[self.TOOL], **more) as stream:
                self.assertIn("message_stop", [event.type for event in stream])
                return stream.get_final_message()

        def check(model: str, reasons: bool, prompt: str, count: int, streamed: bool) -> None:
            history: list[Any] = [user(prompt)]
            answer = ask(history, model, reasons, streamed)
            calls = [block for block in answer.content if block.type == "tool_use"]
            thought = "".join(block.thinking for block in answer.content
                              if block.type == "thinking")
            self.check(model, answer.model, [(call.id, call.input) for call in calls], count,
                       thought, reasons)
            self.assertEqual(answer.stop_reason, "tool_use" if count else "end_turn")
            self.assertGreater(answer.usage.output_tokens, 0)
            if not count:
                self.assertEqual(answer.content[-1].text, "Echo: hi")
                return
            history += [{"role": "assistant", "content": [b.to_dict() for b in answer.content]},
                        user([{"type": "tool_result", "tool_use_id": call.id, "content": "sun"}
                              for call in calls])]
            answer = ask(history, model, reasons, streamed)
            self.assertIn("tool result: sun", answer.content[-1].text)

        self.each_case(check)


class TypedParsers(SdkCase):
    """A schema asked for by each SDK's typed parser, of models of every family."""

    def setUp(self) -> None:
        super().setUp()
        self.tools = 0
        tell = fake_upstream.answer

        def tell_city(*given: Any) -> Any:
            said = tell(*given)
            if not said.calls:
                said.pieces = ['{"city"', ': "Par', 'is"}']
            return said

        patch = unittest.mock.patch.object(fake_upstream, "answer", tell_city)
        patch.start()
        self.addCleanup(patch.stop)
        grok = next(entry for entry in self.fake.models if entry["id"] == "grok-code-fast-1")
        self.fake.models.append(copy.deepcopy(dict(grok, id="grok-no-schemas")))
        self.fake.models[-1]["capabilities"]["supports"]["structured_outputs"] = False

    def each_model(self, check: Callable[[str], Any]) -> None:
        for model in ("gpt-4.1", CODEX, "gpt-5-mini", SONNET, "claude-opus-4.7",
                      "gemini-3.1-pro-preview", "grok-no-schemas"):
            with self.subTest(model=model):
                self.assertEqual(check(model), City(city="Paris"))
                sent = self.fake.last()
                self.assertIn(b'"city"', sent.body)
                if model == "grok-no-schemas" and "response_format" not in sent.json:
                    self.assertEqual(len(sent.json["tools"]), 1)       # one to be filled in
                    self.tools += 1

    def test_chat(self) -> None:
        client = self.openai_client()

        def streamed(model: str) -> Any:
            with client.chat.completions.stream(model=model, messages=[user("where?")],
                                                response_format=City) as stream:
                return stream.get_final_completion().choices[0].message.parsed

        self.each_model(streamed)
        self.each_model(lambda model: client.chat.completions.parse(
            model=model, messages=[user("where?")],
            response_format=City).choices[0].message.parsed)

    def test_responses(self) -> None:
        client = self.openai_client()

        def streamed(model: str) -> Any:
            with client.responses.stream(model=model, input="where?", text_format=City) as stream:
                return stream.get_final_response().output_parsed

        self.each_model(streamed)
        self.each_model(lambda model: client.responses.parse(
            model=model, input="where?", text_format=City).output_parsed)
        self.assertEqual(self.tools, 2)

    def test_messages(self) -> None:
        client = self.anthropic_client()

        def streamed(model: str) -> Any:
            with client.messages.stream(model=model, max_tokens=500, messages=[user("where?")],
                                        output_format=City) as stream:
                return stream.get_final_message().parsed_output

        self.each_model(streamed)
        self.each_model(lambda model: client.messages.parse(
            model=model, max_tokens=500, messages=[user("where?")],
            output_format=City).parsed_output)
        self.assertEqual(self.tools, 2)


if __name__ == "__main__":
    sys.exit(unittest.main())
