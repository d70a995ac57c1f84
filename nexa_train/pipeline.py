"""The life of a run in its ranks: prepare, validate, train, checkpoint, finish.

Every rank runs this; rank 0 writes artifacts, the first rank of each node tells the launcher how it goes.
Backends do the arithmetic (`backends/`), `artifact/` commits; here is only the order of things.
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
import time
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nexa_train.artifact.manifest import ManifestDraft, step_folder
from nexa_train.artifact.publish import (
    Committed,
    Publisher,
    fetch,
    manifest_uri,
    read_manifest,
)
from nexa_train.backends import make_backend
from nexa_train.backends.base import RankContext, StepMetrics
from nexa_train.checkpoint import Saved, Saver
from nexa_train.config.job import Job
from nexa_train.config.protocol import CheckpointRef, Progress
from nexa_train.data.tokenizer import FILES as TOKENIZER_FILES
from nexa_train.errors import DamagedError, ForeignError, NonFiniteLossError, NotFoundError, StoppedError
from nexa_train.rundir import RunDir
from nexa_train.store import Store

RATE_WINDOW_STEPS = 20
"""Steps over which tokens per second and time left are averaged."""


@dataclass(frozen=True)
class RunFacts:
    """What the launcher found out and the manifest will say."""

    job: Job
    attempt: int
    dataset: dict[str, Any]
    code: dict[str, Any]
    world: dict[str, Any]


@dataclass
class _Record:
    """What this process has seen of the run."""

    loss: float | None = None
    validation_loss: float | None = None
    """Of this process's last evaluation, or of the committed step that it went on from."""
    validated: int | None = None
    """The step of it."""
    initial_validation_loss: float | None = None
    logs: list[dict[str, Any]] = field(default_factory=list)
    recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=RATE_WINDOW_STEPS + 1))
    began: float | None = None
    """When training began, on the monotonic clock; the others too: when the save in flight and the last committed
    one were staged."""
    staged: float = 0.0
    committed: float = 0.0


