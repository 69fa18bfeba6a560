# SPDX-License-Identifier: Apache-2.0
"""The demo's table."""

from __future__ import annotations

from .rows import Row, Settings


def print_table(rows: list[Row], settings: Settings) -> None:
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(
        title=f"{settings.batch} images, {settings.steps} Euler steps, same noise",
        caption="computed: steps in which all blocks ran; TaylorSeer, PAB and FasterCache skip "
        "attention inside blocks. PSNR (mean over images), rel. L2: against uncached. "
        "vs fewer: dB above the uncached model at fewer steps and equal compute.",
    )
    table.add_column("method", no_wrap=True)
    table.add_column("skipped", no_wrap=True)
    for name in (
        "computed",
        "blocks",
        "seconds",
        "speed-up",
        "PSNR dB",
        "rel. L2",
        "judge",
        "vs fewer",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    family = rows[0].family
    for row in rows:
        if row.family != family:
            table.add_section()
            family = row.family
        table.add_row(*_cells(row))
    console = Console()
    # the table is as wide as it needs to be: a narrow terminal wraps its lines, and nothing is cut off
    wanted = Measurement.get(console, console.options.update(width=10_000), table).maximum
    console.width = max(console.width, wanted)
    console.print(table)


def _cells(row: Row) -> list[str]:
    gain = "" if row.gain is None else f"[{'green' if row.gain > 0 else 'red'}]{row.gain:+.1f}"
    return [
        row.name,
        row.predictor,
        f"{row.computed_steps}/{row.steps}",
        f"{row.compute:.0%}",
        f"{row.seconds:.2f}",
        f"{row.speedup:.2f}x",
        "-" if row.psnr is None else f"{row.psnr:.1f}",
        f"{row.relative_l2:.4f}",
        f"{row.accuracy:.1%}",
        gain,
    ]
