"""Answers as clients can use them: failures inside a 200, held-back ends, the same fields whole and
streamed, for every dialect of the client and of the upstream."""
from __future__ import annotations

import json
import unittest
from typing import Any, Iterator

from support import (REQUESTS, SLOW, ProxyCase, Reply, chat, cp, message,
                     response as ask_responses)
from fake_upstream import CHAT, MESSAGES, RESPONSES, TOLD_CODES, Answer

CHAT_MODEL = "gpt-4.1"


def sse(*events: Any) -> list[bytes]:
    """Each event as a frame; those with a type are named by it."""
    frames = []
    for event in events:
        data = event if isinstance(event, str) else json.dumps(event)
        kind = event.get("type", "") if isinstance(event, dict) else ""
        frames.append(("event: %s\n" % kind if kind else "").encode()
                      + b"data: " + data.encode() + b"\n\n")
    return frames


def events_in(data: bytes) -> list[Any]:
    decoder = cp.SSEDecoder()
    return [json.loads(frame.data) for frame in decoder.feed(data) + decoder.close()
            if frame.data != b"[DONE]"]


def chunk(delta: Any = None, reason: Any = None, **more: Any) -> dict[str, Any]:
    """A chat chunk; delta None: without choices."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason}]
    beside = {key: more.pop(key) for key in list(more) if key == "logprobs"}
    for choice in choices:
        choice.update(beside)
    return dict({"id": "c1", "object": "chat.completion.chunk", "created": 5,
                 "model": CHAT_MODEL, "choices": choices}, **more)


def call(index: int, **fields: Any) -> dict[str, Any]:
    inner = {key: fields.pop(key) for key in ("name", "arguments") if key in fields}
    return {"tool_calls": [dict({"index": index, "function": inner}, **fields)]}


def response(kind: str, **more: Any) -> dict[str, Any]:
    """An event of /responses."""
    return dict({"type": "response." + kind}, **more)


def block(kind: str, **more: Any) -> dict[str, Any]:
    """An event of /v1/messages about the block 0, unless it says another."""
    return dict({"type": "content_block_" + kind, "index": 0}, **more)


START = {
    "chat": [chunk({"role": "assistant", "content": ""})],
    "messages": [{"type": "message_start", "message": {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [],
        "usage": {"input_tokens": 7, "output_tokens": 1}}}, {"type": "ping"}],
    "responses": [response("created", response={"id": "resp_1", "status": "in_progress"}),
                  response("in_progress", response={"id": "resp_1", "status": "in_progress"})]}
#: a finished thinking, without and with words that a user sees
REASONING_ITEM = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "E"}
HIDDEN = {
    "chat": [chunk({"reasoning_opaque": "E"})],
    "messages": [block("start", content_block={"type": "thinking", "thinking": ""}),
                 block("delta", delta={"type": "signature_delta", "signature": "E"}),
                 block("stop")],
    "responses": [response("output_item.added", output_index=0, item=REASONING_ITEM),
                  response("output_item.done", output_index=0, item=REASONING_ITEM)]}
SHOWN = {
    "chat": [chunk({"reasoning_text": "Hm"}), chunk({"reasoning_opaque": "E"})],
    "messages": [HIDDEN["messages"][0],
                 block("delta", delta={"type": "thinking_delta", "thinking": "Hm"}),
                 *HIDDEN["messages"][1:]],
    "responses": [HIDDEN["responses"][0],
                  response("reasoning_summary_text.delta", output_index=0, item_id="rs_1",
                           summary_index=0, delta="Hm"), HIDDEN["responses"][1]]}
TEXT = {
    "chat": [chunk({"content": "Hi"})],
    "messages": [block("start", index=1, content_block={"type": "text", "text": ""}),
                 block("delta", index=1, delta={"type": "text_delta", "text": "Hi"}),
                 block("stop", index=1)],
    "responses": [response("output_item.added", output_index=1, item={
        "type": "message", "id": "msg_1", "role": "assistant", "content": []}),
        response("output_text.delta", output_index=1, item_id="msg_1", content_index=0,
                 delta="Hi")]}
END = {
    "chat": [chunk({}, "stop"), "[DONE]"],
    "messages": [{"type": "message_delta", "delta": {"stop_reason": "end_turn"},
                  "usage": {"output_tokens": 3}}, {"type": "message_stop"}],
    "responses": [response("completed", response={
        "id": "resp_1", "status": "completed", "output": [],
        "usage": {"input_tokens": 7, "output_tokens": 3, "total_tokens": 10}})]}
CLOSES = {"chat": (), "messages": ("content_block_stop",),
          "responses": ("response.output_item.done",)}
NAMES = tuple(START)
CELLS = [(client, upstream) for client in NAMES for upstream in NAMES]


def failing(upstream: str, code: str, message: str = "no") -> list[bytes]:
    """The event by which an upstream tells a failure inside a stream."""
    error = {"code": code, "message": message}
    return sse({"chat": {"error": error},
                "messages": {"type": "error", "error": {"type": code, "message": message}},
                "responses": response("failed", response={
                    "id": "resp_1", "status": "failed", "error": error})}[upstream])


def open_relay(client: str, upstream: str, **fields: Any) -> cp.StreamRelay:
    """The pipeline from an upstream to a client, fields: of the client's request."""
    request = cp.Request("asked", client, now=1790000000, key="k", **fields)
    if client == upstream:
        return cp.DIALECTS[client].stream("asked", {}, request)
    return cp.TranslatedStream(cp.DIALECTS[client], cp.DIALECTS[upstream], request)


