"""Bodies and streams of the three dialects, made and read without the product's own code.

Writer makes requests in a client's words; `read_body` and `whole_of` read answers as strict clients
do; PARALLEL and REFUSALS are upstream streams, written out; `some_request` and `some_response` make
random values of the hub's vocabulary; `check_order` knows the legal order of its events.
"""
from __future__ import annotations

import base64
import json
import random
from typing import Any, Iterable, Iterator

from support import SLOW
import copilot_proxy as cp
from fake_upstream import default_models
from copilot_proxy import (DIALECTS, Document, Frame, Image, Model, Named, Reasoning, Request,
                           Response, Text, Tool, ToolCall, ToolResult, TranslatedStream, Turn,
                           Usage, dumps)

NAMES = ("chat", "responses", "messages")
CELLS = [(client, upstream) for client in NAMES for upstream in NAMES if client != upstream]
PIXEL = "iVBORw0KGgo="
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
STOPS = {"chat": {"stop": "stop", "tool": "tool_calls", "length": "length"},
         "responses": {"stop": "completed", "tool": "completed", "length": "max_output_tokens"},
         "messages": {"stop": "end_turn", "tool": "tool_use", "length": "max_tokens"}}


#: the fake's catalogue: id -> model; of an id that is listed twice the first
CATALOGUE: dict[str, Model] = {}
for _entry in default_models():
    CATALOGUE.setdefault(_entry["id"], Model.from_entry(_entry))


# ---- Turns and bodies as clients send them ----

def user(content: Any, **more: Any) -> dict[str, Any]:
    """One user turn, in any dialect."""
    return dict({"role": "user", "content": content}, **more)


def assistant(content: Any = None, **more: Any) -> dict[str, Any]:
    return dict({"role": "assistant", "content": content}, **more)


def chat_of(*messages: Any, **more: Any) -> dict[str, Any]:
    """A chat request of these turns."""
    return dict({"model": "m", "messages": list(messages) or [user("Hi")]}, **more)


def response_of(*items: Any, **more: Any) -> dict[str, Any]:
    """A responses request of these items."""
    return dict({"model": "m", "input": list(items) or "Hi"}, **more)


def message_of(*messages: Any, **more: Any) -> dict[str, Any]:
    """A messages request of these turns."""
    return dict({"model": "m", "max_tokens": 1000, "messages": list(messages) or [user("Hi")]},
                **more)


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


def assert_failed(client: str, out: bytes) -> None:
    last = events_of(out)[-1]
    polite = {"chat": b"[DONE]", "messages": b"message_stop", "responses": b"response.completed"}
    assert polite[client] not in out, out
    assert last.get("error") or last.get("response", {}).get("error"), last
    assert client != "messages" or last["type"] == "error"
    assert client != "responses" or last["type"] == "response.failed"


# ---- Upstream streams, written out ----

def frame(value: Any, event: str = "") -> bytes:
    """One server-sent event; a string is sent as it is, everything else as JSON."""
    data = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False,
                                                           separators=(",", ":"))
    return ("%sdata: %s\n\n" % ("event: %s\n" % event if event else "", data)).encode()


def sse(*events: Any, named: bool = False) -> bytes:
    """Several of them, named by their type if wanted."""
    return b"".join(frame(event, event["type"] if named and not isinstance(event, str) else "")
                    for event in events)


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


# ---- Random values of the vocabulary ----

SEEDS = range(2000 if SLOW else 100)
MODEL = Model("model-x-4.6", vendor="OpenAI", supports={
    "structured_outputs": True, "vision": True, "adaptive_thinking": True,
    "max_thinking_budget": 32000, "min_thinking_budget": 1024,
    "reasoning_effort": ["low", "medium", "high"]})
WORDS = ("Hello", "w\u00f6rld", "\u4f60\u597d", 'say "hi"', "back\\slash", "new\nline",
         "\U0001f600", "tab\t", "{}", "</x>", "\u2028")


def text(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6)))


def arguments(rng: random.Random) -> str:
    return rng.choice(('{}', '{"a":1}', '{"path":"a \\"b\\"","n":[1,2.5,null,true]}',
                       dumps({"t": text(rng)}).decode()))


def image(rng: random.Random) -> Image:
    return Image("image/png", base64.b64encode(rng.choice(WORDS).encode()).decode())


def reasoning(rng: random.Random, dialect: str) -> Reasoning:
    return Reasoning(text(rng), "sig%d" % rng.randint(0, 99), None, dialect)


def some_turns(rng: random.Random, dialect: str) -> list:
    turns = []
    if rng.random() < 0.7:
        turns.append(Turn("system", [Text(text(rng))]))
    for number in range(rng.randint(1, 3)):
        parts = [Text(text(rng))]
        if rng.random() < 0.3:
            parts.append(image(rng))
        if rng.random() < 0.2:
            parts.append(Document("application/pdf", "cGRm", title="a.pdf"))
        turns.append(Turn("user", parts))
        said = [reasoning(rng, dialect)] if rng.random() < 0.4 else []
        said += [Text(text(rng))] if rng.random() < 0.7 else []
        calls = [ToolCall("call_%d_%d" % (number, at), "tool_%d" % at, arguments(rng))
                 for at in range(rng.randint(0, 3))]
        if not said[-1:] or isinstance(said[-1], Reasoning):
            calls = calls or [ToolCall("call_x%d" % number, "tool_0", "{}")]
        turns.append(Turn("assistant", said + calls))
        if calls:
            turns.append(Turn("user", [ToolResult(call.id, [Text(text(rng))]) for call in calls]))
    if turns[-1].role == "assistant":
        turns.append(Turn("user", [Text("go on")]))
    return turns


