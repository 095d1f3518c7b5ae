"""`bco-fast report`, and what a run leaves for it: run.json, held_out.jsonl, a model card at every checkpoint."""

import base64
import copy
import html.parser
import json
import math
import random
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml

from bco_fast import cli
from bco_fast.evaluation import plots, report, run_reading
from bco_fast.evaluation.plots import PLOTS, correlation
from bco_fast.evaluation.readings import READINGS
from bco_fast.evaluation.report import _slug, _tell_apart, write_report
from bco_fast.evaluation.run_reading import ReportError, Run, load_run
from bco_fast.losses import OBJECTIVES
from bco_fast.losses.metrics import auc as exact_auc
from bco_fast.losses.metrics import auc_interval
from bco_fast.training.config import FeedbackConfig
from bco_fast.training.model_card import SOURCES, model_card
from bco_fast.training.record import public, public_options

FILE = Path(__file__)
NONE = "\N{EN DASH}"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("secret-home") / "tiny"
    tiny.model().save_pretrained(path)
    tiny.build_tokenizer().save_pretrained(path)
    return path


def _train(model_dir, folder, *, loss_type="bco", **changes):
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "model": model_dir, "data": tiny.write(folder / "feedback.jsonl", tiny.feedback_for(loss_type, 60)),
        "output_dir": folder / "run", "cache_dir": folder / "cache", "max_length": 64, "max_steps": 6,
        "learning_rate": 1e-3, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "eval_fraction": 0.3,
        "save_strategy": "steps", "save_steps": 2, "use_cpu": "true", "loss_type": loss_type, "disable_tqdm": "true",
        "hub_token": "hf_verysecret",
    } | changes  # fmt: skip
    assert cli.main(["train", *(f"--{k}={v}" for k, v in options.items())]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def run(model_dir, tmp_path_factory):
    return _train(model_dir, tmp_path_factory.mktemp("bco"))


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch):
    monkeypatch.setattr(report, "DPI", 20)


@pytest.fixture(scope="session")
def paired(model_dir, tmp_path_factory):
    return _train(model_dir, tmp_path_factory.mktemp("simpo"), loss_type="simpo")


def _history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def _last(folder, key):
    return [line[key] for line in _history(folder) if key in line][-1]


def _rows(folder):
    return [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]


