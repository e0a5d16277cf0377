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
            handler.write_lines(handler.line(logging.INFO, text))
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
        handler = cp.LogHandler(stream)
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


if __name__ == "__main__":
    unittest.main()
