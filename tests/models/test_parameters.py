"""Which parameters are trained, and where their activations lie: adapters, dtypes, checkpointing, long context."""

import copy
import logging

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model, prepare_model_for_kbit_training
from small_runs import TOKENIZER, reward_error
from small_runs import config as _config
from torch import nn
from transformers.integrations import deepspeed

from bco_fast import FeedbackTrainer, patch_model
from bco_fast.data.batch import collate
from bco_fast.data.dataset import Example
from bco_fast.models.load import add_adapter, load_model
from bco_fast.models.memory import offload_activations
from bco_fast.models.patch import completion_logps
from bco_fast.models.tiles import tile_mlps
from bco_fast.reference.identity import reference_id


def _batch():
    rng = np.random.default_rng(0)
    return collate([(Example(rng.integers(2, 60, 14), 4, True, 1.0), 0.0) for _ in range(3)], 1)


def _expected(model, batch):
    log_probs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    return log_probs.flatten(0, 1)[batch["rows"], batch["targets"]]


def _lora(model, **options):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options))


@pytest.mark.parametrize("order", ["patch the adapter", "adapt the patched"])
def test_lora_log_probabilities_are_those_of_its_logits(order):
    model, batch = tiny.model().eval(), _batch()
    if order == "adapt the patched":
        patch_model(model)
    model = _lora(model).eval()
    expected = _expected(model, batch)
    if order == "patch the adapter":
        patch_model(model)
    assert torch.allclose(completion_logps(model, batch), expected, atol=2e-5)
    with model.disable_adapter():
        base = completion_logps(model, batch)
        assert torch.allclose(base, _expected(model, batch), atol=2e-5)
    assert not torch.allclose(base, expected, atol=1e-2)


@pytest.mark.parametrize("order", ["patch the adapter", "adapt the patched"])
def test_modules_to_save_has_the_policys_head_and_the_references(order):
    model, batch = tiny.model().eval(), _batch()
    if order == "adapt the patched":
        patch_model(model)
    model = _lora(model, modules_to_save=["lm_head"]).eval()
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
    expected = _expected(model, batch)
    patch_model(model)
    ours = completion_logps(model, batch)
    assert torch.allclose(ours, expected, atol=5e-5)
    with model.disable_adapter():
        base = completion_logps(model, batch)
        assert torch.allclose(base, _expected(model, batch), atol=2e-5)
    assert not torch.allclose(ours, base, atol=1e-2)
    ours.sum().backward()
    wrapper = model.get_output_embeddings()
    assert wrapper.modules_to_save["default"].weight.grad.abs().max() > 0
    assert wrapper.original_module.weight.grad is None


