"""The relay over real sockets: streams as they come, cuts, clients that leave, the shutdown."""
from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
import unittest
from typing import Any

from support import (PATHS, REQUESTS, SLOW, ProxyCase, RawClient, chat, cp, message, patient, post,
                     release, response, said, second_proxy, side_by_side, wait_until)
from fake_upstream import CHAT, EMBEDDINGS, RESPONSES, Answer, FakeUpstream
from cases import (DELTAS, ENDINGS, PINGS, OpenStream, RelayCase, body_text, numbered,
                   stream_text)

GONE_S = 1.0                       # in which a client's leaving must reach the upstream


class StreamTest(RelayCase):
    def test_streams_of_every_dialect_arrive_whole(self) -> None:
        for path, make in REQUESTS:
            for more in ("", "bytewise=1", "crlf=1", "bytewise=1 crlf=1", "split=1 odd=1"):
                with self.subTest(path=path, more=more):
                    count = 3 if "bytewise" in more and not SLOW else 9
                    reply = self.proxy.stream(path, make("@@events=%d %s@@" % (count, more)))
                    self.assertEqual(reply.status, 200)
                    self.assertEqual(reply.headers["content-type"].split(";")[0],
                                     "text/event-stream")
                    self.assertEqual(stream_text(path, reply.events), numbered(count))
                    self.assertIn(ENDINGS[path], reply.body)

    def test_events_are_readable_while_the_upstream_still_speaks(self) -> None:
        for path, make in REQUESTS:
            with self.subTest(path):
                stream = OpenStream(self.client(), path, make("@@events=5 stall=1@@", stream=True))
                got = stream.until(DELTAS[path])
                self.assertTrue(self.fake.wait_for(lambda: self.fake.holding == 1))
                self.assertNotIn(ENDINGS[path], got)
                release(self.fake)
                self.assertIn(ENDINGS[path], stream.rest())

    def test_each_event_is_sent_on_at_once(self) -> None:
        for path, make in REQUESTS:
            for count in (1, 2, 7):
                with self.subTest(path=path, count=count):
                    body = make("@@events=9 stall=%d@@" % count, stream=True)
                    stream = OpenStream(self.client(), path, body)
                    stream.until(b'%d .......' % (count - 1))
                    self.assertNotIn(b'"%d .......' % count, stream.got)
                    release(self.fake)
                    stream.rest()

    def test_tool_calls_and_reasoning_come_through(self) -> None:
        schema = {"type": "object", "properties": {"city": {"type": "string"}}}
        tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
        for model in ("gpt-4.1", "claude-sonnet-4.6"):
            reply = self.proxy.stream("/v1/chat/completions",
                                      chat("use a parallel tool", model=model, tools=[tool]))
            calls: dict[int, str] = {}
            for event in reply.events:
                for choice in event["choices"]:
                    self.assertEqual(choice["index"], 0)
                    for call in choice["delta"].get("tool_calls", []):
                        calls[call["index"]] = (calls.get(call["index"], "")
                                                + call["function"].get("arguments", ""))
            self.assertEqual({k: json.loads(v) for k, v in calls.items()},
                             {0: {"city": "Paris"}, 1: {"city": "Paris"}})
            reasons = [choice["finish_reason"] for event in reply.events
                       for choice in event["choices"] if choice["finish_reason"]]
            self.assertEqual(reasons, ["tool_calls"])

    def test_usage_goes_only_to_chat_clients_that_asked(self) -> None:
        plain = self.proxy.stream("/v1/chat/completions", chat("a"))
        asked = self.proxy.stream("/v1/chat/completions",
                                  chat("a", stream_options={"include_usage": True}))
        self.assertNotIn(b'"usage"', plain.body)
        self.assertIn("usage", asked.events[-1])
        self.assertEqual(self.fake.last(CHAT).json["stream_options"], {"include_usage": True})

    def test_an_error_inside_a_stream_is_passed_on_and_is_the_end(self) -> None:
        for path, make in REQUESTS:
            for more in ("", " fail=1"):
                with self.subTest(path=path, more=more):
                    reply = self.proxy.stream(path, make("@@events=5 error=2%s@@" % more))
                    self.assertEqual(reply.status, 200)
                    self.assertNotIn(b"[DONE]", reply.body)
                    self.assertNotIn(ENDINGS[path], reply.body)
                    self.assertIn(b"error", reply.frames[-1].data)

    def test_a_cut_at_any_place_ends_with_an_error_event(self) -> None:
        """Behind the first word; before it the answer is a 502, see test_answers."""
        for path, make in REQUESTS:
            for place in (1, 3, 5):
                for more in ("", " rst=1") + (" bytewise=1 crlf=1",) * (SLOW or place == 1):
                    with self.subTest(path=path, place=place, more=more):
                        client = self.client()
                        stream = OpenStream(client, path, make(
                            "@@events=5 cut=%d%s@@" % (place, more), stream=True))
                        self.assertEqual(stream.head(), 200)
                        self.assert_error_end(path, stream.rest())
                        self.assertNotIn(b'"5 .......', stream.got)
                        client.send(post("/v1/chat/completions", chat("after")))
                        self.assertEqual(said(client.answer()), "Echo: after")

    def test_a_stream_without_its_terminal_event_is_an_error(self) -> None:
        for path, make in REQUESTS:
            with self.subTest(path):
                reply = self.proxy.stream(path, make("@@events=3 noend=1@@"))
                self.assert_error_end(path, reply.body)
                self.assertIn(b"upstream_stream_ended" if path != "/v1/messages" else b"ended",
                              reply.body)

    def test_a_stream_cut_inside_an_event_does_not_pass_the_torn_event_on(self) -> None:
        torn = b'data: {"choices":[{"index":0,"delta":{"content":"torn'
        whole = b'data: {"choices":[{"index":0,"delta":{"content":"good"}}]}\n\n'
        self.fake.script(CHAT, Answer(chunks=[whole, torn], end=False))
        reply = self.proxy.stream("/v1/chat/completions", chat("a"))
        self.assertIn(b"good", reply.body)
        self.assertNotIn(b"torn", reply.body)
        self.assert_error_end("/v1/chat/completions", reply.body)

    def test_a_broken_whole_answer_is_502_and_not_half_an_answer(self) -> None:
        for path, make in REQUESTS:
            self.fake.script(PATHS[path], Answer(body={"a": "b"}, short_by=5))
            reply = self.proxy.post(path, make("a"))
            self.assertEqual(reply.status, 502, reply.body)

    def test_a_whole_answer_equals_the_streamed_one(self) -> None:
        for path, make in REQUESTS:
            whole = self.proxy.post(path, make("same"))
            stream = self.proxy.stream(path, make("same"))
            self.assertEqual(body_text(path, whole.json), "Echo: same")
            self.assertEqual(stream_text(path, stream.events), "Echo: same")

    def test_a_large_stream_arrives_unchanged(self) -> None:
        for path, make in REQUESTS:
            reply = self.proxy.stream(path, make("@@events=600 size=900@@"))
            self.assertEqual(stream_text(path, reply.events), numbered(600, 900))

    def test_nothing_is_sent_twice_when_the_upstream_breaks_after_the_first_byte(self) -> None:
        for path, make in REQUESTS:
            before = self.fake.count(PATHS[path])
            reply = self.proxy.stream(path, make("@@events=9 cut=3@@"))
            self.assertEqual(stream_text(path, reply.events), numbered(3))
            self.assertEqual(self.fake.count(PATHS[path]), before + 1)


