"""Answers as clients can use them: failures inside a 200, held-back ends, the same fields whole and
streamed, for every dialect of the client and of the upstream."""
from __future__ import annotations

import unittest

from support import cp


class NamedFailures(unittest.TestCase):
    """One table says what a code, a type or a status of an upstream means."""

    MEANINGS = (
        (402, "quota_exceeded", "free_quota_exceeded", "session_quota_exceeded",
         "overage_limit_reached", "billing_not_configured", "insufficient_quota"),
        (429, "rate_limited", "user_model_rate_limited:gpt-5", "user_global_rate_limited:pro",
         "user_weekly_rate_limited", "integration_rate_limited", "agent_mode_limit_exceeded",
         "rate_limit_error", "rate_limit_exceeded", "RESOURCE_EXHAUSTED", 429, "429"),
        (529, "model_overloaded", "overloaded_error", "server_is_overloaded"),
        (503, "UNAVAILABLE", "service_unavailable", 503),
        (500, "server_error", "internal_error", "api_error", "INTERNAL"),
        (400, "invalid_request_error", "context_length_exceeded", "INVALID_ARGUMENT"),
        (0, None, "", "failed", "error", 7, True, [], {}, "gpt-5"))

    def test_the_status_of_a_name(self) -> None:
        for status, *names in self.MEANINGS:
            for name in names:
                self.assertEqual(cp.status_of(name), status, name)

    def test_a_failure_is_known_in_every_shape(self) -> None:
        for code, status, types in (
                ("rate_limited", 429, ("rate_limit_error", "rate_limit_error")),
                ("model_overloaded", 529, ("server_error", "overloaded_error")),
                ("quota_exceeded", 402, ("insufficient_quota", "permission_error")),
                ("server_error", 500, ("server_error", "api_error"))):
            for shape in (
                    {"error": {"message": "no", "code": code}},
                    {"error": {"message": "no", "type": code}},
                    {"error": {"message": "no", "status": code.upper()}},
                    {"type": "error", "error": {"type": code, "message": "no"}},
                    {"type": "error", "code": code, "message": "no"},
                    {"status": "failed", "error": {"code": code, "message": "no"}},
                    {"error": {"message": '{"error":{"code":"%s","message":"no"}}' % code}}):
                error = cp.told_error(shape)
                self.assertEqual((str(error), error.status, error.types(), error.answered),
                                 ("no", status, types, True), shape)

    def test_a_limit_under_another_status_is_a_limit(self) -> None:
        for status, name, true in ((400, "rate_limited", 429), (403, "quota_exceeded", 402),
                                   (500, "overloaded_error", 529), (503, "rate_limited", 429),
                                   (429, "quota_exceeded", 429), (402, "rate_limited", 402),
                                   (404, "server_error", 404), (503, "overloaded", 503)):
            self.assertEqual(cp.true_status(status, [None, name]), true, (status, name))

    def test_codes_that_codex_acts_on(self) -> None:
        for name, code in (("quota_exceeded", "insufficient_quota"),
                           ("user_global_rate_limited:pro", "rate_limit_exceeded"),
                           ("model_overloaded", "server_is_overloaded"), ("other", "other")):
            error = cp.told_error({"error": {"code": name, "message": "no"}})
            self.assertEqual(error.response_code, code)


if __name__ == "__main__":
    unittest.main()
