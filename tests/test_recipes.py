"""Recipes of configs/: their plans without data, and rows as their data sets have them through to what is trained."""

import json
import pathlib
import re

import pytest

from jaxtune.config import Config
from jaxtune.config_data import HoldOutConfig, MixingConfig
from jaxtune.data import loader, planning
from jaxtune.data.chat import templates
from jaxtune.data.mixing import tree
from jaxtune.data.stream import example_text
from jaxtune.data.wording import tasks
from jaxtune.decode import decode
from jaxtune.train import train

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
MARKS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>")

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
LONGER = [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "<p>I am a <b>model</b>.</p>"}]
ALPACA = {"instruction": "Add.", "input": "2 3", "output": "5"}
ULTRACHAT = {"prompt": "Hi", "prompt_id": "1", "messages": MESSAGES}
SLIM = {
    "conversations": [
        {"from": "system", "value": "Be brief.", "weight": None},
        {"from": "human", "value": "Hi", "weight": 0.0},
        {"from": "gpt", "value": "Hello.", "weight": 1.0},
    ]
}
DOLLY = {"instruction": "Who?", "context": "Ann came.", "response": "Ann.", "category": "closed_qa"}
FEEDBACK = {"query": "Print 1.", "answer": "print(1)", "resource": "evol", "lang": "python"}
FLASHCARD = {"input": "What pumps blood?", "output": "The heart.", "instruction": "Answer this question truthfully"}
P3 = {
    "answer_choices": ["Yes", "No"],
    "inputs": [1, 2],
    "inputs_pretokenized": "Is it wet?",
    "targets": [3],
    "targets_pretokenized": "Yes",
}
ORCA = {"id": "flan.1", "system_prompt": "Think.", "question": "2 + 3?", "response": "It is 5."}
TREE = {
    "message_tree_id": "a",
    "tree_state": "ready_for_export",
    "prompt": {
        "message_id": "a",
        "parent_id": None,
        "role": "prompter",
        "text": "Hi",
        "lang": "en",
        "replies": [
            {"message_id": "c", "parent_id": "a", "role": "assistant", "text": "What?", "rank": 1, "replies": []},
            {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "Hello.", "rank": 0, "replies": []},
        ],
    },
}
HERMES = {
    "system_prompt": None,
    "conversations": [{"from": "human", "value": "Hi", "weight": None}, {"from": "gpt", "value": "Hello."}],
    "source": "airoboros2.2",
    "category": "orca",
    "skip_prompt_formatting": False,
}
OSS = {"lang": "python", "raw_index": 1, "index": 1, "seed": "x", "problem": "Print 1.", "solution": "print(1)"}
MEDQA = {
    "question": "Which organ pumps blood?",
    "answer": "Heart",
    "options": {"A": "Liver", "B": "Heart", "C": "Lung", "D": "Skin"},
    "meta_info": "step1",
    "answer_idx": "B",
    "metamap_phrases": ["organ", "blood"],
}
RTE = {"premise": "It rains.", "hypothesis": "It is wet.", "options": ["yes", "no"], "answer": "yes"}
STANFORD = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA3 = HEADER.format("user") + "Hi<|eot_id|>" + HEADER.format("assistant") + "«Hello.<|eot_id|>»"
CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hello.<|im_end|>»"
FEEDBACK_CHATML = "<|im_start|>user\nPrint 1.<|im_end|>\n<|im_start|>assistant\n«print(1)<|im_end|>»"

