#!/usr/bin/env python3
"""Benchmark of copilot_proxy.py: what does going through the proxy cost?

    python tests/bench.py                          every row, about a minute
    python tests/bench.py --only streams --streams 1000
    python tests/bench.py --rounds 5 --json out.json
    python tests/bench.py --soak 20                endurance: 20 minutes of ill-behaved clients

Standard library only.  Four processes on loopback, each port chosen by the system: a small
make-believe GitHub and Copilot, a load client, the proxy with an empty home, and this one.

How to read the table
- `direct` is the load client straight on the upstream, `proxy` the same through the proxy, in the
  same run.  Upstream and client are Python, too, so `direct` is the ceiling of this benchmark, not
  of the machine.  Compare ratios of one run; plain figures of two machines mean little.
- The line "CPU taken by other work" comes first.  Near 0 %: every figure counts.  Above some 20 %:
  only CPU per request or event, memory and the rows about leaving clients do; requests per second
  and every p99 are then mostly the neighbours'.
- CPU is user + system time of the proxy, in ticks of 10 ms from /proc; "-" where there is no /proc.
- `late` is the age of an event when the client has it (both sides read one clock).  `burst` has
  many events per read and shows the cost of looking at each; `paced` has one event per wake-up and
  shows the cost of a wake-up.
- `open at once` below the number of streams means that somebody queues, so read it before `late`.
- A line "..., to X" of the doors is how often the line above it holds the CPU of X.
- A changed body is one with a field that the upstream refuses and the proxy must take out.
- `client leaves`: from the client's close until the upstream sees its own connection closed.
  "> 3000" is a leak: the model goes on, and is paid for, with nobody listening.
- A soak is passed when every answer was the right one, nothing is left open, files and threads
  are back, and memory is at most half above its start.  `early` and `late` are the medians of the
  first and last quarter under load: where `late` is much above `early` after 20 minutes, it leaks.
"""
from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import http.client
import importlib.util
import json
import os
import platform
import random
import re
import selectors
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

Json = Dict[str, Any]
JSON_TYPE = {"Content-Type": "application/json"}

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BURST_EVENTS = 500                    # of one burst stream
BATCH = 250                           # events of a burst that the upstream writes at once
PACED_STREAMS, PACED_HZ, PACED_EVENTS = 40, 50, 150
MANY_HZ, MANY_EVENTS = 20, 100
IDLE_STREAMS, IDLE_CONNECTIONS = 50, 1000
LATE_S = 10.0                         # a job may take that much longer than planned
LEAVE_LIMIT_S = 3.0
SOAK_CLIENTS = 24
SOAK_EXPIRE_S = 20.0                  # then the upstream refuses the token it gave
SAMPLE_S = 2.0
SETTLE_S = 90.0                       # idle connections of the pool live for 50 s
SOAK_TIMEOUT_S = 30.0
FILLER = 'He said "no", then\n\tread on: a line of a file, as tools give it back. ' * 28

# ==== The three dialects: requests, and the upstream's answers ====================================


def sse(*events: Json) -> bytes:
    """Server-sent events; those that have a type name it in an event line, as the upstream does."""
    out = b""
    for event in events:
        name = b"event: %b\n" % event["type"].encode() if "type" in event else b""
        out += name + b"data: %b\n\n" % json.dumps(event, separators=(",", ":")).encode()
    return out


