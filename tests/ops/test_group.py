"""`linear_4bit_group` equals its products one by one, and the graph pass that finds them changes nothing else."""

from __future__ import annotations

import operator
import shutil

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import kbit
from kbit import ops
from kbit.ops import choose
from kbit.ops.group import group_products
from tests.ops.helpers import close, weight_4bit, weight_8bit

PRODUCT, GROUP = torch.ops.kbit.linear_4bit.default, torch.ops.kbit.linear_4bit_group.default
PRODUCT_8BIT, GROUP_8BIT = torch.ops.kbit.linear_8bit.default, torch.ops.kbit.linear_8bit_group.default
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def grouped(weights, biases, x, label="nf4", block_size=64):
    """The group operator over what `weight_4bit` gave."""
    columns = [list(column) for column in zip(*(parts for parts, _ in weights), strict=True)]
    return GROUP(x, *columns, biases, label[:3], block_size, [w.shape[0] for _, w in weights])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label", ["nf4", "nf4-plain", "fp4", "fp4-plain"])
def test_a_group_equals_its_products(label, dtype):
    weights = [weight_4bit(n, 128, label) for n in (96, 32, 32, 7)]
    biases = [torch.randn(96).to(dtype), None, torch.randn(32).to(dtype), None]
    for shape in ((1, 128), (128,), (2, 3, 128), (64, 128), (0, 128)):
        x = torch.randn(shape).to(dtype)
        outs = grouped(weights, biases, x, label)
        for out, (parts, w), bias in zip(outs, weights, biases, strict=True):
            assert torch.equal(out, PRODUCT(x, *parts, bias, label[:3], 64, w.shape[0]))
            expected = x.double() @ w.to(dtype).double().T + (0 if bias is None else bias.double())
            close(out, expected)


@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_groups_of_large_weights_equal_their_products_on_any_number_of_threads(block_size):
    """On a CPU threads share the rows of all weights out: pieces end within weights, and begin with the next one."""
    weights = [weight_4bit(n, 512, block_size=block_size) for n in (601, 1, 130, 257)]
    biases = [None, torch.randn(1).bfloat16(), None, torch.randn(257).bfloat16()]
    threads = torch.get_num_threads()
    for m in (1, 3, 9, 20):
        x = torch.randn(m, 1024, dtype=torch.bfloat16)[:, ::2]  # rows that are not contiguous
        expected = [
            PRODUCT(x, *parts, bias, "nf4", block_size, w.shape[0])
            for (parts, w), bias in zip(weights, biases, strict=True)
        ]
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                outs = grouped(weights, biases, x, block_size=block_size)
                assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
        finally:
            torch.set_num_threads(threads)


