"""What differs between the architectures that kernels are compiled for, decided here alone.

A kernel that depends on it has `arch` among the arguments of its class. `core.build`, which knows
what it compiles for, passes it; nobody asks the compiler.
"""

from __future__ import annotations

from typing import NamedTuple

from dsv4.kernels.device.warpgroup import mma_sync, wgmma
from dsv4.kernels.device.warpgroup.product import Products


class Architecture(NamedTuple):
    """products: how a warpgroup multiplies. rounds_to_e2m1: there is an instruction that does."""

    products: Products
    rounds_to_e2m1: bool


HOPPER = Architecture(wgmma, rounds_to_e2m1=False)
BLACKWELL = Architecture(mma_sync, rounds_to_e2m1=True)  # its data-centre chips have no `wgmma`

_KNOWN = {"sm_90a": HOPPER, "sm_100a": BLACKWELL}


def architecture(name: str) -> Architecture:
    """Of a name such as `sm_90a`. Raises ValueError when no kernel is made for it."""
    if name not in _KNOWN:
        raise ValueError(f"kernels are made for {', '.join(_KNOWN)}, not for {name}")
    return _KNOWN[name]
