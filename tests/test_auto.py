"""`auto`: the upstream chooses the model of a conversation, and the choice is kept."""
from __future__ import annotations

import concurrent.futures
import tempfile
import unittest
from typing import Any

from support import ProxyCase, Reply, TestClock, Proxy, bearer, chat, message, run_main
import copilot_proxy as cp
from fake_upstream import (AUTO, AUTO_PAIR, CHAT, COUNT_TOKENS, MESSAGES, RESPONSES, Answer,
                           FakeUpstream, make_model)

ROUNDS = 9
TOOL = {"name": "look", "description": "d", "parameters": {"type": "object", "properties": {}}}


class AutoCase(ProxyCase):
    """A Free plan on which only auto works."""

    def setUp(self) -> None:
        super().setUp()
        self.fake.auto_models = ["gpt-5-mini"]
        self.fake.auto_only = True

    def sent(self, *paths: str) -> list[Any]:
        return [r for r in self.fake.requests if r.path in paths]

    def headers_of(self, *paths: str) -> list[Any]:
        return [r.headers.get("copilot-session-token") for r in self.sent(*paths)]

    def ask(self, text: str = "hello", model: str = "auto", **more: Any) -> Reply:
        reply = self.proxy.post("/v1/chat/completions", chat(text, model=model, **more))
        self.assertEqual(reply.status, 200, reply.body)
        return reply


class ConversationTest(AutoCase):
    """Nine rounds of a tool, as clients send them."""

    def check(self, path: str) -> None:
        self.assertEqual(self.fake.count(AUTO), 1)
        self.assertEqual(self.fake.count(path), ROUNDS)
        self.assertEqual(set(self.headers_of(path)), set(self.fake.selectors))

    def test_openai_sdk(self) -> None:
        turns: list[Any] = [{"role": "system", "content": "be good"},
                            {"role": "user", "content": "use the tool"}]
        for at in range(ROUNDS):
            body = {"model": "auto", "messages": turns,
                    "tools": [{"type": "function", "function": TOOL}]}
            reply = self.proxy.post("/v1/chat/completions", body)
            self.assertEqual(reply.status, 200, reply.body)
            self.assertEqual(reply.json["model"], "gpt-5-mini")
            self.assertEqual(reply.headers["x-copilot-proxy-auto"], "gpt-5-mini")
            call = {"id": "call_%d" % at, "type": "function",
                    "function": {"name": "look", "arguments": "{}"}}
            turns += [{"role": "assistant", "content": None, "tool_calls": [call]},
                      {"role": "tool", "tool_call_id": "call_%d" % at, "content": "x"}]
        self.check(CHAT)

    def test_codex(self) -> None:
        items: list[Any] = [{"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": "use the tool"}]}]
        for at in range(ROUNDS):
            body = {"model": "auto:intelligence", "instructions": "You are Codex", "input": items,
                    "stream": True, "store": False, "prompt_cache_key": "0001", "tools": [
                        dict(TOOL, type="function", strict=False)]}
            reply = self.proxy.post("/v1/responses", body, **{"session_id": "0001"})
            self.assertEqual(reply.status, 200, reply.body)
            self.assertIn(b'"model":"gpt-5-mini"', reply.body.replace(b'": "', b'":"'))
            items += [{"type": "function_call", "call_id": "call_%d" % at, "name": "look",
                       "arguments": "{}"},
                      {"type": "function_call_output", "call_id": "call_%d" % at, "output": "x"}]
        self.check(RESPONSES)
        self.assertEqual([r.json["tier"] for r in self.sent(AUTO)], ["intelligence"])

    def test_claude_code(self) -> None:
        turns: list[Any] = [{"role": "user", "content": [
            {"type": "text", "text": "<system-reminder>date</system-reminder>"},
            {"type": "text", "text": "use the tool"}]}]
        tools = [{"name": "look", "description": "d", "input_schema": {"type": "object"}}]
        headers = {"anthropic-version": "2023-06-01", "x-claude-code-session-id": "0001",
                   "anthropic-beta": "context-1m-2025-08-07"}
        for at in range(ROUNDS):
            reply = self.proxy.post("/v1/messages", {
                "model": "auto", "max_tokens": 1000, "stream": True, "system": "You are Claude",
                "messages": turns, "tools": tools}, **headers)
            self.assertEqual(reply.status, 200, reply.body)
            self.assertIn(b"gpt-5-mini", reply.body)
            turns += [{"role": "assistant", "content": [
                          {"type": "tool_use", "id": "toolu_%d" % at, "name": "look",
                           "input": {}}]},
                      {"role": "user", "content": [
                          {"type": "tool_result", "tool_use_id": "toolu_%d" % at,
                           "content": "x"}]}]
        path = CHAT if self.fake.count(CHAT) else RESPONSES
        self.check(path)

    def test_what_goes_to_auto_is_the_newest_words_and_no_more(self) -> None:
        self.proxy.post("/v1/messages", message("", model="auto", messages=[
            {"role": "user", "content": "first"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": [
                {"type": "text", "text": " newest "},
                {"type": "text", "text": "words"}]}]))
        [record] = self.sent(AUTO)
        self.assertEqual(record.json, {"prompt": "newest \nwords"})
        self.assertEqual(record.headers["x-github-api-version"], "2026-08-01")


