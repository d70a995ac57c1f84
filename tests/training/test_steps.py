"""The arithmetic of a step, in this process: packed samples do not see each other, masks decide the loss."""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.training.harness import SPEC, merged

pytestmark = pytest.mark.training


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("NEXA_CACHE", str(cache))


def make_context(rows: Path, **change: Any) -> Any:
    from nexa_train.backends.base import RankContext
    from nexa_train.config import JobSpec
    from nexa_train.data.batches import Split
    from nexa_train.data.cursor import Order
    from nexa_train.data.prepare import prepare
    from nexa_train.data.tokenizer import load_tokenizer
    from nexa_train.models.locate import architecture, locate
    from nexa_train.plan import make_plan

    spec = JobSpec.model_validate(
        merged(merged(SPEC, change), {"data": {"remote_uri": str(rows), **change.get("data", {})}})
    )
    located = locate(spec.model)
    tokenizer = load_tokenizer(located.folder)
    prepared = prepare(spec, tokenizer)
    train = Split(prepared.folder, "train")
    plan = make_plan(spec, num_sequences=train.num_sequences, architecture=architecture(spec.model))
    assert plan.total_sequences is not None
    order = Order(train.num_sequences, plan.total_sequences, spec.training.seed)
    return RankContext(spec, plan, located, tokenizer, train, Split(prepared.folder, "validation"), order, 0, 1)


def test_packed_samples_have_the_loss_and_gradients_they_have_alone(rows: Path) -> None:
    import torch

    from nexa_train.loop import batch_loss
    from nexa_train.losses import CausalLoss
    from nexa_train.models.build import build_model

    results = []
    for packing in (False, True):
        context = make_context(rows, data={"packing": packing}, model={"max_seq_len": 160})
        module = CausalLoss(build_model(context.spec, context.located, context.tokenizer))
        total = 0.0
        for sequence in range(context.train.num_sequences):
            loss = batch_loss(module, context.train.batch([sequence]))
            loss.backward()
            total += loss.item()
        gradients = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
        results.append((total, context.train.num_sequences, gradients))
    (alone, count, gradients), (packed, packed_count, packed_gradients) = results
    assert packed_count < count / 2
    assert packed == pytest.approx(alone, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-4, atol=1e-4)


def test_bf16_loss_is_near_the_float32_loss_and_not_equal_to_it(rows: Path) -> None:
    from nexa_train.loop import batch_loss
    from nexa_train.losses import CausalLoss
    from nexa_train.models.build import build_model

    context = make_context(rows)
    causal = build_model(context.spec, context.located, context.tokenizer)
    exact, rounded = (
        batch_loss(CausalLoss(causal, bf16=bf16), context.train.batch([0])).item() for bf16 in (False, True)
    )
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.01)


def test_samples_in_a_row_or_padded_have_the_loss_they_have_alone(rows: Path) -> None:
    from nexa_train.loop import batch_loss
    from nexa_train.losses import CausalLoss
    from nexa_train.models.build import build_model

    context = make_context(rows)
    module = CausalLoss(build_model(context.spec, context.located, context.tokenizer))
    row, padded = context.train.batch([0, 5, 9]), context.train.padded([0, 5, 9])
    assert row.input_ids.shape == (1, row.tokens)
    assert padded.input_ids.shape[0] == 3
    assert padded.input_ids.numel() > row.tokens == padded.tokens
    alone = sum(batch_loss(module, context.train.batch([sequence])).item() for sequence in (0, 5, 9))
    assert batch_loss(module, row).item() == pytest.approx(alone, rel=1e-6)
    assert batch_loss(module, padded).item() == pytest.approx(alone, rel=1e-6)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
}
LENGTHS = (11, 3, 17, 1, 9)


