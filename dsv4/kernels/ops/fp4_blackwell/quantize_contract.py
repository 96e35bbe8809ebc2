"""Activations to NVFP4 for the block-scaled tensor cores: codes, tiled scales, a global scale.

Reference: `reference.py` beside this file, ModelOpt's rule; every output is bit for bit its own, so
the tolerance is zero. Two launches: maxima of parts, then the rounding. With `per_row` each token
has a global scale of its own and does not depend on the others; without, all share one, as every
other implementation of NVFP4 has it. With groups, tokens are sorted by group (expert) and each
group's scales begin a new tile of 128 rows, so that a tile of a grouped product has one group.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.numeric.layouts import tile_scales
from dsv4.kernels.core.contract import Buffers, Case, Expected, Launch
from dsv4.kernels.core.signature import Argument, Kernel, kernel
from dsv4.kernels.ops.fp4_blackwell.reference import quantize_activations, tile_group_scales
from dsv4.kernels.ops.fp4_blackwell.tiles import TILE_BYTES, TILE_COLUMNS, most_row_tiles, row_tiles

OPERATION = "quantize_activations"
MODULE = "dsv4.kernels.ops.fp4_blackwell.quantize"
AMAX_ELEMENTS = 8192  # of a part: what a CTA reads at once
MOST_PARTS = 512


class Form(NamedTuple):
    """per_row: global scales for each token. signed_zero: ModelOpt's code 8 for what rounds to -0.

    groups: of sorted tokens, 0 for plain rows.
    """

    k: int
    per_row: bool = False
    signed_zero: bool = False
    groups: int = 0

    @property
    def scale_columns(self) -> int:
        """Scale tiles along K."""
        return self.k // TILE_COLUMNS


def amax(k: int, pdl: bool = True) -> Kernel:
    """Maxima of equal parts. Arguments: x bfloat16 `[T, K]`; amax float32 `[P]`, P chosen by the
    caller: `parts` for one global scale, T for one a row.
    """
    arguments = (
        Argument("x", torch.bfloat16, ("rows", k)),
        Argument("amax", torch.float32, ("parts",), "out", align=4),
    )
    return kernel(OPERATION, f"{MODULE}:Amax", {"k": k, "pdl": pdl}, arguments)


def quantize(form: Form, pdl: bool = True) -> Kernel:
    """Arguments: x, amax as above; offsets int32 `[G + 1]` only with groups; codes uint8
    `[T, K/2]`; scales uint8 `[tiles, K/64, 512]`; global_scale float32 `[1]`, per_row `[T]`.

    tiles: `row_tiles(T)`, with groups `most_row_tiles(T, G)`, of which the ones used are written.
    """
    if form.k % TILE_COLUMNS:
        raise ValueError(f"{form.k} columns, expected a multiple of {TILE_COLUMNS}")
    config: dict[str, int | bool] = {
        "k": form.k,
        "per_row": form.per_row,
        "signed_zero": form.signed_zero,
    }
    offsets: tuple[Argument, ...] = ()
    if form.groups:
        config["groups"] = form.groups
        offsets = (Argument("offsets", torch.int32, (form.groups + 1,), align=4),)
    config["pdl"] = pdl
    arguments = (
        Argument("x", torch.bfloat16, ("rows", form.k)),
        Argument("amax", torch.float32, ("rows" if form.per_row else "parts",), align=4),
        *offsets,
        Argument("codes", torch.uint8, ("rows", form.k // 2), "out"),
        Argument("scales", torch.uint8, ("tiles", form.scale_columns, TILE_BYTES), "out"),
        Argument("global_scale", torch.float32, ("rows" if form.per_row else 1,), "out", align=4),
    )
    name = "QuantizeGrouped" if form.groups else "Quantize"
    return kernel(OPERATION, f"{MODULE}:{name}", config, arguments)


def parts(rows: int, k: int) -> int:
    """How many maxima to take for one global scale."""
    return min(-(-rows * k // AMAX_ELEMENTS), MOST_PARTS)


def forms_of(config: ModelConfig) -> dict[str, Form]:
    """What enters FP4 products: a layer's input, the experts' input and activation."""
    c = config
    return {
        "hidden": Form(c.hidden_size),
        "hidden per row": Form(c.hidden_size, per_row=True),
        "experts in": Form(c.hidden_size, groups=c.n_routed_experts),
        "experts act": Form(c.moe_intermediate_size, groups=c.n_routed_experts),
    }


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """Every form, for each number of tokens; experts see `top_k` times as many rows."""
    for shape, form in forms_of(config).items():
        for count in rows:
            times = config.num_experts_per_tok if form.groups else 1
            yield case(form, shape, model, count * times)


def checks(config: ModelConfig, model: str) -> Iterator[Case]:
    """Hard inputs: ties, zero blocks, signed zeros, extreme ranges, ragged rows and groups."""
    for per_row, signed_zero, rows in itertools.product(
        (False, True), (False, True), (1, 33, 128, 130, 517)
    ):
        form = Form(config.moe_intermediate_size, per_row, signed_zero)
        yield case(form, "hard", model, rows, hard=True)
    for rows in (1, 7, 200, 700):
        yield case(Form(config.hidden_size, True, True, 96), "hard groups", model, rows, hard=True)
    yield case(Form(config.hidden_size), "zeros", model, 3, scale=0.0)
    yield case(Form(config.hidden_size), "subnormal", model, 3, scale=2.0**-130)
    yield case(Form(config.hidden_size, signed_zero=True), "huge", model, 3, scale=2.0**125)


def case(
    form: Form, shape: str, model: str, rows: int, *, hard: bool = False, scale: float = 1.0
) -> Case:
    """One form. rows: of activations, an expert's copies included."""
    used = row_tiles(rows) if not form.groups else most_row_tiles(rows, form.groups)

    def make(rng: torch.Generator) -> Buffers:
        x = hard_values(rows, form.k, rng) if hard else plain_values(rows, form.k, rng) * scale
        empty: dict[str, Any] = {"device": rng.device}
        buffers: Buffers = {
            "x": x.to(torch.bfloat16),
            "amax": torch.empty(rows if form.per_row else parts(rows, form.k), **empty),
            "codes": torch.empty(rows, form.k // 2, dtype=torch.uint8, **empty),
            "scales": torch.empty(used, form.scale_columns, TILE_BYTES, dtype=torch.uint8, **empty),
            "global_scale": torch.empty(rows if form.per_row else 1, **empty),
        }
        if form.groups:
            buffers["offsets"] = random_offsets(rows, form.groups, rng)
        return buffers

    nbytes = rows * form.k * (2 + 9 / 16) + used * form.scale_columns * TILE_BYTES
    nbytes -= rows * form.k / 16
    return Case(
        OPERATION,
        shape,
        model,
        rows,
        (Launch(amax(form.k)), Launch(quantize(form))),
        int(nbytes),
        make,
        lambda buffers: expected(form, buffers),
        note="two launches",
        joint=not form.per_row or form.groups > 0,
    )


def plain_values(rows: int, k: int, rng: torch.Generator) -> Tensor:
    """Normal values, rows of different sizes."""
    sizes = torch.randn(rows, 1, generator=rng, device=rng.device).exp2()
    return torch.randn(rows, k, generator=rng, device=rng.device) * sizes


def hard_values(rows: int, k: int, rng: torch.Generator) -> Tensor:
    """Blocks of 16 of many kinds: zero, of zeros with signs, at the ties of E2M1, tiny, huge."""
    ties = torch.tensor(
        [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.0], device=rng.device
    )

    def pick(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=rng, device=rng.device)

    blocks = (rows, k // 16)
    kind = pick(6, *blocks).unsqueeze(2)
    power = (pick(40, *blocks) - 30).to(torch.float32).exp2().unsqueeze(2)
    tied = ties[pick(len(ties), *blocks, 16)]
    tied[..., 0] = 6.0  # a block scale that is a power of two, so that ties stay ties
    signs = (1 - 2 * pick(2, *blocks, 16)).to(torch.float32)
    normal = torch.randn(*blocks, 16, generator=rng, device=rng.device)
    x = torch.where(kind == 0, 0.0 * signs, normal)
    x = torch.where(kind == 1, tied * signs, x)
    x = torch.where(kind == 2, tied * signs * power, x)
    x = torch.where(kind == 3, normal * power, x)
    x = torch.where(kind == 4, torch.where(pick(16, *blocks, 16) == 0, normal, 0.0 * signs), x)
    x = x.view(rows, k)
    x[-1, -1] = 6.0 * 448.0  # makes g 1, so that ties are met exactly
    return x


def random_offsets(rows: int, groups: int, rng: torch.Generator) -> Tensor:
    """Rows fall into groups as tokens choose experts: some of them empty."""
    chosen = torch.randint(groups, (rows,), generator=rng, device=rng.device)
    counts = torch.bincount(chosen, minlength=groups)
    return torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32)


def expected(form: Form, buffers: Buffers) -> dict[str, Expected]:
    """Exactly the reference's bytes, where a group has rows."""
    a = quantize_activations(buffers["x"], per_row=form.per_row, signed_zero=form.signed_zero)
    wanted = {"codes": Expected(a.codes), "global_scale": Expected(a.global_scale)}
    if not form.groups:
        return wanted | {"scales": Expected(tile_scales(a.scales))}
    tiles = tile_group_scales(a.scales, buffers["offsets"])
    value = torch.zeros_like(buffers["scales"])
    value[: len(tiles)] = tiles
    tolerance = torch.zeros(value.shape, dtype=torch.float64, device=value.device)
    tolerance[len(tiles) :] = torch.inf  # nobody reads them
    return wanted | {"scales": Expected(value, tolerance)}
