"""The shape of copilot_proxy.py itself: sections, layers, purity, sizes, docstrings."""
from __future__ import annotations

import ast
import builtins
import gc
import glob
import os
import re
import subprocess
import sys
import tempfile
import unittest
from typing import Any

import support
from support import HERE, SCRIPT, SLOW, Proxy, chat, clean_environment, compiled
import copilot_proxy as cp
from fake_upstream import FakeUpstream
from gauges import BANNER, FUNCTIONS, GAUGES, Source, depth, length, local_names, the_source, walk

PURE = range(2, 12)
IMPURE = {"socket", "os", "time", "threading", "select", "random", "secrets", "subprocess", "sys",
          "tempfile", "ssl", "shutil", "signal", "socketserver", "uuid", "pathlib", "sqlite3",
          "asyncio", "multiprocessing", "platform", "logging"}
IMPURE_CALLS = {"open", "print", "input", "exec", "eval"}
HEAVY = {"ssl", "difflib", "ipaddress", "resource", "webbrowser", "sqlite3", "getpass", "termios",
         "tty", "ctypes", "mimetypes", "subprocess", "shutil", "winreg", "msvcrt"}
#: the standard library of the oldest and newest Python that matter here, for Pythons without
#: sys.stdlib_module_names
STDLIB = {"__future__", "argparse", "base64", "binascii", "calendar", "codecs", "collections",
          "contextlib",
          "ctypes",
          "dataclasses", "datetime", "difflib", "email", "errno", "functools", "gc", "getpass",
          "gzip", "hashlib", "heapq",
          "hmac", "html", "http", "importlib", "io", "ipaddress", "itertools", "json", "locale",
          "logging",
          "math", "operator", "os", "platform", "queue", "re", "resource", "secrets", "select",
          "selectors",
          "shlex", "shutil", "signal", "socket", "socketserver", "sqlite3", "ssl", "stat",
          "string", "struct", "subprocess", "sys", "tempfile", "textwrap", "threading", "time",
          "traceback", "types", "typing", "unicodedata", "urllib", "uuid", "webbrowser",
          "winreg", "zlib", "msvcrt"}
MAX_FUNCTION, MAX_COLUMNS, MAX_NESTING = 80, 100, 4


SOURCE = the_source()
gc.freeze()                 # the collector need not walk that tree during all other tests
FUNCTIONS_HERE, READS = SOURCE.functions, SOURCE.reads


