"""The log as a person reads it on a terminal or in a file (sections 17 and 23)."""
from __future__ import annotations

import contextlib
import io
import logging
import re
import unittest
from typing import Iterator

from support import Proxy, chat, cp
from fake_upstream import CHAT, Answer, FakeUpstream


class Screen(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


class RequestLineTest(unittest.TestCase):
    """One line for each request."""

    @contextlib.contextmanager
    def server(self, stream: io.StringIO, **environ: str) -> Iterator[Proxy]:
        """A proxy whose log goes to `stream`, as the command line sets it up."""
        log = logging.getLogger("copilot_proxy.console_test")
        log.propagate = False
        log.setLevel(logging.INFO)
        log.handlers[:] = [cp.LogHandler(stream, environ)]
        log.handlers[0].setFormatter(cp.RedactingFormatter("%(message)s"))
        with FakeUpstream() as self.fake, Proxy(self.fake) as proxy:
            proxy.app.log = proxy.app.ledger._log = log
            yield proxy
            proxy.settle()

    def talk(self, proxy: Proxy) -> None:
        """Requests of several kinds and outcomes."""
        for agent, model, status in (("claude-cli/2.1", "gpt-4.1", 200),
                                     ("codex_cli_rs/0.9", "claude-haiku-4.5", 200),
                                     ("curl/8", "no-such-thing", 404)):
            reply = proxy.post("/v1/chat/completions", chat("hi", model), **{"User-Agent": agent})
            self.assertEqual(reply.status, status)
        self.fake.script(CHAT, *[Answer(status=500, body={"error": {"message": "broken"}})] * 9)
        self.assertGreaterEqual(proxy.post("/v1/chat/completions", chat("hi")).status, 500)
        self.assertEqual(proxy.get("/v1/models").status, 200)

    def test_its_columns_stand_below_each_other(self) -> None:
        stream = io.StringIO()
        with self.server(stream) as proxy:
            self.talk(proxy)
        lines = [line for line in stream.getvalue().splitlines() if " ms  " in line]
        self.assertEqual(len(lines), 5)
        self.assertRegex(lines[0], r"\A\d\d:\d\d:\d\d I Claude Code +gpt-4\.1 +passthrough +200 +"
                                   r"\d+\+\d+ tok +[\d.]+ cr +\d+/\d+ ms  [0-9a-f]{8}  "
                                   r"POST /chat/completions\Z")
        self.assertRegex(lines[1], r" Codex +claude-haiku-4\.5 +")
        self.assertRegex(lines[2], r" no-such-thing +local +404 .* error: model 'no-such-thing'")
        self.assertRegex(lines[4], r" GET /models +local +200 ")
        self.assertEqual(len({re.search(r" \d{3} ", line).start() for line in lines}), 1)
        self.assertEqual(len({line.index(" ms  ") for line in lines}), 1)

    def test_colours_are_for_failures_on_a_terminal_without_no_color(self) -> None:
        for stream, term, no_color, coloured in (
                (Screen(), "xterm", "", True), (Screen(), "xterm", "1", False),
                (Screen(), "dumb", "", False), (io.StringIO(), "xterm", "", False)):
            with self.subTest(term=term, no_color=no_color, stream=type(stream).__name__):
                with self.server(stream, TERM=term, NO_COLOR=no_color) as proxy:
                    self.talk(proxy)
                    proxy.app.log.warning("a warning")
                lines = stream.getvalue().splitlines()
                marked = {"\x1b[33m": [" 404 ", "a warning"], "\x1b[31m": [" 50"]}
                for mark, words in marked.items():
                    found = [line for line in lines if line.startswith(mark)]
                    self.assertEqual(bool(found), coloured)
                    for line in found:
                        self.assertTrue(line.endswith("\x1b[0m"), line)
                        self.assertTrue(any(word in line for word in words), line)
                self.assertFalse([line for line in lines if " 200 " in line and "\x1b" in line])

    def test_words_of_others_bring_no_colour(self) -> None:
        stream = Screen()
        with self.server(stream, TERM="xterm", NO_COLOR="1") as proxy:
            proxy.post("/v1/chat/completions", chat("hi", "a\x1b[31mb"),
                       **{"User-Agent": "odd[31m agent"})
            proxy.app.log.warning("red \x1b[31m words")
        self.assertNotIn("\x1b", stream.getvalue())


class StatusTest(unittest.TestCase):
    """The line below the log."""

    def test_lines_of_the_log_stand_above_it(self) -> None:
        stream = Screen()
        handler = cp.LogHandler(stream, {"TERM": "xterm"})
        handler.show("waiting")
        handler.write_lines("one\n")
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, "two", (), None))
        handler.show("")
        handler.write_lines("three\n")
        erase = "\r\x1b[K"
        self.assertEqual(stream.getvalue(), erase + "waiting" + erase + "one\nwaiting" + erase
                         + "two\nwaiting" + erase + "three\n")

    def test_a_file_has_none(self) -> None:
        stream = io.StringIO()
        cp.LogHandler(stream, {"TERM": "xterm"}).show("waiting")
        self.assertEqual(stream.getvalue(), "")

    def test_a_stream_that_is_closed_is_no_terminal_and_fails_nothing(self) -> None:
        stream = Screen()
        handler = cp.LogHandler(stream, {"TERM": "xterm"})
        stream.close()
        handler.show("waiting")
        handler.write_lines("one\n")
        closed = io.StringIO()
        closed.close()
        self.assertFalse(cp.is_console(closed, {}))
        self.assertFalse(cp.is_console(None, {}))


if __name__ == "__main__":
    unittest.main()
