"""The HTTP server seen from a raw socket: connections, limits, doors, and the small routes."""
from __future__ import annotations

import contextlib
import gzip
import http.client
import io
import json
import re
import socket
import threading
import unittest
import zlib
from typing import Any

from support import (PATHS, REQUESTS, ProxyCase, RawClient, chat, chunked_post, cp, get, message,
                     post, raw_exchange, release, response, said, second_proxy, send, side_by_side,
                     wait_until)
from fake_upstream import CHAT, COUNT_TOKENS, MODELS, Answer, FakeUpstream
from cases import SharedCase

MIB = 1024 * 1024


class ConnectionTest(SharedCase):
    def test_many_requests_use_one_connection(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.port, timeout=10)
        self.addCleanup(connection.close)
        ports = set()
        for number in range(20):
            reply = send(connection, "POST", "/v1/chat/completions", chat("round %d" % number))
            self.assertEqual(said(reply), "Echo: round %d" % number)
            ports.add(connection.sock.getsockname()[1])
        self.assertEqual(len(ports), 1)

    def test_two_pipelined_requests_are_answered_in_order(self) -> None:
        client = self.client()
        client.send(post("/v1/chat/completions", chat("first")) + get("/health"))
        self.assertEqual(said(client.answer()), "Echo: first")
        self.assertEqual(client.answer().json["status"], "ok")

    def test_ten_pipelined_requests_in_one_send_are_answered_in_order(self) -> None:
        client = self.client()
        texts = ["number %d" % number for number in range(10)]
        client.send(b"".join(post("/v1/chat/completions", chat(text)) for text in texts))
        self.assertEqual([said(client.answer()) for _ in texts], ["Echo: " + t for t in texts])

    def test_a_request_pipelined_behind_a_stream_is_answered_after_it(self) -> None:
        client = self.client()
        client.send(post("/v1/chat/completions", chat("one", stream=True))
                    + post("/v1/chat/completions", chat("two")))
        self.assertTrue(client.answer().body.endswith(b"data: [DONE]\n\n"))
        self.assertEqual(said(client.answer()), "Echo: two")

    def test_a_request_sent_while_the_first_one_waits_is_kept_for_later(self) -> None:
        client = self.client()
        self.fake.script(CHAT, Answer(status=0, hold=True))
        client.send(post("/v1/chat/completions", chat("slow")))
        self.assertTrue(self.fake.wait_for(lambda: self.fake.holding == 1))
        client.send(post("/v1/chat/completions", chat("early")))
        release(self.fake)
        self.assertEqual(said(client.answer()), "Echo: slow")
        self.assertEqual(said(client.answer()), "Echo: early")

    def test_empty_lines_between_requests_are_ignored(self) -> None:
        client = self.client()
        client.send(b"\r\n" + get("/health") + b"\r\n\r\n" + get("/health"))
        self.assertEqual([client.answer().status, client.answer().status], [200, 200])

    def test_a_request_sent_one_byte_at_a_time_is_understood(self) -> None:
        client = self.client()
        for byte in post("/v1/chat/completions", chat("drip")):
            client.send(bytes([byte]))
        self.assertEqual(said(client.answer()), "Echo: drip")

    def test_connection_close_is_honoured_and_said(self) -> None:
        client = self.client()
        answer = client.ask(get("/health", "Connection: close"))
        self.assertEqual((answer.status, answer.headers["connection"]), (200, "close"))
        self.assertTrue(client.is_closed())

    def test_http_1_0_closes_after_the_answer(self) -> None:
        client = self.client()
        answer = client.ask(b"GET /health HTTP/1.0\r\n\r\n")
        self.assertEqual(answer.status, 200)
        self.assertTrue(client.is_closed())

    def test_http_1_0_with_keep_alive_stays_open_and_says_so(self) -> None:
        client = self.client()
        for _ in range(2):
            answer = client.ask(get("/health", "Connection: keep-alive", version="1.0"))
            self.assertEqual((answer.status, answer.headers["connection"]), (200, "keep-alive"))

    def test_a_stream_to_http_1_0_is_not_chunked_and_ends_with_the_connection(self) -> None:
        raw = raw_exchange(self.proxy.port, post("/v1/chat/completions", chat("old", stream=True),
                                                 "Connection: keep-alive", version="1.0"))
        head, _, body = raw.partition(b"\r\n\r\n")
        self.assertNotIn(b"transfer-encoding", head.lower())
        self.assertTrue(body.startswith(b"data: {"), body[:60])
        self.assertTrue(body.endswith(b"data: [DONE]\n\n"))

    def test_http_2_preface_is_refused_clearly(self) -> None:
        raw = raw_exchange(self.proxy.port, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self.assertTrue(raw.startswith(b"HTTP/1.1 505 "), raw)

    def test_head_and_body_come_in_one_segment(self) -> None:
        client = self.client()
        client.send(get("/health"))
        data = client.sock.recv(65536)
        self.assertIn(b'"status"', data.partition(b"\r\n\r\n")[2])

    def test_head_and_first_event_come_in_one_segment(self) -> None:
        for path, make in REQUESTS:
            with self.subTest(path):
                client = self.client()
                client.send(post(path, make("@@events=3 stall=1@@", stream=True)))
                data = client.sock.recv(65536)
                self.assertIn(b"data: {", data.partition(b"\r\n\r\n")[2])
                release(self.fake)

    def test_an_idle_connection_is_closed_without_a_word(self) -> None:
        with second_proxy(self, idle_client_s=0.05,            # type: ignore[arg-type]
                          head_timeout_s=0.1) as proxy:
            self.assertTrue(self.client(proxy).is_closed())
            client = self.client(proxy)
            self.assertEqual(client.ask(get("/health")).status, 200)
            self.assertTrue(client.is_closed())

    def test_empty_lines_do_not_keep_an_idle_connection_open(self) -> None:
        with second_proxy(self, idle_client_s=0.05,            # type: ignore[arg-type]
                          keepalive_s=0.1) as proxy:
            with RawClient(proxy.port, timeout_s=1.0) as client:
                client.send(b"\r\n")
                self.assertTrue(client.is_closed())


class BodyTest(SharedCase):
    def test_chunked_bodies_are_joined(self) -> None:
        data = json.dumps(chat("in pieces")).encode()
        client = self.client()
        for size in (1, 7, len(data)):
            pieces = [data[at:at + size] for at in range(0, len(data), size)]
            client.send(chunked_post("/v1/chat/completions", pieces) + get("/health"))
            self.assertEqual(said(client.answer()), "Echo: in pieces")
            self.assertEqual(client.answer().status, 200)
        self.assertEqual(self.fake.last(CHAT).headers.get("transfer-encoding"), None)

    def test_expect_100_continue_is_answered_before_the_body_is_sent(self) -> None:
        client = self.client()
        whole = post("/v1/chat/completions", chat("patient"), "Expect: 100-continue")
        head, _, body = whole.partition(b"\r\n\r\n")
        client.send(head + b"\r\n\r\n")
        self.assertEqual(client.reader.readline(), b"HTTP/1.1 100 Continue\r\n")
        self.assertEqual(client.reader.readline(), b"\r\n")
        client.send(body)
        self.assertEqual(said(client.answer()), "Echo: patient")

    def test_a_refused_expectation_gets_no_100(self) -> None:
        cases = (
            (404, "/v1/nowhere", "application/json", "10"),
            (413, "/v1/chat/completions", "application/json", str(33 * MIB)),
            (415, "/v1/chat/completions", "text/plain", "10"),
            (405, "/v1/models", "application/json", "10"))
        for status, path, kind, length in cases:
            with self.subTest(status):
                raw = raw_exchange(self.proxy.port, get(
                    path, "Expect: 100-continue", "Content-Type: " + kind,
                    "Content-Length: " + length, method="POST"), shut=True)
                self.assertTrue(raw.startswith(b"HTTP/1.1 %d " % status), raw[:80])
                self.assertNotIn(b"100 Continue", raw)

    def test_http_1_0_gets_no_100_even_if_it_asks(self) -> None:
        raw = raw_exchange(self.proxy.port, post("/v1/chat/completions", chat("old"),
                                                 "Expect: 100-continue", version="1.0"))
        self.assertTrue(raw.startswith(b"HTTP/1.1 200 "), raw[:80])

    def test_an_unknown_expectation_is_417(self) -> None:
        reply = self.proxy.post("/v1/chat/completions", chat("a"), Expect="a-miracle")
        self.assert_openai_error(reply, 417)

    def test_gzip_and_deflate_bodies_are_unpacked(self) -> None:
        data = json.dumps(chat("packed")).encode()
        for coding, packed in (("gzip", gzip.compress(data)), ("x-gzip", gzip.compress(data)),
                               ("deflate", zlib.compress(data)), ("identity", data)):
            with self.subTest(coding):
                reply = self.proxy.request("POST", "/v1/chat/completions", packed,
                                           {"Content-Encoding": coding})
                self.assertEqual(said(reply), "Echo: packed")
                self.assertNotIn("content-encoding", self.fake.last(CHAT).headers)

    def test_bad_content_encodings_are_refused(self) -> None:
        whole = gzip.compress(b"{}" * 50)
        for status, coding, data in ((415, "br", b"abc"), (400, "gzip", b"not gzip"),
                                     (400, "gzip", whole[:-9])):
            with self.subTest(status=status, coding=coding):
                reply = self.proxy.request("POST", "/v1/messages", data,
                                           {"Content-Encoding": coding})
                self.assertEqual(reply.status, status, reply.body)
                self.assertEqual(reply.json["type"], "error")

    def test_a_content_length_above_the_limit_is_413_at_once(self) -> None:
        for path, shape in (("/v1/chat/completions", self.assert_openai_error),
                            ("/v1/messages", self.assert_anthropic_error)):
            client = self.client()
            client.send(get(path, "Content-Type: application/json",
                            "Content-Length: %d" % (32 * MIB + 1), method="POST"))
            answer = client.answer()
            if shape == self.assert_openai_error:
                self.assert_openai_error(answer, 413)
            else:
                self.assert_anthropic_error(answer, 413, "request_too_large")
            self.assertEqual(answer.headers["connection"], "close")

    def test_a_chunked_body_above_the_limit_is_413_while_it_comes(self) -> None:
        client = self.client()
        client.send(get("/v1/chat/completions", "Content-Type: application/json",
                        "Transfer-Encoding: chunked", method="POST"))
        piece = b"100000\r\n" + b" " * MIB + b"\r\n"
        sent = 0
        with contextlib.suppress(ConnectionError):
            for _ in range(33):                    # no end: it must be refused before
                client.send(piece)
                sent += 1
        self.assertGreaterEqual(sent, 32)
        self.assert_openai_error(client.answer(), 413)

    def test_a_body_of_exactly_the_limit_is_read(self) -> None:
        body = json.dumps(chat("a")).encode()
        reply = self.proxy.request("POST", "/v1/messages/count_tokens",
                                   body + b" " * (32 * MIB - len(body)))
        self.assertEqual(reply.status, 200, reply.body)

    def test_a_client_that_sends_100_mb_reads_the_413(self) -> None:
        client = self.client()
        length = 100 * 1000 * 1000
        client.send(get("/v1/chat/completions", "Content-Type: application/json",
                        "Content-Length: %d" % length, method="POST"))
        block = b"x" * 1000 * 1000
        for _ in range(100):
            client.send(block)                     # a reset would raise here
        self.assert_openai_error(client.answer(), 413)

    def test_a_body_without_a_json_content_type_is_415(self) -> None:
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            with self.subTest(kind):
                reply = self.proxy.request("POST", "/v1/chat/completions", chat("a"),
                                           {"Content-Type": kind})
                self.assert_openai_error(reply, 415)

    def test_json_content_types_with_parameters_or_suffix_are_taken(self) -> None:
        for kind in ("application/json; charset=utf-8", "Application/JSON", "application/a+json"):
            with self.subTest(kind):
                reply = self.proxy.request("POST", "/v1/chat/completions", chat("a"),
                                           {"Content-Type": kind})
                self.assertEqual(reply.status, 200, reply.body)

    def test_bad_json_is_400_and_the_connection_goes_on(self) -> None:
        client = self.client()
        self.assert_openai_error(client.ask(post("/v1/chat/completions", b"{nope")), 400)
        self.assert_anthropic_error(client.ask(post("/v1/messages", b"[]")), 400,
                                    "invalid_request_error")
        self.assertEqual(client.ask(get("/health")).status, 200)


class LimitTest(SharedCase):
    settings = dict(head_timeout_s=0.1, body_stall_s=0.1)

    def test_a_head_above_64_kib_is_431(self) -> None:
        raw = raw_exchange(self.proxy.port, get("/health", "X-Long: " + "a" * 70000))
        self.assertTrue(raw.startswith(b"HTTP/1.1 431 "), raw[:80])

    def test_too_many_header_fields_are_431(self) -> None:
        raw = raw_exchange(self.proxy.port, get("/health", *["X-%d: 1" % n for n in range(200)]))
        self.assertTrue(raw.startswith(b"HTTP/1.1 431 "), raw[:80])

    def test_a_url_above_16_kib_is_414(self) -> None:
        raw = raw_exchange(self.proxy.port, get("/health?" + "a" * 20000))
        self.assertTrue(raw.startswith(b"HTTP/1.1 414 "), raw[:80])

    def test_a_head_that_stops_coming_is_408(self) -> None:
        client = self.client()
        client.send(b"GET /health HTTP/1.1\r\nHost: local")
        self.assert_openai_error(client.answer(), 408)
        self.assertTrue(client.is_closed())

    def test_a_body_that_stops_coming_is_408_in_the_dialect(self) -> None:
        started = [(path, self.client()) for path in PATHS]       # they wait side by side
        for path, client in started:
            client.send(post(path, b"{" + b" " * 50)[:-10])
        for path, client in started:
            with self.subTest(path):
                answer = client.answer()
                self.assertEqual(answer.status, 408)
                self.assertEqual("type" in answer.json, path == "/v1/messages")
                self.assertTrue(client.is_closed())

    def test_a_chunked_body_that_stops_coming_is_408(self) -> None:
        client = self.client()
        client.send(chunked_post("/v1/responses", [b"{}"])[:-12])
        self.assert_openai_error(client.answer(), 408)


class DoorTest(SharedCase):
    settings = dict(allow_host=("box.example", "Big.Example"),
                    cors_origin=("https://app.example",))

    def test_loopback_names_and_allowed_hosts_are_served(self) -> None:
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1:4399", "127.9.9.9", "[::1]:80",
                     "app.localhost", "box.example", "box.example:443"):
            with self.subTest(host):
                self.assertEqual(self.proxy.get("/health", Host=host).status, 200)

    def test_an_allowed_host_is_compared_without_case(self) -> None:
        self.assertEqual(self.proxy.get("/health", Host="big.example").status, 200)

    def test_foreign_hosts_are_403_before_any_work(self) -> None:
        sent = self.new_sent()
        for host in ("evil.example", "127.evil.com", "localhost.evil.com", "127.0.0.1.evil.com",
                     "192.168.1.2", "box.example.evil.com"):
            for path, make in REQUESTS:
                with self.subTest(host=host, path=path):
                    reply = self.proxy.post(path, make("a"), Host=host)
                    self.assertEqual(reply.status, 403, reply.body)
        self.assert_openai_error(self.proxy.get("/", Host="evil.example"), 403)
        self.assertEqual(sent(), [])

    def test_http_1_1_without_a_host_is_400(self) -> None:
        raw = raw_exchange(self.proxy.port, b"GET /health HTTP/1.1\r\n\r\n")
        self.assertTrue(raw.startswith(b"HTTP/1.1 400 "), raw[:80])

    def test_two_hosts_are_400(self) -> None:
        raw = raw_exchange(self.proxy.port, get("/health", "Host: evil.example"))
        self.assertTrue(raw.startswith(b"HTTP/1.1 400 "), raw[:80])

    def test_foreign_origins_are_403_before_any_work(self) -> None:
        sent = self.new_sent()
        for origin in ("https://evil.example", "null", "http://localhost:1", "file://",
                       "https://app.example.evil.com", "https://127.0.0.1"):
            with self.subTest(origin):
                reply = self.proxy.post("/v1/messages", message("a"), Origin=origin)
                self.assert_anthropic_error(reply, 403, "permission_error")
                self.assertNotIn("access-control-allow-origin", reply.headers)
        self.assertEqual(sent(), [])

    def test_same_origin_and_allowed_origins_are_served_and_named(self) -> None:
        for origin in (self.proxy.url, "https://app.example"):
            with self.subTest(origin):
                reply = self.proxy.post("/v1/chat/completions", chat("a"), Origin=origin)
                self.assertEqual(reply.status, 200, reply.body)
                self.assertEqual(reply.headers["access-control-allow-origin"], origin)
                self.assertIn("Origin", reply.headers["vary"])

    def test_an_allowed_page_can_read_errors_and_streams_too(self) -> None:
        more = {"Origin": "https://app.example"}
        bad = self.proxy.post("/v1/chat/completions", {}, **more)
        good = self.proxy.stream("/v1/chat/completions", chat("a"), **more)
        self.assertEqual((bad.status, good.status), (400, 200))
        for reply in (bad, good):
            self.assertEqual(reply.headers["access-control-allow-origin"], more["Origin"])

    def test_preflight_of_an_allowed_page_is_granted(self) -> None:
        reply = self.proxy.request("OPTIONS", "/v1/chat/completions", None, {
            "Origin": "https://app.example", "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type, x-own",
            "Access-Control-Request-Private-Network": "true"})
        self.assertEqual((reply.status, reply.body), (204, b""))
        self.assertEqual(reply.headers["access-control-allow-origin"], "https://app.example")
        self.assertIn("POST", reply.headers["access-control-allow-methods"])
        self.assertIn("x-own", reply.headers["access-control-allow-headers"])
        self.assertEqual(reply.headers["access-control-allow-private-network"], "true")

    def test_preflight_of_a_foreign_page_is_403(self) -> None:
        reply = self.proxy.request("OPTIONS", "/v1/chat/completions", None, {
            "Origin": "https://evil.example", "Access-Control-Request-Method": "POST"})
        self.assertEqual(reply.status, 403)
        self.assertNotIn("access-control-allow-origin", reply.headers)

    def test_no_answer_allows_every_origin(self) -> None:
        for reply in (self.proxy.get("/health"), self.proxy.get("/"),
                      self.proxy.request("OPTIONS", "/v1/models")):
            self.assertNotIn("access-control-allow-origin", reply.headers)


