"""What a request (sections 5, 9, 17) leaves in memory while its answer streams: a thousand streams
hold a thousand of them."""
from __future__ import annotations

import dataclasses
import unittest

from cases import chat
from support import cp

MODEL = cp.Model.from_entry({"id": "m", "capabilities": {"limits": {}, "supports": {}}})


def plan(body: cp.Json) -> cp.Plan:
    """A plan in which nothing is translated."""
    return cp.Plan.make(cp.CHAT, cp.CHAT, body, MODEL, 1790000000, "key")


class SmallRequests(unittest.TestCase):
    def test_a_field_that_the_client_did_not_set_takes_no_room(self) -> None:
        """Above 30 fields Python gives every object a table of its own, of over 1 KB."""
        self.assertLessEqual(len(vars(cp.Request("m"))), 12)

    def test_a_default_is_read_as_if_it_were_there(self) -> None:
        request = cp.Request("m")
        for field in dataclasses.fields(cp.Request):
            getattr(request, field.name)
        self.assertEqual(request.elapsed_ns(), 0)
        self.assertEqual(request, cp.Request("m", top_p=None))
        self.assertNotEqual(request, cp.Request("m", top_p=0.5))
        self.assertEqual(dataclasses.replace(request, top_k=3), cp.Request("m", top_k=3))

    def test_no_request_shares_a_list_with_another(self) -> None:
        one, other = vars(cp.Request("m")), vars(cp.Request("m"))
        for name, value in one.items():
            if not isinstance(value, str):
                self.assertIsNot(value, other[name], name)

    def test_a_field_that_no_request_has_is_refused(self) -> None:
        with self.assertRaises(AssertionError):
            cp.Request("m", top_q=1)

    def test_a_plan_records_losses_once(self) -> None:
        made = plan(dict(chat("hi"), stream=True))
        self.assertIs(made.request.losses, made.edit.losses)

    def test_losses_that_are_none_hold_no_set(self) -> None:
        losses = cp.Losses()
        self.assertFalse(hasattr(losses, "_known"))
        for _ in range(2):
            losses.add("top_k", "no field")
            losses.add("seed", "no field")
        self.assertEqual(losses, [("top_k", "no field"), ("seed", "no field")])

    def test_what_was_sent_of_the_answer_is_let_go(self) -> None:
        made = plan(dict(chat("hi"), stream=True))
        made.start(b"data: {}\n\n")
        self.assertEqual(made.take_begun(), b"data: {}\n\n")
        self.assertEqual(made.begun, b"")

    def test_what_the_upstream_has_accepted_is_let_go(self) -> None:
        made = plan(dict(chat("hi"), stream=True))
        made.attach({"X-Initiator": "user"}, [], {})
        self.assertEqual(made.headers, {"X-Initiator": "user", "Accept": "text/event-stream"})
        made.forget_request()
        self.assertEqual((made.headers, made.edit.body), ({}, {}))

    def test_nothing_changed_is_no_set_of_its_own(self) -> None:
        self.assertIs(cp.BodyEdit({}).added, cp.BodyEdit({}).added)
        self.assertIs(cp.Notes().names, cp.Notes().names)

    def test_what_one_request_changed_is_not_noted_of_another(self) -> None:
        edit, notes = cp.BodyEdit({}), cp.Notes()
        edit.set(edit.body, "stream", True)
        notes.add({"top_k"})
        self.assertEqual((set(edit.added), set(notes.names)), ({"stream"}, {"top_k"}))
        self.assertEqual((len(cp.BodyEdit({}).added), cp.Notes().text), (0, ""))


if __name__ == "__main__":
    unittest.main()
