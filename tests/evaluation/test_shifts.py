"""Shifts against the definition, one token at a time in float64; the Gini coefficient against known distributions."""

import json
import math

import numpy as np
import pytest
import tiny
import torch

from bco_fast import cli
from bco_fast.data.rows import read_rows
from bco_fast.data.sources import FeedbackError
from bco_fast.data.tokenize import load_feedback
from bco_fast.evaluation import shifts as module
from bco_fast.evaluation.shifts import (
    RESPONSES,
    SERIES,
    ShiftError,
    TokenValues,
    compare,
    gini,
    read_deciles,
    response_values,
    token_values,
)


@pytest.fixture(scope="session")
def examples():
    return load_feedback(tiny.rows(12), tiny.build_tokenizer()).examples


def _by_definition(model, examples, vocabulary):
    found = []
    for example in examples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(example.input_ids)[None]).logits[0].double()
        for t in range(example.completion_start, len(example)):
            z, token = logits[t - 1], int(example.input_ids[t])
            found.append((float(z.log_softmax(-1)[token]), float(z[token]), float(z[:vocabulary].mean())))
    return np.array(found).T


@pytest.mark.parametrize("tokens_per_batch", [1, 30, 2048])
def test_values_are_the_definition(examples, tokens_per_batch, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 2)
    model = tiny.model()
    values = token_values(model, examples, pad_token_id=1, vocabulary=70, tokens_per_batch=tokens_per_batch)
    for series, expected in zip(SERIES, _by_definition(model, examples, 70), strict=True):
        np.testing.assert_allclose(getattr(values, series), expected, atol=2e-5)


def test_logits_of_one_batch_at_a_time(examples):
    model = tiny.model()
    seen = []
    model.register_forward_hook(
        lambda module, args, output: seen.append(output.logits.shape[0] * output.logits.shape[1])
    )
    token_values(model, examples, pad_token_id=1, tokens_per_batch=40)
    assert len(seen) > 3
    assert max(seen) <= 40


