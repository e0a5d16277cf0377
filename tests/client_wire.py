"""Bodies and answers of the dialects that no upstream speaks, Gemini and Ollama, written and read
without the product's own code; and the grid of their tests, which is the same for both."""
from __future__ import annotations

import json
import random
from typing import Any

import copilot_proxy as cp
from wire import (MODEL, PARALLEL, PIXEL, SCHEMA, SEEDS, arguments, check_order,
                  some_response)

UPSTREAMS = {"chat": ("gpt-4.1", "gemini-3.1-pro-preview"), "responses": ("gpt-5.4",),
             "messages": ("claude-sonnet-4.6", "claude-opus-4.7")}
MODELS = [(upstream, name) for upstream, names in UPSTREAMS.items() for name in names]
PATHS = {"chat": "/chat/completions", "responses": "/responses", "messages": "/v1/messages"}


class GeminiWriter:
    """A request in Gemini's words."""

    def __init__(self) -> None:
        self.contents: list[Any] = []
        self.body: dict[str, Any] = {"contents": self.contents}
        self.config: dict[str, Any] = self.body.setdefault("generationConfig", {})

    def say(self, words: str, *parts: Any) -> GeminiWriter:
        self.contents.append({"role": "user", "parts": [{"text": words}, *parts]})
        return self

    def system(self, words: str) -> GeminiWriter:
        self.body["systemInstruction"] = {"parts": [{"text": words}]}
        return self

    def image(self) -> GeminiWriter:
        self.contents[-1]["parts"].append({"inlineData": {"mimeType": "image/png", "data": PIXEL}})
        return self

    def tool(self) -> GeminiWriter:
        self.body["tools"] = [{"functionDeclarations": [{
            "name": "get_weather", "description": "The weather.", "parameters": {
                "type": "OBJECT", "properties": {"city": {"type": "STRING"}},
                "required": ["city"]}}]}]
        return self

    def think(self) -> GeminiWriter:
        self.config["thinkingConfig"] = {"includeThoughts": True, "thinkingLevel": "HIGH"}
        return self

    def schema(self) -> GeminiWriter:
        self.config.update(responseMimeType="application/json", responseJsonSchema=SCHEMA)
        return self

    def replay(self, answer: dict[str, Any]) -> GeminiWriter:
        self.contents.append(answer["raw"]["candidates"][0]["content"])
        return self

    def results(self, answer: dict[str, Any], *texts: str, ids: bool = True) -> GeminiWriter:
        parts = []
        for (call_id, name, _), words in zip(answer["calls"], texts):
            response = {"name": name, "response": {"output": words}}
            parts.append({"functionResponse": dict(response, id=call_id) if ids else response})
        self.contents.append({"role": "user", "parts": parts})
        return self


