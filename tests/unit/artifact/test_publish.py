"""Committing, losing a race, resuming past damage, retention: on memory and in a real folder."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nexa_train.artifact.manifest import canonical_json, step_folder
from nexa_train.artifact.publish import (
    Publisher,
    check_files,
    claim_run,
    claimed,
    committed_folders,
    fetch,
    newest_valid,
    read_manifest,
)
from nexa_train.artifact.retention import apply_retention
from nexa_train.errors import (
    ConfigError,
    DamagedError,
    ForeignError,
    NotFoundError,
    RefusedError,
    SupersededError,
)
from nexa_train.store import Store, open_store
from tests.unit.artifact.builders import RUN, draft, files_in, publish_chain


@pytest.fixture(params=["memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        return open_store(f"memory://{uuid.uuid4()}")
    return open_store(tmp_path / "artifacts")


def replace(store: Store, key: str, content: bytes) -> None:
    """What no writer of ours does: other bytes under a name that is taken."""
    store.delete(key)
    store.create(key, content)


def keys(store: Store) -> list[str]:
    return [stored.key for stored in store.list()]


def test_a_checkpoint_is_its_files_and_a_manifest_that_names_them(store: Store, tmp_path: Path) -> None:
    committed = Publisher(store, RUN, "a1").publish(50, files_in(tmp_path), draft())

    read = read_manifest(store, step_folder(RUN, 50))
    assert read == committed
    assert read.key == f"{step_folder(RUN, 50)}/manifest.json"
    assert [file.path for file in read.manifest.files] == ["model.safetensors", "state/rng.json"]
    assert all(file.object.startswith("data/a1-") for file in read.manifest.files)
    assert check_files(store, read) == []


def test_publishing_the_same_again_changes_nothing(store: Store, tmp_path: Path) -> None:
    publisher = Publisher(store, RUN, "a1")
    first = publisher.publish(50, files_in(tmp_path), draft())
    before = keys(store)

    assert publisher.publish(50, files_in(tmp_path), draft()) == first
    assert keys(store) == before


def test_a_publish_that_failed_half_way_is_completed_by_another_call(store: Store, tmp_path: Path) -> None:
    publisher = Publisher(store, RUN, "a1")
    files = files_in(tmp_path)
    with pytest.raises(FileNotFoundError):
        publisher.publish(50, files | {"z": tmp_path / "not written yet"}, draft())
    assert committed_folders(store, RUN) == []

    assert check_files(store, publisher.publish(50, files, draft())) == []


def test_a_file_that_changed_between_two_tries_is_not_committed(store: Store, tmp_path: Path) -> None:
    publisher = Publisher(store, RUN, "a1")
    publisher.publish(50, files_in(tmp_path), draft())

    with pytest.raises(DamagedError, match="the file changed between tries"):
        publisher.publish(50, files_in(tmp_path, {"model.safetensors": b"other"}), draft())


def test_a_writer_that_was_thought_dead_is_superseded_and_touches_nothing(store: Store, tmp_path: Path) -> None:
    winner = Publisher(store, RUN, "a2").publish(50, files_in(tmp_path), draft())

    with pytest.raises(SupersededError, match=rf"step 50 of {RUN}.*manifest {winner.digest}"):
        Publisher(store, RUN, "a1").publish(50, files_in(tmp_path), draft())

    assert newest_valid(store, RUN).committed == winner


def test_two_pods_of_one_attempt_do_not_mix_their_bytes(store: Store, tmp_path: Path) -> None:
    def publish(number: int) -> bool:
        files = files_in(tmp_path / str(number), {"model.safetensors": b"%d" % number * 5000})
        try:
            Publisher(store, RUN, "a1").publish(50, files, draft())
        except SupersededError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(publish, range(8))) == [False] * 7 + [True]

    committed = newest_valid(store, RUN).committed
    assert committed
    assert check_files(store, committed) == []


@pytest.mark.parametrize("path", ["../escape", "/absolute", "a//b", ""])
def test_a_path_outside_the_checkpoint_is_refused_before_a_byte_is_written(
    store: Store, tmp_path: Path, path: str
) -> None:
    source = files_in(tmp_path, {"x": b"x"})["x"]

    with pytest.raises(ValueError, match="path"):
        Publisher(store, RUN, "a1").publish(50, {"ok": source, path: source}, draft())

    assert keys(store) == []


def test_a_fetched_checkpoint_is_what_was_published(store: Store, tmp_path: Path) -> None:
    files = files_in(tmp_path / "source")
    committed = Publisher(store, RUN, "a1").publish(50, files, draft())

    into = fetch(store, committed, tmp_path / "into")

    found = {path.relative_to(into).as_posix(): path.read_bytes() for path in into.rglob("*") if path.is_file()}
    assert found == {path: source.read_bytes() for path, source in files.items()}


@pytest.mark.parametrize("content", [b"xxxxxxxx", b"0000005", b"00000050 and more", b""])
def test_fetching_bytes_that_differ_fails_and_leaves_no_file(store: Store, tmp_path: Path, content: bytes) -> None:
    [committed] = publish_chain(store, tmp_path / "source", 50)
    replace(store, f"{committed.folder}/{committed.manifest.files[0].object}", content)

    with pytest.raises(DamagedError, match=r"model.safetensors of .* expected"):
        fetch(store, committed, tmp_path / "into")

    assert not list((tmp_path / "into").glob("*model*"))


def test_fetching_what_is_gone_says_so(store: Store, tmp_path: Path) -> None:
    [committed] = publish_chain(store, tmp_path / "source", 50)
    store.delete(f"{committed.folder}/{committed.manifest.files[0].object}")

    with pytest.raises(NotFoundError, match=r"model.safetensors"):
        fetch(store, committed, tmp_path / "into")


def test_a_run_without_checkpoints_has_none(store: Store) -> None:
    found = newest_valid(store, RUN)

    assert (found.committed, found.damaged) == (None, [])


def test_data_without_a_manifest_does_not_exist(store: Store, tmp_path: Path) -> None:
    [first, second] = publish_chain(store, tmp_path, 50, 100)
    store.delete(second.key)

    assert newest_valid(store, RUN).committed == first
    assert newest_valid(store, RUN).damaged == []


def test_steps_beyond_eight_digits_are_still_the_newest(store: Store, tmp_path: Path) -> None:
    chain = publish_chain(store, tmp_path, 99_999_999, 100_000_000)

    assert newest_valid(store, RUN).committed == chain[-1]


def damage(store: Store, folder: str, kind: str) -> None:
    committed = read_manifest(store, folder)
    weights = f"{folder}/{committed.manifest.files[0].object}"
    content = committed.manifest.to_bytes()
    match kind:
        case "tampered byte":
            replace(store, weights, b"x" + store.open(weights).read()[1:])
        case "truncated":
            replace(store, weights, b"0")
        case "missing file":
            store.delete(weights)
        case "manifest of another step":
            other = read_manifest(store, step_folder(RUN, 50)).manifest
            replace(store, committed.key, other.to_bytes())
        case "manifest cut off":
            replace(store, committed.key, content[:-10])
        case "name with a flipped bit":
            replace(store, committed.key, content.replace(b'"object":"data/', b'"object":"`ata/', 1))


# An edited manifest that is still canonical is another valid document: the parent chain and the signature tell.
DAMAGES = [
    "tampered byte",
    "truncated",
    "missing file",
    "manifest of another step",
    "manifest cut off",
    "name with a flipped bit",
]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
    store: Store, tmp_path: Path, kind: str
) -> None:
    chain = publish_chain(store, tmp_path, 50, 100, 150)
    damage(store, chain[2].folder, kind)

    found = newest_valid(store, RUN)

    assert found.committed == chain[1]
    assert len(found.damaged) == 1
    assert "step-00000150" in found.damaged[0]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_step_that_was_set_aside_can_be_committed_again(store: Store, tmp_path: Path, kind: str) -> None:
    chain = publish_chain(store, tmp_path / "first", 50, 100)
    damage(store, chain[1].folder, kind)
    before = store.open(chain[1].key).read()
    publisher = Publisher(store, RUN, "a2")
    assert publisher.resume().committed == chain[0]

    files = files_in(tmp_path / "again", {"model.safetensors": b"00000100"})
    again = publisher.publish(100, files, draft(parent=chain[0].digest))

    assert again.key.endswith("/manifest-3.json")
    assert newest_valid(store, RUN).committed == again == read_manifest(store, chain[1].folder)
    assert newest_valid(store, RUN).damaged == []
    evidence = [key for key in keys(store) if "/damaged-" in key]
    assert [store.open(key).read() for key in evidence] == [before]


def test_looking_changes_nothing(store: Store, tmp_path: Path) -> None:
    chain = publish_chain(store, tmp_path, 50, 100)
    damage(store, chain[1].folder, "truncated")
    before = keys(store)
    newest_valid(store, RUN)

    assert keys(store) == before


def test_a_checkpoint_of_another_run_is_refused_and_nothing_is_touched(store: Store, tmp_path: Path) -> None:
    chain = publish_chain(store, tmp_path, 50, 100, 150)
    theirs = draft().complete(run_id="another-run", step=100, files=chain[1].manifest.files)
    replace(store, chain[1].key, theirs.to_bytes())
    damage(store, chain[2].folder, "truncated")  # which would be set aside, if the run went on
    before = {key: store.open(key).read() for key in keys(store)}

    said = rf"step-00000100/manifest.json .* is the manifest of {theirs.folder}, expected one of run {RUN}: .*run-name"
    for _ in range(2):
        with pytest.raises(ForeignError, match=said):
            newest_valid(store, RUN)
        with pytest.raises(ForeignError, match=said):
            Publisher(store, RUN, "a2").resume(tmp_path / "into")

    assert {key: store.open(key).read() for key in keys(store)} == before


def test_if_all_are_damaged_there_is_none_and_each_is_reported(store: Store, tmp_path: Path) -> None:
    for committed in publish_chain(store, tmp_path, 50, 100):
        damage(store, committed.folder, "truncated")

    found = newest_valid(store, RUN)

    assert found.committed is None
    assert ["100" in found.damaged[0], "50" in found.damaged[1]] == [True, True]


def test_a_store_that_cannot_be_read_says_nothing_about_damage(tmp_path: Path) -> None:
    store = open_store(tmp_path / "artifacts")
    publish_chain(store, tmp_path / "source", 50)

    class Unreadable(type(store)):  # type: ignore[misc]
        """The same folder, on a server that went away."""

        def open(self, key: str, *, version_id: str | None = None) -> Any:
            raise RefusedError("no answer")

    with pytest.raises(RefusedError, match="no answer"):
        newest_valid(Unreadable(tmp_path / "artifacts"), RUN)


def test_a_manifest_of_a_later_major_version_stops_the_one_who_looks(store: Store, tmp_path: Path) -> None:
    [first] = publish_chain(store, tmp_path, 50)
    document = first.manifest.to_dict() | {"schema_version": "2.0", "step": 100}
    store.create(f"{step_folder(RUN, 100)}/manifest.json", canonical_json(document))

    with pytest.raises(ConfigError, match=r"schema version 2\.0"):
        newest_valid(store, RUN)


def test_retention_deletes_the_oldest_and_keeps_the_rest_whole(store: Store, tmp_path: Path) -> None:
    chain = publish_chain(store, tmp_path, 50, 100, 150, 200)

    assert apply_retention(store, RUN, 2) == [50, 100]
    assert apply_retention(store, RUN, 2) == []

    assert committed_folders(store, RUN) == [chain[2].folder, chain[3].folder]
    left = [stored for stored in store.list() if not stored.key.startswith((chain[2].folder, chain[3].folder))]
    assert [(stored.key.rpartition("/")[2], stored.size) for stored in left] == [("manifest-2.json", 0)] * 2
    assert check_files(store, chain[2]) == []


@pytest.mark.parametrize("keep_last", [0, -1])
def test_retention_never_deletes_the_newest(store: Store, tmp_path: Path, keep_last: int) -> None:
    publish_chain(store, tmp_path, 50)

    with pytest.raises(ConfigError, match="keep_last"):
        apply_retention(store, RUN, keep_last)
    assert apply_retention(store, RUN, 1) == []


def test_retention_takes_the_manifest_before_the_data(tmp_path: Path) -> None:
    base = open_store(tmp_path / "artifacts")
    publish_chain(base, tmp_path / "source", 50, 100)
    deleted: list[str] = []

    class Recording(type(base)):  # type: ignore[misc]
        """The same folder, telling what it is asked to delete."""

        def delete(self, key: str) -> None:
            deleted.append(key.rpartition("/")[2])
            super().delete(key)

    apply_retention(Recording(tmp_path / "artifacts"), RUN, 1)

    assert deleted[0] == "manifest.json"
    assert sorted(deleted) == ["manifest.json", "model.safetensors", "rng.json"]


IDENTITY = {"training": {"seed": 7, "betas": [0.9, 0.99]}, "model": {"name": "tiny"}}


def test_the_first_claim_is_what_every_later_one_reads(store: Store) -> None:
    first = claim_run(store, RUN, IDENTITY, frozen={"microbatch": 4})
    later = claim_run(store, RUN, IDENTITY, frozen={"microbatch": 8})

    assert first == later == {**IDENTITY, "microbatch": 4}
    assert claimed(store, RUN) == IDENTITY
    assert claimed(store, "another") == {}


def test_of_twenty_claims_in_a_race_one_sets_the_microbatch(store: Store) -> None:
    with ThreadPoolExecutor(20) as pool:
        claims = list(pool.map(lambda n: claim_run(store, RUN, IDENTITY, frozen={"microbatch": n}), range(20)))

    assert len({claim["microbatch"] for claim in claims}) == 1


def test_another_identity_is_refused_with_every_key_that_differs(store: Store) -> None:
    claim_run(store, RUN, IDENTITY)

    with pytest.raises(ConfigError) as caught:
        claim_run(store, RUN, {"training": {"seed": 8, "betas": [0.9, 0.99], "steps": 3}})

    message = str(caught.value)
    assert message.startswith(f"run id {RUN} exists with another config: ")
    assert 'model was {"name": "tiny"}, is not set' in message
    assert "training.seed was 7, is 8" in message
    assert "training.steps was not set, is 3" in message
    assert "betas" not in message


def test_an_adapters_run_is_not_gone_on_with_over_another_base(store: Store) -> None:
    folder = "/models/" + "deep/" * 20
    config = {"tuning": {"type": "lora", "rank": 4}, "model": {"name": folder}}
    before, after = (f"folder {folder} sha256:{digit * 16}" for digit in "ab")
    claim_run(store, RUN, {"config": config, "base_model": before})

    with pytest.raises(ConfigError) as caught:
        claim_run(store, RUN, {"config": config, "base_model": after})

    message = str(caught.value)
    assert re.search(r'base_model was "folder /models/.*\.\.\..* sha256:a{16}", is "folder .* sha256:b{16}";', message)
    assert "tuning" not in message
    assert claim_run(store, RUN, {"config": config, "base_model": before})["base_model"] == before


def test_one_and_true_are_not_the_same_identity(store: Store) -> None:
    claim_run(store, RUN, {"a": 1})

    with pytest.raises(ConfigError, match="a was 1, is true"):
        claim_run(store, RUN, {"a": True})


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"schema_version":"1.0","identity":3,"frozen":{}}'])
def test_a_damaged_identity_is_reported(store: Store, content: bytes) -> None:
    store.create(f"checkpoints/{RUN}/run.json", content)

    with pytest.raises(DamagedError, match=r"run\.json is not the identity of a run"):
        claim_run(store, RUN, IDENTITY)


def test_an_identity_of_a_later_major_version_is_refused(store: Store) -> None:
    store.create(f"checkpoints/{RUN}/run.json", canonical_json({"schema_version": "2.0"}))

    with pytest.raises(ConfigError, match="later nexa"):
        claim_run(store, RUN, IDENTITY)


PUBLISH_FOR_EVER = """
import itertools, sys
from pathlib import Path
from nexa_train.artifact.manifest import ManifestDraft
from nexa_train.artifact.publish import Publisher, newest_valid
from nexa_train.store import open_store
store, source = open_store(sys.argv[1]), Path(sys.argv[2])
found = newest_valid(store, "run").committed
publisher = Publisher(store, "run", sys.argv[3])
print("ready", flush=True)
for step in itertools.count(found.manifest.step + 1 if found else 0):
    files = {f"shard-{number}": source for number in range(4)}
    committed = publisher.publish(step, files, ManifestDraft(config={}))
    print(committed.digest, flush=True)
