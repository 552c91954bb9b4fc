"""Written by `make docs`: the types of what functional.py finds on disk."""

from trainc.compiler.constructs.adapt.apt import approximated_prompts
from trainc.compiler.constructs.loss.dpo import dpo_loss
from trainc.compiler.constructs.loss.ranked import ranked_loss
from trainc.compiler.constructs.lr.trust_ratio import trust_ratio
from trainc.compiler.constructs.mask.n_m import sr_ste
from trainc.compiler.constructs.mask.sparsegpt import sparsegpt
from trainc.compiler.constructs.mask.wanda import wanda_mask
from trainc.compiler.constructs.perturb.pac_noise import pac_kl
from trainc.compiler.constructs.regularize.features.contrast import supcon
from trainc.compiler.constructs.regularize.features.dr_tune import dr_calibrate, dr_rotation
from trainc.compiler.constructs.regularize.outputs._distances import consistency
from trainc.compiler.constructs.regularize.outputs.distill import distill_loss
from trainc.compiler.constructs.regularize.outputs.pace import pace_sigma
from trainc.compiler.per_example.functional import measured_parameters, per_example_sq_norms
from trainc.kernels.batch_norm.ghost_batch_norm import ghost_batch_norm
from trainc.kernels.layer.convolution import convolution
from trainc.kernels.layer.embedding import embedding
from trainc.kernels.layer.linear import linear
from trainc.kernels.layer.tied_embedding import tied_embedding
from trainc.kernels.layer.tied_linear import tied_linear
from trainc.kernels.loss.cross_entropy_consistency import cross_entropy_consistency
from trainc.kernels.loss.linear_cross_entropy import linear_cross_entropy
from trainc.kernels.loss.linear_cross_entropy_consistency import linear_cross_entropy_consistency
from trainc.kernels.noise.multiplicative_noise import multiplicative_noise, noisy_add
from trainc.kernels.norm.add_layer_norm import add_layer_norm
from trainc.kernels.norm.add_rms_norm import add_rms_norm
from trainc.kernels.norm.group_norm import group_norm
from trainc.kernels.norm.layer_norm import layer_norm
from trainc.kernels.norm.rms_norm import rms_norm
from trainc.kernels.parameter.figures import log_alpha, spectral_entropy, spectral_norm, stable_rank
from trainc.kernels.parameter.masked_update import masked_update_
from trainc.kernels.parameter.multi_norm import multi_norm
from trainc.kernels.parameter.sparse_adamw import sparse_adamw_
from trainc.kernels.parameter.spectral_null import calibrated_alpha, null_alpha, null_distance
from trainc.kernels.parameter.spectral_windows import farms_alpha
from trainc.kernels.parameter.spectrum import spectrum
from trainc.kernels.parameter.tail_fit import hill_alpha
from trainc.runtime.factors.maps import balance
from trainc.runtime.factors.noise import spread_gain
from trainc.runtime.mask.allocation import allocate
from trainc.runtime.mask.entry_choice import topk_mask
from trainc.runtime.noise_scale.estimators import noise_scale, noise_scale_from_contributions

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "allocate",
    "approximated_prompts",
    "balance",
    "calibrated_alpha",
    "consistency",
    "convolution",
    "cross_entropy_consistency",
    "distill_loss",
    "dpo_loss",
    "dr_calibrate",
    "dr_rotation",
    "embedding",
    "farms_alpha",
    "ghost_batch_norm",
    "group_norm",
    "hill_alpha",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_consistency",
    "log_alpha",
    "masked_update_",
    "measured_parameters",
    "multi_norm",
    "multiplicative_noise",
    "noise_scale",
    "noise_scale_from_contributions",
    "noisy_add",
    "null_alpha",
    "null_distance",
    "pac_kl",
    "pace_sigma",
    "per_example_sq_norms",
    "ranked_loss",
    "rms_norm",
    "sparse_adamw_",
    "sparsegpt",
    "spectral_entropy",
    "spectral_norm",
    "spectrum",
    "spread_gain",
    "sr_ste",
    "stable_rank",
    "supcon",
    "tied_embedding",
    "tied_linear",
    "topk_mask",
    "trust_ratio",
    "wanda_mask",
]
