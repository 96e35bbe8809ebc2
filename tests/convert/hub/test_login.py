"""A token that is refused is named by where it is from, never shown, and never called missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from dsv4.convert.sources.hub import HubSource
from dsv4.formats.errors import SourceError
from tests.convert.hub.conftest import Open, Waits
from tests.convert.hub.loopback import FOREVER, TOKEN, Loopback, says, serve

EXPIRED = "hf_expired"
INVALID = says(401, X_Error_Message="Invalid credentials in Authorization header.")


def _in_environment(patch: pytest.MonkeyPatch) -> str:
    patch.setenv("HF_TOKEN", EXPIRED)
    return "the token of HF_TOKEN"


def _in_old_environment(patch: pytest.MonkeyPatch) -> str:
    patch.setenv("HUGGING_FACE_HUB_TOKEN", EXPIRED)
    return "the token of HUGGING_FACE_HUB_TOKEN"


def _in_two_lines(patch: pytest.MonkeyPatch) -> str:
    patch.setenv("HF_TOKEN", "hf_exp\nired\n")
    return r"the token of HF_TOKEN \(it has a line break, which is left out\)"


def _stored(patch: pytest.MonkeyPatch) -> str:
    Path(constants.HF_TOKEN_PATH).write_text(EXPIRED + "\n")
    return f"the token of the stored login {constants.HF_TOKEN_PATH}"


ORIGINS = (_in_environment, _in_old_environment, _in_two_lines, _stored)


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_refused_token_is_named_by_its_origin(
    hub: Loopback,
    opened: Open,
    monkeypatch: pytest.MonkeyPatch,
    waits: Waits,
    origin: Callable[[pytest.MonkeyPatch], str],
) -> None:
    name = origin(monkeypatch)
    hub.faults.plant(INVALID, host="api")
    sentence = (
        f"^some-org/some-model cannot be read: {name} is not accepted: Invalid credentials in "
        "Authorization header; .* if the repository is public$"
    )
    with pytest.raises(SourceError, match=sentence) as refusal:
        opened()
    assert EXPIRED not in str(refusal.value)
    assert refusal.value.exit_code == 2
    assert [request.token for request in hub.requests] == [EXPIRED]
    assert waits.seconds == []


def test_a_hub_that_shows_the_token_does_not_make_us_show_it(
    hub: Loopback, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", EXPIRED)
    hub.faults.plant(says(401, X_Error_Message=f"{EXPIRED} is bad\t\x1b[31m"), host="api")
    with pytest.raises(SourceError, match=r"is not accepted: \(the token\) is bad") as refusal:
        opened()
    assert EXPIRED not in str(refusal.value)


def test_without_a_token_nothing_is_said_to_be_refused(hub: Loopback, opened: Open) -> None:
    hub.faults.plant(INVALID, host="api")
    with pytest.raises(SourceError, match=r"cannot be seen without a login; .* set HF_TOKEN if"):
        opened()


def test_a_token_that_is_kept_back_is_not_asked_for(
    hub: Loopback, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", EXPIRED)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    hub.faults.plant(says(401), host="api")
    with pytest.raises(SourceError, match="unset HF_HUB_DISABLE_IMPLICIT_TOKEN, which keeps"):
        opened()
    assert [request.token for request in hub.requests] == [None]


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (403, "GatedRepo", "is gated: Visit the page; accept .* behind the token of HF_TOKEN, and"),
        (401, "GatedRepo", "is gated: Visit the page; accept .* behind the token of HF_TOKEN, and"),
        (403, "", "is forbidden to the token of HF_TOKEN: Visit the page; check that it may read"),
        (404, "RepoNotFound", "is not found; check the name .* that the token of HF_TOKEN may see"),
    ],
)
def test_what_a_token_may_not_read(
    hub: Loopback,
    opened: Open,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
    sentence: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    change = says(status, X_Error_Code=code, X_Error_Message="Visit the page.")
    hub.faults.plant(change, host="api", times=FOREVER)
    with pytest.raises(SourceError, match=sentence) as refusal:
        opened()
    assert TOKEN not in str(refusal.value)


def test_a_host_that_gets_no_token_does_not_refuse_one(
    hub: Loopback, opened: Open, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve(checkpoint, access="private") as other:
        address = f"{other.endpoint}/api/models/{hub.repo}"
        hub.faults.plant(says(307, Location=address), host="api")
        sentence = rf"is refused by {other.endpoint[7:]}, to which the hub redirects: .* was 401"
        with pytest.raises(SourceError, match=sentence):
            opened()
        assert [request.token for request in other.requests] == [None]


# Tokens that cannot be sent, or read


@pytest.mark.parametrize(
    ("token", "where"),
    [("hf_clé", "6 of 6"), ("hf cle", "3 of 6"), ("“hf_cle”", "1 of 8"), ("hf\tcle", "3 of 6")],
)
def test_a_token_that_cannot_be_sent_is_not_shown(
    hub: Loopback, opened: Open, monkeypatch: pytest.MonkeyPatch, token: str, where: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(
        SourceError, match=f"^the token of HF_TOKEN cannot be sent: its character {where} is not"
    ) as refusal:
        opened()
    assert token not in str(refusal.value)
    with pytest.raises(SourceError, match=r"^the token that was given cannot be sent: its charac"):
        opened(token=token)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "it is not text"),
    ],
)
def test_a_stored_login_that_cannot_be_read_is_named(
    opened: Open, damage: Callable[[Path], object], reason: str
) -> None:
    path = Path(constants.HF_TOKEN_PATH)
    damage(path)
    with pytest.raises(SourceError, match=f"^the stored login {path} cannot be read: {reason}; "):
        opened()


def test_other_headers_that_cannot_be_sent_are_named(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_USER_AGENT_ORIGIN", "é")
    with pytest.raises(SourceError, match=r"^HF_HUB_USER_AGENT_ORIGIN has a character"):
        opened()


def test_a_token_is_asked_for_and_there_is_none(hub: Loopback) -> None:
    with pytest.raises(SourceError, match="a token is asked for, and there is none; log in with"):
        HubSource(hub.repo, endpoint=hub.endpoint, token=True)
