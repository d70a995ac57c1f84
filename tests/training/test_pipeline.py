"""A run in this process: saving in the background, stops at awkward moments, checkpoints made by an enemy."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nexa_train.artifact.manifest import FileEntry, Manifest
from nexa_train.config.load import load_job
from nexa_train.config.protocol import Termination
from nexa_train.errors import DamagedError, ForeignError, NonFiniteLossError, RefusedError, StoppedError
from nexa_train.launch.node import Node, make_ready
from nexa_train.launch.work import RankWork
from nexa_train.rundir import RunDir
from nexa_train.store.base import Stored
from nexa_train.store.local import LocalStore
from tests.cluster.run import wait_until
from tests.training.harness import Run, Runs, merged, write_pairs

if TYPE_CHECKING:
    from nexa_train.pipeline import TrainingPipeline

pytestmark = pytest.mark.training

SHORT: dict[str, Any] = {"training": {"max_steps": 6, "save_every_steps": 2}}


class Gated(LocalStore):
    """A folder whose writes below some step wait until `opened`."""

    def __init__(self, root: Path, holds: str = "no step") -> None:
        super().__init__(root)
        self.holds, self.opened = holds, threading.Event()

    def create(self, key: str, source: bytes | Path) -> Stored:
        if self.holds in key:
            assert self.opened.wait(120), "never opened"
        return super().create(key, source)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("NEXA_CACHE", str(cache))


def pipeline_of(run: Run, store: LocalStore | None = None) -> TrainingPipeline:
    """One attempt at a run, ready, its one rank in this process."""
    from nexa_train.pipeline import RunFacts, TrainingPipeline
    from nexa_train.rank import make_context

    work = make_ready(load_job(run.job), Node())
    assert isinstance(work, RankWork)
    facts = RunFacts(work.job, work.attempt, work.dataset, work.code, work.world_facts())
    rundir = RunDir(run.job.parent / "rundir")
    shutil.rmtree(rundir.path, ignore_errors=True)
    rundir.path.mkdir()
    context = make_context(work, 0, 1)
    return TrainingPipeline(context, facts, store or LocalStore(run.artifacts), rundir, local_rank=0)


@contextmanager
def running(pipeline: TrainingPipeline) -> Iterator[Future[None]]:
    """The attempt in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(pipeline.run)


def told(pipeline: TrainingPipeline) -> tuple[str, int, int | None]:
    """Phase, step, and the step of the checkpoint, as the launcher sees them."""
    progress = pipeline.rundir.read_progress()
    if progress is None:
        return "starting", 0, None
    return progress.phase, progress.step, progress.checkpoint.step if progress.checkpoint else None


def test_what_became_of_the_rows_is_in_the_manifest(runs: Runs) -> None:
    run = runs.make(**SHORT, model={"max_seq_len": 17}, data={"validation": {}})
    pipeline_of(run).run()
    audit = run.manifests[-1].dataset["audit"]["train"]
    assert audit["rows"] == 96 == audit["samples"] + audit["dropped"]
    assert 0 < audit["dropped"] < 96
    assert 0 < audit["truncated"] <= audit["samples"]
    assert 0 < audit["targets"] < audit["tokens"]


def test_training_goes_on_during_a_save_and_the_next_save_waits_for_it(runs: Runs) -> None:
    run, plain = runs.make(**SHORT), runs.make(**SHORT)
    pipeline_of(plain).run()
    store = Gated(run.artifacts, "step-00000002/")
    pipeline = pipeline_of(run, store)
    with running(pipeline) as ended:
        try:
            # Two steps further the next save is due, and waits: nothing is committed yet, nor said to be.
            wait_until(lambda: told(pipeline) == ("saving", 4, None), timeout_seconds=120, what="the second save waits")
            assert run.manifests == []
        finally:
            store.opened.set()
        ended.result(120)
    assert told(pipeline) == ("finished", 6, 6)
    assert [manifest.step for manifest in run.manifests] == [2, 4, 6]
    assert [m.weights_digest for m in run.manifests] == [m.weights_digest for m in plain.manifests]
    assert [m.parent for m in run.manifests] == [None, *(m.digest for m in run.manifests[:-1])]
    rows = [row for manifest in run.manifests for row in manifest.logs]
    assert [row["step"] for row in rows if "save_stall_seconds" in row] == [2, 4, 6]
    assert rows[3]["save_background_seconds"] > 0


