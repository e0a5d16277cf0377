"""Login: the device flow, starting without one, the login file, import, other hosts."""
from __future__ import annotations

import dataclasses
import os
import stat
import tempfile
import threading
import time
import unittest
import unittest.mock
from typing import Any, Callable

from support import (REQUESTS, Command, Proxy, ProxyCase, Reply, chat, clean_environment, run_main,
                     wait_until)
import copilot_proxy as cp
from fake_upstream import (CHAT, DEVICE_CODE, DEVICE_POLL, EXCHANGE, USAGE, USER, Answer,
                           FakeUpstream)
from cases import FolderCase, GitHubCase

POSIX = os.name == "posix"
CODE_ANSWER = {"device_code": "d0", "user_code": "WDJB-MJHT", "expires_in": 900, "interval": 0,
               "verification_uri": "https://github.com/login/device"}


class NoWait(threading.Event):
    """A stop event whose waits are noted and take no time."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        return self.is_set()


class RealWait(NoWait):
    """The same, but the time passes."""

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        return threading.Event.wait(self, timeout)


def ask_while_a_code_is_fetched(case: ProxyCase) -> Reply:
    """The answer to a request that comes before GitHub has named a code."""
    case.fake.script(DEVICE_CODE, Answer(0, hold=True))
    answers: list[Reply] = []
    caller = threading.Thread(target=lambda: answers.append(
    case.proxy.post("/v1/chat/completions", chat("hi"))))
    caller.start()
    case.assertTrue(case.fake.wait_for(lambda: case.fake.holding))
    case.fake.release()
    caller.join()
    return answers[0]


class FlowCase(GitHubCase):
    """A fake GitHub and one login against it."""

    def setUp(self) -> None:
        super().setUp()
        self.stop: NoWait = NoWait()
        self.codes: list[cp.DeviceCode] = []

    def tearDown(self) -> None:
        self.assertEqual(self.fake.crashes, [])

    def outcomes(self, *names: str) -> None:
        self.fake.device.outcomes.clear()
        self.fake.device.outcomes.extend(names)

    def login(self, margin_s: float = 1.0) -> cp.DeviceLogin:
        return cp.DeviceLogin(self.github, margin_s, self.stop, self.codes.append)


class DeviceFlowTest(FlowCase):
    """PROTOCOL: sleep, ask, and what each answer means."""

    def test_it_sleeps_interval_and_margin_before_it_asks(self) -> None:
        self.fake.device.interval = 5
        self.outcomes("pending", "pending")
        first_polls: list[int] = []
        self.stop.wait = self.noting(first_polls)       # type: ignore[method-assign]
        self.assertEqual(self.login().run(), "ghu_fake")
        self.assertEqual(self.stop.waits, [6.0, 6.0, 6.0])
        self.assertEqual(first_polls, [0, 1, 2])        # no poll before the first sleep

    def noting(self, polls: list[int]) -> Callable[..., bool]:
        def wait(timeout: float | None = None) -> bool:
            polls.append(self.fake.count(DEVICE_POLL))
            return NoWait.wait(self.stop, timeout)
        return wait

    def test_the_default_margin_is_a_second(self) -> None:
        self.assertEqual(cp.Settings().poll_margin_s, 1.0)

    def test_it_sends_client_id_scope_and_grant_as_json(self) -> None:
        self.login().run()
        asked, polled = self.fake.last(DEVICE_CODE), self.fake.last(DEVICE_POLL)
        self.assertEqual(asked.json, {"client_id": cp.CLIENT_ID, "scope": "read:user"})
        self.assertEqual(polled.json["grant_type"],
                         "urn:ietf:params:oauth:grant-type:device_code")
        self.assertEqual(polled.json["client_id"], cp.CLIENT_ID)
        for record in (asked, polled):
            self.assertEqual(record.headers["accept"], "application/json")
            self.assertNotIn("authorization", record.headers)

    def test_polling_with_the_margin_never_makes_github_slow_down(self) -> None:
        self.fake.device.interval, self.fake.device.strict_interval = 0.02, True
        self.fake.device.slow_down_step = 1000
        self.outcomes("pending", "pending", "pending")
        self.stop = RealWait()
        self.assertEqual(self.login(0.01).run(), "ghu_fake")
        self.assertEqual(self.fake.count(DEVICE_POLL), 4)
        self.assertLess(max(self.stop.waits), 1)

    def test_slow_down_lengthens_the_interval_for_good(self) -> None:
        self.outcomes("slow_down", "pending", "slow_down", "pending")
        self.assertEqual(self.login().run(), "ghu_fake")
        self.assertEqual(self.stop.waits, [1.0, 6.0, 6.0, 11.0, 11.0])

    def test_a_larger_interval_in_slow_down_wins(self) -> None:
        self.fake.device.slow_down_step = 30
        self.outcomes("slow_down", "pending")
        self.assertEqual(self.login().run(), "ghu_fake")
        self.assertEqual(self.stop.waits, [1.0, 31.0, 31.0])

    def test_a_smaller_interval_in_slow_down_does_not_shorten(self) -> None:
        self.fake.device.interval, self.fake.device.slow_down_step = 9, -8
        self.outcomes("slow_down", "pending")
        self.assertEqual(self.login().run(), "ghu_fake")
        self.assertEqual(self.stop.waits, [10.0, 15.0, 15.0])

    def test_an_expired_code_is_followed_by_a_new_one(self) -> None:
        self.outcomes("pending", "expired", "granted")
        self.assertEqual(self.login().run(), "ghu_fake")
        self.assertEqual([code.user_code for code in self.codes], ["FAKE-0001", "FAKE-0002"])

    def test_a_code_is_given_up_at_its_own_end_even_if_github_never_says_so(self) -> None:
        self.fake.device.expires_in = 1
        self.stop = RealWait()
        self.stop.wait = self.expiring()                # type: ignore[method-assign]
        self.assertEqual(self.login(0.0).run(), "ghu_fake")
        self.assertEqual(len(self.codes), 2)

    def expiring(self) -> Callable[..., bool]:
        """Waits that take no time; the first code's life is over after the second of them."""
        now = [time.monotonic()]
        patch = unittest.mock.patch.object(cp.time, "monotonic", lambda: now[0])
        patch.start()
        self.addCleanup(patch.stop)
        self.outcomes(*["pending"] * 2)

        def wait(timeout: float | None = None) -> bool:
            now[0] += 0.6
            return False
        return wait

    def test_denied_says_so_and_ends(self) -> None:
        self.outcomes("denied")
        with self.assertRaisesRegex(cp.AuthError, "cancelled"):
            self.login().run()
        self.assertEqual(self.fake.count(DEVICE_POLL), 1)

    def test_network_errors_and_error_pages_in_between_do_not_abort(self) -> None:
        self.outcomes("network", "html", "pending", "html", "network")
        self.assertEqual(self.login().run(), "ghu_fake")
        self.assertEqual(self.fake.device.issued, 1)
        self.assertEqual(set(self.stop.waits), {1.0})

    def test_a_failing_github_that_answers_json_does_not_abort(self) -> None:
        self.fake.script(DEVICE_POLL, Answer(503, body={"error": "service_unavailable"}),
                         Answer(502, body={"message": "Server Error"}),
                         Answer(200, body=["odd"]), Answer(200, body=b"not json"))
        self.assertEqual(self.login().run(), "ghu_fake")
        self.assertEqual(self.fake.device.issued, 1)

    def test_a_configuration_fault_ends_with_githubs_own_words(self) -> None:
        self.outcomes("device_flow_disabled")
        with self.assertRaisesRegex(cp.AuthError, "fake: device_flow_disabled"):
            self.login().run()

    def test_a_wrong_client_id_is_reported_with_the_description(self) -> None:
        self.fake.script(DEVICE_POLL, Answer(200, body={
            "error": "incorrect_client_credentials",
            "error_description": "The client_id passed is incorrect."}))
        with self.assertRaisesRegex(cp.AuthError, "The client_id passed is incorrect"):
            self.login().run()

    def test_a_refused_request_for_a_code_says_why(self) -> None:
        self.fake.script(DEVICE_CODE, Answer(200, body={
            "error": "unauthorized_client", "error_description": "not for this app"}))
        with self.assertRaisesRegex(cp.ProxyError, "not for this app"):
            self.login().run()

    def test_numbers_that_are_none_do_not_crash_the_login(self) -> None:
        odd: tuple[Any, ...] = (None, "5", "soon", -1, [])
        for value in odd:
            with self.subTest(interval=value):
                self.stop = NoWait()
                self.outcomes()
                self.fake.device.codes["d0"] = cp.CLIENT_ID
                self.fake.script(DEVICE_CODE, Answer(200, body=dict(CODE_ANSWER, interval=value)))
                self.assertEqual(self.login().run(), "ghu_fake")
                self.assertGreaterEqual(min(self.stop.waits), 1.0)

    def test_a_stop_ends_the_login_without_a_token(self) -> None:
        self.stop.set()
        self.assertEqual(self.login().run(), "")
        self.stop = RealWait()
        self.fake.device.interval = 3600
        login = self.login()
        thread = threading.Thread(target=login.run, daemon=True)
        thread.start()
        wait_until(lambda: self.codes)
        self.stop.set()
        thread.join(5)
        self.assertFalse(thread.is_alive())


