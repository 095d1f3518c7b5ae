"""What samples a round. vLLM is not installed where these tests run: a stand-in checks how it is called."""

import dataclasses
import sys
import types

import pytest
import tiny
import torch
from test_online import PROMPTS, TOKENIZER, _config, _reward, _rounds

from bco_fast.models.load import add_adapter
from bco_fast.online.config import OnlineConfig
from bco_fast.online.generators import PolicyWeights, VllmGenerator, policy_weights
from bco_fast.online.trainer import OnlineFeedbackTrainer

EOS = TOKENIZER.eos_token_id


@dataclasses.dataclass
class SamplingParams:
    """Unknown options raise, as vLLM's do."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 16
    stop_token_ids: list | None = None
    detokenize: bool = True
    seed: int | None = None


class LLM:
    """Keeps a model beside the policy, samples from it greedily but for the first token, which is the seed's."""

    made: list = []  # noqa: RUF012

    def __init__(self, *, model, max_model_len, gpu_memory_utilization, enable_sleep_mode, distributed_executor_backend, worker_extension_cls, generation_config, seed):  # fmt: skip
        assert enable_sleep_mode
        assert distributed_executor_backend == "external_launcher"
        assert generation_config == "vllm"
        module, _, name = worker_extension_cls.rpartition(".")
        extension = getattr(sys.modules[module], name)
        self.worker = type("Worker", (extension,), {})()
        self.copy = tiny.model(seed=99)
        self.worker.model_runner = types.SimpleNamespace(model=types.SimpleNamespace(load_weights=self._load))
        self.model, self.max_model_len, self.memory = model, max_model_len, gpu_memory_utilization
        self.awake, self.fresh, self.calls = {"weights", "kv_cache"}, False, []
        LLM.made.append(self)

    def _load(self, weights):
        assert "weights" in self.awake
        state = dict(weights)
        assert state.keys() == dict(self.copy.named_parameters()).keys()
        self.copy.load_state_dict(state, strict=False)
        self.fresh = True

    def sleep(self, level=1):
        assert self.awake == {"weights", "kv_cache"}
        assert level == 2
        self.awake, self.fresh = set(), False

    def wake_up(self, tags=None):
        self.awake |= set(tags)

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        return [getattr(self.worker, method)(*args, **(kwargs or {}))]

    def reset_prefix_cache(self):
        self.calls.append("reset")

    @torch.no_grad()
    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        assert self.awake == {"weights", "kv_cache"}
        assert self.fresh, "the weights were dropped with the sleep and not loaded again"
        assert self.calls.pop() == "reset"
        assert len(sampling_params) == len(prompts)
        outputs = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            ids = torch.tensor([prompt["prompt_token_ids"] + [5 + params.seed % 30]])
            for _ in range(params.max_tokens - 1):
                ids = torch.cat([ids, self.copy(ids).logits[:, -1:].argmax(-1)], dim=1)
                if int(ids[0, -1]) in params.stop_token_ids:
                    break
            tokens = tuple(ids[0, len(prompt["prompt_token_ids"]) :].tolist())
            outputs.append(types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tokens)]))
        return outputs


@pytest.fixture
def vllm(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # so that what the generator sets is undone
        monkeypatch.delenv(name)
    fake = types.ModuleType("vllm")
    fake.LLM, fake.SamplingParams, LLM.made = LLM, SamplingParams, []
    monkeypatch.setitem(sys.modules, "vllm", fake)


def _saved(tmp_path, **options):
    tiny.model(**options).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_vllm_samples_with_the_policys_weights_of_each_round(vllm, tmp_path):
    trainer = OnlineFeedbackTrainer(
        _saved(tmp_path, std=0.05), _config(tmp_path, generator="vllm", max_steps=4), PROMPTS, _reward,
        processing_class=TOKENIZER,
    )  # fmt: skip
    (engine,) = LLM.made
    assert (engine.model, engine.max_model_len, engine.memory) == (str(tmp_path / "model"), 32, 0.3)
    assert engine.awake == set()  # asleep until it is needed, and while the policy trains
    seen = []
    real = trainer.generator
    trainer.generator = lambda *a: (real(*a), seen.append({n: p.clone() for n, p in engine.copy.named_parameters()}))[0]
    trainer.train()
    assert len(_rounds(tmp_path)) == len(seen) == 2
    assert engine.awake == set()
    first, second = seen
    start = dict(tiny.model(std=0.05).named_parameters())
    assert all(torch.equal(first[name], start[name]) for name in start)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_samples_of_a_prompt_differ_and_hang_on_the_seed(vllm, tmp_path):
    path, model = _saved(tmp_path), tiny.model()
    generator = VllmGenerator(path, TOKENIZER, max_length=32, max_new_tokens=6, temperature=0.5, top_p=0.9)
    prompts = [TOKENIZER(PROMPTS[0])["input_ids"]] * 4
    drawn = generator(model, prompts, 3)
    assert len({tuple(tokens) for tokens in drawn}) > 1
    assert generator(model, prompts, 3) == drawn
    assert generator(model, prompts, 4) != drawn
    assert all(len(tokens) <= 6 and EOS not in tokens[:-1] for tokens in drawn)


@pytest.mark.parametrize("saved", ["", "lm_head"])
def test_a_lora_policy_is_given_folded_and_stays_as_it_is(tmp_path, saved):
    model = tiny.model(tie_word_embeddings=not saved)
    options = {"use_peft": True, "lora_r": 4, "lora_modules_to_save": saved, "lora_target_modules": "q_proj,down_proj"}
    policy = add_adapter(model, OnlineConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True, **options)).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    ids = torch.arange(3, 12)[None]
    plain = tiny.model(seed=5, tie_word_embeddings=not saved)
    assert [name for name, _ in policy_weights(policy)] == [name for name, _ in plain.named_parameters()]
    plain.load_state_dict(dict(policy_weights(policy)), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(ids).logits, policy(ids).logits, rtol=1e-4, atol=1e-4)
        with policy.disable_adapter():
            assert not torch.allclose(plain(ids).logits, policy(ids).logits, atol=1e-2)
    assert all(torch.equal(before[name], p) for name, p in policy.named_parameters())


def test_the_extension_hands_the_weights_to_vllms_loader():
    worker, given = PolicyWeights(), []
    worker.model_runner = types.SimpleNamespace(model=types.SimpleNamespace(load_weights=lambda weights: given.extend(weights)))  # fmt: skip
    worker.load_policy(iter([("a", 1)]))
    assert given == [("a", 1)]


def test_quantised_weights_are_refused():
    model = tiny.model()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"lm_head\.weight is quantised"):
        list(policy_weights(model))


def test_without_vllm_the_way_to_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="pip install vllm"):
        OnlineFeedbackTrainer(
            _saved(tmp_path), _config(tmp_path, generator="vllm"), PROMPTS, _reward, processing_class=TOKENIZER
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": "tgi"}, "hf or vllm"),
        ({"vllm_gpu_memory_utilization": 0.0}, r"\(0, 1\]"),
        ({"vllm_gpu_memory_utilization": 0.5}, "does not read"),
    ],
)
def test_options_of_the_generator_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        _config(tmp_path, **options)


def test_vllm_needs_a_model_that_was_loaded(vllm, tmp_path):
    with pytest.raises(ValueError, match="from its folder"):
        OnlineFeedbackTrainer(
            tiny.model(), _config(tmp_path, generator="vllm"), PROMPTS, _reward, processing_class=TOKENIZER
        )
