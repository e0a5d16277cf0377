"""The first five minutes on an account of late 2026: retired names, what answers for them, where
that is said, and that no text of the product names a model that is gone."""
from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import unittest
import unittest.mock
from typing import Any, Iterator

from support import (DOCUMENTS, Proxy, ProxyCase, chat, clean_environment, compiled,
                     document, message, response, run_main, wait_until)
import copilot_proxy as cp
from gauges import the_source
from fake_upstream import (CHAT, EMBEDDINGS, MESSAGES, MODELS, RESPONSES, Answer, FakeUpstream,
                           make_model, today_models)

TODAY = [cp.Model.from_entry(entry) for entry in today_models()]
HEADER = "x-copilot-proxy-model"

#: a name that today's list does not have -> what answers
SUBSTITUTES = (
    # the included GPTs, and the small ones
    ("gpt-4.1", "gpt-5-mini"), ("gpt-4.1-2025-04-14", "gpt-5-mini"), ("gpt-4o", "gpt-5-mini"),
    ("gpt-4o-mini", "gpt-5-mini"), ("openai/gpt-4o-mini", "gpt-5-mini"), ("gpt-4", "gpt-5-mini"),
    ("gpt-4-turbo", "gpt-5-mini"), ("gpt-4o-2024-11-20", "gpt-5-mini"),
    ("gpt-4.1-mini", "gpt-5-mini"), ("gpt-3.5-turbo", "gpt-5-mini"),
    ("gpt-3.5-turbo-0613", "gpt-5-mini"), ("chatgpt-4o-latest", "gpt-5-mini"),
    ("o3-mini", "gpt-5-mini"), ("o4-mini", "gpt-5-mini"), ("GPT-4.1", "gpt-5-mini"),
    # the large ones
    ("gpt-5", "gpt-5.4"), ("gpt-5.1", "gpt-5.4"), ("gpt-5.2", "gpt-5.4"), ("o3", "gpt-5.4"),
    ("gpt-5-chat-latest", "gpt-5.4"), ("gpt-5.2-pro", "gpt-5.4"),
    # those for code
    ("gpt-5-codex", "gpt-5.3-codex"), ("gpt-5.1-codex", "gpt-5.3-codex"),
    ("gpt-5.1-codex-max", "gpt-5.3-codex"), ("gpt-5.2-codex", "gpt-5.3-codex"),
    ("gpt-5-2-codex", "gpt-5.3-codex"), ("codex-mini-latest", "gpt-5.4-mini"),
    ("gpt-5.1-codex-mini", "gpt-5.4-mini"),
    # Claude
    ("claude-opus-4.1", "claude-opus-4.8"), ("claude-opus-4-1-20250805", "claude-opus-4.8"),
    ("claude-opus-4.5", "claude-opus-4.8"), ("claude-opus-4", "claude-opus-5"),
    ("claude-sonnet-4.5", "claude-sonnet-4.6"), ("claude-sonnet-4", "claude-sonnet-5"),
    ("claude-sonnet-4-20250514", "claude-sonnet-5"), ("claude-3.7-sonnet", "claude-sonnet-5"),
    ("claude-3-7-sonnet-latest", "claude-sonnet-5"),
    ("claude-3-haiku-20240307", "claude-haiku-4.5"),
    ("claude-fable-5", ""),                              # a class of its own, not retired
    # the other families
    ("gemini-3-pro", "gemini-3.1-pro-preview"), ("gemini-3-pro-preview", "gemini-3.1-pro-preview"),
    ("gemini-3.1-pro", "gemini-3.1-pro-preview"), ("gemini-2.5-pro", "gemini-3.1-pro-preview"),
    ("gemini-2.0-flash-001", "gemini-3.6-flash"), ("gemini-2.5-flash", "gemini-3.6-flash"),
    ("grok-code-fast-1", "grok-4.5"), ("grok-4", "grok-4.5"), ("kimi-k2.7-code", "kimi-k3"),
    ("mai-code-1-flash", "mai-code-1-flash-picker"),
    # newer than the list
    ("gpt-99", "gpt-5.5"), ("gpt-6-mini", "gpt-5.4-mini"), ("gpt-6.1-luna", "gpt-5.6-luna"),
    ("gpt-7-codex", "gpt-5.3-codex"), ("claude-opus-5-5", "claude-opus-5"),
    ("claude-haiku-6", "claude-haiku-4.5"), ("gemini-4-pro", "gemini-3.1-pro-preview"),
    ("grok-9", "grok-4.5"), ("kimi-k4", "kimi-k3"),
    # mistyped, of another kind, of nobody
    ("gpt-5.3-codx", ""), ("gpt-9-wonder", ""), ("gpt-image-1", ""), ("gpt-4o-audio-preview", ""),
    ("gpt-oss-120b", ""), ("text-embedding-ada-002", ""), ("llama-3", ""), ("gpt", ""),
    ("gemini", ""), ("claude", ""), ("-", ""), ("kimi", ""), ("o3-wonder", ""))