def test_tokens_have_a_perplexity_and_preferences_have_none(runs: Runs, cache: Path, tmp_path: Path) -> None:
    once: dict[str, Any] = {"training": {"max_steps": 1}, "data": {"validation": {"rows": None}}}
    tokens = runs.make(**once)
    folder = tmp_path / "preferred"
    folder.mkdir()
    preferred = Runs(cache, write_pairs(folder / "pairs.jsonl"), folder).make(
        **merged(once, {"method": {"type": "dpo"}, "data": {"format": "preference"}})
    )
    for run in (tokens, preferred):
        pipeline_of(run).run()
    found, without = (run.manifests[0].metrics for run in (tokens, preferred))
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert without.keys() == {"loss"}


def test_a_store_that_fails_in_the_background_ends_the_run_with_its_words(runs: Runs) -> None:
    run = runs.make(**SHORT)

    class Full(LocalStore):
        def create(self, key: str, source: bytes | Path) -> Stored:
            if "step-00000004" in key:
                raise RefusedError("the disk is full")
            return super().create(key, source)

    with pytest.raises(RefusedError, match="the disk is full"):
        pipeline_of(run, Full(run.artifacts)).run()
    assert [manifest.step for manifest in run.manifests] == [2]
    pipeline_of(run).run()
    assert [manifest.step for manifest in run.manifests] == [2, 4, 6]


def test_a_save_in_flight_is_committed_though_training_failed(runs: Runs) -> None:
    import torch

    run = runs.make(**SHORT)
    store = Gated(run.artifacts, "step-00000002/")
    pipeline = pipeline_of(run, store)
    after_step = pipeline._after_step

    def fail(metrics: Any) -> bool:
        stop = after_step(metrics)
        if metrics.step == 3:
            threading.Timer(0.2, store.opened.set).start()
            raise torch.OutOfMemoryError("none left")
        return stop

    pipeline._after_step = fail  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        pipeline.run()
    assert [manifest.step for manifest in run.manifests] == [2]


def committed_bytes(run: Run) -> dict[Path, bytes]:
    """All that is in the run's folder."""
    return {path: path.read_bytes() for path in run.artifacts.glob("checkpoints/**/*") if path.is_file()}


def stop_during_evaluation(pipeline: TrainingPipeline, *, step: int) -> list[int]:
    """Ask for a stop in the midst of the evaluation after `step`; the batches that were evaluated there."""
    seen: list[int] = []

    def ask(module: Any, _arguments: Any) -> None:
        if not module.training and pipeline.step == step:
            seen.append(step)
            pipeline.rundir.ask_to_stop()

    setup = pipeline.backend.setup

    def hooked() -> None:
        setup()
        pipeline.backend.causal.base_model.register_forward_pre_hook(ask)  # type: ignore[attr-defined]

    pipeline.backend.setup = hooked  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("step", [0, 3, 6])
def test_a_stop_during_evaluation_ends_it_at_the_next_batch_and_commits_what_was_trained(runs: Runs, step: int) -> None:
    training = {**SHORT["training"], "save_every_steps": 100, "eval_every_steps": 3}
    run = runs.make(training=training, data={"validation": {"rows": 32}})
    pipeline = pipeline_of(run)
    seen = stop_during_evaluation(pipeline, step=step)
    with pytest.raises(StoppedError, match=f"stopped at step {step} of 6"):
        pipeline.run()
    assert len(seen) == 1
    assert [manifest.step for manifest in run.manifests] == ([step] if step else [])
    assert all("validation_loss" not in manifest.metrics for manifest in run.manifests)


def test_a_last_evaluation_that_was_cut_short_is_taken_again_and_what_was_committed_stays(runs: Runs) -> None:
    values: dict[str, Any] = {"training": SHORT["training"], "data": {"validation": {"rows": 32}}}
    run, plain = runs.make(**values), runs.make(**values)
    pipeline_of(plain).run()
    stopped = pipeline_of(run)
    stop_during_evaluation(stopped, step=6)
    with pytest.raises(StoppedError, match=r"stopped at step 6 of 6, .*; run again to go on"):
        stopped.run()
    before = committed_bytes(run)

    again = pipeline_of(run)
    stop_during_evaluation(again, step=6)
    with pytest.raises(StoppedError, match="stopped at step 6 of 6"):
        again.run()

    last = pipeline_of(run)
    last.run()
    progress = last.rundir.read_progress()
    assert progress is not None
    assert (progress.phase, progress.step) == ("finished", 6)
    assert progress.validation_loss == plain.manifests[-1].metrics["validation_loss"]
    assert progress.checkpoint == stopped.checkpoint
    assert committed_bytes(run) == before


