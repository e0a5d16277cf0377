"""setup, start --claude-code, services, debug --health: what is printed, written and tried."""
from __future__ import annotations

import contextlib
import io
import json
import os
import plistlib
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import unittest
import unittest.mock
from typing import Any

from support import SCRIPT, Proxy, clean_environment, run_main, wait_until
import copilot_proxy as cp
from fake_upstream import CHAT, MESSAGES, RESPONSES, Answer, FakeUpstream, make_model
from cases import offer_claude_code

POSIX = os.name == "posix"
FILE_CLIENTS = [name for name, recipe in cp.CLIENTS.items() if recipe.files]


class SetupCase(unittest.TestCase):
    """One server for the class, an empty home for each test."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.fake = FakeUpstream().start()
        cls.addClassCleanup(cls.fake.close)
        cls.fake.models.append(make_model("claude-opus-4.9", "Anthropic", (MESSAGES,), 1000000,
                                          900000, 64000))
        cls.proxy = Proxy(cls.fake).__enter__()
        cls.addClassCleanup(cls.proxy.__exit__, None, None, None)

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.home = os.path.realpath(folder.name)

    def setup(self, *args: str, **env: str) -> str:
        code, output = self.run_setup(*args, **env)
        self.assertEqual(code, 0, output)
        return output

    def run_setup(self, *args: str, **env: str) -> tuple[int, str]:
        return run_main(self.home, "setup", *args, **{"PORT": str(self.proxy.port), **env})

    def path(self, name: str) -> str:
        return os.path.join(self.home, *name.split("/"))

    def read(self, name: str) -> str:
        with open(self.path(name), encoding="utf-8") as file:
            return file.read()

    def put(self, name: str, text: str) -> None:
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        with open(self.path(name), "w", encoding="utf-8") as file:
            file.write(text)


class PrintTest(SetupCase):
    """What stands on the screen."""

    def test_every_client_is_told_address_key_and_a_model_of_the_account(self) -> None:
        ids = {entry["id"] for entry in self.fake.models}
        for client, recipe in cp.CLIENTS.items():
            with self.subTest(client=client):
                output = self.setup(client, "--key", "made-up-key")
                base = self.proxy.url
                if recipe.dialect in (cp.CHAT, cp.RESPONSES) and client != "xcode":
                    base += "/v1"               # Xcode adds it by itself
                path = "/chat/completions" if client in ("curl", "vscode") else r"(?![\w/])"
                self.assertRegex(output, re.escape(base) + path)
                self.assertIn("made-up-key", output)
                self.assertTrue([name for name in ids if name in output], output)
                self.assertNotIn("%(", output)

    def test_models_fit_the_client(self) -> None:
        codex = self.setup("codex")
        self.assertIn('model = "gpt-5.3-codex"', codex)
        self.assertIn("model_context_window = 272000", codex)
        claude = self.setup("claude-code")
        self.assertRegex(claude, r"ANTHROPIC_MODEL=claude-sonnet-[\d.]+\n")
        self.assertRegex(claude, r"HAIKU_MODEL=claude-haiku-[\d.]+\n")
        self.assertIn("text-embedding-3-small", self.setup("open-webui"))

    def test_a_window_of_a_million_is_written_for_claude_code_only(self) -> None:
        self.assertIn("OPUS_MODEL=claude-opus-4.9[1m]'", self.setup("claude-code"))
        self.assertNotIn("[1m]", self.setup("opencode"))
        chosen = self.setup("claude-code", "--model", "claude-opus-4.9")
        self.assertIn("'ANTHROPIC_MODEL=claude-opus-4.9[1m]'", chosen)
        self.assertIn("AUTOCOMPACT_PCT_OVERRIDE=85", chosen)       # 95 % of 900000 of a million
        code, output = self.run_setup("claude-code", "--model", "claude-opus-4.9", "--check")
        self.assertEqual((code, self.fake.last(MESSAGES).json["model"]), (0, "claude-opus-4.9"),
                         output)

    def test_an_unknown_model_is_refused_with_those_that_exist(self) -> None:
        code, output = self.run_setup("aider", "--model", "no-such-model")
        self.assertEqual(code, 2)
        self.assertIn("no-such-model", output)
        self.assertIn("gpt-4.1", output)

    def test_an_unknown_client_and_none_are_told_which_there_are(self) -> None:
        for args in ((), ("cursory",)):
            code, output = self.run_setup(*args)
            self.assertEqual((code, output.count("\n")), (2, 1))
            self.assertIn("claude-code, codex, opencode", output)

    def test_the_address_can_be_another_with_or_without_v1(self) -> None:
        for url in (self.proxy.url, self.proxy.url + "/v1", self.proxy.url + "/v1/"):
            output = self.setup("openai-sdk", "--url", url, PORT="1")
            self.assertIn("OPENAI_BASE_URL=%s/v1\n" % self.proxy.url, output)

    def test_without_a_server_the_account_is_asked_and_without_both_it_says_so(self) -> None:
        code, output = self.run_setup("codex", PORT="1", GH_TOKEN="ghu_fake",
                                      COPILOT_PROXY_GITHUB_URL=self.fake.url)
        self.assertEqual(code, 0, output)
        self.assertIn("gpt-5.3-codex", output)
        code, output = self.run_setup("codex", PORT="1")
        self.assertEqual(code, 1)
        self.assertIn("start the server first", output)

    @unittest.skipUnless(shutil.which("bash"), "no bash here")
    def test_what_bash_is_given_sets_what_was_meant_whatever_the_key(self) -> None:
        key = "it's $HOME `x` \"y\" \\ [1m] & %"
        for client in ("claude-code", "aider", "open-webui"):
            output = self.setup(client, "--key", key, "--shell", "bash")
            exports = "\n".join(ln for ln in output.splitlines() if ln.startswith("export "))
            done = subprocess.run(["bash", "-euc", exports + '\n"$0" -c "$1"', sys.executable,
                                   "import json, os; print(json.dumps(dict(os.environ)))"],
                                  stdout=subprocess.PIPE, check=True)
            values = json.loads(done.stdout)
            self.assertIn(key, values.values())
            if client == "claude-code":
                self.assertEqual(values["ANTHROPIC_DEFAULT_OPUS_MODEL"], "claude-opus-4.9[1m]")

    @unittest.skipUnless(shutil.which("bash") and shutil.which("curl"), "no curl here")
    def test_the_curl_line_can_be_pasted(self) -> None:
        output = self.setup("curl", "--shell", "bash")
        line = next(ln for ln in output.splitlines() if "curl" in ln and "|" in ln)
        done = subprocess.run(["bash", "-c", line], stdout=subprocess.PIPE, check=True,
                              env=clean_environment(self.home))
        self.assertEqual(json.loads(done.stdout)["object"], "chat.completion")

    def test_other_shells_have_their_own_words(self) -> None:
        for shell, said in (("fish", "set -gx OPENAI_API_KEY 'a b'"),
                            ("powershell", "$env:OPENAI_API_KEY = 'a b'"),
                            ("cmd", 'set "OPENAI_API_KEY=a b"')):
            self.assertIn(said + "\n", self.setup("openai-sdk", "--key", "a b", "--shell", shell))
        self.assertIn("curl.exe", self.setup("curl", "--shell", "powershell"))
        self.assertIn('echo {"model"', self.setup("curl", "--shell", "cmd"))

    def test_the_shell_is_recognised(self) -> None:
        self.assertEqual([cp.shell_of({"SHELL": shell}) for shell in (
            "/bin/zsh", "/usr/bin/fish", "/usr/bin/pwsh", "")][:3], ["bash", "fish", "powershell"])
        with unittest.mock.patch.object(cp.os, "name", "nt"):
            self.assertEqual(cp.shell_of({"PROMPT": "$P$G"}), "cmd")
            self.assertEqual(cp.shell_of({}), "powershell")

    @unittest.skipUnless(POSIX, "scripts stand for clipboard programs")
    def test_copy_hands_it_to_the_first_clipboard_program_that_works(self) -> None:
        tools = self.path("tools")
        os.mkdir(tools)
        for name, text in (("wl-copy", "exit 1"),
                           ("xclip", "cat >" + shlex.quote(self.path("copied")))):
            with open(os.path.join(tools, name), "w", encoding="utf-8") as file:
                file.write("#!/bin/sh\n%s\n" % text)
            os.chmod(os.path.join(tools, name), stat.S_IRWXU)
        path = tools + os.pathsep + "/bin:/usr/bin"
        self.assertIn("copied with xclip", self.setup("openai-sdk", "--copy", PATH=path))
        self.assertTrue(self.read("copied").startswith("export OPENAI_BASE_URL="))
        self.assertIn("by hand", self.setup("openai-sdk", "--copy", PATH=self.path("nowhere")))


class WriteTest(SetupCase):
    """--write: merged, shown, kept."""

    def test_every_file_is_made_and_a_second_time_nothing_changes(self) -> None:
        for client in FILE_CLIENTS:
            with self.subTest(client=client):
                first = self.setup(client, "--write", "--yes")
                self.assertIn("wrote " + self.home, first)
                self.assertIn("+++ ", first)
                second = self.setup(client, "--write", "--yes")
                self.assertEqual(second.count("as it should be"), len(cp.CLIENTS[client].files))
                self.assertNotIn("wrote", second)
        for name in (".claude/settings.json", ".claude.json", ".config/opencode/opencode.json",
                     ".aider.model.metadata.json"):
            json.loads(self.read(name))
        self.assertIs(json.loads(self.read(".claude.json"))["hasCompletedOnboarding"], True)
        models = json.loads(self.read(".config/opencode/opencode.json"))["provider"][
            "copilot_proxy"]["models"]
        self.assertEqual(models["gpt-5.3-codex"]["limit"], {"context": 400000, "output": 128000})
        if POSIX:
            self.assertEqual(os.stat(self.path(".claude/settings.json")).st_mode & 0o77, 0)

    @unittest.skipUnless(sys.version_info >= (3, 11), "no TOML reader before Python 3.11")
    def test_toml_is_toml_with_what_was_there(self) -> None:
        import tomllib
        self.put(".codex/config.toml", '# mine\nmodel = "o3"\nnotify = ["a", "b"]\n\n'
                 '[model_providers.copilot_proxy]\nname = "old"\nold = 1\n\n# about the next\n'
                 '[mcp_servers.x]\ncommand = "y"')
        self.setup("codex", "--write", "--yes")
        text = self.read(".codex/config.toml")
        found = tomllib.loads(text)
        self.assertEqual((found["model"], found["model_provider"], found["notify"]),
                         ("gpt-5.3-codex", "copilot_proxy", ["a", "b"]))
        self.assertEqual(found["mcp_servers"], {"x": {"command": "y"}})
        self.assertNotIn("old", found["model_providers"]["copilot_proxy"])
        self.assertIn("# mine\n", text)
        self.assertIn("# about the next\n[mcp_servers.x]", text)

    def test_json_keeps_what_was_there_and_a_backup_is_kept(self) -> None:
        old = ('{"env": {"MINE": "1", "ANTHROPIC_MODEL": "x"}, '
               '"permissions": {"deny": ["WebSearch"]}}')
        self.put(".claude/settings.json", old)
        output = self.setup("claude-code", "--write", "--yes")
        found = json.loads(self.read(".claude/settings.json"))
        self.assertEqual(found["permissions"], {"deny": ["WebSearch"]})
        self.assertEqual(found["env"]["MINE"], "1")
        self.assertTrue(found["env"]["ANTHROPIC_MODEL"].startswith("claude-sonnet"))
        backup = re.findall(r"wrote (.*\.bak)", output)[0]
        with open(backup, encoding="utf-8") as file:
            self.assertEqual(file.read(), old)
        self.assertIn("-" + old, output.replace("\n\\ No newline", ""))

    def test_yaml_lines_and_lists_keep_what_was_there(self) -> None:
        self.put(".aider.conf.yml", "# mine\ndark-mode: true\nmodel: gpt-4o\n")
        self.setup("aider", "--write", "--yes")
        lines = self.read(".aider.conf.yml").splitlines()
        self.assertIn("dark-mode: true", lines)
        self.assertEqual([ln for ln in lines if ln.startswith("model:")],
                         [ln for ln in lines if ln.startswith("model: openai/claude-sonnet")])
        folder = {"LLM_USER_PATH": self.path("llm")}
        self.put("llm/extra-openai-models.yaml", "- model_id: mine\n  model_name: x\n")
        self.put("llm/keys.json", '{"openai": "sk-made-up"}')
        self.setup("llm", "--write", "--yes", **folder)
        text = self.read("llm/extra-openai-models.yaml")
        self.assertTrue(text.startswith("- model_id: mine\n  model_name: x\n- model_id: copilot-"))
        self.assertEqual(json.loads(self.read("llm/keys.json")),
                         {"openai": "sk-made-up", "copilot_proxy": "dummy"})

    def test_a_file_that_is_no_json_is_left_alone_and_the_text_is_shown(self) -> None:
        for odd in ("{ mine\n}", '{"a": 1}}', "[]", '{"a": [}'):
            self.put(".config/opencode/opencode.json", odd)
            code, output = self.run_setup("opencode", "--write", "--yes")
            self.assertEqual(code, 2, odd)
            self.assertIn("by hand", output)
            self.assertIn("baseURL", output)
            self.assertEqual(self.read(".config/opencode/opencode.json"), odd)

    @unittest.skipUnless(POSIX, "symbolic links")
    def test_a_linked_file_stays_a_link(self) -> None:
        self.put("dotfiles/settings.json", "{}")
        os.mkdir(self.path(".claude"))
        os.symlink(self.path("dotfiles/settings.json"), self.path(".claude/settings.json"))
        self.setup("claude-code", "--write", "--yes")
        self.assertTrue(os.path.islink(self.path(".claude/settings.json")))
        self.assertIn("ANTHROPIC", self.read("dotfiles/settings.json"))

    def test_on_a_terminal_no_means_no(self) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        with unittest.mock.patch.object(cp.sys, "stdin", Terminal("n\ny\n")):
            with contextlib.redirect_stdout(io.StringIO()):
                self.assertEqual([cp.confirm("really ?") for _ in "123"], [False, True, False])

    def test_a_client_without_a_file_and_a_folder_that_cannot_be_written(self) -> None:
        code, output = self.run_setup("cline", "--write", "--yes")
        self.assertEqual(code, 2)
        self.assertIn("no settings file", output)
        with unittest.mock.patch.object(cp, "write_file", side_effect=PermissionError(
                13, "Permission denied")):
            code, output = self.run_setup("codex", "--write", "--yes")
        self.assertEqual(code, 2)
        self.assertIn("Permission denied", output)


class CheckTest(SetupCase):
    """--check: one real request in the client's dialect."""

    def test_each_dialect_is_tried(self) -> None:
        for client, path in (("claude-code", MESSAGES), ("codex", RESPONSES), ("curl", CHAT)):
            before = len(self.fake.requests)
            output = self.setup(client, "--check")
            self.assertIn("ok: ", output)
            self.assertIn(self.proxy.url + "/v1", output)
            sent = [r for r in self.fake.requests[before:] if r.method == "POST"]
            self.assertEqual([r.path.split("?")[0] for r in sent], [path])
            self.assertTrue(sent[0].json["stream"])

    def test_a_refusal_is_told_with_its_reason(self) -> None:
        self.fake.script(MESSAGES, Answer(400, body={"error": {"message": "made up reason"}}))
        code, output = self.run_setup("claude-code", "--check")
        self.assertEqual(code, 1)
        self.assertIn("answered 400: made up reason", output)


