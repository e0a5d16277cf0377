"""Many chunks and events at once take a way of their own (sections 6 and 7).

It gives the very same bytes.
"""

from __future__ import annotations

import json
import random
import re
import unittest
from unittest import mock

from support import combinations, cp


def chunked(payloads: list[bytes]) -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in payloads)
    return body + b"0\r\n\r\n"


class ManyChunksTest(unittest.TestCase):
    def test_any_payload_and_any_cut_gives_the_same_body(self) -> None:
        numbers = random.Random(7)
        for alphabet in (b"ab", b"a\n", b"a\r\n", b"0\r\n1"):
            for _ in range(40):
                sizes = [numbers.choice((1, 2, 5, 40, 300)) for _ in range(60)]
                payloads = [bytes(numbers.choices(alphabet, k=size)) for size in sizes]
                raw = chunked(payloads) + b"NEXT"
                cut = numbers.choice((1, 700, 5000, len(raw)))
                decoder, found = cp.BodyDecoder(None, True), b""
                for at in range(0, len(raw), cut):
                    found += decoder.feed(raw[at : at + cut])
                self.assertEqual(found, b"".join(payloads))
                self.assertEqual((decoder.done, decoder.rest), (True, b"NEXT"))

    def test_a_wrong_size_among_many_is_refused(self) -> None:
        raw = chunked([b"x" * 40] * 100)
        with self.assertRaises(cp.BadRequest):
            cp.BodyDecoder(None, True).feed(raw.replace(b"28\r\n", b"27\r\n", 50))


class ChatRunTest(unittest.TestCase):
    """Blocks of text chunks that differ in nothing but the text."""

    EVENT = b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m",' \
            b'"choices":[{"index":0,"delta":{"content":%b}}]}\n\n'

    def relay(self, blocks: list[bytes]) -> bytes:
        stream = cp.CHAT.stream("m", {})
        return b"".join(map(stream.feed, blocks))

    def test_a_block_is_what_its_events_are(self) -> None:
        texts = ["a", "b c", 'with "quotes"', "back\\slash\\", "line\n", "\u00e4\u4e2d", "z",
                 '"', "\\", "end"]
        events = [self.EVENT % cp.dumps(text) for text in ["first", "second"] + texts * 20]
        one_by_one = self.relay(events)
        for size in (2, 3, 7, 50, len(events)):
            blocks = [b"".join(events[at : at + size]) for at in range(0, len(events), size)]
            self.assertEqual(self.relay(blocks), one_by_one)

    def test_plain_texts_need_no_look_at_each(self) -> None:
        template = cp.DeltaTemplate()
        event = self.EVENT % b'"hello"'
        self.assertTrue(template.learn(event, "hello"))
        block = b"".join(self.EVENT % cp.dumps(text) for text in ("a", "b", "c\n"))
        self.assertEqual(template.match_all(block), [b"a", b"b", b"c\\n"])
        self.assertEqual(template.match_all(block + b": comment\n\n" + event), [])
        self.assertEqual(template.match_all(block + self.EVENT % b'"a\\"b"'), [])


class OddEventTest(unittest.TestCase):
    """A block in which a few events need a look and hundreds do not."""

    DELTA = (b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta",'
             b'"sequence_number":%d,"item_id":"i1","output_index":0,"content_index":0,'
             b'"delta":"x"}\n\n')
    ODD = (b'event: response.content_part.done\ndata: {"type":"response.content_part.done",'
           b'"sequence_number":%d,"item_id":"other","output_index":0,"content_index":0,'
           b'"part":{"type":"output_text","text":"x","annotations":[]}}\n\n')
    FIRST = (b'event: response.output_item.added\ndata: {"type":"response.output_item.added",'
             b'"sequence_number":0,"output_index":0,"item":{"id":"i1","type":"message",'
             b'"status":"in_progress","role":"assistant","content":[]}}\n\n')

    def events(self, odd: set[int], count: int = 400) -> list[bytes]:
        """Deltas, but for the numbers in `odd`."""
        return [self.FIRST] + [(self.ODD if number in odd else self.DELTA) % number
                               for number in range(1, count)]

    def relay(self, blocks: list[bytes]) -> tuple[bytes, int]:
        """(client bytes, how many blocks of whatever size were tried)"""
        stream = cp.RESPONSES.stream("m", {})
        with mock.patch.object(stream, "_quick", side_effect=stream._quick) as quick:
            return b"".join(map(stream.feed, blocks)), quick.call_count

    def test_the_others_pass_together_wherever_the_odd_ones_stand(self) -> None:
        for odd in (set(), {2}, {399}, {200}, {3, 150, 151, 390}):
            with self.subTest(odd=odd):
                events = self.events(odd)
                one_by_one, _ = self.relay(events)
                together, tries = self.relay([b"".join(events)])
                self.assertEqual(together, one_by_one)
                self.assertLess(tries, 20 * (len(odd) + 2))

    def test_an_event_without_the_id_is_not_taken_for_one_of_the_others(self) -> None:
        """Events without a name line have two line ends, with one they have three."""
        plain = [event.partition(b"\n")[2] for event in self.events({2, 3})[1:]]
        one_by_one, _ = self.relay([self.FIRST, *plain[:4]])
        together, _ = self.relay([self.FIRST, b"".join(plain[:4])])
        self.assertEqual(together, one_by_one)


