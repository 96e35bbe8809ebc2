"""What the trained backbone says of its text: what a draft stage reads, and what it should say.

The backbone is the checkpoint under transformers, in BF16 as it was trained.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tiny_model
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

import dsv4
from benchmarks.transformers_peer import its_name
from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.model.inventory import DSPARK_TAPS, DraftKind, Kind, parameters
from dsv4.synthetic.tiny import hub_config

WINDOW = 1024  # tokens of a sequence
VALID = 16  # windows of held-out text, about


def teach(work: Path, checkpoint: Path, windows: int, seed: int) -> None:
    """Run the backbone over `windows` of the training text and some held-out ones."""
    held = np.load(work / "tokens.npz")
    draw = np.random.default_rng(seed)
    starts = draw.choice(len(held["train"]) // WINDOW, windows, replace=False) * WINDOW
    train = np.stack([held["train"][start : start + WINDOW] for start in starts])
    count = len(held["valid"]) // WINDOW
    valid = held["valid"][: count * WINDOW].reshape(-1, WINDOW)[:: max(count // VALID, 1)]
    with tempfile.TemporaryDirectory() as scratch:
        dsv4.convert(checkpoint, Path(scratch) / "packed", recipe="native")
        model = backbone(dsv4.open(Path(scratch) / "packed"))
    tiny_model.to_bfloat16(model)
    for name, ids in (("train", train), ("valid", valid)):
        taught = _taught(model, torch.from_numpy(ids.astype(np.int64)))
        save_file(taught, work / f"taught-{name}.safetensors")
        print(f"{name}: {ids.size} tokens, {float(taught.pop('loss')):.4f} nats", flush=True)


@torch.no_grad()
def _taught(model: Any, windows: Tensor) -> dict[str, Tensor]:
    """taps: means of the streams that the tapped layers leave, `[B, S, 3 D]`; hidden: what the head
    multiplies with, `[B, S, D]`.
    """
    taps: list[Tensor] = []
    hidden: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _a, out: taps.append(out.float().mean(2)))
        for layer in model.model.layers[-DSPARK_TAPS:]
    ]
    hooks.append(model.model.norm.register_forward_hook(lambda _m, _a, out: hidden.append(out)))
    loss = 0.0
    for ids in windows:
        logits = tiny_model.logits_of(model, ids[None])[0]
        loss += float(F.cross_entropy(logits[:-1], ids[1:])) / len(windows)
    for hook in hooks:
        hook.remove()
    return {
        "ids": windows,
        "taps": torch.cat(taps)
        .unflatten(0, (-1, DSPARK_TAPS))
        .transpose(1, 2)
        .flatten(2)
        .bfloat16(),
        "hidden": torch.cat(hidden).bfloat16(),
        "loss": torch.tensor(loss),
    }


def backbone(packed: PackedCheckpoint) -> Any:
    """The float32 model with the weights of a store, for looking, not for training."""
    fields = hub_config(tiny_model.CONFIG, DraftKind.NONE)
    for ours in ("quantization_config", "expert_dtype", "torch_dtype", "transformers_version"):
        del fields[ours]
    model = DeepseekV4ForCausalLM(
        DeepseekV4Config(
            **fields, attn_implementation="windowed", experts_implementation="all_experts"
        )
    ).eval()
    found: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}
    for parameter in parameters(tiny_model.CONFIG):
        if parameter.kind is Kind.TABLE:
            found[its_name(parameter.name)] = packed.store.tensor(parameter.name)
        elif parameter.kind is Kind.EXPERT:
            at, _, rest = parameter.name.partition("experts.")
            part = rest.split(".")[1]
            stacks.setdefault(f"{at}experts.{part}", []).append(packed.dequantize(parameter.name))
        else:
            found[its_name(parameter.name)] = packed.dequantize(parameter.name)
    for number in range(tiny_model.CONFIG.num_hidden_layers):
        w1, w2, w3 = (torch.stack(stacks[f"layers.{number}.ffn.experts.w{n}"]) for n in (1, 2, 3))
        experts = f"model.layers.{number}.mlp.experts"
        found[f"{experts}.gate_up_proj"], found[f"{experts}.down_proj"] = torch.cat([w1, w3], 1), w2
    model.load_state_dict(found)
    return model
