"""The operator is one registered node: opcheck, torch.compile, checkpointing, and a clear no to double backward."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bco_fast import fused_linear_logps


def _arguments(backend, *, bias, entropy, frozen, softcap):
    hidden = torch.randn(6, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=not frozen)
    targets = torch.tensor([0, 3, -100, 19, 5, -100])
    b = torch.randn(20, requires_grad=not frozen) if bias else None
    recompute = not frozen or entropy
    return (
        hidden,
        weight,
        targets,
        b,
        0.7,
        softcap,
        1.1,
        -100,
        backend,
        1 << 20,
        0.0,
        entropy,
        frozen,
        recompute,
        None,
    )


FLAGS = list(itertools.product([False, True], [False, True], [None, 5.0]))


@pytest.mark.parametrize(
    ("backend", "bias", "entropy", "softcap"),
    [("torch", *flags) for flags in FLAGS]
    + [
        pytest.param("triton", *flags, marks=() if flags in (FLAGS[0], FLAGS[-1]) else pytest.mark.slow)
        for flags in FLAGS
    ],
)
def test_opcheck(backend, bias, entropy, softcap):
    options = {"bias": bias, "entropy": entropy, "softcap": softcap}
    torch.library.opcheck(torch.ops.bco_fast.linear_logps, _arguments(backend, frozen=False, **options))
    torch.library.opcheck(torch.ops.bco_fast.linear_logps, _arguments(backend, frozen=True, **options))


def test_compile_without_graph_breaks_over_sizes():
    weight = torch.randn(50, 16, requires_grad=True)
    compiles = 0

    def backend(graph, inputs):
        nonlocal compiles
        compiles += 1
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def loss(hidden, targets):
        return -fused_linear_logps(hidden * 2, weight, targets).sum()

    torch._dynamo.reset()
    for n in (7, 12, 30):
        hidden, targets = torch.randn(n, 16), torch.randint(0, 50, (n,))
        eager = -fused_linear_logps(hidden * 2, weight, targets).sum()
        assert torch.equal(loss(hidden, targets), eager)
    assert compiles <= 2


def test_compiled_gradients_are_eager_gradients():
    weight, hidden, targets = torch.randn(50, 16), torch.randn(9, 16), torch.randint(0, 50, (9,))

    def gradients(function):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        function(*leaves).backward()
        return [leaf.grad for leaf in leaves]

    def loss(h, w):
        return -fused_linear_logps(h.tanh(), w, targets).mean()

    torch._dynamo.reset()
    for ours, eager in zip(
        gradients(torch.compile(loss, fullgraph=True, backend="aot_eager")), gradients(loss), strict=True
    ):
        assert torch.allclose(ours, eager, atol=1e-7)


def test_activation_checkpointing_and_retain_graph():
    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (9,))

    def loss(h, w):
        return fused_linear_logps(h, w, targets).sum()

    plain = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    again = checkpoint(loss, hidden, weight, use_reentrant=False)
    first = torch.autograd.grad(again, (hidden, weight))
    kept = loss(hidden, weight)
    second = [torch.autograd.grad(kept, (hidden, weight), retain_graph=True) for _ in range(2)]
    for grads in (first, *second):
        for ours, expected in zip(grads, plain, strict=True):
            assert torch.equal(ours, expected)


def test_double_backward_is_refused():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(
        fused_linear_logps(hidden, weight, torch.tensor([0, 1, 2])).square().sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
