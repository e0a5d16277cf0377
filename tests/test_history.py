"""What requests cost, what is left, and the record of them: figures, files, events, budget."""
from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import stat
import sys
import threading
import time
import unittest
from typing import Any, Dict, Optional
from unittest import mock

from support import (REQUESTS, SLOW, Proxy, ProxyCase, chat, long_run, message, response,
                     second_proxy, wait_until)
import copilot_proxy as cp
from fake_upstream import CHAT, MESSAGES, Answer, FakeUpstream
from cases import HistoryCase, Reader

COUNTS = ("input", "cache_read", "cache_write", "output", "reasoning", "nano_aiu")
BODIES = {"/v1/chat/completions": "messages", "/v1/responses": "input", "/v1/messages": "messages"}
#: (route, body): three dialects, each to a model of its own and to one of another dialect
MIXED = (("/v1/chat/completions", chat("one")), ("/v1/responses", response("two")),
         ("/v1/messages", message("three")),
         ("/v1/messages", message("four", model="gpt-5.3-codex")),
         ("/v1/responses", response("five", model="claude-sonnet-4.6")),
         ("/v1/chat/completions", chat("six", model="gpt-5.3-codex")),
         ("/v1/chat/completions", chat("seven", model="claude-sonnet-4.6")))


class FigureTest(HistoryCase):
    """Tokens and nano-AIU are those that the upstream told, exactly."""

    def play(self, proxy: Proxy, count: int, seed: int) -> None:
        """Mixed requests by four clients at once."""
        def run(first: int) -> None:
            for at in range(first, count, 4):
                path, body = MIXED[(at + seed) % len(MIXED)]
                body = dict(body, stream=at // len(MIXED) % 2 == 1)
                key = BODIES[path]
                text = "request %d of %d %s" % (at, seed, "x" * (at * 7 % 400))
                body[key] = text if key == "input" else [{"role": "user", "content": text}]
                reply = proxy.post(path, body, **{"User-Agent": "tester-%d/1.0 (x)" % (at % 3)})
                self.assertEqual(reply.status, 200, reply)

        threads = [threading.Thread(target=run, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

    def expected(self, fake: FakeUpstream, model: str = "") -> Dict[str, int]:
        told = [answer for answer in fake.told if model in ("", answer[0])]
        return {"requests": len(told), "input": sum(t[1] - t[2] for t in told),
                "cache_read": sum(t[2] for t in told), "output": sum(t[3] for t in told),
                "nano_aiu": sum(t[4] for t in told)}

    def test_sums_are_what_the_upstream_told_for_two_accounts(self) -> None:
        count = 250 if SLOW else 30
        with FakeUpstream() as other, Proxy(other, no_history=False,
                                            github_token="ghu_other") as second:
            other.github_tokens.add("ghu_other")
            for at, (proxy, fake) in enumerate(((self.proxy, self.fake), (second, other))):
                self.play(proxy, count, at)
                rows = self.rows(count, proxy)
                wanted = self.expected(fake)
                self.assertEqual(wanted["requests"], count)
                totals = self.stats(proxy)["totals"]
                summary = proxy.get("/history/summary").json
                for name, value in wanted.items():
                    self.assertEqual(totals[name], value, name)
                    self.assertEqual(summary["total"][name], value, name)
                    self.assertEqual(sum(day[name] for day in summary["by_day"]), value, name)
                    if name != "requests":
                        self.assertEqual(sum(row[name] for row in rows), value, name)
                self.assertEqual(totals["credits"], wanted["nano_aiu"] / 1e9)
                for entry in summary["by_model"]:
                    self.assertEqual({k: entry[k] for k in wanted},
                                     self.expected(fake, entry["model"]))
                self.assertEqual({entry["client"] for entry in summary["by_client"]},
                                 {"tester-0", "tester-1", "tester-2"})
                self.assertEqual(len({row["account"] for row in rows}), 1)
                self.assertEqual({row["streamed"] for row in rows}, {True, False})
                self.assertEqual({row["route"] for row in rows}, {"passthrough", "translated"})
            self.assertNotEqual(self.rows(count)[0]["account"],
                                self.rows(count, second)[0]["account"])

    def test_accounts_that_are_named_by_their_tokens_are_told_apart(self) -> None:
        self.fake.github_tokens.update(("ghu_first", "ghu_second"))
        for at in range(12):
            path, body = MIXED[at % len(MIXED)]
            token = ("ghu_first", "ghu_second")[at % 2]
            self.assertEqual(self.proxy.post(path, dict(body, stream=at > 5), **{
                "Authorization": "Bearer " + token}).status, 200)
        rows = self.rows(12)
        names = {token: cp.stable_id("", token)[:8] for token in ("ghu_first", "ghu_second")}
        for token, name in names.items():
            mine = [row for row in rows if row["account"] == name]
            told = [t for t in self.fake.told if t[5] == token]
            self.assertEqual((len(mine), len(told)), (6, 6))
            self.assertEqual(sum(row["nano_aiu"] for row in mine), sum(t[4] for t in told))
            self.assertEqual(sum(row["output"] for row in mine), sum(t[3] for t in told))

    def test_a_row_tells_who_asked_what_of_whom(self) -> None:
        reply = self.proxy.stream("/v1/messages?beta=true", message(
            "SECRET WORDS", model="gpt-5.3-codex", top_k=3, metadata={
                "user_id": "user_ab_account_x_session_0001"}),
            **{"User-Agent": "claude-cli/2.1.0 (external, cli)"})
        row = self.rows(1)[0]
        wanted = {"id": reply.headers["x-request-id"], "state": "done", "n": 1,
                  "client": "claude-cli/2.1.0", "dialect": "messages", "path": "/responses",
                  "route": "translated", "asked": "gpt-5.3-codex", "model": "gpt-5.3-codex",
                  "streamed": True, "status": 200, "error": None, "message": None,
                  "initiator": "user", "repairs": [], "losses": ["top_k"],
                  "upstream_id": reply.headers["x-github-request-id"]}
        self.assertEqual({name: row[name] for name in wanted}, wanted)
        self.assertAlmostEqual(row["at"], time.time(), delta=30)
        self.assertRegex(row["account"], r"\A[0-9a-f]{8}\Z")
        self.assertRegex(row["session"], r"\A[0-9a-f]{8}\Z")
        self.assertTrue(0 < row["first_ms"] <= row["total_ms"] < 30000)
        self.assertEqual(row["credits"], row["nano_aiu"] / 1e9)
        for name in os.listdir(self.proxy.data_dir):
            if name.startswith("history"):
                with open(os.path.join(self.proxy.data_dir, name), "rb") as file:
                    data = file.read()
                for word in (b"SECRET", b"WORDS", b"Echo", b"session_0001", b"ghu_"):
                    self.assertNotIn(word, data)

    def test_what_the_upstream_does_not_tell_is_unknown_and_estimated_by_its_prices(self) -> None:
        self.fake.quirks.add("no_credits")
        for path, make in REQUESTS:
            for stream in (False, True):
                body = make("hello")
                self.assertNotIn("x-copilot-proxy-credits",
                                 self.proxy.post(path, dict(body, stream=stream)).headers)
        for row in self.rows(6):
            told = next(t for t in self.fake.told if t[0] == row["model"] and (
                t[1] - t[2], t[2]) == (row["input"], row["cache_read"]))
            self.assertIsNone(row["nano_aiu"])
            self.assertIsNone(row["credits"])
            if row["model"] == "gpt-5.3-codex":      # 1.75, 0.17 and 14 USD per million
                self.assertEqual(row["estimate"], round(
                    ((told[1] - told[2]) * 175 + told[2] * 17 + told[3] * 1400) * 1000))
        totals = self.stats()["totals"]
        self.assertIsNone(totals["credits"])
        self.assertGreater(totals["estimated_credits"], 0)
        self.fake.script(CHAT, Answer(200, body={"id": "x", "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "a"},
             "finish_reason": "stop"}]}))
        self.proxy.post("/v1/chat/completions", chat("nothing told"))
        row = self.rows(7)[0]
        self.assertEqual([row[name] for name in COUNTS + ("estimate",)], [None] * 7)

    def test_the_header_has_the_credits_to_the_last_digit(self) -> None:
        usage = {"total_nano_aiu": 1500000000}
        for path, make in REQUESTS:
            with self.subTest(path=path):
                self.proxy.post(path, make("a"))
                told = self.fake.told[-1][4]
                reply = self.proxy.post(path, make("a"))
                self.assertEqual(reply.headers["x-copilot-proxy-credits"], "0.%09d" % told)
                self.assertNotIn("x-copilot-proxy-credits", self.proxy.stream(
                    path, make("a")).headers)
        self.fake.script(CHAT, Answer(200, body={"choices": [{"message": {
            "role": "assistant", "content": "a"}, "finish_reason": "stop"}],
            "copilot_usage": usage}))
        reply = self.proxy.post("/v1/chat/completions", chat("a"))
        self.assertEqual(reply.headers["x-copilot-proxy-credits"], "1.500000000")

    def test_embeddings_and_old_completions_are_counted_over_all_their_calls(self) -> None:
        self.proxy.post("/v1/completions", {"model": "gpt-4.1", "prompt": ["a", "b", "c"]})
        row = self.rows(1)[0]
        self.assertEqual((row["dialect"], row["input"] + row["cache_read"], row["nano_aiu"]), (
            "completions", sum(t[1] for t in self.fake.told), sum(t[4] for t in self.fake.told)))
        self.proxy.stream("/v1/completions", {"model": "gpt-4.1", "prompt": "d"})
        self.assertEqual(self.rows(2)[0]["nano_aiu"], self.fake.told[-1][4])
        reply = self.proxy.post("/v1/embeddings", {
            "model": "text-embedding-3-small", "input": ["word"] * 600})
        row = self.rows(3)[0]
        self.assertEqual((row["dialect"], row["input"], row["output"], row["path"]), (
            "embeddings", reply.json["usage"]["prompt_tokens"], None, "/embeddings"))

    def test_failures_have_their_kind_and_words_only_while_they_are_fresh(self) -> None:
        self.proxy.post("/v1/chat/completions", chat("a", model="no-such-model"))
        self.fake.script(MESSAGES, Answer(402, body={"message": "You have no quota",
                                                     "code": "quota_exceeded"}))
        self.proxy.post("/v1/messages", message("a"))
        self.proxy.stream("/v1/responses", response("@@error=1@@ hello"))
        self.proxy.stream("/v1/chat/completions", chat("@@cut=1@@ hello"))
        self.proxy.post("/v1/messages", b"{not json")
        rows = self.rows(5)
        self.assertEqual([(r["status"], r["error"]) for r in rows], [
            (400, "invalid_request_error"), (200, "upstream_stream_ended"), (200, "stream_error"),
            (402, "quota_exceeded"), (404, "model_not_found")])
        self.assertEqual({row["message"] for row in rows}, {None})
        recent = self.stats()["recent"]
        self.assertIn("no quota", recent[3]["message"])
        self.assertEqual(self.stats()["totals"]["errors"], 4)  # a 404 is none

    def test_only_requests_to_models_are_kept(self) -> None:
        for path in ("/health", "/v1/models", "/stats", "/history", "/nothing", "/"):
            self.proxy.get(path)
        self.proxy.post("/v1/messages/count_tokens", message("count me"))
        self.assertEqual([row["dialect"] for row in self.rows(1)], ["count_tokens"])


class MeterTest(unittest.TestCase):
    """The pure part: bytes of any cut in, counts out."""

    def test_every_cut_of_a_stream_gives_the_same_counts(self) -> None:
        stream = (b'data: {"choices":[{"index":0,"delta":{"content":"a"}}],"usage":null}\n\n'
                  b'data: {"choices":[{"index":0,"delta":{"content":"\\"usage\\":{\\"x\\":1}"},'
                  b'"finish_reason":"stop"}]}\r\n\r\n'
                  b'data: {"choices":[],"usage" : {"prompt_tokens":10,"completion_tokens":3,'
                  b'"prompt_tokens_details":{"cached_tokens":4}},"copilot_usage":'
                  b'{"total_nano_aiu":9007199254740991},"copilot_quota_snapshots":{"chat":{}}}\n\n'
                  b"data: [DONE]\n\n")
        for size in (1, 2, 3, 7, 50, len(stream)):
            relay = cp.CHAT.stream("m", {})
            for at in range(0, len(stream), size):
                relay.feed(stream[at:at + size])
            relay.close()
            self.assertEqual(relay.meter.counts, {"input": 6, "cache_read": 4, "output": 3,
                                                  "nano_aiu": 9007199254740991})
            self.assertEqual(relay.meter.quotas, {"chat": {}})

    def test_odd_values_are_not_counts(self) -> None:
        for odd in (None, True, -1, "5", 1.5, 1e300, 2 ** 63, [], {}):
            meter = cp.UsageMeter()
            meter.take({"usage": {"prompt_tokens": odd, "output_tokens": odd,
                                  "prompt_tokens_details": {"cached_tokens": odd}},
                        "copilot_usage": {"total_nano_aiu": odd}})
            meter.take({"usage": odd, "copilot_usage": odd, "response": odd,
                        "copilot_quota_snapshots": odd if not isinstance(odd, dict) else 5})
            self.assertEqual((meter.counts, meter.quotas), ({}, {}), odd)
        meter.take({"usage": {"input_tokens": 5.0, "output_tokens": 0}})
        self.assertEqual(meter.counts, {"input": 5, "output": 0})

    def test_prices(self) -> None:
        def model(**prices: Any) -> cp.Model:
            return cp.Model.from_entry({"id": "m", "billing": {"token_prices": prices}})

        usual = {"input_price": 100, "cache_price": 10, "output_price": 500}
        counts = {"input": 1000, "cache_read": 2000, "output": 10}
        priced = model(batch_size=1000000, default=usual)
        self.assertEqual(priced.prices.cost(counts), (1000 * 100 + 2000 * 10 + 10 * 500) * 1000)
        self.assertEqual(priced.prices.cost(dict(counts, cache_write=100)),
                         (1100 * 100 + 2000 * 10 + 10 * 500) * 1000)
        newer = model(batch_size=1000000, default=dict(
            usual, cache_read_price=20, cache_write_price=125, context_max=3000),
            long_context={"input_price": 200})
        self.assertEqual(newer.prices.cost(counts), (1000 * 100 + 2000 * 20 + 10 * 500) * 1000)
        self.assertEqual(newer.prices.cost(dict(counts, cache_write=100)),
                         (1000 * 200 + 2000 * 20 + 100 * 125 + 10 * 500) * 1000)
        for unknown in (model(), model(batch_size=0, default=usual), model(batch_size=1000),
                        model(batch_size=1000, default={"input_price": "1"})):
            self.assertIsNone(unknown.prices.cost(counts))
        self.assertIsNone(priced.prices.cost({"output": 5}))


class QuotaTest(ProxyCase):
    """Lanes out of headers, streams and the usage answer."""

    def lanes(self) -> Dict[str, Dict[str, Any]]:
        return {lane["name"]: lane for lane in self.proxy.get("/stats").json["quotas"]}

    def test_headers_streams_and_usage_all_tell_lanes(self) -> None:
        self.assertEqual(self.lanes(), {})
        self.fake.script(CHAT, Answer(200, body={"choices": [{"message": {"content": "a"}}]},
                                      headers={
            "x-quota-snapshot-premium_models": "ent=-1&ov=0.0&ovPerm=false&rem=100",
            "x-usage-ratelimit-weekly": "ent=1000&ov=0&rem=12.5&rst=2026-11-28T00%3A00%3A00Z",
            "x-usage-ratelimit-session": "nonsense"}))
        self.proxy.post("/v1/chat/completions", chat("a"))
        lanes = self.lanes()
        first = lanes["premium_interactions"]
        self.assertEqual((first["total"], first["left"], first["percent_used"], first["source"]),
                         (300, 226.5, 24.5, "header"))
        self.assertEqual(first["resets_at"], 1796083200.0)
        self.assertTrue(lanes["premium_models"]["unlimited"])
        self.assertEqual((lanes["weekly"]["percent_used"], lanes["weekly"]["used"]), (87.5, 875))
        self.assertEqual([lanes["session"][k] for k in ("total", "left", "percent_used")],
                         [None] * 3)
        self.proxy.stream("/v1/responses", response("a"))
        wait_until(lambda: self.lanes()["premium_interactions"]["source"] == "stream")
        self.assertEqual(self.lanes()["premium_interactions"]["percent_left"], 75.4)
        self.fake.usage_extra = {"quota_snapshots": {"brand_new_lane": {
            "entitlement": 300, "remaining": 0, "percent_remaining": 0, "overage_count": 30}}}
        self.assertIn("brand_new_lane", self.proxy.get("/usage").json["quota_snapshots"])
        lane = self.lanes()["brand_new_lane"]
        self.assertEqual((lane["percent_used"], lane["used"], lane["source"]), (110, 330, "usage"))
        self.assertEqual(len({lane["account"] for lane in self.lanes().values()}), 1)

    def test_a_refusal_tells_lanes_too(self) -> None:
        self.fake.script(CHAT, Answer(429, body="slow down", headers={
            "x-usage-ratelimit-session": "ent=100&rem=0&rst=2026-11-22T00%3A00%3A00Z"}))
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("a")).status, 429)
        self.assertEqual(self.lanes()["session"]["percent_used"], 100)

    def test_times(self) -> None:
        for text, wanted in (("2026-12-01", 1796083200.0), ("2026-12-01T00:00:00Z", 1796083200.0),
                             ("2026-12-01T00:00:00.000Z", 1796083200.0), (1796083200, 1796083200.0),
                             ("soon", None), (None, None), ({}, None), (True, None)):
            self.assertEqual(cp.moment_or_none(text), wanted, text)


