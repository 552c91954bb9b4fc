"""Importing this module registers every operator of the `trainc` namespace."""

from trainc.kernels import (
    layer_norm,
    multi_norm,
    multiplicative_noise,
    rms_norm,
    sparse_adamw,
    task_consistency_loss,
)

MODULES = (
    layer_norm,
    multi_norm,
    multiplicative_noise,
    rms_norm,
    sparse_adamw,
    task_consistency_loss,
)
