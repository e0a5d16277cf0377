"""What a person at a terminal reads and types (sections 2 and 23): languages, help, the log."""
from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
import unittest
import unittest.mock

from support import run_main
import copilot_proxy as cp
from cases import CliCase


class LanguageTest(CliCase):
    """--lang and the locale."""

    def banner(self, *args: str, **env: str) -> str:
        command = self.start(*args, **env)
        command.wait_for("http://127.0.0.1:")
        command.wait_for("setup claude-code")
        output = command.output()
        self.assertEqual(command.stop(), 0)
        return output

    def test_the_flag_beats_the_locale_and_the_locale_beats_english(self) -> None:
        for args, locale, word in ((("--lang", "zh"), "en_GB.UTF-8", "状态页面"),
                                   ((), "zh_CN.UTF-8", "状态页面"),
                                   (("--lang", "en"), "zh_TW.UTF-8", "status page"),
                                   ((), "C.UTF-8", "status page")):
            with self.subTest(args=args, locale=locale):
                settings = cp.load_settings(cp.make_parser()[0].parse_args(["start", *args]),
                                            {"LANG": locale})
                self.assertEqual(cp.translated("status page", settings.lang), word)
        banner = self.banner("--lang", "zh", LANG="C.UTF-8")
        self.assertIn("状态页面", banner)
        self.assertNotIn("status page", banner)

    def test_its_addresses_stand_below_each_other_in_every_language(self) -> None:
        for language in cp.TEXTS:
            lines = [line for line in self.banner("--lang", language).splitlines()
                     if line.startswith("  ")]
            self.assertEqual(len(lines), 3)
            places = {cp.columns(line.partition("http")[0]) for line in lines}
            self.assertEqual(len(places), 1, lines)

    def test_a_console_that_cannot_show_it_gets_english(self) -> None:
        for encoding, language in (("ascii", "en"), ("latin-1", "en"), ("gbk", "zh"),
                                   ("utf-8", "zh")):
            console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
            with self.subTest(encoding), contextlib.redirect_stdout(console):
                self.assertEqual(cp.console_language("zh"), language)

    def test_a_language_that_is_not_there_is_refused(self) -> None:
        with self.assertRaisesRegex(cp.ConfigError, "--lang: choose en or zh"):
            cp.Settings(lang="xx").check()

    def test_a_translation_has_the_places_of_its_english_text(self) -> None:
        for language, texts in cp.TEXTS.items():
            for english, other in texts.items():
                for marks in ("%[a-z%]", r"\{[a-z]*\}"):
                    self.assertEqual(re.findall(marks, other), re.findall(marks, english),
                                     language)


class HelpTest(unittest.TestCase):
    """--help and mistyped words."""

    def typed(self, *args: str) -> tuple[int, str]:
        """(exit code, everything printed) of words that end in the parser."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), \
                unittest.mock.patch.dict(os.environ, COLUMNS="80"), \
                self.assertRaises(SystemExit) as end:
            cp.parse_flags(list(args))
        return int(end.exception.code or 0), printed.getvalue()

    def test_every_option_is_in_one_group_and_says_what_its_value_is(self) -> None:
        grouped = [name for names in cp.OPTION_GROUPS.values() for name in names]
        self.assertEqual(sorted(grouped), sorted(option.name for option in cp.OPTIONS))
        for option in cp.OPTIONS:
            is_switch = option.kind in ("switch", "either")
            self.assertEqual(option.value == "", is_switch, option.name)

    def test_start_has_its_five_common_options_first_and_the_groups_below(self) -> None:
        code, text = self.typed("start", "--help")
        self.assertEqual(code, 0)
        flags = re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.M)
        self.assertEqual(flags[1:6], ["--port", "--host", "--api-key", "--github-token", "--demo"])
        self.assertEqual(re.findall(r"^(\w[\w ]*):$", text, re.M)[1:], [
            "server", "login", "network", "who may use it", "limits", "models", "seeing",
            "examples"])

    def test_every_command_ends_with_two_examples_that_it_understands(self) -> None:
        for name in cp.COMMANDS:
            code, text = self.typed(name, "--help")
            examples = text.split("examples:\n")[1].splitlines()
            self.assertEqual((code, len(examples)), (0, 2), text)
            for line in examples:
                words = line.partition(" >")[0].split()
                self.assertEqual(words[:2], [cp.SCRIPT_NAME, name])
                cp.parse_flags(words[1:])
            self.assertLessEqual(max(map(len, text.splitlines())), 80, name)

    def test_the_help_of_no_other_command_repeats_the_network(self) -> None:
        for name in cp.COMMANDS:
            _, text = self.typed(name, "--help")
            self.assertEqual("certificate authorities" in text, name == "start", name)

    def test_a_mistyped_word_gets_the_nearest_one(self) -> None:
        for args, wanted in (
                (("strt",), "no command 'strt'; did you mean start?"),
                (("strat",), "no command 'strat'; did you mean start?"),
                (("Models",), "did you mean models?"),
                (("usage",), "did you mean check-usage?"),
                (("start", "--prot", "80"), "start has no option --prot; did you mean --port?"),
                (("start", "--budjet=3"), "no option --budjet; did you mean --budget?"),
                (("models", "--jsno"), "models has no option --jsno; did you mean --json?"),
                (("setup", "codex", "--writ3"), "did you mean --write?"),
                (("models", "--ca-fiel", "x"), "did you mean --ca-file?"),
                (("auth", "me"), "auth: 'me' is one word too many"),
                (("x\x1b[31m",), "no command 'x\\x1b[31m'\n")):
            with self.subTest(args=args):
                code, text = self.typed(*args)
                self.assertEqual((code, text.count("\n")), (2, 2), text)
                self.assertTrue(text.startswith("error: "), text)
                self.assertIn(wanted, text)
                self.assertIn("--help", text)

    def test_a_mistyped_client_gets_the_nearest_one(self) -> None:
        for typed, wanted in (("cladue-code", "claude-code"), ("codx", "codex"),
                              ("systemctl", "systemd")):
            with tempfile.TemporaryDirectory() as home:
                code, text = run_main(home, "setup", typed)
            self.assertEqual(code, 2)
            self.assertIn("did you mean %s?" % wanted, text)


if __name__ == "__main__":
    unittest.main()
