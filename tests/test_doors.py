"""Who may use it: keys, accounts by browser login, limits, browsers, proxies before it, TLS."""
from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import unittest.mock
from typing import Any, Iterator

from support import (HERE, KEY, OTHER_KEY, PATHS, REQUESTS, ROOT, SLOW, Command, Proxy, ProxyCase,
                     RawClient, Reply, bearer, chat, clean_environment, cp, get, memory_bytes,
                     message, need_files, post, release, run_main, said, second_proxy, send,
                     wait_until, workers)
from fake_upstream import CHAT, DEVICE_CODE, DEVICE_POLL, EXCHANGE, MODELS, Answer, FakeUpstream
from cases import FolderCase, SharedCase

CERTIFICATE = os.path.join(HERE, "localhost.pem")        # self-signed, good for 100 years
POSIX = os.name == "posix"


class KeyTest(SharedCase):
    settings = dict(api_key=(KEY, OTHER_KEY))

    def setUp(self) -> None:
        self.proxy.app.accounts.wrong_keys = cp.MinuteLimiter(100_000)

    def test_each_header_takes_each_key(self) -> None:
        for key in (KEY, OTHER_KEY):
            for name in ("x-api-key", "api-key", "x-goog-api-key", "Authorization"):
                value = "bearer " + key if name == "Authorization" else key
                for path, make in REQUESTS:
                    with self.subTest(name=name, path=path):
                        reply = self.proxy.post(path, make("a"), **{name: value})
                        self.assertEqual(reply.status, 200, reply.body)

    def test_a_right_key_beside_a_wrong_one_is_enough(self) -> None:
        reply = self.proxy.get("/v1/models", **dict(bearer("dummy"), **{"x-api-key": KEY}))
        self.assertEqual(reply.status, 200)

    def test_everything_else_is_401_in_the_dialect_and_nothing_goes_up(self) -> None:
        self.proxy.get("/v1/models", **bearer(KEY))
        sent = self.new_sent()
        wrong: tuple[dict[str, str], ...] = (
            {}, bearer("dummy"), bearer(KEY[:-1]), bearer(KEY + "x"), bearer(KEY.upper()),
            bearer(KEY + " " + KEY), {"Authorization": KEY}, {"Authorization": "Basic " + KEY},
            {"Authorization": "Bearer"}, {"Authorization": "Bearer " + "x" * 50000},
            {"Cookie": "key=%s; api-key=%s" % (KEY, KEY)}, {"x-api-key": "\xff\xfe"},
            {"key": KEY}, {"x-api-key": KEY + ", " + KEY}, bearer("ghu_fake"), bearer("gho_other"),
            {"Proxy-Authorization": "Bearer " + KEY}, {"X-Forwarded-For": "127.0.0.1"},
            bearer(cp.KEY_PREFIX + "x" * 43))
        for headers in wrong:
            for path, make in REQUESTS:
                with self.subTest(headers=str(headers)[:60], path=path):
                    reply = self.proxy.request("POST", path + "?key=" + KEY, make("a"), headers)
                    if path == "/v1/messages":
                        self.assert_anthropic_error(reply, 401, "authentication_error")
                    else:
                        self.assert_openai_error(reply, 401, "invalid_api_key")
                    self.assertEqual(reply.headers["www-authenticate"], "Bearer")
                    self.assertNotIn(KEY.encode(), reply.body)
        self.assertEqual(sent(), [])

    def test_what_is_open_without_a_key_is_the_list_of_the_contract(self) -> None:
        opened = set()
        for path, methods in list(cp.ROUTES.items()) + [("/nowhere", {"GET": None})]:
            for method in list(methods) + ["HEAD", "OPTIONS", "PUT"]:
                asked = path.replace("*", "x")
                reply = self.proxy.request(method, asked, {} if method == "POST" else None)
                if reply.status != 401:
                    opened.add((method, path))
        self.assertEqual({pair for pair in opened if pair[0] != "OPTIONS"}, {
            (method, path) for method in ("GET", "HEAD")
            for path in ("/", "/dashboard", "/auth/device", "/health")})

    def test_health_tells_strangers_only_whether_it_works(self) -> None:
        stranger = self.proxy.get("/health").json
        self.assertEqual(set(stranger), {"status", "version", "uptime_s", "demo"})
        self.assertIn("token", self.proxy.get("/health", **bearer(KEY)).json)

    def test_the_key_never_goes_up(self) -> None:
        for name in ("x-api-key", "api-key", "x-goog-api-key", "Authorization"):
            sent = self.new_sent()
            value = "Bearer " + KEY if name == "Authorization" else KEY
            self.proxy.post("/v1/chat/completions", chat("a"), **{name: value})
            self.assertEqual(len(sent()), 1)
            self.assertNotIn(KEY, repr(sent()))

    def test_every_stored_hash_is_compared_in_constant_time(self) -> None:
        real = cp.hmac.compare_digest
        with unittest.mock.patch.object(cp.hmac, "compare_digest", side_effect=real) as compared:
            self.proxy.app.accounts.keys.find(KEY)
            self.assertEqual(compared.call_count, 2)
            self.proxy.app.accounts.keys.find("wrong")
            self.assertEqual(compared.call_count, 4)

    def test_ids_of_keys_are_the_same_after_a_restart(self) -> None:
        before = [key.id for key in self.proxy.app.accounts.keys.all()]
        again = cp.App(self.proxy.settings, {})
        self.addCleanup(again.close)
        self.assertEqual([key.id for key in again.accounts.keys.all()], before)
        self.assertEqual([len(one) for one in before], [8, 8])

    def test_keys_of_flags_are_listed_by_id_and_cannot_be_deleted(self) -> None:
        listed = self.proxy.get("/auth/tokens", **bearer(KEY)).json["data"]
        self.assertEqual([entry["kind"] for entry in listed], ["operator", "operator"])
        for argument in (listed[0]["key_id"], KEY):
            reply = self.proxy.request("DELETE", "/auth/tokens/" + argument, None, bearer(KEY))
            self.assertEqual(reply.status, 409, reply.body)
        wait_until(lambda: self.proxy.log_text().count("DELETE /auth/tokens/") >= 2)
        self.assertNotIn(KEY, self.proxy.log_text())

    def test_many_wrong_keys_of_one_address_are_429_and_right_ones_go_on(self) -> None:
        self.proxy.app.accounts.wrong_keys = cp.MinuteLimiter(5)
        statuses = [self.proxy.get("/v1/models", **bearer("wrong-%d" % n)).status
                    for n in range(8)]
        self.assertEqual(statuses, [401] * 5 + [429] * 3)
        self.assertEqual(self.proxy.get("/v1/models", **bearer(KEY)).status, 200)
        self.assertEqual(self.proxy.get("/", **bearer("wrong")).status, 200)

    def test_without_the_flag_any_key_or_none_will_do(self) -> None:
        with second_proxy(self) as proxy:                             # type: ignore[arg-type]
            for headers in ({}, bearer("dummy"), {"x-api-key": "dummy"}, bearer("ghp_nope")):
                self.assertEqual(proxy.get("/v1/models", **headers).status, 200)
            self.assertFalse(os.path.exists(proxy.app.accounts.keys.path))


