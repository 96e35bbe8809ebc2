"""A load in a process that has done nothing else, which is what somebody who starts a model has.

`python -m dsv4.bench.first_load STORE DEVICE SETTINGS` prints its report as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4.formats.errors import RuntimeRefusal
from dsv4.runtime.cuda_driver import wake

if TYPE_CHECKING:
    import torch

    from dsv4.runtime.load import LoadReport, Settings

LIMIT = 600  # seconds


def first_load(store: Path, device: torch.device, settings: Settings) -> LoadReport:
    """Load the store at `store` in a process of its own. Raises RuntimeRefusal when that fails."""
    from dsv4.runtime.load import LoadReport
    from dsv4.runtime.load.readers import Spent

    arguments = [str(store), str(device), json.dumps(dataclasses.asdict(settings))]
    command = [sys.executable, "-m", "dsv4.bench.first_load", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeRefusal(f"the first load, in a process of its own, failed: {last}")
    found = json.loads(done.stdout)
    return LoadReport(**found | {"spent": Spent(**found["spent"])})


def _main(path: str, device: str, how: str) -> None:
    if device != "cpu":
        wake()
    from dsv4.formats.store.reader import PackedStore
    from dsv4.runtime.load import Settings, load_weights

    store = PackedStore.open(Path(path))
    weights = load_weights(store, device, settings=Settings(**json.loads(how)))
    print(json.dumps(dataclasses.asdict(weights.reports[0])))


if __name__ == "__main__":
    _main(*sys.argv[1:])
