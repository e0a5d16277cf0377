"""The three stream pipelines, fed with the oddities that the upstream is known for.

Every case goes through whole, byte by byte and cut at random; truncated after every frame it must
end in the dialect's error, never politely.
"""
from __future__ import annotations

import json
import random
import re
import unittest
from typing import Any

from support import cp, cuts, places, with_value
from wire import frame as sse

CLAUDE, CODEX, GPT = "claude-sonnet-4.6", "gpt-5.3-codex", "gpt-4.1"
DONE = b"data: [DONE]\n\n"


def dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def events(data: bytes) -> list[Any]:
    """The JSON of every event; [DONE] stays a string.  Asserts that events and data agree."""
    decoder, found = cp.SSEDecoder(), []
    for frame in decoder.feed(data) + decoder.close():
        found.append("[DONE]" if frame.data == b"[DONE]" else json.loads(frame.data))
        if frame.event:
            assert frame.event == found[-1]["type"], frame
    return found


def counts_of(relay):
    """(fresh, read from the cache, written to it, output); None when nothing was told."""
    told = relay.meter.counts
    return tuple(told.get(name, 0) for name in cp.COUNTS[:4]) if told else None


class Case:
    """One upstream stream and what it means; `raw` are its frames."""

    def __init__(self, name: str, dialect: Any, raw: list[bytes], asked: str = "",
                 body: Any = None, **want: Any) -> None:
        self.name, self.dialect, self.raw, self.want = name, dialect, raw, want
        usual = {"chat": CLAUDE, "responses": CODEX, "messages": CLAUDE}
        self.asked = asked or usual[dialect.name]
        self.body = body or {}

    def relay(self) -> Any:
        return self.dialect.stream(self.asked, self.body)

    def run(self, parts: list[bytes], error: Any = None) -> tuple[bytes, Any]:
        relay = self.relay()
        out = b"".join([relay.feed(part) for part in parts])
        return out + relay.close(error), relay

    def whole(self) -> tuple[list[Any], Any]:
        out, relay = self.run([b"".join(self.raw)])
        return events(out), relay


# ---- Chat ----

USAGE = {"prompt_tokens": 12, "completion_tokens": 9, "total_tokens": 21,
         "prompt_tokens_details": {"cached_tokens": 4}}
WANTS_USAGE = {"stream_options": {"include_usage": True}}


def choice(delta: Any, index: int | None = 0, finish: str | None = None,
           key: str = "delta") -> dict[str, Any]:
    made: dict[str, Any] = {} if index is None else {"index": index}
    made[key] = delta
    if finish:
        made["finish_reason"] = finish
    return made


def chunk(*choices: Any, **more: Any) -> bytes:
    """A chunk as Claude's come: without `object`."""
    return sse(dict({"choices": list(choices), "created": 1790000000, "id": "b1",
                     "model": CLAUDE}, **more))


def text(*words: str) -> list[bytes]:
    return [chunk(choice({"content": word})) for word in words]


def call(index: int | None, call_id: str = "", name: str = "", arguments: str = "") -> Any:
    made: dict[str, Any] = {} if index is None else {"index": index}
    if call_id:
        made.update(id=call_id, type="function")
    made["function"] = dict({"name": name} if name else {}, arguments=arguments)
    return made


def calls(*given: Any) -> Any:
    return {"tool_calls": list(given)}


def gpt(delta: Any, finish: str | None = None, **more: Any) -> bytes:
    """A chunk in OpenAI's own order, everything filled."""
    return sse(dict({"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1790000000,
                     "model": GPT, "choices": [{"index": 0, "delta": delta,
                                                "finish_reason": finish}]}, **more))


def first_choices(word: str, **more: Any) -> bytes:
    """A chunk in Copilot's own order: the choices come first."""
    return sse(dict({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}],
                     "created": 1790000000, "id": "chatcmpl-1", "model": GPT,
                     "object": "chat.completion.chunk"}, **more))


START = chunk(choice({"role": "assistant", "content": ""}))
EMPTY_FIRST = sse({"choices": [], "created": 0, "id": "", "model": "",
                   "prompt_filter_results": [{"prompt_index": 0}]})
STOP = chunk(choice({"content": None}, finish="stop"))
PLAIN = [gpt({"role": "assistant", "content": ""})] + [
    gpt({"content": word}) for word in ("Hel", "lo ", "w\u00f6rld \U0001f600", '"model":"x"')
] + [gpt({}, "stop"), DONE]
HELLO = 'Hello w\u00f6rld \U0001f600"model":"x"'


def chat_case(name: str, raw: list[bytes], **want: Any) -> Case:
    settings = {key: want.pop(key) for key in ("asked", "body") if key in want}
    return Case(name, cp.CHAT, raw, **settings, **want)


