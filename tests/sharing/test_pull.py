"""Pulling: the pusher's bytes and root, or one sentence, whatever the network and the disk do."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import dsv4
from dsv4.convert.sources.http import Patience
from dsv4.formats.errors import (
    ChangedSourceError,
    ConflictError,
    Dsv4Error,
    NetworkError,
    OutOfSpaceError,
    SourceError,
    StoreError,
)
from dsv4.sharing import transfer
from dsv4.sharing.pull import pull
from tests.convert.hub.loopback import FOREVER, TOKEN, cuts, says, stalls, with_body, with_header
from tests.convert.hub.test_faults import PASSING
from tests.formats.store.packing import tree
from tests.sharing.hub import REPO, SharingHub

CODES = "layers/1/ffn/experts/w13/codes/c/0/0/0"
SMALL = "norm/weight/c/0"
LAST = "assets/tokenizer.json"


@pytest.fixture
def root(shared_store: Path) -> str:
    return str(dsv4.open(shared_store).store.manifest["root"])


def flipped(body: bytes) -> bytes:
    return body[:-1] + bytes([body[-1] ^ 1])


def asked_for_weights(hub: SharingHub) -> list[str]:
    return [r.path for r in hub.requests if r.file and ("/c/" in r.file or "assets/" in r.file)]


def test_a_pulled_store_is_the_published_one(
    published: SharingHub, shared_store: Path, tmp_path: Path, root: str
) -> None:
    told: list[transfer.Moved] = []
    said: list[str] = []
    done = pull(REPO, tmp_path / "out", progress=told.append, notice=said.append)
    assert tree(tmp_path / "out") == tree(shared_store)
    assert dsv4.validate(tmp_path / "out").ok
    assert (done.root, done.pinned, done.fetched) == (root, False, told[-1].total_bytes)
    assert told[-1].done_bytes == told[-1].total_bytes
    assert any("--root holds it to yours" in one for one in said)
    documents = [r for r in published.requests if r.file and r.file.endswith("/zarr.json")]
    assert documents == []  # made, not fetched


@pytest.mark.parametrize("digits", [16, 40, 64])
def test_a_root_or_its_beginning_pins(
    published: SharingHub, tmp_path: Path, root: str, digits: int
) -> None:
    assert pull(REPO, tmp_path / "out", root=root[:digits].upper()).pinned
    wrong = ("0" if root[digits - 1] != "0" else "1").join((root[: digits - 1], ""))
    published.requests.clear()
    with pytest.raises(SourceError, match=f"root {root}, --root says {wrong}; nothing was fetched"):
        pull(REPO, tmp_path / "other", root=wrong)
    assert not (tmp_path / "other").exists() and asked_for_weights(published) == []


@pytest.mark.parametrize("pin", ["", "0123456789abcde", "x" * 64, "a" * 65])
def test_too_few_digits_are_no_pin(published: SharingHub, tmp_path: Path, pin: str) -> None:
    with pytest.raises(SourceError, match="is not a root: give all of its 64 hex digits"):
        pull(REPO, tmp_path / "out", root=pin)
    assert published.requests == []


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_waited_for(
    published: SharingHub, shared_store: Path, tmp_path: Path, fault: str
) -> None:
    change, where = PASSING[fault]
    published.faults.plant(change, file=CODES, **{k: v for k, v in where.items() if k != "skip"})
    pull(REPO, tmp_path / "out", patience=Patience(read=0.5, sleep=lambda seconds: None))
    assert tree(tmp_path / "out") == tree(shared_store)


def test_a_byte_that_changed_on_the_way_is_asked_for_again(
    published: SharingHub, shared_store: Path, tmp_path: Path
) -> None:
    published.faults.plant(with_body(flipped), file=CODES)
    pull(REPO, tmp_path / "out")
    assert len(published.ranges(CODES)) == 2
    assert tree(tmp_path / "out") == tree(shared_store)


def test_bytes_that_stay_wrong_are_refused_and_not_written(
    published: SharingHub, shared_store: Path, tmp_path: Path
) -> None:
    published.faults.plant(with_body(flipped), file=CODES, times=FOREVER)
    with pytest.raises(SourceError, match=rf"{CODES}: chunk \d+ arrived with another checksum"):
        pull(REPO, tmp_path / "out")
    out = tmp_path / "out"
    assert not (out / "dsv4.complete").exists() and not (out / CODES).exists()
    published.faults._planted.clear()
    pull(REPO, out)
    assert tree(out) == tree(shared_store)


@pytest.fixture
def long_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most chunks are longer than a piece, and most files than a segment."""
    monkeypatch.setattr(transfer, "PIECE_BYTES", 1000)
    monkeypatch.setattr(transfer, "SEGMENT_BYTES", 5000)
    monkeypatch.setattr(transfer, "COMMIT_BYTES", 20_000)


