"""The SDKs of Google, Ollama and Azure OpenAI reach every kind of model: a text and a whole turn
with a tool, streamed and not (section 20, and the dialects of clients alone in 7)."""
from __future__ import annotations

import json
import unittest
from typing import Any

from cases import SharedCase
from fake_upstream import CHAT, MESSAGES, RESPONSES
from wire import SCHEMA

try:
    from google import genai
    from google.genai import types
except ImportError:
    genai = None
try:
    import ollama
except ImportError:
    ollama = None
try:
    import openai
except ImportError:
    openai = None

#: a Claude, a GPT that speaks two dialects, one for Responses alone, one for Chat alone -> where
#: a client gets its answer whose dialect no upstream speaks
MODELS = {"claude-sonnet-4.6": MESSAGES, "gpt-5-mini": RESPONSES, "gpt-5.3-codex": RESPONSES,
          "gemini-3.1-pro-preview": CHAT}
WORDS, ASK = "h\u00e9llo \U0001f600 you", "use the tool, parallel"
CITY = {"city": "Paris"}


class Doors(SharedCase):
    """Mixed into the tests of an SDK: `say` and `use_tool` are one turn each."""

    #: model -> the upstream's path, where it is not the one of MODELS
    paths: dict[str, str] = {}

    def say(self, model: str, stream: bool) -> str:
        """The answer's text."""
        raise NotImplementedError

    def use_tool(self, model: str, stream: bool) -> tuple[list[tuple[str, Any]], str]:
        """([(name, arguments) of each call], the answer to their results r0, r1, ...)."""
        raise NotImplementedError

    def cells(self) -> Any:
        for model, path in MODELS.items():
            for stream in (False, True):
                before = len(self.fake.requests)
                with self.subTest(model=model, stream=stream):
                    yield model, stream
                    sent = {one.path for one in self.fake.requests[before:]
                            if one.path in (CHAT, RESPONSES, MESSAGES)}
                    self.assertEqual(sent, {self.paths.get(model, path)})

    def check_text(self) -> None:
        for model, stream in self.cells():
            self.assertEqual(self.say(model, stream), "Echo: " + WORDS)

    def check_tools(self) -> None:
        for model, stream in self.cells():
            calls, words = self.use_tool(model, stream)
            self.assertEqual(len(calls), 2)
            self.assertEqual(calls[0], ("get_weather", CITY))
            self.assertIn("r1", words)


@unittest.skipUnless(genai, "needs the package google-genai")
class GoogleTest(Doors):
    def test_text(self) -> None:
        self.check_text()

    def test_tools(self) -> None:
        self.check_tools()

    def ask(self, model: str, stream: bool, contents: Any, **more: Any) -> Any:
        """(all parts of the answer, its text)"""
        client = genai.Client(api_key="dummy", http_options=types.HttpOptions(
            base_url=self.proxy.url))
        self.addCleanup(client.close)
        how = dict(model=model, contents=contents, config=types.GenerateContentConfig(**more))
        pieces = list(client.models.generate_content_stream(**how)) if stream else [
            client.models.generate_content(**how)]
        parts = [part for piece in pieces for part in piece.candidates[0].content.parts or ()]
        self.assertEqual(pieces[-1].candidates[0].finish_reason, types.FinishReason.STOP)
        self.assertGreater(pieces[-1].usage_metadata.total_token_count, 1)
        return parts, "".join(part.text or "" for part in parts if not part.thought)

    def say(self, model: str, stream: bool) -> str:
        return str(self.ask(model, stream, WORDS)[1])

    def use_tool(self, model: str, stream: bool) -> tuple[list[tuple[str, Any]], str]:
        tool = types.Tool(function_declarations=[types.FunctionDeclaration(
            name="get_weather", parameters_json_schema=SCHEMA)])
        asked = types.Content(role="user", parts=[types.Part(text=ASK)])
        parts, _ = self.ask(model, stream, [asked], tools=[tool])
        calls = [part.function_call for part in parts if part.function_call]
        results = [types.Part.from_function_response(name=call.name, response={
            "output": "r%d" % at}) for at, call in enumerate(calls)]
        contents = [asked, types.Content(role="model", parts=parts),
                    types.Content(role="user", parts=results)]
        words = self.ask(model, stream, contents, tools=[tool])[1]
        return [(call.name, call.args) for call in calls], words


