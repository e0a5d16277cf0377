"""Bases of test cases that several files share, and the doubles that they need."""
from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import os
import re
import socket
import socketserver
import ssl
import tempfile
import threading
import types
import unittest
from typing import Any, Dict, List, Optional
from unittest import mock

from support import (DEADLINE_S, Command, EnterCase, Proxy, ProxyCase, RawClient, Reply, TestClock,
                     Typed, chat, cp, post, run_main, wait_until)
from fake_upstream import FakeUpstream


class SharedCase(EnterCase):
    """One fake and one proxy for all tests of a class; `settings` are fields of Settings."""

    settings: dict[str, Any] = {}
    fake: FakeUpstream
    proxy: Proxy
    _stack: contextlib.ExitStack

    @classmethod
    def setUpClass(cls) -> None:
        cls._stack = contextlib.ExitStack()
        cls.fake = cls._stack.enter_context(FakeUpstream())
        cls.proxy = cls._stack.enter_context(Proxy(cls.fake, **cls.settings))

    @classmethod
    def tearDownClass(cls) -> None:
        cls._stack.close()

    def tearDown(self) -> None:
        self.assertEqual(self.fake.crashes, [])

    def client(self, proxy: Proxy | None = None) -> RawClient:
        client: RawClient = self.enter(RawClient((proxy or self.proxy).port))
        return client

    def new_sent(self) -> Any:
        """-> a function that gives the upstream requests of this test so far."""
        before = len(self.fake.requests)
        return lambda: self.fake.requests[before:]

    def assert_openai_error(self, reply: Any, status: int, code: str | None = None) -> None:
        self.assertEqual(reply.status, status, reply.body)
        self.assertEqual(set(reply.json), {"error"})
        self.assertEqual(set(reply.json["error"]), {"message", "type", "param", "code"})
        self.assertTrue(reply.json["error"]["message"])
        if code is not None:
            self.assertEqual(reply.json["error"]["code"], code)

    def assert_anthropic_error(self, reply: Any, status: int, kind: str) -> None:
        self.assertEqual(reply.status, status, reply.body)
        self.assertEqual(reply.json["type"], "error")
        self.assertEqual(reply.json["error"]["type"], kind)
        self.assertTrue(reply.json["error"]["message"])
        self.assertEqual(reply.json["request_id"], reply.headers["x-request-id"])


class FolderCase(unittest.TestCase):
    """A temporary folder."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.home = folder.name

    def path(self, *parts: str) -> str:
        return os.path.join(self.home, *parts)

    def put(self, data: Any, *parts: str) -> str:
        """Write a file (JSON unless bytes) below the folder; its path."""
        path = self.path(*parts)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data if isinstance(data, bytes) else json.dumps(data).encode())
        return path


class SetupCase(SharedCase):
    """`setup` with one server for the class and an empty home for each test."""

    def setUp(self) -> None:
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.home = os.path.realpath(folder.name)

    def at(self, name: str) -> str:
        """'.codex/config.toml' -> its path in the home."""
        return os.path.join(self.home, *name.split("/"))

    def run_setup(self, *args: str, **env: str) -> tuple[int, str]:
        return run_main(self.home, "setup", *args, **{"PORT": str(self.proxy.port), **env})

    def setup(self, *args: str, **env: str) -> str:
        code, output = self.run_setup(*args, **env)
        self.assertEqual(code, 0, output)
        return output

    def file_of(self, client: str, at: int = 0) -> str:
        place = cp.CLIENTS[client].files[at][0]
        name = place.rpartition(":")[2].replace("//", "/")
        return self.at(name.partition("/")[2])

    def read(self, path: str) -> str:
        with open(path, encoding="utf-8") as file:
            return file.read()

    def put(self, path: str, text: str) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


class CliCase(EnterCase):
    """An empty home and a fake upstream."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.home = folder.name
        self.fake = FakeUpstream().start()
        self.addCleanup(self.fake.close)

    def start(self, *args: str, token: str = "ghu_fake", **env: str) -> Command:
        """A server on the fake, ended with the test."""
        command = Command("start", "--port", "0", "--github-url", self.fake.url,
                          *(("--github-token", token) if token else ()), *args,
                          home=self.home, **env)
        return self.enter(command)  # type: ignore[no-any-return]

    def stalled(self, url: str) -> None:
        """A stream that runs until the fake is released; its client closes with the test."""
        stream = self.enter(RawClient(int(url.split(":")[-1])))
        stream.send(post("/v1/chat/completions", chat("@@stall=1 events=3@@", stream=True)))
        self.assertTrue(self.fake.wait_for(lambda: self.fake.holding))

    def run_here(self, *args: str, **env: str) -> tuple[int, str]:
        """A command in this process, logged in to the fake."""
        return run_main(self.home, args[0], "--github-url", self.fake.url, "--github-token",
                        "ghu_fake", *args[1:], **env)


