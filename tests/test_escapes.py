"""Words of upstreams and clients: nothing of them acts on a terminal, a log, a header, a label."""
from __future__ import annotations

import contextlib
import io
import json
import logging
import unittest

from support import SLOW, ProxyCase, chat, cp, run_main, wait_until
from fake_upstream import CHAT, EXCHANGE, Answer, FakeUpstream, make_model
from cases import FolderCase

#: what must never arrive as it is: controls, C1, bidi, zero width, fillers, line separators, tags
RAW = ("\x00", "\x07", "\x08", "\x0b", "\x0c", "\r", "\x1b", "\x7f", "\x85", "\x9b", "\x9d", "\xad",
       "\u061c", "\u200b", "\u200c", "\u200d", "\u200e", "\u200f", "\u2028", "\u2029", "\u202a",
       "\u202e", "\u2060", "\u2066", "\u2069", "\u3164", "\ufeff", "\ufe0f", "\ufff9", "\U000e0041",
       "\U000e0101")
EVIL = "a" + "".join(RAW) + "\nz\tq\x1b[2J\x1b]0;owned\x07"


class TextTest(unittest.TestCase):
    def test_ordinary_text_of_any_language_stays(self) -> None:
        for text in ("", "plain", "caf\u00e9", "\u4f60\u597d", "\u05e9\u05dc\u05d5\u05dd", "a\\b",
                     "\U0001f600", "\u0939\u093f\u0928\u094d\u0926\u0940"):
            self.assertEqual(cp.visible(text), text)

    def test_each_character_that_acts_or_hides_is_escaped(self) -> None:
        for char in RAW + ("\n", "\t", "\ud800", "\udc9b"):
            with self.subTest(char=ascii(char)):
                shown = cp.visible("a%sz" % char)
                self.assertTrue(shown.isprintable() and shown.isascii(), shown)
                self.assertEqual((shown[0], shown[1], shown[-1]), ("a", "\\", "z"))
        self.assertEqual(cp.visible("\x1b[2J"), "\\x1b[2J")
        self.assertEqual(cp.visible("a\nb\x07", keep="\n"), "a\nb\\x07")


class Case(ProxyCase):
    def assert_clean(self, text: str, lines: int = 0) -> None:
        self.assertEqual([ascii(char) for char in RAW if char in text], [], ascii(text))
        if lines:
            self.assertEqual(text.count("\n"), lines, text)


class LogTest(Case):
    def formatted(self, as_json: bool = False) -> list[str]:
        with contextlib.redirect_stderr(io.StringIO()):
            log = logging.getLogger("copilot_proxy")
            kept = log.handlers[:], log.level, log.propagate
            cp.set_up_logging(True, as_json)
            formatter = log.handlers[0].formatter
            log.handlers[:], log.level, log.propagate = kept
        assert formatter is not None
        return [formatter.format(record) for record in list(self.proxy.logs)]

    def test_an_upstream_error_is_one_clean_line_in_both_forms(self) -> None:
        self.fake.script(CHAT, Answer(status=400, body={"error": {"message": EVIL, "code": EVIL}}))
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("a")).status, 400)
        self.fake.script(CHAT, Answer(status=402, body={"error": {
            "message": "quota exceeded " + EVIL, "code": "quota_exceeded"}}))
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("a")).status, 402)
        wait_until(lambda: "quota exceeded" in self.proxy.log_text())
        wait_until(lambda: self.proxy.log_text().count("status=40") == 2)
        for as_json in (False, True):
            for line in self.formatted(as_json):
                self.assert_clean(line)
                self.assertNotIn("\n", line)
                if as_json:
                    values = json.loads(line)
                    for value in values.values():
                        self.assert_clean(str(value))

    def test_client_words_are_one_clean_line(self) -> None:
        text = EVIL.encode("utf-8").decode("latin-1").replace("\r", "").replace(
            "\n", "").replace("\x00", "")
        self.proxy.get("/v1/models", **{"User-Agent": text, "session_id": text})
        self.proxy.post("/v1/chat/completions", chat("a", EVIL))
        self.proxy.get("/nowhere/%1b%5b2J%0a")
        wait_until(lambda: "/nowhere/" in self.proxy.log_text())
        for as_json in (False, True):
            for line in self.formatted(as_json):
                self.assert_clean(line)
                self.assertNotIn("\n", line)

    def test_a_traceback_keeps_its_lines_but_they_cannot_pass_for_records(self) -> None:
        try:
            raise ValueError("bad\x1b[2J\n12:00:00 W logged in as root")
        except ValueError:
            self.proxy.app.log.exception("failed\n12:00:00 W forged\x9b")
        line = next(line for line in self.formatted() if "forged" in line)
        self.assert_clean(line)
        self.assertIn("Traceback", line)
        self.assertIn("failed\\n12:00:00 W forged\\x9b", line.split("\n")[0])
        for more in line.split("\n")[1:]:
            self.assertEqual(more[:2], "  ")
        value = next(line for line in self.formatted(True) if "forged" in line)
        self.assertIn("Traceback", json.loads(value)["message"])

    def test_a_secret_is_still_no_secret_beside_a_control_character(self) -> None:
        self.proxy.app.log.warning("a ghu_%s\x1b Bearer %s\nb", "x" * 20, "y" * 20)
        for as_json in (False, True):
            line = next(line for line in self.formatted(as_json) if "[redacted]" in line)
            self.assertNotIn("xxxx", line)
            self.assertNotIn("yyyy", line)


