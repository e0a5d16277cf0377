"""The command line as a person and as a start script meet it."""
from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import unittest.mock
from typing import Any, Iterator

import support
from support import (SCRIPT, SLOW, Command, Reply, accepts, ask, chat, clean_environment,
                     long_run, message, patient, response, run_command, run_main, start_process,
                     wait_until)
import copilot_proxy as cp
from fake_upstream import CHAT, EXCHANGE, MODELS, USAGE, USER, Answer, FakeUpstream, Token
from cases import CliCase, MappingProxy

POSIX = os.name == "posix"
COMMANDS = ("start", "auth", "check-usage", "stats", "debug", "models", "setup")
SECRET = re.compile(r"gh[a-z]_\w{4,}|tid=\w+|s3cret")


def run_together(*commands: tuple[str, ...], **env: str) -> list[tuple[int, str]]:
    """Several commands that end by themselves, run at once."""
    with tempfile.TemporaryDirectory() as home, contextlib.ExitStack() as stack:
        started = [stack.enter_context(Command(*args, home=home, **env)) for args in commands]
        return [(command.wait(), command.output()) for command in started]


class HelpTest(unittest.TestCase):
    """--version, --help, wrong usage."""


    def test_help_of_each_command_shows_default_and_environment_name(self) -> None:
        """Where the options of network and login are only named, `start` explains them."""
        groups = {name: title for title, names in cp.OPTION_GROUPS.items() for name in names}
        for name in COMMANDS:
            output, _, rest = self.help_of(name).partition("explained by 'start --help':")
            named = rest.partition("\n\n")[0].split()
            entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=-)", output)]
            for option in cp.OPTIONS:
                taken = option.where == "network" or name in option.where.split()
                hidden = groups[option.name] in ("network", "login") and name != "start"
                if name == "auth" and groups[option.name] == "login":
                    hidden = False
                found = [entry for entry in entries
                         if re.match(r"(-\w( \S+)?, )?--%s( |\Z)" % option.name, entry)]
                with self.subTest(command=name, option=option.name):
                    self.assertEqual("--" + option.name in named, taken and hidden)
                    taken = taken and not hidden
                    self.assertEqual(len(found), int(taken))
                    for variable in option.variables if taken else ():
                        self.assertIn(variable, found[0])
                    if taken and option.default not in ("", None, (), False):
                        self.assertIn("default %s" % option.default, found[0])

    def help_of(self, name: str) -> str:
        printed = io.StringIO()
        with unittest.mock.patch.dict(os.environ, COLUMNS="2000"), \
                contextlib.redirect_stdout(printed), self.assertRaises(SystemExit) as end:
            cp.main([name, "--help"])
        self.assertFalse(end.exception.code)
        return printed.getvalue()

    def run_here(self, *args: str) -> tuple[int, str]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), \
                self.assertRaises(SystemExit) as end:
            cp.main(list(args))
        return int(end.exception.code or 0), printed.getvalue()

    def test_version_help_and_wrong_usage(self) -> None:
        version, none, unknown = run_together(("--version",), (), ("start", "--no-such-flag"))
        whole, foreign = self.run_here("--help"), self.run_here("models", "--port", "1")
        self.assertEqual(version, (0, "copilot_proxy %s (Python %s, %s)\n" % (
            cp.__version__, sys.version.split()[0], sys.platform)))
        self.assertEqual((whole[0], none[0]), (0, 2))
        for name in COMMANDS:
            self.assertIn(name, whole[1])
            self.assertIn(name, none[1])
        for code, output in (unknown, foreign):
            self.assertEqual(code, 2, output)
            self.assertIn("error:", output)
            self.assertNotIn("Traceback", output)


class BadValueTest(CliCase):
    """Values that cannot work: exit code 2 and the flag's or variable's name."""

    def refused(self, name: str, *args: str, **env: str) -> str:
        served = unittest.mock.patch.object(cp, "open_server", side_effect=AssertionError("served"))
        try:
            with served:
                code, output = run_main(self.home, *args, **env)
        except SystemExit as end:                  # argparse's own refusals
            code, output = int(end.code or 0), name
        self.assertEqual(code, 2, output)
        self.assertIn(name, output)
        self.assertNotIn("Traceback", output)
        self.assertLessEqual(len(output.splitlines()), 1)
        return output

    def test_values_of_flags(self) -> None:
        for args in (("--port", "99999"), ("--port", "-1"), ("--port", "x"),
                     ("--host", "0.0.0.0"), ("--host", "192.0.2.1"), ("--host", "::"),
                     ("--rate-limit", "-1"), ("--rate-limit", "nan"), ("--rate-limit", "often"),
                     ("--grace", "-3"), ("--grace", "inf"), ("--account-type", "friend"),
                     ("--github-url", "http://github.example"), ("--github-url", "github.com"),
                     ("--github-url", "https://user:s3cret@github.example"),
                     ("--copilot-url", "http://relay.example"), ("--copilot-url", "ftp://x"),
                     ("--github-url", "https://[::1"), ("--github-url", "https://x:port"),
                     ("--header", "nothing"), ("--header", "Host=evil.example"),
                     ("--header", "Authorization=Bearer x"), ("--header", "X Y=1"),
                     ("--header", "X-A=a\r\nX-B: b"), ("--model-alias", "a"),
                     ("--model-alias", "=b")):
            with self.subTest(args=args):
                output = self.refused(args[0], "start", *args)
                self.assertNotIn("s3cret", output)

    def test_values_of_variables(self) -> None:
        for name, value in (("PORT", "abc"), ("PORT", "70000"), ("COPILOT_PROXY_PORT", "1.5"),
                            ("COPILOT_PROXY_RATE_LIMIT", "x"), ("COPILOT_PROXY_VERBOSE", "maybe"),
                            ("HOST", "0.0.0.0"), ("COPILOT_PROXY_DEMO", "2")):
            with self.subTest(name=name):
                named = {"70000": "--port", "0.0.0.0": "--host"}.get(value, name)
                self.refused(named, "start", **{name: value})

    def test_a_ca_file_that_cannot_be_used_is_refused_at_once_by_every_command(self) -> None:
        broken = os.path.join(self.home, "broken.pem")
        with open(broken, "w", encoding="ascii") as file:
            file.write("no certificate")
        for name in ("/no/such/file.pem", broken):
            for command in ("models", "check-usage"):
                self.refused(name, command, "--ca-file", name, "--github-token", "ghu_fake",
                             "--github-url", "https://octo.invalid")
        with self.start("--ca-file", "/no/such/file.pem") as command:
            self.assertEqual(command.wait(), 2, command.output())
            self.assertIn("/no/such/file.pem", command.output())

    def test_a_host_beyond_loopback_is_refused_with_the_reason(self) -> None:
        output = self.refused("--host", "start", "--host", "0.0.0.0", "--port", "0")
        self.assertIn("--api-key", output)

    def test_proxies_of_an_unknown_kind_are_named(self) -> None:
        for url in ("socks5://127.0.0.1:1080", "https://proxy.example"):
            with self.subTest(url=url):
                code, output = self.run_here("models", HTTPS_PROXY=url)
                self.assertEqual(code, 2, output)
                self.assertIn("proxy", output)

    def test_a_proxy_with_a_port_that_is_none_is_a_line_not_a_traceback(self) -> None:
        code, output = run_main(self.home, "models", "--github-url", "https://octo.invalid",
                                "--github-token", "ghu_fake",
                                HTTPS_PROXY="http://127.0.0.1:abc")
        self.assertIn(code, (1, 2))
        self.assertEqual(output.count("\n"), 1)
        self.assertIn("error: ", output)

    def test_proxy_env_insists(self) -> None:
        self.refused("--proxy-env", "models", "--proxy-env", "--github-url", self.fake.url)
        code, output = self.run_here("models", "--proxy-env", HTTPS_PROXY="http://127.0.0.1:1")
        self.assertEqual(code, 0, output)


