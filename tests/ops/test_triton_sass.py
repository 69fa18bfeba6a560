# SPDX-License-Identifier: Apache-2.0
"""The machine code for sm_90, read instruction by instruction: what a GPU would wait for, and when.

The ahead-of-time gate counts; this file looks at order. Nothing is run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import pytest
import torch

pytest.importorskip("triton")

# An H100 or H200: threads and registers of a multiprocessor, and how many there are.
THREADS, REGISTERS, MULTIPROCESSORS = 2048, 65536, 132
# Little's law: 4.8 TB/s for some 0.7 us over 132 multiprocessors are 25 KB on the way to each.
IN_FLIGHT = 25_000
REDUCTIONS = ("_residual_l1_kernel", "_residual_magnitude_kernel", "_guided_sums_kernel")
COUNTING = (*REDUCTIONS, "_modulated_l1_kernel")


@dataclass(frozen=True)
class Instruction:
    name: str
    operands: tuple[str, ...]

    @property
    def is_wide_load(self) -> bool:
        return self.name.startswith("LDG") and ".128" in self.name and "STRONG" not in self.name

    def reads(self) -> set[int]:
        """General registers; the first operand is written unless this is a store or a compare."""
        stores = self.name.startswith(("ST", "RED", "ATOM"))
        keeps = stores or not re.match(r"R\d", self.operands[0] if self.operands else "")
        sources = self.operands if keeps else self.operands[1:]
        return {int(r) for text in sources for r in re.findall(r"\bR(\d+)", text)}


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    threads: int
    programs: int
    code: tuple[Instruction, ...]
    loops: tuple[tuple[Instruction, ...], ...]

    @property
    def resident(self) -> int:
        """Programs on one multiprocessor at a time."""
        rounded = -(-self.registers // 8) * 8
        return min(THREADS // self.threads, REGISTERS // (rounded * self.threads))

    @property
    def main(self) -> tuple[Instruction, ...]:
        """The innermost loop over the tensors, or all code."""
        found = [loop for loop in self.loops if any(i.is_wide_load for i in loop)]
        return found[0] if found else self.code


def parse(text: str) -> tuple[list[Instruction], list[tuple[int, int]]]:
    """Instructions, and the first and last of every innermost loop."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.search(
            r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)\s*(.*?)\s*;", line
        ):
            code.append(Instruction(found[1], tuple(re.split(r",\s*", found[2]))))
            target = re.search(r"`\(\.(L_x_\d+)\)", found[2])
            if found[1].startswith("BRA") and target and target[1] in labels:
                loops.append((labels[target[1]], len(code) - 1))
    inner = [a for a in loops if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in loops)]
    return code, [loop for loop in inner if loop[0] < loop[1]]


@cache
def kernel(case: str, dtype: torch.dtype) -> Kernel:
    from fastcache.triton_kernels import aot, machine_code
    from fastcache.triton_kernels.launcher import Launcher

    plans = []
    launch = Launcher.launch
    with aot.compile_only(90) as compiled, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Launcher, "launch", lambda self, plan, *a: (plans.append(plan), launch(self, plan, *a))
        )
        aot.cases(dtype)[case]()
    ((name, found),) = compiled
    code, loops = parse(machine_code.disassembly(found.asm["cubin"]))
    return Kernel(
        name,
        aot.code_of(found).registers,
        found.metadata.num_warps * 32,
        plans[0].programs,
        tuple(code),
        tuple(tuple(code[first : last + 1]) for first, last in loops),
    )


def loads_before_a_use(code: tuple[Instruction, ...]) -> int:
    """Wide loads that are on their way when the first value that one brought is waited for."""
    awaited: set[int] = set()
    count = 0
    for instruction in code:
        if instruction.reads() & awaited:
            break
        if instruction.is_wide_load:
            first = int(re.match(r"R(\d+)", instruction.operands[0])[1])
            awaited |= set(range(first, first + 4))
            count += 1
    return count


CASES = [
    "l1",
    "l1 + store",
    "l1 + store ragged",
    "l1 token range",
    "magnitude + store",
    "modulated + store",
    "modulated + store wide",
    "store",
    "store ragged",
    "apply token range",
    "combine 3",
    "combine 3 device",
    "combine 5",
    "combine 8",
    "guidance",
    "taylor 2",
    "taylor 4",
    "quantize",
    "quantized combine 3",
    "guided sums 1",
    "guided sums 2",
]
SUMS = [case for case in CASES if case.startswith(("l1", "magnitude", "guided"))]
COUNTED = [*SUMS, *(case for case in CASES if case.startswith("modulated"))]
DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_enough_bytes_are_on_their_way_before_the_first_is_needed(
    case: str, dtype: torch.dtype
) -> None:
    found = kernel(case, dtype)
    loads = loads_before_a_use(found.main)
    assert 16 * loads * found.threads * found.resident >= IN_FLIGHT, (loads, found.resident)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SUMS)
def test_programs_meet_only_behind_the_main_loop(case: str, dtype: torch.dtype) -> None:
    found = kernel(case, dtype)
    assert found.name in REDUCTIONS and found.main is not found.code
    slow = ("BAR", "SHFL", "LDS", "STS", "LDL", "STL", "ATOM", "RED", "MEMBAR")
    assert not [i for i in found.main if i.name.startswith(slow)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", COUNTED)
def test_partial_sums_are_visible_before_they_are_counted(case: str, dtype: torch.dtype) -> None:
    """Stored, then a barrier, a fence, the count; behind it no load may come from the first cache."""
    code = kernel(case, dtype).code
    at = [i for i, instruction in enumerate(code) if instruction.name.startswith("ATOMG")]
    fences = [i for i, instruction in enumerate(code) if instruction.name.startswith("MEMBAR")]
    assert len(at) == len(fences) == 1 and fences[0] < at[0]
    before = [i.name.split(".")[0] for i in code[: fences[0]]]
    stored = len(before) - 1 - before[::-1].index("STG")
    assert "BAR" in before[stored:]
    loads = [i.name for i in code[at[0] :] if i.name.startswith("LD") and "LDS" not in i.name]
    loads = [name for name in loads if not name.startswith("LDC")]
    assert loads and all(".STRONG.GPU" in name for name in loads)
    assert [i.name for i in code[at[0] :] if i.name.startswith("STG")]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in SUMS if "ragged" not in case])
def test_the_programs_of_a_reduction_run_at_once(case: str, dtype: torch.dtype) -> None:
    found = kernel(case, dtype)
    assert found.programs <= found.resident * MULTIPROCESSORS


def test_the_reader_of_machine_code_sees_what_it_should() -> None:
    text = """
        .L_x_1:
        /*0000*/  LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/  @!P0 LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0020*/  FADD R1, R20, R21 ;
        /*0030*/  FADD R1, R1, R6 ;
        /*0040*/  LDG.E.128 R12, desc[UR4][R2.64+0x20] ;
        /*0050*/  BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/  @P0 BRA `(.L_x_1) ;
        /*0070*/  STG.E desc[UR4][R2.64], R1 ;
        .L_x_2:
        /*0080*/  BRA `(.L_x_2);
    """
    code, loops = parse(text)
    assert [i.name.split(".")[0] for i in code[5:8]] == ["BAR", "BRA", "STG"]
    assert loops == [(0, 6)]
    assert loads_before_a_use(tuple(code)) == 2
    assert code[7].reads() == {1, 2} and code[3].reads() == {1, 6}
