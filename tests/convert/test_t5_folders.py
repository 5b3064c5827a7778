"""Folders of the T5 line: read and written byte for byte, refused by name, opened by transformers and PEFT."""

import json

import jax
import numpy as np
import peft
import pytest
import t5_folders
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxtune import adapters
from jaxtune.convert import hf, writing
from jaxtune.convert import peft as adapter_folders
from jaxtune.convert.folder import open_folder
from jaxtune.models.layers import LoRAParam
from jaxtune.models.registry import family_of
from jaxtune.sharding import make_mesh, parameter_shardings


def state_of(path, *, mesh=None, dtype_of=None):
    folder = open_folder(path)
    config = family_of(folder.config, where=path).read_config(folder.config)
    abstract = nnx.state(t5_folders.abstract_model(config))
    shardings = parameter_shardings(abstract, mesh) if mesh is not None else None
    return folder, hf.load_params(folder, abstract, shardings=shardings, dtype_of=dtype_of)


def assert_same_files(base, out):
    names = {file.name for file in base.iterdir()}
    assert {file.name for file in out.iterdir()} == names | {"generation_config.json"}
    for name in names - {"config.json"}:
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    before, after = (json.loads((path / "config.json").read_text()) for path in (base, out))
    assert {key: after[key] for key in before} == before
    assert set(after) - set(before) <= {"dtype", "torch_dtype"}  # no rope, no window: nothing a T5 does not have


def with_copies(base, names):
    """Puts copies of the embedding, and a table that nobody reads, beside the weights, as old checkpoints have them."""
    tensors = load_file(base / "model.safetensors")
    tensors |= {name: tensors["shared.weight"].copy() for name in names}
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.ones((8, 4), np.float32)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base


