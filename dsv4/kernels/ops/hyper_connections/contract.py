"""Hyper-connections between two sublayers, in one launch: spread, mix, collapse, norm.

    X'_k = post_k u + Σ_j comb[j,k] X_j            the streams after a sublayer's output u
    pre, post', comb' from (fn · X') / rms(X')      for the next sublayer
    x = rms_norm(Σ_j pre_j X'_j)                    the next sublayer's input

At the model's first sublayer X' is the token's embedding in every stream; before the head there is
neither post' nor comb'. Reference: `dsv4.kernels.reference.{mhc,norm}`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core.bounds import rounded_range
from dsv4.kernels.core.contract import Buffers, Case, Expected, Launch
from dsv4.kernels.core.signature import Argument, Kernel, kernel
from dsv4.kernels.reference.mhc import sinkhorn

IMPLEMENTATION = "dsv4.kernels.ops.hyper_connections.kernel:Mhc"
STREAMS = 4
LETTER = 32  # words of a letter: the mix, then the sum of squares
FINISH_COLUMNS = 256  # that a collapsing warp takes at once
PLACES = ("first", "middle", "last")
SIZES = {"zeros": 0.0, "tiny": 1e-12, "huge": 1e12}
"""Of unusual streams: zeros of both signs; squares far below the norm's eps, and far above."""
_VOCAB = 512


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes and constants of a model's hyper-connections, and how a launch cuts them.

    width: columns of a lane; warps: of a worker, finish_warps: of who collapses.
    """

    hidden: int
    iterations: int
    hc_eps: float
    norm_eps: float
    width: int = 4
    warps: int = 4
    finish_warps: int = 1

    @classmethod
    def of(cls, config: ModelConfig) -> Shape:
        """Those of a model."""
        c = config
        made = cls(c.hidden_size, c.hc_sinkhorn_iters, c.hc_eps, c.rms_norm_eps)
        per_warp = c.hidden_size // FINISH_COLUMNS
        fits = [n for n in range(1, 9) if per_warp % n == 0 and made.workers % n == 0]
        return dataclasses.replace(made, finish_warps=fits[-1])

    @property
    def workers(self) -> int:
        """Who send letters."""
        return self.hidden // (4 * self.width * self.warps)


@dataclasses.dataclass(frozen=True)
class Output:
    """How the last sublayer's output arrives: as the sum of 1 or 2 parts, rounded to bfloat16."""

    kind: str = "bfloat16"  # or float32
    parts: int = 1

    @property
    def names(self) -> list[str]:
        """Of the parts, as arguments."""
        return ["u", "u1"][: self.parts]


PLAIN = Output()


def mixes(place: str) -> int:
    """Rows of fn: pre, and but for the last place post and comb."""
    return STREAMS if place == "last" else (2 + STREAMS) * STREAMS


def mhc(shape: Shape, place: str, u: Output = PLAIN, pdl: bool = True) -> Kernel:
    """The kernel at a place: "first", "middle" or "last".

    Arguments: the sources: ids int32 `[T]` and embed bfloat16 `[V, D]`, or streams bfloat16
    `[T, 4, D]`, post float32 `[T, 4]`, comb `[T, 4, 4]` and the parts of u, `[T, D]`; fn float32
    `[24, 4 D]` (last: `[4, 4 D]`), base, scale, norm; new_streams, x, new_post, new_comb; letters,
    zero before and after. An id out of the vocabulary reads its nearest row.
    """
    rows = mixes(place)
    wide, half, hidden = torch.float32, torch.bfloat16, shape.hidden
    streams, mixing = ("rows", STREAMS, hidden), ("rows", STREAMS, STREAMS)
    sources: tuple[Argument, ...] = (
        Argument("streams", half, streams),
        Argument("post", wide, ("rows", STREAMS)),
        Argument("comb", wide, mixing),
        *(Argument(name, getattr(torch, u.kind), ("rows", hidden)) for name in u.names),
    )
    if place == "first":
        ids = Argument("ids", torch.int32, ("rows",), align=4)
        sources = (ids, Argument("embed", half, ("vocab", hidden)))
    outputs = [
        Argument("new_streams", half, streams, "out"),
        Argument("x", half, ("rows", hidden), "out"),
    ]
    if place != "last":
        outputs.append(Argument("new_post", wide, ("rows", STREAMS), "out"))
        outputs.append(Argument("new_comb", wide, mixing, "out"))
    return kernel(
        "mhc",
        IMPLEMENTATION,
        {
            "place": place,
            **dataclasses.asdict(shape),
            "u_type": u.kind,
            "u_parts": u.parts,
            "pdl": pdl,
        },
        (
            sources,
            (
                Argument("fn", wide, (rows, STREAMS * hidden)),
                Argument("base", wide, (rows,)),
                Argument("scale", wide, (1 if place == "last" else 3,), align=4),
                Argument("norm", wide, (hidden,)),
            ),
            tuple(outputs),
            Argument("letters", wide, ("rows", shape.workers, LETTER), "inout"),
        ),
    )


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """Every place, for each number of rows."""
    for place in PLACES:
        for count in rows:
            yield case(Shape.of(config), place, model, count)


