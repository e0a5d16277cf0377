"""Laws of the hub: decode(encode(x)) == x with the listed losses only, fold(unfold(r)) == r."""
from __future__ import annotations

import base64
import random
import unittest
from dataclasses import replace
from typing import Iterable, Iterator

from support import SLOW
import copilot_proxy as cp
from copilot_proxy import (DIALECTS, Document, Frame, Image, Model, Named, Reasoning,
                           Request, Response, Text, Tool, ToolCall, ToolResult, Turn, Usage, dumps)

SEEDS = range(2000 if SLOW else 100)
MODEL = Model("model-x-4.6", vendor="OpenAI", supports={
    "structured_outputs": True, "vision": True, "adaptive_thinking": True,
    "max_thinking_budget": 32000, "min_thinking_budget": 1024,
    "reasoning_effort": ["low", "medium", "high"]})
WORDS = ("Hello", "w\u00f6rld", "\u4f60\u597d", 'say "hi"', "back\\slash", "new\nline",
         "\U0001f600", "tab\t", "{}", "</x>", "\u2028")


def text(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6)))


def arguments(rng: random.Random) -> str:
    return rng.choice(('{}', '{"a":1}', '{"path":"a \\"b\\"","n":[1,2.5,null,true]}',
                       dumps({"t": text(rng)}).decode()))


def image(rng: random.Random) -> Image:
    return Image("image/png", base64.b64encode(rng.choice(WORDS).encode()).decode())


def reasoning(rng: random.Random, dialect: str) -> Reasoning:
    return Reasoning(text(rng), "sig%d" % rng.randint(0, 99), None, dialect)


def some_turns(rng: random.Random, dialect: str) -> list:
    turns = []
    if rng.random() < 0.7:
        turns.append(Turn("system", [Text(text(rng))]))
    for number in range(rng.randint(1, 3)):
        parts = [Text(text(rng))]
        if rng.random() < 0.3:
            parts.append(image(rng))
        if rng.random() < 0.2:
            parts.append(Document("application/pdf", "cGRm", title="a.pdf"))
        turns.append(Turn("user", parts))
        said = [reasoning(rng, dialect)] if rng.random() < 0.4 else []
        said += [Text(text(rng))] if rng.random() < 0.7 else []
        calls = [ToolCall("call_%d_%d" % (number, at), "tool_%d" % at, arguments(rng))
                 for at in range(rng.randint(0, 3))]
        if not said[-1:] or isinstance(said[-1], Reasoning):
            calls = calls or [ToolCall("call_x%d" % number, "tool_0", "{}")]
        turns.append(Turn("assistant", said + calls))
        if calls:
            turns.append(Turn("user", [ToolResult(call.id, [Text(text(rng))]) for call in calls]))
    if turns[-1].role == "assistant":
        turns.append(Turn("user", [Text("go on")]))
    return turns


def some_request(seed: int, dialect: str) -> Request:
    rng = random.Random(seed)
    is_messages = dialect == "messages"
    request = Request(MODEL.id, dialect, turns=some_turns(rng, dialect))
    for at in range(rng.randint(0, 3)):
        request.tools.append(Tool(
            "tool_%d" % at, rng.choice((None, "does it")), {"type": "object", "properties": {
                "x": {"type": "string"}}},
            None if is_messages else rng.choice((True, False))))
    if request.tools:
        request.tool_choice = rng.choice((None, "auto", "none", "required", Named("tool_0")))
        if rng.random() < 0.3 and not (is_messages and request.tool_choice in (None, "none")):
            request.parallel_tool_calls = False
    request.max_output_tokens = rng.randint(20, 9999) if is_messages else rng.choice((None, 500))
    request.temperature = rng.choice((None, 0, 0.5, 1))
    request.top_p = rng.choice((None, 0.9))
    if dialect != "responses":
        request.stop = rng.choice(([], ["END"], ["a", "b"]))
    if not (is_messages and (isinstance(request.tool_choice, Named)
                             or request.tool_choice == "required")):
        request.effort = rng.choice((None, "low", "high"))        # else thinking is not possible
    request.stream = rng.choice((None, True, False))
    request.user = rng.choice((None, "user-1"))
    if rng.random() < 0.3:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        request.output_schema = {"type": "json_schema", "schema": schema}
        if not is_messages:
            request.output_schema.update(name="thing", strict=True, description="a thing")
    if rng.random() < 0.3 and not is_messages:
        request.openai = {"metadata": {"a": "b"}, "verbosity": "low"}
    return request


