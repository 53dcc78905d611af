"""Stands in for `hypersteer train`: counts steps, saves, and leaves on SIGTERM as it does, in milliseconds.

Its weights are a chain of hashes, so that a step that is lost or done twice shows. `--fail-at` makes it fail by itself,
`--pause-at` makes it wait there to be told to go.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("command", choices=["train"])
    parser.add_argument("recipe")
    parser.add_argument("--train.steps", dest="steps", type=int, required=True)
    parser.add_argument("--fail-at", type=int)
    parser.add_argument("--pause-at", type=int)
    parser.add_argument("--multihost", action="store_true", required=True)
    parser.add_argument("--mesh.slices", type=int)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    first, checkpoints = os.environ["JAX_PROCESS_ID"] == "0", args.out / "checkpoints"
    step, weights = 0, b"start"
    if args.resume and checkpoints.exists():
        step = max(int(path.name) for path in checkpoints.iterdir())
        weights = (checkpoints / str(step) / "weights").read_bytes()
    elif not args.resume and checkpoints.exists():
        sys.exit(f"error: out is {args.out}, which holds a run")
    if first:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "config.json").write_text("{}")
    print(f"process {os.environ['JAX_PROCESS_ID']} starts at step {step}", flush=True)

    def save() -> None:
        if first:
            part = args.out / f"part-{step}"
            part.mkdir(parents=True)
            (part / "weights").write_bytes(weights)
            checkpoints.mkdir(exist_ok=True)
            part.rename(checkpoints / str(step))

    while step < args.steps:
        while step == args.pause_at and not (told or args.resume):
            time.sleep(0.02)
        if told:
            save()
            return 75
        if step == args.fail_at:
            print("error: the loss is not finite", file=sys.stderr)
            return 1
        time.sleep(0.02)
        weights = hashlib.sha256(weights + step.to_bytes(4)).digest()
        if first:
            with (args.out / "metrics.jsonl").open("a") as metrics:
                print(json.dumps({"step": step}), file=metrics)
        step += 1
    save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
