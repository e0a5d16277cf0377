"""Limits heal: how long one lasts, who may go up meanwhile, and what ends it."""
from __future__ import annotations

import contextlib
import json
import random
import threading
import time
import unittest
from typing import Any, Iterator

from fake_upstream import CHAT, MESSAGES, RESPONSES, Answer, Ask, FakeUpstream, Refuse
from support import (REQUESTS, Proxy, ProxyCase, Reply, StillClock, TestClock, chat, message,
                     wait_until)
import copilot_proxy as cp

NOW = 1790000000.0                     # 2026-09-21T14:13:20Z
DAY_S = 86400.0
FIRST_OF_OCTOBER = 1790812800.0        # 2026-10-01T00:00:00Z
USED_UP = "ent=300&ov=0.0&ovPerm=false&rem=0.0&rst=2026-10-01T00%3A00%3A00Z"
PREMIUM = "x-quota-snapshot-premium_interactions"
WEEKLY = "x-usage-ratelimit-weekly"
KEY = "the-operators-key"


def refusal(status: int = 429, words: str = "slow down", code: str | None = None,
            **headers: str) -> cp.UpstreamError:
    """What an upstream says; underscores in header names become dashes."""
    return cp.UpstreamError(words, status, code, headers={
        name.replace("_", "-"): value for name, value in headers.items()})


def with_headers(status: int, headers: dict[str, str], code: str | None = None
                 ) -> cp.UpstreamError:
    return cp.UpstreamError("no", status, code, headers=headers)


class HintTest(unittest.TestCase):
    """Where the end of a limit is read from, and where not."""

    def test_a_plain_429_does_not_rest_until_the_reset_of_a_used_up_quota(self) -> None:
        for lane in ("premium_interactions", "premium_models", "chat", "completions", "other"):
            for code in (None, "rate_limited", "user_model_rate_limited:gpt-4.1",
                         "user_global_rate_limited", "model_overloaded"):
                with self.subTest(lane=lane, code=code):
                    error = with_headers(429, {"x-quota-snapshot-" + lane: USED_UP}, code)
                    self.assertEqual(cp.limit_s(error, NOW), cp.LIMIT_PAUSE_S)

    def test_a_quota_error_rests_until_the_reset_of_its_lane(self) -> None:
        wanted = FIRST_OF_OCTOBER - NOW
        for status, code in ((402, None), (402, "quota_exceeded"), (429, "quota_exceeded"),
                             (429, "session_quota_exceeded"), (403, "free_quota_exceeded:x")):
            for lane in ("premium_interactions", "premium_models", "chat", "other"):
                error = with_headers(status, {"x-quota-snapshot-" + lane: USED_UP}, code)
                self.assertEqual(cp.limit_s(error, NOW), wanted, (status, code, lane))

    def test_a_lane_that_closes_nothing_names_no_end(self) -> None:
        for lane, told in (
                ("premium_interactions", USED_UP.replace("ovPerm=false", "ovPerm=true")),
                ("premium_interactions", USED_UP.replace("rem=0.0", "rem=0.1")),
                ("premium_interactions", USED_UP.replace("rem=0.0", "rem=nan")),
                ("premium_interactions", USED_UP.replace("rem=0.0", "rem=")),
                ("premium_interactions", USED_UP.replace("ent=300", "ent=-1")),
                ("premium_interactions", USED_UP.replace("2026-10", "2026-08")),      # is past
                ("premium_interactions", USED_UP.replace("2026-10-01", "2026-99-99")),
                ("premium_interactions", "rem=0&rst=" + "9" * 400), ("chat", "rem=0&rst=soon"),
                ("chat", "rem=0"), ("chat", ""), ("chat", "%%%&&&==="), ("completions", USED_UP)):
            with self.subTest(lane=lane, told=told[:80]):
                error = with_headers(402, {"x-quota-snapshot-" + lane: told})
                self.assertEqual(cp.limit_s(error, NOW), cp.QUOTA_PAUSE_S)

    def test_the_ceilings_of_use_count_for_a_429(self) -> None:
        reset = USED_UP.replace("2026-10-01", "2026-09-24")
        for lane in ("weekly", "session"):
            error = with_headers(429, {"x-usage-ratelimit-" + lane: reset, PREMIUM: USED_UP})
            self.assertEqual(cp.limit_s(error, NOW), FIRST_OF_OCTOBER - 7 * DAY_S - NOW)
        full = with_headers(429, {WEEKLY: reset.replace("rem=0.0", "rem=12")})
        self.assertEqual(cp.limit_s(full, NOW), cp.LIMIT_PAUSE_S)

    def test_a_date_in_a_models_name_is_no_end(self) -> None:
        for words in ("too many requests for claude-opus-4-5-2026-09-25",
                      "model gpt-4o-2026-09-25: slow down",
                      "gpt-4o-2026-09-25 is limited until then",
                      "please try again with gpt-4o-2026-09-25",
                      "retry with claude-2026-09-25", "try again: 2026-09-25-preview",
                      "the limit of 2026-09-25 was reached", "2026-09-25: too many requests",
                      "api version 2026-09-25, please try again", "resets; version 2026-09-25"):
            with self.subTest(words):
                self.assertEqual(cp.limit_s(refusal(words=words), NOW), cp.LIMIT_PAUSE_S)

    def test_a_date_behind_the_word_for_an_end_is_one(self) -> None:
        wanted = 4 * DAY_S - 51200                           # 2026-09-25
        for words in ("your limit resets on 2026-09-25", "until 2026-09-25", "Reset: 2026-09-25.",
                      "try again at 2026-09-25T00:00:00Z", "not before: reset_at=2026-09-25",
                      'limited "reset_date":"2026-09-25T00:00:00.000Z"',
                      "gpt-4o-2026-12-12 is closed until 2026-09-25 00:00:00",
                      "please retry after 2026-09-25", "it resets at (2026-09-25T00:00:00+00:00)"):
            with self.subTest(words):
                self.assertEqual(cp.limit_s(refusal(words=words), NOW), wanted)

    def test_a_models_name_is_no_span(self) -> None:
        for words in ("retry with claude 4 sonnet", "try again with gpt-4.1 mini",
                      "try again after 3 messages", "again in 5 dollars", "wait: 4 heavy users",
                      "please try again. You sent 300 requests in 5 hours"):
            with self.subTest(words):
                self.assertEqual(cp.limit_s(refusal(words=words), NOW), cp.LIMIT_PAUSE_S)

    def test_spans_in_words(self) -> None:
        for words, wanted in (("try again in 90 secs", 90.0), ("wait 2 hrs", 7200.0),
                              ("retry in 1500 milliseconds", 1.5),
                              ("resets in 2 weeks", cp.LIMIT_S),
                              ("try again in 1 day, 2 hours and 3 mins", 93780.0)):
            with self.subTest(words):
                self.assertEqual(cp.limit_s(refusal(words=words), NOW), wanted)

    def test_retry_after_is_believed_first(self) -> None:
        for status in (429, 402):
            error = cp.UpstreamError("resets on 2026-09-25, try again in 3 hours", status, headers={
                "retry-after": "7", PREMIUM: USED_UP, WEEKLY: USED_UP})
            self.assertEqual(cp.limit_s(error, NOW), 7)

    def test_odd_words_and_headers_never_break_it(self) -> None:
        chance = random.Random(5)
        parts = ("again", "until", "reset", " ", "-", ":", "2026-09-25", "9" * 40, "5 hours", "1.",
                 "T00:00:00Z", "\u0661", "\u00b2", "nan", "inf", "1e999", "Mon, ", "30 Feb 2026 ",
                 "99:99:99", "GMT", "and", ",", "%00", "&", "=", "rem=0", "rst=", "0000-00-00")
        for _ in range(3000):
            words, after, lane = ("".join(chance.choices(parts, k=chance.randrange(8)))
                                  for _ in range(3))
            error = cp.UpstreamError(words, chance.choice((402, 429)), headers={
                "retry-after": after, PREMIUM: lane, WEEKLY: lane})
            self.assertTrue(1 <= cp.limit_s(error, NOW, 3) <= cp.QUOTA_LIMIT_S,
                            (words, after, lane))

    def test_long_words_take_no_time(self) -> None:
        for part in ("again", "again in 1 h ", "until ", "reset_at: ", "1s", "9", "retry 1.",
                     "2026-"):
            began = time.monotonic()
            cp.limit_s(refusal(words=(part * 70000)[:70000]), NOW)
            self.assertLess(time.monotonic() - began, 1, part)