class SectionTest(unittest.TestCase):
    """Banners, map and layers."""

    def test_sections_are_numbered_in_order_without_gaps(self) -> None:
        numbers = [number for _, number, _ in SOURCE.banners]
        self.assertEqual(numbers, list(range(1, len(numbers) + 1)))
        self.assertGreaterEqual(len(numbers), 20)

    def test_banners_reach_the_same_column_everywhere(self) -> None:
        widths = {len(SOURCE.lines[at - 1]) for at, _, _ in SOURCE.banners}
        self.assertEqual(len(widths), 1, widths)
        self.assertLessEqual(widths, {98, 99, 100})

    def test_nothing_that_looks_like_a_banner_is_misspelt(self) -> None:
        odd = [line for line in SOURCE.lines if line.startswith("# ===") and not BANNER.match(line)]
        self.assertEqual(odd, [])

    def test_the_map_in_the_docstring_names_the_banners(self) -> None:
        text = ast.get_docstring(SOURCE.tree) or ""
        listed = [(int(number), name.strip()) for number, name in
                  re.findall(r"^ +(\d+) ([A-Z][A-Za-z ]*?)(?:  .*)?$", text, re.M)]
        self.assertEqual(listed, [(number, name) for _, number, name in SOURCE.banners])

    def test_a_section_uses_only_names_of_its_own_and_earlier_sections(self) -> None:
        defined = SOURCE.defined()
        wrong = []
        for statement in SOURCE.tree.body:
            here = SOURCE.section_at(statement.lineno)
            for name in READS[statement]:
                if defined.get(name.id, 0) > here:
                    wrong.append("line %d, section %d: %s of section %d" % (
                        name.lineno, here, name.id, defined[name.id]))
        self.assertEqual(wrong, [])

    def test_no_name_of_the_module_is_given_twice(self) -> None:
        """The second one would take the place of the first everywhere above it, too."""
        seen: set[str] = set()
        twice = []
        for node in SOURCE.tree.body:
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = {name.id for target in targets for name in walk(target)
                         if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
            else:
                names = {node.name} if isinstance(node, FUNCTIONS + (ast.ClassDef,)) else set()
            twice += sorted(names & seen)
            seen |= names
        self.assertEqual(twice, [])

    def test_every_name_that_is_used_exists(self) -> None:
        known = set(SOURCE.defined()) | set(dir(builtins)) | {"__name__", "__file__", "__doc__"}
        unknown = {"%s (line %d)" % (name.id, name.lineno) for statement in SOURCE.tree.body
                   for name in READS[statement] if name.id not in known
                   and not isinstance(statement, ast.ClassDef)}
        self.assertEqual(unknown, set())

    def test_pure_sections_touch_no_socket_file_clock_thread_or_chance(self) -> None:
        wrong = []
        for statement in SOURCE.tree.body:
            if SOURCE.section_at(statement.lineno) not in PURE:
                continue
            for name in READS[statement]:
                if name.id in IMPURE:
                    wrong.append("line %d: %s" % (name.lineno, name.id))
            for node in walk(statement):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) \
                        and node.func.id in IMPURE_CALLS:
                    wrong.append("line %d: %s()" % (node.lineno, node.func.id))
                if isinstance(node, ast.Import):
                    wrong += ["line %d: import %s" % (node.lineno, alias.name)
                              for alias in node.names if alias.name.split(".")[0] in IMPURE]
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in IMPURE:
                    wrong.append("line %d: from %s" % (node.lineno, node.module))
        self.assertEqual(wrong, [])


class ImportTest(unittest.TestCase):
    """What the file needs and what importing it does."""

    def test_only_the_standard_library_is_imported(self) -> None:
        known = set(getattr(sys, "stdlib_module_names", STDLIB)) | {"__future__"}
        for node in SOURCE.nodes:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                self.assertEqual(node.level, 0, "a relative import in line %d" % node.lineno)
                names = [node.module or ""]
            for name in names:
                with self.subTest(line=getattr(node, "lineno", 0), module=name):
                    self.assertIn(name.split(".")[0], known)

    def test_imports_stand_at_the_top_and_only_heavy_ones_inside_functions(self) -> None:
        for node in SOURCE.tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self.assertEqual(SOURCE.section_at(node.lineno), 1, node.lineno)
        late: set[str] = set()
        for node in SOURCE.nodes:
            if isinstance(node, (ast.Import, ast.ImportFrom)) and node not in SOURCE.tree.body:
                late.update([node.module or ""] if isinstance(node, ast.ImportFrom)
                            else [alias.name for alias in node.names])
        self.assertLessEqual({name.split(".")[0] for name in late}, HEAVY)

    def test_promised_names_exist(self) -> None:
        self.assertEqual([name for name in cp.__all__ if not hasattr(cp, name)], [])
        self.assertEqual(len(set(cp.__all__)), len(cp.__all__))

    def test_importing_has_no_side_effect(self) -> None:
        code = ("import sys, threading, signal, logging, os; sys.path.insert(0, sys.argv[1])\n"
                "before = (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))\n"
                "import copilot_proxy\n"
                "assert threading.active_count() == 1, threading.enumerate()\n"
                "assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) "
                "== before\n"
                "assert not logging.getLogger('copilot_proxy').handlers\n"
                "assert not logging.getLogger().handlers\n"
                "assert os.listdir('.') == [], os.listdir('.')\n")
        folder = os.path.dirname(SCRIPT if SLOW else compiled())
        with tempfile.TemporaryDirectory() as home:
            done = subprocess.run([sys.executable, "-B", "-S", "-c", code, folder], cwd=home,
                                  env=clean_environment(home), stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30)
            self.assertEqual((done.returncode, done.stdout), (0, b""))
            self.assertEqual(os.listdir(home), [])

    def test_two_apps_live_in_one_process(self) -> None:
        with FakeUpstream() as one, FakeUpstream() as two:
            two.models = [entry for entry in two.models if entry["id"] == "gpt-4o"]
            with Proxy(one) as first, Proxy(two, rate_limit=3600.0) as second:
                self.assertEqual(first.post("/v1/chat/completions", chat("hi")).status, 200)
                self.assertEqual(second.post("/v1/chat/completions",
                                             chat("hi", "claude-haiku-4.5")).status, 404)
                self.assertEqual(
                    second.post("/v1/chat/completions", chat("hi", "gpt-4o")).status, 200)
                self.assertEqual(
                    second.post("/v1/chat/completions", chat("hi", "gpt-4o")).status, 429)
                self.assertEqual(first.post("/v1/chat/completions", chat("hi")).status, 200)
                self.assertEqual(len(two.last("/chat/completions").json["messages"]), 1)
            self.assertEqual(one.count("/chat/completions"), 2)
            self.assertEqual(two.count("/chat/completions"), 1)


