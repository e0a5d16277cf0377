"""Laws of section 6: whatever the cut of the bytes, the same values come out, and a message that
two parties could read in two ways is refused."""
from __future__ import annotations

import gzip
import random
import unittest
import zlib
from typing import Any, Callable
from unittest import mock

from support import cp, cuts

HOST = b"Host: 127.0.0.1"
TRAILING = b"GET /next HTTP/1.1\r\n"


def head(*lines: bytes) -> bytes:
    return b"\r\n".join(lines)


def post(*fields: bytes) -> bytes:
    return head(b"POST / HTTP/1.1", HOST, *fields)


def body_form(raw: bytes) -> tuple[int, bool]:
    """(length, is chunked) of the body behind this head."""
    got, length = cp.parse_request_head(raw)
    return got.body_form(length)


class RequestHeads(unittest.TestCase):

    def refused(self, status: int, raw: bytes) -> None:
        with self.assertRaises(cp.BadRequest) as caught:
            body_form(raw)
        self.assertEqual(caught.exception.status, status, str(caught.exception))

    def test_plain_head_is_read(self) -> None:
        got, length = cp.parse_request_head(head(
            b"POST /v1/messages?beta=true HTTP/1.1", b"Host: a:1", b"X-One:  spaced \t",
            b"X-Empty:", b"Content-Length: 12"))
        self.assertEqual((got.method, got.target, got.minor), ("POST", "/v1/messages?beta=true", 1))
        self.assertEqual(got.headers, {"host": "a:1", "x-one": "spaced", "x-empty": ""})
        self.assertEqual(length, "12")
        self.assertEqual(got.body_form(length), (12, False))

    def test_repeated_ordinary_field_is_joined(self) -> None:
        got, _ = cp.parse_request_head(post(b"anthropic-beta: a-1", b"Anthropic-Beta: b-2,c-3"))
        self.assertEqual(got.headers["anthropic-beta"], "a-1, b-2,c-3")

    def test_keep_alive_by_version_and_wish(self) -> None:
        for version, wish, kept in ((b"1.1", b"", True), (b"1.1", b"close", False),
                                    (b"1.1", b"Keep-Alive", True), (b"1.0", b"", False),
                                    (b"1.0", b"keep-alive", True), (b"1.1", b"TE, Close", False)):
            with self.subTest(version=version, wish=wish):
                lines = [b"GET / HTTP/" + version, HOST] + ([b"Connection: " + wish] if wish
                                                            else [])
                self.assertIs(cp.parse_request_head(head(*lines))[0].keep_alive, kept)

    def test_body_form_of_unambiguous_heads(self) -> None:
        for field, form in ((b"X: y", (0, False)), (b"Content-Length: 0", (0, False)),
                            (b"Content-Length: 007", (7, False)),
                            (b"Transfer-Encoding: chunked", (0, True)),
                            (b"Transfer-Encoding: Chunked", (0, True))):
            with self.subTest(field=field):
                self.assertEqual(body_form(post(field)), form)

    def test_malformed_request_lines_are_400(self) -> None:
        for line in (b"", b"GET", b"GET /", b"GET  / HTTP/1.1", b"GET / HTTP/1.1 ",
                     b" GET / HTTP/1.1", b"GET\t/\tHTTP/1.1", b"G(T / HTTP/1.1",
                     b"GET / a HTTP/1.1", b"GET / http/1.1",
                     b"GET / XYZ", b"G\xc3T / HTTP/1.1", b"\x16\x03\x01 / a"):
            with self.subTest(line=line):
                self.refused(400, head(line, HOST))

    def test_control_bytes_in_target_are_400(self) -> None:
        for byte in list(range(0, 32)) + [127, 128, 255]:
            with self.subTest(byte=byte):
                self.refused(400, head(b"GET /a" + bytes([byte]) + b"b HTTP/1.1", HOST))

    def test_other_http_versions_are_505(self) -> None:
        for version in (b"HTTP/2.0", b"HTTP/2", b"HTTP/0.9", b"HTTP/1.2", b"HTTP/11", b"HTTP/",
                        b"HTTP/1.1\n", b"HTTP/1.1\r"):
            with self.subTest(version=version):
                self.refused(505, head(b"GET / " + version, HOST))

    def test_long_target_is_414(self) -> None:
        longest = b"/" + b"a" * (cp.MAX_TARGET_BYTES - 1)
        got, _ = cp.parse_request_head(head(b"GET " + longest + b" HTTP/1.1", HOST))
        self.assertEqual(len(got.target), cp.MAX_TARGET_BYTES)
        self.refused(414, head(b"GET " + longest + b"a HTTP/1.1", HOST))

    def test_too_many_fields_are_431(self) -> None:
        fields = [b"X-%d: a" % n for n in range(cp.MAX_HEADER_FIELDS - 1)]
        cp.parse_request_head(post(*fields))
        self.refused(431, post(b"X-Last: a", *fields))

    def test_missing_host_is_400_in_http_1_1_only(self) -> None:
        self.refused(400, head(b"GET / HTTP/1.1", b"X: y"))
        self.assertEqual(cp.parse_request_head(b"GET / HTTP/1.0")[0].minor, 0)

    def test_smuggling_shapes_are_refused(self) -> None:
        for status, raw in (
                (400, post(b"Content-Length: 5", b"Transfer-Encoding: chunked")),
                (400, post(b"Transfer-Encoding: chunked", b"Content-Length: 5")),
                (400, post(b"Content-Length: 5", b"Content-Length: 6")),
                (400, post(b"Content-Length: 5", b"content-length: 5")),
                (400, post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked")),
                (400, post(b"Transfer-Encoding: chunked", b"transfer-encoding: identity")),
                (400, post(b"Host: other")),
                (400, post(b"Content-Type: a/b", b"Content-Type: c/d")),
                (501, post(b"Transfer-Encoding: gzip")),
                (501, post(b"Transfer-Encoding: gzip, chunked")),
                (501, post(b"Transfer-Encoding: chunked, chunked")),
                (501, post(b"Transfer-Encoding: xchunked")),
                (501, post(b"Transfer-Encoding: chunked;q=1")),
                (501, post(b"Transfer-Encoding:")),
                (400, post(b"Transfer-Encoding: \x0bchunked", b"Content-Length: 3")),
                (400, head(b"POST / HTTP/1.0", b"Transfer-Encoding: chunked")),
                (400, post(b"Transfer-Encoding : chunked")),
                (400, post(b"Content-Length : 5")),
                (400, post(b" Content-Length: 5")),
                (400, post(b"\tX: folded")),
                (400, post(b"X: a", b" folded")),
                (400, post(b"X: a\nContent-Length: 5")),
                (400, post(b"X: a\rContent-Length: 5")),
                (400, post(b"X: a\x00b")),
                (400, post(b"X\x00: a")),
                (400, post(b"no colon")),
                (400, post(b": no name")),
                (400, post(b"")),
                (400, post(b"X\xff: a")),
                (400, b"POST / HTTP/1.1\nHost: a\nContent-Length: 5")):
            with self.subTest(raw=raw):
                self.refused(status, raw)

    def test_content_length_must_be_plain_digits(self) -> None:
        for value in (b"+5", b"-1", b"0x10", b"5 5", b"5, 5", b"5,6", b"", b"5.0", b"1e3", b"1_0",
                      b"\xb2", b"\xd9\xa5", b"9" * 16, b"5\x0b", b"five"):
            with self.subTest(value=value):
                self.refused(400, post(b"Content-Length: " + value))

    def test_random_bytes_never_raise_anything_else(self) -> None:
        chance = random.Random(3)
        good = post(b"Content-Length: 5", b"X: y", b"Transfer-Encoding: chunked")
        for _ in range(2000):
            raw = bytearray(good)
            for _ in range(chance.randrange(1, 5)):
                raw[chance.randrange(len(raw))] = chance.randrange(256)
            try:
                body_form(bytes(raw))
            except cp.BadRequest as error:
                self.assertTrue(400 <= error.status < 600)
                self.assertTrue(str(error).isprintable(), str(error))


class ResponseHeads(unittest.TestCase):

    def test_heads_are_read_leniently(self) -> None:
        for raw, want in (
                (b"HTTP/1.1 200 OK\r\nA: b", (200, "OK", {"a": "b"})),
                (b"HTTP/1.0 404", (404, "", {})),
                (b"HTTP/1.1 466 ", (466, "", {})),
                (b"HTTP/1.1 503 Service Unavailable\nA:b\nA: c",
                 (503, "Service Unavailable", {"a": "b, c"})),
                (b"HTTP/1.1 200 OK\r\nno colon\r\nB:  x ", (200, "OK", {"b": "x"}))):
            with self.subTest(raw=raw):
                self.assertEqual(cp.parse_response_head(raw), want)

    def test_what_is_no_http_is_an_upstream_error(self) -> None:
        for raw in (b"", b"SSH-2.0-x", b"HTTP/2 200", b"HTTP/1.1", b"HTTP/1.1 abc", b"200 OK",
                    b"<html>", b"HTTP/1.1 \xb2\xb2\xb2 a"):
            with self.subTest(raw=raw), self.assertRaises(cp.UpstreamError):
                cp.parse_response_head(raw)

    def test_rendered_head_reads_back_and_cannot_be_split(self) -> None:
        raw = cp.render_head("HTTP/1.1 200 OK", [("A", "b"), ("C", "d\r\nSet-Cookie: x"),
                                                 ("E", "caf\u00e9 \u20ac")])
        self.assertTrue(raw.endswith(b"\r\n\r\n"))
        self.assertEqual(raw.count(b"\r\n"), 5)
        status, _, headers = cp.parse_response_head(raw[:-4])
        self.assertEqual((status, sorted(headers)), (200, ["a", "c", "e"]))


def read_body(parts: list[bytes], **form: Any) -> tuple[bytes, bool, bytes]:
    """(payload, is done, what came behind)."""
    decoder = cp.BodyDecoder(**form)
    payload = b"".join([decoder.feed(part) for part in parts])
    return payload, decoder.done, decoder.rest


class Bodies(unittest.TestCase):

    def same_in_any_cut(self, data: bytes, want: tuple[bytes, bool, bytes], **form: Any) -> None:
        for parts in cuts(data):
            self.assertEqual(read_body(parts, **form), want, parts)

    def test_known_length_in_any_cut(self) -> None:
        self.same_in_any_cut(b"hello world", (b"hello world", True, b""), length=11)
        self.same_in_any_cut(b"hello" + TRAILING, (b"hello", True, TRAILING), length=5)
        self.same_in_any_cut(b"hell", (b"hell", False, b""), length=5)

    def test_empty_body_is_done_at_once(self) -> None:
        decoder = cp.BodyDecoder(0)
        self.assertTrue(decoder.done)
        self.assertEqual(decoder.feed(TRAILING), b"")
        self.assertEqual(decoder.rest, TRAILING)

    def test_until_close_takes_everything_and_is_never_done(self) -> None:
        self.same_in_any_cut(b"0\r\n\r\nabc", (b"0\r\n\r\nabc", False, b""))
        self.assertFalse(cp.BodyDecoder().delimited)

    def test_chunked_in_any_cut(self) -> None:
        for raw, want in ((b"3\r\nabc\r\n0\r\n\r\n", b"abc"), (b"0\r\n\r\n", b""),
                          (b"000A;ext=\"q\"\r\n0123456789\r\n1 \t\r\nz\r\n0\r\n\r\n",
                           b"0123456789z"),
                          (b"4\r\n\r\n\r\n\r\n0;last\r\nTrailer: a\r\nB: c\r\n\r\n", b"\r\n\r\n")):
            for rest in (b"", TRAILING, b"\r\n", b"5\r\n"):
                with self.subTest(raw=raw, rest=rest):
                    self.same_in_any_cut(raw + rest, (want, True, rest), chunked=True)

    def test_chunk_round_trip(self) -> None:
        chance = random.Random(11)
        for _ in range(40):
            pieces = [bytes(chance.randrange(256) for _ in range(chance.randrange(1, 70)))
                      for _ in range(chance.randrange(6))]
            raw = b"".join(map(cp.chunk, pieces)) + cp.LAST_CHUNK + TRAILING
            for parts in cuts(raw, 3, chance.randrange(99)):
                self.assertEqual(read_body(parts, chunked=True),
                                 (b"".join(pieces), True, TRAILING))

    def test_truncated_chunked_body_is_not_done(self) -> None:
        raw = cp.chunk(b"abc") + cp.chunk(b"defg") + cp.LAST_CHUNK
        for end in range(len(raw)):
            payload, done, _ = read_body([raw[:end]], chunked=True)
            self.assertFalse(done)
            self.assertTrue(b"abcdefg".startswith(payload))

    def refused_in_any_cut(self, raw: bytes, status: int = 400) -> None:
        for parts in cuts(raw):
            decoder = cp.BodyDecoder(chunked=True)
            with self.assertRaises(cp.BadRequest, msg="%r passed as %r" % (raw, parts)) as caught:
                for part in parts:
                    decoder.feed(part)
            self.assertEqual(caught.exception.status, status)

    def test_malformed_chunk_sizes_are_refused_in_any_cut(self) -> None:
        for size in (b"0x10", b"+5", b"-1", b"5 5", b"", b" 5", b"f" * 16, b"0" * 16, b"g", b"5,5",
                     b"5\x00", b"\xb2", b"_5", b"5\t;\x00"):
            with self.subTest(size=size):
                self.refused_in_any_cut(size + b"\r\nabcde\r\n0\r\n\r\n")

    def test_bare_line_feeds_are_refused_in_any_cut(self) -> None:
        """A peer that takes a bare LF as a line end would see other chunks than we do."""
        for raw in (b"5\nhello\r\n0\r\n\r\n", b"5\r\nhello\n0\r\n\r\n", b"5\r\nhello\r\n0\n\n\r\n",
                    b"5;a\nb\r\nhello\r\n0\r\n\r\n", b"5;\n\r\nhello\r\n0\r\n\r\n",
                    b"0\r\nTrailer: a\nB: c\r\n\r\n"):
            with self.subTest(raw=raw):
                self.refused_in_any_cut(raw)

    def test_chunk_longer_than_its_size_is_refused(self) -> None:
        for raw in (b"3\r\nabcd\r\n0\r\n\r\n", b"3\r\nabc0\r\n\r\n", b"1\r\naa\r\n"):
            with self.subTest(raw=raw):
                self.refused_in_any_cut(raw)

    def test_endless_chunk_line_is_refused(self) -> None:
        fits = b"1;" + b"e" * (cp.MAX_CHUNK_LINE_BYTES - 4) + b"\r\n"
        self.assertEqual(len(fits), cp.MAX_CHUNK_LINE_BYTES)
        for parts in cuts(fits + b"a\r\n0\r\n\r\n", 4):
            self.assertEqual(read_body(parts, chunked=True), (b"a", True, b""))
        self.refused_in_any_cut(b"1;" + b"e" * cp.MAX_CHUNK_LINE_BYTES + b"\r\na\r\n0\r\n\r\n")
        self.refused_in_any_cut(b"1" * (cp.MAX_CHUNK_LINE_BYTES + 1))

    def test_endless_trailer_is_431(self) -> None:
        decoder = cp.BodyDecoder(chunked=True)
        decoder.feed(b"0\r\n")
        with self.assertRaises(cp.BadRequest) as caught:
            for _ in range(cp.MAX_HEAD_BYTES // 500 + 2):
                decoder.feed(b"X: " + b"y" * 500 + b"\r\n")
        self.assertEqual(caught.exception.status, 431)


class Inflating(unittest.TestCase):

    def refused(self, status: int, data: bytes, coding: str) -> None:
        with self.assertRaises(cp.BadRequest) as caught:
            cp.inflate(data, coding)
        self.assertEqual(caught.exception.status, status)

    def test_known_codings_are_undone(self) -> None:
        plain = b'{"model":"gpt-4.1"}' * 50
        for coding, data in (("gzip", gzip.compress(plain)), ("x-gzip", gzip.compress(plain)),
                             (" GZip ", gzip.compress(plain)), ("deflate", zlib.compress(plain)),
                             ("identity", plain), ("", plain)):
            with self.subTest(coding=coding):
                self.assertEqual(cp.inflate(data, coding), plain)

    def test_unknown_codings_are_415(self) -> None:
        for coding in ("br", "zstd", "gzip, gzip", "compress", "\x1b[31m"):
            with self.subTest(coding=coding):
                self.refused(415, b"abc", coding)

    def test_bomb_is_413(self) -> None:
        with mock.patch.object(cp, "MAX_BODY_BYTES", 4096):
            self.assertEqual(len(cp.inflate(gzip.compress(bytes(4096)), "gzip")), 4096)
            self.refused(413, gzip.compress(bytes(4097)), "gzip")
            self.refused(413, gzip.compress(bytes(10 ** 7)), "gzip")
            self.refused(413, zlib.compress(bytes(10 ** 7)), "deflate")

    def test_cut_or_foreign_data_is_400(self) -> None:
        whole = gzip.compress(b"hello world" * 9)
        for end in range(len(whole)):
            self.refused(400, whole[:end], "gzip")
        self.refused(400, b'{"a":1}', "gzip")
        self.refused(400, b'{"a":1}', "deflate")
        self.refused(400, whole[:-8] + b"\0" * 8, "gzip")


STREAMS: tuple[tuple[str, bytes, list[tuple[str, bytes]]], ...] = (
    ("plain", b'data: {"a":1}\n\ndata: {"b":2}\n\n', [("", b'{"a":1}'), ("", b'{"b":2}')]),
    ("named", b"event: ping\ndata: {}\n\nevent:x\ndata:y\n\n", [("ping", b"{}"), ("x", b"y")]),
    ("no space after colon", b"data:[DONE]\n\ndata:  two\n\n", [("", b"[DONE]"), ("", b" two")]),
    ("several data lines", b"data: a\ndata: b\ndata\ndata:c\n\n", [("", b"a\nb\n\nc")]),
    ("comments", b": hello\n\n:\n\n: x\ndata: a\n: y\n\n: z\n\n", [("", b"a")]),
    ("other fields", b"id: 7\nretry: 10\ndata: a\nfoo: b\n\nretry: 5\n\n", [("", b"a")]),
    ("empty lines between", b"\n\ndata: a\n\n\n\n\ndata: b\n\n\n", [("", b"a"), ("", b"b")]),
    ("event without data", b"event: a\n\ndata: b\n\nevent: c\ndata:\n\n", [("", b"b")]),
    ("colons inside", b"data: a: b: c\nevent: d:e\n\n", [("d:e", b"a: b: c")]),
    ("not ASCII", "data: \u20ac\U0001f600\n\n".encode(), [("", "\u20ac\U0001f600".encode())]),
)


def decode(parts: list[bytes]) -> list[tuple[str, bytes]]:
    decoder = cp.SSEDecoder()
    frames = [frame for part in parts for frame in decoder.feed(part)] + decoder.close()
    return [(frame.event, frame.data) for frame in frames]


class Events(unittest.TestCase):

    def test_any_line_end_in_any_cut_gives_the_same_events(self) -> None:
        for name, raw, want in STREAMS:
            for end in (b"\n", b"\r\n", b"\r"):
                data = raw.replace(b"\n", end)
                for parts in cuts(data):
                    self.assertEqual(decode(parts), want, (name, parts))

    def test_mixed_line_ends(self) -> None:
        for parts in cuts(b"data: a\r\ndata: b\n\r\ndata: c\r\n\ndata: d\r\r\ndata: e\n\n"):
            self.assertEqual(decode(parts), [("", b"a\nb"), ("", b"c"), ("", b"d"), ("", b"e")])

    def test_all_streams_in_one(self) -> None:
        whole = b"".join(raw for _, raw, _ in STREAMS)
        want = [frame for _, _, frames in STREAMS for frame in frames]
        for parts in cuts(whole, 40):
            self.assertEqual(decode(parts), want)

    def test_events_come_as_soon_as_they_are_whole(self) -> None:
        for _, raw, want in STREAMS:
            decoder = cp.SSEDecoder()
            frames = [f for part in cuts(raw)[1] for f in decoder.feed(part)]
            self.assertEqual([(f.event, f.data) for f in frames], want)
            self.assertEqual(decoder.close(), [])

    def test_last_event_without_its_empty_line(self) -> None:
        for rest in (b"data: b", b"data: b\n", b"data: b\r\n", b"data: b\r"):
            for parts in cuts(b"data: a\n\n" + rest):
                self.assertEqual(decode(parts), [("", b"a"), ("", b"b")], parts)

    def test_cutter_joins_to_the_normalised_stream(self) -> None:
        whole = b"".join(raw for _, raw, _ in STREAMS).strip(b"\n") + b"\n\n"
        for end in (b"\n", b"\r\n"):
            for parts in cuts(whole.replace(b"\n", end)):
                cutter = cp.FrameCutter()
                blocks = [cutter.feed(part) for part in parts]
                self.assertEqual(b"".join(blocks), whole)
                self.assertEqual(cutter.flush(), b"")
                for block in blocks:
                    self.assertTrue(not block or block.endswith(b"\n"))

    def test_split_frames_of_a_block(self) -> None:
        self.assertEqual(cp.split_frames(b"a: 1\n\nb: 2\nc: 3\n\n\n\n"),
                         [b"a: 1\n\n", b"b: 2\nc: 3\n\n"])

    def test_oversize_event_is_refused_in_any_cut(self) -> None:
        with mock.patch.object(cp, "MAX_FRAME_BYTES", 200):
            fits = b"data: " + b"x" * 150 + b"\n\n"
            for parts in cuts(fits * 5):
                self.assertEqual(len(decode(parts)), 5)
            for parts in cuts(b"data: " + b"x" * 400):
                with self.assertRaises(cp.UpstreamError):
                    decode(parts)

    def test_frame_round_trip(self) -> None:
        for event, data in (("", b"{}"), ("ping", b'{"type":"ping"}'), ("", b"a\nb\n\nc"),
                            ("x", b" leading"), ("", b"a:b"), ("", b"[DONE]")):
            with self.subTest(event=event, data=data):
                self.assertEqual(cp.Frame.parse(cp.Frame(event, data).encode()),
                                 cp.Frame(event, data))
                self.assertEqual(decode([cp.Frame(event, data).encode()]), [(event, data)])

    def test_quick_and_careful_reading_agree(self) -> None:
        chance = random.Random(5)
        words = [b"data: ", b"data:", b"event: a", b"\n", b"x", b":", b" ", b"id: 1", b"\xff"]
        for _ in range(2000):
            raw = b"data: " + b"".join(chance.choice(words) for _ in range(6))
            raw = raw.strip(b"\n").replace(b"\n\n", b"\n") + b"\n\n"
            careful = cp.Frame.parse(b": x\n" + raw)
            self.assertEqual(cp.Frame.parse(raw), careful, raw)


class JsonValues(unittest.TestCase):

    def test_malformed_json_is_a_value_error(self) -> None:
        for raw in (b"", b"{", b"[1,]", b"nul", b"NaN", b'{"a":Infinity}', b"-Infinity", b"\xff",
                    b'{"a":1}x', b"[" * 100000, b'{"a":' * 100000, b"\x00", b'"\n"'):
            with self.subTest(raw=raw[:20]), self.assertRaises(ValueError):
                cp.loads(raw)

    def test_json_round_trip_keeps_order_and_every_character(self) -> None:
        for text in ("plain", "\u20ac\U0001f600", "\ud800 alone", "\u2028", '"\\', "\x00"):
            value = {"z": text, "a": [1, 2.5, None, True, {"y": text, "b": {}}]}
            self.assertEqual(cp.loads(cp.dumps(value)), value)
            self.assertEqual(list(cp.loads(cp.dumps(value))), ["z", "a"])

    def test_whatever_is_read_can_be_written(self) -> None:
        read = []
        for depth in (1, 50, 100, 200, 400, 900, 3000, 20000):
            raw = b"[" * depth + b"]" * depth
            try:
                value = cp.loads(raw)
            except ValueError:
                continue
            self.assertEqual(cp.dumps(value), raw)
            read.append(depth)
        self.assertEqual(read[:3], [1, 50, 100])
        self.assertLess(read[-1], 20000)

    def test_leniency_helpers_never_raise(self) -> None:
        checks: tuple[tuple[Callable[[Any], Any], Any, Any], ...] = (
            (cp.as_object, {"a": 1}, {}), (cp.as_list, [1], []), (cp.count_or_zero, 3, 0))
        for read, good, fallback in checks:
            self.assertEqual(read(good), good)
            for value in (None, True, 1.5, "a", object()):
                self.assertEqual(read(value), fallback)


if __name__ == "__main__":
    unittest.main()