def model(model_id: str, **more: Any) -> cp.Model:
    return cp.Model.from_entry(dict(make_model(model_id), **more))


class NameTest(unittest.TestCase):
    """Which model a name means."""

    def found(self, asked: str, models: list[cp.Model]) -> str:
        found = cp.resolve_model(asked, models, {})
        return found.id if found else ""

    def test_a_name_that_is_gone_finds_the_nearest_living_model_of_its_family(self) -> None:
        for asked, wanted in SUBSTITUTES:
            with self.subTest(asked):
                self.assertEqual(self.found(asked, TODAY), wanted)
                found = cp.resolve_model(asked, TODAY, {})
                self.assertFalse(found and cp.is_same_model(asked, found))

    def test_every_retired_name_is_answered_and_never_by_a_retired_model(self) -> None:
        for name in cp.RETIRED_MODELS:
            with self.subTest(name):
                found = self.found(name, TODAY)
                self.assertTrue(found)
                self.assertNotIn(found, cp.RETIRED_MODELS)

    def test_a_retired_name_that_is_still_listed_is_used_as_it_is(self) -> None:
        for name in cp.RETIRED_MODELS:
            for entry in (model(name), model(name, model_picker_enabled=False)):
                found = cp.resolve_model(name, [*TODAY, entry], {})
                self.assertIs(found, entry)
                self.assertTrue(cp.is_same_model(name, entry))

    def test_without_a_living_family_a_cheap_model_answers(self) -> None:
        lists = (("gpt-5-mini", ["claude-opus-5", "gpt-5-mini", "gemini-3.6-flash"]),
                 ("claude-haiku-4.5", ["claude-opus-5", "claude-haiku-4.5"]),
                 ("claude-opus-5", ["claude-opus-5"]), ("", ["text-embedding-3-small"]), ("", []))
        for wanted, ids in lists:
            models = [one for one in TODAY if one.id in ids]
            self.assertEqual(self.found("grok-code-fast-1", models), wanted)
        self.assertEqual(self.found("wonder-1", TODAY), "")

    def test_neither_hidden_nor_disabled_models_answer_for_others(self) -> None:
        models = [model("gpt-5.3", policy={"state": "disabled"}), model("gpt-5.4"),
                  model("gpt-5.2.1", model_picker_enabled=False)]
        self.assertEqual(self.found("gpt-5.2", models), "gpt-5.4")

    def test_a_class_that_the_account_lacks_is_no_reason_to_ask_another_for_a_living_model(
            self) -> None:
        models = [one for one in TODAY if "opus" not in one.id]
        self.assertEqual(self.found("claude-opus-4.1", models), "claude-sonnet-4.6")
        self.assertEqual(self.found("claude-opus-6", models), "")
        self.assertEqual(self.found("opus", models), "")

    def test_spellings_and_classes_are_the_same_model(self) -> None:
        for asked, wanted in (("claude-haiku-4-5-20251001", "claude-haiku-4.5"),
                              ("anthropic/claude-sonnet-4-6", "claude-sonnet-4.6"),
                              ("openai/gpt-5-mini", "gpt-5-mini"), (" GPT-5-mini", "gpt-5-mini"),
                              ("gpt-5.4-latest", "gpt-5.4"), ("opus", "claude-opus-5"),
                              ("sonnet[1m]", "claude-sonnet-5"),
                              ("claude-haiku", "claude-haiku-4.5"),
                              ("claude-opus-4-8[1m]", "claude-opus-4.8")):
            with self.subTest(asked):
                found = cp.resolve_model(asked, TODAY, {})
                assert found is not None
                self.assertEqual(found.id, wanted)
                self.assertTrue(cp.is_same_model(asked, found))

    def test_the_nearest_names_begin_with_the_one_that_would_answer(self) -> None:
        near = cp.nearest_ids("grok-code-fast-1", TODAY)
        self.assertEqual((near[0], len(set(near))), ("grok-4.5", 3))
        self.assertEqual(len(set(cp.nearest_ids("gpt-4.1", TODAY))), 3)

    def test_long_and_odd_names_take_no_time(self) -> None:
        for name in ("gpt-" + "4" * 190, "gpt-" + "4." * 90, "o1-" + "mini-" * 35, "k" * 200,
                     "kimi-" + "k2.7-" * 38, "claude-" + "9" * 190, "gpt-" + "-" * 190,
                     "gpt-\u0664", "gpt-4\u00b2", "gpt-9999999999"):
            with self.subTest(name[:20]):
                began = time.perf_counter()
                cp.resolve_model(name, TODAY, {})
                cp.fate_of_name(name, TODAY)
                self.assertLess(time.perf_counter() - began, 0.5)

    def test_what_becomes_of_a_name_in_somebodys_settings(self) -> None:
        for name, models, words in (
                ("gpt-5-mini", TODAY, ""), ("opus", TODAY, ""), ("auto", TODAY, ""),
                ("auto:balance", TODAY, ""), ("gpt-5-mini", [], ""),
                ("gpt-4.1", TODAY, "GitHub retired it on 2026-06-01; gpt-5-mini answers instead"),
                ("gpt-4.1", [], "GitHub retired it on 2026-06-01"),
                ("gpt-99", TODAY, "this account does not list it; gpt-5.5 answers instead"),
                ("wonder", TODAY, "this account does not list it; requests with it get 404")):
            self.assertEqual(cp.fate_of_name(name, models), words)
        self.assertEqual(cp.fate_of_name("gpt-4.1", TODAY, True),
                         "GitHub retired it on 2026-06-01; requests with it get 404")


