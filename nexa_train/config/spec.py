"""The schema of a NexaTrainingJob's `spec`: the only one there is.

Recipes, the command line, the CRD in `crds/` and the operator all derive from these models. Checks that
need one group of keys stand in that group, checks across groups in `JobSpec`; what a backend can do stands
in `support.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from nexa_train.config.base import (
    ANNOTATION_KEY,
    EXTENDED_RESOURCE,
    KEY,
    NOT_EXTENDED,
    Annotations,
    ExtendedResource,
    Image,
    Int,
    Key,
    LabelMap,
    Labels,
    LabelValue,
    Name,
    ObjectName,
    Quantity,
    QueueName,
    Strict,
    Text,
)

Auto = Literal["auto"]
Count = Annotated[Int, Field(ge=1, le=1_000_000)]


class ModelSpec(Strict):
    """What is trained: a registry name, a hub id, a folder, a GGUF file, or sizes to build from scratch."""

    name: Text = Field("tiny", min_length=1, description="Registry key, hub id, folder or GGUF file of the base model.")
    revision: Text | None = Field(None, description="Commit or tag of a hub id; pins the weights.")
    d_model: Int | None = Field(None, ge=8, le=65_536, description="Hidden size; given: built from scratch.")
    n_layers: Int | None = Field(None, ge=1, le=1024, description="Decoder layers; given: built from scratch.")
    n_heads: Int | None = Field(None, ge=1, le=1024, description="Attention heads; given: built from scratch.")
    max_seq_len: Int = Field(512, ge=8, le=1_048_576, description="Longest sequence in tokens.")
    attn: Literal["auto", "eager", "sdpa", "flash"] = Field("auto", description="Attention implementation.")

    @model_validator(mode="after")
    def _sizes_come_together(self) -> ModelSpec:
        given = [size is not None for size in (self.d_model, self.n_layers, self.n_heads)]
        if any(given) and not all(given):
            raise ValueError("d_model, n_layers and n_heads build a model together: give all three or none")
        if self.d_model and self.n_heads and self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"d_model {self.d_model} is not divisible by 2 x n_heads {self.n_heads} "
                "(rotary embeddings need heads of an even size)"
            )
        return self

    @property
    def from_scratch(self) -> bool:
        """Whether sizes are given, so that an architecture is built instead of loaded."""
        return self.d_model is not None


class ValidationSpec(Strict):
    """Rows held out to measure validation loss: a fraction, a number, or a file of their own; at most one."""

    fraction: float | None = Field(None, gt=0, lt=1, description="Share of the rows held out.")
    rows: Int | None = Field(None, ge=1, le=10_000_000, description="Number of rows held out.")
    uri: Text | None = Field(None, description="A file of its own.")

    @model_validator(mode="after")
    def _one_source(self) -> ValidationSpec:
        if sum(value is not None for value in (self.fraction, self.rows, self.uri)) > 1:
            raise ValueError("validation takes one of fraction, rows and uri, not several")
        return self

    @property
    def enabled(self) -> bool:
        """Whether anything is held out."""
        return not (self.fraction is None and self.rows is None and self.uri is None)


COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected"),
}
"""Fields of a row by `data.format`."""


class DataSpec(Strict):
    """Where the rows come from and how a row is read."""

    remote_uri: Text = Field(
        min_length=1,
        description="Folder or .jsonl file, s3://, or stdlib:docstrings (made on the spot).",
    )
    dataset_version: Text = Field("", description="The version this job means; part of the run's identity.")
    storage: ObjectName | None = Field(None, description="Name of an administrator's storage profile.")
    format: Literal["messages", "prompt_completion", "question_answer", "text", "preference"] = Field(
        "messages", description="What a row looks like."
    )
    columns: LabelMap = Field(default_factory=dict, description="Field the format expects -> column in the file.")
    validation: ValidationSpec = Field(default_factory=ValidationSpec, description="Rows held out.")
    packing: bool = Field(False, description="Fill sequences with several samples that do not see each other.")


class SftMethod(Strict):
    """Supervised fine-tuning."""

    type: Literal["sft"] = "sft"
    train_on: Literal["assistant", "last_turn", "all"] = Field(
        "assistant", description="Which tokens are targets of the loss."
    )


class PretrainMethod(Strict):
    """Next-token training on every token."""

    type: Literal["pretrain"] = "pretrain"


class DpoMethod(Strict):
    """Direct Preference Optimization (Rafailov et al. 2023)."""

    type: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0, le=100, description="Strength of the pull towards the reference model.")


class DistillMethod(Strict):
    """Distillation from a teacher (Hinton et al. 2015)."""

    type: Literal["distill"] = "distill"
    teacher: Text = Field(min_length=1, description="Registry key, hub id or folder of the teacher.")
    temperature: float = Field(1.0, gt=0, le=100, description="Softens both distributions.")
    alpha: float = Field(0.5, ge=0, le=1, description="Weight of the teacher's part of the loss.")


Method = Annotated[SftMethod | DpoMethod | DistillMethod | PretrainMethod, Field(discriminator="type")]


class FullTuning(Strict):
    """Every weight is trained."""

    type: Literal["full"] = "full"


class LowRank(Strict):
    """What both kinds of low-rank adapters share (Hu et al. 2021)."""

    rank: Int = Field(ge=1, le=1024, description="Rank of the adapters.")
    alpha: float | None = Field(None, gt=0, le=4096, description="Scale: alpha / rank. Default: 2 x rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter.")
    target_modules: list[Text] = Field(
        default_factory=list, max_length=64, description="Names of linear layers; empty: all but the head."
    )

    @property
    def resolved_alpha(self) -> float:
        """As given, else 2 x rank."""
        return self.alpha if self.alpha is not None else 2.0 * self.rank

    @property
    def scale(self) -> float:
        """alpha / rank, the factor on the adapter's output."""
        return self.resolved_alpha / self.rank


