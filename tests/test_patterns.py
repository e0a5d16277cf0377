"""No pattern of the program takes more than linear time, whatever text it is run on.

Every pattern is found in the source: what is compiled at module or class level, and what stands
in a call of `re` anywhere.  Each one is run on texts made of its own pieces, over and over, with
something at the end that spoils the match.  Twice the text may take some 2.5 times the time.
"""
from __future__ import annotations

import ast
import functools
import gc
import re
import time
import unittest
from typing import Any, Callable, Iterable, Iterator, NamedTuple

from support import SCRIPT, SLOW
import copilot_proxy as cp
from gauges import the_source, walk

try:
    from re import _constants as constants, _parser as parser   # type: ignore[attr-defined]
except ImportError:                                              # before Python 3.11
    import sre_constants as constants                            # type: ignore[no-redef]
    import sre_parse as parser                                   # type: ignore[no-redef]

METHODS = ("search", "match", "fullmatch", "sub", "findall", "split", "finditer", "subn")
MAX_RATIO = 2.5                  # of the time for twice the length
NOISE_S = 0.000_05               # shorter runs say nothing about growth
ENOUGH_S = 0.002                 # longer runs say enough: the text need not grow any further
TOO_SLOW_S = 0.1                 # for a text of SHORT_CHARS, which takes a linear pattern 1 ms
SHORT_CHARS = 4000
MAX_CHARS = 16_000 if SLOW else 6000
MAX_TEXTS = 1000 if SLOW else 15       # for one pattern

#: what stands for a local name in a pattern that is put together inside a function
LOCAL_NAMES = {"family": cp._FAMILIES[0], "f": cp._FAMILIES[0], "line": "key = value",
               "asked": "gpt-5-mini", "key": "model", "quoted": "[ \t]*[\"']?key[\"']?\\s*[=:].*\n"}
#: patterns that are rows of a table: see `table_patterns`
TABLE_NAMES = ("repair.pattern", "pattern", "recipe.sign", "recipe.named", "recipe.rivals")
CATEGORIES = {
    constants.CATEGORY_DIGIT: "0", constants.CATEGORY_NOT_DIGIT: "x",
    constants.CATEGORY_SPACE: " ", constants.CATEGORY_NOT_SPACE: "x",
    constants.CATEGORY_WORD: "a", constants.CATEGORY_NOT_WORD: "-",
}
REPEATS = tuple(getattr(constants, name) for name in (
    "MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") if hasattr(constants, name))
SPOILERS = ("", "!", "\0", "\n", "a")


class Pattern(NamedTuple):
    """One pattern of the program and how it is used."""
    where: str
    text: Any                    # str or bytes
    flags: int
    methods: tuple[str, ...]


# -- texts that are hard for a pattern

def members(items: Iterable[Any]) -> list[str]:
    """Some characters of a class: an end of each range, one of each category."""
    found, is_negated = [], False
    for kind, value in items:
        if kind is constants.NEGATE:
            is_negated = True
        elif kind is constants.LITERAL:
            found.append(chr(value))
        elif kind is constants.RANGE:
            found.append(chr(value[0]))
        elif kind is constants.CATEGORY:
            found.append(CATEGORIES[value])
    if is_negated:
        return [char for char in "a:0 -\"<" if char not in found][:3]
    return found[:1] + found[1:][-3:]


def samples(tree: Any) -> list[str]:
    """Short texts that a sequence of nodes matches: each node's first choice, and each other
    choice of one node among the first choices of the rest."""
    choices = [choices_of(kind, value) for kind, value in tree]
    usual = [options[0] for options in choices]
    found = ["".join(usual)]
    for at, options in enumerate(choices):
        for option in options[1:]:
            found.append("".join(usual[:at] + [option] + usual[at + 1:]))
    return list(dict.fromkeys(found))


def choices_of(kind: Any, value: Any) -> list[str]:
    """Texts that one node matches."""
    if kind is constants.LITERAL:
        return [chr(value)]
    if kind is constants.NOT_LITERAL:
        return ["b" if value == ord("a") else "a"]
    if kind is constants.IN:
        return members(value)
    if kind is constants.ANY:
        return ["a", " ", '"']
    if kind in REPEATS:
        least, most, body = value
        once = samples(body)
        return [once[0] * max(least, 1), *once[1:], *[""] * (least == 0)]
    if kind is constants.BRANCH:
        return [text for branch in value[1] for text in samples(branch)]
    if kind is constants.SUBPATTERN:
        return samples(value[-1])
    if kind is constants.AT and "BOUNDARY" in str(value):
        return ["", " "]
    return [""]                            # another place, a look around, a reference to a group


