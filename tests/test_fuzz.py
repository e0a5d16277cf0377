"""Odd shapes: a client's are a BadRequest or are read somehow, an upstream's end in an error."""
from __future__ import annotations

import collections
import copy
import functools
import gzip
import operator
import random
import time
import unittest

from support import (SLOW, chunked_post, memory_bytes, places, post, raw_exchange, response,
                     translated)
import copilot_proxy as cp
from copilot_proxy import DIALECTS, ProxyError, Request
from cases import SharedCase
from socket_client import (BINARY, CLOSE, CONTINUED, PING, PONG, TEXT, Closed, Socket, frame,
                           frames_in)
from wire import (CELLS, MODEL, PARALLEL, SEEDS, assert_failed, events_of, mangle, pieces, run,
                  some_request, some_response)

ODD = (None, 1, -1, 1.5, True, "", "x", [], {}, [None], [1], ["x"], [[]], [{}], {"type": "x"},
       {"type": None}, {"type": []}, {"text": 1}, "\ud800", "cpx1.e30=", {"a": {"b": []}})

FUZZ_SEEDS = SEEDS if SLOW else SEEDS[:20]


def mutate(rng: random.Random, body: dict) -> dict:
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 2)):
        *path, key = rng.choice(list(places(body)))
        where = functools.reduce(operator.getitem, path, body)
        if rng.random() < 0.2 and isinstance(where, dict):
            del where[key]
            if not body:
                return body
        else:
            where[key] = copy.deepcopy(rng.choice(ODD))
    return body