class KeyFileTest(FolderCase):
    """`proxy_accounts.json`."""

    def file(self, *given: str, host: str = "github.com") -> Any:
        return cp.KeyFile(self.path("data", "proxy_accounts.json"), host, given)

    def test_a_folder_below_a_plain_file_is_no_500_in_each_request(self) -> None:
        with open(self.path("data"), "w") as file:
            file.write("in the way")
        keys = cp.KeyFile(os.path.join(self.path("data"), "below", "k.json"), "github.com", ())
        self.assertEqual(keys.all(), [])

    def test_it_is_private_and_holds_no_key(self) -> None:
        keys = self.file("auto")
        made = keys.add("made-up-key-1")
        keys.add("made-up-key-2", "octocat", "ghu_octocat")
        with open(keys.path, "rb") as file:
            data = file.read()
        self.assertNotIn(b"made-up-key", data)
        self.assertIn(made.hash.encode(), data)
        if POSIX:
            self.assertEqual(stat.S_IMODE(os.stat(keys.path).st_mode), 0o600)
            self.assertEqual(stat.S_IMODE(os.stat(self.path("data")).st_mode), 0o700)
        again = self.file()
        self.assertEqual(again.find("made-up-key-2").token, "ghu_octocat")
        self.assertIsNone(again.find("made-up-key-3"))
        self.assertTrue(again.is_closed)
        self.assertNotIn("ghu_", repr(again.all()))

    def test_two_folders_hash_the_same_key_differently(self) -> None:
        first = self.file().add("made-up-key-1").hash
        os.unlink(self.path("data", "proxy_accounts.json"))
        self.assertNotEqual(self.file().add("made-up-key-1").hash, first)

    def test_a_key_of_an_account_does_not_close_the_door(self) -> None:
        keys = self.file()
        keys.add("made-up-key-1", "octocat", "ghu_octocat")
        self.assertFalse(keys.is_closed)
        keys.add("made-up-key-2")
        self.assertTrue(keys.is_closed)
        keys.delete([keys.find("made-up-key-2").id])
        self.assertTrue(keys.is_closed)                   # not while it runs

    def test_a_newer_login_of_the_same_account_renews_its_older_keys(self) -> None:
        keys = self.file()
        keys.add("made-up-key-1", "octocat", "ghu_old")
        keys.add("made-up-key-2", "hubot", "ghu_hubot")
        keys.add("made-up-key-3", "octocat", "ghu_new")
        self.assertEqual([key.token for key in keys.all()], ["ghu_new", "ghu_hubot", "ghu_new"])

    def test_accounts_of_another_host_are_kept_but_not_used(self) -> None:
        self.file(host="octo.ghe.com").add("made-up-key-1", "octocat", "ghu_tenant")
        keys = self.file()
        self.assertIsNone(keys.find("made-up-key-1"))
        keys.add("made-up-key-2", "octocat", "ghu_octocat")
        self.assertEqual(self.file(host="octo.ghe.com").find("made-up-key-1").token, "ghu_tenant")

    def test_what_another_process_writes_is_noticed(self) -> None:
        ours, theirs = self.file(), self.file()
        ours.add("made-up-key-1")
        theirs.add("made-up-key-2")
        self.assertIsNotNone(ours.find("made-up-key-2"))
        theirs.delete([theirs.find("made-up-key-1").id])
        self.assertIsNone(ours.find("made-up-key-1"))
        os.unlink(ours.path)
        self.assertEqual(ours.all(), [])
        self.assertTrue(ours.is_closed)

    def test_what_cannot_be_parsed_is_moved_aside_and_named(self) -> None:
        good = {"salt": "a", "keys": []}
        for garbage in (b"", b"{", b"[]", b"\xff", {"keys": []}, dict(good, salt=5),
                        dict(good, keys=[5]), dict(good, keys=[{}]),
                        dict(good, keys=[{"hash": 5}]), dict(good, keys=[{"hash": "a", "x": 1}]),
                        dict(good, keys=[{"hash": "a", "made": 1, "token": None}])):
            with self.subTest(garbage=garbage):
                path = self.put(garbage, "data", "proxy_accounts.json")
                with open(path, "rb") as file:
                    data = file.read()
                with self.assertRaises(cp.ConfigError) as caught:
                    self.file().all()
                aside = re.findall(re.escape(path) + r"\.bad-\d+", str(caught.exception))[0]
                with open(aside, "rb") as file:
                    self.assertEqual(file.read(), data)
                self.assertFalse(os.path.exists(path))
                os.unlink(aside)

    def test_a_folder_that_cannot_be_written_does_not_keep_given_keys_out(self) -> None:
        with unittest.mock.patch.object(cp, "write_file", side_effect=OSError(30, "read-only")):
            keys = self.file("made-up-key-1")
            self.assertIsNotNone(keys.find("made-up-key-1"))
            with self.assertRaises(cp.ConfigError):
                keys.add("made-up-key-2")

    def test_a_thousand_keys_are_the_most(self) -> None:
        keys = self.file()
        with unittest.mock.patch.object(cp, "MAX_ACCOUNTS", 2):
            keys.add("made-up-key-1")
            keys.add("made-up-key-2")
            with self.assertRaises(cp.BadRequest):
                keys.add("made-up-key-3")

    def test_half_written_files_of_a_crash_are_swept_away(self) -> None:
        old, new = self.put(b"ghu_left", "data", ".new-old"), self.put(b"a", "data", ".new-new")
        os.utime(old, (1, 1))
        self.file().add("made-up-key-1")
        self.assertFalse(os.path.exists(old))
        self.assertTrue(os.path.exists(new))

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_kill_9_at_random_points_while_writing_loses_nothing(self) -> None:
        code = ("import sys, time; sys.path.insert(0, sys.argv[1]); import copilot_proxy as cp\n"
                "keys = cp.KeyFile(sys.argv[2], 'github.com', ())\n"
                "login = cp.LoginFile(sys.argv[3], 'https://github.com')\n"
                "print('ready', flush=True)\n"
                "while True:\n"
                "    made = keys.add('made-up-key-%d' % time.time_ns(), 'octo', 'ghu_octo')\n"
                "    login.save('ghu_' + 'x' * (len(keys.all()) % 50))\n"
                "    print(made.id, flush=True)\n"
                "    if len(keys.all()) > 40: keys.delete([k.id for k in keys.all()[:30]])\n")
        folder = self.path("data")
        path = os.path.join(folder, "proxy_accounts.json")
        for round_ in range(200):
            process = subprocess.Popen(
                [sys.executable, "-c", code, ROOT, path, folder], stdout=subprocess.PIPE,
                env=clean_environment(self.home))
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep((round_ * 37 % 100) / 2000)         # the random point
            process.kill()
            told = process.stdout.read().split()
            process.stdout.close()
            process.wait()
            keys = cp.KeyFile(path, "github.com", ())
            ids = [key.id for key in keys.all()]            # raises for what cannot be parsed
            with self.subTest(round=round_):
                whole = [one.decode() for one in told if len(one) == 8]
                self.assertIn(whole[-1] if whole else (ids or [""])[-1], ids or [""])
                self.assertRegex(cp.LoginFile(folder, "https://github.com").load(),
                                 r"\A(ghu_x*)?\Z")
                names = os.listdir(folder) if os.path.isdir(folder) else []
                self.assertEqual([name for name in names if ".bad-" in name], [])
                if POSIX:
                    self.assertEqual({stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode)
                                      for name in names} - {0o600}, set())


class StartTest(FolderCase):
    """The flags as a person uses them."""

    def app(self, **settings: Any) -> Any:
        app = cp.App(cp.Settings(data_dir=self.path("data"), **settings).check(), {})
        self.addCleanup(app.close)
        return app

    def test_beyond_loopback_a_key_is_needed_whatever_its_source(self) -> None:
        with self.assertRaises(cp.ConfigError) as caught:
            cp.ensure_api_key(self.app(host="0.0.0.0"))
        self.assertIn("--api-key", str(caught.exception))
        self.assertEqual(cp.ensure_api_key(self.app(host="0.0.0.0", api_key=(KEY,))), "")
        self.app().accounts.keys.add("made-up-key", "octocat", "ghu_octocat")   # not one
        with self.assertRaises(cp.ConfigError):
            cp.ensure_api_key(self.app(host="0.0.0.0"))
        told = cp.ensure_api_key(self.app(host="0.0.0.0", api_key=("auto",)))
        key = told.split()[-1]
        self.assertTrue(self.app().accounts.keys.find(key))
        self.assertEqual(cp.ensure_api_key(self.app(host="::")), "")          # it is stored now
        again = cp.ensure_api_key(self.app(host="0.0.0.0", api_key=("auto",)))
        self.assertNotIn(key, again)
        self.assertIn(self.app().accounts.keys.find(key).id, again)

    def test_keys_that_are_none_are_refused(self) -> None:
        for key in ("", "short", "with space", "tab\tulator", "caf\u00e9-caf\u00e9", "ghu_made_up",
                    "gho_made_up", "github_pat_made_up"):
            with self.subTest(key=key):
                with self.assertRaises(cp.ConfigError) as caught:
                    cp.Settings(api_key=(key,)).check()
                self.assertIn("--api-key", str(caught.exception))
                self.assertFalse(key and key in str(caught.exception))

    def test_the_environment_takes_keys_by_comma_and_by_line(self) -> None:
        merged = cp.Settings.merge({}, {"COPILOT_PROXY_API_KEY": "one-key-one,two-key-two\n"
                                                                 "three-key-three\n"})
        self.assertEqual(merged.api_key, ("one-key-one", "two-key-two", "three-key-three"))

    def test_flags_that_cannot_be(self) -> None:
        for word, more in (("--requests-per-minute", {"requests_per_minute": -1}),
                           ("--max-concurrency", {"max_concurrency": -1}),
                           ("--tls-key", {"tls_key": "a.pem"}),
                           ("--trusted-proxy", {"trusted_proxy": ("nonsense",)})):
            with self.assertRaises(cp.ConfigError) as caught:
                cp.Settings(**more).check()               # type: ignore[arg-type]
            self.assertIn(word, str(caught.exception))

    def test_auto_prints_its_key_once_and_the_key_opens_the_door(self) -> None:
        with FakeUpstream() as fake:
            args = ("start", "--port", "0", "--api-key", "auto", "--github-url", fake.url,
                    "--data-dir", self.path("data"), "--github-token", "ghu_fake")
            with Command(*args, home=self.home) as command:
                url = command.wait_for_url()
                key = command.wait_for("shown this once").split()[-1]
                self.assertTrue(key.startswith(cp.KEY_PREFIX))
                connection = http.client.HTTPConnection(url.split("//")[1], timeout=10)
                self.addCleanup(connection.close)
                self.assertEqual(send(connection, "GET", "/v1/models").status, 401)
                self.assertEqual(send(connection, "GET", "/v1/models", None,
                                      bearer(key)).status, 200)
                self.assertEqual(command.output().count(key), 1)


