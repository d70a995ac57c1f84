"""How the operator spells what it sends."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nexa_operator.cluster import KubernetesCluster, as_yaml
from nexa_operator.errors import ApiError, ConflictError, InvalidError
from nexa_operator.kinds import JOBS


@given(st.text(st.characters(codec="utf-8")))
def test_what_is_applied_reads_alike_as_json_and_as_yaml(text: str) -> None:
    body = {"status": {"message": text}}
    assert json.loads(as_yaml(body)) == body
    assert yaml.safe_load(as_yaml(body)) == body


class Api:
    """Answers every request alike."""

    def __init__(self, answer: bytes, status: int = 200) -> None:
        self.answer, self.status, self.reason = answer, status, ""

    async def param_serialize(self, *_: object, **__: object) -> tuple[()]:
        return ()

    async def call_api(self, *_: object, **__: object) -> Api:
        return self

    async def read(self) -> bytes:
        return self.answer


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [b"<html>back soon</html>", b"[]", b'{"kind": "Status"}'])
async def test_what_is_not_the_api_server_s_list_is_an_error_of_the_api_and_no_crash(answer: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        await anext(KubernetesCluster(Api(answer)).walk(JOBS, "team"), None)
    assert caught.value.status == 0


FIELD = [{"reason": "FieldValueRequired", "message": "Required value", "field": "spec.template"}]
POLICY = [{"message": "ValidatingAdmissionPolicy 'freeze' denied request: not this week"}]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("status", "causes", "message", "kind"),
    [
        (422, FIELD, 'Job "demo-a0" is invalid', InvalidError),
        (422, FIELD, 'admission webhook "freeze.example" denied the request: not this week', ApiError),
        (422, POLICY, "denied", ApiError),
        (422, None, "denied", ApiError),
        (409, FIELD, "changed", ConflictError),
        (409, None, 'admission webhook "freeze.example" denied the request: not this week', ApiError),
        (403, FIELD, "forbidden", ApiError),
    ],
)
async def test_only_what_breaks_the_rules_of_its_kind_is_invalid_for_good(
    status: int, causes: object, message: str, kind: type[ApiError]
) -> None:
    answer = {"kind": "Status", "message": message, "details": {"causes": causes} if causes else "as a proxy may"}
    with pytest.raises(ApiError) as caught:
        await KubernetesCluster(Api(json.dumps(answer).encode(), status)).read(JOBS, "team", "demo")
    assert type(caught.value) is kind
