"""What `models`, `check-usage`, `stats` and `completion` print, of an account and of a running
server, on a wide terminal and on a narrow one (section 23)."""
from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
import threading
import unittest
import unittest.mock
from typing import Any

from support import ProxyCase, chat, cp, response, run_main, wait_until
from cases import CliCase
from fake_upstream import make_model

LONG = "accounts/msft/routers/a-model-with-a-very-long-name"


class NarrowTest(CliCase):
    """60 columns."""

    def test_no_line_of_models_and_check_usage_is_wider(self) -> None:
        self.fake.models = [*self.fake.models, make_model(LONG)]
        for command in ("models", "check-usage"):
            for columns in (60, 80):
                code, text = self.run_here(command, COLUMNS=str(columns))
                self.assertEqual(code, 0, text)
                self.assertLessEqual(max(map(len, text.splitlines())), columns, text)
        code, text = self.run_here("models", "--all", COLUMNS="60")
        self.assertIn(LONG + "\n", text)
        self.assertIn("\n  disabled\n", text)
        self.assertRegex(text, r"gpt-5\.3-codex +400k +128k +\$1\.75/\$14\.00\n")

    def test_what_does_not_fit_goes_below(self) -> None:
        fit = cp.fit_line
        self.assertEqual(fit("head ", ["one", "two"], 80), "head one, two")
        self.assertEqual(fit("head ", ["one", "two", "three"], 14), "head\n  one, two,\n  three")
        self.assertEqual(fit("   ", ["one", "two"], 5), "  one,\n  two")
        self.assertEqual(fit("head ", ["x" * 30], 10), "head\n  " + "x" * 30)

    def test_counts_and_spans_are_short(self) -> None:
        for value, text in ((None, "?"), (0, "?"), (900, "900"), (9999, "9999"), (10000, "10k"),
                            (128000, "128k"), (1050000, "1.05M"), ("x", "?"), (-5, "?")):
            self.assertEqual(cp.short_count(value), text)
        for seconds, text in ((0, "0 s"), (59.9, "59 s"), (60, "1 min"), (4000, "1 h 6 min"),
                              (90000, "1 d 1 h")):
            self.assertEqual(cp.span_text(seconds), text)


