"""bco_fast's objectives inside axolotl (0.19): its YAML, models, adapters and data formats; our trainer.

    plugins: [bco_fast.integrations.axolotl.Plugin]
    rl: bco                  # any --loss_type for thumbs; one for pairs reads axolotl's dpo formats
    bco_fast: {backend: auto, share_prompts: "false"}      # optional: further fields of FeedbackConfig

axolotl knows a fixed list of `rl` methods. So the plugin keeps ours for itself and tells axolotl `kto`, or `dpo` for pairs: they
choose the data formats. It also hands the trainer its model, which axolotl's builder does not do for a plugin's class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from transformers import TrainingArguments

from ..losses import OBJECTIVES
from ..losses.sums import find_objective
from ..training.config import NOT_READ, FeedbackConfig
from ..training.trainer import FeedbackTrainer

ITS_OWN = ("dpo", "gdpo", "grpo", "ipo", "orpo", "kto", "simpo", "ebft")
TEXTS = ("completion", "chosen", "rejected")


class BcoFastArgs(BaseModel):
    """What the plugin adds to axolotl's YAML."""

    bco_fast: dict | None = None


class Plugin(BasePlugin):
    """See the module. A method that axolotl has itself (`rl: kto`, `rl: dpo`, ...) is ours only with
    `bco_fast: {loss_type: kto}`."""

    model = None

    def register(self, cfg: dict) -> None:
        options = dict(cfg.get("bco_fast") or {})
        wanted = options.get("loss_type", None if cfg.get("rl") in ITS_OWN else cfg.get("rl"))
        if wanted is None:
            return
        if isinstance(wanted, list):
            wanted = "+".join(wanted)
        if not set(wanted.split("+")) <= set(OBJECTIVES):
            raise ValueError(f"rl must be one of axolotl's methods, or of {', '.join(OBJECTIVES)}, not {wanted!r}")
        objective = find_objective(wanted)
        if objective.data not in ("labels", "pairs"):
            raise ValueError(f"rl: {wanted} reads scores, for which axolotl has no data format; use bco-fast train")
        known = FeedbackConfig.__dataclass_fields__
        if unknown := set(options) - set(known):
            raise ValueError(f"bco_fast: FeedbackConfig has no {', '.join(sorted(unknown))}")
        cfg["bco_fast"] = options | {"loss_type": wanted}
        cfg["rl"] = "dpo" if objective.paired else "kto"
        cfg["remove_unused_columns"] = False

    def get_input_args(self) -> str:
        return f"{__name__}.BcoFastArgs"

    def post_model_load(self, cfg, model) -> None:
        self.model = model

    def get_trainer_cls(self, cfg) -> type | None:
        if not cfg.bco_fast or not cfg.bco_fast.get("loss_type"):
            return None
        model = self.model

        class AxolotlFeedbackTrainer(_Trainer):
            """The builder passes no model to a plugin's class."""

            def __init__(self, *, args, **kwargs):
                super().__init__(model, feedback_config(args, cfg), **kwargs)

        return AxolotlFeedbackTrainer


class _Trainer(FeedbackTrainer):
    def _dataset(self, source, args, tokenizer, **options):
        if source is not None and not hasattr(source, "examples"):
            source = _without_eos(source, tokenizer.eos_token)
        return super()._dataset(source, args, tokenizer, **options)


def _without_eos(rows: Iterable[Mapping], eos: str) -> list[dict]:
    """axolotl's formats end a completion with EOS, ours get it as a token."""
    return [{**row, **{name: row[name].removesuffix(eos) for name in TEXTS if name in row}} for row in rows]


def feedback_config(args: TrainingArguments, cfg) -> FeedbackConfig:
    """The options of the Trainer that axolotl has set, its length and weights, and the YAML's `bco_fast`.

    Args:
        args: axolotl's training arguments, of the method that stands in for ours.
        cfg: axolotl's configuration.
    """
    options = {}
    for field in dataclasses.fields(TrainingArguments):
        value = getattr(args, field.name)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if field.init and value != default and value not in (None, {}, []) and field.name not in NOT_READ:
            options[field.name] = value
    given = {
        "max_length": cfg.sequence_len,
        "beta": cfg.rl_beta,
        "desirable_weight": cfg.kto_desirable_weight,
        "undesirable_weight": cfg.kto_undesirable_weight,
    }
    options |= {name: value for name, value in given.items() if value is not None}
    return FeedbackConfig(**options | dict(cfg.bco_fast))
