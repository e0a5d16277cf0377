"""Streams of random events in random cuts (sections 6 and 7).

Most events pass without a parser. Whatever comes, in whatever order and cut, a client gets what it
would get if each event were looked into by itself.
"""

from __future__ import annotations

import json
import random
import unittest
from unittest import mock

from support import SLOW, cp

TEXTS = ["a", " b c", "", " ", 'with "quotes"', '"', "back\\slash\\", "\\", "\\\\", "line\n",
         "\u00e4\u4e2d", "\u2028", "\x7f", '"item_id":"i0"', '"sequence_number":5', '"obfuscation"',
         '"error"', '"message_', '"usage"', "data: x", "event: y", "\n\n", "[DONE]", "}]}", "end"]
COMMENTS = [b": comment\n\n", b"\n\n", b": \"item_id\":\"i0\"\n\n"]


def random_cuts(numbers: random.Random, data: bytes) -> list[bytes]:
    """The same bytes in pieces of random sizes, from single bytes to the whole."""
    most = numbers.choice((3, 60, 700, 5000, len(data)))
    pieces = []
    while data:
        size = numbers.randint(1, most)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


class ChunkTest(unittest.TestCase):
    SIZES = (1, 5, 15, 16, 17, 200, 255, 256, 300, 2047, 2048, 5000)

    def chunked(self, numbers: random.Random, payloads: list[bytes]) -> bytes:
        """Now and then a size is written in an unusual way."""
        pieces = []
        for payload in payloads:
            form = numbers.choice((b"%x",) * 12 + (b"%X", b"0%x", b"%x;a=b", b"%x "))
            pieces.append((form % len(payload)) + b"\r\n" + payload + b"\r\n")
        return b"".join(pieces) + b"0\r\n\r\n"

    def test_sizes_of_any_length_in_any_cut_give_the_same_body(self) -> None:
        numbers = random.Random(3)
        for alphabet in (b"ab", b"a\r\n", b"\r\n5"):
            for _ in range(60 if SLOW else 15):
                payloads = [bytes(numbers.choices(alphabet, k=numbers.choice(self.SIZES)))
                            for _ in range(numbers.randint(1, 40))]
                decoder, found = cp.BodyDecoder(None, True), b""
                for piece in random_cuts(numbers, self.chunked(numbers, payloads) + b"NEXT"):
                    found += decoder.feed(piece)
                self.assertEqual(found, b"".join(payloads))
                self.assertEqual((decoder.done, decoder.rest), (True, b"NEXT"))

    def test_a_wrong_size_is_refused_in_any_cut(self) -> None:
        numbers = random.Random(4)
        for wrong in (b"c7\r\n", b"c9\r\n", b"c8\n\n", b"\r\nc8\r\n", b"+c8\r\n", b"c8\rx"):
            for _ in range(20):
                raw = (b"c8\r\n" + b"x" * 200 + b"\r\n") * 30
                at = 206 * numbers.randint(0, 28)
                raw = raw[:at] + wrong + raw[at + 4 :]
                decoder = cp.BodyDecoder(None, True)
                with self.subTest(wrong=wrong, at=at), self.assertRaises(cp.BadRequest):
                    for piece in random_cuts(numbers, raw):
                        decoder.feed(piece)

    def test_a_body_that_ends_too_early_is_not_done(self) -> None:
        numbers = random.Random(5)
        raw = self.chunked(numbers, [b"x" * 200] * 30)
        for _ in range(100):
            end = numbers.randrange(len(raw))
            decoder, found = cp.BodyDecoder(None, True), b""
            for piece in random_cuts(numbers, raw[:end]):
                found += decoder.feed(piece)
            self.assertFalse(decoder.done)
            self.assertEqual(found.strip(b"x"), b"")


