"""Every setting of the project as frozen dataclasses.

A config is data: it is printed at the start of a run, saved beside every checkpoint and read back from there.
Unknown keys are errors, so a typing mistake can never silently become a default.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar


class ConfigError(ValueError):
    """A setting is missing, unknown or out of range; the message names the field, the value and the fix."""


@dataclass(frozen=True)
class LMConfig:
    """Shape of a decoder. Model families differ by these values only, never by subclass.

    Letters as everywhere: V vocabulary, L blocks, D width, N query heads, K key/value heads, H head width, F MLP width.
    """

    family: Literal["gemma2", "llama", "qwen2", "qwen3"]
    vocab: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # RMSNorm multiplies by (offset + weight); Gemma stores weights around 0
    sandwich_norms: bool = False  # a norm after attention and after the MLP as well (Gemma-2)
    qk_norm: bool = False  # RMSNorm over H on queries and keys (Qwen-3)
    qkv_bias: bool = False  # Qwen-2.5
    activation: Literal["gelu_tanh", "silu"] = "silu"
    attention_scale: float | None = None  # queries are multiplied by it; None means head_dim ** -0.5
    attention_softcap: float | None = None
    final_softcap: float | None = None
    sliding_window: int | None = None  # in tokens, on even blocks only (Gemma-2)
    rope_theta: float = 10_000.0
    rope_scaling: tuple[float, float, float, int] | None = None  # Llama-3.1: factor, low, high, original length
    scale_embedding: bool = False  # multiply embeddings by sqrt(D), rounded to the compute dtype (Gemma)
    tied: bool = True  # the head is the embedding table

    @property
    def query_scale(self) -> float:
        """Factor on the queries before the dot product."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale


@dataclass(frozen=True)
class HypernetConfig:
    """The hypernetwork (design: base LM's shape, its first N blocks, plus a cross-attention sub-block)."""

    variant: Literal["no_context", "in_context", "cross_attention"] = "cross_attention"
    blocks: int = 22  # N; paper: 22 for Gemma-2-2B, 34 for 9B; AxBench release: 4
    init: Literal["base_lm", "random"] = "base_lm"  # where self-attention, MLP, norms and embedding start
    cross_init: Literal["normal", "zero"] = "normal"  # "zero": cross branch starts as the identity
    embedding: Literal["own", "shared"] = "own"  # "shared": the base LM's table, frozen
    head: Literal["linear", "mlp"] = "linear"
    final_norm: bool = False  # RMSNorm before the head; the release defines the norm and never applies it
    memory_norm: bool = False  # RMSNorm on the context; the release reads it raw
    positions: Literal["true", "padded"] = "true"  # "padded": index in the padded row, as in the release
    heads: int | None = None  # query heads of its blocks; None means the base LM's, here and below
    kv_heads: int | None = None  # key/value heads
    mlp_width: int | None = None  # F
    attention_scale: float | None = None  # queries are multiplied by it


SIZES = ("heads", "kv_heads", "mlp_width")  # of `HypernetConfig` and `LMConfig` alike


def hypernet_shape(config: HypernetConfig, lm: LMConfig) -> LMConfig:
    """Shape of the hypernetwork's blocks: the base LM's, but for what `config` has of its own."""
    own = {name: getattr(config, name) for name in (*SIZES, "attention_scale")}
    return dataclasses.replace(lm, **{name: value for name, value in own.items() if value is not None})


@dataclass(frozen=True)
class SteeringConfig:
    """Where the vector is read, written and added."""

    layers: tuple[int, ...] = (20,)  # blocks whose output is written; the context is read at the first of them
    context: Literal["entering", "leaving"] = "entering"  # the residual before or after the first of these blocks
    train_positions: Literal["after_prefix", "after_bos", "all", "prompt", "response"] = "after_prefix"
    inference_positions: Literal["all", "after_prefix"] = "all"


@dataclass(frozen=True)
class SelectionConfig:
    """The selection head: a gate on the vector at each token (HyperStuff release, whose defaults these are)."""

    on: bool = False  # off is the paper's method
    layer_norm: bool = True  # LayerNorm over residual and vector before the projection
    noise: bool = True  # logistic noise on the logit, in training only
    temperature_start: float = 1.0  # divides the logit
    temperature_end: float = 0.05  # reached linearly with the last step
    learnable_temperature: bool = False  # trained between these two instead, from the start
    temperature_learning_rate: float = 0.1  # under the schedule of `train`
    straight_through: bool = False  # gates of 0 and 1, with the gradient of the soft gate
    sparsity: float = 1e-3  # coefficient of the mean gate in the loss
    hard_inference: bool = False  # gates of 0 and 1 at inference