class DemoTest(unittest.TestCase):
    """`start --demo` from an empty folder with a lone copy of the file."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.folders = contextlib.ExitStack()
        cls.home = cls.folders.enter_context(tempfile.TemporaryDirectory())
        place = cls.folders.enter_context(tempfile.TemporaryDirectory())
        lone = shutil.copy(SCRIPT, place)
        cls.place = place
        with unittest.mock.patch.object(support, "SCRIPT", lone), \
                unittest.mock.patch.object(support, "SLOW", True):     # from source
            began = time.monotonic()
            cls.command = cls.folders.enter_context(Command(
                "start", "--demo", "--port", "0", home=cls.home, GH_TOKEN="ghu_not_for_the_demo",
                HTTPS_PROXY="http://127.0.0.1:1", HTTP_PROXY="http://127.0.0.1:1"))
            cls.url = cls.command.wait_for_url()
            cls.health = ask(cls.url, "GET", "/health")
            sys.stderr.write("[first 200 on /health after %.2f s] " % (time.monotonic() - began))

    @classmethod
    def tearDownClass(cls) -> None:
        cls.folders.close()

    def test_health_is_ready_at_once(self) -> None:
        self.assertEqual(self.health.status, 200)
        self.assertIs(self.health.json["demo"], True)
        wait_until(lambda: ask(self.url, "GET", "/health").json["status"] == "ok")

    def test_every_route_answers(self) -> None:
        for path, key in (("/v1/models", "data"), ("/v1/models/gpt-4.1", "id"),
                          ("/usage", "quota_snapshots"), ("/health", "status")):
            with self.subTest(path=path):
                answer = ask(self.url, "GET", path)
                self.assertEqual(answer.status, 200, answer)
                self.assertIn(key, answer.json)
        counted = ask(self.url, "POST", "/v1/messages/count_tokens", message("hello"))
        self.assertGreater(counted.json["input_tokens"], 0)
        page = ask(self.url, "GET", "/dashboard")
        self.assertEqual((page.status, page.headers["content-type"]),
                         (200, "text/html; charset=utf-8"))
        self.assertEqual(ask(self.url, "GET", "/token").status, 404)

    def test_every_dialect_says_that_it_is_the_demo(self) -> None:
        chatted = ask(self.url, "POST", "/v1/chat/completions", chat("Hi")).json
        self.assertIn("demo", chatted["choices"][0]["message"]["content"])
        self.assertGreater(chatted["usage"]["completion_tokens"], 0)
        responded = ask(self.url, "POST", "/v1/responses", response("Hi")).json
        self.assertIn("demo", responded["output"][0]["content"][0]["text"])
        self.assertGreater(responded["usage"]["output_tokens"], 0)
        messaged = ask(self.url, "POST", "/v1/messages", message("Hi")).json
        self.assertIn("demo", messaged["content"][0]["text"])
        self.assertGreater(messaged["usage"]["output_tokens"], 0)

    def test_chat_streams_in_the_shape_of_the_sdk(self) -> None:
        answer = ask(self.url, "POST", "/v1/chat/completions",
                     chat("Hi", stream=True, stream_options={"include_usage": True}))
        self.assertEqual(answer.headers["content-type"].split(";")[0], "text/event-stream")
        chunks = answer.events
        text = "".join(chunk["choices"][0]["delta"].get("content") or ""
                       for chunk in chunks if chunk["choices"])
        self.assertIn("demo", text)
        self.assertEqual({chunk["object"] for chunk in chunks}, {"chat.completion.chunk"})
        self.assertEqual([chunk["choices"][0]["finish_reason"] for chunk in chunks
                          if chunk["choices"]][-1], "stop")
        self.assertTrue(chunks[-1]["usage"]["total_tokens"])
        self.assertTrue(answer.is_done)

    @long_run
    def test_responses_stream_in_the_shape_of_the_sdk(self) -> None:
        events = ask(self.url, "POST", "/v1/responses", response("Hi", stream=True)).events
        kinds = [event["type"] for event in events]
        self.assertEqual((kinds[0], kinds[-1]), ("response.created", "response.completed"))
        self.assertEqual([event["sequence_number"] for event in events], list(range(len(events))))
        done = [event for event in events if event["type"] == "response.output_text.done"]
        deltas = "".join(event["delta"] for event in events
                         if event["type"] == "response.output_text.delta")
        self.assertEqual(done[0]["text"], deltas)
        self.assertEqual({event["item_id"] for event in events if "item_id" in event},
                         {events[-1]["response"]["output"][0]["id"]})

    @long_run
    def test_messages_stream_in_the_shape_of_the_sdk(self) -> None:
        answer = ask(self.url, "POST", "/v1/messages", message("Hi", stream=True))
        kinds = [event["type"] for event in answer.events if event["type"] != "ping"]
        self.assertEqual([kind for at, kind in enumerate(kinds) if kind not in kinds[:at]], [
            "message_start", "content_block_start", "content_block_delta", "content_block_stop",
            "message_delta", "message_stop"])
        self.assertEqual([frame.event for frame in answer.frames],
                         [event["type"] for event in answer.events])

    def test_tools_are_called_when_they_are_offered_and_asked_for(self) -> None:
        schema = {"type": "object", "properties": {}}
        chatted = ask(self.url, "POST", "/v1/chat/completions", chat("Use the tool", tools=[
            {"type": "function", "function": {"name": "look", "parameters": schema}}])).json
        self.assertEqual(chatted["choices"][0]["message"]["tool_calls"][0]["function"]["name"],
                         "look")
        self.assertEqual(chatted["choices"][0]["finish_reason"], "tool_calls")
        responded = ask(self.url, "POST", "/v1/responses", response("Use the tool", tools=[
            {"type": "function", "name": "look", "parameters": schema}])).json
        self.assertEqual(responded["output"][0]["name"], "look")
        messaged = ask(self.url, "POST", "/v1/messages", message("Use the tool", tools=[
            {"name": "look", "input_schema": schema}])).json
        self.assertEqual((messaged["stop_reason"], messaged["content"][-1]["name"]),
                         ("tool_use", "look"))

    def test_embeddings_of_a_string_come_in_base64(self) -> None:
        answer = ask(self.url, "POST", "/v1/embeddings", {
            "model": "text-embedding-3-small", "input": "one", "encoding_format": "base64"}).json
        self.assertEqual(len(base64.b64decode(answer["data"][0]["embedding"])) % 4, 0)

    def test_nothing_is_written(self) -> None:
        self.assertEqual(os.listdir(self.home), [])
        self.assertEqual(os.listdir(self.place), ["copilot_proxy.py"])

    def test_the_banner_names_the_urls_and_the_demo(self) -> None:
        output = self.command.output()
        self.assertIn("DEMO", output)
        self.assertIn(self.url + "/v1", output)
        self.assertNotIn("ghu_", output)


class EndTest(CliCase):
    """Signals and the port."""

    @patient
    def test_ctrl_c_ends_an_idle_server_at_once_whatever_the_grace(self) -> None:
        command = self.start("--grace", "3000")
        url = command.wait_for_url()
        self.assertEqual(ask(url, "GET", "/health").status, 200)
        idle = socket.create_connection(("127.0.0.1", int(url.split(":")[-1])))
        self.addCleanup(idle.close)
        began = time.monotonic()
        self.assertEqual(command.stop(signal.SIGINT), 130, command.output())
        self.assertLess(time.monotonic() - began, 1.5)       # a second and a bit
        self.assertNotIn("Traceback", command.output())

    def test_sigterm_ends_with_0_and_ctrl_c_in_a_login_with_130(self) -> None:
        command = self.start()
        command.wait_for_url()
        self.fake.device.interval = 3600
        waiting = Command("auth", "--github-url", self.fake.url, home=self.home)
        self.addCleanup(waiting.__exit__)
        waiting.wait_for("FAKE-")
        self.assertEqual(command.stop(signal.SIGTERM), 0, command.output())
        self.assertEqual(waiting.stop(signal.SIGINT), 130, waiting.output())
        self.assertNotIn("Traceback", waiting.output())

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_a_running_answer_gets_its_time_and_a_second_signal_ends_at_once(self) -> None:
        command = self.start("--grace", "3000")
        url = command.wait_for_url()
        self.stalled(url)
        command.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not accepts(url), "the port closes")
        self.assertIsNone(command.process.poll())            # waits for the answer
        command.process.send_signal(signal.SIGINT)
        self.assertEqual(command.wait(5), 130)

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_a_running_answer_is_finished_before_the_end(self) -> None:
        command = self.start("--grace", "3000")
        url = command.wait_for_url()
        answers: list[Reply] = []
        caller = threading.Thread(target=lambda: answers.append(
            ask(url, "POST", "/v1/chat/completions", chat("@@stall=1 events=3@@", stream=True))))
        caller.start()
        self.assertTrue(self.fake.wait_for(lambda: self.fake.holding))
        command.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not accepts(url), "the port closes")
        self.fake.release()
        caller.join(10)
        self.assertTrue(answers[0].is_done)
        self.assertEqual(command.wait(5), 0)

    def test_a_port_in_use_is_a_clear_failure(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            port = str(taken.getsockname()[1])
            for code, output in (
                    run_command("start", "--github-url", self.fake.url, PORT=port),
                    run_main(self.home, "start", "--port", port, "--github-url", self.fake.url)):
                self.assertEqual(code, 1, output)
                self.assertIn("port " + port, output)
                self.assertIn("--port", output)
                self.assertNotIn("Traceback", output)
        self.assertEqual(self.fake.requests, [])

    def test_health_never_asks_for_a_login_that_is_there_once_the_urls_are_printed(self) -> None:
        seen: list[Reply] = []
        interrupts: list[int] = []

        def say(text: str = "") -> None:
            found = re.search(r"Anthropic clients +(\S+)", text)
            if found:
                seen.append(ask(found.group(1), "GET", "/health"))
                interrupts.append(signal.SIGINT)

        with unittest.mock.patch.object(cp, "say", say), \
                unittest.mock.patch.object(cp, "catch_signals", lambda: interrupts):
            self.assertEqual(self.run_here("start", "--port", "0")[0], 130)
        self.assertEqual((seen[0].status, seen[0].json["status"]), (200, "ok"))

    def test_variables_configure_a_server(self) -> None:
        with Command("start", home=self.home, PORT="0", HOST="localhost",
                     COPILOT_PROXY_GITHUB_URL=self.fake.url, GITHUB_TOKEN="ghu_fake",
                     COPILOT_PROXY_MODEL_ALIAS="mine=gpt-4.1") as command:
            url = command.wait_for_url()
            answer = ask(url, "POST", "/v1/chat/completions", chat("hi", "mine"))
            self.assertEqual(answer.status, 200, answer)
            self.assertEqual(answer.json["model"], "mine")


class TokenTest(CliCase):
    """Where the GitHub token comes from and where tokens never show."""

    def test_standard_input_and_both_variables_are_used(self) -> None:
        self.fake.github_tokens.update(("ghu_stdin", "ghu_gh", "ghu_github"))
        base = ("models", "--github-url", self.fake.url)
        for code, output in (
                run_command(*base, "--github-token", "-", stdin=b"ghu_stdin\n"),
                run_main(self.home, *base, GH_TOKEN="ghu_gh", GITHUB_TOKEN="ghu_x"),
                run_main(self.home, *base, GITHUB_TOKEN="ghu_github")):
            self.assertEqual(code, 0, output)
        used = {record.headers["authorization"] for record in self.fake.requests
                if record.path == EXCHANGE}
        self.assertEqual(used, {"token ghu_stdin", "token ghu_gh", "token ghu_github"})

    def test_an_empty_standard_input_is_refused(self) -> None:
        code, output = run_main(self.home, "models", "--github-token", "-")
        self.assertEqual(code, 2)
        self.assertIn("standard input", output)

    def test_the_log_never_holds_a_token(self) -> None:
        command = self.start("--verbose")
        url = command.wait_for_url()
        key = {"Authorization": "Bearer ghu_of_the_client", "X-Api-Key": "ghu_of_the_client"}
        for path, body in (("/v1/chat/completions?key=ghu_of_the_client", chat("my ghu_prompt1")),
                           ("/v1/messages/ghu_in_the_path", message("hi")),
                           ("/v1/chat/completions", chat("hi", "ghu_as_a_model"))):
            ask(url, "POST", path, body, **key)
        self.assertEqual(ask(url, "GET", "/token").status, 404)
        if SLOW:                              # it waits before it tries once more
            self.fake.exchange_mode = "unavailable"
        self.fake.revoke_tokens()
        ask(url, "POST", "/v1/chat/completions", chat("hi"), **key)
        self.assertEqual(command.stop(), 0)
        self.assertIn("/chat/completions", command.output())
        self.assertIsNone(SECRET.search(command.output()), command.output())

    def test_show_token_prints_nothing_into_a_log(self) -> None:
        command = self.start("--show-token", "--verbose")
        url = command.wait_for_url()
        self.assertEqual(ask(url, "POST", "/v1/chat/completions", chat("hi")).status, 200)
        self.assertTrue(ask(url, "GET", "/token").json["token"].startswith("tid="))
        self.assertEqual(ask(url, "GET", "/token", Origin=url).status, 404)    # a web page
        self.assertEqual(command.stop(), 0)
        self.assertIsNone(SECRET.search(command.output()), command.output())


class Terminal:
    """A command on a pseudo terminal; `text()` is what stands on it."""

    def __init__(self, *args: str, home: str, **env: str) -> None:
        import pty
        self._master, slave = pty.openpty()
        self.process = start_process(*args, home=home, environ=clean_environment(home, **env),
                                     ends=(slave, slave, slave), has_session=True)
        os.close(slave)
        self._parts: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):          # Linux says EIO at the end
            while True:
                part = os.read(self._master, 65536)
                if not part:
                    break
                self._parts.append(part)

    def text(self) -> str:
        return b"".join(self._parts).decode("utf-8", "replace").replace("\r\n", "\n")

    def wait_for(self, text: str, count: int = 1) -> None:
        wait_until(lambda: self.text().count(text) >= count or self.process.poll() is not None)
        if self.text().count(text) < count:
            raise AssertionError("%r is not in %s" % (text, self.text()))

    def url(self) -> str:
        self.wait_for("Ctrl-C ends it")
        return re.findall(r"Anthropic clients +(\S+)", self.text())[0]

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(20)
        self._reader.join(5)
        return code

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(5)
        os.close(self._master)


@unittest.skipUnless(os.environ.get("COPILOT_PROXY_SLOW_TESTS") == "1",
                     "COPILOT_PROXY_SLOW_TESTS=1 only: it waits for terminals")
@unittest.skipUnless(POSIX, "pseudo terminals are POSIX's")
class TerminalTest(CliCase):
    """What happens where a person sits."""

    def terminal(self, *args: str) -> Terminal:
        found = Terminal(*args, "--github-url", self.fake.url, home=self.home)
        self.addCleanup(found.__exit__)
        return found

    def test_manual_asks_and_does_what_it_is_told(self) -> None:
        terminal = self.terminal("start", "--port", "0", "--manual", "--github-token", "ghu_fake")
        url = terminal.url()
        for at, (answer, status) in enumerate((("y", 200), ("n", 403), ("", 403)), 1):
            got: list[Reply] = []
            caller = threading.Thread(target=lambda: got.append(ask(
                url, "POST", "/v1/chat/completions", chat("may I? " + "x" * 200),
                **{"User-Agent": "tester/1.0"})))
            caller.start()
            terminal.wait_for("[y/N]", at)
            self.assertEqual(self.fake.count(CHAT), min(at - 1, 1))
            terminal.type(answer + "\n")
            caller.join(10)
            self.assertEqual(got[0].status, status)
        text = terminal.text()
        self.assertIn("tester/1.0", text)
        self.assertIn("gpt-4.1", text)
        self.assertIn("may I? ", text)
        self.assertNotIn("x" * 61, text)
        self.assertEqual(self.fake.count(CHAT), 1)
        self.assertEqual(got[0].json["error"]["type"], "permission_error")
        self.assertEqual(terminal.stop(signal.SIGINT), 130)

    def test_ctrl_c_ends_it_while_a_question_stands(self) -> None:
        terminal = self.terminal("start", "--port", "0", "--manual", "--grace", "0",
                                 "--github-token", "ghu_fake")
        url = terminal.url()
        caller = threading.Thread(target=ask_and_forget, args=(url,), daemon=True)
        caller.start()
        terminal.wait_for("[y/N]")
        self.assertEqual(terminal.stop(signal.SIGINT), 130, terminal.text())
        self.assertNotIn("Fatal", terminal.text())
        caller.join(10)

    def test_the_login_code_is_printed_and_after_the_grant_it_serves(self) -> None:
        self.fake.device.interval = 0
        self.fake.device.outcomes.clear()
        terminal = self.terminal("start", "--port", "0")
        url = terminal.url()
        terminal.wait_for("FAKE-0001")
        self.assertIn(self.fake.url + "/login/device", terminal.text())
        terminal.wait_for("logged in")
        self.assertEqual(ask(url, "POST", "/v1/chat/completions", chat("hi")).status, 200)
        self.assertIsNone(SECRET.search(terminal.text()))
        self.assertEqual(terminal.stop(), 0)

    def test_show_token_shows_them_on_the_terminal(self) -> None:
        terminal = self.terminal("start", "--port", "0", "--show-token", "--github-token",
                                 "ghu_fake")
        terminal.wait_for("tid=")
        auth = self.terminal("auth", "--show-token", "--github-token", "ghu_fake")
        auth.wait_for("logged in")
        self.assertIn("ghu_fake", auth.text())
        self.assertIn("tid=", auth.text())


def ask_and_forget(url: str) -> None:
    """A request whose server ends."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        ask(url, "POST", "/v1/chat/completions", chat("hi"))


