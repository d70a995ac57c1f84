"""What this version, or a cluster, cannot do with a whole job, in CEL: the chart's policy says so when a job is made or
resized. And which variables nobody sets but the operator, for the CRD and for the policy on storage profiles.

Made from the tables of `support.py`, and from what the operator's `spec.py` asks of jobs; these decide, and the policy
is how they are heard before a job is there that cannot change any more. What it does not say, and all of it where
policies are left out, ends as `ConfigRejected`. The CRD's own rules (`crd.py`) hold for every version and place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from nexa_train.config.spec import DEVICE_ENV, OWN_ENV, OWN_ENV_PREFIX, USERS_ENV
from nexa_train.config.support import METHODS, OPTIMIZERS, TUNINGS


def ranks_of(spec: str) -> str:
    """How many ranks a job has, in CEL, where `spec` is what its spec is called there."""
    gpus = f"{spec}.cluster.gpusPerNode"
    return f"({spec}.cluster.numNodes * ({gpus} > 0 ? {gpus} : 1))"


def of_variables(name: str) -> tuple[tuple[str, str], ...]:
    """What is asked of a variable that a job or a storage profile sets, in CEL, where `name` is what its name is called
    there; each with what is said of one that is refused."""
    return (
        (
            f"{name} != '{OWN_ENV}' && ({name} == '{USERS_ENV}' || !{name}.startsWith('{OWN_ENV_PREFIX}'))",
            f"is the operator's to set, as are {OWN_ENV} and all of {OWN_ENV_PREFIX}* but {USERS_ENV}",
        ),
        (
            f"!{name}.matches('{DEVICE_ENV}')",
            "would give the pod devices past its quota: ask for them by gpusPerNode",
        ),
    )


_RANKS = ranks_of("object.spec")


def rules() -> list[dict[str, str]]:
    """Validations of a ValidatingAdmissionPolicy, each with its message; its variable `ours` says whether no other
    controller is named, whose jobs need not please us."""
    return [
        {"expression": f"!variables.ours || ({demand})", key: said}
        for demand, key, said in (*_by_backend(), *_of_this_version(), *_on_clusters())
    ]


def profile_rules() -> list[dict[str, str]]:
    """What is asked of storage profiles, whose keys become variables, too; `variables.names` are these."""
    return [
        {
            "expression": f"variables.names.all(name, {demand})",
            "messageExpression": f'variables.names.filter(name, !({demand}))[0] + " {said}"',
        }
        for demand, said in of_variables("name")
    ]


def _by_backend() -> Iterator[tuple[str, str, str]]:
    tables = (("method.type", METHODS), ("tuning.type", TUNINGS), ("optimizer.name", OPTIMIZERS))
    for key, table in tables:
        said = f"'spec.{key}: ' + object.spec.{key} + ' is not available on backend ' + object.spec.backend"
        yield f"object.spec.{key} in {_map_of(table)}[object.spec.backend]", "messageExpression", said


def _map_of(table: Mapping[str, Sequence[str]]) -> str:
    lists = (f"'{name}': [{', '.join(repr(value) for value in values)}]" for name, values in table.items())
    return f"{{{', '.join(lists)}}}"


def _of_this_version() -> Iterator[tuple[str, str, str]]:
    for demand, said in (
        (
            "!has(object.spec.trackers) || size(object.spec.trackers) == 0",
            "spec.trackers: none is built into this version; leave it empty",
        ),
        (
            "!has(object.spec.cluster.minNodes) || object.spec.cluster.minNodes == object.spec.cluster.numNodes"
            " || type(object.spec.training.gradAccumulationSteps) != int",
            "spec.cluster.minNodes: with gradAccumulationSteps given, fewer nodes would have to take more sequences at"
            " once than memory may hold; set it to auto",
        ),
        (
            "![object.spec.data.remoteUri, object.spec.artifacts.uri, has(object.spec.data.validation.uri)"
            " ? object.spec.data.validation.uri : ''].exists(uri, uri.startsWith('gs://'))",
            "gs:// is not built into this version; use s3:// or a folder of a claim",
        ),
        (
            "!object.spec.artifacts.uri.lowerAscii().startsWith('memory://')",
            "spec.artifacts.uri: memory:// lasts as long as one process; use s3:// or a folder of a claim",
        ),
        (
            "object.spec.model.attn != 'flash'"
            " || (object.spec.cluster.gpusPerNode > 0 && object.spec.training.precision != 'fp32')",
            "spec.model.attn: flash runs on GPUs alone, and not in fp32",
        ),
        (
            "!has(object.spec.model.dModel) || object.spec.model.name == 'tiny'",
            "spec.model: dModel, nLayers and nHeads build a new model, so its name would not be read; give either",
        ),
        (
            "object.spec.method.type != 'dpo' || !object.spec.data.packing",
            "spec.data.packing: method dpo takes pairs, which are not packed; leave it out",
        ),
        (
            f"object.spec.method.type != 'dpo' || object.spec.backend != 'axolotl' || {_RANKS} == 1",
            "spec.backend: axolotl takes method dpo on one rank alone; use backend fsdp or hf for more",
        ),
        (
            f"object.spec.optimizer.name != 'adafactor' || object.spec.backend != 'fsdp' || {_RANKS} == 1",
            "spec.optimizer.name: torch's adafactor takes no sharded weights; use backend hf, or adamw",
        ),
    ):
        yield demand, "message", said


def _on_clusters() -> Iterator[tuple[str, str, str]]:
    given = "object.spec.artifacts.uri"
    uri = f"({given}.startsWith('file://') ? {given}.substring(7) : {given})"
    for demand, said in (
        (
            f"{uri}.contains('://') || (!{uri}.matches('/[.][.](/|$)')"
            f" && !({given}.startsWith('file://') && {given}.contains('%')) && has(object.spec.cluster.volumes)"
            f" && object.spec.cluster.volumes.exists(one, has(one.claim) && !one.readOnly"
            f" && ({uri} == one.mountPath || {uri}.startsWith(one.mountPath + '/'))))",
            "spec.artifacts.uri: a folder inside the pod would be gone with it; use s3://, or a folder of a claim in "
            "spec.cluster.volumes with readOnly false",
        ),
        (
            "!has(object.spec.data.storage) || !has(object.spec.artifacts.storage)"
            " || object.spec.data.storage == object.spec.artifacts.storage",
            "spec.data.storage and spec.artifacts.storage differ: name one profile that reaches both",
        ),
        (
            "!has(object.spec.cluster.minNodes) || !has(object.spec.schedule.queueName)",
            "spec.cluster.minNodes with spec.schedule.queueName: Kueue admits a gang as a whole; leave one of them out",
        ),
    ):
        yield demand, "message", said
