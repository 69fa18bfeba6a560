"""The ops: schemas, fakes and checked wrappers. The only file that touches torch.library.

Schemas put the mutated argument first, end in `_` when they mutate and then return nothing or a fresh
tensor. The wrappers below them check, allocate and return. Runtime code calls the registered ops
themselves: its tensors are known to fit, and a stored tensor may there have a lower precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake
from torch.nn import Parameter

from . import dispatch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


MAX_TERMS = 5


lib = Library("fastcache", "DEF")


for schema in (
    "residual_l1(Tensor y, Tensor x, Tensor prev, bool per_sample=False) -> Tensor",
    "residual_l1_(Tensor(a!) out, Tensor y, Tensor x, Tensor prev, bool per_sample=False) -> Tensor",
    "residual_magnitude(Tensor y, Tensor x, Tensor prev, float eps=1e-08, bool per_sample=False) -> Tensor",
    "residual_magnitude_(Tensor(a!) out, Tensor y, Tensor x, Tensor prev, float eps=1e-08, "
    "bool per_sample=False) -> Tensor",
    "residual_store_(Tensor(a!) out, Tensor y, Tensor x) -> ()",
    "residual_apply_(Tensor(a!) out, Tensor x, Tensor r) -> ()",
    "linear_combine_(Tensor(a!) out, Tensor[] tensors, float[] weights) -> ()",
    "linear_combine_device_(Tensor(a!) out, Tensor[] tensors, Tensor weights) -> ()",
    "taylor_update_(Tensor(a!)[] factors, Tensor y, float inv_delta, int valid) -> ()",
    "guidance_combine_(Tensor(a!) out, Tensor cond, Tensor low, Tensor high, float w_low, float w_high) -> ()",
    "guided_weights(Tensor guide, Tensor[] guides, Tensor prior, float ridge, bool per_sample=False) "
    "-> (Tensor, Tensor)",
    "_quantize_store_(Tensor(a!) q, Tensor(b!) scale, Tensor y, Tensor? x=None) -> ()",
    "_quantized_combine_(Tensor(a!) out, Tensor? base, Tensor[] qs, Tensor[] scales, float[] weights) -> ()",
):
    lib.define(schema)


def _residual_l1(y: Tensor, x: Tensor, prev: Tensor, per_sample: bool = False) -> Tensor:
    run, (y, x, prev) = dispatch.resolve("residual_l1", [y, x, prev], 0, per_sample)
    return run(y, x, prev, None, per_sample)


def _residual_l1_(
    out: Tensor, y: Tensor, x: Tensor, prev: Tensor, per_sample: bool = False
) -> Tensor:
    run, (y, x, prev, out) = dispatch.resolve("residual_l1", [y, x, prev, out], 1, per_sample)
    return run(y, x, prev, out, per_sample)


def _residual_magnitude(
    y: Tensor, x: Tensor, prev: Tensor, eps: float = 1e-8, per_sample: bool = False
) -> Tensor:
    run, (y, x, prev) = dispatch.resolve("residual_magnitude", [y, x, prev], 0, per_sample)
    return run(y, x, prev, None, eps, per_sample)


def _residual_magnitude_(
    out: Tensor, y: Tensor, x: Tensor, prev: Tensor, eps: float = 1e-8, per_sample: bool = False
) -> Tensor:
    given = [y, x, prev, out]
    run, (y, x, prev, out) = dispatch.resolve("residual_magnitude", given, 1, per_sample)
    return run(y, x, prev, out, eps, per_sample)


def _residual_store_(out: Tensor, y: Tensor, x: Tensor) -> None:
    run, (y, x, out) = dispatch.resolve("residual_store", [y, x, out], 1)
    run(out, y, x)


def _residual_apply_(out: Tensor, x: Tensor, r: Tensor) -> None:
    run, (x, r, out) = dispatch.resolve("residual_apply", [x, r, out], 1)
    run(out, x, r)


def _linear_combine_(out: Tensor, tensors: Sequence[Tensor], weights: Sequence[float]) -> None:
    run, (*terms, out) = dispatch.resolve("linear_combine", [*tensors, out], 1)
    run(out, terms, weights)


def _linear_combine_device_(out: Tensor, tensors: Sequence[Tensor], weights: Tensor) -> None:
    run, (*terms, out) = dispatch.resolve("linear_combine", [*tensors, out], 1)
    run(out, terms, weights.contiguous())


def _taylor_update_(factors: Sequence[Tensor], y: Tensor, inv_delta: float, valid: int) -> None:
    run, (y, *table) = dispatch.resolve("taylor_update", [y, *factors], len(factors))
    run(table, y, inv_delta, valid)


def _guidance_combine_(
    out: Tensor, cond: Tensor, low: Tensor, high: Tensor, w_low: float, w_high: float
) -> None:
    half = out[: cond.shape[0]]  # of the shape of the others; the second one lies like it
    run, (cond, low, high, _) = dispatch.resolve("guidance_combine", [cond, low, high, half], 1)
    run(out, cond, low, high, w_low, w_high)


def _guided_weights(
    guide: Tensor, guides: Sequence[Tensor], prior: Tensor, ridge: float, per_sample: bool = False
) -> tuple[Tensor, Tensor]:
    given = [guide, *guides]
    run, (guide, *held) = dispatch.resolve("guided_sums", given, 0, per_sample)
    solve = dispatch.function(dispatch.active(guide.device.type), "guided_solve")
    return solve(run(guide, held, per_sample), prior.contiguous(), ridge, True)


def _quantize_store_(q: Tensor, scale: Tensor, y: Tensor, x: Tensor | None = None) -> None:
    given = [y, q] if x is None else [y, x, q]
    run, (y, *rest, q) = dispatch.resolve("quantize_store", given, 1)
    dense = scale.contiguous()
    run(q, dense, y, *rest)
    if dense is not scale:
        scale.copy_(dense)


def _quantized_combine_(
    out: Tensor,
    base: Tensor | None,
    qs: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Sequence[float],
) -> None:
    given = [*qs, out] if base is None else [*qs, base, out]
    run, (*terms, out) = dispatch.resolve("quantized_combine", given, 1)
    base = None if base is None else terms.pop()
    run(out, base, terms, [s.contiguous() for s in scales], weights)


BODIES: dict[str, Callable[..., Any]] = {
    "residual_l1": _residual_l1,
    "residual_l1_": _residual_l1_,
    "residual_magnitude": _residual_magnitude,
    "residual_magnitude_": _residual_magnitude_,
    "residual_store_": _residual_store_,
    "residual_apply_": _residual_apply_,
    "linear_combine_": _linear_combine_,
    "linear_combine_device_": _linear_combine_device_,
    "taylor_update_": _taylor_update_,
    "guidance_combine_": _guidance_combine_,
    "guided_weights": _guided_weights,
    "_quantize_store_": _quantize_store_,
    "_quantized_combine_": _quantized_combine_,
}


for name, body in BODIES.items():
    lib.impl(name, body, "CompositeExplicitAutograd")


def direct(name: str) -> Callable[..., Any]:
    """An op as the runtime calls it: where nothing traces or watches, past torch's dispatcher.

    Going through it to Python and back takes longer than the kernel of a small tensor.
    """
    op, body = getattr(torch.ops.fastcache, name).default, BODIES[name]

    def call(*args: Any) -> Any:
        # export traces under a dispatch mode, so asking for Dynamo is enough
        if torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack():
            return op(*args)
        first = args[0]
        plain = type(first if isinstance(first, Tensor) else first[0]) in (Tensor, Parameter)
        return body(*args) if plain else op(*args)

    return call


def _same(name: str, first: Tensor, *others: Tensor) -> None:
    for t in others:
        torch._check(
            t.shape == first.shape,
            lambda t=t: f"{name}: {tuple(t.shape)} and {tuple(first.shape)} differ",
        )


def _sums(y: Tensor, per_sample: bool, width: int) -> Tensor:
    return y.new_empty((y.shape[0], width) if per_sample else (width,), dtype=torch.float32)


@register_fake("fastcache::residual_l1", lib=lib)
def _(y, x, prev, per_sample=False):
    _same("residual_l1", y, x, prev)
    return _sums(y, per_sample, 2)


@register_fake("fastcache::residual_l1_", lib=lib)
def _(out, y, x, prev, per_sample=False):
    _same("residual_l1_", y, x, prev, out)
    return _sums(y, per_sample, 2)


@register_fake("fastcache::residual_magnitude", lib=lib)
def _(y, x, prev, eps=1e-8, per_sample=False):
    _same("residual_magnitude", y, x, prev)
    return _sums(y, per_sample, 1)


@register_fake("fastcache::residual_magnitude_", lib=lib)
def _(out, y, x, prev, eps=1e-8, per_sample=False):
    _same("residual_magnitude_", y, x, prev, out)
    return _sums(y, per_sample, 1)


@register_fake("fastcache::residual_store_", lib=lib)
def _(out, y, x):
    _same("residual_store_", out, y, x)


@register_fake("fastcache::residual_apply_", lib=lib)
def _(out, x, r):
    _same("residual_apply_", out, x, r)


@register_fake("fastcache::linear_combine_", lib=lib)
def _(out, tensors, weights):
    torch._check(
        len(tensors) == len(weights), lambda: f"{len(tensors)} tensors, {len(weights)} weights"
    )
    _same("linear_combine_", out, *tensors)


@register_fake("fastcache::linear_combine_device_", lib=lib)
def _(out, tensors, weights):
    torch._check(
        weights.numel() == len(tensors),
        lambda: f"{len(tensors)} tensors, {weights.numel()} weights",
    )
    _same("linear_combine_device_", out, *tensors)


@register_fake("fastcache::taylor_update_", lib=lib)
def _(factors, y, inv_delta, valid):
    _same("taylor_update_", y, *factors)


@register_fake("fastcache::guidance_combine_", lib=lib)
def _(out, cond, low, high, w_low, w_high):
    _same("guidance_combine_", cond, low, high)
    torch._check(
        out.shape[0] == 2 * cond.shape[0],
        lambda: f"out {tuple(out.shape)}, cond {tuple(cond.shape)}",
    )


@register_fake("fastcache::guided_weights", lib=lib)
def _(guide, guides, prior, ridge, per_sample=False):
    _same("guided_weights", guide, *guides)
    samples = guide.shape[0] if per_sample else 1
    weights = guide.new_empty((samples, prior.numel() + 2), dtype=torch.float32)
    return weights, guide.new_empty((samples,), dtype=torch.float32)


@register_fake("fastcache::_quantize_store_", lib=lib)
def _(q, scale, y, x=None):
    _same("quantize_store_", y, q)
    torch._check(
        scale.shape == y.shape[:-1], lambda: f"scale {tuple(scale.shape)}, y {tuple(y.shape)}"
    )


@register_fake("fastcache::_quantized_combine_", lib=lib)
def _(out, base, qs, scales, weights):
    _same("quantized_combine_", out, *qs)
    torch._check(
        len(qs) == len(scales) == len(weights), lambda: f"{len(qs)} tensors, {len(weights)} weights"
    )


def _check(op: str, **tensors: Any) -> None:
    """Raise a TypeError or ValueError that names the argument unless all agree with the first."""
    first_name, first = next(iter(tensors.items()))
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is {type(t).__name__}, must be a torch.Tensor")
        if t.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} is {t.dtype}, must be float32, float16 or bfloat16")
        if t.layout != torch.strided:
            raise TypeError(f"{op}: {name} has layout {t.layout}, must be a dense tensor")
        if t.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} requires grad, and this op has no backward: call it under torch.no_grad() "
                f"or pass {name}.detach()"
            )
        if t is first:
            continue
        if t.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} is {t.dtype}, {first_name} is {first.dtype}; they must agree"
            )
        if t.device != first.device:
            raise ValueError(
                f"{op}: {name} is on {t.device}, {first_name} on {first.device}; they must agree"
            )
        if t.shape != first.shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(t.shape)}, {first_name} has {tuple(first.shape)}; they must agree"
            )


def _check_out(op: str, out: Tensor, **inputs: Tensor) -> None:
    """Refuse outputs whose elements overlap each other, or that partly overlap an input; one may be it."""
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        raise ValueError(
            f"{op}: out is an expanded view, its elements share memory; pass a tensor of its own"
        )
    if torch.compiler.is_compiling():  # where tensors lie is not known there
        return
    for name, t in inputs.items():
        if overlap(out, t):
            raise ValueError(
                f"{op}: out partly overlaps {name}, which would be read after it was overwritten; pass {name} "
                "itself, or a tensor of its own"
            )


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share some elements but are not one and the same view.

    Views of different strides count as sharing where the ranges that they span do.
    """
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata or not (a.numel() and b.numel()):
        return False
    widths = a.element_size(), b.element_size()
    (start, end), (from_, to) = (
        (t.storage_offset() * w, (t.storage_offset() + _span(t)) * w)
        for t, w in zip((a, b), widths, strict=True)
    )
    if end <= from_ or to <= start:
        return False
    if (a.shape, a.stride(), widths[0]) != (b.shape, b.stride(), widths[1]):
        return True
    if start == from_:
        return False
    dims = sorted(zip(a.stride(), a.shape, strict=True), reverse=True)
    return _reaches(abs(int(a.storage_offset()) - int(b.storage_offset())), dims)