class LoraTuning(LowRank):
    """Low-rank adapters beside frozen weights."""

    type: Literal["lora"] = "lora"


class QloraTuning(LowRank):
    """Low-rank adapters over weights in 4-bit NormalFloat (Dettmers et al. 2023)."""

    type: Literal["qlora"] = "qlora"
    double_quant: bool = Field(True, description="Quantise the quantisation constants too.")


Tuning = Annotated[FullTuning | LoraTuning | QloraTuning, Field(discriminator="type")]


class TrainingSpec(Strict):
    """How long, how much at a time, and how exactly."""

    global_batch_size: Count = Field(8, description="Sequences an optimiser step, over all ranks.")
    microbatch_size_per_gpu: Annotated[Int, Field(ge=1, le=65_536)] | Auto = Field(
        "auto", description="Sequences a rank takes through the model at once."
    )
    grad_accumulation_steps: Annotated[Int, Field(ge=1, le=65_536)] | Auto = Field(
        "auto", description="Microbatches a step; refused where the product does not match."
    )
    max_steps: Int | None = Field(None, ge=1, le=100_000_000, description="Optimiser steps; or give epochs.")
    epochs: float | None = Field(None, gt=0, le=10_000, description="Passes over the data; or give max_steps.")
    save_every_steps: Int = Field(100, ge=1, le=100_000_000, description="A checkpoint every so many steps.")
    eval_every_steps: Int = Field(
        0, ge=0, le=100_000_000, description="Validation every so many steps; 0: before and after."
    )
    seed: Int = Field(0, ge=0, le=2**31 - 1, description="Seeds weights, adapters and data order.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Number format of the forward pass.")
    deterministic: bool = Field(True, description="Refuse kernels that do not give the same bits twice.")
    activation_checkpointing: bool = Field(False, description="Recompute activations instead of keeping them.")

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSpec:
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("training takes max_steps or epochs, not both")
        return self


class OptimizerSpec(Strict):
    """The optimiser and its learning-rate schedule."""

    name: Literal["adamw", "adafactor"] = Field(
        "adamw",
        description="AdamW (Loshchilov & Hutter 2019), or Adafactor (Shazeer & Stern 2018), which keeps rows and "
        "columns of the second moment instead of two whole moments.",
    )
    lr: float = Field(2e-5, gt=0, le=10, description="Peak learning rate.")
    weight_decay: float = Field(0.0, ge=0, le=10, description="Decoupled weight decay; not on norms and biases.")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default_factory=lambda: [0.9, 0.999], min_length=2, max_length=2, description="Decay of both moments."
    )
    eps: float = Field(1e-8, gt=0, le=1, description="Added to the root of the second moment.")
    scheduler: Literal["constant", "linear", "cosine", "cosine_warmup", "wsd"] = Field(
        "cosine_warmup", description="Shape of the learning rate over the steps."
    )
    warmup_steps: Int = Field(0, ge=0, le=100_000_000, description="Steps of linear warm-up.")
    max_grad_norm: float = Field(1.0, ge=0, le=1e6, description="Clip the gradient's norm here; 0: never.")


