"""How `setup --write` changes files that people have written (section 22, and cmd_setup of 23)."""
from __future__ import annotations

import itertools
import json
import os
import plistlib
import random
import re
import shlex
import subprocess
import sys
import unittest
import unittest.mock
from typing import Any

from support import ROOT, clean_environment, long_run
import copilot_proxy as cp
from cases import SetupCase

OPENCODE = ".config/opencode/opencode.json"


def uncommented(text: str) -> Any:
    """What JSON with comments says, read in another way than the program does."""
    text = re.sub(r'("(?:[^"\\]|\\.)*")|//[^\n]*|/\*.*?\*/', lambda m: m.group(1) or "", text,
                  flags=re.DOTALL)
    text = re.sub(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])', lambda m: m.group(1) or "", text)
    return json.loads(text)


class SpliceTest(unittest.TestCase):
    """JSON with comments: what need not change stays as it is written."""

    def test_comments_order_and_indentation_stay(self) -> None:
        old = """\
// my settings
{
    "theme": "dark", // nice
    /* "env": {"x": 1}, */
    "env": {"MINE": "1", "OLD": "x"}, // mine
    "list": [1, 2,], // the last one
}
"""
        new = {"env": {"OLD": "y", "B": {"c": [1]}}, "more": {"d": "e"}}
        text = cp.splice_json(old, new)
        self.assertEqual(text, """\
// my settings
{
    "theme": "dark", // nice
    /* "env": {"x": 1}, */
    "env": {
        "MINE": "1",
        "OLD": "y",
        "B": {
            "c": [
                1
            ]
        }
    }, // mine
    "list": [1, 2,], // the last one
    "more": {
        "d": "e"
    },
}
""")
        self.assertEqual(cp.splice_json(text, new), text)

    def test_no_comment_is_lost_unasked(self) -> None:
        old = '{\n  "env": {\n    "A": "1", // why\n  }\n}\n'
        with self.assertRaisesRegex(ValueError, "comments"):
            cp.splice_json(old, {"env": {"A": "2"}})
        self.assertEqual(cp.splice_json(old, {"env": {"A": "1"}}), old)
        self.assertIn("// why", cp.splice_json(old, {"other": 1}))

    def test_small_forms(self) -> None:
        for old, new, wanted in (
                ("{}", {"a": 1}, '{\n  "a": 1\n}'),
                ("{ }\n", {"a": 1}, None),
                ("{ // mine\n}", {"a": 1}, None),
                ('{"b": 2}', {"a": {"c": 1}}, None),
                ('{"b": 2,}', {"a": 1}, None),
                ('{\n  "b": {},\n  "c": 1\n}', {"b": {"a": 1}},
                 '{\n  "b": {\n    "a": 1\n  },\n  "c": 1\n}'),
                ('{\n  "b": 2\n}', {"a": 1}, '{\n  "b": 2,\n  "a": 1\n}'),
                ('{\n  "b": 2 // x\n}', {"a": 1}, '{\n  "b": 2, // x\n  "a": 1\n}'),
                ('{"a": "no object"}', {"a": {"b": 1}}, None),
                ('{"a": 1, "b": [1]}', {"a": 2}, '{"a": 2, "b": [1]}'),
                ('{"a//b": "/* no comment */", "c": 1}', {"c": 2},
                 '{"a//b": "/* no comment */", "c": 2}'),
                ('[]', [{"name": "x"}], '[\n  {\n    "name": "x"\n  }\n]'),
                ('[{"name": "y"}]', [{"name": "x"}], None),
                ('[{"name": "x", "k": 1}, 5]', [{"name": "x", "v": 2}], None),
                ('[\n  {\n    "name": "x"\n  } // mine\n]', [{"name": "y"}],
                 '[\n  {\n    "name": "x"\n  }, // mine\n  {\n    "name": "y"\n  }\n]')):
            with self.subTest(old=old):
                text = cp.splice_json(old, new)
                self.assertEqual(uncommented(text), cp.merge_json(uncommented(old), new))
                self.assertEqual(text.count("mine"), old.count("mine"))
                if wanted is not None:
                    self.assertEqual(text, wanted)

    def test_what_is_no_json_is_refused(self) -> None:
        for odd in ("", "{", "}", '{"a" 1}', '{"a": 1]', "[1 2]", '{"a": }', "{,}}", '"', "/* {}",
                    "{} {}", "[" * 3000, "[]", "nul", '{"a": 01}', '{1: 2}', ":", ",",
                    '{"a\n": 1}', '{"a": 1, "a": 2}'):
            with self.subTest(odd=odd[:20]), self.assertRaises(ValueError):
                cp.splice_json(odd, {"a": 2})

    def test_any_form_of_any_settings(self) -> None:
        self.check_seeds(range(400))

    @long_run
    def test_many_forms_of_many_settings(self) -> None:
        self.check_seeds(range(400, 20000))

    def check_seeds(self, seeds: Any) -> None:
        refused = 0
        for seed in seeds:
            rng = random.Random(seed)
            old, new = some_object(rng, 3), some_object(rng, 3)
            if rng.random() < 0.3:
                old, new = ([dict(some_object(rng, 2), name=rng.choice("abc"))
                             for _ in range(rng.randrange(3))] for _ in "12")
                old = list({one["name"]: one for one in old}.values())
                new = list({one["name"]: one for one in new}.values())
            text = written(rng, old)
            with self.subTest(seed=seed):
                self.assertEqual(uncommented(text), old)
                try:
                    spliced = cp.splice_json(text, new)
                except ValueError as error:
                    self.assertRegex(str(error), "comments|form")
                    refused += 1
                    continue
                self.assertEqual(uncommented(spliced), cp.merge_json(old, new))
                self.assertEqual(cp.splice_json(spliced, new), spliced)
                for comment in ("// a, b: {", "/* c */"):
                    self.assertEqual(spliced.count(comment), text.count(comment))
        self.assertLess(refused, len(seeds) / 5)


