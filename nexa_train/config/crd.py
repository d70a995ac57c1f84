"""The CustomResourceDefinition, generated from the models of `spec.py`.

Comes after the models and before `crds/` and the chart, which carry the same bytes. pydantic's JSON schema is
not a structural schema, so this module inlines references, drops `null` branches, flattens tagged unions to
one object and says in CEL what a structural schema cannot: `python -m nexa_train.config.crd [--check]`.
Writes the rules of `policy.py`, too.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from nexa_train.config import policy
from nexa_train.config.base import ANNOTATION_KEY, EXTENDED_RESOURCE, KEY, NOT_EXTENDED
from nexa_train.config.job import GROUP, KIND, PLURAL, VERSION
from nexa_train.config.spec import OWN_KEYS, OWN_PATHS, USERS_KEYS, JobSpec
from nexa_train.errors import ConfigError

Schema: TypeAlias = dict[str, Any]

FILE_NAME = f"{GROUP}_{PLURAL}.yaml"
REPOSITORY = Path(__file__).resolve().parents[2]
TARGETS = (f"crds/{FILE_NAME}", f"helm/nexa/files/crds/{FILE_NAME}")
POLICY_TARGETS = {
    "helm/nexa/files/policy/supported.yaml": policy.rules,
    "helm/nexa/files/policy/profiles.yaml": policy.profile_rules,
}
HEADER = "# Generated from nexa_train/config by `python -m nexa_train.config.crd`. Do not edit.\n"

_RANKS = policy.ranks_of("self")
_MICRO, _ACCUMULATION = "self.training.microbatchSizePerGpu", "self.training.gradAccumulationSteps"
_PRODUCT = (
    f"{_RANKS} * (type({_MICRO}) == int ? int({_MICRO}) : 1)"
    f" * (type({_ACCUMULATION}) == int ? int({_ACCUMULATION}) : 1)"
)
_FIXED = (
    "is immutable: delete the job and create another; only schedule.suspend may change, and cluster.numNodes while that"
    " is true"
)


def _rule(rule: str, message: str, field: str = "") -> Schema:
    """One CEL rule; `field` is where the server says that the mistake is, below the object with the rule."""
    where = {"fieldPath": f".{field}"} if field else {}
    return {"rule": rule, "message": message, **where}


def _is_one_of(known: Iterable[str]) -> str:
    return " || ".join(f"key.startsWith('{one}')" if one[-1] in "/-" else f"key == '{one}'" for one in known)


def _no_own_key(group: str) -> Schema:
    rule = f"!has(self.{group}) || self.{group}.all(key, {_is_one_of(USERS_KEYS)} || !({_is_one_of(OWN_KEYS)}))"
    return _rule(rule, "a key is for controllers to set: leave it out", group)


def _only_keys(group: str, pattern: str) -> Schema:
    rule = f"!has(self.{group}) || self.{group}.all(key, key.matches('{pattern}'))"
    return _rule(rule, "a key is none of Kubernetes's, which are NAME or PREFIX/NAME", group)


def _each_its_own(key: str) -> Schema:
    once = f"self.volumes.all(one, self.volumes.exists_one(other, other.{key} == one.{key}))"
    return _rule(f"!has(self.volumes) || {once}", f"two volumes have the same {key}", "volumes")


def _no_zero(key: str) -> Schema:
    rule = f"!has(self.{key}) || self.{key}.matches('[1-9]')"
    return _rule(rule, "zero would be no limit at all: leave it out", key)


CROSS_FIELD: dict[str, list[Schema]] = {
    "ModelSpec": [
        _rule(
            "has(self.dModel) == has(self.nLayers) && has(self.dModel) == has(self.nHeads)",
            "dModel, nLayers and nHeads build a model together: give all three or none",
            "dModel",
        ),
        _rule(
            "!has(self.dModel) || !has(self.nHeads) || self.dModel % (2 * self.nHeads) == 0",
            "dModel is not divisible by 2 x nHeads (rotary embeddings need heads of an even size)",
            "dModel",
        ),
    ],
    "ValidationSpec": [
        _rule(
            "(has(self.fraction) ? 1 : 0) + (has(self.rows) ? 1 : 0) + (has(self.uri) ? 1 : 0) <= 1",
            "validation takes one of fraction, rows and uri, not several",
        )
    ],
    "TrainingSpec": [
        _rule(
            "!(has(self.maxSteps) && has(self.epochs))",
            "training takes maxSteps or epochs, not both",
            "epochs",
        )
    ],
    "DeepspeedSpec": [
        _rule(
            "!has(self.offload) || self.offload != 'all' || self.zeroStage == 3",
            "offload all needs zeroStage 3, which shards weights",
            "offload",
        )
    ],
    "ResourcesSpec": [
        _no_zero("cpu"),
        _no_zero("memory"),
        _rule(
            "!has(self.extended) || self.extended.all(name, "
            f"name.matches('{EXTENDED_RESOURCE}') && !name.matches('{NOT_EXTENDED}'))",
            "a name is not what a device plugin calls a device, such as rdma/hca",
            "extended",
        ),
    ],
    "ClusterSpec": [
        _rule(
            # The server asks it of the group's default too, which is empty.
            "!has(self.resources) || !has(self.resources.extended) || !(self.gpuResource in self.resources.extended)",
            "gpuResource comes from gpusPerNode: leave it out",
            "resources.extended",
        ),
        _rule(
            "!has(self.minNodes) || self.minNodes <= self.numNodes",
            "minNodes is more than numNodes",
            "minNodes",
        ),
        _each_its_own("name"),
        _each_its_own("mountPath"),
        _rule(
            f"!has(self.gpuResource) || !self.gpuResource.matches('{NOT_EXTENDED}')",
            "is not what a device plugin calls a device",
            "gpuResource",
        ),
        _only_keys("nodeSelector", KEY),
        _only_keys("labels", KEY),
        _only_keys("annotations", ANNOTATION_KEY),
        _no_own_key("labels"),
        _no_own_key("annotations"),
    ],
    "Toleration": [
        _rule(
            "self.operator != 'Exists' || !has(self.value) || self.value == ''",
            "with operator Exists none is compared; leave it out",
            "value",
        ),
        _rule("self.operator == 'Exists' || has(self.key)", "without a key it is Exists", "operator"),
    ],
    "EnvVar": [_rule(demand, said, "name") for demand, said in policy.of_variables("self.name")],
    "RecoveryRule": [
        _rule(
            "has(self.exitCodes) && size(self.exitCodes) > 0 || has(self.causes) && size(self.causes) > 0"
            " || has(self.logContains) && size(self.logContains) > 0"
            " || has(self.nodeConditions) && size(self.nodeConditions) > 0",
            "a rule states exitCodes, causes, logContains or nodeConditions; this one would fit every end",
        )
    ],
    "Volume": [
        _rule(
            "has(self.claim) != has(self.configMap)",
            "a volume comes from a claim or from a configMap: give exactly one",
        ),
        _rule(
            f"!self.mountPath.matches('{OWN_PATHS}')",
            "would hide what the image or the operator put there",
            "mountPath",
        ),
        _rule("!self.name.startsWith('nexa-')", "names that begin with nexa- are the operator's", "name"),
    ],
    "JobSpec": [
        _rule(
            f"self.training.globalBatchSize % {_RANKS} == 0",
            "globalBatchSize is not divisible by the ranks (numNodes x gpusPerNode, on CPU numNodes)",
            "training.globalBatchSize",
        ),
        _rule(
            f"self.training.globalBatchSize % ({_PRODUCT}) == 0",
            "microbatchSizePerGpu x gradAccumulationSteps x ranks cannot make globalBatchSize",
            "training.microbatchSizePerGpu",
        ),
        _rule(
            f"type({_MICRO}) != int || type({_ACCUMULATION}) != int || self.training.globalBatchSize == {_PRODUCT}",
            "microbatchSizePerGpu x gradAccumulationSteps x ranks is not globalBatchSize",
            "training.gradAccumulationSteps",
        ),
        _rule(
            "self.method.type == 'dpo' ? self.data.format == 'preference'"
            " : self.method.type == 'pretrain' ? self.data.format in ['text', 'messages']"
            " : self.data.format != 'preference'",
            "format does not fit method.type: dpo takes preference, pretrain text or messages, "
            "the others all but preference",
            "data.format",
        ),
    ],
}
"""What the models' validators check, said in CEL, by the name of the model. A test compares the two."""


