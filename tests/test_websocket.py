"""Responses over WebSocket: sections 6, 18 and 20.  The framing has laws, the server real sockets
with a client of the tests' own (socket_client.py)."""
from __future__ import annotations

import json
import random
import os
import socket
import ssl
import struct
import threading
import time
import unittest
from typing import Any

from support import (HERE, KEY, Proxy, bearer, chat, cp, cuts, message, release, response, said,
                     stand_still, wait_until)
from fake_upstream import RESPONSES, Answer, FakeUpstream
from cases import SharedCase, numbered, stream_text
from socket_client import (BINARY, CLOSE, CONTINUED, PING, PONG, TEXT, Closed, Socket, frame,
                           frames_in, handshake)
from socket_client import KEY as NONCE

CODEX, CLAUDE, GPT = "gpt-5.3-codex", "claude-sonnet-4.6", "gpt-4.1"
PATH = "/v1/responses"
CERTIFICATE = os.path.join(HERE, "localhost.pem")
Message = cp.SocketMessage


def decoded(pieces: list[bytes]) -> list[Any]:
    """The messages of a client's frames, cut in these pieces."""
    decoder = cp.SocketDecoder()
    return [found for piece in pieces for found in decoder.feed(piece)]


def fault(data: bytes) -> int:
    """The close code that these bytes of a client deserve, whatever the cut; 0 for none."""
    codes = set()
    for pieces in ([data], [data[at:at + 1] for at in range(len(data))]):
        try:
            decoded(pieces)
            codes.add(0)
        except cp.BadFrame as error:
            codes.add(error.close_code)
    (code,) = codes
    return code