def relayed(client: str, upstream: str, frames: list[bytes], **fields: Any
            ) -> tuple[list[Any], cp.StreamRelay]:
    """What a client gets of whole frames; asserts that every cut gives the same."""
    data = b"".join(frames)
    found = []
    for size in (len(data), 1, 7):
        relay = open_relay(client, upstream, **fields)
        out = b"".join([relay.feed(data[at:at + size]) for at in range(0, len(data), size)])
        found.append(out + relay.close())
    assert found[0] == found[1] == found[2], found
    return events_in(found[0]), relay


def kinds_of(events: list[Any]) -> Iterator[str]:
    for event in events:
        yield str(event.get("type"))


class NamedFailures(unittest.TestCase):
    """One table says what a code, a type or a status of an upstream means."""

    MEANINGS = (
        (402, "quota_exceeded", "free_quota_exceeded", "session_quota_exceeded",
         "overage_limit_reached", "billing_not_configured", "insufficient_quota"),
        (429, "rate_limited", "user_model_rate_limited:gpt-5", "user_global_rate_limited:pro",
         "user_weekly_rate_limited", "integration_rate_limited", "agent_mode_limit_exceeded",
         "rate_limit_error", "rate_limit_exceeded", "RESOURCE_EXHAUSTED", 429, "429"),
        (529, "model_overloaded", "overloaded_error", "server_is_overloaded"),
        (503, "UNAVAILABLE", "service_unavailable", 503),
        (500, "server_error", "internal_error", "api_error", "INTERNAL"),
        (400, "invalid_request_error", "context_length_exceeded", "INVALID_ARGUMENT"),
        (0, None, "", "failed", "error", 7, True, [], {}, "gpt-5"))

    def test_the_status_of_a_name(self) -> None:
        for status, *names in self.MEANINGS:
            for name in names:
                self.assertEqual(cp.status_of(name), status, name)

    def test_a_failure_is_known_in_every_shape(self) -> None:
        for code, status, types in (
                ("rate_limited", 429, ("rate_limit_error", "rate_limit_error")),
                ("model_overloaded", 529, ("server_error", "overloaded_error")),
                ("quota_exceeded", 402, ("insufficient_quota", "permission_error")),
                ("server_error", 500, ("server_error", "api_error"))):
            for shape in (
                    {"error": {"message": "no", "code": code}},
                    {"error": {"message": "no", "type": code}},
                    {"error": {"message": "no", "status": code.upper()}},
                    {"type": "error", "error": {"type": code, "message": "no"}},
                    {"type": "error", "code": code, "message": "no"},
                    {"status": "failed", "error": {"code": code, "message": "no"}},
                    {"error": {"message": '{"error":{"code":"%s","message":"no"}}' % code}}):
                error = cp.reported_error(shape)
                self.assertEqual((str(error), error.status, error.types()[:2], error.answered),
                                 ("no", status, types, True), shape)

    def test_a_limit_under_another_status_is_a_limit(self) -> None:
        for status, name, true in ((400, "rate_limited", 429), (403, "quota_exceeded", 402),
                                   (500, "overloaded_error", 529), (503, "rate_limited", 429),
                                   (429, "quota_exceeded", 429), (402, "rate_limited", 402),
                                   (404, "server_error", 404), (503, "overloaded", 503)):
            self.assertEqual(cp.true_status(status, [None, name]), true, (status, name))

    def test_codes_that_codex_acts_on(self) -> None:
        for name, code in (("quota_exceeded", "insufficient_quota"),
                           ("user_global_rate_limited:pro", "rate_limit_exceeded"),
                           ("model_overloaded", "server_is_overloaded"), ("other", "other")):
            error = cp.reported_error({"error": {"code": name, "message": "no"}})
            self.assertEqual(error.response_code, code)


