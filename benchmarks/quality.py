"""`python -m benchmarks quality`: what a recipe costs a trained checkpoint, on text new to it.

The text runs in windows of 512 tokens, each a sequence of its own, of which the first 64 tokens
are context and not scored. The checkpoint itself, dequantised into memory, comes first; every
variant is compared with it, token by token, on the same windows. Activations are float32 and never
quantised, so that a difference is the weights'.

Standard errors are taken over windows, because the tokens of one window are not independent.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.source_weights import SourceWeights
from dsv4.convert.engine import convert
from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.recipes import make_recipe
from dsv4.formats.threads import one_torch_thread
from dsv4.runtime.model import Model, load
from dsv4.runtime.moe import ScoreRouter
from dsv4.runtime.text.tokenizer import Text
from dsv4.runtime.weights import Weights

WINDOW = 512
CONTEXT = 64
SCORED = WINDOW - CONTEXT
TOKENS = 8192
HELD_OUT = "heldout.txt"
NATIVE = "native"
NATIVE_TOLERANCE = 1e-4  # of perplexity

MakeWeights = Callable[[Path, Path], Weights]
"""(checkpoint, an empty place for a store) -> weights."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A mean over the scored tokens and its standard error over windows; None of one window."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, windows: Sequence[float]) -> Measured:
        """From one mean per window."""
        several = len(windows) > 1
        error = statistics.stdev(windows) / len(windows) ** 0.5 if several else None
        return cls(statistics.fmean(windows), error)


@dataclasses.dataclass(frozen=True)
class Line:
    """One variant: `loss` in nats a token, everything else against the source.

    excess: loss over the source's, token by token. kl: KL(source || variant), nats a token.
    top1: share of tokens with the same likeliest next token. routing: share of (token, scoring
    layer) that go to the same set of experts.
    """

    variant: str
    perplexity: Measured
    loss: Measured
    excess: Measured
    kl: Measured
    top1: Measured
    routing: Measured


@dataclasses.dataclass(frozen=True)
class Quality:
    """The source first, then every variant."""

    windows: int
    scored: int
    lines: tuple[Line, ...]

    @property
    def native_holds(self) -> bool:
        """Whether `native` has the source's perplexity to 1e-4; True if it was not measured."""
        source = self.lines[0].perplexity.mean
        return all(
            abs(line.perplexity.mean - source) <= NATIVE_TOLERANCE
            for line in self.lines
            if line.variant == NATIVE
        )


@dataclasses.dataclass(frozen=True)
class _Window:
    """What a model says of one window: log-probabilities `[S, V]`, experts `[S, layers, k]`."""

    log_probs: Tensor
    experts: Tensor