class WrongTokenTest(FlowCase):
    """Tokens that can never work are refused before any call."""

    def test_personal_access_tokens_are_refused_before_any_call(self) -> None:
        for token in ("ghp_0123456789abcdef", " ghp_0123456789\n"):
            with self.subTest(token=token):
                with self.assertRaisesRegex(cp.AuthError, "personal access token.*auth"):
                    cp.check_github_token(token)
                with self.assertRaises(cp.AuthError) as caught:
                    cp.check_github_token(token)
                self.assertNotIn(token.strip(), str(caught.exception))

    def test_commands_refuse_them_before_any_call(self) -> None:
        home = tempfile.TemporaryDirectory()
        self.addCleanup(home.cleanup)
        for command in (("start", "--port", "0"), ("auth",), ("models",), ("check-usage",)):
            with self.subTest(command=command[0]):
                code, output = run_main(
                    home.name, *command, "--github-token", "ghp_0123456789abcdef",
                    "--github-url", self.fake.url, "--data-dir", home.name)
                self.assertEqual(code, 1, output)
                self.assertIn("personal access token", output)
                self.assertNotIn("ghp_0123456789abcdef", output)
                self.assertNotIn("Traceback", output)
        self.assertEqual(self.fake.requests, [])

    def test_other_nonsense_is_refused(self) -> None:
        for token in ("", "  ", "two words", "\x00", "gh\u00fc_x", "a\r\nX-Injected: 1"):
            with self.subTest(token=token), self.assertRaises(cp.AuthError):
                cp.check_github_token(token)


