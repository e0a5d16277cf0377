"""Clients that speak Ollama's dialect: chat and generate in lines, the small routes, its port."""
from __future__ import annotations

import json
import socket
import unittest
from typing import Any

from support import KEY, Proxy, RawClient, cp
from cases import CliCase, SharedCase
from client_wire import (Grid, Laws, OllamaWriter, ollama_pieces, read_ollama, stream_of,
                         whole_ollama)
from wire import PARALLEL, PIXEL

try:
    import ollama
except ImportError:
    ollama = None

CLAUDE, GPT, GEMINI = "claude-sonnet-4.6", "gpt-5.4", "gemini-3.1-pro-preview"
USER = {"role": "user", "content": "hi"}


def decode(**body: Any) -> cp.Request:
    return cp.OLLAMA.decode_request(dict({"model": "m", "messages": [USER]}, **body))


class GridTest(Grid, SharedCase):
    writer = OllamaWriter
    stops = {"stop": "stop", "tool": "stop", "length": "length"}

    def ask(self, writer: Any, model: str, stream: bool) -> dict[str, Any]:
        more = {} if stream else {"stream": False}           # a stream is what it gives unasked
        reply = self.proxy.post("/api/chat", dict(writer.body, model=model, **more))
        self.assertEqual(reply.status, 200, reply.body)
        if not stream:
            self.assertEqual(reply.headers["content-type"], "application/json")
            return read_ollama(reply.json)
        self.assertEqual(reply.headers["content-type"], "application/x-ndjson")
        return read_ollama(whole_ollama(ollama_pieces(reply.body)))


class LawTest(Laws, unittest.TestCase):
    dialects = ((cp.OLLAMA, lambda data: whole_ollama(ollama_pieces(data))),)
    read = staticmethod(read_ollama)
    polite = b'"done":true'

    def read_whole(self, body: dict[str, Any]) -> dict[str, Any]:
        return super().read_whole(body)

    def pieces(self, dialect: cp.Dialect, out: bytes) -> list[Any]:
        return ollama_pieces(out)

    def history(self, body: dict[str, Any], results: list[tuple[str, str]]) -> dict[str, Any]:
        said = [{"role": "tool", "tool_name": name, "content": words} for name, words in results]
        return {"model": "m", "messages": [USER, body["message"], *said]}

    def test_a_generated_text_that_is_cut_off_ends_in_an_error(self) -> None:
        for upstream, data in PARALLEL.items():
            frames = [raw + b"\n\n" for raw in data.split(b"\n\n") if raw]
            for cut in range(len(frames) - 3):
                out, pipe = stream_of(cp.OLLAMA_GENERATE, upstream, b"".join(frames[:cut]))
                self.assertTrue(pipe.failure)
                self.assertNotIn(self.polite, out)
                self.assertIn("error", ollama_pieces(out)[-1])
            out = stream_of(cp.OLLAMA_GENERATE, upstream, data)[0]
            cuts = iter(lambda: 1, 0)
            self.assertEqual(stream_of(cp.OLLAMA_GENERATE, upstream, data, cuts)[0], out)
            self.assertTrue(ollama_pieces(out)[-1]["done"])

    def test_durations_are_those_of_the_request(self) -> None:
        ticks = iter((5, 900, 901))
        out, _ = stream_of(cp.OLLAMA, "chat", PARALLEL["chat"], elapsed_ns=lambda: next(ticks))
        last = ollama_pieces(out)[-1]
        self.assertEqual([last[name] for name in (
            "total_duration", "prompt_eval_duration", "eval_duration")], [900, 5, 895])


