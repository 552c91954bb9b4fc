"""Importing this module registers every operator of the `trainc` namespace."""

from trainc.kernels import (
    add_norm,
    add_rms_norm,
    embedding,
    ghost_batch_norm,
    layer_norm,
    linear,
    masked_update,
    multi_norm,
    multiplicative_noise,
    rms_norm,
    sparse_adamw,
    task_consistency_loss,
)

MODULES = (
    add_norm,
    add_rms_norm,
    embedding,
    ghost_batch_norm,
    layer_norm,
    linear,
    masked_update,
    multi_norm,
    multiplicative_noise,
    rms_norm,
    sparse_adamw,
    task_consistency_loss,
)
