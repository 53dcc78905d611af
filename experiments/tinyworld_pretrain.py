"""Remakes the tiny world's base LM from seed: tokenizer, pretraining, figures.

    python experiments/tinyworld_pretrain.py --out runs/tinyworld_lm

About 40 minutes. Figures of the shipped checkpoint: experiments/results/tinyworld_lm.md.
The architecture is Gemma-2's; the corpus is `hypersteer_jax.data.tinyworld.world.corpus`.
"""

import argparse
import itertools
import json
import random
import time
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from hypersteer_jax.config import LMConfig, SteeringConfig
from hypersteer_jax.data.prompts import Prompter, load_tokenizer
from hypersteer_jax.data.tinyworld.judge import Bounds, judge, mean_nll
from hypersteer_jax.data.tinyworld.world import corpus, instruction, load_world
from hypersteer_jax.decoding import Decoding, GenerationBatch, Vectors, generate
from hypersteer_jax.evaluation.protocol import GROUPS, make_trials
from hypersteer_jax.generation import left_pad
from hypersteer_jax.models.lm import LM, cast, ranks
from hypersteer_jax.models.weights import load_lm, save_lm

SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "\n"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LENGTHS, SCORED = (40, 64), 40  # tokens per row, by document, and of those scored; what is longer is cut


def shape(vocab: int) -> LMConfig:
    """The tiny Gemma-2."""
    return LMConfig(
        family="gemma2",
        vocab=vocab,
        layers=4,
        width=192,
        heads=4,
        kv_heads=2,
        head_dim=48,
        mlp_width=384,
        norm_offset=1.0,
        sandwich_norms=True,
        activation="gelu_tanh",
        attention_scale=48**-0.5,
        attention_softcap=50.0,
        final_softcap=30.0,
        sliding_window=4096,
        scale_embedding=True,
    )


def make_tokenizer(out: Path, seed: int) -> None:
    """A unigram tokenizer whose pieces are the words of the corpus, with single characters to fall back on.

    The vocabulary is small and known, so whole words make the shortest sequences; scores are log frequencies.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    world = load_world()
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation("isolated")]
    )
    counts: Counter[str] = Counter()
    texts = itertools.islice(corpus(seed), 60_000)
    for prompt, text in texts:
        counts.update(piece for piece, _ in split.pre_tokenize_str(f"{prompt or ''} {text}"))
    counts.update(f"▁{word}" for topic in world.topics for word in topic.words)
    counts.update(["▁user", "▁model"])
    total = sum(counts.values())
    pieces = {piece: float(np.log(count / total)) for piece, count in counts.most_common()}
    floor = min(pieces.values())
    characters = ["▁", *(chr(c) for c in range(33, 127))]
    vocab = [(special, 0.0) for special in SPECIALS]
    vocab += [(piece, score) for piece, score in pieces.items() if piece not in characters]
    vocab += [(char, pieces.get(char, floor - 8.0)) for char in characters]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=SPECIALS.index("<unk>")))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS[:-1]])
    tokenizer.add_tokens([AddedToken("\n", special=False, normalized=False)])
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", SPECIALS.index("<bos>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(out)


def render(prompt: str | None, text: str) -> str:
    """A document as the tokenizer reads it, without the leading <bos>."""
    if prompt is None:
        return f"{text}<eos>"
    return f"<start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n{text}<end_of_turn>"


def batches(tokenizer, documents, rows: int):
    """Endless (tokens, index, targets), one document per row; of chats only answers are scored.

    Short and long documents come in batches of their own. Tokens are `int32[rows, length]`, right-padded with 0. Index
    and targets are `int32[rows, SCORED]`: the columns whose logits predict the targets, of which 0 is padding.
    """
    turn = tokenizer.token_to_id("<start_of_turn>")
    waiting = {length: [] for length in LENGTHS}
    for document in documents:
        ids = np.array(tokenizer.encode(render(*document)).ids[: LENGTHS[-1]])
        length = next(length for length in LENGTHS if len(ids) <= length)
        waiting[length].append(ids)
        if len(waiting[length]) < rows:
            continue
        tokens = np.zeros((rows, length), np.int32)
        index, targets = np.zeros((2, rows, SCORED), np.int32)
        for row, ids in enumerate(waiting[length]):
            tokens[row, : len(ids)] = ids
            turns = np.flatnonzero(ids == turn)
            first = turns[-1] + 3 if len(turns) else 1  # behind "<start_of_turn> model \n", or behind <bos>
            scored = np.arange(first, min(len(ids), first + SCORED))
            index[row, : len(scored)], targets[row, : len(scored)] = scored - 1, ids[scored]
        waiting[length] = []
        yield tokens, index, targets


def loss(lm: LM, tokens, index, targets) -> jax.Array:
    """Mean cross-entropy of the scored tokens in nats."""
    mask = tokens != 0
    residual = lm.run(lm.embed(tokens), ranks(mask), mask, 0, lm.config.layers)
    logits = lm.unembed(jnp.take_along_axis(residual, index[..., None], axis=1))
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(nll * (targets != 0)) / jnp.sum(targets != 0)


def pretrain(lm: LM, stream, steps: int, learning_rate: float) -> LM:
    """AdamW with warm-up and cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, 100, steps, learning_rate * 0.02)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(lm, state, batch):
        value, grads = jax.value_and_grad(loss)(lm, *batch)
        updates, state = optimizer.update(grads, state, lm)
        return optax.apply_updates(lm, updates), state, value

    state, start = optimizer.init(lm), time.time()
    for index in range(steps):
        lm, state, value = step(lm, state, next(stream))
        if index % 50 == 0 or index == steps - 1:
            print(f"step {index}  loss {value:.4f}  {time.time() - start:.0f} s", flush=True)
    return lm


