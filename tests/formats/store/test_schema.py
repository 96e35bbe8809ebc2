"""Names never become dangerous paths, and impossible arrays are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4.formats.errors import SourceError, StoreError
from dsv4.formats.numeric.layouts import LAYOUTS
from dsv4.formats.store.specs import KNOWN_LAYOUTS, ArraySpec, asset_key, group_of, path_of


def test_the_layouts_of_the_store_are_the_registered_ones() -> None:
    assert set(LAYOUTS) == KNOWN_LAYOUTS


def test_paths_are_the_hubs_names() -> None:
    assert path_of("layers.2.attn.compressor.ape") == "layers/2/attn/compressor/ape"
    assert group_of("layers.2.attn.wq_b.weight") == "layers/2/attn/wq_b"
    assert group_of("head.weight") == "head"


HOSTILE_NAMES = [
    "",
    ".",
    "..",
    "a..b",
    ".a",
    "a.",
    "../../etc/passwd",
    "a/b",
    "/etc/passwd",
    "a\\b",
    "a\0b",
    "a\n",
    "a.b\n",
    "a b",
    "a-b",
    "ä",
    "l\u0131nux",
    "a" * 65,
    ".".join(["a"] * 17),
    ".".join(["a" * 60] * 9),
    "assets.tokenizer",
    "assets",
    "~root",
    "${HOME}",
    "C:",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: ascii(name)[:30])
def test_hostile_tensor_names_are_refused(name: str) -> None:
    with pytest.raises(SourceError, match="refused"):
        path_of(name)
    with pytest.raises(StoreError, match="refused"):
        path_of(name, StoreError)


@pytest.mark.parametrize("name", [None, 7, b"a", ["a"]])
def test_names_that_are_no_text_are_refused(name: Any) -> None:
    for function in (path_of, group_of):
        with pytest.raises(SourceError, match="refused"):
            function(name)


@given(st.text(max_size=40))
def test_an_accepted_name_is_one_harmless_path(name: str) -> None:
    try:
        path = path_of(name)
    except SourceError:
        return
    assert path.replace("/", ".") == name
    assert all(part and part.isascii() and part not in (".", "..") for part in path.split("/"))


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/x", ".hidden", "zarr.json", "x.partial", "a\0", "a" * 200, 3],
)
def test_hostile_asset_names_are_refused(name: Any) -> None:
    with pytest.raises(SourceError, match="asset name"):
        asset_key(name)


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "chat_template.jinja"])
def test_asset_names(name: str) -> None:
    assert asset_key(name) == f"assets/{name}"


BAD_ARRAYS: list[tuple[str, tuple[Any, ...]]] = [
    ("element", ((4,), "float16", (4,), (4,))),
    ("element", ((4,), None, (4,), (4,))),
    ("rank", ((4, 4), "uint8", (4,), (4, 4))),
    ("rank", ((4,), "uint8", (4,), (4, 1))),
    ("rank", ((1,) * 9, "uint8", (1,) * 9, (1,) * 9)),
    ("positive", ((0,), "uint8", (1,), (1,))),
    ("positive", ((-4,), "uint8", (4,), (4,))),
    ("positive", ((4,), "uint8", (0,), (4,))),
    ("integers", ((True,), "uint8", (1,), (1,))),
    ("integers", ((4.0,), "uint8", (4,), (4,))),
    ("integers", (("4",), "uint8", (4,), (4,))),
    ("divide", ((4,), "uint8", (3,), (4,))),
    ("divide", ((4,), "uint8", (1,), (3,))),
    ("divide", ((4,), "uint8", (4,), (2,))),
    ("dimension 0", ((4, 4), "uint8", (4, 2), (4, 2))),
    ("limit", ((1 << 45,), "uint8", (1,), (1,))),
    ("limit", ((1 << 40, 1 << 40), "uint8", (1, 1), (1, 1 << 40))),
    ("limit", ((1 << 42,), "int64", (1 << 42,), (1 << 42,))),
    ("at most", ((1 << 20,), "uint8", (1,), (1,))),
    ("at most", ((1 << 30,), "uint8", (1,), (1 << 30,))),
]


@pytest.mark.parametrize(("why", "arguments"), BAD_ARRAYS)
def test_impossible_arrays_are_refused(why: str, arguments: tuple[Any, ...]) -> None:
    if arguments[0] == (1 << 45,):
        why = "positive"  # refused before anything is multiplied
    with pytest.raises(StoreError, match=why):
        ArraySpec("a", *arguments)


def test_files_of_a_stack() -> None:
    spec = ArraySpec("x/codes", (256, 4096, 2048), "e2m1x2", (1, 512, 2048), (64, 4096, 2048))
    files = spec.files()
    assert [file.key for file in files] == [f"x/codes/c/{i}/0/0" for i in range(4)]
    assert [file.rows for file in files] == [(0, 64), (64, 128), (128, 192), (192, 256)]
    assert {(f.chunks, f.chunk_nbytes) for f in files} == {(512, 1 << 20)}
    assert files[0].nbytes == 512 * (1 << 20) + 512 * 16 + 4


def test_a_single_chunk_is_a_plain_file() -> None:
    (file,) = ArraySpec.whole("x", (3, 5), "float32").files()
    assert (file.key, file.nbytes, file.sharded) == ("x/c/0/0", 60, False)
    (scalar,) = ArraySpec.whole("x", (), "float32").files()
    assert (scalar.key, scalar.nbytes) == ("x/c", 4)


@given(st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=4))
def test_files_cover_the_array_exactly(factors: list[tuple[int, int, int]]) -> None:
    chunk = tuple(c for c, _, _ in factors)
    shape = tuple(c * g * (f if i == 0 else 1) for i, (c, g, f) in enumerate(factors))
    shard = (shape[0] // factors[0][2], *shape[1:])
    spec = ArraySpec("x", shape, "bfloat16", chunk, shard)
    assert sum(file.payload_nbytes for file in spec.files()) == 2 * math.prod(shape)
    assert spec.files()[-1].rows[1] == shape[0]
