"""Heads of the upstream's answers that no honest server sends."""
from __future__ import annotations

import contextlib
import socket
import threading
import unittest

from support import DEADLINE_S, REQUESTS, ProxyCase, cp
from fake_upstream import CHAT, EXCHANGE, MESSAGES, RESPONSES, Answer

PATHS = (CHAT, RESPONSES, MESSAGES)


class StatusTest(ProxyCase):
    def test_a_status_that_http_does_not_have_is_502_in_the_dialect(self) -> None:
        for status in (600, 666, 799, 999):
            for (path, make), upstream in zip(REQUESTS, PATHS):
                for stream in (False, True):
                    with self.subTest(status=status, path=path, stream=stream):
                        self.fake.script(upstream, Answer(status=status, body={
                            "error": {"message": "odd"}}))
                        reply = self.proxy.post(path, make("a", stream=stream))
                        self.assertEqual(reply.status, 502, reply.body)
                        self.assertIn("status %d" % status, reply.json["error"]["message"])

    def test_a_redirect_or_an_odd_success_is_no_success(self) -> None:
        for status in (204, 304, 399):
            with self.subTest(status=status):
                self.fake.script(CHAT, Answer(status=status))
                reply = self.proxy.post("/v1/chat/completions", REQUESTS[0][1]("a"))
                self.assertEqual(reply.status, 502, reply.body)

    def test_the_login_meets_such_a_status_with_an_error_too(self) -> None:
        self.fake.revoke_tokens()
        self.fake.script(EXCHANGE, *[Answer(status=999, body={"message": "odd"})] * 5)
        reply = self.proxy.post("/v1/chat/completions", REQUESTS[0][1]("a"))
        self.assertEqual(reply.status, 502, reply.body)


class RawHeadTest(unittest.TestCase):
    def exchange(self, answer: bytes, repeat: bytes = b"", times: int = 0) -> cp.UpstreamResponse:
        """What the upstream client makes of these bytes."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)

        def serve() -> None:
            with contextlib.suppress(OSError):
                sock = listener.accept()[0]
                with sock:
                    sock.recv(65536)
                    for _ in range(times):
                        sock.sendall(repeat)
                    sock.sendall(answer)
                    sock.recv(1)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        self.addCleanup(thread.join, DEADLINE_S)
        upstream = cp.Upstream(cp.Settings(), {})
        self.addCleanup(upstream.pool.clear)
        url = "http://127.0.0.1:%d/" % listener.getsockname()[1]
        found = cp.run(upstream.send(cp.UpstreamRequest("GET", url, {}, timeout_s=DEADLINE_S)))
        self.addCleanup(found.close)
        return found

    def test_interim_answers_are_passed_over(self) -> None:
        found = self.exchange(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nA: b\r\n\r\n",
                              b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", 5)
        self.assertEqual((found.status, found.headers["a"]), (200, "b"))

    def test_endless_interim_answers_end(self) -> None:
        with self.assertRaises(cp.UpstreamError) as caught:
            self.exchange(b"", b"HTTP/1.1 100 Continue\r\nA: %s\r\n\r\n" % (b"b" * 1000), 10 ** 5)
        self.assertEqual(caught.exception.status, 502)

    def test_a_protocol_that_nobody_asked_for_is_an_error(self) -> None:
        for line in (b"HTTP/1.1 101 Switching Protocols", b"HTTP/1.1 000 ", b"HTTP/1.1 099 a"):
            with self.subTest(line=line), self.assertRaises(cp.UpstreamError) as caught:
                self.exchange(line + b"\r\nUpgrade: websocket\r\n\r\n")
            self.assertEqual(caught.exception.status, 502)


class ParserTest(unittest.TestCase):
    def test_fields_are_cleaned_and_names_checked(self) -> None:
        status, reason, headers = cp.parse_response_head(
            b"HTTP/1.1 404 Not\x00 Fo\x1bund\r\nA: b\x00c\rd\x1be\x7f\r\nB C: d\r\n: e\r\n"
            b"\xe9: f\r\nG\x00: h\r\nI : j\r\nK: l\r\n  folded\r\n\tmore: x\r\nM: \xe9\r\n"
            b"bad\x07: n\r\n folded too\r\nA: again")
        self.assertEqual((status, reason), (404, "Not  Fo und"))
        self.assertEqual(headers, {"a": "b c d e, again", "k": "l folded more: x", "m": "\xe9"})

    def test_a_status_outside_of_http_is_an_upstream_error(self) -> None:
        for status in (b"000", b"099", b"600", b"999"):
            with self.subTest(status=status), self.assertRaises(cp.UpstreamError) as caught:
                cp.parse_response_head(b"HTTP/1.1 %s Odd\r\nA: b" % status)
            self.assertEqual(caught.exception.status, 502)


if __name__ == "__main__":
    unittest.main()
