"""Data written by a chat model: what is asked, what is stored, and what a bad server or a kill does to it."""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing

import pyarrow.parquet
import pytest
from rich.console import Console

pytest.importorskip("openai", reason="needs [endpoint]; not run: making data with a chat model")

from hypersteer_jax.data import make as making
from hypersteer_jax.data.batch import DataError
from hypersteer_jax.data.concepts import Concept, read_concepts
from hypersteer_jax.data.make import GENRES, REPLIES, Request, make, make_request
from hypersteer_jax.data.readers import read_axbench_rows, read_categories
from hypersteer_jax.evaluation import endpoint as endpoints
from hypersteer_jax.evaluation.endpoint import Endpoint, EndpointError, Price
from tests.evaluation.server import HANG, Answer, failure, said, serving

QUIET = Console(quiet=True)
CONCEPTS = [Concept("ships", "gemma-2-2b/20-gemmascope-res-16k/7"), Concept("loops in programs"), Concept("sums")]
POOLS = {genre: [f"{genre} question {i} with {{braces}}?" for i in range(9)] for genre in GENRES}
REQUEST = Request(CONCEPTS, POOLS, per_concept=4)
ROWS = 2 * 4 * 3
OF = dict(zip((concept.text for concept in CONCEPTS), ("Text.", "code", "I think: math"), strict=True))


def concept_of(prompt: str) -> str:
    return next(name for name in OF if name in prompt)


def obliging(prompt: str, before: int) -> Answer:
    if "Answer with one of the words" in prompt:
        return said(OF[concept_of(prompt)])
    return said(f" {'with' if 'weave' in prompt else 'without'} {concept_of(prompt)}: {prompt.split('?')[0][-40:]} ")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(endpoints, "FIRST_WAIT", 0.0)


def at(url: str, **settings) -> Endpoint:
    return Endpoint("writer", url, temperature=1.0, max_tokens=192, workers=4, **settings)


def test_rows_of_a_finished_run(tmp_path):
    with serving(obliging) as server:
        assert make(REQUEST, at(server.url), tmp_path, None, False, QUIET)
        assert set(server.calls.values()) == {1}
        assert len(server.calls) == 3 + ROWS
        assert {(r["model"], r["temperature"], r["max_tokens"]) for r in server.requests} == {("writer", 1.0, 192)}
        assert make(REQUEST, at(server.url), tmp_path, None, False, QUIET)
        assert server.calls.total() == 3 + ROWS  # nothing is asked twice
    table = tmp_path / "train_data.parquet"
    assert read_categories(table) == {"positive": 12, "negative": 12}
    rows, _ = read_axbench_rows(table)
    assert Counter((row.example.concept, row.genre, row.concept_id) for row in rows) == {
        ("ships", "text", 0): 4,
        ("loops in programs", "code", 1): 4,
        ("sums", "math", 2): 4,
    }
    for example, _, genre in rows:
        assert example.prompt in POOLS[genre]
        assert example.response.startswith(f"with {example.concept}: ")
    cells = pyarrow.parquet.read_table(table).to_pylist()
    negatives = [row for row in cells if row["category"] == "negative"]
    assert {row["output_concept"] for row in negatives} == {"EEEEE"}
    assert {(row["concept_id"], row["input"]) for row in negatives} == {
        (row.concept_id, row.example.prompt) for row in rows
    }
    assert read_concepts(tmp_path / "metadata.jsonl") == [
        concept._replace(concept_id=index) for index, concept in enumerate(CONCEPTS)
    ]
    about = json.loads((tmp_path / "metadata.jsonl").read_text().splitlines()[1])
    assert about["concept_genres_map"] == {"loops in programs": ["code"]}


def test_what_is_asked():
    asks = making._asks(REQUEST, CONCEPTS[0], "text")
    assert asks == making._asks(REQUEST._replace(concepts=[]), CONCEPTS[0], "text")
    assert asks != making._asks(REQUEST._replace(seed=1), CONCEPTS[0], "text")
    assert [a.instruction for a in asks[:4]] == [a.instruction for a in asks[4:]]
    assert len({a.instruction for a in asks}) == 4
    for ask in asks:
        assert ask.instruction in ask.prompt
        assert "ships" in ask.prompt
    assert len({a.prompt for a in asks}) == 8


