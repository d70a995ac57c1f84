"""`verify` on whole stores, runs, steps and single manifests, sound and damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nexa_train.artifact import verify as verifying
from nexa_train.artifact.manifest import ManifestDraft, canonical_json, step_folder
from nexa_train.artifact.publish import Committed, Publisher, claim_run
from nexa_train.artifact.retention import apply_retention
from nexa_train.artifact.steps import StepState
from nexa_train.artifact.verify import split_artifact_uri, verify
from nexa_train.errors import ConfigError, NotFoundError
from nexa_train.store import Store, open_store
from tests.unit.artifact.builders import RUN, draft, files_in, publish_chain


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "artifacts"


@pytest.fixture
def chain(root: Path, tmp_path: Path) -> list[Committed]:
    claim_run(open_store(root), RUN, {})
    return publish_chain(open_store(root), tmp_path / "source", 50, 100, 150)


def weights(root: Path, committed: Committed) -> Path:
    return root / committed.folder / committed.manifest.files[0].object


@pytest.mark.parametrize(
    ("below", "num_manifests"),
    [
        ("", 3),
        ("checkpoints", 3),
        (f"checkpoints/{RUN}", 3),
        (step_folder(RUN, 100), 1),
        (f"{step_folder(RUN, 100)}/", 1),
        (f"{step_folder(RUN, 100)}/manifest.json", 1),
    ],
)
def test_sound_artifacts_are_verified_from_any_level(
    root: Path, chain: list[Committed], below: str, num_manifests: int
) -> None:
    report = verify(f"{root}/{below}")

    assert report.ok
    assert report.problems == ()
    assert len(report.manifests) == num_manifests
    assert report.num_files == 2 * num_manifests
    assert report.num_bytes == 10 * num_manifests
    assert {one.digest for one in report.manifests} <= {one.digest for one in chain}


def test_a_report_names_each_manifest_with_its_digest_and_step(root: Path, chain: list[Committed]) -> None:
    [seen] = verify(f"{root}/{chain[1].folder}").manifests

    assert (seen.uri, seen.digest, seen.step) == (f"{root}/{chain[1].key}", chain[1].digest, 100)


def test_a_file_uri_is_verified(root: Path, chain: list[Committed]) -> None:
    assert verify(root.as_uri()).ok


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"00000x50", "has sha256"),
        (b"0000", "has 4 bytes, expected 8"),
        (b"00000050more", "has 12 bytes, expected 8"),
    ],
)
def test_other_bytes_are_a_problem(root: Path, chain: list[Committed], content: bytes, complaint: str) -> None:
    weights(root, chain[0]).write_bytes(content)

    report = verify(str(root))

    assert not report.ok
    [problem] = report.problems
    assert problem.startswith(f"model.safetensors of {chain[0].folder}")
    assert complaint in problem


def test_every_problem_is_listed_and_they_are_sorted(root: Path, chain: list[Committed]) -> None:
    weights(root, chain[2]).write_bytes(b"x" * 8)
    weights(root, chain[0]).unlink()
    (root / chain[1].key).write_bytes(b"{}")

    problems = verify(str(root)).problems

    assert list(problems) == sorted(problems)
    # The fourth: the child of a manifest that cannot be read has lost its parent.
    assert len(problems) == 4


def test_a_name_that_no_store_takes_is_a_problem(root: Path, chain: list[Committed]) -> None:
    content = (root / chain[0].key).read_bytes()
    (root / chain[0].key).write_bytes(content.replace(b'"object":"data/', b'"object":"`ata/', 1))

    assert any("'`ata/" in problem for problem in verify(str(root)).problems)


def test_a_manifest_whose_data_is_gone_is_a_problem(root: Path, chain: list[Committed]) -> None:
    shutil.rmtree(root / chain[0].folder / "data")

    assert [problem.split(" is not in ")[1] for problem in verify(str(root)).problems] == [str(root)] * 2


def test_a_checkpoint_in_another_step_s_folder_is_a_problem(root: Path, chain: list[Committed]) -> None:
    shutil.copytree(root / chain[0].folder, root / step_folder(RUN, 60))

    [problem] = verify(str(root)).problems
    assert problem.endswith("it was moved or copied")


def test_a_checkpoint_of_another_run_is_a_problem(root: Path, chain: list[Committed]) -> None:
    shutil.copytree(root / chain[0].folder, root / step_folder("another-run", 50))

    [problem] = verify(str(root)).problems
    assert f"is the manifest of {chain[0].folder}, expected one of run another-run" in problem


def test_a_checkpoint_in_a_folder_that_is_no_step_is_a_problem(root: Path, chain: list[Committed]) -> None:
    (root / chain[0].folder).rename(root / "checkpoints" / RUN / "best")

    assert any("best/manifest.json" in problem for problem in verify(str(root)).problems)


def test_an_edited_manifest_breaks_the_chain_although_it_is_valid(root: Path, chain: list[Committed]) -> None:
    document = chain[1].manifest.to_dict()
    document["metrics"]["loss"] = 0.001
    (root / chain[1].key).write_bytes(canonical_json(document))

    [problem] = verify(str(root)).problems
    assert problem.startswith(f"{chain[2].folder}: its parent {chain[1].digest} is not in the run")


def test_a_child_alone_is_checked_against_the_rest_of_its_run(root: Path, chain: list[Committed]) -> None:
    (root / chain[1].key).unlink()

    assert not verify(f"{root}/{chain[2].key}").ok


def test_a_parent_that_is_not_before_its_child_is_a_problem(root: Path, tmp_path: Path) -> None:
    store = open_store(root)
    chain = publish_chain(store, tmp_path / "source", 100, 50)

    [problem] = verify(str(root)).problems
    assert problem.endswith(f"its parent {chain[0].digest} is step 100, which is not before step 50")


def test_a_parent_that_retention_deleted_is_no_problem(root: Path, chain: list[Committed]) -> None:
    apply_retention(open_store(root), RUN, 2)

    assert verify(str(root)).ok
    assert len(verify(str(root)).manifests) == 2


def test_a_parent_that_retention_deletes_while_files_are_read_is_no_problem(
    root: Path, chain: list[Committed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = verifying.run_steps

    def after_another_save(store: Store, run_id: str) -> list[StepState]:
        publish_chain(store, tmp_path / "later", 200, attempt="a2")
        apply_retention(store, run_id, 1)
        return look(store, run_id)

    monkeypatch.setattr(verifying, "run_steps", after_another_save)

    assert verify(str(root)).ok


def logged(parent: Committed, *, step: int) -> ManifestDraft:
    """As a run that went on from `parent` says of a later step."""
    steps = [{"step": number} for number in range(parent.manifest.step + 1, step + 1)]
    return draft(parent=parent.digest, logs=steps)


def test_a_parent_that_retention_deleted_is_none_though_an_attempt_thought_dead_committed_between(
    root: Path, tmp_path: Path
) -> None:
    store, files = open_store(root), files_in(tmp_path / "source")
    first, second = Publisher(store, RUN, "a0"), Publisher(store, RUN, "a1")
    ten = first.publish(10, files, draft())
    second.resume()
    second.publish(20, files, logged(ten, step=20))
    first.publish(15, files, logged(ten, step=15))
    assert apply_retention(store, RUN, 2) == [10]

    assert verify(str(root)).ok


def test_a_parent_that_retention_did_not_delete_is_missed(root: Path, tmp_path: Path) -> None:
    store, files = open_store(root), files_in(tmp_path / "source")
    publisher = Publisher(store, RUN, "a0")
    chain = [publisher.publish(10, files, draft())]
    for step in (20, 30, 40):
        chain.append(publisher.publish(step, files, logged(chain[-1], step=step)))
    assert apply_retention(store, RUN, 3) == [10]
    (root / chain[2].key).write_bytes(canonical_json(chain[2].manifest.to_dict() | {"metrics": {"loss": 0.001}}))

    [problem] = verify(str(root)).problems
    assert problem.startswith(f"{chain[3].folder}: its parent {chain[2].digest} is not in the run")


@pytest.mark.parametrize("looks", [1, 2])
def test_a_checkpoint_that_goes_before_it_is_read_is_looked_for_again(
    root: Path, chain: list[Committed], monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    read, seen = verifying.read_manifest, []

    def after_it_went(store: Store, folder: str) -> Committed:
        if len(seen) < looks and not seen.append(folder):
            raise NotFoundError("retired since it was listed")
        return read(store, folder)

    monkeypatch.setattr(verifying, "read_manifest", after_it_went)

    assert len(verify(f"{root}/{chain[2].folder}").manifests) == 1


def test_a_checkpoint_that_went_before_it_was_read_is_not_called_verified(
    root: Path, chain: list[Committed], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = verifying.read_manifest

    def after_it_went(store: Store, folder: str) -> Committed:
        apply_retention(store, RUN, 1)
        return read(store, folder)

    monkeypatch.setattr(verifying, "read_manifest", after_it_went)

    with pytest.raises(NotFoundError, match=r"no manifest\.json at or below"):
        verify(f"{root}/{chain[0].key}")


def test_a_manifest_of_a_later_major_version_is_a_problem(root: Path, chain: list[Committed]) -> None:
    document = chain[2].manifest.to_dict() | {"schema_version": "2.0"}
    (root / chain[2].key).write_bytes(canonical_json(document))

    assert any("schema version 2.0" in problem for problem in verify(str(root)).problems)


def test_a_checkpoint_copied_out_of_its_run_is_verified_by_its_files(
    root: Path, chain: list[Committed], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root / chain[1].folder, copy)

    assert verify(str(copy)).ok
    assert verify(f"{copy}/manifest.json").num_files == 2
    (copy / chain[1].manifest.files[0].object).write_bytes(b"x" * 8)
    assert not verify(str(copy)).ok


def test_a_file_of_a_checkpoint_may_be_called_manifest_json(root: Path, tmp_path: Path) -> None:
    files = files_in(tmp_path / "source", {"manifest.json": b"not ours", "data/manifest.json": b"nor this"})
    Publisher(open_store(root), RUN, "a1").publish(50, files, draft())

    report = verify(str(root))
    assert (report.ok, len(report.manifests), report.num_files) == (True, 1, 2)


@pytest.mark.parametrize("below", ["", "/checkpoints", "/checkpoints/run", "/manifest.json"])
def test_where_nothing_is_there_is_nothing_to_verify(root: Path, below: str) -> None:
    with pytest.raises(NotFoundError, match=r"no manifest\.json at or below"):
        verify(f"{root}{below}")


def test_data_without_a_manifest_is_nothing(root: Path, chain: list[Committed]) -> None:
    for committed in chain:
        (root / committed.key).unlink()

    with pytest.raises(NotFoundError):
        verify(str(root))


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://models/team/checkpoints/r/step-00000050", ("s3://models/team", "checkpoints/r/step-00000050")),
        ("s3://models/checkpoints/r/", ("s3://models", "checkpoints/r")),
        ("s3://checkpoints/team", ("s3://checkpoints/team", "")),
        ("s3://checkpoints", ("s3://checkpoints", "")),
        ("s3://models/checkpoints", ("s3://models", "checkpoints")),
        ("s3://models/copy/manifest.json", ("s3://models/copy", "manifest.json")),
        ("/data/checkpoints/art/checkpoints/r", ("/data/checkpoints/art", "checkpoints/r")),
        ("/checkpoints/r", ("/", "checkpoints/r")),
        ("/", ("/", "")),
        ("file:///a%20b/checkpoints/r", ("/a b", "checkpoints/r")),
        ("file://localhost/a#1/checkpoints/r?", ("/a#1", "checkpoints/r?")),
        ("file://elsewhere/a", ("file://elsewhere/a", "")),
        ("memory://m/checkpoints/r", ("memory://m", "checkpoints/r")),
    ],
)
def test_a_uri_is_split_where_checkpoints_begin(uri: str, expected: tuple[str, str]) -> None:
    assert split_artifact_uri(uri) == expected


@pytest.mark.parametrize(
    "place", ["checkpoints", "checkpoints/art", "checkpoints/team/art", "checkpoints/a/checkpoints"]
)
def test_a_store_below_a_folder_called_checkpoints_is_verified(tmp_path: Path, place: str) -> None:
    root = tmp_path / place
    [committed] = publish_chain(open_store(root), tmp_path / "source", 50)

    for below in ("", "checkpoints", committed.folder, committed.key):
        [seen] = verify(f"{root}/{below}").manifests
        assert (seen.uri, seen.digest) == (f"{root}/{committed.key}", committed.digest)


def test_a_copy_in_a_folder_called_checkpoints_is_verified(root: Path, chain: list[Committed], tmp_path: Path) -> None:
    copy = tmp_path / "checkpoints" / "best"
    shutil.copytree(root / chain[1].folder, copy)

    for uri in (copy, copy / "manifest.json"):
        assert [seen.digest for seen in verify(str(uri)).manifests] == [chain[1].digest]


def test_a_step_that_was_retired_is_not_taken_for_a_copy(root: Path, chain: list[Committed]) -> None:
    apply_retention(open_store(root), RUN, 1)
    (root / chain[0].key).write_bytes(chain[0].manifest.to_bytes())

    for uri in (root / chain[0].folder, root / chain[0].key):
        with pytest.raises(NotFoundError):
            verify(str(uri))


def test_a_relative_path_is_split_from_where_the_process_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert split_artifact_uri("artifacts/checkpoints/r") == (f"{tmp_path}/artifacts", "checkpoints/r")
    assert split_artifact_uri("checkpoints/r") == (str(tmp_path), "checkpoints/r")


@pytest.mark.parametrize("uri", ["s3://models/team#1/checkpoints/r", "s3://models/checkpoints/r?versionId=1"])
def test_what_s3_cannot_name_is_refused_and_not_dropped(uri: str) -> None:
    with pytest.raises(ConfigError, match="takes no fragment and no query"):
        split_artifact_uri(uri)


def test_a_file_of_another_machine_is_not_looked_for_here() -> None:
    with pytest.raises(ConfigError, match="'file://elsewhere/tmp' is not supported"):
        verify("file://elsewhere/tmp")


def test_an_empty_uri_names_nothing() -> None:
    with pytest.raises(ConfigError, match="names nothing"):
        split_artifact_uri("")


def test_a_step_that_was_committed_anew_is_verified_by_the_name_of_its_manifest(
    root: Path, chain: list[Committed], tmp_path: Path
) -> None:
    weights(root, chain[2]).write_bytes(b"other")
    publisher = Publisher(open_store(root), RUN, "a1")
    publisher.resume()
    again = publisher.publish(150, files_in(tmp_path / "again", {"w": b"right"}), draft())

    assert again.key.endswith("/manifest-3.json")
    report = verify(f"{root}/{again.key}")
    assert [one.digest for one in report.manifests] == [again.digest]
    for old in ("manifest.json", "manifest-2.json"):
        with pytest.raises(NotFoundError, match=old):
            verify(f"{root}/{again.folder}/{old}")


def test_a_copy_obeys_the_highest_name_of_a_manifest_in_it(root: Path, chain: list[Committed], tmp_path: Path) -> None:
    weights(root, chain[2]).write_bytes(b"other")
    publisher = Publisher(open_store(root), RUN, "a1")
    publisher.resume()
    again = publisher.publish(150, files_in(tmp_path / "again", {"w": b"right"}), draft())
    copies = [shutil.copytree(root / again.folder, tmp_path / place / "best") for place in ("copy", "checkpoints")]
    (copies[0] / "manifest.json").write_bytes(chain[2].manifest.to_bytes())

    for copy in copies:
        for uri in (copy, copy / "manifest-3.json"):
            report = verify(str(uri))
            assert [(seen.uri, seen.digest) for seen in report.manifests] == [(f"{copy}/manifest-3.json", again.digest)]
            assert report.ok
        with pytest.raises(NotFoundError):
            verify(f"{copy}/manifest.json")


def test_a_copy_of_a_step_that_was_given_up_is_none(root: Path, chain: list[Committed], tmp_path: Path) -> None:
    open_store(root).create(f"{chain[2].folder}/manifest-2.json", b"")
    copy = shutil.copytree(root / chain[2].folder, tmp_path / "copy")

    for uri in (copy, copy / "manifest.json", copy / "manifest-2.json"):
        with pytest.raises(NotFoundError):
            verify(str(uri))