class RequestTest(unittest.TestCase):
    def test_options(self) -> None:
        request = decode(options={
            "temperature": 0.5, "top_p": 0.9, "top_k": 40, "seed": 7, "num_predict": 99,
            "stop": "END", "num_ctx": 8192, "num_gpu": 1}, keep_alive="5m")
        self.assertEqual((request.temperature, request.top_p, request.top_k, request.seed,
                          request.max_output_tokens, request.stop),
                         (0.5, 0.9, 40, 7, 99, ["END"]))
        self.assertEqual(request.losses, [])
        for limit in (-1, -2, None):
            self.assertIsNone(decode(options={"num_predict": limit}).max_output_tokens)
        self.assertEqual(dict(decode(options={"mirostat": 1}).losses),
                         {"mirostat": cp.NO_COUNTERPART})

    def test_think_and_format(self) -> None:
        for think, effort, hides in ((True, "medium", False), (False, "none", True),
                                     ("low", "low", False), (None, None, False)):
            request = decode(think=think)
            self.assertEqual((request.effort, request.hides_thinking), (effort, hides))
        self.assertEqual(decode(format="json").output_schema, {"type": "json_object"})
        self.assertEqual(decode(format={"type": "object"}).output_schema["schema"],
                         {"type": "object"})
        self.assertIsNone(decode(format="").output_schema)
        with self.assertRaisesRegex(cp.BadRequest, "format"):
            decode(format="yaml")

    def test_results_pair_by_id_by_name_or_by_order(self) -> None:
        calls = [{"function": {"name": name, "arguments": {"n": at}}}
                 for at, name in enumerate("aba")]
        for results, wanted in (
                ([{}, {}, {}], [0, 1, 2]),
                ([{"tool_name": "b"}, {"tool_name": "a"}, {"name": "a"}], [1, 0, 2]),
                ([{"tool_name": "a"}, {}, {}], [0, 1, 2])):
            messages = [USER, {"role": "assistant", "tool_calls": calls}]
            messages += [dict(result, role="tool", content="r") for result in results]
            turns = decode(messages=messages).turns
            ids = [part.id for part in turns[1].parts]
            self.assertEqual([part.call_id for part in turns[2].parts],
                             [ids[at] for at in wanted])

    def test_images(self) -> None:
        for data in (PIXEL, "data:image/png;base64," + PIXEL, PIXEL.rstrip("=")):
            request = decode(messages=[dict(USER, images=[data])])
            self.assertEqual(request.turns[0].parts[1], cp.Image("image/png", PIXEL))
        for odd in ("QUJD", 5, ""):
            with self.assertRaisesRegex(cp.BadRequest, "images"):
                decode(messages=[dict(USER, images=[odd])])

    def test_generate_is_a_chat_of_one_prompt(self) -> None:
        request = cp.OLLAMA_GENERATE.decode_request({
            "model": "m", "prompt": "p", "system": "s", "images": [PIXEL], "raw": False,
            "context": [], "template": ""})
        self.assertEqual([(turn.role, turn.parts[0]) for turn in request.turns],
                         [("system", cp.Text("s")), ("user", cp.Text("p"))])
        self.assertEqual(request.losses, [])
        with self.assertRaisesRegex(cp.BadRequest, "suffix"):
            cp.OLLAMA_GENERATE.decode_request({"model": "m", "prompt": "p", "suffix": "s"})


