"""The relay loop: clients that leave, slow readers, idle thousands, faults, the end, TLS."""
from __future__ import annotations

import contextlib
import os
import re
import selectors
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from typing import Any, Callable, Iterator
from unittest import mock

from support import (DEADLINE_S, REQUESTS, Proxy, RawClient, chat, cp, get, long_run, memory_bytes,
                     message, need_files, pass_time, patient, post, release, response, said,
                     second_proxy, stand_still, wait_until, workers)
from fake_upstream import CHAT, EXCHANGE, Answer
from cases import Accepting, DELTAS, ENDINGS, PINGS, OpenStream, RelayCase, numbered, stream_text

GONE_S = 1.0                       # in which a client's leaving must reach the upstream
SETTLE_S = 3.0                     # for all to be closed; the DRAIN_S of half a second is in it
SLOW = os.environ.get("COPILOT_PROXY_SLOW_TESTS") == "1"
FDS = "/proc/self/fd"
MIB = 1024 * 1024
CHAT_PATH = "/v1/chat/completions"
LINGER = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
EVENT = (b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"gpt-4.1",'
         b'"choices":[{"index":0,"delta":{"content":"%d %s"},"finish_reason":null}]}\n\n')
STOP = (b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"gpt-4.1",'
        b'"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n')
DONE = b"data: [DONE]\n\n"


class Torrent:
    """Chunks for a scripted answer: `events` numbered events of 4 KiB, 16 in a chunk, as fast as
    they are taken.  `sent` chunks were taken so far."""

    def __init__(self, events: int) -> None:
        self.events, self.sent = events, 0

    def __iter__(self) -> Iterator[bytes]:
        for first in range(0, self.events, 16):
            yield b"".join(EVENT % (number, b"x" * 3950) for number in range(first, first + 16))
            self.sent += 1
        yield STOP + DONE


class Late:
    """A whole stream in one chunk, whose end comes only when `gate` is set."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        yield EVENT % (0, b"late") + STOP + DONE
        self.gate.wait(DEADLINE_S)


def boom(*args: Any, **more: Any) -> Any:
    raise RuntimeError("a fault put in by a test")


def idle(proxy: Proxy) -> list[Any]:
    """Connections that wait for a request."""
    return [client for client in list(proxy.server.loop.clients) if client.is_idle]


def local(work: Any, name: str) -> Any:
    """A local variable of a coroutine that waits, or of one that it awaits."""
    while work is not None:
        frame = getattr(work, "cr_frame", None)
        if frame is not None and name in frame.f_locals:
            return frame.f_locals[name]
        work = getattr(work, "cr_await", None)
    return None


def drained(proxy: Proxy) -> list[Any]:
    """Answers whose last chunk is waited for, apart from their clients."""
    works = [task.work for task in list(proxy.server.loop._tasks)]
    return [local(work, "answer") for work in works if work.__name__ == "drain"]


class Stream:
    """The server's own view of a stream."""

    def __init__(self, proxy: Proxy, exchange: Any, pipeline: Any) -> None:
        self._proxy = proxy
        self.exchange, self.client, self.pipeline = exchange, exchange.client, pipeline

    @property
    def out(self) -> bytearray:
        return self.client.out                               # type: ignore[no-any-return]

    @property
    def paused(self) -> bool:
        """Waits for the client, not for the upstream."""
        return isinstance(self.client.task.what, cp.News)

    @property
    def ending(self) -> bool:
        return self.client.exchange is not self.exchange


@contextlib.contextmanager
def frozen(proxy: Proxy) -> Iterator[None]:
    """The loop stands still: whatever happens meanwhile is ready for it at one time."""
    standing, go = threading.Event(), threading.Event()

    def stand() -> None:
        standing.set()
        go.wait(DEADLINE_S)

    proxy.server.loop.post(stand)
    if not standing.wait(DEADLINE_S):
        raise AssertionError("the loop does not run")
    try:
        yield
    finally:
        go.set()


class LoopCase(RelayCase):
    """After each test the loop holds nothing, and no file is open that was not before."""

    def setUp(self) -> None:
        super().setUp()
        self.assertEqual(self.proxy.get("/v1/models").status, 200)   # no token is being fetched
        self.settled()
        self.files = self.open_files()
        self.addCleanup(self.settled_or_renewed)
        self.aborted = self.fake.aborted
        self.began_logs = len(self.proxy.logs)

    def open_files(self) -> int:
        """Without those that each `fake.release()` leaves behind."""
        self.proxy.app.upstream.pool.clear()
        if not os.path.isdir(FDS):
            return 0
        return len(os.listdir(FDS)) - len(self.fake._wakers)

    def settled(self) -> None:
        server, loop = self.proxy.server, self.proxy.server.loop
        self.assertTrue(loop._thread.is_alive(), "the loop's thread has died")
        for what, left in (("client", loop.clients.copy), ("exchange", server.running),
                           ("coroutine", loop._tasks.copy)):
            wait_until(lambda left=left: not left(), "no %s is left" % what, SETTLE_S)
        if hasattr(self, "files"):
            wait_until(lambda: self.open_files() <= self.files, "all files are closed again",
                       SETTLE_S)

    def settled_or_renewed(self) -> None:
        """A fault shows in its own test only: the next one begins with a new proxy."""
        try:
            self.settled()
        except AssertionError:
            self.tearDownClass()
            self.setUpClass()
            raise

    def faults(self) -> list[str]:
        """Error lines of this test in the log."""
        return [record.getMessage() for record in self.proxy.logs[self.began_logs:]
                if record.levelname in ("ERROR", "CRITICAL")]

    def lines(self, text: str) -> list[str]:
        """Log lines of this test with this text."""
        return [line for line in (record.getMessage()
                                  for record in self.proxy.logs[self.began_logs:]) if text in line]

    def open(self, body: Any, path: str = CHAT_PATH, proxy: Proxy | None = None) -> OpenStream:
        """A stream that has begun to speak."""
        stream = OpenStream(self.client(proxy), path, body)
        stream.until(DELTAS[path])
        return stream

    def relay_of(self, stream: OpenStream, proxy: Proxy | None = None) -> Any:
        """The loop's own view of a stream."""
        port, proxy = stream.client.sock.getsockname()[1], proxy or self.proxy

        def find() -> Stream | None:
            for client in proxy.server._answering():
                if client.sock.getpeername()[1] == port:
                    pipeline = local(client.task.work, "pipeline")
                    return Stream(proxy, client.exchange, pipeline) if pipeline else None
            return None

        return wait_until(find, "the server has the stream")

    def assert_aborted(self, count: int = 1) -> None:
        self.assertTrue(self.fake.wait_for(lambda: self.fake.aborted >= self.aborted + count,
                                           GONE_S), "the upstream was not left in time")

    def assert_healthy(self) -> None:
        """A new client is served, streamed and not."""
        self.assertTrue(self.proxy.server.loop._thread.is_alive(), "the loop's thread has died")
        client = self.client()
        client.sock.settimeout(3.0)
        self.assertIn(b"[DONE]", client.ask(post(CHAT_PATH, chat("a", stream=True))).body)
        self.assertEqual(said(client.ask(post(CHAT_PATH, chat("b")))), "Echo: b")
        client.__exit__()

    def pour(self, events: int = 5120, proxy: Proxy | None = None) -> tuple[OpenStream, Torrent]:
        """A torrent whose client stopped to read after the first event: paused."""
        torrent = Torrent(events)
        self.fake.script(CHAT, Answer(chunks=torrent))               # type: ignore[arg-type]
        stream = self.open(chat("a", stream=True), proxy=proxy)
        relay = self.relay_of(stream, proxy)
        wait_until(lambda: relay.paused, "the upstream is paused")
        return stream, torrent

    def assert_poured(self, stream: OpenStream, torrent: Torrent) -> None:
        """Every event in its order, none twice."""
        numbers = [int(text) for text in re.findall(rb'"content":"(\d+) ', stream.rest())]
        self.assertEqual(len(numbers), torrent.events)
        self.assertEqual(numbers, list(range(torrent.events)))
        self.assertTrue(stream.got.endswith(DONE))


