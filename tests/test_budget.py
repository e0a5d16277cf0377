"""The budget of a day and of sessions: what counts and what it refuses (section 17)."""
from __future__ import annotations

import contextlib
import json
import threading
import time
import unittest
from typing import Any, Iterator, List

from support import REQUESTS, Proxy, StillClock, chat, response, wait_until
import copilot_proxy as cp
from cases import HistoryCase, Reader


def local(year: int, month: int, day: int, hour: int = 0, minute: int = 0, second: int = 0
          ) -> float:
    return time.mktime((year, month, day, hour, minute, second, 0, 0, -1))


class BudgetTest(HistoryCase):
    noon = local(2026, 11, 21, 12)

    def setUp(self) -> None:
        super().setUp()
        self.clock = StillClock(self.noon)

    @contextlib.contextmanager
    def limited(self, **settings: Any) -> Iterator[Proxy]:
        with Proxy(self.fake, clock=self.clock, **dict({"no_history": False}, **settings)) as proxy:
            yield proxy

    def cost(self) -> float:
        """Credits of one request of `chat("a")`."""
        self.proxy.post("/v1/chat/completions", chat("a"))
        return self.fake.told[-1][4] / 1e9

    def test_warning_then_429_in_every_dialect_until_midnight(self) -> None:
        limit = self.cost() * 4.5
        with self.limited(budget=limit) as proxy, Reader(proxy) as reader:
            for at in range(5):
                self.assertEqual(proxy.post("/v1/chat/completions", chat("a")).status, 200)
                told = wait_until(lambda: reader.of("budget")[at:])[0]
                self.assertEqual(told["state"], ("ok", "ok", "ok", "warning", "spent")[at])
                wait_until(lambda: len(proxy.app.ledger.recent) == at + 1)
            self.assertEqual(proxy.log_text().count("of today's budget"), 2)
            report = self.stats(proxy)["budget"]
            self.assertAlmostEqual(report["percent"], 500 / 4.5, places=3)
            self.assertEqual((report["ends_at"], report["state"], report["estimated"]),
                             (local(2026, 11, 22), "spent", False))
            asked = len(self.fake.requests)
            for path, make in REQUESTS + (("/v1/embeddings", lambda text: {
                    "model": "text-embedding-3-small", "input": text}),):
                for stream in (False, True):
                    reply = proxy.post(path, dict(make("a"), stream=stream))
                    error = reply.json["error"]
                    self.assertEqual(reply.status, 429)
                    self.assertEqual(error["type"], "rate_limit_error")
                    self.assertIn("2026-11-22 00:00", error["message"])
                    self.assertEqual(error.get("code", "budget_exceeded"), "budget_exceeded")
                    self.assertEqual(reply.headers["x-should-retry"], "false")
                    self.assertAlmostEqual(int(reply.headers["retry-after"]), 12 * 3600, delta=2)
            self.assertEqual(len(self.fake.requests), asked)
            self.assertEqual(proxy.get("/v1/models").status, 200)
            self.clock.wall = local(2026, 11, 21, 23, 59, 59)
            self.assertEqual(proxy.post("/v1/chat/completions", chat("a")).status, 429)
            self.clock.wall = local(2026, 11, 22)
            self.assertEqual(proxy.post("/v1/chat/completions", chat("a")).status, 200)
            self.assertEqual(self.stats(proxy)["budget"]["ends_at"], local(2026, 11, 23))

    def test_it_survives_a_restart_of_the_same_day(self) -> None:
        limit = self.cost() * 1.5
        with self.limited(budget=limit) as first:
            for _ in range(2):
                self.assertEqual(first.post("/v1/chat/completions", chat("a")).status, 200)
                wait_until(lambda: self.stats(first)["budget"]["used"])
            self.assertEqual(first.post("/v1/chat/completions", chat("a")).status, 429)
            used = self.stats(first)["budget"]["used"]
            first.app.close()
            with self.limited(budget=limit, data_dir=first.data_dir) as second:
                self.assertEqual(second.post("/v1/chat/completions", chat("a")).status, 429)
                self.assertEqual(self.stats(second)["budget"]["used"], used)
                second.app.close()
            self.clock.wall += 86400
            with self.limited(budget=limit, data_dir=first.data_dir) as third:
                self.assertEqual(third.post("/v1/chat/completions", chat("a")).status, 200)
        with self.limited(budget=limit, no_history=True) as without:
            for status in (200, 200, 429):
                self.assertEqual(without.post("/v1/chat/completions", chat("a")).status, status)
                wait_until(lambda: not without.app.ledger.running)

    def test_nothing_is_lost_when_the_clock_passes_midnight(self) -> None:
        self.clock.wall = local(2026, 11, 21, 23, 59, 59)
        with self.limited(budget=1e5) as proxy:
            statuses: List[int] = []

            def run() -> None:
                for at in range(20):
                    path, make = REQUESTS[at % 3]
                    reply = proxy.post(path, dict(make("a"), stream=at % 2 == 1))
                    statuses.append(reply.status)

            threads = [threading.Thread(target=run) for _ in range(3)]
            for thread in threads:
                thread.start()
            wait_until(lambda: len(statuses) > 15)
            self.clock.wall += 2
            for thread in threads:
                thread.join(30)
            self.assertEqual(statuses, [200] * 60)
            rows = self.rows(60, proxy)
            days = proxy.get("/history/summary").json["by_day"]
            self.assertEqual([day["day"] for day in days], ["2026-11-21", "2026-11-22"])
            spent = sum(row["nano_aiu"] for row in rows if row["at"] > self.clock.wall - 1)
            self.assertEqual(spent, round(self.stats(proxy)["budget"]["used"] * 1e9))
            self.assertEqual(sum(day["nano_aiu"] for day in days),
                             sum(told[4] for told in self.fake.told))

    def test_a_session_has_a_budget_of_its_own(self) -> None:
        cost = self.cost()
        with self.limited() as proxy:
            headers = {"x-copilot-proxy-budget": "%.9f" % (cost * 1.5), "session_id": "one"}
            for status in (200, 200, 429):
                reply = proxy.post("/v1/chat/completions", chat("a"), **headers)
                self.assertEqual(reply.status, status)
                wait_until(lambda: not proxy.app.ledger.running)
            self.assertIn("session", reply.json["error"]["message"])
            self.assertNotIn("retry-after", reply.headers)
            self.assertEqual(proxy.post("/v1/chat/completions", chat("a"), **dict(
                headers, session_id="two")).status, 200)
            session = self.rows(4, proxy)[-1]["session"]
            report = self.stats(proxy)["budget"]
            self.assertIsNone(report["limit"])
            self.assertEqual([(s["session"], s["state"]) for s in report["sessions"]][0],
                             (session, "spent"))
            proxy.app.close()
            with self.limited(data_dir=proxy.data_dir) as again:
                self.assertEqual(again.post("/v1/chat/completions", chat("a"),
                                            **headers).status, 429)
                for wrong in ("much", "-1", "nan"):
                    self.assertEqual(again.post("/v1/chat/completions", chat("a"), **{
                        "x-copilot-proxy-budget": wrong}).status, 400, wrong)

    def test_what_is_not_told_counts_as_estimated(self) -> None:
        self.fake.quirks.add("no_credits")
        with self.limited(budget=100.0) as proxy:
            proxy.post("/v1/responses", response("a"))
            row = self.rows(1, proxy)[0]
            report = self.stats(proxy)["budget"]
            self.assertEqual((report["used"], report["estimated"]),
                             (row["estimate"] / 1e9, True))

    def test_session_keys(self) -> None:
        key = cp.session_key
        named = key({"session_id": "abc"}, {})
        self.assertEqual(named, key({"x-session-id": "abc"}, {"prompt_cache_key": "other"}))
        self.assertEqual(named, key({}, {"prompt_cache_key": "abc"}))
        self.assertEqual(key({}, {"metadata": {"user_id": "user_x_account_y_session_z"}}),
                         key({}, {"metadata": {"user_id": "user_1_account_2_session_z"}}))
        old, new = ({"metadata": {"user_id": json.dumps({"device_id": d, "session_id": "s"})}}
                    for d in ("one", "two"))
        self.assertEqual(key({}, old), key({}, new))
        for nothing in ({}, {"prompt_cache_key": 5}, {"metadata": 5}, {"metadata": {"user_id": 5}},
                        {"metadata": {"user_id": "me"}}):
            self.assertIsNone(key({}, nothing), nothing)