class UsageTest(CliCase):
    """check-usage."""

    def test_a_paid_plan_as_text_and_json(self) -> None:
        code, text = run_command("check-usage", "--github-url", self.fake.url, GH_TOKEN="ghu_fake")
        self.assertEqual(code, 0, text)
        self.assertIn("octocat, plan individual", text)
        self.assertRegex(text, r"premium_interactions +\[#{4,5}\.+\] +24\.6 % used, "
                               r"73\.67 of 300, 226\.33 left, resets 2026-1")
        self.assertRegex(text, r"chat +unlimited\n")
        code, text = self.run_here("check-usage", "--json")
        self.assertEqual(code, 0, text)
        self.assertEqual(json.loads(text)["quota_snapshots"]["premium_interactions"]
                         ["quota_remaining"], 226.33)

    def test_the_free_plan(self) -> None:
        self.fake.plan = "free"
        code, output = self.run_here("check-usage")
        self.assertEqual(code, 0)
        self.assertRegex(output, r"chat +\[#+\.+\] +16\.0 % used, 8 of 50, 42 left, resets")
        self.assertRegex(output, r"completions .* 125 of 2000, 1875 left")
        self.assertRegex(output, "resets 2026-12-0[45] ")

    @unittest.skipUnless(POSIX, "Windows takes no time zone from the environment")
    def test_lanes_with_any_name_and_resets_in_local_time(self) -> None:
        self.fake.usage_extra = {"quota_snapshots": {
            "weekly_\u00fcber\x1b[31m": {"entitlement": "300", "percent_remaining": "0",
                                       "overage_count": 30},
            "ai_credits": {"entitlement": 1500, "remaining": 1499.5,
                           "quota_reset_at": "2026-12-24T18:30:00Z"},
            "odd": {"entitlement": -1}, "empty": {}}}
        with Command("check-usage", "--github-url", self.fake.url, home=self.home,
                     GH_TOKEN="ghu_fake", TZ="XYZ-2") as command:
            self.assertEqual(command.wait(), 0)
        lines = command.output().splitlines()
        self.assertTrue(command.output().isascii())
        self.assertRegex(lines[1], r"\Aweekly_\\xfc\S+ +\[#{20}\] 110\.0 % used, 330 of 300, "
                                   r"-30 left, resets 2026-12-01 02:00\Z")
        self.assertRegex(lines[2], r"\Aai_credits +\[\.{20}\]   0\.0 % used, 0\.5 of 1500, "
                                   r"1499\.5 left, resets 2026-12-24 20:30\Z")
        self.assertRegex(lines[3], r"\Aodd +unlimited\Z")
        self.assertRegex(lines[4], r"\Aempty +resets 2026-12-01 02:00\Z")

    def test_accounts_without_numbers(self) -> None:
        for extra in ({"quota_snapshots": None}, {"quota_snapshots": {}},
                      {"quota_snapshots": {"premium_models": {}}},
                      {"quota_snapshots": {"premium_interactions": None, "chat": 5}},
                      {"quota_snapshots": [1], "login": None, "copilot_plan": None},
                      {"quota_snapshots": {"x": {"percent_remaining": "75", "remaining": "3"}}}):
            with self.subTest(extra=extra):
                self.fake.usage_extra = extra
                code, output = self.run_here("check-usage")
                self.assertEqual(code, 0, output)
                self.assertEqual(self.run_here("check-usage", "--json")[0], 0)

    def test_a_free_plan_with_odd_numbers(self) -> None:
        self.fake.plan = "free"
        for quotas, monthly in (({"chat": 42}, {"chat": "50"}), ({"chat": None}, {"chat": 50}),
                                ({"chat": "42"}, None), ({"chat": 1}, {"chat": 0}), ([], 5)):
            with self.subTest(quotas=quotas, monthly=monthly):
                self.fake.usage_extra = {"limited_user_quotas": quotas, "monthly_quotas": monthly}
                self.assertEqual(self.run_here("check-usage")[0], 0)

    def test_more_used_than_allowed(self) -> None:
        self.fake.usage_extra = {"quota_snapshots": {"premium_interactions": {
            "entitlement": 300, "remaining": -12, "quota_remaining": -12.5,
            "percent_remaining": -4.2, "unlimited": False, "overage_count": 12}}}
        code, output = self.run_here("check-usage")
        self.assertEqual(code, 0)
        self.assertRegex(output, r"\[#{20}\] 104\.2 % used, 312\.5 of 300, -12\.5 left")

    def test_failures_end_with_1_and_say_what_to_do(self) -> None:
        code, output = run_main(self.home, "check-usage", "--github-url", self.fake.url, PORT="1")
        self.assertEqual(code, 1)
        self.assertIn("copilot_proxy.py auth", output)
        self.fake.github_tokens.clear()
        code, output = self.run_here("check-usage")
        self.assertEqual(code, 1)
        self.assertIn("log in again", output)
        if SLOW:                              # it waits before it tries once more
            self.fake.script(USAGE, Answer(502, body="<html>"))
            code, output = self.run_here("check-usage")
            self.assertEqual((code, output.count("\n")), (1, 1))
            self.assertIn("502", output)


