"""A gang that lost ranks -> the one loss that explains the others. Between `observe.py` and `decide.py`; pure.

What speaks, in this order: the job's own rules, the trainer's last words, the exit code, the pod's conditions, the end
of its log and what the node says of itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from nexa_operator.observe import NODE_GONE, NODE_NOT_READY, Gang, Rank
from nexa_train.config.protocol import KILLED_FOR_MEMORY, NOT_MET, OUT_OF_MEMORY
from nexa_train.config.spec import RecoveryRule

Action: TypeAlias = Literal["retry", "exclude_node", "fail"]

FATAL_EXIT_CODES = {2: "ConfigError", 3: "NotFoundError", 5: "DataError"}
"""Exit codes of `nexa` that another attempt would only repeat, for ranks that left no last words."""

BROKEN_NODE = (
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "fallen off the bus",
    "NVRM: Xid",
)
"""What NVIDIA's driver says of broken hardware: another attempt there would end so again."""

BROKEN_NODE_CONDITIONS = frozenset(
    {
        *("KernelDeadlock", "ReadonlyFilesystem", "AcceleratedHardwareNotReady"),
        *("GPUMissing", "XIDErrors", "NVLinkStatusInactive", "IBLinkFlapping"),
    }
)
"""Reported by node-problem-detector, EKS's node monitoring agent and AKS's checks of GPUs of nodes that do not heal by
themselves."""

_LOST_NODE = (NODE_GONE, NODE_NOT_READY)
_PRESSURES = ("DiskPressure", "MemoryPressure", "NetworkUnavailable", "PIDPressure")
_TELLING_CONDITIONS = BROKEN_NODE_CONDITIONS.union(_LOST_NODE, _PRESSURES)
_LAST_LINES = 5
_LAST_CHARACTERS = 500
_KILLED = (137, 143)
"""By SIGKILL or SIGTERM."""
_DELETED = "PodDeleted"
_STOPPED = "Stopped"
_SUPERSEDED = "SupersededError"


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Why an attempt ended: the rank that tells the most."""

    cause: str
    message: str = ""
    exit_code: int | None = None
    action: Action = "retry"
    charged: bool = True
    node: str = ""
    """Where that rank ran."""
    adapts: bool = False
    """The next attempt differs in what this one failed with, so it need not wait."""


def classify(gang: Gang, *, rules: Sequence[RecoveryRule] = (), ran: bool = True) -> Loss:
    """The one loss that explains the others: ranks left alone fail with connection errors of their own.

    Args:
        ran: whether all pods of the attempt were ever seen to run.
    """
    lost = sorted(gang.lost_ranks, key=lambda rank: rank.ending_order)
    if not lost:
        # The pod itself is gone: something outside removed it, the trainer cannot.
        said = gang.failure_message
        action = _by_rule(rules, Rank(index=0), None, _DELETED, said)
        return Loss(cause=_DELETED, message=said, action=action or "retry", charged=False)
    return min(((rank, _loss(rank, rules, ran=ran)) for rank in lost), key=_telling)[1]


def _telling(told: tuple[Rank, Loss]) -> tuple[int, bool, bool]:
    """Final beats disruption beats failure; what stopped as asked or was removed explains nothing
    unless it went first.

    Of equals the one on a broken node tells more, then one that had no memory: the others may have failed of losing it,
    within the same second by their nodes' clocks.
    """
    rank, loss = told
    blames_no_node, had_memory = loss.action != "exclude_node", loss.cause not in (KILLED_FOR_MEMORY, OUT_OF_MEMORY)
    if loss.action == "fail":
        place = 0
    elif loss.cause in (_STOPPED, _DELETED) and not rank.went_first:
        place = 3  # the Job's controller removes the other pods as soon as one has failed
    else:
        place = 2 if loss.charged else 1
    return place, blames_no_node, had_memory


def _loss(rank: Rank, rules: Sequence[RecoveryRule], *, ran: bool) -> Loss:
    words = rank.termination
    code = rank.exit_code if rank.exit_code is not None else words.exit_code if words else None
    cause = words.cause if words else _cause_without_words(rank, code)
    message = words.message if words else rank.message or _end_of(rank.output)
    said = f"{message}\n{words.log if words else rank.output}"
    action = _by_rule(rules, rank, code, cause, said)
    # All ranks stop when one is asked to: whoever asked, it was not this job's fault.
    gone = rank.disrupted or rank.replaced or cause == _STOPPED or _was_removed(rank, code)
    gone = gone or (words is None and (cause in _LOST_NODE or rank.never_began))
    # The next attempt takes fewer sequences at once; with one there is no next, so this ends by itself.
    adapts = words is not None and words.cause == OUT_OF_MEMORY and words.retryable
    # It waited for pods that had no room, or no image yet.
    alone = cause == NOT_MET and not ran
    return Loss(
        cause=cause,
        message="; ".join(filter(None, (message, _node_says(rank, rules)))),
        exit_code=code,
        action=action or _built_in(rank, code, said),
        charged=not (gone or adapts or alone),
        node="" if rank.replaced else rank.node,  # its place was lost with it: this one is its follower's
        adapts=adapts,
    )


def _end_of(output: str) -> str:
    """As much as one reads in a status: there Python says what went wrong, and a runtime why nothing started."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    end = " | ".join(lines[-_LAST_LINES:])[-_LAST_CHARACTERS:]
    return f"it said last: {end}" if end else ""


