"""Train a small DeepSeek-V4 on the Python standard library and write it as DeepSeek would.

    python examples/train_tiny.py prepare work          tokenizer and tokens
    python examples/train_tiny.py train work            minutes on one GPU -> work/master
    python examples/train_tiny.py export work DIR       the official on-disk format

`train` is transformers' DeepseekV4 in BF16 with FP32 masters (on a CPU all FP32): AdamW, a cosine
schedule, a step as one CUDA graph. For the last part of the run the experts see themselves in MXFP4
and the dense matrices in FP8, as the released models did, and the indexers, which learn from the
attention where to look, choose for real. A seed and a number of steps give the same model on the
same machine; `--seconds` measures how many steps fit and prints the number.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny_formats
import tiny_model
import torch
from torch import Tensor

LENGTH = 1024
BATCH = 16
LEARNING_RATE = 2e-3
LAST_RATE = 0.02  # of the learning rate
WARMUP = 60
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
CLIP = 1.0
BALANCE_RATE = 1e-3  # how fast a router's bias moves
ROUNDED_SHARE = 0.3  # of the steps, at the end
EVALUATIONS = 12
_DENSE = ("q_a_proj", "q_b_proj", "self_attn.kv_proj", "o_a_proj", "o_b_proj", "shared_experts")


def is_expert(name: str) -> bool:
    """Whether the official format holds the parameter in MXFP4."""
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def is_dense(name: str) -> bool:
    """Whether the official format holds the parameter in FP8."""
    return any(part in name for part in _DENSE)


class Training:
    """Model, masters and one step of both. Everything a step needs is on the device beforehand."""

    def __init__(self, model: Any, device: torch.device, batch: int, length: int) -> None:
        self.model = model.to(device)
        self.watch = tiny_model.watch(model)
        self.routers = tiny_model.score_routers(model)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone() for _, p in named]
        if device.type == "cuda":
            tiny_model.to_bfloat16(model)
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.rate = torch.tensor(0.0, device=device)
        decayed = [m for m, (_, p) in zip(self.masters, named, strict=True) if p.dim() >= 2]
        others = [m for m, (_, p) in zip(self.masters, named, strict=True) if p.dim() < 2]
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": WEIGHT_DECAY},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.rate if cuda else LEARNING_RATE,
            betas=BETAS,
            fused=cuda,
            capturable=cuda,
        )
        self.ids = torch.zeros(batch, length + 1, dtype=torch.int64, device=device)
        self.losses = torch.zeros(3, device=device)  # next token, indexers, norm of the gradient
        self.rounded = False
        self.show_masters()

    def step(self) -> None:
        """Forward, backward, AdamW, and what the router's biases do; no host ever waits."""
        logits = tiny_model.logits_of(self.model, self.ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.ids[:, 1:].flatten())
        indexers = self.watch.indexer_loss(tiny_model.CONFIG.csa_ratio)
        (loss + indexers).backward()
        grads = [master.grad for master in self.masters]
        torch._foreach_copy_(grads, [p.grad for p in self.parameters])
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        torch._foreach_mul_(grads, (CLIP / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        with torch.no_grad():
            for router, experts in self.routers:
                load = experts.load.float()
                router.e_score_correction_bias.add_(BALANCE_RATE * (load.mean() - load).sign())
            self.losses.copy_(torch.stack([loss.detach(), indexers.detach(), norm]))
        self.show_masters()
        self.watch.clear()
        for parameter in self.parameters:
            parameter.grad = None

    def show_masters(self) -> None:
        """Let the model see the masters, rounded to what the official format holds if so told."""
        with torch.no_grad():
            seen = self.masters
            if self.rounded:
                seen = [_rounded(n, m) for n, m in zip(self.names, self.masters, strict=True)]
            torch._foreach_copy_(self.parameters, seen)

    def capture(self) -> Callable[[], None]:
        """A callable that runs one step: a CUDA graph, or the step itself on a CPU."""
        if self.ids.device.type != "cuda":
            return self.step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # at a rate of zero: what a first run allocates and measures
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self.step()
        except RuntimeError as error:
            print(f"no CUDA graph ({error}); steps run one operation at a time", flush=True)
            torch.cuda.synchronize()
            return self.step
        return graph.replay

    @torch.no_grad()
    def forget(self) -> None:
        """As if no step had been run: what capturing and measuring left is undone."""
        for held in self.optimizer.state.values():
            for value in held.values():
                value.zero_()
        for router, _ in self.routers:
            router.e_score_correction_bias.zero_()

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, batches: int) -> float:
        """Mean loss per token over the start of held-out `tokens`."""
        batch, length = self.ids.shape[0], self.ids.shape[1] - 1
        total = 0.0
        for number in range(batches):
            part = tokens[number * batch * length :][: batch * length + 1].long()
            ids, goal = part[:-1].view(batch, length), part[1:]
            logits = tiny_model.logits_of(self.model, ids).flatten(0, 1)
            total += float(torch.nn.functional.cross_entropy(logits, goal))
        return total / batches

    def save(self, directory: Path) -> None:
        """The masters as transformers' own checkpoint, matrices in BF16; rounded or not is kept."""
        rounded, self.rounded = self.rounded, False
        self.show_masters()
        self.model.save_pretrained(directory, save_original_format=False)
        self.rounded = rounded
        self.show_masters()


def _rounded(name: str, master: Tensor) -> Tensor:
    if is_expert(name):
        return tiny_formats.round_mxfp4(master)
    return tiny_formats.round_fp8(master) if is_dense(name) else master


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to LAST_RATE of the peak."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    done = (step - WARMUP) / max(steps - WARMUP, 1)
    return LEARNING_RATE * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done)))


