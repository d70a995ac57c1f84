"""Which files of a model folder hold its weights: as transformers finds them. Used by `decoder.py`; no torch."""

from __future__ import annotations

from pathlib import Path

from nexa_train.data.tokenizer import read_object
from nexa_train.errors import ConfigError

WHOLE = "model.safetensors"
INDEX = f"{WHOLE}.index.json"


def weight_files(folder: Path) -> dict[Path, frozenset[str] | None]:
    """The files, in a stable order, each with the names of the weights to take from it; None: all that it has.

    A folder may hold others: variants in another precision, the shards of an earlier save, an optimiser.

    Raises:
        ConfigError: there is neither `model.safetensors` nor its index, or that index cannot be followed.
    """
    if (folder / WHOLE).is_file():
        return {folder / WHOLE: None}
    if not (folder / INDEX).is_file():
        raise ConfigError(f"model.name: {folder} has neither {WHOLE} nor {INDEX}; save it once more by transformers")
    where = read_object(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise ConfigError(f"model.name: {folder / INDEX} has no weight_map of names to files")
    files: dict[Path, frozenset[str] | None] = {}
    for file in sorted(set(where.values())):
        if Path(file).name != file or not (folder / file).is_file():
            raise ConfigError(f"model.name: {folder / INDEX} names {file}, which is no file of that folder")
        files[folder / file] = frozenset(name for name, place in where.items() if place == file)
    return files
