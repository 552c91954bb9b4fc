"""Every operator as an accuracy case: small problems, what their results are, and where data goes.

The compositions are those that are timed elsewhere, or the operators' own definitions in plain
PyTorch where those are what a user would write.
"""

from dataclasses import dataclass
from functools import partial

from benchmarks import updates
from benchmarks.accuracy_problems import (
    Build,
    chosen_adamw,
    chunked_head,
    convolution,
    ghost_operator,
    group_norm,
    head,
    llama,
    loss,
    running,
    same_noise,
    split_columns,
    with_algorithm,
)
from benchmarks.adversarial import FAMILIES, LOGITS
from benchmarks.operators import (
    Size,
    embedding,
    norm,
)
from trainc.kernels.loss import cross_entropy_consistency as consistency
from trainc.kernels.noise import multiplicative_noise as noise


@dataclass(frozen=True)
class Case:
    """One operator in one variant."""

    operator: str
    variant: str
    build: Build
    size: Size
    # Results, then gradients of the leaves, in the order in which `operators.step` returns them.
    results: tuple[str, ...]
    # Which arguments take a family's numbers; none: the gradients of the results do.
    data: tuple[int, ...] = (0,)
    families: tuple[str, ...] = tuple(FAMILIES)
    # Results whose entries are statistics of their own, with an error of their own.
    each: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The operator and its variant."""
        return f"{self.operator}, {self.variant}" if self.variant else self.operator


SMALL, LONG = Size(6, 7, 96), Size(2, 300, 256)
LAYER, RMS = ("y", "dx", "dweight", "dbias"), ("y", "dx", "dweight")
ADD_LAYER = ("total", "y", "dx", "dresidual", "dweight", "dbias")
ADD_RMS = ADD_LAYER[:-1]
LOSSES = ("loss", "cross_entropy", "consistency", "dlogits", "dlambda")
ALL = tuple(range(6))


def _norms() -> list[Case]:
    found = []
    for rms, add, results in (
        (False, False, LAYER), (True, False, RMS), (False, True, ADD_LAYER), (True, True, ADD_RMS),
    ):  # fmt: skip
        name = ("add_" if add else "") + ("rms_norm" if rms else "layer_norm")
        data = (0, 1) if add else (0,)
        build = {probed: norm(rms, add, probed) for probed in (False, True)}
        found.append(Case(name, "", build[False], SMALL, results, data))
        for variant, size in (("probe", SMALL), ("probe, long", LONG))[: 1 if add else 2]:
            found.append(Case(name, variant, build[True], size, (*results, "norms"), data))
    return found


CASES: tuple[Case, ...] = (
    *_norms(),
    Case("rms_norm", "llama, probe", llama, SMALL, (*RMS, "norms")),
    *(Case("linear", algorithm, with_algorithm(algorithm), Size(4, 12, 48), (*LAYER, "norms"), each=("norms",))
      for algorithm in ("simultaneous", "gram")),
    *(Case("linear", f"{algorithm}, dy", with_algorithm(algorithm), Size(4, 12, 48), (*LAYER, "norms"), (),
           each=("norms",))
      for algorithm in ("simultaneous", "gram")),
    Case("linear", "one row", with_algorithm("auto"), Size(6, 1, 48), (*LAYER, "norms"),
         each=("norms",)),
    Case("embedding", "dy", partial(embedding, words=11), Size(5, 40, 32),
         ("y", "dweight", "norms"), (), each=("norms",)),
    Case("group_norm", "probe", group_norm, Size(5, 20, 12), (*LAYER, "norms")),
    Case("convolution", "probe", convolution, Size(4, 7, 3), (*LAYER, "norms"), each=("norms",)),
    Case("ghost_batch_norm", "", ghost_operator, Size(16, 40, 6), LAYER),
    Case("ghost_batch_norm", "running", running, Size(16, 40, 6), ("mean", "var"),
         each=("mean", "var")),
    *(Case("multiplicative_noise", share, same_noise(False, share), Size(3, 5, 48), ("y", "dx"))
      for share in noise.SHARES),
    *(Case("noisy_add", share, same_noise(True, share), Size(3, 5, 48), ("y", "dh0", "ddelta"),
           (0, 1)) for share in noise.SHARES),
    *(Case("cross_entropy_consistency", f"{distance}, smoothed" if smoothing else distance,
           loss(distance, smoothing), Size(12, 1, 50), LOSSES, families=tuple(LOGITS))
      for distance in consistency.DISTANCES for smoothing in (0.0, 0.1)),
    *(Case("linear_cross_entropy_consistency", distance, head(distance, smoothing), Size(4, 3, 32),
           (*LOSSES[:3], "dx", "dweight", "dbias", "dlambda"))
      for distance, smoothing in (("mse", 0.1), ("kl", 0.0))),
    Case("linear_cross_entropy", "", chunked_head, Size(4, 3, 32),
         ("loss", "dx", "dweight", "dbias")),
    Case("multi_norm", "", split_columns, Size(3, 90, 500), ("squares", "products", "broken"), ALL,
         each=("squares",)),
    Case("sparse_adamw_", "blocks", updates.sparse_adamw, Size(1, 128, 64),
         ("weight", "exp_avg", "exp_avg_sq"), (1,)),
    Case("sparse_adamw_", "gathered", chosen_adamw(False), Size(1, 128, 64),
         ("weight", "exp_avg", "exp_avg_sq"), (1,)),
    Case("sparse_adamw_", "master", chosen_adamw(True), Size(1, 128, 64),
         ("weight", "exp_avg", "exp_avg_sq", "master"), (1,)),
    Case("masked_update_", "", updates.masked_update, Size(2, 16, 24),
         ("first", "second", "third"), (0, 1, 2)),
)  # fmt: skip