def train(
    work: Path, steps: int | None, seconds: float, seed: int, batch: int, length: int
) -> None:
    """Train on `work/tokens.npz`, for `steps` or as many as fit into `seconds`; -> work/master."""
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    held = np.load(work / "tokens.npz")
    tokens = torch.from_numpy(held["train"].astype(np.int32))
    valid = torch.from_numpy(held["valid"].astype(np.int32)).to(device)
    frequencies = torch.bincount(tokens, minlength=tiny_model.CONFIG.vocab_size)
    model = tiny_model.build(tiny_model.CONFIG, frequencies, seed)
    tokens = tokens.to(device)
    state = Training(model, device, batch, length)
    every_block = length // tiny_model.CONFIG.csa_ratio
    tiny_model.choose_blocks(model, every_block)
    draw = torch.Generator().manual_seed(seed)
    span = torch.arange(length + 1, device=device)

    def next_batch() -> None:
        starts = torch.randint(len(tokens) - length - 1, (batch,), generator=draw)
        state.ids.copy_(tokens[starts.to(device)[:, None] + span])

    next_batch()
    run = state.capture()
    limit = None if steps is not None else seconds + 8
    report: dict[str, Any] = {"seed": seed, "batch": batch, "length": length, "curve": []}
    if steps is None:
        took = _seconds_a_step(run, device)
        left = seconds - (time.monotonic() - started) - 8  # the second capture, evaluations
        steps = max(int(left / took / 1.06), 2 * WARMUP)
        print(f"{took * 1e3:.1f} ms a step: {steps} steps", flush=True)
    state.forget()
    switch = int(steps * (1 - ROUNDED_SHARE))
    begun = time.monotonic()
    for step in range(steps):
        if step == switch:
            state.save(work / "midway")
            state.rounded = True
            tiny_model.choose_blocks(model, tiny_model.CONFIG.index_topk)
            state.rate.zero_()
            del run
            run = state.capture()
        state.rate.fill_(learning_rate(step, steps))
        if device.type == "cpu":
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
        next_batch()
        run()
        report["steps"] = step + 1
        if step % 20 == 0:
            _wait(device)
            if limit is not None and time.monotonic() - started > limit:
                print(f"out of time after {step + 1} of {steps} steps", flush=True)
                break
        if step % max(steps // EVALUATIONS, 1) == 0 or step == steps - 1:
            _report(state, valid, step, begun, report)
            (work / "report.json").write_text(json.dumps(report, indent=1) + "\n")
            if not math.isfinite(report["curve"][-1]["loss"]):
                raise SystemExit("the loss is not finite")
    report["valid_rounded"] = state.evaluate(valid, _batches(valid, batch * length))
    state.save(work / "master")
    state.rounded = False
    state.show_masters()
    report["valid_master"] = state.evaluate(valid, _batches(valid, batch * length))
    tiny_model.choose_blocks(model, every_block)
    report["valid_master_all_blocks"] = state.evaluate(valid, _batches(valid, batch * length))
    report["seconds"] = time.monotonic() - started
    (work / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "curve"}), flush=True)


