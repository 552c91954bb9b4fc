"""Classes that -inf masks, and rows that are ignored, in the Triton loss: by the interpreter, against the CPU's."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trainc.kernels.loss import cross_entropy_consistency as operator

pytestmark = [
    pytest.mark.interpreter,
    # The interpreter computes with numpy, which warns where a device says inf or nan.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

# Rows begin at several places within a vector of 8.
BLOCK, CLASSES, ROWS = 8, 18, 4
INF = float("inf")
FACTORS = torch.tensor(0.9), torch.tensor(0.3)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The launch module with blocks of 8 classes: a row has three, the first or the last of them not full."""
    from trainc.kernels.loss import triton_cross_entropy_consistency as triton_loss

    monkeypatch.setattr(triton_loss, "BLOCKS", {1: BLOCK, 4: BLOCK})
    monkeypatch.setattr(triton_loss, "BACKWARD_BLOCK", BLOCK)
    return triton_loss


def every_run(length: int) -> Tensor:
    """(ROWS, CLASSES) bool: row i masks `length` classes from the 5 i-th on, around the end."""
    one = torch.arange(CLASSES) < length
    return torch.stack([one.roll(5 * i) for i in range(ROWS)])


def results(
    module: Any, forward: Any, backward: Any, logits: Tensor, *rest: Any
) -> tuple[Any, ...]:
    """Row losses and distances, and the gradients with and without the distance."""
    labels, distance, smoothing = rest
    given = (distance, -100, smoothing)
    kept = operator.no_statistics(logits, distance)
    found = forward(logits, labels, *given, kept)
    gradients = []
    for on_distance in (FACTORS[1], torch.tensor(0.0)):
        out = torch.empty_like(logits)
        backward(logits, labels, FACTORS[0], on_distance, *given, kept, out=out)
        gradients.append(out)
    return *found, *gradients


def both(launched: Any, logits: Tensor, *rest: Any) -> tuple[Any, Any]:
    """What the kernel and what the CPU gives."""
    from trainc.kernels.loss import row_losses as cpu

    return tuple(
        results(module, module.row_losses, module.write_gradients, logits, *rest)
        for module in (launched, cpu)
    )  # type: ignore[return-value]


def test_logits_that_begin_within_a_word_are_not_read_by_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trainc.kernels.loss import triton_cross_entropy_consistency as triton_loss

    launch, widths = vars(triton_loss)["launch"], []

    def seen(*arguments: Any, **options: Any) -> None:
        widths.append(options["W"])
        launch(*arguments, **options)

    monkeypatch.setattr(triton_loss, "launch", seen)
    torch.manual_seed(0)
    held = torch.randn(2 * ROWS * CLASSES + 2).bfloat16()
    for start, width in ((0, 8), (1, 1), (2, 8)):  # a bfloat16 is half a word
        logits = held[start : start + 2 * ROWS * CLASSES].view(-1, CLASSES)
        got, want = both(triton_loss, logits, torch.arange(ROWS), "kl", 0.0)
        assert widths[0] == width
        torch.testing.assert_close(got[:2], want[:2], rtol=1e-4, atol=1e-4)
        widths.clear()


@pytest.mark.parametrize("length", [1, 8, 9, CLASSES - 1])
@pytest.mark.parametrize("distance", operator.DISTANCES)
def test_classes_masked_in_one_view_or_both_wherever_they_stand(
    launched: Any, distance: str, length: int
) -> None:
    torch.manual_seed(0)
    plain = torch.randn(2, ROWS, CLASSES)
    masks, none = every_run(length), torch.zeros(ROWS, CLASSES, dtype=torch.bool)
    labels = (~masks).int().argmax(1)
    for smoothing, *masked in (
        (0.0, masks, masks), (0.0, masks, none), (0.0, none, masks), (0.1, masks, masks),
    ):  # fmt: skip
        logits = plain.masked_fill(torch.stack(masked), -INF).view(-1, CLASSES)
        got, want = both(launched, logits, labels, distance, smoothing)
        assert want[0].isfinite().all() or smoothing
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(got[3], want[3], rtol=1e-5, atol=1e-6)
        # A gradient of an infinite distance is not a number somewhere in its row, and says so in both.
        assert not (got[2].isfinite().all(1) & ~want[2].isfinite().all(1)).any()


@pytest.mark.parametrize("distance", operator.DISTANCES)
def test_rows_of_masked_classes_alone_are_not_finite(launched: Any, distance: str) -> None:
    logits = torch.full((2, CLASSES), -INF)
    (losses, distances, *_), want = both(launched, logits, torch.tensor([3]), distance, 0.0)
    assert losses.isnan().all()
    assert want[0].isnan().all()
    assert not distances.isfinite().any()


@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("distance", operator.DISTANCES)
def test_one_bad_logit_is_never_read_over(launched: Any, distance: str, bad: float) -> None:
    torch.manual_seed(0)
    for view in range(2):
        logits = torch.randn(2, ROWS, CLASSES)
        logits[view].view(-1)[:: CLASSES + 2] = bad
        labels = torch.arange(ROWS).mul(2).add(1)
        found, want = both(launched, logits.view(-1, CLASSES), labels, distance, 0.0)
        losses, distances, *_ = found
        assert torch.equal(losses.isnan(), want[0].isnan())
        assert not distances.isfinite().any()
        assert losses.isfinite().all() == (view == 1)


@pytest.mark.parametrize("held", [float("nan"), INF, -INF, 3e38])
@pytest.mark.parametrize("distance", operator.DISTANCES)
def test_ignored_rows_change_nothing_whatever_they_hold(
    launched: Any, distance: str, held: float
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, CLASSES)
    labels = torch.tensor([4, 8, 0])
    more = torch.full((2, 2, CLASSES), held)
    more[1] = -more[1]
    more[:, 1, BLOCK:] = 0.5  # one row holds it everywhere, one in its first block
    if held != held:  # the interpreter finds no largest entry among nan alone
        more[..., ::BLOCK] = 0.5
        more[0, 1, :2] = torch.tensor([held, 0.5])
    padded = torch.cat([logits, more], 1)
    options = (torch.tensor(0.4), distance, -100, 0.1)
    want = launched.forward(logits.flatten(0, 1), labels, *options)
    got = launched.forward(
        padded.flatten(0, 1), torch.cat([labels, torch.tensor([-100] * 2)]), *options
    )
    assert all(one.isfinite() for one in want[:3])
    torch.testing.assert_close(got[:3], want[:3], rtol=0, atol=0)
    wanted = launched.backward(logits.flatten(0, 1), labels, want[3], *FACTORS, *options[1:])
    found = launched.backward(
        padded.flatten(0, 1), torch.cat([labels, torch.tensor([-100] * 2)]), got[3], *FACTORS, *options[1:]
    )  # fmt: skip
    found = found.view(2, 5, CLASSES)
    torch.testing.assert_close(found[:, :3].flatten(0, 1), wanted, rtol=0, atol=0)
    assert not found[:, 3:].any()


@pytest.mark.parametrize("distance", operator.DISTANCES)
def test_classes_masked_by_the_least_number_there_is(launched: Any, distance: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2 * ROWS, CLASSES)
    logits[::2, :9] = torch.finfo(torch.float32).min
    logits[[1, 1 + ROWS]] = torch.finfo(torch.float32).min  # every class: a uniform distribution
    labels = torch.tensor([9, 3, 17, 0])
    got, want = both(launched, logits, labels, distance, 0.0)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[3], want[3], rtol=1e-5, atol=1e-6)
    if distance == "kl":  # squared differences of such numbers are inf
        torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)
