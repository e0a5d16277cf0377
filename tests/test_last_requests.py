"""Requests that arrive while the server begins to end (section 18)."""

from __future__ import annotations

import json
import unittest

from support import ProxyCase, chat


class LastRequestTest(ProxyCase):
    settings = {"grace": 5.0}

    def test_a_request_that_was_sent_before_the_end_is_answered(self) -> None:
        body = json.dumps(chat("hi")).encode()
        raw = (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
               b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)) + body
        self.proxy.post("/v1/chat/completions", chat("the login is made"))
        with self.proxy.connect() as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.assertTrue(sock.recv(65536).startswith(b"HTTP/1.1 200"))
            self.proxy.settle()                     # the loop waits for the next request

            def send_and_end() -> None:
                """The loop has not read the request yet when it closes what is idle."""
                sock.sendall(raw)
                self.proxy.server._close_idle()

            self.proxy.server.loop.post(send_and_end)
            self.proxy.server.finish(5.0)
            self.assertTrue(sock.recv(65536).startswith(b"HTTP/1.1 200"))


if __name__ == "__main__":
    unittest.main()
