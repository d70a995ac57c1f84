"""What people write with transformers.Trainer: load model and tokenised data, train. Says when one step is done."""

from __future__ import annotations

import sys
import tempfile
from typing import Any

from datasets import load_from_disk
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class _Say(TrainerCallback):
    def on_step_end(self, *_: Any, **__: Any) -> None:
        print("step", flush=True)


def main(model: str, dataset: str) -> None:
    """Train until somebody ends it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,
            max_steps=100,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(
            model=AutoModelForCausalLM.from_pretrained(model),
            args=arguments,
            train_dataset=load_from_disk(dataset),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=[_Say()],
        ).train()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
