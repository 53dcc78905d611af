"""A run on a TPU pod without a cloud: the scripts of tpu_scripts/, two preemptions, and the same weights in the end?

    python experiments/rehearsal.py                  10 minutes on 2 busy cores
    python experiments/rehearsal.py --trainer fake   seconds: a counter in place of the training

The scripts run as they are; `gcloud` is a stub (tests/tpu_scripts/stubs) that checks its flags and keeps TPUs and
buckets in a folder. A TPU has two workers, which are processes of this machine with four CPU devices each. One run is
left alone; another is taken away twice amid its steps, once told (SIGTERM, grace, SIGKILL) and once not, and watch.sh
has to make the TPU again and to continue. Before that, preflight.sh has to refuse what is broken on purpose.
Expected: every refusal names the worker and the fix, and all final weights are equal, bit for bit.
What came out: experiments/results/rehearsal.md, which this script writes.
"""

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from hypersteer_jax.data.sources import load_base
from hypersteer_jax.sharding import make_mesh
from hypersteer_jax.training.checkpoint import open_checkpoints, read_config, restore
from hypersteer_jax.training.train import init_state

CLONE = Path(__file__).resolve().parents[1]
SCRIPTS, STUBS = CLONE / "tpu_scripts", CLONE / "tests/tpu_scripts/stubs"
sys.path.insert(0, str(STUBS))
import cloud  # noqa: E402  # of the stub gcloud, which is no package: only now is it on the path

ACCELERATOR, WORKERS = "v5p-16", 2
PREEMPTIONS = ((15, 20.0), (34, 0.0))  # after a step; seconds of grace: a spot VM has up to 30, a pod on GKE 15
REAL = "tinyworld --train.steps 40 --train.batch 16 --train.save-every 10 --train.eval-every 0 --data.buckets 1"
FAKE = "fake --train.steps 100"


class Step(NamedTuple):
    """A row of the report."""

    what: str
    command: str
    seconds: float
    result: str


class Rehearsal:
    """A cloud of its own, the scripts on it, and a record of what was run."""

    def __init__(self, folder: Path, trainer: str):
        self.folder, self.trainer, self.steps = folder, {"real": REAL, "fake": FAKE}[trainer], list[Step]()
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        os.environ |= {
            "STUB_CLOUD": str(folder / "cloud"),
            "STUB_PORT": str(self.port),
            "PATH": f"{STUBS}:{os.environ['PATH']}",
        }
        if trainer == "fake":
            os.environ["STUB_TRAINER"] = str(STUBS / "fake_trainer.py")
        assert Path(str(shutil.which("gcloud"))).parent == STUBS  # never the real one

    def settings(self, name: str, **changes: str) -> Path:
        """Writes the settings file of a run."""
        values = {
            "NAME": name,
            "TRAIN": f"({self.trainer})",
            "BUCKET": str(self.folder / "bucket"),
            "FILES": "none",
            "PROJECT": "rehearsal",
            "ZONE": "us-west4-a",
            "ACCELERATOR": ACCELERATOR,
            "CAPACITY": "spot",
            "PORT": str(self.port),
            "FREE_GB": "1",
            "POLL": "0.3",
        }
        text = (SCRIPTS / "settings.sh").read_text()
        for setting, value in (values | changes).items():
            text = re.sub(rf"^{setting}=\S*", f"{setting}={value}", text, flags=re.MULTILINE)
        path = self.folder / f"{name}.sh"
        path.write_text(text)
        return path

    def run_dir(self, name: str) -> Path:
        """Where a run's checkpoints and metrics are."""
        return self.folder / "bucket" / name / "run"

    def script(self, what: str, name: str, run: str, code: int = 0) -> str:
        """Runs a script to its end and records it; its output.

        Raises:
            RuntimeError: it ended with another exit code.
        """
        begin = time.monotonic()
        command = [str(SCRIPTS / f"{name}.sh"), str(self.folder / f"{run}.sh")]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        self.record(what, name, time.monotonic() - begin, f"exit code {done.returncode}")
        print(done.stdout, end="", flush=True)
        if done.returncode != code:
            raise RuntimeError(f"{name}.sh ended with {done.returncode}, not {code}; its output is above")
        return done.stdout

    def record(self, what: str, command: str, seconds: float, result: str) -> None:
        """One more row."""
        self.steps.append(Step(what, command, seconds, result))
        print(f"-- {what}: {result} after {seconds:.1f} s", flush=True)

    def start(self, run: str, **changes: str) -> None:
        """A TPU with everything on it."""
        self.settings(run, **changes)
        self.script(f"{run}: ask for the TPU, wait", "create", run)
        self.script(f"{run}: code, packages, files", "setup", run)


