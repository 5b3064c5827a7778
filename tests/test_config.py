"""YAML files and words become a configuration, or every problem is told at once; no key is accepted and ignored."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any

import pydantic
import pytest
import tiny_runs

from jaxtune import config as config_module
from jaxtune import loop, prepare
from jaxtune.config import Config
from jaxtune.config_data import SourceConfig
from jaxtune.config_section import Section
from jaxtune.decode import ConfigError, decode, describe_keys, from_tree, json_schema, read_yaml, to_yaml
from jaxtune.train import train

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted((REPOSITORY / "configs").glob("**/*.yaml"))
NEEDED = ["model.path=m", "output=o", "train.steps=1", "data.train.0.path=d.jsonl"]


def problems(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        decode([*NEEDED, *words])
    return str(caught.value).splitlines()


# Scalars.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("+7", 7),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2024-01-31", "2024-01-31"),
        ("0b11", "0b11"),
        ("'1e-4'", "1e-4"),
        ("[1, no]", [1, "no"]),
        ("{a: 1e-4}", {"a": 1e-4}),
    ],
)
def test_scalars_are_those_of_yaml_12(tmp_path, text, value):
    (tmp_path / "x.yaml").write_text(f"key: {text}\n")
    read = read_yaml(str(tmp_path / "x.yaml"))["key"]
    assert (type(read), read) == (type(value), value)


def test_a_number_with_an_exponent_is_a_learning_rate():
    assert decode([*NEEDED, "optimizer.learning_rate=1e-4"]).optimizer.learning_rate == 1e-4


def test_a_word_that_is_no_yaml_is_text():
    assert decode([*NEEDED, "data.train.0.path=a: b: c.jsonl"]).data.train[0].path == "a: b: c.jsonl"


def test_an_equals_sign_in_the_value_belongs_to_the_value():
    assert decode([*NEEDED, "data.train.0.path=gs://b/x?a=1"]).data.train[0].path == "gs://b/x?a=1"


# Words and files.


def test_later_words_win_over_earlier_ones_and_over_the_file_wherever_it_stands(tmp_path):
    (tmp_path / "x.yaml").write_text("model: {path: m}\noutput: o\nseed: 1\ntrain: {steps: 1, batch_rows: 4}\n")
    words = ["seed=2", str(tmp_path / "x.yaml"), "data.train.0.path=d", "seed=3"]
    assert decode(words).seed == 3
    assert decode(words[:-1]).seed == 2
    assert decode(words).train.batch_rows == 4


def test_list_items_are_named_by_their_number():
    decoded = decode([*NEEDED, "data.train.1.path=e.jsonl", "data.train.0.path=c.jsonl"])
    assert [source.path for source in decoded.data.train] == ["c.jsonl", "e.jsonl"]
    assert decoded.data.train == (SourceConfig(path="c.jsonl"), SourceConfig(path="e.jsonl"))


def test_list_items_are_not_left_out():
    assert "0 to 1 (the next new one)" in problems("data.train.5.path=x")[0]


def test_of_several_files_the_last_that_says_something_counts(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\ntrain: {steps: 5, batch_rows: 4}\nmodel: {path: m}\noutput: o\n")
    (tmp_path / "b.yaml").write_text("train: {batch_rows: 16}\ndata: {train: [{path: d}]}\n")
    config = decode([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "seed=3"])
    assert (config.seed, config.train.steps, config.train.batch_rows) == (3, 5, 16)


def test_a_tree_of_what_is_missing_stands_behind_files_and_words():
    missing = {"output": "there", "data": {"train": [{"path": "none"}]}}
    assert decode(["model.path=m"], missing).data.train[0].path == "none"
    assert decode(["model.path=m", "data.train.0.path=d", "output=o"], missing).data.train[0].path == "d"


def test_the_mesh_can_be_left_to_choose():
    config = decode(["model.path=m", "data.train.0.path=d", "output=o", "mesh=auto"])
    assert config.mesh.auto
    assert from_tree(config.model_dump()) == config
    assert "mesh: found auto beside sizes" in problems("mesh.auto=true", "mesh.tensor=2")[0]
    assert "mesh: found 'autoo'; expected auto, or sizes of axes" in problems("mesh=autoo")[0]


def test_rows_at_once_are_the_whole_batch_until_they_are_chosen():
    words = ["model.path=m", "data.train.0.path=d", "output=o", "train.batch_rows=12"]
    rows = [decode([*words, f"train.microbatch_rows={value}"]).rows_at_once for value in ("auto", "null", "4")]
    assert rows == [12, 12, 4]


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=r"quikstart\.yaml: no such file.*Did you mean .*quickstart\.yaml"):
        decode([str(tmp_path / "quikstart.yaml")])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2\n", "key 'seed' stands twice"),
        ("train:\n  steps: 1\n  steps: 2\n", "line 3"),
        ("a: [1\n", "not valid YAML"),
        ("- a\n- b\n", "found a list at the top"),
        ("? [a, b]\n: 1\n", "is no key"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, said):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"x\.yaml") as caught:
        decode([str(tmp_path / "x.yaml")])
    assert said in str(caught.value)


def test_an_empty_file_is_no_problem(tmp_path):
    (tmp_path / "x.yaml").write_text("# nothing\n")
    assert decode([str(tmp_path / "x.yaml"), *NEEDED]) == decode(NEEDED)


# Types and problems.


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("seed=true", "seed: found True (a boolean); expected an integer"),
        ("seed=1.0", "seed: found 1.0 (a number); expected an integer"),
        ("seed='1'", "seed: found '1' (a string); expected an integer"),
        ("model.path=1", "model.path: found 1 (an integer); expected a string"),
        ("data.packing=1", "data.packing: found 1 (an integer); expected a boolean"),
        ("data.packing=yes", "data.packing: found 'yes' (a string); expected a boolean"),
        ("tuning.alpha='32'", "tuning.alpha: found '32' (a string); expected a number"),
        ("tuning.alpha=true", "tuning.alpha: found True (a boolean); expected a number"),
        ("tuning.dropout=1.0", "tuning.dropout: found 1.0 (a number); expected less than 1"),
        ("train=5", "train: found 5 (an integer); expected"),
        ("model.dtype=float16", "model.dtype: found 'float16' (a string); expected 'auto', 'float32' or 'bfloat16'"),
        ("data.lanes=many", "data.lanes: found 'many' (a string)"),
    ],
)
def test_no_value_changes_its_type(word, told):
    found = problems(word)
    assert len(found) == 1, found
    assert found[0].startswith(told)


def test_an_integer_is_a_number():
    assert decode([*NEEDED, "tuning.alpha=32"]).tuning.alpha == 32.0


def test_every_problem_is_told_at_once_with_its_path_and_the_nearest_key():
    found = problems("train.step=3", "tuning.rank=0", "modle.path=x", "data.train.0.fromat=text", "data.packing=1")
    assert len(found) == 5
    told = "\n".join(found)
    assert "train.step: unknown key (value 3); did you mean train.steps?" in told
    assert "tuning.rank: found 0 (an integer); expected greater than 0 (LoRA rank r)" in told
    assert "modle: unknown key" in told and "did you mean model?" in told
    assert "data.train.0.fromat: unknown key (value 'text'); did you mean data.train.0.format?" in told


def test_a_key_in_the_wrong_section_is_found_in_its_own():
    assert "did you mean optimizer.learning_rate?" in problems("train.learning_rate=1e-4")[0]


def test_an_unknown_key_is_answered_in_a_second_and_without_jax():
    code = (
        "import sys; from jaxtune.train import main; code = main(['train.step=3'])\n"
        "heavy = {'jax', 'flax', 'transformers', 'torch', 'datasets', 'orbax', 'numpy'} & set(sys.modules)\n"
        "print(sorted(heavy)); sys.exit(code)"
    )
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy with something else
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 2 and "did you mean train.steps?" in done.stderr, done.stderr
        assert done.stdout.strip() == "[]"
        if seconds[-1] < 1:
            break
    assert min(seconds) < 1, seconds


# Evaluation.


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"weight": 2.0}, "weight: found 2.0; evaluation reads every row once, so remove it (it is for data.train)"),
        ({"epochs": 3.0}, "epochs: found 3.0; evaluation reads every row once"),
        ({"cap": 10.0}, "cap: found 10.0; evaluation reads every row once"),
        ({"order": "length"}, "order: found length; evaluation reads every row once"),
        ({"cluster": "songs"}, "cluster: found songs; evaluation reads every row once"),
        ({"shots": 3}, "shots: found 3; no few-shot style here reads it"),
        ({"shot_tokens": 30, "styles": {"cot": 1}}, "shot_tokens: found 30; no few-shot style here reads it"),
        ({"styles": {"zero_shot": 1, "few_shot": 3}}, "reads every row in each style, whatever their shares"),
        ({"table": {"path": "t.csv", "id": "{t}", "weight": "w"}}, "table.weight: found w; evaluation reads every row"),
        ({"table": {"path": "t.csv", "id": "{t}"}, "mixing": {"rates": "equal"}}, "mixing: found {'rates': 'equal'};"),
    ],
)
def test_evaluation_refuses_keys_that_it_does_not_read(keys, told):
    """At any depth; without them the same source is fine."""
    needed = {"output": "o", "model": {"path": "m"}}
    train = [{"path": "a.jsonl"}]
    for sources, where in (
        ([{"path": "a.jsonl"}, {"path": "b.jsonl", **keys}], "data.eval.1"),
        ([{"id": "g", "sources": [{"path": "b.jsonl", **keys}]}], "data.eval.0.sources.0"),
    ):
        with pytest.raises(ConfigError, match=re.escape(told)) as refused:
            from_tree({**needed, "data": {"train": train, "eval": sources}})
        assert all(line.startswith(f"{where}.") for line in str(refused.value).splitlines())
    group = {"id": "g", "mixing": {"rates": "equal"}, "sources": [{"path": "b.jsonl"}]}
    with pytest.raises(ConfigError, match=r"data\.eval\.0\.mixing: found {'rates': 'equal'}; evaluation reads"):
        from_tree({**needed, "data": {"train": train, "eval": [group]}})


def test_evaluation_takes_what_words_its_rows():
    few = {"styles": {"zero_shot": 1, "few_shot": 1}, "shots": 3, "shot_tokens": 100}
    inner = [{"path": "a.jsonl", "shots": 2}, {"path": "b.jsonl", "styles": {"zero_shot": 1}}]
    members = [{"path": "c.jsonl", "examples": 9, "styles": {"few_shot": 2}}]
    sources = [
        {"path": "d.jsonl", **few},
        {"id": "g", **few, "sources": inner},
        {"id": "h", "shots": 3, "sources": members},
    ]
    config = from_tree({"output": "o", "model": {"path": "m"}, "train": {"steps": 0}, "data": {"eval": sources}})
    assert [source.id for source in config.data.eval] == [None, "g", "h"]


# Round trips.

LIKE_NUMBERS = (
    "1e-4",
    "010",
    "0o17",
    "on",
    "null",
    "~",
    "1_000",
    "true",
    "é: # x",
    "line\nbreak",
    " ",
    "-",
    "2024-01-31",
)


@pytest.mark.parametrize("text", LIKE_NUMBERS)
def test_text_stays_text_on_its_way_through_yaml(tmp_path, text):
    given = Config(output=text, model={"path": text}, data={"train": ({"path": text, "columns": {text: text}},)})
    (tmp_path / "x.yaml").write_text(to_yaml(given), encoding="utf-8")
    assert decode([str(tmp_path / "x.yaml")]) == given


@pytest.mark.parametrize("rate", [1e-5, 2e-4, 1.0, 123456789.0, 1e-300, 0.1 + 0.2])
def test_numbers_come_back_to_the_bit(tmp_path, rate):
    given = decode([*NEEDED, f"optimizer.learning_rate={rate!r}", "optimizer.options.b1=0.95", "tuning.targets=[a, b]"])
    (tmp_path / "x.yaml").write_text(to_yaml(given))
    back = decode([str(tmp_path / "x.yaml")])
    assert back == given and back.tuning.targets == ("a", "b") and back.optimizer.options == {"b1": 0.95}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_yaml_in_configs_decodes_and_comes_back(tmp_path, file, monkeypatch):
    monkeypatch.setenv("JAXTUNE_DATA", "/data")
    decoded = decode([str(file), f"output={tmp_path}"])
    (tmp_path / "x.yaml").write_text(to_yaml(decoded))
    assert decode([str(tmp_path / "x.yaml")]) == decoded
    assert "python -m jaxtune." in file.read_text().partition("\n\n")[0], f"{file} opens with the command that runs it"


# What editors and people read.


def test_the_schema_for_editors_is_up_to_date():
    """`python -m jaxtune.decode > configs/schema.json` writes it."""
    assert (REPOSITORY / "configs" / "schema.json").read_text() == json_schema()


def test_the_schema_knows_every_key_and_allows_no_other():
    schema = json.loads(json_schema())
    assert schema["additionalProperties"] is False and set(schema["properties"]) == set(Config.model_fields)
    assert schema["properties"]["seed"]["maximum" if "maximum" in schema["properties"]["seed"] else "exclusiveMaximum"]
    for name, section in schema["$defs"].items():
        assert section["additionalProperties"] is False, name
    assert set(schema["$defs"]) == {c.__name__ for c in Section.__subclasses__() if c is not Config}


def test_every_key_is_listed_with_its_default():
    lines = describe_keys().splitlines()
    keys = {line.split()[0].replace(".0.", ".").replace("data.eval.", "data.train.") for line in lines}
    assert set(leaf_paths(Config).values()) <= keys
    twice = {key for key in keys - set(leaf_paths(Config).values()) if not key.startswith("data.mixing.")}
    assert not twice, "a section that stands in two places is listed in both, and nothing else is"
    assert any(line.startswith("tuning.rank ") and "= 16" in line for line in lines)
    assert any(line.startswith("model.path ") and "required" in line for line in lines)


# Every key is read.


def leaf_paths(section: type[pydantic.BaseModel], prefix: str = "") -> dict[tuple[str, str], str]:
    """Returns {(class name, field): dotted path} of every leaf key; a section inside itself is a leaf."""
    leaves = {}
    for name, field in section.model_fields.items():
        inner = next((c for c in Section.__subclasses__() if c.__name__ in str(field.annotation)), None)
        if inner is not None and inner is not section:
            leaves |= {key: path for key, path in leaf_paths(inner, f"{prefix}{name}.").items() if key not in leaves}
        else:
            leaves[(section.__name__, name)] = f"{prefix}{name}"
    return leaves


def reads_that_count(frame: Any) -> bool:
    """Whether a read comes from code that does something with the value, not from checks, dumps and records."""
    while frame.f_code.co_name in ("learning_rate", "note"):
        frame = frame.f_back  # a property that gives a key's value on: who asks it?
    if frame.f_code.co_name in ("_inherit", "_rooted"):  # these hand keys on, whatever they are
        return False
    module = frame.f_globals.get("__name__", "")
    if module in ("jaxtune.config", "jaxtune.config_data", "jaxtune.decode", "jaxtune.card", "jaxtune.memory"):
        return False
    return module.startswith("jaxtune.")


class Dumped(dict):
    """A section as a dict that notes which of its keys are asked for."""

    def __init__(self, section: Section, values: dict[str, Any], seen: set[tuple[str, str]]) -> None:
        super().__init__(values)
        self._note = lambda key: seen.add((type(section).__name__, key))

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)


@pytest.fixture
def keys_read(monkeypatch):
    """The set of (class name, field) that the package has read since."""
    seen: set[tuple[str, str]] = set()

    def note(self: Section, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith(("_", "model_")) and name in type(self).model_fields:
            if reads_that_count(sys._getframe(1)):
                seen.add((type(self).__name__, name))
        elif name == "model_dump" and not isinstance(self, Config) and reads_that_count(sys._getframe(1)):
            return lambda **options: Dumped(self, value(**options), seen)
        return value

    monkeypatch.setattr(Section, "__getattribute__", note, raising=False)
    return seen


def read_of_mixtures(base: str, data: str, folder: pathlib.Path) -> None:
    """Opens a mixture that uses what single sources have no use for."""
    (folder / "tasks.csv").write_text(f"task,n,file\nadd,24,{data}\n")
    (folder / "sums.jsonl").write_text("".join(f'{{"q": "{i} + {i}?", "a": "{2 * i}"}}\n' for i in range(20)))
    template = {"name": "ask", "task": "*", "kind": "zero-shot", "input": "{q} {how}", "target": "{a}"}
    tree = {
        "model": {"path": base},
        "output": str(folder / "mixed"),
        "train": {"steps": 3, "batch_rows": 8},
        "data": {
            "root": str(folder),
            "missing": "skip",
            "max_length": 128,
            "template": "plain",
            "mixing": {"rates": "temperature", "temperature": 2, "scale": 0.5, "cap": 100, "tags": {"t": 0.4}},
            "phases": [{"until": {"steps": 1}}, {"until": {"tokens": 9000}}, {"until": {"draws": 90000}}, {}],
            "hold_out": {"clusters": ["sums"]},
            "train": [
                {"path": "{root}/gone.jsonl"},
                {"id": "g", "cap": 5, "sources": [{"path": data, "order": "length"}]},
                {
                    "id": "tabled",
                    "table": {"path": "{root}/tasks.csv", "id": "{task}", "where": {"task": "add"}, "examples": "n"},
                    "path": "{file}",
                    "tags": ["t"],
                },
                {
                    "path": "{root}/sums.jsonl",
                    "templates": [template],
                    "slots": {"how": ["Quickly.", "Slowly."]},
                    "styles": {"zero_shot": 1, "few_shot": 1},
                    "shots": 2,
                    "each_template": True,
                    "system": "Sums.",
                },
                {
                    "path": "{root}/sums.jsonl",
                    "id": "held",
                    "columns": {"prompt": "q", "completion": "a"},
                    "cluster": "sums",
                },
            ],
        },
    }
    train(from_tree(tree))


def leave_rows_out(base: str, folder: pathlib.Path) -> None:
    """Opens a run that leaves rows out in every way there is."""
    rows = [
        {"instruction": f"name the colour of {i}", "output": f"it is {'red' if i % 2 else 'green'}"} for i in range(24)
    ]
    data = tiny_runs.write_rows(folder / "left_out.jsonl", rows)
    benchmark = tiny_runs.write_rows(folder / "benchmark.jsonl", [{"question": "what stands between the two old oaks"}])
    (folder / "verdicts.json").write_text('{"verdicts": []}')
    tree = {
        "model": {"path": base},
        "output": str(folder / "left"),
        "train": {"steps": 1, "batch_rows": 8},
        "data": {
            "train": [{"path": str(data)}],
            "max_length": 128,
            "dedup": "near",
            "decontaminate": {"paths": [str(benchmark)], "ngram": 8},
            "verdicts": str(folder / "verdicts.json"),
            "quality": {
                "min": 0.1,
                "min_scores": {"clarity": 0.1},
                "drop": ["purple"],
                "instruction_words": [1, 50],
                "response_words": [1, None],
                "languages": ["en", "und"],
                "max_harm": 1.0,
                "custom": "operator:truth",
            },
        },
    }
    train(from_tree(tree))


def test_no_key_is_accepted_and_ignored(keys_read, tmp_path, monkeypatch):
    base = tiny_runs.write_model(tmp_path / "base")
    data = tiny_runs.write_rows(tmp_path / "data.jsonl", tiny_runs.rows(24))
    more = ("train.steps=2", "data.eval_fraction=0.2", "train.max_bad_steps=1")
    copies = (f"checkpoint.local.path={tmp_path / 'disk'}", "checkpoint.local.every_steps=1")
    for _ in range(2):  # the second time to see whether there is something to go on with
        train(tiny_runs.config(base, data, tmp_path / "lora", *more, *copies))
    with pytest.raises(ValueError, match="NaN or infinity"):
        more = ("tuning.method=full", "optimizer.learning_rate=1e30", "train.max_bad_steps=1", "train.steps=4")
        train(tiny_runs.config(base, data, tmp_path / "full", f"data.eval.0.path={data}", "eval.every_steps=9", *more))
    with pytest.raises(ValueError, match="there is no checkpoint from before them"):
        more = ("tuning.method=full", "optimizer.learning_rate=1e30", "train.spike_factor=9", "train.spike_patience=1")
        train(tiny_runs.config(base, data, tmp_path / "spike", *more, "train.steps=4"))

    def stop(*anything: Any, **more: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    read_of_mixtures(str(base), str(data), tmp_path)
    leave_rows_out(str(base), tmp_path)
    streamed = ("data.train.0.streaming=true", "data.train.0.take=16", "--workers=1")
    assert prepare.main([*tiny_runs.words(base, data, tmp_path / "streamed"), *streamed]) == 0
    monkeypatch.setattr(loop.MetricsLog, "write", stop)
    train(tiny_runs.config(base, data, tmp_path / "stopped", "train.steps=null", "train.epochs=1"))
    leaves = leaf_paths(Config)
    ignored = [path for key, path in leaves.items() if key not in keys_read]
    assert not ignored, f"accepted and never read: {', '.join(ignored)}"


def test_a_key_that_nothing_reads_would_be_seen(keys_read, tmp_path, monkeypatch):
    class TrainConfig(config_module.TrainConfig):
        turbo: bool = True

    class Enlarged(Config):
        train: TrainConfig = TrainConfig()

    decoded = Enlarged(output="o", model={"path": "m"}, data={"train": ({"path": "d"},)}, train={"steps": 1})
    exec("decoded.train.steps", {"decoded": decoded, "__name__": "jaxtune.loop"})
    exec("decoded.train.turbo", {"decoded": decoded, "__name__": "jaxtune.card"})
    assert keys_read == {("Enlarged", "train"), ("TrainConfig", "steps")}
    exec("decoded.mesh.model_dump().get('fsdp')", {"decoded": decoded, "__name__": "jaxtune.training"})
    assert ("MeshConfig", "fsdp") in keys_read and ("MeshConfig", "data") not in keys_read
    exec("decoded.model_dump()", {"decoded": decoded, "__name__": "jaxtune.loop"})
    assert ("OptimizerConfig", "name") not in keys_read
