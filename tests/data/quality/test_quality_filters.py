"""Filters leave out what the configuration says, tell why, and are named by all that decides."""

import os
import pickle
import sys

import pytest

from jaxtune.config_quality import QualityConfig
from jaxtune.data.layouts.row_functions import load_function
from jaxtune.data.quality.filters import Filters
from jaxtune.data.records import Conversation, Message, RowError

ENGLISH = "The weather is lovely today, so we all went for a long walk in the park."
FRENCH = "Il fait très beau aujourd'hui, alors nous sommes allés nous promener dans le parc."


def talk(*contents):
    roles = ("user", "assistant") * len(contents)
    return Conversation(tuple(Message(role, content) for role, content in zip(roles, contents, strict=False)))


TEXT = Conversation((Message("text", "Once upon a bomb"),))


def test_nothing_is_left_out_unless_a_key_is_set():
    filters = Filters(QualityConfig())
    assert filters.reason(talk("", "")) is filters.reason(TEXT) is None


@pytest.mark.parametrize(
    ("keys", "conversation", "reason"),
    [
        ({"drop": ("cat", "[Dd]og")}, talk("Hi", "A dog"), "quality.drop '[Dd]og'"),
        ({"drop": ("cat",)}, talk("A cat", "Yes"), "quality.drop 'cat'"),
        ({"drop": ("cat",)}, talk("A Cat", "Yes"), None),
        ({"drop": ("Once",)}, TEXT, "quality.drop 'Once'"),
        ({"instruction_words": (2, 3)}, talk("Hi", "Yes"), "quality.instruction_words"),
        ({"instruction_words": (2, 3)}, talk("Hi you", "Yes"), None),
        ({"instruction_words": (2, 3)}, talk("Hi you all", "Yes"), None),
        ({"instruction_words": (2, 3)}, talk("Hi you all there", "Yes"), "quality.instruction_words"),
        ({"instruction_words": (2, None)}, talk("Hi you all there", "Yes", "Hi", "No"), "quality.instruction_words"),
        ({"response_words": (2, None)}, talk("Hi", "Yes"), "quality.response_words"),
        ({"response_words": (1, 1)}, talk("Hi you all", "Yes"), None),
        ({"response_words": (5, None)}, TEXT, None),
        ({"max_harm": 0.0}, talk("A bomb", "Yes"), "quality.max_harm"),
        ({"max_harm": 0.0}, TEXT, "quality.max_harm"),
        ({"max_harm": 0.25}, talk("A bomb", "bomb"), None),
        ({"max_harm": 0.25}, talk("A bomb", "A murder"), "quality.max_harm"),
        # clarity 0.8, length 0.4, format 1, no refusal 1, relevance 1: a mean of 0.84
        ({"min": 0.84}, talk("Say something", "something"), None),
        ({"min": 0.85}, talk("Say something", "something"), "quality.min"),
        ({"min": 1.0}, TEXT, None),
        ({"min_scores": {"clarity": 0.8}}, talk("Say something", "something"), None),
        ({"min_scores": {"clarity": 0.9}}, talk("Say something", "something"), "quality.min_scores.clarity"),
        ({"languages": ("en",)}, talk("Hi", FRENCH), "quality.languages (fr)"),
        ({"languages": ("en", "fr")}, talk("Hi", FRENCH), None),
        ({"languages": ("fr",)}, talk(FRENCH, ENGLISH), "quality.languages (en)"),
        ({"languages": ("fr",)}, talk("2 + 2", "4"), None),  # no language can be told
    ],
)
def test_a_filter_leaves_out_what_it_names_and_tells_so(keys, conversation, reason):
    assert Filters(QualityConfig(**keys)).reason(conversation) == reason


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module(source) writes it as own_filter.py, ready to be imported anew."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(source):
        (tmp_path / "own_filter.py").write_text(source)
        os.utime(tmp_path / "own_filter.py")
        sys.modules.pop("own_filter", None)
        load_function.cache_clear()

    yield write
    sys.modules.pop("own_filter", None)
    load_function.cache_clear()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("True", None),
        ("False", "quality.custom"),
        ("'too dull'", "quality.custom (too dull)"),
        ("''", "quality.custom"),
        ("__import__('numpy').bool_(True)", None),
        ("messages == [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Yes'}]", None),
    ],
)
def test_a_function_of_ones_own_decides(module, answer, reason):
    module(f"def keep(messages):\n    return {answer}\n")
    filters = Filters(QualityConfig(custom="own_filter:keep"))
    assert filters.reason(talk("Hi", "Yes")) == reason


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return messages[9]", "own_filter:keep raised IndexError"),
        ("return None", "own_filter:keep gave null; expected true"),
        ("return 1", "own_filter:keep gave the number 1; expected true"),
    ],
)
def test_what_a_function_of_ones_own_does_wrong_is_a_rows_error(module, body, told):
    module(f"def keep(messages):\n    {body}\n")
    with pytest.raises(RowError, match=told) as caught:
        Filters(QualityConfig(custom="own_filter:keep")).reason(talk("Hi", "Yes"))
    assert caught.value.reason == "quality.custom failed"


def test_a_function_that_is_not_there_is_told_at_once(module):
    module("def keep(messages):\n    return True\n")
    with pytest.raises(ValueError, match=r"quality.custom own_filter:kep: .* no function kep \(nearest: keep\)"):
        Filters(QualityConfig(custom="own_filter:kep"))
    with pytest.raises(ValueError, match=r"quality.custom no_such_module:f: module no_such_module cannot be imported"):
        Filters(QualityConfig(custom="no_such_module:f"))


def test_the_key_names_all_that_decides(module):
    def key(**keys):
        return Filters(QualityConfig(**keys)).key

    module("def keep(messages):\n    return True\n")
    before = key(custom="own_filter:keep")
    assert key(custom="own_filter:keep") == before
    module("def keep(messages):\n    return False\n")
    keys = [before, key(custom="own_filter:keep"), key(), key(min=0.5), key(min=0.6), key(drop=("a",))]
    assert len(set(keys)) == len(keys) and key(min=0.5) == key(min=0.5)


def test_worker_processes_get_a_copy(module):
    module("def keep(messages):\n    return 'dull'\n")
    filters = Filters(QualityConfig(custom="own_filter:keep", drop=("cat",), languages=("en",)))
    copy = pickle.loads(pickle.dumps(filters))
    assert copy.key == filters.key
    assert copy.reason(talk("Hi", "cat")) == "quality.drop 'cat'"
    assert copy.reason(talk("Hi", ENGLISH)) == "quality.custom (dull)"