# recipe -> leaf -> a row as its data set has it, and a part of what the model then sees, trained between « and ».
LAYOUTS: dict[str, dict[str, tuple[dict, str]]] = {
    "flan2021": {"flan2021/mnli_matched": (RTE, "It rains.\nSo: It is wet.\nOPTIONS:\n- yes\n- no«yes")},
    "t0": {"t0/imdb_Movie_Expressed_Sentiment": (P3, "Is it wet?«Yes")},
    "alpaca": {
        "alpaca": ({**ALPACA, "text": "x"}, STANFORD + "Add.\n\n### Input:\n2 3\n\n### Response:«5<|end|>»"),
    },
    "vicuna": {
        "sharegpt": (
            {"id": "a", "conversations": LONGER},
            "the user's questions. USER: Who are you? ASSISTANT: «I am a **model**.<|end|>»",
        )
    },
    "dolly": {
        "databricks-dolly-15k": (DOLLY, "Instruction:\nWho?\n\n### Input:\nAnn came.\n\n### Response:«Ann.<|end|>»")
    },
    "flan_t5": {"databricks-dolly-15k": (DOLLY, "Ann came.<|end|> -> «Ann.<|end|>»")},
    "oasst": {"oasst1": (TREE, "USER: Hi ASSISTANT: «Hello.<|end|>»")},
    "lima": {"lima": ({"conversations": ["Hi", "Hello."], "source": "stackexchange"}, LLAMA3)},
    "orca": {
        "gpt35": (ORCA, "Think. USER: 2 + 3? ASSISTANT: «It is 5.<|end|>»"),
        "gpt4": (ORCA, "Think. USER: 2 + 3? ASSISTANT: «It is 5.<|end|>»"),
    },
    "slimorca": {"SlimOrca": (SLIM, "<|im_start|>system\nBe brief.<|im_end|>\n" + CHATML)},
    "wizardlm": {
        "WizardLM_evol_instruct_V2_196k": (
            {"idx": "a", "conversations": SHAREGPT},
            "the user's questions. USER: Hi ASSISTANT: «Hello.<|end|>»",
        )
    },
    "ultrachat": {"ultrachat_200k": (ULTRACHAT, "<|user|>\nHi<|end|>\n<|assistant|>\n«Hello.<|end|>»")},
    "openhermes": {"OpenHermes-2": (HERMES, CHATML)},
    "tulu": {
        "tulu3/coconot": (
            {"id": "a", "messages": MESSAGES, "source": "coconot"},
            "<|user|>\nHi<|end|>\n<|assistant|>\n«Hello.<|end|>»",
        )
    },
    "medical": {
        "meadow/flashcards": (FLASHCARD, "for study. Say what is known"),
        "medqa": (
            MEDQA,
            "Which organ pumps blood?\n\nOptions:\n1. Liver\n2. Heart\n3. Lung\n4. Skin\n\n### Response:"
            "«1. Answer: Heart\n"
            "2. Source: a question in the style of the USMLE, step1\n"
            "3. Limits: one answer is keyed as right; a real case may need more than the question tells\n"
            "4. Care: this is for study; a doctor decides about a patient<|end|>»",
        ),
    },
    "code": {
        "code_alpaca": ({"instruction": "Print 1.", "input": "", "output": "print(1)"}, FEEDBACK_CHATML),
        "code_feedback": (FEEDBACK, FEEDBACK_CHATML),
        "oss_instruct": (OSS, FEEDBACK_CHATML),
        "evol_instruct": ({"instruction": "Print 1.", "response": "print(1)"}, FEEDBACK_CHATML),
    },
    "general_mix": {
        "ultrachat_200k": (ULTRACHAT, LLAMA3),
        "databricks-dolly-15k": (DOLLY, "Who?\n\nAnn came.<|eot_id|>"),
        "CodeFeedback-Filtered-Instruction": (FEEDBACK, "«print(1)<|eot_id|>»"),
        "MathInstruct": ({"source": "a", "output": "5", "instruction": "2 + 3?"}, "«5<|eot_id|>»"),
        "gsm8k": ({"question": "2 + 3?", "answer": "<<2+3=5>>5\n#### 5"}, "«<<2+3=5>>5\n#### 5<|eot_id|>»"),
        "SlimOrca": (SLIM, "Be brief.<|eot_id|>" + LLAMA3),
        "medical_meadow_medical_flashcards": (FLASHCARD, "«The heart.<|eot_id|>»"),
        "finance-alpaca": ({**ALPACA, "text": ""}, "Add.\n\n2 3<|eot_id|>"),
        "coconot": (
            {"id": "a", "category": "c", "subcategory": "s", "prompt": "Who will win?", "response": "Nobody knows."},
            "Who will win?<|eot_id|>" + HEADER.format("assistant") + "«Nobody knows.<|eot_id|>»",
        ),
    },
}


def recipe(name: str, *words: str) -> Config:
    return decode([str(CONFIGS / f"{name}.yaml"), *words])