class HeldEnds(unittest.TestCase):
    """A client can recover from a failure right behind a finished thinking."""

    def test_a_thinking_is_closed_together_with_what_follows(self) -> None:
        for client, upstream in CELLS:
            with self.subTest(client=client, upstream=upstream):
                relay = open_relay(client, upstream)
                out = relay.feed(b"".join(sse(*START[upstream], *SHOWN[upstream])))
                for kind in CLOSES[client]:
                    self.assertNotIn(kind, list(kinds_of(events_in(out))))
                out = relay.feed(b"".join(sse(*TEXT[upstream])))
                for kind in CLOSES[client]:
                    self.assertIn(kind, list(kinds_of(events_in(out))))

    def test_a_failure_behind_a_thinking_leaves_it_open(self) -> None:
        for client, upstream in CELLS:
            for thinking in (HIDDEN, SHOWN):
                for last in (failing(upstream, "server_error"), []):
                    with self.subTest(client=client, upstream=upstream, last=last):
                        events, relay = relayed(client, upstream, sse(
                            *START[upstream], *thinking[upstream]) + last)
                        self.assertTrue(relay.failure)
                        for kind in CLOSES[client]:
                            self.assertNotIn(kind, list(kinds_of(events)))

    def test_nothing_is_lost_of_a_stream_that_ends_well(self) -> None:
        for client, upstream in CELLS:
            with self.subTest(client=client, upstream=upstream):
                events, relay = relayed(client, upstream, sse(
                    *START[upstream], *SHOWN[upstream], *TEXT[upstream], *END[upstream]))
                self.assertIsNone(relay.failure)
                text = json.dumps(events)
                self.assertIn('"Hm"', text)
                self.assertIn('"Hi"', text)
                for kind in CLOSES[client]:
                    self.assertEqual(list(kinds_of(events)).count(kind),
                                     2 if client != upstream or client == "messages" else 1)

    def test_a_relay_knows_whether_it_has_shown_anything(self) -> None:
        for client, upstream in CELLS:
            with self.subTest(client=client, upstream=upstream):
                relay = open_relay(client, upstream)
                relay.feed(b"".join(sse(*START[upstream], *HIDDEN[upstream])))
                self.assertFalse(relay.has_content)
                relay.feed(b"".join(sse(*TEXT[upstream])))
                self.assertTrue(relay.has_content)

                relay = open_relay(client, upstream)
                relay.feed(b"".join(sse(*START[upstream], *SHOWN[upstream])))
                self.assertTrue(relay.has_content)

    def test_a_failure_before_any_content_is_there_as_an_error(self) -> None:
        for client, upstream in CELLS:
            for code, status in (("rate_limited", 429), ("overloaded_error", 529),
                                 ("quota_exceeded", 402), ("server_error", 500)):
                with self.subTest(client=client, upstream=upstream, code=code):
                    _, relay = relayed(client, upstream, sse(
                        *START[upstream], *HIDDEN[upstream]) + failing(upstream, code))
                    self.assertFalse(relay.has_content)
                    assert relay.error is not None
                    self.assertEqual((relay.error.status, str(relay.error)), (status, "no"))


