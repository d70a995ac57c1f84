"""Job and plan -> exactly what TRL, DeepSpeed or Axolotl is given, as plain values; objects in words. Pure.

Used by the backends of those names, and printed by `nexa plan --show-backend-config`.
"""

from __future__ import annotations

from typing import Any

from nexa_train.backend_config.axolotl import axolotl_config
from nexa_train.backend_config.deepspeed import shown_config
from nexa_train.backend_config.trl import hf_config
from nexa_train.config.spec import JobSpec
from nexa_train.plan import TrainPlan

CONFIGS = {"hf": hf_config, "deepspeed": shown_config, "axolotl": axolotl_config}


def backend_config(spec: JobSpec, plan: TrainPlan) -> dict[str, Any]:
    """What the job's backend gives its library; nothing on fsdp, which is Nexa's own loop over torch.

    Raises:
        ConfigError: the library has no way to say what the job asks for.
    """
    given = CONFIGS.get(spec.backend)
    return given(spec, plan) if given else {}
