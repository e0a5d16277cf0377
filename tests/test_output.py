"""Standard output and standard error that nobody reads, that are full, dead or closed; SIGHUP."""
from __future__ import annotations

import contextlib
import http.client
import io
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from typing import Any, Callable
from unittest import mock

from support import (DEADLINE_S, SLOW, ProxyCase, Reply, accepts, ask, chat,
                     clean_environment, compiled, cp, long_run, send, start_process, wait_until)
from cases import CliCase

POSIX = os.name == "posix"
END_S = 10.0                 # for a server that has been told to end: "in time"


def full_pipe() -> tuple[int, int]:
    """(read end, write end) of a pipe that takes no byte more."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    for piece in (b"x" * 4096, b"x"):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(write, piece)
    os.set_blocking(write, True)
    return read, write


def dead_pipe() -> int:
    """The write end of a pipe whose reader is gone."""
    read, write = os.pipe()
    os.close(read)
    return write


@unittest.skipUnless(POSIX, "pipes that can be filled")
class UnreadTest(unittest.TestCase):
    """A real process, whose output goes where the test says."""

    def pipe(self, make: Callable[[], Any]) -> int:
        made = make()
        ends = made if isinstance(made, tuple) else (made,)
        for end in ends:
            self.addCleanup(os.close, end)
        return int(ends[-1])

    def serve(self, stdout: int, stderr: int, *args: str) -> tuple[Any, Any]:
        """(process, connection) of a demo server."""
        home = tempfile.TemporaryDirectory()
        self.addCleanup(home.cleanup)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        process = start_process(
            "start", "--demo", "--port", str(port), *args, home=home.name,
            environ=clean_environment(home.name), ends=(subprocess.DEVNULL, stdout, stderr))
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
        self.addCleanup(connection.close)
        wait_until(lambda: process.poll() is not None or accepts("http://127.0.0.1:%d" % port))
        return process, connection

    def check(self, stdout: int, stderr: int, count: int = 1000) -> Any:
        """All requests are served and SIGTERM ends it -> what /stats says of the log."""
        process, connection = self.serve(stdout, stderr, "-v")
        served = 0
        for _ in range(count):
            served += send(connection, "GET", "/v1/models").status == 200
        self.assertEqual(served, count)
        log = send(connection, "GET", "/stats").json["log"]
        connection.close()
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(END_S), 0)
        return log

    def test_a_thousand_requests_while_nobody_reads_stderr(self) -> None:
        self.check(subprocess.DEVNULL, self.pipe(os.pipe), 1000 if SLOW else 300)

    @long_run
    def test_a_full_stderr_stops_nothing(self) -> None:
        self.check(subprocess.DEVNULL, self.pipe(full_pipe), 50)

    @long_run
    def test_a_full_stdout_stops_nothing(self) -> None:
        self.check(self.pipe(full_pipe), subprocess.DEVNULL, 50)

    @long_run
    def test_both_full_and_the_same_stop_nothing(self) -> None:
        end = self.pipe(full_pipe)
        self.check(end, end, 50)

    @long_run
    def test_a_dead_stdout_is_no_end_at_the_banner(self) -> None:
        self.check(self.pipe(dead_pipe), subprocess.DEVNULL, 50)

    @long_run
    def test_a_dead_stderr_is_counted(self) -> None:
        end = self.pipe(dead_pipe)
        self.assertGreater(self.check(end, end, 200)["lost_lines"], 100)

    @unittest.skipUnless(os.path.exists("/dev/full"), "a device that is always full")
    @long_run
    def test_a_full_disk_stops_nothing(self) -> None:
        end = self.pipe(lambda: os.open("/dev/full", os.O_WRONLY))
        self.check(end, end, 50)

    @long_run
    def test_what_was_logged_before_the_end_is_written(self) -> None:
        with tempfile.TemporaryFile() as file:
            self.check(subprocess.DEVNULL, file.fileno(), 200)
            file.seek(0)
            self.assertEqual(file.read().count(b" GET /models "), 200)

    @long_run
    def test_a_reader_that_comes_late_gets_whole_lines_and_the_number_of_lost_ones(self) -> None:
        read, write = os.pipe()
        self.addCleanup(os.close, write)
        process, connection = self.serve(subprocess.DEVNULL, write)
        path = "/" + "a" * 70                       # the log shows 80 characters of it

        def lost() -> int:
            for _ in range(200):
                send(connection, "GET", path)
            return int(send(connection, "GET", "/metrics").body.decode().split(
                "\ncopilot_proxy_log_lines_lost_total ")[1].split("\n")[0])

        wait_until(lost, "lines are lost", 60)
        text = bytearray()
        with open(read, "rb", buffering=0) as reader:
            wait_until(lambda: text.extend(reader.read(65536))
                       or b"lines of the log are lost" in text)
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(END_S), 0)
        lines = bytes(text).decode().split("\n")[:-1]
        odd = [line for line in lines if "GET /aaa" not in line and "are lost" not in line
               and "GET /metrics" not in line and "copilot token" not in line]
        self.assertEqual(odd, [])


class QueueTest(unittest.TestCase):
    """The stream by itself."""

    def open(self, stream: Any) -> tuple[cp.QueuedOutput, list[int]]:
        reports: list[int] = []
        output = cp.QueuedOutput(stream, reports.append)
        self.addCleanup(output.close)
        return output, reports

    def test_a_stream_without_a_file_gets_everything_in_order(self) -> None:
        stream = io.StringIO()
        output, reports = self.open(stream)
        for number in range(1000):
            output.write("%d\n" % number)
        output.close()
        self.assertEqual(stream.getvalue(), "".join("%d\n" % n for n in range(1000)))
        self.assertEqual((output.lost, reports), (0, []))

    def test_a_stream_that_blocks_keeps_nobody_waiting_and_memory_small(self) -> None:
        gate, taken = threading.Event(), []

        class Blocking(io.StringIO):
            def write(self, text: str) -> int:
                gate.wait(DEADLINE_S)
                taken.append(text)
                return len(text)

        output, reports = self.open(Blocking())
        began = time.monotonic()
        line = "x" * 99 + "\n"
        for _ in range(50000):
            output.write(line)
        self.assertLess(time.monotonic() - began, DEADLINE_S / 2)
        self.assertGreater(output.lost, 30000)
        gate.set()
        wait_until(lambda: reports, "the loss is reported once there is room")
        output.close()
        self.assertEqual(sum(reports), output.lost)
        self.assertEqual(sum(text.count("\n") for text in taken) + output.lost, 50000)
        self.assertLess(sum(map(len, taken)), 3 * cp.OUTPUT_QUEUE_CHARS)

    def test_the_end_does_not_wait_for_a_stream_that_blocks(self) -> None:
        gate = threading.Event()
        self.addCleanup(gate.set)
        stream = io.StringIO()
        setattr(stream, "write", lambda text: gate.wait(DEADLINE_S))
        output, _ = self.open(stream)
        output.write("a\n")
        began = time.monotonic()
        with mock.patch.object(cp, "OUTPUT_END_S", 0.1):
            output.close()
        self.assertLess(time.monotonic() - began, DEADLINE_S / 2)
        gate.set()

    def test_closed_streams_and_streams_that_refuse_are_counted(self) -> None:
        stream = io.StringIO()
        stream.close()
        output, _ = self.open(stream)
        output.write("a\nb\n")
        wait_until(lambda: output.lost == 2)

    def test_it_looks_like_its_stream(self) -> None:
        stream = io.StringIO()
        setattr(stream, "isatty", lambda: True)
        output, _ = self.open(stream)
        self.assertTrue(output.isatty())
        self.assertRaises(OSError, output.fileno)


class StatsTest(ProxyCase):
    def test_stats_and_metrics_tell_what_the_logs_own_streams_have_lost(self) -> None:
        stream = io.StringIO()
        setattr(stream, "lost", 7)
        handler = logging.StreamHandler(stream)
        self.proxy.app.log.addHandler(handler)
        self.addCleanup(self.proxy.app.log.removeHandler, handler)
        self.assertEqual(self.proxy.get("/stats").json["log"], {"lost_lines": 7})
        self.assertIn(b"copilot_proxy_log_lines_lost_total 7\n", self.proxy.get("/metrics").body)


@unittest.skipUnless(POSIX, "SIGHUP")
class HangUpTest(CliCase):
    def started(self, handling: Any) -> tuple[Any, str]:
        """A server that was begun with SIGHUP as its default, or ignored."""
        printed, writer = os.pipe()
        lines = open(printed, "rb")
        self.addCleanup(lines.close)
        process = start_process(
            "start", "--port", "0", "--grace", "3000", "--github-url", self.fake.url,
            "--github-token", "ghu_fake", home=self.home,
            environ=clean_environment(self.home),
            ends=(subprocess.DEVNULL, writer, subprocess.DEVNULL),
            signals=((signal.SIGHUP, handling),))
        os.close(writer)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        line = b""
        while b"Anthropic clients" not in line:
            line = lines.readline()
            self.assertTrue(line, "no banner")
        return process, line.split()[-1].decode()

    def stream(self, url: str) -> tuple[threading.Thread, list[Reply]]:
        answers: list[Reply] = []
        caller = threading.Thread(target=lambda: answers.append(
            ask(url, "POST", "/v1/chat/completions", chat("@@stall=1 events=3@@", stream=True))))
        caller.start()
        self.assertTrue(self.fake.wait_for(lambda: self.fake.holding))
        return caller, answers

    def test_a_terminal_that_is_closed_cuts_no_stream(self) -> None:
        process, url = self.started(signal.SIG_DFL)
        caller, answers = self.stream(url)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: not accepts(url), "the port closes")
        process.send_signal(signal.SIGHUP)            # by the system, after the shell's
        self.assertIsNone(process.poll())
        self.fake.release()
        caller.join(DEADLINE_S)
        self.assertTrue(answers and answers[0].is_done)
        self.assertEqual(process.wait(END_S), 0)

    def test_under_nohup_it_goes_on(self) -> None:
        process, url = self.started(signal.SIG_IGN)
        process.send_signal(signal.SIGHUP)
        self.assertEqual(ask(url, "GET", "/health").status, 200)
        process.send_signal(signal.SIGHUP)
        self.assertEqual(ask(url, "GET", "/health").status, 200)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(END_S), 0)


@unittest.skipUnless(POSIX, "pipes")
class CommandTest(CliCase):
    """Commands that print and end."""

    def run_into(self, stdout: int, *args: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-I", "-S", compiled(), *args], env=clean_environment(self.home),
            cwd=self.home, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
            timeout=60)
        return done.returncode, done.stderr.decode()

    def test_a_reader_that_leaves_is_no_traceback(self) -> None:
        end = dead_pipe()
        self.addCleanup(os.close, end)
        for args in (("debug",), ("debug", "--json")):
            with self.subTest(args=args):
                self.assertEqual(self.run_into(end, *args), (1, ""))

    @unittest.skipUnless(os.path.exists("/dev/full"), "a device that is always full")
    def test_a_full_disk_is_told_in_one_line(self) -> None:
        with open("/dev/full", "wb") as full:
            code, errors = self.run_into(full.fileno(), "debug")
        self.assertEqual((code, errors.count("\n")), (1, 1), errors)
        self.assertIn("standard output", errors)


if __name__ == "__main__":
    unittest.main()