class HeaderTest(Case):
    def test_a_model_name_of_the_upstream_cannot_act_in_a_header(self) -> None:
        raw = cp.render_head("HTTP/1.1 200 O\x1bK", [("a", EVIL), ("b", "caf\u00e9 \u20ac"),
                                                  ("c", "d\r\nSet-Cookie: x\n\ny")])
        self.assertEqual(raw.count(b"\r\n"), 5)
        self.assertEqual(raw.count(b"\n"), 5)
        self.assertEqual(raw.count(b"\r"), 5)
        self.assertTrue(raw.replace(b"\r\n", b"").decode("ascii").isprintable())

    def test_a_header_of_the_upstream_is_cleaned_before_it_is_handed_on(self) -> None:
        for value, want in (("1\x002", "1 2"), ("a\rSet-Cookie: b", "a Set-Cookie: b"),
                            ("a\x1b[2J", "a [2J"), ("\x9bx", "\\x9bx"), ("caf\xe9", "caf\\xe9"),
                            ("a\tb", "a b"), ("\x7f", "")):
            with self.subTest(value=value):
                self.fake.script(CHAT, Answer(
                    status=400, body={"error": {"message": "no"}},
                    headers={"x-github-request-id": value, "x-ratelimit-odd": value}))
                reply = self.proxy.post("/v1/chat/completions", chat("a"))
                self.assertEqual(reply.status, 400, reply.body)
                for name in ("x-github-request-id", "x-ratelimit-odd"):
                    self.assertEqual(reply.headers[name], want)

    def test_a_header_name_that_is_none_is_left_out(self) -> None:
        self.fake.script(CHAT, Answer(status=400, body={"error": {"message": "no"}}, headers={
            "x-ratelimit-a b": "1", "x-ratelimit-\x1b": "1", "x-ratelimit-\xe9": "1",
            "x-ratelimit-(": "1", "x-ratelimit-good": "1"}))
        reply = self.proxy.post("/v1/chat/completions", chat("a"))
        self.assertEqual([name for name in reply.headers if name.startswith("x-ratelimit-")],
                         ["x-ratelimit-good"])


class LabelTest(Case):
    def test_names_of_lanes_are_escaped_as_prometheus_reads_them(self) -> None:
        name = EVIL + '"\\'
        account = self.proxy.app.login.account
        self.proxy.app.ledger.record_quotas(account, "usage", {
            name: {"entitlement": 10, "remaining": 5}})
        text = self.proxy.get("/metrics").body.decode()
        self.assert_clean(text)
        line = next(line for line in text.split("\n") if "quota_used_percent{" in line)
        self.assertTrue(line.isprintable())
        self.assertIn('\\\\x1b[2J', line)
        self.assertRegex(line, r'\A\w+\{account="[0-9a-f]+",lane="([^"\\]|\\["\\n])*"\} 50\.0\Z')

    def test_names_of_fields_of_clients_are_escaped(self) -> None:
        self.proxy.app.ledger.stats.count({"lossy": {EVIL: 1}})
        self.assert_clean(self.proxy.get("/metrics").body.decode())


class TerminalTest(FolderCase):
    def test_every_command_prints_upstream_words_escaped(self) -> None:
        with FakeUpstream() as fake:
            fake.models = [make_model("evil" + EVIL), make_model("good", "Ven" + EVIL)]
            fake.logins["ghu_fake"] = EVIL
            common = ("--github-url", fake.url, "--github-token", "ghu_fake")
            for args in (("models",), ("models", "--json"), ("check-usage",),
                         ("check-usage", "--json"), ("debug",), ("auth", "--list"),
                         *([("debug", "--network")] if SLOW else [])):
                with self.subTest(args=args):
                    _, output = run_main(self.home, *args, *common)
                    self.assertEqual([ascii(c) for c in RAW if c in output], [], ascii(output))
                    self.assertNotIn("\nz", output)
            fake.script(EXCHANGE, *[Answer(status=401, body={"message": EVIL})] * 5)
            code, output = run_main(self.home, "models", *common)
            self.assertEqual(code, 1, output)
            self.assertEqual([ascii(c) for c in RAW if c in output], [], ascii(output))
            self.assertEqual(output.count("\n"), 1, output)

    def test_say_keeps_lines_and_tabs_only(self) -> None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            cp.say("a\tb\nc" + EVIL)
        self.assertEqual([ascii(c) for c in RAW if c in printed.getvalue()], [])
        self.assertTrue(printed.getvalue().startswith("a\tb\nca"))


if __name__ == "__main__":
    unittest.main()
