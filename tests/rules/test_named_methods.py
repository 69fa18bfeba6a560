# SPDX-License-Identifier: Apache-2.0
"""TeaCache, EasyCache and SenCache against their formulas, written out here in float64 and on their own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import toys
from modulated import ADAPTER, ADAPTERS, WAYS, ModulatedModel, TabledModel, rows_of
from torch import Tensor, nn

import fastcache

STEPS, RUNS = 14, 20


@pytest.fixture(autouse=True)
def compiled_anew():
    """Graphs of other tests count against the recompile limit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


MAKE: dict[str, Callable[[], nn.Module]] = {
    "modulated": ModulatedModel,
    "tabled": TabledModel,
    "plain": toys.model,
}


class Truth:
    """A model of `toys` in float64, run in parts."""

    def __init__(self, kind: str) -> None:
        self.model, self.kind = MAKE[kind]().double(), kind

    def enter(self, call: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.model.embed(call["hidden_states"].double())
        wave = torch.sin(call["timestep"].double() / 300).reshape(-1, 1, 1)
        if self.kind == "tabled":
            return hidden, {"temb": rows_of(call["timestep"], torch.float64)}
        return (hidden, {"temb": wave}) if self.kind == "modulated" else (hidden + 0.1 * wave, {})

    def stack(self, hidden: Tensor, more: dict[str, Tensor]) -> Tensor:
        for block in self.model.blocks:
            hidden = block(hidden_states=hidden, **more)
        return hidden

    def modulated(self, call: dict[str, Any]) -> Tensor:
        hidden, more = self.enter(call)
        centred = hidden - hidden.mean(-1, keepdim=True)
        eps = 1e-6 if self.kind == "tabled" else 1e-5
        normal = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        if self.kind == "tabled":
            shift, scale = (self.model.blocks[0].scale_shift_table + more["temb"]).unbind(1)[:2]
            return normal * (1 + scale[:, None]) + shift[:, None]
        return normal * (1 + more["temb"]) - more["temb"]


class Tea:
    """A += poly(d) per step, d the relative change of m; at a computed step A = 0."""

    whole = False

    def __init__(
        self, threshold: float, coefficients: tuple, first: int, last: bool, kind: str = "modulated"
    ) -> None:
        self.kind = kind
        self.threshold, self.coefficients = threshold, coefficients
        self.first, self.last, self.total, self.before = first, last, 0.0, None

    def computes(self, i: int, call: dict, truth: Truth) -> bool:
        m, before = truth.modulated(call), self.before
        self.before = m
        forced = i < max(self.first, 1) or (self.last and i == STEPS - 1)
        if not forced:
            d = float((m - before).abs().mean() / before.abs().mean())
            top = len(self.coefficients) - 1
            self.total += sum(c * d ** (top - n) for n, c in enumerate(self.coefficients))
        if forced or self.total >= self.threshold:
            self.total = 0.0
            return True
        return False

    def learn(self, i: int, call: dict, output: Tensor) -> None:
        pass


class Easy:
    """E += k |x - x_p| / |v_p|, k = |v - v_p| / |x - x_p| at computed steps, means over every how many-th token."""

    kind, whole = "plain", True

    def __init__(self, threshold: float, warmup: int, stride: int, start: float, stop: float):
        self.threshold, self.warmup, self.stride = threshold, warmup, stride
        self.start, self.stop = start, stop
        self.error, self.k, self.x, self.v = 0.0, None, None, None

    def computes(self, i: int, call: dict, truth: Truth) -> bool:
        x = call["hidden_states"].double()[:, :: self.stride]
        forced = i < self.warmup or self.k is None or not self.start <= i / STEPS < self.stop
        if not forced:
            self.error += self.k * float((x - self.x).abs().mean() / self.v.abs().mean())
        if forced or self.error >= self.threshold:
            self.error = 0.0
            return True
        return False

    def learn(self, i: int, call: dict, output: Tensor) -> None:
        x, v = call["hidden_states"].double()[:, :: self.stride], output[:, :: self.stride]
        if self.x is not None:
            self.k = float((v - self.v).abs().mean() / (x - self.x).abs().mean())
        self.x, self.v = x, v


class Sen:
    """alpha_x |x - x_p| + alpha_t |t - t_p|, against the last computed step."""

    kind, whole = "plain", False

    def __init__(self, threshold: float, alpha_x: float, alpha_t: float) -> None:
        self.threshold, self.alpha_x, self.alpha_t, self.seen = threshold, alpha_x, alpha_t, None

    def computes(self, i: int, call: dict, truth: Truth) -> bool:
        if self.seen is None:
            return True
        x, t = self.seen
        far = torch.linalg.vector_norm(call["hidden_states"].double() - x)
        apart = abs(float(call["timestep"][0]) - t)
        return not self.alpha_x * float(far) + self.alpha_t * apart <= self.threshold

    def learn(self, i: int, call: dict, output: Tensor) -> None:
        self.seen = call["hidden_states"].double(), float(call["timestep"][0])


def played(rule: Any, calls: list[dict[str, Any]]) -> tuple[str, list[Tensor]]:
    """Actions and outputs: a skipped step adds the residual of the stack at the last computed one."""
    truth, actions, outputs, residual = Truth(rule.kind), "", [], None
    with torch.no_grad():
        for i, call in enumerate(calls):
            hidden, more = truth.enter(call)
            computes = rule.computes(i, call, truth)
            if rule.whole:  # the output less the latents, and nothing of the model runs
                x = call["hidden_states"].double()
                if computes:
                    residual = truth.model.proj_out(truth.stack(hidden, more)) - x
                outputs.append(x + residual)
            else:
                if computes:
                    residual = truth.stack(hidden, more) - hidden
                outputs.append(truth.model.proj_out(hidden + residual))
            if computes:
                rule.learn(i, call, outputs[-1])
            actions += "C" if computes else "."
    return actions, outputs


def run(config: Any, calls: list[dict[str, Any]], kind: str, way: str = "eager") -> tuple:
    model = MAKE[kind]()
    with fastcache.enable(model, config, adapter=ADAPTERS.get(kind)) as cache:
        outputs = toys.run(cache, WAYS[way](model), calls, num_inference_steps=STEPS)
        return toys.actions(cache), outputs


POLY = (30.0, -2.0, 0.5, 0.9, 0.001)
CASES: dict[str, tuple[Any, Callable[[], Any]]] = {
    "tea": (
        fastcache.TeaCacheConfig(0.4, (1, 0)),
        lambda: Tea(0.4, (1, 0), 1, True),
    ),
    "tea, polynomial, retention": (
        fastcache.TeaCacheConfig(0.5, POLY, retention_steps=3, last=False),
        lambda: Tea(0.5, POLY, 3, False),
    ),
    "tea, in one kernel": (
        fastcache.TeaCacheConfig(0.3, (1, 0)),
        lambda: Tea(0.3, (1, 0), 1, True, "tabled"),
    ),
    "easy": (fastcache.EasyCacheConfig(0.3, token_stride=2), lambda: Easy(0.3, 3, 2, 0.0, 1.0)),
    "easy, window": (
        fastcache.EasyCacheConfig(0.5, 0, 1, 0.25, 0.8),
        lambda: Easy(0.5, 0, 1, 0.25, 0.8),
    ),
    "sen": (fastcache.SenCacheConfig(2.0, 0.5, 0.002), lambda: Sen(2.0, 0.5, 0.002)),
    "sen, time alone": (fastcache.SenCacheConfig(0.15, 0, 1e-3), lambda: Sen(0.15, 0, 1e-3)),
}


@pytest.mark.parametrize("case", CASES)
def test_decisions_and_outputs_are_those_of_the_formula(case):
    config, make = CASES[case]
    reused = computed = 0
    for seed in range(RUNS):
        calls = toys.inputs(STEPS, seed, speed=0.08 + 0.01 * (seed % 5))
        rule = make()
        wanted, truths = played(rule, calls)
        actions, outputs = run(config, calls, rule.kind)
        assert actions == wanted, seed
        for i, (a, b) in enumerate(zip(outputs, truths, strict=True)):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5, msg=f"{seed}, {i}")
        reused, computed = reused + wanted.count("."), computed + wanted[4:-1].count("C")
    assert reused > RUNS and computed > RUNS  # both happen, and not by guards alone


