"""Whether this environment can carry a backend that needs one of its own. No torch in this process."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from nexa_train.backend_config import axolotl
from nexa_train.errors import ConfigError


def check_installed(backend: str) -> None:
    """Refuse a backend whose libraries are not here, in the versions that it pins.

    Raises:
        ConfigError: names what differs, and where the backend can be run.
    """
    if backend == "axolotl" and (missing := unmet(f"axolotl=={axolotl.VERSION}")):
        found = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ConfigError(
            f"backend: axolotl runs in an environment of its own, and this is not it: it lacks {found}. Run "
            "`make axolotl-env` and then the `nexa` that it names, or use the train-heavy image (trainer_image/heavy)"
        )


def unmet(requirement: str) -> list[str]:
    """What is not installed here of a requirement and of those that it states itself, as `pip` spells them."""
    wanted = [Requirement(requirement)]
    try:
        wanted += [Requirement(line) for line in requires(wanted[0].name) or []]
    except PackageNotFoundError:
        return [requirement]
    return [str(each).partition(";")[0] for each in wanted if not _is_met(each)]


def _is_met(requirement: Requirement) -> bool:
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return True
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False