class TestFilesTest(unittest.TestCase):
    """The tests themselves."""

    def test_every_section_and_every_test_file_is_in_the_table(self) -> None:
        """In the docstring of support.py: where to look for the tests of a section."""
        text = (support.__doc__ or "").split("docstring):")[1]
        listed = [(int(number), name.strip()) for number, name in
                  re.findall(r"^    ([ \d]\d) (.{16})", text, re.M)]
        self.assertEqual(listed, [(number, name) for _, number, name in SOURCE.banners])
        named = {"test_%s.py" % word for line in text.splitlines() for word in line[24:].split()}
        there = {os.path.basename(path) for path in glob.glob(os.path.join(HERE, "test_*.py"))}
        self.assertEqual(named - there, set(), "no such file")
        for name in sorted(there - named - {"test_fake_upstream.py"}):
            with open(os.path.join(HERE, name), encoding="utf-8") as file:
                self.assertRegex(ast.get_docstring(ast.parse(file.read())) or "", r"sections? \d",
                                 name + ": say it there, or name the file in support.py's table")

    def test_no_line_of_a_test_is_too_long(self) -> None:
        for path in sorted(glob.glob(os.path.join(HERE, "*.py"))):
            with open(path, encoding="utf-8") as file:
                long = [at for at, line in enumerate(file, 1) if len(line.rstrip()) > MAX_COLUMNS]
            with self.subTest(os.path.basename(path)):
                self.assertEqual(long, [])

    def test_no_test_file_imports_another(self) -> None:
        """What two of them need stands in support.py, cases.py or wire.py."""
        for path in sorted(glob.glob(os.path.join(HERE, "test_*.py"))):
            with open(path, encoding="utf-8") as file:
                imported = re.findall(r"^\s*(?:from|import) +(test_\w+)", file.read(), re.M)
            with self.subTest(os.path.basename(path)):
                self.assertEqual(imported, [])


