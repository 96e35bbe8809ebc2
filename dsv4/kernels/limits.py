"""Which configurations the GPU's kernels take: known before anything is packed, built or loaded.

The kernels refuse the same sizes themselves, when they are compiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.plain_text import SHOWN
from dsv4.kernels.core.sizes import MAX_EXPERTS, MAX_TOP_K
from dsv4.kernels.reference.sampling import MAX_VOCAB

COLUMNS = 1024  # eight warps of 128: of the experts' matrices in a step
MAX_HIDDEN = 7168  # a token row of a step lies in shared memory beside the ring of weights


class Limit(NamedTuple):
    """Of one field of a configuration: a multiple of `step` from `least` to `most`."""

    field: str
    least: int
    most: int | None = None
    step: int = 1

    def refusal(self, config: ModelConfig) -> str | None:
        """A sentence, if the configuration is beyond it."""
        found: int = getattr(config, self.field)
        enough = found >= self.least and (self.most is None or found <= self.most)
        if enough and found % self.step == 0:
            return None
        return f"{self.field} is {found}, the GPU's kernels take {self._words()}"

    def _words(self) -> str:
        if self.least == self.most:
            return str(self.least)
        multiple = f"multiples of {self.step}" if self.step > 1 else f"{self.least} and more"
        if self.most is None:
            return multiple
        return f"{multiple} up to {self.most}" if self.step > 1 else f"{self.least} to {self.most}"


LIMITS = (
    Limit("n_routed_experts", 1, MAX_EXPERTS),
    Limit("num_experts_per_tok", 1, MAX_TOP_K),
    Limit("hidden_size", COLUMNS, MAX_HIDDEN, COLUMNS),
    Limit("moe_intermediate_size", COLUMNS, None, COLUMNS),
    Limit("num_attention_heads", 64, None, 64),
    Limit("head_dim", 512, 512),
    Limit("qk_rope_head_dim", 64, 64),
    Limit("q_lora_rank", 512, None, 512),
    Limit("o_lora_rank", 128, None, 128),
    Limit("index_n_heads", 64, 64),
    Limit("index_head_dim", 128, 128),
    Limit("index_topk", 256, 1024, 256),
    Limit("hc_mult", 4, 4),
    Limit("vocab_size", 4, MAX_VOCAB, 4),
)


def refusals(config: ModelConfig) -> Iterator[str]:
    """Sentences on the sizes that no kernel takes; none where the GPU can run the model."""
    for limit in LIMITS:
        if (found := limit.refusal(config)) is not None:
            yield found
    latent = config.o_groups * config.o_lora_rank
    if latent % COLUMNS:
        yield (f"o_groups x o_lora_rank is {latent}, the GPU's kernels take multiples of {COLUMNS}")


def few(sentences: Sequence[str]) -> str:
    """Of many sentences the first ones, as one."""
    more = len(sentences) - SHOWN
    return "; ".join(sentences[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
