"""A request is looked at once where its answer is known already (sections 8, 9 and 20)."""
from __future__ import annotations

import collections
import json
import sys
import unittest
import unittest.mock
from typing import Any

from fake_upstream import FakeUpstream
from support import Proxy, cp

TURNS = 40
RESULT = "line of a file\n" * 20


def words(turns: int) -> list[dict[str, Any]]:
    """A conversation of words alone."""
    roles = ("user", "assistant")
    return [{"role": roles[at % 2], "content": "Turn %d" % at} for at in range(turns)]


def history_with_tools(turns: int) -> dict[str, Any]:
    """A coding agent's request in the shape of Chat Completions."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Mend the test"}]
    for at in range(turns):
        function = {"name": "tool_%d" % (at % 30), "arguments": "{}"}
        call = {"id": "call_%d" % at, "type": "function", "function": function}
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": RESULT})
    text = {"type": "string", "description": "What it is about"}
    schema = {"type": "object", "properties": dict.fromkeys("abcd", text), "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "tool_%d" % at, "parameters": schema}}
             for at in range(30)]
    return {"model": "gpt-4o", "messages": messages, "tools": tools}


class CountedCalls:
    """Counts the calls of functions of the file, by name."""

    def __enter__(self) -> collections.Counter[str]:
        self._calls: collections.Counter[str] = collections.Counter()
        sys.setprofile(self._count)
        return self._calls

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _count(self, frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename == cp.__file__:
            self._calls[frame.f_code.co_name] += 1


class LookedAtOnceTest(unittest.TestCase):
    def test_a_conversation_of_words_is_read_once_for_a_plan(self) -> None:
        """Each turn is asked once whether it is words; nobody looks for parts in it."""
        seen: collections.Counter[str] = collections.Counter()
        real_is_words, real_parts = cp.is_words, cp.content_parts

        def is_words(item: Any) -> bool:
            seen["is_words"] += 1
            return bool(real_is_words(item))

        def content_parts(body: cp.Json) -> Any:
            seen["content_parts"] += 1
            return real_parts(body)

        patched = unittest.mock.patch.multiple(cp, is_words=is_words, content_parts=content_parts)
        body = {"model": "gpt-4o", "messages": words(TURNS)}
        with FakeUpstream() as fake, Proxy(fake) as proxy, patched:
            answer = proxy.post("/v1/chat/completions", body)
        self.assertEqual(answer.status, 200)
        self.assertEqual(dict(seen), {"is_words": TURNS})

    def test_planning_a_long_history_with_tools_takes_few_calls(self) -> None:
        """An agent sends it again for every step, so a call more for each turn counts."""
        data = json.dumps(history_with_tools(TURNS))
        model = cp.Model.from_entry({"id": "gpt-4o", "vendor": "OpenAI"})

        def plan() -> None:
            cp.Plan.make(cp.CHAT, cp.CHAT, json.loads(data), model, 1790000000, "key")

        plan()
        with CountedCalls() as calls:
            plan()
        # 80 turns, and 30 tools with 150 schemas in them; without the early exits: 3,700
        self.assertLess(sum(calls.values()), 2600, calls.most_common(12))


if __name__ == "__main__":
    unittest.main()
