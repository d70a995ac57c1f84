"""Observed + Decision -> status and events. Comes after `decide.py`; pure, the clock is passed in.

Status is written before the decision is carried out, so whatever happens in between the next look decides the
same from it. A condition's `lastTransitionTime` moves only when its status flips.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nexa_operator import goodput
from nexa_operator.classify import Loss
from nexa_operator.decide import (
    BACKING_OFF,
    Create,
    Decision,
    Fail,
    Hold,
    Probe,
    Restart,
    Resume,
    Shrink,
    Starting,
    Succeed,
    Suspend,
    Wait,
    Watch,
)
from nexa_operator.naming import STORAGE_PREFIX
from nexa_operator.observe import RESIZING, STOPPING, Observed, Rank, ignored_seconds
from nexa_operator.reading import Body, condition_of, is_true
from nexa_train.config.protocol import CheckpointRef, Progress, Termination

TYPES = (
    "Ready",
    "Reconciling",
    "Stalled",
    "Queued",
    "Running",
    "Suspended",
    "Succeeded",
    "Failed",
    "CheckpointReady",
    "ProgressUnknown",
)
WAITING_FOR_ADMISSION = "WaitingForAdmission"
_QUEUED = ("Queued", "Reconciling")
_STARTING = ("Creating", "Resuming", "Restarting", "Shrinking")
_LONGEST_MESSAGE = 1024
MOST_EXCLUDED = 32
"""Nodes that a job keeps off; the first excluded is the first to be tried again."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a status needs besides what was seen and decided."""

    generation: int
    created: datetime.datetime | None
    """When the job was."""
    run_id: str
    num_nodes: int
    """Pods of the gang on record."""
    now: datetime.datetime
    progress_deadline_seconds: int = 0
    image: str = ""
    """Of the attempt that is to begin; empty: none is."""
    storage: str = ""
    trouble: str = ""
    """What the API server said when the last decision was carried out; empty: it agreed."""
    progress_known: bool = True


@dataclass(frozen=True, kw_only=True)
class Happening:
    """An event for the people who look at the job."""

    type: str
    """Normal or Warning."""
    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class _Verdict:
    """Where a decision leaves the job: its phase, and the conditions that are true with reason and message."""

    phase: str
    true: Mapping[str, tuple[str, str]]


def next_status(previous: Body, *, seen: Observed, decision: Decision, context: Context) -> dict[str, Any]:
    """The whole status; equal to `previous` when nothing changed."""
    verdict = _verdict(previous, seen, decision, context)
    before = goodput.read(previous, context.created)
    account = _account(before, seen, decision, context)
    spent = account.to_status(context.now) or None
    told: dict[str, Any] = {
        "observedGeneration": context.generation,
        "phase": verdict.phase,
        "runId": context.run_id or previous.get("runId"),
        **_counts(previous, seen, decision),
        **_recovery(previous, seen, decision, context),
        **_means(previous, decision, context),
        **_times(previous, decision, context),
        **_facts(previous, seen, decision),
        "checkpoint": _checkpoint(seen.checkpoint),
        "lastFailure": _last_failure(previous, seen, decision, context),
        "goodput": previous.get("goodput") if account == before else spent,
        "conditions": _conditions(previous, verdict, seen, context),
    }
    status = {key: value for key, value in told.items() if value is not None}
    # Time that passes is no reason to write; what is written for another reason says it.
    return status if status == previous or spent is None else {**status, "goodput": spent}


def caught_up(previous: Body, *, seen: Observed, decision: Decision, context: Context) -> dict[str, Any]:
    """What a finished job says later: that it has seen a later spec, of which nothing changes it any more, and what its
    ranks committed while they were ended."""
    news = {}
    if seen.checkpoint and (seen.record.checkpoint is None or seen.checkpoint.step > seen.record.checkpoint.step):
        facts = _facts(previous, seen, decision)
        news = {key: value for key, value in facts.items() if value is not None}
        news["checkpoint"] = _checkpoint(seen.checkpoint)
    before = previous.get("conditions") or []
    true = {each["type"]: (each["reason"], each["message"]) for each in before if each["status"] == "True"}
    if news:
        true |= _committed(seen)
    conditions = [_condition(old, old["type"], true.get(old["type"]), previous["phase"], context) for old in before]
    return {**previous, **news, "observedGeneration": context.generation, "conditions": conditions}


