"""MTP: one more layer, which mixes what the backbone left of a token with the token that follows.

    X0_j  = e_proj · enorm(embed[next token]) + h_proj · hnorm(X_j)     of each residual stream j
    X1    = the layer, at the token's own position                      its keys are the context
    logits of the token after the next = the model's head on the layer's own collapse and norm

X are the streams that the last backbone layer leaves. For a second proposal X1 and the first stand
in for X and the next token, one position on; and so forth. Such rows are guesses and are not kept.
A token's row of keys needs the token that follows, so it is written when that is fed, and X is kept
until then. Source: DeepSeek-V4 (preview), `inference/model.py`; chaining as in vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.numeric.operands import Matrix
from dsv4.kernels.reference.linear import linear
from dsv4.kernels.reference.norm import rms_norm
from dsv4.kernels.reference.numerics import Numerics
from dsv4.runtime.cache import WindowCache
from dsv4.runtime.draft import Draft, ring
from dsv4.runtime.layer import Head, Layer
from dsv4.runtime.positions import RopeTable, Step
from dsv4.runtime.weights import WeightReader

DEPTH = 3  # proposals; the layer was trained for the first


class Mtp:
    """See `draft.Drafter`. embed: the model's `[vocab, D]`; head: its `[vocab, D]`, shared.

    Raises RuntimeRefusal for a tensor that does not fit, and for more than one layer.
    """

    most = DEPTH

    def __init__(
        self,
        read: WeightReader,
        embed: Tensor,
        head: Matrix,
        dtype: torch.dtype,
        numerics: Numerics,
    ) -> None:
        c = read.weights.config
        if c.num_draft_layers != 1:
            raise RuntimeRefusal(f"the checkpoint has {c.num_draft_layers} MTP layers, expected 1")
        self.config, self.numerics = c, numerics
        self.embed, self.dtype = embed, dtype
        self.tapped = (c.num_hidden_layers - 1,)
        hidden = c.hidden_size
        self.e_proj = read.matrix("mtp.0.e_proj.weight", hidden, hidden)
        self.h_proj = read.matrix("mtp.0.h_proj.weight", hidden, hidden)
        self.enorm = read.parameter("mtp.0.enorm.weight", hidden)
        self.hnorm = read.parameter("mtp.0.hnorm.weight", hidden)
        self.layer = Layer(read, c.num_hidden_layers, numerics)
        self.head = Head(read, "mtp.0.", head)

    def empty_context(self) -> tuple[WindowCache, ...]:
        """The layer's keys, up to the token before the last; the streams of the last."""
        c, device = self.config, self.embed.device
        return (
            ring(c.sliding_window, c.head_dim, self.dtype, device),
            ring(1, c.hc_mult * c.hidden_size, self.dtype, device),
        )

    def observe(
        self, tapped: Sequence[Tensor], step: Step, context: tuple[WindowCache, ...]
    ) -> None:
        """See `Drafter`. Of a long step, only the rows that the rings hold are projected."""
        keys, streams = context
        flat = tapped[0].flatten(1)
        waiting = torch.cat((streams.last(1, step.position), flat[:-1]))[-len(keys.ring) :]
        if rows := len(waiting):
            mixed = self._mix(self._streams(waiting), step.ids[-rows:])
            start = step.position + step.length - 1 - rows
            x, _, _ = self.layer.attn_hc.collapse(mixed)
            keys.append(self.layer.attn.keys(x, *step.tables.sliding.at(start, rows)), start)
        streams.append(flat, step.position)

    def propose(
        self,
        token: int,
        count: int,
        position: int,
        table: RopeTable,
        context: tuple[WindowCache, ...],
    ) -> Draft:
        """See `Drafter`."""
        keys, kept = context
        seen = keys.last(keys.window - 1, position - 1)
        streams = self._streams(kept.last(1, position))
        ids = torch.tensor([token], device=self.embed.device)
        proposed: list[Tensor] = []
        logits: list[Tensor] = []
        for ahead in range(count):
            cos, sin = table.at(position - 1 + ahead, 1)

            def attend(x: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
                nonlocal seen
                seen = torch.cat((seen, self.layer.attn.keys(x, cos, sin)))[-keys.window :]
                return self.layer.attn.over(x, seen, cos, sin)

            streams = self.layer.through(self._mix(streams, ids), ids, attend)
            logits.append(self.head(streams))
            ids = logits[-1].max(-1).indices  # the first of equals
            proposed.append(ids)
        return Draft(torch.cat(proposed), torch.cat(logits), None)

    def _streams(self, flat: Tensor) -> Tensor:
        """`[T, m·D]` -> `[T, m, D]`."""
        return flat.view(len(flat), self.config.hc_mult, self.config.hidden_size)

    def _mix(self, streams: Tensor, following: Tensor) -> Tensor:
        """streams: `[T, m, D]`; following: int64 `[T]`, the tokens after -> `[T, m, D]`."""
        eps = self.config.rms_norm_eps
        e = rms_norm(self.embed[following].to(self.dtype), self.enorm, eps)
        h = rms_norm(streams, self.hnorm, eps)
        return linear(e, self.e_proj, numerics=self.numerics)[:, None] + linear(
            h, self.h_proj, numerics=self.numerics
        )