class RouteTest(SharedCase):
    def test_v1_doubled_left_out_slashes_and_queries_make_no_difference(self) -> None:
        for path in ("/v1/models", "/models", "/v1/v1/models", "//v1//models", "/v1/models/",
                     "/models///", "/v1/models?limit=5", "/v1/models/?a=%20&b", "/v1/v1//models/"):
            with self.subTest(path):
                raw = self.client().ask(get(path))
                self.assertEqual(raw.status, 200, raw.body)
                self.assertEqual(raw.json["object"], "list")
        for path in ("/chat/completions", "/v1/v1/chat/completions/?beta=true"):
            self.assertEqual(said(self.proxy.post(path, chat("p"))), "Echo: p")
        self.assertEqual(self.proxy.post("/messages?beta=true", message("p")).status, 200)

    def test_an_absolute_url_as_target_reaches_its_route(self) -> None:
        client = self.client()
        answer = client.ask(get("http://localhost/health"))
        self.assertEqual((answer.status, answer.headers["content-type"]),
                         (200, "application/json"))

    def test_a_target_that_is_no_path_is_an_error(self) -> None:
        for target in ("health", "*", "localhost:443"):
            with self.subTest(target):
                raw = raw_exchange(self.proxy.port, get(target, "Connection: close"))
                self.assertIn(raw[9:12], (b"400", b"404"), raw[:80])

    def test_unknown_routes_are_404_in_openai_shape(self) -> None:
        for path in ("/v1/nowhere", "/v2/models", "/v1", "/chat", "/modelsx", "/v1models"):
            with self.subTest(path):
                if path == "/v1":
                    self.assertEqual(self.proxy.get(path).status, 200)   # the page
                else:
                    self.assert_openai_error(self.proxy.get(path), 404)

    def test_wrong_methods_are_405_with_allow(self) -> None:
        for method, path, allowed in (
                ("GET", "/v1/chat/completions", {"POST"}), ("PUT", "/v1/responses", {"POST"}),
                ("GET", "/v1/messages", {"POST"}), ("HEAD", "/v1/messages", {"POST"}),
                ("DELETE", "/v1/models", {"GET", "HEAD"}), ("POST", "/health", {"GET", "HEAD"}),
                ("BREW", "/v1/models/gpt-4.1", {"GET", "HEAD"}), ("get", "/health", {"GET"})):
            with self.subTest(method=method, path=path):
                answer = self.client().ask(get(path, "Content-Length: 0", method=method), method)
                self.assertEqual(answer.status, 405)
                listed = set(answer.headers["allow"].replace(" ", "").split(","))
                self.assertLessEqual(allowed, listed)
                self.assertNotIn(method, listed)

    def test_get_on_responses_without_upgrade_is_405(self) -> None:
        reply = self.proxy.get("/v1/responses")
        self.assert_openai_error(reply, 405)
        self.assertEqual(reply.headers["allow"], "POST")

    def test_a_websocket_of_another_version_is_426_and_nothing_behind_it_is_read(self) -> None:
        client = self.client()
        answer = client.ask(get("/v1/responses", "Connection: Upgrade", "Upgrade: websocket",
                                "Sec-WebSocket-Version: 14", "Sec-WebSocket-Key: YWJj"))
        self.assert_openai_error(answer, 426)
        self.assertEqual(answer.headers["sec-websocket-version"], "13")
        self.assertTrue(client.is_closed())

    def test_head_works_where_get_does(self) -> None:
        client = self.client()
        for path in ("/", "/dashboard", "/v1/models", "/usage", "/v1/models/gpt-4.1"):
            with self.subTest(path):
                whole = client.ask(get(path))
                empty = client.ask(get(path, method="HEAD"), "HEAD")
                self.assertEqual((empty.status, empty.body), (200, b""))
                self.assertEqual(empty.headers["content-length"], str(len(whole.body)))
                self.assertEqual(empty.headers["content-type"], whole.headers["content-type"])

    def test_head_of_an_error_has_no_body_either(self) -> None:
        client = self.client()
        self.assertEqual(client.ask(get("/v1/nowhere", method="HEAD"), "HEAD").status, 404)
        self.assertEqual(client.ask(get("/health")).status, 200)

    def test_options_without_an_origin_is_quiet(self) -> None:
        client = self.client()
        answer = client.ask(get("/v1/messages", method="OPTIONS"), "OPTIONS")
        self.assertEqual(answer.status, 204)
        self.assertNotIn("content-type", answer.headers)
        self.assertEqual(client.ask(get("/health")).status, 200)

    def test_health_tells_state_and_version(self) -> None:
        reply = self.proxy.get("/health")
        self.assertEqual((reply.status, reply.json["status"]), (200, "ok"))
        self.assertEqual(reply.json["version"], cp.__version__)
        self.assertIs(reply.json["demo"], False)

    def test_usage_is_the_upstreams_answer_whole(self) -> None:
        self.fake.usage_extra = {"something_new": {"a": [1]}}
        reply = self.proxy.get("/usage")
        self.assertEqual(reply.status, 200)
        self.assertEqual(reply.json["something_new"], {"a": [1]})
        self.assertIn("premium_interactions", reply.json["quota_snapshots"])
        self.assertEqual(reply.json["login"], "octocat")

    def test_telemetry_and_favicon_are_quiet(self) -> None:
        sent = self.new_sent()
        reply = self.proxy.post("/api/event_logging/batch", {"events": []})
        self.assertEqual(reply.status, 200)
        self.assertEqual(self.proxy.get("/favicon.ico").status, 204)
        self.assertEqual(sent(), [])

    def test_the_page_has_a_strict_policy_and_names_no_other_host(self) -> None:
        for path in ("/", "/dashboard", "/auth/device"):
            reply = self.proxy.get(path, Accept="text/html")
            self.assertEqual(reply.status, 200)
            self.assertIn("text/html", reply.headers["content-type"])
            policy = reply.headers["content-security-policy"]
            self.assertIn("default-src 'none'", policy)
            self.assertIn("frame-ancestors 'none'", policy)
            self.assertNotIn("unsafe", policy)
            text = reply.body.decode()
            self.assertEqual(re.findall(r"""(?:src|href|action)\s*=\s*["']?\s*(?:https?:)?//""",
                                        text), [])
            self.assertEqual(re.findall(r"https?://\w+", text), [])
            self.assertNotIn("@import", text)
            self.assertNotIn("innerHTML", text)

    def test_token_is_404_without_the_flag(self) -> None:
        reply = self.proxy.get("/token")
        self.assert_openai_error(reply, 404)
        self.assertFalse([token for token in self.fake.tokens if token in reply.body.decode()])

    def test_token_is_served_with_the_flag_but_not_to_a_page(self) -> None:
        self.enter(contextlib.redirect_stderr(io.StringIO()))
        with second_proxy(self, show_token=True) as proxy:  # type: ignore[arg-type]
            reply = proxy.get("/token")
            self.assertEqual(reply.status, 200)
            self.assertIn(reply.json["token"], self.fake.tokens)
            self.assertEqual(reply.headers["cache-control"], "no-store")
            self.assertEqual(proxy.get("/token", Origin=proxy.url).status, 404)
            self.assertNotIn(reply.json["token"], proxy.log_text())

    def test_the_flag_prints_tokens_on_a_terminal_only(self) -> None:
        for is_terminal in (True, False):
            stderr = io.StringIO()
            setattr(stderr, "isatty", lambda shown=is_terminal: shown)
            with contextlib.redirect_stderr(stderr):
                with second_proxy(self, show_token=True) as proxy:  # type: ignore[arg-type]
                    token = proxy.get("/token").json["token"]
            self.assertEqual(token in stderr.getvalue(), is_terminal)


