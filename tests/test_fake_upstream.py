"""Self-test of tests/fake_upstream.py: the fake must be strict before the proxy can lean on it."""
from __future__ import annotations

import http.client
import json
import os
import sys
import threading
import unittest
from typing import Any, Callable, Dict, List, Optional, Tuple

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from fake_upstream import (CHAT, COUNT_TOKENS, DEVICE_CODE, DEVICE_POLL, EMBEDDINGS,  # noqa: E402
                           EXCHANGE, GRANT_TYPE, MESSAGES, MODELS, RESPONSES, USAGE, Answer,
                           FakeUpstream)

Json = Dict[str, Any]
CODEX, CLAUDE, OPUS = "gpt-5.3-codex", "claude-sonnet-4.6", "claude-opus-4.7"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
CHAT_TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
RESPONSES_TOOL = {"type": "function", "name": "weather", "parameters": SCHEMA}
MESSAGES_TOOL = {"name": "weather", "input_schema": SCHEMA}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


def editor_headers() -> Dict[str, str]:
    """What every call must carry, beside the credential."""
    return {"editor-version": "vscode/1.130.0", "editor-plugin-version": "copilot-chat/0.58.0",
            "user-agent": "GitHubCopilotChat/0.58.0", "content-type": "application/json",
            "copilot-integration-id": "vscode-chat", "x-github-api-version": "2026-06-01",
            "x-request-id": "r-1", "openai-intent": "conversation-agent"}


def chat(text: Any = "hi", model: str = "gpt-4.1", **more: Any) -> Json:
    """A chat body."""
    return dict({"model": model, "messages": [{"role": "user", "content": text}]}, **more)


def responses(text: Any = "hi", model: str = CODEX, **more: Any) -> Json:
    """A responses body."""
    return dict({"model": model, "input": text, "store": False}, **more)


def messages(text: Any = "hi", model: str = CLAUDE, **more: Any) -> Json:
    """A messages body."""
    return dict({"model": model, "max_tokens": 2000,
                 "messages": [{"role": "user", "content": text}]}, **more)


