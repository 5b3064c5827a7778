"""The doctor on this machine: what is fine is called fine, what is wrong is found and said, and nothing is changed."""

import json
import pathlib

import pytest
import tiny_runs

from jaxtune import doctor, examining
from jaxtune.asking import Finding


@pytest.fixture
def base(tmp_path):
    return tiny_runs.write_model(tmp_path / "base")


@pytest.fixture
def data(tmp_path):
    return tiny_runs.write_rows(tmp_path / "data.jsonl", tiny_runs.rows(24))


def words(base: pathlib.Path, data: pathlib.Path, output: pathlib.Path, *more: str) -> list[str]:
    return [f"model.path={base}", f"data.train.0.path={data}", f"output={output}", "train.batch_rows=8", *more]


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_machine_that_is_ready(base, data, tmp_path, capsys):
    before = files_of(tmp_path)
    told = tmp_path.parent / f"{tmp_path.name}-doctor.json"
    code = doctor.main(
        [
            *words(base, data, tmp_path / "out", "mesh.tensor=2", "data.template=plain"),
            "--json",
            str(told),
            "--megabytes",
            "1",
        ]
    )
    said = capsys.readouterr().out
    assert code == 0, said
    report = json.loads(told.read_text())
    assert report["fine"] and set(report["all_reduce_gigabytes_per_second"]) == {"fsdp", "tensor"}
    assert all(rate > 0 for rate in report["all_reduce_gigabytes_per_second"].values())
    assert "fsdp 4 x tensor 2, 8 rows a batch" in said and "24 rows" in said and "nothing is wrong" in said
    assert files_of(tmp_path) == before and not (tmp_path / "out").exists()


def test_a_disk_for_local_copies_is_looked_at(base, data, tmp_path, capsys):
    local = f"checkpoint.local.path={tmp_path / 'disk'}"
    assert doctor.main([*words(base, data, tmp_path / "out", "data.template=plain", local), "--megabytes", "1"]) == 0
    assert f"local     ok       {tmp_path / 'disk'}: " in capsys.readouterr().out and not (tmp_path / "disk").exists()
    local = "checkpoint.local.path=/tmp/$NO_SUCH_NAME"
    assert doctor.main([*words(base, data, tmp_path / "out", "data.template=plain", local), "--megabytes", "1"]) == 1
    assert "a variable in it is not set on this host" in capsys.readouterr().out


def test_without_a_configuration(capsys):
    assert doctor.main(["--megabytes", "1"]) == 0
    said = capsys.readouterr().out
    assert "fsdp 8" in said and "model" not in said


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("mesh.tensor=3",), "devices"),
        (("train.batch_rows=3",), "train.batch_rows: found 3"),
        (("data.train.1.path=nowhere.jsonl",), "nowhere.jsonl"),
        (("model.path=nowhere/at/all",), "nowhere/at/all"),
        (("data.template=nothing",), "data.template"),
        (("output=/proc/out",), "/proc cannot be written"),
    ],
)
def test_what_is_wrong_is_said_and_the_rest_still_looked_at(base, data, tmp_path, capsys, more, expected):
    assert doctor.main([*words(base, data, tmp_path / "out", "data.template=plain"), *more, "--megabytes", "1"]) == 1
    errors = [line for line in capsys.readouterr().out.splitlines() if " error " in line]
    assert len(errors) == 1 and expected in errors[0]


@pytest.mark.parametrize("flags", [["--megabytes", "0"], ["data.trian.0.path=x"], ["--json", "/proc/no.json"]])
def test_usage(flags, capsys):
    assert doctor.main(flags) == 2
    assert "error:" in capsys.readouterr().err


def test_findings_of_some_hosts_bear_their_names(monkeypatch):
    fine, bad = ["ok", "same"], ["error", "no such file"]
    monkeypatch.setattr(examining.hosts, "gather", lambda own: [[fine], [fine, bad], [fine]])
    monkeypatch.setattr(examining.hosts, "count", lambda: 3)
    monkeypatch.setattr(examining.hosts, "names", lambda: ("host 0 (a)", "host 1 (b)", "host 2 (c)"))
    found = examining._of_all(lambda: iter(()))
    assert found == [Finding("ok", "same"), Finding("error", "host 1 (b): no such file")]
