"""Distil a DSpark stage for the trained example and write it beside the backbone.

    python examples/train_tiny.py prepare work                  tokens of the standard library
    python examples/train_draft.py teach work CHECKPOINT        what the backbone says of them
    python examples/train_draft.py train work CHECKPOINT        minutes on one core -> work/draft
    python examples/train_draft.py export work CHECKPOINT DIR   CHECKPOINT with the stage

Run from the repository's root with it on PYTHONPATH. The backbone is only read: its files are
copied into DIR byte by byte. Loss of a row, as in "DSpark" (arXiv 2607.05147): total variation
between the stage's distribution and the backbone's, cross entropy with the backbone's, which leads
at first as total variation hardly moves a token that is unlikely, and the confidence's against
1 - total variation, the chance that such a row is accepted; row i weighs exp(-i / DECAY). In the
first part of the run attention is drawn to what is near, in the last all weights see themselves as
the official format holds them. One thread; two runs of 3 steps with
the same seed gave the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tiny_formats
import tiny_model
import torch
from safetensors.torch import load_file, save, save_file
from tiny_dspark import Rows, Stage, Weights
from tiny_teacher import WINDOW, teach
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

import dsv4
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import DSPARK_TAPS, DraftKind, Kind, parameters
from dsv4.synthetic.tiny import DSPARK_BLOCK, DSPARK_RANK, hub_config
from dsv4.synthetic.tokenizer import NOISE
from dsv4.synthetic.weights import scale_name

BATCH, ANCHORS = 2, 192  # sequences of a step, and blocks in each
LEARNING_RATE = 3e-3
LAST_RATE = 0.02  # of the learning rate
WARMUP = 50
CLIP = 1.0
BALANCE_RATE = 1e-2  # how fast the router's bias moves
STEPS = 1300
ROUNDED_SHARE = 0.3  # of the steps, at the end
DECAY = 4.0  # rows
LEAST_CROSS_ENTROPY = 0.1  # its weight at the end; at the start 1
EVALUATIONS = 10
BIGRAM_STEPS = 300
NEARNESS, NEAR_SHARE = 0.5, 0.5  # at the start; of the steps, until it is 0
STAGE = "mtp.0."

_Start = tuple[Weights, Weights]  # the stage's, by name without `mtp.0.`; embedding and head


def config_of(checkpoint: Path) -> ModelConfig:
    """The backbone's, with one DSpark stage that reads its last layers."""
    layers = tiny_model.CONFIG.num_hidden_layers
    return dataclasses.replace(
        tiny_model.CONFIG,
        num_draft_layers=1,
        dspark_markov_rank=DSPARK_RANK,
        dspark_block_size=DSPARK_BLOCK,
        dspark_noise_token_id=Tokenizer.from_file(str(checkpoint / "tokenizer.json")).token_to_id(
            NOISE
        ),
        dspark_target_layer_ids=tuple(range(layers - DSPARK_TAPS, layers)),
    )


def first_weights(work: Path, checkpoint: Path, config: ModelConfig, seed: int) -> _Start:
    """Random, but for the Markov head, which begins as the bigrams of the training text, and for
    the routed experts and the norm before the head, which are those of the backbone's end.
    """
    draw = torch.Generator().manual_seed(seed)
    last = f"layers.{config.num_hidden_layers - 1}."
    found: Weights = {}
    with tempfile.TemporaryDirectory() as scratch:
        dsv4.convert(checkpoint, Path(scratch) / "packed", recipe="native")
        packed = dsv4.open(Path(scratch) / "packed")
        for parameter in parameters(config, DraftKind.DSPARK, 1):
            name = parameter.name.removeprefix(STAGE)
            if name == parameter.name:
                continue
            if parameter.kind is Kind.EXPERT:
                found[name] = packed.dequantize(last + name).float().clone()
            elif name == "norm.weight":  # small: at first the bigrams decide
                found[name] = 0.3 * packed.dequantize(name).float()
            else:
                found[name] = _random(name, parameter.shape, config, draw)
        backbone = {n: packed.dequantize(f"{n}.weight").float().clone() for n in ("embed", "head")}
    for part in ("w1", "w2", "w3"):
        each = [f"ffn.experts.{e}.{part}.weight" for e in range(config.n_routed_experts)]
        found[f"ffn.experts.{part}"] = torch.stack([found.pop(name) for name in each])
    factors = [found[f"markov_head.markov_{factor}.weight"] for factor in ("w1", "w2")]
    tokens = torch.from_numpy(np.load(work / "tokens.npz")["train"].astype(np.int64))
    pairs = torch.bincount(
        tokens[:-1] * config.vocab_size + tokens[1:], minlength=config.vocab_size**2
    )
    _fit_bigrams(pairs.view(config.vocab_size, -1).float(), *factors)
    return found, backbone