def checks(config: ModelConfig, model: str) -> Iterator[Case]:
    """Every number of rows, prefill, streams of extreme size, all kinds of output parts."""
    shape = Shape.of(config)
    for count in (3, 5, 6, 7, 9, 200):
        yield case(shape, "middle", model, count)
    for name, size in SIZES.items():
        for place in PLACES:
            yield case(shape, place, model, 3, name, size)
    for u in (Output("bfloat16", 2), Output("float32", 1), Output("float32", 2)):
        yield case(shape, "middle", model, 4, u=u)
    yield case(shape, "last", model, 4, u=Output("float32", 2))


def case(
    shape: Shape,
    place: str,
    model: str,
    rows: int,
    name: str = "",
    size: float = 1.0,
    u: Output = PLAIN,
) -> Case:
    """`rows` tokens at `place`. size: of streams and sublayer outputs."""
    hidden, mixed = shape.hidden, mixes(place)
    made = mhc(shape, place, u)

    def make(rng: torch.Generator) -> Buffers:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, device=rng.device)

        def plain(*shape: int) -> Tensor:
            return (normal(*shape) * size).to(torch.bfloat16)

        buffers: Buffers = {
            "fn": normal(mixed, STREAMS * hidden) * (STREAMS * hidden) ** -0.5,
            "base": normal(mixed),
            "scale": 1 + normal(1 if place == "last" else 3) / 4,
            "norm": 1 + normal(hidden) / 4,
        }
        if place == "first":
            ids = torch.randint(-1, _VOCAB + 1, (rows,), generator=rng, device=rng.device)
            buffers |= {"ids": ids.to(torch.int32), "embed": plain(_VOCAB, hidden)}
        else:
            comb = sinkhorn(normal(rows, STREAMS, STREAMS), shape.iterations, shape.hc_eps)
            buffers |= {"streams": plain(rows, STREAMS, hidden), "comb": comb}
            buffers["post"] = 2 * normal(rows, STREAMS).sigmoid()
            for one in u.names:
                buffers[one] = (normal(rows, hidden) * size).to(getattr(torch, u.kind))
        for argument in made.leaves():
            if argument.role != "in":
                assert isinstance(argument.dtype, torch.dtype)
                sizes = tuple(rows if n == "rows" else int(n) for n in argument.shape)
                buffers[argument.name] = torch.zeros(sizes, dtype=argument.dtype, device=rng.device)
        return buffers

    per_token = hidden * 2 * (STREAMS + 2)
    if place != "first":
        per_token += hidden * (2 * STREAMS + (4 if u.kind == "float32" else 2) * u.parts - 2)
    return Case(
        "mhc",
        " ".join(filter(None, (place, name, "" if u == PLAIN else f"{u.parts} x {u.kind}"))),
        model,
        rows,
        (Launch(made),),
        mixed * STREAMS * hidden * 4 + 4 * hidden + rows * per_token,
        make,
        lambda buffers: expect(shape, place, buffers),
        cold=("fn", "norm"),
        note="one launch",
    )