class RestCase(unittest.TestCase):
    def setUp(self) -> None:
        self.clock = StillClock(NOW)
        self.limits = cp.RateLimits(self.clock)

    def ask(self, error: cp.UpstreamError | None = None, model: str = "m"
            ) -> cp.UpstreamError | None:
        """One request: None when it went up and was taken, `error` when it went up and was
        refused, else what it was told here."""
        try:
            number = self.limits.admit(model)
        except cp.UpstreamError as told:
            return told
        if error is not None:
            self.limits.refuse(model, number, error)
        self.limits.finish(model, number, error is None)
        return error

    def goes_up(self, error: cp.UpstreamError | None = None, model: str = "m") -> bool:
        """Does exactly one of many requests go up?  It is answered so."""
        answers = [self.ask(error, model) for _ in range(20)]
        up = [answer for answer in answers if answer is error]
        if error is not None:
            self.assertLessEqual(len(up), 1)
        return bool(up)

    def rises_after(self, error: cp.UpstreamError, pause_s: float) -> None:
        """Nobody goes up before `pause_s`, then one does; it is refused."""
        self.clock.move(pause_s - 0.1)
        self.assertFalse(self.goes_up(error), pause_s)
        self.clock.move(0.2)
        self.assertTrue(self.goes_up(error), pause_s)


