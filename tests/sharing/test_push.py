"""Pushing, with huggingface_hub's client as the oracle of what a hub is sent."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import dsv4
from dsv4.commands.sharing import _pushed_table
from dsv4.formats.errors import ConflictError, NetworkError, SourceError, StoreError
from dsv4.sharing import push as pushing
from dsv4.sharing.pull import pull
from dsv4.sharing.push import Push, Pushed
from dsv4.sharing.repository import Repository
from dsv4.synthetic.tiny import write_tiny
from tests.convert.hub.loopback import Answer, says
from tests.formats.store.packing import tree
from tests.sharing.conftest import CONFIG
from tests.sharing.hub import READER, REPO, SharingHub

BESIDE = {"README.md", ".gitattributes"}


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own waits between its tries."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def push(store: Path, repo: str = REPO, **how: Any) -> Pushed:
    work = Push(store, repo, **how)
    work.prove()
    return work.upload()


def pushed(hub: SharingHub) -> dict[str, bytes]:
    return {key: data for key, data in hub.head.items() if key not in BESIDE}


def writes(hub: SharingHub) -> list[str]:
    return [request.path for request in hub.requests if request.method in ("POST", "PUT")]


@pytest.fixture(scope="session")
def other_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another root, and other files. Not to be written to."""
    folder = tmp_path_factory.mktemp("other")
    write_tiny(folder / "hub", CONFIG, seed=7)
    dsv4.convert(folder / "hub", folder / "packed", recipe="native")
    return folder / "packed"


def root_of(store: Path) -> str:
    return str(dsv4.open(store).store.manifest["root"])


def test_what_is_pushed_is_what_is_pulled(
    hub: SharingHub, shared_store: Path, tmp_path: Path
) -> None:
    told: list[int] = []
    work = Push(shared_store, REPO)
    work.prove()
    done = work.upload(lambda moved: told.append(moved.done_bytes))
    assert pushed(hub) == tree(shared_store)
    assert hub.head[".gitattributes"] == b"*.bin filter=lfs\n"
    assert told == sorted(told) and told[-1] == done.nbytes == done.uploaded
    pull(REPO, tmp_path / "out", root=done.root)
    assert tree(tmp_path / "out") == tree(shared_store)


def test_a_second_push_sends_nothing(hub: SharingHub, shared_store: Path) -> None:
    first = push(shared_store)
    commits, sent = len(hub.trees), len(hub.uploaded)
    again = push(shared_store)
    assert (again.commit, again.uploaded, again.card) == (first.commit, 0, "as it was")
    assert (len(hub.trees), len(hub.uploaded)) == (commits, sent)


def _card_of(hub: SharingHub) -> tuple[Any, str]:
    """-> (its metadata, its text), as huggingface_hub reads them."""
    card = ModelCard(hub.head["README.md"].decode())
    return card.data, card.text


def test_the_card_says_what_the_store_is(hub: SharingHub, shared_store: Path) -> None:
    push(shared_store)
    data, text = _card_of(hub)
    assert (data.library_name, data.license) == ("dsv4", "other")
    assert data.license_link == "assets/LICENSE" and data.base_model is None
    root = root_of(shared_store)
    assert f"dsv4 pull {REPO} ./packed --root {root}" in text
    report = dsv4.validate(shared_store)
    exact = sum(1 for name in dsv4.open(shared_store).names() if _exact(shared_store, name))
    total = len(dsv4.open(shared_store).names())
    assert report.ok and f"{exact} of {total} tensors are exact" in text


def _exact(store: Path, name: str) -> bool:
    return bool(dsv4.open(store).provenance(name, statistics=False)["exact"])


def test_the_card_names_repository_and_commit(
    hub: SharingHub, shared_store: Path, tmp_path: Path
) -> None:
    """The origin is no part of the root: it may be set by hand."""
    store = Path(shutil.copytree(shared_store, tmp_path / "store"))
    _set_origin(store, {"kind": "hub", "repo": "deepseek-ai/DeepSeek-V4", "commit": "ab" * 20})
    push(store)
    data, text = _card_of(hub)
    assert data.base_model == "deepseek-ai/DeepSeek-V4"
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert f"at commit `{'ab' * 20}`" in text