class TranslatedRunTest(unittest.TestCase):
    """Blocks of deltas for a client of another dialect."""

    DIALECTS = {"chat": cp.CHAT, "responses": cp.RESPONSES, "messages": cp.MESSAGES}
    CLIENTS = dict(DIALECTS, gemini=cp.GEMINI, ollama=cp.OLLAMA)
    TEXTS = ["a", " b c", "", " ", "  \n", 'with "quotes"', "back\\slash\\", "\u00e4\u4e2d",
             "\U0001f600", "\u00a0", "\u2028", "\x7f", "TAB", '"item_id":"x"',
             '"sequence_number":5', "data: x", "end"]

    cut_at: list[str] = []

    def upstream(self, name: str, texts: list[str], as_ascii: bool) -> list[bytes]:
        """Frames of a stream with two texts and a call between them."""
        encoder = self.DIALECTS[name].stream_encoder(cp.Request("m", key="k"))
        events = [cp.ResponseStart("id", "m", 1)]
        parts = cp.Reasoning("", "state"), cp.Text(""), cp.ToolCall("c", "f", ""), cp.Text("")
        for index, part in enumerate(parts):
            pieces = {0: ["I", " think", "!"], 2: ['{"a":', "1}"]}.get(index, texts)
            events += [cp.PartStart(index, part),
                       *(cp.PartDelta(index, text) for text in pieces), cp.PartEnd(index)]
        raw = b"".join(map(encoder.feed, [*events, cp.ResponseEnd("stop", cp.Usage(3, output=4))]))
        if as_ascii:
            raw = re.sub("[^\\x00-\\x7f]", lambda found: json.dumps(found[0])[1:-1],
                         raw.decode()).encode()
        raw = raw.replace(b"TAB", b"\t")             # which JSON forbids, and some send
        return [frame + b"\n\n" for frame in raw.split(b"\n\n") if frame]

    def relay(self, client: str, name: str, blocks: list[bytes]) -> tuple[bytes, int]:
        """(client bytes, frames that were read one by one)"""
        request = cp.Request("asked", key="k", hides_thinking=True, cut_at=self.cut_at)
        stream = cp.TranslatedStream(self.CLIENTS[client], self.DIALECTS[name], request)
        decoder = stream._decoder
        with mock.patch.object(decoder, "read", side_effect=decoder.read) as read:
            return b"".join(map(stream.feed, blocks)) + stream.close(), read.call_count

    def test_any_cut_gives_the_same_bytes(self) -> None:
        numbers = random.Random(11)
        texts = ["first", "second"] + numbers.choices(self.TEXTS, k=30) + ["x", "y\u00e9"] * 20
        for client, name, as_ascii, size in combinations(
                self.CLIENTS, self.DIALECTS, (False, True), (2, 5, 17, 1000)):
            with self.subTest(client=client, upstream=name, as_ascii=as_ascii, size=size):
                frames = self.upstream(name, texts, as_ascii)
                self.assertLess(len(frames), 1000)
                one_by_one, _ = self.relay(client, name, frames)
                blocks = [b"".join(frames[at : at + size])
                          for at in range(0, len(frames), size)]
                self.assertEqual(self.relay(client, name, blocks)[0], one_by_one)

    def test_a_stop_sequence_in_a_block_is_seen(self) -> None:
        self.cut_at = ["word 7"]
        frames = self.upstream("responses", ["word %d" % number for number in range(20)], False)
        at = next(at for at, frame in enumerate(frames) if b"word 2" in frame)
        cuts = [0, at, at + 8, len(frames)]         # the block in between is of texts alone
        blocks = [b"".join(frames[begin:end]) for begin, end in zip(cuts, cuts[1:])]
        together, _ = self.relay("messages", "responses", blocks)
        self.assertIn(b"word 6", together)
        self.assertNotIn(b'"text":"word 7', together)
        self.assertNotIn(b"word 8", together)

    def test_plain_texts_need_no_look_at_each(self) -> None:
        texts = ["word %d" % number for number in range(300)]
        for client, name in (("messages", "chat"), ("chat", "responses"), ("chat", "messages"),
                             ("messages", "responses")):
            with self.subTest(client=client, upstream=name):
                frames = self.upstream(name, texts, False)
                blocks = [b"".join(frames[at : at + 50]) for at in range(0, len(frames), 50)]
                one_by_one, _ = self.relay(client, name, frames)
                together, looks = self.relay(client, name, blocks)
                self.assertEqual(together, one_by_one)
                self.assertLess(looks, 400)           # of 608; one reads half of them late


if __name__ == "__main__":
    unittest.main()
