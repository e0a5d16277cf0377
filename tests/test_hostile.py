"""Bad input never crashes or leaks: each gets a clear answer in the dialect, and life goes on."""
from __future__ import annotations

import contextlib
import json
import re
import logging
import random
import socket
import struct
import sys
import threading
import time
import unittest
from typing import Any

from support import (PATHS, REQUESTS, SLOW, RawClient, chat, chunked_post, get, message, need_files,
                     places, post, raw_exchange, release, response, said, with_value)
from fake_upstream import CHAT, EMBEDDINGS, MESSAGES, RESPONSES, Answer
from cases import SharedCase

SEED = 20261121
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "$schema": "x"}
PNG = "iVBORw0KGgo="
URL = "data:image/png;base64," + PNG

CHAT_BODY = chat("", temperature=0.5, top_p=1, n=1, max_tokens=100, stop=["x"], user="u", seed=1,
                 stream_options={"include_usage": True}, response_format={"type": "text"},
                 tool_choice="auto", parallel_tool_calls=True, metadata={"a": "b"}, store=False,
                 tools=[{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
                 messages=[
                     {"role": "system", "content": "be brief"},
                     {"role": "user", "content": [
                         {"type": "text", "text": "look"},
                         {"type": "image_url", "image_url": {"url": URL, "detail": "low"}}]},
                     {"role": "assistant", "content": None, "reasoning_content": "hm",
                      "tool_calls": [{"id": "call_1", "type": "function",
                                      "function": {"name": "f", "arguments": "{}"}}]},
                     {"role": "tool", "tool_call_id": "call_1", "content": "r"},
                     {"role": "user", "content": "and now"}])
RESPONSES_BODY = dict(
    response(""), instructions="be brief", max_output_tokens=100, store=False, metadata={"a": "b"},
    reasoning={"effort": "low", "summary": "auto"}, include=["reasoning.encrypted_content"],
    text={"format": {"type": "text"}}, tool_choice="auto", parallel_tool_calls=False,
    prompt_cache_key="k", tools=[{"type": "function", "name": "f", "parameters": SCHEMA},
                                 {"type": "custom", "name": "g"}],
    input=[
        {"type": "message", "role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "input_text", "text": "look"},
                                     {"type": "input_image", "image_url": URL, "detail": "low"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "s"}]},
        {"type": "message", "role": "assistant", "id": "msg_1",
         "content": [{"type": "output_text", "text": "t"}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c",
         "output": [{"type": "input_image", "image_url": URL}]},
        {"role": "user", "content": "and now"}])
MESSAGES_BODY = dict(
    message(""), system=[{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
    temperature=0.5, top_p=0.9, top_k=5, stop_sequences=["x"], metadata={"user_id": "u"},
    thinking={"type": "enabled", "budget_tokens": 2000}, output_config={"effort": "low"},
    max_tokens=4000, tool_choice={"type": "auto"},
    tools=[{"name": "f", "description": "d", "input_schema": SCHEMA,
            "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
    messages=[
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [
            {"type": "text", "text": "t"},
            {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"city": "Paris"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": [
                {"type": "text", "text": "r"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                             "data": PNG}}]},
            {"type": "text", "text": "and", "cache_control": {"type": "ephemeral"}}]},
        {"role": "system", "content": "between"},
        {"role": "user", "content": "now"}])
REALISTIC = {"/v1/chat/completions": CHAT_BODY, "/v1/responses": RESPONSES_BODY,
             "/v1/messages": MESSAGES_BODY}
COUNT_PATH, EMBED_PATH = "/v1/messages/count_tokens", "/v1/embeddings"
EMBED_BODY = {"model": "text-embedding-3-small", "input": ["a", "b"], "dimensions": 8,
              "encoding_format": "float", "user": "u"}
WRONG: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 10 ** 30, "", "x", "\x00", "a" * 5000, [], {}, [None],
    [[]], [{}], ["x"], {"a": []}, {"type": None}, {"type": []}, {"type": {}}, [{"type": 5}],
    [{"role": []}])


#: what the three say for one lone surrogate
STREAM_OF_A_SURROGATE = {
    "/v1/chat/completions": [
        b'data: {"choices":[{"index":0,"delta":{"content":"\\ud800"}}]}\n\n',
        b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n',
        b"data: [DONE]\n\n"],
    "/v1/responses": [
        b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta",'
        b'"output_index":0,"item_id":"a","delta":"\\ud800"}\n\n',
        b'event: response.completed\ndata: {"type":"response.completed","response":{"id":"a",'
        b'"status":"completed","output":[]}}\n\n'],
    "/v1/messages": [
        b'event: message_start\ndata: {"type":"message_start","message":{}}\n\n',
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":'
        b'{"type":"text_delta","text":"\\ud800"}}\n\n',
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n']}


def echo(path: str, text: str) -> bytes:
    """A whole answer that says `text`, which is JSON-escaped already."""
    said_by = {
        "/v1/chat/completions": '{"choices":[{"message":{"content":"%s"},"finish_reason":"stop"}]}',
        "/v1/responses": '{"id":"a","output":[{"type":"message","content":[{"text":"%s"}]}]}',
        "/v1/messages": '{"type":"message","content":[{"type":"text","text":"%s"}]}'}
    return (said_by[path] % text).encode()


def strings_in(answer: Any) -> str:
    """All strings inside a JSON value, joined."""
    inner = answer.values() if isinstance(answer, dict) else (
        answer if isinstance(answer, list) else ())
    return answer if isinstance(answer, str) else " ".join(strings_in(item) for item in inner)


def wrong_values(path: str) -> tuple[Any, ...]:
    """The fake itself cannot make vectors of that length."""
    return tuple(value for value in WRONG if path != EMBED_PATH or value != 10 ** 30)


class HostileCase(SharedCase):
    settings: dict[str, Any] = dict(head_timeout_s=0.2, body_stall_s=0.2, hiccup_pause_s=0.001)

    def setUp(self) -> None:
        self.log_start = len(self.proxy.logs)

    def tearDown(self) -> None:
        super().tearDown()
        self.assert_quiet_log()
        self.assertEqual(said(self.proxy.post("/v1/chat/completions", chat("alive"))),
                         "Echo: alive")

    def assert_quiet_log(self) -> None:
        """No traceback, no internal error since the test began."""
        for record in self.proxy.logs[self.log_start:]:
            self.assertIsNone(record.exc_info, record.getMessage())
            self.assertLess(record.levelno, logging.ERROR, record.getMessage())
            self.assertNotIn("error in the proxy itself", record.getMessage())

    def assert_clear(self, path: str, answer: Any, statuses: Any = range(400, 500)) -> None:
        """An error in the dialect with a reason; never 500."""
        self.assertIn(answer.status, statuses, answer.body[:300])
        value = answer.json
        self.assertTrue(value["error"]["message"])
        self.assertEqual("type" in value, path.startswith("/v1/messages"), value)
        self.assertNotIn(b"Traceback", answer.body)


class BodyTest(HostileCase):
    def test_what_is_no_json_object_is_400_and_the_connection_goes_on(self) -> None:
        bodies = (
            b"", b" ", b"{", b"}", b"nul", b"null", b"true", b"5", b'"text"', b"[]", b"[{}]",
            b"\x00", b"{}\x00", b"{} {}", b"{'a': 1}", b'{"a": 1,}', b'{"a" 1}', b'{"a":NaN}',
            b'{"a":-Infinity}', b'{"a":\x01}', b'{"a":"\x01"}', b'{"a":"\xff\xfe"}', b"\xff" * 9,
            b'{"a":"\\ud8"}', b'{"a":01}', b'{"a":1e}', b"[" * 100000, b'{"a":' * 100000,
            b'{"a":' + b"[" * 5000 + b"]" * 4999, b"<xml/>", b"a=b&c=d", b'{"a":"' + b"x" * 70000)
        for path in list(PATHS) + [COUNT_PATH, EMBED_PATH]:
            client = self.client()
            for body in bodies:
                with self.subTest(path=path, body=body[:30]):
                    self.assert_clear(path, client.ask(post(path, body)), (400,))
            self.assertEqual(client.ask(get("/health")).status, 200)

    def test_a_deeply_nested_request_is_400_or_served(self) -> None:
        for path, make in REQUESTS:
            for depth in (500, 5000, 100000):
                text = json.dumps(make("a"))[:-1]
                body = (text + ',"metadata":' + "[" * depth + "]" * depth + "}").encode()
                with self.subTest(path=path, depth=depth):
                    answer = self.client().ask(post(path, body))
                    if answer.status != 200:
                        self.assert_clear(path, answer)

    def test_a_request_without_its_needed_fields_is_400(self) -> None:
        for path in list(PATHS) + [COUNT_PATH, EMBED_PATH]:
            for body in ({}, {"model": "gpt-4.1"}, {"model": None}, {"model": ""}, {"model": 5},
                         {"model": ["gpt-4.1"]}, {"messages": []}, {"input": "a"}):
                with self.subTest(path=path, body=body):
                    self.assert_clear(path, self.proxy.post(path, body), (400,))

    def test_wrong_types_in_any_field_get_a_clear_answer(self) -> None:
        chance = random.Random(SEED)
        for path, body in list(REALISTIC.items()) + [(COUNT_PATH, MESSAGES_BODY),
                                                     (EMBED_PATH, EMBED_BODY)]:
            every = [(place, value) for place in places(body) for value in wrong_values(path)]
            client = self.client()
            for place, value in chance.sample(every, min(300 if SLOW else 25, len(every))):
                changed = with_value(body, place, value)
                if path in PATHS and chance.random() < 0.5:
                    changed["stream"] = True
                with self.subTest(path=path, place=place, value=repr(value)[:30]):
                    answer = client.ask(post(path, changed))
                    if answer.status != 200:
                        self.assert_clear(path, answer)
                    elif changed.get("stream") is True:
                        self.assertTrue(answer.body.strip())
                    else:
                        self.assertIsInstance(answer.json, dict)
                    self.assertNotEqual(answer.headers.get("connection"), "close")

    def test_wrong_types_in_the_first_level_get_a_clear_answer(self) -> None:
        chance = random.Random(SEED)
        for path, body in list(REALISTIC.items()) + [(EMBED_PATH, EMBED_BODY)]:
            client = self.client()
            for name in list(body) + ["extra"]:
                for value in chance.sample(wrong_values(path), 7 if SLOW else 2):
                    with self.subTest(path=path, name=name, value=repr(value)[:30]):
                        answer = client.ask(post(path, dict(body, **{name: value})))
                        if answer.status != 200:
                            self.assert_clear(path, answer)

    def test_a_stream_field_that_is_no_boolean_is_400(self) -> None:
        for path, make in REQUESTS:
            for value in (1, "true", "yes", [1], {"a": 1}):
                with self.subTest(path=path, value=value):
                    self.assert_clear(path, self.proxy.post(path, make("a", stream=value)), (400,))

    def test_lone_surrogates_and_nul_characters_are_harmless(self) -> None:
        for path, make in REQUESTS:
            for text in ("\\ud800", "\\udfff \\ud800", "\\u0000", "a\\u0000b", "\\uffff"):
                for name in ("text", "model"):
                    body = json.dumps(make("TEXT") if name == "text"
                                      else make("a", model="TEXT")).replace("TEXT", text)
                    with self.subTest(path=path, text=text, name=name):
                        if name == "text":        # the fake cannot say such a text by itself
                            self.fake.script(PATHS[path], Answer(body=echo(path, text)))
                        answer = self.client().ask(post(path, body.encode()))
                        if name == "model":
                            self.assert_clear(path, answer, (404,))
                            continue
                        self.assertEqual(answer.status, 200, answer.body)
                        self.assertIn(json.loads('"%s"' % text), strings_in(answer.json))
                        sent = re.sub("[\ud800-\udfff]", "\ufffd", json.loads('"%s"' % text))
                        self.assertIn(sent, strings_in(self.fake.last(PATHS[path]).json))

    def test_lone_surrogates_pass_through_a_stream(self) -> None:
        for path, frames in STREAM_OF_A_SURROGATE.items():
            self.fake.script(PATHS[path], Answer(chunks=frames))
            answer = self.proxy.stream(path, dict(REQUESTS)[path]("a"))
            self.assertIn(b"\\ud800", answer.body)
            self.assertNotIn(b"error", answer.body)

    def test_duplicate_keys_get_one_meaning(self) -> None:
        body = b'{"model":"nope","model":"gpt-4.1","messages":[{"role":"user","content":"a"}]}'
        answer = self.client().ask(post("/v1/chat/completions", body))
        self.assertIn(answer.status, (200, 400))
        if answer.status == 200:
            self.assertEqual(self.fake.last(CHAT).json["model"], "gpt-4.1")
        body = b'{"messages":5,"model":"gpt-4.1","messages":[{"role":"user","content":"a"}]}'
        self.assertIn(self.client().ask(post("/v1/chat/completions", body)).status, (200, 400))

    def test_huge_numbers_never_become_invalid_json_upstream(self) -> None:
        def refuse(name: str) -> Any:
            raise AssertionError("the upstream got %s" % name)

        for number in ("1e999", "-1e999", "1" + "0" * 400, "1" + "0" * 6000, "-0.0", "1e-999"):
            for path, make in REQUESTS:
                text = json.dumps(make("a", stream=True))[:-1] + ',"temperature":%s}' % number
                with self.subTest(path=path, number=number[:20]):
                    before = self.fake.count(PATHS[path])
                    answer = self.client().ask(post(path, text.encode()))
                    if answer.status != 200:
                        self.assert_clear(path, answer)
                    if self.fake.count(PATHS[path]) > before:
                        json.loads(self.fake.last(PATHS[path]).body, parse_constant=refuse)

    def test_odd_encodings_of_json_are_400_or_mean_the_same(self) -> None:
        for coding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-32-be", "latin-1"):
            body = json.dumps(chat("caf\u00e9"), ensure_ascii=False).encode(coding)
            with self.subTest(coding):
                answer = self.client().ask(post("/v1/chat/completions", body))
                if answer.status == 200:
                    self.assertEqual(said(answer), "Echo: caf\u00e9")
                else:
                    self.assert_clear("/v1/chat/completions", answer, (400,))

    def test_very_long_names_and_values_are_cut_in_errors(self) -> None:
        for path, make in REQUESTS:
            answer = self.proxy.post(path, make("a", model="m" * 100000))
            self.assert_clear(path, answer, (404,))
            self.assertLess(len(answer.body), 3000)

    def test_an_unknown_model_with_100_thousand_characters_is_answered_soon(self) -> None:
        began = time.process_time()
        self.proxy.post("/v1/chat/completions", chat("a", model="claude-" + "0-" * 50000))
        self.assertLess(time.process_time() - began, 2.0)


class HeadTest(HostileCase):
    def exchange(self, data: bytes) -> bytes:
        """Everything the server says until it closes; the client says no more after `data`."""
        return raw_exchange(self.proxy.port, data, shut=True)

    def assert_refused(self, raw: bytes, statuses: tuple[int, ...] = (400,)) -> None:
        """One answer, an error with a reason, and nothing behind it."""
        head, _, body = raw.partition(b"\r\n\r\n")
        self.assertTrue(head.startswith(b"HTTP/1.1 "), raw[:100])
        self.assertIn(int(head[9:12]), statuses, raw[:300])
        self.assertTrue(json.loads(body)["error"]["message"])

    def test_an_ambiguous_body_on_messages_is_refused_in_its_dialect(self) -> None:
        data = post("/v1/messages", message("a"), "Transfer-Encoding: chunked")
        raw = self.exchange(data)
        self.assert_refused(raw)
        self.assertEqual(json.loads(raw.partition(b"\r\n\r\n")[2]).get("type"), "error")

    def test_random_bytes_get_an_answer_or_a_closed_connection(self) -> None:
        chance = random.Random(SEED)
        alphabet = b"\r\n\r\n \t:/GETPOSThttp1.0\x00\xff{}[]\",abc"
        for number in range(150):
            size = chance.randrange(1, 300)
            data = bytes(chance.choice(alphabet) if number % 2 else chance.randrange(256)
                         for _ in range(size))
            with self.subTest(data=data):
                raw = self.exchange(data)
                if raw:
                    self.assert_refused(raw[:raw.find(b"}}") + 2] if b"}}" in raw else raw,
                                        (400, 404, 405, 408, 431, 505))

    def test_a_valid_request_with_random_bytes_changed_is_answered(self) -> None:
        chance = random.Random(SEED)
        whole = post("/v1/messages", message("hello"), "anthropic-version: 2023-06-01")
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(chance.randrange(1, 4)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            with self.subTest(data=bytes(data)):
                raw = self.exchange(bytes(data))
                if raw:
                    self.assertRegex(raw, rb"\AHTTP/1\.1 [2345]\d\d ")
                    self.assertNotIn(b" 500 ", raw[:20])

    def test_unknown_methods_are_405_or_404(self) -> None:
        for method in ("BREW", "TRACE", "CONNECT", "PATCH", "get", "M-SEARCH", "X" * 1000):
            for path in ("/health", "/v1/messages", "/nowhere"):
                with self.subTest(method=method[:20], path=path):
                    answer = self.client().ask(get(path, method=method))
                    self.assertIn(answer.status, (404, 405))
                    self.assertTrue(answer.json["error"]["message"])
                    self.assertLess(len(answer.body), 1000)

    def test_odd_paths_are_answered(self) -> None:
        for path in ("/%00", "/..%2f..%2fetc/passwd", "/../../etc/passwd", "/v1/models/%ff%fe",
                     "/v1/models/%", "/v1/models/..", "/v1/models/%0d%0aSet-Cookie:a", "/?%", "/#",
                     "/v1/models/" + "a/" * 3000, "/v1" * 3000, "/" * 10000, "/v1/models/%F0%9F"):
            with self.subTest(path[:40]):
                answer = self.client().ask(get(path))
                self.assertIn(answer.status, (200, 400, 404, 414))
                self.assertNotIn("set-cookie", answer.headers)
                self.assertLess(len(answer.body), 40000)

    def test_header_values_cannot_be_injected_into_an_answer(self) -> None:
        for value in ("https://a\x0b", "a\tb", "\xff\xfe", "a" * 60000):
            data = get("/health").replace(b"\r\n\r\n", b"\r\nOrigin: %s\r\n\r\n"
                                          % value.encode("latin-1"))
            raw = self.exchange(data)
            self.assertIn(raw[9:12], (b"400", b"403"))


class ConnectionTest(HostileCase):
    def test_a_half_closed_client_still_reads_the_answer_to_a_local_route(self) -> None:
        raw = raw_exchange(self.proxy.port, get("/health", "Connection: close"), shut=True)
        self.assertTrue(raw.startswith(b"HTTP/1.1 200 "), raw[:80])
        raw = raw_exchange(self.proxy.port, post("/v1/messages", b"{}"), shut=True)
        self.assertTrue(raw.startswith(b"HTTP/1.1 400 "), raw[:80])

    def test_a_half_closed_client_gets_its_answer_or_the_end(self) -> None:
        for path, make in REQUESTS:
            for stream in (False, True):
                raw = raw_exchange(self.proxy.port, post(path, make("a", stream=stream)), shut=True)
                self.assertIn(raw[:13], (b"", b"HTTP/1.1 200 "))

    def test_requests_cut_anywhere_are_harmless(self) -> None:
        whole = post("/v1/messages", message("hello"))
        body_at = whole.index(b"\r\n\r\n") + 4
        for end in list(range(0, body_at, 9)) + [body_at, body_at + 1, len(whole) - 1]:
            raw = raw_exchange(self.proxy.port, whole[:end], shut=True)
            self.assertIn(raw[9:12], (b"", b"400", b"408"), (end, raw[:80]))

    def test_chunked_requests_cut_anywhere_are_harmless(self) -> None:
        whole = chunked_post("/v1/messages", [json.dumps(message("hello")).encode(), b" "])
        body_at = whole.index(b"\r\n\r\n") + 4
        for end in list(range(body_at, len(whole), 7)) + [len(whole) - 1]:
            raw = raw_exchange(self.proxy.port, whole[:end], shut=True)
            self.assertIn(raw[9:12], (b"", b"400", b"408"), (end, raw[:80]))

    def test_a_client_that_vanishes_at_any_time_is_harmless(self) -> None:
        for path, make in REQUESTS:
            whole = post(path, make("@@events=50@@", stream=True))
            for end in (0, 10, len(whole) - 5, len(whole)):
                with RawClient(self.proxy.port) as client:
                    client.send(whole[:end])
                    client.sock.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER,
                        struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0))

    def test_a_slow_head_is_408_however_it_drips(self) -> None:
        with RawClient(self.proxy.port) as client:
            stop = threading.Event()

            def drip() -> None:
                with contextlib.suppress(OSError):
                    client.send(b"GET /health HTTP/1.1\r\n")
                    while not stop.wait(0.02):
                        client.send(b"X")

            thread = threading.Thread(target=drip)
            thread.start()
            try:
                self.assert_clear("/health", client.answer(), (408,))
            finally:
                stop.set()
                thread.join(5)

    def test_silent_connections_do_not_keep_others_out(self) -> None:
        need_files(600)
        silent = [self.client() for _ in range(150)]
        for client in silent[::2]:
            client.send(b"POST /v1/messages HTTP/1.1\r\n")
        for path, make in REQUESTS:
            self.assertEqual(self.proxy.post(path, make("a")).status, 200)

    def test_slow_bodies_do_not_keep_others_out(self) -> None:
        slow = [self.client() for _ in range(60)]
        for client in slow:
            client.send(post("/v1/messages", b"{" + b" " * 100)[:-50])
        for path, make in REQUESTS:
            self.assertEqual(self.proxy.post(path, make("a")).status, 200)
        for client in slow:
            self.assert_clear("/v1/messages", client.answer(), (408,))

    def test_a_client_that_reads_nothing_does_not_keep_others_out(self) -> None:
        lazy = self.client()
        lazy.send(post("/v1/chat/completions", chat("@@events=20000 size=1000@@", stream=True)))
        self.assertTrue(self.fake.wait_for(lambda: self.fake.open_streams >= 1))
        for path, make in REQUESTS:
            reply = self.proxy.stream(path, make("@@events=20@@"))
            self.assertEqual(reply.status, 200)
        lazy.__exit__()
        self.assertTrue(self.fake.wait_for(lambda: self.fake.open_streams == 0, 5))

    def test_a_flood_behind_a_running_request_is_bounded(self) -> None:
        self.fake.script(CHAT, Answer(status=0, hold=True))
        client = self.client()
        client.send(post("/v1/chat/completions", chat("slow")))
        self.assertTrue(self.fake.wait_for(lambda: self.fake.holding == 1))
        client.sock.settimeout(0.2)
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 100_000_000:
                sent += client.sock.send(b"x" * 1_000_000)
        release(self.fake)
        self.assertLess(sent, 50_000_000)
        client.sock.settimeout(5)
        self.assertEqual(said(client.answer()), "Echo: slow")


class UpstreamTest(HostileCase):
    """The upstream may be hostile or broken, too."""

    def test_odd_whole_answers_are_502_or_mended(self) -> None:
        bodies: tuple[Any, ...] = (
            {}, {"choices": None}, {"choices": [None]}, {"choices": [{"message": None}]},
            {"choices": [{"message": {"content": 5, "tool_calls": [None, {}, 5]}}]},
            {"choices": [{"message": {"tool_calls": "x"}, "index": "a"}]}, {"output": [None, 5]},
            {"output": {"a": 1}, "usage": []}, {"usage": {"prompt_tokens": "x"}},
            {"usage": {"input_tokens": None, "input_tokens_details": 5, "output_tokens": []}},
            {"content": None, "usage": 5}, {"id": 5, "model": {}},
            {"id": [], "output": [{"id": 5}]},
            {"choices": [{"finish_reason": []}, {"finish_reason": {}}]}, [], "text", None)
        for path, make in REQUESTS:
            for body in bodies:
                with self.subTest(path=path, body=body):
                    self.fake.script(PATHS[path], Answer(body=json.dumps(body),
                                                         headers={"content-type": "text/json"}))
                    answer = self.proxy.post(path, make("a"))
                    if answer.status != 200:
                        self.assert_clear(path, answer, (502,))

    def test_odd_streams_end_with_an_error_or_properly(self) -> None:
        events: tuple[bytes, ...] = (
            b"data: nope\n\n", b"data: 5\n\n", b"data: []\n\n", b"data: {}\n\n", b"\x00\xff\n\n",
            b"data: {\"choices\":[{\"delta\":{\"tool_calls\":[{\"index\":\"a\"}]}}]}\n\n",
            b"data: {\"choices\":[{\"delta\":{\"content\":5}},"
            b"{\"delta\":{\"content\":\"a\"}}]}\n\n",
            b"data: {\"choices\":[{\"delta\":[]}],\"usage\":{\"prompt_tokens\":[]}}\n\n",
            b"data: {\"choices\":[{\"finish_reason\":[1]}]}\n\n",
            b"event: \xff\ndata: {\"type\":5}\n\n", b"event: a\n\n", b": c\n\n", b"data\n\n",
            b"data: {\"type\":\"response.output_item.added\",\"item\":{\"id\":5}}\n\n",
            b"data: {\"type\":\"response.output_text.delta\",\"item_id\":{}}\n\n",
            b"data: {\"type\":\"response.completed\",\"response\":{\"output\":[5],"
            b"\"usage\":{\"input_tokens\":{}}}}\n\n",
            b"data: {\"type\":\"response.created\",\"response\":[]}\n\n",
            b"data: {\"type\":\"x.delta\",\"output_index\":\"a\",\"sequence_number\":\"b\"}\n\n",
            b"event: message_start\ndata: {\"type\":\"message_start\",\"message\":5}\n\n",
            b"event: message_delta\ndata: {\"type\":\"message_delta\",\"usage\":\"x\"}\n\n",
            b"event: error\ndata: {\"type\":\"error\",\"error\":5}\n\n",
            b"data: {\"error\":5}\n\n", b"data: {\"error\":{\"message\":{\"a\":1},\"code\":5}}\n\n",
            b"data: {\"a\":\"\\ud800\"}\n\n", b"data: " + b"[" * 5000 + b"\n\n")
        chance = random.Random(SEED)
        for path, make in REQUESTS:
            for number in range(60 if SLOW else len(events) + 10):
                chunks = [chance.choice(events) for _ in range(chance.randrange(1, 6))]
                if number < len(events):
                    chunks = [events[number]]
                with self.subTest(path=path, chunks=chunks):
                    self.fake.script(PATHS[path], Answer(chunks=chunks))
                    answer = self.proxy.stream(path, make("a"))
                    self.assertEqual(answer.status, 200)
                    self.assertTrue(answer.body.strip(), chunks)
                    self.assertNotIn(b"an error in the proxy itself", answer.body)

    def test_odd_error_bodies_become_clear_errors(self) -> None:
        for body in (b"", b"\xff\xfe", b"{", b'{"error":5}', b'{"error":null}', b'{"error":[]}',
                     b'{"error":{"message":null,"code":[]}}', b'{"message":{"a":1}}', b"[]",
                     b'{"error":{"message":5,"param":{}}}', b"{" * 100000, b"<html>", b"x" * 100000,
                     b'{"error_details":5}', b'{"error":{"message":"\\ud800"}}'):
            for path, make in REQUESTS:
                with self.subTest(path=path, body=body[:40]):
                    self.fake.script(PATHS[path], Answer(status=400, body=body))
                    answer = self.proxy.post(path, make("a"))
                    self.assert_clear(path, answer, (400,))
                    self.assertLess(len(answer.body), 20000)

    def test_odd_embeddings_are_502(self) -> None:
        for item in ({"embedding": ["x"]}, {"embedding": [None]}, {"embedding": "AAAA"}, {}, 5,
                     {"embedding": [1e300]}):
            with self.subTest(item=item):
                self.fake.script(EMBEDDINGS, Answer(body={"data": [item]}))
                answer = self.proxy.post("/v1/embeddings", {
                    "model": "text-embedding-3-small", "input": "a", "encoding_format": "base64"})
                self.assert_clear("/v1/embeddings", answer, (502,))

    def test_embeddings_that_are_no_json_or_no_numbers_are_502(self) -> None:
        for body in ("[" * 100000, "{", '{"data":[{"embedding":[NaN]}]}',
                     '{"data":[{"embedding":[1e999]}]}', '{"data":[{"embedding":[true]}]}'):
            for packing in ("float", "base64"):
                with self.subTest(body=body[:40], packing=packing):
                    self.fake.script(EMBEDDINGS, Answer(body=body))
                    answer = self.proxy.post("/v1/embeddings", {
                        "model": "text-embedding-3-small", "input": "a",
                        "encoding_format": packing})
                    self.assert_clear("/v1/embeddings", answer, (502,))

    def test_an_answer_with_a_huge_head_is_502(self) -> None:
        self.fake.script(CHAT, Answer(headers={"x-long": "x" * 200000}, body={}))
        answer = self.proxy.post("/v1/chat/completions", chat("a"))
        self.assert_clear("/v1/chat/completions", answer, (502,))


class SecretTest(HostileCase):
    KEYS = ("sk-client-secret-1", "ghu_clientsecret22", "cookie-secret-3", "query-secret-4")

    def texts(self) -> str:
        """All that was logged, with arguments and tracebacks."""
        formatter = logging.Formatter()
        return "\n".join(formatter.format(record) + repr(record.args)
                         for record in self.proxy.logs)

    def test_a_token_echoed_in_a_stream_error_is_not_logged(self) -> None:
        self.proxy.get("/v1/models")
        token = next(iter(self.fake.tokens))
        error = {"message": "bad Bearer " + token, "code": "x"}
        for path, event in ((CHAT, {"error": error}), (RESPONSES, dict(error, type="error")),
                            (MESSAGES, {"type": "error", "error": error})):
            self.fake.script(path, Answer(chunks=[b"data: %s\n\n" % json.dumps(event).encode()]))
            route = next(name for name, upstream in PATHS.items() if upstream == path)
            self.proxy.stream(route, dict(REQUESTS)[route]("a"))
        self.assertNotIn(token, self.texts())

    def test_a_token_pasted_into_the_path_or_the_model_is_not_logged(self) -> None:
        self.proxy.get("/v1/models/ghu_pastedsecret")
        self.proxy.get("/ghu_pastedsecret")
        for path, make in REQUESTS:
            self.proxy.post(path, make("a", model="ghu_pastedsecret"))
        self.assertEqual(self.proxy.get("/health").status, 200)
        self.assertNotIn("ghu_pastedsecret", self.texts())

    def test_prompts_and_answers_are_not_logged(self) -> None:
        for path, make in REQUESTS:
            for more in ("", " @@events=3 cut=1@@"):
                self.proxy.stream(path, make("my private words" + more))
        self.assertNotIn("private words", self.texts())


if __name__ == "__main__":
    unittest.main()
