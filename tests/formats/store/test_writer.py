"""The same bytes whatever the order; directories that are not ours; what is refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4.formats.errors import ConflictError, OtherConversionError, SourceError, StoreError
from dsv4.formats.store import durable
from dsv4.formats.store.integrity import check_root
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import JOURNAL, LOCK, MARKER, ArraySpec
from dsv4.formats.store.writer import StoreWriter
from tests.formats.store import packing


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, bytes]]:
    """Root and bytes of the sample written in one go."""
    out = tmp_path_factory.mktemp("reference") / "packed"
    return packing.write(out), packing.tree(out)


Reference = tuple[str, dict[str, bytes]]


def _shuffled(seed: int) -> Callable[[list[Any]], list[Any]]:
    return lambda items: random.Random(seed).sample(items, len(items))


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_of_writing_does_not_matter(
    tmp_path: Path, reference: Reference, seed: int
) -> None:
    root = packing.write(tmp_path / "packed", order=_shuffled(seed))
    assert (root, packing.tree(tmp_path / "packed")) == reference


def test_threads_do_not_matter(tmp_path: Path, reference: Reference) -> None:
    what = packing.sample()
    with StoreWriter(tmp_path, packing.IDENTITY) as writer, ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(writer.write, file, parts) for file, parts in what.files()]
        jobs += [pool.submit(writer.write_asset, n, d) for n, d in packing.ASSETS.items()]
        for job in jobs:
            job.result()
        root = writer.finish(what.groups, list(reversed(what.arrays)), what.manifest)
    assert (root, packing.tree(tmp_path)) == reference


def test_another_content_has_another_root(tmp_path: Path, reference: Reference) -> None:
    assert packing.write(tmp_path / "packed", packing.sample(seed=1)) != reference[0]


def test_a_finished_store_holds_no_traces(reference: Reference) -> None:
    assert not {JOURNAL, LOCK} & reference[1].keys()
    assert not [key for key in reference[1] if key.endswith(".partial")]
    text = reference[1]["zarr.json"].decode()
    assert os.uname().nodename not in text or len(os.uname().nodename) < 4


# --- whose directory ----------------------------------------------------------------------------

_HOLD = """
import sys
from pathlib import Path
from tests.formats.store import packing
from dsv4.formats.store.writer import StoreWriter
with StoreWriter(Path(sys.argv[1]), packing.IDENTITY):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConflictError, match=f"{tmp_path}: another process"):
            StoreWriter(tmp_path, packing.IDENTITY)
        holder.communicate("")
    StoreWriter(tmp_path, packing.IDENTITY).close()


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(ConflictError, match=r"thesis\.tex"):
        StoreWriter(tmp_path, packing.IDENTITY)
    assert packing.tree(tmp_path) == {"thesis.tex": b"dear"}


def test_a_foreign_journal_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text('{"diary": "monday"}\n')
    with pytest.raises(ConflictError, match="is not a journal of dsv4"):
        StoreWriter(tmp_path, packing.IDENTITY)
    assert (tmp_path / JOURNAL).read_text() == '{"diary": "monday"}\n'


@pytest.mark.parametrize("journal", ["", '{"diary": "monday"}\n'])
def test_a_foreign_journal_among_files_is_left_alone(tmp_path: Path, journal: str) -> None:
    (tmp_path / JOURNAL).write_text(journal)
    (tmp_path / "draft.partial").write_text("dear")
    (tmp_path / "zarr.json").write_text("{}")
    before = packing.tree(tmp_path)
    with pytest.raises(ConflictError):
        StoreWriter(tmp_path, packing.IDENTITY)
    after = packing.tree(tmp_path)
    after.pop(LOCK, None)
    assert after == before


def test_a_complete_store_is_left_alone(tmp_path: Path) -> None:
    packing.write(tmp_path)
    before = packing.tree(tmp_path)
    with pytest.raises(ConflictError, match="complete"):
        StoreWriter(tmp_path, packing.IDENTITY)
    assert packing.tree(tmp_path) == before


