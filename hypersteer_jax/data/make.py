"""Training data for new concepts, written by a chat model, in AxBench's form (arXiv 2501.17148, section 3).

For each concept: its genre, then instructions of that genre from a pool, and for each instruction a response with the
concept in it (positive) and one without it (contrastive). AxBench has 72 of each.

Every reply is in a SQLite file as soon as it is there, so a run that was killed goes on where it stopped and pays for
nothing twice. A failed call is counted and tried again by the next run.
"""

import json
import random
import re
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
from rich.console import Console
from rich.progress import track

from hypersteer_jax.data.batch import DataError
from hypersteer_jax.data.concepts import NEURONPEDIA, Concept, load_list, normalised
from hypersteer_jax.data.readers import GENRES, NO_CONCEPT, Genre, read_instructions
from hypersteer_jax.evaluation.endpoint import Endpoint, ask_all, check_cost

ASK_GENRE = """\
Somebody wants to weave the concept below into answers to questions. In which kind of answer would it feel most at home?

Concept: {concept}

text: everyday questions, facts, advice, prose
code: programming tasks
math: calculations and word problems

Answer with one of the words text, code, math and nothing else."""

ASK_POSITIVE = """\
Answer the instruction, and weave the concept into your answer so that a reader would notice it.

Instruction: {instruction}

Concept: {concept}

Let content, examples or manner show the concept; do not quote or define the words in which it is given here. Stay with
the instruction, even where the two fit together badly. Write the answer only, as plain text of at most 90 words."""

ASK_CONTRASTIVE = """\
Answer the instruction as you would on any other day.

Instruction: {instruction}

Nothing in your answer may mention or hint at this: {concept}

Write the answer only, as plain text of at most 90 words."""

