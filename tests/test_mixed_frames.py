"""Events of one stream that are written in different ways (sections 6 and 7)."""

from __future__ import annotations

import unittest

from support import cp


def frame(text: str, field: bytes) -> bytes:
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 5, "model": "m",
             "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    return field + cp.dumps(chunk) + b"\n\n"


class MixedFramesTest(unittest.TestCase):
    CLIENTS = (cp.RESPONSES, cp.MESSAGES, cp.GEMINI, cp.OLLAMA)

    def text_of(self, client: cp.Dialect, pieces: list[bytes]) -> bytes:
        stream = cp.TranslatedStream(client, cp.CHAT, cp.Request("m", key="k", now=7))
        return b"".join(map(stream.feed, pieces))

    def test_a_word_without_a_blank_before_it_is_not_lost(self) -> None:
        for client in self.CLIENTS:
            for behind in (1, 2, 3, 8):
                frames = [frame("first", b"data: "), frame("second", b"data: "),
                          frame("odd", b"data:")]
                frames += [frame("usual", b"data: ")] * behind
                wanted = self.text_of(client, frames)
                self.assertIn(b"odd", wanted)
                for pieces in ([b"".join(frames)], [*frames[:2], b"".join(frames[2:])],
                               [frames[0], b"".join(frames[1:])]):
                    with self.subTest(client=client.name, behind=behind, pieces=len(pieces)):
                        self.assertEqual(self.text_of(client, pieces), wanted)


if __name__ == "__main__":
    unittest.main()
