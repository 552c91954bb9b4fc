"""The operators and estimators as plain functions, for code of your own."""

from trainc.kernels.add_norm import add_layer_norm
from trainc.kernels.add_rms_norm import add_rms_norm
from trainc.kernels.embedding import embedding
from trainc.kernels.ghost_batch_norm import ghost_batch_norm
from trainc.kernels.layer_norm import layer_norm
from trainc.kernels.linear import linear
from trainc.kernels.masked_update import masked_update_
from trainc.kernels.multi_norm import multi_norm
from trainc.kernels.multiplicative_noise import multiplicative_noise, noisy_add
from trainc.kernels.rms_norm import rms_norm
from trainc.kernels.sparse_adamw import sparse_adamw_
from trainc.kernels.task_consistency_loss import task_consistency_loss
from trainc.runtime.noise_scale import noise_scale, noise_scale_from_contributions

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "embedding",
    "ghost_batch_norm",
    "layer_norm",
    "linear",
    "masked_update_",
    "multi_norm",
    "multiplicative_noise",
    "noise_scale",
    "noise_scale_from_contributions",
    "noisy_add",
    "rms_norm",
    "sparse_adamw_",
    "task_consistency_loss",
]