def test_only_what_was_evaluated_is_committed_with_a_loss_on_the_validation_split(runs: Runs) -> None:
    training = {"max_steps": 6, "save_every_steps": 2, "eval_every_steps": 4}
    run = runs.make(training=training, data={"validation": {"rows": 32}})
    pipeline_of(run).run()
    metrics = {manifest.step: manifest.metrics for manifest in run.manifests}
    assert [step for step in metrics if "validation_loss" in metrics[step]] == [4, 6]
    assert len({metrics[step]["initial_validation_loss"] for step in metrics}) == 1
    assert metrics[6]["validation_loss"] != metrics[6]["initial_validation_loss"]


@pytest.mark.parametrize("step", [0, 4])
def test_a_validation_loss_that_is_not_finite_ends_the_run_before_its_step_is_committed(runs: Runs, step: int) -> None:
    training = {"max_steps": 6, "save_every_steps": 2, "eval_every_steps": 4}
    run = runs.make(training=training, data={"validation": {"rows": 32}})
    pipeline = pipeline_of(run)
    validate = pipeline.backend.validate
    pipeline.backend.validate = lambda: math.nan if pipeline.step == step else validate()  # type: ignore[method-assign]
    with pytest.raises(NonFiniteLossError, match=rf"^step {step}: the loss on the validation split is nan"):
        pipeline.run()
    assert [manifest.step for manifest in run.manifests] == list(range(2, step, 2))


def test_a_plot_leaves_out_a_damaged_checkpoint_and_a_finished_run_is_no_worse_without_one(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    from nexa_train.cli.run import _plot

    run = runs.make(**SHORT)
    pipeline_of(run).run()
    job = load_job(run.job)
    first = next(run.artifacts.glob("checkpoints/*/step-00000002/manifest*.json"))
    first.write_bytes(first.read_bytes()[:-1])
    plot, _ = _plot(job)
    assert plot is not None
    assert plot.is_file()
    shutil.rmtree(run.artifacts / "reports")
    (run.artifacts / "reports").touch()
    assert _plot(job) == (None, None)
    assert "nexa: warning: the loss plot is left out" in capsys.readouterr().err


def test_a_run_without_rows_to_validate_on_has_ended_with_its_last_step(runs: Runs) -> None:
    run = runs.make(training={"max_steps": 1}, data={"validation": {"rows": None}})
    pipeline_of(run).run()
    ended = make_ready(load_job(run.job), Node())
    assert isinstance(ended, Termination)
    assert (ended.cause, ended.validation_loss) == ("Succeeded", None)


def test_a_stop_waits_for_the_save_in_flight_and_commits_one_more(runs: Runs) -> None:
    run = runs.make(training={"max_steps": 40, "save_every_steps": 2})
    store = Gated(run.artifacts, "step-00000002/")
    pipeline = pipeline_of(run, store)
    with running(pipeline) as ended:
        try:
            wait_until(lambda: told(pipeline)[1] >= 2, timeout_seconds=120, what="two steps done")
            pipeline.rundir.ask_to_stop()
            wait_until(lambda: told(pipeline)[0] == "saving", timeout_seconds=120, what="training ended")
            assert run.manifests == []
        finally:
            store.opened.set()
        with pytest.raises(StoppedError, match="run again to go on"):
            ended.result(120)
    assert run.manifests[0].step == 2
    assert run.manifests[-1].step == pipeline.step > 2
    assert told(pipeline)[2] == pipeline.step


# What the signal raises may come up in a finaliser, where Python drops it with a word.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_sigterm_while_data_is_prepared_ends_at_once_with_75(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nexa_train.cli.run import run_job

    monkeypatch.setenv("NEXA_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "many.jsonl"
    one = runs.rows.read_text(encoding="utf-8")
    rows.write_text(one * 2000, encoding="utf-8")
    run = runs.make(data={"remote_uri": str(rows)})
    prepared = tmp_path / "cache" / "data"
    before = signal.getsignal(signal.SIGTERM)

    def terminate() -> None:
        wait_until(lambda: prepared.exists() and any(prepared.iterdir()), timeout_seconds=60, what="it began")
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=terminate)
    asking.start()
    assert run_job(load_job(run.job), as_json=True) == 75
    asking.join()
    assert json.loads(capsys.readouterr().out)["cause"] == "Stopped"
    assert signal.getsignal(signal.SIGTERM) is before
    assert not list(prepared.glob("*/audit.json"))
    assert not list((tmp_path / "cache").glob("runs/*/*/run.json"))


class SignalledWhileFinalised:
    """What is raised in `__del__` goes nowhere."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_sigterm_is_heard_where_python_drops_what_a_signal_raises(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nexa_train.cli.run import run_job
    from nexa_train.launch import node

    def prepare(*_: object) -> None:
        SignalledWhileFinalised()
        threading.Event().wait(60)
        pytest.fail("a minute after SIGTERM, data was still being prepared")

    monkeypatch.setattr(node, "prepare", prepare)
    assert run_job(load_job(runs.make().job), as_json=True) == 75
    assert json.loads(capsys.readouterr().out)["cause"] == "Stopped"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


class Bait:
    """Pickled: creates a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.canary),))


