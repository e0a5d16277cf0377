"""Transcript care: histories mended, names and schemas fit, cache marks, images, compaction."""
from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import unittest
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any, Iterator

from support import (DEADLINE_S, SLOW, Proxy, ProxyCase, chat, message, response, translated,
                     wait_until)
import bench
import copilot_proxy as cp
import fake_upstream as fake
from fake_upstream import Answer
from cases import Serving

SEEDS = range(400 if SLOW else 30)
MODELS = {entry["id"]: cp.Model.from_entry(entry) for entry in fake.default_models()}
UPSTREAMS = {"chat": "claude-sonnet-4.6", "responses": "gpt-5.4", "messages": "claude-haiku-4.5"}
PATHS = {"chat": "/chat/completions", "responses": "/responses", "messages": "/v1/messages"}
DATA_URL = "data:image/png;base64,iVBORw0KGgo="


# ---- Histories in all three dialects, made from one plan

class History:
    """A history in one dialect: `say`, `call` one or more tools, `result`."""

    def __init__(self, dialect: str) -> None:
        self.dialect = dialect
        self.items: list[Any] = []

    def say(self, role: str, text: str) -> None:
        self.items.append({"role": role, "content": text})

    def call(self, *ids: str) -> None:
        if self.dialect == "chat":
            self.items.append({"role": "assistant", "content": None, "tool_calls": [
                {"id": name, "type": "function", "function": {"name": "run", "arguments": "{}"}}
                for name in ids]})
        elif self.dialect == "responses":
            self.items += [{"type": "function_call", "call_id": name, "name": "run",
                            "arguments": "{}"} for name in ids]
        else:
            self.items.append({"role": "assistant", "content": [
                {"type": "tool_use", "id": name, "name": "run", "input": {}} for name in ids]})

    def results(self, **texts: str) -> None:
        """Results of one round, by call id."""
        if self.dialect == "chat":
            self.items += [{"role": "tool", "tool_call_id": name, "content": text}
                           for name, text in texts.items()]
        elif self.dialect == "responses":
            self.items += [{"type": "function_call_output", "call_id": name, "output": text}
                           for name, text in texts.items()]
        else:
            self.items.append({"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": name, "content": text}
                for name, text in texts.items()]})

    def body(self, **more: Any) -> dict[str, Any]:
        key = "input" if self.dialect == "responses" else "messages"
        tool = {"chat": {"type": "function", "function": {"name": "run", "parameters": SCHEMA}},
                "responses": {"type": "function", "name": "run", "parameters": SCHEMA},
                "messages": {"name": "run", "input_schema": SCHEMA}}[self.dialect]
        limit = {"max_tokens": 1000} if self.dialect == "messages" else {}
        return dict({"model": "m", key: copy.deepcopy(self.items), "tools": [tool]}, **limit,
                    **more)


SCHEMA = {"type": "object", "properties": {}}


def some_history(rng: random.Random, dialect: str) -> tuple[list[Any], list[str]]:
    """(items of a healthy history that ends with a user's turn, the texts of its results)."""
    writer, texts, number = History(dialect), [], 0
    for _ in range(rng.randrange(1, 6)):
        writer.say("user", "please %d" % rng.randrange(1000))
        for _ in range(rng.randrange(3)):
            ids = ["call_%d" % (number + n) for n in range(rng.randrange(1, 4))]
            number += len(ids)
            writer.call(*ids)
            found = {name: "result of %s." % name for name in ids}
            texts += found.values()
            if rng.random() < 0.3:
                found = dict(reversed(list(found.items())))
            writer.results(**found)
        if rng.random() < 0.7:
            writer.say("assistant", "done %d" % rng.randrange(1000))
    writer.say("user", "and now?")
    return writer.items, texts


def mutate(rng: random.Random, items: list[Any], dialect: str) -> None:
    """One thing that goes wrong with histories."""
    at = rng.randrange(len(items))
    kind = rng.randrange(5)
    if kind == 0:
        del items[at]
    elif kind == 1:
        items.insert(rng.randrange(len(items)), copy.deepcopy(items[at]))
    elif kind == 2:
        items.insert(rng.randrange(len(items)), items.pop(at))
    elif kind == 3:
        rng.shuffle(items)
    else:
        for item in items[at:]:
            parts = item.get("tool_calls") or item.get("content")
            if isinstance(parts, list) and len(parts) > 1:
                parts.pop(rng.randrange(len(parts)))
                return


def refusal(dialect: str, body: Any, model: str) -> str:
    """What the fake's strict checks say of a body as it would arrive, "" when nothing."""
    path = PATHS[dialect]
    record = fake.Recorded("POST", path, "", {"anthropic-version": "2023-06-01"}, b"", body, 1)
    entry = next(entry for entry in fake.default_models() if entry["id"] == model)
    ask = fake.Ask(STRICT, record, body, entry)
    try:
        fake.run_checks(fake.DIALECTS[path].checks, ask)
    except fake.Refuse as refused:
        return json.dumps(refused.body)
    return ""


STRICT: Any = SimpleNamespace(lenient=set(), compacts=False, gemini_needs_opaque=False,
                              is_sealed=lambda *sealed: True)


def fitted(dialect: str, body: Any, model: str = "") -> cp.BodyEdit:
    """The Edit of a body that goes up; `changed` must tell the truth."""
    before, edit = json.dumps(body), cp.BodyEdit(copy.deepcopy(body))
    cp.drop_billing_line(edit)
    cp.expand_compactions(edit, cp.DIALECTS[dialect])
    cp.prepare_body(edit, cp.DIALECTS[dialect], MODELS[model or UPSTREAMS[dialect]])
    if not edit.changed:
        assert json.dumps(edit.body) == before, "changed without saying so"
    return edit


def result_texts(body: Any) -> list[str]:
    """Every text of the body in which a result is told."""
    return sorted(text for text in strings(body) if "result of call_" in text)


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else (
            value if isinstance(value, list) else ()):
        yield from strings(inner)


