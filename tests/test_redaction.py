"""No secret in what --log-bodies and the bundle write, however it comes, and no help eaten
(sections 4, 17 and 23)."""
from __future__ import annotations

import ast
import json
import logging
import os
import random
import tempfile
import unittest
import unittest.mock

from support import ROOT, Proxy, ProxyCase, chat, cp, long_run, message, run_main
from fake_upstream import FakeUpstream
from gauges import the_source

GHU, PAT = "ghu_" + "aB3" * 12, "github_pat_" + "x1_" * 9
BEARER = "tid=1f2e;exp=1796083200;sku=free;8kp=1:" + "c0ffee" * 20
SECRETS = (GHU, PAT, BEARER, "gho_" + "z" * 36, "sk-copilot-" + "k-9_" * 9,
           "Bearer opaque.value-1", "bearer " + GHU, "token 0123abcd_4567", "Token " + GHU,
           "https://user:pass" + "word@proxy.example:8080/", "Bearer " + BEARER)
#: of each of them, what must not be seen
HIDDEN = ("aB3aB3", "x1_x1_", "c0ffee", "zzzz", "k-9_k-9_", "opaque.value", "abcd_4567",
          "word@proxy")
WORDS = ("Bearer ", "bearer", "token ", "oken", " ", "\n", '"', "'", "\\n", "a", "data: {", "://",
         "@", "gh", "tid", "=", "\u4f60\u597d", "\U0001f600", ",", "\u2028", "Bearer KEY", "ghu_",
         "x" * 50)


def some_text(chance: random.Random) -> str:
    """Secrets among words that look like their beginnings."""
    return "".join(chance.choice(SECRETS if chance.random() < 0.2 else WORDS)
                   for _ in range(chance.randrange(1, 25)))


def in_pieces(data: bytes, cuts: list[int]) -> str:
    """What a Redactor makes of it."""
    redactor = cp.Redactor()
    edges = [0, *sorted(cuts), len(data)]
    parts = [redactor.feed(data[begin:end]) for begin, end in zip(edges, edges[1:])]
    return "".join([*parts, redactor.feed(b"", True)])


