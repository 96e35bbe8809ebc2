"""The plan: every file of the output and what it is made from, known from headers alone."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsv4.convert.outputs.base import Output, Unit
from dsv4.convert.outputs.dense import Nvfp4Output
from dsv4.convert.outputs.dequantised import ValuesOutput
from dsv4.convert.outputs.plain import Fp8Output, PlainOutput
from dsv4.convert.outputs.stack import ExpertsOutput
from dsv4.convert.sources.base import Source
from dsv4.convert.sources.few_bytes import check_global_scales
from dsv4.formats.errors import ConfigError
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.recipes import KEEP_GATES, Recipe, Role, role_of
from dsv4.formats.model.source_inventory import Inventory, check_inventory
from dsv4.formats.model.source_tensor import INTEGERS, Encoding, SourceTensor
from dsv4.formats.plain_text import natural_key
from dsv4.formats.store.specs import FileSpec

_EXPERT = re.compile(r"(?P<prefix>.+\.experts)\.(?P<index>\d+)\.(?P<projection>w[123])\.weight")
_VALUES_OR_NVFP4 = (Role.ROUTER_GATE, Role.LM_HEAD)
SHOWN = 3
STACKS = {"w13": ("w1", "w3"), "w2": ("w2",)}


@dataclasses.dataclass(frozen=True)
class Plan:
    """All outputs of a conversion in the order in which they are written, layer by layer."""

    config: ModelConfig
    recipe: Recipe
    outputs: tuple[Output, ...]
    source_files: tuple[str, ...]
    inventory: Inventory
    notices: tuple[str, ...] = ()  # what is left out, ignored or worth knowing: whole sentences

    @functools.cached_property
    def units(self) -> tuple[Unit, ...]:
        """Every unit of work, in order."""
        return tuple(unit for output in self.outputs for unit in output.units())

    def files(self) -> Iterator[FileSpec]:
        """Every array file of the output."""
        for output in self.outputs:
            for array in output.arrays():
                yield from array.files()

    @property
    def output_bytes(self) -> int:
        """Bytes of all array files, shard indices included."""
        return sum(file.nbytes for file in self.files())

    @property
    def source_bytes(self) -> int:
        """Bytes read from the source."""
        return sum(unit.input_bytes for unit in self.units)

    def to_dict(self) -> dict[str, Any]:
        """What `dsv4 plan --json` prints, besides the forecast."""
        tensors = [tensor for unit in self.units for tensor in unit.inputs]
        rounded = [
            tensor.name
            for unit in self.units
            for tensor in unit.inputs
            if unit.output.rounded and unit.output.rounds(tensor)
        ]
        encodings = {
            str(encoding): sum(tensor.encoding is encoding for tensor in tensors)
            for encoding in Encoding
        }
        return {
            "recipe": self.recipe.to_dict(),
            "tensors": len(tensors),
            "encodings": encodings,
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "units": len(self.units),
            "files": sum(1 for _ in self.files()),
            "exact_tensors": len(tensors) - len(rounded),
            "rounded_tensors": rounded,
            "skipped_tensors": len(self.inventory.vision),
            "ignored_input_scales": self.inventory.input_scales,
            "ignored_draft_copies": [tensor.name for tensor, _ in self.inventory.copies],
            "router_gates": self.rounded_gates,
            "notices": list(self.notices),
        }

    @property
    def rounded_gates(self) -> dict[str, Any] | None:
        """What keeping the router gates would buy: `{"rounded", "keep", "more_bytes"}`.

        None where none is rounded.
        """
        gates = [
            output
            for output in self.outputs
            if isinstance(output, Nvfp4Output)
            and output.rounded
            and role_of(output.tensor.name) is Role.ROUTER_GATE
        ]
        if not gates:
            return None
        kept = sum(output.tensor.weight.nbytes for output in gates)
        packed = sum(file.nbytes for o in gates for array in o.arrays() for file in array.files())
        return {"rounded": len(gates), "keep": KEEP_GATES, "more_bytes": kept - packed}


def make_plan(source: Source, recipe: Recipe) -> Plan:
    """Plan the conversion of `source`.

    From headers, and for a source whose files are here from the global scales of NVFP4 too. Raises
    ConfigError, SourceError or FormatError by name.
    """
    config = ModelConfig.from_hf(source.config)
    inventory = check_inventory(source.entries, config)
    files = tuple(sorted({entry.file for entry in source.entries.values()}))
    outputs = [
        *_stacks(inventory.by_name, recipe, files),
        *(
            _single(tensor, recipe, config, values=tensor.name in inventory.values)
            for tensor in inventory.by_name.values()
            if role_of(tensor.name) is not Role.EXPERT
        ),
    ]
    outputs.sort(key=lambda output: natural_key(output.path))
    notices = [*source.notices, *_dequantised(outputs)]
    if source.here:
        notices += check_global_scales(source, inventory.by_name.values())
    return Plan(config, recipe, tuple(outputs), files, inventory, tuple(notices))


def _dequantised(outputs: Sequence[Output]) -> Iterator[str]:
    """A sentence about the matrices that are stored as values in BF16, if there are any."""
    tensors = [output.tensor for output in outputs if isinstance(output, ValuesOutput)]
    if tensors:
        names = ", ".join(tensor.name for tensor in tensors[:SHOWN])
        kinds = " and ".join(sorted({str(tensor.encoding).upper() for tensor in tensors}))
        yield (
            f"{len(tensors)} matrices ({names}{', ...' if len(tensors) > SHOWN else ''}) are "
            f"{kinds} in a form that no kernel takes for them; they are stored as BF16, each value "
            "the nearest one, and the summary names those that lost something"
        )


def _single(tensor: SourceTensor, recipe: Recipe, config: ModelConfig, *, values: bool) -> Output:
    """values: whether its kernel takes it as values."""
    role = role_of(tensor.name)
    if recipe.rounds(tensor.name):
        return Nvfp4Output(tensor)
    if tensor.encoding is Encoding.NVFP4 and (not values or role in _VALUES_OR_NVFP4):
        return Nvfp4Output(tensor)
    if tensor.tiled and not values:
        return Fp8Output(tensor)
    if tensor.encoding is not Encoding.PLAIN:
        return ValuesOutput(tensor)
    table = tensor.weight.dtype in INTEGERS
    return PlainOutput(tensor, config.n_routed_experts if table else None)


def _stacks(
    tensors: Mapping[str, SourceTensor], recipe: Recipe, files: tuple[str, ...]
) -> list[ExpertsOutput]:
    by_prefix: dict[str, dict[tuple[int, str], SourceTensor]] = {}
    for tensor in tensors.values():
        if match := _EXPERT.fullmatch(tensor.name):
            key = (int(match["index"]), match["projection"])
            by_prefix.setdefault(match["prefix"], {})[key] = tensor
    outputs = []
    for prefix, found in by_prefix.items():
        count = max(index for index, _ in found) + 1
        for stack, projections in STACKS.items():
            experts = tuple(
                tuple(found[index, projection] for projection in projections)
                for index in range(count)
            )
            carried = _carried(f"{prefix}.*.{stack}", experts, recipe)
            outputs.append(ExpertsOutput(prefix, stack, experts, files, carried))
    return outputs


def _carried(what: str, experts: Sequence[Sequence[SourceTensor]], recipe: Recipe) -> bool:
    """Whether the recipe leaves a stack as it is. Raises ConfigError when it splits one."""
    decisions = {recipe.rounds(tensor.name) for expert in experts for tensor in expert}
    if len(decisions) > 1:
        raise ConfigError(
            f"--keep matches some experts of {what} and not others; a stack is kept as a whole "
            "or not at all, so match all of them"
        )
    return False in decisions