class StartWithoutLoginTest(ProxyCase):
    """DESIGN 6: the port opens first."""

    settings = {"login": False}

    def setUp(self) -> None:
        super().setUp()
        self.fake.device.interval = 0.05
        self.fake.device.outcomes.extend(["pending"] * 100000)

    def begin(self) -> dict[str, Any]:
        """Begin the login; /health's login part once the code is there."""
        self.proxy.app.login.begin()
        found: dict[str, Any] = wait_until(lambda: self.proxy.get("/health").json.get(
            "login", {}).get("user_code") and self.proxy.get("/health").json["login"])
        return found

    def grant(self) -> None:
        self.fake.device.outcomes.clear()
        wait_until(lambda: self.proxy.app.login.account)

    def test_health_is_200_and_says_that_a_login_is_required(self) -> None:
        answer = self.proxy.get("/health")
        self.assertEqual((answer.status, answer.json["status"]), (200, "login_required"))
        login = self.begin()
        self.assertEqual(login["user_code"], "FAKE-0001")
        self.assertEqual(login["verification_uri"], self.fake.url + "/login/device")

    def test_api_calls_get_401_in_their_dialect_with_url_and_code(self) -> None:
        self.begin()
        for path, make in REQUESTS:
            with self.subTest(path=path):
                self.check_refusal(path, self.proxy.post(path, make("hi")))
                self.check_refusal(path, self.proxy.stream(path, make("hi")))
        for path in ("/v1/models", "/v1/models/gpt-4.1", "/usage"):
            with self.subTest(path=path):
                self.check_refusal(path, self.proxy.get(path))
        self.assertEqual(self.fake.device.issued, 1)

    def check_refusal(self, path: str, answer: Reply) -> None:
        self.assertEqual(answer.status, 401, answer)
        error = answer.json["error"]
        self.assertIn("FAKE-0001", error["message"])
        self.assertIn(self.fake.url + "/login/device", error["message"])
        self.assertEqual(error["type"], "authentication_error")
        if path == "/v1/messages":
            self.assertEqual(answer.json["type"], "error")
        else:
            self.assertEqual(error["code"], "login_required")

    def test_the_first_refused_call_names_the_code_already(self) -> None:
        answer = ask_while_a_code_is_fetched(self)
        self.assertEqual(answer.status, 401)
        self.assertIn("FAKE-0001", answer.json["error"]["message"])

    def test_after_the_grant_everything_works_without_a_restart(self) -> None:
        self.begin()
        self.grant()
        for path, make in REQUESTS:
            with self.subTest(path=path):
                self.assertEqual(self.proxy.post(path, make("hi")).status, 200)
                self.assertEqual(self.proxy.stream(path, make("hi")).status, 200)
        self.assertEqual(self.proxy.get("/health").json["status"], "ok")
        self.assertEqual(self.proxy.get("/usage").status, 200)

    def test_the_login_is_kept_for_the_next_start(self) -> None:
        self.begin()
        self.grant()
        with open(self.proxy.app.login.file.path, "rb") as file:
            self.assertEqual(file.read(), b"ghu_fake")
        again = self.enter(Proxy(self.fake, login=False, data_dir=self.proxy.data_dir))
        self.assertEqual(again.post("/v1/chat/completions", chat("hi")).status, 200)

    def test_a_login_that_cannot_be_stored_is_used_all_the_same(self) -> None:
        full = unittest.mock.patch.object(cp, "write_file",
                                          side_effect=OSError(28, "No space left on device"))
        with full:
            self.begin()
            self.fake.device.outcomes.clear()
            wait_until(lambda: self.proxy.app.login.account or self.proxy.get("/health").json.get(
                "login", {}).get("problem"))
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("hi")).status, 200)
        self.assertIn("No space left", self.proxy.log_text())

    def test_no_second_code_while_the_first_is_good(self) -> None:
        self.begin()
        for _ in range(5):
            self.assertEqual(self.proxy.post("/auth/device/start", {}).status, 200)
            self.assertEqual(self.proxy.post("/v1/chat/completions", chat("hi")).status, 401)
        self.assertEqual(self.fake.device.issued, 1)

    def test_browsers_that_wait_for_a_silent_github_hold_no_thread(self) -> None:
        self.fake.script(DEVICE_CODE, Answer(hold=True, status=503))
        browsers = [threading.Thread(target=self.proxy.post, args=("/auth/device/start", {}))
                    for _ in range(2 * cp.MAX_WORKERS)]
        for browser in browsers:
            browser.start()
        accounts = self.proxy.app.accounts
        wait_until(lambda: len(accounts._logins) == len(browsers))
        done = threading.Event()
        self.proxy.server.loop.workers.put(done.set)
        self.assertTrue(done.wait(5))
        self.fake.release()
        for browser in browsers:
            browser.join(20)

    def test_a_denied_login_is_reported_and_can_be_begun_again(self) -> None:
        self.fake.device.outcomes.clear()
        self.fake.device.outcomes.extend(["denied"] + ["pending"] * 100000)
        self.proxy.app.login.begin()
        health = wait_until(lambda: self.proxy.get("/health").json["login"]["problem"])
        self.assertIn("cancelled", health)
        self.assertEqual(self.proxy.post("/auth/device/start", {}).status, 200)
        wait_until(lambda: self.proxy.get("/health").json["login"].get("user_code")
                   == "FAKE-0002")
        self.grant()
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("hi")).status, 200)

    def test_an_unreachable_github_is_reported_and_tried_again_by_a_call(self) -> None:
        self.fake.script(DEVICE_CODE, Answer(503, body="<html>Unicorn</html>"))
        self.proxy.app.login.begin()
        wait_until(lambda: self.proxy.get("/health").json["login"]["problem"])
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("hi")).status, 401)
        wait_until(lambda: self.proxy.get("/health").json["login"].get("user_code"))

    def test_a_login_of_another_process_is_found_in_the_file(self) -> None:
        self.begin()
        self.proxy.app.login.file.save("ghu_fake")
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("hi")).status, 200)
        self.assertEqual(self.proxy.get("/health").json["status"], "ok")

    def test_garbage_in_the_file_does_not_turn_the_401_into_a_500(self) -> None:
        self.begin()
        with open(self.proxy.app.login.file.path, "wb") as file:
            file.write(b"{\"not\": \"a token\"}")
        for _ in range(2):
            answer = self.proxy.post("/v1/chat/completions", chat("hi"))
            self.assertEqual(answer.status, 401, answer)

    def test_the_code_is_in_the_log_but_never_the_token(self) -> None:
        self.begin()
        self.grant()
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("hi")).status, 200)
        text = self.proxy.log_text()
        self.assertIn("FAKE-0001", text)
        self.assertNotIn("ghu_fake", text)
        self.assertNotIn("tid=", text)