def tree_of(config: Config) -> tree.Node:
    return tree.expand(config, config.data.train, key="data.train", template_names=tasks.template_names)


@pytest.fixture(scope="module")
def tokenizer():
    """The quickstart's, with the marks of all templates."""
    found = templates.load_tokenizer(str(CONFIGS.parent / "jaxtune" / "assets" / "quickstart"))
    found.add_special_tokens({"additional_special_tokens": list(MARKS)})
    return found


@pytest.mark.parametrize("name", [*LAYOUTS, "flan2022"])
def test_the_plan_needs_no_data(name):
    plan = planning.mixture_plan(recipe(name)).as_json()
    assert sum(leaf["rate"] for leaf in plan["leaves"]) == pytest.approx(1, abs=1e-12)
    assert all(leaf["examples"] > 0 for leaf in plan["leaves"]) and not plan["skipped"]


@pytest.mark.parametrize(("name", "leaf"), [(name, leaf) for name, leaves in LAYOUTS.items() for leaf in leaves])
def test_rows_as_published_are_read_as_the_recipe_says(tmp_path, tokenizer, name, leaf):
    row, seen = LAYOUTS[name][leaf]
    file = tmp_path / ("rows.trees.jsonl" if name == "oasst" else "rows.jsonl")
    file.write_text(json.dumps(row) + "\n")
    wording = {"family": "mnli", "kind": "zero-shot", "inputs": "{premise}\nSo: {hypothesis}\n{options_}"}
    (tmp_path / "templates.jsonl").write_text(json.dumps({**wording, "targets": "{answer}"}) + "\n")
    config = recipe(name, f"data.root={tmp_path}", "train.steps=1", "data.eval_fraction=0")
    (found,) = (node for node in tree_of(config).leaves() if node.name == leaf)
    keys = {"path": str(file), "name": None, "split": None, "examples": None, "weight": None}
    data = {
        "train": (found.config.model_copy(update=keys),),
        "eval": (),
        "mixing": MixingConfig(),
        "phases": (),
        "hold_out": HoldOutConfig(),
    }
    config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    lengths = {"max_length": config.data.max_length, "encoder_length": config.data.encoder_length}
    stream = loader.open_stream(config, tokenizer=tokenizer, **lengths)
    (reader,) = stream.maker.readers
    shown = re.sub(r"«(\s+)", r"\1«", example_text(reader))  # white space is part of the answer's first token
    assert seen in shown
    assert not [warning for warning in stream.warnings if "lost" in warning]


def test_every_recipe_is_tried_with_rows():
    others = {"flan2022", "flan_mini", "full", "lora", "quickstart"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} - others == set(LAYOUTS)


@pytest.mark.parametrize("name", ["medical", "code", "general_mix", "orca"])
def test_every_source_of_a_mixed_recipe_is_tried(name):
    tried, columns = set(LAYOUTS[name]), {}
    for node in tree_of(recipe(name)).leaves():
        columns.setdefault((node.config.format, str(node.config.columns), str(node.config.templates)), []).append(
            node.name
        )
    assert all(tried & set(names) for names in columns.values())


def test_every_recipe_says_where_its_values_are_from():
    for name in LAYOUTS:
        head = (CONFIGS / f"{name}.yaml").read_text().partition("\n\n")[0]
        assert re.search(r"(?m)^#   python -m jaxtune\.train configs/", head), name
        assert re.search(r"\w+/\w+|et al\.", head) and re.search(r"[Vv]alues|Sizes|Weights", head), name


def test_flan_2021_s_tasks_are_those_of_its_clusters():
    clusters = tree.read_table("builtin:flan2021/tasks.csv", where="test")
    file = CONFIGS.parent / "jaxtune" / "assets" / "flan2021" / "clusters.json"
    assert {(row["cluster"], row["task"]) for row in clusters} == {
        (cluster, task) for cluster, names in json.loads(file.read_text()).items() for task in names
    }


def test_flan_2021_caps_a_rate_at_3000_and_trains_nothing_of_what_is_held_out():
    plan = planning.mixture_plan(recipe("flan2021"))
    rates = {leaf.name.removeprefix("flan2021/"): (leaf.rate, leaf.examples) for leaf in plan.leaves}
    assert max(examples for _, examples in rates.values()) == 30_000
    unit = rates["copa"][0] / 350
    assert all(rate == unit * min(3000, examples) for rate, examples in rates.values())
    assert not {"rte", "anli_r1", "snli", "paws_wiki", "glue_qqp"} & set(rates) and len(rates) == 69 - 10 - 4


