"""A call to Copilot: the headers that go up, and which refusals are cured (section 15)."""
from __future__ import annotations

import email.utils
import threading
import time
import unittest
from typing import Any

from support import (PATHS, REQUESTS, ProxyCase, chat, cp, message,
                     release, response, said, second_proxy)
from fake_upstream import CHAT, RESPONSES, Answer, FakeUpstream
from cases import SharedCase, stream_text


class CureTest(ProxyCase):
    settings = dict(hiccup_pause_s=0.001)

    def ask(self, **more: Any) -> Any:
        return self.proxy.post("/v1/chat/completions", chat("a", **more))

    def assert_calls(self, calls: int, exchanges: int) -> None:
        self.assertEqual(self.fake.count(CHAT), calls)
        self.assertEqual(self.fake.exchanges, exchanges)

    def test_401_is_cured_by_one_exchange(self) -> None:
        self.proxy.get("/v1/models")
        self.fake.revoke_tokens()
        self.assertEqual(said(self.ask()), "Echo: a")
        self.assert_calls(2, 2)

    def test_401_that_stays_is_passed_on_after_two_calls(self) -> None:
        self.fake.script(CHAT, *[Answer(status=401, body="unauthorized: token expired")] * 5)
        self.assertEqual(self.ask().status, 401)
        self.assert_calls(2, 2)

    def test_401_about_an_item_id_does_not_touch_the_token(self) -> None:
        self.fake.script(RESPONSES, Answer(status=401, body={"error": {
            "message": "input item ID does not belong to this connection"}}))
        reply = self.proxy.post("/v1/responses", response("a"))
        self.assertIn("input item ID", reply.json["error"]["message"])
        self.assertEqual((self.fake.count(RESPONSES), self.fake.exchanges), (1, 1))

    def test_421_is_cured_by_adopting_the_new_host(self) -> None:
        self.proxy.get("/v1/models")
        with FakeUpstream(share=self.fake) as moved:
            self.fake.move_to(moved.url)
            self.assertEqual(said(self.ask()), "Echo: a")
            self.assert_calls(1, 2)
            self.assertEqual(moved.count(CHAT), 1)
            self.ask()
            self.assertEqual(moved.count(CHAT), 2)

    def test_421_that_stays_is_passed_on_after_two_calls(self) -> None:
        self.fake.script(CHAT, *[Answer(status=421, body="Misdirected Request")] * 5)
        self.assertEqual(self.ask().status, 421)
        self.assert_calls(2, 2)

    def test_466_is_cured_by_another_version_which_is_remembered(self) -> None:
        self.proxy.get("/v1/models")
        self.fake.refused_versions = {cp.API_VERSIONS[0]}
        self.assertEqual(said(self.ask()), "Echo: a")
        self.assertEqual(said(self.ask()), "Echo: a")
        self.assert_calls(3, 1)
        self.assertEqual(self.fake.last(CHAT).headers["x-github-api-version"], cp.API_VERSIONS[1])

    def test_466_of_two_at_once_does_not_skip_the_good_version(self) -> None:
        self.proxy.get("/v1/models")
        self.fake.script(CHAT, *[Answer(status=466, body="no longer", hold=True)] * 2)
        self.fake.refused_versions = {cp.API_VERSIONS[0], cp.API_VERSIONS[2]}
        statuses: list[int] = []
        threads = [threading.Thread(target=lambda: statuses.append(self.ask().status))
                   for _ in range(2)]
        for thread in threads:
            thread.start()
        release(self.fake, 2)
        for thread in threads:
            thread.join(5)
        self.assertEqual(statuses, [200, 200])

    def test_466_with_every_version_is_passed_on(self) -> None:
        self.proxy.get("/v1/models")
        self.fake.refused_versions = set(cp.API_VERSIONS)
        reply = self.ask()
        self.assertEqual(reply.status, 466)
        self.assertIn("API version", reply.json["error"]["message"])
        self.assertLessEqual(self.fake.count(CHAT), 3)

    def test_hiccups_are_tried_once_more(self) -> None:
        for status in (500, 502, 503, 504, 529):
            before = self.fake.count(CHAT)
            self.fake.script(CHAT, Answer(status=status, body="<html>oops</html>"))
            self.assertEqual(said(self.ask()), "Echo: a")
            self.assertEqual(self.fake.count(CHAT), before + 2)

    def test_hiccups_that_stay_are_passed_on_after_two_calls(self) -> None:
        for path, make in REQUESTS:
            self.fake.script(PATHS[path], *[Answer(status=503, body="busy")] * 2)
            reply = self.proxy.post(path, make("a", stream=True))
            self.assertEqual(reply.status, 503)
            self.assertEqual(self.fake.count(PATHS[path]), 2)
            kind = reply.json["error"]["type"]
            self.assertEqual(kind, "overloaded_error" if path == "/v1/messages"
                             else "server_error")

    def test_no_more_than_two_cures(self) -> None:
        self.fake.script(CHAT, Answer(status=401, body="token"), Answer(status=503, body="busy"),
                         Answer(status=466, body="version"), Answer(status=466, body="version"))
        self.assertEqual(self.ask().status, 466)
        self.assertEqual(self.fake.count(CHAT), 3)

    def forget_limits(self) -> None:
        self.proxy.app.login.account.limits.clear()               # type: ignore[union-attr]

    def in_seconds(self, after: str) -> float:
        """What is told of a retry-after: seconds, as all clients read them."""
        if after.isdigit():
            return int(after)
        return max(1.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())

    def test_429_and_402_are_passed_on_at_once_with_retry_after(self) -> None:
        cases = ((429, "36000", "user_weekly_rate_limited"), (429, "2", "rate_limited"),
                 (402, "Wed, 02 Dec 2026 00:00:00 GMT", "quota_exceeded"))
        for path, make in REQUESTS:
            for status, after, code in cases:
                for stream in (False, True):
                    before = self.fake.count(PATHS[path])
                    self.forget_limits()
                    self.fake.script(PATHS[path], Answer(
                        status=status, headers={"retry-after": after, "x-ratelimit-exceeded": "b"},
                        body={"error": {"message": "slow down", "code": code}}))
                    reply = self.proxy.post(path, make("a", stream=stream))
                    self.assertEqual(reply.status, status)
                    self.assertAlmostEqual(int(reply.headers["retry-after"]),
                                           self.in_seconds(after), delta=5)
                    self.assertEqual(reply.headers["x-ratelimit-exceeded"], "b")
                    self.assertIn("slow down", reply.json["error"]["message"])
                    self.assertEqual(self.fake.count(PATHS[path]), before + 1)

    def test_other_refusals_are_passed_on_after_one_call(self) -> None:
        for status in (400, 402, 403, 404, 413, 422, 429, 499):
            before = self.fake.count(CHAT)
            self.forget_limits()
            self.fake.script(CHAT, Answer(status=status, body={"error": {"message": "no"}}))
            self.assertEqual(self.ask().status, status)
            self.assertEqual(self.fake.count(CHAT), before + 1)
        self.assertEqual(self.fake.exchanges, 1)

    def test_403_with_a_token_code_is_cured_by_one_exchange(self) -> None:
        for number, code in enumerate(("expired_token", "invalid_token", "token_expired")):
            self.fake.script(CHAT, Answer(status=403, body={"error": {"message": "m",
                                                                      "code": code}}))
            self.assertEqual(self.ask().status, 200)
            self.assertEqual(self.fake.exchanges, number + 2)

    def test_an_opaque_403_is_cured_by_one_exchange(self) -> None:
        self.fake.script(CHAT, Answer(status=403, body="Forbidden"))
        self.assertEqual(self.ask().status, 200)
        self.assert_calls(2, 2)

    def test_an_opaque_403_that_stays_leaves_the_token_alone_for_a_while(self) -> None:
        self.fake.script(CHAT, *[Answer(status=403, body="Forbidden")] * 3)
        self.assertEqual(self.ask().status, 403)
        self.assert_calls(2, 2)
        self.assertEqual(self.ask().status, 403)
        self.assert_calls(3, 2)

    def test_an_opaque_403_that_was_cured_may_be_cured_again(self) -> None:
        for number in range(2):
            self.fake.script(CHAT, Answer(status=403, body="Forbidden"))
            self.assertEqual(self.ask().status, 200)
            self.assert_calls(2 * number + 2, number + 2)

    def test_a_cured_stream_has_no_trace_of_the_first_try(self) -> None:
        for path, make in REQUESTS:
            self.fake.script(PATHS[path], Answer(status=500, body="oops"))
            reply = self.proxy.stream(path, make("twice"))
            self.assertEqual((reply.status, stream_text(path, reply.events)),
                             (200, "Echo: twice"))


