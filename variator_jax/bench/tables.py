"""A benchmark as Markdown, which is also what the command prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from variator_jax.bench.memory import readable
from variator_jax.bench.results import BenchResult, EncoderResult, StepResult, median

_NONE = "–"
_FEW = 5  # Rounds below which quartiles are single rounds.
_ONE = 1.005  # What is printed as more than 1.
_ENCODER_WORDS = (
    "Medians over {rounds} interleaved rounds, in brackets the quartiles; rows without padding. "
    "*FLOPs allow* is the speed-up if time were proportional to FLOPs, *efficiency* the measured "
    "share of it. *Share of peak* is over the matrix peak, the median of one product of two square "
    "matrices in the same dtype and the same rounds. A peer's speed-up is over our uncompressed "
    "encoder. FLOPs are by formula: matrix products only, a multiply-add counted as 2."
)
_STEP_WORDS = (
    "*MFU* is model FLOPs utilisation: the teacher's forward pass, the student's, and the backward "
    "pass through activations to the plugin's weights (a product with frozen weights costs as much "
    "backwards as forwards, one of two activations or with plugin weights twice; nothing below "
    "the lowest compressed layer; no gradients of the backbone; what rematerialisation runs twice "
    "counts once), over the measured matrix peak. *Peak memory* is the device's highest mark where "
    "it keeps one and this step raised it, else the compiler's analysis."
)


def bench_markdown(result: BenchResult) -> str:
    """The whole `bench.md`."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    sections = [
        f"# {result.backbone} in {result.dtype}",
        f"Hardware: {result.hardware}, one device used.  \nSoftware: {versions}.",
    ]
    for one in result.encoder:
        sections += [f"## Encoder, {one.batch} x {one.length} tokens", encoder_table(one)]
        sections += [_bullets(f"{p.name} did not run: {p.reason}" for p in one.peers if p.reason)]
        sections += [_bullets(_doubts(one, result.rounds))]
    if result.encoder:
        sections.append(_ENCODER_WORDS.format(rounds=result.rounds))
    for step in result.steps:
        sections += [
            f"## Distillation step, {step.batch} x {step.length} tokens, {step.targets} targets",
            step_table(step),
            _bullets(_doubts(step, result.rounds)),
        ]
    if result.steps:
        sections.append(_STEP_WORDS)
    sections.append(_bullets(result.notes))
    return "\n\n".join(section for section in sections if section) + "\n"


def encoder_table(one: EncoderResult) -> str:
    """One row per ratio, one per peer that ran, one for the matrix peak."""
    header = (
        "encoder",
        "ms",
        "tokens/s",
        "speed-up",
        "FLOPs allow",
        "efficiency",
        "TFLOP/s",
        "share of peak",
    )
    rows: list[Sequence[str]] = []
    for row in one.ratios:
        found = one.figures(row)
        rows.append(
            (
                f"k={row.ratio}" if row.ratio > 1 else "k=1, the backbone",
                _times(found),
                f"{found['tokens_per_second']:,.0f}",
                f"{found['speedup']:.2f}",
                f"{row.allowed_speedup:.2f}",
                f"{found['efficiency']:.2f}",
                f"{found['tflops_per_second']:.3g}",
                f"{found['share_of_matrix_peak']:.0%}",
            )
        )
    for peer in one.peers:
        if peer.seconds:
            found = one.peer_figures(peer)
            speed = (f"{found['tokens_per_second']:,.0f}", f"{found['speedup']:.2f}")
            rows.append((peer.name, _times(found), *speed, *[_NONE] * 4))
    return _table(header, [*rows, _peak_row(one, len(header))])


def step_table(step: StepResult) -> str:
    """One row per ratio and one for the matrix peak."""
    header = (
        "student",
        "ms",
        "steps/s",
        "examples/s",
        "TFLOP a step",
        "TFLOP/s",
        "MFU",
        "peak memory",
    )
    rows = []
    for row in step.rows:
        found = step.figures(row)
        rows.append(
            (
                f"k={row.ratio}, {step.microbatches} microbatch(es), remat {step.remat}",
                _times(found),
                f"{found['steps_per_second']:.3g}",
                f"{found['examples_per_second']:.3g}",
                f"{row.flops / 1e12:.3g}",
                f"{found['tflops_per_second']:.3g}",
                f"{found['model_flops_utilisation']:.0%}",
                f"{readable(row.peak_bytes)} ({row.peak_source})",
            )
        )
    return _table(header, [*rows, _peak_row(step, len(header))])


def _doubts(one: EncoderResult | StepResult, rounds: int) -> Iterator[str]:
    """What a reader of a table should know before trusting its figures."""
    if rounds < _FEW:
        yield f"Only {rounds} round(s): medians and quartiles say little below {_FEW} (--rounds)."
    if isinstance(one, EncoderResult):
        found = [one.figures(row) for row in one.ratios]
        share, name = "share_of_matrix_peak", "A share of peak"
        if any(figures["efficiency"] > _ONE for figures in found):
            yield (
                "An efficiency above 1: the backbone was slower than its FLOPs say, or there is "
                "noise. More rows or --rounds tell which."
            )
    else:
        found, share, name = list(map(one.figures, one.rows)), "model_flops_utilisation", "An MFU"
    if any(figures[share] > _ONE for figures in found):
        yield (
            f"{name} above 100%: the product of {one.peak.size} x {one.peak.size} is not the "
            "fastest that this device can do, or there is noise."
        )


def _peak_row(one: EncoderResult | StepResult, columns: int) -> Sequence[str]:
    """The matrix product: its time, and its TFLOP/s in their column."""
    rate = columns - 3 if isinstance(one, StepResult) else columns - 2
    cells = [_NONE] * columns
    cells[0] = f"matrix peak, {one.peak.size} x {one.peak.size}"
    cells[1] = f"{1e3 * median(one.peak.seconds):.2f}"
    cells[rate] = f"{one.peak.flops_per_second / 1e12:.3g}"
    return cells


def _times(found: dict[str, float]) -> str:
    low, high = found["first_quartile_milliseconds"], found["third_quartile_milliseconds"]
    return f"{found['milliseconds']:.2f} ({low:.2f} to {high:.2f})"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["-", *("-:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
