"""The reference model: who it is, running it once, and its log-probabilities on disk."""
