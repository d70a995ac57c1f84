"""What the operator and a trainer's pod say to each other: environment, progress, last words.

Pure: both sides import it, neither imports the other.

The operator puts these variables into each pod:

| variable | value |
|---|---|
| NEXA_JOB | the job as JSON: metadata (name, namespace) and spec |
| NEXA_ATTEMPT | number of the attempt, from 0 |
| NEXA_NUM_NODES | pods of the gang |
| NEXA_OUT_OF_MEMORY_ATTEMPT | the last attempt, where a pod of it was killed for memory and could not say so itself |
| NEXA_RDZV_ENDPOINT | host:port of pod 0, where torchrun listens; none: the pods meet in the artifact store |
| NEXA_GANG | then: a name that no other gang ever has, the UID of what made the pods |
| NEXA_NODE_ADDRESS | and: the pod's own IP address |
| JOB_COMPLETION_INDEX | this node's index; an indexed Job sets it, elsewhere the pod's label does |
| NEXA_IMAGE | the image as the pod names it, for the manifest |
| NEXA_PROGRESS_PORT | where to serve progress; default 8080, 0: any free port |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

ENV_JOB = "NEXA_JOB"
ENV_ATTEMPT = "NEXA_ATTEMPT"
ENV_NUM_NODES = "NEXA_NUM_NODES"
ENV_OUT_OF_MEMORY = "NEXA_OUT_OF_MEMORY_ATTEMPT"
ENV_RDZV_ENDPOINT = "NEXA_RDZV_ENDPOINT"
ENV_GANG = "NEXA_GANG"
ENV_NODE_ADDRESS = "NEXA_NODE_ADDRESS"
ENV_IMAGE = "NEXA_IMAGE"
ENV_PROGRESS_PORT = "NEXA_PROGRESS_PORT"
ENV_NODE_INDEX = "JOB_COMPLETION_INDEX"

RDZV_PORT = 29500
PROGRESS_PORT = 8080
TERMINATION_LOG = "/dev/termination-log"
TERMINATION_LOG_BYTES = 4096
OUT_OF_MEMORY = "OutOfMemory"
"""The cause of a rank's end that a smaller microbatch may mend."""
KILLED_FOR_MEMORY = "OOMKilled"
"""The kubelet's word for a container of which the kernel has killed everything."""
NOT_MET = "RendezvousFailed"
"""The cause of a node's end whose ranks never began, for not all the others came."""
EXIT_STALLED = 70
"""The entrypoint's own code: nothing moved within the deadline; the last words name where the ranks' stacks are."""


def _sayable(text: str) -> str:
    """JSON holds no lone surrogates, which Python puts into names of files that are not UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


Count = Annotated[int, Field(ge=0, le=2**53)]
"""What every reader of JSON can hold, and the CRD's int64: a larger one would be refused with the whole status."""

Seconds = Annotated[float, Field(ge=0, le=1e10)]
"""Three hundred years: what is no length of time for a clock is not read."""


class Message(BaseModel):
    """Read leniently: an older operator must understand a newer trainer."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class CheckpointRef(Message):
    """A committed checkpoint, named by its manifest."""

    step: Count
    uri: str
    digest: str
    """SHA-256 of the manifest's canonical bytes, hex."""
    weights_digest: str = ""


class Progress(Message):
    """What `GET /progress` of a pod answers; None: not known yet."""

    run_id: str
    attempt: Count = 0
    phase: str = "starting"
    """starting | preparing | validating | training | saving | finished"""
    step: Count = 0
    total_steps: Count | None = None
    loss: float | None = None
    validation_loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    seconds_since_last_step: float | None = None
    trained_seconds: Seconds | None = None
    """Of this attempt, from its first step; None: it has not come so far."""
    uncommitted_seconds: Seconds | None = None
    """Of these, those that would be lost now."""
    checkpoint: CheckpointRef | None = None


class Termination(Message):
    """A pod's last words, written to its termination message (JSON, at most 4 KiB)."""

    run_id: str
    attempt: Count = 0
    exit_code: Annotated[int, Field(ge=-255, le=255)]
    cause: str
    """Succeeded, Stopped, Stalled, Killed, OutOfMemory, or the name of the error's class."""
    message: Annotated[str, AfterValidator(_sayable)] = ""
    log: Annotated[str, AfterValidator(_sayable)] = ""
    """The last lines that the ranks wrote, where they failed: only those are left of a rank that was killed."""
    retryable: bool = True
    step: Count = 0
    total_steps: Count | None = None
    loss: float | None = None
    validation_loss: float | None = None
    trained_seconds: Seconds | None = None
    uncommitted_seconds: Seconds | None = None
    checkpoint: CheckpointRef | None = None

    def as_bytes(self) -> bytes:
        """JSON of at most `TERMINATION_LOG_BYTES`: first the log is cut, from its beginning, then the message, from
        its end; never the facts."""
        fitting = self._cut("log", lambda text, count: text[count:])
        return fitting._cut("message", lambda text, count: text[:-count]).model_dump_json().encode()

    def _cut(self, name: str, without: Callable[[str, int], str]) -> Termination:
        """Itself, with as little taken from one text as makes all fit, if that is enough."""
        shorter = self
        while (text := getattr(shorter, name)) and (surplus := shorter._surplus()) > 0:
            # JSON escapes may make a character six bytes long: cut by what its encoding takes.
            shorter = shorter.model_copy(update={name: without(text, min(len(text), surplus // 6 + 1))})
        return shorter

    def _surplus(self) -> int:
        return len(self.model_dump_json().encode()) - TERMINATION_LOG_BYTES
