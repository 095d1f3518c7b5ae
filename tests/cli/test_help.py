"""`--help` of the commands that train: short, grouped, and printed from a file that says what the parser would."""

import importlib
import re

import pytest
import transformers

from bco_fast import cli
from bco_fast.cli.help_text import PAGES


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="the files hold the defaults of transformers 5")
@pytest.mark.parametrize("command", PAGES)
def test_the_help_that_is_kept_is_that_of_the_options(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        getattr(importlib.import_module(f"bco_fast.cli.{command}"), command)(["--help"])
    assert stopped.value.code == 0
    now = capsys.readouterr().out
    assert cli.main([command, "--help"]) == 0
    assert capsys.readouterr().out == now, "run `make help-pages`"


@pytest.mark.parametrize("command", PAGES)
def test_help_all_adds_the_other_options_and_loses_none(command, capsys):
    assert cli.main([command, "-h"]) == 0
    page = capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([command, "--help-all"])
    whole = capsys.readouterr().out
    short, all_of_them = (re.findall(r"^  --(\w+)", text, flags=re.MULTILINE) for text in (page, whole))
    assert len(all_of_them) == len(set(all_of_them))
    assert set(short) < set(all_of_them)
    assert page.count("\n") < 200
    assert "of transformers.TrainingArguments:" in whole
    assert "adam_beta1" in all_of_them
    assert "adam_beta1" not in short