CHAT_CASES = [
    chat_case("plain", PLAIN, asked=GPT, text=HELLO, finish="stop"),
    chat_case("plain under another name", PLAIN, asked="openai/gpt-4.1", text=HELLO),
    chat_case("plain, choices first",
              PLAIN[:1] + [first_choices(word) for word in ("Hi", " you")] + PLAIN[-2:],
              asked="gpt-4.1-2025-04-14", text="Hi you"),
    chat_case("empty first choices", [EMPTY_FIRST, START] + text("Hi") + [STOP, DONE],
              asked="claude-sonnet-4-6", text="Hi"),
    chat_case("null choices with references",
              [EMPTY_FIRST, START, chunk(copilot_references=[1], choices=None)] + text("Hi")
              + [STOP, DONE], text="Hi"),
    chat_case("no index, no object, no role",
              [chunk(choice({"content": "H"}, None)), chunk(choice({"content": "i"}, None)),
               chunk(choice({}, None, "stop")), DONE], text="Hi"),
    chat_case("content null beside reasoning",
              [chunk(choice({"role": "assistant", "content": None, "reasoning_text": "Let "})),
               chunk(choice({"content": None, "reasoning_text": "me."})),
               chunk(choice({"reasoning_opaque": "opaque=="}))] + text("Hi") + [STOP, DONE],
              text="Hi", reasoning="Let me."),
    chat_case("text and calls under several indexes",
              [START] + text("Look") + [
                  chunk(choice({"content": "ing."}), choice(calls(call(0, "t1", "read")), 1)),
                  chunk(choice(calls(call(0, arguments='{"a":')), 1)),
                  chunk(choice(calls(call(0, "t2", "list", "{}")), 2)),
                  chunk(choice(calls(call(0, arguments="1}")), 1)),
                  chunk(choice({}, 0, "tool_calls"), choice({}, 1, "tool_calls")), DONE],
              text="Looking.", calls=[("t1", "read", '{"a":1}'), ("t2", "list", "{}")],
              finish="tool_calls"),
    chat_case("two texts in one chunk",
              [START, chunk(choice({"content": "a"}), choice({"content": "b"}, 1)),
               chunk(choice({"content": "c"}, 0, "stop")), DONE], text="abc"),
    chat_case("two texts in one whole chunk",
              PLAIN[:2] + [sse({"id": "x", "object": "chat.completion.chunk", "created": 1,
                                "choices": [
                                    {"index": 0, "delta": {"content": "a"}, "finish_reason": None},
                                    {"index": 1, "delta": {"content": "b"}, "finish_reason": None}],
                                "model": GPT})] + PLAIN[-2:], asked=GPT, text="Helab"),
    chat_case("tool index starts at 1",
              [START, chunk(choice(calls(call(1, "t1", "read")))),
               chunk(choice(calls(call(1, arguments="{}")))),
               chunk(choice(calls(call(2, "t2", "list", "{}")))),
               chunk(choice({}, 0, "tool_calls")), DONE],
              calls=[("t1", "read", "{}"), ("t2", "list", "{}")], finish="tool_calls"),
    chat_case("two parallel calls under one index",
              [START, chunk(choice(calls(call(0, "t1", "read")))),
               chunk(choice(calls(call(0, arguments='{"x":1}')))),
               chunk(choice(calls(call(0, "t2", "read")))),
               chunk(choice(calls(call(0, arguments='{"x":2}')))),
               chunk(choice({}, 0, "tool_calls")), DONE],
              calls=[("t1", "read", '{"x":1}'), ("t2", "read", '{"x":2}')], finish="tool_calls"),
    chat_case("two parallel calls under one index, interleaved by id",
              [START, chunk(choice(calls(call(0, "t1", "read", '{"x"')))),
               chunk(choice(calls(call(0, "t2", "read", '{"y"')))),
               chunk(choice(calls(call(0, "t1", "", ":1}")))),
               chunk(choice(calls(call(0, "t2", "", ":2}")))),
               chunk(choice({}, 0, "tool_calls")), DONE],
              calls=[("t1", "read", '{"x":1}'), ("t2", "read", '{"y":2}')], finish="tool_calls"),
    chat_case("calls without an index",
              [START, chunk(choice(calls(call(None, "t1", "read", "{}"),
                                         call(None, "t2", "list", "{}")))), STOP, DONE],
              calls=[("t1", "read", "{}"), ("t2", "list", "{}")], finish="tool_calls"),
    chat_case("id and name repeated in every fragment",
              [START, chunk(choice(calls(call(0, "t1", "read", "{")))),
               chunk(choice(calls(dict(call(0, "t1", "", "}"), function={
                   "name": "", "arguments": "}"})))), STOP, DONE],
              calls=[("t1", "read", "{}")], finish="tool_calls"),
    chat_case("whole message instead of deltas",
              [chunk(choice(dict({"role": "assistant", "content": "Hi", "padding": "x"},
                                 **calls(call(None, "t1", "read", "{}"))), 0, "tool_calls",
                            "message")), DONE],
              text="Hi", calls=[("t1", "read", "{}")], finish="tool_calls"),
    chat_case("usage in its own chunk", [START] + text("Hi") + [
        STOP, chunk(usage=USAGE), DONE], body=WANTS_USAGE, text="Hi", usage=USAGE),
    chat_case("usage on the last content chunk", [START] + text("Hi") + [
        chunk(choice({"content": "!"}, finish="stop"), usage=USAGE), DONE],
        body=WANTS_USAGE, text="Hi!", usage=USAGE),
    chat_case("usage that nobody asked for", [START] + text("Hi") + [
        STOP, chunk(usage=USAGE), DONE], text="Hi", counted=USAGE),
    chat_case("finish before the calls of another choice",
              [START] + text("Hm") + [
                  chunk(choice({}, 0, "tool_calls")),
                  chunk(choice(calls(call(0, "t1", "read", "{")), 1)),
                  chunk(choice(calls(call(0, arguments="}")), 1)),
                  chunk(choice({}, 1, "tool_calls")), DONE],
              text="Hm", calls=[("t1", "read", "{}")], finish="tool_calls"),
    chat_case("finish reason stop after calls",
              [START, chunk(choice(calls(call(0, "t1", "read", "{}")))), STOP, DONE],
              calls=[("t1", "read", "{}")], finish="tool_calls"),
    chat_case("finish reason length", [START] + text("Hi") + [
        chunk(choice({}, finish="length")), DONE], text="Hi", finish="length"),
    chat_case("no [DONE] after the finish", [START] + text("Hi") + [STOP], text="Hi"),
    chat_case("finish in the first chunk",
              [chunk(choice({"role": "assistant", "content": "Hi"}, finish="stop")), DONE],
              text="Hi"),
    chat_case("data without a space", [raw.replace(b"data: ", b"data:")
                                       for raw in [EMPTY_FIRST, START] + text("Hi") + [STOP, DONE]],
              text="Hi"),
    chat_case("comments", [b": hello\n\n", START, b":\n\n"] + text("Hi") + [
        b": bye\n\n", STOP, b": x\n\n", DONE], text="Hi"),
    chat_case("chunks with null extras", [
        gpt({"role": "assistant", "content": ""}, service_tier="default", usage=None)] + [
            sse({"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1790000000,
                 "model": GPT, "system_fingerprint": "fp_1", "choices": [
                     {"index": 0, "delta": {"content": word}, "logprobs": None,
                      "finish_reason": None}], "usage": None}) for word in ("H", "i")]
        + [gpt({}, "stop"), DONE], asked=GPT, text="Hi"),
    chat_case("some blanks in arguments",
              [START, chunk(choice(calls(call(0, "t1", "write", '{"a":"'))))]
              + [chunk(choice(calls(call(0, arguments=" " * 900 + end)))) for end in "\t\nx\n"]
              + [chunk(choice(calls(call(0, arguments='"}')))), STOP, DONE],
              calls=[("t1", "write", '{"a":"' + "".join(" " * 900 + e for e in "\t\nx\n") + '"}')],
              finish="tool_calls"),
]

