"""Fields that are added to a body go into the client's own bytes (sections 7 and 20)."""

from __future__ import annotations

import json
import unittest

from support import FakeUpstream, Proxy, cp

BODY = b'\n { "model" : "m",  "messages":[{"role":"user","content":"\\u00e4 {"}] , "n":1.0}'


class SpliceTest(unittest.TestCase):
    def setUp(self) -> None:
        self.edit = cp.BodyEdit(json.loads(BODY))

    def sent(self, model: str = "m") -> bytes:
        data = cp.fit_model(BODY, self.edit, model)
        self.assertEqual(json.loads(data), dict(self.edit.body, model=model))
        return data

    def test_what_is_added_stands_before_the_clients_own_bytes(self) -> None:
        self.edit.set(self.edit.body, "stream_options", {"include_usage": True})
        self.assertTrue(self.edit.changed)
        self.assertTrue(self.sent().endswith(BODY.partition(b"{")[2]))
        self.edit.set(self.edit.body, "stream_options", {"include_usage": False})
        self.edit.set(self.edit.body, "max_tokens", 5)
        self.assertTrue(self.sent().endswith(BODY.partition(b"{")[2]))
        self.assertIn(b'"model":"other",  "messages":[{"role":"user","content":"\\u00e4 {"}]',
                      self.sent("other"))

    def test_every_other_change_writes_the_body_anew(self) -> None:
        def change_an_added_one() -> None:
            self.edit.set(self.edit.body, "added", {"a": 1})
            self.edit.set(self.edit.body["added"], "a", 2)

        def drop_an_added_one() -> None:
            self.edit.set(self.edit.body, "added", 1)
            self.edit.drop(self.edit.body, "added")

        for change in (
            lambda: self.edit.set(self.edit.body, "n", 2),
            lambda: self.edit.drop(self.edit.body, "n"),
            lambda: self.edit.set(self.edit.body["messages"][0], "name", "x"),
            lambda: self.edit.replace(self.edit.body, "messages", []),
            change_an_added_one,
            drop_an_added_one,
        ):
            self.edit = cp.BodyEdit(json.loads(BODY))
            change()
            self.assertTrue(self.edit.is_rewritten)
            self.sent()

    def test_a_streamed_request_keeps_its_bytes(self) -> None:
        body = (b'{"stream":true,  "model":"gpt-4.1","messages":'
                b'[{"role":"user","content":"h\\u0069"}]}')
        with FakeUpstream() as fake, Proxy(fake) as proxy:
            self.assertEqual(proxy.post("/v1/chat/completions", body).status, 200)
            sent = next(one for one in fake.requests if one.path == "/chat/completions")
        self.assertTrue(sent.body.endswith(body[1:]), sent.body)
        self.assertEqual(sent.json["stream_options"], {"include_usage": True})


if __name__ == "__main__":
    unittest.main()