# ---- ways to leave: how, and when

def leave_with_fin(client: RawClient) -> None:
    client.__exit__()


def leave_with_reset(client: RawClient) -> None:
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
    client.__exit__()


def leave_half(client: RawClient) -> None:
    """Says that it will send no more, and would go on reading."""
    client.sock.shutdown(socket.SHUT_WR)


def leave_after_more(client: RawClient) -> None:
    """Has begun another request, and leaves what it was sent unread."""
    with contextlib.suppress(OSError):
        client.send(b"POST /v1/messages HTTP/1.1\r\nHost: lo")
    client.__exit__()


MANNERS = (leave_with_fin, leave_with_reset, leave_after_more)


class LeavingTest(LoopCase):
    """What is left open shows at the end of each test, in `settled`."""

    settings = dict(keepalive_s=5.0)

    def each(self, begin: Callable[[], RawClient], aborts: bool = True) -> None:
        """Leave in each manner what `begin` began; nothing remains, also upstream."""
        for leave in MANNERS if aborts else (*MANNERS, leave_half):
            with self.subTest(leave.__name__):
                self.aborted = self.fake.aborted
                client = begin()
                leave(client)
                if aborts:
                    self.assert_aborted()
                    wait_until(lambda: self.fake.open_streams == 0, "the upstream has stopped")
                self.read_to_end(client, leave)
                self.settled_quietly()
                self.assertEqual(self.fake.aborted, self.aborted + aborts)

    def read_to_end(self, client: RawClient, leave: Any) -> None:
        """Who left half sees the server close the other half."""
        if leave is leave_half:
            with contextlib.suppress(ConnectionError):
                client.reader.read()
            client.__exit__()

    def settled_quietly(self) -> None:
        self.settled()
        self.assertEqual(self.faults(), [])

    def parked(self) -> RawClient:
        client = self.client()
        wait_until(lambda: idle(self.proxy), "the connection is idle")
        return client

    def test_a_connection_that_never_asked(self) -> None:
        self.each(self.parked, aborts=False)

    def test_a_connection_that_waits_between_two_requests(self) -> None:
        def begin() -> RawClient:
            client = self.client()
            client.ask(post(CHAT_PATH, chat("a", stream=True)))
            client.ask(get("/health"))
            wait_until(lambda: idle(self.proxy), "the connection is idle")
            return client
        self.each(begin, aborts=False)

    def test_in_the_middle_of_the_head(self) -> None:
        def begin() -> RawClient:
            client = self.parked()
            client.send(b"POST /v1/messages HTTP/1.1\r\nHost: local")
            wait_until(lambda: any(client.ahead for client in idle(self.proxy)),
                       "the half is read")
            return client
        self.each(begin, aborts=False)

    def test_in_the_middle_of_the_body(self) -> None:
        def begin() -> RawClient:
            client = self.client()
            client.send(post(CHAT_PATH, chat("b" * 5000))[:-500])
            wait_until(self.proxy.server.running, "the request is being read")
            return client
        self.each(begin, aborts=False)

    def test_before_the_upstreams_head(self) -> None:
        for stream in (True, False):
            def begin(stream: bool = stream) -> RawClient:
                self.fake.script(CHAT, Answer(status=0, hold=True))
                client = self.client()
                client.send(post(CHAT_PATH, chat("a", stream=stream)))
                wait_until(lambda: self.fake.holding == 1, "the upstream has the request")
                return client
            self.each(begin)

    def test_between_two_events(self) -> None:
        self.each(lambda: self.open(chat("@@events=5 stall=2@@", stream=True)).client)

    def test_while_events_flow(self) -> None:
        self.each(lambda: self.open(chat("@@events=20000 delay_ms=1@@", stream=True)).client)

    @long_run
    def test_while_the_upstream_is_paused_for_it(self) -> None:
        def begin() -> RawClient:
            stream, torrent = self.pour()
            stand_still(lambda: torrent.sent, "the upstream can send no more", 0.05)
            return stream.client
        self.each(begin)

    def test_right_at_the_end(self) -> None:
        """The end of the stream and that of the client are ready for the loop together."""
        def begin() -> RawClient:
            stream = self.open(chat("@@events=5 stall=2@@", stream=True))
            self.relay_of(stream)
            return stream.client
        for leave in (*MANNERS, leave_half):
            with self.subTest(leave.__name__):
                client, lines = begin(), len(self.lines("status=200"))
                with frozen(self.proxy):
                    release(self.fake)
                    wait_until(lambda: self.fake.open_streams == 0, "the upstream has ended")
                    leave(client)
                self.read_to_end(client, leave)
                self.settled_quietly()
                wait_until(lambda: len(self.lines("status=200")) > lines, "a line a request")
                self.assertEqual(len(self.lines("status=200")), lines + 1, "one line a request")

    def test_with_much_sent_ahead_it_is_noticed_by_the_second_ping(self) -> None:
        """The loop reads no more than a head's length ahead, so it cannot see the end."""
        with second_proxy(self, keepalive_s=0.05) as proxy:           # type: ignore[arg-type]
            stream = self.open(chat("@@events=5 stall=2@@", stream=True), proxy=proxy)
            relay = self.relay_of(stream, proxy)
            stream.client.send(post(CHAT_PATH, chat("b" * 100_000)))
            wait_until(lambda: relay.client.is_full, "much is read ahead")
            stream.client.__exit__()
            self.assert_aborted()
            wait_until(lambda: not proxy.server.loop.clients, "the client is forgotten")

    def test_everyone_at_once(self) -> None:
        streams = []
        for number in range(30):
            path, make = REQUESTS[number % 3]
            streams.append(self.open(make("@@events=5 stall=2@@", stream=True), path))
        for number, stream in enumerate(streams):
            MANNERS[number % 3](stream.client)
        self.assert_aborted(30)
        self.assertEqual(self.faults(), [])


