"""Tensor parallelism below the model: the group of ranks, the cuts of the weights, the sharded layers."""