def inner_trees(tree: Any) -> Iterator[tuple[str, Any]]:
    """(a text that leads there, sequence) of the tree itself and of all that it holds."""
    yield "", tree
    before = ""
    for kind, value in tree:
        inner: list[Any] = []
        if kind in REPEATS:
            inner = [value[2]]
        elif kind is constants.BRANCH:
            inner = list(value[1])
        elif kind is constants.SUBPATTERN:
            inner = [value[-1]]
        elif kind in (constants.ASSERT, constants.ASSERT_NOT):
            inner = [value[1]]
        for one in inner:
            for lead, sequence in inner_trees(one):
                yield before + lead, sequence
        before += choices_of(kind, value)[0]


def ends_of(sequence: Any) -> Iterator[int]:
    """Where a sequence may be cut: at its end and between any two parts but plain characters."""
    yield len(sequence)
    for at in range(1, len(sequence)):
        if constants.LITERAL not in (sequence[at - 1][0], sequence[at][0]):
            yield at
        elif sequence[at - 1][0] is not sequence[at][0]:
            yield at


def hard_texts(text: Any, flags: int) -> list[tuple[str, str, str]]:
    """(beginning, piece to repeat, end) for a pattern."""
    source = text.decode("latin-1") if isinstance(text, bytes) else text
    tree = parser.parse(source, flags & ~re.DEBUG)
    whole = samples(tree)[0]
    ends = list(dict.fromkeys((*SPOILERS, whole[:1], whole[-1:], *unwanted(tree))))
    found: dict[tuple[str, str, str], None] = {}
    for lead, sequence in inner_trees(tree):
        pieces = [piece for end in ends_of(sequence) for piece in samples(sequence[:end])]
        for at, piece in enumerate(dict.fromkeys(pieces)):
            found["", piece, ends[at % len(ends)]] = None
            found[lead, piece, ends[(at + 1) % len(ends)]] = None
    for lead, sequence in inner_trees(tree):
        for end in ends:
            found["", samples(sequence)[0], end] = None
            found[lead, samples(sequence)[-1], end] = None
    return [(lead, piece, end) for lead, piece, end in found if piece]


def unwanted(tree: Any) -> Iterator[str]:
    """What a pattern looks ahead for and must not find."""
    for _, sequence in inner_trees(tree):
        for kind, value in sequence:
            if kind is constants.ASSERT_NOT:
                yield samples(value[1])[0]


def evenly(texts: list[Any], most: int) -> list[Any]:
    """At most so many of them, from the whole of the list."""
    step = max(len(texts) / most, 1)
    return [texts[int(at * step)] for at in range(int(len(texts) / step))]


# -- the patterns of the program

def value_of(node: ast.expr) -> Any:
    """What an expression of the source is worth at module level, LOCAL_NAMES in their place."""
    code = compile(ast.Expression(node), SCRIPT, "eval")
    try:
        return eval(code, dict(vars(cp), **LOCAL_NAMES))     # an expression of our own source
    except NameError as error:
        raise AssertionError("line %d: %s: add to LOCAL_NAMES, or to TABLE_NAMES, what the pattern "
                             "may be" % (node.lineno, error)) from None


def dotted(node: ast.expr) -> str:
    """'repair.pattern' for such an expression, '' for any that is not made of names."""
    if isinstance(node, ast.Attribute):
        return dotted(node.value) + "." + node.attr
    return node.id if isinstance(node, ast.Name) else ""


def table_patterns() -> Iterator[Pattern]:
    """The patterns that stand in tables."""
    for repair in cp.REPAIRS:
        yield Pattern("repair " + repair.name, repair.pattern, 0, ("finditer",))
    for recipe in cp.CLIENTS.values():
        for text in (*recipe.main, *recipe.small):
            yield Pattern("recipe", text, 0, ("search",))
        yield Pattern("recipe", recipe.sign, 0, ("search",))
        yield Pattern("recipe", recipe.named, 0, ("findall",))
        yield Pattern("recipe", recipe.rivals, 0, ("findall",))


def re_calls(tree: ast.AST) -> Iterator[Any]:
    """Every call of a function of `re` that takes a pattern."""
    for node in walk(tree):
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name) and node.func.value.id == "re"
                and node.func.attr in METHODS + ("compile",)):
            yield node