class Events:
    """Random events of one dialect, as an upstream may send them."""

    dialect: cp.Dialect

    def __init__(self, numbers: random.Random) -> None:
        self.numbers = numbers

    def text(self) -> str:
        """Mostly a plain one."""
        if self.numbers.random() < 0.9:
            return "word"
        return self.numbers.choice(TEXTS)

    def frame(self, event: dict[str, object]) -> bytes:
        dumped = cp.dumps(event)
        if self.numbers.random() < 0.02:
            dumped = json.dumps(event).encode()             # with blanks, and in ASCII
        if "type" in event and self.numbers.random() < 0.98:
            return b"event: %b\ndata: %b\n\n" % (str(event["type"]).encode(), dumped)
        return b"data: %b\n\n" % dumped

    def odd(self) -> bytes:
        """One event that is not like most."""
        return self.numbers.choice(COMMENTS)

    def delta(self) -> bytes:
        """One event like most."""
        raise NotImplementedError

    def run(self) -> list[bytes]:
        """Some events; odd ones are rare or frequent."""
        share = self.numbers.choice((0, 0.01, 0.1, 0.5))
        return [self.odd() if self.numbers.random() < share else self.delta()
                for _ in range(self.numbers.choice((1, 5, 40, 200)))]


class ChatEvents(Events):
    dialect = cp.CHAT

    def chunk(self, delta: dict[str, object], **more: object) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        choice.update({key: more.pop(key) for key in ("finish_reason", "logprobs", "index")
                       if key in more})
        return self.frame({"choices": [choice], "created": 5, "id": "c1", "model": "m",
                           "object": "chat.completion.chunk", **more})

    def delta(self) -> bytes:
        return self.chunk({"content": self.text()})

    def odd(self) -> bytes:
        text = self.text()
        return self.numbers.choice([
            super().odd(), self.chunk({"role": "assistant", "content": text}), self.chunk({}),
            self.chunk({"content": text}, index=1), self.chunk({"content": text}, model="other"),
            self.chunk({"content": text}, usage={"prompt_tokens": 3, "completion_tokens": 4}),
            self.chunk({"content": text}, logprobs={"content": [{"token": text}]}),
            self.chunk({"reasoning_text": text}), self.chunk({"content": None}),
            self.chunk({"content": text}, copilot_usage={"total_nano_aiu": 7}),
            self.frame({"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": 9}}),
            self.chunk({"tool_calls": [{"index": 0, "id": "t1", "type": "function",
                                        "function": {"name": "f", "arguments": text}}]}),
        ])

    def end(self) -> bytes:
        return self.numbers.choice([
            self.chunk({}, finish_reason="stop") + b"data: [DONE]\n\n", b"data: [DONE]\n\n", b"",
            self.frame({"error": {"message": "no", "code": "x"}}), b"data: {no JSON\n\n",
            self.chunk({}, finish_reason="length")])


class MessagesEvents(Events):
    dialect = cp.MESSAGES

    def begin(self) -> bytes:
        return self.frame({"type": "message_start", "message": {
            "id": "m1", "type": "message", "role": "assistant", "model": "m", "content": [],
            "stop_reason": None, "usage": {"input_tokens": 1, "output_tokens": 1}}}) + self.start()

    def start(self) -> bytes:
        kind = self.numbers.choice(("text", "thinking", "tool_use"))
        return self.frame({"type": "content_block_start", "index": 0, "content_block": {
            "type": kind, "text": ""}})

    def delta(self) -> bytes:
        return self.frame({"type": "content_block_delta", "index": 0, "delta": {
            "type": "text_delta", "text": self.text()}})

    def odd(self) -> bytes:
        stop = self.frame({"type": "content_block_stop", "index": 0})
        return self.numbers.choice([
            super().odd(), self.frame({"type": "ping"}), stop + self.start(),
            self.frame({"type": "message_delta", "delta": {}, "usage": {"output_tokens": 4}}),
            self.frame({"type": "message_delta", "delta": {"stop_reason": None}})])

    def end(self) -> bytes:
        return self.numbers.choice([
            self.frame({"type": "message_stop"}), b"", b"data: {no JSON\n\n",
            self.frame({"type": "error", "error": {"type": "api_error", "message": "no"}}),
            self.frame({"type": "content_block_delta", "error": {"message": "odd"}})])