class RestTest(RestCase):
    """One scope through its states."""

    def test_a_plain_429_rests_ten_seconds_and_doubles_while_it_repeats(self) -> None:
        error = refusal()
        for _ in range(2):
            self.assertTrue(self.goes_up(error))
            for pause_s in (10, 20, 40, 80, 160, 300, 300):
                self.rises_after(error, pause_s)
            self.clock.move(301)
            self.assertIsNone(self.ask())                    # a success: from the start again

    def test_a_rest_is_probed_after_a_minute_then_at_growing_pauses(self) -> None:
        for error in (refusal(402), refusal(retry_after="7200"), refusal(402, retry_after="86400")):
            self.limits.clear()
            self.assertTrue(self.goes_up(error))
            for pause_s in (60, 120, 240, 300, 300, 300):
                self.rises_after(error, pause_s)

    def test_a_rest_beyond_a_day_is_probed_each_fifteen_minutes(self) -> None:
        error = refusal(402, retry_after=str(30 * 86400))
        self.assertTrue(self.goes_up(error))
        for pause_s in (60, 120, 240, 480, 900, 900, 900):
            self.rises_after(error, pause_s)
        self.clock.move(901)
        self.assertIsNone(self.ask())
        self.assertEqual([self.ask() for _ in range(20)], [None] * 20)

    def test_nobody_goes_up_before_a_named_end_that_is_near(self) -> None:
        for seconds in (1, 5, 30, 60):
            self.limits.clear()
            error = refusal(retry_after=str(seconds))
            self.assertTrue(self.goes_up(error))
            for _ in range(3):
                self.rises_after(error, seconds)

    def test_what_others_are_told(self) -> None:
        self.ask(refusal(402, "You have no quota", "quota_exceeded", retry_after="7200"))
        self.clock.move(17.5)
        told = self.ask()
        assert told is not None
        self.assertEqual((told.status, told.code, told.headers),
                         (402, "quota_exceeded", {"retry-after": "43"}))
        self.assertRegex(str(told), r"\AYou have no quota \(a limit of model m until "
                         r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d local time: the next request goes up as "
                         r"a probe in 43 s; to end it at once: POST /limits/clear, or the button")
        self.limits.clear()
        self.ask(refusal(retry_after="9"))
        self.assertIn("nothing is sent before", str(self.ask()))

    def test_who_went_up_is_told_the_whole_rest(self) -> None:
        error = refusal(retry_after="7200", x_ratelimit_exceeded="b")
        told = self.limits.refuse("m", self.limits.admit("m"), error)
        self.assertEqual(told.headers, {"retry-after": "7200", "x-ratelimit-exceeded": "b"})
        told = self.limits.refuse("n", self.limits.admit("n"), refusal())
        self.assertEqual(told.headers, {"retry-after": "10"})

    def test_the_first_after_the_end_is_alone_for_a_moment(self) -> None:
        self.ask(refusal(retry_after="9"))
        self.clock.move(9)
        number = self.limits.admit("m")
        told = self.ask()
        assert told is not None
        self.assertEqual((told.status, told.headers), (429, {"retry-after": "5"}))
        self.assertIn("one request is trying it now", str(told))
        self.clock.move(cp.TRIAL_S)
        later = [self.limits.admit("m") for _ in range(20)]   # it takes its time: the rest is over
        for one in later:
            self.limits.finish("m", one, False)
        self.limits.admit("m")
        self.limits.finish("m", number, True)
        self.assertEqual(self.limits.report(), [])

    def test_a_probe_that_dies_frees_its_place(self) -> None:
        self.ask(refusal(402))
        self.clock.move(60)
        for _ in range(3):
            number = self.limits.admit("m")
            self.assertIsNotNone(self.ask())                 # one at a time
            self.limits.finish("m", number, False)                    # the client left
        self.assertIsNone(self.ask())

    def test_probes_that_die_do_not_hammer_the_upstream(self) -> None:
        self.ask(refusal(402))
        self.clock.move(60)
        sent = 0
        for _ in range(100):
            with contextlib.suppress(cp.UpstreamError):
                number = self.limits.admit("m")
                sent += 1
                self.limits.finish("m", number, False)
        self.assertEqual(sent, cp.MAX_DEAD_PROBES + 1)
        self.clock.move(60)
        self.assertIsNone(self.ask())

    def test_a_probe_that_never_answers_blocks_the_next_one_for_a_pause_only(self) -> None:
        self.ask(refusal(402))
        self.clock.move(60)
        silent = self.limits.admit("m")
        self.clock.move(59)
        self.assertIsNotNone(self.ask())
        self.clock.move(1)
        number = self.limits.admit("m")
        self.limits.finish("m", silent, False)                        # its place is taken by now
        self.assertIsNotNone(self.ask())
        self.limits.finish("m", number, True)
        self.assertIsNone(self.ask())

    def test_requests_that_went_up_together_are_one_refusal(self) -> None:
        numbers = [self.limits.admit("m") for _ in range(20)]
        for number in numbers:
            self.limits.refuse("m", number, refusal())
            self.clock.move(0.1)
        self.clock.move(7.9)                                 # since the first one: 9.9 s
        self.assertIsNotNone(self.ask())
        self.clock.move(10)
        error = refusal()
        self.assertTrue(self.goes_up(error))
        self.rises_after(error, 20)                          # and not 300

    def test_the_longest_rest_of_a_burst_holds(self) -> None:
        numbers = [self.limits.admit("m") for _ in range(3)]
        for number, seconds in zip(numbers, ("5", "50", "5")):
            self.limits.refuse("m", number, refusal(retry_after=seconds))
        self.clock.move(49)
        self.assertIsNotNone(self.ask())
        self.clock.move(1)
        self.assertIsNone(self.ask())

    def test_a_success_of_before_the_refusal_opens_nothing(self) -> None:
        early, refused = self.limits.admit("m"), self.limits.admit("m")
        self.limits.refuse("m", refused, refusal(retry_after="5"))
        self.assertEqual(self.limits.finish("m", early, True), [])
        self.assertIsNotNone(self.ask())

    def test_each_clock_alone_ends_a_rest_and_brings_a_probe(self) -> None:
        for name in ("monotonic", "wall"):
            for error, seconds in ((refusal(retry_after="30"), 30), (refusal(402), 60)):
                self.limits.clear()
                self.ask(error)
                self.assertIsNotNone(self.ask())
                setattr(self.clock, name, getattr(self.clock, name) + seconds)
                self.assertIsNone(self.ask(), (name, seconds))

    def test_a_wall_clock_that_is_set_back_prolongs_nothing(self) -> None:
        self.ask(refusal(retry_after="30"))
        self.clock.wall -= 40 * DAY_S
        self.assertIsNotNone(self.ask())
        self.clock.move(30)
        self.assertIsNone(self.ask())


