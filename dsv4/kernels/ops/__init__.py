"""The operations, a folder each: contract, reference on the same buffers, kernels side by side.

A contract (`names.CONTRACTS` lists them) has `cases(config, model, rows)`, which are timed, and may
have `checks(config, model)`: inputs that real use seldom meets, checked only.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from types import ModuleType

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core.contract import Case
from dsv4.kernels.names import CONTRACTS, OPERATIONS, PREFILL, STEP_ROWS


def cases(
    config: ModelConfig, model: str, rows: Sequence[int], operations: Sequence[str] = OPERATIONS
) -> Iterator[Case]:
    """The cases of `operations` on the shapes of `config`, for each number of rows that is theirs:
    up to 8 those of a step, above those of a chunk of a prompt.
    """
    for name in operations:
        module = _contract(name)
        own = [count for count in rows if (count > STEP_ROWS) == (name in PREFILL)]
        yield from module.cases(config, model, own)


def checks(
    config: ModelConfig, model: str, operations: Sequence[str] = OPERATIONS
) -> Iterator[Case]:
    """The adversarial cases of `operations`, on shapes of `config`."""
    for name in operations:
        module = _contract(name)
        yield from module.checks(config, model) if hasattr(module, "checks") else ()


def _contract(operation: str) -> ModuleType:
    return importlib.import_module(f"dsv4.kernels.ops.{CONTRACTS[operation]}")