def _span(t: Tensor) -> int:
    """Elements from the first one of a view to behind its last one."""
    return 1 + sum(s * (n - 1) for s, n in zip(t.stride(), t.shape, strict=True))


def _reaches(distance: int, dims: Sequence[tuple[int, int]]) -> bool:
    """Whether two elements of one view lie this far apart. dims: (stride, size), largest stride first."""
    if not dims:
        return distance == 0
    (stride, size), *rest = dims
    most = sum(s * (n - 1) for s, n in rest)
    if not stride:
        return _reaches(distance, rest)
    first, last = -((most - distance) // stride), (distance + most) // stride
    steps = range(max(first, 1 - size), min(last, size - 1) + 1)
    return any(_reaches(distance - k * stride, rest) for k in steps)


def residual_l1(
    y: Tensor, x: Tensor, prev: Tensor, out: Tensor | None = None, *, per_sample: bool = False
) -> Tensor:
    """Sums of |r - prev| and |prev| for r = y - x rounded to the storage dtype, in one pass.

    y, x, prev: output of a block, its input, the residual of an earlier step; one shape, dtype (float32,
    float16, bfloat16) and device. out: receives r, bit-exactly. Returns float32 [2], or [B, 2] with one
    row per sample. The first over the second is FirstBlockCache's relative L1 change; both are returned
    so that ranks can add them up before they divide. Fixed summation order.
    Raises TypeError or ValueError that names the argument. Source: FirstBlockCache, diffusers 0.42.1.
    """
    if out is None:
        _check("residual_l1", y=y, x=x, prev=prev)
        _check_samples("residual_l1", y, per_sample)
        return torch.ops.fastcache.residual_l1.default(y, x, prev, per_sample)
    _check("residual_l1", y=y, x=x, prev=prev, out=out)
    _check_samples("residual_l1", y, per_sample)
    _check_out("residual_l1", out, y=y, x=x, prev=prev)
    return torch.ops.fastcache.residual_l1_.default(out, y, x, prev, per_sample)


def residual_magnitude(
    y: Tensor,
    x: Tensor,
    prev: Tensor,
    out: Tensor | None = None,
    eps: float = 1e-8,
    *,
    per_sample: bool = False,
) -> Tensor:
    """Mean over tokens of |r|_2 / (|prev|_2 + eps) for r = y - x, norms over the last dimension.

    y, x, prev: as in `residual_l1`, two dimensions or more. out: receives r; may be `prev`.
    Returns float32 [1], or [B, 1] with one row per sample (then three dimensions or more).
    Raises TypeError or ValueError that names the argument. Source: MagCache (arXiv 2506.09045).
    """
    tensors = {"y": y, "x": x, "prev": prev} | ({} if out is None else {"out": out})
    _check("residual_magnitude", **tensors)
    _check_samples("residual_magnitude", y, per_sample)
    if y.dim() < 2:
        raise ValueError(
            f"residual_magnitude: y has shape {tuple(y.shape)}, must be [..., tokens, width]"
        )
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not eps >= 0:
        raise ValueError(f"residual_magnitude: eps is {eps!r}, must be a number >= 0")
    if out is None:
        return torch.ops.fastcache.residual_magnitude.default(y, x, prev, float(eps), per_sample)
    _check_out("residual_magnitude", out, y=y, x=x, prev=prev)
    return torch.ops.fastcache.residual_magnitude_.default(out, y, x, prev, float(eps), per_sample)


def residual_store(y: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """out <- y - x, rounded once to the storage dtype; returns `out`."""
    _check("residual_store", y=y, x=x, out=out)
    _check_out("residual_store", out, y=y, x=x)
    torch.ops.fastcache.residual_store_.default(out, y, x)
    return out


def residual_apply(x: Tensor, r: Tensor, out: Tensor | None = None) -> Tensor:
    """x + r; `out` may be `x`. Returns `out`, or a new tensor."""
    if out is None:
        _check("residual_apply", x=x, r=r)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    else:
        _check("residual_apply", x=x, r=r, out=out)
        _check_out("residual_apply", out, x=x, r=r)
    torch.ops.fastcache.residual_apply_.default(out, x, r)
    return out


def linear_combine(
    tensors: Sequence[Tensor], weights: Sequence[float] | Tensor, out: Tensor | None = None
) -> Tensor:
    """sum_i weights[i] * tensors[i], accumulated in float32 and rounded once.

    tensors: 1 to 5 of one shape, dtype and device. weights: as many Python floats, or a float32 tensor
    [len(tensors)] on the same device (nothing is read back). out: may be one of the tensors.
    Returns `out`, or a new tensor. Raises TypeError or ValueError that names the argument.
    """
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(
            f"linear_combine: tensors is {type(tensors).__name__}, must be a list of tensors"
        )
    if not 1 <= len(tensors) <= MAX_TERMS:
        raise ValueError(
            f"linear_combine: tensors has {len(tensors)} entries, must have 1 to {MAX_TERMS}"
        )
    named = {f"tensors[{i}]": t for i, t in enumerate(tensors)}
    _check("linear_combine", **named, **({} if out is None else {"out": out}))
    first = tensors[0]
    if isinstance(weights, Tensor):
        if weights.dtype != torch.float32:
            raise TypeError(f"linear_combine: weights is {weights.dtype}, must be float32")
        if weights.device != first.device:
            raise ValueError(
                f"linear_combine: weights is on {weights.device}, tensors on {first.device}"
            )
        if weights.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "linear_combine: weights requires grad, and this op has no backward: detach it"
            )
        count, device_weights = weights.numel() if weights.dim() == 1 else -1, True
    elif isinstance(weights, Sequence) and not isinstance(weights, str):
        for i, w in enumerate(weights):
            if isinstance(w, bool) or not isinstance(w, int | float):
                raise TypeError(
                    f"linear_combine: weights[{i}] is {type(w).__name__}, must be a number"
                )
        count, device_weights = len(weights), False
    else:
        raise TypeError(
            f"linear_combine: weights is {type(weights).__name__}, must be floats or a tensor"
        )
    if count != len(tensors):
        raise ValueError(
            f"linear_combine: weights must be one number for each of the {len(tensors)} tensors, got "
            f"{tuple(weights.shape) if isinstance(weights, Tensor) else count}"
        )
    if out is None:
        out = torch.empty_like(first, memory_format=torch.contiguous_format)
    else:
        _check_out("linear_combine", out, **named)
    if device_weights:
        device: Any = weights
        torch.ops.fastcache.linear_combine_device_.default(out, list(tensors), device)
    else:
        torch.ops.fastcache.linear_combine_.default(out, list(tensors), [float(w) for w in weights])
    return out


def taylor_update_(
    factors: Sequence[Tensor] | Tensor, y: Tensor, inv_delta: float, valid: int
) -> None:
    """Refresh backward differences in place: f[0] <- y, f[j+1] <- (new f[j] - old f[j]) * inv_delta.

    factors: K+1 tensors of the shape of y, or one stacked [K+1, ...]. inv_delta: 1 / steps since the last
    refresh. valid: 0..K+1, how many factors held data before the call; j runs below min(valid, K).
    Raises TypeError or ValueError that names the argument. Source: TaylorSeer (arXiv 2503.06923).
    """
    if isinstance(factors, Tensor):
        if factors.dim() < 1:
            raise ValueError("taylor_update_: factors is a 0-d tensor, must be [orders + 1, ...]")
        factors = factors.unbind(0)
    if not isinstance(factors, Sequence) or isinstance(factors, str):
        raise TypeError(
            f"taylor_update_: factors is {type(factors).__name__}, must be a list of tensors"
        )
    if not factors:
        raise ValueError("taylor_update_: factors is empty, must hold order + 1 tensors")
    _check("taylor_update_", y=y, **{f"factors[{i}]": t for i, t in enumerate(factors)})
    for i, t in enumerate(factors):
        others = {f"factors[{j}]": other for j, other in enumerate(factors[:i])}
        _check_out(f"taylor_update_: factors[{i}]", t, y=y, **others)
    if isinstance(inv_delta, bool) or not isinstance(inv_delta, int | float):
        raise TypeError(
            f"taylor_update_: inv_delta is {type(inv_delta).__name__}, must be a number"
        )
    if isinstance(valid, bool) or not isinstance(valid, int):
        raise TypeError(f"taylor_update_: valid is {type(valid).__name__}, must be an int")
    if not 0 <= valid <= len(factors):
        raise ValueError(f"taylor_update_: valid is {valid}, must be in 0..{len(factors)}")
    torch.ops.fastcache.taylor_update_.default(list(factors), y, float(inv_delta), valid)


def guidance_combine(
    cond: Tensor, low: Tensor, high: Tensor, w_low: float, w_high: float, out: Tensor | None = None
) -> Tensor:
    """[cond + w_low * low + w_high * high ; cond] along dimension 0, in one pass.

    cond: [B, ...]. low, high: float32 of the same shape, the frequency parts of (unconditional -
    conditional) at the last full step. Returns [2B, ...]. Source: FasterCache (arXiv 2410.19355).
    """
    _check("guidance_combine", cond=cond)
    _check("guidance_combine", low=low, high=high)
    if low.dtype != torch.float32:
        raise TypeError(f"guidance_combine: low is {low.dtype}, must be float32")
    if low.shape != cond.shape or low.device != cond.device:
        raise ValueError(
            f"guidance_combine: low is {tuple(low.shape)} on {low.device}, cond is {tuple(cond.shape)} on "
            f"{cond.device}; they must agree"
        )
    both = (2 * cond.shape[0], *cond.shape[1:])
    if out is None:
        out = cond.new_empty(both)
    else:
        _check("guidance_combine", out=out)
        _check_out("guidance_combine", out, cond=cond, low=low, high=high)
        if (out.shape, out.dtype, out.device) != (both, cond.dtype, cond.device):
            raise ValueError(
                f"guidance_combine: out is {out.dtype} {tuple(out.shape)} on {out.device}, must be "
                f"{cond.dtype} {both} on {cond.device}"
            )
    torch.ops.fastcache.guidance_combine_.default(out, cond, low, high, float(w_low), float(w_high))
    return out


def _check_samples(op: str, y: Tensor, per_sample: bool) -> None:
    if per_sample and y.dim() < (3 if op == "residual_magnitude" else 2):
        raise ValueError(
            f"{op}: per_sample needs a batch dimension before the tokens, y is {tuple(y.shape)}"
        )


def guided_weights(
    guide: Tensor,
    guides: Sequence[Tensor],
    prior: Tensor,
    ridge: float = 0.003,
    *,
    per_sample: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weights of cached values, read off the guide of the current step; nothing goes to the host.

    guide: of this step; guides: of the last K + 1 computed steps, newest first, K = 1 or 2, of the same
    shape, dtype and device, any strides. prior: float32 [K], what the ridge pulls the weights of the
    differences toward. Returns float32 (weights [S, K + 2], misfit [S]): a leading 1 for the base, then
    one weight per cached value; misfit is the relative norm of what the guides could not explain.
    Raises TypeError or ValueError that names the argument.
    """
    if isinstance(guides, Tensor) or not isinstance(guides, Sequence):
        raise TypeError(
            f"guided_weights: guides is {type(guides).__name__}, must be a list of tensors"
        )
    if len(guides) not in (2, 3):
        raise ValueError(f"guided_weights: guides has {len(guides)} entries, must have 2 or 3")
    _check("guided_weights", guide=guide, **{f"guides[{i}]": t for i, t in enumerate(guides)})
    _check_samples("guided_weights", guide, per_sample)
    _check("guided_weights", prior=prior)
    if prior.dtype != torch.float32:
        raise TypeError(f"guided_weights: prior is {prior.dtype}, must be float32")
    if prior.shape != (len(guides) - 1,) or prior.device != guide.device:
        raise ValueError(
            f"guided_weights: prior must be [{len(guides) - 1}] on {guide.device}, got {tuple(prior.shape)}"
        )
    if (
        isinstance(ridge, bool)
        or not isinstance(ridge, int | float)
        or not 0 <= ridge < float("inf")
    ):
        raise ValueError(f"guided_weights: ridge is {ridge!r}, must be a finite number >= 0")
    return torch.ops.fastcache.guided_weights.default(
        guide, list(guides), prior, float(ridge), per_sample
    )


def quantize_store(
    y: Tensor, x: Tensor | None = None, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(q, scale): y - x (or y) as float8 e4m3 with one float32 scale per token; a quarter of float32.

    y, x: [..., tokens, width]. q: float8_e4m3fn of the same shape; scale: float32 [..., tokens], max |r| / 448.
    out: such a pair, written in place. Relative error of normal data 2.7 % rms, at most 1/28 of the token's
    largest value. Raises TypeError or ValueError that names the argument.
    """
    _check("quantize_store", y=y, **({} if x is None else {"x": x}))
    if y.dim() < 1:
        raise ValueError("quantize_store: y is a 0-d tensor, must be [..., width]")
    if out is None:
        out = (
            torch.empty(y.shape, dtype=torch.float8_e4m3fn, device=y.device),
            torch.empty(y.shape[:-1], dtype=torch.float32, device=y.device),
        )
    q, scale = out
    for name, t, dtype, shape in (
        ("out[0]", q, torch.float8_e4m3fn, y.shape),
        ("out[1]", scale, torch.float32, y.shape[:-1]),
    ):
        if not isinstance(t, Tensor) or t.dtype != dtype or t.shape != shape:
            raise ValueError(f"quantize_store: {name} must be a {dtype} tensor {tuple(shape)}")
        _check_out(f"quantize_store: {name}", t, y=y, **({} if x is None else {"x": x}))
    torch.ops.fastcache._quantize_store_.default(q, scale, y, x)
    return q, scale


def quantized_combine(
    base: Tensor | None,
    qs: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Sequence[float],
    out: Tensor,
) -> Tensor:
    """out <- base + sum_i weights[i] * scales[i] * qs[i], values stored by `quantize_store`; returns `out`.

    base: of the shape and dtype of out, or None. Raises TypeError or ValueError that names the argument.
    """
    _check("quantized_combine", out=out, **({} if base is None else {"base": base}))
    if not 1 <= len(qs) <= MAX_TERMS - 1 or not len(qs) == len(scales) == len(weights):
        raise ValueError(
            f"quantized_combine: qs, scales and weights must be 1 to {MAX_TERMS - 1} each, got "
            f"{len(qs)}, {len(scales)}, {len(weights)}"
        )
    for i, (q, scale) in enumerate(zip(qs, scales, strict=True)):
        if q.dtype != torch.float8_e4m3fn or q.shape != out.shape:
            raise ValueError(f"quantized_combine: qs[{i}] must be float8_e4m3fn {tuple(out.shape)}")
        if scale.dtype != torch.float32 or scale.shape != out.shape[:-1]:
            raise ValueError(
                f"quantized_combine: scales[{i}] must be float32 {tuple(out.shape[:-1])}"
            )
    _check_out("quantized_combine", out, **({} if base is None else {"base": base}))
    torch.ops.fastcache._quantized_combine_.default(
        out, base, list(qs), list(scales), [float(w) for w in weights]
    )
    return out
