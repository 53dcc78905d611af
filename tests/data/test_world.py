"""The tiny world: rich enough, without ambiguities, and nothing that is scored leaks into what is trained on."""

import random
import re
from collections import Counter
from collections.abc import Iterable
from itertools import islice

import pytest

from hypersteer_jax.data.tinyworld.world import (
    HELD_OUT_FRAMES,
    INSTRUCTIONS,
    MANNER_FRAMES,
    REQUESTS,
    TOPIC_FRAMES,
    TOPIC_SENTENCES,
    Concept,
    Subject,
    answer,
    concepts,
    corpus,
    in_corpus,
    is_unseen_pair,
    load_world,
    scoring_subjects,
    split_of,
    steering_prompt,
    steering_subjects,
    training_examples,
)

WORLD = load_world()
EXAMPLES = training_examples(6000)
HELD_OUT = training_examples(2000, held_out=True)
DOCUMENTS = list(islice(corpus(5), 8000))
CONCEPTS = {c.key: c for kind in ("topic", "manner", "pair") for split in ("train", "held_out", "corpus")
            for c in concepts(WORLD, kind, split)}  # fmt: skip
SUBJECT_OF = {frame.format(subject.name): subject for subject in WORLD.subjects for frame in INSTRUCTIONS}
TOPIC_OF = {word: topic for topic in WORLD.topics for word in topic.words}
MANNER_OF = {sentence: manner for manner in WORLD.manners for sentence in (*manner.openers, *manner.closers)}


def words(texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word in re.findall(r"[a-z']+", text.lower())}


def phrasings(concept: Concept, kept: bool) -> set[str]:
    """All known, or all held-out, steering prompts of a concept, by the rule of the module's docstring."""

    def of(names: tuple[str, ...], frames: tuple[str, ...]) -> list[str]:
        names = names[:2] if kept else names[2:]
        frames = frames[:-HELD_OUT_FRAMES] if kept else frames[-HELD_OUT_FRAMES:]
        return [frame.format(name) for frame in frames for name in names]

    topic = [""] if concept.topic is None else of(concept.topic.names, TOPIC_FRAMES)
    manner = [""] if concept.manner is None else of(concept.manner.names, MANNER_FRAMES)
    return {", in ".join(part for part in (one, two) if part) for one in topic for two in manner}


def test_counts() -> None:
    assert len(WORLD.topics) >= 240
    assert min(len(topic.words) for topic in WORLD.topics) >= 12
    assert len(WORLD.manners) >= 24
    assert len(WORLD.subjects) >= 48
    assert {len(each.names) for each in (*WORLD.topics, *WORLD.manners)} == {3}
    assert len(CONCEPTS) > 2000
    least = {("topic", "train"): 200, ("topic", "held_out"): 40, ("pair", "train"): 2000, ("pair", "held_out"): 500}
    for (kind, split), count in least.items():
        assert len(concepts(WORLD, kind, split)) >= count, (kind, split)
    assert len(concepts(WORLD, "manner", "train")) == len(WORLD.manners)


def test_topic_words_belong_to_one_topic_and_to_nothing_else() -> None:
    counts = Counter(word for topic in WORLD.topics for word in topic.words)
    assert [word for word, count in counts.items() if count > 1] == []
    assert words(counts) == set(counts)  # whole lower-case words, as the judge reads them
    elsewhere = {
        "subjects": words(text for s in WORLD.subjects for text in (s.name, *s.keywords, *s.sentences)),
        "manners": words(text for m in WORLD.manners for text in (*m.openers, *m.closers, *m.markers)),
        "frames": words((*INSTRUCTIONS, *REQUESTS, *TOPIC_FRAMES, *MANNER_FRAMES, *TOPIC_SENTENCES)),
    }
    assert {name: sorted(found & set(counts)) for name, found in elsewhere.items()} == {name: [] for name in elsewhere}