def some_object(rng: random.Random, depth: int) -> dict[str, Any]:
    return {rng.choice(("a", "b", "c d", "//e", "{", '"', "\u00e9")): some_value(rng, depth)
            for _ in range(rng.randrange(4))}


def some_value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(8 if depth else 5)
    if kind >= 6:
        return some_object(rng, depth - 1)
    if kind == 5:
        return [some_value(rng, depth - 1) for _ in range(rng.randrange(3))]
    return rng.choice((1, -2.5, True, None, "", "x // y", "/* z */", "a\\\"}", ",", "\u00e9"))


def written(rng: random.Random, value: Any, indent: str = "") -> str:
    """A value as somebody may have written it, with blank space, comments, commas too many."""
    inline = rng.random() < 0.3

    def space() -> str:
        if inline:
            return " " * rng.randrange(2)
        comment = rng.choice(("", "", " // a, b: {", " /* c */"))
        return comment + "\n" + indent + "\t"

    if not isinstance(value, (dict, list)) or not value:
        return json.dumps(value, ensure_ascii=rng.random() < 0.5)
    marks = "{}" if isinstance(value, dict) else "[]"
    items = [written(rng, one, indent + "\t") for one in (
        value.values() if isinstance(value, dict) else value)]
    if isinstance(value, dict):
        items = ["%s:%s%s" % (json.dumps(key), " " * rng.randrange(2), item)
                 for key, item in zip(value, items)]
    text = marks[0]
    for at, item in enumerate(items):
        last = at == len(items) - 1
        text += space() + item + ("," if not last or rng.random() < 0.2 else "")
    return text + (space().rstrip("\t") if not inline else "") + marks[1]


