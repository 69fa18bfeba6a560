# SPDX-License-Identifier: Apache-2.0
"""The number tables inside README.md and docs/*.md, each between two markers:

    <!-- bench:begin NAME -->
    <!-- bench:end -->

`python -m bench report --write` fills them from bench/results, `--check` notices when they are stale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from . import (
    claims,
    few_tables,
    load_tables,
    method_tables,
    preset_tables,
    quality_tables,
    speed_tables,
    training_tables,
    tune_tables,
)
from .common import Row
from .tables import markdown

MARKED = re.compile(r"(<!-- bench:begin (\w+) -->\n).*?(<!-- bench:end -->)", re.DOTALL)


def fill(text: str, rows: Sequence[Row]) -> str:
    """`text` with every marked table made anew; a KeyError for a name that is not in `SNIPPETS`."""

    def made(found: re.Match[str]) -> str:
        body = SNIPPETS[found[2]](rows) or "No committed results yet."
        return f"{found[1]}{body}\n{found[3]}"

    return MARKED.sub(made, text)


def promises(rows: Sequence[Row]) -> str:
    """How many are met, and the others by name."""
    found = claims.all_claims(rows)
    unmet = [c for c in found if not c.met]
    text = f"{len(found) - len(unmet)} of {len(found)} promises are met by the committed results."
    if unmet:
        lines = [(c.text, c.found, c.bound) for c in unmet]
        text += " Not met:\n\n" + markdown(("promise", "measured", "bound"), lines)
    return text


SNIPPETS: dict[str, Callable[[Sequence[Row]], str]] = {
    "frontier": quality_tables.frontier_short,
    "settings": quality_tables.frontier_settings,
    "guided": quality_tables.guided,
    "ablation": quality_tables.ablation,
    "video": quality_tables.video,
    "leads": quality_tables.leads,
    "named": quality_tables.named,
    "ranks": preset_tables.ranks,
    "sizes": partial(quality_tables.named, models=quality_tables.SIZES),
    "bf16": quality_tables.bf16,
    "methods": method_tables.methods,
    "method_leads": method_tables.method_leads,
    "presets": quality_tables.budgets,
    "kernels": speed_tables.kernels,
    "overhead": speed_tables.overhead,
    "steps": speed_tables.steps,
    "graphs": speed_tables.graphs,
    "more_steps": tune_tables.more_steps,
    "more_steps_pictures": partial(tune_tables.more_steps, model="pictures"),
    "more_steps_guided": partial(tune_tables.more_steps, model="pictures", guidance="sequential"),
    "tuned": tune_tables.tuned,
    "tune_sweep": tune_tables.against_sweep,
    "plans": tune_tables.plans,
    "peers": preset_tables.peers,
    "peers_exact": partial(preset_tables.peers, column="psnr_solution"),
    "elsewhere": quality_tables.elsewhere,
    "peers_elsewhere": preset_tables.elsewhere,
    "peers_longer": preset_tables.longer,
    "peers_sizes": preset_tables.sizes,
    "smallest": preset_tables.smallest,
    "converged": preset_tables.converged,
    "few_steps": few_tables.few_steps,
    "few_preset": few_tables.preset,
    "few_tuned": few_tables.said,
    "students": training_tables.students,
    "losses": training_tables.losses,
    "pictures": partial(quality_tables.leads, model="pictures", swept=quality_tables.SWEPT[:2]),
    "load": load_tables.load,
    "load_soak": load_tables.soak,
    "promises": promises,
}
