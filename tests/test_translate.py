"""Any client, any model, through the real server: routing, streams and bodies of every cell, cut
streams, the response store, legacy completions, counts and losses."""
from __future__ import annotations

import json
import unittest
from typing import Any

from support import Proxy, ProxyCase, chat, combinations, message, response, wait_until
import copilot_proxy as cp
from fake_upstream import CHAT, MESSAGES, RESPONSES, Answer, FakeUpstream, default_models
from wire import NAMES, STOPS, Writer, assert_failed, read_body, whole_of

PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
#: a model of every family: what it lists, and what else each client's request goes to
MODELS = ("gpt-4.1", "gpt-5-mini", "gpt-5.3-codex", "gpt-5.4", "gemini-3.1-pro-preview",
          "claude-sonnet-4.6", "claude-haiku-4.5", "claude-opus-4.7")
MAKERS = {"chat": chat, "responses": response, "messages": message}


def only_messages() -> dict[str, Any]:
    """A Claude that /v1/messages alone serves."""
    entry = next(e for e in default_models() if e["id"] == "claude-sonnet-4.6")
    return dict(entry, id="claude-only-4.6", supported_endpoints=[MESSAGES])


class TranslateCase(ProxyCase):
    """Sends a body of any dialect and reads the answer strictly."""

    def setUp(self) -> None:
        super().setUp()
        self.fake.models.append(only_messages())

    def ask(self, client: str, body: dict[str, Any], model: str) -> dict[str, Any]:
        body = dict(body, model=model)
        if client == "chat" and body.get("stream"):
            body["stream_options"] = {"include_usage": True}
        reply = self.proxy.post(PATHS[client], body)
        self.assertEqual(reply.status, 200, reply.body)
        if not body.get("stream"):
            answer = reply.json
        else:
            answer = whole_of(client, reply.body.replace(
                ('"model":"%s"' % model).encode(), b'"model":"asked"'))
        return read_body(client, answer)