def _counts(previous: Body, seen: Observed, decision: Decision) -> dict[str, int]:
    restarts, charged = previous.get("restarts", 0), previous.get("chargedRestarts", 0)
    if isinstance(decision, Restart):
        return {"attempt": decision.attempt, "restarts": restarts + 1, "chargedRestarts": decision.charged}
    attempt = decision.attempt if isinstance(decision, Starting) else seen.record.attempt
    return {"attempt": attempt, "restarts": restarts, "chargedRestarts": charged}


def _recovery(previous: Body, seen: Observed, decision: Decision, context: Context) -> dict[str, Any]:
    """What the next attempt will be like, and when it may begin."""
    kept = ("numNodes", "lossesWithoutCheckpoint", "adaptedRestarts", "nextAttemptTime", "excludedNodes")
    status = {key: previous.get(key) for key in kept}
    if isinstance(decision, Hold):
        status["numNodes"] = None  # as many as the job asks for by the time it goes on
    if isinstance(decision, Starting):
        status |= {"numNodes": decision.num_nodes, "nextAttemptTime": None}
    if isinstance(decision, Resume | Probe) and decision.forgives:
        status["excludedNodes"] = None
    if isinstance(decision, Restart):
        status |= {"lossesWithoutCheckpoint": decision.losses, "adaptedRestarts": decision.adapted or None}
        if decision.wait_seconds:
            later = context.now + datetime.timedelta(seconds=decision.wait_seconds)
            status["nextAttemptTime"] = timestamp(later)
        if decision.loss.action == "exclude_node" and decision.loss.node:
            others = [node for node in seen.record.excluded_nodes if node != decision.loss.node]
            status["excludedNodes"] = [*others, decision.loss.node][-MOST_EXCLUDED:]
    return status


def _means(previous: Body, decision: Decision, context: Context) -> dict[str, str | None]:
    """With what the attempt on record is carried out."""
    if isinstance(decision, Starting):
        return {"image": context.image or None, "storage": context.storage or None}
    return {key: previous.get(key) for key in ("image", "storage")}


def _account(account: goodput.Account, seen: Observed, decision: Decision, context: Context) -> goodput.Account:
    """Where the job's time went until now, and what it is spent on from now on."""
    now, told = context.now, _told(seen)
    stands = seen.gang is not None and seen.gang.suspended
    if told is not None and not stands and not isinstance(decision, Hold | Resume | Wait):
        account = goodput.began_to_train(account, told, now)
    if isinstance(decision, Restart | Fail):
        stalled = decision.loss is not None and decision.loss.cause == "Stalled"
        stood = context.progress_deadline_seconds if stalled else 0
        if decision.loss is not None:
            account = goodput.lost(account, told, stood_seconds=stood, now=now)
    return account.moved(_state(account, seen, decision, context), now)


def _state(account: goodput.Account, seen: Observed, decision: Decision, context: Context) -> str:
    if isinstance(decision, Succeed | Fail):
        return ""
    if isinstance(decision, Hold) or (isinstance(decision, Suspend) and not decision.resizes):
        return goodput.SUSPENDED
    if isinstance(decision, Restart | Suspend):
        return goodput.RESTART
    if isinstance(decision, Wait) and decision.reason == STOPPING:
        return account.state
    if isinstance(decision, Create | Resume) and account.state == goodput.PRODUCTIVE:
        return goodput.RESTART  # somebody deleted its gang
    if isinstance(decision, Watch | Wait) and _queued(seen, context):
        return goodput.QUEUE
    if isinstance(decision, Create) and context.trouble:
        return goodput.QUEUE  # a policy or a quota denies its gang
    if isinstance(decision, Wait) and seen.gang is not None and not seen.gang.goes_on:
        return goodput.RESTART  # something else than time is lacking
    if account.state in (goodput.RESTART, goodput.PRODUCTIVE):
        return account.state
    begun = seen.gang is not None and max(seen.gang.num_up, seen.gang.num_placed) >= context.num_nodes
    return goodput.STARTUP if begun else goodput.QUEUE  # what has its nodes keeps others off them: its deadline runs


def _queued(seen: Observed, context: Context) -> bool:
    """Whether the gang waits for what others have: leave to run or to make pods, a scheduler that tries, or nodes."""
    gang = seen.gang
    if gang is None or gang.suspended or seen.refusal:
        return gang is not None
    return any(rank.unplaced_since for rank in gang.ranks) or ignored_seconds(gang, context.now) == 0.0