class TrainingPipeline:
    """One attempt at a run, as one rank sees it."""

    def __init__(self, context: RankContext, facts: RunFacts, store: Store, rundir: RunDir, *, local_rank: int) -> None:
        self.context = replace(context, should_stop=self.stop_agreed)
        self.facts, self.store, self.rundir = facts, store, rundir
        self.speaks = local_rank == 0
        self.run_id = facts.job.run_id
        self.backend = make_backend(self.context)
        nonce = self._from_first(secrets.token_bytes(4)).hex()
        self.publisher = Publisher(store, self.run_id, f"a{facts.attempt}", nonce=nonce)
        self.saver = Saver(
            self.publisher,
            rundir,
            rank=context.rank,
            world=context.world,
            keep_last=facts.job.spec.artifacts.keep_last,
        )
        self.record = _Record()
        self.checkpoint: CheckpointRef | None = None
        self.step = 0
        self.stopping = False

    def run(self) -> None:
        """Take the run to its end; where it stands is told on the way, through the run folder.

        Raises:
            StoppedError: a stop was asked for; a checkpoint is committed.
            NexaError: anything else that ended it.
        """
        try:
            self._tell("preparing")
            self._prepare()
            if self.step == 0 and self.context.validation.num_sequences:
                self._validate()
                self.record.initial_validation_loss = self.record.validation_loss
            self.record.began = self.record.committed = time.monotonic()
            self.record.recent.append((self.record.began, 0))
            self._tell("training")
            if not self.stop_agreed() and self.step < self.context.total_steps:
                self.backend.train(self._after_step)
            self._validate_what_was_committed()
        finally:
            self.saver.close()  # what was trained before a failure is worth keeping
        self._finish()

    def stop_agreed(self) -> bool:
        """Whether any rank's node was asked to stop; the same answer on every rank.

        Asked after each step and each batch of the validation split, so this is also where a rank says that it gets on.

        Raises:
            NexaError: a rank's save has failed; on every rank, what it failed with.
        """
        done, failed = self.saver.is_done, self.saver.has_failed
        flags = torch.tensor([self.rundir.stop_asked(), failed], dtype=torch.int32)
        if self.context.world > 1:
            dist.all_reduce(flags)
        self.rundir.beat()
        self.stopping = bool(flags[0])
        if flags[1] or done:
            self._collect_save()
        return self.stopping

    def _prepare(self) -> None:
        self.backend.setup()
        newest, folder = self._newest(), self.rundir.restoring
        if newest is None:
            return
        self._barrier()
        self._restore(newest, folder)
        self._barrier()
        if self.speaks:
            shutil.rmtree(folder)
        self._adopt(newest)

    def _restore(self, newest: Committed, folder: Path) -> None:
        try:
            self.backend.restore(Saved(folder))
        except ForeignError as exc:
            # Not the one before it instead: that is most likely the same model's, and to go behind a whole checkpoint
            # loses work without a word.
            raise ForeignError(
                f"{manifest_uri(self.store, newest)} is whole, but not a checkpoint of this job's model: {exc}; take "
                "another --run-name or artifacts.uri, or the nexa and model that it was made with"
            ) from exc

    def _newest(self) -> Committed | None:
        """Fetch the checkpoint to go on from, once a node.

        Rank 0 decides which: another rank might list a moment later, and see more.
        """
        found = None
        if self.context.rank == 0:
            looked = self.publisher.resume(self.rundir.restoring)
            for problem in looked.damaged:
                self.rundir.warn(f"a damaged checkpoint is not used: {problem}")
            found = looked.committed
        said = found.manifest.step.to_bytes(8, "big") + bytes.fromhex(found.digest) if found else bytes(40)
        message = self._from_first(said)
        step, digest = int.from_bytes(message[:8], "big"), message[8:].hex()
        if not step or found is not None:
            return found
        try:
            return self._fetch(step, digest)
        except NotFoundError as exc:
            # Another attempt may have retired it since rank 0 listed it; the next look finds a newer one.
            raise DamagedError(f"step {step} of {self.run_id} went while it was read: {exc}") from exc

    def _fetch(self, step: int, digest: str) -> Committed:
        """What rank 0 has decided on, read by this rank."""
        mine = read_manifest(self.store, step_folder(self.run_id, step))
        if mine.digest != digest:
            raise DamagedError(f"step {step} of {self.run_id}: manifest {mine.digest} here, {digest} on rank 0")
        if self.speaks:
            fetch(self.store, mine, self.rundir.restoring)
        return mine

    def _after_step(self, metrics: StepMetrics) -> bool:
        self.step, self.record.loss = metrics.step, metrics.loss
        self.record.logs.append(asdict(metrics))
        self.record.recent.append((time.monotonic(), metrics.tokens))
        last = metrics.step == self.context.total_steps
        every, stop = self.facts.job.spec.training.eval_every_steps, self.stop_agreed()
        if (last or (every and metrics.step % every == 0)) and not stop:
            self._validate()
        if last or self.stopping or metrics.step % self.context.plan.save_every == 0:
            self._save()
        if last or self.stopping:
            self._tell("saving")
            self._collect_save()
        self._tell("training")
        return self.stopping

    def _validate(self) -> None:
        """Evaluate the step where training stands; what a stop cuts short leaves the record as it was.

        Raises:
            NonFiniteLossError: on every rank.
        """
        self._tell("validating")
        loss = self.backend.validate()
        if loss is None:
            return
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"step {self.step}: the loss on the validation split is {loss}, so weights or rows are broken; this "
                "step is not committed: lower optimizer.lr, or look at the validation rows"
            )
        self.record.validation_loss, self.record.validated = loss, self.step

    @property
    def _lacks_validation(self) -> bool:
        """Whether all is trained, but a stop came before the loss on the validation split was known."""
        ended = self.step == self.context.total_steps
        return ended and self.record.validated != self.step and self.context.validation.num_sequences > 0

    def _validate_what_was_committed(self) -> None:
        """Take the last evaluation again that a stop cut short in an attempt before this one.

        A stop commits what was trained within its grace period, so the last step is committed without its validation
        loss, and stays as it is: what is committed never changes. The loss is told in how this attempt ends. To leave
        the last step uncommitted would give up training for the sake of one number.
        """
        if self._lacks_validation and not self.stopping:
            self._validate()

    def _save(self) -> None:
        """Hand the state over to the background, once the save before is committed."""
        if self.saver.flight:
            self._tell("saving")
        began = time.monotonic()
        self._collect_save()
        staged = self.backend.stage()
        self.record.staged = time.monotonic()
        self.record.logs[-1]["save_stall_seconds"] = round(self.record.staged - began, 4)
        self.saver.start(staged, self._small_files, self._draft())
        self.record.logs.clear()

    def _collect_save(self) -> None:
        """Wait for the save in flight; its failure on any rank is raised on all."""
        if done := self.saver.wait():
            self.checkpoint, self.record.committed = done.checkpoint, self.record.staged
            if self.record.logs:
                self.record.logs[-1]["save_background_seconds"] = round(done.seconds, 3)

    @cached_property
    def _small_files(self) -> dict[str, bytes]:
        folder, described = self.context.located.folder, self.backend.describe()
        # A whole model keeps what says how its text is to be generated, and where it ends.
        names = (*TOKENIZER_FILES, *(("generation_config.json",) if "config.json" in described else ()))
        return {**described, **{name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}}

    def _draft(self) -> ManifestDraft:
        record = self.record
        metrics = {
            "loss": record.loss,
            "perplexity": self._perplexity(),
            "validation_loss": record.validation_loss if record.validated == self.step else None,
            "initial_validation_loss": record.initial_validation_loss,
        }
        return ManifestDraft(
            config=json.loads(self.facts.job.spec.model_dump_json()),
            parent=self.checkpoint.digest if self.checkpoint else None,
            metrics={name: value for name, value in metrics.items() if value is not None},
            dataset=self.facts.dataset,
            code=self.facts.code,
            world=self.facts.world,
            cursor={"sequences": min(self.step * self.context.plan.global_batch, self.context.order.total)},
            logs=record.logs,
        )

    def _perplexity(self) -> float | None:
        """None for preferences, whose loss is not one of tokens."""
        if self.record.loss is None or self.context.spec.method.type == "dpo":
            return None
        return math.exp(min(self.record.loss, 700.0))

    def _adopt(self, committed: Committed) -> None:
        manifest, metrics = committed.manifest, committed.manifest.metrics
        self.step = manifest.step
        self.checkpoint = CheckpointRef(
            step=manifest.step,
            uri=manifest_uri(self.store, committed),
            digest=committed.digest,
            weights_digest=manifest.weights_digest or "",
        )
        self.record.loss, self.record.validation_loss = metrics.get("loss"), metrics.get("validation_loss")
        self.record.validated = None if self.record.validation_loss is None else self.step
        self.record.initial_validation_loss = metrics.get("initial_validation_loss")

    def _finish(self) -> None:
        if self.stopping and (self.step < self.context.total_steps or self._lacks_validation):
            where = self.checkpoint.uri if self.checkpoint else "no step was done yet"
            raise StoppedError(
                f"stopped at step {self.step} of {self.context.total_steps}, {where}; run again to go on"
            )
        self._tell("finished")

    def _tell(self, phase: str) -> None:
        if not self.speaks:
            return
        rate, eta = self._pace()
        now, began = time.monotonic(), self.record.began
        self.rundir.write_progress(
            Progress(
                run_id=self.run_id,
                attempt=self.facts.attempt,
                phase=phase,
                step=self.step,
                total_steps=self.context.total_steps,
                loss=self.record.loss,
                validation_loss=self.record.validation_loss,
                tokens_per_second=rate,
                eta_seconds=eta,
                trained_seconds=None if began is None else round(now - began, 1),
                uncommitted_seconds=None if began is None else round(now - self.record.committed, 1),
                checkpoint=self.checkpoint,
            )
        )

    def _pace(self) -> tuple[float | None, float | None]:
        """Tokens per second and seconds left, over the last steps."""
        recent = self.record.recent
        if len(recent) < 2:
            return None, None
        elapsed = max(recent[-1][0] - recent[0][0], 1e-9)
        tokens = sum(count for _, count in list(recent)[1:])
        left = (self.context.total_steps - self.step) * elapsed / (len(recent) - 1)
        return round(tokens / elapsed, 1), round(left, 1)

    def _barrier(self) -> None:
        if self.context.world > 1:
            dist.barrier()

    def _from_first(self, said: bytes) -> bytes:
        """What rank 0 said; all must say equally much."""
        if self.context.world == 1:
            return said
        message = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        dist.broadcast(message, src=0)
        return message.numpy().tobytes()