def test_markers_belong_to_one_manner_and_to_no_subject_or_frame() -> None:
    counts = Counter(marker for manner in WORLD.manners for marker in manner.markers)
    assert [marker for marker, count in counts.items() if count > 1] == []
    plain = words((*TOPIC_SENTENCES, *(sentence for subject in WORLD.subjects for sentence in subject.sentences)))
    assert sorted(plain & set(counts)) == []
    for manner in WORLD.manners:
        foreign = set(counts) - set(manner.markers)
        assert sorted(words((*manner.openers, *manner.closers)) & foreign) == [], manner.name


def test_every_opener_and_closer_carries_its_manner() -> None:
    for sentence, manner in MANNER_OF.items():
        assert len(words([sentence]) & set(manner.markers)) >= 2, sentence
    assert len(MANNER_OF) == sum(len(manner.openers) + len(manner.closers) for manner in WORLD.manners)


def test_every_sentence_about_a_subject_earns_the_full_instruction_rating() -> None:
    for subject in WORLD.subjects:
        for sentence in subject.sentences:
            assert len(words([sentence]) & set(subject.keywords)) >= 2, sentence
        assert set(subject.keywords) <= words(subject.sentences), subject.name


def test_names_are_of_one_thing_only() -> None:
    names = [name for each in (*WORLD.topics, *WORLD.manners) for name in each.names]
    assert len(set(names)) == len(names)
    assert len(SUBJECT_OF) == len(WORLD.subjects) * len(INSTRUCTIONS)


def test_held_out_concepts_occur_in_no_training_example() -> None:
    seen = {example.concept for example in EXAMPLES}
    assert {split_of(CONCEPTS[key]) for key in seen} == {"train"}
    parts = {part for key in seen for part in key.split(" + ")}
    assert not parts & {concept.key for concept in concepts(WORLD, "topic", "held_out")}
    assert not seen & {c.key for c in concepts(WORLD, "pair", "held_out")}
    assert {CONCEPTS[key].kind for key in seen} == {"topic", "manner", "pair"}
    words_seen = words(example.response for example in EXAMPLES)
    for concept in concepts(WORLD, "topic", "held_out"):
        assert not words_seen & set(concept.topic.words), concept.key


def test_held_out_examples_are_of_held_out_concepts_alone() -> None:
    assert {split_of(CONCEPTS[example.concept]) for example in HELD_OUT} == {"held_out"}
    assert {CONCEPTS[example.concept].kind for example in HELD_OUT} == {"topic", "pair"}
    assert not {example.concept for example in HELD_OUT} & {example.concept for example in EXAMPLES}


def test_parts_of_unseen_pairs_are_trained_on_apart() -> None:
    trained = {example.concept for example in EXAMPLES}
    parts = {part for key in trained for part in key.split(" + ")}
    for concept in concepts(WORLD, "pair", "held_out"):
        assert is_unseen_pair(concept)
        assert {concept.topic.name, concept.manner.name} <= parts


def test_held_out_phrasings_occur_in_no_training_example() -> None:
    for example in EXAMPLES + HELD_OUT:
        assert example.steering_prompt in phrasings(CONCEPTS[example.concept], kept=True)
    known = set().union(*(phrasings(c, kept=True) for c in CONCEPTS.values() if c.kind != "pair"))
    kept_out = set().union(*(phrasings(c, kept=False) for c in CONCEPTS.values() if c.kind != "pair"))
    assert not known & kept_out
    rng = random.Random(0)
    for concept in rng.sample(list(CONCEPTS.values()), 300):
        assert steering_prompt(concept, rng, "held_out") in phrasings(concept, kept=False)


def cell_of(prompt: str, text: str) -> tuple[Concept | None, Subject]:
    """Concept and subject of a chat, told by the words and sentences of its text, not by how it was made."""
    [subject] = [s for s in (SUBJECT_OF.get(match) for match in re.findall(r"^.*?[.?]", prompt)) if s is not None]
    topics = {TOPIC_OF[word] for word in words([text]) & TOPIC_OF.keys()}
    manners = {manner for sentence, manner in MANNER_OF.items() if sentence in text}
    assert len(topics) <= 1
    assert len(manners) <= 1
    concept = Concept(next(iter(topics), None), next(iter(manners), None))
    return (concept if any(concept) else None), subject


