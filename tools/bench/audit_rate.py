"""Rows per second of an audit's pass: funnel, tokens, statistics and exact duplicates; the rest apart.

    python tools/bench/audit_rate.py --model FOLDER [--rows 100000] [--workers 2]

FOLDER has config.json and a tokenizer; weights are not needed. Rows are generated: a question of 12 words, an answer
of 30 to 60, one in fifty a copy of an earlier one. Printed are the seconds of each part, the share of copies found, and
the most memory that this process or one of its workers held.
"""

import argparse
import json
import os
import pathlib
import random
import resource
import tempfile
import time

WORDS = [
    f"{a}{b}{c}" for a in ("ba", "co", "de", "fi", "lu") for b in ("ran", "mel", "sto", "vi") for c in ("", "d", "ser")
]


def write_rows(path: pathlib.Path, count: int) -> int:
    """Writes rows; returns how many are copies."""
    draw, copies, kept = random.Random(0), 0, []
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            if i % 50 == 49:
                row, copies = kept[draw.randrange(len(kept))], copies + 1
            else:
                answer = " ".join(draw.choices(WORDS, k=draw.randrange(30, 60)))
                row = {"instruction": f"Explain {' '.join(draw.choices(WORDS, k=10))} {i}", "output": f"{answer}."}
            if len(kept) < 1000:
                kept.append(row)
            file.write(json.dumps(row) + "\n")
    return copies


def main() -> None:
    """Times an audit of generated rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--skip", action="append", default=[], choices=("near", "languages"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAXTUNE_CACHE"] = f"{folder}/cache"
        from jaxtune.audit.document import document
        from jaxtune.audit.looking import warm_up
        from jaxtune.audit.survey import survey
        from jaxtune.decode import decode
        from jaxtune.inputs import open_reading
        from jaxtune.metrics import Terminal

        rows = pathlib.Path(folder, "rows.jsonl")
        copies = write_rows(rows, options.rows)
        words = [
            f"model.path={options.model}",
            f"data.train.0.path={rows}",
            "data.template=alpaca",
            f"output={folder}/out",
        ]
        warm_up(options.workers)
        reading, config = open_reading(decode(words), needs_weights=False)
        began = time.perf_counter()
        surveyed = survey(config, reading, Terminal(), workers=options.workers, skip=options.skip)
        surveyed_in = time.perf_counter() - began
        told, _ = document(surveyed)
        whole = time.perf_counter() - began
    seconds = dict(surveyed.seconds)
    near = seconds.get("near duplicates", 0.0)
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**20
    print(json.dumps({key: round(value, 2) for key, value in seconds.items()}))
    print(f"reading every row: {options.rows / seconds['training rows']:,.0f} rows/s with {options.workers} workers")
    rate = options.rows / (whole - near)
    print(f"all but near duplicates: {rate:,.0f} rows/s; survey {surveyed_in:.1f} of {whole:.1f} s")
    print(f"exact duplicates found: {told['duplicates']['exact']['count']:,} of {copies:,}; most memory {most:.2f} GiB")


if __name__ == "__main__":
    main()
