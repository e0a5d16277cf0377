"""The grid: 3 client dialects x 3 upstream dialects, the diagonal through the hub as well.

Requests go through the strict checks of tests/fake_upstream.py; its answers, and upstream streams
written out here, come back through the hub and are read by small readers that do not use it.
"""
from __future__ import annotations

import copy
import json
import random
import unittest

from support import cp, translated
import fake_upstream as fu
from copilot_proxy import (DIALECTS, BadRequest, Frame, Model, Request, TranslatedStream,
                           UpstreamError, read_answer)
from wire import (CELLS, NAMES, PARALLEL, PIXEL, REFUSALS, SCHEMA, STOPS, Writer, assert_failed,
                  call, check_order, chunk, read_body, responses_event, run, sse, whole_of)

try:
    import anthropic
    import openai
except ImportError:
    anthropic = openai = None

MODELS = {"chat": ("gpt-4.1", "gpt-5-mini", "claude-haiku-4.5", "gemini-3.1-pro-preview"),
          "responses": ("gpt-5.4",), "messages": ("claude-sonnet-4.6", "claude-haiku-4.5",
                                                  "claude-opus-4.7")}
PATHS = {"chat": fu.CHAT, "responses": fu.RESPONSES, "messages": fu.MESSAGES}


def translate(client: str, upstream: str, body: dict, model: Model) -> tuple:
    edit, request = translated(client, upstream, body, model)
    return edit.body, request


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
        """Where the upstream cannot watch for all of them, or does not say at which it stopped,
        the proxy does."""
        body = dict(Writer("messages", False).user("x").body, stop_sequences=list("abcde"), top_k=3)
        for upstream in ("responses", "chat"):
            sent, request = self.to("messages", upstream, json.loads(json.dumps(body)))
            self.assertEqual({name for name, _ in request.losses}, {"top_k"})
            self.assertEqual(request.cut_at, list("abcde"))
            self.assertNotIn("stop", sent)
        body = dict(Writer("chat", False).user("x").body, stop=["a", "b"])
        sent, request = self.to("chat", "messages", body)
        self.assertEqual((sent["stop_sequences"], request.cut_at), (["a", "b"], []))

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
            self.assertEqual((len(sent["tools"]), len(request.losses)), (2, 2))
        body = dict(Writer("messages", False).user("x").body,
                    tools=[{"type": "web_search_20250305", "name": "web_search"}],
                    tool_choice={"type": "tool", "name": "web_search"})
        with self.assertRaises(BadRequest) as caught:        # a forced tool that nobody runs
            self.to("messages", "chat", copy.deepcopy(body))
        self.assertEqual(caught.exception.param, "tool_choice")
        del body["tool_choice"]
        sent, request = self.to("messages", "chat", body)
        self.assertNotIn("tools", sent)
        self.assertEqual(len(request.losses), 1)

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