def test_gini_of_known_distributions():
    assert gini([3.0] * 7) == 0
    assert gini([0.0] * 9 + [5.0]) == pytest.approx(0.9)
    n = 1000
    assert gini(np.arange(1, n + 1)) == pytest.approx((n - 1) / (3 * n))  # uniform: 1/3
    rng = np.random.default_rng(0)
    assert gini(rng.exponential(size=200_000)) == pytest.approx(0.5, abs=0.005)
    assert gini(rng.pareto(3, size=400_000) + 1) == pytest.approx(1 / 5, abs=0.005)  # 1 / (2a - 1)
    x = rng.random(50)
    pairwise = np.abs(x[:, None] - x).sum() / (2 * len(x) ** 2 * x.mean())
    assert gini(x) == pytest.approx(pairwise)
    assert gini(1e300 * x) == pytest.approx(gini(x))
    assert math.isnan(gini([]))
    assert math.isnan(gini([0.0, 0.0]))
    for bad in ([-1.0, 2.0], [1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="finite values >= 0"):
            gini(bad)


def test_the_report_is_by_class():
    reference = TokenValues(*np.zeros((3, 6)))
    policy = TokenValues(np.array([1.0, 1, 1, -2, -4, -6]), np.zeros(6), np.full(6, 0.25))
    report = compare(policy, reference, [True] * 3 + [False] * 3, bins=4)
    assert report["tokens"] == {"up": 3, "down": 3, "all": 6}
    logp = report["shifts"]["logp"]
    assert (logp["up"]["mean"], logp["up"]["gini"], logp["up"]["std"]) == (1, 0, 0)
    assert (logp["down"]["mean"], logp["down"]["mean_absolute"]) == (-4, 4)
    assert logp["down"]["gini"] == pytest.approx(gini([2, 4, 6]))
    assert logp["down"]["quantiles"]["50"] == -4
    for series in SERIES:
        part = report["shifts"][series]
        counts = {name: np.array(part[name]["histogram"]) for name in ("up", "down", "all")}
        assert (counts["up"] + counts["down"] == counts["all"]).all()
        assert counts["all"].sum() == 6  # what lies beyond the edges is counted
        assert len(part["edges"]) == 5
    assert report["shifts"]["logit"]["up"]["gini"] is None
    assert report["shifts"]["mean_logit"]["all"]["mean"] == 0.25
    assert compare(policy, reference, [True] * 6)["shifts"]["logp"]["down"] is None
    with pytest.raises(ShiftError, match="6 and 6 tokens, 5 labels"):
        compare(policy, reference, [True] * 5)


def test_a_constant_on_all_logits_moves_the_mean_and_nothing_else(examples):
    model = tiny.model()
    before = token_values(model, examples, pad_token_id=1)
    model.lm_head.bias = torch.nn.Parameter(torch.full((model.config.vocab_size,), 2.5))
    report = compare(token_values(model, examples, pad_token_id=1), before, np.ones(len(before.logp), dtype=bool))
    shifts = {series: report["shifts"][series]["up"] for series in SERIES}
    assert shifts["mean_logit"]["mean"] == pytest.approx(2.5, abs=1e-5)
    assert shifts["logit"]["mean"] == pytest.approx(2.5, abs=1e-5)
    assert shifts["logp"]["mean_absolute"] < 1e-5


def test_a_value_that_is_not_finite_is_named(examples):
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight[int(examples[3].input_ids[-2])] = math.nan
    with pytest.raises(ShiftError, match=r"example \d+: a log-likelihood or logit of LlamaForCausalLM is not finite"):
        token_values(model, examples, pad_token_id=1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("policy", "reference")):
        tiny.model(seed=seed).save_pretrained(root / name)
        tiny.build_tokenizer().save_pretrained(root / name)
    return root


def test_shifts_from_the_command_line(folders, tmp_path, capfd):
    data = tiny.write(tmp_path / "feedback.jsonl", tiny.rows(30))
    arguments = ["shifts", "--model", folders / "policy", "--ref_model", folders / "reference", "--data", data,
                 "--output_dir", tmp_path / "out", "--max_length", 64]  # fmt: skip
    yardstick = [0.0] * 9
    (tmp_path / "other.json").write_text(json.dumps({"deciles": yardstick}))
    assert cli.main([*map(str, arguments), "--deciles_of", str(tmp_path / "other.json")]) == 0
    out = capfd.readouterr().out
    summary = json.loads(out.strip().splitlines()[-1])
    report = json.loads((tmp_path / "out" / "shifts.json").read_text())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"shifts.json", "shifts.png"}
    assert (tmp_path / "out" / "shifts.png").read_bytes().startswith(b"\x89PNG")
    examples = load_feedback(data, tiny.build_tokenizer()).examples
    assert summary["tokens"] == sum(len(e) - e.completion_start for e in examples)
    assert report["tokens"]["up"] == sum(len(e) - e.completion_start for e in examples if e.label)
    expected = np.subtract(
        *(_by_definition(tiny.model(seed=s), [e for e in examples if e.label], None) for s in (0, 1))
    )
    assert summary["logp_mean_up"] == pytest.approx(expected[0].mean(), abs=1e-5)
    assert summary["mean_logit_gini_up"] == pytest.approx(gini(np.abs(expected[2])), abs=1e-4)
    assert "log-likelihood, thumbs up" in out
    assert report["shares"][0] + report["shares"][-1] == 1  # below 0 and from 0 on
    assert sum(report["response_histograms"]["response_logit_gini"]["histogram"]) == 30


