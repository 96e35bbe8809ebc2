"""Beginnings that are remembered: found, bounded, kept on disk, and never of another."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4.serve.cpu_backend import CpuBackend
from dsv4.serve.engine import Options, ServeEngine
from dsv4.serve.prefix_cache import PrefixCache, common, packed
from dsv4.serve.prefix_files import HEADER, PrefixFiles
from dsv4.serve.remembering import MemoryOptions
from tests.serve import small
from tests.serve.harness import Heard, ask, job
from tests.serve.small import BLOCK, IDS, alone

LINES: list[str] = []


@pytest.fixture(autouse=True)
def _no_lines() -> None:
    LINES.clear()


def serving(files: PrefixFiles | None = None, slots: int = 1, **options: Any) -> ServeEngine:
    memory = MemoryOptions(log=LINES.append, **options.pop("memory", {}))
    return ServeEngine(small.backend(slots), Options(memory=memory, **options), files)


def displaced(engine: ServeEngine) -> None:
    """Whatever the slot held is gone."""
    ask(engine, job([1, 2, 3], 1)).wait()


def told(engine: ServeEngine, ids: list[int], **more: Any) -> Heard:
    """Checked against a session of its own."""
    heard = ask(engine, job(ids, 4, logprobs=2, **more)).wait()
    assert (heard.tokens, heard.logprobs) == alone(ids, 4, {})
    return heard


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40))
def test_common(first: list[int], second: list[int]) -> None:
    found = common(first, second)
    assert (first[:found] == second[:found] and first[: found + 1] != second[: found + 1]) or (
        found == min(len(first), len(second))
    )


def test_a_prompt_is_found_up_to_its_last_block() -> None:
    engine = serving()
    told(engine, IDS[:100])
    displaced(engine)
    for count, cached in ((100, 96), (97, 96), (130, 96), (96, 80), (40, 32)):
        if cached in (80, 32):  # where nothing was: only the beginning of it is read once more
            assert told(engine, IDS[:count]).cached in (0, cached)
            displaced(engine)
        assert told(engine, IDS[:count]).cached == cached
        displaced(engine)
    engine.close(finish=True)


def test_prompts_that_part_share_what_they_have_in_common() -> None:
    """The second one leaves a state where it parted from the first, for the third."""
    engine = serving()
    cached = []
    for other in (200, 230, 260):
        cached.append(told(engine, [*IDS[:70], *IDS[other : other + 20]]).cached)
        displaced(engine)
    assert cached == [0, 0, 64]
    assert LINES[0] == "prompt of 90 tokens: nothing like it is remembered"
    assert LINES[2].startswith("prompt of 90 tokens: 0 are not computed again; ")
    assert LINES[2].endswith("what is remembered is like it up to token 70")
    assert LINES[4].startswith("prompt of 90 tokens: 64 are not computed again")
    engine.close(finish=True)


def test_the_first_turn_leaves_a_state() -> None:
    """At the last block before the token that begins it."""
    turn = 7
    system = [token for token in IDS[:60] if token != turn]
    engine = serving(memory={"turn_id": turn})
    told(engine, [*system, turn, *IDS[100:150]])
    displaced(engine)
    assert told(engine, [*system, turn, *IDS[200:230]]).cached == len(system) // BLOCK * BLOCK
    engine.close(finish=True)


def test_an_answer_is_remembered() -> None:
    """The end of a turn is at most a block away, and only its last states stay."""
    engine = serving()
    heard = ask(engine, job(IDS[:30], 90)).wait()
    displaced(engine)
    following = [*IDS[:30], *heard.tokens, *IDS[300:310]]
    again = told(engine, following)
    assert again.cached == (30 + 90 - 1) // BLOCK * BLOCK
    cache = engine._scheduler.remembering.cache
    assert cache is not None
    states = [node.depth for node in cache._nodes.values() if node.state is not None]
    assert sorted(states) == [1, 6, 7, 8]
    engine.close(finish=True)


def test_reproducible_remembers_prompts_alone() -> None:
    engine = serving(memory={"reproducible": True})
    heard = ask(engine, job(IDS[:30], 90)).wait()
    displaced(engine)
    assert told(engine, [*IDS[:30], *heard.tokens, *IDS[300:310]]).cached == BLOCK
    engine.close(finish=True)


def test_salts_do_not_meet() -> None:
    """In memory, and in slots."""
    engine = serving(slots=2)
    told(engine, IDS[:100], salt=b"one")
    assert told(engine, IDS[:100], salt=b"two").cached == 0
    assert told(engine, IDS[:100]).cached == 0
    assert told(engine, IDS[:100], salt=b"two").cached > 0
    engine.close(finish=True)


def test_two_who_come_together_read_what_they_share_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though long prompts, which these are here, take turns."""
    monkeypatch.setattr("dsv4.serve.order.SHORT", 16)
    backend = small.backend(3)
    backend.chunk = 32
    engine = ServeEngine(backend)
    gate = ask(engine, job(IDS[300:310], 30))
    heard = [ask(engine, job(IDS[:150], 4, logprobs=2)) for _ in range(2)]
    for one in heard:
        one.wait()
        assert (one.tokens, one.logprobs) == alone(IDS[:150], 4, {})
    assert sorted(one.cached for one in heard) == [0, 144]
    gate.wait()
    engine.close(finish=True)