class LinesTest(unittest.TestCase):
    def test_comments_of_toml_stay(self) -> None:
        old = ('# top\nmodel = "a # b"  # my favourite\nother = 1 # x\n\n'
               '[model_providers.copilot_proxy]\n# why: see the wiki\nname = "old"\n\n'
               '[last]\nx = 1')
        new = 'model = "c"\nadded = 2\n\n[model_providers.copilot_proxy]\nname = "new"\n'
        text = cp.merge_lines(old, new)
        self.assertEqual(text, 'added = 2\n# top\nmodel = "c"  # my favourite\nother = 1 # x\n\n'
                         '[model_providers.copilot_proxy]\nname = "new"\n# why: see the wiki\n\n'
                         '[last]\nx = 1\n')
        self.assertEqual(cp.merge_lines(text, new), text)


    @unittest.skipIf(sys.version_info < (3, 11), "tomllib")
    def test_toml_says_what_it_said_and_what_is_new_however_it_is_written(self) -> None:
        """A table of a provider twice, or a key, and Codex does not start."""
        import tomllib

        new = 'model = "new"\n\n[providers.ours]\nname = "ours"\nurl = "u"\n'
        tops = ("", 'model = "old" # c\n', '  "model" = \'old\'\n', 'model = """old\n[x]\n"""\n',
                'rules = """\n- do this\n[no.table]\n"""\n', "list = [\n  'a',\n\n  ']',\n]\n",
                "lit = \'\'\'\n- a\n\'\'\'\n", 'a.b = "]" # [\n', "# model = 1\n")
        tables = ("", '[providers.ours] # mine\nname = "old"\n', '[ providers."ours" ]\nkey = 1\n',
                  '[providers.ours]\nname = "old"\n\nurl = "below"\nown = 1\n',
                  '[providers.ours]\nlist = [\n\n 1,\n]\n', '[providers.ours.headers]\na = "b"\n')
        others = ("", "[p]\nmodel = 1\n", "  [[rows]]\n  a = 1\n[[rows]]\na = 2\n",
                  '[t]\ntext = """\nmodel = 1\n[providers.ours]\n"""\n')
        for top, table, other in itertools.product(tops, tables, others):
            for old in (top + table + other, top + other + table):
                wanted = tomllib.loads(old)
                text = cp.merge_lines(old, new)
                with self.subTest(old=old, text=text):
                    found = tomllib.loads(text)
                    ours = found.pop("providers")["ours"]
                    self.assertEqual((found.pop("model"), ours["name"], ours["url"]),
                                     ("new", "ours", "u"))
                    their = wanted.pop("providers", {}).get("ours", {})
                    for key in {"own", "headers"} & set(their):
                        self.assertEqual(ours[key], their[key])
                    wanted.pop("model", None)
                    self.assertEqual(found, wanted)
                    self.assertEqual(cp.merge_lines(text, new), text)

    def test_an_exported_variable_is_not_set_twice(self) -> None:
        text = cp.merge_lines("export KEY='old' # mine\nOTHER=it's\n", "KEY=new\n")
        self.assertEqual(text, "KEY=new  # mine\nOTHER=it's\n")


