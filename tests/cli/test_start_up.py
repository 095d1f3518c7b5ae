"""Before anything is loaded: what a GPU turns on, packages that are missing, and recipes by name."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from small_runs import config

from bco_fast import cli
from bco_fast.cli import gpu_defaults, recipes, train
from bco_fast.cli.config_file import recipe_path

DEFAULTS = {"bf16": False, "gradient_checkpointing": None}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)


@pytest.mark.parametrize(
    ("given", "chosen", "values"),
    [
        ({}, ["bf16", "gradient_checkpointing"], (True, True)),
        ({"bf16": False}, ["gradient_checkpointing"], (False, True)),
        ({"fp16": True, "gradient_checkpointing": False}, [], (False, False)),
        ({"use_cpu": True}, [], (False, None)),
        ({"fsdp": ["full_shard"]}, ["bf16"], (True, None)),
        ({"activation_checkpointing": False}, ["bf16"], (True, None)),
        ({"activation_checkpointing": None}, ["bf16", "gradient_checkpointing"], (True, None)),
    ],
)
def test_a_gpu_computes_in_bfloat16_and_recomputes(gpu, given, chosen, values):
    options = {"bf16": None, "gradient_checkpointing": None} | given
    assert gpu_defaults.gpu_defaults(options, DEFAULTS) == chosen
    assert (options["bf16"], options["gradient_checkpointing"]) == values
    assert options.get("activation_checkpointing") is (True if given == {"activation_checkpointing": None} else given.get("activation_checkpointing"))  # fmt: skip


def test_a_gpu_without_bfloat16(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    options = {"bf16": None, "gradient_checkpointing": None}
    assert gpu_defaults.gpu_defaults(options, DEFAULTS) == ["gradient_checkpointing"]
    assert options["bf16"] is False


def test_a_model_that_cannot_recompute(tmp_path):
    made = config(tmp_path, gradient_checkpointing=True)
    gpu_defaults.keep_what_fits(made, [], SimpleNamespace(supports_gradient_checkpointing=False))
    assert made.gradient_checkpointing
    gpu_defaults.keep_what_fits(made, ["gradient_checkpointing"], tiny.model())
    assert made.gradient_checkpointing
    gpu_defaults.keep_what_fits(
        made, ["gradient_checkpointing"], SimpleNamespace(supports_gradient_checkpointing=False)
    )
    assert not made.gradient_checkpointing


def test_flags_and_files_win_over_the_gpus_defaults(tmp_path, monkeypatch):
    given = {}

    def seen(values, defaults):
        given.update(values)
        values["bf16"] = False
        return []

    monkeypatch.setattr("bco_fast.cli.run_options.gpu_defaults", seen)
    usual = ["--model", "m", "--data", "d", "--output_dir", "o", "--use_cpu", "true"]
    train.parse([*usual, "--gradient_checkpointing", "true"])
    assert (given["bf16"], given["gradient_checkpointing"]) == (None, True)
    (tmp_path / "a.yaml").write_text("bf16: false\n")
    train.parse([*usual, "--config", str(tmp_path / "a.yaml")])
    assert (given["bf16"], given["gradient_checkpointing"]) == (False, None)


@pytest.mark.parametrize(
    ("package", "flags", "line"),
    [
        ("peft", "--use_peft true", "--use_peft needs peft: pip install 'bco_fast[train]'"),
        ("bitsandbytes", "--use_peft true --load_in_4bit true", "--load_in_4bit needs bitsandbytes: pip install bitsandbytes"),
        ("bitsandbytes", "--use_peft true --load_in_8bit true", "--load_in_8bit needs bitsandbytes: pip install bitsandbytes"),
        ("wandb", "--report_to wandb", "--report_to wandb needs a package: pip install wandb"),
        ("comet_ml", "--report_to comet_ml", "--report_to comet_ml needs a package: pip install comet-ml"),
    ],
)  # fmt: skip
def test_a_missing_package_is_named_before_anything_is_read(tmp_path, monkeypatch, capsys, package, flags, line):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else real(name, *a))
    if flags.startswith("--report_to") and real(package) is not None:
        pytest.skip("the package is installed")
    usual = ["--model", str(tmp_path), "--data", "nowhere", "--output_dir", str(tmp_path / "o"), "--use_cpu", "true"]
    assert cli.main(["train", *usual, *flags.split()]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"bco-fast: error: {line}"


@pytest.mark.parametrize(("module", "extra"), [("yaml", "train"), ("sklearn", "data")])
def test_a_missing_extra_is_one_line(monkeypatch, capsys, module, extra):
    def missing(_):
        raise ModuleNotFoundError(f"No module named '{module}'", name=f"{module}.part")

    monkeypatch.setitem(sys.modules, "bco_fast.cli.udm", SimpleNamespace(udm=missing))
    assert cli.main(["udm"]) == 2
    assert capsys.readouterr().err == f"bco-fast: error: bco-fast udm needs {module}: pip install 'bco_fast[{extra}]'\n"

    def broken(_):
        raise ModuleNotFoundError("No module named 'mine'", name="mine")

    monkeypatch.setitem(sys.modules, "bco_fast.cli.udm", SimpleNamespace(udm=broken))
    with pytest.raises(ModuleNotFoundError, match="mine"):
        cli.main(["udm"])


def test_recipes_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("bco_ultrafeedback", "bco_ultrafeedback.yaml", "configs/bco_ultrafeedback.yaml"):
        assert Path(recipe_path(name)).read_text().startswith("# BCO on UltraFeedback")
    assert recipe_path("elsewhere/bco_ultrafeedback.yaml") == "elsewhere/bco_ultrafeedback.yaml"
    Path("bco_ultrafeedback").write_text("loss_type: bco\n")
    assert recipe_path("bco_ultrafeedback") == "bco_ultrafeedback"
    assert "experiments" in recipe_path("bco_fig1_ultrafeedback", "experiments")
    assert cli.main(["recipes", "zero3"]) == 0
    assert "DEEPSPEED" in Path(capsys.readouterr().out.strip()).read_text()
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(path.stem in listed for folder in recipes.FOLDERS.values() for path in folder.glob("*.yaml"))
    assert cli.main(["recipes", "zero4"]) == 2
    assert "did you mean 'zero3'?" in capsys.readouterr().err
