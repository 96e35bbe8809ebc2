"""Pulling: the pusher's bytes and root, or one sentence, whatever the network and the disk do."""

from __future__ import annotations

from pathlib import Path

import dsv4
from dsv4.sharing.pull import pull
from tests.sharing.hub import REPO, SharingHub


def tree(store: Path) -> dict[str, bytes]:
    return {
        path.relative_to(store).as_posix(): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


def test_a_pulled_store_is_the_pushed_one(
    published: SharingHub, shared_store: Path, tmp_path: Path
) -> None:
    done = pull(REPO, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(shared_store)
    assert done.root == dsv4.open(shared_store).store.manifest["root"]
    assert dsv4.validate(tmp_path / "out").ok
