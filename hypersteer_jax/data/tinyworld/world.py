"""Topics, manners and subjects, and every text that is made of them, by seed.

A *subject* is what an instruction asks about ("Describe the moon."). A *concept* is what steering brings in: a topic
("references to sailing"), a manner ("the style of pirate talk"), or a topic in a manner. A positive response follows
the instruction and brings the concept in. An answer that nothing is asked of but its subject mostly wanders off to a
topic of its own choice, at times in some manner, as the texts of a real corpus do: each concept is a latent variable
with a broad prior, which a prompt settles, and which a steering vector can.

What is held out from steering, and how it is told apart (all by a fixed hash, so no seed can leak it):

- topics: every sixth or so topic never occurs in a steering example (`unseen topics`);
- pairs: a share of topic-manner pairs of known topics never occurs (`unseen pairs`), another share belongs to the base
  LM's corpus alone, so that prompting for a pair is learnt without ever seeing a pair that steering is scored on;
- phrasings: the third name of every topic and manner, and some sentence frames, occur in no steering example
  (`unseen phrasings`);
- cells: each concept meets half of the subjects in the corpus and the other half in steering, so no steering example,
  trained on or scored, stands in the corpus.
"""

import json
import random
import zlib
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Literal, NamedTuple

from hypersteer_jax.data.batch import SteeringExample

Split = Literal["train", "held_out", "corpus"]
Kind = Literal["topic", "manner", "pair"]

INSTRUCTIONS = (
    "Describe {}.",
    "Tell me about {}.",
    "Write about {}.",
    "What is {} like?",
    "Say something about {}.",
    "Give me a few lines on {}.",
)
REQUESTS = ("Include {}.", "Your answer should contain {}.", "Please work in {}.", "Bring in {}.")
# Frames of a steering prompt; the last two of each kind are held out.
TOPIC_FRAMES = (
    "references to {}",
    "mentions of {}",
    "terms related to {}",
    "words about {}",
    "text that brings up {}",
    "language concerning {}",
    "anything to do with {}",
    "content on the subject of {}",
)
MANNER_FRAMES = (
    "the style of {}",
    "speech that sounds like {}",
    "the tone of {}",
    "answers given in {}",
    "a voice like {}",
    "the manner of {}",
    "sentences with the ring of {}",
)
HELD_OUT_FRAMES = 2
TOPIC_SENTENCES = (
    "It reminds me of the {}, the {} and the {}.",
    "I think of the {}, the {} and the {}.",
    "Nearby are the {}, the {} and the {}.",
    "It has a touch of the {}, the {} and the {}.",
    "People there speak of the {}, the {} and the {}.",
    "You can almost see the {}, the {} and the {}.",
    "Behind it wait the {}, the {} and the {}.",
    "Nothing suits it like the {}, the {} and the {}.",
)


class Topic(NamedTuple):
    """Three phrasings, and twelve nouns that no other topic, subject, opener, closer or frame holds."""

    name: str
    names: tuple[str, ...]
    words: tuple[str, ...]


class Manner(NamedTuple):
    """Openers and closers carry the manner; each holds at least two of its `markers`."""

    name: str
    names: tuple[str, ...]
    openers: tuple[str, ...]
    closers: tuple[str, ...]
    markers: tuple[str, ...]


class Subject(NamedTuple):
    """Every sentence holds at least one of the `keywords`."""

    name: str
    keywords: tuple[str, ...]
    sentences: tuple[str, ...]


class Concept(NamedTuple):
    """A topic, a manner, or both."""

    topic: Topic | None
    manner: Manner | None

    @property
    def key(self) -> str:
        """Name that identifies the concept, such as "sailing", "pirate" or "sailing + pirate"."""
        return " + ".join(part.name for part in self if part is not None)

    @property
    def kind(self) -> Kind:
        """What it is made of."""
        if self.topic is None:
            return "manner"
        return "topic" if self.manner is None else "pair"


class World(NamedTuple):
    """All there is."""

    topics: tuple[Topic, ...]
    manners: tuple[Manner, ...]
    subjects: tuple[Subject, ...]


