"""The packed store: a Zarr v3 directory that is also a set of raw, aligned, checked byte ranges.

Reading (`schema`, `reader`) needs no Zarr library. Writing is `dsv4.formats.store.writer`.
"""

from dsv4.formats.store.damage import Damage
from dsv4.formats.store.integrity import check_root, damage
from dsv4.formats.store.mapped_files import StoredArray
from dsv4.formats.store.matrix_views import ExpertStack
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import ArraySpec, FileSpec, asset_key, group_of, path_of

__all__ = [
    "ArraySpec",
    "Damage",
    "ExpertStack",
    "FileSpec",
    "PackedStore",
    "StoredArray",
    "asset_key",
    "check_root",
    "damage",
    "group_of",
    "path_of",
]
