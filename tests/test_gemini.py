"""Clients that speak Gemini's dialect: requests, answers, streams in both forms, errors, routes."""
from __future__ import annotations

import base64
import json
import unittest
from typing import Any

from support import KEY, Proxy, cp, long_run, side_by_side
from cases import SharedCase
from client_wire import (GeminiWriter, Grid, Laws, gemini_pieces, read_gemini, stream_of,
                         whole_gemini)
from fake_upstream import MESSAGES, Answer, FakeUpstream
from wire import PIXEL, REFUSALS

try:
    from google import genai
    from google.genai import types
except ImportError:
    genai = None

CLAUDE, GPT, GEMINI = "claude-sonnet-4.6", "gpt-5.4", "gemini-3.1-pro-preview"
STOPS = {"stop": "STOP", "tool": "STOP", "length": "MAX_TOKENS"}


def decode(body: dict[str, Any]) -> cp.Request:
    return cp.GEMINI.decode_request(json.loads(json.dumps(body)))


def one(*parts: Any, **more: Any) -> dict[str, Any]:
    return dict({"contents": [{"role": "user", "parts": list(parts)}]}, **more)


class GridTest(Grid, SharedCase):
    """generateContent and streamGenerateContent as server-sent events, for every kind of model."""
    writer = GeminiWriter
    stops = STOPS
    query = "?alt=sse"

    def ask(self, writer: Any, model: str, stream: bool) -> dict[str, Any]:
        method = "streamGenerateContent" + self.query if stream else "generateContent"
        reply = self.proxy.post("/v1beta/models/%s:%s" % (model, method), writer.body)
        self.assertEqual(reply.status, 200, reply.body)
        if not stream:
            return read_gemini(reply.json)
        kind = "application/json" if not self.query else "text/event-stream"
        self.assertEqual(reply.headers["content-type"], kind)
        return read_gemini(whole_gemini(gemini_pieces(reply.body, not self.query)))


class ArrayGridTest(GridTest):
    """The same without alt=sse."""
    query = ""


class LawTest(Laws, unittest.TestCase):
    dialects = ((cp.GEMINI, lambda data: whole_gemini(gemini_pieces(data))),
                (cp.GEMINI_ARRAY, lambda data: whole_gemini(gemini_pieces(data, True))))
    read = staticmethod(read_gemini)
    polite = b"finishReason"

    def pieces(self, dialect: cp.Dialect, out: bytes) -> list[Any]:
        return gemini_pieces(out, dialect is cp.GEMINI_ARRAY)

    def history(self, body: dict[str, Any], results: list[tuple[str, str]]) -> dict[str, Any]:
        parts = [{"functionResponse": {"name": name, "response": {"output": words}}}
                 for name, words in results]
        contents = [{"role": "user", "parts": [{"text": "hi"}]}, body["candidates"][0]["content"]]
        return {"contents": contents + ([{"role": "user", "parts": parts}] if parts else [])}

    def test_a_refusal_is_told_as_safety(self) -> None:
        for upstream, data in REFUSALS.items():
            out = stream_of(cp.GEMINI, upstream, data)[0]
            answer = read_gemini(whole_gemini(gemini_pieces(out)))
            self.assertEqual((answer["text"], answer["stop"]), ("I won't", "SAFETY"))

    def test_a_request_says_the_same_in_both_spellings(self) -> None:
        body = {
            "contents": [{"role": "user", "parts": [
                {"inlineData": {"mimeType": "image/png", "data": PIXEL}}, {"text": "a"}]},
                {"role": "model", "parts": [{"functionCall": {
                    "name": "f", "args": {"snake_case": {"camelCase": 1}}}}]},
                {"role": "user", "parts": [{"functionResponse": {
                    "name": "f", "response": {"output": "x"}}}]}],
            "systemInstruction": {"parts": [{"text": "s"}]},
            "generationConfig": {"maxOutputTokens": 5, "topP": 0.5, "topK": 3, "seed": 4,
                                 "stopSequences": ["E"], "responseMimeType": "application/json",
                                 "thinkingConfig": {"thinkingBudget": 2000}},
            "tools": [{"functionDeclarations": [{"name": "f", "parameters": {
                "type": "OBJECT", "properties": {"a_b": {"type": "STRING"}}}}]}],
            "toolConfig": {"functionCallingConfig": {"mode": "ANY"}}}

        def snake(value: Any, own: bool = False) -> Any:
            if isinstance(value, list):
                return [snake(item, own) for item in value]
            if not isinstance(value, dict):
                return value
            found = {}
            for key, inner in value.items():
                name = key if own else "".join(
                    "_" + letter.lower() if letter.isupper() else letter for letter in key)
                found[name] = snake(inner, own or key in ("args", "response", "parameters"))
            return found

        camel_request, snake_request = decode(body), decode(snake(body))
        self.assertEqual(camel_request, snake_request)
        self.assertEqual(camel_request.losses, [])
        self.assertEqual(camel_request.tools[0].parameters, {
            "type": "object", "properties": {"a_b": {"type": "string"}}})
        self.assertEqual(camel_request.turns[2].parts[0].arguments,
                         '{"snake_case":{"camelCase":1}}')
        self.assertEqual((camel_request.top_k, camel_request.seed, camel_request.thinking_budget),
                         (3, 4, 2000))


