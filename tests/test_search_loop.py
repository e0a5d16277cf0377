"""Searches of the web in the middle of an answer, made by the proxy (sections 7, 9, 20)."""
from __future__ import annotations

import json
import threading
import unittest
from typing import Any
from unittest import mock

from support import Proxy, ProxyCase, chat, cp, message, release, response, wait_until
from socket_client import Socket
from fake_upstream import CHAT, MESSAGES, RESPONSES, Answer, bad, today_models

RESULTS = [("One", "https://one.example/a"), ("Two", "https://two.example/b")]
TOOL = {"type": "web_search_20250305", "name": "web_search"}
OWN = {"name": "get_weather", "description": "Weather.", "input_schema": {
    "type": "object", "properties": {"city": {"type": "string"}}}}
CLAUDE, GEMINI = "claude-sonnet-5", "gemini-3.6-flash"


def finished(events: Any) -> Any:
    """The response in the last event of a stream."""
    assert events[-1]["type"] == "response.completed", events[-1]
    return events[-1]["response"]


def search_usage(count: int) -> Any:
    """As Anthropic's SDK wants it when it is strict."""
    return {"web_search_requests": count, "web_fetch_requests": 0}


class LoopCase(ProxyCase):
    """An account of late 2026 whose GPTs search, and models that ask for searches."""

    def setUp(self) -> None:
        super().setUp()
        self.fake.models = today_models()
        self.fake.search_results = RESULTS

    def searches(self) -> list[Any]:
        """What went up with OpenAI's hosted search."""
        return [r for r in self.fake.requests if r.path == RESPONSES
                and any(tool["type"] == "web_search" for tool in r.json.get("tools") or ())]

    def rounds(self, path: str) -> list[Any]:
        """What went up with the function in its place."""
        return [r for r in self.fake.requests if r.path == path and r not in self.searches()]


