"""Exact and near duplicates among generated rows: rows/s, peak memory, and how many of the planted ones are found.

    python tools/bench/deduplicate.py --folder EMPTY_FOLDER [--rows 100000] [--workers 2]

Rows are an instruction with an answer, 20 to 80 words of a vocabulary of 30,000 whose frequencies fall as Zipf's law
says; three in ten open with one of 200 templates of 12 words. One row in twenty is an earlier one in other case and
white space, one in twenty an earlier one with one word in twenty changed; of these, those whose Jaccard similarity with
their origin is 0.8 or more count as planted. Rows lie in a file and are read from it while they are compared; making
them is not timed.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Sequence

import numpy as np

from jaxtune.data.quality.duplicates import exact_key, first_of_equal
from jaxtune.data.quality.near import near_duplicates
from jaxtune.data.quality.similarity import jaccard, shingles
from jaxtune.data.wording.content import normal

BLOCK = 10_000
KEPT, EXACT, NEAR = 0, 1, 2


class Rows:
    """Texts in a file, by number."""

    def __init__(self, path: str, ends: np.ndarray) -> None:
        self._file, self._ends = open(path, "rb"), ends  # noqa: SIM115 (open while the program runs)

    def texts(self, rows: Sequence[int]) -> list[str]:
        if isinstance(rows, range) and rows:  # neighbours: one read
            start, ends = self._ends[rows[0]], self._ends[rows[0] : rows[-1] + 2] - self._ends[rows[0]]
            block = os.pread(self._file.fileno(), int(ends[-1]), int(start))
            return [block[a:b].decode() for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
        return [self.text(row) for row in rows]

    def text(self, row: int) -> str:
        start, end = self._ends[row : row + 2].tolist()
        return os.pread(self._file.fileno(), end - start, start).decode()


def generate(path: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Writes rows; returns where they end, int64 [count + 1], and (kind, origin) of each, int64 [count, 2]."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    lengths = rng.integers(3, 11, 30_000)
    words = ["".join(rng.choice(letters, n)) for n in lengths]
    rank = np.arange(1, len(words) + 1) ** -1.0
    cumulative = np.cumsum(rank / rank.sum())

    def drawn(n: int) -> list[str]:
        return [words[i] for i in np.minimum(np.searchsorted(cumulative, rng.random(n)), len(words) - 1).tolist()]

    templates = [" ".join(drawn(12)) for _ in range(200)]
    ends, kinds = np.zeros(count + 1, np.int64), np.zeros((count, 2), np.int64)
    with open(path, "w+b") as file:
        for start in range(0, count, BLOCK):
            size = min(BLOCK, count - start)
            sizes = rng.integers(20, 81, size)
            said, at = drawn(int(sizes.sum())), np.concatenate([[0], np.cumsum(sizes)]).tolist()
            kind = rng.choice([KEPT, EXACT, NEAR], size, p=[0.9, 0.05, 0.05]) if start else np.zeros(size, np.int64)
            templated, origins = rng.random(size) < 0.3, rng.integers(0, max(1, start), size)
            file.flush()
            for i in range(size):
                if kind[i] == KEPT:
                    text = " ".join(said[at[i] : at[i + 1]])
                    text = f"{templates[at[i] % 200]} {text}" if templated[i] else text
                else:
                    a, b = ends[origins[i] : origins[i] + 2].tolist()
                    text = os.pread(file.fileno(), b - a, a).decode()
                    text = f"  {text.upper()} \n" if kind[i] == EXACT else _edited(text, rng, words)
                encoded = text.encode()
                file.write(encoded)
                ends[start + i + 1] = ends[start + i] + len(encoded)
            kinds[start : start + size] = np.stack([kind, origins], axis=1)
    return ends, kinds


def _edited(text: str, rng: np.random.Generator, words: list[str]) -> str:
    parts = text.split()
    for place in rng.integers(0, len(parts), max(1, len(parts) // 20)).tolist():
        parts[place] = words[int(rng.integers(len(words)))]
    return " ".join(parts)


def recall(rows: Rows, kinds: np.ndarray, exact: np.ndarray, near: np.ndarray) -> dict[str, float]:
    """The share of planted rows that were found; of near ones 20,000 are looked at."""
    copies = np.flatnonzero(kinds[:, 0] == EXACT)
    edits = np.random.default_rng(1).permutation(np.flatnonzero(kinds[:, 0] == NEAR))[:20_000]
    alike = [int(i) for i in edits if jaccard(*(shingles(normal(rows.text(int(k)))) for k in (i, kinds[i, 1]))) >= 0.8]
    return {
        "planted exact, found": float((exact[copies] >= 0).mean()),
        "planted near, looked at": len(alike),
        "planted near, found": float((near[alike] >= 0).mean()),
        "rows that are neither, left out": int((near[kinds[:, 0] == KEPT] >= 0).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="for the rows and the files of the comparison")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    path = os.path.join(args.folder, "rows")
    ends, kinds = generate(path, args.rows)
    rows = Rows(path, ends)
    made = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    keys = np.empty(args.rows, np.uint64)
    for start in range(0, args.rows, BLOCK):
        block = range(start, min(start + BLOCK, args.rows))
        keys[block.start : block.stop] = [exact_key([text]) for text in rows.texts(block)]
    exact = first_of_equal(keys)
    between = time.perf_counter()
    near = near_duplicates(rows.texts, args.rows, folder=args.folder, workers=args.workers)
    ended = time.perf_counter()
    own, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    told = {
        "rows": args.rows,
        "mean characters": round(float(ends[-1]) / args.rows),
        "exact, s": round(between - began, 1),
        "near, s": round(ended - between, 1),
        "rows/s, both": round(args.rows / (ended - began)),
        "peak GiB of this process": round(own / 2**20, 2),
        "peak GiB with its workers": round((own + args.workers * child * (args.workers > 1)) / 2**20, 2),
        "GiB before the comparison": round(made / 2**20, 2),
        **recall(rows, kinds, exact, near),
    }
    os.remove(path)
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