class ScopeTest(RestCase):
    """Models and the account."""

    def test_a_model_rests_alone(self) -> None:
        self.ask(refusal())
        self.assertIsNone(self.ask(model="n"))
        self.assertIsNotNone(self.ask())

    def test_the_account_rests_for_all_models_and_any_of_them_opens_it(self) -> None:
        for code in ("user_global_rate_limited:pro", "user_weekly_rate_limited",
                     "integration_rate_limited", "agent_mode_limit_exceeded"):
            error = refusal(code=code, retry_after="7200")
            self.ask(error, "a")
            for model in "abc":
                self.assertIsNotNone(self.ask(model=model))
            self.clock.move(60)
            self.assertIsNone(self.ask(model="b"))
            self.assertEqual([self.ask(model=model) for model in "abc"], [None] * 3)

    def test_a_model_that_rests_takes_no_probe_of_the_account(self) -> None:
        self.ask(refusal(code="user_global_rate_limited", retry_after="7200"), "a")
        self.clock.move(60)
        self.ask(refusal(retry_after="50"), "b")             # the account's probe; b rests, too
        self.limits.refuse("a", 0, refusal(code="user_global_rate_limited", retry_after="7200"))
        self.clock.move(30)
        self.assertIsNotNone(self.ask(model="b"))
        self.clock.move(30)
        self.assertIsNone(self.ask(model="c"))               # nobody has taken it

    def test_one_request_is_the_probe_of_both(self) -> None:
        self.ask(refusal(code="user_global_rate_limited", retry_after="7200"), "a")
        self.limits.refuse("a", 1, refusal(402))
        self.clock.move(60)
        self.assertIsNone(self.ask(model="a"))
        self.assertEqual(self.limits.report(), [])

    def test_what_belongs_to_no_model_is_never_held_back(self) -> None:
        self.ask(refusal(code="user_global_rate_limited"))
        self.assertIsNone(self.ask(model=""))

    def test_a_look_takes_no_probe(self) -> None:
        self.ask(refusal(402))
        self.clock.move(60)
        for _ in range(3):
            with self.assertRaises(cp.UpstreamError):
                self.limits.admit("m", may_probe=False)
        self.assertIsNone(self.ask())
        self.limits.admit("m", may_probe=False)

    def test_the_number_of_scopes_is_bounded(self) -> None:
        for number in range(cp.MAX_SCOPES + 50):
            self.ask(refusal(retry_after=str(1000 + number)), "model-%d" % number)
        found = {line["scope"] for line in self.limits.report()}
        self.assertEqual(len(found), cp.MAX_SCOPES)
        self.assertNotIn("model-0", found)                   # those that end first have gone
        self.assertIn("model-%d" % (cp.MAX_SCOPES + 49), found)

    def test_what_rests_is_reported_and_cleared(self) -> None:
        self.ask(refusal(402, code="quota_exceeded", retry_after="7200"))
        self.ask(refusal(code="user_weekly_rate_limited", retry_after="100"), "n")
        self.clock.move(50)
        self.assertEqual(self.limits.report(), [
            {"scope": "m", "status": 402, "code": "quota_exceeded", "since": NOW,
             "until": NOW + 7200, "next_probe": NOW + 60},
            {"scope": "account", "status": 429, "code": "user_weekly_rate_limited", "since": NOW,
             "until": NOW + 100, "next_probe": NOW + 60}])
        self.assertEqual(self.limits.clear("other"), [])
        self.assertEqual(self.limits.clear("account"), ["account"])
        self.assertIsNone(self.ask(model="n"))
        self.assertIsNotNone(self.ask())
        self.assertEqual(self.limits.clear(), ["m"])
        self.assertIsNone(self.ask())
        self.assertEqual(self.limits.clear(), [])

    def test_of_many_threads_one_goes_up(self) -> None:
        self.ask(refusal(402))
        self.clock.move(60)
        start, sent = threading.Barrier(20), []

        def admit() -> None:
            start.wait(10)
            with contextlib.suppress(cp.UpstreamError):
                sent.append(self.limits.admit("m"))

        threads = [threading.Thread(target=admit) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        self.assertEqual(len(sent), 1)


class RoomTest(RestCase):
    """What an account has left, seen anywhere, ends a rest for a quota."""

    FULL = "ent=300&ov=0.0&ovPerm=false&rem=75.5"

    def refuse(self, told: str = USED_UP, lane: str = PREMIUM, status: int = 402) -> None:
        """The model rests for ten days, because of what a lane's header says."""
        error = with_headers(status, {lane: told, "retry-after": "864000"} if lane else {})
        self.limits.refuse("m", self.limits.admit("m"), error)

    def test_room_of_the_used_up_lane_ends_the_rest(self) -> None:
        cases: tuple[dict[str, Any], ...] = (
            {"premium_interactions": self.FULL}, {"premium_models": self.FULL},
            {"premium_interactions": self.FULL.replace("rem=75.5", "rem=0.3")},
            {"premium_interactions": USED_UP.replace("ovPerm=false", "ovPerm=true")},
            {"premium_interactions": {"entitlement": "300", "percent_remaining": "75.4"}},
            {"premium_interactions": {"entitlement": 300, "remaining": 5}},
            {"premium_interactions": {"entitlement": 300, "remaining": -2, "percent_remaining": -.6,
                                      "overage_permitted": True}})
        for told in cases:
            for source in ("header", "stream", "usage"):
                with self.subTest(told=told, source=source):
                    self.limits.clear()
                    self.refuse()
                    self.assertIsNotNone(self.ask())
                    self.assertEqual(self.limits.see(told, source), ["m"])
                    self.assertEqual(self.limits.report(), [])
                    self.assertIsNone(self.ask())

    def test_other_lanes_and_no_room_end_nothing(self) -> None:
        cases: tuple[dict[str, Any], ...] = (
            {}, {"premium_interactions": USED_UP}, {"chat": "ent=-1&rem=100"}, {"chat": self.FULL},
            {"completions": self.FULL}, {"weekly": self.FULL}, {"premium_interactions": ""},
            {"premium_interactions": "rem=nan"}, {"premium_interactions": None},
            {"premium_interactions": [1]}, {"premium_interactions": {"unlimited": True}},
            {"premium_interactions": {"entitlement": 0, "remaining": 0, "percent_remaining": 100}})
        self.refuse()
        for told in cases:
            for source in ("header", "usage"):
                self.assertEqual(self.limits.see(told, source), [], told)
        self.assertIsNotNone(self.ask())

    def test_all_lanes_must_have_room_where_the_refusal_named_none(self) -> None:
        self.refuse(lane="")
        usage = {"chat": {"unlimited": True}, "completions": {"entitlement": 9, "remaining": 9},
                 "premium_interactions": {"entitlement": 300, "remaining": 0}}
        told = {"chat": self.FULL, "premium_models": USED_UP}
        self.assertEqual(self.limits.see(told, "header"), [])
        self.assertEqual(self.limits.see({"weekly": self.FULL}, "header"), [])
        self.assertEqual(self.limits.see(usage, "usage"), [])
        usage["premium_interactions"]["remaining"] = 1
        self.assertEqual(self.limits.see(usage, "usage"), ["m"])

    def test_a_429_is_not_ended_by_quotas(self) -> None:
        for headers in ({"retry-after": "600"}, {"retry-after": "600", PREMIUM: USED_UP}):
            self.limits.clear()
            self.limits.refuse("m", self.limits.admit("m"), with_headers(429, headers))
            for source in ("header", "usage"):
                self.assertEqual(self.limits.see({
                    "premium_interactions": self.FULL, "weekly": self.FULL}, source), [])
            self.assertIsNotNone(self.ask())

    def test_a_429_for_a_ceiling_of_use_is_ended_by_room_below_it(self) -> None:
        self.refuse(lane=WEEKLY, status=429)
        self.assertEqual(self.limits.see({"premium_interactions": self.FULL}, "header"), [])
        self.assertEqual(self.limits.see({"weekly": self.FULL}, "header"), ["m"])
        self.assertIsNone(self.ask())

    def test_room_that_was_refused_yet_is_believed_once(self) -> None:
        self.refuse(told=self.FULL)                          # its own headers show room
        told = {"premium_interactions": self.FULL}
        self.assertEqual(self.limits.see(told, "header"), [])
        self.assertEqual(self.limits.see(told, "usage"), ["m"])
        self.refuse(told=self.FULL)
        for _ in range(3):
            self.assertEqual(self.limits.see(told, "usage"), [])
        more = {"premium_interactions": self.FULL.replace("75.5", "80")}
        self.assertEqual(self.limits.see(more, "usage"), ["m"])       # something was bought
        self.assertIsNone(self.ask())

    def test_after_room_was_seen_one_request_goes_first(self) -> None:
        self.refuse()
        self.limits.see({"premium_interactions": self.FULL}, "usage")
        self.assertTrue(self.goes_up(refusal(402)))


class LimitCase(ProxyCase):
    """Over real sockets, with a clock that the test moves."""

    settings: dict[str, Any] = {}

    def setUp(self) -> None:
        self.clock = TestClock()
        self.fake = self.enter(FakeUpstream())
        self.proxy = self.enter(Proxy(self.fake, clock=self.clock, **self.settings))

    def move(self, seconds: float) -> None:
        self.clock.monotonic_offset_s += seconds
        self.clock.wall_offset_s += seconds

    def out_of_quota(self, days: float = 30, **headers: str) -> Answer:
        reset = time.gmtime(self.clock()[1] + days * DAY_S)
        return Answer(402, {
            PREMIUM: USED_UP.partition("rst=")[0] + time.strftime(
                "rst=%Y-%m-%dT%H%%3A%M%%3A%SZ", reset), **headers},
            {"message": "You have no quota", "code": "quota_exceeded"})

    def ask(self, model: str = "gpt-4.1", **more: Any) -> Reply:
        return self.proxy.post("/v1/chat/completions", chat("hi", model, **more))

    def many(self, count: int = 20) -> list[Reply]:
        """That many clients at once."""
        replies: list[Reply] = []
        threads = [threading.Thread(target=lambda: replies.append(self.ask()))
                   for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        self.assertEqual(len(replies), count)
        return replies

    @contextlib.contextmanager
    def refusing(self, status: int = 402, code: str = "quota_exceeded") -> Iterator[None]:
        def refuse(ask: Ask) -> None:
            raise Refuse(status, {"message": "no", "code": code}, {PREMIUM: USED_UP})

        self.fake.refusals.append(refuse)
        try:
            yield
        finally:
            self.fake.refusals.remove(refuse)


class HealTest(LimitCase):
    def test_a_month_without_quota_ends_when_the_upstream_recovers(self) -> None:
        self.fake.script(CHAT, self.out_of_quota())
        first = self.ask()
        self.assertEqual(first.status, 402)
        self.assertAlmostEqual(int(first.headers["retry-after"]), 30 * DAY_S, delta=2)
        for reply in self.many():
            self.assertEqual((reply.status, reply.json["error"]["code"]), (402, "quota_exceeded"))
            self.assertIn(int(reply.headers["retry-after"]), range(30, 61))
        self.assertEqual(self.fake.count(CHAT), 1)
        self.move(61)
        self.assertEqual(self.ask().status, 200)
        self.assertEqual([reply.status for reply in self.many()], [200] * 20)
        self.assertEqual(self.proxy.get("/stats").json["limits"], [])

    def test_of_twenty_waiting_clients_one_goes_up_for_each_probe(self) -> None:
        with self.refusing():
            self.assertEqual(self.ask().status, 402)
            for calls, pause_s in enumerate((60, 120, 240), 2):
                self.assertEqual([reply.status for reply in self.many()], [402] * 20)
                self.assertEqual(self.fake.count(CHAT), calls - 1)
                self.move(pause_s + 1)
                self.assertEqual([reply.status for reply in self.many()], [402] * 20)
                self.assertEqual(self.fake.count(CHAT), calls)

    def test_others_are_answered_here_while_a_probe_is_under_way(self) -> None:
        self.fake.script(CHAT, self.out_of_quota(), Answer(status=0, hold=True))
        self.ask()
        self.move(61)
        replies: list[Reply] = []
        probe = threading.Thread(target=lambda: replies.append(self.ask()))
        probe.start()
        wait_until(lambda: self.fake.holding == 1, "the probe at the upstream")
        self.assertEqual([reply.status for reply in self.many()], [402] * 20)
        self.fake.release()
        probe.join(10)
        self.assertEqual(replies[0].status, 200)
        self.assertEqual(self.ask().status, 200)
        self.assertEqual(self.fake.count(CHAT), 3)

    def test_a_probe_whose_client_leaves_frees_its_place(self) -> None:
        self.fake.script(CHAT, self.out_of_quota(), Answer(status=0, hold=True))
        self.ask()
        self.move(61)
        body = json.dumps(chat("hi")).encode()
        with self.proxy.connect() as sock:
            sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                         b"application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            wait_until(lambda: self.fake.holding == 1, "the probe at the upstream")
            self.assertEqual(self.ask().status, 402)
        wait_until(lambda: self.ask().status == 200, "the next probe")
        self.fake.release()

    def test_a_probe_that_meets_a_network_error_frees_its_place(self) -> None:
        self.fake.script(CHAT, self.out_of_quota(), *[Answer(drop="after", reset=True)] * 2)
        self.ask()
        self.move(61)
        self.assertEqual(self.ask().status, 502)
        wait_until(lambda: self.ask().status == 200, "the next probe")

    def test_a_probe_that_needs_a_repair_gets_it(self) -> None:
        self.fake.script(CHAT, self.out_of_quota(), Answer(400, {}, {"error": {
            "message": "odd: Extra inputs are not permitted", "code": "invalid_request_body"}}))
        self.ask()
        self.move(61)
        self.assertEqual(self.ask(odd=1).status, 200)

    def test_a_plain_429_rests_longer_each_time_until_a_success(self) -> None:
        with self.refusing(429, "rate_limited"):
            self.assertEqual(self.ask().headers["retry-after"], "10")
            for calls, seconds in enumerate((10, 20, 40), 1):
                for reply in self.many():
                    self.assertEqual(reply.status, 429)
                    self.assertIn(int(reply.headers["retry-after"]), range(1, seconds + 1))
                self.assertEqual(self.fake.count(CHAT), calls)
                self.move(seconds + 1)
                self.assertEqual([reply.status for reply in self.many()], [429] * 20)
                self.assertEqual(self.fake.count(CHAT), calls + 1)
        self.move(81)
        self.assertEqual(self.ask().status, 200)
        self.fake.script(CHAT, Answer(429, {}, "Too Many Requests"))
        self.assertEqual(self.ask().headers["retry-after"], "10")

    def test_a_laptop_that_slept_through_the_rest_asks_at_once(self) -> None:
        self.fake.script(CHAT, Answer(429, {"retry-after": "7200"}, "slow down"))
        self.assertEqual((self.ask().status, self.ask().status), (429, 429))
        self.clock.wall_offset_s += 7201
        self.assertEqual([reply.status for reply in [self.ask() for _ in range(5)]], [200] * 5)

    def test_a_count_of_tokens_is_no_probe(self) -> None:
        self.fake.script(MESSAGES, self.out_of_quota())
        self.assertEqual(self.proxy.post("/v1/messages", message("a")).status, 402)
        self.move(61)
        path = "/v1/messages/count_tokens"
        self.assertEqual(self.proxy.post(path, message("a")).status, 200)
        self.assertEqual(self.fake.count(path), 0)
        self.assertEqual(self.proxy.post("/v1/messages", message("a")).status, 200)
        self.proxy.post(path, message("a"))
        self.assertEqual(self.fake.count(path), 1)

    def test_each_dialect_says_when_the_next_probe_is_and_how_to_end_the_rest(self) -> None:
        self.fake.script(CHAT, self.out_of_quota())
        self.ask()
        for path, make in REQUESTS:
            for stream in (False, True):
                reply = self.proxy.post(path, make("a", model="gpt-4.1", stream=stream))
                self.assertEqual(reply.status, 402)
                self.assertTrue(50 <= int(reply.headers["retry-after"]) <= 60)
                error = reply.json["error"]
                self.assertEqual(error["type"], "permission_error" if path == "/v1/messages"
                                 else "insufficient_quota")
                self.assertRegex(error["message"], "You have no quota .*a limit of model gpt-4.1 "
                                 "until .*goes up as a probe in [56][0-9] s; .*POST /limits/clear")
        self.assertEqual(self.fake.count(CHAT), 1)


class SeenRoomTest(LimitCase):
    def test_whoever_looks_at_the_usage_ends_the_rest(self) -> None:
        self.fake.script(CHAT, self.out_of_quota())
        self.assertEqual((self.ask().status, self.ask().status), (402, 402))
        self.fake.usage_extra = {"quota_snapshots": {"premium_interactions": {
            "entitlement": 300, "remaining": 0, "percent_remaining": 0.0}}}
        self.proxy.get("/usage")
        self.assertEqual(self.ask().status, 402)
        self.fake.usage_extra = {}
        self.proxy.get("/usage")
        self.assertEqual(self.ask().status, 200)
        self.assertIn("has room again", self.proxy.log_text())

    def test_a_header_of_another_models_answer_ends_the_rest(self) -> None:
        self.fake.script(CHAT, self.out_of_quota())
        self.assertEqual((self.ask().status, self.ask().status), (402, 402))
        self.assertEqual(self.ask("gpt-4o").status, 200)     # with 75.5 % left in a header
        self.assertEqual(self.ask().status, 200)

    def test_quotas_in_a_stream_end_the_rest(self) -> None:
        self.fake.script(CHAT, self.out_of_quota())
        self.fake.script(RESPONSES, Answer(headers={PREMIUM: ""}, chunks=[
            b'event: response.completed\ndata: {"type":"response.completed","response":{"id":"r",'
            b'"object":"response","status":"completed","output":[]},"copilot_quota_snapshots":{'
            b'"premium_interactions":{"entitlement":"300","percent_remaining":"75.4"}}}\n\n']))
        self.assertEqual((self.ask().status, self.ask().status), (402, 402))
        self.proxy.stream("/v1/responses", {"model": "gpt-5.3-codex", "input": "a"})
        wait_until(lambda: self.proxy.get("/stats").json["limits"] == [], "the end of the rest")
        self.assertEqual(self.ask().status, 200)


class FallbackTest(LimitCase):
    """With --fallback; every answer of the fake shows 75.5 % left."""

    settings = {"fallback": "gpt-4o"}

    def script_refusal(self, headers: dict[str, str]) -> None:
        self.fake.script(CHAT, Answer(402, headers, {"message": "no", "code": "quota_exceeded"}))

    def test_the_fallback_serves_while_probes_go_up(self) -> None:
        self.script_refusal({})
        models = [self.ask().json["model"] for _ in range(5)]
        self.assertEqual((models, self.fake.count(CHAT)), (["gpt-4o"] * 5, 6))
        self.move(61)
        self.script_refusal({})
        models = [self.ask().json["model"] for _ in range(5)]         # the first one was a probe
        self.assertEqual((models, self.fake.count(CHAT)), (["gpt-4o"] * 5, 12))
        self.move(121)
        reply = self.ask()
        self.assertEqual((reply.json["model"], self.fake.count(CHAT)), ("gpt-4.1", 13))
        self.assertNotIn("x-copilot-proxy-fallback", reply.headers)
        self.assertEqual(self.ask().json["model"], "gpt-4.1")

    def test_room_that_the_fallback_shows_makes_no_two_calls_of_each(self) -> None:
        def refuse(ask: Ask) -> None:
            if ask.body.get("model") == "gpt-4.1":
                raise Refuse(402, {"message": "no", "code": "quota_exceeded"}, {PREMIUM: ""})

        self.fake.refusals.append(refuse)
        self.assertEqual([self.ask().json["model"] for _ in range(10)], ["gpt-4o"] * 10)
        self.assertEqual(self.fake.count(CHAT), 12)          # the room was tried once


class ClearTest(LimitCase):
    def rest(self, proxy: Proxy | None = None, **headers: str) -> None:
        for model in ("gpt-4.1", "gpt-4o"):
            self.fake.script(CHAT, self.out_of_quota())
            reply = (proxy or self.proxy).post("/v1/chat/completions", chat("a", model), **headers)
            self.assertEqual(reply.status, 402)

    def test_what_rests_stands_in_the_stats(self) -> None:
        self.rest()
        lines = self.proxy.get("/stats").json["limits"]
        self.assertEqual([line["scope"] for line in lines], ["gpt-4.1", "gpt-4o"])
        now, account = self.clock()[1], self.proxy.app.login.account
        assert account is not None
        for line in lines:
            self.assertEqual((line["status"], line["code"]), (402, "quota_exceeded"))
            self.assertAlmostEqual(line["since"], now, delta=20)
            self.assertAlmostEqual(line["until"], line["since"] + 30 * DAY_S, delta=2)
            self.assertAlmostEqual(line["next_probe"], line["since"] + 60, delta=2)
            self.assertEqual(line["account"], account.name)

    def test_one_scope_or_all_are_cleared_and_named(self) -> None:
        name = self.proxy.app.login.account.name                   # type: ignore[union-attr]
        self.rest()
        for body, cleared in (({"scope": "gpt-5"}, []), ({"account": "nobody"}, []),
                              ({"scope": "gpt-4.1"}, ["gpt-4.1"]), ({"scope": "gpt-4.1"}, []),
                              ({"account": name, "scope": "gpt-4o"}, ["gpt-4o"]), ({}, [])):
            reply = self.proxy.post("/limits/clear", body)
            self.assertEqual((reply.status, reply.json), (200, {"cleared": [
                {"account": name, "scope": scope} for scope in cleared]}))
        self.assertEqual((self.ask().status, self.ask("gpt-4o").status), (200, 200))
        for body in ({}, b""):
            self.rest()
            reply = self.proxy.post("/v1/limits/clear", body)
            self.assertEqual([line["scope"] for line in reply.json["cleared"]],
                             ["gpt-4.1", "gpt-4o"])
            self.assertEqual((self.ask().status, self.ask("gpt-4o").status), (200, 200))

    def test_a_body_that_names_something_else_clears_nothing(self) -> None:
        self.rest()
        for body in ({"model": "gpt-4.1"}, {"scope": ""}, {"scope": None}, {"scope": ["gpt-4.1"]},
                     {"account": 5}, [], "all", b"{", {"scope\x1b[31m": "x"}):
            reply = self.proxy.post("/limits/clear", body)
            self.assertEqual(reply.status, 400, body)
            self.assertNotIn(b"\x1b", reply.body)
        self.assertEqual(len(self.proxy.get("/stats").json["limits"]), 2)

    def test_it_has_the_door_of_what_changes_state(self) -> None:
        foreign = {"Origin": "http://evil.example"}
        with Proxy(self.fake, clock=self.clock, api_key=(KEY,),
                   cors_origin=("http://friend.example",)) as proxy:
            self.fake.github_tokens.add("ghu_one")
            proxy.app.accounts.keys.add("made-up-account-key", "one", "ghu_one")
            operator = {"Authorization": "Bearer " + KEY}
            self.rest(proxy, **operator)
            self.rest(proxy, Authorization="Bearer made-up-account-key")
            for status, headers in (
                    (401, {}), (401, {"Authorization": "Bearer nobodys"}),
                    (403, {"Authorization": "Bearer made-up-account-key"}),
                    (403, dict(operator, **foreign)),
                    (403, dict(operator, Origin="http://friend.example")),
                    (403, dict(operator, **{"Sec-Fetch-Site": "cross-site"})),
                    (415, dict(operator, **{"Content-Type": "text/plain"}))):
                reply = proxy.post("/limits/clear", {}, **headers)
                self.assertEqual(reply.status, status, headers)
            for method in ("GET", "PUT", "DELETE"):
                self.assertEqual(proxy.request(method, "/limits/clear", None, operator).status, 405)
            own = proxy.get("/stats", Authorization="Bearer made-up-account-key").json["limits"]
            self.assertEqual([(line["account"], line["scope"]) for line in own],
                             [("one", "gpt-4.1"), ("one", "gpt-4o")])
            self.assertEqual(len(proxy.get("/stats", **operator).json["limits"]), 4)
            reply = proxy.post("/limits/clear", {"account": "one"}, **operator)
            self.assertEqual(len(reply.json["cleared"]), 2)
            self.assertEqual(len(proxy.post("/limits/clear", {}, **operator).json["cleared"]), 2)


if __name__ == "__main__":
    unittest.main()
