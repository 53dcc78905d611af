"""Checksums of arrays, worked out where the arrays lie."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import UInt


def checksum(x: Array) -> UInt[Array, ""]:
    """Sum of all elements' bits times odd numbers that differ by place, modulo 2^32.

    Integers modulo 2^32 add up to the same in any order, so it does not depend on how the array is split. A flipped bit
    always changes it: an odd number times a power of two below 2^32 is not 0.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = sum(
        jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(2654435761 * (axis + 1) % 2**32)
        for axis in range(x.ndim)
    )
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


@jax.jit
def _checksums(leaves: list[Array]) -> list[UInt[Array, ""]]:
    return [checksum(leaf) for leaf in leaves]


def checksums(tree: Any) -> list[int]:
    """Checksum of every array of a tree, in the order of its leaves; every process has to call it."""
    return [int(each) for each in jax.device_get(_checksums(jax.tree.leaves(tree)))]
