"""What several ranks need, one promise at a time."""

import json
import math
from pathlib import Path

import pytest
import ranks
import tiny
import torch
from heads import Case, case, fused_call
from small_runs import TOKENIZER, config, parameters, trainer

from bco_fast import FeedbackTrainer, patch_model
from bco_fast.cli import main
from bco_fast.data.batch import placeholder
from bco_fast.data.samplers import GroupedSampler, RankBatches, TokenBudgetSampler
from bco_fast.data.tokenize import load_feedback
from bco_fast.losses import kto_loss
from bco_fast.online.config import OnlineConfig
from bco_fast.online.rewards import RewardError
from bco_fast.online.trainer import OnlineFeedbackTrainer
from bco_fast.reference import fill as filling
from bco_fast.reference.cache import CacheError, ReferenceCache, ReferenceId
from bco_fast.training import checks, processes
from bco_fast.training.processes import RanksDisagree
from bco_fast.training.record import package_versions
from bco_fast.training.step import completion_sums, mean_log_ratio

REFERENCE = ReferenceId("0" * 32, "0" * 32, "float32", "sdpa")

# ---- batches


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rows", [1, 2, 9, 12, 13])
def test_ranks_share_the_batches_without_repeating_a_row(world, rows):
    batches = torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(range(rows)), 3, False)
    shares = [list(RankBatches(batches, rank, world)) for rank in range(world)]
    assert {len(share) for share in shares} == {math.ceil(math.ceil(rows / 3) / world)}
    assert {len(RankBatches(batches, rank, world)) for rank in range(world)} == {len(shares[0])}
    order = [batch for turn in zip(*shares, strict=True) for batch in turn]
    assert [i for batch in order for i in batch] == list(range(rows))
    whole = [list(RankBatches(batches, rank, world, drop_last=True)) for rank in range(world)]
    assert all(share == shares[rank][: len(share)] and all(share) for rank, share in enumerate(whole))


def test_an_epoch_reaches_the_order_inside_a_share():
    batches = torch.utils.data.BatchSampler(GroupedSampler(range(20)), 4, False)
    share = RankBatches(batches, 0, 2)
    first = list(share)
    share.set_epoch(1)
    assert list(share) != first
    budget = RankBatches(TokenBudgetSampler(load_feedback(tiny.rows(20), TOKENIZER).sides, range(20), 24), 0, 2)
    first = list(budget)
    budget.set_epoch(1)
    assert list(budget) != first


def test_a_placeholder_counts_for_nothing(tmp_path):
    """Loss, gradients, δ, metrics: a step with it is the step without."""
    found = []
    for extra in (False, True):
        made = trainer(tmp_path, ref_model=tiny.model(seed=1))
        batch = made.data_collator([made.train_dataset[i] for i in range(6)])
        batches = [batch, placeholder(made.data_collator([made.train_dataset[9]]))] if extra else [batch]
        _, step = made.get_batch_samples(iter(batches), 2, "cpu")
        sum(made.compute_loss(made.model, part, num_items_in_batch=step) for part in batches).backward()
        made.feedback.shift.step()
        logs = made.feedback.take(made.args.device)
        found.append((logs, made.delta, {n: p.grad for n, p in made.model.named_parameters()}))
    (logs, delta, grads), (with_logs, with_delta, with_grads) = found
    assert logs == with_logs
    assert delta == with_delta != 0
    assert all(torch.equal(grads[name], with_grads[name]) for name in grads)


# ---- one process


def test_several_gpus_in_one_process_are_refused_with_the_command(tmp_path):
    args = config(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"accelerate launch --num_processes 2.*torchrun --nproc_per_node 2"):
        FeedbackTrainer(tiny.model(), args, tiny.rows(4), processing_class=TOKENIZER)


def test_a_device_without_float64_is_refused():
    args = type("Args", (), {"n_gpu": 1, "device": torch.device("mps")})()
    with pytest.raises(ValueError, match=r"mps.*use_cpu=True"):
        processes.check_processes(args)


@pytest.mark.parametrize("options", [{"tokens_per_batch": 24}, {"per_device_train_batch_size": 2}])
def test_the_check_before_the_first_step_is_no_larger_than_a_batch(tmp_path, options, monkeypatch):
    made, seen = trainer(tmp_path, padding_free=True, **options), []
    monkeypatch.setattr(checks, "check_start", lambda model, ratios, lengths, autocast: seen.append(len(ratios)))
    inside, tokens = made.data_collator, []
    made.data_collator = lambda items: tokens.append(sum(len(i.example) for i in items)) or inside(items)
    made._check_start()
    assert 1 <= seen[0] <= options.get("per_device_train_batch_size", 4)
    assert tokens[0] <= options.get("tokens_per_batch", 1000)
    assert sum(map(len, made.train_dataset.examples[:4])) > 24


