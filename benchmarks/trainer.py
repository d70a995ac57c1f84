"""Training speed and memory beside TRL and a plain loop: every side in one run, by turns.

    make bench                                  with data preparation and checkpoints
    python -m benchmarks.trainer                some 15 minutes
    python -m benchmarks.trainer --quick        sft and head only, in 3
    python -m benchmarks.trainer --only bf16    where the processor has units for it
    python -m benchmarks.trainer --only search  which of TRL's settings are fastest here

What is compared, and how to read it, is in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.head import head_part
from benchmarks.report import Part, Target
from benchmarks.sides import Bench, Side
from benchmarks.starts import resume_part, startup_part
from nexa_train.config.spec import ModelSpec
from nexa_train.launch.work import RankWork
from nexa_train.models.locate import architecture, locate

PEER = {"activation_checkpointing": False, "logging_steps": 1000}
"""What any user of TRL who wants speed and has the memory turns off."""

TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "padded": {},
    "sorted by length": {"train_sampling_strategy": "group_by_length"},
    "row by row": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "per_device_train_batch_size": 2},
    "packed one by one": {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "packed to 512 one by one": {
        "packing": True,
        "max_length": 512,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
    },
    "a worker loads": {"train_sampling_strategy": "group_by_length", "dataloader_num_workers": 1},
    "compiled": {"train_sampling_strategy": "group_by_length", "torch_compile": True},
}
"""What makes TRL faster on a CPU, all with `PEER`; `--only search` compares them."""

TRL_CHOSEN = ("row by row", "packed to 512 one by one", "sorted by length")
"""All take part, the fastest of a run counts: the two that `--only search` found fastest, and the one that keeps TRL's
batch of eight rows."""

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}


def sft_part(bench: Bench, model: Path, precision: str = "fp32") -> Part:
    """Full fine-tuning of the 18 M llama, all sides at the same precision."""
    turn, rounds = (1, 3) if bench.quick else (5_000, 5)
    bf16 = precision == "bf16"
    work = bench.work(f"sft-{precision}", model, training={"precision": precision})
    packed = bench.work(f"sft-packed-{precision}", model, packed=True, training={"precision": precision})
    ours = [bench.nexa("nexa", work, turn), bench.nexa("nexa packed", packed, turn)]
    tuned = [bench.trl(f"trl {name}", work, turn, PEER | {"bf16": bf16} | TRL_SETTINGS[name]) for name in TRL_CHOSEN]
    loop = bench.plain("plain loop", work, turn, bf16=bf16)
    defaults = [bench.trl("trl defaults", work, 1, {"bf16": bf16})]
    if not bench.quick:
        defaults.append(bench.trl("trl defaults, packed", work, 1, {"bf16": bf16, "packing": True}))
    for side in defaults:
        side.rounds = 1
    sides = [*ours, *tuned, loop, *defaults]
    limits: list[float] = []
    bench.by_turns(
        sides, rounds, measure=lambda: limits.append(machine.matmul_limit(bench.threads, precision)[precision])
    )
    limit = statistics.median(limits)
    fastest, peer = max(ours, key=_rate), max(tuned, key=_rate)
    rival = max([peer, loop], key=_rate)
    nominal, needed = (flops * fastest.rate / limit for flops in _flops(work, fastest))
    targets = [
        *(Target(f"{fastest.name} / {side.name}", fastest.rate / side.rate, 4.0) for side in defaults),
        Target(f"{fastest.name} / {rival.name}, the better of TRL tuned and a plain loop", _over(fastest, rival), 1.3),
        Target("share of the matmul limit, 6 x parameters a real token", nominal, 0.65),
        Target(f"peak memory, {fastest.name} / {peer.name}", fastest.peak / peer.peak, 0.8, at_most=True),
        Target("a step's loss on the same rows, relative difference", _apart(ours[0], loop), 1e-3, at_most=True),
    ]
    notes = [
        f"the limit: {limit / 1e9:.4g} GFLOP/s, the median of the best of each round",
        f"share of it with the head counted for target tokens only: {needed:.3g}",
    ]
    title = f"SFT on GSM8K, llama of {_parameters(work) / 1e6:.1f} M with 49,152 tokens, {precision}"
    return Part(title, _COLUMNS, _rows(sides), targets, notes)


def lora_part(bench: Bench) -> Part:
    """LoRA of rank 16 on every linear layer of SmolLM2-135M."""
    turn, rounds = 1, 2
    model = locate(ModelSpec(name="smollm2-135m-instruct")).folder
    tuning = {"type": "lora", "rank": LORA["r"], "alpha": LORA["lora_alpha"]}
    one_by_one = {"microbatch_size_per_gpu": 1}  # as the peer's: what is alive at once decides both sides' memory
    work = bench.work("lora", model, held_out=8, tuning=tuning, training=one_by_one)
    short = {"name": str(model), "max_seq_len": 512}
    packed = bench.work("lora-packed", None, held_out=8, packed=True, model=short, tuning=tuning, training=one_by_one)
    ours = [bench.nexa("nexa", work, turn), bench.nexa("nexa packed to 512", packed, turn)]
    tuned = [
        bench.trl(f"trl {name}", work, turn, PEER | {"bf16": False} | TRL_SETTINGS[name], lora=LORA)
        for name in TRL_CHOSEN[:2]  # eight rows at once take 20 GB of logits
    ]
    sides = [*ours, *tuned]
    bench.by_turns(sides, rounds)
    peer = max(tuned, key=_rate)
    targets = [Target(f"{side.name} / {peer.name}", _over(side, peer), 1.2) for side in ours]
    # Each beside the peer's run with as many tokens alive at once.
    targets += [
        Target(f"peak memory, {side.name} / {other.name}", side.peak / other.peak, 0.8, at_most=True)
        for side, other in zip(ours, tuned, strict=True)
    ]
    return Part("LoRA of rank 16 on SmolLM2-135M, GSM8K, fp32", _COLUMNS, _rows(sides), targets)


def search_part(bench: Bench, model: Path) -> Part:
    """TRL's settings beside each other, the fastest on this machine first."""
    turn, rounds = 1, 3
    work = bench.work("search", model)
    sides = [
        bench.trl(f"trl {name}", work, turn, PEER | {"bf16": False} | config) for name, config in TRL_SETTINGS.items()
    ]
    bench.by_turns(sides, rounds)
    return Part("TRL's settings, the fastest first, fp32", _COLUMNS, _rows(sorted(sides, key=_rate, reverse=True)))


