"""AxBench's sets: where their files are found, what goes into a prepared directory, and that it trains."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console

from hypersteer_jax.data.axbench.files import SETS, locate
from hypersteer_jax.data.batch import DataError, SteeringExample
from hypersteer_jax.data.concepts import load_list
from hypersteer_jax.data.splits import HELD_IN, HELD_OUT, TRAIN, leaks
from tests.test_cli import run

tfds = pytest.importorskip("tensorflow_datasets", reason="needs [axbench]; not run: building and reading prepared data")

# Only now, for without [axbench] it cannot be imported, and the line above has skipped this file.
from hypersteer_jax.data.axbench.builder import Axbench, Recipe, prepare, read_prepared  # noqa: E402

SAE = "gemma-2-2b/20-gemmascope-res-16k"
QUIET = Console(quiet=True)
NAMES = ["ships", "bees", "tea", "the moon"]


def cells(concept_id: int, row: int, concept: str | None = None) -> dict:
    return {
        "input": f"Question {row}?",
        "output": f"Answer {concept_id} {row}.",
        "output_concept": concept or NAMES[concept_id],
        "concept_genre": "text",
        "category": "positive",
        "dataset_category": "instruction",
        "concept_id": concept_id,
    }


NEGATIVE = cells(0, 0, "EEEEE") | {"category": "negative", "concept_id": -1}
ROWS = [cells(concept_id, row) for concept_id in range(4) for row in range(10)]
PLAIN = Recipe(held_out=(), dev_rows=3)


def table(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def metadata(path: Path, names: list[str]) -> Path:
    ref = f"https://www.neuronpedia.org/{SAE}"
    lines = [{"concept_id": i, "concept": name, "ref": f"{ref}/{100 + i}"} for i, name in enumerate(names)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_every_set_of_the_release_has_its_place():
    assert len(SETS) == 4 + 4 + 2 + 2 + 2
    place = SETS["concept10_9b_l31"]
    assert place == ("axbench/concept10/prod_9b_l31_v1/generate", "pyvene/axbench-concept10", "9b/l31/train")
    assert {place.hub for place in SETS.values()} == {
        f"pyvene/axbench-{name}" for name in ("concept10", "concept500", "concept16k", "concept16k_v2", "conceptFD")
    }


def test_files_are_found_wherever_they_are(tmp_path):
    clone = tmp_path / "axbench/concept10/prod_2b_l20_v1/generate"
    train = table(clone / "train_data.parquet", ROWS)
    assert locate("concept10_2b_l20", str(tmp_path)) == ([train], None)
    about = metadata(clone / "metadata.jsonl", NAMES)
    for source in (tmp_path, clone, train):
        assert locate("concept10_2b_l20", str(source)) == ([train], about)
    assert locate("mine", str(train)).tables == [train]
    other = table(tmp_path / "hub/2b/l20/train/data.parquet", ROWS)
    assert locate("concept16k_2b_l20", str(tmp_path / "hub")).tables == [other]
    shards = [table(tmp_path / f"shards/train_data_{i}.parquet", ROWS) for i in (0, 1)]
    assert locate("mine", str(tmp_path / "shards")).tables == shards


def test_what_is_not_found_says_where_it_was_looked_for(tmp_path, monkeypatch):
    with pytest.raises(
        DataError, match=r"concept10_2b_l20: no train_data\*\.parquet or data\.parquet in .*prod_2b_l20_v1"
    ):
        locate("concept10_2b_l20", str(tmp_path))
    with pytest.raises(DataError, match=r"mine: not a set of AxBench, .* one of concept10_2b_l10, "):
        locate("mine", None)
    calls = []

    def offline(*args, **kwargs):
        calls.append((args, kwargs))
        raise OSError("no network")

    monkeypatch.setattr("hypersteer_jax.data.axbench.files.snapshot_download", offline)
    with pytest.raises(
        DataError, match=r"'pyvene/axbench-concept500' is not on this disk, .*: no network\nWithout a netw"
    ):
        locate("concept500_2b_l20", None)
    with pytest.raises(DataError, match=r"download gemma/9b/l20_131k/train/data\.parquet of it elsewhere"):
        locate("concept16k_v2_gemma_9b_l20", "my/mirror")
    assert calls == [
        (("pyvene/axbench-concept500",), {"repo_type": "dataset", "allow_patterns": "2b/l20/train/*"}),
        (("my/mirror",), {"repo_type": "dataset", "allow_patterns": "gemma/9b/l20_131k/train/*"}),
    ]


def test_a_download_is_read_like_a_folder(tmp_path, monkeypatch):
    train = table(tmp_path / "2b/l20/train/data.parquet", ROWS)
    monkeypatch.setattr("hypersteer_jax.data.axbench.files.snapshot_download", lambda *_, **__: str(tmp_path))
    assert locate("concept500_2b_l20", None).tables == [train]


def test_prepared_rows_come_back_in_their_splits(tmp_path):
    source = table(tmp_path / "train_data.parquet", [NEGATIVE, *ROWS, NEGATIVE])
    metadata(tmp_path / "metadata.jsonl", NAMES)
    ids = tmp_path / "ids.json"
    ids.write_text("[2]")
    console = Console(record=True, width=200)
    recipe = PLAIN._replace(source=str(source), held_out=(str(ids),))
    path = prepare("mine", recipe, tmp_path / "out", console)
    splits = read_prepared(path)
    made = [
        SteeringExample(*(row[key] for key in ("output_concept", "input", "output", "output_concept")), feature=feature)
        for row in ROWS
        for feature in [f"{SAE}/{100 + row['concept_id']}"]
    ]
    assert splits[HELD_OUT] == [example for example in made if example.concept == "tea"]
    assert sorted(splits[TRAIN] + splits[HELD_IN]) == sorted(e for e in made if e.concept != "tea")
    assert splits[TRAIN] == [example for example in made if example in splits[TRAIN]]  # in the file's order
    assert len(splits[HELD_IN]) == 3
    assert leaks(splits) == []
    said = console.export_text()
    assert "42 rows (2 negative, 40 positive)" in said
    assert "train: 27 rows of 3 concepts" in said
    assert "held_out: 10 rows of 1 concepts" in said
    stored = tfds.builder_from_directory(path)
    assert stored.info.file_format == tfds.core.file_adapters.FileFormat.ARRAY_RECORD
    assert stored.info.metadata["recipe"]["held_out"] == [str(ids)]
    row = stored.as_data_source("held_out")[0]
    assert (row["genre"], row["concept_id"]) == (b"text", 2)


def test_held_in_rows_depend_on_the_seed_alone(tmp_path):
    source = table(tmp_path / "train_data.parquet", ROWS)
    dev = [
        Axbench(PLAIN._replace(source=str(source), seed=seed), config=None, data_dir=tmp_path).contents.splits[HELD_IN]
        for seed in (0, 0, 1)
    ]
    assert dev[0] == dev[1] != dev[2]


def test_shipped_lists_hold_concepts_out_by_name_or_feature(tmp_path):
    listed, kept = load_list("ho500")[:2], "sailing on a tiny lake, of all things"
    names = [f" {listed[0].text.upper()}!", kept]
    source = table(tmp_path / "train_data.parquet", [cells(i, row, names[i]) for i in (0, 1) for row in range(12)])
    recipe = Recipe(source=str(source), dev_rows=1)
    assert {e.concept for e in read_prepared(prepare("a", recipe, tmp_path, QUIET))[HELD_OUT]} == {names[0]}
    about = [{"concept_id": 0, "concept": names[0]}, {"concept_id": 1, "concept": kept, "ref": listed[1].feature}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, about)))
    with pytest.raises(DataError, match="b: every concept is on one of the lists ho500, ablations10; give fewer"):
        prepare("b", recipe, tmp_path, QUIET)


def test_nothing_is_written_before_the_source_is_known_to_be_good(tmp_path):
    source = table(tmp_path / "train_data.parquet", [*ROWS, cells(0, 99) | {"output": ""}])
    recipe = PLAIN._replace(source=str(source))
    with pytest.raises(DataError, match="1 bad row"):
        prepare("mine", recipe, tmp_path / "out", QUIET)
    with pytest.raises(DataError, match="ho50: neither a file nor one of"):
        prepare("mine", recipe._replace(held_out=("ho50",)), tmp_path / "out", QUIET)
    metadata(tmp_path / "metadata.jsonl", ["boats", *NAMES[1:]])
    with pytest.raises(DataError, match=r"concept_id 0 is 'boats', but 'ships' in train_data\.parquet"):
        prepare("mine", recipe._replace(skip_bad_rows=True), tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()
    (tmp_path / "metadata.jsonl").unlink()
    console = Console(record=True, width=200)
    path = prepare("mine", recipe._replace(skip_bad_rows=True), tmp_path / "out", console)
    said = console.export_text()
    assert "bad row skipped: " in said
    assert "nothing is held out" in said
    with pytest.raises(DataError, match="prepared already; give another folder as out, or remove it"):
        prepare("mine", recipe, tmp_path / "out", QUIET)
    assert sum(map(len, read_prepared(path).values())) == 40


def test_what_is_no_prepared_directory(tmp_path):
    with pytest.raises(DataError, match=r"no dataset_info\.json here; give the folder that `hypersteer data prepare`"):
        read_prepared(tmp_path)


SHORT = (
    "--train.steps",
    2,
    "--train.batch",
    16,
    "--train.eval-batches",
    1,
    "--data.buckets",
    1,
    "--train.save-every",
    0,
)


def test_train_takes_a_prepared_directory(tmp_path, monkeypatch, capsys):
    source = table(tmp_path / "train_data.parquet", ROWS)
    (tmp_path / "ids.json").write_text("[1]")
    recipe = PLAIN._replace(source=str(source), held_out=(str(tmp_path / "ids.json"),))
    path = prepare("mine", recipe, tmp_path / "out", QUIET)
    assert run(monkeypatch, "train", "tinyworld", "--data.source", path, "--out", tmp_path / "run", *SHORT) == 0
    said = capsys.readouterr().out
    assert "27 rows of 3 concepts" in said
    assert "held-in: loss" in said
    assert "held-out: loss" in said


def test_train_refuses_a_leaking_split(tmp_path, monkeypatch, capsys):
    source = table(tmp_path / "train_data.parquet", ROWS)
    metadata(tmp_path / "metadata.jsonl", NAMES)
    monkeypatch.setattr(
        "hypersteer_jax.data.axbench.builder.find_listed",
        lambda rows, *_: [index % 2 == 0 for index in range(len(rows))],
    )
    path = prepare("mine", PLAIN._replace(source=str(source)), tmp_path / "out", QUIET)
    assert run(monkeypatch, "train", "tinyworld", "--data.source", path, "--out", tmp_path / "run", *SHORT) == 1
    error = capsys.readouterr().err
    assert f"error: {path}: evaluation data leaks into training" in error
    assert "train and held-out share 4 steering prompts: 'ships'" in error
    assert "train and held-out share 4 SAE features: 'gemma-2-2b/20-gemmascope-res-16k/100'" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "folder", "counts"),
    [
        ("concept10_2b_l20", "concept10/2b_l20", {"positive": 720, "negative": 216}),
        ("conceptFD_2b_l10", "conceptFD/2b_l10", {"positive": 1224, "negative": 216}),
        ("conceptFD_2b_l20", "conceptFD/2b_l20", {"positive": 1152, "negative": 216}),
    ],
)
def test_sets_of_the_release(shared_data, tmp_path, name, folder, counts):
    recipe = Recipe(source=str(shared_data / "axbench" / folder), dev_rows=50)
    path = prepare(name, recipe, tmp_path, QUIET)
    assert tfds.builder_from_directory(path).info.metadata["categories"] == counts
    splits = read_prepared(path)
    rows = splits[TRAIN] + splits[HELD_IN]
    assert (len(rows), len(splits[HELD_IN]), splits[HELD_OUT]) == (counts["positive"], 50, [])
    concepts = {example.concept: example.feature for example in rows}
    assert len(concepts) == len(set(concepts.values())) == counts["positive"] // 72
    assert all(feature.startswith("gemma-2-2b/") for feature in concepts.values())
    assert leaks(splits) == []
