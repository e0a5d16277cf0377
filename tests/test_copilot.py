"""Copilot tokens, their hosts, direct mode, the catalogue, and the law of RefreshingValue."""
from __future__ import annotations

import email.utils
import threading
import time
import unittest
import unittest.mock
from typing import Any, Callable

from support import REQUESTS, Proxy, ProxyCase, Reply, TestClock, chat, message, wait_until
import copilot_proxy as cp
from fake_upstream import (CHAT, EXCHANGE, MESSAGES, MODELS, USAGE, Answer, FakeUpstream, Token,
                           make_model)
from cases import ClockCase, GitHubCase

HOUR_S = 3600.0


def at_once(count: int, work: Callable[[], Any]) -> list[Any]:
    """Results of `work` from `count` threads that begin together."""
    barrier, results = threading.Barrier(count), []

    def run() -> None:
        barrier.wait(10)
        try:
            results.append(work())
        except Exception as error:          # handed to the test
            results.append(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


class FreshnessTest(ClockCase):
    """One exchange when it is due, none before."""

    def test_twenty_calls_at_once_after_expiry_make_one_exchange(self) -> None:
        self.warm_up()
        self.clock.monotonic_offset_s = self.clock.wall_offset_s = 2 * HOUR_S
        answers = at_once(20, self.ask)
        self.assertEqual([answer.status for answer in answers], [200] * 20)
        self.assertEqual(self.fake.exchanges, 2)

    def test_twenty_calls_at_once_after_a_revoked_token_make_one_exchange(self) -> None:
        self.warm_up()
        self.fake.revoke_tokens()
        answers = at_once(20, self.ask)
        self.assertEqual([answer.status for answer in answers], [200] * 20)
        self.assertEqual(self.fake.exchanges, 2)

    def test_twenty_first_calls_make_one_exchange_and_one_catalogue(self) -> None:
        answers = at_once(20, self.ask)
        self.assertEqual([answer.status for answer in answers], [200] * 20)
        self.assertEqual((self.fake.exchanges, self.fake.model_fetches), (1, 1))

    def test_a_laptop_that_slept_two_hours_fails_no_call(self) -> None:
        self.warm_up()
        self.fake.clock_offset_s = 2 * HOUR_S         # for the service time went on, too
        self.clock.wall_offset_s = 2 * HOUR_S         # the monotonic clock stood still
        self.assertEqual([self.ask().status for _ in range(3)], [200] * 3)
        self.assertEqual(self.fake.exchanges, 2)
        self.assertEqual(self.fake.count(CHAT), 4)    # none was refused and sent again

    def test_two_hours_of_monotonic_time_need_one_exchange(self) -> None:
        self.warm_up()
        self.clock.monotonic_offset_s = 2 * HOUR_S
        self.assertEqual([self.ask().status for _ in range(3)], [200] * 3)
        self.assertEqual(self.fake.exchanges, 2)

    def test_a_wall_clock_set_back_makes_no_exchange(self) -> None:
        self.warm_up()
        self.clock.wall_offset_s = -5 * HOUR_S
        self.assertEqual([self.ask().status for _ in range(3)], [200] * 3)
        self.assertEqual(self.fake.exchanges, 1)

    def test_nothing_is_exchanged_before_it_is_due(self) -> None:
        self.warm_up()
        self.clock.monotonic_offset_s = 1500 - 60 - 5
        self.assertEqual(self.ask().status, 200)
        self.assertEqual(self.fake.exchanges, 1)
        self.clock.monotonic_offset_s = 1500 - 60 + 1
        self.assertEqual(self.ask().status, 200)
        self.assertEqual(self.fake.exchanges, 2)

    def test_a_due_token_is_refreshed_by_one_while_the_others_go_on(self) -> None:
        self.warm_up()
        self.fake.script(EXCHANGE, Answer(0, hold=True))
        self.clock.monotonic_offset_s = 1500
        first = threading.Thread(target=self.ask)
        first.start()
        self.assertTrue(self.fake.wait_for(lambda: self.fake.holding))
        self.assertEqual([self.ask().status for _ in range(5)], [200] * 5)
        self.fake.release()
        first.join(10)
        self.assertEqual(self.fake.exchanges, 2)


class OddRefreshTest(unittest.TestCase):
    """refresh_in as no service should send it."""

    def test_a_negative_one_makes_no_exchange_per_call(self) -> None:
        with FakeUpstream() as fake:
            fake.refresh_in = -100
            with Proxy(fake) as proxy:
                statuses = [proxy.post("/v1/chat/completions", chat("hi")).status
                            for _ in range(5)]
            self.assertEqual((statuses, fake.exchanges), ([200] * 5, 1))


class WrongClockTest(unittest.TestCase):
    """A local clock that is hours away from the service's."""

    def test_no_exchange_is_made_for_a_wrong_clock(self) -> None:
        for hours in (-30, 5):
            for has_date in (False, True):
                with self.subTest(hours=hours, date=has_date), FakeUpstream() as fake:
                    fake.clock_offset_s = hours * HOUR_S
                    if has_date:
                        fake.script(EXCHANGE, dated_exchange(fake))
                    with Proxy(fake) as proxy:
                        statuses = [proxy.post("/v1/chat/completions", chat("hi")).status
                                    for _ in range(4)]
                    self.assertEqual(statuses, [200] * 4)
                    self.assertEqual(fake.count(EXCHANGE), 1)


def dated_exchange(fake: FakeUpstream, **more: Any) -> Answer:
    """An exchange's answer with the Date header that the live service sends."""
    body: dict[str, Any] = {
        "token": fake.mint_token(), "expires_at": int(fake.now() + fake.lifetime_s),
        "refresh_in": fake.refresh_in, "endpoints": {"api": fake.url}}
    body.update(more)
    return Answer(200, {"date": email.utils.formatdate(fake.now(), usegmt=True)},
                  {name: value for name, value in body.items() if value is not None})


def plain_token(fake: FakeUpstream) -> str:
    """A good token that names no host itself."""
    fake.tokens["tid=7;st=dotcom:0f"] = Token(fake.url, "ghu_fake", fake.now() + 1800, 10 ** 9)
    return "tid=7;st=dotcom:0f"


class ReadTokenTest(GitHubCase):
    """What is made of the fields of an exchange."""

    def fetch(self, date: bool = False, **more: Any) -> cp.CopilotToken:
        answer = dated_exchange(self.fake, **more)
        if not date:
            answer.headers.clear()
        self.fake.script(EXCHANGE, answer)
        return cp.run(self.github.fetch_copilot_token("ghu_fake"))   # type: ignore[no-any-return]

    def test_refresh_in_is_clamped(self) -> None:
        for given, due in ((1500, 1440), (None, 1440), (0, 1440), (90, 60), (1, 60), (-100, 60),
                           (10 ** 9, 86400), ("soon", 1440), (True, 1440), ([], 1440)):
            with self.subTest(refresh_in=given):
                self.assertEqual(self.fetch(refresh_in=given).refresh_s, due)

    def test_a_token_never_dies_before_it_is_due(self) -> None:
        for given in (1500, None, 0, 1, 30, -1, -100, -10 ** 9, 10 ** 9):
            with self.subTest(refresh_in=given):
                token = self.fetch(refresh_in=given)
                self.assertGreaterEqual(token.lifetime_s, token.refresh_s)

    def test_the_lifetime_is_reckoned_by_the_services_own_clock(self) -> None:
        for offset in (0, 9 * HOUR_S, -9 * HOUR_S):
            self.fake.clock_offset_s = offset
            token = self.fetch(date=True, refresh_in=1500)
            self.assertAlmostEqual(token.lifetime_s, 1800, delta=2)

    def test_an_expiry_in_milliseconds_is_understood(self) -> None:
        for factor in (1, 1000):
            expires = (int(time.time()) + 1200) * factor
            token = self.fetch(date=True, expires_at=expires, refresh_in=1000)
            self.assertAlmostEqual(token.lifetime_s, 1200, delta=2)

    def test_an_expiry_that_makes_no_sense_is_ignored(self) -> None:
        for expires in (None, 0, -5, "x", [], 10 ** 30, 1):
            with self.subTest(expires_at=expires):
                token = self.fetch(date=True, expires_at=expires)
                self.assertGreaterEqual(token.lifetime_s, token.refresh_s)

    def test_the_host_comes_from_endpoints_api(self) -> None:
        token = self.fetch(endpoints={"api": "https://api.business.githubcopilot.com/"})
        self.assertEqual(token.api_url, "https://api.business.githubcopilot.com")

    def test_the_host_falls_back_to_proxy_ep_with_its_prefix_replaced(self) -> None:
        for endpoints in (None, {}, {"api": None}, {"proxy": "https://x.githubcopilot.com"}, 7):
            with self.subTest(endpoints=endpoints):
                token = self.fetch(endpoints=endpoints, token=(
                    "tid=1;exp=2;proxy-ep=proxy.enterprise.githubcopilot.com;st=dotcom:0f=ab"))
                self.assertEqual(token.api_url, "https://api.enterprise.githubcopilot.com")

    def test_a_strange_proxy_ep_is_not_trusted(self) -> None:
        for host in ("proxy.evil.example", "evil.example", "proxy.", "proxy.evil.example/x"):
            token = self.fetch(endpoints=None, token="tid=1;proxy-ep=%s:0f" % host)
            self.assertEqual(token.api_url, self.fake.url)

    def test_an_api_host_of_a_stranger_is_ignored(self) -> None:
        for url in ("https://evil.example", "http://api.githubcopilot.com", "//evil.example",
                    "https://api.githubcopilot.com.evil.example", 5, {"a": 1}):
            with self.subTest(url=url):
                self.assertEqual(self.fetch(endpoints={"api": url},
                                            token="tid=1:0f").api_url, self.fake.url)

    def test_copilot_url_wins_over_everything(self) -> None:
        settings = cp.Settings(github_url=self.fake.url,
                               copilot_url="https://relay.example").check()
        github = cp.GitHub(settings, self.upstream)
        token = cp.run(github.fetch_copilot_token("ghu_fake"))
        self.assertEqual(token.api_url, "https://relay.example")

    def test_tokens_do_not_show_in_a_repr(self) -> None:
        token = self.fetch()
        self.assertNotIn(token.value, repr(token))


class FailedRefreshTest(ClockCase):
    """The exchange does not answer."""

    settings = {"token_retry_s": (30.0, 60.0)}

    def test_the_old_token_serves_until_it_is_dead_then_errors_come(self) -> None:
        self.warm_up()
        self.fake.exchange_mode = "unavailable"
        self.clock.monotonic_offset_s = 1500          # due, not dead
        self.assertEqual([self.ask().status for _ in range(5)], [200] * 5)
        tries = self.fake.count(EXCHANGE)
        self.assertEqual(tries, 2)
        self.clock.monotonic_offset_s = 2000          # dead
        answers = [self.ask() for _ in range(5)]
        self.assertLessEqual({answer.status for answer in answers}, {502, 503})
        self.assertIn("503", answers[0].json["error"]["message"])
        self.assertEqual(self.fake.count(EXCHANGE), tries)      # spaced: no try yet

    def test_it_recovers_when_the_exchange_does(self) -> None:
        quick = self.enter(Proxy(self.fake, clock=self.clock, token_retry_s=(0.01,)))
        self.assertEqual(quick.post("/v1/chat/completions", chat("hi")).status, 200)
        self.fake.exchange_mode = "unavailable"
        self.clock.monotonic_offset_s = 2000
        self.assertEqual(quick.post("/v1/chat/completions", chat("hi")).status // 100, 5)
        self.fake.exchange_mode = "ok"
        wait_until(lambda: quick.post("/v1/chat/completions", chat("hi")).status == 200)

    def test_errors_come_in_the_dialect_that_was_called(self) -> None:
        self.warm_up()
        self.fake.exchange_mode = "unavailable"
        self.clock.monotonic_offset_s = 2000
        for path, make in REQUESTS:
            answer = self.proxy.post(path, make("hi"))
            self.assertEqual(answer.json.get("type") == "error", path == "/v1/messages")
            self.assertTrue(answer.json["error"]["message"])

    def test_an_exchange_that_is_no_json_is_an_error_with_a_status(self) -> None:
        self.warm_up()
        for answer in (Answer(200, body=b"<html>portal</html>"), Answer(200, body={"x": 1}),
                       Answer(200, body=[1]), Answer(302, {"location": "https://evil.example"})):
            self.fake.script(EXCHANGE, answer)
            with self.assertRaises(cp.UpstreamError):
                cp.run(self.proxy.app.github.fetch_copilot_token("ghu_fake"))


class BackgroundTest(ClockCase):
    """The refresh thread."""

    def test_the_thread_refreshes_ahead_of_time(self) -> None:
        clock, stop = TestClock(), threading.Event()
        copilot = cp.Copilot(self.proxy.settings, self.proxy.app.upstream, cp.GitHub(
            self.proxy.settings, self.proxy.app.upstream, clock), "ghu_fake", self.proxy.app.log,
            clock)
        ages: list[float] = []
        copilot.on_token = lambda token: ages.append(clock.monotonic_offset_s)
        waits: list[float] = []

        def wait(timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            clock.monotonic_offset_s += timeout or 0.0
            if len(ages) >= 3 or len(waits) > 500:
                stop.set()
            return stop.is_set()

        with unittest.mock.patch.object(stop, "wait", wait):
            copilot.keep_fresh(stop)
        self.assertEqual(len(ages), 3)
        for earlier, later in zip(ages, ages[1:]):
            self.assertTrue(1439 <= later - earlier < 1475, ages)
        self.assertLessEqual(max(waits), 30)          # so that a slept laptop wakes into the check
        self.assertGreaterEqual(min(waits), 0.2)

    def test_it_fetches_before_the_first_call_and_has_a_name(self) -> None:
        self.assertTrue(self.fake.wait_for(lambda: self.fake.exchanges == 1))
        found = [thread for thread in threading.enumerate() if thread.name == "copilot-token"]
        self.assertTrue(found)
        self.assertTrue(all(thread.daemon for thread in found))

    def test_an_answer_of_odd_types_does_not_kill_it(self) -> None:
        wait_until(lambda: self.account.token.value)
        self.fake.revoke_tokens()
        self.fake.exchange_extra = {"refresh_in": "soon", "endpoints": ["x"], "expires_at": {},
                                    "chat_enabled": "maybe", "sku": None,
                                    "token": plain_token(self.fake)}
        self.assertEqual(self.ask().status, 200)

    def test_a_new_login_ends_the_old_ones_thread(self) -> None:
        stop = self.proxy.app.login._account_stop
        self.proxy.app.login.use("ghu_fake")
        self.assertTrue(stop.is_set())


class HostTest(ProxyCase):
    """Token and host belong together."""

    def setUp(self) -> None:
        super().setUp()
        self.other = self.enter(FakeUpstream(share=self.fake))

    def ask(self) -> Reply:
        return self.proxy.post("/v1/messages", message("hi"))

    def test_an_account_that_moves_is_followed_after_a_421(self) -> None:
        self.assertEqual(self.ask().status, 200)
        self.fake.move_to(self.other.url)
        self.assertEqual([self.ask().status for _ in range(3)], [200] * 3)
        self.assertEqual(self.fake.exchanges, 2)
        self.assertEqual(self.fake.count(MESSAGES), 2)          # one 200, one 421
        self.assertEqual(self.other.count(MESSAGES), 3)
        self.assertEqual(self.fake.last(MESSAGES).body, self.other.last(MESSAGES).body)

    def test_a_stream_follows_as_well(self) -> None:
        self.assertEqual(self.ask().status, 200)
        self.fake.move_to(self.other.url)
        answer = self.proxy.stream("/v1/messages", message("hi"))
        self.assertEqual((answer.status, answer.events[-1]["type"]), (200, "message_stop"))

    def test_twenty_calls_move_with_one_exchange(self) -> None:
        self.assertEqual(self.ask().status, 200)
        self.fake.move_to(self.other.url)
        answers = at_once(20, self.ask)
        self.assertEqual([answer.status for answer in answers], [200] * 20)
        self.assertEqual(self.fake.exchanges, 2)

    def test_one_exchange_cures_a_misdirected_token(self) -> None:
        self.fake.misdirect_until_exchanges = 2         # tokens before the second exchange
        self.assertEqual(self.ask().status, 200)
        self.assertEqual(self.fake.exchanges, 2)

    def test_a_host_that_always_refuses_is_asked_twice_not_for_ever(self) -> None:
        self.assertEqual(self.ask().status, 200)
        self.fake.misdirect_until_exchanges = 10 ** 6
        answer = self.ask()
        self.assertEqual(answer.status, 421)
        self.assertIn("Misdirected", answer.json["error"]["message"])
        self.assertEqual(self.fake.count(MESSAGES), 3)
        self.assertEqual(self.fake.exchanges, 2)

    def test_a_strangers_host_never_sees_a_token(self) -> None:
        self.assertEqual(self.ask().status, 200)
        self.fake.revoke_tokens()
        self.fake.exchange_extra = {"endpoints": {"api": "https://evil.example"},
                                    "token": plain_token(self.fake)}
        self.assertEqual(self.ask().status, 200)
        account = self.proxy.app.login.account
        assert account is not None
        self.assertEqual(account.token.value.api_url, self.fake.url)


class UnauthorisedTest(ProxyCase):
    """401 and 403 of the API: one refresh, one replay."""

    def test_a_401_is_cured_by_one_exchange_and_one_replay(self) -> None:
        for path, make in REQUESTS:
            with self.subTest(path=path):
                self.assertEqual(self.proxy.post(path, make("hi")).status, 200)
                before, calls = self.fake.exchanges, len(self.fake.requests)
                self.fake.revoke_tokens()
                self.assertEqual(self.proxy.stream(path, make("hi")).status, 200)
                self.assertEqual(self.fake.exchanges, before + 1)
                self.assertEqual(len(self.fake.requests), calls + 3)     # 401, exchange, 200

    def test_a_401_that_stays_is_passed_on_after_one_replay(self) -> None:
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("hi")).status, 200)
        refusal = {"error": {"message": "no seat", "code": "unauthorized"}}
        self.fake.script(CHAT, *[Answer(401, body=refusal) for _ in range(3)])
        answer = self.proxy.post("/v1/chat/completions", chat("hi"))
        self.assertEqual((answer.status, answer.json["error"]["message"]), (401, "no seat"))
        self.assertEqual(self.fake.count(CHAT), 3)
        self.assertEqual(self.fake.exchanges, 2)

    def test_a_401_about_an_input_item_is_not_about_the_token(self) -> None:
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("hi")).status, 200)
        text = "input item ID does not belong to this connection"
        self.fake.script(CHAT, Answer(401, body={"error": {"message": text}}))
        answer = self.proxy.post("/v1/chat/completions", chat("hi"))
        self.assertEqual((answer.status, self.fake.exchanges), (401, 1))
        self.assertIn(text, answer.json["error"]["message"])

    def test_codes_of_403_that_mean_the_token_are_cured(self) -> None:
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("hi")).status, 200)
        for at, code in enumerate(("expired_token", "invalid_token", "token_expired"), 2):
            body = {"error": {"message": "no", "code": code}}
            self.fake.script(CHAT, Answer(403, body=body))
            self.assertEqual(self.proxy.post("/v1/chat/completions", chat("hi")).status, 200)
            self.assertEqual(self.fake.exchanges, at)

    def test_an_opaque_403_is_tried_once_then_left_alone_for_a_minute(self) -> None:
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("hi")).status, 200)
        self.fake.script(CHAT, *[Answer(403, body="Forbidden") for _ in range(6)])
        statuses = [self.proxy.post("/v1/chat/completions", chat("hi")).status for _ in range(4)]
        self.assertEqual(statuses, [403] * 4)
        self.assertEqual(self.fake.exchanges, 2)

    def test_another_403_is_not_about_the_token(self) -> None:
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("hi")).status, 200)
        self.fake.script(CHAT, Answer(403, body={"error": {"message": "policy", "code": "x"}}))
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("hi")).status, 403)
        self.assertEqual(self.fake.exchanges, 1)