def test_a_bias_of_another_size_is_an_error():
    weights = [weight_4bit(8, 64), weight_4bit(16, 64)]
    x = torch.randn(2, 64)
    with pytest.raises(RuntimeError, match="takes a bias|size of tensor|expanded size"):
        grouped(weights, [torch.randn(8), torch.randn(15)], x)
    with pytest.raises(RuntimeError, match="takes a bias|size of tensor|expanded size"):
        PRODUCT(x, *weights[0][0], torch.randn(7), "nf4", 64, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_int8_group_equals_its_products(dtype):
    weights = [weight_8bit(n, 128) for n in (96, 32, 7)]
    columns = [list(column) for column in zip(*(parts for parts, _ in weights), strict=True)]
    biases = [torch.randn(96).to(dtype), None, None]
    for shape in ((1, 128), (128,), (2, 3, 128), (64, 128), (0, 128)):
        x = torch.randn(shape).to(dtype)
        for asked in (None, True, False):
            outs = GROUP_8BIT(x, *columns, biases, 2.5, asked)
            for out, (parts, _), bias in zip(outs, weights, biases, strict=True):
                assert torch.equal(out, PRODUCT_8BIT(x, *parts, bias, 2.5, asked))


def test_lists_of_unlike_lengths_are_an_error():
    weights = [weight_4bit(8, 64) for _ in range(2)]
    columns = [list(column) for column in zip(*(parts for parts, _ in weights), strict=True)]
    x = torch.randn(2, 64, device="meta")
    columns = [[None if t is None else t.to("meta") for t in column] for column in columns]
    with pytest.raises(RuntimeError, match="2 weights has 1 values of bias"):
        GROUP(x, *columns, [None], "nf4", 64, [8, 8])
    with pytest.raises(RuntimeError, match="256 bytes of codes|320 bytes of codes"):
        GROUP(x, *columns, [None, None], "nf4", 64, [8, 10])


def test_choice_of_one_launch():
    path = choose.linear_4bit_group_path
    assert path(1, [4096, 1024, 1024], 4096, 64, 2, (9, 0), True) == "hopper"
    assert path(64, [14336, 14336], 4096, 64, 2, (9, 0), True) == "hopper"
    for m, n, k, size, capability, aligned in [
        (65, [4096, 1024], 4096, 2, (9, 0), True),
        (0, [4096, 1024], 4096, 2, (9, 0), True),
        (1, [4096, 1024], 4096, 4, (9, 0), True),
        (1, [4096, 1024], 4096, 2, (9, 0), False),
        (1, [4096, 1024], 4096, 2, (8, 9), True),
        (1, [4096, 1024], 4096, 2, None, True),
        (1, [4096, 1024], 4090, 2, (9, 0), True),
        (1, [4096, 0], 4096, 2, (9, 0), True),
        (1, [4096], 4096, 2, (9, 0), True),
        (1, [64] * 5, 4096, 2, (9, 0), True),
    ]:
        assert path(m, n, k, 64, size, capability, aligned) == "separate"
    assert choose.linear_8bit_group_path("weight_only", 64, [4096, 1024], 4096, 2, (9, 0)) == "hopper"
    for way, m, k, capability in [
        ("llm_int8", 8, 4096, (9, 0)),
        ("weight_only", 65, 4096, (9, 0)),
        ("weight_only", 8, 4090, (9, 0)),
        ("weight_only", 8, 4096, (8, 0)),
    ]:
        assert choose.linear_8bit_group_path(way, m, [4096, 1024], k, 2, capability) == "separate"


# ---- the pass, on graphs ----


def linear(x, weight, label="nf4", bias=None):
    parts, w = weight
    return ops.linear_4bit(x, *parts, bias, label[:3], 64, w.shape[0])


def changed(function, *inputs):
    """(graph module after the pass, group products, products left alone); values must stay."""
    module = make_fx(function)(*inputs)
    count = group_products(module.graph)
    module.graph.lint()
    module.recompile()
    targets = [node.target for node in module.graph.nodes]
    assert targets.count(GROUP) == count
    expected, actual = function(*inputs), module(*inputs)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    return module, count, targets.count(PRODUCT)


def test_products_of_one_input_become_one():
    q, k, v = (weight_4bit(n, 64) for n in (64, 32, 32))

    def function(x):
        h = x * 2
        a = linear(h, q).relu()
        b = linear(h, k) + a[:, :32]
        return a, b, linear(h, v), linear(a, q)

    module, groups, single = changed(function, torch.randn(3, 64))
    assert (groups, single) == (1, 1)
    group = next(node for node in module.graph.nodes if node.target is GROUP)
    assert group.args[-1] == [64, 32, 32] and len(group.users) == 3
    assert all(user.target is operator.getitem for user in group.users)


def test_more_than_a_launch_holds_become_several():
    weights = [weight_4bit(8 * (i + 1), 64) for i in range(9)]
    _, groups, single = changed(lambda x: tuple(linear(x, w) for w in weights), torch.randn(3, 64))
    assert (groups, single) == (2, 1)


def test_other_inputs_and_formats_stay_apart():
    nf4, fp4, plain = weight_4bit(8, 64), weight_4bit(8, 64, "fp4"), weight_4bit(8, 64, "nf4-plain")

    def function(x, y):
        return linear(x, nf4), linear(y, nf4), linear(x, fp4, "fp4"), linear(x, plain)

    assert changed(function, torch.randn(3, 64), torch.randn(3, 64))[1:] == (0, 4)


def test_int8_products_become_one_unless_they_were_asked_to_multiply_otherwise():
    a, b, c, d = (weight_8bit(n, 64)[0] for n in (8, 16, 8, 8))
    bias = torch.randn(16)

    def function(x):
        same = ops.linear_8bit(x, *a, None, 6.0), ops.linear_8bit(x, *b, bias, 6.0)
        return *same, ops.linear_8bit(x, *c, None, 5.0), ops.linear_8bit(x, *d, None, 6.0, True)

    module = make_fx(function)(torch.randn(3, 64))
    assert group_products(module.graph) == 1
    module.recompile()
    groups = [node for node in module.graph.nodes if node.target is GROUP_8BIT]
    assert len(groups) == 1 and len(groups[0].args[1]) == 2
    x = torch.randn(3, 64)
    for out, expected in zip(module(x), function(x), strict=True):
        assert torch.equal(out, expected)


def test_many_tokens_stay_apart():
    weights = [weight_4bit(8, 64) for _ in range(2)]
    for m, groups in ((64, 1), (65, 0)):
        assert changed(lambda x: tuple(linear(x, w) for w in weights), torch.randn(m, 64))[1] == groups


def test_an_input_that_is_written_in_between():
    a, b, c, d = (weight_4bit(8, 64) for _ in range(4))

    def function(x):
        x = x.clone()
        first = linear(x, a), linear(x, b)
        x.add_(1)
        return *first, linear(x, c), linear(x, d)

    assert changed(function, torch.randn(3, 64))[1:] == (2, 0)


def test_what_a_product_needs_moves_where_it_can():
    a, b, c = (weight_4bit(8, 64) for _ in range(3))

    def function(x, bias):
        first = linear(x.bfloat16(), a)
        second = linear(x.bfloat16(), b, bias=bias.bfloat16())  # casts of its own
        third = linear(x.bfloat16(), c, bias=(first + second)[0])  # a bias that is there only later
        return first, second, third

    module, groups, single = changed(function, torch.randn(3, 64), torch.randn(8))
    assert (groups, single) == (1, 1)


# ---- the backend ----

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="inductor needs a C++ compiler"
)


