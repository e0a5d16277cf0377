"""Odd shapes: a client's are a BadRequest or are read somehow, an upstream's end in an error."""
from __future__ import annotations

import copy
import random
import unittest

from support import SLOW
import copilot_proxy as cp
from copilot_proxy import DIALECTS, ProxyError, Request
from test_laws import MODEL, SEEDS, some_request, some_response
from test_matrix import CELLS, PARALLEL, events_of, run

ODD = (None, 1, -1, 1.5, True, "", "x", [], {}, [None], [1], ["x"], [[]], [{}], {"type": "x"},
       {"type": None}, {"type": []}, {"text": 1}, "\ud800", "cpx1.e30=", {"a": {"b": []}})

FUZZ_SEEDS = SEEDS if SLOW else SEEDS[:40]


def places(value, found):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        found.append((value, key))
        if isinstance(inner, (dict, list)) and inner:
            places(inner, found)
    return found


def mutate(rng: random.Random, body: dict) -> dict:
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 2)):
        where, key = rng.choice(places(body, []))
        if rng.random() < 0.2 and isinstance(where, dict):
            del where[key]
            if not body:
                return body
        else:
            where[key] = copy.deepcopy(rng.choice(ODD))
    return body


class Fuzz(unittest.TestCase):
    def test_requests(self) -> None:
        rng = random.Random(11)
        for client, upstream in CELLS:
            for seed in FUZZ_SEEDS:
                body = DIALECTS[client].encode_request(some_request(seed, client), MODEL)
                for _ in range(4):
                    odd = mutate(rng, body)
                    with self.subTest(client=client, upstream=upstream, body=odd):
                        try:
                            cp.translate_request(DIALECTS[client], DIALECTS[upstream], odd, MODEL)
                        except ProxyError as error:
                            self.assertEqual(error.status, 400)

    def test_bodies(self) -> None:
        rng = random.Random(12)
        for client, upstream in CELLS:
            for seed in FUZZ_SEEDS:
                body = DIALECTS[upstream].encode_response(some_response(seed, upstream),
                                                           Request("asked"))
                for _ in range(3):
                    odd = mutate(rng, body)
                    with self.subTest(client=client, upstream=upstream, body=odd):
                        try:
                            answer = cp.read_answer(DIALECTS[upstream], cp.dumps(odd), False,
                                                    Request("asked"))
                            DIALECTS[client].encode_response(answer, Request("asked"))
                        except ProxyError:
                            pass

    def test_streams(self) -> None:
        rng = random.Random(13)
        for client, upstream in CELLS:
            events = events_of(PARALLEL[upstream])
            for _ in range(600 if SLOW else 60):
                odd = list(events)
                at = rng.randrange(len(odd))
                if isinstance(odd[at], dict):
                    odd[at] = mutate(rng, odd[at])
                if rng.random() < 0.3:
                    other = rng.randrange(len(odd))
                    odd[at], odd[other] = odd[other], odd[at]
                data = b"".join(b"data: %b\n\n" % (e.encode() if isinstance(e, str) else cp.dumps(
                    e)) for e in odd)
                with self.subTest(client=client, upstream=upstream, data=data):
                    decoder = DIALECTS[upstream].stream_decoder()
                    for raw in data.split(b"\n\n"):
                        if raw:
                            decoder.read(raw[6:])
                    _, pipe = run(client, upstream, data)
                    self.assertTrue(pipe.ended)


if __name__ == "__main__":
    unittest.main()
