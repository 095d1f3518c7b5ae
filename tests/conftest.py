"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is imported."""

import os
import random
import signal

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
PATIENCE = 5  # a test hangs if it takes this many times its limit on the clock: a loaded machine is no failure
os.fsync = lambda handle: None
"""No test cuts the power: what is synced, and in which order, is tested by its calls. Waiting for a disk took 25 s of the fast tests."""


def pytest_addoption(parser):
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in a random order, made from this seed")


def pytest_collection_modifyitems(config, items):
    seed = config.getoption("--shuffle")
    if seed is not None:
        random.Random(seed).shuffle(items)  # noqa: S311
    for item in items:
        marker = item.get_closest_marker("timeout")
        item.processor_seconds = float(marker.args[0] if marker else config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(PATIENCE * item.processor_seconds), append=False)
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """`timeout` is a limit of this process's processor seconds, which other work on the machine does not use up."""

    def over(*_):
        pytest.fail(f"{item.processor_seconds:g} processor seconds were not enough")

    before = signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, item.processor_seconds)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def pytest_terminal_summary(terminalreporter):
    """What a test has measured, `record_property("figure", ...)`, shows in every run, not only with -s."""
    figures = [
        f"{report.nodeid.rpartition('::')[2]}: {text}"
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for name, text in getattr(report, "user_properties", ())
        if name == "figure"
    ]
    if figures:
        terminalreporter.section("figures")
        for line in figures:
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _reproducible(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("BCO_FAST_CACHE", str(tmp_path / "default_cache"))


@pytest.fixture
def low_precision_matmuls(monkeypatch):
    """The `torch` backend as on a GPU: its matmuls take bf16 and fp16 and give float32. The CPU has no such matmul, so it
    is stood in for."""
    from bco_fast.head.backends import products, walk
    from bco_fast.head.sparse import torch as sparse

    real = torch.mm

    def mm(a, b, *, out_dtype=None, out=None):
        if out_dtype is None:
            return real(a, b, out=out)
        assert a.dtype == b.dtype
        assert a.dtype.itemsize == 2
        return real(a.float(), b.float(), out=out)

    monkeypatch.setattr(torch, "mm", mm)
    for module in (products, walk, sparse):
        monkeypatch.setattr(module, "operand", lambda x, dtype: x.to(dtype))


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN, so that a value nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