class DatabaseTest(HistoryCase):
    """The file: its rights, bounds and misfortunes."""

    def ask(self, proxy: Optional[Proxy] = None) -> None:
        self.assertEqual((proxy or self.proxy).post("/v1/chat/completions", chat("a")).status, 200)

    @unittest.skipIf(os.name == "nt", "rights of POSIX")
    def test_only_the_user_may_read_it(self) -> None:
        self.ask()
        self.rows(1)
        for name in os.listdir(self.proxy.data_dir):
            if name.startswith("history"):
                mode = os.stat(os.path.join(self.proxy.data_dir, name)).st_mode
                self.assertEqual(stat.S_IMODE(mode), 0o600, name)

    def test_it_outlives_the_process_and_is_read_in_pages(self) -> None:
        for _ in range(5):
            self.ask()
        self.rows(5)
        self.proxy.app.close()
        with second_proxy(self, no_history=False, data_dir=self.proxy.data_dir) as again:
            page = again.get("/history?limit=2").json
            self.assertEqual([row["n"] for row in page["rows"]], [5, 4])
            page = again.get("/history?limit=3&before=%d" % page["next"]).json
            self.assertEqual([row["n"] for row in page["rows"]], [3, 2, 1])
            self.assertEqual(again.get("/history?before=1").json["rows"], [])
            self.assertIsNone(again.get("/history?before=3").json["next"])
            for query in ("limit=0", "limit=x", "limit=501", "before=-1", "limit=" + "9" * 5000):
                self.assertEqual(again.get("/history?" + query).status, 400, query)
            self.assertEqual(again.get("/history/summary?days=0").status, 400)

    def test_without_it_nothing_is_written_and_the_newest_are_in_memory(self) -> None:
        with second_proxy(self) as proxy:
            for _ in range(3):
                self.ask(proxy)
            found = wait_until(lambda: (lambda h: len(h["rows"]) == 3 and h)(
                proxy.get("/history").json))
            self.assertEqual((found["enabled"], found["next"]), (False, None))
            self.assertEqual(proxy.get("/history/summary").json["total"]["requests"], 0)
            self.assertEqual(os.listdir(proxy.data_dir), [])

    def test_the_demo_keeps_it_in_memory(self) -> None:
        with second_proxy(self, no_history=False, demo=True) as proxy:
            self.ask(proxy)
            self.assertEqual(self.rows(1, proxy)[0]["model"], "gpt-4.1")
            self.assertEqual(os.listdir(proxy.data_dir), [])

    def wait_for_tries(self, proxy: Proxy) -> None:
        """Until the history has paused three times, after tries that failed."""
        hurry = proxy.app.ledger.history._hurry
        with mock.patch.object(hurry, "wait", wraps=hurry.wait) as wait:
            wait_until(lambda: wait.call_count >= 3)

    def test_a_locked_file_delays_nothing_and_loses_nothing(self) -> None:
        self.ask()
        self.rows(1)
        lock = sqlite3.connect(self.path(), isolation_level=None)
        self.addCleanup(lock.close)
        lock.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        for _ in range(10):
            self.ask()
        self.assertLess(time.monotonic() - began, 5)
        wait_until(lambda: "locked" in (self.stats()["history"]["problem"] or ""))
        self.wait_for_tries(self.proxy)
        self.assertEqual(self.proxy.log_text().count("no history is written"), 1)
        lock.execute("COMMIT")
        self.rows(11)
        self.assertIsNone(self.stats()["history"]["problem"])
        self.assertIn("the history is written again", self.proxy.log_text())

    def test_a_broken_file_is_moved_aside_and_a_new_one_begun(self) -> None:
        for content in (b"this is no database" * 100, None):
            proxy = Proxy(self.fake, no_history=False)
            with self.subTest(content=content and content[:20]):
                path = self.path(proxy)
                if content:
                    with open(path, "wb") as file:
                        file.write(content)
                else:
                    link = sqlite3.connect(path)
                    link.execute("CREATE TABLE requests (n INTEGER PRIMARY KEY, other TEXT)")
                    link.commit()
                    link.close()
                self.enter(proxy)
                self.ask(proxy)
                self.rows(1, proxy)
                aside = [n for n in os.listdir(proxy.data_dir) if ".bad-" in n]
                self.assertEqual(len(aside), 1)
                if content:
                    with open(os.path.join(proxy.data_dir, aside[0]), "rb") as file:
                        self.assertEqual(file.read(), content)
                self.assertIn(aside[0], proxy.log_text())
                self.assertEqual(proxy.log_text().count("moved to"), 1)

    def test_a_file_that_breaks_while_it_is_used(self) -> None:
        self.ask()
        self.rows(1)
        path = self.path()
        link = sqlite3.connect(path)
        link.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        link.close()
        with open(path, "r+b") as file:
            file.write(b"\xff" * os.path.getsize(path))
        wait_until(lambda: self.ask() or any(".bad-" in n for n in os.listdir(
            self.proxy.data_dir)))
        self.ask()
        wait_until(lambda: self.proxy.get("/history").json["rows"])

    @unittest.skipIf(os.name == "nt", "Windows keeps open files")
    def test_a_file_that_is_deleted_is_made_again(self) -> None:
        self.ask()
        self.rows(1)
        for end in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                os.unlink(self.path() + end)
        self.ask()
        self.rows(1)
        self.assertTrue(os.path.exists(self.path()))

    def test_odd_words_of_the_upstream_do_not_stop_it(self) -> None:
        self.fake.models[0].setdefault("billing", {})["token_prices"] = {
            "batch_size": 1, "default": {"input_price": 9e15, "output_price": 9e15}}
        self.fake.script(CHAT, Answer(400, body=b'{"error":{"message":"\\ud800","code":"\\udfff'
                                      + b"x" * 9999 + b'"}}'))
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("a")).status, 400)
        for entry in self.fake.models[:3]:
            self.proxy.post("/v1/chat/completions", chat("a", model=entry["id"]))
        self.ask()
        rows = self.rows(5)
        self.assertLess(len(rows[-1]["error"]), 210)

    @long_run
    def test_a_locked_file_at_the_start_delays_one_request_at_most(self) -> None:
        self.enter(mock.patch.object(cp, "BUDGET_WAIT_S", 0.3))
        self.ask()
        self.rows(1)
        self.proxy.app.close()
        lock = sqlite3.connect(self.path(), isolation_level=None)
        self.addCleanup(lock.close)
        lock.execute("PRAGMA locking_mode=EXCLUSIVE")
        lock.execute("BEGIN EXCLUSIVE")
        with second_proxy(self, no_history=False, budget=1000.0,
                          data_dir=self.proxy.data_dir) as proxy:
            self.ask(proxy)
            began = time.monotonic()
            with mock.patch.object(cp, "BUDGET_WAIT_S", 60.0):
                for _ in range(5):
                    self.ask(proxy)
            self.assertLess(time.monotonic() - began, 60.0)
            self.assertIn("locked", wait_until(lambda: self.stats(proxy)["history"]["problem"]))
            lock.execute("COMMIT")
            lock.close()
            self.rows(7, proxy)
            self.assertEqual(round(self.stats(proxy)["budget"]["used"] * 1e9),
                             sum(told[4] for told in self.fake.told))

    def test_a_file_that_cannot_be_opened_is_told_once(self) -> None:
        proxy = Proxy(self.fake, no_history=False)
        os.mkdir(self.path(proxy))
        with proxy:
            for _ in range(20):
                self.ask(proxy)
            wait_until(lambda: self.stats(proxy)["history"]["problem"])
            self.wait_for_tries(proxy)
            self.assertEqual(proxy.log_text().count("no history is written"), 1)
            with mock.patch.object(cp, "HISTORY_WAIT_S", 0.05):
                self.assertEqual(proxy.get("/history").json["rows"], [])

    def test_a_full_disk_drops_rows_and_says_how_many(self) -> None:
        with mock.patch.object(cp, "HISTORY_QUEUE", 3), mock.patch.object(
                cp.History, "_work", side_effect=sqlite3.OperationalError(
                    "database or disk is full")):
            with second_proxy(self, no_history=False) as proxy:
                for _ in range(5):
                    self.ask(proxy)
                wait_until(lambda: self.stats(proxy)["history"]["dropped"] == 2)
                self.assertIn("full", wait_until(
                    lambda: self.stats(proxy)["history"]["problem"]))

    def test_a_python_without_sqlite_goes_without(self) -> None:
        with mock.patch.dict(sys.modules, {"sqlite3": None}):
            with second_proxy(self, no_history=False, budget=1000.0) as proxy:
                self.ask(proxy)
                wait_until(lambda: not self.stats(proxy)["history"]["enabled"])
                self.assertEqual(len(proxy.get("/history").json["rows"]), 1)
                self.assertEqual(proxy.log_text().count("no sqlite3"), 1)

    def test_old_rows_and_too_many_are_deleted(self) -> None:
        self.enter(mock.patch.object(cp, "HISTORY_ROWS", 50))
        self.enter(mock.patch.object(cp.secrets, "randbelow", lambda most: 0))   # now, not then
        row = dict.fromkeys(cp.ROW_FIELDS, "x" * 100)
        for at in range(3000):
            self.proxy.app.ledger.history.put(dict(row, id=str(at), at=time.time() if at else 5.0))
        found = wait_until(lambda: (lambda rows: rows and rows[0]["id"] == "2999" and rows)(
            self.proxy.app.ledger.history.query("SELECT id, at FROM requests ORDER BY n DESC")))
        self.assertEqual(len(found), 50)
        self.assertNotIn("0", [row["id"] for row in found])
        for at in range(3000):
            self.proxy.app.ledger.history.put(dict(row, id="again", at=time.time()))
        wait_until(lambda: not self.proxy.app.ledger.history._rows)
        rows = self.proxy.app.ledger.history.query("SELECT id FROM requests")
        self.assertEqual(len(rows), 50)

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only: two processes' worth of rows")
    def test_two_proxies_share_a_file(self) -> None:
        with second_proxy(self, no_history=False, data_dir=self.proxy.data_dir) as other:
            threads = [threading.Thread(target=lambda p=p: [self.ask(p) for _ in range(100)])
                       for p in (self.proxy, other)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            self.rows(200)
            self.assertEqual(self.stats(other)["history"]["dropped"], 0)


class EventTest(HistoryCase):
    settings = dict(no_history=False, keepalive_s=0.1, budget=1000.0)

    def test_a_request_is_told_when_it_goes_up_at_its_first_byte_and_its_end(self) -> None:
        with Reader(self.proxy) as reader:
            self.assertEqual(reader.of("hello")[0]["version"], cp.__version__)
            thread = threading.Thread(target=self.proxy.stream, args=(
                "/v1/messages", message("@@events=3 stall=1@@ hello")))
            thread.start()
            running = wait_until(lambda: reader.of("request"))[0]
            self.assertEqual((running["state"], running["status"], running["path"],
                              running["streamed"], running["output"]),
                             ("running", None, "/v1/messages", True, None))
            live = wait_until(lambda: [row for row in self.stats()["running"]
                                       if row["input"] is not None])[0]
            self.assertEqual((live["id"], live["state"]), (running["id"], "running"))
            self.assertGreater(live["input"], 0)              # told at the stream's beginning
            wait_until(lambda: self.fake.holding)
            self.fake.release()
            thread.join(10)
            begun, done = wait_until(lambda: (lambda rows: len(rows) == 3 and rows)(
                reader.of("request")))[1:]
            self.assertEqual((begun["id"], begun["state"], begun["status"], begun["nano_aiu"]),
                             (running["id"], "running", 200, None))
            self.assertEqual(begun["first_ms"], done["first_ms"])
            self.assertEqual((done["id"], done["state"], done["status"], done["nano_aiu"]),
                             (running["id"], "done", 200, self.fake.told[-1][4]))
            self.assertEqual(self.stats()["running"], [])
            self.assertTrue(wait_until(lambda: reader.of("quota"))[0]["lanes"])
            self.assertEqual(wait_until(lambda: reader.of("budget"))[0]["limit"], 1000)
            wait_until(lambda: b": keepalive" in reader.raw)
            self.assertNotIn("hello", json.dumps(reader.of("request")))

    def test_a_reader_that_leaves_is_forgotten_and_the_server_ends_at_once(self) -> None:
        with Reader(self.proxy):
            self.assertEqual(len(self.proxy.app.ledger.events.readers), 1)
        wait_until(lambda: not self.proxy.app.ledger.events.readers)
        self.assertEqual(self.proxy.request("HEAD", "/history/events").status, 200)
        with second_proxy(self, grace=30.0) as proxy, Reader(proxy) as reader:
            began = time.monotonic()
            proxy.server.finish(20.0)
            self.assertLess(time.monotonic() - began, 5)
            wait_until(lambda: reader.ended)

    def test_there_is_an_end_to_readers_and_slow_ones_are_cut_off(self) -> None:
        events = cp.Events()
        readers = [events.open() for _ in range(cp.MAX_READERS)]
        with self.assertRaises(cp.ProxyError) as caught:
            events.open()
        self.assertEqual(caught.exception.status, 503)
        for at in range(cp.READER_QUEUE + 1):
            for reader in readers[1:]:
                if at:
                    cp.run(reader.get(1.0))
            events.publish("request", {"at": at})
        self.assertNotIn(readers[0], events.readers)
        self.assertEqual(events.readers, readers[1:])


SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)(?:\{((?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\["\\n])*",?)*)\})? '
                    r'(-?(?:\d+(?:\.\d+)?(?:e[+-]?\d+)?|Inf)|NaN)')


