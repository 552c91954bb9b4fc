"""Importing this module registers every operator of the `trainc` namespace."""

from trainc.kernels.layer import convolution, embedding, linear, tied_weights
from trainc.kernels.loss import cross_entropy_consistency, linear_cross_entropy_consistency
from trainc.kernels.noise import multiplicative_noise
from trainc.kernels.norm import (
    add_layer_norm,
    add_rms_norm,
    ghost_batch_norm,
    group_norm,
    layer_norm,
    rms_norm,
)
from trainc.kernels.parameter import masked_update, multi_norm, sparse_adamw

MODULES = (
    add_layer_norm,
    add_rms_norm,
    convolution,
    embedding,
    ghost_batch_norm,
    group_norm,
    linear_cross_entropy_consistency,
    layer_norm,
    linear,
    masked_update,
    multi_norm,
    multiplicative_noise,
    rms_norm,
    sparse_adamw,
    cross_entropy_consistency,
    tied_weights,
)
