"""Plans without libtpu: what is lowered, predicted and advised; the compiler itself is asked only where it is there."""

import dataclasses
import io
import json
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType
from rich.console import Console

from hypersteer_jax import cli, planner
from hypersteer_jax.config import (
    RECIPES,
    ConfigError,
    HypernetConfig,
    MeshConfig,
    RunConfig,
    SteeringConfig,
    TrainConfig,
)
from hypersteer_jax.data.pipeline import Bucket, make_layout
from hypersteer_jax.data.sources import TrainData
from hypersteer_jax.hlo import Collective, Traffic
from hypersteer_jax.models.presets import PRESETS
from hypersteer_jax.planner import (
    PODS,
    TYPICAL,
    TYPICAL_ALONE,
    Compiled,
    Inputs,
    TooLarge,
    abstract_inputs,
    abstract_mesh,
    changes,
    find_change,
    larger_slice,
    lm_shape,
    lower_decode,
    lower_step,
    make_plan,
    mesh_sizes,
    predict_memory,
    run_shape,
    step_bound,
    tree_bytes,
)
from hypersteer_jax.planner_report import options, plan_table, to_json, verdict
from hypersteer_jax.sharding import AXES, make_mesh
from hypersteer_jax.topologies import find_topology
from tests.conftest import random_rows
from tests.models.tiny import CONFIGS

LM = CONFIGS["gemma2"]
SHAPE = Bucket(tokens=24, context=8, response=16, concept=8, rows=2)
GIB = 2**30


def run_config(batch: int = 16, remat: bool = False, **mesh: int) -> RunConfig:
    return RunConfig(
        hypernet=HypernetConfig(blocks=2),
        steering=SteeringConfig(layers=(1,)),
        mesh=MeshConfig(**mesh),
        train=TrainConfig(batch=batch, remat=remat),
    )


def inputs_of(config: RunConfig, devices: int = 8) -> Inputs:
    return abstract_inputs(config, LM, SHAPE, abstract_mesh(config, devices))


def test_every_recipe_has_a_pod() -> None:
    assert PODS.keys() == RECIPES.keys()


@pytest.mark.parametrize("recipe", PODS)
def test_every_recipe_lowers_for_its_pod(recipe: str) -> None:
    name, mesh = PODS[recipe]
    config = dataclasses.replace(RECIPES[recipe][1], mesh=mesh)
    topology = find_topology(name)
    inputs = abstract_inputs(config, lm_shape(config.lm), TYPICAL, abstract_mesh(config, topology.devices))
    text = lower_step(config, inputs).as_text()
    assert f'"fsdp"={mesh_sizes(mesh, topology.devices)[1]}' in text
    assert predict_memory(config, lm_shape(config.lm), inputs).total < topology.kind.memory