def test_the_evaluation_of_kto_does_not_depend_on_the_batch(tmp_path):
    """z_ref is that of the whole set, and above 0."""
    found = []
    for size in (1, 3, 20):
        made = trainer(tmp_path, rows=8, loss_type="kto", per_device_eval_batch_size=size, ref_model=tiny.model(seed=1))
        with torch.no_grad():
            made.model.lm_head.weight.mul_(0.3)
        found.append(made.evaluate())
    batch = made.data_collator([made.eval_dataset[i] for i in range(20)])
    with torch.no_grad():
        z_ref, logps = mean_log_ratio(made.model, [batch]), completion_sums(made.model, batch)
    assert z_ref > 0.1
    expected = kto_loss(logps, batch["ref_logps"], batch["label"], kl=z_ref, beta=0.1).loss
    for metrics in found:
        assert math.isclose(metrics["eval_loss"], expected, rel_tol=1e-6)
        for name in ("eval_rewards/accuracies", "eval_error_term"):
            assert math.isclose(metrics[name], found[0][name], rel_tol=1e-6), name


# ---- the head


def _resharded(rank, world):
    """The same call with shards of another size: only rank 1's changes."""
    made, sums = case(6, 1000, 24), []
    for sizes in ([500, 500], [500, 300]):
        own = slice(rank * 500, rank * 500 + sizes[rank])
        targets = made.targets.clamp(max=sum(sizes) - 1)
        on_rank = Case(made.hidden.float(), made.weight.float()[own], targets)
        logps = fused_call(on_rank, "torch", False, process_group=torch.distributed.group.WORLD)
        whole = fused_call(Case(made.hidden.float(), made.weight.float()[: sum(sizes)], targets), "torch", False)
        sums.append(float((logps - whole).abs().max()))
    return sums


@pytest.mark.timeout(60)
def test_a_vocabulary_shard_may_change_on_one_rank_alone(tmp_path):
    for errors in ranks.run(_resharded, 2, tmp_path):
        assert max(errors) < 1e-4


# ---- the reference


def _filled(rank, world, folder, fail):
    filling.ROWS_PER_SHARD = 4
    examples = load_feedback(tiny.rows(30), TOKENIZER).examples
    cache = ReferenceCache(folder, REFERENCE)
    if fail and rank == world - 1:
        cache.write_shard = _full_disk
    try:
        report = filling.fill(cache, examples, patch_model(tiny.model()), tokens_per_batch=40, progress=False, layout="padded", lockstep=world > 1)  # fmt: skip
    except CacheError as error:
        return str(error)
    again = filling.fill(ReferenceCache(folder, REFERENCE), examples, patch_model(tiny.model()), progress=False, layout="padded", lockstep=world > 1)  # fmt: skip
    return report.computed, again.computed, sorted(path.name for path in Path(folder).rglob("*.safetensors"))


def _full_disk(keys, values):
    raise CacheError("no space left")


@pytest.mark.timeout(90)
def test_a_cache_filled_in_lockstep_by_four_ranks_has_the_bytes_of_one(tmp_path):
    """Shards are named by the hash of their content."""
    four = ranks.run(_filled, 4, tmp_path / "ranks", tmp_path / "four", False)
    ((computed, again, names),) = ranks.run(_filled, 1, tmp_path / "rank", tmp_path / "one", False)  # as many threads
    assert (computed, again) == (30, 0)
    assert [report[0] for report in four] == [8, 8, 8, 6]
    assert all(report[1:] == (0, names) for report in four)


@pytest.mark.timeout(60)
def test_a_rank_that_cannot_write_ends_all_of_them_with_its_name(tmp_path):
    found = ranks.run(_filled, 3, tmp_path / "ranks", tmp_path / "cache", True)
    assert found == ["rank 2: no space left"] * 3


# ---- what is compared at the start


def _disagreeing(rank, world, folder, what):
    options, data = {}, tiny.rows(8, seed=rank if what == "rows" else 0)
    if what == "learning_rate":
        options["learning_rate"] = 0.1 * (rank + 1)
    if what == "cache_dir":
        processes.SHARED_FOLDER_SECONDS = 0.2
        real, apart = Path.expanduser, Path(folder) / f"of rank {rank}"
        Path.expanduser = lambda path: apart if "cache" in path.name else real(path)
    if what == "versions" and rank == 1:
        processes.package_versions = lambda: package_versions() | {"torch": "1.0"}
    if what == "weights":
        options["seed"] = 1
    seed = rank if what == "weights" else 0
    try:
        FeedbackTrainer(tiny.model(seed=seed), config(folder, **options), data, processing_class=TOKENIZER)
    except RanksDisagree as error:
        return str(error)
    return None


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("rows", "rank 1 was started with other data than rank 0"),
        (
            "learning_rate",
            "rank 1 was started with other options than rank 0: learning_rate is 0.2 there, 0.1 on rank 0",
        ),
        ("versions", "rank 1 was started with other versions than rank 0: torch is 1.0 there"),
        ("cache_dir", "rank 1 does not see what rank 0 writes into cache_dir"),
        ("weights", "rank 1 has a reference model with other weights"),
    ],
)
def test_ranks_that_were_started_differently_are_refused(tmp_path, what, message):
    found = ranks.run(_disagreeing, 2, tmp_path / "ranks", tmp_path / "small_runs", what)
    assert found[0] == found[1]
    assert message in found[0]


