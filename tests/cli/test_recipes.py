"""configs/ against the papers: every number, with the section that prints it.

The table below was read out of the papers (arXiv 2404.04656v2, 2410.04834, 2408.15339). A recipe's line either has one of these
values and cites its section, or says that it is our choice or that of the authors' code.
"""

import re
from pathlib import Path

import pytest
import yaml

from bco_fast.cli.online import parse as parse_online
from bco_fast.cli.train import parse as parse_train

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))

_ALIGN = {  # of 2404.04656, App. C, second paragraph
    "beta": (0.1, "App. C"), "learning_rate": (5e-7, "App. C"), "lr_scheduler_type": ("linear", "App. C"),
    "warmup_steps": (0.1, "App. C"), "max_length": (2048, "App. C"), "max_prompt_length": (1536, "App. C"),
    "max_completion_length": (512, "App. C"), "bf16": (True, "App. C"),
}  # fmt: skip
_TABLE1 = {name: _ALIGN[name] for name in ("beta", "learning_rate", "lr_scheduler_type", "warmup_steps", "bf16")} | {
    "num_train_epochs": (3, "App. C"), "model": ("meta-llama/Llama-3.1-8B-Instruct", "Table 1"),
}  # fmt: skip
_FIG2 = {
    "beta": (0.1, "App. C"), "learning_rate": (2e-7, "App. C"), "lr_scheduler_type": ("constant", "App. C"),
    "num_train_epochs": (7, "App. C"), "bf16": (True, "App. C"), "model": ("runs/sft_helpsteer2", "section 5.1"),
}  # fmt: skip
_SFT = {
    "loss_type": ("sft", "section 5.1"), "learning_rate": (1e-5, "App. C"), "lr_scheduler_type": ("linear", "App. C"),
    "num_train_epochs": (3, "App. C"), "batch": (128, "App. C"), "max_length": (4096, "App. C"), "bf16": (True, "App. C"),
    "model": ("Qwen/Qwen2.5-3B", "section 5.1"),
}  # fmt: skip
_BNF = {
    "loss_type": ("bnf", "Eq. 4"), "lr_scheduler_type": ("cosine", "section 4"), "warmup_steps": (0.1, "section 4"),
    "batch": (128, "section 4"), "max_length": (4096, "section 4"), "bf16": (True, "App. C"),
}  # fmt: skip
_UNA = {
    "model": ("mistralai/Mistral-7B-v0.1", "section 4"), "use_peft": (True, "section 4"), "lora_r": (32, "section 4"),
}  # fmt: skip
_SHIFT = {"shift_mode": ("ema", "section 4.2")}
_BINARY = {"data": ("helpsteer2_binary.jsonl", "section 5.3")}
_BALANCED = {"oversample": (True, "App. C")}
_LAMBDA = {"desirable_weight": (1.58, "App. C"), "undesirable_weight": (1, "App. C")}
_EQUATIONS = {"bco": "Eq. 7, 8", "bce": "Eq. 6", "kto": "Eq. 2 to 4", "dpo": "section 3"}


def _loss(name, source):
    return {"loss_type": (name, source)}


PAPERS = {
    f"sft_{data}": _SFT | {"data": (f"{data}_chosen.jsonl", "section 5.1")}
    for data in ("ultrafeedback", "capybara", "helpsteer2")
}
for _name, _source in _EQUATIONS.items():
    _own = _loss(_name, _source) | (_SHIFT if _name == "bco" else {})
    _rows = {"data": ("helpsteer2_pairs.jsonl", "section 5.3")} if _name == "dpo" else _BINARY
    _own_balance = {"bco": _BALANCED, "kto": _LAMBDA}.get(_name, {})
    for _data, _hub, _epochs in (
        ("ultrafeedback", "ultrafeedback_binarized", 1),
        ("capybara", "Capybara-Preferences", 4),
    ):
        PAPERS[f"{_name}_{_data}"] = _ALIGN | _own | {
            "num_train_epochs": (_epochs, "App. C"), "data": (f"trl-lib/{_hub}", "section 5.1"),
            "model": (f"runs/sft_{_data}", "section 5.1"),
        }  # fmt: skip
    if _name != "bce":
        PAPERS[f"{_name}_helpsteer2_fig2"] = _FIG2 | _own | _rows | _own_balance
        PAPERS[f"{_name}_helpsteer2_table1"] = _TABLE1 | _own | _rows | _own_balance
for _name, _model, _hub, _rate in (
    ("mistral", "mistralai/Mistral-7B-Instruct-v0.2", "mistral-instruct-ultrafeedback", 5e-7),
    ("llama3", "meta-llama/Meta-Llama-3-8B-Instruct", "llama3-ultrafeedback-armorm", 6e-7),
    ("gemma2", "google/gemma-2-9b-it", "gemma2-ultrafeedback-armorm", 8e-7),
):
    PAPERS[f"bnf_{_name}"] = _BNF | {
        "model": (_model, "section 4"), "learning_rate": (_rate, "section 4"), "data": (f"princeton-nlp/{_hub}", "section 4"),
    }  # fmt: skip