class AccountCase(SharedCase):
    """ghu_one and ghu_two are people with Copilot of their own."""

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.fake.github_tokens.update(("ghu_one", "gho_two", "ghu_three"))
        cls.fake.logins.update(ghu_one="one", gho_two="two", ghu_three="three")

    def login_of(self, record: Any) -> str:
        """Whose Copilot token a request carried."""
        token = record.headers["authorization"].partition(" ")[2]
        return str(self.fake.tokens[token].github_token)


class AccountTest(AccountCase):
    def test_a_github_token_as_key_serves_as_its_account(self) -> None:
        for token in ("ghu_one", "gho_two"):
            for headers in (bearer(token), {"x-api-key": token}, {"api-key": token}):
                for path, make in REQUESTS:
                    reply = self.proxy.post(path, make("a"), **headers)
                    self.assertEqual(reply.status, 200, reply.body)
                    self.assertEqual(self.login_of(self.fake.last(PATHS[path])), token)
        self.proxy.post("/v1/chat/completions", chat("a"), **bearer("dummy"))
        self.assertEqual(self.login_of(self.fake.last(CHAT)), "ghu_fake")
        self.assertEqual(self.proxy.get("/usage", **bearer("gho_two")).json["login"], "two")
        self.assertEqual(self.proxy.get("/usage").json["login"], "octocat")

    def test_two_accounts_in_parallel_share_nothing(self) -> None:
        self.fake.github_tokens.update("ghu_p%d" % n for n in range(4))
        failures: list[Any] = []
        sent = self.new_sent()

        def work(number: int) -> None:
            token = "ghu_p%d" % number
            for turn in range(15):
                text = "mark-%s-%d" % (token, turn)
                path, make = REQUESTS[turn % 3]
                reply = self.proxy.post(path, make(text, stream=turn % 2 == 0), **bearer(token))
                if reply.status != 200 or text.encode() not in reply.body.replace(b'"', b""):
                    if not (turn % 2 == 0 and reply.status == 200):
                        failures.append(reply)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(failures, [])
        calls = [record for record in sent() if record.path in PATHS.values()]
        self.assertEqual(len(calls), 60)
        for record in calls:
            marked = re.findall(r"mark-(ghu_p\d)-", record.body.decode())[0]
            self.assertEqual(self.login_of(record), marked)
        lists = [self.login_of(record) for record in sent() if record.path == MODELS]
        self.assertEqual(sorted(lists), ["ghu_p0", "ghu_p1", "ghu_p2", "ghu_p3"])
        owners = [record.headers["authorization"].split()[-1] for record in sent()
                  if record.path == EXCHANGE]
        owners = [owner for owner in owners if owner != "ghu_fake"]   # it may be renewed meanwhile
        self.assertEqual(sorted(owners), ["ghu_p0", "ghu_p1", "ghu_p2", "ghu_p3"])

    def test_each_account_has_its_own_host_and_list(self) -> None:
        with FakeUpstream(share=self.fake) as other:
            other.models = [entry for entry in other.models if entry["id"] == "gpt-4o"]
            self.fake.github_tokens.add("ghu_elsewhere")
            token = other.mint_token("ghu_elsewhere")
            account = self.proxy.app.login.account
            wait_until(lambda: account.token.value)     # its own exchange is over
            self.fake.script(EXCHANGE, Answer(body={
                "token": token, "expires_at": 9999999999, "refresh_in": 1500,
                "endpoints": {"api": other.url}}))
            headers = bearer("ghu_elsewhere")
            listed = self.proxy.get("/v1/models", **headers).json["data"]
            self.assertEqual([entry["id"] for entry in listed], ["gpt-4o"])
            self.assertEqual(self.proxy.post("/v1/chat/completions", chat("a", "gpt-4o"),
                                             **headers).status, 200)
            self.assertEqual(self.proxy.post("/v1/chat/completions", chat("a", "claude-haiku-4.5"),
                                             **headers).status, 404)
            self.assertGreater(len(self.proxy.get("/v1/models").json["data"]), 1)
            self.assertEqual(other.count(CHAT), 1)

    def test_a_token_that_github_does_not_know_is_its_senders_problem_only(self) -> None:
        for path, make in REQUESTS:
            reply = self.proxy.post(path, make("a"), **bearer("ghu_revoked"))
            self.assertEqual(reply.status, 401, reply.body)
            self.assertNotIn(b"ghu_revoked", reply.body)
        self.assertEqual(self.fake.device.issued, 0)
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("a")).status, 200)
        self.assertEqual(self.proxy.get("/health").json["status"], "ok")

    def test_kept_answers_belong_to_their_account_and_key(self) -> None:
        body = {"model": "gpt-5.3-codex", "input": "remember"}
        made = self.proxy.post("/v1/responses", body, **bearer("ghu_one")).json["id"]
        path = "/v1/responses/" + made
        self.assertEqual(self.proxy.get(path, **bearer("ghu_one")).status, 200)
        for headers in ({}, bearer("gho_two"), bearer("dummy")):
            self.assertEqual(self.proxy.get(path, **headers).status, 404)
            reply = self.proxy.post("/v1/responses", dict(body, previous_response_id=made),
                                    **headers)
            self.assertEqual(reply.status, 400, reply.body)
        with second_proxy(self, api_key=(KEY, OTHER_KEY)) as proxy:   # type: ignore[arg-type]
            made = proxy.post("/v1/responses", body, **bearer(KEY)).json["id"]
            self.assertEqual(proxy.get("/v1/responses/" + made, **bearer(KEY)).status, 200)
            self.assertEqual(proxy.get("/v1/responses/" + made, **bearer(OTHER_KEY)).status, 404)

    def test_with_a_key_set_a_github_token_needs_it_beside(self) -> None:
        with second_proxy(self, api_key=(KEY,)) as proxy:             # type: ignore[arg-type]
            self.assertEqual(proxy.get("/usage", **bearer("ghu_one")).status, 401)
            both = dict(bearer("ghu_one"), **{"x-api-key": KEY})
            self.assertEqual(proxy.get("/usage", **both).json["login"], "one")
            self.assertEqual(proxy.get("/usage", **bearer(KEY)).json["login"], "octocat")

    def test_the_least_recently_used_account_is_forgotten(self) -> None:
        with unittest.mock.patch.object(cp, "MAX_ACCOUNTS", 2):
            with second_proxy(self) as proxy:                         # type: ignore[arg-type]
                app, names = proxy.app, ("ghu_one", "gho_two", "ghu_one", "ghu_three")
                first = app.accounts.of_token("ghu_one")
                for name in names:
                    app.accounts.of_token(name)
                kept = [account.github_token for account in app.accounts.all()[1:]]
                self.assertEqual(kept, ["ghu_one", "ghu_three"])
                self.assertIs(app.accounts.of_token("ghu_one"), first)
                self.assertEqual(proxy.get("/usage", **bearer("gho_two")).status, 200)

    def test_a_thousand_accounts_hold_no_thread(self) -> None:
        with second_proxy(self) as proxy:                             # type: ignore[arg-type]
            def ours() -> int:
                return sum(t.name in ("copilot-token", "relay-loop") for t in threading.enumerate())

            before = ours()
            for number in range(1200):
                proxy.app.accounts.of_token("ghu_many%d" % number)
            self.assertEqual(ours(), before)
            self.assertEqual(len(proxy.app.accounts.all()), 1001)

    def test_rate_limit_is_each_accounts_own(self) -> None:
        with second_proxy(self, rate_limit=60.0) as proxy:            # type: ignore[arg-type]
            for headers in ({}, bearer("ghu_one"), bearer("gho_two")):
                statuses = [proxy.post("/v1/chat/completions", chat("a"), **headers).status
                            for _ in range(2)]
                self.assertEqual(statuses, [200, 429])

    def test_counters_are_each_accounts_own_and_only_the_operator_sees_all(self) -> None:
        with second_proxy(self, api_key=(KEY,)) as proxy:             # type: ignore[arg-type]
            key = "made-up-account-key"
            proxy.app.accounts.keys.add(key, "one", "ghu_one")
            for _ in range(3):
                proxy.post("/v1/chat/completions", chat("a"), **bearer(key))
            proxy.post("/v1/chat/completions", chat("a"), **bearer(KEY))
            wait_until(lambda: proxy.app.ledger.stats.group("requests").get(
                ("passthrough", "200")) == 4)
            own = proxy.get("/stats", **bearer(key)).json
            self.assertEqual(own["requests"]["passthrough"], {"200": 3})
            self.assertEqual([one["account"] for one in own["accounts"]], ["one"])
            self.assertEqual(own["totals"]["requests"], 3)
            self.assertEqual({row["account"] for row in own["recent"]}, {"one"})
            self.assertEqual(len(proxy.get("/history", **bearer(key)).json["rows"]), 3)
            self.assertEqual(len(proxy.get("/history", **bearer(KEY)).json["rows"]), 4)
            for path in ("/metrics", "/history/summary", "/history/events", "/approvals"):
                self.assertEqual(proxy.get(path, **bearer(key)).status, 403, path)
                self.assertEqual(proxy.get(path).status, 401, path)
            every = proxy.get("/stats", **bearer(KEY)).json
            self.assertEqual(every["requests"]["passthrough"], {"200": 4})
            self.assertEqual([one["requests"].get("passthrough") for one in every["accounts"]
                              if one["account"] == "one"], [{"200": 3}])
            self.assertNotIn("ghu_", json.dumps(every))

    def test_the_exchange_knows_account_and_key_for_what_writes_history(self) -> None:
        seen: list[Any] = []
        with second_proxy(self, api_key=(KEY,)) as proxy:             # type: ignore[arg-type]
            made = proxy.app.accounts.keys.add("made-up-account-key", "one", "ghu_one")
            real = proxy.server.end

            def end(exchange: Any) -> None:
                seen.append((exchange.record.account.name, exchange.caller.key_id))
                real(exchange)

            with unittest.mock.patch.object(proxy.server, "end", end):
                proxy.post("/v1/chat/completions", chat("a"), **bearer("made-up-account-key"))
                proxy.post("/v1/chat/completions", chat("a"), **bearer(KEY))
                wait_until(lambda: len(seen) == 2)
            default = proxy.app.login.account
        self.assertEqual(seen[0], ("one", made.id))
        self.assertEqual(seen[1], (default.id, proxy.app.accounts.keys.find(KEY).id))
        self.assertRegex(default.id, r"\A[0-9a-f]{8}\Z")


