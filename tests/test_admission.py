"""When a request may go up: one ticket, all limits in order, one leave (section 17)."""
from __future__ import annotations

import contextlib
import io
import json
import logging
import threading
import time
import unittest
from typing import Any, Dict, List
from unittest import mock

from support import (PATHS, REQUESTS, ProxyCase, RawClient, Reply, chat, cp, message, post, said,
                     second_proxy, wait_until)
from fake_upstream import CHAT, MESSAGES
from cases import HistoryCase, Reader, SharedCase

GONE_S = 1.0                       # in which a client's leaving must reach the upstream
LOG = logging.getLogger("copilot_proxy")


class AdmissionTest(unittest.TestCase):
    def admission(self, **settings: Any) -> cp.Admission:
        values = cp.Settings(**settings).check()
        budget = cp.Budget(values.budget, lambda: 0.0, LOG, lambda *about: None)
        budget.loaded.set()
        return cp.Admission(values, LOG, budget, lambda *about: None)

    def ticket(self, wish: str | None = None) -> cp.Ticket:
        class Account:
            name = "octocat"
            limiter = cp.RateLimiter(0.0, False)

        return cp.Ticket("key", None, wish, Account(), {})            # type: ignore[arg-type]

    def test_without_limits_nothing_is_held(self) -> None:
        admission, ticket = self.admission(), self.ticket()
        self.assertEqual(cp.run(admission.admit(ticket)), {})
        self.assertEqual((ticket.is_admitted, ticket.has_slot), (True, False))
        admission.leave(ticket)

    def test_a_slot_is_given_back_once_whatever_is_said_twice(self) -> None:
        admission, ticket = self.admission(max_concurrency=1), self.ticket()
        cp.run(admission.admit(ticket))
        self.assertEqual(admission.gate._running, 1)
        for _ in range(2):
            admission.leave(ticket)
        admission.leave(None)
        self.assertEqual(admission.gate._running, 0)

    def test_what_a_later_limit_refuses_is_not_admitted_and_gives_its_slot_back(self) -> None:
        admission, ticket = self.admission(max_concurrency=1, rate_limit=60.0), self.ticket()
        ticket.account.limiter = cp.RateLimiter(60.0, False)
        cp.run(ticket.account.limiter.admit())
        with self.assertRaises(cp.RateLimited):
            cp.run(admission.admit(ticket))
        self.assertEqual((ticket.is_admitted, ticket.has_slot), (False, True))
        admission.leave(ticket)
        self.assertEqual(admission.gate._running, 0)

    def test_the_minute_says_what_is_left(self) -> None:
        admission = self.admission(requests_per_minute=2)
        headers = cp.run(admission.admit(self.ticket()))
        self.assertEqual(headers["x-ratelimit-remaining-requests"], "1")

    def test_nonsense_in_the_budget_header_is_refused_each_time(self) -> None:
        admission, ticket = self.admission(), self.ticket("much")
        for _ in range(2):
            with self.assertRaises(cp.BadRequest):
                cp.run(admission.admit(ticket))


class OnceTest(ProxyCase):
    settings = {"max_concurrency": 1, "requests_per_minute": 1}

    def test_a_compaction_of_two_calls_counts_once_and_leaves_its_slot(self) -> None:
        reply = self.proxy.post("/v1/responses/compact", {"model": "gpt-5-mini", "input": "a"})
        self.assertEqual(reply.status, 200, reply.body)
        self.assertEqual(reply.headers["x-ratelimit-remaining-requests"], "0")
        wait_until(lambda: self.proxy.app.admission.gate._running == 0)

    def test_a_refused_header_lets_no_second_call_through(self) -> None:
        reply = self.proxy.post("/v1/responses/compact", {"model": "gpt-5.3-codex", "input": "a"},
                                **{"x-copilot-proxy-budget": "much"})
        self.assertEqual(reply.status, 400, reply.body)
        self.assertEqual(self.fake.count("/responses"), 0)


