"""How the operator spells what it sends."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nexa_operator.cluster import KubernetesCluster, as_yaml
from nexa_operator.errors import ApiError
from nexa_operator.kinds import JOBS


@given(st.text(st.characters(codec="utf-8")))
def test_what_is_applied_reads_alike_as_json_and_as_yaml(text: str) -> None:
    body = {"status": {"message": text}}
    assert json.loads(as_yaml(body)) == body
    assert yaml.safe_load(as_yaml(body)) == body


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [b"<html>back soon</html>", b"[]", b'{"kind": "Status"}'])
async def test_what_is_not_the_api_server_s_list_is_an_error_of_the_api_and_no_crash(answer: bytes) -> None:
    class Api:
        async def param_serialize(self, *_: object, **__: object) -> tuple[()]:
            return ()

        async def call_api(self, *_: object, **__: object) -> Api:
            return self

        async def read(self) -> bytes:
            return answer

        status, reason = 200, "OK"

    with pytest.raises(ApiError) as caught:
        await anext(KubernetesCluster(Api()).walk(JOBS, "team"), None)
    assert caught.value.status == 0
