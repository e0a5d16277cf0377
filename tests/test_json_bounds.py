"""A JSON body is bounded before it is built: in values, in depth, in digits.  And a name that leads
to an address of a machine's own networks, or of its cloud's, leads to no image."""
from __future__ import annotations

import gc
import json
import sys
import time
import tracemalloc
import unittest
import unittest.mock
from typing import Any

from support import REQUESTS, SLOW, chat, cp, long_run, message, response
from fake_upstream import CHAT, Answer
from cases import SharedCase

CHAT_PATH = "/v1/chat/completions"
MEGABYTE = 1024 * 1024
LARGE_BYTES = 30 * MEGABYTE
MAX_PEAK_BYTES = 200 * MEGABYTE      # far below 300, for all that is alive at once
MAX_FACTOR = 8                       # of the body, for what it is turned into
QUICK_S = 2.0                        # of processor time, on any machine

#: pieces of JSON whose values take many times their length
DENSE = (b"[],", b"{},", b'{"a":1},', b"[[]],", b'"",', b'"ab",', b"1.5,", b"1000,", b"null,",
         b'[""],', b'{"":[]},', b"[ ],", b"{\n},")
USUAL = DENSE if SLOW else (b"[],",)


def filled(piece: bytes, size: int = LARGE_BYTES) -> bytes:
    """A list of that many bytes."""
    return b"[" + piece * (size // len(piece)) + b"0]"


def objects(size: int = LARGE_BYTES) -> bytes:
    """An object of that many bytes, each key another."""
    count = size // 13
    return b"{" + b",".join(b'"%08x":1' % number for number in range(count)) + b"}"


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


def peak_of(work: Any) -> int:
    """The most bytes that Python's own objects took meanwhile."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


class ValuesTest(SharedCase):
    def refuse(self, data: bytes) -> None:
        with self.assertRaises(cp.TooManyValues):
            cp.loads(data)

    def test_thirty_megabytes_of_empty_lists_do_not_fill_the_memory(self) -> None:
        for piece in USUAL:
            with self.subTest(piece=piece):
                data = filled(piece)
                began = time.thread_time()
                self.assertLess(peak_of(lambda data=data: self.refuse(data)), 16 * MEGABYTE)
                self.assertLess(time.thread_time() - began, QUICK_S)

    @long_run
    def test_thirty_megabytes_of_fields_do_not_fill_the_memory(self) -> None:
        data = objects()
        self.assertLess(peak_of(lambda: self.refuse(data)), 16 * MEGABYTE)

    def test_a_body_of_too_many_values_is_413_on_each_route(self) -> None:
        values = filled(b"[],", 4 * MEGABYTE)
        for path, make in REQUESTS:
            with self.subTest(path=path):
                body = json.dumps(make("a")).encode()[:-1] + b',"metadata":' + values + b"}"
                reply = self.proxy.post(path, body)
                self.assertEqual(reply.status, 413, reply.body)
                self.assertIn("too many values", reply.json["error"]["message"])
        self.assertEqual(self.proxy.post(CHAT_PATH, chat("a")).status, 200)

    @long_run
    def test_what_is_accepted_takes_no_more_than_its_room(self) -> None:
        """Just below the bound, in each shape: the texts, and not much more than the room."""
        for piece in USUAL:
            room = cp._room_of(piece)
            size = cp.JSON_ROOM_BYTES // room * len(piece) * 9 // 10
            data = filled(piece, size)
            with self.subTest(piece=piece, size=size):
                peak = peak_of(lambda data=data: cp.loads(data))
                self.assertLess(peak, cp.JSON_ROOM_BYTES + 2 * size)
                self.assertLess(peak, MAX_PEAK_BYTES)

    def test_large_texts_are_no_values(self) -> None:
        """Code and JSON inside a text are full of marks, and cost nothing."""
        piece = '{"a": [1, 2], "b\\": \\\\": {}}, \\\\\\\\"'
        much = 1 if SLOW else 4
        for text in (piece * (40_000 // much), "[]," * (1_500_000 // much), '"' * 700_000,
                     "\\" * (700_000 // much), "\\\"" * (350_000 // much)):
            body = json.dumps(chat(text)).encode()
            with self.subTest(text=text[:20], size=len(body)):
                self.assertEqual(cp.loads(body)["messages"][0]["content"], text)
                if sys.version_info >= (3, 9):         # 3.8 makes a text of each piece between
                    peak = peak_of(lambda body=body: cp.loads(body))
                    self.assertLess(peak, MAX_FACTOR * len(body))

    def test_a_text_of_too_many_escapes_is_refused(self) -> None:
        """The parser makes an object of each escape of one text; those of several add up to
        nothing."""
        most = cp.JSON_ROOM_BYTES // cp.JSON_ESCAPE_BYTES
        text = b'"%b"' % (b"\\n" * (most * 3 // 4))
        self.assertEqual(len(cp.loads(b"[%b, %b]" % (text, text))), 2)
        with self.assertRaisesRegex(cp.TooManyValues, "too many escapes"):
            cp.loads(b'["%b"]' % (b"\\n" * (most + 1)))

    def test_a_long_history_of_short_turns_is_accepted(self) -> None:
        turns = [{"role": "user" if number % 2 else "assistant", "content": "turn %d" % number}
                 for number in range(50_000)]
        self.assertEqual(len(cp.loads(json.dumps(turns).encode())), 50_000)

    def test_marks_outside_texts_are_those_of_the_parser(self) -> None:
        """Whole, and cut anywhere: as many as the value has, also with odd escapes."""
        values: list[Any] = [
            {}, [], "", "\\", "\"", ["\\\"", "[{", "\\\\"], {"a\"[": {"b\\": ["c,", 1, None]}},
            [{"k": "\\" * n + "\"" * n} for n in range(5)], ["\u00e9\u4e2d", "\U0001f600,"]]
        for value in values:
            data = json.dumps(value, ensure_ascii=False).encode()
            want = self.marks_of(value)
            for size in (1, 2, 3, 7, 1000):
                with self.subTest(data=data, size=size):
                    with unittest.mock.patch.object(cp, "JSON_PIECE_BYTES", size):
                        plain = b"".join(cp._outside_texts(data))
                    found = {mark: plain.count(mark) for mark in (b"[", b"{", b":", b",")}
                    self.assertEqual(found, want)

    def marks_of(self, value: Any) -> dict[bytes, int]:
        found = dict.fromkeys((b"[", b"{", b":", b","), 0)
        todo = [value]
        while todo:
            item = todo.pop()
            if isinstance(item, (dict, list)):
                found[b"{" if isinstance(item, dict) else b"["] += 1
                found[b","] += max(len(item) - 1, 0)
                found[b":"] += len(item) if isinstance(item, dict) else 0
                todo.extend(item.values() if isinstance(item, dict) else item)
        return found


class DepthTest(SharedCase):
    """Nesting that some functions could not walk is refused where it comes in."""

    def test_a_nesting_at_the_edge_of_the_stack_is_never_a_500(self) -> None:
        paths = (*REQUESTS, ("/v1/responses/compact", response), ("/v1/completions", prompt),
                 ("/v1/messages/count_tokens", message), ("/v1/responses/input_tokens", response),
                 ("/v1/embeddings", embedding))
        for path, make in paths:
            depths = (201, 980, 20_000, 150, 300, 480, 900, 960, 990, 1000, 5000)
            for depth in depths if SLOW else depths[:3]:
                for place in ("metadata", "tools", "input", "messages", "x", "text", "tool_choice"):
                    for pair in (("[", "]"), ('{"a":', "}")):
                        inner = nested(depth, *pair).replace(":}", ":0}", 1)
                        body = json.dumps(make("a"))[:-1] + ',"%s":%s}' % (place, inner)
                        with self.subTest(path=path, depth=depth, place=place, pair=pair):
                            reply = self.proxy.post(path, body.encode())
                            self.assertLess(reply.status, 500, reply.body)
                            if depth > cp.MAX_JSON_DEPTH:
                                self.assertEqual(reply.status, 400, reply.body)
                                self.assertIn("nested too deeply", str(reply.json))

    def test_arguments_of_a_call_that_are_nested_at_the_edge_are_never_a_500(self) -> None:
        for depth in (150, 300, 900, 980, 990, 5000):
            text = nested(depth, '{"a":', "}").replace(":}", ":0}", 1)
            call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": text}}
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]},
                     {"role": "tool", "tool_call_id": "c", "content": text}]
            items = [{"role": "user", "content": "a"},
                     {"type": "function_call", "call_id": "c", "name": "f", "arguments": text},
                     {"type": "function_call_output", "call_id": "c", "output": text}]
            for model in ("gpt-4.1", "claude-sonnet-4.6", "gpt-5.3-codex", "gemini-2.5-pro"):
                for path, body in ((CHAT_PATH, {"model": model, "messages": turns}),
                                   ("/v1/responses", {"model": model, "input": items})):
                    with self.subTest(depth=depth, model=model, path=path):
                        reply = self.proxy.post(path, body)
                        self.assertLess(reply.status, 500, reply.body)

    def test_the_bound_is_exact(self) -> None:
        most = cp.MAX_JSON_DEPTH
        self.assertTrue(cp.loads(nested(most).encode()))
        for depth in (most + 1, most * 2):
            with self.assertRaises(ValueError):
                cp.loads(nested(depth).encode())
        wide = b"[" + b"[[1]]," * 5000 + b"2]"
        self.assertEqual(len(cp.loads(wide)), 5001)
        self.assertEqual(cp.loads(json.dumps("[" * 5000).encode()), "[" * 5000)

    def test_an_error_of_the_upstream_at_the_edge_of_the_stack_is_no_500(self) -> None:
        for depth in (300, 900, 980, 990, 1000, 20_000):
            for form in ('{"error":{"message":%s}}', '{"message":%s}', '{"error":%s}', "%s"):
                with self.subTest(depth=depth, form=form):
                    self.fake.script(CHAT, Answer(400, body=form % nested(depth)))
                    reply = self.proxy.post(CHAT_PATH, chat("a"))
                    self.assertEqual(reply.status, 400, reply.body)

    def test_an_answer_of_the_upstream_at_the_edge_of_the_stack_is_502(self) -> None:
        for depth in (300, 980, 1000, 20_000):
            for stream in (False, True):
                with self.subTest(depth=depth, stream=stream):
                    text = '{"id":"a","choices":[],"x":%s}' % nested(depth)
                    answer = Answer(200, body=text, headers={"content-type": "application/json"})
                    if stream:
                        answer = Answer(200, chunks=[b"data: %b\n\n" % text.encode()])
                    self.fake.script(CHAT, answer)
                    reply = self.proxy.post(CHAT_PATH, chat("a", stream=stream))
                    self.assertIn(reply.status, (200, 502) if stream else (502,), reply.body)
                    self.assertNotIn(b"error in the proxy itself", reply.body)


class FarPathTest(unittest.TestCase):
    """The path of a field in an upstream's error is walked in the client's body."""

    def test_a_path_of_many_steps_takes_no_time(self) -> None:
        body: dict[str, Any] = {}
        for _ in range(150):
            body = {"a": body}
        for path in (".".join("a" * 100) + ".z", "a" + "[a]" * 100 + "z", ".".join("a" * 16 + "z"),
                     ".".join("a" * 100), "a" * 700):
            with self.subTest(path=path[:20]):
                began = time.thread_time()
                cp.places(body, path)
                self.assertLess(time.thread_time() - began, QUICK_S)

    def test_paths_of_validators_still_lead_there(self) -> None:
        body = {"messages": [{"content": [{"type": "image", "source": {"data": "x"}}]}]}
        path = "messages.0.content.0.image.source.base64.data"
        self.assertEqual([key for _, key in cp.places(body, path)], ["data"])


class AddressTest(unittest.TestCase):
    PRIVATE = (
        "168.63.129.16", "169.254.169.254", "169.254.0.23", "100.100.100.200", "192.0.0.192",
        "fd00:ec2::254", "fd20:ce::254", "100.64.0.1", "100.127.255.255", "192.0.0.1", "192.0.2.1",
        "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "192.88.99.1", "240.0.0.1",
        "0.1.2.3", "10.0.0.1", "172.31.255.255", "192.168.0.1", "224.0.0.251", "255.255.255.255",
        "::", "::1", "fc00::1", "fd12:3456::1", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1",
        "100::1", "2001::1", "2001:0:53aa:64c::1", "2001:2::1", "2001:10::1", "2001:20::1",
        "2001:db8::1", "2002:7f00:1::", "2002:a83f:8110::1", "2002:5db8:d70e::1", "3fff::1",
        "5f00::1", "4000::1", "64:ff9b:1::a83f:8110", "64:ff9b::168.63.129.16",
        "64:ff9b::127.0.0.1", "64:ff9b::10.0.0.1", "::ffff:168.63.129.16", "::ffff:10.0.0.1",
        "::ffff:100.64.0.1", "::ffff:0:127.0.0.1", "::168.63.129.16", "::127.0.0.1",
        "2606:4700::5efe:7f00:1", "2606:4700::200:5efe:a83f:8110")
    PUBLIC = ("93.184.215.14", "8.8.8.8", "168.63.129.15", "168.63.129.17", "100.63.255.255",
              "100.128.0.1", "198.17.255.255", "198.20.0.1", "192.0.1.1", "172.32.0.1",
              "2606:2800:21f:cb07::1", "2a00:1450:4001::1", "::ffff:93.184.215.14",
              "64:ff9b::93.184.215.14")

    def test_the_clouds_and_special_networks_do_not_count_as_public(self) -> None:
        for address in self.PRIVATE:
            self.assertFalse(cp.is_public(address), address)

    def test_addresses_beside_them_are_public(self) -> None:
        for address in self.PUBLIC:
            self.assertTrue(cp.is_public(address), address)


def prompt(text: str) -> dict[str, Any]:
    return {"model": "gpt-4.1", "prompt": text}


def embedding(text: str) -> dict[str, Any]:
    return {"model": "text-embedding-3-small", "input": text}


if __name__ == "__main__":
    unittest.main()
