"""Whole runs of an encoder-decoder: they learn, go on where they stopped, write what others open, and answer."""

import io
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import t5_folders
import tiny_runs
import torch
import transformers
import yaml
from flax import nnx

from jaxtune import assembly, chat, conversions, generate
from jaxtune.answering import Answerer
from jaxtune.asking import Sampling
from jaxtune.batch import PairBatch
from jaxtune.config import TuningConfig
from jaxtune.data.packing import Pair, lay_out_pairs
from jaxtune.evaluate import __main__ as evaluate
from jaxtune.models.t5_layers import plain
from jaxtune.opening import open_model
from jaxtune.sharding import batch_sharding, create_on_mesh, make_mesh, parameter_shardings
from jaxtune.step import Compute, initial_state, make_train_step, state_shardings
from jaxtune.train import train

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
SMALL = ("data.max_length=24", "data.encoder_length=40", "train.batch_rows=8", "train.steps=8", "log.every_steps=1")
QUIET = ("log.tensorboard=false", "optimizer.schedule=constant", "optimizer.warmup_ratio=0", "data.window=16")
FULL = ("tuning.method=full", "optimizer.name=adafactor", "optimizer.learning_rate=0.05", "model.dropout=0.05")
LORA = ("tuning.method=lora", "optimizer.learning_rate=0.02", "tuning.dropout=0.1", "tuning.rank=8")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return t5_folders.tiny_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_runs.write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", tiny_runs.rows(160))


def words(base, data, output, *more):
    return [f"model.path={base}", f"data.train.0.path={data}", f"output={output}", *SMALL, *QUIET, *more]


def run(base, data, output, *more):
    return train(tiny_runs.decode(words(base, data, output, *more)))


