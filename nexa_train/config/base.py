"""The base of every schema model: strict, frozen, one schema in two spellings.

Comes before every other module of `config`; knows nothing of jobs.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic import Strict as ByType
from pydantic.alias_generators import to_camel

Int = Annotated[int, ByType()]
"""An integer that is written as one: the API server takes neither `"20"` nor `true` for it."""

Text = Annotated[str, StringConstraints(max_length=1024)]
"""A free string, bounded so that CEL rules over it have a bounded cost."""

Name = Annotated[str, StringConstraints(max_length=253, pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?$")]
"""The name of something that lives elsewhere: a node label, a queue, a claim."""

Quantity = Annotated[str, StringConstraints(max_length=32, pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]
"""A Kubernetes quantity such as `500m` or `4Gi`."""

ObjectName = Annotated[str, StringConstraints(max_length=240, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
"""The name of an object of the job's namespace, with room for a prefix."""

Image = Annotated[str, StringConstraints(max_length=512, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$")]
"""A reference to an image."""

LabelValue = Annotated[str, StringConstraints(max_length=63, pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$")]
"""What a Kubernetes label may be."""

Labels = Annotated[dict[Annotated[str, StringConstraints(max_length=317)], LabelValue], Field(max_length=64)]

LabelMap = Annotated[dict[Annotated[str, StringConstraints(max_length=317)], Text], Field(max_length=64)]


EXTENDED_RESOURCE = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"

ExtendedResource = Annotated[str, StringConstraints(max_length=253, pattern=EXTENDED_RESOURCE)]
"""What a device plugin calls its devices, such as `rdma/hca`."""


class Strict(BaseModel):
    """snake_case for recipes and the command line, camelCase for Kubernetes; any other key is an error."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