class HeaderTest(SharedCase):
    def sent_by(self, path: str, body: Any, **headers: str) -> dict[str, str]:
        reply = self.proxy.post(path, body, **headers)
        self.assertEqual(reply.status, 200, reply.body)
        return self.fake.last(PATHS[path]).headers

    def test_the_initiator_is_told_truly(self) -> None:
        call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "ok"}
        use = {"role": "assistant", "content": [
            {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}]}
        reminder = {"type": "text", "text": "<system-reminder>be brief</system-reminder>"}
        human = {"role": "user", "content": "hi"}
        back = {"role": "assistant", "content": "hello"}
        cases: tuple[tuple[str, str, Any], ...] = (
            ("user", "/v1/chat/completions", chat("a")),
            ("user", "/v1/chat/completions", chat("", messages=[human, back, human])),
            ("agent", "/v1/chat/completions", chat("", messages=[
                human, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": "r"}])),
            ("agent", "/v1/chat/completions", chat(
                "Continue if you have next steps, or stop and ask for clarification")),
            ("user", "/v1/responses", response("a")),
            ("user", "/v1/responses", dict(response(""), input=[human])),
            ("agent", "/v1/responses", dict(response(""), input=[
                human, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "r"}])),
            ("user", "/v1/messages", message("a")),
            ("user", "/v1/messages", dict(message(""), messages=[human, back, human])),
            ("agent", "/v1/messages", dict(message(""), messages=[
                human, use, {"role": "user", "content": [result]}])),
            ("agent", "/v1/messages", dict(message(""), messages=[
                human, use, {"role": "user", "content": [result, reminder]}])),
            ("user", "/v1/messages", dict(message(""), messages=[
                human, use, {"role": "user", "content": [
                    result, {"type": "text", "text": "stop"}]}])))
        for wanted, path, body in cases:
            with self.subTest(path=path, body=str(body)[-80:]):
                self.assertEqual(self.sent_by(path, body)["x-initiator"], wanted)

    def test_a_client_that_names_the_initiator_is_believed(self) -> None:
        for path, make in REQUESTS:
            for word in ("agent", "user"):
                found = self.sent_by(path, make("a"), **{"X-Initiator": word})
                self.assertEqual(found["x-initiator"], word)
            found = self.sent_by(path, make("a"), **{"X-Initiator": "nonsense"})
            self.assertEqual(found["x-initiator"], "user")

    def test_images_are_announced_also_inside_tool_results(self) -> None:
        url = "data:image/png;base64,iVBORw0KGgo="
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                             "data": "iVBORw0KGgo="}}
        use = {"role": "assistant", "content": [
            {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}]}
        human = {"role": "user", "content": "look"}
        cases: tuple[tuple[str, Any], ...] = (
            ("/v1/chat/completions", chat("", messages=[{"role": "user", "content": [
                {"type": "text", "text": "a"}, {"type": "image_url",
                                                "image_url": {"url": url}}]}])),
            ("/v1/responses", dict(response(""), input=[{"role": "user", "content": [
                {"type": "input_image", "image_url": url}]}])),
            ("/v1/responses", dict(response(""), input=[
                dict(human), {"type": "function_call", "call_id": "c", "name": "f",
                              "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": [
                    {"type": "input_image", "image_url": url}]}])),
            ("/v1/messages", dict(message(""), messages=[{"role": "user", "content": [image]}])),
            ("/v1/messages", dict(message(""), messages=[human, use, {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [image]}]}])))
        for path, body in cases:
            with self.subTest(path):
                self.assertEqual(self.sent_by(path, body)["copilot-vision-request"], "true")
        for path, make in REQUESTS:
            self.assertNotIn("copilot-vision-request", self.sent_by(path, make("a")))

    def test_no_header_of_the_client_is_forwarded(self) -> None:
        given = {"Authorization": "Bearer sk-mine", "x-api-key": "sk-mine", "api-key": "sk-mine",
                 "x-goog-api-key": "sk-mine", "Cookie": "a=sk-mine", "User-Agent": "sk-mine",
                 "x-stainless-lang": "sk-mine", "Referer": "http://sk-mine", "x-app": "sk-mine",
                 "openai-organization": "sk-mine", "X-Forwarded-For": "1.2.3.4",
                 "session_id": "sk-mine", "X-Request-Id": "sk-mine", "traceparent": "sk-mine",
                 "openai-beta": "sk-mine", "anthropic-dangerous-direct-browser-access": "true",
                 "Accept-Encoding": "gzip", "Accept": "text/sk-mine"}
        for path, make in REQUESTS:
            for body in (make("a"), make("a", stream=True)):
                sent = self.sent_by(path, body, **given)
                self.assertNotIn("sk-mine", str(sent))
                self.assertNotIn("x-forwarded-for", sent)
                self.assertEqual(sent["accept-encoding"], "identity")
                bearer = sent["authorization"].partition(" ")[2]
                self.assertIn(bearer, self.fake.tokens)

    def test_only_known_betas_go_up(self) -> None:
        sent = self.sent_by("/v1/messages", message("a"), **{
            "anthropic-beta": "claude-code-20250219, interleaved-thinking-2025-05-14,context-1m-1"})
        self.assertEqual(sent["anthropic-beta"], "interleaved-thinking-2025-05-14")
        sent = self.sent_by("/v1/messages", message("a"), **{"anthropic-beta": "context-1m-1"})
        self.assertNotIn("anthropic-beta", sent)
        self.assertEqual(sent["anthropic-version"], "2023-06-01")

    def test_header_overrides_go_up(self) -> None:
        with second_proxy(self, header=(                            # type: ignore[arg-type]
                "editor-version=vscode/9.9.9", "X-GitHub-Api-Version=2099-01-01",
                "X-Extra=yes")) as proxy:
            for path, make in REQUESTS:
                self.assertEqual(proxy.post(path, make("a")).status, 200)
                sent = self.fake.last(PATHS[path]).headers
                self.assertEqual((sent["editor-version"], sent["x-github-api-version"],
                                  sent["x-extra"]), ("vscode/9.9.9", "2099-01-01", "yes"))

    def test_an_overridden_version_is_not_replaced_after_a_466(self) -> None:
        with second_proxy(self, header=(                            # type: ignore[arg-type]
                "X-GitHub-Api-Version=2099-01-01",)) as proxy:
            proxy.get("/v1/models")
            before = self.fake.count(CHAT)
            self.fake.script(CHAT, Answer(status=466, body="old"))
            self.assertEqual(proxy.post("/v1/chat/completions", chat("a")).status, 466)
            self.assertEqual(self.fake.count(CHAT), before + 1)

    def test_a_body_that_needs_no_change_goes_up_byte_for_byte(self) -> None:
        data = b'{ "model":"gpt-4.1",  "messages" : [{"role":"user","content":"\\u00e9 \xc3\xa9"}]}'
        self.proxy.request("POST", "/v1/chat/completions", data)
        self.assertEqual(self.fake.last(CHAT).body, data)

    def test_only_the_models_name_changes_where_only_that_must(self) -> None:
        data = b'{"messages":[{"role":"user","content":"a"}],  "model" : "openai/gpt-4.1","n":1}'
        self.proxy.request("POST", "/v1/chat/completions", data)
        self.assertEqual(self.fake.last(CHAT).body,
                         data.replace(b'"model" : "openai/gpt-4.1"', b'"model":"gpt-4.1"'))


if __name__ == "__main__":
    unittest.main()
