"""The way in for people: `python -m tests.cluster up|down|status`, behind `make cluster-up` and `make cluster-down`.

What `up` starts outlives it; the state folder (outside the repository) says where it is, and `down` ends and removes
all of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from tests.cluster import host, images
from tests.cluster.control_plane import ControlPlane, start_control_plane, undone_on_error
from tests.cluster.errors import ClusterError
from tests.cluster.ledger import Ledger, ProcessId
from tests.cluster.minio import start_minio
from tests.cluster.node import RealCluster, start_real_cluster
from tests.cluster.paths import state_folder

_BUCKETS = ("datasets", "models")


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    commands = parser.add_subparsers(required=True)
    up = commands.add_parser("up", help="start a control plane, and what the options add")
    up.set_defaults(command=_up)
    up.add_argument("--node", action="store_true", help="a real node that runs pods (root)")
    up.add_argument("--minio", action="store_true", help=f"MinIO with the buckets {' and '.join(_BUCKETS)}")
    up.add_argument("--images", action="store_true", help="build and load the project's images; implies --node")
    up.add_argument("--fake-nodes", type=int, default=0, metavar="N", help="nodes on which pods only seem to run")
    commands.add_parser("down", help="end all of it and remove it").set_defaults(command=_down)
    commands.add_parser("status", help="what runs, and the exports").set_defaults(command=_status)
    return parser


def _up(options: argparse.Namespace) -> int:
    if any(process.alive for _, process in _processes()):
        print("a cluster is up already; `down` ends it", file=sys.stderr)
        return _status(options)
    _down(options)
    with_node = options.node or options.images
    host.require_node() if with_node else host.require_control_plane()
    plane = start_real_cluster() if with_node else start_control_plane()
    with undone_on_error(plane.ledger):
        _write_state(plane, _add_to(plane, options))
        plane.ledger.outlive_me()
    return _status(options)


def _add_to(plane: ControlPlane, options: argparse.Namespace) -> dict[str, str]:
    """What the options ask for beyond nodes; returns its exports."""
    exports: dict[str, str] = {}
    if options.fake_nodes:
        plane.fake_nodes(options.fake_nodes)
    if options.images and isinstance(plane, RealCluster):
        for name, image in {"TRAINER": images.trainer_image(), "OPERATOR": images.operator_image()}.items():
            plane.load_image(image.archive)
            exports[f"NEXA_{name}_IMAGE"] = image.reference
    if options.minio:
        server = start_minio(address=plane.host_ip, ledger=plane.ledger)
        for bucket in _BUCKETS:
            server.make_bucket(bucket)
        exports |= server.env()
    return exports


def _write_state(plane: ControlPlane, exports: dict[str, str]) -> None:
    """Readable by its owner alone: there are credentials in it."""
    state = state_folder()
    state.mkdir(parents=True, mode=0o700)
    kubeconfig = state / "kubeconfig"
    shutil.copy(plane.kubeconfig, kubeconfig)
    lines = [f"export {name}={value}" for name, value in {"KUBECONFIG": str(kubeconfig), **exports}.items()]
    (state / "exports.sh").write_text("\n".join(lines) + "\n")
    _pointer().write_text(json.dumps({"folder": str(plane.ledger.folder)}))


def _down(options: argparse.Namespace) -> int:
    if ledger := _ledger():
        ledger.undo()
    shutil.rmtree(state_folder(), ignore_errors=True)
    return 0


def _status(options: argparse.Namespace) -> int:
    """0 if everything that was started runs."""
    processes = _processes()
    for name, process in processes:
        print(f"# {name}: {f'pid {process.pid}' if process.alive else 'ended'}")
    if not processes:
        print("# no cluster is up; `up` starts one")
        return 1
    print((state_folder() / "exports.sh").read_text(), end="")
    return 0 if all(process.alive for _, process in processes) else 1


def _processes() -> list[tuple[str, ProcessId]]:
    ledger = _ledger()
    names = [str(entry["name"]) for entry in ledger.entries("process")] if ledger else []
    return list(zip(names, ledger.processes(), strict=True)) if ledger else []


def _ledger() -> Ledger | None:
    if not _pointer().exists():
        return None
    return Ledger(Path(json.loads(_pointer().read_text())["folder"]))


def _pointer() -> Path:
    return state_folder() / "cluster.json"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
