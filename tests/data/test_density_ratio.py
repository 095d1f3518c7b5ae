"""Distribution matching: weights approach the density ratio, the same input gives the same bytes, state is JSON."""

import csv
import json
import math
import random

import numpy as np
import pytest
import tiny
import torch
from scipy.sparse import csr_array
from scipy.stats import spearmanr

from bco_fast import cli
from bco_fast.data.density_ratio import DensityRatio, _auc_within, _logits, make_embedder, match_file

TOPICS = {"code": 0.9, "math": 0.6, "poem": 0.3, "cook": 0.1}  # p(up | topic)
FILLER = [
    "please",
    "write",
    "about",
    "this",
    "in",
    "your",
    "own",
    "words",
    "and",
    "be",
    "brief",
    "or",
    "long",
    "as",
    "you",
    "like",
    "today",
]


def _rows(n=1200, seed=0):
    """Prompts of four topics; thumbs hang on the topic, as when each class was collected from another source."""
    rng = random.Random(seed)  # noqa: S311
    rows = []
    for i in range(n):
        topic = rng.choice(list(TOPICS))
        words = [topic, f"{topic}{rng.randrange(3)}", *rng.sample(FILLER, 4)]
        rng.shuffle(words)
        rows.append({"prompt": " ".join(words), "completion": f"c{i}", "label": rng.random() < TOPICS[topic], "source": topic})  # fmt: skip
    return rows


def _true_ratio(rows):
    """p(x | up) / p(x | down) of each topic, counted."""
    up = {t: sum(r["label"] for r in rows if r["source"] == t) for t in TOPICS}
    down = {t: sum(not r["label"] for r in rows if r["source"] == t) for t in TOPICS}
    return {t: (up[t] / sum(up.values())) / (down[t] / sum(down.values())) for t in TOPICS}


