import math
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from hypersteer_jax.config import ConfigError
from hypersteer_jax.topologies import ENVIRONMENT, GRIDS, KINDS, find_topology


@pytest.mark.parametrize(
    ("name", "chips", "devices", "hosts", "libtpu"),
    [
        ("v4-32", 16, 16, 4, "v4:2x2x4"),  # v4, v5p and tpu7x count two cores a chip
        ("v5p-8", 4, 4, 1, "v5p:2x2x1"),
        ("tpu7x-8", 4, 8, 1, "tpu7x:2x2x1"),  # and tpu7x shows them
        ("v5e-1", 1, 1, 1, "v5e:1x1"),
        ("v5litepod-16", 16, 16, 4, "v5e:4x4"),
        ("v6e-8", 8, 8, 2, "v6e:2x4"),
        ("v6e-256", 256, 256, 64, "v6e:16x16"),
    ],
)
def test_names_as_rented_and_as_libtpu_takes_them(name: str, chips: int, devices: int, hosts: int, libtpu: str) -> None:
    topology = find_topology(name)
    assert (topology.chips, topology.devices, topology.hosts) == (chips, devices, hosts)
    assert topology.libtpu()["topology_name"] == libtpu
    two = find_topology(name, slices=2)
    assert (two.chips, two.devices, two.hosts) == (2 * chips, 2 * devices, 2 * hosts)
    assert two.libtpu()["num_slices"] == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v6e", "give one of v4-N, v5e-N"),
        ("h100-8", "give one of v4-N, v5e-N"),
        ("v6e-12", "v6e has slices of 1, 4, 8"),
        ("v4-4", "v4 has slices of 8, 16, 32"),
    ],
)
def test_no_such_slice(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_topology(name)


def test_grids_have_as_many_chips_as_they_say() -> None:
    for axes, grids in GRIDS.items():
        for chips, grid in grids.items():
            assert (math.prod(grid), len(grid)) == (chips, axes)


@pytest.mark.parametrize(
    ("name", "links"),
    [("v5e-1", 0), ("v6e-8", 2), ("v6e-128", 3), ("v6e-256", 4), ("v5p-8", 2), ("v4-32", 3), ("v4-128", 6)],
)
def test_links_of_the_chip_that_has_the_fewest(name: str, links: int) -> None:
    topology = find_topology(name)
    assert topology.links == links
    assert topology.interconnect == links * KINDS[topology.generation].link


def test_devices_of_one_chip_share_its_links_and_its_host() -> None:
    topology = find_topology("tpu7x-8")
    assert topology.interconnect == 2 * KINDS["tpu7x"].link / 2
    assert topology.network == 25e9 / 8


# As in test_planner: the extra [test] leaves libtpu out.
@pytest.mark.skipif(find_spec("libtpu") is None, reason='libtpu is not installed (".[plan]"); names not tried on it')
def test_libtpu_knows_every_slice() -> None:
    # In a process of its own: the environment has to be there before jax is.
    code = (
        "from jax.experimental.topologies import get_topology_desc\n"
        "from hypersteer_jax.topologies import GRIDS, KINDS, find_topology\n"
        "for name, kind in KINDS.items():\n"
        "    for chips in GRIDS[kind.axes]:\n"
        "        for slices in (1, 2):\n"
        "            topology = find_topology(f'{name}-{chips * kind.cores}', slices)\n"
        "            devices = get_topology_desc(**topology.libtpu()).devices\n"
        "            hosts = len({device.process_index for device in devices})\n"
        "            assert (len(devices), hosts) == (topology.devices, topology.hosts), topology\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | ENVIRONMENT)
