"""The grid: 3 client dialects x 3 upstream dialects, the diagonal through the hub as well.

Requests go through the strict checks of tests/fake_upstream.py; its answers, and upstream streams
written out here, come back through the hub and are read by small readers that do not use it.
"""
from __future__ import annotations

import json
import random
import unittest

from support import cp
import fake_upstream as fu
from copilot_proxy import (DIALECTS, BadRequest, Frame, Model, Request, TranslatedStream,
                           UpstreamError, read_answer, translate_request)
from test_laws import check_order

try:
    import anthropic
    import openai
except ImportError:
    anthropic = openai = None

NAMES = ("chat", "responses", "messages")
CELLS = [(client, upstream) for client in NAMES for upstream in NAMES if client != upstream]
MODELS = {"chat": ("gpt-4.1", "gpt-5-mini", "claude-haiku-4.5", "gemini-3.1-pro-preview"),
          "responses": ("gpt-5.4",), "messages": ("claude-sonnet-4.6", "claude-haiku-4.5",
                                                  "claude-opus-4.7")}
PATHS = {"chat": fu.CHAT, "responses": fu.RESPONSES, "messages": fu.MESSAGES}
PIXEL = "iVBORw0KGgo="
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


# ---- Requests, in each client's own words ----

class Writer:
    """Builds a body of one dialect."""

    def __init__(self, dialect: str, stream: bool) -> None:
        self.dialect, self.items = dialect, []
        self.body = {"model": "asked", "stream": stream}
        self.body["input" if dialect == "responses" else "messages"] = self.items
        if dialect == "messages":
            self.body["max_tokens"] = 4000

    def system(self, text: str) -> Writer:
        if self.dialect == "messages":
            self.body["system"] = [{"type": "text", "text": text,
                                    "cache_control": {"type": "ephemeral"}}]
        else:
            self.items.append({"role": "developer", "content": text})
        return self

    def user(self, text: str, *parts: dict) -> Writer:
        kind = "input_text" if self.dialect == "responses" else "text"
        self.items.append({"role": "user", "content": [{"type": kind, "text": text}, *parts]})
        return self

    def image(self) -> dict:
        url = "data:image/png;base64," + PIXEL
        return {"chat": {"type": "image_url", "image_url": {"url": url}},
                "responses": {"type": "input_image", "image_url": url},
                "messages": {"type": "image", "source": {
                    "type": "base64", "media_type": "image/png", "data": PIXEL}}}[self.dialect]

    def document(self) -> dict:
        data = "data:application/pdf;base64,cGRm"
        return {"chat": {"type": "file", "file": {"file_data": data, "filename": "a.pdf"}},
                "responses": {"type": "input_file", "file_data": data, "filename": "a.pdf"},
                "messages": {"type": "document", "title": "a.pdf", "source": {
                    "type": "base64", "media_type": "application/pdf", "data": "cGRm"}}
                }[self.dialect]

    def tool(self, name: str = "get_weather") -> Writer:
        about = {"name": name, "description": "The weather."}
        tool = {"chat": {"type": "function", "function": dict(about, parameters=SCHEMA)},
                "responses": dict(about, type="function", parameters=SCHEMA, strict=False),
                "messages": dict(about, input_schema=SCHEMA)}[self.dialect]
        self.body.setdefault("tools", []).append(tool)
        return self

    def calls(self, *ids: str, text: str = "") -> Writer:
        arguments = '{"city":"Paris"}'
        if self.dialect == "chat":
            self.items.append({"role": "assistant", "content": text or None, "tool_calls": [
                {"id": i, "type": "function", "function": {
                    "name": "get_weather", "arguments": arguments}} for i in ids]})
        elif self.dialect == "responses":
            if text:
                self.items.append({"type": "message", "role": "assistant", "content": [
                    {"type": "output_text", "text": text, "annotations": []}]})
            self.items.extend({"type": "function_call", "call_id": i, "name": "get_weather",
                               "arguments": arguments} for i in ids)
        else:
            blocks = [{"type": "text", "text": text}] if text else []
            self.items.append({"role": "assistant", "content": blocks + [
                {"type": "tool_use", "id": i, "name": "get_weather",
                 "input": {"city": "Paris"}} for i in ids]})
        return self

    def results(self, *pairs: tuple, error: bool = False, image: bool = False) -> Writer:
        if self.dialect == "messages":
            blocks = [dict({"type": "tool_result", "tool_use_id": i, "content": [
                {"type": "text", "text": t}, *([self.image()] if image else [])]},
                **({"is_error": True} if error else {})) for i, t in pairs]
            self.items.append({"role": "user", "content": blocks})
        elif self.dialect == "responses":
            for i, t in pairs:
                output = [{"type": "input_text", "text": t}, self.image()] if image else t
                self.items.append({"type": "function_call_output", "call_id": i, "output": output})
        else:
            self.items.extend({"role": "tool", "tool_call_id": i, "content": t} for i, t in pairs)
        return self

    def schema(self) -> Writer:
        named = {"name": "place", "schema": SCHEMA, "strict": True}
        more = {"chat": {"response_format": {"type": "json_schema", "json_schema": named}},
                "responses": {"text": {"format": dict(named, type="json_schema")}},
                "messages": {"output_config": {"format": {
                    "type": "json_schema", "schema": SCHEMA}}}}[self.dialect]
        self.body.update(more)
        return self

    def think(self) -> Writer:
        more = {"chat": {"reasoning_effort": "xhigh"},
                "responses": {"reasoning": {"effort": "xhigh", "summary": "auto"}},
                "messages": {"thinking": {"type": "enabled", "budget_tokens": 3000}}}
        self.body.update(more[self.dialect])
        return self

    def replay(self, answer: dict) -> Writer:
        """The answer as this client's SDK sends it back."""
        if self.dialect == "responses":
            self.items.extend(answer["raw"]["output"])
        elif self.dialect == "chat":
            self.items.append(answer["raw"]["choices"][0]["message"])
        else:
            self.items.append({"role": "assistant", "content": answer["raw"]["content"]})
        return self


def translate(client: str, upstream: str, body: dict, model: Model) -> tuple:
    edit, request = translate_request(DIALECTS[client], DIALECTS[upstream], body, model)
    return edit.body, request


# ---- Answers, read without the hub ----