# ---- Responses ----


class Numbered:
    """Events of one response, numbered; `fresh` gives every event other ids, as upstream does."""

    def __init__(self, fresh: bool = False, numbers: bool = True, long: bool = False,
                 obfuscate: bool = False, **final: Any) -> None:
        self.fresh, self.numbers, self.long, self.obfuscate = fresh, numbers, long, obfuscate
        self.final = final
        self.raw: list[bytes] = []
        self.count = 0
        self.items: list[Any] = []

    def id(self, stem: str) -> str:
        self.count += 1
        tail = "-%d" % self.count if self.fresh else ""
        return stem + tail + ("A/b+" * 100 if self.long else "")

    def add(self, kind: str, **more: Any) -> None:
        event = dict({"type": kind}, **more)
        if self.numbers:
            event["sequence_number"] = len(self.raw)
        self.raw.append(sse(event, kind))

    def response(self, kind: str, **more: Any) -> None:
        self.add(kind, response=dict({
            "id": self.id("resp_1"), "object": "response", "created_at": 1790000000,
            "status": kind.split(".")[1], "model": CODEX, "output": [], "usage": None,
            "error": None}, **more))

    def item(self, made: Any, stem: str, deltas: list[Any], finished: Any) -> None:
        at = len(self.items)
        stem = "%s%d" % (stem, at + 1)
        self.add("response.output_item.added", output_index=at, item=dict(made, id=self.id(stem)))
        for kind, fields in deltas:
            extra = {"obfuscation": "x8Yq"} if self.obfuscate and kind.endswith("delta") else {}
            self.add("response." + kind, item_id=self.id(stem), output_index=at,
                     **dict(fields, **extra))
        self.items.append((stem, dict(made, **finished)))
        self.add("response.output_item.done", output_index=at,
                 item=dict(self.items[-1][1], id=self.id(stem)))

    def reasoning(self) -> None:
        self.item({"type": "reasoning", "encrypted_content": "gAAA"}, "rs_", [], {})

    def message(self, *words: str) -> None:
        at: dict[str, Any] = {"content_index": 0}
        part = {"type": "output_text", "text": "".join(words), "annotations": []}
        self.item({"type": "message", "role": "assistant", "status": "in_progress", "content": []},
                  "msg_", [("content_part.added", dict(at, part=dict(part, text="")))]
                  + [("output_text.delta", dict(at, delta=word)) for word in words]
                  + [("output_text.done", dict(at, text="".join(words))),
                     ("content_part.done", dict(at, part=part))],
                  {"status": "completed", "content": [part]})

    def function(self, call_id: str, arguments: str, sent: str = "") -> None:
        sent = sent or arguments
        self.item({"type": "function_call", "call_id": call_id, "name": "read", "arguments": ""},
                  "fc_", [("function_call_arguments.delta", {"delta": sent[at:at + 4]})
                           for at in range(0, len(sent), 4)]
                  + [("function_call_arguments.done", {"arguments": arguments})],
                  {"arguments": arguments})

    def custom(self, call_id: str, text: str, sent: str) -> None:
        self.item({"type": "custom_tool_call", "call_id": call_id, "name": "apply_patch",
                   "input": ""}, "ctc_",
                  [("custom_tool_call_input.delta", {"delta": sent}),
                   ("custom_tool_call_input.done", {"input": text})], {"input": text})

    def finish(self, kind: str = "response.completed", usage: Any = None) -> list[bytes]:
        output = [dict(item, id=self.id(stem)) for stem, item in self.items]
        usage = usage or {"input_tokens": 12,
                          "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
                          "output_tokens": 9, "output_tokens_details": {"reasoning_tokens": 5},
                          "total_tokens": 21}
        self.response(kind, **dict({"output": output, "usage": usage}, **self.final))
        return self.raw


def responses_raw(**settings: Any) -> list[bytes]:
    stream = Numbered(**settings)
    stream.response("response.created")
    stream.response("response.in_progress")
    stream.reasoning()
    stream.message("Hel", "lo w\u00f6rld", " \U0001f600")
    stream.function("call_1", '{"path":"a.py"}')
    stream.function("call_2", "{}")
    return stream.finish()


def cipher_raw() -> list[bytes]:
    stream = Numbered(fresh=True, obfuscate=True)
    stream.response("response.created")
    stream.message("Hello w\u00f6rld", " \U0001f600")
    stream.function("call_1", '{"path":"a.py"}', "q7Gm0zzkWy==")
    stream.custom("call_2", "*** Begin Patch", "Zm9vYmFy")
    return stream.finish()


def short_raw(kind: str = "response.completed", *words: str, **settings: Any) -> list[bytes]:
    stream = Numbered(**settings)
    stream.response("response.created")
    stream.message(*(words or ("Hi",)))
    return stream.finish(kind)


def thrown_raw(**error: Any) -> list[bytes]:
    stream = Numbered()
    stream.response("response.created")
    stream.message("Hi")
    stream.add("error", **error)
    return stream.raw


def lacking_numbers(raw: list[bytes], every: int) -> list[bytes]:
    return [re.sub(rb',"sequence_number":\d+', b"", frame) if at % every == 0 else frame
            for at, frame in enumerate(raw)]


def gapped_raw() -> list[bytes]:
    """Numbers that jump while the deltas pass, then are missing."""
    raw = short_raw("response.completed", "a", "b", "c")
    return [re.sub(rb'"sequence_number":(\d+)',
                   lambda m: b'"sequence_number":%d' % (int(m.group(1)) * 10), frame)
            for frame in raw[:-3]] + lacking_numbers(raw[-3:], 1)