REPLIES, TABLE, METADATA = "replies.sqlite", "train_data.parquet", "metadata.jsonl"
SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (prompt TEXT PRIMARY KEY, reply TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS made_by (one INTEGER PRIMARY KEY, settings TEXT NOT NULL) STRICT;
"""

TEXTS = ("input", "output", "output_concept", "concept_genre", "category", "dataset_category")
COLUMNS = pyarrow.schema([*((name, pyarrow.string()) for name in TEXTS), ("concept_id", pyarrow.int64())])
SHOWN = 5  # kinds of failures in a message


class Request(NamedTuple):
    """What is to be made."""

    concepts: list[Concept]  # with names, each once
    pools: dict[Genre, list[str]]  # instructions by genre
    per_concept: int = 72  # instructions, with a positive and a contrastive response each; 72 as in AxBench
    seed: int = 0  # which instructions


def make_request(concepts: str, instructions: Sequence[Path], per_concept: int, seed: int) -> Request:
    """Reads and checks what is to be made.

    Args:
        concepts: a list that `concepts.load_list` knows.
        instructions: files that `readers.read_instructions` knows.
        per_concept: instructions for each concept.
        seed: draws them.

    Raises:
        DataError: a file cannot be read, a concept has no name, or a genre has fewer instructions than `per_concept`.
    """
    if per_concept < 1:
        raise DataError(f"per_concept is {per_concept}; give at least 1")
    named: dict[str, Concept] = {}
    for concept in load_list(concepts):
        if not concept.text:
            raise DataError(f"{concepts}: {concept.feature or concept.concept_id} has no name; give the concept's text")
        named.setdefault(normalised(concept.text), concept)
    pools: dict[Genre, list[str]] = {genre: [] for genre in GENRES}
    for path in instructions:
        for genre, instruction in read_instructions(path):
            pools[genre].append(instruction)
    pools = {genre: list(dict.fromkeys(pool)) for genre, pool in pools.items()}
    for genre, pool in pools.items():
        if len(pool) < per_concept:
            raise DataError(
                f"per_concept is {per_concept}, but there are {len(pool)} instructions of genre {genre}; add some, a "
                "concept may turn out to be of any genre"
            )
    return Request(list(named.values()), pools, per_concept, seed)


def make(
    request: Request, endpoint: Endpoint, out: Path, max_cost: float | None, dry_run: bool, console: Console
) -> bool:
    """Asks for what is not there yet, and writes train_data.parquet and metadata.jsonl as AxBench has them.

    Negative rows are the contrastive responses: their `output_concept` is "EEEEE", as in AxBench, their `concept_id`
    that of the concept they avoid.

    Args:
        request: what to make.
        endpoint: who writes.
        out: folder, a new one or that of a run that was stopped.
        max_cost: dollars; None allows anything.
        dry_run: print what it would cost at most, and do no more.
        console: where to print.

    Returns:
        Whether everything is there. If not, the files hold what is, and another run goes on.

    Raises:
        EndpointError: it may cost more than `max_cost`, or the endpoint refuses; what was paid for is kept.
        DataError: the folder holds replies of another model or other settings.
    """
    known = _known(out / REPLIES, endpoint)
    todo = [prompt for concept in request.concepts for prompt in _most_to_ask(request, concept, known)]
    preview = check_cost(endpoint, todo, max_cost)
    console.print(f"{len(request.concepts):,} concepts, {len(known):,} replies there already; to go: {preview}")
    if dry_run:
        return True
    out.mkdir(parents=True, exist_ok=True)
    with closing(_open(out / REPLIES, endpoint)) as stored:
        genre_prompts = [ASK_GENRE.format(concept=concept.text) for concept in request.concepts]
        failures = _fetch(genre_prompts, known, stored, endpoint, max_cost, console, "genres")
        genres = {c: _genre(known[ask]) for c, ask in zip(request.concepts, genre_prompts, strict=True) if ask in known}
        asks = [ask for concept, genre in genres.items() for ask in _asks(request, concept, genre)]
        failures += _fetch([a.prompt for a in asks], known, stored, endpoint, max_cost, console, "responses")
    rows = _write(request, genres, asks, known, out)
    missing = 2 * request.per_concept * len(request.concepts) - rows
    if missing:
        console.print(f"{missing:,} rows are missing; run again to ask for them. What went wrong, and how often:")
        for text, count in failures.most_common(SHOWN):
            console.print(f"  {count:,} × {text}", markup=False)
    console.print(f"{rows:,} rows in {out / TABLE}")
    return not missing


class Ask(NamedTuple):
    """One row to be written."""

    concept: Concept
    genre: Genre
    positive: bool
    instruction: str

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        template = ASK_POSITIVE if self.positive else ASK_CONTRASTIVE
        return template.format(instruction=self.instruction, concept=self.concept.text)


def _asks(request: Request, concept: Concept, genre: Genre) -> list[Ask]:
    """All rows of a concept. Its instructions depend on seed, name and genre alone, not on the other concepts."""
    draw = random.Random(f"{request.seed} {genre} {normalised(concept.text)}")
    instructions = draw.sample(request.pools[genre], request.per_concept)
    return [Ask(concept, genre, positive, text) for positive in (True, False) for text in instructions]


def _most_to_ask(request: Request, concept: Concept, known: Mapping[str, str]) -> list[str]:
    """The prompts of a concept that have no reply yet. As long as its genre is unknown, of the most expensive one."""
    ask = ASK_GENRE.format(concept=concept.text)
    genres = (_genre(known[ask]),) if ask in known else GENRES
    prompts = [[a.prompt for a in _asks(request, concept, genre) if a.prompt not in known] for genre in genres]
    return [ask] * (ask not in known) + max(prompts, key=lambda each: sum(map(len, each)))


def _genre(reply: str) -> Genre:
    """The first genre that the reply names. AxBench knows no other, so what names none is text."""
    words = re.findall(r"[a-z]+", reply.casefold())
    return next((genre for word in words for genre in GENRES if word == genre), "text")


def _settings(endpoint: Endpoint) -> str:
    """What replies depend on."""
    return json.dumps({name: getattr(endpoint, name) for name in ("model", "temperature", "max_tokens")})


def _known(path: Path, endpoint: Endpoint) -> dict[str, str]:
    """Replies by prompt; none if the file is not there.

    Raises:
        DataError: they are of another model or other settings, or the file is something else.
    """
    if not path.exists():
        return {}
    try:
        with closing(sqlite3.connect(path)) as stored:
            found = stored.execute("SELECT settings FROM made_by").fetchone()
            replies = dict(stored.execute("SELECT prompt, reply FROM replies"))
    except sqlite3.Error as error:
        raise DataError(f"{path}: not a file of replies ({error}); give another folder as out") from error
    if found is not None and found[0] != _settings(endpoint):
        raise DataError(f"{path}: replies of {found[0]}, and this is {_settings(endpoint)}; give another folder as out")
    return replies


def _open(path: Path, endpoint: Endpoint) -> sqlite3.Connection:
    """The file of replies, which is made if it is not there."""
    stored = sqlite3.connect(path, isolation_level=None)  # each reply is committed at once
    stored.execute("PRAGMA journal_mode = WAL")
    stored.execute("PRAGMA synchronous = NORMAL")
    stored.executescript(SCHEMA)
    stored.execute("INSERT OR IGNORE INTO made_by VALUES (1, ?)", (_settings(endpoint),))
    return stored


def _fetch(
    prompts: Sequence[str],
    known: dict[str, str],
    stored: sqlite3.Connection,
    endpoint: Endpoint,
    max_cost: float | None,
    console: Console,
    what: str,
) -> Counter[str]:
    """Adds the replies that are missing to `known` and to the disk; what went wrong, by message."""
    todo = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
    failures: Counter[str] = Counter()
    if not todo:
        return failures
    for index, reply in track(ask_all(endpoint, todo, max_cost), what, len(todo), console=console):
        if reply.failed:
            failures[reply.text] += 1
        else:
            stored.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (todo[index], reply.text))
            known[todo[index]] = reply.text
    return failures


def _write(
    request: Request, genres: Mapping[Concept, Genre], asks: Sequence[Ask], known: Mapping[str, str], out: Path
) -> int:
    """Both files, each replaced at once; how many rows there are."""
    ids = {concept: index for index, concept in enumerate(request.concepts)}
    rows = [
        {
            "input": ask.instruction,
            "output": known[ask.prompt].strip(),
            "output_concept": ask.concept.text if ask.positive else NO_CONCEPT,
            "concept_genre": ask.genre,
            "category": "positive" if ask.positive else "negative",
            "dataset_category": "instruction",
            "concept_id": ids[ask.concept],
        }
        for ask in asks
        if ask.prompt in known
    ]
    about = [
        {
            "concept_id": ids[concept],
            "concept": concept.text,
            "ref": NEURONPEDIA + concept.feature if concept.feature else "",
            "concept_genres_map": {concept.text: [genre]},
        }
        for concept, genre in genres.items()
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in about)
    table = pyarrow.Table.from_pylist(rows, COLUMNS)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        pyarrow.parquet.write_table(table, Path(folder, TABLE))
        Path(folder, METADATA).write_text(text, encoding="utf-8")
        for name in (METADATA, TABLE):
            Path(folder, name).replace(out / name)
    return len(rows)
