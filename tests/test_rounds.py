"""One round of the loop: events of streams come first, then what moves requests on (section 18).

The sockets are real pairs, so the selector decides what is reported again.
"""
from __future__ import annotations

import socket
import unittest

from support import cp
from cases import TurningCase

STEP_S = 0.0004              # that each event of these tests takes


class Side(cp.Connection):
    """A connection without a coroutine: it reads, and notes that it did."""

    def __init__(self, test: RoundTest, name: str) -> None:
        self.sock, self.far = socket.socketpair()
        self.test, self.name = test, name

    def read(self) -> bool:
        self.sock.recv(100)
        self.test.now += STEP_S
        self.test.order.append(self.name)
        return True

    def on_event(self, mask: int) -> None:
        self.read()


class RoundTest(TurningCase):
    def setUp(self) -> None:
        super().setUp()
        self.order: list[str] = []

    def side(self, name: str) -> Side:
        side = Side(self, name)
        self.addCleanup(side.sock.close)
        self.addCleanup(side.far.close)
        return side

    def requests(self, count: int) -> None:
        """So many connections that can move a request on."""
        for number in range(count):
            side = self.side("request %d" % number)
            self.loop.watch(side, cp.selectors.EVENT_READ)
            side.far.send(b"x")

    def stream(self) -> None:
        """A stream whose next event has arrived."""
        side = self.side("stream")

        async def relay() -> None:
            await cp.wait(cp.Ready(side, consume=side.read))

        self.loop.spawn(relay())
        self.loop._take_inbox()
        side.far.send(b"x")

    def round(self) -> list[str]:
        self.order = []
        self.loop.now = self.now
        self.loop._take_events(self.loop._selector.select(0))
        return self.order

    def test_an_event_of_a_stream_does_not_wait_for_requests_that_came_before_it(self) -> None:
        self.requests(2)
        self.stream()
        self.assertEqual(self.round()[0], "stream")

    def test_a_crowd_of_requests_is_moved_on_between_looks_at_the_streams(self) -> None:
        self.requests(12)
        self.stream()
        rounds = [self.round()]
        self.assertEqual(len(rounds[0]), 1 + 3)          # the stream, and a millisecond
        self.stream()
        rounds.append(self.round())
        rounds.append(self.round())                      # without streams: all that is left
        self.assertEqual([len(one) for one in rounds], [4, 4, 6])
        names = {name for one in rounds for name in one}
        self.assertEqual(names, {"stream"} | {"request %d" % n for n in range(12)})

    def test_streams_that_fill_the_time_leave_a_share_of_it_to_requests(self) -> None:
        self.requests(30)
        for _ in range(100):
            self.stream()
        moved = [name for name in self.round() if name != "stream"]
        self.assertEqual(len(moved), 25)

    def test_before_the_limits_of_time_are_looked_at_all_that_came_is_taken(self) -> None:
        self.requests(12)
        self.stream()
        self.loop._call_at(self.now, self.loop._tick)
        self.assertEqual(len(self.round()), 13)

    def test_who_waits_for_its_turn_is_not_too_late(self) -> None:
        results = []

        class News(cp.Wait):
            timeout_s = 1.0

            def begin(self, loop: cp.EventLoop, task: cp.Task) -> None:
                self.task = task

        news = News()

        async def read() -> None:
            results.append(await cp.wait(news))

        self.loop.spawn(read())
        self.loop._take_inbox()
        self.loop.wake_in_turn(news.task, news, "data")
        self.now = self.loop.now = self.loop.now + 5.0
        self.loop._tick()
        self.loop._take_turns()
        self.assertEqual(results, ["data"])


if __name__ == "__main__":
    unittest.main()