@unittest.skipUnless(ollama, "needs the package ollama")
class OllamaTest(Doors):
    def test_text(self) -> None:
        self.check_text()

    def test_tools(self) -> None:
        self.check_tools()

    def ask(self, model: str, stream: bool, messages: list[Any], **more: Any) -> Any:
        """One message: the pieces of a stream as the package's own examples join them."""
        client = ollama.Client(self.proxy.url)
        self.addCleanup(client._client.close)
        answer: Any = client.chat(model, messages, stream=stream, **more)
        if not stream:
            self.assertTrue(answer.done)
            return answer.message
        pieces = list(answer)
        self.assertEqual([piece.done for piece in pieces], [False] * (len(pieces) - 1) + [True])
        calls = [call for piece in pieces for call in piece.message.tool_calls or ()]
        return ollama.Message(role="assistant", tool_calls=calls or None, content="".join(
            piece.message.content or "" for piece in pieces))

    def say(self, model: str, stream: bool) -> str:
        return str(self.ask(model, stream, [{"role": "user", "content": WORDS}]).content)

    def use_tool(self, model: str, stream: bool) -> tuple[list[tuple[str, Any]], str]:
        tool = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
        messages: list[Any] = [{"role": "user", "content": ASK}]
        messages.append(self.ask(model, stream, messages, tools=[tool]))
        calls = [(call.function.name, call.function.arguments)
                 for call in messages[-1].tool_calls]
        messages += [{"role": "tool", "tool_name": name, "content": "r%d" % at}
                     for at, (name, _) in enumerate(calls)]
        return calls, str(self.ask(model, stream, messages, tools=[tool]).content)


class AzureCase(Doors):
    def azure(self) -> Any:
        client = openai.AzureOpenAI(azure_endpoint=self.proxy.url, api_key="dummy",
                                    api_version="2024-10-21", max_retries=0)
        self.addCleanup(client.close)
        return client


@unittest.skipUnless(openai, "needs the package openai")
class AzureChatTest(AzureCase):
    paths = {"gpt-5-mini": CHAT, "claude-sonnet-4.6": CHAT}

    def test_text(self) -> None:
        self.check_text()

    def test_tools(self) -> None:
        self.check_tools()

    def ask(self, model: str, stream: bool, messages: list[Any], **more: Any) -> Any:
        completions = self.azure().chat.completions
        if not stream:
            return completions.create(model=model, messages=messages, **more).choices[0].message
        with completions.stream(model=model, messages=messages, **more) as events:
            return events.get_final_completion().choices[0].message

    def say(self, model: str, stream: bool) -> str:
        return str(self.ask(model, stream, [{"role": "user", "content": WORDS}]).content)

    def use_tool(self, model: str, stream: bool) -> tuple[list[tuple[str, Any]], str]:
        tool = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
        messages: list[Any] = [{"role": "user", "content": ASK}]
        said = self.ask(model, stream, messages, tools=[tool])
        messages.append(json.loads(said.model_dump_json(exclude_none=True, include={
            "role": True, "content": True, "tool_calls": {
                "__all__": {"id": True, "type": True, "function": {"name", "arguments"}}}})))
        messages += [{"role": "tool", "tool_call_id": call.id, "content": "r%d" % at}
                     for at, call in enumerate(said.tool_calls)]
        calls = [(call.function.name, json.loads(call.function.arguments))
                 for call in said.tool_calls]
        return calls, str(self.ask(model, stream, messages, tools=[tool]).content)


@unittest.skipUnless(openai, "needs the package openai")
class AzureResponsesTest(AzureCase):
    paths = {"claude-sonnet-4.6": CHAT}

    def test_text(self) -> None:
        self.check_text()

    def test_tools(self) -> None:
        self.check_tools()

    def ask(self, model: str, stream: bool, items: Any, **more: Any) -> Any:
        responses = self.azure().responses
        if not stream:
            return responses.create(model=model, input=items, **more)
        with responses.stream(model=model, input=items, **more) as events:
            return events.get_final_response()

    def say(self, model: str, stream: bool) -> str:
        return str(self.ask(model, stream, WORDS).output_text)

    def use_tool(self, model: str, stream: bool) -> tuple[list[tuple[str, Any]], str]:
        tool = {"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": False}
        said = self.ask(model, stream, ASK, tools=[tool])
        found = [item for item in said.output if item.type == "function_call"]
        results = [{"type": "function_call_output", "call_id": item.call_id, "output": "r%d" % at}
                   for at, item in enumerate(found)]
        final = self.ask(model, stream, results, tools=[tool], previous_response_id=said.id)
        calls = [(item.name, json.loads(item.arguments)) for item in found]
        return calls, str(final.output_text)


if __name__ == "__main__":
    unittest.main()