def some_response(seed: int, dialect: str) -> Response:
    rng = random.Random(seed)
    parts = [reasoning(rng, rng.choice(("chat", "messages", "responses")))] \
        if rng.random() < 0.5 else []
    parts += [Text(text(rng))] if rng.random() < 0.7 else []
    calls = [ToolCall("call_%d" % at, "tool_%d" % at, arguments(rng))
             for at in range(rng.randint(0, 3))]
    stop = "tool_use" if calls else rng.choice(("stop", "length", "refusal"))
    prefix = {"chat": "chatcmpl-", "responses": "resp_", "messages": "msg_"}[dialect]
    reads_reasoning = dialect != "messages"
    return Response(prefix + str(seed), "asked", parts + calls, stop,
                    Usage(rng.randint(1, 99), rng.randint(0, 9), 0 if reads_reasoning else 3,
                          rng.randint(1, 99), 5 if reads_reasoning else 0),
                    1790000000 if reads_reasoning else 0)


def without_ids(response: Response) -> Response:
    """Responses gives every reasoning item an id."""
    for part in response.parts:
        if isinstance(part, Reasoning):
            part.id = None
    return response


def encode_stream(dialect: str, events: list) -> bytes:
    encoder = DIALECTS[dialect].stream_encoder(
        Request("asked", now=1790000000, wants_usage=True))
    return b"".join(encoder.feed(event) for event in events)


def decode_stream(dialect: str, data: bytes) -> list:
    decoder = DIALECTS[dialect].stream_decoder()
    events = [event for raw in data.split(b"\n\n") if raw
              for event in decoder.read(Frame.parse(raw).data)]
    return events + (decoder.close() if not decoder.ended else [])


def check_order(events: Iterable[cp.Event]) -> Iterator[cp.Event]:
    """The same events; raises ValueError at the first one that stands where it must not."""
    state, last = "before", -1
    open_parts: set[int] = set()
    for event in events:
        if state == "ended":
            raise ValueError("%r behind the end" % (event,))
        if isinstance(event, cp.ResponseStart) != (state == "before") and not isinstance(
                event, cp.StreamError):
            raise ValueError("%r while %s" % (event, state))
        if isinstance(event, cp.ResponseStart):
            state = "running"
        elif isinstance(event, cp.PartStart):
            if event.index <= last:
                raise ValueError("%r behind index %d" % (event, last))
            last = event.index
            open_parts.add(last)
        elif isinstance(event, (cp.PartDelta, cp.PartSignature, cp.PartEnd)):
            if event.index not in open_parts:
                raise ValueError("%r for a part that is not open" % (event,))
            if isinstance(event, cp.PartEnd):
                open_parts.remove(event.index)
        elif isinstance(event, (cp.ResponseEnd, cp.StreamError)):
            if open_parts and isinstance(event, cp.ResponseEnd):
                raise ValueError("%r while %r are open" % (event, open_parts))
            state = "ended"
        yield event