def methods_of_names(tree: ast.AST) -> dict[str, set[str]]:
    """Name of a pattern -> methods that are called, or handed on, of it."""
    found: dict[str, set[str]] = {}
    for node in walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in METHODS:
            for inner in walk(node.value):
                name = getattr(inner, "id", getattr(inner, "attr", None))
                if isinstance(name, str) and name != "re":
                    found.setdefault(name, set()).add(node.attr)
    return found


def compiled_values(holder: Any, where: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(where, compiled pattern) in the attributes of a module or class, and in its tables."""
    if isinstance(holder, re.Pattern):
        yield where, holder
    elif depth < 3 and isinstance(holder, dict):
        for key, value in holder.items():
            yield from compiled_values(value, "%s[%r]" % (where, key), depth + 1)
    elif depth < 3 and isinstance(holder, (tuple, list, set, frozenset)):
        for value in holder:
            yield from compiled_values(value, where, depth + 1)


@functools.lru_cache(maxsize=None)
def all_patterns() -> list[Pattern]:
    """Every pattern of the program."""
    tree = the_source().tree
    used = methods_of_names(tree)
    found: list[Pattern] = []

    holders = [cp] + [value for value in vars(cp).values()
                      if isinstance(value, type) and value.__module__ == cp.__name__]
    for holder in holders:
        for name, value in vars(holder).items():
            for where, pattern in compiled_values(value, name):
                methods = tuple(sorted(used.get(name, METHODS)))
                found.append(Pattern(where, pattern.pattern, pattern.flags, methods))

    named = {id(node.value) for node in walk(tree) if isinstance(node, ast.Assign)}
    for call in re_calls(tree):
        if call.func.attr == "compile" and id(call) in named:
            continue                                   # an attribute, see above
        where = "line %d" % call.lineno
        argument = call.args[0]
        if dotted(argument) in TABLE_NAMES:
            continue
        flags = 0
        for node in call.args[1:] + [keyword.value for keyword in call.keywords]:
            if any(isinstance(inner, ast.Name) and inner.id == "re" for inner in walk(node)):
                flags |= value_of(node)
        methods = (call.func.attr,) if call.func.attr != "compile" else METHODS
        found.append(Pattern(where, value_of(argument), int(flags), methods))

    found += table_patterns()
    return list(dict.fromkeys(found))


# -- measuring

def run_method(pattern: Any, method: str, text: Any) -> Callable[[], Any]:
    """A call of one method, to its very end."""
    if method in ("sub", "subn"):
        empty = text[:0]
        return lambda: getattr(pattern, method)(empty, text)
    if method == "finditer":
        return lambda: sum(1 for _ in pattern.finditer(text))
    return lambda: getattr(pattern, method)(text)


def time_of(work: Callable[[], Any]) -> float:
    """Seconds of this thread's processor time."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def find_growth(run: Callable[[str], Callable[[], Any]], beginning: str, piece: str, end: str
                ) -> str | None:
    """What is wrong with the time that a text of this kind takes; None when it grows no faster
    than the text."""
    def text(count: int) -> str:
        return beginning + piece * count + end

    count = 8
    seconds = time_of(run(text(count)))
    while seconds < ENOUGH_S and count * len(piece) < MAX_CHARS // 2:
        count = longer(count, seconds)
        seconds = time_of(run(text(count)))
        if seconds > TOO_SLOW_S and count * len(piece) < SHORT_CHARS:
            return "%.1f s for %d characters" % (seconds, len(text(count)))

    # a quarter more first: an exponential pattern would never come to the end of twice the text;
    # then twice as much twice, since memory has steps of its own
    quarter_more = count + count // 4 + 1
    worst = growth(run(text(count)), run(text(quarter_more)))
    if not worst:
        worst = growth(run(text(count)), run(text(2 * count)))
        worst = worst and growth(run(text(2 * count)), run(text(4 * count)))
    if not worst:
        return None
    return "%.1f times as long for a quarter more or twice as much of %d characters" % (
        worst, len(text(count)))


def growth(small: Callable[[], Any], large: Callable[[], Any]) -> float:
    """How many times as long the second takes; measured better before it is too much."""
    ratio = 0.0
    for tries in (1, 2, 3, 6):
        once = min(time_of(small) for _ in range(tries))
        twice = min(time_of(large) for _ in range(tries))
        ratio = twice / max(once, 1e-9)
        if ratio <= MAX_RATIO or twice < NOISE_S:
            return 0.0
        if twice > TOO_SLOW_S:
            break
    return ratio