def _by_rule(rules: Sequence[RecoveryRule], rank: Rank, code: int | None, cause: str, said: str) -> Action | None:
    return next((rule.action for rule in rules if _fits(rule, rank, code, cause, said)), None)


def _fits(rule: RecoveryRule, rank: Rank, code: int | None, cause: str, said: str) -> bool:
    """Whether all fits that the rule states."""
    return (
        (not rule.exit_codes or code in rule.exit_codes)
        and (not rule.causes or cause in rule.causes)
        and (not rule.log_contains or any(text in said for text in rule.log_contains))
        and (not rule.node_conditions or not rank.node_conditions.isdisjoint(rule.node_conditions))
    )


def _built_in(rank: Rank, code: int | None, said: str) -> Action:
    words = rank.termination
    if words is None and code in FATAL_EXIT_CODES:
        return "fail"
    # The next attempt starts from the checkpoint that was committed first.
    if words is not None and not words.retryable and words.cause != _SUPERSEDED:
        return "fail"
    broken = any(text in said for text in BROKEN_NODE) or not rank.node_conditions.isdisjoint(BROKEN_NODE_CONDITIONS)
    return "exclude_node" if broken else "retry"


def _went_with(rank: Rank, code: int | None) -> str:
    """How a rank without words lost its node; empty: it ended by itself, or was removed, whatever its node says."""
    ended_by_itself = code not in (None, *_KILLED) or rank.reason == KILLED_FOR_MEMORY
    if ended_by_itself or rank.deleting or rank.replaced:
        return ""
    return next((kind for kind in _LOST_NODE if kind in rank.node_conditions), "")


def _was_removed(rank: Rank, code: int | None) -> bool:
    """Whether it was asked to go, and went of that: at once, or killed without a word once its time was over."""
    killed = rank.termination is None and code in _KILLED and rank.reason != KILLED_FOR_MEMORY
    return rank.deleting and (code is None or killed)


def _node_says(rank: Rank, rules: Sequence[RecoveryRule]) -> str:
    """Of its conditions those that tell of trouble, here or by a rule: others are true of good nodes."""
    telling = _TELLING_CONDITIONS.union(*(rule.node_conditions for rule in rules)) & rank.node_conditions
    return f"node {rank.node}: {', '.join(sorted(telling))}" if telling else ""


def _cause_without_words(rank: Rank, code: int | None) -> str:
    if rank.disrupted:
        return "Disrupted"
    if code in FATAL_EXIT_CODES:
        return FATAL_EXIT_CODES[code]
    if lost := _went_with(rank, code):
        return lost
    removed = _was_removed(rank, code)
    if removed and (code is not None or rank.phase == "Pending"):
        return _DELETED  # neither how it was killed nor what it still waited for is why it goes
    if rank.reason and rank.reason != "Error":
        return rank.reason
    return _DELETED if rank.replaced or removed else "Killed"
