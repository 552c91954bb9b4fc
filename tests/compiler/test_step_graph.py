"""A step graph may wait for its graph, refuses other batches and copies whole."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import models
from trainc.compiler.execution.capture import capture
from trainc.compiler.graph.interface import BatchMismatch
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.method.sites import NormSite, Rewrite
from trainc.runtime.data.batch import Batch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def images(examples: int = 4) -> Batch:
    return torch.randn(examples, 1, 8, 8), torch.randint(10, (examples,))


@pytest.fixture
def model() -> nn.Module:
    return models.vit(layers=1, width=32).train()


def captured(model: nn.Module, batch: Batch, **scalars: Tensor) -> StepGraph:
    names = [n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    norms = [NormSite(n, "layer", f"{n}.weight", f"{n}.bias", 1e-5) for n in names]
    return capture(model, F.cross_entropy, batch, rewrite=Rewrite(norms=norms), scalars=scalars)


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_it_is_a_graph_module_before_the_first_batch(model: nn.Module) -> None:
    step = StepGraph(model)
    assert isinstance(step, torch.fx.GraphModule)
    assert not step.installed
    assert list(step.state_dict()) == list(model.state_dict())
    assert step.get_parameter("head.weight") is model.get_parameter("head.weight")
    with pytest.raises(RuntimeError, match="captured at the first batch"):
        step.run(images(), {})
    assert not step.accepts(images())


def test_installing_gives_it_the_graph_of_another(model: nn.Module) -> None:
    step, batch = StepGraph(model), images()
    other = captured(model, batch, loss_weight=torch.tensor(1.0))
    step.install(other)
    assert step.installed
    assert step.code == other.code
    assert step.reports == other.reports
    one = torch.tensor(1.0)
    a, b = step.run(batch, {"loss_weight": one}), other.run(batch, {"loss_weight": one})
    assert equal(a.grads, b.grads)
    assert equal(a.probes, b.probes)
    step.graph.lint()
    step.install(captured(model, images(2)))
    assert step.accepts(images(2))
    assert not step.accepts(batch)


def test_calling_it_is_calling_its_owner(model: nn.Module) -> None:
    step, batch = StepGraph(model), images()
    with pytest.raises(RuntimeError, match="does not belong to a program"):
        step(batch)
    step.on_call = lambda given: ("called with", given)
    assert step(batch) == ("called with", batch)
    step.install(captured(model, batch))
    assert step(batch) == ("called with", batch)


def test_graph_modules_made_by_torch_can_be_built_around_it(model: nn.Module) -> None:
    batch = images()
    step = captured(model, batch)
    plain = torch.fx.GraphModule(step, step.graph)
    with torch.no_grad():
        values = plain(*batch)
    assert torch.equal(values[0], step.run(batch, {}).total)


def test_its_function_is_written_at_its_first_use_and_again_after_a_change(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[torch.fx.GraphModule] = []
    write = torch.fx.GraphModule.recompile

    def counting(module: torch.fx.GraphModule) -> Any:
        written.append(module)
        return write(module)

    monkeypatch.setattr(torch.fx.GraphModule, "recompile", counting)
    batch = images()
    step, other = captured(model, batch), StepGraph(model)
    other.install(step)
    assert not [one for one in written if isinstance(one, StepGraph)]
    first = step.run(batch, {})
    step.run(batch, {})
    assert [one for one in written if isinstance(one, StepGraph)] == [step]
    output: Any = step.graph.output_node()
    total, *others = output.args[0]
    with step.graph.inserting_before(output):
        output.args = ((step.graph.call_function(torch.neg, (total,)), *others),)
    step.recompile()
    assert torch.equal(step.run(batch, {}).total, -first.total)
    assert [one for one in written if isinstance(one, StepGraph)] == [step, step]
    assert "neg" in step.code


def test_a_batch_it_was_not_captured_for_is_refused(model: nn.Module) -> None:
    batch = images()
    step = captured(model, batch)
    with pytest.raises(BatchMismatch, match=r"expected inputs float32\[4, 1, 8, 8\] on cpu, got"):
        step.run(images(2), {})
    with pytest.raises(BatchMismatch, match="float64"):
        step.run((batch[0].double(), batch[1]), {})
    with pytest.raises(BatchMismatch, match="expected a tensor of 1 inputs"):
        step.run(({"x": batch[0]}, batch[1]), {})
    assert step.accepts(images())


def test_a_batch_of_other_strides_is_taken(model: nn.Module) -> None:
    inputs, targets = images()
    assert isinstance(inputs, Tensor)
    step = captured(model, (inputs, targets))
    want = step.run((inputs, targets), {})
    other = inputs.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not other.is_contiguous()
    assert torch.equal(step.run((other, targets.repeat(2)[:4]), {}).loss, want.loss)


def test_a_scalar_that_was_not_given_is_named(model: nn.Module) -> None:
    step = captured(model, images(), loss_weight=torch.tensor(1.0))
    with pytest.raises(KeyError, match="loss_weight"):
        step.run(images(), {})


def test_no_autograd_and_no_grad_field_is_touched(model: nn.Module) -> None:
    batch = images()
    out = captured(model, batch).run(batch, {})
    assert not out.loss.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not any(g.requires_grad for g in out.grads.values() if g is not None)


def test_a_deep_copy_is_a_step_of_its_own(model: nn.Module) -> None:
    batch = images()
    step = captured(model, batch)
    want = step.run(batch, {})
    other = copy.deepcopy(step)
    assert isinstance(other, StepGraph)
    assert list(other.state_dict()) == list(step.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    out = other.run(batch, {})
    assert torch.equal(out.loss, want.loss)
    assert equal(out.grads, want.grads)
    assert other.code == step.code


def test_copied_together_the_model_and_its_step_stay_together() -> None:
    model = models.gpt(1, 16, 2, 8, 32, tied=True).train()
    batch = (torch.randint(32, (2, 8)), torch.randint(32, (2, 8)))

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    step = capture(model, loss, batch, rewrite=Rewrite(), scalars={})
    twin, twin_step = copy.deepcopy((model, step))
    for name, parameter in twin.named_parameters(remove_duplicate=False):
        assert twin_step.get_parameter(name) is parameter
        assert parameter is not model.get_parameter(name)
    assert torch.equal(twin_step.run(batch, {}).loss, step.run(batch, {}).loss)


def test_it_is_not_pickled(model: nn.Module) -> None:
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(StepGraph(model))


def test_a_name_the_graph_module_needs_is_refused() -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"`graph\.weight` cannot be captured under this name"):
        StepGraph(Clash())