def read_body(dialect: str, body: dict) -> dict:
    found = {"text": "", "reasoning": "", "state": None, "calls": [], "refusal": "", "raw": body}
    if dialect == "chat":
        choice, = body["choices"]
        message = choice["message"]
        found.update(text=message.get("content") or "", reasoning=message.get(
            "reasoning_content") or "", state=message.get("reasoning_opaque"),
            refusal=message.get("refusal") or "", stop=choice["finish_reason"])
        found["calls"] = [(c["id"], c["function"]["name"], c["function"]["arguments"])
                          for c in message.get("tool_calls") or []]
        usage = body["usage"]
        found["usage"] = (usage["prompt_tokens"], usage["completion_tokens"])
    elif dialect == "responses":
        for item in body["output"]:
            if item["type"] == "message":
                for part in item["content"]:
                    found["text"] += part.get("text", "")
                    found["refusal"] += part.get("refusal", "")
            elif item["type"] == "reasoning":
                found["reasoning"] += "".join(s["text"] for s in item["summary"])
                found["state"] = item.get("encrypted_content") or found["state"]
            else:
                found["calls"].append((item["call_id"], item["name"],
                                       item.get("arguments", item.get("input"))))
        found["stop"] = (body.get("incomplete_details") or {}).get("reason") or body["status"]
        usage = body["usage"]
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        found["usage"] = (usage["input_tokens"], usage["output_tokens"])
    else:
        for block in body["content"]:
            if block["type"] == "text":
                found["text"] += block["text"]
            elif block["type"] == "thinking":
                found["reasoning"] += block["thinking"]
                found["state"] = block["signature"]
            elif block["type"] == "tool_use":
                found["calls"].append((block["id"], block["name"], json.dumps(
                    block["input"], separators=(",", ":"), ensure_ascii=False)))
        found["stop"] = body["stop_reason"]
        usage = body["usage"]
        found["usage"] = (usage["input_tokens"] + usage["cache_read_input_tokens"]
                          + usage["cache_creation_input_tokens"], usage["output_tokens"])
    return found


def events_of(data: bytes) -> list:
    frames = [Frame.parse(raw) for raw in data.split(b"\n\n") if raw]
    return [json.loads(f.data) if f.data != b"[DONE]" else "[DONE]" for f in frames if f.data]


def whole_of(dialect: str, data: bytes) -> dict:
    """Assemble a stream as a strict client does; raises AssertionError for a wrong order."""
    return {"chat": whole_chat, "responses": whole_responses,
            "messages": whole_messages}[dialect](events_of(data))


def whole_chat(events: list) -> dict:
    assert events[-1] == "[DONE]", events[-1]
    message, calls, reason, usage = {"role": "assistant"}, {}, None, None
    for event in events[:-1]:
        assert event["object"] == "chat.completion.chunk" and event["id"] == events[0]["id"]
        assert event["model"] == "asked"
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            assert reason is None, "a chunk behind the finish reason"
            for key, value in choice["delta"].items():
                if key == "tool_calls":
                    for call in value:
                        known = calls.setdefault(call["index"], {
                            "id": "", "function": {"name": "", "arguments": ""}})
                        known["id"] = call.get("id") or known["id"]
                        for k, v in call["function"].items():
                            known["function"][k] += v
                elif key != "role":
                    message[key] = (message.get(key) or "") + (value or "")
            reason = choice["finish_reason"]
    assert reason
    if calls:
        assert sorted(calls) == list(range(len(calls)))
        message["tool_calls"] = [calls[at] for at in sorted(calls)]
    return {"choices": [{"message": message, "finish_reason": reason}], "usage": usage}


def whole_messages(events: list) -> dict:
    assert events[0]["type"] == "message_start" and events[-1]["type"] == "message_stop"
    message, opened, signed = events[0]["message"], None, 0
    for event in events[1:-1]:
        kind = event["type"]
        if kind == "ping":
            continue
        if kind == "content_block_start":
            assert opened is None and event["index"] == len(message["content"])
            opened, text, signed = event["content_block"], "", 0
            message["content"].append(opened)
        elif kind == "content_block_delta":
            delta = event["delta"]
            assert event["index"] == len(message["content"]) - 1 and opened is not None
            assert not signed, "a delta behind the signature"
            if delta["type"] == "signature_delta":
                opened["signature"], signed = delta["signature"], 1
            elif delta["type"] == "input_json_delta":
                text += delta["partial_json"]
            else:
                opened[delta["type"][:-6]] += delta[delta["type"][:-6]]
        elif kind == "content_block_stop":
            if opened["type"] == "tool_use":
                opened["input"] = json.loads(text or "{}")
            assert opened["type"] != "thinking" or signed, "a thinking block without signature"
            opened = None
        else:
            assert kind == "message_delta" and opened is None
            message.update({k: v for k, v in event["delta"].items()})
            message["usage"].update(event["usage"])
    assert message["stop_reason"]
    return message


def whole_responses(events: list) -> dict:
    assert [e["type"] for e in events[:2]] == ["response.created", "response.in_progress"]
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    items, texts = {}, {}
    for event in events[2:-1]:
        kind, at = event["type"], event["output_index"]
        if kind == "response.output_item.added":
            assert at == len(items)
            items[at] = event["item"]
            texts[at] = ""
        elif kind == "response.output_item.done":
            assert event["item"]["id"] == items[at]["id"]
            assert len(event["item"]["id"]) <= 64
            items[at] = event["item"]
            final = json.dumps(event["item"], ensure_ascii=False)
            assert json.dumps(texts[at], ensure_ascii=False)[1:-1] in final or not texts[at]
        else:
            assert event["item_id"] == items[at]["id"]
            if kind.endswith(".delta"):
                texts[at] += event["delta"]
            elif kind.endswith(("_text.done", "arguments.done", "input.done", "refusal.done")):
                value = next(event[k] for k in ("text", "arguments", "input", "refusal")
                             if k in event)
                assert value == texts[at], (value, texts[at])
    final = events[-1]["response"]
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    assert final["output"] == [items[at] for at in sorted(items)]
    assert final["id"] == events[0]["response"]["id"]
    return final


# ---- The upstream ----

