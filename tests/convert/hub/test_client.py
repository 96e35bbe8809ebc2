"""Whose fault it is: a hub is reached as the environment says, and a failure names its part."""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from dsv4.convert.sources.http import Patience
from dsv4.convert.sources.hub_repo import HubRepo
from dsv4.formats.errors import NetworkError, SourceError
from tests.convert.hub.conftest import Open, Waits
from tests.convert.hub.loopback import COMMIT, NOWHERE, Loopback, says

CERTIFICATE = Path(__file__).parent / "loopback.pem"  # of 127.0.0.1, by itself, with its key
VARIABLES = (
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY"),
    *("ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
    *("CURL_CA_BUNDLE", "HF_ENDPOINT"),
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


# Building the client


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("ALL_PROXY", "socks://127.0.0.1:9/", r"socks5h://; correct it \(for a SOCKS proxy: so"),
        ("ALL_PROXY", "socks4://127.0.0.1:9", "expected the address of a proxy that begins with"),
        ("HTTPS_PROXY", "ftp://127.0.0.1", "expected the address of a proxy that begins with"),
        ("http_proxy", "http://[::1", "expected the address of a proxy that begins with http://"),
        ("all_proxy", "socks5://127.0.0.1:9", r"needs the package socksio: pip install 'dsv4\[so"),
        ("HTTPS_PROXY", "socks5h://127.0.0.1:9", "needs the package socksio"),
        ("SSL_CERT_FILE", "/nonexistent/ca.pem", "which cannot be used: No such file or directory"),
        ("SSL_CERT_FILE", "/dev/null", "which cannot be used: it has no certificate; set it to"),
        ("SSL_CERT_FILE", "/", "which cannot be used: Is a directory; set it to a file of cert"),
    ],
)
def test_a_client_that_cannot_be_built_names_the_variable(
    opened: Open,
    hub: Loopback,
    monkeypatch: pytest.MonkeyPatch,
    waits: Waits,
    variable: str,
    value: str,
    sentence: str,
) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)  # as where it is not installed
    monkeypatch.setenv(variable, value)
    with pytest.raises(SourceError, match=sentence) as refusal:
        opened()
    assert str(refusal.value).startswith(f"{variable} is {value}, ")
    assert refusal.value.exit_code == 2
    assert (hub.requests, waits.seconds) == ([], [])
    monkeypatch.delenv(variable)
    assert opened().commit == COMMIT  # what the sentence advises helps


