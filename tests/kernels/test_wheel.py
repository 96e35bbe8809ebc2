"""Wheels of kernels: made by pip, installed into an empty folder, found, and checked by key."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dsv4.cli import cli
from dsv4.formats.errors import KernelError
from dsv4.kernels.core import library, signature
from dsv4.kernels.core.build import build
from dsv4.kernels.core.library import Library, default_location, locations
from dsv4.kernels.core.wheel import make_wheel
from dsv4.kernels.ops.gemv.contract import Weight, gemv

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = gemv([Weight("fp8", 128, 256)])
CACHED = gemv([Weight("bf16", 128, 256)])
ABSENT = gemv([Weight("fp8", 256, 256)])
FOUND = """
import sys
import dsv4.kernels.core.library as library
from dsv4.kernels.ops.gemv.contract import Weight, gemv
function = library.Library(None, "sm_90a").function(gemv([Weight("fp8", 128, 256)]))
assert "dsv4_kernels_sm90a" not in sys.modules, "nothing of the wheel is imported"
print([str(place) for place in library.locations("sm_90a")][-1], callable(function))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kernels")
    build([INSTALLED], ["sm_90a"], out, workers=1)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    done = CliRunner().invoke(
        cli,
        ["kernels", "wheel", "--arch", "sm_90a", "--from", str(built), "--out", str(out)],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    (made,) = out.iterdir()
    assert str(made) in done.output.replace("\n", "")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder into which pip has put the wheel."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(folder), str(wheel)], check=True)
    return folder


@pytest.fixture
def visible(installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """It is on the path; the user's cache folder is empty. -> the package."""
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.delenv(library.LOCATION, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return installed / "dsv4_kernels_sm90a"


def test_what_a_wheel_holds(wheel: Path, built: Path) -> None:
    assert wheel.name.startswith("dsv4_kernels_sm90a-0.1.0-py3-none-linux_")
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
        assert names == {
            "dsv4_kernels_sm90a/__init__.py",
            "dsv4_kernels_sm90a/libcute_dsl_runtime.so",
            "dsv4_kernels_sm90a/sm_90a/kernels.json",
            f"dsv4_kernels_sm90a/sm_90a/{INSTALLED.name}.so",
        }
        same = f"sm_90a/{INSTALLED.name}.so"
        assert opened.read(f"dsv4_kernels_sm90a/{same}") == (built / same).read_bytes()
        (metadata,) = (name for name in opened.namelist() if name.endswith("/METADATA"))
        assert "Requires-Dist: dsv4[run]==0.1.0" in opened.read(metadata).decode()


def test_an_installed_wheel_is_found_by_itself(installed: Path, tmp_path: Path) -> None:
    """In a process of its own, whose cache folder is empty."""
    environment = {k: v for k, v in os.environ.items() if k != library.LOCATION}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)]),
        "XDG_CACHE_HOME": str(tmp_path),
    }
    command = [sys.executable, "-c", FOUND]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stdout.split() == [str(installed / "dsv4_kernels_sm90a"), "True"], done.stderr


def test_the_order_of_the_search(
    visible: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The cache folder, then the wheel, each kernel by itself; DSV4_KERNELS alone if it is set."""
    assert locations("sm_90a") == [tmp_path / "dsv4" / "kernels", visible]
    assert locations("sm_100a") == [tmp_path / "dsv4" / "kernels"], "another wheel's"
    build([CACHED], ["sm_90a"], default_location(), workers=1)
    both = Library(None, "sm_90a")
    x = torch.zeros(1, 1, 256, dtype=torch.bfloat16)
    for kernel, operands in ((CACHED, "256], bfloat16)]"), (INSTALLED, "256], uint8)")):
        with pytest.raises(TypeError) as caught:
            both.function(kernel)(x)
        assert operands in str(caught.value), "each is its own function"
    with pytest.raises(KernelError, match=f"is not built for sm_90a in {tmp_path}.* and {visible}"):
        both.function(ABSENT)
    monkeypatch.setenv(library.LOCATION, str(default_location()))
    assert locations("sm_90a") == [default_location()]
    with pytest.raises(KernelError, match=f"{INSTALLED.name} is not built"):
        Library(None, "sm_90a").function(INSTALLED)


def test_a_stale_kernel_in_the_cache_gives_way_to_the_wheel_s(visible: Path) -> None:
    folder = default_location()
    shutil.copytree(visible, folder)
    index = json.loads((folder / "sm_90a" / "kernels.json").read_text())
    index["kernels"][INSTALLED.name]["key"] = "0" * 32
    (folder / "sm_90a" / "kernels.json").write_text(json.dumps(index))
    found = Library(None, "sm_90a")
    assert found._place_of(INSTALLED).location == visible


def test_a_wheel_s_kernels_are_checked_as_all_are(
    visible: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other source, and machine code that was altered after the wheel was made."""
    with monkeypatch.context() as patch:
        patch.setattr(signature, "source_digest", lambda kernel: "0" * 64)
        with pytest.raises(KernelError, match=f"{visible} was built from other source"):
            Library(None, "sm_90a").function(INSTALLED)
    file = visible / "sm_90a" / f"{INSTALLED.name}.so"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100] + b"x" + whole[-99:])
    try:
        with pytest.raises(KernelError, match="is not what the build wrote"):
            Library(None, "sm_90a").function(INSTALLED)
    finally:
        file.write_bytes(whole)


def test_a_missing_kernel_is_one_sentence_with_one_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(library.LOCATION, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(KernelError) as caught:
        Library(None, "sm_90a", Path("packed"))
    assert str(caught.value) == (
        f"{tmp_path}/dsv4/kernels holds no kernels for sm_90a, nor does an installed wheel; "
        "`dsv4 kernels build packed --arch sm_90a` makes them"
    )
    monkeypatch.setattr(library, "COMPILER", "no_such_compiler")
    with pytest.raises(KernelError) as caught:
        Library(None, "sm_90a", Path("packed"))
    assert str(caught.value).endswith(
        "; `pip install 'dsv4[kernels]' && dsv4 kernels build packed --arch sm_90a` makes them"
    )


def test_what_cannot_become_a_wheel_is_refused(built: Path, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=f"{built} holds no kernels for sm_100a; .*makes them"):
        make_wheel(built, "sm_100a", tmp_path)
    shutil.copytree(built, tmp_path / "kernels")
    file = tmp_path / "kernels" / "sm_90a" / f"{INSTALLED.name}.so"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(KernelError, match="is not what the build wrote"):
        make_wheel(tmp_path / "kernels", "sm_90a", tmp_path / "dist")
    assert not (tmp_path / "dist").exists()
