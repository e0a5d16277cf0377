"""What a person at a terminal reads and types (sections 2 and 23): languages, help, the log."""
from __future__ import annotations

import contextlib
import io
import re
import unittest

import support  # noqa: F401  (finds the file that is tested)
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
                settings = cp.load_settings(cp.build_parser().parse_args(["start", *args]),
                                            {"LANG": locale})
                self.assertEqual(cp.translated("status page", settings.lang), word)
        banner = self.banner("--lang", "zh", LANG="C.UTF-8")
        self.assertIn("状态页面", banner)
        self.assertNotIn("status page", banner)

    def test_its_addresses_stand_below_each_other_in_every_language(self) -> None:
        for language in cp.TEXTS:
            lines = self.banner("--lang", language).splitlines()[1:4]
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


if __name__ == "__main__":
    unittest.main()
