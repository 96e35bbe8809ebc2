"""DSpark: a block of proposals in one pass, from three tapped layers of the backbone.

    c_p     = main_norm(main_proj · [m_a; m_b; m_c])    of every token; m is the mean of the streams
                                                        that a tapped layer leaves
    K_s[p]  = keys of stage s from c_p as it is         the context, rotated to position p
    block   = [token, noise, noise, ...]                embedded, from the token's position on
    stages    each row attends to the last `sliding_window` rows of K_s and to the whole block
    base    = the model's head on the last stage's own collapse and norm
    z_i     = base_i + W2 · W1[previous token]          a low-rank bias, proposal after proposal
    conf_i  = proj · [collapsed row i; W1[previous token]]

Rows of a block see each other, so the block always has all its rows and fewer proposals are the
first of them. Source: DeepSeek-V4-Flash-0731, `inference/model.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import DSPARK_TAPS
from dsv4.formats.numeric.operands import Matrix
from dsv4.kernels.reference.accumulate import WIDE
from dsv4.kernels.reference.linear import linear
from dsv4.kernels.reference.norm import rms_norm
from dsv4.kernels.reference.numerics import Numerics
from dsv4.runtime.cache import WindowCache
from dsv4.runtime.draft import Draft, ring
from dsv4.runtime.layer import Head, Layer, embedded
from dsv4.runtime.positions import RopeTable, Step
from dsv4.runtime.weights import WeightReader


class DSpark:
    """See `draft.Drafter`. embed: the model's `[vocab, D]`; head: its `[vocab, D]`, shared.

    Raises RuntimeRefusal for a tensor that does not fit, and where config.json does not say what
    DSpark needs.
    """

    def __init__(
        self,
        read: WeightReader,
        embed: Tensor,
        head: Matrix,
        dtype: torch.dtype,
        numerics: Numerics,
    ) -> None:
        c = read.weights.config
        self.most, rank, self.noise, self.tapped = settings(c)
        self.config, self.numerics = c, numerics
        self.embed, self.dtype = embed, dtype
        hidden, first, stages = c.hidden_size, c.num_hidden_layers, c.num_draft_layers
        last = f"mtp.{stages - 1}"
        self.main_proj = read.matrix("mtp.0.main_proj.weight", hidden, DSPARK_TAPS * hidden)
        self.main_norm = read.parameter("mtp.0.main_norm.weight", hidden)
        self.stages = tuple(Layer(read, first + stage, numerics) for stage in range(stages))
        self.head = Head(read, f"{last}.", head)
        markov = f"{last}.markov_head"
        self.markov_w1 = read.table(f"{markov}.markov_w1.weight", c.vocab_size, rank)
        self.markov_w2 = read.table(f"{markov}.markov_w2.weight", c.vocab_size, rank)
        self.confidence = read.parameter(f"{last}.confidence_head.proj.weight", 1, hidden + rank)
        for name, table in (("markov_w1", self.markov_w1), ("markov_w2", self.markov_w2)):
            if not table.any():
                raise RuntimeRefusal(f"{markov}.{name}.weight holds nothing but zeros")

    def empty_context(self) -> tuple[WindowCache, ...]:
        """A ring of keys a stage."""
        c, device = self.config, self.embed.device
        return tuple(ring(c.sliding_window, c.head_dim, self.dtype, device) for _ in self.stages)

    def observe(
        self, tapped: Sequence[Tensor], step: Step, context: tuple[WindowCache, ...]
    ) -> None:
        """See `Drafter`. Of a long step, only the rows that the rings hold are projected."""
        rows = min(step.length, len(context[0].ring))
        start = step.position + step.length - rows
        means = [streams[-rows:].to(WIDE).mean(1).to(self.dtype) for streams in tapped]
        main = linear(torch.cat(means, -1), self.main_proj, numerics=self.numerics)
        main = rms_norm(main, self.main_norm, self.config.rms_norm_eps)
        cos, sin = step.tables.sliding.at(start, rows)
        for stage, cache in zip(self.stages, context, strict=True):
            cache.append(stage.attn.keys(main, cos, sin), start)

    def propose(
        self,
        token: int,
        count: int,
        position: int,
        table: RopeTable,
        context: tuple[WindowCache, ...],
    ) -> Draft:
        """See `Drafter`."""
        ids = torch.full((self.most,), self.noise, device=self.embed.device)
        ids[0] = token
        cos, sin = table.at(position, self.most)
        streams = embedded(self.embed, ids, self.dtype, self.config.hc_mult)
        for stage, cache in zip(self.stages, context, strict=True):
            past = cache.last(cache.window, position)

            def attend(x: Tensor, stage: Layer = stage, past: Tensor = past) -> Tensor:
                keys = torch.cat((past, stage.attn.keys(x, cos, sin)))
                return stage.attn.over(x, keys, cos, sin)

            streams = stage.through(streams, ids, attend)
        collapsed = self.head.collapse(streams[:count])
        return self._follow(ids[:1], collapsed, self.head.logits(collapsed))

    def _follow(self, token: Tensor, collapsed: Tensor, logits: Tensor) -> Draft:
        """Proposal after proposal. token: int64 `[1]`; logits: of the head, biased in place."""
        proposed: list[Tensor] = []
        previous: list[Tensor] = []
        for row in logits:
            previous.append(self.markov_w1[token].to(torch.float32))
            row += linear(previous[-1], self.markov_w2, dtype=torch.float32)[0]
            token = row.max(0).indices[None]  # the first of equals
            proposed.append(token)
        hidden = torch.cat((collapsed.to(torch.float32), torch.cat(previous)), -1)
        return Draft(torch.cat(proposed), logits, linear(hidden, self.confidence)[:, 0])


def settings(c: ModelConfig) -> tuple[int, int, int, tuple[int, ...]]:
    """-> rows of a block, rank of the Markov head, the id of noise, the tapped layers.

    Raises RuntimeRefusal where config.json does not say all of that.
    """
    block, rank = c.dspark_block_size, c.dspark_markov_rank
    noise, layers = c.dspark_noise_token_id, c.dspark_target_layer_ids
    if block is None or rank is None or noise is None or layers is None:
        raise RuntimeRefusal(
            "there are DSpark layers, but config.json (of a store: assets/config.json) does not "
            "have all of dspark_block_size, dspark_markov_rank, dspark_noise_token_id and "
            "dspark_target_layer_ids"
        )
    if len(layers) != DSPARK_TAPS:
        raise RuntimeRefusal(
            f"config.json: dspark_target_layer_ids is {list(layers)}, expected {DSPARK_TAPS} layers"
        )
    return block, rank, noise, layers