class MessagesTest(LoopCase):
    """SDK users, who offer the search beside tools of their own."""

    def ask(self, text: str, stream: bool = False, proxy: Any = None, tools: Any = None,
            **more: Any) -> Any:
        reply = (proxy or self.proxy).post("/v1/messages", message(
            text, CLAUDE, stream=stream, tools=tools or [OWN, TOOL], **more))
        self.assertEqual(reply.status, 200, reply.body)
        return reply

    def content(self, reply: Any) -> list[Any]:
        """The blocks, also of a stream."""
        if not reply.events:
            return list(reply.json["content"])
        blocks: dict[int, Any] = {}
        inputs: dict[int, str] = {}
        for event in reply.events:
            if event["type"] == "content_block_start":
                self.assertEqual(event["index"], len(blocks))
                blocks[event["index"]] = event["content_block"]
            elif event["type"] == "content_block_delta":
                block, delta = blocks[event["index"]], event["delta"]
                if delta["type"] == "text_delta":
                    block["text"] += delta["text"]
                elif delta["type"] == "input_json_delta":
                    inputs[event["index"]] = inputs.get(event["index"], "") + \
                        delta["partial_json"]
        for index, text in inputs.items():
            blocks[index]["input"] = json.loads(text)
        return list(blocks.values())

    def end(self, reply: Any) -> tuple[str, Any]:
        """(stop_reason, usage)"""
        if not reply.events:
            return reply.json["stop_reason"], reply.json["usage"]
        self.assertEqual(reply.events[-1]["type"], "message_stop")
        event = reply.events[-2]
        return event["delta"]["stop_reason"], event["usage"]

    def test_the_model_searches_and_goes_on(self) -> None:
        for stream in (False, True):
            with self.subTest(stream=stream):
                reply = self.ask("cats @@searches=1@@", stream)
                content = self.content(reply)
                said, use, result, words = content
                self.assertEqual(said["text"], "Let me look.")
                self.assertEqual(use, {"type": "server_tool_use", "id": result["tool_use_id"],
                                       "name": "web_search", "input": {"query": "cats 1"}})
                self.assertTrue(use["id"].startswith("srvtoolu_"))
                self.assertEqual([(one["type"], one["title"], one["url"])
                                  for one in result["content"]],
                                 [("web_search_result", *source) for source in RESULTS])
                self.assertIn("Echo: cats 1\n\nSources:\n- One: https://one.example/a",
                              words["text"])               # Claude has read it
                self.assertNotIn("citations", words)
                reason, usage = self.end(reply)
                self.assertEqual((reason, usage["server_tool_use"]),
                                 ("end_turn", search_usage(1)))
                first, last = self.rounds(MESSAGES)[-2:]
                self.assertEqual([tool["name"] for tool in last.json["tools"]],
                                 ["get_weather", "web_search"])
                self.assertEqual((first.headers["x-initiator"], last.headers["x-initiator"]),
                                 ("user", "agent"))
                self.assertEqual(self.searches()[-1].headers["x-initiator"], "agent")

    def test_tokens_of_all_rounds_are_counted(self) -> None:
        for stream in (False, True):
            _, usage = self.end(self.ask("cats @@searches=2@@", stream))
            sent = self.rounds(MESSAGES)[-3:]
            total = sum(max(4, len(r.body) // 4) for r in sent)
            self.assertEqual(usage["input_tokens"] + usage["cache_read_input_tokens"], total)
            self.assertEqual(usage["server_tool_use"], search_usage(2))

    def test_max_uses(self) -> None:
        for stream in (False, True):
            tools = [OWN, dict(TOOL, max_uses=1)]
            reply = self.ask("cats @@searches=2@@", stream, tools=tools)
            content = self.content(reply)
            results = [b["content"] for b in content if b["type"] == "web_search_tool_result"]
            self.assertEqual(results[1], {"type": "web_search_tool_result_error",
                                          "error_code": "max_uses_exceeded"})
            self.assertEqual(len(results), 2)
            self.assertIn("max_uses_exceeded", content[-1]["text"])
            self.assertEqual(self.end(reply)[1]["server_tool_use"], search_usage(1))
        self.assertEqual(len(self.searches()), 2)

    def test_a_model_that_does_not_stop_is_stopped(self) -> None:
        for stream in (False, True):
            reply = self.ask("cats @@searches=99@@", stream)
            self.assertEqual(self.end(reply)[0], "pause_turn")
            self.assertEqual(self.content(reply)[-1]["type"], "web_search_tool_result")
        self.assertEqual(len(self.searches()), 2 * cp.MAX_SEARCH_ROUNDS)

    def test_filters_and_place_are_passed(self) -> None:
        place = {"type": "approximate", "city": "Paris", "country": "FR"}
        self.ask("cats @@searches=1@@", tools=[dict(
            TOOL, allowed_domains=["one.example"], user_location=place)])
        self.assertEqual(self.searches()[-1].json["tools"], [{
            "type": "web_search", "filters": {"allowed_domains": ["one.example"]},
            "user_location": place}])

    def test_a_refused_filter_goes_though_the_stream_has_begun(self) -> None:
        def refuse(ask: Any) -> None:
            if ask.record.path == RESPONSES and "blocked_domains" in str(ask.body.get("tools")):
                raise bad("Unknown parameter: 'tools[0].filters.blocked_domains'.",
                          "unknown_parameter", "tools[0].filters.blocked_domains")
        self.fake.refusals = [refuse]
        reply = self.ask("cats @@searches=1@@", True, tools=[dict(
            TOOL, blocked_domains=["bad.example"])])
        self.assertEqual(self.end(reply)[1]["server_tool_use"], search_usage(1))
        self.assertEqual(len(self.searches()), 2)

    def test_the_clients_own_tool_beside_it_is_handed_back(self) -> None:
        for stream in (False, True):
            reply = self.ask("cats @@searches=1 beside=1@@", stream)
            kinds = [block["type"] for block in self.content(reply)]
            self.assertEqual(sorted(kinds), ["server_tool_use", "text", "tool_use",
                                             "web_search_tool_result"])
            self.assertEqual(self.end(reply)[0], "tool_use")
            content = self.content(reply)
            [call] = [block for block in content if block["type"] == "tool_use"]
            again = self.ask("", messages=[
                {"role": "user", "content": "cats @@searches=1@@"},
                {"role": "assistant", "content": content},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call["id"],
                                              "content": "sunny"}]}])
            self.assertIn("tool result: sunny", again.json["content"][-1]["text"])
            replayed = str(self.rounds(MESSAGES)[-1].json["messages"][1])
            self.assertIn("Echo: cats 1", replayed)        # what was found is not lost
            self.assertIn("https://two.example/b", replayed)
            self.assertNotIn("server_tool_use'", replayed)

    def test_two_searches_in_one_round(self) -> None:
        reply = self.ask("parallel cats @@searches=2@@", True)
        self.assertEqual([block["type"] for block in self.content(reply)], [
            "text", "server_tool_use", "web_search_tool_result", "server_tool_use",
            "web_search_tool_result", "text"])

    def test_a_forced_search_is_forced_once(self) -> None:
        self.ask("cats @@searches=1@@", tool_choice={"type": "tool", "name": "web_search"})
        self.assertEqual([r.json["tool_choice"] for r in self.rounds(MESSAGES)[-2:]],
                         [{"type": "tool", "name": "web_search"}, {"type": "auto"}])

    def test_the_search_alone_is_claudes_too(self) -> None:
        reply = self.ask("What of cats? @@searches=1@@", tools=[TOOL])
        self.assertEqual([block["type"] for block in reply.json["content"]], [
            "text", "server_tool_use", "web_search_tool_result", "text"])
        self.assertEqual(reply.json["model"], CLAUDE)

    def test_a_search_that_fails_is_told_and_the_answer_goes_on(self) -> None:
        limit = Answer(429, body={"error": {"message": "slow down",
                                            "code": "user_model_rate_limited"}})
        policy = Answer(403, body={"error": {"message": "web search is off", "code": "policy"}})
        for scripted, code in ((policy, "unavailable"), (limit, "too_many_requests")):
            for stream in (False, True):               # a limit lasts
                self.fake.script(RESPONSES, scripted)
                reply = self.ask("cats @@searches=1@@", stream)
                content = self.content(reply)
                self.assertEqual(content[2]["content"], {
                    "type": "web_search_tool_result_error", "error_code": code})
                self.assertIn("Web search failed", content[3]["text"])
                self.assertEqual(self.end(reply)[1]["server_tool_use"],
                                 search_usage(0))

    def test_a_round_that_fails_ends_the_stream_with_an_error(self) -> None:
        self.ask("cats @@searches=1@@")                    # the refusal is learned
        self.fake.script(MESSAGES, Answer(0), Answer(400, body={"error": {
            "message": "no", "code": "odd"}}))
        events = self.ask("cats @@searches=1@@", True).events
        self.assertEqual((events[-1]["type"], events[-1]["error"]["message"]), ("error", "no"))
        self.assertEqual([e["type"] for e in events].count("message_start"), 1)

    def test_a_round_that_is_cut_ends_the_stream_with_an_error(self) -> None:
        self.ask("cats @@searches=1@@")
        self.fake.script(MESSAGES, Answer(0), Answer(chunks=[b"event: message_start\n"], end=False))
        events = self.ask("cats @@searches=1@@", True).events
        self.assertEqual(events[-1]["type"], "error")

    def test_a_request_that_is_stopped_at_its_search_ends_with_an_error(self) -> None:
        self.ask("cats @@searches=1@@")

        async def stop(*given: Any) -> Any:
            raise cp.RequestStopped

        with mock.patch.object(cp.Job, "search", staticmethod(stop)):
            events = self.ask("cats @@searches=1@@", True).events
            self.assertEqual(events[-1]["type"], "error")
            self.assertEqual([e["type"] for e in events].count("message_start"), 1)
            self.assertIn("a person stopped", events[-1]["error"]["message"])
            reply = self.proxy.post("/v1/messages", message("cats @@searches=1@@", CLAUDE,
                                                            tools=[TOOL]))
            self.assertEqual((reply.status, reply.json["type"]), (403, "error"))

    def test_a_budget_holds_for_each_call(self) -> None:
        with Proxy(self.fake, budget=0.3) as proxy:
            for stream in (True, False):
                reply = proxy.post("/v1/messages", message(
                    "cats " + "x" * 900 + " @@searches=9@@", CLAUDE, stream=stream, tools=[TOOL]))
                self.assertIn("budget", reply.body.decode())
            self.assertEqual(reply.status, 429)
        self.assertLess(len(self.rounds(MESSAGES)), 6)

    def test_each_search_has_a_row_and_its_credits(self) -> None:
        self.ask("cats @@searches=2@@", True)
        self.proxy.app.ledger.settle()
        rows = self.proxy.get("/stats").json["recent"]
        found = [(row["dialect"], row["model"], row["initiator"]) for row in rows]
        self.assertEqual(found, [("messages", CLAUDE, "user"), ("search", "gpt-5-mini", "agent"),
                                 ("search", "gpt-5-mini", "agent")])
        for row, record in zip(rows[1:], reversed(self.searches())):
            self.assertEqual(row["nano_aiu"], max(4, len(record.body) // 4) * 175000 + 1)
            self.assertEqual(row["status"], 200)
        self.assertEqual(self.proxy.get("/stats").json["searches"], {"gpt-5-mini": 2})
        lines = [line for line in self.proxy.log_text().splitlines() if "gpt-5-mini" in line]
        self.assertEqual(len([line for line in lines if "POST /alpha/search" in line]), 2)

    def test_a_whole_answer_says_what_all_of_it_cost(self) -> None:
        self.ask("cats @@searches=1@@")
        before = len(self.fake.requests)
        reply = self.ask("cats @@searches=2@@")
        nano = sum(max(4, len(r.body) // 4) * 175000 + 1 for r in self.fake.requests[before:])
        self.assertEqual(reply.headers["x-copilot-proxy-credits"], "%d.%09d" % divmod(nano, 10**9))

    def test_switched_off_the_tool_goes_as_a_loss(self) -> None:
        with Proxy(self.fake, no_web_search=True) as proxy:
            for stream in (False, True):
                reply = self.ask("cats @@searches=1@@", stream, proxy)
                self.assertIn("tools", reply.headers["x-copilot-proxy-lossy"])
                self.assertEqual([block["type"] for block in self.content(reply)], ["text"])
            self.assertEqual(self.searches(), [])

    def test_where_no_model_searches_the_tool_goes_as_a_loss(self) -> None:
        self.fake.models = [e for e in self.fake.models if e["id"] in (CLAUDE, GEMINI)]
        for stream in (False, True):
            reply = self.ask("cats @@searches=1@@", stream)
            self.assertIn("tools", reply.headers["x-copilot-proxy-lossy"])
            sent = self.fake.last(MESSAGES).json
            self.assertEqual([tool["name"] for tool in sent["tools"]], ["get_weather"])

    def test_requests_that_meet_the_same_refusal_at_once_are_all_answered(self) -> None:
        """The first one to learn it left the others with a 400."""
        paths = (("/v1/messages", message("cats", CLAUDE, tools=[TOOL]), MESSAGES),
                 ("/v1/messages", message("cats", CLAUDE, tools=[TOOL], stream=True), MESSAGES))
        replies: list[Any] = []
        threads = []
        for path, body, upstream in paths:
            self.fake.script(upstream, Answer(status=0, hold=True))
            threads.append(threading.Thread(
                target=lambda path=path, body=body: replies.append(self.proxy.post(path, body))))
            threads[-1].start()
        wait_until(lambda: self.fake.holding == len(paths))
        release(self.fake, len(paths))
        for thread in threads:
            thread.join(10)
        self.assertEqual([reply.status for reply in replies], [200] * len(paths),
                         [reply.body for reply in replies])

    def test_on_a_gpt_and_a_gemini(self) -> None:
        for model, path in (("gpt-5.4", RESPONSES), (GEMINI, CHAT)):
            for stream in (False, True):
                reply = self.proxy.post("/v1/messages", message(
                    "cats @@searches=1@@", model, stream=stream, tools=[OWN, TOOL]))
                kinds = [block["type"] for block in self.content(reply)]
                self.assertEqual(kinds[-3:], ["server_tool_use", "web_search_tool_result",
                                              "text"], (model, stream))
                self.assertEqual(self.rounds(path)[-1].headers["x-initiator"], "agent")

    def test_a_tool_of_the_clients_with_the_same_name(self) -> None:
        own = dict(OWN, name="web_search")
        reply = self.ask("use the tool", tools=[own, dict(TOOL, name="search")])
        self.assertEqual([block["type"] for block in reply.json["content"]], ["text", "tool_use"])


class ResponsesTest(LoopCase):
    """Codex and OpenAI's SDK on models without the hosted search."""

    def ask(self, text: str, model: str = CLAUDE, stream: bool = True, **more: Any) -> Any:
        more.setdefault("tools", [{"type": "web_search", "external_web_access": True}])
        reply = self.proxy.post("/v1/responses", response(text, model, stream=stream, **more))
        self.assertEqual(reply.status, 200, reply.body)
        return reply

    def test_a_search_is_an_item(self) -> None:
        for model in (CLAUDE, GEMINI, "claude-sonnet-4.6"):
            for stream in (False, True):
                for kind in ("web_search", "web_search_preview", "web_search_2025_08_26"):
                    with self.subTest(model=model, stream=stream, kind=kind):
                        reply = self.ask("cats @@searches=1 reasoning=0@@", model, stream,
                                         tools=[{"type": kind}])
                        final = finished(reply.events) if stream else reply.json
                        output = [item for item in final["output"] if item["type"] != "reasoning"]
                        self.assertEqual(final["status"], "completed")
                        call, words = output[-2:]
                        self.assertEqual(call["type"], "web_search_call")
                        self.assertEqual(call["status"], "completed")
                        self.assertEqual(call["action"], {
                            "type": "search", "query": "cats 1", "queries": ["cats 1"],
                            "sources": [{"type": "url", "url": url} for _, url in RESULTS]})
                        [part] = words["content"]
                        for (title, url), note in zip(RESULTS, part["annotations"]):
                            self.assertEqual((note["type"], note["title"], note["url"]),
                                             ("url_citation", title, url))
                            place = slice(note["start_index"], note["end_index"])
                            self.assertEqual(part["text"][place], url)
                        self.assertEqual(len(part["annotations"]), 2)

    def test_who_wants_no_live_page_gets_none(self) -> None:
        self.ask("cats @@searches=1@@", tools=[{"type": "web_search",
                                                "external_web_access": False}])
        self.assertEqual(self.searches()[-1].json["tools"], [
            {"type": "web_search", "external_web_access": False}])

    def test_the_events_of_a_search(self) -> None:
        events = self.ask("cats @@searches=1 reasoning=0@@", GEMINI).events
        kinds = [event["type"] for event in events]
        at = kinds.index("response.web_search_call.in_progress")
        self.assertEqual(kinds[at - 1:at + 4], [
            "response.output_item.added", "response.web_search_call.in_progress",
            "response.web_search_call.searching", "response.web_search_call.completed",
            "response.output_item.done"])
        self.assertEqual([event["sequence_number"] for event in events], list(range(len(events))))
        self.assertEqual(kinds.count("response.created"), 1)
        final = finished(events)
        done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
        self.assertEqual(done, final["output"])

    def test_a_gpt_searches_by_itself(self) -> None:
        reply = self.ask("cats", "gpt-5.4")
        self.assertEqual(len(self.searches()), 1)
        self.assertEqual(self.fake.count(RESPONSES), 1)
        kinds = [item["type"] for item in finished(reply.events)["output"]]
        self.assertIn("web_search_call", kinds)

    def test_a_tool_of_codex_beside_it_comes_first(self) -> None:
        """Results of both could not be told apart in the next request, so the model asks again."""
        function = {"type": "function", "name": "exec_command", "parameters": {
            "type": "object", "properties": {}}}
        for stream in (False, True):
            reply = self.ask("cats @@searches=1 beside=1@@", stream=stream,
                             tools=[{"type": "web_search"}, function])
            final = finished(reply.events) if stream else reply.json
            kinds = [item["type"] for item in final["output"]]
            self.assertIn("function_call", kinds)
            self.assertNotIn("web_search_call", kinds)
        self.assertEqual(self.searches(), [])

    def test_a_failed_search(self) -> None:
        self.fake.search_results = None
        for stream in (False, True):
            reply = self.ask("cats @@searches=1@@", stream=stream)
            final = finished(reply.events) if stream else reply.json
            [call] = [one for one in final["output"] if one["type"] == "web_search_call"]
            self.assertEqual(call["status"], "failed")
            self.assertIn("Web search failed", final["output"][-1]["content"][0]["text"])

    def test_its_item_in_a_later_request_becomes_text(self) -> None:
        items = finished(self.ask("cats @@searches=1@@").events)["output"]
        self.ask("", input=[{"role": "user", "content": "cats"}, *items,
                            {"role": "user", "content": "go on"}])
        sent = str(self.rounds(MESSAGES)[-1].json["messages"])
        self.assertIn("https://one.example/a", sent)
        self.assertIn("cats 1", sent)

    def test_the_answer_is_kept_under_its_id(self) -> None:
        for stream in (False, True):
            reply = self.ask("cats @@searches=1@@", stream=stream, store=True)
            final = finished(reply.events) if stream else reply.json
            kept = self.proxy.get("/v1/responses/" + final["id"])
            self.assertEqual(kept.json["output"], final["output"])


    def test_over_a_websocket(self) -> None:
        with Socket(self.proxy.port) as client:
            for _ in range(2):
                events = client.turn(response("cats @@searches=1@@", CLAUDE,
                                              tools=[{"type": "web_search"}]))
                kinds = [item["type"] for item in finished(events)["output"]]
                self.assertEqual(kinds[-2:], ["web_search_call", "message"])


class StopTest(unittest.TestCase):
    """A stop sequence that the proxy watches for."""

    def test_an_answer_that_was_cut_waits_for_no_search(self) -> None:
        request = cp.Request("m", search=cp.SearchTool({}), cut_at=["b"])
        loop = cp.SearchLoop(cp.MESSAGES)
        loop.offer(request, request.search)
        stream = cp.TranslatedStream(cp.MESSAGES, cp.CHAT, request, loop)
        call = {"index": 0, "id": "c", "function": {"name": "web_search", "arguments": "{}"}}
        out = stream.feed(b"".join(b"data: %b\n\n" % cp.dumps({"choices": [choice]}) for choice in (
            {"index": 0, "delta": {"content": "abc"}},
            {"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": "tool_calls"},
        )) + b"data: [DONE]\n\n")
        self.assertIn(b"message_stop", out)
        self.assertEqual((stream.ended, stream.is_waiting, stream.close()), (True, False, b""))


class ChatTest(LoopCase):
    """Chat's web_search_options."""

    def test_sources_are_annotations(self) -> None:
        place = {"type": "approximate", "approximate": {"city": "Paris", "country": "FR"}}
        for model in (CLAUDE, GEMINI, "claude-sonnet-4.6", "gpt-5-mini", "gpt-5.4"):
            for stream in (False, True):
                with self.subTest(model=model, stream=stream):
                    reply = self.proxy.post("/v1/chat/completions", chat(
                        "cats @@searches=1@@", model, stream=stream, web_search_options={
                            "user_location": place, "search_context_size": "low"}))
                    self.assertEqual(reply.status, 200, reply.body)
                    notes = self.notes(reply)
                    self.assertEqual([note["url_citation"]["url"] for note in notes],
                                     [url for _, url in RESULTS])
                    self.assertEqual(self.searches()[-1].json["tools"], [{
                        "type": "web_search", "search_context_size": "low", "user_location": {
                            "type": "approximate", "city": "Paris", "country": "FR"}}])

    def notes(self, reply: Any) -> list[Any]:
        if not reply.events:
            self.assertEqual(reply.json["choices"][0]["finish_reason"], "stop")
            self.assertNotIn("tool_calls", reply.json["choices"][0]["message"])
            return list(reply.json["choices"][0]["message"]["annotations"])
        choices = [event["choices"][0] for event in reply.events if event.get("choices")]
        self.assertEqual([c["finish_reason"] for c in choices if c["finish_reason"]], ["stop"])
        self.assertEqual(sum("role" in c["delta"] for c in choices), 1)
        return [note for c in choices for note in c["delta"].get("annotations", ())]


class GeminiTest(LoopCase):
    """googleSearch, in all its spellings."""

    def test_grounding(self) -> None:
        for tool in ({"googleSearch": {}}, {"google_search": {}}, {"googleSearchRetrieval": {}}):
            for model in (CLAUDE, GEMINI, "gpt-5.4"):
                for method in ("generateContent", "streamGenerateContent?alt=sse",
                               "streamGenerateContent"):
                    with self.subTest(tool=tool, model=model, method=method):
                        reply = self.proxy.post("/v1beta/models/%s:%s" % (model, method), {
                            "contents": [{"role": "user", "parts": [
                                {"text": "cats @@searches=1@@"}]}], "tools": [tool]})
                        self.assertEqual(reply.status, 200, reply.body)
                        self.check(reply)

    def check(self, reply: Any) -> None:
        pieces = reply.events or json.loads(reply.body)
        if isinstance(pieces, dict):
            pieces = [pieces]
        found = [piece["candidates"][0]["groundingMetadata"] for piece in pieces
                 if "groundingMetadata" in piece["candidates"][0]]
        self.assertEqual(found, [{
            "webSearchQueries": ["cats 1"], "groundingSupports": [], "groundingChunks": [
                {"web": {"uri": url, "title": title}} for title, url in RESULTS]}])
        last = pieces[-1]["candidates"][0]
        self.assertEqual(last["finishReason"], "STOP")
        self.assertIn("groundingMetadata", last)
        text = "".join(part.get("text", "") for piece in pieces
                       for part in piece["candidates"][0]["content"]["parts"])
        self.assertIn("https://two.example/b", text)


class LateRefusalTest(ProxyCase):
    """A second try that cannot be made, once a keep-alive has begun the stream."""
    settings = dict(keepalive_s=0.05, fallback="text-embedding-3-small")  # which cannot chat

    def test_the_stream_ends_with_an_error_of_its_dialect(self) -> None:
        usual = cp.fall_back

        async def slowly(exchange: Any, *given: Any) -> Any:
            while not exchange.started:
                await cp.wait(cp.Pause(0.01))
            return await usual(exchange, *given)

        for path, upstream, body, sign in (
                ("/v1/chat/completions", CHAT, chat("a", stream=True), '{"error":'),
                ("/v1/messages", MESSAGES, message("a", stream=True), "event: error"),
                ("/v1/responses", RESPONSES, response("a", stream=True), "response.failed")):
            with self.subTest(path), mock.patch.object(cp, "fall_back", slowly):
                self.fake.script(upstream, Answer(402, body={"error": {
                    "message": "none left", "code": "quota_exceeded"}}))
                reply = self.proxy.post(path, body)
                self.assertEqual(reply.status, 200)        # it came with a keep-alive
                self.assertIn(sign, reply.body.decode())
                self.assertIn("is not accessible via", reply.body.decode())


if __name__ == "__main__":
    unittest.main()
