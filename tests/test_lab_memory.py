"""The memory table: its parts against the model itself, and what more GPUs must change."""

import pytest
import torch

from minirlhf.lab import memory as lab
from minirlhf.model import Transformer
from minirlhf.optim import make_optimizer


@pytest.mark.parametrize("size, millions", [("small", 124.4), ("medium", 354.8), ("large", 774.0), ("xl", 1557.6)])
def test_parameters_are_those_of_gpt2(size, millions):
    """124M, 355M, 774M and 1.56B, as published, but for the padding rows of the table and the two heads."""
    with torch.device("meta"):
        model = Transformer(lab.hh_gpt2(size).sizes)
    count = sum(p.numel() for p in model.parameters())
    assert lab.hh_gpt2(size).parameters()[0] == count
    assert count / 1e6 == pytest.approx(millions, abs=0.2)


def test_states_are_what_a_step_of_the_optimizer_leaves():
    w = lab.CHECKS["6 x 256"]
    model = Transformer(w.sizes)
    optimizer = make_optimizer(model, 1e-3)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    kept = sum(x.numel() * 4 for state in optimizer.state.values() for x in state.values() if x.dim())
    assert lab.memory(w, 1, False)["adam"] == kept


def test_what_is_split_shrinks_and_what_is_not_stays():
    w = lab.hh_gpt2("xl")
    whole, plain, split = lab.memory(w, 1, False), lab.memory(w, 8, False), lab.memory(w, 8, True)
    assert plain["weights"] == whole["weights"] == 8 * split["weights"]
    assert plain["frozen"] == split["frozen"] == whole["frozen"]
    assert plain["cache"] == whole["cache"] / 8 and split["peak"] < plain["peak"] < whole["peak"]
    assert lab.moved(w, 1, False) == lab.moved(w, 1, True) == 0 < lab.moved(w, 8, False) < lab.moved(w, 8, True)
    assert lab.flops(w, 8)["update"] == pytest.approx(lab.flops(w, 1)["update"] / 8)


def test_activations_are_what_autograd_keeps():
    """Counted by the hooks through which autograd stores tensors: 17 D floats a token and layer, and little besides."""
    w = lab.CHECKS["6 x 256"]
    model, kept = Transformer(w.sizes), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ids = torch.randint(w.vocab, (4, w.prompt + w.response))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(ids, torch.ones_like(ids, dtype=torch.bool))
    found = sum(size for place, size in kept.items() if place not in weights)
    assert lab.memory(w._replace(micro=4), 1, False)["activations"] == pytest.approx(found, rel=0.1)


def test_the_table_says_that_it_is_computed_and_from_what(capsys):
    lab.main(lab.MemoryConfig(tflops=200.0))
    said = capsys.readouterr().out
    assert "Computed, not measured" in said and "200 TFLOP/s" in said
    assert sum(line.startswith(("| small", "| medium", "| large", "| xl")) for line in said.splitlines()) == 28


@pytest.mark.slow
def test_what_is_computed_is_what_is_measured(capsys):
    lab.main(lab.MemoryConfig(check=True))
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|") and "%" in line]
    assert len(rows) == 6 and all(abs(float(row[5].strip(" %"))) < 30 for row in rows)
