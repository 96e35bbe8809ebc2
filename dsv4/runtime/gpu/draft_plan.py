"""DSpark as kernels compute it: the context that follows every pass, and a proposal.

    context   mean of the streams that tapped layers leave -> main_proj, norm -> keys of each stage
    proposal  [token, noise, ...] -> connect, attend, connect, route, mix experts of each stage
              -> connect, head -> bias of the token before, likeliest token; one after another

`runtime.dspark` has the formulas. Keys of the context lie in rings like those of a sliding layer.
A proposal writes the keys of its block where the next tokens' will be: nothing sees them there
before these are written. Its rows see the window before the block and all of the block, so the
position up to which they see is that of its last row, and angles are of their own (`block_end`).

What no kernel computes yet is launched through torch, on fixed tensors: means, the collapse before
the norm, the confidence, and what lies between one proposed token and the next.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.config import AttentionKind, ModelConfig
from dsv4.kernels.core.signature import Kernel
from dsv4.kernels.ops.attention import contract as attention
from dsv4.kernels.ops.gemv.contract import MAX_ROWS, STEP
from dsv4.kernels.ops.kv_cache import contract as append
from dsv4.kernels.reference.accumulate import WIDE
from dsv4.kernels.reference.mhc import hc_head
from dsv4.runtime.draft import Draft
from dsv4.runtime.gpu import plan
from dsv4.runtime.gpu.activations import Tokens
from dsv4.runtime.gpu.caches import LayerCaches
from dsv4.runtime.gpu.operands import DSpark, Layer, Model
from dsv4.runtime.gpu.plan import Pass, StepPass
from dsv4.runtime.gpu.plan_kernels import append_of


@dataclasses.dataclass(frozen=True, eq=False)
class Projections:
    """What the context of a pass goes through, a row for each token. means: bfloat16 `[T, 3, D]`;
    main: float32 `[T, D]`; context: bfloat16 `[T, D]`; keys: float32 `[T, head_dim]` of each stage;
    nowhere: int32 `[T]`, positions of rows that are not there.
    """

    means: Tensor
    main: Tensor
    context: Tensor
    keys: tuple[Tensor, ...]
    nowhere: Tensor

    @classmethod
    def allocate(
        cls, config: ModelConfig, taps: int, stages: int, rows: int, device: torch.device
    ) -> Projections:
        """For passes of up to `rows` tokens; zeroed."""
        hidden, half = config.hidden_size, torch.bfloat16
        return cls(
            torch.zeros((rows, taps, hidden), dtype=half, device=device),
            torch.zeros((rows, hidden), device=device),
            torch.zeros((rows, hidden), dtype=half, device=device),
            tuple(torch.zeros((rows, config.head_dim), device=device) for _ in range(stages)),
            torch.full((rows,), -1, dtype=torch.int32, device=device),
        )

    def first(self, rows: int) -> Projections:
        """The first `rows` rows."""
        keys = tuple(one[:rows] for one in self.keys)
        fields = (self.means[:rows], self.main[:rows], self.context[:rows], keys)
        return Projections(*fields, self.nowhere[:rows])


@dataclasses.dataclass(frozen=True, eq=False)
class Proposal:
    """What a proposal starts from and leaves. tokens: of its block, positions those of its rows;
    block_end: int32 `[B]`, of the last row; ids: int64 `[B + 1]`, the token and what is proposed;
    collapsed: bfloat16 `[B, D]`; logits: float32 `[B, V]`; bias: `[1, V]`; previous: bfloat16
    `[B, r]`, rows of the first Markov factor; confidence: float32 `[B]`.
    """

    tokens: Tokens
    block_end: Tensor
    ids: Tensor
    collapsed: Tensor
    logits: Tensor
    bias: Tensor
    previous: Tensor
    confidence: Tensor

    @classmethod
    def allocate(cls, config: ModelConfig, device: torch.device) -> Proposal:
        """For blocks of the model's size; zeroed."""
        block, rank, vocab = sizes(config)

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            Tokens.allocate(block, device),
            new(block, dtype=torch.int32),
            new(block + 1, dtype=torch.int64),
            new(block, config.hidden_size, dtype=torch.bfloat16),
            new(block, vocab),
            new(1, vocab),
            new(block, rank, dtype=torch.bfloat16),
            new(block),
        )

    def place(self, token: int, noise: int, position: int, slot: int) -> None:
        """Tell the device what to propose after: `token`, which comes at `position`."""
        block = len(self.block_end)
        self.ids[:1].fill_(token)
        self.tokens.ids.fill_(noise)
        self.tokens.ids[:1].fill_(token)
        torch.arange(position, position + block, out=self.tokens.position)
        self.tokens.slot.fill_(slot)
        self.block_end.fill_(position + block - 1)

    def drafted(self, count: int) -> Draft:
        """The first `count` proposals, which the next ones do not write over."""
        parts = (self.ids[1 : 1 + count], self.logits[:count], self.confidence[:count])
        return Draft(*(part.clone() for part in parts))


