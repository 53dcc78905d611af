"""What every test stands on: eight CPU devices, few threads, and data that may or may not be there."""

import atexit
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import pytest

# Before jax is imported: it reads both once. Meshes of up to eight devices are tested without an accelerator.
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little, so the compiler's last stage works without optimisations, half the time, and
# in one thread, for two tests have the two cores already. AVX is the last instruction set that rounds a product before
# it is added to something: with a later one, bits depend on which products and sums the compiler happens to put
# together (tests/oracle.py).
for flag in (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_max_isa=AVX",
):
    if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
# What two tests, or two processes of one, both compile is compiled once. pytest's own process makes the folder, before
# those that run the tests.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ.setdefault("OMP_NUM_THREADS", "2")  # torch of the parity tests: on tiny models more threads only wait

SHARED = Path(__file__).resolve().parents[2] / "shared"  # beside the repository, not part of it


def folder_or_skip(path: Path, checks: str) -> Path:
    if not path.is_dir():
        pytest.skip(f"{path.relative_to(SHARED.parent)} is absent beside the repository; not run: {checks}")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets, tokenizers and small pretrained LMs."""
    return folder_or_skip(SHARED / "data", "checks against real data, tokenizers and pretrained LMs")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Inputs and outputs recorded from the authors' PyTorch release on a tiny random Gemma-2."""
    return folder_or_skip(SHARED / "reference/golden/gemma2_tiny_a", "numbers of the PyTorch release, reproduced")


@pytest.fixture
def splash_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The splash kernel compiles for TPUs only; here its operations are carried out one by one."""
    from hypersteer_jax.models import attention

    monkeypatch.setattr(attention, "make_splash_mha", partial(attention.make_splash_mha, interpret=True))


def random_hypernet(config, lm_config, seed: int = 1, selection=None):
    """A hypernetwork whose every weight is random: norms, biases and zero starts, too."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from hypersteer_jax.models.hypernet import NO_SELECTION, Hypernet

    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "temperature" in name:
            return jnp.asarray(rng.uniform(0.3, 0.6), jnp.float32)
        is_norm = any(word in name for word in ("norm", "pre_", "post_"))
        return jnp.asarray(is_norm * (1 - lm_config.norm_offset) + 0.2 * rng.normal(size=leaf.shape), jnp.float32)

    shapes = jax.eval_shape(lambda: Hypernet(config, lm_config, nnx.Rngs(0), selection or NO_SELECTION))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_rows(prompts, lengths, concepts, factors=None, seed: int = 0, vocab: int = 97):
    """Rows of these lengths; the first `vocab - 1` tokens are all different, and none is the pad, 0.

    Args:
        prompts: tokens of each prompt.
        lengths: tokens of each prompt and response together.
        concepts: tokens of each steering prompt.
        factors: 1 if not given.
        seed: of the tokens.
        vocab: tokens are below it.
    """
    import numpy as np

    from hypersteer_jax.data.pipeline import Rows

    rng = np.random.default_rng(seed)
    total = sum(lengths) + sum(concepts)
    stream = np.concatenate([rng.permutation(vocab - 1), rng.integers(0, vocab - 1, total)]).astype(np.int32) + 1
    parts = np.split(stream, np.cumsum([*lengths, *concepts]))
    return Rows(
        tokens=parts[: len(lengths)],
        prompt_lengths=np.array(prompts, np.int32),
        concepts=parts[len(lengths) : -1],
        factors=np.ones(len(lengths), np.float32) if factors is None else np.array(factors, np.float32),
        prefix=2,
        pad_id=0,
        positions="after_prefix",
        context=True,
    )