@pytest.mark.parametrize("field", ["tool", "recipe", "source"])
def test_another_conversion_is_left_alone(tmp_path: Path, field: str) -> None:
    StoreWriter(tmp_path, packing.IDENTITY).close()
    other = packing.IDENTITY | {field: "something else"}
    with pytest.raises(OtherConversionError, match=f"differs in {field};") as caught:
        StoreWriter(tmp_path, other)
    assert (caught.value.begun, caught.value.now) == (packing.IDENTITY, other)


@pytest.mark.parametrize("version", [1, 3, 99])
def test_a_journal_of_another_version_is_left_alone(tmp_path: Path, version: int) -> None:
    journal = f'{{"dsv4_journal": {version}, "identity": {{"source": "{"0" * 64}"}}}}\n'
    (tmp_path / JOURNAL).write_text(journal)
    with pytest.raises(ConflictError, match="of another version of dsv4; go on with that version"):
        StoreWriter(tmp_path, packing.IDENTITY)
    assert (tmp_path / JOURNAL).read_text() == journal


def test_directories_behind_symlinks_are_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    out = tmp_path / "out"
    StoreWriter(out, packing.IDENTITY).close()
    (out / "norm").symlink_to(elsewhere)
    with StoreWriter(out, packing.IDENTITY) as writer, pytest.raises(StoreError, match="norm"):
        for file, parts in packing.sample().files():
            writer.write(file, parts)
    assert not list(elsewhere.iterdir())


# --- what write and finish refuse ---------------------------------------------------------------


def test_parts_must_fill_the_file(tmp_path: Path) -> None:
    (file,) = ArraySpec.whole("x", (4, 4), "float32").files()
    with StoreWriter(tmp_path, packing.IDENTITY) as writer:
        for parts in ([], [torch.zeros(15)], [torch.zeros(8), torch.zeros(9)]):
            with pytest.raises(StoreError, match="expected 64"):
                writer.write(file, parts)
        with pytest.raises(StoreError, match="contiguous"):
            writer.write(file, [torch.zeros(4, 8).t()])
        assert not writer.has(file)
        assert not [path for path in tmp_path.rglob("x/*") if path.is_file()]
        writer.write(file, [torch.ones(8), torch.ones(2, 4)])
        assert writer.has(file)


def test_a_part_may_span_pieces_and_chunks(
    tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "PIECE_BYTES", 1000)
    what = packing.sample()
    with StoreWriter(tmp_path, packing.IDENTITY) as writer:
        for file, parts in what.files():
            writer.write(file, [torch.cat([part.view(torch.uint8).reshape(-1) for part in parts])])
        for name, data in packing.ASSETS.items():
            writer.write_asset(name, data)
        root = writer.finish(what.groups, what.arrays, what.manifest)
    assert (root, packing.tree(tmp_path)) == reference


def _written(out: Path) -> StoreWriter:
    writer = StoreWriter(out, packing.IDENTITY)
    for file, parts in packing.sample().files():
        writer.write(file, parts)
    return writer


