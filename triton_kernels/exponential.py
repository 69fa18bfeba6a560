# SPDX-License-Identifier: Apache-2.0
"""Weights of a forecast by exponentials from the sums of `guided.py`, in one launch of one program.

`fastcache/ops/solve.py` says what is computed; all of it is float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launcher import Launcher, Plan
from .solve import load_sums


@triton.jit
def _turned(angle):
    """(cosine, sine): a quarter of what is left of whole turns, by its series, doubled twice.

    CUDA's own functions of float64 keep a stack for the largest angles.
    """
    quarter = (angle - tl.floor(angle / 6.283185307179586 + 0.5) * 6.283185307179586) / 4
    square = quarter * quarter
    cosine, sine = tl.full((), 1.0, tl.float64), tl.full((), 1.0, tl.float64)
    for i in tl.static_range(8, 0, -1):
        cosine = 1 - square * cosine / ((2 * i - 1) * (2 * i))
        sine = 1 - square * sine / ((2 * i) * (2 * i + 1))
    sine *= quarter
    for _ in tl.static_range(2):
        cosine, sine = cosine * cosine - sine * sine, 2 * cosine * sine
    return cosine, sine


@triton.jit
def _angle(x, y):
    """Of x + i y, y >= 0, not 0: between 0 and pi."""
    large = tl.maximum(tl.abs(x), y)
    ratio = tl.minimum(tl.abs(x), y) / large
    # within 0.004, and then by the sine of what is missing, whose error is the third power of it
    found = ratio * (1.0583981633974483 - 0.273 * ratio)
    found = tl.where(y > tl.abs(x), 1.5707963267948966 - found, found)
    found = tl.where(x < 0, 3.141592653589793 - found, found)
    size = tl.sqrt(x * x + y * y)
    for _ in range(2):
        cosine, sine = _turned(found)
        found += (y * cosine - x * sine) / size
    return found


@triton.jit
def _gained(x, y, q):
    """(z^q - 1) / (z - 1) of z = x + i y, y >= 0: (real, imaginary) part; q at 1, and 1 - 0^q at 0."""
    one = (x - 1) * (x - 1) + y * y < 1e-12
    nought = x * x + y * y < 1e-24
    x = tl.where(one, 1 + 1e-6, tl.where(nought, 1e-12, x))
    y = tl.where(one | nought, 0.0, y)
    size = tl.exp(q * tl.log(x * x + y * y) / 2)
    cosine, sine = _turned(q * _angle(x, y))
    real, imaginary, left = size * cosine - 1, size * sine, x - 1
    square = left * left + y * y
    return (real * left + imaginary * y) / square, (imaginary * left - real * y) / square


@triton.jit
def _exponential_kernel(p_weights, p_sums, p_reach, ridge):
    none = tl.full((), 0.0, tl.float64)
    m_22, m_23, m_33, v_2, v_3 = none, none, none, none, none
    for i in tl.static_range(len(p_sums)):
        s_22, s_23, _, s_33, _, _, s_2, s_3, _, _ = load_sums(p_sums[i], 2)
        m_22 += s_22
        m_23 += s_23
        m_33 += s_33
        v_2 += s_2
        v_3 += s_3
    q = tl.load(p_reach).to(tl.float64)
    half = (m_22 + m_33) / 2
    diff = (m_33 - m_22) / 2
    pull = ridge * half
    spread = tl.sqrt(diff * diff + m_23 * m_23)
    a = m_33 + pull
    b = m_22 + pull
    det = a * b - m_23 * m_23
    c_1 = (b * v_3 - m_23 * v_2) / det
    c_2 = (a * v_2 - m_23 * v_3) / det
    # g(C) = alpha + beta C, by the roots of z^2 - c_2 z - c_1, real or a conjugate pair; double ones are pulled apart
    middle = c_2 / 2
    square = middle * middle + c_1
    root = tl.sqrt(tl.abs(square))
    turns = (square < 0) & (root >= 1e-5)
    root = tl.where(root < 1e-5, 1e-5, root)
    first = middle + tl.where(turns, 0.0, root)
    g_1, across = _gained(first, tl.where(turns, root, 0.0), q)
    g_2, _ = _gained(middle - root, none, q)
    beta = tl.where(turns, across / root, (g_1 - g_2) / (2 * root))
    alpha = g_1 - beta * first
    # one direction (e_3, e_2): half the angle of (diff, m_23)
    large = tl.sqrt((spread + tl.abs(diff)) / (2 * spread))
    small = m_23 / (2 * spread * large)
    e_3 = tl.where(diff < 0, small, large)
    e_2 = tl.where(diff < 0, large, small)
    e_3 = tl.where(spread > 0, e_3, 1.0)
    e_2 = tl.where(spread > 0, e_2, 0.0)
    largest = half + spread + pull
    along = e_3 * v_3 + e_2 * v_2
    turn = (e_3 * (e_3 * m_23 + e_2 * v_3) + e_2 * (e_3 * m_22 + e_2 * v_2)) / largest
    gain, _ = _gained(turn, none, q)
    gain = gain * along / largest
    flat = half - spread < 1e-8 * (half + spread)
    u_2 = tl.where(flat, e_3 * gain, alpha * c_1 + beta * c_1 * c_2)
    u_1 = tl.where(flat, e_2 * gain, alpha * c_2 + beta * (c_1 + c_2 * c_2))
    usable = (half > 0) & (tl.abs(u_1) < float("inf")) & (tl.abs(u_2) < float("inf"))
    u_1 = tl.where(usable, u_1, q)
    u_2 = tl.where(usable, u_2, 0.0)
    tl.store(p_weights, 1.0)
    tl.store(p_weights + 1, (1 + u_1).to(tl.float32))
    tl.store(p_weights + 2, (u_2 - u_1).to(tl.float32))
    tl.store(p_weights + 3, (-u_2).to(tl.float32))


def _plan(tensors: Sequence[Tensor]) -> Plan:
    return Plan(1, ())


_solve = Launcher(_exponential_kernel, _plan, num_warps=1)


def exponential_solve(sums: Sequence[Tensor], reach: Tensor, ridge: float) -> Tensor:
    """float32 [4]: a leading 1 and the weights of the three newest of evenly spaced values.

    sums: float64 [1, 6] of `guided_sums`, of a value and the three before it, for one window or more, which are
    added up. reach: float32 [1], how many gaps ahead. A singular or non-finite history gives the line.
    """
    weights = reach.new_empty(4, dtype=torch.float32)
    _solve.launch(_solve.plan((reach, *sums)), weights, tuple(sums), reach, float(ridge))
    return weights