for _name, _type, _source, _beta, _rate in (
    ("pair", "una_pair", "Eq. 10", 0.03, 5e-6),
    ("kto", "kto", "section 4", 0.03, 5e-6),
    ("binary_mse", "una_binary_mse", "Eq. 11", 0.01, 5e-6),
    ("binary_bce", "una_binary_bce", "Eq. 12", 0.01, 5e-6),
    ("score", "una_score", "Eq. 13", 0.03, 3e-5),
):
    _rows = "helpsteer2_score.jsonl" if _name == "score" else "helpsteer2_by_score.jsonl"
    PAPERS[f"una_{_name}"] = _UNA | _loss(_type, _source) | {
        "beta": (_beta, "section 4"), "learning_rate": (_rate, "section 4"), "data": (_rows, "section 4"),
    }  # fmt: skip
PAPERS["una_online"] = {
    "model": ("Qwen/Qwen2-1.5B", "section 4"), "reward": ("Ray2333/GRM-Gemma-2B-rewardmodel-ft", "section 4"),
    "prompts": ("helpsteer2_prompts.jsonl", "section 4"), "loss_type": ("una_score", "Eq. 9"), "beta": (0.03, "section 4"),
    "reward_scale": ("sigmoid", "Eq. 8"), "temperature": (1, "Eq. 9"), "top_p": (1, "Eq. 9"),
    "learning_rate": (5e-6, "section 4"), "max_steps": (20000, "section 4.2"), "max_prompt_length": (1000, "section 4"),
}  # fmt: skip
OURS = re.compile(r"our choice|\bcode\b|on N devices")


def _comments(text: str) -> dict[str, str]:
    """key -> its comment, and of keys below "like everything below" that one."""
    found, below = {}, ""
    for key, comment in re.findall(r"^(\w+): *[^#\n]*?(?: +# (.*))?$", text, flags=re.MULTILINE):
        below = comment if "like everything below" in comment else below
        found[key] = comment or below
    return found


@pytest.mark.parametrize("name", sorted(PAPERS))
def test_a_recipe_has_the_papers_numbers(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    given, comments, expected = yaml.safe_load(text), _comments(text), dict(PAPERS[name])
    assert set(comments) == set(given)
    batch = given["per_device_train_batch_size"] * given.get("gradient_accumulation_steps", 1)
    if "batch" in expected:
        value, source = expected.pop("batch")
        assert batch == value
        assert source in comments["per_device_train_batch_size"]
        comments["per_device_train_batch_size"] = "our choice of how it is cut"
    for key, (value, source) in expected.items():
        assert given[key] == value, key
        assert source in comments[key], f"{key}: {comments[key]!r} does not cite {source}"
        assert not re.search(r"our choice|\bcode\b", comments[key]), key
    for key in set(given) - set(expected) - {"output_dir"}:
        assert OURS.search(comments[key]), f"{key} is in no paper and not marked as ours: {comments[key]!r}"


def test_every_recipe_is_in_the_table():
    assert {path.stem for path in CONFIGS} == set(PAPERS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_parses(path):
    online = "online" in path.stem
    options, config = (parse_online if online else parse_train)(["--config", str(path), "--use_cpu", "true"])
    for name, value in yaml.safe_load(path.read_text()).items():
        arrived = getattr(options, name) if hasattr(options, name) else getattr(config, name)
        assert arrived == value or getattr(arrived, "value", arrived) == value, name
    assert config.output_dir == f"runs/{path.stem}"
    text = path.read_text()
    assert re.search(r"arXiv \d{4}\.\d{5}", text)
    assert f"bco-fast {'online' if online else 'train'} --config configs/{path.name}" in text
    for sft in re.findall(r"runs/(sft_\w+)", text):
        assert (FOLDER / f"{sft}.yaml").is_file()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_steps_of_a_recipe_write_what_it_reads(path):
    """The convert commands in the comments are commands, and a local file that the recipe reads is their output."""
    from bco_fast.data.convert import RECIPES

    text = path.read_text().replace("\\\n#", "")
    commands = re.findall(r"#   bco-fast convert (.*)", text)
    written = []
    for command in commands:
        words = command.split()
        options = dict(zip(words[::2], words[1::2], strict=True))
        assert options["--to"] in RECIPES[options["--recipe"]][1]
        written.append(options["--output"])
    given = yaml.safe_load(path.read_text())
    source = given.get("data") or given["prompts"]
    assert source.endswith(".jsonl") == bool(written)
    assert not written or source in written
