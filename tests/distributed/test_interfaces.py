"""Processes of several machines talk over the interface between them, whatever their names stand for."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_cli.distributed.environment import Placement
from grpo_cli.distributed.interfaces import MAIN_ADDRESS, address_between_nodes, address_towards, interface_of

ROOT = Path(__file__).parents[2]
NETWORK = "10.79.0"
TIMEOUT_S = 120


class Store(dict[str, bytes]):
    """What processes see of each other's, as torch's stores give it."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str, default: Any = None) -> Any:
        return self[key]


def test_what_leads_to_this_machine_is_loopback() -> None:
    address = address_towards("127.0.0.1")
    assert address == "127.0.0.1"
    assert interface_of(address) == ("lo" if sys.platform == "linux" else interface_of(address))


def test_an_address_that_no_interface_has_names_none() -> None:
    assert interface_of("192.0.2.1") is None


def test_an_address_that_leads_nowhere_is_passed_over_for_one_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(host: str, port: int, **options: Any) -> list[Any]:
        unreachable = (socket.AF_INET, socket.SOCK_DGRAM, 0, "", ("255.255.255.255", port))
        return [unreachable, (socket.AF_INET, socket.SOCK_DGRAM, 0, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert address_towards("node") == "127.0.0.1"


def test_a_name_without_an_address_is_an_error_of_the_system() -> None:
    with pytest.raises(OSError, match=r"."):
        address_towards("no-such-machine.invalid")


def test_machine_0_whose_name_is_a_loopback_address_takes_what_others_call_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways = {"debian": ("127.0.0.1", "127.0.1.1"), "seen from node 1": ("10.0.0.12", "10.0.0.11")}
    monkeypatch.setattr("grpo_cli.distributed.interfaces._route", ways.__getitem__)
    store = Store()
    assert address_between_nodes(Placement(3, 4, 1, 2), "seen from node 1", store) == "10.0.0.12"
    assert MAIN_ADDRESS not in store, "one process of a machine says it"
    assert address_between_nodes(Placement(2, 4, 0, 2), "seen from node 1", store) == "10.0.0.12"
    for rank in (0, 1):
        assert address_between_nodes(Placement(rank, 4, rank, 2), "debian", store) == "10.0.0.11"


def test_machine_0_whose_name_leads_to_it_needs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_cli.distributed.interfaces._route", lambda main: ("10.0.0.11", "10.0.0.11"))
    assert address_between_nodes(Placement(0, 2, 0, 1), "node0", Store()) == "10.0.0.11"


# Two machines, each with a network and a host name of its own, which stands for 127.0.1.1 there


MEETS = """
import os
from grpo_cli.distributed.ranks import Ranks
ranks = Ranks.join(needs_group=False)
with ranks.leaving_together():
    print(ranks.gather(os.environ.get("GLOO_SOCKET_IFNAME")))
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Names of two network namespaces with a cable between them: interface wire0, addresses 10.79.0.1 and 2."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("network namespaces need root")
    names = [f"grpo-{os.getpid()}-{index}" for index in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", names[0], "link", "add", "wire0", "type", "veth", "peer", "name", "wire0", "netns", names[1])
        for index, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"{NETWORK}.{index}/24", "dev", "wire0")
            ip("-n", name, "link", "set", "wire0", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    else:
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start(machine: str, index: int, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Rank `index` of two on a machine named node0 or node1, whose own name is 127.0.1.1 to it."""
    hosts = folder / f"hosts-{index}"
    other = 1 - index
    hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 node{index}\n{NETWORK}.{other + 1} node{other}\n")
    place = {"RANK": index, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 29511}
    script = f"hostname node{index} && mount --bind {hosts} /etc/hosts && exec {sys.executable} -c '{MEETS}'"
    return subprocess.Popen(
        ["ip", "netns", "exec", machine, "unshare", "--uts", "bash", "-c", script],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {name: str(value) for name, value in place.items()} | environment
        | {"MASTER_ADDR": "node0", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("users", [{}, {"GLOO_SOCKET_IFNAME": "wire0"}], ids=["chosen", "the user's"])
def test_machines_whose_own_names_are_loopback_addresses_meet(
    machines: list[str], tmp_path: Path, users: dict[str, str]
) -> None:
    processes = [start(machine, index, tmp_path, **users) for index, machine in enumerate(machines)]
    try:
        for index, process in enumerate(processes):
            output, errors = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, errors
            assert output.strip() == "['wire0', 'wire0']"
            told = f"node{index}: processes talk over wire0 ({NETWORK}.{index + 1})"
            assert (told in errors) is not bool(users)
    finally:
        for process in processes:
            process.kill()
            process.wait()