@pytest.mark.parametrize("way", [w for w in WAYS if w != "eager"])
@pytest.mark.parametrize("case", ["tea", "tea, in one kernel", "easy", "sen"])
def test_compiled_steps_are_the_eager_ones(case, way):
    config, make = CASES[case]
    for seed in range(2):
        calls = toys.inputs(STEPS, seed)
        kind = make().kind
        actions, outputs = run(config, calls, kind)
        assert "." in actions
        again, compiled = run(config, calls, kind, way)
        assert again == actions
        for a, b in zip(outputs, compiled, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case, graphs", [("tea", 3), ("easy", 1), ("sen", 2)])
def test_the_number_of_programs_and_none_later(case, graphs):
    made: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        made.append(len(made))
        return graph.forward

    config, make = CASES[case]
    kind = make().kind
    model = MAKE[kind]()
    with fastcache.enable(model, config, adapter=ADAPTERS.get(kind)) as cache:
        compiled = fastcache.compile(model, backend=backend)
        for seed in range(3):
            for name in ("cond", "uncond"):
                calls = toys.inputs(STEPS, seed)
                toys.run(cache, compiled, calls, name=name, num_inference_steps=STEPS, request=seed)
            assert len(made) == graphs
            cache.reset()
        assert cache.stats.reused


@pytest.mark.parametrize("case", ["tea", "easy", "sen"])
def test_one_number_is_read_per_step(case, monkeypatch):
    from fastcache import sync

    read: list[str] = []
    for name in ("relative_change", "expected_change", "norm"):
        whole = getattr(sync, name)
        monkeypatch.setattr(
            sync, name, lambda *a, name=name, whole=whole, **k: read.append(name) or whole(*a, **k)
        )
    config, make = CASES[case]
    actions, _ = run(config, toys.inputs(STEPS), make().kind)
    expected = {"tea": STEPS - 1, "easy": STEPS - 2, "sen": STEPS - 1}[case]
    assert len(read) == expected and len(set(read)) == 1
    assert "." in actions


@pytest.mark.parametrize("case", ["tea", "easy", "sen"])
def test_contexts_and_requests_keep_to_themselves(case):
    """Interleaved branches of two requests act as each does alone."""
    config, make = CASES[case]
    kind = make().kind
    adapter = ADAPTERS.get(kind)
    keys = [("a", "cond", 0), ("a", "uncond", 1), ("b", "cond", 2)]
    trips = {key: toys.inputs(STEPS, seed) for *key, seed in keys for key in [tuple(key)]}
    model, found = MAKE[kind](), {key: [] for key in trips}
    with fastcache.enable(model, config, adapter=adapter) as cache:
        for i in range(STEPS):
            for (request, name), calls in trips.items():
                with cache.context(name, request=request, num_inference_steps=STEPS):
                    found[request, name].append(toys.step(model, calls[i]))
        records = list(cache.stats)
    for (request, name), calls in trips.items():
        actions, outputs = run(config, calls, kind)
        own = [r for r in records if (r.request, r.context) == (request, name)]
        assert "".join("C" if r.action == "compute" else "." for r in own) == actions
        assert all(map(torch.equal, found[request, name], outputs))


@pytest.mark.parametrize("case", ["tea", "easy", "sen"])
def test_where_there_is_room_for_one_run_that_one_goes_on_as_alone(case):
    """The other one computes, or with offload waits in host memory and acts as alone too."""
    config, make = CASES[case]
    kind = make().kind
    adapter = ADAPTERS.get(kind)
    trips = {request: toys.inputs(STEPS, request) for request in (0, 1)}

    def driven(**room: Any) -> tuple[dict[int, str], int]:
        model = MAKE[kind]()
        with fastcache.enable(model, config, adapter=adapter, **room) as cache:
            for i in range(STEPS):
                for request, calls in trips.items():
                    with cache.context(request=request, num_inference_steps=STEPS):
                        toys.step(model, calls[i])
            actions = dict.fromkeys(trips, "")
            for record in cache.stats:
                actions[record.request] += "C" if record.action == "compute" else "."
            return actions, cache.nbytes()

    free, held = driven()
    assert all("." in actions for actions in free.values())
    room = held // 2 + 100
    assert driven(max_bytes=room, offload=True)[0] == free
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a run without reuse says so
        one = driven(max_bytes=room)[0]
    assert one == {0: "C" * STEPS, 1: free[1]}


PER_SAMPLE = {
    "tea": fastcache.InputChange(0.4, per_sample=True),
    "easy": fastcache.OutputSlope(0.3, 1, per_sample=True),
    "sen": fastcache.Sensitivity(1.0, 0.5, per_sample=True),
}


@pytest.mark.parametrize("case", PER_SAMPLE)
def test_per_sample_the_one_that_moves_most_decides(case):
    """A batch in which one sample goes along with the other, or stands still, decides as that would alone."""
    policy, kind = PER_SAMPLE[case], "modulated" if case == "tea" else "plain"
    moving = toys.inputs(STEPS, batch=1)
    both = []
    for call in moving:  # what stands still says nothing of how the output follows the latents
        other = (call if case == "easy" else moving[0])["hidden_states"]
        latents = torch.cat([call["hidden_states"], other])
        both.append({"hidden_states": latents, "timestep": call["timestep"].repeat(2)})
    alone, _ = run(fastcache.Recipe(policy), moving, kind)
    together, _ = run(fastcache.Recipe(policy), both, kind)
    assert together == alone and 2 < alone.count("C") < STEPS - 1


def test_of_several_samples_the_largest_number_counts():
    from fastcache import sync

    rows = torch.tensor([[1.0, 2.0, 4.0, 5.0], [3.0, 2.0, 4.0, 5.0], [0.0, 0.0, 0.0, 5.0]])
    assert sync.expected_change(rows) == pytest.approx(0.3)
    assert sync.expected_change(rows[2]) == 0.0  # stands still
    assert not sync.expected_change(torch.tensor([0.0, 1.0, 0.0, 5.0])) <= 1e9
    assert not sync.expected_change(torch.tensor([1.0, float("nan"), 1.0, 5.0])) <= 1e9
    assert sync.norm(torch.tensor([[4.0], [9.0]])) == 3.0
    assert sync.relative_change(torch.tensor([[1.0, 2.0], [1.0, 4.0]]), mean=True) == 0.375


@pytest.mark.parametrize("case", ["tea", "easy", "sen"])
def test_what_is_no_number_computes(case):
    config, make = CASES[case]
    kind = make().kind
    calls = toys.inputs(STEPS, speed=0.005)
    calls[6]["hidden_states"][0, 0, 0] = float("nan")
    actions, _ = run(config, calls, kind)
    assert actions[5:8] in (".CC", "CCC") and "." in actions[8:]


# --- TeaCache's coefficients ------------------------------------------------------------------------------


class FluxTransformer2DModel(ModulatedModel):
    pass


class WanTransformer3DModel(ModulatedModel):
    pass


def test_coefficients_are_looked_up_by_the_class_of_the_model():
    from fastcache.policies.coefficients import PUBLISHED

    with fastcache.enable(
        FluxTransformer2DModel(), fastcache.TeaCacheConfig(), adapter=ADAPTER
    ) as c:
        assert c.denoisers[0].recipe.when.coefficients == PUBLISHED["flux"].coefficients
        assert c.recipe.when.coefficients is None
    wan, named = WanTransformer3DModel(), fastcache.TeaCacheConfig(coefficients="wan2.1-t2v-14b")
    with fastcache.enable(wan, named, adapter=ADAPTER) as c:
        assert c.recipe.when.coefficients == PUBLISHED["wan2.1-t2v-14b"].coefficients
    assert all(len(row.coefficients) == 5 for row in PUBLISHED.values())


@pytest.mark.parametrize(
    "model, said",
    [
        (ModulatedModel, "coefficients is None, and none were published for ModulatedModel"),
        (WanTransformer3DModel, r"coefficients is None, and several.*wan2\.1-t2v-1\.3b"),
    ],
)
def test_coefficients_that_are_not_known_are_an_error_that_says_so(model, said):
    target = model()
    before = toys.snapshot(target)
    with pytest.raises(ValueError, match=said):
        fastcache.enable(target, fastcache.TeaCacheConfig(), adapter=ADAPTER)
    assert toys.snapshot(target) == before


def test_a_model_without_a_known_modulation_names_the_adapters_field():
    with pytest.raises(ValueError, match=r"InputChange needs .*fastcache\.Block\(modulation="):
        fastcache.enable(toys.model(), fastcache.TeaCacheConfig(coefficients=(1, 0)))


def test_steps_that_were_left_out_compute():
    config, calls = fastcache.TeaCacheConfig(5.0, (1, 0), last=False), toys.inputs(STEPS)
    model = ModulatedModel()
    with fastcache.enable(model, config, adapter=ADAPTER) as cache:
        for i in (0, 1, 2, 5, 6):
            with cache.context(step_index=i, num_inference_steps=STEPS):
                toys.step(model, calls[i])
        assert toys.actions(cache) == "C..C."
        assert list(cache.stats)[3].reason == "steps were left out"


@pytest.mark.parametrize("case", ["tea", "easy", "sen"])
def test_a_further_evaluation_takes_the_steps_own_decision(case):
    """A solver of second order calls twice per step: what it adds up is counted once."""
    from fastcache.policies import COMPUTE, REUSE, Step

    config, _ = CASES[case]
    policy = config.recipe().when
    model = MAKE[CASES[case][1]().kind]()
    adapter = ADAPTER if case == "tea" else None
    with fastcache.enable(model, config, adapter=adapter) as cache:
        toys.run(cache, model, toys.inputs(STEPS), num_inference_steps=STEPS)
        (decider,) = cache.denoisers[0].decider.deciders
        (state,) = cache.denoisers[0].pool.states.values()
        state.runs = [policy.begin()]
        small = 0.01
        actions = []
        for i in range(5):
            for again in (False, True):
                step = Step(i, STEPS, 1000.0 - i, again=again)
                state.armed_step = i
                actions.append(decider.decide(state, step, small if i else None).action)
        assert actions[::2] == actions[1::2] and actions[0] == COMPUTE and actions[-1] == REUSE
        run = state.runs[0]
        assert run.in_a_row == actions[::2].count(REUSE)
        if case != "sen":
            assert run.memory.error == pytest.approx(small * run.in_a_row)
