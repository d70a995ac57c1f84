"""Head and loss alone, forward and backward: dense logits, TRL's chunks, ours, on one model without layers.

Embedding (frozen) and final norm feed the head of each, so that all go through their public interfaces; what is
timed and what is held in memory is the head's. In a process of its own: `python -m benchmarks.head SETTINGS`.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import Part, Target
from benchmarks.sides import Bench
from nexa_train.launch.work import RankWork
from nexa_train.models.locate import architecture

TRL_OUTPUTS = ("log_probs", "entropy", "is_top1")
"""What SFTTrainer asks of its fused head."""


def head_part(bench: Bench, model: Path) -> Part:
    """The head over one step's batch, with the answers alone as targets, and with every token."""
    rows, targets = [], []
    for train_on in ("assistant", "all"):
        method, rows_per_step = {"type": "sft", "train_on": train_on}, 4 if bench.quick else 8
        work = bench.work(f"head-{train_on}", model, rows_per_step=rows_per_step, method=method)
        found = _measure(bench, work, rounds=2 if bench.quick else 7)
        rows += [(train_on, name, *side.values()) for name, side in found.items()]
        mine, peer, dense = (found[name] for name in ("nexa", "trl chunks", "dense logits"))
        targets += [
            Target(f"{train_on}: speed, nexa / trl chunks", peer["seconds"] / mine["seconds"], 1.2),
            Target(f"{train_on}: memory, dense logits / nexa", dense["bytes"] / mine["bytes"], 10.0),
        ]
    columns = ("targets", "side", "seconds", "summed loss", "temporary bytes at the peak")
    return Part("Head and loss, forward and backward, d_model 256, 49,152 tokens", columns, rows, targets)


def _measure(bench: Bench, work: RankWork, *, rounds: int) -> dict[str, dict[str, float]]:
    path = bench.folder / f"{work.job.metadata.name}.json"
    path.write_text(json.dumps({"work": work.to_dict(), "rounds": rounds}))
    command = [sys.executable, "-m", "benchmarks.head", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=bench.environment(work), check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Print seconds, bytes and losses by side."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    work = RankWork.from_dict(settings["work"])
    sizes = architecture(work.job.spec.model, work.located)
    assert sizes is not None
    sides = _sides(work)
    losses = {name: run() for name, run in sides.items()}  # warms up too
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(settings["rounds"]):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    gradient = 4 * sizes.vocab_size * sizes.d_model
    found = {
        name: {
            "seconds": statistics.median(seconds[name]),
            "loss": losses[name],
            "bytes": _held_bytes(run, gradient),
        }
        for name, run in sides.items()
    }
    print(json.dumps(found))


def _sides(work: RankWork) -> dict[str, Callable[[], float]]:
    """By name: a function that takes one real batch forward and backward, and returns its summed loss."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from benchmarks.batches import Padded
    from nexa_train.loop import batch_loss
    from nexa_train.losses import CausalLoss
    from nexa_train.rank import configure, make_context

    configure(work, 0)
    context = make_context(work, 0, 1)
    config = LlamaConfig.from_pretrained(work.located.folder, num_hidden_layers=0, tie_word_embeddings=False)
    torch.manual_seed(0)
    dense = LlamaForCausalLM(config)
    dense.model.embed_tokens.weight.requires_grad_(False)
    chunked, ours = copy.deepcopy(dense), CausalLoss(copy.deepcopy(dense))
    add_fused_lm_head(chunked, outputs=TRL_OUTPUTS)
    rows = context.step_sequences(0)
    batch, labelled = context.train.batch(rows), Padded.of(context.train, rows)

    def backward(loss: Any, model: Any) -> float:
        (loss / labelled.targets).backward()
        model.zero_grad(set_to_none=True)
        return float(loss)

    return {
        "dense logits": lambda: backward(dense(**labelled.batch).loss * labelled.targets, dense),
        "trl chunks": lambda: backward(chunked(**labelled.batch, fused_lm_head=True).loss * labelled.targets, chunked),
        "nexa": lambda: backward(batch_loss(ours, batch), ours),
    }


def _held_bytes(run: Callable[[], float], gradient_bytes: int) -> int:
    """What one run holds at its peak beyond the gradient of the head, which is its result; by torch's allocator."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    held = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak - gradient_bytes


if __name__ == "__main__":
    main()
