"""Which reference a cache belongs to, what must miss and what must hit (C5), and what filling promises (C6)."""

import socket
import warnings

import numpy as np
import pytest
import tiny
import torch
import torch.multiprocessing as mp
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

import bco_fast.reference.cache
import bco_fast.reference.fill
from bco_fast import CacheError, FeedbackConfig, FeedbackTrainer, ReferenceCache, load_feedback, patch_model
from bco_fast.data.dataset import Example
from bco_fast.reference.cache import MANIFEST
from bco_fast.reference.fill import fill
from bco_fast.reference.identity import reference_id

peft = pytest.importorskip("peft")


def _examples(n=40, **options):
    return load_feedback(tiny.rows(n), tiny.build_tokenizer(), **options).examples


def _bit(model):
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight.view(torch.int32)[3, 5] ^= 1
    return model


def _eager(model):
    model.set_attn_implementation("eager")
    return model


def _adapted(model, seed=0, **options):
    torch.manual_seed(seed)
    modules = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["embed_tokens"]} | options
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **modules))


# what changes -> (the reference before, after)
REFERENCES_THAT_MISS = {
    "one bit of one weight": lambda: (reference_id(tiny.model()), reference_id(_bit(tiny.model()))),
    "dtype": lambda: (reference_id(tiny.model()), reference_id(tiny.model().bfloat16())),
    "autocast": lambda: (reference_id(tiny.model()), reference_id(tiny.model(), autocast="bf16")),
    "softcap": lambda: tuple(
        reference_id(tiny.model(Gemma2Config, head_dim=8, final_logit_softcapping=c)) for c in (20.0, 30.0)
    ),
    "logit scale": lambda: tuple(reference_id(tiny.model(CohereConfig, logit_scale=s)) for s in (0.25, 0.5)),
    "logits scaling": lambda: tuple(reference_id(tiny.model(GraniteConfig, logits_scaling=s)) for s in (4.0, 8.0)),
    "rope": lambda: tuple(reference_id(tiny.model(LlamaConfig, rope_theta=t)) for t in (1e4, 5e5)),
    "norm": lambda: tuple(reference_id(tiny.model(LlamaConfig, rms_norm_eps=e)) for e in (1e-6, 1e-5)),
    "attention backend": lambda: (reference_id(tiny.model()), reference_id(_eager(tiny.model()))),
    "adapter on or off": lambda: tuple(reference_id(_adapted(tiny.model()), adapter=on) for on in (False, True)),
}


@pytest.mark.parametrize("change", REFERENCES_THAT_MISS)
def test_another_reference_misses(change):
    before, after = REFERENCES_THAT_MISS[change]()
    assert before.digest != after.digest


def test_another_schema_misses(monkeypatch):
    before = reference_id(tiny.model()).digest
    monkeypatch.setattr(bco_fast.reference.cache, "SCHEMA", bco_fast.reference.cache.SCHEMA + 1)
    assert reference_id(tiny.model()).digest != before


ROWS_THAT_MISS = {
    "one token": lambda ids, start: (np.where(np.arange(len(ids)) == 2, ids + 1, ids), start),
    "the mask": lambda ids, start: (ids, start + 1),
    "truncation": lambda ids, start: (ids[:-1], start),
}


@pytest.mark.parametrize("change", ROWS_THAT_MISS)
def test_another_row_misses(change):
    ids, start = np.arange(10, 20), 4
    assert Example(ids, start, True, 1.0).key != Example(*ROWS_THAT_MISS[change](ids, start), True, 1.0).key


def test_fourteen_changes_miss():
    assert len(REFERENCES_THAT_MISS) + len(ROWS_THAT_MISS) + 1 == 14