class Upstream:
    """fake_upstream's checks, answers and streams, without its sockets."""

    def __init__(self) -> None:
        self.fake = fu.FakeUpstream()
        self.entries = {entry["id"]: entry for entry in reversed(self.fake.models)}

    def model(self, name: str) -> Model:
        return Model.from_entry(self.entries[name])

    def said(self, dialect: str, body: dict, name: str) -> tuple:
        """Check the body as the live service would -> (its dialect, what it says)."""
        path = PATHS[dialect]
        record = fu.Recorded("POST", path, "", {"anthropic-version": "2023-06-01"},
                             json.dumps(body).encode(), body, 1)
        ask = fu.Ask(self.fake, record, body, self.entries[name])
        speaker = fu.DIALECTS[path]
        fu.run_checks(speaker.checks, ask)
        return speaker, fu.answer(ask, fu.read_prompt(speaker, body), speaker.reasons(ask))

    def close(self) -> None:
        self.fake._server.server_close()
        for pair in self.fake._wakers:
            for end in pair:
                end.close()


class MatrixCase(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.upstream = Upstream()
        cls.addClassCleanup(cls.upstream.close)

    def send(self, client: str, upstream: str, body: dict, name: str) -> dict:
        """Translate, check, answer, translate back, read."""
        stream = body["stream"]
        self.wanted = json.loads(json.dumps(body))
        sent, request = translate(client, upstream, body, self.upstream.model(name))
        self.sent, self.request = sent, request
        try:
            speaker, said = self.upstream.said(upstream, sent, name)
        except fu.Refuse as refusal:
            self.fail("the upstream refused: %s\nclient %s\nsent %s" % (
                refusal.body, json.dumps(self.wanted), json.dumps(sent)))
        if not stream:
            return read_body(client, self.whole(client, upstream, json.dumps(
                speaker.body(said)).encode(), request))
        request.wants_usage = True
        pipeline = TranslatedStream(DIALECTS[client], DIALECTS[upstream], request)
        data = b"".join(frame.data for frame in speaker.frames(said))
        out = pipeline.feed(data) + pipeline.close()
        self.assertTrue(pipeline.ended)
        self.assertIsNone(pipeline.failure)
        self.assertIn("output", pipeline.meter.counts)
        return read_body(client, whole_of(client, out))

    def whole(self, client: str, upstream: str, data: bytes, request: Request) -> dict:
        """The answer to a request without a stream, as the client gets it."""
        answer = read_answer(DIALECTS[upstream], data, False, request)
        self.assertIsNotNone(answer.usage)
        return json.loads(cp.dumps(DIALECTS[client].encode_response(answer, request)))

    def cells(self):
        for client, upstream in CELLS:
            for name in MODELS[upstream]:
                for stream in (False, True):
                    with self.subTest(client=client, upstream=upstream, model=name, stream=stream):
                        yield client, upstream, name, Writer(client, stream)


STOPS = {"chat": {"stop": "stop", "tool": "tool_calls", "length": "length"},
         "responses": {"stop": "completed", "tool": "completed", "length": "max_output_tokens"},
         "messages": {"stop": "end_turn", "tool": "tool_use", "length": "max_tokens"}}


class Grid(MatrixCase):
    def test_text(self) -> None:
        for client, upstream, name, writer in self.cells():
            text = "h\u00e9llo \"you\"\n\\ \U0001f600"
            answer = self.send(client, upstream, writer.system("Be kind.").user(text).body, name)
            self.assertEqual(answer["text"], "Echo: " + text)
            self.assertEqual(answer["stop"], STOPS[client]["stop"])
            self.assertGreater(answer["usage"][0], 3)
            self.assertEqual(self.request.losses, [])

    def test_tools(self) -> None:
        for client, upstream, name, writer in self.cells():
            body = writer.tool().user("use the tool").body
            answer = self.send(client, upstream, body, name)
            (_, tool, arguments), = answer["calls"]
            self.assertEqual((tool, json.loads(arguments)), ("get_weather", {"city": "Paris"}))
            self.assertEqual(answer["stop"], STOPS[client]["tool"])

    def test_parallel_tools_and_replay(self) -> None:
        for client, upstream, name, writer in self.cells():
            body = writer.tool().user("use the tool, parallel").body
            answer = self.send(client, upstream, body, name)
            self.assertEqual(len(answer["calls"]), 2)
            self.assertEqual(len({call[0] for call in answer["calls"]}), 2)
            again = Writer(client, body["stream"]).tool().user("use the tool, parallel")
            again.replay(answer).results(*[(c[0], "r%d" % at) for at, c in
                                           enumerate(answer["calls"])])
            final = self.send(client, upstream, again.body, name)
            self.assertIn("r1", final["text"])

    def test_tool_results(self) -> None:
        for client, upstream, name, writer in self.cells():
            writer.tool().user("weather?").calls("c1", "c2", text="Looking.")
            writer.results(("c1", "sunny"), ("c2", "rain"), error=True)
            answer = self.send(client, upstream, writer.body, name)
            self.assertIn("rain", answer["text"])
            if client == "messages" and upstream != client:
                self.assertIn(("is_error", "told in the text"), self.request.losses)
                self.assertIn("Error: rain", answer["text"])

    def test_tool_result_image(self) -> None:
        for client, upstream, name, writer in self.cells():
            writer.tool().user("look").calls("c1").results(("c1", "seen"), image=True)
            self.send(client, upstream, writer.body, name)
            if client != "chat":
                self.assertIn(PIXEL, json.dumps(self.sent))
                self.assertTrue(DIALECTS[upstream].has_images(self.sent))

    def test_image_and_document(self) -> None:
        for client, upstream, name, writer in self.cells():
            writer.user("what is it", writer.image(), writer.document())
            self.send(client, upstream, writer.body, name)
            self.assertIn(PIXEL, json.dumps(self.sent))
            self.assertIn("cGRm", json.dumps(self.sent))

    def test_reasoning_and_replay(self) -> None:
        for client, upstream, name, writer in self.cells():
            answer = self.send(client, upstream, writer.think().user("think").body, name)
            if name == "gpt-4.1":
                self.assertIn("effort", dict(self.request.losses))
                continue
            if name != "claude-opus-4.7" or client != "messages":
                self.assertEqual(answer["reasoning"], "The user wants an echo.")
            self.assertTrue(answer["state"])
            self.assertEqual(answer["state"].startswith("cpx1."), client != upstream)
            again = Writer(client, writer.body["stream"]).think().user("think").replay(answer)
            self.send(client, upstream, again.user("and now?").body, name)
            if answer["reasoning"]:
                self.assertIn("The user wants an echo.", json.dumps(self.sent))
            self.assertNotIn("cpx1.", json.dumps(self.sent))
            self.assertEqual(self.request.losses, [])

    def test_foreign_reasoning_never_goes_upstream(self) -> None:
        for client in NAMES:
            for first, second in CELLS:
                if first == second:
                    continue
                start = Writer(client, False).think().user("think")
                name = {"chat": "gpt-5-mini"}.get(first, MODELS[first][0])
                answer = self.send(client, first, start.body, name)
                again = Writer(client, False).think().user("think").replay(answer).user("more")
                with self.subTest(client=client, first=first, second=second):
                    name = {"chat": "gpt-5-mini"}.get(second, MODELS[second][0])
                    self.send(client, second, again.body, name)
                    self.assertIn(("reasoning", "minted by another dialect"), self.request.losses)
                    self.assertNotIn(answer["state"][:40], json.dumps(self.sent))

    def test_schema(self) -> None:
        for client, upstream, name, writer in self.cells():
            answer = self.send(client, upstream, writer.schema().user("Paris").body, name)
            self.assertIn('"city"', json.dumps(self.sent))
            self.assertFalse(self.request.output_tool)
            self.assertTrue(answer["text"].startswith("Echo"))

    def test_schema_by_forced_tool(self) -> None:
        entries = self.upstream.entries
        for client, upstream, name, writer in self.cells():
            supports = entries[name]["capabilities"]["supports"]
            supports["structured_outputs"] = False
            try:
                answer = self.send(client, upstream, writer.schema().user("Paris").body, name)
            finally:
                supports["structured_outputs"] = True
            self.assertEqual(self.request.output_tool, cp.OUTPUT_TOOL)
            self.assertEqual(json.loads(answer["text"]),
                             {"city": "Paris"})
            self.assertEqual(answer["calls"], [])
            self.assertEqual(answer["stop"], STOPS[client]["stop"])

    def test_length(self) -> None:
        for client, upstream, name, writer in self.cells():
            answer = self.send(client, upstream, writer.user("hi @@length=1@@").body, name)
            self.assertEqual(answer["stop"], STOPS[client]["length"])

    def test_error_in_stream(self) -> None:
        for client, upstream in CELLS:
            for marker in ("error=0", "error=2", "error=0 fail=1", "error=3 fail=1"):
                with self.subTest(client=client, upstream=upstream, marker=marker):
                    body = Writer(client, True).user("hi @@events=5 %s@@" % marker).body
                    name = MODELS[upstream][0]
                    sent, request = translate(client, upstream, body,
                                              self.upstream.model(name))
                    speaker, said = self.upstream.said(upstream, sent, name)
                    frames = list(speaker.frames(said))
                    keep = said.markers.error
                    texts = [at for at, frame in enumerate(frames) if frame.text]
                    frames = frames[:texts[keep]] + [speaker.error(said)]
                    out, pipe = run(client, upstream, b"".join(f.data for f in frames), request)
                    self.assertTrue(pipe.failure)
                    assert_failed(client, out)

    def test_error_body(self) -> None:
        bodies = {"chat": {"error": {"message": "no"}}, "messages": {
            "type": "error", "error": {"type": "api_error", "message": "no"}},
            "responses": {"id": "r", "status": "failed", "output": [],
                          "error": {"code": "server_error", "message": "no"}}}
        for client, upstream in CELLS:
            with self.assertRaises(UpstreamError) as caught:
                read_answer(DIALECTS[upstream], cp.dumps(bodies[upstream]), False, Request(""))
            self.assertEqual(str(caught.exception), "no")

    def test_models_move(self) -> None:
        """A conversation goes on over models of all dialects, in each client's dialect."""
        for client in NAMES:
            writer = Writer(client, False).tool()
            for at, name in enumerate(("claude-sonnet-4.6", "gpt-5.4", "gemini-3.1-pro-preview",
                                       "claude-haiku-4.5", "gpt-5.3-codex", "gpt-4.1") * 2):
                upstream = "messages" if "claude" in name else (
                    "responses" if name in ("gpt-5.4", "gpt-5.3-codex") else "chat")
                writer.user("use the tool %d" % at).think()
                body = json.loads(json.dumps(writer.body))
                with self.subTest(client=client, turn=at, model=name):
                    answer = self.send(client, upstream, body, name)
                    writer.replay(answer).results((answer["calls"][0][0], "result%d" % at))
                    body = json.loads(json.dumps(writer.body))
                    answer = self.send(client, upstream, body, name)
                    self.assertIn("result%d" % at, answer["text"])
                    for earlier in range(at):
                        self.assertIn("result%d" % earlier, json.dumps(self.sent))
                    writer.replay(answer)


# ---- Upstream streams, written out ----

def sse(*events: object, named: bool = False) -> bytes:
    out = []
    for event in events:
        data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False,
                                                               separators=(",", ":"))
        head = "event: %s\n" % event["type"] if named and not isinstance(event, str) else ""
        out.append("%sdata: %s\n\n" % (head, data))
    return "".join(out).encode()


