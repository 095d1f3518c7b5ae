"""`bco-fast check`: what is in a feedback file, how it will be tokenized, and what training on it takes. No weights are read."""

from __future__ import annotations

from . import common
from .plan import FIELDS, STEP, model_config

_READING = ("on_bad_row", "columns", "score_scale", "labels")
_LIMITS = ("max_length", "max_prompt_length", "max_completion_length", "on_bad_row")
_SHOWN = 240
"""Characters of each end of a text."""


def check(arguments: list[str]) -> dict:
    from ..losses import OBJECTIVES
    from ..losses.sums import find_objective

    options = _parse(arguments, OBJECTIVES)

    from transformers.utils import logging as transformers_logging

    from ..data.chat import with_template
    from ..data.check import advise, examine, needs_of
    from ..data.rows import read_rows, unpair
    from ..data.sources import FeedbackError
    from ..training.values import check_numbers

    transformers_logging.set_verbosity_error()  # rows longer than the model's positions are what is looked for
    common.check_input("DATA", options.data)
    with common.usage_errors(ValueError):
        check_numbers(options)
    config = model_config(options)
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most and options.max_length > most:
        raise common.UsageError(f"--max_length is {options.max_length}, but the model has {most} positions")
    tokenizer = common.open_tokenizer("--model", options.model, options.trust_remote_code)
    with common.usage_errors(ValueError):
        objective = find_objective("+".join(options.loss_type)) if options.loss_type else None
        tokenizer = with_template(tokenizer, options.chat_template)
        with common.usage_errors(FeedbackError, prefix="DATA "):
            needs = objective.data if objective else needs_of(options.data, options.columns)
            rows = read_rows(options.data, needs=needs, **{name: getattr(options, name) for name in _READING})
            if needs != "pairs" and (objective or any(len(row.completions) == 1 for row in rows)):
                rows = unpair(rows)
            facts = examine(rows, tokenizer, **{name: getattr(options, name) for name in _LIMITS}, progress=True)
    advice = advise(facts, needs, adapter=options.use_peft, positions=most)
    cost = _cost(config, options, facts)
    _print(options, facts, advice, cost)
    del facts["shown"]
    return {"model": options.model, **facts, **cost, "advice": [{"option": o, "why": why} for o, why in advice]}


def _parse(arguments: list[str], objectives):
    from ..training.config import FeedbackConfig

    parser = common.Parser(prog="bco-fast check", description=__doc__)
    parser.add_argument("data", metavar="DATA", help="feedback, as --data of train")
    parser.add_argument(
        "--model", required=True, help="folder of a causal language model, or a Hub name; its tokenizer"
    )
    parser.add_argument(
        "--loss_type",
        nargs="+",
        choices=objectives,
        help="objectives that will train (default: what the rows have)",
    )
    common.add_objective_option(parser)
    common.add_code_option(parser)
    names = dict.fromkeys([*FIELDS, *_READING, *_LIMITS, "chat_template"])
    common.add_fields(parser, FeedbackConfig, names)
    parser.set_defaults(**STEP)
    common.load_objectives(arguments)
    return parser.parse_args(arguments)


def _cost(config, options, facts: dict) -> dict:
    """Memory of a step in GB, and floating-point operations of the reference and of an epoch, attention left out."""
    import torch
    from transformers import AutoModelForCausalLM

    from ..models.count import checkpointed, count_step

    text, step = config.get_text_config(), None
    rows, length = options.per_device_train_batch_size, options.max_length
    if options.tokens_per_batch is not None:
        rows, length = 1, options.tokens_per_batch
    try:
        step = round(count_step(config, options, length, rows=rows).total / 1e9, 3)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=options.trust_remote_code)
    except ValueError as error:
        common.logger.warning("--model %s: memory and time are not estimated (%s)", options.model, error)
        return {"step_gb": step, "reference_pflop": None, "epoch_pflop": None}
    if any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return {"step_gb": step, "reference_pflop": None, "epoch_pflop": None}  # a token runs through a part of it
    looked_up = 0 if text.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    forward = 2 * (sum(p.numel() for p in model.parameters()) - looked_up) * facts["tokens"]["together"]["sum"] / 1e15
    passes = 1 + (1 if options.use_peft else 2) + bool(checkpointed(options))
    return {"step_gb": step, "reference_pflop": forward, "epoch_pflop": passes * forward}


def _print(options, facts: dict, advice, cost: dict) -> None:
    kind = "pairs" if facts["pairs"] else "rows"
    print(f"{options.data}: {facts['rows']:,} {kind} of {facts['format']}; different prompts: {facts['prompts']:,}")
    if facts["up"] is not None:
        print(f"  thumbs up {facts['up']:,}, thumbs down {facts['down']:,} ({facts['up'] / facts['rows']:.0%} up)")
    if facts["skipped"]:
        print(f"  skipped: {facts['skipped']:,} rows that the tokenizer or its template cannot take")
    print(f"  repeated rows {facts['repeated_rows']:,}{_at(facts['repeated_at'])}")
    print(f"  texts with both thumbs {facts['both_thumbs']:,}{_at(facts['both_thumbs_at'])}")
    special = facts["special_tokens_as_text"]
    print(
        f"  special tokens as text: in {special['become_tokens']:,} rows, where they become special tokens, and in "
        f"{special['stay_text']:,} chats, where they stay text{_at(special['at'])}"
    )
    print(f"\n{'tokens':12}{'median':>10}{'95 %':>10}{'longest':>10}")
    for name in ("prompt", "completion", "together"):
        lengths = facts["tokens"][name]
        print(f"{name:12}{lengths['median']:>10,}{lengths['p95']:>10,}{lengths['max']:>10,}")
    cut = facts["cut"]
    print(
        f"--max_length {cut['max_length']} cuts {cut['prompts']:,} prompts and {cut['completions']:,} completions; of "
        f"{cut['empty']:,} nothing is left\n"
    )
    for row in facts["shown"]:
        print(f"thumbs {'up' if row['label'] else 'down'}; special tokens are in «»")
        print(f"  prompt, {row['prompt_tokens']:,} tokens:  {_ends(row['prompt'])}")
        print(f"  trained, {row['trained_tokens']:,} tokens: {_ends(row['trained'])}\n")
    if cost["step_gb"] is not None:
        print(f"memory of a step: {cost['step_gb']:.2f} GB (`bco-fast plan` says more)")
    if cost["epoch_pflop"] is not None:
        parts = [("reference, once", cost["reference_pflop"]), ("an epoch", cost["epoch_pflop"])]
        for name, work in parts:
            seconds = f"{work * 10:,.0f} s" if work >= 0.1 else "less than a second"
            print(f"{name}: {work:.3g} PFLOP, {seconds} where 100 TFLOP/s are sustained")
    print("\nwhat fits:")
    for option, why in advice:
        print(f"  {option}\n      {why}")
    print(flush=True)


def _at(places: list[str]) -> str:
    return f" ({', '.join(places)}{' ...' if len(places) == 3 else ''})" if places else ""


def _ends(text: str) -> str:
    whole = text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]} [...] {text[-_SHOWN:]}"
    return whole.replace("\n", "\\n").replace("\r", "\\r")
