"""`python -m jaxtune.plan` without libtpu: what it refuses, what it says of GPUs, what it writes."""

import json
import math
import os
import pathlib
import subprocess
import sys
from typing import Any

import plan_shapes
import pytest
import tiny_runs
import yaml

from jaxtune import planned
from jaxtune.cost_model.chips import CHIPS
from jaxtune.decode import decode
from jaxtune.plan.__main__ import MISSING
from jaxtune.train import main as train

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
KINDS = ("weights", "optimizer", "gradients", "activations", "temporaries", "batch")


def run(*words: Any, **environment: str) -> subprocess.CompletedProcess:
    """Runs the command as people do; its environment is that of the tests with these changes."""
    command = [sys.executable, "-m", "jaxtune.plan", *map(str, words)]
    inherited = {key: value for key, value in os.environ.items() if key not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return subprocess.run(
        command, capture_output=True, text=True, env=inherited | environment, check=False, cwd=REPOSITORY
    )


def model(folder: pathlib.Path, shape: dict[str, Any] = plan_shapes.LLAMA, **changes: Any) -> str:
    return f"model.path={plan_shapes.write(folder, shape, **changes)}"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The word that names a folder with config.json and nothing else."""
    return model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def small(llama: str, tmp_path: pathlib.Path) -> list[str]:
    """Words of a plan that fits, with its output in the test's folder."""
    return [llama, f"output={tmp_path / 'out'}", "train.batch_rows=16", "data.max_length=1024"]


def finite(value: str) -> float:
    raise AssertionError(f"{value} in JSON")


def read(path: pathlib.Path) -> Any:
    """Reads JSON as the standard has it: without NaN and Infinity."""
    return json.loads(path.read_text(), parse_constant=finite)


MISTAKES = [
    (["--topology", "h100-8"], "found no configuration; expected a YAML file, or at least model.path=FOLDER"),
    (["MODEL", "--topology", "v9-8"], "--topology: found 'v9-8'; expected KIND-N such as v5p-128"),
    (["MODEL", "--topology", "v5p-7"], "there is no slice of 7"),
    (["MODEL", "--topology", "h100-12"], "expected 1 to 8 cards, or whole nodes of them"),
    (["MODEL", "--topology", "v5e-8", "--slices", "0"], "--slices: found 0; expected at least 1"),
    (["MODEL", "mesh.slice=4", "--topology", "v5e-8", "--slices", "2"], "mesh.slice: found 4, but --slices is 2"),
    (["MODEL", "--topology", "h100-8", "--search", "--compare", "A", "B"], "found --compare and --search"),
    (["MODEL", "--topology", "h100-8", "--hlo", "there"], "found --hlo with a GPU (h100-8)"),
    (["MODEL", "--topology", "v5e-8", "--hlo", "there", "--compare", "A", "B"], "found --hlo with --compare"),
    (["MODEL", "--topology", "h100-8", "--prices", "PRICES"], "--prices: PRICES has None for h100"),
    (["MODEL", "--topology", "a100-8", "--prices", "PRICES"], "--prices: PRICES has 'cheap' for a100"),
    (["MODEL", "--topology", "h200-8", "--prices", "PRICES"], "--prices: PRICES has True for h200"),
    (["MODEL", "--topology", "b200-8", "--prices", "PRICES"], "--prices: PRICES has -1 for b200"),
    (["MODEL", "--topology", "h100-8", "--prices", "NOWHERE"], "NOWHERE"),
    (["MODEL", "--topology", "h100-8", "--json", "DIR"], "--json: DIR cannot be written (Is a directory)"),
    (["MODEL", "--topology", "h100-8", "--overrides", "DIR"], "--overrides: DIR cannot be written"),
    (["MODEL", "train.batch_size=4", "--topology", "h100-8"], "train.batch_size: "),
    (["NOWHERE", "--topology", "h100-8"], "NOWHERE"),
]


@pytest.mark.parametrize(("words", "told"), MISTAKES, ids=[told[:40] for _, told in MISTAKES])
def test_a_mistake_is_told_at_once(
    words: list[str], told: str, llama: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    """With exit code 2, before anything heavy is imported; what stands in capitals is filled in."""
    from jaxtune.plan.__main__ import main

    prices, config = tmp_path / "prices.yaml", tmp_path / "a.yaml"
    prices.write_text("v5p: 4.2\na100: cheap\nh200: true\nb200: -1\n")
    config.write_text(f"model: {{path: {llama.partition('=')[2]}}}\n")
    names = {"MODEL": llama, "PRICES": str(prices), "DIR": str(tmp_path), "A": str(config), "B": str(config)}
    names["NOWHERE"] = str(tmp_path / "nowhere.yaml")
    assert main([names.get(word, word) for word in words]) == 2
    error = capsys.readouterr().err
    for name in ("PRICES", "NOWHERE", "DIR"):
        told = told.replace(name, names[name])
    assert error.startswith("error: ") and told in error
    assert "Traceback" not in error


def test_a_mistake_is_told_before_jax_is_imported(llama: str) -> None:
    source = (
        "import sys\nfrom jaxtune.plan.__main__ import main\n"
        f"code = main([{llama!r}, '--topology', 'v5p-7'])\n"
        "assert code == 2 and 'jax' not in sys.modules, (code, 'jax' in sys.modules)\nprint('fine')"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.stdout == "fine\n", done.stderr


def test_help_says_what_it_takes_without_jax() -> None:
    done = run("--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    for flag in ("--topology", "--slices", "--search", "--compare", "--prices", "--json", "--hlo", "--overrides"):
        assert flag in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "jaxtune.config" in imported
    assert not {"jax", "numpy", "transformers"} & imported


def test_without_libtpu_the_line_says_what_to_install(small: list[str]) -> None:
    """The package is hidden where it is installed, so that the claim is tested everywhere."""
    source = (
        "import importlib.util, sys\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'libtpu' else find(name, *more)\n"
        "from jaxtune.plan.__main__ import main\n"
        f"sys.exit(main({[*small, '--topology', 'v5e-8']!r}))"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    import jax

    wanted = f'pip install "jax[tpu]=={jax.__version__}"'
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"error: libtpu is not installed, and compiles for TPUs; install it: {wanted}"]


def test_a_libtpu_that_jax_does_not_pin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata
    import importlib.util

    from jaxtune.plan.devices import check_libtpu

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name == "libtpu" else real(name))
    with pytest.raises(ValueError, match=r'found libtpu 0\.0\.1, but jax .* needs libtpu.*pip install "jax\[tpu\]=='):
        check_libtpu()


def test_gpus_are_forecast_and_marked_so(small: list[str], tmp_path: pathlib.Path) -> None:
    """A folder with config.json alone, no data, no tokenizer, no accelerator; the figures by arithmetic."""
    prices = tmp_path / "prices.yaml"
    prices.write_text("h100: 2.5\n")
    words = [*small, "train.steps=7200", "tuning.method=full", "--topology", "h100-8", "--slices", "2"]
    # A back end that is not here: who touched the default one would fail.
    done = run(*words, "--prices", prices, "--json", tmp_path / "plan.json", JAX_PLATFORMS="rocm")
    assert done.returncode == 0, done.stderr
    assert "by an analytical model, not by a compiler" in done.stdout
    assert "\nfits: " in done.stdout and "DOES NOT FIT" not in done.stdout
    plan = read(tmp_path / "plan.json")
    assert plan == read(tmp_path / "out/plan.json"), "a run in this folder compares itself with it"
    assert (plan["by"], plan["fits"], plan["problem"]) == ("forecast", True, None)
    assert plan["topology"] == {
        "name": "h100-8", "device_kind": "NVIDIA H100 80GB HBM3", "chips": 16, "devices": 16, "hosts": 2, "slices": 2,
        "shape": [1, 8],
    }  # fmt: skip
    assert plan["mesh"] == {"slice": 2, "data": 1, "fsdp": 8, "tensor": 1, "context": 1, "expert": 1}
    memory = plan["memory_bytes"]
    assert memory["total"] == pytest.approx(sum(memory[kind] for kind in KINDS))
    assert memory["limit"] == CHIPS["NVIDIA H100 80GB HBM3"].memory
    assert plan["tokens_per_update"] == 16 * 1024
    seconds = plan["seconds_per_update"]
    assert plan["tokens_per_second"] == pytest.approx(16 * 1024 / seconds)
    assert plan["hours"] == pytest.approx(seconds * 7200 / 3600)
    assert plan["cost"] == pytest.approx(seconds * 7200 / 3600 * 16 * 2.5)
    assert f"7,200 updates: {plan['hours']:.2f} hours, costs {plan['cost']:,.2f} at 2.5 a chip and hour" in done.stdout
    matrices = 4 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1024) + 4096 * 512 + 9 * 512  # and norms
    assert plan["model_flops"] == pytest.approx(6 * matrices * 16 * 1024)
    assert plan["mfu"] == pytest.approx(plan["model_flops"] / (seconds * 989e12 * 16))
    assert plan["flops"] == pytest.approx(plan["model_flops"], rel=0.5) and plan["flops"] > plan["model_flops"]
    assert not list((tmp_path / "out").glob("*.safetensors")) and len(list((tmp_path / "out").iterdir())) == 1


def plan_here(capsys: pytest.CaptureFixture, *words: Any) -> tuple[int, str, str]:
    """Runs the command in this process; returns (exit code, stdout, stderr)."""
    from jaxtune.plan.__main__ import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())
        code = main([*map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_what_does_not_fit_is_told_and_ends_with_1(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    words = [f"model.path={REPOSITORY / 'configs/shapes/llama-3.1-70b'}", f"output={tmp_path}", "tuning.method=full"]
    code, out, _ = plan_here(capsys, *words, "--topology", "h100-8", "--json", tmp_path / "p.json")
    assert code == 1
    assert "DOES NOT FIT: needs " in out and "Try --search" in out
    plan = read(tmp_path / "p.json")
    memory = plan["memory_bytes"]
    assert not plan["fits"] and plan["problem"] and plan["limited_by"] == "optimizer"
    assert memory["total"] > memory["limit"]
    assert memory["weights"] == pytest.approx(4 * 70.6e9 / 8, rel=0.01) and memory["optimizer"] > 2 * 8.8e9
    beyond = (memory["total"] - memory["batch"] - 0.94 * memory["limit"]) / 2**30
    assert plan["problem"] == f"needs {beyond:.2f} GiB more than is safe on a device"


def test_a_mesh_that_is_not_there_is_told(
    small: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    """Nor one that the rows do not divide over."""
    code, _, error = plan_here(capsys, *small, "mesh.data=3", "mesh.fsdp=1", "--topology", "h100-8")
    assert code == 1 and error.startswith("error: ") and "Traceback" not in error
    code, _, error = plan_here(capsys, *small, "train.batch_rows=12", "--topology", "h100-8")
    assert code == 1 and "train.batch_rows: found 12" in error


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        (None, "config.json"),
        ({"model_type": "unheard_of", "architectures": ["UnheardOf"]}, "unheard_of"),
    ],
)
def test_a_model_that_is_none_is_told(
    shape: dict[str, Any] | None, told: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "m").mkdir()
    if shape is not None:
        plan_shapes.write(tmp_path / "m", shape)
    words = [f"model.path={tmp_path / 'm'}", f"output={tmp_path / 'out'}"]
    code, _, error = plan_here(capsys, *words, "--topology", "h100-8")
    assert code == 1 and error.startswith("error: ") and told in error


def test_a_length_that_the_model_cannot_is_told(
    small: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    code, _, error = plan_here(capsys, *small, "data.max_length=200000", "--topology", "h100-8")
    assert code == 1 and "data.max_length: found 200000; expected at most the model's 131072 positions" in error


@pytest.mark.parametrize(("shape", "length"), [(plan_shapes.MIXTRAL, 1024), (plan_shapes.T5, 1024 + 512)])
def test_experts_and_encoder_decoders_are_planned_too(
    shape: dict[str, Any], length: int, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    words = [model(tmp_path / "m", shape), f"output={tmp_path / 'out'}", "data.max_length=1024", "train.batch_rows=8"]
    words += ["data.encoder_length=512"] if shape is plan_shapes.T5 else ["mesh.expert=4"]
    code, _, error = plan_here(capsys, *words, "--topology", "h100-8")
    assert code == 0, error
    plan = read(tmp_path / "out/plan.json")
    assert plan["tokens_per_update"] == 8 * length
    assert ("expert" in plan["links_seconds"]) == (shape is plan_shapes.MIXTRAL)


def test_two_are_shown_side_by_side(small: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    for name, method in (("a", "lora"), ("b", "full")):
        tree = {"output": str(tmp_path / name), "tuning": {"method": method}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    both = [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    shared = [word for word in small if not word.startswith("output=")]
    code, out, error = plan_here(
        capsys, *shared, "--topology", "h100-8", "--compare", *both, "--json", tmp_path / "both.json"
    )
    assert code == 0, error
    first, second = read(tmp_path / "both.json")
    assert first == read(tmp_path / "a/plan.json") and second == read(tmp_path / "b/plan.json")
    lines = {line.split("  ")[0].strip(): line.split()[-2:] for line in out.splitlines()}
    for label, kind in (("weights, GiB", "weights"), ("optimizer, GiB", "optimizer"), ("total, GiB", "total")):
        assert lines[label] == [f"{plan['memory_bytes'][kind] / 2**30:.2f}" for plan in (first, second)]
    assert lines["s an update"] == [f"{plan['seconds_per_update']:.3f}" for plan in (first, second)]
    assert first["memory_bytes"]["optimizer"] < second["memory_bytes"]["optimizer"]
    assert lines["fits"] == ["yes", "yes"]


def test_a_search_writes_what_it_found(small: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    """As YAML that goes behind the configuration: a plan of the two together is the plan that the search showed."""
    code, out, error = plan_here(capsys, *small, "tuning.method=full", "--topology", "h100-8", "--search")
    assert code == 0, error
    found = read(tmp_path / "out/plan.json")
    overrides = tmp_path / "out/overrides.yaml"
    assert f"wrote {overrides}: python -m jaxtune.train CONFIG.yaml {overrides}" in out
    config = decode([*small, "tuning.method=full", str(overrides)], MISSING)
    assert config.mesh.model_dump(exclude={"auto"}) == found["mesh"]
    assert (config.model.remat, config.rows_at_once) == (found["remat"], found["rows_at_once"])
    assert f"mesh {_axes(found['mesh'])}; {found['rows_at_once']} of 16 rows at once; remat {found['remat']}" in out
    ways = out.splitlines()
    listed = ways[next(n for n, line in enumerate(ways) if "ways divide; the best by forecast:" in line) + 1]
    expected = f"{_axes(found['mesh'])}, {found['rows_at_once']} rows at once, remat {found['remat']}: "
    assert listed.strip().startswith(expected)
    code, _, error = plan_here(capsys, *small, "tuning.method=full", overrides, "--topology", "h100-8")
    assert code == 0, error
    again = read(tmp_path / "out/plan.json")
    assert {**again, "compile_seconds": 0} == {**found, "compile_seconds": 0}


def _axes(mesh: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1)


def test_what_is_open_is_what_a_search_finds(
    small: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    words = [*small, "tuning.method=full", "--topology", "h100-8"]
    assert plan_here(capsys, *words, "--search")[0] == 0
    found = read(tmp_path / "out/plan.json")
    assert plan_here(capsys, *words, "mesh=auto", "train.microbatch_rows=auto")[0] == 0
    assert read(tmp_path / "out/plan.json") == found


def test_a_total_that_no_compiler_named_is_null(llama: str) -> None:
    """JSON has no infinity."""
    import dataclasses

    from jaxtune.cost_model.topologies import parse_topology
    from jaxtune.plan import planning, report

    topology = parse_topology("h100-8", 1)
    config = decode([llama, "output=unused", "train.batch_rows=8", "data.max_length=1024"], MISSING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_keep", lambda *_: None)
        plan = planning.plan(config, topology, price=None, hlo=None)
    refused = dataclasses.replace(plan, memory=plan.memory._replace(told=math.inf), problem="refused")
    told = json.loads(json.dumps(report.as_json(refused)), parse_constant=finite)
    assert told["memory_bytes"]["total"] is None and told["fits"] is False


PLAN = {
    "topology": {"device_kind": "TPU v5", "devices": 8}, "tokens_per_update": 4096, "seconds_per_update": 0.5,
    "by": "compiler",
}  # fmt: skip


def test_a_run_is_held_against_its_plan(tmp_path: pathlib.Path) -> None:
    def compared(**changes: Any) -> str | None:
        own = {"device_kind": "TPU v5", "devices": 8, "tokens": 4096, "seconds": 0.75, **changes}
        return planned.compared(tmp_path, **own)

    file = tmp_path / planned.FILE
    assert compared() is None, "no plan"
    file.write_text(json.dumps(PLAN))
    assert compared() == "planned 0.500 s an update (compiler), measured 0.750: 1.50 times"
    written = json.loads(file.read_text())
    assert written == {**PLAN, "measured": {"seconds_per_update": 0.75, "over_planned": 1.5}}
    before = file.read_text()
    assert compared(seconds=None) is None, "too few were measured"
    for changes in ({"devices": 4}, {"tokens": 8192}, {"device_kind": "TPU v4"}):
        told = compared(**changes)
        assert told is not None and told.endswith("not compared")
    file.write_text(json.dumps({**PLAN, "seconds_per_update": None}))
    assert "it ran; not compared" in str(compared())
    for broken in ("", "{}", "[]", '{"topology": 1}'):
        file.write_text(broken)
        assert compared() == f"{file} cannot be read as a plan; it is not compared"
    assert before != file.read_text()


def test_a_run_on_other_devices_says_that_it_is_not_compared(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    base = tiny_runs.write_model(tmp_path / "model")
    data = tiny_runs.write_rows(tmp_path / "train.jsonl", tiny_runs.rows(48))
    words = tiny_runs.words(base, data, tmp_path / "out", "export.hf=false", "train.steps=4")
    code, _, error = plan_here(capsys, *words, "--topology", "h100-8")
    assert code == 0, error
    plan = (tmp_path / "out/plan.json").read_text()
    assert train(words) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "is a plan of 8 x NVIDIA H100 80GB HBM3 with 512 tokens an update" in told
    assert "this run had 8 x cpu with 512: not compared" in told
    assert (tmp_path / "out/plan.json").read_text() == plan
    assert math.isfinite(json.loads(plan)["seconds_per_update"])


def test_a_mesh_that_does_not_make_the_cards_is_refused(small: list[str]) -> None:
    done = run(*small, "mesh.tensor=3", "--topology", "h100-8")
    assert done.returncode == 1
    assert done.stderr.startswith("error: mesh: found fsdp=-1, tensor=3, which divides into 3 devices, but 8 h100")


def test_a_file_for_what_no_search_finds_is_refused(small: list[str], tmp_path: pathlib.Path) -> None:
    done = run(*small, "--topology", "h100-8", "--overrides", tmp_path / "o.yaml")
    assert done.returncode == 2
    assert "found --overrides without --search" in done.stderr


def test_an_output_that_cannot_be_made_is_told_before_the_plan(llama: str) -> None:
    done = run(llama, "output=/dev/null/x", "train.batch_rows=16", "--topology", "h100-8")
    assert (done.returncode, done.stdout) == (1, "")
    assert "/dev/null/x" in done.stderr
