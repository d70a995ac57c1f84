"""Our own decoder: what transformers computes, from the same files, without transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nexa_train.config import JobSpec
from nexa_train.errors import ConfigError
from nexa_train.models.decoder_config import read_config, scratch_config
from nexa_train.registry import scratch
from tests.training.ranks import job

pytestmark = pytest.mark.training

STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama 3": ("llama", {"rope_parameters": STRETCHED, "head_dim": 32}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "a padding id": ("llama", {"tie_word_embeddings": True, "pad_token_id": 5}),
    "mistral": ("mistral", {"sliding_window": 9, "head_dim": 24}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "qwen 2.5": ("qwen2", {"tie_word_embeddings": True}),
    "qwen 3": ("qwen3", {"head_dim": 32}),
}
LENGTHS = (37, 1, 12, 26)


def model_of(kind: str, folder: Path) -> Any:
    """A random model of a kind, as transformers has it and writes it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from nexa_train.models.pretrained import ROW_ATTENTION

    name, change = KINDS[kind]
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = AutoConfig.for_model(name, **{**sizes, **heads, "pad_token_id": None, **change})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ROW_ATTENTION["auto"], dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.4 if parameter.ndim == 1 else 0.0, 0.2)
    model.save_pretrained(folder)
    return model


def decoder_of(folder: Path, **options: Any) -> Any:
    from nexa_train.models.decoder import Decoder, load_weights

    config = read_config(json.loads((folder / "config.json").read_text()))
    assert config is not None
    decoder = Decoder(config, **options)
    load_weights(decoder, folder)
    return decoder


