"""As whom the proxy calls: API version, editor, and what kind of interaction a request is."""
from __future__ import annotations

import unittest
from typing import Any

from support import ProxyCase, chat, message, response
import copilot_proxy as cp
from fake_upstream import CHAT, MESSAGES, RESPONSES

SUMMARY = ("CRITICAL: Respond with TEXT ONLY. Do NOT call any tools.\n"
           "Your task is to create a detailed summary of the conversation so far.\n"
           "7. Pending Tasks: none\n")
TITLES = [{"type": "text", "text": "You are Claude Code.\nGenerate a concise, sentence-case title"}]


class IdentityTest(ProxyCase):
    """Headers of calls."""

    def header(self, path: str, name: str) -> Any:
        return [r.headers.get(name) for r in self.fake.requests if r.path == path][-1]

    def test_the_newest_version_is_sent_first_and_the_next_one_after_a_refusal(self) -> None:
        self.proxy.post("/v1/chat/completions", chat("a"))
        self.assertEqual(self.header(CHAT, "x-github-api-version"), "2026-08-01")
        for refused, expected in (("2026-08-01", "2026-06-01"), ("2026-06-01", "2025-05-01")):
            self.fake.refused_versions.add(refused)
            self.assertEqual(self.proxy.post("/v1/chat/completions", chat("a")).status, 200)
            self.assertEqual(self.header(CHAT, "x-github-api-version"), expected)
        calls = self.fake.count(CHAT)
        self.proxy.post("/v1/chat/completions", chat("a"))
        self.assertEqual(self.fake.count(CHAT), calls + 1)              # it is remembered

    def test_a_summary_that_the_client_asks_for_is_a_compaction(self) -> None:
        self.proxy.post("/v1/messages", message(SUMMARY))
        self.assertEqual(self.header(MESSAGES, "x-interaction-type"), "conversation-compaction")
        self.assertEqual(self.header(MESSAGES, "x-initiator"), "agent")
        self.assertEqual(self.header(MESSAGES, "openai-intent"), "conversation-agent")

    def test_titles_and_the_like_are_background(self) -> None:
        self.proxy.post("/v1/messages", message("hello", system=TITLES))
        self.assertEqual(self.header(MESSAGES, "x-interaction-type"), "conversation-background")
        self.assertEqual(self.header(MESSAGES, "x-initiator"), "agent")

    def test_the_proxys_own_summary_and_the_upstreams_item_are_compactions(self) -> None:
        for compacts in (False, True):
            self.fake.compacts = compacts
            self.proxy.app.login.account.memory.refused.clear()
            with self.subTest(compacts=compacts):
                reply = self.proxy.post("/v1/responses/compact", response("a"))
                self.assertEqual(reply.status, 200)
                self.assertEqual(self.header(RESPONSES, "x-interaction-type"),
                                 "conversation-compaction")
                self.assertEqual(self.header(RESPONSES, "x-initiator"), "agent")

    def test_turns_of_people_and_of_tools_are_what_they_were(self) -> None:
        self.proxy.post("/v1/messages", message("hello"))
        self.assertEqual(self.header(MESSAGES, "x-interaction-type"), "conversation-agent")
        self.assertEqual(self.header(MESSAGES, "x-initiator"), "user")
        for row in cp.SIDE_REQUESTS:
            self.assertIn(row.kind, ("agent", "background", "compaction"))


if __name__ == "__main__":
    unittest.main()