RUNS_THAT_HIT = {
    "learning rate": {"learning_rate": 1e-3},
    "beta": {"beta": 0.5},
    "loss": {"loss_type": "bce"},
    "seed": {"seed": 7, "data_seed": 8},
    "order": {},
    "subset": {},
    "batch size": {"per_device_train_batch_size": 3, "reference_tokens_per_batch": 100},
    "output folder": {"output_dir": "elsewhere"},
    "logging": {"logging_steps": 1, "log_level": "debug"},
    "padding side": {},
    "workspace": {"workspace_bytes": 1 << 16},
    "file path": {},
}


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """-> a function that sets up a run on a cache that a first run has filled, and says what it computed."""
    root = tmp_path_factory.mktemp("small_runs")
    rows, saved = tiny.rows(24), root / "model"
    tiny.model().save_pretrained(saved)

    def run(change="", **options):
        tokenizer = tiny.build_tokenizer()
        data = {"order": rows[::-1], "subset": rows[5:9]}.get(change, rows)
        if change == "padding side":
            tokenizer.padding_side = "left"
        if change == "file path":
            data = tiny.write(root / "feedback.jsonl", rows)
        defaults = {"output_dir": "out", "max_length": 64, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
        config = FeedbackConfig(**defaults | options | {"cache_dir": str(root / "cache")})
        return FeedbackTrainer(str(saved), config, data, processing_class=tokenizer).reference_report

    assert run().computed == 24
    return run


@pytest.mark.parametrize("change", RUNS_THAT_HIT)
def test_another_run_hits(trained_once, change):
    report = trained_once(change, **RUNS_THAT_HIT[change])
    assert (report.computed, report.hits) == (0, 4 if change == "subset" else 24)


def test_twelve_changes_hit():
    assert len(RUNS_THAT_HIT) == 12


@pytest.mark.parametrize("target", ["linear", "everything"])
def test_a_model_with_adapters_is_its_base_model_whatever_they_hold(target):
    options = {"target_modules": "all-linear", "modules_to_save": None} if target == "linear" else {}
    base = reference_id(tiny.model())
    assert reference_id(_adapted(tiny.model(), seed=1, **options)) == base
    assert reference_id(_adapted(tiny.model(), seed=2, **options)) == base
    assert reference_id(_adapted(_bit(tiny.model()), **options)) != base
    assert reference_id(_adapted(tiny.model(), **options).merge_and_unload()) != base
    seen = {reference_id(_adapted(tiny.model(), seed=s, **options), adapter=True).digest for s in (1, 1, 2)}
    assert len(seen) == 2


def test_adapters_that_cannot_be_taken_off_are_refused():
    merged = _adapted(tiny.model(), modules_to_save=None)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        reference_id(merged)
    added = tiny.model()
    added.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="get_peft_model"):
        reference_id(added)


def test_filling_takes_adapters_off_unless_they_are_asked_for(tmp_path):
    examples = _examples(6)
    keys = [example.key for example in examples]

    def sums(model, **options):
        patch_model(model)
        cache = ReferenceCache(tmp_path, reference_id(model, **options))
        return fill(cache, examples, model, progress=False, **options), cache.sums(keys)

    first, base = sums(tiny.model())
    adapted = _adapted(tiny.model(), modules_to_save=None)
    second, off = sums(adapted)
    third, on = sums(adapted, adapter=True)
    merged = _adapted(tiny.model(), modules_to_save=None).merge_and_unload()
    _, expected = sums(merged)
    assert (first.computed, second.computed, third.computed) == (6, 0, 6)
    assert np.array_equal(base, off)
    assert not np.allclose(on, base, atol=0.1)
    assert np.allclose(on, expected, atol=1e-3)


def test_weights_are_hashed_in_pieces_but_not_confused(monkeypatch):
    monkeypatch.setattr(bco_fast.reference.identity, "_HASHED_PIECE", 100)  # bytes; no multiple of a tensor's size
    weight = torch.arange(60, dtype=torch.float32)
    digest = bco_fast.reference.identity._digest
    base = digest({"a": weight, "b": weight[:10]})
    assert digest({"b": weight[:10].clone(), "a": weight.clone()}) == base
    assert digest({"a": weight.view(6, 10).T.contiguous().T.reshape(60), "b": weight[:10]}) == base
    others = [
        {"a": weight, "c": weight[:10]},
        {"a": weight.view(6, 10), "b": weight[:10]},
        {"a": weight.view(6, 10).T, "b": weight[:10]},
        {"a": weight.view(torch.int32), "b": weight[:10]},
        {"a": weight[:50], "b": weight[50:]},
        {"a": weight, "b": weight[1:11]},
        {"a": weight.flip(0), "b": weight[:10]},
        {"a": weight, "b": weight[:0]},
    ]
    assert len({base, *map(digest, others)}) == 9
    with pytest.raises(ValueError, match="no values in memory"):
        digest({"a": torch.empty(3, device="meta")})


def test_a_model_that_zero3_sharded_while_loading_is_not_identified():
    """All models of one architecture would share a key."""
    model = tiny.model()
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.data = number, torch.empty(0)
    for refuses in (reference_id, patch_model):
        with pytest.raises(ValueError, match="pass its path instead"):
            refuses(model)


def test_a_wrong_value_is_refused_by_recomputing_four_rows(tmp_path, monkeypatch):
    model, examples = patch_model(tiny.model()), _examples(4)
    cache = ReferenceCache(tmp_path, reference_id(model))
    computed = []
    real = bco_fast.reference.fill.token_logps
    monkeypatch.setattr(bco_fast.reference.fill, "token_logps", lambda *a: computed.append(len(a[1])) or real(*a))
    fill(cache, examples, model, progress=False)
    assert sum(computed) == 4  # what was just computed is not checked again
    fill(cache, _examples(40), model, progress=False)
    assert sum(computed) == 4 + 36 + 4
    right = {example.key: cache.token_logps(example.key) for example in examples}
    for shift, refused in ((2e-4, False), (2e-3, True)):  # nats a token; the budget of float32 is 1e-3
        wrong = ReferenceCache(tmp_path / str(shift), reference_id(model))
        wrong.write_shard(list(right), [value + np.float32(shift) for value in right.values()])
        if refused:
            with pytest.raises(CacheError, match="Delete that folder, or choose another cache_dir"):
                fill(wrong, examples, model, progress=False)
        else:
            fill(wrong, examples, model, progress=False)


