"""README.md and the files beside it: their commands are run, what they show of `setup` and `start`
is what those print, and their tables name what there is."""
from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from typing import Any, Iterator

from support import (DOCUMENTS, ROOT, Block, Command, Proxy, clean_environment, document,
                     read_blocks, run_main)
import copilot_proxy as cp
from fake_upstream import FakeUpstream

SCRIPT_WORDS = ("python3", "copilot_proxy.py")
#: commands that other tests run: the suite itself, the container of test_scaleout
ELSEWHERE = ("python3 -m unittest discover tests", "mkdir -p ~/.local/share/copilot-proxy",
             "docker run", "docker logs copilot_proxy")
#: commands that do not need a server: they are run as they stand, in the folder of the README
AS_THEY_STAND = ("python3 -m copilot_proxy ", "grep ")
MAX_README_BYTES = 19 * 1024
MAX_LINE = 120

TEXTS = {name: document(name) for name in DOCUMENTS}
README = TEXTS["README.md"]
BLOCKS = [block for text in TEXTS.values() for block in read_blocks(text)]


def section(heading: str) -> str:
    """README's text below a heading of the second level."""
    return README.split("\n## %s\n" % heading)[1].split("\n## ")[0]


def table_rows(text: str) -> list[str]:
    """The rows of its tables without heads and rules."""
    return re.findall(r"^\| .*\|$", text, re.MULTILINE)[1:]


def anchors(text: str) -> set[str]:
    """What can be linked to within a page."""
    return {re.sub(r"[^\w\- ]", "", line.strip("# ").lower()).replace(" ", "-")
            for line in text.splitlines() if line.startswith("#")}


