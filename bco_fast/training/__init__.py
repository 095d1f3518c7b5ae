"""The trainer, its options, and its checkpoints."""
