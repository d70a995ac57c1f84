"""The recipes that are shipped: each one is a job that this version can carry out."""

from __future__ import annotations

import pytest

from nexa_train.config.load import load_job, recipe_names
from nexa_train.config.support import check_supported
from nexa_train.registry import MODELS


def test_the_recipes_of_the_first_days_are_shipped() -> None:
    assert {"v1", "v2", "v3"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_loads_and_is_supported(name: str) -> None:
    check_supported(load_job(recipe=name).spec)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_trains_a_model_that_is_known_by_name(name: str) -> None:
    assert load_job(recipe=name).spec.model.name in MODELS


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_holds_rows_out_and_says_how_long_it_trains(name: str) -> None:
    spec = load_job(recipe=name).spec
    assert spec.data.validation.enabled
    assert (spec.training.max_steps or spec.training.epochs) is not None


def test_a_recipe_is_changed_by_overrides_alone() -> None:
    changed = load_job(recipe="v1", overrides={"model.name": "falcon3-3b"}, sets=["training.epochs=2"], name="mine")
    assert (changed.metadata.name, changed.spec.model.name, changed.spec.training.epochs) == ("mine", "falcon3-3b", 2)
    assert load_job(recipe="v1").spec.model.name == "falcon3-1b"
