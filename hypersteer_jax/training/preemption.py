"""What ends a run early, and in order: being told to stop, and getting stuck.

A process is told to stop by SIGTERM, as schedulers and Cloud TPU do before they take a machine away, or by a Google
Cloud VM's notice of maintenance or preemption. Between steps and between the batches of an evaluation all processes
agree on whether one of them was told (`sharding.agreement`); if so, they save the state and leave with `EXIT_CODE`.
Where there is nothing new to save, a process leaves as soon as it is told. This module is imported before jax is, which
takes seconds.

A process that gets stuck, such as one that waits for another that has died, shows where and ends.
"""

import faulthandler
import http.client
import os
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not an error, start it again
LINGER = 3.0  # seconds for which the first process outlasts the others: it is their coordinator, without it they crash
RETRY = 5  # seconds, when the metadata server does not answer for a while

# What the metadata server says, by path, when this machine is about to be taken away. Without an accelerator machines
# are moved while they run (MIGRATE_ON_HOST_MAINTENANCE), which needs nothing.
ALARMS = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "preempted": "TRUE"}


class Preempted(Exception):
    """A run was told to stop and did, with its state saved; the message says how it goes on."""


class Notice:
    """Whether this process was told to stop.

    At first it leaves as soon as it is told, and so it does after `leave_at_once`. After `hold` it is only noted, for
    somebody to look at `told`.
    """

    def __init__(self) -> None:
        self.told = False
        self.linger = 0.0  # seconds before it leaves at once
        self._lock = threading.Lock()
        self._last_act: Callable[[], str] | None = lambda: "nothing to save yet; start it again"

    def give(self, source: str) -> None:
        """Tells the process to stop, and ends it if it leaves at once. Not for the main thread, which may be held up.

        Args:
            source: who says so, for the message.
        """
        with self._lock:
            self.told = True
            if self._last_act is None:
                return
            code = EXIT_CODE
            try:
                message = f"{source}: {self._last_act()}"
            except Exception as error:  # the process has to end, whatever happens
                code, message = 1, f"error: {source}, but {error}"
            print(message, file=sys.stderr, flush=True)
            sys.stdout.flush()
            time.sleep(self.linger)
            os._exit(code)

    def leave_at_once(self, last_act: Callable[[], str]) -> None:
        """From now on the process leaves as soon as it is told, after `last_act`, which gives the message.

        Raises:
            Preempted: it has been told already.
        """
        with self._lock:
            self._last_act = last_act
            if self.told:
                raise Preempted(last_act())

    def hold(self) -> None:
        """From now on nothing happens by itself."""
        with self._lock:
            self._last_act = None


@contextmanager
def listen() -> Iterator[Notice]:
    """Gives a Notice that SIGTERM and Google Cloud's notices are passed on to, until the block is left.

    Signals can be handled in the main thread only; elsewhere they are left alone. The handler itself does nothing: it
    would have to wait for the compiler to return to Python. But the interpreter also writes the signal's number to a
    pipe, at once, and a thread reads it.
    """
    notice, over = Notice(), threading.Event()
    for path, alarm in ALARMS.items():
        threading.Thread(target=_watch_metadata, args=(notice, path, alarm, over), daemon=True).start()
    main = threading.current_thread() is threading.main_thread()
    with _signals_passed_on(notice) if main else nullcontext():
        try:
            yield notice
        finally:
            notice.hold()
            over.set()


@contextmanager
def _signals_passed_on(notice: Notice) -> Iterator[None]:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_read_signals, args=(notice, reader), daemon=True)
    thread.start()
    old_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    old_handler = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old_handler or signal.SIG_DFL)  # None: it was not set from Python
        signal.set_wakeup_fd(old_writer)
        os.close(writer)
        thread.join()
        os.close(reader)


def _read_signals(notice: Notice, reader: int) -> None:
    """Until the other end of the pipe is closed."""
    while numbers := os.read(reader, 64):
        if signal.SIGTERM in numbers:
            notice.give("told to stop by SIGTERM")


def _watch_metadata(notice: Notice, path: str, alarm: str, over: threading.Event) -> None:
    """Asks a Google Cloud VM's metadata server for one of its values until it is the alarm; ends if there is no server.

    An alarm that was there at the start is not news: a run that heeds it would be started again, and end again, until
    the machine is taken away.
    """
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/{path}"
    try:
        value, tag = _ask(url, timeout=3)
    except (OSError, http.client.HTTPException):
        return
    news = value != alarm
    while not over.is_set():
        if news and value == alarm:
            notice.give(f"{path} of this machine is {value}")
            return
        try:
            value, tag = _ask(f"{url}?wait_for_change=true&timeout_sec=60&last_etag={tag}", timeout=90)
            news |= value != alarm
        except (OSError, http.client.HTTPException):
            over.wait(RETRY)


def _ask(url: str, timeout: float) -> tuple[str, str]:
    """A value of the metadata server, and a tag that changes with it."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    with direct.open(request, timeout=timeout) as answer:
        return answer.read().decode(), answer.headers["ETag"]


class Watchdog(AbstractContextManager["Watchdog"]):
    """Dumps the stacks of all threads to stderr and ends the process, with code 1, if it makes no progress."""

    def __init__(self, seconds: float):
        """`seconds` without progress are too many; 0 switches it off."""
        self._seconds, self._armed = seconds, -1.0

    def progress(self) -> None:
        """The time starts again: of the few calls in a second only the first counts, since each starts a thread."""
        now = time.monotonic()
        if self._seconds > 0 and now > self._armed + 1:
            self._armed = now
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=2)  # sys.stderr may be no file

    def __enter__(self) -> "Watchdog":
        self.progress()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