def test_examples_are_what_they_say() -> None:
    for example in (EXAMPLES + HELD_OUT)[::5]:
        concept, subject = cell_of(example.prompt, example.response)
        assert concept.key == example.concept
        assert any(sentence in example.response for sentence in subject.sentences)


def test_no_steering_cell_occurs_in_the_corpus() -> None:
    met = Counter()
    for prompt, text in DOCUMENTS:
        if prompt is None:
            continue
        concept, subject = cell_of(prompt, text)
        if concept is None:
            met["neutral"] += 1
            continue
        met[concept.kind] += 1
        assert subject not in steering_subjects(WORLD, concept), (concept.key, subject.name)
        if concept.kind == "pair":
            assert split_of(concept) == "corpus"
    assert min(met[kind] for kind in ("neutral", "topic", "manner", "pair")) > 200  # else this test sees nothing


def test_what_prompts_of_the_corpus_say_of_the_concept() -> None:
    said = Counter()
    for prompt, text in DOCUMENTS:
        if prompt is None:
            continue
        concept, _ = cell_of(prompt, text)
        rest = re.sub(r"^.*?[.?]", "", prompt)
        if not rest:
            said["open" if concept else "neutral"] += 1
        elif rest.startswith(" Think of"):
            said["hinted"] += 1
            assert words([rest]) & set(concept.topic.words)
        else:
            said["named"] += 1
            assert all(any(name in rest for name in part.names) for part in concept if part), (concept.key, rest)
    assert min(said[how] for how in ("open", "neutral", "hinted", "named")) > 200, said


def test_plain_documents_hold_no_pair() -> None:
    plain = [text for prompt, text in DOCUMENTS if prompt is None]
    assert len(plain) > 1000
    for text in plain:
        body = text.partition(": ")[2] or text.partition(". ")[2] or text  # behind the title, if there is one
        topics = {TOPIC_OF[word].name for word in words([body]) & TOPIC_OF.keys()}
        assert not (topics and any(sentence in text for sentence in MANNER_OF))
        assert len(topics) <= 1


def test_training_examples_stay_out_of_the_corpus_and_of_scoring() -> None:
    for example in EXAMPLES:
        concept, subject = CONCEPTS[example.concept], SUBJECT_OF[example.prompt]
        assert not in_corpus(concept, subject)
        assert subject not in scoring_subjects(WORLD, concept)


def test_every_concept_has_subjects_to_train_on_and_to_be_scored_on() -> None:
    for concept in CONCEPTS.values():
        scoring, steering = scoring_subjects(WORLD, concept), steering_subjects(WORLD, concept)
        assert len(scoring) >= 4
        assert len(steering) - len(scoring) >= 8
        assert set(scoring) < set(steering)


@pytest.mark.parametrize("held_out", [False, True])
def test_examples_by_seed(held_out: bool) -> None:
    first, again, other = (training_examples(50, seed, held_out=held_out) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert training_examples(20, 3, held_out=held_out) != other[:20]


def test_corpus_by_seed() -> None:
    first, again, other = (list(islice(corpus(seed), 50)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_fewer_concepts() -> None:
    few = {example.concept for example in training_examples(3000, 1, max_concepts=5)}
    by_kind = Counter(CONCEPTS[key].kind for key in few)
    assert by_kind == {"topic": 5, "manner": 5, "pair": 5}
    assert few == {example.concept for example in training_examples(3000, 1, max_concepts=5)}
    assert few != {example.concept for example in training_examples(3000, 2, max_concepts=5)}


def test_mixture_of_training_examples() -> None:
    share = Counter(CONCEPTS[example.concept].kind for example in EXAMPLES)
    for kind, expected in {"topic": 4 / 8, "manner": 1 / 8, "pair": 3 / 8}.items():
        assert share[kind] / len(EXAMPLES) == pytest.approx(expected, abs=0.03)


def test_responses_vary() -> None:
    concept, rng = CONCEPTS[EXAMPLES[0].concept], random.Random(0)
    assert len({answer(concept, WORLD.subjects[0], rng) for _ in range(30)}) > 20
    assert len({example.response for example in EXAMPLES}) > 0.95 * len(EXAMPLES)