class _Page(html.parser.HTMLParser):
    """Tags, sources and cells of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.images, self.cells, self.text = [], set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag == "img":
            self.images.append(dict(attributes)["src"])

    def handle_data(self, data):
        self.text.append(data)
        if self.tags and self.tags[-1] == "td":
            self.cells.append(data)


# ---- what a run leaves


def test_held_out_rows_give_the_figures_of_the_last_evaluation(run):
    import torch

    rows = _rows(run)
    reward = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
    label = torch.tensor([row["label"] for row in rows])
    assert len(rows) == json.loads((run / "run.json").read_text())["data"]["held_out"]["rows"]
    assert exact_auc(reward, label) == pytest.approx(_last(run, "eval_rewards/auc"), abs=1e-12)
    margin = float(reward[label].mean() - reward[~label].mean())
    assert margin == pytest.approx(_last(run, "eval_rewards/margins"), abs=1e-9)
    assert float(reward.abs().max()) > 0
    assert {row["step"] for row in rows} == {6}
    assert [row["item"] for row in rows] == list(range(len(rows)))


def test_held_out_rows_are_in_the_order_of_the_data(run):
    from bco_fast.data.rows import read_rows, split_by_prompt
    from bco_fast.data.tokenize import load_feedback

    _, held_out = split_by_prompt(read_rows(run.parent / "feedback.jsonl"), 0.3)
    records = [{"prompt": r.prompt, "completion": r.completion, "label": r.label} for r in held_out]
    examples = load_feedback(records, tiny.build_tokenizer(), max_length=64).examples
    assert [(row["label"], row["tokens"]) for row in _rows(run)] == [
        (e.label, len(e) - e.completion_start) for e in examples
    ]


def test_held_out_rows_of_pairs_have_two_sides(paired):
    rows = _rows(paired)
    assert [row["label"] for row in rows] == [True, False] * (len(rows) // 2)
    assert [row["item"] for row in rows] == [i // 2 for i in range(len(rows))]


def test_the_record_tells_what_was_trained(run):
    record = json.loads((run / "run.json").read_text())
    assert (record["loss_type"], record["beta"], record["step"], record["max_steps"]) == ("bco", 0.1, 6, 6)
    assert record["options"]["learning_rate"] == 1e-3
    counts = record["data"]["train"]
    assert counts["up"] + counts["down"] == counts["rows"]
    assert counts["rows"] + record["data"]["held_out"]["rows"] == 60
    assert record["seconds"] > 0
    assert record["peak_memory_mb"] > 10
    assert record["parameters"] == record["trained_parameters"] == tiny.model().num_parameters()
    assert record["held_out"]["eval_rewards/auc"] == _last(run, "eval_rewards/auc")


@pytest.mark.parametrize("where", ["", "checkpoint-2", "checkpoint-6"])
def test_a_model_card_in_every_checkpoint_and_at_the_end(run, where):
    text = (run / where / "README.md").read_text()
    step = int(where[11:] or 6)
    assert f"Step {step} of 6" in text
    assert "arXiv 2404.04656, Eq. 7 and 8" in text
    assert "| `learning_rate` | `0.001` |" in text
    figures = [line for line in _history(run) if line["step"] == step and "eval_rewards/auc" in line]
    assert f"| {figures[-1]['eval_rewards/auc']:.4g} |" in text
    front = yaml.safe_load(text.split("---")[1])
    assert front == {"library_name": "transformers", "tags": ["bco_fast", "bco"]}  # a local model is no base_model


def test_nothing_that_is_left_names_a_path_or_a_secret(run, model_dir):
    write_report([run])
    files = [run / "run.json", run / "report.html", run / "held_out.jsonl", *run.rglob("README.md")]
    assert len(files) >= 6
    for file in files:
        text = file.read_text()
        for private in (str(model_dir.parent), model_dir.parent.name, str(run.parent), "hf_verysecret", "hub_token"):
            assert private not in text, file


@pytest.mark.slow
def test_the_card_of_an_adapter_is_ours_and_names_no_path(model_dir, tmp_path):
    pytest.importorskip("peft")
    folder = _train(model_dir, tmp_path, use_peft="true", lora_r=4, max_steps=2)
    for card in (folder / "README.md", folder / "checkpoint-2" / "README.md"):
        text = card.read_text()
        assert "a LoRA adapter" in text
        assert yaml.safe_load(text.split("---")[1])["library_name"] == "peft"
        assert str(model_dir) not in text
    # the checkpoint was committed with this card, not with PEFT's
    manifest = json.loads((folder / "checkpoint-2" / "manifest.json").read_text())
    card = (folder / "checkpoint-2" / "README.md").read_bytes()
    assert manifest["files"]["README.md"]["crc32"] == f"{zlib.crc32(card):08x}"
    record = json.loads((folder / "run.json").read_text())
    assert 0 < record["trained_parameters"] < record["parameters"]


@pytest.mark.slow
def test_time_adds_up_over_a_resume(model_dir, tmp_path):
    folder = _train(model_dir, tmp_path, max_steps=4)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"seconds": 5000.0}))
    _train(model_dir, tmp_path, resume_from_checkpoint="true")
    again = json.loads((folder / "run.json").read_text())
    assert again["step"] == 6
    assert 5000 < again["seconds"] < 5100
    # a new run in the same folder starts from nothing
    _train(model_dir, tmp_path, max_steps=1, eval_fraction=0, eval_strategy="no", overwrite_output_dir="true")
    assert json.loads((folder / "run.json").read_text())["seconds"] < 1000
    assert not (folder / "held_out.jsonl").exists()


def test_every_objective_has_its_source_as_in_the_docs():
    assert set(SOURCES) == set(OBJECTIVES)
    page = (FILE.parents[2] / "docs" / "objectives.md").read_text()
    for name, (_, source) in SOURCES.items():
        (arxiv,) = re.findall(r"\d{4}\.\d{5}", source)
        assert arxiv in page, name


@pytest.mark.parametrize("license", ["mit\ntags:\n- evil", "mit: x", "", "mit\n---\n", "a" * 65])
def test_a_license_cannot_add_front_matter(run, license):
    record = json.loads((run / "run.json").read_text())
    with pytest.raises(ValueError, match="license must be one word"):
        model_card(record, license)
    (_, front, _) = model_card(record, "apache-2.0").split("---\n", 2)
    assert yaml.safe_load(front) == yaml.safe_load(model_card(record).split("---\n", 2)[1]) | {"license": "apache-2.0"}


def test_a_card_without_any_figure_or_model_name():
    text = model_card({"loss_type": "sft", "data": {"train": None, "held_out": None}})
    assert "Not evaluated yet." in text
    assert "there is no reference model" in text


def test_a_card_cannot_be_broken_out_of():
    hostile = "evil`|\n# Owned\n<script>x</script>"
    record = {"loss_type": "bco", "model": hostile, "data": {}, "options": {"run_name": hostile}}
    lines = model_card(record).splitlines()
    assert not any(line.startswith(("# Owned", "<script")) for line in lines)
    front = yaml.safe_load(model_card(record | {"model": "org/name"}).split("---")[1])
    assert front["base_model"] == "org/name"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/ann/models/llama", "llama"),
        ("~/models/llama", "llama"),
        ("../up/llama", "llama"),
        ("./here/llama", "llama"),
        (r"C:\Users\ann\llama", "llama"),
        ("a=/home/ann/x,b=2", "a=x,b=2"),
        ("org/name", "org/name"),
        ("https://example.org/a", "https://example.org/a"),
        ({"config": "/etc/ds.json", "api_token": "x", "n": 1}, {"config": "ds.json", "n": 1}),
        (["/a/b", 2.5, None], ["b", 2.5, None]),
    ],
)
def test_local_paths_and_secrets_are_cut(value, shown):
    assert public(value) == shown


def test_options_that_were_changed_are_told(tmp_path):
    config = FeedbackConfig(
        output_dir=str(tmp_path), hub_token="hf_x",  # noqa: S106
        run_name=str(tmp_path / "r"), gradient_accumulation_steps=4,
        oversample=True, deepspeed=None, use_cpu=True, report_to="none", cache_dir=str(tmp_path),
    )  # fmt: skip
    options = public_options(config)
    assert options["gradient_accumulation_steps"] == 4
    assert options["oversample"] is True
    assert options["run_name"] == "r"
    assert not {"output_dir", "hub_token", "cache_dir", "shift_decay", "desirable_weight"} & set(options)
    json.dumps(options)


# ---- the report


def test_the_page_is_self_contained_fits_a_phone_and_its_plots_lie_beside_it(run, tmp_path, capfd):
    assert cli.main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    summary = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    text = (tmp_path / "page.html").read_text()
    page = _Page(text)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(|javascript:", text)
    assert "default-src 'none'" in text
    assert len(page.images) == len(PLOTS) == len(summary["images"])
    for source, path in zip(page.images, summary["images"], strict=True):
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == Path(path).read_bytes()
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "page_plots"}
    files = {f"run-{name}.{form}" for name in PLOTS for form in ("png", "svg")}
    assert {path.name for path in (tmp_path / "page_plots").iterdir()} == files
    record = json.loads((run / "run.json").read_text())
    counts = record["data"]["train"]
    about = f"bco · trained on {counts['up']} thumbs up and {counts['down']} down"
    assert about in " ".join(page.text)
    assert record["date"] in " ".join(page.text)
    assert page.tags.count("figcaption") >= 5
    assert summary["left_out"] == {}
    assert 'name="viewport" content="width=device-width"' in text
    assert "prefers-color-scheme: dark" in text
    assert text.count("<table") == text.count('<div class="wide"><table') == 2, "wider ones scroll by themselves"
    assert ".wide { overflow-x: auto }" in text


def test_the_table_says_what_the_log_says(run, paired, tmp_path):
    report = write_report([run, paired, run / "checkpoint-2"], tmp_path / "r.html")
    assert len(set(report["images"])) == len(report["images"])
    cells = _Page((tmp_path / "r.html").read_text()).cells
    for folder, objective in ((run, "bco"), (paired, "simpo")):
        name = f"{folder.parent.name}/run"  # both folders are called run
        row = cells[cells.index(name) :][:17]
        record = json.loads((folder / "run.json").read_text())
        assert row[1:5] == ["tiny", "feedback.jsonl", str(record["data"]["train"]["rows"]), objective]
        assert row[8] == "6 of 6"
        assert row[9].startswith(f"{_last(folder, 'eval_rewards/auc'):.3f} [")
        assert row[10] == f"{_last(folder, 'eval_rewards/margins'):.3g}"
        loss = f"{_last(folder, 'eval_loss'):.4g}"
        assert row[12:14] == ([loss, NONE] if objective == "bco" else [NONE, loss])  # a column each
        assert row[15:] == [f"{record['peak_memory_mb']:,.0f}", f"{record['seconds']:,.0f}"]


def _read(name, rows=None, record=None, **series):
    history = [
        {"step": 10 * (i + 1), **dict(zip(series, values, strict=True))}
        for i, values in enumerate(zip(*series.values(), strict=True))
    ]
    columns = (
        None
        if rows is None
        else {
            name: np.array(column)
            for name, column in zip(("label", "reward", "tokens"), zip(*rows, strict=True), strict=True)
        }
    )
    run = Run(Path(), "run", history, {"beta": 0.1, "reference": True, "loss_type": "bco"} | (record or {}), columns)
    return READINGS[name](run)


def test_a_sentence_reads_each_plot():
    assert (
        _read("loss", eval_loss=[0.7, 0.3, 0.6])
        == "Held-out loss was lowest at step 20 (0.3) and is 0.6 now: what came after memorizes."
    )
    assert _read("loss", eval_loss=[0.7, 0.5, 0.3]) == "Held-out loss fell from 0.7 to 0.3."
    assert _read("loss", loss=[0.7, 0.69]) == "The training loss stayed near 0.69."
    assert "0.25 of that of the training batches: the rest is memorized" in _read(
        "margins", **{"rewards/margins": [4.0], "eval_rewards/margins": [1.0]}
    )
    assert "no higher reward" in _read("margins", **{"rewards/margins": [4.0], "eval_rewards/margins": [-1.0]})
    counts = {"data": {"held_out": {"up": 10, "down": 10}}}
    assert _read("ranking", record=counts, **{"eval_rewards/auc": [0.6]}).endswith("That includes chance.")
    assert "chance" not in _read("ranking", record=counts, **{"eval_rewards/auc": [0.95]})
    assert "outside" in _read("delta", delta=[3.0], **{"rewards/chosen": [1.0], "rewards/rejected": [-1.0]})
    assert "between" in _read("delta", delta=[0.5], **{"rewards/chosen": [1.0], "rewards/rejected": [-1.0]})
    assert "(-10 and -20 nats)" in _read("log_ratio", **{"rewards/chosen": [-1.0], "rewards/rejected": [-2.0]})
    rows = [(True, 1.0, 5), (True, 2.0, 9), (False, -1.0, 2), (False, 0.5, 4)]
    assert _read("rewards", rows) == "100% of thumbs up lie above 0, and 50% of thumbs down below."
    assert "long completions are favoured" in _read("length", rows)
    assert "short completions are favoured" in _read("length", [(up, -reward, tokens) for up, reward, tokens in rows])
    assert "hardly" in _read("length", [(True, 1.0, 5), (True, -1.0, 5), (False, 1.0, 7), (False, -1.0, 7)])


def test_nothing_is_read_from_nothing():
    assert [_read(name, [(True, 0.0, 1)]) for name in READINGS if name != "rewards"] == [None] * (len(READINGS) - 1)


def test_an_interval_of_the_auc():
    """Where rewards say nothing it is Mann and Whitney's exact variance, (n + m + 1) / 12nm."""
    low, high = auc_interval(0.5, 51, 58)
    assert (high - low) / 2 == pytest.approx(1.96 * ((51 + 58 + 1) / (12 * 51 * 58)) ** 0.5, rel=1e-12)
    assert auc_interval(1.0, 5, 5) == (1.0, 1.0)
    assert auc_interval(0.95, 3, 3)[1] == 1.0


