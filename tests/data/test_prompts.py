"""Chat templates, special tokens and tokenizers from a folder."""

import json
from importlib import resources

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hypersteer_jax.data.batch import DataError
from hypersteer_jax.data.prompts import Prompter, load_tokenizer

SPECIAL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<unk>"]
VOCABULARY = [*SPECIAL, "user", "model", "\n", "\n\n", "1", "2", "Input:", "say", "hello", "sea", *"abcd"]
IDS = {word: index for index, word in enumerate(VOCABULARY)}
TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}<start_of_turn>{{ turn['role'] }}\n{{ turn['content'] }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE, vocabulary: dict[str, int] = IDS) -> PreTrainedTokenizerFast:
    """One token per word and per run of newlines; puts a BOS in front by itself, as Gemma's does."""
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    newlines = pre_tokenizers.Split(Regex("\n+"), "isolated")
    words.pre_tokenizer = pre_tokenizers.Sequence([newlines, pre_tokenizers.Split(" ", "removed")])
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", IDS["<bos>"])])
    special = dict(bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")
    turns = [token for token in ("<start_of_turn>", "<end_of_turn>") if token in vocabulary]
    return PreTrainedTokenizerFast(
        tokenizer_object=words, chat_template=template, additional_special_tokens=turns, **special
    )


def ids(text: str) -> list[int]:
    return [IDS[word] for word in text.replace("\n", " \n ").split(" ") if word]


def test_prompt_is_a_turn_with_one_bos():
    prompter = Prompter(tokenizer())
    assert prompter.render("say hello") == "<start_of_turn>user\nsay hello<end_of_turn>\n<start_of_turn>model\n"
    [tokens] = prompter.prompt_tokens(["say hello"])
    expected = ["<bos>", "<start_of_turn>", "user", "\n", "say", "hello"]
    expected += ["<end_of_turn>", "\n", "<start_of_turn>", "model", "\n"]
    assert tokens.tolist() == [IDS[word] for word in expected]
    assert tokens.dtype == "int32"


def test_attributes_of_a_chat_tokenizer():
    prompter = Prompter(tokenizer())
    assert prompter.prefix == 4  # <bos> <start_of_turn> user \n, as in Gemma
    assert (prompter.bos, prompter.pad_id, prompter.end_id) == ([2], 0, IDS["<end_of_turn>"])
    assert prompter.notice is None


def test_without_chat_template_the_prompt_is_plain_text():
    prompter = Prompter(tokenizer(template=None))
    assert prompter.render("say hello") == "say hello"
    assert prompter.prompt_tokens(["say hello"])[0].tolist() == [IDS["<bos>"], *map(IDS.get, ("say", "hello"))]
    assert prompter.prefix == 1
    assert prompter.notice == "the tokenizer has no chat template: prompts are used as plain text"


def test_end_token_is_end_of_sequence_without_turns():
    words = {word: index for word, index in IDS.items() if "turn" not in word}
    assert Prompter(tokenizer(template=None, vocabulary=words)).end_id == IDS["<eos>"]


def test_prefix_where_digits_begin_with_the_same_piece():
    """In the tiny world's vocabulary "1" and "2" are two pieces each, of which the first is the space before."""
    with resources.as_file(resources.files("hypersteer_jax.data.tinyworld") / "lm") as path:
        prompter = Prompter(load_tokenizer(path))
    one, two = prompter.prompt_tokens(["1", "2"])
    assert one[4] == two[4]
    assert prompter.prefix == 4


def test_template_that_ignores_the_instruction():
    with pytest.raises(DataError, match="'1' and 'Why' to the same tokens"):
        Prompter(tokenizer(template="{{ bos_token }}<start_of_turn>"))


def test_tokenizer_without_bos():
    plain = tokenizer(template=None)
    plain.bos_token = None
    prompter = Prompter(plain)
    assert (prompter.bos, prompter.prefix) == ([], 0)
    assert prompter.concept_tokens(["sea"])[0].tolist() == [IDS["sea"]]


def test_steering_prompt_is_bos_and_text():
    assert Prompter(tokenizer()).concept_tokens(["say sea"])[0].tolist() == ids("<bos> say sea")


def test_in_context_puts_the_instruction_behind_the_steering_prompt():
    [tokens] = Prompter(tokenizer()).concept_tokens(["sea"], ["say hello"])
    assert tokens.tolist() == [IDS[word] for word in ("<bos>", "sea", "\n\n", "Input:", "say", "hello")]


def test_braces_in_prompts_are_text():
    assert len(Prompter(tokenizer()).concept_tokens(["{prompt}"], ["{}"])[0]) == 5


def test_tokenizer_folder_of_hugging_face(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    assert Prompter(load_tokenizer(tmp_path)).prompt_tokens(["say hello"])[0].tolist() == (
        Prompter(tokenizer()).prompt_tokens(["say hello"])[0].tolist()
    )


def test_tokenizer_folder_errors(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no tokenizer\.json, tokenizer\.model or tok\*\.json in this folder"):
        load_tokenizer(tmp_path)
    (tmp_path / "tok5.json").write_text('{"type": "unigram"}')
    with pytest.raises(DataError, match=r"tok5\.json: type is 'unigram'; only 'sentencepiece-bpe' can be read"):
        load_tokenizer(tmp_path)


def test_piece_table(tmp_path):
    learned = ["▁a", "ab", "▁", "a", "b"]
    table = {
        "type": "sentencepiece-bpe", "unk_id": 0, "bos_id": 1, "eos_id": 2, "byte_offset": 3,
        "add_dummy_prefix": True, "space_symbol": "▁",
        "pieces": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned],
        "scores": [0.0] * 259 + [-0.0, -1.0, -2.0, -3.0, -4.0],
    }  # fmt: skip
    (tmp_path / "tok264.json").write_text(json.dumps(table))
    loaded = load_tokenizer(tmp_path)
    assert loaded.convert_ids_to_tokens(loaded("ab ba\n").input_ids) == ["▁a", "b", "▁", "b", "a", "<0x0A>"]
    assert loaded.decode(loaded("ab  ba\n").input_ids) == "ab  ba\n"
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (1, 2, 0)


def test_trained_piece_table(shared_data):
    golden = json.loads((shared_data / "lm" / "golden.json").read_text())["stories260K"]
    prompter = Prompter(load_tokenizer(shared_data / "lm" / "stories260K"))
    assert prompter.tokenize([golden["prompt"]])[0].tolist() == golden["prompt_ids"]
    assert prompter.tokenizer.decode(golden["prompt_ids"] + golden["greedy_ids"]).endswith(golden["greedy_text"][1:])