class RequestTest(unittest.TestCase):
    def test_calls_without_ids_get_the_same_ones_each_time_and_pair_by_name(self) -> None:
        call = {"functionCall": {"name": "a", "args": {"n": 1}}}
        other = {"functionCall": {"name": "b", "args": {}}}

        def result(name: str, words: str) -> dict[str, Any]:
            return {"functionResponse": {"name": name, "response": {"result": words}}}

        contents = [{"parts": [{"text": "go"}]}, {"role": "model", "parts": [call, other, call]},
                    {"parts": [result("b", "B"), result("a", "A1"), result("a", "A2")]},
                    {"role": "model", "parts": [call]}, {"parts": [result("a", "A3")]}]
        turns = decode({"contents": contents}).turns
        ids = [part.id for part in turns[1].parts]
        self.assertEqual(len(set(ids)), 3)
        self.assertEqual([(part.call_id, part.parts[0].text) for part in turns[2].parts],
                         [(ids[1], "B"), (ids[0], "A1"), (ids[2], "A2")])
        self.assertEqual(turns[4].parts[0].call_id, turns[3].parts[0].id)
        shorter = decode({"contents": contents[:3]}).turns
        self.assertEqual([part.id for part in shorter[1].parts], ids)

    def test_a_result_whose_id_nobody_knows_pairs_by_its_name(self) -> None:
        turns = decode({"contents": [
            {"role": "model", "parts": [{"functionCall": {"id": "c7", "name": "a"}}]},
            {"parts": [{"functionResponse": {"id": "a-1790000-x", "name": "a",
                                             "response": {"error": "no"}}}]}]}).turns
        self.assertEqual(turns[1].parts[0].call_id, "c7")
        self.assertTrue(turns[1].parts[0].is_error)

    def test_allowed_functions_do_not_widen(self) -> None:
        tools = [{"functionDeclarations": [{"name": name} for name in "abc"]}]
        for mode, allowed, names, choice in (
                ("ANY", ["a"], ["a"], cp.Named("a")), ("ANY", ["a", "c"], ["a", "c"], "required"),
                ("AUTO", ["b"], ["b"], "auto"), ("VALIDATED", ["b"], ["b"], "auto"),
                ("any", [], ["a", "b", "c"], "required"),
                ("NONE", ["b"], ["a", "b", "c"], "none")):
            config = {"functionCallingConfig": {"mode": mode, "allowedFunctionNames": allowed}}
            request = decode(one({"text": "x"}, tools=tools, toolConfig=config))
            with self.subTest(mode=mode, allowed=allowed):
                self.assertEqual([tool.name for tool in request.tools], names)
                self.assertEqual(request.tool_choice, choice)
        with self.assertRaisesRegex(cp.BadRequest, "allowedFunctionNames"):
            decode(one({"text": "x"}, tools=tools, toolConfig={"functionCallingConfig": {
                "mode": "ANY", "allowedFunctionNames": ["zzz"]}}))

    def test_schemas_of_google_become_json_schemas(self) -> None:
        self.assertEqual(cp.json_schema_of({
            "type": "OBJECT", "propertyOrdering": ["a"], "properties": {
                "type": {"type": "STRING", "nullable": True, "enum": ["x"], "format": "enum"},
                "list": {"type": "ARRAY", "min_items": "2", "items": {"type": "integer"}},
                "any": {"anyOf": [{"type": "NUMBER"}, {"type": "TYPE_UNSPECIFIED"}]}}}), {
            "type": "object", "properties": {
                "type": {"type": ["string", "null"], "enum": ["x", None]},
                "list": {"type": "array", "minItems": 2, "items": {"type": "integer"}},
                "any": {"anyOf": [{"type": "number"}, {}]}}})

    def test_thinking(self) -> None:
        for config, effort, budget, wants in (
                ({}, None, None, False), ({"thinkingBudget": 0}, "none", None, False),
                ({"thinkingBudget": -1}, None, None, False),
                ({"includeThoughts": True}, "medium", None, True),
                ({"includeThoughts": True, "thinkingBudget": 4000}, None, 4000, True),
                ({"thinkingLevel": "LOW"}, "low", None, False),
                ({"thinkingLevel": "THINKING_LEVEL_UNSPECIFIED"}, None, None, False)):
            request = decode(one({"text": "x"}, generationConfig={"thinkingConfig": config}))
            self.assertEqual((request.effort, request.thinking_budget, request.wants_thoughts),
                             (effort, budget, wants), config)

    def test_lenient_contents(self) -> None:
        for contents in ("hi", {"parts": [{"text": "hi"}]}, {"parts": {"text": "hi"}}, ["hi"],
                         [{"parts": "hi"}], [{"text": "hi"}]):
            (turn,) = decode({"contents": contents}).turns
            self.assertEqual((turn.role, turn.parts), ("user", [cp.Text("hi")]), contents)

    def test_refused(self) -> None:
        text = {"text": "x"}
        for word, body in (
                ("contents", {}), ("contents", {"contents": []}),
                (r"contents\[0\]", {"contents": [5]}),
                ("role", {"contents": [{"role": "alien", "parts": [text]}]}),
                ("cachedContent", one(text, cachedContent="cachedContents/1")),
                ("candidateCount", one(text, generationConfig={"candidateCount": 2})),
                ("responseModalities", one(text, generationConfig={
                    "responseModalities": ["IMAGE"]})),
                ("audio/wav", one({"inlineData": {"mimeType": "audio/wav", "data": "QUJD"}})),
                ("inlineData", one({"inlineData": {"mimeType": "image/png"}})),
                ("fileData", one({"fileData": {"fileUri": "files/abc"}})),
                ("fileData", one({"fileData": {"mimeType": "image/png", "fileUri":
                 "https://generativelanguage.googleapis.com/v1beta/files/abc"}})),
                ("parts", one(5))):
            with self.assertRaisesRegex(cp.BadRequest, word):
                decode(body)

    def test_images_by_address_can_be_fetched(self) -> None:
        file = {"fileUri": "https://example.com/a.png", "mimeType": "image/png"}
        other = {"file_uri": "https://example.com/b.png"}
        body = one({"fileData": file}, {"file_data": other}, {"fileData": {"fileUri": "files/x"}},
                   {"fileData": {"fileUri": "https://example.com/c.pdf",
                                 "mimeType": "application/pdf"}})
        links = cp.linked_images(body)
        self.assertEqual([link.url for link in links], [file["fileUri"], other["file_uri"]])
        links[0].put("image/png", PIXEL)
        cp.replace_with_note(links[1].part)
        del body["contents"][0]["parts"][2:]
        self.assertEqual(decode(body).turns[0].parts, [cp.Image("image/png", PIXEL),
                                                       cp.Text(cp.SHED_IMAGE)])

    def test_what_nobody_runs_is_a_loss(self) -> None:
        request = decode(one({"text": "x"}, {"executableCode": {"code": "1+1"}}, {"odd": {"a": 1}},
                             {"thoughtSignature": base64.b64encode(b"google's own").decode()},
                             safetySettings=[{"category": "X"}], tools=[{"urlContext": {}}],
                             generationConfig={"mediaResolution": "LOW", "seed": 1}))
        self.assertEqual({name for name, _ in request.losses}, {
            "safetySettings", "tools", "executableCode", "odd", "mediaResolution",
            "thoughtSignature"})

    def test_a_signature_that_says_none_is_no_loss(self) -> None:
        for value in ("skip_thought_signature_validator",
                      base64.b64encode(b"skip_thought_signature_validator").decode()):
            request = decode({"contents": [{"role": "model", "parts": [
                {"functionCall": {"name": "f"}, "thoughtSignature": value}]}]})
            self.assertEqual((request.losses, len(request.turns[0].parts)), ([], 1))

    def test_signatures_survive_any_client(self) -> None:
        """Thoughts kept or dropped, the alphabet for URLs, pieces of a stream as contents."""
        state = cp.Reasoning("I think. \u00ff\u00fe>>>", "sig/+?>", None, "messages")
        other = cp.Reasoning("More.", "blob", "rs_1", "responses")
        call = cp.ToolCall("c1", "f", "{}")
        wish = cp.Request("asked", wants_thoughts=True)
        for parts in ([state, call], [other, call], [state, cp.Text("t"), call],
                      [cp.Reasoning("", "red", None, "messages", True), state, call]):
            whole = cp.GEMINI.encode_response(cp.Response("id", "m", parts), wish)
            encoder = cp.GEMINI.stream_encoder(wish)
            data = b"".join(map(encoder.feed, cp.unfold(cp.Response("id", "m", parts))))
            contents = [whole["candidates"][0]["content"]]
            streamed = [piece["candidates"][0]["content"] for piece in gemini_pieces(data)]
            for shown in (contents, streamed):
                for drop in (False, True):
                    kept = json.loads(json.dumps(shown))
                    for content in kept:
                        content["parts"] = [
                            part for part in content["parts"] if not (drop and part.get("thought"))]
                        for part in content["parts"]:
                            if "thoughtSignature" in part:
                                part["thoughtSignature"] = part["thoughtSignature"].replace(
                                    "+", "-").replace("/", "_").rstrip("=")
                    back = decode({"contents": kept})
                    found = [part for turn in back.turns for part in turn.parts]
                    wanted = [cp.replace(part, text="") if drop and isinstance(part, cp.Reasoning)
                              and part.minted_by != "messages" else part for part in parts]
                    with self.subTest(parts=parts, drop=drop, streamed=shown is streamed):
                        self.assertEqual(found, wanted)
                        self.assertEqual(back.losses, [])

    @long_run
    def test_many_calls_and_results_take_linear_time(self) -> None:
        calls = [{"functionCall": {"name": "f%d" % at}} for at in range(20000)]
        results = [{"functionResponse": {"name": "f%d" % at}} for at in reversed(range(20000))]
        turns = decode({"contents": [{"role": "model", "parts": calls},
                                     {"parts": results}]}).turns
        self.assertEqual([part.call_id for part in reversed(turns[1].parts)],
                         [part.id for part in turns[0].parts])