def test_the_right_variable_is_named(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTPS_PROXY", "127.0.0.1:9")  # needs no scheme
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    monkeypatch.setenv("ALL_PROXY", "socks://name:secret@host:9")
    with pytest.raises(SourceError, match=r"^ALL_PROXY is socks://\*\*\*@host:9, expected"):
        opened()


# Sending


def test_a_proxy_that_is_not_there_is_named(
    opened: Open, hub: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://name:secret@127.0.0.1:9")
    sentence = r"refused \(HTTP_PROXY is http://\*\*\*@127\.0\.0\.1:9\) \(6 failures in a row\)"
    with pytest.raises(NetworkError, match=sentence):
        opened()
    assert hub.requests == []


def test_a_proxy_that_is_not_used_is_not_named(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", NOWHERE)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert opened().commit == COMMIT
    with pytest.raises(NetworkError) as failure:
        opened(endpoint=NOWHERE)
    assert "HTTP_PROXY" not in str(failure.value)


def test_an_endpoint_that_is_not_there_is_named(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    with pytest.raises(NetworkError, match=rf"refused \(HF_ENDPOINT is {NOWHERE}\)"):
        opened(endpoint=NOWHERE)


@contextlib.contextmanager
def _answering(answer: bytes) -> Iterator[str]:
    """A server that says the same to everybody; -> its host and port."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(1 << 16)
                    connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


@pytest.mark.parametrize("scheme", ["http", "https"])  # one is forwarded, the other tunnelled
def test_a_proxy_that_wants_a_login_says_so(
    opened: Open, monkeypatch: pytest.MonkeyPatch, waits: Waits, scheme: str
) -> None:
    refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
    with _answering(refusal) as address:
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"http://{address}")
        sentence = (
            rf"^the proxy refuses the way to hub\.invalid: 407 Proxy Authentication Required "
            rf"\({scheme.upper()}_PROXY is http://{address}\); .* http://NAME:PASSWORD@HOST:PORT"
        )
        with pytest.raises(SourceError, match=sentence) as refused:
            opened(endpoint=f"{scheme}://hub.invalid")
    assert refused.value.exit_code == 2
    assert waits.seconds == []


def test_a_proxy_that_fails_is_tried_again(
    opened: Open, monkeypatch: pytest.MonkeyPatch, waits: Waits
) -> None:
    with _answering(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n") as address:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{address}")
        sentence = rf"no connection to hub\.invalid: 503 Busy \(HTTPS_PROXY is http://{address}\)"
        with pytest.raises(NetworkError, match=sentence):
            opened(endpoint="https://hub.invalid")
    assert len(waits.seconds) == 5


def test_what_is_not_a_name_is_not_tried_again(opened: Open, waits: Waits) -> None:
    with pytest.raises(SourceError, match=r"^a\.\.b cannot be asked: .*; check HF_ENDPOINT"):
        opened(endpoint="http://a..b")
    assert waits.seconds == []


def test_any_failure_of_a_library_is_one_sentence(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("of a SOCKS library")

    monkeypatch.setattr(httpx2.Client, "send", fail)
    with pytest.raises(SourceError, match="cannot be asked: AssertionError of a SOCKS library"):
        opened()


# Certificates


@pytest.fixture
def secure(hub: Loopback, patience: Patience) -> Callable[[], HubRepo]:
    """Lists the hub's repository over TLS, with a certificate that nobody knows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    server = hub.hub._server
    server.socket = context.wrap_socket(server.socket, server_side=True)
    endpoint = f"https://127.0.0.1:{hub.hub.port}"
    return lambda: HubRepo(
        hub.repo, None, endpoint=endpoint, token=None, cache=None, patience=patience
    )


def test_an_authority_that_is_not_known_is_not_waited_for(
    secure: Callable[[], HubRepo], monkeypatch: pytest.MonkeyPatch, waits: Waits
) -> None:
    sentence = r"^the certificate of 127\.0\.0\.1:\d+ is not trusted \(self.signed certificate\); "
    with pytest.raises(
        SourceError, match=f"{sentence}if .* set SSL_CERT_FILE to a file"
    ) as refused:
        secure()
    assert refused.value.exit_code == 2
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(CERTIFICATE))
    with pytest.raises(
        SourceError,
        match=f"REQUESTS_CA_BUNDLE is not read here: set SSL_CERT_FILE to {CERTIFICATE}$",
    ):
        secure()
    assert waits.seconds == []
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    from huggingface_hub import close_session

    close_session()
    assert secure().commit == COMMIT


def test_other_failures_of_tls_are_the_network_s(hub: Loopback, opened: Open, waits: Waits) -> None:
    with pytest.raises(NetworkError, match=r"no connection to 127\.0\.0\.1:\d+: \[SSL"):
        opened(endpoint=f"https://127.0.0.1:{hub.hub.port}")  # which speaks HTTP
    assert len(waits.seconds) == 5


def test_a_certificate_file_of_others_is_named(
    secure: Callable[[], HubRepo], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    sentence = f"SSL_CERT_DIR is {tmp_path}, which must have the certificate of its authority"
    with pytest.raises(SourceError, match=sentence):
        secure()


def test_an_error_of_the_hub_itself_is_no_proxy_s(opened: Open, hub: Loopback) -> None:
    hub.faults.plant(says(418), host="api")
    with pytest.raises(SourceError) as refusal:
        opened()
    assert "proxy" not in str(refusal.value).lower()