class KeepAliveTest(RelayCase):
    settings = dict(keepalive_s=0.01)

    def test_silence_between_events_is_filled_with_pings(self) -> None:
        for path, make in REQUESTS:
            with self.subTest(path):
                stream = OpenStream(self.client(), path, make("@@events=4 stall=2@@", stream=True))
                stream.until(PINGS[path] * 3)
                release(self.fake)
                body = stream.rest()
                decoder = cp.SSEDecoder()
                events = [json.loads(frame.data) for frame in decoder.feed(body)
                          if frame.data != b"[DONE]"]
                if path == "/v1/messages":
                    events = [event for event in events if event["type"] != "ping"]
                self.assertEqual(stream_text(path, events), numbered(4))
                self.assertIn(ENDINGS[path], body)

    def test_silence_before_the_head_is_filled_with_pings(self) -> None:
        for path, make in REQUESTS:
            with self.subTest(path):
                self.fake.script(PATHS[path], Answer(status=0, hold=True))
                stream = OpenStream(self.client(), path, make("late", stream=True))
                self.assertEqual(stream.head(), 200)
                stream.until(PINGS[path] * 2)
                release(self.fake)
                self.assertIn(ENDINGS[path], stream.rest())

    def test_an_error_after_pings_is_an_event_and_is_not_tried_again(self) -> None:
        for path, make in REQUESTS:
            for status in (401, 466, 503):
                with self.subTest(path=path, status=status):
                    before = self.fake.count(PATHS[path])
                    self.fake.script(PATHS[path], Answer(status=status, body="too bad", hold=True))
                    client = self.client()
                    stream = OpenStream(client, path, make("late", stream=True))
                    stream.until(PINGS[path])
                    release(self.fake)
                    self.assert_error_end(path, stream.rest().replace(PINGS[path], b""))
                    self.assertIn(b"too bad", stream.got)
                    self.assertEqual(self.fake.count(PATHS[path]), before + 1)
                    client.send(post("/v1/chat/completions", chat("after")))
                    self.assertEqual(said(client.answer()), "Echo: after")

    def test_an_answer_that_is_not_streamed_gets_no_pings(self) -> None:
        for reply in side_by_side(
                lambda row: self.proxy.post(row[0], row[1]("@@think_ms=60@@")), REQUESTS):
            self.assertTrue(reply.body.startswith(b"{"), reply.body[:50])

    def test_events_that_are_dropped_do_not_count_as_life(self) -> None:
        """A client hears nothing of them, so it needs pings as in silence."""
        piece = b'data: {"choices":null,"copilot_references":[]}\n\n'
        with _Dripping(piece) as drip:
            with second_proxy(self, copilot_url=drip.url,          # type: ignore[arg-type]
                              keepalive_s=0.05) as proxy:
                stream = OpenStream(self.client(proxy), "/v1/chat/completions",
                                    chat("a", stream=True))
                try:
                    stream.client.sock.settimeout(1.0)
                    with self.subTest("pings come"):
                        try:
                            stream.until(PINGS["/v1/chat/completions"] * 2)
                        except OSError:
                            self.fail("no ping in a second")
                finally:
                    drip.stop.set()


