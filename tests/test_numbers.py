"""Numbers from outside, however odd, crash nothing, freeze nothing and let nothing wait forever."""
from __future__ import annotations

import contextlib
import json
import math
import random
import socket
import sys
import threading
import time
import unittest
import unittest.mock
import urllib.parse
from typing import Any, Iterator

from support import (DEADLINE_S, REQUESTS, Proxy, ProxyCase, TestClock, chat, cp, long_run,
                     raw_exchange, run_command)
from fake_upstream import CHAT, EXCHANGE, MESSAGES, MODELS, Answer, make_model
from cases import SharedCase

CHAT_PATH = "/v1/chat/completions"
HUGE = 10 ** 400                 # a JSON number that no float can hold
ODD_NUMBERS = (HUGE, -HUGE, 1e308, -1e308, -1, 0, 1e-320, 0.1, True, False, None, "", "x", "5",
               "nan", "inf", "-inf", "1e400", "9" * 400, "\u00b2", "\u0665", "1_000", [], {})
MANY_MODELS = 10_000
QUICK_S = 1.0                    # of processor time, on any machine


class ReaderTest(unittest.TestCase):
    """The family of readers in section 4."""

    def test_what_is_no_number_becomes_what_the_name_says(self) -> None:
        for value in ODD_NUMBERS:
            with self.subTest(value=str(value)[:20]):
                for found in (cp.number_or_none(value), cp.count_or_none(value),
                              cp.text_number_or_none(value), cp.moment_or_none(value)):
                    self.assertTrue(found is None or math.isfinite(found))
                self.assertTrue(0 <= cp.count_or_zero(value) < cp.MAX_COUNT)
                self.assertTrue(5 <= cp.number_or(value, 7.0, 5, 9) <= 9)

    def test_numbers_in_json(self) -> None:
        for value, wanted in ((5, 5), (5.5, 5.5), (-5, -5), (True, None), ("5", None),
                              (HUGE, None), (float("nan"), None), (float("inf"), None)):
            self.assertEqual(cp.number_or_none(value), wanted, value)
        self.assertIsInstance(cp.number_or_none(1), int)         # goes on as it was written

    def test_counts(self) -> None:
        for value, wanted in ((5, 5), (5.0, 5), (5.5, None), (-1, None), (0, 0), (True, None),
                              ("5", None), (HUGE, None), (2.0 ** 60, None)):
            self.assertEqual(cp.count_or_none(value), wanted, value)
            self.assertEqual(cp.count_or_zero(value), wanted or 0, value)

    def test_numbers_as_text(self) -> None:
        for value, wanted in (("75.5", 75.5), (" 12 ", 12.0), ("-1", -1.0), (3, 3), ("1e3", 1000),
                              ("1_0", None), ("\u0665", None), ("nan", None), ("1e400", None),
                              ("1" * 99, None), ("", None), (False, None)):
            self.assertEqual(cp.text_number_or_none(value), wanted, value)

    def test_digits(self) -> None:
        for text, wanted in (("0", 0), ("15", 15), ("", None), (None, None), ("+5", None),
                             ("-5", None), (" 5", None), ("\u00b2", None), ("\u0665", None),
                             ("5.0", None), ("0x5", None), ("1_0", None), ("9" * 99, None)):
            self.assertEqual(cp.digits_or_none(text), wanted, text)
        self.assertEqual((cp.digits_or_none("9", 9), cp.digits_or_none("9", 8)), (9, None))

    def test_moments(self) -> None:
        for value, wanted in (
                ("2026-12-01", 1796083200.0), ("2026-12-01T00:00:00Z", 1796083200.0),
                ("2026-12-01 00:00:01", 1796083201.0), ("1796083200", 1796083200.0),
                (1796083200000, 1796083200.0), ("2024-02-29", 1709164800.0), ("2026-02-29", None),
                ("2026-02-30", None), ("2026-13-01", None), ("2026-00-01", None),
                ("2026-12-01T25:00:00Z", None), ("0000-00-00", None),
                ("9999-12-31", 253402214400.0), ("1969-12-31", None), ("2026-12-01T00:00:60", None),
                (9e15, None), (-5, None), (0, None), ("soon", None)):
            self.assertEqual(cp.moment_or_none(value), wanted, value)

    def test_a_moment_of_a_broken_file_is_shown_as_unknown(self) -> None:
        for value in (*ODD_NUMBERS, 1e12, 9e15, float("nan")):
            with self.subTest(value=str(value)[:20]):
                self.assertRegex(cp.local_time(value), r"\A(\?|[0-9]{4}-[0-9-]{5} [0-9:]{5})\Z")

    def test_dates_of_http(self) -> None:
        for text, wanted in (("Tue, 01 Dec 2026 00:00:00 GMT", 1796083200.0), ("", None),
                             ("Tue, 01 Dec %s 00:00:00 GMT" % ("9" * 40), None),
                             ("Tue, 01 Dec 99999 00:00:00 GMT", None), ("9" * 9000, None),
                             ("Tue, 99 Foo 2026", None)):
            self.assertEqual(cp.http_moment_or_none(text), wanted, text[:40])


