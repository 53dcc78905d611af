"""What every test stands on: eight CPU devices, few threads, and data that may or may not be there."""

import os
from pathlib import Path

import pytest

# Before jax is imported: it reads both once. Meshes of up to eight devices are tested without an accelerator.
os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
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