@dataclasses.dataclass(frozen=True, eq=False)
class DraftBuffers:
    """All that draft layers write besides caches and `Activations`."""

    projections: Projections
    proposal: Proposal

    @classmethod
    def allocate(
        cls, config: ModelConfig, rows: int, stages: int, device: torch.device
    ) -> DraftBuffers:
        """For passes of up to `rows` tokens."""
        taps = len(config.dspark_target_layer_ids or ())
        projections = Projections.allocate(config, taps, stages, rows, device)
        return cls(projections, Proposal.allocate(config, device))


def sizes(config: ModelConfig) -> tuple[int, int, int]:
    """-> rows of a block, rank of the Markov head, size of the vocabulary."""
    return config.dspark_block_size or 0, config.dspark_markov_rank or 0, config.vocab_size


def refuse_sizes(config: ModelConfig) -> str | None:
    """Why no kernel takes the model's DSpark layers, as a sentence; None where they do."""
    block, rank, _ = sizes(config)
    tiles = (config.sliding_window + block - 1) // attention.TILE
    if not 0 < block <= MAX_ROWS:
        return f"dspark_block_size is {block}, the GPU's kernels take 1 to {MAX_ROWS}"
    if not rank or rank % STEP:
        return f"dspark_markov_rank is {rank}, the GPU's kernels take multiples of {STEP}"
    if not tiles:
        return (
            f"sliding_window is {config.sliding_window}, the GPU's kernels draft with more than "
            f"{attention.TILE - block}"
        )
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class Observed:
    """See `plan.Observer`: keeps what the layers that are tapped leave, and extends the context.

    projections: of as many rows as the pass has.
    """

    draft: DSpark
    projections: Projections

    def layer(self, run: Pass, index: int, streams: Tensor) -> None:
        """See `plan.Observer`."""
        if index in self.draft.tapped:
            place = self.projections.means[:, self.draft.tapped.index(index)]
            run.between(functools.partial(torch.mean, streams, 1, out=place))

    def end(self, run: Pass, caches: Sequence[LayerCaches]) -> None:
        """The tokens' keys, of every stage."""
        p, draft = self.projections, self.draft
        run.multiply(p.means.flatten(1), [(draft.main_proj, p.main)])
        self._append(
            run, _norm_of(run.config), draft.stages[0], caches, p.nowhere, p.keys[0],
            latent=p.main, q_norm=draft.main_norm, qr=p.context,
        )  # fmt: skip
        products = [one.attention.wkv for one in draft.stages]
        run.multiply(p.context, list(zip(products, p.keys, strict=True)))
        own = append_of(run.config, AttentionKind.SLIDING)
        for stage, keys in zip(draft.stages, p.keys, strict=True):
            unused = {"latent": run.a.latent, "q_norm": stage.attention.q_norm, "qr": run.a.qr}
            self._append(run, own, stage, caches, run.tokens.position, keys, **unused)

    def _append(
        self,
        run: Pass,
        kernel: Kernel,
        stage: Layer,
        caches: Sequence[LayerCaches],
        position: Tensor,
        keys: Tensor,
        **latent: Tensor,
    ) -> None:
        cache, table = caches[stage.index], run.tables.sliding
        run.launch(
            kernel,
            position=position,
            slot=run.tokens.slot,
            cos=table.cos,
            sin=table.sin,
            **latent,
            kv=keys,
            kv_norm=stage.attention.kv_norm,
            window_kv=cache.window_kv,
            window_scales=cache.window_scales,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class DraftPass(StepPass):
    """The block of a proposal. seen: int32 `[B]`, the position of its last row."""

    seen: Tensor

    @property
    def block_end(self) -> Tensor | None:
        """See `Pass`."""
        return self.seen


def block_pass(run: StepPass, own: Proposal) -> DraftPass:
    """`run`, which is for the tokens of `own`, as a pass of its block. Nothing observes it."""
    given = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    return DraftPass(**given | {"observer": None}, seen=own.block_end)


def propose(run: DraftPass, model: Model, caches: Sequence[LayerCaches], own: Proposal) -> None:
    """A proposal: `own.tokens`, whose rows `run` has, -> `own.ids`, `logits` and `confidence`."""
    draft = model.draft
    assert draft is not None
    stages = dataclasses.replace(model, layers=draft.stages, before_head=draft.before_head)
    streams, u = plan.layers(run, stages, caches)
    streams, x = plan.connect(run, "last", draft.before_head, streams, u)
    run.between(functools.partial(_collapse, run.config, draft, streams.streams, own))
    run.multiply(x, [(model.head, own.logits)])
    one = dataclasses.replace(run, tokens=_row(run.tokens))
    for row in range(draft.block):
        run.between(functools.partial(_look_up, draft, own, row))
        one.multiply(own.previous[row : row + 1], [(draft.markov_w2, own.bias)])
        run.between(functools.partial(_choose, own, row))
    run.between(functools.partial(_confide, draft, own))


def _row(tokens: Tokens) -> Tokens:
    return Tokens(tokens.ids[:1], tokens.position[:1], tokens.slot[:1])


def _collapse(config: ModelConfig, draft: DSpark, streams: Tensor, own: Proposal) -> None:
    """What the head's norm reads, which its kernel does not leave."""
    c, at = config, draft.before_head
    eps, norm_eps = c.hc_eps, c.rms_norm_eps
    found = hc_head(streams, at.fn, at.base, at.scale, hc_eps=eps, norm_eps=norm_eps)
    torch.add(found, 0, out=own.collapsed)  # by a kernel: what comes next waits for kernels alone


def _look_up(draft: DSpark, own: Proposal, row: int) -> None:
    torch.index_select(draft.markov_w1, 0, own.ids[row : row + 1], out=own.previous[row : row + 1])


def _choose(own: Proposal, row: int) -> None:
    """The likeliest, the first of equals; a token even where logits are not finite."""
    own.logits[row].add_(own.bias[0])
    torch.argmax(own.logits[row], 0, out=own.ids[row + 1])


def _confide(draft: DSpark, own: Proposal) -> None:
    hidden = torch.cat((own.collapsed, own.previous), -1).to(WIDE)
    own.confidence.copy_((hidden * draft.confidence.to(WIDE)).sum(-1))


@functools.cache
def _norm_of(config: ModelConfig) -> Kernel:
    """The norm of the main projection: a kernel that appends, of rows that are not there."""
    layer = append.Layer.of(config, AttentionKind.SLIDING)
    return append.append(dataclasses.replace(layer, latent=config.hidden_size))


def require(config: ModelConfig) -> None:
    """Raise RuntimeRefusal as `refuse_sizes` says."""
    if (refused := refuse_sizes(config)) is not None:
        raise RuntimeRefusal(f"no GPU runs the draft layers: {refused}")