class ServerTest(ProxyCase):
    """A server runs, and nobody is logged in where the command runs."""

    settings = {"no_history": False}

    def run_here(self, *args: str, **env: str) -> tuple[int, str]:
        with tempfile.TemporaryDirectory() as home:
            return run_main(home, *args, **{"PORT": str(self.proxy.port), **env})

    def test_models_and_usage_are_those_of_the_server(self) -> None:
        code, text = self.run_here("models")
        self.assertEqual(code, 0, text)
        self.assertRegex(text, r"gpt-5\.3-codex +/responses +400000 +128000 +\$1\.75/\$14\.00")
        self.assertNotIn("gpt-5.2", text)
        self.assertIn("gpt-5.2", self.run_here("models", "--all")[1])
        self.assertIn("gpt-4.1", [entry["id"] for entry in
                                  json.loads(self.run_here("models", "--json", "--url",
                                                           self.proxy.url)[1])])
        code, text = self.run_here("check-usage")
        self.assertEqual(code, 0, text)
        self.assertIn("nobody is logged in here, so %s is asked\n" % self.proxy.url, text)
        self.assertRegex(text, r"premium_interactions +\[#+\.+\] +24\.6 % used")
        code, text = self.run_here("check-usage", "--url", self.proxy.url, PORT="1")
        self.assertEqual(code, 0, text)

    def test_without_server_and_login_both_ways_are_named(self) -> None:
        for command in ("models", "check-usage"):
            code, text = self.run_here(command, PORT="1")
            self.assertEqual((code, text.count("\n")), (1, 1), text)
            self.assertIn("nobody is logged in: run copilot_proxy.py auth, or start the server",
                          text)

    def test_stats_tells_todays_figures(self) -> None:
        for agent in ("codex_cli_rs/0.9", "codex_cli_rs/1.0", "claude-cli/2"):
            self.assertEqual(self.proxy.post("/v1/chat/completions", chat("hi"),
                                             **{"User-Agent": agent}).status, 200)
        self.proxy.settle()
        wait_until(lambda: self.proxy.get("/history/summary").json["total"]["requests"] == 3)
        code, text = self.run_here("stats", COLUMNS="60")
        self.assertEqual(code, 0, text)
        self.assertEqual(text.splitlines()[0], self.proxy.url)
        self.assertRegex(text, r"\ntoday +3 requests, [\d.e-]+ credits\n")
        self.assertRegex(text, r"\ntokens +\d+ in, \d+ % of them cached, \d+ out\n")
        self.assertRegex(text, r"\nfirst byte +[\d.e-]+ s on average\n")
        self.assertRegex(text, r"\nmodels +gpt-4\.1, 3 requests")
        self.assertRegex(text, r"\nclients +Codex, 2 requests")
        self.assertRegex(text, r"\n +Claude Code, 1 request,")
        self.assertLessEqual(max(map(len, text.splitlines())), 60)
        told = json.loads(self.run_here("stats", "--json")[1])
        self.assertEqual(told["today"]["total"]["requests"], 3)
        self.assertEqual(told["stats"]["version"], cp.__version__)

    def test_reported_credits_stand_beside_those_of_the_listed_prices(self) -> None:
        for _ in range(2):
            self.assertEqual(self.proxy.post("/v1/responses", response("hi")).status, 200)
        self.proxy.settle()
        line, = self.proxy.get("/stats").json["price_check"]
        self.assertEqual(line["requests"], 2)
        for command in ("stats", "check-usage"):
            code, text = self.run_here(command, COLUMNS="100")
            self.assertEqual(code, 0, text)
            self.assertRegex(text, r"\nprices +gpt-5\.3-codex, %s credits reported, %s by the "
                                   r"listed prices, %s\n" % tuple(map(re.escape, (
                                       "%.4g" % line["reported"], "%.4g" % line["estimated"],
                                       "%+.3g" % line["difference"]))))

    def test_stats_of_a_server_that_is_not_there_names_the_flags(self) -> None:
        code, text = self.run_here("stats", PORT="1")
        self.assertEqual((code, text.count("\n")), (1, 1), text)
        for word in ("127.0.0.1:1:", "--port", "--url"):
            self.assertIn(word, text)

    def test_an_answer_of_something_else_is_no_traceback(self) -> None:
        for stats in ({}, {"uptime_s": "x", "running": 5, "limits": [1, {"until": {}}],
                           "budget": {"limit": "9", "used": []}, "totals": [],
                           "version": {"a": 1}, "price_check": [7, {}, {"reported": "x"}]}):
            for today in ({}, {"enabled": True, "total": 5, "by_model": [3, {}]},
                          {"enabled": 1, "total": {"requests": "x", "credits": "y",
                                                   "first_ms": "1e999"}, "by_client": 7}):
                with self.subTest(stats=stats, today=today):
                    for label, parts in cp.stats_rows(stats, today):
                        self.assertTrue(cp.fit_line(label, parts, 60))
        self.assertTrue(cp.model_table([{}, {"id": 5, "price": {"input": []},
                                             "supported_endpoints": [1]}], 60))


class KeyTest(ProxyCase):
    """A server that wants a key."""

    settings = {"api_key": ("made-up-key",)}

    def test_the_key_is_a_flag_or_a_variable(self) -> None:
        url = self.proxy.url
        with tempfile.TemporaryDirectory() as home:
            for command in ("stats", "models", "check-usage"):
                for args, env, wanted in (
                        ((), {}, 1), (("--key", "made-up-key"), {}, 0),
                        ((), {"COPILOT_PROXY_API_KEY": "made-up-key"}, 0)):
                    code, text = run_main(home, command, "--url", url, *args, **env)
                    self.assertEqual(code, wanted, text)
                    self.assertNotIn("made-up-key", text)


