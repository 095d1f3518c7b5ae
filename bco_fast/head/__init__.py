"""The fused lm-head: log-probabilities of given tokens, and their gradients, without the logits."""