class TwoProcessesTest(ProxyCase):
    """Two servers with one data folder."""

    def test_both_serve_and_no_copilot_token_is_written(self) -> None:
        self.proxy.app.login.file.save("ghu_fake")
        other = self.enter(Proxy(self.fake, login=False, data_dir=self.proxy.data_dir))
        for proxy in (self.proxy, other):
            self.assertEqual(proxy.post("/v1/chat/completions", chat("hi")).status, 200)
        self.fake.revoke_tokens()
        for proxy in (self.proxy, other):
            self.assertEqual(proxy.post("/v1/chat/completions", chat("hi")).status, 200)
        self.assertEqual(self.fake.exchanges, 4)
        self.assertEqual(self.fake.device.issued, 0)
        found = cp.os.listdir(self.proxy.data_dir)
        self.assertEqual(len(found), 1)
        with open(cp.os.path.join(self.proxy.data_dir, found[0]), "rb") as file:
            self.assertEqual(file.read(), b"ghu_fake")


class DirectModeTest(unittest.TestCase):
    """No exchange: the GitHub token itself is the bearer."""

    def setUp(self) -> None:
        self.fake = FakeUpstream(direct=True).start()
        self.addCleanup(self.fake.close)

    def proxy(self, **settings: Any) -> Proxy:
        proxy = Proxy(self.fake, **settings)
        proxy.__enter__()
        self.addCleanup(proxy.__exit__)
        return proxy

    def test_everything_works_with_the_github_token(self) -> None:
        proxy = self.proxy()
        for path, make in REQUESTS:
            self.assertEqual(proxy.post(path, make("hi")).status, 200)
        self.assertEqual(proxy.get("/usage").json["login"], "octocat")
        self.assertEqual(proxy.get("/v1/models").status, 200)
        self.assertEqual(self.fake.last(CHAT).headers["authorization"], "Bearer ghu_fake")
        self.assertEqual(self.fake.count(EXCHANGE), 1)

    def test_the_log_says_so_without_the_token(self) -> None:
        proxy = self.proxy()
        self.assertEqual(proxy.post("/v1/chat/completions", chat("hi")).status, 200)
        self.assertIn("direct mode", proxy.log_text())
        self.assertNotIn("ghu_fake", proxy.log_text())

    def test_a_host_outside_the_list_does_not_get_the_github_token(self) -> None:
        self.fake.usage_extra = {"endpoints": {"api": "https://evil.example"}}
        proxy = self.proxy()
        self.assertEqual(proxy.post("/v1/chat/completions", chat("hi")).status, 200)

    def test_the_exchanges_own_error_is_told_when_both_ways_fail(self) -> None:
        for extra in ({"endpoints": None}, {"endpoints": {}}):
            self.fake.usage_extra = extra
            answer = self.proxy().post("/v1/chat/completions", chat("hi"))
            self.assertEqual(answer.status, 403)
            self.assertIn("404", answer.json["error"]["message"])
            self.assertIn("copilot_proxy.py auth", answer.json["error"]["message"])

    def test_400_and_403_lead_there_too_but_not_with_a_reason_of_their_own(self) -> None:
        for status, leads in ((400, True), (403, True), (404, True), (500, False), (451, False)):
            with self.subTest(status=status):
                self.fake.script(EXCHANGE, Answer(status, body={"message": "not here"}))
                before = self.fake.count(USAGE)
                self.proxy().post("/v1/chat/completions", chat("hi"))
                self.assertEqual(self.fake.count(USAGE) > before, leads)