class TodayCase(ProxyCase):
    """A server for an account of today."""

    def setUp(self) -> None:
        super().setUp()
        self.fake.models = today_models()

    def log_line(self, proxy: Proxy, path: str) -> str:
        """The newest line of a request to `path`."""
        def newest() -> str:
            lines = [ln for ln in proxy.log_text().splitlines() if " %s model=" % path in ln]
            return lines[-1] if lines else ""
        return str(wait_until(newest, path))


class AnswerTest(TodayCase):
    """Where it is said which model answered."""

    def test_the_answer_the_header_and_the_log_name_the_model_that_answered(self) -> None:
        for path, make, sent_to in (("/chat/completions", chat, CHAT),
                                    ("/responses", response, RESPONSES),
                                    ("/messages", message, RESPONSES)):
            for stream in (False, True):
                with self.subTest(path=path, stream=stream):
                    self.proxy.logs.clear()
                    reply = self.proxy.post("/v1" + path, make("hi", "gpt-4.1", stream=stream))
                    self.assertEqual(reply.status, 200, reply)
                    self.assertEqual(reply.headers[HEADER], "gpt-5-mini")
                    text = reply.body.replace(b": ", b":")
                    self.assertIn(b'"model":"gpt-5-mini"', text)
                    self.assertNotIn(b"gpt-4.1", text)
                    self.assertEqual(self.fake.last(sent_to).json["model"], "gpt-5-mini")
                    self.assertIn(" model=gpt-4.1->gpt-5-mini ", self.log_line(self.proxy, path))

    def test_a_translated_answer_names_it_too(self) -> None:
        for path, make in (("/v1/chat/completions", chat), ("/v1/responses", response)):
            for stream in (False, True):
                reply = self.proxy.post(path, make("hi", "claude-opus-4-1", stream=stream))
                self.assertEqual((reply.status, reply.headers[HEADER]), (200, "claude-opus-4.8"))
                self.assertIn(b"claude-opus-4.8", reply.body)
                self.assertNotIn(b"opus-4-1", reply.body)
                self.assertEqual(self.fake.last(MESSAGES).json["model"], "claude-opus-4.8")

    def test_a_newer_name_is_answered_and_said_just_the_same(self) -> None:
        for asked, used in (("gpt-99", "gpt-5.5"), ("claude-opus-9", "claude-opus-5")):
            reply = self.proxy.post("/v1/chat/completions", chat("hi", asked))
            self.assertEqual((reply.status, reply.json["model"], reply.headers[HEADER]),
                             (200, used, used))

    def test_the_default_model_is_named_when_auto_was_asked_for(self) -> None:
        reply = self.proxy.post("/v1/chat/completions", chat("hi", "auto"))
        self.assertEqual((reply.status, reply.json["model"], reply.headers[HEADER]),
                         (200, "gpt-5-mini", "gpt-5-mini"))

    def test_the_same_model_keeps_the_name_that_was_asked_for(self) -> None:
        with Proxy(self.fake, model_alias=("fast=gpt-5-mini",)) as proxy:
            for asked, used in (("gpt-5-mini", "gpt-5-mini"), ("fast", "gpt-5-mini"),
                                ("claude-haiku-4-5-20251001", "claude-haiku-4.5"),
                                ("sonnet", "claude-sonnet-5"), ("openai/gpt-5-mini", "gpt-5-mini")):
                with self.subTest(asked):
                    reply = proxy.post("/v1/messages", message("hi", asked))
                    self.assertEqual((reply.status, reply.json["model"]), (200, asked))
                    self.assertEqual(reply.headers[HEADER], used)
            self.assertIn(" model=fast->gpt-5-mini ", proxy.log_text())
            self.assertIn(" model=gpt-5-mini route=", proxy.log_text())

    def test_an_alias_of_a_retired_model_says_what_answered(self) -> None:
        with Proxy(self.fake, model_alias=("fast=gpt-4.1",)) as proxy:
            reply = proxy.post("/v1/chat/completions", chat("hi", "fast"))
            self.assertEqual((reply.json["model"], reply.headers[HEADER]),
                             ("gpt-5-mini", "gpt-5-mini"))

    def test_an_account_that_still_lists_the_model_gets_it(self) -> None:
        with FakeUpstream() as fake, Proxy(fake) as proxy:
            for asked in ("gpt-4.1", "grok-code-fast-1", "gpt-4o"):
                reply = proxy.post("/v1/chat/completions", chat("hi", asked))
                self.assertEqual((reply.json["model"], reply.headers[HEADER]), (asked, asked))
                self.assertEqual(fake.last(CHAT).json["model"], asked)

    def test_the_body_goes_up_as_it_came_but_for_the_name(self) -> None:
        raw = b'{ "model" : "gpt-4.1",  "messages": [{"role":"user", "content":"gpt-4.1?"}] }'
        self.assertEqual(self.proxy.post("/v1/chat/completions", raw).status, 200)
        self.assertEqual(self.fake.last(CHAT).body,
                         raw.replace(b'"model" : "gpt-4.1"', b'"model":"gpt-5-mini"'))

    def test_every_other_route_says_it_too(self) -> None:
        reply = self.proxy.post("/v1/completions", {"model": "gpt-4.1", "prompt": ["a", "b"]})
        self.assertEqual((reply.status, reply.json["model"], reply.headers[HEADER]),
                         (200, "gpt-5-mini", "gpt-5-mini"))
        reply = self.proxy.post("/v1/messages/count_tokens", message("hi", "claude-opus-4.1"))
        self.assertEqual((reply.status, reply.headers[HEADER]), (200, "claude-opus-4.8"))
        reply = self.proxy.post("/v1/responses/input_tokens", response("hi", "gpt-4.1"))
        self.assertEqual((reply.status, reply.headers[HEADER]), (200, "gpt-5-mini"))
        reply = self.proxy.post("/v1/responses/compact", response("hi", "gpt-4.1"))
        self.assertEqual((reply.status, reply.headers[HEADER]), (200, "gpt-5-mini"))
        reply = self.proxy.post("/v1/embeddings", {"model": "text-embedding-3-small", "input": "a"})
        self.assertEqual((reply.status, reply.headers[HEADER]), (200, "text-embedding-3-small"))
        for asked, shown in (("gpt-4.1", "gpt-5-mini"), ("claude-haiku-4-5", "claude-haiku-4-5")):
            reply = self.proxy.get("/v1/models/" + asked)
            self.assertEqual((reply.status, reply.json["id"]), (200, shown))
            self.assertIn(reply.headers[HEADER], ("gpt-5-mini", "claude-haiku-4.5"))

    def test_an_error_of_the_upstream_names_the_model_in_its_header(self) -> None:
        self.fake.script(CHAT, Answer(400, {"error": {"message": "no", "code": "odd"}}))
        reply = self.proxy.post("/v1/chat/completions", chat("hi", "gpt-4.1"))
        self.assertEqual((reply.status, reply.headers[HEADER]), (400, "gpt-5-mini"))

    def test_the_history_has_both_names(self) -> None:
        with Proxy(self.fake, no_history=False) as proxy:
            proxy.post("/v1/chat/completions", chat("hi", "gpt-4.1"))
            rows = wait_until(lambda: proxy.get("/history").json["rows"])
            self.assertEqual((rows[0]["asked"], rows[0]["model"]), ("gpt-4.1", "gpt-5-mini"))

    def test_a_retired_fallback_still_answers(self) -> None:
        with Proxy(self.fake, fallback="gpt-4.1") as proxy:
            self.fake.script(MESSAGES, Answer(402, {"error": {
                "message": "You have no quota", "code": "quota_exceeded"}}))
            reply = proxy.post("/v1/messages", message("hi", "claude-sonnet-5"))
            self.assertEqual((reply.status, reply.json["model"], reply.headers[HEADER]),
                             (200, "gpt-5-mini", "gpt-5-mini"))
            self.assertEqual(reply.headers["x-copilot-proxy-fallback"],
                             "claude-sonnet-5 -> gpt-5-mini")
            self.assertIn(" model=claude-sonnet-5->gpt-5-mini ", self.log_line(proxy, "/messages"))

    def test_an_odd_id_of_the_upstream_stays_one_line_in_header_and_log(self) -> None:
        self.fake.models.append(make_model("odd\r\nx-evil: 1\x1b[31m", "OpenAI", (CHAT,)))
        with Proxy(self.fake, model_alias=("odd=odd\r\nx-evil: 1\x1b[31m",)) as proxy:
            reply = proxy.post("/v1/chat/completions", chat("hi", "odd"))
            self.assertNotIn("x-evil", reply.headers)
            self.assertTrue(reply.headers[HEADER].isprintable())
            self.assertNotIn("\x1b", proxy.log_text())