class BundleTest(CliCase):
    """start with a history, then a report for a bug."""

    def test_a_bundle_has_the_requests_and_neither_words_nor_secrets(self) -> None:
        with Command("start", "--port", "0", "--log-json", "--budget", "5", "--github-url",
                     self.fake.url, home=self.home, GH_TOKEN="ghu_fake") as server:
            url = server.wait_for_url()
            for at in range(3):
                self.assertEqual(ask(url, "POST", "/v1/chat/completions", chat(
                    "SECRET WORDS"), **{"User-Agent": "tester/1.0"}).status, 200)
            server.stop()
            lines = [json.loads(line) for line in server.output().splitlines() if line[:1] == "{"]
        self.assertEqual([line["client"] for line in lines if line.get("dialect")],
                         ["tester/1.0"] * 3)
        path = os.path.join(self.home, "report.json")
        code, output = self.run_here("debug", "--bundle", path, "--header", "X-Mine=hidden words",
                                     "--ca-file", "")
        self.assertEqual((code, output.count("\n")), (0, 1), output)
        with open(path, encoding="utf-8") as file:
            text = file.read()
        bundle = json.loads(text)
        self.assertEqual([row["client"] for row in bundle["requests"]], ["tester/1.0"] * 3)
        self.assertEqual(bundle["requests"][0]["nano_aiu"], self.fake.told[-1][4])
        self.assertEqual(bundle["version"], cp.__version__)
        self.assertEqual((bundle["settings"]["github-token"], bundle["settings"]["header"]),
                         ("[set]", "[set]"))
        self.assertGreaterEqual(len(bundle["network"]), 4)
        for word in ("SECRET", "WORDS", "hidden", "ghu_", "tid="):
            self.assertNotIn(word, text)
        if POSIX:
            self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
        code, output = self.run_here("debug", "--bundle", os.path.join(path, "below"))
        self.assertEqual(code, 1)
        self.assertIn("cannot write", output)

    def test_without_a_history_none_is_made(self) -> None:
        path = os.path.join(self.home, "report.json")
        self.assertEqual(run_main(self.home, "debug", "--bundle", path, "--github-url",
                                  self.fake.url)[0], 0)
        with open(path, encoding="utf-8") as file:
            bundle = json.load(file)
        self.assertEqual(bundle["requests"], [])
        self.assertIn("nobody is logged in", str(bundle["network"]))
        self.assertEqual([name for _, _, names in os.walk(self.home) for name in names],
                         ["report.json"])