class RefusedExchangeTest(ProxyCase):
    """What the user is told, and with which status."""

    settings = {"token_retry_s": (60.0,)}

    def setUp(self) -> None:
        self.fake = self.enter(FakeUpstream())

    def refusal(self, mode: str) -> Reply:
        self.fake.exchange_mode = mode
        self.fake.usage_extra = {"endpoints": None}
        proxy = self.enter(Proxy(self.fake, **self.settings))
        answer: Reply = proxy.post("/v1/chat/completions", chat("hi"))
        health = proxy.get("/health")
        self.assertEqual(health.status, 200)
        self.assertTrue(health.json["token"]["problem"])
        return answer

    def test_no_subscription_shows_githubs_text_and_the_link(self) -> None:
        answer = self.refusal("no_subscription")
        self.assertEqual(answer.status, 403)
        text = answer.json["error"]["message"]
        self.assertIn("No access to GitHub Copilot found", text)
        self.assertIn("logged in as octocat", text)
        self.assertIn("https://github.com/github-copilot/signup", text)
        self.assertNotIn("not accessible by integration", text)
        self.assertEqual(self.fake.count(USAGE), 0)

    def test_too_many_calls_are_not_taken_for_no_subscription(self) -> None:
        answer = self.refusal("rate_limit")
        self.assertEqual(answer.status, 429)
        self.assertIn("API rate limit exceeded", answer.json["error"]["message"])
        self.assertEqual(answer.json["error"]["type"], "rate_limit_error")
        self.assertEqual(self.fake.count(USAGE), 0)

    def test_forbidden_keeps_the_status_and_the_words(self) -> None:
        answer = self.refusal("forbidden")
        self.assertEqual(answer.status, 403)
        self.assertIn("Resource not accessible by integration", answer.json["error"]["message"])

    def test_not_found_says_to_log_in_again(self) -> None:
        answer = self.refusal("not_found")
        self.assertEqual(answer.status, 403)
        self.assertIn("copilot_proxy.py auth", answer.json["error"]["message"])

    def test_unavailable_is_a_passing_fault_without_html(self) -> None:
        answer = self.refusal("unavailable")
        self.assertIn(answer.status, (502, 503))
        self.assertIn("503", answer.json["error"]["message"])
        self.assertNotIn("<html>", answer.json["error"]["message"])

    def test_refused_exchanges_are_not_hammered(self) -> None:
        self.fake.exchange_mode = "no_subscription"
        proxy = self.enter(Proxy(self.fake, **self.settings))
        for _ in range(5):
            self.assertEqual(proxy.post("/v1/chat/completions", chat("hi")).status, 403)
        self.assertEqual(self.fake.count(EXCHANGE), 1)

    def test_a_hint_when_to_come_back_is_passed_on(self) -> None:
        limit = {"message": "API rate limit exceeded for user ID 1."}
        self.fake.script(EXCHANGE, Answer(403, {"retry-after": "120"}, limit))
        proxy = self.enter(Proxy(self.fake, **self.settings))
        answer = proxy.post("/v1/messages", message("hi"))
        self.assertEqual((answer.status, answer.headers.get("retry-after")), (429, "120"))