class Framing(unittest.TestCase):
    """Bytes in, messages out: no socket."""

    def test_what_a_client_writes_is_read_whatever_the_cut(self) -> None:
        chance = random.Random(1)
        for size in (0, 1, 2, 3, 4, 125, 126, 127, 65535, 65536, 70001):
            text = bytes(chance.choice(b"abc {}") for _ in range(size))
            data = frame(TEXT, text) + frame(PING, b"now") + frame(TEXT, b"{}")
            wanted = [Message(TEXT, text), Message(PING, b"now"), Message(TEXT, b"{}")]
            for pieces in cuts(data, 4) if size < 200 else [[data], [data[:7], data[7:9], data[9:]],
                                                            [data[:60000], data[60000:]]]:
                self.assertEqual(decoded(pieces), wanted, (size, len(pieces)))

    def test_fragments_are_joined_and_control_frames_come_between_them(self) -> None:
        text = "gr\u00fc\u00df \U0001f600 ".encode() * 9
        parts = [text[:5], b"", text[5:6], text[6:40], text[40:], b""]
        data = frame(TEXT, parts[0], last=False)
        for part in parts[1:-1]:
            data += frame(CONTINUED, part, last=False) + frame(PING, part[:9])
        data += frame(CONTINUED, parts[-1])
        for pieces in cuts(data):
            found = decoded(pieces)
            self.assertEqual([one.data for one in found if one.kind == PING],
                             [part[:9] for part in parts[1:-1]])
            self.assertEqual([one for one in found if one.kind == TEXT], [Message(TEXT, text)])

    def test_the_mask_is_undone_for_every_key_and_length(self) -> None:
        chance = random.Random(2)
        for size in (*range(0, 20), 1000, 4097):
            plain, key = bytes(chance.randrange(256) for _ in range(size)), b"\x00\xff\x80\x01"
            masked = bytes(byte ^ key[at % 4] for at, byte in enumerate(plain))
            self.assertEqual(cp.unmask(masked, key), plain)

    def test_what_the_server_writes_a_strict_client_reads(self) -> None:
        for size in (0, 1, 125, 126, 127, 4095, 4096, 65535, 65536, 70000):
            text = b"a" * size
            self.assertEqual(list(frames_in(cp.socket_frame(TEXT, text))), [(TEXT, text)])

    def test_each_event_becomes_one_text_frame(self) -> None:
        events = [{"type": "a", "text": "x" * size, "more": more}
                  for size in (0, 3, 90, 4000, 5000, 70000) for more in ("", "\u00fc\U0001f600")]
        plain = b"".join(cp.Frame(event["type"], cp.dumps(event)).encode() for event in events)
        odd = b": keepalive\n\n" + plain + b"data:{}\n\n" + b"event: x\n\n: end\n\n"
        for block, wanted in ((plain, events), (odd, [*events, {}]), (b"", []), (b": a\n\n", [])):
            found = list(frames_in(cp.text_frames(block)))
            self.assertEqual([json.loads(text) for _, text in found], wanted)
            self.assertEqual({kind for kind, _ in found} - {TEXT}, set())

    def test_an_event_that_is_no_utf8_becomes_a_text_that_is(self) -> None:
        (found,) = frames_in(cp.text_frames(b'event: a\ndata: {"a":"\xff"}\n\n'))
        self.assertEqual(found[1].decode(), '{"a":"\ufffd"}')

    def test_what_breaks_the_protocol_has_a_code(self) -> None:
        rows = (
            (1002, "unmasked", frame(TEXT, b"{}", masked=False)),
            (1002, "unmasked and empty", frame(TEXT, masked=False)),
            *((1002, "reserved bit %d" % bit, frame(TEXT, b"{}", reserved=bit))
              for bit in (1, 2, 4, 7)),
            *((1002, "kind %d" % kind, frame(kind, b"{}")) for kind in (3, 4, 5, 6, 7, 11, 12, 15)),
            (1003, "binary", frame(BINARY, b"{}")),
            *((1002, "control frame in parts", frame(kind, b"\x03\xe8", last=False))
              for kind in (CLOSE, PING, PONG)),
            *((1002, "long control frame", frame(kind, b"\x03\xe8" + b"a" * 124))
              for kind in (CLOSE, PING, PONG)),
            (1002, "nothing continued", frame(CONTINUED, b"{}")),
            (1002, "a message in a message", frame(TEXT, b"{", last=False) + frame(TEXT, b"}")),
            (1002, "length in two bytes too many", b"\x81\xfe\x00\x05" + b"\0" * 9),
            (1002, "length in eight bytes too many",
             b"\x81\xff" + struct.pack(">Q", 65535) + b"\0" * 9),
            (1009, "a size beyond all", b"\x81\xff" + b"\xff" * 8 + b"\0" * 4),
            (1009, "33 MB", b"\x81\xff" + struct.pack(">Q", (32 << 20) + 1) + b"\0" * 4),
            (1007, "no UTF-8", frame(TEXT, b'{"a":"\xff"}')),
            (1007, "half a letter", frame(TEXT, b'{"a":"\xe2\x82')),
            (1007, "half of a surrogate pair", frame(TEXT, b"\xed\xa0\x80")),
            (1007, "no UTF-8 in a part", frame(TEXT, b"\xff", last=False)),
        )
        for code, name, data in rows:
            with self.subTest(name):
                self.assertEqual(fault(data), code)

    def test_fragments_larger_than_a_message_may_be_are_refused_at_their_head(self) -> None:
        decoder = cp.SocketDecoder()
        part = bytes(1 << 20)
        decoder.feed(b"\x01\xff" + struct.pack(">Q", len(part)) + bytes(4) + part)
        for _ in range(31):
            decoder.feed(b"\x00\xff" + struct.pack(">Q", len(part)) + bytes(4) + part)
        self.assertEqual(decoder.size_bytes, 32 << 20)
        with self.assertRaises(cp.BadFrame) as caught:
            decoder.feed(b"\x00\x81" + bytes(4))
        self.assertEqual(caught.exception.close_code, 1009)

    def test_endless_empty_fragments_are_refused(self) -> None:
        decoder = cp.SocketDecoder()
        decoder.feed(frame(TEXT, b"", last=False))
        with self.assertRaises(cp.BadFrame) as caught:
            for _ in range(cp.MAX_FRAGMENTS):
                decoder.feed(b"\x00\x80" + bytes(4))
        self.assertEqual(caught.exception.close_code, 1008)

    def test_codes_of_a_close_frame(self) -> None:
        for code in (1000, 1001, 1002, 1003, 1007, 1011, 1014, 3000, 4999):
            self.assertEqual(cp.close_code_of(struct.pack(">H", code) + "gr\u00fc\u00df".encode()),
                             code)
        self.assertEqual(cp.close_code_of(b""), 1000)
        for wrong in (b"\x03", b"\x00\x00", struct.pack(">H", 999), struct.pack(">H", 1005),
                      struct.pack(">H", 1006), struct.pack(">H", 1015), struct.pack(">H", 2999),
                      struct.pack(">H", 5000), b"\x03\xe8\xff"):
            with self.subTest(wrong), self.assertRaises(cp.BadFrame):
                cp.close_code_of(wrong)

    def test_the_sample_of_the_standard(self) -> None:
        raw = handshake(key="dGhlIHNhbXBsZSBub25jZQ==").partition(b"\r\n\r\n")[0]
        head, _ = cp.parse_request_head(raw)
        self.assertEqual(cp.accept_key(head), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
        self.assertEqual(fault(bytes.fromhex("818537fa213d7f9f4d5158")), 0)
        self.assertEqual(decoded([bytes.fromhex("818537fa213d7f9f4d5158")]),
                         [Message(TEXT, b"Hello")])


class SocketCase(SharedCase):
    """Clients on a proxy that all tests of a class share."""

    def open(self, *fields: str, proxy: Proxy | None = None, **more: Any) -> Socket:
        opened: Socket = self.enter(Socket((proxy or self.proxy).port, *fields, **more))
        return opened

    def ready(self, *fields: str, **more: Any) -> Socket:
        opened = self.open(*fields, **more)
        self.assertEqual(opened.status, 101)
        return opened

    def assert_error(self, event: Any, status: int, code: str | None = None) -> None:
        """An error in the form that Codex and OpenAI's SDKs both read."""
        self.assertEqual((event["type"], event["status"], event["status_code"]),
                         ("error", status, status), event)
        self.assertTrue(event["message"])
        self.assertEqual(event["error"]["message"], event["message"])
        self.assertEqual(event["error"]["code"], event["code"])
        self.assertIsInstance(event["sequence_number"], int)
        if code:
            self.assertEqual(event["code"], code)


class Handshake(SocketCase):
    """The door is that of all other requests."""

    settings = dict(api_key=(KEY,), cors_origin=("https://ok.example",))
    AUTH = "Authorization: Bearer " + KEY

    def test_every_spelling_of_the_path_opens(self) -> None:
        for path in ("/v1/responses", "/responses", "/v1/v1/responses/", "//responses?a=b",
                     "/openai/v1/responses"):
            with self.subTest(path):
                self.assertEqual(self.open(self.AUTH, path=path).status, 101)

    def test_no_extension_and_no_protocol_is_accepted(self) -> None:
        opened = self.ready(self.AUTH, "Sec-WebSocket-Extensions: permessage-deflate",
                            "Sec-WebSocket-Protocol: realtime")
        self.assertEqual(opened.headers["upgrade"], "websocket")
        self.assertEqual(opened.headers["connection"], "Upgrade")
        self.assertNotIn("sec-websocket-extensions", opened.headers)
        self.assertNotIn("sec-websocket-protocol", opened.headers)
        self.assertNotIn("content-length", opened.headers)
        self.assertTrue(opened.headers["x-request-id"])

    def test_who_has_no_key_or_comes_from_a_page_gets_no_101(self) -> None:
        for status, fields in ((401, ()), (401, ("Authorization: Bearer wrong",)),
                               (401, ("Sec-WebSocket-Protocol: openai-insecure-api-key." + KEY,)),
                               (403, (self.AUTH, "Origin: https://evil.example")),
                               (403, (self.AUTH, "Origin: null")),
                               (403, (self.AUTH, "Sec-Fetch-Site: cross-site"))):
            with self.subTest(fields):
                self.assertEqual(self.open(*fields).status, status)
        self.assertEqual(self.open(self.AUTH, "Origin: https://ok.example").status, 101)
        for host in ("evil.example", "127.0.0.1.evil.example"):
            client = self.client()
            client.send(handshake(PATH, self.AUTH, host=host))
            self.assertEqual(client.answer().status, 403)

    def test_a_wrong_handshake_is_told(self) -> None:
        good = handshake(PATH, self.AUTH)
        line = b"Sec-WebSocket-Key: " + NONCE.encode()
        for status, raw in (
                (426, good.replace(b"Version: 13", b"Version: 8")),
                (426, handshake(PATH, self.AUTH, version="")),
                (400, good.replace(line, b"Sec-WebSocket-Key: YWJj")),
                (400, good.replace(line, line + b"=")),
                (400, good.replace(line, line + b"\r\n" + line)),
                (400, handshake(PATH, self.AUTH, key="")),
                (400, good.replace(b"keep-alive, Upgrade", b"keep-alive")),
                (400, good.replace(b"HTTP/1.1", b"HTTP/1.0")),
                (405, good.replace(b"websocket", b"h2c")),
                (405, good.replace(b"GET", b"POST", 1).replace(b"POST /", b"PUT /")),
                (404, good.replace(b"/v1/responses", b"/v1/nowhere"))):
            with self.subTest(status=status, raw=raw[:300]):
                client = self.client()
                client.send(raw)
                answer = client.answer()
                self.assertEqual(answer.status, status)
                self.assertTrue(answer.json["error"]["message"])
                if status == 426:
                    self.assertEqual(answer.headers["sec-websocket-version"], "13")

    def test_a_key_that_is_taken_back_ends_what_a_socket_may_ask(self) -> None:
        self.proxy.app.accounts.keys.add("made-up-key-1")
        opened = self.ready("Authorization: Bearer made-up-key-1")
        self.assertEqual(opened.turn(response("hi"))[-1]["type"], "response.completed")
        key_id = next(key["key_id"] for key in self.proxy.get(
            "/auth/tokens", **bearer(KEY)).json["data"] if key["created"])
        reply = self.proxy.request("DELETE", "/auth/tokens/" + key_id, None, bearer(KEY))
        self.assertEqual(reply.status, 200, reply)
        self.assert_error(opened.turn(response("hi"))[-1], 401)

    def test_over_tls(self) -> None:
        context = ssl.create_default_context(cafile=CERTIFICATE)
        with Proxy(self.fake, tls_cert=CERTIFICATE) as proxy:
            opened = self.enter(Socket(proxy.port, wrap=lambda sock: context.wrap_socket(
                sock, server_hostname="localhost")))
            self.assertEqual(opened.status, 101)
            for text in ("hi", "@@events=300 size=2000@@"):
                self.assertEqual(opened.turn(response(text))[-1]["type"], "response.completed")
            opened.send(frame(CLOSE))
            self.assertEqual(opened.wait_closed().code, 1000)


class Turns(SocketCase):
    """What is asked and answered."""

    def text(self, events: list[Any]) -> str:
        return stream_text(PATH, events)

    def test_a_turn_to_each_kind_of_model(self) -> None:
        opened = self.ready()
        for model in (CODEX, CLAUDE, GPT, "gpt-5-mini"):
            with self.subTest(model):
                events = opened.turn(response("marmalade", model))
                self.assertEqual([event["type"] for event in events[:2]],
                                 ["response.created", "response.in_progress"])
                self.assertEqual(self.text(events), "Echo: marmalade")
                self.assertEqual(events[-1]["type"], "response.completed")
                self.assertEqual(events[-1]["response"]["model"], model)
                self.assertEqual([event["sequence_number"] for event in events],
                                 list(range(len(events))))
                over_http = self.proxy.stream(PATH, response("marmalade", model)).events
                self.assertEqual([event["type"] for event in events],
                                 [event["type"] for event in over_http])

    def test_what_goes_up_is_an_ordinary_request(self) -> None:
        opened = self.ready("X-Initiator: user", "OpenAI-Beta: responses_websockets=2026-02-06",
                            "session_id: 1234", "Cookie: a=b")
        opened.turn(response("hi"), stream=False, background=True, initiator="agent",
                    stream_id="one", store=True)
        sent = self.fake.last(RESPONSES)
        self.assertEqual(sent.json["stream"], True)
        self.assertEqual({"type", "background", "initiator", "stream_id", "generate"}
                         & set(sent.json), set())
        self.assertEqual(sent.headers["x-initiator"], "agent")
        opened.turn({"model": CODEX, "input": [
            {"role": "user", "content": "hi"},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "1"}]})
        self.assertEqual(self.fake.last(RESPONSES).headers["x-initiator"], "agent",
                         "the handshake's word counts for no request")

    def test_every_event_names_the_lane_of_its_request(self) -> None:
        opened = self.ready()
        for model in (CODEX, CLAUDE):
            plain = opened.turn(response("@@events=40@@", model))
            lane = opened.turn(response("@@events=40@@", model), stream_id="one \u00fc")
            self.assertEqual({event.pop("stream_id") for event in lane}, {"one \u00fc"})
            self.assertEqual([event["type"] for event in lane], [event["type"] for event in plain])
            self.assertEqual(self.text(lane), self.text(plain))
        (event,) = opened.turn(response("hi", "no-such-model"), stream_id="two")
        self.assertEqual((event["type"], event["stream_id"]), ("error", "two"))
        for odd in (7, [], "x" * 65):
            self.assert_error(opened.turn(response("hi"), stream_id=odd)[-1], 400)
        self.assertNotIn("stream_id", opened.turn(response("hi"))[0])

    def test_the_next_request_may_be_what_is_new(self) -> None:
        opened = self.ready()
        for model in (CODEX, CLAUDE):
            with self.subTest(model):
                first = opened.turn(response("one", model, store=False))[-1]["response"]
                second = opened.turn(response("two", model, store=False),
                                     previous_response_id=first["id"])[-1]["response"]
                third = opened.turn(response("three", model, store=False),
                                    previous_response_id=second["id"])
                self.assertEqual(self.text(third), "Echo: three")
                self.assertEqual(third[-1]["response"]["previous_response_id"], second["id"])
                body = self.fake.requests[-1].json
                self.assertNotIn("previous_response_id", body)
                told = json.dumps(body)
                places = [told.index(text) for text in ("one", "Echo: one", "two", "Echo: two",
                                                        '"three')]
                self.assertEqual(places, sorted(places))

    def test_a_warm_up_is_answered_here_and_the_next_request_goes_on_from_it(self) -> None:
        opened, sent = self.ready(), self.new_sent()
        tools = [{"type": "function", "name": "f", "parameters": {"type": "object",
                                                                  "properties": {}}}]
        events = opened.turn(response([{"role": "user", "content": "before"}], generate=False,
                                      instructions="Be kind.", tools=tools, store=False))
        self.assertEqual([event["type"] for event in events],
                         ["response.created", "response.completed"])
        answer = events[-1]["response"]
        self.assertEqual(events[0]["response"]["id"], answer["id"])
        self.assertEqual((answer["status"], answer["output"], answer["usage"]["total_tokens"]),
                         ("completed", [], 0))
        self.assertEqual([one for one in sent() if one.path == RESPONSES], [])
        events = opened.turn(response([{"role": "user", "content": "hi"}]),
                             previous_response_id=answer["id"])
        self.assertEqual(self.text(events), "Echo: hi")
        body = self.fake.last(RESPONSES).json
        self.assertEqual([item["content"] for item in body["input"]], ["before", "hi"])
        self.assertEqual(body["instructions"], "Be kind.")
        self.assertEqual([tool["name"] for tool in body["tools"]], ["f"])
        self.assertNotIn("generate", body)
        opened.turn(response("hi", instructions="Be brief."), previous_response_id=answer["id"])
        self.assertEqual(self.fake.last(RESPONSES).json["instructions"], "Be brief.")

    def test_ids_of_other_connections_are_unknown_here(self) -> None:
        first = self.ready().turn(response("one"))[-1]["response"]["id"]
        over_http = self.proxy.post(PATH, response("one")).json["id"]
        opened, sent = self.ready(), self.new_sent()
        for wrong in (first, over_http, "resp_unknown"):
            (event,) = opened.turn(response("two"), previous_response_id=wrong)
            self.assert_error(event, 400, "previous_response_not_found")
            self.assertEqual(event["param"], "previous_response_id")
        self.assertEqual(sent(), [])
        self.assertEqual(opened.turn(response("hi"))[-1]["type"], "response.completed")

    def test_a_failed_request_ends_what_it_went_on_from(self) -> None:
        opened = self.ready()
        first = opened.turn(response("one"))[-1]["response"]["id"]
        failed = opened.turn(response("@@events=3 cut=1@@"), previous_response_id=first)
        self.assertEqual(failed[-1]["type"], "response.failed")
        (event,) = opened.turn(response("two"), previous_response_id=first)
        self.assert_error(event, 400, "previous_response_not_found")

    def test_only_some_answers_are_kept(self) -> None:
        opened = self.ready()
        ids = [opened.turn(response("hi"))[-1]["response"]["id"]
               for _ in range(cp.SOCKET_KEPT + 1)]
        self.assert_error(opened.turn(response("two"), previous_response_id=ids[0])[-1], 400)
        self.assertEqual(opened.turn(response("two"), previous_response_id=ids[1])[-1]["type"],
                         "response.completed")

    def test_errors_are_frames_and_the_connection_stays(self) -> None:
        opened = self.ready()
        rows = ((404, "model_not_found", response("hi", "no-such-model")),
                (400, None, {"input": "hi"}), (400, None, response(7)),
                (400, "unsupported_websocket_event", {"type": "response.cancel"}),
                (400, "unsupported_websocket_event", {"type": None}),
                (400, None, response("hi", tools=7)))
        for status, code, body in rows:
            with self.subTest(body=body):
                opened.create(body)
                self.assert_error(opened.event(), status, code)
        for text in (b"", b"{", b"[]", b"null", b'"a"', b"{}", b"[" * 100_000):
            with self.subTest(text=text[:9]):
                opened.send(frame(TEXT, text))
                self.assert_error(opened.event(), 400)
        self.assertEqual(self.text(opened.turn(response("alive"))), "Echo: alive")

    def test_a_limit_is_a_frame_with_its_pause(self) -> None:
        opened = self.ready()
        self.fake.script(RESPONSES, *[Answer(status=429, headers={"Retry-After": "12"}, body={
            "error": {"message": "slow down", "code": "rate_limited"}})] * 3)
        (event,) = opened.turn(response("hi"))
        self.assert_error(event, 429)
        self.assertEqual(event["headers"]["retry-after"], "12")
        self.assertEqual(event["error"]["headers"], event["headers"])
        for account in self.proxy.app.accounts.all():
            account.limits.clear()
        with self.fake.changed:
            self.fake._scripts.pop(RESPONSES, None)
        self.assertEqual(self.text(opened.turn(response("alive"))), "Echo: alive")

    def test_a_cut_stream_never_ends_politely(self) -> None:
        opened = self.ready()
        for model in (CODEX, CLAUDE):
            for marker in ("cut=0", "cut=2", "cut=2 rst=1", "noend=1", "error=2", "error=2 fail=1"):
                with self.subTest(model=model, marker=marker):
                    events = opened.turn(response("@@events=4 %s@@" % marker, model))
                    self.assertIn(events[-1]["type"], ("response.failed", "error"))
        self.assertEqual(self.text(opened.turn(response("alive"))), "Echo: alive")

    def test_an_acknowledgement_is_no_request(self) -> None:
        opened = self.ready()
        opened.turn(response("hi"))
        opened.send(frame(TEXT, b'{"type":"response.processed","response_id":"resp_1"}'))
        self.assertEqual(self.text(opened.turn(response("alive"))), "Echo: alive")

    def test_a_whole_answer_becomes_events(self) -> None:
        answer = {"id": "resp_whole", "object": "response", "status": "completed", "model": CODEX,
                  "output": [{"type": "message", "id": "msg_1", "role": "assistant",
                              "status": "completed", "content": [
                                  {"type": "output_text", "text": "Whole", "annotations": []}]}],
                  "usage": {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}}
        opened = self.ready()
        self.fake.script(RESPONSES, Answer(status=200, body=answer))
        events = opened.turn(response("hi"))
        self.assertEqual([event["type"] for event in events],
                         ["response.created", "response.output_item.added",
                          "response.output_item.done", "response.completed"])
        self.assertEqual(events[-1]["response"]["output"][0]["content"][0]["text"], "Whole")

    def test_a_conversation_of_many_megabytes(self) -> None:
        opened, text = self.ready(), "0123456789" * 300_000
        raw = json.dumps(dict(response(text + " @@events=1@@"), type="response.create")).encode()
        mask = b"\x11\x22\x33\x44"
        masked = cp.unmask(raw, mask)            # the tests' own loop takes seconds for it
        half = len(raw) // 8 * 4
        opened.send(b"\x01\xff" + struct.pack(">Q", half) + mask + masked[:half] + frame(PING, b"?")
                    + b"\x80\xff" + struct.pack(">Q", len(raw) - half) + mask + masked[half:])
        self.assertEqual(self.text(opened.events()), numbered(1))
        self.assertEqual(opened.pongs, [b"?"])
        self.assertIn(text, self.fake.last(RESPONSES).json["input"])

    def test_each_request_has_a_row_and_a_line(self) -> None:
        asked = ("gpt-5-mini", "no-such-model-of-this-test")
        opened = self.ready()
        for model in asked:
            opened.turn(response("hi", model))
        handshake_id = opened.headers["x-request-id"][:8]

        def lines() -> list[str]:
            return [line for line in self.proxy.log_text().splitlines()
                    if line.startswith(handshake_id) or "model=" + asked[1] in line]

        wait_until(lambda: len(lines()) == 2)
        self.assertIn("status=101", lines()[0])
        self.assertRegex(lines()[1], r" WS +/responses .*status=404")
        rows = [row for row in self.proxy.get("/stats").json["recent"] if row["asked"] in asked]
        self.assertEqual([(row["asked"], row["dialect"], row["status"]) for row in rows[:2]],
                         [(asked[1], "responses", 404), (asked[0], "responses", 200)])
        self.assertTrue(rows[1]["output"])

    def test_the_list_of_models_does_not_name_it_where_nothing_is_served(self) -> None:
        entry = next(model for model in self.fake.models if model["id"] == CODEX)
        with FakeUpstream() as fake:
            fake.models = [dict(entry, supported_endpoints=["ws:/responses"])]
            with Proxy(fake) as proxy:
                (listed,) = proxy.get("/v1/models").json["data"]
        self.assertEqual(listed["supported_endpoints"], [])

    def test_the_list_of_models_names_it_where_it_is_served(self) -> None:
        listed = {model["id"]: model["supported_endpoints"]
                  for model in self.proxy.get("/v1/models").json["data"]}
        self.assertIn("ws:/responses", listed[CODEX])
        self.assertNotIn("ws:/responses", listed[GPT])
        opened = self.ready()
        for model, endpoints in listed.items():
            if "ws:/responses" in endpoints:
                with self.subTest(model):
                    self.assertEqual(opened.turn(response("hi", model))[-1]["type"],
                                     "response.completed")