class KeptTest(AutoCase):
    """When it is asked anew, and when not."""

    def test_an_image_that_the_model_cannot_see_asks_anew_once(self) -> None:
        blind = make_model("blind-1")
        blind["capabilities"]["supports"]["vision"] = False
        self.fake.models.append(blind)
        self.fake.auto_models = ["blind-1", "gpt-5-mini"]
        session = {"x-session-id": "0001"}
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
        turns: list[Any] = [{"role": "user", "content": "hello"}]
        for content in ("a", [image, {"type": "text", "text": "what is it"}], "b", "c"):
            turns += [{"role": "assistant", "content": "x"}, {"role": "user", "content": content}]
            reply = self.proxy.post("/v1/chat/completions",
                                    {"model": "auto", "messages": turns}, **session)
            self.assertEqual(reply.status, 200, reply.body)
        self.assertEqual([r.json.get("has_image") for r in self.sent(AUTO)], [None, True])
        self.assertEqual([r.json["model"] for r in self.sent(CHAT)],
                         ["blind-1"] + 3 * ["gpt-5-mini"])

    def test_another_tier_asks_anew_and_the_same_one_does_not(self) -> None:
        for tier in ("auto", "auto:efficiency", "auto:efficiency", "copilot-auto"):
            self.proxy.post("/v1/chat/completions", chat("a", model=tier), **{"session_id": "1"})
        self.assertEqual([r.json.get("tier") for r in self.sent(AUTO)],
                         [None, "efficiency", None])

    def test_a_compaction_asks_anew_once(self) -> None:
        summary = "This session is being continued from a previous conversation that ran out of " \
                  "context. So far: nothing"
        for text in ("a", summary, summary):
            body = chat("", model="auto", messages=[
                {"role": "user", "content": text}, {"role": "user", "content": "go on"}])
            self.proxy.post("/v1/chat/completions", body, **{"session_id": "1"})
        self.assertEqual(self.fake.count(AUTO), 2)

    def test_first_requests_at_once_share_one_call(self) -> None:
        self.fake.script(AUTO, Answer(0, hold=True))
        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            replies = [pool.submit(self.ask) for _ in range(5)]
            self.assertTrue(self.fake.wait_for(lambda: self.fake.holding == 1, 10))
            self.fake.release()
            self.assertEqual({reply.result().status for reply in replies}, {200})
        self.assertEqual(self.fake.count(AUTO), 1)

    def test_a_refused_selector_is_no_refused_login(self) -> None:
        self.ask()
        exchanges = self.fake.exchanges
        self.fake.selectors.clear()
        self.fake.auto_models = ["gpt-5-mini", "gpt-4o"]
        self.assertEqual(self.ask().json["model"], "gpt-4o")
        self.assertEqual((self.fake.count(AUTO), self.fake.count(CHAT)), (2, 3))
        self.assertEqual(self.fake.exchanges, exchanges)

    def test_a_selector_that_stays_refused_is_replayed_once(self) -> None:
        self.ask()
        self.fake.script(CHAT, *[Answer(401, body="Invalid auto-mode selector\n")] * 3)
        reply = self.proxy.post("/v1/chat/completions", chat("hello", model="auto"))
        self.assertEqual(reply.status, 401)
        self.assertEqual(self.fake.count(AUTO), 2)
        self.assertEqual(self.fake.count(CHAT), 3)

    def test_two_accounts_share_nothing(self) -> None:
        self.fake.github_tokens.add("ghu_second")
        self.ask()
        reply = self.proxy.post("/v1/chat/completions", chat("hello", model="auto"),
                                **bearer("ghu_second"))
        self.assertEqual(reply.status, 200, reply.body)
        self.assertEqual(self.fake.count(AUTO), 2)
        self.assertEqual(len(set(self.headers_of(CHAT))), 2)

    def test_a_named_model_gets_no_selector(self) -> None:
        self.fake.auto_only = False
        self.ask()
        self.ask(model="gpt-5-mini")
        self.assertIsNone(self.headers_of(CHAT)[-1])

    def test_the_api_version_of_auto_is_its_own(self) -> None:
        self.fake.refused_versions.add("2026-08-01")
        self.fake.lenient.add("version")
        self.proxy.app.login.account.change_version("2026-08-01")
        self.ask()
        self.assertEqual([r.headers["x-github-api-version"] for r in self.sent(AUTO, CHAT)],
                         ["2026-08-01", "2026-06-01"])