def build() -> Schema:
    """The whole CustomResourceDefinition."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["ntj"],
                # Not `all`: `kubectl delete all --all` is not meant for what may take a model along.
                "categories": ["nexa"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": _root_schema()},
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": _printer_columns(),
                }
            ],
        },
    }


def render() -> str:
    """The file's bytes: stable order, so that a difference is a difference of the schema."""
    return HEADER + yaml.dump(build(), Dumper=_Plain, sort_keys=False, width=110)


def render_policies() -> dict[str, str]:
    """The parts of the chart's policies that derive from the models, by their files."""
    return {
        target: HEADER + yaml.dump(rules(), Dumper=_Plain, sort_keys=False, width=110)
        for target, rules in POLICY_TARGETS.items()
    }


def _root_schema() -> Schema:
    return {
        "type": "object",
        "description": "One description of a training job that gives the same result wherever it runs.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec_schema(),
            "status": status_schema(),
        },
        "x-kubernetes-validations": [
            _rule(
                "size(self.metadata.name) <= 45 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
                "metadata.name must be a DNS label of at most 45 characters that begins with a letter: names of pods"
                " and Services are made from it",
            )
        ],
    }


def spec_schema() -> Schema:
    """The structural schema of `spec`, with defaults, bounds and rules."""
    source = JobSpec.model_json_schema(by_alias=True, schema_generator=_WithFactories)
    spec = _Converter(source["$defs"]).convert(source)
    _fix_after_creation(spec)
    return spec


