"""A cloud in a folder: queued resources as JSON files, TPU VMs as folders, their processes on this machine.

For the stub `gcloud` beside it, and for whoever takes a TPU away. The folder is $STUB_CLOUD:

    NAME.json               the request and its state
    vms/NODE/w-N/           a worker: its home folder and tmp/; NODE is NAME, or NAME-0, NAME-1, ... of several slices
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STUBS = Path(__file__).parent
QUEUE = ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")  # one further at each look
DEVICES = 4  # per worker


def root() -> Path:
    """The cloud's folder."""
    return Path(os.environ["STUB_CLOUD"])


@contextmanager
def request(name: str) -> Iterator[dict[str, Any]]:
    """The request of this name, to be read and changed by one process at a time; {} if there is none."""
    root().mkdir(parents=True, exist_ok=True)
    path = root() / f"{name}.json"
    with (root() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fields = json.loads(path.read_text()) if path.exists() else {}
        yield fields
        if fields:
            path.write_text(json.dumps(fields))
        else:
            path.unlink(missing_ok=True)


def look(name: str) -> str:
    """State of a request, which is one further in the queue the next time; its VMs start when it becomes ACTIVE."""
    with request(name) as fields:
        if not fields:
            return ""
        state = fields["state"]
        if state in QUEUE[:-1]:
            fields["state"] = QUEUE[QUEUE.index(state) + 1]
        if fields["state"] == "ACTIVE":
            for vm in workers(fields):
                (vm / "tmp").mkdir(parents=True, exist_ok=True)
        return state


def workers(fields: dict[str, Any]) -> list[Path]:
    """Folders of all VMs of a request, in the order of their processes."""
    nodes = [fields["name"]] if fields["slices"] == 1 else [f"{fields['name']}-{i}" for i in range(fields["slices"])]
    return [root() / "vms" / node / f"w-{worker}" for node in nodes for worker in range(fields["workers"])]


def environment(fields: dict[str, Any], vm: Path) -> dict[str, str]:
    """What a process on this VM sees: its own home, jax on CPU devices, and this machine's tools behind the stubs."""
    vms = workers(fields)
    keep = ("STUB_CLOUD", "STUB_TRAINER")
    return {name: os.environ[name] for name in keep if name in os.environ} | {
        "HOME": str(vm),
        "TMPDIR": str(vm / "tmp"),
        "PATH": f"{STUBS / 'worker'}:{STUBS}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "STUB_VM": str(vm),
        "STUB_HOST": f"{vm.parent.name}-{vm.name}",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{os.environ.get('STUB_PORT', '8476')}",
        "JAX_NUM_PROCESSES": str(len(vms)),
        "JAX_PROCESS_ID": str(vms.index(vm)),
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "OMP_NUM_THREADS": "1",
    }


def ssh(fields: dict[str, Any], chosen: list[Path], command: str) -> int:
    """Runs a command on these VMs at once; the exit code of one that failed, if any, as gcloud does."""
    started = [subprocess.Popen(["bash", "-c", command], cwd=vm, env=environment(fields, vm)) for vm in chosen]
    return max([process.wait() for process in started])


def take_away(name: str, grace: float) -> float:
    """Preempts: SIGTERM to everything on the VMs, SIGKILL to what is left after `grace` seconds, the disks lost.

    Without grace nothing is told, as when a machine breaks.

    Returns:
        Seconds until nothing was left.
    """
    with request(name) as fields:
        fields["state"] = "SUSPENDING"
        vms = workers(fields)
    begin = time.monotonic()
    if grace > 0:
        kill(vms, signal.SIGTERM)
    while processes(vms) and time.monotonic() < begin + grace:
        time.sleep(0.05)
    seconds = time.monotonic() - begin
    remove(vms)
    with request(name) as fields:
        fields["state"] = "SUSPENDED"
    return seconds


def remove(vms: list[Path]) -> None:
    """Ends all processes of VMs and their disks."""
    while processes(vms):
        kill(vms, signal.SIGKILL)
        time.sleep(0.05)
    for vm in vms:
        shutil.rmtree(vm, ignore_errors=True)


def kill(vms: list[Path], number: signal.Signals) -> None:
    """Sends a signal to every process of these VMs."""
    for process in processes(vms):
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


def processes(vms: list[Path]) -> list[int]:
    """All processes that run on these VMs, by what is in their environment; Linux only."""
    marks = [f"STUB_VM={vm}".encode() for vm in vms]
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            alive = (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if alive and set(marks) & set((folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
    return found
