"""What can go wrong in the operator, as one tree under the project's.

NexaError
├── ConfigError                  SettingsError: an environment variable of the operator is missing or wrong
├── RuntimeUnavailableError      the job waits for something that this operator has not been given
├── WatchError                   kopf gave up on its watches
└── RefusedError
    └── ApiError                 the API server answered, and the answer was no
        ├── ConflictError        someone changed the object since it was read: look again
        ├── InvalidError         what was to be created can never be: a mistake in the job that only the server sees
        └── NameTakenError       a child's name is taken by an object that is not ours
"""

from __future__ import annotations

from nexa_train.errors import ConfigError, NexaError, RefusedError


class SettingsError(ConfigError):
    """An environment variable of the operator is missing or wrong."""


class RuntimeUnavailableError(NexaError):
    """The job is right, and this operator cannot carry it out as it was installed."""

    retryable = False


class WatchError(NexaError):
    """kopf gave up, as on a 401, an error event or half a line from an API server that comes or goes."""


class ApiError(RefusedError):
    """The API server's refusal: what was asked, the HTTP status, its message."""

    def __init__(self, asked: str, *, status: int, message: str) -> None:
        super().__init__(f"{asked}: {status}: {message}")
        self.status = status


class ConflictError(ApiError):
    """The object changed between reading and writing; the next look decides again."""


class InvalidError(ApiError):
    """The object breaks the rules of its kind: asking again would change nothing.

    What a policy or a webhook denies is none: whoever wrote it may think again.
    """


class NameTakenError(ApiError):
    """An object that this job does not own has the name of one of its children."""