class RouteTest(SharedCase):
    def assert_google_error(self, reply: Any, status: int, word: str) -> dict[str, Any]:
        self.assertEqual(reply.status, status, reply.body)
        error = reply.json["error"]
        self.assertEqual((error["code"], error["status"]), (status, word))
        self.assertTrue(error["message"])
        return dict(error)

    def test_every_spelling_of_the_path(self) -> None:
        for path in ("/v1beta/models/%s:generateContent", "/v1/models/%s:generateContent",
                     "/v1alpha/models/%s:generateContent", "/models/%s%%3AgenerateContent",
                     "/v1beta//models/%s%%3agenerateContent/", "/v1/v1/models/%s:generateContent"):
            reply = self.proxy.post(path % GPT, one({"text": "hi"}))
            self.assertEqual(reply.status, 200, (path, reply.body))
            self.assertEqual(read_gemini(reply.json)["text"], "Echo: hi")

    def test_models(self) -> None:
        entries = self.proxy.get("/v1beta/models").json["models"]
        by_name = {entry["name"]: entry for entry in entries}
        self.assertIn("streamGenerateContent",
                      by_name["models/" + GPT]["supportedGenerationMethods"])
        self.assertIn("embedContent", by_name["models/text-embedding-3-small"][
            "supportedGenerationMethods"])
        self.assertEqual(self.proxy.get("/v1beta/models/" + GPT).json, by_name["models/" + GPT])
        self.assertIn("data", self.proxy.get("/v1/models").json)
        self.assert_google_error(self.proxy.get("/v1beta/models/nope"), 404, "NOT_FOUND")
        self.assert_google_error(self.proxy.get("/v1beta/files"), 404, "NOT_FOUND")

    def test_counts(self) -> None:
        for model in (CLAUDE, GPT, GEMINI):
            for body in (one({"text": "hello there " * 50}),
                         {"generateContentRequest": one({"text": "hello there " * 50})}):
                reply = self.proxy.post("/v1beta/models/%s:countTokens" % model, body)
                self.assertGreater(reply.json["totalTokens"], 90)
                self.assertLess(reply.json["totalTokens"], 400)
        self.assert_google_error(self.proxy.post("/v1beta/models/%s:countTokens" % GPT, {}), 400,
                                 "INVALID_ARGUMENT")

    def test_embeddings(self) -> None:
        path = "/v1beta/models/text-embedding-3-small:"
        whole = self.proxy.post(path + "embedContent", {"content": {"parts": [{"text": "a"}]}})
        batch = self.proxy.post(path + "batchEmbedContents", {"requests": [
            {"content": {"parts": [{"text": word}]}, "output_dimensionality": 8}
            for word in "ab"]})
        self.assertEqual(whole.json["embedding"], {"values": whole.json["embedding"]["values"]})
        self.assertEqual(len(batch.json["embeddings"]), 2)
        self.assertEqual(self.fake.requests[-1].json["dimensions"], 8)
        for body in ({}, {"requests": []}, {"requests": [{"content": {}}]}):
            self.assert_google_error(self.proxy.post(path + "batchEmbedContents", body), 400,
                                     "INVALID_ARGUMENT")

    def test_errors_in_googles_shape(self) -> None:
        path = "/v1beta/models/%s:generateContent"
        post = self.proxy.post
        self.assert_google_error(post(path % "nope-1", one({"text": "x"})), 404, "NOT_FOUND")
        self.assert_google_error(post(path % GPT, b"{"), 400, "INVALID_ARGUMENT")
        self.assert_google_error(post("/v1beta/models/%s:nope" % GPT, {}), 404, "NOT_FOUND")
        self.assert_google_error(self.proxy.get(path % GPT), 404, "NOT_FOUND")
        self.assertEqual(post("/v1/models/" + GPT, {}).headers["allow"], "GET, HEAD")

    def test_a_limit_says_when_to_come_again(self) -> None:
        with FakeUpstream() as fake, Proxy(fake) as proxy:
            for model, upstream in ((CLAUDE, MESSAGES), (GPT, "/responses")):
                fake.script(upstream, Answer(429, {"retry-after": "12"}, {
                    "error": {"message": "slow down", "code": "rate_limited"}}))
                reply = proxy.post("/v1beta/models/%s:generateContent" % model, one({"text": "x"}))
                error = self.assert_google_error(reply, 429, "RESOURCE_EXHAUSTED")
                self.assertEqual(error["details"], [{
                    "@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "12s"}])

    def test_too_long_a_prompt_in_googles_words(self) -> None:
        self.fake.script(MESSAGES, Answer(400, {}, {"type": "error", "error": {
            "type": "invalid_request_error",
            "message": "prompt is too long: 300 tokens > 200 maximum"}}))
        reply = self.proxy.post("/v1beta/models/%s:generateContent" % CLAUDE, one({"text": "x"}))
        error = self.assert_google_error(reply, 400, "INVALID_ARGUMENT")
        self.assertEqual(error["message"], "The input token count (300) exceeds the maximum "
                                           "number of tokens allowed (200).")

    def test_a_key_is_wanted_in_googles_header_and_never_in_the_url(self) -> None:
        with Proxy(self.fake, api_key=(KEY,)) as proxy:
            path = "/v1beta/models/%s:generateContent" % GPT
            self.assertEqual(proxy.post(path, one({"text": "x"}), **{
                "x-goog-api-key": KEY}).status, 200)
            reply = proxy.post(path + "?key=" + KEY, one({"text": "x"}))
            self.assert_google_error(reply, 401, "UNAUTHENTICATED")

    def test_small_models_that_gemini_cli_asks_by_itself(self) -> None:
        for name in ("gemini-2.5-flash", "gemini-2.5-flash-lite", "gemini-3-flash-preview"):
            reply = self.proxy.post("/v1beta/models/%s:generateContent" % name, one({"text": "x"}))
            self.assertEqual((reply.status, reply.json["modelVersion"],
                              reply.headers["x-copilot-proxy-model"]), (200, GEMINI, GEMINI))
        with FakeUpstream() as fake, Proxy(fake) as proxy:
            fake.models = [entry for entry in fake.models if "gemini" not in entry["id"]]
            reply = proxy.post("/v1beta/models/gemini-2.5-flash:generateContent",
                               one({"text": "x"}))
            self.assertEqual(reply.json["modelVersion"], "gpt-5-mini")

    def test_who_began_a_request(self) -> None:
        results = {"functionResponse": {"name": "f", "response": {}}}
        for contents, initiator in (
                ([{"parts": [{"text": "hi"}]}], "user"),
                ([{"role": "model", "parts": [{"functionCall": {"name": "f"}}]},
                  {"role": "user", "parts": [results]}], "agent"),
                ([{"role": "function", "parts": [results, {"text": "and now?"}]}], "agent"),
                ("hi", "user")):
            self.assertEqual(cp.GEMINI.initiator({"contents": contents}), initiator)

    def test_a_cut_stream_is_never_polite(self) -> None:
        for model in (CLAUDE, GPT, GEMINI):
            for query, is_array in (("?alt=sse", False), ("", True)):
                reply = self.proxy.post(
                    "/v1beta/models/%s:streamGenerateContent%s" % (model, query),
                    one({"text": "hi @@events=9 cut=4@@"}))
                self.assertNotIn(b"finishReason", reply.body)
                self.assertIn("error", gemini_pieces(reply.body, is_array)[-1])

    def test_silence_is_filled_with_what_googles_sdk_can_read(self) -> None:
        with Proxy(self.fake, keepalive_s=0.02) as proxy:
            rows = ("?alt=sse", False), ("", True)
            replies = side_by_side(lambda row: proxy.post(
                "/v1beta/models/%s:streamGenerateContent%s" % (GPT, row[0]),
                one({"text": "hi @@events=2 delay_ms=70@@"})), rows)
            for (query, is_array), reply in zip(rows, replies):
                self.assertIn(b"\n\n\n" if query else b"\n\n", reply.body)
                whole_gemini(gemini_pieces(reply.body, is_array))

    def test_the_history_knows_the_dialect(self) -> None:
        self.proxy.post("/v1/models/%s:generateContent" % GPT, one({"text": "x"}))
        row = self.proxy.get("/stats").json["recent"][0]
        self.assertEqual((row["dialect"], row["model"]), ("gemini", GPT))


@unittest.skipUnless(genai, "needs the package google-genai")
class SdkTest(SharedCase):
    def sdk(self) -> Any:
        return genai.Client(api_key="dummy", http_options=types.HttpOptions(
            base_url=self.proxy.url))

    def test_text_and_chat(self) -> None:
        for model in (CLAUDE, GPT, GEMINI):
            client = self.sdk()
            answer = client.models.generate_content(model=model, contents="hi")
            self.assertEqual(answer.text, "Echo: hi")
            chunks = list(client.models.generate_content_stream(
                model=model, contents="hi @@events=20@@"))
            self.assertGreater(len(chunks), 10)
            self.assertEqual(chunks[-1].candidates[0].finish_reason, types.FinishReason.STOP)
            self.assertGreater(chunks[-1].usage_metadata.total_token_count, 1)
            chat = client.chats.create(model=model, config=types.GenerateContentConfig(
                thinking_config=types.ThinkingConfig(include_thoughts=True)))
            for _ in range(2):
                self.assertIn("Echo", "".join(
                    chunk.text or "" for chunk in chat.send_message_stream("think")))
            self.assertRegex(json.dumps(self.fake.requests[-1].json),
                             "encrypted_content|reasoning_opaque|signature")

    def test_tools_images_counts_and_embeddings(self) -> None:
        tool = types.Tool(function_declarations=[types.FunctionDeclaration(
            name="get_weather", parameters=types.Schema(type="OBJECT", properties={
                "city": types.Schema(type="STRING")}))])
        config = types.GenerateContentConfig(
            tools=[tool], thinking_config=types.ThinkingConfig(thinking_level="HIGH"))
        for model in (CLAUDE, GPT, GEMINI):
            client = self.sdk()
            ask = types.Content(role="user", parts=[
                types.Part(text="use the tool"),
                types.Part.from_bytes(data=base64.b64decode(PIXEL), mime_type="image/png")])
            answer = client.models.generate_content(model=model, contents=[ask], config=config)
            (call,) = answer.function_calls
            self.assertEqual((call.name, call.args), ("get_weather", {"city": "Paris"}))
            result = types.Part.from_function_response(name=call.name, response={"output": "rain"})
            final = client.models.generate_content(model=model, config=config, contents=[
                ask, answer.candidates[0].content, types.Content(role="user", parts=[result])])
            self.assertIn("rain", final.text)
            self.assertGreater(client.models.count_tokens(
                model=model, contents="hello").total_tokens, 0)
        found = client.models.embed_content(model="text-embedding-3-small", contents=["a", "b"])
        self.assertEqual(len(found.embeddings), 2)

    def test_errors(self) -> None:
        client = self.sdk()
        with self.assertRaises(genai.errors.ClientError) as caught:
            client.models.generate_content(model="nope-1", contents="hi")
        self.assertEqual((caught.exception.code, caught.exception.status), (404, "NOT_FOUND"))
        with self.assertRaises(genai.errors.APIError):
            list(client.models.generate_content_stream(
                model=GPT, contents="hi @@events=5 cut=2@@"))


if __name__ == "__main__":
    unittest.main()