@pytest.mark.parametrize(
    ("reply", "genre"),
    [("Math", "math"), ("**code**", "code"), ("It is a text, not code.", "text"), ("mathematics?", "text")],
)
def test_genre_of_a_reply(reply, genre):
    assert making._genre(reply) == genre


def test_a_server_that_misbehaves_is_asked_again(tmp_path):
    half = obliging("weave ships question?", 0)._replace(cut=40)
    broken = [failure(429, retry_after="0"), failure(500), half, Answer('{"choices": [')]

    def behave(prompt: str, before: int) -> Answer:
        return broken[before] if before < len(broken) else obliging(prompt, before)

    with serving(behave) as server:
        assert make(REQUEST, at(server.url), tmp_path, None, False, QUIET)
        assert set(server.calls.values()) == {len(broken) + 1}
    assert read_categories(tmp_path / "train_data.parquet").total() == ROWS


def test_what_fails_is_counted_and_asked_by_the_next_run(tmp_path):
    def behave(prompt: str, before: int) -> Answer:
        return said(None) if "loops" in prompt and "hint" in prompt else obliging(prompt, before)

    console = Console(record=True, width=200)
    with serving(behave) as server:
        assert not make(REQUEST, at(server.url), tmp_path, None, False, console)
    shown = console.export_text()
    assert "4 rows are missing; run again" in shown
    assert "4 × no text, finish_reason 'content_filter'" in shown
    assert read_categories(tmp_path / "train_data.parquet") == {"positive": 12, "negative": 8}
    with serving(obliging) as server:
        assert make(REQUEST, at(server.url), tmp_path, None, False, QUIET)
        assert server.calls.total() == 4
    assert read_categories(tmp_path / "train_data.parquet") == {"positive": 12, "negative": 12}


def test_a_concept_whose_genre_fails_waits_for_the_next_run(tmp_path):
    def behave(prompt: str, before: int) -> Answer:
        return said(None) if "Answer with one of" in prompt and "sums" in prompt else obliging(prompt, before)

    with serving(behave) as server:
        assert not make(REQUEST, at(server.url), tmp_path, None, False, QUIET)
    assert read_categories(tmp_path / "train_data.parquet").total() == 16
    assert [concept.text for concept in read_concepts(tmp_path / "metadata.jsonl")] == ["ships", "loops in programs"]
    with serving(obliging) as server:
        assert make(REQUEST, at(server.url), tmp_path, None, False, QUIET)
        assert server.calls.total() == 1 + 8


def test_cost_is_known_before_the_first_call(tmp_path):
    price = Price(1.0, 1000.0, "today")
    most = (3 + ROWS) * 192 * 1000 / 1e6  # of the replies; the prompts cost less than a cent
    console = Console(record=True, width=200)
    with serving(obliging) as server:
        with pytest.raises(
            EndpointError, match=r"max_cost is 5 dollars and this is 27 calls, .* 5\.19 dollars at most"
        ):
            make(REQUEST, at(server.url, price=price), tmp_path / "out", 5.0, False, QUIET)
        with pytest.raises(EndpointError, match="max_cost is 5 and the price of writer is not known; give the price"):
            make(REQUEST, at(server.url), tmp_path / "out", 5.0, False, QUIET)
        assert make(REQUEST, at(server.url, price=price), tmp_path / "out", most + 0.01, True, console)
        assert not server.calls
        assert not (tmp_path / "out").exists()
        assert make(REQUEST, at(server.url, price=price), tmp_path / "out", most + 0.01, False, QUIET)
        make(REQUEST, at(server.url, price=price), tmp_path / "out", 0.0, True, console)  # nothing is left to pay
    shown = console.export_text()
    assert "3 concepts, 0 replies there already; to go: 27 calls, " in shown
    assert "3 concepts, 27 replies there already; to go: 0 calls, " in shown


def test_replies_of_two_models_are_not_mixed(tmp_path):
    with serving(obliging) as server:
        make(REQUEST, at(server.url), tmp_path, None, False, QUIET)
        other = at(server.url)._replace(model="other")
        with pytest.raises(
            DataError, match=r'replies\.sqlite: replies of .*"writer".* and this is .*"other".*; give another'
        ):
            make(REQUEST, other, tmp_path, None, False, QUIET)
    (tmp_path / REPLIES).write_bytes(b"no database at all, but long enough to be looked at" * 20)
    with pytest.raises(DataError, match=r"replies\.sqlite: not a file of replies"):
        make(REQUEST, at("http://127.0.0.1:9/v1"), tmp_path, None, True, QUIET)