class ClaudeCodeTest(SetupCase):
    """start --claude-code."""

    def offer(self, typed: str) -> str:
        return offer_claude_code(self.proxy, typed)

    def test_it_asks_for_two_models_by_number_name_or_default(self) -> None:
        output = self.offer("\n\n")
        self.assertRegex(output, r"env .*ANTHROPIC_MODEL=claude-sonnet.* claude\n")
        self.assertIn("no clipboard program", output)
        number = re.findall(r"(\d+)  gpt-5.4\b", output)[0]
        output = self.offer(number + "\ngpt-5-mini\n")
        self.assertIn("ANTHROPIC_MODEL=gpt-5.4 ", output)
        self.assertIn("HAIKU_MODEL=gpt-5-mini ", output)
        self.assertIn("there is no chat model 'x'", self.offer("x\n"))

    def test_the_flag_prints_the_command_once_it_serves(self) -> None:
        flags = ["start", "-c", "--port", "0", "--github-url", self.fake.url, "-g", "ghu_fake"]
        said: list[str] = []
        stopped: list[int] = []
        done = cp.threading.Thread(target=lambda: cp.main(flags, stopped), daemon=True)
        with unittest.mock.patch.object(cp, "say", said.append), \
                unittest.mock.patch.object(cp.sys, "stdin", io.StringIO()), \
                unittest.mock.patch.object(cp.sys, "stderr", io.StringIO()), \
                unittest.mock.patch.dict(os.environ, clean_environment(self.home, PATH=""),
                                         clear=True):
            log = cp.logging.getLogger("copilot_proxy")
            kept = log.handlers[:], log.level
            done.start()
            wait_until(lambda: any("To start Claude Code" in text for text in said), str(said))
            stopped.append(2)
            done.join(5)
            log.handlers[:], log.level = kept
        self.assertFalse(done.is_alive())