def events(text: str) -> List[Any]:
    """The data of each event; [DONE] stays a string."""
    data = [line[5:].strip() for line in text.splitlines() if line.startswith("data:")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


class FakeCase(unittest.TestCase):
    """One fake, one kept-alive connection, one token."""

    def setUp(self) -> None:
        self.fake = FakeUpstream()
        self.fake.__enter__()
        self.addCleanup(self.fake.close)
        self.token = self.fake.mint_token()
        self.client = http.client.HTTPConnection(self.fake.url[7:], timeout=5)
        self.addCleanup(self.client.close)

    def tearDown(self) -> None:
        self.assertEqual(self.fake.crashes, [])

    def send(self, path: str, body: Optional[Json] = None,
             **headers: Optional[str]) -> http.client.HTTPResponse:
        """Send one legal request; headers by keyword (None takes one away), _ for -."""
        sent: Dict[str, Optional[str]] = dict(editor_headers())
        sent["authorization"] = "Bearer " + self.token
        if path.startswith("/v1/messages"):
            sent["anthropic-version"] = "2023-06-01"
        sent.update({name.replace("_", "-"): value for name, value in headers.items()})
        self.client.request("GET" if body is None else "POST", path,
                            None if body is None else json.dumps(body).encode(),
                            {name: value for name, value in sent.items() if value is not None})
        return self.client.getresponse()

    def ask(self, path: str, body: Optional[Json] = None,
            **headers: Optional[str]) -> Tuple[int, Any]:
        """(status, JSON or text)."""
        answer = self.send(path, body, **headers)
        text = answer.read().decode()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(text) if is_json else text

    def assert_refused(self, path: str, body: Optional[Json], text: str, status: int = 400,
                       **headers: Any) -> None:
        """The answer has this status and speaks of `text`."""
        got, answer = self.ask(path, body, **headers)
        self.assertEqual(got, status, answer)
        self.assertIn(text, json.dumps(answer, ensure_ascii=False).replace('\\"', '"'))

    def assert_good(self, path: str, body: Json, **headers: Optional[str]) -> Any:
        """The answer is 200; its JSON."""
        status, answer = self.ask(path, body, **headers)
        self.assertEqual(status, 200, answer)
        return answer

    def rest(self, path: str, token: str = "ghu_fake") -> Tuple[int, Any]:
        """A GitHub call."""
        return self.ask(path, authorization="token " + token, x_github_api_version="2025-04-01")


class GitHubTest(FakeCase):
    """Login, exchange, quota."""

    def poll(self, code: str) -> Json:
        """One poll of the device flow."""
        answer = self.ask(DEVICE_POLL, {"client_id": "Iv1", "device_code": code,
                                        "grant_type": GRANT_TYPE}, accept="application/json")[1]
        assert isinstance(answer, dict)
        return answer

    def test_device_flow(self) -> None:
        self.fake.device.token = "ghu_new"
        self.fake.device.outcomes.extend(["slow_down", "expired"])
        for errors in (["authorization_pending", "slow_down", "expired_token"], []):
            _, code = self.ask(DEVICE_CODE, {"client_id": "Iv1"}, accept="application/json")
            for error in errors:
                self.assertEqual(self.poll(code["device_code"])["error"], error)
        self.assertEqual(self.poll(code["device_code"])["access_token"], "ghu_new")
        self.assertEqual(self.rest("/user", "ghu_new")[1]["login"], "octocat")
        self.assertEqual(self.poll("nonsense")["error"], "incorrect_device_code")

    def test_device_flow_strict_interval(self) -> None:
        self.fake.device.strict_interval, self.fake.device.interval = True, 60
        _, code = self.ask(DEVICE_CODE, {"client_id": "Iv1"}, accept="application/json")
        answer = self.poll(code["device_code"])
        self.assertEqual((answer["error"], answer["interval"]), ("slow_down", 65))
        self.assertIn("device_code=", self.ask(DEVICE_CODE, {"client_id": "Iv1"})[1])

    def test_exchange_and_expiry(self) -> None:
        status, answer = self.rest(EXCHANGE)
        self.assertEqual((status, answer["endpoints"]["api"]), (200, self.fake.url))
        self.token = answer["token"]
        self.assertEqual(self.ask(MODELS)[0], 200)
        self.fake.clock_offset_s = 1801
        self.assertEqual(self.ask(MODELS)[0], 401)
        self.fake.clock_offset_s = 0
        self.fake.revoke_tokens()
        self.assertEqual(self.ask(MODELS)[0], 401)
        self.assertEqual((self.fake.exchanges, self.fake.model_fetches), (1, 1))

    def test_exchange_refusals(self) -> None:
        self.assertEqual(self.rest(EXCHANGE, "ghu_other")[1]["message"], "Bad credentials")
        self.assertEqual(self.rest(EXCHANGE, "ghp_x")[0], 403)
        for mode, status in (("no_subscription", 403), ("rate_limit", 403), ("not_found", 404),
                             ("unavailable", 503)):
            self.fake.exchange_mode = mode
            self.assertEqual(self.rest(EXCHANGE)[0], status)
        self.assertEqual(self.ask(EXCHANGE, authorization="token ghu_fake")[0], 400)  # API version

    def test_usage(self) -> None:
        quota = self.rest(USAGE)[1]["quota_snapshots"]["premium_interactions"]
        self.assertEqual((quota["remaining"], quota["percent_remaining"]), (226, 75.4))
        self.fake.plan = "free"
        self.assertEqual(self.rest(USAGE)[1]["limited_user_quotas"]["chat"], 42)

    def test_direct_mode(self) -> None:
        self.fake.direct = True
        self.assertEqual(self.rest(EXCHANGE)[0], 404)
        self.token = "ghu_fake"
        self.assertEqual(self.ask(MODELS, copilot_integration_id=None)[0], 200)

    def test_host_binding(self) -> None:
        with FakeUpstream(share=self.fake) as other:
            self.token = self.rest(EXCHANGE)[1]["token"]
            self.fake.move_to(other.url)
            self.assertEqual(self.ask(MODELS), (421, "Misdirected Request"))
            answer = self.rest(EXCHANGE)[1]
            self.token = answer["token"]
            self.assertEqual(answer["endpoints"]["api"], other.url)
            self.assertEqual(self.ask(MODELS)[0], 421)
            self.client = http.client.HTTPConnection(other.url[7:], timeout=5)
            self.assertEqual(self.ask(MODELS)[0], 200)
            self.client.close()

    def test_misdirected_until(self) -> None:
        self.fake.misdirect_until_exchanges = 2
        for status in (421, 200):
            self.token = self.rest(EXCHANGE)[1]["token"]
            self.assertEqual(self.ask(MODELS)[0], status)


class HeaderTest(FakeCase):
    """What the Copilot API wants to see, and what not."""

    def test_headers(self) -> None:
        self.assert_refused(CHAT, chat(), "missing Editor-Version", editor_version=None)
        changes: List[Dict[str, Any]] = [{name: None} for name in (
            "copilot_integration_id", "editor_plugin_version", "x_github_api_version",
            "x_request_id", "openai_intent")]
        changes += [{name: "1"} for name in ("x_api_key", "cookie", "x_stainless_lang")]
        for change in changes:
            self.assert_refused(CHAT, chat(), list(change)[0].replace("_", "-"), **change)
        self.assert_refused(CHAT, chat(), "X-Initiator", x_initiator="robot")
        self.assert_refused(CHAT, chat(), "vision".title(), copilot_vision_request="true")
        self.assert_refused(CHAT, chat([IMAGE]), "Vision")
        self.assert_refused(MESSAGES, messages(), "header is required", anthropic_version=None)
        self.assert_refused(MESSAGES, messages(), "beta", anthropic_beta="claude-code-20250219")
        self.assert_refused(CHAT, chat(), "invalid token", 401, authorization="Bearer x")
        self.fake.refused_versions.add("2026-06-01")
        self.assert_refused(CHAT, chat(), "no longer supported", 466)
        self.assertEqual(self.ask(CHAT, chat(), x_github_api_version="2026-08-01")[0], 200)

    def test_vision_nested(self) -> None:
        block = {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                             "data": "AA=="}}
        history = [{"role": "user", "content": "x"},
                   {"role": "assistant", "content": [
                       {"type": "tool_use", "id": "t", "name": "n", "input": {}}]},
                   {"role": "user", "content": [
                       {"type": "tool_result", "tool_use_id": "t", "content": [block]}]}]
        self.assert_refused(MESSAGES, messages(messages=history), "Vision")
        self.assert_good(MESSAGES, messages(messages=history), copilot_vision_request="true")

    def test_models(self) -> None:
        ids = [entry["id"] for entry in self.ask(MODELS)[1]["data"]]
        self.assertEqual(ids.count("gpt-4.1"), 2)
        self.fake.billing_notice = True
        self.assert_refused(MODELS, None, "usage-based", 403)
        self.token = "ghu_fake"
        self.assertEqual(
            self.ask(MODELS, copilot_integration_id="copilot-developer-cli")[0], 200)
        self.token = self.fake.mint_token()
        self.assert_refused(CHAT, chat(model=CODEX), "not accessible via the /chat/completions")
        self.assert_refused(CHAT, chat(model="gpt-9"), "model_not_supported")
        self.assert_refused(CHAT, chat(model="gpt-5.2"), "model_not_supported")
        self.assert_refused(MESSAGES, messages(model="gpt-4.1"), "unsupported_api_for_model")
        self.assert_refused(CHAT, chat(model="text-embedding-3-small"), "unsupported_api")


