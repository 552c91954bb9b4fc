"""Per-example gradients whose mean and covariance are known, and the closed forms they give."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from trainc.runtime.noise_scale.estimate import Uncertainty

# G and the diagonal of Sigma^(1/2); |G|^2 = 6 and tr(Sigma) = 14.
MEAN = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
DEVIATION = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
TRACE = float(DEVIATION.square().sum())
TRACE_OF_SQUARE = float(DEVIATION.pow(4).sum())
ALONG_MEAN = float((MEAN * DEVIATION).square().sum())  # G' Sigma G


def gradients(steps: int, examples: int, seed: int, mean: float = 1.0) -> Tensor:
    """Draw g_b ~ Normal(mean G, Sigma), shape (steps, examples, 3), float64."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((steps, examples, 3), generator=generator, dtype=torch.float64)
    return mean * MEAN + DEVIATION * noise


def sq_norms(contributions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return |c_b|^2 and c_b . G, (B, steps), and |G|^2 (steps,), of contributions (steps, B, n)."""
    batch = contributions.sum(1)
    dots = torch.einsum("sbn,sn->bs", contributions, batch)
    return contributions.square().sum(2).T, dots, batch.square().sum(1)


def uncertainties() -> st.SearchStrategy[Uncertainty]:
    """Return a strategy of uncertainties: any variances, correlation and degrees of freedom."""
    deviations = st.floats(1e-3, 10)
    return st.builds(
        lambda s, n, r, f: Uncertainty(s * s, n * n, r * s * n, f),
        deviations,
        deviations,
        st.floats(-1, 1),
        st.floats(0.5, 200),
    )