@dataclass(frozen=True)
class DataConfig:
    """What to train on and how rows become batches."""

    source: str = "tinyworld"  # or a .parquet (AxBench train_data) or .jsonl file, or what `data prepare` made
    held_out_concepts: int = 10  # concepts of a file kept out of training (the other sources have their own splits)
    max_concepts: int | None = None  # train on this many steering prompts only (scaling experiments)
    max_prompt: int = 512  # tokens, chat template included
    max_response: int = 128  # tokens; longer responses are cut, as AxBench cuts generation
    max_concept: int = 64  # tokens of the steering prompt
    pack: bool = True  # two rows in one sequence, a long one with a short one; needs an even train.batch
    buckets: int = 6  # compiled shapes at most
    append_end: bool = False  # score the end-of-turn token after the response (the release does not)
    skip_bad_rows: bool = False  # drop malformed rows, counted and listed, instead of stopping


@dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out. Any axis may be 1; all of them together are all devices of all processes."""

    data: int = 1  # copies of the weights; a batch is split over data x fsdp
    fsdp: int | None = None  # devices over which weights and Adam's moments are split; None: all that are left
    tensor: int = 1  # devices over which heads, MLP width and vocabulary are split
    slices: int = 1  # TPU slices joined by the data-centre network; the data axis runs over them


AttentionName = Literal["einsum", "splash"]  # see `models/attention.py`


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation. Defaults: AxBench release at dc57b9b, with float32 state (facts, table 7)."""

    steps: int = 1000
    batch: int = 12  # rows per step, over all devices
    learning_rate: float = 8e-5  # 2B; 5e-6 for 9B
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # to zero over `steps`
    warmup: int = 0  # steps
    clip: float = 1.0  # global gradient norm
    weight_decay: float = 0.0
    loss: Literal["token", "example"] = "token"  # mean over all response tokens, or over examples first
    factor_range: tuple[float, float] | None = None  # sample the training factor from it; None trains at 1
    seed: int = 0
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    eval_every: int = 100  # steps; 0 switches evaluation off
    eval_batches: int = 4
    eval_share: float = 0.05  # of the run's arithmetic at most; evaluations are spaced out to keep to it
    save_every: int = 200  # steps; 0 saves at the end only
    keep_last: int = 3  # newest checkpoints that are kept
    keep_every: int = 0  # steps; checkpoints at multiples of it are kept for good; 0: none
    stuck_after: float = 1800.0  # seconds without progress after which a run dumps its stacks and exits; 0: never
    profile: int = 0  # steps, after the first ten, that are traced into out/profile for xprof; 0: none
    remat: bool = False  # recompute block activations in the backward pass
    cache: Literal["off", "memory", "disk"] = "off"  # keep each row's residual, so that no epoch runs the lower blocks
    cache_dir: Path = Path("runs/cache")  # of a disk cache; runs on the same base LM, layer and data can share one
    attention: AttentionName = "einsum"  # "splash": the TPU kernel, if a profile says that it is faster


@dataclass(frozen=True)
class JudgeConfig:
    """Who rates generated texts, and what it may cost (see `evaluation/judges.py`)."""

    kind: Literal["paper", "endpoint", "local", "rules", "proxy", "replay"] = "paper"
    model: str | None = None  # endpoint: its name there; local, proxy: "tinyworld", a directory, or a hub id
    base_url: str | None = None  # of the endpoint, such as http://localhost:8000/v1
    key_variable: str | None = None  # environment variable with the endpoint's key; paper: OPENAI_API_KEY
    temperature: float = 0.0  # paper, endpoint; AxBench since May 2025 (0.7 before)
    workers: int = 16  # calls at the same time
    price: tuple[float, float] | None = None  # dollars per million tokens of prompt and reply
    max_cost: float | None = None  # dollars; what may cost more is refused before the first call
    rubric_file: Path | None = None  # the three questions in other words, in the form of `evaluation/rubric.toml`
    table: Path | None = None  # replay: an AxBench evaluate/steering_data.parquet
    cache: Path = Path("runs/judgements.sqlite")  # nothing in it is asked again
    retry_failures: bool = False  # ask again where a judge gave no rating


