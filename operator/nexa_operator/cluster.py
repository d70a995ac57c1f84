"""The only module that talks to the API server: create, read, list, patch, delete; plain dicts in and out.

`kubernetes.aio` gives configuration, authentication and connections. Its models stay out: parsing 500 pods into
them takes fifty times as long as parsing JSON.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from kubernetes.aio import client, config

from nexa_operator.errors import ApiError, ConflictError, InvalidError, NameTakenError
from nexa_operator.kinds import Kind
from nexa_operator.naming import FIELD_MANAGER
from nexa_operator.reading import owner_uid

Object = dict[str, Any]

# With its character set the client sends a string as it is; without, it would write JSON.
_APPLY = "application/apply-patch+yaml; charset=utf-8"
_MERGE = "application/merge-patch+json"
_NOT_PRINTABLE = re.compile(r"[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
# Of fields that the server does not know: nobody reads them, and it parses an apply twice for them.
_NO_WARNINGS = ("fieldValidation", "Ignore")
_TIMEOUT_SECONDS = 30
_PAGE_SIZE = 200
_METHODS = {"get": "GET", "list": "GET", "create": "POST", "patch": "PATCH", "delete": "DELETE"}


class Cluster(Protocol):
    """What the operator needs of a cluster. Every call raises ApiError when the answer is no."""

    async def read(self, kind: Kind, namespace: str, name: str, *, not_older: str = "") -> Object | None:
        """The object, or None if there is none.

        Args:
            not_older: a resourceVersion, of which or a later one an answer will do: the server has it in its memory.
        """
        ...

    async def list(self, kind: Kind, namespace: str, labels: str = "", *, fields: str = "") -> list[Object]:
        """All objects with these labels and fields; an empty namespace means all of them."""
        ...

    def walk(self, kind: Kind, namespace: str) -> AsyncIterator[Object]:
        """All objects, some at a time: a whole fleet at once takes memory, and a second to parse."""
        ...

    async def create(self, kind: Kind, body: Object) -> bool:
        """Create it; False if it was there already, with the same controller."""
        ...

    async def patch(self, kind: Kind, body: Object, *, subresource: str = "") -> Object:
        """Merge into the object, with a subresource apply that as the operator's own; what it is then."""
        ...

    async def delete(
        self, kind: Kind, namespace: str, name: str, *, uid: str = "", children_first: bool = False
    ) -> None:
        """Delete it, its children in the background or before it; no error if it is gone, or has another UID."""
        ...