class PairingTest(unittest.TestCase):
    """Seeded histories, shuffled and mutated."""

    def test_a_turn_without_a_role_between_calls_is_no_key_error(self) -> None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [
            {"type": "tool_use", "id": "t1", "name": "f", "input": {}}]},
            {"type": []}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
        edit = cp.BodyEdit({"model": "m", "messages": copy.deepcopy(turns)})
        cp.pair_tool_results(edit, cp.MESSAGES)
        sent = edit.body["messages"]
        self.assertEqual(sent[:2] + sent[3:], turns)
        self.assertEqual([(block["type"], block["tool_use_id"]) for block in sent[2]["content"]],
                         [("tool_result", "t1")])

    def test_healthy_histories_stay_as_they_are(self) -> None:
        for dialect in UPSTREAMS:
            for seed in SEEDS:
                items, _ = some_history(random.Random(seed), dialect)
                writer = History(dialect)
                writer.items = items
                edit = cp.BodyEdit(writer.body())
                cp.pair_tool_results(edit, cp.DIALECTS[dialect])
                cp.normalise_history(edit, cp.DIALECTS[dialect], MODELS[UPSTREAMS[dialect]])
                with self.subTest(dialect=dialect, seed=seed):
                    self.assertFalse(edit.changed)
                    self.assertEqual(edit.body, writer.body())

    def test_mutated_histories_are_accepted_and_lose_no_result(self) -> None:
        for dialect, model in UPSTREAMS.items():
            for seed in SEEDS:
                rng = random.Random(seed)
                writer = History(dialect)
                writer.items, texts = some_history(rng, dialect)
                for _ in range(rng.randrange(1, 4)):
                    mutate(rng, writer.items, dialect)
                body = writer.body(model=model)
                with self.subTest(dialect=dialect, seed=seed):
                    self.check(dialect, model, body)

    def check(self, dialect: str, model: str, body: Any) -> None:
        there = set(result_texts(body))
        edit = fitted(dialect, body, model)
        self.assertEqual(refusal(dialect, edit.body, model), "", body)
        told = result_texts(edit.body)
        self.assertEqual(len(told), len([t for t in told if t in there or "[result" in t]))
        for text in there:
            count = sum(text in one for one in told)
            self.assertGreaterEqual(count, 1, text)
            calls = json.dumps(body).count('"%s"' % text.split()[-1][:-1])
            self.assertLessEqual(count, max(1, calls - 1), text)
        again = fitted(dialect, edit.body, model)
        self.assertEqual(again.body, edit.body)
        once = cp.BodyEdit(copy.deepcopy(edit.body))
        cp.pair_tool_results(once, cp.DIALECTS[dialect])
        self.assertFalse(once.changed, "not idempotent")

    def test_mutated_histories_are_accepted_in_every_cell(self) -> None:
        for client in UPSTREAMS:
            for upstream, model in UPSTREAMS.items():
                for seed in list(SEEDS)[:12] if client != upstream else ():
                    rng = random.Random(seed)
                    writer = History(client)
                    writer.items, _ = some_history(rng, client)
                    mutate(rng, writer.items, client)
                    body = writer.body(model=model)
                    there = set(result_texts(body))
                    edit, _ = translated(client, upstream, body, MODELS[model])
                    with self.subTest(client=client, upstream=upstream, seed=seed):
                        self.assertEqual(refusal(upstream, edit.body, model), "")
                        told = "\n".join(result_texts(edit.body))
                        self.assertEqual([text for text in there if text not in told], [])

    def test_a_missing_result_is_told_as_an_error(self) -> None:
        for dialect in UPSTREAMS:
            writer = History(dialect)
            writer.say("user", "go")
            writer.call("call_1", "call_2")
            writer.results(call_2="two")
            writer.say("user", "next")
            sent = json.dumps(fitted(dialect, writer.body()).body)
            with self.subTest(dialect=dialect):
                self.assertEqual(sent.count(cp.INTERRUPTED), 1)
                self.assertLess(sent.index(cp.INTERRUPTED), sent.index('"two"'))
                self.assertEqual('"is_error": true' in sent, dialect == "messages")

    def test_an_orphan_is_told_as_text_and_as_a_loss(self) -> None:
        for dialect in UPSTREAMS:
            writer = History(dialect)
            writer.say("user", "go")
            writer.results(call_9="nine")
            edit = fitted(dialect, writer.body())
            with self.subTest(dialect=dialect):
                self.assertIn(json.dumps(cp.ORPHAN + "nine"), json.dumps(edit.body))
                self.assertIn("tool result", dict(edit.losses))

    def test_a_result_behind_other_turns_comes_back_to_its_call(self) -> None:
        for dialect in UPSTREAMS:
            writer = History(dialect)
            writer.say("user", "go")
            writer.call("call_1")
            writer.say("user", "something else")
            writer.say("assistant", "yes")
            writer.results(call_1="late")
            if dialect == "responses":                    # its upstream takes that order
                self.assertEqual(fitted(dialect, writer.body()).body["input"], writer.items)
                continue
            sent = json.dumps(fitted(dialect, writer.body()).body)
            with self.subTest(dialect=dialect):
                self.assertLess(sent.index("late"), sent.index("something else"))
                self.assertNotIn(cp.INTERRUPTED, sent)

    def test_equal_results_are_told_once_other_ones_as_text(self) -> None:
        for dialect in UPSTREAMS:
            for second, count in (("same", 0), ("other", 1)):
                writer = History(dialect)
                writer.say("user", "go")
                writer.call("call_1")
                writer.results(call_1="same")
                writer.results(call_1=second)
                sent = json.dumps(fitted(dialect, writer.body()).body)
                with self.subTest(dialect=dialect, second=second):
                    self.assertEqual(sent.count(json.dumps(cp.ORPHAN)[1:-1]), count)
                    self.assertEqual(sent.count("same"), 1)

    def test_ids_that_come_again_are_told_apart_for_anthropic(self) -> None:
        writer = History("messages")
        for word in ("one", "two"):
            writer.say("user", "go")
            writer.call("call_0")
            writer.results(call_0=word)
        body = fitted("messages", writer.body()).body
        self.assertEqual(refusal("messages", body, "claude-haiku-4.5"), "")
        blocks = [b for m in body["messages"] for b in m["content"] if isinstance(b, dict)]
        calls = [b for b in blocks if b["type"] == "tool_use"]
        results = [b for b in blocks if b["type"] == "tool_result"]
        self.assertEqual(len({call["id"] for call in calls}), 2)
        self.assertEqual([(r["tool_use_id"], r["content"]) for r in results],
                         [(call["id"], word) for call, word in zip(calls, ("one", "two"))])
        chat_history = History("chat")                     # the others do not mind
        for word in ("one", "two"):
            chat_history.say("user", "go")
            chat_history.call("call_0")
            chat_history.results(call_0=word)
        edit = cp.BodyEdit(chat_history.body())
        cp.pair_tool_results(edit, cp.CHAT)
        self.assertFalse(edit.changed)

    def test_results_stand_before_text_and_in_one_turn_for_anthropic(self) -> None:
        def result(name: str) -> Any:
            return {"type": "tool_result", "tool_use_id": name, "content": name}
        writer = History("messages")
        writer.say("user", "go")
        writer.call("a", "b")
        writer.items += [{"role": "user", "content": [{"type": "text", "text": "t"}, result("a")]},
                         {"role": "user", "content": [result("b")]}]
        edit = cp.BodyEdit(writer.body())
        cp.pair_tool_results(edit, cp.MESSAGES)
        self.assertEqual(edit.body["messages"][2:], [{"role": "user", "content": [
            result("a"), result("b"), {"type": "text", "text": "t"}]}])

    def test_system_turns_may_stand_between_a_call_and_its_result(self) -> None:
        writer = History("messages")
        writer.say("user", "go")
        writer.call("a")
        writer.say("system", "note")
        writer.results(a="done")
        sent = fitted("messages", writer.body()).body["messages"]
        self.assertEqual([block.get("type") for block in sent[2]["content"]],
                         ["tool_result", "text"])

    def test_codex_kinds(self) -> None:
        items = [{"role": "user", "content": "go"},
                 {"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": ""},
                 {"type": "local_shell_call", "call_id": "c2", "action": {}},
                 {"type": "tool_search_call", "call_id": "c3"}, {"type": "web_search_call"}]
        sent = fitted("responses", {"model": "m", "input": items}).body["input"]
        self.assertEqual([item.get("type") for item in sent], [
            None, "custom_tool_call", "custom_tool_call_output", "local_shell_call",
            "function_call_output", "tool_search_call", "web_search_call"])

    def test_what_cannot_be_read_is_left_to_the_dialect(self) -> None:
        for dialect, key in (("chat", "messages"), ("messages", "messages"),
                             ("responses", "input")):
            for odd in (5, "a", [5], ["a"], [{"role": "assistant", "tool_calls": 5}],
                        [{"role": "user", "content": [5, {"type": "tool_result"}]}],
                        [{"role": "assistant", "tool_calls": [7], "content": [7]}],
                        [{"type": 5, "call_id": 6}], [{"role": "tool", "content": {"a": 1}}],
                        [{"role": "user", "content": [{"type": "tool_result"}]}]):
                with self.subTest(dialect=dialect, odd=odd):
                    try:
                        fitted(dialect, {"model": "m", key: odd, "max_tokens": 9})
                    except cp.BadRequest:
                        pass