def _set_origin(store: Path, origin: dict[str, str]) -> None:
    import hashlib

    document = json.loads((store / "zarr.json").read_text())
    document["attributes"]["dsv4"]["origin"] = origin
    raw = json.dumps(document).encode()
    (store / "zarr.json").write_bytes(raw)
    marker = json.loads((store / "dsv4.complete").read_text())
    marker["metadata_sha256"] = hashlib.sha256(raw).hexdigest()
    (store / "dsv4.complete").write_text(json.dumps(marker))


def test_a_card_of_somebody_s_own_is_kept_and_named(hub: SharingHub, shared_store: Path) -> None:
    hub.commit_tree({"README.md": b"# mine\n"})
    said: list[str] = []
    assert push(shared_store, notice=said.append).card == "kept"
    assert hub.head["README.md"] == b"# mine\n"
    assert any("README.md of somebody's own, which is kept" in one for one in said)
    assert push(shared_store, replace_card=True).card == "written"
    ours = hub.head["README.md"]
    assert b"dsv4 pull" in ours
    hub.commit_tree(hub.head | {"README.md": ours.replace(b"lost", b"gained")})
    assert push(shared_store).card == "kept"  # edited by hand: no longer ours
    hub.commit_tree(hub.head | {"README.md": ours})
    assert push(shared_store).card == "as it was"


def _flip(store: Path) -> str:
    path = next(
        p for p in sorted(store.glob("layers/0/ffn/experts/w2/codes/c/**/*")) if p.is_file()
    )
    raw = bytearray(path.read_bytes())
    raw[11] ^= 4
    path.write_bytes(raw)
    return path.relative_to(store).as_posix()


def _lose_a_document(store: Path) -> str:
    (store / "norm/weight/zarr.json").unlink()
    return "norm/weight/zarr.json"


def _shorten(store: Path) -> str:
    path = store / "norm/weight/c/0"
    path.write_bytes(path.read_bytes()[:-1])
    return "norm/weight/c/0"


def _unfinish(store: Path) -> str:
    (store / "dsv4.complete").unlink()
    return "dsv4.complete is missing"