class NoTime(threading.Event):
    """A stop event; the time of its waits passes at once, on a clock of its own, up to a limit."""

    def __init__(self, case: unittest.TestCase, limit_s: float) -> None:
        super().__init__()
        self.now, self.limit_s, self.waits = 1000.0, limit_s, []      # type: ignore[var-annotated]
        patch = unittest.mock.patch.object(cp.time, "monotonic", lambda: self.now)
        patch.start()
        case.addCleanup(patch.stop)

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        self.now += timeout or 0.0
        if self.now > 1000.0 + self.limit_s:
            self.set()
        return self.is_set()


class StubGitHub(cp.GitHub):
    """A GitHub whose login codes are never granted."""

    def __init__(self, answer: dict[str, Any], poll: dict[str, Any]) -> None:
        super().__init__(cp.Settings(), cp.Upstream(cp.Settings(), {}))
        self.codes = self.polls = 0
        self._code_answer, self._poll_answer = answer, poll

    async def _post(self, path: str, values: Any) -> Any:
        self.codes += 1
        if self.codes > 10_000:
            raise AssertionError("a hot loop of login codes")
        return 200, dict(self._code_answer, device_code="d", user_code="u")

    async def poll(self, code: Any) -> Any:
        self.polls += 1
        if self.polls > 10_000:
            raise AssertionError("a hot loop of polls")
        return self._poll_answer


class LoginTest(unittest.TestCase):
    HOUR_S = 3600.0

    def calls_in_an_hour(self, answer: dict[str, Any], poll: dict[str, Any]) -> tuple[int, int]:
        """(login codes, polls) while a login runs for an hour without an end."""
        github, stop = StubGitHub(answer, poll), NoTime(self, self.HOUR_S)
        login = cp.DeviceLogin(github, 1.0, stop, lambda code: None)      # type: ignore[arg-type]
        self.assertEqual(login.run(), "")
        self.assertLessEqual(max(stop.waits), self.HOUR_S)
        return github.codes, github.polls

    def test_codes_that_expire_at_once_make_no_hot_loop(self) -> None:
        for value in (*ODD_NUMBERS, 1, 0.001, 5e-324):
            for poll in ({}, {"error": "expired_token"}, {"error": "authorization_pending"}):
                with self.subTest(expires_in=str(value)[:20], poll=poll):
                    codes, polls = self.calls_in_an_hour({"expires_in": value, "interval": 5}, poll)
                    self.assertLessEqual(codes, self.HOUR_S / 5 + 1)
                    self.assertLessEqual(polls, self.HOUR_S)

    def test_an_endless_interval_does_not_sleep_for_ever(self) -> None:
        for value in (*ODD_NUMBERS, 1e12, 1e300):
            with self.subTest(interval=str(value)[:20]):
                codes, polls = self.calls_in_an_hour({"expires_in": 900, "interval": value}, {})
                self.assertGreaterEqual(polls, 4)
                self.assertLessEqual(polls, self.HOUR_S)
                self.assertLessEqual(codes, 5)

    def test_an_endless_interval_in_slow_down_does_not_sleep_for_ever(self) -> None:
        for value in ODD_NUMBERS:
            with self.subTest(interval=str(value)[:20]):
                self.calls_in_an_hour({"expires_in": 900, "interval": 5},
                                      {"error": "slow_down", "interval": value})