def expect(shape: Shape, place: str, buffers: Buffers) -> dict[str, Expected]:
    """Exact values after the roundings that the contract has, and how far float32 may lead.

    A stream is a chain of five products, so within 5 units of 2^-24 of their magnitude before it is
    rounded. The mix is exact products in chains of `width` MMAs, each of which drops at most six
    units of 2^-23 of the largest number it meets; three pieces of fn and the warps are added, then
    the workers' sums, in order. See `_sigmoid`, `_balanced`.
    """
    streams, spread = _streams(place, buffers)
    flat, loose = streams.flatten(1), spread.flatten(1)
    fn = buffers["fn"].to(torch.float64)
    parts = torch.einsum(
        "tjwc,rjwc->trw",
        torch.unflatten(streams, 2, (shape.workers, -1)),
        torch.unflatten(fn, 1, (STREAMS, shape.workers, -1)),
    )
    sums = parts.sum(-1)
    inside = 2 * 6 * shape.width + 3 + shape.warps
    off = loose @ fn.abs().T + inside * 2.0**-24 * (flat.abs() + loose) @ fn.abs().T
    off = off + (shape.workers + 1) * 2.0**-24 * parts.abs().sum(-1)
    adds = 5 * shape.width + shape.warps + shape.workers
    inverse, slack = _inverse_root(flat, loose, shape.norm_eps, adds)
    mix = sums * inverse
    error = off * inverse + mix.abs() * (slack + 2.0**-23)
    kinds = torch.arange(mix.shape[1], device=mix.device) // STREAMS
    scale = buffers["scale"].to(torch.float64)[kinds.clamp(max=2)]
    base = buffers["base"].to(torch.float64)
    value = mix * scale + base
    error = error * scale.abs() + 2.0**-23 * ((mix * scale).abs() + value.abs())
    pre, pre_error = _sigmoid(value[:, :STREAMS], error[:, :STREAMS])
    weighted = pre[:, :, None] + shape.hc_eps
    y = (weighted * streams).sum(1)
    y_error = ((pre_error[:, :, None] + 2.0**-22 * weighted) * streams.abs()).sum(1)
    y, y_loose = rounded_range(y, y_error + (weighted * spread).sum(1))
    inverse, slack = _inverse_root(y, y_loose, shape.norm_eps, shape.hidden // 128 + 16)
    norm = buffers["norm"].to(torch.float64)
    x = norm * y * inverse
    x_error = norm.abs() * y_loose * inverse + x.abs() * (slack + 3 * 2.0**-24)
    found = {
        "new_streams": Expected(streams, spread),
        "x": Expected(x, x_error + 2.0**-8 * (x.abs() + x_error) + 2.0**-133),
        "letters": Expected(torch.zeros_like(buffers["letters"])),
    }
    if place != "last":
        post, post_error = _sigmoid(
            value[:, STREAMS : 2 * STREAMS], error[:, STREAMS : 2 * STREAMS]
        )
        found["new_post"] = Expected(2 * post, 2 * post_error)
        found["new_comb"] = _balanced(shape, value[:, 2 * STREAMS :], error[:, 2 * STREAMS :])
    return found


def _streams(place: str, buffers: Buffers) -> tuple[Tensor, Tensor]:
    """-> (X' as rounded from the exact value, how far another rounding may be), float64."""
    if place == "first":
        ids = buffers["ids"].to(torch.int64).clamp(0, buffers["embed"].shape[0] - 1)
        rows = buffers["embed"][ids].to(torch.float64)
        streams = rows[:, None].expand(-1, STREAMS, -1)
        return streams, torch.zeros_like(streams)
    old, post, comb = (buffers[n].to(torch.float64) for n in ("streams", "post", "comb"))
    u = buffers["u"] + buffers["u1"].to(torch.float32) if "u1" in buffers else buffers["u"]
    u = u.to(torch.bfloat16).to(torch.float64)
    value = post[..., None] * u[:, None] + comb.mT @ old
    size = (post[..., None] * u[:, None]).abs() + comb.abs().mT @ old.abs()
    return rounded_range(value, 5 * 2.0**-24 * size)


def _inverse_root(x: Tensor, loose: Tensor, eps: float, adds: int) -> tuple[Tensor, Tensor]:
    """`rsqrt(mean(x²) + eps)`, `[T, 1]`, and its relative uncertainty.

    A sum of squares passes through `adds` roundings; the root is good to 2^-22.
    """
    mean = x.square().mean(-1, keepdim=True) + eps
    moved = (2 * x.abs() * loose + loose.square()).mean(-1, keepdim=True) / mean
    return mean.rsqrt(), moved + (adds + 4) * 2.0**-24 + 2.0**-22


def _sigmoid(value: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """The sigmoid's slope is at most 1/4; its own error is `2^-20 + 2^-23 |x|` of itself."""
    result = value.sigmoid()
    return result, error / 4 + result * (2.0**-20 + 2.0**-23 * value.abs()) + 2.0**-24


def _balanced(shape: Shape, value: Tensor, error: Tensor) -> Expected:
    """The iteration's own derivatives carry the uncertainty of its exponents, and a tenth more.

    An exponential is off by `2^-21 + 2^-23 |x|` besides; each of the 2 · iterations normalisations
    adds a few units, of which those that follow make no more.
    """
    rows, raw = (torch.unflatten(one, -1, (STREAMS, STREAMS)) for one in (value, error))
    below = rows - rows.amax(-1, keepdim=True)
    raw = raw + 2.0**-21 + 2.0**-22 * below.abs()

    def balance(one: Tensor) -> Tensor:
        comb = one.softmax(-1) + shape.hc_eps
        comb = comb / (comb.sum(-2, keepdim=True) + shape.hc_eps)
        for _ in range(shape.iterations - 1):
            comb = comb / (comb.sum(-1, keepdim=True) + shape.hc_eps)
            comb = comb / (comb.sum(-2, keepdim=True) + shape.hc_eps)
        return comb

    slopes = torch.func.vmap(torch.func.jacrev(balance))(rows)  # [T, 4, 4, 4, 4]
    moved = (slopes.abs() * raw[:, None, None]).sum((-1, -2))
    comb = sinkhorn(rows, shape.iterations, shape.hc_eps).to(torch.float64)
    return Expected(comb, 1.1 * moved + comb * (2 * shape.iterations + 2) * 2.0**-21)
