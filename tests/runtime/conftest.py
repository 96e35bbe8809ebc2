"""One thread: these models are too small to share, and test processes already are."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
