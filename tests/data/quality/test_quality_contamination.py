"""What a benchmark says is found in training rows, with its place; what only sounds like it is not."""

import json
import pickle

import pytest

from jaxtune.data.quality.contamination import Benchmarks

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May. How many in all?"
SHARED = "natalia sold clips to 48 of her friends in april and then she"


@pytest.fixture
def benchmark(tmp_path):
    """benchmark(rows, ...) -> Benchmarks of a file of these rows."""

    def write(rows, name="bench.jsonl", **keys):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Benchmarks([str(path)], cache_dir=str(tmp_path / "cache"), **keys)

    return write


def test_a_shared_run_is_found_with_its_place_and_words(benchmark, tmp_path):
    found = benchmark([{"q": "An unrelated question of several words"}, {"q": {"deep": ["x", QUESTION]}}]).found
    where, words = found(["Hi", 'NATALIA "sold" clips -- to 48 of her friends in April; and then she cried.'])
    assert (where, words) == (f"{tmp_path}/bench.jsonl:2", SHARED)
    # one word fewer is no run of 13
    assert found(["Natalia sold clips to 48 of her friends in April and then."]) is None


def test_all_words_that_follow_on_are_told(benchmark):
    _, words = benchmark([{"q": QUESTION}]).found([f"Before it: {QUESTION} And after it."])
    found = benchmark([{"q": QUESTION}]).found
    assert found([f"{SHARED}, {SHARED}"])[1] == SHARED  # the first of two
    assert words.startswith("natalia sold") and words.endswith("how many in all") and len(words.split()) == 23


def test_a_changed_word_breaks_the_run(benchmark):
    twelve = "a b c d e f g h i j k l"
    found = benchmark([{"q": f"{twelve} m n o p q r s t u v w x y"}]).found
    assert found([f"{twelve} changed n o p q r s t u v w x"]) is None
    assert found([f"{twelve} y n o p q r s t u v w x"]) is None  # a word that the benchmark knows elsewhere
    assert found(["b a c d e f g h i j k l m"]) is None
    assert found([f"{twelve} m"]) is not None


def test_the_length_of_a_run_is_a_choice(benchmark):
    found = benchmark([{"q": "one two three four five six seven"}], ngram=6).found
    assert found(["zero two three four five six seven"])[1] == "two three four five six seven"
    assert found(["zero two three four five six zero"]) is None


def test_a_short_text_is_found_only_as_a_whole(benchmark):
    found = benchmark([{"q": "Who wrote the novel Emma?", "a": "Jane Austen"}]).found
    assert found(["who wrote the novel EMMA"])[1] == "who wrote the novel emma"
    assert found(["Tell me: who wrote the novel Emma?"]) is None
    assert found(["novel the wrote who Emma"]) is None
    assert found(["Who wrote the novel Emma, perchance?"]) is None
    assert found(["Jane Austen"]) is None  # shorter than five words


def test_the_wording_of_a_benchmarks_prompts_is_no_contamination(benchmark):
    prompt = "Read the passage below with care and then answer the question that follows it: "

    def asked(count):
        return benchmark([{"q": f"{prompt}number {i} of all"} for i in range(count)], f"{count}.jsonl").found

    assert asked(10)([prompt + "who?"]) is not None
    assert asked(11)([prompt + "who?"]) is None
    assert asked(11)([prompt + "number 7 of all"]) is not None
    # a passage that many rows repeat is one text
    assert benchmark([{"passage": QUESTION, "i": str(i)} for i in range(30)]).found([QUESTION]) is not None


def test_scripts_without_spaces_have_runs_of_characters(benchmark):
    found = benchmark([{"q": "今天天气很好我们一起去公园散步吧朋友们"}]).found
    assert found(["他说今天天气很好我们一起去公园散步。"]) is not None
    assert found(["今天天气很好我们去公园"]) is None


def test_the_first_file_is_named_where_several_hold_a_text(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps({"q": QUESTION if name == "b.jsonl" else SHARED}) + "\n")
    paths = [str(tmp_path / name) for name in ("b.jsonl", "a.jsonl")]
    assert Benchmarks(paths, cache_dir=str(tmp_path / "c")).found([SHARED])[0] == f"{paths[0]}:1"


def test_a_benchmark_without_texts_or_with_a_broken_row_is_an_error(benchmark, tmp_path):
    with pytest.raises(ValueError, match="found no text of 5 words or more"):
        benchmark([{"q": "too short"}])
    (tmp_path / "bad.jsonl").write_text('{"q": \n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: column 7"):
        Benchmarks([str(tmp_path / "bad.jsonl")], cache_dir=str(tmp_path / "c"))
    with pytest.raises(ValueError, match=r"missing\.jsonl"):
        Benchmarks([str(tmp_path / "missing.jsonl")], cache_dir=str(tmp_path / "c"))


def test_the_key_names_contents_and_length(benchmark):
    one = benchmark([{"q": QUESTION}])
    assert benchmark([{"q": QUESTION}]).key == one.key
    assert len({one.key, benchmark([{"q": QUESTION}], ngram=12).key, benchmark([{"q": QUESTION + "!"}]).key}) == 3


def test_worker_processes_get_a_copy(benchmark):
    benchmarks = benchmark([{"q": QUESTION}])
    copy = pickle.loads(pickle.dumps(benchmarks))
    assert copy.key == benchmarks.key and copy.found([QUESTION]) == benchmarks.found([QUESTION]) is not None


def test_questions_of_one_real_file_are_found_in_another(shared):
    """GSM8K's chains of thought ask questions of its training file; Alpaca's do not."""
    benchmarks = Benchmarks([str(shared / "gsm8k" / "train.jsonl")])
    with open(shared / "cot" / "gsm8k.tsv", encoding="utf-8") as file:
        asked = [line.split("\t")[0].replace("\\n", "\n") for line in file][:1000]
    assert sum(benchmarks.found([question]) is not None for question in asked) > 900
    with open(shared / "self_instruct" / "seed_tasks.jsonl", encoding="utf-8") as file:
        others = [json.loads(line)["instruction"] for line in file]
    assert not any(benchmarks.found([text]) for text in others)
