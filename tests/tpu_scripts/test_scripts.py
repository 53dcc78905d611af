"""Dry runs against goldens, settings, the table of topologies, shellcheck, and flags against an installed gcloud.

Goldens again, after a change that was meant: python tests/tpu_scripts/test_scripts.py
"""

import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

CLONE = Path(__file__).resolve().parents[2]
SCRIPTS, GOLDENS, STUBS = CLONE / "tpu_scripts", Path(__file__).parent / "goldens", Path(__file__).parent / "stubs"
RUNNABLE = sorted(path.stem for path in SCRIPTS.glob("*.sh") if path.stem not in ("common", "settings"))
SETTINGS = sorted(path.stem for path in GOLDENS.glob("*.sh"))


def script(name: str, *words: str | Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    command, environment = [str(SCRIPTS / f"{name}.sh"), *map(str, words)], {"PATH": path or os.environ["PATH"]}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def dry_run(name: str, settings: str, path: str | None = None) -> str:
    done = script(name, GOLDENS / f"{settings}.sh", "--dry-run", path=path)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.replace(str(CLONE), "CLONE")


def changed(folder: Path, **values: str) -> Path:
    text = (GOLDENS / "one_slice.sh").read_text()
    for name, value in values.items():
        text = re.sub(rf"^{name}=.*\n", value, text, flags=re.MULTILINE) if name in text else text + value
    path = folder / "run.sh"
    path.write_text(text)
    return path


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", RUNNABLE)
def test_a_dry_run_prints_the_golden_commands_and_runs_none(name, settings, tmp_path):
    for tool in ("gcloud", "kubectl", "git", "curl"):
        (tmp_path / tool).write_text(f"#!/bin/sh\necho {tool} was run >&2\nexit 99\n")
        (tmp_path / tool).chmod(0o755)
    assert dry_run(name, settings, path=f"{tmp_path}:/usr/bin:/bin") == (GOLDENS / f"{settings}/{name}.txt").read_text()


def test_there_is_a_golden_for_each_script_and_nothing_else():
    expected = {GOLDENS / f"{settings}/{name}.txt" for settings in SETTINGS for name in RUNNABLE}
    assert set(GOLDENS.glob("*/*")) == expected


@pytest.mark.parametrize("name", RUNNABLE)
def test_help_needs_no_settings(name):
    done = script(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"tpu_scripts/{name}.sh SETTINGS [--dry-run]" in done.stdout


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"SPOT": "SPOT=true\n"}, "SPOT, which is not a setting; these are: NAME TRAIN BUCKET"),
        ({"zone": "zone=us-west4-a\n"}, "zone, which is not a setting"),
        ({"ZONE": ""}, "does not set ZONE; copy its line from tpu_scripts/settings.sh"),
        ({"PROJECT": "PROJECT=\n"}, "PROJECT is '' .* a project id; yours: gcloud config get-value project"),
        ({"NAME": "NAME=My_Run\n"}, "NAME is 'My_Run' .* small letters"),
        ({"BUCKET": "BUCKET=my-bucket\n"}, "BUCKET is 'my-bucket' .* gs://BUCKET"),
        ({"BUCKET": "BUCKET=gs://my-bucket/\n"}, "BUCKET is 'gs://my-bucket/' .* without a slash at its end"),
        ({"ACCELERATOR": "ACCELERATOR=v5e-16\n"}, "ACCELERATOR is v5e-16, .*topologies.txt; .* v5litepod-16 "),
        ({"CAPACITY": "CAPACITY=cheap\n"}, "CAPACITY is 'cheap' .* spot, on-demand, reserved or flex-start"),
        ({"CAPACITY": "CAPACITY=flex-start\n"}, "MAX_RUN is 'none' .* hours or days"),
        ({"MAX_RUN": "MAX_RUN=2d\n"}, "MAX_RUN is '2d' .* none, because CAPACITY is spot"),
        ({"SLICES": "SLICES=0\n"}, "SLICES is '0' .* a number from 1"),
        ({"TRAIN": "TRAIN=()\n"}, "TRAIN is empty"),
        ({"TRAIN": "TRAIN=(gemma2-2b --out here)\n"}, "TRAIN has --out, which launch sets by itself"),
    ],
)
def test_a_setting_that_cannot_be_is_named_with_its_fix(tmp_path, values, message):
    done = script("create", changed(tmp_path, **values), "--dry-run")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(message, done.stderr), done.stderr