@pytest.mark.parametrize("order", ["patch the adapter", "adapt the patched"])
def test_an_adapter_on_the_head_is_refused_never_ignored(order):
    model = tiny.model()
    if order == "adapt the patched":
        patch_model(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"]))
    use = patch_model if order == "patch the adapter" else lambda model: completion_logps(model, _batch())
    with pytest.raises(TypeError, match="an adapter on it cannot be fused"):
        use(model)


def test_prompt_tuning_is_refused_by_name():
    model = get_peft_model(tiny.model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        patch_model(model)


def _train(tmp_path, model=None, rows=24, **options):
    trainer = FeedbackTrainer(tiny.model() if model is None else model, _config(tmp_path, **options), tiny.rows(rows), tiny.rows(12, seed=5), processing_class=TOKENIZER)  # fmt: skip
    return trainer


def test_lora_trains_the_adapter_against_its_own_base(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "bco_fast"):
        trainer = _train(tmp_path, use_peft=True, lora_r=4, max_steps=8)
        base = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
        trainer.train()
    assert "adapter: " in caplog.text
    assert "step 0: policy and reference differ by" in caplog.text
    lines = [e for e in trainer.state.log_history if "loss" in e]
    assert abs(lines[0]["rewards/margins"]) < 1e-4
    assert abs(lines[-1]["rewards/margins"]) > 1e-3
    for name, parameter in trainer.model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name
    trainer.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_reference_of_an_adapter_is_found_again_whatever_its_initialisation(tmp_path):
    """The base with the adapter disabled: computed once for full training, LoRA, and LoRA from another seed."""
    first = _train(tmp_path)
    assert first.reference_report.computed == 36
    for seed in (0, 1):
        torch.manual_seed(seed)
        adapted = _train(tmp_path, use_peft=True, lora_r=4)
        assert (adapted.reference_report.hits, adapted.reference_report.computed) == (36, 0)
        assert np.array_equal(adapted.train_dataset.ref_logps, first.train_dataset.ref_logps)


def test_an_adapter_that_is_not_fresh_is_said_and_trained(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "bco_fast"):
        _train(tmp_path, _lora(tiny.model()), max_steps=1).train()
    assert "the adapter is not a fresh one" in caplog.text


def test_a_policy_that_disagrees_with_its_reference_is_stopped_before_the_first_step(tmp_path):
    trainer = _train(tmp_path)
    trainer.train_dataset.ref_logps = trainer.train_dataset.ref_logps + 1.0
    with pytest.raises(ValueError, match="before training policy and reference differ by"):
        trainer.train()


def _gradients(tmp_path, model=None, **options):
    trainer = _train(tmp_path, model, **options)
    batch = collate([trainer.train_dataset[i] for i in range(8)], 1)
    model = trainer.model
    if options.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the reference
            parameter.add_(0.02 * torch.sin(torch.arange(parameter.numel(), dtype=parameter.dtype)).view_as(parameter))
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def without_switches(tmp_path_factory):
    """Loss and gradients as they are without switches, and the gradients of the same model in float64."""
    folder = tmp_path_factory.mktemp("plain")
    return *_gradients(folder / "float32"), _gradients(folder / "float64", tiny.model().double())[1]


@pytest.mark.parametrize(
    "options",
    [{"gradient_checkpointing": True}, {"mlp_chunk_tokens": 3}, {"activation_offloading": True},
     {"gradient_checkpointing": True, "mlp_chunk_tokens": 2, "activation_offloading": True},
     {"layer_chunk_tokens": 3}, {"gradient_checkpointing": True, "layer_chunk_tokens": 4},
     {"gradient_checkpointing": True, "layer_checkpoints": 2}],
    ids=str,
)  # fmt: skip
def test_saving_memory_changes_no_gradient(tmp_path, without_switches, options):
    """Tiles add up a weight's gradient in another order: 1e-6 of its norm, and not further from float64's. The other switches
    change no bit."""
    loss, grads, truth = without_switches
    saved_loss, saved = _gradients(tmp_path, **options)
    assert torch.allclose(loss, saved_loss, rtol=0, atol=reward_error(logps=30))
    assert grads.keys() == saved.keys() == truth.keys()
    for name, grad in grads.items():
        if any("chunk" in option for option in options):
            assert (saved[name] - grad).norm() <= 1e-6 * grad.norm(), name
            error, plain = ((found[name] - truth[name]).norm() for found in (saved, grads))
            assert error <= max(1e-6 * truth[name].norm(), 2 * plain), name
        else:
            assert torch.equal(saved[name], grad), name


def test_activations_are_offloaded_and_weights_are_not():
    """On the CPU "host memory" is where they are; the test moves them all the same and counts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    x = torch.randn(1, 100, 64, requires_grad=True)
    model(x).square().sum().backward()
    expected = [x.grad.clone(), *(p.grad.clone() for p in model.parameters())]
    x.grad = None
    model.zero_grad()
    with offload_activations(x.shape[:2], "cpu", min_bytes=0) as hooks:
        loss = model(x).square().sum()
    # Linear saves its input, GELU its input, square its input: four tensors of 100 x 64 floats, and no weight
    assert hooks.bytes == 4 * 100 * 64 * 4
    loss.backward()
    for mine, theirs in zip([x.grad, *(p.grad for p in model.parameters())], expected, strict=True):
        assert torch.equal(mine, theirs)
    for shape, least in ((x.shape[:2], 1 << 20), (torch.Size((1, 99)), 0)):  # small; of no batch of that shape
        with offload_activations(shape, "cpu", min_bytes=least) as hooks:
            model(x)
        assert hooks.bytes == 0


def test_the_copy_of_a_weight_that_autocast_makes_stays(monkeypatch):
    """It is no parameter; offloaded, a head of [V, D] would travel at every micro-batch."""
    model, x = nn.Linear(64, 300), torch.randn(1, 100, 64, requires_grad=True)
    moved = []
    host = offload_activations.host
    monkeypatch.setattr(offload_activations, "host", lambda self, t: moved.append(tuple(t.shape)) or host(self, t))
    with offload_activations(x.shape[:2], "cpu", min_bytes=0), torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()
    assert moved == [(100, 64)]  # in bfloat16, as the matmul saves it


def test_the_backward_fetches_one_tensor_ahead():
    """Two are on the device at once: the one that is read, and the one that was saved before it."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)))
    x = torch.randn(1, 100, 64, requires_grad=True)
    waiting, there = [], []

    class Watched(offload_activations):
        def _pack(self, tensor):
            packed = super()._pack(tensor)
            if not isinstance(packed, torch.Tensor):
                waiting.append(packed)
            return packed

        def _unpack(self, saved):
            tensor = super()._unpack(saved)
            if not isinstance(saved, torch.Tensor):
                there.append([index for index, other in enumerate(waiting) if other.back is not None])
            return tensor

    with Watched(x.shape[:2], "cpu", min_bytes=0):
        loss = model(x).sum()
    loss.backward()
    assert len(waiting) == 8
    assert there == [[6], [5], [4], [3], [2], [1], [0], []]


def test_chunked_mlps_hold_less_at_once():
    model = tiny.model(intermediate_size=512).eval()
    seen = []
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    tokens = torch.randint(0, 60, (2, 30))
    whole = model(tokens).logits
    assert tile_mlps(model, 8) == 2
    seen.clear()
    assert torch.allclose(model(tokens).logits, whole, atol=1e-5)
    assert max(seen) == 8
    with pytest.raises(ValueError, match="at least 1"):
        tile_mlps(model, 0)
    with pytest.raises(ValueError, match="no module named mlp"):
        tile_mlps(nn.Linear(2, 2), 4)


def test_bf16_autocast_starts_within_its_budget(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "bco_fast"):
        trainer = _train(tmp_path, bf16=True, max_steps=2)
        trainer.train()
    assert "budget 5e-02" in caplog.text
    lines = [e for e in trainer.state.log_history if "loss" in e]
    assert abs(lines[0]["rewards/margins"]) < 0.1


def test_bf16_weights(tmp_path):
    trainer = _train(tmp_path, tiny.model().to(torch.bfloat16), max_steps=2)
    trainer.train()
    assert all(p.dtype == torch.bfloat16 for p in trainer.model.parameters())


def test_a_mixture_of_experts_adds_its_own_loss(tmp_path):
    from transformers import MixtralConfig

    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    losses = []
    for weight in (0.0, 0.5):
        trainer = _train(tmp_path / str(weight), tiny.model(MixtralConfig, **options, router_aux_loss_coef=weight))
        batch = collate([trainer.train_dataset[i] for i in range(6)], 1)
        losses.append(float(trainer.compute_loss(trainer.model, batch).detach()))
        own = float(trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).aux_loss.detach())  # fmt: skip
    assert losses[1] == pytest.approx(losses[0] + 0.5 * own, rel=1e-5)


def test_zero3_does_not_shard_a_model_while_it_is_loaded(tmp_path):
    """transformers would shard it; what else it knows of DeepSpeed stays."""
    tiny.model().save_pretrained(tmp_path)
    zero3 = type("Config", (), {"is_zero3": lambda self: True, "config": {}})()
    deepspeed.set_hf_deepspeed_config(zero3)
    try:
        loaded = load_model(tmp_path, _config(tmp_path))
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert all(map(torch.equal, loaded.state_dict().values(), tiny.model().state_dict().values()))


def test_choices_of_loading_are_said(tmp_path, caplog):
    tiny.model().to(torch.bfloat16).save_pretrained(tmp_path / "m")
    with caplog.at_level(logging.INFO, "bco_fast"):
        assert load_model(tmp_path / "m", _config(tmp_path)).dtype == torch.float32
    assert "weights: float32" in caplog.text
    assert load_model(tmp_path / "m", _config(tmp_path, use_peft=True)).dtype == torch.bfloat16
    assert load_model(tmp_path / "m", _config(tmp_path, model_dtype="float16")).dtype == torch.float16
    sdpa = load_model(tmp_path / "m", _config(tmp_path, attn_implementation="eager"))
    assert sdpa.config._attn_implementation == "eager"


def test_four_bits_without_bitsandbytes_say_what_is_missing(tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
    )
    config = _config(tmp_path, use_peft=True)
    config.load_in_4bit = True
    with pytest.raises(ImportError, match="need bitsandbytes"):
        load_model("anywhere", config)
    with pytest.raises(ValueError, match="load_in_4bit needs bitsandbytes: pip install bitsandbytes"):
        _config(tmp_path, load_in_4bit=True, use_peft=True)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_quantised_base_keeps_the_stored_dtype_of_its_head(bits, tmp_path):
    """`cache build` identifies the model as it was loaded; the head must not lose the tensor cores to float32."""
    loaded = tiny.model().to(torch.bfloat16)
    loaded.is_loaded_in_4bit, loaded.is_loaded_in_8bit = bits == "load_in_4bit", bits == "load_in_8bit"
    built = reference_id(loaded)
    prepared = prepare_model_for_kbit_training(copy.deepcopy(loaded))
    assert prepared.lm_head.weight.dtype == torch.float32, "peft no longer does what add_adapter avoids"
    assert reference_id(prepared) != built
    config = _config(tmp_path, use_peft=True, lora_r=4, gradient_checkpointing=True)
    setattr(config, bits, True)  # bitsandbytes is not needed here
    adapted = patch_model(add_adapter(loaded, config))
    assert adapted.get_output_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {name.split(".")[-3] for name, p in adapted.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert reference_id(adapted) == built


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_4bit": True}, "need use_peft"),
        ({"tokens_per_batch": 0}, "tokens_per_batch"),
        ({"mlp_chunk_tokens": -1}, "mlp_chunk_tokens"),
    ],
)
def test_config_refuses(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        _config(tmp_path, **options)