@dataclass(frozen=True)
class EvaluateConfig:
    """What a run is asked, and who rates its texts (see `evaluation/evaluate.py`). Defaults: AxBench."""

    out: Path | None = None  # folder of the evaluation; None: RUN/evaluation
    held_in: str | None = None  # list of concepts, by name or file; None: the tiny world's, for a run on it
    held_out: str | None = None  # the same, never trained on
    concepts: int | None = None  # of each group, the first of its list; None: all (the tiny world: 200)
    instructions: Path | None = None  # JSON or JSON lines with `instruction`, such as AlpacaEval's; None: 332 free ones
    prompting: Path | None = None  # AxBench's steering_data.parquet, whose steered_input prompting gets; None: our own
    per_concept: int = 10  # instructions a concept; the first half chooses its factor, the second scores it
    factors: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0)
    fine: bool = False  # also 0.7 to 1.5 in steps of 0.05: a vector trained at 1 turns there
    fixed_factor: float = 1.0  # one of the factors, the same for all concepts; of the controls, too
    max_new: int = 128  # tokens
    temperature: float = 1.0
    batch: int = 64  # texts generated together, on all devices
    tensor: int = 1  # devices that share the base LM's weights, where one cannot hold them; see `MeshConfig`
    seed: int = 0  # of the texts and of the controls' prompts
    part: int = 4  # concepts whose texts are written together: what a kill loses at most
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    lm: str = "tinyworld"  # "tinyworld", a directory with weights, or a Hugging Face hub id
    out: Path = Path("runs/default")  # or gs://BUCKET/FOLDER (see `checkpoint.run_path`)
    hypernet: HypernetConfig = field(default_factory=HypernetConfig)
    steering: SteeringConfig = field(default_factory=SteeringConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON-able dictionary of a config (paths become strings, tuples lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


T = TypeVar("T")


def from_dict(cls: type[T], values: dict[str, Any], where: str = "config") -> T:
    """Builds a config from a dictionary such as `to_dict` gives.

    Raises:
        ConfigError: an unknown key, a missing one, or a value of the wrong kind; names the field and the choices.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a mapping of {cls.__name__} fields, got {values!r}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"{where}: unknown key {', '.join(unknown)}; {cls.__name__} has {', '.join(hints)}")
    try:
        return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `hint`; JSON has no tuples and no paths."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        return _convert(next(choice for choice in choices if choice is not type(None)), value, where)
    if origin is Literal:
        if value not in choices:
            raise ConfigError(f"{where} is {value!r}; choose one of {', '.join(map(repr, choices))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} is {value!r}; give a list")
        kinds = [choices[0]] * len(value) if choices[-1] is Ellipsis else choices
        if len(kinds) != len(value):
            raise ConfigError(f"{where} is {value!r}; give exactly {len(kinds)} values")
        return tuple(_convert(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, where)
    if hint is Path:
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} is {value!r}; give a value of type {hint.__name__}")
    return value


def check(config: RunConfig, lm: LMConfig) -> None:
    """Everything that can be known to be wrong before any work starts.

    Raises:
        ConfigError: naming the field, its value and the fix.
    """
    hypernet, steering, data, train = config.hypernet, config.steering, config.data, config.train
    for name, devices in dataclasses.asdict(config.mesh).items():
        if devices is not None and devices < 1:
            raise ConfigError(f"mesh.{name} is {devices}; give at least 1")
    if not steering.layers or list(steering.layers) != sorted(set(steering.layers)):
        raise ConfigError(f"steering.layers is {steering.layers}; give one or more layers, ascending, each once")
    if not 0 <= steering.layers[0] <= steering.layers[-1] < lm.layers:
        raise ConfigError(f"steering.layers is {steering.layers}; the base LM has blocks 0 to {lm.layers - 1}")
    if hypernet.blocks < 1:
        raise ConfigError(f"hypernet.blocks is {hypernet.blocks}; give at least 1")
    if hypernet.init == "base_lm" and hypernet.blocks > lm.layers:
        raise ConfigError(
            f"hypernet.blocks is {hypernet.blocks}, but only the base LM's {lm.layers} blocks can be copied; "
            "lower it or set hypernet.init to random"
        )
    shape = hypernet_shape(hypernet, lm)
    for name in SIZES:
        value, copied = getattr(shape, name), getattr(lm, name)
        if hypernet.init == "base_lm" and value != copied:
            raise ConfigError(
                f"hypernet.{name} is {value}, but the blocks copied from the base LM have {copied}; "
                "leave it out or set hypernet.init to random"
            )
        if value < 1:
            raise ConfigError(f"hypernet.{name} is {value}; give at least 1")
    if shape.heads % shape.kv_heads:
        raise ConfigError(f"hypernet.heads is {shape.heads}; give a multiple of the {shape.kv_heads} key/value heads")
    for name in SIZES:  # heads, key/value heads and MLP width are what `tensor` splits
        for owner, values in (("the base LM", lm), ("the hypernetwork", shape)):
            if getattr(values, name) % config.mesh.tensor:
                raise ConfigError(
                    f"mesh.tensor is {config.mesh.tensor}, which does not divide {owner}'s {name} = "
                    f"{getattr(values, name)}; give a divisor"
                )
    _check_selection(config.selection)
    positive = {
        "train.steps": train.steps,
        "train.batch": train.batch,
        "train.learning_rate": train.learning_rate,
        "train.clip": train.clip,
        "train.eval_share": train.eval_share,
        "train.keep_last": train.keep_last,
        "data.buckets": data.buckets,
        "data.max_prompt": data.max_prompt,
        "data.max_response": data.max_response,
        "data.max_concept": data.max_concept,
    }
    for name, value in positive.items():
        if not value > 0:
            raise ConfigError(f"{name} is {value}; give a value above 0")
    for name in ("eval_every", "save_every", "keep_every", "profile"):
        if getattr(train, name) < 0:
            raise ConfigError(f"train.{name} is {getattr(train, name)}; give 0 (off) or a number of steps")
    if train.stuck_after < 0:
        raise ConfigError(f"train.stuck_after is {train.stuck_after}; give 0 (off) or seconds")
    if not 0 <= train.warmup < train.steps:
        raise ConfigError(f"train.warmup is {train.warmup}; give 0 to {train.steps - 1} (below train.steps)")
    if train.factor_range is not None and train.factor_range[0] > train.factor_range[1]:
        raise ConfigError(f"train.factor_range is {train.factor_range}; give the lower end first")


def _check_selection(selection: SelectionConfig) -> None:
    if not selection.on:
        for name, value in dataclasses.asdict(selection).items():
            if value != getattr(SelectionConfig, name):
                raise ConfigError(f"selection.{name} is {value}, but there is no head; set selection.on to True")
    for name in ("temperature_end", "temperature_learning_rate"):
        if not getattr(selection, name) > 0:
            raise ConfigError(f"selection.{name} is {getattr(selection, name)}; give a value above 0")
    if not selection.temperature_start >= selection.temperature_end:
        raise ConfigError(
            f"selection.temperature_start is {selection.temperature_start}; give at least the end's, "
            f"{selection.temperature_end}"
        )
    if not selection.sparsity >= 0:
        raise ConfigError(f"selection.sparsity is {selection.sparsity}; give 0 (off) or a value above 0")


GEMMA2_2B = RunConfig(
    lm="google/gemma-2-2b-it",
    out=Path("runs/gemma2-2b"),
    train=TrainConfig(steps=9_000, save_every=500, eval_every=500),
)

RECIPES: dict[str, tuple[str, RunConfig]] = {
    "tinyworld": (
        "The embedded world: minutes on a laptop.",
        RunConfig(
            out=Path("runs/tinyworld"),
            # An LM this narrow reads a concept where its prompt is, early: the vector has to come before that. Its
            # first tokens are the same in every text, and it takes offence when they are steered only at inference.
            # A table of its own would learn the names of the training topics, and unseen topics would fall behind.
            hypernet=HypernetConfig(blocks=3, cross_init="zero", embedding="shared"),
            steering=SteeringConfig(layers=(0,), inference_positions="after_prefix"),
            data=DataConfig(append_end=True, buckets=2),
            train=TrainConfig(steps=300, batch=48, learning_rate=2.5e-3, eval_every=150, compute_dtype="float32"),
        ),
    ),
    "gemma2-2b": ("Gemma-2-2B, layer 20, as in the paper.", GEMMA2_2B),
    "gemma2-9b": (
        "Gemma-2-9B, layer 20, as in the paper.",
        dataclasses.replace(
            GEMMA2_2B,
            lm="google/gemma-2-9b-it",
            out=Path("runs/gemma2-9b"),
            hypernet=HypernetConfig(blocks=34),
            train=TrainConfig(steps=27_000, batch=4, learning_rate=5e-6, save_every=500, eval_every=500),
        ),
    ),
    "release": (
        "Gemma-2-2B with the AxBench release's four blocks (dc57b9b).",
        dataclasses.replace(GEMMA2_2B, out=Path("runs/release"), hypernet=HypernetConfig(blocks=4)),
    ),
}