class CatalogueTest(ProxyCase):
    """The list of models."""

    def ask(self, model: str = "gpt-4.1") -> Reply:
        return self.proxy.post("/v1/chat/completions", chat("hi", model))

    def test_it_is_fetched_once_for_many_calls(self) -> None:
        for _ in range(5):
            self.assertEqual(self.ask().status, 200)
        self.assertEqual(self.proxy.get("/v1/models").status, 200)
        self.assertEqual(self.fake.model_fetches, 1)

    def test_it_is_fetched_again_when_it_is_old(self) -> None:
        proxy = self.enter(Proxy(self.fake, catalogue_age_s=0.0))
        for _ in range(3):
            self.assertEqual(proxy.get("/v1/models").status, 200)
        self.assertEqual(self.fake.model_fetches, 3)

    def test_the_old_one_serves_when_a_new_one_cannot_be_had(self) -> None:
        proxy = self.enter(Proxy(self.fake, catalogue_age_s=0.0, token_retry_s=(60.0,)))
        self.assertEqual(proxy.get("/v1/models").status, 200)
        self.fake.script(MODELS, *[Answer(503, body="<html>") for _ in range(9)])
        for _ in range(4):
            self.assertEqual(proxy.post("/v1/chat/completions", chat("hi")).status, 200)
        self.assertLessEqual(self.fake.count(MODELS), 3)        # one retry of the hiccup, then rest

    def test_without_any_list_the_error_is_the_upstreams(self) -> None:
        self.fake.script(MODELS, *[Answer(503, body="<html>") for _ in range(2)])
        answer = self.ask()
        self.assertEqual(answer.status, 503)
        wait_until(lambda: self.ask().status == 200)

    def test_an_unknown_name_refreshes_a_list_that_is_a_minute_old_once(self) -> None:
        self.assertEqual(self.ask("gpt-9-wonder").status, 404)
        self.assertEqual(self.fake.model_fetches, 1)            # younger than a minute
        self.fake.models.append(make_model("wonder-9"))
        with unittest.mock.patch.object(cp, "CATALOGUE_RETRY_S", 0.0):
            self.assertEqual(self.ask("wonder-9").status, 200)
        self.assertEqual(self.fake.model_fetches, 2)
        for _ in range(5):
            self.assertEqual(self.ask("wonder-10-nope").status, 404)
        self.assertEqual(self.fake.model_fetches, 2)

    def test_unknown_names_do_not_hammer_a_list_that_fails(self) -> None:
        proxy = self.enter(Proxy(self.fake, token_retry_s=(60.0,)))
        self.assertEqual(proxy.get("/v1/models").status, 200)
        before = self.fake.count(MODELS)
        self.fake.script(MODELS, *[Answer(404, body="gone") for _ in range(50)])
        with unittest.mock.patch.object(cp, "CATALOGUE_RETRY_S", 0.0):
            for _ in range(5):
                answer = proxy.post("/v1/chat/completions", chat("hi", "wonder-9"))
                self.assertEqual(answer.status, 404)
        self.assertLessEqual(self.fake.count(MODELS) - before, 2)

    def test_a_404_names_the_three_nearest_and_sends_nothing(self) -> None:
        answer = self.ask("gpt-4.1-turbo-nope")
        self.assertEqual((answer.status, answer.json["error"]["code"]), (404, "model_not_found"))
        self.assertIn("gpt-4.1", answer.json["error"]["message"])
        self.assertEqual(self.fake.count(CHAT), 0)

    def test_the_notice_about_billing_is_answered_with_the_command_lines_identity(self) -> None:
        self.fake.billing_notice = True
        self.assertEqual(self.proxy.get("/v1/models").status, 200)
        asked = [record for record in self.fake.requests if record.path == MODELS]
        self.assertEqual([record.headers["copilot-integration-id"] for record in asked],
                         ["vscode-chat", "copilot-developer-cli"])
        self.assertEqual(asked[-1].headers["authorization"], "Bearer ghu_fake")
        self.assertEqual(self.ask().status, 200)
        self.assertTrue(self.fake.last(CHAT).headers["authorization"].startswith("Bearer tid="))

    def test_when_both_identities_are_refused_the_first_refusal_is_told(self) -> None:
        notice = {"error": {"code": "forbidden", "message": "moved to usage-based billing"}}
        self.fake.script(MODELS, Answer(403, body=notice), Answer(401, body="no"))
        answer = self.ask()
        self.assertEqual(answer.status, 403)
        self.assertIn("usage-based billing", answer.json["error"]["message"])

    def test_a_list_of_nonsense_is_an_error_not_a_crash(self) -> None:
        for body in (b"<html>", [1], {"data": 5}, {"data": [None, 5, {"id": 7}, {}]}, {}):
            with self.subTest(body=body):
                self.fake.script(MODELS, Answer(200, body=body))
                proxy = self.enter(Proxy(self.fake))
                answer = proxy.post("/v1/chat/completions", chat("hi"))
                self.assertIn(answer.status, (404, 502), answer)


