"""The first process of the node's namespaces: it gives the node folders of its own and buries orphans.

`node` starts it under `unshare` with a mount, a network and a process namespace. When it dies, the kernel kills every
process of the node, unmounts everything it mounted and drops its interfaces and iptables rules: nothing is left to
clean up, even after a crash. It imports nothing of ours, so that it runs from any working directory.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

# Programs of a node write to fixed places below these; each node sees folders of its own there.
_PRIVATE = ("/run", "/var/lib", "/var/log")


def main(folder: Path) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    for place in _PRIVATE:
        own = folder / place.replace("/", "-").strip("-")
        own.mkdir(parents=True)
        subprocess.run(["mount", "--bind", str(own), place], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    (folder / "ready").touch()
    while True:
        signal.sigwait([signal.SIGCHLD])
        _bury()


def _bury() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
