"""Faults of the event loop, its threads and waits (sections 13, 18, 20), each by its symptom."""
from __future__ import annotations

import logging
import threading
import time
import unittest
from typing import Any
from unittest import mock

from support import DEADLINE_S, RawClient, chat, cp, get, long_run, post, second_proxy, wait_until
from cases import RelayCase


class Errors(logging.Handler):
    """Keeps what was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


class Expired(cp.Wait):  # type: ignore[misc]
    """A wait that nothing but its time ends."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s

    def begin(self, loop: Any, task: Any) -> None:
        """Nothing resumes it."""


def make_loop(case: unittest.TestCase) -> tuple[Any, Errors]:
    """A loop that does not run: the tests call its rounds themselves."""
    log, errors = logging.Logger("faults"), Errors()
    log.addHandler(errors)
    loop = cp.EventLoop(cp.Settings(), log)
    case.addCleanup(loop.close)
    return loop, errors


async def wait_for(what: Any) -> Any:
    return await cp.wait(what)


class StopTest(unittest.TestCase):
    def setUp(self) -> None:
        self.loop, self.errors = make_loop(self)

    def test_a_coroutine_that_begins_while_the_server_stops_is_no_fault(self) -> None:
        self.loop.post(self.loop._stop)
        self.loop.spawn(wait_for(cp.Signal()))
        self.loop._take_inbox()
        self.assertEqual(self.errors.lines, [])

    def test_a_pause_or_a_turn_that_is_due_at_the_stop_does_not_end_the_loop_early(self) -> None:
        for what in (cp.Pause(0.0), cp.NextTurn()):
            with self.subTest(what=type(what).__name__):
                loop, errors = make_loop(self)
                loop.spawn(wait_for(what))
                loop._take_inbox()
                loop.post(loop._stop)
                loop._take_inbox()
                loop.now = time.monotonic() + 1
                loop._take_turns()
                loop._run_timers()
                self.assertEqual(errors.lines, [])

    def test_a_signal_that_was_set_before_the_stop_is_no_fault(self) -> None:
        signal = cp.Signal()
        self.loop.spawn(wait_for(signal))
        self.loop._take_inbox()
        self.loop.post(self.loop._stop)
        signal.set()
        self.loop._take_inbox()
        self.assertEqual(self.errors.lines, [])


class SlowAtTheEndTest(RelayCase):
    @long_run
    def test_a_client_that_has_not_taken_its_answer_at_the_end_is_no_fault(self) -> None:
        with second_proxy(self) as proxy:  # type: ignore[arg-type]
            with RawClient(proxy.port) as client:
                client.send(post("/v1/chat/completions", chat("a" * 12_000_000)))
                wait_until(
                    lambda: any(one.out for one in proxy.server.loop.clients.copy()),
                    "a part of the answer is not taken",
                )
                proxy.server.finish(0.05)
            errors = [one.getMessage() for one in proxy.logs if one.levelname == "ERROR"]
            self.assertEqual(errors, [])


class DeadlineTest(unittest.TestCase):
    def test_a_new_wait_is_not_ended_by_the_deadline_of_the_one_before(self) -> None:
        loop, _ = make_loop(self)
        results: list[Any] = []

        async def second() -> None:
            try:
                await cp.wait(Expired(0.0))
            except cp.ClientGone:
                results.append(await cp.wait(Expired(60.0)))

        task: list[Any] = []

        async def first() -> None:
            await cp.wait(Expired(0.0))
            loop.cancel(task[0], cp.ClientGone())

        loop.spawn(first())
        task.append(loop.spawn(second()))
        loop._take_inbox()
        loop.now = time.monotonic() + 1
        loop._tick()
        self.assertEqual(results, [])
        loop._stop()


class WorkerEndsTest(unittest.TestCase):
    def test_work_that_comes_just_when_the_last_thread_ends_is_not_left_lying(self) -> None:
        done: list[int] = []
        pool = cp.Workers()
        pool._count = pool._free = 1  # one thread, that is idle: this one
        with mock.patch.object(cp, "WORKER_IDLE_S", 0.001):
            self.assertIsNone(pool._next())
            self.assertTrue(pool.put(lambda: done.append(1)))
            wait_until(lambda: done == [1], "another thread does it")


class TooManyTest(RelayCase):
    def test_a_client_that_resets_while_it_is_refused_does_not_deafen_the_server(self) -> None:
        def reset(sock: Any, data: Any) -> int:
            raise ConnectionResetError("reset by peer")

        with second_proxy(self) as proxy:  # type: ignore[arg-type]
            server = proxy.server
            most, server._most_clients = server._most_clients, 0
            with mock.patch.object(cp, "send_now", reset), RawClient(proxy.port) as refused:
                self.assertTrue(refused.is_closed())
            server._most_clients = most
            with RawClient(proxy.port) as client:
                self.assertEqual(client.ask(get("/health")).status, 200)

    def test_a_fault_in_letting_a_client_in_does_not_deafen_the_server(self) -> None:
        tried: list[int] = []

        def fail(*args: Any) -> Any:
            tried.append(1)
            raise RuntimeError("a fault put in by a test")

        with second_proxy(self) as proxy:  # type: ignore[arg-type]
            with mock.patch.object(proxy.server, "process_request", fail):
                with RawClient(proxy.port):
                    wait_until(lambda: tried, "it was to be let in")
            with RawClient(proxy.port) as client:
                self.assertEqual(client.ask(get("/health")).status, 200)