class ChatTest(FakeCase):
    """POST /chat/completions."""

    def test_refusals(self) -> None:
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        orphan = {"role": "tool", "tool_call_id": "x", "content": "1"}
        schema = {"type": "function", "function": {"name": "f", "parameters": {"$schema": "x"}}}
        url = dict(IMAGE, image_url={"url": "https://example.com/a.png"})
        cases: List[Tuple[Json, str]] = [
            (chat(store=False), "store"), (chat(service_tier="auto"), "service_tier"),
            (chat(tools=[]), "tools"), (chat(messages=5), "messages"), (chat(tools=[5]), "parse"),
            (chat(model="gpt-5-mini", max_tokens=5), "Use 'max_completion_tokens'"),
            (chat(model=CLAUDE, max_completion_tokens=5), "max_completion_tokens"),
            (chat(messages=[{"role": "developer", "content": "x"}]), "developer"),
            (chat(messages=[orphan]), "preceding"), (chat("", CLAUDE), "non-empty"),
            (chat(model=CLAUDE, tools=[schema]), "$schema"),
            (chat(model="gpt-5-mini", reasoning_effort="minimal"), "invalid_reasoning_effort")]
        for body, text in cases:
            self.assert_refused(CHAT, body, text)
        self.assert_refused(CHAT, chat([url]), "external", copilot_vision_request="true")
        turns = [{"role": "assistant", "tool_calls": [call]}, dict(orphan, tool_call_id="c")]
        answer = self.assert_good(CHAT, chat(messages=turns))
        self.assertEqual(answer["choices"][0]["message"]["content"], "Echo:  (tool result: 1)")
        self.fake.lenient.add("store")
        self.assert_good(CHAT, chat(store=False))

    def test_claude_split(self) -> None:
        body = chat("use a tool in parallel", CLAUDE, tools=[CHAT_TOOL])
        answer = self.assert_good(CHAT, body)
        self.assertEqual(len(answer["choices"]), 3)
        self.assertNotIn("object", answer)
        self.assertNotIn("index", answer["choices"][1])
        stream = events(self.send(CHAT, dict(body, stream=True)).read().decode())
        choices = [choice for item in stream[:-1] for choice in item["choices"]]
        indexes = [call["index"] for choice in choices if choice["index"] == 1
                   for call in choice["delta"].get("tool_calls", [])]
        self.assertEqual(sorted(set(indexes)), [1, 2])
        self.assertIn("reasoning_opaque", json.dumps(stream))

    def test_gpt_stream(self) -> None:
        body = chat("h\u00e9llo", stream=True, stream_options={"include_usage": True})
        answer = self.send(CHAT, body)
        stream = events(answer.read().decode())
        self.assertEqual((stream[0]["choices"], stream[0]["id"]), ([], ""))
        text = "".join(choice["delta"].get("content") or "" for item in stream[:-1]
                       for choice in item["choices"])
        self.assertEqual(text, "Echo: h\u00e9llo")
        self.assertEqual((stream[-1], stream[-2]["choices"]), ("[DONE]", []))
        self.assertIn("prompt_tokens", stream[-2]["usage"])
        self.assertEqual(answer.headers["x-request-id"], "r-1")
        self.assertIn("rem=75.5", answer.headers["x-quota-snapshot-premium_interactions"])