class StrictTest(TodayCase):
    """--strict-models: nobody answers for another."""

    settings = {"strict_models": True, "model_alias": ("fast=gpt-5-mini", "old=gpt-4.1")}

    def test_another_model_is_refused_with_the_three_nearest_names(self) -> None:
        self.proxy.get("/v1/models")
        for asked, first in (("gpt-4.1", "gpt-5-mini"), ("old", ""), ("gpt-99", "gpt-5.5"),
                             ("claude-opus-4-1", "claude-opus-4.8"), ("gpt-4o-mini", "gpt-5-mini"),
                             ("grok-code-fast-1", "grok-4.5")):
            for path, make in (("/v1/chat/completions", chat), ("/v1/messages", message),
                               ("/v1/responses", response), ("/v1/messages/count_tokens", message)):
                reply = self.proxy.post(path, make("hi", asked))
                self.assertEqual(reply.status, 404, reply)
                self.assertNotIn(HEADER, reply.headers)
                text = reply.json["error"]["message"]
                near = text.partition("nearest: ")[2].split(", ")
                known = [entry["id"] for entry in self.fake.models]
                self.assertEqual(len([name for name in near if name in known]), 3, text)
                self.assertIn(first, near[0])
        for path in (CHAT, MESSAGES, RESPONSES, EMBEDDINGS):
            self.assertEqual(self.fake.count(path), 0)

    def test_a_retired_name_is_told_its_date(self) -> None:
        reply = self.proxy.post("/v1/chat/completions", chat("hi", "gpt-4.1"))
        self.assertIn("GitHub retired it on 2026-06-01", reply.json["error"]["message"])

    def test_the_model_itself_in_any_spelling_is_served(self) -> None:
        for asked in ("gpt-5-mini", "fast", "claude-haiku-4-5-20251001", "sonnet", "auto"):
            reply = self.proxy.post("/v1/messages", message("hi", asked))
            self.assertEqual(reply.status, 200, reply)

    def test_a_retired_fallback_does_not_answer(self) -> None:
        with Proxy(self.fake, fallback="gpt-4.1", strict_models=True) as proxy:
            self.fake.script(MESSAGES, Answer(402, {"error": {
                "message": "You have no quota", "code": "quota_exceeded"}}))
            self.assertEqual(proxy.post("/v1/messages", message("hi", "sonnet")).status, 402)

    def test_it_is_a_flag_and_a_variable(self) -> None:
        flags = vars(cp.make_parser()[0].parse_args(["start", "--strict-models"]))
        self.assertIs(cp.Settings.merge(flags, {}).strict_models, True)
        environ = {"COPILOT_PROXY_STRICT_MODELS": "1"}
        self.assertIs(cp.Settings.merge({}, environ).strict_models, True)
        self.assertIs(cp.Settings.merge({}, {}).strict_models, False)