class CellTest(TranslateCase):
    def test_text_tools_and_results_of_every_cell(self) -> None:
        for client, model, stream in combinations(
                NAMES, (*MODELS, "claude-only-4.6"), (False, True)):
            with self.subTest(client=client, model=model, stream=stream):
                self.check_tools(client, model, stream)

    def check_tools(self, client: str, model: str, stream: bool) -> None:
        start = Writer(client, stream).system("Be kind.").tool()
        if client == "messages":                   # on OpenAI's diagonals an effort goes as it is
            start.think()
        first = self.ask(client, start.user("use the tool, parallel").body, model)
        self.assertEqual([call[1] for call in first["calls"]], ["get_weather"] * 2)
        self.assertEqual(first["stop"], STOPS[client]["tool"])
        start.replay(first).results(*[(call[0], "r%d" % at)
                                      for at, call in enumerate(first["calls"])])
        second = self.ask(client, start.body, model)
        self.assertIn("r1", second["text"])
        self.assertEqual(second["stop"], STOPS[client]["stop"])
        self.assertGreater(min(second["usage"]), 0)

    def test_the_route_is_chosen_by_what_the_model_lists(self) -> None:
        for client, model, path, route in (
                ("chat", "gpt-5.3-codex", RESPONSES, "translated"),
                ("chat", "claude-only-4.6", MESSAGES, "translated"),
                ("responses", "gpt-4.1", CHAT, "translated"),
                ("responses", "claude-only-4.6", MESSAGES, "translated"),
                ("messages", "gpt-5-mini", RESPONSES, "translated"),
                ("messages", "gpt-4.1", CHAT, "translated"),
                ("chat", "gpt-5-mini", CHAT, "passthrough"),
                ("messages", "claude-sonnet-4.6", MESSAGES, "passthrough")):
            with self.subTest(client=client, model=model):
                before = self.fake.count(path)
                self.ask(client, Writer(client, False).user("a").body, model)
                self.assertEqual(self.fake.count(path), before + 1)
                line = "model=%s route=%s status=200" % (model, route)
                wait_until(lambda text=line: text in self.proxy.log_text())

    def test_the_models_move(self) -> None:
        """Twelve turns with two tool calls each, over models of all families and back, in each
        dialect: every request is taken at its first try, every call goes with its result."""
        moves = ("claude-sonnet-4.6", "gpt-5.3-codex", "gpt-4.1", "gemini-3.1-pro-preview",
                 "claude-only-4.6", "claude-haiku-4.5") * 2
        for client in NAMES:
            writer, results = Writer(client, True).system("Be kind.").tool(), []
            if client != "chat":                   # whose efforts go to the upstream as they are
                writer.think()
            before = self.asked()
            for at, model in enumerate(moves):
                with self.subTest(client=client, turn=at, model=model):
                    writer.body["stream"] = at % 4 != 3
                    writer.user("use the tool, parallel, %d" % at)
                    answer = self.ask(client, writer.body, model)
                    pairs = [(call[0], "<result %d of turn %d>" % (place, at))
                             for place, call in enumerate(answer["calls"])]
                    self.assertEqual(len(pairs), 2)
                    writer.replay(answer).results(*pairs)
                    answer = self.ask(client, writer.body, model)
                    results += [text for _, text in pairs]
                    self.assertIn(results[-1], answer["text"])
                    writer.replay(answer)
                    self.check_history(self.fake.last().json, results)
            self.assertEqual(self.asked() - before, 2 * len(moves), "some were sent again")

    def asked(self) -> int:
        return sum(self.fake.count(path) for path in (CHAT, RESPONSES, MESSAGES))

    def check_history(self, sent: dict[str, Any], results: list[str]) -> None:
        """Each result is there once and in order, behind a call of the same id."""
        self.assertNotIn(cp.OPAQUE_TAG, json.dumps(sent))
        open_calls, found = [], []
        for item in sent.get("messages") or sent["input"]:
            blocks = [item] + (item["content"] if isinstance(item.get("content"), list) else [])
            for block in blocks + (item.get("tool_calls") or []):
                if "function" in block or block.get("type") in ("tool_use", "function_call"):
                    open_calls.append(block.get("call_id") or block["id"])
                call = (block.get("tool_call_id") or block.get("tool_use_id")
                        or block.get("type") == "function_call_output" and block["call_id"])
                if call:
                    open_calls.remove(call)
                    found.append(json.dumps(block.get("output", block.get("content"))))
        self.assertEqual(open_calls, [])
        self.assertEqual(len(found), len(results))
        for text, wanted in zip(found, results):
            self.assertIn(wanted, text)

    def test_initiator_vision_and_version_headers(self) -> None:
        writer = Writer("messages", False).tool().user("see").calls("c1")
        writer.results(("c1", "x"), image=True)
        self.ask("messages", writer.body, "gpt-5.3-codex")
        headers = self.fake.last(RESPONSES).headers
        self.assertEqual((headers["x-initiator"], headers["copilot-vision-request"]),
                         ("agent", "true"))
        self.assertNotIn("anthropic-version", headers)
        self.ask("chat", Writer("chat", False).user("a").body, "claude-only-4.6")
        headers = self.fake.last(MESSAGES).headers
        self.assertEqual((headers["x-initiator"], headers["anthropic-version"]),
                         ("user", "2023-06-01"))

    def test_a_long_whole_answer_is_streamed_upstream_and_folded(self) -> None:
        for client, model in (("messages", "claude-sonnet-4.6"), ("chat", "claude-sonnet-4.6"),
                              ("responses", "claude-only-4.6")):
            with self.subTest(client=client, model=model):
                key = {"responses": "max_output_tokens"}.get(client, "max_tokens")
                body = dict(Writer(client, False).user("hi").body, **{key: 30000})
                self.assertEqual(self.ask(client, body, model)["text"], "Echo: hi")
                sent = self.fake.last().json
                self.assertEqual((sent["stream"], sent["max_tokens"]), (True, 30000))