"""


def test_a_publisher_killed_at_any_moment_loses_no_commit_and_leaves_no_half_one(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(300_000))
    store = open_store(tmp_path / "artifacts")
    confirmed: list[str] = []
    for attempt in range(6):
        arguments = [tmp_path / "artifacts", source, f"a{attempt}"]
        process = subprocess.Popen([sys.executable, "-c", PUBLISH_FOR_EVER, *arguments], stdout=subprocess.PIPE)
        assert process.stdout
        process.stdout.readline()
        if attempt == 5:  # whatever a disk takes to write, one is told of
            confirmed.append(process.stdout.readline().decode().strip())
        time.sleep(0.02 + 0.017 * attempt)
        process.send_signal(signal.SIGKILL)
        confirmed += process.communicate()[0].decode().split()

    committed = [read_manifest(store, folder) for folder in committed_folders(store, "run")]
    assert {one.digest for one in committed} >= set(confirmed)
    assert [problem for one in committed for problem in check_files(store, one)] == []
    assert newest_valid(store, "run").damaged == []
    assert len(confirmed) > 0


def test_run_json_says_what_the_run_is(store: Store) -> None:
    claim_run(store, RUN, IDENTITY, frozen={"microbatch": 4})

    assert json.loads(store.open(f"checkpoints/{RUN}/run.json").read()) == {
        "schema_version": "1.0",
        "run_id": RUN,
        "identity": IDENTITY,
        "frozen": {"microbatch": 4},
    }