class _WithFactories(GenerateJsonSchema):
    """pydantic leaves out defaults that a factory makes; the server needs them all."""

    def get_default_value(self, schema: Any) -> Any:
        factory = schema.get("default_factory")
        return factory() if factory else super().get_default_value(schema)

    def encode_default(self, dft: Any) -> Any:
        if isinstance(dft, BaseModel):
            # The keys inside carry their own defaults, which the server fills in next.
            return {"type": dft.type} if hasattr(dft, "type") else {}
        return super().encode_default(dft)


class _Plain(yaml.SafeDumper):
    """YAML that every reader reads alike: no anchors, no exponents (YAML 1.1 takes 1e-05 for a string)."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_float(self, data: float) -> yaml.ScalarNode:
        text = repr(data) if "e" not in repr(data) else f"{data:.16f}".rstrip("0")
        return self.represent_scalar("tag:yaml.org,2002:float", text)


_Plain.add_representer(float, _Plain.represent_float)


class _Converter:
    """JSON schema as pydantic emits it -> structural schema as the API server takes it."""

    _KEPT = (
        "type", "description", "enum", "pattern", "minLength", "maxLength", "minimum", "maximum", "minItems",
        "maxItems", "maxProperties", "required",
    )  # fmt: skip

    def __init__(self, definitions: dict[str, Schema]) -> None:
        self._definitions = definitions
        keys = {key for model in definitions.values() for key in model.get("properties", ())}
        self._spellings = {_snake(key): key for key in keys if _snake(key) != key}

    def convert(self, node: Schema) -> Schema:
        """One node and all below it."""
        node = self._resolved(node)
        if "description" in node:
            node = {**node, "description": self._spelt(node["description"])}
        if "discriminator" in node:
            return self._with_default(node, self._flattened(node))
        if "anyOf" in node:
            return self._with_default(node, self._either(node))
        out = {key: node[key] for key in self._KEPT if key in node}
        out |= self._bounds(node) | self._children(node)
        if "const" in node:
            out["enum"] = [node["const"]]
        rules = _key_length_rules(node) + copy.deepcopy(CROSS_FIELD.get(node.get("title", ""), []))
        if rules:
            out["x-kubernetes-validations"] = rules
        return self._with_default(node, out)

    def _resolved(self, node: Schema) -> Schema:
        if "$ref" not in node:
            return node
        target = self._definitions[node["$ref"].rsplit("/", 1)[1]]
        return {**target, **{key: value for key, value in node.items() if key != "$ref"}}

    def _spelt(self, text: str) -> str:
        """Keys as they are written here, in camelCase."""
        return re.sub(r"\w+", lambda word: self._spellings.get(word[0], word[0]), text)

    @staticmethod
    def _with_default(node: Schema, out: Schema) -> Schema:
        default = node.get("default")
        # An empty list or free map means the same as none at all.
        if default is None or (default in ([], {}) and "properties" not in out):
            return out
        return out | {"default": default}

    @staticmethod
    def _bounds(node: Schema) -> Schema:
        """JSON schema's numeric exclusive bounds, as OpenAPI 3.0 spells them."""
        out: Schema = {}
        for exclusive, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
            if exclusive in node:
                out |= {inclusive: node[exclusive], exclusive: True}
        return out | ({"format": "int64"} if node.get("type") == "integer" else {})

    def _children(self, node: Schema) -> Schema:
        out: Schema = {}
        if "properties" in node:
            out["properties"] = {key: self.convert(child) for key, child in node["properties"].items()}
        elif isinstance(node.get("additionalProperties"), dict):
            out["additionalProperties"] = self.convert(node["additionalProperties"])
        if "items" in node:
            out["items"] = self.convert(node["items"])
        return out

    def _either(self, node: Schema) -> Schema:
        branches = [branch for branch in node["anyOf"] if branch.get("type") != "null"]
        described = {"description": node["description"]} if "description" in node else {}
        if len(branches) == 1:
            return self.convert(branches[0]) | described
        number, word = sorted(branches, key=lambda branch: str(branch["type"]))
        if number["type"] != "integer" or "const" not in word:
            raise ConfigError(f"the CRD can only choose between a whole number and one word, not {branches}")
        least, most, other = number["minimum"], number["maximum"], word["const"]
        rule = _rule(
            f"type(self) == int ? self >= {least} && self <= {most} : self == '{other}'",
            f"must be a whole number from {least} to {most}, or {other}",
        )
        return {"x-kubernetes-int-or-string": True, **described, "x-kubernetes-validations": [rule]}

    def _flattened(self, node: Schema) -> Schema:
        """One object with the keys of all branches; no default inside, for it would land in every branch."""
        branches = {
            tag: self._resolved({"$ref": reference}) for tag, reference in node["discriminator"]["mapping"].items()
        }
        documents = "; ".join(f"{tag}: {branch['description'].rstrip('.')}" for tag, branch in branches.items())
        return {
            "type": "object",
            "description": f"Tagged by type. {documents}.",
            "required": ["type"],
            "properties": {
                "type": {"type": "string", "description": "Which of these.", "enum": list(branches)},
                **self._all_keys(branches),
            },
            "x-kubernetes-validations": list(_branch_rules(branches)),
        }

    def _all_keys(self, branches: dict[str, Schema]) -> dict[str, Schema]:
        keys: dict[str, Schema] = {}
        owners: dict[str, list[str]] = {}
        for tag, branch in branches.items():
            for key, child in _own_keys(branch).items():
                converted = self.convert({name: value for name, value in child.items() if name != "default"})
                if keys.setdefault(key, converted) != converted:
                    raise ConfigError(f"branches {owners[key]} and {tag} disagree about {key}: rename one of them")
                owners.setdefault(key, []).append(tag)
        for key, schema in keys.items():
            schema["description"] = f"Only with {', '.join(owners[key])}. {schema.get('description', '')}".strip()
        return keys


