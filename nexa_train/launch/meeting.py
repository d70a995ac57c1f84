"""Where the nodes of a gang meet that have no names: node 0 says in the artifact store where it is. Imports no torch.

Whoever runs the gang then needs no Service for it, and no rank waits for DNS. One object a gang,
`checkpoints/RUN_ID/meetings/GANG`; it stays, as short as it is: who comes late must still find it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address

from nexa_train.artifact.manifest import run_folder
from nexa_train.config.protocol import RDZV_PORT
from nexa_train.errors import AlreadyExistsError, DamagedError, NotFoundError, RefusedError
from nexa_train.store import Store

MEET = "meet"
PATIENCE_SECONDS = 600.0
"""How long a node waits for the others, as torchrun does by itself."""
LEAST_SECONDS = 60.0
"""Of these for torchrun, however late node 0 said where it is: it may not listen yet."""
POLL_SECONDS = 0.5
_MOST_BYTES = 64


@dataclass(frozen=True)
class Meeting:
    """What a node knows by itself."""

    gang: str
    """A name that no other gang has, ever: the UID of what made its pods."""
    address: str
    """This node's own, IPv4 or IPv6."""

    def arguments(self, store_uri: str, run_id: str, index: int) -> list[str]:
        """The first arguments of our torchrun."""
        return [MEET, store_uri, f"{run_folder(run_id)}/meetings/{self.gang}", str(index), self.address]


def met(
    store: Store,
    key: str,
    index: int,
    address: str,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[str]:
    """torchrun's arguments for where node 0 is, and for how long to wait there.

    Raises:
        NexaError: see `say`, for node 0, and `hear`, for the others.
    """
    began = clock()
    if index == 0:
        say(store, key, address)
    else:
        address = hear(store, key, clock=clock, sleep=sleep)
    left = max(LEAST_SECONDS, PATIENCE_SECONDS - (clock() - began))
    return [f"--rdzv-endpoint={endpoint(address)}", f"--rdzv-conf=timeout={left:.0f}"]


def say(store: Store, key: str, address: str) -> None:
    """Node 0's part.

    Raises:
        RefusedError: another pod was node 0 of this gang before; or the store's.
    """
    try:
        store.create(key, address.encode())
    except AlreadyExistsError:
        if (said := _read(store, key)) != address:
            what = f"says that node 0 is at {said}, and this is node 0 at {address}"
            raise RefusedError(f"{store.uri}/{key} {what}: a gang that starts again needs another name") from None


def hear(
    store: Store,
    key: str,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """The other nodes' part: the address of node 0, as soon as it is there.

    Raises:
        NotFoundError: it did not come within `PATIENCE_SECONDS`.
        DamagedError: the object is no address.
        RefusedError: the store's.
    """
    end = clock() + PATIENCE_SECONDS
    while True:
        try:
            return _read(store, key)
        except NotFoundError:
            if clock() > end:
                raise NotFoundError(
                    f"{store.uri}/{key}: node 0 did not say within {PATIENCE_SECONDS:.0f} s where it is; its pod may "
                    "wait for a node, or for its image"
                ) from None
        sleep(POLL_SECONDS)


def endpoint(address: str) -> str:
    """Where torchrun listens at an address. Pure."""
    return f"[{address}]:{RDZV_PORT}" if ":" in address else f"{address}:{RDZV_PORT}"


def _read(store: Store, key: str) -> str:
    with store.open(key) as file:
        said = file.read(_MOST_BYTES)
    try:
        return str(ip_address(said.decode()))
    except ValueError:
        raise DamagedError(f"{store.uri}/{key} holds {said!r}, expected the IP address of node 0") from None