_COLUMNS = (
    "side",
    "real tokens/s",
    "per CPU second",
    "peak MiB",
    "padding",
    "tokens seen",
    "first loss",
    "held-out loss",
)


def _rows(sides: list[Side]) -> list[tuple[str | float | int | None, ...]]:
    return [
        (
            side.name,
            side.rate,
            side.cpu_rate,
            side.peak >> 20,
            f"{1 - _sum(side, 'tokens') / _sum(side, 'positions'):.0%}" if "nexa" not in side.name else None,
            _sum(side, "tokens"),
            f"{side.steps[0]['loss']:.6f}",
            f"{side.validation_loss:.4f}",
        )
        for side in sides
    ]


def _sum(side: Side, what: str) -> int:
    return sum(step[what] for step in side.steps)


def _rate(side: Side) -> float:
    return side.rate


def _over(side: Side, other: Side) -> float:
    return side.rate / other.rate


def _apart(side: Side, other: Side) -> float:
    """Between two sides that saw the same rows in the same order."""
    losses = [[step["loss"] for step in each.steps] for each in (side, other)]
    return max(abs(a - b) / b for a, b in zip(*losses, strict=False))


def _flops(work: RankWork, side: Side) -> tuple[int, float]:
    """FLOPs a real token: 6 a parameter that multiplies it (forward 2, backward 4; Kaplan et al. 2020).

    Attention's products of tokens with tokens are left out, as usual, and so is what any side computes twice.

    Returns:
        Nominal, the head counted for every token; and what is needed, where only target tokens have a loss.
    """
    sizes = architecture(work.job.spec.model, work.located)
    assert sizes is not None
    head = sizes.vocab_size * sizes.d_model
    share = _sum(side, "targets") / _sum(side, "tokens")
    return 6 * (sizes.num_linear_parameters + head), 6 * (sizes.num_linear_parameters + head * share)


def _parameters(work: RankWork) -> int:
    sizes = architecture(work.job.spec.model, work.located)
    assert sizes is not None
    return sizes.num_parameters


def make_llama(folder: Path) -> Path:
    """A llama of 18 M parameters, two thirds of them the embedding of SmolLM2's tokenizer, saved with it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    source = locate(ModelSpec(name="smollm2-135m-instruct")).folder
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder / name)
    return folder


def main() -> int:
    """Run the parts that were asked for; print tables, and write JSON where asked."""
    options = _options()
    if options.data is None or not options.data.is_file():
        print(
            f"benchmarks.trainer: skipped: no data at {options.data or 'NEXA_BENCH_DATA'}; give a JSON Lines file with "
            "columns question and answer (GSM8K's train.jsonl) by --data or NEXA_BENCH_DATA",
            file=sys.stderr,
        )
        return 0
    with tempfile.TemporaryDirectory(prefix="nexa-bench-") as name:
        folder = Path(name)
        model = make_llama(folder / "llama-18m")
        limit = machine.matmul_limit(options.threads, "fp32", "bf16")
        bench = Bench(options.data.resolve(), folder, options.quick, options.threads)
        facts = machine.facts(options.threads) | {"matmul_limit": limit, "quick": options.quick}
        facts["date"] = datetime.now(UTC).isoformat(timespec="minutes")
        print("\n".join(f"{key}: {value}" for key, value in facts.items()) + "\n", flush=True)
        parts = [_run(part) for part in _chosen(bench, model, options.only)]
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "parts": [p.document() for p in parts]}, indent=1) + "\n")
    return 0


def _chosen(bench: Bench, model: Path, only: list[str]) -> list[Callable[[], Part]]:
    known: dict[str, Callable[[], Part]] = {
        "sft": lambda: sft_part(bench, model),
        "bf16": lambda: sft_part(bench, model, "bf16"),
        "lora": lambda: lora_part(bench),
        "head": lambda: head_part(bench, model),
        "startup": lambda: startup_part(bench, model),
        "resume": lambda: resume_part(bench),
        "search": lambda: search_part(bench, model),
    }
    return [known[name] for name in only or (QUICK if bench.quick else USUAL)]


def _run(part: Callable[[], Part]) -> Part:
    done = part()
    print(done.text(), flush=True)
    return done


QUICK = ("sft", "head")
USUAL = (*QUICK, "lora", "startup", "resume")
PARTS = (*USUAL, "bf16", "search")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = os.environ.get("NEXA_BENCH_DATA")
    parser.add_argument("--data", type=Path, default=Path(given) if given else None, help="rows (NEXA_BENCH_DATA)")
    parser.add_argument("--quick", action="store_true", help="fewer parts, shorter turns")
    parser.add_argument("--threads", type=int, default=2, help="of every side (2)")
    parser.add_argument("--only", action="append", choices=PARTS, default=[], help="a part; may be given again")
    parser.add_argument("--json", type=Path, help="write everything there as well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
