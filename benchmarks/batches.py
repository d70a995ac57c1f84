"""The samples that ours trains on, in its order, as transformers and TRL take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nexa_train.backends.base import RankContext
from nexa_train.data.batches import Split


@dataclass(frozen=True)
class Padded:
    """A batch padded on the right to its longest row.

    Attributes:
        batch: input_ids, labels and attention_mask, int64 [rows, length] each.
        tokens: real ones. targets: that count in the loss.
    """

    batch: dict[str, Tensor]
    tokens: int
    targets: int

    @classmethod
    def of(cls, split: Split, rows: Sequence[int]) -> Padded:
        """These rows of a split."""
        pairs = [split.labelled(row) for row in rows]
        ids, labels = ([torch.from_numpy(part) for part in parts] for parts in zip(*pairs, strict=True))
        columns = {"input_ids": (ids, 0), "labels": (labels, -100)}
        columns["attention_mask"] = ([torch.ones_like(each) for each in ids], 0)
        batch = {name: pad_sequence(parts, True, value) for name, (parts, value) in columns.items()}
        return cls(batch, sum(map(len, ids)), int((batch["labels"][:, 1:] != -100).sum()))


def in_order(context: RankContext) -> dict[str, list[Any]]:
    """One epoch as the columns input_ids and labels, which TRL takes as prepared."""
    order = [context.order.at(position) for position in range(context.train.num_sequences)]
    pairs = [context.train.labelled(row) for row in order if row is not None]
    return {"input_ids": [ids for ids, _ in pairs], "labels": [labels for _, labels in pairs]}


def dense_loss(model: Any, split: Split) -> float:
    """Mean loss over a split's target tokens, by the model's own logits."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in range(split.num_sequences):
            padded = Padded.of(split, [row])
            labels = padded.batch["labels"][:, 1:]
            logits = model(input_ids=padded.batch["input_ids"], use_cache=False).logits[:, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            count += padded.targets
    return total / count