class OllamaWriter:
    """A request in the words of /api/chat."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.body: dict[str, Any] = {"messages": self.messages}

    def say(self, words: str) -> OllamaWriter:
        self.messages.append({"role": "user", "content": words})
        return self

    def system(self, words: str) -> OllamaWriter:
        self.messages.append({"role": "system", "content": words})
        return self

    def image(self) -> OllamaWriter:
        self.messages[-1]["images"] = [PIXEL]
        return self

    def tool(self) -> OllamaWriter:
        self.body["tools"] = [{"type": "function", "function": {
            "name": "get_weather", "description": "The weather.", "parameters": SCHEMA}}]
        return self

    def think(self) -> OllamaWriter:
        self.body["think"] = "high"
        return self

    def schema(self) -> OllamaWriter:
        self.body["format"] = SCHEMA
        return self

    def replay(self, answer: dict[str, Any]) -> OllamaWriter:
        self.messages.append(answer["raw"]["message"])
        return self

    def results(self, answer: dict[str, Any], *texts: str, ids: bool = True) -> OllamaWriter:
        for (call_id, name, _), words in zip(answer["calls"], texts):
            message = {"role": "tool", "content": words, "tool_name": name}
            self.messages.append(dict(message, tool_call_id=call_id) if ids else message)
        return self


# ---- Answers ----

def read_gemini(body: dict[str, Any]) -> dict[str, Any]:
    """What a client reads out of a whole answer."""
    (candidate,) = body["candidates"]
    assert candidate["index"] == 0 and candidate["content"]["role"] == "model"
    found: dict[str, Any] = {"text": "", "reasoning": "", "calls": [], "signatures": [],
                             "stop": candidate["finishReason"], "raw": body}
    for part in candidate["content"]["parts"]:
        if "thoughtSignature" in part:
            assert not part.get("thought")
            found["signatures"].append(part["thoughtSignature"])
        if "functionCall" in part:
            call = part["functionCall"]
            assert isinstance(call["args"], dict)
            found["calls"].append((call["id"], call["name"], call["args"]))
        elif part.get("thought"):
            found["reasoning"] += part["text"]
        else:
            found["text"] += part["text"]
    usage = body["usageMetadata"]
    assert usage["totalTokenCount"] == (usage["promptTokenCount"] + usage["candidatesTokenCount"]
                                        + usage["thoughtsTokenCount"])
    found["usage"] = usage["promptTokenCount"], usage["totalTokenCount"]
    return found


def gemini_pieces(data: bytes, is_array: bool = False) -> list[Any]:
    """The objects of a stream."""
    if is_array:
        return list(json.loads(data))
    lines = [line for line in data.split(b"\n") if line.strip()]
    assert all(line.startswith(b"data: ") for line in lines), data
    return [json.loads(line[6:]) for line in lines]


def whole_gemini(pieces: list[Any]) -> dict[str, Any]:
    """One answer out of the pieces of a stream, as SDKs join them."""
    parts: list[Any] = []
    for piece in pieces:
        (candidate,) = piece["candidates"]
        is_last = piece is pieces[-1]
        assert ("finishReason" in candidate) == is_last, pieces
        assert ("usageMetadata" in piece) == is_last
        assert piece["responseId"] == pieces[0]["responseId"]
        for part in candidate["content"]["parts"]:
            last = parts[-1] if parts else {}
            if part.keys() - {"thought"} == {"text"} and "text" in last and (
                    last.get("thought") == part.get("thought")):
                parts[-1] = dict(last, text=last["text"] + part["text"])
            elif part != {"text": ""} or not parts:
                parts.append(part)
    last = pieces[-1]
    content = {"role": "model", "parts": parts}
    return dict(last, candidates=[dict(last["candidates"][0], content=content)])


def read_ollama(body: dict[str, Any]) -> dict[str, Any]:
    """The same of /api/chat."""
    message = body["message"]
    assert message["role"] == "assistant" and body["done"] is True
    durations = [body[name] for name in ("total_duration", "prompt_eval_duration",
                                         "eval_duration", "load_duration")]
    assert all(isinstance(one, int) and one >= 0 for one in durations), durations
    calls = [(call["id"], call["function"]["name"], call["function"]["arguments"])
             for call in message.get("tool_calls", ())]
    assert all(isinstance(call[2], dict) for call in calls)
    return {"text": message["content"], "reasoning": message.get("thinking", ""), "calls": calls,
            "signatures": [], "stop": body["done_reason"], "raw": body,
            "usage": (body["prompt_eval_count"], body["prompt_eval_count"] + body["eval_count"])}


def ollama_pieces(data: bytes) -> list[Any]:
    """The lines of a stream."""
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def whole_ollama(pieces: list[Any]) -> dict[str, Any]:
    """One answer out of the lines of a stream."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for piece in pieces:
        assert piece["done"] == (piece is pieces[-1]), pieces
        said = piece["message"]
        message["content"] += said["content"]
        if said.get("thinking"):
            message["thinking"] = message.get("thinking", "") + said["thinking"]
        if said.get("tool_calls"):
            message.setdefault("tool_calls", []).extend(said["tool_calls"])
    return dict(pieces[-1], message=message)


# ---- The grid ----

