"""What somebody meets who tries the program for the first time: slips on the command line, and
settings files that were not there before `setup --write` (sections 22 and 23)."""
from __future__ import annotations

import contextlib
import io
import json
import os
import re
import unittest

import support  # noqa: F401, which finds copilot_proxy.py
import copilot_proxy as cp
from cases import SetupCase


def slip(*words: str) -> str:
    """What a command line that cannot be read is answered."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        try:
            cp.load_settings(cp.parse_flags(list(words)), {})
        except SystemExit as ended:
            assert ended.code == 2, ended.code
        except cp.ConfigError as error:
            return str(error)
    return printed.getvalue()


class SlipTest(unittest.TestCase):
    """Each names what is wrong in words of the program, not of its parser."""

    def test_every_option_with_a_number_says_that_it_takes_one(self) -> None:
        numbers = [option for option in cp.OPTIONS if option.kind in ("int", "float")]
        self.assertGreater(len(numbers), 5)
        for option in numbers:
            for text in ("x", "1x", ""):
                self.assertEqual(slip("start", "--%s=%s" % (option.name, text)),
                                 "--%s: '%s' is not a number" % (option.name, text))
        self.assertEqual(slip("start", "-p", "4.5"), "--port: '4.5' is not a number")

    def test_every_option_says_whether_it_takes_a_value(self) -> None:
        for option in cp.OPTIONS:
            name = "--" + option.name
            if option.kind in ("switch", "either"):
                self.assertIn("error: %s takes no value\n" % name, slip("start", name + "=yes"))
            else:
                self.assertIn("error: %s needs a value\n" % name, slip("start", name))
        self.assertIn("error: --port needs a value\n", slip("start", "-p"))
        self.assertIn("error: --model needs a value\n", slip("setup", "codex", "--model"))

    def test_numbers_that_are_right_are_numbers(self) -> None:
        settings = cp.load_settings(
            cp.parse_flags(["start", "-p", "4400", "--budget", "2.5"]), {"PORT": "1"})
        self.assertEqual((settings.port, settings.budget), (4400, 2.5))
        self.assertIsInstance(settings.port, int)

    def test_an_option_before_the_command_is_sent_behind_it(self) -> None:
        for words in (("--lang", "zh", "start"), ("--demo", "start"), ("-p", "1", "start"),
                      ("--port=1",)):
            self.assertIn("error: %s: options stand behind the command\n" % words[0],
                          slip(*words))

    def test_help_and_version_need_no_command(self) -> None:
        for word in ("-h", "--help", "--version"):
            with contextlib.redirect_stdout(io.StringIO()), \
                    self.assertRaises(SystemExit) as ended:
                cp.parse_flags([word])
            self.assertEqual(ended.exception.code, 0)


class FirstFilesTest(SetupCase):
    """`--undo` where `--write` made the file."""

    def test_a_file_that_was_not_there_is_removed(self) -> None:
        paths = [self.at(".claude/settings.json"), self.at(".claude.json")]
        self.setup("claude-code", "--write", "--yes")
        for path in paths:
            self.assertTrue(os.path.exists(path))
        output = self.setup("claude-code", "--undo", "--yes")
        for path in paths:
            self.assertIn("removed %s" % path, output)
            self.assertFalse(os.path.exists(path))
        code, output = self.run_setup("claude-code", "--undo", "--yes")
        self.assertEqual((code, "no backup" in output), (1, True))

    def test_what_was_written_since_is_not_lost(self) -> None:
        path = self.at(".claude.json")
        self.setup("claude-code", "--write", "--yes")
        self.put(path, '{"projects": {"mine": 1}}')
        self.setup("claude-code", "--undo", "--yes")
        self.assertFalse(os.path.exists(path))
        kept = [name for name in os.listdir(os.path.dirname(path))
                if name.startswith(".claude.json.") and name.endswith(".undone")]
        self.assertEqual(len(kept), 1)
        self.assertEqual(json.loads(self.read(self.at(kept[0]))), {"projects": {"mine": 1}})

    def test_a_file_that_somebody_removed_since_is_no_fault(self) -> None:
        self.setup("codex", "--write", "--yes")
        os.unlink(self.at(".codex/config.toml"))
        self.setup("codex", "--undo", "--yes")
        self.assertFalse(os.path.exists(self.at(".codex/config.toml")))

    def test_undo_with_write_or_check_is_refused(self) -> None:
        for flag in ("--write", "--check"):
            code, output = self.run_setup("codex", "--undo", flag, "--yes")
            self.assertEqual(code, 2)
            self.assertIn("--undo is not for use with --write or --check", output)


class StepsTest(SetupCase):
    """Who reads `setup` sees whether a step is another way or the next one."""

    def titles(self, client: str) -> list[str]:
        output = self.setup(client)
        about = re.escape(cp.CLIENTS[client].about)
        return re.findall(r"(?m)^%s: (.*):$" % about, output.replace(self.home, "~"))

    def test_a_terminal_that_is_enough_and_files_are_two_ways(self) -> None:
        self.assertEqual(self.titles("claude-code"), [
            "In a terminal, for this session", "Or for good, into ~/.claude/settings.json",
            "and into ~/.claude.json"])
        self.assertEqual(self.titles("openai-sdk"), ["In a terminal, for this session"])

    def test_a_command_that_needs_the_files_stands_behind_them(self) -> None:
        self.assertEqual(self.titles("zed"), ["Into ~/.config/zed/settings.json", "Then"])
        self.assertEqual(self.titles("gemini-cli"), [
            "Into ~/.gemini/settings.json", "Into ~/.gemini/.env", "Then"])

    def test_nothing_is_printed_behind_the_last_word(self) -> None:
        for client in cp.CLIENTS:
            self.assertRegex(self.setup(client), r"\S\n\n?\Z", client)


class OwnRequestsTest(SetupCase):
    def test_the_trial_of_setup_has_a_name_in_the_history(self) -> None:
        self.setup("curl", "--check")
        self.setup("gemini-cli", "--check")
        self.proxy.settle()
        rows = self.proxy.get("/history").json["rows"]
        self.assertEqual({cp.client_name(row["client"]) for row in rows}, {"copilot_proxy"})


if __name__ == "__main__":
    unittest.main()