@pytest.mark.parametrize("damage", [_flip, _lose_a_document, _shorten, _unfinish])
def test_a_damaged_store_is_not_published(
    hub: SharingHub, shared_store: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    store = Path(shutil.copytree(shared_store, tmp_path / "store"))
    named = damage(store)
    with pytest.raises(StoreError, match=named):
        push(store)
    assert writes(hub) == []


@pytest.mark.parametrize("action", ["preupload", "batch", "commit"])
def test_a_push_that_fails_is_gone_on_with(
    hub: SharingHub,
    shared_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    action: str,
) -> None:
    monkeypatch.setattr(pushing, "COMMIT_FILES", 50)
    kind = "hub" if action == "batch" else "api"
    hub.faults.plant(says(503), host=kind, file=action, skip=2, times=100)
    with pytest.raises(NetworkError, match="503; run the same command again to continue"):
        push(shared_store)
    hub.faults._planted.clear()
    assert len(hub.trees) > 2 and "dsv4.complete" not in hub.head
    with pytest.raises(SourceError, match=r"is not a packed store: it has no dsv4\.complete"):
        pull(REPO, tmp_path / "out")
    sent = set(hub.uploaded)
    hub.uploaded.clear()
    done = push(shared_store)
    assert 0 < done.uploaded < done.nbytes
    assert pushed(hub) == tree(shared_store)
    assert sent and not sent & {*hub.uploaded}  # nothing twice


def test_an_upload_that_breaks_is_tried_again(hub: SharingHub, shared_store: Path) -> None:
    hub.faults.plant(says(500), file="upload", times=2)
    push(shared_store)
    assert pushed(hub) == tree(shared_store)


def test_a_commit_whose_answer_is_lost_counts(hub: SharingHub, shared_store: Path) -> None:
    hub.faults.plant(says(502), host="api", file="commit")
    with pytest.raises(NetworkError):
        push(shared_store)
    sent = len(hub.uploaded)
    push(shared_store)
    assert pushed(hub) == tree(shared_store) and len(hub.uploaded) - sent < sent


def test_another_store_is_replaced_only_if_asked_for(
    hub: SharingHub, shared_store: Path, other_store: Path, tmp_path: Path
) -> None:
    push(other_store)
    before = len(hub.trees)
    with pytest.raises(ConflictError, match=f"{root_of(other_store)}.*{root_of(shared_store)}"):
        push(shared_store)
    assert len(hub.trees) == before
    push(shared_store, replace=True)
    assert pushed(hub) == tree(shared_store)
    between = list(hub.trees.values())[before:-1]
    assert between and not any("dsv4.complete" in one for one in between)  # never a mixture
    assert root_of(shared_store).encode() in hub.head["README.md"]
    pull(REPO, tmp_path / "out", root=root_of(shared_store))


def test_somebody_else_s_commit_in_between_is_noticed(hub: SharingHub, shared_store: Path) -> None:
    work = Push(shared_store, REPO)
    hub.commit_tree(hub.head | {"x.txt": b"x"})
    with pytest.raises(ConflictError, match=r"changed while it was pushed to: A commit has happ"):
        work.upload()


def test_somebody_else_s_commit_right_behind_is_named(
    hub: SharingHub, shared_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Repository.refuse_absent

    def late(self: Repository, sizes: Mapping[str, int]) -> None:
        hub.commit_tree({k: v for k, v in hub.head.items() if k != "dsv4.complete"})
        real(self, sizes)

    monkeypatch.setattr(Repository, "refuse_absent", late)
    with pytest.raises(ConflictError, match=r"somebody else changed it to \w{12} .*dsv4\.complete"):
        push(shared_store)


def test_what_else_is_there_is_named_and_kept(hub: SharingHub, shared_store: Path) -> None:
    said: list[str] = []
    push(shared_store, notice=said.append)
    assert said == []
    others = dict.fromkeys(("config.json", "model.safetensors", "notes.txt"), b"x")
    hub.commit_tree(hub.head | others)
    push(shared_store, notice=said.append)
    (one,) = said
    assert "also holds 3 files that no store has (config.json, model.safetensors, notes.txt)" in one
    assert hub.head.items() >= others.items()


def test_a_file_that_the_hub_ignores_is_missed(hub: SharingHub, shared_store: Path) -> None:
    def ignore(answer: Answer) -> None:
        said = json.loads(answer.body)
        for file in said["files"]:
            file["shouldIgnore"] = file["path"] == "assets/tokenizer.json"
        answer.body = json.dumps(said).encode()

    hub.faults.plant(ignore, host="api", file="preupload", times=100)
    with pytest.raises(SourceError, match=r"does not list 1 file .*tokenizer\.json.*\.gitignore"):
        push(shared_store)


def test_a_repository_is_made_if_asked_for(
    shared_store: Path, hub: SharingHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.exists = False
    with pytest.raises(SourceError, match="is not there, or the token of HF_TOKEN may not see it"):
        push(shared_store)
    assert writes(hub) == []
    push(shared_store, create=True, private=True)
    assert hub.private is True and pushed(hub) == tree(shared_store)


def test_a_branch_is_made_if_asked_for(shared_store: Path, hub: SharingHub) -> None:
    with pytest.raises(SourceError, match="some-store@next is not a revision"):
        push(shared_store, revision="next")
    done = push(shared_store, revision="next", create=True)
    assert hub.branches["next"] == done.commit
    assert "dsv4.complete" in hub.trees[done.commit] and "dsv4.complete" not in hub.head
    shown = list(_pushed_table(shared_store, done).columns[1].cells)
    assert f"{REPO}, branch next, now at commit {done.commit}" in shown
    assert f"dsv4 pull {REPO} DIR --revision next --root {done.root}" in shown
    card = hub.trees[done.commit]["README.md"].decode()
    assert f"dsv4 pull {REPO} ./packed --revision next --root {done.root}" in card
    again = push(shared_store, revision="next")
    assert (again.branch, again.card) == ("next", "as it was")


def test_tokens_are_refused_by_name(
    hub: SharingHub, shared_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(SourceError, match="may not be written to with the token of HF_TOKEN") as no:
        push(shared_store)
    assert READER not in str(no.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SourceError, match="needs a login; log in with `hf auth login` or set HF_T"):
        push(shared_store)


def test_a_hub_that_does_not_answer_is_the_network_s(shared_store: Path, hub: SharingHub) -> None:
    work = Push(shared_store, REPO)
    hub.hub.stop()
    with pytest.raises(NetworkError, match=r"no connection to 127\.0\.0\.1"):
        work.upload()
    hub.hub.start()
