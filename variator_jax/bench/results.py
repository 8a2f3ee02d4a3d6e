"""What a benchmark measured: samples and formulas as fields, every figure computed from them.

The JSON holds the figures too, for readers without this library; reading it back computes them
anew, so the two cannot disagree. Times are seconds, sizes bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from variator_jax.errors import DataError

SCHEMA = 1
Seconds = Sequence[float]


@dataclasses.dataclass(frozen=True)
class MatrixPeak:
    """The product of two square matrices of `size`, timed in the same rounds as all else."""

    size: int
    seconds: Seconds

    @property
    def flops_per_second(self) -> float:
        """At the median."""
        return 2.0 * self.size**3 / median(self.seconds)


@dataclasses.dataclass(frozen=True)
class RatioRow:
    """One encoder pass at one compression ratio; `flops` and `allowed_speedup` are by formula."""

    ratio: int
    flops: int
    allowed_speedup: float
    seconds: Seconds


@dataclasses.dataclass(frozen=True)
class PeerRow:
    """The same pass by another library, or the reason why it could not run."""

    name: str
    seconds: Seconds = ()
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class EncoderResult:
    """One shape of input at every ratio, ratio 1 first."""

    batch: int
    length: int
    peak: MatrixPeak
    ratios: Sequence[RatioRow]
    peers: Sequence[PeerRow] = ()

    @property
    def backbone(self) -> RatioRow:
        """Ratio 1."""
        return next(row for row in self.ratios if row.ratio == 1)

    def speedup(self, row: RatioRow | PeerRow) -> float:
        """Median of the backbone over the median of this row."""
        return median(self.backbone.seconds) / median(row.seconds)

    def speedup_quartiles(self, row: RatioRow) -> tuple[float, float]:
        """Quartiles of the speed-up within each round."""
        return quartiles(np.divide(self.backbone.seconds, row.seconds))

    def efficiency(self, row: RatioRow) -> float:
        """The share of the speed-up that the saved FLOPs allow."""
        return self.speedup(row) / row.allowed_speedup

    def figures(self, row: RatioRow) -> dict[str, float]:
        """All figures of a row by name."""
        rate = row.flops / median(row.seconds)
        low, high = self.speedup_quartiles(row)
        return {
            **times(row.seconds),
            "tokens_per_second": self.batch * self.length / median(row.seconds),
            "speedup": self.speedup(row),
            "speedup_first_quartile": low,
            "speedup_third_quartile": high,
            "efficiency": self.efficiency(row),
            "tflops_per_second": rate / 1e12,
            "share_of_matrix_peak": rate / self.peak.flops_per_second,
        }

    def peer_figures(self, row: PeerRow) -> dict[str, float]:
        """The same for a peer that ran; `speedup` is over our uncompressed backbone."""
        if not row.seconds:
            return {}
        tokens = self.batch * self.length / median(row.seconds)
        return {
            **times(row.seconds),
            "tokens_per_second": tokens,
            "speedup": self.speedup(row),
        }


@dataclasses.dataclass(frozen=True)
class StepRow:
    """One distillation step at one compression ratio.

    Attributes:
      ratio: of the student.
      teacher_flops: the teacher's forward pass, by formula.
      student_flops: the student's forward pass.
      backward_flops: through the student's activations and to the plugin's weights only.
      seconds: of each step.
      compiled_bytes: arguments, results and temporary arrays of the compiled step.
      peak_bytes: the most memory in use, see `peak_source`.
      peak_source: 'device' where the device told its highest mark and this step had raised it,
        else 'compiled', the compiler's analysis.
      loss: of the last step; to see that it was finite.
    """

    ratio: int
    teacher_flops: int
    student_flops: int
    backward_flops: int
    seconds: Seconds
    compiled_bytes: int
    peak_bytes: int
    peak_source: str
    loss: float

    @property
    def flops(self) -> int:
        """Model FLOPs of a step; what rematerialisation runs twice counts once."""
        return self.teacher_flops + self.student_flops + self.backward_flops


@dataclasses.dataclass(frozen=True)
class StepResult:
    """The distillation steps at one shape of input."""

    batch: int
    length: int
    targets: int
    microbatches: int
    remat: bool | str
    peak: MatrixPeak
    rows: Sequence[StepRow]

    def figures(self, row: StepRow) -> dict[str, float]:
        """All figures of a row by name."""
        rate = row.flops / median(row.seconds)
        return {
            **times(row.seconds),
            "steps_per_second": 1.0 / median(row.seconds),
            "examples_per_second": self.batch / median(row.seconds),
            "tflops_per_second": rate / 1e12,
            "model_flops_utilisation": rate / self.peak.flops_per_second,
        }


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """A whole benchmark: the machine, the software and all that was measured."""

    backbone: str
    dtype: str
    rounds: int
    hardware: str
    versions: Mapping[str, str]
    encoder: Sequence[EncoderResult]
    steps: Sequence[StepResult] = ()
    notes: Sequence[str] = ()


def median(seconds: Seconds) -> float:
    """The median as a plain number."""
    return float(np.median(seconds))


def quartiles(values: Any) -> tuple[float, float]:
    """The first and the third."""
    low, high = np.percentile(values, [25, 75])
    return float(low), float(high)


def times(seconds: Seconds) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    low, high = quartiles(seconds)
    return {
        "milliseconds": 1e3 * median(seconds),
        "first_quartile_milliseconds": 1e3 * low,
        "third_quartile_milliseconds": 1e3 * high,
    }


def to_json(result: BenchResult) -> dict[str, Any]:
    """Plain values; each measured row carries its figures."""
    content = {"schema": SCHEMA, **dataclasses.asdict(result)}
    for one, plain in zip(result.encoder, content["encoder"], strict=True):
        plain["peak"]["tflops_per_second"] = one.peak.flops_per_second / 1e12
        for row, out in zip(one.ratios, plain["ratios"], strict=True):
            out["figures"] = one.figures(row)
        for peer, out in zip(one.peers, plain["peers"], strict=True):
            out["figures"] = one.peer_figures(peer)
    for step, plain in zip(result.steps, content["steps"], strict=True):
        plain["peak"]["tflops_per_second"] = step.peak.flops_per_second / 1e12
        for step_row, out in zip(step.rows, plain["rows"], strict=True):
            out["figures"] = step.figures(step_row)
    return content


def from_json(content: Mapping[str, Any]) -> BenchResult:
    """The inverse of `to_json`.

    Raises:
      DataError: for another schema.
    """
    if content.get("schema") != SCHEMA:
        raise DataError(
            f"This benchmark has schema {content.get('schema')!r}; this version reads {SCHEMA}."
        )
    encoder = [
        EncoderResult(
            **{
                **one,
                "peak": _read(MatrixPeak, one["peak"]),
                "ratios": tuple(_read(RatioRow, row) for row in one["ratios"]),
                "peers": tuple(_read(PeerRow, row) for row in one["peers"]),
            }
        )
        for one in content["encoder"]
    ]
    steps = [
        StepResult(
            **{
                **one,
                "peak": _read(MatrixPeak, one["peak"]),
                "rows": tuple(_read(StepRow, row) for row in one["rows"]),
            }
        )
        for one in content["steps"]
    ]
    parts = {"encoder": tuple(encoder), "steps": tuple(steps), "notes": tuple(content["notes"])}
    return BenchResult(**{k: v for k, v in content.items() if k != "schema"} | parts)


def _read(kind: Any, content: Mapping[str, Any]) -> Any:
    """A row without the figures, which are computed."""
    names = {field.name for field in dataclasses.fields(kind)}
    kept = {name: value for name, value in content.items() if name in names}
    return kind(**{**kept, "seconds": tuple(kept["seconds"])})