class ResponsesEvents(Events):
    dialect = cp.RESPONSES

    def __init__(self, numbers: random.Random) -> None:
        super().__init__(numbers)
        self.sequence = 0
        self.index = -1
        self.is_fresh = numbers.random() < 0.3              # a new id in each event

    def item_id(self) -> str:
        if self.is_fresh:
            odd = self.numbers.choice(("new",) * 9 + ('quoted"', "back\\slash", "long" * 40))
            return odd + str(self.sequence)
        return "i%d" % self.index

    def numbered(self, kind: str, **more: object) -> bytes:
        self.sequence += 1
        return self.frame({"type": "response." + kind, "sequence_number": self.sequence, **more})

    def begin(self) -> bytes:
        return self.numbered("created", response={"id": "r1", "created_at": 5, "output": []}) \
            + self.added()

    def added(self) -> bytes:
        self.index += 1
        item = {"id": "i%d" % self.index, "type": "message", "role": "assistant", "content": []}
        return self.numbered("output_item.added", output_index=self.index, item=item)

    def about(self, kind: str, **more: object) -> bytes:
        return self.numbered(kind, **dict({
            "item_id": self.item_id(), "output_index": self.index, "content_index": 0}, **more))

    def delta(self) -> bytes:
        return self.about("output_text.delta", delta=self.text())

    def done(self) -> bytes:
        item = {"id": "i%d" % self.index, "type": "message", "content": []}
        return self.numbered("output_item.done", output_index=self.index, item=item)

    def odd(self) -> bytes:
        text = self.text()
        choice = self.numbers.randrange(10)
        if choice == 0:
            return super().odd()
        if choice == 1:
            return self.about("output_text.done", text=text)
        if choice == 2:
            return self.about("output_text.delta", delta=text, item_id="new%d" % self.sequence)
        if choice == 3:
            return self.about("output_text.delta", delta=text, obfuscation="xyz")
        if choice == 4:
            self.sequence -= self.numbers.randint(1, 9)     # goes back
            return self.delta()
        if choice == 5:
            return self.done() + self.added()
        if choice == 6:
            return self.frame({"type": "response.output_text.delta", "item_id": "i0",
                               "output_index": 0, "delta": text})
        if choice == 7:
            return self.about("content_part.added", part={"type": "output_text", "text": ""})
        if choice == 8:
            return self.about("function_call_arguments.delta", delta=text, obfuscation="x") \
                + self.about("function_call_arguments.done", arguments=text)
        self.sequence += 100
        return self.about("refusal.delta", delta=text)

    def end(self) -> bytes:
        return self.numbers.choice([
            b"", b"data: {no JSON\n\n",
            self.done() + self.numbered("completed", response={"id": "r2", "output": [], "usage": {
                "input_tokens": 5, "output_tokens": 6, "total_tokens": 11}}),
            self.numbered("failed", response={"error": {"code": "x", "message": "no"}}),
            self.frame({"type": "error", "message": "no", "code": "x"})])


class FewLooksTest(unittest.TestCase):
    """What needs no look at each event, and what it gives."""

    def test_deltas_with_an_id_each_are_not_looked_into_one_by_one(self) -> None:
        events = ResponsesEvents(random.Random(1))
        begin = events.begin() + events.delta()
        block = b"".join(events.about("output_text.delta", delta="x", item_id="%d" % number * 99)
                         for number in range(400))
        stream = cp.RESPONSES.stream("m", {}, cp.Request("m", key="k", now=7))
        stream.feed(begin)
        with mock.patch.object(stream, "_mend", side_effect=stream._mend) as looks:
            out = stream.feed(block)
        self.assertEqual(out.count(b'"item_id":"i0"'), 400)
        self.assertLess(looks.call_count, 60)           # a few are not as most are

    def test_a_chat_that_begins_with_a_text_has_the_role_once(self) -> None:
        events = ChatEvents(random.Random(1))
        more: dict[str, object]
        for more in ({}, {"role": "assistant"}):
            with self.subTest(more):
                stream = cp.CHAT.stream("m", {}, cp.Request("m", key="k", now=7))
                out = b"".join(stream.feed(events.chunk(dict({"content": "x"}, **more)))
                               for _ in range(3))
                self.assertEqual(out.count(b'"role"'), 1)