class StrictTest(unittest.TestCase):
    """Nulls, emptiness, ids, names and schemas."""

    def test_nulls_go_where_they_mean_nothing(self) -> None:
        body = {"model": "m", "temperature": None, "messages": [
            {"role": "user", "name": None, "content": [
                {"type": "text", "text": "a", "image_url": None},
                {"type": "image_url", "image_url": {"url": DATA_URL, "detail": None}}]},
            {"role": "assistant", "content": None, "refusal": None, "audio": None,
             "function_call": None, "tool_calls": [{"id": "c", "type": "function", "function": {
                 "name": "run", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": None}]}
        for model in ("gpt-4.1", "claude-sonnet-4.6", "gemini-3.1-pro-preview"):
            sent = fitted("chat", body, model).body
            with self.subTest(model=model):
                self.assertEqual(refusal("chat", sent, model), "")
                self.assertNotIn("temperature", sent)
                self.assertIsNone(sent["messages"][1]["content"])
                self.assertEqual(sent["messages"][2]["content"],
                                 "" if model == "gpt-4.1" else "(no output)")
        sent = fitted("responses", response("a", instructions=None, input=[
            {"role": "user", "content": [{"type": "input_image", "image_url": DATA_URL,
                                          "file_id": None}]},
            {"type": "reasoning", "encrypted_content": "x", "summary": [], "status": None}])).body
        self.assertEqual([text for text in walk_nulls(sent)], [])
        sent = fitted("messages", message("a", messages=[{"role": "user", "content": [
            {"type": "text", "text": "a", "citations": None}]}])).body
        self.assertEqual(refusal("messages", sent, "claude-haiku-4.5"), "")

    def test_empty_messages_and_leftovers_of_other_services(self) -> None:
        body = chat("x", messages=[
            {"role": "user", "content": "a"}, {"role": "assistant", "content": ""},
            {"role": "assistant", "content": "b", "annotations": [], "tool_calls": []},
            {"role": "user", "content": [{"type": "text", "text": ""}]},
            {"role": "user", "content": "c"}])
        sent = fitted("chat", body, "claude-sonnet-4.6").body["messages"]
        self.assertEqual([m["content"] for m in sent], ["a", "b", "c"])
        self.assertEqual(set(sent[1]), {"role", "content"})
        sent = fitted("chat", body, "gpt-4.1").body["messages"]
        self.assertEqual([m["content"] for m in sent], ["a", "", "b", "", "c"])

    def test_fields_of_openais_models_only(self) -> None:
        body = chat("x", logit_bias={"1": 2}, prompt_cache_key="k", seed=1)
        edit = fitted("chat", body, "claude-sonnet-4.6")
        self.assertEqual({"logit_bias", "prompt_cache_key"} & set(edit.body), set())
        self.assertEqual([name for name, _ in edit.losses], ["logit_bias"])
        self.assertEqual(edit.body["seed"], 1)
        self.assertIn("logit_bias", fitted("chat", body, "gpt-4.1").body)

    def test_call_ids_fit_and_stay_pairs(self) -> None:
        for dialect, model in (("chat", "gpt-5-mini"), ("chat", "claude-sonnet-4.6"),
                               ("responses", "gpt-5.4"), ("messages", "claude-haiku-4.5")):
            for odd in ("x" * 90, "functions.run:0", "a b"):
                writer = History(dialect)
                writer.say("user", "go")
                writer.call(odd)
                writer.results(**{odd: "done"})
                writer.say("user", "next")
                sent = fitted(dialect, writer.body(model=model), model).body
                with self.subTest(dialect=dialect, model=model, id=odd):
                    self.assertEqual(refusal(dialect, sent, model), "")

    def test_names_are_the_same_in_tools_history_and_choice(self) -> None:
        name = "mcp server.tool with spaces/" + "x" * 80
        for dialect, model in UPSTREAMS.items():
            writer = History(dialect)
            writer.say("user", "go")
            writer.call("c")
            writer.results(c="done")
            choice = {"chat": {"type": "function", "function": {"name": "run"}},
                      "responses": {"type": "function", "name": "run"},
                      "messages": {"type": "tool", "name": "run"}}[dialect]
            text = json.dumps(writer.body(tool_choice=choice, model=model))
            body = json.loads(text.replace('"run"', json.dumps(name)))
            edit = fitted(dialect, body, model)
            with self.subTest(dialect=dialect):
                self.assertEqual(refusal(dialect, edit.body, model), "")
                (short, back), = edit.names.items()
                self.assertEqual(json.loads(back), name)
                self.assertEqual(json.dumps(edit.body).count(short.decode()), 3)
                self.assertEqual(edit.losses, [])

    def test_schemas_for_gemini(self) -> None:
        model = "gemini-3.1-pro-preview"
        leaf = {"type": "string"}
        schemas: list[tuple[Any, Any]] = [
            ({"type": "object", "properties": {"a": leaf}, "required": ["a"]}, None),
            ({"type": "object"}, {"type": "object", "properties": {}}),
            ({"$schema": "x", "type": "object", "additionalProperties": False, "properties": {
                "a": {"type": ["string", "null"], "format": "uri", "const": "x"},
                "n": {"type": "integer", "enum": [1, 2], "format": "int32"},
                "l": {"type": "array"}, "t": {"type": "array", "items": [leaf]},
                "e": {"enum": ["p", "q", ""]},
                "m": {"type": "object", "additionalProperties": {"type": "string"}}},
              "required": ["a", "gone"]},
             {"type": "object", "properties": {
                 "a": {"type": "string", "nullable": True, "enum": ["x"]},
                 "n": {"type": "integer", "format": "int32", "description": "One of [1,2]."},
                 "l": {"type": "array", "items": leaf}, "t": {"type": "array", "items": leaf},
                 "e": {"type": "string", "enum": ["p", "q"]},
                 "m": {"type": "object", "properties": {}}}, "required": ["a"]}),
            ({"type": "object", "$defs": {"P": {"type": "object", "properties": {"x": leaf}},
                                          "Q": {"$ref": "#/$defs/P"}},
              "properties": {"p": {"$ref": "#/$defs/Q", "description": "d"},
                             "o": {"anyOf": [{"$ref": "#/$defs/P"}, {"type": "null"}]},
                             "u": {"oneOf": [leaf, {"type": "number"}]},
                             "s": {"allOf": [{"$ref": "#/$defs/P"}, {
                                 "properties": {"y": leaf}, "required": ["y"]}]}}},
             {"type": "object", "properties": {
                 "p": {"type": "object", "description": "d", "properties": {"x": leaf}},
                 "o": {"type": "object", "nullable": True, "properties": {"x": leaf}},
                 "u": {"anyOf": [leaf, {"type": "number"}]},
                 "s": {"type": "object", "properties": {"x": leaf, "y": leaf},
                       "required": ["y"]}}}),
            ({"type": "object", "properties": {"a": leaf}, "anyOf": [{"required": ["a"]}, {
                "required": ["b"]}], "enum": ["x"], "const": {}},
             {"type": "object", "properties": {"a": leaf}, "description": "One of [{}]."})]
        for given, want in schemas:
            tool = {"type": "function", "function": {"name": "f", "parameters": given}}
            edit = fitted("chat", chat("x", model, tools=[tool], max_tokens=9), model)
            found = edit.body["tools"][0]["function"]["parameters"]
            with self.subTest(given=given):
                self.assertEqual(found, given if want is None else want)
                self.assertEqual(refusal("chat", edit.body, model), "")
                self.assertEqual(edit.changed, want is not None)

    def test_schemas_that_name_themselves_end(self) -> None:
        tree = {"$ref": "#/$defs/T"}
        bomb = {"a%d" % n: {"type": "object", "properties": {
            side: {"$ref": "#/$defs/a%d" % (n + 1)} for side in "lr"}} for n in range(40)}
        deep: Any = {"type": "string"}
        for _ in range(300):
            deep = {"type": "array", "items": deep}
        for given in ({"$ref": "#"}, {"$defs": {"T": tree}, "properties": {"t": tree}},
                      {"$defs": {"T": {"type": "object", "properties": {"t": tree}}}, **tree},
                      {"$defs": bomb, "$ref": "#/$defs/a0"}, {"properties": {"d": deep}},
                      {"anyOf": 5, "type": 7, "enum": 3, "properties": [], "required": "x"},
                      {"$ref": "#/no/such"}, {"items": {"type": []}},
                      {"type": "object", "required": [["x"], {}, None], "format": [1]}):
            began = time.process_time()
            found = cp.GeminiSchema().convert(given)
            with self.subTest(given=str(given)[:80]):
                self.assertLess(len(json.dumps(found)), 4_000_000)
                self.assertLess(time.process_time() - began, 5)

    def test_a_history_of_four_megabytes_is_looked_at_in_time(self) -> None:
        """CPU time in this process; the bound is far above what is measured."""
        body, best = bench.conversation(4_000_000), 9.0
        for _ in range(5):
            began = time.process_time()
            self.assertTrue(bench.care(cp, body))
            best = min(best, time.process_time() - began)
        self.assertLess(best, 0.1)


def walk_nulls(value: Any) -> Iterator[str]:
    for node in cp.walk_objects(value):
        yield from [name for name, inner in node.items() if inner is None]


# ---- Through the proxy

CELLS = [(client, upstream) for client in UPSTREAMS for upstream in UPSTREAMS]
#: a model that speaks nothing but this dialect
ONLY = {"chat": "gemini-3.1-pro-preview", "responses": "gpt-5.4", "messages": "claude-opus-4.7"}
ROUTES = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
NONCE = "x-anthropic-billing-header: cc_version=2.1; cch=%s;\n"


def with_system(dialect: str, model: str, system: str, **more: Any) -> dict[str, Any]:
    """A small request with a system text."""
    if dialect == "chat":
        return chat("hi", model, messages=[{"role": "system", "content": system},
                                           {"role": "user", "content": "hi"}], **more)
    if dialect == "responses":
        return response("hi", model, instructions=system, **more)
    return message("hi", model, system=[{"type": "text", "text": system}], **more)


class CacheTest(ProxyCase):
    """What the upstream's prompt cache sees."""

    def sent(self, dialect: str, body: Any) -> Any:
        reply = self.proxy.post(ROUTES[dialect], body)
        self.assertEqual(reply.status, 200, reply)
        return next(r for r in reversed(self.fake.requests) if r.path in PATHS.values())

    def test_requests_that_differ_in_the_nonce_are_the_same_bytes_upstream(self) -> None:
        for client, upstream in CELLS + [("chat", "claude"), ("messages", "claude")]:
            model = ONLY.get(upstream, "claude-sonnet-4.6")
            first, second = (self.sent(client, with_system(
                client, model, NONCE % hash_ + "You are a coder.")) for hash_ in ("0a1b", "ffff"))
            with self.subTest(client=client, upstream=upstream):
                self.assertEqual(first.body, second.body)
                self.assertIn(b"You are a coder.", first.body)
                self.assertNotIn(b"billing-header", first.body)

    def test_the_nonce_alone_leaves_nothing(self) -> None:
        for client, upstream in CELLS:
            body = with_system(client, ONLY[upstream], NONCE.strip() % "12")
            with self.subTest(client=client, upstream=upstream):
                self.assertNotIn(b"billing-header", self.sent(client, body).body)
        body = message("hi", system=NONCE % "1" + "Real.")
        self.assertEqual(self.sent("messages", body).json["system"][0]["text"], "Real.")

    def test_the_token_count_does_not_see_the_nonce(self) -> None:
        body = dict(message("hi", system=NONCE % "1" + "Real."), messages=[
            {"role": "user", "content": "go"}, {"role": "assistant", "content": [
                {"type": "tool_use", "id": "a", "name": "f", "input": {}}]},
            {"role": "user", "content": "next"}])
        self.assertEqual(self.proxy.post("/v1/messages/count_tokens", body).status, 200)
        sent = self.fake.last("/v1/messages/count_tokens")
        self.assertNotIn(b"billing-header", sent.body)
        self.assertIn(cp.INTERRUPTED.encode(), sent.body)
        wait_until(lambda: "passthrough" in self.proxy.log_text(), "counted upstream")

    def test_claude_gets_four_marks_where_the_client_set_none(self) -> None:
        for client, upstream in (("messages", "messages"), ("chat", "chat"),
                                 ("responses", "messages"), ("responses", "chat"),
                                 ("chat", "messages"), ("messages", "chat")):
            writer = History(client)
            if client == "chat":
                writer.say("system", "Be brief.")
            for word in ("one", "two", "three"):
                writer.say("user", word)
                writer.say("assistant", "yes")
            writer.say("user", "run it")
            writer.call("c1", "c2")
            writer.results(c1="first", c2="second")
            more = {"messages": {"system": "Be brief."}, "chat": {},
                    "responses": {"instructions": "Be brief."}}[client]
            model = MODELS["claude-sonnet-4.6"]
            body = writer.body(**more)
            plan = cp.Plan.make(cp.DIALECTS[client], cp.DIALECTS[upstream], body, model, 0, "k")
            sent = plan.edit.body
            name = "cache_control" if upstream == "messages" else "copilot_cache_control"
            marked = [node for node in cp.walk_objects(sent) if name in node]
            texts = [json.dumps(node) for node in marked]
            with self.subTest(client=client, upstream=upstream):
                self.assertEqual(refusal(upstream, sent, model.id), "")
                self.assertEqual([node[name] for node in marked], [{"type": "ephemeral"}] * 4)
                for word in ("input_schema" if upstream == "messages" else "parameters",
                             "Be brief.", "run it", "second"):
                    self.assertEqual(sum(word in text for text in texts), 1, word)

    def test_the_clients_own_marks_are_kept_and_others_get_none(self) -> None:
        mark = {"type": "ephemeral"}
        system = [{"type": "text", "text": "S", "cache_control": mark}]
        sent = self.sent("messages", message("hi", system=system)).json
        self.assertEqual(sum("cache_control" in node for node in cp.walk_objects(sent)), 1)
        sent = self.sent("chat", chat("x", "claude-sonnet-4.6", messages=[
            {"role": "user", "content": [{"type": "text", "text": str(n), "cache_control": mark}]}
            for n in range(6)])).json
        self.assertEqual(["copilot_cache_control" in m for m in sent["messages"]],
                         [False] * 2 + [True] * 4)
        for model in ("gpt-4.1", "gemini-3.1-pro-preview"):
            self.assertNotIn(b"cache_control", self.sent("chat", chat("x", model)).body)

    def test_what_needs_nothing_goes_up_as_the_clients_own_bytes(self) -> None:
        mark = {"type": "ephemeral"}
        for client in UPSTREAMS:
            writer = History(client)
            writer.items, _ = some_history(random.Random(3), client)
            model = {"chat": "gpt-4.1", "responses": "gpt-5.4"}.get(client, "claude-sonnet-4.6")
            more: dict[str, Any] = {"chat": {}, "messages": {
                "system": [{"type": "text", "text": "S", "cache_control": mark}]}, "responses": {
                    "store": False, "include": ["reasoning.encrypted_content"],
                    "prompt_cache_key": "k"}}[client]
            data = json.dumps(writer.body(model=model, **more), indent=1).encode()
            with self.subTest(client=client):
                self.assertEqual(self.proxy.post(ROUTES[client], data).status, 200)
                self.assertEqual(self.fake.last(PATHS[client]).body, data)

    def test_keys_stay_in_their_order(self) -> None:
        body = dict({"stream": False, "tools": [{"input_schema": SCHEMA, "name": "f"}]},
                    **message("hi"))
        self.assertEqual(list(self.sent("messages", body).json), list(body))

    def test_one_conversation_has_one_cache_key(self) -> None:
        def key(client: str, *turns: str, **more: Any) -> Any:
            body = with_system(client, "gpt-5.4", "S", **more)
            items = [{"role": "assistant" if at % 2 else "user", "content": turn}
                     for at, turn in enumerate(turns)]
            if client == "responses":
                body["input"] = items
            else:
                body["messages"] = body["messages"][:-1] + items
            return self.sent(client, body).json["prompt_cache_key"]
        for client in UPSTREAMS:
            first = key(client, "a")
            with self.subTest(client=client):
                self.assertEqual(first, key(client, "a", "b", "c"))
                self.assertEqual(len(first), 32)
                self.assertNotEqual(first, key(client, "other"))
        self.assertEqual(key("responses", "a", prompt_cache_key="mine"), "mine")
        self.assertEqual(key("chat", "a", prompt_cache_key="mine"), "mine")


class NamesTest(ProxyCase):
    """A tool's name that the upstream would refuse, there and back in every cell."""

    def test_long_names_come_back_as_the_client_wrote_them(self) -> None:
        name = "mcp/server tool \u00e9." + "x" * 70
        for client, upstream in CELLS:
            tool = {"chat": {"type": "function", "function": {"name": name, "parameters": SCHEMA}},
                    "responses": {"type": "function", "name": name, "parameters": SCHEMA},
                    "messages": {"name": name, "input_schema": SCHEMA}}[client]
            body = with_system(client, ONLY[upstream], "S", tools=[tool])
            text = json.dumps(body).replace('"hi"', '"use the tool"')
            for stream in (False, True):
                reply = self.proxy.post(ROUTES[client], dict(json.loads(text), stream=stream))
                found = reply.events if stream else reply.json
                names = {node["name"] for node in cp.walk_objects(found)
                         if isinstance(node.get("name"), str)}
                with self.subTest(client=client, upstream=upstream, stream=stream):
                    self.assertEqual(reply.status, 200, reply)
                    self.assertEqual(names, {name})
                    self.assertNotIn(name.encode(), self.fake.last(PATHS[upstream]).body)


class ImageServer(Serving, HTTPServer):
    """Serves images and worse; `asked` are the heads of the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ImageHandler)
        self.asked: list[Any] = []
        self.dripping = threading.Event()                # never set: a pause

    def url(self, path: str, host: str = "images.example") -> str:
        return "http://%s:%d%s" % (host, self.server_port, path)


PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


class ImageHandler(BaseHTTPRequestHandler):
    server: ImageServer

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        data = {"/huge": PNG * 20000, "/page": b"<html>"}.get(self.path, PNG)
        self.send_response({"/moved": 302, "/gone": 404}.get(self.path, 200))
        self.send_header("Location", "/a.png")
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(len(data) + (9 if self.path == "/cut" else 0)))
        self.end_headers()
        if self.path == "/drip":
            with contextlib.suppress(OSError):
                for at in range(len(data)):
                    self.wfile.write(data[at:at + 1])
                    self.server.dripping.wait(0.02)
        else:
            self.wfile.write(data)


class FetchTest(ProxyCase):
    """--fetch-images."""

    settings = {"fetch_images": True}

    def setUp(self) -> None:
        super().setUp()
        self.images = self.enter(ImageServer())
        self.resolved: list[str] = []
        fetcher = self.fetcher = self.proxy.app.images

        def resolve(host: str, port: int, *rest: Any) -> Any:
            self.resolved.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]
        fetcher.resolve, fetcher.is_allowed = resolve, lambda address: True

    def with_image(self, dialect: str, url: str, model: str) -> dict[str, Any]:
        part = {"chat": {"type": "image_url", "image_url": {"url": url}},
                "responses": {"type": "input_image", "image_url": url},
                "messages": {"type": "image", "source": {"type": "url", "url": url}}}[dialect]
        if dialect == "responses":
            return response("x", model, input=[{"role": "user", "content": [part]}])
        make = chat if dialect == "chat" else message
        return make("x", model, messages=[{"role": "user", "content": [part]}])

    def test_images_are_fetched_and_inlined_in_every_cell(self) -> None:
        data = cp.base64.b64encode(PNG)
        for client, upstream in CELLS:
            body = self.with_image(client, self.images.url("/a.png?x=1"), ONLY[upstream])
            reply = self.proxy.post(ROUTES[client], body, Authorization="Bearer secret")
            sent = self.fake.last(PATHS[upstream])
            with self.subTest(client=client, upstream=upstream):
                self.assertEqual(reply.status, 200, reply)
                self.assertIn(data, sent.body)
                self.assertNotIn(b"images.example", sent.body)
                self.assertEqual(sent.headers.get("copilot-vision-request"), "true")
        self.assertEqual(self.resolved, ["images.example"])          # kept for further turns
        (path, headers), = self.images.asked
        self.assertEqual(path, "/a.png?x=1")
        self.assertEqual({name.lower() for name in headers},
                         {"host", "accept", "accept-encoding", "user-agent"})

    def test_images_inside_a_tools_result(self) -> None:
        writer = History("messages")
        writer.say("user", "go")
        writer.call("a")
        writer.results(a="x")
        source = {"type": "url", "url": self.images.url("/b.png")}
        writer.items[-1]["content"][0]["content"] = [{"type": "image", "source": source}]
        body = writer.body(model="claude-sonnet-4.6")
        self.assertEqual(self.proxy.post("/v1/messages", body).status, 200)
        part = self.fake.last("/v1/messages").json["messages"][-1]["content"][0]["content"][0]
        self.assertEqual(part["source"]["media_type"], "image/png")

    def test_what_cannot_be_had_is_a_clear_400(self) -> None:
        for path, word in (("/moved", "302"), ("/gone", "404"), ("/huge", "larger"),
                           ("/page", "no PNG"), ("/cut", "cut"), ("/drip", "cannot be fetched")):
            self.fetcher.timeout_s = 0.05 if path == "/drip" else DEADLINE_S
            reply = self.proxy.post(ROUTES["chat"], self.with_image(
                "chat", self.images.url(path), "gpt-4.1"))
            with self.subTest(path=path):
                self.assertEqual(reply.status, 400, reply)
                self.assertIn(word, reply.json["error"]["message"])
        for url in ("ftp://a.example/x", "http://u:p@a.example/x", "http://a.example:x/",
                    "http:///",
                    "http://a.example:99999/", "file:///etc/passwd", "//x", "http://[::1",
                    "http://a.example/\r\nX: y", "http://a.example/\u00e9"):
            reply = self.proxy.post(ROUTES["chat"], self.with_image("chat", url, "gpt-4.1"))
            with self.subTest(url=url):
                self.assertEqual(reply.status, 400, reply)
        self.assertEqual(self.fake.count("/chat/completions"), 0)

    def test_a_name_with_one_private_address_is_refused_before_any_connection(self) -> None:
        self.fetcher.is_allowed = cp.is_public
        for addresses in (["127.0.0.1"], ["93.184.215.14", "10.0.0.1"], []):
            self.fetcher.resolve = lambda host, port, *rest: [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in addresses]
            reply = self.proxy.post(ROUTES["chat"], self.with_image(
                "chat", self.images.url("/a%d" % len(addresses)), "gpt-4.1"))
            self.assertEqual(reply.status, 400)
            self.assertIn("not public", reply.json["error"]["message"])
        self.assertEqual(self.images.asked, [])

    def test_which_addresses_are_public(self) -> None:
        for address in ("93.184.215.14", "2606:2800:21f:cb07::1", "::ffff:93.184.215.14"):
            self.assertTrue(cp.is_public(address), address)
        for address in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254",
                        "100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "240.0.0.1", "::",
                        "::1", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "198.18.0.1",
                        "::ffff:127.0.0.1", "::127.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1",
                        "2001:db8::1"):
            self.assertFalse(cp.is_public(address), address)

    def test_the_name_in_the_certificate_is_checked(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            key, cert = os.path.join(folder, "key"), os.path.join(folder, "cert")
            try:
                subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                                "ec_paramgen_curve:prime256v1", "-nodes", "-days",
                                "2", "-keyout", key, "-out", cert, "-subj", "/CN=images.example",
                                "-addext", "subjectAltName=DNS:images.example", "-addext",
                                "authorityKeyIdentifier=keyid:always"],
                               check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            except (OSError, subprocess.CalledProcessError):
                self.skipTest("needs openssl")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(cert, key)
            self.images.socket = context.wrap_socket(self.images.socket, server_side=True)
            trusting = ssl.create_default_context(cafile=cert)
            if hasattr(ssl, "VERIFY_X509_STRICT"):
                trusting.verify_flags &= ~ssl.VERIFY_X509_STRICT
            self.fetcher._tls_context = lambda: trusting
            for host, status in (("images.example", 200), ("other.example", 400)):
                url = self.images.url("/" + host, host).replace("http:", "https:")
                reply = self.proxy.post(ROUTES["chat"], self.with_image("chat", url, "gpt-4.1"))
                with self.subTest(host=host):
                    self.assertEqual(reply.status, status, reply)


class ImagesTest(ProxyCase):
    """Images without --fetch-images, and too many or too large ones."""

    def test_without_the_flag_the_answer_names_it(self) -> None:
        for part in ({"type": "image_url", "image_url": {"url": "https://a.example/x.png"}},
                     {"type": "image_url", "image_url": "https://a.example/x.png"}):
            reply = self.proxy.post(ROUTES["chat"], chat("x", messages=[
                {"role": "user", "content": [part]}]))
            self.assertEqual(reply.status, 400)
            self.assertIn("--fetch-images", reply.json["error"]["message"])
        source = {"type": "url", "url": "https://a.example/x.png"}
        for model in ONLY.values():
            reply = self.proxy.post(ROUTES["messages"], message("x", model, messages=[
                {"role": "user", "content": [{"type": "image", "source": source}]}]))
            self.assertEqual(reply.status, 400)
            self.assertIn("--fetch-images", reply.json["error"]["message"])

    def picture(self, dialect: str, data: str) -> Any:
        url = "data:image/png;base64," + data
        return {"chat": {"type": "image_url", "image_url": {"url": url}},
                "responses": {"type": "input_image", "image_url": url},
                "messages": {"type": "image", "source": {
                    "type": "base64", "media_type": "image/png", "data": data}}}[dialect]

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_the_oldest_images_give_way_when_the_body_grows_too_large(self) -> None:
        for client, upstream in [(name, name) for name in ONLY] + [("chat", "messages")]:
            # the client's spelling of the model is mended, too
            parts = [self.picture(client, "%dAAA" % n * 450_000) for n in range(4)]
            items = [turn for part in parts for turn in (
                {"role": "assistant", "content": "ok"}, {"role": "user", "content": [part]})][1:]
            make = {"chat": chat, "messages": message, "responses": response}[client]
            body = make("x", **{"input" if client == "responses" else "messages": items})
            body["model"] = "any/" + ONLY[upstream]
            reply = self.proxy.post(ROUTES[client], body)
            sent = self.fake.last(PATHS[upstream])
            with self.subTest(client=client, upstream=upstream):
                self.assertEqual(reply.status, 200, reply)
                self.assertLess(len(sent.body), cp.MAX_SENT_BYTES)
                self.assertEqual(sent.body.count(cp.SHED_IMAGE.encode()), 2)
                self.assertIn(b"3AAA3AAA", sent.body)
                self.assertNotIn(b"1AAA1AAA", sent.body)
                self.assertIn("images", reply.headers["x-copilot-proxy-lossy"])

    def test_at_most_twenty_images_and_never_none(self) -> None:
        items = [{"role": "user", "content": [self.picture("chat", "AAA%d" % (n % 10))]}
                 for n in range(23)]
        self.assertEqual(self.proxy.post(ROUTES["chat"], chat("x", messages=items)).status, 200)
        self.assertEqual(self.fake.last("/chat/completions").body.count(b"data:image"), 20)
        one = [{"role": "user", "content": [self.picture("chat", "AAAA" * 1_500_000)]}]
        self.assertEqual(self.proxy.post(ROUTES["chat"], chat("x", messages=one)).status, 200)
        self.assertGreater(len(self.fake.last("/chat/completions").body), cp.MAX_SENT_BYTES)


class CompactionTest(ProxyCase):
    """POST /responses/compact and `compaction_trigger`, for every model."""

    def history(self) -> list[Any]:
        writer = History("responses")
        writer.say("developer", "Be brief.")
        writer.say("user", "The secret word is maple.")
        writer.call("c1")
        writer.results(c1="found it")
        writer.items.append({"type": "message", "role": "assistant", "id": "msg_1", "content": [
            {"type": "output_text", "text": "done"}]})
        return writer.items

    def compaction(self, output: Any) -> Any:
        self.assertEqual([item["type"] for item in output], ["compaction"])
        self.assertTrue(output[0]["id"])
        return output[0]

    def trigger(self, model: str, **more: Any) -> Any:
        return response("x", model, store=False, input=self.history() + [
            {"type": "compaction_trigger"}], tools=[
                {"type": "function", "name": "run", "parameters": SCHEMA}], **more)

    def test_every_model_makes_exactly_one_item_in_both_forms(self) -> None:
        for dialect, model in ONLY.items():
            with self.subTest(dialect=dialect):
                reply = self.proxy.post("/v1/responses", self.trigger(model))
                self.assertEqual((reply.status, reply.json["status"]), (200, "completed"), reply)
                self.compaction(reply.json["output"])
                stream = self.proxy.stream("/v1/responses", self.trigger(model))
                done = [e["item"] for e in stream.events
                        if e["type"] == "response.output_item.done"]
                item = self.compaction(done)
                final = stream.events[-1]
                self.assertEqual(final["type"], "response.completed")
                self.assertEqual(final["response"]["output"], [item])
                self.assertGreater(final["response"]["usage"]["total_tokens"], 0)
                body = {"model": model, "instructions": "Be brief.", "input": self.history()}
                whole = self.proxy.post("/v1/responses/compact", body)
                self.assertEqual(whole.status, 200, whole)
                self.assertEqual(whole.json["object"], "response.compaction")
                self.assertGreater(whole.json["usage"]["total_tokens"], 0)
                self.compaction(whole.json["output"])
                sent = self.fake.last(PATHS[dialect])
                self.assertEqual(sent.headers["x-initiator"], "agent")
                self.assertNotIn(b"compaction_trigger", sent.body)

    def test_the_item_expands_for_every_model_and_after_a_restart(self) -> None:
        made = self.proxy.post("/v1/responses", self.trigger("gpt-5.4")).json["output"]
        text = cp.unpack_opaque(made[0]["encrypted_content"])[0][2]
        self.assertIn("Echo", text)
        with Proxy(self.fake) as other:
            for dialect, model in ONLY.items():
                reply = other.post("/v1/responses", response("x", model, input=[
                    {"role": "developer", "content": "Be brief."}, *made,
                    {"role": "user", "content": "go on"}]))
                sent = self.fake.last(PATHS[dialect])
                with self.subTest(dialect=dialect):
                    self.assertEqual(reply.status, 200, reply)
                    self.assertIn(json.dumps(cp.SUMMARY_HEAD + text)[1:-1],
                                  json.dumps(sent.json))
                    self.assertNotIn(b"compaction", sent.body)

    def test_what_models_did_before_the_item_is_left_out(self) -> None:
        item = {"type": "compaction", "encrypted_content": cp.pack_opaque("compaction", None, "S")}
        edit = cp.BodyEdit({"input": [*self.history(), {"type": "compaction_trigger"}, item,
                                  {"role": "user", "content": "go on"}]})
        cp.expand_compactions(edit, cp.RESPONSES)
        self.assertEqual([(i.get("role"), i["content"]) for i in edit.body["input"]], [
            ("developer", "Be brief."), ("user", "The secret word is maple."),
            ("user", cp.SUMMARY_HEAD + "S"), ("user", "go on")])

    def test_the_upstreams_own_compaction_is_passed_on(self) -> None:
        self.fake.compacts = True
        for path in ("/v1/responses", "/v1/responses/compact"):
            reply = self.proxy.post(path, self.trigger("gpt-5.4"))
            item = self.compaction(reply.json["output"])
            self.assertTrue(self.fake.is_sealed("reasoning", item["encrypted_content"]))
        self.assertEqual(self.fake.count("/responses"), 2)
        later = [item, {"role": "user", "content": "go on"}]
        self.assertEqual(self.proxy.post("/v1/responses", response(
            "x", "gpt-5.4", input=later)).status, 200)
        self.assertEqual(self.fake.last("/responses").json["input"][0]["encrypted_content"],
                         item["encrypted_content"])
        reply = self.proxy.post("/v1/responses", response("x", "claude-sonnet-4.6", input=later))
        self.assertEqual(reply.status, 200)
        self.assertIn("compaction", reply.headers["x-copilot-proxy-lossy"])
        self.assertIn(cp.UNREADABLE_SUMMARY, json.dumps(self.fake.requests[-1].json))

    def test_a_refused_trigger_is_remembered(self) -> None:
        for count in (2, 3):
            self.assertEqual(self.proxy.post("/v1/responses", self.trigger("gpt-5.4")).status, 200)
            self.assertEqual(self.fake.count("/responses"), count)

    def test_a_stored_compaction_is_found_by_its_id(self) -> None:
        first = self.proxy.post("/v1/responses", dict(self.trigger("gpt-5.4"), store=True)).json
        reply = self.proxy.post("/v1/responses", response(
            "go on", "gpt-5.4", previous_response_id=first["id"]))
        self.assertEqual(reply.status, 200, reply)
        sent = json.dumps(self.fake.last("/responses").json["input"])
        self.assertIn("maple", sent)
        self.assertNotIn("found it", sent)

    def test_errors_come_back_in_both_forms(self) -> None:
        wrong = Answer(402, {}, {"error": {"message": "no quota", "code": "quota_exceeded"}})
        for model, path in (("claude-opus-4.7", "/v1/messages"), ("gpt-5.4", "/responses")):
            self.fake.script(path, wrong)
            reply = self.proxy.post("/v1/responses", self.trigger(model, stream=True))
            self.assertEqual((reply.status, reply.json["error"]["code"]), (402, "quota_exceeded"))
        self.fake.script("/v1/messages", Answer(200, {}, {"type": "message", "content": []}))
        with Proxy(self.fake) as other:
            reply = other.post("/v1/responses/compact", self.trigger("claude-opus-4.7"))
            self.assertEqual(reply.status, 502)
            self.assertIn("no summary", reply.json["error"]["message"])
        with Proxy(self.fake, keepalive_s=0.02) as other:
            self.fake.script("/v1/messages", Answer(402, {}, {"error": {"message": "no quota"}},
                                                    hold=True))
            got: list[Any] = []
            thread = threading.Thread(target=lambda: got.append(other.stream(
                "/v1/responses", self.trigger("claude-opus-4.7"))))
            thread.start()
            self.fake.wait_for(lambda: self.fake.holding)
            time.sleep(0.1)                               # until a keep-alive commits to 200
            self.fake.release()
            thread.join(10)
            self.assertEqual(got[0].status, 200)
            self.assertEqual(got[0].events[-1]["type"], "response.failed")
            self.assertIn("no quota", got[0].events[-1]["response"]["error"]["message"])


if __name__ == "__main__":
    unittest.main()
