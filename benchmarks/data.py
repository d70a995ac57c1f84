"""Data preparation beside TRL's and beside the tokenizer alone, by turns, each turn in a process of its own.

    python -m benchmarks.data --data gsm8k_train.jsonl
    python -m benchmarks.data --data ROWS --model FOLDER --rounds 5

Rows have a question and an answer. Ours is all of `prepare`: read, render, tokenise, mask, pack, write, digest. TRL's
is what SFTTrainer does to a data set that is in memory already, with the same chat template and completion-only loss.
Raw is one `encode_batch` over the rendered texts. Imports and loading the tokenizer count for nobody.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import environment, peak_bytes
from benchmarks.report import Part, Target
from nexa_train.config import JobSpec
from nexa_train.config.spec import ModelSpec
from nexa_train.data.pack import pack
from nexa_train.data.read import read_rows
from nexa_train.data.render import render_rows
from nexa_train.data.tokenizer import load_tokenizer
from nexa_train.models.locate import locate

CAPACITIES = (512, 1024)
MANY = 1_000_000


def spec_of(rows: str, max_seq_len: int, *, packing: bool) -> JobSpec:
    data = {"remote_uri": rows, "format": "question_answer", "packing": packing}
    return JobSpec.model_validate({"data": data, "model": {"max_seq_len": max_seq_len}})


def ours(rows: str, model: str, *, packing: bool) -> dict[str, Any]:
    from nexa_train.data.prepare import prepare

    tokenizer = load_tokenizer(Path(model))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["NEXA_CACHE"] = cache
        start = time.perf_counter()
        audit = prepare(spec_of(rows, CAPACITIES[1], packing=packing), tokenizer).audit["train"]
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": audit.tokens, "targets": audit.targets}


def raw(rows: str, model: str) -> dict[str, Any]:
    tokenizer, spec = load_tokenizer(Path(model)), spec_of(rows, CAPACITIES[1], packing=False)
    rendered = render_rows(read_rows(rows).rows(), data=spec.data, method=spec.method, tokenizer=tokenizer)
    texts = [each.text for each in rendered]
    start = time.perf_counter()
    encoded = tokenizer.fast.encode_batch(texts, add_special_tokens=False)
    return {"seconds": time.perf_counter() - start, "tokens": sum(map(len, encoded)), "targets": None}


def trl(rows: str, model: str, **settings: Any) -> dict[str, Any]:
    from datasets import Dataset, disable_caching
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    took = []

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            prepared = super()._prepare_dataset(*args, **kwargs)
            took.append(time.perf_counter() - start)
            return prepared

    disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(model)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    pairs = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    chats = [
        {
            "prompt": [{"role": "user", "content": pair["question"]}],
            "completion": [{"role": "assistant", "content": pair["answer"]}],
        }
        for pair in pairs
    ]
    with tempfile.TemporaryDirectory() as folder:
        fixed = {"output_dir": folder, "report_to": "none", "use_cpu": True, "max_length": CAPACITIES[1]}
        trainer = Timed(
            model=LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)),
            args=SFTConfig(**fixed, **settings),
            train_dataset=Dataset.from_list(chats),
            processing_class=tokenizer,
        )
        prepared = trainer.train_dataset.with_format("numpy")
        tokens = sum(len(ids) for ids in prepared["input_ids"])
        targets = sum(int((labels != -100).sum()) for labels in prepared["labels"])
    return {"seconds": sum(took), "tokens": tokens, "targets": targets}


SIDES: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "raw encode_batch": raw,
    "nexa": lambda rows, model: ours(rows, model, packing=False),
    "nexa, packed": lambda rows, model: ours(rows, model, packing=True),
    "TRL": trl,
    "TRL, packed": lambda rows, model: trl(rows, model, packing=True),
    "TRL, two processes": lambda rows, model: trl(rows, model, dataset_num_proc=2),
}


def preparation_part(rows: str, model: str, rounds: int) -> Part:
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, turns in found.items():
            turns.append(_turn(side, rows, model))
    seconds = {side: statistics.median(turn["seconds"] for turn in turns) for side, turns in found.items()}
    table = [
        (
            side,
            seconds[side],
            ", ".join(f"{turn['seconds']:.2f}" for turn in turns),
            turns[0]["tokens"],
            turns[0]["targets"],
            round(statistics.median(turn["peak"] for turn in turns) / 2**20),
        )
        for side, turns in found.items()
    ]
    return Part(
        f"Data preparation: {read_rows(rows).num_rows} rows of {Path(rows).name} to ready",
        ("side", "seconds", "each", "tokens", "learnt", "peak MiB"),
        table,
        [
            Target("TRL / nexa", seconds["TRL"] / seconds["nexa"], 4.0),
            Target("TRL packed / nexa packed", seconds["TRL, packed"] / seconds["nexa, packed"], 4.0),
            Target("raw encode_batch / nexa", seconds["raw encode_batch"] / seconds["nexa"], 0.7),
            Target("raw encode_batch / nexa packed", seconds["raw encode_batch"] / seconds["nexa, packed"], 0.7),
        ],
    )


def packing_part(rows: str, model: str) -> Part:
    tokenizer, spec = load_tokenizer(Path(model)), spec_of(rows, max(CAPACITIES), packing=False)
    rendered = render_rows(read_rows(rows).rows(), data=spec.data, method=spec.method, tokenizer=tokenizer)
    encoded = tokenizer.fast.encode_batch([each.text for each in rendered], add_special_tokens=False)
    lengths = np.array([len(each) for each in encoded])
    many = np.random.default_rng(0).choice(lengths, MANY)
    table, targets = [], []
    for what, some in ((f"{len(lengths)} rows", lengths), (f"{MANY} drawn from them", many)):
        for capacity in CAPACITIES:
            start = time.perf_counter()
            bins = pack(np.minimum(some, capacity), capacity)
            seconds = time.perf_counter() - start
            share = float(np.minimum(some, capacity).sum() / (len(bins) * capacity))
            table.append((what, capacity, len(bins), share, seconds))
            targets.append(Target(f"places filled, {what}, {capacity}", share, 0.95))
    return Part("Packing", ("samples", "tokens a sequence", "sequences", "filled", "seconds"), table, targets)


def _turn(side: str, rows: str, model: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.data", "--data", rows, "--model", model, "--side", side]
    variables = environment(len(os.sched_getaffinity(0))) | {"TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Data preparation beside TRL's.")
    parser.add_argument("--data", default=os.environ.get("NEXA_BENCH_DATA"), help="rows (NEXA_BENCH_DATA)")
    parser.add_argument("--model", help="a model folder; default: SmolLM2-135M-Instruct of this environment")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if not flags.data or not Path(flags.data).is_file():
        print(f"benchmarks.data: skipped: no data at {flags.data or 'NEXA_BENCH_DATA'}", file=sys.stderr)
        return
    model = flags.model or str(locate(ModelSpec(name="smollm2-135m-instruct")).folder)
    if flags.side:
        print(json.dumps(SIDES[flags.side](flags.data, model) | {"peak": peak_bytes()}))
        return
    print(packing_part(flags.data, model).text())
    print(preparation_part(flags.data, model, flags.rounds).text())


if __name__ == "__main__":
    main()