class RevokedLoginTest(ProxyCase):
    """GitHub does not know the login any more while requests come in."""

    def revoke(self) -> None:
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("hi")).status, 200)
        self.fake.device.interval = 0.05
        self.fake.device.outcomes.clear()
        self.fake.device.outcomes.extend(["pending"] * 100000)
        self.fake.github_tokens.discard("ghu_fake")
        self.fake.revoke_tokens()

    def test_a_revoked_login_gives_401_and_a_code_and_a_new_login_works(self) -> None:
        self.revoke()
        answer = self.proxy.post("/v1/chat/completions", chat("hi"))
        self.assertEqual(answer.status, 401)
        self.assertEqual(answer.json["error"]["code"], "login_required")
        again = wait_until(lambda: self.answer_with_code())
        self.assertEqual(again.status, 401)
        self.assertEqual(self.proxy.get("/health").json["status"], "login_required")
        self.fake.device.token = "ghu_newer"
        self.fake.device.outcomes.clear()
        wait_until(lambda: self.proxy.app.login.account)
        for path, make in REQUESTS:
            self.assertEqual(self.proxy.post(path, make("hi")).status, 200)
        self.assertEqual(self.proxy.app.login.file.load(), "ghu_newer")

    def answer_with_code(self) -> Reply | None:
        answer = self.proxy.post("/v1/messages", {
            "model": "claude-sonnet-4.6", "max_tokens": 9,
            "messages": [{"role": "user", "content": "hi"}]})
        return answer if b"FAKE-0001" in answer.body else None

    def test_the_very_first_401_names_the_new_code(self) -> None:
        self.revoke()
        answer = ask_while_a_code_is_fetched(self)
        self.assertIn("FAKE-0001", answer.json["error"]["message"])

    def test_the_same_token_granted_again_works_again(self) -> None:
        self.revoke()
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("hi")).status, 401)
        self.fake.device.outcomes.clear()                  # grants ghu_fake
        wait_until(lambda: self.proxy.app.login.account)
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("hi")).status, 200)

    def test_a_revoked_login_is_not_deleted_but_not_used_again(self) -> None:
        self.proxy.app.login.file.save("ghu_fake")
        self.revoke()
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("hi")).status, 401)
        count = self.fake.count(EXCHANGE)
        for _ in range(5):
            self.assertEqual(self.proxy.post("/v1/chat/completions", chat("hi")).status, 401)
        self.assertEqual(self.fake.count(EXCHANGE), count)
        self.assertEqual(self.proxy.app.login.file.load(), "ghu_fake")

    def test_a_newer_login_of_another_process_is_picked_up(self) -> None:
        self.revoke()
        self.fake.github_tokens.add("ghu_other_process")
        self.proxy.app.login.file.save("ghu_other_process")
        self.proxy.post("/v1/chat/completions", chat("hi"))
        answer = self.proxy.post("/v1/chat/completions", chat("hi"))
        self.assertEqual(answer.status, 200, answer)
        self.assertEqual(self.fake.device.issued, 0)

    def test_many_calls_at_once_begin_one_login(self) -> None:
        self.revoke()
        threads = [threading.Thread(target=self.proxy.post, args=(
            "/v1/chat/completions", chat("hi"))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: self.answer_with_code())
        self.assertEqual(self.fake.device.issued, 1)

    def test_no_subscription_is_not_taken_for_a_lost_login(self) -> None:
        self.revoke()
        self.fake.github_tokens.add("ghu_fake")
        self.fake.exchange_mode = "no_subscription"
        answer = self.proxy.post("/v1/chat/completions", chat("hi"))
        self.assertEqual(answer.status, 403)
        self.assertEqual(self.fake.device.issued, 0)
        self.assertIsNotNone(self.proxy.app.login.account)


class LoginFileTest(FolderCase):
    """Where and how the login lies."""

    def test_the_place_is_shared_with_other_proxies(self) -> None:
        home = unittest.mock.patch.dict(os.environ, clean_environment(self.home))
        with home:
            data = os.path.join(self.home, "x")
            if POSIX:
                self.assertEqual(cp.default_data_dir({"XDG_DATA_HOME": data}),
                                 os.path.join(data, "copilot-proxy"))
                self.assertEqual(cp.default_data_dir({}), os.path.join(
                    self.home, ".local", "share", "copilot-proxy"))
        self.assertEqual(cp.LoginFile("d", "https://github.com").path,
                         os.path.join("d", "github_token"))

    def test_other_hosts_have_their_own_file(self) -> None:
        names = {os.path.basename(cp.LoginFile("d", url).path) for url in (
            "https://github.com", "https://octo.ghe.com", "https://Other.ghe.com",
            "https://git.example.com:8443")}
        self.assertEqual(len(names), 4)
        self.assertIn("github_token.octo.ghe.com", names)
        self.assertIn("github_token.other.ghe.com", names)
        self.assertFalse([name for name in names if "/" in name or ":" in name])

    @unittest.skipUnless(POSIX, "modes are POSIX's")
    def test_file_and_folder_are_private_whatever_the_umask(self) -> None:
        old = os.umask(0)
        self.addCleanup(os.umask, old)
        login = cp.LoginFile(self.path("new"), "https://github.com")
        login.save("ghu_made_up")
        self.assertEqual(stat.S_IMODE(os.stat(login.path).st_mode), 0o600)
        self.assertEqual(stat.S_IMODE(os.stat(self.path("new")).st_mode), 0o700)

    def test_what_is_saved_is_loaded(self) -> None:
        login = cp.LoginFile(self.home, "https://github.com")
        self.assertEqual(login.load(), "")
        login.save("ghu_made_up")
        self.assertEqual(login.load(), "ghu_made_up")
        self.assertEqual(os.listdir(self.home), ["github_token"])
        self.put(b"ghu_made_up\n", "github_token")
        self.assertEqual(login.load(), "ghu_made_up")
        self.assertTrue(login.delete())
        self.assertFalse(login.delete())
        self.assertEqual(login.load(), "")

    def test_an_empty_file_means_nobody(self) -> None:
        self.put(b"\n", "github_token")
        self.assertEqual(cp.LoginFile(self.home, "https://github.com").load(), "")
        self.assertEqual(os.listdir(self.home), ["github_token"])

    def test_a_crash_while_writing_leaves_the_old_login(self) -> None:
        login = cp.LoginFile(self.home, "https://github.com")
        login.save("ghu_old")
        for name, error in (("replace", OSError(28, "No space left on device")),
                            ("fsync", OSError(5, "Input/output error")),
                            ("replace", KeyboardInterrupt())):
            with self.subTest(failing=name), \
                    unittest.mock.patch.object(cp.os, name, side_effect=error):
                with self.assertRaises((cp.ProxyError, KeyboardInterrupt)):
                    login.save("ghu_new")
            self.assertEqual(login.load(), "ghu_old")
            self.assertEqual(os.listdir(self.home), ["github_token"])

    def test_a_folder_that_cannot_be_written_is_named_with_the_way_out(self) -> None:
        self.put(b"", "file")
        login = cp.LoginFile(self.path("file", "below"), "https://github.com")
        with self.assertRaisesRegex(cp.ConfigError, "--data-dir"):
            login.save("ghu_made_up")

    def test_garbage_is_moved_aside_and_named(self) -> None:
        for garbage in (b"two words", b"\xff\xfe\x00", b"{\"oauth_token\": \"x\"}", b"<html>"):
            with self.subTest(garbage=garbage):
                path = self.put(garbage, "github_token")
                login = cp.LoginFile(self.home, "https://github.com")
                with self.assertRaises(cp.ConfigError) as caught:
                    login.load()
                aside = [name for name in os.listdir(self.home) if name != "github_token"]
                self.assertEqual(len(aside), 1)
                self.assertIn(self.path(aside[0]), str(caught.exception))
                self.assertIn(path, str(caught.exception))
                with open(self.path(aside[0]), "rb") as file:
                    self.assertEqual(file.read(), garbage)
                self.assertEqual(login.load(), "")
                os.unlink(self.path(aside[0]))

    def test_a_second_garbage_file_does_not_overwrite_the_first(self) -> None:
        login = cp.LoginFile(self.home, "https://github.com")
        for garbage in (b"first one", b"second one"):
            self.put(garbage, "github_token")
            with self.assertRaises(cp.ConfigError):
                login.load()
        self.assertEqual(len(os.listdir(self.home)), 2)

    def test_garbage_does_not_keep_the_server_from_starting(self) -> None:
        with FakeUpstream() as fake:
            fake.device.interval = 5
            host = fake.url.split("//")[1].replace(":", "_")
            self.put(b"two words", "data", "github_token." + host)
            with Command("start", "--port", "0", "--github-url", fake.url, "--data-dir",
                         self.path("data"), home=self.home) as command:
                line = command.wait_for("held no token")
                self.assertIn(".bad-", line)
                wait_until(lambda: "FAKE-0001" in command.output()
                           or command.process.poll() is not None)
                self.assertIn("FAKE-0001", command.output())
                self.assertEqual(command.stop(), 0)


class OtherHostTest(FolderCase):
    """GHE.com and where a token may go."""

    def test_urls_of_a_tenant_are_derived_from_one_flag(self) -> None:
        settings = cp.Settings(github_url="https://octo.ghe.com/").check()
        self.assertEqual(settings.github_url, "https://octo.ghe.com")
        self.assertEqual(settings.rest_url, "https://api.octo.ghe.com")
        self.assertEqual(settings.usual_copilot_url, "https://copilot-api.octo.ghe.com")

    def test_urls_of_github_com_and_its_account_types(self) -> None:
        for kind, host in (("individual", "api.githubcopilot.com"),
                           ("business", "api.business.githubcopilot.com"),
                           ("enterprise", "api.enterprise.githubcopilot.com")):
            settings = cp.Settings(account_type=kind).check()
            self.assertEqual(settings.rest_url, "https://api.github.com")
            self.assertEqual(settings.usual_copilot_url, "https://" + host)

    def test_urls_of_a_self_hosted_server(self) -> None:
        settings = cp.Settings(github_url="https://git.example.com").check()
        self.assertEqual(settings.rest_url, "https://git.example.com/api/v3")

    def test_only_hosts_of_the_service_are_accepted_as_api_host(self) -> None:
        settings = cp.Settings().check()
        for url in ("https://api.individual.githubcopilot.com", "https://api.githubcopilot.com/",
                    "https://copilot-api.octo.ghe.com"):
            self.assertEqual(settings.accept_copilot_url(url), url.rstrip("/"))
        for bad in ("https://evil.example", "http://api.githubcopilot.com",
                    "https://evilgithubcopilot.com", "https://githubcopilot.com.evil.example",
                    "https://api.githubcopilot.com@evil.example", "http://127.0.0.1:1",
                    "ftp://api.githubcopilot.com", "https://evil.example/.githubcopilot.com",
                    "https://evil.example\\.githubcopilot.com", "https://[::1", "", None, 5, []):
            with self.subTest(url=bad):
                self.assertEqual(settings.accept_copilot_url(bad), "")

    def test_a_login_of_one_host_is_not_used_for_another(self) -> None:
        with FakeUpstream() as fake:
            self.put(b"ghu_for_github_com", "data", "github_token")
            code, output = run_main(self.home, "models", "--github-url", fake.url,
                                    "--data-dir", self.path("data"))
            self.assertEqual(code, 1)
            self.assertIn("nobody is logged in", output)
            self.assertEqual(fake.requests, [])


class AuthCommandTest(FolderCase):
    """`auth` and its flags, as a person uses them."""

    def setUp(self) -> None:
        super().setUp()
        self.fake = FakeUpstream().start()
        self.addCleanup(self.fake.close)
        host = self.fake.url.split("//")[1].replace(":", "_")
        self.stored = self.path("data", "github_token." + host)

    def run_auth(self, *args: str, **env: str) -> tuple[int, str]:
        return run_main(self.home, "auth", "--github-url", self.fake.url, "--data-dir",
                        self.path("data"), *args, **env)

    def login(self) -> str | None:
        if not os.path.exists(self.stored):
            return None
        with open(self.stored, encoding="ascii") as file:
            return file.read()

    def test_auth_prints_url_and_code_and_keeps_the_login(self) -> None:
        self.fake.device.outcomes.clear()
        merge = cp.Settings.merge                      # a second of margin passes in real life
        with unittest.mock.patch.object(cp.Settings, "merge", lambda *given: dataclasses.replace(
                merge(*given), poll_margin_s=0.01)):
            code, output = self.run_auth()
        self.assertEqual(code, 0, output)
        self.assertIn("FAKE-0001", output)
        self.assertIn(self.fake.url + "/login/device", output)
        self.assertIn("octocat", output)
        self.assertIn(self.stored, output)
        self.assertNotIn("ghu_fake", output)
        self.assertEqual(self.login(), "ghu_fake")

    def test_a_login_without_copilot_is_not_kept(self) -> None:
        self.fake.exchange_mode = "no_subscription"
        code, output = self.run_auth("--github-token", "ghu_fake")
        self.assertEqual(code, 1)
        self.assertIn("No access to GitHub Copilot found", output)
        self.assertIn("https://github.com/github-copilot/signup", output)
        self.assertIsNone(self.login())

    def test_import_takes_a_login_of_the_environment_and_says_so(self) -> None:
        for name in ("COPILOT_GITHUB_TOKEN", "GH_COPILOT_TOKEN", "GH_TOKEN", "GITHUB_TOKEN"):
            with self.subTest(variable=name):
                code, output = self.run_auth("--import", **{name: "ghu_fake"})
                self.assertEqual(code, 0, output)
                self.assertIn(name, output)
                self.assertNotIn("ghu_fake", output)
                self.assertEqual(self.login(), "ghu_fake")
                os.unlink(self.stored)

    def test_import_reads_the_files_of_editors(self) -> None:
        entry = {"user": "octocat", "oauth_token": "ghu_fake", "githubAppId": "Iv1.0"}
        other = {"github.com": {"oauth_token": "ghu_not_for_this_host"}}
        for name, key in (("apps.json", "127.0.0.1:Iv1.b507a08c87ecfe98"),
                          ("apps.json", "127.0.0.1"), ("hosts.json", "127.0.0.1")):
            with self.subTest(name=name, key=key):
                path = self.put(dict(other, **{key: entry}), ".config", "github-copilot", name)
                if not POSIX:
                    path = self.put(dict(other, **{key: entry}), "github-copilot", name)
                code, output = self.run_auth("--import")
                self.assertEqual(code, 0, output)
                self.assertIn(path, output)
                self.assertEqual(self.login(), "ghu_fake")
                os.unlink(path)
                os.unlink(self.stored)

    def test_import_leaves_personal_access_tokens_and_broken_files_alone(self) -> None:
        self.put(b"{broken", ".config", "github-copilot", "apps.json")
        self.put({"127.0.0.1": {"oauth_token": 7}, "x": None, "127.0.0.1:a": "text"},
                 ".config", "github-copilot", "hosts.json")
        code, output = self.run_auth("--import", GH_TOKEN="ghp_0123456789abcdef")
        self.assertEqual(code, 1)
        self.assertIn("personal access token", output)
        self.assertIn("no login to import", output)
        self.assertNotIn("Traceback", output)
        self.assertEqual(self.fake.requests, [])

    def test_a_login_that_github_refuses_is_not_imported(self) -> None:
        code, output = self.run_auth("--import", GH_TOKEN="ghu_revoked")
        self.assertEqual(code, 1)
        self.assertIn("Bad credentials", output)
        self.assertIsNone(self.login())

    def test_list_names_the_account_and_never_the_token(self) -> None:
        self.assertEqual(self.run_auth("--list")[1].strip(), "nobody is logged in")
        self.put(b"ghu_fake", "data", os.path.basename(self.stored))
        code, output = self.run_auth("--list")
        self.assertEqual(code, 0)
        self.assertIn("octocat", output)
        self.assertIn("127.0.0.1", output)
        self.assertNotIn("ghu_fake", output)

    def test_logout_forgets_the_login(self) -> None:
        for args in (("--logout",), ("--logout", "octocat"), ("--logout", "OctoCat")):
            with self.subTest(args=args):
                self.put(b"ghu_fake", "data", os.path.basename(self.stored))
                code, output = self.run_auth(*args)
                self.assertEqual((code, output.strip()), (0, "logged out"))
                self.assertFalse(self.login())
        self.assertEqual(self.run_auth("--logout"), (0, "nobody was logged in\n"))

    def test_logout_of_somebody_else_keeps_the_login(self) -> None:
        self.put(b"ghu_fake", "data", os.path.basename(self.stored))
        code, output = self.run_auth("--logout", "WRONGNAME")
        self.assertEqual(code, 1)
        self.assertIn("WRONGNAME", output)
        self.assertEqual(self.login(), "ghu_fake")

    def test_a_github_that_is_down_is_a_line_not_a_traceback(self) -> None:
        self.fake.script(DEVICE_CODE, Answer(drop="after"))
        code, output = self.run_auth()
        self.assertEqual(code, 1)
        self.assertTrue(output.startswith("error: "), output)
        self.assertEqual(len(output.splitlines()), 1)

    def test_a_name_that_cannot_be_fetched_does_not_stop_the_login(self) -> None:
        self.fake.script(USER, Answer(503, body="<html>"))
        code, output = self.run_auth("--github-token", "ghu_fake")
        self.assertEqual(code, 0, output)
        self.assertEqual(self.login(), "ghu_fake")
        self.assertEqual(self.fake.count(USAGE) + self.fake.count(CHAT), 0)


if __name__ == "__main__":
    unittest.main()