def answers(lm: LM, prompter: Prompter, prompts: list[str]) -> list[str]:
    """Unsteered answers, sampled at temperature 1."""
    tokens, mask = left_pad(prompter.prompt_tokens(prompts), prompter.pad_id)
    rows = np.arange(len(prompts))
    nothing = Vectors(np.zeros((len(rows), lm.config.width), np.float32), np.zeros(len(rows), np.float32))
    batch = GenerationBatch(tokens, mask, mask, rows, rows.astype(np.uint32), nothing)
    decoding = Decoding(max_new=48, temperature=1.0)
    state = generate(lm, batch, decoding.max_new, SteeringConfig((0,)), decoding, (prompter.end_id,))
    pairs = zip(np.asarray(state.new), np.asarray(state.kept), strict=True)
    return [prompter.tokenizer.decode(ids[real], skip_special_tokens=True).strip() for ids, real in pairs]


def calibrate(lm: LM, prompter: Prompter, seed: int) -> dict[str, float]:
    """The judge's fluency bounds, and the medians over 256 unsteered answers they are made from, in nats per token."""
    rng, world = random.Random(seed), load_world()
    prompts = [instruction(rng.choice(world.subjects), rng) for _ in range(256)]
    texts = answers(lm, prompter, prompts)
    shuffled = [" ".join(rng.sample(text.split(), len(text.split()))) for text in texts]
    typical, broken = (float(np.median(mean_nll(lm, prompter, prompts, rows))) for rows in (texts, shuffled))
    third = (broken - typical) / 3
    return {"typical": typical, "shuffled": broken, "natural": typical + third, "broken": typical + 2 * third}


def figures(lm: LM, prompter: Prompter, bounds: Bounds) -> list[str]:
    """Rows of a table: how the base LM answers, and how it follows a concept that is asked for in words."""
    trials = make_trials(32, 4)
    cases = [(trial.concept, trial.subject) for trial in trials]
    lines = []
    for name, prompts in (
        ("no concept asked for", [trial.prompt for trial in trials]),
        ("concept asked for in words", [trial.prompting for trial in trials]),
    ):
        ratings = judge(lm, prompter, bounds, cases, answers(lm, prompter, prompts))
        for group in GROUPS:
            rows = [rating for rating, trial in zip(ratings, trials, strict=True) if trial.group == group]
            means = [*np.mean(rows, axis=0), np.mean([rating.score for rating in rows])]
            lines.append(f"| {name} | {group} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    return lines


REPORT = """# The tiny world's base LM

    python experiments/tinyworld_pretrain.py --out runs/tinyworld_lm --steps {steps} \\
        --rows {rows} --learning-rate {rate}

Gemma-2 architecture, {parameters:,} parameters, vocabulary {vocab}, float32 training, stored in bfloat16; jax {jax}.
Loss on fresh documents of the corpus: {loss:.3f} nats per scored token. {steps} steps of {rows} documents
took {minutes:.0f} minutes.

How it answers, sampled at temperature 1, rated 0 to 2 by the tiny world's judge (32 concepts a group, 4 instructions
each):

| request | concepts | concept | instruction | fluency | score |
|---|---|---|---|---|---|
{table}

Fluency bounds of the judge (nats per token): unsteered answers have a median of {typical:.2f}, the same with their
words shuffled {shuffled:.2f}; so {natural:.2f} is the bound of rating 2 and {broken:.2f} that of rating 1.
"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    from tokenizers import Tokenizer

    make_tokenizer(args.out, args.seed)
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    config = shape(tokenizer.get_vocab_size())
    lm = LM(config, nnx.Rngs(args.seed))
    count = sum(w.size for w in jax.tree.leaves(lm))
    print(f"vocabulary {config.vocab}, parameters {count:,}", flush=True)

    start = time.time()
    lm = pretrain(lm, batches(tokenizer, corpus(args.seed + 1), args.rows), args.steps, args.learning_rate)
    save_lm(cast(lm, jnp.bfloat16), args.out)
    report(args, count, (time.time() - start) / 60)


def report(args: argparse.Namespace, parameters: int, minutes: float) -> None:
    """Measures the saved checkpoint, and writes the judge's bounds and the figures beside it."""
    lm, prompter = load_lm(args.out, jnp.float32), Prompter(load_tokenizer(args.out))
    held_out = itertools.islice(batches(prompter.tokenizer.backend_tokenizer, corpus(args.seed + 2), 64), 8)
    fresh = float(np.mean([jax.jit(loss)(lm, *batch) for batch in held_out]))
    measured = calibrate(lm, prompter, args.seed)
    bounds = Bounds(measured["natural"], measured["broken"])
    (args.out / "fluency.json").write_text(json.dumps(bounds._asdict()) + "\n")
    text = REPORT.format(
        steps=args.steps,
        rows=args.rows,
        rate=args.learning_rate,
        parameters=parameters,
        vocab=lm.config.vocab,
        jax=jax.__version__,
        loss=fresh,
        minutes=minutes,
        table="\n".join(figures(lm, prompter, bounds)),
        **measured,
    )
    (args.out / "tinyworld_lm.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
