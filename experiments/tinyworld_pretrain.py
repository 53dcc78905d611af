"""Remakes the tiny world's base LM from seed: tokenizer, pretraining, figures.

    python experiments/tinyworld_pretrain.py --out runs/tinyworld_lm

About 25 minutes on 2 cores. Figures of the shipped checkpoint: experiments/results/tinyworld_lm.md.
The architecture is Gemma-2's; the corpus is `hypersteer_jax.data.tinyworld.world.corpus`.
"""

import argparse
import itertools
import json
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from hypersteer_jax.config import LMConfig
from hypersteer_jax.data.tinyworld.world import corpus, load_world
from hypersteer_jax.models.lm import LM, cast, ranks
from hypersteer_jax.models.weights import save_lm

SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "\n"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LENGTH, SCORED = 72, 48  # tokens per row, and of those scored; longer documents are cut (about one in a hundred)


def shape(vocab: int) -> LMConfig:
    """The tiny Gemma-2."""
    return LMConfig(
        family="gemma2",
        vocab=vocab,
        layers=5,
        width=128,
        heads=4,
        kv_heads=2,
        head_dim=32,
        mlp_width=256,
        norm_offset=1.0,
        sandwich_norms=True,
        activation="gelu_tanh",
        attention_scale=32**-0.5,
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

    Tokens are `int32[rows, LENGTH]`, right-padded with 0. Index and targets are `int32[rows, SCORED]`: the columns
    whose logits predict the targets, of which 0 is padding.
    """
    while True:
        texts = [render(*next(documents)) for _ in range(rows)]
        tokens = np.zeros((rows, LENGTH), np.int32)
        index, targets = np.zeros((2, rows, SCORED), np.int32)
        turn = tokenizer.token_to_id("<start_of_turn>")
        for row, encoding in enumerate(tokenizer.encode_batch(texts)):
            ids = np.array(encoding.ids[:LENGTH])
            tokens[row, : len(ids)] = ids
            turns = np.flatnonzero(ids == turn)
            first = turns[-1] + 3 if len(turns) else 1  # behind "<start_of_turn> model \n", or behind <bos>
            scored = np.arange(first, min(len(ids), first + SCORED))
            index[row, : len(scored)], targets[row, : len(scored)] = scored - 1, ids[scored]
        yield tokens, index, targets


def loss(lm: LM, tokens, index, targets) -> jax.Array:
    """Mean cross-entropy of the scored tokens in nats."""
    mask = tokens != 0
    residual = lm.run(lm.embed(tokens), ranks(mask), mask, 0, lm.config.layers)
    logits = lm.unembed(jnp.take_along_axis(residual, index[..., None], axis=1))
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(nll * (targets != 0)) / jnp.sum(targets != 0)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=32)
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

    schedule = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, 100, args.steps, args.learning_rate * 0.02)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))

    @jax.jit
    def step(lm, state, batch):
        value, grads = jax.value_and_grad(loss)(lm, *batch)
        updates, state = optimizer.update(grads, state, lm)
        return optax.apply_updates(lm, updates), state, value

    state = optimizer.init(lm)
    stream = batches(tokenizer, corpus(args.seed + 1), args.rows)
    start, log = time.time(), []
    for index in range(args.steps):
        lm, state, value = step(lm, state, next(stream))
        if index % 50 == 0 or index == args.steps - 1:
            log.append({"step": index, "loss": round(float(value), 4), "seconds": round(time.time() - start, 1)})
            print(log[-1], flush=True)
            if index % 500 == 499:
                save_lm(cast(lm, jnp.bfloat16), args.out)
    lm = cast(lm, jnp.bfloat16)
    held_out = list(itertools.islice(batches(tokenizer, corpus(args.seed + 2), 64), 8))
    final = float(np.mean([jax.jit(loss)(cast(lm, jnp.float32), *batch) for batch in held_out]))
    save_lm(lm, args.out)
    (args.out / "pretrain.json").write_text(
        json.dumps({"parameters": count, "fresh_loss": final, "steps": args.steps, "rows": args.rows, "log": log})
    )
    print(f"fresh documents: {final:.4f} nats per token")


if __name__ == "__main__":
    main()
