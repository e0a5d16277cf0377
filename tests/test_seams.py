"""Where parts meet: one request that takes several calls, an answer that comes in two ways."""
from __future__ import annotations

import json
import threading
import time
import unittest
from typing import Any, Iterator

from support import Proxy, ProxyCase, chat, raw_exchange, response, wait_until
from fake_upstream import Answer
import copilot_proxy as cp

CHAT, RESPONSES = "/chat/completions", "/responses"
PROMPTS = {"model": "gpt-4.1", "prompt": ["One", "Two"]}


def used_up() -> Answer:
    return Answer(status=402, body={"error": {"message": "none left", "code": "quota_exceeded"}})


class SeveralCallsTest(ProxyCase):
    """A client's request is one request, also when it takes several calls upstream."""

    def test_the_fallback_answers_every_prompt_of_a_completion(self) -> None:
        with Proxy(self.fake, fallback="gpt-4o") as proxy:
            self.fake.script(CHAT, used_up())
            reply = proxy.post("/v1/completions", PROMPTS)
            self.assertEqual((reply.status, len(reply.json.get("choices", ()))), (200, 2))
            self.assertEqual(self.fake.count(CHAT), 3)

    def test_the_fallback_of_the_fallback_is_its_error(self) -> None:
        with Proxy(self.fake, fallback="gpt-4o") as proxy:
            self.fake.script(CHAT, used_up(), used_up())
            self.assertEqual(proxy.post("/v1/completions", PROMPTS).status, 402)
            self.assertEqual(self.fake.count(CHAT), 2)

    def test_the_fallback_compacts_and_nothing_wrong_is_learned(self) -> None:
        with Proxy(self.fake, fallback="gpt-4o") as proxy:
            self.fake.compacts = True
            self.fake.script(RESPONSES, used_up())
            for _ in range(2):                           # gpt-4o knows no compaction of its own
                reply = proxy.post("/v1/responses/compact", response("Hello"))
                self.assertEqual((reply.status, reply.json["output"][0]["type"]),
                                 (200, "compaction"))
            proxy.app.login.account.limits.clear()
            proxy.post("/v1/responses/compact", response("Hello"))
            self.assertEqual(self.fake.last(RESPONSES).json["input"][-1],
                             {"type": "compaction_trigger"})

    def test_limits_admit_it_once_when_its_second_call_only_repeats_the_first(self) -> None:
        path, body = "/v1/responses/compact", response("Hello")
        for limit in ({"rate_limit": 60.0}, {"requests_per_minute": 1}):
            with self.subTest(limit=limit), Proxy(self.fake, **limit) as proxy:
                self.assertEqual(proxy.post(path, body).status, 200)
                self.assertEqual(proxy.post(path, body).status, 429)

    def test_limits_count_every_prompt_of_a_completion(self) -> None:
        for limit, calls in (({"requests_per_minute": 3}, 2), ({"rate_limit": 0.05}, 2)):
            with self.subTest(limit=limit), Proxy(self.fake, **limit) as proxy:
                before = self.fake.count(CHAT)
                self.assertEqual(proxy.post("/v1/completions", PROMPTS).status, 200)
                self.assertEqual(proxy.post("/v1/completions", PROMPTS).status, 429)
                self.assertEqual(self.fake.count(CHAT) - before, calls)


class WholeForStreamTest(ProxyCase):
    """A stream was asked for, and a whole answer comes, slowly."""

    settings = {"keepalive_s": 0.05}

    def slow(self, end: bool = True) -> Answer:
        def parts() -> Iterator[bytes]:
            time.sleep(0.3)
            yield json.dumps({"id": "a", "object": "chat.completion", "created": 1,
                              "model": "gpt-4.1", "choices": [{
                                  "index": 0, "finish_reason": "stop",
                                  "message": {"role": "assistant", "content": "Hi"}}]}).encode()
        chunks: Any = parts()
        return Answer(chunks=chunks, headers={"content-type": "application/json"}, end=end)

    def post(self, path: str, body: Any) -> bytes:
        data = json.dumps(dict(body, stream=True)).encode()
        return raw_exchange(self.proxy.port, b"POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: "
                            b"close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                            % (path.encode(), len(data)) + data)

    def test_there_is_one_head(self) -> None:
        self.fake.script(CHAT, self.slow())
        answer = self.post("/v1/chat/completions", chat("Hello"))
        self.assertEqual(answer.count(b"HTTP/1.1 "), 1)
        self.assertEqual(json.loads(answer.partition(b"\r\n\r\n")[2])["id"], "a")

    def test_a_failure_after_the_first_byte_is_in_the_history(self) -> None:
        self.fake.script(CHAT, self.slow(end=False))
        self.post("/v1/messages", dict(chat("Hello"), max_tokens=100))
        row = wait_until(lambda: list(self.proxy.app.ledger.recent))[0]
        self.assertEqual((row["status"], row["error"]), (200, "upstream_stream_ended"))
        self.assertEqual(self.proxy.get("/stats").json["totals"]["errors"], 1)


class BudgetLockTest(unittest.TestCase):
    def test_sessions_may_come_while_the_budget_is_read(self) -> None:
        """The dictionary of limits is looked through by all and changed by each new session."""
        budget = cp.Budget(0, time.time, cp.logging.getLogger("copilot_proxy"), lambda *a: None)
        budget.loaded.set()
        budget._spent[""] = 0

        class Guarded(dict):                                      # type: ignore[type-arg]
            def __setitem__(self, key: Any, value: Any) -> None:
                assert budget._lock.locked(), "changed without the lock"
                super().__setitem__(key, value)

        budget._limits = Guarded()
        cp.run(budget.admit("a", "5"))
        self.assertEqual(budget._limits, {"a": 5})

    def test_a_known_session_may_change_its_budget_when_there_is_no_room_for_new_ones(self) -> None:
        budget = cp.Budget(0, time.time, cp.logging.getLogger("copilot_proxy"), lambda *a: None)
        budget.loaded.set()
        budget._limits = {"s%d" % number: 5.0 for number in range(cp.MAX_SESSIONS)}
        budget._add({"s1": 6 * cp.NANO})
        with self.assertRaises(cp.RateLimited):
            cp.run(budget.admit("s1", "5"))
        cp.run(budget.admit("s1", "7"))


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