class ReportTest(CliCase):
    """models and debug."""

    def test_models_as_table_and_json(self) -> None:
        with Command("models", "--github-url", self.fake.url, home=self.home,
                     GH_TOKEN="ghu_fake") as table:
            self.assertEqual(table.wait(), 0)
        lines = table.output().splitlines()
        self.assertEqual(lines[0].split(), ["id", "endpoints", "context", "output", "price",
                                            "state"])
        codex = [line for line in lines if line.startswith("gpt-5.3-codex")]
        self.assertEqual(len(codex), 1)
        for part in ("/responses", "400000", "128000", "$1.75/$14.00"):
            self.assertIn(part, codex[0])
        self.assertFalse([line for line in lines if line.startswith("gpt-5.2")])
        self.assertTrue([line for line in self.run_here("models", "--all")[1].splitlines()
                         if line.startswith("gpt-5.2") and "disabled" in line])
        code, output = self.run_here("models", "--json")
        self.assertEqual(code, 0)
        listed = {entry["id"]: entry for entry in json.loads(output)}
        self.assertEqual(listed["gpt-5.3-codex"]["entry"]["vendor"], "OpenAI")

    def test_debug_holds_no_secret(self) -> None:
        env = {"HTTPS_PROXY": "http://user:s3cret@127.0.0.1:9", "GH_TOKEN": "ghu_made_up",
               "HTTP_PROXY": "user:p@s3cret@127.0.0.1:9"}
        code, output = run_command("debug", "--json", **env)
        self.assertEqual(code, 0)
        report = json.loads(output)
        self.assertEqual(report["version"], cp.__version__)
        for key in ("python", "platform", "login", "github", "proxies", "ca_files"):
            self.assertIn(key, report)
        self.assertIn("logged in", report["login"])
        self.assertIsNone(SECRET.search(output), output)
        code, output = run_main(self.home, "debug", **env)
        self.assertEqual(code, 0)
        self.assertIsNone(SECRET.search(output), output)

    def test_debug_probes_each_hop(self) -> None:
        code, output = self.run_here("debug", "--network", "--json")
        lines = json.loads(output)["network"]
        self.assertEqual(code, 0)
        self.assertIn("good for", " ".join(lines))
        self.assertRegex(" ".join(lines), r"lists \d+ models")
        self.assertIsNone(SECRET.search(output))
        self.fake.exchange_mode = "no_subscription"
        code, output = self.run_here("debug", "--network")
        self.assertEqual(code, 1)
        self.assertIn("No access to GitHub Copilot found", output)

    def test_debug_tells_direct_mode(self) -> None:
        self.fake.direct = True
        self.assertIn("direct mode", self.run_here("debug", "--network")[1])

    def test_debug_shows_or_hides_proxies_by_the_flag(self) -> None:
        env = {"HTTPS_PROXY": "http://127.0.0.1:9"}
        shown = json.loads(run_main(self.home, "debug", "--json", **env)[1])["proxies"]
        self.assertIn("https through http://127.0.0.1:9", shown)
        hidden = run_main(self.home, "debug", "--json", "--no-proxy-env", **env)[1]
        self.assertEqual(json.loads(hidden)["proxies"], ["none"])


