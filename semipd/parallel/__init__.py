"""Tensor parallelism: a model's weights and KV heads on several ranks, which take every step together."""