def test_finish_refuses_what_does_not_fit(tmp_path: Path) -> None:
    what = packing.sample()
    groups, arrays = what.groups, list(what.arrays)
    extra = ArraySpec.whole("extra", (4,), "uint8", packing.plain("extra"))
    nan = groups | {"head": {"dsv4": {**groups["head"]["dsv4"], "rel_mse": float("nan")}}}
    without_names = [*arrays[1:], ArraySpec.whole("norm/weight", (packing.HIDDEN,), "bfloat16")]
    no_config = {key: value for key, value in what.manifest.items() if key != "config"}
    with _written(tmp_path) as writer:
        for pattern, arguments in {
            "not written, first extra": (groups, [*arrays, extra], what.manifest),
            "belong to no array": (groups, arrays[1:], what.manifest),
            "same path": (groups, [*arrays, arrays[0]], what.manifest),
            "cannot be stored.*JSON": (nan, arrays, what.manifest),
            "neither part": (groups, without_names, what.manifest),
            "no quantised matrix": (groups | {"lone": {"dsv4": {}}}, arrays, what.manifest),
            "contains others": (groups | {"norm/weight/x": {}}, arrays, what.manifest),
            "config.*missing": (groups, arrays, no_config),
            "layouts": (groups, arrays, what.manifest | {"layouts": {"secret": {}}}),
        }.items():
            with pytest.raises(StoreError, match=pattern):
                writer.finish(*arguments)
            assert not (tmp_path / MARKER).exists()
        (tmp_path / "note.txt").write_text("x")
        with pytest.raises(StoreError, match=r"note\.txt"):
            writer.finish(groups, arrays, what.manifest)
        (tmp_path / "note.txt").unlink()
        writer.finish(groups, arrays, what.manifest)
    check_root(PackedStore.open(tmp_path))


def test_a_closed_writer_refuses(tmp_path: Path) -> None:
    file, parts = next(packing.sample().files())
    writer = StoreWriter(tmp_path, packing.IDENTITY)
    writer.close()
    writer.close()
    for action in (
        lambda: writer.write(file, parts),
        lambda: writer.has(file),
        lambda: writer.write_asset("a", b""),
        lambda: writer.finish({}, [], {}),
    ):
        with pytest.raises(StoreError, match="closed"):
            action()


def test_assets_are_checked_and_kept(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, packing.IDENTITY) as writer:
        with pytest.raises(SourceError, match="asset name"):
            writer.write_asset("../evil", b"x")
        writer.write_asset("tokenizer.json", b"one")
        first = (tmp_path / "assets/tokenizer.json").stat()
        writer.write_asset("tokenizer.json", b"one")
        assert (tmp_path / "assets/tokenizer.json").stat().st_ino == first.st_ino
        writer.write_asset("tokenizer.json", b"two")
        assert (tmp_path / "assets/tokenizer.json").read_bytes() == b"two"
    assert packing.tree(tmp_path).keys() == {JOURNAL, LOCK, "assets/tokenizer.json"}


def test_every_file_is_synced_before_its_journal_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that durability rests on: data, rename, directory, journal."""
    events: list[str] = []
    names: dict[int, str] = {}
    real_open, real_fsync, real_replace = os.open, os.fsync, Path.replace

    def opened(path: Any, *args: Any, **kwargs: Any) -> int:
        descriptor = real_open(path, *args, **kwargs)
        names[descriptor] = Path(path).name
        return descriptor

    def synced(descriptor: int) -> None:
        events.append(f"sync {names[descriptor]}")
        real_fsync(descriptor)

    def replaced(self: Path, target: Path) -> Path:
        events.append(f"rename {self.name}")
        return real_replace(self, target)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    (file,) = ArraySpec.whole("x", (4,), "float32").files()
    with StoreWriter(tmp_path / "out", packing.IDENTITY) as writer:
        events.clear()
        writer.write(file, [torch.zeros(4)])
    assert events == [
        "sync x",  # c in x
        "sync out",  # x in out
        "sync 0.partial",
        "rename 0.partial",
        "sync c",
        f"sync {JOURNAL}",
    ]


def test_journal_lines_are_plain_json(tmp_path: Path) -> None:
    file, parts = next(packing.sample().files())
    with StoreWriter(tmp_path, packing.IDENTITY) as writer:
        writer.write(file, parts)
    identity, entry = map(json.loads, (tmp_path / JOURNAL).read_text().splitlines())
    assert identity["identity"] == packing.IDENTITY
    assert (entry["path"], entry["bytes"]) == (file.key, file.nbytes)


def test_two_writers_in_threads_of_one_process(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, packing.IDENTITY):
        errors: list[Exception] = []

        def second() -> None:
            try:
                StoreWriter(tmp_path, packing.IDENTITY)
            except ConflictError as error:
                errors.append(error)

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert len(errors) == 1