class ServiceTest(SetupCase):
    """setup systemd, launchd, schtasks and debug --health."""

    def unit(self, *args: str) -> str:
        return self.setup(*args, PORT="")

    def test_units_name_this_python_file_and_the_flags_that_were_given(self) -> None:
        for name in cp.SERVICES:
            output = self.unit(name, "--port", "4444", "--data-dir", "/a b/c")
            self.assertIn(sys.executable, output)
            self.assertIn("-m copilot_proxy start" if name != "launchd" else
                          "<string>-m</string><string>copilot_proxy</string>", output)
            self.assertIn(os.path.dirname(SCRIPT), output)
            self.assertIn("--port=4444", output)
            self.assertIn("/a b/c", output)

    def test_launchd_is_a_property_list(self) -> None:
        output = self.unit("launchd", "--data-dir", "/a & <b>")
        text = '<?xml version="1.0" encoding="UTF-8"?>' + output[output.index("<plist"):]
        found = plistlib.loads(text.encode())
        self.assertEqual(found["ProgramArguments"],
                         [sys.executable, "-m", "copilot_proxy", "start", "--data-dir=/a & <b>"])
        self.assertEqual(found["WorkingDirectory"], os.path.dirname(SCRIPT))
        self.assertIs(found["RunAtLoad"], True)

    @unittest.skipUnless(shutil.which("systemd-analyze"), "no systemd here")
    def test_systemd_accepts_the_unit(self) -> None:
        text = self.unit("systemd", "--data-dir", self.path("with blank"))
        self.put("copilot_proxy.service", text)
        done = subprocess.run(["systemd-analyze", "verify", self.path("copilot_proxy.service")],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
        self.assertNotIn(b"copilot_proxy.service", done.stdout)
        self.assertIn('"--data-dir=%s"' % self.path("with blank"), text)

    def test_health_is_an_exit_code_and_waits_for_a_starting_server(self) -> None:
        for url in (self.proxy.url, self.proxy.url + "/", self.proxy.url + "/health"):
            code, output = run_main(self.home, "debug", "--health", url)
            self.assertEqual((code, output), (0, "%s/health: ok\n" % self.proxy.url))
        with unittest.mock.patch.object(cp, "HEALTH_WAIT_S", 0.05):
            code, output = run_main(self.home, "debug", "--health", "http://127.0.0.1:1")
            self.assertEqual(code, 1)
            self.assertIn("127.0.0.1", output)
        answers: list[Any] = [cp.UpstreamError("not yet"), (503, {}, {}, b""),
                              (200, {"status": "ok"}, {}, b"")]
        real = cp.Upstream.fetch_json

        async def fetch(upstream: Any, request: Any) -> Any:
            if ":1/" not in request.url:
                return await real(upstream, request)         # of the proxy beside
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        with unittest.mock.patch.object(cp.Upstream, "fetch_json", fetch), \
                unittest.mock.patch.object(cp, "HEALTH_PAUSE_S", 0.01):
            self.assertEqual(run_main(self.home, "debug", "--health", "http://127.0.0.1:1")[0], 0)
        self.assertEqual(answers, [])


if __name__ == "__main__":
    unittest.main()
