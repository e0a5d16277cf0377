"""Requests like the one before, and plain ones, of which less is looked at (sections 8, 18)."""

from __future__ import annotations

import http.client
import itertools
import json
import unittest
from typing import Any
from unittest import mock

from support import FakeUpstream, Proxy, cp, send

BODY = {"model": "gpt-4.1", "messages": [{"role": "user", "content": "hi"}]}
PATH = "/v1/chat/completions"


class SameHeadTest(unittest.TestCase):
    """One connection, whose requests have the same head."""

    def setUp(self) -> None:
        self.fake = FakeUpstream().__enter__()
        self.addCleanup(self.fake.close)

    def connect(self, proxy: Proxy) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30)
        self.addCleanup(connection.close)
        return connection

    def ask(self, connection: http.client.HTTPConnection, **headers: str) -> Any:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return send(connection, "POST", PATH, BODY, named)

    def test_a_key_that_is_taken_back_is_refused_at_once(self) -> None:
        with Proxy(self.fake) as proxy:
            key = cp.new_key()
            issued = proxy.app.accounts.issue_key(key)
            connection = self.connect(proxy)
            for _ in range(3):
                self.assertEqual(self.ask(connection, x_api_key=key).status, 200)
            proxy.app.accounts.forget([issued])
            self.assertEqual(self.ask(connection, x_api_key=key).status, 401)

    def test_another_key_is_looked_at(self) -> None:
        with Proxy(self.fake, api_key=["sk-right-key"]) as proxy:
            connection = self.connect(proxy)
            for key, status in (("sk-right-key", 200), ("sk-right-key", 200),
                                ("sk-wrong-key", 401)):
                self.assertEqual(self.ask(connection, x_api_key=key).status, status)

    def test_another_host_or_origin_is_looked_at(self) -> None:
        with Proxy(self.fake) as proxy:
            for odd in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
                connection = self.connect(proxy)
                self.assertEqual(self.ask(connection).status, 200)
                self.assertEqual(self.ask(connection).status, 200)
                self.assertEqual(self.ask(connection, **odd).status, 403)

    def test_each_answer_to_a_page_says_that_it_may_be_read(self) -> None:
        with Proxy(self.fake, cors_origin=["http://page.example"]) as proxy:
            connection = self.connect(proxy)
            for _ in range(3):
                reply = self.ask(connection, Origin="http://page.example")
                self.assertEqual(reply.status, 200)
                self.assertEqual(reply.headers["access-control-allow-origin"],
                                 "http://page.example")

    def test_another_length_is_the_same_head(self) -> None:
        with Proxy(self.fake) as proxy:
            connection = self.connect(proxy)
            for size in (1, 1, 20, 300):
                body = dict(BODY, messages=[{"role": "user", "content": "a" * size}])
                self.assertEqual(send(connection, "POST", PATH, body, {}).status, 200)
                self.assertEqual(json.loads(self.fake.requests[-1].body), body)


class PlainBodyTest(unittest.TestCase):
    """A plain request goes up as it is: a quick look says what all steps together would do."""

    FIELDS = {
        "stream": (True, False, None), "temperature": (0.5, None), "top_p": (1, None),
        "max_tokens": (5, None), "n": (1, 2), "tools": ([],), "tool_choice": ("auto",),
        "store": (True,), "stop": ("a", None), "input": ("hi", None), "functions": ([],)}
    TURNS = ([], [{"role": "user", "content": "hi"}],
             [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
             [{"role": "system", "content": "be brief"}],
             [{"role": "user", "content": "hi", "name": None}])

    def outcome(self, body: Any, model: cp.Model) -> Any:
        try:
            plan = cp.Plan.make(cp.CHAT, cp.CHAT, json.loads(json.dumps(body)), model, 0, "k")
        except cp.ProxyError as error:
            return str(error)
        return plan.edit.body, plan.edit.changed, list(plan.edit.losses), plan.streams

    def test_a_quick_look_changes_nothing(self) -> None:
        models = [cp.Model.from_entry({
            "id": name, "vendor": vendor, "supported_endpoints": ["/chat/completions"],
            "capabilities": {"type": "chat", "limits": {"max_output_tokens": 100}}})
            for name, vendor in (("gpt-4.1", "Azure OpenAI"), ("gpt-5.2", "OpenAI"),
                                 ("kimi-k2", "Azure OpenAI"), ("claude-sonnet-4.5", "Anthropic"),
                                 ("gemini-3-pro", "Google"))]
        cases = [{name: value} for name, values in self.FIELDS.items() for value in values]
        pairs = [dict(one, **two) for one, two in itertools.combinations(cases, 2)]
        quick = 0
        for more in [{}, *cases, *pairs]:
            for turns in self.TURNS:
                for model in models:
                    body = dict(more, model=model.id, messages=turns)
                    found = self.outcome(body, model)
                    quick += cp.CHAT.fits_as_is(body) and turns != []
                    with mock.patch.object(type(cp.CHAT), "fits_as_is", lambda *_: False):
                        self.assertEqual(found, self.outcome(body, model), body)
        self.assertGreater(quick, 20)


if __name__ == "__main__":
    unittest.main()
