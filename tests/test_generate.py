"""Answers are those of transformers, whatever the batch, the padding and the devices; what is asked wrongly is told."""

import json
import pathlib
import shutil
import subprocess
import sys
import time

import asking_helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asking_helpers import agreeing, answerer, greedy_of_transformers, random_prompts

from jaxtune import answering, generate
from jaxtune.answering import Answerer, TextStream
from jaxtune.asking import Sampling
from jaxtune.convert.folder import open_folder
from jaxtune.convert.writing import export_folder
from jaxtune.data.chat.templates import load_tokenizer
from jaxtune.decoding import CHOICES, Rows, nucleus
from jaxtune.opening import find, open_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return asking_helpers.folder(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def model(folder):
    return answerer(folder)


def test_greedy_story_is_that_of_transformers(shared):
    path = str(shared / "models" / "stories260K")
    model = answerer(path, template="plain")
    prompt = model.encode([{"role": "user", "content": "Once upon a time, there was a little girl"}])
    answer = model.answer_prompts([prompt], Sampling(120))[0]
    assert agreeing(answer.tokens, greedy_of_transformers(path, prompt, 120, stop_ids=(2,))) > 100
    assert "Lily" in answer.text


@pytest.mark.parametrize("kind", ["llama32", "mistral", "qwen25"])
def test_greedy_tokens_are_those_of_transformers(kind, tmp_path):
    path = asking_helpers.folder(tmp_path / "model", kind)
    prompts = random_prompts(3)
    model = answerer(path)
    stop_ids = model.opened.stop_ids
    for prompt, answer in zip(prompts, model.answer_prompts(prompts, Sampling(24)), strict=True):
        assert agreeing(answer.tokens, greedy_of_transformers(path, prompt, 24, stop_ids=stop_ids)) > 3


@pytest.mark.parametrize("sampling", [Sampling(20), Sampling(20, temperature=0.8, top_p=0.9, seed=5)])
def test_an_answer_does_not_depend_on_its_batch(folder, model, sampling):
    prompts = [*random_prompts(4), list(range(5, 50))]
    together = [answer.tokens for answer in model.answer_prompts(prompts, sampling)]
    assert [a.tokens for a in answerer(folder, batch=2).answer_prompts(prompts, sampling)] == together
    if sampling.temperature == 0:
        assert [model.answer_prompts([prompt], sampling)[0].tokens for prompt in prompts] == together


def test_a_long_prompt_makes_only_its_own_batch_small(folder):
    model = answerer(folder, batch=None)
    prompts = [[7] * length for length in (3, 100, 4, 5, 6)]
    assert list(model._batches(prompts, Sampling(8))) == [[0, 2, 3, 4, 1]]
    room = (
        2 * 4 * 4 * 32 * 64 * 4
    )  # four rows of 32 tokens with 32 new ones, 4 heads; the cache needs not quite as much
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answering, "BATCH_BYTES", 2 * room)
        assert list(model._batches(prompts, Sampling(8))) == [[0, 2, 3, 4], [1]]
    assert list(answerer(folder, batch=3)._batches(prompts, Sampling(8))) == [[0, 2, 3], [4, 1]]


def test_eight_devices_answer_as_one(folder, model):
    everywhere = Answerer(open_model(folder))
    assert everywhere.opened.mesh.size == 8
    prompts = random_prompts(3)
    expected = [a.tokens for a in model.answer_prompts(prompts, Sampling(12))]
    assert [a.tokens for a in everywhere.answer_prompts(prompts, Sampling(12))] == expected


def test_an_answer_ends_with_its_first_stop_token(folder, model, tmp_path):
    prompts = random_prompts(4)
    whole = model.answer_prompts(prompts, Sampling(20))
    stop = whole[0].tokens[7]
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop, 0]}))
    again = answerer(str(copy))
    assert {stop, 0, again.opened.template.end_id} == set(again.opened.stop_ids)
    for before, now in zip(whole, again.answer_prompts(prompts, Sampling(20)), strict=True):
        if stop in before.tokens:
            assert now.tokens == before.tokens[: before.tokens.index(stop) + 1] and now.stopped == "stop"
        else:
            assert now == before
    assert sum(stop in answer.tokens for answer in whole) >= 1
    text = again.answer_prompts(prompts, Sampling(20))[0].text
    assert text == asking_helpers.tokenizer().decode(whole[0].tokens[: whole[0].tokens.index(stop)]).strip()