class Dialect(NamedTuple):
    """One API shape.  `event` holds TEXT and, where events are numbered, "SEQ"."""

    name: str
    path: str
    model: str
    turns: str                        # the field of the request that holds the conversation
    more: Json                        # further fields of a request
    opening: bytes
    event: bytes
    closing: bytes
    answer: bytes
    end: bytes                        # what only a proper end has

    def text_event(self, number: int, text: bytes) -> bytes:
        left, _, right = self.event.partition(b"TEXT")
        return left.replace(b'"SEQ"', b"%d" % (number + 4)) + text + right

    def post(self, body: bytes) -> bytes:
        """The whole request as bytes for the wire."""
        return (b"POST /v1%b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (self.path.encode(), len(body), body))

    def request(self, orders: Json, size: int = 0, changed: bool = False) -> bytes:
        """A request whose last message tells the upstream what to do; `size` bytes or more."""
        marker = "@@%s@@" % ";".join("%s=%s" % pair for pair in orders.items())
        turns = [{"role": ("user", "assistant")[at % 2], "content": FILLER}
                 for at in range(size // len(json.dumps(FILLER)) // 2 * 2)]
        body: Json = {"store": True} if changed else {}
        body.update(self.more, model=self.model, stream=bool(orders.get("ev")))
        body[self.turns] = turns + [{"role": "user", "content": marker}]
        return json.dumps(body).encode()


def make_chat() -> Dialect:
    base: Json = {"choices": [], "created": 1, "id": "chatcmpl-bench",
                  "model": "gpt-4.1-2025-04-14"}

    def chunk(delta: Json, reason: Optional[str] = None) -> Json:
        return dict(base, choices=[{"index": 0, "delta": delta, "finish_reason": reason}])

    usage = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
    message = {"role": "assistant", "content": "TEXT"}
    answer = dict(base, object="chat.completion", usage=usage, choices=[
        {"index": 0, "message": message, "finish_reason": "stop"}])
    return Dialect(
        "chat", "/chat/completions", "gpt-4.1", "messages", {},
        sse(chunk({"content": "", "role": "assistant"})), sse(chunk({"content": "TEXT"})),
        sse(chunk({}, "stop"), dict(base, usage=usage)) + b"data: [DONE]\n\n",
        json.dumps(answer).encode(), b"data: [DONE]")


def make_messages() -> Dialect:
    whole: Json = {"id": "msg_bench", "type": "message", "role": "assistant", "content": [
        {"type": "text", "text": "TEXT"}], "model": "claude-sonnet-4.6", "stop_reason": "end_turn",
        "stop_sequence": None, "usage": {"input_tokens": 9, "output_tokens": 9}}
    opening = sse({"type": "message_start", "message": dict(whole, content=[], stop_reason=None)},
                  {"type": "content_block_start", "index": 0,
                   "content_block": {"type": "text", "text": ""}})
    event = sse({"type": "content_block_delta", "index": 0,
                 "delta": {"type": "text_delta", "text": "TEXT"}})
    closing = sse({"type": "content_block_stop", "index": 0},
                  {"type": "message_delta", "usage": {"output_tokens": 9},
                   "delta": {"stop_reason": "end_turn", "stop_sequence": None}},
                  {"type": "message_stop"})
    return Dialect("messages", "/messages", "claude-sonnet-4.6", "messages", {"max_tokens": 1000},
                   opening, event, closing, json.dumps(whole).encode(), b"event: message_stop")


def make_responses() -> Dialect:
    def item(text: str, status: str) -> Json:
        return {"id": "msg_bench", "type": "message", "role": "assistant", "status": status,
                "content": [{"type": "output_text", "text": text, "annotations": []}]}

    def event(kind: str, number: Any, **more: Any) -> Json:
        return dict({"type": "response." + kind, "sequence_number": number}, **more)

    whole: Json = {"id": "resp_bench", "object": "response", "created_at": 1, "output": [
        item("TEXT", "completed")], "status": "completed", "model": "gpt-5.3-codex",
        "usage": {"input_tokens": 9, "output_tokens": 9, "total_tokens": 18}}
    begun = dict(whole, status="in_progress", output=[], usage=None)
    place: Json = {"item_id": "msg_bench", "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": "", "annotations": []}
    opening = sse(event("created", 0, response=begun), event("in_progress", 1, response=begun),
                  event("output_item.added", 2, output_index=0,
                        item=dict(item("", "in_progress"), content=[])),
                  event("content_part.added", 3, part=part, **place))
    last = 10 ** 9
    done = dict(whole, output=[item("", "completed")])
    closing = sse(event("output_text.done", last, text="", **place),
                  event("content_part.done", last + 1, part=part, **place),
                  event("output_item.done", last + 2, output_index=0, item=item("", "completed")),
                  event("completed", last + 3, response=done))
    return Dialect("responses", "/responses", "gpt-5.3-codex", "input", {}, opening,
                   sse(event("output_text.delta", "SEQ", **place, delta="TEXT")), closing,
                   json.dumps(whole).encode(), b"event: response.completed")


DIALECTS = {dialect.name: dialect for dialect in (make_chat(), make_messages(), make_responses())}
PATHS = {dialect.path: dialect for dialect in DIALECTS.values()}


def model_entry(name: str, vendor: str, endpoints: List[str]) -> Json:
    """A catalogue entry in the upstream's own shape."""
    return {"id": name, "name": name, "object": "model", "vendor": vendor, "version": name,
            "model_picker_enabled": True, "supported_endpoints": endpoints, "capabilities": {
                "type": "chat", "family": name, "limits": {"max_output_tokens": 32000},
                "supports": {"streaming": True}}}


MODELS = [model_entry("gpt-4.1", "OpenAI", ["/chat/completions"]),
          model_entry("claude-sonnet-4.6", "Anthropic", ["/chat/completions", "/v1/messages"]),
          model_entry("gpt-5.3-codex", "OpenAI", ["/responses"])]

# ==== The upstream, a process of its own ==========================================================
# The marker in a prompt, "@@id=7;ev=20;pace=0.05@@", decides on the answer:
#   id     comes back in every event, numbered: #7:0# #7:1# ...
#   ev     text events of a stream, 0 is a whole answer; size: bytes added to each
#   pace   seconds between two events, 0 is as fast as they are taken
#   think  seconds before the head;  stall, stall_s: silent for so long after so many events
#   cut    the connection breaks after so many events;  fail: 503 to the first try

ORDERS: Json = {"id": "x", "ev": 0, "size": 40, "pace": 0.0, "think": 0.0, "stall": -1,
                "stall_s": 1.0, "cut": -1, "fail": 0}
HEAD_END = b"\r\n\r\n"
LENGTH = re.compile(rb"content-length: *(\d+)", re.I)
BEARER = re.compile(rb"authorization: *bearer (\S+)", re.I)
STREAM_HEAD = (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
               b"Transfer-Encoding: chunked\r\n\r\n")
LAST_CHUNK = b"0\r\n\r\n"


def read_orders(body: bytes) -> Json:
    """The last marker of a request."""
    end = body.rfind(b"@@")
    text = body[body.rfind(b"@@", 0, max(end, 0)) + 2:end].decode() if end > 0 else ""
    orders = dict(ORDERS)
    for pair in text.split(";"):
        name, _, value = pair.partition("=")
        if name in ORDERS:
            orders[name] = type(ORDERS[name])(value)
    return orders


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Upstream:
    """What all connections share: counters, the token that is good now."""

    def __init__(self, expire_s: float) -> None:
        self.expire_s = expire_s
        self.port = 0
        self.made = "tid=1"
        self.made_at = time.monotonic()
        self.stats = {"connections": 0, "requests": 0, "open": 0, "peak": 0, "aborts": 0,
                      "abort_ns": 0, "exchanges": 0, "refused": 0}
        self.failed = set()           # type: set[str]

    def token(self) -> Json:
        self.stats["exchanges"] += 1
        self.made = "tid=%d" % self.stats["exchanges"]
        self.made_at = time.monotonic()
        life = 180 if self.expire_s else 1800
        return {"token": self.made, "expires_at": int(time.time()) + life, "refresh_in": life - 60,
                "chat_enabled": True,
                "endpoints": {"api": "http://127.0.0.1:%d" % self.port}}

    def is_bearer_good(self, bearer: str) -> bool:
        fresh = not self.expire_s or time.monotonic() - self.made_at < self.expire_s
        return bearer == self.made and fresh

    def read_stats(self, reset: bool) -> Json:
        stats: Json = dict(self.stats)
        if reset:
            self.stats["peak"] = self.stats["open"]
        return stats


class Connection(asyncio.Protocol):
    """One connection from the proxy, or from the load client."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream, self.stats = upstream, upstream.stats
        self.loop = asyncio.get_event_loop()
        self.received: List[bytes] = []
        self.size = self.needed = 0
        self.busy = self.full = False           # answering; writing more would only pile it up
        self.timer: Optional[asyncio.TimerHandle] = None
        self.orders, self.dialect = dict(ORDERS), DIALECTS["chat"]
        self.sent, self.next_at = 0, 0.0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.stats["connections"] += 1

    def data_received(self, data: bytes) -> None:
        self.received.append(data)
        self.size += len(data)
        if self.size < self.needed:
            return
        whole = b"".join(self.received)
        self.received, self.needed = [whole], 0
        end = whole.find(HEAD_END)
        if end < 0:
            return
        length = LENGTH.search(whole, 0, end)
        self.needed = end + 4 + (int(length.group(1)) if length else 0)
        if len(whole) >= self.needed:
            self.received, self.size, self.needed = [], 0, 0
            self.serve(whole[:end], whole[end + 4:])

    def serve(self, head: bytes, body: bytes) -> None:
        target = head.split(b" ", 2)[1].decode()
        dialect = PATHS.get(target[3:] if target.startswith("/v1/") else target)
        if dialect is not None:
            self.answer(dialect, head, body)
        elif target == "/copilot_internal/v2/token":
            self.reply(self.upstream.token())
        elif target.startswith("/stats"):
            self.reply(self.upstream.read_stats(target.endswith("reset")))
        elif target == "/models":
            self.reply({"object": "list", "data": MODELS})
        else:
            self.reply({"error": {"message": "no such thing"}}, 404)

    def reply(self, value: Any, status: int = 200) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.transport.write(b"HTTP/1.1 %d Answer\r\nContent-Type: application/json\r\n"
                             b"Content-Length: %d\r\n\r\n%b" % (status, len(body), body))

    def answer(self, dialect: Dialect, head: bytes, body: bytes) -> None:
        self.stats["requests"] += 1
        bearer = BEARER.search(head)
        if bearer and not self.upstream.is_bearer_good(bearer.group(1).decode()):
            self.stats["refused"] += 1
            self.reply({"error": {"message": "token expired", "code": "token_expired"}}, 401)
            return
        self.orders, self.dialect, self.sent = read_orders(body), dialect, 0
        if self.orders["fail"] and self.orders["id"] not in self.upstream.failed:
            self.upstream.failed.add(self.orders["id"])
            self.reply({"error": {"message": "overloaded"}}, 503)
            return
        self.upstream.failed.discard(self.orders["id"])
        self.busy = True
        self.stats["open"] += 1
        self.stats["peak"] = max(self.stats["peak"], self.stats["open"])
        if self.orders["think"]:
            self.timer = self.loop.call_later(self.orders["think"], self.begin)
        else:
            self.begin()

    def begin(self) -> None:
        self.timer = None
        if self.orders["ev"]:
            self.transport.write(STREAM_HEAD + http_chunk(self.dialect.opening))
            self.next_at = self.loop.time()
            self.schedule() if self.orders["pace"] else self.step()
        else:
            self.reply(self.dialect.answer.replace(b"TEXT", self.text(0)))
            self.end()

    def text(self, number: int) -> bytes:
        """Send time and number of an event, inside its text."""
        return b"~T%d~#%b:%d#%b" % (time.perf_counter_ns(), self.orders["id"].encode(), number,
                                    b"." * self.orders["size"])

    def schedule(self) -> None:
        self.next_at = max(self.next_at, self.loop.time() - 1) + self.orders["pace"]
        self.timer = self.loop.call_at(self.next_at, self.step)

    def step(self) -> None:
        """Send what is due: one event of a paced stream, of a burst as many as are taken."""
        self.timer = None
        orders = self.orders
        while self.busy and not self.full:
            if self.sent == orders["cut"]:
                self.end()
                self.transport.abort()
            elif self.sent == orders["stall"]:
                orders["stall"] = -1
                self.timer = self.loop.call_later(orders["stall_s"], self.step)
                return
            elif self.sent >= orders["ev"]:
                self.transport.write(http_chunk(self.dialect.closing) + LAST_CHUNK)
                self.end()
            else:
                self.send_events()
                if orders["pace"]:
                    self.schedule()
                    return

    def send_events(self) -> None:
        stops = [self.orders[name] - self.sent for name in ("ev", "cut", "stall")]
        count = min([1 if self.orders["pace"] else BATCH] + [stop for stop in stops if stop > 0])
        numbers = range(self.sent, self.sent + count)
        self.sent += count
        self.transport.write(b"".join([
            http_chunk(self.dialect.text_event(number, self.text(number))) for number in numbers]))

    def end(self) -> None:
        self.busy = False
        self.stats["open"] -= 1

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False
        if self.busy and self.timer is None:
            self.step()

    def eof_received(self) -> None:
        self.left()

    def connection_lost(self, exc: Optional[Exception]) -> None:
        self.left()

    def left(self) -> None:
        """The other side hung up: in the middle of an answer that is an abort."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.busy:
            self.end()
            self.stats["aborts"] += 1
            self.stats["abort_ns"] = time.perf_counter_ns()


def run_upstream(expire_s: float) -> None:
    """Serve until standard input ends; the port is the first line of standard output."""
    async def serve() -> None:
        upstream = Upstream(expire_s)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Connection(upstream), "127.0.0.1", 0,
                                          backlog=1024)
        upstream.port = server.sockets[0].getsockname()[1]
        print(upstream.port, flush=True)
        while True:
            await asyncio.sleep(3600)

    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    asyncio.run(serve())


# ==== The load client, a process of its own =======================================================
# One job per line of standard input, its figures as one line of standard output.

STAMP = re.compile(rb"~T(\d+)~")


class LoadConnection:
    """One connection of a job and where it is in its answer."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.began_ns = 0
        self.head = b""                  # until it is whole
        self.left = -1                   # of a body with a length, -1 for a chunked one
        self.tail = b""                  # of a chunked body
        self.in_body = False

    def take(self, data: bytes) -> bool:
        """Is the answer complete with these bytes?  Raises ValueError for a status but 200."""
        if not self.in_body:
            self.head += data
            end = self.head.find(HEAD_END)
            if end < 0:
                return False
            if b" 200 " not in self.head[:16]:
                raise ValueError(self.head[:16].decode("ascii", "replace"))
            length = LENGTH.search(self.head, 0, end)
            self.left = int(length.group(1)) if length else -1
            self.in_body, data, self.tail = True, self.head[end + 4:], b""
        if self.left >= 0:
            self.left -= len(data)
            return self.left == 0
        self.tail = (self.tail + data[-7:])[-7:]
        return self.tail == b"\r\n" + LAST_CHUNK


class Load:
    """Run one job: `connections` that each send the same request again and again.

    Events are counted, not parsed: the upstream puts two '~' into each and nowhere else.
    """

    def __init__(self, job: Json) -> None:
        dialect = DIALECTS[job["dialect"]]
        self.request = dialect.post(dialect.request(job["orders"], job.get("size", 0),
                                                    job.get("changed", False)))
        self.job, self.timed = job, bool(job["orders"].get("pace"))
        self.selector = selectors.DefaultSelector()
        self.latencies: List[float] = []
        self.late: List[float] = []
        self.tildes = self.started = self.live = 0
        self.errors: Dict[str, int] = {}

    def run(self) -> Json:
        job, began = self.job, time.monotonic()
        self.until = began + job["seconds"]
        waiting = [began + job.get("spread", 0.0) * at / job["connections"]
                   for at in range(job["connections"])][::-1]
        hard = max(self.until, began + job.get("planned", 0.0)) + LATE_S
        now = began
        while (waiting or self.live) and now < hard:
            while waiting and waiting[-1] <= now:
                waiting.pop()
                self.connect()
            pause = min(waiting[-1] if waiting else hard, hard) - now
            for key, _ in self.selector.select(max(pause, 0)):
                self.receive(key.data)
            now = time.monotonic()
        for key in list(self.selector.get_map().values()):
            key.data.sock.close()
        self.selector.close()
        return {"requests": len(self.latencies), "seconds": time.monotonic() - began,
                "events": self.tildes // 2, "unfinished": self.live, "errors": self.errors,
                "latency_us": quantiles(self.latencies), "late_us": quantiles(self.late)}

    def connect(self) -> None:
        try:
            sock = socket.create_connection(("127.0.0.1", self.job["port"]), timeout=LATE_S)
        except OSError as error:
            self.note(type(error).__name__)
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = LoadConnection(sock)
        self.selector.register(sock, selectors.EVENT_READ, connection)
        self.live += 1
        self.send(connection)

    def send(self, connection: LoadConnection) -> None:
        connection.head, connection.in_body = b"", False
        self.started += 1
        connection.began_ns = time.perf_counter_ns()
        try:
            connection.sock.sendall(self.request)
        except OSError as error:
            self.close(connection, type(error).__name__)

    def receive(self, connection: LoadConnection) -> None:
        try:
            data = connection.sock.recv(262144)
            now_ns = time.perf_counter_ns()
            self.tildes += data.count(b"~")
            complete = connection.take(data)
        except (OSError, ValueError) as error:
            self.close(connection, str(error) or type(error).__name__)
            return
        if self.timed:
            self.late += [(now_ns - int(stamp)) / 1000 for stamp in STAMP.findall(data)]
        if complete:
            self.latencies.append((now_ns - connection.began_ns) / 1000)
            if time.monotonic() < self.until and self.started < self.job.get("count", 10 ** 9):
                self.send(connection)
            else:
                self.close(connection)
        elif not data:
            self.close(connection, "cut")

    def close(self, connection: LoadConnection, problem: str = "") -> None:
        self.selector.unregister(connection.sock)
        connection.sock.close()
        self.live -= 1
        if problem:
            self.note(problem)

    def note(self, problem: str) -> None:
        self.errors[problem] = self.errors.get(problem, 0) + 1


def quantiles(values: List[float]) -> Json:
    """{"p50", "p99"}, empty for no values."""
    values = sorted(values)
    return {"p%d" % share: values[len(values) * share // 100] for share in (50, 99) if values}


def run_load() -> None:
    """Jobs until standard input ends."""
    gc.disable()
    for line in sys.stdin:
        print(json.dumps(Load(json.loads(line)).run()), flush=True)
        gc.collect()


# ==== Processes and what they use =================================================================


def raise_file_limit() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def read_proc(*parts: str) -> str:
    """A file below /proc, '' where there is none."""
    try:
        with open(os.path.join("/proc", *parts)) as file:
            return file.read()
    except OSError:
        return ""


def busy_cpu_s() -> Optional[float]:
    """CPU seconds of the whole machine since it started, without idle and waiting for disks."""
    fields = read_proc("stat").partition("\n")[0].split()[1:9]
    if len(fields) < 8:
        return None
    user, nice, system, _, _, irq, soft_irq, stolen = (int(field) for field in fields)
    return (user + nice + system + irq + soft_irq + stolen) / os.sysconf("SC_CLK_TCK")


class Child:
    """A process of ours: ended by `stop`, in a session of its own so that Ctrl-C spares it."""

    def __init__(self, command: List[str], **more: Any) -> None:
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True,
                                        **more)
        self.pid = str(self.process.pid)

    def read_line(self) -> str:
        assert self.process.stdout is not None
        line: str = self.process.stdout.readline().decode()
        if not line:
            raise RuntimeError("a process of the benchmark ended by itself")
        return line

    def ask(self, value: Json) -> Json:
        """One line in, one line out."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(value).encode() + b"\n")
        self.process.stdin.flush()
        answer: Json = json.loads(self.read_line())
        return answer

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def cpu_s(self) -> Optional[float]:
        fields = read_proc(self.pid, "stat").rpartition(")")[2].split()
        if not fields:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def status(self, name: str) -> Optional[int]:
        found = re.search(r"^%s:\s+(\d+)" % name, read_proc(self.pid, "status"), re.M)
        return int(found.group(1)) if found else None

    def rss_mb(self) -> Optional[float]:
        kilobytes = self.status("VmRSS")
        return kilobytes / 1024 if kilobytes is not None else None

    def files(self) -> Optional[int]:
        try:
            return len(os.listdir("/proc/%s/fd" % self.pid))
        except OSError:
            return None


class Proxy(Child):
    """The proxy under test with an empty home; `start_s` is the time until /health answered."""

    def __init__(self, options: argparse.Namespace, upstream_port: int, home: str) -> None:
        keep = ("PATH", "SYSTEMROOT", "TEMP", "TMP", "LANG", "LD_LIBRARY_PATH")
        environ = {name: os.environ[name] for name in keep if name in os.environ}
        environ.update(HOME=home, USERPROFILE=home, LOCALAPPDATA=home, GH_TOKEN="ghu_bench",
                       PYTHONDONTWRITEBYTECODE="1")
        self.log_path = os.path.join(home, "proxy.log")
        began = time.perf_counter()
        with open(self.log_path, "ab") as log:
            super().__init__([options.python, os.path.abspath(options.proxy), "start", "--port",
                              "0", "--grace", "0", "--github-url",
                              "http://127.0.0.1:%d" % upstream_port], env=environ, cwd=home,
                             stdin=subprocess.DEVNULL, stderr=log)
        try:
            line = self.read_line()
            while "http://" not in line:
                line = self.read_line()
            self.port = int(re.findall(r":(\d+)", line)[-1])
            fetch(self.port, "GET", "/health")
        except BaseException:
            self.stop()
            sys.stderr.write("the proxy did not start: %s\n" % self.log_text()[-2000:])
            raise
        self.start_s = time.perf_counter() - began

    def log_text(self) -> str:
        with open(self.log_path, encoding="utf-8", errors="replace") as file:
            return file.read()


def fetch(port: int, method: str, path: str, body: Optional[bytes] = None) -> bytes:
    """One request on its own connection.  Raises RuntimeError for a status but 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SOAK_TIMEOUT_S)
    try:
        connection.request(method, path, body, JSON_TYPE)
        answer = connection.getresponse()
        data = answer.read()
        if answer.status != 200:
            raise RuntimeError("%s answered %d: %r" % (path, answer.status, data[:500]))
        return data
    finally:
        connection.close()


# ==== The rows ====================================================================================


class Figure(NamedTuple):
    """One line of the table; None is unknown, a text stands for itself."""

    label: str
    unit: str
    direct: Any
    proxy: Any


class Stage:
    """Upstream, load client and proxy of one run."""

    def __init__(self, options: argparse.Namespace, home: str, expire_s: float = 0.0) -> None:
        self.options, self._home = options, home
        self._stack = contextlib.ExitStack()
        own = [sys.executable, os.path.abspath(__file__), "--role"]
        try:
            self.upstream = self._add(Child(own + ["upstream:%g" % expire_s],
                                            stdin=subprocess.PIPE))
            self.upstream_port = int(self.upstream.read_line())
            self.load = self._add(Child(own + ["load"], stdin=subprocess.PIPE))
            self.proxy = self.start_proxy()
        except BaseException:
            self.close()
            raise
        self._turn = 0

    def _add(self, child: Child) -> Child:
        self._stack.callback(child.stop)
        return child

    def start_proxy(self) -> Proxy:
        proxy = Proxy(self.options, self.upstream_port, self._home)
        self._add(proxy)
        return proxy

    def restart_proxy(self) -> None:
        self.proxy.stop()
        self.proxy = self.start_proxy()

    def close(self) -> None:
        self._stack.close()

    def stats(self, reset: bool = False) -> Json:
        stats: Json = json.loads(fetch(self.upstream_port, "GET",
                                       "/stats?reset" if reset else "/stats"))
        return stats

    def run(self, job: Json, target: str) -> Json:
        """The job's figures, with "cpu_s" of the proxy, None when there is none to be had."""
        port = self.proxy.port if target == "proxy" else self.upstream_port
        before = self.proxy.cpu_s()
        result = self.load.ask(dict(job, port=port))
        after = self.proxy.cpu_s()
        result["cpu_s"] = None if before is None or after is None else after - before
        if result["errors"] or result["unfinished"]:
            sys.stderr.write("%s, %s: errors %s, unfinished %d\n" % (
                target, job["dialect"], result["errors"], result["unfinished"]))
        return result

    def both(self, **job: Any) -> Dict[str, Json]:
        """The job on both targets, each warmed up, taking turns at being first."""
        self._turn += 1
        order = ["direct", "proxy"][::1 if self._turn % 2 else -1]
        short = dict(job, count=2 * job["connections"], seconds=0.1, orders={})
        results = {}
        for target in order:
            self.run(short, target)
            results[target] = self.run(job, target)
        return results


def figure(label: str, unit: str, results: Dict[str, Json], pick: Callable[[Json], Any]) -> Figure:
    return Figure(label, unit, pick(results["direct"]), pick(results["proxy"]))


def cpu_figure(label: str, unit: str, results: Dict[str, Json], per: str, scale: float) -> Figure:
    result = results["proxy"]
    known = result["cpu_s"] is not None and result[per]
    return Figure(label, unit, None, result["cpu_s"] * scale / result[per] if known else None)


def late_figures(name: str, results: Dict[str, Json]) -> List[Figure]:
    return [quantile_figure(name + ": late", "ms", results, "late_us", share, 1e3)
            for share in ("p50", "p99")]


def quantile_figure(label: str, unit: str, results: Dict[str, Json], of: str, share: str,
                    scale: float) -> Figure:
    return figure("%s %s" % (label, share), unit, results,
                  lambda result: result[of][share] / scale if result[of] else None)


def row_latency(stage: Stage) -> List[Figure]:
    results = stage.both(dialect="chat", orders={}, connections=1, seconds=1.2, count=20000)
    return [quantile_figure("chat, 1 connection:", "us", results, "latency_us", share, 1)
            for share in ("p50", "p99")]


def row_throughput(stage: Stage) -> List[Figure]:
    results = stage.both(dialect="chat", orders={}, connections=16, seconds=2.0, count=200000)
    name = "chat, 16 connections"
    return [figure(name, "req/s", results, lambda r: r["requests"] / r["seconds"]),
            cpu_figure(name + ": CPU", "ms/req", results, "requests", 1e3)]


def row_burst(stage: Stage) -> List[Figure]:
    figures = []
    for dialect in DIALECTS:
        results = stage.both(dialect=dialect, orders={"ev": BURST_EVENTS}, connections=4,
                             seconds=1.2, count=20000)
        name = "burst %s" % dialect
        figures += [figure(name, "events/s", results, lambda r: r["events"] / r["seconds"]),
                    cpu_figure(name + ": CPU", "us/event", results, "events", 1e6)]
    return figures


class Door(NamedTuple):
    """A way to ask the proxy for a stream of a burst.  than: the door that it is compared with."""

    name: str
    than: str
    path: str                         # "": over a WebSocket
    body: Json
    turns: str                        # the field of the body that holds the conversation
    turn: Callable[[str], Json]       # one turn of a user

    def request(self, events: int) -> bytes:
        """All its bytes, for the wire."""
        turn = self.turn("@@ev=%d@@" % events)
        data = json.dumps(dict(self.body, **{self.turns: [turn]})).encode()
        if not self.path:             # a frame under a mask of nought
            data = data.ljust(126)
            return b"\x81\xfe" + struct.pack(">H", len(data)) + bytes(4) + data
        return (b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (self.path.encode(), len(data), data))


def said(text: str) -> Json:
    return {"role": "user", "content": text}


def make_doors() -> List[Door]:
    """Responses over both of its transports; what is translated, by further dialects, too."""
    doors = []
    gemini = "/v1beta/models/%s:streamGenerateContent?alt=sse"
    for model in (make_responses().model, make_chat().model):
        about = {"model": model, "stream": True}
        sse_name = "%s: Responses, SSE" % model
        doors += [Door(sse_name, "", "/v1/responses", about, "input", said),
                  Door("%s: Responses, WebSocket" % model, sse_name, "", dict(
                      about, type="response.create"), "input", said)]
    anthropic = "%s: Messages" % model
    doors += [
        Door(anthropic, "", "/v1/messages", dict(about, max_tokens=1000), "messages", said),
        Door("%s: Gemini" % model, anthropic, gemini % model, {}, "contents",
             lambda text: {"role": "user", "parts": [{"text": text}]}),
        Door("%s: Ollama" % model, anthropic, "/api/chat", about, "messages", said)]
    return doors


def open_door(stage: Stage, door: Door) -> socket.socket:
    """A connection on which requests of the door may be sent."""
    sock = socket.create_connection(("127.0.0.1", stage.proxy.port), timeout=LATE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not door.path:
        sock.sendall(b"GET /v1/responses HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\n"
                     b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                     b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
        head = b""
        while not head.endswith(HEAD_END):
            head += sock.recv(1)
    return sock


def pass_door(stage: Stage, door: Door, seconds: float) -> float:
    """CPU of the proxy in us for each event that came through this door."""
    request, streams, until = door.request(BURST_EVENTS), 0, time.monotonic() + seconds
    end = LAST_CHUNK if door.path else b'"type":"response.completed"'
    with open_door(stage, door) as sock:
        before = stage.proxy.cpu_s()
        while time.monotonic() < until:
            sock.sendall(request)
            tail, is_last = b"", False
            while not (is_last and tail.endswith(end if door.path else b"}")):
                data = sock.recv(262144)
                if not data:
                    raise RuntimeError(door.name + " was cut")
                tail = tail[-40:] + data
                is_last = is_last or end in tail
            streams += 1
        after = stage.proxy.cpu_s()
    if before is None or after is None:
        return 0.0
    return (after - before) * 1e6 / streams / BURST_EVENTS


def row_doors(stage: Stage) -> List[Figure]:
    """The same burst by several doors, and how they compare."""
    cost: Dict[str, float] = {}
    figures = []
    for door in make_doors():
        pass_door(stage, door, 0.1)
        cost[door.name] = pass_door(stage, door, 1.0)
        known = cost[door.name] or None
        figures.append(Figure(door.name + ": CPU", "us/event", None, known))
        if door.than and cost[door.than]:
            figures.append(Figure("%s, to %s" % (door.name, door.than.partition(": ")[2]), "times",
                                  None, cost[door.name] / cost[door.than]))
    return figures


def row_paced(stage: Stage) -> List[Figure]:
    results = stage.both(
        dialect="chat", orders={"ev": PACED_EVENTS, "pace": 1 / PACED_HZ}, seconds=0.0, spread=0.5,
        connections=PACED_STREAMS, planned=PACED_EVENTS / PACED_HZ + 0.5)
    name = "%d paced streams" % PACED_STREAMS
    return late_figures(name, results) + [
        cpu_figure(name + ": CPU", "us/event", results, "events", 1e6)]


def row_streams(stage: Stage) -> List[Figure]:
    count = stage.options.streams
    spread = count / 1000
    planned = MANY_EVENTS / MANY_HZ + spread
    job = {"dialect": "chat", "orders": {"ev": MANY_EVENTS, "pace": 1 / MANY_HZ}, "seconds": 0.0,
           "spread": spread, "connections": count, "planned": planned}
    stage.restart_proxy()
    fetch(stage.proxy.port, "GET", "/v1/models")
    results, used = {}, {}            # type: Dict[str, Json], Json
    for target in ("direct", "proxy"):
        stage.stats(reset=True)
        timer = threading.Timer(planned * 0.7, lambda: used.update(
            rss=stage.proxy.rss_mb(), threads=stage.proxy.status("Threads")))
        timer.start()
        results[target] = stage.run(job, target)
        timer.join()
        results[target]["peak"] = stage.stats()["peak"]
    name, wanted = "%d streams" % count, count * MANY_EVENTS
    return [figure(name + ": open at once", "", results, lambda r: r["peak"]),
            figure(name + ": delivered", "%", results, lambda r: 100 * r["events"] / wanted),
            *late_figures(name, results),
            cpu_figure(name + ": CPU", "us/event", results, "events", 1e6),
            Figure(name + ": RSS", "MB", None, used["rss"]),
            Figure(name + ": threads", "", None, used["threads"])]


def row_idle(stage: Stage) -> List[Figure]:
    """50 paced streams through the proxy, without and with idle connections beside them; the two
    columns are then `alone` and `beside`, and the ratios say what the idle ones cost."""
    raise_file_limit()
    job = {"dialect": "chat", "orders": {"ev": PACED_EVENTS, "pace": 1 / PACED_HZ}, "seconds": 0.0,
           "spread": 0.5, "connections": IDLE_STREAMS, "planned": PACED_EVENTS / PACED_HZ + 0.5}
    stage.run(dict(job, orders={"ev": 10, "pace": 0.01}), "proxy")
    alone = stage.run(job, "proxy")
    with contextlib.ExitStack() as stack:
        for _ in range(IDLE_CONNECTIONS):
            stack.enter_context(socket.create_connection(("127.0.0.1", stage.proxy.port), 10))
        beside = stage.run(job, "proxy")
    name = "%d streams beside %d idle" % (IDLE_STREAMS, IDLE_CONNECTIONS)
    figures = [Figure("%s: late %s" % (name, share), "ms", alone["late_us"][share] / 1e3,
                      beside["late_us"][share] / 1e3) for share in ("p50", "p99")]
    ratio = beside["late_us"]["p50"] / max(alone["late_us"]["p50"], 1)
    figures.append(Figure(name + ": late, ratio", "", None, ratio))
    if alone["cpu_s"] and beside["cpu_s"]:
        figures.append(Figure(name + ": CPU, ratio", "", None, beside["cpu_s"] / alone["cpu_s"]))
    return figures


def row_bodies(stage: Stage) -> List[Figure]:
    figures = []
    for megabytes in (1, 4):
        for changed in (False, True):
            results = stage.both(dialect="chat", orders={}, connections=1, seconds=0.8, count=2000,
                                 size=megabytes * 1000000, changed=changed)
            name = "%d MB body, %s:" % (megabytes, "changed" if changed else "as it is")
            figures.append(quantile_figure(name, "ms", results, "latency_us", "p50", 1e3))
    return figures


def row_start(stage: Stage) -> List[Figure]:
    seconds, sizes = [], []
    for _ in range(5):
        stage.restart_proxy()
        seconds.append(stage.proxy.start_s)
        sizes.append(stage.proxy.rss_mb() or 0.0)
    return [Figure("start to first /health", "s", None, statistics.median(seconds)),
            Figure("RSS after it", "MB", None, statistics.median(sizes) or None)]


def row_leave(stage: Stage) -> List[Figure]:
    cases = (("flowing", {"ev": 2000, "pace": 0.01}, 10),
             ("silent", {"ev": 9, "pace": 0.01, "stall": 2, "stall_s": 30.0}, 2),
             ("before the head", {"ev": 9, "think": 30.0}, 0))
    figures = []
    for name, orders, events in cases:
        values = {}
        for target, port in (("direct", stage.upstream_port), ("proxy", stage.proxy.port)):
            samples = [leave_once(stage, port, orders, events) for _ in range(3)]
            worst = max(samples)
            values[target] = ("> %d" % (LEAVE_LIMIT_S * 1000) if worst == float("inf")
                              else statistics.median(samples))
        figures.append(Figure("client leaves, %s" % name, "ms", values["direct"], values["proxy"]))
    return figures


def leave_once(stage: Stage, port: int, orders: Json, events: int) -> float:
    """Milliseconds from our close until the upstream saw its own, infinite if it never did."""
    before = stage.stats()
    sock = socket.create_connection(("127.0.0.1", port), timeout=LATE_S)
    sock.sendall(DIALECTS["chat"].post(DIALECTS["chat"].request(orders)))
    seen, deadline = 0, time.monotonic() + LATE_S
    while seen < 2 * events and time.monotonic() < deadline:
        seen += sock.recv(65536).count(b"~")
    while stage.stats()["open"] <= before["open"] and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    closed_ns = time.perf_counter_ns()
    sock.close()
    deadline = time.monotonic() + LEAVE_LIMIT_S
    while time.monotonic() < deadline:
        after = stage.stats()
        if after["aborts"] > before["aborts"]:
            return max(float(after["abort_ns"] - closed_ns) / 1e6, 0.0)
        time.sleep(0.01)
    return float("inf")


def row_reuse(stage: Stage) -> List[Figure]:
    """A client that opens a connection for each request, for the proxy may not."""
    fetch(stage.proxy.port, "POST", "/v1/chat/completions", DIALECTS["chat"].request({}))
    before = stage.stats()["connections"]
    for at in range(200):
        dialect = list(DIALECTS.values())[at % 3]
        orders = {"ev": 3} if at % 2 else {}
        fetch(stage.proxy.port, "POST", "/v1" + dialect.path, dialect.request(orders))
    opened = stage.stats()["connections"] - before - 1       # one to ask for the figure
    return [Figure("upstream connections", "per 100", None, opened / 2)]


def conversation(size: int) -> Json:
    """A session of about so many bytes in Claude Code's shape: calls and results of 1 to 8 KB."""
    roll, total, number = random.Random(1), 0, 0
    messages: List[Json] = [{"role": "user", "content": [{"type": "text", "text": "Fix it."}]}]
    while total < size:
        number += 1
        text = "line of code = %d\n" % roll.randrange(10 ** 6) * roll.randrange(50, 400)
        messages.append({"role": "assistant", "content": [
            {"type": "text", "text": "I look at the next file."},
            {"type": "tool_use", "id": "toolu_%d" % number, "name": "Read",
             "input": {"file_path": "/src/file%d.py" % number}}]})
        messages.append({"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_%d" % number,
             "content": [{"type": "text", "text": text}]}]})
        total += len(text) + 400
    messages[-1]["content"][0]["cache_control"] = {"type": "ephemeral"}
    return {"model": "claude-sonnet-4.6", "max_tokens": 1000, "stream": True, "messages": messages,
            "system": [{"type": "text", "text": "You are a coding agent. " * 500}],
            "tools": [{"name": "Read", "input_schema": {"type": "object", "properties": {}}}]}


def care(product: Any, body: Json) -> bool:
    """What transcript care does to a conversation that needs nothing -> was it left alone?"""
    edit, model = product.BodyEdit(body), product.Model(body["model"])
    product.drop_billing_line(edit)
    product.expand_compactions(edit, product.MESSAGES)
    product.pair_tool_results(edit, product.MESSAGES)
    product.normalise_history(edit, product.MESSAGES, model)
    product.MESSAGES.fit_cache(edit, model)
    return not edit.changed


def load_product(stage: Stage) -> Any:
    """The program that is measured, as a module of this process."""
    spec = importlib.util.spec_from_file_location("copilot_proxy", stage.options.proxy)
    product = importlib.util.module_from_spec(spec)
    sys.modules["copilot_proxy"] = product               # its dataclasses look there
    spec.loader.exec_module(product)
    return product


def row_clients(stage: Stage) -> List[Figure]:
    """CPU time of a text event of a Chat model on its way to each client dialect, in this process:
    the least of fifteen, taken in turn.  The reference is an Anthropic client."""
    product = load_product(stage)
    frames = [b'data: {"choices":[{"index":0,"delta":{"content":"word %d "}}]}\n\n' % at
              for at in range(3000)]
    clients = [("Anthropic", product.MESSAGES), ("Responses", product.RESPONSES),
               ("Gemini", product.GEMINI), ("Gemini, array", product.GEMINI_ARRAY),
               ("Ollama", product.OLLAMA)]
    least: Dict[str, float] = {}
    for _ in range(15):
        for name, client in clients:
            pipe = product.TranslatedStream(client, product.CHAT, product.Request("m"))
            began = time.process_time()
            for frame in frames:
                pipe.feed(frame)
            spent_us = (time.process_time() - began) * 1e6 / len(frames)
            least[name] = min(spent_us, least.get(name, spent_us))
    return [Figure("chat event to a client of " + name, "us", least["Anthropic"], spent_us)
            for name, spent_us in least.items()]


def row_care(stage: Stage) -> List[Figure]:
    """CPU time, in this process: the least of twenty."""
    product = load_product(stage)
    body = conversation(4000000)
    data = json.dumps(body).encode()

    def least(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(20):
            began = time.process_time()
            work()
            times.append(time.process_time() - began)
        return min(times) * 1e3

    name = "4 MB conversation, CPU: "
    return [Figure(name + "parsing it", "ms", None, least(lambda: product.loads(data))),
            Figure(name + "care", "ms", None, least(lambda: care(product, body)))]


ROWS: Dict[str, Callable[[Stage], List[Figure]]] = {
    "latency": row_latency, "throughput": row_throughput, "burst": row_burst,
    "doors": row_doors, "paced": row_paced,
    "bodies": row_bodies, "reuse": row_reuse, "leave": row_leave, "streams": row_streams,
    "idle": row_idle, "start": row_start, "care": row_care, "clients": row_clients}

# ==== Endurance ===================================================================================


class Seen(NamedTuple):
    """What a client has of an answer: status 0 before the head, `whole` up to its regular end."""

    status: int
    body: bytes
    whole: bool


class Tally:
    """What all soaking clients saw.  `lock` guards all fields."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.requests = 0
        self.kinds: Dict[str, int] = {}
        self.errors: Dict[str, int] = {}
        self.wrong: List[str] = []

    def add(self, kind: str, error: str = "", wrong: str = "") -> None:
        with self.lock:
            self.requests += 1
            self.kinds[kind] = self.kinds.get(kind, 0) + 1
            if error:
                self.errors[error] = self.errors.get(error, 0) + 1
            if wrong:
                self.wrong.append(wrong)


MARK = re.compile(rb"#(\w+):(\d+)#")
#: kind of visit -> how often among 100
KINDS = {"plain": 30, "stream": 24, "leave": 14, "leave early": 5, "slow reader": 6,
         "stalled reader": 4, "cut": 6, "silent upstream": 4, "hiccup": 4, "big request": 3}


class SoakClient(threading.Thread):
    """One badly behaved client: a visit after another, on a kept connection where that works."""

    def __init__(self, number: int, seed: int, port: int, until: float, tally: Tally) -> None:
        super().__init__(daemon=True)
        self.number, self.port, self.until, self.tally = number, port, until, tally
        self.random = random.Random(seed * 1000 + number)
        self.connection: Optional[http.client.HTTPConnection] = None
        self.visits = 0
        self.stopping = False

    def run(self) -> None:
        while time.monotonic() < self.until and not self.stopping:
            kind = self.random.choices(list(KINDS), list(KINDS.values()))[0]
            error = wrong = ""
            try:
                error, wrong = self.visit(kind)
            except (OSError, ValueError, http.client.HTTPException) as problem:
                self.close()
                error = "%s: %s" % (kind, type(problem).__name__)
            self.tally.add(kind, error, wrong)
            if error or self.random.random() < 0.2:
                self.close()
            if self.random.random() < 0.3:
                time.sleep(self.random.random() * 0.3)
        self.close()

    def close(self, reset: bool = False) -> None:
        if self.connection is not None:
            if reset and self.connection.sock is not None:
                self.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                                struct.pack("ii", 1, 0))
            self.connection.close()
            self.connection = None

    def orders_for(self, kind: str) -> Json:
        self.visits += 1
        roll = self.random
        orders: Json = {"id": "s%dv%d" % (self.number, self.visits)}
        if kind in ("plain", "big request") or kind == "hiccup" and roll.random() < 0.5:
            orders["think"] = roll.choice((0, 0, 0.05, 0.3))
        else:
            orders.update(ev=roll.randint(1, 60), pace=roll.choice((0, 0, 0.005, 0.05)))
        if kind == "slow reader":
            orders.update(ev=roll.randint(200, 1000), size=2000, pace=0)
        elif kind == "stalled reader":
            orders.update(ev=2000, size=2000, pace=0)
        elif kind in ("cut", "silent upstream"):
            orders["cut" if kind == "cut" else "stall"] = roll.randint(0, orders["ev"] - 1)
            orders["stall_s"] = roll.uniform(0.5, 3)
        elif kind == "leave early":
            orders["think"] = 20
        elif kind == "leave":
            orders.update(ev=400, pace=roll.choice((0.01, 0.05)), size=roll.choice((40, 4000)))
        elif kind == "hiccup":
            orders["fail"] = 1
        return orders

    def visit(self, kind: str) -> Tuple[str, str]:
        """(error, wrong content), both '' when all was as it should be."""
        dialect = self.random.choice(list(DIALECTS.values()))
        if dialect.name == "responses":      # as Codex; else answers are kept, up to 32 MB of them
            dialect = dialect._replace(more={"store": False})
        orders = self.orders_for(kind)
        body = dialect.request(orders, 1000000 if kind == "big request" else 0,
                               self.random.random() < 0.3 and dialect.name == "chat")
        slow = kind.endswith("reader")
        if slow:
            self.close()
        if self.connection is None:
            self.connection = http.client.HTTPConnection("127.0.0.1", self.port,
                                                         timeout=SOAK_TIMEOUT_S)
        if slow:                                   # else the kernel's buffers would take it all
            self.connection.connect()
            self.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        self.connection.request("POST", "/v1" + dialect.path, body, JSON_TYPE)
        return self.judge(kind, dialect, orders, self.read(kind))

    def read(self, kind: str) -> Seen:
        """The answer at this client's own speed, and as far as it cares for it."""
        assert self.connection is not None
        leaves = kind.startswith("leave")
        enough = self.random.randint(1, 20000) if leaves else sys.maxsize
        stall_at = self.random.randint(1, 200000) if kind == "stalled reader" else sys.maxsize
        status, body, whole = 0, bytearray(), False
        try:
            if leaves:
                self.connection.sock.settimeout(self.random.random() * 1.5)
            answer = self.connection.getresponse()
            status = answer.status
            while len(body) < enough:
                known = answer.length is not None
                data = answer.read() if known else answer.read1(65536)
                body += data
                if known or not data:
                    whole = True
                    break
                if kind == "slow reader":
                    time.sleep(len(data) / 4e6)
                if len(body) >= stall_at:
                    stall_at = sys.maxsize
                    time.sleep(self.random.uniform(1, 4))
        except http.client.IncompleteRead:
            self.close()
        except socket.timeout:
            if not leaves:
                raise
        if leaves:
            self.close(reset=self.random.random() < 0.5)
        return Seen(status, bytes(body), whole)

    def judge(self, kind: str, dialect: Dialect, orders: Json, seen: Seen) -> Tuple[str, str]:
        if kind == "cut" and orders["cut"] == 0 and seen.status == 502:
            return "", ""                # nothing was shown yet: the status can still tell it
        if seen.status not in (0, 200):
            return "%s: status %d" % (kind, seen.status), ""
        marks = MARK.findall(seen.body)
        wanted = orders.get("ev") or 1
        ended = dialect.end in seen.body if orders.get("ev") else seen.whole
        where = "%s, %s %s: %d of %d events, end %s" % (kind, dialect.name, orders, len(marks),
                                                        wanted, ended)
        own = orders["id"].encode()
        if marks != [(own, b"%d" % at) for at in range(len(marks))] or len(marks) > wanted:
            return "", "not its own events, or not in order: " + where
        if kind.startswith("leave"):
            return "", ""
        if kind == "cut":
            polite = ended or b"error" not in seen.body
            return "", "a cut stream without an error: " + where if polite else ""
        if ended and len(marks) != wanted:
            return "", "a proper end, but events are missing: " + where
        return ("" if ended else "%s: not whole" % kind), ""


class Watch:
    """Files, threads and memory of the proxy over time."""

    NAMES = ("open files", "threads", "RSS MB")
    #: back is: at most start * factor + term; malloc keeps some memory for each thread there was
    SLACK = ((1.0, 2), (1.0, 1), (1.5, 4))

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.samples: List[List[Optional[float]]] = []

    def sample(self) -> List[Optional[float]]:
        values = [self.proxy.files(), self.proxy.status("Threads"), self.proxy.rss_mb()]
        self.samples.append(values)
        return values

    def is_back(self) -> List[Optional[bool]]:
        first, last = self.samples[0], self.samples[-1]
        return [None if a is None or b is None else b <= a * factor + term
                for a, b, (factor, term) in zip(first, last, self.SLACK)]

    def table(self, loaded: int) -> List[List[str]]:
        """`loaded`: how many samples were taken under load."""
        lines = [["", "start", "early", "late", "peak", "end", "back"]]
        back = self.is_back()
        for at, name in enumerate(self.NAMES):
            line = [float("nan") if row[at] is None else float(row[at] or 0)
                    for row in self.samples]
            quarter = max(loaded // 4, 1)
            early, late = line[1:1 + quarter], line[max(loaded - quarter, 0):loaded]
            values = (line[0], statistics.median(early or line), statistics.median(late or line),
                      max(line), line[-1])
            verdict = "-" if back[at] is None else "yes" if back[at] else "NO"
            lines.append([name] + [show(None if v != v else v) for v in values] + [verdict])
        return lines


def soak(options: argparse.Namespace, home: str) -> int:
    """Endurance -> exit code."""
    stage = Stage(options, home, SOAK_EXPIRE_S)
    try:
        return run_soak(stage, options)
    finally:
        stage.close()


def run_soak(stage: Stage, options: argparse.Namespace) -> int:
    proxy, tally = stage.proxy, Tally()
    for at in range(30):
        dialect = list(DIALECTS.values())[at % 3]
        fetch(proxy.port, "POST", "/v1" + dialect.path, dialect.request({"ev": at % 2 * 5}))
    time.sleep(2)                            # until the script's syntax tree has been let go
    watch = Watch(proxy)
    watch.sample()
    until = time.monotonic() + options.soak * 60
    clients = [SoakClient(at, options.seed, proxy.port, until, tally)
               for at in range(SOAK_CLIENTS)]
    loaded = 0
    try:
        for client in clients:
            client.start()
        loaded = watch_load(watch, tally, until)
    except KeyboardInterrupt:
        sys.stderr.write("ending early\n")
    for client in clients:
        client.stopping = True
    for client in clients:
        if client.ident is not None:
            client.join(SOAK_TIMEOUT_S)
    hung = sum(client.is_alive() for client in clients)
    settled_s = settle(stage, watch)
    return report_soak(stage, watch, tally, loaded, hung, settled_s)


def watch_load(watch: Watch, tally: Tally, until: float) -> int:
    """Samples until the time is over -> how many."""
    told = time.monotonic()
    while time.monotonic() < until:
        time.sleep(min(SAMPLE_S, max(until - time.monotonic(), 0)))
        values = watch.sample()
        if time.monotonic() - told >= 30:
            told = time.monotonic()
            sys.stderr.write("%4.0f s left: %d requests, %s\n" % (
                until - told, tally.requests, ", ".join(
                    "%s %s" % (name, show(v)) for name, v in zip(watch.NAMES, values))))
    return len(watch.samples)


def settle(stage: Stage, watch: Watch) -> float:
    """Wait for quiet, with a request now and then because the pool is swept on use -> seconds."""
    began = time.monotonic()
    while time.monotonic() - began < SETTLE_S:
        fetch(stage.proxy.port, "POST", "/v1/chat/completions", DIALECTS["chat"].request({}))
        for _ in range(6):
            time.sleep(SAMPLE_S)
            watch.sample()
            if False not in watch.is_back()[:2] and not stage.stats()["open"]:
                return time.monotonic() - began
    return time.monotonic() - began


def report_soak(stage: Stage, watch: Watch, tally: Tally, loaded: int, hung: int,
                settled_s: float) -> int:
    stats, log = stage.stats(), stage.proxy.log_text()
    print_table(watch.table(loaded))
    print("\nquiet after %.0f s; upstream: %d answers still open, %d connections, %d token "
          "exchanges, %d calls refused with 401, %d answers given up" % (
              settled_s, stats["open"], stats["connections"], stats["exchanges"],
              stats["refused"], stats["aborts"]))
    print("requests: %d (%s)" % (tally.requests, ", ".join(
        "%s %d" % pair for pair in sorted(tally.kinds.items()))))
    print("errors: %s" % (", ".join("%s %d" % pair for pair in sorted(tally.errors.items()))
                          or "none"))
    faults = [line for line in log.splitlines()
              if line.startswith("Traceback") or re.match(r"[\d:]+ [EC] ", line)]
    print("errors in the proxy's log: %d%s" % (len(faults), "".join(
        "\n  " + line[:200] for line in faults[:5])))
    print("clients that hang: %d\nwrong content: %d" % (hung, len(tally.wrong)))
    for line in tally.wrong[:10]:
        print("  " + line)
    good = not (tally.wrong or hung or stats["open"] or tally.errors or faults)
    good = good and False not in watch.is_back()
    print("soak %s" % ("passed" if good else "FAILED"))
    return 0 if good else 1


# ==== The command line ============================================================================


def show(value: Any) -> str:
    """Three figures that count; '-' for what is not known."""
    if value is None or isinstance(value, str):
        return value or "-"
    if abs(value) >= 100 or value == int(value):
        return "%d" % round(value)
    return "%.3g" % value


def print_table(lines: List[List[str]]) -> None:
    """The first line is the heading; the first column is flush left."""
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    for number, line in enumerate(lines):
        cells = [line[0].ljust(widths[0])] + [
            cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        print("  ".join(cells).rstrip())
        if not number:
            print("  ".join("-" * width for width in widths))


def median_of(values: List[Any]) -> Any:
    """Of numbers the median, else the first text, else None."""
    numbers = [value for value in values if isinstance(value, (int, float))]
    texts = [value for value in values if isinstance(value, str)]
    return texts[0] if texts else statistics.median(numbers) if numbers else None


def table_of(rounds: Dict[str, List[Figure]]) -> List[List[str]]:
    lines = [["", "unit", "direct", "proxy", "ratio"]]
    for label, figures in rounds.items():
        direct = median_of([f.direct for f in figures])
        proxy = median_of([f.proxy for f in figures])
        known = all(isinstance(value, (int, float)) for value in (direct, proxy)) and direct
        lines.append([label, figures[0].unit, show(direct), show(proxy),
                      "%.2f" % (proxy / direct) if known else "-"])
    return lines


def measure(options: argparse.Namespace, home: str, rounds: Dict[str, List[Figure]]) -> int:
    """Put every figure of every round under its label -> exit code; Ctrl-C leaves what there is."""
    stage = Stage(options, home)
    try:
        for number in range(options.rounds):
            for name in options.only:
                sys.stderr.write("round %d of %d: %s\n" % (number + 1, options.rounds, name))
                for item in ROWS[name](stage):
                    rounds.setdefault(item.label, []).append(item)
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: the table is not complete\n")
        return 130
    finally:
        stage.close()


def print_other_work(busy_before: Optional[float], began: float) -> Optional[float]:
    """How much of the machine others used; all processes of ours have ended by now."""
    busy, own = busy_cpu_s(), os.times()
    if busy is None or busy_before is None:
        print("CPU taken by other work: unknown here (no /proc)\n")
        return None
    ours = own.user + own.system + own.children_user + own.children_system
    share = 100 * max(busy - busy_before - ours, 0) / (
        (time.monotonic() - began) * (os.cpu_count() or 1))
    print("CPU taken by other work: %.0f %% of %d CPUs%s\n" % (
        share, os.cpu_count() or 1, "" if share < 20 else
        " - a busy machine: trust only CPU, memory and the client-leaves rows"))
    return share


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmark of copilot_proxy.py; its docstring "
                                     "says how to read the numbers.")
    parser.add_argument("--proxy", default=os.path.join(ROOT, "copilot_proxy.py"), metavar="FILE",
                        help="the proxy to measure (default: the one of this repository)")
    parser.add_argument("--python", default=sys.executable, help="the Python that runs it")
    parser.add_argument("--only", default=",".join(ROWS), help="rows, of: " + ", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=1, help="medians of so many (default 1)")
    parser.add_argument("--streams", type=int, default=200, help="of the row streams (200)")
    parser.add_argument("--json", metavar="FILE", help="every value of every round")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="endurance, nothing else")
    parser.add_argument("--seed", type=int, default=1, help="of the soak's random clients")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    flags.only = [name.strip() for name in flags.only.split(",") if name.strip()]
    for name in flags.only:
        if name not in ROWS:
            parser.error("there is no row %s; choose of: %s" % (name, ", ".join(ROWS)))
    if not 1 <= flags.streams <= 5000 or flags.rounds < 1 or (flags.soak or 1) <= 0:
        parser.error("--streams takes 1 to 5000; --rounds and --soak more than 0")
    return flags


def save_json(path: str, rounds: Dict[str, List[Figure]], other: Optional[float]) -> None:
    values = [{"label": label, "unit": figures[0].unit, "direct": [f.direct for f in figures],
               "proxy": [f.proxy for f in figures]} for label, figures in rounds.items()]
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"python": platform.python_version(), "platform": platform.platform(),
                   "cpus": os.cpu_count(), "other_work_percent": other, "figures": values},
                  file, indent=1)


def interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> int:
    flags = parse_flags()
    raise_file_limit()
    if flags.role:
        run_load() if flags.role == "load" else run_upstream(float(flags.role.split(":")[1]))
        return 0
    signal.signal(signal.SIGTERM, interrupt)
    busy, began = busy_cpu_s(), time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        if flags.soak:
            return soak(flags, home)
        rounds: Dict[str, List[Figure]] = {}
        code = measure(flags, home, rounds)
    print("%s, Python %s, %s" % (os.path.basename(flags.proxy), platform.python_version(),
                                 platform.platform()))
    other = print_other_work(busy, began)
    print_table(table_of(rounds))
    if flags.json:
        save_json(flags.json, rounds, other)
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
