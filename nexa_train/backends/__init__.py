"""What carries the training. One file a backend; `base.py` says what each must do."""

from __future__ import annotations

from nexa_train.backends.base import Backend, RankContext


def make_backend(context: RankContext) -> Backend:
    """The backend that the job names; imported only now, for each brings its own libraries."""
    name = context.spec.backend
    if name == "fsdp":
        from nexa_train.backends.fsdp import FsdpBackend  # noqa: PLC0415

        return FsdpBackend(context)
    if name == "hf":
        from nexa_train.backends.hf import HfBackend  # noqa: PLC0415

        return HfBackend(context)
    if name == "deepspeed":
        from nexa_train.backends.deepspeed import DeepspeedBackend  # noqa: PLC0415

        return DeepspeedBackend(context)
    from nexa_train.backends.axolotl import AxolotlBackend  # noqa: PLC0415

    return AxolotlBackend(context)
