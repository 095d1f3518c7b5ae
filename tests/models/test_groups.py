"""Checkpoints over groups of layers, and layers in tiles: how much is kept, and that nothing else changes."""

import pytest
import small_runs
import tiny
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bco_fast import FeedbackTrainer
from bco_fast.models.groups import fewest_checkpoints, group_layers, group_sizes
from bco_fast.models.live import Live
from bco_fast.models.memory import free_embeddings
from bco_fast.models.tiles import tile_layers
from bco_fast.training.values import check_others

LAYERS, TOKENS, WIDTH = 10, 64, 32
IDS = torch.arange(TOKENS)[None] % 60


def _model(dtype=torch.float32, layers=LAYERS):
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=60, num_hidden_layers=layers, attention_dropout=0.1, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    free_embeddings(model)
    return model


def _gradients(model, ids=IDS):
    torch.manual_seed(1)  # of dropout, which the recomputation must repeat
    model.zero_grad()
    model.model(input_ids=ids, use_cache=False).last_hidden_state.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _peak(model, ids):
    model.model.layers.requires_grad_(False)  # gradients of weights would hide what is kept of tokens
    with Live() as live:
        live.enter("step")
        _gradients(model, ids)
    return live.peaks["step"]


def _kept(layers, most):
    """Hidden states that exist at most in the backward of groups within groups, and forwards of one layer at most."""
    if layers == 1:
        return 1, 1
    found = [(index, *_kept(size, most - index), size) for index, size in enumerate(group_sizes(layers, most))]
    return max(index + kept for index, kept, _, _ in found), max(runs + (size > 1) for *_, runs, size in found)


def test_group_sizes_cover_the_layers_and_keep_what_they_promise():
    for layers in range(1, 81):
        for most in range(fewest_checkpoints(layers), layers + 1):
            sizes = group_sizes(layers, most)
            assert (sum(sizes), len(sizes)) == (layers, most)
            assert min(sizes) >= 1
            kept, runs = _kept(layers, most)
            assert kept == most
            assert runs == next(n for n in (1, 2, 3) if fewest_checkpoints(layers, n) <= most)
        for most in range(1, layers + 1):
            sizes = group_sizes(layers, most, offloaded=True)
            assert (sum(sizes), len(sizes)) == (layers, most)
            assert max(sizes) - min(sizes) <= 1
    assert [fewest_checkpoints(32, runs) for runs in (1, 2, 3)] == [32, 8, 5]
    with pytest.raises(ValueError, match="at least 5 for 32 layers, not 4"):
        group_sizes(32, 4)


@pytest.mark.parametrize(("most", "offloaded"), [(4, False), (7, False), (3, True), (3, False), (10, False)])
def test_groups_repeat_every_bit(most, offloaded):
    expected = _gradients(_model())
    model = _model()
    group_layers(model, 9)
    group_layers(model, most, offloaded=offloaded)  # the second choice counts
    found = _gradients(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())
    without, alone = model.eval()(IDS).logits, _model().eval()(IDS).logits
    assert torch.equal(without, alone)


@pytest.mark.parametrize("most", [4, 3])
def test_so_many_hidden_states_exist_at_most(most):
    """And one fewer: the first layer's input is looked up again."""
    model, ids = _model(), IDS.repeat(1, 4)
    whole = _peak(model, ids)
    group_layers(model, most)
    saved = (whole - _peak(model, ids)) / (4 * ids.numel() * WIDTH)
    assert saved == pytest.approx(LAYERS - most + 1, abs=0.2)


def test_embeddings_are_looked_up_again_unless_something_changes_them():
    noise = torch.randn(1, TOKENS, WIDTH)

    def hooked(model, change):
        if change == "hook":
            model.model.embed_tokens.register_forward_hook(lambda module, args, out: out + noise)
        elif change == "in place":
            model.model.layers[0].register_forward_pre_hook(lambda module, args: (args[0].mul_(2),))
        return model

    for change, lookups in ((None, 2), ("hook", 1), ("in place", 1)):
        expected = _gradients(hooked(_model(), change))
        model = hooked(_model(), change)
        group_layers(model, 10)
        embedding, calls = model.model.embed_tokens, []
        forward = embedding.forward
        embedding.forward = lambda ids, forward=forward, calls=calls: calls.append(ids) or forward(ids)
        found = _gradients(model)
        assert len(calls) == lookups, change
        assert all(torch.equal(found[name], grad) for name, grad in expected.items()), change


def test_a_model_that_changes_hidden_states_between_layers_is_refused():
    model = _model(layers=3)
    group_layers(model, 2)
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    with pytest.raises(RuntimeError, match="leave layer_checkpoints off"):
        _gradients(model)
    model.model.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    with pytest.raises(ValueError, match="no list of layers that checkpoint themselves"):
        group_layers(model, 2)


def test_layer_checkpoints_wants_checkpoints_of_the_right_kind(tmp_path):
    for options, words in (
        ({}, "needs gradient_checkpointing"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "not reentrant"),
    ):
        with pytest.raises(ValueError, match=words):
            small_runs.config(tmp_path, layer_checkpoints=2, **options)
    args = small_runs.config(tmp_path, layer_checkpoints=2, gradient_checkpointing=True)
    args.deepspeed = "zero3.json"  # which is not installed
    with pytest.raises(ValueError, match="fsdp and deepspeed"):
        check_others(args)


def test_a_run_with_fewer_checkpoints_is_the_same_run(tmp_path):
    lines = []
    for most in (None, 2):
        options = {"gradient_checkpointing": True, "layer_checkpoints": most, "layer_chunk_tokens": 7}
        args = small_runs.config(tmp_path / str(most), max_steps=2, **options)
        model = tiny.model(num_hidden_layers=3)
        trainer = FeedbackTrainer(model, args, tiny.rows(16), processing_class=small_runs.TOKENIZER)
        trainer.train()
        lines.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert lines[0] == lines[1]
    assert len(set(lines[0])) > 1


def test_layers_in_tiles_are_the_same_arithmetic():
    """Gradients in tiles and without agree to 1e-6 of their norm, and are as near to a model's in float64, whose norms round to
    float32 all the same."""

    def without_dropout(dtype, tokens=None):
        model = _model(dtype, layers=2)
        model.config._attn_implementation = "eager"
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        if tokens:
            tile_layers(model, tokens)
        return _gradients(model)

    truth, tiled = without_dropout(torch.float64), without_dropout(torch.float64, 17)
    single, single_tiled = without_dropout(torch.float32), without_dropout(torch.float32, 17)
    for name, grad in truth.items():
        size = grad.norm()
        assert (tiled[name] - grad).norm() <= 1e-7 * size, name
        assert (single_tiled[name] - grad).norm() <= 2 * (single[name] - grad).norm() + 1e-7 * size, name
        assert (single_tiled[name] - single[name]).norm() <= 1e-6 * size, name