def _read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_weights_approach_the_density_ratio(tmp_path):
    rows = _rows(3000)
    report = match_file(tiny.write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", embedder="tfidf")
    out = _read(tmp_path / "out.jsonl")
    truth = _true_ratio(rows)
    assert [{k: v for k, v in r.items() if k != "weight"} for r in out] == rows
    assert all(r["weight"] == 1.0 for r in out if r["label"])
    down = [r for r in out if not r["label"]]
    expected = [min(max(truth[r["source"]], 0.5), 10.0) for r in down]
    weights = [r["weight"] for r in down]
    assert spearmanr(weights, expected).statistic > 0.8
    assert np.abs(np.log(weights) - np.log(expected)).mean() < 0.1
    assert np.abs(np.log(expected)).mean() > 0.6  # what weights of 1 would be off by
    assert abs(report.mean_density_ratio - 1) < 0.15
    assert min(weights) >= 0.5
    assert max(weights) <= 10.0
    assert report.clamped == sum(w in (0.5, 10.0) for w in weights)
    assert report.auc > 0.75
    assert math.isclose(report.effective_sample_size, sum(weights) ** 2 / sum(w * w for w in weights), rel_tol=1e-9)
    everyone = [r["weight"] for r in out]
    assert math.isclose(
        report.effective_sample_size_all, sum(everyone) ** 2 / sum(w * w for w in everyone), rel_tol=1e-9
    )
    assert report.effective_sample_size < 0.9 * len(down)
    # weighted, thumbs down come from where thumbs up do
    ups = {t: sum(r["source"] == t for r in rows if r["label"]) / sum(r["label"] for r in rows) for t in TOPICS}

    def distance(values):
        share = {t: sum(w for w, r in zip(values, down, strict=True) if r["source"] == t) / sum(values) for t in TOPICS}
        return sum(abs(share[t] - ups[t]) for t in TOPICS)

    assert distance(weights) < 0.35 * distance([1.0] * len(down))


def test_the_number_of_rows_in_a_class_is_not_matched(tmp_path):
    """p / (1 - p) of classes weighted to one size: four times as many thumbs down give the same ratio of densities."""
    rows = _rows(2000)
    thin = [r for i, r in enumerate(rows) if not r["label"] or i % 4 == 0]
    truth = _true_ratio(thin)
    report = match_file(tiny.write(tmp_path / "in.jsonl", thin), tmp_path / "out.jsonl", embedder="tfidf")
    down = [r for r in _read(tmp_path / "out.jsonl") if not r["label"]]
    assert len(down) > 2.5 * report.thumbs_up
    expected = np.clip([truth[r["source"]] for r in down], 0.5, 10)
    assert np.abs(np.log([r["weight"] for r in down]) - np.log(expected)).mean() < 0.2


def test_prompts_that_say_nothing_of_the_class_get_weights_of_1(tmp_path):
    """Where every prompt is unlike the others a regression learns it by heart; judged by that one, weights would be 0.5."""
    rng = random.Random(1)  # noqa: S311
    words = [f"w{i}" for i in range(500)]
    rows = [{"prompt": " ".join(rng.sample(words, 12)), "completion": "c", "label": rng.random() < 0.5} for _ in range(800)]  # fmt: skip
    report = match_file(tiny.write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", embedder="tfidf")
    assert abs(report.auc - 0.5) < 0.08
    weights = np.array([r["weight"] for r in _read(tmp_path / "out.jsonl")])
    assert np.abs(np.log(weights)).max() < 0.1
    assert report.effective_sample_size > 0.99 * report.thumbs_down


def test_a_prompt_is_judged_by_a_regression_that_has_not_seen_it():
    from sklearn.linear_model import LogisticRegression

    rows = _rows(400)
    prompts, up = [r["prompt"] for r in rows], np.array([r["label"] for r in rows])
    ratio = DensityRatio(make_embedder("tfidf"))
    ratio.fit(prompts, up.tolist())
    features, fold = ratio.embedder.embed(prompts), ratio._fold(prompts, 5)
    assert sorted(set(fold)) == [0, 1, 2, 3, 4]
    assert all(len(set(fold[np.array(prompts) == prompt])) == 1 for prompt in prompts)
    expected = np.empty(len(rows))
    for k in range(5):
        model = LogisticRegression(C=ratio.inverse_regularization, class_weight="balanced", max_iter=5000)
        model.fit(features[fold != k], up[fold != k])
        expected[fold == k] = np.exp(model.decision_function(features[fold == k]))
    assert np.allclose(ratio.ratio(prompts), expected, rtol=1e-6)
    other = DensityRatio(make_embedder("tfidf"), seed=1)
    other.fit(prompts, up.tolist())
    assert not np.allclose(ratio.ratio(prompts), other.ratio(prompts), rtol=1e-6)


def test_a_vector_is_judged_the_same_in_any_company():
    rng = np.random.default_rng(0)
    features, coef = rng.normal(size=(101, 383)), rng.normal(size=(2, 383))
    fold, intercept = np.arange(101) % 2, rng.normal(size=2)
    together = _logits(features, fold, coef, intercept)
    alone = [_logits(features[i : i + 1], fold[i : i + 1], coef, intercept)[0] for i in range(101)]
    assert together.tolist() == alone
    sparse = _logits(csr_array(features), fold, coef, intercept)
    assert np.allclose(sparse, together)
    assert sparse.tolist() == [
        _logits(csr_array(features[i : i + 1]), fold[i : i + 1], coef, intercept)[0] for i in range(101)
    ]


def test_the_auc_compares_within_folds():
    """With the classes of each fold perfectly parted it is 1, whatever the offsets between folds."""
    logits, up = np.array([5.0, 4.0, -4.0, -5.0]), np.array([True, False, True, False])
    assert _auc_within(logits, up, np.array([0, 0, 1, 1])) == 1.0
    assert _auc_within(logits, up, np.zeros(4, dtype=int)) == 0.75


def test_the_same_input_gives_the_same_bytes_and_the_state_the_same_weights(tmp_path):
    rows = _rows(300)
    data = tiny.write(tmp_path / "in.jsonl", rows)
    for name in ("a", "b"):
        match_file(data, tmp_path / f"{name}.jsonl", embedder="tfidf", max_density_ratio=3.0, seed=7)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    state = tmp_path / "a.jsonl.udm.json"
    assert state.read_bytes() == (tmp_path / "b.jsonl.udm.json").read_bytes()
    report = match_file(data, tmp_path / "c.jsonl", state=state)  # bounds and seed are the state's
    assert (tmp_path / "c.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()
    assert report.auc is None
    assert not (tmp_path / "c.jsonl.udm.json").exists()
    # new rows beside old ones: the old ones weigh what they did
    new = [{**r, "label": False} for r in _rows(50, seed=9)]
    match_file(tiny.write(tmp_path / "new.jsonl", [*new, *rows[100:]]), tmp_path / "d.jsonl", state=state)
    assert _read(tmp_path / "d.jsonl")[50:] == _read(tmp_path / "a.jsonl")[100:]
    match_file(tiny.write(tmp_path / "down.jsonl", new[:1]), tmp_path / "e.jsonl", state=state)  # one class is enough
    assert _read(tmp_path / "e.jsonl") == _read(tmp_path / "d.jsonl")[:1]
    kept = json.loads(state.read_text())
    assert kept["fitted_on"]["rows"] == 300
    assert set(kept["versions"]) == {"bco_fast", "scikit-learn", "numpy"}


def test_a_model_as_embedder(tmp_path):
    tiny.model().save_pretrained(tmp_path / "m")
    tiny.build_tokenizer().save_pretrained(tmp_path / "m")
    rows = [{**row, "label": "fruit" in row["prompt"] or i % 7 == 0} for i, row in enumerate(tiny.rows(100))]
    data = tiny.write(tmp_path / "in.jsonl", rows)
    report = match_file(data, tmp_path / "out.jsonl", embedder=str(tmp_path / "m"))
    assert report.auc > 0.6
    few = tiny.write(tmp_path / "few.jsonl", rows[40:60])
    match_file(few, tmp_path / "again.jsonl", embedder=str(tmp_path / "m"), state=tmp_path / "out.jsonl.udm.json")
    assert _read(tmp_path / "again.jsonl") == _read(tmp_path / "out.jsonl")[40:60]  # to the last bit
    with pytest.raises(ValueError, match="give its folder"):
        match_file(data, tmp_path / "x.jsonl", state=tmp_path / "out.jsonl.udm.json")
    tiny.model(seed=3).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="another embedder"):
        match_file(data, tmp_path / "x.jsonl", embedder=str(tmp_path / "m"), state=tmp_path / "out.jsonl.udm.json")


def test_a_models_vector_is_the_normalised_mean_of_its_last_hidden_states(tmp_path):
    model, tokenizer = tiny.model(), tiny.build_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = tiny.rows(1)[0]["prompt"]
    embedder = make_embedder(str(tmp_path))
    hidden = model.model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].detach().double()
    expected = torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
    vectors = embedder.embed([text, "", text * 40])  # none, and more tokens than positions
    assert np.allclose(vectors[0], expected, atol=1e-6)
    assert np.isfinite(vectors).all()
    assert np.isclose((vectors**2).sum(1), [1, (vectors[1] ** 2).sum(), 1]).all()


def test_code_in_a_models_folder_is_never_run(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="--embedder"):
        make_embedder(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_every_kind_of_file_and_every_column_is_kept(tmp_path):
    import pyarrow
    import pyarrow.parquet

    odd = "two\u2028lines\x85"  # which str.splitlines would cut
    rows = [{**r, "prompt": r["prompt"] + odd} for r in _rows(120)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    (tmp_path / "in.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    with (tmp_path / "in.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for kind in ("jsonl", "json", "parquet", "csv"):
        match_file(tmp_path / f"in.{kind}", tmp_path / f"{kind}.out", embedder="tfidf")
    texts = {(tmp_path / f"{kind}.out").read_bytes() for kind in ("jsonl", "json", "parquet", "csv")}
    assert len(texts) == 1
    lines = texts.pop().decode().split("\n")[:-1]
    assert [{k: v for k, v in json.loads(line).items() if k != "weight"} for line in lines] == rows


def test_the_prompt_of_a_chat_is_what_its_messages_say(tmp_path):
    rows = _rows(120)
    chats = [
        {**r, "prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": r["prompt"]}]} for r in rows
    ]
    texts = [{**r, "prompt": f"be\n{r['prompt']}"} for r in rows]
    for name, records in (("chats", chats), ("texts", texts)):
        match_file(tiny.write(tmp_path / f"{name}.jsonl", records), tmp_path / f"{name}.out", embedder="tfidf")
    a, b = ([r["weight"] for r in _read(tmp_path / f"{name}.out")] for name in ("chats", "texts"))
    assert a == b
    assert _read(tmp_path / "chats.out")[0]["prompt"] == chats[0]["prompt"]


def test_a_weight_that_is_there_is_multiplied(tmp_path):
    rows = [{**r, "weight": 3.0} for r in _rows(200)]
    match_file(tiny.write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", embedder="tfidf")
    plain = [{k: v for k, v in r.items() if k != "weight"} for r in rows]
    match_file(tiny.write(tmp_path / "plain.jsonl", plain), tmp_path / "plain_out.jsonl", embedder="tfidf")
    for a, b in zip(_read(tmp_path / "out.jsonl"), _read(tmp_path / "plain_out.jsonl"), strict=True):
        assert math.isclose(a["weight"], 3 * b["weight"])


def test_from_the_command_line(tmp_path, capsys):
    data = tiny.write(tmp_path / "in.jsonl", _rows(300))
    arguments = ["udm", "--data", str(data), "--embedder", "tfidf", "--output", str(tmp_path / "out.jsonl")]
    assert cli.main([*arguments, "--max-density-ratio", "4"]) == 0
    text = capsys.readouterr().out
    summary = json.loads(text.strip().splitlines()[-1])
    assert summary["rows"] == 300
    assert 0.5 < summary["auc_low"] < summary["auc"] < summary["auc_high"] <= 1
    assert f"{summary['auc']:.3f} [{summary['auc_low']:.3f}, {summary['auc_high']:.3f}]" in text
    assert "effective sample size" in text
    assert max(r["weight"] for r in _read(tmp_path / "out.jsonl")) <= 4


@pytest.mark.parametrize(
    ("rows", "extra", "message"),
    [
        ([{"prompt": "a", "completion": "b", "label": True}] * 4, [], "all 4 rows have label True"),
        (
            [*_rows(9), {"prompt": "a", "completion": "b", "score": 1}],
            [],
            "in.jsonl:10: label must be true or false, not None",
        ),
        (
            [{"prompt": "a", "completion": "b", "label": 1}] * 3,
            [],
            "label must be true or false, not 1; `bco-fast convert",
        ),
        (
            [{"prompt": 3, "completion": "b", "label": True}] * 3,
            [],
            "prompt must be a string, or messages with a content, not int (and 2 more",
        ),
        ([{"prompt": "a", "label": True, "weight": -1}], [], "weight must be a number >= 0, not -1"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], [], "one prompt"),
        ([{"prompt": "a b", "label": True}, {"prompt": "c d", "label": False}], [], "2 distinct prompts are too few"),
        ([{"prompt": f"{i}", "label": i % 2 == 0} for i in range(9)], [], "no prompt has a word of two letters"),
        (_rows(20), ["--min_density_ratio", "5", "--max_density_ratio", "2"], "0 < min <= max"),
        (_rows(20), ["--embedder", "/nowhere/at/all"], "neither tfidf nor a folder"),
        (_rows(20), ["--min_density_ratio", "nan"], "0 < min <= max"),
        (_rows(20), ["--state", "/nowhere.json"], "--state /nowhere.json: no such file"),
        (_rows(20), ["--state", "{data}", "--seed", "1"], "seed come from the state"),
        (_rows(20), ["--data", "owner/name"], "owner/name: no such file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_in_one_line_and_writes_nothing(tmp_path, capsys, rows, extra, message):
    data = tiny.write(tmp_path / "in.jsonl", rows)
    arguments = ["udm", "--data", str(data), "--embedder", "tfidf", "--output", str(tmp_path / "out.jsonl")]
    arguments += [word.format(data=data) for word in extra]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_input_is_never_overwritten(tmp_path):
    data = tiny.write(tmp_path / "in.jsonl", _rows(20))
    with pytest.raises(ValueError, match="is the input"):
        match_file(data, data, embedder="tfidf")
    (tmp_path / "link.jsonl").symlink_to(data)
    with pytest.raises(ValueError, match="is the input"):
        match_file(data, tmp_path / "link.jsonl", embedder="tfidf")


def _broken_states():
    ratio = DensityRatio(make_embedder("tfidf"))
    rows = _rows(60)
    ratio.fit([r["prompt"] for r in rows], [r["label"] for r in rows])
    whole = ratio.state_dict()
    embedder, folds = whole["embedder"], whole["folds"]
    return {
        "empty": {},
        "a list": [],
        "another schema": {**whole, "schema": 1},
        "no folds": {**whole, "folds": []},
        "not finite": {**whole, "folds": [{**folds[0], "intercept": math.nan}, *folds[1:]]},
        "short coefficients": {**whole, "folds": [{**fold, "coef": fold["coef"][1:]} for fold in folds]},
        "uneven coefficients": {**whole, "folds": [{**folds[0], "coef": folds[0]["coef"][1:]}, *folds[1:]]},
        "idf of others": {**whole, "embedder": {**embedder, "idf": embedder["idf"][1:]}},
        "a term twice": {**whole, "embedder": {**embedder, "terms": [embedder["terms"][1], *embedder["terms"][1:]]}},
        "another kind": {**whole, "embedder": {"kind": "pickle"}},
        "a seed of words": {**whole, "seed": "x"},
    }  # fmt: skip


def test_a_state_that_is_not_whole_is_refused(tmp_path):
    data = tiny.write(tmp_path / "in.jsonl", _rows(20))
    for name, state in _broken_states().items():
        path = tmp_path / "state.json"
        path.write_text(json.dumps(state))
        with pytest.raises(ValueError, match=r"state\.json: the state (is|was)"):
            match_file(data, tmp_path / "out.jsonl", state=path)
        assert not (tmp_path / "out.jsonl").exists(), name
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not a state of"):
        match_file(data, tmp_path / "out.jsonl", state=path)
