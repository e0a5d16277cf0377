"""What the page changes, by its routes (section 20): running requests are stopped, approvals last,
keys are made and a login ends; and what it learns of running requests and of retired names."""
from __future__ import annotations

import json
import sys
import threading
import time
import unittest
from typing import Any
from unittest import mock

from fake_upstream import CHAT, MESSAGES, RESPONSES, Answer
from socket_client import Socket
from support import (Proxy, ProxyCase, Reply, bearer, chat, cp, message, response,
                     second_proxy, wait_until)
from cases import ManualCase

FOREIGN = {"Origin": "https://app.example"}


def ollama(text: str, **more: Any) -> dict[str, Any]:
    return dict(chat(text), **more)


class HoldingCase(ProxyCase):
    def let_go(self) -> None:
        """What the fake holds; it may have noticed already that nobody waits for it."""
        while not self.fake.wait_for(lambda: self.fake.holding == 0, 0.02):
            self.fake.release()


class Stopping(HoldingCase):
    def begin(self, path: str, body: Any, proxy: Proxy | None = None,
              **headers: str) -> tuple[threading.Thread, list[Reply]]:
        replies: list[Reply] = []
        thread = threading.Thread(target=lambda: replies.append(
            (proxy or self.proxy).post(path, body, **headers)))
        thread.start()
        self.addCleanup(thread.join, 20)
        self.addCleanup(self.fake.release)
        return thread, replies

    def running(self, proxy: Proxy | None = None) -> dict[str, Any]:
        found = wait_until(lambda: (proxy or self.proxy).get("/stats").json["running"])
        return found[0]  # type: ignore[no-any-return]

    def stop(self, request_id: Any, proxy: Proxy | None = None, **headers: str) -> Reply:
        return (proxy or self.proxy).post("/requests/stop", {"id": request_id}, **headers)

    def test_a_stream_ends_with_the_error_of_its_dialect(self) -> None:
        stalled = "@@stall=2@@ one two three four"
        for path, body, error in (
                ("/v1/chat/completions", chat(stalled), '"error":{"message":"a person stopped'),
                ("/v1/chat/completions", chat(stalled, "claude-sonnet-4.6"), '"error":{'),
                ("/v1/chat/completions", chat(stalled, "gpt-5.3-codex"), '"error":{'),
                ("/v1/messages", message(stalled), "event: error"),
                ("/v1/messages", message(stalled, "gpt-4.1"), "event: error"),
                ("/v1/responses", response(stalled), "response.failed"),
                ("/v1/responses", response(stalled, "claude-sonnet-4.6"), "response.failed"),
                ("/api/chat", ollama(stalled), '"error":"a person stopped')):
            with self.subTest(path=path, model=body["model"]):
                thread, replies = self.begin(path, dict(body, stream=True))
                wait_until(lambda: self.running()["first_ms"])
                wait_until(lambda: self.fake.holding)
                self.assertEqual(self.stop(self.running()["id"]).json["stopped"], True)
                thread.join(10)
                text = replies[0].body.decode()
                self.assertEqual(replies[0].status, 200)
                self.assertIn(error, text)
                self.assertIn("a person stopped this request", text)
                self.assertNotIn("[DONE]", text)
                row = self.proxy.get("/stats").json["recent"][0]
                self.assertEqual((row["error"], row["path"] is None), ("request_stopped", False))
                self.assertEqual(self.proxy.get("/stats").json["totals"]["errors"], 0)
                self.let_go()

    def test_a_request_on_a_websocket_is_stopped_and_the_next_one_is_answered(self) -> None:
        socket = self.enter(Socket(self.proxy.port))
        for model in ("gpt-5.3-codex", "claude-sonnet-4.6"):
            with self.subTest(model=model):
                socket.create(response("@@events=3 stall=1@@", model))
                while socket.event()["type"] != "response.output_text.delta":
                    pass
                self.assertEqual(self.stop(self.running()["id"]).status, 200)
                last = socket.events()[-1]
                self.assertIn(last["type"], ("response.failed", "error"))
                self.assertIn("a person stopped this request", json.dumps(last))
                self.let_go()
                self.assertEqual(socket.turn(response("hi", model))[-1]["type"],
                                 "response.completed")

    def test_a_whole_answer_is_refused_with_a_status_that_no_client_tries_again(self) -> None:
        for path, make, upstream in (("/v1/chat/completions", chat, CHAT),
                                     ("/v1/messages", message, MESSAGES),
                                     ("/v1/responses", response, RESPONSES)):
            with self.subTest(path=path):
                self.fake.script(upstream, Answer(status=0, hold=True))
                thread, replies = self.begin(path, make("a"))
                wait_until(lambda: self.fake.holding)
                self.assertEqual(self.stop(self.running()["id"]).status, 200)
                thread.join(10)
                self.assertEqual(replies[0].status, 403)
                self.assertIn("a person stopped", replies[0].body.decode())
                self.let_go()
                self.assertEqual(self.fake.count(upstream), 1)

    def test_the_upstream_connection_is_given_up_with_it(self) -> None:
        thread, _ = self.begin("/v1/chat/completions", chat("@@stall=1@@ a b c", stream=True))
        wait_until(lambda: self.fake.holding)
        self.stop(self.running()["id"])
        thread.join(10)
        self.assertEqual(self.proxy.get("/stats").json["running"], [])

    def test_what_does_not_run_is_404_and_others_pages_cannot(self) -> None:
        for wrong in ("0" * 32, None, 5, {}, []):
            self.assertEqual(self.stop(wrong).status, 404, wrong)
        self.proxy.settings.cors_origin = ("https://app.example",)
        self.fake.script(CHAT, Answer(status=0, hold=True))
        thread, replies = self.begin("/v1/chat/completions", chat("a"))
        request_id = self.running()["id"]
        wait_until(lambda: self.fake.holding)             # else it would be let go too early
        self.assertEqual(self.stop(request_id, **FOREIGN).status, 403)
        self.assertEqual(self.proxy.get("/requests/stop").status, 405)
        self.assertTrue(self.fake.wait_for(lambda: self.fake.holding == 1, 10))
        self.let_go()
        thread.join(10)
        self.assertEqual(replies[0].status, 200)

    def test_a_key_of_one_account_stops_no_request_of_another(self) -> None:
        with second_proxy(self, api_key=("made-up-operator-key",)) as proxy:
            key = "made-up-account-key"
            proxy.app.accounts.issue_key(key, "hubot", "ghu_hubot")
            operator = bearer("made-up-operator-key")
            self.fake.script(CHAT, Answer(status=0, hold=True))
            thread, replies = self.begin("/v1/chat/completions", chat("a"), proxy, **operator)
            found = wait_until(lambda: proxy.get("/stats", **operator).json["running"])
            self.assertEqual(self.stop(found[0]["id"], proxy, **bearer(key)).status, 404)
            self.assertEqual(self.stop(found[0]["id"], proxy).status, 401)
            self.assertEqual(self.stop(found[0]["id"], proxy, **operator).status, 200)
            thread.join(10)
            self.assertEqual(replies[0].status, 403)


