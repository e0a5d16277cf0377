"""A login on a terminal, a start without a network, and what is said at the end (sections 14, 17
and 23)."""
from __future__ import annotations

import base64
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import unittest
import unittest.mock
from typing import Any

from support import (Proxy, ProxyCase, ask, chat, clean_environment, cp, long_run, run_main,
                     start_process, wait_until)
from cases import CliCase
from fake_upstream import CHAT, DEVICE_CODE, Answer, FakeUpstream

POSIX = os.name == "posix"


@unittest.skipUnless(POSIX, "pseudo terminals are POSIX's")
class TerminalTest(CliCase):
    """auth and start, where a person sits."""

    def open(self, *args: str, **env: str) -> None:
        import pty
        self.master, slave = pty.openpty()
        self.addCleanup(os.close, self.master)
        environ = clean_environment(self.home, TERM="xterm", BROWSER="echo BROWSER %s", **env)
        self.process = start_process(*args, home=self.home, environ=environ,
                                     ends=(slave, slave, slave), has_session=True,
                                     has_terminal=True)
        os.close(slave)
        self.addCleanup(self.process.wait)
        self.addCleanup(self.process.kill)
        self.shown = b""
        reader = threading.Thread(target=self.read, daemon=True)
        reader.start()
        self.addCleanup(reader.join, 5)

    def read(self) -> None:
        try:
            while True:
                part = os.read(self.master, 65536)
                if not part:
                    return
                self.shown += part
        except OSError:                              # Linux says EIO at the end
            return

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.shown.decode("utf-8", "replace"), text)

    def test_the_code_is_counted_down_and_enter_copies_it_and_opens_the_page(self) -> None:
        self.fake.device.interval = 3600
        self.fake.device.expires_in = 899.4                # the first second is a short one
        self.open("auth", "--github-url", self.fake.url, DISPLAY=":9")
        self.wait_for("FAKE-0001")
        self.wait_for("Press Enter to copy the code and to open the page.")
        self.wait_for("waiting for the login, 14:59 left")
        self.wait_for("waiting for the login, 14:58 left")
        self.assertNotIn(b"BROWSER", self.shown)
        os.write(self.master, b"\n")
        self.wait_for("BROWSER " + self.fake.url + "/login/device")
        code = base64.b64encode(b"FAKE-0001").decode()
        self.assertIn("\x1b]52;c;%s\x07" % code, self.shown.decode())
        self.process.send_signal(signal.SIGINT)
        self.assertEqual(self.process.wait(10), 130)
        self.assertNotIn(b"Fatal", self.shown)
        self.assertNotIn(b"Traceback", self.shown)

    def test_the_line_is_gone_when_somebody_is_logged_in(self) -> None:
        self.fake.device.interval = 0
        self.fake.device.outcomes.clear()
        self.open("start", "--port", "0", "--github-url", self.fake.url)
        self.wait_for("logged in as octocat, plan individual")
        self.assertIn(b"Press Enter to copy the code.\r\n", self.shown)     # there is no screen
        self.process.send_signal(signal.SIGTERM)
        self.assertEqual(self.process.wait(10), 0)
        self.wait_for("served 0 requests in ")
        text = self.shown.decode()
        last = text[text.rindex("waiting for the login"):] if "waiting for" in text else "\r\x1b[K"
        self.assertIn("\r\x1b[K", last)

    @long_run
    def test_the_end_of_the_input_keeps_no_processor_busy(self) -> None:
        self.fake.device.interval = 3600
        self.open("auth", "--github-url", self.fake.url)
        self.wait_for("Press Enter to copy the code.")
        os.write(self.master, b"\x04")                       # Ctrl-D
        self.wait_for("14:58 left")
        times = os.path.join("/proc", str(self.process.pid), "stat")
        if not os.path.exists(times):
            self.skipTest("no /proc here")

        def used() -> int:
            with open(times, encoding="ascii") as file:
                return int(file.read().rsplit(")", 1)[1].split()[11])

        before = used()
        self.wait_for("14:56 left")
        self.assertLess(used() - before, 0.5 * os.sysconf("SC_CLK_TCK"))
        self.assertNotIn(b"\x1b]52", self.shown)

    @long_run
    def test_in_chinese_where_that_is_wanted(self) -> None:
        self.fake.device.interval = 3600
        self.open("auth", "--lang", "zh", "--github-url", self.fake.url, DISPLAY=":9")
        self.wait_for("输入代码   FAKE-0001")
        self.wait_for("按回车键复制代码并打开网页。")
        self.wait_for("等待登录，剩余 14:59")


class PageTest(unittest.TestCase):
    """What may be opened."""

    def test_only_a_page_of_the_github_that_is_meant_is_opened(self) -> None:
        settings = cp.Settings()
        screen = {"DISPLAY": ":0"}
        good = "https://github.com/login/device"
        with unittest.mock.patch.object(cp.sys, "platform", "linux"):
            self.assertEqual(cp.can_open(good, settings, screen), POSIX or True)
            for url in ("http://github.com/login", "https://github.com.evil.example/login",
                        "https://evil.example/github.com/", "file:///etc/passwd",
                        "javascript:alert(1)", "https://github.com@evil.example/login",
                        "https://github.com", "https://github.com:444/login", "-x", ""):
                self.assertFalse(cp.can_open(url, settings, screen), url)
            if POSIX:
                for environ in ({}, {"DISPLAY": ":0", "SSH_CONNECTION": "a b"}):
                    self.assertFalse(cp.can_open(good, settings, environ))

    def test_who_runs_in_the_background_reads_no_keyboard(self) -> None:
        with open(os.devnull, encoding="ascii") as nothing, \
                unittest.mock.patch.object(sys, "stdin", nothing):
            self.assertFalse(cp.is_at_keyboard())
        with unittest.mock.patch.object(sys, "stdin", None):
            self.assertFalse(cp.is_at_keyboard())