def test_a_model_has_no_shift_against_itself(folders, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("bco_fast.evaluation.shifts.plot", lambda report, path: path.touch())
    data = tiny.write(tmp_path / "feedback.jsonl", tiny.rows(30))
    arguments = ["shifts", "--model", folders / "policy", "--ref_model", folders / "policy", "--data", data,
                 "--output_dir", tmp_path / "out"]  # fmt: skip
    assert cli.main(list(map(str, arguments))) == 0
    summary = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert summary["logp_mean_up"] == 0
    assert summary["logp_gini_up"] is None


BAD = {
    "no file": ({"data": "./nowhere.jsonl"}, "--data ./nowhere.jsonl: no such file"),
    "no model": ({"ref_model": "./nowhere"}, "./nowhere"),
    "another tokenizer": ({"ref_model": "{other}"}, "different tokenizers"),
    "no batch": ({"tokens_per_batch": 0}, "tokens_per_batch must be at least 1"),
    "no deciles": ({"deciles_of": "./nowhere.json"}, "--deciles_of nowhere.json: No such file"),
    "no room": ({"max_length": 1}, "max_length must be at least 2"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_options_are_one_line_and_nothing_is_written(folders, tmp_path, capfd, kind):
    changes, message = BAD[kind]
    other = tmp_path / "other"
    tiny.model().save_pretrained(other)
    tokenizer = tiny.build_tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(other)
    data = tiny.write(tmp_path / "feedback.jsonl", tiny.rows(8))
    options = {
        "model": folders / "policy",
        "ref_model": folders / "reference",
        "data": data,
        "output_dir": tmp_path / "out",
    }
    arguments = [
        x for name, value in (options | changes).items() for x in (f"--{name}", str(value).format(other=other))
    ]
    assert cli.main(["shifts", *arguments]) == 2
    assert message in capfd.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_whole_responses_by_hand():
    """BNF's Fig. 3: two responses, of two tokens and of one."""
    zeros = np.zeros(3)
    policy = TokenValues(np.array([1.0, -3.0, 0.5]), np.array([2.0, 0.0, -4.0]), zeros)
    found = compare(policy, TokenValues(zeros, zeros, zeros), np.ones(3, dtype=bool), lengths=[2, 1])["responses"]
    assert found == {
        "response_logp": (2.0 + 0.5) / 2,
        "response_logit": (2.0 + 4.0) / 2,
        "response_logp_per_token": (1.0 + 0.5) / 2,
        "response_logit_per_token": (1.0 + 4.0) / 2,
        "response_logit_gini": (0.5 + 0.0) / 2,
    }


def test_each_response_is_in_a_histogram():
    """The counts behind the panels of Fig. 3, and its scatter."""
    rng = np.random.default_rng(0)
    policy, lengths = TokenValues(*rng.normal(size=(3, 30))), [1, 2, 3, 4] * 3
    zeros = TokenValues(*np.zeros((3, 30)))
    report = compare(policy, zeros, np.ones(30, dtype=bool), lengths=lengths)
    values = response_values(policy, zeros, lengths)
    for name in RESPONSES:
        part = report["response_histograms"][name]
        assert sum(part["histogram"]) == 12
        assert (part["edges"][0], part["edges"][-1]) == (values[name].min(), values[name].max())
    assert report["scatter"]["logp"] == [abs(x.sum()) for x in np.split(policy.logp, np.cumsum(lengths)[:-1])]
    same = compare(zeros, zeros, np.ones(30, dtype=bool), lengths=lengths)
    assert same["responses"]["response_logit_gini"] is None
    assert same["response_histograms"]["response_logit_gini"] == {"edges": [], "histogram": []}


def test_shares_of_another_policys_deciles(tmp_path):
    """BNF's Fig. 4: a policy that moves half as far has its tokens in the middle; the yardstick itself a tenth in each."""
    shift, zeros = np.random.default_rng(0).normal(size=1000), np.zeros((3, 1000))
    yardstick = compare(TokenValues(shift, *zeros[:2]), TokenValues(*zeros), np.ones(1000, dtype=bool))
    (tmp_path / "shifts.json").write_text(json.dumps(yardstick))
    deciles = read_deciles(tmp_path)
    for scale, middle in ((1.0, 0.2), (0.5, None)):
        made = TokenValues(scale * shift, *zeros[:2])
        shares = compare(made, TokenValues(*zeros), np.ones(1000, dtype=bool), deciles=deciles)["shares"]
        assert sum(shares) == pytest.approx(1)
        if middle:
            assert shares == pytest.approx([0.1] * 10)
        else:
            assert min(shares[4:6]) > 0.15 > 0.05 > max(shares[0], shares[-1])
    for content in ("{}", '{"deciles": [1]}', "no json"):
        (tmp_path / "shifts.json").write_text(content)
        with pytest.raises(ShiftError, match=r"is no shifts\.json with deciles"):
            read_deciles(tmp_path / "shifts.json")


def test_labels_may_be_missing():
    rows = read_rows(
        [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c", "label": False}], needs="texts"
    )
    assert [row.label for row in rows] == [True, False]
    with pytest.raises(FeedbackError, match="label must be true or false"):
        read_rows([{"prompt": "a", "completion": "b", "label": 1}], needs="texts")
