"""The reader that docs/format.md prints reads every tensor of a store as the package does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsv4

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 60


def printed_reader() -> str:
    """The one block of Python in the section that promises a reader."""
    text = (ROOT / "docs" / "format.md").read_text()
    (code,) = re.findall(r"^## A reader .*?^```python\n(.*?)^```", text, re.S | re.M)
    return str(code)


def test_it_is_as_short_as_it_says() -> None:
    assert sum(bool(line.strip()) for line in printed_reader().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("recipe", ["native", "standard", "nvfp4"])
def test_it_reads_every_tensor(recipe: str, tmp_path: Path) -> None:
    where = tmp_path / "packed"
    dsv4.convert(ROOT / "examples" / "tiny-dsv4", where, recipe=recipe)
    packed, names = dsv4.open(where), re.compile(r"\.experts\.(\d+)\.")
    namespace: dict[str, Any] = {}
    exec(printed_reader(), namespace)
    store = namespace["Store"](where)
    read = set()
    for name in packed.names():
        match = names.search(name)
        template = names.sub(".experts.{e}.", name) if match else name
        found = store.tensor(template, int(match[1]) if match else None)
        wanted = packed.dequantize(name).numpy()
        assert found.shape == wanted.shape, name
        assert np.array_equal(found.astype(np.float32), wanted), name
        read.add(template)
    assert read == set(store.found)
    name = "layers.2.attn.wq_b.weight"
    wanted = packed.dequantize(name).numpy()
    file = where / "layers/2/attn/wq_b/codes/c/0/0"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    assert not np.array_equal(store.tensor(name), wanted)
