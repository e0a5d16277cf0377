"""Tokens that are made for programs: fine-grained ones of a person, those of apps and workflows."""
from __future__ import annotations

import tempfile
import unittest
from typing import Any

from support import REQUESTS, Proxy, ProxyCase, chat, run_main
import copilot_proxy as cp
from fake_upstream import CHAT, EXCHANGE, MODELS, USAGE

PERSONAL, WORKFLOW = "github_pat_11AAAA_made_up", "ghs_made_up_0123456789"
MISSING = "Personal Access Token does not have Copilot Requests permission"


class MachineTokenTest(ProxyCase):
    """A token that a person gives with -g or in the environment."""

    def setUp(self) -> None:
        super().setUp()
        self.fake.machine_tokens = {PERSONAL: "", WORKFLOW: ""}

    def serve(self, token: str, **settings: Any) -> Proxy:
        values = {"copilot_url": self.fake.url} if token.startswith("ghs_") else {}
        proxy: Proxy = self.enter(Proxy(self.fake, github_token=token, **{**values, **settings}))
        return proxy

    def test_all_dialects_are_answered_without_an_exchange(self) -> None:
        for token in (PERSONAL, WORKFLOW):
            proxy = self.serve(token)
            for path, make in REQUESTS:
                with self.subTest(token=token, path=path):
                    self.assertEqual(proxy.post(path, make("hello")).status, 200)
        asked = [r for r in self.fake.requests
                 if token in r.headers.get("authorization", "")]
        self.assertNotIn(EXCHANGE, [r.path for r in asked])

    def test_the_identity_is_that_of_the_command_line_everywhere(self) -> None:
        proxy = self.serve(PERSONAL)
        proxy.post("/v1/chat/completions", chat("hello"))
        own = [r for r in self.fake.requests if PERSONAL in r.headers.get("authorization", "")]
        self.assertLessEqual({USAGE, MODELS, CHAT}, {r.path for r in own})
        for record in own:
            with self.subTest(record.path):
                self.assertEqual(record.headers["authorization"], "Bearer " + PERSONAL)
                self.assertEqual(record.headers["copilot-integration-id"], "copilot-developer-cli")
                self.assertEqual(record.headers["copilot-harness-id"], "copilot-sdk")
                self.assertTrue(record.headers["user-agent"].startswith("copilot/"))
                self.assertNotIn("editor-plugin-version", record.headers)

    def test_a_missing_permission_is_named_and_tried_once(self) -> None:
        for token, hint in ((PERSONAL, 'account permission "Copilot Requests"'),
                            (WORKFLOW, "copilot-requests: write")):
            self.fake.machine_tokens[token] = MISSING
            proxy = self.serve(token)
            reply = proxy.post("/v1/chat/completions", chat("hello"))
            with self.subTest(token):
                self.assertEqual(reply.status, 401)
                text = reply.json["error"]["message"]
                self.assertIn(MISSING, text)
                self.assertIn(hint, text)
                self.assertNotIn(token, text + proxy.log_text())
        self.assertEqual(self.fake.count(CHAT), 0)          # the list of models was refused first

    def test_a_refusal_of_the_call_itself_is_explained_and_tried_once(self) -> None:
        proxy = self.serve(PERSONAL)
        proxy.get("/v1/models")
        self.fake.machine_tokens[PERSONAL] = MISSING
        reply = proxy.post("/v1/chat/completions", chat("hello"))
        self.assertEqual(reply.status, 401)
        self.assertIn('account permission "Copilot Requests"', reply.json["error"]["message"])
        self.assertEqual(self.fake.count(CHAT), 1)

    def test_another_identity_is_refused_in_clear_words(self) -> None:
        proxy = self.serve(PERSONAL, header=("Copilot-Integration-Id=vscode-chat",))
        reply = proxy.post("/v1/chat/completions", chat("hello"))
        self.assertEqual(reply.status, 400)
        self.assertIn("Copilot Requests", reply.json["error"]["message"])

    def test_an_expired_one_is_called_so(self) -> None:
        for token in ("github_pat_11BBBB_expired", "ghs_expired_0123456789"):
            # so long that the request is there before the server itself has asked twice
            proxy = self.serve(token, hiccup_pause_s=0.5)
            reply = proxy.post("/v1/chat/completions", chat("hello"))
            self.assertEqual(reply.status, 401)
            self.assertIn("expired or was revoked, a workflow's ends with its job",
                          reply.json["error"]["message"])

    def test_commands_take_it_from_the_environment(self) -> None:
        with tempfile.TemporaryDirectory() as home:
            for name in ("GH_TOKEN", "GITHUB_TOKEN"):
                code, output = run_main(home, "models", "--github-url", self.fake.url,
                                        **{name: PERSONAL})
                self.assertEqual(code, 0, output)
                self.assertIn("gpt-5-mini", output)

    def test_a_classic_one_is_refused_and_what_works_is_named(self) -> None:
        with self.assertRaisesRegex(cp.AuthError, "classic.*fine-grained.*Copilot Requests"):
            cp.check_github_token("ghp_0123456789abcdef")
        self.assertEqual(cp.check_github_token(PERSONAL + "\n"), PERSONAL)


if __name__ == "__main__":
    unittest.main()