class KubernetesCluster:
    """A real one."""

    def __init__(self, api: Any, *, on_call: Callable[[str, int], None] = lambda verb, status: None) -> None:
        """`on_call` hears of every call: its verb, and the status of the answer, 0 if there was none."""
        self._api, self._on_call = api, on_call

    async def read(self, kind: Kind, namespace: str, name: str, *, not_older: str = "") -> Object | None:
        query = [("resourceVersion", not_older)] if not_older else []
        try:
            return await self._call("get", kind.path(namespace, name), query=query)
        except ApiError as exc:
            if exc.status == 404:
                return None
            raise

    async def list(self, kind: Kind, namespace: str, labels: str = "", *, fields: str = "") -> list[Object]:
        query = [(key, said) for key, said in (("labelSelector", labels), ("fieldSelector", fields)) if said]
        answer = await self._call("list", kind.path(namespace), query=query)
        return _items(answer)

    async def walk(self, kind: Kind, namespace: str) -> AsyncIterator[Object]:
        page = [("limit", str(_PAGE_SIZE))]
        while page:
            answer = await self._call("list", kind.path(namespace), query=page)
            for item in _items(answer):
                yield item
            token = (answer.get("metadata") or {}).get("continue")
            page = [page[0], ("continue", token)] if token else []

    async def create(self, kind: Kind, body: Object) -> bool:
        metadata = body["metadata"]
        path = kind.path(metadata["namespace"])
        try:
            await self._call("create", path, body=body, query=[_NO_WARNINGS])
        except ConflictError as exc:
            await self._check_owner(kind, body, exc)
            return False
        return True

    async def _check_owner(self, kind: Kind, body: Object, conflict: ConflictError) -> None:
        """Names are deterministic: what has ours and our owner is what was to be created."""
        owner, metadata = owner_uid(body), body["metadata"]
        if not owner:
            return
        there = await self.read(kind, metadata["namespace"], metadata["name"])
        if there is None:
            raise conflict
        if owner_uid(there) != owner:
            asked = f"create {kind.path(metadata['namespace'], metadata['name'])}"
            message = "the name is taken by an object of another owner: delete or rename that one"
            raise NameTakenError(asked, status=409, message=message)

    async def patch(self, kind: Kind, body: Object, *, subresource: str = "") -> Object:
        metadata = body["metadata"]
        path = kind.path(metadata["namespace"], metadata["name"], subresource)
        query = [("fieldManager", FIELD_MANAGER), _NO_WARNINGS] + ([("force", "true")] if subresource else [])
        if subresource:
            return await self._call("patch", path, body=as_yaml(body), query=query, content_type=_APPLY)
        return await self._call("patch", path, body=body, query=query, content_type=_MERGE)

    async def delete(
        self, kind: Kind, namespace: str, name: str, *, uid: str = "", children_first: bool = False
    ) -> None:
        options: Object = {"propagationPolicy": "Foreground" if children_first else "Background"}
        if uid:
            options["preconditions"] = {"uid": uid}
        try:
            await self._call("delete", kind.path(namespace, name), body=options)
        except ApiError as exc:
            # 409: what has the name now is another object, so ours is gone.
            if exc.status not in (404, 409):
                raise

    async def _call(
        self,
        verb: str,
        path: str,
        *,
        body: Object | str | None = None,
        query: Sequence[tuple[str, str]] = (),
        content_type: str = "application/json",
    ) -> Object:
        method = _METHODS[verb]
        # Signed anew for every call: tokens of service accounts rotate.
        signed = await self._api.param_serialize(
            method,
            path,
            query_params=[*query],
            # Not compressed: that costs the server and this process more time than the bytes take.
            header_params={
                "Accept": "application/json",
                "Accept-Encoding": "identity",
                "Content-Type": content_type,
            },
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            response = await self._api.call_api(*signed, _request_timeout=_TIMEOUT_SECONDS)
            raw = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            self._on_call(verb, 0)
            raise ApiError(f"{method} {path}", status=0, message=f"no answer: {exc!r}") from exc
        self._on_call(verb, response.status)
        answer = _parsed(raw)
        if response.status < 300 and answer is None:
            raise ApiError(f"{method} {path}", status=0, message=f"not the API server's answer: {raw[:200]!r}")
        answer = answer or {"message": raw[:200].decode(errors="replace")}
        if response.status >= 300:
            message = answer.get("message") or response.reason
            raise _refusal(response.status, answer)(f"{method} {path}", status=response.status, message=message)
        return answer


def as_yaml(body: Object) -> str:
    """JSON that is YAML too: that knows no surrogate pairs, by which JSON escapes what is beyond 16 bits."""
    text = json.dumps(body, ensure_ascii=False)
    return _NOT_PRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _refusal(status: int, answer: Object) -> type[ApiError]:
    """What kind of no it is. Policies and webhooks may answer 422, and webhooks 409, too: the former name no field, and
    before what the latter say the API server puts its own words."""
    denied = str(answer.get("message")).startswith("admission webhook ")
    if status == 409 and not denied:
        return ConflictError
    details = answer.get("details")
    causes = details.get("causes") if isinstance(details, dict) else None
    names_field = any(cause.get("field") for cause in causes or ())
    return InvalidError if status == 422 and names_field and not denied else ApiError


def _items(answer: Object) -> list[Object]:
    items = answer.get("items")
    if not isinstance(items, list):
        raise ApiError("list", status=0, message=f"not a list: {str(answer)[:200]}")
    return items


def _parsed(raw: bytes) -> Object | None:
    """None where something in front of the API server answered, a load balancer for example."""
    try:
        answer = json.loads(raw)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


@asynccontextmanager
async def connected() -> AsyncIterator[client.ApiClient]:
    """A connection as KUBECONFIG says, else as the pod's service account, else as ~/.kube/config."""
    configuration = client.Configuration()
    if "KUBECONFIG" not in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ:
        config.load_incluster_config(client_configuration=configuration)
    else:
        await config.load_kube_config(client_configuration=configuration)
    # Asked once: left to the session, the environment and ~/.netrc are read for every request, in two threads.
    configuration.proxy = configuration.proxy or _proxy_for(configuration.host)
    configuration.client_session_kwargs = {"trust_env": False}
    async with client.ApiClient(configuration) as api:
        yield api


def _proxy_for(server: str) -> str | None:
    """What HTTPS_PROXY and NO_PROXY say."""
    address = urlsplit(server)
    return None if proxy_bypass(address.hostname or "") else getproxies().get(address.scheme)