def test_an_answer_ends_where_it_may_not_grow(model):
    assert model.answer_prompts([[9, 8]], Sampling(5))[0].stopped == "length"
    long = model.answer_prompts([list(range(10, 130))], Sampling(50))[0]
    assert (len(long.tokens), long.stopped) == (8, "positions")  # 128 positions, 120 of them the prompt's
    with pytest.raises(ValueError, match=r"prompt 2: found \d+ tokens; expected fewer than the model's 128 positions"):
        messages = [[{"role": "user", "content": text}] for text in ("hi", "rain " * 200)]
        model.answer(messages, Sampling(5))


def test_a_tiny_nucleus_is_greedy_and_draws_follow_the_seed(model):
    prompts = random_prompts(4)

    def tokens(**options):
        return [answer.tokens for answer in model.answer_prompts(prompts, Sampling(16, **options))]

    assert tokens(temperature=2.0, top_p=1e-6) == tokens()
    drawn = tokens(temperature=2.0, seed=1)
    assert drawn == tokens(temperature=2.0, seed=1)
    assert drawn != tokens(temperature=2.0, seed=2) and drawn != tokens()
    same = model.answer_prompts([prompts[0]] * 2, Sampling(16, temperature=2.0))
    assert same[0].tokens != same[1].tokens  # each prompt has its own draws


def test_nucleus_keeps_the_likeliest_up_to_top_p():
    logits = jnp.log(jnp.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]))
    kept = np.isfinite(nucleus(logits, jnp.float32(0.6)))
    np.testing.assert_array_equal(kept, [[False, True, True], [False, False, True]])


def test_tokens_are_drawn_as_often_as_they_are_likely_and_anew_each_step(model):
    keys = jax.random.split(jax.random.key(0), 4000)
    rows = Rows(None, None, keys, jnp.float32(0.5), jnp.float32(0.85))
    logits = jnp.log(jnp.tile(jnp.array([0.2, 0.5, 0.3]), (4000, 1)))
    squares = np.array([0.04, 0.25, 0.09])  # temperature 1/2 squares probabilities
    for draw, expected in (("drawn", squares), ("nucleus", squares * [0, 1, 1])):  # 0.25 + 0.09 make 0.89
        drawn = [np.asarray(CHOICES[draw](logits, rows, jnp.int32(step))) for step in (0, 1)]
        shares = np.bincount(drawn[0], minlength=3) / 4000
        np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.03)
        assert (drawn[0] != drawn[1]).mean() > 0.2
    assert len(set(model.answer_prompts([[9, 8]], Sampling(16, temperature=1e6))[0].tokens)) > 8


def test_streaming_gives_the_text_of_the_batch(model):
    messages = [{"role": "user", "content": "the rain"}]
    for sampling in (Sampling(30), Sampling(30, temperature=1.5, top_p=0.9, seed=3)):
        pieces = list(model.stream(messages, sampling))
        assert "".join(pieces) == model.answer([messages], sampling)[0].text
        assert len(pieces) > 3 and all(pieces)


@pytest.mark.parametrize("which", ["bytes", "llama2"])
def test_streamed_text_never_holds_half_a_character(which, request):
    tokenizer = asking_helpers.tokenizer()
    if which == "llama2":
        shared = request.getfixturevalue("shared")
        tokenizer = load_tokenizer(str(shared / "tokenizer" / "llama2_hf"))
    text = "Grüße, 日本語 und 👩‍🚀!\n\n  two  spaces\tend"
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer(f" {text} \n", add_special_tokens=False)["input_ids"]]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text
    assert sum(bool(piece) for piece in pieces) > 10


def test_an_adapter_answers_as_its_merged_folder(folder, model, tmp_path):
    path = asking_helpers.adapter(folder, tmp_path / "adapter")
    adapted = answerer(path)
    export_folder(open_folder(folder), adapted.opened.state, str(tmp_path / "merged"))
    prompts = random_prompts(3)
    expected = [a.tokens for a in answerer(str(tmp_path / "merged")).answer_prompts(prompts, Sampling(12))]
    assert [a.tokens for a in adapted.answer_prompts(prompts, Sampling(12))] == expected
    assert [a.tokens for a in model.answer_prompts(prompts, Sampling(12))] != expected