def chunk(delta: dict, reason: object = None, index: int = 0, **more: object) -> dict:
    return dict({"id": "c1", "object": "chat.completion.chunk", "created": 5, "model": "m",
                 "choices": [{"index": index, "delta": delta, "finish_reason": reason}]}, **more)


def call(index: int, arguments: str, call_id: str = "", name: str = "") -> dict:
    function = {"arguments": arguments}
    if name:
        function["name"] = name
    entry = {"index": index, "function": function}
    if call_id:
        entry.update(id=call_id, type="function")
    return {"tool_calls": [entry]}


CHAT_PARALLEL = sse(
    chunk({"role": "assistant", "content": ""}), chunk({"content": "I look."}),
    chunk(call(1, "", "a", "one")), chunk(call(2, "", "b", "two")), chunk(call(1, '{"x"')),
    chunk(call(2, '{"y":')), chunk(call(1, ":1}")), chunk(call(2, "2}")),
    chunk(call(3, "", "c", "three")), chunk({"content": None}, "tool_calls"),
    chunk({}, usage={"prompt_tokens": 10, "completion_tokens": 4,
                     "prompt_tokens_details": {"cached_tokens": 6}}), "[DONE]")
MESSAGES_PARALLEL = sse(
    {"type": "message_start", "message": {"id": "msg_1", "model": "m", "content": [], "usage": {
        "input_tokens": 4, "cache_read_input_tokens": 6, "output_tokens": 1}}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "I look."}},
    {"type": "content_block_stop", "index": 0}, {"type": "ping"},
    *[event for at, (i, n, parts) in enumerate((
        ("a", "one", ('{"x"', ":1}")), ("b", "two", ('{"y":', "2}")), ("c", "three", ())))
      for event in (
          {"type": "content_block_start", "index": at + 1, "content_block": {
              "type": "tool_use", "id": i, "name": n, "input": {}}},
          *[{"type": "content_block_delta", "index": at + 1, "delta": {
              "type": "input_json_delta", "partial_json": p}} for p in parts],
          {"type": "content_block_stop", "index": at + 1})],
    {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None},
     "usage": {"output_tokens": 4}}, {"type": "message_stop"}, named=True)