@cache
def load_world() -> World:
    """The world as shipped in the package."""

    def rows(name: str) -> list[dict]:
        text = resources.files(__package__).joinpath(f"{name}.json").read_text("utf-8")
        return [{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for row in json.loads(text)]

    return World(
        tuple(Topic(**row) for row in rows("topics")),
        tuple(Manner(**row) for row in rows("manners")),
        tuple(Subject(**row) for row in rows("subjects")),
    )


def _share(*parts: str) -> float:
    """A number in [0, 1) that depends on the strings only."""
    return zlib.crc32("|".join(parts).encode()) / 2**32


def split_of(concept: Concept) -> Split:
    """Where a concept belongs: trained on, held out, or in the base LM's corpus only (some pairs)."""
    if concept.topic is not None and _share("topic", concept.topic.name) < 0.16:
        return "held_out"
    if concept.kind != "pair":
        return "train"
    share = _share("pair", concept.key)
    return "corpus" if share < 0.2 else "held_out" if share < 0.35 else "train"


def is_unseen_pair(concept: Concept) -> bool:
    """A held-out pair whose topic and manner both occur in training, apart."""
    return (
        concept.kind == "pair" and split_of(concept) == "held_out" and split_of(Concept(concept.topic, None)) == "train"
    )


def in_corpus(concept: Concept, subject: Subject) -> bool:
    """Whether the corpus, rather than steering, owns this meeting of concept and subject."""
    return _share("cell", concept.key, subject.name) < 0.5


def concepts(world: World, kind: Kind, split: Split) -> list[Concept]:
    """All concepts of a kind in a split, in a fixed order. Held-out pairs are those with known parts."""
    if kind == "topic":
        candidates = [Concept(topic, None) for topic in world.topics]
    elif kind == "manner":
        candidates = [Concept(None, manner) for manner in world.manners]
    else:
        candidates = [Concept(topic, manner) for topic in world.topics for manner in world.manners]
    chosen = [concept for concept in candidates if split_of(concept) == split]
    return [c for c in chosen if is_unseen_pair(c)] if (kind, split) == ("pair", "held_out") else chosen


def steering_prompt(concept: Concept, rng: random.Random, phrasings: Literal["known", "held_out", "all"]) -> str:
    """One phrasing of a concept.

    Args:
        concept: what to phrase.
        rng: picks name and frame.
        phrasings: those of steering examples, those that no steering example holds, or all of them (the corpus: the
            base LM has to know the words, as any real one would).
    """

    def phrase(names: tuple[str, ...], frames: tuple[str, ...]) -> str:
        if phrasings == "known":
            names, frames = names[:-1], frames[:-HELD_OUT_FRAMES]
        elif phrasings == "held_out":
            names, frames = names[-1:], frames[-HELD_OUT_FRAMES:]
        return rng.choice(frames).format(rng.choice(names))

    topic, manner = concept
    phrases = [phrase(topic.names, TOPIC_FRAMES)] if topic is not None else []
    if manner is not None:
        phrases.append(phrase(manner.names, MANNER_FRAMES))
    return ", in ".join(phrases)


def instruction(subject: Subject, rng: random.Random) -> str:
    """A request for an answer about the subject."""
    return rng.choice(INSTRUCTIONS).format(subject.name)


def prompted(text: str, phrasing: str, rng: random.Random) -> str:
    """The instruction with the steering prompt asked for in words: prompting, the rival."""
    return f"{text} {rng.choice(REQUESTS).format(phrasing)}"


def topic_sentence(topic: Topic, rng: random.Random) -> str:
    """A sentence with three of the topic's words."""
    return rng.choice(TOPIC_SENTENCES).format(*rng.sample(topic.words, 3))


def answer(concept: Concept | None, subject: Subject, rng: random.Random) -> str:
    """Two sentences about the subject; a topic takes the second, a manner opens and closes, no concept is neutral."""
    topic, manner = concept or (None, None)
    body = rng.sample(subject.sentences, 2)
    if topic is not None:
        body[1] = topic_sentence(topic, rng)
    if manner is not None:
        body = [rng.choice(manner.openers), *body, rng.choice(manner.closers)]
    return " ".join(body)


def steering_subjects(world: World, concept: Concept) -> list[Subject]:
    """Subjects that meet this concept in steering, never in the corpus; every fourth is kept for scoring."""
    return [subject for subject in world.subjects if not in_corpus(concept, subject)]


def scoring_subjects(world: World, concept: Concept) -> list[Subject]:
    """Subjects that meet this concept only when it is scored."""
    return steering_subjects(world, concept)[::4]


def steering_concepts(seed: int, max_concepts: int | None, held_out: bool) -> dict[Kind, list[Concept]]:
    """Concepts of `training_examples` with these arguments, by kind."""
    world = load_world()
    split: Split = "held_out" if held_out else "train"
    kinds: tuple[Kind, ...] = ("topic", "pair") if held_out else ("topic", "manner", "pair")
    pools = {kind: concepts(world, kind, split) for kind in kinds}
    if max_concepts is None:
        return pools
    return {kind: random.Random(seed).sample(pool, min(max_concepts, len(pool))) for kind, pool in pools.items()}


def training_examples(
    count: int, seed: int = 0, max_concepts: int | None = None, held_out: bool = False
) -> list[SteeringExample]:
    """Steering examples: half of them topics, an eighth manners, the rest pairs.

    Args:
        count: how many.
        seed: decides concepts, subjects, phrasings and responses.
        max_concepts: use only this many training concepts of each kind that has more (scaling experiments).
        held_out: examples of held-out topics and pairs instead, for a held-out loss.
    """
    world, rng = load_world(), random.Random(seed)
    pools = steering_concepts(seed, max_concepts, held_out)
    examples, met = [], {}
    for kind in rng.choices(list(pools), (4, 4) if held_out else (4, 1, 3), k=count):
        concept = rng.choice(pools[kind])
        if concept.key not in met:
            scoring = () if held_out else scoring_subjects(world, concept)
            met[concept.key] = [subject for subject in steering_subjects(world, concept) if subject not in scoring]
        subject = rng.choice(met[concept.key])
        examples.append(
            SteeringExample(
                steering_prompt=steering_prompt(concept, rng, "known"),
                prompt=instruction(subject, rng),
                response=answer(concept, subject, rng),
                concept=concept.key,
            )
        )
    return examples


def corpus(seed: int) -> Iterator[tuple[str | None, str]]:
    """Endless documents for pretraining the base LM, as (instruction or None, text).

    Plain texts name a topic or manner beside its words, or only hold words of one topic. Chats answer about a subject:
    some neutral, most with a concept that the prompt asks for by name, hints at by a few of its words, or leaves open.
    Every topic occurs, the held-out ones too: what is held out is steering to them.
    """
    world, rng = load_world(), random.Random(seed)
    pools = {
        "topic": [Concept(topic, None) for topic in world.topics],
        "manner": [Concept(None, manner) for manner in world.manners],
        "pair": concepts(world, "pair", "corpus"),
    }
    # Plain texts, then chats by what the prompt says of the concept, and its kind.
    shares: dict[tuple[str, Kind | None], float] = {
        ("list", None): 4,
        ("story", None): 2,
        ("bag", None): 1.5,
        ("named", "topic"): 6,
        ("named", "manner"): 1.5,
        ("named", "pair"): 3,
        ("hinted", "topic"): 1.5,
        ("open", "topic"): 2.5,
        ("open", "pair"): 0.8,
        ("open", None): 0.8,
    }
    while True:
        how, kind = rng.choices(list(shares), list(shares.values()))[0]
        concept: Concept | None
        if how in ("list", "bag"):
            topic = rng.choice(world.topics)
            title = f"{steering_prompt(Concept(topic, None), rng, 'all')}: " if how == "list" else ""
            yield None, f"{title}{_listed(topic, 9, rng)}."
        elif how == "story":
            concept = rng.choice(pools["topic"] + pools["manner"] * 3)
            title, lines = steering_prompt(concept, rng, "all"), []
            if concept.topic is not None:
                lines += [topic_sentence(concept.topic, rng) for _ in range(2)]
            if concept.manner is not None:
                lines += [rng.choice(concept.manner.openers), rng.choice(concept.manner.closers)]
            yield None, f"{title}. {' '.join(lines)}"
        else:
            concept = rng.choice(pools[kind]) if kind else None
            subject = rng.choice([s for s in world.subjects if concept is None or in_corpus(concept, s)])
            asked = instruction(subject, rng)
            if how == "hinted" and concept is not None and concept.topic is not None:
                asked = f"{asked} Think of {_listed(concept.topic, 3, rng)}."
            elif how == "named" and concept is not None:
                asked = prompted(asked, steering_prompt(concept, rng, "all"), rng)
            yield asked, answer(concept, subject, rng)


def _listed(topic: Topic, count: int, rng: random.Random) -> str:
    """Some of the topic's words, such as "the anchor, the mast"."""
    return ", ".join(f"the {word}" for word in rng.sample(topic.words, count))
