"""Random weights under which a wrong attention shows in the logits.

With keys of unit size a query sees hundreds of rows about equally: their mean is nearly zero, and
logits hardly change if half of them are lost. Larger keys, which are values as well, make a query
look at a few rows and the sublayer's output as large as the residual streams.
"""

from __future__ import annotations

from torch import Tensor

from dsv4.bench.random_weights import RandomWeights

KEY_SIZE = 2.0  # scores get this standard deviation: of 640 rows about a dozen count


class TellingWeights(RandomWeights):
    """See `RandomWeights`."""

    def _plain(self, name: str) -> Tensor:
        keys = name.endswith(("attn.kv_norm.weight", "attn.compressor.norm.weight"))
        return super()._plain(name) * (KEY_SIZE if keys else 1)