def family_model(kind: str) -> Any:
    """A tiny random model of this kind, with transformers' own eager attention."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=None,
        **FAMILIES[kind],
    )
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in causal.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return causal


def gradients(module: Any) -> dict[str, Any]:
    found = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_row_of_samples_has_the_loss_and_gradients_that_transformers_gives_each_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from torch.nn.functional import cross_entropy

    from nexa_train import losses
    from nexa_train.models.pretrained import ROW_ATTENTION

    causal = family_model(kind)
    samples = [torch.randint(0, 97, (length,)) for length in LENGTHS]
    targets = [torch.cat([sample[1:], torch.tensor([losses.IGNORE])]) for sample in samples]
    for target in targets:
        target[: len(target) // 3] = losses.IGNORE
    logits = [causal(input_ids=sample[None]).logits[0] for sample in samples]
    whole = cross_entropy(torch.cat(logits), torch.cat(targets), reduction="sum")
    whole.backward()
    expected = gradients(causal)
    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 7 * 97 * 4)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    for attention in (ROW_ATTENTION["eager"], ROW_ATTENTION["auto"]):
        causal.set_attn_implementation(attention)
        loss = losses.CausalLoss(causal)(torch.cat(samples)[None], positions[None], torch.cat(targets)[None])
        loss.backward()
        assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
        for name, gradient in gradients(causal).items():
            error = (gradient - expected[name]).norm() / expected[name].norm()
            assert error < 1e-5, (attention, name)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_heads_gradients_are_those_of_whole_logits_and_none_is_made_for_a_frozen_head(frozen: bool) -> None:
    import torch

    from nexa_train.losses import summed_loss

    causal = family_model("gemma2")  # with a cap on its logits
    weight, cap = causal.lm_head.weight.requires_grad_(not frozen), causal.config.final_logit_softcapping
    hidden, targets = torch.randn(300, 32, requires_grad=True), torch.randint(0, 97, (300,))
    logits = cap * torch.tanh(hidden @ weight.T / cap)
    wanted = [hidden] if frozen else [hidden, weight]
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets) * 300, wanted)
    loss = summed_loss(hidden, targets, causal)
    (loss / 3).backward()
    for tensor, plain in zip(wanted, expected, strict=True):
        torch.testing.assert_close(tensor.grad, plain / 3, rtol=1e-4, atol=1e-6)
    assert (weight.grad is None) == frozen
    with torch.no_grad():
        assert summed_loss(hidden, targets, causal).item() == loss.item()
    with pytest.raises(RuntimeError, match="given away"):
        loss.backward()


@pytest.mark.parametrize(
    ("kind", "softcap", "expected"),
    [("flash", None, "flash takes no processor, only GPUs"), ("sdpa", 5.0, "sdpa takes no scores with a soft cap")],
)
def test_a_kind_of_attention_that_cannot_be_had_is_refused_and_not_replaced(
    kind: Any, softcap: float | None, expected: str
) -> None:
    import torch

    from nexa_train.errors import ConfigError
    from nexa_train.models.attention import Rows, attend

    part = torch.randn(3, 1, 4)
    with pytest.raises(ConfigError, match=f"^model.attn: {expected}"):
        attend(part, part, part, Rows(torch.tensor([0, 3]), (3,), kind), scaling=1.0, softcap=softcap)


@pytest.mark.parametrize("window", [None, 9])
def test_flash_attention_is_called_as_torch_documents_it(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """Its kernel runs on GPUs alone; a plain one in its place, behind torch's own signature, must give what we do."""
    import inspect

    import torch
    from torch.nn.attention import varlen

    from nexa_train.models import attention

    signature = inspect.signature(varlen.varlen_attn)

    def plain(*arguments: Any, **named: Any) -> torch.Tensor:
        given = signature.bind(*arguments, **named)
        given.apply_defaults()
        said = given.arguments
        assert said["cu_seq_q"] is said["cu_seq_k"]
        assert said["max_q"] == said["max_k"] == max(LENGTHS)
        before, after = said["window_size"]
        assert after == 0, "causal"
        outputs = []
        for first, last in pairwise(said["cu_seq_q"].tolist()):
            query, key, value = (said[name][first:last].transpose(0, 1) for name in ("query", "key", "value"))
            seen = torch.ones(last - first, last - first, dtype=torch.bool).tril()
            seen = seen if before < 0 else seen.triu(-before)
            mixed = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, seen, scale=said["scale"], enable_gqa=said["enable_gqa"]
            )
            outputs.append(mixed.transpose(0, 1))
        return torch.cat(outputs)

    monkeypatch.setattr(varlen, "varlen_attn", plain)
    query, key, value = (torch.randn(sum(LENGTHS), heads, 8) for heads in (4, 2, 2))
    edges = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)
    expected = attention.attend(
        query, key, value, attention.Rows(edges, tuple(LENGTHS), "eager"), scaling=0.3, window=window
    )
    monkeypatch.setattr(attention, "_obstacle_to_flash", lambda *_: "")
    found = attention.attend(
        query, key, value, attention.Rows(edges, tuple(LENGTHS), "flash"), scaling=0.3, window=window
    )
    torch.testing.assert_close(found, expected)


