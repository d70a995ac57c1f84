"""Every error that Nexa raises on purpose, each with the exit code of the `nexa` that meets it.

    NexaError                    1  failed
    ├── ConfigError              2  the description of the job is wrong
    ├── NotFoundError            3  a file, model, run or checkpoint is not there
    ├── RefusedError             4  a store or a cluster said no
    │   ├── AlreadyExistsError   4  the name is taken by other bytes
    │   └── SupersededError      4  another writer committed this step first
    ├── DataError                5  the rows cannot be trained on
    ├── DamagedError             1  bytes differ from what their manifest says
    │   └── ForeignError         4  they do not, but the checkpoint is another run's or another model's
    ├── NonFiniteLossError       1  the loss is not a number; the optimiser did not move
    └── StoppedError            75  stopped on request with a checkpoint committed: run again to go on

A message names the thing, what was seen, what was expected and what to do, in one line.
"""

from __future__ import annotations

import errno
from typing import ClassVar

_FOR_GOOD = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}
)


def is_for_good(exc: OSError) -> bool:
    """Whether a file cannot be had as it was asked for; False: its disk or server fails, and may work again later."""
    return exc.errno in _FOR_GOOD


class NexaError(Exception):
    """The root: a failure whose message is written for the person at the keyboard.

    Attributes:
        exit_code: what the process ends with.
        retryable: whether another attempt with the same configuration could end otherwise.
    """

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = True


class ConfigError(NexaError):
    """A wrong key, type, value or combination in the description of the job."""

    exit_code = 2
    retryable = False


class NotFoundError(NexaError):
    """Something the job names does not exist where the job says it is."""

    exit_code = 3
    retryable = False


class RefusedError(NexaError):
    """A store or a cluster answered, and the answer was no."""

    exit_code = 4


class AlreadyExistsError(RefusedError):
    """A write that may only create met an object that is there already."""

    retryable = False


class SupersededError(RefusedError):
    """Another attempt committed this step first; this one must end and touch nothing."""

    retryable = False


class DataError(NexaError):
    """Rows that cannot be read, rendered or learnt from."""

    exit_code = 5
    retryable = False


class DamagedError(NexaError):
    """Bytes that do not match the manifest which committed them."""


class ForeignError(DamagedError):
    """A checkpoint whose every byte is as committed, but not one that this run can have made.

    For who only lists what is wrong with a store, it is one more thing. Who goes on from checkpoints neither sets it
    aside, as it may be somebody's only one, nor goes behind it; and another attempt would meet it again.
    """

    exit_code = 4
    retryable = False


class NonFiniteLossError(NexaError):
    """The loss became NaN or infinite; raised before the optimiser moves."""

    retryable = False


class StoppedError(NexaError):
    """A stop was asked for and obeyed, with a checkpoint committed."""

    exit_code = 75
