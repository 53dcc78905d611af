"""TPU slices by the names that users know: what a chip can do, and how the chips are joined.

Nothing here needs jax. All figures are the makers'; none was measured.
"""

import math
import re
from typing import Any, NamedTuple

from hypersteer_jax.config import ConfigError

# For jax and libtpu on a host without a TPU; they read them when they are imported.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # do not look for a TPU
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask Google Cloud what host this is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once: none of them uses a chip
    "TPU_WORKER_HOSTNAMES": "localhost",  # libtpu complains without these two; neither changes what it compiles
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
CHIPS_PER_HOST = 4  # of every slice of more than one host
NETWORK = 25e9  # bytes per second of a host between slices (jax-ml/scaling-book, tpus.md)


class Kind(NamedTuple):
    """A generation of TPUs. Figures are of one device, which is a chip but for tpu7x, that shows two a chip."""

    memory: int  # bytes that libtpu 0.0.42.1 leaves to a program, as its own message says when one does not fit
    flops: float  # bfloat16 products and sums per second
    bandwidth: float  # bytes per second from and to main memory
    link: float  # bytes per second one way between neighbours
    axes: int  # of the grid that the chips are joined in
    cores: int  # that a chip counts for in the name of a slice
    devices: int = 1  # of a chip


GIB = 2**30
# FLOP/s and memory bandwidth: jax/_src/pallas/mosaic/tpu_info.py of jax 0.10.2. Links: jax-ml/scaling-book, tpus.md;
# v6e: Google's page, 800 GB/s both ways over four links; tpu7x: 180 GB/s an axis from MaxText's custom_model.md.
KINDS = {
    "v4": Kind(int(30.75 * GIB), 275e12, 1.23e12, 45e9, axes=3, cores=2),
    "v5e": Kind(int(15.75 * GIB), 197e12, 0.82e12, 45e9, axes=2, cores=1),
    "v5p": Kind(int(95.74 * GIB), 459e12, 2.46e12, 90e9, axes=3, cores=2),
    "v6e": Kind(int(31.25 * GIB), 918e12, 1.64e12, 90e9, axes=2, cores=1),
    "tpu7x": Kind(int(94.75 * GIB), 1153e12, 3.7e12, 45e9, axes=3, cores=2, devices=2),
}
ALIASES = {"v5litepod": "v5e"}
GRIDS: dict[int, dict[int, tuple[int, ...]]] = {  # by axes, then by chips: the shapes that are rented out
    2: {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
    3: {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8)},
}


class Topology(NamedTuple):
    """One slice, or several equal ones joined by the data-centre network."""

    name: str  # "v4-32": as rented; v4, v5p and tpu7x count cores, so that this one has 16 chips
    kind: Kind
    generation: str
    grid: tuple[int, ...]  # chips of one slice along each axis
    slices: int = 1

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.grid) * self.slices

    @property
    def devices(self) -> int:
        """That jax shows, over all slices."""
        return self.chips * self.kind.devices

    @property
    def hosts(self) -> int:
        """Of all slices, at four chips each; v5e-8 and v6e-8 also exist as one host of eight."""
        return self.slices * max(1, math.prod(self.grid) // CHIPS_PER_HOST)

    @property
    def links(self) -> int:
        """Links of the chip that has the fewest: one a dimension, and two where the ends are joined as well.

        They are on v5e and v6e along 16 chips, on the others where all dimensions are multiples of 4 (scaling-book).
        """
        cube = self.kind.axes == 3 and all(length % 4 == 0 for length in self.grid)
        return sum(2 if cube or length == 16 else 1 for length in self.grid if length > 1)

    @property
    def interconnect(self) -> float:
        """Bytes per second that a device can send within its slice, over all of its links at once."""
        return self.kind.link * self.links / self.kind.devices

    @property
    def network(self) -> float:
        """Bytes per second that a device can send to other slices."""
        return NETWORK * self.hosts / self.devices

    def libtpu(self) -> dict[str, Any]:
        """What `jax.experimental.topologies.get_topology_desc` has to be given."""
        options: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.generation == "v4":
            options["chip_config_name"] = "megacore"  # else libtpu shows two devices a chip
        if math.prod(self.grid) == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        name = f"{self.generation}:{'x'.join(map(str, self.grid))}"
        return {"topology_name": name, "platform": "tpu", **options}


def find_topology(name: str, slices: int = 1) -> Topology:
    """The slice of this name, such as v5e-16, v5litepod-16, v5p-8 or tpu7x-8.

    Raises:
        ConfigError: there is no such slice; names those that there are.
    """
    match = re.fullmatch(r"([a-z0-9]+)-(\d+)", name)
    generation = ALIASES.get(match[1], match[1]) if match else ""
    if match is None or generation not in KINDS:
        raise ConfigError(f"topology is {name!r}; give one of {', '.join(f'{kind}-N' for kind in KINDS)}")
    kind = KINDS[generation]
    grids = {chips * kind.cores: grid for chips, grid in GRIDS[kind.axes].items()}
    if int(match[2]) not in grids:
        raise ConfigError(f"topology is {name!r}; {generation} has slices of {', '.join(map(str, grids))}")
    return Topology(f"{generation}-{match[2]}", kind, generation, grids[int(match[2])], slices)
