"""The history's sums by hour (section 16): what they tell is what the rows tell, however many of
them are in already, and asking is cheap."""
from __future__ import annotations

import os
import random
import sqlite3
import sys
import tempfile
import time
import unittest
from typing import Any
from unittest import mock

from support import cp

FOLDED = 7


def a_row(number: int, at: float) -> dict[str, Any]:
    """One of a few models, clients, accounts and sessions; much of it unknown now and then."""
    chance = random.Random(number)
    row: dict[str, Any] = dict.fromkeys(cp.ROW_FIELDS)
    row.update(id="r%d" % number, at=at, model=chance.choice(["a", "b", None]),
               client=chance.choice(["codex/1", "curl/8", None]), account=chance.choice("xy"),
               session=chance.choice(["s1", "s2", "s3", None]), status=200,
               error=chance.choice([None, None, "client_left", "upstream_error"]),
               first_ms=chance.choice([None, 10.0, 30.0]))
    for name in cp.COUNTS + ("estimate",):
        row[name] = chance.choice([None, number])
    return row


class Sums(unittest.TestCase):
    def setUp(self) -> None:
        self.link = self.connect(":memory:")
        patch = mock.patch.object(cp, "ROWS_FOLDED", FOLDED)
        patch.start()
        self.addCleanup(patch.stop)
        year, month, day = time.localtime()[:3]
        self.midnight = time.mktime((year, month, day, 0, 0, 0, 0, 0, -1))

    def connect(self, path: str) -> sqlite3.Connection:
        link = sqlite3.connect(path)
        self.addCleanup(link.close)
        cp.make_tables(link)
        return link

    def put(self, first: int, last: int, hours: float = 90.0) -> None:
        rows = [a_row(n, self.midnight + random.Random(-n).uniform(-hours, 23.9) * 3600)
                for n in range(first, last)]
        cp.insert_rows(self.link, rows)
        self.link.commit()

    def summary(self, days: int, folded: bool) -> Any:
        """By the sums, or by the rows alone."""
        link = self.link
        if not folded:
            link = self.connect(":memory:")
            names = ", ".join(cp.ROW_FIELDS)
            link.executemany(
                "INSERT INTO requests (%s) VALUES (%s)" % (names, ", ".join("?" * len(
                    cp.ROW_FIELDS))), self.link.execute("SELECT %s FROM requests" % names))
        found = cp.summarise(link, self.midnight - days * 86400, True)
        for lines in found.values():
            lines.sort(key=lambda line: str(sorted(line.items(), key=str)))
        return found

    def test_sums_are_those_of_the_rows_whatever_is_folded(self) -> None:
        for last in (3, 6, 7, 8, 20, 21, 35):
            self.put(self.link.execute("SELECT COUNT(*) FROM requests").fetchone()[0], last)
            for days in (0, 2, 9):
                with self.subTest(rows=last, days=days):
                    self.assertEqual(self.summary(days, True), self.summary(days, False))
            while cp.fold_rows(self.link):
                pass
            left = self.link.execute("SELECT COUNT(*) FROM requests WHERE " + cp.IS_NEW)
            self.assertEqual(left.fetchone()[0], last % FOLDED)
            for days in (0, 2, 9):
                with self.subTest(rows=last, days=days, folded=True):
                    self.assertEqual(self.summary(days, True), self.summary(days, False))

    def test_sums_outlive_the_rows_until_they_are_too_old(self) -> None:
        self.put(0, 21)
        while cp.fold_rows(self.link):
            pass
        before = self.summary(9, True)["total"]
        with mock.patch.object(cp, "HISTORY_ROWS", 15):
            cp.delete_old(self.link, self.midnight)
        self.assertEqual(self.link.execute("SELECT COUNT(*) FROM requests").fetchone()[0], 15)
        self.assertLessEqual(self.link.execute("SELECT COUNT(*) FROM sums").fetchone()[0], 15)
        self.put(21, 28)
        self.assertTrue(cp.fold_rows(self.link))
        cp.delete_old(self.link, self.midnight)
        self.assertEqual(before[0]["requests"], 21)
        cp.delete_old(self.link, self.midnight + cp.HISTORY_AGE_S + 86400)
        self.assertEqual(self.summary(9, True)["total"], [])

    def test_rows_deleted_by_hand_do_not_hide_those_to_come(self) -> None:
        self.put(0, 14)
        while cp.fold_rows(self.link):
            pass
        told = self.summary(9, True)["total"][0]["requests"]
        with self.link:
            self.link.execute("DELETE FROM requests")
        cp.make_tables(self.link)
        self.put(0, 3)
        self.assertEqual(self.summary(9, True)["total"][0]["requests"], told + 3)

    def test_two_processes_fold_no_row_twice(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path = os.path.join(folder.name, "history.sqlite3")
        self.link = self.connect(path)
        other = self.connect(path)
        self.put(0, 42)
        while cp.fold_rows(self.link) or cp.fold_rows(other):
            pass
        self.assertEqual(self.summary(9, True), self.summary(9, False))
        self.link.close()
        other.close()

    def test_what_an_open_page_asks_again_and_again_reads_few_rows(self) -> None:
        def steps() -> int:
            """Thousands of SQLite's own steps of a summary of eight days."""
            found: list[int] = []
            self.link.set_progress_handler(lambda: found.append(1) and None, 1000)
            cp.summarise(self.link, self.midnight - 8 * 86400, False)
            self.link.set_progress_handler(None, 0)
            return len(found)

        rows = [dict(a_row(n % 50, self.midnight - n * 5.0), session="s%d" % (n // 200))
                for n in range(20000)]
        for at in range(0, len(rows), cp.ROWS_PER_INSERT):
            cp.insert_rows(self.link, rows[at:at + cp.ROWS_PER_INSERT])
        self.link.commit()
        before = steps()
        with mock.patch.object(cp, "ROWS_FOLDED", 1000):
            while cp.fold_rows(self.link):
                pass
        self.assertLess(steps(), before / 3)


if __name__ == "__main__":
    sys.exit(unittest.main())
