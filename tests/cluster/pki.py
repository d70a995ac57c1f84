"""Certificates, keys and tokens of a control plane, made by openssl for this one cluster."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.run import run

_EC_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Pki:
    """A folder of certificates under one authority."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def ca_key(self) -> Path:
        return self.folder / "ca.key"

    def certificate(self, name: str) -> Path:
        return self.folder / f"{name}.crt"

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"

    def issue(self, name: str, *, subject: str, names: Sequence[str] = (), addresses: Sequence[str] = ()) -> None:
        """A certificate for servers and clients alike, signed by the authority."""
        alternatives = [*(f"DNS:{each}" for each in names), *(f"IP:{each}" for each in addresses)]
        extensions = ["-addext", "extendedKeyUsage=serverAuth,clientAuth"]
        if alternatives:
            extensions += ["-addext", f"subjectAltName={','.join(alternatives)}"]
        signed_by: list[str | Path] = ["-CA", self.ca, "-CAkey", self.ca_key]
        out: list[str | Path] = ["-keyout", self.key(name), "-out", self.certificate(name)]
        run(["openssl", "req", "-x509", *_EC_KEY, "-subj", subject, "-days", "30", *extensions, *signed_by, *out])


def make_pki(folder: Path, *, server_addresses: Sequence[str]) -> Pki:
    """The authority, the API server's certificates and the pair that signs service accounts."""
    folder.mkdir(mode=0o700)
    pki = Pki(folder)
    out: list[str | Path] = ["-keyout", pki.ca_key, "-out", pki.ca]
    run(["openssl", "req", "-x509", *_EC_KEY, "-subj", "/CN=nexa-test", "-days", "30", *out])
    _make_service_account_pair(pki)
    inside = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"]
    names = [*inside, "localhost"]
    pki.issue("apiserver", subject="/CN=kube-apiserver", names=names, addresses=server_addresses)
    pki.issue("kubelet-client", subject="/O=system:masters/CN=kube-apiserver-kubelet-client")
    return pki


def write_tokens(file: Path, users: dict[str, str]) -> dict[str, str]:
    """A static token for each user, whose group may be empty; returns user -> token."""
    tokens = {user: secrets.token_hex(16) for user in users}
    lines = [f"{tokens[user]},{user},{user}{f',{group}' if group else ''}" for user, group in users.items()]
    file.write_text("\n".join(lines) + "\n")
    file.chmod(0o600)
    return tokens


def _make_service_account_pair(pki: Pki) -> None:
    private, public = pki.key("service-account"), pki.folder / "service-account.pub"
    run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private])
    run(["openssl", "ec", "-in", private, "-pubout", "-out", public])
