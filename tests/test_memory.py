"""What `start` does so that glibc holds little memory that nobody uses (sections 18 and 24)."""
from __future__ import annotations

import os
import sys
import tempfile
import unittest
from unittest import mock

from support import Command, cp, long_run, wait_until

ARENA_BYTES = 64 * 1024 * 1024           # one arena's room begins at a multiple of this


def arenas(pid: int) -> list[str]:
    """The mappings of a process that glibc made for threads to allocate in."""
    found = []
    with open("/proc/%d/maps" % pid, encoding="utf-8") as file:
        lines = [line.split() for line in file]
    for line, after in zip(lines, lines[1:]):
        begin, middle = (int(text, 16) for text in line[0].split("-"))
        has_rest = after[0].startswith(line[0].split("-")[1] + "-") and after[1] == "---p"
        end = int(after[0].split("-")[1], 16)
        if line[1] == "rw-p" and has_rest and end - begin == ARENA_BYTES and len(line) == 5:
            found.append(line[0])
    return found


class MemoryTest(unittest.TestCase):
    @long_run
    @unittest.skipUnless(os.path.exists("/proc/self/maps"), "no /proc")
    def test_the_threads_of_start_share_one_arena(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        command = Command("start", "--demo", "--port", "0", home=folder.name)
        self.addCleanup(command.stop)
        command.wait_for_url()
        self.assertEqual(arenas(command.process.pid), [])

    def test_the_last_idle_worker_gives_memory_back(self) -> None:
        given: list[int] = []
        with mock.patch.object(cp, "give_back_memory", lambda: given.append(1)), \
                mock.patch.object(cp, "WORKER_IDLE_S", 0.01):
            workers = cp.Workers()
            for _ in range(3):
                self.assertTrue(workers.put(lambda: None))
            wait_until(lambda: workers._count == 0 and given, "the end of the workers")
        self.assertGreaterEqual(len(given), 1)

    def test_giving_memory_back_is_harmless(self) -> None:
        cp.give_back_memory()


if __name__ == "__main__":
    sys.exit(unittest.main())
