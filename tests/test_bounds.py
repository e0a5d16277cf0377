"""Nothing that a client or an upstream sends is without bound: time, memory, number, and what one
client's request may do to the next."""
from __future__ import annotations

import contextlib
import gc
import http.client
import json
import os
import socket
import sqlite3
import tempfile
import threading
import time
import unittest
import urllib.parse
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Callable, Iterator, NamedTuple
from unittest import mock

from support import (DEADLINE_S, SLOW, Command, EnterCase, Proxy, ProxyCase, Reply, chat, long_run,
                     message, response, send, wait_until)
import copilot_proxy as cp
from fake_upstream import (CHAT, EMBEDDINGS, MESSAGES, RESPONSES, Answer, Ask, FakeUpstream,
                           Refuse, bad, bad_message, default_models)
from cases import Serving
from wire import assistant, user

Json = Any
Make = Callable[[int], Json]            # how many -> a body without its model
SMALL, TIMES, MOST_TIMES = 400, 4, 9    # four times as many: 4 is linear, 16 quadratic
EPHEMERAL = {"type": "ephemeral"}
SCHEMA = {"type": "object", "properties": {}}
MODELS = {entry["id"]: cp.Model.from_entry(entry) for entry in default_models()}
#: a model of each family: chat only, responses only, Claude, Gemini
FAMILIES = ("gpt-4.1", "gpt-5.3-codex", "claude-sonnet-4.6", "gemini-3.1-pro-preview")


def system(number: int) -> Json:
    return {"role": "system", "content": "s%d" % number}


def text(words: str, **more: Any) -> Json:
    return dict({"type": "text", "text": words}, **more)


def fields(count: int, value: Any = 1) -> Json:
    return {"field_%d" % number: value for number in range(count)}


def post_head(route: str, data: bytes) -> bytes:
    return b"POST /v1/%s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" \
        b"Content-Length: %d\r\n\r\n" % (route.encode(), len(data))


HELLO = user("hi")

# ---- Chat


def chat_call(call_id: str) -> Json:
    return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": "{}"}}


def chat_result(call_id: str, words: str = "r") -> Json:
    return {"role": "tool", "tool_call_id": call_id, "content": words}


def function(name: str, **more: Any) -> Json:
    return {"type": "function", "function": dict({"name": name, "parameters": SCHEMA}, **more)}


def chat_tools(*tools: Json) -> Json:
    return {"messages": [HELLO], "tools": list(tools)}


def gemini_tool(**schema: Any) -> Json:
    return chat_tools(function("f", parameters=dict({"type": "object"}, **schema)))


def picture(number: int) -> Json:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA%d" % number}}


def conversation(*messages: Json) -> Json:
    return {"messages": list(messages)}


CHAT_CASES: dict[str, Make] = {
    "messages": lambda n: conversation(*[user("a%d" % i) for i in range(n)]),
    "answers": lambda n: conversation(HELLO, *[assistant("a%d" % i) for i in range(n)], HELLO),
    "system messages first": lambda n: conversation(*map(system, range(n)), HELLO),
    "system messages between": lambda n: conversation(HELLO, *map(system, range(n)), HELLO),
    "calls of one message": lambda n: conversation(
        HELLO, assistant(tool_calls=[chat_call("c%d" % i) for i in range(n)]),
        *[chat_result("c%d" % i) for i in range(n)]),
    "equal call ids of one message": lambda n: conversation(
        HELLO, assistant(tool_calls=[chat_call("c") for i in range(n)]),
        *[chat_result("c", str(i)) for i in range(n)]),
    "equal call ids of many messages": lambda n: conversation(
        HELLO, *[assistant(tool_calls=[chat_call("c")]) for i in range(n)],
        *[chat_result("c", str(i)) for i in range(n)]),
    "results before their calls": lambda n: conversation(
        HELLO, *[chat_result("c") for i in range(n)],
        *[assistant(tool_calls=[chat_call("c")]) for i in range(n)]),
    "results without calls": lambda n: conversation(
        HELLO, *[chat_result("c%d" % i) for i in range(n)], HELLO),
    "results of one call": lambda n: conversation(
        HELLO, assistant(tool_calls=[chat_call("c")]),
        *[chat_result("c", str(i)) for i in range(n)]),
    "parts": lambda n: conversation(user([text("a%d" % i) for i in range(n)])),
    "parts of odd kinds": lambda n: conversation(
        user([{"type": "kind_%d_call" % i} for i in range(n)])),
    "fields": lambda n: dict(conversation(HELLO), **fields(n)),
    "null fields": lambda n: dict(conversation(HELLO), **fields(n, None)),
    "fields of a message": lambda n: conversation(dict(HELLO, **fields(n))),
    "messages with a field each": lambda n: conversation(
        *[dict(HELLO, **{"field_%d" % i: 1}) for i in range(n)]),
    "tools": lambda n: chat_tools(*[function("f%d" % i) for i in range(n)]),
    "tools with odd names": lambda n: chat_tools(*[function("f.%d" % i) for i in range(n)]),
    "tools of other kinds": lambda n: chat_tools(*[{"type": "kind_%d" % i} for i in range(n)]),
    "fields of a tool": lambda n: chat_tools(function("f", **fields(n))),
    "images": lambda n: conversation(*[user([picture(i)]) for i in range(n)], HELLO),
    "images of one message": lambda n: conversation(user(list(map(picture, range(n)))), HELLO),
    "cache marks": lambda n: conversation(
        *[user("a", copilot_cache_control=EPHEMERAL) for i in range(n)]),
    "stop sequences": lambda n: dict(conversation(HELLO), stop=["s%d" % i for i in range(n)]),
    "joined states of reasoning": lambda n: conversation(HELLO, assistant(
        "x", reasoning_text="t", reasoning_opaque="".join(
            cp.pack_opaque("responses", "rs_%d" % i, "b") for i in range(n))), HELLO),
    "tools of other dialects": lambda n: chat_tools(
        *[{"name": "f%d" % i, "input_schema": SCHEMA} for i in range(n)]),
    "allowed tools": lambda n: dict(chat_tools(*[function("f%d" % i) for i in range(n)]),
                                    tool_choice={"type": "allowed_tools", "allowed_tools": {
                                        "mode": "auto", "tools": [
                                            function("f%d" % i) for i in range(n)]}}),
    "old calls of functions": lambda n: conversation(
        HELLO, *[assistant(function_call={"name": "f", "arguments": "{}"}) for i in range(n)],
        *[{"role": "function", "name": "f", "content": "r"} for i in range(n)]),
    "parts of another dialect": lambda n: conversation(
        user([{"type": "input_text", "text": "a%d" % i} for i in range(n)])),
    "items of another dialect": lambda n: conversation(
        HELLO, *[call("c%d" % i) for i in range(n)], *[output("c%d" % i) for i in range(n)]),
    "refusals": lambda n: conversation(
        HELLO, assistant([{"type": "refusal", "refusal": "r"} for i in range(n)]), HELLO),
}
SCHEMA_CASES: dict[str, Make] = {
    "properties": lambda n: gemini_tool(
        properties={"p%d" % i: {"type": "string"} for i in range(n)},
        required=["p%d" % i for i in range(n)]),
    "allOf": lambda n: gemini_tool(allOf=[
        {"properties": {"p%d" % i: {"type": "string"}}, "required": ["p%d" % i]}
        for i in range(n)]),
    "anyOf": lambda n: gemini_tool(properties={"a": {"anyOf": [
        {"type": "string", "enum": ["p%d" % i]} for i in range(n)]}}),
    "enum": lambda n: gemini_tool(properties={"a": {"enum": ["p%d" % i for i in range(n)]}}),
    "references to themselves": lambda n: gemini_tool(
        properties={"p%d" % i: {"$ref": "#"} for i in range(n)}),
}

# ---- Responses


def call(call_id: str, name: str = "f") -> Json:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": "{}"}


def output(call_id: str, words: Any = "r") -> Json:
    return {"type": "function_call_output", "call_id": call_id, "output": words}


def items(*given: Json) -> Json:
    return {"input": list(given)}


def tools(*given: Json) -> Json:
    return {"input": "hi", "tools": list(given)}


def flat(name: str) -> Json:
    return {"type": "function", "name": name, "parameters": SCHEMA}


