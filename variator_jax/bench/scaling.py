"""How the distillation step scales over devices that are not there: FLOPs, bytes, collectives.

    python -m variator_jax.bench.scaling --output runs/scaling
    python -m variator_jax.bench.scaling --output runs/scaling --counted runs/scaling/scaling.json

The step is compiled for as many pretended devices, at two depths, and what each layer adds is added
for the other layers: all layers of a stack are equal, so FLOPs and collective bytes grow by equal
parts. Times are predicted from these figures and stated speeds; nothing here is timed. The second
form predicts from figures that were counted before, without compiling anything.
"""

import argparse
import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from variator_jax.backbones.t5 import get_config
from variator_jax.bench.budget import budget
from variator_jax.bench.output import doubling_axis, figure, log, markdown_table
from variator_jax.errors import ConfigError
from variator_jax.files import make_output, write_json
from variator_jax.plugin import PluginConfig
from variator_jax.train import optimizers

DEVICES = (1, 2, 4, 8, 16, 64, 256)
SIZES = ("t5_1_1_xl", "t5_1_1_xxl")
RATIO, ROWS, INPUTS, TARGETS = 4, 32, 512, 48  # rows of each device: the batch grows with them
_DEPTHS, _STACKS = (2, 4), ("num_encoder_layers", "num_decoder_layers")


@dataclasses.dataclass(frozen=True)
class Machine:
    """Speeds of one kind of device.

    Attributes:
      name: for the table.
      peak: bfloat16 FLOP/s, as its maker states them.
      link: bytes a second that a device sends on in a ring.
      far_link: the same in a ring of more than `near` devices.
      near: devices that the fast links join.
      memory: bytes of a device.
    """

    name: str
    peak: float
    link: float
    far_link: float
    near: int
    memory: float


MACHINES = (
    # A link of either TPU sends 50 GB/s each way (v4 has six, v5e four). A ring along one axis of
    # the torus, run in both directions, uses two of them.
    Machine("TPU v4", 275e12, 100e9, 100e9, 4096, 32e9),
    Machine("TPU v5e", 197e12, 100e9, 100e9, 256, 16e9),
    # Within a node NVLink, as stated. Between nodes NCCL runs a ring for each of a node's 8 network
    # cards of 50 GB/s: 400 GB/s at best. Measured over 32 nodes of 8 H100 were 200 for all-gather
    # and 340 for all-reduce (github.com/NVIDIA/nccl/issues/1218); the lower one is taken for both.
    Machine("H200 nodes of 8", 989e12, 450e9, 200e9, 8, 141e9),
)
UTILISATION = 0.5  # of the peak, that the products are taken to reach
# Of a device's memory, that weights and all else that is kept there may fill: the activations of XL
# need as much again (docs/scaling.md), those of XXL half as much.
FILLED = 0.5


@dataclasses.dataclass(frozen=True)
class Row:
    """One mesh: what each device holds, computes and communicates in a step."""

    backbone: str
    devices: int
    mesh: tuple[int, int, int]
    arguments: int
    flops: float
    collectives: Mapping[str, int]  # bytes of the results, by kind

    def seconds(self, machine: Machine) -> tuple[float, float]:
        """Predicted seconds of computing and of communicating, as if neither hid the other."""
        link = machine.link if self.devices <= machine.near else machine.far_link
        share = (self.devices - 1) / self.devices
        # A ring sends a reduced array round twice, a gathered one once. The result of a
        # reduce-scatter is only one device's part of what goes round.
        rounds = {"all-reduce": 2, "reduce-scatter": self.devices}
        sent = sum(size * share * rounds.get(kind, 1) for kind, size in self.collectives.items())
        return self.flops / (machine.peak * UTILISATION), sent / link

    def efficiency(self, machine: Machine) -> float:
        """Share of the time that is computing."""
        computing, communicating = self.seconds(machine)
        return computing / (computing + communicating)


def measure(backbone: str, devices: int, mesh: tuple[int, int, int]) -> Row:
    """Compiles the step of a backbone on a mesh of pretended devices."""
    counts, whole = [], get_config(backbone)
    if whole.num_encoder_layers != whole.num_decoder_layers:
        raise ConfigError(f"{backbone} is not counted: its two stacks are not of one depth.")
    for depth in _DEPTHS:
        one = budget(
            backbone=get_config(backbone, dtype="bfloat16", **dict.fromkeys(_STACKS, depth)),
            plugin=PluginConfig(RATIO),
            optimizer=optimizers.optimizer(schedule_name="constant"),
            feature_lengths={"inputs": INPUTS, "targets": TARGETS},
            batch_size=ROWS * devices,
            mesh_shape=mesh,
            backbone_dtype="bfloat16",
            remat=True,
            devices=jax.devices()[:devices],
        )
        moved = {kind: collective.bytes for kind, collective in one.collectives.items()}
        counts.append(Counter({"arguments": one.arguments, "flops": one.flops} | moved))
    shallow, deep = counts
    steps = (whole.num_encoder_layers - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0])
    total = {k: round(shallow[k] + (deep[k] - shallow[k]) * steps) for k in shallow | deep}
    return Row(backbone, devices, mesh, total.pop("arguments"), total.pop("flops"), total)


