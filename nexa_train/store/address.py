"""What a URI of data or artifacts names: one reading of it for all who take one. Pure but for `local_path`.

Before: a path or URI as a job or a command line has it. After: `open_store`, `artifact.verify` and `data.read` open it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from nexa_train.errors import ConfigError


class Address(NamedTuple):
    """`scheme://host/path`; on this machine no host, and of a plain path no scheme either.

    Attributes:
        host: the bucket of s3://. path: with its leading slash, where the URI has one.
    """

    scheme: str
    host: str
    path: str

    @property
    def is_local(self) -> bool:
        """Whether `path` is one of this machine."""
        return self.scheme in ("", "file") and not self.host


def parse(text: str) -> Address:
    """The parts of a path or URI. Of file:// the path is percent-decoded; `#` and `?` are characters like others.

    Raises:
        ConfigError: it holds a NUL, with which nothing is named; or it is s3:// with a `#` or `?`, which keys cannot
            have: what follows is no fragment and no query, and to drop it would read and write elsewhere.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Address("", "", _whole(text))
    scheme = scheme.lower()
    host, slash, path = _whole(rest).partition("/")
    if scheme == "file":
        decoded = os.fsdecode(unquote_to_bytes(slash + path))
        return Address(scheme, "" if host == "localhost" else host, _whole(decoded))
    if scheme == "s3" and (odd := next((each for each in rest if each in "#?"), None)):
        raise ConfigError(
            f"{text} has {odd!r}: s3:// takes no fragment and no query, and no name with such a character; leave out "
            f"{odd + text.partition(odd)[2]!r}, or name the place without {odd!r}"
        )
    return Address(scheme, host, slash + path)


def local_path(path: str) -> Path:
    """A path of this machine, `~` and `~USER` replaced by who that is here.

    Raises:
        ConfigError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = path.partition("/")[0]
        raise ConfigError(f"{path}: {user} has no home here; write ./{path} for a folder of that name") from None


def _whole(name: str) -> str:
    if "\0" in name:
        raise ConfigError(f"{name!r} holds a NUL character, with which no file and no object is named; leave it out")
    return name
