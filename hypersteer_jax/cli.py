"""`hypersteer <command>`. Each command is one call into a module, imported when it runs, so that help is instant."""

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from hypersteer_jax.config import RECIPES, ConfigError, EvaluateConfig, JudgeConfig, RunConfig

if TYPE_CHECKING:
    Recipe = RunConfig
else:
    Recipe = tyro.extras.subcommand_type_from_defaults(
        {name: config for name, (_, config) in RECIPES.items()},
        {name: text for name, (text, _) in RECIPES.items()},
    )

app = tyro.extras.SubcommandApp()
data = tyro.extras.SubcommandApp()
app.command(data, name="data", help="Prepare, describe or make training data.")


@app.command(name="quickstart")
def quickstart(out: Path = Path("runs/quickstart"), steps: int | None = None, seed: int = 0) -> None:
    """Train a HyperSteer on the embedded world, evaluate it and look at it: five minutes on a laptop.

    Args:
        out: folder of the run; if it is taken, the next free name is used.
        steps: training steps; the default is tuned for 2 cores.
        seed: of initialisation and data.
    """
    from hypersteer_jax.quickstart import run_quickstart

    run_quickstart(out, steps, seed)


@app.command(name="train")
def train(config: Annotated[Recipe, tyro.conf.arg(name="")], resume: bool = False, multihost: bool = False) -> None:
    """Train a hypernetwork from a recipe; every setting can be overridden.

    Args:
        config: the recipe.
        resume: continue the run in `out` from its newest checkpoint; if it was ended before its first, start it.
        multihost: this is one of several processes, one to a host of a TPU pod, that run this same command.
    """
    from hypersteer_jax.training.preemption import listen

    with listen() as notice:
        if multihost:
            from hypersteer_jax.sharding import join_processes

            join_processes()
        from hypersteer_jax.training.launch import launch
        from hypersteer_jax.training.ledger import process_start

        launch(config, resume, notice=notice, started=process_start())


@app.command(name="goodput")
def goodput(run: Annotated[Path, tyro.conf.Positional]) -> None:
    """Show where the time of a training run went, over all its restarts.

    Args:
        run: folder of a training run, which may be going on.
    """
    from hypersteer_jax.training.ledger import show

    show(run)


@app.command(name="plan")
def plan(
    config: Annotated[Recipe, tyro.conf.arg(name="")],
    topology: str,
    shape: tuple[int, int, int, int] | None = None,
    price: float | None = None,
    decode: bool = False,
    json: Path | None = None,
) -> int:
    """Compile a run for a TPU slice, on a CPU: what it needs, how long it takes at least; exits 1 if it does not fit.

    Args:
        config: the recipe; every setting can be overridden, as for `train`.
        topology: slice, such as v5e-16, v6e-8, v5p-8, v4-32 or tpu7x-8; --mesh.slices joins several.
        shape: tokens of a sequence, of a prompt, scored in a sequence, and of a steering prompt; else as in the data.
        price: of one chip for one hour, to know the run's.
        decode: compile a step of generation, too.
        json: file for all numbers.
    """
    if find_spec("libtpu") is None:
        raise ConfigError(
            'libtpu, the compiler, is not installed; pip install -e ".[plan]" in a clone (on Linux, x86; no TPU needed)'
        )
    from hypersteer_jax.topologies import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    from hypersteer_jax.planner_report import run_plan

    return 0 if run_plan(config, topology, shape, price, decode, json) else 1


