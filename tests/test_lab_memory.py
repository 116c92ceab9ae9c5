"""The memory table: its parts against the real model, and what more GPUs must change."""

from minirlhf.lab import memory as lab
from minirlhf.lab import memory_fit as fit
from minirlhf.model.transformer import Transformer
from minirlhf.run.optimizer import make_optimizer

import pytest
import torch


@pytest.mark.parametrize(
    "size, millions", [("small", 124.4), ("medium", 354.8), ("large", 774.0), ("xl", 1557.6)]
)
def test_parameter_counts_are_those_of_gpt2(size, millions):
    """124M, 355M, 774M and 1.56B as published, plus padding rows of the table and two heads."""
    with torch.device("meta"):
        model = Transformer(lab.hh_gpt2(size).sizes)
    count = sum(p.numel() for p in model.parameters())
    assert lab.hh_gpt2(size).parameters()[0] == count
    assert count / 1e6 == pytest.approx(millions, abs=0.2)


def test_adam_bytes_are_those_of_the_optimizers_state():
    w = lab.CHECKS["6 x 256"]
    model = Transformer(w.sizes)
    optimizer = make_optimizer(model, 1e-3)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    kept = sum(
        x.numel() * 4 for state in optimizer.state.values() for x in state.values() if x.dim()
    )
    assert lab.memory(w, 1, False)["adam"] == kept


def test_more_gpus_shrink_only_what_is_split():
    w = lab.hh_gpt2("xl")
    single = lab.memory(w, 1, False)
    replicated = lab.memory(w, 8, False)
    sharded = lab.memory(w, 8, True)
    assert replicated["weights"] == single["weights"] == 8 * sharded["weights"]
    assert replicated["frozen"] == sharded["frozen"] == single["frozen"]
    assert replicated["cache"] == single["cache"] / 8
    assert sharded["peak"] < replicated["peak"] < single["peak"]
    assert lab.sent_bytes(w, 1, False) == lab.sent_bytes(w, 1, True) == 0
    assert 0 < lab.sent_bytes(w, 8, False) < lab.sent_bytes(w, 8, True)
    assert lab.flops(w, 8)["update"] == pytest.approx(lab.flops(w, 1)["update"] / 8)


def test_activation_bytes_are_what_autograd_keeps():
    """Counted by autograd's hooks for saved tensors: 17 D floats for each token and layer."""
    w = lab.CHECKS["6 x 256"]
    model = Transformer(w.sizes)
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ids = torch.randint(w.vocab, (4, w.prompt + w.response))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(ids, torch.ones_like(ids, dtype=torch.bool))
    total = sum(size for address, size in kept.items() if address not in weights)
    computed = lab.memory(w._replace(micro=4), 1, False)["activations"]
    assert computed == pytest.approx(total, rel=0.1)


def test_the_table_states_that_it_is_computed_and_from_what(capsys, monkeypatch):
    small = {"SmolLM2-135M": fit.MODELS["SmolLM2-135M"]}
    monkeypatch.setattr(fit, "MODELS", small)  # large models take seconds
    lab.main(lab.MemoryConfig(tflops=200.0))
    output = capsys.readouterr().out
    assert "Computed, not measured" in output
    assert "200 TFLOP/s" in output
    sizes = ("| small", "| medium", "| large", "| xl")
    assert sum(line.startswith(sizes) for line in output.splitlines()) == 28


@pytest.mark.parametrize(
    "name, millions",
    [
        ("SmolLM2-135M", 134.5),
        ("SmolLM2-360M", 361.8),
        ("Qwen2.5-0.5B", 494.0),
        ("Qwen3-0.6B", 596.0),
        ("Llama-3.2-1B", 1235.8),
    ],
)
def test_parameter_counts_are_those_of_the_pretrained_models(name, millions):
    """As published, plus rows of the table for PAD and two heads."""
    assert fit.parameters(fit.MODELS[name])[0] / 1e6 == pytest.approx(millions, abs=0.15)


def test_both_tables_agree_on_gpt2():
    """One counts what autograd keeps, the other has a formula for GPT-2's form."""
    w = lab.hh_gpt2("small")
    assert fit.kept_bytes(w.sizes, False) == pytest.approx(4 * 17 * w.width, rel=0.01)
    peak = lab.memory(w, 1, False)["peak"]
    assert fit.peak(w.sizes, False, w.micro) == pytest.approx(peak, rel=0.1)


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    config = fit.MODELS["SmolLM2-135M"]
    sizes = [fit.largest_micro_batch(config, False, gib * fit.GIB) for gib in (5, 9, 13, 200)]
    assert sizes == sorted(sizes) and sizes[0] == 0 and sizes[-1] == 64
    assert fit.peak(config, False, sizes[2]) <= 13 * fit.GIB < fit.peak(config, False, 2 * sizes[2])
    assert fit.peak(config, True, 8) < fit.peak(config, False, 8)


@pytest.mark.slow
def test_computed_memory_is_within_30_percent_of_measured(capsys):
    lab.main(lab.MemoryConfig(check=True))
    rows = [
        line.split("|")
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("|") and "%" in line
    ]
    assert len(rows) == 6
    assert all(abs(float(row[5].strip(" %"))) < 30 for row in rows)