def test_no_target_at_all_is_a_loss_of_zero_with_gradients_of_zero() -> None:
    import torch

    from nexa_train.losses import IGNORE, CausalLoss
    from nexa_train.models.pretrained import ROW_ATTENTION

    causal = family_model("llama")
    causal.set_attn_implementation(ROW_ATTENTION["auto"])
    nothing = torch.zeros(1, 1, dtype=torch.int64)
    loss = CausalLoss(causal)(nothing, nothing, nothing + IGNORE)
    loss.backward()
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(causal).values())


@pytest.mark.parametrize("backend", ["fsdp", "hf"])
def test_a_loss_that_is_not_finite_stops_before_the_optimiser_moves(rows: Path, backend: str) -> None:
    import torch

    from nexa_train.backends import make_backend
    from nexa_train.errors import NonFiniteLossError

    context = make_context(rows, backend=backend)
    made = make_backend(context)
    made.setup()
    weight = made.causal.base_model.norm.weight  # type: ignore[attr-defined]
    with torch.no_grad():
        weight[0] = float("nan")
    before = {name: piece.tensor.clone() for name, piece in made.stage().ready().weights.items()}
    with pytest.raises(NonFiniteLossError, match=r"step 1, rank 0.*sequences were \[.*"):
        made.train(lambda metrics: False)
    for name, piece in made.stage().ready().weights.items():
        torch.testing.assert_close(piece.tensor, before[name], equal_nan=True, rtol=0, atol=0)


def test_a_lora_target_that_matches_nothing_is_refused_with_what_there_is(rows: Path) -> None:
    from nexa_train.backends import make_backend
    from nexa_train.errors import ConfigError

    context = make_context(rows, tuning={"type": "lora", "rank": 2, "target_modules": ["query"]})
    with pytest.raises(ConfigError, match=r"query match no linear layer.*q_proj"):
        make_backend(context).setup()


@pytest.mark.filterwarnings("error:.*autograd kernel was not registered")
def test_qlora_trains_on_a_cpu_and_validating_first_changes_no_bit(rows: Path, tmp_path: Path) -> None:
    import torch

    from nexa_train.backends import make_backend
    from nexa_train.models.build import build_model

    base = make_context(rows, model={"d_model": 64}, backend="hf")
    folder = tmp_path / "model"
    build_model(base.spec, base.located, base.tokenizer).save_pretrained(folder)
    for file in base.located.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    sizes = {"d_model": None, "n_layers": None, "n_heads": None, "name": str(folder)}
    context = make_context(rows, backend="hf", model=sizes, tuning={"type": "qlora", "rank": 4})
    ends, losses = [], []
    for validate_first in (True, False):
        made = make_backend(context)
        made.setup()
        if validate_first:
            losses.append(made.validate())
        made.train(lambda metrics: False)
        losses.append(made.validate())
        ends.append(made.stage().ready().weights)
    assert losses[1] < losses[0]
    for name, piece in ends[0].items():
        torch.testing.assert_close(ends[1][name].tensor, piece.tensor, rtol=0, atol=0)