def experiment() -> Any:
    spec = spec_from_file_location("plan_pods", Path(__file__).parents[1] / "experiments/plan_pods.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("recipe", ["gemma2-2b", "gemma2-9b"])
def test_every_planned_pod_lowers(recipe: str) -> None:
    pods = experiment()
    slices = [*pods.SLICES.items(), ("v6e-8", MeshConfig(data=2, slices=2))]
    topologies = [(find_topology(name, mesh.slices), mesh) for name, mesh in slices]
    sizes = {mesh_sizes(mesh, topology.devices): (topology, mesh) for topology, mesh in topologies}
    for topology, mesh in sizes.values():  # some are of the same mesh
        config = pods.run_config(recipe, pods.BLOCKS[recipe][0], topology.chips, mesh)
        lower_step(
            config, abstract_inputs(config, lm_shape(config.lm), TYPICAL, abstract_mesh(config, topology.devices))
        )


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_step_of_generation_lowers(tensor: int) -> None:
    config = run_config(data=8 // tensor, fsdp=1, tensor=tensor)
    text = lower_decode(config, LM, 16, 40, abstract_mesh(config, 8)).as_text()
    assert f"tensor<4x16x40x{LM.kv_heads}x{LM.head_dim}xbf16>" in text  # the cache


@pytest.mark.parametrize(
    ("mesh", "devices", "sizes"),
    [
        (MeshConfig(), 8, (1, 8, 1)),
        (MeshConfig(tensor=2), 8, (1, 4, 2)),
        (MeshConfig(data=2, fsdp=2, tensor=2), 8, (2, 2, 2)),
    ],
)
def test_a_mesh_uses_all_devices(mesh: MeshConfig, devices: int, sizes: tuple[int, int, int]) -> None:
    assert mesh_sizes(mesh, devices) == sizes
    with pytest.raises(ConfigError, match="the topology has 7"):
        mesh_sizes(mesh if mesh.fsdp else dataclasses.replace(mesh, fsdp=3), 7)


def test_a_batch_that_devices_cannot_share() -> None:
    with pytest.raises(ConfigError, match=r"train.batch is 12, which 8 devices .* give a multiple of 16"):
        inputs_of(run_config(batch=12))
    with pytest.raises(ConfigError, match=r"hypernet\.blocks is 9"):
        inputs_of(dataclasses.replace(run_config(), hypernet=HypernetConfig(blocks=9)))


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_predicted_arguments_are_the_compiled_ones(mesh: dict[str, int]) -> None:
    config = run_config(**mesh)
    inputs = abstract_inputs(config, LM, SHAPE, make_mesh(**mesh))
    takes_all = jax.jit(lambda *arguments: 0, keep_unused=True).lower(*inputs).compile()
    predicted = predict_memory(config, LM, inputs_of(config))  # without devices
    assert predicted.lm + predicted.state + predicted.batch == takes_all.memory_analysis().argument_size_in_bytes


def test_what_the_prediction_depends_on() -> None:
    base = predict_memory(run_config(), LM, inputs_of(run_config()))
    split = predict_memory(run_config(data=8), LM, inputs_of(run_config(data=8)))
    assert 7 < split.state / base.state <= 8
    assert split.gradients == tree_bytes(inputs_of(run_config(data=8)).state.hypernet)
    for changed, less in ((run_config(remat=True), "saved"), (run_config(tensor=2), "logits")):
        assert getattr(predict_memory(changed, LM, inputs_of(changed)), less) < getattr(base, less)
    double = predict_memory(run_config(batch=32), LM, inputs_of(run_config(batch=32)))
    assert 1.5 < double.saved / base.saved <= 2  # a part is weights in the dtype that computes
    assert double.state == base.state


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("google/gemma-2-2b-it", "gemma-2-2b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("Qwen/Qwen3-0.6B", "qwen3-0.6b"),
        ("gemma-2-9b", "gemma-2-9b"),
    ],
)
def test_shapes_of_published_models_need_no_network(name: str, preset: str) -> None:
    assert lm_shape(name) == PRESETS[preset]


def test_shapes_of_folders_and_of_unknown_models(tmp_path: Path) -> None:
    assert lm_shape("tinyworld").layers == 4
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "vocab_size": 64,
                "num_hidden_layers": 3,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "intermediate_size": 48,
            }
        )
    )
    assert lm_shape(str(tmp_path)).layers == 3
    with pytest.raises(ConfigError, match=r"lm is 'no/such-model'.* give a directory"):
        lm_shape("no/such-model")


def test_lengths_given_or_usual() -> None:
    said: list[str] = []
    config = RECIPES["gemma2-2b"][1]
    alone = dataclasses.replace(config, data=dataclasses.replace(config.data, pack=False))
    assert run_shape(config, (24, 8, 16, 8), said.append) == SHAPE
    assert not said
    assert (run_shape(config, None, said.append), run_shape(alone, None, said.append)) == (TYPICAL, TYPICAL_ALONE)
    assert all("--shape" in line for line in said)
    in_context = dataclasses.replace(config, hypernet=HypernetConfig(variant="in_context"))
    assert run_shape(in_context, None, said.append).concept == TYPICAL.concept + TYPICAL.context