class ResponsesTest(FakeCase):
    """POST /responses."""

    def test_refusals(self) -> None:
        user = {"role": "user", "content": "x"}
        cases: List[Tuple[Json, str]] = [
            (responses(store=True), "unsupported_value"), (responses(prompt={}), "prompt"),
            (responses(previous_response_id="r"), "previous_response_not_found"),
            (responses([dict(user, id="m" * 65)]), "maximum length 64"),
            (responses([{"type": "reasoning", "id": "rs_1", "encrypted_content": "x"}]),
             "did not match the target item id"),
            (responses([{"type": "reasoning", "encrypted_content": "x"}]), "decrypted or parsed"),
            (responses([{"type": "function_call_output", "call_id": "c", "output": "1"}]),
             "No tool call found"),
            (responses([{"type": "function_call", "call_id": "c" * 65}]), "call_id"),
            (responses([dict(user, internal_chat_message_metadata_passthrough={})]), "internal"),
            (responses(tools=[{"type": "image_generation"}]), "image_generation"),
            (responses(max_output_tokens=15), ">= 16"), (responses(5), "input"),
            (responses([{"detail": "original"}]), "original")]
        for body, text in cases:
            self.assert_refused(RESPONSES, body, text)
        self.assert_refused(RESPONSES, responses([{"type": "item_reference", "id": "x"}]),
                            "not_found", 404)
        self.assert_refused(RESPONSES, responses([dict(user, id="m")]), "this connection", 401)

    def test_stream_quirks(self) -> None:
        custom = {"type": "custom", "name": "patch"}
        for tool, kind in ((RESPONSES_TOOL, "function_call"), (custom, "custom_tool_call")):
            body = responses("tool", tools=[tool], stream=True)
            stream = events(self.send(RESPONSES, body).read().decode())
            done, final = stream[-2], stream[-1]
            self.assertEqual((done, final["type"]), ("[DONE]", "response.completed"))
            self.assertEqual(final["response"]["output"], [])
            self.assertNotIn("total_tokens", final["response"]["usage"])
            self.assertNotEqual(stream[0]["response"]["id"], stream[1]["response"]["id"])
            ids = [item.get("item_id") or item["item"]["id"] for item in stream[:-2]
                   if item.get("output_index") == 1]
            self.assertEqual((len(ids), min(map(len, ids))), (len(set(ids)), 400))
            kinds = [item["item"]["type"] for item in stream[:-2] if "item" in item]
            self.assertEqual(kinds, ["reasoning", "reasoning", kind, kind])

    def test_replay(self) -> None:
        first = self.assert_good(RESPONSES, responses("tool", tools=[RESPONSES_TOOL]))
        items = [{name: value for name, value in item.items() if name != "id"}
                 for item in first["output"]]
        items.append({"type": "function_call_output", "call_id": items[-1]["call_id"],
                      "output": "sunny"})
        body = responses([{"role": "user", "content": "tool"}] + items)
        answer = self.assert_good(RESPONSES, body)
        self.assertEqual(answer["output"][-1]["content"][0]["text"],
                         "Echo: tool (tool result: sunny)")
        self.fake.rotate_key()
        self.assert_refused(RESPONSES, body, "invalid_encrypted_content")