def some_request(seed: int, dialect: str) -> Request:
    rng = random.Random(seed)
    is_messages = dialect == "messages"
    request = Request(MODEL.id, dialect, turns=some_turns(rng, dialect))
    for at in range(rng.randint(0, 3)):
        request.tools.append(Tool(
            "tool_%d" % at, rng.choice((None, "does it")), {"type": "object", "properties": {
                "x": {"type": "string"}}},
            None if is_messages else rng.choice((True, False))))
    if request.tools:
        request.tool_choice = rng.choice((None, "auto", "none", "required", Named("tool_0")))
        if rng.random() < 0.3 and not (is_messages and request.tool_choice in (None, "none")):
            request.parallel_tool_calls = False
    request.max_output_tokens = rng.randint(20, 9999) if is_messages else rng.choice((None, 500))
    request.temperature = rng.choice((None, 0, 0.5, 1))
    request.top_p = rng.choice((None, 0.9))
    if dialect != "responses":
        request.stop = rng.choice(([], ["END"], ["a", "b"]))
    if not (is_messages and (isinstance(request.tool_choice, Named)
                             or request.tool_choice == "required")):
        request.effort = rng.choice((None, "low", "high"))        # else thinking is not possible
    request.stream = rng.choice((None, True, False))
    request.user = rng.choice((None, "user-1"))
    if rng.random() < 0.3:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        request.output_schema = {"type": "json_schema", "schema": schema}
        if not is_messages:
            request.output_schema.update(name="thing", strict=True, description="a thing")
    if rng.random() < 0.3 and not is_messages:
        request.openai = {"metadata": {"a": "b"}, "verbosity": "low"}
    return request


def some_response(seed: int, dialect: str) -> Response:
    rng = random.Random(seed)
    parts = [reasoning(rng, rng.choice(("chat", "messages", "responses")))] \
        if rng.random() < 0.5 else []
    parts += [Text(text(rng))] if rng.random() < 0.7 else []
    calls = [ToolCall("call_%d" % at, "tool_%d" % at, arguments(rng))
             for at in range(rng.randint(0, 3))]
    stop = "tool_use" if calls else rng.choice(("stop", "length", "refusal"))
    prefix = {"chat": "chatcmpl-", "responses": "resp_", "messages": "msg_"}[dialect]
    reads_reasoning = dialect != "messages"
    return Response(prefix + str(seed), "asked", parts + calls, stop,
                    Usage(rng.randint(1, 99), rng.randint(0, 9), 0 if reads_reasoning else 3,
                          rng.randint(1, 99), 5 if reads_reasoning else 0),
                    1790000000 if reads_reasoning else 0)


def check_order(events: Iterable[cp.Event]) -> Iterator[cp.Event]:
    """The same events; raises ValueError at the first one that stands where it must not."""
    state, last = "before", -1
    open_parts: set[int] = set()
    for event in events:
        if state == "ended":
            raise ValueError("%r behind the end" % (event,))
        if isinstance(event, cp.ResponseStart) != (state == "before") and not isinstance(
                event, cp.StreamError):
            raise ValueError("%r while %s" % (event, state))
        if isinstance(event, cp.ResponseStart):
            state = "running"
        elif isinstance(event, cp.PartStart):
            if event.index <= last:
                raise ValueError("%r behind index %d" % (event, last))
            last = event.index
            open_parts.add(last)
        elif isinstance(event, (cp.PartDelta, cp.PartSignature, cp.PartEnd)):
            if event.index not in open_parts:
                raise ValueError("%r for a part that is not open" % (event,))
            if isinstance(event, cp.PartEnd):
                open_parts.remove(event.index)
        elif isinstance(event, (cp.ResponseEnd, cp.StreamError)):
            if open_parts and isinstance(event, cp.ResponseEnd):
                raise ValueError("%r while %r are open" % (event, open_parts))
            state = "ended"
        yield event


# ---- Mangled bytes ----

ENDS = (b"\r\n", b"\n", b"\r", b"\x00", b"\xff", b":", b" ", b"\t", b"{", b"[", b"]", b"}", b'"',
        b",", b"\\", b"0", b"-1", b"1e999", b"null", b"\r\n\r\n", b"\n\n", b"data: ", b"chunked",
        b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"[DONE]", b"\\ud800")


def mangle(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, put in, taken out, doubled or cut off."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((0, 0, 1, 1, 2, 8, 64)))
        way = rng.randrange(6)
        middle = (bytes((rng.randrange(256),)), b"", data[at:end] * 2, rng.choice(ENDS),
                  rng.choice(ENDS) * rng.choice((1, 50)), data[end:end + 64])[way]
        data = data[:at] + middle + data[end:]
    return data if rng.random() < 0.95 else data[:rng.randrange(len(data) + 1)]


def pieces(rng: random.Random, data: bytes) -> list[bytes]:
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(4)))
    return [data[a:b] for a, b in zip([0] + cuts, cuts + [len(data)])]
