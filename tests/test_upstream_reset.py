"""An upstream that resets its connection behind the last byte of an answer (section 13)."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import sys
import threading
import unittest

from support import DEADLINE_S, cp

LINGER = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)


class ResetTest(unittest.TestCase):
    def test_a_whole_answer_before_a_reset_is_not_lost(self) -> None:
        for size in (10, 15_000, 16_500, 40_000):
            with self.subTest(size=size):
                body = json.dumps("x" * size).encode()
                status, value, _, raw = self.ask(
                    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body), body)
                self.assertEqual((status, len(value), raw), (200, size, body))

    def test_an_answer_that_a_reset_cuts_is_an_error(self) -> None:
        for size in (10, 16_500, 40_000):
            with self.subTest(size=size), self.assertRaises(cp.UpstreamError):
                self.ask(b"HTTP/1.1 200 OK\r\nContent-Length: 50000\r\n\r\n", b"x" * size)

    def test_a_reset_is_not_the_end_of_an_answer_without_a_length(self) -> None:
        for size in (10, 16_500, 40_000):
            with self.subTest(size=size), self.assertRaises(cp.UpstreamError):
                self.ask(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * size)

    def ask(self, head: bytes, body: bytes) -> tuple:
        """What comes of an answer whose body and reset are both there before it is read."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        is_reset = threading.Event()

        def serve() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as sock:
                sock.recv(65536)
                sock.sendall(head)
                has_head.wait(DEADLINE_S)
                sock.sendall(body)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
            is_reset.set()

        has_head = threading.Event()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        self.addCleanup(thread.join, DEADLINE_S)
        upstream = cp.Upstream(cp.Settings(), {})
        self.addCleanup(upstream.pool.close)
        request = cp.UpstreamRequest("GET", "http://127.0.0.1:%d/" % listener.getsockname()[1], {})

        async def fetch() -> tuple:
            answer = await upstream.send(request)
            has_head.set()
            self.assertTrue(is_reset.wait(DEADLINE_S))
            raw = await answer.read_all()
            return answer.status, json.loads(raw), answer.headers, raw

        return cp.run(fetch())


if __name__ == "__main__":
    unittest.main()
