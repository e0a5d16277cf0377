"""README.md: its commands are run, what it shows of `setup` is what `setup` prints, and its tables
name every option and command."""
from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import tempfile
import unittest
from typing import Any, Iterator

from support import Command, Proxy, clean_environment, read_blocks, readme, run_main
import copilot_proxy as cp
from fake_upstream import FakeUpstream

SCRIPT_WORDS = ("python3", "copilot_proxy.py")
#: commands that other tests run: the suite itself, the container of test_scaleout
ELSEWHERE = ("python3 -m unittest discover tests", "mkdir -p ~/.local/share/copilot-proxy",
             "docker run", "docker logs copilot_proxy")


TEXT = readme()
BLOCKS = list(read_blocks(TEXT))


def section(heading: str) -> str:
    """The text below a heading of the second level."""
    return TEXT.split("\n## %s\n" % heading)[1].split("\n## ")[0]


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
        self.assertEqual(tuple(words[:2]), SCRIPT_WORDS, line)
        with contextlib.suppress(SystemExit):
            return run_main(self.home, *words[2:], PORT=str(proxy.port), GH_TOKEN="ghu_fake",
                            COPILOT_PROXY_GITHUB_URL=proxy.settings.github_url)
        return 0, ""                                 # --version

    def test_every_command_of_the_product_ends_well(self) -> None:
        ran = []
        with self.server() as proxy:
            for block in BLOCKS:
                for line in block.commands if block.language == "sh" else ():
                    if tuple(line.split()[:2]) != SCRIPT_WORDS:
                        continue
                    if line.split()[2] == "start":         # served by others: known flags at least
                        cp.build_parser().parse_args(line.split()[2:])
                        continue
                    code, output = self.run_line(line, proxy)
                    self.assertEqual(code, 0, "%s\n%s" % (line, output))
                    ran.append(line)
        self.assertGreaterEqual(len(ran), 18)

    def test_start_serves(self) -> None:
        starts = [ln for b in BLOCKS for ln in b.commands if ln.endswith("copilot_proxy.py start")]
        self.assertEqual(starts, ["python3 copilot_proxy.py start"])
        with FakeUpstream() as fake, Command(
                "start", home=self.home, PORT="0", GH_TOKEN="ghu_fake",
                COPILOT_PROXY_GITHUB_URL=fake.url) as command:
            url = command.wait_for_url()
            code, _ = run_main(self.home, "setup", "claude-code", "--check", "--url", url)
            self.assertEqual(code, 0)
            self.assertEqual(command.stop(), 0)

    @unittest.skipUnless(shutil.which("bash") and shutil.which("curl"), "no curl here")
    def test_every_curl_line_gets_an_answer(self) -> None:
        block = next(b for b in BLOCKS if "base=" in b.text)
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
        self.assertEqual(shown, 3)

    def test_every_client_is_named(self) -> None:
        for name in [*cp.CLIENTS, *cp.SERVICES]:
            self.assertTrue("setup %s" % name in TEXT or "`%s`" % name in TEXT, name)


class TableTest(unittest.TestCase):
    """The tables name what there is."""

    def test_every_option_is_described_with_its_default(self) -> None:
        table = section("Options")
        for option in cp.OPTIONS:
            row = next((ln for ln in table.splitlines() if ln.startswith("|")
                        and re.search(r"`--%s[ `]" % option.name, ln)), "")
            self.assertTrue(row, "--%s is not in the table" % option.name)
            if option.short:
                self.assertIn("`%s`" % option.short, row)
            if option.default not in ("", None, (), False, 0) and "URL" not in row \
                    and option.name != "client-id":
                self.assertIn("%g" % option.default if option.kind in ("int", "float")
                              else str(option.default), row)
            for name in option.env:
                self.assertIn("`%s`" % name, row)

    def test_every_command_is_described(self) -> None:
        table = section("Commands")
        for name in cp.COMMANDS:
            self.assertRegex(table, r"\| `%s[ `]" % name)

    def test_links_within_the_page_lead_somewhere(self) -> None:
        anchors = {re.sub(r"[^\w\- ]", "", line.strip("# ").lower()).replace(" ", "-")
                   for line in TEXT.splitlines() if line.startswith("#")}
        for link in re.findall(r"\]\(#([^)]+)\)", TEXT):
            self.assertIn(link, anchors)

    def test_rows_of_a_table_have_the_cells_of_its_head(self) -> None:
        columns = 0
        for line in TEXT.splitlines():
            cells = len(re.split(r"(?<!\\)\|", line)) if line.startswith("|") else 0
            self.assertTrue(not columns or not cells or cells == columns, line)
            columns = cells


if __name__ == "__main__":
    unittest.main()