class Fuzz(unittest.TestCase):
    def test_requests(self) -> None:
        rng, taken, refused = random.Random(11), 0, 0
        for client, upstream in CELLS:
            for seed in FUZZ_SEEDS:
                body = DIALECTS[client].encode_request(some_request(seed, client), MODEL)
                for _ in range(4):
                    odd = mutate(rng, body)
                    with self.subTest(client=client, upstream=upstream, body=odd):
                        try:
                            sent = translated(client, upstream, odd, MODEL)[0].body
                            self.assertEqual(cp.loads(cp.dumps(sent)), sent)
                            taken += 1
                        except ProxyError as error:
                            self.assertEqual(error.status, 400)
                            refused += 1
        self.assertGreater(taken, refused)                  # one odd value is seldom in the way
        self.assertGreater(refused, taken // 50)

    def test_bodies(self) -> None:
        rng, read, refused = random.Random(12), 0, 0
        for client, upstream in CELLS:
            for seed in FUZZ_SEEDS:
                body = DIALECTS[upstream].encode_response(some_response(seed, upstream),
                                                           Request("asked"))
                for _ in range(3):
                    odd = mutate(rng, body)
                    with self.subTest(client=client, upstream=upstream, body=odd):
                        try:
                            answer = cp.read_answer(DIALECTS[upstream], cp.dumps(odd), False,
                                                    Request("asked"))
                            out = DIALECTS[client].encode_response(answer, Request("asked"))
                            self.assertEqual(cp.loads(cp.dumps(out)), out)
                            read += 1
                        except ProxyError as error:
                            self.assertGreaterEqual(error.status, 500)
                            refused += 1
        self.assertGreater(read, refused)
        self.assertGreater(refused, 0)

    def test_streams(self) -> None:
        rng, failed, streams = random.Random(13), 0, 0
        for client, upstream in CELLS:
            events = events_of(PARALLEL[upstream])
            for _ in range(600 if SLOW else 30):
                odd = list(events)
                at = rng.randrange(len(odd))
                if isinstance(odd[at], dict):
                    odd[at] = mutate(rng, odd[at])
                if rng.random() < 0.3:
                    other = rng.randrange(len(odd))
                    odd[at], odd[other] = odd[other], odd[at]
                data = b"".join(b"data: %b\n\n" % (e.encode() if isinstance(e, str) else cp.dumps(
                    e)) for e in odd)
                with self.subTest(client=client, upstream=upstream, data=data):
                    decoder = DIALECTS[upstream].stream_decoder()
                    for raw in data.split(b"\n\n"):
                        if raw:
                            decoder.read(raw[6:])
                    out, pipe = run(client, upstream, data)
                    self.assertTrue(pipe.ended)
                    streams += 1
                    if pipe.failure is not None:
                        assert_failed(client, out)
                        failed += 1
        self.assertGreater(failed, 0)                       # the whole list of cells has some
        self.assertGreater(streams - failed, streams // 2)


class RawFuzz(SharedCase):
    """Mangled requests against the readers of heads and bodies, the decoder of events and the
    dialects; every 20th goes through a socket to the server itself.  100,000 in the long run."""

    settings = dict(head_timeout_s=0.2, body_stall_s=0.2, idle_client_s=0.2)
    COUNT = 100_000 if SLOW else 2_000

    def setUp(self) -> None:
        rng = random.Random(14)
        self.requests, self.streams = [], []
        for name, path in (("chat", "/v1/chat/completions"), ("responses", "/v1/responses"),
                           ("messages", "/v1/messages")):
            for seed in SEEDS[:12]:
                body = cp.dumps(DIALECTS[name].encode_request(some_request(seed, name), MODEL))
                self.requests.append((name, post(path, body)))
                self.requests.append((name, chunked_post(path, pieces(rng, body))))
                self.requests.append((name, post(path, gzip.compress(body),
                                                 "Content-Encoding: gzip")))
            events = events_of(PARALLEL[name])
            self.streams.append((name, b"".join(
                b"data: %b\n\n" % (e.encode() if isinstance(e, str) else cp.dumps(e))
                for e in events)))

    def read_request(self, rng: random.Random, name: str, data: bytes) -> None:
        """As the server does it: head, body in pieces, coding, JSON, dialect, translation."""
        raw, _, rest = data.partition(b"\r\n\r\n")
        head, length = cp.parse_request_head(raw)
        decoder = cp.BodyDecoder(*head.body_form(length))
        body = b"".join(decoder.feed(piece) for piece in pieces(rng, rest))
        if not decoder.done:
            return
        value = cp.loads(cp.inflate(body, head.headers.get("content-encoding", "")))
        if isinstance(value, dict):
            translated(name, rng.choice(sorted(DIALECTS)), value, MODEL)

    def read_stream(self, rng: random.Random, name: str, data: bytes) -> int:
        """-> how many events were understood."""
        frames, decoder = cp.SSEDecoder(), DIALECTS[name].stream_decoder()
        return sum(len(list(decoder.read(frame.data) or ())) for piece in pieces(rng, data)
                   for frame in frames.feed(piece))

    def test_mangled_requests_and_streams(self) -> None:
        rng, outcomes, flat = random.Random(15), collections.Counter(), 0
        began, slowest = time.monotonic(), 0.0
        for number in range(self.COUNT):
            name, data = rng.choice(self.requests)
            data = mangle(rng, data)
            at = time.thread_time()
            try:
                self.read_request(rng, name, data)
                outcomes["taken"] += 1
            except ProxyError as error:
                self.assertTrue(400 <= error.status < 500 or error.status in (501, 505), data)
                outcomes[error.status] += 1
            except ValueError as error:                 # of `loads`: the server says 400
                self.assertNotIsInstance(error, UnicodeEncodeError, data)
                outcomes["no JSON"] += 1
            except Exception as error:
                raise AssertionError("request %r" % data) from error
            kind, stream = rng.choice(self.streams)
            stream = mangle(rng, stream)
            try:
                outcomes["events"] += self.read_stream(rng, kind, stream)
            except ProxyError:
                outcomes["stream refused"] += 1
            except Exception as error:
                raise AssertionError("stream %r" % stream) from error
            slowest = max(slowest, time.thread_time() - at)
            if number % 20 == 0:
                answer = raw_exchange(self.proxy.port, data, shut=True)
                if answer:
                    self.assertRegex(answer, rb"\AHTTP/1\.1 [2345]\d\d ", data)
                    self.assertNotIn(b" 500 ", answer[:20], data)
                outcomes["answered" if answer else "closed"] += 1
            if number == self.COUNT // 4:
                flat = memory_bytes()
        self.assertLess(slowest, 2.0)
        self.assertLess(memory_bytes() - flat, 24_000_000)
        for outcome in ("taken", 400, "no JSON", "events", "answered"):
            self.assertGreater(outcomes[outcome], self.COUNT // 500, outcomes)
        self.assertEqual([r for r in self.proxy.logs if r.exc_info], [])
        if SLOW:
            print("\nfuzz: %d in %.0f s, %s" % (self.COUNT, time.monotonic() - began,
                                               dict(outcomes)))


class SocketFuzz(SharedCase):
    """Mangled frames of clients: read the same at every cut, or refused with a close code; every
    20th goes to the server, which answers with whole frames and ends it.  So are events that
    become frames: mangled ones are whole texts, one for each event."""

    settings = dict(body_stall_s=0.2)
    COUNT = 20_000 if SLOW else 600
    CODES = (1002, 1003, 1007, 1008, 1009)

    @staticmethod
    def some_frames(rng: random.Random) -> bytes:
        """Messages, whole or in parts, with control frames between them."""
        data = b""
        for seed in range(rng.randint(1, 3)):
            body = DIALECTS["responses"].encode_request(some_request(seed, "responses"), MODEL)
            text = cp.dumps(dict(body, type="response.create", generate=False))
            if rng.random() < 0.3:
                text = rng.choice((b"{}", b"", b'{"type":"response.processed"}', b"\xc3\xa9" * 70))
            parts = pieces(rng, text) if rng.random() < 0.5 else [text]
            for at, part in enumerate(parts):
                data += frame(TEXT if at == 0 else CONTINUED, part, at == len(parts) - 1,
                              mask=bytes(rng.randrange(256) for _ in range(4)))
                if rng.random() < 0.3:
                    data += frame(rng.choice((PING, PONG)), text[:rng.randrange(126)], mask=b"mask")
        if rng.random() < 0.1:
            data += frame(rng.choice((CLOSE, BINARY)), b"\x03\xe8", mask=b"mask")
        return data

    @staticmethod
    def read(parts: list[bytes]) -> tuple[list[cp.SocketMessage], int]:
        """(the messages, the code that ends them or 0)"""
        decoder, found = cp.SocketDecoder(), []
        for part in parts:
            try:
                found += decoder.feed(part)
            except cp.BadFrame as error:
                return found, error.close_code
        return found, 0

    @staticmethod
    def bit_by_bit(number: int, data: bytes) -> list[bytes]:
        """Every byte alone; in the plain run for every fourth, the others in steps of 7."""
        step = 1 if SLOW or number // 4 % 4 == 0 else 7
        return [data[at:at + step] for at in range(0, len(data), step)]

    def test_mangled_frames(self) -> None:
        rng, outcomes, slowest = random.Random(16), collections.Counter(), 0.0
        for number in range(self.COUNT):
            data = self.some_frames(rng)
            if number % 4:
                data = mangle(rng, data)
            at = time.thread_time()
            with self.subTest(data=data):
                whole, code = self.read([data])
                self.assertIn(code, (0, *self.CODES))
                by_bytes, same_code = self.read(self.bit_by_bit(number, data))
                self.assertEqual(same_code, code)
                self.assertEqual(by_bytes[:len(whole)], whole)   # a fault hides what it came with
                self.assertTrue(code or by_bytes == whole)
                parts, _ = self.read(pieces(rng, data))
                self.assertEqual(by_bytes[:len(parts)], parts)
                for message in whole:
                    if message.kind == TEXT:
                        message.data.decode()
                outcomes[code] += 1
                if number % 20 == 0:
                    outcomes[self.send(data)] += 1
            slowest = max(slowest, time.thread_time() - at)
        self.assertLess(slowest, 2.0)
        for outcome in (0, 1002, 1007, "closed", "served"):
            self.assertGreater(outcomes[outcome], 0, outcomes)
        self.assertEqual([r.getMessage() for r in self.proxy.logs if r.exc_info], [])

    def send(self, data: bytes) -> str:
        """To the server: its frames are right whatever it is sent, and it serves what follows or
        has closed."""
        closes, served = [], False
        with Socket(self.proxy.port) as opened:
            try:
                opened.send(data)
                opened.create(response("behind", generate=False, metadata={"last": "1"}))
                while True:
                    kind, payload = opened.read_frame()
                    self.assertEqual(closes, [], "a frame behind the last one")
                    if kind == CLOSE:
                        closes.append(int.from_bytes(payload[:2], "big"))
                    elif kind == TEXT and b'"last":"1"' in payload:
                        served = True
                        opened.send(frame(CLOSE, b"\x03\xe8"))
            except (Closed, ConnectionError):
                pass
        self.assertEqual(len(closes), 1)
        return "served" if served else "closed"

    def test_mangled_events_become_whole_texts(self) -> None:
        rng = random.Random(17)
        stream = b"".join(cp.Frame(event["type"], cp.dumps(event)).encode()
                          for event in events_of(PARALLEL["responses"]) if event != "[DONE]")
        for _ in range(self.COUNT):
            cutter, data = cp.FrameCutter(), mangle(rng, stream)
            for piece in pieces(rng, data):
                block = cutter.feed(piece)
                wanted = [found.data for raw in cp.split_frames(block)
                          for found in [cp.Frame.parse(raw)] if found.data]
                with self.subTest(block=block):
                    found = list(frames_in(cp.text_frames(block)))
                    self.assertEqual({kind for kind, _ in found} - {TEXT}, set())
                    for (_, text), data in zip(found, wanted):
                        self.assertEqual(text.decode(), data.decode("utf-8", "replace"))
                    self.assertEqual(len(found), len(wanted))


if __name__ == "__main__":
    unittest.main()
