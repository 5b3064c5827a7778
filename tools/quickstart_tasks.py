"""The quickstart's tasks: small skills that a model of a million parameters can learn in minutes, worded many ways.

Every record is `{"task", "phrasing", "messages"}`. A phrasing is an opening and a request; openings and requests meet
in every combination, and some combinations are kept for evaluation only, so that a held-out phrasing is made of words
that were seen. Answers are computed, so whoever reads a record can check it.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_WORDS = """
red blue green gold cat dog fox owl bee ant cow hen oak elm fig pea
rice milk salt tea sun moon star rain sea lake hill rock road boat bell drum
"""
_NAMES = "Ada Ben Cleo Dan Eve Finn Gus Hana Ivan Jill Kim Leo Mia Noah Olga Paul"
WORDS, NAMES = _WORDS.split(), _NAMES.split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
OPENINGS = ("", "Please help:", "Quick task.", "Here is a job.", "Try this.", "Your turn:", "Next one.", "Let us see.")
HELD_OUT_EVERY = 7  # one (opening, request) pair in so many is never trained on


class Task(NamedTuple):
    """A skill: its name, its requests (with `{x}` where the material stands), and what draws material and answer."""

    name: str
    requests: tuple[str, ...]
    draw: Callable[[random.Random], tuple[str, str]]


def _some(rng: random.Random, items: Any, low: int, high: int) -> list[str]:
    return rng.sample(list(items), rng.randint(low, high))


def _on_list(answer: Callable[[list[str]], str], low: int = 2, high: int = 3) -> Callable:
    def draw(rng: random.Random) -> tuple[str, str]:
        words = _some(rng, WORDS, low, high)
        return " ".join(words), answer(words)

    return draw


def _digits(rng: random.Random) -> tuple[str, str]:
    digits = _some(rng, "0123456789", 3, 4)
    return " ".join(digits), " ".join(sorted(digits))


def _letters_sorted(rng: random.Random) -> tuple[str, str]:
    letters = _some(rng, LETTERS, 3, 4)
    return " ".join(letters), " ".join(sorted(letters))


def _add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return f"{a} + {b}", str(a + b)


def _subtract(rng: random.Random) -> tuple[str, str]:
    a, b = sorted((rng.randint(0, 9), rng.randint(0, 9)), reverse=True)
    return f"{a} - {b}", str(a - b)


def _larger(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(range(10), 2)
    return f"{a} {b}", str(max(a, b))


def _lookup(rng: random.Random) -> tuple[str, str]:
    drawn = rng.sample(WORDS, 4)
    keys, values = drawn[:2], drawn[2:]
    asked = rng.randrange(2)
    return f"{keys[0]} {values[0]} ; {keys[1]} {values[1]} ; {keys[asked]} ?", values[asked]


def _upper(rng: random.Random) -> tuple[str, str]:
    letters = _some(rng, LETTERS, 2, 3)
    return " ".join(letters), " ".join(letters).upper()


def _next_letter(rng: random.Random) -> tuple[str, str]:
    at = rng.randrange(25)
    return LETTERS[at], LETTERS[at + 1]


def _previous_letter(rng: random.Random) -> tuple[str, str]:
    at = rng.randrange(1, 26)
    return LETTERS[at], LETTERS[at - 1]


TASKS: tuple[Task, ...] = (
    Task(
        "copy",
        ("Repeat: {x}", "Say this again: {x}", "Copy these words: {x}", "Write the same: {x}"),
        _on_list(" ".join),
    ),
    Task(
        "reverse",
        ("Reverse: {x}", "Turn the order around: {x}", "Say it backwards: {x}", "Last to first: {x}"),
        _on_list(lambda w: " ".join(reversed(w)), 2, 3),
    ),
    Task(
        "first",
        ("First word of: {x}", "Which word comes first? {x}", "Name the opening word: {x}", "Give only the first: {x}"),
        _on_list(lambda w: w[0]),
    ),
    Task(
        "last",
        ("Last word of: {x}", "Which word comes last? {x}", "Name the closing word: {x}", "Give only the last: {x}"),
        _on_list(lambda w: w[-1]),
    ),
    Task(
        "count",
        ("How many words? {x}", "Count the words: {x}", "Number of words in: {x}", "Tell the length: {x}"),
        _on_list(lambda w: str(len(w)), 1, 5),
    ),
    Task(
        "commas",
        ("Put commas between: {x}", "Join with commas: {x}", "Make a comma list: {x}", "Separate by commas: {x}"),
        _on_list(lambda w: ", ".join(w)),
    ),
    Task(
        "bullets",
        ("Make bullets: {x}", "Write as a list: {x}", "One dash each: {x}", "Bullet these: {x}"),
        _on_list(lambda w: "\n".join(f"- {word}" for word in w), 2, 3),
    ),
    Task(
        "brackets",
        ("Put in brackets: {x}", "Wrap each word: {x}", "Bracket them: {x}", "Add brackets to: {x}"),
        _on_list(lambda w: " ".join(f"[ {word} ]" for word in w), 2, 3),
    ),
    Task("upper", ("Upper case: {x}", "Make capitals of: {x}", "Write big letters: {x}", "Capitalize: {x}"), _upper),
    Task(
        "next_letter",
        ("Which letter follows {x}", "Next letter after {x}", "In the alphabet, after {x}", "What comes after {x}"),
        _next_letter,
    ),
    Task(
        "sort_digits",
        ("Sort the digits: {x}", "Small to large: {x}", "Order these numbers: {x}", "Sort from low to high: {x}"),
        _digits,
    ),
    Task(
        "sort_letters",
        ("Sort the letters: {x}", "In alphabetical order: {x}", "Order these letters: {x}", "Arrange a to z: {x}"),
        _letters_sorted,
    ),
    Task("add", ("Add: {x}", "What is {x}", "Compute the sum {x}", "Work out {x}"), _add),
    Task(
        "subtract", ("Take away: {x}", "Find the difference {x}", "Subtract: {x}", "How much is left? {x}"), _subtract
    ),
    Task(
        "larger",
        ("Which is larger? {x}", "Pick the bigger number: {x}", "The greater one: {x}", "Maximum of: {x}"),
        _larger,
    ),
    Task("lookup", ("Look up: {x}", "Use the table: {x}", "Fill in: {x}", "Find the value: {x}"), _lookup),
    Task(
        "previous_letter",
        ("Which letter precedes {x}", "The letter before {x}", "In the alphabet, before {x}", "What comes before {x}"),
        _previous_letter,
    ),
)


def phrasings(task: Task, *, held_out: bool) -> list[str]:
    """Returns the wordings of a task: those that are trained on, or those that are only evaluated."""
    pairs = [(opening, request) for opening in OPENINGS for request in task.requests]
    return [
        f"{opening} {request}".strip()
        for number, (opening, request) in enumerate(pairs)
        if (number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held_out
    ]


def single_turn(task: Task, rng: random.Random, *, held_out_phrasing: bool) -> dict[str, Any]:
    """Returns one question and answer."""
    wording = rng.choice(phrasings(task, held_out=held_out_phrasing))
    material, answer = task.draw(rng)
    messages = [{"role": "user", "content": wording.replace("{x}", material)}, {"role": "assistant", "content": answer}]
    return {"task": task.name, "phrasing": wording, "messages": messages}


SYSTEMS: dict[str, Callable[[str], str]] = {
    "Answer as you like.": lambda answer: answer,
    "End every answer with a stop sign.": lambda answer: f"{answer} !",
    "Begin every answer with ok.": lambda answer: f"ok {answer}",
}


def with_system(rng: random.Random, *, held_out_phrasing: bool) -> dict[str, Any]:
    """Returns a question under a system prompt that shapes the answer."""
    record = single_turn(
        _by_name(rng.choice(("first", "last", "copy", "upper"))), rng, held_out_phrasing=held_out_phrasing
    )
    prompt = rng.choice(list(SYSTEMS))
    user, assistant = record["messages"]
    answer = {"role": "assistant", "content": SYSTEMS[prompt](assistant["content"])}
    return {**record, "task": "system", "messages": [{"role": "system", "content": prompt}, user, answer]}


INTRODUCTIONS = ("My name is {name}.", "I am {name}.", "Call me {name}.", "This is {name}.")
NAME_QUESTIONS = ("What is my name?", "Who am I?", "Do you know my name?", "Say my name.")


def multi_turn(rng: random.Random, *, held_out_phrasing: bool) -> dict[str, Any]:
    """Returns a conversation whose last answer needs its first turn."""
    name = rng.choice(NAMES)
    pairs = [(i, q) for i in range(len(INTRODUCTIONS)) for q in range(len(NAME_QUESTIONS))]
    kept = [pair for number, pair in enumerate(pairs) if (number % HELD_OUT_EVERY == 3) == held_out_phrasing]
    opening, question = rng.choice(kept)
    middle = single_turn(_by_name(rng.choice(("add", "first", "larger"))), rng, held_out_phrasing=held_out_phrasing)
    messages = [
        {"role": "user", "content": INTRODUCTIONS[opening].format(name=name)},
        {"role": "assistant", "content": f"Hello {name}"},
        *middle["messages"],
        {"role": "user", "content": NAME_QUESTIONS[question]},
        {"role": "assistant", "content": name},
    ]
    return {
        "task": "remember",
        "phrasing": f"{INTRODUCTIONS[opening]} / {NAME_QUESTIONS[question]}",
        "messages": messages,
    }


def _by_name(name: str) -> Task:
    return next(task for task in TASKS if task.name == name)


# Copying the value beside a repeated key is the hardest of the skills, so it comes round more often.
TURNS = {"lookup": 4}
TASK_NAMES = (*(task.name for task in TASKS), "system", "remember")


def records(count: int, *, seed: int, held_out_phrasing: bool = False) -> Iterator[dict[str, Any]]:
    """Yields `count` records, the tasks in turn: every single-turn task, then a system prompt, then a conversation."""
    rng = random.Random(seed)
    turns = [task for task in TASKS for _ in range(TURNS.get(task.name, 1))]
    for number in range(count):
        place = number % (len(turns) + 2)
        if place < len(turns):
            yield single_turn(turns[place], rng, held_out_phrasing=held_out_phrasing)
        elif place == len(turns):
            yield with_system(rng, held_out_phrasing=held_out_phrasing)
        else:
            yield multi_turn(rng, held_out_phrasing=held_out_phrasing)
