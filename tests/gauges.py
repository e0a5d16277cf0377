"""Figures of the shape of copilot_proxy.py: density, who changes whose state, what looks down.

    python3 tests/gauges.py          all gauges, and the places behind each: where to work next

GAUGES is the one table of limits; test_layers.py holds them.  A limit may fall, never rise; `goal`
is where it is to end.
"""
from __future__ import annotations

import ast
import collections
import contextlib
import functools
import gc
import io
import os
import re
import tokenize
from typing import Any, Callable, Iterator, NamedTuple

SCRIPT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                      "copilot_proxy.py")
BANNER = re.compile(r"# ==== (\d+)\. (.+?) =+\Z")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NESTING = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try)
DIALECTS_SECTION = 7
DIALECT_NAMES = {"CHAT", "RESPONSES", "MESSAGES",
                 "ChatCompletions", "Responses", "Messages"}        # the objects and their classes
WIDE_COLUMNS, MAX_ATTRIBUTES, LONG_LINES = 90, 15, 20
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENDMARKER}


@functools.lru_cache(maxsize=None)
def walk(node: ast.AST) -> list[Any]:
    """The node and all below it, as ast.walk gives them, but no contexts (Load, Store, Del)."""
    found: list[Any] = [node]
    for one in found:
        for value in vars(one).values():
            if type(value) is list:
                found += [inner for inner in value if isinstance(inner, ast.AST)]
            elif isinstance(value, ast.AST) and not isinstance(value, ast.expr_context):
                found.append(value)
    return found


class Source:
    """The file, or another text, parsed once: its lines, tree and sections."""

    def __init__(self, text: str = "") -> None:
        if not text:
            with open(SCRIPT, encoding="utf-8") as file:
                text = file.read()
        self.text = text
        self.lines = self.text.splitlines()
        self.tree = ast.parse(self.text)
        self.nodes = walk(self.tree)
        self.functions = list(functions(self.tree))
        self.tokens = code_tokens(self.text, self.nodes)
        #: statement of the module -> the global names it reads
        self.reads = {statement: list(names_read(statement)) for statement in self.tree.body}
        self.banners: list[tuple[int, int, str]] = []       # (line, number, name)
        for at, line in enumerate(self.lines, 1):
            found = BANNER.match(line)
            if found:
                self.banners.append((at, int(found.group(1)), found.group(2)))

    def section_at(self, line: int) -> int:
        """Number of the section that holds a line; 0 above the first."""
        return max([number for at, number, _ in self.banners if at <= line] or [0])

    def defined(self) -> dict[str, int]:
        """Module-level name -> first section that binds it."""
        names: dict[str, int] = {}
        for node in self.tree.body:
            for name in bound_by(node):
                names.setdefault(name, self.section_at(node.lineno))
        return names


def bound_by(node: ast.stmt) -> Iterator[str]:
    """Names that a module-level statement binds."""
    if isinstance(node, FUNCTIONS + (ast.ClassDef,)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        for alias in node.names:
            yield (alias.asname or alias.name).split(".")[0]
    else:
        for inner in walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                yield inner.id


def local_names(function: ast.AST) -> set[str]:
    """Parameters and assigned names of a function or lambda and of those around nothing else."""
    names: set[str] = set()
    for node in walk(function):
        if isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update((a.asname or a.name).split(".")[0] for a in node.names)
        elif isinstance(node, FUNCTIONS) and node is not function:
            names.add(node.name)
    return names


def names_read(node: ast.AST, hidden: frozenset[str] = frozenset()) -> Iterator[ast.Name]:
    """Every global name that is read in a statement, annotations too."""
    if isinstance(node, FUNCTIONS + (ast.Lambda,)):
        inner = hidden | local_names(node)
        for default in list(node.args.defaults) + [d for d in node.args.kw_defaults if d]:
            yield from names_read(default, hidden)
        for decorator in getattr(node, "decorator_list", []):
            yield from names_read(decorator, hidden)
        for argument in walk(node.args):
            if isinstance(argument, ast.arg) and argument.annotation:
                yield from names_read(argument.annotation, hidden)
        if getattr(node, "returns", None):
            yield from names_read(node.returns, hidden)         # type: ignore[union-attr]
        body = node.body if isinstance(node.body, list) else [node.body]
        for statement in body:
            yield from names_read(statement, inner)
        return
    if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        hidden = hidden | local_names(node)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in hidden:
        yield node
    for child in ast.iter_child_nodes(node):
        yield from names_read(child, hidden)


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, node) of every function, nested ones too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, FUNCTIONS):
            yield prefix + node.name, node
            yield from functions(node, prefix + node.name + ".")
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, prefix + node.name + ".")
        else:
            yield from functions(node, prefix)


