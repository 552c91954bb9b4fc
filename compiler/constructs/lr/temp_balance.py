"""TempBalance: learning rates by the tail of each weight's spectrum, higher for lighter tails."""

from __future__ import annotations

from typing import ClassVar

from trainc.compiler.constructs.lr._spectral import SpectralPolicy


class TempBalance(SpectralPolicy):
    """Scales the learning rate of each module by its weight's Hill exponent alpha, mapped onto `range`.

    The eigenvalues are the squared singular values of the weight; a convolution uses those of all
    its kh*kw matrices together. alpha = 1 + k / sum(ln(lambda / xmin)) over the k largest of them.
    With `map = linear` the smallest alpha gets the low end of `range`, the largest the high end.
    Selected vectors of a module, such as its bias, share its factor; where a module has several
    selected matrices, each has its own factor and the vectors keep their rate. With `follow`,
    norms and the like share that of the module before them in their block.

    What is measured is a matrix as the model uses it. Queries, keys and values of a fused
    projection, experts, and gates of recurrent layers have a spectrum each, and their parameter
    the factor of their mean. `split = heads` takes each head of attention apart, where the model
    says how many there are; `split = whole` takes weights as they are stored, as published. A weight
    with an adapter is W + scale B A, and the factor that of A and B. Tied weights are measured once; rows and
    columns of zeros, which masks leave, do not count, but with `metric = alpha` the noise is taken
    to be that of the whole shape. A mask that is chosen in the step of a measurement is in the next
    one. The plan lists what is measured, and why it is divided so.
    Processes with equal weights measure a part each. Of a weight that FSDP2 shards by rows, no fewer than its
    columns, the Gram matrices of the shards are added up; another is gathered, one at a time.
    `window` takes windows of one aspect in place of the whole (Hu et al., ICML 2025,
    arXiv:2506.06280): those of released code are `window = 100`.

    Two things differ from the paper by default. `metric = calibrated`: of random weights alpha says
    the shape alone, 2.12 for a square and 4.5 for 1 to 8, and so factors would. The figure is
    1 + 1.12 (alpha - 1) / (null - 1), where null is the alpha of independent entries of the shape.
    `shrink`: independent entries give an alpha that is off by 3/n or so, and a map onto `range`
    stretches even that to its ends. So a factor f becomes 1 + gain (f - 1). The gain is max(0, 1 - c / Q)
    with Q = sum((figure - mean)^2 / noise^2) over the m units, and c the 99 % quantile of
    chi-squared with m - 1 degrees of freedom: 0 at initial weights, near 1 where tails clearly
    differ. `metric = alpha, shrink = false` is as published.

    `fit` says where the tail begins: `median` at a fixed place, `dks` where the power law fits best,
    `peak` the same near the mode of the spectrum over log10(lambda), with the lower bound that the
    released code means (it compares the bound's logarithm with eigenvalues). `dks` and `peak` differ
    a lot between equal layers; `median` does not. The null of the two is not known: with them nothing
    is calibrated or shrunk.

    `map = sqrt` and `log2` give factors in proportion to sqrt(alpha) and log2(alpha), with a mean of
    1. `step` goes by rank r of n, from 0: low + (high - low) r / n. `sigmoid` is that of model
    balancing (Liu et al., EMNLP 2024, arXiv:2410.12178): 10^(s (1 / (1 + exp(-10 (alpha - mean))) -
    1/2)), with `range` its limits below and above the mean.

    With `unit = part` each of these has a factor of its own, such as each head with `split = heads`: its
    slice of the update is multiplied, after `lr trust_ratio` and the like. Vectors of the module have the
    mean. A weight that is computed of several parameters has no slices: it is an error there.

    With `unit = block`, as model balancing has it, all modules of a block share the factor of their
    mean alpha, and what stands before the first block or after the last keeps its rate; `unit = type`
    does so for modules whose names differ in numbers only. `highest` and `ramp` are of the layer-wise
    recipe of He et al. (ICML 2026, arXiv:2605.22297): embeddings and the head are not measured and
    get the highest factor, and factors take 50 steps to their new values, in the first 20 % of the run:
    `until 20% { range = 1..5, highest = type(Embedding) | role(head), ramp = 50 steps }`.

    `control` changes what the factors follow and nothing else: `permuted` gives each unit the alpha of
    another, drawn anew at every measurement, `reversed` mirrors alpha between the smallest and the
    largest, and `static` keeps the factors of the first measurement whose gain is above 0. If a
    control does as well, what is gained is not by the measurement.

    With `beside` a step copies what it measures, and a thread measures the copies while the step runs
    its passes. The step waits for the figures at its end, after the update, and their factors act from
    the next step on: one step later than without, on every machine. So every checkpoint has the figures.
    A step that is skipped waits, too. What fails in the thread is raised by the next step. On the CPU
    the thread shares the cores with the passes; on CUDA it has a stream of its own, not measured on a GPU.

    Factors are measured at the first step that is due, then `every` so often, by default every 100
    steps; between measurements and after `until` the last factors hold. The factor is 1 if all
    exponents are equal or there is only one (the published code gives the high end), and, with a
    note, for a weight that is zero, of low rank or orthogonal. A weight that is not finite is an error. Parts
    with fewer eigenvalues than `min_eigenvalues` are not measured, and modules without another part
    keep their rate. Embeddings, and modules without a matrix, may be selected by `highest` or
    `follow` alone.
    """

    cite: ClassVar = "Zhou et al., Temperature Balancing, NeurIPS 2023, arXiv:2312.00359"
    usage: ClassVar = (
        "lr temp_balance on ndim(2) - type(Embedding) every 200 steps { range = 0.5..1.5 }"
    )