class SizeTest(unittest.TestCase):
    """Limits that keep the file readable."""

    def test_no_line_is_too_long(self) -> None:
        self.assertEqual([at for at, line in enumerate(SOURCE.lines, 1)
                          if len(line) > MAX_COLUMNS], [])

    def test_no_function_is_too_long(self) -> None:
        self.assertEqual([(name, length(node)) for name, node in FUNCTIONS_HERE
                          if length(node) > MAX_FUNCTION], [])

    def test_no_function_nests_too_deeply(self) -> None:
        self.assertEqual([(name, depth(node.body)) for name, node in FUNCTIONS_HERE
                          if depth(node.body) > MAX_NESTING], [])

    def test_every_gauge_is_within_its_limit(self) -> None:
        for gauge in GAUGES:
            with self.subTest(gauge.name):
                self.assertLessEqual(gauge.measure(SOURCE), gauge.limit,
                                     "the places: python3 tests/gauges.py")

    def test_the_gauges_see_what_they_are_to_see(self) -> None:
        source = Source("""
def first(a):
    \"\"\"Not a token.\"\"\"
    return second(a) if a is CHAT else f"{a} {a!r}"         # one, one, one
def second(a):
    b = Made()
    b.own, a.foreign, a.more = 1, 2, 3
    return third(a)
def third(a):
    return second(a)
class Made:
    def __init__(self):
        self.one, self.two = 1, 2
        self.one += 1
        for self.two in (): pass
""")
        found = {gauge.name: gauge.measure(source) for gauge in GAUGES}
        self.assertEqual(list(map(round, found.values())), [
            95, 7, 1, 0, 0, 2, 0, 2, 1, 2], found)

    def test_no_white_space_hangs_at_the_end_of_a_line(self) -> None:
        self.assertEqual([at for at, line in enumerate(SOURCE.lines, 1)
                          if line != line.rstrip() or "\t" in line], [])


def is_told_above(class_name: str, method: str) -> bool:
    """Does a base class in this file say what the method is for, or name it in a list?"""
    bases = getattr(getattr(cp, class_name, None), "__mro__", ())[1:]
    return any(base.__module__ == cp.__name__ and (
        getattr(base.__dict__.get(method), "__doc__", "")
        or method in base.__dict__.get("__annotations__", {})) for base in bases)


class HabitTest(unittest.TestCase):
    """Docstrings, annotations, state."""

    maxDiff = None

    def test_whatever_is_public_says_what_it_is_for(self) -> None:
        lacking = []
        places = [("", SOURCE.tree.body)] + [
            (node.name + ".", node.body) for node in SOURCE.tree.body
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        for prefix, body in places:
            for node in body:
                if not isinstance(node, FUNCTIONS + (ast.ClassDef,)) or node.name[0] == "_":
                    continue
                if (length(node) > 3 and ast.get_docstring(node) is None
                        and not is_told_above(prefix[:-1], node.name)):
                    lacking.append("%s%s (line %d)" % (prefix, node.name, node.lineno))
        self.assertEqual(lacking, [])

    def test_every_function_is_annotated(self) -> None:
        bare = []
        for name, node in FUNCTIONS_HERE:
            arguments = [a for a in walk(node.args) if isinstance(a, ast.arg)
                         and a.arg not in ("self", "cls")]
            if node.returns is None or any(a.annotation is None for a in arguments):
                bare.append("%s (line %d)" % (name, node.lineno))
        self.assertEqual(bare, [])

    def test_nothing_at_module_level_is_rebound_or_mutated(self) -> None:
        rebinding = [node.lineno for node in SOURCE.nodes if isinstance(node, ast.Global)]
        self.assertEqual(rebinding, [])
        containers = {target.id for node in SOURCE.tree.body if isinstance(node, ast.Assign)
                      and isinstance(node.value, (ast.List, ast.Dict, ast.Set))
                      for target in node.targets if isinstance(target, ast.Name)}
        changing = {"append", "extend", "add", "update", "pop", "clear", "setdefault", "insert",
                    "remove", "popitem", "discard"}
        wrong = []
        for _, function in FUNCTIONS_HERE:
            names = containers - local_names(function)
            for node in walk(function):
                target: Any = None
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) \
                        and node.func.attr in changing:
                    target = node.func.value
                elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
                    target = node.value
                if isinstance(target, ast.Name) and target.id in names:
                    wrong.append("line %d: %s" % (node.lineno, target.id))
        self.assertEqual(wrong, [])

    def test_broad_excepts_are_rare(self) -> None:
        broad = [node.lineno for node in SOURCE.nodes
                 if isinstance(node, ast.ExceptHandler)
                 and (node.type is None or isinstance(node.type, ast.Name)
                      and node.type.id == "Exception")]
        self.assertLessEqual(len(broad), 3, broad)


if __name__ == "__main__":
    unittest.main()
