"""The token that goes to a hub: where it is from, and whether it can be sent at all.

Which token is meant is huggingface_hub's to say (HF_TOKEN, the stored login, ...). Here it is found
out where that one is from, because a refusal has to name it. The token is part of no sentence.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OIDCError
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # lazy

from dsv4.formats.errors import SourceError
from dsv4.formats.version import VERSION

LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_TOKEN = re.compile(r"[!-~]+")
_HEADER = re.compile(r"[ -~]*")
_MAX_WORDS = 200


@dataclasses.dataclass(frozen=True)
class Login:
    """What is sent with every request.

    headers: with Authorization if there is a token. name: the token's, such as "the token of
    HF_TOKEN". renew: what to do when the hub does not accept it. advice: how to have one sent.
    """

    headers: Mapping[str, str] = dataclasses.field(repr=False)
    name: str = ""
    renew: str = ""
    advice: str = LOG_IN

    @property
    def has_token(self) -> bool:
        """Whether there is one to send."""
        return "authorization" in self.headers

    def words_of(self, answer: httpx2.Response) -> str:
        """The reason that the hub gives for a refusal, on one line; empty if it gives none."""
        words = " ".join(answer.headers.get("X-Error-Message", "").split())
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        words = words.replace(token, "(the token)") if token else words
        return words.rstrip(".")[:_MAX_WORDS]


def make_login(token: str | bool | None) -> Login:
    """The login that huggingface_hub would use, or `token` itself; False: none.

    Raises SourceError, naming the variable or the file, when it cannot be read or sent.
    """
    name, renew = _origin(token)
    try:
        headers = build_hf_headers(token=token, library_name="dsv4", library_version=VERSION)
    except LocalTokenNotFoundError:
        raise SourceError(f"a token is asked for, and there is none; {LOG_IN}") from None
    except (OIDCError, HfHubHTTPError, httpx2.HTTPError) as error:
        raise SourceError(
            f"HF_OIDC_RESOURCE is set, and no token is to be had for it ({error!s:.200}); correct "
            "it, or unset it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SourceError(
            f"the stored login {constants.HF_TOKEN_PATH} cannot be read: {reason}; make it "
            "readable, or remove it and log in again with `hf auth login`"
        ) from None
    for header, value in headers.items():
        _check(header, value, name)
    advice = LOG_IN
    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and token is None:
        advice = "unset HF_HUB_DISABLE_IMPLICIT_TOKEN, which keeps every token from being sent"
    return Login(headers, name, renew, advice)


def _origin(token: str | bool | None) -> tuple[str, str]:
    """-> (the token's name, what to do when it is not accepted), in huggingface_hub's order."""
    if isinstance(token, str):
        return "the token that was given", "give another one, or none if the repository is public"
    if os.environ.get("HF_OIDC_RESOURCE"):
        return "the token of HF_OIDC_RESOURCE", "correct it, or unset it"
    variable = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "HUGGING_FACE_HUB_TOKEN"
    if value := os.environ.get(variable, "").strip():
        joined = " (it has a line break, which is left out)" if len(value.splitlines()) > 1 else ""
        return (
            f"the token of {variable}{joined}",
            f"set {variable} to a valid one, or unset it if the repository is public",
        )
    return (
        f"the token of the stored login {Path(constants.HF_TOKEN_PATH)}",
        "log in again with `hf auth login`, or out with `hf auth logout` if the repository is "
        "public",
    )


def _check(header: str, value: str, name: str) -> None:
    """Raise SourceError when a header's value cannot be sent."""
    if header == "authorization":
        token = value.removeprefix("Bearer ")
        if not _TOKEN.fullmatch(token):
            at = next(n for n, c in enumerate(token, 1) if not _TOKEN.fullmatch(c))
            raise SourceError(
                f"{name} cannot be sent: its character {at} of {len(token)} is not a letter, digit "
                "or sign of ASCII; copy it again"
            )
    elif not _HEADER.fullmatch(value):
        raise SourceError(
            "HF_HUB_USER_AGENT_ORIGIN has a character that cannot be sent, expected letters, "
            "digits and signs of ASCII; correct it, or unset it"
        )
