"""A launch that is given a tensor of another kind is refused where it is put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.formats.model.releases import FLASH
from dsv4.kernels.core.signature import Argument, Kernel, kernel
from dsv4.runtime.gpu.operands import Model, parts
from dsv4.runtime.gpu.program import arguments
from dsv4.runtime.gpu.rehearsal import chunk_kernels, step_kernels
from dsv4.runtime.gpu.standard import standard_model

MODEL = dataclasses.replace(standard_model(FLASH), layers=standard_model(FLASH).layers[2:4])
"""A CSA layer and an HCA layer."""


def swapped(group: Any, first: str, second: str) -> Any:
    """With two attributes of a dataclass exchanged."""
    return dataclasses.replace(
        group, **{first: getattr(group, second), second: getattr(group, first)}
    )


def with_layer(change: Callable[[Any], Any]) -> Model:
    return dataclasses.replace(MODEL, layers=(change(MODEL.layers[0]), *MODEL.layers[1:]))


def in_attention(change: Callable[[Any], Any]) -> Model:
    return with_layer(lambda layer: dataclasses.replace(layer, attention=change(layer.attention)))


def in_experts(change: Callable[[Any], Any]) -> Model:
    return with_layer(lambda layer: dataclasses.replace(layer, experts=change(layer.experts)))


PLANTED: dict[str, tuple[Model, str]] = {
    "the norms of q and kv": (
        in_attention(lambda own: swapped(own, "q_norm", "kv_norm")),
        r"q_norm is torch.float32 \[512\], expected torch.float32 \[1024\]",
    ),
    "wo_a and wo_b": (in_attention(lambda own: swapped(own, "wo_a", "wo_b")), "is invalid for|y"),
    "the compressor and the indexer's": (
        in_attention(lambda own: dataclasses.replace(own, compressor=own.indexer.compressor)),
        "y2 is",
    ),
    "the global scales": (
        in_experts(
            lambda own: dataclasses.replace(
                own, routed=swapped(own.routed, "global_scale13", "global_scale2")
            )
        ),
        "global_scale13 is",
    ),
    "base and scale": (
        with_layer(
            lambda layer: dataclasses.replace(
                layer, before_experts=swapped(layer.before_experts, "base", "scale")
            )
        ),
        r"base is torch.float32 \[3\], expected torch.float32 \[24\]",
    ),
    "the connection of the head": (
        with_layer(lambda layer: dataclasses.replace(layer, before_experts=MODEL.before_head)),
        "fn is",
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_weight_of_another_kind_is_refused(what: str) -> None:
    model, message = PLANTED[what]
    for kernels, rows in ((step_kernels, 4), (chunk_kernels, 40)):
        kernels(MODEL, rows, 1 << 17)
        with pytest.raises(
            (TypeError, RuntimeError), match=message if rows == 4 else "expected|is invalid for"
        ):
            kernels(model, rows, 1 << 17)


SIZED: Kernel = kernel(
    "none",
    "none:None",
    {},
    (
        Argument("q", torch.bfloat16, ("rows", 4, 8)),
        (
            Argument("post", torch.float32, ("rows", 4)),
            Argument("codes", torch.uint8, ("slots", "ring", 16)),
        ),
        Argument("scales", torch.uint8, ("slots", "ring", 2), "inout"),
        Argument("ctas", int),
    ),
)


def right() -> dict[str, Any]:
    return {
        "q": torch.zeros(3, 4, 8, dtype=torch.bfloat16),
        "post": torch.zeros(3, 4),
        "codes": torch.zeros(1, 7, 16, dtype=torch.uint8),
        "scales": torch.zeros(1, 7, 2, dtype=torch.uint8),
        "ctas": 132,
    }


def test_arguments_come_in_the_kernels_order() -> None:
    given = right()
    q, (post, codes), scales, ctas = arguments(SIZED, dict(reversed(given.items())))
    found = {"q": q, "post": post, "codes": codes, "scales": scales, "ctas": ctas}
    assert all(found[name] is given[name] for name in given)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "post",
            torch.zeros(3, 4, 4),
            r"post is torch.float32 \[3, 4, 4\], expected .*\[rows = 3, 4\]",
        ),
        ("post", torch.zeros(2, 4), r"expected torch.float32 \[rows = 3, 4\]"),
        ("q", torch.zeros(3, 4, 8), "q is torch.float32"),
        (
            "q",
            torch.zeros(3, 8, 4, dtype=torch.bfloat16),
            r"expected torch.bfloat16 \[rows = 3, 4, 8\]",
        ),
        ("scales", torch.zeros(1, 6, 2, dtype=torch.uint8), r"\[slots = 1, ring = 7, 2\]"),
        ("scales", torch.zeros(1, 2, 7, dtype=torch.uint8).mT, "strides"),
        ("codes", torch.zeros(1 + 7 * 16, dtype=torch.uint8)[1:].view(1, 7, 16), "multiple of 16"),
        ("codes", 5, "codes is 5, expected a tensor"),
        ("post", None, "is not given its argument post"),
        ("comb", torch.zeros(3, 4, 4), "does not have the argument comb"),
    ],
)
def test_a_wrong_argument_is_refused(name: str, value: Tensor | int | None, message: str) -> None:
    arguments(SIZED, right())
    with pytest.raises(TypeError, match=message):
        arguments(SIZED, right() | {name: value})


def test_a_view_of_a_longer_buffer_will_do() -> None:
    arguments(SIZED, right() | {"post": torch.zeros(8, 4)[:3]})


def test_no_tensor_of_a_model_is_in_two_places() -> None:
    tensors = list(parts(MODEL, Tensor))
    assert len({id(one) for one in tensors}) == len(tensors)
