"""The load bench: lanes agree with the store, a wrong one is called wrong, figures are there."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors import safe_open
from torch import Tensor

from dsv4.bench import load as bench
from dsv4.cli import cli
from dsv4.commands.bench_tables import loading_tables
from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.store.reader import PackedStore
from dsv4.runtime.load import Settings
from dsv4.synthetic.store import make_store
from tests.bench.test_store import SMALL

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("load") / "store", SMALL).path


def _measure(store: Path, scratch: Path, *, cold: bool = True, peers: bool = True) -> bench.Loading:
    settings = Settings(2, 1 << 20, direct=True)
    return bench.measure(store, scratch, CPU, settings=settings, rounds=1, cold=cold, peers=peers)


def test_every_lane_gives_the_store_s_bytes(store: Path, tmp_path: Path) -> None:
    found = _measure(store, tmp_path)
    warm = [line.lane for line in found.lines if not line.cold]
    assert warm == ["dsv4", "dsv4, readers hash", "dsv4, checksums off", "safetensors, pread"]
    assert all(line.correct and line.rate > 0 for line in found.lines)
    assert found.machine.bus > 0 and found.reports["warm"].verified == "readers"
    if found.machine.disk is not None:  # None in a file system that is memory
        assert found.reports["cold"].verified == "readers"
        assert [line.lane for line in found.lines if line.cold] == ["dsv4"]
    text = io.StringIO()
    for table in loading_tables(found):
        Console(file=text, width=200).print(table)
    for phrase in ("of bus", "dsv4, warm", "page cache", "right", "verify", "of the bus"):
        assert phrase in text.getvalue()
    assert "WRONG" not in text.getvalue()


def test_the_copies_hold_the_same_bytes(store: Path, tmp_path: Path) -> None:
    _measure(store, tmp_path, cold=False)
    opened = PackedStore.open(store)
    [path] = tmp_path.glob("*.safetensors")
    with safe_open(path, framework="pt") as tensors:
        names = set(tensors.keys())
        assert names == {p for p in opened.hierarchy.arrays if not p.endswith("/lineage")}
        for name in names:
            files = opened.files_under(name)
            raw = b"".join((store / f.key).read_bytes()[: f.payload_nbytes] for f in files)
            assert tensors.get_tensor(name).view(torch.uint8).numpy().tobytes() == raw


def test_a_wrong_lane_is_called_wrong(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bench._lanes

    def altered(*arguments: object) -> dict[str, Callable[[], bench.Result]]:
        lanes = dict(real(*arguments))  # type: ignore[arg-type]
        load = lanes["dsv4, checksums off"]

        def wrong() -> bench.Result:
            result = load()

            def flipped(path: str) -> Tensor:
                tensor = result(path).clone()
                tensor[-1] ^= 1
                return tensor

            return flipped

        return lanes | {"dsv4, checksums off": wrong}

    monkeypatch.setattr(bench, "_lanes", altered)
    found = _measure(store, tmp_path, cold=False, peers=False)
    assert {line.lane: line.correct for line in found.lines} == {
        "dsv4": True,
        "dsv4, readers hash": True,
        "dsv4, checksums off": False,
    }


def test_the_command(store: Path, tmp_path: Path) -> None:
    options = ["--device", "cpu", "--rounds", "1", "--no-cold", "--dir", str(tmp_path), "--json"]
    done = CliRunner().invoke(cli, ["bench", "load", str(store), *options])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["lines"][0]["lane"] == "dsv4"
    assert document["machine"]["disk"] is None
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there(store: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeRefusal, match="torch sees no CUDA device"):
        bench.measure(store, tmp_path, torch.device("cuda"), settings=Settings(), rounds=1)