def longer(count: int, seconds: float) -> int:
    """The next size to try: small steps once it takes a while, lest an exponential pattern be met
    only where it never ends."""
    return count * 2 if seconds < NOISE_S else count + count // 8 + 1


def faults_of(pattern: Pattern) -> list[str]:
    """How a pattern fails, for each method that the program uses."""
    compiled = re.compile(pattern.text, pattern.flags)
    is_bytes = isinstance(pattern.text, bytes)
    found = []
    for method in pattern.methods:
        def run(text: str, method: str = method) -> Callable[[], Any]:
            raw: Any = text.encode("latin-1", "replace") if is_bytes else text
            return run_method(compiled, method, raw)

        for beginning, piece, end in evenly(hard_texts(pattern.text, pattern.flags), MAX_TEXTS):
            fault = find_growth(run, beginning, piece, end)
            if fault:
                found.append("%s %r, %s of %r + %r * n + %r: %s" % (
                    pattern.where, pattern.text, method, beginning, piece, end, fault))
                break
    return found


class PatternTest(unittest.TestCase):
    def setUp(self) -> None:
        gc.disable()
        self.addCleanup(gc.enable)

    def test_no_pattern_of_the_program_takes_more_than_linear_time(self) -> None:
        for pattern in all_patterns():
            with self.subTest(pattern=pattern.where):
                self.assertEqual(faults_of(pattern), [])

    def test_patterns_of_all_kinds_are_seen(self) -> None:
        patterns = all_patterns()
        names = {pattern.where for pattern in patterns}
        self.assertTrue({"_SECRET", "_FIELDS", "_PIECES", "_WAIT"} <= names, names)
        self.assertIn("repair effort", names)
        self.assertTrue(any(name.startswith("line ") for name in names), names)
        methods = {pattern.where: pattern.methods for pattern in patterns}
        self.assertEqual(methods["_SECRET"], ("finditer", "sub"))
        self.assertEqual(methods["_PIECES"], ("findall",))
        self.assertEqual(methods["_WAIT"], ("search",))
        self.assertTrue(any(isinstance(pattern.text, bytes) for pattern in patterns))

    def test_what_takes_longer_is_noticed(self) -> None:
        """The two that froze the server are among them; one of them in the short run."""
        bad = [
            (r"(a+)+b", "match"), (r"(?:a|a)*b", "match"), (r"(?:a|ab|b)*c", "search"),
            (r"(\w+\s*)+:", "match"), (r"(x+x+)+y", "match"), (r"a*a*a*b", "match"),
            (r"\s+$", "search"), (r"\s+$", "sub"), (r"\w+@", "findall"), (r"<.*>x", "finditer"),
            (r"\bone\b.*?\btwo", "search"), (r"(?s)begin.*end", "sub"), (r"['\"]*(\w+):", "split"),
            (rb"(?:[^\"]|\\.)*x", "search"), (rb'"(?:[^"\\]|\\.)*\Z', "search"),
            (r"(?s)\s*(?:<system-reminder>.*?</system-reminder>\s*)+\Z", "match"),
            (r"(?:-latest|@[\w-]+|-v\d+(?::\d+)?|-20\d{6}|-20\d\d-\d\d-\d\d)+\Z", "sub"),
            (r"(?:\[1m\])+\Z", "sub"), (r"[\w-]+-\d[\w-]*", "findall")]
        for text, method in bad if SLOW else bad[13:14]:
            with self.subTest(pattern=text, method=method):
                self.assertEqual(len(faults_of(Pattern("bad", text, 0, (method,)))), 1)

    def test_what_takes_as_long_as_the_text_is_passed(self) -> None:
        good = [
            (r"a+b", "match"), (r"(?:a|b)*c", "match"), (r"\s*\n", "match"), (r"\S+\s*", "findall"),
            (r"\w+", "sub"), (r"(?<!\w)\w+@", "findall"), (r"a.{0,200}b", "search"),
            (r"\A\s+x", "search"), (rb"[^\r\n]*\Z", "match"), (r"", "findall"), (r"abc", "split")]
        for text, method in good:
            with self.subTest(pattern=text, method=method):
                self.assertEqual(faults_of(Pattern("good", text, 0, (method,))), [])


if __name__ == "__main__":
    unittest.main()