class FailuresInStreams(unittest.TestCase):
    def test_the_event_has_the_type_of_the_clients_dialect(self) -> None:
        types = {"rate_limited": ("rate_limit_error", "rate_limit_error", "rate_limit_exceeded"),
                 "user_model_rate_limited:x": (
                     "rate_limit_error", "rate_limit_error", "rate_limit_exceeded"),
                 "model_overloaded": ("server_error", "overloaded_error", "server_is_overloaded"),
                 "quota_exceeded": (
                     "insufficient_quota", "permission_error", "insufficient_quota"),
                 "server_error": ("server_error", "api_error", "server_error")}
        for client, upstream in CELLS:
            for code, (of_chat, of_messages, of_responses) in types.items():
                with self.subTest(client=client, upstream=upstream, code=code):
                    events, relay = relayed(client, upstream, sse(
                        *START[upstream], *TEXT[upstream]) + failing(upstream, code))
                    last = events[-1]
                    if client == "responses":
                        self.assertEqual(last["type"], "response.failed")
                        self.assertEqual(last["response"]["error"]["code"], of_responses)
                    else:
                        self.assertEqual(last["error"]["type"],
                                         of_chat if client == "chat" else of_messages)
                    self.assertEqual(relay.failure, "no")

    def test_a_failure_in_a_whole_answer_is_one(self) -> None:
        for name in NAMES:
            for code, status in (("rate_limited", 429), ("server_error", 500)):
                (frame,) = failing(name, code)
                body = json.loads(cp.Frame.parse(frame).data)
                with self.assertRaises(cp.UpstreamError) as caught:
                    cp.DIALECTS[name].check_answer(body.get("response", body))
                self.assertEqual(caught.exception.status, status)
        with self.assertRaises(cp.UpstreamError):
            cp.CHAT.check_answer({"choices": [{"finish_reason": "error", "message": {}}]})

    def test_errors_before_the_stream_have_ids_and_times_of_their_own(self) -> None:
        ids = set()
        for key in ("one", "two"):
            request = cp.Request("asked", now=1790000001, key=key, echo={"instructions": "Be"})
            for relay in (cp.RESPONSES.stream("asked", {}, request),
                          cp.TranslatedStream(cp.RESPONSES, cp.CHAT, request)):
                answer = events_in(relay.close(cp.UpstreamError("no")))[-1]["response"]
                self.assertEqual(answer["created_at"], 1790000001)
                ids.add(answer["id"])
        self.assertEqual(len(ids), 2)


class ChatDiagonal(unittest.TestCase):
    """Chat client, chat model."""

    def read(self, *events: Any, wants_usage: bool = True) -> list[Any]:
        body = {"stream_options": {"include_usage": wants_usage}}
        relay = cp.CHAT.stream("asked", body, cp.Request("asked", now=9, key="k"))
        found = events_in(relay.feed(b"".join(sse(*events, "[DONE]"))) + relay.close())
        self.assertIsNone(relay.failure)
        return found

    def test_the_first_delta_has_role_and_content(self) -> None:
        for delta in ({"content": "Hi"}, {"role": "assistant"}, {"content": None},
                      {"reasoning_text": "Hm"}, call(0, id="a", name="f", arguments="")):
            first = self.read(chunk(delta), chunk({}, "stop"))[0]["choices"][0]["delta"]
            self.assertEqual((first["role"], first["content"]),
                             ("assistant", delta.get("content") or ""), delta)

    def test_usage_without_a_count_wipes_nothing(self) -> None:
        real = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        for empty in ({}, None, {"prompt_tokens": 0, "completion_tokens": 0}, [], "x"):
            events = self.read(chunk({"content": "Hi"}), chunk(None, usage=real),
                               chunk({}, "stop", usage=empty))
            self.assertEqual(events[-1]["usage"], real, empty)

    def test_logprobs_fingerprint_and_tier_stay(self) -> None:
        tokens = [{"token": "Hi", "logprob": -0.1, "bytes": None, "top_logprobs": []}]
        more = {"system_fingerprint": "fp_1", "service_tier": "default"}
        events = self.read(chunk({"content": "Hi"}, logprobs={"content": tokens}, **more),
                           chunk({}, logprobs={"content": tokens}), chunk({}, "stop"))
        for event in events:
            self.assertEqual((event["system_fingerprint"], event["service_tier"]),
                             ("fp_1", "default"))
        found = [event["choices"][0].get("logprobs") for event in events]
        self.assertEqual(found, [{"content": tokens}, {"content": tokens}, None])

    def test_annotations_and_refusals_stay(self) -> None:
        note = {"type": "url_citation", "url_citation": {"url": "u", "title": "t"}}
        events = self.read(chunk({"content": "Hi"}), chunk({"annotations": [note]}),
                           chunk({"refusal": "No"}), chunk({}, "stop"))
        deltas = [event["choices"][0]["delta"] for event in events]
        self.assertEqual(deltas[1:3], [{"annotations": [note]}, {"refusal": "No"}])

    def test_a_call_begins_when_its_name_is_known(self) -> None:
        late = [call(0, id="a"), call(0, arguments='{"x"'), call(0, name="f"),
                call(0, arguments=":1}")]
        for deltas in (late, [call(0, id="a", name=None), *late[1:]],
                       [call(0, id="a", name=""), *late[1:]],
                       [call(0, arguments='{"x"'), call(0, id="a"), *late[2:]]):
            events = self.read(*map(chunk, deltas), chunk({}, "tool_calls"))
            calls = [one for event in events
                     for one in event["choices"][0]["delta"].get("tool_calls", ())]
            self.assertEqual((calls[0]["id"], calls[0]["function"]["name"], calls[0]["type"]),
                             ("a", "f", "function"))
            self.assertEqual("".join(one["function"].get("arguments", "") for one in calls),
                             '{"x":1}')
            self.assertTrue(all("name" not in one["function"] for one in calls[1:]))

    def test_a_call_that_is_never_named_is_not_lost(self) -> None:
        events = self.read(chunk(call(0, id="a", arguments="{}")), chunk({}, "tool_calls"))
        calls = [one for event in events
                 for one in event["choices"][0]["delta"].get("tool_calls", ())]
        self.assertEqual(calls, [{"index": 0, "id": "a", "type": "function",
                                  "function": {"arguments": "{}"}}])
        self.assertEqual(events[-1]["choices"][0]["finish_reason"], "tool_calls")

    def test_logprobs_of_split_choices_are_joined_in_a_whole_answer(self) -> None:
        tokens = [{"token": name, "logprob": 0} for name in "ab"]
        answer = {"choices": [{"message": {"content": "a"}, "logprobs": {"content": tokens[:1]}},
                              {"message": {"content": "b"}, "logprobs": {"content": tokens[1:]}}]}
        cp.CHAT.mend(answer, "asked")
        (choice,) = answer["choices"]
        self.assertEqual(choice["message"]["content"], "ab")
        self.assertEqual(choice["logprobs"], {"content": tokens})

    def test_what_lacks_an_id_and_a_time_gets_fresh_ones(self) -> None:
        for key in ("one", "two"):
            answer = {"choices": [{"index": 0, "finish_reason": "stop",
                                   "message": {"role": "assistant", "content": "a"}}]}
            cp.CHAT.mend(answer, "asked", cp.Request("asked", now=9, key=key))
            self.assertEqual(answer["created"], 9)
            self.assertEqual(answer["id"], cp.stable_id("chatcmpl-", key))


