"""Which rows meet: balance of the classes, stratified order, mismatched completions."""

import collections

import numpy as np
import pytest
import tiny

from bco_fast.data.samplers import StratifiedSampler, balancing_weights, mismatched, oversample
from bco_fast.data.sources import FeedbackError
from bco_fast.data.tokenize import load_feedback

TOKENIZER = tiny.build_tokenizer()


def _dataset(n=40, **options):
    return load_feedback(tiny.rows(n), TOKENIZER, max_length=64, **options)


def _unbalanced(up, down):
    rows = [{**row, "label": i < up} for i, row in enumerate(tiny.rows(up + down))]
    return load_feedback(rows, TOKENIZER, max_length=64)


@pytest.mark.parametrize(("up", "down"), [(3, 17), (17, 3), (10, 10), (1, 9), (7, 20)])
def test_oversampling_evens_the_classes_and_every_row_stays(up, down):
    dataset = _unbalanced(up, down)
    balanced = oversample(dataset)
    labels = [e.label for e in balanced.examples]
    assert labels.count(True) == labels.count(False) == max(up, down)
    assert balanced.examples[: up + down] == dataset.examples
    counts = collections.Counter(map(id, balanced.examples))
    assert max(counts.values()) - min(counts[id(e)] for e in dataset.examples if e.label is (up < down)) <= 1
    assert [e.key for e in oversample(dataset).examples] == [e.key for e in balanced.examples]


def test_oversampling_one_class_changes_nothing():
    dataset = _unbalanced(5, 0)
    assert oversample(dataset) is dataset


def test_balancing_weights_even_the_classes():
    """The rarer class gets n-/n+; 1.58 is that of the papers' 38.8 % thumbs up."""
    up, down = balancing_weights([True] * 10 + [False] * 25)
    assert (up, down) == (2.5, 1.0)
    assert balancing_weights([True] * 30 + [False] * 10) == (1.0, 3.0)
    assert balancing_weights([True] * 3) == (1.0, 1.0)


@pytest.mark.parametrize("up", [1, 13, 50, 87, 0, 100])
def test_stratified_order_has_every_row_and_the_proportion_everywhere(up):
    labels = [i < up for i in range(100)]
    sampler = StratifiedSampler(labels, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(100))
    seen = np.cumsum([0, *(labels[i] for i in order)])
    for start in range(0, 100):
        for end in range(start, 101):
            assert abs((seen[end] - seen[start]) - (end - start) * up / 100) <= 1 + 1e-9


def test_stratified_order_hangs_on_seed_and_epoch():
    labels = [i % 3 == 0 for i in range(60)]
    sampler = StratifiedSampler(labels, seed=1)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(StratifiedSampler(labels, seed=2)) != first
    again = StratifiedSampler(labels, seed=1)
    again.set_epoch(1)
    assert list(again) == list(sampler)


def test_mismatched_completions_are_of_another_prompt_and_hang_on_the_dataset_only():
    dataset = _dataset()
    wrong = mismatched(dataset, max_length=64)
    by_prompt = collections.defaultdict(set)
    for e in dataset.examples:
        by_prompt[tuple(e.input_ids[: e.completion_start])].add(tuple(e.input_ids[e.completion_start :]))
    everything = set().union(*by_prompt.values())
    for e, w in zip(dataset.examples, wrong.examples, strict=True):
        prompt = tuple(e.input_ids[: e.completion_start])
        assert tuple(w.input_ids[: w.completion_start]) == prompt
        assert tuple(w.input_ids[w.completion_start :]) in everything
    # by the definition: the next key with another prompt
    order = sorted(dataset.examples, key=lambda e: e.key)
    for place, e in enumerate(order):
        other = next(
            o
            for o in order[place + 1 :] + order[:place]
            if tuple(o.input_ids[: o.completion_start]) != tuple(e.input_ids[: e.completion_start])
        )
        mine = wrong.examples[dataset.examples.index(e)]
        assert tuple(mine.input_ids[mine.completion_start :]) == tuple(other.input_ids[other.completion_start :])
    shuffled = load_feedback(tiny.rows(40)[::-1], TOKENIZER, max_length=64)
    keys = {e.key: w.key for e, w in zip(dataset.examples, wrong.examples, strict=True)}
    again = mismatched(shuffled, max_length=64)
    assert keys == {e.key: w.key for e, w in zip(shuffled.examples, again.examples, strict=True)}


def test_many_completions_of_one_prompt_are_skipped_over():
    rows = [{"prompt": "pack two fruit for anna :", "completion": f"apple {w}", "label": True} for w in ("pear", "plum", "lemon", "grape")]  # fmt: skip
    rows.append({"prompt": "pack two tools for anna :", "completion": "saw drill", "label": True})
    dataset = load_feedback(rows, TOKENIZER, max_length=64)
    wrong = [TOKENIZER.decode(w.input_ids[w.completion_start :]) for w in mismatched(dataset, max_length=64).examples]
    assert wrong[:4] == ["saw drill </s>"] * 4
    assert wrong[4].startswith("apple")


def test_mismatched_rows_are_truncated_as_rows_are():
    dataset = _dataset(20)
    assert all(len(e) <= 9 for e in mismatched(dataset, max_length=9, max_prompt_length=5).examples)


def test_one_prompt_has_no_mismatch():
    rows = [{**row, "prompt": "pack two fruit for anna :"} for row in tiny.rows(4)]
    with pytest.raises(FeedbackError, match="same prompt"):
        mismatched(load_feedback(rows, TOKENIZER, max_length=64), max_length=64)
