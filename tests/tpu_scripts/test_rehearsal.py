"""The scripts on a cloud in a folder, with a counter in place of the training: whole runs in seconds."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tpu_scripts.test_scripts import CLONE, STUBS, load

# Of Linux only; everything else about the scripts is tested in test_scripts.
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(),
    reason="the stubs find a worker's processes in /proc; not run: whole runs of the scripts",
)


@pytest.fixture
def rehearsal(tmp_path, monkeypatch):
    for name in ("PATH", "STUB_CLOUD", "STUB_PORT", "STUB_TRAINER"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that it is restored
    monkeypatch.syspath_prepend(STUBS)
    monkeypatch.delitem(sys.modules, "cloud", raising=False)
    module = load(CLONE / "experiments/rehearsal.py")
    yield module.Rehearsal(tmp_path, "fake")
    module.cloud.remove(list((tmp_path / "cloud/vms").glob("*/w-*")))


def vms(rehearsal) -> list[Path]:
    return sorted((rehearsal.folder / "cloud/vms").glob("*/w-*"))


def made(rehearsal) -> int:
    return (rehearsal.folder / "cloud/calls").read_text().count(" queued-resources create ")


def wait_for_step(rehearsal, run: str, step: int) -> None:
    metrics, deadline = rehearsal.run_dir(run) / "metrics.jsonl", time.monotonic() + 60
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_preempted_run_ends_with_the_weights_of_one_left_alone(tmp_path):
    command = [sys.executable, CLONE / "experiments/rehearsal.py", "--trainer", "fake", "--out", tmp_path / "cloud"]
    done = subprocess.run(
        [*command, "--report", tmp_path / "report.md"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "report.md").read_text()
    assert "equal, bit for bit" in text
    assert text.count("saved, exit code 75") == 1
    assert text.count("killed") == 1


def test_a_run_that_fails_by_itself_is_not_tried_again(rehearsal):
    rehearsal.start("bad", TRAIN="(fake --train.steps 20 --fail-at 5)")
    rehearsal.script("", "launch", "bad")
    said = rehearsal.script("", "watch", "bad", code=1)
    assert "bad-w-0 exit 1" in said
    assert "the run failed" in said
    assert made(rehearsal) == 1
    (log,) = rehearsal.folder.glob("bucket/bad/logs/*bad-w-0.log")  # kept where a lost disk does not matter
    assert log.read_text().splitlines()[-2:] == ["error: the loss is not finite", "exit 1"]


def test_a_run_that_was_told_to_go_continues_on_a_tpu_that_stays(rehearsal):
    rehearsal.start("told", TRAIN="(fake --train.steps 20 --pause-at 5)")
    rehearsal.script("", "launch", "told")
    wait_for_step(rehearsal, "told", 5)
    for trainer in vms(rehearsal):
        os.kill(int((trainer / "hypersteer/pid").read_text()), signal.SIGTERM)  # passed on to the trainer
    said = rehearsal.script("", "watch", "told")
    assert "told to go, but told stayed; restart 1 of at most 20" in said
    assert "finished" in said
    assert made(rehearsal) == 1


def test_restarts_are_bounded(rehearsal):
    rehearsal.start("lost", MAX_RESTARTS="0")
    rehearsal.script("", "launch", "lost")
    sys.modules["cloud"].take_away("lost", grace=5.0)
    assert "MAX_RESTARTS=0" in rehearsal.script("", "watch", "lost", code=1)
    assert made(rehearsal) == 1


def test_stop_saves_and_clears_and_launch_continues_on_two_slices(rehearsal):
    rehearsal.start("two", SLICES="2", TRAIN="(fake --train.steps 20 --pause-at 5)")
    assert len(vms(rehearsal)) == 4
    rehearsal.script("", "launch", "two")
    wait_for_step(rehearsal, "two", 5)
    assert "runs already" in rehearsal.script("", "preflight", "two", code=2)
    lock = vms(rehearsal)[3] / "tmp/libtpu_lockfile"
    lock.touch()
    said = rehearsal.script("", "stop", "two")
    assert said.count("stopped, exit 75") == 4
    assert "two-1-w-1: removed the stale lock" in said
    assert not lock.exists()
    assert rehearsal.script("", "status", "two").count(" stopped") == 4
    assert "stopped by stop.sh" in rehearsal.script("", "watch", "two")
    rehearsal.script("", "launch", "two")
    assert "finished" in rehearsal.script("", "watch", "two")
    log = (vms(rehearsal)[0] / "hypersteer/log").read_text()
    assert "starts at step 0" not in log


def test_preflight_before_setup_says_what_is_missing(rehearsal):
    rehearsal.settings("bare")
    rehearsal.script("", "create", "bare")
    assert "was setup.sh run?" in rehearsal.script("", "preflight", "bare", code=1)


def test_a_manifest_reaches_kubectl(rehearsal):
    rehearsal.settings("pod", IMAGE="image:1")
    rehearsal.script("", "jobset", "pod")
    assert "name: pod" in (rehearsal.folder / "cloud/applied.yaml").read_text()
