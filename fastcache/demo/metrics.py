# SPDX-License-Identifier: Apache-2.0
"""Quality measures for images [B, 1, 16, 16] in [-1, 1]."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from .model import Judge

DATA_RANGE = 2.0


def psnr(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, mean over images; infinite when all are equal."""
    error = (images.double() - reference.double()).square().flatten(1).mean(1)  # [B]
    if not error.any():
        return math.inf
    # the floor, 146 dB, keeps a single exact image from making the mean infinite
    return float((10 * torch.log10(DATA_RANGE**2 / error.clamp(min=1e-14))).mean())


def relative_l2(images: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    reference = reference.double()
    return float((images.double() - reference).norm() / reference.norm())


def ssim(images: Tensor, reference: Tensor, window: int = 7, sigma: float = 1.5) -> float:
    """Mean structural similarity (Wang et al. 2004) with a Gaussian window."""
    o = torch.arange(window, dtype=torch.float64) - window // 2
    g = torch.exp(-(o**2) / (2 * sigma**2))
    kernel = torch.outer(g, g)[None, None] / g.sum() ** 2  # [1, 1, window, window]
    x, y = images.double(), reference.double()
    mx, my = functional.conv2d(x, kernel), functional.conv2d(y, kernel)
    vx = functional.conv2d(x * x, kernel) - mx**2
    vy = functional.conv2d(y * y, kernel) - my**2
    cov = functional.conv2d(x * y, kernel) - mx * my
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    similarity = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(similarity.mean())


@torch.no_grad()
def accuracy(judge: Judge, images: Tensor, labels: Tensor) -> float:
    """Share of images that the judge reads as their label."""
    return float((judge(images).argmax(-1) == labels).double().mean())


@torch.no_grad()
def frechet(judge: Judge, images: Tensor, reference: Tensor) -> float:
    """Fréchet distance between two image sets in the judge's features (lower is closer)."""
    a, b = judge.features(images).double(), judge.features(reference).double()
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    # tr sqrt(Ca Cb) is the sum of the roots of the eigenvalues of a similar symmetric matrix
    values, vectors = torch.linalg.eigh(ca)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * cross
    return max(float(distance), 0.0)
