"""Pythons that are too old say which one is wanted."""
from __future__ import annotations

import ast
import glob
import os
import shutil
import subprocess
import sys
import tempfile
import unittest

from support import SCRIPT, SLOW, clean_environment, compiled, long_run
from gauges import the_source

WANTED = "copilot_proxy.py needs Python 3.8 or newer"


def find_python(version: str) -> str:
    """The path of such a Python, on the path or of pyenv; '' when there is none here."""
    root = os.environ.get("PYENV_ROOT") or os.path.join(os.path.expanduser("~"), ".pyenv")
    found = glob.glob(os.path.join(root, "versions", version + ".*", "bin", "python"))
    return (found or [shutil.which("python" + version) or ""])[-1]


def run(*args: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)"""
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(args, cwd=home, env=clean_environment(home), timeout=60,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


class OldPythonTest(unittest.TestCase):
    def test_the_check_stands_before_all_other_imports(self) -> None:
        tree = the_source().tree
        check = next(at for at, node in enumerate(tree.body) if isinstance(node, ast.If)
                     and "version_info" in ast.dump(node))
        before = [ast.unparse(node) if hasattr(ast, "unparse") else node.names[0].name
                  for node in tree.body[:check] if isinstance(node, (ast.Import, ast.ImportFrom))]
        self.assertEqual([name.split()[-1] for name in before], ["annotations", "sys"])

    @long_run
    def test_the_file_has_no_syntax_that_keeps_python_3_7_from_the_check(self) -> None:
        with open(SCRIPT, encoding="utf-8") as file:
            ast.parse(file.read(), feature_version=(3, 7))

    def test_a_version_below_is_one_line_as_a_command_and_an_error_as_a_library(self) -> None:
        code = ("import sys, runpy; sys.version_info = (3, 7, 9, 'final', 0); "
                "sys.path.insert(0, sys.argv[1]); %s")
        folder, script = os.path.split(SCRIPT if SLOW else compiled())
        command = run(sys.executable, "-S", "-c", code % (
            "runpy.run_path(sys.argv[1] + '/%s', run_name='__main__')" % script), folder)
        self.assertEqual(command, (1, "", WANTED + ", this is Python 3.7" + os.linesep))
        library = run(sys.executable, "-S", "-c", code % "import copilot_proxy", folder)
        self.assertEqual(library[0], 1)
        self.assertIn("ImportError: " + WANTED, library[2])

    def test_a_real_python_3_7_prints_one_line(self) -> None:
        python = find_python("3.7")
        if not python:
            self.skipTest("no Python 3.7 is here")
        self.assertEqual(run(python, SCRIPT), (1, "", WANTED + ", this is Python 3.7" + os.linesep))

    def test_still_older_ones_print_a_line_that_says_it(self) -> None:
        found = [python for python in map(find_python, ("2.7", "3.5", "3.6")) if python]
        if not found:
            self.skipTest("none is here")
        for python in found:
            with self.subTest(python=python):
                code, _, errors = run(python, SCRIPT)
                self.assertEqual(code, 1)
                self.assertIn(WANTED, errors)
                self.assertLessEqual(errors.count("\n"), 4, errors)


if __name__ == "__main__":
    unittest.main()