class NoBytes(CpuBackend):
    """Three cells for a state, one for a block, and nobody looks into them."""

    block, block_bytes, state_bytes, layout = BLOCK, 64, 180, b""

    def __init__(self) -> None:
        pass

    def save_state(self, slot: int, position: int, cells: Sequence[Tensor]) -> None:
        assert len(cells) == 3

    def save_blocks(self, slot: int, first: int, cells: Sequence[Tensor]) -> None:
        pass


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.booleans()), max_size=30),
    st.integers(1, 20),
)
def test_memory_is_bounded_and_parents_stay(kept: list[tuple[int, int, bool]], blocks: int) -> None:
    """Whatever is kept in any order: no cell is lost or in two places, no block stands alone."""
    cache = PrefixCache(NoBytes(), blocks * 64)
    for which, depth, state in kept:
        ids = IDS[:32] + IDS[which * 50 : which * 50 + 120]
        keys = cache.keys(b"")
        if state:
            cache.keep_state(0, keys, ids, depth * BLOCK)
        else:
            cache.keep_blocks(0, keys, ids, depth * BLOCK)
        nodes = list(cache._nodes.values())
        cells = [one.block for one in nodes] + [c for one in nodes for c in one.state or ()]
        cells += cache._free
        assert len({cell.data_ptr() for cell in cells}) == len(cells) == cache._made <= blocks
        for node in nodes:
            assert node.parent is None or cache.get(node.parent.key) is node.parent
        found = cache.find(keys, ids, len(ids))
        if found is not None:
            assert b"".join(one.ids for one in found.path()) == packed(ids[: found.depth * BLOCK])


def test_what_does_not_fit_is_not_kept() -> None:
    engine = serving(prefix_bytes=1000)
    told(engine, IDS[:100])
    displaced(engine)
    assert told(engine, IDS[:100]).cached == 0
    assert engine.stats().remembered_blocks == 0
    engine.close(finish=True)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """With files of a prompt of 100 tokens."""
    files = PrefixFiles(tmp_path / "prefixes", 1 << 30, LINES.append, least_tokens=BLOCK)
    engine = serving(files, root=b"root")
    told(engine, IDS[:70])
    told(engine, IDS[:100])
    engine.close(finish=True)
    yield tmp_path / "prefixes"


def in_order(place: Path) -> list[Path]:
    """The files from the one that begins the prompt on, each after the one that it names."""
    after = {}
    for path in place.iterdir():
        _, key, before, *_ = HEADER.unpack(path.read_bytes()[: HEADER.size])
        after[before] = (key, path)
    (key,) = set(after) - {key for key, _ in after.values()}  # the seed
    found = []
    while key in after:
        key, path = after[key]
        found.append(path)
    assert len(found) == len(after) >= 2
    return found


def later(place: Path, limit: int = 1 << 30, **options: Any) -> tuple[int, list[str]]:
    """Another process: tokens of IDS[:100] that it did not compute, and what it logged."""
    LINES.clear()
    files = PrefixFiles(place, limit, LINES.append, least_tokens=BLOCK)
    engine = serving(files, **{"root": b"root"} | options)
    cached = told(engine, IDS[:100]).cached
    engine.close(finish=True)
    return cached, list(LINES)


def test_files_are_read_by_a_later_process(place: Path) -> None:
    assert later(place)[0] == 96
    names = sorted(place.iterdir())
    assert len(names) >= 2 and all(name.suffix == ".prefix" for name in names)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert {stat.S_IMODE(name.stat().st_mode) for name in names} == {0o600}


def test_another_root_or_salt_finds_nothing(place: Path) -> None:
    assert later(place, root=b"toor")[0] == 0
    files = PrefixFiles(place, 1 << 30, LINES.append)
    engine = serving(files, root=b"root")
    assert told(engine, IDS[:100], salt=b"salt").cached == 0
    engine.close(finish=True)


@pytest.mark.parametrize("where", [0, 20, 40, 60, 80, 100, 500, -1])
def test_a_damaged_file_is_refused_and_computed_again(place: Path, where: int) -> None:
    """One bit, anywhere; the file is removed, and written anew."""
    deepest = in_order(place)[-1]
    data = bytearray(deepest.read_bytes())
    data[where] ^= 1
    deepest.write_bytes(data)
    cached, lines = later(place)
    assert cached < 96
    assert any(line.startswith(f"{deepest} is not used and removed: ") for line in lines)
    assert later(place)[0] == 96


def test_a_short_or_renamed_file_is_refused(place: Path) -> None:
    first, second, *_ = in_order(place)
    content = second.read_bytes()
    second.write_bytes(first.read_bytes())
    cached, lines = later(place)
    assert cached < 96 and any("it holds other tokens than its name says" in one for one in lines)
    second.write_bytes(content[:-1])
    assert any(f"it has {len(content) - 1} bytes" in line for line in later(place)[1])


def test_a_file_without_those_before_it_is_not_used(place: Path) -> None:
    in_order(place)[0].unlink()
    assert later(place)[0] == 0
    assert later(place)[0] == 96


def test_files_are_bounded_and_what_is_unused_goes_first(tmp_path: Path) -> None:
    place = tmp_path / "prefixes"
    sizes = []
    for limit in (1 << 30, 20_000):
        files = PrefixFiles(place, limit, LINES.append, least_tokens=BLOCK)
        engine = serving(files)
        for start in range(0, 200, 40):
            told(engine, IDS[start : start + 60])
        engine.close(finish=True)
        sizes.append(sum(path.stat().st_size for path in place.iterdir()))
    assert sizes[0] > 20_000 >= sizes[1] > 0


def test_what_was_being_written_is_removed(place: Path) -> None:
    rest = place / f"{'0' * 32}.prefix.new"
    rest.write_bytes(b"half")
    assert later(place)[0] == 96
    assert not rest.exists()


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    LINES.clear()
    files = PrefixFiles(tmp_path / "prefixes", 1 << 30, LINES.append, least_tokens=BLOCK)
    engine = serving(files, root=b"root")
    told(engine, IDS[:100])
    engine.close(finish=True)
    assert any("No space left" in line for line in LINES)
    assert list((tmp_path / "prefixes").iterdir()) == []
