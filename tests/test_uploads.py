"""--upload-images: large images go to GitHub's store, their URLs to the model; else inline.
Of sections 8, 14, 15 and 20."""
from __future__ import annotations

import base64
import unittest
from typing import Any

from support import (FakeUpstream, Proxy, ProxyCase, bearer, chat, combinations, message, response,
                     run_command)
import copilot_proxy as cp
from fake_upstream import (ATTACHMENTS, CHAT, MESSAGES, RESPONSES, UPLOAD, Answer, today_models)

PNG = b"\x89PNG\r\n\x1a\n"


def picture(number: int = 0, size: int = cp.UPLOAD_CHARS) -> str:
    """The base64 of an image of so many bytes, each number another one."""
    return base64.b64encode(PNG + bytes([number]) * size).decode()


def data_url(data: str) -> str:
    return "data:image/png;base64," + data


def chat_body(model: str, *images: str, **more: Any) -> dict[str, Any]:
    return chat("", model, messages=[{"role": "user", "content": [
        {"type": "text", "text": "what is it?"}, *[
            {"type": "image_url", "image_url": {"url": data_url(data)}} for data in images]]}],
        **more)


def responses_body(model: str, *images: str, **more: Any) -> dict[str, Any]:
    return response("", model, input=[{"role": "user", "content": [
        {"type": "input_text", "text": "what is it?"}, *[
            {"type": "input_image", "image_url": data_url(data), "detail": "low"}
            for data in images]]}], **more)


def messages_body(model: str, *images: str, **more: Any) -> dict[str, Any]:
    return message("", model, messages=[{"role": "user", "content": [
        {"type": "text", "text": "what is it?"}, *[
            {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                         "data": data}} for data in images]]}], **more)


CLIENTS: tuple[tuple[str, Any], ...] = (
    ("/v1/chat/completions", chat_body), ("/v1/responses", responses_body),
    ("/v1/messages", messages_body))
MODELS = (("gemini-3.6-flash", CHAT), ("gpt-5.4", RESPONSES), ("claude-sonnet-5", MESSAGES))


class UploadCase(ProxyCase):
    """A proxy with the flag, on an account that takes many images."""

    settings = {"upload_images": True}

    def setUp(self) -> None:
        super().setUp()
        self.fake.models = today_models()

    def urls(self, path: str) -> list[str]:
        """Where the images of the newest request to `path` are; "inline" for those in it."""
        found = []
        for part in cp.content_parts(self.fake.last(path).json):
            if part.get("type") in cp.IMAGE_TYPES:
                holder = part.get("source") or part["image_url"]
                url = holder.get("url", "inline") if isinstance(holder, dict) else holder
                found.append("inline" if url.startswith("data:") else url)
        return found

    def ask(self, body: Any, path: str = "/v1/chat/completions") -> Any:
        reply = self.proxy.post(path, body)
        self.assertEqual(reply.status, 200, reply.body)
        return reply


class UploadTest(UploadCase):
    def test_a_large_image_goes_by_url_from_every_client_to_every_model(self) -> None:
        for path, make in CLIENTS:
            for model, upstream in MODELS:
                for stream in (False, True):
                    with self.subTest(path=path, model=model, stream=stream):
                        self.ask(make(model, picture(1), stream=stream), path)
                        (url,) = self.urls(upstream)
                        self.assertEqual(self.fake.attachments[url],
                                         base64.b64decode(picture(1)))
                        self.assertLess(len(self.fake.last(upstream).body), 2000)
        self.assertEqual(self.fake.count(UPLOAD), 1)        # the same one each time

    def test_what_goes_to_the_store_and_to_whom(self) -> None:
        self.ask(chat_body("gemini-3.6-flash", picture(1)))
        record = self.fake.last(UPLOAD)
        self.assertEqual(record.query, "name=image.png&content_type=image%2Fpng")
        self.assertEqual(record.headers["authorization"], "Bearer ghu_fake")
        self.assertEqual(record.headers["content-type"], "application/octet-stream")
        self.assertNotIn("ghu_fake", self.proxy.log_text())

    def test_small_images_stay_inline(self) -> None:
        small = base64.b64encode(PNG).decode()
        self.ask(chat_body("gemini-3.6-flash", small, picture(1), small))
        kinds = [url[:6] for url in self.urls(CHAT)]
        self.assertEqual(kinds, ["inline", ATTACHMENTS[:6], "inline"])

    def test_off_is_the_default(self) -> None:
        with Proxy(self.fake) as proxy:
            self.assertEqual(proxy.post("/v1/chat/completions", chat_body(
                "gemini-3.6-flash", picture(1))).status, 200)
        self.assertEqual(self.urls(CHAT), ["inline"])
        self.assertEqual(self.fake.count(UPLOAD), 0)

    def test_a_conversation_uploads_each_image_once(self) -> None:
        for count in range(1, 4):
            self.ask(chat_body("gemini-3.6-flash", *map(picture, range(count))))
            self.assertEqual(len(set(self.urls(CHAT))), count)
        self.assertEqual(self.fake.count(UPLOAD), 3)

    def test_images_too_large_for_one_request_are_all_there(self) -> None:
        images = [picture(number, 1_500_000) for number in range(4)]    # 8 MB in all
        self.ask(chat_body("gemini-3.6-flash", *images))
        self.assertEqual(len(self.urls(CHAT)), 4)
        self.assertNotIn("inline", self.urls(CHAT))

    def test_no_more_than_twenty_go_by_url_the_newest_ones(self) -> None:
        images = [picture(number, 150_000) for number in range(22)]
        self.fake.lenient.add("images")
        turns = [turn for data in images for turn in (
            {"role": "user", "content": [{"type": "image_url", "image_url": {
                "url": data_url(data)}}]}, {"role": "assistant", "content": "x"})]
        self.ask(chat("", "grok-4.5", messages=[*turns, {"role": "user", "content": "and?"}]))
        found = self.urls(CHAT)
        self.assertLessEqual(len([url for url in found if url != "inline"]), cp.MAX_UPLOADS)
        self.assertNotEqual(found[-1], "inline")

    def test_accounts_share_no_url(self) -> None:
        self.fake.github_tokens.add("ghu_other")
        for token in ("ghu_fake", "ghu_other"):
            reply = self.proxy.request("POST", "/v1/chat/completions", chat_body(
                "gemini-3.6-flash", picture(1)), bearer(token))
            self.assertEqual(reply.status, 200, reply.body)
        self.assertEqual(self.fake.count(UPLOAD), 2)