def test_lengths_of_the_data_where_they_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows([8, 16, 24, 32], [40, 24, 56, 64], [5, 6, 7, 8])
    layout = make_layout(rows, RECIPES["tinyworld"][1].data, seed=0)
    monkeypatch.setattr(planner, "load_data", lambda *_: TrainData(rows, layout, None, {}))
    shape = run_shape(RECIPES["tinyworld"][1], None, lambda line: None)
    assert shape == Bucket(tokens=96, context=32, response=64, concept=8, rows=2)  # the rows of 40 and 56


def compiled(needed: int, memory: int = 0, ici: int = 0, dcn: int = 0) -> Compiled:
    collectives = (Collective("all-gather", 3, 2 * ici, ici, dcn),)
    return Compiled(
        1.0,
        needed // 4,
        needed // 8,
        needed // 8,
        needed - needed // 4,
        needed // 2,
        Traffic(collectives, memory, (), 0),
    )


def test_the_bound_is_the_longest_wait() -> None:
    topology = find_topology("v6e-8", 2)
    kind = topology.kind
    bound = step_bound(16 * 3 * kind.flops, compiled(0, int(2 * kind.bandwidth)), topology)
    assert bound is not None
    assert (bound.math, bound.seconds, bound.binds) == (3.0, 3.0, "math")
    bound = step_bound(16 * 3 * kind.flops, compiled(0, int(4 * kind.bandwidth)), topology)
    assert bound is not None
    assert bound.binds == "memory"
    bound = step_bound(0, compiled(0, 0, int(5 * 2 * kind.link), int(6 * 25e9 / 4)), topology)
    assert bound is not None
    assert (bound.interconnect, bound.network) == pytest.approx((5.0, 6.0))
    assert bound.binds == "network"
    assert step_bound(1.0, TooLarge(1), topology) is None


def test_changes_come_in_order_of_plainness() -> None:
    config = run_config(batch=64, data=2)
    words = [options(config, change) for change in changes(config, LM, find_topology("v6e-8"), SHAPE)]
    assert words == [
        "--train.batch 32",
        "--train.batch 16",
        "--mesh.data 1",
        "--mesh.data 1 --mesh.tensor 2",
        "--train.remat",
        "--mesh.data 1 --train.remat",
        "--mesh.data 1 --mesh.tensor 2 --train.remat",
        "--train.batch 32 --train.remat",
        "--train.batch 16 --train.remat",
    ]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """In the place of libtpu: answers that a test sets, the last of them for good; and no topology."""
    answers: list[Any] = []

    def answer(*_: Any) -> Any:
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def mesh(sizes: tuple[int, int, int], _: Any) -> AbstractMesh:
        return AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * 3)

    for name, fake in (("topology_mesh", mesh), ("compile_for", answer), ("lower_step", lambda *_: None)):
        monkeypatch.setattr(planner, name, fake)
    return answers


def test_a_run_that_fits(compiler: list[Any]) -> None:
    topology = find_topology("v6e-8")
    compiler.append(compiled(11 * GIB, memory=int(topology.kind.bandwidth), ici=7, dcn=5))
    plan = make_plan(run_config(batch=32), LM, topology, SHAPE)
    assert plan.fits
    assert "11.0 of 31.2 GiB a chip" in verdict(plan, None, None)
    found = json.loads(json.dumps(to_json(plan, price=2.0)))
    assert found["examples_per_second"] == pytest.approx(32)  # a second of memory traffic a step
    assert found["chip_hours"] == pytest.approx(1000 * 8 / 3600)
    assert found["price"] == pytest.approx(2 * found["chip_hours"])
    assert found["collectives"]["all-gather"] == {"kind": "all-gather", "times": 3, "bytes": 14, "ici": 7, "dcn": 5}
    assert found["seconds_at_least"]["binds"] == "memory"
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(plan_table(plan, 2.0))
    text = console.export_text()
    for words in ("memory binds", "compiled, not timed", "fsdp 8", plan.largest[0][0], "all-gather 3 times"):
        assert words in text