class MessagesDiagonal(unittest.TestCase):
    def test_usage_without_counts_is_filled(self) -> None:
        for usage in (None, {}, {"output_tokens": None}):
            events, relay = relayed("messages", "messages", sse(
                *START["messages"], *TEXT["messages"],
                {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage},
                {"type": "message_stop"}))
            self.assertEqual(events[-2]["usage"]["output_tokens"], 1)
            self.assertEqual(relay.meter.counts, {"input": 7, "output": 1})

    def test_a_failure_in_anothers_shape_becomes_anthropics(self) -> None:
        frames = sse(*START["messages"], {"error": {"code": "rate_limited", "message": "no"}})
        events, relay = relayed("messages", "messages", frames)
        self.assertEqual(events[-1], {"type": "error", "error": {
            "type": "rate_limit_error", "message": "no"}})
        self.assertTrue(relay.ended)


class ResponsesDiagonal(unittest.TestCase):
    def test_a_call_begins_when_its_name_is_known(self) -> None:
        item = {"type": "function_call", "id": "fc_1", "call_id": "a", "arguments": ""}
        delta = response("function_call_arguments.delta", output_index=0, item_id="fc_1",
                         delta="{}")
        done = response("function_call_arguments.done", output_index=0, item_id="fc_1",
                        arguments="{}")
        whole = response("output_item.done", output_index=0,
                         item=dict(item, name="f", arguments="{}"))
        for name in ({}, {"name": ""}, {"name": None}):
            for named in ([done, whole], [dict(done, name="f"), whole]):
                added = response("output_item.added", output_index=0, item=dict(item, **name))
                events, _ = relayed("responses", "responses", sse(
                    *START["responses"], added, delta, *named, *END["responses"]))
                found = [event for event in events if event["type"] == added["type"]]
                self.assertEqual([event["item"]["name"] for event in found], ["f"])
                kinds = list(kinds_of(events))
                self.assertLess(kinds.index(added["type"]), kinds.index(delta["type"]))
                numbers = [event["sequence_number"] for event in events]
                self.assertEqual(numbers, sorted(set(numbers)))

    def test_what_the_upstream_does_not_echo_is_filled(self) -> None:
        body = {"instructions": "Be", "metadata": {"a": "b"}, "temperature": 0.5,
                "tools": [{"type": "function", "name": "f"}], "tool_choice": "required",
                "reasoning": {"effort": "low"}, "previous_response_id": "resp_0"}
        echo = cp.RESPONSES.echo_of(body)
        events, _ = relayed("responses", "responses", sse(
            *START["responses"], *TEXT["responses"], *END["responses"]), echo=echo)
        for at in (0, 1, -1):
            for name, value in dict(body, reasoning={"effort": "low", "summary": None}).items():
                self.assertEqual(events[at]["response"][name], value, (at, name))

        answer = {"id": "resp_1", "status": "completed", "output": [], "instructions": "Other"}
        cp.RESPONSES.mend(answer, "asked", cp.Request("asked", echo=echo))
        self.assertEqual((answer["instructions"], answer["metadata"]), ("Other", {"a": "b"}))