def refusals(rehearsal: Rehearsal, run: str) -> None:
    """Breaks one thing after the other; preflight has to name it, and to agree again when it is mended."""
    with cloud.request(run) as fields:
        vms = cloud.workers(fields)
    forbidden, lock = cloud.root() / "forbidden", vms[0] / "tmp/libtpu_lockfile"
    packages, holders = vms[1] / "hypersteer/requirements.txt", vms[1] / "tmp/holders"
    kept = packages.read_text()
    breaks: list[tuple[str, Callable[[], object], Callable[[], object], str]] = [
        (
            "a bucket that a worker cannot write",
            lambda: forbidden.write_text(f"{run}-w-1"),
            forbidden.unlink,
            rf"problem {run}-w-1 cannot write \S+: .*403.*objectAdmin",
        ),
        (
            "a stale lock of libtpu",
            lambda: lock.write_text(""),
            lock.unlink,
            rf"problem {run}-w-0 has a stale lock .*sudo rm",
        ),
        (
            "a process on the chips",
            lambda: holders.write_text(" 4711"),
            holders.unlink,
            rf"problem {run}-w-1 has processes on its chips: 4711; .*sudo kill -9 4711",
        ),
        (
            "another version of jax",
            lambda: packages.write_text(kept.replace("jax==0.10.2", "jax==0.10.1")),
            lambda: packages.write_text(kept),
            rf"versions differ.*\n{run}-w-0 .*jax==0\.10\.2.*\n{run}-w-1 .*jax==0\.10\.1",
        ),
    ]
    for what, damage, mend, expected in breaks:
        damage()
        said = rehearsal.script(f"{run}: {what}", "preflight", run, code=2)
        if not re.search(expected, said):
            raise RuntimeError(f"preflight did not say {expected}")
        mend()
    rehearsal.script(f"{run}: all mended", "preflight", run)


def preempt(rehearsal: Rehearsal, run: str, step: int, grace: float) -> None:
    """Waits until a run has made so many steps, and takes its TPU away."""
    begin, metrics = time.monotonic(), rehearsal.run_dir(run) / "metrics.jsonl"
    while not metrics.exists() or f'"step": {step - 1},' not in metrics.read_text().replace("}", ","):
        if time.monotonic() > begin + 600:
            raise RuntimeError(f"{run} did not come to step {step} in 10 minutes")
        time.sleep(0.05)
    seconds = cloud.take_away(run, grace)
    logs = rehearsal.run_dir(run).parent.glob("logs/*.log")
    saved = sum(log.read_text().endswith("exit 75\n") for log in logs) == WORKERS
    told = "saved, exit code 75" if saved and grace > 0 else "killed"
    what = f"{told}; newest checkpoint: step {newest(rehearsal.run_dir(run))}"
    rehearsal.record(f"{run}: taken away after step {step}, {grace:.0f} s of grace", "-", seconds, what)


def newest(run: Path) -> int:
    """Step of a run's last checkpoint."""
    return max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def weights(run: Path) -> dict[str, np.ndarray]:
    """All arrays of a run's last checkpoint, by name."""
    fake = run / "checkpoints" / str(newest(run)) / "weights"
    if fake.exists():
        return {"weights": np.frombuffer(fake.read_bytes(), np.uint8)}
    config, mesh = read_config(run), make_mesh(fsdp=None)
    with jax.set_mesh(mesh), open_checkpoints(run) as checkpoints:
        lm, _ = load_base(config.lm, config.train.compute_dtype, mesh)
        restored = restore(checkpoints, jax.eval_shape(partial(init_state, config), lm), mesh)
    assert restored.step == config.train.steps
    leaves = jax.tree_util.tree_leaves_with_path(restored.state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether all arrays are the same, bit for bit."""
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def report(rehearsal: Rehearsal, arrays: dict[str, np.ndarray], equal: bool) -> str:
    """Markdown."""
    rows = "\n".join(f"| {s.what} | `{s.command}` | {s.seconds:.1f} | {s.result} |" for s in rehearsal.steps)
    size = sum(array.nbytes for array in arrays.values())
    return f"""# Rehearsal of a run on a pod

`python experiments/rehearsal.py`: the scripts of `tpu_scripts/` with a stub `gcloud`, on {WORKERS} workers with
{cloud.DEVICES} CPU devices each: `hypersteer train {rehearsal.trainer} --multihost`.

Final weights, moments and step ({len(arrays)} arrays, {size / 1e6:.1f} MB) of the preempted run and the one left alone:
**{"equal, bit for bit" if equal else "DIFFERENT"}**.

| what | script | seconds | result |
| --- | --- | ---: | --- |
{rows}
"""


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=("real", "fake"), default="real")
    parser.add_argument("--out", type=Path, help="folder of the cloud; a temporary one if not given")
    parser.add_argument("--report", type=Path, default=CLONE / "experiments/results/rehearsal.md")
    args = parser.parse_args()
    folder = (args.out or Path(tempfile.mkdtemp(prefix="rehearsal-"))).resolve()
    rehearsal = Rehearsal(folder, args.trainer)
    try:
        rehearsal.start("alone")
        refusals(rehearsal, "alone")
        rehearsal.script("alone: start on all workers", "launch", "alone")
        rehearsal.script("alone: to its end", "watch", "alone")
        rehearsal.script("alone: give the TPU back", "delete", "alone")
        rehearsal.start("preempted")
        rehearsal.script("preempted: start on all workers", "launch", "preempted")
        begin = time.monotonic()
        watch = subprocess.Popen([str(SCRIPTS / "watch.sh"), str(folder / "preempted.sh")])
        for step, grace in PREEMPTIONS:
            preempt(rehearsal, "preempted", step, grace)
        code, seconds = watch.wait(), time.monotonic() - begin
        rehearsal.record("preempted: to its end, TPU made again each time", "watch", seconds, f"exit code {code}")
        if code != 0:
            raise RuntimeError(f"watch.sh ended with {code}")
        rehearsal.script("preempted: give the TPU back", "delete", "preempted")
        arrays = weights(rehearsal.run_dir("alone"))
        equal = same(arrays, weights(rehearsal.run_dir("preempted")))
    finally:
        cloud.remove(list((cloud.root() / "vms").glob("*/w-*")))
    text = report(rehearsal, arrays, equal)
    args.report.write_text(text)
    print(text)
    if args.out is None:
        shutil.rmtree(folder)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
