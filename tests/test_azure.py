"""Clients that believe to speak to Azure: its paths, its lists, its error."""
from __future__ import annotations

import unittest
from typing import Any

from support import KEY, Proxy, chat
from cases import SharedCase
from wire import events_of

try:
    import openai
except ImportError:
    openai = None

CHAT_PATH = "/openai/deployments/%s/chat/completions?api-version=2024-10-21"


class RouteTest(SharedCase):
    def test_the_deployment_is_the_model_whatever_the_body_says(self) -> None:
        for model in ("gpt-4.1", "gpt-5.4", "claude-sonnet-4.6"):
            for named in ("another", model, None):
                body = dict(chat("hi"), model=named)
                reply = self.proxy.post(CHAT_PATH % model, body)
                self.assertEqual((reply.status, reply.json["model"]), (200, model), reply.body)
            reply = self.proxy.post(CHAT_PATH % model, dict(chat("hi"), stream=True))
            self.assertEqual(events_of(reply.body)[-1], "[DONE]")

    def test_all_forms_of_paths(self) -> None:
        body = dict(chat("hi"), model="gpt-4.1")
        for path in ("/openai/v1/chat/completions", "/openai/chat/completions",
                     "/api/v1/chat/completions", "/openai/v1/chat/completions?api-version=preview",
                     "/v1beta/openai/chat/completions", "/v1/openai/v1/chat/completions"):
            self.assertEqual(self.proxy.post(path, body).status, 200, path)
        asked = {"model": "gpt-5.4", "input": "hi"}
        for path in ("/openai/responses?api-version=2025-04-01-preview", "/openai/v1/responses",
                     "/openai/deployments/gpt-5.4/responses", "/api/v1/responses"):
            self.assertEqual(self.proxy.post(path, asked).json["object"], "response", path)
        message = {"model": "claude-sonnet-4.6", "max_tokens": 99, "messages": [
            {"role": "user", "content": "hi"}]}
        self.assertEqual(self.proxy.post("/api/v1/messages", message).json["type"], "message")
        texts = {"input": ["a"]}
        reply = self.proxy.post("/openai/deployments/text-embedding-3-small/embeddings", texts)
        self.assertEqual(len(reply.json["data"]), 1)
        reply = self.proxy.post("/openai/deployments/gpt-4.1/completions", {"prompt": "hi"})
        self.assertEqual(reply.json["choices"][0]["text"], "Echo: hi")

    def test_lists(self) -> None:
        for path in ("/openai/models?api-version=1", "/openai/v1/models", "/api/v1/models"):
            self.assertEqual(self.proxy.get(path).json, self.proxy.get("/v1/models").json)
        listed = self.proxy.get("/openai/deployments?api-version=1").json
        self.assertEqual(listed["object"], "list")
        self.assertIn({"id": "gpt-5.4", "model": "gpt-5.4", "status": "succeeded",
                       "object": "deployment"}, listed["data"])

    def test_errors(self) -> None:
        reply = self.proxy.post(CHAT_PATH % "nope", chat("hi"))
        self.assert_openai_error(reply, 404, "DeploymentNotFound")
        reply = self.proxy.post("/openai/deployments/gpt-4.1/images/generations", {})
        self.assert_openai_error(reply, 404, "unknown_url")
        self.assert_openai_error(self.proxy.post("/openai/v1/chat/completions", dict(
            chat("hi"), model="nope")), 404, "model_not_found")
        self.assert_openai_error(self.proxy.get(CHAT_PATH % "gpt-4.1"), 405)
        self.assert_openai_error(self.proxy.post(CHAT_PATH % "gpt-4.1", b"{"), 400)

    def test_its_header_carries_the_key(self) -> None:
        with Proxy(self.fake, api_key=(KEY,)) as proxy:
            self.assertEqual(proxy.post(CHAT_PATH % "gpt-4.1", chat("hi")).status, 401)
            reply = proxy.post(CHAT_PATH % "gpt-4.1", chat("hi"), **{"api-key": KEY})
            self.assertEqual(reply.status, 200)

    def test_the_history_knows_what_was_asked(self) -> None:
        self.proxy.post(CHAT_PATH % "gpt-4.1", chat("hi"))
        self.assertEqual(self.proxy.get("/stats").json["recent"][0]["dialect"], "chat")


@unittest.skipUnless(openai, "needs the package openai")
class SdkTest(SharedCase):
    def test_azure_openai(self) -> None:
        client: Any = openai.AzureOpenAI(azure_endpoint=self.proxy.url, api_key="dummy",
                                         api_version="2024-10-21", max_retries=0)
        for model in ("gpt-4.1", "gpt-5.4", "claude-sonnet-4.6"):
            answer = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "hi"}])
            self.assertEqual(answer.choices[0].message.content, "Echo: hi")
            stream = client.chat.completions.create(
                model=model, stream=True, messages=[{"role": "user", "content": "hi"}])
            self.assertEqual("".join(chunk.choices[0].delta.content or "" for chunk in stream
                                     if chunk.choices), "Echo: hi")
        self.assertEqual(client.responses.create(model="gpt-5.4", input="hi").output_text,
                         "Echo: hi")
        found = client.embeddings.create(model="text-embedding-3-small", input=["a"],
                                         encoding_format="float")
        self.assertEqual(len(found.data), 1)
        self.assertTrue(client.models.list().data)
        with self.assertRaises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="nope", messages=[
                {"role": "user", "content": "hi"}])
        self.assertEqual(caught.exception.code, "DeploymentNotFound")


if __name__ == "__main__":
    unittest.main()
