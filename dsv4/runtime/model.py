"""DeepSeek-V4, top to bottom.

    token ids
      embed              [T, D]         copied into `hc_mult` residual streams [T, m, D]
      layers             each: attention, then mixture of experts, both inside hyper-connections
      collapse, norm     [T, D]
      head               [T, vocab]     float32 logits

A `Model` is immutable: weights, still packed, and the arithmetic to follow. Everything a sequence
changes lives in its `Session`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dsv4.formats.errors import DraftRefusal, Dsv4Error, RuntimeRefusal
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import DraftKind
from dsv4.kernels.reference.numerics import Numerics
from dsv4.runtime.cache import LayerCache, WindowCache
from dsv4.runtime.draft import Drafter, check_drafter
from dsv4.runtime.dspark import DSpark
from dsv4.runtime.layer import Head, Layer, embedded
from dsv4.runtime.mtp import Mtp
from dsv4.runtime.positions import Step
from dsv4.runtime.session import Session
from dsv4.runtime.weights import WeightReader, Weights

DEVICES = ("cpu", "cuda")


class Model:
    """The loaded model. Use `load` to make one and `session` to run it.

    drafter: its draft layers, where they are loaded. notices: what was left out, for people.
    """

    notices: tuple[str, ...] = ()

    def __init__(
        self,
        read: WeightReader,
        dtype: torch.dtype,
        numerics: Numerics,
    ) -> None:
        c = read.weights.config
        self.config: ModelConfig = c
        self.device = read.device
        self.dtype = dtype
        self.numerics = numerics
        self.embed = read.table("embed.weight", c.vocab_size, c.hidden_size)
        self.layers = tuple(Layer(read, n, numerics) for n in range(c.num_hidden_layers))
        self.head = Head(read)
        self.drafter: Drafter | None = None

    def __repr__(self) -> str:
        c = self.config
        parts = f"{c.num_hidden_layers} layers" + (", draft layers" if self.drafter else "")
        return (
            f"<Model of {parts}, {c.n_routed_experts} experts a layer, on "
            f"{self.device}, {self.dtype}, numerics {self.numerics}>"
        )

    def load_lines(self) -> Iterator[str]:
        """Nothing: weights stay in their mapped files and are read as they are used."""
        yield from ()

    def write_routes(self, path: Path | None = None) -> None:
        """Nothing: experts are not counted here."""

    def session(self, max_seq_len: int | None = None) -> Session:
        """An empty sequence with room for `max_seq_len` tokens."""
        return Session(self, max_seq_len)

    def forward(
        self,
        step: Step,
        caches: tuple[LayerCache, ...],
        context: tuple[WindowCache, ...] = (),
    ) -> Tensor:
        """Run one step through all layers: the last layer's streams `[T, m, D]`.

        context: what the drafter keeps of the sequence; nothing without one.
        """
        tapped: list[Tensor] = []
        streams = embedded(self.embed, step.ids, self.dtype, self.config.hc_mult)
        for number, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            streams = layer(streams, step, cache)
            if self.drafter is not None and number in self.drafter.tapped:
                tapped.append(streams)
        if self.drafter is not None:
            self.drafter.observe(tapped, step, context)
        return streams


def load(
    weights: Weights,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    numerics: Numerics = Numerics.EXACT,
    draft: DraftKind = DraftKind.NONE,
) -> Model:
    """Check `weights` against their config and make them a `Model`.

    dtype: float32 or bfloat16, of activations and caches; what DeepSeek-V4 computes in FP32 stays
    FP32 in both. draft: which draft layers of `weights` are loaded as well; they draft once, so
    that those which cannot are refused. Raises RuntimeRefusal naming the tensor that does not fit,
    or the device, and DraftRefusal where the fault is the draft layers'.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise RuntimeRefusal(f"dtype is {dtype}, expected torch.float32 or torch.bfloat16")
    target = device_named(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise no_gpu()
    read = WeightReader(weights, target)
    model = Model(read, dtype, numerics_named(numerics))
    if draft is not DraftKind.NONE:
        model.drafter = _drafter(model, read, draft)
    return model


def _drafter(model: Model, read: WeightReader, kind: DraftKind) -> Drafter:
    made = Mtp if kind is DraftKind.MTP else DSpark
    try:
        drafter = made(read, model.embed, model.head.weight, model.dtype, model.numerics)
        check_drafter(drafter, model.config, model.embed, model.dtype)
    except Dsv4Error as error:
        raise DraftRefusal(
            f"the draft layers cannot be used: {error}; load the model without them "
            "(--draft off, in Python drafts=False), which gives the same text"
        ) from None
    return drafter


def device_named(name: str | torch.device) -> torch.device:
    """A device that models run on. Raises RuntimeRefusal for a name that is not one."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type not in DEVICES:
        raise RuntimeRefusal(f"device is {name!r}, expected one of {', '.join(DEVICES)}")
    return device


def numerics_named(name: str) -> Numerics:
    """One of `Numerics` by its name. Raises RuntimeRefusal for a name that is not one."""
    if name not in list(Numerics):
        raise RuntimeRefusal(f"numerics is {name!r}, expected one of {', '.join(Numerics)}")
    return Numerics(name)


def no_gpu() -> RuntimeRefusal:
    """What is said where a GPU was asked for and torch has none."""
    why = "" if torch.version.cuda else f": this torch ({torch.__version__}) is built without CUDA"
    return RuntimeRefusal(
        f"device 'cuda' was asked for, but torch sees no CUDA device here{why}; "
        "device 'cpu' runs on the CPU"
    )