class PiecesTest(unittest.TestCase):
    """Any cut of a text gives the same."""

    def check(self, rounds: int, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(rounds):
            text = some_text(chance)
            data, whole = text.encode(), cp.redact(text)
            cuts = [chance.randrange(len(data) + 1) for _ in range(chance.randrange(6))]
            self.assertEqual(in_pieces(data, cuts), whole, (text, cuts))

    def test_cuts_at_random(self) -> None:
        self.check(1500, 1)

    @long_run
    def test_cuts_at_random_for_longer(self) -> None:
        for seed in range(2, 40):
            self.check(3000, seed)

    def test_every_single_cut_and_every_byte_alone(self) -> None:
        for secret in SECRETS:
            text = 'data: {"a":"\u4f60 %s"}\n\nsaid %s, end' % (secret, secret)
            data, whole = text.encode(), cp.redact(text)
            self.assertEqual(in_pieces(data, list(range(len(data)))), whole)
            for cut in range(len(data) + 1):
                self.assertEqual(in_pieces(data, [cut]), whole, (secret, cut))
            for hidden in HIDDEN:
                self.assertNotIn(hidden, whole)

    def test_it_holds_little_back_and_takes_endless_words(self) -> None:
        redactor = cp.Redactor()
        self.assertEqual(redactor.feed(b"all but the last\nline"), "all but the last\n")
        with unittest.mock.patch.object(cp, "MAX_HELD_CHARS", 100):
            for sizes in ((1000,), (1,) * 1000, (99, 101, 800), (100,) * 10):
                redactor, parts = cp.Redactor(), []
                for size in sizes:
                    parts.append(redactor.feed(b"x" * size))
                    self.assertLess(len(redactor._rest), 100)
                parts.append(redactor.feed(b"", True))
                self.assertEqual("".join(parts), "x" * 1000)

    def test_a_secret_in_the_texts_of_several_events_is_hidden(self) -> None:
        shapes = (lambda piece: {"choices": [{"index": 0, "delta": {"content": piece}}]},
                  lambda piece: {"type": "content_block_delta", "index": 1,
                                 "delta": {"type": "text_delta", "text": piece}},
                  lambda piece: {"type": "response.output_text.delta", "output_index": 0,
                                 "delta": piece, "item_id": "i"},
                  lambda piece: {"candidates": [{"content": {"parts": [{"text": piece}]}}]},
                  lambda piece: {"message": {"role": "assistant", "content": piece}})
        chance = random.Random(4)
        for shape in shapes:
            for prefix in ("data: ", ""):
                for secret in SECRETS:
                    text = "it says %s and then %s, more" % (secret, secret)
                    pieces = []
                    while text:
                        size = chance.randrange(1, 9)
                        pieces.append(text[:size])
                        text = text[size:]
                    lines = [prefix + json.dumps(shape(piece)) + "\n\n" for piece in pieces]
                    data = "".join(lines).encode()
                    whole = in_pieces(data, [])
                    events = [json.loads(line[len(prefix):]) for line in whole.split("\n") if line]
                    self.assertEqual(len(events), len(pieces))
                    joined = "".join(holder[path[-1]] for event in events
                                     for path, holder in cp.text_pieces(event))
                    for hidden in HIDDEN:
                        self.assertNotIn(hidden, joined)
                    self.assertEqual(joined.count("[redacted]"), 2, joined)
                    self.assertTrue(joined.startswith("it says ") and joined.endswith(" more"))
                    for _ in range(3):
                        cuts = [chance.randrange(len(data)) for _ in range(5)]
                        self.assertEqual(in_pieces(data, cuts), whole)

    def test_a_secret_in_one_event_whose_sign_came_in_another_is_hidden(self) -> None:
        for pieces in (["Bearer", " ", "opaque.value1", " end"], ["Bear", "er opaque.value1", " "],
                       ["a bearer ", "opaque.value1", "\n"], ["token ", "opaque_value1", " "],
                       ["https://", "opaque.value1", "@host "], ["x Bearer opaque.value1", " "]):
            redactor = cp.Redactor()
            out = "".join(redactor.feed(self.event(text)) for text in pieces)
            out += redactor.feed(b"", True)
            self.assertNotIn("value1", out, pieces)
            said = "".join(json.loads(line[6:])["delta"]["text"]
                           for line in out.splitlines() if line)
            self.assertEqual(said.count("[redacted]"), 1, said)

    def test_nothing_is_kept_of_parts_that_are_over(self) -> None:
        redactor = cp.Redactor()
        for index in range(500):
            redactor.feed(self.event("a word ", index=index))
        self.assertEqual(redactor._runs, {})

    @staticmethod
    def event(text: str, **more: int) -> bytes:
        return b"data: %s\n\n" % json.dumps({"delta": {"text": text}, **more}).encode()

    def test_events_without_a_secret_are_written_as_they_came(self) -> None:
        lines = ['data: {"choices": [{"delta":{"content":"%s"}}]}\n' % word
                 for word in ("Hello", " wor", "ld", "", "gh", "u_", " no", "Bearer", " KEY")]
        data = "".join(["event: x\n", *lines, "data: [DONE]\n", "{not json}\n"]).encode()
        self.assertEqual(in_pieces(data, [3, 50, 51]), data.decode())

    def test_held_lines_are_few_whatever_comes(self) -> None:
        with unittest.mock.patch.object(cp, "MAX_HELD_CHARS", 500):
            for shape in ('{"delta":"x"}\n', '{"delta":"x","index":%d}\n', "{" * 90 + "\n",
                          '{"a":' * 80 + "\n", "\n"):
                redactor, size = cp.Redactor(), 0
                for number in range(500):
                    line = shape % number if "%" in shape else shape
                    size += len(redactor.feed(line.encode()))
                    self.assertLessEqual(sum(len(held.line) for held in redactor._lines), 600)
                    self.assertLessEqual(len(redactor._runs), 50)
                self.assertGreater(size, 0)

    def test_what_is_no_text_is_cut_as_well_as_text(self) -> None:
        chance = random.Random(3)
        for _ in range(300):
            data = bytes(chance.choice(b"\xe4\xbd\xa0\xff\xf0\x9f a\"") for _ in range(40))
            cuts = [chance.randrange(41) for _ in range(4)]
            self.assertEqual(in_pieces(data, cuts), cp.redact(data.decode("utf-8", "replace")))


class BodyFileTest(ProxyCase):
    """--log-bodies."""

    def test_a_secret_that_comes_in_two_pieces_is_in_no_file(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            log = cp.BodyLog(folder, logging.getLogger("copilot_proxy"))
            data = ('data: {"t":"%s"}\n\n' % GHU).encode()
            for cut in range(len(data)):
                name = "%03d.answer" % cut
                log.put(name, data[:cut], False)
                log.put(name, data[cut:], False)
                log.put(name, b"", True)
                with open(os.path.join(folder, name + ".body"), encoding="utf-8") as file:
                    self.assertEqual(file.read(), 'data: {"t":"[redacted]"}\n\n')
            self.assertEqual(log._open, {})
            log.put("none.answer", b"", True)
            self.assertFalse(os.path.exists(os.path.join(folder, "none.answer.body")))

    def test_nothing_stays_open_when_a_stream_ends_or_its_client_leaves(self) -> None:
        with tempfile.TemporaryDirectory() as folder, FakeUpstream() as fake, \
                Proxy(fake, log_bodies=folder) as proxy:
            proxy.stream("/v1/messages", message("say " + GHU, model="gpt-5.3-codex"))
            proxy.settle()
            self.assertEqual(proxy.app.ledger.bodies._open, {})
            for name in os.listdir(folder):
                with open(os.path.join(folder, name), encoding="utf-8") as file:
                    text = file.read()
                self.assertNotIn("aB3aB3", text)
                self.assertTrue(text.endswith(("}", "\n")), text[-80:])


class RowTest(ProxyCase):
    """A key that was put into the wrong field of a client is in no history."""

    settings = {"no_history": False}

    def test_a_key_in_place_of_a_model_or_a_program_is_in_no_row(self) -> None:
        for secret in ("ghu_" + "A1" * 18, "sk-copilot-" + "B2" * 20):
            self.proxy.post("/v1/chat/completions", chat("hi", secret))
            self.proxy.post("/v1beta/models/%s:generateContent" % secret, {"contents": []})
            self.proxy.post("/v1/chat/completions", chat("hi"), **{"User-Agent": secret + "/1 x"})
            for path in ("/stats", "/history", "/history/summary", "/metrics", "/retired"):
                self.assertNotIn(secret, self.proxy.get(path).body.decode(), path)
        asked = [row["asked"] for row in self.proxy.get("/stats").json["recent"]]
        self.assertEqual(asked.count("[redacted]"), 4)


class BundleTest(unittest.TestCase):
    """debug --bundle."""

    def test_it_stays_json_when_a_secret_ends_at_a_quote(self) -> None:
        evil = {"a": ['%s"; x' % BEARER, {"n": 1, "b": "Bearer abc.def9\\"}], GHU: None, "t": True}
        told = json.loads(json.dumps(cp.redacted(evil)))
        self.assertEqual(told, {"a": ['[redacted]"; x', {"n": 1, "b": "Bearer [redacted]"}],
                                "[redacted]": None, "t": True})
        with tempfile.TemporaryDirectory() as home:
            path = os.path.join(home, "report.json")
            with unittest.mock.patch.object(cp, "probe_network", lambda app: (
                    ['said tid=1;2" and ghu_%s' % ("a" * 36)], False)):
                code, text = run_main(home, "debug", "--bundle", path,
                                      "--github-url", "http://127.0.0.1:9")
            self.assertEqual(code, 0, text)
            with open(path, encoding="utf-8") as file:
                bundle = json.load(file)
            self.assertEqual(bundle["network"], ['said [redacted]" and [redacted]'])


class HelpTest(unittest.TestCase):
    """Redaction eats no help."""

    def test_the_words_of_this_program_and_its_pages_stay(self) -> None:
        texts = [node.value for node in the_source().nodes
                 if isinstance(node, ast.Constant) and isinstance(node.value, str)
                 and len(node.value) < 2000 and "sk-copilot" not in node.value]
        self.assertGreater(len(texts), 5000)
        changed = {text for text in texts if cp.redact(text) != text}
        expected = {text for text in changed
                    if text.startswith(("tid=", "ghu_", "skip_"))    # the demo's own tokens
                    or text.count("\n") or "->" in text              # docstrings and templates
                    or "%(key)s" in text}
        self.assertEqual(changed - expected, set())
        for name in ("README.md", ".github/OPERATING.md"):
            with open(os.path.join(ROOT, name), encoding="utf-8") as file:
                for line in file:
                    if "://" not in line:
                        self.assertEqual(cp.redact(line), line)

    def test_what_stands_for_a_key_is_none(self) -> None:
        for text in ("send it as Authorization: Bearer KEY or x-api-key: KEY",
                     "-H 'Authorization: Bearer $GH_TOKEN'", "`Bearer KEY`", "Bearer YOUR-API-KEY.",
                     "a bearer token is missing", "the bearer authentication", "Bearer auth.",
                     "token limit_reached", "the token max_prompt_tokens:"):
            self.assertEqual(cp.redact(text), text)

    def test_what_only_looks_like_that_is_hidden(self) -> None:
        for text in ("Bearer KEY1", "Bearer KEY-abc", "Bearer tokenabc123", "Bearer auth.9x",
                     "Bearer mysecretkey", "bearer abcdefgh", "Bearer SECRET_OF_KEY.9",
                     "token abc_defghij1", "token abcdefgh_ijkl-9", "Bearer a1"):
            self.assertRegex(cp.redact(text), r"\A(Bearer|bearer|token) \[redacted\]\Z")


if __name__ == "__main__":
    unittest.main()