def offer_claude_code(proxy: Proxy, typed: str) -> str:
    """What `start --claude-code` prints when a person answers its questions so."""
    printed = io.StringIO()
    with mock.patch.object(cp.sys, "stdin", Typed(typed)), \
            mock.patch.object(cp.sys, "stdout", printed), \
            mock.patch.dict(os.environ, {"PATH": "", "SHELL": "/bin/bash"}):
        cp.offer_claude_code(proxy.app, proxy.url)
    return printed.getvalue()


class GitHubCase(unittest.TestCase):
    """A fake GitHub, and what asks it."""

    def setUp(self) -> None:
        self.fake = FakeUpstream().start()
        self.addCleanup(self.fake.close)
        settings = cp.Settings(github_url=self.fake.url).check()
        self.upstream = cp.Upstream(settings, {})
        self.addCleanup(self.upstream.pool.clear)
        self.github = cp.GitHub(settings, self.upstream)


class ManualCase(ProxyCase):
    """Each request is to be allowed, and nobody sits at a terminal."""

    settings = dict(manual=True)

    def setUp(self) -> None:
        self.enter(mock.patch("sys.stdin", None))
        super().setUp()

    def begin(self, text: str, agent: str) -> tuple[threading.Thread, list[Reply]]:
        """A request in a thread -> (the thread, its answer once it has come)."""
        replies: list[Reply] = []
        thread = threading.Thread(target=lambda: replies.append(self.proxy.post(
            "/v1/chat/completions", chat(text), **{"User-Agent": agent})))
        thread.start()
        self.addCleanup(thread.join, 10)
        return thread, replies


class TurningCase(unittest.TestCase):
    """A loop that does not run, and a clock, `now`, that the test moves."""

    def setUp(self) -> None:
        self.now = 100.0
        clock = types.SimpleNamespace(monotonic=lambda: self.now)
        patched = mock.patch.object(cp, "time", clock)
        patched.start()
        self.addCleanup(patched.stop)
        self.loop = cp.EventLoop(cp.Settings(), logging.getLogger("copilot_proxy"))
        self.addCleanup(self.loop.close)
        self.addCleanup(self.loop._stop)


class ClockCase(ProxyCase):
    """A proxy whose clock the test moves."""

    def setUp(self) -> None:
        self.clock = TestClock()
        self.fake = self.enter(FakeUpstream())
        self.proxy = self.enter(Proxy(self.fake, clock=self.clock, **self.settings))

    def ask(self) -> Reply:
        return self.proxy.post("/v1/chat/completions", chat("hi"))

    def warm_up(self) -> None:
        """The first token and catalogue are there."""
        self.assertEqual(self.ask().status, 200)
        self.assertEqual(self.fake.exchanges, 1)

    @property
    def account(self) -> cp.Copilot:
        account = self.proxy.app.login.account
        assert account is not None
        return account


PINGS = {"/v1/chat/completions": b": keepalive\n\n", "/v1/responses": b": keepalive\n\n",
         "/v1/messages": b'event: ping\ndata: {"type":"ping"}\n\n'}
ENDINGS = {"/v1/chat/completions": b"[DONE]", "/v1/responses": b"response.completed",
           "/v1/messages": b"message_stop"}
DELTAS = {"/v1/chat/completions": b'"content":"', "/v1/responses": b"output_text.delta",
          "/v1/messages": b"text_delta"}


