"""Stores keep their roots: what is packed does not change unless somebody says so.

A root commits to every byte of a store, so that a change of code that moves one shows here. A
change on purpose (of the format, the rounding, the tiny checkpoint) writes new values and says why.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import dsv4
from dsv4.synthetic.flavours import FLAVOURS
from dsv4.synthetic.tiny import write_tiny

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny-dsv4"
ROOTS = {
    ("example", "native"): "551ae7253a7981c3e36f2e0e4d9d6feb4d4a240e8761433809f8b9ccbd0b6622",
    ("example", "standard"): "af680c5b324b1b2053cc3a60eac42cedf885030ca048369ee82f508c4ab2ad36",
    ("example", "nvfp4"): "132aeeb163a798c286ad34c37d471c6a17ec479e8f292204a9666182cf2ae2cf",
    ("official", "native"): "6f4b159c29f7e866c2cf34388c06b81a97a8e4caba817e27eac0ed5006e338ad",
    ("official", "standard"): "523a84d831c3dd402b50468f0d5c19cfbba036f34204f3e253fb2cb3e988e98c",
    ("base", "standard"): "260d199ab161f027a492de240c2d5c0aeee374bcf8f51c439db747c7d8a4bf53",
    ("modelopt", "standard"): "2b8c4cbc72b0ff760412f965cead2dff95b0be828c7e2a459d72dd9124abc386",
    (
        "compressed-tensors",
        "standard",
    ): "7db3a6553a6b98c0d5cbef3588db22354a907ad849e73263d352a0a2e1379954",
    ("bf16", "standard"): "0e26ebd3270cbd70369b740423b6d849e6afe8e687d9941217606d662ffdb1e9",
}


@pytest.mark.parametrize(("flavour", "recipe"), ROOTS)
def test_the_root_is_what_it_was(flavour: str, recipe: str, tmp_path: Path) -> None:
    source = EXAMPLE
    if flavour != "example":
        source = tmp_path / "source"
        write_tiny(source, flavour=flavour)
    summary = dsv4.convert(source, tmp_path / "packed", recipe=recipe)
    assert summary.root == ROOTS[flavour, recipe]


def test_every_flavour_has_golden_roots() -> None:
    assert {flavour for flavour, _ in ROOTS} == {*FLAVOURS, "example"}
