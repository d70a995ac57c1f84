"""GGUF file -> model folder with safetensors. Run as `python -m nexa_train.models.gguf FILE FOLDER`.

A process of its own, called by `locate.py`: it alone needs torch for this.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(source: Path, folder: Path) -> None:
    """De-quantise `source` to float32 and write it with its tokenizer into `folder`."""
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The weights are plain floats now; with these left on, transformers takes them for quantised ones
    # and refuses to save.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
