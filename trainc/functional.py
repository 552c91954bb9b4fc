"""The operators and estimators as plain functions, for code of your own."""

from trainc.compiler.per_example import measured_parameters, per_example_sq_norms
from trainc.kernels.add_norm import add_layer_norm
from trainc.kernels.add_rms_norm import add_rms_norm
from trainc.kernels.convolution import convolution
from trainc.kernels.embedding import embedding
from trainc.kernels.ghost_batch_norm import ghost_batch_norm
from trainc.kernels.group_norm import group_norm
from trainc.kernels.head_consistency_loss import head_consistency_loss
from trainc.kernels.layer_norm import layer_norm
from trainc.kernels.linear import linear
from trainc.kernels.masked_update import masked_update_
from trainc.kernels.multi_norm import multi_norm
from trainc.kernels.multiplicative_noise import multiplicative_noise, noisy_add
from trainc.kernels.rms_norm import rms_norm
from trainc.kernels.sparse_adamw import sparse_adamw_
from trainc.kernels.task_consistency_loss import task_consistency_loss
from trainc.kernels.tied import tied_embedding, tied_linear
from trainc.runtime.noise_scale import noise_scale, noise_scale_from_contributions

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "convolution",
    "embedding",
    "ghost_batch_norm",
    "group_norm",
    "head_consistency_loss",
    "layer_norm",
    "linear",
    "masked_update_",
    "measured_parameters",
    "multi_norm",
    "multiplicative_noise",
    "noise_scale",
    "noise_scale_from_contributions",
    "noisy_add",
    "per_example_sq_norms",
    "rms_norm",
    "sparse_adamw_",
    "task_consistency_loss",
    "tied_embedding",
    "tied_linear",
]