#: dialect of a client -> its path and how it asks; of an upstream -> its path and a model of it
CLIENTS = {"chat": ("/v1/chat/completions", chat), "messages": ("/v1/messages", message),
           "responses": ("/v1/responses", ask_responses)}
UPSTREAMS = {"chat": (CHAT, "gpt-4.1"), "messages": (MESSAGES, "claude-only-4.6"),
             "responses": (RESPONSES, "gpt-5.3-codex")}


class BeforeTheFirstByte(ProxyCase):
    """What fails before anything was shown is answered by its status, or asked again."""

    def setUp(self) -> None:
        super().setUp()
        only = dict(next(m for m in self.fake.models if m["id"] == "claude-sonnet-4.6"),
                    id="claude-only-4.6", supported_endpoints=[MESSAGES])
        self.fake.models.append(only)

    def ask(self, client: str, upstream: str, text: str, stream: bool, **more: Any) -> Reply:
        path, make = CLIENTS[client]
        body = dict(make(text, UPSTREAMS[upstream][1], **more), stream=stream)
        return self.proxy.post(path, body)

    def calls(self, upstream: str) -> int:
        path = UPSTREAMS[upstream][0]
        return sum(record.path == path for record in self.fake.requests)

    def error_of(self, reply: Reply) -> Any:
        return reply.json["error"]

    def test_told_failures_are_real_statuses(self) -> None:
        statuses = {"rate_limited": 429, "user_model_rate_limited:this": 429,
                    "model_overloaded": 529,
                    "quota_exceeded": 402, "session_quota_exceeded": 402, "server_error": 500}
        types = {429: ("rate_limit_error", "rate_limit_error"),
                 402: ("insufficient_quota", "permission_error"),
                 529: ("server_error", "overloaded_error"), 500: ("server_error", "api_error")}
        for client, upstream in CELLS if SLOW else CELLS[::4]:
            for code, status in statuses.items():
                for stream in (True, False):
                    with self.subTest(client=client, upstream=upstream, code=code, stream=stream):
                        self.proxy.post("/limits/clear", {})
                        before = self.calls(upstream)
                        marker = "@@events=3 error=0 told=1 reasoning=0 code=%d@@"
                        reply = self.ask(client, upstream, marker % TOLD_CODES.index(code), stream)
                        self.assertEqual(reply.status, status, reply)
                        error = self.error_of(reply)
                        self.assertEqual(error["type"], types[status][client == "messages"])
                        self.assertIn("fake stream error", error["message"])
                        is_limit = status in (402, 429)
                        self.assertEqual(self.calls(upstream) - before, 1 if is_limit else 2)
                        if status != 500:
                            self.assertGreaterEqual(int(reply.headers["retry-after"]), 1)
                        if is_limit:               # and now nothing is sent for a while
                            self.assertEqual(self.ask(client, upstream, "a", stream).status, status)
                            self.assertEqual(self.calls(upstream) - before, 1)

    def test_one_more_try_makes_it_good(self) -> None:
        for client, upstream in CELLS if SLOW else CELLS[::4]:
            for thinking in ([], HIDDEN[upstream]):
                for last in (failing(upstream, "server_error"),
                             failing(upstream, "overloaded_error"), []):
                    with self.subTest(client=client, upstream=upstream, last=last):
                        frames = sse(*START[upstream], *thinking) + last
                        self.fake.script(UPSTREAMS[upstream][0], Answer(
                            chunks=frames, end=bool(last)))
                        reply = self.ask(client, upstream, "hello @@reasoning=0@@", True)
                        self.assertEqual(reply.status, 200, reply)
                        self.assertIn(b"hello", reply.body)
                        self.assertNotIn(b"error", reply.body.replace(b'"error":null', b""))

    def test_a_stream_that_has_shown_something_is_not_asked_again(self) -> None:
        for client, upstream in CELLS:
            with self.subTest(client=client, upstream=upstream):
                before = self.calls(upstream)
                reply = self.ask(client, upstream, "@@events=3 error=1 reasoning=0@@", True)
                self.assertEqual(reply.status, 200)
                self.assertIn(b"fake stream error", reply.body)
                self.assertEqual(self.calls(upstream) - before, 1)

    def test_a_stream_that_is_cut_at_once_is_a_502(self) -> None:
        for path, make in REQUESTS:
            for more in ("", " rst=1"):
                reply = self.proxy.stream(path, make("@@events=5 reasoning=0 cut=0%s@@" % more))
                self.assertEqual(reply.status, 502)
                self.assertTrue(self.error_of(reply)["message"])

    def test_a_failure_told_in_place_of_embeddings(self) -> None:
        self.fake.script("/embeddings", Answer(body={
            "error": {"code": "rate_limited", "message": "slow down"}}))
        reply = self.proxy.post("/v1/embeddings", {
            "model": "text-embedding-3-small", "input": "a"})
        self.assertEqual((reply.status, self.error_of(reply)["message"]), (429, "slow down"))

    def test_the_wish_for_log_probabilities_crosses_over_or_is_named(self) -> None:
        include = "message.output_text.logprobs"
        for client, said in (("chat", {"logprobs": True, "top_logprobs": 2}),
                             ("responses", {"include": [include], "top_logprobs": 2})):
            for upstream in NAMES:
                reply = self.ask(client, upstream, "hi", False, **said)
                self.assertEqual(reply.status, 200, reply)
                sent = json.loads(self.fake.last(UPSTREAMS[upstream][0]).body)
                if upstream == "messages":
                    self.assertIn("logprobs", reply.headers["x-copilot-proxy-lossy"])
                elif upstream == "chat":
                    self.assertIs(sent["logprobs"], True)
                else:
                    self.assertIn(include, sent["include"])

    def test_headers_about_retries_are_passed(self) -> None:
        told = {"x-should-retry": "false", "retry-after-ms": "1500",
                "x-ratelimit-remaining-requests": "0", "anthropic-ratelimit-requests-limit": "5"}
        for client, upstream in CELLS:
            with self.subTest(client=client, upstream=upstream):
                self.proxy.post("/limits/clear", {})
                self.fake.script(UPSTREAMS[upstream][0], Answer(429, dict(told), {
                    "error": {"message": "slow down", "code": "rate_limited"}}))
                reply = self.ask(client, upstream, "a", False)
                self.assertEqual(reply.status, 429)
                self.assertEqual(reply.headers["retry-after"], "2")
                for name in told:
                    self.assertIn(name, reply.headers)
                self.assertLessEqual(int(reply.headers["retry-after-ms"]), 1500)