class Laws(unittest.TestCase):
    def test_request_round_trip(self) -> None:
        for name, dialect in DIALECTS.items():
            for seed in SEEDS:
                request = some_request(seed, name)
                with self.subTest(dialect=name, seed=seed):
                    body = dialect.encode_request(request, MODEL)
                    self.assertEqual(comparable(dialect.decode_request(body)), comparable(request))
                    self.assertEqual(request.losses, [])

    def test_cache_marks_come_back_from_where_they_can_be_written(self) -> None:
        """Messages marks any block, Chat on Claude the end of a message."""
        claude = replace(MODEL, id="claude-x-4.5", vendor="Anthropic")
        for name in ("messages", "chat"):
            for seed in SEEDS:
                rng = random.Random(seed)
                request = some_request(seed, name)
                request.output_schema, request.openai, request.effort = None, {}, None
                marked = 0
                for turn in request.turns:
                    part = turn.parts[-1 if name == "chat" else rng.randrange(len(turn.parts))]
                    if rng.random() < 0.5 and not isinstance(part, Reasoning):
                        part.cache = True
                        marked += 1
                for tool in request.tools:
                    tool.cache = rng.random() < 0.5
                body = DIALECTS[name].encode_request(request, claude)
                with self.subTest(dialect=name, seed=seed):
                    back = DIALECTS[name].decode_request(body)
                    self.assertEqual(sum(part.cache for turn in back.turns for part in turn.parts),
                                     marked)
                    self.assertEqual(merged(back.turns), merged(request.turns))
                    self.assertEqual(back.tools, request.tools)

    def test_request_survives_a_visit(self) -> None:
        """A -> B -> A: the conversation itself comes back, but for reasoning minted elsewhere."""
        for home in DIALECTS:
            for away in DIALECTS:
                for seed in range(60):
                    request = some_request(seed, home)
                    request.stop, request.output_schema = [], None
                    body = DIALECTS[away].encode_request(request, MODEL)
                    back = DIALECTS[away].decode_request(body)
                    for turn in request.turns:
                        if home != away:
                            turn.parts = [p for p in turn.parts if not isinstance(p, Reasoning)]
                        for part in turn.parts:
                            if isinstance(part, Document):
                                part.title = part.title or None
                            if isinstance(part, Image) and away == "responses":
                                part.detail = "auto"
                    with self.subTest(home=home, away=away, seed=seed):
                        self.assertEqual(merged(back.turns), merged(request.turns))
                        if away != "messages" or request.parallel_tool_calls is None:
                            self.assertEqual(back.tool_choice, request.tool_choice)
                        if request.tool_choice != "none":          # then it says nothing
                            self.assertEqual(back.parallel_tool_calls, request.parallel_tool_calls)
                        self.assertEqual([t.name for t in back.tools],
                                         [t.name for t in request.tools])

    def test_response_round_trip(self) -> None:
        for name, dialect in DIALECTS.items():
            for seed in SEEDS:
                response = some_response(seed, name)
                with self.subTest(dialect=name, seed=seed):
                    body = dialect.encode_response(response, Request("asked"))
                    back = cp.read_answer(dialect, dumps(body), False, Request(""))
                    self.assertEqual(without_ids(back), response)

    def test_fold_unfold(self) -> None:
        for seed in SEEDS:
            response = some_response(seed, "messages")
            response.parts.append(Reasoning("", "blob", None, "messages", True))
            events = list(check_order(cp.unfold(response)))
            self.assertEqual(cp.fold(events), response)

    def test_stream_round_trip(self) -> None:
        """encode the events, decode the bytes: the same answer, in every dialect."""
        for name in DIALECTS:
            for seed in SEEDS:
                response = some_response(seed, name)
                events = list(cp.unfold(response))
                with self.subTest(dialect=name, seed=seed):
                    data = encode_stream(name, events)
                    back = list(check_order(decode_stream(name, data)))
                    self.assertEqual(without_ids(cp.fold(back)), response)

    def test_interleaved_parts(self) -> None:
        """Any interleaving of parallel calls gives the same calls, in every dialect."""
        for name in DIALECTS:
            for seed in range(120):
                rng = random.Random(seed)
                response = some_response(seed, name)
                calls = [ToolCall("call_%d" % at, "t%d" % at, arguments(rng)) for at in range(3)]
                response.parts, response.stop = list(calls), "tool_use"
                events = list(interleave(rng, calls))
                whole = [cp.ResponseStart(response.id, "asked", response.created), *events,
                         cp.ResponseEnd("tool_use", response.usage, None)]
                list(check_order(whole))
                with self.subTest(dialect=name, seed=seed):
                    back = list(check_order(decode_stream(name, encode_stream(name, whole))))
                    self.assertEqual(cp.fold(back).parts, response.parts)

    def test_calls_under_one_index_are_told_apart_by_their_ids(self) -> None:
        """Some backends number every call 0 and send the pieces of two in turn."""
        pieces = [("a", '{"x"'), ("b", '{"y"'), ("a", ":1}"), ("b", ":2}")]
        data = b"".join(b"data: %b\n\n" % dumps({"choices": [{"index": 0, "delta": {
            "tool_calls": [{"index": 0, "id": call_id, "function": {
                "name": "t", "arguments": piece}}]}}]}) for call_id, piece in pieces)
        events = decode_stream("chat", data + b"data: [DONE]\n\n")
        self.assertEqual(cp.fold(check_order(events)).parts, [
            ToolCall("a", "t", '{"x":1}'), ToolCall("b", "t", '{"y":2}')])

    def test_a_thousand_calls_that_wait_for_the_first(self) -> None:
        """However many parts are held back behind an open one."""
        calls = [ToolCall("call_%d" % at, "t", '{"at":%d}' % at) for at in range(1200)]
        starts = [cp.PartStart(at, replace(call, arguments="")) for at, call in enumerate(calls)]
        deltas = [cp.PartDelta(at, call.arguments) for at, call in enumerate(calls)]
        ends = [cp.PartEnd(at) for at in reversed(range(len(calls)))]
        whole = [cp.ResponseStart("id", "asked"), *starts, *deltas, *ends,
                 cp.ResponseEnd("tool_use")]
        for name in DIALECTS:
            with self.subTest(dialect=name):
                back = check_order(decode_stream(name, encode_stream(name, whole)))
                self.assertEqual(cp.fold(back).parts, calls)

    def test_packing(self) -> None:
        packed = cp.pack_opaque("responses", "rs_1", "blob")
        self.assertTrue(packed.startswith("cpx1."))
        self.assertEqual(cp.unpack_opaque(packed), [("responses", "rs_1", "blob")])
        self.assertEqual(len(cp.unpack_opaque(packed + packed)), 2)
        self.assertEqual(cp.unpack_opaque("ErcBCkgIAxABGAIiQ"), [])
        for broken in ("cpx1.garbage!", "cpx1.NQ==", "cpx1.e30=", "cpx1."):
            self.assertEqual(cp.unpack_opaque(broken), [("", None, "")])

    def test_check_order_finds_faults(self) -> None:
        start, end = cp.ResponseStart("", "", 0), cp.ResponseEnd("stop", None, None)
        part = cp.PartStart(0, Text(""))
        for events in ([end], [start, start], [start, part, end], [start, cp.PartDelta(0, "a")],
                       [start, part, part], [start, end, start], [part],
                       [start, part, cp.PartEnd(0), cp.PartDelta(0, "x")]):
            with self.assertRaises(ValueError):
                list(check_order(events))