class DeepspeedSpec(Strict):
    """How DeepSpeed shards (ZeRO, Rajbhandari et al. 2020). Part of what `backend: deepspeed` is."""

    zero_stage: Int = Field(2, ge=1, le=3, description="Sharded: 1 optimiser, 2 and gradients, 3 and weights.")
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="Kept in host memory: nothing, the optimiser, or (stage 3) the weights too."
    )

    @model_validator(mode="after")
    def _weights_are_sharded(self) -> DeepspeedSpec:
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(f"offload all needs zero_stage 3, which shards weights; zero_stage is {self.zero_stage}")
        return self


class AxolotlSpec(Strict):
    """How Axolotl shards. Part of what `backend: axolotl` is."""

    sharding: Literal["none", "fsdp", "deepspeed"] = Field(
        "none", description="none: every rank holds all; deepspeed: as the group deepspeed says."
    )


class ResourcesSpec(Strict):
    """What one pod asks for and may use at most."""

    cpu: Quantity | None = Field(None, description="CPU of a pod, as request and limit.")
    memory: Quantity | None = Field(None, description="Memory of a pod, as request and limit.")
    extended: Annotated[
        dict[Annotated[str, StringConstraints(max_length=244)], Annotated[Int, Field(ge=1, le=4096)]],
        Field(max_length=16),
    ] = Field(default_factory=dict, description="Other devices of a pod by their plugin's name, such as rdma/hca.")

    @model_validator(mode="after")
    def _are_limits(self) -> ResourcesSpec:
        for key, amount in (("cpu", self.cpu), ("memory", self.memory)):
            # A quota counts it as nothing, a LimitRange gives it no default, and the kubelet sets no limit.
            if amount is not None and not re.search("[1-9]", amount):
                raise ValueError(f"{key}: zero would be no limit at all: leave it out")
        return self

    @model_validator(mode="after")
    def _are_extended(self) -> ResourcesSpec:
        for name in self.extended:
            if not re.fullmatch(EXTENDED_RESOURCE, name) or re.match(NOT_EXTENDED, name):
                raise ValueError(f"extended: {name} is not what a device plugin calls a device, such as rdma/hca")
        return self