@pytest.mark.parametrize("where", ["values", "index"])
def test_filling_mends_a_damaged_shard_with_one_warning(tmp_path, monkeypatch, where):
    monkeypatch.setattr(bco_fast.reference.fill, "ROWS_PER_SHARD", 8)
    model, examples = patch_model(tiny.model()), _examples()
    name = reference_id(model)
    cache = ReferenceCache(tmp_path, name)
    fill(cache, examples, model, tokens_per_batch=64, progress=False)
    whole = {p.name: p.read_bytes() for p in cache.folder.iterdir()}
    path = cache.shards[2].path
    data = bytearray(path.read_bytes())
    data[-3 if where == "values" else 500] ^= 1
    path.write_bytes(data)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        opened = ReferenceCache(tmp_path, name)
        report = fill(opened, examples, model, tokens_per_batch=64, progress=False)
    assert [path.name in str(warning.message) for warning in warned] == [True]
    assert (report.hits, report.computed) == (32, 8)
    assert {p.name: p.read_bytes() for p in cache.folder.iterdir()} == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fill(ReferenceCache(tmp_path, name), examples, model, progress=False).computed == 0


def test_without_the_check_a_damaged_value_shows_when_it_is_read(tmp_path):
    model, examples = patch_model(tiny.model()), _examples(4)
    name = reference_id(model)
    cache = ReferenceCache(tmp_path, name)
    fill(cache, examples, model, progress=False)
    sums, path = cache.sums([example.key for example in examples]), cache.shards[0].path
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    opened = ReferenceCache(tmp_path, name)
    with pytest.raises(CacheError, match=f"{path.name}: its values have changed.*run again"):
        fill(opened, examples, model, progress=False, check_tokens=False)  # the four rows that are compared are all
    assert np.array_equal(opened.sums([example.key for example in examples]), sums)


def test_mismatched_completions_live_in_the_same_store(tmp_path):
    model, examples = patch_model(tiny.model()).eval(), _examples(6)
    mismatched = [
        Example(np.concatenate([a.input_ids[: a.completion_start], b.input_ids[b.completion_start :]]), a.completion_start, True, 1.0)
        for a, b in zip(examples, examples[1:] + examples[:1], strict=True)
    ]  # fmt: skip
    cache = ReferenceCache(tmp_path, reference_id(model))
    report = fill(cache, [*examples, *mismatched], model, progress=False)
    assert report.computed == len({example.key for example in [*examples, *mismatched]}) > 6
    for example in mismatched:
        start = example.completion_start
        with torch.no_grad():
            logps = model(input_ids=torch.from_numpy(example.input_ids)[None]).logits.log_softmax(-1)[0]
        expected = logps[np.arange(start - 1, len(example) - 1), example.input_ids[start:]].numpy()
        assert np.allclose(cache.token_logps(example.key), expected, atol=1e-4)


def test_the_order_of_the_rows_does_not_change_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(bco_fast.reference.fill, "ROWS_PER_SHARD", 8)
    model, examples = patch_model(tiny.model()), _examples()
    name = reference_id(model)
    for folder, order in (("a", examples), ("b", examples[::-1])):
        fill(ReferenceCache(tmp_path / folder, name), order, model, tokens_per_batch=64, progress=False)
    first, second = ({p.name for p in (tmp_path / folder / name.digest).iterdir()} for folder in "ab")
    assert first == second
    assert len(first) == 6


def test_filling_leaves_the_mode_of_every_module_alone(tmp_path):
    model = patch_model(tiny.model()).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    fill(ReferenceCache(tmp_path, reference_id(model)), _examples(4), model, progress=False)
    assert [module.training for module in model.modules()] == modes


def _rank(rank, ranks, port, folder, reports):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    bco_fast.reference.fill.ROWS_PER_SHARD = 8
    model = patch_model(tiny.model())
    report = fill(ReferenceCache(folder, reference_id(model)), _examples(), model, tokens_per_batch=64, progress=False)
    reports[rank] = report.computed
    torch.distributed.barrier()  # a test's: `fill` needs none
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # starting processes with torch takes most of it; test_cache.py has the same without a model
def test_two_ranks_share_the_rows_and_end_with_the_files_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(bco_fast.reference.fill, "ROWS_PER_SHARD", 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = patch_model(tiny.model())
    name = reference_id(model)
    fill(ReferenceCache(tmp_path / "one", name), _examples(), model, tokens_per_batch=64, progress=False)
    torch.set_num_threads(threads)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        reports = manager.dict()
        mp.spawn(_rank, (2, port, tmp_path / "two", reports), nprocs=2)
        assert 40 <= sum(reports.values()) <= 48  # at most the shard at which they met twice
        # each has a part of them; how large it is depends on what else the machine does
        assert all(rows >= 8 for rows in reports.values()), dict(reports)

    def content(folder):
        return {p.name: p.read_bytes() for p in (tmp_path / folder / name.digest).iterdir() if p.name != MANIFEST}

    assert content("two") == content("one")
