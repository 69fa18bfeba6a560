# SPDX-License-Identifier: Apache-2.0
"""Distil a picture model into a student of eight steps without guidance; resumable, and deterministic as training is.

    python -m bench.pictures.distill --data emoji-datasource-google-16.0.0.tgz --size 2M --teacher FILE --steps 2000

First the teacher's guided runs are made and kept in --out, then the student learns from them. Every few minutes the
state, the loss curve and a sheet of samples are written; the same command goes on from there. With --export the
average is written as fp16 weights, with its card, into bench/assets. --json keeps its losses for the report.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fastcache.demo.train import check_fall

from .. import common
from .data import load_pictures
from .model import ASSETS, HEADS, architecture, file_of, load_model, student_file
from .record import export, keep_row, origin
from .student import CHUNK, Recipe, Runs, Student, distances, teach
from .train import STATE_FILE, parser, run
from .words import PROMPTS

HELD_OUT_SEED = 1_000_000  # of the noise of runs that are not trained on
COMPARED = 28  # steps of the teacher's run that a student is compared with

Row = common.Row


def main(argv: list[str] | None = None) -> int:
    p = parser("distill", __doc__, "build/students")
    p.add_argument("--teacher", type=Path, help="its weights; the committed ones of that size")
    p.add_argument("--runs", type=int, default=Recipe.runs, help="of the teacher for each prompt")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    out, recipe = (
        args.out / args.size,
        Recipe(seed=args.seed, autocast=not args.fp32, runs=args.runs),
    )
    file = args.teacher or ASSETS / file_of(args.size)
    teacher = load_model(args.size, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    train, held_out = (split.prompts for split in load_pictures(args.data))
    folder = out / f"runs-{digest[:8]}-{recipe.levels}x{recipe.each}-{recipe.seed}"
    lessons = watched(teacher, train, recipe, folder / "train", recipe.seed)
    others = watched(teacher, held_out, recipe, folder / "held-out", HELD_OUT_SEED)
    fields = architecture(HEADS[args.size])
    student = Student(fields, recipe, copy.deepcopy(teacher), lessons, args.device)
    if (out / STATE_FILE).exists():
        student.resume(out / STATE_FILE)
    run(student, others, out, args.steps, args.minutes, args.save_minutes)
    if args.export:
        average = copy.deepcopy(student.average).eval().cpu()
        found = origin(student) | {
            "format": "fastcache-pictures-student",
            "teacher_sha256": digest,
            "held_out_loss": student.held_out_loss(others),
            "psnr_to_teacher": {
                name: distances(teacher, average, prompts, recipe, COMPARED)
                for name, prompts in (
                    ("held-out prompts", held_out),
                    ("benchmark's prompts", PROMPTS),
                )
            },
        }
        card = export(student, found, args.export / student_file(args.size, recipe.levels))
        if args.json:
            keep_row(args.json, "distilling", args.size, card)
    return check_fall(student.history)


def watched(
    teacher: nn.Module, prompts: Sequence[str], recipe: Recipe, folder: Path, seed: int
) -> Runs:
    """All runs of the teacher, made with a progress bar."""
    chunks = []
    with common.bar(
        -(-recipe.runs * len(prompts) // CHUNK), f"teacher's runs, {folder.name}"
    ) as bar:
        for chunk in teach(teacher, prompts, recipe, folder, seed):
            chunks.append(chunk)
            bar.update()
    return Runs(torch.cat(chunks), tuple(prompts))


if __name__ == "__main__":
    raise SystemExit(main())
