"""Golden values of TRL 1.16's losses on pairs and of its KTOTrainer -> trl_1_16_preference.json

    make venv-peers && .venv-peers-trl-1.16/bin/python tests/golden/make_trl_dpo.py

`DPOTrainer.compute_loss`, `KTOTrainer.compute_loss` and `get_batch_loss_metrics` of the experimental CPOTrainer and
ORPOTrainer run unchanged. In place of the model they get one that answers with log-probs drawn from a seed, so that
every value is of their own code on known log-probs. A loss is recorded for the whole batch and, but for those that sort a
batch and for sums of several, pair by pair.
"""

import tempfile
from types import SimpleNamespace

import torch
from datasets import Dataset
from recording import byte_tokenizer, numbers, tiny_llama, write
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

PAIRS, LONGEST = 8, 12
DPO_LOSSES = ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "apo_zero", "sft", "robust", "exo_pair", "sppo_hard", "apo_down", "discopop", "sigmoid_norm", "aot", "aot_unpaired")  # fmt: skip
BY_BATCH = ("aot", "aot_unpaired")
LABEL_SMOOTHING = 0.1  # read by robust, exo_pair and aot; discopop's tau is TRL's default, 0.05
DPO_BETAS = (0.1, 0.5)
DIVERGENCES = (("forward_kl", 0.5), ("js_divergence", 0.5), ("alpha_divergence", 0.3), ("alpha_divergence", 1.0))
DIVERGENT = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
SUMS = (
    (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),  # MPO
    (["sigmoid_norm", "apo_zero", "aot"], [1.0, 2.0, 0.5]),
)
CPO_SETTINGS = (
    {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5},
    {"loss_type": "simpo", "beta": 10.0, "simpo_gamma": 3.0},
    {"loss_type": "hinge", "beta": 0.1},
    {"loss_type": "ipo", "beta": 0.2},
    {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.1},
    {"loss_type": "sigmoid", "beta": 0.5},
)


class Drawn:
    """Token log-probs [2B, LONGEST] of PAIRS pairs, chosen first, and what the trainers make inputs of.

    Every row is one prompt token (id 0) and then its completion (id 1), padded on the right.
    """

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.lengths = torch.randint(1, LONGEST + 1, (2 * PAIRS,), generator=generator)
        self.lengths[0], self.lengths[-1] = 1, LONGEST
        self.mask = torch.arange(LONGEST) < self.lengths[:, None]
        uniform = torch.rand(2, 2 * PAIRS, LONGEST, generator=generator)
        policy = 2.5 * torch.log(uniform[0])
        ref = policy + 1.5 * torch.randn(2 * PAIRS, LONGEST, generator=generator)
        ref[[2, PAIRS + 3]] -= 6  # margins far out on either side, where a sigmoid saturates
        self.policy, self.ref = self.mask * policy.clamp(max=-1e-3), self.mask * ref.clamp(max=-1e-3)

    def rows(self, pairs: list[int]) -> list[int]:
        return [*pairs, *(PAIRS + pair for pair in pairs)]

    def tokens(self, rows: list[int]) -> dict:
        prompt = torch.ones(len(rows), 1, dtype=torch.long)
        completion = self.mask[rows].long()
        return {
            "input_ids": torch.cat([0 * prompt, completion], 1),
            "attention_mask": torch.cat([prompt, completion], 1),
            "completion_mask": torch.cat([0 * prompt, completion], 1),
        }


class Answers:
    """A model of TRL 1.16's fused head: it answers its calls, in order, with the token log-probs given."""

    def __init__(self, *log_probs: torch.Tensor):
        self.log_probs = list(log_probs)

    def __call__(self, **kwargs):
        log_probs = self.log_probs.pop(0)
        zeros = torch.zeros_like(log_probs)
        return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def answer_logits(log_probs: torch.Tensor):
    """A model of two tokens, whose token 1 has the log-probs given at each position that predicts one."""
    other = torch.log(-torch.expm1(log_probs.clamp(max=-1e-7)))
    logits = torch.stack([other, log_probs], dim=-1)
    logits = torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1)
    return lambda *args, **kwargs: SimpleNamespace(logits=logits)


