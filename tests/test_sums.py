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
        later = self.midnight + cp.HISTORY_AGE_S + 86400
        cp.insert_rows(self.link, [a_row(50, later - cp.HISTORY_CLOCK_S), a_row(51, later)])
        cp.delete_old(self.link, later + 1)
        self.assertEqual(self.summary(9, True)["total"][0]["requests"], 2)

    def test_a_clock_that_stands_years_ahead_for_a_while_deletes_nothing(self) -> None:
        self.put(0, 21)
        while cp.fold_rows(self.link):
            pass
        before = self.summary(9, True)["total"][0]["requests"]
        for ahead_days in (90, 300, 401, 2000):
            with self.subTest(days=ahead_days):
                now = self.midnight + ahead_days * 86400
                cp.insert_rows(self.link, [a_row(22, now), a_row(23, now + 6 * 86400)])
                cp.delete_old(self.link, now + 6 * 86400)
                self.assertEqual(self.count("at < %f" % now), 21)
                self.assertEqual(self.summary(9, True)["total"][0]["requests"], before + 2)
                cp.delete_old(self.link, self.midnight)              # it is right again
                self.assertEqual(self.count("1"), 23)
            self.link.rollback()

    def test_what_is_too_old_is_deleted_while_a_clock_stands_ahead(self) -> None:
        too_old = self.midnight - cp.HISTORY_AGE_S - 30 * 86400
        cp.insert_rows(self.link, [a_row(1, too_old), a_row(2, self.midnight)])
        cp.delete_old(self.link, self.midnight + 2000 * 86400)
        self.assertEqual(self.count("1"), 1)

    def count(self, which: str) -> int:
        """How many rows are there?"""
        query = "SELECT COUNT(*) FROM requests WHERE " + which
        return int(self.link.execute(query).fetchone()[0])

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
