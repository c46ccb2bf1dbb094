"""Products that share an input, as one: a pass over a compiler's graph.

The query, key and value projections of an attention layer multiply the same `x`, as the gate and up projections of an
MLP do. At few tokens each of these products is too small to keep a GPU busy. The pass replaces them with one
`kbit::linear_4bit_group` or `kbit::linear_8bit_group`; modules, parameters and state dicts stay as they are.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from kbit.ops import choose

_ops = torch.ops.kbit
_aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class _Kind:
    """An operator of one product and the one of several: their arguments are in one order, x first."""

    group: Any
    per_weight: tuple[int, ...]  # positions of the arguments that become lists
    count: int  # of arguments that a product is called with

    def shared(self, arguments: tuple[Any, ...]) -> tuple[Hashable, ...]:
        """What has to be the same in all products of a group, but for x: plain values, and which tensors are there."""
        rest = tuple(a for i, a in enumerate(arguments) if i not in (0, *self.per_weight))
        return (*rest, self.count == 9 and arguments[3] is None)  # double-quantized, or not

    def arguments(self, members: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        """Those of the group, from those of its members."""
        first = members[0]
        return tuple([m[i] for m in members] if i in self.per_weight else one for i, one in enumerate(first))


_KINDS: dict[Any, _Kind] = {
    # x, weight, absmax, nested_absmax, nested_offset, bias, codebook, block_size, n
    _ops.linear_4bit.default: _Kind(_ops.linear_4bit_group.default, (1, 2, 3, 4, 5, 8), 9),
    # x, weight, absmax, bias, outlier_threshold, int8_activations
    _ops.linear_8bit.default: _Kind(_ops.linear_8bit_group.default, (1, 2, 3), 6),
}
_EAGER = "eager_input_vals"
# What may be repeated or moved: these read their first argument alone, and cost little.
_CASTS = {
    torch.ops.prims.convert_element_type.default,
    _aten._to_copy.default,
    _aten.view.default,
    _aten.reshape.default,
    _aten.alias.default,
    _aten.detach.default,
}


def group_products(graph: Graph) -> int:
    """Replace products that share their input and their format by group products; returns how many these are.

    graph: of operators without side effects but for writes that end a stretch, as Inductor's passes after autograd see
    it: nothing moves across a write. The results' order, shapes and dtypes stay.
    """
    count = 0
    position: dict[Node, float] = {node: at for at, node in enumerate(graph.nodes)}
    for members in list(_candidates(graph)):
        first = members[0]
        group = [first, *(m for m in members[1:] if _hoist(m, first, position))]
        for begin in range(0, len(group), choose.GROUP_WEIGHTS):
            part = group[begin : begin + choose.GROUP_WEIGHTS]
            if len(part) > 1:
                _replace(graph, part)
                count += 1
    return count


def _candidates(graph: Graph) -> Iterator[list[Node]]:
    """Products of one stretch between writes that share x and their format; two and more."""
    found: dict[Hashable, list[Node]] = {}
    stretch = 0
    stretches: dict[Node, int] = {}  # of every node, in which stretch its value was read
    for node in graph.nodes:
        stretches[node] = stretch
        if node.op != "call_function":
            continue
        kind = _KINDS.get(node.target)
        if kind is not None:
            arguments = _arguments(node)
            if len(arguments) == kind.count and not node.kwargs and _few_tokens(node):
                key = (stretch, node.target, _value(arguments[0], stretches), kind.shared(arguments))
                found.setdefault(key, []).append(node)
        elif _writes(node):
            stretch += 1
    for members in found.values():
        if len(members) > 1:
            yield members


def _arguments(node: Node, given: Any = None) -> tuple[Any, ...]:
    """Positional arguments, or those `given` for a node; graphs leave out a last one that is its default, None."""
    arguments = tuple(node.args if given is None else given)
    return (*arguments, None) if len(arguments) == 5 and node.target is _ops.linear_8bit.default else arguments


def _writes(node: Node) -> bool:
    """Whether an operator may change a tensor that others see."""
    schema = getattr(node.target, "_schema", None)
    return schema is None and node.is_impure() or schema is not None and schema.is_mutable


def _few_tokens(node: Node) -> bool:
    """Whether a product can have so few tokens that a group pays; a number known at run time only can."""
    value = node.meta.get("val")
    rows = 1
    for size in () if value is None else value.shape[:-1]:
        if not isinstance(size, int):
            return True
        rows *= size
    return rows <= choose.GROUP_TOKENS


def _value(node: Any, stretches: dict[Node, int]) -> Hashable:
    """The same for two nodes that are the same casts and views of one tensor between the same writes: each layer may
    cast its own x."""
    if not isinstance(node, Node) or node.target not in _CASTS:
        return node
    options = tuple((key, str(value)) for key, value in sorted(node.kwargs.items()))
    return (node.target, stretches[node], _value(node.args[0], stretches), str(node.args[1:]), options)


def _hoist(member: Node, first: Node, position: dict[Node, float]) -> bool:
    """Move what `member` needs, but for x, before `first`; False, and nothing moved, where that cannot be."""
    moved: list[Node] = []

    def movable(node: Node) -> bool:
        if position.get(node, float("inf")) < position[first] or node in moved:
            return True
        if node.op != "get_attr" and (node.op != "call_function" or node.target not in _CASTS):
            return False
        if not all(movable(source) for source in node.all_input_nodes):
            return False
        moved.append(node)
        return True

    needed = [argument for argument in member.args[1:] if isinstance(argument, Node)]
    if not all(movable(node) for node in needed):
        return False
    for node in moved:
        first.prepend(node)
        position[node] = position[first] - 0.5
    return True


def _replace(graph: Graph, members: list[Node]) -> None:
    """One group product at the first member's place."""
    first = members[0]
    kind = _KINDS[first.target]
    with graph.inserting_before(first):
        group = graph.call_function(kind.group, kind.arguments([_arguments(m) for m in members]))
        results = [graph.call_function(operator.getitem, (group, at)) for at in range(len(members))]
    group.meta.update({key: first.meta[key] for key in ("stack_trace", "nn_module_stack") if key in first.meta})
    group.meta["val"] = [m.meta.get("val") for m in members]
    eager: list[Any] = [m.meta.get(_EAGER) for m in members]
    if all(eager):  # how Inductor knows the strides in which an operator wants its inputs
        values = [_arguments(m, arguments) for m, (arguments, _) in zip(members, eager, strict=True)]
        group.meta[_EAGER] = (kind.arguments(values), {})
    for member, result in zip(members, results, strict=True):
        result.meta.update({key: value for key, value in member.meta.items() if key != _EAGER})
        member.replace_all_uses_with(result)
        graph.erase_node(member)