class FailureTest(TranslateCase):
    def test_cut_streams_and_errors_are_told_in_the_clients_dialect(self) -> None:
        for client in NAMES:
            for model in ("gpt-4.1", "gpt-5.3-codex", "claude-only-4.6"):
                for marker in ("events=9 cut=4", "events=9 error=3", "events=9 error=1"):
                    if (client, model) == ("responses", "gpt-5.3-codex"):
                        continue                   # the upstream's own error event passes
                    with self.subTest(client=client, model=model, marker=marker):
                        reply = self.proxy.stream(PATHS[client], dict(
                            Writer(client, True).user("x @@%s@@" % marker).body, model=model))
                        self.assertEqual(reply.status, 200)
                        assert_failed(client, reply.body)

    def test_errors_before_the_answer_keep_status_and_words(self) -> None:
        for client, model, path in (("chat", "gpt-5.3-codex", RESPONSES),
                                    ("responses", "gpt-4.1", CHAT), ("messages", "gpt-4.1", CHAT)):
            for stream in (False, True):
                self.fake.script(path, Answer(429, {"retry-after": "7"},
                                              b'{"error":{"message":"slow down"}}'))
                reply = self.proxy.post(PATHS[client], MAKERS[client](
                    "a", model=model, stream=stream))
                self.assertEqual((reply.status, reply.headers["retry-after"]), (429, "7"))
                self.assertIn("slow down", reply.json["error"]["message"])
                self.proxy.app.login.account.limits.clear()       # type: ignore[union-attr]
                self.assertEqual(reply.json.get("type"), "error" if client == "messages" else None)

    def test_the_catalogue_is_wrong(self) -> None:
        """The endpoint is switched once, the request replayed, the lesson remembered."""
        entry = next(e for e in self.fake.models if e["id"] == "gpt-5.3-codex")
        stale = dict(entry, supported_endpoints=[CHAT])
        for client in NAMES:
            with FakeUpstream() as fake:
                fake.models = [stale]
                with Proxy(fake) as proxy:
                    proxy.get("/v1/models")
                    fake.models = [entry]
                    for wanted in (1, 1):
                        reply = proxy.post(PATHS[client], MAKERS[client]("a", model=entry["id"]))
                        self.assertEqual(reply.status, 200, reply.body)
                        self.assertEqual(fake.count(CHAT), wanted)
                    self.assertEqual(fake.count(RESPONSES), 2)

    def test_what_would_change_the_meaning_is_refused_by_name(self) -> None:
        audio = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
        body = {"model": "gpt-5.3-codex", "messages": [{"role": "user", "content": [audio]}]}
        reply = self.proxy.post(PATHS["chat"], body)
        self.assertEqual((reply.status, reply.json["error"]["param"]), (400, "messages"))
        self.assertIn("input_audio", reply.json["error"]["message"])
        self.assertEqual(self.fake.count(RESPONSES), 0)


class LossTest(TranslateCase):
    def test_losses_are_in_the_header_the_log_and_the_stats(self) -> None:
        body = message("a", model="gpt-5.3-codex", top_k=4, container="x")
        for _ in range(2):
            reply = self.proxy.post("/v1/messages", body)
            self.assertEqual(reply.headers["x-copilot-proxy-lossy"], "container, top_k")
        self.assertIn("top_k", self.proxy.log_text())
        wait_until(lambda: self.proxy.get("/stats").json["requests"].get("translated")
                   == {"200": 2})                # counted with the log line, behind the answer
        stats = self.proxy.get("/stats").json
        self.assertEqual(stats["losses"], {"container": 2, "top_k": 2})
        self.assertGreaterEqual(stats["uptime_s"], 0)
        self.assertNotIn("x-copilot-proxy-lossy",
                         self.proxy.post("/v1/chat/completions", chat("a")).headers)

    def test_foreign_reasoning_does_not_reach_the_diagonal(self) -> None:
        for client, first, second in (("chat", "claude-only-4.6", "claude-sonnet-4.6"),
                                      ("responses", "claude-sonnet-4.6", "gpt-5.3-codex"),
                                      ("messages", "gpt-5.3-codex", "claude-sonnet-4.6")):
            writer = Writer(client, False).think().user("think")
            answer = self.ask(client, writer.body, first)
            self.assertTrue(answer["state"].startswith(cp.OPAQUE_TAG))
            writer.body.pop("reasoning_effort", None)
            with self.subTest(client=client):
                self.ask(client, writer.replay(answer).user("on").body, second)
                sent = json.dumps(self.fake.last().json)
                self.assertNotIn(cp.OPAQUE_TAG, sent)
                self.assertNotIn(answer["state"], sent)


