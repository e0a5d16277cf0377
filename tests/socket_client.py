"""A small WebSocket client of RFC 6455, written without the product's framing.

`Socket(port)` shakes hands; `create` sends a request, `turn` gives its events up to the last one;
`frame` writes any frame, also a wrong one; `read_frame` reads what the server sends.
"""
from __future__ import annotations

import base64
import hashlib
import itertools
import json
import operator
import os
import struct
from typing import Any, Iterator

from support import DEADLINE_S, Connected

KEY = base64.b64encode(b"the sample nonce").decode()
GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
CONTINUED, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
LAST = ("response.completed", "response.incomplete", "response.failed", "error")


def handshake(path: str = "/v1/responses", *fields: str, key: str = KEY, version: str = "13",
              host: str = "localhost") -> bytes:
    """The head that asks for a WebSocket."""
    lines = ["GET %s HTTP/1.1" % path, "Host: " + host, "Connection: keep-alive, Upgrade",
             "Upgrade: websocket"]
    if version:
        lines.append("Sec-WebSocket-Version: " + version)
    if key:
        lines.append("Sec-WebSocket-Key: " + key)
    return ("\r\n".join([*lines, *fields]) + "\r\n\r\n").encode()


def frame(kind: int, payload: bytes = b"", last: bool = True, masked: bool = True,
          reserved: int = 0, mask: bytes = b"") -> bytes:
    """One frame of a client, byte by byte; masked=False and reserved are faults."""
    size = len(payload)
    first = (0x80 if last else 0) | reserved << 4 | kind
    top = 0x80 if masked else 0
    if size < 126:
        head = bytes([first, top | size])
    elif size < 65536:
        head = bytes([first, top | 126]) + struct.pack(">H", size)
    else:
        head = bytes([first, top | 127]) + struct.pack(">Q", size)
    if not masked:
        return head + payload
    mask = mask or os.urandom(4)
    return head + mask + bytes(map(operator.xor, payload, itertools.cycle(mask)))


def frames_in(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(kind, payload) of each whole frame of a server; raises AssertionError for a wrong one."""
    while data:
        kind, size, at = data[0] & 15, data[1], 2
        assert data[0] >= 0x80 and not data[0] & 0x70, "a fragment, or reserved bits"
        assert size < 128, "a server masks nothing"
        if size > 125:
            width = {126: 2, 127: 8}[size]
            size, at = int.from_bytes(data[2:2 + width], "big"), 2 + width
            assert size > (125 if width == 2 else 65535), "a length that is too wide"
        assert len(data) >= at + size, "half a frame"
        yield kind, data[at:at + size]
        data = data[at + size:]


class Closed(Exception):
    """The server has closed; code: of its last frame, None where it sent none."""

    def __init__(self, code: int | None, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code, self.reason = code, reason


class Socket(Connected):
    """A connection behind its handshake.  status: of its answer; headers: in lower case."""

    def __init__(self, port: int, *fields: str, path: str = "/v1/responses",
                 timeout_s: float = DEADLINE_S, wrap: Any = None) -> None:
        super().__init__(port, timeout_s, wrap)
        self.send(handshake(path, *fields))
        self.status = int(self.reader.readline().split()[1])
        self.headers: dict[str, str] = {}
        for line in iter(self.reader.readline, b"\r\n"):
            name, _, value = line.decode().partition(":")
            self.headers[name.lower()] = value.strip()
        if self.status == 101:
            digest = hashlib.sha1((KEY + GUID).encode()).digest()
            assert self.headers["sec-websocket-accept"] == base64.b64encode(digest).decode()
        self.pongs: list[bytes] = []
        self.pings = 0

    def read_frame(self) -> tuple[int, bytes]:
        """The next frame; raises Closed at the end."""
        head = self.reader.read(2)
        if len(head) < 2:
            raise Closed(None)
        if head[1] > 125:
            head += self.reader.read({126: 2, 127: 8}[head[1]])
        size = head[1] if head[1] < 126 else int.from_bytes(head[2:], "big")
        payload = self.reader.read(size)
        if len(payload) < size:
            raise Closed(None)
        (found,) = frames_in(head + payload)
        return found

    def event(self) -> Any:
        """The next text frame as JSON; pings are counted, pongs kept."""
        while True:
            kind, payload = self.read_frame()
            if kind == CLOSE:
                code = int.from_bytes(payload[:2], "big") if payload else None
                raise Closed(code, payload[2:].decode())
            if kind == PONG:
                self.pongs.append(payload)
            elif kind == PING:
                self.pings += 1
                self.send(frame(PONG, payload))
            else:
                assert kind == TEXT, "Codex fails at a binary frame"
                return json.loads(payload)

    def create(self, body: Any, **more: Any) -> None:
        """Send a request."""
        self.send(frame(TEXT, json.dumps(dict({"type": "response.create"}, **body,
                                              **more)).encode()))

    def events(self) -> list[Any]:
        """All events of the next answer."""
        found = [self.event()]
        while found[-1]["type"] not in LAST:
            found.append(self.event())
        return found

    def turn(self, body: Any, **more: Any) -> list[Any]:
        """A request and its events."""
        self.create(body, **more)
        return self.events()

    def wait_closed(self) -> Closed:
        """How the server closes, whatever comes before."""
        try:
            while True:
                self.event()
        except Closed as closed:
            return closed
        except ConnectionError:
            return Closed(None, "reset")