def responses_event(kind: str, at: int, **more: object) -> dict:
    return dict({"type": "response." + kind, "output_index": at, "item_id": "x" * 400}, **more)


RESPONSES_PARALLEL = sse(
    {"type": "response.created", "response": {"id": "resp_1", "model": "m", "created_at": 5}},
    responses_event("output_item.added", 0, item={"type": "message", "role": "assistant",
                                                  "content": []}),
    responses_event("content_part.added", 0, content_index=0, part={"type": "output_text"}),
    responses_event("output_text.delta", 0, content_index=0, delta="I look."),
    responses_event("output_text.done", 0, content_index=0, text="I look."),
    responses_event("content_part.done", 0, content_index=0, part={}),
    responses_event("output_item.done", 0, item={"type": "message", "content": [
        {"type": "output_text", "text": "I look."}]}),
    *[responses_event("output_item.added", at, item={
        "type": "function_call", "call_id": i, "name": n, "arguments": ""})
      for at, i, n in ((1, "a", "one"), (2, "b", "two"), (3, "c", "three"))],
    responses_event("function_call_arguments.delta", 1, delta="%%cipher%%", obfuscation="q"),
    responses_event("function_call_arguments.delta", 2, delta='{"y":'),
    responses_event("function_call_arguments.done", 1, arguments='{"x":1}'),
    responses_event("function_call_arguments.delta", 2, delta="2}"),
    *[responses_event("output_item.done", at, item={
        "type": "function_call", "call_id": i, "name": n, "arguments": a})
      for at, i, n, a in ((2, "b", "two", '{"y":2}'), (1, "a", "one", '{"x":1}'),
                          (3, "c", "three", ""))],
    "[DONE]", {"type": "response.completed", "response": {
        "id": "other", "output": [], "usage": {
            "input_tokens": 10, "input_tokens_details": {"cached_tokens": 6},
            "output_tokens": 4}}}, named=True)
PARALLEL = {"chat": CHAT_PARALLEL, "messages": MESSAGES_PARALLEL, "responses": RESPONSES_PARALLEL}
REFUSALS = {
    "chat": sse(chunk({"role": "assistant"}), chunk({"refusal": "I "}), chunk({"refusal": "won't"}),
                chunk({}, "stop"), "[DONE]"),
    "responses": sse(
        {"type": "response.created", "response": {"id": "r"}},
        responses_event("refusal.delta", 0, content_index=0, delta="I "),
        responses_event("refusal.delta", 0, content_index=0, delta="won't"),
        responses_event("refusal.done", 0, content_index=0, refusal="I won't"),
        {"type": "response.completed", "response": {"id": "r"}}),
    "messages": sse(
        {"type": "message_start", "message": {"id": "m", "usage": {}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {
            "type": "text_delta", "text": "I won't"}}, {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "refusal"}, "usage": {}},
        {"type": "message_stop"})}


def run(client: str, upstream: str, data: bytes, request: object = None, sizes: object = None,
        ) -> tuple:
    """(client bytes, pipeline) of a whole upstream stream, cut as `sizes` says."""
    request = request or Request("asked")
    request.model, request.now, request.wants_usage = "asked", 1790000000, True
    pipe = TranslatedStream(DIALECTS[client], DIALECTS[upstream], request)
    out, at = [], 0
    while at < len(data):
        size = next(sizes) if sizes else len(data)
        out.append(pipe.feed(data[at:at + size]))
        at += size
    out.append(pipe.close())
    return b"".join(out), pipe


def assert_failed(client: str, out: bytes) -> None:
    last = events_of(out)[-1]
    polite = {"chat": b"[DONE]", "messages": b"message_stop", "responses": b"response.completed"}
    assert polite[client] not in out, out
    assert last.get("error") or last.get("response", {}).get("error"), last
    assert client != "messages" or last["type"] == "error"
    assert client != "responses" or last["type"] == "response.failed"


