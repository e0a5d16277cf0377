"""The relay over real sockets: streams as they come, cuts, clients that leave, cures, policy."""
from __future__ import annotations

import base64
import contextlib
import email.utils
import io
import json
import socket
import struct
import sys
import threading
import time
import unittest
from typing import Any
from unittest import mock

from support import (DEADLINE_S, PATHS, REQUESTS, SLOW, ProxyCase, RawClient, chat, cp, message,
                     post, release, response, said, second_proxy, wait_until)
from fake_upstream import CHAT, COUNT_TOKENS, EMBEDDINGS, RESPONSES, Answer, FakeUpstream
from cases import (DELTAS, ENDINGS, PINGS, OpenStream, RelayCase, SharedCase, body_text, numbered,
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
        for path, make in REQUESTS:
            for place in (0, 1, 3, 5):
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
    settings = dict(keepalive_s=0.02)

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
        for path, make in REQUESTS:
            reply = self.proxy.post(path, make("@@think_ms=70@@"))
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


class PoolTest(ProxyCase):
    def ask(self, text: str = "a") -> Any:
        return self.proxy.post("/v1/chat/completions", chat(text))

    def test_fifty_requests_need_few_connections(self) -> None:
        for number in range(50):
            path, make = REQUESTS[number % 3]
            self.assertEqual(self.proxy.post(path, make("a", stream=number % 2 == 0)).status, 200)
        self.assertLessEqual(self.fake.connections, 4)

    def test_a_connection_is_reused_after_an_error_answer(self) -> None:
        self.ask()
        for _ in range(5):
            self.fake.script(CHAT, Answer(status=400, body={"error": {"message": "no"}}))
            self.assertEqual(self.ask().status, 400)
        self.assertLessEqual(self.fake.connections, 3)

    def test_a_connection_that_closed_unannounced_is_replaced_silently(self) -> None:
        for _ in range(5):
            self.fake.script(CHAT, Answer(stale=True, body={"id": "a", "choices": [
                {"message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}]}))
            self.assertEqual(said(self.ask()), "x")
            self.assertEqual(said(self.ask("again")), "Echo: again")

    def test_connections_that_all_closed_are_replaced_silently(self) -> None:
        for stream in (False, True):
            for path, make in REQUESTS:
                self.proxy.post(path, make("a"))
                self.fake.hang_up()
                reply = self.proxy.post(path, make("b", stream=stream))
                self.assertEqual(reply.status, 200, reply.body)

    def test_a_connection_with_unread_bytes_is_never_reused(self) -> None:
        for announced in (3, 12):
            stray = {"transfer-encoding": "identity", "content-length": str(announced),
                     "content-type": "application/json"}
            self.fake.script(CHAT, Answer(headers=stray, chunks=[b'{"choices":[]}' * 20]))
            self.assertEqual(self.ask().status, 502)
            number = self.fake.last(CHAT).connection
            for text in ("b", "c"):
                self.assertEqual(said(self.ask(text)), "Echo: " + text)
                self.assertNotEqual(self.fake.last(CHAT).connection, number)

    def test_a_connection_is_not_reused_after_a_cut_stream(self) -> None:
        self.proxy.stream("/v1/chat/completions", chat("@@events=5 error=2@@"))
        self.proxy.stream("/v1/chat/completions", chat("@@events=5 cut=2@@"))
        number = self.fake.last(CHAT).connection
        self.assertEqual(said(self.ask("b")), "Echo: b")
        self.assertNotEqual(self.fake.last(CHAT).connection, number)

    def test_a_hang_up_after_the_request_was_sent_is_not_replayed(self) -> None:
        """The upstream may have begun to work: a second try could be billed twice."""
        self.proxy.get("/v1/models")
        self.proxy.app.upstream.pool.clear()
        for path, make in REQUESTS:
            self.fake.script(PATHS[path], Answer(drop="after"))
            reply = self.proxy.post(path, make("a"))
            self.assertEqual(reply.status, 502, reply.body)
            self.assertEqual(self.fake.count(PATHS[path]), 1)
            self.proxy.app.upstream.pool.clear()


class CureTest(ProxyCase):
    settings = dict(hiccup_pause_s=0.001)

    def ask(self, **more: Any) -> Any:
        return self.proxy.post("/v1/chat/completions", chat("a", **more))

    def assert_calls(self, calls: int, exchanges: int) -> None:
        self.assertEqual(self.fake.count(CHAT), calls)
        self.assertEqual(self.fake.exchanges, exchanges)

    def test_401_is_cured_by_one_exchange(self) -> None:
        self.proxy.get("/v1/models")
        self.fake.revoke_tokens()
        self.assertEqual(said(self.ask()), "Echo: a")
        self.assert_calls(2, 2)

    def test_401_that_stays_is_passed_on_after_two_calls(self) -> None:
        self.fake.script(CHAT, *[Answer(status=401, body="unauthorized: token expired")] * 5)
        self.assertEqual(self.ask().status, 401)
        self.assert_calls(2, 2)

    def test_401_about_an_item_id_does_not_touch_the_token(self) -> None:
        self.fake.script(RESPONSES, Answer(status=401, body={"error": {
            "message": "input item ID does not belong to this connection"}}))
        reply = self.proxy.post("/v1/responses", response("a"))
        self.assertIn("input item ID", reply.json["error"]["message"])
        self.assertEqual((self.fake.count(RESPONSES), self.fake.exchanges), (1, 1))

    def test_421_is_cured_by_adopting_the_new_host(self) -> None:
        self.proxy.get("/v1/models")
        with FakeUpstream(share=self.fake) as moved:
            self.fake.move_to(moved.url)
            self.assertEqual(said(self.ask()), "Echo: a")
            self.assert_calls(1, 2)
            self.assertEqual(moved.count(CHAT), 1)
            self.ask()
            self.assertEqual(moved.count(CHAT), 2)

    def test_421_that_stays_is_passed_on_after_two_calls(self) -> None:
        self.fake.script(CHAT, *[Answer(status=421, body="Misdirected Request")] * 5)
        self.assertEqual(self.ask().status, 421)
        self.assert_calls(2, 2)

    def test_466_is_cured_by_another_version_which_is_remembered(self) -> None:
        self.proxy.get("/v1/models")
        self.fake.refused_versions = {cp.API_VERSIONS[0]}
        self.assertEqual(said(self.ask()), "Echo: a")
        self.assertEqual(said(self.ask()), "Echo: a")
        self.assert_calls(3, 1)
        self.assertEqual(self.fake.last(CHAT).headers["x-github-api-version"], cp.API_VERSIONS[1])

    def test_466_of_two_at_once_does_not_skip_the_good_version(self) -> None:
        self.proxy.get("/v1/models")
        self.fake.script(CHAT, *[Answer(status=466, body="no longer", hold=True)] * 2)
        self.fake.refused_versions = {cp.API_VERSIONS[0], cp.API_VERSIONS[2]}
        statuses: list[int] = []
        threads = [threading.Thread(target=lambda: statuses.append(self.ask().status))
                   for _ in range(2)]
        for thread in threads:
            thread.start()
        release(self.fake, 2)
        for thread in threads:
            thread.join(5)
        self.assertEqual(statuses, [200, 200])

    def test_466_with_every_version_is_passed_on(self) -> None:
        self.proxy.get("/v1/models")
        self.fake.refused_versions = set(cp.API_VERSIONS)
        reply = self.ask()
        self.assertEqual(reply.status, 466)
        self.assertIn("API version", reply.json["error"]["message"])
        self.assertLessEqual(self.fake.count(CHAT), 3)

    def test_hiccups_are_tried_once_more(self) -> None:
        for status in (500, 502, 503, 504, 529):
            before = self.fake.count(CHAT)
            self.fake.script(CHAT, Answer(status=status, body="<html>oops</html>"))
            self.assertEqual(said(self.ask()), "Echo: a")
            self.assertEqual(self.fake.count(CHAT), before + 2)

    def test_hiccups_that_stay_are_passed_on_after_two_calls(self) -> None:
        for path, make in REQUESTS:
            self.fake.script(PATHS[path], *[Answer(status=503, body="busy")] * 2)
            reply = self.proxy.post(path, make("a", stream=True))
            self.assertEqual(reply.status, 503)
            self.assertEqual(self.fake.count(PATHS[path]), 2)
            kind = reply.json["error"]["type"]
            self.assertEqual(kind, "overloaded_error" if path == "/v1/messages"
                             else "server_error")

    def test_no_more_than_two_cures(self) -> None:
        self.fake.script(CHAT, Answer(status=401, body="token"), Answer(status=503, body="busy"),
                         Answer(status=466, body="version"), Answer(status=466, body="version"))
        self.assertEqual(self.ask().status, 466)
        self.assertEqual(self.fake.count(CHAT), 3)

    def forget_limits(self) -> None:
        self.proxy.app.login.account.limits.clear()               # type: ignore[union-attr]

    def in_seconds(self, after: str) -> float:
        """What is told of a retry-after: seconds, as all clients read them."""
        if after.isdigit():
            return int(after)
        return max(1.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())

    def test_429_and_402_are_passed_on_at_once_with_retry_after(self) -> None:
        cases = ((429, "36000", "user_weekly_rate_limited"), (429, "2", "rate_limited"),
                 (402, "Wed, 02 Dec 2026 00:00:00 GMT", "quota_exceeded"))
        for path, make in REQUESTS:
            for status, after, code in cases:
                for stream in (False, True):
                    before = self.fake.count(PATHS[path])
                    self.forget_limits()
                    self.fake.script(PATHS[path], Answer(
                        status=status, headers={"retry-after": after, "x-ratelimit-exceeded": "b"},
                        body={"error": {"message": "slow down", "code": code}}))
                    reply = self.proxy.post(path, make("a", stream=stream))
                    self.assertEqual(reply.status, status)
                    self.assertAlmostEqual(int(reply.headers["retry-after"]),
                                           self.in_seconds(after), delta=5)
                    self.assertEqual(reply.headers["x-ratelimit-exceeded"], "b")
                    self.assertIn("slow down", reply.json["error"]["message"])
                    self.assertEqual(self.fake.count(PATHS[path]), before + 1)

    def test_other_refusals_are_passed_on_after_one_call(self) -> None:
        for status in (400, 402, 403, 404, 413, 422, 429, 499):
            before = self.fake.count(CHAT)
            self.forget_limits()
            self.fake.script(CHAT, Answer(status=status, body={"error": {"message": "no"}}))
            self.assertEqual(self.ask().status, status)
            self.assertEqual(self.fake.count(CHAT), before + 1)
        self.assertEqual(self.fake.exchanges, 1)

    def test_403_with_a_token_code_is_cured_by_one_exchange(self) -> None:
        for number, code in enumerate(("expired_token", "invalid_token", "token_expired")):
            self.fake.script(CHAT, Answer(status=403, body={"error": {"message": "m",
                                                                      "code": code}}))
            self.assertEqual(self.ask().status, 200)
            self.assertEqual(self.fake.exchanges, number + 2)

    def test_an_opaque_403_is_cured_by_one_exchange(self) -> None:
        self.fake.script(CHAT, Answer(status=403, body="Forbidden"))
        self.assertEqual(self.ask().status, 200)
        self.assert_calls(2, 2)

    def test_an_opaque_403_that_stays_leaves_the_token_alone_for_a_while(self) -> None:
        self.fake.script(CHAT, *[Answer(status=403, body="Forbidden")] * 3)
        self.assertEqual(self.ask().status, 403)
        self.assert_calls(2, 2)
        self.assertEqual(self.ask().status, 403)
        self.assert_calls(3, 2)

    def test_an_opaque_403_that_was_cured_may_be_cured_again(self) -> None:
        for number in range(2):
            self.fake.script(CHAT, Answer(status=403, body="Forbidden"))
            self.assertEqual(self.ask().status, 200)
            self.assert_calls(2 * number + 2, number + 2)

    def test_a_cured_stream_has_no_trace_of_the_first_try(self) -> None:
        for path, make in REQUESTS:
            self.fake.script(PATHS[path], Answer(status=500, body="oops"))
            reply = self.proxy.stream(path, make("twice"))
            self.assertEqual((reply.status, stream_text(path, reply.events)),
                             (200, "Echo: twice"))


class HeaderTest(SharedCase):
    def sent_by(self, path: str, body: Any, **headers: str) -> dict[str, str]:
        reply = self.proxy.post(path, body, **headers)
        self.assertEqual(reply.status, 200, reply.body)
        return self.fake.last(PATHS[path]).headers

    def test_the_initiator_is_told_truly(self) -> None:
        call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "ok"}
        use = {"role": "assistant", "content": [
            {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}]}
        reminder = {"type": "text", "text": "<system-reminder>be brief</system-reminder>"}
        human = {"role": "user", "content": "hi"}
        back = {"role": "assistant", "content": "hello"}
        cases: tuple[tuple[str, str, Any], ...] = (
            ("user", "/v1/chat/completions", chat("a")),
            ("user", "/v1/chat/completions", chat("", messages=[human, back, human])),
            ("agent", "/v1/chat/completions", chat("", messages=[
                human, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": "r"}])),
            ("agent", "/v1/chat/completions", chat(
                "Continue if you have next steps, or stop and ask for clarification")),
            ("user", "/v1/responses", response("a")),
            ("user", "/v1/responses", dict(response(""), input=[human])),
            ("agent", "/v1/responses", dict(response(""), input=[
                human, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "r"}])),
            ("user", "/v1/messages", message("a")),
            ("user", "/v1/messages", dict(message(""), messages=[human, back, human])),
            ("agent", "/v1/messages", dict(message(""), messages=[
                human, use, {"role": "user", "content": [result]}])),
            ("agent", "/v1/messages", dict(message(""), messages=[
                human, use, {"role": "user", "content": [result, reminder]}])),
            ("user", "/v1/messages", dict(message(""), messages=[
                human, use, {"role": "user", "content": [
                    result, {"type": "text", "text": "stop"}]}])))
        for wanted, path, body in cases:
            with self.subTest(path=path, body=str(body)[-80:]):
                self.assertEqual(self.sent_by(path, body)["x-initiator"], wanted)

    def test_a_client_that_names_the_initiator_is_believed(self) -> None:
        for path, make in REQUESTS:
            for word in ("agent", "user"):
                found = self.sent_by(path, make("a"), **{"X-Initiator": word})
                self.assertEqual(found["x-initiator"], word)
            found = self.sent_by(path, make("a"), **{"X-Initiator": "nonsense"})
            self.assertEqual(found["x-initiator"], "user")

    def test_images_are_announced_also_inside_tool_results(self) -> None:
        url = "data:image/png;base64,iVBORw0KGgo="
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                             "data": "iVBORw0KGgo="}}
        use = {"role": "assistant", "content": [
            {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}]}
        human = {"role": "user", "content": "look"}
        cases: tuple[tuple[str, Any], ...] = (
            ("/v1/chat/completions", chat("", messages=[{"role": "user", "content": [
                {"type": "text", "text": "a"}, {"type": "image_url",
                                                "image_url": {"url": url}}]}])),
            ("/v1/responses", dict(response(""), input=[{"role": "user", "content": [
                {"type": "input_image", "image_url": url}]}])),
            ("/v1/responses", dict(response(""), input=[
                dict(human), {"type": "function_call", "call_id": "c", "name": "f",
                              "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": [
                    {"type": "input_image", "image_url": url}]}])),
            ("/v1/messages", dict(message(""), messages=[{"role": "user", "content": [image]}])),
            ("/v1/messages", dict(message(""), messages=[human, use, {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [image]}]}])))
        for path, body in cases:
            with self.subTest(path):
                self.assertEqual(self.sent_by(path, body)["copilot-vision-request"], "true")
        for path, make in REQUESTS:
            self.assertNotIn("copilot-vision-request", self.sent_by(path, make("a")))

    def test_no_header_of_the_client_is_forwarded(self) -> None:
        given = {"Authorization": "Bearer sk-mine", "x-api-key": "sk-mine", "api-key": "sk-mine",
                 "x-goog-api-key": "sk-mine", "Cookie": "a=sk-mine", "User-Agent": "sk-mine",
                 "x-stainless-lang": "sk-mine", "Referer": "http://sk-mine", "x-app": "sk-mine",
                 "openai-organization": "sk-mine", "X-Forwarded-For": "1.2.3.4",
                 "session_id": "sk-mine", "X-Request-Id": "sk-mine", "traceparent": "sk-mine",
                 "openai-beta": "sk-mine", "anthropic-dangerous-direct-browser-access": "true",
                 "Accept-Encoding": "gzip", "Accept": "text/sk-mine"}
        for path, make in REQUESTS:
            for body in (make("a"), make("a", stream=True)):
                sent = self.sent_by(path, body, **given)
                self.assertNotIn("sk-mine", str(sent))
                self.assertNotIn("x-forwarded-for", sent)
                self.assertEqual(sent["accept-encoding"], "identity")
                bearer = sent["authorization"].partition(" ")[2]
                self.assertIn(bearer, self.fake.tokens)

    def test_only_known_betas_go_up(self) -> None:
        sent = self.sent_by("/v1/messages", message("a"), **{
            "anthropic-beta": "claude-code-20250219, interleaved-thinking-2025-05-14,context-1m-1"})
        self.assertEqual(sent["anthropic-beta"], "interleaved-thinking-2025-05-14")
        sent = self.sent_by("/v1/messages", message("a"), **{"anthropic-beta": "context-1m-1"})
        self.assertNotIn("anthropic-beta", sent)
        self.assertEqual(sent["anthropic-version"], "2023-06-01")

    def test_header_overrides_go_up(self) -> None:
        with second_proxy(self, header=(                            # type: ignore[arg-type]
                "editor-version=vscode/9.9.9", "X-GitHub-Api-Version=2099-01-01",
                "X-Extra=yes")) as proxy:
            for path, make in REQUESTS:
                self.assertEqual(proxy.post(path, make("a")).status, 200)
                sent = self.fake.last(PATHS[path]).headers
                self.assertEqual((sent["editor-version"], sent["x-github-api-version"],
                                  sent["x-extra"]), ("vscode/9.9.9", "2099-01-01", "yes"))

    def test_an_overridden_version_is_not_replaced_after_a_466(self) -> None:
        with second_proxy(self, header=(                            # type: ignore[arg-type]
                "X-GitHub-Api-Version=2099-01-01",)) as proxy:
            proxy.get("/v1/models")
            before = self.fake.count(CHAT)
            self.fake.script(CHAT, Answer(status=466, body="old"))
            self.assertEqual(proxy.post("/v1/chat/completions", chat("a")).status, 466)
            self.assertEqual(self.fake.count(CHAT), before + 1)

    def test_a_body_that_needs_no_change_goes_up_byte_for_byte(self) -> None:
        data = b'{ "model":"gpt-4.1",  "messages" : [{"role":"user","content":"\\u00e9 \xc3\xa9"}]}'
        self.proxy.request("POST", "/v1/chat/completions", data)
        self.assertEqual(self.fake.last(CHAT).body, data)

    def test_only_the_models_name_changes_where_only_that_must(self) -> None:
        data = b'{"messages":[{"role":"user","content":"a"}],  "model" : "openai/gpt-4.1","n":1}'
        self.proxy.request("POST", "/v1/chat/completions", data)
        self.assertEqual(self.fake.last(CHAT).body,
                         data.replace(b'"model" : "openai/gpt-4.1"', b'"model":"gpt-4.1"'))


class CountAndEmbedTest(SharedCase):
    def embed(self, texts: Any, **more: Any) -> Any:
        return self.proxy.post("/v1/embeddings",
                               dict({"model": "text-embedding-3-small", "input": texts}, **more))

    def test_count_tokens_is_the_upstreams_own(self) -> None:
        reply = self.proxy.post("/v1/messages/count_tokens", dict(
            message("count me"), stream=True, thinking={"type": "enabled", "budget_tokens": 2000}))
        self.assertEqual(reply.status, 200, reply.body)
        sent = self.fake.last(COUNT_TOKENS).json
        self.assertEqual(reply.json, {"input_tokens": len(json.dumps(sent["messages"])) // 4 + 1})

    def test_count_tokens_falls_back_to_an_estimate(self) -> None:
        self.fake.count_tokens_fails = True
        self.addCleanup(setattr, self.fake, "count_tokens_fails", False)
        text = "some words " * 400
        reply = self.proxy.post("/v1/messages/count_tokens", message(text))
        self.assertEqual(reply.status, 200)
        self.assertGreater(reply.json["input_tokens"], 800 * 1.2)   # on the high side of 2 x 400
        self.assertLess(reply.json["input_tokens"], len(text))

    def test_count_tokens_is_estimated_after_any_refusal(self) -> None:
        for status in (400, 401, 403, 404, 429, 500):
            self.fake.script(COUNT_TOKENS, *[Answer(status=status, body="no")] * 2)
            reply = self.proxy.post("/v1/messages/count_tokens", message("a"))
            self.assertEqual(reply.status, 200, (status, reply.body))
            while self.fake.next_answer(COUNT_TOKENS):
                pass                                       # what was not needed

    def test_count_tokens_of_a_model_without_the_endpoint_is_estimated(self) -> None:
        sent = self.new_sent()
        reply = self.proxy.post("/v1/messages/count_tokens", message("a", model="gpt-5.3-codex"))
        self.assertEqual(reply.status, 200, reply.body)
        self.assertGreater(reply.json["input_tokens"], 0)
        self.assertNotIn(COUNT_TOKENS, [record.path for record in sent()])

    def test_embeddings_of_a_string_and_of_several(self) -> None:
        one, two = self.embed("a"), self.embed(["a", "b"])
        self.assertEqual([reply.json["object"] for reply in (one, two)], ["list", "list"])
        self.assertEqual(one.json["model"], "text-embedding-3-small")
        self.assertEqual([item["index"] for item in two.json["data"]], [0, 1])
        self.assertEqual(two.json["data"][0]["object"], "embedding")
        self.assertEqual(one.json["data"][0]["embedding"], two.json["data"][0]["embedding"])

    def test_base64_embeddings_are_little_endian_float32(self) -> None:
        floats = self.embed("a", encoding_format="float").json["data"][0]["embedding"]
        packed = self.embed("a", encoding_format="base64").json["data"][0]["embedding"]
        self.assertEqual(list(struct.unpack("<16f", base64.b64decode(packed))), floats)

    def test_more_than_512_inputs_are_split_and_merged_in_order(self) -> None:
        texts = ["text %d" % number for number in range(1100)]
        sent = self.new_sent()
        reply = self.embed(texts)
        self.assertEqual(reply.status, 200, reply.body[:200])
        self.assertEqual([item["index"] for item in reply.json["data"]], list(range(1100)))
        sizes = [len(record.json["input"]) for record in sent() if record.path == EMBEDDINGS]
        self.assertEqual(sizes, [512, 512, 76])
        single = self.embed(texts[1099]).json["data"][0]["embedding"]
        self.assertEqual(reply.json["data"][1099]["embedding"], single)
        self.assertEqual(reply.json["usage"]["prompt_tokens"],
                         sum(len(text) // 4 + 1 for text in texts))

    def test_dimensions_go_up(self) -> None:
        self.assertEqual(len(self.embed("a", dimensions=5).json["data"][0]["embedding"]), 5)

    def test_token_arrays_and_other_inputs_are_a_clear_400(self) -> None:
        sent = self.new_sent()
        for given in ([1, 2], [[1, 2]], [], None, 5, {"a": 1}, ["a", 1]):
            with self.subTest(str(given)):
                reply = self.embed(given)
                self.assertEqual(reply.status, 400, reply.body)
                self.assertEqual(reply.json["error"]["param"], "input")
        self.assertNotIn(EMBEDDINGS, [record.path for record in sent()])

    def test_an_error_of_a_later_batch_is_the_answer(self) -> None:
        self.fake.script(EMBEDDINGS, Answer(status=0), Answer(status=429, body="slow", headers={
            "retry-after": "9"}))
        reply = self.embed(["a"] * 600)
        self.assertEqual((reply.status, reply.headers["retry-after"]), (429, "9"))
        self.proxy.app.login.account.limits.clear()               # type: ignore[union-attr]

    def test_too_few_vectors_are_502(self) -> None:
        self.fake.script(EMBEDDINGS, Answer(body={"data": [{"embedding": [1.0], "index": 0}]}))
        self.assertEqual(self.embed(["a", "b"]).status, 502)


class PolicyTest(SharedCase):
    def setUp(self) -> None:
        self.sent = self.new_sent()

    def asked(self) -> list[str]:
        """What went up to a model."""
        return [record.path for record in self.sent() if record.path in PATHS.values()]

    def test_too_early_is_429_with_retry_after_and_nothing_goes_up(self) -> None:
        with second_proxy(self, rate_limit=60.0) as proxy:  # type: ignore[arg-type]
            self.assertEqual(proxy.post("/v1/chat/completions", chat("a")).status, 200)
            for path, make in REQUESTS:
                reply = proxy.post(path, make("b"))
                self.assertEqual(reply.status, 429, reply.body)
                self.assertEqual(reply.json["error"]["type"], "rate_limit_error")
                self.assertTrue(1 <= int(reply.headers["retry-after"]) <= 61)
            self.assertEqual(proxy.get("/v1/models").status, 200)       # not limited
            self.assertEqual(self.asked(), [CHAT])

    def test_waiting_requests_go_up_in_their_order_and_apart(self) -> None:
        interval = 0.06
        with second_proxy(self, rate_limit=interval, wait=True) as proxy:  # type: ignore[arg-type]
            proxy.get("/v1/models")
            times: list[float] = []
            limiter = proxy.app.login.account.limiter
            real = limiter.admit
            arrived: list[int] = []

            async def admit() -> None:
                arrived.append(len(arrived))
                await real()
                times.append(time.monotonic())

            with mock.patch.object(limiter, "admit", admit):
                clients = [self.enter(RawClient(proxy.port)) for _ in range(4)]
                for number, client in enumerate(clients):
                    client.send(post("/v1/chat/completions", chat("turn %d" % number)))
                    wait_until(lambda: len(arrived) > number, "the request at the limiter")
                for number, client in enumerate(clients):
                    self.assertEqual(said(client.answer()), "Echo: turn %d" % number)
            texts = [record.json["messages"][0]["content"] for record in self.sent()
                     if record.path == CHAT]
            self.assertEqual(texts, ["turn %d" % number for number in range(4)])
            # three pauses in all, of which the first caller may have noted its start late
            self.assertGreater(times[-1] - times[0], interval * 2)

    def test_a_client_that_leaves_while_waiting_sends_nothing_up(self) -> None:
        with second_proxy(self, rate_limit=30.0, wait=True) as proxy:  # type: ignore[arg-type]
            self.assertEqual(proxy.post("/v1/chat/completions", chat("a")).status, 200)
            with RawClient(proxy.port) as client:
                client.send(post("/v1/chat/completions", chat("b")))
                wait_until(lambda: len(proxy.server._running) == 1, "the request waits")
            wait_until(lambda: not proxy.server._running, "the client's leaving", GONE_S)
            self.assertEqual(self.asked(), [CHAT])

    def test_manual_asks_with_client_model_and_text(self) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        self.enter(mock.patch("sys.stdin", Terminal("y\nn\n\n")))
        stderr = self.enter(contextlib.redirect_stderr(io.StringIO()))
        with second_proxy(self, manual=True) as proxy:  # type: ignore[arg-type]
            text = "what is\nthe \x1b[31mweather " + "x" * 100
            statuses = [proxy.post("/v1/chat/completions", chat(text),
                                   **{"User-Agent": "my-client"}).status for _ in range(3)]
        self.assertEqual(statuses, [200, 403, 403])
        asked = stderr.getvalue()
        self.assertIn("my-client", asked)
        self.assertIn("gpt-4.1", asked)
        self.assertNotIn("\x1b", asked)
        self.assertNotIn("x" * 60, asked)


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

    def test_new_connections_are_refused_and_idle_ones_do_not_delay(self) -> None:
        idle = self.enter(RawClient(self.proxy.port))
        self.assertEqual(idle.ask(post("/v1/chat/completions", chat("a"))).status, 200)
        began = time.monotonic()
        self.proxy.server.finish(60.0)
        self.assertLess(time.monotonic() - began, DEADLINE_S)
        with self.assertRaises(OSError):
            RawClient(self.proxy.port)


if __name__ == "__main__":
    unittest.main()