def interleaved_cipher_raw() -> list[bytes]:
    """A ciphered call whose deltas are held while a text goes on under another index."""
    raw = Numbered()
    raw.response("response.created")
    raw.add("response.output_item.added", output_index=0,
            item={"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "read",
                  "arguments": ""})
    raw.add("response.output_item.added", output_index=1,
            item={"type": "message", "id": "msg_1", "role": "assistant", "content": []})
    for word in ("He", "y"):
        raw.add("response.function_call_arguments.delta", output_index=0, item_id="fc_1",
                delta="??", obfuscation="zz")
        raw.add("response.output_text.delta", output_index=1, item_id="msg_1", content_index=0,
                delta=word)
    raw.add("response.function_call_arguments.done", output_index=0, item_id="fc_1",
            arguments="{}")
    raw.add("response.output_item.done", output_index=0,
            item={"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "read",
                  "arguments": "{}"})
    raw.add("response.output_item.done", output_index=1,
            item={"type": "message", "id": "msg_1", "role": "assistant", "content": [
                {"type": "output_text", "text": "Hey", "annotations": []}]})
    return raw.finish()


FULL: dict[str, Any] = {
    "text": "Hello w\u00f6rld \U0001f600",
    "calls": [("call_1", "read", '{"path":"a.py"}'), ("call_2", "read", "{}")],
    "kinds": ["reasoning", "message", "function_call", "function_call"]}
COPILOT = {"copilot_quota_snapshots": {"chat": {}}, "copilot_usage": {"t": 1},
           "copilot_annotations": []}


def responses_case(name: str, raw: list[bytes], **want: Any) -> Case:
    asked = want.pop("asked", "")
    return Case(name, cp.RESPONSES, raw, asked, **dict({"end": "response.completed"}, **want))


RESPONSES_CASES = [
    responses_case("plain", responses_raw(), **FULL),
    responses_case("another name", responses_raw(), asked="openai/gpt-5.3-codex", **FULL),
    responses_case("ids change in every event", responses_raw(fresh=True), **FULL),
    responses_case("ids longer than 64", responses_raw(fresh=True, long=True), **FULL),
    responses_case("long ids that stay", responses_raw(long=True), **FULL),
    responses_case("ciphered argument deltas", cipher_raw(), text=FULL["text"],
                   calls=[("call_1", "read", '{"path":"a.py"}'),
                          ("call_2", "apply_patch", "*** Begin Patch")]),
    responses_case("ciphered deltas between others", interleaved_cipher_raw(), text="Hey",
                   calls=[("c1", "read", "{}")], kinds=[]),
    responses_case("early [DONE]", responses_raw()[:-1] + [DONE] + responses_raw()[-1:] + [DONE],
                   **FULL),
    responses_case("no sequence numbers", responses_raw(numbers=False), **FULL),
    responses_case("no sequence numbers, ids change", responses_raw(numbers=False, fresh=True),
                   **FULL),
    responses_case("some sequence numbers", lacking_numbers(responses_raw(), 3), **FULL),
    responses_case("sequence numbers that jump", gapped_raw(), text="abc"),
    responses_case("no event lines", [frame[frame.index(b"data:"):] for frame in responses_raw()],
                   **FULL),
    responses_case("empty output rebuilt", responses_raw(output=[]), **FULL),
    responses_case("empty output rebuilt, ids change", responses_raw(output=[], fresh=True),
                   **FULL),
    responses_case("no total tokens", responses_raw(
        usage={"input_tokens": 12, "output_tokens": 9, "input_tokens_details": None}), **FULL),
    responses_case("null details", responses_raw(
        usage={"input_tokens": 12, "output_tokens": 9, "total_tokens": 21,
               "input_tokens_details": None, "output_tokens_details": None}), **FULL),
    responses_case("no usage at all", responses_raw(usage=None), counted=False, **FULL),
    responses_case("copilot fields on the last event", responses_raw(**COPILOT), **FULL),
    responses_case("incomplete", short_raw("response.incomplete"), text="Hi",
                   end="response.incomplete"),
    responses_case("failed", short_raw("response.failed", error={
        "code": "server_error", "message": "the model gave up"}), text="Hi",
        end="response.failed", failure="the model gave up"),
    responses_case("error event", thrown_raw(code="rate_limited", message="slow down"), text="Hi",
                   end="error", failure="slow down"),
    responses_case("error event, nested", thrown_raw(error={"code": "x", "message": "slow down"}),
                   text="Hi", end="error", failure="slow down"),
]

# ---- Messages ----


def ev(kind: str, **more: Any) -> bytes:
    return sse(dict({"type": kind}, **more), kind)