class CommandCase(TodayCase):
    """Commands in an empty home."""

    def setUp(self) -> None:
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.home = os.path.realpath(folder.name)

    def run_here(self, *args: str, **env: str) -> tuple[int, str]:
        return run_main(self.home, *args, **{"GH_TOKEN": "ghu_fake",
                                             "COPILOT_PROXY_GITHUB_URL": self.fake.url, **env})

    def put(self, name: str, text: str) -> str:
        path = os.path.join(self.home, *name.split("/"))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return path


class WarningTest(CommandCase):
    """Settings that name a model which is gone."""

    def put_all(self) -> None:
        """A file of each client, as `setup` wrote it a year ago."""
        self.put(".claude/settings.json", json.dumps({"model": "opus", "env": {
            "ANTHROPIC_BASE_URL": "http://127.0.0.1:4399", "ANTHROPIC_MODEL": "claude-sonnet-4",
            "ANTHROPIC_DEFAULT_OPUS_MODEL": "claude-opus-4.1[1m]",
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": "claude-haiku-4.5"}}, indent=2))
        self.put(".codex/config.toml", 'model = "gpt-5.2-codex"\nmodel_provider = "copilot_proxy"\n'
                 '\n[profiles.x]\nmodel = "gpt-5.3-codex"\n')
        self.put(".config/opencode/opencode.json", json.dumps({
            "provider": {"copilot_proxy": {"models": {"gpt-5.1": {}}}},
            "model": "copilot_proxy/gpt-5.1", "small_model": "copilot_proxy/gpt-5-mini"}))
        self.put(".aider.conf.yml", "openai-api-base: http://127.0.0.1:4399/v1\n"
                 "model: openai/gemini-3-pro\nweak-model: openai/grok-code-fast-1\n")

    #: a part of each line that is wanted
    LINES = (
        "Claude Code: claude-sonnet-4 is named by ANTHROPIC_MODEL in ",
        "Claude Code: claude-opus-4.1[1m] is named by ANTHROPIC_DEFAULT_OPUS_MODEL in ",
        "Codex: gpt-5.2-codex is named by model in ", "opencode: gpt-5.1 is named by model in ",
        "aider: gemini-3-pro is named by model in ",
        "aider: grok-code-fast-1 is named by weak-model in ")
    ALIASES = {"COPILOT_PROXY_MODEL_ALIAS": "fast=gpt-4.1,good=gpt-5-mini",
               "COPILOT_PROXY_FALLBACK": "gpt-4o"}

    def check(self, output: str, has_list: bool = True) -> None:
        """All of them are named, nothing else is."""
        for line in self.LINES:
            self.assertEqual(output.count(line), 1, output)
        more = "; gpt-5-mini answers instead" if has_list else ""
        self.assertIn("--model-alias fast=gpt-4.1: GitHub retired it on 2026-06-01" + more, output)
        self.assertIn("--fallback gpt-4o: GitHub retired it" + more, output)
        self.assertEqual(output.count("GitHub retired it"), len(self.LINES) + 2, output)
        self.assertNotIn("good=", output)

    def test_models_lists_them(self) -> None:
        self.put_all()
        code, output = self.run_here("models", **self.ALIASES)
        self.assertEqual(code, 0, output)
        self.check(output)
        self.assertIn(cp.printable(os.path.join(self.home, ".codex", "config.toml")), output)
        code, output = self.run_here("models", "--fallback", "nope", "--model-alias", "a=gpt-99")
        self.assertIn("--fallback nope: this account does not list it; requests with it get 404",
                      output)
        self.assertIn("--model-alias a=gpt-99: this account does not list it; gpt-5.5 answers",
                      output)

    def test_models_as_json_stays_json(self) -> None:
        self.put_all()
        env = clean_environment(self.home, GH_TOKEN="ghu_fake",
                                COPILOT_PROXY_GITHUB_URL=self.fake.url, **self.ALIASES)
        done = subprocess.run([sys.executable, compiled(), "models", "--json"], env=env,
                              timeout=30, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(len(json.loads(done.stdout)), len(self.fake.models))
        self.check(done.stderr)

    def test_debug_lists_them_with_and_without_a_login(self) -> None:
        self.put_all()
        code, output = self.run_here("debug", **self.ALIASES)
        self.assertEqual(code, 0, output)
        self.check(output)
        report = json.loads(self.run_here("debug", "--json", **self.ALIASES)[1])
        self.assertEqual(len(report["missing_models"]), len(self.LINES) + 2)
        code, output = self.run_here("debug", GH_TOKEN="", **self.ALIASES)
        self.assertEqual(code, 0, output)
        self.check(output, has_list=False)

    def test_debug_knows_what_the_account_lacks(self) -> None:
        code, output = self.run_here("debug", "--fallback", "gpt-77-mini", "--model-alias",
                                     "a=wonder")
        self.assertEqual(code, 0, output)
        self.assertIn("--fallback gpt-77-mini: this account does not list it; gpt-5.4-mini answers",
                      output)
        self.assertIn("--model-alias a=wonder: this account does not list it; requests", output)

    def test_debug_asks_nobody_when_no_setting_names_a_model(self) -> None:
        wait_until(lambda: self.proxy.app.login.account.token.value)  # the server's own request
        before = len(self.fake.requests)
        code, output = self.run_here("debug")
        self.assertEqual((code, len(self.fake.requests) - before), (0, 0), output)
        self.assertRegex(output, r"missing models +none")

    def test_debug_does_not_wait_long_for_a_list_that_does_not_come(self) -> None:
        self.fake.script(MODELS, Answer(0, hold=True))
        with unittest.mock.patch.object(cp, "MODELS_WAIT_S", 0.1):
            code, output = self.run_here("debug", **self.ALIASES)
        self.assertEqual(code, 0, output)           # and it came back, though nothing was released
        self.assertEqual(self.fake.holding, 1)
        self.assertIn("--fallback gpt-4o: GitHub retired it", output)

    def test_files_of_clients_that_do_not_use_this_proxy_are_left_alone(self) -> None:
        self.put(".claude/settings.json", '{"model": "claude-sonnet-4-20250514"}')
        self.put(".codex/config.toml", 'model = "gpt-5.2-codex"\nmodel_provider = "openai"\n')
        self.put(".config/opencode/opencode.json", '{"model": "openai/gpt-4o"}')
        self.put(".aider.conf.yml", "model: gpt-4o\n")
        self.assertRegex(self.run_here("debug")[1], r"missing models +none")

    def test_the_environment_of_the_shell_is_seen(self) -> None:
        output = self.run_here("models", ANTHROPIC_BASE_URL="http://127.0.0.1:4399",
                               ANTHROPIC_MODEL="claude-opus-4.1")[1]
        self.assertIn("Claude Code: claude-opus-4.1 is named by ANTHROPIC_MODEL in the environment:"
                      " GitHub retired it on 2026-02-17; claude-opus-4.8 answers instead", output)
        output = self.run_here("models", ANTHROPIC_MODEL="claude-opus-4.1")[1]
        self.assertNotIn("GitHub retired", output)

    def test_settings_are_found_however_they_are_spaced_and_quoted(self) -> None:
        self.put(".claude/settings.json", '{"env":{"ANTHROPIC_BASE_URL":"http://127.0.0.1:4399",'
                 '"ANTHROPIC_MODEL" : "claude-sonnet-4","ANTHROPIC_SMALL_FAST_MODEL":"gpt-4.1"}}')
        self.put(".codex/config.toml", "model_provider='copilot_proxy'\nmodel='gpt-5.2'\n"
                 "[profiles.x]\n  review_model = \"gpt-5.1\"\n")
        self.put(".aider.conf.yml", "openai-api-base: x\nmodel : 'openai/gpt-4o'\n"
                 "editor-model: openai/o3 # an old one\n")
        output = self.run_here("models")[1]
        for name in ("claude-sonnet-4", "gpt-4.1", "gpt-5.2", "gpt-5.1", "gpt-4o", "o3"):
            self.assertEqual(output.count(": %s is named by " % name), 1, output)

    def test_looking_through_a_file_takes_time_in_proportion_to_its_length(self) -> None:
        for recipe in cp.CLIENTS.values():
            for pattern in filter(None, (recipe.sign, recipe.named)):
                for piece in ('"ANTHROPIC_', '"model" ', "model ", "model = '", " ", "\n ",
                              "model_provider =", '"copilot_proxy/', "weak-model: openai/", "_"):
                    text = piece * (200_000 // len(piece))
                    began = time.perf_counter()
                    re.findall(pattern, text)
                    self.assertLess(time.perf_counter() - began, 1.0, (pattern, piece))

    def test_odd_files_do_no_harm(self) -> None:
        path = self.put(".codex/config.toml", 'model_provider = "copilot_proxy"\n'
                        + 'model = "gpt-4.1\x1b[31m"\n' * 5000)
        self.put(".aider.conf.yml/below", "")                           # a folder in its place
        with open(os.path.join(self.home, ".claude.json"), "wb") as file:
            file.write(b"\xff\xfe\x00")
        code, output = self.run_here("models")
        self.assertEqual(code, 0)
        self.assertNotIn("\x1b", output)
        self.assertLessEqual(output.count("is named by"), cp.MAX_NAMES)
        if hasattr(os, "mkfifo"):
            os.remove(path)
            os.mkfifo(path)
            self.assertEqual(self.run_here("models")[0], 0)

    def test_a_server_warns_once_of_an_alias_and_a_fallback(self) -> None:
        with Proxy(self.fake, catalogue_age_s=0.0, fallback="nope",
                   model_alias=("fast=gpt-4.1", "good=gpt-5-mini")) as proxy:
            for _ in range(3):
                self.assertEqual(proxy.get("/v1/models").status, 200)
            warnings = [record.getMessage() for record in proxy.logs
                        if record.levelname == "WARNING"]
            self.assertEqual(warnings, [
                "--model-alias fast=gpt-4.1: GitHub retired it on 2026-06-01; gpt-5-mini answers "
                "instead", "--fallback nope: this account does not list it; requests with it get "
                "404"])

    def test_setup_takes_the_living_model_and_says_so(self) -> None:
        output = self.run_here("setup", "aider", "--url", self.proxy.url, "--model", "gpt-4.1")[1]
        self.assertIn("aider --model openai/gpt-5-mini ", output)
        self.assertIn("gpt-4.1: GitHub retired it on 2026-06-01; gpt-5-mini answers instead",
                      output)


class NoticeTest(CommandCase):
    """What the upstream says of a model's coming end."""

    NOTICES = (
        ({"warning_text": "This model will be retired on 2027-01-15."}, "retired on 2027-01-15"),
        ({"info_messages": [{"code": "pending_deprecation", "message": "Use GPT-5.6."}]},
         "pending_deprecation: Use GPT-5.6."),
        ({"info_messages": [{"code": "x", "message": "Closing down: 2027-02-01"}]}, "Closing down"),
        ({"warning_messages": [{"code": "deprecated", "message": None}]}, "deprecated"))

    def test_models_shows_it(self) -> None:
        for fields, words in self.NOTICES:
            with self.subTest(words):
                self.fake.models = today_models()
                self.fake.models[2].update(fields)
                code, output = self.run_here("models")
                self.assertEqual(code, 0, output)
                self.assertRegex(output, r"(?m)^gpt-5\.4 .* enabled, retiring$")
                self.assertRegex(output, r"(?m)^gpt-5\.4: .*" + re.escape(words))
                self.assertEqual(output.count("retiring"), 1)

    def test_the_list_of_the_server_has_it(self) -> None:
        self.fake.models[2].update(warning_text="It retires\nsoon")
        listed = {entry["id"]: entry for entry in self.proxy.get("/v1/models").json["data"]}
        self.assertEqual((listed["gpt-5.4"]["lifecycle"], listed["gpt-5.4"]["notice"]),
                         ("deprecated", "It retires\nsoon"))
        self.assertEqual((listed["gpt-5.5"]["lifecycle"], listed["gpt-5.5"]["notice"]),
                         ("active", None))
        output = self.run_here("setup", "aider", "--url", self.proxy.url, "--model", "gpt-5.4")[1]
        self.assertIn("gpt-5.4: It retires\\nsoon", output)

    def test_notices_of_another_kind_and_odd_ones_are_none(self) -> None:
        for fields in ({"warning_message": "Your plan moved to usage-based billing."}, {},
                       {"warning_text": None}, {"warning_text": 5}, {"info_messages": "x"},
                       {"info_messages": [None, 5, {"code": 7}, {"message": ["x"]}]},
                       {"warning_messages": {"code": "deprecated"}}):
            self.assertEqual(model("gpt-5.4", **fields).notice, "", fields)
        self.assertLessEqual(len(model("a", warning_text="retired " * 10 ** 6).notice),
                             cp.MAX_ERROR_TEXT)


#: a retired name as a word of its own: not the beginning of a longer one
RETIRED = re.compile(r"(?<![\w.-])(?:%s)(?![\w-]|\.\d)" % "|".join(
    map(re.escape, sorted(cp.RETIRED_MODELS, key=len, reverse=True))))


class TextTest(unittest.TestCase):
    """No text names a model that is gone."""

    def assert_alive(self, text: str, where: str) -> None:
        self.assertEqual(sorted(set(RETIRED.findall(text))), [], where)

    def test_the_search_finds_what_it_shall_find(self) -> None:
        for text in ("gpt-4.1", "use gpt-4.1.", "--fallback gpt-4o`", '"o3"', "openai/gpt-5",
                     "copilot-gpt-4.1"[8:], "claude-sonnet-4, or"):
            self.assertTrue(RETIRED.search(text), text)
        for text in ("gpt-5-mini", "gpt-5.3-codex", "claude-sonnet-4.6", "claude-opus-4.8", "foo3"):
            self.assertIsNone(RETIRED.search(text), text)

    def test_the_readme_and_its_neighbours(self) -> None:
        for name in DOCUMENTS:
            self.assert_alive(document(name).replace("copilot-", ""), name)

    def test_the_help(self) -> None:
        parser = cp.make_parser()[0]
        self.assert_alive(parser.format_help(), "--help")
        for name in cp.COMMANDS:
            with self.subTest(name), contextlib.redirect_stdout(io.StringIO()) as printed:
                with self.assertRaises(SystemExit):
                    parser.parse_args([name, "--help"])
                self.assertIn("usage:", printed.getvalue())
                self.assert_alive(printed.getvalue(), name)

    def test_docstrings(self) -> None:
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for node in the_source().nodes:
            if isinstance(node, kinds) and getattr(node, "name", "") != "ModelName":
                self.assert_alive(ast.get_docstring(node) or "", getattr(node, "name", "module"))

    def test_the_demo(self) -> None:
        self.assert_alive(json.dumps(cp.DEMO_MODELS), "the demo")
        ids = " ".join(entry["id"] for entry in cp.DEMO_MODELS)
        for family in ("gpt-", "claude-opus", "claude-sonnet", "claude-haiku", "gemini-", "grok-",
                       "kimi-", "mai-", "embedding"):
            self.assertIn(family, ids)
        spoken = {entry["id"]: cp.Model.from_entry(entry).endpoints for entry in cp.DEMO_MODELS}
        self.assertEqual(spoken["gpt-5-mini"], ("/chat/completions", "/responses"))
        self.assertEqual(spoken["claude-opus-5"], ("/v1/messages",))
        self.assertEqual(spoken["mai-code-1-flash-picker"], ("/responses",))
        self.assertEqual({path for paths in spoken.values() for path in paths}, {
            "/chat/completions", "/responses", "/v1/messages", "/embeddings"})
        defaults = [entry["id"] for entry in cp.DEMO_MODELS if entry["is_chat_default"]]
        self.assertEqual(defaults, [cp.CHEAP_MODEL])

    def test_what_setup_prints_on_the_demo_and_on_todays_account(self) -> None:
        for models in (cp.DEMO_MODELS, today_models()):
            with self.server(models) as proxy, tempfile.TemporaryDirectory() as home:
                for client in cp.CLIENTS:
                    with self.subTest(client):
                        code, output = run_main(home, "setup", client, "--url", proxy.url)
                        self.assertEqual(code, 0, output)
                        self.assert_alive(output.replace("copilot-", ""), client)
                        self.assertRegex(output, "gpt-|claude-|gemini-[0-9]|text-embedding")
                curl = run_main(home, "setup", "curl", "--url", proxy.url)[1]
                self.assertIn('"model": "gpt-5-mini"', curl)

    def test_a_new_user_of_an_old_account_gets_a_small_model_that_is_small(self) -> None:
        """'mini' stands in 'gemini', too."""
        models = [make_model("gemini-3.1-pro-preview"), make_model("gpt-5.3-codex"),
                  make_model("gpt-5-mini"), make_model("gemini-6-pro")]
        with self.server(models) as proxy, tempfile.TemporaryDirectory() as home:
            output = run_main(home, "setup", "aider", "--url", proxy.url)[1]
            self.assertIn("--model openai/gpt-5.3-codex --weak-model openai/gpt-5-mini", output)

    @contextlib.contextmanager
    def server(self, models: list[Any]) -> Iterator[Proxy]:
        with FakeUpstream() as fake:
            fake.models = models
            with Proxy(fake) as proxy:
                yield proxy


if __name__ == "__main__":
    unittest.main()
