"""The operators and estimators as plain functions, for your own code.

Operators are found on disk, in the folders of `trainc.kernels`; `make docs` writes their types to functional.pyi.
"""

from trainc.compiler.per_example.functional import measured_parameters, per_example_sq_norms
from trainc.kernels.operators import FUNCTIONS
from trainc.runtime.noise_scale.estimators import noise_scale, noise_scale_from_contributions

globals().update(FUNCTIONS)

__all__ = [
    "measured_parameters",
    "noise_scale",
    "noise_scale_from_contributions",
    "per_example_sq_norms",
]
__all__ += sorted(FUNCTIONS)