class MetricsTest(HistoryCase):
    def play(self) -> str:
        for path, make in REQUESTS:
            self.proxy.post(path, make("a"))
            self.proxy.stream(path, make("a"))
        self.proxy.post("/v1/chat/completions", chat("a", model='x"\\\n{}é', stop=["a"]))
        self.proxy.post("/v1/messages", message("a", model="gpt-5.3-codex", top_k=1))
        wait_until(lambda: not [r for r in list(self.proxy.app.ledger.running.values())
                            if r.asked.label])
        wait_until(lambda: len(self.proxy.app.ledger.recent) == 8)
        reply = self.proxy.get("/metrics")
        self.assertEqual(reply.headers["content-type"],
                         "text/plain; version=0.0.4; charset=utf-8")
        return reply.body.decode()

    def test_every_line_is_of_the_text_format(self) -> None:
        text = self.play()
        self.assertTrue(text.endswith("\n"))
        kinds: Dict[str, str] = {}
        values: Dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith("# TYPE "):
                name, kind = line.split()[2:]
                self.assertNotIn(name, kinds)
                self.assertEqual(kind, "counter" if name.endswith("_total") else "gauge")
                kinds[name] = kind
            elif not line.startswith("# HELP "):
                found = SAMPLE.fullmatch(line)
                self.assertIsNotNone(found, line)
                assert found is not None
                self.assertIn(found.group(1), kinds)
                self.assertNotIn(line.rpartition(" ")[0], values)
                values[line.rpartition(" ")[0]] = float(found.group(3))
        told = [t for t in self.fake.told if t[0] == "gpt-4.1"]
        self.assertEqual(values['copilot_proxy_tokens_total{model="gpt-4.1",kind="output"}'],
                         sum(t[3] for t in told))
        self.assertEqual(values['copilot_proxy_credits_total{model="gpt-4.1"}'],
                         sum(t[4] for t in told) / 1e9)
        self.assertEqual(values['copilot_proxy_losses_total{field="top_k"}'], 1)
        self.assertEqual(values['copilot_proxy_requests_total{route="translated",status="200"}'], 1)

    def test_a_parser_that_is_not_ours_takes_it(self) -> None:
        try:
            from prometheus_client.parser import text_string_to_metric_families
        except ImportError:
            self.skipTest("prometheus_client is not installed")
        families = {family.name: family for family in text_string_to_metric_families(self.play())}
        self.assertEqual(families["copilot_proxy_requests"].type, "counter")
        self.assertEqual(sum(s.value for s in families["copilot_proxy_credits"].samples) * 1e9,
                         sum(t[4] for t in self.fake.told))
        lanes = families["copilot_proxy_quota_used_percent"].samples
        self.assertEqual({s.labels["lane"] for s in lanes}, {"premium_interactions"})


