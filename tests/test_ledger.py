"""What is kept of requests and quotas, by one owner (section 17)."""
from __future__ import annotations

import http.client
import logging
import time
import unittest
import unittest.mock
from typing import Any

from support import ProxyCase, TestClock, cp, send, wait_until


class FakeAccount:
    def __init__(self, name: str) -> None:
        self.id = "id-" + name
        self.name = name
        self.stats = cp.Stats()
        self.limits = unittest.mock.Mock(see=lambda lanes, source: [])


class LedgerTest(unittest.TestCase):
    def setUp(self) -> None:
        settings = cp.Settings(no_history=True).check()
        self.clock = TestClock()
        self.ledger = cp.Ledger(settings, "", logging.getLogger("copilot_proxy"), self.clock)

    def begin(self, path: str = "/chat/completions") -> cp.RequestRecord:
        asked = cp.AskedFor("POST", path, {}, self.clock()[1], time.monotonic())
        record = self.ledger.new_record(asked)
        self.ledger.begin(record)
        return record

    def end(self, *records: cp.RequestRecord) -> None:
        for record in records:
            self.ledger.end(record)
        self.ledger.settle()

    def test_a_request_runs_until_it_is_recorded(self) -> None:
        record = self.begin()
        self.assertEqual(list(self.ledger.running), [record.id])
        record.begin_answer(200)
        self.end(record)
        self.assertEqual(self.ledger.running, {})
        self.assertEqual([row["id"] for row in self.ledger.recent], [record.id])
        self.assertEqual(self.ledger.stats.group("requests"), {("local", "200"): 1})

    def test_a_request_that_cannot_be_recorded_does_not_run_for_ever(self) -> None:
        record = self.begin()
        record.row = None                                             # type: ignore[assignment]
        other = self.begin()
        with self.assertLogs("copilot_proxy", "ERROR") as logged:
            self.end(record, other)
        self.assertIn(record.id + " could not be counted", logged.output[0])
        self.assertEqual(self.ledger.running, {})
        self.assertEqual([row["id"] for row in self.ledger.recent], [other.id])

    def test_an_account_has_counts_of_its_own(self) -> None:
        account: Any = FakeAccount("one")
        record = self.begin()
        record.account = account
        record.begin_answer(200)
        meter = cp.UsageMeter()
        meter.take({"usage": {"prompt_tokens": 7, "completion_tokens": 1}})
        record.note_answer({}, meter)
        self.end(record, self.begin())
        self.assertEqual(account.stats.group("totals")["input"], 7)
        self.assertEqual(account.stats.group("totals")["requests"], 1)
        self.assertEqual(self.ledger.stats.group("totals")["requests"], 2)

    def test_requests_that_are_recorded_together_are_counted_each_for_its_account(self) -> None:
        accounts: Any = [FakeAccount("one"), FakeAccount("two")]
        records = [self.begin() for _ in range(5)]
        for number, record in enumerate(records):
            record.account = accounts[number % 2]
            record.begin_answer(200 if number else 502)
            record.failure = "" if number else "no answer"
            record.error = "" if number else "upstream_error"
            meter = cp.UsageMeter()
            meter.take({"usage": {"input_tokens": 10 ** number, "cache_creation": {
                "ephemeral_1h_input_tokens": 1}}})
            record.note_answer({}, meter)
        self.end(*records)
        self.assertEqual([one.stats.group("totals") for one in accounts],
                         [{"input": 10101, "requests": 3, "errors": 1},
                          {"input": 1010, "requests": 2, "errors": 0}])
        self.assertEqual(self.ledger.stats.group("totals")["input"], 11111)
        self.assertEqual(self.ledger.stats.group("requests"),
                         {("local", "200"): 4, ("local", "502"): 1})
        self.assertEqual([row["message"] for row in self.ledger.recent],
                         [None, None, None, None, "no answer"])

    def test_what_is_no_question_to_a_model_is_counted_only(self) -> None:
        self.end(self.begin("/auth/device/start"))
        self.assertEqual(len(self.ledger.recent), 0)
        self.assertEqual(sum(self.ledger.stats.group("requests").values()), 1)

    def test_lanes_name_their_account_as_it_is_called_now(self) -> None:
        account: Any = FakeAccount("0a1b")
        self.ledger.record_quotas(account, "usage", {"chat": {"entitlement": 10, "remaining": 5}})
        account.name = "octocat"
        lane = self.ledger.lanes()[0]
        self.assertEqual((lane["account"], lane["source"], lane["left"]), ("octocat", "usage", 5))
        self.assertEqual(self.ledger.lanes("another"), [])

    def test_lanes_are_bounded(self) -> None:
        account: Any = FakeAccount("one")
        self.ledger.record_quotas(account, "usage", {
            str(number): {} for number in range(cp.MAX_NAMES + 5)})
        self.assertEqual(len(self.ledger.quotas), cp.MAX_NAMES)

    def test_changes_are_told_once_and_counted_once(self) -> None:
        record, losses = self.begin(), cp.Losses()
        losses.add("seed", "not known upstream")
        first = self.ledger.note_changes(record, losses, ["images"])
        self.assertEqual(first, {"x-copilot-proxy-lossy": "seed",
                                 "x-copilot-proxy-repaired": "images"})
        self.assertEqual(self.ledger.note_changes(record, losses, ["images"]), {})
        self.assertEqual(self.ledger.stats.group("lossy"), {"seed": 1})
        row = record.row()
        self.assertEqual((row["losses"], row["repairs"]), ("seed", "images"))


class DemoTest(unittest.TestCase):
    def test_requests_to_the_make_believe_upstream_are_not_in_the_users_log(self) -> None:
        settings = cp.Settings(demo=True)
        with self.assertLogs("copilot_proxy", "DEBUG") as logged:
            logging.getLogger("copilot_proxy").info("the only line")
            server = cp.start_demo(settings)
            self.addCleanup(server.app.close)
            self.addCleanup(server.finish, 0.0)
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
            self.addCleanup(connection.close)
            for path in ("/copilot_internal/user", "/nowhere"):
                send(connection, "GET", path)
            wait_until(lambda: not server.app.ledger.running)
        here = [record.getMessage() for record in logged.records
                if record.threadName != "copilot-token"]    # of an account of an earlier test
        self.assertEqual(here, ["the only line"])


class AccountTest(ProxyCase):
    def test_the_usage_answer_names_the_account_and_its_quotas(self) -> None:
        account = self.proxy.app.login.account
        self.assertEqual(account.name, account.id)
        self.assertEqual(self.proxy.get("/usage").status, 200)
        self.assertEqual(account.name, "octocat")
        lanes = self.proxy.app.ledger.lanes(account.id)
        self.assertTrue(lanes)
        self.assertEqual({lane["account"] for lane in lanes}, {"octocat"})


if __name__ == "__main__":
    unittest.main()