class WriteTest(SetupCase):
    def test_nothing_is_written_unasked(self) -> None:
        code, output = self.run_setup("codex", "--write")
        self.assertEqual(code, 2)
        self.assertIn("add --yes", output)
        self.assertIn("+++ ", output)
        self.assertFalse(os.path.exists(self.at(".codex/config.toml")))

    def test_a_no_is_no_success_and_is_not_tried(self) -> None:
        code, output = self.run_setup("codex", "--write", "--check", typed="n\n")
        self.assertEqual(code, 1)
        self.assertIn("not written: ", output)
        self.assertNotIn("ok: ", output)
        self.assertIn("ok: ", self.setup("codex", "--write", "--check", typed="y\n"))
        self.assertTrue(os.path.exists(self.at(".codex/config.toml")))
        self.assertIn("as it should be", self.setup("codex", "--write"))   # asks nothing

    def test_settings_with_comments_are_merged(self) -> None:
        self.put(self.at(".claude/settings.json"), '{\n    // mine\n    "model": "opus" // !\n}\n')
        self.setup("claude-code", "--write", "--yes")
        text = self.read(self.at(".claude/settings.json"))
        begin = '{\n    // mine\n    "model": "opus", // !\n    "env": {\n'
        self.assertTrue(text.startswith(begin), text)
        self.assertIn("ANTHROPIC_BASE_URL", uncommented(text)["env"])

    def test_opencode_with_comments_in_its_name_is_seen(self) -> None:
        self.put(self.at(OPENCODE + "c"), '{\n  // mine\n  "theme": "x",\n}\n')
        self.setup("opencode", "--write", "--yes")
        self.assertFalse(os.path.exists(self.at(OPENCODE)))
        text = self.read(self.at(OPENCODE + "c"))
        self.assertIn("// mine", text)
        self.assertIn("copilot_proxy", uncommented(text)["provider"])

    def test_ends_of_lines_stay(self) -> None:
        path = self.at(".claude/settings.json")
        os.makedirs(os.path.dirname(path))
        with open(path, "wb") as file:
            file.write(b'{\r\n  "a": 1\r\n}\r\n')
        self.setup("claude-code", "--write", "--yes")
        with open(path, "rb") as file:
            data = file.read()
        self.assertEqual(data.count(b"\n"), data.count(b"\r\n"))
        self.assertTrue(data.startswith(b'{\r\n  "a": 1,\r\n  "env": {\r\n'), data)

    def test_a_setting_that_goes_before_it_is_named(self) -> None:
        for name in ("ANTHROPIC_API_KEY", "apiKeyHelper"):
            text = json.dumps({"env": {name: "x"}} if name.isupper() else {name: "x"})
            self.put(self.at(".claude/settings.json"), text)
            output = self.setup("claude-code", "--write", "--yes")
            self.assertIn("sets %s" % name, output)
        self.put(self.at(".claude/settings.json"), "{}")
        self.assertNotIn(" sets ", self.setup("claude-code", "--write", "--yes"))

    def test_undo_puts_one_backup_after_the_other_back(self) -> None:
        path = self.at(".codex/config.toml")
        self.put(path, 'model = "first"\n')
        self.setup("codex", "--write", "--yes")
        self.put(path, 'model = "second"\n')
        self.setup("codex", "--write", "--yes")
        code, output = self.run_setup("codex", "--undo")
        self.assertEqual((code, "--yes" in output), (2, True))
        for wanted in ("second", "first"):
            self.assertIn("+model = ", self.setup("codex", "--undo", "--yes"))
            self.assertEqual(self.read(path), 'model = "%s"\n' % wanted)
        code, output = self.run_setup("codex", "--undo", "--yes")
        self.assertEqual(code, 1)
        self.assertIn("no backup", output)

    def test_a_key_of_toml_is_not_written_twice_however_it_is_spelt(self) -> None:
        for odd in ('  model = "x"', '"model" = "x"', "\t'model'=\"x\""):
            self.put(self.at(".codex/config.toml"), odd + "\n[mine]\nmodel = 1\n")
            self.setup("codex", "--write", "--yes")
            text = self.read(self.at(".codex/config.toml"))
            top = text.partition("\n[")[0]
            self.assertEqual(len(re.findall(r"(?m)^\s*[\"']?model[\"']?\s*=", top)), 1, text)
            self.assertIn("[mine]\nmodel = 1\n", text)

    def test_undo_leaves_backups_of_others_alone(self) -> None:
        path = self.at(".codex/config.toml")
        for own in (path + ".bak", path + ".old.bak", path + ".1.bak.bak"):
            self.put(own, 'model = "mine"\n')
        self.put(path, 'model = "first"\n')
        code, output = self.run_setup("codex", "--undo", "--yes")
        self.assertEqual((code, "no backup" in output), (1, True))
        self.assertEqual(self.read(path), 'model = "first"\n')
        self.assertTrue(os.path.exists(path + ".bak"))

    def test_the_mark_of_an_encoding_stays_and_comes_back(self) -> None:
        path = self.at(".claude/settings.json")
        self.put(path, '\ufeff{"a": 1}')
        self.setup("claude-code", "--write", "--yes")
        self.assertTrue(self.read(path).startswith('\ufeff{"a": 1,'))
        self.assertIn("as it should be", self.setup("claude-code", "--write"))
        self.setup("claude-code", "--undo", "--yes")
        self.assertEqual(self.read(path), '\ufeff{"a": 1}')

    def test_what_to_put_in_by_hand_stands_in_lines(self) -> None:
        for odd in ("{ {} }", "{ [] }", "[[]]", '{"env": {"B": "\\ud83d"}}'):
            self.put(self.at(".claude/settings.json"), odd)
            code, output = self.run_setup("claude-code", "--write", "--yes")
            self.assertEqual((code, "by hand" in output), (2, True), output)
            self.assertIn('\n    "ANTHROPIC_BASE_URL": ', output)
            self.assertEqual(self.read(self.at(".claude/settings.json")), odd)

    def test_zsh_is_a_shell(self) -> None:
        self.assertIn("export OPENAI_BASE_URL=", self.setup("openai-sdk", "--shell", "zsh"))


