"""The audit on a terminal: the funnel, what the rows are like, and what is worth attention."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.audit.findings import Finding
from jaxtune.audit.statistics import largest_kind
from jaxtune.data.stream import Stream

_NAMES = {"parsed": "parsed", "valid": "valid", "kept": "kept by filters", "fits": "within the length"}


def summary(told: Mapping[str, Any], found: Sequence[Finding], stream: Stream) -> str:
    """Lines for a terminal."""
    funnel, packing, total = told["funnel"]["total"], told["packing"], told["statistics"]
    lines = [stream.funnel.table(), ""]
    stages = [f"{funnel['rows']:,} rows read"]
    stages += [f"{funnel['stages'][stage]:,} {name}" for stage, name in _NAMES.items()]
    lines.append(" -> ".join(stages) + f" -> {funnel['examples']:,} examples")
    share = funnel["trained_tokens"] / max(1, funnel["tokens"])
    lines.append(
        f"{funnel['tokens']:,} tokens, {share:.1%} of them trained; {funnel['tokens_lost']:,} lost, "
        f"{funnel['tokens_left_out']:,} left out on purpose; stop token trained in {funnel['stops']:,} of "
        f"{funnel['turns']:,} assistant turns"
    )
    if packing["fill"] is not None:
        fills = " and ".join(f"{fill:.1%}" for fill in packing["fill"])
        lines.append(f"packing fills {fills} of the rows; {packing['steps_per_epoch']:g} updates an epoch")
    if told["mixture"] is not None and len(told["mixture"]["leaves"]) > 1 and stream.plan is not None:
        lines.append(stream.plan.table())
    lines += ["", *_rows(total), *_copies(told)]
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in told["seconds"].items())
    lines += ["", f"took: {seconds}", ""]
    lines += [f"{finding.level}: {finding.text}" for finding in found] or ["nothing to warn of"]
    return "\n".join(lines)


def _rows(total: Mapping[str, Any]) -> list[str]:
    asked, responses = total["instruction_tokens"], total["response_tokens"]
    out = []
    for name, told in (("instructions", asked), ("answers", responses)):
        if told["count"]:
            q = told["quantiles"]
            out.append(
                f"{name}: {told['mean']:.0f} tokens on average (median {q['0.5']:.0f}, 99 % under {q['0.99']:.0f}, "
                f"longest {told['max']:,})"
            )
    if total["rows_with_instruction"]:
        counts = total["kinds"]["counts"]
        kinds = sorted((kind for kind in counts if counts[kind]), key=lambda kind: -counts[kind])
        part = ", ".join(f"{kind} {counts[kind] / total['rows_with_instruction']:.0%}" for kind in kinds)
        out.append(f"kinds: {part}; diversity {total['kinds']['diversity']:.2f}, largest {largest_kind(counts)[0]}")
        out.append(f"quality {total['quality']['mean']:.2f} of 1 on average (docs/data-quality.md says how)")
    if total["languages"]:
        most = list(total["languages"].items())[:6]
        out.append("languages: " + ", ".join(f"{language} {count:,}" for language, count in most))
    of = total["responses"]
    out.append(
        f"answers: {of['very_short']:,} under 20 tokens, {of['very_long']:,} over 1,024; rows: {of['empty_rows']:,} "
        f"without an answer, {of['refusing_rows']:,} refuse, {of['copying_rows']:,} copy the instruction, "
        f"{of['reasoning_rows']:,} reason in steps"
    )
    return out


def _copies(told: Mapping[str, Any]) -> list[str]:
    exact, near = told["duplicates"]["exact"], told["duplicates"]["near"]
    text = f"duplicates: {exact['count']:,} rows say what an earlier row says"
    if near is not None:
        text += f", {near['count']:,} more say nearly the same"
    out = [text + (f", the first: {exact['rows'][0]['where']} as {exact['rows'][0]['of']}" if exact["rows"] else "")]
    if told["contamination"]:
        first = told["contamination"][0]
        out.append(
            f"benchmarks: {len(told['contamination']):,} rows share words with one and are left out, the first: "
            f"{first['where']} with {first['benchmark']}"
        )
    if told["evaluation"] is not None:
        common = told["evaluation"]["overlap"]
        out.append(
            f"evaluation: {common['rows']['count']:,} training rows stand there too, "
            f"{common['instructions']['count']:,} with the same instruction"
        )
    return out