def test_a_run_that_does_not_fit_is_told_the_smallest_change(compiler: list[Any]) -> None:
    topology = find_topology("v6e-8")
    config = run_config(batch=64)
    predicted = predict_memory(config, LM, inputs_of(config)).total
    compiler += [TooLarge(33 * GIB), compiled(32 * GIB), compiled(30 * GIB)]
    plan = make_plan(config, LM, topology, SHAPE)
    assert not plan.fits
    # As the compiler refused 33 GiB, so many a predicted byte: a change is tried only if it should need under 31.25.
    change = find_change(plan, LM)
    assert change is not None
    assert options(config, change.config) == "--train.batch 16"  # 32 was tried first, and did not fit after all
    assert 33 * change.prediction.total / predicted < 31.25
    assert "33.0 of 31.2 GiB a chip; use --train.batch 16 (30.0 GiB)" in verdict(plan, change, None)
    assert json.loads(json.dumps(to_json(plan)))["compiled"] is None


def test_at_most_three_changes_are_compiled_and_then_a_larger_slice_is_named(compiler: list[Any]) -> None:
    topology = find_topology("v6e-8")
    compiler.append(TooLarge(32 * GIB))
    plan = make_plan(run_config(batch=64), LM, topology, SHAPE)
    compiler[:] = [TooLarge(32 * GIB)] * 3 + [compiled(GIB)]
    assert find_change(plan, LM) is None
    assert len(compiler) == 1
    larger = larger_slice(plan, LM)
    assert larger is not None
    assert larger.name == "v6e-16"
    assert "use v6e-16 (by estimate)" in verdict(plan, None, larger)


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["hypersteer", "plan", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_without_libtpu_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert command(monkeypatch, "gemma2-2b", "--topology", "v6e-8") == 1
    assert 'pip install -e ".[plan]"' in capsys.readouterr().err


@pytest.mark.parametrize(("first", "code"), [(compiled(GIB), 0), (TooLarge(17 * GIB), 1)])
def test_exit_code_and_json_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path, compiler: list[Any], first: Any, code: int
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: True)
    monkeypatch.setattr(cli.os, "environ", dict(cli.os.environ))
    compiler += [first, compiled(GIB)]
    file = tmp_path / "new" / "plan.json"
    words = ("--topology", "v5e-1", "--shape", "40", "16", "16", "8", "--decode", "--json", str(file))
    assert command(monkeypatch, "tinyworld", *words) == code
    found = json.loads(file.read_text())
    assert found["fits"] is (code == 0)
    assert found.get("use") == (None if code == 0 else "--train.batch 24")
    assert found["decode"]["rows"] == 64
    assert found["shape"] == {"tokens": 40, "context": 16, "response": 16, "concept": 8, "rows": 2}
    out = capsys.readouterr().out
    assert ("does not fit" in out) is (code == 1)


# libtpu is the TPU's compiler; the extra [test] leaves it out, for it comes for Linux on x86 only.
@pytest.mark.skipif(find_spec("libtpu") is None, reason='libtpu is not installed (".[plan]"); not run: the compiler')
def test_the_compiler_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd) -> None:
    file = tmp_path / "plan.json"
    words = ("--topology", "v5e-4", "--shape", "24", "8", "16", "8", "--train.batch", "16", "--json", str(file))
    assert command(monkeypatch, "tinyworld", *words) == 0
    found = json.loads(file.read_text())
    predicted = found["bytes_predicted"]
    arguments = predicted["lm"] + predicted["state"] + predicted["batch"]
    assert arguments < found["compiled"]["arguments"] < 128 / 48 * arguments  # its heads of 48 are padded to 128 lanes
    assert {"all-gather", "reduce-scatter"} <= found["collectives"].keys()
    assert found["unknown_loops"] == 0
