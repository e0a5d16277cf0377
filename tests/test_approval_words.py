"""--manual on a terminal: what is typed (section 17)."""
from __future__ import annotations

import io
import logging
import sys
import threading
import unittest
import unittest.mock
from typing import Any

from support import cp, wait_until


class Keyboard:
    """A terminal's standard input; lines are typed by `type`."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._changed = threading.Condition()

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        with self._changed:
            self._changed.wait_for(lambda: self._lines, 10)
            return self._lines.pop(0) if self._lines else ""

    def type(self, line: str) -> None:
        with self._changed:
            self._lines.append(line)
            self._changed.notify()


class WordsTest(unittest.TestCase):
    def setUp(self) -> None:
        self.keyboard, self.screen = Keyboard(), io.StringIO()
        for name, stream in (("stdin", self.keyboard), ("stderr", self.screen)):
            patch = unittest.mock.patch.object(sys, name, stream)
            patch.start()
            self.addCleanup(patch.stop)
        self.addCleanup(self.keyboard.type, "")
        self.approval = cp.Approval(True, logging.getLogger("copilot_proxy"), lambda *_: None)

    def ask(self) -> list[Any]:
        """A request waits; what it gets is in the list once it is decided."""
        outcome: list[Any] = []

        def wait() -> None:
            try:
                cp.run(self.approval.ask(client="c", who="w", model="m", text="t"))
                outcome.append("allowed")
            except cp.BadRequest as error:
                outcome.append(error.status)
        threading.Thread(target=wait, daemon=True).start()
        return outcome

    def asked(self) -> int:
        return self.screen.getvalue().count("[y/N]")

    def test_a_mistyped_word_decides_nothing_and_the_question_comes_again(self) -> None:
        for number, (word, wanted) in enumerate((("y", "allowed"), ("YES", "allowed"), ("n", 403),
                                                 (" no ", 403), ("", 403)), 1):
            outcome = self.ask()
            wait_until(lambda: self.asked() == 2 * number - 1, self.screen.getvalue())
            self.keyboard.type("yy\n")
            wait_until(lambda: self.asked() == 2 * number)
            self.assertIn("type y to allow it, a for always, n to refuse it",
                          self.screen.getvalue())
            self.assertEqual(outcome, [])
            self.keyboard.type(word + "\n")
            wait_until(lambda: outcome)
            self.assertEqual(outcome, [wanted])

    def test_always_is_for_that_program_from_then_on(self) -> None:
        outcome = self.ask()
        wait_until(lambda: self.asked() == 1)
        self.keyboard.type("a\n")
        wait_until(lambda: outcome == ["allowed"])
        again = self.ask()
        wait_until(lambda: again == ["allowed"])
        self.assertEqual(self.asked(), 1)


if __name__ == "__main__":
    unittest.main()
