"""`torch.compile(model, backend="kbit")`: Inductor, and one product for quantized layers that share their input.

Not imported by kbit itself: torch finds `compile_backend` by its entry point, users as `kbit.compile_backend`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor import config, custom_graph_pass
from torch.fx import Graph, GraphModule

from kbit.ops import choose, group

_SETTING = "post_grad_custom_pre_pass"
# Passes of this kind are told whether a graph is for inference. Where torch has none yet, products of training graphs
# are grouped too, which is as right: autograd is done with a graph when it comes here.
_AwareOfInference: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", custom_graph_pass.CustomGraphPass)


class GroupProducts(_AwareOfInference):
    """Inductor's graph pass: `kbit.ops.group` on graphs for inference, after the passes that a user has set."""

    def __init__(self, before: Sequence[Callable[..., Any]] = ()) -> None:
        self.before = tuple(before)

    def __call__(self, graph: Graph, is_inference: bool = True) -> None:
        for other in self.before:
            if isinstance(other, _AwareOfInference) and _AwareOfInference is not custom_graph_pass.CustomGraphPass:
                other(graph, is_inference=is_inference)
            else:
                other(graph)
        if is_inference:
            group.group_products(graph)

    def uuid(self) -> Any | None:
        """What the results depend on, for Inductor's cache; None, which turns that off, if a user's pass has none."""
        others = [getattr(other, "uuid", lambda: None)() for other in self.before]
        if any(other is None for other in others):
            return None
        return (custom_graph_pass.get_hash_for_files((group.__file__, choose.__file__)), *others)


def compile_backend(
    graph: GraphModule, inputs: list[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Any:
    """A backend of `torch.compile`: Inductor, with one product for quantized layers that share their input.

    `torch.compile(model, backend="kbit", fullgraph=True)`, or `backend=kbit.compile_backend` where kbit is not
    installed but imported from a folder. mode, options: torch.compile's, as Inductor takes them; a
    `post_grad_custom_pre_pass` among them or in `torch._inductor.config` runs before kbit's pass. Gradients, graphs
    for training, and products of more than 64 tokens are as with Inductor.
    """
    inductor = torch._TorchCompileInductorWrapper(mode, options, None)
    users = inductor.config.get(_SETTING, getattr(config, _SETTING))
    before = users if isinstance(users, (list, tuple)) else () if users is None else (users,)
    inductor.config[_SETTING] = GroupProducts(before)
    return inductor(graph, inputs)


def _reset() -> None:
    """torch._dynamo.reset() calls this: CUDA graphs of mode="reduce-overhead" are let go, as Inductor does."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


setattr(compile_backend, "reset", _reset)  # noqa: B010
