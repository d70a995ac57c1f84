"""One side of a comparison, in a process of its own, that trains only when it is its turn.

`trainer.py` starts it and writes a line to its standard input for every turn: `{"tokens": N}` to train until N real
tokens have gone through, `{}` to stop. It answers each with a line of JSON. So that several sides can take turns at
one machine, A B C A B C, without paying their start again, and each keeps a peak memory of its own.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from benchmarks.machine import peak_bytes

if TYPE_CHECKING:
    from nexa_train.backends.base import RankContext


@dataclass(frozen=True)
class Step:
    """One optimiser step: real tokens, positions computed (with padding), target tokens, mean loss over these."""

    tokens: int
    positions: int
    targets: int
    loss: float


class Turns:
    """Holds a training loop between two steps until its next turn."""

    def __init__(self, inbox: TextIO, outbox: TextIO) -> None:
        self.inbox, self.outbox = inbox, outbox
        self.steps: list[Step] = []

    def begin(self) -> bool:
        """Ready to train: wait for the first turn. Returns whether to stop instead."""
        self.tell({"ready": True})
        return self._wait()

    def after_step(self, step: Step) -> bool:
        """To be called after each optimiser step; returns whether to stop."""
        self.steps.append(step)
        if sum(step.tokens for step in self.steps) < self.wanted:
            return False
        seconds, cpu = time.perf_counter() - self.since, time.process_time() - self.cpu_since
        self.tell({"seconds": seconds, "cpu_seconds": cpu, "steps": [asdict(step) for step in self.steps]})
        return self._wait()

    def tell(self, document: dict[str, Any]) -> None:
        """Answer with one line."""
        self.outbox.write(json.dumps(document) + "\n")
        self.outbox.flush()

    def _wait(self) -> bool:
        self.steps = []
        command = json.loads(self.inbox.readline() or "{}")
        self.wanted = command.get("tokens", 0)
        self.since, self.cpu_since = time.perf_counter(), time.process_time()
        return not self.wanted


Validate = Callable[[], float | None]
"""Mean loss over the held-out rows, after training."""


def nexa(settings: dict[str, Any], turns: Turns) -> Validate:
    """What a rank does, but for the artifacts: the product's own context, backend and loop."""
    from nexa_train.backends import make_backend
    from nexa_train.launch.work import RankWork
    from nexa_train.rank import configure, make_context

    work = RankWork.from_dict(settings["work"])
    configure(work, 0)
    context = make_context(work, 0, 1)
    backend = make_backend(context)
    backend.setup()

    def after_step(metrics: Any) -> bool:
        sequences = context.step_sequences(metrics.step - 1)
        targets = context.train.num_targets(sequences)
        return turns.after_step(Step(metrics.tokens, metrics.tokens, targets, metrics.loss))

    if not turns.begin():
        backend.train(after_step)
    return backend.validate


def plain(settings: dict[str, Any], turns: Turns) -> Validate:
    """The loop that everybody writes first: pad, forward with labels, backward, clip, step; dense logits."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.batches import Padded, dense_loss

    context = _context(settings)
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"], weight_decay=0.0, fused=True)
    model.train()
    bf16 = settings.get("bf16", False)
    stop, number = turns.begin(), 0
    while not stop:
        padded = Padded.of(context.train, context.step_sequences(number))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**padded.batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        positions = padded.batch["input_ids"].numel()
        stop = turns.after_step(Step(padded.tokens, positions, padded.targets, loss.item()))
        number += 1
    return lambda: dense_loss(model, context.validation)


def trl(settings: dict[str, Any], turns: Turns) -> Validate:
    """TRL's SFTTrainer with the given SFTConfig keys over its own defaults; it packs and pads by itself."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from benchmarks.batches import dense_loss, in_order

    class Counting(SFTTrainer):
        seen: list[tuple[Any, ...]] = []

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            positions, labels = inputs["input_ids"].numel(), inputs["labels"]
            tokens = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else positions
            targets = int((labels[:, 1:] != -100).sum())
            loss = super().training_step(model, inputs, *args, **kwargs)
            # Already divided by the target tokens of the whole step, so microbatches add up.
            self.seen.append((tokens, positions, targets, loss))
            return loss

    class Stepped(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            tokens, positions, targets, losses = zip(*Counting.seen, strict=True)
            Counting.seen = []
            step = Step(sum(tokens), sum(positions), sum(targets), float(sum(losses)))
            control.should_training_stop |= turns.after_step(step)
            return control

    context = _context(settings)
    peft = None
    if settings.get("lora"):
        from peft import LoraConfig

        peft = LoraConfig(task_type="CAUSAL_LM", bias="none", target_modules="all-linear", **settings["lora"])
    with tempfile.TemporaryDirectory() as folder:
        fixed = {"output_dir": folder, "use_cpu": True, "report_to": "none", "save_strategy": "no", "max_steps": 10_000}
        same = {"learning_rate": settings["lr"], "lr_scheduler_type": "constant", "disable_tqdm": True, "seed": 7}
        rows = in_order(context)
        if settings.get("all_tokens"):
            rows = {"input_ids": rows["input_ids"], "labels": rows["input_ids"]}
        trainer = Counting(
            model=str(settings["model"]),
            args=SFTConfig(**fixed, **same, **settings["config"]),
            train_dataset=Dataset.from_dict(rows),
            processing_class=AutoTokenizer.from_pretrained(settings["model"]),
            peft_config=peft,
            callbacks=[Stepped()],
        )
        if not turns.begin():
            trainer.train()
    return lambda: dense_loss(trainer.model, context.validation)


def _context(settings: dict[str, Any]) -> RankContext:
    from nexa_train.launch.work import RankWork
    from nexa_train.rank import make_context

    return make_context(RankWork.from_dict(settings["work"]), 0, 1)


def main() -> None:
    """Train by turns; at the end, report memory and held-out loss."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    # What libraries print must not land between the answers.
    outbox = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    turns = Turns(sys.stdin, outbox)
    validate = {"nexa": nexa, "plain": plain, "trl": trl}[settings["engine"]](settings, turns)
    peak = peak_bytes()
    turns.tell({"peak_bytes": peak, "validation_loss": validate() if settings.get("validate", True) else None})


if __name__ == "__main__":
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    main()
