"""Ranks that hang are found in every phase, say where they stand, and are ended."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from nexa_train.config.protocol import Termination
from nexa_train.rundir import RunDir
from tests.cluster.run import wait_until
from tests.training.harness import Run, Runs, ranks_of
from tests.training.nursery import free_port

pytestmark = pytest.mark.training

# One save soon, and seconds to the next: a rank that a test stops after the first is in no other.
LONG = {"training": {"max_steps": 20_000, "save_every_steps": 200}}
TWO = {"cluster": {"num_nodes": 2}}
PATIENT, SHORT = {"recovery": {"progress_deadline_seconds": 600}}, {"recovery": {"progress_deadline_seconds": 5}}
BEGAN = "stacks-1-*"
WORDS_INTO_A_FILE = "import sys, nexa_train.entrypoint as e; e.TERMINATION_LOG = sys.argv[1]; sys.exit(e.main())"


def run_folders(cache: Path) -> list[Path]:
    return list(cache.glob("runs/*/*"))


def stacks_of(message: str) -> str:
    """What the file holds that the last words name."""
    (path,) = re.findall(r" is in (/\S+/stacks/attempt-\d+-node-\d+(?:-\d+)?\.txt)$", message)
    return Path(path).read_text()


def suspended_at(process: subprocess.Popen[str], cache: Path, before: list[Path], pattern: str) -> bool:
    """Stop rank 1 as soon as its run folder holds a file of that name; False: it came too late, and the run goes on."""

    def holds(name: str) -> bool:
        return any(list(folder.glob(name)) for folder in set(run_folders(cache)) - set(before))

    wait_until(lambda: holds(BEGAN), timeout_seconds=120, what=BEGAN, interval_seconds=0.001)
    one = rank(process, 1)  # to find it takes longer than to save
    try:
        wait_until(
            lambda: holds(pattern) or not one.is_running(), timeout_seconds=120, what=pattern, interval_seconds=0.001
        )
        one.suspend()
        wait_until(lambda: one.status() == psutil.STATUS_STOPPED, timeout_seconds=60, what="rank 1 stands")
        if not holds(pattern):
            one.resume()
    except psutil.NoSuchProcess:
        return False
    return holds(pattern)


def rank(process: subprocess.Popen[str], number: int) -> psutil.Process:
    return next(each for each in ranks_of(process) if each.environ().get("RANK") == str(number))


# The files that rank 1 makes as it begins, and as it writes its part of a checkpoint, which must take it a while.
@pytest.mark.parametrize(
    ("pattern", "phase", "model"),
    [
        (BEGAN, "(starting)", {}),
        ("save-4-1", "(saving, step 4)", {"d_model": 384, "n_layers": 4, "n_heads": 8}),
    ],
    ids=["starts", "saves"],
)
def test_a_rank_that_hangs_as_it_starts_or_saves_is_found(
    runs: Runs, cache: Path, pattern: str, phase: str, model: dict[str, int]
) -> None:
    for _ in range(3):
        run, before = runs.make(training={"max_steps": 4}, model=model, **TWO, **SHORT), run_folders(cache)
        process = run.start()
        in_time = suspended_at(process, cache, before, pattern)
        out, err = process.communicate(timeout=240)
        if in_time:
            break
    assert in_time, err
    ended = Termination.model_validate_json(out)
    assert (process.returncode, ended.cause, ended.exit_code) == (70, "Stalled", 70), err
    assert ended.message.startswith(f"nothing moved for 5 s {phase}; ")
    text = stacks_of(ended.message)
    assert "most recent call first" in text, "of the other rank, which waits or still imports"
    assert len(re.findall(r"^process \d+, T \(stopped\)$", text, re.MULTILINE)) == 1
    run.job.write_text(run.job.read_text().replace('"progress_deadline_seconds": 5', '"progress_deadline_seconds": 60'))
    assert run.finish()["step"] == 4


def wait_for_looks(launcher: psutil.Process) -> None:
    """Until it has looked after its ranks: between two looks it sleeps."""
    before = launcher.num_ctx_switches().voluntary
    wait_until(lambda: launcher.num_ctx_switches().voluntary > before + 2, timeout_seconds=60, what="its looks")


def test_ranks_that_were_stopped_with_their_launcher_have_not_stalled(runs: Runs) -> None:
    run = runs.make(**LONG, **SHORT)
    process = run.start()
    wait_until(lambda: list(run.artifacts.glob("checkpoints/*/step-*")), timeout_seconds=120, what="a commit")
    launcher, (one,) = psutil.Process(process.pid), ranks_of(process)
    one.suspend()
    wait_for_looks(launcher)
    launcher.suspend()
    stopped = time.monotonic()
    wait_until(lambda: time.monotonic() > stopped + 6, timeout_seconds=60, what="the deadline has passed")
    launcher.resume()
    wait_for_looks(launcher)
    one.resume()
    process.terminate()
    out, err = process.communicate(timeout=120)
    assert (process.returncode, Termination.model_validate_json(out).cause) == (75, "Stopped"), err


@pytest.mark.parametrize("entry", ["nexa run", "pod"])
def test_a_node_that_hangs_before_its_ranks_run_says_where_and_is_ended(runs: Runs, tmp_path: Path, entry: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        run = runs.make(data={"remote_uri": "s3://rows/rows.jsonl"}, recovery={"progress_deadline_seconds": 2})
        run.environment |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "user",
            "AWS_SECRET_ACCESS_KEY": "password",
        }
        node = run.start() if entry == "nexa run" else start_pod(run, tmp_path / "words")
        out, err = node.communicate(timeout=120)
    ended = Termination.model_validate_json(out)
    assert (node.returncode, ended.cause, ended.exit_code, ended.retryable) == (70, "Stalled", 70, True), err
    assert ended.message.startswith("nothing moved for 2 s (before the ranks ran); ")
    text = stacks_of(ended.message)
    assert "most recent call first" in text
    assert "data/read.py" in text
    if entry == "pod":
        assert Termination.model_validate_json((tmp_path / "words").read_bytes()) == ended


def start_pod(run: Run, words: Path, **environment: str) -> subprocess.Popen[str]:
    """The entrypoint of a pod, whose last words go to a file."""
    spec = json.loads(run.job.read_text())
    body = {"metadata": {"name": spec.pop("name")}, "spec": spec}
    words.touch()
    return subprocess.Popen(
        [sys.executable, "-c", WORDS_INTO_A_FILE, str(words)],
        env={**run.environment, "NEXA_JOB": json.dumps(body), "NEXA_PROGRESS_PORT": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Gang:
    """Two nodes on this machine, each with the entrypoint of a pod."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.words = [folder / f"words-{node}" for node in (0, 1)]
        common = {"NEXA_ATTEMPT": "3", "NEXA_NUM_NODES": "2", "NEXA_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}"}
        self.nodes = [start_pod(run, self.words[node], **common, JOB_COMPLETION_INDEX=str(node)) for node in (0, 1)]

    def ended(self, node: int) -> Termination:
        """A node's last words, once it has ended."""
        out, err = self.nodes[node].communicate(timeout=240)
        text = self.words[node].read_bytes()
        assert text, out + err
        return Termination.model_validate_json(text)