class ModelTest(SharedCase):
    def test_the_list_suits_both_sdks(self) -> None:
        listed = self.proxy.get("/v1/models").json
        self.assertEqual((listed["object"], listed["has_more"]), ("list", False))
        self.assertEqual(listed["first_id"], listed["data"][0]["id"])
        self.assertEqual(listed["last_id"], listed["data"][-1]["id"])
        ids = [entry["id"] for entry in listed["data"]]
        self.assertEqual(len(ids), len(set(ids)))
        for entry in listed["data"]:
            self.assertEqual((entry["object"], entry["type"]), ("model", "model"))
            self.assertIsInstance(entry["created"], int)
            self.assertRegex(entry["created_at"], r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z")
            for name in ("owned_by", "display_name"):
                self.assertIsInstance(entry[name], str)

    def test_hidden_and_disabled_models_are_left_out_unless_asked_for(self) -> None:
        usual = {entry["id"] for entry in self.proxy.get("/v1/models").json["data"]}
        every = {entry["id"]: entry for entry in self.proxy.get("/v1/models?all=1").json["data"]}
        self.assertIn("text-embedding-3-small", usual)
        self.assertLess(usual, set(every))
        self.assertEqual(set(every) - usual, {"gpt-3.5-turbo", "gpt-5.2"})
        self.assertEqual(every["gpt-5.2"]["state"], "disabled")
        self.assertIs(every["gpt-3.5-turbo"]["picker_enabled"], False)
        self.assertIs(every["gpt-4.1"]["picker_enabled"], True)     # listed twice upstream

    def test_codex_gets_its_form_with_client_version(self) -> None:
        with_version = self.proxy.get("/v1/models?client_version=0.50.0").json
        self.assertEqual(with_version["models"], [])
        self.assertTrue(with_version["data"])
        self.assertNotIn("models", self.proxy.get("/v1/models").json)

    def test_one_model_is_shown_by_any_of_its_names(self) -> None:
        for asked, kind in (("gpt-4.1", "gpt-4.1"), ("claude-sonnet-4-6", "claude-sonnet-4.6"),
                            ("anthropic/claude-haiku-4-5-20251001", "claude-haiku-4.5"),
                            ("gpt%2D4o", "gpt-4o")):
            with self.subTest(asked):
                reply = self.proxy.get("/v1/models/" + asked)
                self.assertEqual(reply.status, 200, reply.body)
                self.assertEqual(reply.json["id"], asked.replace("%2D", "-"))
                self.assertEqual(reply.json["display_name"], kind.replace("-", " ").title())

    def test_an_unknown_model_is_404_with_three_nearest_and_nothing_is_sent(self) -> None:
        self.proxy.get("/v1/models")
        sent = self.new_sent()
        for path, make in REQUESTS:
            reply = self.proxy.post(path, make("a", model="clod-sonet-4.6"))
            self.assertEqual(reply.status, 404, reply.body)
            text = reply.json["error"]["message"]
            self.assertIn("claude-sonnet-4.6", text)
            known = [entry["id"] for entry in self.proxy.get("/v1/models").json["data"]]
            words = re.findall(r"[\w.-]+", text.partition("nearest")[2])
            self.assertEqual(len([word for word in words if word in known]), 3, text)
        self.assert_openai_error(self.proxy.get("/v1/models/clod"), 404, "model_not_found")
        self.assert_anthropic_error(
            self.proxy.get("/v1/models/clod", **{"anthropic-version": "2023-06-01"}), 404,
            "not_found_error")
        self.assertEqual(sent(), [])

    def test_aliases_are_followed_and_the_answer_names_the_alias(self) -> None:
        with second_proxy(self, model_alias=("fast=gpt-4.1",)) as proxy:  # type: ignore[arg-type]
            reply = proxy.post("/v1/chat/completions", chat("a", model="fast"))
            self.assertEqual((reply.status, reply.json["model"]), (200, "fast"))
            self.assertEqual(self.fake.last(CHAT).json["model"], "gpt-4.1")
            self.assertEqual(proxy.get("/v1/models/fast").json["id"], "fast")

    def test_the_answers_model_is_the_id_that_was_asked_for(self) -> None:
        for stream in (False, True):
            body = message("a", model="claude-sonnet-4-6", stream=stream)
            reply = self.proxy.post("/v1/messages", body)
            self.assertIn(b'"model":"claude-sonnet-4-6"', reply.body.replace(b": ", b":"))
            self.assertNotIn(b"claude-sonnet-4.6", reply.body)

    def test_a_model_that_does_not_chat_is_a_clear_400(self) -> None:
        self.proxy.get("/v1/models")
        sent = self.new_sent()
        reply = self.proxy.post("/v1/chat/completions", chat("a", model="text-embedding-3-small"))
        self.assert_openai_error(reply, 400, "unsupported_api_for_model")
        self.assertIn("/embeddings", reply.json["error"]["message"])
        self.assertEqual(sent(), [])


class AnswerHeadTest(SharedCase):
    def test_the_request_id_stands_in_the_answer_and_the_log(self) -> None:
        for method, path, body in (("GET", "/health", None), ("GET", "/v1/nowhere", None),
                                   ("POST", "/v1/messages", {}),
                                   ("POST", "/v1/chat/completions", chat("a", stream=True))):
            with self.subTest(path):
                reply = self.proxy.request(method, path, body)
                found = reply.headers["x-request-id"]
                wait_until(lambda: found[:8] in self.proxy.log_text(), "the request in the log")

    def test_the_request_id_is_new_each_time_and_goes_upstream(self) -> None:
        first = self.proxy.post("/v1/chat/completions", chat("a"))
        self.assertEqual(self.fake.last(CHAT).headers["x-request-id"],
                         first.headers["x-request-id"])
        second = self.proxy.post("/v1/chat/completions", chat("a"))
        self.assertNotEqual(first.headers["x-request-id"], second.headers["x-request-id"])

    def test_only_harmless_headers_of_the_upstream_are_passed_on(self) -> None:
        wanted = {"x-ratelimit-remaining": "7", "x-ratelimit-exceeded": "a",
                  "anthropic-ratelimit-tokens-limit": "9", "x-usage-ratelimit-session": "ent=1",
                  "openai-processing-ms": "12", "x-copilot-service-request-id": "abc",
                  "retry-after": "3"}
        noise = {"set-cookie": "a=1", "content-security-policy": "x", "via": "a",
                 "strict-transport-security": "x", "x-other": "1", "server": "fake"}
        answer = Answer(headers=dict(wanted, **noise), body={
            "id": "a", "choices": [{"index": 0, "finish_reason": "stop",
                                    "message": {"role": "assistant", "content": "b"}}]})
        self.fake.script(CHAT, answer)
        whole = self.proxy.post("/v1/chat/completions", chat("a"))
        self.fake.script(CHAT, Answer(headers=dict(wanted, **noise), chunks=[
            b'data: {"choices":[{"delta":{"content":"b"},"finish_reason":"stop"}]}\n\n',
            b"data: [DONE]\n\n"]))
        stream = self.proxy.stream("/v1/chat/completions", chat("a"))
        self.fake.script(CHAT, Answer(status=429, headers=dict(wanted, **noise), body="no"))
        refused = self.proxy.post("/v1/chat/completions", chat("a"))
        self.proxy.app.login.account.limits.clear()               # type: ignore[union-attr]
        for reply in (whole, stream, refused):
            self.assertEqual({k: v for k, v in reply.headers.items() if k in wanted}, wanted)
            self.assertIn("x-quota-snapshot-premium_interactions", reply.headers)
            self.assertIn("x-github-request-id", reply.headers)
            self.assertEqual(set(reply.headers) & set(noise), set())

    def test_upstream_errors_keep_status_message_and_code_in_the_dialect(self) -> None:
        shapes: tuple[tuple[int, Any, str, str | None], ...] = (
            (400, {"error": {"message": "no such field", "code": "bad_thing", "param": "x"}},
             "no such field", "bad_thing"),
            (422, {"error": "filtered"}, "filtered", None),
            (403, {"message": "seat removed", "code": "seat"}, "seat removed", "seat"),
            (413, "failed to parse request", "failed to parse request", None),
            (404, {"type": "error", "error": {"type": "not_found_error", "message": "gone"}},
             "gone", None),
            (400, {"error": {"message": '{"error":{"message":"inner","code":"deep"}}'}},
             "inner", "deep"),
            (404, "<html>a page</html>", "404", None))
        for path, make in REQUESTS:
            for status, body, text, code in shapes:
                for stream in (False, True):
                    with self.subTest(path=path, status=status, stream=stream):
                        self.fake.script(PATHS[path], Answer(status=status, body=body))
                        reply = self.proxy.post(path, make("a", stream=stream))
                        if path == "/v1/messages":
                            kind = {403: "permission_error", 404: "not_found_error",
                                    413: "request_too_large"}.get(status, "invalid_request_error")
                            self.assert_anthropic_error(reply, status, kind)
                        else:
                            self.assert_openai_error(reply, status)
                            self.assertEqual(reply.json["error"]["code"], code)
                        self.assertIn(text, reply.json["error"]["message"])
                        self.assertNotIn("<html>", reply.json["error"]["message"])

    def test_redirects_are_not_followed(self) -> None:
        with FakeUpstream() as elsewhere:
            for path, make in REQUESTS:
                for status in (301, 302, 307, 308):
                    self.fake.script(PATHS[path], Answer.redirect(elsewhere.url + "/x", status))
                    reply = self.proxy.post(path, make("a"))
                    self.assertEqual(reply.status, 502, reply.body)
                    self.assertIn("redirect", reply.json["error"]["message"])
                    self.assertNotIn("location", reply.headers)
            self.assertEqual(elsewhere.connections, 0)

    def test_an_answer_that_is_not_json_is_502(self) -> None:
        for body in ("<html>hello</html>", "", "[1]", '"text"'):
            for path, make in REQUESTS:
                with self.subTest(body=body, path=path):
                    self.fake.script(PATHS[path], Answer(body=body))
                    reply = self.proxy.post(path, make("a"))
                    self.assertEqual(reply.status, 502, reply.body)


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class UnreachableTest(ProxyCase):
    def test_an_unreachable_upstream_is_502_in_the_dialect(self) -> None:
        url = "http://127.0.0.1:%d" % closed_port()
        with second_proxy(self, copilot_url=url) as proxy:
            for path, make in REQUESTS:
                reply = proxy.post(path, make("a"))
                self.assertEqual(reply.status, 502, reply.body)
                self.assertIn("cannot connect", reply.json["error"]["message"])
                self.assertEqual("type" in reply.json, path == "/v1/messages")

    def test_an_upstream_that_is_too_slow_is_504_in_the_dialect(self) -> None:
        with second_proxy(self, answer_timeout_s=0.05, head_timeout_s=0.2) as proxy:
            proxy.get("/v1/models")
            rows = [(path, make("a", stream=stream))
                    for path, make in REQUESTS for stream in (False, True)]
            for path, _ in rows:
                self.fake.script(PATHS[path], Answer(status=0, hold=True))
            for row, reply in zip(rows, side_by_side(lambda row: proxy.post(*row), rows)):
                with self.subTest(row):
                    self.assertEqual(reply.status, 504, reply.body)
                    self.assertEqual("type" in reply.json, row[0] == "/v1/messages")
        self.assertEqual(self.fake.count(CHAT), 2)          # and no second try
        self.assertTrue(self.fake.wait_for(lambda: self.fake.holding == 0, 1))

    def test_a_stream_that_falls_silent_for_too_long_ends_with_an_error(self) -> None:
        with second_proxy(self, answer_timeout_s=0.1, head_timeout_s=0.2) as proxy:
            reply = proxy.stream("/v1/chat/completions", chat("@@events=5 stall=2@@"))
            self.assertEqual(reply.status, 200)
            self.assertFalse(reply.is_done)
            self.assertIn("error", reply.events[-1])

    def test_a_login_that_github_does_not_know_is_401_in_the_dialect(self) -> None:
        self.fake.github_tokens.clear()
        self.fake.device.interval = 3600             # nobody logs in meanwhile
        with second_proxy(self) as proxy:
            for path, make in REQUESTS:
                reply = proxy.post(path, make("a"))
                self.assertEqual(reply.status, 401, reply.body)
                self.assertEqual("type" in reply.json, path == "/v1/messages")
            self.assertEqual(proxy.get("/health").status, 200)

    def test_count_tokens_with_an_unreachable_upstream_is_an_estimate(self) -> None:
        url = "http://127.0.0.1:%d" % closed_port()
        with second_proxy(self, copilot_url=url) as proxy:
            reply = proxy.post("/v1/messages/count_tokens", message("how long is this"))
            self.assertEqual(reply.status, 200, reply.body)
            self.assertGreater(reply.json["input_tokens"], 0)
        self.assertEqual(self.fake.count(COUNT_TOKENS), 0)

    def test_stale_models_are_served_while_the_list_cannot_be_had(self) -> None:
        with second_proxy(self, catalogue_age_s=0.0) as proxy:
            first = proxy.get("/v1/models").json
            self.fake.script(MODELS, *[Answer(status=500, body="oops")] * 8)
            self.assertEqual(proxy.get("/v1/models").json, first)

    def test_requests_in_parallel_do_not_wait_for_each_other(self) -> None:
        self.fake.script(CHAT, Answer(status=0, hold=True))
        done = threading.Event()

        def ask() -> None:
            self.assertEqual(said(self.proxy.post("/v1/chat/completions", chat("slow"))),
                             "Echo: slow")
            done.set()

        thread = threading.Thread(target=ask)
        thread.start()
        self.assertTrue(self.fake.wait_for(lambda: self.fake.holding == 1))
        self.assertEqual(said(self.proxy.post("/v1/chat/completions", chat("quick"))),
                         "Echo: quick")
        self.assertEqual(self.proxy.post("/v1/responses", response("quick")).status, 200)
        self.assertFalse(done.is_set())
        release(self.fake)
        thread.join(5)
        self.assertTrue(done.is_set())


if __name__ == "__main__":
    unittest.main()