class _Dripping(FakeUpstream):
    """A fake whose chat answer is one piece every 10 ms until `stop` is set."""

    def __init__(self, piece: bytes) -> None:
        super().__init__()
        self.stop = threading.Event()
        self.lenient.add("bearer")
        pieces = _Pieces(piece, self.stop)
        self.script(CHAT, Answer(chunks=pieces))                   # type: ignore[arg-type]

    def __exit__(self, *error: Any) -> None:
        self.stop.set()
        super().__exit__(*error)


class _Pieces:
    def __init__(self, piece: bytes, stop: threading.Event) -> None:
        self._piece, self._stop = piece, stop

    def __iter__(self) -> Any:
        while not self._stop.wait(0.01):
            yield self._piece


class ClientGoneTest(RelayCase):
    def setUp(self) -> None:
        super().setUp()
        self.aborted = self.fake.aborted

    def assert_aborted(self, count: int = 1) -> None:
        self.assertTrue(self.fake.wait_for(lambda: self.fake.aborted >= self.aborted + count,
                                           GONE_S), "the upstream was not left in time")
        self.assertEqual(self.fake.aborted, self.aborted + count)

    def test_leaving_a_flowing_stream_ends_the_upstream_call(self) -> None:
        for path, make in REQUESTS:
            with self.subTest(path):
                self.aborted = self.fake.aborted
                with RawClient(self.proxy.port) as client:
                    OpenStream(client, path, make("@@events=20000 delay_ms=1@@",
                                                  stream=True)).until(DELTAS[path])
                self.assert_aborted()

    def test_leaving_a_stalled_stream_ends_the_upstream_call(self) -> None:
        for path, make in REQUESTS:
            with self.subTest(path):
                self.aborted = self.fake.aborted
                with RawClient(self.proxy.port) as client:
                    OpenStream(client, path, make("@@events=5 stall=2@@",
                                                  stream=True)).until(DELTAS[path])
                self.assert_aborted()

    def test_leaving_before_the_head_ends_the_upstream_call(self) -> None:
        for path, make in REQUESTS:
            for stream in (True, False):
                with self.subTest(path=path, stream=stream):
                    self.aborted = self.fake.aborted
                    self.fake.script(PATHS[path], Answer(status=0, hold=True))
                    with RawClient(self.proxy.port) as client:
                        client.send(post(path, make("a", stream=stream)))
                        self.assertTrue(self.fake.wait_for(lambda: self.fake.holding == 1))
                    self.assert_aborted()

    def test_leaving_with_a_reset_ends_the_upstream_call(self) -> None:
        client = RawClient(self.proxy.port)
        OpenStream(client, "/v1/messages", message("@@events=5 stall=2@@", stream=True)).until(
            DELTAS["/v1/messages"])
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                               struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0))
        client.__exit__()
        self.assert_aborted()

    def test_leaving_during_an_embedding_ends_the_upstream_call(self) -> None:
        self.fake.script(EMBEDDINGS, Answer(status=0, hold=True))
        with RawClient(self.proxy.port) as client:
            client.send(post("/v1/embeddings", {"model": "text-embedding-3-small", "input": "a"}))
            self.assertTrue(self.fake.wait_for(lambda: self.fake.holding == 1))
        self.assert_aborted()

    def test_only_the_stream_of_the_client_that_left_is_ended(self) -> None:
        streams = []
        for number in range(6):
            path, make = REQUESTS[number % 3]
            client = RawClient(self.proxy.port)
            self.addCleanup(client.__exit__)
            streams.append(OpenStream(client, path, make("@@events=5 stall=2@@", stream=True)))
            streams[-1].until(DELTAS[path])
        for stream in (streams[1], streams[4]):
            stream.client.__exit__()
        self.assert_aborted(2)
        release(self.fake, 4)
        for stream in streams[:1] + streams[2:4] + streams[5:]:
            self.assertIn(ENDINGS[stream.path], stream.rest())
        self.assertEqual(self.fake.aborted, self.aborted + 2)

    def test_a_client_that_left_is_no_error_in_the_log(self) -> None:
        before = len(self.proxy.logs)
        with RawClient(self.proxy.port) as client:
            OpenStream(client, "/v1/messages", message("@@events=5 stall=2@@", stream=True)).until(
                DELTAS["/v1/messages"])
        self.assert_aborted()
        self.assertEqual([record for record in self.proxy.logs[before:]
                          if record.levelname in ("ERROR", "CRITICAL")], [])

    def test_the_connection_of_an_aborted_answer_is_not_used_again(self) -> None:
        with RawClient(self.proxy.port) as client:
            OpenStream(client, "/v1/responses", response("@@events=5 stall=2@@",
                                                         stream=True)).until(b"delta")
        self.assert_aborted()
        number = self.fake.last(RESPONSES).connection
        self.proxy.post("/v1/responses", response("a"))
        self.assertNotEqual(self.fake.last(RESPONSES).connection, number)


