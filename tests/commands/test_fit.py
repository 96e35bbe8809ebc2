"""`dsv4 fit` as a command: its answers, its exit codes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from dsv4.cli import cli
from dsv4.commands import fit as command
from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.store.reader import PackedStore
from dsv4.runtime import machines
from dsv4.runtime.fit import needs_of
from dsv4.runtime.load.routes import Routes, default_file
from dsv4.synthetic.real_shapes import write_checkpoint
from dsv4.synthetic.store import make_store
from tests.runtime.test_fit import SMALL


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fit") / "packed"
    make_store(place, SMALL)
    return place


def fit(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["fit", *map(str, arguments)])


def test_a_store_that_fits_and_one_byte_less(packed: Path) -> None:
    needs = needs_of(PackedStore.open(packed), 500)
    whole = needs.whole + machines.CONTEXT
    done = fit(packed, "--context", "500", "--gpu-memory", str(whole))
    assert done.exit_code == 0, done.stdout
    assert "fits      yes" in done.stdout and "tokens/s" in done.stdout
    done = fit(packed, "--context", "500", "--gpu-memory", str(whole - 1), "--json")
    assert done.exit_code == 0, "some of them in host memory"
    found = json.loads(done.stdout)
    assert found["needed_bytes"] == needs.whole and found["free"] == needs.whole - 1
    assert found["experts_elsewhere"] == 3 and found["spare"] == 2
    all_there = ("--context", "500", "--gpu-memory", str(whole - 1), "--experts", "resident")
    done = fit(packed, *all_there, "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["fits"] is False and "--experts auto keeps some" in found["reasons"][0]
    assert found["remedies"][0].startswith("--context 4")
    shown = fit(packed, *all_there).stdout
    assert "resident     21 of 24 experts, 2 spare records" in shown and "fits         no" in shown


def test_a_checkpoint_is_what_its_store_would_be(packed: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hub", SMALL)
    both = [
        json.loads(fit(one, "--gpu", "h200", "--json").stdout) for one in (tmp_path / "hub", packed)
    ]
    assert both[0]["needs"] == both[1]["needs"]
    assert both[0]["needed_bytes"] == both[1]["needed_bytes"]
    native = json.loads(
        fit(tmp_path / "hub", "--gpu", "h200", "--recipe", "native", "--json").stdout
    )
    assert native["needs"]["core"]["head"] > both[0]["needs"]["core"]["head"]


def test_routes_and_budgets(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = str(PackedStore.open(packed).manifest["root"])
    chosen = np.array([[1.0, 0, 0, 0, 0, 0, 0, 1]] * 3)
    routes, file = Routes(root, chosen, chosen * 0), tmp_path / "routes.json"
    routes.write(file)
    options = (packed, "--gpu", "h200", "--experts", "40MB", "--json")
    counted = json.loads(fit(*options, "--routes", file).stdout)
    assert counted["resident"] == 18 and counted["misses"] == 0 and counted["counted"]
    assert json.loads(fit(*options).stdout)["misses"] == pytest.approx(2 * 3 * 6 / 24)
    routes.write(default_file(root))  # as a run leaves them, and the next one goes by
    assert json.loads(fit(*options).stdout)["misses"] == 0
    write_checkpoint(tmp_path / "hub", SMALL)
    planned = (tmp_path / "hub", *options[1:])
    assert json.loads(fit(*planned, "--routes", file).stdout)["misses"] == 0
    assert json.loads(fit(*planned).stdout)["counted"] is False


def test_this_machines_gpu_is_asked(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**10, 2 * 10**10))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    found = json.loads(fit(packed, "--json").stdout)
    assert found["free"] == 10**10 and found["gpu"]["name"] == "h200"
    assert found["host"] > 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = fit(packed, "--json").exception
    assert isinstance(refused, RuntimeRefusal)
    assert "this machine has no GPU that torch sees; describe one: --gpu h200" in str(refused)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--gpu", "tpu"), "'tpu' is not a GPU that is known here"),
        (("--gpu", "h200", "--routes", "/none"), "/none cannot be read"),
        (("--gpu", "h200", "--context", "2000000"), "max_seq_len is 2000000, expected 1 to"),
    ],
)
def test_what_is_refused(packed: Path, arguments: tuple[str, ...], sentence: str) -> None:
    done = fit(packed, *arguments)
    assert done.exit_code != 0 and sentence in str(done.exception)


def test_known_names_are_those_of_the_table() -> None:
    assert set(command.GPUS) == set(machines.NAMES)
    assert "h200" in fit("--help").stdout
    done = fit("x", "--experts", "some")
    assert done.exit_code == 2 and "'some' is not a size" in done.output