class BrowserLoginTest(ProxyCase):
    """DESIGN 3: start, poll, claim, list, delete."""

    settings = {"api_key": (KEY,)}

    def setUp(self) -> None:
        super().setUp()
        self.fake.device.interval = 0.02
        self.fake.device.token = "ghu_browser"
        self.fake.logins["ghu_browser"] = "hubot"
        self.fake.device.outcomes.extend(["pending"] * 100000)

    def ask(self, method: str, path: str, body: Any = None, key: str = KEY,
            **headers: str) -> Reply:
        return self.proxy.request(method, path, body, dict(bearer(key) if key else {}, **headers))

    def start(self) -> dict[str, Any]:
        reply = self.ask("POST", "/auth/device/start", {})
        self.assertEqual(reply.status, 200, reply.body)
        self.assertEqual(reply.headers["cache-control"], "no-store")
        return dict(reply.json)

    def status(self, state: str) -> str:
        reply = self.ask("GET", "/auth/device/poll", **{"X-Login-State": state})
        return str(reply.json.get("status"))

    def grant(self, state: str) -> None:
        self.fake.device.outcomes.clear()
        wait_until(lambda: self.status(state) != "pending")

    def claim(self, state: str) -> Reply:
        return self.ask("POST", "/auth/device/claim", {"state": state})

    def test_a_login_makes_an_account_and_hands_its_key_out_once(self) -> None:
        begun = self.start()
        self.assertEqual(begun["user_code"], "FAKE-0001")
        self.assertEqual(begun["verification_uri"], self.fake.url + "/login/device")
        self.assertGreaterEqual(len(begun["state"]), 32)
        self.assertNotIn("device_code", begun)
        self.assertEqual(self.status(begun["state"]), "pending")
        self.assertEqual(self.claim(begun["state"]).status, 409)
        self.grant(begun["state"])
        self.assertEqual(self.status(begun["state"]), "granted")
        reply = self.claim(begun["state"])
        made = reply.json
        self.assertEqual((reply.status, made["login"]), (200, "hubot"))
        self.assertEqual(reply.headers["cache-control"], "no-store")
        self.assertNotIn(b"ghu_browser", reply.body)
        self.assertEqual(self.claim(begun["state"]).status, 403)           # once
        for path, make in REQUESTS:
            self.assertEqual(self.ask("POST", path, make("a"), made["key"]).status, 200)
            token = self.fake.last(PATHS[path]).headers["authorization"].split()[1]
            self.assertEqual(self.fake.tokens[token].github_token, "ghu_browser")
        self.assertEqual(self.ask("GET", "/usage").json["login"], "octocat")    # as before
        self.assertEqual(self.ask("GET", "/usage", key=made["key"]).json["login"], "hubot")
        text = self.proxy.log_text()
        for secret in (made["key"], begun["state"], "ghu_browser", KEY):
            self.assertNotIn(secret, text)
        again = self.enter(Proxy(self.fake, data_dir=self.proxy.data_dir, api_key=(KEY,)))
        self.assertEqual(again.get("/usage", **bearer(made["key"])).json["login"], "hubot")

    def test_only_the_browser_that_began_can_poll_and_claim(self) -> None:
        mine, other = self.start()["state"], self.start()["state"]
        self.assertNotEqual(mine, other)
        self.grant(mine)
        for state in ("", "x", mine[:-1], mine + "x", mine.swapcase(), "\xff"):
            with self.subTest(state=state):
                reply = self.ask("GET", "/auth/device/poll", **{"X-Login-State": state})
                self.assertEqual(reply.status, 403, reply.body)
                self.assertEqual(self.claim(state).status, 403)
        for path in ("/auth/device/poll?state=" + mine, "/auth/device/poll"):
            self.assertEqual(self.ask("GET", path, Cookie="state=" + mine).status, 403)
        self.assertEqual(self.claim(mine).status, 200)

    def test_pages_of_other_origins_are_kept_out_even_those_that_may_call_the_api(self) -> None:
        self.proxy.settings.cors_origin = ("https://app.example",)
        state = self.start()["state"]
        self.grant(state)
        foreign = ({"Origin": "https://app.example"}, {"Origin": "https://evil.example"},
                   {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
                   {"Sec-Fetch-Site": "same-site"})
        for headers in foreign:
            for method, path, body in (
                    ("POST", "/auth/device/start", {}), ("GET", "/auth/tokens", None),
                    ("GET", "/auth/device/poll", None), ("DELETE", "/auth/tokens/abc", None),
                    ("POST", "/auth/device/claim", {"state": state})):
                with self.subTest(headers=headers, path=path):
                    reply = self.ask(method, path, body, **dict(headers, **{
                        "X-Login-State": state}))
                    self.assertEqual(reply.status, 403, reply.body)
        reply = self.ask("POST", "/auth/device/claim", {"state": state}, Origin=self.proxy.url)
        self.assertEqual(reply.status, 200, reply.body)
        self.assertEqual(self.fake.device.issued, 1)

    def test_no_get_changes_anything(self) -> None:
        state = self.start()["state"]
        for path in ("/auth/device/start", "/auth/device/claim"):
            self.assertEqual(self.ask("GET", path).status, 405)
        before = self.fake.count(DEVICE_POLL)
        self.grant(state)
        polled = self.fake.count(DEVICE_POLL)
        for _ in range(20):
            self.assertEqual(self.status(state), "granted")
        self.assertEqual(self.fake.count(DEVICE_POLL), polled)     # the server polls, not the page
        self.assertGreater(polled, before)
        self.assertEqual(self.claim(state).status, 200)

    def test_beginning_needs_the_operators_key(self) -> None:
        state = self.start()["state"]
        self.grant(state)
        issued = self.claim(state).json["key"]
        self.assertEqual(self.ask("POST", "/auth/device/start", {}, key="").status, 401)
        self.assertEqual(self.ask("POST", "/auth/device/start", {}, key=issued).status, 403)
        self.assertEqual(self.fake.device.issued, 1)

    def test_denied_expired_and_seatless_logins_say_so_and_make_nothing(self) -> None:
        for outcome, word in (("denied", "cancelled"), ("expired", "expired"),
                              ("granted", "No access to GitHub Copilot")):
            with self.subTest(outcome=outcome):
                self.fake.exchange_mode = "no_subscription" if outcome == "granted" else "ok"
                state = self.start()["state"]
                self.fake.device.outcomes.clear()
                self.fake.device.outcomes.append(outcome)
                wait_until(lambda: self.status(state) == "failed")
                reply = self.ask("GET", "/auth/device/poll", **{"X-Login-State": state})
                self.assertIn(word, reply.json["problem"])
                self.assertEqual(self.claim(state).status, 409)
                self.fake.device.outcomes.extend(["pending"] * 100000)
        self.assertEqual(len(self.ask("GET", "/auth/tokens").json["data"]), 1)     # the flag's

    def test_an_unreachable_github_is_told_at_once(self) -> None:
        self.fake.script(DEVICE_CODE, Answer(503, body="<html>Unicorn</html>"))
        reply = self.ask("POST", "/auth/device/start", {})
        self.assertEqual(reply.status, 502)
        self.assertIn("no login code", reply.json["error"]["message"])

    def test_logins_under_way_are_bounded(self) -> None:
        with unittest.mock.patch.object(cp, "MAX_LOGINS", 2):
            self.start()
            self.start()
            reply = self.ask("POST", "/auth/device/start", {})
            self.assertEqual((reply.status, reply.headers["retry-after"]), (429, "61"))

    def test_a_key_that_cannot_be_stored_can_be_claimed_again(self) -> None:
        state = self.start()["state"]
        self.grant(state)
        with unittest.mock.patch.object(cp, "write_file", side_effect=OSError(28, "No space")):
            self.assertEqual(self.claim(state).status, 500)
        self.assertEqual(self.claim(state).status, 200)

    def test_lists_and_deletions_know_whose_they_are(self) -> None:
        keys = []
        for name in ("hubot", "monalisa"):
            self.fake.device.token = "ghu_" + name
            self.fake.logins["ghu_" + name] = name
            state = self.start()["state"]
            self.grant(state)
            keys.append(self.claim(state).json)
            self.fake.device.outcomes.extend(["pending"] * 100000)
        every = self.ask("GET", "/auth/tokens").json["data"]
        self.assertEqual([entry["login"] for entry in every], ["", "hubot", "monalisa"])
        own = self.ask("GET", "/auth/tokens", key=keys[0]["key"])
        self.assertEqual([entry["key_id"] for entry in own.json["data"]], [keys[0]["key_id"]])
        for text in (json.dumps(every), own.body.decode()):
            self.assertNotIn("ghu_", text)
            self.assertNotIn(cp.KEY_PREFIX, text)
        reply = self.ask("DELETE", "/auth/tokens/" + keys[1]["key_id"], key=keys[0]["key"])
        self.assertEqual(reply.status, 404)                          # somebody else's
        self.assertEqual(self.ask("DELETE", "/auth/tokens/" + keys[0]["key_id"], key="").status,
                         401)
        reply = self.ask("DELETE", "/auth/tokens/" + keys[1]["key"])     # a whole key as id
        self.assertEqual((reply.status, reply.json["deleted"]), (200, True))
        self.assertNotIn(keys[1]["key"].encode(), reply.body)
        self.assertEqual(self.ask("GET", "/v1/models", key=keys[1]["key"]).status, 401)
        reply = self.ask("DELETE", "/auth/tokens/" + keys[0]["key_id"], key=keys[0]["key"])
        self.assertEqual(reply.status, 200)                          # one's own
        self.assertEqual(self.ask("GET", "/v1/models", key=keys[0]["key"]).status, 401)
        self.assertEqual(len(self.proxy.app.accounts.all()), 1)
        wait_until(lambda: self.proxy.log_text().count("DELETE") >= 4)
        self.assertNotIn(keys[1]["key"][20:], self.proxy.log_text())
        with open(self.proxy.app.accounts.keys.path, "rb") as file:
            self.assertNotIn(b"ghu_", file.read())

    def test_a_deleted_account_key_does_not_fall_back_to_the_default_account(self) -> None:
        with second_proxy(self) as proxy:
            reply = proxy.get("/v1/models", **bearer(cp.KEY_PREFIX + "x" * 43))
            self.assertEqual(reply.status, 401)

    def test_the_command_line_sees_the_same_accounts(self) -> None:
        state = self.start()["state"]
        self.grant(state)
        made = self.claim(state).json
        self.proxy.settle()                # else its log line could be among the command's
        flags = ("--github-url", self.fake.url, "--data-dir", self.proxy.data_dir)
        home = self.proxy.data_dir
        code, output = run_main(home, "auth", "--list", *flags)
        self.assertEqual(code, 0, output)
        self.assertIn("hubot", output)
        self.assertIn(made["key_id"], output)
        self.assertNotIn("ghu_", output)
        self.assertNotIn(made["key"], output)
        self.assertEqual(run_main(home, "auth", "--logout", "nobody", *flags)[1],
                         "nobody was logged in\n")
        code, output = run_main(home, "auth", "--logout", "HuBot", *flags)
        self.assertEqual((code, output), (0, "logged out\n"))
        self.assertEqual(self.ask("GET", "/v1/models", key=made["key"]).status, 401)
        self.assertNotIn("hubot", run_main(home, "auth", "--list", *flags)[1])

    def test_the_page_is_a_shell_that_needs_nothing_from_outside(self) -> None:
        reply = self.proxy.get("/auth/device")
        policy = reply.headers["content-security-policy"]
        text = reply.body.decode()
        for tag in ("script", "style"):
            inside = text.partition("<%s>" % tag)[2].partition("</%s>" % tag)[0]
            self.assertIn(cp.csp_hash(inside), policy)
        self.assertNotIn("unsafe", policy)
        self.assertIn("frame-ancestors 'none'", policy)
        self.assertEqual(reply.headers["x-frame-options"], "DENY")
        self.assertEqual(re.findall(r"(?:src|action)\s*=\s*[\"']", text), [])
        self.assertEqual(re.findall(r"href\s*=\s*[\"'](?!#)", text), [])
        self.assertEqual(text.count("localStorage"), 1)       # for the theme
        self.assertNotIn("setItem(KEY", text.replace("stored.setItem(KEY", ""))
        self.assertIn("stored = sessionStorage", text)
        self.assertNotIn("document.cookie", text)
        self.assertNotIn("innerHTML", text)
        for path in ("start", "poll", "claim"):
            self.assertIn("/auth/device/" + path, text)


class DefaultLoginTest(ProxyCase):
    """While nobody is logged in the browser's login is the default one."""

    settings = {"login": False}

    def setUp(self) -> None:
        super().setUp()
        self.fake.device.interval = 0.02

    def test_it_serves_everybody_and_needs_no_key(self) -> None:
        self.fake.device.outcomes.extend(["pending"] * 100000)
        begun = self.proxy.post("/auth/device/start", {}).json
        other = self.proxy.post("/auth/device/start", {}).json
        self.assertEqual(other["user_code"], begun["user_code"])
        self.assertEqual(self.proxy.get("/health").json["login"]["user_code"], begun["user_code"])
        self.fake.device.outcomes.clear()
        headers = {"X-Login-State": begun["state"]}
        wait_until(lambda: self.proxy.get("/auth/device/poll", **headers).json["status"]
                   == "granted")
        made = self.proxy.post("/auth/device/claim", {"state": begun["state"]}).json
        self.assertEqual(made, {"login": "octocat", "key": None, "key_id": None})
        for more in ({}, bearer("dummy")):
            self.assertEqual(self.proxy.post("/v1/messages", message("a"), **more).status, 200)
        self.assertEqual(self.proxy.app.login.file.load(), "ghu_fake")

    def test_any_number_of_browsers_may_wait_for_the_default_login(self) -> None:
        self.fake.device.outcomes.extend(["pending"] * 100000)
        states = [self.proxy.post("/auth/device/start", {}).json["state"]
                  for _ in range(cp.MAX_LOGINS + 3)]
        self.assertEqual(self.fake.device.issued, 1)
        statuses = [self.proxy.get("/auth/device/poll", **{"X-Login-State": state}).status
                    for state in states]
        self.assertEqual(statuses, [403] * 3 + [200] * cp.MAX_LOGINS)

    def test_a_login_is_over_after_half_an_hour(self) -> None:
        self.fake.device.outcomes.extend(["pending"] * 100000)
        state = self.proxy.post("/auth/device/start", {}).json["state"]
        with unittest.mock.patch.object(cp, "LOGIN_AGE_S", 0.0):
            reply = self.proxy.get("/auth/device/poll", **{"X-Login-State": state})
            self.assertEqual(reply.status, 403)

    def test_behind_a_key_too(self) -> None:
        with second_proxy(self, login=False, api_key=(KEY,)) as proxy:
            self.assertNotIn("login", proxy.get("/health").json)
            begun = proxy.post("/auth/device/start", {}, **bearer(KEY)).json
            headers = dict(bearer(KEY), **{"X-Login-State": begun["state"]})
            wait_until(lambda: proxy.get("/auth/device/poll", **headers).json["status"]
                       == "granted")
            made = proxy.post("/auth/device/claim", {"state": begun["state"]}, **bearer(KEY)).json
            for key in (KEY, made["key"]):
                self.assertEqual(proxy.post("/v1/messages", message("a"), **bearer(key)).status,
                                 200)
            self.assertEqual(proxy.get("/v1/models", **bearer("dummy")).status, 401)

    def test_a_login_that_is_overtaken_asks_github_no_more(self) -> None:
        self.fake.device.outcomes.extend(["pending"] * 100000)
        self.proxy.post("/auth/device/start", {})
        threads = [t for t in threading.enumerate() if t.name == "device-login"]
        self.assertEqual(len(threads), 1)
        self.proxy.app.login.use("ghu_fake")
        threads[0].join(5)
        self.assertFalse(threads[0].is_alive())


class MinuteTest(SharedCase):
    settings = dict(requests_per_minute=2, api_key=(KEY, OTHER_KEY))

    def test_the_third_request_of_a_key_is_429_and_other_keys_go_on(self) -> None:
        for headers in (bearer(KEY), {"x-api-key": OTHER_KEY}):
            replies = [self.proxy.post(path, make("a"), **headers) for path, make in REQUESTS]
            self.assertEqual([reply.status for reply in replies], [200, 200, 429])
            self.assertEqual([reply.headers["x-ratelimit-remaining-requests"]
                              for reply in replies], ["1", "0", "0"])
            last = replies[-1]
            self.assert_anthropic_error(last, 429, "rate_limit_error")
            self.assertEqual(last.headers["x-ratelimit-limit-requests"], "2")
            self.assertTrue(1 <= int(last.headers["retry-after"]) <= 61)
            self.assertRegex(last.headers["x-ratelimit-reset-requests"], r"\A\d+s\Z")
            self.assertEqual(self.proxy.get("/v1/models", **headers).status, 200)

    def test_the_window_slides(self) -> None:
        limiter, now = cp.MinuteLimiter(3), [1000.0]
        with unittest.mock.patch.object(cp.time, "monotonic", lambda: now[0]):
            for at in (1000, 1020, 1040):
                now[0] = float(at)
                limiter.admit("a", "")
            for at, pause in ((1041, 20), (1059.5, 1)):
                now[0] = at
                with self.assertRaises(cp.RateLimited) as caught:
                    limiter.admit("a", "too many")
                self.assertEqual(caught.exception.headers["retry-after"], str(pause))
            now[0] = 1060.0
            limiter.admit("a", "")                     # the first one is a minute old
            with self.assertRaises(cp.RateLimited):
                limiter.admit("a", "")
            limiter.admit("b", "")
            now[0] = 1080.0
            limiter.admit("a", "")

    def test_it_remembers_a_bounded_number_of_callers(self) -> None:
        limiter = cp.MinuteLimiter(1)
        for number in range(3000):
            limiter.admit(str(number), "")
        self.assertEqual(len(limiter._times), cp.MAX_ACCOUNTS)

    def test_never_more_than_the_limit_whatever_the_threads(self) -> None:
        limiter, admitted = cp.MinuteLimiter(50), []

        def work() -> None:
            for _ in range(50):
                with contextlib.suppress(cp.RateLimited):
                    limiter.admit("a", "")
                    admitted.append(1)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(len(admitted), 50)


class GateTest(SharedCase):
    """--max-concurrency."""

    settings = dict(max_concurrency=2, api_key=(KEY, OTHER_KEY))

    def waiting(self) -> int:
        return sum(map(len, list(self.proxy.app.admission.gate._lines.values())))

    def tearDown(self) -> None:
        super().tearDown()
        wait_until(lambda: self.proxy.app.admission.gate._running == 0, "every slot is given back")
        self.assertEqual(self.waiting(), 0)

    def hold(self) -> list[RawClient]:
        """Two running requests: a stream and a whole answer."""
        self.proxy.get("/v1/models", **bearer(KEY))
        self.fake.script(CHAT, *[Answer(status=0, hold=True)] * 2)
        clients = [self.client(), self.client()]
        for client, stream in zip(clients, (True, False)):
            client.send(post("/v1/chat/completions", chat("slow", stream=stream),
                             "x-api-key: " + KEY))
        self.assertTrue(self.fake.wait_for(lambda: self.fake.holding == 2))
        return clients

    def ask(self, text: str, key: str) -> RawClient:
        before = self.waiting()
        client = self.client()
        client.send(post("/v1/chat/completions", chat(text), "x-api-key: " + key))
        wait_until(lambda: self.waiting() == before + 1, "it waits")
        return client

    def test_the_others_wait_and_the_keys_take_turns(self) -> None:
        running = self.hold()
        before = self.fake.count(CHAT)
        crowd = [self.ask("crowd %d" % number, KEY) for number in range(5)]
        single = self.ask("single", OTHER_KEY)
        self.assertEqual(self.fake.count(CHAT), before)
        self.assertEqual(self.proxy.get("/health").status, 200)      # is not counted
        running[0].__exit__()                    # one slot only, so that they go up one by one
        for client in crowd + [single]:
            self.assertEqual(client.answer().status, 200)
        release(self.fake)
        self.assertEqual(running[1].answer().status, 200)
        texts = [record.json["messages"][0]["content"] for record in self.fake.requests
                 if record.path == CHAT][before:]
        self.assertEqual(texts, ["crowd 0", "single", "crowd 1", "crowd 2", "crowd 3", "crowd 4"])

    def test_a_client_that_leaves_frees_its_place_in_the_line(self) -> None:
        running = self.hold()
        for _ in range(3):
            gone = self.ask("gone", KEY)
            gone.__exit__()
            wait_until(lambda: self.waiting() == 0, "it has left the line")
        before = self.fake.count(CHAT)
        release(self.fake, 2)
        for client in running:
            self.assertEqual(client.answer().status, 200)
        self.assertEqual(self.fake.count(CHAT), before)

    def test_the_line_is_bounded(self) -> None:
        running = self.hold()
        with unittest.mock.patch.object(cp, "WAITING_MAX", 2):
            waiting = [self.ask("a", KEY), self.ask("b", OTHER_KEY)]
            reply = self.proxy.post("/v1/messages", message("c"), **bearer(OTHER_KEY))
            self.assert_anthropic_error(reply, 429, "rate_limit_error")
            self.assertEqual(reply.headers["retry-after"], "2")
        release(self.fake, 2)
        for client in running + waiting:
            self.assertEqual(client.answer().status, 200)

    def test_errors_hang_ups_and_cuts_give_their_slot_back(self) -> None:
        for text in ("@@events=3 cut=1@@", "@@events=3 error=1@@", "fine"):
            for stream in (True, False):
                for _ in range(3):
                    self.proxy.post("/v1/chat/completions", chat(text, stream=stream),
                                    **bearer(KEY))
        for _ in range(4):
            with RawClient(self.proxy.port) as client:
                client.send(post("/v1/chat/completions", chat("@@events=50 delay_ms=5@@",
                                                              stream=True), "x-api-key: " + KEY))
                client.sock.recv(10)
        self.proxy.post("/v1/completions", {"model": "gpt-4.1", "prompt": ["a", "b", "c"]},
                        **bearer(KEY))
        self.fake.script(CHAT, *[Answer(status=500, body="x")] * 3)
        self.proxy.post("/v1/chat/completions", chat("a"), **bearer(KEY))

    def test_the_cap_holds_whatever_comes(self) -> None:
        most, upstream = [], []
        real = self.fake.wait_for

        def work(key: str) -> None:
            for _ in range(6):
                reply = self.proxy.stream("/v1/chat/completions",
                                          chat("@@events=3 delay_ms=2@@"), **bearer(key))
                self.assertTrue(reply.is_done, reply.body)

        threads = [threading.Thread(target=work, args=((KEY, OTHER_KEY)[n % 2],))
                   for n in range(8)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            most.append(self.proxy.app.admission.gate._running)
            upstream.append(self.fake.open_streams)
            real(lambda: False, 0.002)
        self.assertEqual(max(most), 2)
        self.assertLessEqual(max(upstream), 4)       # two more that only lack their last chunk


class BrowserSafetyTest(SharedCase):
    settings = dict(cors_origin=("https://app.example",))

    def test_no_answer_may_be_sniffed(self) -> None:
        for reply in (self.proxy.get("/"), self.proxy.get("/health"), self.proxy.get("/nowhere"),
                      self.proxy.get("/v1/models"), self.proxy.request("OPTIONS", "/"),
                      self.proxy.stream("/v1/chat/completions", chat("a"))):
            self.assertEqual(reply.headers["x-content-type-options"], "nosniff")

    def test_pages_cannot_be_framed_or_kept(self) -> None:
        for path in ("/", "/dashboard", "/auth/device"):
            headers = self.proxy.get(path, Accept="text/html").headers
            self.assertEqual((headers["x-frame-options"], headers["cache-control"],
                              headers["referrer-policy"]), ("DENY", "no-store", "no-referrer"))

    def test_what_a_browser_fetches_for_another_site_is_refused_except_the_shells(self) -> None:
        sent = self.new_sent()
        for site in ("cross-site", "same-site"):
            headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"}
            for path in ("/v1/models", "/usage", "/stats", "/token", "/auth/tokens"):
                self.assert_openai_error(self.proxy.get(path, **headers), 403)
            self.assertEqual(self.proxy.post("/v1/messages", message("a"), **headers).status, 403)
            self.assertEqual(self.proxy.get("/", **headers).status, 200)
        self.assertEqual(sent(), [])
        for site in ("same-origin", "none"):
            self.assertEqual(self.proxy.get("/v1/models", **{"Sec-Fetch-Site": site}).status, 200)
        reply = self.proxy.get("/v1/models", **{"Sec-Fetch-Site": "cross-site",
                                                "Origin": "https://app.example"})
        self.assertEqual(reply.status, 200)

    def test_the_bound_address_is_a_host_but_no_other_address_is(self) -> None:
        with unittest.mock.patch.object(cp, "bare_address", lambda name: "192.0.2.7"):
            self.assertEqual(self.proxy.get("/health", Host="192.0.2.7:4399").status, 200)
            self.assertEqual(self.proxy.get("/health", Host="192.0.2.8").status, 403)
        self.assertEqual(self.proxy.get("/health", Host="192.0.2.7").status, 403)

    def test_addresses_of_both_families_are_written_alike(self) -> None:
        self.assertEqual(cp.bare_address(("::ffff:10.0.0.1", 80, 0, 0)), "10.0.0.1")
        self.assertEqual(cp.bare_address(("::1", 80, 0, 0)), "::1")
        self.assertEqual(cp.bare_address(""), "")


class TrustedProxyTest(SharedCase):
    settings = dict(trusted_proxy=("10.0.0.0/8", "127.0.0.1", "fd00::/8"), show_token=True,
                    allow_host=("proxy.example",))

    def seen(self, peer: str, **headers: str) -> tuple[str, str, str]:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        head = cp.RequestHead("GET", "/", 1, dict({"host": "inside:80"}, **fields))
        return cp.client_view(head, peer, self.proxy.settings, "http")

    def test_only_a_trusted_proxy_is_believed(self) -> None:
        told = dict(x_forwarded_host="proxy.example", x_forwarded_proto="https",
                    x_forwarded_for="203.0.113.9")
        self.assertEqual(self.seen("10.1.2.3", **told), ("proxy.example", "https", "203.0.113.9"))
        self.assertEqual(self.seen("fd00::5", **told)[2], "203.0.113.9")
        for peer in ("192.0.2.1", "11.0.0.1", "fe80::1", "", "nonsense", "10.0.0.0/8x"):
            self.assertEqual(self.seen(peer, **told), ("inside:80", "http", peer))

    def test_the_client_is_the_last_hop_that_is_no_trusted_proxy(self) -> None:
        for hops, client in (("6.6.6.6, 203.0.113.9", "203.0.113.9"),
                             ("6.6.6.6, 203.0.113.9, 10.9.9.9", "203.0.113.9"),
                             ("10.1.1.1, 10.2.2.2", "10.1.1.1"), ("", "10.0.0.1"),
                             ("127.0.0.1, 203.0.113.9", "203.0.113.9"),
                             ("203.0.113.9, junk", "junk"), (" , ,", "10.0.0.1")):
            with self.subTest(hops=hops):
                self.assertEqual(self.seen("10.0.0.1", x_forwarded_for=hops)[2], client)

    def test_same_origin_follows_the_scheme_that_the_proxy_tells(self) -> None:
        told = {"X-Forwarded-Host": "proxy.example", "X-Forwarded-Proto": "https"}
        for origin, status in (("https://proxy.example", 200), ("http://proxy.example", 403)):
            reply = self.proxy.get("/v1/models", Origin=origin, **told)
            self.assertEqual(reply.status, status, reply.body)
        self.assertEqual(self.proxy.get("/health", **{"X-Forwarded-Host": "evil.example"}).status,
                         403)

    def test_the_token_is_for_this_machine_whatever_a_proxy_says(self) -> None:
        self.assertEqual(self.proxy.get("/token").status, 200)
        self.assertEqual(self.proxy.get("/token", **{"X-Forwarded-For": "203.0.113.9"}).status, 404)
        self.assertEqual(self.proxy.get("/token", **{"X-Forwarded-For": "127.0.0.1"}).status, 404)
        with second_proxy(self, show_token=True, api_key=(KEY,)) as proxy:  # type: ignore
            self.assertEqual(proxy.get("/token").status, 401)
            self.assertEqual(proxy.get("/token", **bearer(KEY)).status, 200)


class TlsCase(SharedCase):
    settings = dict(tls_cert=CERTIFICATE)

    @contextlib.contextmanager
    def secure(self, proxy: Any = None, **more: Any) -> Iterator[Any]:
        context = ssl.create_default_context(cafile=CERTIFICATE)
        with contextlib.closing(http.client.HTTPSConnection(
                "127.0.0.1", (proxy or self.proxy).port, timeout=10, context=context)) as made:
            yield made

    def wrapped(self, version: Any = None) -> Any:
        """A TLS socket after its handshake."""
        context = ssl.create_default_context(cafile=CERTIFICATE)
        if version is not None:
            context.maximum_version = version
        raw = socket.socket()
        self.addCleanup(raw.close)
        raw.settimeout(10)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        raw.connect(("127.0.0.1", self.proxy.port))
        secure = context.wrap_socket(raw, server_hostname="localhost")
        self.addCleanup(secure.close)
        return secure


class TlsTest(TlsCase):
    def test_every_dialect_whole_and_streamed_on_one_connection(self) -> None:
        self.assertTrue(self.proxy.url.startswith("https://"))
        with self.secure() as connection:
            for path, make in REQUESTS:
                for stream in (False, True):
                    reply = send(connection, "POST", path, make("hi", stream=stream))
                    self.assertEqual(reply.status, 200, reply.body)
                    self.assertIn(b"hi", reply.body)
            ports = {connection.sock.getsockname()[1]}
            self.assertEqual(send(connection, "GET", "/health").status, 200)
            self.assertEqual({connection.sock.getsockname()[1]}, ports)

    def test_versions_and_the_protocol(self) -> None:
        for version in (ssl.TLSVersion.TLSv1_2, None):
            secure = self.wrapped(version)
            self.assertIn(secure.version(), ("TLSv1.2", "TLSv1.3"))
            secure.sendall(get("/health", "Connection: close"))
            data = b"".join(iter(lambda: secure.recv(65536), b""))     # ends with a close_notify
            self.assertTrue(data.startswith(b"HTTP/1.1 200 "), data[:80])
        self.assertEqual(self.proxy.server._tls.minimum_version, ssl.TLSVersion.TLSv1_2)

    def test_large_bodies_both_ways(self) -> None:
        text = "x" * 300_000
        with self.secure() as connection:
            reply = send(connection, "POST", "/v1/chat/completions", chat(text))
            self.assertEqual(said(reply), "Echo: " + text)
            reply = send(connection, "POST", "/v1/chat/completions",
                         chat("@@events=300 size=500@@", stream=True))
            self.assertTrue(reply.is_done)
            self.assertGreater(len(reply.body), 150_000)

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_a_reader_that_pauses_loses_nothing(self) -> None:
        secure = self.wrapped()
        secure.sendall(post("/v1/chat/completions", chat("@@events=8000 size=1000@@", stream=True),
                            "Connection: close"))
        clients = self.proxy.server.loop.clients
        wait_until(lambda: any(client.is_slow for client in list(clients)), "it is paused")
        data = b"".join(iter(lambda: secure.recv(65536), b""))
        self.assertIn(b"data: [DONE]\n\n", data)
        self.assertTrue(data.endswith(b"0\r\n\r\n"))

    def test_a_request_in_tiny_records_is_understood(self) -> None:
        secure = self.wrapped()
        for byte in post("/v1/chat/completions", chat("drip"), "Connection: close"):
            secure.sendall(bytes([byte]))
        self.assertIn(b"Echo: drip", b"".join(iter(lambda: secure.recv(65536), b"")))

    def test_leaving_ends_the_upstream_call(self) -> None:
        before = self.fake.aborted
        secure = self.wrapped()
        secure.sendall(post("/v1/chat/completions", chat("@@events=50 stall=2@@", stream=True)))
        secure.recv(100)
        secure.close()
        self.assertTrue(self.fake.wait_for(lambda: self.fake.aborted > before))

    def test_plain_http_is_told_what_is_wrong(self) -> None:
        with RawClient(self.proxy.port) as client:
            client.send(get("/health"))
            with contextlib.suppress(ConnectionError):
                data = client.reader.read()
                self.assertIn(b"https only", data)

    def test_stalled_handshakes_block_nobody_and_hold_no_thread(self) -> None:
        hello = bytes.fromhex("16030100c8010000c40303") + b"a" * 20
        busy = set(workers())
        need_files(500)
        stalled = [self.client() for _ in range(100)]
        for client in stalled[::2]:
            client.send(hello)
        with self.secure() as connection:
            self.assertEqual(send(connection, "GET", "/health").status, 200)
        wait_until(lambda: len(self.proxy.server.loop.clients) >= 100, "all are let in")
        self.assertEqual(set(workers()) - busy, set())

    def test_a_handshake_has_a_deadline(self) -> None:
        with unittest.mock.patch.object(cp, "HANDSHAKE_S", 0.1):
            with second_proxy(self, tls_cert=CERTIFICATE,            # type: ignore[arg-type]
                              keepalive_s=0.1) as proxy:
                hellos = b"", b"\x16", bytes.fromhex("16030100c8010000c40303")
                clients = [self.client(proxy) for _ in hellos]
                for client, hello in zip(clients, hellos):
                    client.send(hello)
                for client in clients:
                    self.assertTrue(client.is_closed())

    def test_rubbish_is_closed_and_the_log_stays_quiet(self) -> None:
        start = len(self.proxy.logs)
        for data in (b"\x00" * 300, b"\x16\x03\x01\x00\x05hello", b"\xff" * 20000,
                     b"\x15\x03\x01\x00\x02\x02\x28", b"SSH-2.0-x\r\n"):
            with self.subTest(data=data[:10]):
                client = self.client()
                client.send(data)
                with contextlib.suppress(OSError):
                    client.reader.read()
        with self.secure() as connection:
            self.assertEqual(send(connection, "GET", "/health").status, 200)
        self.assertEqual([r.getMessage() for r in self.proxy.logs[start:] if r.exc_info], [])

    def test_a_shutdown_says_goodbye_inside_tls(self) -> None:
        with second_proxy(self, tls_cert=CERTIFICATE) as proxy:       # type: ignore[arg-type]
            context = ssl.create_default_context(cafile=CERTIFICATE)
            with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as raw:
                secure = context.wrap_socket(raw, server_hostname="localhost")
                self.addCleanup(secure.close)
                self.fake.script(CHAT, Answer(status=0, hold=True))
                secure.sendall(post("/v1/chat/completions", chat("slow")))
                self.assertTrue(self.fake.wait_for(lambda: self.fake.holding == 1))
                thread = threading.Thread(target=proxy.server.finish, args=(0.05,))
                thread.start()
                data = b"".join(iter(lambda: secure.recv(65536), b""))
                thread.join(5)
                self.assertTrue(data.startswith(b"HTTP/1.1 503 "), data[:80])

    def test_files_that_cannot_be_used_are_named_at_the_start(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            key_only = os.path.join(folder, "key.pem")
            with open(CERTIFICATE) as file, open(key_only, "w") as copy:
                copy.write(file.read().partition("-----BEGIN CERT")[0])
            for cert, key in (("/no/such.pem", ""), (key_only, ""), (CERTIFICATE, "/no/such.pem"),
                              (__file__, "")):
                with self.subTest(cert=cert, key=key):
                    with self.assertRaises(cp.ConfigError) as caught:
                        cp.make_server_context(cp.Settings(tls_cert=cert, tls_key=key))
                    self.assertIn("--tls-cert", str(caught.exception))

    def test_the_origin_of_this_server_is_https(self) -> None:
        with self.secure() as connection:
            for origin, status in ((self.proxy.url, 200),
                                   (self.proxy.url.replace("https", "http"), 403)):
                reply = send(connection, "GET", "/v1/models", None, {"Origin": origin})
                self.assertEqual(reply.status, status)


class ThroughputOfIdleTest(SharedCase):
    settings = dict(tls_cert=CERTIFICATE)

    @unittest.skipUnless(SLOW, "COPILOT_PROXY_SLOW_TESTS=1 only")
    def test_connections_that_say_nothing_cost_no_tls_memory(self) -> None:
        before = memory_bytes()
        clients = [self.client() for _ in range(1000)]
        wait_until(lambda: len(self.proxy.server.loop.clients) == 1000)
        self.assertLess(memory_bytes() - before, 20_000_000)
        del clients


if __name__ == "__main__":
    unittest.main()
