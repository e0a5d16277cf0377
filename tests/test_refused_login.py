"""A login that GitHub refuses, rightly or not, and whose login yields a key (sections 15, 17)."""
from __future__ import annotations

import os
import tempfile
import unittest
import unittest.mock
from typing import Any

from support import Command, ProxyCase, Reply, chat, cp, message, second_proxy, wait_until
from fake_upstream import EXCHANGE, USAGE, Answer, FakeUpstream

KEY = "made-up-operator-key"
UNAUTHORISED = Answer(401, body={"message": "Bad credentials"})
#: every kind of call that needs the login
CALLS: tuple[tuple[str, str, Any], ...] = (
    ("POST", "/v1/chat/completions", chat("hi")),
    ("POST", "/v1/messages", message("hi")),
    ("POST", "/v1/messages/count_tokens", message("hi")),
    ("POST", "/v1/completions", {"model": chat("hi")["model"], "prompt": "hi"}),
    ("POST", "/v1/responses/compact", {"model": "gpt-5.3-codex", "input": "hi"}),
    ("POST", "/v1/embeddings", {"model": "text-embedding-3-small", "input": "hi"}),
    ("GET", "/usage", None))


class RefusalCase(ProxyCase):
    """The fake grants no new login by itself; the time between tries is short."""

    retry_s = 600.0

    def setUp(self) -> None:
        patch = unittest.mock.patch.object(cp, "LOGIN_RETRY_S", self.retry_s)
        patch.start()
        self.addCleanup(patch.stop)
        super().setUp()
        self.fake.device.interval = 0.05
        self.fake.device.outcomes.extend(["pending"] * 100000)

    def call(self, method: str, path: str, body: Any) -> Reply:
        return self.proxy.request(method, path, body)


class OneRefusalTest(RefusalCase):
    """GitHub says 401 once, and is wrong."""

    def test_one_401_at_the_exchange_loses_no_login(self) -> None:
        self.assertEqual(self.call(*CALLS[0]).status, 200)
        for method, path, body in CALLS:
            with self.subTest(path=path):
                self.fake.revoke_tokens()
                self.fake.script(USAGE if path == "/usage" else EXCHANGE, UNAUTHORISED)
                self.assertEqual(self.call(method, path, body).status, 200)
                self.assertIsNotNone(self.proxy.app.login.account)
        self.assertEqual(self.fake.device.issued, 0)

    def test_one_401_at_the_start_loses_no_login(self) -> None:
        self.fake.script(EXCHANGE, UNAUTHORISED)
        with second_proxy(self) as proxy:
            self.assertEqual(proxy.post("/v1/chat/completions", chat("hi")).status, 200)
        self.assertEqual(self.fake.device.issued, 0)


class EveryCallTest(RefusalCase):
    """GitHub means it: each kind of call notices, and a new login begins."""

    def test_every_kind_of_call_notices_a_refused_login(self) -> None:
        for method, path, body in CALLS:
            with self.subTest(path=path), second_proxy(self) as proxy:
                self.assertEqual(proxy.request(*CALLS[0]).status, 200)
                self.assertEqual(proxy.get("/v1/models").status, 200)
                issued = self.fake.device.issued
                self.fake.github_tokens.discard("ghu_fake")
                self.fake.revoke_tokens()

                reply = proxy.request(method, path, body)
                if path.endswith("count_tokens"):
                    self.assertEqual(reply.status, 200)             # an estimate, always
                else:
                    self.assertEqual(reply.status, 401, reply.body)
                    self.assertIn(b"login_required" if "messages" not in path else b"enter the "
                                  b"code", reply.body)
                wait_until(lambda: self.fake.device.issued == issued + 1)
                self.assertEqual(proxy.get("/health").json["status"], "login_required")
                self.fake.github_tokens.add("ghu_fake")

    def test_a_model_list_that_is_due_notices_it_too(self) -> None:
        with second_proxy(self, catalogue_age_s=0.0) as proxy:
            self.assertEqual(proxy.get("/v1/models").status, 200)
            self.fake.github_tokens.discard("ghu_fake")
            self.fake.revoke_tokens()
            proxy.get("/v1/models")
            wait_until(lambda: proxy.get("/health").json["status"] == "login_required")


