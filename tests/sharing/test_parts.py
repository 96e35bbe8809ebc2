"""Parts left out: never taken for whole, used for what is there, and fetched later."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import dsv4
from dsv4.formats.errors import ConflictError, SourceError, StoreError
from dsv4.formats.model.inventory import DraftKind
from dsv4.sharing.pull import pull
from dsv4.sharing.push import Push
from tests.convert.hub.loopback import FOREVER, says
from tests.formats.store.packing import tree
from tests.sharing.hub import REPO, SharingHub
from tests.support import warm_commands

WITHOUT = ("draft",)
A_TENSOR = "mtp.0.e_proj.weight"


@pytest.fixture
def partial(published: SharingHub, tmp_path: Path) -> Path:
    """The store without its draft layers."""
    pull(REPO, tmp_path / "out", leave_out=WITHOUT)
    return tmp_path / "out"


def sentence(published: SharingHub, out: Path) -> str:
    command = f"dsv4 pull {REPO} {out} --revision {published.branches['main']}"
    return re.escape(f"the draft layers were left out when it was pulled; `{command}` fetches them")


def test_it_cannot_be_taken_for_whole(partial: Path, published: SharingHub) -> None:
    """Whoever knows only dsv4.complete, such as an older dsv4, finds no store."""
    assert not (partial / "dsv4.complete").exists() and not (partial / "mtp").exists()
    assert not any("/mtp/" in request.path for request in published.requests)
    (partial / "dsv4.partial").unlink()
    with pytest.raises(StoreError, match="unfinished"):
        dsv4.open(partial)


def test_what_is_there_is_the_published_store_s(partial: Path, shared_store: Path) -> None:
    whole, found = dsv4.open(shared_store), dsv4.open(partial)
    assert found.store.manifest["root"] == whole.store.manifest["root"]
    names = [name for name in whole.names() if not name.startswith("mtp.")]
    assert found.names() == names and len(names) < len(whole.names())
    assert torch.equal(found.dequantize(names[3]), whole.dequantize(names[3]))
    assert (
        found.store.contents.draft is DraftKind.NONE and whole.store.contents.draft is DraftKind.MTP
    )
    assert "without draft" in repr(found)
    ids = torch.tensor([1, 2, 3])
    logits = [dsv4.load(path).session(8).forward(ids) for path in (partial, shared_store)]
    assert torch.equal(*logits)


def test_what_is_absent_is_named_with_the_command_that_fetches_it(
    partial: Path, published: SharingHub, tmp_path: Path
) -> None:
    said = sentence(published, partial)
    with pytest.raises(StoreError, match=f"{A_TENSOR} is not here: .*{said}"):
        dsv4.open(partial).dequantize(A_TENSOR)
    report = dsv4.validate(partial)
    assert report.ok and any(re.search(said, notice) for notice in report.notices)
    with pytest.raises(StoreError, match=f"{said}; only a whole store is pushed"):
        Push(partial, REPO)


def test_commands_say_it(partial: Path, published: SharingHub) -> None:
    said = sentence(published, partial)
    shown = warm_commands.run("inspect", partial, "--json")
    assert shown.returncode == 0 and re.search(said, shown.stderr.decode())
    told = warm_commands.run("info", partial)
    assert re.search(rb"left out +the draft layers\n", told.stdout), told.stdout
    mended = warm_commands.run("repair", partial)
    assert mended.returncode == 0 and re.search(said, mended.stderr.decode())
    assert b"whole, but for what was left out" in mended.stdout
    document = json.loads(shown.stdout)
    assert document["absent"] == ["draft"] and not any("mtp" in part for part in document["parts"])
    answer = ("--tokens", "1,2,3", "--max-new-tokens", "2", "--device", "cpu")
    done = warm_commands.run("run", partial, *answer)
    assert done.returncode == 0 and re.search(said, done.stderr.decode()), done.stderr


def test_damage_of_what_is_there_is_found(partial: Path) -> None:
    path = next(p for p in partial.glob("layers/0/ffn/experts/w2/codes/c/**/*") if p.is_file())
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    path.write_bytes(raw)
    assert not dsv4.validate(partial).ok
    path.unlink()
    with pytest.raises(StoreError, match="the file is missing"):
        dsv4.open(partial)


def test_the_rest_is_fetched_later(
    partial: Path, published: SharingHub, shared_store: Path
) -> None:
    published.requests.clear()
    whole = pull(REPO, partial)
    assert tree(partial) == tree(shared_store) and whole.absent == ()
    weights = [r.file for r in published.requests if r.file and "/c/" in r.file]
    assert weights and all(file.startswith("mtp/") for file in weights)
    assert not (partial / "dsv4.partial").exists()
    assert pull(REPO, partial, leave_out=WITHOUT).absent == ()  # it is whole, and stays so


def test_the_rest_that_does_not_come_leaves_no_store(
    partial: Path, published: SharingHub, shared_store: Path
) -> None:
    published.faults.plant(says(404), file="mtp/0/e_proj/codes/c/0/0", times=FOREVER)
    with pytest.raises(SourceError):
        pull(REPO, partial)
    with pytest.raises(StoreError, match="unfinished"):
        dsv4.open(partial)
    published.faults._planted.clear()
    again = pull(REPO, partial, leave_out=WITHOUT)  # another mind: what came of it goes
    assert again.absent == WITHOUT and not any(key.startswith("mtp/") for key in tree(partial))
    assert dsv4.validate(partial).ok
    pull(REPO, partial)
    assert tree(partial) == tree(shared_store)


def test_a_second_pull_fetches_nothing(partial: Path, published: SharingHub) -> None:
    assert pull(REPO, partial, leave_out=WITHOUT).fetched == 0


def test_another_store_is_refused(partial: Path, published: SharingHub, native_store: Path) -> None:
    published.publish(native_store)
    with pytest.raises(ConflictError, match="holds the store with root"):
        pull(REPO, partial)


def test_with_a_source_it_is_proved_as_far_as_it_goes(
    shared_store: Path, published: SharingHub, partial: Path
) -> None:
    source = shared_store.parent / "hub"
    report = dsv4.validate(partial, source=source)
    assert report.ok, report.findings
    assert len(report.tensors) == len(dsv4.open(partial).names())


def test_the_command_that_is_named_fetches_it(
    partial: Path, published: SharingHub, shared_store: Path
) -> None:
    (command,) = re.findall("`(dsv4 pull [^`]*)`", dsv4.validate(partial).notices[-1])
    _, _, repo, out, option, commit = shlex.split(command)
    assert option == "--revision"
    pull(repo, out, revision=commit)
    assert tree(Path(out)) == tree(shared_store)


@pytest.mark.parametrize(
    "edit", [{"absent": []}, {"absent": ["experts"]}, {"absent": "draft"}, {"repo": 3}]
)
def test_a_malformed_marker_is_refused(
    partial: Path, tmp_path: Path, edit: dict[str, object]
) -> None:
    copy = Path(shutil.copytree(partial, tmp_path / "copy"))
    marker = json.loads((copy / "dsv4.partial").read_text()) | edit
    (copy / "dsv4.partial").write_text(json.dumps(marker))
    with pytest.raises(StoreError, match=r"dsv4\.partial is malformed"):
        dsv4.open(copy)


def test_an_export_of_it_is_refused(partial: Path, published: SharingHub, tmp_path: Path) -> None:
    said = sentence(published, partial)
    with pytest.raises(StoreError, match=f"{said}; only a whole store is exported"):
        dsv4.export(partial, tmp_path / "exported")