class WhatIsForeseenAndRepeated(ProxyCase):
    def test_message_start_foresees_the_prompt(self) -> None:
        for model in ("gpt-4.1", "gpt-5.3-codex"):
            for text, least, most in (("hello", 1, 50), ("many words " * 8000, 12000, 40000)):
                events = self.proxy.stream("/v1/messages", message(text, model)).events
                foreseen = events[0]["message"]["usage"]["input_tokens"]
                self.assertTrue(least < foreseen < most, foreseen)
                told = events[-2]["usage"]
                self.assertEqual(events[-2]["type"], "message_delta")
                self.assertNotEqual(told["input_tokens"], foreseen)
                self.assertGreater(told["output_tokens"], 0)

    def test_a_response_object_repeats_its_request(self) -> None:
        said = {"instructions": "Be brief.", "metadata": {"a": "b"}, "temperature": 0.5,
                "max_output_tokens": 50, "tool_choice": "auto", "parallel_tool_calls": False,
                "tools": [{"type": "function", "name": "f", "parameters": {
                    "type": "object", "properties": {}}}], "user": "me"}
        for model in ("gpt-4.1", "gpt-5.3-codex", "claude-sonnet-4.6"):
            body = ask_responses("hi", model, **said)
            whole = self.proxy.post("/v1/responses", body).json
            first = whole["id"]
            following = dict(body, input="and?", previous_response_id=first)
            answers = [whole, self.proxy.post("/v1/responses", following).json]
            for event in self.proxy.stream("/v1/responses", following).events:
                answers += [event["response"]] if "response" in event else []
            for at, answer in enumerate(answers):
                with self.subTest(model=model, at=at):
                    for name, value in said.items():
                        if name != "temperature" or model == "claude-sonnet-4.6":
                            self.assertEqual(answer[name], value, name)
                    self.assertEqual(answer.get("previous_response_id"), first if at else None)
            self.assertGreater(len(answers), 4)