def _batches(tokens: Tensor, size: int) -> int:
    return max(min((len(tokens) - 1) // size, 8), 1)


def _seconds_a_step(run: Callable[[], None], device: torch.device) -> float:
    """Measured at a learning rate of zero."""
    count = 20 if device.type == "cuda" else 1
    _wait(device)
    begun = time.monotonic()
    for _ in range(count):
        run()
    _wait(device)
    return (time.monotonic() - begun) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _report(
    state: Training, valid: Tensor, step: int, begun: float, report: dict[str, Any]
) -> None:
    loss, indexers, norm = state.losses.tolist()
    held = state.evaluate(valid, 1)
    seconds = time.monotonic() - begun
    rate = state.ids.shape[0] * (state.ids.shape[1] - 1) * (step + 1) / seconds
    loads = [experts.load.float() for _, experts in state.routers]
    spread = max(float(load.max() / load.mean()) for load in loads)
    report["curve"].append(
        {"step": step, "loss": loss, "valid": held, "indexers": indexers, "norm": norm}
    )
    print(
        f"step {step} loss {loss:.4f} valid {held:.4f} indexers {indexers:.3f} norm {norm:.2f} "
        f"fullest expert {spread:.2f} x mean, {rate:.0f} tokens/s, {seconds:.0f} s",
        flush=True,
    )


def sample(work: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation by the saved masters, on the device; no cache, for a look only."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = tiny_model.DeepseekV4ForCausalLM.from_pretrained(
        work / "master",
        dtype=torch.float32,
        attn_implementation="windowed",
        experts_implementation="all_experts",
    ).to(device)
    ids = torch.tensor([prompt], device=device)
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, tiny_model.logits_of(model, ids)[:, -1:].argmax(-1)], 1)
    return [int(i) for i in ids[0]]


def prepare(work: Path) -> None:
    """Write tokenizer.json, tokens.npz, heldout.txt and text.json into `work`."""
    import sys

    import tiny_text

    vocab = tiny_model.CONFIG.vocab_size
    tokenizer, train_tokens, valid_tokens, heldout, digest = tiny_text.prepare(vocab)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(work / "tokenizer.json"), pretty=True)
    np.savez_compressed(work / "tokens.npz", train=train_tokens, valid=valid_tokens)
    (work / "heldout.txt").write_text(heldout)
    facts = {
        "python": sys.version.split()[0],
        "sha256": digest,
        "train_tokens": len(train_tokens),
        "valid_tokens": len(valid_tokens),
    }
    (work / "text.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("prepare", "train", "sample", "export"))
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seconds", type=float, default=180.0, help="when --steps is not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--length", type=int, default=LENGTH)
    given = parser.parse_args()
    if given.what == "prepare":
        prepare(given.work)
    elif given.what == "train":
        train(given.work, given.steps, given.seconds, given.seed, given.batch, given.length)
    elif given.what == "sample":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(given.work / "tokenizer.json"))
        prompt = tokenizer.encode("<｜begin▁of▁sentence｜>class Stack:\n    ").ids
        print(tokenizer.decode(sample(given.work, prompt, 200)))
    else:
        from tiny_export import export

        export(given.work, given.out)


if __name__ == "__main__":
    main()