class RefreshedTest(unittest.TestCase):
    """The law, without a network."""

    def setUp(self) -> None:
        self.fetches = 0
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.due: set[Any] = set()
        self.dead: set[Any] = set()

    async def fetch(self) -> str:
        self.fetches += 1
        number = self.fetches
        self.gate.wait(10)
        if self.error:
            raise self.error
        return "value %d" % number

    def make(self, *pauses_s: float) -> cp.RefreshingValue:
        return cp.RefreshingValue(self.fetch, lambda value: value in self.due | self.dead,
                            lambda value: value in self.dead, pauses_s or (0.0,))

    def test_many_threads_make_one_fetch_and_share_its_value(self) -> None:
        value = self.make()
        self.gate.clear()
        threading.Thread(target=lambda: (wait_until(lambda: self.fetches), self.gate.set()),
                         daemon=True).start()
        self.assertEqual(at_once(50, lambda: cp.run(value.get())), ["value 1"] * 50)
        self.assertEqual(self.fetches, 1)

    def test_many_threads_share_one_failure(self) -> None:
        value = self.make(60.0)
        self.error = cp.UpstreamError("down")
        results = at_once(50, lambda: cp.run(value.get()))
        self.assertEqual({str(result) for result in results}, {"down"})
        self.assertEqual(self.fetches, 1)

    def test_a_due_value_is_given_out_while_it_is_fetched(self) -> None:
        value = self.make()
        self.assertEqual(cp.run(value.get()), "value 1")
        self.due.add("value 1")
        self.gate.clear()
        fetcher = threading.Thread(target=lambda: cp.run(value.get()))
        fetcher.start()
        wait_until(lambda: self.fetches == 2)
        self.assertEqual(at_once(10, lambda: cp.run(value.get())), ["value 1"] * 10)
        self.gate.set()
        fetcher.join(5)
        self.assertEqual((cp.run(value.get()), self.fetches), ("value 2", 2))

    def test_a_dead_value_is_never_given_out(self) -> None:
        value = self.make()
        self.assertEqual(cp.run(value.get()), "value 1")
        self.dead.add("value 1")
        self.assertEqual(at_once(20, lambda: cp.run(value.get())), ["value 2"] * 20)
        self.assertEqual(self.fetches, 2)

    def test_a_bad_value_is_replaced_once_for_all_who_complain(self) -> None:
        value = self.make()
        bad = cp.run(value.get())
        self.assertEqual(at_once(20, lambda: cp.run(value.get(bad=bad))), ["value 2"] * 20)
        self.assertEqual(self.fetches, 2)

    def test_a_bad_value_is_not_given_back_when_the_fetch_fails(self) -> None:
        value = self.make(60.0)
        bad = cp.run(value.get())
        self.error = cp.UpstreamError("down")
        with self.assertRaisesRegex(cp.UpstreamError, "down"):
            cp.run(value.get(bad=bad))
        self.assertEqual(cp.run(value.get()), bad)                      # others may still use it

    def test_a_failed_refresh_keeps_the_value_and_spaces_the_tries(self) -> None:
        value = self.make(60.0)
        self.assertEqual(cp.run(value.get()), "value 1")
        self.due.add("value 1")
        self.error = cp.UpstreamError("down")
        self.assertEqual([cp.run(value.get()) for _ in range(10)], ["value 1"] * 10)
        self.assertEqual(self.fetches, 2)
        self.assertEqual(str(value.error), "down")

    def test_pauses_grow_and_the_last_one_repeats(self) -> None:
        value = self.make(1.0, 5.0, 15.0)
        self.error = cp.UpstreamError("down")
        now = [1000.0]
        begun = []
        with unittest.mock.patch.object(cp.time, "monotonic", lambda: now[0]):
            while len(begun) < 6:
                before = self.fetches
                with self.assertRaises(cp.UpstreamError):
                    cp.run(value.get())
                if self.fetches > before:
                    begun.append(now[0])
                now[0] += 0.5
        gaps = [later - earlier for earlier, later in zip(begun, begun[1:])]
        self.assertEqual(gaps, [1.0, 5.0, 15.0, 15.0, 15.0])

    def test_success_forgets_the_failures(self) -> None:
        value = self.make(0.0, 60.0)
        self.error = cp.UpstreamError("down")
        with self.assertRaises(cp.UpstreamError):
            cp.run(value.get())
        self.error = None
        self.assertEqual(cp.run(value.get()), "value 2")
        self.assertIsNone(value.error)
        self.dead.add("value 2")
        self.error = cp.UpstreamError("down")
        with self.assertRaises(cp.UpstreamError):
            cp.run(value.get())
        self.error = None
        self.assertEqual(cp.run(value.get()), "value 4")        # the first pause again: none

    def test_a_fetch_that_crashes_does_not_lock_the_others_out(self) -> None:
        value = self.make(0.0)
        self.error = RuntimeError("a bug")
        with self.assertRaises(RuntimeError):
            cp.run(value.get())
        self.error = None
        self.assertEqual(cp.run(value.get()), "value 2")

    def test_value_does_not_fetch(self) -> None:
        value = self.make()
        self.assertIsNone(value.value)
        self.assertEqual(self.fetches, 0)


class ModelListTest(ProxyCase):
    def test_a_slow_list_keeps_no_other_request_waiting(self) -> None:
        account = wait_until(lambda: self.proxy.app.login.account)
        for path in ("/v1/models", "/v1/models/gpt-4.1"):
            account.catalogue.value = None
            self.fake.script("/models", Answer(status=0, hold=True))
            getter = threading.Thread(target=self.proxy.get, args=(path,))
            getter.start()
            self.assertTrue(self.fake.wait_for(lambda: self.fake.holding), path)
            self.assertEqual(self.proxy.get("/stats").status, 200)
            self.fake.release()
            getter.join()


if __name__ == "__main__":
    unittest.main()