class AbsentTest(AutoCase):
    """Upstreams without it, and with faults."""

    def test_the_pair_serves_where_auto_is_not_there(self) -> None:
        self.fake.auto_ways = {"pair"}
        for _ in range(2):
            self.assertEqual(self.ask().json["model"], "gpt-5-mini")
        self.assertEqual((self.fake.count(AUTO), self.fake.count(AUTO_PAIR)), (1, 1))

    def test_without_both_the_default_model_answers_and_it_is_said_once(self) -> None:
        self.fake.auto_models = []
        self.fake.auto_only = False
        for text in ("a", "b", "c"):
            reply = self.ask(text)
            self.assertEqual(reply.json["model"], "gpt-4.1")
            self.assertEqual(reply.headers["x-copilot-proxy-auto"], "gpt-4.1")
        self.assertEqual(self.headers_of(CHAT), [None] * 3)
        self.assertEqual((self.fake.count(AUTO), self.fake.count(AUTO_PAIR)), (1, 1))
        self.assertEqual(self.proxy.log_text().count("chooses no model for `auto`"), 1)

    def test_an_old_choice_is_better_than_none(self) -> None:
        clock = TestClock()
        self.fake.selector_s = 1800
        with Proxy(self.fake, clock=clock) as proxy:
            def ask() -> Reply:
                return proxy.post("/v1/chat/completions", chat("hello", model="auto"))
            self.assertEqual(ask().status, 200)
            clock.monotonic_offset_s = 1600                      # due, but good for 200 s
            self.fake.script(AUTO, *[Answer(503, body="down")] * 9)
            self.assertEqual(ask().json["model"], "gpt-5-mini")
            self.assertEqual(len(set(self.headers_of(CHAT))), 1)

    def test_limits_of_auto_are_told(self) -> None:
        self.fake.script(AUTO, *[Answer(429, body={"error": {
            "code": "user_global_rate_limited", "message": "slow down"}})] * 3)
        reply = self.proxy.post("/v1/chat/completions", chat("hello", model="auto"))
        self.assertEqual(reply.status, 429)

    def test_odd_choices_make_no_error_of_the_proxys(self) -> None:
        self.fake.auto_only = False
        for odd in (b"", b"[]", b"<html>", b'{"selected_model": 5}', b'{"session_token": "x"}',
                    b'{"selected_model": {"id": []}, "session_token": "x"}',
                    b'{"selected_model": {"id": "m"}, "session_token": 7}'):
            self.fake.script(AUTO, Answer(200, body=odd))
            with self.subTest(odd):
                reply = self.ask(odd.decode())
                self.assertEqual(reply.json["model"], "gpt-4.1")