@pytest.mark.usefixtures("long_chunks")
def test_long_chunks_are_compared_at_their_end(
    published: SharingHub, shared_store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    published.faults.plant(with_body(flipped), file="embed/weight/c/0/0")
    with pytest.raises(ChangedSourceError, match=r"embed/weight/c/0/0: chunk \d arrived with"):
        pull(REPO, out)
    assert not list(out.glob("embed/weight/c/0/*"))  # dropped
    pull(REPO, out)
    assert tree(out) == tree(shared_store)


def test_blake3_has_the_last_word(
    published: SharingHub, shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XXH3 can be forged: bytes that pass it are caught when their file is whole."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(transfer._Proof, "_wrong", lambda *_: None)
        published.faults.plant(with_body(flipped), file=CODES)
        with pytest.raises(ChangedSourceError, match=f"{CODES} arrived with another BLAKE3"):
            pull(REPO, out)
    assert not (out / CODES).exists()
    pull(REPO, out)
    assert tree(out) == tree(shared_store)


def test_an_outage_keeps_what_came(
    published: SharingHub, shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(transfer, "COMMIT_BYTES", 1)
    published.faults.plant(says(503), file=LAST, times=FOREVER)
    with pytest.raises(NetworkError, match=rf"{LAST} cannot be read.*run the command again") as no:
        pull(REPO, out, streams=1)
    assert no.value.exit_code == 4
    published.faults._planted.clear()
    before = published.bytes_served(CODES)
    done = pull(REPO, out)
    assert before == published.bytes_served(CODES) > 0
    assert 0 < done.fetched < done.nbytes
    assert tree(out) == tree(shared_store)


def test_a_cut_is_continued_at_its_byte(published: SharingHub, tmp_path: Path) -> None:
    published.faults.plant(cuts(10_000), file=CODES)
    pull(REPO, tmp_path / "out")
    (first, second) = published.ranges(CODES)
    assert (first[0], second[0]) == (0, 10_000) and first[1] == second[1]


def test_the_token_goes_to_the_hub_alone(published: SharingHub, tmp_path: Path) -> None:
    pull(REPO, tmp_path / "out")
    tokens = {(request.host, request.token) for request in published.requests}
    assert tokens == {("hub", TOKEN), ("storage", None)}


def test_without_a_token_a_public_store_comes_and_a_private_one_does_not(
    published: SharingHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    pull(REPO, tmp_path / "out")
    published.access = "private"
    with pytest.raises(SourceError, match=r"cannot be seen without a login; .*set HF_TOKEN"):
        pull(REPO, tmp_path / "private")


def _edited(store: Path, edit: Callable[[dict[str, Any]], object], scratch: Path) -> Path:
    """A copy whose manifest was edited, under a marker that pins it."""
    out = Path(shutil.copytree(store, scratch))
    document = json.loads((out / "zarr.json").read_text())
    edit(document["attributes"]["dsv4"])
    raw = json.dumps(document).encode()
    (out / "zarr.json").write_bytes(raw)
    marker = json.loads((out / "dsv4.complete").read_text())
    marker["metadata_sha256"] = hashlib.sha256(raw).hexdigest()
    marker["root"] = document["attributes"]["dsv4"]["root"]
    (out / "dsv4.complete").write_text(json.dumps(marker))
    return out


def _other_tool(manifest: dict[str, Any]) -> None:
    manifest["tool"] = "dsv4 99"


def _other_root(manifest: dict[str, Any]) -> None:
    manifest["root"] = "0" * 64


@pytest.mark.parametrize("edit", [_other_tool, _other_root])
def test_a_manifest_that_does_not_have_its_root_is_refused(
    hub: SharingHub, shared_store: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object]
) -> None:
    hub.publish(_edited(shared_store, edit, tmp_path / "edited"))
    with pytest.raises(StoreError, match=rf"^{REPO}@[0-9a-f]{{12}}: the content has root .* alter"):
        pull(REPO, tmp_path / "out")
    assert asked_for_weights(hub) == []


def test_a_stale_manifest_is_refused(hub: SharingHub, shared_store: Path, tmp_path: Path) -> None:
    hub.publish(shared_store)
    stale = json.loads(hub.head["zarr.json"])
    stale["attributes"]["dsv4"]["tool"] = "dsv4 0.0.9"
    hub.commit_tree(hub.head | {"zarr.json": json.dumps(stale).encode()})
    with pytest.raises(StoreError, match=r"zarr\.json is not what dsv4\.complete pins"):
        pull(REPO, tmp_path / "out")


Change = Callable[[dict[str, bytes]], object]
REFUSED: dict[str, tuple[Change, str]] = {
    "a file is missing": (lambda t: t.pop(CODES), f"lacks 1 file of the store's .*{CODES}"),
    "a file is short": (lambda t: t.update({SMALL: b"x"}), f"{SMALL} has 1 bytes, the manifest s"),
    "no marker": (lambda t: t.pop("dsv4.complete"), "is not whole .* its push is not finished"),
    "no manifest": (lambda t: t.pop("zarr.json"), r"is not a packed store: it has no dsv4\.compl"),
    "a checkpoint": (
        lambda t: [t.update({"config.json": b"{}"}), *(t.pop(k) for k in set(t) - {"config.json"})],
        f"is a checkpoint that is not packed; .*dsv4 convert --hf {REPO}",
    ),
    "something else": (lambda t: t.clear(), r"is not a packed store: it has no dsv4\.complete"),
    "a marker of noise": (lambda t: t.update({"dsv4.complete": b"\xff"}), "dsv4.complete"),
    "a manifest of noise": (lambda t: t.update({"zarr.json": b"{"}), "is not what dsv4.complete"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_a_whole_store_is_refused_before_it_is_fetched(
    published: SharingHub, tmp_path: Path, what: str
) -> None:
    change, sentence = REFUSED[what]
    files = dict(published.head)
    change(files)
    published.commit_tree(files)
    with pytest.raises(Dsv4Error, match=sentence):
        pull(REPO, tmp_path / "out")
    assert asked_for_weights(published) == [] and not (tmp_path / "out").exists()


def test_names_of_the_repository_are_not_paths(
    published: SharingHub, shared_store: Path, tmp_path: Path
) -> None:
    hostile = ("../../evil", "/etc/evil", "layers/../../evil", "assets/../x", "a\\b", "evil.py")
    published.commit_tree(published.head | dict.fromkeys(hostile, b"evil"))
    pull(REPO, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(shared_store)
    assert not list(tmp_path.rglob("*evil*"))
    assert not any("evil" in request.path for request in published.requests)


def _begun(hub: SharingHub, out: Path) -> None:
    hub.faults.plant(says(404), file=SMALL, times=FOREVER)
    with pytest.raises(SourceError):
        pull(REPO, out)
    hub.faults._planted.clear()


def test_a_commit_with_the_same_store_goes_on(
    published: SharingHub, shared_store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _begun(published, out)
    published.commit_tree(published.head | {"README.md": b"# better words\n"})
    done = pull(REPO, out)
    assert done.fetched < done.nbytes and tree(out) == tree(shared_store)


def test_a_commit_with_another_store_is_named_with_the_command_that_goes_on(
    published: SharingHub, shared_store: Path, native_store: Path, tmp_path: Path, root: str
) -> None:
    out, old = tmp_path / "out", published.branches["main"]
    _begun(published, out)
    new = published.publish(native_store)
    with pytest.raises(
        ConflictError, match=f"begun from {REPO} at commit {old}, now .*{new}"
    ) as no:
        pull(REPO, out)
    (command,) = re.findall("`(dsv4 pull [^`]*)`", str(no.value))
    assert command == f"dsv4 pull {REPO} {out} --revision {old}"
    with pytest.raises(ConflictError, match=f"`{command} --root {root[:20]}`"):
        pull(REPO, out, root=root[:20])
    with pytest.raises(ConflictError, match=f"`{command}`"):  # the new root is not the old one's
        pull(REPO, out, root=str(dsv4.open(native_store).store.manifest["root"]))
    pull(REPO, out, revision=old)
    assert tree(out) == tree(shared_store)


def test_a_file_that_changes_meanwhile_is_noticed(published: SharingHub, tmp_path: Path) -> None:
    tag = with_header("X-Linked-Etag", f'"{"0" * 64}"')
    published.faults.plant(tag, host="hub", file=CODES)
    with pytest.raises(SourceError, match=f"{CODES} changed while it was read"):
        pull(REPO, tmp_path / "out")


def test_what_is_there_already_is_not_fetched(
    published: SharingHub, native_store: Path, tmp_path: Path
) -> None:
    pull(REPO, tmp_path / "out")
    published.requests.clear()
    assert pull(REPO, tmp_path / "out").fetched == 0
    assert asked_for_weights(published) == []
    published.publish(native_store)
    with pytest.raises(
        ConflictError, match=r"holds the store with root .* choose another director"
    ):
        pull(REPO, tmp_path / "out")


@pytest.mark.parametrize("leave_out", [(), ("draft",)])
def test_a_finished_pull_is_made_whole_and_not_said_to_be_read(
    published: SharingHub, shared_store: Path, tmp_path: Path, leave_out: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    pull(REPO, out, leave_out=leave_out)
    before = tree(out)
    short, node = out / SMALL, out / "layers/zarr.json"
    short.write_bytes(short.read_bytes()[:-1])
    (out / CODES).unlink()
    node.unlink()
    with pytest.raises(StoreError, match="same `dsv4 pull` again fetches a file that is not there"):
        dsv4.open(out)
    published.requests.clear()
    said: list[str] = []
    done = pull(REPO, out, leave_out=leave_out, notice=said.append)
    assert tree(out) == before and {r.file for r in published.requests if r.file} >= {SMALL, CODES}
    assert done.unread and 0 < done.fetched < done.nbytes
    assert any(f"not read; `dsv4 validate {out}` compares every byte" in one for one in said)
    published.requests.clear()
    node.unlink()
    assert pull(REPO, out, leave_out=leave_out).fetched == 0 == len(asked_for_weights(published))
    assert tree(out) == before


def test_what_is_fetched_again_is_proved(published: SharingHub, tmp_path: Path) -> None:
    pull(REPO, tmp_path / "out")
    (tmp_path / "out" / CODES).unlink()
    published.faults.plant(with_body(flipped), file=CODES)
    with pytest.raises(SourceError, match=rf"{CODES} arrived with other bytes than the manifest"):
        pull(REPO, tmp_path / "out")
    assert not (tmp_path / "out" / CODES).exists()


def test_a_directory_of_something_else_is_left_alone(
    published: SharingHub, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"x")
    with pytest.raises(
        ConflictError, match=r"is not empty \(a\.jpg\) and holds no conversion or pull"
    ):
        pull(REPO, tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]
    _begun(published, tmp_path / "pulled")
    with pytest.raises(ConflictError, match="holds what `dsv4 pull` began to fetch"):
        dsv4.convert(tiny_source, tmp_path / "pulled")


@pytest.mark.parametrize("finished", [True, False])
def test_nothing_is_pulled_into_a_store(
    published: SharingHub, tmp_path: Path, finished: bool
) -> None:
    out = tmp_path / "out"
    pull(REPO, out) if finished else _begun(published, out)
    before = tree(out)
    with pytest.raises(ConflictError, match=f"sub/x is inside the packed store {out}; choose"):
        pull(REPO, out / "sub/x")
    assert tree(out) == before and not (out / "sub").exists()


def test_an_unfinished_conversion_is_left_alone(published: SharingHub, tmp_path: Path) -> None:
    from dsv4.formats.store.writer import StoreWriter

    StoreWriter(tmp_path / "out", {"tool": "x", "recipe": {}, "source": {}}).close()
    with pytest.raises(ConflictError, match="holds an unfinished conversion; go on with the same"):
        pull(REPO, tmp_path / "out")


def test_an_unfinished_pull_is_not_a_store(published: SharingHub, tmp_path: Path) -> None:
    _begun(published, tmp_path / "out")
    with pytest.raises(StoreError, match=r"is unfinished .* `dsv4 convert` or `dsv4 pull` again"):
        dsv4.open(tmp_path / "out")


def test_a_disk_without_room_is_refused_first(
    published: SharingHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs

    def nearly_full(path: str) -> Any:
        found = real(path)
        return dataclasses.make_dataclass("Free", ["f_bavail", "f_frsize"])(1, found.f_frsize)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    with pytest.raises(OutOfSpaceError, match=r"are still to be written, .* are free") as no:
        pull(REPO, tmp_path / "out")
    assert no.value.exit_code == 3 and asked_for_weights(published) == []


@pytest.mark.parametrize("nth", [1, 7, 60])
def test_a_disk_that_fills_up_keeps_what_came(
    published: SharingHub,
    shared_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nth: int,
) -> None:
    real, calls = os.pwrite, iter(range(1, 1 << 30))

    def pwrite(descriptor: int, view: memoryview, offset: int) -> int:
        if next(calls) >= nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, view, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OutOfSpaceError, match="free some space and run the same command again"):
            pull(REPO, tmp_path / "out")
    pull(REPO, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(shared_store)


def test_offline_says_so(
    published: SharingHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set; unset it"):
        pull(REPO, tmp_path / "out")


def test_a_reader_that_hangs_holds_nothing_up(published: SharingHub, tmp_path: Path) -> None:
    import time

    published.faults.plant(stalls(100, 20.0), file=CODES, times=FOREVER)
    published.faults.plant(says(404), file=SMALL, times=FOREVER)
    begin = time.monotonic()
    with pytest.raises(SourceError):
        pull(REPO, tmp_path / "out")
    assert time.monotonic() - begin < 10