class KeptTest(RelayCase):
    def test_a_large_kept_response_is_not_parsed_in_the_loops_thread(self) -> None:
        names: list[str] = []

        def find(*args: Any) -> Any:
            names.append(threading.current_thread().name)

        with mock.patch.object(self.proxy.app.store, "find", find):
            self.assertEqual(self.client().ask(get("/v1/responses/resp_1")).status, 404)
        self.assertEqual(names, ["worker"])


class EmbeddingsTest(RelayCase):
    def test_a_large_batch_of_vectors_is_not_parsed_in_the_loops_thread(self) -> None:
        names: list[str] = []
        read = cp.read_embeddings

        def note(*args: Any) -> Any:
            names.append(threading.current_thread().name)
            return read(*args)

        body = {"model": "text-embedding-3-small", "input": ["a", "b"]}
        patches = mock.patch.multiple(cp, read_embeddings=note, INLINE_BYTES=100)
        with patches, self.client() as client:
            self.assertEqual(client.ask(post("/v1/embeddings", body)).status, 200)
        self.assertEqual(names, ["worker"])


class NamesTest(unittest.TestCase):
    def setUp(self) -> None:
        self.names, self.look_ups = cp.HostNames(), 0
        self.gate = threading.Event()
        patch = mock.patch.object(self.names, "_look_up", self.look_up)
        patch.start()
        self.addCleanup(patch.stop)

    def look_up(self, host: str, port: int, flags: int = 0) -> Any:
        if not flags:
            self.look_ups += 1
            self.gate.wait(DEADLINE_S)
        raise OSError("no such name")

    def ask(self, number: int) -> list[str]:
        """So many at the same time -> what each of them was told."""
        loop, _ = make_loop(self)
        told: list[str] = []

        def end(value: Any, error: Any) -> None:
            told.append(str(error))

        loop.start()
        for _ in range(number):
            loop.spawn(self.names.find("host.invalid", 443), end)
        wait_until(lambda: self.look_ups == 1, "the name is looked up")
        loop.post(self.gate.set)  # behind all who ask
        wait_until(lambda: len(told) == number, "all are told")
        loop.stop()
        return told

    def test_many_who_wait_for_a_name_that_cannot_be_found_wait_for_one_look_up(self) -> None:
        with mock.patch.object(cp, "NAME_ERROR_AGE_S", DEADLINE_S):
            self.assertEqual(self.ask(10), ["no such name"] * 10)
        self.assertEqual(self.look_ups, 1)

    def test_a_name_that_could_not_be_found_is_looked_up_again_soon(self) -> None:
        old = time.monotonic() - cp.NAME_ERROR_AGE_S, OSError("no such name")
        self.assertTrue(self.names._is_old(old))
        self.assertLessEqual(cp.NAME_ERROR_AGE_S, 1.0)

    def test_a_resolver_that_hangs_leaves_threads_to_others(self) -> None:
        loop, _ = make_loop(self)
        results: list[Any] = []
        loop.start()
        self.addCleanup(loop.stop)
        self.addCleanup(self.gate.set)
        for number in range(3 * cp.MAX_WORKERS):
            loop.spawn(self.names.find("host%d.invalid" % number, 443), lambda *result: None)
        wait_until(lambda: self.look_ups == cp.MAX_LOOK_UPS, "some look-ups hang")
        loop.spawn(wait_for(cp.InThread(lambda: "done")), lambda *result: results.append(result))
        wait_until(lambda: results, "other work is done meanwhile")
        self.assertEqual((results, self.look_ups), ([("done", None)], cp.MAX_LOOK_UPS))

    def test_look_ups_that_had_to_queue_are_made_when_a_thread_is_free(self) -> None:
        loop, _ = make_loop(self)
        errors: list[str] = []
        loop.start()
        self.addCleanup(loop.stop)
        number = 2 * cp.MAX_LOOK_UPS
        for at in range(number):
            loop.spawn(self.names.find("host%d.invalid" % at, 443),
                       lambda value, error: errors.append(str(error)))
        wait_until(lambda: self.look_ups == cp.MAX_LOOK_UPS, "the first ones hang")
        self.gate.set()
        wait_until(lambda: len(errors) == number, "all have their answer")
        self.assertEqual(errors, ["no such name"] * number)


class WithinTest(unittest.TestCase):
    def test_work_that_has_not_begun_is_not_begun_for_one_who_has_left(self) -> None:
        loop, _ = make_loop(self)
        begun: list[str] = []

        async def work() -> None:
            begun.append("begun")

        task = loop.spawn(cp.within(5.0, work()), lambda *result: None)
        loop._resume(task)                 # it waits, and its work is to begin in the next round
        loop.cancel(task, cp.ClientGone())
        loop._take_inbox()
        self.assertEqual(begun, [])
        self.assertEqual(len(loop._tasks), 0)


class HeldStartTest(unittest.TestCase):
    def test_an_answer_without_content_is_not_held_back_without_end(self) -> None:
        class Answer:
            done, reads = False, 0

            async def read(self, timeout_s: float) -> bytes:
                self.reads += 1
                return b": comment\n" * 1000

        class Relay:
            ended = has_content = is_waiting = False
            error = None

            def feed(self, data: bytes) -> bytes:
                return data

        answer: Any = Answer()
        relay: Any = Relay()
        with mock.patch.object(cp, "HELD_START_BYTES", 25000):
            start = cp.run(cp.read_beginning(answer, relay, 1.0))
        self.assertEqual((answer.reads, len(start)), (3, 30000))


if __name__ == "__main__":
    unittest.main()
