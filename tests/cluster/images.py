"""Images for the real node, built once and kept in the cache as docker-archives, keyed by all that goes into them.

`base` (a minimal Debian with Python, made by debootstrap, since no registry is assumed) stands in for the CUDA or
Python image that users pass as BASE_IMAGE; on it the project's own Dockerfiles are built as they are. buildah keeps
their layers, so a change of the source rebuilds only the last, small one. `node` loads the archives.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import host
from tests.cluster.paths import REPOSITORY, cache_folder
from tests.cluster.run import run

PAUSE_IMAGE = "localhost/nexa/pause:1"
_CERTIFICATES = Path("/etc/ssl/certs")
_BUSYBOX = Path("/bin/busybox")
_NUM_ARCHIVES_KEPT = 2
_BASE_SUITE = "bookworm"
_BASE_PACKAGES = "python3,python3-venv,ca-certificates"
_LEFT_OUT_OF_BASE = ("dev", "var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale")

# What the Dockerfiles copy; a file is in the key if and only if it can be in the image.
_PROJECT_FILES = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", ".dockerignore")
_PROJECT_FOLDERS = ("nexa_train", "operator/nexa_operator")

# A process that only waits. It has a shell, so that tests can use the image for pods of their own.
_PAUSE_DOCKERFILE = """\
FROM scratch
COPY busybox /bin/busybox
COPY busybox /bin/sh
USER 65532:65532
ENTRYPOINT ["/bin/sh", "-c", "trap 'exit 0' TERM INT; while :; do /bin/busybox sleep 3600 & wait $!; done"]
"""
_BASE_DOCKERFILE = "FROM scratch\nADD base.tar /\n"


@dataclass(frozen=True)
class Image:
    """A reference and the archive that holds it."""

    reference: str
    archive: Path


def pause_archive() -> Path:
    """The sandbox image of the node, which is also a busybox for tests."""
    host.require_image_tools()
    key = _digest([_PAUSE_DOCKERFILE.encode(), _BUSYBOX.read_bytes()])
    return _cached("pause", key, lambda archive: _build_pause(archive))


def trainer_image() -> Image:
    """`trainer_image/Dockerfile` on the base image, as it would be built for users."""
    return _project_image("trainer", REPOSITORY / "trainer_image" / "Dockerfile")


def operator_image() -> Image:
    """`operator/Dockerfile` on the base image, as it would be built for users."""
    return _project_image("operator", REPOSITORY / "operator" / "Dockerfile")


def _project_image(name: str, dockerfile: Path) -> Image:
    host.require_image_tools()
    base = _base_reference()
    key = _digest([base.encode(), dockerfile.read_bytes(), *_project_bytes(), *_wheel_names()])
    reference = f"localhost/nexa/{name}:{key}"

    def build(archive: Path) -> None:
        _warn_of_size(name)
        _build(reference, dockerfile, base, archive)

    return Image(reference, _cached(name, key, build))


def _warn_of_size(name: str) -> None:
    if name == "trainer" and not _wheel_folders():
        hint = "name a folder with a CPU build of torch in PIP_FIND_LINKS for a third of it"
        said = "the package index's torch is the CUDA build, the image will weigh some 6 GB"
        print(f"{said}: {hint}", file=sys.stderr, flush=True)


def _build(reference: str, dockerfile: Path, base: str, archive: Path) -> None:
    if base.startswith("localhost/"):
        _ensure_base(base)
    _buildah(
        "bud",
        "--isolation=chroot",
        "--layers",
        "--pull-never" if base.startswith("localhost/") else "--pull",
        f"--tag={reference}",
        f"--file={dockerfile}",
        f"--build-arg=BASE_IMAGE={base}",
        *_pip_options(),
        REPOSITORY,
    )
    _buildah("push", reference, f"docker-archive:{archive}:{reference}")


def _pip_options() -> list[str]:
    """pip inside the build uses what pip on this machine uses: its authorities and its folders of wheels."""
    volumes = {str(_CERTIFICATES): str(_CERTIFICATES)}
    arguments = {"PIP_CERT": str(_CERTIFICATES / "ca-certificates.crt")}
    inside = {str(folder): f"/wheels/{index}" for index, folder in enumerate(_wheel_folders())}
    if inside:
        arguments["PIP_FIND_LINKS"] = " ".join(inside.values())
    if index := os.environ.get("PIP_INDEX_URL"):
        arguments["PIP_INDEX_URL"] = index
    mounts = [f"--volume={here}:{there}:ro" for here, there in {**volumes, **inside}.items()]
    return [*mounts, *(f"--build-arg={name}={value}" for name, value in arguments.items())]


def _wheel_folders() -> list[Path]:
    folders = [Path(entry).resolve() for entry in os.environ.get("PIP_FIND_LINKS", "").split()]
    return [folder for folder in folders if folder.is_dir() and any(folder.glob("*.whl"))]


def _wheel_names() -> Iterator[bytes]:
    """Which torch a build finds there decides what the image is."""
    for folder in _wheel_folders():
        yield from (wheel.name.encode() for wheel in sorted(folder.glob("*.whl")))


def _project_bytes() -> Iterator[bytes]:
    files = [REPOSITORY / name for name in _PROJECT_FILES]
    for folder in _PROJECT_FOLDERS:
        files += sorted(file for file in (REPOSITORY / folder).rglob("*") if file.is_file())
    for file in files:
        if "__pycache__" not in file.parts and file.exists():
            yield str(file.relative_to(REPOSITORY)).encode()
            yield file.read_bytes()


def _base_reference() -> str:
    if chosen := os.environ.get("NEXA_TEST_BASE_IMAGE"):
        return chosen
    return f"localhost/nexa/base:{_digest([_BASE_SUITE.encode(), _BASE_PACKAGES.encode(), _BASE_DOCKERFILE.encode()])}"


def _ensure_base(reference: str) -> None:
    """Into buildah's storage, from the cached tarball where there is one."""
    if _buildah("images", "--quiet", reference, check=False):
        return
    tarball = _cached("base", reference.rpartition(":")[2], _debootstrap)
    with _context(_BASE_DOCKERFILE) as context:
        os.link(tarball, context / "base.tar")
        _buildah("bud", "--isolation=chroot", f"--tag={reference}", context)