class SameFields(unittest.TestCase):
    """What a whole answer carries a stream carries, too, in every dialect that has a word."""
    TOKENS = [{"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": []}]
    NOTE = {"url": "https://a.example", "title": "A", "start_index": 0, "end_index": 2}

    def upstream_events(self, upstream: str) -> list[Any]:
        if upstream == "chat":
            first = chunk({"content": "Hi"}, logprobs={"content": self.TOKENS},
                          system_fingerprint="fp", service_tier="default")
            note = {"type": "url_citation", "url_citation": self.NOTE}
            return [*START[upstream], first, chunk({"annotations": [note]}), *END[upstream]]
        if upstream == "messages":
            cite = {"type": "web_search_result_location", "url": self.NOTE["url"], "title": "A",
                    "cited_text": "words", "encrypted_index": "e"}
            return [*START[upstream], *TEXT[upstream][:2], block("delta", index=1, delta={
                "type": "citations_delta", "citation": cite}), TEXT[upstream][2], *END[upstream]]
        delta = dict(TEXT[upstream][1], logprobs=self.TOKENS)
        note = response("output_text.annotation.added", output_index=1, content_index=0,
                        item_id="msg_1", annotation_index=0,
                        annotation=dict(self.NOTE, type="url_citation"))
        return [*START[upstream], TEXT[upstream][0], delta, note, *END[upstream]]

    def test_citations_and_logprobs_cross_over(self) -> None:
        for client, upstream in CELLS:
            if client == upstream:
                continue
            with self.subTest(client=client, upstream=upstream):
                frames = sse(*self.upstream_events(upstream))
                streamed, _ = relayed(client, upstream, frames)
                request = cp.Request("asked", client)
                answer = cp.read_answer(cp.DIALECTS[upstream], b"".join(frames), True, request)
                whole = cp.DIALECTS[client].encode_response(answer, request)
                for found in (json.dumps(streamed), json.dumps(whole)):
                    self.assertIn('"url": "https://a.example"', found)
                    if client != "messages" and upstream != "messages":
                        self.assertIn('"logprob": -0.5', found)
                    if client == "chat":
                        self.assertIn('"url_citation": {"url"', found)

    def test_a_thinking_that_alternates_with_the_text_leaves_it_whole(self) -> None:
        pieces = [chunk({"reasoning_text": "a"}), chunk({"content": "Hel"}),
                  chunk({"reasoning_text": "b"}), chunk({"content": "lo "}),
                  chunk({"reasoning_text": "c", "content": "you"}), chunk({"content": "."})]
        frames = sse(*START["chat"], *pieces, *END["chat"])
        for client in ("messages", "responses"):
            events, _ = relayed(client, "chat", frames)
            text = json.dumps(events)
            if client == "messages":
                kinds = [event["content_block"]["type"] for event in events
                         if event["type"] == "content_block_start"]
                self.assertEqual(kinds, ["thinking", "text", "thinking"])
            else:
                kinds = [item["type"] for item in events[-1]["response"]["output"]]
                self.assertEqual(kinds, ["reasoning", "message", "reasoning"])
                self.assertIn("Hello you.", text)

    def test_calls_named_late_begin_with_their_name(self) -> None:
        late = [chunk(call(0, id="a")), chunk(call(0, arguments='{"x"')),
                chunk(call(0, name="f", arguments=":1}"))]
        for client in ("messages", "responses"):
            events, _ = relayed(client, "chat", sse(
                *START["chat"], *late, chunk({}, "tool_calls"), "[DONE]"))
            begun = [event.get("content_block") or event.get("item") for event in events
                     if event["type"] in ("content_block_start", "response.output_item.added")]
            self.assertEqual([one["name"] for one in begun], ["f"])


if __name__ == "__main__":
    unittest.main()
