"""What is recorded a moment after the answer: nothing is lost by it, and nobody sees the gap."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
import unittest

from support import FakeUpstream, Proxy, cp


class LogLineTest(unittest.TestCase):
    """The line of a request, which is written without a LogRecord."""

    def setUp(self) -> None:
        self.log = logging.getLogger("copilot_proxy")
        before = self.log.handlers[:], self.log.level, self.log.propagate
        self.addCleanup(self.restore, before)

    def restore(self, before) -> None:
        self.log.handlers[:], level, self.log.propagate = before
        self.log.setLevel(level)

    def test_it_looks_like_every_other_line(self) -> None:
        text = "a line with \x1b[2J and \u202e in it"
        written = io.StringIO()
        with contextlib.redirect_stderr(written):
            cp.set_up_logging(False, False)
        handler = cp.line_handler(self.log)
        while True:  # both in one second
            second = int(time.time())
            written.truncate(0)
            written.seek(0)
            self.log.info(text)
            handler.write_lines(handler.line(logging.INFO, text, logging.INFO))
            if int(time.time()) == second:
                break
        lines = written.getvalue().splitlines()
        self.assertEqual(len(lines), 2)
        self.assertEqual(lines[0], lines[1])
        self.assertNotIn("\x1b", lines[1])

    def test_another_configuration_of_the_log_gets_records(self) -> None:
        cp.set_up_logging(False, True)
        self.assertIsNone(cp.line_handler(self.log))
        cp.set_up_logging(False, False)
        self.assertIsNotNone(cp.line_handler(self.log))
        self.log.addFilter(lambda record: True)
        self.addCleanup(self.log.filters.clear)
        self.assertIsNone(cp.line_handler(self.log))
        self.log.filters.clear()
        self.log.handlers.append(logging.NullHandler())
        self.assertIsNone(cp.line_handler(self.log))

    def test_a_closed_stream_fails_nothing(self) -> None:
        stream = io.StringIO()
        handler = cp.LogHandler(stream, {})
        stream.close()
        handler.write_lines("a\n")


class RecordedLaterTest(unittest.TestCase):
    """A request is counted when its answer has gone out: whoever looks finds it all the same."""

    def test_the_next_request_sees_the_last_one_counted(self) -> None:
        with FakeUpstream() as fake, Proxy(fake) as proxy:
            for number in range(1, 6):
                proxy.post("/v1/chat/completions", {
                    "model": "gpt-4.1", "messages": [{"role": "user", "content": "hi"}]})
                stats = json.loads(proxy.get("/stats").body)
                self.assertEqual(len(stats["recent"]), number)
                self.assertEqual(stats["running"], [])


class KnownHeadTest(unittest.TestCase):
    """A head that came before is not parsed again: what was refused stays refused."""

    def test_only_the_length_of_the_body_differs(self) -> None:
        raw = (b"POST /v1/messages HTTP/1.1\r\nHost: a\r\ncontent-length: %d\r\nX: 1")
        first, length = cp.parse_request_head(raw % 5)
        self.assertEqual(first.body_form(length), (5, False))
        second, length = cp.parse_request_head(raw % 1234)
        self.assertIs(second, first)
        self.assertEqual(second.headers, {"host": "a", "x": "1"})
        self.assertEqual(second.body_form(length), (1234, False))

    def test_two_lengths_are_refused_again_and_again(self) -> None:
        raw = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: %d"
        for number in (5, 6, 5, 6):
            with self.assertRaises(cp.BadRequest):
                cp.parse_request_head(raw % number)

    def test_a_length_inside_another_field_is_none(self) -> None:
        raw = b"POST / HTTP/1.1\r\nHost: a\r\nX: Content-Length: 5"
        head, length = cp.parse_request_head(raw)
        self.assertEqual(head.body_form(length), (0, False))
        head, length = cp.parse_request_head(raw + b"\r\nContent-Length: 7")
        self.assertEqual(head.headers["x"], "Content-Length: 5")
        self.assertEqual((length, head.body_form(length)), ("7", (7, False)))

    def test_a_length_in_another_spelling_is_read_as_well(self) -> None:
        for field in (b"Content-Length:9", b"content-length: 9 ", b"CONTENT-LENGTH:\t9",
                      b"Content-Length: 00000000009"):
            with self.subTest(field):
                raw = b"POST / HTTP/1.1\r\nHost: a\r\n" + field
                for _ in range(2):
                    head, length = cp.parse_request_head(raw)
                    self.assertEqual(head.headers, {"host": "a"})
                    self.assertEqual(head.body_form(length), (9, False))
                with self.assertRaises(cp.BadRequest):
                    cp.parse_request_head(raw + b"\r\nContent-Length: 9")


if __name__ == "__main__":
    unittest.main()
