# SPDX-License-Identifier: Apache-2.0
"""The ahead-of-time gate passes, and faults seeded into a copy of the kernels are refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton")


def gate(*flags: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m fastcache.triton_kernels.aot`, on the kernels under `path` if given."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if path:
        env["PYTHONPATH"] = str(path)
    command = [sys.executable, "-m", "fastcache.triton_kernels.aot", *flags]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=path, check=False)


def interpreted(case: str, path: Path) -> str:
    """The failure of one case of `test_triton_interpreter.py` on the kernels under `path`."""
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(Path(__file__).with_name("test_triton_interpreter.py")),
    ]
    child = subprocess.run(
        command, input=case, capture_output=True, text=True, env=env, cwd=path, check=True
    )
    return json.loads(child.stdout)


@dataclass(frozen=True)
class Fault:
    """A text replacement in one kernel file, the gate that must refuse it, and what it says."""

    file: str
    good: str
    bad: str
    says: str
    case: str
    interpreter: bool = False


FAULTS = {
    "the tail of a combination is written unmasked": Fault(
        "linear_combine.py",
        "i_s, o_n, o_n < n, ON_DEVICE",
        "i_s, o_n, None, ON_DEVICE",
        "a write outside a view",
        "combine fp32-3-False-dense",
        interpreter=True,
    ),
    "the tail of a sum is read unmasked": Fault(
        "residual_l1.py",
        "o_n, o_n < n, BLOCK",
        "o_n, None, BLOCK",
        "not close",
        "l1 fp32-dense-2x380-False",
        interpreter=True,
    ),
    "full blocks are masked, so no access is wide": Fault(
        "linear_combine.py",
        "i_s, o_n, None, ON_DEVICE",
        "i_s, o_n, o_n < n, ON_DEVICE",
        "16-byte loads",
        "combine 3 ragged",
    ),
    "a pointer loses its alignment": Fault(
        "linear_combine.py",
        'do_not_specialize=["blocks"]',
        'do_not_specialize=["blocks", "p_out"]',
        "16-byte stores",
        "apply",
    ),
    "blocks are too small for wide accesses": Fault(
        "linear_combine.py",
        "((6, 4096), (16, 2048), (None, 1024))",
        "((6, 1024), (16, 512), (None, 256))",
        "16-byte loads",
        "apply",
    ),
    "partial sums are added by an atomic": Fault(
        "residual_l1.py",
        "tl.store(p_part, ",
        "tl.atomic_add(p_part, ",
        "1 atomics",
        "l1 token",
    ),
    "a program counts itself before its partial sums are visible": Fault(
        "reduction.py", 'sem="acq_rel"', 'sem="relaxed"', "a count without a fence", "l1 token"
    ),
    "no program counts itself": Fault(
        "reduction.py",
        'tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu") == count - 1',
        "tl.load(p_counter) == count - 1",
        "0 atomic counts",
        "l1 token",
    ),
    "the counter is not reset": Fault(
        "reduction.py",
        "tl.store(p_counter, 0)",
        "tl.store(p_counter, 1)",
        "not close",
        "programs_stride_over_many_blocks",
        interpreter=True,
    ),
    "an earlier program adds up": Fault(
        "reduction.py",
        "== count - 1:",
        "== count // 2:",
        "not close",
        "programs_stride_over_many_blocks",
        interpreter=True,
    ),
    "a tile does not fit the registers": Fault(
        "guided.py", "TILE = 2048", "TILE = 32768", "spills", "guided sums 2"
    ),
    "all samples have the weights of the first": Fault(
        "linear_combine.py",
        "weights += i_s * s_weights",
        "weights += 0 * s_weights",
        "Tensor-likes are not equal",
        "combine_each_sample fp32-3-3x47x100-dense",
        interpreter=True,
    ),
    "products and sums are fused": Fault(
        "linear_combine.py",
        "enable_fp_fusion=False",
        "enable_fp_fusion=True",
        "fused multiply-adds",
        "combine 3 device",
    ),
}


@pytest.mark.parametrize("flags", [("--quick",), ("--only", "quantize")], ids=" ".join)
def test_every_kernel_compiles_within_its_limits(flags: tuple[str, ...]) -> None:
    result = gate(*flags)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 refused" in result.stdout


@pytest.mark.parametrize("name", FAULTS)
def test_a_gate_refuses_a_seeded_fault(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    package = tmp_path / "fastcache"
    shutil.copytree(ROOT / "triton_kernels", package / "triton_kernels")
    (package / "ops").mkdir()
    for name in ("reference.py", "solve.py"):
        shutil.copy(ROOT / "fastcache" / "ops" / name, package / "ops")
    (package / "ops" / "__init__.py").touch()
    (package / "__init__.py").touch()
    source = package / "triton_kernels" / fault.file
    text = source.read_text()
    assert fault.good in text, f"{fault.file} no longer contains {fault.good!r}"
    source.write_text(text.replace(fault.good, fault.bad))
    if fault.interpreter:
        assert fault.says in interpreted(fault.case, tmp_path)
    else:
        flags = ("--quick", "--workers", "1", "--dtypes", "bf16", "--only", fault.case)
        result = gate(*flags, path=tmp_path)
        assert result.returncode == 1, result.stdout + result.stderr
        assert fault.says in result.stdout


def test_a_compiler_error_is_a_refusal(tmp_path: Path) -> None:
    package = tmp_path / "fastcache"
    shutil.copytree(ROOT / "triton_kernels", package / "triton_kernels")
    (package / "__init__.py").touch()
    source = package / "triton_kernels" / "taylor.py"
    source.write_text(source.read_text().replace("tl.div_rn(", "tl.no_such_function("))
    result = gate("--quick", "--workers", "1", "--only", "taylor 2", path=tmp_path)
    assert result.returncode == 1
    assert "no_such_function" in result.stdout


def test_every_report_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that reads single numbers is compiled for several cases: a spill in any is a fault."""
    from fastcache.triton_kernels import aot

    def inspect(case: str, arch: int, dtype: str) -> list[aot.Report]:
        spills = int((case, dtype) == ("guided solve 2", "fp32"))
        return [aot.Report(case, aot.SCALAR[0], arch, dtype, aot.Code(spills=spills))]

    monkeypatch.setattr(aot, "inspect", inspect)
    found = aot.check((90,), ("bf16", "fp32"), "guided solve", workers=1)
    assert [r.case for r in found if r.faults()] == ["guided solve 2"]
    assert len(found) == 6


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


