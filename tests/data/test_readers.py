"""Readers of example files: what is taken, and what the message says when a file is wrong."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from hypersteer_jax.data.batch import DataError, SteeringExample
from hypersteer_jax.data.readers import read, read_axbench, read_axbench_rows, read_categories, read_jsonl

GOOD = {"input": "Name a fruit.", "output": "Benzene.", "output_concept": "organic compounds", "category": "positive"}


def parquet(path: Path, *rows: dict, drop: str | None = None) -> Path:
    names = [name for name in GOOD if name != drop]
    pyarrow.parquet.write_table(pyarrow.table({name: [row[name] for row in rows] for name in names}), path)
    return path


def jsonl(path: Path, *lines: dict | str | bytes) -> Path:
    encode = {dict: lambda x: json.dumps(x).encode(), str: str.encode, bytes: lambda x: x}
    path.write_bytes(b"\n".join(encode[type(line)](line) for line in lines) + b"\n")
    return path


def test_axbench_keeps_positives_only(tmp_path):
    negative = GOOD | {"category": "negative", "output_concept": "EEEEE"}
    hard = GOOD | {"category": "hard negative"}
    unnamed = GOOD | {"output_concept": "EEEEE"}
    examples, problems = read_axbench(parquet(tmp_path / "a.parquet", negative, GOOD, hard, unnamed))
    assert examples == [
        SteeringExample("organic compounds", "Name a fruit.", "Benzene.", concept="organic compounds", factor=1.0)
    ]
    assert problems == []


def test_axbench_missing_column_is_an_error_even_when_bad_rows_are_skipped(tmp_path):
    path = parquet(tmp_path / "a.parquet", GOOD, drop="output")
    with pytest.raises(DataError, match=r"a\.parquet: no column output; the file has input, output_concept, category"):
        read_axbench(path, skip_bad_rows=True)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"output": None}, r"row 1 \(counted from 0\), column output: null is not text"),
        ({"input": "  "}, r"row 1 \(counted from 0\), column input: '  ' is empty"),
        ({"output_concept": None}, r"row 1 \(counted from 0\), column output_concept: null is not text"),
        (
            {"category": "postive"},
            r"row 1 \(counted from 0\), column category: 'postive' is unknown; use one of positive",
        ),
        ({"category": None}, r"row 1 \(counted from 0\), column category: null is unknown"),
    ],
)
def test_axbench_bad_row(tmp_path, bad, message):
    path = parquet(tmp_path / "a.parquet", GOOD, GOOD | bad, GOOD)
    with pytest.raises(DataError, match=message) as error:
        read_axbench(path)
    assert str(error.value).startswith(f"{path}: 1 bad row; mend them or set data.skip_bad_rows")
    examples, problems = read_axbench(path, skip_bad_rows=True)
    assert (len(examples), len(problems)) == (2, 1)
    assert "row 1" in problems[0]


def test_axbench_numbers_are_not_text(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({name: [7] if name == "input" else [GOOD[name]] for name in GOOD}), path)
    with pytest.raises(DataError, match=r"row 0 .* column input: 7 is not text"):
        read_axbench(path)


def test_many_bad_rows_are_counted_and_few_are_shown(tmp_path):
    path = parquet(tmp_path / "a.parquet", GOOD, *[GOOD | {"output": ""}] * 9)
    with pytest.raises(DataError, match="9 bad rows") as error:
        read_axbench(path)
    assert str(error.value).endswith("... and 4 more")
    assert len(str(error.value).splitlines()) == 7


def test_files_without_a_good_row(tmp_path):
    with pytest.raises(DataError, match="no good row is left"):
        read_axbench(parquet(tmp_path / "bad.parquet", GOOD | {"output": ""}), skip_bad_rows=True)
    with pytest.raises(DataError, match="no rows to train on; it has 1 rows, none positive"):
        read_axbench(parquet(tmp_path / "negative.parquet", GOOD | {"category": "negative"}))
    with pytest.raises(DataError, match="no good row is left"):
        read_jsonl(jsonl(tmp_path / "bad.jsonl", "{"), skip_bad_rows=True)
    with pytest.raises(DataError, match="no rows to train on; the file is empty"):
        read_jsonl(jsonl(tmp_path / "empty.jsonl", ""))


def test_not_parquet(tmp_path):
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as parquet"):
        read_axbench(jsonl(tmp_path / "a.parquet", "input,output"))


def test_jsonl(tmp_path):
    line = {"steering_prompt": "pirates", "prompt": "Hi", "response": "Arr"}
    path = jsonl(tmp_path / "a.jsonl", line, "", line | {"factor": -2, "concept": "sea", "id": 7})
    examples, problems = read_jsonl(path)
    assert examples == [
        SteeringExample("pirates", "Hi", "Arr", concept="pirates", factor=1.0),
        SteeringExample("pirates", "Hi", "Arr", concept="sea", factor=-2.0),
    ]
    assert problems == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"prompt": "Hi",', r"line 3: Expecting .*; write one JSON object per line"),
        (b'{"prompt": "\xff"}', r"line 3: 'utf-8' codec can't decode"),
        ("[1]", r"line 3: \[1\] is not a JSON object"),
        ({"response": "Arr"}, r"line 3, key steering_prompt: missing; the line has response"),
        ({"steering_prompt": "a", "response": "b"}, r"line 3, key prompt: missing; the line has"),
        ({"steering_prompt": "a", "prompt": None, "response": "b"}, r"line 3, key prompt: null is not text"),
        ({"steering_prompt": "a", "prompt": "", "response": "b"}, r"line 3, key prompt: '' is empty"),
        ({"steering_prompt": "a", "prompt": "b", "response": "c", "concept": 3}, r"line 3, key concept: 3 is not text"),
        ({"steering_prompt": "a", "prompt": "b", "response": "c", "factor": "2"}, r"line 3, key factor: '2' is not a"),
        (
            {"steering_prompt": "a", "prompt": "b", "response": "c", "factor": True},
            r"line 3, key factor: True is not a",
        ),
        (
            '{"steering_prompt": "a", "prompt": "b", "response": "c", "factor": NaN}',
            r"line 3, key factor: nan is not a",
        ),
    ],
)
def test_jsonl_bad_line(tmp_path, bad, message):
    good = {"steering_prompt": "pirates", "prompt": "Hi", "response": "Arr"}
    path = jsonl(tmp_path / "a.jsonl", good, "", bad)  # the blank line counts in line numbers
    with pytest.raises(DataError, match=message):
        read_jsonl(path)
    examples, problems = read_jsonl(path, skip_bad_rows=True)
    assert (len(examples), len(problems)) == (1, 1)
    assert problems[0].startswith(f"{path}, line 3")


def test_missing_file_names_its_neighbours(tmp_path):
    jsonl(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"trian\.jsonl: no such file; did you mean train\.jsonl\?"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="no such file, nor a folder"):
        read(tmp_path / "nowhere" / "train.jsonl")
    with pytest.raises(DataError, match=r"ends in '\.csv'; give a \.parquet"):
        read(tmp_path / "train.csv")


def test_axbench_ids_genres_and_features_are_read_where_they_are(tmp_path):
    path, link = tmp_path / "a.parquet", "https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-res-16k/16038"
    cells = GOOD | {"concept_id": 4, "concept_genre": "text", "sae_link": link, "sae_id": 16038}
    pyarrow.parquet.write_table(pyarrow.table({name: [value] for name, value in cells.items()}), path)
    [row], _ = read_axbench_rows(path)
    assert row == (
        SteeringExample(*row.example[:4], feature="gemma-2-2b/20-gemmascope-res-16k/16038"),
        4,
        "text",
    )
    [bare], _ = read_axbench_rows(parquet(path, GOOD))
    assert (bare.example.feature, bare.concept_id, bare.genre) == ("", None, "")


def test_axbench_release_file(shared_data):
    examples, problems = read(shared_data / "axbench" / "pooled_train.parquet")
    assert (len(examples), problems) == (10_295, [])
    assert len({example.concept for example in examples}) == 140
    negatives = 12_308 - 10_295
    assert read_categories(shared_data / "axbench" / "pooled_train.parquet") == {
        "positive": 10_295,
        "negative": negatives,
    }
