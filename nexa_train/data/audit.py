"""What became of the rows, counted; and what of it a person should know. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nexa_train.config.spec import JobSpec
from nexa_train.data.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class SplitAudit:
    """What became of the rows of one split.

    Attributes:
        rows: read; dropped: cut so short that nothing was left to learn, or pairs of which one side would be
            cut; truncated: cut, but kept.
        samples, tokens: kept; targets: of those tokens, predicted; sequences: what a step counts (packed or
            paired: several samples).
        whole: samples of which every token but the first is learnt.
        without_end: samples whose end token is not learnt.
        doubled_start: samples that begin with two start tokens.
    """

    rows: int = 0
    dropped: int = 0
    truncated: int = 0
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    sequences: int = 0
    whole: int = 0
    without_end: int = 0
    doubled_start: int = 0


def report(audits: Mapping[str, SplitAudit], spec: JobSpec) -> list[str]:
    """One line a split; what did not happen is not in it."""
    lines = []
    for split, audit in audits.items():
        if not audit.rows:
            continue
        share = 100 * audit.targets / max(audit.tokens, 1)
        parts = [f"{audit.rows} rows", f"{audit.sequences} sequences", f"{audit.tokens} tokens, {share:.1f} % learnt"]
        if spec.data.packing:
            parts[2] += f", {100 * audit.tokens / max(audit.sequences * spec.model.max_seq_len, 1):.1f} % full"
        parts += [f"{audit.truncated} cut at {spec.model.max_seq_len} tokens"] if audit.truncated else []
        parts += [f"{audit.dropped} dropped as too long"] if audit.dropped else []
        if spec.data.format == "text" and train_on(spec) != "all":
            parts.append(f"method.train_on {train_on(spec)} not applied, for text has no turns")
        lines.append(f"{split} data: {', '.join(parts)}")
    if spec.training.eval_every_steps and not audits["validation"].rows:
        lines.append("validation data: none, so that training.eval_every_steps evaluates nothing")
    return lines


def warnings(audits: Mapping[str, SplitAudit], spec: JobSpec, tokenizer: ChatTokenizer) -> Iterator[str]:
    """What is likely to be a mistake, though it can be trained on; one line each."""
    for split, audit in audits.items():
        if audit.without_end == audit.samples > 0:
            yield (
                f"{split} data: the end token {tokenizer.eos} is learnt in none of {audit.samples} samples, so the "
                "model may not learn to stop; check the chat template's end of turn and model.max_seq_len"
            )
        if audit.doubled_start:
            yield (
                f"{split} data: {audit.doubled_start} of {audit.samples} samples begin with two start tokens "
                f"{tokenizer.bos}; take it out of the rows or of the chat template"
            )
        if audit.whole == audit.samples > 0 and train_on(spec) != "all" and spec.data.format != "text":
            yield f"{split} data: every token of every sample is learnt although method.train_on is {train_on(spec)}"
    if unknown := tokenizer.unknown_tokens if uses_template(spec, tokenizer) else []:
        yield (
            f"the chat template writes {', '.join(unknown)}, which the tokenizer does not know and cuts in pieces; "
            "do both belong to this model?"
        )


def train_on(spec: JobSpec) -> str:
    """What of a conversation is to be learnt."""
    return str(getattr(spec.method, "train_on", "all"))


def uses_template(spec: JobSpec, tokenizer: ChatTokenizer) -> bool:
    """Whether rows of this format go through the chat template."""
    return tokenizer.template is not None and spec.data.format in ("messages", "question_answer", "preference")