class ReuseTest(LoopCase):
    def test_a_connection_serves_streams_and_whole_answers_in_turn(self) -> None:
        client, connections = self.client(), self.fake.connections
        for number in range(20):
            path, make = REQUESTS[number % 3]
            text = "turn %d" % number
            reply = client.ask(post(path, make(text, stream=True)))
            decoder = cp.SSEDecoder()
            events = [cp.loads(frame.data) for frame in decoder.feed(reply.body)
                      if frame.data != b"[DONE]"]
            self.assertEqual(stream_text(path, events), "Echo: " + text)
            self.assertEqual(said(client.ask(post(CHAT_PATH, chat(text)))), "Echo: " + text)
        self.assertLessEqual(self.fake.connections, connections + 3)

    def test_requests_behind_a_stream_are_answered_after_it_in_their_order(self) -> None:
        client = self.client()
        asked = [chat("@@events=3 stall=1@@", stream=True), chat("two"),
                 chat("three", stream=True), chat("four " + "b" * 200_000), None,
                 chat("six", stream=True), chat("seven")]
        stream = OpenStream(client, CHAT_PATH, asked[0])
        stream.until(DELTAS[CHAT_PATH])
        sender = threading.Thread(target=client.send, args=(b"".join(
            post(CHAT_PATH, body) if body else get("/health") for body in asked[1:]),))
        sender.start()
        self.addCleanup(sender.join, 5)
        relay = self.relay_of(stream)
        wait_until(lambda: relay.client.is_full, "much is read ahead")
        self.assertNotIn(b"[DONE]", stream.got)
        release(self.fake)
        self.assertIn(b"[DONE]", stream.rest())
        self.assertEqual(said(client.answer()), "Echo: two")
        self.assertIn(b"three", client.answer().body)
        self.assertTrue(said(client.answer()).startswith("Echo: four bbb"))
        self.assertEqual(client.answer().json["status"], "ok")
        self.assertIn(b"six", client.answer().body)
        self.assertEqual(said(client.answer()), "Echo: seven")

    def test_a_request_that_comes_together_with_the_end_of_the_stream_is_answered(self) -> None:
        for path, make in REQUESTS:
            with self.subTest(path):
                stream = self.open(make("@@events=5 stall=2@@", stream=True), path)
                self.relay_of(stream)
                with frozen(self.proxy):
                    release(self.fake)
                    wait_until(lambda: self.fake.open_streams == 0, "the upstream has ended")
                    stream.client.send(post(CHAT_PATH, chat("next")))
                stream.client.sock.settimeout(2.0)
                self.assertIn(ENDINGS[path], stream.rest())
                try:
                    self.assertEqual(said(stream.client.answer()), "Echo: next")
                except OSError:
                    self.fail("the request is lost")

    def test_two_requests_around_the_end_of_the_stream_are_answered(self) -> None:
        """One is read ahead, the body of the other is still on its way: one reader only."""
        big = "b" * 300_000
        stream = self.open(chat("@@events=5 stall=2@@", stream=True))
        relay = self.relay_of(stream)
        whole = post(CHAT_PATH, chat(big))
        stream.client.send(whole[:400])
        wait_until(lambda: relay.client.ahead, "its head is read ahead")
        with frozen(self.proxy):
            release(self.fake)
            wait_until(lambda: self.fake.open_streams == 0, "the upstream has ended")
            stream.client.send(whole[400:20_000])
        stream.client.send(whole[20_000:])
        stream.client.sock.settimeout(2.0)
        stream.rest()
        try:
            self.assertEqual(said(stream.client.answer()), "Echo: " + big)
        except OSError:
            self.fail("the request is lost")


