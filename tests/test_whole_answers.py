"""Answers that come whole and stay in their dialect: split choices, gaps, usage (section 7)."""
from __future__ import annotations

import copy
import unittest
from typing import Any

from support import cp


def as_objects(value: Any) -> list[Any]:
    """The objects in a list, which may be no list at all."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


class WholeAnswers(unittest.TestCase):

    def test_split_chat_choices_are_merged(self) -> None:
        call = {"id": "t1", "type": "function", "function": {"name": "a", "arguments": "{}"}}
        other = dict(call, id="t2")
        answer = {"created": 1790000000, "model": "claude-sonnet-4.6", "choices": [
            {"finish_reason": "tool_calls", "message": {"role": "assistant", "content": "Let me ",
                                                        "reasoning_text": "Hm"}},
            {"finish_reason": "stop", "message": {"content": "look."}},
            {"finish_reason": "tool_calls", "message": {"role": "assistant",
                                                        "tool_calls": [call]}},
            {"finish_reason": "stop", "message": {"content": None, "tool_calls": [other]}}],
            "usage": {"prompt_tokens": 20, "completion_tokens": 5,
                      "prompt_tokens_details": {"cached_tokens": 18}}}
        changed = cp.CHAT.mend(answer, "claude-sonnet-4-6")
        (only,) = answer["choices"]
        self.assertTrue(changed)
        self.assertEqual((only["index"], only["finish_reason"]), (0, "tool_calls"))
        self.assertEqual(only["message"], {
            "role": "assistant", "content": "Let me look.", "reasoning_text": "Hm",
            "reasoning_content": "Hm", "tool_calls": [call, other]})
        self.assertEqual((answer["object"], answer["model"], bool(answer["id"])),
                         ("chat.completion", "claude-sonnet-4-6", True))

    def test_chat_answer_with_calls_only_has_null_content(self) -> None:
        answer = {"choices": [{"message": {"tool_calls": [{"id": "a"}]}, "finish_reason": "stop"}]}
        cp.CHAT.mend(answer, "m")
        self.assertIsNone(answer["choices"][0]["message"]["content"])
        self.assertEqual(answer["choices"][0]["finish_reason"], "tool_calls")

    def test_whole_chat_answer_is_not_touched(self) -> None:
        answer = {"id": "c1", "object": "chat.completion", "created": 1, "model": "gpt-4.1",
                  "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi",
                                                       "refusal": None, "annotations": []},
                               "logprobs": None, "finish_reason": "stop"}],
                  "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
        before = copy.deepcopy(answer)
        changed = cp.CHAT.mend(answer, "gpt-4.1")
        self.assertEqual((answer, changed), (before, False))

    def test_responses_answer_is_made_whole(self) -> None:
        answer = {"id": "A/b+" * 100, "model": "gpt-5.3-codex", "copilot_usage": {}, "output": [
            {"type": "reasoning", "id": "A/b+" * 99, "encrypted_content": "x"},
            {"type": "message", "id": "msg_1", "content": []},
            {"type": "function_call", "call_id": "c"}],
            "usage": {"input_tokens": 12, "output_tokens": 9, "output_tokens_details": None}}
        changed = cp.RESPONSES.mend(answer, "codex")
        self.assertTrue(changed)
        self.assertEqual(answer["model"], "codex")
        self.assertNotIn("copilot_usage", answer)
        ids = [answer["id"]] + [item["id"] for item in answer["output"]]
        self.assertTrue(all(0 < len(i) <= 64 for i in ids) and len(set(ids)) == 4)
        self.assertEqual(answer["output"][0]["summary"], [])
        self.assertEqual(answer["usage"], {
            "input_tokens": 12, "output_tokens": 9, "total_tokens": 21,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0}})

    def test_messages_answer_gets_the_asked_model_only(self) -> None:
        answer = {"id": "m", "model": "claude-sonnet-4.6",
                  "content": [{"type": "text", "text": "a"}],
                  "usage": {"input_tokens": 2, "cache_read_input_tokens": 3,
                            "cache_creation_input_tokens": 4, "output_tokens": 5}}
        want = dict(copy.deepcopy(answer), model="sonnet")
        self.assertTrue(cp.MESSAGES.mend(answer, "sonnet"))
        self.assertEqual(answer, want)
        self.assertFalse(cp.MESSAGES.mend(answer, "sonnet"))

    def test_odd_answers_never_raise(self) -> None:
        for dialect in cp.DIALECTS.values():
            for answer in ({}, {"choices": None}, {"choices": [None, 5]}, {"choices": [{}]},
                           {"choices": [{"message": 5, "finish_reason": []}]}, {"output": "x"},
                           {"output": [None, {"id": 5, "type": []}]}, {"usage": []}, {"id": {}},
                           {"usage": {"input_tokens": "x", "prompt_tokens_details": 5}},
                           {"choices": [{"message": {"tool_calls": [5, {"function": 5}]}}]}):
                mended = copy.deepcopy(answer)
                with self.subTest(dialect=dialect.name, answer=answer):
                    self.assertTrue(dialect.mend(mended, "m"))
                    self.assertEqual(mended["model"], "m")
                    self.assertEqual(cp.loads(cp.dumps(mended)), mended)
                    if dialect is not cp.MESSAGES:          # whose ids are the upstream's own
                        self.assertRegex(mended["id"], r"\A(chatcmpl-|resp_)\w{1,60}\Z")
                    if dialect is cp.CHAT:
                        for choice in as_objects(mended.get("choices")):
                            self.assertEqual(choice["message"]["role"], "assistant")
                            self.assertIn(choice["finish_reason"], ("stop", "tool_calls"))

    def test_usage_counts_add_up_in_both_families(self) -> None:
        for usage, counts in (
                ({"input_tokens": 10, "input_tokens_details": {"cached_tokens": 4},
                  "output_tokens": 7, "output_tokens_details": {"reasoning_tokens": 3}},
                 cp.Usage(6, 4, 0, 7, 3)),
                ({"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 4}},
                 cp.Usage(0, 4, 0, 0)),
                ({"prompt_tokens": 100, "prompt_tokens_details": {
                    "cached_tokens": 30, "cache_write_tokens": 50}}, cp.Usage(20, 30, 50)),
                ({"input_tokens": 5, "cache_read_input_tokens": 30,
                  "cache_creation_input_tokens": 50, "output_tokens": 1},
                 cp.Usage(5, 30, 50, 1))):
            self.assertEqual(cp.Usage.of(cp.read_usage(usage)), counts)
        for odd in ({}, {"prompt_tokens": None}, {"prompt_tokens": "x", "completion_tokens": True}):
            self.assertEqual(cp.read_usage(odd), {})

    def test_later_reports_replace_earlier_ones_and_empty_ones_wipe_nothing(self) -> None:
        meter = cp.UsageMeter()
        self.assertIsNone(meter.usage)
        meter.take({"message": {"usage": {"input_tokens": 5, "output_tokens": 1}}})
        meter.take({"usage": {"output_tokens": 9}})
        for empty in ({}, None):
            meter.take({"usage": empty})
        self.assertEqual(meter.usage, cp.Usage(5, 0, 0, 9))

    def test_clients_and_history_see_the_same_cache_writes(self) -> None:
        """The two readers of usage disagreed about tokens written to the cache."""
        usage = {"prompt_tokens": 100, "completion_tokens": 7, "prompt_tokens_details": {
            "cached_tokens": 30, "cache_write_tokens": 50}}
        answer = {"id": "1", "model": "m", "usage": usage, "choices": [{
            "index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "a"}}]}
        meter = cp.UsageMeter()
        request = cp.Request("m", "messages")
        response = cp.read_answer(cp.CHAT, cp.dumps(answer), False, request, meter)
        shown = cp.MESSAGES.encode_response(response, request)["usage"]
        self.assertEqual((shown["input_tokens"], shown["cache_read_input_tokens"],
                          shown["cache_creation_input_tokens"]), (20, 30, 50))
        self.assertEqual(meter.counts, {
            "input": 20, "cache_read": 30, "cache_write": 50, "output": 7})


if __name__ == "__main__":
    unittest.main()