def _debootstrap(tarball: Path) -> None:
    root = Path(tempfile.mkdtemp(prefix="base-", dir=tarball.parent))
    try:
        run(["debootstrap", "--variant=minbase", f"--include={_BASE_PACKAGES}", _BASE_SUITE, root])
        left_out = [f"--exclude=./{folder}/*" for folder in _LEFT_OUT_OF_BASE]
        run(["tar", "--create", f"--file={tarball}", f"--directory={root}", *left_out, "."])
    finally:
        shutil.rmtree(root)


def _build_pause(archive: Path) -> None:
    with _context(_PAUSE_DOCKERFILE) as context:
        shutil.copy(_BUSYBOX, context / "busybox")
        _buildah("bud", "--isolation=chroot", f"--tag={PAUSE_IMAGE}", context)
        _buildah("push", PAUSE_IMAGE, f"docker-archive:{archive}:{PAUSE_IMAGE}")


@contextmanager
def _context(dockerfile: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="context-", dir=_folder()) as context:
        (Path(context) / "Dockerfile").write_text(dockerfile)
        yield Path(context)


def _cached(name: str, key: str, make: Callable[[Path], None]) -> Path:
    """The file of this key, made under a lock and renamed when it is whole."""
    file = _folder() / f"{name}-{key}.tar"
    with _locked(name):
        if not file.exists():
            started = time.monotonic()
            partial = file.with_suffix(f".{os.getpid()}.partial")
            try:
                make(partial)
                partial.rename(file)
            finally:
                partial.unlink(missing_ok=True)
            print(f"built {file.name} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            _forget_old(name, file)
    os.utime(file)
    return file


def _forget_old(name: str, newest: Path) -> None:
    """Images weigh gigabytes. The one used before is kept: two branches are often compared."""
    others = [file for file in _folder().glob(f"{name}-*.tar") if file != newest]
    for file in sorted(others, key=lambda file: file.stat().st_mtime)[: -(_NUM_ARCHIVES_KEPT - 1)]:
        file.unlink()
        _buildah("rmi", f"localhost/nexa/{name}:{file.stem.removeprefix(f'{name}-')}", check=False)


@contextmanager
def _locked(name: str) -> Iterator[None]:
    with (_folder() / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _folder() -> Path:
    folder = cache_folder() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _buildah(command: str, *args: str | Path, check: bool = True) -> str:
    """With storage of our own, so that nothing of the user's is touched."""
    storage = cache_folder() / "buildah"
    where = [f"--root={storage / 'root'}", f"--runroot={storage / 'run'}"]
    return run(["buildah", *where, command, *args], check=check).stdout.strip()


def _digest(parts: Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()[:12]


def main(names: list[str]) -> None:
    """Build the named images, or all of them, ahead of time."""
    known = {"pause": pause_archive, "operator": operator_image, "trainer": trainer_image}
    if unknown := set(names) - set(known):
        raise SystemExit(f"unknown {sorted(unknown)}; known: {', '.join(known)}")
    for name in names or known:
        print(known[name]())


if __name__ == "__main__":
    main(sys.argv[1:])
