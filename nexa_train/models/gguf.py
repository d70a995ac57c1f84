"""GGUF file -> model folder with safetensors. Run as `python -m nexa_train.models.gguf FILE FOLDER`.

A process of its own, called by `locate.py`: it alone needs torch for this. transformers reads the file, and leaves out
without a word what it has no place for; what would make another model of it is refused here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from nexa_train.errors import ConfigError

_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Each digit alone, then GPT-2's split: one case in llama.cpp (llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM)."""
_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais")
"""GPT-2's split alone, which is what transformers takes for every name that it does not know."""
_LAYERS_OF_27B = "46"
"""By which llama.cpp knows it (llama-model.cpp): its heads' scores are divided by the root of 144, not of 128."""
_INSTEAD = "give the model's folder with safetensors, or its hub id"


def convert(source: Path, folder: Path) -> None:
    """De-quantise `source` to float32 and write it with its tokenizer into `folder`.

    Raises:
        ConfigError: it would not be the model that the file describes.
    """
    file = GGUFReader(source)
    _check_head(file)
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    _split_as(file, tokenizer)
    tokenizer.save_pretrained(folder)
    model, told = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
    _check_weights(file, model, sorted(told["missing_keys"]))
    # The weights are plain floats now; with these left on, transformers takes them for quantised ones
    # and refuses to save.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.save_pretrained(folder)


def _field(file: GGUFReader, key: str) -> str | None:
    """A text of the file's head; None: it is not there."""
    field = file.get_field(key)
    return None if field is None else str(field.contents())


def _check_head(file: GGUFReader) -> None:
    """What can be told before anything is made of it.

    llama.cpp keeps what scales rotary positions in a tensor or in keys; transformers reads neither.
    """
    parts = _field(file, "split.count")
    if parts is not None and int(parts) > 1:
        raise ConfigError(f"it is one of {parts} parts; merge them first (llama-gguf-split --merge)")
    if _field(file, "general.architecture") == "gemma2" and _field(file, "gemma2.block_count") == _LAYERS_OF_27B:
        raise ConfigError(f"it is Gemma 2's 27B, whose scaling of scores is not in a GGUF file; {_INSTEAD}")
    if scaled := [*_scaling_of_positions(file)]:
        raise ConfigError(
            f"it scales its rotary positions ({', '.join(scaled)}), which is not read from a GGUF file; {_INSTEAD}"
        )


def _scaling_of_positions(file: GGUFReader) -> Iterator[str]:
    """What of the file scales rotary positions. Without a type a factor is one of linear scaling (llama-model.cpp)."""
    yield from (tensor.name for tensor in file.tensors if tensor.name.startswith("rope_"))
    types = {key: _field(file, key) for key in file.fields if key.endswith(".rope.scaling.type")}
    yield from (f"{key} {kind}" for key, kind in types.items() if kind != "none")
    if not types:
        factors = (key for key in file.fields if key.endswith((".rope.scaling.factor", ".rope.scale_linear")))
        yield from (f"{key} {factor}" for key in factors if float(factor := _field(file, key) or 0) not in (0, 1))


def _split_as(file: GGUFReader, tokenizer: PreTrainedTokenizerFast) -> None:
    """Have a byte-level tokenizer cut texts before it merges as the model's own does."""
    name = _field(file, "tokenizer.ggml.pre")
    if _field(file, "tokenizer.ggml.model") != "gpt2" or name in GGUF_PRE_TOKENIZER_SPLITS or name in _GPT2:
        return
    if name not in _DIGITS_APART:
        raise ConfigError(
            f"its tokenizer cuts texts by {name or 'a rule that it does not name'}, which is not known here; {_INSTEAD}"
        )
    apart = pre_tokenizers.Digits(individual_digits=True)
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([apart, by_bytes])


def _check_weights(file: GGUFReader, model: torch.nn.Module, missing: list[str]) -> None:
    """Each weight of the model is one of the file's, and none of these is left over."""
    if missing:
        raise ConfigError(f"it lacks {len(missing)} weights of the model, such as {', '.join(missing[:3])}")
    num_taken = sum(1 for _ in model.parameters())
    if num_taken != len(file.tensors):
        raise ConfigError(
            f"it holds {len(file.tensors)} tensors, of which the model as it is read takes {num_taken}; {_INSTEAD}"
        )


if __name__ == "__main__":
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except ConfigError as refused:
        print(refused, file=sys.stderr)
        sys.exit(refused.exit_code)
