"""The page at `/`: one file that talks to the server it came from and to nothing else.

Its policy names the file's own script and style by their hashes: nothing else runs in it.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path

from starlette.responses import HTMLResponse

_FILE = Path(__file__).with_name("page.html")


def page() -> HTMLResponse:
    """The page."""
    html, policy = _page()
    headers = {
        "content-security-policy": policy,
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return HTMLResponse(html, headers=headers)


@functools.cache
def _page() -> tuple[str, str]:
    html = _FILE.read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _hash(html, "script"),
        "style-src": _hash(html, "style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return html, "; ".join(f"{name} {value}" for name, value in policy.items())


def _hash(html: str, tag: str) -> str:
    inner = html.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
    digest = hashlib.sha256(inner.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