class ForwardProxyTest(unittest.TestCase):
    """HTTP_PROXY and NO_PROXY for a made-up host, in this process."""

    HOST = "upstream.example.test"

    def setUp(self) -> None:
        self.fake = FakeUpstream().start()
        self.addCleanup(self.fake.close)
        self.via = MappingProxy(self.fake.url, "us er:p@ss/w")
        self.via.__enter__()
        self.addCleanup(self.via.__exit__)
        self.looked_up: list[str] = []
        known = socket.getaddrinfo

        def look_up(host: Any, *args: Any, **more: Any) -> Any:
            self.looked_up.append(str(host))
            return known("127.0.0.1" if host == self.HOST else host, *args, **more)

        patch = unittest.mock.patch.object(socket, "getaddrinfo", look_up)
        patch.start()
        self.addCleanup(patch.stop)

    @contextlib.contextmanager
    def upstream(self, proxy_env: bool | None = None, **env: str) -> Iterator[cp.Upstream]:
        with tempfile.TemporaryDirectory() as home, unittest.mock.patch.dict(
                os.environ, clean_environment(home, **env), clear=True):
            found = cp.Upstream(cp.Settings(proxy_env=proxy_env), os.environ)
            yield found
            found.pool.clear()

    def get(self, upstream: cp.Upstream, url: str = "") -> int:
        port = self.fake.url.split(":")[-1]
        request = cp.UpstreamRequest("GET", url or "http://%s:%s%s" % (self.HOST, port, USER), {
            "Authorization": "token ghu_fake", "User-Agent": "t"}, timeout_s=10)
        return int(cp.run(upstream.fetch_json(request))[0])

    def test_the_proxy_gets_user_and_password(self) -> None:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            with self.subTest(name=name), self.upstream(
                    **{name: self.via.url("us%20er:p%40ss%2Fw")}) as upstream:
                self.assertEqual(self.get(upstream), 200)
        self.assertEqual(len(self.via.seen), 3)
        self.assertNotIn(self.HOST, self.looked_up)            # the proxy knows the name, not we
        self.assertNotIn("proxy-authorization", self.fake.last().headers)

    def test_without_a_login_the_proxy_refuses(self) -> None:
        with self.upstream(HTTP_PROXY=self.via.url()) as upstream:
            self.assertEqual(self.get(upstream), 407)
        self.assertEqual(self.fake.requests, [])

    def test_no_proxy_is_respected(self) -> None:
        for value in (self.HOST, ".example.test", "other.test, example.test", "*"):
            with self.subTest(no_proxy=value), self.upstream(
                    HTTP_PROXY=self.via.url("x:y"), NO_PROXY=value) as upstream:
                self.assertEqual(self.get(upstream), 200)
        self.assertEqual(self.via.seen, [])

    def test_loopback_never_goes_through_the_proxy(self) -> None:
        port = self.fake.url.split(":")[-1]
        with self.upstream(HTTP_PROXY=self.via.url(), ALL_PROXY=self.via.url()) as upstream:
            for host in ("127.0.0.1", "localhost"):
                self.assertEqual(self.get(upstream, "http://%s:%s%s" % (host, port, USER)), 200)
        self.assertEqual((self.via.seen, self.via.refused), ([], 0))

    def test_no_proxy_env_ignores_the_variables(self) -> None:
        with self.upstream(False, HTTP_PROXY=self.via.url()) as upstream:
            self.assertEqual(self.get(upstream), 200)
        self.assertEqual((self.via.seen, self.via.refused), ([], 0))

    def test_proxy_env_with_none_set_is_refused(self) -> None:
        with self.assertRaisesRegex(cp.ConfigError, "--proxy-env"):
            with self.upstream(True):
                pass