def _command(rank, world, folder):
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(["train", "--model", f"{folder}/model", "--data", f"{folder}/rows.jsonl", "--output_dir", f"{folder}/out", "--use_cpu", "true", "--learning_rate", str(0.1 + rank), "--cache_dir", f"{folder}/cache", "--report_to", "none", "--max_length", "64"])  # fmt: skip
    return code, [line for line in said.getvalue().splitlines() if "bco-fast: error" in line]


@pytest.mark.timeout(60)
def test_the_command_line_says_it_once_and_every_rank_ends_with_2(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    tiny.write(tmp_path / "rows.jsonl", tiny.rows(40))
    (code, first), (other_code, other) = ranks.run(_command, 2, tmp_path / "ranks", tmp_path)
    assert (code, other_code) == (2, 2)
    assert len(first) == 1
    assert "learning_rate" in first[0]
    assert other == []


# ---- resume


def _resumed(rank, world, folder):
    options = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3, "max_steps": 4, "ref_model": tiny.model(seed=1)}  # fmt: skip
    whole = trainer(folder, **options)
    whole.train()
    again = trainer(folder, **options)
    again.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
    lines = [[e for e in made.state.log_history if "loss" in e] for made in (whole, again)]
    same = all(torch.equal(p, q) for p, q in zip(parameters(whole).values(), parameters(again).values(), strict=True))
    return lines, same, again.delta


def _resumed_elsewhere(rank, world, folder, accumulation):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation, "max_steps": 4, "ref_model": tiny.model(seed=1)}  # fmt: skip
    made = trainer(folder, **options)
    try:
        made.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
    except ValueError as error:
        return str(error)
    return [e for e in made.state.log_history if "loss" in e and e["step"] > 2], made.delta


@pytest.mark.timeout(120)
def test_a_log_window_resumed_by_two_ranks_counts_once_and_one_rank_resumes_it_too(tmp_path):
    """A checkpoint after step 2, log lines after step 3: the line holds all three steps once. One rank that accumulates two
    micro-batches goes through the same rows; one that does not is refused."""
    found = ranks.run(_resumed, 2, tmp_path / "ranks", tmp_path)
    for (whole, again), same, _ in found:
        assert same
        assert len(whole) == 1
        assert {k: v for k, v in whole[0].items() if k != "grad_norm"} == {k: v for k, v in again[0].items() if k != "grad_norm"}  # fmt: skip
    with pytest.warns(RuntimeWarning, match="another number of processes"):
        lines, delta = _resumed_elsewhere(0, 1, tmp_path, 2)
    for name, value in found[0][0][0][0].items():
        if name not in ("grad_norm", "epoch"):
            assert math.isclose(lines[0][name], value, rel_tol=1e-5, abs_tol=1e-6), name
    assert math.isclose(delta, found[0][2], rel_tol=1e-5)
    refused = _resumed_elsewhere(0, 1, tmp_path, 1)
    assert "gradient_accumulation_steps" in refused


# ---- online


def _online(rank, world, folder, kind):
    judged = []

    def judge(prompts, completions, **columns):
        judged.append(list(completions))
        if kind == "fails" and rank == 1 and len(judged) > 1:
            raise RuntimeError("no judge today")
        if kind == "differs":
            return [float(rank)] * len(prompts)
        return [len(text) % 7 / 7 for text in completions]

    args = OnlineConfig(
        output_dir=str(folder / "out"), max_length=32, max_new_tokens=5, max_steps=2, steps_per_round=2, samples_per_prompt=2,
        per_device_train_batch_size=4, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    made = OnlineFeedbackTrainer(tiny.model(std=0.05), args, [row["prompt"] for row in tiny.rows(20)], judge, processing_class=TOKENIZER)  # fmt: skip
    try:
        made.train()
    except RewardError as error:
        return str(error)
    rows = [json.loads(line) for line in (folder / "out/rounds/round-00000.jsonl").read_text().splitlines()]
    return judged, [(row["completion"], row["reward"]) for row in rows], [tuple(i.item() for i in p.sum((0,))[:1]) for p in list(parameters(made).values())[:1]]  # fmt: skip


@pytest.mark.timeout(90)
def test_each_rank_judges_its_share_of_a_round(tmp_path):
    (judged, rows, weights), (other_judged, other_rows, other_weights) = ranks.run(_online, 2, tmp_path / "ranks", tmp_path, "agrees")  # fmt: skip
    assert rows == other_rows
    assert weights == other_weights
    assert len(rows) == 16
    assert judged[0] == other_judged[0] == [rows[0][0]]  # the same completion, to compare the judges
    assert judged[1] + other_judged[1] == [completion for completion, _ in rows]
    assert all(reward == len(completion) % 7 / 7 for completion, reward in rows)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("kind", "message"), [("fails", "rank 1: .*no judge today"), ("differs", "judge of rank 1 gives 1.0 where that of rank 0 gives 0.0")])  # fmt: skip
def test_a_judge_that_fails_or_differs_on_one_rank_stops_all(tmp_path, kind, message):
    import re

    first, other = ranks.run(_online, 2, tmp_path / "ranks", tmp_path, kind)
    assert first == other
    assert re.search(message, first), first