class FaultTest(UploadCase):
    """Where the store does not take it, nothing is lost."""

    def test_a_refused_upload_is_inline_and_not_tried_again_at_once(self) -> None:
        self.fake.takes_uploads = False
        for number in range(3):
            self.ask(chat_body("gemini-3.6-flash", picture(number)))
            self.assertEqual(self.urls(CHAT), ["inline"])
        self.assertEqual(self.fake.count(UPLOAD), 1)
        self.assertEqual(self.proxy.log_text().count("images are sent inline"), 1)

    def test_odd_answers_of_the_store_are_failures(self) -> None:
        odd: list[Any] = [
            Answer(201, body={"url": "https://evil.example/x"}), Answer(201, body={}),
            Answer(201, body=[]), Answer(201, body={"url": None}), Answer(500, body="x"),
            Answer(200, body="<html>")]
        for answer in odd:
            with self.subTest(answer):
                with FakeUpstream() as fake, Proxy(fake, upload_images=True) as proxy:
                    fake.models = today_models()
                    fake.script(UPLOAD, answer)
                    reply = proxy.post("/v1/chat/completions", chat_body(
                        "gemini-3.6-flash", picture(1)))
                    self.assertEqual(reply.status, 200, reply.body)
                    self.assertIn(b"data:image/png", fake.last(CHAT).body)

    def test_an_image_that_is_no_base64_is_the_upstreams_to_judge(self) -> None:
        self.ask(chat_body("gemini-3.6-flash", "!" * cp.UPLOAD_CHARS))
        self.assertEqual(self.fake.count(UPLOAD), 0)
        self.assertEqual(self.urls(CHAT), ["inline"])
        self.ask(chat_body("gemini-3.6-flash", picture(1)))
        self.assertNotEqual(self.urls(CHAT), ["inline"])

    def test_a_model_that_cannot_see_urls_gets_the_image_itself(self) -> None:
        refusals = ((False, "external image URLs are not supported"),
                    (True, {"error": {"message": "Unable to download the file."}}))
        for (path, make), (model, upstream), (stream, refusal) in combinations(
                CLIENTS, MODELS, refusals):
            with self.subTest(path=path, model=model, stream=stream):
                with FakeUpstream() as fake, Proxy(fake, upload_images=True) as proxy:
                    fake.models = today_models()
                    fake.script(upstream, Answer(400, body=refusal))
                    reply = proxy.post(path, make(model, picture(1), stream=stream))
                    self.assertEqual(reply.status, 200, reply.body)
                    self.assertIn(picture(1).encode(), fake.last(upstream).body)
                    self.assertEqual(fake.count(upstream), 2)

    def test_a_store_that_does_not_answer_costs_its_time_once(self) -> None:
        usual = cp.UPLOAD_S
        cp.UPLOAD_S = 0.05                                 # type: ignore[misc]
        self.addCleanup(setattr, cp, "UPLOAD_S", usual)
        self.fake.script(UPLOAD, Answer(hold=True))
        self.ask(chat_body("gemini-3.6-flash", picture(1)))
        self.assertEqual(self.urls(CHAT), ["inline"])
        self.fake.release()

    def test_a_request_that_is_not_admitted_uploads_nothing(self) -> None:
        with Proxy(self.fake, upload_images=True, rate_limit=3600.0) as proxy:
            body = chat_body("gemini-3.6-flash", picture(1))
            statuses = [proxy.post("/v1/chat/completions", dict(
                body, messages=body["messages"] if again else [
                    {"role": "user", "content": "hi"}])).status for again in (False, True)]
        self.assertEqual(statuses, [200, 429])
        self.assertEqual(self.fake.count(UPLOAD), 0)


class FlagTest(unittest.TestCase):
    def test_another_github_has_no_store(self) -> None:
        for url in ("https://example.ghe.com", "https://github.example.org"):
            with self.assertRaisesRegex(cp.ConfigError, "--upload-images"):
                cp.Settings(github_url=url, upload_images=True).check()
        self.assertEqual(cp.Settings(upload_images=True).check().uploads_url,
                         "https://uploads.github.com")

    def test_the_help_and_the_docstring_name_the_host(self) -> None:
        code, text = run_command("start", "--help")
        self.assertEqual(code, 0)
        self.assertIn("uploads.github.com", text)
        self.assertIn("uploads.github.com", cp.__doc__ or "")


if __name__ == "__main__":
    unittest.main()