def _snake(key: str) -> str:
    return re.sub(r"(?<!^)[A-Z]", lambda letter: f"_{letter[0].lower()}", key)


def _own_keys(branch: Schema) -> dict[str, Schema]:
    return {key: child for key, child in branch["properties"].items() if key != "type"}


def _branch_rules(branches: dict[str, Schema]) -> Iterator[Schema]:
    every = list(dict.fromkeys(key for branch in branches.values() for key in _own_keys(branch)))
    for tag, branch in branches.items():
        own, required = list(_own_keys(branch)), [key for key in branch.get("required", []) if key != "type"]
        wanted = [f"has(self.{key})" for key in required] + [f"!has(self.{key})" for key in every if key not in own]
        takes = f"takes only {', '.join(own)}" if own else "takes no other key"
        needs = f", and needs {', '.join(required)}" if required else ""
        yield _rule(f"self.type != '{tag}' || ({' && '.join(wanted)})", f"type {tag} {takes}{needs}")


def _key_length_rules(node: Schema) -> list[Schema]:
    longest = node.get("propertyNames", {}).get("maxLength")
    return [_rule(f"self.all(key, size(key) <= {longest})", f"a key is longer than {longest}")] if longest else []


def _fix_after_creation(spec: Schema) -> None:
    """Add the transition rules: only suspending, and resizing while suspended, changes a run."""
    groups = spec["properties"]
    for name in (
        "model",
        "data",
        "method",
        "tuning",
        "backend",
        "training",
        "optimizer",
        "deepspeed",
        "axolotl",
        "artifacts",
        "recovery",
    ):
        _add_rules(groups[name], _rule("self == oldSelf", _FIXED))
    for name, free in (("cluster", "numNodes"), ("schedule", "suspend")):
        _add_rules(groups[name], _unchanged(name, groups[name], but=free))
    resize = "self.cluster.numNodes == oldSelf.cluster.numNodes"
    resize += " || (oldSelf.schedule.suspend && self.schedule.suspend)"
    _add_rules(
        spec,
        _rule(_same("image"), _FIXED, "image"),
        _rule(_same("trackers"), _FIXED, "trackers"),
        _rule(resize, "numNodes may change only while schedule.suspend is true, before and after", "cluster.numNodes"),
    )


