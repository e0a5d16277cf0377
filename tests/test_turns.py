"""Requests compute between two looks at the running streams (section 18, NextTurn).

Many that begin at once do not make the streams late, and busy streams do not starve them.
"""
from __future__ import annotations

import unittest

from support import cp
from cases import TurningCase

TURN_S = 0.001               # that each turn of these tests takes


class TurnTest(TurningCase):
    def setUp(self) -> None:
        super().setUp()
        self.turns = 0

    async def compute(self) -> None:
        while True:
            await cp.wait(cp.NextTurn())
            self.now += TURN_S
            self.turns += 1

    def begin(self, count: int) -> None:
        for _ in range(count):
            self.loop.spawn(self.compute())
        self.loop._take_inbox()

    def turns_after(self, streams_s: float) -> int:
        """How many turns come behind streams that took so long."""
        self.loop.now, self.turns = self.now, 0
        self.now += streams_s
        self.loop._take_turns()
        return self.turns

    def test_a_crowd_of_requests_holds_idle_streams_up_for_a_millisecond(self) -> None:
        self.begin(200)
        self.assertEqual([self.turns_after(0.0) for _ in range(5)], [1] * 5)
        self.assertEqual(self.turns_after(0.004), 1)

    def test_streams_that_fill_the_time_leave_a_fifth_of_it_to_requests(self) -> None:
        self.begin(200)
        self.assertEqual([self.turns_after(0.1) for _ in range(5)], [25] * 5)

    def test_everybody_has_a_turn_before_anybody_has_the_next(self) -> None:
        self.begin(9)
        first = list(self.loop._turns)
        for _ in range(8):
            self.turns_after(0.0)
        self.assertEqual(self.loop._turns[0][0], first[8][0])

    def test_few_requests_do_not_wait_for_the_end_of_a_slice(self) -> None:
        async def once() -> None:
            await cp.wait(cp.NextTurn())
            self.turns += 1

        self.loop.spawn(once())
        self.loop._take_inbox()
        self.assertEqual(self.turns_after(0.0), 1)
        self.assertEqual(self.turns_after(0.0), 0)


if __name__ == "__main__":
    unittest.main()