def comparable(request: Request) -> tuple:
    return merged(request.turns), replace(request, turns=[])


def merged(turns: list) -> list:
    """Turns of one role joined, results first: the boundary between them may be lost."""
    out: list = []
    for turn in turns:
        parts = list(turn.parts)
        if not parts:
            continue
        if out and out[-1][0] == turn.role:
            out[-1][1].extend(parts)
        else:
            out.append((turn.role, parts))
    for role, parts in out:
        parts.sort(key=lambda p: role == "user" and not isinstance(p, ToolResult))
        for part in parts:
            if isinstance(part, Image) and part.detail is None:
                part.detail = "auto"
    return out


def interleave(rng: random.Random, calls: list) -> list:
    events, queues = [], []
    for at, call in enumerate(calls):
        queue = [cp.PartStart(at, replace(call, arguments=""))]
        rest = call.arguments
        while rest:
            size = rng.randint(1, 5)
            queue.append(cp.PartDelta(at, rest[:size]))
            rest = rest[size:]
        queues.append(queue + [cp.PartEnd(at)])
    started = 0
    while any(queues):
        ready = [q for at, q in enumerate(queues) if q and at <= started]
        queue = rng.choice(ready)
        event = queue.pop(0)
        if isinstance(event, cp.PartStart):
            started = max(started, event.index + 1)
        events.append(event)
    return events


if __name__ == "__main__":
    unittest.main()