def _random(name: str, shape: tuple[int, ...], c: ModelConfig, draw: torch.Generator) -> Tensor:
    if name.endswith("_base"):  # streams mostly keep to themselves at first
        base = torch.zeros(shape)
        if shape[0] == c.hc_mix:
            base[2 * c.hc_mult :] = 2 * torch.eye(c.hc_mult).flatten()
        return base
    if name.endswith(("_scale", "norm.weight")):
        return torch.ones(shape)
    if name in ("ffn.gate.bias", "attn.attn_sink"):
        return torch.zeros(shape)
    narrow = name.endswith("_fn") or name.startswith("confidence_head")
    spread = 0.02 if narrow else 1.0 if name.startswith("markov") else 0.6 * shape[-1] ** -0.5
    return spread * torch.randn(shape, generator=draw)


def _fit_bigrams(pairs: Tensor, w1: Tensor, w2: Tensor) -> None:
    """Let `w1 w2ᵀ` say what follows a token, in place. pairs: counts `[before, after]`."""
    shares = pairs.sum(1) / pairs.sum()
    after = pairs / pairs.sum(1, keepdim=True).clamp(min=1)
    w2 *= 0.1
    factors = [w1.requires_grad_(), w2.requires_grad_()]
    optimizer = torch.optim.Adam(factors, lr=0.03)
    for _ in range(BIGRAM_STEPS):
        loss = -((after * (w1 @ w2.T).log_softmax(-1)).sum(-1) * shares).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"bigrams: {loss.item():.3f} nats", flush=True)
    for factor in factors:
        factor.requires_grad_(False)


def rounded(name: str, master: Tensor, kinds: dict[str, Kind]) -> Tensor:
    """What the official format would hold of it."""
    if name.startswith("ffn.experts."):
        return tiny_formats.round_mxfp4(master)
    if kinds[name] is Kind.LINEAR:
        return tiny_formats.round_fp8(master)
    return master.bfloat16().float() if kinds[name] is Kind.PLAIN else master


def losses(rows: Rows, truth: Tensor, cross_entropy: float) -> tuple[Tensor, Tensor]:
    """truth: the backbone's logits. -> what is minimised; total variation by row `[rows]`."""
    truth = truth.log_softmax(-1)
    mine = rows.logits.log_softmax(-1)
    p, q = truth.exp(), mine.exp()
    variation = 0.5 * (p - q).abs().sum(-1)
    entropy = -(p * mine).sum(-1)
    sure = F.binary_cross_entropy_with_logits(
        rows.confidence, 1 - variation.detach(), reduction="none"
    )
    weight = torch.exp(-torch.arange(variation.shape[1]) / DECAY)
    total = cross_entropy * entropy + (1 - cross_entropy) * variation + sure
    return (total * weight).mean(0).sum() / weight.sum(), variation.detach().mean(0)


