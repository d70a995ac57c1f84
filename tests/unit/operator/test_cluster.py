"""How the operator spells what it sends."""

from __future__ import annotations

import json

import yaml
from hypothesis import given
from hypothesis import strategies as st

from nexa_operator.cluster import as_yaml


@given(st.text(st.characters(codec="utf-8")))
def test_what_is_applied_reads_alike_as_json_and_as_yaml(text: str) -> None:
    body = {"status": {"message": text}}
    assert json.loads(as_yaml(body)) == body
    assert yaml.safe_load(as_yaml(body)) == body