def test_a_run_is_asked_through_its_model_or_its_adapter(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"model:\n  path: {folder}\noutput: {run}\ntrain:\n  steps: 0\n")
    with pytest.raises(ValueError, match=r"not finished.*go on with `python -m jaxtune\.train .*config\.yaml`"):
        find(str(run))
    asking_helpers.adapter(folder, run / "adapter")
    place = find(str(run))
    assert place.base == folder and place.adapter.folder.path == str(run / "adapter")
    shutil.copytree(folder, run / "hf")
    assert find(str(run)) == (str(run / "hf"), None)


def test_what_cannot_be_asked_is_told(folder, tmp_path):
    with pytest.raises(ValueError, match="no-such: no such"):
        find(str(tmp_path / "no-such"))
    with pytest.raises(ValueError, match="neither a model"):
        find(str(tmp_path))
    adapter = pathlib.Path(asking_helpers.adapter(folder, tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    for name, expected in (("/gone/away", "adapter of '/gone/away', which cannot be opened.*--base"), (None, "--base")):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
        with pytest.raises(ValueError, match=expected):
            find(str(adapter))
    assert find(str(adapter), base=folder).base == folder
    bare = asking_helpers.folder(tmp_path / "bare", chat_template=None)
    with pytest.raises(ValueError, match=r"no chat template.*--template alpaca"):
        open_model(bare)
    with pytest.raises(ValueError, match="--template: found 'alpacca'"):
        open_model(bare, template="alpacca")
    assert open_model(bare, template="alpaca").template.name == "alpaca"


def test_prompts_are_read_from_text_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("\ufefffirst\r\n\n  second é\n", encoding="utf-8")
    assert generate.read_requests(str(tmp_path / "a.txt"), ["third"]) == [
        {"prompt": "first"},
        {"prompt": "  second é"},
        {"prompt": "third"},
    ]
    talk = [{"role": "user", "content": "hi"}]
    path = asking_helpers.write_jsonl(tmp_path / "b.jsonl", [{"prompt": "x", "id": 3}, {"messages": talk}])
    requests = generate.read_requests(path)
    assert requests == [{"prompt": "x"}, {"messages": talk}]
    assert generate.messages_of(requests[0], "S") == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "x"},
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "x"', r"b\.jsonl:2: column 15: .*expected one complete JSON object"),
        ("[1]", r"b\.jsonl:2: found a JSON list; expected prompt"),
        ('{"question": "x"}', r"b\.jsonl:2: found keys question; expected prompt \(text\) or messages"),
        ('{"messages": [{"role": "human", "content": "x"}]}', r"b\.jsonl:2: message 1: found .*human"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', r"b\.jsonl:2: the last message is of role assistant"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(line, expected, tmp_path):
    (tmp_path / "b.jsonl").write_text(f'{{"prompt": "x"}}\n{line}\n')
    with pytest.raises(ValueError, match=expected):
        generate.read_requests(str(tmp_path / "b.jsonl"))


def test_the_command_writes_a_line_for_each_prompt(folder, tmp_path, capsys):
    prompts = asking_helpers.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "the rain"}, {"prompt": "in Spain"}])
    words = [folder, "--prompts", prompts, "--output", str(tmp_path / "out" / "a.jsonl"), "--max-new-tokens", "9"]
    assert generate.main(words) == 0
    records = [json.loads(line) for line in (tmp_path / "out" / "a.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["the rain", "in Spain"]
    assert all(set(record) == {"prompt", "answer", "tokens", "stopped"} for record in records)
    assert all(record["tokens"] == 9 or record["stopped"] == "stop" for record in records)
    printed = capsys.readouterr()
    assert "> the rain\n" in printed.out and "2 answers" in printed.err and "wrote" in printed.err


def test_a_mistake_in_a_flag_is_told_before_jax_is_imported(tmp_path):
    for flags, expected in (
        (["--prompt", "x", "--top-p", "3"], "--top-p: found 3"),
        (["--prompts", "gone.txt"], "gone.txt: no such file"),
        ([], "give prompts"),
    ):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "jaxtune.generate", "run", *flags],
            capture_output=True,
            text=True,
            cwd=pathlib.Path(generate.__file__).parents[1],
        )
        assert done.returncode == 2 and expected in done.stderr
        assert " jax\n" not in done.stderr and time.perf_counter() - start < 5


def test_devices_split_heads_first(folder):
    mesh = open_model(folder).mesh
    assert (mesh.shape["tensor"], mesh.shape["data"]) == (2, 4)  # 2 kv heads, 8 devices
    assert jax.device_count() == 8