class Life(SocketCase):
    """Who comes, waits and goes."""

    settings = dict(keepalive_s=0.1, body_stall_s=0.5)

    def test_a_ping_gets_its_pong_also_while_a_request_is_answered(self) -> None:
        opened = self.ready()
        opened.create(response("@@events=3 stall=1@@"))
        while opened.event()["type"] != "response.output_text.delta":
            pass
        opened.send(frame(PING, b"are you there"))
        wait_until(lambda: self.read_pong(opened) == b"are you there")
        release(self.fake)
        self.assertEqual(opened.events()[-1]["type"], "response.completed")

    @staticmethod
    def read_pong(opened: Socket) -> bytes:
        kind, payload = opened.read_frame()
        return payload if kind == PONG else b""

    def test_silence_is_filled_with_pings_also_between_requests(self) -> None:
        with Proxy(self.fake, keepalive_s=0.04) as proxy:
            opened = self.ready(proxy=proxy)
            for _ in range(2):
                self.assertEqual(opened.read_frame(), (PING, b""))
            opened.create(response("@@events=2 think_ms=150@@"))
            self.assertEqual(opened.events()[-1]["type"], "response.completed")
            self.assertGreater(opened.pings, 0)

    def test_requests_wait_for_each_other_in_their_order(self) -> None:
        opened = self.ready()
        opened.create(response("@@events=3 stall=1@@"))
        self.fake.wait_for(lambda: self.fake.holding == 1)
        for number in range(cp.SOCKET_QUEUE):
            opened.create(response("number %d" % number))
        opened.create(response("too many"))
        event = opened.event()
        while event["type"] != "error":
            event = opened.event()
        self.assert_error(event, 429, "too_many_requests")
        release(self.fake)
        self.assertEqual(opened.events()[-1]["type"], "response.completed")
        texts = [stream_text(PATH, opened.events()) for _ in range(cp.SOCKET_QUEUE)]
        self.assertEqual(texts, ["Echo: number %d" % n for n in range(cp.SOCKET_QUEUE)])

    def leaves(self, goodbye: Any, model: str = CODEX) -> None:
        """The client goes in the middle of an answer: its upstream ends at once."""
        self.assertTrue(self.fake.wait_for(lambda: self.fake.open_streams == 0))
        opened = self.ready()
        opened.create(response("@@events=500 delay_ms=20@@", model))
        while opened.event()["type"] != "response.output_text.delta":
            pass
        self.assertEqual(self.fake.open_streams, 1)
        goodbye(opened)
        self.assertTrue(self.fake.wait_for(lambda: self.fake.open_streams == 0))

    def test_a_client_that_leaves_ends_its_upstream_request(self) -> None:
        for model in (CODEX, CLAUDE):
            with self.subTest(model):
                self.leaves(lambda one: one.send(frame(CLOSE, b"\x03\xe8")), model)
                self.leaves(lambda one: one.sock.shutdown(socket.SHUT_RDWR), model)
                self.leaves(lambda one: one.sock.shutdown(socket.SHUT_WR), model)
        self.leaves(lambda one: one.send(frame(TEXT, b"{}", masked=False)))

    def test_a_client_that_leaves_before_the_answer(self) -> None:
        opened = self.ready()
        opened.create(response("hi @@think_ms=20000@@"))
        self.assertTrue(self.fake.wait_for(lambda: self.fake.open_streams == 1))
        opened.send(frame(CLOSE))
        self.assertEqual(opened.wait_closed().code, 1000)
        self.proxy.settle()
        self.assertIn("client_left", json.dumps(self.proxy.get("/stats").json["recent"][0]))
        wait_until(lambda: not self.proxy.server.running())

    def test_a_close_frame_is_echoed(self) -> None:
        for sent, code in ((b"", 1000), (b"\x03\xe9bye", 1001), (b"\x0f\xa0", 4000)):
            opened = self.ready()
            opened.send(frame(CLOSE, sent))
            self.assertEqual(opened.wait_closed().code, code)
            self.assertEqual(opened.reader.read(), b"")

    def test_nothing_behind_a_close_frame_is_read(self) -> None:
        opened, sent = self.ready(), self.new_sent()
        opened.send(frame(CLOSE) + frame(TEXT, json.dumps(dict(
            response("late"), type="response.create")).encode()))
        self.assertEqual(opened.wait_closed().code, 1000)
        self.assertEqual(sent(), [])

    def test_a_message_that_came_with_the_handshake_is_served(self) -> None:
        client = self.client()
        request = json.dumps(dict(response("early"), type="response.create")).encode()
        client.send(handshake() + frame(TEXT, request) + frame(CLOSE, b"\x03\xe8"))
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.reader.read(1)
        self.assertTrue(head.startswith(b"HTTP/1.1 101 "))
        self.assertEqual(list(frames_in(client.reader.read()))[-1], (CLOSE, b"\x03\xe8"))

    def test_a_slow_message_is_given_up(self) -> None:
        beginnings = frame(TEXT, b"{}" * 500)[:100], frame(TEXT, b"{", last=False), b"\x81"
        proxy = self.enter(Proxy(self.fake, keepalive_s=0.05, body_stall_s=0.2))
        waiting = [(data, self.ready(proxy=proxy)) for data in beginnings]
        for data, opened in waiting:
            opened.send(data)
        for data, opened in waiting:
            with self.subTest(data[:5]):
                frames = [opened.read_frame()]        # a pong would be taken for what is missing
                while frames[-1][0] == PING:
                    frames.append(opened.read_frame())
                self.assertEqual(frames[-1][1][:2], b"\x03\xf0")

    def test_pings_do_not_keep_a_slow_message_alive(self) -> None:
        opened = self.ready()
        opened.send(frame(TEXT, b"{", last=False))
        until = time.monotonic() + 20
        with self.assertRaises((Closed, OSError)) as caught:
            while time.monotonic() < until:
                opened.send(frame(PING, b"x") + frame(CONTINUED, b"", last=False))
                kind, payload = opened.read_frame()
                if kind == CLOSE:
                    raise Closed(int.from_bytes(payload[:2], "big"))
        self.assertEqual(getattr(caught.exception, "code", 1008), 1008)

    def test_a_slow_reader_stops_its_upstream(self) -> None:
        opened = self.ready()
        count, size = 300, 40_000               # nobody reads: the proxy must not hold 12 MB
        opened.create(response("@@events=%d size=%d@@" % (count, size)))
        self.fake.wait_for(lambda: self.fake.open_streams == 1)
        (client,) = [one for one in self.proxy.server.loop.clients if one.socket is not None]
        wait_until(lambda: client.out, "more has come than the client takes")
        stand_still(lambda: len(client.out), "the upstream is paused")
        self.assertLess(len(client.out), 4 * cp.MAX_OUT_BYTES)
        self.assertEqual(self.fake.open_streams, 1)
        self.assertEqual(stream_text(PATH, opened.events()), numbered(count, size))

    def test_another_client_is_served_meanwhile(self) -> None:
        opened = self.ready()
        opened.create(response("@@events=2 stall=1@@"))
        self.fake.wait_for(lambda: self.fake.holding == 1)
        self.assertEqual(self.ready().turn(response("hi"))[-1]["type"], "response.completed")
        self.assertEqual(said(self.proxy.post("/v1/chat/completions", chat("hi"))), "Echo: hi")
        self.assertEqual(self.proxy.post("/v1/messages", message("hi")).status, 200)
        release(self.fake)
        opened.events()

    def test_a_fault_of_ours_is_an_error_and_no_end(self) -> None:
        """Also one at the last event, which the client then never gets."""
        opened = self.ready()
        for text in ("hi", "@@events=9 delay_ms=5@@"):
            kept, self.proxy.app.store = self.proxy.app.store, None    # type: ignore[assignment]
            try:
                self.assert_error(opened.turn(response(text))[-1], 500)
            finally:
                self.proxy.app.store = kept
        self.assertEqual(opened.turn(response("hi"))[-1]["type"], "response.completed")
        self.proxy.logs.clear()