class BackPressureTest(LoopCase):
    @unittest.skipUnless(os.path.isdir(FDS), "reads /proc")
    def test_a_reader_that_stops_stops_its_own_upstream_and_loses_nothing(self) -> None:
        memory = memory_bytes()
        stream, torrent = self.pour(8192)                                       # 32 MiB
        relay = self.relay_of(stream)
        stand_still(lambda: torrent.sent, "the upstream can send no more")
        self.assertLess(torrent.sent * 16, torrent.events // 2)
        self.assertTrue(relay.paused)
        self.assertLess(len(relay.out), cp.MAX_OUT_BYTES + 4 * cp.READ_BYTES)
        self.assertLess(memory_bytes() - memory, 12 * MIB)
        for path, make in REQUESTS:                          # the others go on meanwhile
            reply = self.proxy.stream(path, make("@@events=200@@"))
            self.assertEqual(stream_text(path, reply.events), numbered(200))
        self.assertTrue(relay.paused)
        self.assert_poured(stream, torrent)

    def test_a_reader_that_stops_and_goes_gets_every_byte(self) -> None:
        stream, torrent = self.pour(5120)
        relay = self.relay_of(stream)
        for _ in range(3):
            stream.got += stream._answer.read(5 * MIB)
            wait_until(lambda: relay.paused or relay.ending, "it is paused again")
        self.assert_poured(stream, torrent)
        self.assertIn(b"[DONE]", stream.client.ask(post(CHAT_PATH, chat("a", stream=True))).body)

    @long_run
    def test_a_pause_is_neither_silence_nor_a_place_for_pings(self) -> None:
        with second_proxy(self, keepalive_s=0.04, answer_timeout_s=0.15) as proxy:  # type: ignore
            stream, torrent = self.pour(proxy=proxy)
            pass_time(0.25)
            self.assertTrue(self.relay_of(stream, proxy).paused)
            self.assert_poured(stream, torrent)
            for frame in stream.got.split(b"\n\n")[:-1]:
                self.assertTrue(frame.startswith((b"data: {", b"data: [DONE]", b": keepalive")),
                                frame[:80])
            stream.client.__exit__()

    def test_a_client_that_takes_nothing_for_long_is_given_up(self) -> None:
        with mock.patch.object(cp, "SEND_TIMEOUT_S", 0.15):
            with second_proxy(self, keepalive_s=0.1) as proxy:        # type: ignore[arg-type]
                self.pour(proxy=proxy)
                self.assertTrue(self.fake.wait_for(
                    lambda: self.fake.aborted > self.aborted, 3), "the upstream still waits")
                wait_until(lambda: not proxy.server.loop.clients, "the client is forgotten")

    def test_the_loop_does_not_turn_while_all_wait(self) -> None:
        stream, torrent = self.pour()
        full = self.open(chat("@@events=5 stall=2@@", stream=True))
        relay = self.relay_of(full)
        full.client.send(post(CHAT_PATH, chat("b" * 100_000)))
        wait_until(lambda: relay.client.is_full, "much is read ahead")
        half = self.client()
        half.send(b"GET /health HTTP/1.1\r\n")
        wait_until(lambda: any(client.ahead for client in idle(self.proxy)), "the half is read")
        stand_still(lambda: torrent.sent, "the upstream can send no more")
        selector = self.proxy.server.loop._selector
        with mock.patch.object(selector, "select", wraps=selector.select) as select:
            began = time.monotonic()
            pass_time(0.15)
            self.assertLess(select.call_count, 80 * (time.monotonic() - began))
        release(self.fake)

    @unittest.skipUnless(SLOW and os.path.isdir(FDS), "COPILOT_PROXY_SLOW_TESTS=1 on Linux only")
    def test_a_reader_that_stops_for_30_s_while_100_mb_come(self) -> None:
        memory = memory_bytes()
        stream, torrent = self.pour(25600)
        relay, sent, most = self.relay_of(stream), [], 0
        until = time.monotonic() + 30
        while time.monotonic() < until:
            self.assertIn(b"[DONE]", self.proxy.stream(CHAT_PATH, chat("@@events=20@@")).body)
            sent.append(torrent.sent)
            most = max(most, memory_bytes() - memory)
            self.assertLess(len(relay.out), cp.MAX_OUT_BYTES + 4 * cp.READ_BYTES)
            pass_time(0.05)
        self.assertTrue(relay.paused)
        self.assertEqual(sent[-1], sent[len(sent) // 2])
        self.assertLess(sent[-1] * 16, torrent.events // 2)
        self.assertLess(most, 20 * MIB)
        self.assert_poured(stream, torrent)


class IdleTest(LoopCase):
    def test_a_thousand_idle_connections_hold_no_threads_and_all_work(self) -> None:
        need_files(2600)
        threads = set(workers())
        with second_proxy(self) as proxy:                             # type: ignore[arg-type]
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(RawClient(proxy.port)) for _ in range(1000)]
                wait_until(lambda: len(idle(proxy)) == 1000, "all are idle")
                self.assertEqual(set(workers()) - threads, set())
                for number, client in enumerate(clients[::20]):
                    path, make = REQUESTS[number % 3]
                    reply = client.ask(post(path, make("a", stream=number % 2 == 0)))
                    self.assertEqual(reply.status, 200, reply.body)
                wait_until(lambda: len(idle(proxy)) == 1000, "all are idle again")
                self.assertLess(len(set(workers()) - threads), 25)  # half of the requests
            wait_until(lambda: not proxy.server.loop.clients, "all are gone")

    def test_an_idle_connection_is_closed_after_a_stream_and_after_a_whole_answer(self) -> None:
        with second_proxy(self, idle_client_s=0.05, keepalive_s=0.1) as proxy:  # type: ignore
            clients = [self.client(proxy), self.client(proxy)]
            for client, stream in zip(clients, (True, False)):
                client.ask(post(CHAT_PATH, chat("a", stream=stream)))
            for client in clients:
                self.assertTrue(client.is_closed())
            wait_until(lambda: not proxy.server.loop.clients, "the clients are forgotten")
            stream_ = self.open(chat("@@events=5 stall=2@@", stream=True), proxy=proxy)
            pass_time(0.15)                                  # a silent stream is not idle
            release(self.fake)
            self.assertIn(b"[DONE]", stream_.rest())

    def test_slow_heads_cost_no_thread_and_get_408(self) -> None:
        with second_proxy(self, head_timeout_s=0.3) as proxy:         # type: ignore[arg-type]
            threads = set(workers())
            clients = [self.client(proxy) for _ in range(50)]
            for client in clients:
                client.send(b"GET /health HTTP/1.1\r\nHost: local")
            wait_until(lambda: sum(bool(c.ahead) for c in idle(proxy)) == 50, "all began")
            self.assertEqual(set(workers()) - threads, set())
            for client in clients:
                self.assertEqual(client.answer().status, 408)
                client.__exit__()
            wait_until(lambda: not proxy.server.loop.clients, "the clients are forgotten")

    def test_a_head_that_is_whole_in_time_is_served(self) -> None:
        client = self.client()
        for piece in (b"GET /hea", b"lth HTTP/1.1\r\nHost: localhost\r\n", b"\r\n"):
            client.send(piece)
            wait_until(lambda: any(piece in client.ahead for client in idle(self.proxy))
                       or piece == b"\r\n", "the piece is read")
        self.assertEqual(client.answer().status, 200)

    def test_near_the_limit_of_files_new_connections_get_503_and_the_others_go_on(self) -> None:
        with second_proxy(self) as proxy:                             # type: ignore[arg-type]
            proxy.server._most_clients = 3
            stream = self.open(chat("@@events=5 stall=2@@", stream=True), proxy=proxy)
            idle, busy = self.client(proxy), self.client(proxy)
            self.assertEqual(busy.ask(get("/health")).status, 200)
            wait_until(lambda: len(proxy.server.loop.clients) == 3, "three are open")
            for request in (b"", get("/health"), post(CHAT_PATH, chat("b" * 100_000))):
                with RawClient(proxy.port) as refused:
                    with contextlib.suppress(OSError):
                        refused.send(request)
                    answer = refused.answer()
                    self.assert_openai_error(answer, 503)
                    self.assertTrue(answer.headers["retry-after"].isdigit())
                    self.assertTrue(refused.is_closed())
            self.assertEqual(said(busy.ask(post(CHAT_PATH, chat("a")))), "Echo: a")
            release(self.fake)
            self.assertIn(b"[DONE]", stream.rest())
            idle.__exit__()
            wait_until(lambda: len(proxy.server.loop.clients) == 2, "one has left")
            self.assertEqual(self.client(proxy).ask(get("/health")).status, 200)


class SilenceTest(LoopCase):
    settings = dict(keepalive_s=0.05)

    @patient
    def test_pings_do_not_hide_an_upstream_that_is_silent_for_too_long(self) -> None:
        with second_proxy(self, keepalive_s=0.03,                     # type: ignore[arg-type]
                          answer_timeout_s=0.12 * self.slower) as proxy:
            self.aborted = self.fake.aborted
            streams = [self.open(make("@@events=5 stall=2@@", stream=True), path, proxy)
                       for path, make in REQUESTS]
            for path, stream in zip(PINGS, streams):
                with self.subTest(path):
                    stream.until(PINGS[path])
                    body = stream.rest()
                    self.assert_error_end(path, body.replace(PINGS[path], b""))
                    self.assertEqual(said(stream.client.ask(post(CHAT_PATH, chat("b")))),
                                     "Echo: b")
                    stream.client.__exit__()
            self.assert_aborted(len(streams))

    @long_run
    @patient
    def test_a_trickle_is_no_silence(self) -> None:
        with second_proxy(self, keepalive_s=0.1,                      # type: ignore[arg-type]
                          answer_timeout_s=0.2 * self.slower) as proxy:
            reply = proxy.stream(CHAT_PATH, chat("@@events=7 delay_ms=%d@@" % (40 * self.slower)))
            self.assertEqual(stream_text(CHAT_PATH, reply.events), numbered(7))

    def test_each_silent_stream_among_many_gets_its_pings(self) -> None:
        streams = [self.open(make("@@events=5 stall=2@@", stream=True), path)
                   for path, make in REQUESTS * 5]
        for stream in streams:
            stream.until(PINGS[stream.path] * 2)
        release(self.fake, 15)
        for stream in streams:
            self.assertIn(ENDINGS[stream.path], stream.rest())


class DrainTest(LoopCase):
    settings = dict(keepalive_s=0.1)

    def late(self) -> Late:
        late = Late()
        self.addCleanup(late.gate.set)
        self.fake.script(CHAT, Answer(chunks=late))                  # type: ignore[arg-type]
        return late

    def test_the_client_does_not_wait_for_the_last_chunk_and_the_connection_is_kept(self) -> None:
        late, client = self.late(), self.client()
        with mock.patch.object(cp, "DRAIN_S", DEADLINE_S):
            self.assertTrue(client.ask(post(CHAT_PATH, chat("a", stream=True)))
                            .body.endswith(DONE))            # the gate is still closed
            wait_until(lambda: drained(self.proxy), "the upstream is drained")
            number = self.fake.last(CHAT).connection
            self.assertEqual(said(client.ask(post(CHAT_PATH, chat("b")))), "Echo: b")
            self.assertNotEqual(self.fake.last(CHAT).connection, number)
            client.__exit__()                                # its leaving does not matter
            self.proxy.app.upstream.pool.clear()
            late.gate.set()
            wait_until(lambda: not drained(self.proxy), "the last chunk is there")
        self.assertEqual(said(self.client().ask(post(CHAT_PATH, chat("c")))), "Echo: c")
        self.assertEqual(self.fake.last(CHAT).connection, number)

    def test_a_last_chunk_that_does_not_come_costs_the_connection_only(self) -> None:
        late, client = self.late(), self.client()
        with mock.patch.object(cp, "DRAIN_S", 0.05):
            client.ask(post(CHAT_PATH, chat("a", stream=True)))
            number = self.fake.last(CHAT).connection
            wait_until(lambda: not drained(self.proxy), "it is given up")
        late.gate.set()
        self.assertEqual(said(client.ask(post(CHAT_PATH, chat("b")))), "Echo: b")
        self.assertNotEqual(self.fake.last(CHAT).connection, number)
        self.assertEqual(self.faults(), [])

    def test_rubbish_instead_of_the_last_chunk_costs_the_connection_only(self) -> None:
        rubbish = b"%x\r\n%s\r\nrubbish\r\n" % (len(STOP + DONE), STOP + DONE)
        self.fake.script(CHAT, Answer(
            headers={"content-type": "text/event-stream", "transfer-encoding": "chunked",
                     "content-length": "0"}, body=rubbish))
        reply = self.proxy.stream(CHAT_PATH, chat("a"))
        if reply.status == 200:                              # two lengths may also be refused
            self.assertTrue(reply.is_done or b"error" in reply.body)
        number = next(r.connection for r in self.fake.requests if r.path == CHAT)
        self.proxy.post(CHAT_PATH, chat("b"))                # the stream may have been tried again
        self.assertNotEqual(self.fake.last(CHAT).connection, number)
        self.assertEqual(self.faults(), [])


class FaultTest(LoopCase):
    """Whatever goes wrong with one stream or one connection, the others notice nothing."""

    settings = dict(keepalive_s=0.2, head_timeout_s=0.2)

    def others(self) -> list[OpenStream]:
        return [self.open(make("@@events=5 stall=2@@", stream=True), path)
                for path, make in REQUESTS]

    def assert_finish(self, others: list[OpenStream]) -> None:
        release(self.fake, len(others))
        for stream in others:
            self.assertIn(ENDINGS[stream.path], stream.rest())
            self.assertEqual(said(stream.client.ask(post(CHAT_PATH, chat("b")))), "Echo: b")
        self.assert_healthy()

    def test_a_fault_in_a_pipeline_ends_its_stream_with_an_error(self) -> None:
        for path, make in REQUESTS:
            with self.subTest(path):
                self.aborted = self.fake.aborted
                others = self.others()
                broken = self.open(make("@@events=20000 delay_ms=1@@", stream=True), path)
                self.relay_of(broken).pipeline.feed = boom
                self.assert_error_end(path, broken.rest())
                self.assertIn(b"error in the proxy itself", broken.got)
                self.assertNotIn(b"put in by a test", broken.got)
                self.assert_aborted()
                self.assert_finish(others)

    def test_a_fault_in_closing_a_pipeline_closes_the_client_and_the_upstream(self) -> None:
        others = self.others()
        broken = self.open(chat("@@events=20000 delay_ms=1@@", stream=True))
        pipeline = self.relay_of(broken).pipeline
        pipeline.close = boom
        pipeline.feed = boom
        with contextlib.suppress(Exception):                 # an incomplete chunked body
            broken.rest()
        self.assertNotIn(b"[DONE]", broken.got)
        self.assert_aborted()
        self.assert_finish(others)

    def test_a_fault_at_a_regular_end_closes_the_client(self) -> None:
        others = self.others()
        broken = self.open(chat("@@events=20 delay_ms=5@@", stream=True))
        self.relay_of(broken).pipeline.close = boom
        with contextlib.suppress(Exception):
            broken.rest()
        self.assert_finish(others)

    @long_run
    def test_a_fault_in_framing_an_event_or_a_ping_hurts_its_stream_only(self) -> None:
        for body in (chat("@@events=20000 delay_ms=1@@", stream=True),
                     chat("@@events=5 stall=2@@", stream=True)):
            self.aborted = self.fake.aborted
            broken = self.open(body)
            self.relay_of(broken).exchange.frame = boom
            with contextlib.suppress(Exception):
                broken.rest()
            self.assert_aborted()
            broken.client.__exit__()
            self.assert_finish(self.others())

    def test_a_fault_in_logging_a_stream_leaves_no_connection_behind(self) -> None:
        stream = self.open(chat("@@events=5 stall=2@@", stream=True))
        self.relay_of(stream).exchange.record.row = boom
        release(self.fake)
        self.assertIn(b"[DONE]", stream.rest())
        stream.client.sock.settimeout(2.0)
        with contextlib.suppress(ConnectionError, ValueError):       # closed would be right too
            try:
                stream.client.ask(get("/health"))
            except socket.timeout:
                self.fail("the connection is neither served nor closed")
            except cp.http.client.HTTPException:
                pass
        self.assert_healthy()

    def test_faults_in_every_method_of_a_stream_at_once_do_not_end_the_loop(self) -> None:
        others = self.others()
        broken = self.open(chat("@@events=20000 delay_ms=1@@", stream=True))
        relay = self.relay_of(broken)
        relay.exchange.record.row = boom
        relay.exchange.frame = relay.exchange.frame_end = boom
        relay.pipeline.close = relay.pipeline.feed = boom
        with contextlib.suppress(Exception):
            broken.rest()
        self.assert_finish(others)

    def assert_not_forgotten(self, client: RawClient) -> None:
        """It is refused or closed."""
        client.sock.settimeout(2.0)
        try:
            client.reader.read()
        except socket.timeout:
            self.fail("the connection is forgotten")
        except OSError:
            pass

    def test_a_fault_before_a_request_is_served_closes_its_connection(self) -> None:
        others, client = self.others(), self.client()
        wait_until(lambda: len(idle(self.proxy)) == 1, "it is idle")
        with mock.patch.object(self.proxy.server, "_answer", boom):
            client.send(get("/health"))
            self.assert_not_forgotten(client)
        self.assert_finish(others)

    @long_run
    def test_a_fault_in_refusing_a_slow_head_closes_its_connection(self) -> None:
        others, client = self.others(), self.client()
        with mock.patch.object(self.proxy.server, "_answer", boom):
            client.send(b"GET /health HTTP/1.1\r\n")
            self.assert_not_forgotten(client)
        self.assert_finish(others)

    def test_a_fault_in_reading_a_parked_connection_closes_it(self) -> None:
        others, client = self.others(), self.client()
        parked = wait_until(lambda: idle(self.proxy), "it is idle")[0]
        parked.fill = boom
        client.send(get("/health"))
        self.assert_not_forgotten(client)
        self.assert_finish(others)
        self.assertLess(len(self.faults()), 10)              # and the loop does not turn for it

    def test_a_fault_in_giving_a_connection_back_does_not_end_the_loop(self) -> None:
        late, others = Late(), self.others()
        self.addCleanup(late.gate.set)
        self.fake.script(CHAT, Answer(chunks=late))                  # type: ignore[arg-type]
        loop = self.proxy.server.loop

        def close_and_fail(answer: Any) -> None:
            answer.close()
            boom()

        with mock.patch.object(cp, "DRAIN_S", 0.05), \
                mock.patch.object(cp.UpstreamResponse, "finish", close_and_fail):
            client = self.client()
            self.assertIn(b"[DONE]", client.ask(post(CHAT_PATH, chat("a", stream=True))).body)
            wait_until(lambda: not drained(self.proxy) or not loop._thread.is_alive(),
                       "it is over")
        late.gate.set()
        self.assert_finish(others)


class FinishTest(LoopCase):
    """Each test ends a proxy of its own; files that it leaves open show in `settled`."""

    def finish(self, proxy: Proxy, grace_s: float) -> threading.Thread:
        thread = threading.Thread(target=proxy.server.finish, args=(grace_s,))
        thread.start()
        self.addCleanup(thread.join, 5)
        return thread

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_everything_at_once(self) -> None:
        with second_proxy(self, keepalive_s=0.1) as proxy:            # type: ignore[arg-type]
            idle = [self.client(proxy) for _ in range(20)]
            for client in idle[:10]:
                self.assertEqual(client.ask(get("/health")).status, 200)
            half = self.client(proxy)
            half.send(b"GET /health HTTP/1.1\r\n")
            ending = self.open(chat("@@events=4 stall=2@@", stream=True), proxy=proxy)
            flowing = [self.open(make("@@events=20000 delay_ms=1@@", stream=True), path, proxy)
                       for path, make in REQUESTS]
            self.fake.script(CHAT, Answer(status=0, hold=True))
            whole = self.client(proxy)
            whole.send(post(CHAT_PATH, chat("a")))
            wait_until(lambda: self.fake.holding == 2, "one waits for its head")
            self.fake.script(CHAT, Answer(status=0, hold=True))
            head = OpenStream(self.client(proxy), CHAT_PATH, chat("a", stream=True))
            head.until(PINGS[CHAT_PATH])
            paused, _ = self.pour(proxy=proxy)
            began = time.monotonic()
            thread = self.finish(proxy, 2.0)
            for client in idle + [half]:
                self.assertTrue(client.is_closed())          # at once, not after the grace
            self.assertLess(time.monotonic() - began, 2.0)
            for stream in flowing + [ending, head]:
                with self.subTest(stream.path):
                    body = stream.rest()
                    self.assertNotIn(ENDINGS[stream.path], body)
                    self.assertIn(b"shutting down", body)
            self.assertEqual(whole.answer().status, 503)
            thread.join(DEADLINE_S)
            self.assertFalse(thread.is_alive())
            with contextlib.suppress(Exception):             # its upstream has more than it took
                self.assertNotIn(b"[DONE]", paused.rest())
            self.assertFalse(proxy.server.loop._thread.is_alive())
            wait_until(lambda: not proxy.server.loop.clients, "no client is left")
            wait_until(lambda: not proxy.server.running(), "no exchange is left")

    @patient
    def test_without_work_it_is_over_at_once(self) -> None:
        with second_proxy(self) as proxy:                             # type: ignore[arg-type]
            self.assertEqual(proxy.get("/v1/models").status, 200)
            clients = [self.client(proxy) for _ in range(50)]
            began = time.monotonic()
            proxy.server.finish(60.0)
            self.assertLess(time.monotonic() - began, 1.0)
            proxy.server.finish(60.0)                        # a second one has nothing to do
            self.assertLess(time.monotonic() - began, 1.0)
            for client in clients:
                self.assertTrue(client.is_closed())

    def test_one_faulty_stream_does_not_keep_the_others_from_their_error(self) -> None:
        with second_proxy(self) as proxy:                             # type: ignore[arg-type]
            streams = [self.open(make("@@events=4 stall=2@@", stream=True), path, proxy)
                       for path, make in REQUESTS]
            self.relay_of(streams[0], proxy).pipeline.close = boom
            thread = self.finish(proxy, 0.05)
            for stream in streams[1:]:
                with self.subTest(stream.path):
                    try:
                        self.assertIn(b"shutting down", stream.rest())
                    except Exception as error:
                        self.fail("the stream got no error: %r" % error)
            thread.join(DEADLINE_S)

    def test_an_upstream_that_is_drained_is_closed_too(self) -> None:
        late = Late()
        self.addCleanup(late.gate.set)
        self.fake.script(CHAT, Answer(chunks=late))                  # type: ignore[arg-type]
        with mock.patch.object(cp, "DRAIN_S", DEADLINE_S):
            with second_proxy(self) as proxy:                         # type: ignore[arg-type]
                self.client(proxy).ask(post(CHAT_PATH, chat("a", stream=True)))
                connection = wait_until(lambda: drained(proxy), "it is drained")[0].connection
                proxy.server.finish(0.1)
                self.assertIsNone(connection.sock, "it is still open")

    @patient
    def test_a_stream_that_ends_in_the_grace_ends_the_waiting(self) -> None:
        with second_proxy(self) as proxy:                             # type: ignore[arg-type]
            stream = self.open(response("@@events=4 stall=2@@", stream=True), "/v1/responses",
                               proxy)
            began = time.monotonic()
            thread = self.finish(proxy, 60.0)
            wait_until(proxy.app.stop.is_set, "the shutdown has begun")
            release(self.fake)
            self.assertIn(ENDINGS["/v1/responses"], stream.rest())
            thread.join(DEADLINE_S)
            self.assertLess(time.monotonic() - began, 3.0)
            self.assertTrue(stream.client.is_closed())


class WaitingTest(LoopCase):
    """Whatever a request waits for, others are served meanwhile."""

    def test_a_token_that_is_being_fetched_keeps_nobody_waiting(self) -> None:
        with RawClient(self.proxy.port) as first:
            self.fake.script(EXCHANGE, Answer(0, hold=True))
            self.proxy.app.login.account.token.value = None
            first.send(post(CHAT_PATH, chat("waits")))
            wait_until(lambda: self.fake.holding == 1, "the token is being fetched")
            self.assertEqual(200, self.proxy.get("/stats").status)
            self.fake.release()
            self.assertEqual(200, first.answer().status)

    def test_no_request_that_waits_keeps_others_waiting(self) -> None:
        """For half a body, for the upstream's head, for a reader: others are served meanwhile."""
        with RawClient(self.proxy.port) as half, RawClient(self.proxy.port) as waiting:
            half.send(b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
                      b"\r\nContent-Length: 10\r\n\r\n{" % CHAT_PATH.encode())
            self.fake.script(CHAT, Answer(status=0, hold=True))
            waiting.send(post(CHAT_PATH, chat("waits")))
            wait_until(lambda: self.fake.holding == 1, "the request is upstream")
            self.assertEqual(200, self.proxy.get("/v1/models").status)
            self.fake.release()
            self.assertEqual(200, waiting.answer().status)


class WorkersTest(unittest.TestCase):
    def make(self, idle_s: float) -> Any:
        patch = mock.patch.object(cp, "WORKER_IDLE_S", idle_s)
        patch.start()
        self.addCleanup(patch.stop)
        return cp.Workers()

    def test_a_thread_is_used_again_and_ends_after_being_idle(self) -> None:
        seen: list[threading.Thread] = []
        pool = self.make(0.08)
        for number in range(1, 11):
            pool.put(lambda: seen.append(threading.current_thread()))
            wait_until(lambda: len(seen) == number, "the work is done")
            wait_until(lambda: pool._free == 1, "the thread is idle")
        self.assertEqual(len(set(seen)), 1)
        wait_until(lambda: not seen[0].is_alive(), "the thread has ended")
        wait_until(lambda: (pool._free, pool._count) == (0, 0), "it is not counted any more")
        pool.put(lambda: seen.append(threading.current_thread()))
        wait_until(lambda: len(seen) == 11, "a new one works")
        wait_until(lambda: not seen[-1].is_alive(), "it has ended as well")

    def test_all_work_at_one_time_and_no_more_threads_than_allowed(self) -> None:
        barrier = threading.Barrier(cp.MAX_WORKERS)
        done: list[threading.Thread] = []

        def work() -> None:
            barrier.wait(DEADLINE_S)
            done.append(threading.current_thread())

        pool = self.make(0.05)
        for _ in range(5 * cp.MAX_WORKERS):
            self.assertTrue(pool.put(work))
        wait_until(lambda: len(done) == 5 * cp.MAX_WORKERS, "all is done")
        self.assertLessEqual(len(set(done)), cp.MAX_WORKERS)
        wait_until(lambda: pool._count == 0, "all have ended")

    def test_more_than_can_wait_is_refused(self) -> None:
        go, done = threading.Event(), []
        pool = self.make(0.05)
        with mock.patch.object(cp, "WORKER_QUEUE", 10):
            for _ in range(cp.MAX_WORKERS):
                pool.put(lambda: go.wait(DEADLINE_S))
            wait_until(lambda: pool._queue.empty(), "all threads are busy")
            taken = [pool.put(lambda: done.append(1)) for _ in range(15)]
        self.assertEqual(taken, [True] * 10 + [False] * 5)
        go.set()
        wait_until(lambda: len(done) == 10, "what was taken is done")

    def test_a_thread_that_cannot_be_started_is_no_end(self) -> None:
        done: list[int] = []
        pool = self.make(0.05)
        with mock.patch.object(threading.Thread, "start", boom):
            self.assertFalse(pool.put(lambda: done.append(1)))
        self.assertTrue(pool.put(lambda: done.append(2)))
        wait_until(lambda: 2 in done, "the next one is done")

    def test_nothing_is_lost_or_done_twice_where_threads_end(self) -> None:
        done: list[int] = []
        pool = self.make(0.0005)
        for number in range(150):
            pool.put(lambda number=number: done.append(number))
            if number % 7 == 0:
                wait_until(lambda: len(done) == number + 1, "number %d is done" % number)
        wait_until(lambda: len(done) == 150, "all is done")
        self.assertEqual(sorted(done), list(range(150)))

    def test_requests_in_turn_use_few_threads(self) -> None:
        with cp_fake() as fake, Proxy(fake) as proxy:
            before = set(workers())
            for number in range(30):
                path, make = REQUESTS[number % 3]
                self.assertEqual(proxy.post(path, make("a", stream=number % 2 == 0)).status, 200)
            self.assertLess(len(set(workers()) - before), 15)    # half of the requests


def cp_fake() -> Any:
    from fake_upstream import FakeUpstream
    return FakeUpstream()


class TlsFront(Accepting):
    """TLS before a plain server; what that says goes out in records of at most `record` bytes."""

    def __init__(self, port: int, certificate: str, record: int) -> None:
        self._target, self._record = port, record
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)
        super().__init__()
        self._pumps: list[threading.Thread] = []
        self.url = "https://127.0.0.1:%d" % self.port
        self.connections = self.open = 0

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for pump in self._pumps:
            pump.join(5)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                raw = self._socket.accept()[0]
                self.connections += 1
                self._pumps.append(threading.Thread(target=self._pump, args=(raw,), daemon=True))
                self._pumps[-1].start()

    def _pump(self, raw: socket.socket) -> None:
        self.open += 1
        with contextlib.suppress(OSError), raw:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._context.wrap_socket(raw, server_side=True) as tls, \
                    socket.create_connection(("127.0.0.1", self._target)) as plain, \
                    selectors.DefaultSelector() as selector:
                selector.register(tls, selectors.EVENT_READ)
                selector.register(plain, selectors.EVENT_READ)
                while self._carry(tls, plain, selector):
                    pass
        self.open -= 1

    def _carry(self, tls: Any, plain: socket.socket, selector: Any) -> bool:
        """One turn; False when one side has ended."""
        ready = [key.fileobj for key, _ in selector.select(DEADLINE_S)]
        if tls in ready:
            data = tls.recv(65536)                   # longer than any record: nothing is pending
            if not data:
                return False
            plain.sendall(data)
        if plain in ready:
            data = plain.recv(16 * 65536)
            for at in range(0, len(data), self._record):
                tls.sendall(data[at:at + self._record])
            return bool(data)
        return True


@unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
class TlsTest(LoopCase):
    _folder: Any
    certificate: str

    @classmethod
    def setUpClass(cls) -> None:
        cls._folder = tempfile.mkdtemp()
        cls.certificate = os.path.join(cls._folder, "both.pem")
        try:
            cls.make_certificate()
        except (OSError, subprocess.SubprocessError) as error:
            shutil.rmtree(cls._folder)
            raise unittest.SkipTest("openssl makes no certificate here: %s" % error)
        super().setUpClass()

    @classmethod
    def tearDownClass(cls) -> None:
        super().tearDownClass()
        shutil.rmtree(cls._folder)

    @classmethod
    def make_certificate(cls) -> None:
        """Self-signed for 127.0.0.1, together with its key."""
        config = os.path.join(cls._folder, "config")
        with open(config, "w") as file:
            file.write("[req]\ndistinguished_name=name\nx509_extensions=more\nprompt=no\n"
                       "[name]\nCN=127.0.0.1\n[more]\nsubjectAltName=IP:127.0.0.1\n"
                       "basicConstraints=critical,CA:TRUE\nsubjectKeyIdentifier=hash\n")
        key = os.path.join(cls._folder, "key.pem")
        cert = os.path.join(cls._folder, "cert.pem")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                        "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                        "-config", config, "-keyout", key, "-out", cert], check=True, timeout=30,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with open(cls.certificate, "w") as both:
            for name in (key, cert):
                with open(name) as file:
                    both.write(file.read())

    @contextlib.contextmanager
    def secure(self, record: int, **settings: Any) -> Iterator[tuple[Proxy, TlsFront]]:
        """A proxy that reaches the fake through TLS only."""
        port = int(self.fake.url.rpartition(":")[2])
        with TlsFront(port, self.certificate, record) as front:
            with second_proxy(self, copilot_url=front.url,            # type: ignore[arg-type]
                              ca_file=self.certificate, **settings) as proxy:
                yield proxy, front

    def test_records_of_any_size_make_the_same_stream(self) -> None:
        for record in (5, 1000000):
            with self.secure(record) as (proxy, _):
                for path, make in REQUESTS:
                    with self.subTest(record=record, path=path):
                        count = 2 if record == 5 else 60
                        reply = proxy.stream(path, make("@@events=%d size=90@@" % count))
                        self.assertEqual(stream_text(path, reply.events), numbered(count, 90))
                        self.assertIn(ENDINGS[path], reply.body)

    def test_what_tls_has_read_already_does_not_wait_for_the_next_record(self) -> None:
        """No selector tells of bytes that are decrypted but not taken."""
        with mock.patch.object(cp, "READ_BYTES", 700):
            with self.secure(16384) as (proxy, _):
                self.fake.script(CHAT, Answer(chunks=[b"".join(
                    EVENT % (number, b"y" * 80) for number in range(60)) + STOP]
                    + [DONE]))
                reply = proxy.stream(CHAT_PATH, chat("a"))
                self.assertTrue(reply.is_done)
                for path, make in REQUESTS:
                    stream = self.open(make("@@events=3 size=9000 stall=2@@", stream=True), path,
                                       proxy)
                    stream.client.sock.settimeout(2.0)
                    try:
                        stream.until(b"1 ....")
                        stream.until(b'."')
                    except OSError:
                        self.fail("the event stays inside TLS")
                    release(self.fake)
                    self.assertIn(ENDINGS[path], stream.rest())
                    stream.client.__exit__()

    def test_a_large_stream_with_small_reads_arrives_whole(self) -> None:
        with mock.patch.object(cp, "READ_BYTES", 1500):
            with self.secure(16384) as (proxy, _):
                reply = proxy.stream(CHAT_PATH, chat("@@events=500 size=900@@"))
                self.assertEqual(stream_text(CHAT_PATH, reply.events), numbered(500, 900))

    def test_leaving_ends_the_upstream_call(self) -> None:
        with self.secure(16384) as (proxy, front):
            for body in (chat("@@events=5 stall=2@@", stream=True),
                         chat("@@events=20000 delay_ms=1@@", stream=True)):
                for leave in MANNERS[:2]:
                    with self.subTest(leave.__name__):
                        self.aborted = self.fake.aborted
                        stream = self.open(body, proxy=proxy)
                        leave(stream.client)
                        self.assert_aborted()
            self.fake.script(CHAT, Answer(status=0, hold=True))
            self.aborted = self.fake.aborted
            client = self.client(proxy)
            client.send(post(CHAT_PATH, chat("a")))
            wait_until(lambda: self.fake.holding == 1, "the upstream has the request")
            client.__exit__()
            self.assert_aborted()
            wait_until(lambda: not proxy.server.loop.clients, "the clients are forgotten")

    def test_a_connection_is_used_again(self) -> None:
        with self.secure(16384) as (proxy, front):
            client = self.client(proxy)
            self.assertEqual(said(client.ask(post(CHAT_PATH, chat("a")))), "Echo: a")
            for number in range(30):
                path, make = REQUESTS[number % 3]
                reply = client.ask(post(path, make("a", stream=number % 2 == 0)))
                self.assertEqual(reply.status, 200, reply.body)
            self.assertLessEqual(front.connections, 3)
            client.__exit__()

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_a_reader_that_stops_loses_nothing(self) -> None:
        with self.secure(1000000) as (proxy, _):
            stream, torrent = self.pour(5120, proxy)
            relay = self.relay_of(stream, proxy)
            stand_still(lambda: torrent.sent, "the upstream can send no more")
            self.assertLess(len(relay.out), cp.MAX_OUT_BYTES + 4 * cp.READ_BYTES)
            self.assert_poured(stream, torrent)
            stream.client.__exit__()

    def test_a_cut_and_a_late_last_chunk(self) -> None:
        with self.secure(16384, keepalive_s=0.1) as (proxy, front):
            for more in ("", " rst=1"):
                reply = proxy.stream("/v1/messages", message("@@events=5 cut=3%s@@" % more))
                self.assert_error_end("/v1/messages", reply.body)
            late = Late()
            self.addCleanup(late.gate.set)
            self.fake.script(CHAT, Answer(chunks=late))              # type: ignore[arg-type]
            with mock.patch.object(cp, "DRAIN_S", DEADLINE_S):
                self.assertTrue(proxy.stream(CHAT_PATH, chat("a")).is_done)
                number = self.fake.last(CHAT).connection
                late.gate.set()
                wait_until(lambda: not drained(proxy), "the last chunk is there")
            self.assertEqual(said(proxy.post(CHAT_PATH, chat("b"))), "Echo: b")
            self.assertEqual(self.fake.last(CHAT).connection, number)


if __name__ == "__main__":
    unittest.main()