def _unchanged(name: str, group: Schema, *, but: str) -> Schema:
    """One rule for all keys, the shortest answer first: every write of a status asks it, and changes none of them. The
    first key that differs is looked for only where there is one."""
    same = {key: f"({_same(key)})" for key in group["properties"] if key != but}
    first = "".join(f"!{holds} ? '{key}' : " for key, holds in same.items()) + "''"
    rule = _rule(f"self == oldSelf || ({' && '.join(same.values())})", f"all but {but} {_FIXED}")
    return {**rule, "messageExpression": f"'spec.{name}.' + ({first}) + ' {_FIXED}'"}


def _same(key: str) -> str:
    # `self.?key == oldSelf.?key` says it too, but the server estimates its cost as unbounded.
    return f"has(self.{key}) ? has(oldSelf.{key}) && self.{key} == oldSelf.{key} : !has(oldSelf.{key})"


def _add_rules(node: Schema, *rules: Schema) -> None:
    node["x-kubernetes-validations"] = [*node.get("x-kubernetes-validations", []), *rules]


GOODPUT = {
    "queue": "Waiting for a queue's leave, or for nodes.",
    "startup": "From having nodes to the first step of the first attempt.",
    "productive": "Training what is kept.",
    "restart": "From a loss, or a stop, to the next attempt's first step.",
    "lost": "Training what was never committed, and was trained again.",
    "stall": "Standing still until that was noticed.",
    "suspended": "By schedule.suspend.",
}
"""The states of the operator's goodput.py, for whoever reads a status."""


_TEXT, _WHOLE, _NUMBER = {"type": "string"}, {"type": "integer", "format": "int64"}, {"type": "number"}
_TIME = {"type": "string", "format": "date-time"}


def _said(schema: Schema, description: str) -> Schema:
    return {**schema, "description": description}


def status_schema() -> Schema:
    """What the operator writes; everything optional, for a job starts with nothing."""
    return {
        "type": "object",
        "description": "Written by the operator alone.",
        # One writer writes all of it: who owns which field need not be kept, which was a third of the object.
        "x-kubernetes-map-type": "atomic",
        "properties": {
            "observedGeneration": _said(_WHOLE, "Of the spec that was looked at last."),
            "phase": _said(_TEXT, "A summary of the conditions, to look at; decide by the conditions."),
            "runId": _said(_TEXT, "Folder of the run's checkpoints below checkpoints/ in artifacts.uri."),
            **_attempt_schema(),
            **_progress_schema(),
            "goodput": _goodput_schema(),
            "startTime": _said(_TIME, "When the first attempt was begun."),
            "completionTime": _said(_TIME, "When the job succeeded or failed."),
            "checkpoint": _checkpoint_schema(),
            "lastFailure": _failure_schema(),
            "conditions": _conditions_schema(),
        },
    }


def _attempt_schema() -> dict[str, Schema]:
    return {
        "attempt": _said(_WHOLE, "The gang that runs or ran last, from 0."),
        "restarts": _said(_WHOLE, "Attempts that were lost and followed by another."),
        "chargedRestarts": _said(
            _WHOLE, "Of these, those that count, as of the last loss; a checkpoint since refills the budget."
        ),
        "numNodes": _said(_WHOLE, "Pods of that gang; fewer than spec.cluster.numNodes where there is no room."),
        "lossesWithoutCheckpoint": _said(
            _WHOLE, "Attempts lost in a row, as of the last loss; from the second on the next one waits."
        ),
        "adaptedRestarts": _said(
            _WHOLE, "Besides those: lost for want of memory, and followed at once by one that takes fewer sequences."
        ),
        "nextAttemptTime": _said(_TIME, "The next attempt begins then."),
        "image": _said(_TEXT, "The trainer's, of that gang; once there is a checkpoint, of all that follow."),
        "storage": _said(_TEXT, "Its storage profile; once there is a checkpoint, of all that follow."),
        "excludedNodes": _said({"type": "array", "items": _TEXT, "maxItems": 32}, "Where no further attempt runs."),
    }


