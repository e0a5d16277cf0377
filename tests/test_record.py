"""The record of a request: its row, its log line, and that no header is its store (section 17)."""
from __future__ import annotations

import time
import unittest
from typing import Any

from support import ProxyCase, chat, cp, message, wait_until
from fake_upstream import CHAT, Answer


def record(method: str = "POST", path: str = "/chat/completions",
           **headers: str) -> cp.RequestRecord:
    return cp.RequestRecord(
        cp.new_request_id(), cp.AskedFor(method, path, headers, 1_800_000_000.0, time.monotonic()))


class RecordTest(unittest.TestCase):
    def test_a_new_request_is_local_and_knows_its_client(self) -> None:
        made = record(**{"user-agent": "codex/1.2 (linux)"})
        row = made.row()
        self.assertEqual((row["dialect"], row["client"], row["route"], row["at"]),
                         ("chat", "codex/1.2", "local", 1_800_000_000.0))
        for name in ("account", "session", "path", "asked", "model", "status", "error",
                     "initiator", "first_ms", "repairs", "losses", "upstream_id", "input"):
            self.assertIsNone(row[name], name)
        self.assertEqual(set(row), set(cp.ROW_FIELDS))

    def test_the_history_has_a_name_for_posts_to_a_model_only(self) -> None:
        self.assertEqual(record("GET").asked.label, "")
        self.assertEqual(record(path="/usage").asked.label, "")

    def test_errors_say_kind_and_words_and_no_secret(self) -> None:
        made = record()
        made.fail(cp.UpstreamError("no ghu_%s here" % ("a" * 36), 502, "bad_thing",
                                   headers={"x-github-request-id": "AB:1"}))
        self.assertEqual((made.error, made.upstream_id), ("bad_thing", "AB:1"))
        self.assertNotIn("ghu_a", made.failure)
        self.assertIn(" error=no ", made.log_line(made.row()))

    def test_who_leaves_before_an_answer_is_499_and_later_keeps_its_status(self) -> None:
        early, late = record(), record()
        early.leave()
        late.begin_answer(200)
        late.leave_stream()
        self.assertEqual((early.status, early.error, early.failure), (499, "client_left", ""))
        self.assertEqual((late.status, late.error, late.failure),
                         (200, "client_left", "the client left"))
        late.end_stream("cut", "upstream_stream_ended")
        late.leave_stream()
        self.assertEqual((late.error, late.failure), ("upstream_stream_ended", "cut"))

    def test_counts_of_all_answers_are_one_sum(self) -> None:
        made = record()
        for _ in range(2):
            meter = cp.UsageMeter()
            made.note_answer({}, meter)
            meter.take({"usage": {"prompt_tokens": 10, "completion_tokens": 2}})
        made.meters[0].counts["cache_write_1h"] = 5  # a part of another count, no column
        row = made.row()
        self.assertEqual(set(row), set(cp.ROW_FIELDS))
        self.assertEqual((row["input"], row["output"]), (20, 4))
        self.assertIn(" tokens=20+4", made.log_line(row))

    def test_a_key_in_the_path_is_not_logged(self) -> None:
        made = record("DELETE", "/auth/tokens/sk-copilot-made-up-key-of-a-person")
        self.assertNotIn("made-up-key", made.log_line(made.row()))

    def test_notes_say_what_is_new(self) -> None:
        notes = cp.Notes()
        self.assertEqual(notes.add({"b", "a"}), {"a", "b"})
        self.assertEqual(notes.add({"b", "c"}), {"c"})
        self.assertEqual(notes.text, "a, b, c")

    def test_the_time_runs_until_the_row_is_made(self) -> None:
        made = record()
        made.asked.began = time.monotonic() - 2
        self.assertAlmostEqual(made.row()["total_ms"], 2000, delta=900)


class NoStoreTest(ProxyCase):
    def row(self, reply: Any) -> Any:
        def find() -> Any:
            rows = self.proxy.get("/stats").json["recent"]
            return [row for row in rows if row["id"] == reply.headers["x-request-id"]]

        return wait_until(find, "the row of the request")[0]

    def test_losses_of_the_row_are_those_of_the_header(self) -> None:
        reply = self.proxy.post("/v1/chat/completions", chat("a", logit_bias={"1": 1}, seed=1))
        names = reply.headers.get("x-copilot-proxy-lossy", "")
        self.assertEqual(self.row(reply)["losses"], [one for one in names.split(", ") if one])

    def test_an_upstream_header_of_that_name_is_no_loss_of_ours(self) -> None:
        self.fake.script(CHAT, Answer(400, {"x-copilot-proxy-lossy": "made up"},
                                      {"error": {"message": "no"}}))
        reply = self.proxy.post("/v1/chat/completions", chat("a"))
        self.assertEqual(self.row(reply)["losses"], [])

    def test_a_compaction_is_the_agents_and_the_clients_own_head_stays(self) -> None:
        heads: list[Any] = []
        real = self.proxy.server.end

        def end(exchange: Any) -> None:
            heads.append(dict(exchange.head.headers))
            real(exchange)

        self.proxy.server.end = end                                  # type: ignore[assignment]
        reply = self.proxy.post("/v1/responses/compact", {"model": "gpt-5.3-codex", "input": "a"})
        self.assertEqual(reply.status, 200, reply.body)
        self.assertEqual(self.fake.requests[-1].headers["x-initiator"], "agent")
        self.assertEqual(self.row(reply)["initiator"], "agent")
        self.assertNotIn("x-initiator", heads[0])

    def test_the_clients_own_word_counts_in_a_compaction_too(self) -> None:
        self.proxy.post("/v1/responses/compact", {"model": "gpt-5.3-codex", "input": "a"},
                        **{"X-Initiator": "user"})
        self.assertEqual(self.fake.requests[-1].headers["x-initiator"], "user")

    def test_every_turn_says_who_began_it(self) -> None:
        reply = self.proxy.post("/v1/messages", message("a"))
        self.assertEqual(self.row(reply)["initiator"], "user")


if __name__ == "__main__":
    unittest.main()
