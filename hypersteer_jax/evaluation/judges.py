"""Judges of generated texts: AxBench's three questions, one interface, and judgements that are never paid for twice.

    with Cache(path) as cache:
        judgements = run_judge(judge, items, cache, say=print)  # one per item, in order

A `Judge` rates one text on one question at a time, 0 to 2: *concept* (is it there), *instruction* (is the text about
it), *fluency*. A text's score is the harmonic mean of the three, 0 if any is 0 (AxBench, `lm_judge.py`). A judge that
gives no usable rating has failed; failures are told apart from zeros and counted.

    paper      OpenAI's gpt-4o-mini of a fixed date, as in AxBench
    endpoint   any endpoint that speaks OpenAI's protocol
    local      an instruct model run by our own LM, by its probabilities of the ratings (`lm_judges.py`)
    rules      the tiny world's (`lm_judges.py`)
    proxy      similarity of word embeddings, and perplexity (`lm_judges.py`)
    replay     a table of ratings that were given before
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from hypersteer_jax.config import ConfigError
from hypersteer_jax.evaluation.cache import Cache, Key, Rating, make_key

if TYPE_CHECKING:
    from hypersteer_jax.evaluation.endpoint import Endpoint

Question = Literal["concept", "instruction", "fluency"]
QUESTIONS: tuple[Question, ...] = get_args(Question)
LOWEST, HIGHEST = 0.0, 2.0
PAPER_MODEL = "gpt-4o-mini-2024-07-18"  # AxBench names gpt-4o-mini without a date; this is its only snapshot
NEEDED: dict[Question, tuple[str, ...]] = {
    "concept": ("{concept}", "{text}"),
    "instruction": ("{instruction}", "{text}"),
    "fluency": ("{text}",),
}


class JudgeError(ConfigError):
    """A judge cannot be made; the message names the file or setting, the value and the fix."""


class Item(NamedTuple):
    """A text to be judged."""

    concept: str  # the steering prompt
    instruction: str  # the base prompt, without what prompting adds to it
    text: str  # generated, without the prompt


class Ask(NamedTuple):
    """One question about one text."""

    question: Question
    item: Item
    prompt: str


class Judgement(NamedTuple):
    """Ratings of one text, each 0 to 2; None where the judge failed."""

    concept: float | None
    instruction: float | None
    fluency: float | None

    @property
    def score(self) -> float | None:
        """Harmonic mean of the three, 0 if any is 0; None if any failed."""
        ratings = [rating for rating in self if rating is not None]
        if len(ratings) < len(self):
            return None
        return len(ratings) / sum(1 / rating for rating in ratings) if all(ratings) else 0.0


class Judge(NamedTuple):
    """One interface to all judges."""

    name: str  # with the prompt and the text, all that a score depends on: its key in the cache
    prompt: Callable[[Question, Item], str]
    rate: Callable[[Sequence[Ask]], Iterator[tuple[int, Rating]]]  # index and rating, as they come
    preview: Callable[[Sequence[Ask]], str] = lambda asks: f"{len(asks):,} ratings, free"  # raises if too dear


class Plan(NamedTuple):
    """What has to be asked."""

    keys: list[Key]  # of all ratings, those of an item together, in the order of `QUESTIONS`
    scores: dict[Key, float | None]  # known; None is a failure
    asks: dict[Key, Ask]  # not known yet

    def judgements(self) -> list[Judgement]:
        """One for each item, once nothing is left to ask."""
        rows = range(0, len(self.keys), len(QUESTIONS))
        return [Judgement(*(self.scores[key] for key in self.keys[row : row + len(QUESTIONS)])) for row in rows]


def make_plan(judge: Judge, items: Sequence[Item], cache: Cache, retry_failures: bool = False) -> Plan:
    """What `run_judge` would ask; `judge.preview(list(plan.asks.values()))` says what it costs."""
    asks = [Ask(question, item, judge.prompt(question, item)) for item in items for question in QUESTIONS]
    keys = [make_key(ask.prompt, ask.item.text) for ask in asks]
    scores = cache.scores(judge.name)
    done = {key for key, score in scores.items() if score is not None or not retry_failures}
    return Plan(keys, scores, {key: ask for key, ask in zip(keys, asks, strict=True) if key not in done})


def run_judge(
    judge: Judge,
    items: Sequence[Item],
    cache: Cache,
    retry_failures: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[Judgement]:
    """A judgement of every item; what the cache holds is not asked again, nor is the same question asked twice.

    Args:
        judge: who rates.
        items: what is rated.
        cache: gets each rating as it comes.
        retry_failures: ask again where the judge failed before.
        say: told what the run will cost before it begins, and of failures after it.
    """
    plan = make_plan(judge, items, cache, retry_failures)
    open_keys, asks = list(plan.asks), list(plan.asks.values())
    say(f"{judge.name}: {judge.preview(asks)}; {len(set(plan.keys)) - len(asks):,} known")
    for index, rating in judge.rate(asks):
        cache.put(judge.name, asks[index].question, open_keys[index], rating)
        plan.scores[open_keys[index]] = rating.score
    failed = sum(plan.scores[key] is None for key in plan.keys)
    if failed:
        say(f"{judge.name}: {failed:,} of {len(plan.keys):,} ratings failed; their texts have no score")
    return plan.judgements()


Rubric = dict[Question, str]


def load_rubric(path: Path | None = None) -> Rubric:
    """The three questions as they are put to a language model; without a path, this project's own.

    Args:
        path: a TOML file with a text for each of `concept`, `instruction` and `fluency`, in which {concept},
            {instruction} and {text} are filled in (see `rubric.toml`).

    Raises:
        JudgeError: no such file, not TOML, a question is missing or unknown, or a text lacks what it is to be about.
    """
    name = "rubric.toml" if path is None else str(path)
    try:
        source = resources.files(__package__).joinpath(name) if path is None else path
        rubric = tomllib.loads(source.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise JudgeError(f"rubric_file {name} cannot be read: {error}") from error
    if set(rubric) != set(QUESTIONS):
        raise JudgeError(f"rubric_file {name} has {', '.join(rubric) or 'nothing'}; it needs {', '.join(QUESTIONS)}")
    for question, places in NEEDED.items():
        missing = [place for place in places if not isinstance(rubric[question], str) or place not in rubric[question]]
        if missing:
            raise JudgeError(f"rubric_file {name}: {question} lacks {' and '.join(missing)}; write it into the text")
    return {question: rubric[question].strip() for question in QUESTIONS}


def fill(rubric: Rubric, question: Question, item: Item) -> str:
    """The prompt. What is filled in is left as it is, braces and all."""
    return re.sub(r"\{(concept|instruction|text)\}", lambda place: getattr(item, place[1]), rubric[question])


def parse_rating(reply: str) -> float | None:
    """The number behind the last "Rating:", with or without brackets, as AxBench reads it; None outside 0 to 2."""
    lines = re.findall(r"rating:(.*)", reply, re.IGNORECASE)
    found = re.fullmatch(r"""[\s\[\]*"'`]*(-?\d+(?:\.\d+)?)[\s\[\]*"'`.]*""", lines[-1]) if lines else None
    rating = float(found[1]) if found else None
    return rating if rating is not None and LOWEST <= rating <= HIGHEST else None


def endpoint_judge(endpoint: "Endpoint", rubric: Rubric, max_cost: float | None = None) -> Judge:
    """A language model behind a chat endpoint.

    Args:
        endpoint: the model, where it is, and its price.
        rubric: what it is asked.
        max_cost: dollars; a run that may cost more is refused before its first call.
    """
    from hypersteer_jax.evaluation.endpoint import ask_all, check_cost

    def prompts(asks: Sequence[Ask]) -> list[str]:
        return [ask.prompt for ask in asks]

    def rate(asks: Sequence[Ask]) -> Iterator[tuple[int, Rating]]:
        for index, reply in ask_all(endpoint, prompts(asks), max_cost):
            yield index, Rating(None if reply.failed else parse_rating(reply.text), reply.text)

    name = f"{endpoint.model} at {endpoint.base_url}, temperature {endpoint.temperature:g}"
    return Judge(name, partial(fill, rubric), rate, lambda asks: str(check_cost(endpoint, prompts(asks), max_cost)))


def plain_prompt(question: Question, item: Item) -> str:
    """The question as a judge that needs no words sees it: what tells it apart in the cache."""
    return json.dumps([question, item.concept, item.instruction])


def replay_judge(table: Mapping[Item, Judgement], name: str) -> Judge:
    """Ratings from a table; what it does not hold is a failure."""

    def rate(asks: Sequence[Ask]) -> Iterator[tuple[int, Rating]]:
        for index, (question, item, _) in enumerate(asks):
            row = table.get(item)
            if row is None:
                yield index, Rating(None, "not in the table")
            else:
                yield index, Rating(getattr(row, question), "replayed")

    return Judge(name, plain_prompt, rate)


TEXT = "_steered_generation"  # end of the column with a method's texts in AxBench's files


def rating_columns(method: str) -> list[str]:
    """AxBench's columns of a method's ratings, in the order of `QUESTIONS`."""
    return [
        f"{method}_LMJudgeEvaluator_{what}_ratings"
        for what in ("relevance_concept", "relevance_instruction", "fluency")
    ]


def read_table(path: Path, needed: Sequence[str] = ()) -> pa.Table:
    """A parquet file of AxBench's kind.

    Raises:
        JudgeError: no such file, not parquet, or without a column that is needed.
    """
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:
        raise JudgeError(f"{path} cannot be read as parquet: {error}") from error
    if missing := [name for name in needed if name not in table.column_names]:
        raise JudgeError(
            f"{path} lacks the columns {', '.join(missing)}; give a steering_data.parquet as AxBench writes it"
        )
    return table


def read_texts(path: Path) -> tuple[pa.Table, dict[str, list[Item]]]:
    """An AxBench `steering_data.parquet`: all of it, and the items of every method in it.

    Raises:
        JudgeError: no such file, not parquet, or without the columns that hold concepts, instructions and texts.
    """
    columns = ("input_concept", "original_prompt")
    table = read_table(path, columns)
    methods = [name.removesuffix(TEXT) for name in table.column_names if name.endswith(TEXT)]
    if not methods:
        raise JudgeError(f"{path} has no column *{TEXT}; give a steering_data.parquet as AxBench writes it")
    items = {
        method: list(map(Item, *(table[name].to_pylist() for name in (*columns, method + TEXT)))) for method in methods
    }
    return table, items


def read_ratings(path: Path) -> dict[Item, Judgement]:
    """Ratings of all methods in an AxBench `evaluate/steering_data.parquet`; of equal texts the first whole ones count.

    An AxBench run in suppression mode stores 2 - concept rating in this column; such files replay as they are stored.

    Raises:
        JudgeError: as `read_texts`, or there are texts without ratings.
    """
    table, items = read_texts(path)
    ratings: dict[Item, Judgement] = {}
    for method, rows in items.items():
        names = rating_columns(method)
        missing = [name for name in names if name not in table.column_names]
        if missing:
            raise JudgeError(f"{path} lacks the columns {', '.join(missing)}; give the file in the folder evaluate")
        for item, scores in zip(rows, zip(*(table[name].to_pylist() for name in names), strict=True), strict=True):
            if item not in ratings or None in ratings[item]:  # what was not asked for (`rating.py`) is null, too
                ratings[item] = Judgement(*(_checked(score) for score in scores))
    return ratings


def _checked(score: float | None) -> float | None:
    return score if score is not None and LOWEST <= score <= HIGHEST else None


def table_name(path: Path) -> str:
    """Name of a replay judge: its file and what is in it, so that another table is another judge."""
    return f"replay {path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