def tamper(run: Run, change: Callable[[dict[str, bytes]], None]) -> None:
    """Change the files of the newest checkpoint, and its manifest so that all digests are right."""
    folder = max(run.artifacts.glob("checkpoints/*/step-*"))
    path = folder / "manifest.json"
    manifest = Manifest.from_bytes(path.read_bytes())
    files = {entry.path: (folder / entry.object).read_bytes() for entry in manifest.files}
    place = folder / Path(manifest.files[0].object).parent
    change(files)
    shutil.rmtree(place)
    place.mkdir()
    entries = []
    for name, content in files.items():
        (place / name).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        entries.append(FileEntry(path=name, object=f"data/{place.name}/{name}", size=len(content), sha256=sha256))
    path.chmod(0o644)
    path.write_bytes(replace(manifest, files=tuple(entries)).to_bytes())


def half_done_of(runs: Runs, **change: Any) -> Run:
    """A run of six steps that ended after two."""
    run = runs.make(**SHORT, **change)
    pipeline_of(run).run()
    for step in ("step-00000004", "step-00000006"):
        shutil.rmtree(next(run.artifacts.glob(f"checkpoints/*/{step}")))
    return run


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory, cache: Path, rows: Path) -> Run:
    """Such a run, which the tests below copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEXA_CACHE", str(cache))
        return half_done_of(Runs(cache, rows, tmp_path_factory.mktemp("half")))


PICKLES: dict[str, tuple[list[str], list[str]]] = {
    "weights": (["model.safetensors"], []),
    "weights of an older torch": (["pytorch_model.bin"], ["model.safetensors"]),
    "moments": (["optimizer.safetensors"], []),
    "moments of Trainer": (["optimizer.pt", "scheduler.pt", "rng_state.pth"], ["optimizer.safetensors"]),
    "the step": (["state.json"], []),
    "trainer state": (["trainer_state.json", "training_args.bin"], ["state.json"]),
    "DCP": ([".metadata", "__0_0.distcp"], ["model.safetensors", "optimizer.safetensors"]),
}
"""What is made a pickle, and what is taken away."""


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_in_a_checkpoint_with_a_right_manifest_is_never_loaded(
    runs: Runs, half_done: Run, tmp_path: Path, case: str
) -> None:
    run, canary = runs.make(**SHORT), tmp_path / "canary"
    shutil.copytree(half_done.artifacts, run.artifacts)
    pickles, gone = PICKLES[case]

    def change(files: dict[str, bytes]) -> None:
        for name in gone:
            del files[name]
        files |= {name: pickle.dumps(Bait(canary)) for name in pickles}

    tamper(run, change)
    with pytest.raises(ForeignError, match=r"step-00000002/manifest.json is whole, but not .*: checkpoint .*"):
        pipeline_of(run).run()
    assert not canary.exists()
    pickle.loads(pickle.dumps(Bait(canary)))
    assert canary.exists(), "the bait is harmless: the test above proves nothing"


@pytest.mark.parametrize("backend", ["fsdp", "hf"])
def test_pickled_adapters_are_never_loaded(runs: Runs, tmp_path: Path, backend: str) -> None:
    run, canary = half_done_of(runs, backend=backend, tuning={"type": "lora", "rank": 2}), tmp_path / "canary"

    def change(files: dict[str, bytes]) -> None:
        del files["adapter_model.safetensors"]
        files |= {name: pickle.dumps(Bait(canary)) for name in ("adapter_model.bin", "optimizer.pt")}

    tamper(run, change)
    with pytest.raises(ForeignError, match=r"step-00000002/manifest.json is whole, but not .*: checkpoint .*"):
        pipeline_of(run).run()
    assert not canary.exists()


def test_a_checkpoint_of_another_model_is_refused_once_and_for_all(runs: Runs, half_done: Run) -> None:
    import torch
    from safetensors.torch import load, save

    run = runs.make(**SHORT)
    shutil.copytree(half_done.artifacts, run.artifacts)

    def widen(files: dict[str, bytes]) -> None:
        tensors = load(files["model.safetensors"])
        name = "model.norm.weight"
        files["model.safetensors"] = save({**tensors, name: torch.ones(len(tensors[name]) + 1)})

    tamper(run, widen)
    before = committed_bytes(run)
    outcome = run.finish()
    assert (outcome["exit_code"], outcome["cause"], outcome["retryable"]) == (4, "ForeignError", False)
    said = r".*/step-00000002/manifest.json is whole, but .*: model.norm.weight is \(33,\), the job's is \(32,\); .*"
    assert re.fullmatch(said, outcome["message"])
    assert committed_bytes(run) == before


@pytest.mark.parametrize("step", [4, 6])
def test_a_checkpoint_of_another_run_is_refused_and_nothing_touched(runs: Runs, half_done: Run, step: int) -> None:
    run = runs.make(**SHORT)
    shutil.copytree(half_done.artifacts, run.artifacts)
    own = next(run.artifacts.glob("checkpoints/*/step-00000002"))
    folder = shutil.copytree(own, own.with_name(f"step-{step:08d}")) / "manifest.json"
    theirs = replace(Manifest.from_bytes(folder.read_bytes()), run_id="another-run", step=step)
    folder.chmod(0o644)
    folder.write_bytes(theirs.to_bytes())
    before = committed_bytes(run)
    outcome = run.finish()
    assert (outcome["exit_code"], outcome["cause"], outcome["retryable"]) == (4, "ForeignError", False)
    assert f"is the manifest of {theirs.folder}, expected one of run {own.parent.name}" in outcome["message"]
    assert committed_bytes(run) == before


def test_pickles_beside_a_whole_checkpoint_are_not_looked_at(runs: Runs, half_done: Run, tmp_path: Path) -> None:
    run, canary = runs.make(**SHORT), tmp_path / "canary"
    shutil.copytree(half_done.artifacts, run.artifacts)
    names = ["optimizer.pt", "pytorch_model.bin", ".metadata", "__0_0.distcp", "training_args.bin", "adapter_model.bin"]
    tamper(run, lambda files: files.update({name: pickle.dumps(Bait(canary)) for name in names}))
    pipeline_of(run).run()
    assert [manifest.step for manifest in run.manifests] == [2, 4, 6]
    assert not canary.exists()


def test_a_checkpoint_is_downloaded_once_to_go_on_from_it(runs: Runs, half_done: Run) -> None:
    run = runs.make(**SHORT)
    shutil.copytree(half_done.artifacts, run.artifacts)

    class Counting(LocalStore):
        opened: list[str] = []

        def open(self, key: str, *, version_id: str | None = None) -> Any:
            self.opened.append(key.rpartition("/")[2])
            return super().open(key, version_id=version_id)

    pipeline = pipeline_of(run, Counting(run.artifacts))
    pipeline.run()
    assert Counting.opened.count("model.safetensors") == 1
    assert Counting.opened.count("optimizer.safetensors") == 1
    assert not pipeline.rundir.restoring.exists()


@pytest.mark.parametrize("went", ["the step", "its data"])
def test_a_checkpoint_that_goes_before_another_rank_has_read_it_is_looked_for_again(
    runs: Runs, half_done: Run, monkeypatch: pytest.MonkeyPatch, went: str
) -> None:
    """Retired by another attempt once rank 0 had decided on it, which the next attempt finds out by itself."""
    run = runs.make(**SHORT)
    shutil.copytree(half_done.artifacts, run.artifacts)
    pipeline = pipeline_of(run, LocalStore(run.artifacts))
    chosen = pipeline.publisher.resume().committed
    assert chosen is not None
    shutil.rmtree(run.artifacts / chosen.folder / ("data" if went == "its data" else ""))
    said = chosen.manifest.step.to_bytes(8, "big") + bytes.fromhex(chosen.digest)
    monkeypatch.setattr(pipeline, "context", replace(pipeline.context, rank=1))
    monkeypatch.setattr(pipeline, "_from_first", lambda _: said)

    with pytest.raises(DamagedError, match="went while it was read") as caught:
        pipeline._newest()

    assert caught.value.retryable