class PolicyTest(SharedCase):
    def setUp(self) -> None:
        self.sent = self.new_sent()

    def asked(self) -> list[str]:
        """What went up to a model."""
        return [record.path for record in self.sent() if record.path in PATHS.values()]

    def test_too_early_is_429_with_retry_after_and_nothing_goes_up(self) -> None:
        with second_proxy(self, rate_limit=60.0) as proxy:  # type: ignore[arg-type]
            self.assertEqual(proxy.post("/v1/chat/completions", chat("a")).status, 200)
            for path, make in REQUESTS:
                reply = proxy.post(path, make("b"))
                self.assertEqual(reply.status, 429, reply.body)
                self.assertEqual(reply.json["error"]["type"], "rate_limit_error")
                self.assertTrue(1 <= int(reply.headers["retry-after"]) <= 61)
            self.assertEqual(proxy.get("/v1/models").status, 200)       # not limited
            self.assertEqual(self.asked(), [CHAT])

    def test_waiting_requests_go_up_in_their_order_and_apart(self) -> None:
        interval = 0.06
        with second_proxy(self, rate_limit=interval, wait=True) as proxy:  # type: ignore[arg-type]
            proxy.get("/v1/models")
            times: list[float] = []
            limiter = proxy.app.login.account.limiter
            real = limiter.admit
            arrived: list[int] = []

            async def admit() -> None:
                arrived.append(len(arrived))
                await real()
                times.append(time.monotonic())

            with mock.patch.object(limiter, "admit", admit):
                clients = [self.enter(RawClient(proxy.port)) for _ in range(4)]
                for number, client in enumerate(clients):
                    client.send(post("/v1/chat/completions", chat("turn %d" % number)))
                    wait_until(lambda: len(arrived) > number, "the request at the limiter")
                for number, client in enumerate(clients):
                    self.assertEqual(said(client.answer()), "Echo: turn %d" % number)
            texts = [record.json["messages"][0]["content"] for record in self.sent()
                     if record.path == CHAT]
            self.assertEqual(texts, ["turn %d" % number for number in range(4)])
            # three pauses in all, of which the first caller may have noted its start late
            self.assertGreater(times[-1] - times[0], interval * 2)

    def test_a_client_that_leaves_while_waiting_sends_nothing_up(self) -> None:
        with second_proxy(self, rate_limit=30.0, wait=True) as proxy:  # type: ignore[arg-type]
            self.assertEqual(proxy.post("/v1/chat/completions", chat("a")).status, 200)
            with RawClient(proxy.port) as client:
                client.send(post("/v1/chat/completions", chat("b")))
                wait_until(lambda: proxy.server.running() == 1, "the request waits")
            wait_until(lambda: not proxy.server.running(), "the client's leaving", GONE_S)
            self.assertEqual(self.asked(), [CHAT])

    def test_manual_asks_with_client_model_and_text(self) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        self.enter(mock.patch("sys.stdin", Terminal("y\nn\n\n")))
        stderr = self.enter(contextlib.redirect_stderr(io.StringIO()))
        with second_proxy(self, manual=True) as proxy:  # type: ignore[arg-type]
            text = "what is\nthe \x1b[31mweather " + "x" * 100
            statuses = [proxy.post("/v1/chat/completions", chat(text),
                                   **{"User-Agent": "my-client"}).status for _ in range(3)]
        self.assertEqual(statuses, [200, 403, 403])
        asked = stderr.getvalue()
        self.assertIn("my-client", asked)
        self.assertIn("gpt-4.1", asked)
        self.assertNotIn("\x1b", asked)
        self.assertNotIn("x" * 60, asked)