@app.command(name="steer")
def steer(
    prompt: str,
    concept: str,
    factor: tuple[float, ...] = (0.0, 1.0),
    run: Path = Path("runs/quickstart"),
    max_new: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Generate steered texts with a trained run, one per factor, side by side.

    Args:
        prompt: the instruction to answer.
        concept: the steering prompt, in plain English.
        factor: steering factors; 0 is the base LM.
        run: folder of a training run.
        max_new: tokens to generate at most.
        temperature: 0 is greedy.
        seed: of sampling.
    """
    from hypersteer_jax.training.launch import show_steered

    show_steered(run, prompt, concept, factor, max_new, temperature, seed)


@app.command(name="convert")
def convert(
    source: Annotated[Path, tyro.conf.Positional],
    target: Annotated[Path, tyro.conf.Positional],
    lm: str | None = None,
    layer: int = 20,
) -> None:
    """Convert a checkpoint of a PyTorch release to a run, or a run to a release's checkpoint; SOURCE tells which.

    Args:
        source: an AxBench release directory, a HyperStuff run, or a run of ours.
        target: folder to make.
        lm: base LM of the new run, a directory or a hub id; needed unless SOURCE is a run of ours.
        layer: steering layer of the new run; no release's files name it.
    """
    from hypersteer_jax.training.launch import convert

    convert(source, target, lm, layer)


@app.command(name="check-golden")
def check_golden(directory: Annotated[Path, tyro.conf.Positional]) -> int:
    """Compare with a recorded case of the PyTorch release; exits 1 if anything is out of tolerance.

    Args:
        directory: holds golden.json and golden.safetensors.
    """
    from hypersteer_jax.evaluation.golden import print_comparison

    return 0 if print_comparison(directory) else 1


@app.command(name="compare")
def compare(
    form: Literal["release", "hyperstuff"] = "release",
    steps: int = 50,
    seed: int = 0,
    out: Path = Path("runs/compare"),
) -> int:
    """Train beside the PyTorch baseline on the embedded world; report in `out`; exits 1 if numbers differ.

    Args:
        form: which of the two public releases the baseline computes as.
        steps: training steps of both sides.
        seed: of initialisation and data.
        out: folder for FORM.md, FORM.png and FORM.json; an earlier report of this form is replaced.
    """
    if find_spec("torch") is None:
        raise ConfigError('torch is not installed, and the baseline needs it; pip install -e ".[torch]" in a clone')
    from hypersteer_jax.evaluation.compare import run_comparison

    return 0 if run_comparison(form, steps, seed, out) else 1


@data.command(name="prepare")
def prepare(
    name: Annotated[str, tyro.conf.Positional],
    source: str | None = None,
    out: Path = Path("runs/data"),
    held_out: tuple[str, ...] = ("ho500", "ablations10"),
    dev_rows: int = 1000,
    seed: int = 0,
    skip_bad_rows: bool = False,
) -> None:
    """Split a set of AxBench for good and store it below OUT; `train --data.source` takes the folder it prints.

    Args:
        name: concept10_2b_l20, concept500_9b_l31, concept16k_2b_l20, conceptFD_2b_l10, ...; a new name for a source of
            your own.
        source: train_data.parquet, a folder with it, a clone of AxBench, or a hub id; the default is AxBench's hub id.
        out: folder of tensorflow-datasets.
        held_out: lists of concepts that are never trained on, by name (ho500, ablations10) or file: JSON lines with
            concept, feature or concept_id, or a JSON list of concept ids.
        dev_rows: rows of other concepts that are not trained on, at most a tenth of them.
        seed: which rows.
        skip_bad_rows: drop malformed rows instead of stopping.
    """
    from rich.console import Console

    from hypersteer_jax.data.axbench.builder import Recipe, prepare

    prepare(name, Recipe(source, held_out, dev_rows, seed, skip_bad_rows), out, Console())


@data.command(name="describe")
def describe(
    source: Annotated[Path, tyro.conf.Positional], out: Path = Path("runs/lengths.png"), tokenizer: Path | None = None
) -> int:
    """Show counts, lengths, duplicates and leaks of a prepared folder or a file; exits 1 if held-out data leaks.

    Args:
        source: what `data prepare` printed, or a .parquet or .jsonl file.
        out: picture of the lengths.
        tokenizer: folder with a tokenizer, to measure in tokens instead of characters.
    """
    from rich.console import Console

    from hypersteer_jax.data.describe import describe

    return 0 if describe(source, out, tokenizer, Console()) else 1


@data.command(name="make")
def make(
    concepts: Annotated[str, tyro.conf.Positional],
    instructions: tuple[Path, ...],
    out: Path,
    model: str = "gpt-4o-mini-2024-07-18",
    base_url: str | None = None,
    key_variable: str | None = None,
    price: tuple[float, float] | None = None,
    max_cost: float | None = None,
    dry_run: bool = False,
    per_concept: int = 72,
    max_tokens: int = 192,
    temperature: float = 1.0,
    workers: int = 16,
    seed: int = 0,
) -> int:
    """Have a chat model write AxBench-like rows for new concepts; prints the cost first, resumes, exits 1 if rows lack.

    Args:
        concepts: list of concepts: ho500, ablations10, JSON lines with concept, or a Neuronpedia export (JSON).
        instructions: files with instructions of all three genres: JSON lines with genre and instruction, or parquet
            files of AxBench.
        out: folder; one that was begun is continued.
        model: name of the model at the endpoint.
        base_url: OpenAI-compatible endpoint; the default is OpenAI's.
        key_variable: environment variable with the key; OPENAI_API_KEY at OpenAI, elsewhere none unless named.
        price: dollars per million tokens of prompt and of reply.
        max_cost: dollars; refuses to begin if it might cost more.
        dry_run: only say what it would cost at most.
        per_concept: instructions for each concept, with a positive and a contrastive response each.
        max_tokens: of a reply.
        temperature: of the model.
        workers: calls at the same time.
        seed: draws the instructions.
    """
    if find_spec("openai") is None or find_spec("tenacity") is None:
        raise ConfigError('openai or tenacity is not installed; pip install -e ".[endpoint]" in a clone')
    from rich.console import Console

    from hypersteer_jax.data.make import make, make_request
    from hypersteer_jax.evaluation.endpoint import OPENAI, Endpoint, Price

    request = make_request(concepts, instructions, per_concept, seed)
    endpoint = Endpoint(
        model,
        base_url or OPENAI,
        key_variable,
        temperature,
        max_tokens,
        price=None if price is None else Price(*price, "as given"),
        workers=workers,
    )
    return 0 if make(request, endpoint, out, max_cost, dry_run, Console()) else 1


@app.command(name="judge")
def judge(
    source: Annotated[Path, tyro.conf.Positional],
    out: Path,
    config: Annotated[JudgeConfig, tyro.conf.arg(name="")],
    preview: bool = False,
) -> None:
    """Rate generated texts on AxBench's three questions; what was rated before is not asked, or paid for, again.

    Args:
        source: a steering_data.parquet as AxBench writes it.
        out: the same with ratings.
        config: who rates, and what it may cost.
        preview: say what it would cost, and stop.
    """
    from hypersteer_jax.evaluation.judge_file import judge_file

    judge_file(source, out, config, preview)


@app.command(name="evaluate")
def evaluate(
    run: Annotated[Path, tyro.conf.Positional],
    config: Annotated[EvaluateConfig, tyro.conf.arg(name="")],
    preview: bool = False,
) -> None:
    """Score a run as AxBench does, held-in and held-out, beside prompting and controls; a killed one goes on.

    Args:
        run: folder of a training run; its newest checkpoint is taken.
        config: what is asked, and who rates.
        preview: say what there is to do and what it would cost, and stop.
    """
    from hypersteer_jax.evaluation.evaluate import evaluate
    from hypersteer_jax.evaluation.evaluate_report import print_scores

    out = evaluate(run, config, preview)
    if not preview:
        print_scores(out)


@app.command(name="report")
def report(
    evaluations: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path, prompting: Path | None = None
) -> None:
    """Make one page of any number of evaluations: tables, curves, concepts, best and worst texts, differences.

    Args:
        evaluations: folders of evaluated runs, or of evaluations.
        out: folder for report.md, its pictures, and report.json; an earlier report in it is replaced.
        prompting: rated texts of prompting (a steering_data.parquet as AxBench's evaluate/ has) for win rates against
            it; without, those of each evaluation itself.
    """
    from hypersteer_jax.evaluation.evaluate_report import write_report

    write_report(evaluations, out, prompting)


def main() -> None:
    """Entry point: runs a command; what a user can mend is one message without a traceback, exit code 1."""
    keep_compilations()
    try:
        code = app.cli(prog="hypersteer", description=__doc__, config=(tyro.conf.CascadeSubcommandArgs,))
    except ConfigError as error:
        fail(error)
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # Imported here, when the command has long imported them: at the top they would make `--help` slow.
        from hypersteer_jax.data.batch import DataError
        from hypersteer_jax.evaluation.golden import GoldenError
        from hypersteer_jax.models.weights import WeightsError
        from hypersteer_jax.training.checkpoint import CheckpointError
        from hypersteer_jax.training.preemption import EXIT_CODE, Preempted

        if isinstance(error, Preempted):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not change the exit code
            print(error, file=sys.stderr)
            sys.exit(EXIT_CODE)
        if isinstance(error, DataError | GoldenError | WeightsError | CheckpointError | FloatingPointError):
            fail(error)
        raise
    sys.exit(code or 0)


def keep_compilations() -> None:
    """Has jax keep what it compiles, so that the next run with the same shapes starts at once.

    In the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another; JAX_ENABLE_COMPILATION_CACHE=false
    switches it off. Environment variables, because jax is not imported yet.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(home / "hypersteer_jax" / "compiled"))


def fail(error: Exception) -> None:
    """Prints what is wrong and exits."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