def stream_text(path: str, events: list[Any]) -> str:
    """What a client of the dialect reads out of a stream."""
    if path == "/v1/chat/completions":
        return "".join(choice["delta"].get("content") or ""
                       for event in events for choice in event.get("choices", []))
    if path == "/v1/responses":
        return "".join(event["delta"] for event in events
                       if event["type"] == "response.output_text.delta")
    return "".join(event["delta"].get("text", "") for event in events
                   if event["type"] == "content_block_delta")


def body_text(path: str, answer: Any) -> str:
    """The same of a whole answer."""
    if path == "/v1/chat/completions":
        return str(answer["choices"][0]["message"]["content"])
    if path == "/v1/responses":
        return "".join(part["text"] for item in answer["output"] if item["type"] == "message"
                       for part in item["content"])
    return "".join(block.get("text", "") for block in answer["content"])


def numbered(count: int, size: int = 12) -> str:
    """What the fake says for @@events=count@@."""
    return "".join(("%d " % number).ljust(size, ".")[:size] for number in range(count))


class OpenStream:
    """A streamed answer that is read bit by bit: `until(text)` reads until it has come."""

    def __init__(self, client: RawClient, path: str, body: Any, *fields: str) -> None:
        self.path, self.client = path, client
        client.send(post(path, body, *fields))
        self.got = b""
        self._answer: Any = None

    def head(self) -> int:
        if self._answer is None:
            self._answer = self.client.begin("POST")
        return int(self._answer.status)

    def until(self, text: bytes) -> bytes:
        self.head()
        while text not in self.got:
            data = self._answer.read1(65536)
            if not data:
                raise AssertionError("the stream ended without %r: %r" % (text, self.got))
            self.got += data
        return self.got

    def rest(self) -> bytes:
        self.head()
        self.got += self._answer.read()
        return self.got


class RelayCase(SharedCase):
    """Streams on a shared fake; each test leaves nothing running."""

    def setUp(self) -> None:
        self.addCleanup(self.settle)

    def settle(self) -> None:
        self.fake.release()
        self.assertTrue(self.fake.wait_for(lambda: self.fake.open_streams == 0, 5))

    def assert_error_end(self, path: str, body: bytes) -> None:
        """The body ends with the dialect's error event and not politely."""
        decoder = cp.SSEDecoder()
        frames = decoder.feed(body) + decoder.close()
        self.assertNotIn(ENDINGS[path], body)
        self.assertNotIn(b"[DONE]", body)
        last = json.loads(frames[-1].data)
        if path == "/v1/chat/completions":
            self.assertEqual(set(last), {"error"})
            self.assertTrue(last["error"]["message"])
            for frame in frames[:-1]:
                for choice in json.loads(frame.data)["choices"]:
                    self.assertIsNone(choice["finish_reason"])
        elif path == "/v1/responses":
            self.assertEqual((frames[-1].event, last["type"]), ("response.failed",) * 2)
            self.assertEqual(last["response"]["status"], "failed")
            self.assertTrue(last["response"]["error"]["message"])
            numbers = [json.loads(frame.data)["sequence_number"] for frame in frames]
            self.assertEqual(numbers, sorted(set(numbers)))
        else:
            self.assertEqual((frames[-1].event, last["type"]), ("error", "error"))
            self.assertTrue(last["error"]["message"])


class Serving:
    """Base of a socketserver that serves in a thread of its own, inside `with`."""

    def __enter__(self: Any) -> Any:
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self: Any, *exc: Any) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join(DEADLINE_S)