def depth(statements: list[ast.stmt], level: int = 0) -> int:
    """Compound statements inside each other; elif counts as its if, nested functions anew."""
    deepest = level
    for node in statements:
        if not isinstance(node, NESTING) and type(node).__name__ not in ("TryStar", "Match"):
            continue
        parts = [getattr(node, "body", [])]
        parts += [handler.body for handler in getattr(node, "handlers", [])]
        parts += [case.body for case in getattr(node, "cases", [])]
        parts.append(getattr(node, "finalbody", []))
        for part in parts:
            deepest = max(deepest, depth(part, level + 1))
        rest = getattr(node, "orelse", [])
        is_elif = isinstance(node, ast.If) and len(rest) == 1 and isinstance(rest[0], ast.If)
        deepest = max(deepest, depth(rest, level if is_elif else level + 1))
    return deepest


def length(node: Any) -> int:
    """Lines from def or class to the end."""
    return int(node.end_lineno - node.lineno + 1)


def code_tokens(text: str, nodes: list[ast.AST]) -> dict[int, int]:
    """Line -> how many tokens of code start there; docstrings and comments are none.

    An f-string counts as one, as Pythons before 3.12 read it.
    """
    docstrings: set[int] = set()
    for node in nodes:
        if isinstance(node, FUNCTIONS + (ast.Module, ast.ClassDef)):
            if ast.get_docstring(node, False) is not None:
                docstrings.update(range(node.body[0].lineno, int(node.body[0].end_lineno or 0) + 1))
    found: dict[int, int] = collections.Counter()
    inside = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        inside += name == "FSTRING_START"
        if token.type not in NO_CODE and token.start[0] not in docstrings:
            if inside == 0 or (inside == 1 and name == "FSTRING_START"):
                found[token.start[0]] += 1
        inside -= name == "FSTRING_END"
    return found


def branch_points(node: ast.AST) -> int:
    """Places at which the flow, or a value, may go two ways."""
    points = 0
    for inner in walk(node):
        if isinstance(inner, (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While,
                              ast.ExceptHandler, ast.Assert)):
            points += 1
        elif isinstance(inner, ast.BoolOp):
            points += len(inner.values) - 1
        elif isinstance(inner, ast.comprehension):
            points += 1 + len(inner.ifs)
    return points