@pytest.fixture
def backend():
    """ "kbit" where kbit is installed with its entry points, else the function that this stands for."""
    torch._dynamo.reset()
    yield "kbit" if "kbit" in torch._dynamo.list_backends(exclude_tags=()) else kbit.compile_backend
    torch._dynamo.reset()


class Recorder:
    """A pass of the user's own, behind all others."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph):
        targets = [node.target for node in graph.nodes]
        both = targets.count(GROUP) + targets.count(GROUP_8BIT), targets.count(PRODUCT) + targets.count(PRODUCT_8BIT)
        self.graphs.append(both)


def mlp(bits=4):
    class Mlp(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = torch.nn.Linear(64, 128), torch.nn.Linear(64, 128, bias=False)
            self.down = torch.nn.Linear(128, 64)

        def forward(self, x):
            return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))

    return kbit.quantize_model(torch.nn.Sequential(Mlp(), Mlp()), kbit.KbitConfig(bits=bits, skip_modules=[]))


@needs_compiler
@pytest.mark.parametrize("bits", [4, 8])
def test_backend_groups_for_inference_and_leaves_training_alone(backend, bits):
    model, seen = mlp(bits), Recorder()
    keys = list(model.state_dict())
    compiled = torch.compile(model, backend=backend, fullgraph=True, options={"post_grad_custom_post_pass": seen})
    x = torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert seen.graphs == [(2, 2)] and list(model.state_dict()) == keys
    seen.graphs.clear()
    x.requires_grad_()
    expected = torch.autograd.grad(model(x).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], expected)
    assert (0, 6) in seen.graphs and all(groups == 0 for groups, _ in seen.graphs)


@needs_compiler
def test_backend_runs_a_users_own_pass_first(backend):
    model, users, behind = mlp(), Recorder(), Recorder()
    options = {"post_grad_custom_pre_pass": users, "post_grad_custom_post_pass": behind}
    compiled = torch.compile(model, backend=backend, options=options)
    with torch.no_grad():
        compiled(torch.randn(3, 64))
    assert users.graphs == [(0, 6)] and behind.graphs == [(2, 2)]
    torch._dynamo.reset()
    with torch._inductor.config.patch(post_grad_custom_pre_pass=users), torch.no_grad():
        torch.compile(model, backend=backend)(torch.randn(3, 64))
    assert len(users.graphs) == 2


def test_the_pass_names_its_version_to_inductors_cache():
    from kbit.ops.compiler import GroupProducts

    alone = GroupProducts().uuid()
    assert alone is not None and alone == GroupProducts().uuid()
    assert GroupProducts([Recorder()]).uuid() is None
    assert GroupProducts([GroupProducts()]).uuid() not in (None, alone)


@needs_compiler
def test_backend_refuses_an_option_that_inductor_does_not_know(backend):
    with pytest.raises(Exception, match="no_such_option"), torch.no_grad():
        torch.compile(mlp(), backend=backend, options={"no_such_option": 1})(torch.randn(1, 64))


@needs_compiler
@pytest.mark.slow
def test_backend_on_a_llama(backend):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    kbit.quantize_model(model, kbit.KbitConfig(bits=4))
    seen = Recorder()
    compiled = torch.compile(model, backend=backend, fullgraph=True, options={"post_grad_custom_post_pass": seen})
    ids = torch.randint(0, 320, (2, 5))
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert seen.graphs == [(4, 4)]  # q, k, v and gate, up of each layer; o and down by themselves


def test_casts_on_two_sides_of_a_write_are_two_inputs():
    graph = torch.fx.Graph()
    x, other = graph.placeholder("x"), graph.placeholder("other")
    cast = torch.ops.prims.convert_element_type.default

    def product(index, given):
        parts = [f"{index}.{name}" for name in ("weight", "absmax", "nested_absmax", "nested_offset")]
        arguments = [graph.get_attr(name) for name in parts]
        return graph.call_function(torch.ops.kbit.linear_4bit.default, (given, *arguments, None, "nf4", 64, 32))

    first = graph.call_function(cast, (x, torch.float32))
    graph.call_function(torch.ops.aten.copy_.default, (x, other))
    second = graph.call_function(cast, (x, torch.float32))
    graph.output((product(0, first), product(1, second)))
    assert group_products(graph) == 0
