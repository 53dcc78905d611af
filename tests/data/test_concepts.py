"""Lists of concepts: the forms that are read, what is cleaned, and the lists that come with the package."""

import json

import pytest

from experiments.ho500 import COUNT, SEED, draw
from hypersteer_jax.data.batch import DataError
from hypersteer_jax.data.concepts import LISTS, Concept, feature_of, load_list, normalised, read_concepts

SAE = "gemma-2-2b/20-gemmascope-res-16k"


def entry(index: int, description: str, author: str = "gpt-4o-mini") -> dict:
    model, layer = SAE.split("/")
    return {
        "modelId": model,
        "layer": layer,
        "index": str(index),
        "description": description,
        "explanationModelName": author,
        "typeName": "oai_token-act-pair",
    }


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_neuronpedia_list(tmp_path):
    entries = [
        entry(7, "  sailing\n and the\tsea ", "gpt-3.5-turbo"),
        entry(7, "boats"),
        entry(9, " \n"),
        entry(9, "bees"),
        entry(11, "boats"),  # a name may be that of two features
    ]
    assert read_concepts(write(tmp_path / "a.json", entries)) == [
        Concept("sailing and the sea", f"{SAE}/7"),
        Concept("bees", f"{SAE}/9"),
        Concept("boats", f"{SAE}/11"),
    ]


def test_metadata_lines_and_ids(tmp_path):
    lines = [
        {"concept_id": 3, "concept": "bees ", "ref": f"https://www.neuronpedia.org/{SAE}/9", "concept_genres_map": {}},
        {"feature": f"{SAE}/7"},
        {"concept_id": 5},
        {"feature": f"{SAE}/7"},
    ]
    path = write(tmp_path / "metadata.jsonl", "\n\n".join(map(json.dumps, lines)))
    assert read_concepts(path) == [Concept("bees", f"{SAE}/9", 3), Concept(feature=f"{SAE}/7"), Concept(concept_id=5)]
    assert load_list(str(path)) == read_concepts(path)
    assert read_concepts(write(tmp_path / "ids.json", [5, 2, 5])) == [Concept(concept_id=5), Concept(concept_id=2)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"concept_id": 1}\n{', r"a\.jsonl: cannot be read as a list of concepts .*; give JSON"),
        ("a.jsonl", '{"concept_id": 1}\n\n[2]', r"a\.jsonl, line 3: not a JSON object"),
        ("a.jsonl", '{"concept": " "}', r"line 1: names no concept; give concept, feature or concept_id"),
        ("a.jsonl", '{"concept": 7}', r"line 1, key concept: 7 is not of type str"),
        ("a.jsonl", '{"concept_id": "7"}', r"line 1, key concept_id: '7' is not of type int"),
        ("a.json", "[]", r"a\.json: not a list with entries"),
        ("a.json", '{"a": 1}', r"a\.json: not a list with entries"),
        ("a.json", '[{"modelId": "x", "index": "1"}]', r"entry 0 \(counted from 0\): no layer, description"),
        ("a.json", '["x"]', r"entry 0 \(counted from 0\): no modelId, layer, index, description"),
    ],
)
def test_bad_lists(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        read_concepts(write(tmp_path / name, text))


def test_missing_list_names_those_that_exist(tmp_path):
    with pytest.raises(DataError, match="ho50: neither a file nor one of ho500, ablations10"):
        load_list("ho50")
    with pytest.raises(DataError, match=r"nowhere\.json: cannot be read"):
        read_concepts(tmp_path / "nowhere.json")


def test_normalised():
    assert normalised(" References to  Ships, and the SEA. ") == normalised("references to ships and the sea")
    assert normalised("ships") != normalised("ship")
    assert normalised("C++") != normalised("...")  # nothing but punctuation stays as it is
    assert normalised(" != ") == "!="


def test_feature_of():
    assert feature_of(f" https://www.neuronpedia.org/{SAE}/9 ") == feature_of(f"{SAE}/9") == f"{SAE}/9"


def test_shipped_lists():
    ho500, ten = (load_list(name) for name in LISTS)
    assert (len(ho500), len(ten)) == (COUNT, 10)
    together = ho500 + ten
    assert len({concept.feature for concept in together}) == len({normalised(c.text) for c in together}) == 510
    assert {concept.feature.rpartition("/")[0] for concept in together} == {SAE}
    features = [int(concept.feature.rsplit("/", 1)[1]) for concept in ten]
    assert features == [14877, 7498, 4735, 2791, 15736, 14240, 1535, 13851, 1138, 15876]


def test_draw_leaves_out_what_it_must():
    described = [Concept(f"name {i}", f"{SAE}/{i}") for i in range(20)] + [Concept("Name 3.", f"{SAE}/90")]
    excluded = [Concept("other", f"{SAE}/5"), Concept("NAME 6", "elsewhere/1")]
    everything = draw(described, excluded, seed=0, count=100)
    assert everything == [c for i, c in enumerate(described) if i not in (3, 5, 6, 20)]
    few = draw(described, excluded, seed=0, count=5)
    assert (len(few), few) == (5, sorted(few, key=described.index))
    assert few != draw(described, excluded, seed=1, count=5)


def test_lists_of_the_release(shared_data):
    folder = shared_data / "axbench"
    described = read_concepts(folder / "concepts" / "gemma-2-2b_20-gemmascope-res-16k.json")
    names = {concept.feature: concept.text for concept in described}
    assert len(described) == len(names) == 16_383
    concept500 = read_concepts(folder / "concept500" / "2b_l20" / "metadata.jsonl")
    assert len(concept500) == 500
    # Of several descriptions AxBench took the first: 13 of these features have more than one.
    assert all(names[concept.feature] == concept.text for concept in concept500)
    excluded = load_list("ablations10")
    for path in [*folder.glob("concept500/*/metadata.jsonl"), *folder.glob("conceptFD/*/metadata.jsonl")]:
        excluded += read_concepts(path)
    assert len(excluded) == 10 + 4 * 500 + 17 + 16
    ho500 = load_list("ho500")
    assert draw(described, excluded, SEED, COUNT) == ho500
    assert not {c.feature for c in ho500} & {c.feature for c in excluded}
    assert not {normalised(c.text) for c in ho500} & {normalised(c.text) for c in excluded}
    assert all(names[concept.feature] == concept.text for concept in load_list("ablations10"))