class DemoTest(unittest.TestCase):
    """The demo plays it, too."""

    def test_the_demo_has_auto(self) -> None:
        with FakeUpstream() as fake:
            settings = cp.Settings(demo=True, no_history=True)
            server = cp.start_demo(settings)
            self.addCleanup(server.finish, 0.2)
            with Proxy(fake, github_url=settings.github_url, no_history=True) as proxy:
                reply = proxy.post("/v1/chat/completions", chat("hello", model="auto"))
                self.assertEqual(reply.json["model"], "gpt-5-mini")
                self.assertEqual(reply.headers["x-copilot-proxy-auto"], "gpt-5-mini")
                self.assertEqual(proxy.get("/stats").json["auto"], {"gpt-5-mini": 1})


class ListedTest(AutoCase):
    """What people see of it."""

    def names(self) -> list[str]:
        return [m["id"] for m in self.proxy.get("/v1/models").json["data"] if "auto" in m["id"]]

    def test_it_is_listed_once_it_has_answered(self) -> None:
        self.assertEqual(self.names(), [])
        self.ask()
        self.assertEqual(self.names(), ["auto", "auto:efficiency", "auto:balance",
                                        "auto:intelligence"])

    def test_it_is_listed_where_there_is_a_discount_with_the_least_limits(self) -> None:
        for entry in self.fake.models:
            if entry["id"] in ("gpt-5-mini", "gpt-5.3-codex"):
                entry.setdefault("billing", {})["auto_discount"] = 0.1
        listed = {m["id"]: m for m in self.proxy.get("/v1/models").json["data"]}
        self.assertEqual(listed["auto"]["max_input_tokens"], 128000)
        self.assertEqual(listed["auto"]["max_output_tokens"], 64000)
        self.assertEqual(set(listed["auto"]["supported_endpoints"]), {CHAT, RESPONSES, MESSAGES})
        self.assertEqual(listed["gpt-5.3-codex"]["price"]["auto_discount"], 0.1)
        self.assertEqual(self.proxy.get("/v1/models/auto").json["id"], "auto")

    def test_it_is_offered_where_there_is_nothing_else(self) -> None:
        for entry in self.fake.models:
            entry["model_picker_enabled"] = False
        models = [cp.Model.from_entry(entry) for entry in self.fake.models]
        self.assertEqual(cp.pick_model(cp.listed_models(models)[:4], "claude").id, "auto")

    def test_setup_takes_it_by_name_listed_or_not_for_small_tasks_too(self) -> None:
        for client, place in (("claude-code", "ANTHROPIC_DEFAULT_HAIKU_MODEL=%s\n"),
                              ("codex", 'model = "%s"\n')):
            for name, found in (("auto", "auto"), ("auto:efficiency", "auto:efficiency"),
                                ("copilot-auto", "auto")):
                with self.subTest(client=client, name=name), \
                        tempfile.TemporaryDirectory() as home:
                    code, text = run_main(home, "setup", client, "--model", name,
                                          PORT=str(self.proxy.port))
                    self.assertEqual(code, 0, text)
                    self.assertIn(place % found, text)

    def test_what_it_saves_is_counted(self) -> None:
        entry = next(e for e in self.fake.models if e["id"] == "gpt-5-mini")
        entry["billing"]["token_prices"] = {"batch_size": 1000000, "default": {
            "input_price": 100, "output_price": 1000}}
        self.fake.quirks.add("no_credits")
        self.ask()
        self.assertTrue(self.fake.wait_for(lambda: len(self.fake.told) == 1, 5))
        stats = self.proxy.get("/stats").json
        _, total, cached, output, _, _ = self.fake.told[0]
        self.assertEqual(stats["recent"][0]["estimate"], (total * 100 + output * 1000) * 900)
        self.assertEqual(stats["auto"], {"gpt-5-mini": 1})

    def test_an_unknown_tier_is_an_unknown_model(self) -> None:
        reply = self.proxy.post("/v1/chat/completions", chat("a", model="auto:turbo"))
        self.assertEqual(reply.status, 404)
        self.assertEqual(self.fake.count(AUTO), 0)

    def test_tokens_are_counted_for_the_chosen_model(self) -> None:
        self.fake.auto_models = ["claude-sonnet-4.6"]
        body = message("hello", model="auto")
        self.assertGreater(self.proxy.post("/v1/messages/count_tokens", body).json["input_tokens"],
                           0)
        self.assertEqual(self.headers_of(COUNT_TOKENS), list(self.fake.selectors))


if __name__ == "__main__":
    unittest.main()
