"""Building the client and sending: the way from here to a hub, and whose fault it is when it fails.

The client is huggingface_hub's own, which httpx2 builds from the environment: HTTP_PROXY,
HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE, SSL_CERT_DIR. Each failure names the variable and
its value, but for a password in it.
"""

from __future__ import annotations

import os
import re
import ssl
import urllib.request
from collections.abc import Iterator

import httpx2
from huggingface_hub import get_session

from dsv4.convert.sources.http import BrokenError
from dsv4.formats.errors import SourceError

_PROXY_VARIABLES = {
    "http": ("http_proxy", "HTTP_PROXY"),
    "https": ("https_proxy", "HTTPS_PROXY"),
    "all": ("all_proxy", "ALL_PROXY"),
}
_OTHERS_BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_REFUSED_BY_PROXY = re.compile(r"4\d\d\b|Invalid username/password")


def client() -> httpx2.Client:
    """The client, built if it is not yet.

    Raises SourceError, naming the variable, when the environment is not one to build it from.
    """
    try:
        return get_session()
    except (ImportError, OSError, ValueError, httpx2.InvalidURL) as error:
        raise SourceError(_not_built(error)) from None


def send(request: httpx2.Request, *, stream: bool, follow_redirects: bool) -> httpx2.Response:
    """The answer to a request.

    Raises BrokenError when it may be had another time, else SourceError that says why not.
    """
    try:
        answer = client().send(request, stream=stream, follow_redirects=follow_redirects)
    except httpx2.TooManyRedirects:
        raise SourceError(
            f"{_host(request.url)} redirects without end; check HF_ENDPOINT"
        ) from None
    except httpx2.RequestError as error:
        raise lost(error) from None
    except SourceError:
        raise
    except Exception as error:  # of names that cannot be looked up, of a SOCKS library: any
        raise SourceError(
            f"{_host(request.url)} cannot be asked: {type(error).__name__} {error!s:.200}"
            f"{_settings(request.url)}; check HF_ENDPOINT and the proxy"
        ) from None
    if answer.status_code == httpx2.codes.PROXY_AUTHENTICATION_REQUIRED:
        answer.close()
        raise SourceError(_refused_by_proxy(request.url, "407 Proxy Authentication Required"))
    return answer


def lost(error: httpx2.RequestError) -> BrokenError | SourceError:
    """What to raise for a failure below HTTP: no connection, no answer in time, a cut.

    A failure that no other attempt would mend is a SourceError.
    """
    url = error.request.url
    host, by = _host(url), _settings(url)
    if (certificate := _certificate_error(error)) is not None:
        return SourceError(_not_trusted(host, certificate))
    if isinstance(error, httpx2.ProxyError) and _REFUSED_BY_PROXY.match(str(error)):
        return SourceError(_refused_by_proxy(url, str(error)))
    if isinstance(error, httpx2.LocalProtocolError | httpx2.UnsupportedProtocol):
        return SourceError(f"{host} cannot be asked: {error}; check HF_ENDPOINT")
    if isinstance(error, httpx2.ConnectTimeout):
        return BrokenError(f"no connection to {host} in time{by}")
    if isinstance(error, httpx2.ConnectError | httpx2.ProxyError):
        return BrokenError(f"no connection to {host}: {error}{by}")
    if isinstance(error, httpx2.TimeoutException):
        return BrokenError(f"{host} sends nothing{by}")
    return BrokenError(f"the connection to {host} broke: {error}{by}")


def shown(address: str) -> str:
    """An address for a sentence, without the login that may be in it."""
    scheme, separator, rest = address.rpartition("://")
    if "@" in rest:
        rest = f"***@{rest.rpartition('@')[2]}"
    return f"{scheme}{separator}{rest}"[:200]


def _refused_by_proxy(url: httpx2.URL, reason: str) -> str:
    return (
        f"the proxy refuses the way to {_host(url)}: {reason}{_settings(url)}; check its address, "
        "and give it as http://NAME:PASSWORD@HOST:PORT if it wants a login"
    )


def _not_built(error: Exception) -> str:
    for variable, value in _proxies():
        problem = _proxy_problem(value, error)
        if problem is not None:
            return f"{variable} is {shown(value)}, {problem}, or unset {variable}"
    path = os.environ.get("SSL_CERT_FILE")
    if path and isinstance(error, OSError):
        reason = "it has no certificate" if isinstance(error, ssl.SSLError) else error.strerror
        return (
            f"SSL_CERT_FILE is {path}, which cannot be used: {reason}; set it to a file of "
            "certificates, or unset it to trust those of the system"
        )
    return (
        f"the environment is not one to reach a hub from: {type(error).__name__} {error!s:.200}; "
        "check HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE and SSL_CERT_DIR"
    )


def _proxy_problem(value: str, error: Exception) -> str | None:
    """Why no client can be built with this proxy, and what to do; None if it is not to blame."""
    url = value if "://" in value else f"http://{value}"
    try:
        scheme = httpx2.Proxy(url).url.scheme
    except (ValueError, httpx2.InvalidURL):
        hint = " (for a SOCKS proxy: socks5://)" if url.startswith("socks") else ""
        return (
            "expected the address of a proxy that begins with http://, https://, socks5:// or "
            f"socks5h://; correct it{hint}"
        )
    if isinstance(error, ImportError) and scheme.startswith("socks"):
        return "a SOCKS proxy, which needs the package socksio: pip install 'dsv4[socks]'"
    return None


def _proxies(*kinds: str) -> Iterator[tuple[str, str]]:
    """-> (variable, value) of the proxies that are set, of these kinds; by default all."""
    for kind in kinds or _PROXY_VARIABLES:
        for variable in _PROXY_VARIABLES.get(kind, ()):
            if value := os.environ.get(variable):
                yield variable, value
                break


def _settings(url: httpx2.URL) -> str:
    """The variables by which it goes there, and that way, for a sentence; empty without any."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    found = [("HF_ENDPOINT", endpoint)] if url.host and url.host in endpoint else []
    if not urllib.request.proxy_bypass_environment(url.host):  # type: ignore[attr-defined]
        found += list(_proxies(url.scheme, "all"))[:1]
    said = ", ".join(f"{variable} is {shown(value)}" for variable, value in found)
    return f" ({said})" if said else ""


def _certificate_error(error: BaseException) -> ssl.SSLCertVerificationError | None:
    """Among what caused a failure."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    return cause


def _not_trusted(host: str, error: ssl.SSLCertVerificationError) -> str:
    remedy = (
        "if the network here has an authority of its own, set SSL_CERT_FILE to a file with its "
        "certificate"
    )
    path, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    for variable in _OTHERS_BUNDLES:
        if path is None and (value := os.environ.get(variable)):
            remedy = f"{variable} is not read here: set SSL_CERT_FILE to {value}"
            break
    if path or folder:
        which = f"SSL_CERT_FILE is {path}" if path else f"SSL_CERT_DIR is {folder}"
        remedy = f"{which}, which must have the certificate of its authority"
    return f"the certificate of {host} is not trusted ({error.verify_message}); {remedy}"


def _host(url: httpx2.URL) -> str:
    return url.netloc.decode("ascii", "replace") or "the hub"
