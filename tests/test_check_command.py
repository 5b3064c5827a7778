"""`convert check` says whether and how a folder is supported, and sees a model that is not computed as it should be."""

import dataclasses
import json
import pathlib
import shutil
import sys

import hf_folders
import numpy as np
import pytest
import t5_folders
import transformers
from hf_kinds import WITH_EXPERTS
from safetensors.numpy import load_file, save_file

from jaxtune import fitting, parity
from jaxtune.convert import __main__ as command
from jaxtune.convert.folder import open_folder
from jaxtune.models import registry
from jaxtune.models.decoder_config import LayerGroup

KINDS = ["llama31", "gemma2", "gpt2", "mixtral", "deepseek_v3", "gpt_oss", "t5_1_1", "umt5"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> its tiny folder"""
    path = tmp_path_factory.mktemp("models")
    made = {}

    def folder(kind: str) -> pathlib.Path:
        if kind not in made:
            write = t5_folders.tiny_folder if kind in t5_folders.KINDS else hf_folders.tiny_folder
            made[kind] = write(kind, path / kind)
        return made[kind]

    return folder


@pytest.fixture
def copy(folders, tmp_path):
    """kind -> a copy of its tiny folder that may be changed"""
    return lambda kind: pathlib.Path(shutil.copytree(folders(kind), tmp_path / kind))


def check(capsys, *words) -> tuple[int, str, str]:
    """Returns (exit code, stdout, stderr)."""
    code = command.main(["check", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def checked(capsys, *words) -> tuple[int, dict]:
    code, out, _ = check(capsys, *words, "--json", "-")
    return code, json.loads(out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_supported_folder_is_at_parity(kind, folders, capsys):
    code, out, _ = check(capsys, folders(kind))
    assert code == 0, out
    assert "supported     yes" in out
    assert "at parity     yes" in out
    assert "2 rows of 64 random tokens (seed 0), all layers" in out
    assert f"tolerance {'2.0e-04: 2e-04' if kind in WITH_EXPERTS else '1.'}" in out


def test_what_was_read_is_said(folders, capsys, monkeypatch):
    made = {kind: folders(kind) for kind in ("gemma2", "mixtral", "gpt_oss", "t5_1_1")}
    monkeypatch.setitem(sys.modules, "torch", None)  # the comparison has its own tests
    _, out, _ = check(capsys, made["gemma2"])
    for expected in (
        "model_type    gemma2, read as Gemma2ForCausalLM",
        "layers        3; width 32, mlp 48 (gelu_tanh)",
        "heads         4, of keys and values 2, size 16",
        "windows       5 in 2 layers; none in 1 layer",
        "positions     rope default (base 10,000) in 3 layers",
        "scores cut off softly at 4.0; logits cut off softly at 20.0",
        "head          the embedding (tied); vocabulary 97",
        "tensors       35 in 1 file (35 F32); 35 match by name and shape",
    ):
        assert expected in out
    _, out, _ = check(capsys, made["mixtral"])
    assert "experts       4 of width 48, 2 a token (softmax), in 3 layers" in out
    assert "lora on k_proj, o_proj, q_proj, v_proj (tuning.targets=all-linear)" in out
    _, out, _ = check(capsys, made["gpt_oss"])
    assert "no tokamax: it has no attention sinks" in out
    assert "no lora on experts" in out
    _, out, _ = check(capsys, made["t5_1_1"])
    assert "layers        3 of the encoder, 2 of the decoder" in out
    assert "no splash: the scores have biases for distances" in out


def test_json_says_the_same_and_nothing_else(folders, capsys, tmp_path):
    code, report = checked(capsys, folders("llama31"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folders("llama31"))
    assert code == 0
    assert report["supported"] and report["at_parity"]
    assert report["model"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert report["model"]["ropes"][0] == {
        "kind": "llama3",
        "theta": 5000.0,
        "factor": 8.0,
        "original_positions": 64,
        "layers": 3,
    }
    assert len(report["tensors"]["matching"]) == 30
    assert report["parity"]["difference"] <= report["parity"]["tolerance"]
    out = check(capsys, folders("llama31"), "--json", tmp_path / "new" / "report.json")[1]
    written = json.loads((tmp_path / "new" / "report.json").read_text())
    assert "at parity     yes" in out
    assert written["model"] == report["model"]


def test_rows_are_longer_than_every_window_where_that_is_affordable(folders, capsys, monkeypatch):
    config = json.loads((folders("gpt_oss") / "config.json").read_text())
    assert config["sliding_window"] < fitting.SHORT
    monkeypatch.setattr(fitting, "SHORT", 4)
    _, report = checked(capsys, folders("gpt_oss"))
    assert report["parity"]["length"] == config["sliding_window"] + 8
    monkeypatch.setattr(fitting, "PER_CORE", 1)
    code, out, _ = check(capsys, folders("gpt_oss"))
    assert code == 0
    assert "2 rows of 4 random tokens" in out
    assert "not past 5 tokens, where this model changes; with time and memory: --length 13" in out


def rewrite(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_a_folder_whose_tensor_was_changed_is_still_at_parity(copy, capsys):
    path = copy("llama31")
    name = "model.layers.1.self_attn.q_proj.weight"

    def change(tensors):
        tensors[name] = tensors[name] + np.float32(0.5)

    before = checked(capsys, path)[1]["parity"]
    rewrite(path, change)
    code, report = checked(capsys, path)
    assert code == 0
    assert report["parity"]["largest_logit"] != before["largest_logit"]  # both read the changed one


def test_tensors_that_do_not_fit_are_named(copy, capsys):
    path = copy("llama31")

    def change(tensors):
        del tensors["model.layers.2.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
        tensors["model.norm.weight"] = np.zeros(31, np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    rewrite(path, change)
    code, out, _ = check(capsys, path)
    assert code == 1
    assert "1 missing: model.layers.2.mlp.up_proj.weight [48, 32]" in out
    assert "1 not of this architecture: model.layers.0.self_attn.q_proj.bias" in out
    assert "1 of another shape: model.norm.weight [31] instead of [32]" in out
    assert "copied on export: model.layers.0.self_attn.rotary_emb.inv_freq" in out
    assert "supported     no" in out
    assert "(1 missing, 1 not of this architecture, 1 of another shape)" in out
    assert "parity" not in out


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config (gptq)"),
        ({"model_type": "mixtrall"}, "Nearest: 'mixtral'."),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "spiral"}},
            "found rope_type = 'spiral'; supported: default",
        ),
        ({"num_hidden_layers": None}, "found no 'num_hidden_layers'"),
        ({"num_hidden_layers": [3]}, "config.json has a value of a kind that no model of this family has (TypeError"),
        ({"model_type": ["llama"]}, "no model of this family has (TypeError: unhashable type"),
        ({"quantization_config": "awq"}, "no model of this family has (AttributeError"),
        ({"rope_parameters": "linear"}, "no model of this family has (ValueError"),
        ({"hidden_act": "prelu"}, "found hidden_act = 'prelu'; supported: silu"),
    ],
)
def test_what_is_not_supported_is_named(changes, expected, copy, capsys):
    path = copy("llama31")
    hf_folders.rewrite_config(path, **changes)
    code, out, _ = check(capsys, path)
    assert code == 1
    assert expected in out[out.index("supported     no") :]
    assert "Traceback" not in out
    code, report = checked(capsys, path)
    assert code == 1
    assert not report["supported"]
    assert expected in report["problems"][0]


@pytest.mark.parametrize(
    ("kind", "mutate"),
    [
        ("gemma2", lambda config: dataclasses.replace(config, softcap=None)),
        ("gemma2", lambda config: dataclasses.replace(config, groups=(_without_windows(config.groups)))),
        ("t5_1_1", lambda config: dataclasses.replace(config, head_scale=0.5)),
    ],
)
def test_a_reader_that_drops_something_is_seen(kind, mutate, folders, capsys, monkeypatch, tmp_path):
    model_type = json.loads((folders(kind) / "config.json").read_text())["model_type"]
    family = registry.FAMILIES[model_type]
    mutant = dataclasses.replace(family, read_config=lambda config: mutate(family.read_config(config)))
    monkeypatch.setitem(registry.FAMILIES, model_type, mutant)
    report_file = tmp_path / "report.json"
    code, out, _ = check(capsys, folders(kind), "--json", report_file)
    assert code == 1
    assert "at parity     no" in out
    report = json.loads(report_file.read_text())
    assert report["supported"] and report["at_parity"] is False
    assert report["parity"]["difference"] > 10 * report["parity"]["tolerance"]


def _without_windows(groups):
    return tuple(
        LayerGroup(tuple(dataclasses.replace(kind, window=None) for kind in group.pattern), group.count)
        for group in groups
    )


def test_a_difference_that_is_only_rounding_is_no_error(folders, capsys):
    """Seven layers with norms around 1 + 1 everywhere: one bit of the embedding moves the logits by 1e-4."""
    code, report = checked(capsys, folders("gemma3"))
    assert code == 0
    found = report["parity"]
    if found["difference"] > found["tolerance"]:
        assert found["is_rounding"]
        assert found["difference"] < 4 * found["rounding"] < 1e-3


def test_rounding_excuses_little():
    def found(difference, rounding):
        return parity.Comparison(difference, (difference,), 5.0, 1e-4, rounding, 1.0, 64, (), None, "")

    assert found(9e-5, None).is_at_parity
    assert found(3e-4, 1e-4).is_rounding
    assert found(3e-4, 1e-4).is_at_parity
    assert not found(3e-4, 5e-5).is_at_parity
    assert not found(2e-3, 1e-2).is_at_parity  # over ten tolerances
    assert not found(float("nan"), None).is_at_parity


def test_logits_that_are_no_numbers_are_not_at_parity(copy, capsys):
    path = copy("llama31")
    rewrite(path, lambda tensors: tensors["model.norm.weight"].fill(np.nan))
    code, report = checked(capsys, path)
    assert code == 1
    assert report["at_parity"] is False
    assert report["parity"]["difference"] is None


@pytest.mark.parametrize("kind", ["llama31", "gemma2", "gemma3", "deepseek_v3", "smollm3", "gpt2", "t5_1_1"])
def test_a_model_too_large_is_checked_by_its_first_layers(kind, folders, capsys, monkeypatch):
    opened = open_folder(folders(kind))
    depth = fitting.depth_of(opened.config)
    free = fitting.weigh(fitting.first_layers(opened, depth - 1)).needs(fitting.SHORT)
    monkeypatch.setattr(fitting, "free_memory", lambda: free)
    code, out, _ = check(capsys, folders(kind))
    assert code == 0, out
    assert "at parity     yes" in out
    assert f"only the first {depth - 1} of {depth} layers, which is what fits the memory" in out


def test_what_the_first_layers_lack_is_said(folders, capsys, monkeypatch):
    opened = open_folder(folders("deepseek_v3"))
    free = fitting.weigh(fitting.first_layers(opened, 1)).needs(fitting.SHORT)
    monkeypatch.setattr(fitting, "free_memory", lambda: free)
    out = check(capsys, folders("deepseek_v3"))[1]
    assert "only the first 1 of 3 layers" in out
    assert "not among these layers, so not checked: experts" in out


def test_too_little_memory_for_one_layer_says_how_much_is_needed(folders, capsys, monkeypatch):
    monkeypatch.setattr(fitting, "free_memory", lambda: 1 << 20)
    code, out, _ = check(capsys, folders("llama31"))
    assert code == 0
    assert "not checked: 1.0 MiB of memory are free; the first layer alone needs" in out


def test_without_torch_parity_is_not_checked_and_that_is_said(folders, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out, _ = check(capsys, folders("llama31"))
    assert code == 0
    assert "supported     yes" in out
    assert "not checked: torch cannot be imported; `pip install torch`" in out
    assert "at parity" not in out
    code, report = checked(capsys, folders("llama31"))
    assert code == 0
    assert report["at_parity"] is None
    assert report["parity"]["checked"] is False


def test_what_transformers_cannot_open_is_not_checked(folders, capsys, monkeypatch):
    def refuse(*args, **options):
        raise ValueError("no such architecture")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    code, out, _ = check(capsys, folders("llama31"))
    assert code == 0
    assert "cannot open the folder (ValueError: no such architecture)" in out


def test_config_alone_can_be_checked_before_the_weights_are_there(copy, capsys):
    path = copy("gemma2")
    (path / "model.safetensors").unlink()
    code, out, _ = check(capsys, path)
    assert code == 0
    assert "supported     yes, as far as config.json says" in out
    (path / "pytorch_model.bin").write_bytes(b"pickle")
    code, out, _ = check(capsys, path)
    assert code == 1
    assert "found only pickled weights (pytorch_model.bin)" in out


def test_what_is_no_folder_is_told(folders, capsys, tmp_path):
    for path, expected in (
        ("nobody/nothing-of-this-name", "nobody/nothing-of-this-name: no such local path"),
        ("/gone/away", "/gone/away: no such folder"),
        (tmp_path, "neither a model (config.json) nor an adapter"),
        (folders("llama31") / "config.json", "found a file; expected a model folder"),
    ):
        code, _, err = check(capsys, path)
        assert code == 1
        assert expected in err


def test_flags_are_checked_first(folders, capsys, tmp_path):
    (tmp_path / "folder").mkdir()
    for words, expected in (
        (["--length", "1"], "--length: found 1; expected at least 2"),
        (["--json", tmp_path / "folder"], "cannot be written"),
    ):
        code, _, err = check(capsys, folders("llama31"), *words)
        assert code == 2
        assert expected in err
    with pytest.raises(SystemExit) as ended:
        command.main(["check"])
    assert ended.value.code == 2
    code, _, err = check(capsys, folders("llama31"), "--length", 20000)
    assert code == 1
    assert "--length: found 20000; expected at most the model's 16,384 positions" in err
