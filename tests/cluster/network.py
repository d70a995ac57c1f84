"""The cluster's own addresses: a bridge with a private subnet, and ports that nobody listens on.

Loopback will not do for the API server: pods could not reach it. The bridge's name is made from its subnet, so taking
the name takes the subnet, and any number of clusters live beside each other.
"""

from __future__ import annotations

import json
import random
import socket
import ssl
from dataclasses import dataclass
from ipaddress import IPv4Network
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

from tests.cluster.errors import Unavailable
from tests.cluster.ledger import Ledger
from tests.cluster.run import run

_SUBNETS_TRIED = 20


@dataclass(frozen=True)
class Network:
    """A /23 of 10.0.0.0/8: the lower /24 for this machine and the node, the upper one for pods."""

    interface: str
    subnet: IPv4Network

    @property
    def host_ip(self) -> str:
        """This machine as pods see it."""
        return str(self.subnet[1])

    @property
    def node_ip(self) -> str:
        return str(self.subnet[2])

    @property
    def pods(self) -> IPv4Network:
        return list(self.subnet.subnets())[1]


def make_network(ledger: Ledger) -> Network:
    """Make the bridge with the first address of a subnet that this machine has no route to."""
    for _ in range(_SUBNETS_TRIED):
        network = _random_network()
        if _routed(network.subnet) or run(["ip", "link", "show", network.interface], check=False).returncode == 0:
            continue
        if run(["ip", "link", "add", network.interface, "type", "bridge"], check=False).returncode == 0:
            ledger.note("interface", name=network.interface)
            run(["ip", "address", "add", f"{network.host_ip}/24", "dev", network.interface])
            run(["ip", "link", "set", network.interface, "up"])
            return network
    raise Unavailable("no bridge interface could be made (`ip link add NAME type bridge`): is the kernel module there?")


def free_ports(num_ports: int, address: str = "127.0.0.1") -> list[int]:
    """Ports that were free a moment ago; all are held until the last is known, so they differ."""
    sockets = [socket.socket() for _ in range(num_ports)]
    try:
        for each in sockets:
            each.bind((address, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def listens(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((address, port)) == 0


def answers(url: str) -> bool:
    """Whether a GET gives 200. Certificates are not checked: those of some programs are made in memory."""
    unchecked = ssl.create_default_context()
    unchecked.check_hostname = False
    unchecked.verify_mode = ssl.CERT_NONE
    direct = build_opener(ProxyHandler({}), HTTPSHandler(context=unchecked))
    try:
        with direct.open(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _random_network() -> Network:
    number = random.SystemRandom().randrange(128 * 32)
    second, third = 208 + number // 128, number % 128 * 2
    return Network(f"nexa{second:02x}{third:02x}", IPv4Network(f"10.{second}.{third}.0/23"))


def _routed(subnet: IPv4Network) -> bool:
    """Whether a more precise route than the default one leads there."""
    routes = json.loads(run(["ip", "-json", "-4", "route", "show"]).stdout)
    known = [IPv4Network(route["dst"], strict=False) for route in routes if route["dst"] != "default"]
    return any(subnet.overlaps(network) for network in known)
