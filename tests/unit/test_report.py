"""The plot of a run: drawn from its manifests alone, the same bytes every time."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from nexa_train.report.plot import draw
from tests.unit.artifact.builders import manifest

RUN = [
    manifest(
        step=2,
        logs=({"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}),
        metrics={"loss": 1.5, "initial_validation_loss": 2.5},
    ),
    manifest(step=3, logs=({"step": 3, "loss": 1.25},), metrics={"loss": 1.25, "validation_loss": 1.75}),
]


def drawn(path: Path, manifests: list, title: str = "demo") -> str:
    draw(manifests, path, title=title)
    return path.read_text(encoding="utf-8")


def test_equal_manifests_give_equal_bytes(tmp_path: Path) -> None:
    assert drawn(tmp_path / "a.svg", RUN) == drawn(tmp_path / "b.svg", RUN)


def test_other_losses_give_another_picture(tmp_path: Path) -> None:
    assert drawn(tmp_path / "a.svg", RUN) != drawn(tmp_path / "b.svg", RUN[:1])


@pytest.mark.parametrize(
    ("manifests", "labels"), [([], {"training"}), (RUN, {"training", "validation"})], ids=["nothing yet", "a run"]
)
def test_the_picture_is_svg_and_names_what_it_shows(tmp_path: Path, manifests: list, labels: set[str]) -> None:
    root = ElementTree.fromstring(drawn(tmp_path / "a.svg", manifests))
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert labels | {"demo", "step"} <= texts
    assert ("validation" in texts) == ("validation" in labels)