OURS = cp.pack_opaque("compaction", None, "summary")
RESPONSES_CASES: dict[str, Make] = {
    "messages": lambda n: items(*[user("a%d" % i) for i in range(n)]),
    "system messages first": lambda n: items(*map(system, range(n)), HELLO),
    "calls, then their results": lambda n: items(
        HELLO, *[call("c%d" % i) for i in range(n)], *[output("c%d" % i) for i in range(n)]),
    "equal call ids": lambda n: items(
        HELLO, *[call("c") for i in range(n)], *[output("c", str(i)) for i in range(n)]),
    "rounds": lambda n: items(
        HELLO, *[item for i in range(n) for item in (call("c"), output("c", str(i)))]),
    "results without calls": lambda n: items(HELLO, *[output("c") for i in range(n)]),
    "results before their calls": lambda n: items(
        HELLO, *[output("c") for i in range(n)], *[call("c") for i in range(n)]),
    "calls without results": lambda n: items(HELLO, *[call("c") for i in range(n)]),
    "calls with odd names": lambda n: items(
        HELLO, *[call("c%d" % i, "f.%d" % i) for i in range(n)]),
    "items of odd kinds": lambda n: items(
        HELLO, *[{"type": "kind_%d_call" % i, "x": 1} for i in range(n)]),
    "references": lambda n: items(
        HELLO, *[{"type": "item_reference", "id": "x%d" % i} for i in range(n)]),
    "reasoning": lambda n: items(HELLO, *[
        {"type": "reasoning", "encrypted_content": "g%d" % i, "summary": []}
        for i in range(n)], HELLO),
    "reasoning of another dialect": lambda n: items(HELLO, *[
        {"type": "reasoning", "summary": [],
         "encrypted_content": cp.pack_opaque("messages", None, "b%d" % i)}
        for i in range(n)], HELLO),
    "our compactions": lambda n: items(*[item for i in range(n) for item in (
        user("a"), {"type": "compaction", "encrypted_content": OURS})], HELLO),
    "other compactions": lambda n: items(*[item for i in range(n) for item in (
        user("a"), {"type": "compaction", "encrypted_content": "gAAA"})], HELLO),
    "fields": lambda n: dict({"input": "hi"}, **fields(n)),
    "fields of an item": lambda n: items(dict(HELLO, **fields(n))),
    "tools": lambda n: tools(*[flat("f%d" % i) for i in range(n)]),
    "freeform tools": lambda n: tools(*[{"type": "custom", "name": "f%d" % i} for i in range(n)]),
    "tools of a namespace": lambda n: tools(
        {"type": "namespace", "name": "ns", "tools": [flat("f%d" % i) for i in range(n)]}),
    "namespaces": lambda n: tools(*[
        {"type": "namespace", "name": "ns%d" % i, "tools": [flat("f")]} for i in range(n)]),
    "hosted tools": lambda n: tools(*[{"type": "kind_%d" % i} for i in range(n)]),
    "items of tools": lambda n: items(HELLO, *[
        {"type": "additional_tools", "tools": [flat("f%d" % i)]} for i in range(n)]),
    "items of one namespace": lambda n: items(HELLO, *[
        {"type": "additional_tools", "tools": [
            {"type": "namespace", "name": "ns", "tools": [flat("f%d" % i)]}]} for i in range(n)]),
    "tools that were searched for": lambda n: items(HELLO, *[item for i in range(n) for item in (
        {"type": "tool_search_call", "call_id": "c%d" % i, "execution": "client",
         "arguments": {}},
        {"type": "tool_search_output", "call_id": "c%d" % i, "execution": "client",
         "tools": [flat("f%d" % i)]})]),
    "items of another dialect": lambda n: items(
        HELLO, *[assistant(tool_calls=[chat_call("c%d" % i)]) for i in range(n)],
        *[chat_result("c%d" % i) for i in range(n)]),
    "stop sequences": lambda n: dict(items(HELLO), stop=["s%d" % i for i in range(n)]),
    "parts of a result": lambda n: items(HELLO, call("c"), output("c", [
        {"type": "input_text", "text": "x%d" % i} for i in range(n)])),
}

# ---- Messages


def use(call_id: str) -> Json:
    return {"type": "tool_use", "id": call_id, "name": "f", "input": {}}


def result(call_id: str, content: Any = "r") -> Json:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content}


MESSAGES_CASES: dict[str, Make] = {
    "messages": lambda n: conversation(*[user("a%d" % i) for i in range(n)]),
    "system turns": lambda n: conversation(HELLO, *map(system, range(n)), HELLO),
    "system turns first": lambda n: conversation(*map(system, range(n)), HELLO),
    "system blocks": lambda n: dict(
        conversation(HELLO), system=[text("s%d" % i) for i in range(n)]),
    "calls of one turn": lambda n: conversation(
        HELLO, assistant([use("c%d" % i) for i in range(n)]),
        user([result("c%d" % i) for i in range(n)])),
    "equal call ids of one turn": lambda n: conversation(
        HELLO, assistant([use("c") for i in range(n)]),
        user([result("c", str(i)) for i in range(n)])),
    "equal call ids without results": lambda n: conversation(
        HELLO, assistant([use("c") for i in range(n)]), HELLO),
    "rounds with equal call ids": lambda n: conversation(
        HELLO, *[turn for i in range(n) for turn in (
            assistant([use("c")]), user([result("c", str(i))]))]),
    "results without calls": lambda n: conversation(user([result("c%d" % i) for i in range(n)])),
    "results before their calls": lambda n: conversation(
        user([result("c") for i in range(n)]), assistant([use("c") for i in range(n)]), HELLO),
    "turns of one result each": lambda n: conversation(
        HELLO, assistant([use("c%d" % i) for i in range(n)]),
        *[user([result("c%d" % i)]) for i in range(n)]),
    "blocks": lambda n: conversation(user([text("a%d" % i) for i in range(n)])),
    "fields": lambda n: dict(conversation(HELLO), **fields(n)),
    "fields of a message": lambda n: conversation(dict(HELLO, **fields(n))),
    "blocks of hosted tools": lambda n: conversation(HELLO, assistant([
        {"type": "kind_%d_tool_result" % i, "content": []} for i in range(n)]), HELLO),
    "thinking": lambda n: conversation(HELLO, assistant([
        {"type": "thinking", "thinking": "t%d" % i, "signature": "s%d" % i}
        for i in range(n)] + [text("x")]), HELLO),
    "tools": lambda n: dict(conversation(HELLO), tools=[
        {"name": "f%d" % i, "input_schema": SCHEMA} for i in range(n)]),
    "hosted tools": lambda n: dict(conversation(HELLO), tools=[
        {"type": "kind_%d" % i, "name": "x"} for i in range(n)]),
    "cache marks": lambda n: conversation(
        user([text("a", cache_control=EPHEMERAL) for i in range(n)])),
    "blocks of a result": lambda n: conversation(
        HELLO, assistant([use("c")]), user([result("c", [text("x%d" % i) for i in range(n)])])),
    "odd blocks of a result": lambda n: conversation(
        HELLO, assistant([use("c")]), user([result("c", [{"type": "o%d" % i} for i in range(n)])])),
}
# ---- Gemini and Ollama, dialects of clients alone


def content(role: str, *parts: Json) -> Json:
    return {"role": role, "parts": list(parts)}


def contents(*given: Json, **more: Any) -> Json:
    return dict({"contents": list(given)}, **more)


GEMINI_HELLO = content("user", {"text": "hi"})
GEMINI_CALL = {"functionCall": {"name": "f", "args": {}}}


def gemini_result(number: int) -> Json:
    return {"functionResponse": {"name": "f", "response": {"a": number}}}


