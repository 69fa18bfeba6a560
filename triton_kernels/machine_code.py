# SPDX-License-Identifier: Apache-2.0
"""Registers, spills and shared memory, read from compiled kernels."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Code:
    """What the machine code of a kernel contains; loads and stores are those of 16 bytes.

    atomics: on floats; counts: on integers; fences: that make writes visible to the whole GPU.
    """

    registers: int = 0
    stack: int = 0
    spills: int = 0
    loads: int = 0
    stores: int = 0
    atomics: int = 0
    counts: int = 0
    fences: int = 0
    fused: int = 0


def ask(binary: bytes, tool: str, *flags: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(TOOLS / tool), *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def disassembly(binary: bytes) -> str:
    """The machine code of a cubin."""
    return ask(binary, "nvdisasm", "-c", "-ndf")


def wide_accesses(ttgir: str, op: str, threads: int) -> int:
    """16-byte accesses per thread that the unmasked tensor accesses of a kernel take.

    Masked ones count where all are masked (kernels on rows).
    """
    pattern = rf"tt\.{op} ([^:]*?) (\{{[^}}]*\}} )?: tensor<([0-9x]+)x!tt\.ptr<\w*?(\d+)\w*>"
    operands = 1 if op == "load" else 2
    sizes = []
    for arguments, attributes, shape, bits in re.findall(pattern, ttgir):
        size = math.prod(map(int, shape.split("x"))) * int(bits) // 8
        # partial sums of other programs are read past the first cache, few and narrow; up to triton
        # 3.8 the modifier stands behind the arguments, from 3.9 on among the attributes
        if size >= threads * 4 and "= cg" not in arguments + attributes:
            sizes.append((len(arguments.split(",")) == operands, size))
    plain = [size for unmasked, size in sizes if unmasked] or [size for _, size in sizes]
    return sum(math.ceil(size / (threads * 16)) for size in plain)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"the disassembler's report has no {pattern}")
    return int(found[1])


ATOMIC = r"\b(?:REDG?|ATOM[GS]?)\b"


@cache
def _nvidia(binary: bytes) -> Code:
    usage, code = ask(binary, "cuobjdump", "--dump-resource-usage"), disassembly(binary)
    return Code(
        registers=_number(r"REG:(\d+)", usage),
        stack=_number(r"STACK:(\d+)", usage),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        loads=len(re.findall(r"\bLDG\S*\.128\b", code)),
        stores=len(re.findall(r"\bSTG\S*\.128\b", code)),
        atomics=len(re.findall(rf"{ATOMIC}\S*\.[BH]?F\d+", code)),
        counts=len(re.findall(rf"{ATOMIC}(?!\S*\.[BH]?F\d)", code)),
        fences=len(re.findall(r"\bMEMBAR\.\w+\.GPU\b", code)),
        fused=len(re.findall(r"\bFFMA2?\b", code)),
    )


def _amd(code: str) -> Code:
    return Code(
        registers=_number(r"\.vgpr_count:\s*(\d+)", code),
        stack=_number(r"\.private_segment_fixed_size:\s*(\d+)", code),
        spills=_number(r"\.vgpr_spill_count:\s*(\d+)", code)
        + _number(r"\.sgpr_spill_count:\s*(\d+)", code),
        loads=len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code)),
        stores=len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", code)),
        atomics=len(re.findall(r"\b(?:global|buffer|flat)_atomic_\w*f\d+\b", code)),
        counts=len(re.findall(r"\b(?:global|buffer|flat)_atomic_(?!\w*f\d+\b)", code)),
        fences=len(re.findall(r"\bbuffer_wbl2\b", code)),
        fused=len(re.findall(r"\bv_(?:pk_)?fma\w*_f32\b", code)),
    )


def code_of(kernel: triton.compiler.CompiledKernel) -> Code:
    """The machine code of a kernel, counted."""
    if "cubin" in kernel.asm:
        return _nvidia(kernel.asm["cubin"])
    return _amd(kernel.asm["amdgcn"])
