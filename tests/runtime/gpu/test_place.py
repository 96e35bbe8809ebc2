"""Where `--device` leads on a machine whose GPU is made up."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv4
from dsv4.formats.errors import KernelError, OutOfSpaceError, RuntimeRefusal
from dsv4.formats.store.reader import PackedStore
from dsv4.runtime import place
from dsv4.runtime.gpu.rehearsal import refuse_sizes
from dsv4.runtime.place import Place, choose_place


@pytest.fixture
def store(standard_store: Path) -> PackedStore:
    return dsv4.open(standard_store).store


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A Hopper without kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setenv("DSV4_KERNELS", str(tmp_path))
    monkeypatch.setattr(place, "refuse_sizes", lambda store: None)
    return monkeypatch


def without_compiler(patch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        return None if name == "cutlass" else found(name, package)

    patch.setattr(importlib.util, "find_spec", find)


def test_auto_is_the_cpu_where_there_is_no_gpu(
    store: PackedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_place("auto", store) == Place("cpu")
    with pytest.raises(RuntimeRefusal, match=r"sees no CUDA device here.*'cpu' runs on the CPU"):
        choose_place("cuda", store)


def test_auto_falls_back_and_names_what_to_build(
    store: PackedStore, gpu: pytest.MonkeyPatch
) -> None:
    chosen = choose_place("auto", store)
    assert chosen.device == "cpu" and chosen.notice is not None
    build = f"`dsv4 kernels build {store.root} --arch sm_90a`"
    assert f"no kernels for sm_90a; {build} makes them" in chosen.notice
    assert "running on the CPU" in chosen.notice
    with pytest.raises(KernelError, match=f"{build} makes them; --device"):
        choose_place("cuda", store)


def test_sizes_that_no_kernel_takes_are_not_a_kernel_to_build(
    store: PackedStore, gpu: pytest.MonkeyPatch
) -> None:
    gpu.setattr(place, "refuse_sizes", refuse_sizes)
    sentence = "no GPU runs packed: hidden_size is 256, the GPU's kernels take multiples of 1024"
    chosen = choose_place("auto", store)
    assert chosen.device == "cpu" and sentence in str(chosen.notice)
    assert "kernels build" not in str(chosen.notice)
    with pytest.raises(RuntimeRefusal, match=rf"{sentence}.*; --device cpu needs no kernel"):
        choose_place("cuda", store)


def test_both_commands_are_named_in_order_where_the_compiler_is_missing(
    store: PackedStore, gpu: pytest.MonkeyPatch
) -> None:
    without_compiler(gpu)
    build = f"dsv4 kernels build {store.root} --arch sm_90a` makes them"
    both = rf"`pip install 'dsv4\[kernels\]' && {build}"
    with pytest.raises(KernelError, match=both):
        choose_place("cuda", store)


def test_auto_falls_back_on_a_gpu_that_no_kernel_is_made_for(
    store: PackedStore, gpu: pytest.MonkeyPatch
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    chosen = choose_place("auto", store)
    assert chosen.device == "cpu" and "Some GPU has compute capability 8.9" in str(chosen.notice)
    with pytest.raises(KernelError, match=r"8\.9, kernels exist for 9\.0, 10\.0; --device cpu"):
        choose_place("cuda", store)
    assert choose_place("cpu", store) == Place("cpu")


def test_a_model_too_large_for_the_cpu_is_refused_with_the_way_out(
    store: PackedStore, gpu: pytest.MonkeyPatch
) -> None:
    gpu.setattr(place, "free_memory", lambda device: (1 << 20, "this machine"))
    with pytest.raises(OutOfSpaceError, match=r"kernels build.*needs 0\.0 GB, this machine has"):
        choose_place("auto", store)
    assert choose_place("cpu", store) == Place("cpu")


def test_auto_is_the_gpu_where_its_kernels_are_found(
    store: PackedStore, gpu: pytest.MonkeyPatch
) -> None:
    gpu.setattr(place, "Library", lambda location, arch, store: (location, arch))
    gpu.setattr(place, "require_kernels", lambda config, library: None)
    assert choose_place("auto", store) == choose_place("cuda", store) == Place("cuda")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"device": "gpu"}, "device is 'gpu', expected one of cpu, cuda"),
        ({"device": "mps"}, "device is 'mps', expected one of cpu, cuda"),
        ({"numerics": "foo"}, "numerics is 'foo', expected one of exact, caches, official"),
    ],
)
def test_wrong_words_are_refused_in_python(
    standard_store: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RuntimeRefusal, match=sentence):
        dsv4.load(standard_store, **options)


def test_a_list_of_ids_is_refused_and_objects_say_what_they_are(standard_store: Path) -> None:
    packed = dsv4.open(standard_store)
    model = dsv4.load(packed)
    ids: Any = [1, 2, 3]
    with pytest.raises(RuntimeRefusal, match=r"ids are a list, expected an int64 tensor \[T\]"):
        model.session(8).forward(ids)
    root = packed.store.manifest["root"]
    shown = repr(packed)
    assert str(standard_store) in shown and "recipe standard" in shown and root[:12] in shown
    assert "layers" in repr(model) and "cpu" in repr(model) and "float32" in repr(model)