class Toleration(Strict):
    """A taint that the pods put up with, as in a pod's tolerations."""

    key: Key | None = Field(None, description="Key of the taint; none: all.")
    operator: Literal["Exists", "Equal"] = Field("Equal", description="How the value is compared; Exists: not at all.")
    value: LabelValue | None = Field(None, description="Value of the taint.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(None, description="None: all.")

    @model_validator(mode="after")
    def _compares_what_is_there(self) -> Toleration:
        if self.operator == "Exists" and self.value:
            raise ValueError(f"value {self.value}: with operator Exists none is compared; leave it out")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("operator Equal: without a key it is Exists")
        return self


OWN_ENV_PREFIX, OWN_ENV, USERS_ENV = "NEXA_", "JOB_COMPLETION_INDEX", "NEXA_CACHE"
"""What the operator tells a pod is said by variables with that prefix, and by the indexed Job's; one is the user's."""

DEVICE_ENV = r"^NVIDIA_(VISIBLE_DEVICES$|DRIVER_CAPABILITIES$|IMEX_CHANNELS$|MIG_|MOFED$|NVSWITCH$)"
"""By these NVIDIA's container runtime gives a container devices of its node, whatever was asked for and counted."""

OWN_PATHS = r"^/(bin|boot|dev|etc|lib[^/]*|opt/nexa|proc|run|sbin|sys|tmp|usr|var/run)(/|$)|^/(opt|var)/?$"
"""Where the image, the node or the operator has put something: /tmp is the pod's home, and first on Python's path.
What is above the trainer's folder is as good as that."""

OWN_KEYS = (
    "train.nexa.dev/",
    "batch.kubernetes.io/",
    "container.apparmor.security.beta.kubernetes.io/",
    "jobset.sigs.k8s.io/",
    "kueue.x-k8s.io/",
    "training.kubeflow.org/",
    "controller-uid",
    "job-name",
)
"""Labels and annotations by which controllers know their pods or the kubelet loosens a pod; `/` ends a prefix."""

USERS_KEYS = ("kueue.x-k8s.io/priority-class", "kueue.x-k8s.io/podset-")
"""Of these, what a job may say: its order in Kueue's queue, and its topology; `-` ends a prefix."""


class EnvVar(Strict):
    """A variable of the trainer's environment; never a secret: those come by a storage profile."""

    name: Annotated[str, StringConstraints(max_length=253, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = Field(
        description="Of the variable. Those that begin with NEXA_ are the operator's, but for NEXA_CACHE; none gives "
        "devices."
    )
    value: Annotated[Text, StringConstraints(pattern=r"^[^\x00]*$")] = Field(
        "", description="As it stands: a $ is a dollar, and refers to nothing."
    )

    @model_validator(mode="after")
    def _name_is_free(self) -> EnvVar:
        if self.name == OWN_ENV or (self.name.startswith(OWN_ENV_PREFIX) and self.name != USERS_ENV):
            raise ValueError(f"{self.name} is the operator's to set, as is all of {OWN_ENV_PREFIX}* but {USERS_ENV}")
        if re.match(DEVICE_ENV, self.name):
            raise ValueError(f"{self.name} would give the pod devices past its quota: ask for them by gpus_per_node")
        return self


class Volume(Strict):
    """A volume by claim or by config map, mounted where said."""

    name: Annotated[str, StringConstraints(max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")] = Field(
        description="Of the volume in the pod, another for each."
    )
    mount_path: Annotated[str, StringConstraints(max_length=1024, pattern=r"^(/\.?[A-Za-z0-9_-][A-Za-z0-9._-]*)+$")] = (
        Field(description="A path of its own: no folder of the system, of the trainer or below /tmp.")
    )
    claim: ObjectName | None = Field(None, description="A PersistentVolumeClaim of the job's namespace.")
    config_map: ObjectName | None = Field(None, description="A ConfigMap of the job's namespace.")
    read_only: bool = Field(True, description="False: checkpoints, or a cache, may be written there.")

    @model_validator(mode="after")
    def _one_source(self) -> Volume:
        if (self.claim is None) == (self.config_map is None):
            raise ValueError("a volume comes from a claim or from a config_map: give exactly one")
        return self

    @model_validator(mode="after")
    def _hides_nothing(self) -> Volume:
        if re.match(OWN_PATHS, self.mount_path):
            raise ValueError(f"mount_path {self.mount_path} would hide what the image or the operator put there")
        if self.name.startswith("nexa-"):
            raise ValueError(f"name {self.name}: names that begin with nexa- are the operator's")
        return self


class ClusterSpec(Strict):
    """How many ranks, and what each gets. Not part of the run's identity."""

    num_nodes: Int = Field(1, ge=1, le=4096, description="Nodes; on Kubernetes, pods.")
    gpus_per_node: Int = Field(0, ge=0, le=64, description="Ranks a node; 0: CPU, one rank a node.")
    gpu_resource: ExtendedResource = Field(
        "nvidia.com/gpu", description="What the nodes call these, such as nvidia.com/mig-3g.40gb."
    )
    min_nodes: Int | None = Field(
        None, ge=1, le=4096, description="Fewest nodes to go on with while more cannot be scheduled; none: num_nodes."
    )
    shrink_after_seconds: Int = Field(
        60, ge=1, le=86_400, description="With min_nodes: how long pods wait for nodes before it goes on without."
    )
    threads_per_rank: Int | None = Field(
        None, ge=1, le=1024, description="CPU threads of a rank; another number may round differently."
    )
    resources: ResourcesSpec = Field(default_factory=ResourcesSpec, description="Of each pod.")
    node_selector: Labels = Field(default_factory=dict, description="Labels that a node must have.")
    tolerations: list[Toleration] = Field(
        default_factory=list, max_length=16, description="Taints that the pods put up with."
    )
    env: list[EnvVar] = Field(default_factory=list, max_length=64, description="Variables of the trainer; no secrets.")
    volumes: list[Volume] = Field(default_factory=list, max_length=16, description="Claims and ConfigMaps to mount.")
    labels: Labels = Field(default_factory=dict, description="Put on the pods.")
    annotations: Annotations = Field(default_factory=dict, description="Put on the pods.")

    @model_validator(mode="after")
    def _room_to_shrink(self) -> ClusterSpec:
        if self.min_nodes is not None and self.min_nodes > self.num_nodes:
            raise ValueError(f"min_nodes {self.min_nodes} is more than num_nodes {self.num_nodes}")
        return self

    @model_validator(mode="after")
    def _gpus_are_a_plugin_s(self) -> ClusterSpec:
        if re.match(NOT_EXTENDED, self.gpu_resource):
            raise ValueError(f"gpu_resource: {self.gpu_resource} is not what a device plugin calls a device")
        return self

    @model_validator(mode="after")
    def _gpus_are_asked_for_once(self) -> ClusterSpec:
        if self.gpu_resource in self.resources.extended:
            raise ValueError(f"resources.extended: {self.gpu_resource} comes from gpus_per_node; leave it out")
        return self

    @model_validator(mode="after")
    def _volumes_do_not_meet(self) -> ClusterSpec:
        for key in ("name", "mount_path"):
            times = Counter(getattr(volume, key) for volume in self.volumes)
            if doubled := [value for value, count in times.items() if count > 1]:
                raise ValueError(f"volumes: two have the {key} {doubled[0]}; each needs its own")
        return self

    @model_validator(mode="after")
    def _keys_are_some(self) -> ClusterSpec:
        for group, keys, pattern in (
            ("node_selector", self.node_selector, KEY),
            ("labels", self.labels, KEY),
            ("annotations", self.annotations, ANNOTATION_KEY),
        ):
            if wrong := [key for key in keys if not re.fullmatch(pattern, key)]:
                raise ValueError(f"{group}: {wrong[0]!r} is no key of Kubernetes's, which are NAME or PREFIX/NAME")
        return self

    @model_validator(mode="after")
    def _keys_are_free(self) -> ClusterSpec:
        for group, keys in (("labels", self.labels), ("annotations", self.annotations)):
            if taken := [key for key in keys if _is_own_key(key)]:
                raise ValueError(f"{group}: {taken[0]} is for controllers to set: leave it out")
        return self

    @property
    def ranks_per_node(self) -> int:
        """One rank a GPU; on CPU one rank a node."""
        return max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.num_nodes * self.ranks_per_node


def _is_own_key(key: str) -> bool:
    return _is_one_of(key, OWN_KEYS) and not _is_one_of(key, USERS_KEYS)


def _is_one_of(key: str, known: tuple[str, ...]) -> bool:
    return any(key.startswith(one) if one[-1] in "/-" else key == one for one in known)


class ArtifactsSpec(Strict):
    """Where checkpoints go."""

    uri: Text = Field("artifacts", min_length=1, description="Folder or s3://bucket/prefix.")
    storage: ObjectName | None = Field(None, description="Name of an administrator's storage profile.")
    keep_last: Int | None = Field(None, ge=1, le=10_000, description="Newest checkpoints to keep; none: all.")


class RecoveryRule(Strict):
    """What to do when a rank ends so: all that is stated fits. The first such rule wins over the built-in ones."""

    exit_codes: list[Annotated[Int, Field(ge=1, le=255)]] = Field(
        default_factory=list, max_length=64, description="Any of these is the rank's exit code."
    )
    causes: list[Annotated[Text, Field(min_length=1)]] = Field(
        default_factory=list, max_length=64, description="Any of these is its cause, as in status.lastFailure.cause."
    )
    log_contains: list[Annotated[Text, Field(min_length=1)]] = Field(
        default_factory=list,
        max_length=16,
        description="Any of these stands in its last words or its log's last lines.",
    )
    node_conditions: list[Annotated[Text, Field(min_length=1)]] = Field(
        default_factory=list,
        max_length=16,
        description="Any of these conditions is true of its node, NodeNotReady and NodeGone among them. "
        "An operator of one namespace reads no nodes: there no such rule fits.",
    )
    action: Literal["retry", "exclude_node", "fail"] = Field(
        description="exclude_node: retry, on other nodes than the one where it ended."
    )

    @model_validator(mode="after")
    def _states_something(self) -> RecoveryRule:
        if not (self.exit_codes or self.causes or self.log_contains or self.node_conditions):
            fields = "exit_codes, causes, log_contains or node_conditions"
            raise ValueError(f"a rule states {fields}; this one would fit every end")
        return self


class RecoverySpec(Strict):
    """What happens when a rank is lost."""

    max_restarts: Int = Field(3, ge=0, le=10_000, description="Restarts without a new checkpoint in between.")
    backoff_seconds: Int = Field(
        10,
        ge=0,
        le=3600,
        description="Before the second restart without a new checkpoint in between; doubles with each after it.",
    )
    max_backoff_seconds: Int = Field(300, ge=0, le=86_400, description="No restart waits longer.")
    progress_deadline_seconds: Int = Field(
        600,
        ge=1,
        le=604_800,
        description="How long ranks, or a node before it has any, may get nothing done before they count as stalled.",
    )
    grace_period_seconds: Int = Field(
        120,
        ge=1,
        le=3600,
        description="For a last checkpoint, where ranks are asked to stop: by a drain, a preemption or a suspension.",
    )
    rules: list[RecoveryRule] = Field(
        default_factory=list, max_length=32, description="What to do about certain ends; the first that fits wins."
    )


class ScheduleSpec(Strict):
    """When and under whom the job runs."""

    runtime: Literal["job", "pytorchjob", "jobset"] = Field("job", description="Objects that carry the ranks.")
    queue_name: QueueName | None = Field(None, description="Kueue's local queue; on Slurm the partition.")
    priority: ObjectName | None = Field(None, description="PriorityClass of the pods.")
    scheduler_name: ObjectName | None = Field(
        None, description="Scheduler of the pods. Volcano is told how many of them are to start together."
    )
    suspend: bool = Field(False, description="Hold the job, or stop it with a checkpoint.")
    active_deadline_seconds: Int | None = Field(
        None, ge=1, le=31_536_000, description="For all attempts together; time in the queue or suspended is not in it."
    )
    ttl_seconds_after_finished: Int | None = Field(
        None,
        ge=0,
        le=31_536_000,
        description="How long after its end the job is deleted; with deletion_policy Delete its artifacts go, too.",
    )
    managed_by: Name | None = Field(
        None, description="Name of another controller that carries the job out: this operator then ignores it."
    )
    deletion_policy: Literal["Retain", "Delete"] = Field(
        "Retain", description="Delete: all checkpoints of the run go with the job, whoever or whatever deletes that."
    )


class JobSpec(Strict):
    """One training job. The run's identity is all but artifacts, cluster, image, recovery, schedule and trackers."""

    model: ModelSpec = Field(default_factory=ModelSpec)
    data: DataSpec
    method: Method = Field(default_factory=SftMethod)
    tuning: Tuning = Field(default_factory=FullTuning)
    backend: Literal["hf", "fsdp", "deepspeed", "axolotl"] = Field("fsdp", description="What carries the training.")
    training: TrainingSpec = Field(default_factory=TrainingSpec)
    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec)
    deepspeed: DeepspeedSpec = Field(default_factory=DeepspeedSpec)
    axolotl: AxolotlSpec = Field(default_factory=AxolotlSpec)
    cluster: ClusterSpec = Field(default_factory=ClusterSpec)
    artifacts: ArtifactsSpec = Field(default_factory=ArtifactsSpec)
    recovery: RecoverySpec = Field(default_factory=RecoverySpec)
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec)
    image: Image | None = Field(None, description="Trainer image; none: the cluster's default.")
    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(
        default_factory=list, max_length=3, description="None is built into this version: leave it empty."
    )

    @model_validator(mode="after")
    def _batch_arithmetic(self) -> JobSpec:
        world, batch = self.cluster.world_size, self.training.global_batch_size
        if batch % world:
            raise ValueError(
                f"training.global_batch_size {batch} is not divisible by the {world} ranks "
                f"({self.cluster.num_nodes} nodes x {self.cluster.ranks_per_node}); "
                f"nearest that are: {_neighbours(batch, world)}"
            )
        micro, accumulation = self.training.microbatch_size_per_gpu, self.training.grad_accumulation_steps
        known = 1
        for value in (micro, accumulation):
            known *= value if isinstance(value, int) else 1
        both = isinstance(micro, int) and isinstance(accumulation, int)
        if (both and known * world != batch) or (batch // world) % known:
            raise ValueError(
                f"training.microbatch_size_per_gpu {micro} x grad_accumulation_steps {accumulation} x {world} ranks "
                f"cannot make global_batch_size {batch}; a rank has {batch // world} sequences a step"
            )
        return self

    @model_validator(mode="after")
    def _format_fits_method(self) -> JobSpec:
        wanted = {"dpo": ("preference",), "pretrain": ("text", "messages")}.get(self.method.type)
        if wanted is None:
            wanted = ("messages", "prompt_completion", "question_answer", "text")
        if self.data.format not in wanted:
            raise ValueError(
                f"data.format {self.data.format} does not fit method.type {self.method.type}, "
                f"which takes {', '.join(wanted)}"
            )
        return self


def _neighbours(batch: int, world: int) -> str:
    below = batch // world * world
    return " and ".join(str(near) for near in (below, below + world) if near)
