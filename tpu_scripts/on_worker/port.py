"""Whether all workers reach process 0, on the port that it will coordinate them from; prints what is wrong.

    python3 port.py PORT WORKERS

Process 0 listens until all the others have called, or a minute; they call until somebody listens. Where process 0
is, a Cloud TPU VM's metadata say, as jax reads them, unless jax's environment variables do.
"""

import os
import socket
import sys
import time
import urllib.request

SECONDS = 60


def metadata(key: str) -> str:
    """An attribute of this VM."""
    url = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


def coordinator() -> tuple[str, bool]:
    """The address of process 0, and whether this is it."""
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        return os.environ["JAX_COORDINATOR_ADDRESS"].split(":")[0], os.environ["JAX_PROCESS_ID"] == "0"
    environment = dict(line.split(":", 1) for line in metadata("tpu-env").splitlines() if ":" in line)
    environment = {key.strip(): value.strip().strip("'") for key, value in environment.items()}
    first = metadata("worker-network-endpoints").split(",")[0].split(":")[-1]  # an address, or name:id:address
    address = environment.get("MEGASCALE_COORDINATOR_ADDRESS") or first
    slice_id = environment.get("MEGASCALE_SLICE_ID") or "0"
    return address.split(":")[0], metadata("agent-worker-number") == "0" and slice_id == "0"


def listen(port: int, callers: int) -> str:
    """Waits for the others; returns what is wrong, if anything."""
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        return f"cannot listen on port {port} ({error}); find who does with sudo ss -ltnp, or choose another PORT"
    deadline = time.monotonic() + SECONDS
    with server:
        for called in range(callers):
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                caller, _ = server.accept()
            except TimeoutError:
                return f"was called by {called} of {callers} workers on port {port} within {SECONDS} s"
            with caller:
                caller.recv(1)  # the caller hangs up first, so that the port is free again at once
    return ""


def call(address: str, port: int) -> str:
    """Calls process 0; returns what is wrong, if anything."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return ""
        except OSError as error:
            reason = error
            time.sleep(0.2)
    return f"cannot reach process 0 at {address}:{port} ({reason}); let the workers' network pass tcp:{port}"


def main() -> None:
    """Command line."""
    port, workers = int(sys.argv[1]), int(sys.argv[2])
    if workers == 1:
        return
    address, mine = coordinator()
    if problem := listen(port, workers - 1) if mine else call(address, port):
        print(problem)


if __name__ == "__main__":
    main()
