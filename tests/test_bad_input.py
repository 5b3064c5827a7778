"""A user's mistake gets a sentence that says what, where, what was expected and what to do; never a traceback."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import hf_folders
import pytest
import tiny_runs
import transformers
from safetensors.numpy import load_file, save_file

from jaxtune.metrics import MetricsLog
from jaxtune.train import main


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_runs.write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_runs.write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", tiny_runs.rows(16))


@pytest.fixture
def refused(base, data, tmp_path, capsys):
    """refused(code, *words, model=..., rows=...) -> what a run that must fail says on stderr."""

    def refuse(code, *more, model=base, file=data, rows=None):
        if rows is not None:
            file = tiny_runs.write_rows(tmp_path / "rows.jsonl", rows)
        capsys.readouterr()
        assert main(tiny_runs.words(model, file, tmp_path / "out", *more)) == code
        said = capsys.readouterr().err
        print(said)  # shown when the test fails
        assert "Traceback" not in said and said.startswith(("error: ", "configuration:"))
        return said

    return refuse


def says(message: str, *fragments: str) -> None:
    missing = [fragment for fragment in fragments if fragment not in message]
    assert not missing, f"{missing} not in: {message}"


# The configuration: exit code 2, everything at once.


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["train.step=3"], ["train.step: unknown key (value 3)", "did you mean train.steps"]),
        (["optimizer.lr=1e-4"], ["optimizer.lr: unknown key", "known here", "learning_rate"]),
        (["learning_rate=1e-4"], ["learning_rate: unknown key", "did you mean optimizer.learning_rate"]),
        (["train.batch_rows=eight"], ["train.batch_rows: found 'eight' (a string)", "expected", "integer"]),
        (["train.steps=-1"], ["train.steps: found -1", "greater than or equal to 0"]),
        (["optimizer.learning_rate=.nan"], ["optimizer.learning_rate: found nan", "finite"]),
        (["tuning.method=lorra"], ["tuning.method: found 'lorra'", "did you mean lora"]),
        (["data.train=rows.jsonl"], ["data.train: found 'rows.jsonl'", "a list", "data.train.0.path"]),
        (["data.train.path=rows.jsonl"], ["data.train.path", "data.train.0"]),
        (["data.train.1.path=b.jsonl", "data.train.1.weight=2"], ["sources 0 have no weight"]),
        (["train.microbatch_rows=3"], ["train.microbatch_rows: found 3", "divisor of train.batch_rows = 8"]),
        (["data.lanes=3"], ["data.lanes: found 3", "divisor of train.batch_rows"]),
        (["mesh.fsdp=-1", "mesh.data=-1"], ["mesh: found", "at most one axis with -1"]),
        (["mesh.tensor=0"], ["mesh.tensor: found 0", "at least 1, or -1"]),
        (["no/such/config.yaml"], ["no/such/config.yaml: no such file"]),
        (["data..x=1"], ["empty part in the key"]),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_is_read(refused, words, fragments):
    says(refused(2, *words), *fragments)


def test_all_mistakes_are_told_at_once(refused):
    message = refused(2, "train.step=3", "modle.path=x", "tuning.rank=0", "seed=true")
    says(message, "train.step", "modle", "tuning.rank: found 0", "seed: found True (a boolean)")


def test_keys_that_must_be_given_are_named_with_their_meaning(capsys):
    assert main(["train.steps=3"]) == 2
    says(capsys.readouterr().err, "output: missing; expected folder", "model: missing; expected keys: path")


def test_no_words_at_all_prints_the_usage(capsys):
    assert main([]) == 2
    assert "python -m jaxtune.train" in capsys.readouterr().out


# The data.


def test_missing_data_file_names_the_nearest(refused, data):
    message = refused(1, file=data.with_name("trian.jsonl"))
    says(message, "trian.jsonl: no such file or folder", f"nearest: {data}")


def test_missing_evaluation_file_is_told_before_training(refused, data, tmp_path):
    says(refused(1, f"data.eval.0.path={data}x.jsonl"), f"{data}x.jsonl: no such file")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_hub_dataset_without_network(refused):
    says(refused(1, file="nobody/nothing"), "nobody/nothing", "hub", "offline", "local")


def test_file_of_unknown_kind(refused, tmp_path):
    file = tmp_path / "rows.xlsx"
    file.write_text("instruction,output\na,b\n")
    says(refused(1, file=file), "rows.xlsx", ".jsonl")


def test_empty_data_file(refused):
    says(refused(1, rows=[]), "rows.jsonl: found no rows", "at least one")


def test_missing_column_names_those_found(refused):
    rows = [{"instruction": "a", "ouput": "b"}]
    says(
        refused(1, "data.train.0.format=alpaca", rows=rows),
        "rows.jsonl",
        "'output'",
        "nearest: ouput",
        "columns.output",
    )


def test_no_format_fits(refused):
    says(refused(1, rows=[{"a": "b", "c": "d"}]), "rows.jsonl", "no format fits the columns found: a, c", "columns.")


def test_mapped_column_that_is_not_there(refused):
    says(refused(1, "data.train.0.columns.output=answer"), "columns.output", "'answer'", "instruction, output")


def test_row_without_the_column_is_named_by_line(refused):
    message = refused(1, rows=[*tiny_runs.rows(3), {"instruction": "a"}])
    says(message, "rows.jsonl:4", "output", "data.on_bad_row=skip")


@pytest.mark.parametrize("text", ['{"instruction": "a", "output": "b"', "not json", '["a"]', '"text"'])
def test_invalid_json_names_file_line_and_column(refused, text):
    message = refused(1, rows=[*tiny_runs.rows(2), text, *tiny_runs.rows(2)])
    says(message, "rows.jsonl:3: ", "expected", "repair it, or set data.on_bad_row=skip")
    if not text.startswith(("[", '"')):
        says(message, "column")


def test_bytes_that_are_no_utf8(refused, tmp_path):
    file = tmp_path / "latin.jsonl"
    file.write_bytes(b'{"instruction": "a", "output": "b"}\n{"instruction": "caf\xe9", "output": "b"}\n')
    says(refused(1, file=file), "latin.jsonl:2", "0xe9", "UTF-8")


def test_roles_out_of_order_name_the_message(refused):
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    says(refused(1, rows=[{"messages": turns}]), "rows.jsonl:1: message 2: found user after user", "expected assistant")


def test_unknown_role_names_the_choices(refused):
    turns = [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}]
    says(refused(1, rows=[{"messages": turns}]), "rows.jsonl:1: message 2", "'asistant'", "assistant")


def test_data_that_trains_no_token(refused):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]
    says(refused(1, rows=[{"messages": turns}] * 3), "none of its 3 rows can be trained on", "no trained token")


def test_data_with_empty_answers_only(refused):
    says(refused(1, rows=[{"instruction": "a", "output": ""}]), "none of its 1 rows", "empty answer", "rows.jsonl:1")


def test_data_that_is_all_over_length(refused):
    says(refused(1, "data.max_length=8"), "none of its 16 rows", "over length", "train.jsonl:1")


def test_more_lost_than_allowed(refused):
    rows = [*tiny_runs.rows(3), {"instruction": "long " * 60, "output": "b"}]
    says(refused(1, "data.max_lost=0.01", rows=rows), "data.max_lost", "data.max_length", "data.overlong")


# The template.


def test_unknown_template_names_the_choices(refused):
    says(refused(1, "data.template=chatmll"), "data.template: found 'chatmll'", "chatml", "alpaca")


def test_tokenizer_without_template_prints_the_flags(refused, base, tmp_path):
    plain = tiny_runs.copied(base, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    tiny_runs.write_tokenizer(plain, chat_template=None)
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    says(refused(1, model=plain), "no chat template", "data.template=alpaca", "data.template=vicuna")


def test_template_whose_markers_are_no_tokens(refused):
    says(refused(1, "data.template=chatml"), "chatml needs <|im_start|>", "single tokens", "data.template=auto")


def test_broken_template_file(refused, tmp_path):
    file = tmp_path / "broken.jinja"
    file.write_text("line one\n{% for m in messages %}{{ m.content }}")
    says(refused(1, f"data.template={file}"), "broken.jinja", "line")


# The model.


def changed(base: pathlib.Path, to: pathlib.Path, **keys: object) -> pathlib.Path:
    tiny_runs.copied(base, to)
    hf_folders.rewrite_config(to, **keys)
    return to


def test_model_that_is_neither_folder_nor_id(refused, base):
    says(refused(1, model=base.parent / "modle"), "modle: no such folder", "nearest", "model", "hub id")


def test_model_id_without_network(refused):
    says(refused(1, model="nobody/nothing"), "nobody/nothing", "offline", "HF_HUB_OFFLINE", "local folder")


def test_model_path_is_a_file(refused, base):
    says(refused(1, model=base / "config.json"), "config.json: found a file", "model folder")


def test_model_with_pickled_weights_only(refused, base, tmp_path):
    model = tiny_runs.copied(base, tmp_path / "pickled")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    says(refused(1, model=model), str(model), "pytorch_model.bin", "safetensors")


def test_quantised_model(refused, base, tmp_path):
    model = changed(base, tmp_path / "quantised", quantization_config={"quant_method": "gptq", "bits": 4})
    says(refused(1, model=model), "quantised", "gptq")


def test_adapter_given_as_model(refused, base, tmp_path):
    model = tmp_path / "adapter"
    model.mkdir()
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base", "r": 8}))
    says(refused(1, model=model), "adapter", "some/base")


def test_unknown_architecture_names_the_choices(refused, base, tmp_path):
    model = changed(base, tmp_path / "unknown", model_type="lama")
    says(refused(1, model=model), "'lama'", "llama", "mistral")


def test_model_without_tokenizer(refused, base, tmp_path):
    model = tiny_runs.copied(base, tmp_path / "mute")
    for file in (*model.glob("token*"), *model.glob("special*")):
        file.unlink()
    says(refused(1, model=model), "no tokenizer could be read", "tokenizer.json")


def test_truncated_weights(refused, base, tmp_path):
    model = tiny_runs.copied(base, tmp_path / "truncated")
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    says(refused(1, model=model), "model.safetensors has", "truncated")


def test_weights_of_another_shape(refused, base, tmp_path):
    model = tiny_runs.copied(base, tmp_path / "shape")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:16]
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    says(refused(1, model=model), "model.norm.weight", "[16]", "[32]", "model.layers.1.mlp.up_proj.weight")


def test_config_json_that_is_no_json(refused, base, tmp_path):
    model = tiny_runs.copied(base, tmp_path / "damaged")
    (model / "config.json").write_text("{")
    says(refused(1, model=model), "config.json is not valid JSON")


def test_length_beyond_the_positions(refused):
    says(refused(1, "data.max_length=512"), "data.max_length: found 512", "256 positions", "max_position_embeddings")


def test_pad_token_beyond_the_embedding_is_no_hindrance(base, data, tmp_path):
    model = tiny_runs.copied(base, tmp_path / "padded")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 280
    tokenizer.save_pretrained(model)
    assert main(tiny_runs.words(model, data, tmp_path / "out", "train.steps=1")) == 0


def test_tokenizer_with_more_tokens_than_the_model(refused, tmp_path):
    model = tiny_runs.write_model(tmp_path / "narrow", vocab_size=200)
    says(refused(1, model=model), "280", "200 (vocab_size", "resize_token_embeddings")


# The machine.


def test_mesh_that_does_not_make_the_devices(refused):
    message = refused(1, "mesh.fsdp=3")
    says(message, "mesh: found fsdp=3", "8 cpu device(s)", "mesh.fsdp=-1")


def test_batch_that_does_not_divide_the_mesh(refused):
    message = refused(1, "train.batch_rows=12")
    says(message, "train.batch_rows: found 12", "8 batch shards", "train.batch_rows=16")


def test_microbatch_that_does_not_divide_the_mesh(refused):
    says(refused(1, "train.microbatch_rows=4"), "train.microbatch_rows: found 4", "8 batch shards")


def test_attention_kernel_of_another_machine(refused):
    says(refused(1, "model.attention=tokamax"), "model.attention: found 'tokamax'", "xla")


def test_disk_too_small(refused, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    says(refused(1, "train.steps=0"), "GiB are free", "make room or choose another output")


# Tuning and optimizer.


def test_target_that_names_no_layer(refused):
    says(refused(1, "tuning.targets=q_prj"), "tuning.targets: found 'q_prj'", "nearest: 'q_proj'")


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["optimizer.name=adamv"], ["optimizer.name: found 'adamv'", "did you mean adam"]),
        (["optimizer.options.beta=0.9"], ["optimizer.options: found beta", "b1"]),
        (["optimizer.options.b1=high"], ["optimizer.options", "b1"]),
        (["optimizer.name=sgd", "optimizer.weight_decay=0.1"], ["optimizer.weight_decay: found 0.1", "adamw"]),
    ],
)
def test_optimizer_that_cannot_be_made(refused, words, fragments):
    says(refused(1, *words), *fragments)


def test_wandb_that_is_not_installed(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    says(refused(1, "log.wandb=mine"), "log.wandb", "pip install wandb")


# The output folder.


def test_output_that_is_a_file(base, data, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below", pathlib.Path("/proc/nothing")):
        assert main(tiny_runs.words(base, data, output)) == 1
        says(capsys.readouterr().err, f"output: {output} cannot be written", "a folder of its own")
    assert (tmp_path / "file").read_text() == "mine"


def test_output_that_is_the_model_itself_loses_nothing(base, data, tmp_path, capsys):
    model = tiny_runs.copied(base, tmp_path / "model")
    (model / "README.md").write_text("the base's own card")
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    assert main(tiny_runs.words(model, data, model)) == 1
    says(capsys.readouterr().err, f"output: {model}", "config.json", "another output=")
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before


def test_output_whose_configuration_is_not_a_run(base, data, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    for text in ("base_model: x\nadapter: lora\n", "a: b: c"):
        (tmp_path / "out" / "config.yaml").write_text(text)
        assert main(tiny_runs.words(base, data, tmp_path / "out")) == 1
        says(capsys.readouterr().err, str(tmp_path / "out" / "config.yaml"), "another output=")
        assert (tmp_path / "out" / "config.yaml").read_text() == text


def test_a_mistake_answers_a_fresh_process_without_a_traceback(base, data, tmp_path):
    command = [
        sys.executable,
        "-m",
        "jaxtune.train",
        *tiny_runs.words(base, data, tmp_path / "out", "data.template=nope"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""}, timeout=120)
    assert done.returncode == 1, done.stderr
    says(done.stderr, "error: data.template: found 'nope'")
    assert "Traceback" not in done.stderr


def test_a_disk_that_fills_up_during_the_run_is_told_and_the_folder_given_up(base, data, tmp_path, capsys, monkeypatch):
    def write(self, step, **values):
        raise OSError(28, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(MetricsLog, "write", write)
    assert main(tiny_runs.words(base, data, tmp_path / "out")) == 1
    says(capsys.readouterr().err, "error: ", "No space left on device", "metrics.jsonl")
    assert not (tmp_path / "out" / ".lock").exists()