def write_inputs(folder):
    (folder / "concepts.jsonl").write_text("".join(json.dumps({"concept": c.text}) + "\n" for c in CONCEPTS))
    lines = [{"genre": genre, "instruction": text} for genre, pool in POOLS.items() for text in pool]
    (folder / "pool.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_kill_9_and_go_on(tmp_path):
    write_inputs(tmp_path)
    out, enough = tmp_path / "out", 12
    hang = True

    def behave(prompt: str, before: int) -> Answer | str:
        return HANG if hang and server.calls.total() > enough else obliging(prompt, before)

    words = ["data", "make", "concepts.jsonl", "--instructions", "pool.jsonl", "--out", out, "--per-concept", 4]
    with serving(behave) as server:
        words += ["--model", "writer", "--base-url", server.url, "--workers", 4]
        command = [sys.executable, "-m", "hypersteer_jax.cli", *map(str, words)]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
        stored, deadline = 0, time.monotonic() + 60
        while stored < enough and time.monotonic() < deadline:
            time.sleep(0.05)
            if (out / REPLIES).exists():
                with closing(sqlite3.connect(out / REPLIES)) as replies:
                    has_table = replies.execute("SELECT 1 FROM sqlite_master WHERE name = 'replies'").fetchone()
                    [stored] = replies.execute("SELECT count(*) FROM replies").fetchone() if has_table else [0]
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert stored == enough
        assert not (out / "train_data.parquet").exists()
        before, hang = server.calls.copy(), False
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "3 concepts, 12 replies there already" in done.stdout.replace("\n", " ")
        again = server.calls - before
        assert again.total() == 3 + ROWS - enough  # what was under way at the kill is asked again, the rest is not
    assert read_categories(out / "train_data.parquet") == {"positive": 12, "negative": 12}


def test_what_is_to_be_made_is_checked_first(tmp_path):
    write_inputs(tmp_path)
    concepts, pool = tmp_path / "concepts.jsonl", [tmp_path / "pool.jsonl"]
    request = make_request(str(concepts), pool, 4, 0)
    assert request == REQUEST._replace(concepts=[Concept(c.text) for c in CONCEPTS])
    with pytest.raises(DataError, match="per_concept is 10, but there are 9 instructions of genre text; add some"):
        make_request(str(concepts), pool, 10, 0)
    with pytest.raises(DataError, match="per_concept is 0; give at least 1"):
        make_request(str(concepts), pool, 0, 0)
    with concepts.open("a") as lines:
        lines.write('{"concept": " SHIPS! "}\n')
    assert make_request(str(concepts), pool, 4, 0) == request  # the same concept again
    concepts.write_text('{"concept_id": 7}')
    with pytest.raises(DataError, match="7 has no name; give the concept's text"):
        make_request(str(concepts), pool, 4, 0)
    assert len(make_request("ho500", pool, 4, 0).concepts) == 500


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"genre": "prose", "instruction": "Hi"}',
            r"row 0 \(counted from 0\): genre 'prose', instruction 'Hi'; give text",
        ),
        ('{"genre": "text", "instruction": " "}', r"genre 'text', instruction ' '"),
        ('{"genre": "text"}', r"pool\.jsonl: KeyError\('instruction'\); write"),
        ("[1]", r"pool\.jsonl: TypeError"),
        ("{", r"pool\.jsonl: JSONDecodeError"),
    ],
)
def test_bad_pools(tmp_path, line, message):
    write_inputs(tmp_path)
    (tmp_path / "pool.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        make_request(str(tmp_path / "concepts.jsonl"), [tmp_path / "pool.jsonl"], 4, 0)


def test_instructions_of_the_release(shared_data):
    paths = sorted((shared_data / "axbench").glob("concept10/*/train_data.parquet"))
    request = make_request("ablations10", paths, 72, 0)
    assert len(request.concepts) == 10
    assert all(len(pool) >= 72 for pool in request.pools.values())
