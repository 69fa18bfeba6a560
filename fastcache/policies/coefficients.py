# SPDX-License-Identifier: Apache-2.0
"""TeaCache's published polynomials: data, and who they were fitted for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SOURCE = "TeaCache (github.com/ali-vilab/TeaCache, Apache-2.0), commit 7c10efc"


class Published(NamedTuple):
    """A polynomial from the change of the input to that of the output.

    coefficients: highest power first, unitless. classes: names of the models' classes in diffusers.
    """

    coefficients: tuple[float, ...]
    classes: tuple[str, ...] = ()


_FLUX = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
_LUMINA = (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344)
_COGVIDEOX_5B = (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339)
_WAN = ("WanTransformer3DModel",)

PUBLISHED: dict[str, Published] = {
    "flux": Published(_FLUX, ("FluxTransformer2DModel",)),
    "tangoflux": Published(_FLUX),
    "hunyuan-video": Published(
        (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896),
        ("HunyuanVideoTransformer3DModel",),
    ),
    "ltx-video": Published(
        (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326),
        ("LTXVideoTransformer3DModel",),
    ),
    "mochi": Published(
        (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719),
        ("MochiTransformer3DModel",),
    ),
    "cogvideox-2b": Published(
        (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434),
        ("CogVideoXTransformer3DModel",),
    ),
    "cogvideox-5b": Published(_COGVIDEOX_5B, ("CogVideoXTransformer3DModel",)),
    "consisid": Published(_COGVIDEOX_5B, ("ConsisIDTransformer3DModel",)),
    "cosmos": Published(
        (271.156237, -91.9775607, 2.2443725, 2.08355751, 0.14177633),
        ("CosmosTransformer3DModel",),
    ),
    "lumina-next": Published(_LUMINA, ("LuminaNextDiT2DModel",)),
    "lumina2": Published(_LUMINA, ("Lumina2Transformer2DModel",)),
    "latte": Published(
        (-2464.34137, 308.044764, 80.7447667, -4.11385132, 0.111001402),
        ("LatteTransformer3DModel",),
    ),
    "hidream-i1-full": Published(
        (-31360.5009, -712.425503, 49.1363285, 8.2651549, 0.108053901),
        ("HiDreamImageTransformer2DModel",),
    ),
    "wan2.1-t2v-1.3b": Published(
        (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774), _WAN
    ),
    "wan2.1-t2v-14b": Published(
        (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404), _WAN
    ),
    "wan2.1-i2v-480p": Published(
        (-302.33167, 223.948934, -52.546397, 5.87348440, -0.201973289), _WAN
    ),
    "wan2.1-i2v-720p": Published(
        (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683), _WAN
    ),
    # fitted for runs whose first five steps are computed
    "wan2.1-t2v-1.3b-retain5": Published(
        (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664), _WAN
    ),
    "wan2.1-t2v-14b-retain5": Published(
        (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525), _WAN
    ),
    "wan2.1-i2v-480p-retain5": Published(
        (257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977), _WAN
    ),
    "wan2.1-i2v-720p-retain5": Published(
        (8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401), _WAN
    ),
}


def published(owner: str, name: str) -> tuple[float, ...]:
    """The coefficients of a row. Raises a ValueError that names the field and the rows."""
    if name not in PUBLISHED:
        raise ValueError(
            f"{owner}: coefficients is {name!r}, must be numbers or one of {', '.join(PUBLISHED)}"
        )
    return PUBLISHED[name].coefficients


def published_for(classes: Sequence[str]) -> tuple[float, ...]:
    """The coefficients of a model's class.

    Args:
        classes: names of the class and of those that it derives from, nearest first.
    Raises:
        ValueError: none were published for it, or several; the message names coefficients.
    """
    for name in classes:
        rows = [row for row, known in PUBLISHED.items() if name in known.classes]
        if len(rows) > 1:
            raise ValueError(
                f"when: coefficients is None, and several were published for {name}: name one of {', '.join(rows)}"
            )
        if rows:
            return PUBLISHED[rows[0]].coefficients
    known = ", ".join(sorted({c for row in PUBLISHED.values() for c in row.classes}))
    raise ValueError(
        f"when: coefficients is None, and none were published for {classes[0]} (for {known} there are); fit them "
        "with fastcache.calibrate(...).tea_cache(), or give coefficients=(1, 0), the change itself"
    )