class CommandTest(unittest.TestCase):
    """Everything that can be typed here is typed."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.home = folder.name

    @contextlib.contextmanager
    def server(self, demo: bool = False) -> Iterator[Proxy]:
        """A server on the fake, or on the demo's models, at a free port."""
        with contextlib.ExitStack() as stack:
            fake = stack.enter_context(FakeUpstream())
            if demo:
                fake.models = cp.DEMO_MODELS
            yield stack.enter_context(Proxy(fake))

    def run_line(self, line: str, proxy: Proxy) -> tuple[int, str]:
        """One of the product's commands, for the account and the server of `proxy`."""
        words = line.replace("http://127.0.0.1:4399", proxy.url).split()
        if "--write" in words:
            words.append("--yes")                    # there is no terminal to ask on
        self.assertEqual(tuple(words[:2]), SCRIPT_WORDS, line)
        try:
            return run_main(self.home, *words[2:], PORT=str(proxy.port), GH_TOKEN="ghu_fake",
                            COPILOT_PROXY_GITHUB_URL=proxy.settings.github_url)
        except SystemExit as ended:                  # --version, or a flag that is unknown
            return int(ended.code or 0), ""

    def test_every_command_of_the_product_ends_well(self) -> None:
        ran = []
        with self.server() as proxy:
            for block in BLOCKS:
                for line in block.commands if block.language == "sh" else ():
                    if tuple(line.split()[:2]) != SCRIPT_WORDS:
                        continue
                    if line.split()[2] == "start":         # served by others: known flags at least
                        cp.make_parser()[0].parse_args(line.split()[2:])
                        continue
                    code, output = self.run_line(line, proxy)
                    self.assertEqual(code, 0, "%s\n%s" % (line, output))
                    ran.append(line)
        self.assertGreaterEqual(len(ran), 15)

    def test_what_needs_no_server_runs_as_it_stands(self) -> None:
        ran = 0
        for block in BLOCKS:
            for line in block.commands if block.language == "sh" else ():
                if line.startswith(AS_THEY_STAND) and os.name == "posix":
                    done = subprocess.run(
                        ["sh", "-c", line.replace("python3", sys.executable)], cwd=ROOT,
                        env=dict(clean_environment(self.home), PYTHONDONTWRITEBYTECODE="1"),
                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
                    self.assertEqual(done.returncode, 0, done.stdout[-2000:])
                    self.assertTrue(done.stdout.strip(), line)
                    ran += 1
        self.assertTrue(ran == 2 or os.name != "posix", ran)

    def test_start_serves_and_prints_what_is_shown(self) -> None:
        starts = [ln for b in BLOCKS for ln in b.commands if ln.endswith("copilot_proxy.py start")]
        shown = next(block.text for block in BLOCKS if block.language == "text")
        self.assertEqual(starts, ["python3 copilot_proxy.py start"])
        with FakeUpstream() as fake, Command(
                "start", home=self.home, PORT="0", GH_TOKEN="ghu_fake",
                COPILOT_PROXY_GITHUB_URL=fake.url) as command:
            url = command.wait_for_url()
            code, _ = run_main(self.home, "setup", "claude-code", "--check", "--url", url)
            self.assertEqual(code, 0)
            for line in shown.replace("http://127.0.0.1:4399", url).splitlines():
                self.assertIn(line.strip(), command.output())
            self.assertEqual(command.stop(), 0)

    def test_the_workflow_asks_and_waits_with_commands_that_work(self) -> None:
        block = next(block for block in BLOCKS if "workflow_dispatch" in block.text)
        self.assertEqual(len(block.text.splitlines()), 10)
        runs = re.findall(r"- run: (.*)", block.text)
        background, _, wait = runs[0].partition(" && ")
        self.assertEqual(background, "(python3 copilot_proxy.py start &)")
        self.assertTrue(wait.endswith(" 4399"), wait)
        with self.server() as proxy:
            for line in (wait.replace("4399", str(proxy.port)), *runs[1:]):
                code, output = self.run_line(line, proxy)
                self.assertEqual(code, 0, output)

    @unittest.skipUnless(shutil.which("bash") and shutil.which("curl"), "no curl here")
    def test_every_curl_line_gets_an_answer(self) -> None:
        blocks = [block for block in BLOCKS if "base=" in block.text]
        self.assertEqual(len(blocks), 2)
        for block in blocks:
            with self.subTest(block.heading):
                self.check_curl_lines(block)

    def check_curl_lines(self, block: Block) -> None:
        with self.server() as proxy:
            text = block.text.replace("http://127.0.0.1:4399", proxy.url)
            self.assertEqual([ln for ln in block.commands if not ln.startswith("curl ")][2:],
                             ["model=" + cp.CHEAP_MODEL])
            self.assertEqual(text.count("curl "), len(block.commands) - 3)
            done = subprocess.run(
                ["bash", "-eu", "-c", text.replace("curl ", "curl -sSf ")], cwd=self.home,
                env=clean_environment(self.home), stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, timeout=60)
            self.assertEqual(done.returncode, 0, done.stdout[-2000:])
            self.assertEqual(proxy.log_text().count("status=4"), 0)

    def test_python_examples_run_where_their_sdk_is_here(self) -> None:
        examples = [b.text for b in BLOCKS if b.language == "python"]
        self.assertEqual(len(examples), 2)
        for text in examples:
            code: Any = compile(text, "README.md", "exec")
            with self.server() as proxy, contextlib.suppress(ImportError):
                __import__(text.split()[1])
                code = compile(text.replace("http://127.0.0.1:4399", proxy.url), "README", "exec")
                exec(code, {})

    def test_no_command_is_forgotten(self) -> None:
        for block in BLOCKS:
            for line in block.commands if block.language == "sh" else ():
                known = (tuple(line.split()[:2]) == SCRIPT_WORDS or "base=" in block.text
                         or line.startswith(AS_THEY_STAND)
                         or line.startswith(("export ", "claude", "aider ")) or any(
                             line.strip().startswith(other) for other in ELSEWHERE))
                self.assertTrue(known, line)

    def test_what_is_shown_of_setup_is_what_it_prints(self) -> None:
        shown = 0
        with self.server(demo=True) as proxy:
            for at, block in enumerate(BLOCKS):
                if not (block.language == "toml" or block.text.startswith("export ")):
                    continue
                line = BLOCKS[at - 1].commands[-1].replace(" --write", "")
                code, output = self.run_line(line, proxy)
                self.assertEqual(code, 0, output)
                self.assertIn(block.text + "\n", output.replace(proxy.url, "http://127.0.0.1:4399"))
                shown += 1
        self.assertEqual(shown, 2)

    def test_every_client_is_named(self) -> None:
        for name in [*cp.CLIENTS, *cp.SERVICES]:
            self.assertTrue(any("setup %s" % name in text for text in TEXTS.values()), name)


class TableTest(unittest.TestCase):
    """The tables name what there is."""

    def test_ten_options_are_described_with_their_defaults(self) -> None:
        options = {option.name: option for option in cp.OPTIONS}
        rows = table_rows(section("Options"))
        self.assertEqual(len(rows), 10)
        for row in rows:
            option = options[re.findall(r"`--([\w-]+)", row)[0]]
            if option.short:
                self.assertIn("`%s`" % option.short, row)
            if option.default not in ("", None, (), False, 0) and "URL" not in row:
                self.assertIn("%g" % option.default if option.kind in ("int", "float")
                              else str(option.default), row)
            for name in option.env:
                self.assertIn("`%s`" % name, row)

    def test_the_help_describes_every_option_with_its_default_and_variables(self) -> None:
        commands = next(action for action in cp.make_parser()[0]._actions
                        if isinstance(action, argparse._SubParsersAction))
        text = " ".join(commands.choices["start"].format_help().split()).replace("- ", "-")
        for option in cp.OPTIONS:
            self.assertRegex(text, r"--%s[ ,\]]" % option.name)
            self.assertIn(" ".join(option.help.split()).replace("- ", "-"), text)
            for name in option.variables:
                self.assertIn(name, text)
            if option.default not in ("", None, (), False, 0):
                self.assertIn("default %s" % option.default, text)

    def test_options_that_are_named_anywhere_exist(self) -> None:
        known = set(cp.make_parser()[0].format_help().split())
        commands = next(action for action in cp.make_parser()[0]._actions
                        if isinstance(action, argparse._SubParsersAction))
        for parser in commands.choices.values():
            known.update(parser._option_string_actions)
        for name, text in TEXTS.items():
            text = re.sub(r"docker run.*?python:", "", text, flags=re.DOTALL)
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", text):
                self.assertIn(flag, known, name)

    def test_every_command_is_described(self) -> None:
        table = section("Commands")
        for name in cp.COMMANDS:
            self.assertRegex(table, r"\| `%s[ `]" % name)

    def test_links_lead_somewhere(self) -> None:
        for name, text in TEXTS.items():
            for link in re.findall(r"\]\(([^)]+)\)", text):
                if link.startswith("https://"):
                    continue
                path, _, anchor = link.partition("#")
                target = name
                if path:
                    target = os.path.normpath(os.path.join(os.path.dirname(name), path))
                self.assertTrue(os.path.isfile(os.path.join(ROOT, target)), link)
                if anchor:
                    self.assertIn(anchor, anchors(document(target.replace(os.sep, "/"))))

    def test_rows_of_a_table_have_the_cells_of_its_head(self) -> None:
        columns = 0
        for line in (line for text in TEXTS.values() for line in text.splitlines()):
            cells = len(re.split(r"(?<!\\)\|", line)) if line.startswith("|") else 0
            self.assertTrue(not columns or not cells or cells == columns, line)
            columns = cells

    def test_it_is_short(self) -> None:
        self.assertLessEqual(len(README.encode()), MAX_README_BYTES)
        for name, text in TEXTS.items():
            for line in text.splitlines():
                self.assertLessEqual(len(line), MAX_LINE, "%s: %s" % (name, line))


if __name__ == "__main__":
    unittest.main()
