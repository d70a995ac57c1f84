"""Direct Preference Optimization: the loss of its paper, the base as reference whatever was restored, real pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.training.nursery import Make, Nursery, check_killed_once
from tests.training.ranks import job, make_context, train

pytestmark = pytest.mark.training

DPO: dict[str, Any] = {"method": {"type": "dpo", "beta": 0.2}, "data": {"format": "preference"}}
LORA: dict[str, Any] = {"tuning": {"type": "lora", "rank": 4}}
REAL = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_preferences.jsonl"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("NEXA_CACHE", str(cache))


def moved(causal: Any) -> None:
    """Push what is trained away from where it began."""
    import torch

    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in causal.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def plain_log_prob(causal: Any, ids: Any, labels: Any) -> Any:
    """log p of an answer, from the model's own logits over one sample alone."""
    from nexa_train.losses import hidden_states

    hidden = hidden_states(causal, ids[None], _positions(ids)[None])[0, :-1]
    logits = hidden @ causal.get_output_embeddings().weight.T
    wanted = labels[1:]
    counted = wanted >= 0
    return logits.log_softmax(-1)[counted].gather(1, wanted[counted, None]).sum()


def _positions(ids: Any) -> Any:
    import torch

    return torch.arange(len(ids))


@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
def test_the_reference_has_no_dropout_whatever_the_policy_has(pairs: Path, tuning: dict[str, Any]) -> None:
    from nexa_train.backends.fsdp import FsdpBackend
    from nexa_train.models.decoder import Attention

    context = make_context(job(pairs, **DPO, **tuning))
    backend = FsdpBackend(context)
    backend.setup()
    loss = backend.engine.module.train()
    for module in loss.modules():
        if isinstance(module, Attention):
            module.config = replace(module.config, attention_dropout=0.5)
    batch = context.train.batch([3, 14])
    arguments = (batch.input_ids, batch.position_ids, batch.targets)
    found, again = (loss._expected(*arguments) for _ in range(2))
    assert found.equal(again)
    assert not loss.policy(*arguments).equal(loss.policy(*arguments)), "the policy has it"