class BudgetLockTest(unittest.TestCase):
    def test_sessions_may_come_while_the_budget_is_read(self) -> None:
        """The dictionary of limits is looked through by all and changed by each new session."""
        budget = cp.Budget(0, time.time, cp.logging.getLogger("copilot_proxy"), lambda *a: None)
        budget.loaded.set()
        budget._spent[""] = 0

        class Guarded(dict):                                      # type: ignore[type-arg]
            def __setitem__(self, key: Any, value: Any) -> None:
                assert budget._lock.locked(), "changed without the lock"
                super().__setitem__(key, value)

        budget._limits = Guarded()
        cp.run(budget.admit("a", "5"))
        self.assertEqual(budget._limits, {"a": 5})

    def full(self) -> cp.Budget:
        """A budget with as many limited sessions as are remembered."""
        budget = cp.Budget(50, time.time, cp.logging.getLogger("copilot_proxy"), lambda *a: None)
        budget.loaded.set()
        for number in range(cp.MAX_SESSIONS):
            cp.run(budget.admit("s%d" % number, "5"))
        return budget

    def test_a_known_session_may_change_its_budget_when_there_is_no_room_for_new_ones(self) -> None:
        budget = self.full()
        budget._add({"s1": 6 * cp.NANO})
        with self.assertRaises(cp.RateLimited):
            cp.run(budget.admit("s1", "5"))
        cp.run(budget.admit("s1", "7"))

    def test_a_new_session_has_its_budget_when_a_thousand_others_have_one(self) -> None:
        budget = self.full()
        budget._add({"new": 6 * cp.NANO})
        with self.assertRaises(cp.RateLimited):
            cp.run(budget.admit("new", "5"))
        self.assertLessEqual(len(budget._limits), cp.MAX_SESSIONS)
        self.assertEqual(budget._limits[""], 50)           # the day's own is never dropped


if __name__ == "__main__":
    unittest.main()
