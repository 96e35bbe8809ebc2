"""Memory is shared out below the ceiling, or refused in one sentence; the real plans fit."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import cast

import pytest

from dsv4.convert import memory as budget
from dsv4.convert.memory import BASE_BYTES, DEFAULT_MEMORY, MIN_BUFFER, Budget
from dsv4.convert.outputs.base import Output
from dsv4.convert.plan import Plan, make_plan
from dsv4.formats.errors import ConfigError, OutOfSpaceError
from dsv4.formats.model.inventory import DraftKind
from dsv4.formats.model.recipes import RECIPE_NAMES, make_recipe
from tests.convert.header_source import HeaderSource
from tests.support.real_configs import PUBLISHED

MIB, GIB = 1 << 20, 1 << 30


@dataclasses.dataclass(frozen=True)
class _Peak:
    """All that a budget asks of an output."""

    nbytes: int

    def peak_bytes(self) -> int:
        return self.nbytes


def _share(memory: int, workers: int | None, unit: int, remote: bool = False) -> Budget:
    outputs = [cast(Output, _Peak(unit)), cast(Output, _Peak(unit // 2))]
    return Budget.share(memory, workers, outputs, remote=remote)


@functools.cache
def _source(release: str) -> HeaderSource:
    published = PUBLISHED[release]
    return HeaderSource(published.config, DraftKind(published.draft))


@functools.cache
def _plan(release: str, recipe: str) -> Plan:
    return make_plan(_source(release), make_recipe(recipe))


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("unit", [1 * MIB, 50 * MIB, 300 * MIB])
def test_never_more_than_the_memory(unit: int, remote: bool) -> None:
    shared = 0
    for memory in range(600 * MIB, 16 * GIB, 333 * MIB):
        for workers in (None, 1, 2, 5, 16):
            try:
                found = _share(memory, workers, unit, remote)
            except OutOfSpaceError:
                continue
            shared += 1
            work = (found.workers + 1) * unit
            buffers = found.streams * found.hold_bytes + found.flight_bytes
            assert found.peak_bytes == BASE_BYTES + work + buffers <= memory
            assert found.workers == (workers or found.workers)
            assert min(found.hold_bytes, found.flight_bytes) >= MIN_BUFFER
            assert 1 <= found.streams <= found.workers
    assert shared > 20


@pytest.mark.parametrize("remote", [False, True])
def test_more_memory_never_gives_smaller_buffers(remote: bool) -> None:
    for workers in (1, 2, 5, 16):
        before = None
        for memory in range(900 * MIB, 32 * GIB, 217 * MIB):
            try:
                found = _share(memory, workers, 40 * MIB, remote)
            except OutOfSpaceError:
                assert before is None
                continue
            if before is not None:
                assert found.hold_bytes >= before.hold_bytes
                assert found.flight_bytes >= before.flight_bytes
            before = found
        assert before is not None


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("unit", [1 * MIB, 20 * MIB, 100 * MIB])
def test_by_default_fewer_workers_come_before_a_refusal(
    monkeypatch: pytest.MonkeyPatch, unit: int, remote: bool
) -> None:
    """Wherever one worker fits, the default fits; and more memory never means fewer workers."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    before = 0
    for memory in range(600 * MIB, 4 * GIB, 7 * MIB):
        try:
            _share(memory, 1, unit, remote)
        except OutOfSpaceError:
            continue
        found = _share(memory, None, unit, remote)
        assert found.workers >= before
        before = found.workers
    assert before > 1


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(OutOfSpaceError) as caught:
        _share(GIB, 4, 300 * MIB)
    assert caught.value.exit_code == 3
    sentence = str(caught.value)
    assert "--memory 1.00 GiB does not suffice for 4 workers" in sentence
    assert "give fewer --workers or more --memory" in sentence
    expected = float(sentence.split("at least ")[1].split(" GiB")[0])
    assert _share(int((expected + 0.01) * GIB), 4, 300 * MIB).workers == 4
    with pytest.raises(OutOfSpaceError):
        _share(int((expected - 0.01) * GIB), 4, 300 * MIB)
    with pytest.raises(OutOfSpaceError) as caught:
        _share(600 * MIB, None, 300 * MIB)
    assert "fewer --workers" not in str(caught.value)  # there is only one


@pytest.mark.parametrize("workers", [0, -1])
def test_no_workers_are_refused(workers: int) -> None:
    with pytest.raises(ConfigError, match="expected at least 1"):
        _share(GIB, workers, MIB)


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
@pytest.mark.parametrize("release", ["Flash", "Pro"])
def test_the_releases_fit_the_default(release: str, recipe: str) -> None:
    plan = _plan(release, recipe)
    for workers in (1, 2):
        for remote in (False, True):
            found = Budget.share(DEFAULT_MEMORY, workers, plan.outputs, remote=remote)
            assert found.peak_bytes <= DEFAULT_MEMORY
            assert budget.MAX_FLIGHT >= found.flight_bytes >= MIN_BUFFER
