"""Implementations of the fused head. They share `head.types` and never import one another."""