class Progress(HoldingCase):
    def test_readers_see_a_running_stream_grow(self) -> None:
        with mock.patch.object(cp, "PAGE_PROGRESS_S", 0.02):
            sock = self.proxy.connect()
            self.addCleanup(sock.close)
            sock.sendall(b"GET /history/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            file = sock.makefile("rb")
            self.addCleanup(file.close)
            thread = threading.Thread(target=self.proxy.stream, args=(
                "/v1/messages", message("@@stall=2@@ one two three")))
            thread.start()
            self.addCleanup(thread.join, 10)
            self.addCleanup(self.fake.release)
            seen = 0
            while not seen:
                line = file.readline()
                self.assertTrue(line)
                if line == b"event: progress\n":
                    rows = json.loads(file.readline()[len(b"data: "):])
                    seen = rows[0]["received_bytes"]
            self.assertGreater(rows[0]["input"], 0)
            wait_until(lambda: self.fake.holding)
            self.let_go()


class Standing(ManualCase):
    def ask(self, agent: str) -> tuple[threading.Thread, list[Reply]]:
        return self.begin("may I?", agent)

    def waiting(self, number: int) -> list[dict[str, Any]]:
        return wait_until(lambda: (lambda found: len(found) == number and found)(  # type: ignore
            self.proxy.get("/approvals").json["approvals"]))

    def test_always_holds_for_the_program_its_updates_and_those_that_wait(self) -> None:
        asked = [self.ask("codex_cli_rs/0.1"), self.ask("codex_cli_rs/0.2")]
        found = self.waiting(2)
        self.assertEqual(found[0]["tokens"], len(json.dumps(chat("may I?"))) // 4)
        self.assertEqual(self.proxy.post("/approvals/" + found[0]["id"], {
            "allow": True, "always": True}).status, 200)
        for thread, replies in asked:
            thread.join(10)
            self.assertEqual(replies[0].status, 200)
        thread, replies = self.ask("codex_cli_rs/0.3")
        thread.join(10)
        self.assertEqual(replies[0].status, 200)
        self.assertEqual(self.proxy.get("/stats").json["standing"],
                         [{"who": "127.0.0.1", "program": "Codex"}])
        thread, replies = self.ask("curl/8")              # another program still asks
        other = self.waiting(1)[0]
        self.proxy.post("/approvals/" + other["id"], {"allow": False})
        thread.join(10)
        self.assertEqual(replies[0].status, 403)

    def test_it_can_be_taken_back(self) -> None:
        thread, _ = self.ask("curl/8")
        self.proxy.post("/approvals/" + self.waiting(1)[0]["id"], {"allow": True, "always": True})
        thread.join(10)
        answer = self.proxy.request("DELETE", "/approvals").json
        self.assertEqual(answer, {"approvals": [], "standing": []})
        thread, replies = self.ask("curl/8")
        self.proxy.post("/approvals/" + self.waiting(1)[0]["id"], {"allow": False})
        thread.join(10)
        self.assertEqual(replies[0].status, 403)

    def test_odd_answers_are_refused(self) -> None:
        thread, _ = self.ask("curl/8")
        path = "/approvals/" + self.waiting(1)[0]["id"]
        for body in ({"allow": "yes"}, {"allow": False, "always": True},
                     {"allow": True, "always": 1}, {"allow": [], "always": {}}, {}):
            self.assertEqual(self.proxy.post(path, body).status, 400, body)
        self.assertEqual(self.proxy.post(path, {"allow": False}).status, 200)
        thread.join(10)


class Keys(ProxyCase):
    settings = dict(api_key=("made-up-operator-key",))
    operator = bearer("made-up-operator-key")

    def test_a_key_is_made_shown_once_used_and_ended(self) -> None:
        made = self.proxy.post("/auth/tokens", {}, **self.operator)
        self.assertEqual(made.headers["cache-control"], "no-store")
        key, key_id = made.json["key"], made.json["key_id"]
        self.assertEqual(self.proxy.get("/models", **bearer(key)).status, 200)
        listed = self.proxy.get("/auth/tokens", **self.operator)
        self.assertIn(key_id, {entry["key_id"] for entry in listed.json["data"]})
        self.assertNotIn(key, listed.body.decode())
        self.assertNotIn(key, self.proxy.log_text())
        self.assertEqual(self.proxy.request("DELETE", "/auth/tokens/" + key_id,
                                            headers=self.operator).status, 200)
        self.assertEqual(self.proxy.get("/models", **bearer(key)).status, 401)

    def test_an_accounts_key_makes_none_and_ends_no_login(self) -> None:
        self.proxy.app.accounts.issue_key("made-up-account-key", "hubot", "ghu_hubot")
        for path in ("/auth/tokens", "/auth/logout"):
            self.assertEqual(self.proxy.post(path, {}, **bearer("made-up-account-key")).status,
                             403, path)
            self.assertEqual(self.proxy.post(path, {}).status, 401, path)

    def test_a_page_of_another_origin_cannot(self) -> None:
        self.proxy.settings.cors_origin = ("https://app.example",)
        for path in ("/auth/tokens", "/auth/logout"):
            reply = self.proxy.post(path, {}, **self.operator, **FOREIGN)
            self.assertEqual(reply.status, 403, path)
        self.assertEqual(self.proxy.request("DELETE", "/approvals", headers=dict(
            self.operator, **FOREIGN)).status, 403)


class LoggingOut(ProxyCase):
    def test_the_stored_login_is_deleted_and_another_can_follow(self) -> None:
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("a")).status, 200)
        if self.proxy.settings.github_token:
            self.proxy.settings.github_token = ""
        self.proxy.app.login.file.save("ghu_stored")
        self.assertEqual(self.proxy.post("/auth/logout", {}).status, 200)
        self.assertEqual(self.proxy.app.login.file.load(), "")
        self.assertEqual(self.proxy.get("/health").json["status"], "login_required")
        self.assertEqual(self.proxy.post("/v1/chat/completions", chat("a")).status, 401)
        self.assertEqual(self.fake.count(CHAT), 1)
        begun = self.proxy.post("/auth/device/start", {}).json
        self.assertGreater(begun["expires_at"], time.time())
        self.assertEqual(self.proxy.get("/health").json["login"]["expires_at"],
                         begun["expires_at"])

    def test_a_given_login_is_the_operators_to_end(self) -> None:
        with second_proxy(self, github_token="ghu_given") as proxy:
            reply = proxy.post("/auth/logout", {})
            self.assertEqual(reply.status, 409)
            self.assertIn("--github-token", reply.json["error"]["message"])