def _times(previous: Body, decision: Decision, context: Context) -> dict[str, str | None]:
    start, end = previous.get("startTime"), previous.get("completionTime")
    if isinstance(decision, Create) and start is None:
        start = timestamp(context.now)
    if isinstance(decision, Succeed | Fail) and end is None:
        end = timestamp(context.now)
    return {"startTime": start, "completionTime": end}


def timestamp(when: datetime.datetime) -> str:
    """As Kubernetes writes times: UTC, whole seconds."""
    return when.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _facts(previous: Body, seen: Observed, decision: Decision) -> dict[str, Any]:
    """From the last words of the ranks, else from progress, else what is on record."""
    kept = ("step", "totalSteps", "progress", "loss", "validationLoss")
    told = _told(seen)
    if told is None:
        return {key: previous.get(key) for key in kept}
    total = told.total_steps if told.total_steps is not None else previous.get("totalSteps")
    validation = _number(told.validation_loss)
    # Until it has found its checkpoint an attempt speaks of no step, which takes back none that was reached before.
    begins = told.step == 0 and previous.get("step", 0) > 0
    step, loss = (previous["step"], previous.get("loss")) if begins else (told.step, _number(told.loss))
    facts = {
        "step": step,
        "totalSteps": total,
        "progress": f"{step}/{total}" if total is not None else str(step),
        "loss": loss,
        "validationLoss": validation if validation is not None else previous.get("validationLoss"),
    }
    if isinstance(told, Progress) and not isinstance(decision, Succeed | Fail):
        facts["tokensPerSecond"] = _number(told.tokens_per_second)
        facts["etaSeconds"] = _number(told.eta_seconds)
        facts["eta"] = duration(told.eta_seconds)
    return facts


def _told(seen: Observed) -> Progress | Termination | None:
    return (seen.gang.last_words if seen.gang else None) or seen.progress