def rewritten(folder: Path, changes: dict[str, Any], name: str = "model.safetensors") -> None:
    """The weights of a folder in a file of that name, some of them others; None: without it."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors") | changes
    save_file({key: value.contiguous() for key, value in tensors.items() if value is not None}, folder / name)


def same_weights(folder: Path, expected: dict[str, Any]) -> bool:
    import torch

    return all(torch.equal(value, expected[name]) for name, value in decoder_of(folder).named_parameters())


def test_other_files_of_a_folder_are_not_its_weights(tmp_path: Path) -> None:
    """Variants, which the hub hands out too, and shards of an earlier save."""
    model_of("qwen 3", tmp_path)
    expected = dict(decoder_of(tmp_path).named_parameters())
    for name in ("model.fp16.safetensors", "model-00001-of-00002.safetensors", "consolidated.safetensors"):
        rewritten(tmp_path, {key: value.detach() * 0 for key, value in expected.items()}, name)
    assert same_weights(tmp_path, expected)


def test_weights_are_taken_from_where_the_index_says(tmp_path: Path) -> None:
    theirs, index = model_of("qwen 3", tmp_path), tmp_path / "model.safetensors.index.json"
    expected = dict(decoder_of(tmp_path).named_parameters())
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert same_weights(tmp_path, expected)
    shards[1].unlink()
    with pytest.raises(ConfigError, match=rf"index\.json names {shards[1].name}, which is no file of that folder"):
        decoder_of(tmp_path)
    for place, said in (("../x", "names ../x, which is no file of that folder"), (3, "has no weight_map of names")):
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": place}}))
        with pytest.raises(ConfigError, match=said):
            decoder_of(tmp_path)
    index.unlink()
    with pytest.raises(ConfigError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        decoder_of(tmp_path)


def test_a_tied_head_may_stand_for_the_embedding_and_another_is_refused(tmp_path: Path) -> None:
    import torch

    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    model_of("llama", tmp_path)
    weight = decoder_of(tmp_path).lm_head.weight.detach().clone()
    rewritten(tmp_path, {head: weight})
    assert torch.equal(decoder_of(tmp_path).lm_head.weight, weight)
    rewritten(tmp_path, {head: weight, embedding: None})
    assert torch.equal(decoder_of(tmp_path).model.embed_tokens.weight, weight)
    rewritten(tmp_path, {head: weight + 1, embedding: weight})
    with pytest.raises(ConfigError, match=r"ties the head to the embedding, and lm_head\.weight is another matrix"):
        decoder_of(tmp_path)


def hf_spec() -> Any:
    return JobSpec.model_validate(job(Path("rows.jsonl"), backend="hf"))


def rows() -> tuple[Any, Any, Any]:
    import torch

    from nexa_train.losses import IGNORE

    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    ids, targets = (torch.randint(0, 97, positions.shape) for _ in range(2))
    targets[0, ::5] = IGNORE
    return ids, positions, targets


def loss_and_gradients(model: Any, batch: tuple[Any, Any, Any]) -> tuple[float, dict[str, Any]]:
    from nexa_train.losses import CausalLoss

    loss = CausalLoss(model)(*batch)
    (loss / 60).backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs, batch = model_of(kind, tmp_path), rows()
    expected, slopes = loss_and_gradients(theirs, batch)
    size = max(slope.norm() for slope in slopes.values())
    for attention, recompute in (("auto", False), ("sdpa", False), ("eager", False), ("auto", True)):
        ours = decoder_of(tmp_path, attention=attention)
        if recompute:
            ours.activation_checkpointing_enable({"use_reentrant": False})
        found, gradients = loss_and_gradients(ours, batch)
        assert found == pytest.approx(expected, rel=1e-6)
        assert list(gradients) == list(slopes), "their names and their order are in every checkpoint"
        for name, slope in slopes.items():
            # The gradient of a bias on keys is nothing but rounding: adding to all scores changes no share.
            assert (gradients[name] - slope).norm() < 1e-5 * slope.norm() + 1e-7 * size, name


@pytest.mark.parametrize("kind", KINDS)
def test_its_config_makes_the_same_model_again(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    model_of(kind, tmp_path)
    ours = decoder_of(tmp_path)
    (tmp_path / "config.json").write_text(ours.config.to_json_string(use_diff=True))
    assert decoder_of(tmp_path).config == ours.config
    sizes = AutoConfig.from_pretrained(tmp_path)
    assert (sizes.hidden_size, sizes.num_hidden_layers, str(sizes.dtype)) == (64, 3, "torch.float32")


def test_a_model_from_scratch_is_the_same_for_transformers_and_for_us(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig

    from nexa_train.models.decoder import Decoder, draw_weights
    from nexa_train.models.pretrained import like

    source = scratch_config(scratch(64, 2, 4, 97), 128, bos_id=1, eos_id=2)
    config = read_config(source)
    assert config is not None
    ours = Decoder(config)
    draw_weights(ours, 7)
    assert ours.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert ours.model.norm.weight.unique().tolist() == [1.0]
    theirs = like(ours, hf_spec())
    for (name, mine), (other, weight) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(mine, weight)
    expected = LlamaConfig(**source).to_dict()
    assert {key: expected[key] for key in source} == source, "nothing that transformers would call otherwise"


def test_weights_that_are_missing_or_of_another_shape_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from nexa_train.models.pretrained import load_pretrained

    model_of("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**weights, name: weights[name][:8].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"up_proj.weight is \[8, 64\], by its config.json \[160, 64\]"):
        decoder_of(tmp_path)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights .* such as model.layers.1.mlp.up_proj.weight"):
        decoder_of(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks 1 weights .* such as model.layers.1.mlp.up_proj.weight"):
        load_pretrained(hf_spec(), tmp_path)


def test_flash_attention_of_another_library_is_refused_where_its_package_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nexa_train.models import pretrained
    from nexa_train.models.pretrained import check_flash

    monkeypatch.setattr(pretrained, "is_flash_attn_2_available", lambda: False)
    flash = {"model": {"attn": "flash"}, "cluster": {"gpus_per_node": 1}, "training": {"precision": "bf16"}}
    preferences = {"method": {"type": "dpo"}, "data": {"format": "preference"}}
    for backend in ("hf", "fsdp"):
        check_flash(JobSpec.model_validate(job(Path("rows.jsonl"), backend=backend, **flash)))
    with pytest.raises(ConfigError, match="flash on backend hf with method dpo needs the package flash-attn"):
        check_flash(JobSpec.model_validate(job(Path("rows.jsonl"), backend="hf", **flash, **preferences)))


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gemma"},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"rope_parameters": None},
        {"quantization_config": {"bits": 4}},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "qwen2", "use_sliding_window": True},
        {"model_type": "qwen3", "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
        {"rms_norm_eps": None},
    ],
    ids=str,
)
def test_what_it_does_not_compute_or_is_not_told_is_left_to_transformers(change: dict[str, Any]) -> None:
    config = scratch_config(scratch(64, 2, 4, 97), 128, bos_id=1, eos_id=2)
    assert read_config(config) is not None
    changed = {**config, **change}
    assert read_config({key: value for key, value in changed.items() if value is not None}) is None


def test_the_spelling_of_transformers_4_is_read_too() -> None:
    config = scratch_config(scratch(64, 2, 4, 97), 128, bos_id=1, eos_id=2)
    del config["rope_parameters"]
    plain = read_config({**config, "rope_theta": 5e5, "rope_scaling": None})
    assert plain is not None
    assert dict(plain.rope) == {"rope_theta": 5e5, "rope_type": "default"}
    stretched = read_config({**config, "rope_theta": 5e5, "rope_scaling": {"factor": 8.0, "rope_type": "llama3"}})
    assert stretched is not None
    assert dict(stretched.rope) == {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}


def test_a_rank_of_it_needs_neither_transformers_nor_torch_s_compiler(tmp_path: Path) -> None:
    model_of("llama", tmp_path)
    script = f"""
import sys, json, torch
from pathlib import Path
import nexa_train.rank, nexa_train.backends.fsdp
from nexa_train.losses import CausalLoss
from nexa_train.models.decoder import Decoder, load_weights
from nexa_train.models.decoder_config import read_config
from nexa_train.optim import AdamW
folder = Path({str(tmp_path)!r})
torch.set_deterministic_debug_mode("error")
decoder = Decoder(read_config(json.loads((folder / "config.json").read_text())))
load_weights(decoder, folder)
optimizer = AdamW(decoder.parameters(), lr=0.1, fused=True)
ids = torch.arange(8)[None]
CausalLoss(decoder)(ids, ids, ids).backward()
optimizer.step()
optimizer.zero_grad(set_to_none=True)
print([name for name in ("transformers", "peft", "torch._dynamo", "sympy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_optimiser_moves_as_torch_s_own_to_the_bit(decay: float) -> None:
    import torch

    from nexa_train.optim import AdamW

    ends = []
    for kind in (AdamW, torch.optim.AdamW):
        torch.manual_seed(1)
        weight = torch.nn.Parameter(torch.randn(33, 7))
        optimizer = kind([weight], lr=0.01, betas=(0.9, 0.95), weight_decay=decay, fused=True)
        for _ in range(5):
            (weight.square().sum() + weight.sum()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            assert weight.grad is None
        ends.append(weight.detach())
    assert torch.equal(*ends)