GEMINI_CASES: dict[str, Make] = {
    "contents": lambda n: contents(*[content("user", {"text": "a%d" % i}) for i in range(n)]),
    "parts": lambda n: contents(content("user", *[{"text": "a%d" % i} for i in range(n)])),
    "parts of odd kinds": lambda n: contents(
        content("user", *[{"kind_%d" % i: 1} for i in range(n)])),
    "calls of one turn": lambda n: contents(
        GEMINI_HELLO, content("model", *[GEMINI_CALL] * n),
        content("user", *map(gemini_result, range(n)))),
    "calls, then their results": lambda n: contents(
        GEMINI_HELLO, *[content("model", GEMINI_CALL)] * n,
        *[content("user", gemini_result(i)) for i in range(n)]),
    "results before their calls": lambda n: contents(
        *[content("user", gemini_result(i)) for i in range(n)],
        *[content("model", GEMINI_CALL)] * n),
    "thoughts": lambda n: contents(GEMINI_HELLO, content("model", *[
        {"text": "t", "thought": True, "thoughtSignature": "s%d" % i} for i in range(n)]),
        GEMINI_HELLO),
    "tools": lambda n: contents(GEMINI_HELLO, tools=[
        {"functionDeclarations": [{"name": "f%d" % i}]} for i in range(n)]),
    "allowed tools": lambda n: contents(
        GEMINI_HELLO, tools=[{"functionDeclarations": [{"name": "f%d" % i} for i in range(n)]}],
        toolConfig={"functionCallingConfig": {
            "mode": "ANY", "allowedFunctionNames": ["f%d" % i for i in range(n)]}}),
    "fields": lambda n: contents(GEMINI_HELLO, generationConfig=fields(n), **fields(n)),
}
OLLAMA_CALL = {"function": {"name": "f", "arguments": {}}}
OLLAMA_CASES: dict[str, Make] = {
    "messages": lambda n: conversation(*[user("a%d" % i) for i in range(n)]),
    "calls of one message": lambda n: conversation(
        HELLO, assistant("", tool_calls=[OLLAMA_CALL] * n),
        *[{"role": "tool", "tool_name": "f", "content": "r%d" % i} for i in range(n)]),
    "calls, then their results": lambda n: conversation(
        HELLO, *[assistant("", tool_calls=[OLLAMA_CALL]) for i in range(n)],
        *[{"role": "tool", "tool_name": "f", "content": "r%d" % i} for i in range(n)]),
    "images": lambda n: conversation(user("a", images=["AAAA"] * n)),
    "tools": lambda n: chat_tools(*[function("f%d" % i) for i in range(n)]),
    "options": lambda n: dict(conversation(HELLO), options=fields(n)),
    "numbers of a context": lambda n: {"prompt": "a", "context": list(range(n))},
}
#: (client's dialect, what there are many of, maker, models)
TIMED = [(dialect, name, make, models) for dialect, cases, models in (
    ("chat", CHAT_CASES, FAMILIES[:3]), ("chat", SCHEMA_CASES, FAMILIES[3:]),
    ("responses", RESPONSES_CASES, FAMILIES[:3]), ("messages", MESSAGES_CASES, FAMILIES[:3]),
    ("gemini", GEMINI_CASES, FAMILIES[:3]), ("ollama", OLLAMA_CASES, FAMILIES[:3]))
    for name, make in cases.items()]


def prepare(dialect: str, body: Json, model: cp.Model) -> cp.Plan:
    """All that is done to a request before it goes up, and the names of its tools coming back."""
    client = cp.CLIENT_DIALECTS[dialect]
    plan = cp.Plan.make(client, cp.choose_upstream(client, model, ()), body, model, 0, "key")
    client.initiator(body)
    client.has_images(body)
    cp.linked_images(body)
    cp.dumps(plan.edit.body)
    cp.restore_names(b'data: {"a":"b"}\n\n' * 1000, plan.edit.names)
    return plan


#: Windows counts a thread's time in steps of 16 ms
CLOCK = time.perf_counter if os.name == "nt" else time.thread_time


def cpu_s(work: Callable[[Json], Any], make: Callable[[], Json], rounds: int) -> float:
    """The least time of this thread that the work took on a fresh body each time."""
    best = 1e9
    for _ in range(rounds):
        body = make()
        gc.collect()
        gc.disable()
        try:
            began = CLOCK()
            work(body)
            best = min(best, CLOCK() - began)
        finally:
            gc.enable()
    return best


class LinearTest(unittest.TestCase):
    """Four times as many of anything take about four times as long, never sixteen times."""

    def setUp(self) -> None:
        gc.freeze()             # of all that the other tests hold nothing is walked again and again

    def check(self, work: Callable[[Json], Any], make: Make, small: int = SMALL) -> None:
        few = many = 1e9
        for rounds in (1, 2, 4, 8, 16):             # a busy machine is given other chances
            few = min(few, cpu_s(work, lambda: make(small), rounds))
            many = min(many, cpu_s(work, lambda: make(TIMES * small), rounds))
            if many <= MOST_TIMES * max(few, 0.0005):
                return
        self.fail("%.4f s for %d, %.4f s for %d" % (few, small, many, TIMES * small))

    def test_many_of_one_kind_in_a_request_do_not_cost_the_square_of_their_number(self) -> None:
        for at, (dialect, name, make, models) in enumerate(TIMED if SLOW else TIMED[::4]):
            for model in models if SLOW else [models[at % len(models)]]:
                def body(count: int, make: Make = make, model: str = model) -> Json:
                    return dict(make(count), model=model, max_tokens=100)

                def work(body: Json, dialect: str = dialect, model: str = model) -> None:
                    with contextlib.suppress(cp.BadRequest):
                        prepare(dialect, body, MODELS[model])

                with self.subTest(dialect, many=name, model=model):
                    self.check(work, body)

    def test_many_pieces_of_an_answer_do_not_cost_the_square_of_their_number(self) -> None:
        def obscured(count: int) -> Json:
            about = {"output_index": 0, "item_id": "fc_1"}
            item = {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f",
                    "arguments": ""}
            stem = "response.function_call_arguments"
            return [{"type": "response.output_item.added", "item": item, "output_index": 0}] + [
                dict(about, type=stem + ".delta", delta="x" * 50, obfuscation="y")] * count + [
                dict(about, type=stem + ".done", arguments="x" * 50 * count)]

        def signed(count: int) -> Json:
            delta = {"type": "signature_delta", "signature": "x" * 50}
            return [{"type": "content_block_start", "index": 0, "content_block": {
                "type": "thinking", "thinking": "", "signature": ""}}] + [
                {"type": "content_block_delta", "index": 0, "delta": delta}] * count + [
                {"type": "content_block_stop", "index": 0}]

        def relay(events: Json) -> None:
            stream = cp.RESPONSES.stream("m", {})
            for event in events:
                stream.feed(cp.Frame(event["type"], cp.dumps(event)).encode())

        def decode(events: Json) -> None:
            decoder = cp.MESSAGES.stream_decoder()
            for event in events:
                decoder.read(cp.dumps(event))

        for work, make in ((relay, obscured), (decode, signed)):
            with self.subTest(work=work.__name__):
                self.check(work, make)

    def test_stop_sequences_that_nearly_match_freeze_no_stream(self) -> None:
        """The proxy watches for them itself where the upstream cannot, in the thread that relays
        all streams."""
        stops = ["a" * size + "b" for size in (1, 255, 2_000, 1_000_000)] + [
            "s%d" % number for number in range(1000)]
        request = cp.Request("m", stop=stops)
        cp.watch_stops(request)
        self.assertEqual(len(request.cut_at), 32)
        self.assertLessEqual(max(map(len, request.cut_at)), 256)
        self.assertEqual([name for name, _ in request.losses], ["stop"])

        def watch(count: int) -> None:
            cutter = cp.StopCutter(request.cut_at, cp.UsageMeter())
            cutter.feed(cp.PartStart(0, cp.Text("")))
            for _ in range(count):
                cutter.feed(cp.PartDelta(0, "a" * 10))

        self.check(watch, lambda count: count, 50)
        self.assertLess(cpu_s(watch, lambda: 100, 3), 1)


