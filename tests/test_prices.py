"""What answers cost by the listed prices: tiers, kinds of tokens, discounts; and the sum beside
what the upstream reports."""
from __future__ import annotations

import time
import unittest
from fractions import Fraction
from typing import Any

from cases import SharedCase
from support import message, wait_until
import copilot_proxy as cp
from fake_upstream import MESSAGES, Answer, make_claude

SHORT = {"input_price": 300, "cache_read_price": 30, "cache_write_price": 375,
         "cache_write_1h_price": 600, "output_price": 1500, "max_prompt_tokens": 200000}
LONG = {"input_price": 600, "cache_read_price": 60, "cache_write_price": 750,
        "cache_write_1h_price": 1200, "output_price": 2250, "max_prompt_tokens": 936000}
KINDS = ("input", "cache_read", "cache_write", "cache_write_1h", "output")


def priced(**billing: Any) -> cp.Prices:
    return cp.Model.from_entry({"id": "m", "billing": billing}).prices


def two_tiers(**billing: Any) -> cp.Prices:
    return priced(token_prices={"batch_size": 1000000, "default": SHORT, "long_context": LONG},
                  **billing)


def by_hand(fresh: int, read: int, written: int, for_an_hour: int, output: int) -> Fraction:
    """Nano-AIU; written: all of it, the part for an hour, too."""
    prices = SHORT if fresh + read + written <= 200000 else LONG
    amounts = (fresh, read, written - for_an_hour, for_an_hour, output)
    credits = sum(Fraction(amount * prices[kind + "_price"], 10 ** 6)
                  for kind, amount in zip(KINDS, amounts))
    return Fraction(credits * 10 ** 9)


#: (input, cache read, cache write, of it for an hour, output): half of them in each tier
HUNDRED = [(1 + 7 * at, 1000 * at + 3, 501 * at, 11 * at, 13 + at) for at in range(50)] \
    + [(200001 + at, 17 * at, 999 + at, 5 * at, 77 * at) for at in range(50)]