@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
def test_the_loss_and_its_gradients_are_those_of_the_paper(pairs: Path, tuning: dict[str, Any]) -> None:
    import torch

    from nexa_train.backends.fsdp import FsdpBackend
    from nexa_train.loop import batch_loss
    from nexa_train.losses import without_adapters
    from nexa_train.models.build import build_reference

    context = make_context(job(pairs, **DPO, **tuning))
    backend = FsdpBackend(context)
    backend.setup()
    moved(backend.causal)
    reference: Any = build_reference(context.spec, context.located, context.tokenizer) or backend.causal
    trained = [parameter for parameter in backend.causal.parameters() if parameter.requires_grad]
    sequences = [3, 14, 15, 92 % context.train.num_sequences]
    loss = batch_loss(backend.engine.module, context.train.batch(sequences))
    expected = torch.zeros(())
    for sequence in sequences:
        pair = context.train.labelled_samples(sequence)
        chosen, rejected = (plain_log_prob(backend.causal, *sample) for sample in pair)
        with torch.no_grad(), without_adapters(reference):
            expected_chosen, expected_rejected = (plain_log_prob(reference, *sample) for sample in pair)
        margin = (chosen - expected_chosen) - (rejected - expected_rejected)
        expected = expected - torch.log(torch.sigmoid(0.2 * margin))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert abs(loss.item() / len(sequences) - math.log(2)) > 0.01
    for ours, theirs in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_chunks_of_the_head_give_the_whole_heads_log_probabilities(
    pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from nexa_train import losses
    from nexa_train.models.build import build_model

    context = make_context(job(pairs, **DPO))
    causal = build_model(context.spec, context.located, context.tokenizer)
    hidden, targets = torch.randn(50, 32, requires_grad=True), torch.randint(0, 4096, (50,))
    weight, counts = causal.get_output_embeddings().weight, torch.randn(50)
    monkeypatch.setattr(losses, "CHUNK_BYTES", {"cpu": 7 * 4 * 4096})
    found = losses.log_probs(hidden, targets, causal)
    plain = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, plain)
    gradients = [torch.autograd.grad(each @ counts, [hidden, weight]) for each in (found, plain)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_switch_of_adapters_leaves_them_as_they_were(pairs: Path) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    from nexa_train.backends.fsdp import FsdpBackend
    from nexa_train.losses import without_adapters

    backend = FsdpBackend(make_context(job(pairs, **DPO, **LORA)))
    backend.setup()
    trained = [name for name, parameter in backend.causal.named_parameters() if parameter.requires_grad]
    layers = [layer for layer in backend.causal.modules() if isinstance(layer, BaseTunerLayer)]
    assert layers
    with without_adapters(backend.causal):
        assert all(layer.disable_adapters for layer in layers)
    assert not any(layer.disable_adapters for layer in layers)
    assert trained == [name for name, parameter in backend.causal.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("backend", ["fsdp", "hf"])
def test_nothing_is_gained_before_the_first_step(pairs: Path, backend: str) -> None:
    found = train(job(pairs, backend=backend, **DPO, training={"max_steps": 1}))
    assert found.validation[0] == pytest.approx(math.log(2), rel=1e-7)
    assert found.losses == pytest.approx([math.log(2)], rel=1e-6)
    assert found.norms[0] > 0


@pytest.mark.parametrize("backend", ["fsdp", "hf"])
def test_a_loss_that_is_not_finite_stops_before_the_optimiser_moves(pairs: Path, backend: str) -> None:
    import torch

    from nexa_train.backends import make_backend
    from nexa_train.errors import NonFiniteLossError

    made: Any = make_backend(make_context(job(pairs, backend=backend, **DPO)))
    made.setup()
    with torch.no_grad():
        made.causal.base_model.norm.weight[0] = float("nan")
    before = {name: parameter.detach().clone() for name, parameter in made.causal.named_parameters()}
    with pytest.raises(NonFiniteLossError, match=r"step 1, rank 0.*sequences were \[.*samples \["):
        made.train(lambda metrics: False)
    for name, parameter in made.causal.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], equal_nan=True, rtol=0, atol=0)


@pytest.fixture(scope="module")
def nursery(cache: Path) -> Iterator[Nursery]:
    found = Nursery(cache, "hf")
    yield found
    found.close()


@pytest.mark.parametrize(
    "change", [{"backend": "fsdp"}, {"backend": "hf", **LORA}], ids=["fsdp, a copy as reference", "hf, adapters off"]
)
def test_killed_and_resumed_it_ends_with_the_same_bits(make: Make, pairs: Path, change: dict[str, Any]) -> None:
    data = {**DPO["data"], "remote_uri": str(pairs)}
    length = {"training": {"max_steps": 80, "save_every_steps": 4}, "optimizer": {"lr": 0.005}}
    check_killed_once(lambda: make(**{**DPO, **change, **length, "data": data}), world=2, last_step=80)


@pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL} is not on this machine")
def test_real_pairs_take_the_native_loop_and_trl_the_same_way() -> None:
    real = {
        **DPO,
        "data": {**DPO["data"], "validation": {"rows": 2}},
        "model": {"max_seq_len": 512},
        "training": {"max_steps": 3, "global_batch_size": 4, "microbatch_size_per_gpu": 2},
        "optimizer": {"lr": 0.003},
    }
    context = make_context(job(REAL, **real))
    assert 600 < context.train.num_sequences <= 731 - 2
    native, trl = (train(job(REAL, backend=backend, **real)) for backend in ("fsdp", "hf"))
    assert native.losses[0] == pytest.approx(math.log(2), rel=1e-6)
    assert abs(native.losses[-1] - math.log(2)) > 0.01
    assert trl.losses == pytest.approx(native.losses, rel=1e-5)
    assert trl.norms == pytest.approx(native.norms, rel=1e-5)
    assert trl.tokens == native.tokens