class Retired(ProxyCase):
    settings = dict(no_history=False, model_alias=("fast=gpt-4.1", "dead=gpt-5.1"))

    def test_retired_names_aliases_and_what_clients_asked_for(self) -> None:
        self.proxy.post("/v1/chat/completions", chat("a", "o3-mini"),
                        **{"User-Agent": "codex_cli_rs/0.1"})
        self.proxy.post("/v1/chat/completions", chat("a", "claude-sonnet-4-6"))
        wait_until(lambda: len(self.proxy.get("/history").json["rows"]) == 2)
        told = self.proxy.get("/retired").json
        lines = {line["name"]: line for line in told["data"]}
        self.assertEqual((lines["fast"]["alias"], lines["fast"]["fate"]), ("gpt-4.1", ""))
        self.assertEqual(lines["dead"]["alias"], "gpt-5.1")
        self.assertIn("answers instead", lines["dead"]["fate"])
        self.assertEqual(lines["o3-mini"]["retired"], cp.RETIRED_MODELS["o3-mini"])
        self.assertIn("GitHub retired it", lines["o3-mini"]["fate"])
        self.assertEqual(lines["gpt-4.1"]["fate"], "")    # this account still has it
        self.assertEqual([(line["asked"], line["client"], line["requests"], line["fate"])
                          for line in told["asked"]],
                         [("o3-mini", "codex_cli_rs/0.1", 1, lines["o3-mini"]["fate"])])


if __name__ == "__main__":
    sys.exit(unittest.main())