class Grid:
    """Mixed into a SharedCase: one client dialect, every kind of model, streamed and not."""
    dialect = ""
    stops: dict[str, str] = {}
    writer: Any = None

    def ask(self, writer: Any, model: str, stream: bool) -> dict[str, Any]:
        """Send a request -> its answer, read."""
        raise NotImplementedError

    def cells(self) -> Any:
        for upstream, model in MODELS:
            for stream in (False, True):
                with self.subTest(upstream=upstream, model=model, stream=stream):
                    before = len(self.fake.requests)
                    yield model, stream
                    paths = {sent.path for sent in self.fake.requests[before:]
                             if sent.path in PATHS.values()}
                    self.assertEqual(paths, {PATHS[upstream]})

    def test_text(self) -> None:
        words = "h\u00e9llo \"you\"\n\\ \U0001f600\u2028"
        for model, stream in self.cells():
            answer = self.ask(self.writer().system("Be kind.").say(words), model, stream)
            self.assertEqual(answer["text"], "Echo: " + words)
            self.assertEqual(answer["stop"], self.stops["stop"])
            self.assertGreater(answer["usage"][0], 3)
            self.assertGreater(answer["usage"][1], answer["usage"][0])

    def test_tools_and_their_results(self) -> None:
        for model, stream in self.cells():
            for ids in (True, False):
                start = self.writer().tool().say("use the tool, parallel")
                answer = self.ask(start, model, stream)
                self.assertEqual([call[1:] for call in answer["calls"]][0],
                                 ("get_weather", {"city": "Paris"}))
                self.assertEqual(len({call[0] for call in answer["calls"]}), 2)
                self.assertEqual(answer["stop"], self.stops["tool"])
                final = self.ask(start.replay(answer).results(answer, "r0", "r1", ids=ids),
                                 model, stream)
                self.assertIn("r1", final["text"])

    def test_images(self) -> None:
        for model, stream in self.cells():
            self.ask(self.writer().say("what is it").image(), model, stream)
            self.assertIn(PIXEL, json.dumps(self.fake.requests[-1].json))
            self.assertEqual(self.fake.requests[-1].headers["copilot-vision-request"], "true")

    def test_reasoning(self) -> None:
        for model, stream in self.cells():
            start = self.writer().think().say("think")
            answer = self.ask(start, model, stream)
            if model != "gpt-4.1":
                self.assertEqual(answer["reasoning"], "The user wants an echo.")
            self.ask(start.replay(answer).say("and now?"), model, stream)
            sent = json.dumps(self.fake.requests[-1].json)
            self.assertNotIn("cpx1.", sent)
            if answer["signatures"] and model != "gpt-4.1":
                self.assertRegex(sent, "encrypted_content|reasoning_opaque|signature")

    def test_schema(self) -> None:
        for model, stream in self.cells():
            self.ask(self.writer().schema().say("Paris"), model, stream)
            self.assertIn('"city"', json.dumps(self.fake.requests[-1].json))

    def test_length(self) -> None:
        for model, stream in self.cells():
            answer = self.ask(self.writer().say("hi @@length=1@@"), model, stream)
            self.assertEqual(answer["stop"], self.stops["length"])


def stream_of(dialect: cp.Dialect, upstream: str, data: bytes, sizes: Any = None,
              **fields: Any) -> tuple[bytes, cp.TranslatedStream]:
    """(client bytes, pipeline) of a whole upstream stream, cut as `sizes` says."""
    request = cp.Request("asked", now=1790000000, wants_thoughts=True, **fields)
    pipe = cp.TranslatedStream(dialect, cp.DIALECTS[upstream], request)
    out, at = [], 0
    while at < len(data):
        size = next(sizes) if sizes else len(data)
        out.append(pipe.feed(data[at:at + size]))
        at += size
    return b"".join(out) + pipe.close(), pipe


