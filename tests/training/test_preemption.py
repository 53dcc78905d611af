"""Being told to stop, in this process and in others that really get the signal; and being stuck."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from hypersteer_jax.training import preemption
from hypersteer_jax.training.preemption import EXIT_CODE, Preempted, listen

PATIENCE = 60  # seconds until a test gives up on a process or thread
# Ten minutes outside of Python, as in the compiler: no handler of a signal gets its turn.
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000_000)"


def start(code: str) -> subprocess.Popen:
    """A Python process that has printed a line."""
    words = [sys.executable, "-c", f"from hypersteer_jax.training.preemption import *\n{code}"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def wait_for(condition: str, happens) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < deadline, condition
        time.sleep(0.01)


def test_process_that_compiles_leaves_as_soon_as_it_is_told() -> None:
    process = start(
        f"with listen() as n: n.leave_at_once(lambda: 'step 3 is saved'); print('ready', flush=True); {BUSY}"
    )
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=PATIENCE) == ("", "told to stop by SIGTERM: step 3 is saved\n")
    assert process.returncode == EXIT_CODE == 75


def test_last_act_is_waited_for_and_a_second_signal_changes_nothing() -> None:
    process = start(f"""
import time
def last_act():
    print('saving', flush=True)
    time.sleep(1)
    return 'saved'
with listen() as notice:
    notice.leave_at_once(last_act)
    print('ready', flush=True)
    {BUSY}
""")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=PATIENCE) == ("", "told to stop by SIGTERM: saved\n")
    assert process.returncode == EXIT_CODE


def test_last_act_that_fails_is_no_success() -> None:
    process = start(f"with listen() as n: n.leave_at_once(lambda: 1 / 0); print('ready', flush=True); {BUSY}")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=PATIENCE)[1] == "error: told to stop by SIGTERM, but division by zero\n"
    assert process.returncode == 1


def test_signal_is_noted_when_somebody_looks_and_the_handlers_come_back() -> None:
    def theirs(*_: object) -> None: ...

    mine = signal.signal(signal.SIGTERM, theirs)
    try:
        with listen() as notice:
            notice.hold()
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for("the signal is noted", lambda: notice.told)
            with pytest.raises(Preempted, match="all is saved"):
                notice.leave_at_once(lambda: "all is saved")
        assert signal.getsignal(signal.SIGTERM) is theirs
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGTERM, mine)


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    found = []

    def run() -> None:
        with listen():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(PATIENCE)
    assert found == [signal.getsignal(signal.SIGTERM)]


# Google Cloud's notices


class Metadata(ThreadingHTTPServer):
    """A metadata server: a value waits for its next change if it is asked to."""

    daemon_threads = True

    def __init__(self) -> None:
        self.values = {"maintenance-event": "NONE", "preempted": "FALSE"}
        self.version, self.asked = 0, 0
        super().__init__(("127.0.0.1", 0), Answer)

    def change(self, path: str, value: str) -> None:
        self.values[path] = value
        self.version += 1


class Answer(BaseHTTPRequestHandler):
    server: Metadata

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        if self.headers["Metadata-Flavor"] != "Google":
            return self.send_error(403)
        assert url.path.startswith("/computeMetadata/v1/instance/")
        while query.get("wait_for_change") and query["last_etag"] == [str(self.server.version)]:
            time.sleep(0.01)
        self.send_response(200)
        self.send_header("ETag", str(self.server.version))
        self.end_headers()
        self.wfile.write(self.server.values[url.path.rpartition("/")[2]].encode())
        self.server.asked += 1

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    with Metadata() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_address[1]}")
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "value"), [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE")]
)
def test_notice_of_the_machine_counts_like_the_signal(metadata: Metadata, path: str, value: str) -> None:
    with listen() as notice:
        notice.hold()
        wait_for("both values are known", lambda: metadata.asked == 2)
        metadata.change("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
        wait_for("both values are known again", lambda: metadata.asked == 4)
        assert not notice.told  # the machine moves while it runs
        metadata.change(path, value)
        wait_for("the notice is noted", lambda: notice.told)


def test_notice_that_stood_before_the_start_is_no_news(metadata: Metadata) -> None:
    metadata.change("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    with listen() as notice:
        notice.hold()
        wait_for("both values are known", lambda: metadata.asked == 2)
        metadata.change("preempted", "FALSE")
        wait_for("both values are known again", lambda: metadata.asked == 4)
        assert not notice.told
        metadata.change("maintenance-event", "NONE")
        wait_for("it is over", lambda: metadata.asked == 6)
        metadata.change("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
        wait_for("the next one is noted", lambda: notice.told)


def test_metadata_server_that_fails_for_a_while_is_asked_again(
    metadata: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "RETRY", 0.01)
    with listen() as notice:
        notice.hold()
        wait_for("both values are known", lambda: metadata.asked == 2)
        preempted = metadata.values.pop("preempted")  # the server's thread ends without an answer
        metadata.change("maintenance-event", "NONE")
        wait_for("the other value is known", lambda: metadata.asked == 3)
        metadata.change("preempted", preempted)
        metadata.change("preempted", "TRUE")
        wait_for("the notice is noted", lambda: notice.told)


# Being stuck


def test_stuck_process_shows_where_and_ends() -> None:
    process = start(f"""
import time
def stuck():
    {BUSY}
with Watchdog(2) as watchdog:
    for _ in range(20):  # twice as long as it may take without progress
        time.sleep(0.2)
        watchdog.progress()
    print('ready', flush=True)
    stuck()
""")
    _, shown = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "Timeout (0:00:02)!" in shown
    assert " in stuck" in shown


def test_watchdog_is_gone_when_its_block_is_left_and_0_is_none() -> None:
    process = start("""
import time
with Watchdog(1): pass
with Watchdog(0) as none: none.progress()
print('ready', flush=True)
time.sleep(2)
""")
    assert process.communicate(timeout=PATIENCE) == ("", "")
    assert process.returncode == 0
