"""What makes an answer right, and counts of right answers that are divided once, at the end."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def exact_match(answer: str, reference: str) -> float:
    """1 where the two are equal but for white space around them."""
    return float(answer.strip() == reference.strip())


METRICS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match}


@dataclass(frozen=True)
class Score:
    """A sum of a metric over cases."""

    total: float = 0.0
    count: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(self.total + other.total, self.count + other.count)

    def as_dict(self, metric: str) -> dict[str, Any]:
        """The mean under the metric's name, and what it was made of."""
        return {metric: self.total / self.count if self.count else None, "total": self.total, "count": self.count}
