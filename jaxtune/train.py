"""`python -m jaxtune.train [CONFIG.yaml] [key=value ...]`: instruction-tune a model; `output=` gets all it writes.

    python -m jaxtune.train model.path=MODEL data.train.0.path=DATA.jsonl output=runs/mine
    python -m jaxtune.train configs/quickstart.yaml output=runs/other train.steps=100

MODEL is a Hugging Face folder or hub id; DATA rows of alpaca, messages, sharegpt, prompt/completion or text form.
Every key, its default and its meaning: `--keys`. The configuration is checked before anything heavy is imported.
"""

import sys
from collections.abc import Sequence
from typing import Any

from jaxtune.config import Config, unusual_values
from jaxtune.decode import ConfigError, decode, describe_keys


def train(config: Config) -> Any:
    """Runs the whole training that a configuration describes; the command line does the same.

    Returns:
        A `training.Result`: last step, losses, and the folders written.

    Raises:
        ValueError: for anything that the user can put right, with what was found and what to do.
    """
    from jaxtune.compat import prepare_environment

    prepare_environment()
    from jaxtune.training import run  # only now: a mistake in the configuration should not wait for jax

    return run(config)


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code: 0 finished, 1 error, 2 usage, 143 preempted and saved."""
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return 0 if words else 2
    if "--keys" in words:
        print(describe_keys())
        return 0
    try:
        config = decode(words)
    except ConfigError as error:
        print(f"configuration:\n{error}", file=sys.stderr)
        return 2
    for sentence in unusual_values(config):
        print(f"warning: {sentence}")
    try:
        return train(config).exit_code
    except (ValueError, OSError) as error:  # OSError: a disk that fills up, a file taken away
        print(f"error: {error}", file=sys.stderr)
        _end(error)
        return 1
    except Exception as error:
        _end(error)
        raise


def _end(error: Exception) -> None:
    from jaxtune.faults import leave_if_several

    leave_if_several(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
