"""The model card of a run: objective, data, held-out figures, options and versions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

SOURCES: dict[str, tuple[str, str]] = {
    "bco": (
        "−log σ(±(r − δ)), δ the midpoint of the classes' mean rewards",
        "Jung et al., arXiv 2404.04656, Eq. 7 and 8",
    ),
    "bce": ("−log σ(±r)", "Jung et al., arXiv 2404.04656, section 5"),
    "kto": ("λ (1 − σ(±(r − β z)))", "Ethayarajh et al., arXiv 2402.01306, Eq. 8"),
    "una_binary_mse": ("(σ(r − δ) − label)²", "Wang et al., arXiv 2408.15339, Eq. 11"),
    "una_binary_bce": ("binary cross-entropy of σ(r − δ)", "Wang et al., arXiv 2408.15339, Eq. 12"),
    "una_score": ("(σ(r − δ) − score)²", "Wang et al., arXiv 2408.15339, Eq. 13"),
    "una_reward": ("(r − δ − score)²", "Wang et al., arXiv 2408.15339, Eq. 7 and 9"),
    "bnf": ("∓ 1/|y| Σ [w logp − (1 − w) H]", "Mao et al., arXiv 2410.04834, Eq. 4 to 9"),
    "sft": ("−logp of thumbs up, mean over tokens", "Jung et al., arXiv 2404.04656, App. C"),
    "una_pair": ("−log σ(r_w − r_l)", "Wang et al., arXiv 2408.15339, Eq. 10"),
    "dpo": ("−log σ(r_w − r_l)", "Rafailov et al., arXiv 2305.18290, Eq. 7"),
    "ipo": ("(h_w − h_l − 1/(2β))²", "Azar et al., arXiv 2310.12036, Eq. 17"),
    "slic": ("max(0, Δ − logp_w + logp_l) − λ logp_w", "Zhao et al., arXiv 2305.10425, Eq. 1"),
    "simpo": ("−log σ(β logp_w/|y_w| − β logp_l/|y_l| − γ)", "Meng et al., arXiv 2405.14734, Eq. 6"),
    "orpo": ("−logp_w/|y_w| − λ log σ(log odds_w − log odds_l)", "Hong et al., arXiv 2403.07691, Eq. 6 and 7"),
    "rdpo": ("−log σ(r_w − r_l + α(|y_w| − |y_l|))", "Park et al., arXiv 2403.19159, Eq. 9"),
    "robust": (
        "(−(1 − ε) log σ(r_w − r_l) + ε log σ(r_l − r_w)) / (1 − 2ε)",
        "Chowdhury et al., arXiv 2403.00409",
    ),
    "exo_pair": ("KL of (σ(x), σ(−x)) from (1 − ε, ε), x = r_w − r_l", "Ji et al., arXiv 2402.00856, Eq. 16"),
    "hinge": ("max(0, 1 − (r_w − r_l))", "Liu et al., arXiv 2309.06657"),
    "sigmoid_norm": ("−log σ(r_w/|y_w| − r_l/|y_l|)", "Lambert et al., arXiv 2411.15124"),
    "aot": ("−log σ(β (m_(i) − m_ref(i))), m = logp_w − logp_l, sorted in a batch", "Melnyk et al., arXiv 2406.05882"),
    "aot_unpaired": ("−log σ(r_w(i) − r_l(i)), each side sorted in a batch", "Melnyk et al., arXiv 2406.05882"),
    "sppo_hard": ("(h_w − 1/(2β))² + (h_l + 1/(2β))²", "Wu et al., arXiv 2405.00675, Eq. 4.7"),
    "bco_pair": ("−log σ(r_w) − log σ(−r_l)", "Jung et al., arXiv 2404.04656, section 5"),
    "apo_zero": ("σ(−r_w) + σ(r_l)", "D'Oosterlinck et al., arXiv 2408.06266, Eq. 7"),
    "apo_down": ("σ(r_w) + σ(r_l − r_w)", "D'Oosterlinck et al., arXiv 2408.06266, Eq. 8"),
    "discopop": ("−(1 − m) log σ(x) + m e^−x, m = σ(x/τ), x = r_w − r_l", "Lu et al., arXiv 2406.08414, Eq. 5"),
    "cpo": ("−log σ(β (logp_w − logp_l)) − λ logp_w/|y_w|", "Xu et al., arXiv 2401.08417, Eq. 3"),
    "apo_zero_unpaired": ("σ(∓r)", "D'Oosterlinck et al., arXiv 2408.06266, Eq. 7"),
    "nca": ("−log σ(r_w) − ½ (log σ(−r_w) + log σ(−r_l))", "Chen et al., arXiv 2402.05369"),
}
"""loss_type -> (cost of a completion or pair, source)."""

_FIGURES = {
    "eval_rewards/auc": "AUC of the reward, thumbs up against thumbs down",
    "eval_rewards/margins": "margin: mean reward of thumbs up minus that of thumbs down",
    "eval_rewards/accuracies": "share of completions on the right side of δ",
    "eval_rewards/chosen": "mean reward of thumbs up",
    "eval_rewards/rejected": "mean reward of thumbs down",
    "eval_loss": "loss",
}


_NOTES = {
    "rows_read": "rows in the file",
    "skipped": "bad rows left out",
    "prompts_cut": "prompts cut",
    "completions_cut": "completions cut",
}


def model_card(record: Mapping, license: str | None = None) -> str:
    """README.md of a model.

    Args:
        record: the record that `record.RunRecorder` keeps; it has no secrets and no absolute paths. `merged` in it says
            that the adapter is part of the weights.
        license: the Hub's name of one, such as apache-2.0.

    Raises:
        ValueError: license is more than one word.
    """
    if license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", license):
        raise ValueError(f"license must be one word, such as apache-2.0, not {license!r}")
    name, loss_type = str(record.get("model") or ""), record["loss_type"]
    formula, source = _cost(record)
    trained, whole = record.get("trained_parameters", 0), record.get("parameters", 0)
    step, last = record.get("step", 0), record.get("max_steps", 0)
    parts = [
        _front_matter(record, license),
        f"# {_text(name) or _text(record.get('architecture', 'A language model'))} aligned with {loss_type.upper()}",
        f"{_code(name) if name else 'A model'} ({_code(record.get('architecture', 'unknown'))}), aligned from "
        f"{'pairs of completions' if record.get('data_kind') == 'pairs' else 'judged completions'} with bco_fast; "
        f"{_trained_part(record)}, {trained:,} of {whole:,} parameters.",
        "## Objective",
        f"`{loss_type}`: {formula}" + (f"; β = {record['beta']:g}" if record.get("beta") is not None else "") + "  ",
        source,
        _reading(record),
        "## Data",
        _data(record),
        "## Held-out figures",
        _held_out(record),
        "## Training",
        f"Step {step} of {last}"
        + (f", epoch {record['epoch']:.2f}" if record.get("epoch") is not None else "")
        + f"; {record.get('seconds', 0):,.0f} s on {record.get('devices', 1)} device(s), peak memory "
        f"{record.get('peak_memory_mb', 0):,.0f} MB ({_text(record.get('peak_memory_of', 'process'))}).",
        _table(["option", "value"], [(f"`{k}`", _code(v)) for k, v in record.get("options", {}).items()]),
        "Options that are not listed are at their defaults.",
        "## Versions",
        ", ".join(f"{k} {_text(v)}" for k, v in record.get("versions", {}).items()),
    ]
    return "\n\n".join(part for part in parts if part).replace("  \n\n", "  \n") + "\n"


def _trained_part(record: Mapping) -> str:
    if record.get("adapter"):
        return "a LoRA adapter, merged into its base" if record.get("merged") else "a LoRA adapter"
    return (
        "all of its weights" if record.get("trained_parameters") == record.get("parameters") else "part of its weights"
    )


def _cost(record: Mapping) -> tuple[str, str]:
    """Cost and source of the objective; of a sum, of each of its objectives with its weight."""
    names = record["loss_type"].split("+")
    weights = record.get("options", {}).get("loss_weights") or [1.0] * len(names)
    known = [SOURCES.get(name, (name, "")) for name in names]
    costs = [cost for cost, _ in known]
    if len(names) > 1:
        costs = [f"{weight:g} · [{cost}]" for weight, cost in zip(weights, costs, strict=True)]
    elif names[0] not in SOURCES:
        return "", ""
    sources = []
    for source in dict.fromkeys(source for _, source in known if source):
        arxiv = re.search(r"\d{4}\.\d{5}", source)
        sources.append(source + (f" (<https://arxiv.org/abs/{arxiv.group()}>)" if arxiv else ""))
    return " + ".join(costs), "; ".join(sources)


def _front_matter(record: Mapping, license: str | None) -> str:
    name = str(record.get("model") or "")
    lines = ["---", f"library_name: {'peft' if record.get('adapter') and not record.get('merged') else 'transformers'}"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):  # a Hub name; anything else would be a broken link
        lines.append(f"base_model: {json.dumps(name)}")
    if license is not None:
        lines.append(f"license: {json.dumps(license)}")
    return "\n".join([*lines, "tags:", "- bco_fast", *(f"- {name}" for name in record["loss_type"].split("+")), "---"])


def _reading(record: Mapping) -> str:
    if not record.get("reference"):
        return "Rewards below are log-probabilities of the model itself; there is no reference model."
    another = record.get("options", {}).get("ref_adapter")
    reference = "the base with another adapter" if another else "the model before training"
    if record.get("beta") is None:
        return f"Rewards below are log-ratios to the reference, logp − logp_ref, in nats; the reference is {reference}."
    return f"Rewards below are r = β (logp − logp_ref), sums over a completion's tokens; the reference is {reference}."


def _data(record: Mapping) -> str:
    lines = []
    for title, counts in (("training", record["data"].get("train")), ("held out", record["data"].get("held_out"))):
        if not counts:
            continue
        split = "pairs" if counts["pairs"] else f"rows ({counts['up']:,} up, {counts['down']:,} down)"
        notes = [f"{counts[key]:,} {text}" for key, text in _NOTES.items() if counts.get(key)]
        lines.append(f"* {title}: {counts['rows']:,} {split}{'; ' + ', '.join(notes) if notes else ''}")
    return "\n".join(lines) or "Not recorded."


def _held_out(record: Mapping) -> str:
    figures = record.get("held_out") or {}
    rows = [
        (f"{_text(part)}: {title}" if part else title, f"{figures[key]:.4g}")
        for part in ("", *((record["data"].get("held_out") or {}).get("sets") or ()))
        for name, title in _FIGURES.items()
        if (key := name.replace("eval_", f"eval_{part}_") if part else name) in figures
    ]
    if "auc_low" in figures:
        rows.insert(1, ("its 95 % interval", f"{figures['auc_low']:.3f} to {figures['auc_high']:.3f}"))
    return _table([f"at step {figures.get('step', 0)}", ""], rows) if rows else "Not evaluated yet."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _text(value) -> str:
    """Without anything that Markdown or HTML would read as markup."""
    return re.sub(r"[^\w .,:+/=-]", "", str(value)).strip()


def _code(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"
