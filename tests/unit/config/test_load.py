"""Loading a job: what is wrong is named with its place, its key as written, its value, and what is allowed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nexa_train.config import Job
from nexa_train.config.load import job_from_object, load_job
from nexa_train.errors import ConfigError, NotFoundError

HEAD = "apiVersion: train.nexa.dev/v1alpha1\nkind: NexaTrainingJob\nmetadata: {name: a}\n"
DATA = "data: {remote_uri: x}\n"


def job_file(folder: Path, text: str, name: str = "job.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def complaint(folder: Path, text: str, **options: Any) -> list[str]:
    """The lines of the error, without the folder."""
    with pytest.raises(ConfigError) as caught:
        load_job(job_file(folder, text), **options)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def load(folder: Path, text: str, **options: Any) -> Job:
    return load_job(job_file(folder, text), **options)


WRONG_FILES = {
    "a typo in a recipe": (DATA + "optimizer: {wieght_decay: 0.1}", ":2: optimizer.wieght_decay: unknown key; did"),
    "is answered in snake_case": (DATA + "training: {max_step: 1}", ":2: training.max_step: unknown key; did you mean"),
    "a typo in a group's name": (DATA + "bakcend: fsdp", ":2: bakcend: unknown key; did you mean backend?"),
    "a typo inside a list": (
        DATA + "cluster:\n  tolerations:\n  - {key: a, operater: Exists}",
        ":4: cluster.tolerations.0.operater: unknown key; did you mean operator?",
    ),
    "a typo inside a tagged union": (
        DATA + "tuning: {type: lora, rank: 4, dropuot: 0.1}",
        ":2: tuning.dropuot: unknown key; did you mean dropout?",
    ),
    "a key of another branch": (
        DATA + "tuning: {type: full, rank: 4}",
        ":2: tuning.rank: unknown key; allowed here: type",
    ),
    "both spellings of one key": (
        DATA + "training: {globalBatchSize: 8, global_batch_size: 8}",
        ":2: training.global_batch_size: given in both spellings; keep one",
    ),
    "text for a number": (DATA + "training: {max_steps: many}", ":2: training.max_steps: got 'many'; expected a valid"),
    "a number out of bounds": (
        DATA + "training: {max_steps: 0}",
        ":2: training.max_steps: got 0; expected greater than or equal to 1",
    ),
    "a wrong word for a number or auto": (
        DATA + "training: {microbatch_size_per_gpu: few}",
        ":2: training.microbatch_size_per_gpu: got 'few'; expected 'auto'",
    ),
    "a word that is none of the allowed": (
        DATA + "backend: jax",
        ":2: backend: got 'jax'; expected 'hf', 'fsdp', 'deepspeed' or 'axolotl'",
    ),
    "a number in a list": (
        DATA + "recovery: {rules: [{exit_codes: [1, 300], action: retry}]}",
        ":2: recovery.rules.0.exit_codes.1: got 300; expected less than or equal to 255",
    ),
    "a list of another length": (
        DATA + "optimizer: {betas: [0.9]}",
        ":2: optimizer.betas: got [0.9]; expected at least 2",
    ),
    "not a finite number": (DATA + "optimizer: {lr: .nan}", ":2: optimizer.lr: got nan; expected a finite number"),
    "one word for a group": ("data: x", ":1: data: got 'x'; expected a group of keys"),
    "one word for a union": (DATA + "method: sft", ":2: method: got 'sft'; expected a group of keys"),
    "a union of unknown type": (
        DATA + "tuning: {type: lola}",
        ":2: tuning: got 'lola' as type; expected one of 'full', 'lora', 'qlora'",
    ),
    "a union without a type": (DATA + "tuning: {rank: 4}", ":2: tuning: got {'rank': 4}; its type is required"),
    "no data": ("backend: fsdp", ": data: required, and not given"),
    "no uri": ("data: {packing: true}", ":1: data.remote_uri: required, and not given"),
    "a name with capitals": (DATA + "name: My_Job", ":2: name: got 'My_Job'; expected a match of '^[a-z]("),
    "a name too long": (DATA + f"name: {'a' * 46}", f":2: name: got '{'a' * 46}'; expected at most 45 characters"),
    "a key twice": (DATA + DATA, ":2: data: given twice, first on line 1; keep one"),
    "a key twice in a group": ("data: {remote_uri: x, remote_uri: y}", ":1: data.remote_uri: given twice, first on"),
    "a number as key": (DATA + "1: 2", ":2: the key 1 is not text to YAML; put it in quotes"),
    "yes as key": (DATA + "cluster: {labels: {yes: a}}", ":2: the key yes is not text to YAML; put it in quotes"),
    "a list as key": (DATA + "? [a]\n: 1", ":2: a key is a list or a mapping; expected plain text"),
    "an alias inside itself": (DATA + "model: &m {name: *m}", ":2: model.name: an alias inside its own anchor"),
    "not YAML": ("data: [", ":1: not valid YAML: expected the node content"),
    "no date": (DATA + "image: 2024-02-30", ": not valid YAML: day is out of range for month"),
    "a list": ("- data", ": expected one mapping (key: value), found a list"),
    "one word": ("data", ": expected one mapping (key: value), found a single value"),
    "nothing": ("# only a comment\n", ": expected one mapping (key: value), found 0 documents"),
    "two documents": (DATA + "---\n" + DATA, ": expected one mapping (key: value), found 2 documents"),
    "both lengths": (
        DATA + "training: {max_steps: 1, epochs: 1}",
        ":2: training: training takes max_steps or epochs, not both",
    ),
    "sizes in part": (DATA + "model: {d_model: 64}", ":2: model: d_model, n_layers and n_heads build a model together"),
    "heads of odd size": (
        DATA + "model: {d_model: 64, n_layers: 1, n_heads: 5}",
        ":2: model: d_model 64 is not divisible by 2 x n_heads 5",
    ),
    "a device of Kubernetes' own": (
        DATA + "cluster: {resources: {extended: {kubernetes.io/gpu: 1}}}",
        ":2: cluster.resources: extended: kubernetes.io/gpu is not what a device plugin calls a device",
    ),
    "a device without a plugin": (
        DATA + "cluster: {resources: {extended: {cpu: 1}}}",
        ":2: cluster.resources: extended: cpu is not what a device plugin calls a device, such as rdma/hca",
    ),
    "GPUs asked for twice": (
        DATA + "cluster: {gpus_per_node: 1, resources: {extended: {nvidia.com/gpu: 1}}}",
        ":2: cluster: resources.extended: nvidia.com/gpu comes from gpus_per_node; leave it out",
    ),
    "a batch that the ranks cannot share": (
        DATA + "cluster: {num_nodes: 2}\ntraining: {global_batch_size: 7}",
        ":3: spec: training.global_batch_size 7 is not divisible by the 2 ranks (2 nodes x 1); nearest that are: 6",
    ),
    "a product that misses the batch": (
        DATA + "training:\n  microbatch_size_per_gpu: 4\n  grad_accumulation_steps: 4",
        ":3: spec: training.microbatch_size_per_gpu 4 x grad_accumulation_steps 4 x 1 ranks cannot make "
        "global_batch_size 8; a rank has 8 sequences a step",
    ),
    "a check across groups in mixed spellings": (
        DATA + "training: {microbatchSizePerGpu: 3}",
        ":2: spec: training.microbatch_size_per_gpu 3 x grad_accumulation_steps auto x 1 ranks cannot make",
    ),
    "a microbatch that leaves a rest": (
        DATA + "training: {microbatch_size_per_gpu: 3}",
        ":2: spec: training.microbatch_size_per_gpu 3 x grad_accumulation_steps auto x 1 ranks cannot make",
    ),
    "a format that the method cannot use": (
        "data: {remote_uri: x, format: text}\nmethod: {type: dpo}",
        ":1: spec: data.format text does not fit method.type dpo, which takes preference",
    ),
    "preference pairs for sft": (
        "data: {remote_uri: x, format: preference}",
        ":1: spec: data.format preference does not fit method.type sft, which takes messages, prompt_completion",
    ),
    "two sources of validation": (
        "data: {remote_uri: x, validation: {rows: 1, fraction: 0.1}}",
        ":1: data.validation: validation takes one of fraction, rows and uri, not several",
    ),
    "more min_nodes than nodes": (
        DATA + "cluster: {min_nodes: 2}",
        ":2: cluster: min_nodes 2 is more than num_nodes 1",
    ),
    "a volume from nowhere": (
        DATA + "cluster: {volumes: [{name: a, mount_path: /a}]}",
        ":2: cluster.volumes.0: a volume comes from a claim or from a config_map: give exactly one",
    ),
}


@pytest.mark.parametrize(("text", "expected"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_wrong_file_is_explained_by_line_key_and_value(tmp_path: Path, text: str, expected: str) -> None:
    assert any(line.startswith(f"job.yaml{expected}") for line in complaint(tmp_path, text)), complaint(tmp_path, text)


WRONG_MANIFESTS = {
    "another apiVersion": (
        "apiVersion: v1\nkind: NexaTrainingJob\nspec: {}",
        ":1: apiVersion: got 'v1', expected 'train.nexa.dev/v1alpha1'",
    ),
    "no apiVersion": ("kind: NexaTrainingJob\nspec: {}", ": apiVersion: got None, expected 'train.nexa.dev/v1alpha1'"),
    "another kind": (
        "apiVersion: train.nexa.dev/v1alpha1\nkind: Job\nspec: {}",
        ":2: kind: got 'Job', expected 'NexaTrainingJob'",
    ),
    "no spec": (HEAD, ": spec: expected a mapping, found None"),
    "a list as spec": (HEAD + "spec: [1]", ":4: spec: expected a mapping, found [1]"),
    "a key beside spec": (HEAD + "spek: {}", ":4: spek: unknown key beside metadata and spec"),
    "a typo in metadata": (
        HEAD.replace("name: a", "name: a, lables: {}") + "spec: {data: {remoteUri: x}}",
        ":3: metadata.lables: unknown key; did you mean labels?",
    ),
    "a list as metadata": (
        HEAD.replace("{name: a}", "[a]") + "spec: {data: {remoteUri: x}}",
        ":3: metadata: got ['a']; expected a group of keys",
    ),
    "a typo in camelCase": (
        HEAD + "spec:\n  data: {remoteUri: x}\n  training: {globalBtchSize: 8}",
        ":6: training.globalBtchSize: unknown key; did you mean globalBatchSize?",
    ),
    "a missing key, in camelCase": (HEAD + "spec: {data: {}}", ":4: data.remoteUri: required, and not given"),
    "a check across keys, in camelCase": (
        HEAD + "spec:\n  data: {remoteUri: x}\n  training: {maxSteps: 1, epochs: 1}",
        ":6: training: training takes maxSteps or epochs, not both",
    ),
    "a check across groups, in camelCase": (
        HEAD + "spec:\n  data: {remoteUri: x}\n  cluster: {numNodes: 3}\n  training:\n    globalBatchSize: 8",
        ":8: spec: training.globalBatchSize 8 is not divisible by the 3 ranks",
    ),
}


@pytest.mark.parametrize(("text", "expected"), WRONG_MANIFESTS.values(), ids=WRONG_MANIFESTS)
def test_a_wrong_manifest_is_explained_in_its_own_spelling(tmp_path: Path, text: str, expected: str) -> None:
    assert any(line.startswith(f"job.yaml{expected}") for line in complaint(tmp_path, text)), complaint(tmp_path, text)


WRONG_SETS = {
    "without =": ("training.seed", "--set training.seed: expected key=value"),
    "without a key": ("=1", "--set =1: expected key=value"),
    "with an empty part": ("training..seed=1", "--set training..seed=1: expected key=value"),
    "below a value": ("model.name.x=1", "--set model.name.x=1: model.name.x: name is 'tiny', not a group of keys"),
    "of no date": ("image=2024-13-01", "--set image=2024-13-01: the value is not valid YAML; put text in quotes"),
    "of no YAML": ("model.name=[", "--set model.name=[: the value is not valid YAML"),
    "of a wrong type": ("training.seed=x", "--set training.seed=x: training.seed: got 'x'; expected a valid integer"),
    "of an unknown key": ("training.sead=1", "--set training.sead=1: training.sead: unknown key; did you mean seed?"),
    "of a value for a group": ("optimizer=1", "--set optimizer=1: optimizer: got 1; expected a group of keys"),
    "that breaks the batch": (
        "cluster.num_nodes=3",
        "job.yaml with --set cluster.num_nodes=3: spec: training.global_batch_size 8 is not divisible by the 3 ranks",
    ),
}


@pytest.mark.parametrize(("text", "expected"), WRONG_SETS.values(), ids=WRONG_SETS)
def test_a_wrong_set_is_named_as_it_was_typed(tmp_path: Path, text: str, expected: str) -> None:
    assert complaint(tmp_path, DATA + "model: {name: tiny}", sets=[text])[0].startswith(expected)


def test_a_wrong_run_name_is_named_as_it_was_typed(tmp_path: Path) -> None:
    [line] = complaint(tmp_path, HEAD + "spec: {data: {remoteUri: x}}", name="No_Label")
    assert line.startswith("--run-name No_Label: metadata.name: got 'No_Label'; expected a match of")


def test_a_run_name_does_not_hide_that_metadata_is_a_list(tmp_path: Path) -> None:
    text = HEAD.replace("{name: a}", "[a]") + "spec: {data: {remoteUri: x}}"
    assert complaint(tmp_path, text, name="b") == ["job.yaml:3: metadata: got ['a']; expected a group of keys"]


def test_every_problem_of_a_file_is_reported_at_once(tmp_path: Path) -> None:
    text = "data: {remote_uri: x, packing: 3}\ntraining: {seed: -1}\nimagge: x"
    assert [line.split(":")[1] for line in complaint(tmp_path, text)] == ["1", "2", "3"]


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"data: \xff\xfe")
    with pytest.raises(ConfigError, match=r"job.yaml: cannot be read as UTF-8 text"):
        load_job(tmp_path / "job.yaml")


def test_a_missing_file_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none.yaml: no such file; give the path of a job file or --config-mode"):
        load_job(tmp_path / "none.yaml")


@pytest.mark.parametrize("recipe", [None, "v1"])
def test_a_file_or_a_recipe_but_not_both_and_not_neither(tmp_path: Path, recipe: str | None) -> None:
    path = job_file(tmp_path, DATA) if recipe else None
    with pytest.raises(ConfigError, match="give either a job file or --config-mode RECIPE, exactly one of them"):
        load_job(path, recipe=recipe)


def test_an_unknown_recipe_names_those_that_are_shipped() -> None:
    with pytest.raises(ConfigError, match=r"--config-mode v9: no such recipe; shipped are .*v1, v2, v3"):
        load_job(recipe="v9")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"metadata": {"name": "a"}, "spec": {}}, "NexaTrainingJob/a: data: required, and not given"),
        ({"metadata": [], "spec": {"data": {"remoteUri": "x"}}}, "metadata.name: required"),
        ({"metadata": "a", "spec": {}}, "NexaTrainingJob: metadata: got 'a'; expected a group of keys"),
        ({"metadata": {"name": "a"}, "spec": "x"}, "NexaTrainingJob/a: spec: got 'x'; expected a group of keys"),
        (
            {"metadata": {"name": "a"}, "spec": {"data": {"remoteUri": "x"}, "training": {"globalBtchSize": 8}}},
            "NexaTrainingJob/a: training.globalBtchSize: unknown key; did you mean globalBatchSize?",
        ),
    ],
    ids=["no data", "empty metadata", "text as metadata", "text as spec", "typo"],
)
def test_a_wrong_object_of_the_cluster_is_named_by_kind_and_name(body: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        job_from_object(body)
    assert expected in str(caught.value)


def test_what_the_server_adds_to_an_object_is_no_part_of_the_job() -> None:
    metadata = {"name": "a", "namespace": "team", "uid": "1", "generation": 3, "managedFields": [{}]}
    body = {"metadata": metadata, "spec": {"data": {"remoteUri": "x"}}, "status": {"phase": "Running"}}
    assert job_from_object(body).metadata.model_dump(exclude_defaults=True) == {"name": "a", "namespace": "team"}


def test_a_bare_spec_is_named_after_its_file(tmp_path: Path) -> None:
    assert load_job(job_file(tmp_path, DATA, "My Job_2.yaml")).metadata.name == "my-job-2"


def test_a_file_name_without_a_letter_in_front_still_gives_a_name(tmp_path: Path) -> None:
    assert load_job(job_file(tmp_path, DATA, "___.yaml")).metadata.name == "job"
    assert load_job(job_file(tmp_path, DATA, "7B-sft.yaml")).metadata.name == "job-7b-sft"


def test_a_spec_names_its_job_by_the_key_name(tmp_path: Path) -> None:
    assert load(tmp_path, DATA + "name: mine").metadata.name == "mine"


def test_a_run_name_wins_over_the_name_in_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, DATA + "name: mine", name="yours").metadata.name == "yours"


def test_a_key_that_nobody_gave_has_its_default(tmp_path: Path) -> None:
    assert load(tmp_path, DATA).spec.training.global_batch_size == 8


def test_the_file_wins_over_the_default_and_the_flag_over_the_file(tmp_path: Path) -> None:
    text = DATA + "training: {seed: 1, max_steps: 1}"
    spec = load(tmp_path, text, overrides={"training.seed": 2}).spec
    assert (spec.training.seed, spec.training.max_steps) == (2, 1)


def test_the_recipe_wins_over_the_default_and_the_flag_over_the_recipe() -> None:
    spec = load_job(recipe="v1", overrides={"training.seed": 2}).spec
    assert (spec.training.seed, spec.training.global_batch_size, spec.backend) == (2, 16, "hf")


def test_set_wins_over_the_flags_and_the_last_set_over_the_first(tmp_path: Path) -> None:
    sets = ["training.seed=3", "training.seed=4"]
    assert load(tmp_path, DATA, overrides={"training.seed": 2}, sets=sets).spec.training.seed == 4


@pytest.mark.parametrize("written", ["maxSteps", "max_steps"])
@pytest.mark.parametrize("given", ["maxSteps", "max_steps"])
def test_an_override_replaces_the_key_in_either_spelling(tmp_path: Path, written: str, given: str) -> None:
    text = DATA + f"training: {{{written}: 1}}"
    assert load(tmp_path, text, sets=[f"training.{given}=5"]).spec.training.max_steps == 5


def test_spellings_may_be_mixed_in_one_file(tmp_path: Path) -> None:
    spec = load(tmp_path, "data: {remoteUri: x}\ntraining: {max_steps: 3, saveEverySteps: 2}").spec
    assert (spec.data.remote_uri, spec.training.max_steps, spec.training.save_every_steps) == ("x", 3, 2)


@pytest.mark.parametrize(
    ("text", "value"),
    [("data.dataset_version='1'", "1"), ("data.datasetVersion=a=b", "a=b"), ("data.dataset_version=", None)],
    ids=["quoted", "with = in it", "empty"],
)
def test_the_value_of_a_set_is_yaml_after_the_first_equals_sign(tmp_path: Path, text: str, value: str | None) -> None:
    if value is None:
        assert "got None; expected a valid string" in complaint(tmp_path, DATA, sets=[text])[0]
    else:
        assert load(tmp_path, DATA, sets=[text]).spec.data.dataset_version == value


def test_a_set_makes_groups_that_the_file_does_not_have(tmp_path: Path) -> None:
    assert load(tmp_path, DATA, sets=["data.validation.rows=3"]).spec.data.validation.rows == 3


def test_a_set_may_give_a_whole_group(tmp_path: Path) -> None:
    assert load(tmp_path, DATA, sets=["tuning={type: lora, rank: 4}"]).spec.tuning.type == "lora"


def test_overrides_leave_the_file_as_it_was(tmp_path: Path) -> None:
    path = job_file(tmp_path, DATA + "training: {seed: 1}")
    load_job(path, sets=["training.seed=2"], name="other")
    assert path.read_text(encoding="utf-8") == DATA + "training: {seed: 1}"
    assert load_job(path).spec.training.seed == 1


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (DATA + "training: {max_step: 1}", 2),
        ("data: [", 2),
        (DATA + "trackers: [wandb]", 2),
        (None, 3),
    ],
    ids=["typo", "not YAML", "unsupported", "missing"],
)
def test_the_command_line_ends_with_the_code_of_the_error_and_one_clear_message(
    tmp_path: Path, text: str | None, code: int
) -> None:
    path = tmp_path / "job.yaml" if text is None else job_file(tmp_path, text)
    command = [sys.executable, "-m", "nexa_train", "validate", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("nexa: error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("deep", ["[" * 2000 + "]" * 2000, "{a: " * 2000 + "}" * 2000])
def test_what_is_nested_without_end_is_refused(tmp_path: Path, deep: str) -> None:
    with pytest.raises(ConfigError, match=r"job.yaml: nested too deep to be read"):
        load_job(job_file(tmp_path, f"a: {deep}"))
    with pytest.raises(ConfigError, match=r"^--set training.seed: nested too deep to be read"):
        load(tmp_path, DATA, sets=[f"training.seed={deep}"])