def meshes(devices: int) -> list[tuple[int, int, int]]:
    """The meshes that are compared: copies, and weights cut into as many parts."""
    return list(dict.fromkeys([(devices, 1, 1), (1, devices, 1)]))


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line a mesh."""
    head = ["backbone", "devices", "data x fsdp x model", "weights etc. GiB", "TFLOP"]
    head += ["communicated", *(f"{machine.name}: s, efficiency" for machine in MACHINES)]
    lines = []
    for row in rows:
        moved = ", ".join(f"{k} {v / 2**20:,.0f} MiB" for k, v in row.collectives.items())
        sizes = (f"{row.arguments / 2**30:.2f}", f"{row.flops / 1e12:.1f}", moved or "nothing")
        cells = [row.backbone, str(row.devices), " x ".join(map(str, row.mesh)), *sizes]
        for machine in MACHINES:
            crowded = "" if row.arguments < FILLED * machine.memory else " (too large)"
            seconds = sum(row.seconds(machine))
            cells.append(f"{seconds:.2f}, {row.efficiency(machine):.0%}{crowded}")
        lines.append(cells)
    return markdown_table(head, lines) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Predicted efficiency by number of devices, one panel a backbone."""
    names = list(dict.fromkeys(row.backbone for row in rows))
    with figure(path, len(names), (5 * len(names), 3.6), sharey=True) as (_, panels):
        for axes, name in zip(panels, names, strict=True):
            for column, (style, kind) in enumerate((("-", "data"), ("--", "fsdp"))):
                chosen = [r for r in rows if r.backbone == name and r.mesh[column] == r.devices]
                counts = [r.devices for r in chosen]
                for index, machine in enumerate(MACHINES):
                    values = [r.efficiency(machine) for r in chosen]
                    options = {"label": f"{machine.name}, {kind}", "color": f"C{index}"}
                    axes.plot(counts, values, style, marker="o", markersize=3, **options)
            label = f"devices, {ROWS} rows of {INPUTS} tokens each"
            doubling_axis(axes, sorted({row.devices for row in rows}), label)
            axes.set_title(name)
        panels[0].set_ylabel("predicted share of time computing")
        panels[0].set_ylim(0, 1.02)
        panels[0].legend(fontsize=7, loc="lower left")


def read_rows(path: Path, sizes: Sequence[str], devices: Sequence[int]) -> list[Row]:
    """The rows of these backbones and numbers of devices in a scaling.json.

    Raises:
      ConfigError: if the file is absent or of another kind, or has none of them.
    """
    try:
        content = json.loads(path.read_text(encoding="utf8"))
        rows = [Row(**{**row, "mesh": tuple(row["mesh"])}) for row in content]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is not a scaling.json: {error}") from error
    if chosen := [row for row in rows if row.backbone in sizes and row.devices in devices]:
        return chosen
    raise ConfigError(f"{path} has no row of {sizes} on {devices} devices.")


def count_rows(sizes: Sequence[str], devices: Sequence[int]) -> list[Row]:
    """Compiles every step, printing each row as it is counted."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(devices))
    rows = []
    for name, count in itertools.product(sizes, devices):
        for mesh in meshes(count):
            rows.append(measure(name, count, mesh))
            log(table(rows).splitlines()[-1])
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Writes scaling.json, scaling.md and scaling.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", required=True, help="a folder")
    add("--counted", type=Path, help="an earlier scaling.json to predict from")
    add("--sizes", default=",".join(SIZES), help="backbones (%(default)s)")
    add("--devices", default=",".join(map(str, DEVICES)), help="(%(default)s)")
    args = parser.parse_args(argv)
    chosen = args.sizes.split(","), [int(n) for n in args.devices.split(",")]
    try:
        output = make_output("--output", args.output)
        rows = read_rows(args.counted, *chosen) if args.counted else count_rows(*chosen)
    except ConfigError as error:
        parser.error(str(error))
    write_json(output / "scaling.json", [dataclasses.asdict(row) for row in rows])
    (output / "scaling.md").write_text(table(rows), encoding="utf8")
    plot(rows, output / "scaling.png")
    print(table(rows))


if __name__ == "__main__":
    main()