@unittest.skipUnless(shutil.which("openssl"), "no openssl at hand to make a certificate with")
class SecureProxyTest(unittest.TestCase):
    """HTTPS_PROXY, CONNECT and an inspecting company's own certificate."""

    TENANT = "octo.ghe.com"

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = tempfile.TemporaryDirectory()
        cls.ca = os.path.join(cls.folder.name, "company.pem")
        names = ",".join("DNS:" + prefix + cls.TENANT for prefix in ("", "api.", "copilot-api."))
        config = os.path.join(cls.folder.name, "openssl.cnf")
        with open(config, "w", encoding="ascii") as file:
            file.write("[req]\ndistinguished_name=dn\nx509_extensions=v3\nprompt=no\n[dn]\n"
                       "CN=Made-up company CA\n[v3]\nsubjectAltName=%s\n"
                       "basicConstraints=critical,CA:TRUE\nsubjectKeyIdentifier=hash\n" % names)
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                        "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-keyout",
                        cls.ca + ".key", "-out", cls.ca, "-config", config],
                       check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        cls.chain = os.path.join(cls.folder.name, "chain.pem")
        with open(cls.chain, "w", encoding="ascii") as file:
            for part in (cls.ca + ".key", cls.ca):
                with open(part, encoding="ascii") as read:
                    file.write(read.read())

    @classmethod
    def tearDownClass(cls) -> None:
        cls.folder.cleanup()

    def setUp(self) -> None:
        self.fake = FakeUpstream().start()
        self.addCleanup(self.fake.close)
        self.via = self.proxy(login="user:pa ss")
        self.fake.url = self.fake.api_url = "https://copilot-api." + self.TENANT

    def proxy(self, login: str = "", garbage: bytes = b"") -> MappingProxy:
        via = MappingProxy(self.fake.url, login, self.chain, garbage)
        via.__enter__()
        self.addCleanup(via.__exit__)
        return via

    def run_models(self, *args: str, proxy: str = "", sub: bool = False,
                   **env: str) -> tuple[int, str]:
        env["HTTPS_PROXY"] = proxy or self.via.url("user:pa%20ss")
        args = ("models", "--github-url", "https://" + self.TENANT, "--github-token",
                "ghu_fake") + args
        if sub:
            return run_command(*args, **env)
        with tempfile.TemporaryDirectory() as home:
            return run_main(home, *args, **env)

    def test_ca_file_and_proxy_login_lead_to_the_tenant_and_nowhere_else(self) -> None:
        code, output = self.run_models("--ca-file", self.ca, sub=True)
        self.assertEqual(code, 0, output)
        self.assertIn("gpt-4.1", output)
        self.assertEqual(set(self.via.seen), {("CONNECT", "api.octo.ghe.com:443"),
                                              ("CONNECT", "copilot-api.octo.ghe.com:443")})
        self.assertNotIn("proxy-authorization", self.fake.last(MODELS).headers)

    def test_an_untrusted_certificate_is_named_with_the_flag(self) -> None:
        code, output = self.run_models()
        self.assertEqual(code, 1)
        self.assertIn("--ca-file", output)
        self.assertIn("api.octo.ghe.com", output)
        self.assertEqual(self.fake.requests, [])

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_variables_of_other_tools_name_the_file_as_well(self) -> None:
        for name in ("SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS"):
            with self.subTest(name=name):
                code, output = self.run_models("--tls-relaxed", **{name: self.ca})
                self.assertEqual(code, 0, output)

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_the_users_file_is_added_to_the_systems(self) -> None:
        def count(settings: cp.Settings, **env: str) -> int:
            with tempfile.TemporaryDirectory() as home, unittest.mock.patch.dict(
                    os.environ, clean_environment(home, **env), clear=True):
                context: ssl.SSLContext = cp.make_tls_context(settings, os.environ)
                return len(context.get_ca_certs())

        plain = count(cp.Settings())
        self.assertEqual(count(cp.Settings(ca_file=self.ca)), plain + 1)
        self.assertEqual(count(cp.Settings(), SSL_CERT_FILE=self.ca), plain + 1)
        self.assertEqual(count(cp.Settings(ca_file=self.ca), SSL_CERT_FILE=self.ca), plain + 1)

    def test_a_wrong_proxy_password_is_told(self) -> None:
        for login in ("", "user:wrong"):
            code, output = self.run_models("--ca-file", self.ca, proxy=self.via.url(login))
            self.assertEqual(code, 1)
            self.assertIn("HTTPS_PROXY", output)
            self.assertIn("user:password", output)
            self.assertNotIn("wrong", output)

    def test_something_that_is_no_proxy_is_a_line_not_a_traceback(self) -> None:
        for garbage in (b"SSH-2.0-OpenSSH_9.6\r\n",
                        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 300 + b"\r\n"):
            with self.subTest(garbage=garbage[:20]):
                via = self.proxy_of_garbage(garbage)
                code, output = self.run_models("--ca-file", self.ca, proxy=via.url())
                self.assertEqual((code, output.count("\n")), (1, 1), output)
                self.assertIn("error: ", output)

    def proxy_of_garbage(self, garbage: bytes) -> MappingProxy:
        via = MappingProxy("http://127.0.0.1:1", garbage=garbage)
        via.__enter__()
        self.addCleanup(via.__exit__)
        return via

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_a_tenants_direct_mode_keeps_the_token_in_the_tenant(self) -> None:
        self.fake.direct = True
        code, output = self.run_models("--ca-file", self.ca)
        self.assertEqual(code, 0, output)
        self.assertLessEqual({target for _, target in self.via.seen},
                             {"api.octo.ghe.com:443", "copilot-api.octo.ghe.com:443"})

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_a_tenant_that_names_no_host_gets_its_own(self) -> None:
        token = "tid=7;st=dotcom:0f"
        self.fake.tokens[token] = Token(self.fake.url, "ghu_fake", self.fake.now() + 1800, 9)
        self.fake.exchange_extra = {"endpoints": None, "token": token}
        code, output = self.run_models("--ca-file", self.ca)
        self.assertEqual(code, 0, output)
        self.assertIn(("CONNECT", "copilot-api.octo.ghe.com:443"), self.via.seen)


if __name__ == "__main__":
    unittest.main()