class PricesTest(unittest.TestCase):
    """The pure part."""

    counts = {"input": 1000, "cache_read": 2000, "cache_write": 400, "output": 10}

    def test_the_limit_of_a_tier_has_an_old_and_a_new_name(self) -> None:
        for name in ("context_max", "max_prompt_tokens"):
            usual = {"input_price": 100, "output_price": 500, name: 3000}
            prices = priced(token_prices={"batch_size": 1000000, "default": usual,
                                          "long_context": {"input_price": 200}})
            self.assertEqual(prices.cost({"input": 3000}), 3000 * 100 * 1000, name)
            self.assertEqual(prices.cost({"input": 3001}), 3001 * 200 * 1000, name)
            self.assertEqual(prices.cost({"input": 2000, "cache_read": 1001}),
                             3001 * 200 * 1000, name)

    def test_the_new_name_counts_where_both_are_there(self) -> None:
        usual = {"input_price": 1, "output_price": 1, "context_max": 10, "max_prompt_tokens": 20}
        prices = priced(token_prices={"batch_size": 1, "default": usual,
                                      "long_context": {"input_price": 5}})
        self.assertEqual(prices.cost({"input": 20}), 20 * 10 ** 9)
        self.assertEqual(prices.cost({"input": 21}), 21 * 5 * 10 ** 9)

    def test_more_than_the_last_tier_has_its_price(self) -> None:
        self.assertEqual(two_tiers().cost({"input": 2000000}), 2000000 * 600 * 1000)

    def test_writes_for_an_hour_have_their_own_price_and_are_a_part_of_all_writes(self) -> None:
        counts = dict(self.counts, cache_write_1h=150)
        self.assertEqual(two_tiers().cost(counts), by_hand(1000, 2000, 400, 150, 10))
        self.assertEqual(two_tiers().cost(dict(counts, cache_write_1h=9999)),
                         by_hand(1000, 2000, 400, 400, 10))

    def test_kinds_without_a_price_cost_what_the_next_plainer_kind_does(self) -> None:
        listed = {"input_price": 100, "output_price": 500}
        prices = priced(token_prices={"batch_size": 1000000, "default": listed})
        counts = dict(self.counts, cache_write_1h=150)
        self.assertEqual(prices.cost(counts), (3400 * 100 + 10 * 500) * 1000)
        listed["cache_write_price"] = 125
        prices = priced(token_prices={"batch_size": 1000000, "default": listed})
        self.assertEqual(prices.cost(counts), (3000 * 100 + 400 * 125 + 10 * 500) * 1000)

    def test_a_promotion_counts_until_its_end(self) -> None:
        full = by_hand(1000, 2000, 400, 0, 10)
        ends = {"id": "x", "discount_percent": 25, "ends_at": "2026-12-01T00:00:00Z"}
        prices, end = two_tiers(promo=ends), 1796083200
        self.assertEqual(prices.cost(self.counts, end - 1), full * 3 / 4)
        self.assertEqual(prices.cost(self.counts, end), full)
        self.assertEqual(two_tiers(promo={"discount_percent": 25}).cost(self.counts, end),
                         full * 3 / 4)

    def test_the_discount_of_auto_counts_only_for_what_auto_chose(self) -> None:
        full = by_hand(1000, 2000, 400, 0, 10)
        prices = two_tiers(auto_discount=0.1)
        self.assertEqual(prices.cost(self.counts), full)
        self.assertEqual(prices.cost(self.counts, by_auto=True), full * 9 / 10)
        both = two_tiers(auto_discount=0.1, promo={"discount_percent": 50})
        self.assertEqual(both.cost(self.counts, by_auto=True), full * 9 / 20)

    def test_odd_listings_make_no_price_and_no_error(self) -> None:
        for odd in (None, "x", -1, [], {}, True, float("nan"), 1e300):
            for listed in ({"batch_size": odd, "default": SHORT},
                           {"batch_size": 1, "default": odd},
                           {"batch_size": 1, "default": {"input_price": odd}}):
                self.assertIsNone(priced(token_prices=listed).cost({"input": 1}), odd)
            self.assertEqual(priced(token_prices=odd).per_million(), {})
            odder = two_tiers(promo={"discount_percent": odd, "ends_at": odd}, auto_discount=odd)
            cost = odder.cost({"input": 1}, by_auto=True)
            self.assertIn(cost, (300000, 300000 * 99 // 100), odd)     # True is one percent

    def test_a_session_quota_is_a_quota(self) -> None:
        error = cp.UpstreamError("x", 429, "session_quota_exceeded")
        self.assertTrue(cp.is_quota(error))
        self.assertEqual(cp.status_of("session_quota_exceeded"), 402)

    def test_lanes_of_any_name_are_shown(self) -> None:
        lane = cp.quota_lane("agent_minutes", {
            "entitlement": 50, "remaining": 20, "has_quota": True, "token_based_billing": True,
            "quota_reset_at": 1796083200})
        self.assertEqual((lane["total"], lane["left"], lane["percent_used"], lane["resets_at"]),
                         (50, 20, 60, 1796083200))


class EstimateTest(SharedCase):
    """Requests through the proxy."""

    def setUp(self) -> None:
        entry = make_claude("claude-sonnet-5", (MESSAGES,))
        entry["billing"]["token_prices"] = {
            "batch_size": 1000000, "default": SHORT, "long_context": LONG}
        self.fake.models = [entry]

    def ask(self, usage: tuple[int, int, int, int, int], credits: int | None = None) -> None:
        fresh, read, written, for_an_hour, output = usage
        body: Any = {
            "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-sonnet-5",
            "content": [{"type": "text", "text": "a"}], "stop_reason": "end_turn", "usage": {
                "input_tokens": fresh, "cache_read_input_tokens": read,
                "cache_creation_input_tokens": written, "output_tokens": output,
                "cache_creation": {"ephemeral_5m_input_tokens": written - for_an_hour,
                                   "ephemeral_1h_input_tokens": for_an_hour}}}
        if credits is not None:
            body["copilot_usage"] = {"total_nano_aiu": credits}
        self.fake.script(MESSAGES, Answer(200, body=body))
        reply = self.proxy.post("/v1/messages", message("a", model="claude-sonnet-5"))
        self.assertEqual(reply.status, 200)

    def totals(self, requests: int) -> Any:
        def stats() -> Any:
            return self.proxy.get("/stats").json
        self.assertTrue(wait_until(lambda: stats()["totals"]["requests"] >= requests))
        return stats()

    def test_a_hundred_requests_of_two_tiers_cost_what_a_sum_by_hand_says(self) -> None:
        before = self.proxy.get("/stats").json["totals"]
        for usage in HUNDRED:
            self.ask(usage)
        stats = self.totals(before["requests"] + 100)
        expected = sum(by_hand(*usage) for usage in HUNDRED)
        self.assertEqual(expected.denominator, 1)
        self.assertEqual(stats["totals"]["estimate"] - before.get("estimate", 0), expected)
        self.assertEqual(stats["totals"]["credits"], before["credits"])

    def test_the_estimate_stands_beside_the_report_and_is_not_added_to_it(self) -> None:
        before = self.proxy.get("/stats").json["totals"]
        usage = (1000, 2000, 400, 150, 10)
        estimate = int(by_hand(*usage))
        self.ask(usage, estimate + 7000)
        stats = self.totals(before["requests"] + 1)
        self.assertEqual(stats["totals"].get("estimate", 0), before.get("estimate", 0))
        self.assertEqual(stats["totals"]["nano_aiu"], (before["nano_aiu"] or 0) + estimate + 7000)
        [line] = stats["price_check"]
        self.assertEqual((line["model"], line["requests"]), ("claude-sonnet-5", 1))
        self.assertEqual(line["estimated"], estimate / 1e9)
        self.assertAlmostEqual(line["difference"], 7e-6)
        row = stats["recent"][0]
        self.assertEqual((row["nano_aiu"], row["estimate"]), (estimate + 7000, estimate))

    def test_a_promotion_that_has_ended_is_no_discount(self) -> None:
        usage = (1000, 0, 0, 0, 10)
        for ends_at, factor in ((time.time() + 3600, Fraction(1, 2)), (1, Fraction(1))):
            self.fake.models[0]["billing"]["promo"] = {
                "id": "launch", "discount_percent": 50, "ends_at": ends_at}
            with self.subTest(ends_at):
                self.proxy.app.login.account.catalogue.value = None
                before = self.proxy.get("/stats").json["totals"]
                self.ask(usage)
                stats = self.totals(before["requests"] + 1)
                self.assertEqual(stats["recent"][0]["estimate"], by_hand(*usage) * factor)


if __name__ == "__main__":
    unittest.main()
