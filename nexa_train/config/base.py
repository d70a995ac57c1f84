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
"""The name of something that lives elsewhere, such as another controller."""


def _subdomain(letters: str) -> str:
    label = f"[{letters}0-9]([-{letters}0-9]*[{letters}0-9])?"
    return f"{label}([.]{label})*"


_NAME_PART = "[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
KEY = f"^({_subdomain('a-z')}/)?{_NAME_PART}$"
"""The key of a Kubernetes label: NAME or PREFIX/NAME."""
ANNOTATION_KEY = f"^({_subdomain('A-Za-z')}/)?{_NAME_PART}$"
"""Where Kubernetes takes no notice of capitals."""
MOST_OF_KEY = 253
"""Of characters, for then no prefix has more than it may, which no pattern could count."""

Key = Annotated[str, StringConstraints(max_length=MOST_OF_KEY, pattern=KEY)]

Quantity = Annotated[str, StringConstraints(max_length=32, pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]
"""A Kubernetes quantity such as `500m` or `4Gi`."""

ObjectName = Annotated[str, StringConstraints(max_length=240, pattern=f"^{_subdomain('a-z')}$")]
"""The name of an object of the job's namespace, with room for a prefix."""

QueueName = Annotated[str, StringConstraints(max_length=63, pattern=f"^{_subdomain('a-z')}$")]
"""What of such names a label can hold."""

Image = Annotated[str, StringConstraints(max_length=512, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$")]
"""A reference to an image."""

LabelValue = Annotated[str, StringConstraints(max_length=63, pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$")]
"""What a Kubernetes label may be."""

Labels = Annotated[dict[Annotated[str, StringConstraints(max_length=MOST_OF_KEY)], LabelValue], Field(max_length=64)]

Annotations = Annotated[dict[Annotated[str, StringConstraints(max_length=MOST_OF_KEY)], Text], Field(max_length=64)]

LabelMap = Annotated[dict[Annotated[str, StringConstraints(max_length=317)], Text], Field(max_length=64)]

EXTENDED_RESOURCE = f"^{_subdomain('a-z')}/{_NAME_PART}$"
NOT_EXTENDED = r"^requests[.]|^[^/]*kubernetes[.]io/"
"""Of these, what Kubernetes keeps to itself."""

ExtendedResource = Annotated[str, StringConstraints(max_length=244, pattern=EXTENDED_RESOURCE)]
"""What a device plugin calls its devices, such as `rdma/hca`; quotas put `requests.` before it, and it must fit."""


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
