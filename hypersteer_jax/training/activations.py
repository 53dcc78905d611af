"""A cache of the residual that the hypernetwork reads and that is steered: what the blocks below make of each row.

They are frozen, so their work on a row is the same in every epoch, and in all runs on the same base LM, layer and data.
With the cache they run once per row, before training starts, and a training step begins above them.

The residual is kept in the base LM's own dtype (bfloat16 by default), 2D bytes per token: with Gemma-2-2B 0.5 GB for
1,000 rows of 110 tokens. In memory it lasts for one run; on disk any number of runs can read it.

Each of several processes has a folder of its own, DIR/process_0 and so on, and in it all rows.

    DIR/residual.bin   the residuals of all rows, one behind the other, without padding
    DIR/key.json       what they belong to; written last, so that a folder without it is an unfinished one
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import track

from hypersteer_jax.config import ConfigError, RunConfig
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.data.pipeline import Rows, bucket_lengths
from hypersteer_jax.models.lm import LM
from hypersteer_jax.sharding import make_mesh, shard_batch, shard_weights, share_of
from hypersteer_jax.steering import lower_blocks, read_context
from hypersteer_jax.training.checksum import checksums

RESIDUAL, KEY = "residual.bin", "key.json"
LENGTHS = 4  # compiled while filling, at most
FILL = 16_384  # tokens that go through the lower blocks at a time


class ActivationCache(NamedTuple):
    """Residuals of all rows."""

    residual: Float[np.ndarray, "tokens D"]
    starts: Int[np.ndarray, " N"]  # of each row in it
    lengths: Int[np.ndarray, " N"]

    def read(self, batch: SteeringBatch) -> Float[np.ndarray, "S T D"]:
        """What `read_context` gives for this batch; 0 in padding, which nothing reads."""
        found = np.zeros((*batch.tokens.shape, self.residual.shape[1]), self.residual.dtype)
        for sequence, rows in zip(found, batch.row.reshape(len(found), -1), strict=True):
            end = 0
            for row in rows:
                begin, end = end, end + self.lengths[row]
                sequence[begin:end] = self.residual[self.starts[row] :][: self.lengths[row]]
        return found


def open_cache(config: RunConfig, lm: LM, rows: Rows, template: str, console: Console) -> ActivationCache | None:
    """The cache that `config.train.cache` asks for, filled; None if it asks for none.

    Args:
        config: of the run.
        lm: its base LM.
        rows: all rows that may be trained on.
        template: the tokenizer's chat template.
        console: where progress is shown.

    Raises:
        ConfigError: a cache on disk belongs to another model, layer, data or template, or there is no room for a new
            one.
    """
    if config.train.cache == "off":
        return None
    lengths, folder = rows.lengths, config.train.cache_dir
    if jax.process_count() > 1:
        folder /= f"process_{jax.process_index()}"  # a host's disk is its own
    shape, dtype = (int(lengths.sum()), lm.config.width), lm.embedding[...].dtype
    size = shape[0] * shape[1] * dtype.itemsize
    empty = partial(ActivationCache, starts=np.cumsum(lengths) - lengths, lengths=lengths)
    if config.train.cache == "memory":
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        _check_room("memory", size, free, "take train.cache disk, or off")
        cache = empty(np.empty(shape, dtype))
        _fill(cache, config, lm, rows, console)
        return cache
    key = {
        "base LM": fingerprint(lm),
        "layer": lower_blocks(config.steering),
        "dtype": str(dtype),
        "data": hashlib.blake2b(np.concatenate([lengths, *rows.tokens]).tobytes(), digest_size=8).hexdigest(),
        "chat template": hashlib.blake2b(template.encode(), digest_size=8).hexdigest(),
    }
    if (folder / KEY).exists():
        _check_key(folder, key)
        return empty(np.memmap(folder / RESIDUAL, dtype, "r", shape=shape))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_room(str(folder), size, shutil.disk_usage(folder).free, "give another train.cache-dir")
        stored = np.memmap(folder / RESIDUAL, dtype, "w+", shape=shape)
        _fill(empty(stored), config, lm, rows, console)
        stored.flush()
        part = folder / f"{KEY}.part"
        part.write_text(json.dumps(key, indent=1) + "\n")
        part.replace(folder / KEY)
    except OSError as error:
        raise ConfigError(f"train.cache_dir is {folder}, which cannot be written ({error}); give another") from error
    return empty(np.memmap(folder / RESIDUAL, dtype, "r", shape=shape))


def _check_room(where: str, size: int, free: int, fix: str) -> None:
    if size > 0.9 * free:
        raise ConfigError(
            f"train.cache needs {size / 1e9:.1f} GB in {where}, where {free / 1e9:.1f} GB are free; {fix}"
        )


def _check_key(folder: Path, key: dict[str, Any]) -> None:
    """That a finished cache belongs to what is trained now."""
    try:
        stored = json.loads((folder / KEY).read_text())
    except ValueError as error:
        raise ConfigError(f"{folder / KEY} is damaged ({error}); delete {folder}") from error
    changed = [name for name in key if stored.get(name) != key[name]]
    if changed:
        raise ConfigError(
            f"train.cache_dir is {folder}, which was filled with another {', '.join(changed)}; give another folder, or "
            "delete this one"
        )


def fingerprint(lm: LM) -> str:
    """A number that changes with the shape or any weight of a base LM, the same wherever the weights lie."""
    text = repr((lm.config, checksums(lm)))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _fill(cache: ActivationCache, config: RunConfig, lm: LM, rows: Rows, console: Console) -> None:
    """Runs the lower blocks on every row, in an order and in shapes that depend on the rows and the mesh alone.

    Devices share the work; then every process has all rows.
    """
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    share = share_of(mesh)
    with jax.set_mesh(mesh):
        lm = shard_weights(lm, mesh)
        read = jax.jit(partial(read_context, config=config.steering, attention=config.train.attention))
        chunks = list(_chunks(rows, share.ways))
        for members, length in track(chunks, "activation cache", console=console, transient=True):
            column = np.arange(length)
            mask = column < rows.lengths[members, None]
            tokens = np.full(mask.shape, rows.pad_id, np.int32)
            tokens[mask] = np.concatenate([rows.tokens[row] for row in members])
            own = (share.of(tokens), share.of(mask.astype(np.int32)))
            found = process_allgather(read(lm, *shard_batch(own, mesh)), tiled=True)
            for row, residual in zip(members, found, strict=True):
                cache.residual[cache.starts[row] :][: rows.lengths[row]] = residual[: rows.lengths[row]]


def _chunks(rows: Rows, ways: int) -> Iterator[tuple[Int[np.ndarray, " n"], int]]:
    """Rows of similar length and the length they are padded to.

    Equally many for equal lengths, a multiple of `ways`; the last ones are repeated.
    """
    totals = bucket_lengths(rows.lengths, LENGTHS)
    bucket_of = np.searchsorted(totals, rows.lengths)
    for bucket, total in enumerate(totals):
        inside, many = np.flatnonzero(bucket_of == bucket), -(-FILL // total // ways) * ways
        for start in range(0, len(inside), many):
            yield np.resize(inside[start : start + many], many), total
