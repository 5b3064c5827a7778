"""An evaluation from paths to report, told in the order things happen."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtune.answering import open_answerer
from jaxtune.evaluate.cases import read_cases
from jaxtune.evaluate.generated import evaluate, table

__all__ = ["run", "table"]


def run(
    model: str,
    paths: Sequence[str],
    *,
    by: str | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    max_new_tokens: int | None = None,
    batch: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> dict[str, Any]:
    """Opens the data, then the model, asks it everything, and returns `generated.evaluate`'s report.

    Args:
        model: what `opening.open_model` opens, with its `options`.
        paths: data files; see `cases.read_cases` for `by`, `limit` and `columns`.
        say: told what is read and how far it has come, line by line.

    Raises:
        ValueError: for anything that the user can put right.
    """
    files = []
    for path in dict.fromkeys(paths):
        files.append(read_cases(path, by=by, limit=limit, columns=columns))
        say(f"{path}: {len(files[-1].cases):,} questions, {files[-1].layout}")
    answerer = open_answerer(model, batch=batch, say=say, **options)
    return evaluate(
        answerer,
        files,
        max_new_tokens=max_new_tokens,
        progress=lambda done, total: say(f"answered {done:,} of {total:,}") if done < total else None,
    )