class Laws:
    """Mixed into a TestCase: what holds for every answer.  dialects: with how their streams are
    made whole; read: a whole answer."""
    dialects: tuple[tuple[cp.Dialect, Any], ...] = ()
    read: Any = None
    polite = b""

    def read_whole(self, body: dict[str, Any]) -> dict[str, Any]:
        return dict(type(self).read(body), raw=None)

    def test_a_stream_says_what_the_whole_answer_says(self) -> None:
        for dialect, whole in self.dialects:
            for seed in SEEDS:
                response = some_response(seed, random.Random(seed).choice(
                    ("chat", "responses", "messages")))
                request = cp.Request("asked", now=1790000000, wants_thoughts=True)
                encoder = dialect.stream_encoder(request)
                data = b"".join(map(encoder.feed, check_order(cp.unfold(response))))
                body = json.loads(cp.dumps(dialect.encode_response(response, request)))
                with self.subTest(dialect=type(dialect).__name__, seed=seed):
                    found = self.read_whole(body)
                    self.assertEqual(self.read_whole(whole(data)), found)
                    self.assertEqual(found["text"], "".join(
                        part.text for part in response.parts if isinstance(part, cp.Text)))
                    self.assertEqual([call[1:] for call in found["calls"]], [
                        (part.name, json.loads(part.arguments)) for part in response.parts
                        if isinstance(part, cp.ToolCall)])

    def test_interleaved_calls_come_whole_and_in_order(self) -> None:
        for dialect, whole in self.dialects:
            for seed in range(100):
                rng = random.Random(seed)
                calls = [cp.ToolCall("call_%d" % at, "t%d" % at, arguments(rng))
                         for at in range(4)]
                events: list[Any] = [cp.ResponseStart("id", "asked")]
                events += [cp.PartStart(at, cp.skeleton(call)) for at, call in enumerate(calls)]
                pieces = [(at, call.arguments[cut:cut + 3]) for at, call in enumerate(calls)
                          for cut in range(0, len(call.arguments), 3)]
                order = sorted(pieces, key=lambda piece: rng.random())
                queues = {at: [p for p in pieces if p[0] == at] for at in range(4)}
                events += [cp.PartDelta(*queues[at].pop(0)) for at, _ in order]
                ends = rng.sample(range(4), 4)
                events += [*map(cp.PartEnd, ends), cp.ResponseEnd("tool_use")]
                encoder = dialect.stream_encoder(cp.Request("asked"))
                data = b"".join(map(encoder.feed, check_order(events)))
                with self.subTest(dialect=type(dialect).__name__, seed=seed):
                    self.assertEqual(self.read_whole(whole(data))["calls"], [
                        (call.id, call.name, json.loads(call.arguments)) for call in calls])

    def test_any_cut_of_the_upstream_gives_the_same_bytes(self) -> None:
        for dialect, whole in self.dialects:
            for upstream, data in PARALLEL.items():
                out = stream_of(dialect, upstream, data)[0]
                with self.subTest(dialect=type(dialect).__name__, upstream=upstream):
                    self.assertEqual(stream_of(dialect, upstream, data, iter(lambda: 1, 0))[0], out)
                    rng = random.Random(3)
                    sizes = iter(lambda: rng.randint(1, 40), 0)
                    self.assertEqual(stream_of(dialect, upstream, data, sizes)[0], out)
                    self.assertEqual([call[1] for call in self.read_whole(whole(out))["calls"]],
                                     ["one", "two", "three"])

    def test_a_truncated_stream_ends_in_an_error(self) -> None:
        for dialect, _ in self.dialects:
            for upstream, data in PARALLEL.items():
                frames = [raw + b"\n\n" for raw in data.split(b"\n\n") if raw]
                last = len(frames) - (3 if upstream == "chat" else 1)
                for cut in range(last):
                    out, pipe = stream_of(dialect, upstream, b"".join(frames[:cut]))
                    with self.subTest(dialect=type(dialect).__name__, upstream=upstream, cut=cut):
                        self.assertTrue(pipe.ended and pipe.failure)
                        self.assertNotIn(self.polite, out)
                        self.assertIn("error", self.pieces(dialect, out)[-1])

    def pieces(self, dialect: cp.Dialect, out: bytes) -> list[Any]:
        raise NotImplementedError

    def history(self, body: dict[str, Any], results: list[tuple[str, str]]) -> dict[str, Any]:
        """A request whose history is an answer, as this client keeps it, with (name, text) of the
        result of each of its calls."""
        raise NotImplementedError

    def test_an_answer_that_comes_back_goes_up_to_every_upstream_as_it_was(self) -> None:
        dialect, whole = self.dialects[0]
        for seed in SEEDS:
            for upstream, family in cp.DIALECTS.items():
                response = some_response(seed, upstream)
                made = [part for part in response.parts if isinstance(part, cp.ToolCall)]
                results = [(call.name, "result %d" % at) for at, call in enumerate(made)]
                encoder = dialect.stream_encoder(cp.Request("asked", wants_thoughts=True))
                data = b"".join(map(encoder.feed, cp.unfold(response)))
                request = dialect.decode_request(self.history(whole(data), results))
                sent = json.loads(cp.dumps(family.encode_request(request, MODEL)))
                parts = [part for turn in family.decode_request(sent).turns for part in turn.parts]
                with self.subTest(dialect=type(dialect).__name__, upstream=upstream, seed=seed):
                    calls = [part for part in parts if isinstance(part, cp.ToolCall)]
                    self.assertEqual([(call.name, json.loads(call.arguments)) for call in calls],
                                     [(call.name, json.loads(call.arguments)) for call in made])
                    said = "".join(part.text for part in parts if isinstance(part, cp.Text))
                    self.assertEqual(said, "hi" + "".join(
                        part.text for part in response.parts if isinstance(part, cp.Text)))
                    found = {part.call_id: part.parts[0].text for part in parts
                             if isinstance(part, cp.ToolResult)}
                    self.assertEqual([found[call.id] for call in calls],
                                     [words for _, words in results])

    def test_a_broken_transport_ends_in_its_error(self) -> None:
        for dialect, _ in self.dialects:
            for upstream, data in PARALLEL.items():
                pipe = cp.TranslatedStream(dialect, cp.DIALECTS[upstream], cp.Request("asked"))
                out = pipe.feed(data[:len(data) // 2])
                out += pipe.close(cp.UpstreamError("the line broke", 504, "gone"))
                last = self.pieces(dialect, out)[-1]
                self.assertIn("the line broke", json.dumps(last["error"]))
                self.assertEqual((pipe.feed(b"data: {}\n\n"), pipe.close()), (b"", b""))
