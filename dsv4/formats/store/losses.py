"""Which tensors of a store do not equal their source, as it was counted when they were made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dsv4.formats.errors import StoreError
from dsv4.formats.store.matrix_views import Nodes
from dsv4.formats.store.nodes import EXPERT
from dsv4.formats.store.specs import ATTRIBUTE


def inexact_tensors(store: Nodes) -> Iterator[tuple[str, float]]:
    """(hub name, relative MSE) of each. Of a stack that names none of its experts, all of them, by
    the worst. Raises StoreError for a loss that is not a number.
    """
    contents = store.contents
    for name, path in contents.plain.items():
        own = store.hierarchy.arrays[path].attributes[ATTRIBUTE]
        if not own["exact"]:
            yield name, _rel_mse(store, name, own)
    for name, group in contents.matrices.items():
        if not group.attributes["exact"]:
            yield name, _rel_mse(store, name, group.attributes)
    for stack in contents.stacks.values():
        if stack.attributes["exact"]:
            continue
        if isinstance(named := stack.attributes.get("inexact"), dict) and named:
            for name, loss in named.items():
                yield name, _rel_mse(store, name, loss)
        else:
            worst = _rel_mse(store, stack.names[0], stack.attributes)
            for template in stack.names:
                for expert in range(stack.experts or 0):
                    yield template.replace(EXPERT, str(expert)), worst


def _rel_mse(store: Nodes, name: str, own: Mapping[str, Any]) -> float:
    loss = own.get("loss")
    found = loss.get("rel_mse") if isinstance(loss, dict) else own.get("rel_mse")
    if not isinstance(found, int | float):
        raise StoreError(f"{store.root}: {name} has no loss, though it is not exact")
    return float(found)
