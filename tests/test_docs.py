"""The pages in docs/ agree with the code."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import transformers
from test_imports import ROOMS

import bco_fast
from bco_fast import _moved, cli
from bco_fast.losses import OBJECTIVES
from bco_fast.online.config import OnlineConfig
from bco_fast.training.config import FeedbackConfig

DOCS = Path(__file__).parents[1] / "docs"
SOURCE = "".join(path.read_text() for path in (DOCS.parent / "bco_fast" / "cli").glob("*.py"))
FLAGS = {*OnlineConfig.__dataclass_fields__, *re.findall(r'"--([a-z_0-9]+)"', SOURCE), "config_file"}
"""Of every command; config_file is accelerate's."""
COMMAND = re.compile(r"  --|(bco-fast|accelerate|torchrun|srun|python|hf|pip|vllm|make|curl|[A-Z_]+=\S+) ")
PAGE = (DOCS / "objectives.md").read_text()


def _row(name):
    return next(line for line in PAGE.splitlines() if re.match(rf"\|[^|]*`{name}`", line))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_listed_with_its_defaults(name):
    row, objective = _row(name), OBJECTIVES[name]
    if objective.beta is None:
        assert "`beta`" not in row
    else:
        assert f"`beta` {objective.beta:g}" in row
    for option in objective.options:
        default = FeedbackConfig.__dataclass_fields__[option].default
        if option.startswith("f_"):  # of several objectives, under the table
            assert f"`{name}`" in _row("f_divergence_type")
            assert f"`{option}` {default}" in _row("f_divergence_type")
        else:
            assert f"`{option}` {default:g}" in row
    assert ("no reference" in row) is not objective.reference
    if objective.data != "pairs":
        assert f"`{'label' if objective.data == 'labels' else 'score'}`" in row
        assert ("δ an EMA" in row) is (objective.shift == "ema")


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda p: p.name)
def test_examples_run_and_flags_exist(page):
    text = page.read_text()
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(code, page.name, "exec"), {})  # noqa: S102 - our own page
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    if page.stem in ("objectives", "online", "recipes", "getting_started", "choosing", "troubleshooting"):
        for flag in re.findall(r"--([a-z_0-9]+)", text):
            assert flag in FLAGS, flag


def test_the_api_pages_name_what_exists():
    named = [
        name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    ]
    assert len(named) > 20
    assert {name.rpartition(".")[2] for name in named if name.count(".") == 1} > {"fused_linear_logps", "BCOTrainer"}
    for name in named:
        home, _, last = name.rpartition(".")
        assert not (last in bco_fast.__all__ and home != "bco_fast"), f"{name}: bco_fast.{last} is its public path"
        if last in bco_fast.__all__:
            assert getattr(bco_fast, last).__doc__, name
            continue
        if f"{home}.{last}" in sys.modules or importlib.util.find_spec(home).submodule_search_locations is not None:
            assert importlib.import_module(name).__doc__, name
        else:
            assert getattr(importlib.import_module(home), last).__doc__, name
    for path, config in re.findall(
        r"<!-- options of (\S+) (\w+) -->", "".join(p.read_text() for p in DOCS.rglob("*.md"))
    ):
        assert f"class {config}(" in (DOCS.parent / path).read_text()


def test_every_page_is_on_the_site_and_its_links_lead_somewhere():
    site = (DOCS.parent / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert f": {page.relative_to(DOCS).as_posix()}\n" in site, page
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page, target)


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="the page holds the texts of transformers 5")
def test_the_reference_of_the_command_line_is_that_of_the_parsers():
    spec = importlib.util.spec_from_file_location("_cli", DOCS / "_cli.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    now = module.page()
    assert now.count("\n## ") == len(cli.COMMANDS)
    assert all(f"| `--{flag}" in now for flag in ("beta", "resamples", "converter", "older_than"))
    assert now == module.PAGE.read_text(), "run `make help-pages`"


def test_commands_fit_a_line_of_the_site():
    for page in (DOCS.parent / "README.md", *DOCS.glob("*.md")):
        for block in re.findall(r"^```(?:bash|sh)?\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.splitlines():
                if page.name != "cli.md" and COMMAND.match(line):
                    assert len(line) <= 82, f"{page.name}: break with a backslash: {line}"


def test_the_changelog_lists_every_import_path_that_moved():
    rows = re.findall(r"^\| `bco_fast\.(\w+)` \| (.+) \|$", (DOCS.parent / "CHANGELOG.md").read_text(), re.M)
    listed = {old: tuple(re.findall(r"`bco_fast\.([\w.]+)`", new)) for old, new in rows}
    assert listed == _moved.MODULES


def test_the_layout_has_every_room_in_the_order_of_imports():
    named = re.findall(r"^\| `bco_fast/(\w+)/`", (DOCS / "layout.md").read_text(), re.M)
    assert named == [room for room in ROOMS if (DOCS.parent / "bco_fast" / room).is_dir()]


def test_a_release_has_one_version():
    project = re.search(r'^version = "(\S+)"$', (DOCS.parent / "pyproject.toml").read_text(), re.M)[1]
    cited = re.search(r"^version: (\S+)$", (DOCS.parent / "CITATION.cff").read_text(), re.M)[1]
    noted = re.search(r"^## \[(\d\S*)\]", (DOCS.parent / "CHANGELOG.md").read_text(), re.M)[1]
    assert project == bco_fast.__version__ == cited == noted