def test_a_few_held_out_rows_are_dots(run, tmp_path):
    folder = _copy(run, tmp_path)
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(run)[:3]))
    axes = PLOTS["rewards"][0](load_run(folder)).axes[0]
    assert sum(len(dots.get_offsets()) for dots in axes.collections) == 3
    assert not axes.patches


def test_an_objective_without_a_reference_has_no_log_ratio(paired, tmp_path):
    report = write_report([paired], tmp_path / "r.html")
    assert report["left_out"] == {"run": ["simpo has no reference model: no log-ratio plot."]}
    assert not list(tmp_path.glob("*log_ratio*"))


def test_runs_of_one_name_are_told_apart(run):
    runs = [load_run(run), load_run(run), load_run(run / "checkpoint-2")]
    _tell_apart(runs)
    assert [r.name for r in runs] == [f"{run.parent.name}/run (1)", f"{run.parent.name}/run (2)", "checkpoint-2"]
    taken = set()
    assert [_slug(name, taken) for name in ("a/b", "a b", "A-B", "all", "../..", "é")] == [
        "a-b", "a-b-2", "A-B-3", "all-2", "run", "run-2",
    ]  # fmt: skip


def _copy(run, tmp_path, *leave_out):
    return shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns(*leave_out, "*.pt", "*.safetensors"))