def _number(value: float | None) -> float | None:
    """Six digits are for looking at; the manifest has them all. JSON knows no NaN."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def duration(seconds: float | None) -> str | None:
    """2h05m, 12m30s, 45s."""
    if seconds is None or not math.isfinite(seconds):
        return None
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def _checkpoint(seen: CheckpointRef | None) -> dict[str, Any] | None:
    if seen is None:
        return None
    out = {"step": seen.step, "uri": seen.uri, "digest": seen.digest, "weightsDigest": seen.weights_digest}
    return {key: value for key, value in out.items() if value != ""}


def _last_failure(previous: Body, seen: Observed, decision: Decision, context: Context) -> Any:
    loss = decision.loss if isinstance(decision, Restart | Fail) else None
    if loss is None:
        return _within_reach(previous.get("lastFailure"), seen)
    failure = {
        "attempt": seen.record.attempt,
        "cause": loss.cause,
        "exitCode": loss.exit_code,
        "message": _shortened(loss.message) or None,
        "charged": loss.charged,
        "checkpointStep": seen.checkpoint.step if seen.checkpoint else None,
        "time": timestamp(context.now),
    }
    return {key: value for key, value in failure.items() if value is not None}


def _within_reach(failure: dict[str, Any] | None, seen: Observed) -> dict[str, Any] | None:
    """The checkpoint that there was then may have been found damaged since: what is new begins with an earlier one."""
    if failure is None or seen.checkpoint is None or failure.get("checkpointStep", -1) <= seen.checkpoint.step:
        return failure
    return {**failure, "checkpointStep": seen.checkpoint.step}


def _verdict(previous: Body, seen: Observed, decision: Decision, context: Context) -> _Verdict:
    """One guard clause a decision; what is not named as true is false."""
    if isinstance(decision, Succeed):
        reached = seen.checkpoint
        said = f"finished, checkpoint of step {reached.step}" if reached else "every rank ended well"
        return _Verdict(phase="Succeeded", true={"Succeeded": ("Finished", said), "Ready": ("Succeeded", said)})
    if isinstance(decision, Fail):
        failed = (_reason(decision.reason), _shortened(decision.message))
        return _Verdict(phase="Failed", true={"Failed": failed, "Stalled": failed})
    if isinstance(decision, Wait):
        return _waiting(decision, context)
    if isinstance(decision, Suspend) and decision.resizes:
        why = (RESIZING, "the next attempt has another number of pods; a checkpoint is committed first")
        return _Verdict(phase="Restarting", true={"Queued": why, "Reconciling": why})
    if isinstance(decision, Suspend) or (isinstance(decision, Hold) and decision.seconds > 0):
        return _Verdict(phase="Suspending", true={"Reconciling": ("Suspending", "ranks commit their last checkpoint")})
    if isinstance(decision, Hold):
        said = "by schedule.suspend"
        true = {"Suspended": ("Suspended", said), "Ready": ("Suspended", said)}
        return _Verdict(phase="Suspended", true=true)
    if context.trouble and not _all_run(seen, context):
        refused = ("Refused", _shortened(context.trouble))
        return _Verdict(phase="Pending", true={"Queued": refused, "Reconciling": refused})
    if isinstance(decision, Starting):
        return _starting(decision)
    return _watching(previous, seen, context)


def _all_run(seen: Observed, context: Context) -> bool:
    return seen.gang is not None and seen.gang.num_up >= context.num_nodes


def _waiting(decision: Wait, context: Context) -> _Verdict:
    said = decision.message
    if decision.reason == BACKING_OFF and decision.seconds is not None:
        said = f"{said} at {timestamp(context.now + datetime.timedelta(seconds=decision.seconds))}"
    why = (_reason(decision.reason), _shortened(said))
    phase = "Restarting" if decision.reason in (BACKING_OFF, STOPPING) else "Pending"
    return _Verdict(phase=phase, true={"Queued": why, "Reconciling": why})


def _starting(decision: Create | Restart | Resume | Shrink) -> _Verdict:
    if isinstance(decision, Restart):
        phase, reason, said = "Restarting", "Restarting", f"after {_described(decision.loss)}"
    elif isinstance(decision, Shrink):
        phase, reason, said = "Restarting", "Shrinking", f"with {decision.num_nodes} pods, for which there is room"
    elif isinstance(decision, Resume):
        phase, reason, said = "Pending", "Resuming", decision.why
    else:
        phase, reason, said = "Pending", "Creating", ""
    why = (reason, f"attempt {decision.attempt} {said}".strip())
    return _Verdict(phase=phase, true={"Queued": why, "Reconciling": why})


def _watching(previous: Body, seen: Observed, context: Context) -> _Verdict:
    if seen.admission:
        queued = (WAITING_FOR_ADMISSION, _shortened(f"attempt {seen.record.attempt} {seen.admission}"))
        return _Verdict(phase="Queued", true=dict.fromkeys(_QUEUED, queued))
    ranks, up = (seen.gang.ranks, seen.gang.num_up) if seen.gang else ((), 0)
    if _all_run(seen, context):
        said = ("Running", f"{context.num_nodes} of {context.num_nodes} pods of attempt {seen.record.attempt}")
        return _Verdict(phase="Running", true={"Running": said, "Ready": said})
    held_up = next((rank for rank in ranks if rank.phase == "Pending" and _is_held_up(rank)), None)
    if seen.refusal:
        refused = ("PodsRefused", _shortened(f"{up} of {context.num_nodes} pods run: {seen.refusal}"))
        return _Verdict(phase="Pending", true=dict.fromkeys(_QUEUED, refused))
    before, ignored = condition_of(previous, "Queued"), _ignored(seen, context)
    if held_up is None and not ignored and before.get("status") == "True" and before["reason"] in _STARTING:
        # A write for every pod that comes up would tell nobody anything.
        return _Verdict(phase=previous["phase"], true=dict.fromkeys(_QUEUED, (before["reason"], before["message"])))
    reason, why = _hindrance(held_up) if held_up else ("PodsPending", ignored)
    waiting = (reason, _shortened(f"{up} of {context.num_nodes} pods run{why}"))
    return _Verdict(phase="Pending", true=dict.fromkeys(_QUEUED, waiting))


def _is_held_up(rank: Rank) -> bool:
    return bool(rank.message) or rank.reason not in ("", "ContainerCreating", "PodInitializing")


def _ignored(seen: Observed, context: Context) -> str:
    if seen.gang is None or ignored_seconds(seen.gang, context.now) != 0.0:
        return ""
    schedulers = sorted({rank.scheduler for rank in seen.gang.ranks if rank.untried_since})
    return f": no scheduler {', '.join(schedulers)} has tried to place the others; does one of that name run here?"


def _hindrance(rank: Rank) -> tuple[str, str]:
    why = f": {rank.reason} {rank.message}".rstrip()
    if f'"{STORAGE_PREFIX}' not in rank.message:
        return "PodsPending", why
    # Only the kubelet looks for a profile: the operator may not read Secrets.
    return "StorageProfileMissing", f"{why}; a profile is a ConfigMap and a Secret of that name in the job's namespace"


def _conditions(previous: Body, verdict: _Verdict, seen: Observed, context: Context) -> list[dict[str, Any]]:
    true = {**verdict.true, **_committed(seen)}
    if "Running" in true and not context.progress_known:
        true["ProgressUnknown"] = ("Unreachable", "pod 0 does not answer; that alone restarts nothing")
    return [
        _condition(condition_of(previous, kind), kind, true.get(kind), verdict.phase, context)
        for kind in TYPES
        if kind != "ProgressUnknown" or kind in true or condition_of(previous, kind)
    ]


def _committed(seen: Observed) -> dict[str, tuple[str, str]]:
    return {"CheckpointReady": ("Committed", f"step {seen.checkpoint.step}")} if seen.checkpoint else {}


def _condition(old: Body, kind: str, true: tuple[str, str] | None, phase: str, context: Context) -> dict[str, Any]:
    status = "True" if true else "False"
    reason, message = true or (phase, "")
    now = timestamp(context.now)
    return {
        "type": kind,
        "status": status,
        "observedGeneration": context.generation,
        "lastTransitionTime": now if old.get("status") != status else old.get("lastTransitionTime", now),
        "reason": reason,
        "message": message,
    }


def _reason(text: str) -> str:
    """A cause comes from the trainer; a condition's reason must be one word."""
    return re.sub(r"^[^A-Za-z]+|[^A-Za-z0-9_]", "", text)[:128] or "Failed"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[: _LONGEST_MESSAGE - 1]}…"