def made(trainer, config, columns: dict, **options):
    """A trainer on two rows that nothing is trained on."""
    with tempfile.TemporaryDirectory() as folder:
        args = config(
            output_dir=folder,
            max_length=32,
            per_device_train_batch_size=2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            **options,
        )
        dataset = Dataset.from_dict({"prompt": ["ab", "cd"], **columns})
        return trainer(model=tiny_llama(0), args=args, train_dataset=dataset, processing_class=byte_tokenizer())


def dpo(drawn: Drawn) -> dict[str, list[dict]]:
    columns = {"chosen": [" yes", " yes"], "rejected": [" no", " no"]}
    trainer = made(DPOTrainer, DPOConfig, columns, precompute_ref_log_probs=True)
    recorded = []

    def loss(pairs):
        rows = drawn.rows(pairs)
        ref_chosen, ref_rejected = drawn.ref[rows].sum(1).chunk(2)
        inputs = {**drawn.tokens(rows), "ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
        policy = drawn.policy[rows].clone().requires_grad_()
        value = trainer.compute_loss(Answers(policy), inputs)
        (gradient,) = torch.autograd.grad(value, policy)
        return value, gradient[:, 0]  # one number for all tokens of a completion

    def record(loss_types, weights=(1.0,), beta=0.1, divergence=("reverse_kl", 0.5)):
        trainer.loss_types, trainer.loss_weights, trainer.beta = loss_types, weights, beta
        trainer.f_divergence_type, trainer.f_alpha_divergence_coef = divergence
        trainer.label_smoothing = LABEL_SMOOTHING
        value, gradient = loss(list(range(PAIRS)))
        metrics = {name: trainer._metrics["train"][name][-1] for name in ("rewards/margins", "rewards/accuracies")}
        return {"beta": beta, "loss": numbers(value[None])[0], "gradient": numbers(gradient), **metrics}

    def losses():
        return {"losses": numbers(torch.stack([loss([pair])[0] for pair in range(PAIRS)]))}

    for loss_type in DPO_LOSSES:
        for beta in DPO_BETAS:
            whole = {"loss_type": loss_type, **record([loss_type], beta=beta)}
            recorded.append(whole | ({} if loss_type in BY_BATCH else losses()))
    divergent, sums = [], []
    for loss_type in DIVERGENT:
        for divergence in DIVERGENCES if loss_type == "sigmoid" else DIVERGENCES[1:3]:
            names = dict(zip(("f_divergence_type", "f_alpha_divergence_coef"), divergence, strict=True))
            divergent.append(
                {"loss_type": loss_type, **names, **record([loss_type], divergence=divergence), **losses()}
            )
    for loss_types, weights in SUMS:
        sums.append({"loss_types": loss_types, "loss_weights": weights, **record(loss_types, weights)})
    return {"dpo": recorded, "divergences": divergent, "sums": sums}


def sums_ipo(drawn: Drawn) -> dict:
    """CPOTrainer's own `cpo_loss` for "ipo", on log-ratios summed over tokens."""
    trainer = made_cpo(loss_type="ipo", beta=0.2)
    ratios = drawn.policy.sum(1) - drawn.ref.sum(1)
    return {"beta": 0.2, "losses": numbers(trainer.cpo_loss(*ratios.chunk(2))[0])}


def made_cpo(**options):
    columns = {"chosen": [" yes", " yes"], "rejected": [" no", " no"]}
    return made(CPOTrainer, CPOConfig, columns, cpo_alpha=0.0, gradient_checkpointing=False, **options)


def batch_loss(trainer, drawn: Drawn, pairs: list[int]) -> torch.Tensor:
    """`get_batch_loss_metrics` of CPOTrainer or ORPOTrainer."""
    batch = {}
    for side, rows in zip(("chosen", "rejected"), (pairs, [PAIRS + pair for pair in pairs]), strict=True):
        tokens = drawn.tokens(rows)
        labels = tokens["input_ids"].masked_fill(tokens["completion_mask"] == 0, -100)
        batch |= {f"{side}_input_ids": tokens["input_ids"], f"{side}_labels": labels}
        batch[f"{side}_attention_mask"] = tokens["attention_mask"]
    return trainer.get_batch_loss_metrics(answer_logits(drawn.policy[drawn.rows(pairs)]), batch)[0]


def by_pair(trainer, drawn: Drawn) -> list:
    return numbers(torch.stack([batch_loss(trainer, drawn, [pair]) for pair in range(PAIRS)]))


def orpo(drawn: Drawn) -> list[dict]:
    """Pair by pair: over a batch TRL takes the mean of its first term over all tokens, prompts included."""
    columns = {"chosen": [" yes", " yes"], "rejected": [" no", " no"]}
    recorded = []
    for beta in (0.1, 1.0):
        trainer = made(ORPOTrainer, ORPOConfig, columns, beta=beta, gradient_checkpointing=False)
        recorded.append({"beta": beta, "losses": by_pair(trainer, drawn)})
    return recorded


def kto(drawn: Drawn) -> list[dict]:
    """Completions in batches of both classes or one. A batch's mismatched side is of other rows."""
    columns = {"completion": [" yes", " no"], "label": [True, False]}
    recorded = []
    for loss_type, desirable, undesirable in (("kto", 1.0, 1.0), ("kto", 1.33, 0.5), ("apo_zero_unpaired", 1.33, 0.5)):
        options = {"desirable_weight": desirable, "undesirable_weight": undesirable, "beta": 0.1}
        trainer = made(KTOTrainer, KTOConfig, columns, precompute_ref_log_probs=True, loss_type=loss_type, **options)
        for rows, mismatched, labels in (
            ([0, 1, 2, 3], [4, 5, 6, 7], [True, False, False, False]),
            ([4, 5, 6, 7], [8, 9, 10, 11], [True, True, True, False]),
            ([8, 9, 10, 11], [12, 13, 5, 7], [True] * 4),  # a negative mean: z_ref is 0
            ([12, 13, 14], [11, 0, 1], [False] * 3),
            ([1, 2], [2, 11], [False, True]),
        ):
            policy = drawn.policy[rows].clone().requires_grad_()
            tokens = drawn.tokens(rows)
            inputs = tokens | {f"KL_{name}": tensor for name, tensor in drawn.tokens(mismatched).items()}
            inputs |= {"label": torch.tensor(labels), "ref_logps": drawn.ref[rows].sum(1)}
            inputs["ref_KL_logps"] = drawn.ref[mismatched].sum(1)
            answers = [drawn.policy[mismatched], policy] if loss_type == "kto" else [policy]
            value = trainer.compute_loss(Answers(*answers), inputs)
            (gradient,) = torch.autograd.grad(value, policy)
            recorded.append(
                options
                | {
                    "loss_type": loss_type,
                    "rows": rows,
                    "mismatched": mismatched,
                    "labels": labels,
                    "loss": numbers(value[None])[0],
                }
                | {"kl": trainer._metrics["train"]["kl"][-1], "gradient": numbers(gradient[:, 0])}
            )
    return recorded


if __name__ == "__main__":
    drawn = Drawn()
    content = {
        "lengths": drawn.lengths.tolist(),
        "logps": numbers(drawn.policy.sum(1)),
        "ref_logps": numbers(drawn.ref.sum(1)),
        **dpo(drawn),
        "cpo": [{**setting, "losses": by_pair(made_cpo(**setting), drawn)} for setting in CPO_SETTINGS],
        "ipo_sums": sums_ipo(drawn),
        "orpo": orpo(drawn),
        "kto": kto(drawn),
    }
    write("trl_1_16_preference", __file__, content)
