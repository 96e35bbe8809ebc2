"""Header-only inventories of every released dialect against the published counts and bytes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from dsv4.convert.plan import make_plan
from dsv4.formats.errors import SourceError
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import DraftKind
from dsv4.formats.model.recipes import make_recipe
from dsv4.formats.model.source_inventory import check_inventory
from dsv4.formats.model.source_tensor import Encoding
from tests.convert.header_source import HeaderSource
from tests.formats.model.headers import Dialect, Stored, base, entries_of, entry, modelopt
from tests.support.real_configs import FLASH, FLASH_0731, PRO, PRO_0813


@dataclasses.dataclass(frozen=True)
class Release:
    """A release in another dialect than the official one, and what its files hold."""

    config: dict[str, Any]
    draft: DraftKind
    dialect: Dialect
    tensors: int
    payload_bytes: int


RELEASES = {
    "Flash-NVFP4": Release(FLASH, DraftKind.MTP, modelopt, 135_235, 168_266_793_544),
    "Pro-NVFP4": Release(PRO, DraftKind.MTP, modelopt, 285_660, 913_061_485_688),
    "Flash-0731-NVFP4": Release(FLASH_0731, DraftKind.DSPARK, modelopt, 138_365, 175_535_844_088),
    "Pro-0813-NVFP4": Release(PRO_0813, DraftKind.DSPARK, modelopt, 290_326, 941_084_273_896),
    "Flash-Base": Release(FLASH, DraftKind.MTP, base, 69_187, 292_555_345_480),
}
COPY_BYTES = 1_059_061_760


@pytest.mark.parametrize("release", RELEASES)
def test_counts_and_bytes_are_the_published_ones(release: str) -> None:
    published = RELEASES[release]
    config = ModelConfig.from_hf(published.config)
    entries = entries_of(config, published.draft, dialect=published.dialect)
    inventory = check_inventory(entries, config)
    assert inventory.tensors == len(entries) == published.tensors
    assert inventory.payload_bytes == published.payload_bytes
    assert inventory.draft is published.draft
    experts = 3 * config.num_hidden_layers * config.n_routed_experts
    assert inventory.input_scales == (experts if published.dialect is modelopt else 0)


def test_base_with_draft_copies_of_embedding_and_head() -> None:
    config = ModelConfig.from_hf(FLASH)
    entries = entries_of(config, DraftKind.MTP, dialect=base)
    for name in ("mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"):
        entries[name] = entry(Stored(name, "BF16", (129280, 4096)))
        assert entries[name].nbytes == COPY_BYTES
    inventory = check_inventory(entries, config)
    assert inventory.tensors == 69_187
    assert [(copy.name, original) for copy, original in inventory.copies] == [
        ("mtp.0.emb.tok_emb.weight", "embed.weight"),
        ("mtp.0.head.weight", "head.weight"),
    ]
    entries["mtp.0.head.weight"] = entry(Stored("mtp.0.head.weight", "BF16", (129280, 1024)))
    with pytest.raises(SourceError, match=r"1 unexplained \(mtp\.0\.head\.weight\)"):
        check_inventory(entries, config)


@pytest.mark.parametrize(
    ("release", "recipe"),
    [
        pytest.param("Pro-0813-NVFP4", "native", marks=pytest.mark.long),
        pytest.param("Flash-Base", "native", marks=pytest.mark.long),
        ("Flash-Base", "standard"),
    ],
)
def test_plans_of_real_size_are_bounded_and_aligned(release: str, recipe: str) -> None:
    published = RELEASES[release]
    source = HeaderSource(published.config, published.draft, published.dialect)
    plan = make_plan(source, make_recipe(recipe))
    assert max(output.peak_bytes() for output in plan.outputs) < 4 << 30
    arrays = {array.path: array for output in plan.outputs for array in output.arrays()}
    for array in arrays.values():
        if array.files()[0].chunks > 1:
            assert array.chunk_nbytes % 4096 == 0, array.path
    w13 = arrays["layers/2/ffn/experts/w13/codes"]
    w2 = arrays["layers/2/ffn/experts/w2/codes"]
    assert w13.shape[0] // w13.shard[0] == w2.shape[0] // w2.shard[0] == 8
    assert w13.shape[1] == 8 * w13.chunk[1]
    assert w2.shape[2] == 8 * w2.chunk[2]
    if recipe == "native":
        assert plan.to_dict()["rounded_tensors"] == []
        carried = sum(math.prod(e.shape) for e in source.entries.values() if e.dtype == "U8")
        stacks = [a for p, a in arrays.items() if p.startswith("layers/") and "experts/w" in p]
        packed = sum(a.nbytes for a in stacks if a.element == "e2m1x2")
        assert packed == carried
    encodings = plan.to_dict()["encodings"]
    assert (encodings[str(Encoding.NVFP4)] > 0) == (published.dialect is modelopt)
