"""When a request may go up: one ticket, all limits in order, one leave (section 17)."""
from __future__ import annotations

import logging
import unittest
from typing import Any

from support import ProxyCase, cp, wait_until

LOG = logging.getLogger("copilot_proxy")


class AdmissionTest(unittest.TestCase):
    def admission(self, **settings: Any) -> cp.Admission:
        values = cp.Settings(**settings).check()
        budget = cp.Budget(values.budget, lambda: 0.0, LOG, lambda *about: None)
        budget.loaded.set()
        return cp.Admission(values, LOG, budget, lambda *about: None)

    def ticket(self, wish: str | None = None) -> cp.Ticket:
        class Account:
            name = "octocat"
            limiter = cp.RateLimiter(0.0, False)

        return cp.Ticket("key", None, wish, Account(), {})            # type: ignore[arg-type]

    def test_without_limits_nothing_is_held(self) -> None:
        admission, ticket = self.admission(), self.ticket()
        self.assertEqual(cp.run(admission.admit(ticket)), {})
        self.assertEqual((ticket.is_admitted, ticket.has_slot), (True, False))
        admission.leave(ticket)

    def test_a_slot_is_given_back_once_whatever_is_said_twice(self) -> None:
        admission, ticket = self.admission(max_concurrency=1), self.ticket()
        cp.run(admission.admit(ticket))
        self.assertEqual(admission.gate._running, 1)
        for _ in range(2):
            admission.leave(ticket)
        admission.leave(None)
        self.assertEqual(admission.gate._running, 0)

    def test_what_a_later_limit_refuses_is_not_admitted_and_gives_its_slot_back(self) -> None:
        admission, ticket = self.admission(max_concurrency=1, rate_limit=60.0), self.ticket()
        ticket.account.limiter = cp.RateLimiter(60.0, False)
        cp.run(ticket.account.limiter.admit())
        with self.assertRaises(cp.RateLimited):
            cp.run(admission.admit(ticket))
        self.assertEqual((ticket.is_admitted, ticket.has_slot), (False, True))
        admission.leave(ticket)
        self.assertEqual(admission.gate._running, 0)

    def test_the_minute_says_what_is_left(self) -> None:
        admission = self.admission(requests_per_minute=2)
        headers = cp.run(admission.admit(self.ticket()))
        self.assertEqual(headers["x-ratelimit-remaining-requests"], "1")

    def test_nonsense_in_the_budget_header_is_refused_each_time(self) -> None:
        admission, ticket = self.admission(), self.ticket("much")
        for _ in range(2):
            with self.assertRaises(cp.BadRequest):
                cp.run(admission.admit(ticket))


class OnceTest(ProxyCase):
    settings = {"max_concurrency": 1, "requests_per_minute": 1}

    def test_a_compaction_of_two_calls_counts_once_and_leaves_its_slot(self) -> None:
        reply = self.proxy.post("/v1/responses/compact", {"model": "gpt-5-mini", "input": "a"})
        self.assertEqual(reply.status, 200, reply.body)
        self.assertEqual(reply.headers["x-ratelimit-remaining-requests"], "0")
        wait_until(lambda: self.proxy.app.admission.gate._running == 0)

    def test_a_refused_header_lets_no_second_call_through(self) -> None:
        reply = self.proxy.post("/v1/responses/compact", {"model": "gpt-5.3-codex", "input": "a"},
                                **{"x-copilot-proxy-budget": "much"})
        self.assertEqual(reply.status, 400, reply.body)
        self.assertEqual(self.fake.count("/responses"), 0)


if __name__ == "__main__":
    unittest.main()