def message_raw(usage: Any = None, ping: bool = True, model: str = CLAUDE) -> list[bytes]:
    first = {"input_tokens": 8, "cache_read_input_tokens": 4, "output_tokens": 1}
    raw = [ev("message_start", message={
        "id": "msg_01", "type": "message", "role": "assistant", "model": model, "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": first})]
    raw += [ev("ping")] if ping else []
    raw += [ev("content_block_start", index=0, content_block={
        "type": "thinking", "thinking": "", "signature": ""}),
        ev("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "Hm"}),
        ev("content_block_delta", index=0, delta={"type": "signature_delta", "signature": "EqQ"}),
        ev("content_block_stop", index=0),
        ev("content_block_start", index=1, content_block={"type": "text", "text": ""})]
    raw += [ev("content_block_delta", index=1, delta={"type": "text_delta", "text": word})
            for word in ("Hel", "lo w\u00f6rld \U0001f600", ' "model":"%s"' % CLAUDE)]
    raw += [ev("content_block_stop", index=1),
            ev("content_block_start", index=2, content_block={
                "type": "tool_use", "id": "toolu_1", "name": "read", "input": {}}),
            ev("content_block_delta", index=2, delta={"type": "input_json_delta",
                                                      "partial_json": '{"model":'}),
            ev("content_block_delta", index=2, delta={"type": "input_json_delta",
                                                      "partial_json": '"%s"}' % CLAUDE}),
            ev("content_block_stop", index=2),
            ev("message_delta", delta={"stop_reason": "tool_use", "stop_sequence": None},
               usage=usage or {"output_tokens": 9}),
            ev("message_stop")]
    return raw


def messages_case(name: str, raw: list[bytes], asked: str = "", **want: Any) -> Case:
    return Case(name, cp.MESSAGES, raw, asked, **want)


OVERLOADED = sse({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
                 "error")
MESSAGES_CASES = [
    messages_case("plain", message_raw(), usage=(8, 4, 0, 9)),
    messages_case("another name", message_raw(), "claude-sonnet-4-6-20260101",
                  usage=(8, 4, 0, 9)),
    messages_case("no ping", message_raw(ping=False), usage=(8, 4, 0, 9)),
    messages_case("late input tokens", message_raw(
        {"input_tokens": 20, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 3,
         "output_tokens": 7}), usage=(20, 0, 3, 7)),
    messages_case("extras", message_raw()[:-1] + [
        ev("message_stop", **{"amazon-bedrock-invocationMetrics": {"n": 1},
                              "copilot_usage": {"n": 1}})], usage=(8, 4, 0, 9)),
    messages_case("no event lines", [frame[frame.index(b"data:"):] for frame in message_raw()],
                  usage=(8, 4, 0, 9)),
    messages_case("comments", [b": hello\n\n"] + message_raw()[:4] + [b":\n\n"]
                  + message_raw()[4:], usage=(8, 4, 0, 9)),
    messages_case("error in the middle", message_raw()[:8] + [OVERLOADED], usage=(8, 4, 0, 1),
                  failure="Overloaded"),
    messages_case("error at once", [OVERLOADED], failure="Overloaded"),
]

CASES = CHAT_CASES + RESPONSES_CASES + MESSAGES_CASES


def is_error_end(dialect: Any, last: Any) -> bool:
    if dialect.name == "chat":
        return isinstance(last, dict) and isinstance(last.get("error"), dict) and bool(
            last["error"].get("message"))
    if dialect.name == "responses":
        return bool(last["type"] == "response.failed" and last["response"]["error"]["message"]
                    and last["response"]["status"] == "failed")
    return bool(last["type"] == "error" and last["error"]["type"] and last["error"]["message"])


def terminal_at(case: Case) -> int:
    """The number of frames with which the stream is complete (chat: may end with the finish)."""
    marks = {"chat": rb'"finish_reason":"', "messages": rb'"message_stop"|"type":"error"',
             "responses": rb'"type":"(response\.(completed|incomplete|failed)|error)"'}
    return next(at for at, raw in enumerate(case.raw)
                if re.search(marks[case.dialect.name], raw)) + 1


class AnyCut(unittest.TestCase):
    """Laws of every pipeline."""

    def test_any_cut_gives_the_same_events(self) -> None:
        for case in CASES:
            with self.subTest(case.dialect.name + ": " + case.name):
                whole, relay = case.whole()
                for parts in cuts(b"".join(case.raw), 1):
                    out, other = case.run(parts)
                    self.assertEqual(events(out), whole)
                    self.assertEqual((other.meter.counts, other.ended, other.failure),
                                     (relay.meter.counts, relay.ended, relay.failure))

    def test_any_cut_gives_the_same_bytes(self) -> None:
        """The promise of StreamRelay's own description."""
        for case in CASES:
            with self.subTest(case.dialect.name + ": " + case.name):
                whole, _ = case.run([b"".join(case.raw)])
                for parts in cuts(b"".join(case.raw), 1)[2:] + [case.raw]:
                    self.assertEqual(case.run(parts)[0], whole)

    def test_frame_by_frame_comes_without_delay(self) -> None:
        """All but the end of a thinking, which comes together with the frame behind it."""
        for case in (CHAT_CASES[0], RESPONSES_CASES[0], MESSAGES_CASES[0]):
            relay, delayed = case.relay(), []
            for raw in case.raw[:terminal_at(case) - 1]:
                out = relay.feed(raw)
                if not out:
                    delayed.append(raw)
                elif delayed:
                    kinds = [event["type"] for event in events(delayed.pop() + raw)]
                    self.assertEqual([event["type"] for event in events(out)], kinds)
            self.assertEqual(delayed, [])

    def test_other_line_ends_give_the_same_events(self) -> None:
        for case in CASES:
            for end in (b"\r\n", b"\r"):
                with self.subTest(case.dialect.name + ": " + case.name, end=end):
                    out, _ = case.run([b"".join(case.raw).replace(b"\n", end)])
                    self.assertEqual(events(out), case.whole()[0])

    def test_nothing_follows_a_proper_end(self) -> None:
        for case in CASES:
            with self.subTest(case.dialect.name + ": " + case.name):
                raw, want = b"".join(case.raw), case.whole()[0]
                done = case.dialect.name != "chat" or case.raw[-1] == DONE
                if not done:
                    continue
                for parts in [[raw + b"".join(case.raw)]] + [case.raw + case.raw[:2]]:
                    self.assertEqual(events(case.run(parts)[0]), want)
                relay = case.relay()
                relay.feed(raw)
                self.assertTrue(relay.ended)
                self.assertEqual(relay.feed(case.raw[0]), b"")
                self.assertEqual(relay.close(), b"")
                self.assertEqual(relay.close(cp.StreamCut("late")), b"")

    def test_missing_last_empty_line_does_no_harm(self) -> None:
        for case in CASES:
            with self.subTest(case.dialect.name + ": " + case.name):
                for lost in (1, 2):
                    out, _ = case.run([b"".join(case.raw)[:-lost]])
                    self.assertEqual(events(out), case.whole()[0])

    def test_truncated_after_any_frame_never_ends_politely(self) -> None:
        cut = cp.StreamCut("the upstream broke off", code="upstream_stream_ended")
        for case in CASES:
            complete = terminal_at(case)
            last = len(case.raw) if case.dialect.name == "chat" else complete
            with self.subTest(case.dialect.name + ": " + case.name):
                for end in range(last):
                    if case.dialect.name != "chat" or DONE not in case.raw[:end]:
                        self.ends_in_error(case, end, cut)
                        if end < complete:   # chat may end behind the finish reason
                            self.ends_in_error(case, end, None)

    def ends_in_error(self, case: Case, end: int, error: Any) -> None:
        out, relay = case.run([b"".join(case.raw[:end])], error)
        found = events(out)
        what = "after %d frames, %r: %r" % (end, error, found[-1:])
        self.assertTrue(is_error_end(case.dialect, found[-1]), what)
        self.assertNotIn("[DONE]", found, what)
        self.assertTrue(relay.ended and relay.failure, what)
        self.assertEqual(relay.close(), b"", what)
        kinds = [e.get("type") for e in found]
        self.assertFalse({"message_stop", "response.completed"}.intersection(kinds), what)
        finished = [e for e in found for c in e.get("choices", ()) if c["finish_reason"]]
        self.assertEqual(finished, [], what)

    def test_truncated_at_any_byte_sends_no_half_event(self) -> None:
        for case in (CHAT_CASES[0], CHAT_CASES[6], RESPONSES_CASES[0], RESPONSES_CASES[2],
                     MESSAGES_CASES[0]):
            whole = b"".join(case.raw[:terminal_at(case)])
            for error in (None, cp.StreamCut("cut")):
                with self.subTest(case.dialect.name + ": " + case.name, error=error):
                    for end in range(0, len(whole) - 2, len(whole) // 60 + 1):
                        out, _ = case.run([whole[:end]], error)
                        try:
                            found = events(out)
                        except ValueError:
                            self.fail("half an event: %r -> %r" % (whole[:end][-90:], out[-500:]))
                        self.assertTrue(is_error_end(case.dialect, found[-1]), found[-1:])

    def test_a_cut_after_a_silent_upstream_is_an_error_too(self) -> None:
        for dialect in cp.DIALECTS.values():
            for raw in (b"", b"\n\n", b": hello\n\n", DONE):
                if raw == DONE and dialect is cp.MESSAGES:
                    continue                 # no word of that dialect
                with self.subTest(dialect=dialect.name, raw=raw):
                    relay = dialect.stream("a", {})
                    found = events(relay.feed(raw) + relay.close())
                    self.assertEqual(len(found), 1)
                    self.assertTrue(is_error_end(dialect, found[-1]))

    def test_what_is_no_json_ends_in_an_error(self) -> None:
        broken = b'event: message_delta\ndata: {"type":"message_delta",\n\n'
        for case in (CHAT_CASES[2], RESPONSES_CASES[0], MESSAGES_CASES[0]):
            with self.subTest(dialect=case.dialect.name):
                relay = case.relay()
                found = events(relay.feed(b"".join(case.raw[:2]) + broken))
                self.assertTrue(is_error_end(case.dialect, found[-1]))
                self.assertTrue(relay.ended and relay.failure)

    def test_an_upstream_gone_mad_never_raises(self) -> None:
        """Every value of every event replaced by something else: no exception, no hang."""
        wild: list[Any] = [None, True, 7, -1.5, "x", "", [], {}, [[{}]], {"a": {"b": []}}]
        chance = random.Random(1)
        for case in CASES:
            for at, raw in enumerate(case.raw):
                frame = cp.Frame.parse(raw)
                if frame.data in (b"", b"[DONE]"):
                    continue
                value = json.loads(frame.data)
                for place in places(value):
                    if chance.random() > 0.03:
                        continue
                    changed = with_value(value, place, chance.choice(wild))
                    mad = case.raw[:at] + [sse(changed, frame.event)] + case.raw[at + 1:]
                    try:
                        case.run([b"".join(mad)])
                    except Exception as error:  # noqa: BLE001
                        self.fail("%s: %s: %r: %r" % (case.dialect.name, case.name, error, changed))

    def test_oversize_event_is_an_upstream_error(self) -> None:
        old = cp.MAX_FRAME_BYTES
        self.addCleanup(setattr, cp, "MAX_FRAME_BYTES", old)
        cp.MAX_FRAME_BYTES = 1000
        for dialect in cp.DIALECTS.values():
            with self.assertRaises(cp.UpstreamError):
                dialect.stream("a", {}).feed(b"data: " + b"x" * 2000)


class ChatStreams(unittest.TestCase):

    def fold(self, case: Case, found: list[Any]) -> dict[str, Any]:
        """What a client makes of the chunks; asserts that they are uniform."""
        self.assertEqual(found[-1], "[DONE]")
        said: dict[str, Any] = {"text": "", "reasoning": "", "reasoning_content": "", "calls": [],
                                "finish": None, "usage": None}
        for at, event in enumerate(found[:-1]):
            self.assertEqual((event["object"], event["model"]),
                             ("chat.completion.chunk", case.asked))
            self.assertTrue(event["id"] and isinstance(event["created"], int))
            if event.get("usage"):
                self.assertEqual((event["choices"], at), ([], len(found) - 2))
                said["usage"] = event["usage"]
                continue
            (only,) = event["choices"]
            self.assertEqual(only["index"], 0)
            self.assertIsNone(said["finish"], "something follows the finish reason")
            said["finish"] = only["finish_reason"]
            delta = only["delta"]
            if at == 0:
                self.assertEqual(delta["role"], "assistant")
            said["text"] += delta.get("content", "")
            said["reasoning"] += delta.get("reasoning_text", "")
            said["reasoning_content"] += delta.get("reasoning_content", "")
            for part in delta.get("tool_calls", ()):
                self.assertLessEqual(part["index"], len(said["calls"]))
                if part["index"] == len(said["calls"]):
                    said["calls"].append([part["id"], part["function"]["name"], ""])
                said["calls"][part["index"]][2] += part["function"].get("arguments", "")
        said["calls"] = [tuple(made) for made in said["calls"]]
        self.assertEqual(said["reasoning"], said.pop("reasoning_content"))
        return said

    def test_every_quirk_is_made_uniform(self) -> None:
        for case in CHAT_CASES:
            for parts in [[b"".join(case.raw)], case.raw]:
                with self.subTest(case.name, feeds=len(parts)):
                    out, relay = case.run(parts)
                    want = dict({"text": "", "reasoning": "", "calls": [], "finish": "stop",
                                 "usage": None}, **case.want)
                    counted = want.pop("counted", want["usage"])
                    self.assertEqual(self.fold(case, events(out)), want)
                    self.assertEqual(counts_of(relay), (8, 4, 0, 9) if counted else None)
                    self.assertIsNone(relay.failure)

    def test_plain_stream_passes_byte_identical(self) -> None:
        case = CHAT_CASES[0]
        for parts in [case.raw] + cuts(b"".join(case.raw), 1):
            self.assertEqual(case.run(parts)[0], b"".join(case.raw))

    def test_only_the_model_changes_under_another_name(self) -> None:
        case = CHAT_CASES[1]
        for parts in [case.raw] + cuts(b"".join(case.raw), 1):
            self.assertEqual(case.run(parts)[0], b"".join(case.raw).replace(
                b'"model":"gpt-4.1"', b'"model":"openai/gpt-4.1"'))

    def test_first_id_stays_for_the_whole_stream(self) -> None:
        raw = [gpt({"role": "assistant", "content": ""})] + [
            first_choices("x", id="chatcmpl-%d" % n) for n in range(3)] + [gpt({}, "stop"), DONE]
        for parts in ([b"".join(raw)], raw):
            out, _ = Case("", cp.CHAT, raw, GPT).run(parts)
            self.assertEqual({e["id"] for e in events(out)[:-1]}, {"chatcmpl-1"})

    def test_chunks_that_lack_an_id_or_model_are_filled(self) -> None:
        choice_ = {"index": 0, "delta": {"content": "x"}, "finish_reason": None}
        bare = sse({"choices": [choice_], "object": "chat.completion.chunk"})
        for parts in ([PLAIN[0] + bare * 2 + PLAIN[-2] + DONE],
                      [PLAIN[0], bare, bare, PLAIN[-2], DONE]):
            out, _ = Case("", cp.CHAT, parts, GPT).run(parts)
            for event in events(out)[:-1]:
                self.assertEqual((event.get("id"), event.get("model")), ("chatcmpl-1", GPT))

    def test_upstream_errors_in_the_stream_end_it(self) -> None:
        for raw, words, code in (
                (sse({"error": {"message": "slow down", "code": "rate_limited", "type": "x"}}),
                 "slow down", "rate_limited"),
                (sse({"error": {"message": "", "code": "rate_limited"}, "choices": []}), "",
                 "rate_limited"),
                (sse({"error": "slow down"}), "slow down", None),
                (chunk(choice({"content": "x"}, finish="error")), "", None),
                (chunk(choice({}, 0, "stop"), choice({}, 1, "error")), "", None)):
            for before in ([], [START], [START] + text("Hi")):
                with self.subTest(raw=raw, before=len(before)):
                    relay = cp.CHAT.stream(CLAUDE, {})
                    out = relay.feed(b"".join(before) + raw + STOP + DONE)
                    found = events(out)
                    self.assertEqual(len(found), len(before) + 1)
                    self.assertTrue(is_error_end(cp.CHAT, found[-1]), found[-1])
                    self.assertIn(words, found[-1]["error"]["message"])
                    self.assertEqual(found[-1]["error"]["code"], code)
                    self.assertTrue(relay.ended and relay.failure)
                    self.assertEqual(relay.close(), b"")

    def test_endless_whitespace_in_tool_arguments_is_cut_off(self) -> None:
        for blank in (" ", "\r\n\t", "\n"):
            with self.subTest(blank=blank):
                relay = cp.CHAT.stream(CLAUDE, {})
                out = relay.feed(START + chunk(choice(calls(call(0, "t1", "write", '{"a":')))))
                fed = 0
                while not relay.ended and fed < 10 * cp.MAX_WHITESPACE_RUN:
                    out += relay.feed(chunk(choice(calls(call(0, arguments=blank * 20)))))
                    fed += 20 * len(blank)
                self.assertTrue(relay.ended and relay.failure)
                self.assertGreater(fed, cp.MAX_WHITESPACE_RUN)
                self.assertTrue(is_error_end(cp.CHAT, events(out)[-1]))

    def test_whitespace_in_the_text_is_nobodys_business(self) -> None:
        raw = [START] + text(" " * 3 * cp.MAX_WHITESPACE_RUN) + [STOP, DONE]
        self.assertIsNone(Case("", cp.CHAT, raw).run([b"".join(raw)])[1].failure)

    def test_cut_after_the_finish_reason_is_still_an_error(self) -> None:
        out, relay = Case("", cp.CHAT, []).run([START + STOP], cp.StreamCut("cut"))
        self.assertTrue(is_error_end(cp.CHAT, events(out)[-1]))
        self.assertEqual(relay.failure, "cut")


class ResponsesStreams(unittest.TestCase):

    def fold(self, case: Case, found: list[Any]) -> dict[str, Any]:
        """What a strict client makes of the events; asserts ids, numbers and order."""
        ids: dict[int, str] = {}
        said: dict[str, Any] = {"text": "", "calls": [], "kinds": []}
        pieces: dict[int, str] = {}
        for event in found:
            self.assertFalse([k for k in event if k.startswith("copilot_")], event)
            self.assertNotIn("obfuscation", event)
            at = event.get("output_index")
            if "item" in event:
                item = event["item"]
                self.assertLessEqual(len(item["id"]), 64)
                self.assertEqual(ids.setdefault(at, item["id"]), item["id"])
                if item["type"] == "reasoning":
                    self.assertIsInstance(item["summary"], list)
            if "item_id" in event:
                self.assertEqual(event["item_id"], ids[at])
            if event["type"].endswith((".delta", "_text.delta")):
                pieces[at] = pieces.get(at, "") + event["delta"]
            if event["type"] in ("response.function_call_arguments.done",
                                 "response.custom_tool_call_input.done"):
                self.assertEqual(event.get("arguments", event.get("input")), pieces.get(at))
            if event["type"] == "response.output_item.done":
                said["kinds"].append(event["item"]["type"])
                if "call_id" in event["item"]:
                    said["calls"].append((event["item"]["call_id"], event["item"]["name"],
                                          pieces[at]))
                elif at in pieces:
                    said["text"] += pieces[at]
        self.assertEqual(len(set(ids.values())), len(ids))
        answers = [e["response"] for e in found if "response" in e]
        self.assertEqual({a["model"] for a in answers}, {case.asked})
        self.assertEqual(len({a["id"] for a in answers}), 1)
        self.assertLessEqual(len(answers[0]["id"]), 64)
        for answer in answers:
            self.assertFalse([k for k in answer if k.startswith("copilot_")])
        output = answers[-1]["output"]
        if found[-1]["type"] == "response.completed" and output:
            self.assertEqual([item["id"] for item in output][:len(ids)],
                             [ids[at] for at in sorted(ids)][:len(output)])
        said["output"] = [item["type"] for item in output]
        return said

    def test_every_quirk_is_made_uniform(self) -> None:
        for case in RESPONSES_CASES:
            for parts in [[b"".join(case.raw)], case.raw]:
                with self.subTest(case.name, feeds=len(parts)):
                    out, relay = case.run(parts)
                    found = events(out)
                    said = self.fold(case, found)
                    want = dict({"calls": [], "kinds": []}, **case.want)
                    self.assertEqual(found[-1]["type"], want["end"])
                    self.assertEqual((said["text"], said["calls"]), (want["text"], want["calls"]))
                    if want["kinds"]:
                        self.assertEqual((said["kinds"], said["output"]),
                                         (want["kinds"], want["kinds"]))
                    self.assertEqual(relay.failure, want.get("failure"))

    def test_sequence_numbers_rise_without_doubles(self) -> None:
        for case in RESPONSES_CASES:
            for parts in [[b"".join(case.raw)], case.raw]:
                with self.subTest(case.name, feeds=len(parts)):
                    numbers = [e["sequence_number"] for e in events(case.run(parts)[0])]
                    self.assertEqual(numbers, sorted(set(numbers)))

    def test_usage_is_whole_for_strict_clients(self) -> None:
        for case in RESPONSES_CASES:
            found, relay = case.whole()
            if found[-1]["type"] != "response.completed":
                continue
            with self.subTest(case.name):
                usage = found[-1]["response"]["usage"]
                self.assertIsInstance(usage, dict, "Codex needs usage.total_tokens")
                self.assertIsInstance(usage["total_tokens"], int)
                self.assertIsInstance(usage["input_tokens_details"]["cached_tokens"], int)
                self.assertIsInstance(usage["output_tokens_details"]["reasoning_tokens"], int)
                if case.want.get("counted") is not False:
                    self.assertEqual(usage["total_tokens"], 21)
                    fresh, read, _, output = counts_of(relay)
                    self.assertEqual((fresh + read, output), (12, 9))

    def test_plain_stream_passes_byte_identical(self) -> None:
        stream = Numbered()
        stream.response("response.created")
        stream.message(*"Hello world")
        raw = stream.finish()
        for parts in [raw] + cuts(b"".join(raw), 1):
            self.assertEqual(Case("", cp.RESPONSES, raw).run(parts)[0], b"".join(raw))

    def test_long_ids_are_short_and_typed_for_the_client(self) -> None:
        found, _ = Case("", cp.RESPONSES, responses_raw(fresh=True, long=True)).whole()
        ids = [e["item"]["id"] for e in found if e["type"] == "response.output_item.added"]
        self.assertEqual([i.split("_")[0] for i in ids], ["rs", "msg", "fc", "fc"])
        self.assertTrue(found[0]["response"]["id"].startswith("resp_"))

    def test_no_done_is_added(self) -> None:
        for case in RESPONSES_CASES:
            self.assertNotIn("[DONE]", case.whole()[0], case.name)

    def test_cut_keeps_the_response_id(self) -> None:
        raw = responses_raw()
        out, _ = Case("", cp.RESPONSES, raw).run([b"".join(raw[:5])], cp.StreamCut("cut"))
        found = events(out)
        self.assertEqual(found[-1]["response"]["id"], found[0]["response"]["id"])
        self.assertEqual(found[-1]["response"]["error"]["message"], "cut")
        self.assertEqual(found[-1]["sequence_number"], 5)


class MessagesStreams(unittest.TestCase):

    def test_stream_passes_byte_identical(self) -> None:
        for case in MESSAGES_CASES:
            if case.asked != CLAUDE:
                continue
            raw = b"".join(case.raw)
            for parts in [case.raw] + cuts(raw, 1):
                out, relay = case.run(parts)
                self.assertEqual(out, raw, case.name)
                self.assertEqual(relay.failure, case.want.get("failure"))
                if "usage" in case.want:
                    self.assertEqual(counts_of(relay), case.want["usage"])

    def test_model_name_is_exchanged_in_message_start_only(self) -> None:
        case = MESSAGES_CASES[1]
        want = b"".join(case.raw).replace(b'"model":"%b"' % CLAUDE.encode(),
                                          b'"model":"%b"' % case.asked.encode(), 1)
        for parts in [case.raw] + cuts(b"".join(case.raw), 1):
            self.assertEqual(case.run(parts)[0], want)

    def test_model_name_is_exchanged_in_spaced_json_too(self) -> None:
        case = MESSAGES_CASES[1]
        start = json.dumps(json.loads(cp.Frame.parse(case.raw[0]).data)).encode()
        raw = [b"event: message_start\ndata: " + start + b"\n\n"] + case.raw[1:]
        found = events(case.run(raw)[0])
        self.assertEqual(found[0]["message"]["model"], case.asked)

    def test_error_event_is_terminal(self) -> None:
        case = MESSAGES_CASES[-2]
        relay = case.relay()
        relay.feed(b"".join(case.raw))
        self.assertTrue(relay.ended)
        self.assertEqual(relay.feed(message_raw()[-1]), b"")
        self.assertEqual(relay.close(), b"")


if __name__ == "__main__":
    unittest.main()
