"""Where the files of AxBench's sets are: in a clone of the repository, on the Hugging Face hub, or anywhere."""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from hypersteer_jax.data.batch import DataError

TABLES = ("train_data*.parquet", "data.parquet")  # in a clone (more than one if large), on the hub
METADATA = "metadata.jsonl"


class Place(NamedTuple):
    """Where AxBench publishes a set: a folder of the repository (None: not there), and one of a hub dataset."""

    clone: str | None
    hub: str
    folder: str


GEMMA = ("2b_l10", "2b_l20", "9b_l20", "9b_l31")  # size and layer
SIZES = {"concept10": GEMMA, "concept500": GEMMA, "concept16k": ("2b_l20", "9b_l20"), "conceptFD": ("2b_l10", "2b_l20")}
SETS = {
    f"{name}_{size}": Place(
        f"axbench/{name}/prod_{size}_v1/generate", f"pyvene/axbench-{name}", f"{size.replace('_', '/')}/train"
    )
    for name, sizes in SIZES.items()
    for size in sizes
} | {
    "concept16k_v2_gemma_9b_l20": Place(None, "pyvene/axbench-concept16k_v2", "gemma/9b/l20_131k/train"),
    "concept16k_v2_llama31_8b_l20": Place(None, "pyvene/axbench-concept16k_v2", "llama3.1/8b/l20_131k/train"),
}


class Files(NamedTuple):
    """Files of one set."""

    tables: list[Path]  # parquet, in order
    metadata: Path | None  # which concept is which SAE feature


def locate(name: str, source: str | None) -> Files:
    """The files of a set.

    Args:
        name: one of `SETS`, or any other for a source that is a file or a folder with the file.
        source: a parquet file, a folder with AxBench's train_data.parquet, a clone of AxBench, or a dataset of the hub;
            None is the hub's dataset of this name.

    Raises:
        DataError: there are no such files; says where they were looked for.
    """
    place = SETS.get(name)
    if source is not None and Path(source).is_file():
        return _files([Path(source)])
    if source is not None and Path(source).is_dir():
        inside = [place.clone or "", place.folder] if place else []
        folders = [Path(source, part) for part in ("", *inside)]
    elif place is None:
        raise DataError(
            f"{name}: not a set of AxBench, and the source {source!r} is neither a file nor a folder; give a source on "
            f"disk, or one of {', '.join(SETS)}"
        )
    else:
        folders = [_download(source or place.hub, place.folder)]
    for folder in folders:
        for pattern in TABLES:
            if tables := sorted(folder.glob(pattern)):
                return _files(tables)
    looked = ", ".join(str(folder) for folder in dict.fromkeys(folders))
    raise DataError(f"{name}: no {' or '.join(TABLES)} in {looked}; give the file itself")


def _files(tables: list[Path]) -> Files:
    metadata = tables[0].parent / METADATA
    return Files(tables, metadata if metadata.is_file() else None)


def _download(hub: str, folder: str) -> Path:
    try:
        return Path(snapshot_download(hub, repo_type="dataset", allow_patterns=f"{folder}/*")) / folder
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(
            f"{hub!r} is not on this disk, and as a dataset of the hub it could not be had: {error}\n"
            f"Without a network, download {folder}/data.parquet of it elsewhere and give the file as source."
        ) from error
