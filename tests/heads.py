"""Cases for the fused head, the float64 oracle, and the measure of right: relative Frobenius error, never absolute."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field
from unittest import mock

import torch

from bco_fast import fused_linear_logps

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
OPTIONS = {
    "plain": {},
    "everything": {"logit_scale": 0.7, "softcap": 5.0, "temperature": 1.3},
    "softcap": {"softcap": 30.0},
    "scale": {"logit_scale": 0.0625, "temperature": 0.5},
}


@dataclass
class Case:
    """Inputs of one call in float64, and what comes back from upstream."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    bias: torch.Tensor | None = None
    upstream: torch.Tensor | None = None
    upstream_entropy: torch.Tensor | None = None
    options: dict = field(default_factory=dict)


def case(n, v, d, *, seed=0, spread=3.0, center=0.0, bias=False, ignored=0.2, zeros=0.2, entropy=False, options=None):
    """Logits of standard deviation `spread` around `center`; some rows ignored, some without upstream gradient."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight = normal(n, d), normal(v, d) * spread / d**0.5
    if center:  # one direction that all rows share lifts all their logits alike
        hidden[:, 0] = center
        weight[:, 0] = 1.0
    targets = torch.randint(0, v, (n,), generator=g)
    targets[torch.rand(n, generator=g) < ignored] = -100
    upstream = normal(n) * (torch.rand(n, generator=g) >= zeros)
    return Case(
        hidden,
        weight,
        targets,
        normal(v) if bias else None,
        upstream,
        normal(n) if entropy else None,
        OPTIONS[options or "plain"],
    )


def run(case: Case, backend: str, dtype: torch.dtype, *, frozen=(), device="cpu", **kwargs) -> dict[str, torch.Tensor]:
    """Outputs and gradients of one backend; `plain` is PyTorch with materialised logits in `dtype`."""
    tensors = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    leaves = {
        name: t.to(device, dtype).detach().requires_grad_(name not in frozen)
        for name, t in tensors.items()
        if t is not None
    }
    targets = case.targets.to(device)
    entropy = case.upstream_entropy is not None
    on_device = Case(leaves["hidden"], leaves["weight"], targets, leaves.get("bias"), options=case.options)
    out = fused_call(on_device, backend, entropy, **kwargs)
    results = {"logps": out[0] if entropy else out}
    total = (results["logps"].double() * case.upstream.to(device)).sum()
    if entropy:
        results["entropy"] = out[1]
        total = total + (out[1].double() * case.upstream_entropy.to(device)).sum()
    if total.requires_grad:
        total.backward()
    return {k: t.detach() for k, t in results.items()} | {
        f"d_{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None
    }


def fused_call(case: Case, backend: str, entropy: bool, **kwargs):
    """`fused_linear_logps` on the case's own tensors, or `plain`."""
    call = plain if backend == "plain" else functools.partial(fused_linear_logps, backend=backend.removesuffix(" fold"))
    arguments = {"bias": case.bias, "return_entropy": entropy, **case.options, **kwargs}
    with forced(backend):
        return call(case.hidden, case.weight, case.targets, **arguments)


def forced(backend: str):
    """`triton fold` is the triton backend with its other forward."""
    if not backend.startswith("triton"):
        return contextlib.nullcontext()
    method = "fold" if backend.endswith("fold") else "fused"
    return mock.patch("bco_fast.kernels.configs.forward_method", return_value=method)


def plain(hidden, weight, targets, *, bias=None, logit_scale=1.0, softcap=None, temperature=1.0, return_entropy=False):
    """What everyone writes: logits in the input's dtype, then float32 log-softmax."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    log_probs = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    keep = targets != -100
    logps = torch.where(keep, log_probs.gather(-1, torch.where(keep, targets, 0)[:, None])[:, 0], 0.0)
    entropy = torch.where(keep, -(log_probs.exp() * log_probs).sum(-1), 0.0)
    return (logps, entropy) if return_entropy else logps


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius; infinite where one is zero and the other is not, so a zeroed gradient has error 1 at least."""
    ours, truth = ours.double().cpu(), truth.double().cpu()
    difference = float((ours - truth).norm())
    if difference == 0:
        return 0.0
    size = float(truth.norm())
    return difference / size if size else float("inf")


def errors(case: Case, backend: str, dtype: torch.dtype, *, device="cpu", **kwargs) -> dict[str, tuple[float, float]]:
    """(our error, plain PyTorch's) of every output and gradient, both against float64 of the rounded inputs."""
    rounded = Case(
        *(None if t is None else t.to(dtype).double() for t in (case.hidden, case.weight)),
        case.targets,
        None if case.bias is None else case.bias.to(dtype).double(),
        case.upstream,
        case.upstream_entropy,
        case.options,
    )
    frozen = kwargs.get("frozen", ())
    truth = run(rounded, "reference", torch.float64, frozen=frozen, device=device)
    common = run(case, "plain", dtype, frozen=frozen, device=device)
    ours = run(case, backend, dtype, device=device, **kwargs)
    assert ours.keys() == truth.keys()
    assert all(ours[name].shape == expected.shape for name, expected in truth.items())
    return {name: (relative_error(ours[name], x), relative_error(common[name], x)) for name, x in truth.items()}


def excess(error: float, allowed: float, dtype: torch.dtype) -> float:
    """How many times plain PyTorch's error lies beyond 4 eps; the bound is 2."""
    beyond = max(error - 4 * torch.finfo(dtype).eps, 0.0)
    return beyond / allowed if allowed else (float("inf") if beyond else 0.0)


def check(case: Case, backend: str, dtype: torch.dtype, **kwargs) -> dict[str, tuple[float, float]]:
    """Every output and gradient within 2x plain PyTorch's error + 4 eps."""
    found = errors(case, backend, dtype, **kwargs)
    for name, (error, allowed) in found.items():
        assert excess(error, allowed, dtype) <= 2, f"{name}: {error:.2e}, plain PyTorch {allowed:.2e}"
    return found