def test_a_run_that_is_still_training(run, tmp_path):
    """Its folder has checkpoints only; the newest whole one is read."""
    folder = _copy(run, tmp_path, "trainer_state.json")
    for step in (2, 6):
        shutil.copy(run / f"checkpoint-{step}" / "trainer_state.json", folder / f"checkpoint-{step}")
    loaded = load_run(folder)
    assert max(line["step"] for line in loaded.history) == 6
    assert "the log is that of checkpoint-6" in loaded.left_out[0].lower()
    (folder / "checkpoint-6" / "trainer_state.json").write_text('{"log_hist')  # being written
    loaded = load_run(folder)
    assert max(line["step"] for line in loaded.history) == 2
    assert write_report([folder])["output"] == str(folder / "report.html")


def test_a_checkpoint_newer_than_the_last_end_of_the_run_is_read(run, tmp_path):
    folder = _copy(run, tmp_path)
    state = json.loads((folder / "trainer_state.json").read_text())
    early = {"global_step": 3, "log_history": [line for line in state["log_history"] if line["step"] <= 3]}
    (folder / "trainer_state.json").write_text(json.dumps(early))
    assert max(line["step"] for line in load_run(folder).history) == 6


@pytest.mark.slow
def test_a_checkpoint_by_itself(run, tmp_path):
    report = write_report([run / "checkpoint-4"], tmp_path / "r.html")
    assert len(report["images"]) == len(PLOTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No held_out.jsonl"),
        pytest.param("", "no finite row", marks=pytest.mark.slow),
        ('{"step": 1, "label": true, "reward": 1.0, "logp": -1.0, "tokens": 3}\n{"step"', "line 2"),
        pytest.param(
            '{"step": 1, "label": true, "reward": NaN, "logp": -1.0, "tokens": 3}\n',
            "no finite row",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_held_out_rows_that_are_missing_or_damaged_are_left_out_and_said(run, tmp_path, content, message):
    folder = _copy(run, tmp_path, "held_out.jsonl")
    if content is not None:
        (folder / "held_out.jsonl").write_text(content)
    report = write_report([folder], tmp_path / "r.html")
    assert message in report["left_out"]["copy"][0]
    assert message in (tmp_path / "r.html").read_text()
    assert len(report["images"]) == len(PLOTS) - 3  # histogram, length, gradient


def test_runs_of_other_makers_without_a_record(run, tmp_path):
    report = write_report([_copy(run, tmp_path, "run.json", "held_out.jsonl")], tmp_path / "r.html")
    assert len(report["left_out"]["copy"]) == 2
    assert len(report["images"]) == len(PLOTS) - 6


HOSTILE = "<img src=x onerror=alert(1)>&\"'$\\bad{$_"


def test_names_and_values_are_escaped(run, tmp_path):
    folder = shutil.move(_copy(run, tmp_path), tmp_path / HOSTILE)
    record = json.loads((folder / "run.json").read_text())
    record |= {"loss_type": HOSTILE, "model": HOSTILE, "beta": HOSTILE}
    record["options"] = {HOSTILE: HOSTILE, "list": [HOSTILE]}
    (folder / "run.json").write_text(json.dumps(record))
    report = write_report([folder], tmp_path / "r.html")
    page = _Page((tmp_path / "r.html").read_text())
    assert "onerror" not in page.attributes
    assert page.tags.count("img") == len(report["images"])
    assert HOSTILE in page.text
    assert HOSTILE in page.cells


def test_a_log_of_nothing_but_nonsense(tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    lines = [{"step": 1, "loss": float("nan")}, {"loss": 1.0}, 7, {"step": "x"}, {"step": 2, "loss": "high"}]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": None, "log_history": lines}))
    (folder / "run.json").write_text('["not", "a", "record"]')
    report = write_report([folder])
    assert report["images"] == []
    assert "Nothing was logged yet" in (folder / "report.html").read_text()


BAD = {
    "no such folder": ("{}/nowhere", "nowhere: no such folder"),
    "a file": ("{}/file", "file: not a folder"),
    "an empty folder": ("{}/empty", "not a run"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_folder_that_is_no_run_is_one_clear_line(tmp_path, capfd, kind):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    folder, message = BAD[kind]
    assert cli.main(["report", folder.format(tmp_path), "--output", str(tmp_path / "r.html")]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "r.html").exists()


def test_a_page_that_cannot_be_written(run, tmp_path):
    with pytest.raises(ReportError, match="is a folder"):
        write_report([run], tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ReportError, match="file"):
        write_report([run], tmp_path / "file" / "r.html")
    assert cli.main(["report"]) == 2


ODD = [
    math.nan, math.inf, -math.inf, 1e300, -1e300, 10**400, 1e-320, 0, -1, True, None, "x", "", [], {}, [1], {"a": 1}, 2**63,
]  # fmt: skip


def _leaves(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        yield from _leaves(part, (*path, key))


def _with_odd_values(value, rng, share):
    """A copy in which some values are odd, and some are missing."""
    value = json.loads(json.dumps(value))
    for path in rng.sample(paths := list(_leaves(value)), max(1, int(share * len(paths)))):
        part = value
        try:
            for key in path[:-1]:
                part = part[key]
            if isinstance(part, dict) and rng.random() < 0.1:
                del part[path[-1]]
            else:
                part[path[-1]] = copy.deepcopy(rng.choice(ODD))  # a later path may lead into it
        except (KeyError, IndexError, TypeError):
            continue  # what was above it is odd already
    return value


@pytest.mark.parametrize("seed", [*range(1), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 31))])
def test_odd_numbers_never_end_in_a_traceback(run, tmp_path, seed):
    rng = random.Random(seed)  # noqa: S311
    share = (0.02, 0.1, 0.4)[seed % 3]
    for name in ("trainer_state.json", "run.json"):
        (tmp_path / name).write_text(json.dumps(_with_odd_values(json.loads((run / name).read_text()), rng, share)))
    rows = [_with_odd_values(row, rng, share) if rng.random() < share else row for row in _rows(run)]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        made = write_report([tmp_path])
    except ReportError:
        return
    json.dumps(made, allow_nan=False)
    assert Path(made["output"]).is_file()


def test_a_huge_log_is_refused_and_huge_lines_are_left_out(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run_reading, "MAX_BYTES", 1 << 16)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "held_out.jsonl").write_text(json.dumps({"step": 1, "x": "y" * (1 << 17)}))
    assert "held_out.jsonl cannot be read" in " ".join(load_run(tmp_path / "run").left_out)
    (tmp_path / "run" / "trainer_state.json").write_text(" " * (1 << 17) + "{}")
    with pytest.raises(ReportError, match="not the log of a run"):
        load_run(tmp_path / "run")


def test_correlation_is_exact():
    assert correlation(np.arange(5.0), -2 * np.arange(5.0)) == pytest.approx(-1)
    assert np.isnan(correlation(np.ones(5), np.arange(5.0)))
    assert np.isnan(correlation(np.arange(2.0), np.arange(2.0)))


def _made(tmp_path, history=(), rows=None, **record):
    return Run(tmp_path, "made", list(history), {"reference": True, "beta": 0.1, "loss_type": "bco"} | record, rows)


def test_the_divergence_is_minus_half_of_both_log_ratios(tmp_path):
    """arXiv 2404.04656, App. B: with rewards of 0.2 and -0.6 and a beta of 0.1, the log-ratios are 2 and -6 nats."""
    run = _made(
        tmp_path, [{"step": 1, "rewards/chosen": 0.2, "rewards/rejected": -0.6}, {"step": 2, "rewards/chosen": 1.0}]
    )
    (line,) = [line for line in plots.plot_divergence(run).axes[0].lines if line.get_label() == "training batches"]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1], [pytest.approx(2.0)])
    assert plots.plot_divergence(_made(tmp_path, reference=False)) is None
    figures = plots.compare(
        [run, _made(tmp_path, [{"step": 1, "rewards/chosen": -0.2, "rewards/rejected": 0.0}], beta=0.5)]
    )
    assert [list(line.get_ydata()) for line in figures["divergence"][0].axes[0].lines] == [
        [pytest.approx(2.0)],
        [pytest.approx(0.2)],
    ]


def test_kto_lets_go_of_the_rewards_that_are_most_wrong(tmp_path):
    """arXiv 2404.04656, section 4.3: of thumbs up with low rewards, BCO's weight grows and KTO's vanishes."""
    reward = np.linspace(-8, 8, 240)
    rows = {"label": np.ones(240, dtype=bool), "reward": reward, "logp": reward, "tokens": reward}
    axes = plots.plot_gradient(_made(tmp_path, rows=rows)).axes[0]
    bco, kto = (line.get_ydata() for line in axes.lines)
    assert (np.diff(bco) < 0).all()
    assert bco[0] > 0.99
    assert kto[0] < 0.01
    assert 0.2 < max(kto) <= 0.25
    assert plots.plot_gradient(_made(tmp_path, rows=rows, loss_type="dpo")) is None