class ApprovalTest(HistoryCase):
    settings = dict(no_history=False, manual=True)

    def setUp(self) -> None:
        self.enter(mock.patch("sys.stdin", io.StringIO("")))
        super().setUp()

    def ask(self, text: str, replies: List[Reply]) -> threading.Thread:
        thread = threading.Thread(target=lambda: replies.append(self.proxy.post(
            "/v1/messages", message(text), **{"User-Agent": "asker/1.0"})), daemon=True)
        thread.start()
        return thread

    def waiting(self, count: int) -> List[Dict[str, Any]]:
        return wait_until(lambda: (lambda found: len(found) == count and (found or [{}]))(
            self.proxy.get("/approvals").json["approvals"]))

    def test_the_page_allows_and_refuses(self) -> None:
        with Reader(self.proxy) as reader:
            for allow, status in ((True, 200), (False, 403)):
                replies: List[Reply] = []
                thread = self.ask("may I ask " + "x" * 500, replies)
                question = self.waiting(1)[0]
                self.assertEqual((question["client"], question["model"], question["state"]),
                                 ("asker/1.0", "claude-sonnet-4.6", "waiting"))
                self.assertEqual(len(question["text"]), 200)
                self.assertEqual(self.stats()["approvals"], [question])
                answer = self.proxy.post("/approvals/" + question["id"], {"allow": allow})
                self.assertEqual((answer.status, answer.json["state"]),
                                 (200, "allowed" if allow else "refused"))
                thread.join(10)
                self.assertEqual(replies[0].status, status)
                gone = self.proxy.post("/approvals/" + question["id"], {"allow": True})
                self.assertEqual((gone.status, gone.json["error"]["code"]), (404, "approval_gone"))
            self.assertEqual(replies[0].json["error"]["type"], "permission_error")
            self.assertEqual(self.fake.count(MESSAGES), 1)
            wait_until(lambda: len(reader.of("approval")) == 4)
            self.assertEqual([told["state"] for told in reader.of("approval")],
                             ["waiting", "allowed", "waiting", "refused"])
        for body in ({}, {"allow": 1}, {"allow": "yes"}):
            self.assertEqual(self.proxy.post("/approvals/x", body).status, 400)
        for row in self.rows(2):
            self.assertNotIn("may I", json.dumps(row))

    def test_a_client_that_leaves_takes_its_question_along(self) -> None:
        with self.proxy.connect() as sock:
            body = json.dumps(chat("hello")).encode()
            sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                         b"application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            self.waiting(1)
        self.waiting(0)
        self.assertEqual(self.rows(1)[0]["error"], "client_left")
        self.assertEqual(self.fake.count(CHAT), 0)

    def test_the_server_ends_while_a_question_stands(self) -> None:
        replies: List[Reply] = []
        thread = self.ask("hello", replies)
        self.waiting(1)
        self.proxy.server.finish(0.1)
        thread.join(10)
        self.assertEqual(replies[0].status, 503)

    def test_too_many_questions(self) -> None:
        with mock.patch.object(cp, "RATE_QUEUE", 0):
            self.assertEqual(self.proxy.post("/v1/messages", message("a")).status, 429)

    def test_terminal_and_page_answer_the_same_questions(self) -> None:
        class Terminal(io.StringIO):
            lines: List[str] = []
            typed = threading.Semaphore(0)

            def isatty(self) -> bool:
                return True

            def readline(self, size: int = -1) -> str:
                self.typed.acquire()
                return self.lines.pop(0)

        terminal = Terminal()
        stderr = self.enter(contextlib.redirect_stderr(io.StringIO()))
        with mock.patch("sys.stdin", terminal):
            replies: List[Reply] = []
            threads = [self.ask("question %d" % at, replies) for at in range(2)]
            first, second = self.waiting(2)
            wait_until(lambda: first["text"] in stderr.getvalue(), "the first one is asked")
            self.assertNotIn(second["text"], stderr.getvalue())
            self.proxy.post("/approvals/" + first["id"], {"allow": True})
            wait_until(lambda: "press Enter" in stderr.getvalue(), "the terminal is told")
            self.assertNotIn(second["text"], stderr.getvalue())
            terminal.lines.append("y\n")          # for the first: it must not allow the second
            terminal.typed.release()
            wait_until(lambda: second["text"] in stderr.getvalue(), "the next is asked")
            self.waiting(1)
            terminal.lines.append("n\n")
            terminal.typed.release()
            for thread in threads:
                thread.join(10)
            self.assertEqual(sorted(reply.status for reply in replies), [200, 403])
            terminal.lines.append("")
            terminal.typed.release()


if __name__ == "__main__":
    unittest.main()