class CountTest(TranslateCase):
    def test_every_model_is_counted(self) -> None:
        body = message("word " * 400)
        for model in ("gpt-4.1", "gpt-5.3-codex"):
            reply = self.proxy.post("/v1/messages/count_tokens", dict(body, model=model))
            self.assertEqual(reply.status, 200)
            self.assertTrue(400 <= reply.json["input_tokens"] < 600, reply.json)
        for _ in range(2):
            self.fake.script("/v1/messages/count_tokens", Answer(500))
        claude = self.proxy.post("/v1/messages/count_tokens", body).json["input_tokens"]
        self.assertGreaterEqual(claude, 500)

    def test_input_tokens(self) -> None:
        for model in ("gpt-5.3-codex", "claude-sonnet-4.6"):
            reply = self.proxy.post("/v1/responses/input_tokens", response("word " * 400, model))
            self.assertEqual((reply.status, reply.json["object"]), (200, "response.input_tokens"))
            self.assertGreaterEqual(reply.json["input_tokens"], 400)


class CompletionsTest(TranslateCase):
    def post(self, **more: Any) -> Any:
        return self.proxy.post("/v1/completions", dict({"model": "gpt-4.1", "prompt": "a"}, **more))

    def test_one_and_several_prompts(self) -> None:
        for model in ("gpt-4.1", "gpt-5.3-codex", "claude-only-4.6"):
            reply = self.post(model=model)
            self.assertEqual((reply.status, reply.json["object"]), (200, "text_completion"))
            choice, = reply.json["choices"]
            self.assertEqual((choice["text"], choice["finish_reason"], choice["index"]),
                             ("Echo: a", "stop", 0))
            reply = self.post(model=model, prompt=["a", "b"], echo=True)
            self.assertEqual([c["text"] for c in reply.json["choices"]], ["aEcho: a", "bEcho: b"])
            self.assertEqual([c["index"] for c in reply.json["choices"]], [0, 1])
            self.assertGreater(reply.json["usage"]["total_tokens"], 0)

    def test_streams(self) -> None:
        for model in ("gpt-4.1", "gpt-5.3-codex", "claude-only-4.6"):
            for prompt, echo in (("a", True), (["a"], False), (["a", "b"], False)):
                reply = self.post(model=model, prompt=prompt, echo=echo, stream=True)
                frames = [raw[6:] for raw in reply.body.decode().split("\n\n") if raw]
                self.assertEqual(frames[-1], "[DONE]")
                chunks = [json.loads(frame) for frame in frames[:-1]]
                self.assertEqual({c["object"] for c in chunks}, {"text_completion"})
                text = "".join(c["text"] for chunk in chunks for c in chunk["choices"])
                wanted = "aEcho: a" if echo else "Echo: aEcho: b" if len(prompt) > 1 else "Echo: a"
                self.assertEqual(text, wanted)
                self.assertEqual(chunks[-1]["choices"][-1]["finish_reason"], "stop")

    def test_a_cut_stream_and_refusals(self) -> None:
        reply = self.post(prompt="x @@events=9 cut=3@@", stream=True)
        self.assertNotIn(b"[DONE]", reply.body)
        self.assertIn(b'"error"', reply.body)
        for key, value in (("suffix", "x"), ("prompt", [1, 2]), ("prompt", []), ("prompt", None),
                           ("best_of", 3)):
            reply = self.post(**{key: value})
            self.assertEqual((reply.status, reply.json["error"]["param"]), (400, key))


