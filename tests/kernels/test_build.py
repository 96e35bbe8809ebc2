"""Ahead-of-time builds: made without a GPU, kept while nothing changed, refused by name."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dsv4.cli import cli
from dsv4.commands.kernels import _of_releases
from dsv4.formats.errors import KernelError
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.releases import FLASH
from dsv4.formats.numeric import operands
from dsv4.kernels.core import library, signature, sizes
from dsv4.kernels.core.build import Built, build
from dsv4.kernels.core.library import Library
from dsv4.kernels.core.signature import Kernel
from dsv4.kernels.device.arch import architecture
from dsv4.kernels.names import ARCHITECTURES, OPERATIONS
from dsv4.kernels.ops import cases
from dsv4.kernels.ops.gemv.contract import Weight, gemv
from dsv4.runtime.gpu.rehearsal import all_kernels
from dsv4.runtime.gpu.standard import standard_model

SMALL = gemv([Weight("fp8", 128, 256)])
OTHER = gemv([Weight("bf16", 128, 256)])
PRUNED = dataclasses.replace(FLASH, n_routed_experts=160)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kernels")
    done = build([SMALL, SMALL], ["sm_90a", "sm_100a"], out, workers=1)
    assert [(one.name, one.arch, one.fresh) for one in done] == [
        (SMALL.name, "sm_90a", True),
        (SMALL.name, "sm_100a", True),
    ]
    return out


def test_a_build_is_kept_while_nothing_changed(built: Path) -> None:
    told: list[tuple[Built, int, int]] = []
    build([SMALL], ["sm_90a"], built, workers=1, progress=lambda *one: told.append(one))
    assert [(one.fresh, number, total) for one, number, total in told] == [(False, 1, 1)]


def test_further_kernels_join_what_is_there(built: Path) -> None:
    done = build([OTHER], ["sm_90a"], built, workers=1)
    assert [one.fresh for one in done] == [True]
    index = json.loads((built / "sm_90a" / "kernels.json").read_text())
    assert set(index["kernels"]) == {SMALL.name, OTHER.name}
    assert index["compiler"].startswith("nvidia-cutlass-dsl ")


def test_kernels_load_without_compiler_or_gpu(built: Path) -> None:
    function = Library(built, "sm_90a").function(SMALL)
    x = torch.zeros(1, 1, 256, dtype=torch.bfloat16)
    operands = torch.zeros(1, 128, 256, dtype=torch.uint8), torch.zeros(1, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="device_type=cuda"):
        function(x, operands, (torch.zeros(1, 128),))


def test_what_is_missing_is_refused_by_name(built: Path, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=f"no kernels for sm_90a.*dsv4 kernels build.*{tmp_path}"):
        Library(tmp_path, "sm_90a")
    absent = gemv([Weight("fp8", 256, 256)])
    with pytest.raises(KernelError, match=f"{absent.name} is not built for sm_90a"):
        Library(built, "sm_90a").function(absent)


def test_other_source_is_refused(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signature, "source_digest", lambda kernel: "0" * 64)
    with pytest.raises(KernelError, match="built from other source"):
        Library(built, "sm_90a").function(SMALL)


def test_altered_machine_code_is_refused(tmp_path: Path) -> None:
    build([SMALL], ["sm_90a"], tmp_path, workers=1)
    file = tmp_path / "sm_90a" / f"{SMALL.name}.so"
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 1
    file.write_bytes(raw)
    with pytest.raises(KernelError, match="is not what the build wrote"):
        Library(tmp_path, "sm_90a").function(SMALL)


def test_a_key_follows_source_shapes_and_architecture() -> None:
    key = SMALL.key("sm_90a", "compiler 1")
    assert key == SMALL.key("sm_90a", "compiler 1")
    assert len({key, SMALL.key("sm_100a", "compiler 1"), SMALL.key("sm_90a", "compiler 2")}) == 3
    assert key != OTHER.key("sm_90a", "compiler 1")
    assert {"dsv4.kernels.ops.gemv.kernel", "dsv4.kernels.device.asm"} <= signature._reachable(
        "dsv4.kernels.ops.gemv.kernel"
    )


def test_names_are_unique_and_short() -> None:
    kernels = {k for case in cases(FLASH, "flash", (1, 8)) for k in case.kernels}
    names = {one.name for one in kernels}
    assert len(names) == len(kernels)
    assert max(map(len, names)) <= signature.NAME_LENGTH + 9


def test_the_location_is_the_documented_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(library.LOCATION, str(tmp_path))
    assert library.default_location() == tmp_path
    monkeypatch.delenv(library.LOCATION)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library.default_location() == tmp_path / "dsv4" / "kernels"


def test_the_command_line_refuses_what_it_does_not_know() -> None:
    done = CliRunner().invoke(cli, ["kernels", "build", "--arch", "sm_70"])
    assert done.exit_code == 2
    assert "'sm_70', expected some of sm_90a,sm_100a" in done.output


def test_the_bench_needs_a_gpu() -> None:
    done = CliRunner().invoke(cli, ["bench", "kernels"])
    assert isinstance(done.exception, KernelError)
    assert "CUDA device" in str(done.exception)


def test_a_launch_library_that_is_missing_or_no_library_is_named(
    built: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(built, copy)
    (copy / library.RUNTIME_LIBRARY).write_bytes(b"")
    with pytest.raises(KernelError, match=r"launch library cannot be loaded.*writes it again"):
        Library(copy, "sm_90a")
    (copy / library.RUNTIME_LIBRARY).unlink()
    with pytest.raises(KernelError, match="launch library cannot be loaded"):
        Library(copy, "sm_90a")


def test_machine_code_that_is_gone_is_named(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(built, copy)
    (copy / "sm_90a" / f"{SMALL.name}.so").unlink()
    with pytest.raises(KernelError, match=f"{SMALL.name}.so cannot be read.*makes it"):
        Library(copy, "sm_90a").function(SMALL)


def test_scale_tiles_are_those_of_the_format() -> None:
    assert (sizes.SCALE_TILE_ROWS, sizes.SCALE_TILE_COLUMNS, sizes.SCALE_TILE_BYTES) == (
        operands.SF_ROWS,
        operands.NVFP4_K_ALIGN,
        operands.SF_TILE_BYTES,
    )


def test_the_architecture_is_decided_in_one_file() -> None:
    """`core.build` passes it; no kernel asks the compiler what it compiles for."""
    with pytest.raises(ValueError, match="kernels are made for sm_90a, sm_100a, not for sm_80"):
        architecture("sm_80")
    assert len({architecture(name) for name in ARCHITECTURES}) == len(ARCHITECTURES)
    assert set(ARCHITECTURES) == set(signature.CAPABILITY.values())
    package = Path(signature.__file__).parents[1]
    asking = re.compile(r"get_arch_enum|BaseDSL|[\"']sm_\d+a?[\"']")
    found = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if asking.search(file.read_text())
    }
    assert found == {
        "names.py",
        "core/signature.py",
        "device/arch.py",
        "ops/fp4_blackwell/gemm_contract.py",
    }


def test_kernels_of_several_models_lie_beside_each_other() -> None:
    """A configuration alone does not tell them apart: the arguments' shapes do."""
    names = {model: {one.name for one in _experts(model)} for model in (FLASH, PRUNED)}
    assert names[FLASH].isdisjoint(names[PRUNED])
    again = {one.name for one in _experts(dataclasses.replace(PRUNED))}
    assert again == names[PRUNED]


def test_pruned_releases_are_built_when_they_are_asked_for() -> None:
    """What a store of a pruned release launches is among what `--experts` adds."""
    whole, more = (
        {one.name for one in _of_releases(("flash",), OPERATIONS, False, experts)}
        for experts in ([], [PRUNED.n_routed_experts])
    )
    needed = {one.name for one in all_kernels(standard_model(PRUNED))}
    assert whole < more and needed <= more and not needed <= whole


def _experts(config: ModelConfig) -> list[Kernel]:
    found = [kernel for case in cases(config, "", (1,), ("experts",)) for kernel in case.kernels]
    assert found
    return found