def test_the_template_sets_everything_and_must_be_filled_in():
    done = script("create", SCRIPTS / "settings.sh", "--dry-run")
    assert done.returncode == 1
    assert "NAME is ''" in done.stderr


@pytest.mark.parametrize("words", [[], ["nowhere.sh"], ["--dry"]])
def test_a_wrong_command_line_says_what_to_do(words):
    done = script("create", *words)
    assert done.returncode == 1
    assert "settings" in done.stderr or "is not an option" in done.stderr


def test_a_gke_manifest_needs_an_image(tmp_path):
    done = script("jobset", changed(tmp_path, IMAGE="IMAGE=none\n"), "--dry-run")
    assert done.returncode == 1
    assert "IMAGE is none" in done.stderr


def test_topologies_have_the_chips_that_their_names_say():
    rows = [line.split() for line in (SCRIPTS / "topologies.txt").read_text().splitlines() if not line.startswith("#")]
    assert len({row[0] for row in rows}) == len(rows) == 32
    for accelerator, topology, chips, workers, _, _ in rows:
        kind, _, number = accelerator.partition("-")
        assert int(chips) == math.prod(map(int, topology.split("x"))), accelerator
        assert int(number) == int(chips) * (2 if kind in ("v4", "v5p") else 1), accelerator
        assert int(chips) / int(workers) in ({4} if int(workers) > 1 else {1, 4, 8}), accelerator


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_manifest_is_a_jobset_that_restarts_preempted_runs_only(settings):
    yaml = pytest.importorskip("yaml")  # comes with huggingface_hub
    manifest = yaml.safe_load(dry_run("jobset", settings))
    assert "@" not in yaml.safe_dump(manifest).replace('"$@"', "")
    assert manifest["kind"] == "JobSet"
    policy, (slices,) = manifest["spec"]["failurePolicy"], manifest["spec"]["replicatedJobs"]
    assert policy == {
        "maxRestarts": 20,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    job = slices["template"]["spec"]
    counted, failed = job["podFailurePolicy"]["rules"]
    assert counted["onPodConditions"] == [{"type": "DisruptionTarget"}]
    assert (failed["action"], failed["onExitCodes"]["values"]) == ("FailJob", [1, 2])  # and so 75 is not
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert failed["onExitCodes"]["containerName"] == container["name"]
    chips = int(container["resources"]["limits"]["google.com/tpu"])
    whole = {"one_slice": (1, 4, 4), "two_slices": (2, 64, 4), "flex_start": (1, 1, 8)}[settings]
    assert (slices["replicas"], job["parallelism"], chips) == whole
    assert job["completions"] == job["parallelism"]
    assert ("cloud.google.com/gke-spot" in pod["nodeSelector"]) == (settings == "one_slice")
    assert container["args"][:1] == ["train"]
    assert pod["terminationGracePeriodSeconds"] == 30


def test_shellcheck():
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert tool, "no shellcheck; pip install -e .[test]"
    files = [*SCRIPTS.rglob("*.sh"), *(STUBS / "worker").iterdir(), CLONE / ".ci/run"]
    done = subprocess.run([tool, *map(str, files)], capture_output=True, text=True, check=False, cwd=CLONE)
    assert (done.stdout, done.returncode) == ("", 0)


def test_the_stub_takes_no_flag_that_gcloud_does_not(monkeypatch):
    monkeypatch.syspath_prepend(STUBS)
    real = shutil.which("gcloud")
    tree = Path(real).resolve().parents[1] / "data/cli/gcloud_completions.py" if real else None
    if tree is None or not tree.exists():
        pytest.skip("no Google Cloud SDK here; not run: the stub's flags against gcloud's own table")
    table = load(tree).STATIC_COMPLETION_CLI_TREE
    (verbs,) = (action for action in load(STUBS / "gcloud").command_line()._actions if action.dest == "verb")
    for command, parser in verbs.choices.items():
        node = table
        for word in command.split():
            node = node["commands"][word]
        everywhere = {"--help", "--project", "--format", "--quiet"}
        flags = {flag for flag in parser._option_string_actions if flag.startswith("--")}
        assert flags - everywhere <= set(node["flags"]), command


def load(path: Path):
    spec = importlib.util.spec_from_loader(path.stem, SourceFileLoader(path.stem, str(path)))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    for settings in SETTINGS:
        shutil.rmtree(GOLDENS / settings, ignore_errors=True)
        (GOLDENS / settings).mkdir()
        for name in RUNNABLE:
            (GOLDENS / f"{settings}/{name}.txt").write_text(dry_run(name, settings))
