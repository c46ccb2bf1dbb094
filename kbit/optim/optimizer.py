"""The one step loop behind every optimizer: torch.optim.Optimizer's contract, with states of 8 or 32 bits.

A step sorts a group's parameters into batches that one kernel call can advance, and runs each batch with Triton on a
GPU, compiled C++ on a CPU, or plain torch elsewhere. All three follow kbit/optim/rules.py.

Gradients that are not finite: with 32-bit states an element becomes what torch.optim makes of it (NaN), with 8-bit
states an element whose new state would not be finite keeps its value and its state. No other element is touched.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kbit.optim import sharding
from kbit.optim import state as states
from kbit.optim.batch import RELEASED, Batch, Item, Look, choose, step_native, step_plain
from kbit.optim.checkpoint import load_groups, load_state, reshardable
from kbit.optim.fitting import check_gradient, fit, make_finite
from kbit.optim.foreign import ALGORITHM_KEY
from kbit.optim.paging import synchronize
from kbit.optim.rules import Rule, rule_for
from kbit.optim.settings import check, check_keys, forced, override_targets, refuse_keywords


class KbitOptimizer(torch.optim.Optimizer):
    """Base of all optimizers here: torch.optim.Optimizer with states of 8 or 32 bits.

    optim_bits: 32 or 8, the bits of an element of a state. 8 bits are codes of the dynamic map, with one fp32 scale for
        each block of 256 ("8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861). Where the class's name
        says the bits, another number raises ValueError (but for 32, which bitsandbytes has as a default everywhere).
    min_8bit_size: parameters with fewer elements have 32-bit states.
    is_paged: on a GPU, states of parameters with 100,000 elements or more live in pinned host memory.
    max_unorm: cap of |update| / |parameter|, 0 for none; LARS and LAMB have their own meaning of it.
    skip_zeros: elements whose gradient is exactly 0 are left alone, states too.
    stochastic_rounding: round bf16 parameters up or down at random, right on average.
    kahan: keep what rounding loses of bf16 and fp16 parameters in a second tensor. Excludes stochastic_rounding.
    args: an object with any of `optim_bits`, `min_8bit_size`, `max_unorm`, `skip_zeros` as attributes, as bitsandbytes
        takes it.

    Every setting is a key of its parameter group, so groups may differ. Raises ValueError for a setting out of range,
    TypeError for one that does not exist.

    `state[p]` holds tensors shaped like the parameter p, in fp32 or as uint8 codes with their scales beside them:
    `exp_avg` and `exp_avg_absmax`, for example; `step` is an fp32 scalar, `compensation` (kahan) has p's dtype.
    """

    algorithm: str = ""
    # Set by the classes whose name says so.
    forced_bits: int | None = None
    forced_paging: bool | None = None
    # Whether a parameter group may hold keys that nobody here knows.
    free_keys = False

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        stochastic_rounding: bool = False,
        kahan: bool = False,
        args: Any = None,
        **unknown: Any,
    ) -> None:
        structure: dict[str, Any] = {
            "optim_bits": optim_bits,
            "min_8bit_size": min_8bit_size,
            "max_unorm": max_unorm,
            "skip_zeros": skip_zeros,
        }
        if args is not None:
            structure |= {key: getattr(args, key) for key in structure if hasattr(args, key)}
        structure |= {"is_paged": is_paged, "stochastic_rounding": stochastic_rounding, "kahan": kahan}
        refuse_keywords(type(self).__name__, unknown, {**defaults, **structure})
        structure |= forced(type(self).__name__, structure, self.forced_bits, self.forced_paging)
        self._overrides: dict[Tensor, dict[str, Any]] = {}
        self._plans: dict[Any, Any] = {}
        self._batches: dict[int, Kept] = {}
        self._seen: list[Any] = []  # the states that batches were made of
        self._locals: dict[Tensor, tuple[tuple[weakref.ref[Tensor], ...], dict[str, Any]]] = {}
        #: "auto", or "torch", "native" (compiled C++), "triton", "cuda" (compiled CUDA C++) to insist on one.
        self.backend = "auto"
        super().__init__(params, {**defaults, **structure})

    # -- settings ---------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; settings that it does not name are the constructor's.

        Beside settings a group may hold what schedulers write (`initial_lr`, ...) and labels (`name`, `lr_scale`,
        `layer_id`, or any key that starts with `_`). Raises TypeError for any other key, ValueError for a value out
        of range; nothing is added then.
        """
        if isinstance(param_group, dict):
            check_keys(type(self).__name__, self.algorithm, param_group, self.defaults, self.free_keys)
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
            for p in self.param_groups[-1]["params"]:
                if not p.is_floating_point():
                    raise ValueError(f"{type(self).__name__} optimizes floating-point parameters, not {p.dtype}")
        except ValueError:
            self.param_groups.pop()
            raise

    def override(self, target: Tensor | nn.Module | Iterable[Tensor], **config: Any) -> None:
        """Give some parameters their own settings, for example `opt.override(model.embed, optim_bits=32)`.

        target: a parameter, several, or a module (all its parameters). config: any keys of a parameter group. Works
        at any time; existing states are converted. Not part of the state dict: call it again after constructing.
        Raises ValueError for an unknown key, a value out of range and a parameter that this optimizer does not have,
        TypeError for a target that is none of the above; nothing is changed then.
        """
        if unknown := sorted(set(config) - set(self.defaults)):
            raise ValueError(f"unknown settings {', '.join(unknown)}; known: {', '.join(sorted(self.defaults))}")
        if not config:
            known = ", ".join(sorted(self.defaults))
            raise ValueError(f"override needs a setting to override, such as optim_bits=32; known: {known}")
        groups = {p: group for group in self.param_groups for p in group["params"]}
        wanted = {}
        for p in override_targets(target, groups, type(self).__name__):
            wanted[p] = {**self._overrides.get(p, {}), **config}
            self._check({**groups[p], **wanted[p], "params": [p]})
        self._overrides |= wanted
        self._forget()

    def _check(self, config: Mapping[str, Any]) -> None:
        """Raise ValueError for a setting of a group that is out of range."""
        check(config, self.algorithm)

    # -- the step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Advance every parameter that has a gradient.

        closure: re-evaluates the model and returns the loss, which is returned. Raises RuntimeError for sparse
        gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._run_eagerly()
        else:
            self._run()
        return loss

    @torch._disable_dynamo
    def _run_eagerly(self) -> None:
        self._run()

    def _run(self) -> None:
        values = self.state.values()
        if len(values) != len(self._seen) or not all(map(operator.is_, values, self._seen)):
            self._batches.clear()
        seed, rebuilt = 0, False
        for number, group in enumerate(self.param_groups):
            batches = self._cached_batches(number, group)
            if batches is None:
                batches, rebuilt = self._new_batches(group, seed), True
                self._remember(number, group, batches)
            seed += len(group["params"])
            for place, batch in enumerate(batches):
                self._dispatch(batch, (number, place))
                batch.addresses = None
                for item in batch.items:
                    item.g = RELEASED
        if rebuilt:
            self._seen = list(self.state.values())

    def _cached_batches(self, number: int, group: dict[str, Any]) -> list[Batch] | None:
        """The batches of the last step with the new gradients, or None where anything but addresses has changed."""
        kept = self._batches.get(number)
        if kept is None or kept.group is not group or kept.signature != _signature(self, group):
            return None
        if not all(map(operator.is_, kept.params, group["params"])):
            return None
        for p in kept.idle:
            if p.grad is not None:
                return None
        if not all(map(Look.again, kept.looks, kept.batches)):
            return None
        return kept.batches

    def _new_batches(self, group: dict[str, Any], seed: int) -> list[Batch]:
        """The batches of a group. seed: of its first parameter, for stochastic rounding."""
        found: dict[Any, Batch] = {}
        times: dict[int, int] = {}
        for index, p in enumerate(group["params"], seed):
            if p.grad is None:
                continue
            config = group if p not in self._overrides else {**group, **self._overrides[p]}
            # A parameter that is listed twice takes two steps, as in torch.optim: one after the other.
            times[id(p)] = times.get(id(p), 0) + 1
            self._add(found, p, config, index, times[id(p)])
        return list(found.values())

    def _remember(self, number: int, group: dict[str, Any], batches: list[Batch]) -> None:
        """Keep batches for the next step, unless something needs a look at every step: copies, overrides, shards."""
        self._batches.pop(number, None)
        items = [item for batch in batches for item in batch.items]
        plain = all(item.target is None and not sharding.is_sharded(item.owner) for item in items)
        if plain and not any(p in self._overrides for p in group["params"]):
            params = list(group["params"])
            idle = [p for p in params if p.grad is None]
            looks = [Look(batch) for batch in batches]
            self._batches[number] = Kept(group, _signature(self, group), params, idle, batches, looks)

    def _add(self, batches: dict[Any, Batch], p: Tensor, config: dict[str, Any], seed: int, time: int) -> None:
        """Put a parameter into the batch of its kind."""
        grad = p.grad
        assert grad is not None
        check_gradient(type(self).__name__, p, grad, lambda: self._place(p))
        rule = self._rule(config)
        state = self._state_of(p, config, rule)
        bits8 = bool(rule.states) and state[rule.states[0].name].dtype == torch.uint8
        if sharding.is_sharded(p) and rule.norm:
            raise NotImplementedError("norms of sharded parameters (LAMB, LARS, max_unorm) are not supported")
        local, local_grad = sharding.local(p), sharding.local(grad)
        target = None
        if not local.is_contiguous():
            target, local = local, local.contiguous()
        mine = self._local_state(p, state)
        item = Item(local, local_grad.contiguous(), mine, seed, target, p)
        own = id(p) if p in self._overrides else 0
        paged = bool(rule.states) and state[rule.states[0].name].device != p.device
        key = (p.device, p.dtype, grad.dtype, bits8, paged, rule, own, time)
        if key not in batches:
            batches[key] = Batch(self.algorithm, rule, config, bits8, [])
        batches[key].items.append(item)

    def _place(self, p: Tensor) -> str:
        """What errors call a parameter."""
        for number, group in enumerate(self.param_groups):
            for index, other in enumerate(group["params"]):
                if other is p:
                    name = f" ({group['param_names'][index]})" if group.get("param_names") else ""
                    return f"parameter {index}{name} of group {number}"
        return "a parameter"

    def _rule(self, config: dict[str, Any]) -> Rule:
        """The algorithm under these settings."""
        return rule_for(self.algorithm, config)

    def _state_of(self, p: Tensor, config: dict[str, Any], rule: Rule) -> dict[str, Any]:
        """The states of a parameter in the containers that its settings ask for. RuntimeError where they do not fit."""
        state = self.state[p]
        bits8, paged = states.wants_8bit(p.numel(), config), states.wants_paging(p, config)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        fit(state, rule, p, bool(config["kahan"]), lambda: self._place(p))
        if bits8 and any(spec.name in state and state[spec.name].dtype != torch.uint8 for spec in rule.states):
            make_finite(state, rule, lambda: self._place(p))
        for spec in rule.states:
            if spec.name not in state:
                fill = float(config.get("initial_accumulator_value", 0.0)) if spec.name == "sum" else 0.0
                states.create(state, spec, p, bits8, paged, fill)
            elif (state[spec.name].dtype == torch.uint8) != bits8 or (state[spec.name].device != p.device) != paged:
                states.convert(state, spec, p, bits8, paged)
                self._locals.pop(p, None)
        if config["kahan"] and "compensation" not in state and p.dtype in (torch.bfloat16, torch.float16):
            state["compensation"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        for key, dtype in (("step", torch.float32), ("compensation", p.dtype)):
            if key in state and (state[key].device, state[key].dtype) != (p.device, dtype):  # the model has moved
                state[key] = state[key].to(p.device, dtype)
                self._locals.pop(p, None)
        return state

    def _local_state(self, p: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of the states of a sharded parameter, the same dict at every step."""
        if not sharding.is_sharded(p):
            return state
        marks, known = self._locals.get(p, ((), {}))
        if known.keys() != state.keys() or any(
            mark() is not state[key] for mark, key in zip(marks, known, strict=True)
        ):
            known = {key: sharding.local(value) for key, value in state.items()}
            self._locals[p] = tuple(weakref.ref(state[key]) for key in known), known
        return known

    def _dispatch(self, batch: Batch, key: Any) -> None:
        backend = self.backend if self.backend != "auto" else choose(batch)
        if backend in ("cuda", "triton"):
            from kbit.optim.gpu import step_gpu

            step_gpu(batch, self._plans, key, backend == "cuda")
        elif backend == "native":
            step_native(batch)
        else:
            step_plain(batch)

    # -- saving and loading -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """States and settings, as torch.optim has them; paged states have arrived in host memory when it returns."""
        synchronize(self.state)
        saved = super().state_dict()
        saved["param_groups"] = [{**group, ALGORITHM_KEY: self.algorithm} for group in saved["param_groups"]]
        if any(sharding.is_sharded(p) for group in self.param_groups for p in group["params"]):
            places = [(p, group) for group in self.param_groups for p in group["params"]]
            keys = [key for group in saved["param_groups"] for key in group["params"]]
            saved["state"] = dict(saved["state"])
            for key, (p, group) in zip(keys, places, strict=True):
                if key in saved["state"] and sharding.is_sharded(p):
                    rule = self._rule({**group, **self._overrides.get(p, {})})
                    saved["state"][key] = reshardable(saved["state"][key], p, rule)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, exactly; also checkpoints of bitsandbytes and torch.optim.

        States take the containers that this optimizer was constructed for: an 8-bit checkpoint loads into a 32-bit
        optimizer and the reverse, where fp32 states become codes in the next step, so that an `override` may come
        between. Raises ValueError where algorithm, groups, names, shapes or values do not fit; nothing is changed
        then.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            if (changed := hook(self, state_dict)) is not None:
                state_dict = changed
        groups = load_groups(self, state_dict)
        loaded = load_state(self, state_dict, groups)
        for group, new in zip(self.param_groups, groups, strict=True):
            group.clear()
            group.update(new)
        self.state.clear()
        self.state.update(loaded)
        self._forget()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _forget(self) -> None:
        """Drop what was prepared for the next step: states or settings have changed."""
        synchronize(self.state)
        self._plans.clear()
        self._batches.clear()
        self._locals.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_overrides": self._overrides, "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_overrides", {})
        self.__dict__.update(_plans={}, _batches={}, _locals={}, _seen=[])
        self.__dict__.setdefault("backend", "auto")


class Kept(NamedTuple):
    """The batches of a group's last step, and what they were made for."""

    group: dict[str, Any]
    signature: tuple[Any, ...]
    params: list[Tensor]
    idle: list[Tensor]  # parameters that had no gradient
    batches: list[Batch]
    looks: list[Look]


def _signature(optimizer: KbitOptimizer, group: dict[str, Any]) -> tuple[Any, ...]:
    """What a group's batches depend on beside its tensors."""
    keys = ("optim_bits", "min_8bit_size", "is_paged", "stochastic_rounding", "kahan", "skip_zeros")
    return optimizer._rule(group), len(group["params"]), *(group[key] for key in keys)