class StoreTest(TranslateCase):
    def talk(self, **more: Any) -> Any:
        body = dict({"model": "gpt-5.3-codex", "input": "first"}, **more)
        reply = self.proxy.post("/v1/responses", body)
        self.assertEqual(reply.status, 200, reply.body)
        if not body.get("stream"):
            return reply.json
        return json.loads(reply.body.decode().strip().rpartition("data: ")[2])["response"]

    def test_previous_response_and_item_reference(self) -> None:
        for model in ("gpt-5.3-codex", "gpt-4.1", "claude-only-4.6"):
            for stream in (False, True):
                with self.subTest(model=model, stream=stream):
                    one = self.talk(model=model, stream=stream)
                    two = self.talk(model=model, stream=stream, input="second",
                                    previous_response_id=one["id"])
                    self.talk(model=model, input=[{"role": "user", "content": "third"}],
                              previous_response_id=two["id"])
                    sent = json.dumps(self.fake.last().json)
                    for word in ("first", "Echo: first", "second", "Echo: second", "third"):
                        self.assertIn(word, sent)
                    self.assertNotIn("previous_response_id", sent)
                    self.talk(model=model, input=[
                        {"type": "item_reference", "id": one["output"][-1]["id"]},
                        {"role": "user", "content": "more"}])
                    self.assertIn("Echo: first", json.dumps(self.fake.last().json))

    def test_get_delete_and_input_items(self) -> None:
        one = self.talk(input=[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
        path = "/v1/responses/" + one["id"]
        self.assertEqual(self.proxy.get(path).json, one)
        for order, wanted in (("", ["b", "a"]), ("?order=asc", ["a", "b"])):
            items = self.proxy.get(path + "/input_items" + order).json
            self.assertEqual([item["content"] for item in items["data"]], wanted)
            self.assertEqual(items["first_id"], items["data"][0]["id"])
        self.assertEqual(self.proxy.request("DELETE", path).json["deleted"], True)
        for method, tail in (("GET", ""), ("DELETE", ""), ("GET", "/input_items")):
            reply = self.proxy.request(method, path + tail)
            self.assertEqual(reply.status, 404)
            self.assertIn("not found", reply.json["error"]["message"])

    def test_what_is_gone_gets_openais_own_words(self) -> None:
        reply = self.proxy.post("/v1/responses", response("a", previous_response_id="resp_none"))
        self.assertEqual((reply.status, reply.json["error"]["code"], reply.json["error"]["param"]),
                         (400, "previous_response_not_found", "previous_response_id"))
        reply = self.proxy.post("/v1/responses", response("", input=[
            {"type": "item_reference", "id": "msg_none"}]))
        self.assertEqual(reply.status, 404)
        self.assertEqual(self.fake.count(RESPONSES), 0)

    def test_store_false_is_not_kept(self) -> None:
        for stream in (False, True):
            one = self.talk(store=False, stream=stream)
            self.assertEqual(self.proxy.get("/v1/responses/" + one["id"]).status, 404)

    def test_the_store_is_bounded_and_of_one_owner(self) -> None:
        store = cp.ResponseStore()
        for at in range(cp.STORE_COUNT + 5):
            store.put("me", b'{"input":"x"}', "r%d" % at, b'{"id":"r","output":[]}')
        self.assertIsNone(store.find("me", "r4"))
        self.assertIsNotNone(store.find("me", "r5"))
        self.assertIsNone(store.find("you", "r5"))
        big = b'{"input":"%s"}' % (b"x" * (cp.STORE_BYTES // 2))
        for name in "abc":
            store.put("me", big, name, b"{}")
        self.assertIsNone(store.find("me", "a"))
        self.assertIsNotNone(store.find("me", "c"))
        self.assertLessEqual(store._size, cp.STORE_BYTES)
        store.put("me", b"{}", "huge", b"x" * (cp.STORE_BYTES + 1))
        self.assertEqual((store._size, len(store._responses)), (0, 0))


if __name__ == "__main__":
    unittest.main()
