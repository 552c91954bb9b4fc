"""Importing this module registers every operator of the `trainc` namespace."""

from trainc.kernels import (
    add_norm,
    add_rms_norm,
    convolution,
    embedding,
    ghost_batch_norm,
    group_norm,
    head_consistency_loss,
    layer_norm,
    linear,
    masked_update,
    multi_norm,
    multiplicative_noise,
    rms_norm,
    sparse_adamw,
    task_consistency_loss,
    tied,
)

MODULES = (
    add_norm,
    add_rms_norm,
    convolution,
    embedding,
    ghost_batch_norm,
    group_norm,
    head_consistency_loss,
    layer_norm,
    linear,
    masked_update,
    multi_norm,
    multiplicative_noise,
    rms_norm,
    sparse_adamw,
    task_consistency_loss,
    tied,
)