class MessagesTest(FakeCase):
    """POST /v1/messages."""

    def test_refusals(self) -> None:
        mark, scoped = {"type": "ephemeral"}, {"type": "ephemeral", "scope": "global"}
        text = {"type": "text", "text": "x"}
        url = {"type": "document", "source": {"type": "url", "url": "https://example.com"}}
        budget = {"type": "enabled", "budget_tokens": 1024}
        cases: List[Tuple[Json, str]] = [
            (messages(context_management={}), "context_management: Extra inputs"),
            (messages(cache_control=mark), "cache_control: Extra inputs"),
            (messages(system=[text, dict(text, cache_control=scoped)]),
             "system.1.cache_control.ephemeral.scope: Extra inputs are not permitted"),
            (messages([dict(text, cache_control=mark)] * 5), "Found 5"),
            (messages(tools=[dict(MESSAGES_TOOL, strict=True)]), "tools.0.custom.strict: Extra"),
            (messages(tools=[{"type": "web_search_20250305", "name": "w"}]), "web_search"),
            (messages(system=5), "system"), (messages([dict(text, text="")]), "non-empty"),
            (messages([url]), "base64"), (messages(messages=[{"role": "system", "content": "x"}]),
                                          "messages.0.role"),
            (messages(max_tokens=None), "Field required"), (messages(max_tokens=20000), "stream"),
            (messages(thinking=budget, temperature=0.5), "temperature"),
            (messages(model=OPUS, thinking=budget), '"thinking.type.enabled" is not supported'),
            (messages(output_config={"effort": "max"}), "invalid_reasoning_effort"),
            (messages([{"type": "thinking", "thinking": "x", "signature": "y"}]),
             "Invalid signature in thinking block"),
            (messages([{"type": "tool_result", "tool_use_id": "t"}]), "unexpected `tool_use_id`")]
        for body, expected in cases:
            self.assert_refused(MESSAGES, body, expected)

    def test_thinking_round_trip(self) -> None:
        body = messages("tool", tools=[MESSAGES_TOOL], thinking={"type": "adaptive"})
        content = self.assert_good(MESSAGES, body)["content"]
        self.assertEqual([block["type"] for block in content], ["thinking", "text", "tool_use"])
        result = {"type": "tool_result", "tool_use_id": content[2]["id"], "content": "sunny"}
        reminder = {"type": "text", "text": "<system-reminder>x</system-reminder>"}
        history = body["messages"] + [{"role": "assistant", "content": content},
                                      {"role": "user", "content": [result, reminder]}]
        answer = self.assert_good(MESSAGES, dict(body, messages=history))
        self.assertEqual(answer["content"][1]["text"], "Echo: tool (tool result: sunny)")
        stream = events(self.send(MESSAGES, dict(body, stream=True)).read().decode())
        deltas = [item["delta"]["type"] for item in stream
                  if item["type"] == "content_block_delta"]
        self.assertEqual(sorted(set(deltas)), [
            "input_json_delta", "signature_delta", "text_delta", "thinking_delta"])
        self.assertEqual([item["type"] for item in stream[-2:]], ["message_delta", "message_stop"])
        self.assertEqual(stream[1]["type"], "ping")

    def test_count_tokens(self) -> None:
        body = messages("x" * 400)
        self.assert_refused(COUNT_TOKENS, body, "max_tokens: Extra inputs")
        del body["max_tokens"]
        self.assertGreater(self.assert_good(COUNT_TOKENS, body)["input_tokens"], 100)
        self.fake.count_tokens_fails = True
        self.assertEqual(self.ask(COUNT_TOKENS, body)[0], 500)

    def test_embeddings(self) -> None:
        body: Json = {"model": "text-embedding-3-small", "input": "x"}
        self.assertEqual(self.ask(EMBEDDINGS, body), (400, "Bad Request"))
        self.assertEqual(self.ask(EMBEDDINGS, dict(body, input=[[1, 2]]))[0], 400)
        self.assertEqual(self.ask(EMBEDDINGS, dict(body, input=["x"] * 513))[0], 400)
        answer = self.assert_good(EMBEDDINGS, dict(body, input=["a", "b"], dimensions=4))
        self.assertEqual([len(item["embedding"]) for item in answer["data"]], [4, 4])
        self.assertNotIn("object", answer)


