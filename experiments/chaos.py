"""Kills training runs at random moments, resumes them, and compares with a run that was left alone, bit for bit.

    python experiments/chaos.py --kills 24 --processes 1
    python experiments/chaos.py --kills 24 --processes 2

A small run on the tiny world, on CPUs, goes through `hypersteer train`: steps, evaluations, and saves every few steps.
Half of the kills are SIGTERM, half SIGKILL; they are aimed at compiling, steps, evaluations and the writing of
checkpoints in turn, at a random moment of each. Two processes, with two devices each, are hit together or one alone.
After every kill the run is resumed, after its last step its checkpoint (parameters, moments, step, place in the data)
and its metrics are compared, and another run begins, until all kills are spent.

Expected: every run comes out equal; every process that gets SIGTERM exits with code 75 within the grace period and
loses no step; SIGKILL costs at most the steps since the last committed save; the ledger sums to the wall time.
What came out here: experiments/results/chaos.md, which this script writes. About 10 minutes for each on 2 cores.
"""

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hypersteer_jax.data.sources import load_base
from hypersteer_jax.data.tinyworld.world import training_examples
from hypersteer_jax.sharding import make_mesh
from hypersteer_jax.training import checkpoint
from hypersteer_jax.training.ledger import LEDGER, account
from hypersteer_jax.training.metrics import read_rows
from hypersteer_jax.training.preemption import EXIT_CODE
from hypersteer_jax.training.train import init_state

SAVE_EVERY, EVAL_EVERY = 5, 7
SETTINGS = {
    "--hypernet.blocks": 1,
    "--data.buckets": 1,
    "--data.held-out-concepts": 0,
    "--train.eval-batches": 1,
    "--train.save-every": SAVE_EVERY,
    "--train.eval-every": EVAL_EVERY,
    "--train.eval-share": 1,  # as often as that
    "--train.factor-range": "0.5 1.5",  # a random number in every step
}
ROWS = 400  # of training data
GRACE = 30  # seconds from SIGTERM to the end, which is what Kubernetes and Google Cloud give
BOUND = 180  # seconds until a process has noticed that another one is gone
PHASES = ("compile", "step", "eval", "save")


@dataclass(frozen=True)
class Setup:
    """What all runs have in common."""

    folder: Path  # for everything that is written
    processes: int
    steps: int  # of a run
    seed: int

    def write_data(self) -> None:
        """What is trained on."""
        with (self.folder / "rows.jsonl").open("w") as file:
            file.writelines(json.dumps(row._asdict()) + "\n" for row in training_examples(ROWS, self.seed))

    def start(self, run: Path, resume: bool, cached: bool = True) -> list[subprocess.Popen[bytes]]:
        """All processes of an attempt at a run; what they print goes to RUN.N.log."""
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=2",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_ENABLE_COMPILATION_CACHE": str(cached).lower(),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(self.processes),
        }
        words = [sys.executable, "-m", "hypersteer_jax.cli", "train", "tinyworld", "--out", str(run)]
        words += ["--data.source", str(self.folder / "rows.jsonl")]
        words += ["--train.steps", str(self.steps), "--train.seed", str(self.seed)]
        words += ["--train.batch", str(4 * self.processes)]
        words += [word for name, value in SETTINGS.items() for word in (name, *str(value).split())]
        words += ["--resume"] * resume + ["--multihost"] * (self.processes > 1)
        started = []
        for index in range(self.processes):
            with run.with_suffix(f".{index}.log").open("ab") as log:
                own = environment | {"JAX_PROCESS_ID": str(index)}
                started.append(subprocess.Popen(words, env=own, stdout=log, stderr=subprocess.STDOUT))
        return started

    def finish(self, run: Path, resume: bool) -> None:
        """An attempt that is left alone."""
        finished(self.start(run, resume), run)


def finished(processes: list[subprocess.Popen[bytes]], run: Path) -> None:
    """Waits for processes that have to end well."""
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"{run} ended by itself with codes {codes}; see {run}.*.log")


