"""The picture of a mask in a report: the entries that the last checkpoint of a run holds."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from matplotlib.figure import Figure

from trainc.compiler.constructs.mask._picture import cells, largest_mask, mask_panels
from trainc.kernels.parameter.masked_update import pack
from trainc.runtime.storage.checkpoint import save_checkpoint

SHAPES = {"small.weight": [2, 3], "large.weight": [200, 10]}


def test_it_shows_the_entries_of_the_largest_tensor(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(200, 10, generator=g) < 0.3
    plan = {"parameters": [{"name": name, "shape": shape} for name, shape in SHAPES.items()]}
    run = SimpleNamespace(folder=tmp_path, plan=plan)
    clause: Any = SimpleNamespace(label="one", run=run)
    assert list(mask_panels([clause])) == []
    index = mask.flatten().nonzero()[:, 0].int()
    for number, held in enumerate(({"index": index}, {"kept": pack(mask)})):
        state = {f"{key}/large.weight": value for key, value in held.items()}
        state["kept/small.weight"] = pack(torch.ones(2, 3, dtype=torch.bool))
        program = {"program": {"actions": {"one choice": state}}}
        save_checkpoint(tmp_path / "checkpoints", number + 1, program)
        found = largest_mask(tmp_path, clause)
        assert found is not None
        assert found[0] == "large.weight"
        assert torch.equal(found[1], mask)
    (panel,) = mask_panels([clause])
    assert panel.title == "one: entries of large.weight that train"
    axes = Figure().subplots()
    panel.draw(axes)
    assert axes.get_ylabel() == "outputs (200)"
    drawn: Any = axes.images[0].get_array()
    assert drawn.shape == (96, 10)


def test_a_cell_is_the_fraction_of_its_entries() -> None:
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:2, :3] = True
    mask[2, 5] = True
    assert torch.equal(cells(mask, 2), torch.tensor([[1.0, 0.0], [0.0, 1 / 6]]))
    assert cells(mask[0], 2).shape == (1, 2)