class BodyLogTest(HistoryCase):
    def test_words_are_written_only_when_asked_for_and_it_is_said_loudly(self) -> None:
        folder = os.path.join(self.proxy.data_dir, "bodies")
        with self.assertLogs("copilot_proxy", "WARNING") as logged:
            started = second_proxy(self, log_bodies=folder)
            proxy = self.enter(started)
        self.assertIn("EVERY WORD", str(logged.output))
        with mock.patch.object(cp, "BODIES_KEPT", 6):
            for text in ("first words", "second ghu_abcdefgh words"):
                proxy.stream("/v1/messages", message(text, model="gpt-5.3-codex"))
            proxy.post("/v1/chat/completions", chat("third words"))
            proxy.get("/stats")
            names = sorted(os.listdir(folder))
            self.assertEqual(len(names), 6)
            kinds = [name.split(".")[1] for name in names]
            self.assertEqual(sorted(kinds), ["answer"] * 2 + ["request"] * 2 + ["sent"] * 2)
            texts = {}
            for name in names:
                with open(os.path.join(folder, name), encoding="utf-8") as file:
                    texts[name.split(".")[1]] = texts.get(name.split(".")[1], "") + file.read()
                if os.name != "nt":
                    self.assertEqual(stat.S_IMODE(os.stat(os.path.join(
                        folder, name)).st_mode), 0o600)
            self.assertNotIn("first words", str(texts))
            self.assertNotIn("ghu_abcdefgh", str(texts))
            for kind in ("request", "sent", "answer"):
                self.assertIn("third words", texts[kind])
                self.assertIn("second", texts[kind])
            self.assertIn("message_stop", texts["answer"])

    def test_a_folder_that_cannot_be_written_fails_no_request(self) -> None:
        folder = os.path.join(self.proxy.data_dir, "bodies")
        with second_proxy(self, log_bodies=folder) as proxy:
            with open(folder, "w"):
                pass
            self.assertEqual(proxy.post("/v1/chat/completions", chat("a")).status, 200)
            self.assertIn("--log-bodies", proxy.log_text())


