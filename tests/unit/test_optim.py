"""The learning rate of every step, and which weights decay."""

from __future__ import annotations

from typing import Any

import pytest

from nexa_train.config.spec import OptimizerSpec

# torch is imported inside the tests: collecting them must not take its seconds.
pytestmark = pytest.mark.training


def rate(step: int, total: int, **changes: Any) -> float:
    from nexa_train.optim import learning_rate

    return learning_rate(OptimizerSpec(lr=1.0, **changes), step, total)


def rates(total: int, **changes: Any) -> list[float]:
    return [rate(step, total, **changes) for step in range(total)]


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine", "cosine_warmup", "wsd"])
def test_every_schedule_warms_up_linearly_to_its_peak(scheduler: str) -> None:
    assert rates(100, scheduler=scheduler, warmup_steps=4)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "cosine_warmup", "wsd"])
def test_a_schedule_never_rises_after_warm_up_and_reaches_zero_at_the_end(scheduler: str) -> None:
    after = rates(100, scheduler=scheduler, warmup_steps=4)[4:]
    assert after == sorted(after, reverse=True)
    assert rate(100, 100, scheduler=scheduler, warmup_steps=4) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("scheduler", "half"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5), ("cosine_warmup", 0.5), ("wsd", 1.0)]
)
def test_half_way_each_schedule_stands_where_its_formula_says(scheduler: str, half: float) -> None:
    assert rates(100, scheduler=scheduler)[50] == pytest.approx(half)


def test_wsd_falls_linearly_over_its_last_tenth() -> None:
    assert rates(100, scheduler="wsd")[89:93] == pytest.approx([1.0, 1.0, 0.9, 0.8])


def test_a_run_that_is_shorter_than_its_warm_up_only_warms_up() -> None:
    assert rates(3, warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3])


def test_norms_and_biases_do_not_decay_and_frozen_weights_are_left_alone() -> None:
    import torch

    from nexa_train.optim import make_optimizer

    layer, norm = torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    model = torch.nn.Sequential(layer, norm, frozen)
    decayed, free = make_optimizer(OptimizerSpec(weight_decay=0.1), model.named_parameters()).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert decayed["params"] == [layer.weight]
    assert {id(each) for each in free["params"]} == {id(each) for each in (layer.bias, norm.weight, norm.bias)}


def test_the_optimiser_takes_every_value_from_the_job() -> None:
    import torch

    from nexa_train.optim import make_optimizer

    spec = OptimizerSpec(lr=3e-4, betas=[0.8, 0.95], eps=1e-6)
    [group] = make_optimizer(spec, torch.nn.Linear(2, 2, bias=False).named_parameters()).param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-6)


def test_adafactor_keeps_rows_and_columns_instead_of_whole_moments() -> None:
    import torch

    from nexa_train.optim import make_optimizer

    layer = torch.nn.Linear(64, 32, bias=False)
    optimizer = make_optimizer(OptimizerSpec(name="adafactor", lr=0.1), layer.named_parameters())
    layer(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    kept = [value for value in optimizer.state[layer.weight].values() if value.ndim]
    assert sum(tensor.numel() for tensor in kept) == 64 + 32


def test_adafactors_state_of_a_matrix_is_a_small_part_of_adamws() -> None:
    import torch

    from nexa_train.optim import make_optimizer

    def state_bytes(name: str) -> int:
        layer = torch.nn.Linear(256, 128, bias=False)
        optimizer = make_optimizer(OptimizerSpec.model_validate({"name": name}), layer.named_parameters())
        layer(torch.ones(1, 256)).sum().backward()
        optimizer.step()
        return sum(value.nbytes for value in optimizer.state[layer.weight].values())

    whole = 4 * 256 * 128
    assert state_bytes("adamw") >= 2 * whole
    assert state_bytes("adafactor") < whole / 50