class ServiceTest(SetupCase):
    def test_a_unit_is_only_printed(self) -> None:
        for flag in ("--write", "--check", "--undo"):
            code, output = self.run_setup("systemd", flag)
            self.assertEqual(code, 2)
            self.assertIn(flag, output)

    def test_a_unit_that_could_not_start_is_refused(self) -> None:
        code, output = self.run_setup("systemd", "--host", "0.0.0.0")
        self.assertEqual(code, 2)
        self.assertIn("--api-key auto", output)
        output = self.setup("systemd", "--host", "0.0.0.0", "--api-key", "auto")
        self.assertIn("--host=0.0.0.0 --api-key=auto", output)

    @unittest.skipUnless(os.name == "posix", "units of systemd")
    def test_its_command_serves_from_its_folder_with_byte_code_that_is_kept(self) -> None:
        unit = self.setup("systemd")
        found = dict(line.split("=", 1) for line in unit.splitlines() if line[:4] in (
            "Work", "Exec"))
        self.assertEqual(found["WorkingDirectory"], ROOT)
        start, health = shlex.split(found["ExecStart"]), shlex.split(found["ExecStartPost"])
        self.assertEqual(start[:4], [sys.executable, "-m", "copilot_proxy", "start"])
        cache = self.at("cache")
        environ = clean_environment(self.home, PYTHONPYCACHEPREFIX=cache)
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        shown = subprocess.run([*start[:3], "--version"], cwd=found["WorkingDirectory"],
                               env=environ, stdout=subprocess.PIPE, timeout=60)
        self.assertIn(b"copilot_proxy ", shown.stdout)
        kept = [name for _, _, names in os.walk(cache) for name in names]
        self.assertTrue(any(name.startswith("copilot_proxy.") for name in kept), kept)
        done = subprocess.run([*health[:-1], self.proxy.url], cwd=found["WorkingDirectory"],
                              env=environ, stdout=subprocess.PIPE, timeout=60)
        self.assertEqual(done.returncode, 0, done.stdout)

    def test_the_data_folder_holds_the_byte_code(self) -> None:
        data = os.path.join(self.home, "a & b")
        cache = os.path.join(data, "bytecode")
        unit = self.setup("systemd", "--data-dir", data)
        self.assertIn('\nEnvironment="PYTHONPYCACHEPREFIX=%s"\n' % cache, unit)
        text = self.setup("launchd", "--data-dir", data)
        text = '<?xml version="1.0" encoding="UTF-8"?>' + text[text.index("<plist"):]
        found = plistlib.loads(text.encode())
        self.assertEqual(found["EnvironmentVariables"], {"PYTHONPYCACHEPREFIX": cache})


if __name__ == "__main__":
    unittest.main()
