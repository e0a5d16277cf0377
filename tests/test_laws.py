"""Laws of the hub: decode(encode(x)) == x with the listed losses only, fold(unfold(r)) == r."""
from __future__ import annotations

import random
import unittest
from dataclasses import replace

from wire import MODEL, SEEDS, arguments, check_order, some_request, some_response
import copilot_proxy as cp
from copilot_proxy import (DIALECTS, Document, Frame, Image, Reasoning,
                           Request, Response, Text, ToolCall, ToolResult, dumps)



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
