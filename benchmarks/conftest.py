"""The sizes of `bco-fast bench` for `pytest benchmarks/`."""


def pytest_addoption(parser):
    group = parser.getgroup(
        "lm-head sizes", "in place of the three models' sizes; what is left out is a quarter of Qwen2.5-0.5B's"
    )
    group.addoption("--tokens", type=int, metavar="N", help="completion tokens of a batch")
    group.addoption("--hidden", type=int, metavar="D", help="hidden size")
    group.addoption("--vocab", type=int, metavar="V", help="vocabulary size")


def pytest_generate_tests(metafunc):
    if "shape" not in metafunc.fixturenames:
        return
    own = {name: metafunc.config.getoption(name) for name in ("tokens", "hidden", "vocab")}
    for name, value in own.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}")
    shapes = metafunc.module.SHAPES
    if any(own.values()):
        n, d, v, _ = shapes["Qwen2.5-0.5B"]
        shapes = {"given": (own["tokens"] or n, own["hidden"] or d, own["vocab"] or v, None)}
    metafunc.parametrize("shape", shapes.values(), ids=shapes)