@pytest.fixture
def gang(runs: Runs, tmp_path: Path) -> Any:
    made: list[Gang] = []

    def make(**change: Any) -> Gang:
        run = runs.make(**LONG, **TWO, **change)
        made.append(Gang(run, tmp_path))
        wait_until(
            lambda: list(run.artifacts.glob("checkpoints/*/step-*/manifest.json")), timeout_seconds=120, what="a commit"
        )
        return made[-1]

    yield make
    for each in made:
        for node in each.nodes:
            node.kill()
            node.communicate()


MakeGang = Callable[..., Gang]


def test_every_node_of_a_gang_that_hangs_keeps_its_stacks(gang: MakeGang) -> None:
    both = gang(**SHORT)
    ranks_of(both.nodes[1])[0].suspend()
    ended = [both.ended(node) for node in (0, 1)]
    assert [(each.cause, each.exit_code, each.attempt) for each in ended] == [("Stalled", 70, 3)] * 2
    texts = [stacks_of(each.message) for each in ended]
    for node, text in enumerate(texts):
        # When the manifest that the test waited for is there, the save is not over yet for the ranks.
        assert re.search(rf"attempt 3, node {node} of 2: nothing moved for 5 s \((training|saving), step ", text)
        assert "most recent call first" in text
    assert [", T (stopped)" in text for text in texts] == [False, True]


def test_ranks_whose_others_hang_do_not_keep_a_node_from_stopping(gang: MakeGang) -> None:
    both = gang(**PATIENT)
    ranks_of(both.nodes[1])[0].suspend()
    asked = time.monotonic()
    both.nodes[0].send_signal(signal.SIGTERM)
    ended = both.ended(0)
    assert time.monotonic() - asked < 60
    assert (ended.cause, ended.exit_code) == ("Stopped", 75)
    assert "another node's are gone" in ended.message


def test_the_last_words_of_a_killed_rank_are_the_end_of_its_log(gang: MakeGang) -> None:
    both = gang(**PATIENT)
    ranks_of(both.nodes[1])[0].kill()
    ended = both.ended(1)
    assert (ended.cause, ended.exit_code) == ("Killed", 1)
    assert "Signal 9 (SIGKILL)" in ended.log  # as torchrun says it
    assert ended.step > 0


def test_beats_of_one_node_count_on_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    from nexa_train import relay

    monkeypatch.setattr(relay, "INTERVAL_SECONDS", 0.01)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    nodes, ended = [RunDir(tmp_path / str(node)) for node in range(3)], threading.Event()
    for node in nodes:
        node.path.mkdir()
    threads = [
        threading.Thread(target=relay._relay, args=(dist.TCPStore("127.0.0.1", server.port).add, node, ended))
        for node in nodes
    ]
    for thread in threads:
        thread.start()
    for count in range(1, 4):
        nodes[1].beat()
        heard = [count] * 3
        wait_until(lambda heard=heard: [each.beats() for each in nodes] == heard, timeout_seconds=10, what="beats")
    # Nobody tells what was only heard: else one beat would go round for ever.
    counted = server.add("nexa/beats", 0)
    ended.set()
    for thread in threads:
        thread.join()
    assert counted == 3


def test_where_the_node_that_counts_is_gone_the_relay_ends_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.distributed as dist

    from nexa_train import relay

    monkeypatch.setattr(relay, "INTERVAL_SECONDS", 0.01)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port)
    del server
    thread = threading.Thread(target=relay._relay, args=(client.add, RunDir(tmp_path), threading.Event()), daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
