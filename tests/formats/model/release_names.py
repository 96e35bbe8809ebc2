"""The names, dtypes and shapes that releases of transformers write, and which tensor each one is.

A golden is a JSON file: `format` ("own" or "default"), the `releases` that write it, their `config`
and `tensors`: stored name -> [dtype, shape, origin]. The origin is the tensor of the release's own
format that holds the same values, with the index of an expert and the half of gate and up:
`...gate_up_proj[3,1]`; null where no whole tensor does. It is found by the values, not by names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

GOLDENS = Path(__file__).parent / "goldens"
RELEASES = (
    *("5.8.0", "5.8.1", "5.9.0", "5.10.1", "5.10.2", "5.10.4", "5.11.0", "5.12.0", "5.12.1"),
    *("5.13.0", "5.13.1", "5.14.0", "5.14.1", "5.15.0", "5.15.1", "5.16.0", "5.16.1", "5.17.0"),
    *("5.18.0", "5.19.0", "5.20.0", "5.20.1", "5.20.2", "5.21.0", "5.21.1", "5.22.0", "5.22.1"),
    *("5.22.2", "5.23.0", "5.24.0"),
)
"""Every release of transformers that has DeepSeek-V4, as the index listed them at 5.24.0."""


def goldens() -> dict[str, Any]:
    """Every golden by its file's stem."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(GOLDENS.glob("*.json"))}


def describe(own: Path, saved: Path) -> dict[str, Any]:
    """What a directory written by a release holds; own: the same model in its own format."""
    config = json.loads((saved / "config.json").read_text())
    del config["transformers_version"]
    origins = {
        (tuple(part.shape), part.contiguous().view(torch.uint8).numpy().tobytes()): name
        for stored, tensor in load_file(own / "model.safetensors").items()
        for name, part in parts(stored, tensor)
    }
    tensors = {}
    with safe_open(saved / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            key = (tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes())
            dtype = file.get_slice(name).get_dtype()
            tensors[name] = [dtype, list(tensor.shape), origins.get(key)]
    return {"config": config, "tensors": tensors}


def parts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A tensor of a release's own format, and the experts in it: -> (origin, values)."""
    found = [(name, tensor)]
    if name.endswith("gate_up_proj"):
        for expert, both in enumerate(tensor):
            found += [(f"{name}[{expert},{half}]", part) for half, part in enumerate(both.chunk(2))]
    elif name.endswith("experts.down_proj"):
        found += [(f"{name}[{expert}]", part) for expert, part in enumerate(tensor)]
    return found