class RetryTest(RefusalCase):
    """The same login is tried again, and a person need not be there."""

    retry_s = 0.05

    def refuse(self) -> None:
        self.assertEqual(self.call(*CALLS[0]).status, 200)
        self.fake.github_tokens.discard("ghu_fake")
        self.fake.revoke_tokens()
        self.assertEqual(self.call(*CALLS[0]).status, 401)

    def test_a_login_that_github_takes_again_serves_without_a_restart(self) -> None:
        self.refuse()
        tries = self.fake.count(EXCHANGE)
        wait_until(lambda: self.fake.count(EXCHANGE) >= tries + 2, "tried again")
        self.assertIsNone(self.proxy.app.login.account)
        self.fake.github_tokens.add("ghu_fake")
        wait_until(lambda: self.call(*CALLS[0]).status == 200)
        self.assertEqual(self.fake.device.issued, 1)

    def test_a_second_refusal_is_outlived_as_well(self) -> None:
        for _ in range(2):
            self.refuse()
            self.fake.github_tokens.add("ghu_fake")
            wait_until(lambda: self.call(*CALLS[0]).status == 200)

    def test_a_code_that_a_person_holds_stays_good_meanwhile(self) -> None:
        self.refuse()
        tries = self.fake.count(EXCHANGE)
        wait_until(lambda: self.fake.count(EXCHANGE) >= tries + 3)
        self.assertEqual(self.fake.device.issued, 1)
        self.fake.device.token = "ghu_newer"
        self.fake.device.outcomes.clear()
        wait_until(lambda: self.call(*CALLS[0]).status == 200)
        self.assertEqual(self.proxy.app.login.file.load(), "ghu_newer")

    def test_no_seat_is_looked_at_again_without_a_request(self) -> None:
        self.fake.exchange_mode = "no_subscription"
        with second_proxy(self) as proxy:
            wait_until(lambda: proxy.get("/health").json.get("token", {}).get("problem"))
            self.fake.exchange_mode = "ok"
            wait_until(lambda: proxy.get("/health").json["token"]["ready"])


class StrangerTest(RefusalCase):
    """Whoever reaches the port may begin the default login, which the owner then grants."""

    def claim(self, proxy: Any, **headers: str) -> Any:
        state = proxy.post("/auth/device/start", {}, **headers).json["state"]
        self.fake.device.outcomes.clear()
        wait_until(lambda: proxy.get("/auth/device/poll", **dict(
            headers, **{"X-Login-State": state})).json["status"] == "granted")
        replies = [proxy.post("/auth/device/claim", {"state": state}, **headers)
                   for _ in range(2)]
        return replies[0].json

    def test_a_stranger_gets_no_key_for_the_login_that_the_owner_grants(self) -> None:
        with second_proxy(self, login=False) as proxy:
            made = self.claim(proxy)
            self.assertEqual((made["login"], made["key"]), ("octocat", None))
            self.assertEqual(proxy.app.accounts.keys.all(), [])

    def test_the_operator_gets_one_and_the_log_tells_its_id_alone(self) -> None:
        with second_proxy(self, login=False, api_key=(KEY,)) as proxy:
            made = self.claim(proxy, Authorization="Bearer " + KEY)
            self.assertIn("key %s was issued to octocat" % made["key_id"], proxy.log_text())
            self.assertNotIn(made["key"], proxy.log_text())


class KeysAtStartTest(unittest.TestCase):
    def test_stored_keys_are_listed_at_the_start_and_a_new_one_is_logged(self) -> None:
        fake = FakeUpstream().start()
        self.addCleanup(fake.close)
        home_folder = tempfile.TemporaryDirectory()
        self.addCleanup(home_folder.cleanup)
        home = home_folder.name
        folder = os.path.join(home, "data")
        host = fake.url.partition("://")[2]
        keys = cp.KeyFile(os.path.join(folder, "proxy_accounts.json"), host, ())
        made = keys.add("sk-copilot-made-up", "hubot\n\x1b[31m", "ghu_hubot")
        start = ("start", "--github-url", fake.url, "--data-dir", folder, "--port", "0",
                 "--api-key", "auto")
        with Command(*start, home=home) as server:
            server.wait_for_url()
            server.stop()
            output = server.output()
        self.assertIn("key %s of hubot" % made.id, output)
        self.assertNotIn("\x1b", output)
        self.assertRegex(output, "key [0-9a-f]{8} was issued to the operator")
        self.assertNotIn("sk-copilot-made-up", output)


if __name__ == "__main__":
    unittest.main()