@pytest.mark.parametrize("kind", sorted(t5_folders.KINDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_step_round_trip_is_byte_equal(kind, dtype, tmp_path):
    base = t5_folders.tiny_folder(kind, tmp_path / "base", max_shard_size="20KB", dtype=dtype, own_key=[1, {"a": None}])
    assert (base / "model.safetensors.index.json").exists()
    for name in ("spiece.model", "tokenizer.json", "special_tokens_map.json"):
        (base / name).write_bytes(b"whatever \xff" + name.encode())
    folder, state = state_of(base, dtype_of=hf.file_dtypes(open_folder(base)))
    writing.export_folder(folder, state, str(tmp_path / "out"))
    assert_same_files(base, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["own_key"] == [1, {"a": None}]


def test_round_trip_over_a_mesh(tmp_path):
    base = t5_folders.tiny_folder("t5_1_1", tmp_path / "base")
    folder, state = state_of(base, mesh=make_mesh({"fsdp": 4, "tensor": 2}))
    kernel = state["decoder"]["layers"]["mlp"]["wi_0"]["kernel"].get_value()
    assert kernel.addressable_shards[0].data.shape == (2, 32 // 4, 48 // 2)
    writing.export_folder(folder, state, str(tmp_path / "out"))
    assert_same_files(base, tmp_path / "out")


COPIES = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]


@pytest.mark.parametrize(("kind", "names"), [("t5_1_0", [*COPIES, "lm_head.weight"]), ("t5_1_1", COPIES)])
def test_copies_of_the_embedding_stay_copies(kind, names, tmp_path):
    base = with_copies(t5_folders.tiny_folder(kind, tmp_path / "base"), names)
    folder, state = state_of(base)
    writing.export_folder(folder, state, str(tmp_path / "same"))
    assert_same_files(base, tmp_path / "same")
    embedding = state["embed"]["embedding"]
    embedding.set_value(embedding.get_value() + 1)
    writing.export_folder(folder, state, str(tmp_path / "moved"))
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "moved"))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {"shared.weight", *names}


@pytest.mark.parametrize("kind", ["t5_1_0", "t5_1_1", "mt5"])
def test_an_export_opens_in_transformers_with_our_logits(kind, tmp_path):
    base = t5_folders.tiny_folder(kind, tmp_path / "base")
    folder, state = state_of(base)
    writing.export_folder(folder, jax.tree.map(lambda x: x * 1.01, state), str(tmp_path / "out"))
    model, told = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    encoder, decoder = np.arange(3, 23)[None], np.arange(0, 9)[None]
    ours = t5_folders.logits(
        t5_folders.load(tmp_path / "out")[0], *t5_folders.whole(encoder), *t5_folders.whole(decoder)
    )
    np.testing.assert_allclose(ours, t5_folders.torch_logits(model.eval(), encoder, decoder), atol=1e-4, rtol=0)
    assert model.generation_config.decoder_start_token_id == 0


def test_a_folder_that_transformers_5_wrote_is_read_as_it_reads_it(tmp_path):
    """It ties every head in config.json, and says what was there before in scale_decoder_outputs."""
    model = t5_folders.tiny_model("t5_1_1")
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is True and config["scale_decoder_outputs"] is False
    ours, read = t5_folders.load(tmp_path)
    assert not read.tie_embeddings and read.head_scale == 1
    reopened = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    encoder, decoder = np.arange(3, 23)[None], np.arange(0, 9)[None]
    found = t5_folders.logits(ours, *t5_folders.whole(encoder), *t5_folders.whole(decoder))
    np.testing.assert_allclose(found, t5_folders.torch_logits(reopened, encoder, decoder), atol=1e-4, rtol=0)


# ---- config.json ----

T5 = {"model_type": "t5", **t5_folders.SIZES}


def published(width, mlp, layers, heads, *, model_type="t5", vocab=32128, gated=True):
    return {
        "model_type": model_type, "vocab_size": vocab, "d_model": width, "d_ff": mlp, "d_kv": 64, "num_layers": layers,
        "num_heads": heads, "feed_forward_proj": "gated-gelu" if gated else "relu", "tie_word_embeddings": not gated,
    }  # fmt: skip


PUBLISHED = {
    "t5-small": (published(512, 2048, 6, 8, gated=False), 60_506_624),
    "t5-base": (published(768, 3072, 12, 12, gated=False), 222_903_552),
    "flan-t5-small": (published(512, 1024, 8, 6), 76_961_152),
    "flan-t5-base": (published(768, 2048, 12, 12), 247_577_856),
    "flan-t5-large": (published(1024, 2816, 24, 16), 783_150_080),
    "flan-t5-xl": (published(2048, 5120, 24, 32), 2_849_757_184),
    "flan-t5-xxl": (published(4096, 10240, 24, 64), 11_135_332_352),
    "mt5-small": (published(512, 1024, 8, 6, model_type="mt5", vocab=250112), 300_176_768),
}


def read(config):
    return family_of(config, where="here").read_config(config)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"activation": "relu", "gated": False, "tie_embeddings": True, "head_scale": 32**-0.5, "start_token": 0}),
        ({"tie_word_embeddings": False}, {"tie_embeddings": False, "head_scale": 1.0}),
        ({"feed_forward_proj": "gated-gelu"}, {"activation": "gelu_tanh", "gated": True}),
        ({"feed_forward_proj": "gated-silu"}, {"activation": "silu", "gated": True}),
        ({"feed_forward_proj": "gelu"}, {"activation": "gelu", "gated": False}),
        ({"decoder_start_token_id": None, "pad_token_id": 3}, {"start_token": 3}),
        ({"num_decoder_layers": None}, {"encoder_layers": 3, "decoder_layers": 3}),
        ({"relative_attention_max_distance": 128}, {"max_distance": 128, "buckets": 8}),
        ({"model_type": "mt5"}, {"tie_embeddings": False, "head_scale": 1.0, "bias_in_every_layer": False}),
        ({"model_type": "mt5", "tie_word_embeddings": True}, {"tie_embeddings": True, "head_scale": 32**-0.5}),
        (
            {"model_type": "mt5", "tie_word_embeddings": True, "transformers_version": "5.23.0"},
            {"tie_embeddings": False, "head_scale": 1.0},
        ),
        ({"model_type": "umt5", "tie_word_embeddings": False}, {"tie_embeddings": False, "bias_in_every_layer": True}),
    ],
    ids=str,
)
def test_config_json_is_translated(changes, expected):
    config = read({**T5, **changes})
    assert {name: getattr(config, name) for name in expected} == expected
    assert hash(config) == hash(read({**T5, **changes}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"is_encoder_decoder": False}, "found is_encoder_decoder = False; supported: true"),
        ({"feed_forward_proj": "gated-swiglu2"}, "found feed_forward_proj = 'swiglu2'; supported: silu"),
        ({"feed_forward_proj": "double-gelu"}, "found feed_forward_proj = 'double-gelu'"),
        ({"relative_attention_num_buckets": 7}, "found relative_attention_num_buckets = 7"),
        ({"relative_attention_max_distance": 4}, "found relative_attention_max_distance = 4; supported: more than"),
        ({"d_kv": None}, "found no 'd_kv'"),
        (
            {"model_type": "umt5", "tie_word_embeddings": True, "transformers_version": "5.1"},
            "found tie_word_embeddings = True; supported: false",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_expressed_is_refused_by_name(changes, told):
    with pytest.raises(ValueError, match=r"config\.json: ") as caught:
        read({**T5, **changes})
    assert told in str(caught.value)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameter_counts_are_the_published_ones(name):
    config, count = PUBLISHED[name]
    assert adapters.count(nnx.state(t5_folders.abstract_model(read(config)))) == count


def test_what_is_traced_does_not_grow_with_depth():
    sizes = {layers: {"num_layers": layers, "num_decoder_layers": layers} for layers in (2, 24)}
    shallow, deep = (str(t5_folders.jaxpr_of(read({**T5, **more}))).count("\n") for more in sizes.values())
    assert shallow == deep


# ---- PEFT ----


@pytest.mark.parametrize("kind", ["t5_1_0", "t5_1_1"])
@pytest.mark.parametrize("targets", ["all-linear", ("q", "v")], ids=str)
def test_written_adapter_loads_in_peft_with_our_logits(kind, targets, tmp_path):
    base = t5_folders.tiny_folder(kind, tmp_path / "base")
    ours, _ = t5_folders.load(base)
    adapters.attach(ours, rank=4, alpha=10.0, dropout=0.05, targets=targets, key=jax.random.key(0))
    for number, (path, variable) in enumerate(nnx.to_flat_state(nnx.state(ours, LoRAParam))):
        if path[-1] == "lora_b":
            variable.set_value(0.3 * jax.random.normal(jax.random.key(number), variable.shape))
    out = tmp_path / "adapter"
    adapter_folders.export_adapter(open_folder(base), nnx.state(ours), str(out), base_name="org/base", revision=None)
    config = json.loads((out / "adapter_config.json").read_text())
    all_names = {"q", "k", "v", "o", "wo", *(("wi",) if kind == "t5_1_0" else ("wi_0", "wi_1"))}
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    assert set(config["target_modules"]) == (all_names if targets == "all-linear" else set(targets))
    encoder, decoder = np.arange(3, 23)[None], np.arange(0, 9)[None]
    found = t5_folders.logits(ours, *t5_folders.whole(encoder), *t5_folders.whole(decoder))
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(base).eval()
    before = t5_folders.torch_logits(model, encoder, decoder)
    model = peft.PeftModel.from_pretrained(model, out).eval()
    theirs = t5_folders.torch_logits(model, encoder, decoder)
    assert np.abs(theirs - before).max() > 0.01
    np.testing.assert_allclose(found, theirs, atol=1e-4, rtol=0)
    result = peft.set_peft_model_state_dict(model, peft.utils.load_peft_weights(str(out)))
    assert not [key for key in result.missing_keys if "lora" in key] and not result.unexpected_keys