class Ends(SocketCase):
    """The server ends, or the connection is too old."""

    def test_an_old_connection_is_told_to_come_again(self) -> None:
        with Proxy(self.fake, socket_life_s=0.2) as proxy:
            opened = self.ready(proxy=proxy)
            self.assertEqual(opened.turn(response("hi"))[-1]["type"], "response.completed")
            event = opened.event()
            self.assert_error(event, 400, "websocket_connection_limit_reached")
            self.assertEqual(opened.wait_closed().code, 1000)

    def test_a_request_that_runs_at_the_limit_ends_first(self) -> None:
        with Proxy(self.fake, socket_life_s=0.2) as proxy:
            opened = self.ready(proxy=proxy)
            began = time.monotonic()
            opened.create(response("@@events=2 stall=1@@"))
            opened.create(response("not any more"))
            self.assertTrue(self.fake.wait_for(lambda: self.fake.holding == 1))
            wait_until(lambda: time.monotonic() - began > 0.25, "it is too old")
            release(self.fake)
            self.assertEqual(opened.events()[-1]["type"], "response.completed")
            self.assert_error(opened.event(), 400, "websocket_connection_limit_reached")
            self.assertEqual(opened.wait_closed().code, 1000)

    def test_at_the_end_of_the_server_idle_connections_get_a_close_frame(self) -> None:
        with Proxy(self.fake) as proxy:
            opened = self.ready(proxy=proxy)
            opened.turn(response("hi"))
            ending = threading.Thread(target=proxy.server.finish, args=(5.0,))
            began = time.monotonic()
            ending.start()
            self.assertEqual(opened.wait_closed().code, 1001)
            opened.sock.close()
            ending.join(10)
            self.assertLess(time.monotonic() - began, 4, "nobody waits for an idle connection")

    def test_at_the_end_of_the_server_a_running_answer_may_end_first(self) -> None:
        with Proxy(self.fake) as proxy:
            opened = self.ready(proxy=proxy)
            opened.create(response("@@events=3 stall=1@@"))
            self.fake.wait_for(lambda: self.fake.holding == 1)
            opened.create(response("never"))
            ending = threading.Thread(target=proxy.server.finish, args=(9.0,))
            ending.start()
            wait_until(lambda: proxy.app.stop.is_set())
            release(self.fake)
            self.assertEqual(opened.events()[-1]["type"], "response.completed")
            self.assertEqual(opened.wait_closed().code, 1001)
            ending.join(10)

    def test_an_answer_that_outlives_the_grace_ends_with_an_error(self) -> None:
        for model in (CODEX, CLAUDE):
            with Proxy(self.fake) as proxy:
                opened = self.ready(proxy=proxy)
                opened.create(response("@@events=3 stall=1@@", model))
                self.fake.wait_for(lambda: self.fake.holding == 1)
                while opened.event()["type"] != "response.output_text.delta":
                    pass
                proxy.server.finish(0.05)
                self.assertIn(opened.events()[-1]["type"], ("response.failed", "error"))
                self.assertEqual(opened.wait_closed().code, 1001)


if __name__ == "__main__":
    unittest.main()
