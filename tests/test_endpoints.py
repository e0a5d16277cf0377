"""Endpoints that are not one streamed answer: counts, embeddings, several calls in one request,
a whole answer for a stream (section 20)."""
from __future__ import annotations

import base64
import json
import struct
import time
import unittest
from typing import Any, Iterator

from support import Proxy, ProxyCase, chat, message, patient, raw_exchange, response, wait_until
from fake_upstream import CHAT, COUNT_TOKENS, EMBEDDINGS, RESPONSES, Answer
from cases import SharedCase


class CountAndEmbedTest(SharedCase):
    def embed(self, texts: Any, **more: Any) -> Any:
        return self.proxy.post("/v1/embeddings",
                               dict({"model": "text-embedding-3-small", "input": texts}, **more))

    def test_count_tokens_is_the_upstreams_own(self) -> None:
        reply = self.proxy.post("/v1/messages/count_tokens", dict(
            message("count me"), stream=True, thinking={"type": "enabled", "budget_tokens": 2000}))
        self.assertEqual(reply.status, 200, reply.body)
        sent = self.fake.last(COUNT_TOKENS).json
        self.assertEqual(reply.json, {"input_tokens": len(json.dumps(sent["messages"])) // 4 + 1})

    def test_count_tokens_falls_back_to_an_estimate(self) -> None:
        self.fake.count_tokens_fails = True
        self.addCleanup(setattr, self.fake, "count_tokens_fails", False)
        text = "some words " * 400
        reply = self.proxy.post("/v1/messages/count_tokens", message(text))
        self.assertEqual(reply.status, 200)
        self.assertGreater(reply.json["input_tokens"], 800 * 1.2)   # on the high side of 2 x 400
        self.assertLess(reply.json["input_tokens"], len(text))

    def test_count_tokens_is_estimated_after_any_refusal(self) -> None:
        for status in (400, 401, 403, 404, 429, 500):
            self.fake.script(COUNT_TOKENS, *[Answer(status=status, body="no")] * 2)
            reply = self.proxy.post("/v1/messages/count_tokens", message("a"))
            self.assertEqual(reply.status, 200, (status, reply.body))
            while self.fake.next_answer(COUNT_TOKENS):
                pass                                       # what was not needed

    def test_count_tokens_of_a_model_without_the_endpoint_is_estimated(self) -> None:
        sent = self.new_sent()
        reply = self.proxy.post("/v1/messages/count_tokens", message("a", model="gpt-5.3-codex"))
        self.assertEqual(reply.status, 200, reply.body)
        self.assertGreater(reply.json["input_tokens"], 0)
        self.assertNotIn(COUNT_TOKENS, [record.path for record in sent()])

    def test_embeddings_of_a_string_and_of_several(self) -> None:
        one, two = self.embed("a"), self.embed(["a", "b"])
        self.assertEqual([reply.json["object"] for reply in (one, two)], ["list", "list"])
        self.assertEqual(one.json["model"], "text-embedding-3-small")
        self.assertEqual([item["index"] for item in two.json["data"]], [0, 1])
        self.assertEqual(two.json["data"][0]["object"], "embedding")
        self.assertEqual(one.json["data"][0]["embedding"], two.json["data"][0]["embedding"])

    def test_base64_embeddings_are_little_endian_float32(self) -> None:
        floats = self.embed("a", encoding_format="float").json["data"][0]["embedding"]
        packed = self.embed("a", encoding_format="base64").json["data"][0]["embedding"]
        self.assertEqual(list(struct.unpack("<16f", base64.b64decode(packed))), floats)

    def test_more_than_512_inputs_are_split_and_merged_in_order(self) -> None:
        texts = ["text %d" % number for number in range(1100)]
        sent = self.new_sent()
        reply = self.embed(texts)
        self.assertEqual(reply.status, 200, reply.body[:200])
        self.assertEqual([item["index"] for item in reply.json["data"]], list(range(1100)))
        sizes = [len(record.json["input"]) for record in sent() if record.path == EMBEDDINGS]
        self.assertEqual(sizes, [512, 512, 76])
        single = self.embed(texts[1099]).json["data"][0]["embedding"]
        self.assertEqual(reply.json["data"][1099]["embedding"], single)
        self.assertEqual(reply.json["usage"]["prompt_tokens"],
                         sum(len(text) // 4 + 1 for text in texts))

    def test_dimensions_go_up(self) -> None:
        self.assertEqual(len(self.embed("a", dimensions=5).json["data"][0]["embedding"]), 5)

    def test_token_arrays_and_other_inputs_are_a_clear_400(self) -> None:
        sent = self.new_sent()
        for given in ([1, 2], [[1, 2]], [], None, 5, {"a": 1}, ["a", 1]):
            with self.subTest(str(given)):
                reply = self.embed(given)
                self.assertEqual(reply.status, 400, reply.body)
                self.assertEqual(reply.json["error"]["param"], "input")
        self.assertNotIn(EMBEDDINGS, [record.path for record in sent()])

    def test_an_error_of_a_later_batch_is_the_answer(self) -> None:
        self.fake.script(EMBEDDINGS, Answer(status=0), Answer(status=429, body="slow", headers={
            "retry-after": "9"}))
        reply = self.embed(["a"] * 600)
        self.assertEqual((reply.status, reply.headers["retry-after"]), (429, "9"))
        self.proxy.app.login.account.limits.clear()               # type: ignore[union-attr]

    def test_too_few_vectors_are_502(self) -> None:
        self.fake.script(EMBEDDINGS, Answer(body={"data": [{"embedding": [1.0], "index": 0}]}))
        self.assertEqual(self.embed(["a", "b"]).status, 502)


PROMPTS = {"model": "gpt-4.1", "prompt": ["One", "Two"]}


def used_up() -> Answer:
    return Answer(status=402, body={"error": {"message": "none left", "code": "quota_exceeded"}})


class SeveralCallsTest(ProxyCase):
    """A client's request is one request, also when it takes several calls upstream."""

    def test_the_fallback_answers_every_prompt_of_a_completion(self) -> None:
        with Proxy(self.fake, fallback="gpt-4o") as proxy:
            self.fake.script(CHAT, used_up())
            reply = proxy.post("/v1/completions", PROMPTS)
            self.assertEqual((reply.status, len(reply.json.get("choices", ()))), (200, 2))
            self.assertEqual(self.fake.count(CHAT), 3)

    def test_the_fallback_of_the_fallback_is_its_error(self) -> None:
        with Proxy(self.fake, fallback="gpt-4o") as proxy:
            self.fake.script(CHAT, used_up(), used_up())
            self.assertEqual(proxy.post("/v1/completions", PROMPTS).status, 402)
            self.assertEqual(self.fake.count(CHAT), 2)

    def test_the_fallback_compacts_and_nothing_wrong_is_learned(self) -> None:
        with Proxy(self.fake, fallback="gpt-4o") as proxy:
            self.fake.compacts = True
            self.fake.script(RESPONSES, used_up())
            for _ in range(2):                           # gpt-4o knows no compaction of its own
                reply = proxy.post("/v1/responses/compact", response("Hello"))
                self.assertEqual((reply.status, reply.json["output"][0]["type"]),
                                 (200, "compaction"))
            proxy.app.login.account.limits.clear()
            proxy.post("/v1/responses/compact", response("Hello"))
            self.assertEqual(self.fake.last(RESPONSES).json["input"][-1],
                             {"type": "compaction_trigger"})

    def test_limits_admit_it_once_when_its_second_call_only_repeats_the_first(self) -> None:
        path, body = "/v1/responses/compact", response("Hello")
        for limit in ({"rate_limit": 60.0}, {"requests_per_minute": 1}):
            with self.subTest(limit=limit), Proxy(self.fake, **limit) as proxy:
                self.assertEqual(proxy.post(path, body).status, 200)
                self.assertEqual(proxy.post(path, body).status, 429)

    @patient
    def test_limits_count_every_prompt_of_a_completion(self) -> None:
        for limit, calls in (({"requests_per_minute": 3}, 2),
                             ({"rate_limit": 0.2 * self.slower}, 2)):
            with self.subTest(limit=limit), Proxy(self.fake, **limit) as proxy:
                before = self.fake.count(CHAT)
                self.assertEqual(proxy.post("/v1/completions", PROMPTS).status, 200)
                self.assertEqual(proxy.post("/v1/completions", PROMPTS).status, 429)
                self.assertEqual(self.fake.count(CHAT) - before, calls)


class WholeForStreamTest(ProxyCase):
    """A stream was asked for, and a whole answer comes, slowly."""

    settings = {"keepalive_s": 0.02}

    def slow(self, end: bool = True) -> Answer:
        def parts() -> Iterator[bytes]:
            time.sleep(0.08)
            yield json.dumps({"id": "a", "object": "chat.completion", "created": 1,
                              "model": "gpt-4.1", "choices": [{
                                  "index": 0, "finish_reason": "stop",
                                  "message": {"role": "assistant", "content": "Hi"}}]}).encode()
        chunks: Any = parts()
        return Answer(chunks=chunks, headers={"content-type": "application/json"}, end=end)

    def post(self, path: str, body: Any) -> bytes:
        data = json.dumps(dict(body, stream=True)).encode()
        return raw_exchange(self.proxy.port, b"POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: "
                            b"close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                            % (path.encode(), len(data)) + data)

    def test_there_is_one_head(self) -> None:
        self.fake.script(CHAT, self.slow())
        answer = self.post("/v1/chat/completions", chat("Hello"))
        self.assertEqual(answer.count(b"HTTP/1.1 "), 1)
        self.assertEqual(json.loads(answer.partition(b"\r\n\r\n")[2])["id"], "a")

    def test_a_failure_after_the_first_byte_is_in_the_history(self) -> None:
        self.fake.script(CHAT, self.slow(end=False))
        self.post("/v1/messages", dict(chat("Hello"), max_tokens=100))
        row = wait_until(lambda: list(self.proxy.app.ledger.recent))[0]
        self.assertEqual((row["status"], row["error"]), (200, "upstream_stream_ended"))
        self.assertEqual(self.proxy.get("/stats").json["totals"]["errors"], 1)


if __name__ == "__main__":
    unittest.main()
