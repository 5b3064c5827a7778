"""What commands share: flags of those that ask a model, how findings and errors are told; imports nothing heavy."""

import argparse
import os
import sys
from typing import NamedTuple


class Sampling(NamedTuple):
    """How tokens are chosen: temperature 0 takes the likeliest; `top_p` 1 leaves all tokens in."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError for values that mean nothing, naming the flag."""
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens: found {self.max_new_tokens}; expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature: found {self.temperature:g}; expected 0 (greedy) or more, e.g. 0.7")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p: found {self.top_p:g}; expected more than 0 and at most 1 (all tokens)")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed: found {self.seed}; expected 0 to 2**32 - 1")

    @property
    def draw(self) -> str:
        """The key of `decoding.CHOICES`."""
        if self.temperature == 0:
            return "likeliest"
        return "drawn" if self.top_p == 1 else "nucleus"


class Finding(NamedTuple):
    """One question and its answer, of commands that look things over; `level` is ok, warning or error."""

    level: str
    text: str


def bare_parser(program: str, doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser that shows a module's docstring as its help."""
    return argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def make_parser(program: str, doc: str) -> argparse.ArgumentParser:
    """Returns a parser that shows a module's docstring as its help, and takes the model to ask."""
    parser = bare_parser(program, doc)
    parser.add_argument("model", metavar="RUN", help="output= folder of a run, Hugging Face folder, hub id or adapter")
    parser.add_argument("--template", default="auto", metavar="NAME", help="default: the folder's own chat template")
    parser.add_argument("--base", metavar="PATH", help="the base of an adapter, if not where the adapter says")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="default: %(default)s")
    return parser


def add_sampling(parser: argparse.ArgumentParser, *, max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Adds the flags of `Sampling` with a command's own defaults."""
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=temperature, metavar="T", help="0 is greedy; default: %(default)s")
    add("--top-p", type=float, default=top_p, metavar="P", help="share of probability drawn from; default: %(default)s")
    add("--seed", type=int, default=0, metavar="S", help="of the draws; default: %(default)s")


def read_sampling(flags: argparse.Namespace) -> Sampling:
    """Returns the checked flags of `add_sampling`."""
    sampling = Sampling(flags.max_new_tokens, flags.temperature, flags.top_p, flags.seed)
    sampling.check()
    return sampling


def check_writable(path: str | None, flag: str) -> None:
    """Raises ValueError when a file cannot be written: better before the work than after it."""
    real = None if path is None else os.path.realpath(path)
    if real is None or (os.path.exists(real) and not os.path.isfile(real) and not os.path.isdir(real)):
        return  # a device or a pipe is not tried
    try:
        os.makedirs(os.path.dirname(real), exist_ok=True)
        is_new = not os.path.exists(real)
        with open(real, "a", encoding="utf-8"):
            pass
        if is_new:
            os.remove(real)  # an empty file would look like an answer
    except OSError as error:
        raise ValueError(f"{flag}: {path} cannot be written ({error.strerror}); expected a file") from None


def fail(error: Exception, code: int) -> int:
    """Prints an error as the commands do, and returns the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return code