class Accepting:
    """Base of a server in one thread, `_accept`, which ends when `_socket` is closed."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Any:
        self._thread.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(DEADLINE_S)

    def _accept(self) -> None:
        raise NotImplementedError


class MappingProxy(Serving, socketserver.ThreadingTCPServer):
    """A company proxy that lets through what it knows: every made-up host is one real server.

    `login` "user:password" is asked for with 407; `certificate` makes it end TLS itself, as
    inspecting proxies do. `seen` lists ("CONNECT" or method, target).
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, upstream: str, login: str = "", certificate: str = "",
                 garbage: bytes = b"") -> None:
        super().__init__(("127.0.0.1", 0), _ProxyHandler)
        host, port = upstream.split("//")[1].split(":")
        self.upstream, self.garbage = (host, int(port)), garbage
        self.wanted = "Basic " + base64.b64encode(login.encode()).decode() if login else ""
        self.seen: list[tuple[str, str]] = []
        self.refused = 0
        self.context: ssl.SSLContext | None = None
        if certificate:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(certificate)

    def url(self, login: str = "") -> str:
        return "http://%s127.0.0.1:%d" % (login and login + "@", self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no event."""


class _ProxyHandler(socketserver.BaseRequestHandler):
    server: MappingProxy

    def handle(self) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            part = self.request.recv(65536)
            if not part:
                return
            head += part
        method, target, _ = head.split(b"\r\n")[0].decode("latin-1").split(" ")
        if self.server.garbage:
            self.request.sendall(self.server.garbage)
            return
        login = re.search(rb"(?i)\r\nproxy-authorization: ([^\r]*)", head)
        if self.server.wanted and (login is None or login.group(1).decode() != self.server.wanted):
            self.server.refused += 1
            self.request.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n"
                                 b"Proxy-Authenticate: Basic realm=\"company\"\r\n"
                                 b"Content-Length: 0\r\nConnection: close\r\n\r\n")
            return
        self.server.seen.append((method, target))
        client = self.request
        with socket.create_connection(self.server.upstream) as upstream:
            if method == "CONNECT":
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                if self.server.context is not None:
                    client = self.server.context.wrap_socket(client, server_side=True)
            else:
                path = re.sub(r"\Ahttp://[^/]*", "", target)
                rest = re.sub(rb"(?i)\r\nproxy-authorization: [^\r]*", b"\r\nConnection: close",
                              head.partition(b"\r\n")[2].join([b"\r\n", b""]))
                upstream.sendall(("%s %s HTTP/1.1" % (method, path)).encode() + rest)
            back = threading.Thread(target=pump, args=(upstream, client), daemon=True)
            back.start()
            pump(client, upstream)
            back.join(5)
            client.close()


def pump(source: Any, target: Any) -> None:
    """Copy bytes until one side ends."""
    with contextlib.suppress(OSError):
        while True:
            data = source.recv(65536)
            if not data:
                break
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


class HistoryCase(ProxyCase):
    settings: Dict[str, Any] = dict(no_history=False)

    def setUp(self) -> None:
        self.enter(mock.patch.object(cp, "HISTORY_PAUSE_S", 0.01))
        self.enter(mock.patch.object(cp, "HISTORY_RETRY_S", 0.02))
        self.enter(mock.patch.object(cp, "HISTORY_BUSY_S", 0.05))
        super().setUp()

    def rows(self, count: int, proxy: Optional[Proxy] = None) -> List[Dict[str, Any]]:
        """The history, newest first, once it has `count` rows."""
        return wait_until(lambda: (lambda rows: rows if len(rows) == count else None)(
            (proxy or self.proxy).get("/history?limit=500").json["rows"]), "%d rows" % count)

    def stats(self, proxy: Optional[Proxy] = None) -> Dict[str, Any]:
        return (proxy or self.proxy).get("/stats").json

    def path(self, proxy: Optional[Proxy] = None) -> str:
        return os.path.join((proxy or self.proxy).data_dir, "history.sqlite3")


class Reader:
    """A reader of /history/events in a thread; `events` grows."""

    def __init__(self, proxy: Proxy) -> None:
        self.sock = proxy.connect()
        self.sock.sendall(b"GET /history/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self.events: List[Any] = []
        self.raw = b""
        self.ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        wait_until(lambda: self.of("hello"), "hello")

    def _run(self) -> None:
        body, decoder, frames = cp.BodyDecoder(0, True), cp.SSEDecoder(), b""
        head = b""
        with contextlib.suppress(OSError):
            while not self.ended:
                data = self.sock.recv(65536)
                self.raw += data
                if b"\r\n\r\n" not in head:
                    head += data
                    _, _, data = head.partition(b"\r\n\r\n")
                    if b"\r\n\r\n" not in head:
                        continue
                for frame in decoder.feed(body.feed(data)):
                    self.events.append((frame.event, json.loads(frame.data)))
                self.ended = not data or body.done
        del frames

    def of(self, kind: str) -> List[Any]:
        return [value for event, value in list(self.events) if event == kind]

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: Any) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self.sock.close()