def train(work: Path, checkpoint: Path, steps: int, seed: int) -> None:
    """On what `teach` left; -> work/draft.safetensors, draft.json."""
    started = time.monotonic()
    config = config_of(checkpoint)
    taught = load_file(work / "taught-train.safetensors")
    valid = load_file(work / "taught-valid.safetensors")
    weights, backbone = first_weights(work, checkpoint, config, seed)
    kinds = {p.name.removeprefix(STAGE): p.kind for p in parameters(config, DraftKind.DSPARK, 1)}
    stage = Stage(config, backbone["embed"], backbone["head"], WINDOW)
    bias = weights["ffn.gate.bias"]
    learnt = {n: w.requires_grad_() for n, w in weights.items() if w is not bias}
    optimizer = torch.optim.AdamW(
        learnt.values(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, foreach=True
    )
    draw = torch.Generator().manual_seed(seed)
    report: dict[str, Any] = {"seed": seed, "sequences": BATCH, "anchors": ANCHORS, "curve": []}
    begun = time.monotonic()
    for step in range(steps):
        part = step / steps
        seen = dict(weights)
        if part >= 1 - ROUNDED_SHARE:  # the gradient goes straight through
            seen |= {n: w + (rounded(n, w.detach(), kinds) - w.detach()) for n, w in learnt.items()}
        rate = LEARNING_RATE * min((step + 1) / WARMUP, 1.0)
        rate *= LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * part))
        for group in optimizer.param_groups:
            group["lr"] = rate
        stage.nearness = NEARNESS * max(1 - part / NEAR_SHARE, 0.0)
        chosen = torch.randint(len(taught["ids"]), (BATCH,), generator=draw)
        anchors = torch.randint(WINDOW - 1 - stage.rows, (BATCH, ANCHORS), generator=draw)
        rows, truth = _run(stage, seen, taught, chosen, anchors)
        fall = 1 - (1 - LEAST_CROSS_ENTROPY) * min(max((part - 0.3) / 0.4, 0.0), 1.0)
        loss, variation = losses(rows, truth, fall)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learnt.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        bias += BALANCE_RATE * (rows.load.mean() - rows.load).sign()
        if step % max(steps // EVALUATIONS, 1) == 0 or step == steps - 1:
            line = {
                "step": step,
                "loss": loss.item(),
                "norm": float(norm),
                "accepted": [round(x, 4) for x in (1 - variation).tolist()],
                "greedy_valid": _greedy(stage, seen, valid),
            }
            report["curve"].append(line)
            fullest = float(rows.load.max() / rows.load.mean())
            spent = time.monotonic() - begun
            print(f"{spent:.0f} s, fullest expert {fullest:.1f} x mean, {line}", flush=True)
    final = {n: rounded(n, w.detach(), kinds) for n, w in learnt.items()} | {"ffn.gate.bias": bias}
    report |= {"steps": steps, "greedy_valid": _greedy(stage, final, valid)}
    report["seconds"] = time.monotonic() - started
    save_file(final, work / "draft.safetensors")
    (work / "draft.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "curve"}), flush=True)


def _run(
    stage: Stage, w: Weights, taught: Weights, chosen: Tensor, anchors: Tensor
) -> tuple[Rows, Tensor]:
    """-> the stage's rows, and the backbone's logits there `[N, rows, vocab]`."""
    rows = stage(w, taught["taps"][chosen].float(), taught["ids"][chosen], anchors)
    at = anchors[..., None] + 1 + torch.arange(stage.rows)
    hidden = taught["hidden"][chosen[:, None, None], at].flatten(0, 1)
    return rows, stage.linear(hidden, stage.head)


@torch.no_grad()
def _greedy(stage: Stage, w: Weights, taught: Weights) -> list[float]:
    """Shares of held-out blocks whose first 1, 2, ... rows have the backbone's likeliest tokens."""
    spread = torch.arange(0, WINDOW - 1 - stage.rows, 13)
    right = []
    for number in range(len(taught["ids"])):
        rows, truth = _run(stage, w, taught, torch.tensor([number]), spread[None])
        right.append(rows.logits.argmax(-1) == truth.argmax(-1))
    return [round(x, 4) for x in torch.cat(right).long().cumprod(1).float().mean(0).tolist()]


def export(work: Path, checkpoint: Path, out: Path) -> None:
    """`checkpoint` with the stage, instead of one that it has -> `out`, which must not be there."""
    config = config_of(checkpoint)
    trained = load_file(work / "draft.safetensors")
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    kept = {n: file for n, file in index["weight_map"].items() if not n.startswith(STAGE)}
    shards = sorted({*kept.values()})
    of = f"-of-{len(shards) + 1:05d}.safetensors"
    files = {name: name.rpartition("-of-")[0] + of for name in shards}
    out.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.name in files or file.suffix != ".safetensors":
            shutil.copyfile(file, out / files.get(file.name, file.name))
    stage: Weights = {}
    for parameter in parameters(config, DraftKind.DSPARK, 1):
        name = parameter.name.removeprefix(STAGE)
        if name == parameter.name:
            continue
        if parameter.kind is Kind.EXPERT:
            _, _, expert, part, _ = name.split(".")
            codes, scales = tiny_formats.encode_mxfp4(trained[f"ffn.experts.{part}"][int(expert)])
            stage |= {parameter.name: codes, scale_name(parameter.name): scales}
        elif parameter.kind is Kind.LINEAR:
            codes, scales = tiny_formats.encode_fp8(trained[name])
            stage |= {parameter.name: codes, scale_name(parameter.name): scales}
        elif parameter.kind is Kind.FLOAT32:
            stage[parameter.name] = trained[name]
        else:
            stage[parameter.name] = trained[name].bfloat16()
    own = f"model-{len(shards) + 1:05d}{of}"
    (out / own).write_bytes(save(stage, metadata={"format": "pt"}))
    places = {name: files[file] for name, file in kept.items()}
    places = dict(sorted((places | dict.fromkeys(stage, own)).items()))
    size = sum(tensor.nbytes for tensor in stage.values())
    for name in shards:
        size += sum(tensor.nbytes for tensor in load_file(checkpoint / name).values())
    _write(
        out / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": places},
        2,
    )
    _write(out / "config.json", hub_config(config, DraftKind.DSPARK), 2)
    report = json.loads((checkpoint / "training.json").read_text())
    report["draft"] = json.loads((work / "draft.json").read_text())
    _write(out / "training.json", report, 1)


def _write(path: Path, value: dict[str, Any], indent: int) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("teach", "train", "export"))
    parser.add_argument("work", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--windows", type=int, default=400)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "teach":
        teach(given.work, given.checkpoint, given.windows, given.seed)
    elif given.what == "train":
        train(given.work, given.checkpoint, given.steps, given.seed)
    else:
        export(given.work, given.checkpoint, given.out)


if __name__ == "__main__":
    main()
