"""Hugging Face models: loading them, patching their lm-head, and making long sequences fit."""

from .._moved import old_names

__getattr__ = old_names(
    __name__,
    {
        "TARGETS": "models.patch",
        "ENTROPY": "models.patch",
        "HeadOutput": "models.patch",
        "patch_model": "models.patch",
        "forward_logps": "models.patch",
        "completion_logps": "models.patch",
        "logp_budget": "models.patch",
    },
)