class AnyOrderTest(unittest.TestCase):
    ROUNDS = 60 if SLOW else 16

    def stream(self, events: Events) -> list[bytes]:
        frames = events.begin() if hasattr(events, "begin") else b""
        runs = [b"".join(events.run()) for _ in range(events.numbers.randint(1, 4))]
        return [frames, *runs, events.end()]

    @staticmethod
    def shown(out: bytes) -> list[tuple[str, object]]:
        """What a client reads: the name and value of each event."""
        decoder = cp.SSEDecoder()
        found: list[tuple[str, object]] = []
        for frame in decoder.feed(out) + decoder.close():
            try:
                found.append((frame.event, json.loads(frame.data)))
            except ValueError:
                found.append((frame.event, frame.data))
        return found

    def relay(self, dialect: cp.Dialect, pieces: list[bytes], by_itself: bool) -> tuple:
        """(what the client reads, how the stream stands); by_itself: each event is looked into"""
        request = cp.Request("m", key="k", now=7)
        stream = dialect.stream("m", {"stream_options": {"include_usage": True}}, request)
        if by_itself:
            with mock.patch.object(stream, "_quick", return_value=b""):
                out = b"".join(map(stream.feed, pieces)) + stream.close()
        else:
            out = b"".join(map(stream.feed, pieces)) + stream.close()
        state = stream.ended, stream.failure, stream.has_content, stream.meter.counts
        return self.shown(out), state

    def check(self, kind: type[Events]) -> None:
        for seed in range(self.ROUNDS):
            events = kind(random.Random(seed))
            raw = b"".join(self.stream(events))
            wanted = self.relay(kind.dialect, [raw], True)
            for pieces in ([raw], random_cuts(events.numbers, raw)):
                with self.subTest(seed=seed, pieces=len(pieces)):
                    shown, state = self.relay(kind.dialect, pieces, False)
                    for event, wish in zip(shown, wanted[0]):
                        self.assertEqual(event, wish)
                    self.assertEqual((len(shown), state), (len(wanted[0]), wanted[1]))

    def test_chat(self) -> None:
        self.check(ChatEvents)

    def test_messages(self) -> None:
        self.check(MessagesEvents)

    def test_responses(self) -> None:
        self.check(ResponsesEvents)

    def test_translated(self) -> None:
        clients = (cp.CHAT, cp.RESPONSES, cp.MESSAGES, cp.GEMINI, cp.OLLAMA)
        for kind in (ChatEvents, MessagesEvents, ResponsesEvents):
            for client in clients:
                for seed in range(self.ROUNDS // 4):
                    events = kind(random.Random(seed))
                    raw = b"".join(self.stream(events))
                    wanted = self.translate(kind.dialect, client, [raw], True)
                    for pieces in ([raw], random_cuts(events.numbers, raw)):
                        with self.subTest(seed=seed, upstream=kind.dialect.name,
                                          client=client.name, pieces=len(pieces)):
                            found = self.translate(kind.dialect, client, pieces, False)
                            self.assertEqual(found, wanted)

    @staticmethod
    def translate(upstream: cp.Dialect, client: cp.Dialect, pieces: list[bytes],
                  by_itself: bool) -> tuple[bytes, bool, str | None, dict[str, int]]:
        """(client bytes, how the stream stands)"""
        stream = cp.TranslatedStream(client, upstream, cp.Request("m", key="k", now=7))
        if by_itself:
            with mock.patch.object(stream, "_quick", return_value=b""):
                out = b"".join(map(stream.feed, pieces)) + stream.close()
        else:
            out = b"".join(map(stream.feed, pieces)) + stream.close()
        return out, stream.ended, stream.failure, stream.meter.counts


if __name__ == "__main__":
    unittest.main()