class TokenTest(ProxyCase):
    def test_odd_times_in_the_token_exchange_are_survived_without_a_hot_loop(self) -> None:
        for name in ("refresh_in", "expires_at"):
            for value in ODD_NUMBERS:
                with self.subTest(name=name, value=str(value)[:20]):
                    self.fake.exchange_extra = {name: value}
                    self.fake.revoke_tokens()
                    before = self.fake.count(EXCHANGE)
                    for text in "abc":
                        reply = self.proxy.post(CHAT_PATH, chat(text))
                        self.assertEqual(reply.status, 200, reply.body)
                    self.assertEqual(self.fake.count(EXCHANGE), before + 1)


class CatalogueTest(ProxyCase):
    """Numbers in the list of models."""

    def entry(self, **more: Any) -> dict[str, Any]:
        return dict(make_model("gpt-odd"), **more)

    def listed(self) -> Any:
        """The entry of the odd model, as clients get it."""
        with Proxy(self.fake) as proxy:
            reply = proxy.get("/v1/models?all=1")
            self.assertEqual(reply.status, 200, reply.body)
            entries = json.loads(reply.body, parse_constant=self.fail)["data"]
            return next(entry for entry in entries if entry["id"] == "gpt-odd")

    def test_a_date_that_is_none_in_a_version_is_no_500(self) -> None:
        for version in ("gpt-odd-2026-02-30", "2026-00-00", "2099-99-99", HUGE, None, [], {}):
            with self.subTest(version=str(version)[:20]):
                self.fake.models = [self.entry(version=version)]
                self.assertEqual(self.listed()["created"], 0)
                self.assertEqual(self.listed()["created_at"], "1970-01-01T00:00:00Z")
        self.fake.models = [self.entry(version="gpt-odd-2024-02-29")]
        self.assertEqual(self.listed()["created"], 1709164800)

    @long_run
    def test_odd_limits_and_prices_are_no_500(self) -> None:
        for value in ODD_NUMBERS:
            with self.subTest(value=str(value)[:20]):
                entry = self.entry(billing={"multiplier": value, "token_prices": {
                    "batch_size": value, "default": {"input_price": value, "context_max": value}}})
                names = ("max_output_tokens", "max_prompt_tokens", "max_context_window_tokens",
                         "max_non_streaming_output_tokens")
                entry["capabilities"]["limits"] = dict.fromkeys(names, value)
                self.fake.models = [entry]
                price = self.listed()["price"] or {}
                for number in price.values():
                    self.assertTrue(number is None or 0 <= abs(number) < math.inf, price)
                for path, make in REQUESTS:
                    with Proxy(self.fake) as proxy:
                        reply = proxy.post(path, make("a", "gpt-odd"))
                        self.assertLess(reply.status, 500, reply.body)

    def test_an_empty_list_of_models_does_not_replace_a_good_one(self) -> None:
        clock = TestClock()
        with Proxy(self.fake, catalogue_age_s=0.0, token_retry_s=(0.0,), clock=clock) as proxy:
            before = [entry["id"] for entry in proxy.get("/v1/models").json["data"]]
            self.assertGreater(len(before), 3)
            for body in ({"data": []}, {"data": None}, {}, [], {"data": [{"id": 5}, None, "x"]},
                         {"data": [{"id": "x" * 1000}]}):
                with self.subTest(body=str(body)[:40]):
                    self.fake.script(MODELS, Answer(200, body=body))
                    asked = self.fake.count(MODELS)
                    found = [entry["id"] for entry in proxy.get("/v1/models").json["data"]]
                    self.assertEqual(found, before)
                    self.assertEqual(self.fake.count(MODELS), asked + 1)

    def test_an_account_without_models_is_told_so(self) -> None:
        self.fake.models = []
        self.assertEqual(self.proxy.get("/v1/models").json["data"], [])
        self.assertEqual(self.proxy.post(CHAT_PATH, chat("a")).status, 404)

    @long_run
    def test_ten_thousand_models_are_searched_quickly_for_a_name_that_is_none(self) -> None:
        ids = ["gpt-%d.%d-%s" % (n % 97, n % 89, "mini nano codex max".split()[n % 4] * (n % 7))
               for n in range(MANY_MODELS - 1)] + ["claude-opus-9.9"]
        models = [cp.Model.from_entry(make_model(name + "-%d" % n if n % 2 else name))
                  for n, name in enumerate(ids)]
        for asked in ("claud-opus-9.9x", "gpt-5-mimi", "a" * 200, "-" * 200, "g", ""):
            with self.subTest(asked=asked[:20]):
                began = time.thread_time()
                near = cp.nearest_ids(asked, models)
                self.assertLess(time.thread_time() - began, QUICK_S)
                self.assertEqual(len(near), 3)
        self.assertEqual(cp.nearest_ids("claud-opus-9.9x", models)[0], models[-1].id)

    def test_long_ids_are_not_compared_letter_by_letter(self) -> None:
        chance = random.Random(5)
        words = "gpt claude opus sonnet haiku mini nano codex max 5 4.1 preview".split()
        names = ["-".join(chance.choices(words, k=30))[:190] for _ in range(MANY_MODELS)]
        models = [cp.Model("%s-%d" % (name, number), picker=True)
                  for number, name in enumerate(names)]
        asked = "-".join(chance.choices(words, k=30))[:190]
        began = time.thread_time()
        self.assertEqual(len(cp.nearest_ids(asked, models)), 3)
        self.assertLess(time.thread_time() - began, QUICK_S)

    def test_a_number_of_many_digits_in_an_id_is_no_500(self) -> None:
        self.fake.models = [make_model("gpt-%s.5" % ("9" * 180)), make_model("gpt-5-mini")]
        with Proxy(self.fake) as proxy:
            for name in ("gpt-" + "9" * 190, "claude-opus-" + "8" * 180, "o" + "1" * 150):
                self.assertIn(proxy.post(CHAT_PATH, chat("a", name)).status, (200, 404))