def test_t0_takes_a_whole_data_set_for_each_template_and_a_large_one_once():
    """T0's rule (t0/seqio_tasks/tasks.py): the size of the data set; above 500,000 that over its templates."""
    plan = planning.mixture_plan(recipe("t0"))
    assert len(plan.leaves) == 313
    rates = {leaf.name.removeprefix("t0/"): leaf.rate for leaf in plan.leaves}
    sets = {row["task"]: row for row in tree.read_table("builtin:t0/tasks.csv", where="test")}
    unit = rates["imdb_Movie_Expressed_Sentiment"] / 25_000
    for name, size, templates_ in (
        ("amazon_polarity", 3_600_000, 9),
        ("dbpedia_14", 560_000, 4),
        ("wiki_bio", 582_659, 5),
    ):
        mine = [rate for task, rate in rates.items() if sets[task]["dataset"] == name]
        assert len(mine) == templates_ and size > 500_000
        assert set(mine) == {unit * (500_000 // templates_)}, name
    assert rates["ag_news_classify"] == unit * 120_000
    larger = recipe("t0", "data.train.0.table.where.stage=[BASE, GPT_EVAL, SGLUE]")
    assert len(planning.mixture_plan(larger).leaves) == 313 + 79 + 72


def test_t0_s_table_is_the_published_one(shared):
    sizes = [json.loads(line) for line in (shared / "flan" / "t0_tasks.jsonl").read_text().splitlines()]
    published = {task["task"]: task["splits"].get("train") for task in sizes}
    ours = tree.read_table("builtin:t0/tasks.csv", where="test")
    assert len(ours) == 464 and all(published[row["task"]] == int(row["examples"]) for row in ours)


def test_general_mix_has_its_shares():
    plan = planning.mixture_plan(recipe("general_mix"))
    ranges = {
        "general": (0.30, 0.40),
        "code_math": (0.20, 0.30),
        "reasoning": (0.15, 0.20),
        "domain": (0.10, 0.15),
        "safety": (0.05, 0.10),
    }
    shares = plan.by_tag()
    assert set(shares) == set(ranges) and sum(shares.values()) == pytest.approx(1)
    assert all(low <= shares[tag] <= high for tag, (low, high) in ranges.items())
    moved = recipe("general_mix", "data.mixing.tags.safety=0.05", "data.mixing.tags.domain=0.15")
    assert planning.mixture_plan(moved).by_tag()["domain"] == pytest.approx(0.15)


def test_tulu_has_its_authors_numbers():
    plan = planning.mixture_plan(recipe("tulu"))
    assert len(plan.leaves) == 19 and sum(leaf.examples for leaf in plan.leaves) == 939_344
    assert all(leaf.rate * 939_344 == leaf.examples for leaf in plan.leaves)
    whole = recipe("tulu", "data.train=[{path: allenai/tulu-3-sft-mixture, format: messages}]")
    assert [source.path for source in whole.data.train] == ["allenai/tulu-3-sft-mixture"]


def test_flan_mini_has_sixty_sources(shared, monkeypatch):
    monkeypatch.setenv("JAXTUNE_DATA", str(shared))
    plan = planning.mixture_plan(recipe("flan_mini"))
    root = tree_of(recipe("flan_mini"))
    assert len({leaf.source for leaf in root.leaves()}) >= 60
    assert sum(leaf.rate for leaf in plan.leaves) == 1


@pytest.mark.long
def test_flan_mini_trains(shared, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXTUNE_DATA", str(shared))
    output = tmp_path / "out"
    train(
        recipe(
            "flan_mini",
            f"output={output}",
            "train.steps=3",
            "train.batch_rows=8",
            "log.every_steps=1",
            "export.hf=false",
        )
    )
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if "loss" in record][-1]
    assert last["step"] == 3 and 0 < last["loss"] < 20
    plan = json.loads((output / "mixture.json").read_text())
    assert sum(leaf["rate"] for leaf in plan["leaves"]) == pytest.approx(1)
