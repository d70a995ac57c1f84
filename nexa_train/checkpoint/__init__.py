"""What a backend staged <-> files: the same for every backend and world size.

A checkpoint is a folder of

    model.safetensors | adapter_model.safetensors   the trained weights, loadable by transformers | PEFT
    config.json | adapter_config.json               beside them, as those libraries expect
    tokenizer.json, ...                             the tokenizer's files, unchanged
    optimizer.safetensors                           the optimiser's tensors: KEY.NAME, as in exp_avg.NAME
    state.json                                      the step

Every rank writes the tensors that it owns, whole. With several ranks, or beyond `files.SHARD_BYTES`, model and
optimizer are split as transformers splits them: STEM-00001-of-00003.safetensors and so on, and
STEM.safetensors.index.json beside them. An adapter stays in one file: PEFT reads no other.

Nothing is pickled. `state` takes tensors out of torch and puts them back, `files` knows the format, `saver`
writes and commits in the background. Before: a backend's `stage`. After: `artifact.publish`.
"""

from __future__ import annotations

from nexa_train.checkpoint.files import Saved
from nexa_train.checkpoint.saver import PATIENCE, Saver
from nexa_train.checkpoint.state import (
    Buffers,
    TorchState,
    adapter_files,
    check_fits,
    model_files,
    trained_parameters,
)

__all__ = [
    "PATIENCE",
    "Buffers",
    "Saved",
    "Saver",
    "TorchState",
    "adapter_files",
    "check_fits",
    "model_files",
    "trained_parameters",
]