class LossesTest(ProxyCase):
    """What did not go upstream is told in a header of bounded size."""

    def lossy(self, body: Json) -> str:
        reply = self.proxy.post("/v1/messages", body)
        self.assertEqual(reply.status, 200, reply)
        return str(reply.headers["x-copilot-proxy-lossy"])

    def test_sixty_thousand_unknown_fields_make_no_header_of_a_megabyte(self) -> None:
        header = self.lossy(dict(message("hi", "gpt-4.1"), **fields(60_000)))
        self.assertLessEqual(len(header), 2048)
        names = header.split(", ")
        shown = [name for name in names if name.startswith("field_")]
        self.assertGreater(len(shown), 50)
        self.assertEqual(names[-1], "+%d more" % (60_000 - len(shown)))
        self.assertEqual(len(self.proxy.get("/stats").json["losses"]), len(shown))
        self.assertLess(max(len(record.getMessage()) for record in self.proxy.logs), 30_000)

    def test_a_few_losses_are_told_whole(self) -> None:
        body = dict(message("hi", "gpt-4.1"), top_k=3, odd=1)
        self.assertEqual(self.lossy(body), "odd, top_k")

    def test_the_name_of_a_field_is_cut_and_cannot_pretend_to_be_two(self) -> None:
        body = dict(message("hi", "gpt-4.1"), **{"a, b\r\nSet-Cookie: c": 1, "x" * 100_000: 1})
        self.assertEqual(self.lossy(body), "a; b\\r\\nSet-Cookie: c, " + "x" * 60)

    def test_several_calls_of_one_request_tell_the_same_losses_once(self) -> None:
        notes = cp.Notes()
        self.assertEqual((notes.add({"b", "a"}), notes.text), ({"a", "b"}, "a, b"))
        self.assertEqual((notes.add({"b", "c"}), notes.text), ({"c"}, "a, b, c"))
        many = {"name_%d" % number for number in range(1000)}
        fresh = notes.add(many, 50)
        header = notes.text
        self.assertLessEqual(len(header), 2048)
        self.assertEqual(header.split(", ")[-1], "+%d more" % (1050 - len(fresh)))
        self.assertEqual((notes.add(many, 50), notes.text), (set(), header))

    def test_a_loss_is_recorded_once_and_the_rest_is_counted(self) -> None:
        losses = cp.Losses()
        for _ in range(2):
            for number in range(5000):
                losses.add("field_%d" % number, "unknown")
        self.assertEqual((len(losses), losses.more), (200, 2 * 4800))


class ReferenceTest(ProxyCase):
    """A small request that names large things of the local store stays bounded."""

    def ask(self, given: Any, **more: Any) -> Any:
        return self.proxy.post("/v1/responses", response(given, **more))

    def answered(self, words: str) -> Json:
        reply = self.ask(words)
        self.assertEqual(reply.status, 200, reply)
        return reply.json

    def references(self, answer: Json, count: int) -> list[Json]:
        item = {"type": "item_reference", "id": answer["output"][-1]["id"]}
        return [HELLO] + [item] * count

    def check_refused(self, reply: Any) -> None:
        self.assertEqual((reply.status, reply.json["error"]["param"]), (413, "input"), reply)
        self.assertEqual(reply.json["error"]["type"], "invalid_request_error")

    def test_twenty_thousand_references_to_one_item_of_a_megabyte_are_refused(self) -> None:
        answer = self.answered("x" * 1_000_000)
        before = self.fake.count(RESPONSES)
        for count in (40, 4000, 20_000):
            for path in ("/v1/responses", "/v1/responses/input_tokens"):
                with self.subTest(count=count, path=path):
                    body = response(self.references(answer, count))
                    self.check_refused(self.proxy.post(path, body))
        self.assertEqual(self.fake.count(RESPONSES), before)

    def test_four_thousand_references_to_a_small_item_are_looked_up_once(self) -> None:
        answer = self.answered("small")
        with mock.patch.object(cp.StoredResponse, "parse_answer", autospec=True,
                               side_effect=cp.StoredResponse.parse_answer) as parse:
            self.assertEqual(self.ask(self.references(answer, 4000)).status, 200)
        self.assertEqual(parse.call_count, 1)
        sent = self.fake.last(RESPONSES).json["input"]
        self.assertEqual(sum("small" in json.dumps(item) for item in sent), 4000)

    def test_an_answer_that_is_not_meant_is_not_parsed(self) -> None:
        for number in range(20):
            answer = self.answered("answer %d" % number)
        with mock.patch.object(cp.StoredResponse, "parse_answer", autospec=True,
                               side_effect=cp.StoredResponse.parse_answer) as parse:
            self.assertEqual(self.ask([dict(HELLO), {"type": "item_reference",
                                                     "id": "msg_none"}]).status, 404)
            self.assertEqual(parse.call_count, 0)
            self.assertEqual(self.ask(self.references(answer, 1)).status, 200)
            self.assertEqual(parse.call_count, 1)

    @long_run
    def test_a_chain_of_responses_grows_to_the_limit_of_a_body_and_no_further(self) -> None:
        answer = self.answered("x" * 9_000_000)          # kept with its echo: 18 MB
        more = self.ask("short", previous_response_id=answer["id"])
        self.assertEqual(more.status, 200)
        self.check_refused(self.ask("y" * 20_000_000, previous_response_id=more.json["id"]))


class SlowImages(Serving, HTTPServer):
    """Serves an image of `size` bytes at every path but /silent, where nothing comes.

    `asked`: the paths; `dropped`: set when a silent connection was closed by the other side."""

    size = 100

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), SlowImageHandler)
        self.asked: list[str] = []
        self.dropped = threading.Event()


class SlowImageHandler(BaseHTTPRequestHandler):
    server: SlowImages

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path.startswith("/silent"):
            self.connection.settimeout(DEADLINE_S)
            with contextlib.suppress(OSError):
                self.connection.recv(1)                  # until the other side closes
                self.server.dropped.set()
            return
        data = b"\x89PNG\r\n\x1a\n" + bytes(self.server.size)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class LinkedImageTest(ProxyCase):
    """--fetch-images: for nobody who has left, and no more than the upstream would take."""

    settings = {"fetch_images": True}

    def setUp(self) -> None:
        super().setUp()
        self.images = self.enter(SlowImages())
        fetcher = self.proxy.app.images
        fetcher.resolve = lambda host, port, *rest: [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]
        fetcher.is_allowed = lambda address: True

    def turn(self, *paths: str) -> Json:
        return user([{"type": "image_url", "image_url": {
            "url": "http://images.example:%d%s" % (self.images.server_port, path)}}
            for path in paths])

    def body(self, *turns: Json) -> Json:
        return {"model": "gpt-4.1", "messages": list(turns)}

    def test_no_image_is_fetched_for_a_client_that_has_left(self) -> None:
        data = json.dumps(self.body(self.turn("/never", "/silent"))).encode()
        sock = self.proxy.connect()
        sock.sendall(post_head("chat/completions", data) + data)
        wait_until(lambda: self.images.asked, "the first image is asked for")
        sock.close()
        self.assertTrue(self.images.dropped.wait(DEADLINE_S))
        wait_until(lambda: self.proxy.get("/stats").json["recent"], "the request has ended")
        self.assertEqual(self.images.asked, ["/silent"])
        self.assertEqual(self.fake.count(CHAT), 0)

    def test_old_images_that_would_be_left_out_are_not_fetched(self) -> None:
        self.images.size = 3_000_000
        turns = [self.turn("/%d" % number) for number in range(30)]
        reply = self.proxy.post("/v1/chat/completions", self.body(*turns))
        self.assertEqual(reply.status, 200, reply)
        self.assertEqual(self.images.asked, ["/29", "/28"])
        self.assertIn("images", reply.headers["x-copilot-proxy-lossy"])
        self.assertEqual(self.fake.last(CHAT).body.count(b"an image was left out"), 29)

    def test_images_that_make_a_huge_body_of_a_small_one_are_refused(self) -> None:
        self.images.size = 5_000_000
        turn = self.turn(*["/%d" % number for number in range(20)])
        reply = self.proxy.post("/v1/chat/completions", self.body(turn))
        self.assertEqual(reply.status, 413, reply)
        self.assertLess(len(self.images.asked), 7)

    def test_a_turn_with_a_thousand_images_fetches_none(self) -> None:
        turn = self.turn(*["/%d" % number for number in range(1000)])
        reply = self.proxy.post("/v1/chat/completions", self.body(turn))
        self.assertEqual((reply.status, self.images.asked), (400, []))

    def test_what_is_kept_of_fetched_images_is_bounded_in_bytes(self) -> None:
        self.images.size = 2_500_000
        fetcher = self.proxy.app.images
        for number in range(12):
            self.proxy.post("/v1/chat/completions", self.body(self.turn("/%d" % number)))
        kept = sum(len(data) for _, data in fetcher._images.values())
        self.assertLess(kept, 16 * 1024 * 1024)
        self.proxy.post("/v1/chat/completions", self.body(self.turn("/11")))
        self.assertEqual(self.images.asked.count("/11"), 1)