def _progress_schema() -> dict[str, Schema]:
    return {
        "step": _said(_WHOLE, "The last step known."),
        "totalSteps": _said(_WHOLE, "Steps of the whole run."),
        "progress": _said(_TEXT, "step/totalSteps"),
        "loss": _said(_NUMBER, "Of the last step known, to six digits."),
        "validationLoss": _said(_NUMBER, "The last one known, to six digits."),
        "tokensPerSecond": _said(_NUMBER, "Of all ranks, over the last steps."),
        "etaSeconds": _said(_NUMBER, "Until the last step, at the speed of the last ones."),
        "eta": _said(_TEXT, "The same, to look at, such as 2h05m."),
    }


def _goodput_schema() -> Schema:
    seconds = {f"{state}Seconds": _said(_NUMBER, said) for state, said in GOODPUT.items()}
    return {
        "type": "object",
        "description": "Seconds by state until the last write; ratio: productive of all but suspended.",
        "properties": {
            "state": _said(_TEXT, "What time is spent on now."),
            "since": _said(_TIME, "Since when; counted below until the last write."),
            "ratio": _said(_NUMBER, "productiveSeconds by all seconds but suspendedSeconds."),
            **seconds,
        },
    }


def _checkpoint_schema() -> Schema:
    checkpoint = {
        "step": _said(_WHOLE, "Steps trained by then."),
        "uri": _said(_TEXT, "Of its manifest."),
        "digest": _said(_TEXT, "SHA-256 of the manifest."),
        "weightsDigest": _said(_TEXT, "SHA-256 over the weights: equal for equal bits."),
    }
    return _said({"type": "object", "properties": checkpoint}, "The last one committed and not damaged.")


def _failure_schema() -> Schema:
    failure = {
        "attempt": _said(_WHOLE, "The attempt that was lost."),
        "cause": _said(_TEXT, "In one word, as recovery.rules may name it."),
        "exitCode": _said(_WHOLE, "Of the rank that explains it."),
        "message": _said(_TEXT, "Its last words."),
        "charged": _said({"type": "boolean"}, "Whether it used up a restart; a disruption does not."),
        "checkpointStep": _said(_WHOLE, "The last committed step then; a newer one refills the budget."),
        "time": _said(_TIME, "When it was judged."),
    }
    return _said({"type": "object", "properties": failure}, "Why the last attempt was lost.")


def _conditions_schema() -> Schema:
    """As `metav1.Condition`."""
    condition = {
        "type": _said({"type": "string", "maxLength": 316}, "What is or is not so, in one word."),
        "status": _said({"type": "string", "enum": ["True", "False", "Unknown"]}, "Whether it is."),
        "observedGeneration": _said({**_WHOLE, "minimum": 0}, "Of the spec that this was judged by."),
        "lastTransitionTime": _said(_TIME, "When its status last changed."),
        "reason": _said(
            {"type": "string", "maxLength": 1024, "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
            "Why, in one word.",
        ),
        "message": _said({"type": "string", "maxLength": 32768}, "Why, for people."),
    }
    return {
        "type": "array",
        "description": "Decide by these; which there are is in docs/operator.md.",
        "maxItems": 32,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "required": ["type", "status", "lastTransitionTime", "reason", "message"],
            "properties": condition,
        },
    }


def _printer_columns() -> list[Schema]:
    columns = (
        ("Phase", "string", ".status.phase"),
        ("Nodes", "integer", ".status.numNodes"),
        ("Progress", "string", ".status.progress"),
        ("Loss", "number", ".status.loss"),
        ("ETA", "string", ".status.eta"),
        ("Restarts", "integer", ".status.restarts"),
        ("Age", "date", ".metadata.creationTimestamp"),
    )
    return [{"name": name, "type": kind, "jsonPath": path} for name, kind, path in columns]


def main(argv: list[str] | None = None, *, root: Path = REPOSITORY) -> None:
    """Write the files, or with --check end with an error if they differ from the models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail on a difference")
    check = parser.parse_args(argv).check
    texts = {**dict.fromkeys(TARGETS, render()), **render_policies()}
    stale = {target: text for target, text in texts.items() if not _holds(root / target, text)}
    if check and stale:
        names = ", ".join(stale)
        raise SystemExit(f"{names} differ from the models: run `python -m nexa_train.config.crd` and commit")
    for target, text in stale.items():
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        (root / target).write_text(text)


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


if __name__ == "__main__":
    main()
