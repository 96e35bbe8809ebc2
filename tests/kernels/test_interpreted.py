"""Blackwell kernels, run: host code and PTX by an interpreter, against the reference.

On few CTAs, so that each has several tiles: rings wrap, accumulators alternate.
"""

from __future__ import annotations

import pytest

from dsv4.kernels.ops.fp4_blackwell import gemm_contract, grouped_contract, quantize_contract
from dsv4.kernels.ops.fp4_blackwell.gemm_contract import Product
from dsv4.kernels.ops.fp4_blackwell.grouped_contract import Experts
from dsv4.kernels.ops.fp4_blackwell.quantize_contract import Form
from tests.support.interpreter.alterations import WAIT, instead, without
from tests.support.interpreter.run import Alteration, configured, faults

DENSE = {
    "two slabs": (Product(256, 512, 2), 130, 128, 1),
    "bfloat16, a scale a row": (Product(256, 512, 1, "bfloat16", True), 3, 128, 1),
    "steps of 128": (Product(128, 768, 2), 128, 128, 1),
    "steps of 64": (Product(128, 192), 70, 128, 1),
    "256 columns, ragged": (Product(392, 512), 257, 256, 2),
    "ragged columns": (Product(200, 256), 5, 128, 3),
}
GROUPED = {
    "w2": (Experts(Product(256, 512, 2, "bfloat16"), 5), 140, 2),
    "w13, many groups": (Experts(Product(128, 256, 1, "bfloat16"), 70, True, 10.0), 30, 2),
    "w13, a scale a row": (Experts(Product(256, 256, 1, "bfloat16", True), 3, True, 1.0), 300, 1),
}
QUANTIZERS = {
    "plain": (Form(128), 130),
    "per row": (Form(128, per_row=True, signed_zero=True), 37),
    "groups": (Form(576, groups=40), 70),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_products(name: str) -> None:
    product, rows, tile_n, ctas = DENSE[name]
    case = gemm_contract.case(product, name, "none", rows, tile_n)
    assert faults(configured(case, ctas=ctas), "sm_100a") == []


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_products(name: str) -> None:
    experts, rows, ctas = GROUPED[name]
    case = grouped_contract.case(experts, name, "none", rows)
    assert faults(configured(case, ctas=ctas), "sm_100a") == []


# On Hopper they passed on an H100 too: interpreted there in the long run only.
@pytest.mark.parametrize("arch", [pytest.param("sm_90a", marks=pytest.mark.long), "sm_100a"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizer(name: str, arch: str) -> None:
    form, rows = QUANTIZERS[name]
    case = quantize_contract.case(form, name, "none", rows, hard=True)
    assert faults(case, arch) == []


ORDERS = 12  # of events, in which an alteration has to show

# The waits, in the order of the text: copying (empty), multiplying (acc_empty, full), storing.
ALTERATIONS = {
    "copies do not wait for room": without(WAIT, 0),
    "the accumulator is not waited for": without(WAIT, 1),
    "copies are not waited for": without(WAIT, 2),
    "sums are not waited for": without(WAIT, 3),
    "stages are not given back": without(r"tcgen05\.commit[^;]*;", 0),
    "sums are not announced": without(r"tcgen05\.commit[^;]*;", 1),
    "scales of w are not moved": without(r"tcgen05\.cp[^;]*;", 5),
    "one multiplication is missing": without(r"tcgen05\.mma[^;]*;", 3),
    "bytes are announced wrongly": instead(r"mov\.b32 \t(%r\d+), 36864;", r"mov.b32 \1, 36848;"),
    "tensor memory is kept": without(r"tcgen05\.dealloc[^;]*;", 0),
}


def _caught(alter: Alteration, orders: int = ORDERS) -> bool:
    """Whether one of so many orders of events shows it."""
    # More steps than stages and more tiles than accumulators on the one CTA.
    case = configured(gemm_contract.case(Product(512, 768), "altered", "none", 5), ctas=1)
    for seed in range(orders):
        try:
            if faults(case, "sm_100a", seed, alter):
                return True
        except (AssertionError, RuntimeError):
            return True
    return False


@pytest.mark.parametrize("name", ALTERATIONS)
def test_an_altered_kernel_is_caught(name: str) -> None:
    assert _caught(ALTERATIONS[name])


@pytest.mark.parametrize("orders", [3, pytest.param(ORDERS, marks=pytest.mark.long)])
def test_an_unaltered_kernel_is_right_in_any_order(orders: int) -> None:
    assert not _caught(lambda ptx: ptx, orders)