class Streams(unittest.TestCase):
    def test_parallel(self) -> None:
        for client, upstream in CELLS:
            with self.subTest(client=client, upstream=upstream):
                answer = read_body(client, whole_of(client, run(
                    client, upstream, PARALLEL[upstream])[0]))
                self.assertEqual(answer["text"], "I look.")
                self.assertEqual(answer["calls"], [("a", "one", '{"x":1}'), ("b", "two", '{"y":2}'),
                                                   ("c", "three", "{}")])
                self.assertEqual(answer["usage"], (10, 4))
                self.assertEqual(answer["stop"], STOPS[client]["tool"])

    def test_order_of_events(self) -> None:
        for upstream in NAMES:
            for data in (PARALLEL[upstream], REFUSALS[upstream]):
                decoder = DIALECTS[upstream].stream_decoder()
                events = [e for raw in data.split(b"\n\n") if raw
                          for e in decoder.read(Frame.parse(raw).data)]
                self.assertEqual(len(list(check_order(events))), len(events))
                self.assertTrue(decoder.ended)
                self.assertEqual(decoder.close(), [])

    def test_refusal(self) -> None:
        words = {"chat": ("stop", "content_filter"), "responses": ("completed", "content_filter"),
                 "messages": ("refusal",)}
        for client, upstream in CELLS:
            with self.subTest(client=client, upstream=upstream):
                answer = read_body(client, whole_of(client, run(
                    client, upstream, REFUSALS[upstream])[0])
                    if client != "chat" else dict(whole_of(client, run(
                        client, upstream, REFUSALS[upstream])[0]), usage={
                            "prompt_tokens": 0, "completion_tokens": 0}))
                self.assertEqual(answer["refusal"] or answer["text"], "I won't")
                self.assertIn(answer["stop"], words[client])

    def test_stop_reasons(self) -> None:
        for word, expected in (("stop_sequence", ("stop", "completed", "stop_sequence")),
                               ("pause_turn", ("stop", "completed", "pause_turn")),
                               ("max_tokens", ("length", "max_output_tokens", "max_tokens")),
                               ("refusal", ("content_filter", "content_filter", "refusal"))):
            data = sse({"type": "message_start", "message": {"id": "m", "usage": {
                "input_tokens": 1}}}, {"type": "message_delta", "delta": {
                    "stop_reason": word, "stop_sequence": "END"}, "usage": {"output_tokens": 1}},
                {"type": "message_stop"})
            for client, stop in zip(NAMES, expected):
                answer = whole_of(client, run(client, "messages", data)[0])
                self.assertEqual(read_body(client, answer)["stop"], stop)
                if client == "messages":
                    self.assertEqual(answer["stop_sequence"], "END")

    def test_truncated_everywhere(self) -> None:
        """Cut behind any frame, cleanly or not: never a polite end."""
        for client, upstream in CELLS:
            frames = [raw + b"\n\n" for raw in PARALLEL[upstream].split(b"\n\n") if raw]
            last = len(frames) - (2 if upstream == "chat" else 1)
            if upstream == "chat":
                last -= 1                      # behind the finish reason a clean end is an end
            for cut in range(last):
                with self.subTest(client=client, upstream=upstream, cut=cut):
                    out, pipe = run(client, upstream, b"".join(frames[:cut]))
                    assert_failed(client, out)
                    self.assertTrue(pipe.failure and pipe.ended)
                    half = frames[cut][:len(frames[cut]) // 2]
                    if b'"finish_reason":"' not in half:
                        assert_failed(client, run(
                            client, upstream, b"".join(frames[:cut]) + half)[0])

    def test_broken_transport(self) -> None:
        for client, upstream in CELLS:
            for at in (0, len(PARALLEL[upstream]) // 2):
                pipe = TranslatedStream(DIALECTS[client], DIALECTS[upstream], Request("asked"))
                out = pipe.feed(PARALLEL[upstream][:at])
                out += pipe.close(UpstreamError("the line broke", 504, "gone"))
                assert_failed(client, out)
                self.assertIn(b"the line broke", out)
                self.assertEqual((pipe.failure, pipe.feed(b"data: {}\n\n"), pipe.close()),
                                 ("the line broke", b"", b""))

    def test_cut_anywhere(self) -> None:
        rng = random.Random(4)
        for client, upstream in CELLS:
            data = PARALLEL[upstream] + b": trailing\n\n"
            whole = run(client, upstream, data)[0]
            self.assertEqual(run(client, upstream, data, sizes=iter(lambda: 1, 0))[0], whole)
            for _ in range(20):
                sizes = iter(lambda: rng.randint(1, 40), 0)
                self.assertEqual(run(client, upstream, data, sizes=sizes)[0], whole)
            crlf = data.replace(b"\n", b"\r\n")
            self.assertEqual(run(client, upstream, crlf, sizes=iter(lambda: 7, 0))[0], whole)

    def test_quick_text(self) -> None:
        """The short way for text deltas reads what the long way reads."""
        words = ["a", "b c", "\u00e9\u4f60", 'q"q', "\\", "\\\\", "\n", "\U0001f600", '"', "}", "0",
                 '"}}', "null", "m", "c1"]
        rng = random.Random(7)
        for client, upstream in CELLS:
            texts = [rng.choice(words) for _ in range(400)]
            frames = {
                "chat": [chunk({"content": t}) for t in texts],
                "messages": [{"type": "content_block_delta", "index": 0, "delta": {
                    "type": "text_delta", "text": t}} for t in texts],
                "responses": [responses_event("output_text.delta", 0, content_index=0, delta=t)
                              for t in texts]}[upstream]
            start = {"chat": [], "responses": [], "messages": [
                {"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 1}}},
                {"type": "content_block_start", "index": 0, "content_block": {
                    "type": "text", "text": ""}}]}[upstream]
            end = {"chat": [chunk({}, "stop", usage={"prompt_tokens": 1}), "[DONE]"], "responses": [
                {"type": "response.completed", "response": {"usage": {"input_tokens": 1}}}],
                "messages": [{"type": "content_block_stop", "index": 0},
                             {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
                             {"type": "message_stop"}]}[upstream]
            for ascii_only in (False, True):
                data = "".join("data: %s\n\n" % (f if isinstance(f, str) else json.dumps(
                    f, ensure_ascii=ascii_only, separators=(",", ":"))) for f in
                    start + frames + end).encode()
                answer = read_body(client, whole_of(client, run(client, upstream, data)[0]))
                self.assertEqual(answer["text"], "".join(texts))

    def test_late_and_repeated_reasoning_state(self) -> None:
        data = sse(chunk({"role": "assistant", "reasoning_text": "hm "}),
                   chunk({"reasoning_text": "so"}), chunk({"content": "A"}),
                   chunk({"reasoning_opaque": "late"}), chunk({"content": "B"}),
                   chunk({}, "stop", usage={"prompt_tokens": 1}), "[DONE]")
        for client in NAMES:
            answer = read_body(client, whole_of(client, run(client, "chat", data)[0]))
            self.assertEqual((answer["text"], answer["reasoning"]), ("AB", "hm so"))
            self.assertTrue(answer["state"])

    def test_endless_white_space_is_ended(self) -> None:
        data = sse(chunk(call(0, "{", "a", "one")), *[chunk(call(0, " \n" * 100))] * 20)
        for client in NAMES:
            out, pipe = run(client, "chat", data)
            assert_failed(client, out)
            self.assertIn("white space", pipe.failure)


class Rules(unittest.TestCase):
    """Single rules of PROTOCOL 13 and of Codex and Claude Code."""

    @staticmethod
    def to(client: str, upstream: str, body: dict, **model: object) -> tuple:
        entry = dict({"limits": {"max_output_tokens": 9000}, "supports": {}}, **model)
        return translate(client, upstream, body, Model("m", **entry))

    def test_strict_is_explicit(self) -> None:
        body = Writer("chat", False).tool().user("x").body
        self.assertIs(self.to("chat", "responses", body)[0]["tools"][0]["strict"], False)

    def test_order_of_tool_messages(self) -> None:
        writer = Writer("messages", False).tool().user("x").calls("a", "b")
        writer.results(("a", "1"), ("b", "2"), image=True)
        writer.items[-1]["content"].insert(0, {"type": "text", "text": "note"})
        sent, _ = self.to("messages", "chat", writer.body)
        self.assertEqual([m["role"] for m in sent["messages"]],
                         ["user", "assistant", "tool", "tool", "user"])
        self.assertEqual(sent["messages"][-1]["content"][-1], {"type": "text", "text": "note"})

    def test_invalid_arguments(self) -> None:
        writer = Writer("chat", False).tool().user("x").calls("a", "b")
        calls = writer.items[-1]["tool_calls"]
        calls[0]["function"]["arguments"], calls[1]["function"]["arguments"] = "", "[1"
        writer.results(("a", "1"), ("b", "2"))
        sent, _ = self.to("chat", "messages", writer.body)
        self.assertEqual([b["input"] for b in sent["messages"][1]["content"]],
                         [{}, {"_raw": "[1"}])

    def test_system_in_the_middle(self) -> None:
        body = {"messages": [{"role": "developer", "content": "A"},
                             {"role": "user", "content": "x"},
                             {"role": "assistant", "content": "y"},
                             {"role": "developer", "content": "B"},
                             {"role": "user", "content": "z"}]}
        sent, _ = self.to("chat", "messages", json.loads(json.dumps(body)))
        self.assertEqual(sent["system"][0]["text"], "A")
        self.assertEqual([b["text"] for b in sent["messages"][-1]["content"]], [
            "z", "<system-reminder>\nB\n</system-reminder>"])
        sent, _ = self.to("chat", "responses", body)
        self.assertEqual(sent["instructions"], "A")
        self.assertEqual([item["role"] for item in sent["input"]],
                         ["user", "assistant", "developer", "user"])

    def test_stop_sequences(self) -> None:
        body = dict(Writer("messages", False).user("x").body, stop_sequences=list("abcde"), top_k=3)
        _, request = self.to("messages", "responses", json.loads(json.dumps(body)))
        self.assertEqual({name for name, _ in request.losses}, {"stop", "top_k"})
        sent, request = self.to("messages", "chat", body)
        self.assertEqual(sent["stop"], list("abcd"))

    def test_tool_choice(self) -> None:
        for wire, chat, responses in (
                ({"type": "any"}, "required", "required"), ({"type": "none"}, "none", "none"),
                ({"type": "tool", "name": "get_weather"},
                 {"type": "function", "function": {"name": "get_weather"}},
                 {"type": "function", "name": "get_weather"})):
            body = dict(Writer("messages", False).tool().user("x").body, tool_choice=wire)
            self.assertEqual(self.to("messages", "chat", json.loads(json.dumps(body)))[0]
                             ["tool_choice"], chat)
            self.assertEqual(self.to("messages", "responses", json.loads(json.dumps(body)))[0]
                             ["tool_choice"], responses)
        body = dict(Writer("chat", False).tool().user("x").body, parallel_tool_calls=False)
        self.assertEqual(self.to("chat", "messages", body)[0]["tool_choice"],
                         {"type": "auto", "disable_parallel_tool_use": True})

    def test_hosted_tools(self) -> None:
        body = dict(Writer("responses", False).tool().user("x").body)
        body["tools"] += [{"type": "web_search"}, {"type": "image_generation"},
                          {"type": "local_shell"}]
        for upstream in ("chat", "messages"):
            sent, request = self.to("responses", upstream, json.loads(json.dumps(body)))
            self.assertEqual((len(sent["tools"]), len(request.losses)), (1, 3))
        body = dict(Writer("messages", False).user("x").body,
                    tools=[{"type": "web_search_20250305", "name": "web_search"}],
                    tool_choice={"type": "tool", "name": "web_search"})
        sent, request = self.to("messages", "chat", body)
        self.assertNotIn("tools", sent)
        self.assertNotIn("tool_choice", sent)
        self.assertEqual(len(request.losses), 2)

    def test_codex_tools(self) -> None:
        """custom and namespace tools: functions on the way out, themselves on the way back."""
        first_turn = {"role": "user", "content": "x"}
        body = {"model": "m", "stream": True, "input": [first_turn], "tools": [
            {"type": "custom", "name": "apply_patch", "description": "Patch.",
             "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"}},
            {"type": "namespace", "name": "fs", "description": "Files.", "tools": [
                {"type": "function", "name": "read", "parameters": SCHEMA, "strict": False}]}]}
        for upstream in ("chat", "messages"):
            sent, request = self.to("responses", upstream, json.loads(json.dumps(body)))
            names = [t.get("name") or t["function"]["name"] for t in sent["tools"]]
            self.assertEqual(names, ["apply_patch", "fs__read"])
            self.assertIn("start: x", json.dumps(sent["tools"]))
            self.assertEqual(request.losses, [])
        patch = "*** Begin\n+a \"b\"\n"
        data = sse(chunk(call(0, "", "a", "apply_patch")),
                   *[chunk(call(0, piece)) for piece in ('{"inp', 'ut":"*** Begin\\n+a ',
                                                         '\\"b\\"\\n"}')],
                   chunk(call(1, '{"city":"P"}', "b", "fs__read")),
                   chunk({}, "tool_calls", usage={"prompt_tokens": 1}), "[DONE]")
        _, request = self.to("responses", "chat", json.loads(json.dumps(body)))
        final = whole_of("responses", run("responses", "chat", data, request)[0])
        first, second = final["output"]
        self.assertEqual((first["type"], first["input"]), ("custom_tool_call", patch))
        self.assertEqual((second["namespace"], second["name"]), ("fs", "read"))
        body["input"] += [first, second,
                          {"type": "custom_tool_call_output", "call_id": "a", "output": "done"},
                          {"type": "function_call_output", "call_id": "b", "output": "text"}]
        sent, request = self.to("responses", "chat", json.loads(json.dumps(body)))
        calls = sent["messages"][1]["tool_calls"]
        self.assertEqual([c["function"]["name"] for c in calls], ["apply_patch", "fs__read"])
        self.assertEqual(json.loads(calls[0]["function"]["arguments"]), {"input": patch})
        self.assertEqual([m["content"] for m in sent["messages"][2:]], ["done", "text"])

    def test_refused_by_name(self) -> None:
        image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
        odd = {"type": "input_audio", "input_audio": {}}
        for part in (image, odd):
            for upstream in ("responses", "messages"):
                with self.assertRaises(BadRequest) as caught:
                    self.to("chat", upstream, {"messages": [{"role": "user", "content": [part]}]})
                self.assertTrue(caught.exception.param)
        with self.assertRaises(BadRequest) as caught:
            self.to("chat", "messages", {"messages": [{"role": "user", "content": [
                Writer("chat", False).image()]}]}, supports={"vision": False})
        self.assertIn("no images", str(caught.exception))

    def test_unknown_fields_are_recorded(self) -> None:
        for client, upstream in CELLS:
            body = dict(Writer(client, False).user("x").body, brand_new={"a": 1})
            sent, request = self.to(client, upstream, body)
            self.assertNotIn("brand_new", sent)
            self.assertIn("brand_new", dict(request.losses))

    def test_effort_is_clamped(self) -> None:
        supports = {"reasoning_effort": ["low", "medium"]}
        for client in NAMES:
            body = Writer(client, False).think().user("x").body
            sent, _ = self.to(client, "chat", json.loads(json.dumps(body)), supports=supports)
            self.assertIn(sent["reasoning_effort"], ("low", "medium"))
            sent, _ = self.to(client, "responses", body, supports=supports)
            self.assertIn(sent["reasoning"]["effort"], ("low", "medium"))
        budget = {"min_thinking_budget": 1024, "max_thinking_budget": 5000}
        body = Writer("responses", False).think().user("x").body
        self.assertEqual(self.to("responses", "chat", json.loads(json.dumps(body)),
                                 supports=budget)[0]["thinking_budget"], 5000)
        self.assertEqual(self.to("responses", "messages", body, supports=budget)[0]["thinking"],
                         {"type": "enabled", "budget_tokens": 5000})

    def test_fields_of_openai_alone(self) -> None:
        body = dict(Writer("responses", False).user("x").body, prompt_cache_key="k",
                    metadata={"a": "b"}, text={"verbosity": "low"})
        sent, request = self.to("responses", "chat", json.loads(json.dumps(body)), vendor="OpenAI")
        self.assertEqual((sent["prompt_cache_key"], sent["verbosity"]), ("k", "low"))
        self.assertEqual(request.losses, [])
        for upstream in ("chat", "messages"):
            sent, request = self.to("responses", upstream, json.loads(json.dumps(body)),
                                    vendor="Anthropic")
            self.assertNotIn("prompt_cache_key", sent)
            self.assertEqual({name for name, _ in request.losses}, {"metadata", "verbosity"})

    def test_cache_marks(self) -> None:
        body = Writer("responses", False).system("S").user("a").user("b").body
        sent, _ = self.to("responses", "chat", json.loads(json.dumps(body)), vendor="Anthropic")
        self.assertEqual(sum("copilot_cache_control" in m for m in sent["messages"]), 3)
        sent, _ = self.to("responses", "chat", body, vendor="OpenAI")
        self.assertNotIn("copilot_cache_control", json.dumps(sent))

    def test_billing_line_is_left_out(self) -> None:
        body = dict(Writer("messages", False).user("x").body, system=[
            {"type": "text", "text": "x-anthropic-billing-header: cch=1"},
            {"type": "text", "text": "Real."}])
        self.assertEqual(self.to("messages", "responses", body)[0]["instructions"], "Real.")


@unittest.skipUnless(openai, "needs the openai and anthropic packages")
class Sdks(MatrixCase):
    """The SDKs' own types and stream accumulators take every translated answer."""

    def test_bodies(self) -> None:
        from anthropic.types import Message
        from openai.types.chat import ChatCompletion
        from openai.types.responses import Response
        kinds = {"chat": ChatCompletion, "responses": Response, "messages": Message}
        for client, upstream in CELLS:
            name = {"chat": "gpt-5-mini"}.get(upstream, MODELS[upstream][0])
            writer = Writer(client, False).tool().think().user("use the tool, parallel")
            raw = self.send(client, upstream, writer.body, name)["raw"]
            kinds[client].model_validate(raw, strict=True)

    def test_streams(self) -> None:
        import httpx2 as httpx
        for client, upstream in CELLS:
            name = {"chat": "gpt-5-mini"}.get(upstream, MODELS[upstream][0])
            body = Writer(client, True).tool().think().user("use the tool, parallel").body
            sent, request = translate(client, upstream, body, self.upstream.model(name))
            speaker, said = self.upstream.said(upstream, sent, name)
            data = run(client, upstream, b"".join(f.data for f in speaker.frames(said)),
                       request)[0]
            transport = httpx.MockTransport(lambda r, d=data: httpx.Response(
                200, headers={"content-type": "text/event-stream"}, content=d))
            with self.subTest(client=client, upstream=upstream):
                self.check_stream(client, httpx.Client(transport=transport))

    def check_stream(self, client: str, http: object) -> None:
        tool = Writer(client, True).tool().body["tools"]
        if client == "messages":
            api = anthropic.Anthropic(api_key="x", base_url="http://x", http_client=http)
            with api.messages.stream(model="asked", max_tokens=9, messages=[
                    {"role": "user", "content": "x"}], tools=tool) as stream:
                final = stream.get_final_message()
            self.assertEqual(len([b for b in final.content if b.type == "tool_use"]), 2)
            return
        api = openai.OpenAI(api_key="x", base_url="http://x/v1", http_client=http)
        if client == "responses":
            with api.responses.stream(model="asked", input="x", tools=tool) as stream:
                final = stream.get_final_response()
            self.assertEqual(len([i for i in final.output if i.type == "function_call"]), 2)
        else:
            with api.chat.completions.stream(model="asked", messages=[
                    {"role": "user", "content": "x"}]) as stream:
                final = stream.get_final_completion()
            self.assertEqual(len(final.choices[0].message.tool_calls), 2)


if __name__ == "__main__":
    unittest.main()
