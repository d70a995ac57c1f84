"""Which tensors FSDP2 has shared out. Knows torch's DTensor by its looks, for one rank has none and need not import it.

`torch.distributed.tensor` takes a second to import, and brings sympy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor


def is_distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it stands for what all ranks hold together."""
    return hasattr(tensor, "device_mesh")


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether ranks hold different parts of it."""
    return is_distributed(tensor) and not all(placement.is_replicate() for placement in tensor.placements)