class SeveralCallsTest(ProxyCase):
    """A request that takes several calls upstream passes no limit with all of them at once."""

    def complete(self, proxy: Proxy, count: int, **headers: str) -> Reply:
        prompts = ["prompt %d" % number for number in range(count)]
        return proxy.post("/v1/completions", {"model": "gpt-4.1", "prompt": prompts}, **headers)

    def embed(self, proxy: Proxy, count: int) -> Reply:
        return proxy.post("/v1/embeddings", {
            "model": "text-embedding-3-small", "dimensions": 4, "input": ["a"] * count})

    def limited(self, **settings: Any) -> Proxy:
        proxy: Proxy = self.enter(Proxy(self.fake, **settings))
        return proxy

    def test_five_hundred_prompts_are_refused(self) -> None:
        for count in (129, 500):
            reply = self.complete(self.proxy, count)
            self.assertEqual((reply.status, reply.json["error"]["param"]), (400, "prompt"))
        self.assertEqual(self.fake.count(CHAT), 0)
        reply = self.complete(self.proxy, 128)
        self.assertEqual((reply.status, len(reply.json["choices"])), (200, 128))

    def test_twenty_thousand_embeddings_are_refused(self) -> None:
        for count in (2049, 20_000):
            reply = self.embed(self.proxy, count)
            self.assertEqual((reply.status, reply.json["error"]["param"]), (400, "input"))
        self.assertEqual(self.fake.count(EMBEDDINGS), 0)
        reply = self.embed(self.proxy, 2048)
        self.assertEqual((reply.status, self.fake.count(EMBEDDINGS)), (200, 4))
        self.assertEqual([item["index"] for item in reply.json["data"]], list(range(2048)))
        self.assertEqual(reply.json["usage"], {"prompt_tokens": 2048, "total_tokens": 2048})

    def test_the_minute_counts_every_call(self) -> None:
        proxy = self.limited(requests_per_minute=5)
        reply = self.complete(proxy, 6)
        self.assertEqual((reply.status, reply.json["error"]["code"]), (429, "rate_limit_exceeded"))
        self.assertIn("6 calls", reply.json["error"]["message"])
        self.assertEqual(self.fake.count(CHAT), 0)
        reply = self.embed(proxy, 2048)                  # four batches
        self.assertEqual((reply.status, reply.headers["x-ratelimit-remaining-requests"]),
                         (200, "1"))
        self.assertEqual(self.complete(proxy, 2).status, 429)
        self.assertEqual(self.complete(proxy, 1).status, 200)
        self.assertEqual(self.complete(proxy, 1).status, 429)

    @long_run
    def test_the_rate_holds_between_the_calls_of_a_request(self) -> None:
        for ask in (lambda proxy: self.complete(proxy, 4), lambda proxy: self.embed(proxy, 2048)):
            proxy = self.limited(rate_limit=0.1)
            began = time.monotonic()
            self.assertEqual(ask(proxy).status, 200)
            self.assertGreaterEqual(time.monotonic() - began, 0.3)

    def test_a_request_whose_last_call_would_come_in_hours_is_refused_at_once(self) -> None:
        proxy = self.limited(rate_limit=60.0)
        for reply in (self.complete(proxy, 2), self.embed(proxy, 2048)):
            self.assertEqual((reply.status, reply.json["error"]["code"]),
                             (429, "rate_limit_exceeded"))
        self.assertEqual((self.fake.count(CHAT), self.fake.count(EMBEDDINGS)), (0, 0))
        self.assertEqual(self.complete(proxy, 1).status, 200)

    def test_the_budget_ends_a_request_between_two_calls(self) -> None:
        self.complete(self.proxy, 1)
        cost = self.fake.told[-1][4] / 1e9
        before = self.fake.count(CHAT)
        for settings, headers in (({"budget": cost * 2.5}, {}),
                                  ({}, {"x-copilot-proxy-budget": "%.9f" % (cost * 2.5)})):
            proxy = self.limited(**settings)
            reply = self.complete(proxy, 10, **headers)
            self.assertEqual((reply.status, reply.json["error"]["code"]), (429, "budget_exceeded"))
            self.assertEqual(self.fake.count(CHAT) - before, 3)
            before = self.fake.count(CHAT)

    def test_the_prompts_of_a_client_that_has_left_are_not_asked(self) -> None:
        self.fake.script(CHAT, Answer(status=0), Answer(status=0, hold=True))
        data = json.dumps({"model": "gpt-4.1", "prompt": ["a", "b", "c", "d"]}).encode()
        sock = self.proxy.connect()
        sock.sendall(post_head("completions", data) + data)
        wait_until(lambda: self.fake.holding, "the second prompt is asked")
        sock.close()
        wait_until(lambda: self.proxy.get("/stats").json["recent"], "the request has ended")
        self.fake.release()
        self.assertEqual(self.fake.count(CHAT), 2)

    def test_a_person_who_approves_is_told_how_many_calls_it_takes(self) -> None:
        proxy = self.limited(manual=True)
        asker = threading.Thread(target=self.complete, args=(proxy, 3))
        asker.start()
        waiting = wait_until(lambda: proxy.get("/approvals").json["approvals"])
        self.assertEqual(waiting[0]["text"], "[3 calls] prompt 0")
        proxy.post("/approvals/" + waiting[0]["id"], {"allow": True})
        asker.join(DEADLINE_S)
        self.assertEqual(self.fake.count(CHAT), 3)