class IncidentTest(FakeCase):
    """Markers, scripts, hang-ups."""

    def stream(self, marks: str, path: str = CHAT,
               make: Callable[..., Json] = chat) -> http.client.HTTPResponse:
        """Start a stream with markers."""
        return self.send(path, make("@@%s@@" % marks, stream=True))

    def test_cut_error_end(self) -> None:
        for marks in ("events=9 cut=3", "events=9 cut=0 rst=1"):
            with self.assertRaises((http.client.IncompleteRead, ConnectionError)):
                self.stream(marks).read()
            self.client.close()
        for path, make, text in ((CHAT, chat, '"error"'), (RESPONSES, responses, "event: error"),
                                 (MESSAGES, messages, "overloaded_error")):
            body = self.stream("events=9 error=3", path, make).read().decode()
            self.assertIn(text, body)
            self.assertIn("2 ..........", body)
            self.assertNotIn("3 ..........", body)
        self.assertNotIn("[DONE]", self.stream("noend=1").read().decode())
        self.assert_refused(CHAT, chat("@@sleep=1@@"), "unknown marker")

    def test_wire_shapes(self) -> None:
        whole = events(self.stream("events=3").read().decode())
        for marks in ("split=1", "bytewise=1", "crlf=1", "odd=1", "delay_ms=1"):
            text = self.stream("events=3 " + marks).read().decode()
            self.assertEqual(len(events(text)), len(whole))
            self.assertEqual("\r\n" in text, marks == "crlf=1")
        self.assertEqual(self.fake.connections, 1)

    def test_client_gone(self) -> None:
        for number, marks in enumerate(("stall=2", "think_ms=60000", "delay_ms=60000")):
            sender = threading.Thread(target=self.ignore_reset, args=("events=5 " + marks,))
            sender.start()
            self.assertTrue(self.fake.wait_for(lambda: self.fake.open_streams == 1))
            self.assertEqual(self.fake.aborted, number)
            if marks == "stall=2":
                self.assertTrue(self.fake.wait_for(lambda: self.fake.holding == 1))
            self.client.sock.shutdown(2)
            self.assertTrue(self.fake.wait_for(lambda: self.fake.aborted == number + 1, 1))
            self.assertTrue(self.fake.wait_for(lambda: self.fake.open_streams == 0))
            sender.join()
            self.client.close()

    def ignore_reset(self, marks: str) -> None:
        """Read a stream that the test breaks off."""
        try:
            self.stream(marks).read()
        except (OSError, http.client.HTTPException):
            pass

    def test_stall_release(self) -> None:
        answer = self.stream("events=4 stall=2")
        self.assertTrue(self.fake.wait_for(lambda: self.fake.holding == 1))
        self.fake.release()
        self.assertEqual(events(answer.read().decode())[-1], "[DONE]")

    def test_scripts(self) -> None:
        busy = Answer(status=429, headers={"retry-after": "7"}, body={"error": "x"})
        self.fake.script(CHAT, busy, Answer.redirect("/elsewhere"),
                         Answer(chunks=[b"data: 1\n\n", b"x"]))
        limited = self.send(CHAT, chat())
        self.assertEqual((limited.status, limited.headers["retry-after"]), (429, "7"))
        limited.read()
        self.assertEqual(self.ask(CHAT, chat())[0], 302)
        self.assertEqual(self.ask(CHAT, chat())[1], "data: 1\n\nx")
        for answer in (Answer(drop="before"), Answer(drop="after", reset=True),
                       Answer(body="abc", short_by=5), Answer(chunks=[b"x"], end=False)):
            self.fake.script(CHAT, answer)
            with self.assertRaises((http.client.HTTPException, ConnectionError)):
                self.ask(CHAT, chat())
            self.client.close()
        self.assertEqual(self.fake.last(CHAT).json["model"], "gpt-4.1")
        self.assertEqual((self.fake.count(CHAT), self.fake.connections), (7, 4))

    def test_stale_and_hold(self) -> None:
        self.fake.script(CHAT, Answer(body="x", stale=True), Answer(status=0, hold=True))
        answer = self.send(CHAT, chat())
        self.assertEqual((answer.read(), answer.headers.get("connection")), (b"x", None))
        self.assertEqual(self.client.sock.recv(1), b"")  # closed without notice
        self.client.close()
        got: List[int] = []
        thread = threading.Thread(target=lambda: got.append(self.ask(CHAT, chat())[0]))
        thread.start()
        self.assertTrue(self.fake.wait_for(lambda: self.fake.holding == 1))
        self.fake.release()
        thread.join()
        self.assertEqual(got, [200])

    def test_close_ends_everything(self) -> None:
        answer = self.stream("events=4 stall=2")
        self.assertTrue(self.fake.wait_for(lambda: self.fake.holding == 1))
        self.fake.close()
        with self.assertRaises((http.client.IncompleteRead, ConnectionError)):
            answer.read()


if __name__ == "__main__":
    unittest.main()