class UpstreamAnswerTest(ProxyCase):
    """Numbers in answers and their heads."""

    def test_an_odd_length_of_an_answer_is_502(self) -> None:
        for text in ("\u00b2", "+5", "-5", "5.0", "0x5", "", " ", "5, 6", "9" * 400, "5;"):
            with self.subTest(length=text[:20]):
                with self.assertRaisesRegex(cp.UpstreamError, "Content-Length"):
                    cp.answer_length({"content-length": text})
        self.assertEqual(cp.answer_length({"content-length": "5, 5"}), 5)
        self.assertIsNone(cp.answer_length({}))

    def test_an_answer_with_an_odd_length_is_a_clear_error(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock = listener.accept()[0]
                    with sock:
                        sock.recv(65536)
                        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\n{}")

        threading.Thread(target=serve, daemon=True).start()
        url = "http://127.0.0.1:%d/" % listener.getsockname()[1]
        upstream = cp.Upstream(cp.Settings(), {})
        self.addCleanup(upstream.pool.clear)
        request = cp.UpstreamRequest("GET", url, {}, timeout_s=DEADLINE_S)
        with self.assertRaisesRegex(cp.UpstreamError, "Content-Length"):
            cp.run(upstream.send(request))

    def test_odd_counts_in_an_answer_are_no_500(self) -> None:
        for value in ODD_NUMBERS:
            for path, names in ((CHAT, ("prompt_tokens", "completion_tokens", "total_tokens")),
                                (MESSAGES, ("input_tokens", "output_tokens",
                                            "cache_read_input_tokens"))):
                with self.subTest(value=str(value)[:20], path=path):
                    usage = dict.fromkeys(names, value)
                    counts = cp.read_usage(usage)
                    self.assertTrue(all(0 <= count < cp.MAX_COUNT for count in counts.values()))

    def test_a_sequence_number_of_many_digits_does_not_break_a_stream(self) -> None:
        for digits in (16, 5000, 100_000):
            with self.subTest(digits=digits):
                number = b"9" * digits
                frame = (b"event: response.output_text.delta\ndata: {\"type\":"
                         b"\"response.output_text.delta\",\"item_id\":\"a\",\"output_index\":0,"
                         b"\"content_index\":0,\"delta\":\"x\",\"sequence_number\":%b}\n\n"
                         b"" % number)
                relay = cp.RESPONSES.stream("gpt-5-mini", {})
                relay.feed(frame + frame)
                relay.close(None)

    def test_a_limit_of_many_digits_in_an_error_is_no_500(self) -> None:
        for words in ("max_tokens: 5 > %s", "temperature: Input should be less than or equal to %s",
                      "prompt is too long: %s tokens > %s", "too many images: at most %s",
                      "token count of %s exceeds the limit of %s", "try again in %s hours",
                      "maximum context length is %s tokens, you requested %s"):
            for digits in (16, 400):
                with self.subTest(words=words, digits=digits):
                    text = words.replace("%s", "9" * digits)
                    self.fake.script(CHAT, *[Answer(400, body={"error": {"message": text}})] * 3)
                    reply = self.proxy.post(CHAT_PATH, chat("a", temperature=0.5, max_tokens=1.5))
                    self.assertEqual(reply.status, 400, reply.body)
                    self.fake._scripts.clear()

    def test_a_huge_number_of_a_client_beside_a_limit_is_no_500(self) -> None:
        for limit in ("1.5", "2"):
            with self.subTest(limit=limit):
                text = "temperature: Input should be less than or equal to " + limit
                self.fake.script(CHAT, Answer(400, body={"error": {"message": text}}))
                with Proxy(self.fake) as proxy:        # without lessons of the last one
                    reply = proxy.post(CHAT_PATH, chat("a", temperature=HUGE))
                self.assertEqual(reply.status, 200, reply.body)
                self.assertEqual(self.fake.last(CHAT).json["temperature"], float(limit))

    def test_odd_quotas_are_shown_as_unknown(self) -> None:
        for name in ("entitlement", "percent_remaining", "quota_remaining", "overage_count",
                     "quota_reset_at"):
            for value in (*ODD_NUMBERS, 9e15):
                said = {"entitlement": 300, "percent_remaining": 40, name: value}
                with self.subTest(name=name, value=str(value)[:20]):
                    lane = cp.quota_lane("chat", said)
                    numbers = [value for value in lane.values() if isinstance(value, float)]
                    self.assertTrue(all(map(math.isfinite, numbers)), lane)
                    self.assertTrue(cp.quota_line(lane))

    def test_odd_quotas_in_headers_are_shown_as_unknown(self) -> None:
        for value in ("nan", "inf", "1e400", "1e-320", "9" * 400, "\u00b2", "9e15", "-1", ""):
            with self.subTest(value=value[:20]):
                query = urllib.parse.urlencode(dict.fromkeys(("ent", "rem", "ov", "rst"), value))
                self.fake.script(CHAT, Answer(429, body="slow down", headers={
                    "x-usage-ratelimit-session": query, "retry-after": "0"}))
                with Proxy(self.fake) as proxy:
                    self.assertEqual(proxy.post(CHAT_PATH, chat("a")).status, 429)
                    for path in ("/usage", "/status", "/history/summary", "/metrics"):
                        reply = proxy.get(path)
                        self.assertLess(reply.status, 500, (path, reply.body))
                self.fake._scripts.clear()

    def test_odd_hints_when_to_try_again_are_survived(self) -> None:
        for hint in ("nan", "inf", "-5", "1e400", "9" * 400, "\u00b2", "Tue, 99 Foo 2026",
                     "Tue, 01 Dec %s 00:00:00 GMT" % ("9" * 5000),
                     "Tue, 01 Dec 99999 00:00:00 GMT"):
            with self.subTest(hint=hint[:30]):
                error = cp.UpstreamError("slow down", 429, headers={"retry-after": hint})
                self.assertTrue(1 <= cp.limit_s(error, time.time()) <= cp.LIMIT_S)


class ClientNumbersTest(SharedCase):
    """Numbers that clients send."""

    def test_odd_numbers_in_any_field_are_no_500(self) -> None:
        fields = ("max_tokens", "max_completion_tokens", "max_output_tokens", "temperature",
                  "top_p", "n", "seed", "top_logprobs", "presence_penalty", "top_k")
        for path, make in REQUESTS:
            for model in ("gpt-4.1", "claude-sonnet-4.6", "gpt-5.3-codex"):
                for value in (HUGE, -HUGE, 1e308, 5e-324, 0, -1, "5", "\u00b2"):
                    with self.subTest(path=path, model=model, value=str(value)[:20]):
                        for body in (make("a", model, **dict.fromkeys(fields, value)),
                                     make("a", model, thinking={"type": "enabled",
                                                                "budget_tokens": value})):
                            reply = self.proxy.post(path, body)
                            self.assertLess(reply.status, 500, reply.body)

    def test_odd_lengths_of_a_body_are_400(self) -> None:
        for text in ("\u00b2", "\u0665", "+5", "-5", "5.0", "0x5", "1_0", "9" * 5000, "nan"):
            with self.subTest(length=text[:20]):
                head = ("POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: " % CHAT_PATH
                        ).encode() + text.encode() + b"\r\n\r\n{}"
                self.assertIn(b" 400 ", raw_exchange(self.proxy.port, head).split(b"\r\n")[0])

    def test_odd_numbers_in_a_query_are_400(self) -> None:
        for text in ("\u00b2", "+5", "-5", "0", "5.0", "9" * 5000, "nan", "1_0"):
            with self.subTest(limit=text[:20]):
                reply = self.proxy.get("/history?limit=" + urllib.parse.quote(text))
                self.assertEqual(reply.status, 400, reply.body)

    def test_an_odd_budget_is_400(self) -> None:
        for text in ("nan", "inf", "1e400", "-1", "9" * 400, "1_0", "x", ""):
            with self.subTest(budget=text[:20]):
                reply = self.proxy.post(CHAT_PATH, chat("a"), **{"x-copilot-proxy-budget": text})
                self.assertEqual(reply.status, 400, reply.body)

    def test_a_json_number_of_many_digits_takes_no_time(self) -> None:
        """Python before 3.8.14 turned a million digits into a number: half a minute of nothing."""
        with any_digits():
            for data in (b"9" * 1_000_000, b"[-%b]" % (b"9" * 1_000_000),
                         b'{"a":[1,"x",%b]}' % (b"1" * 500_000)):
                began = time.thread_time()
                with self.assertRaises(ValueError):
                    cp.loads(data)
                self.assertLess(time.thread_time() - began, QUICK_S)
                self.assertEqual(self.proxy.post(CHAT_PATH, data).status, 400)

    def test_many_digits_in_a_text_are_a_text(self) -> None:
        digits = "3" * 100_000
        reply = self.proxy.post(CHAT_PATH, chat(digits))
        self.assertEqual(reply.status, 200)
        value = {"a": digits, "b": 5}
        self.assertEqual(cp.loads(json.dumps(value).encode()), value)
        self.assertEqual(cp.loads(b'["%b",%b]' % (digits.encode(), b"7" * 300))[1],
                         int("7" * 300))


@contextlib.contextmanager
def any_digits() -> Iterator[None]:
    """As on a Python without a limit of the digits of a number."""
    change = getattr(sys, "set_int_max_str_digits", None)
    if change is None:
        yield
        return
    before = sys.get_int_max_str_digits()
    change(0)
    try:
        yield
    finally:
        change(before)


class SettingTest(unittest.TestCase):
    def test_odd_numbers_in_flags_and_environment_are_refused(self) -> None:
        for text in ("nan", "inf", "1e400", "\u0665", "1_000", "x", "0x50"):
            for name in ("port", "rate-limit", "budget", "grace", "max-concurrency"):
                option = next(option for option in cp.OPTIONS if option.name == name)
                with self.subTest(name=name, text=text):
                    with self.assertRaisesRegex(cp.ConfigError, "is not a number"):
                        cp.parse_value(option, text, "--" + name)
        port = next(option for option in cp.OPTIONS if option.name == "port")
        with self.assertRaisesRegex(cp.ConfigError, "is not a number"):
            cp.parse_value(port, "80.5", "--port")
        self.assertEqual(cp.parse_value(port, " 80 ", "--port"), 80)

    def test_a_command_with_an_odd_number_ends_with_2(self) -> None:
        code, text = run_command("start", "--rate-limit", "nan")
        self.assertEqual(code, 2, text)
        code, text = run_command("start", COPILOT_PROXY_PORT="1_0")
        self.assertEqual(code, 2, text)


if __name__ == "__main__":
    unittest.main()
