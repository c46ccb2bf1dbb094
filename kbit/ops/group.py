"""Products that share an input, as one: a pass over a compiler's graph.

The query, key and value projections of an attention layer multiply the same `x`, as the gate and up projections of an
MLP do. At few tokens each of these products is too small to keep a GPU busy. The pass replaces them with one
`kbit::linear_4bit_group`; modules, parameters and state dicts stay as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from kbit.ops import choose

_ops = torch.ops.kbit
_aten = torch.ops.aten
_WEIGHT, _ABSMAX, _NESTED, _OFFSET, _BIAS = range(1, 6)  # positions in the operator's arguments; x is 0
_CODEBOOK, _BLOCK_SIZE, _N = range(6, 9)
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


def group_linear_4bit(graph: Graph) -> int:
    """Replace 4-bit products that share their input and their format by group products; returns how many these are.

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
    """Products of one stretch between writes that share x, scale layout, codebook and block size; two and more."""
    found: dict[Hashable, list[Node]] = {}
    stretch = 0
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if _writes(node):
            stretch += 1
        elif node.target is _ops.linear_4bit.default and len(node.args) == 9 and _few_tokens(node):
            x, nested = node.args[0], node.args[_NESTED] is None
            key = (stretch, _value(x), nested, node.args[_CODEBOOK], node.args[_BLOCK_SIZE])
            found.setdefault(key, []).append(node)
    for members in found.values():
        if len(members) > 1:
            yield members


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


def _value(node: Any) -> Hashable:
    """The same for two nodes that are the same casts and views of one tensor: each layer may cast its own x."""
    if not isinstance(node, Node) or node.target not in _CASTS:
        return node
    options = tuple((key, str(value)) for key, value in sorted(node.kwargs.items()))
    return (node.target, _value(node.args[0]), str(node.args[1:]), options)


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

    needed = [argument for argument in member.args[_WEIGHT:] if isinstance(argument, Node)]
    if not all(movable(node) for node in needed):
        return False
    for node in moved:
        first.prepend(node)
        position[node] = position[first] - 0.5
    return True


def _replace(graph: Graph, members: list[Node]) -> None:
    """One group product at the first member's place."""
    first = members[0]
    with graph.inserting_before(first):
        group = graph.call_function(_ops.linear_4bit_group.default, _group_arguments([m.args for m in members]))
        results = [graph.call_function(operator.getitem, (group, at)) for at in range(len(members))]
    group.meta.update({key: first.meta[key] for key in ("stack_trace", "nn_module_stack") if key in first.meta})
    group.meta["val"] = [m.meta.get("val") for m in members]
    eager: list[Any] = [m.meta.get(_EAGER) for m in members]
    if all(eager):  # how Inductor knows the strides in which an operator wants its inputs
        group.meta[_EAGER] = (_group_arguments([arguments for arguments, _ in eager]), {})
    for member, result in zip(members, results, strict=True):
        result.meta.update({key: value for key, value in member.meta.items() if key != _EAGER})
        member.replace_all_uses_with(result)
        graph.erase_node(member)


def _group_arguments(members: list[Any]) -> tuple[Any, ...]:
    """Arguments of the group operator from those of its members."""
    columns = [[arguments[i] for arguments in members] for i in (_WEIGHT, _ABSMAX, _NESTED, _OFFSET, _BIAS, _N)]
    x, codebook, block_size = (members[0][i] for i in (0, _CODEBOOK, _BLOCK_SIZE))
    return (x, *columns[:-1], codebook, block_size, columns[-1])
