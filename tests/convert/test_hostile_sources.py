"""Every hostile source is refused by name: exit 2, one sentence, nothing left outside --out."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv4.cli import main
from dsv4.formats.store.specs import MARKER
from dsv4.synthetic.tiny import HF_TINY, write_tiny
from tests.convert.hostile import (
    AT_OPEN,
    GLOBAL_SCALES,
    HARMLESS,
    IN_CARRIED,
    IN_NVFP4,
    IN_ROUNDED_FP8,
    IN_VALUES,
    OUTSIDE,
    Damage,
    Hostile,
)

# A source that makes us wait for a writer, or that is read for ever, fails soon.
pytestmark = pytest.mark.timeout(60)

LONGEST_SENTENCE = 2003
MEMORY = 6 << 30  # address space, torch included
OWN_PROCESS = (
    "1 byte short",
    "name moves the cursor",
    "index names a file of 10 MB",
    "config nests deeply",
    "huge integer for a float",
    "billions of experts",
    "text of 10 MB",
    "model_type moves the cursor",
    "shard links to a pipe",
    "config links to /dev/zero",
    "licence is a pipe",
    "licence of a terabyte",
    "config of a terabyte",
    "shard of a terabyte of zeros",
    "a tensor of a terabyte",
    "a billion fused experts",
)

Ran = tuple[int, str, str]
"""Exit code, stdout, stderr."""
Runner = Callable[..., Ran]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hub = tmp_path_factory.mktemp("hostile") / "hub"
    write_tiny(hub, HF_TINY)
    return hub


@pytest.fixture(scope="module")
def nvfp4_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hub = tmp_path_factory.mktemp("hostile") / "nvfp4"
    write_tiny(hub, HF_TINY, flavour="modelopt")
    return hub


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    """The real entry point in this process."""

    def runner(*args: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["dsv4", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, out, err

    return runner


def _world(checkpoint: Path, tmp_path: Path, damage: Damage) -> tuple[Path, Path]:
    """-> (the damaged checkpoint, where to pack it), beside a directory that is nobody's."""
    (tmp_path / OUTSIDE).mkdir()
    (tmp_path / OUTSIDE / "secret").write_text("{}")
    hub = Path(shutil.copytree(checkpoint, tmp_path / "hub"))
    damage(hub)
    return hub, tmp_path / "out"


def _snapshot(world: Path, out: Path) -> dict[str, tuple[int, int, int]]:
    """Everything beside `out`: kind and mode, size, time of the last change."""
    found = {}
    for path in world.rglob("*"):
        if path != out and out not in path.parents:
            status = path.lstat()
            found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def _check_refusal(hostile: Hostile, ran: Ran) -> None:
    code, out, err = ran
    assert code == 2, ran
    assert out == ""
    assert "Traceback" not in err
    # Progress may stand before it; the refusal is the last line and starts with our name.
    sentence = err.splitlines()[-1]
    assert sentence.startswith("dsv4: ")
    assert sum(line.startswith("dsv4: ") for line in err.splitlines()) == 1
    assert len(sentence) <= LONGEST_SENTENCE
    assert sentence.isprintable()
    for part in hostile.says:
        assert part in sentence


@pytest.mark.parametrize("case", AT_OPEN | GLOBAL_SCALES)
def test_refused_before_anything_is_written(
    case: str, checkpoint: Path, nvfp4_checkpoint: Path, tmp_path: Path, run: Runner
) -> None:
    hostile = (AT_OPEN | GLOBAL_SCALES)[case]
    source = nvfp4_checkpoint if case in GLOBAL_SCALES else checkpoint
    hub, out = _world(source, tmp_path, hostile.damage)
    before = _snapshot(tmp_path, out)
    for args in (("plan", hub), ("plan", hub, "--json"), ("convert", "--hf", hub, "--out", out)):
        _check_refusal(hostile, run(*args))
        assert not out.exists()
    assert _snapshot(tmp_path, out) == before


VALUES = {
    **{case: (hostile, "standard", "official") for case, hostile in IN_VALUES.items()},
    **{case: (hostile, "native", "official") for case, hostile in IN_CARRIED.items()},
    **{case: (hostile, "nvfp4", "official") for case, hostile in IN_ROUNDED_FP8.items()},
    **{case: (hostile, "standard", "modelopt") for case, hostile in IN_NVFP4.items()},
}


@pytest.mark.parametrize("case", VALUES)
def test_refused_once_the_value_is_read(
    case: str, checkpoint: Path, nvfp4_checkpoint: Path, tmp_path: Path, run: Runner
) -> None:
    hostile, recipe, flavour = VALUES[case]
    source = checkpoint if flavour == "official" else nvfp4_checkpoint
    hub, out = _world(source, tmp_path, hostile.damage)
    before = _snapshot(tmp_path, out)
    _check_refusal(hostile, run("convert", "--hf", hub, "--out", out, "--recipe", recipe))
    assert not (out / MARKER).exists()
    assert run("validate", out)[0] == 1
    assert _snapshot(tmp_path, out) == before


OPENED: list[str] = []
WATCHED: list[str] = []  # the directory whose files are being watched


def _watch(event: str, args: tuple[object, ...]) -> None:
    if event == "open" and WATCHED and isinstance(args[0], str) and WATCHED[0] in args[0]:
        OPENED.append(args[0])


@pytest.mark.parametrize("case", HARMLESS)
def test_what_is_harmless_is_accepted_and_what_is_foreign_never_opened(
    case: str, checkpoint: Path, tmp_path: Path, run: Runner
) -> None:
    hub, out = _world(checkpoint, tmp_path, HARMLESS[case])
    before = _snapshot(tmp_path, out)
    if not OPENED:
        sys.addaudithook(_watch)  # it cannot be taken away again
    OPENED.clear()
    WATCHED[:] = [str(hub)]
    try:
        assert run("convert", "--hf", hub, "--out", out)[0] == 0
    finally:
        WATCHED.clear()
    assert run("validate", out, "--source", hub)[0] == 0
    assert _snapshot(tmp_path, out) == before
    names = {Path(path).name for path in OPENED}
    assert any(name.endswith(".safetensors") for name in names)
    assert all(name.endswith((".safetensors", ".json")) or name == "LICENSE" for name in names)


@pytest.mark.parametrize("case", OWN_PROCESS)
def test_refused_by_a_process_of_little_memory(case: str, checkpoint: Path, tmp_path: Path) -> None:
    hostile = AT_OPEN[case]
    hub, out = _world(checkpoint, tmp_path, hostile.damage)
    before = _snapshot(tmp_path, out)
    done = subprocess.run(
        [sys.executable, "-m", "dsv4", "convert", "--hf", str(hub), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
        env=os.environ | {"PYTHONFAULTHANDLER": "1"},
    )
    _check_refusal(hostile, (done.returncode, done.stdout, done.stderr))
    assert not out.exists()
    assert _snapshot(tmp_path, out) == before


def test_the_name_of_a_directory_cannot_alter_the_terminal(tmp_path: Path, run: Runner) -> None:
    hub = tmp_path / "hub\x1b[2J\ndsv4: packed"
    hub.mkdir()
    _check_refusal(Hostile(lambda _: None, (r"hub\x1b[2J\ndsv4", "config.json")), run("plan", hub))


def test_a_sentence_ends(run: Runner) -> None:
    code, _, err = run("plan", "x/" * 2000)
    assert code == 2
    assert len(err) < 2100
    assert err.endswith("...\n")