class RecordingRouter(ScoreRouter):
    """Chooses as `inner` does and remembers what it chose."""

    def __init__(self, inner: ScoreRouter) -> None:
        self.inner = inner
        self.chosen = torch.empty(0, 0)

    def __call__(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As `ScoreRouter`."""
        self.chosen, weights = self.inner(x, ids)
        return self.chosen, weights


def packed(recipe: str, keep: Sequence[str] = ()) -> MakeWeights:
    """A store of `recipe`, made by the converter and read back from its bytes."""

    def make(directory: Path, place: Path) -> Weights:
        convert(directory, place, recipe=recipe, keep=keep)
        return PackedCheckpoint.open(place).store

    return make


def amax_rounded(recipe: str) -> MakeWeights:
    """What `recipe` rounds, rounded by the plain amax rule."""
    return lambda directory, _: SourceWeights.read_amax_rounded(directory, make_recipe(recipe))


VARIANTS: dict[str, MakeWeights] = {
    NATIVE: packed("native"),
    "standard": packed("standard"),
    "standard, gates kept": packed("standard", ("*.gate.weight",)),
    "standard, lm_head kept": packed("standard", ("head.weight",)),
    "standard, amax rounding": amax_rounded("standard"),
    "nvfp4": packed("nvfp4"),
    "nvfp4, gates kept": packed("nvfp4", ("*.gate.weight",)),
    "nvfp4, amax rounding": amax_rounded("nvfp4"),
}


def quality(
    directory: str | Path,
    text_file: str | Path | None = None,
    tokens: int = TOKENS,
    variants: dict[str, MakeWeights] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Quality:
    """Measure `variants` of the checkpoint `directory` on the first `tokens` tokens of a text.

    text_file: by default heldout.txt beside the checkpoint. progress: is told what is measured.
    Raises RuntimeRefusal when the text is missing or shorter than one window.
    """
    directory = Path(directory)
    tell = progress or (lambda _: None)
    windows = read_windows(directory, Path(text_file or directory / HELD_OUT), tokens)
    with one_torch_thread():
        return _measure(directory, windows, VARIANTS if variants is None else variants, tell)


def _measure(
    directory: Path,
    windows: Tensor,
    variants: dict[str, MakeWeights],
    tell: Callable[[str], None],
) -> Quality:
    tell("source")
    source = [_keep(one) for one in _run(load(SourceWeights.read(directory)), windows)]
    lines = [_line("source", windows, source, iter(source))]
    for name, make in variants.items():
        tell(name)
        with tempfile.TemporaryDirectory(prefix="dsv4-quality-") as place:
            model = load(make(directory, Path(place) / "packed"))
            lines.append(_line(name, windows, source, _run(model, windows)))
    return Quality(len(windows), len(windows) * SCORED, tuple(lines))


def read_windows(directory: Path, text_file: Path, tokens: int) -> Tensor:
    """Token ids int64 `[W, 512]`: as many whole windows as `tokens` and the text have."""
    if not text_file.is_file():
        raise RuntimeRefusal(f"{text_file}: no such file; name a text with --text")
    try:
        text = text_file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RuntimeRefusal(f"{text_file} is not UTF-8 text; name a text with --text") from None
    ids = Text.from_file(directory / "tokenizer.json").encode_plain(text)
    count = min(tokens, len(ids)) // WINDOW
    if not count:
        raise RuntimeRefusal(
            f"{min(tokens, len(ids))} tokens of {text_file} are less than one window of {WINDOW}"
        )
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


def _run(model: Model, windows: Tensor) -> Iterator[_Window]:
    """What `model` says of each window's scored tokens."""
    routers = []
    for layer in model.layers:
        if isinstance(layer.ffn.router, ScoreRouter):
            layer.ffn.router = RecordingRouter(layer.ffn.router)
            routers.append(layer.ffn.router)
    session = model.session(WINDOW)
    span = slice(CONTEXT - 1, WINDOW - 1)  # the tokens that predict a scored one
    for ids in windows:
        session.reset()
        logits = session.forward(ids)[span]
        chosen = [router.chosen[span].sort(dim=-1).values for router in routers]
        experts = torch.stack(chosen, 1) if chosen else torch.empty(len(logits), 0, 0)
        yield _Window(logits.double().log_softmax(-1), experts)


def _keep(window: _Window) -> _Window:
    """The source's, kept for all variants: float32 takes half the memory."""
    return _Window(window.log_probs.float(), window.experts)


def _line(name: str, windows: Tensor, source: Sequence[_Window], found: Iterator[_Window]) -> Line:
    """Compare one variant with the source, window by window."""
    loss, excess, kl, top1, routing = [], [], [], [], []
    for ids, expected, got in zip(windows, source, found, strict=True):
        targets = ids[CONTEXT:, None]
        p, q = expected.log_probs.double(), got.log_probs.double()
        own = -q.gather(1, targets)
        loss.append(float(own.mean()))
        excess.append(float((own + p.gather(1, targets)).mean()))
        kl.append(float((p.exp() * (p - q)).sum(1).mean()))
        top1.append(float((p.argmax(1) == q.argmax(1)).double().mean()))
        same = (expected.experts == got.experts).all(-1).double()
        routing.append(float(same.mean()) if same.numel() else math.nan)
    measured = Measured.of(loss)
    perplexity = math.exp(measured.mean)
    error = None if measured.error is None else perplexity * measured.error
    return Line(
        name,
        Measured(perplexity, error),
        measured,
        *(Measured.of(values) for values in (excess, kl, top1, routing)),
    )