class NoNetworkTest(unittest.TestCase):
    """start where GitHub cannot be reached, and nobody calls."""

    def test_the_login_is_tried_again_by_itself_and_told_once(self) -> None:
        with FakeUpstream() as fake, unittest.mock.patch.object(cp, "LOGIN_PAUSE_S", (0.01, 0.02)):
            fake.device.interval = 0
            fake.device.outcomes.clear()
            fake.script(DEVICE_CODE, *[Answer(status=503, body="away")] * 4)
            with Proxy(fake, login=False) as proxy:
                proxy.app.login.begin()
                wait_until(lambda: proxy.app.login.account is not None)
                self.assertGreaterEqual(fake.count(DEVICE_CODE), 3)
                wait_until(lambda: "logged in as octocat, plan individual" in proxy.log_text())
                told = [record for record in proxy.logs if "503" in record.getMessage()]
                self.assertEqual(len(told), 1, [record.getMessage() for record in told])
                self.assertEqual(told[0].levelname, "ERROR")
                self.assertIn("it is tried again", told[0].getMessage())
                success = [record for record in proxy.logs if "logged in" in record.getMessage()]
                self.assertEqual([record.levelname for record in success], ["INFO"])
                self.assertEqual(proxy.post("/v1/chat/completions", chat("hi")).status, 200)

    def test_a_refusal_is_not_repeated(self) -> None:
        with FakeUpstream() as fake, unittest.mock.patch.object(cp, "LOGIN_PAUSE_S", (0.001,)):
            fake.device.interval = 0
            fake.device.outcomes.clear()
            fake.device.outcomes.extend(["denied"] * 3)
            with Proxy(fake, login=False) as proxy:
                proxy.app.login.begin()
                wait_until(lambda: "cancelled" in proxy.log_text())
                threads = {thread.name for thread in threading.enumerate()}
                wait_until(lambda: "device-login" not in {
                    thread.name for thread in threading.enumerate()}, str(threads))
                self.assertEqual(fake.count(DEVICE_CODE), 1)

    def test_the_line_names_the_port(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        import tempfile
        with tempfile.TemporaryDirectory() as home:
            code, text = run_main(home, "check-usage", "--github-url", "http://127.0.0.1:%d" % port,
                                  "--github-token", "ghu_fake")
        self.assertEqual(code, 1)
        self.assertIn("127.0.0.1:%d" % port, text)


class LimitLineTest(ProxyCase):
    """A 429."""

    def test_its_words_stand_in_the_log_once(self) -> None:
        self.fake.script(CHAT, Answer(status=429, headers={"retry-after": "3600"}, body={
            "error": {"message": "slow down, friend", "code": "rate_limited"}}))
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("hi")).status, 429)
        wait_until(lambda: "slow down, friend" in self.proxy.log_text())
        self.proxy.settle()
        text = self.proxy.log_text()
        self.assertEqual(text.count("slow down, friend"), 1, text)
        self.assertIn("gpt-4.1 has reached a limit of GitHub", text)


class EndTest(CliCase):
    """Ctrl-C."""

    def test_it_says_for_what_it_waits_and_a_second_one_ends_at_once(self) -> None:
        command = self.start("--grace", "3000")
        self.stalled(command.wait_for_url())
        command.process.send_signal(signal.SIGINT)
        line = command.wait_for("waiting up to")
        self.assertIn("waiting up to 3000 s for 1 request; Ctrl-C again ends now", line)
        command.process.send_signal(signal.SIGINT)
        self.assertEqual(command.wait(5), 130)

    def test_the_session_is_summed_up(self) -> None:
        command = self.start()
        url = command.wait_for_url()
        for model, status in (("gpt-4.1", 200), ("no-such-thing", 404), ("gpt-4.1", 200)):
            self.assertEqual(ask(url, "POST", "/v1/chat/completions",
                                 chat("hi", model)).status, status)
        wait_until(lambda: command.output().count("POST /chat/completions") == 3,
                   "each has ended, also for the server")
        self.assertEqual(command.stop(signal.SIGINT), 130)
        line = command.output().splitlines()[-1]
        self.assertRegex(line, r"served 3 requests, [\d.e-]+ credits in \d+ s\Z")
        self.assertNotIn("waiting up to", command.output())

    def test_with_log_json_that_is_json_too(self) -> None:
        command = self.start("--log-json")
        command.wait_for_url()
        self.assertEqual(command.stop(), 0)
        told: Any = json.loads(command.output().splitlines()[-1])
        self.assertTrue(re.match(r"served 0 requests in \d+ s\Z", told["message"]), told)
        self.assertEqual(told["level"], logging.getLevelName(logging.INFO).lower())


if __name__ == "__main__":
    unittest.main()