class DemoTest(unittest.TestCase):
    """The demo's account is in the server alone."""

    def test_its_models_and_usage_are_shown(self) -> None:
        settings = cp.Settings(port=0, demo=True)
        upstream = cp.start_demo(settings)
        self.addCleanup(upstream.finish, 0)
        app = cp.App(settings, {})
        self.addCleanup(app.close)
        app.login.use(app.login.load())
        server = cp.Server(app, cp.ROUTES, "127.0.0.1", 0)
        server.start()
        self.addCleanup(server.finish, 0)
        with tempfile.TemporaryDirectory() as home:
            for command, word in (("models", "gpt-5-mini"), ("check-usage", "demo, plan demo"),
                                  ("stats", "demo, up ")):
                code, text = run_main(home, command, PORT=str(server.server_port))
                self.assertEqual(code, 0, text)
                self.assertIn(word, text)


class ProgressTest(unittest.TestCase):
    """Long work shows that it goes on."""

    def test_a_terminal_shows_what_is_waited_for_and_the_line_goes(self) -> None:
        shown: list[str] = []
        seen = threading.Event()

        class Handler(cp.LogHandler):               # type: ignore[misc]
            def show(self, status: str) -> None:
                shown.append(status)
                if len(shown) > 1:
                    seen.set()

        log = logging.getLogger("copilot_proxy.progress_test")
        log.propagate = False
        log.handlers[:] = [Handler(None, {})]
        app: Any = type("App", (), {"log": log})
        with unittest.mock.patch.object(cp, "PROGRESS_S", 0.001):
            with cp.progress(app, "asking x"):
                self.assertTrue(seen.wait(10))
        self.assertRegex(shown[0], r"\Aasking x \.\.\. \d+ s\Z")
        self.assertEqual(shown[-1], "")


class CompletionTest(unittest.TestCase):
    """completion."""

    def script(self, shell: str) -> str:
        with tempfile.TemporaryDirectory() as home:
            code, text = run_main(home, "completion", shell)
        self.assertEqual(code, 0, text)
        return text

    def test_each_shell_gets_every_command_option_and_client(self) -> None:
        for shell in ("bash", "zsh", "fish"):
            text = self.script(shell)
            for word in [*cp.COMMANDS, *cp.CLIENTS, *cp.SERVICES]:
                self.assertIn(word, text, shell)
            for option in cp.OPTIONS:
                self.assertRegex(text, r"(--|-l )%s\b" % option.name)
            for mark in ("SCRIPT", "CASES", "LINES", "COMMANDS", "%%"):
                self.assertNotIn(mark, text)
            self.assertLessEqual(text.count("\t"), 0)

    def test_another_shell_is_refused(self) -> None:
        with tempfile.TemporaryDirectory() as home:
            for words in (("completion", "bsh"), ("completion",)):
                code, text = run_main(home, *words)
                self.assertEqual((code, text.count("\n")), (2, 1), text)
                self.assertIn("bash, zsh, fish", text)

    @unittest.skipUnless(shutil.which("bash") and os.name == "posix", "no bash here")
    def test_bash_completes_what_is_typed(self) -> None:
        script = self.script("bash")
        for words, wanted in (
                (["copilot_proxy.py", "st"], {"start", "stats"}),
                (["./copilot_proxy.py", "setup", "claude-c"], {"claude-code"}),
                (["python3", "copilot_proxy.py", "mod"], {"models"}),
                (["python3", "copilot_proxy.py", "start", "--max"], {"--max-concurrency"}),
                (["python3", "copilot_proxy.py", "start", "--lang", ""], {"en", "zh"}),
                (["copilot_proxy.py", "auth", "-a", "bus"], {"business"}),
                (["copilot_proxy.py", "completion", "z"], {"zsh"}),
                (["python3", "other.py", "st"], set()), (["python3", "cop"], set())):
            code = "%s\nCOMP_WORDS=(\"$@\"); COMP_CWORD=%d\n_copilot_proxy\n" \
                   "printf '%%s\\n' \"${COMPREPLY[@]}\"" % (script, len(words) - 1)
            done = subprocess.run(["bash", "-c", code, "bash", *words], stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, timeout=20)
            with self.subTest(words=words):
                self.assertEqual(set(done.stdout.decode().split()), wanted)


if __name__ == "__main__":
    unittest.main()