SHAPES = {
    "one element": lambda: meta(1),
    "one row of one element": lambda: meta(1, 1),
    "rows of one element": lambda: meta(5, 1),
    "a batch stride of one": lambda: meta(3, 1, 1).as_strided((3, 1, 1), (1, 1, 1)),
    "one token of several": lambda: meta(3, 4, 1)[:, 2:3],
    "more elements than int32 counts": lambda: meta(2**31 + 5),
    "more elements in rows": lambda: meta(2**20 + 3, 4096),
    "a batch stride beyond int32": lambda: meta(2, 2**20, 4096)[:, 5:],
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_class_of_shapes_compiles(name: str) -> None:
    """Triton makes a constant of an argument equal to one, and int64 of one beyond int32."""
    from fastcache.triton_kernels import aot

    from fastcache import triton_kernels as kernels

    t = SHAPES[name]()
    q = torch.empty_like(t, dtype=torch.float8_e4m3fn)
    if not t.is_contiguous():
        q = q.as_strided(t.shape, t.stride())
    scale = meta(*t.shape[:-1], dtype=torch.float32)
    with aot.compile_only(90) as compiled:
        kernels.residual_l1(t, t, t, t)
        kernels.residual_l1(t, t, t, t, per_sample=True)
        kernels.residual_store(t, t, t)
        kernels.linear_combine(t, [t] * 3, meta(3, dtype=torch.float32))
        kernels.combine_samples(t, [t] * 3, meta(t.shape[0], 3, dtype=torch.float32))
        kernels.taylor_update([t] * 3, t, 0.5, 3)
        if t.dim() > 1:
            kernels.residual_magnitude(t, t, t, t)
            states = t if t.dim() == 3 else t[None]
            kernels.modulated_l1(states, states, states[:1, :1], states, states)
            kernels.guided_sums(t, [t] * 3)
            kernels.quantize_store(q, scale, t, None)
            kernels.quantized_combine(t, None, [q], [scale], [1.0])
    assert len(compiled) == (11 if t.dim() > 1 else 6)


def test_only_the_misaligned_tensor_is_accessed_narrowly() -> None:
    from fastcache.triton_kernels import aot
    from fastcache.triton_kernels.machine_code import code_of

    from fastcache import triton_kernels as kernels

    def at(offset: int) -> torch.Tensor:
        return meta(4608 * 3072 + 8)[offset : offset + 4608 * 3072]

    def wide(out: int, *terms: int) -> tuple[int, int]:
        with aot.compile_only(90) as compiled:
            kernels.linear_combine(at(out), [at(o) for o in terms], [0.5] * len(terms))
        code = code_of(compiled[0][1])
        return code.loads, code.stores

    loads, stores = wide(0, 0, 8, 8)
    assert wide(1, 0, 0, 0) == (loads, 0)
    assert wide(0, 0, 1, 0) == (loads * 2 // 3, stores)


# How Triton prints that a load passes the first cache: up to 3.8, and from 3.9 on.
PAST_THE_FIRST_CACHE = {
    "3.8": "cacheModifier = cg :",
    "3.9": "{cachePolicy = #tt.cache_policy<cache_modifier = cg, eviction_policy = evict_normal>} :",
}


@pytest.mark.parametrize("version", PAST_THE_FIRST_CACHE)
def test_partial_sums_of_others_need_no_wide_access(version: str) -> None:
    from fastcache.triton_kernels.machine_code import wide_accesses

    partial = (
        f"%s = tt.load %p, %m, %c {PAST_THE_FIRST_CACHE[version]} tensor<2x512x!tt.ptr<f32>, #b>"
    )
    assert wide_accesses(partial, "load", 256) == 0
    masked = "%x = tt.load %p, %m : tensor<4096x!tt.ptr<bf16>, #b> loc(#loc1)"
    assert wide_accesses(f"{partial} loc(#loc0)\n{masked}", "load", 256) == 2
    whole = "%x = tt.load %p {tt.note = 1 : i32} : tensor<4096x!tt.ptr<f32>, #b>"
    assert wide_accesses(f"{partial} loc(#loc0)\n{masked}\n{whole}", "load", 256) == 4
