"""Checkpoints that also read images train on text: their language model moves, the rest of them does not."""

import families
import pytest
import tiny
import torch
from peft import LoraConfig
from small_runs import TOKENIZER, config
from test_models import _batch
from transformers import AutoModelForImageTextToText

from bco_fast import FeedbackError, FeedbackTrainer, load_feedback, patch_model
from bco_fast.data.prompts import read_prompts
from bco_fast.models.load import load_model
from bco_fast.models.multimodal import freeze_other_modules, other_modules
from bco_fast.models.patch import completion_logps

TOWERS = {
    "gemma3": ["model.vision_tower", "model.multi_modal_projector"],
    "qwen2_vl": ["model.visual"],
    "qwen3_vl": ["model.visual"],
    "mistral3": ["model.vision_tower", "model.multi_modal_projector"],
    "llama4": ["vision_model", "multi_modal_projector"],
    "gemma4": ["model.vision_tower", "model.embed_vision"],
}


@pytest.mark.parametrize("family", families.MULTIMODAL)
def test_log_probabilities_of_text_are_those_of_the_logits(family):
    model, (batch, _) = families.multimodal(family).eval(), _batch()
    assert other_modules(model) == TOWERS[family]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.log_softmax(logits.double(), -1).flatten(0, 1)[batch["rows"], batch["targets"]]
    freeze_other_modules(model)
    ours = completion_logps(patch_model(model), batch)
    assert torch.allclose(ours.double(), expected, rtol=1e-5, atol=2e-5)
    ours.sum().backward()
    for name, parameter in model.named_parameters():
        if any(name.startswith(f"{tower}.") for tower in TOWERS[family]):
            assert not parameter.requires_grad, name
        else:
            assert parameter.grad is not None, name


def _train(model, tmp_path, **options):
    options = {"max_steps": 2, "share_prompts": "false"} | options
    trainer = FeedbackTrainer(model, config(tmp_path, **options), tiny.rows(16), processing_class=TOKENIZER)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    return trainer, moved


def _check_full_training(family, tmp_path):
    families.multimodal(family).save_pretrained(tmp_path / "base")
    trainer, moved = _train(str(tmp_path / "base"), tmp_path)
    assert moved
    assert not any(name.startswith(tuple(TOWERS[family])) for name in moved)
    trainer.save_model()
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict()
    assert saved.keys() == trainer.model.state_dict().keys()
    assert all(map(torch.equal, saved.values(), trainer.model.state_dict().values()))


def test_a_checkpoint_with_a_vision_tower_trains_and_is_saved_whole(tmp_path):
    _check_full_training("gemma3", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", families.MULTIMODAL)
def test_every_family_trains_alike_in_every_layout(family, tmp_path):
    _check_full_training(family, tmp_path)
    norms = {}
    for layout in ({}, {"padding_free": True}, {"share_prompts": "true"}):
        options = {
            "max_steps": 1,
            "per_device_train_batch_size": 16,
        }  # one batch of all rows: their order is the layout's
        trainer, _ = _train(families.multimodal(family), tmp_path / str(len(norms)), **options, **layout)
        norms[trainer.layout] = next(line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line)
    assert set(norms) == {"padded", "packed", "shared"}
    assert norms["packed"] == pytest.approx(norms["padded"], rel=1e-3)
    assert norms["shared"] == pytest.approx(norms["padded"], rel=1e-3)


def test_attention_in_chunks_is_not_cut_into_segments(tmp_path):
    model = families.multimodal("llama4")
    model.config.get_text_config().attention_chunk_size = 6
    with pytest.raises(ValueError, match="attends within chunks of 6 tokens, and a row has"):
        _train(model, tmp_path, share_prompts="true")


@pytest.mark.parametrize("given", [False, True], ids=["options", "peft_config"])
def test_adapters_leave_the_vision_tower_alone(given, tmp_path):
    model = families.multimodal("qwen3_vl")
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if given else None
    args = config(tmp_path, use_peft=not given, max_steps=1, lora_r=4)
    trainer = FeedbackTrainer(model, args, tiny.rows(8), processing_class=TOKENIZER, peft_config=peft_config)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert any("q_proj.lora_A" in name for name in trained)
    assert not any("visual" in name for name in trained)


def test_a_checkpoint_is_loaded_as_what_it_is(tmp_path):
    families.multimodal("qwen2_vl").save_pretrained(tmp_path)
    loaded = load_model(tmp_path, config(tmp_path))
    assert type(loaded).__name__ == "Qwen2VLForConditionalGeneration"
    assert loaded.dtype == torch.float32


def test_rows_with_images_are_refused_by_row(tmp_path):
    rows = tiny.rows(3)
    rows[0]["images"] = []
    rows[1]["images"] = ["cat.png"]
    with pytest.raises(FeedbackError, match="row 1: the row has images, and bco_fast trains on text only"):
        load_feedback(rows, TOKENIZER)
    assert len(load_feedback(rows, TOKENIZER, on_bad_row="skip").examples) == 2
    path = tiny.write(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}], "label": True}])  # fmt: skip
    with pytest.raises(FeedbackError, match=r"chat.jsonl:1: .*not text \(image\)"):
        load_feedback(path, TOKENIZER)
    with pytest.raises(FeedbackError, match="has image"):
        read_prompts([{"prompt": "What is this?", "image": {"bytes": b"1"}}])