class RouteTest(SharedCase):
    def assert_ollama_error(self, reply: Any, status: int, word: str) -> None:
        self.assertEqual(reply.status, status, reply.body)
        self.assertEqual(set(reply.json), {"error"})
        self.assertIn(word, reply.json["error"])

    def test_generate(self) -> None:
        for model in (CLAUDE, GPT, GEMINI):
            whole = self.proxy.post("/api/generate", {"model": model, "prompt": "hi",
                                                      "stream": False}).json
            self.assertEqual((whole["response"], whole["done"]), ("Echo: hi", True))
            lines = ollama_pieces(self.proxy.post("/api/generate", {
                "model": model + ":latest", "prompt": "hi @@events=9@@"}).body)
            self.assertEqual([line["done"] for line in lines[-2:]], [False, True])
            self.assertGreater(len("".join(line["response"] for line in lines)), 50)
            self.assertEqual(lines[0]["model"], model + ":latest")

    def test_loading_answers_at_once(self) -> None:
        before = len(self.fake.requests)
        for path, body in (("/api/chat", {"messages": []}), ("/api/chat", {}),
                           ("/api/generate", {}), ("/api/generate", {"prompt": ""})):
            for keep, reason in ((None, "load"), (0, "unload"), ("5m", "load")):
                reply = self.proxy.post(path, dict(body, model=GPT, keep_alive=keep))
                self.assertEqual((reply.status, reply.json["done"], reply.json["done_reason"]),
                                 (200, True, reason))
        self.assertNotIn("/responses", [sent.path for sent in self.fake.requests[before:]])
        self.assert_ollama_error(self.proxy.post("/api/chat", {"model": "nope"}), 404, "not found")

    def test_small_routes(self) -> None:
        self.assertRegex(self.proxy.get("/api/version").json["version"], r"\A0\.\d+\.\d+\Z")
        self.assertEqual(self.proxy.get("/api/ps").json, {"models": []})
        tags = {entry["model"]: entry for entry in self.proxy.get("/api/tags").json["models"]}
        self.assertEqual(len(tags[GPT]["digest"]), 64)
        for body in ({"model": GPT}, {"name": GPT}):
            shown = self.proxy.post("/api/show", body).json
            self.assertEqual(shown["capabilities"], ["completion", "tools", "vision", "thinking"])
            info = shown["model_info"]
            self.assertEqual(info[info["general.architecture"] + ".context_length"], 272000 + 4096)
        self.assertEqual(self.proxy.post("/api/pull", {"model": GPT}).json, {"status": "success"})
        self.assert_ollama_error(self.proxy.post("/api/pull", {"model": "nope"}), 404, "not found")
        for path in ("create", "copy", "push", "blobs/sha256:0"):
            self.assert_ollama_error(self.proxy.post("/api/" + path, {}), 400, "cannot be changed")
        reply = self.proxy.request("DELETE", "/api/delete", {"model": GPT})
        self.assert_ollama_error(reply, 400, "cannot be changed")
        self.assert_ollama_error(self.proxy.get("/api/nope"), 404, "route")
        self.assert_ollama_error(self.proxy.get("/api/chat"), 405, "POST")

    def test_embeddings(self) -> None:
        model = "text-embedding-3-small"
        found = self.proxy.post("/api/embed", {"model": model, "input": ["a", "b"]}).json
        self.assertEqual(len(found["embeddings"]), 2)
        self.assertGreater(found["prompt_eval_count"], 0)
        single = self.proxy.post("/api/embed", {"model": model, "input": "a"}).json
        old = self.proxy.post("/api/embeddings", {"model": model, "prompt": "a"}).json
        self.assertEqual(single["embeddings"], [old["embedding"]])
        self.assert_ollama_error(self.proxy.post("/api/embed", {"model": model}), 400, "input")

    def test_errors(self) -> None:
        self.assert_ollama_error(self.proxy.post("/api/chat", b"["), 400, "JSON")
        for body, word in (({"messages": "x"}, "messages"),
                           ({"messages": [{"role": "alien"}]}, "role"), ({"stream": 1}, "stream"),
                           ({"tools": [5]}, "tools")):
            body = dict({"model": GPT, "messages": [USER]}, **body)
            self.assert_ollama_error(self.proxy.post("/api/chat", body), 400, word)
        with Proxy(self.fake, api_key=(KEY,)) as proxy:
            self.assert_ollama_error(proxy.post("/api/chat", {"model": GPT}), 401, "key")

    def test_a_cut_stream_never_says_done(self) -> None:
        for model in (CLAUDE, GPT, GEMINI):
            for marker in ("cut=4", "error=4", "noend=1"):
                reply = self.proxy.post("/api/chat", {"model": model, "messages": [
                    {"role": "user", "content": "hi @@events=9 %s@@" % marker}]})
                self.assertNotIn(b'"done":true', reply.body)
                self.assertIn("error", ollama_pieces(reply.body)[-1])

    def test_silence_is_filled_with_what_json_readers_skip(self) -> None:
        with Proxy(self.fake, keepalive_s=0.02) as proxy:
            reply = proxy.post("/api/chat", {"model": GPT, "messages": [
                {"role": "user", "content": "hi @@events=3 delay_ms=50@@"}]})
            self.assertRegex(reply.body, b"\n +{")
            whole_ollama(ollama_pieces(reply.body))

    def test_lines_arrive_one_by_one_over_a_raw_socket(self) -> None:
        body = json.dumps({"model": GPT, "messages": [
            {"role": "user", "content": "hi @@events=4 bytewise=1@@"}]}).encode()
        with RawClient(self.proxy.port) as client:
            client.send(b"POST /api/chat HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/"
                        b"json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            answer = client.begin("POST")
            data = answer.read()
        self.assertEqual(answer.headers["content-type"], "application/x-ndjson")
        whole_ollama(ollama_pieces(data))

    def test_the_front_door_is_a_page_for_browsers_alone(self) -> None:
        for accept in ("", "*/*", "application/json"):
            reply = self.proxy.get("/", Accept=accept)
            self.assertEqual((reply.status, reply.body), (200, b"Ollama is running"))
        self.assertEqual(self.proxy.request("HEAD", "/").status, 200)
        reply = self.proxy.get("/", Accept="text/html,application/xhtml+xml")
        self.assertIn(b"<!doctype html>", reply.body)

    def test_the_history_knows_the_dialect(self) -> None:
        self.proxy.post("/api/chat", {"model": GPT, "messages": [USER]})
        self.assertEqual(self.proxy.get("/stats").json["recent"][0]["dialect"], "ollama")


class PortTest(CliCase):
    def free_port(self) -> int:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            return int(sock.getsockname()[1])

    def test_a_second_port_serves_the_same(self) -> None:
        port = self.free_port()
        self.start("--ollama-port", str(port)).wait_for_url()
        with RawClient(port) as client:
            client.send(b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = client.begin("GET")
            self.assertEqual(answer.status, 200)
            self.assertTrue(json.loads(answer.read())["models"])

    def test_a_port_in_use_is_named_with_its_flag(self) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen(1)
            code, text = self.run_here("start", "--port", "0", "--ollama-port",
                                       str(sock.getsockname()[1]))
        self.assertEqual(code, 1)
        self.assertIn("Ollama itself", text)
        code, text = self.run_here("start", "--ollama-port", "70000")
        self.assertEqual(code, 2)
        self.assertIn("--ollama-port", text)


@unittest.skipUnless(ollama, "needs the package ollama")
class SdkTest(SharedCase):
    def test_everything_that_the_package_reads(self) -> None:
        client = ollama.Client(self.proxy.url)
        self.assertIn(GPT, [model.model for model in client.list().models])
        self.assertIn("tools", client.show(GPT).capabilities)
        self.assertEqual(client.pull(GPT).status, "success")
        self.assertEqual(list(client.ps().models), [])
        embedded = client.embed("text-embedding-3-small", ["a", "b"])
        self.assertEqual(len(embedded.embeddings), 2)
        with self.assertRaises(ollama.ResponseError) as caught:
            client.chat("nope", [USER])
        self.assertEqual(caught.exception.status_code, 404)
        with self.assertRaises(ollama.ResponseError):
            list(client.chat(GPT, [{"role": "user", "content": "hi @@events=5 cut=2@@"}],
                             stream=True))

    def test_chat_tools_and_images(self) -> None:
        tool = {"type": "function", "function": {"name": "get_weather", "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}}}}}
        for model in (CLAUDE, GPT, GEMINI):
            client = ollama.Client(self.proxy.url)
            messages: list[Any] = [{"role": "user", "content": "use the tool", "images": [PIXEL]}]
            answer = client.chat(model, messages, tools=[tool], think=True)
            (call,) = answer.message.tool_calls
            self.assertEqual(call.function.arguments, {"city": "Paris"})
            messages += [answer.message, {"role": "tool", "content": "rain",
                                          "tool_name": call.function.name}]
            parts = list(client.chat(model, messages, tools=[tool], stream=True))
            self.assertIn("rain", "".join(part.message.content for part in parts))
            self.assertTrue(parts[-1].done)
            self.assertEqual(client.generate(model, "hi").response, "Echo: hi")


if __name__ == "__main__":
    unittest.main()