class ParallelTest(RelayCase):
    def test_forty_at_once_never_get_each_others_answers(self) -> None:
        wrong: list[Any] = []

        def ask(number: int) -> None:
            path, make = REQUESTS[number % 3]
            with RawClient(self.proxy.port) as client:
                for turn in range(4):
                    text = "caller %d turn %d" % (number, turn)
                    is_stream = (number + turn) % 2 == 0
                    answer = client.ask(post(path, make(text, stream=is_stream)))
                    if is_stream:
                        events = [json.loads(frame.data) for frame in
                                  cp.SSEDecoder().feed(answer.body) if frame.data != b"[DONE]"]
                        found = stream_text(path, events)
                    else:
                        found = body_text(path, answer.json)
                    if found != "Echo: " + text:
                        wrong.append((text, answer.status, answer.body))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        self.assertEqual(wrong, [])
        self.assertFalse([thread for thread in threads if thread.is_alive()])


class ShutdownTest(ProxyCase):
    settings = dict(keepalive_s=0.05)

    def finish(self, grace_s: float) -> threading.Thread:
        thread = threading.Thread(target=self.proxy.server.finish, args=(grace_s,))
        thread.start()
        self.addCleanup(thread.join, 5)
        wait_until(self.proxy.app.stop.is_set, "the shutdown has begun")
        return thread

    def open(self, path: str, body: Any) -> OpenStream:
        return OpenStream(self.enter(RawClient(self.proxy.port)), path, body)

    def test_a_running_stream_may_end_within_the_grace(self) -> None:
        streams = []
        for path, make in REQUESTS:
            streams.append(self.open(path, make("@@events=4 stall=2@@", stream=True)))
            streams[-1].until(DELTAS[path])
        thread = self.finish(5.0)
        release(self.fake, 3)
        for stream in streams:
            self.assertIn(ENDINGS[stream.path], stream.rest())
            self.assertTrue(stream.client.is_closed())
        thread.join(2)
        self.assertFalse(thread.is_alive())

    def check_error_end(self, stream: OpenStream) -> None:
        body = stream.rest()
        self.assertNotIn(ENDINGS[stream.path], body)
        frames = cp.SSEDecoder().feed(body)
        self.assertTrue(frames, body)
        self.assertIn(b'"error"', frames[-1].data)

    def test_after_the_grace_a_stream_ends_with_the_dialects_error(self) -> None:
        streams = []
        for path, make in REQUESTS:
            streams.append(self.open(path, make("@@events=4 stall=2@@", stream=True)))
            streams[-1].until(DELTAS[path])
        thread = self.finish(0.05)
        for stream in streams:
            self.check_error_end(stream)
        thread.join(3)
        self.assertFalse(thread.is_alive())

    def test_after_the_grace_a_stream_that_still_waits_for_its_head_ends_so_too(self) -> None:
        for path in PATHS.values():
            self.fake.script(path, Answer(status=0, hold=True))
        streams = [self.open(path, make("a", stream=True)) for path, make in REQUESTS]
        for stream in streams:
            stream.until(PINGS[stream.path])
        self.finish(0.05)
        for stream in streams:
            stream.client.sock.settimeout(2.0)
            with self.subTest(stream.path):
                try:
                    self.check_error_end(stream)
                except OSError:
                    self.fail("the stream did not end")

    def test_after_the_grace_a_whole_answer_that_waits_is_refused_clearly(self) -> None:
        self.fake.script(CHAT, Answer(status=0, hold=True))
        client = self.enter(RawClient(self.proxy.port, timeout_s=2.0))
        client.send(post("/v1/chat/completions", chat("a")))
        self.assertTrue(self.fake.wait_for(lambda: self.fake.holding == 1))
        self.finish(0.05)
        try:
            self.assertIn(client.answer().status, (502, 503))
        except OSError:
            self.fail("the request got no answer")

    @patient
    def test_new_connections_are_refused_and_idle_ones_do_not_delay(self) -> None:
        with second_proxy(self) as proxy:
            idle = self.enter(RawClient(proxy.port))
            self.assertEqual(idle.ask(post("/v1/chat/completions", chat("a"))).status, 200)
            began = time.monotonic()
            proxy.server.finish(60.0)
            self.assertLess(time.monotonic() - began, 1.0)
            with self.assertRaises(OSError):
                RawClient(proxy.port)


if __name__ == "__main__":
    unittest.main()