def newest_attempt(run: Path) -> list[dict[str, Any]]:
    """Its rows in a run's ledger."""
    rows = read_rows(run / LEDGER)
    return [row for row in rows if row["attempt"] == rows[-1]["attempt"]]


def unfinished(run: Path) -> set[str]:
    """Names of checkpoints that are being written, or were when a process was killed."""
    return {path.name for path in (run / "checkpoints").glob("*tmp*")}


def phase_after(rows: list[dict[str, Any]], steps: int) -> str:
    """What an attempt, at a run of so many steps, is at after these rows of its ledger; "end" when it is through."""
    row = rows[-1] if rows else {"kind": "lost"}
    last = row.get("last", 0)
    if [row["kind"] for row in rows[-2:]] == ["eval", "save"] and last == steps:
        return "end"
    saves, measures = (last % every == 0 or last == steps for every in (SAVE_EVERY, EVAL_EVERY))
    match row["kind"]:
        case "lost":
            return "init"
        case "restore":
            return "compile"
        case "init":
            return "save" if len(rows) == 1 else "restore"
        case "save" if last == 0:
            return "compile"
        case "step" if saves:
            return "save"
        case "step" | "save" if measures:
            return "eval"
        case _:
            return "step"


class Attempt:
    """One attempt at a run, watched through its files."""

    def __init__(self, setup: Setup, run: Path, resume: bool, cached: bool):
        self.run, self.steps = run, setup.steps
        self._before = newest_attempt(run)[0]["attempt"] if resume else 0
        self._stale = unfinished(run)
        self.processes = setup.start(run, resume, cached)

    def rows(self) -> list[dict[str, Any]]:
        """Its rows in the ledger."""
        found = newest_attempt(self.run) if (self.run / LEDGER).exists() else []
        return found if found and found[0]["attempt"] > self._before else []

    def phase(self) -> str:
        return phase_after(self.rows(), self.steps)

    def compiled(self) -> bool:
        return any(row["kind"] == "compile" for row in self.rows())

    def writes(self) -> bool:
        """Whether a checkpoint is being written."""
        return bool(unfinished(self.run) - self._stale)

    def goes_on(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def wait_until(self, happens: Callable[[], bool]) -> None:
        """Until then, or the end."""
        while self.goes_on() and not happens():
            time.sleep(0.002)


@dataclass(frozen=True)
class Kill:
    """One kill and what came of it."""

    run: str
    phase: str
    writing: bool  # whether a checkpoint was being written
    signal: str
    victims: list[int]  # indices of processes
    codes: list[int]  # of all processes
    seconds: float  # until the last victim was gone
    seconds_all: float  # and until all processes were
    logged: int  # steps that were done
    committed: int  # step of the newest checkpoint that was left; -1: none
    floor: int  # step before which it must not be

    def faults(self) -> list[str]:
        """What must not be."""
        found = []
        if self.committed < self.floor:
            found.append(f"the newest checkpoint is of step {self.committed}, but {self.floor} was saved")
        if self.signal == "SIGTERM":
            codes = [self.codes[index] for index in self.victims]
            found += [f"exit code {code}" for code in codes if code != EXIT_CODE]
            found += [f"took {self.seconds:.0f} s"] * (self.seconds > GRACE)
        return found


def aims(rng: random.Random) -> Iterator[tuple[str, signal.Signals]]:
    """Phases and signals to be hit by; each as often as all others, the signals in turn."""
    while True:
        for told, shot in zip(rng.sample(PHASES, len(PHASES)), rng.sample(PHASES, len(PHASES)), strict=True):
            yield told, signal.SIGTERM
            yield shot, signal.SIGKILL


def kill(attempt: Attempt, aim: tuple[str, signal.Signals], rng: random.Random, lasts: dict[str, float]) -> Kill | None:
    """Kills an attempt at a random moment of a phase; None if it was through before.

    Args:
        attempt: just started.
        aim: phase and signal.
        rng: draws the moment, and the victims among several processes.
        lasts: seconds of each phase; of one step.
    """
    target, sign = aim
    if target != "compile":
        attempt.wait_until(attempt.compiled)
        time.sleep(rng.uniform(0, 2 * SAVE_EVERY * lasts["step"]))
    attempt.wait_until(lambda: attempt.phase() == target or (target == "save" and attempt.writes()))
    time.sleep(rng.uniform(0, lasts[target]))
    phase, writing = attempt.phase(), attempt.writes()
    processes, run = attempt.processes, attempt.run
    victims = list(range(len(processes)))
    if len(victims) > 1 and rng.random() < 1 / 3:
        victims = [rng.choice(victims)]
    if phase == "end" or not attempt.goes_on():
        finished(processes, run)
        return None
    begin = time.monotonic()
    for index in victims:
        processes[index].send_signal(sign)
    for index in victims:
        processes[index].wait(BOUND)
    seconds = time.monotonic() - begin
    codes = [process.wait(BOUND) for process in processes]
    seconds_all = time.monotonic() - begin
    if attempt.phase() == "end":
        return None
    with checkpoint.open_checkpoints(run) as checkpoints:
        committed = max(checkpoint.stored(checkpoints), default=-1)
    steps = {row["step"] for row in read_rows(run / "metrics.jsonl")}
    logged = len(steps) if attempt.compiled() else committed  # before that they are of the attempt before
    saved = sorted({row["last"] for row in attempt.rows() if row["kind"] == "save"})
    stored = saved[:-1] + [row["last"] for row in attempt.rows() if row["kind"] == "restore"]
    floor = logged if sign is signal.SIGTERM else max(stored, default=-1)
    return Kill(
        run.name, phase, writing, sign.name, victims, codes, seconds, seconds_all, logged, committed, floor
    )  # fmt: skip


def final_state(run: Path) -> tuple[dict[str, np.ndarray], int]:
    """Every array of the last checkpoint by its name, and the place in the data."""
    config = checkpoint.read_config(run)
    lm, _ = load_base(config.lm, config.train.compute_dtype)
    abstract = jax.eval_shape(partial(init_state, config), lm)
    with checkpoint.open_checkpoints(run) as checkpoints:
        restored = checkpoint.restore(checkpoints, abstract, make_mesh())
    leaves = jax.tree_util.tree_leaves_with_path(restored.state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, checkpoint.resume_position(restored)


def metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of the metrics, without what a clock has measured."""
    rows = read_rows(run / "metrics.jsonl")
    return [{name: row[name] for name in row if name not in ("seconds", "evaluation_share")} for row in rows]


def differences(run: Path, whole: Path) -> list[str]:
    """Names of what is not equal, bit for bit."""
    (ours, place), (theirs, expected) = final_state(run), final_state(whole)
    changed = [name for name in theirs if ours[name].tobytes() != theirs[name].tobytes()]
    return changed + ["place in the data"] * (place != expected) + ["metrics"] * (metrics(run) != metrics(whole))


def wall_error(run: Path, started: float) -> float:
    """Difference of the ledger's sum to the time from the run's start to its last printed line, relative."""
    wall = run.with_suffix(".0.log").stat().st_mtime - started
    return abs(sum(account(run).seconds.values()) / wall - 1)


def experiment(setup: Setup, kills: int) -> dict[str, Any]:
    """All runs. Raises SystemExit when something is not as it has to be."""
    setup.write_data()
    whole, started = setup.folder / "whole", time.time()
    setup.finish(whole, resume=False)
    errors = [wall_error(whole, started)]
    lasts = {
        kind: float(np.median([r["seconds"] for r in newest_attempt(whole) if r["kind"] == kind])) for kind in PHASES
    }
    lasts["step"] = account(whole).seconds["step"] / setup.steps
    rng = random.Random(setup.seed)
    remaining, results, runs = aims(rng), list[Kill](), 0
    aim = next(remaining)
    while len(results) < kills:
        runs += 1
        run, started, resume = setup.folder / f"run{runs}", time.time(), False
        while len(results) < kills:
            result = kill(Attempt(setup, run, resume, cached=aim[0] != "compile"), aim, rng, lasts)
            if result is None:
                break
            resume = True
            results.append(result)
            aim = next(remaining)
            print(f"{len(results)}: {result}", flush=True)
            if faults := result.faults():
                raise SystemExit(f"{run}: {', '.join(faults)}; see {run}.*.log")
        else:
            setup.finish(run, resume)
        errors.append(wall_error(run, started))
        if changed := differences(run, whole):
            raise SystemExit(f"{run} differs from {whole} in {', '.join(changed)}")
        print(f"{run.name} is equal to the run that was left alone", flush=True)
    return {
        "processes": setup.processes,
        "steps": setup.steps,
        "seed": setup.seed,
        "runs": runs,
        "kills": [vars(result) for result in results],
        "wall_error": max(errors),
    }


def report(found: dict[str, Any]) -> str:
    """Markdown of one experiment."""
    kills = found["kills"]
    told, shot = ([kill for kill in kills if kill["signal"] == name] for name in ("SIGTERM", "SIGKILL"))
    phases = [phase for phase in ("init", "restore", *PHASES) if any(kill["phase"] == phase for kill in kills)]
    counts = Counter((kill["signal"], kill["phase"]) for kill in kills)
    alone = [kill["seconds_all"] for kill in kills if len(kill["victims"]) < found["processes"]]
    lost = [kill["logged"] - kill["committed"] for kill in shot if kill["committed"] >= 0] or [0]
    lines = [
        f"## {found['processes']} process{'es' * (found['processes'] > 1)}",
        "",
        f"{len(kills)} kills in {found['runs']} runs of {found['steps']} steps, seed {found['seed']}. All runs came "
        "out equal to the one that was left alone.",
        "",
        "| hit in | " + " | ".join(phases) + " | of these, while a checkpoint was being written |",
        "| --- |" + " ---: |" * (len(phases) + 1),
        *(
            f"| {name} | {' | '.join(str(counts[name, phase]) for phase in phases)} | "
            f"{sum(kill['writing'] for kill in group)} |"
            for name, group in (("SIGTERM", told), ("SIGKILL", shot))
        ),
        "",
        f"- SIGTERM: exit code {EXIT_CODE} every time, {max(kill['seconds'] for kill in told):.1f} s later at most "
        f"(grace {GRACE} s). No step was lost.",
        f"- SIGKILL: {max(lost)} steps were lost at most, {np.mean(lost):.1f} on average, never more than since the "
        "last committed save.",
        f"- The ledger of every run sums to its wall time within {found['wall_error']:.2%}.",
        *[f"- {len(alone)} kills hit one process alone; all were gone {max(alone, default=0):.0f} s later."]
        * bool(alone),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="all that is found there is reported")
    parser.add_argument("--report", type=Path, default=Path("experiments/results/chaos.md"))
    args = parser.parse_args()
    folder = args.out / f"processes{args.processes}"
    folder.mkdir(parents=True)
    found = experiment(Setup(folder, args.processes, args.steps, args.seed), args.kills)
    folder.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    parts = [report(json.loads(path.read_text())) for path in sorted(args.out.glob("processes*.json"))]
    head = (
        "# Chaos\n\n"
        "`python experiments/chaos.py --kills N --processes P`: runs on the tiny world, saved every "
        f"{SAVE_EVERY} and evaluated every {EVAL_EVERY} steps, each process with two CPU devices, killed and resumed. "
        "Parameters, Adam's moments, step, place in the data and metrics are compared bit for bit. jax "
        f"{jax.__version__}.\n"
    )
    args.report.write_text("\n".join([head, *parts]))
    print(args.report.read_text())


if __name__ == "__main__":
    main()