@pytest.fixture(scope="module", params=["full", "lora"])
def learned(request, base, data, tmp_path_factory):
    """(method, result, output) of one run with held-out rows."""
    output = tmp_path_factory.mktemp("runs") / request.param
    method = {"full": FULL, "lora": LORA}[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXTUNE_CACHE", str(output.parent / "cache"))
        result = run(base, data, output, *method, "data.eval_fraction=0.2", "eval.every_steps=4")
    return request.param, result, output


def test_the_loss_falls_in_training_and_on_held_out_rows(learned):
    _, result, output = learned
    losses = [loss for loss, _ in tiny_runs.losses(output).values()]
    assert result.step == 8 and losses[-1] < 0.8 * losses[0], losses
    held_out = {r["step"]: r["eval_loss"] for r in tiny_runs.records(output) if "eval_loss" in r}
    assert list(held_out) == [4, 8] and held_out[8] < held_out[4]


def test_tokens_are_counted_on_both_sides(learned):
    first = tiny_runs.records(learned[2])[0]
    assert 8 * 24 < first["tokens"] <= 8 * (24 + 40) and 0 < first["trained_tokens"] <= 8 * 24


def test_what_the_model_decides_is_written_back(learned, base, data, tmp_path):
    written = yaml.safe_load((learned[2] / "config.yaml").read_text())["data"]
    assert (written["template"], written["encoder_length"], written["max_length"]) == ("plain", 40, 24)
    unsaid = [word for word in words(base, data, tmp_path / "out") if "_length" not in word]
    assert train(tiny_runs.decode([*unsaid, "train.steps=0"])).step == 0
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["data"]
    assert (written["encoder_length"], written["max_length"]) == (2048, 512)


def encoded(output, question):
    tokenizer = transformers.AutoTokenizer.from_pretrained(output / "hf")
    return [*tokenizer(question, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def test_the_exports_open_with_our_logits(learned, base, tmp_path):
    method, result, output = learned
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(result.hf).eval()
    ours, _ = t5_folders.load(result.hf)
    encoder, decoder = np.array([encoded(output, "name the colour of 3")]), np.arange(0, 9)[None]
    found = t5_folders.logits(ours, *t5_folders.whole(encoder), *t5_folders.whole(decoder))
    np.testing.assert_allclose(found, t5_folders.torch_logits(model, encoder, decoder), atol=1e-4, rtol=0)
    if method == "lora":
        adapted = peft.PeftModel.from_pretrained(
            transformers.AutoModelForSeq2SeqLM.from_pretrained(base), result.adapter
        )
        theirs = t5_folders.torch_logits(adapted.eval(), encoder, decoder)
        np.testing.assert_allclose(found, theirs, atol=1e-4, rtol=0)
        conversions.merge(result.adapter, str(tmp_path / "merged"))
        merged, _ = t5_folders.load(tmp_path / "merged")
        merged = t5_folders.logits(merged, *t5_folders.whole(encoder), *t5_folders.whole(decoder))
        np.testing.assert_allclose(merged, found, atol=1e-5, rtol=0)


def test_answers_are_those_of_transformers(learned):
    """Prompts go through the template that the run wrote, and end with EOS as the encoder was trained."""
    _, result, output = learned
    questions = ["name the colour of 3", "name the colour of 144"]
    answers = Answerer(open_model(result.hf)).answer(
        [[{"role": "user", "content": q}] for q in questions], Sampling(12)
    )
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(result.hf).eval()
    for question, answer in zip(questions, answers, strict=True):
        out = model.generate(torch.tensor([encoded(output, question)]), max_new_tokens=12)
        assert list(answer.tokens) == out[0, 1:].tolist()


def test_generate_chat_and_evaluate_ask_a_run(learned, data, tmp_path, capsys, monkeypatch):
    _, _, output = learned
    prompts = ["--prompt", "name the colour of 3", "--max-new-tokens", "12"]
    assert generate.main([str(output), *prompts, "--output", str(tmp_path / "a.jsonl")]) == 0
    record = json.loads((tmp_path / "a.jsonl").read_text())
    monkeypatch.setattr("sys.stdin", io.StringIO("name the colour of 3\n"))
    capsys.readouterr()
    assert chat.main([str(output), "--temperature", "0", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out.strip() == record["answer"]
    scores = tmp_path / "scores.json"
    assert evaluate.main([str(output), "--data", str(data), "--limit", "20", "--json", str(scores)]) == 0
    assert json.loads(scores.read_text())["overall"]["count"] == 20


def test_a_folder_without_a_chat_template_is_asked_in_plain_text(base):
    opened = open_model(str(base))
    assert opened.template.name == "plain"
    tokens = Answerer(opened).encode([{"role": "user", "content": "name the red"}])
    assert tokens[-1] == 1 and opened.template.tokenizer.decode(tokens[:-1]) == "name the red"


def test_a_resumed_run_is_the_run_that_never_stopped(base, data, tmp_path):
    run(base, data, tmp_path / "once", *FULL, "train.steps=4")
    run(base, data, tmp_path / "twice", *FULL, "train.steps=2")
    run(base, data, tmp_path / "twice", *FULL, "train.steps=4")
    assert tiny_runs.losses(tmp_path / "once") == tiny_runs.losses(tmp_path / "twice")
    tiny_runs.assert_same_bits(tiny_runs.weights(tmp_path / "once"), tiny_runs.weights(tmp_path / "twice"))


# ---- one update, on any devices ----


def batch_of() -> PairBatch:
    """Eight rows of two pairs of many lengths, with weights that are no mask."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(8):
        lengths = rng.integers(3, 16, (2, 2))
        made = [
            Pair(*(rng.integers(3, 280, n).astype(np.int32) for n in two), rng.choice([0.0, 0.5, 2.0], two[1]))
            for two in lengths
        ]
        rows.append([(pair, 0) for pair in made])
    return lay_out_pairs(rows, 32, 32, start_token=0)


def update(base, method, sizes, microbatches, *, dropout=0.0):
    """Returns (loss, {name: gradient}) of one update by plain descent of rate 1."""
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    hf_config = json.loads((base / "config.json").read_text())
    tuning = TuningConfig(method=method, rank=4, alpha=8.0, dropout=dropout)
    plan = assembly.plan_model(hf_config, tuning, param_dtype=jnp.float32, seed=0, where="test")
    with jax.set_mesh(mesh):
        places = (parameter_shardings(plan.trainable, mesh), parameter_shardings(plan.frozen, mesh))
        trainable, frozen = create_on_mesh(plan.make, places)
        keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(trainable))))
        trainable = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape, x.dtype), trainable)
        descent = optax.sgd(1.0)
        state = jax.device_put(initial_state(descent, trainable), state_shardings(descent, plan.trainable, mesh))
        noise = {"dropout_seed": 3, "dropout_rate": dropout} if dropout else {}
        compute = Compute(jnp.float32, plain, "none", microbatches, method == "full", **noise)
        step = jax.jit(make_train_step(plan.graph, descent, compute))
        after, metrics = step(state, frozen, jax.device_put(batch_of(), batch_sharding(mesh)))
        gradient = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), state.trainable, after.trainable)
    named = {"/".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(gradient)}
    return float(metrics.loss), named


def assert_equal(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[1].items():
        norm = np.linalg.norm(gradient)
        assert norm > 0, f"{name} has no gradient: the test would be blind to it"
        assert np.linalg.norm(found[1][name] - gradient) <= 2e-5 * norm, name


@pytest.mark.long
def test_eight_devices_and_microbatches_change_no_gradient(base):
    expected = update(base, "full", {"fsdp": 1}, 1)
    assert_equal(update(base, "full", {"fsdp": 4, "tensor": 2}, 2), expected)


@pytest.mark.long
def test_nor_of_adapters_nor_what_dropout_zeroes(base):
    """Noise is drawn by row: the model's own and the adapters'."""
    expected = update(base, "lora", {"fsdp": 1}, 1, dropout=0.1)
    assert_equal(update(base, "lora", {"fsdp": 4, "tensor": 2}, 2, dropout=0.1), expected)
    assert update(base, "lora", {"fsdp": 1}, 1)[0] != pytest.approx(expected[0], rel=1e-3)


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("model.attention=splash",), ("model.attention: found 'splash'", "use auto or xla")),
        (("tuning.targets=q_proj",), ("found 'q_proj'", "k, o, q, v, wi_0, wi_1, wo")),
        (("data.overlong=split",), ("encoder-decoder", "an answer cut in two")),
    ],
    ids=str,
)
def test_what_suits_a_decoder_alone_is_told(base, data, tmp_path, more, told):
    with pytest.raises(ValueError) as caught:
        run(base, data, tmp_path / "out", *more)
    for words_ in told:
        assert words_ in str(caught.value)


def test_raw_text_has_nothing_for_an_encoder(base, tmp_path):
    rows = tiny_runs.write_rows(tmp_path / "text.jsonl", [{"text": "a text without a question"}] * 20)
    with pytest.raises(ValueError, match="raw text, which has no input for an encoder"):
        run(base, rows, tmp_path / "out")


@pytest.mark.parametrize("key", ["data.encoder_length=32", "model.dropout=0.1"])
def test_what_suits_an_encoder_decoder_is_refused_for_a_decoder_alone(data, tmp_path, key):
    llama = tiny_runs.write_model(tmp_path / "llama")
    with pytest.raises(ValueError, match="is a decoder alone") as caught:
        train(tiny_runs.config(llama, data, tmp_path / "out", key))
    assert key.partition("=")[0] in str(caught.value)


def test_the_recipe_of_flan_t5_runs_with_its_settings(base, data, tmp_path):
    small = ("train.batch_rows=8", "train.microbatch_rows=8", "train.steps=2", "log.tensorboard=false")
    lengths = ("data.encoder_length=64", "data.max_length=32", "data.train.0.format=auto", "data.train.0.examples=160")
    paths = (f"model.path={base}", f"data.train.0.path={data}", f"output={tmp_path / 'out'}")
    config = tiny_runs.decode([str(CONFIGS / "flan_t5.yaml"), *paths, *small, *lengths])
    assert train(config).step == 2
    told = {r["learning_rate"] for r in tiny_runs.records(tmp_path / "out") if "learning_rate" in r}
    assert told and all(rate == pytest.approx(5e-4) for rate in told)
    asked = tiny_runs.decode([str(CONFIGS / "flan_t5.yaml")])
    assert (asked.data.encoder_length, asked.data.max_length, asked.train.batch_rows) == (2048, 512, 64)
    assert (asked.optimizer.name, asked.optimizer.max_grad_norm, asked.model.dropout) == ("adafactor", None, 0.05)