class SessionBudgetTest(ProxyCase):
    """A session's budget is that of one key."""

    settings = {"api_key": ("sk-of-the-first-person", "sk-of-the-second-person"),
                "no_history": False}

    def ask(self, proxy: Proxy, key: str, budget: float, **more: str) -> Reply:
        headers = dict({"x-api-key": key, "x-copilot-proxy-budget": "%.9f" % budget}, **more)
        reply = proxy.post("/v1/chat/completions", chat("a"), **headers)
        wait_until(lambda: not proxy.app.ledger.running, "the request is recorded")
        return reply

    def test_two_keys_with_one_session_name_share_no_budget(self) -> None:
        first, second = self.settings["api_key"]
        self.ask(self.proxy, first, 1000)
        cost = self.fake.told[-1][4] / 1e9
        for named in ({"session_id": "same"}, {"User-Agent": "client/1"}):
            with self.subTest(named):
                spent = [self.ask(self.proxy, first, cost * 1.5, **named).status
                         for _ in range(3)]
                self.assertEqual(spent, [200, 200, 429])
                self.assertEqual(self.ask(self.proxy, second, cost * 1.5, **named).status, 200)
                raised = self.ask(self.proxy, second, cost * 100, **named)
                self.assertEqual(raised.status, 200)
                still = self.ask(self.proxy, first, cost * 1.5, **named)
                self.assertEqual(still.status, 429, "the other key's header raised the limit")

    def test_the_budgets_of_two_keys_stay_apart_after_a_restart(self) -> None:
        first, second = self.settings["api_key"]
        self.ask(self.proxy, first, 1000, session_id="same")
        cost = self.fake.told[-1][4] / 1e9
        wait_until(lambda: self.proxy.get("/history", **{"x-api-key": first}).json["rows"])
        self.proxy.app.close()
        with Proxy(self.fake, **dict(self.settings, data_dir=self.proxy.data_dir)) as again:
            self.assertEqual(self.ask(again, first, cost / 2, session_id="same").status, 429)
            self.assertEqual(self.ask(again, second, cost / 2, session_id="same").status, 200)

    def test_a_history_without_the_column_of_keys_is_read_on(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.closing(sqlite3.connect(os.path.join(folder, "history.sqlite3"))) as db:
                old = cp.COLUMNS.replace("key TEXT, ", "")
                self.assertNotEqual(old, cp.COLUMNS)
                db.execute("CREATE TABLE requests (n INTEGER PRIMARY KEY, %s)" % old)
                db.execute("INSERT INTO requests (id, at, nano_aiu) VALUES ('old', 1e9, 5)")
                db.commit()
            with Proxy(self.fake, no_history=False, data_dir=folder) as proxy:
                proxy.post("/v1/chat/completions", chat("a"))
                rows = wait_until(lambda: proxy.get("/history").json["rows"][1:] and proxy.get(
                    "/history").json["rows"])
                self.assertEqual([row["id"] == "old" for row in rows], [False, True])
                self.assertEqual(os.listdir(folder).count("history.sqlite3"), 1)
                self.assertFalse([name for name in os.listdir(folder) if ".bad" in name])


class Taught(NamedTuple):
    """One client sends `refused` beside the usual body, which the upstream refuses, and another
    one `good`, which it takes."""
    path: str
    body: Json
    refused: Json
    good: Json
    refusal: Refuse


def refused_value(name: str, value: str, code: str = "invalid_value") -> Refuse:
    return bad("Invalid value: '%s'. Supported values are: 'low', 'medium', and 'high'." % value,
               code, name)


LONG_KEY = "k" * 100
TAUGHT = {
    "a cache key that is too long": Taught(
        RESPONSES, response("hi"), {"prompt_cache_key": LONG_KEY}, {"prompt_cache_key": "short"},
        bad("Invalid 'prompt_cache_key': string too long. Expected a string with maximum length 64,"
            " but got a string with length 100 instead.", "string_above_max_length",
            "prompt_cache_key")),
    "verbosity of chat": Taught(
        CHAT, chat("hi", "gpt-5-mini"), {"verbosity": "loud"}, {"verbosity": "low"},
        refused_value("verbosity", "loud")),
    "verbosity of responses": Taught(
        RESPONSES, response("hi"), {"text": {"verbosity": "loud"}}, {"text": {"verbosity": "low"}},
        refused_value("text.verbosity", "loud")),
    "a summary of reasoning": Taught(
        RESPONSES, response("hi"), {"reasoning": {"summary": "long"}},
        {"reasoning": {"summary": "auto"}}, refused_value("reasoning.summary", "long")),
    "a temperature in OpenAI's words": Taught(
        CHAT, chat("hi"), {"temperature": 1.75}, {"temperature": 0.5},
        bad("Unsupported value: 'temperature' does not support 1.75 with this model. Only values "
            "up to 1 are supported.", "unsupported_value", "temperature")),
    "a temperature without a code": Taught(
        CHAT, chat("hi"), {"temperature": 1.75}, {"temperature": 0.5},
        bad_message("'temperature' does not support 1.75 with this model.")),
    "a temperature in Bedrock's words": Taught(
        MESSAGES, message("hi"), {"temperature": 1.75}, {"temperature": 0.5},
        bad_message("temperature: range: 0..1")),
    "a limit that is no field of tokens": Taught(
        CHAT, chat("hi"), {"top_p": 1.75}, {"top_p": 0.5},
        bad_message("top_p: Input should be less than or equal to 1.5")),
    "what holds beside other fields only": Taught(
        CHAT, chat("hi"), {"logprobs": True, "seed": 1}, {"logprobs": True, "seed": 2},
        bad_message("'logprobs' is not supported when seed is 1.")),
    "the name of a field as a value": Taught(
        CHAT, chat("hi"), {"user": "temperature", "temperature": 0.5}, {"temperature": 0.5},
        bad("Unsupported value: 'temperature' is not supported with this model.",
            "unsupported_value", "user")),
    "a value that reads like a refusal": Taught(
        CHAT, chat("hi"),
        {"user": "x' `temperature`: Extra inputs are not permitted", "temperature": 0.5},
        {"temperature": 0.5},
        bad_message("user: got 'x\\' `temperature`: Extra inputs are not permitted'")),
    "a field that reads like a refusal": Taught(
        CHAT, chat("hi"), {"temperature: Extra inputs, the rest": 1, "temperature": 0.5},
        {"temperature": 0.5},
        bad_message("temperature: Extra inputs, the rest: Extra inputs are not permitted")),
}


class LearningTest(ProxyCase):
    """What one client's value taught changes nothing of what another client sends."""

    def ask(self, path: str, body: Json, **headers: str) -> int:
        """Calls upstream that it took."""
        before = self.fake.count(path)
        route = path if path.startswith("/v1") else "/v1" + path
        reply = self.proxy.post(route, body, **headers)
        self.assertEqual(reply.status, 200, reply)
        return int(self.fake.count(path) - before)

    def refuse(self, refusal: Refuse, holds: Callable[[Ask], Any]) -> None:
        def check(ask: Ask) -> None:
            if holds(ask):
                raise refusal
        self.fake.refusals = [check]

    def test_a_refused_value_takes_the_field_from_nobody_else(self) -> None:
        self.fake.lenient = {"fields"}
        for name, case in TAUGHT.items():
            with self.subTest(name):
                account: Any = self.proxy.app.login.account
                account.memory = cp.LearnedRepairs()
                self.refuse(case.refusal, lambda ask, case=case: all(    # type: ignore[misc]
                    ask.body.get(key) == value for key, value in case.refused.items()))
                self.assertEqual(self.ask(case.path, dict(case.body, **case.refused)), 2)
                self.assertEqual(self.ask(case.path, dict(case.body, **case.good)), 1)
                sent = self.fake.last(case.path).json
                self.assertEqual({key: sent.get(key) for key in case.good}, case.good)

    def test_the_same_value_is_left_out_at_once_the_next_time(self) -> None:
        for name in ("a cache key that is too long", "verbosity of chat",
                     "a temperature in OpenAI's words", "a temperature in Bedrock's words"):
            case = TAUGHT[name]
            with self.subTest(name):
                self.refuse(case.refusal, lambda ask, case=case: all(    # type: ignore[misc]
                    ask.body.get(key) == value for key, value in case.refused.items()))
                calls = [self.ask(case.path, dict(case.body, **case.refused)) for _ in range(3)]
                self.assertEqual(calls, [2, 1, 1])

    def turns(self, *marks: str) -> Json:
        images = [{"type": "image_url", "image_url": {
            "url": "data:image/png;base64," + mark * 40}} for mark in marks]
        return [user(images), assistant("b"), user("and?")]

    def test_one_bad_image_takes_those_of_nobody_else(self) -> None:
        for refusal in (bad_message("Could not process image"),
                        Refuse(413, "Request Entity Too Large")):
            with self.subTest(refusal.status):
                self.refuse(refusal, lambda ask: b"aaaa" in ask.record.body)
                account: Any = self.proxy.app.login.account
                account.memory = cp.LearnedRepairs()
                calls = [self.ask(CHAT, chat("", messages=self.turns("a"))) for _ in range(2)]
                self.assertEqual(calls, [2, 1])
                self.assertEqual(self.ask(CHAT, chat("", messages=self.turns("b", "c"))), 1)
                self.assertEqual(self.fake.last(CHAT).body.count(b"base64"), 2)

    def test_one_unknown_beta_takes_those_of_nobody_else(self) -> None:
        first, second = "advanced-tool-use-2025-01-01", "interleaved-thinking-2025-05-14"
        self.refuse(bad_message("invalid beta flag"),
                    lambda ask: first in ask.headers.get("anthropic-beta", ""))
        calls = [self.ask(MESSAGES, message("hi"), **{"anthropic-beta": first}) for _ in range(2)]
        self.assertEqual(calls, [2, 1])
        self.assertEqual(self.ask(MESSAGES, message("hi"), **{"anthropic-beta": second}), 1)
        self.assertEqual(self.fake.last(MESSAGES).headers.get("anthropic-beta"), second)

    def test_words_of_a_client_close_no_endpoint(self) -> None:
        words = "x code=unsupported_api_for_model"
        self.refuse(bad("Invalid value: '%s'" % words, "invalid_value", "verbosity"),
                    lambda ask: ask.body.get("verbosity") == words)
        self.assertEqual(self.ask(CHAT, chat("hi", "gpt-5-mini", verbosity=words)), 2)
        self.assertEqual(self.ask(CHAT, chat("hi", "gpt-5-mini")), 1)

    def test_a_thousand_refused_values_push_out_no_fact(self) -> None:
        self.fake.lenient = {"fields"}
        key = ("gpt-5-mini", CHAT)
        self.refuse(bad_message("odd: Extra inputs are not permitted"),
                    lambda ask: "odd" in ask.body)
        self.assertEqual(self.ask(CHAT, chat("hi", "gpt-5-mini", odd=1)), 2)
        for number in range(120):
            value = "loud_%d" % number
            self.refuse(refused_value("verbosity", value),
                        lambda ask, value=value: ask.body.get("verbosity") == value)
            self.assertEqual(self.ask(CHAT, chat("hi", "gpt-5-mini", verbosity=value)), 2)
        memory = self.proxy.app.login.account.memory             # type: ignore[union-attr]
        self.assertLessEqual(len(memory._values[key]), 50)
        self.assertEqual(self.ask(CHAT, chat("hi", "gpt-5-mini", odd=1)), 1)
        self.assertNotIn("odd", self.fake.last(CHAT).json)

    def test_a_bad_value_in_a_compaction_closes_compaction_for_nobody(self) -> None:
        self.fake.compacts = True
        self.refuse(bad("no such choice", "bad_choice", "tool_choice"),
                    lambda ask: ask.body.get("tool_choice") == {"type": "function", "name": "no"})
        first = response("hi", tools=[flat("f")], tool_choice={"type": "function", "name": "no"})
        for body in (first, response("hi")):
            self.ask_compaction(body)
            self.assertEqual(self.fake.last(RESPONSES).json["input"][-1]["type"],
                             "compaction_trigger")

    def ask_compaction(self, body: Json) -> None:
        reply = self.proxy.post("/v1/responses/compact", body)
        self.assertEqual(reply.status, 200, reply)


class DrippingTest(ProxyCase):
    """What comes byte by byte ends by a time limit, though it is never silent for long."""

    def setUp(self) -> None:
        super().setUp()
        self.over = threading.Event()
        self.addCleanup(self.over.set)
        for name, limit_s in (("ERROR_BODY_S", 0.1), ("SMALL_ANSWER_S", 0.15)):
            self.enter(mock.patch.object(cp, name, limit_s))

    def drip(self, beginning: bytes) -> Iterator[bytes]:
        """The beginning, then byte by byte until the test is over."""
        yield beginning
        while not self.over.wait(0.02):
            yield b" "

    def answer(self, status: int, beginning: bytes, kind: str = "application/json") -> Answer:
        chunks: Any = self.drip(beginning)
        return Answer(status=status, headers={"content-type": kind}, chunks=chunks)

    def test_a_refusal_that_drips_is_told_with_what_has_come(self) -> None:
        for status in (400, 404, 422) if SLOW else (400,):
            for stream in (False, True):
                self.fake.script(CHAT, self.answer(status, b'{"error": {"message": "no"}}'))
                began = time.monotonic()
                reply = self.proxy.post("/v1/chat/completions", chat("hi", stream=stream))
                with self.subTest(status, stream=stream):
                    self.assertEqual((reply.status, reply.json["error"]["message"]),
                                     (status, "no"))
                    self.assertLess(time.monotonic() - began, DEADLINE_S)

    def test_a_list_of_models_that_drips_is_given_up(self) -> None:
        account = wait_until(lambda: self.proxy.app.login.account)
        account.catalogue.value = None
        self.fake.script("/models", self.answer(200, b'{"data": ['))
        began = time.monotonic()
        self.assertEqual(self.proxy.get("/v1/models").status, 504)
        self.assertLess(time.monotonic() - began, DEADLINE_S)

    def test_a_count_that_drips_is_estimated(self) -> None:
        self.fake.script("/v1/messages/count_tokens", self.answer(200, b'{"input_tokens": '))
        began = time.monotonic()
        reply = self.proxy.post("/v1/messages/count_tokens", message("hi"))
        self.assertEqual((reply.status, reply.json["input_tokens"] > 0), (200, True))
        self.assertLess(time.monotonic() - began, DEADLINE_S)

    def test_a_refusal_of_many_megabytes_is_not_read_to_its_end(self) -> None:
        sent: list[int] = []

        def pieces() -> Iterator[bytes]:
            for _ in range(1000):
                sent.append(1)
                yield b"x" * 100_000
        chunks: Any = pieces()
        self.fake.script(CHAT, Answer(status=400, chunks=chunks))
        reply = self.proxy.post("/v1/chat/completions", chat("hi"))
        self.assertEqual(reply.status, 400)
        self.assertLess(len(reply.body), 5000)
        self.assertLess(len(sent), 1000)


class LeavingTest(ProxyCase):
    """Nothing long is computed for a client that has left, and nobody waits for it meanwhile."""

    def large(self) -> bytes:
        """A body that is prepared in a thread."""
        turns = [user("a%d" % number) for number in range(5000)]
        return json.dumps(message("", "gpt-5.3-codex", messages=turns)).encode()

    def test_preparing_stops_when_the_client_has_left(self) -> None:
        begun, go_on, over = (threading.Event() for _ in range(3))
        steps: list[str] = []
        pair_results, prepare = cp.pair_tool_results, cp.prepare_body
        tidy = cp.normalise_history

        def pair(*what: Any) -> None:
            begun.set()
            go_on.wait(DEADLINE_S)
            pair_results(*what)

        def fit(*what: Any) -> None:
            try:
                prepare(*what)
            finally:
                over.set()

        def count(*what: Any) -> None:
            steps.append("normalise_history")
            tidy(*what)

        self.addCleanup(go_on.set)
        self.enter(mock.patch.multiple(
            cp, pair_tool_results=pair, prepare_body=fit, normalise_history=count))
        for path in ("messages", "chat/completions"):
            with self.subTest(path):
                seen = len(self.proxy.get("/stats").json["recent"])
                data = self.large()
                sock = self.proxy.connect()
                sock.sendall(post_head(path, data) + data)
                self.assertTrue(begun.wait(DEADLINE_S))
                sock.close()
                wait_until(lambda: len(self.proxy.get("/stats").json["recent"]) > seen)
                go_on.set()
                self.assertTrue(over.wait(DEADLINE_S))
                self.assertEqual(steps, [])
                for event in (begun, go_on, over):
                    event.clear()
        self.assertEqual(self.fake.count(RESPONSES), 0)

    def test_others_are_served_while_something_large_is_counted_or_read(self) -> None:
        begun, go_on = threading.Event(), threading.Event()
        self.addCleanup(go_on.set)

        def slow(function: Callable[..., Any]) -> Callable[..., Any]:
            def work(*what: Any) -> Any:
                begun.set()
                go_on.wait(DEADLINE_S)
                return function(*what)
            return work

        self.enter(mock.patch.multiple(cp, estimate_tokens=slow(cp.estimate_tokens),
                                       read_embeddings=slow(cp.read_embeddings)))
        body = {"messages": message("x" * 300_000)["messages"]}
        gemini = {"contents": [{"parts": [{"text": "x" * 300_000}]}]}
        vectors = {"model": "text-embedding-3-small", "dimensions": 1536, "input": ["a"] * 30}
        for path, more in (("/v1/messages/count_tokens", dict(body, model="gpt-4.1")),
                           ("/v1/responses/input_tokens", response("x" * 300_000)),
                           ("/v1beta/models/gpt-4.1:countTokens", gemini),
                           ("/v1/embeddings", vectors)):
            replies: list[Reply] = []
            asker = threading.Thread(target=lambda: replies.append(
                self.proxy.post(path, more)))                     # noqa: B023
            with self.subTest(path):
                asker.start()
                self.assertTrue(begun.wait(DEADLINE_S))
                self.assertEqual(self.proxy.get("/health").status, 200)
                go_on.set()
                asker.join(DEADLINE_S)
                self.assertEqual([reply.status for reply in replies], [200])
                begun.clear()
                go_on.clear()

    def test_long_pieces_of_a_counted_text_are_not_remembered(self) -> None:
        """Each piece of base64 stayed in a cache of 65,536 entries: 4 GB."""
        cp._known_weight.cache_clear()
        for number in range(20):
            self.assertGreater(cp.count_text(("%x" % (number + 16)) * 3000), 2000)
        self.assertEqual(cp._known_weight.cache_info().currsize, 0)
        cp.count_text("some words")
        self.assertGreater(cp._known_weight.cache_info().currsize, 0)



MB = 1024 * 1024
MOST_TIMES_BODY, MOST_BYTES = 8, 300 * MB
#: a Python from 3.12 on that compiled the script itself keeps the memory of that: 75 MB before any
#: request, in place of 30
MOST_GROWTH_BYTES = 240 * MB
#: a smaller body is bounded by MOST_BYTES alone: an empty object takes two bytes on the wire and
#: 64 of memory, so no multiple of a small body holds
LARGE_BODY_BYTES = 8 * MB


def status_bytes(pid: int, name: str) -> int:
    """A figure of a process in /proc: VmRSS now, or its peak VmHWM."""
    with open("/proc/%d/status" % pid, encoding="ascii") as file:
        line = next(line for line in file if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def can_measure() -> bool:
    """Are there peaks of processes here, and may they be set back?"""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
        return status_bytes(os.getpid(), "VmHWM") > 0
    except (OSError, StopIteration):
        return False


def largest(make: Callable[[int], bytes], most_bytes: int = 31 * MB) -> bytes:
    """The largest such body that the reader takes: many dense values are refused before they are
    read, so the worst is what just passes."""
    def fits(count: int) -> bool:
        data = make(count)
        if len(data) > most_bytes:
            return False
        try:
            cp.loads(data)
        except cp.TooManyValues:
            return False
        return True

    count = 1 << 14
    while fits(2 * count):
        count *= 2
    for step in (count // 2, count // 4, count // 8):
        if fits(count + step):
            count += step
    return make(count)


def turns_of(model: str, content: bytes, more: bytes = b"") -> bytes:
    """A conversation with a short question at its end, so that the echo of the fake is short."""
    return (b'{"model":"%s","max_tokens":9,"messages":[{"role":"user","content":%b},'
            b'{"role":"assistant","content":"b"},{"role":"user","content":"hi"}]%b}'
            % (model.encode(), content, more))


def many(piece: bytes, count: int) -> bytes:
    return b",".join([piece] * count)


def image(size: int) -> bytes:
    return b'{"type":"image_url","image_url":{"url":"data:image/png;base64,iVBORw0KGgo%b"}}' % (
        b"A" * size)


def numbered(count: int, tail: bytes = b"") -> bytes:
    return b"".join(b',"field_%d%b":1' % (number, tail) for number in range(count))


GPT, CODEX, SONNET = FAMILIES[:3]
HEAVY: dict[str, tuple[str, Callable[[], bytes]]] = {
    "nested lists": (CHAT, lambda: largest(
        lambda n: turns_of(GPT, b'"a"', b',"metadata":{"a":[%b]}' % many(b"[[]]", n)))),
    "a deep nest beside many": (CHAT, lambda: largest(
        lambda n: turns_of(CODEX, b'"a"', b',"metadata":{"a":%b1%b,"b":[%b]}' % (
            b'{"x":[' * 80, b"]}" * 80, many(b"{}", n))))),
    "short fields": (CHAT, lambda: largest(lambda n: turns_of(CODEX, b'"a"', numbered(n)))),
    "long fields": (CHAT, lambda: largest(
        lambda n: turns_of(CODEX, b'"a"', numbered(n, b"x" * 80)))),
    "messages that are translated": (CHAT, lambda: largest(
        lambda n: b'{"model":"gpt-5.3-codex","messages":[%b]}' % many(
            b'{"role":"user","content":"a"}', n))),
    "parts that are translated": (MESSAGES, lambda: largest(
        lambda n: turns_of(GPT, b"[%b]" % many(b'{"type":"text","text":"a"}', n)))),
    "equal call ids": (MESSAGES, lambda: largest(
        lambda n: b'{"model":"claude-sonnet-4.6","max_tokens":9,"messages":[{"role":"user",'
        b'"content":"a"},{"role":"assistant","content":[%b]}]}' % many(
            b'{"type":"tool_use","id":"c","name":"f","input":{}}', n))),
    "one text": (CHAT, lambda: turns_of(CODEX, b'"%b"' % (b"x" * 31 * MB))),
    "one text with one emoji": (CHAT, lambda: turns_of(
        CODEX, b'"%b\xf0\x9f\x98\x80"' % (b"x" * 31 * MB))),
    "an escaped emoji": (MESSAGES, lambda: turns_of(
        GPT, b'"%b\\ud83d\\ude00"' % (b"x" * 31 * MB))),
    "an emoji in every line": (MESSAGES, lambda: turns_of(
        SONNET, b'"%b"' % ((b"x" * 200 + b"\xf0\x9f\x98\x80") * (31 * MB // 204)))),
    "an emoji in every word": (MESSAGES, lambda: turns_of(
        CODEX, b'"%b"' % ((b"x" * 10 + b"\xf0\x9f\x98\x80") * (31 * MB // 14)))),
    "an old image": (CHAT, lambda: turns_of(CODEX, b"[%b]" % image(30 * MB))),
    "an image": (CHAT, lambda: b'{"model":"gpt-5.3-codex","messages":[{"role":"user","content":'
                 b"[%b]}]}" % image(30 * MB)),
    "joined states of reasoning": (CHAT, lambda: turns_of(SONNET, b'"a"').replace(
        b'"content":"b"', b'"content":"b","reasoning_opaque":"%b"' % (b"cpx1." * 6 * MB))),
}


@unittest.skipUnless(can_measure(), "the peak of another process is measured on Linux only")
class MemoryTest(EnterCase):
    """What one request makes the real server take, at its peak."""

    fake: FakeUpstream
    command: Command
    port: int

    def setUp(self) -> None:
        self.fake = self.enter(FakeUpstream())
        self.fake.lenient = {"fields"}
        home = self.enter(tempfile.TemporaryDirectory())
        self.command = self.enter(Command("start", "--port", "0", "--github-url", self.fake.url,
                                          home=home, GH_TOKEN="ghu_fake"))
        self.port = urllib.parse.urlsplit(self.command.wait_for_url()).port or 0
        for path, body in ((CHAT, chat("hi")), (RESPONSES, response("hi")),
                           (MESSAGES, message("hi"))):
            self.post(path, json.dumps(body).encode())

    def post(self, path: str, data: bytes) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            route = path if path.startswith("/v1") else "/v1" + path
            return send(connection, "POST", route, data)
        finally:
            connection.close()

    def check(self, path: str, data: bytes, size: int = 0) -> None:
        """size: of the request with all that it refers to."""
        pid = self.command.process.pid
        with open("/proc/%d/clear_refs" % pid, "w", encoding="ascii") as file:
            file.write("5")
        before = status_bytes(pid, "VmRSS")
        reply = self.post(path, data)
        peak = status_bytes(pid, "VmHWM")
        size = size or len(data)
        about = "%d of %.1f MB: %.1f MB, then %.1f MB" % (
            reply.status, size / MB, before / MB, peak / MB)
        self.assertEqual(reply.status, 200, about + repr(reply.body[:300]))
        self.assertLess(peak, max(MOST_BYTES, before + MOST_GROWTH_BYTES), about)
        if size >= LARGE_BODY_BYTES:
            self.assertLess(peak - before, MOST_TIMES_BODY * size, about)

    @long_run
    def test_no_body_takes_more_than_eight_times_its_size_or_300_megabytes(self) -> None:
        for name in ("nested lists", "long fields", "messages that are translated", "an image"):
            path, make = HEAVY[name]
            with self.subTest(name):
                self.check(path, make())

    @long_run
    def test_one_emoji_makes_no_text_eight_times_as_large(self) -> None:
        path, make = HEAVY["one text with one emoji"]
        self.check(path, make())

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_every_heavy_body_by_itself(self) -> None:
        for name, (path, make) in HEAVY.items():
            with self.subTest(name):
                self.doCleanups()
                self.setUp()
                self.check(path, make())

    @long_run
    def test_a_text_that_takes_many_times_its_size_to_read_is_refused(self) -> None:
        emojis = (b"x" * 21 + b"\xf0\x9f\x98\x80") * (31 * MB // 25)
        texts = (b"\\n" * (31 * MB // 2), emojis, b"\\u4e2d" * (31 * MB // 6),
                 b"\\ud83d" * (31 * MB // 6), b'a\\"' * (31 * MB // 3))
        for text_of_it in texts:
            with self.subTest(text_of_it[:30]):
                data = turns_of(GPT, b'"%b"' % text_of_it)
                self.assertEqual(self.post(CHAT, data).status, 413)
                self.assertLess(status_bytes(self.command.process.pid, "VmHWM"), MOST_BYTES)

    @long_run
    def test_references_take_no_more_than_the_same_request_written_out(self) -> None:
        reply = self.post(RESPONSES, json.dumps(response("x" * MB)).encode())
        item = {"type": "item_reference", "id": reply.json["output"][-1]["id"]}
        for count in (29, 4000):
            body = response([HELLO] + [item] * count + [HELLO])
            if count == 29:
                self.check(RESPONSES, json.dumps(body).encode(), count * MB)
                continue
            pid = self.command.process.pid
            self.assertEqual(self.post(RESPONSES, json.dumps(body).encode()).status, 413)
            self.assertLess(status_bytes(pid, "VmHWM"), MOST_BYTES)

    @long_run
    def test_many_embeddings_stay_below_300_megabytes(self) -> None:
        body = {"model": "text-embedding-3-small", "dimensions": 1536,
                "input": ["a"] * (2048 if SLOW else 512)}
        self.check(EMBEDDINGS, json.dumps(body).encode())


if __name__ == "__main__":
    unittest.main()
