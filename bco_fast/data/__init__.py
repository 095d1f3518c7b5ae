"""Feedback: reading it, turning it into tokens, and tokens into batches."""

from .._moved import old_names

__getattr__ = old_names(
    __name__,
    {
        "Example": "data.dataset",
        "Item": "data.dataset",
        "FeedbackDataset": "data.dataset",
        "collate": "data.batch",
        "IGNORE": "data.batch",
        "FeedbackError": "data.sources",
        "FeedbackRow": "data.rows",
        "Needs": "data.rows",
        "read_rows": "data.rows",
        "split_by_prompt": "data.rows",
        "unpair": "data.rows",
        "fit": "data.tokenize",
        "load_feedback": "data.tokenize",
        "tokenize_rows": "data.tokenize",
    },
)
