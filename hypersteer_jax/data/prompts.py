"""Text to tokens: chat templates, the BOS token, the end of a turn, and tokenizers from a folder.

A prompt is rendered as one user turn plus the opening of the model's turn, and the response follows as raw text. The
prompt alone and prompt + response are tokenised separately, as in the AxBench release: the first gives the prompt's
length, the second the tokens.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from hypersteer_jax.data.batch import DataError

Tokens = Int[np.ndarray, " _"]  # one text as int32 ids, of its own length

# The releases use one template in training and another in inference; here there is only this one.
IN_CONTEXT = "{steering_prompt}\n\nInput: {prompt}"

# They differ in their first token. Two digits might not: a vocabulary may have a piece for the space before them.
PROBES = ("1", "Why")

CHUNK = 8192  # texts tokenised at once: enough to use all cores, few enough that Python lists of ids stay small


class Prompter:
    r"""A transformers tokenizer with this project's rules about templates and special tokens.

    Attributes:
        tokenizer: the wrapped tokenizer.
        bos: the BOS id as a list of one, or an empty list for families without one (Qwen).
        pad_id: id in padded places; masks hide it everywhere.
        end_id: `<end_of_turn>` where the vocabulary has it, else the end-of-sequence id, else None.
        prefix: number of leading tokens that every prompt shares (Gemma: `<bos> <start_of_turn> user \n`, so 4).
        notice: one line worth printing, or None.
    """

    def __init__(self, tokenizer: Any):
        """Wraps `tokenizer`, a transformers tokenizer (untyped here: transformers takes seconds to import).

        Raises:
            DataError: the chat template renders different instructions to the same tokens.
        """
        self.tokenizer = tokenizer
        self.bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.end_id = tokenizer.get_vocab().get("<end_of_turn>", tokenizer.eos_token_id)
        self.prefix, self.notice = len(self.bos), None
        if not tokenizer.chat_template:
            self.notice = "the tokenizer has no chat template: prompts are used as plain text"
            return
        columns = enumerate(zip(*self.prompt_tokens(PROBES), strict=False))
        first = next((column for column, (one, two) in columns if one != two), None)
        if first is None:
            both = " and ".join(map(repr, PROBES))
            raise DataError(f"the chat template renders the prompts {both} to the same tokens; check the template")
        self.prefix = first

    def render(self, prompt: str) -> str:
        """The prompt as a user turn and the opening of the model's turn, without BOS; unchanged without a template."""
        if not self.tokenizer.chat_template:
            return prompt
        turns = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return text.removeprefix(self.tokenizer.bos_token or "")

    def tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        """BOS (once) and the tokens of each text, int32. Nothing is cut and nothing is put at the end."""
        tokens = []
        for start in range(0, len(texts), CHUNK):
            chunk = list(texts[start : start + CHUNK])
            encoded = self.tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)
            tokens += [np.array(self.bos + row, np.int32) for row in encoded["input_ids"]]
        return tokens

    def prompt_tokens(self, prompts: Sequence[str]) -> list[Tokens]:
        """Tokens of each rendered prompt, as generation needs them."""
        return self.tokenize([self.render(prompt) for prompt in prompts])

    def concept_tokens(self, steering_prompts: Sequence[str], prompts: Sequence[str] | None = None) -> list[Tokens]:
        """Tokens the hypernetwork reads: BOS and the steering prompt.

        With `prompts` (the in_context variant) the instruction follows in the same text, as `IN_CONTEXT` says.
        """
        if prompts is None:
            return self.tokenize(steering_prompts)
        pairs = zip(steering_prompts, prompts, strict=True)
        return self.tokenize([IN_CONTEXT.format(steering_prompt=concept, prompt=prompt) for concept, prompt in pairs])


def load_tokenizer(path: Path) -> Any:
    """The transformers tokenizer of a folder: Hugging Face files, or a llama2.c table `tok*.json` of pieces and scores.

    Raises:
        DataError: no such folder, or nothing in it that describes a tokenizer.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; give a folder with tokenizer files")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it warns that there is no torch, which is intended
    if any((path / name).exists() for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    tables = sorted(path.glob("tok*.json"))
    if not tables:
        raise DataError(f"{path}: no tokenizer.json, tokenizer.model or tok*.json in this folder; copy one into it")
    table = json.loads(tables[0].read_text(encoding="utf-8"))
    if table.get("type") != "sentencepiece-bpe":
        raise DataError(f"{tables[0]}: type is {table.get('type')!r}; only 'sentencepiece-bpe' can be read")
    return _sentencepiece_bpe(table)


def _sentencepiece_bpe(table: dict[str, Any]) -> Any:
    """A fast tokenizer that merges as SentencePiece does: always the adjacent pair whose union scores highest."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces, space = table["pieces"], table["space_symbol"]
    ids = {piece: index for index, piece in enumerate(pieces)}
    learned = range(table["byte_offset"] + 256, len(pieces))  # before them: special tokens and the 256 bytes
    merges = [
        (pieces[index][:cut], pieces[index][cut:])
        for index in sorted(learned, key=lambda index: -table["scores"][index])
        for cut in range(1, len(pieces[index]))
        if pieces[index][:cut] in ids and pieces[index][cut:] in ids
    ]
    unk, bos, eos = (pieces[table[name]] for name in ("unk_id", "bos_id", "eos_id"))
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=unk, byte_fallback=True))
    dummy = [normalizers.Prepend(space)] if table["add_dummy_prefix"] else []
    tokenizer.normalizer = normalizers.Sequence([*dummy, normalizers.Replace(" ", space)])
    strip = [decoders.Strip(" ", 1, 0)] if table["add_dummy_prefix"] else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unk, bos_token=bos, eos_token=eos)
