"""What everything leans on: errors, redaction, small functions (sections 3 and 4)."""
from __future__ import annotations

import base64
import json
import struct
import unittest

from support import cp


# Made-up tokens, put together here so that no scanner takes them for real ones.
GHU, PAT = "ghu_" + "A1b2" * 9, "github_pat_" + "11AB_cd" * 5
BEARER = "tid=" + "0a1b;exp=1;sku=x;8kp=1:abc"


class ErrorsOfTheUpstream(unittest.TestCase):

    def test_every_known_shape_is_unwrapped(self) -> None:
        inner = json.dumps({"error": {"message": "no quota", "code": "quota_exceeded"}})
        for body, want in (
                ('{"error":{"message":"a","code":"b","param":"c","type":"d"}}', ("a", "b", "c")),
                ('{"error":"a"}', ("a", None, None)),
                ('{"message":"a","code":"b"}', ("a", "b", None)),
                ('{"type":"error","error":{"type":"t","message":"a"},"request_id":"r"}',
                 ("a", None, None)),
                (" plain text\n", ("plain text", None, None)),
                (json.dumps({"message": inner}), ("no quota", "quota_exceeded", None)),
                (json.dumps({"error": {"message": inner, "code": "outer"}}),
                 ("no quota", "quota_exceeded", None)),
                ('{"message":"a","error_details":{"message":"b","url":"https://x/y"}}',
                 ("b (https://x/y)", None, None)),
                ("", ("402 Payment Required", None, None)),
                ("<html><body>502</body></html>", ("402 Payment Required", None, None)),
                ("{}", ("402 Payment Required", None, None)),
                ('{"error":{"message":"","code":"not_found"}}',
                 ("402 Payment Required", "not_found", None)),
                ('{"error":{"message":"a","code":5,"param":[]}}', ("a", None, None))):
            with self.subTest(body=body):
                self.assertEqual(cp.unwrap_error(402, body.encode(), "Payment Required"), want)

    def test_odd_shapes_never_raise(self) -> None:
        for body in (b"\xff\xfe", b"{", b"[1]", b"null", b'{"error":null}', b'{"error":[1]}',
                     b'{"message":{"a":1}}', b'{"message":["a"]}', b'{"error":{"message":5}}',
                     b'{"error_details":5,"message":"a"}', b"{" * 90000, b'{"a":' * 90000,
                     b'{"error_details":{"url":["u"]}}', b'{"message":' + b"9" * 5000 + b"}"):
            text, code, param = cp.unwrap_error(400, body, "Bad")
            self.assertTrue(text and isinstance(text, str))

    def test_long_text_is_cut_and_tokens_are_hidden(self) -> None:
        text, _, _ = cp.unwrap_error(400, b"a" * 100000, "")
        self.assertEqual(len(text), cp.MAX_ERROR_TEXT)
        text, _, _ = cp.unwrap_error(401, ('{"message":"bad %s"}' % GHU).encode(), "")
        self.assertNotIn(GHU, text)

    def test_types_by_status(self) -> None:
        for status, openai, anthropic in (
                (400, "invalid_request_error", "invalid_request_error"),
                (401, "authentication_error", "authentication_error"),
                (402, "insufficient_quota", "permission_error"),
                (403, "permission_error", "permission_error"),
                (404, "invalid_request_error", "not_found_error"),
                (413, "invalid_request_error", "request_too_large"),
                (422, "invalid_request_error", "invalid_request_error"),
                (429, "rate_limit_error", "rate_limit_error"), (500, "server_error", "api_error"),
                (502, "server_error", "api_error"), (503, "server_error", "overloaded_error"),
                (529, "server_error", "overloaded_error")):
            error = cp.ProxyError("m", status, "c", "p")
            self.assertEqual(cp.CHAT.error_body(error, "r"), {"error": {
                "message": "m", "type": openai, "param": "p", "code": "c"}})
            self.assertEqual(cp.MESSAGES.error_body(error, "r"), {
                "type": "error", "error": {"type": anthropic, "message": "m"}, "request_id": "r"})


class Redaction(unittest.TestCase):

    def test_tokens_of_every_kind_are_hidden(self) -> None:
        for text, secret in (
                ("Authorization: Bearer " + GHU, GHU), ("token " + GHU, GHU), (GHU, GHU),
                ('{"access_token":"%s"}' % GHU, GHU), ("a=" + PAT + "&b", PAT),
                ("gho_" + "x" * 36, "x" * 36), ("ghp_" + "x" * 36, "x" * 36),
                ('{"token":"%s"}' % BEARER, BEARER), ("bearer " + BEARER, BEARER),
                ("Authorization: Bearer opaque.value-1", "opaque.value-1"),
                ("https://user:pass" + "word@proxy.example:8080/", "password"),
                ("token=%s, next" % GHU, GHU)):
            with self.subTest(text=text):
                self.assertNotIn(secret, cp.redact(text))
                self.assertIn("[redacted]", cp.redact(text))

    def test_ordinary_text_stays(self) -> None:
        for text in ("max_tokens is too large", "prompt token count of 5000 exceeds the limit",
                     "https://example.com/a@b", "the token expired", "ghost_writer", "a token is",
                     "token limit reached", "Token expired; run: copilot_proxy.py auth"):
            self.assertEqual(cp.redact(text), text)

    def test_printable_is_one_ascii_line(self) -> None:
        for text in ("a\r\nb", "\x1b[31m", "\u20ac", "\ud800", "'\"", "x" * 1000):
            shown = cp.printable(text, 50)
            self.assertTrue(shown.isascii() and shown.isprintable() and len(shown) <= 500)


class SmallHelpers(unittest.TestCase):

    def test_base64_floats_are_little_endian_float32(self) -> None:
        text = cp.floats_to_base64([0.5, -1.0, 0])
        self.assertEqual(struct.unpack("<3f", base64.b64decode(text)), (0.5, -1.0, 0.0))
        self.assertEqual(cp.floats_to_base64([]), "")

    def test_short_ids_stay_and_long_ones_map_alike(self) -> None:
        self.assertEqual(cp.fit_call_id("a" * 40), "a" * 40)
        self.assertEqual(cp.fit_call_id("a" * 41), cp.fit_call_id("a" * 41))
        self.assertRegex(cp.fit_call_id("a" * 41), r"\A[a-zA-Z0-9_-]{1,64}\Z")
        cp.fit_call_id("\ud800" * 65)

    def test_loopback_is_known_by_name_and_address(self) -> None:
        for host in ("127.0.0.1", "127.8.0.1", "localhost", "a.localhost", "::1", "[::1]"):
            self.assertTrue(cp.is_loopback(host), host)
        for host in ("", "127.evil.com", "localhost.com", "1.127.0.0.1", "::", "0.0.0.0",
                     "10.0.0.1", "127.0.0.1.nip.io", "notlocalhost"):
            self.assertFalse(cp.is_loopback(host), host)


if __name__ == "__main__":
    unittest.main()