def _described(loss: Loss) -> str:
    code = f" (exit code {loss.exit_code})" if loss.exit_code is not None else ""
    said = f": {loss.message}" if loss.message else ""
    return _shortened(f"{loss.cause}{code}{said}")


def happenings(old: Body, new: Body, decision: Decision) -> Iterator[Happening]:
    """What changed from one status to the next, in the order in which it happened."""
    attempt = new.get("attempt", 0)
    before, step = _step(old), _step(new)
    if step != before:
        checkpoint = new["checkpoint"]
        said = f"step {step}: {checkpoint.get('digest', '')} {checkpoint.get('uri', '')}".rstrip()
        if before is not None and step is not None and step < before:
            said = f"the one of step {before} is damaged; attempt {attempt} goes on from {said}"
            yield Happening(type="Warning", reason="CheckpointGivenUp", message=said)
        else:
            yield Happening(type="Normal", reason="CheckpointCommitted", message=said)
    if isinstance(decision, Watch) and decision.problem:
        yield Happening(type="Warning", reason="NotUnderstood", message=f"its gang goes on: {decision.problem}")
    if isinstance(decision, Resume):
        yield Happening(type="Normal", reason="Resumed", message=f"attempt {attempt} {decision.why}")
    if isinstance(decision, Restart):
        said = f"attempt {attempt} after {_described(decision.loss)}"
        yield Happening(type="Warning", reason="Restarted", message=said)
    if isinstance(decision, Shrink):
        said = f"attempt {attempt} with {decision.num_nodes} pods: there was no room for the others"
        yield Happening(type="Warning", reason="Shrunk", message=said)
    if isinstance(decision, Suspend) and decision.resizes:
        said = f"attempt {attempt} stops; the next has another number of pods"
        yield Happening(type="Normal", reason=RESIZING, message=said)
    if (excluded := new.get("excludedNodes")) and excluded != old.get("excludedNodes"):
        yield Happening(type="Warning", reason="NodeExcluded", message=f"from attempt {attempt} on: {excluded[-1]}")
    for kind, level in (("Running", "Normal"), ("Suspended", "Normal"), ("Succeeded", "Normal"), ("Failed", "Warning")):
        if is_true(new, kind) and not is_true(old, kind):
            condition = condition_of(new, kind)
            said = f"attempt {attempt}: {condition['reason']}: {condition['message']}"
            yield Happening(type=level, reason=kind, message=said)


def _step(status: Body) -> int | None:
    step: int | None = (status.get("checkpoint") or {}).get("step")
    return step
