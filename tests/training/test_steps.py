"""The arithmetic of a step, in this process: packed samples do not see each other, masks decide the loss."""

from __future__ import annotations

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


def test_padding_changes_nothing(rows: Path) -> None:
    from nexa_train.loop import batch_loss
    from nexa_train.losses import CausalLoss
    from nexa_train.models.build import build_model

    context = make_context(rows)
    module = CausalLoss(build_model(context.spec, context.located, context.tokenizer))
    together = batch_loss(module, context.train.batch([0, 5, 9])).item()
    alone = sum(batch_loss(module, context.train.batch([sequence])).item() for sequence in (0, 5, 9))
    assert together == pytest.approx(alone, rel=1e-6)


def test_chunks_of_the_head_give_the_whole_heads_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch import nn

    from nexa_train import losses

    torch.manual_seed(0)
    hidden, head = torch.randn(3000, 16, requires_grad=True), nn.Linear(16, 50, bias=False)
    targets = torch.randint(0, 50, (3000,))
    chunked = losses.summed_loss(hidden, targets, head)
    gradient = torch.autograd.grad(chunked, [hidden, head.weight])
    whole = nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    for ours, plain in zip(gradient, torch.autograd.grad(whole, [hidden, head.weight]), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-6)


def test_the_gradients_norm_is_exact_and_clipping_ends_at_the_limit() -> None:
    import torch
    from torch import nn

    from nexa_train.loop import clip_gradients

    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((4096, 256), (256,), (0, 4))]
    for parameter in parameters:
        # As an embedding's: a few rows outweigh all others, on which a float32 sum loses its digits.
        parameter.grad = torch.randn_like(parameter)
        parameter.grad[:10] *= 1000
    exact = torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None]).norm().item()
    assert clip_gradients(parameters, 0.0) == pytest.approx(exact, rel=1e-6)
    assert clip_gradients(parameters, 2.0) == pytest.approx(exact, rel=1e-6)
    assert clip_gradients(parameters, 2.0) == pytest.approx(2.0, rel=1e-6)
    assert clip_gradients(parameters, 4.0) == pytest.approx(2.0, rel=1e-6)


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
    before = {name: piece.tensor.clone() for name, piece in made.stage().weights.items()}
    with pytest.raises(NonFiniteLossError, match=r"step 1, rank 0.*sequences were \["):
        made.train(lambda metrics: False)
    for name, piece in made.stage().weights.items():
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

    base = make_context(rows, model={"d_model": 64})
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
        ends.append(made.stage().weights)
    assert losses[1] < losses[0]
    for name, piece in ends[0].items():
        torch.testing.assert_close(ends[1][name].tensor, piece.tensor, rtol=0, atol=0)