class LogTest(HistoryCase):
    def test_json_lines_have_the_row_and_no_secret(self) -> None:
        import logging
        self.proxy.post("/v1/chat/completions", chat("a", model="tid=abc\" ghu_secretsecret"))
        self.rows(1)
        self.proxy.stream("/v1/responses", response("a"))
        self.rows(2)
        formatter = cp.JsonFormatter()
        lines = [json.loads(formatter.format(record)) for record in list(self.proxy.logs)]
        rows = [line for line in lines if line.get("dialect")]
        self.assertEqual([row["status"] for row in rows], [404, 200])
        self.assertEqual(rows[1]["nano_aiu"], self.fake.told[-1][4])
        self.assertEqual({line["level"] for line in lines} - {"debug"}, {"info"})
        self.assertNotIn("ghu_secret", json.dumps(lines))
        try:
            raise ValueError("Bearer abcdefgh12345")
        except ValueError:
            record = logging.LogRecord("x", logging.ERROR, "", 0, "m", (), sys.exc_info())
        line = json.loads(formatter.format(record))
        self.assertIn("ValueError", line["message"])
        self.assertNotIn("abcdefgh12345", line["message"])
        self.assertNotIn("\n", formatter.format(record))

    def test_the_models_have_prices(self) -> None:
        listed = {m["id"]: m["price"] for m in self.proxy.get("/v1/models?all=1").json["data"]}
        self.assertEqual(listed["gpt-5.3-codex"]["input"], 1.75)
        self.assertEqual(listed["gpt-5.3-codex"]["output"], 14.0)
        self.assertIsNone(listed["gpt-5.3-codex"]["cache_write"])


if __name__ == "__main__":
    unittest.main()
