"""What froze the whole process once: the same inputs, and ten times as much of them, are sent to
the real server, which goes on answering everybody else meanwhile."""
from __future__ import annotations

import http.client
import socket
import tempfile
import threading
import time
import unittest
import urllib.parse
from typing import Any

from support import SLOW, Command, chat, message, response, send
from fake_upstream import FakeUpstream

HEALTH_S = 0.5               # the longest wait of another client, whatever is being served
TRIES = 4                    # a machine that is busy elsewhere may make one wait longer
LOOKS = 3                    # at least, also where the request is over at once
ANSWER_S = 30.0

REMINDER = "<system-reminder>%s</system-reminder>"
MODEL_TAIL = "@a-v1"


class FreezingCase(unittest.TestCase):
    """One server in a process of its own: a pattern that hangs holds up every thread of it."""

    environ: dict[str, Any] = {}
    port: int
    pid: int

    @classmethod
    def setUpClass(cls) -> None:
        fake = cls.keep(FakeUpstream())
        home = cls.keep(tempfile.TemporaryDirectory())
        command = cls.keep(Command("start", "--port", "0", "--github-url", fake.url,
                                   home=home, GH_TOKEN="ghu_fake", **cls.environ))
        cls.pid = command.process.pid
        cls.port = urllib.parse.urlsplit(command.wait_for_url()).port

    @classmethod
    def keep(cls, manager: Any) -> Any:
        value = manager.__enter__()
        cls.addClassCleanup(manager.__exit__, None, None, None)
        return value

    def ask(self, method: str, path: str, body: Any = None, timeout_s: float = ANSWER_S) -> int:
        """The status of one request on a connection of its own, 0 when none came in time."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            return send(connection, method, path, body).status
        except socket.timeout:
            return 0
        finally:
            connection.close()

    def longest_wait_s(self, method: str, path: str, body: Any) -> tuple[float, int]:
        """(the longest that /health took while a request ran, the status of that request)."""
        statuses: list[int] = []
        request = threading.Thread(
            target=lambda: statuses.append(self.ask(method, path, body)), daemon=True)
        longest, looks = 0.0, 0
        request.start()
        while request.is_alive() or looks < LOOKS:
            began = time.monotonic()
            self.assertEqual(self.ask("GET", "/health", timeout_s=HEALTH_S * 10), 200,
                             "the server is frozen")
            longest = max(longest, time.monotonic() - began)
            looks += 1
        return longest, statuses[0] if statuses else 0

    def assert_lively(self, method: str, path: str, body: Any, status: int = 200) -> None:
        """/health is prompt while this is served."""
        longest = 0.0
        for _ in range(TRIES):
            longest, answered = self.longest_wait_s(method, path, body)
            self.assertEqual(answered, status)
            if longest < HEALTH_S:
                return
        self.fail("/health took %.1f s during %s %s" % (longest, method, path[:60]))


class ReminderTest(FreezingCase):
    """Texts of nothing but reminders, and a word at their end."""

    def requests(self, text: str) -> list[tuple[str, Any]]:
        parts = [{"type": "text", "text": text}]
        items = [{"role": "user", "content": [{"type": "input_text", "text": text}]}]
        return [("/v1/chat/completions", dict(chat(""), messages=[
                    {"role": "user", "content": parts}])),
                ("/v1/responses", dict(response(""), input=items)),
                ("/v1/messages", dict(message(""), messages=[
                    {"role": "user", "content": parts}]))]

    def test_many_reminders_and_a_word_freeze_nothing(self) -> None:
        for count in (30, 300, 3000):
            for path, body in self.requests(REMINDER % "a" * count + "word"):
                with self.subTest(count=count, path=path):
                    self.assert_lively("POST", path, body)

    def test_long_reminders_freeze_nothing(self) -> None:
        for count in (16, 160):
            for path, body in self.requests(REMINDER % ("x" * 4096) * count + "word"):
                with self.subTest(count=count, path=path):
                    self.assert_lively("POST", path, body)


class ModelNameTest(FreezingCase):
    """Names of models with a long tail of what clients hang behind them."""

    def names(self) -> list[str]:
        return [MODEL_TAIL * 39 + "!", MODEL_TAIL * 390 + "!", "[1m]" * 490 + "!", "-v1:0" * 39,
                "-20" * 66, "-2025-01-01" * 18 + "-"]

    def test_a_long_tail_of_a_model_name_freezes_nothing(self) -> None:
        for name in self.names():
            with self.subTest(name=name[:20], size=len(name)):
                self.assert_lively("POST", "/v1/chat/completions", chat("hi", name), 404)

    def test_a_long_tail_in_the_url_freezes_nothing(self) -> None:
        for name in self.names():
            with self.subTest(name=name[:20], size=len(name)):
                path = "/v1/models/" + urllib.parse.quote(name)
                self.assert_lively("GET", path, None, 404)


class JsonTest(FreezingCase):
    """Bodies that are small on the wire and large in memory, or slow to read."""

    def peak_bytes(self) -> int:
        """The most memory that the server ever took; 0 where the system does not tell it."""
        try:
            with open("/proc/%d/status" % self.pid, encoding="ascii") as file:
                return next(int(line.split()[1]) * 1024 for line in file
                            if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            return 0

    def test_thirty_megabytes_of_empty_lists_neither_freeze_nor_fill_the_memory(self) -> None:
        before = self.peak_bytes()
        for piece in (b"[],", b'{"a":1},', b'"ab",', b"1000,", b"1.5,"):
            for size in (3_000_000, 30_000_000) if SLOW or piece == b"[]," else (3_000_000,):
                body = b"[" + piece * (size // len(piece)) + b"0]"
                body = b'{"model":"gpt-4.1","messages":[],"x":' + body + b"}"
                with self.subTest(piece=piece, size=size):
                    status = 413 if size > 3_000_000 or piece in (b"[],", b'{"a":1},') else 400
                    self.assert_lively("POST", "/v1/chat/completions", body, status)
        self.assertLess(self.peak_bytes() - before, 8 * 30_000_000)

    def test_numbers_of_many_digits_freeze_nothing(self) -> None:
        for digits in (5_000, 1_000_000, 10_000_000):
            with self.subTest(digits=digits):
                body = b'{"model":"gpt-4.1","messages":[],"n":' + b"9" * digits + b"}"
                self.assert_lively("POST", "/v1/chat/completions", body, 400)

    def test_deep_nesting_freezes_nothing(self) -> None:
        for depth in (980, 9_800, 1_000_000):
            for path in ("/v1/chat/completions", "/v1/responses/compact", "/v1/messages"):
                with self.subTest(depth=depth, path=path):
                    nested = b"[" * depth + b"]" * depth
                    self.assert_lively("POST", path, b'{"model":"gpt-4.1","input":' + nested + b"}",
                                       400)


if __name__ == "__main__":
    unittest.main()
