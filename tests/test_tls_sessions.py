"""A connection to an upstream resumes the TLS session of one before (section 13, over TLS).

A handshake is most of what a new stream costs, and the certificate is most of a handshake.
"""
from __future__ import annotations

import contextlib
import os
import ssl
import unittest

from support import DEADLINE_S, HERE, cp
from cases import Accepting

CERTIFICATE = os.path.join(HERE, "localhost.pem")    # for localhost, 127.0.0.1 and proxy.test
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class TlsServer(Accepting):
    """Answers one request on each connection; `resumed` says of each whether it was resumed."""

    def __init__(self, version: ssl.TLSVersion) -> None:
        self.version = version
        self.resumed: list[bool] = []
        self.forget()
        super().__init__()

    def forget(self) -> None:
        """As a server that starts again: it knows none of the sessions that it gave."""
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(CERTIFICATE)
        self._context.minimum_version = self._context.maximum_version = self.version

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                raw = self._socket.accept()[0]
                raw.settimeout(DEADLINE_S)
                with contextlib.suppress(OSError), raw, \
                        self._context.wrap_socket(raw, server_side=True) as tls:
                    self.resumed.append(bool(tls.session_reused))
                    tls.recv(65536)
                    tls.sendall(ANSWER)
                    tls.recv(1)                      # until the client has read it


class TlsSessionTest(unittest.TestCase):
    def setUp(self) -> None:
        settings = cp.Settings(ca_file=CERTIFICATE, proxy_env=False)
        self.upstream = cp.Upstream(settings, {})
        self.addCleanup(self.upstream.pool.close)

    def ask(self, server: TlsServer, host: str = "localhost") -> bytes:
        """The body of an answer that came over a new connection."""
        request = cp.UpstreamRequest("GET", "https://%s:%d/" % (host, server.port), {})
        request.is_fresh = True
        answer = cp.run(self.upstream.send(request))
        body: bytes = cp.run(answer.read_all())
        self.upstream.pool.clear()
        return body

    def test_the_certificate_is_asked_for_once(self) -> None:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            with self.subTest(version.name), TlsServer(version) as server:
                for _ in range(4):
                    self.assertEqual(self.ask(server), b"ok")
                self.assertEqual(server.resumed, [False, True, True, True])

    def test_a_server_that_knows_the_session_no_more_makes_a_new_one(self) -> None:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            with self.subTest(version.name), TlsServer(version) as server:
                self.ask(server)
                self.ask(server)
                server.forget()
                for _ in range(3):
                    self.assertEqual(self.ask(server), b"ok")
                self.assertEqual(server.resumed, [False, True, False, True, True])

    def test_another_name_is_another_server(self) -> None:
        """Whoever sits at the same address has to show a certificate for that name."""
        with TlsServer(ssl.TLSVersion.TLSv1_3) as server:
            self.ask(server)
            self.ask(server, "127.0.0.1")
            self.ask(server, "127.0.0.1")
            self.assertEqual(server.resumed, [False, False, True])


if __name__ == "__main__":
    unittest.main()