@functools.lru_cache(maxsize=None)
def the_source() -> Source:
    """The file itself, parsed once for all who look at it; the collector finds no garbage in it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return Source()
    finally:
        if was_enabled:
            gc.enable()


class Place(NamedTuple):
    """Something countable at a line."""

    line: int
    what: str


def stored_attributes(node: ast.AST) -> list[ast.Attribute]:
    """Attributes that are set inside: `a.b = 1`, `a.b += 1`, `for a.b in ...`, `del a.b`."""
    return [inner for inner in walk(node)
            if isinstance(inner, ast.Attribute) and not isinstance(inner.ctx, ast.Load)]


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def attributes(source: Source) -> dict[str, set[str]]:
    """Class -> names of the attributes that its own methods store on self."""
    return {node.name: {attribute.attr for attribute in stored_attributes(node)
                        if is_self(attribute.value)}
            for node in source.nodes if isinstance(node, ast.ClassDef)}


def made_here(function: ast.AST, classes: set[str]) -> set[str]:
    """Names that a function binds to a new object of a class of the file."""
    return {target.id for node in walk(function) if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name)
            and node.value.func.id in classes
            for target in node.targets if isinstance(target, ast.Name)}


def foreign_stores(source: Source) -> list[Place]:
    """Attributes set on something that is neither self nor made in the same function."""
    classes = {node.name for node in source.nodes if isinstance(node, ast.ClassDef)}
    found = set()
    for name, function in source.functions:
        stored = [attribute for attribute in stored_attributes(function)
                  if not is_self(attribute.value)]
        own = made_here(function, classes) if stored else set()
        for attribute in stored:
            if not isinstance(attribute.value, ast.Name) or attribute.value.id not in own:
                found.add(Place(attribute.lineno, "%s sets %s: %s" % (
                    name, attribute.attr, source.lines[attribute.lineno - 1].strip())))
    return sorted(found)


def identity_checks(source: Source) -> list[Place]:
    """Comparisons with a dialect outside the section of the dialects, and isinstance of one."""
    found = []
    for node in source.nodes:
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) \
                and node.func.id in ("isinstance", "issubclass"):
            sides = node.args[1:]
        else:
            continue
        names = [inner.id for side in sides for inner in walk(side)
                 if isinstance(inner, ast.Name) and inner.id in DIALECT_NAMES]
        if names and source.section_at(node.lineno) != DIALECTS_SECTION:
            found.append(Place(node.lineno, source.lines[node.lineno - 1].strip()))
    return sorted(set(found))


def circles(graph: dict[str, set[str]]) -> dict[str, frozenset[str]]:
    """Name -> the names that reach it and are reached by it."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set(), [start]
        while todo:
            for name in graph.get(todo.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    todo.append(name)
        reached[start] = seen
    return {name: frozenset(other for other in seen if name in reached.get(other, ()))
            for name, seen in reached.items()}


def downward_references(source: Source) -> list[Place]:
    """Names used above their definition, between sections and inside them; recursion is none."""
    defined: dict[str, int] = {}
    for statement in source.tree.body:
        for name in bound_by(statement):
            defined.setdefault(name, statement.lineno)
    graph: dict[str, set[str]] = {}
    uses: list[tuple[str, ast.Name]] = []
    for statement in source.tree.body:
        owners = list(bound_by(statement)) or [""]
        for name in source.reads[statement]:
            if name.id in defined:
                graph.setdefault(owners[0], set()).add(name.id)
                uses.append((owners[0], name))
    together = circles(graph)
    return sorted({Place(name.lineno, "%s uses %s of line %d" % (
        owner, name.id, defined[name.id])) for owner, name in uses
        if defined[name.id] > name.lineno and name.id not in together.get(owner, ())})


def airless(source: Source) -> list[Place]:
    """Long functions without a blank line between their steps."""
    return [Place(node.lineno, "%s, %d lines" % (name, length(node)))
            for name, node in source.functions if length(node) >= LONG_LINES
            and all(source.lines[at - 1].strip() for at in range(node.lineno, node.end_lineno))]


def wide_share(source: Source) -> float:
    wide = [at for at in source.tokens if len(source.lines[at - 1]) >= WIDE_COLUMNS]
    return 100 * len(wide) / len(source.tokens)


def conditionals(source: Source) -> list[Place]:
    return [Place(node.lineno, source.lines[node.lineno - 1].strip())
            for node in source.nodes if isinstance(node, ast.IfExp)]


class Gauge(NamedTuple):
    """One figure: what it may be now, what it is to be at last, and how it is taken."""

    name: str
    limit: float
    goal: float
    measure: Callable[[Source], float]


GAUGES = (
    Gauge("code tokens", 184_000, 93_400,
          lambda source: sum(source.tokens.values())),
    Gauge("tokens per code line", 8.0, 9.0,
          lambda source: sum(source.tokens.values()) / len(source.tokens)),
    Gauge("conditional expressions", 120, 220,
          lambda source: len(conditionals(source))),
    Gauge("code lines of 90 columns or more, percent", 1.0, 4.0, wide_share),
    Gauge("long functions without a blank line", 0, 0,
          lambda source: len(airless(source))),
    Gauge("attributes of the class that has most", 15, 15,
          lambda source: max(len(found) for found in attributes(source).values())),
    Gauge("classes with more than 15 attributes", 0, 0,
          lambda source: sum(len(found) > MAX_ATTRIBUTES for found in attributes(source).values())),
    Gauge("attributes set on something else than self", 30, 40,
          lambda source: len(foreign_stores(source))),
    Gauge("checks for a dialect outside its section", 0, 0,
          lambda source: len(identity_checks(source))),
    Gauge("names used above their definition", 0, 0,
          lambda source: len(downward_references(source))),
)


def print_places(title: str, places: list[Place]) -> None:
    print("\n%s: %d" % (title, len(places)))
    for place in places:
        print("  %5d  %s" % place)


def print_functions(source: Source, title: str, key: Callable[[int, int, int], float]) -> None:
    """The worst 30 functions by a figure of (tokens, code lines, branch points)."""
    rows = []
    for name, node in source.functions:
        lines = [at for at in range(node.lineno, node.end_lineno + 1) if at in source.tokens]
        tokens = sum(source.tokens[at] for at in lines)
        if len(lines) >= 5:
            points = branch_points(node)
            rows.append((key(tokens, len(lines), points), len(lines), tokens, points,
                         node.lineno, name))
    print("\n%s (of functions with 5 code lines or more)" % title)
    print("  figure lines tokens branches   line")
    for figure, count, tokens, points, at, name in sorted(rows, reverse=True)[:30]:
        print("  %6.1f %5d %6d %8d  %5d  %s" % (figure, count, tokens, points, at, name))


def main() -> None:
    source = Source()
    print("%-62s %10s %10s %10s" % ("gauge", "now", "limit", "goal"))
    for gauge in GAUGES:
        print("%-62s %10.1f %10.1f %10.1f" % (gauge.name, gauge.measure(source), gauge.limit,
                                             gauge.goal))
    print_functions(source, "tokens per code line", lambda tokens, lines, points: tokens / lines)
    print_functions(source, "branch points", lambda tokens, lines, points: points)
    print("\nclasses with more than %d attributes" % MAX_ATTRIBUTES)
    for name, found in sorted(attributes(source).items(), key=lambda item: -len(item[1])):
        if len(found) > MAX_ATTRIBUTES:
            print("  %3d  %s: %s" % (len(found), name, " ".join(sorted(found))))
    print_places("checks for a dialect outside section %d" % DIALECTS_SECTION,
                 identity_checks(source))
    print_places("attributes set on something else than self", foreign_stores(source))
    print_places("names used above their definition", downward_references(source))
    print_places("functions of %d lines or more without a blank line" % LONG_LINES,
                 airless(source))
    print_places("conditional expressions", conditionals(source))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):          # of `| head`
        main()
