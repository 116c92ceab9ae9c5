"""The benchmark: all ways do the same work, and the rows of the table are right."""

import dataclasses
import json
import math
from types import SimpleNamespace

from minirlhf.data.batches import pad_left
from minirlhf.kernels import discounted_returns, token_logprobs
from minirlhf.lab import bench, bench_cases, bench_machine, bench_naive, bench_peers
from minirlhf.lab.bench import BenchConfig, Limits
from minirlhf.model.generate import generate
from minirlhf.model.transformer import Transformer
from minirlhf.rl.advantages import gae
from minirlhf.run.errors import UserError

import pytest
import torch
from tiny import random_model
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")
CUDA = SimpleNamespace(type="cuda")
TINY = bench_cases.SHAPES["tiny"]


def peers_with(name):
    """bench_peers; skips the test if the library is not installed."""
    pytest.importorskip(name)
    return bench_peers


# ---- the same work -------------------------------------------------------------------------------


def test_plain_pytorch_computes_the_same_as_our_code():
    """Otherwise the comparison would be unfair: the plain way could do less work."""
    model = random_model()
    ids, mask = pad_left([[1, 2, 3, 4], [5, 6]], 40)
    torch.testing.assert_close(
        bench_naive.padded_forward(model, ids, mask)[mask],
        model(ids, mask)[mask],
        rtol=0,
        atol=1e-5,
    )
    hidden = torch.randn(5, 16)
    targets = torch.tensor([1, 0, 10, 3, 3])
    torch.testing.assert_close(
        bench_naive.full_logprobs(hidden, model.lm_weight, targets),
        token_logprobs(hidden, model.lm_weight, targets),
        rtol=0,
        atol=1e-4,
    )
    rewards, values = torch.randn(2, 3, 9)
    full_mask = torch.ones(3, 9, dtype=torch.bool)
    torch.testing.assert_close(
        bench_naive.gae_loop(rewards, values, 0.9, 0.8),
        gae(rewards, values, full_mask, 0.9, 0.8),
        rtol=0,
        atol=1e-5,
    )
    torch.testing.assert_close(
        bench_naive.gae_loop(rewards, torch.zeros(3, 9), 0.9, 1.0),
        discounted_returns(rewards, full_mask, 0.9),
        rtol=0,
        atol=1e-5,
    )


def test_rows_end_at_the_chosen_lengths():
    model = Transformer(TINY.config, 0)
    lengths = torch.tensor([1, 6, 3, 2])
    ids, mask = bench_cases.random_prompts(TINY, CPU)
    uniforms = bench_cases.uniforms_for(lengths, TINY.response)
    _, response_mask = generate(
        model, ids, mask, TINY.response, bench_cases.EOS, bench_cases.PAD, uniforms
    )
    assert response_mask.sum(1).tolist() == lengths.tolist()


def test_ragged_prompts_are_padded_on_the_left():
    torch.manual_seed(0)
    ids, mask = bench_cases.random_prompts(TINY._replace(batch=64), CPU, ragged=True)
    assert mask[:, -1].all()
    assert mask.sum(1).unique().tolist() == [1, 2, 3, 4]
    assert (mask.int().diff(dim=1) >= 0).all()
    assert (ids[~mask] == bench_cases.PAD).all()


def test_other_libraries_compute_the_same_as_our_code():
    peers = peers_with("torchrl")
    rewards, values = torch.randn(2, 3, 9)
    torch.testing.assert_close(
        peers.gae(rewards, values)["torchrl"]()[0].squeeze(-1),
        gae(rewards, values, torch.ones(3, 9, dtype=torch.bool), 1.0, 0.95),
        rtol=0,
        atol=1e-4,
    )
    peers_with("transformers")
    ids, mask = pad_left([[1, 2, 3, 4], [5, 6, 7, 8]], 40)
    for model in (llama_model(), random_model()):
        torch.testing.assert_close(
            peers.peer_model(model)(ids).logits,
            model(ids, mask) @ model.lm_weight.T,
            rtol=0,
            atol=1e-4,
        )
        peers.peer_model(model, is_classifier=True)
    lengths = torch.tensor([2, 4])
    sampled = peers.rollout(model, ids, mask, 5, lengths)["transformers"]()[:, 4:]
    assert (sampled == 0).int().argmax(1).tolist() == [1, 3]
    peers_with("trl")
    hidden = torch.randn(5, 16)
    targets = torch.tensor([1, 0, 10, 3, 3])
    torch.testing.assert_close(
        peers.logprobs()["TRL"](hidden, model.lm_weight, targets),
        token_logprobs(hidden, model.lm_weight, targets),
        rtol=0,
        atol=1e-4,
    )


def llama_model() -> Transformer:
    config = bench_cases.SHAPES["SmolLM2"].config
    small = dict(vocab_size=60, table_rows=64, n_layer=2, n_head=6, d_model=24, n_kv_head=2)
    return Transformer(dataclasses.replace(config, **small, d_mlp=40, context=24))


@pytest.mark.parametrize("part", ["reward-model step", "policy update", "rloo iteration"])
def test_parts_of_llamas_form_are_measured_without_the_plain_way(part, monkeypatch):
    """Plain PyTorch is written for learned positions."""
    shape = TINY._replace(config=llama_model().config)
    monkeypatch.setitem(bench_cases.SHAPES, "tiny", shape)
    (row,) = bench.main(bench.BenchConfig(device="cpu", quick=True, only=part, json=True))
    assert row["seconds"] > 0 and row["ratios"] == {}


def test_a_missing_library_gives_one_hint(capsys):
    for _ in range(2):
        assert bench_peers.find("no_such_library", "thing") is None
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert "pip install no_such_library" in output


# ---- measurements --------------------------------------------------------------------------------


@pytest.mark.slow
def test_quick_mode_measures_every_part(capsys):
    rows = bench.main(BenchConfig(quick=True, device="cpu", json=True))
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["part"] for row in printed] == [row["part"] for row in rows]
    for part in (
        "token_logprobs forward",
        "gae 64 x 64",
        "rollout, fixed",
        "rollout, ragged",
        "rollout, geometric",
        "reward-model step, ragged pairs",
        "policy update, 4 x 10 tokens",
        "ppo iteration",
        "rloo iteration",
        "grpo iteration",
        "rollout, fixed, batch 4",
        "rollout, fixed, response 64",
        "token_logprobs forward and backward, vocabulary 8192",
    ):
        row = next(row for row in printed if row["part"] == part)
        assert row["seconds"] > 0
        assert row["bound"] > 0
        assert math.isclose(row["reached"], row["bound"] / row["seconds"])
    assert "plain" in next(row for row in printed if row["part"] == "ppo iteration")["ratios"]


@pytest.mark.slow
def test_the_table_has_equal_columns_and_states_what_was_not_measured(capsys):
    rows = bench.main(BenchConfig(quick=True, device="cpu", only="64 x 64"))
    output = capsys.readouterr()
    assert [row["part"] for row in rows] == ["discounted_returns 64 x 64", "gae 64 x 64"]
    assert "not yet measured on a GPU" in output.out
    assert "left" in output.err
    assert len({line.count("|") for line in output.out.splitlines() if line.startswith("|")}) == 1


@pytest.mark.parametrize("ours, plain, ratio", [(1.0, 3.0, 3.0), (2.0, 1.0, 0.5)])
def test_a_ratio_above_one_means_that_the_other_way_is_slower(monkeypatch, ours, plain, ratio):
    monkeypatch.setattr(bench, "seconds", lambda run, device, repeat=1: run())
    case = bench_cases.Case("x", 10, 2.0, 0.0, lambda: ours, lambda: plain)
    row = bench.measure(case, CPU, 3, Limits(4.0, 1.0))
    assert row["ratios"] == {"plain": ratio}
    assert row["bound"] == 0.5
    assert row["reached"] == 0.5 / ours
    assert len(row["rounds"]["ours"]) == 3


def test_our_turn_comes_between_the_steps_of_a_trainer(monkeypatch):
    order = []
    monkeypatch.setattr(bench, "seconds", lambda run, device, repeat=1: run() or 1.0)

    def train(rounds, between):
        for _ in range(rounds):
            order.append("trainer")
            between(4.0)

    case = bench_cases.Case("x", 10, 2.0, 0.0, lambda: order.append("ours"), trainer=("TRL", train))
    times, _ = bench.take_turns(case, CPU, 3, Limits(4.0, 1.0))
    assert times == {"ours": [1.0] * 3, "TRL": [4.0] * 3}
    assert order == ["trainer", "ours"] * 4


def test_what_takes_too_long_or_does_not_fit_is_reported_and_not_run(monkeypatch):
    case = bench_cases.Case("x", 10, 100.0, 0.0, lambda: None, lambda: 1 / 0)
    row = bench.measure(case, CPU, 1, Limits(1.0, 1.0))
    assert "plain PyTorch skipped" in row["skipped"]
    assert row["skipped"] in bench.table([row])
    monkeypatch.setattr(bench, "free_bytes", lambda device: 0.0)
    rows = bench.growth(TINY, CPU, Limits(1.0, 1.0), True)
    assert len(rows) == 6
    assert all("more than is free" in row["skipped"] for row in rows)
    assert "more than is free" in bench.table(rows)


def test_peak_memory_counts_what_a_run_holds_at_once():
    """Memory that an earlier run freed must count again."""
    if math.isnan(bench_machine.peak_bytes(lambda: None, CPU)):
        pytest.skip("this system does not report the peak of resident memory")
    for _ in range(2):
        peak = bench_machine.peak_bytes(lambda: [torch.ones(2**22) for _ in range(4)], CPU)
        assert 60 < peak / 2**20 < 80


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(only="nonsense"), "--only 'nonsense': no part has such a name"),
        (dict(rounds=0), "--rounds"),
        (dict(shape="L"), "--shape 'L' is not known"),
    ],
)
def test_a_bad_flag_is_one_line(settings, message):
    with pytest.raises(UserError) as caught:
        bench.main(BenchConfig(**{"quick": True, "device": "cpu", **settings}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- code for a GPU, without a GPU ---------------------------------------------------------------


def test_on_a_gpu_times_wait_for_the_device_and_memory_is_the_allocators(monkeypatch):
    calls = []
    fake = dict(
        synchronize=lambda: calls.append("wait"),
        reset_peak_memory_stats=lambda: calls.append("reset"),
        memory_allocated=lambda: 100,
        max_memory_allocated=lambda: 350,
        mem_get_info=lambda: (7, 9),
    )
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert bench_machine.seconds(lambda: calls.append("run"), CUDA) > 0
    assert calls == ["wait", "run", "wait"]
    calls.clear()
    assert bench_machine.peak_bytes(lambda: calls.append("run"), CUDA) == 250
    assert calls == ["reset", "run"]
    assert bench_machine.free_bytes(CUDA) == 7
    assert bench_cases.number_bytes(CUDA) == 2


@pytest.mark.slow
def test_every_part_runs_in_bfloat16(monkeypatch):
    """On the CPU, instead of a GPU."""
    monkeypatch.setattr(bench_naive, "uses_bf16", lambda device: True)
    rows = bench.main(BenchConfig(quick=True, device="cpu", growth=False))
    assert all(math.isfinite(row["seconds"]) for row in rows)
    assert len(rows) == 14


@pytest.mark.parametrize("model", [Transformer(TINY.config), llama_model()], ids=["gpt2", "llama"])
def test_counted_operations_are_those_of_the_forward_pass(model):
    """Compared with torch's own counter. No tokens are equal, so no prefix is shared.

    If only 12 of 40 states are needed, the least work has no output projection and no MLP for the
    other 28 tokens in the last layer.
    """
    ids = torch.randperm(40).view(4, 10)
    with FlopCounterMode(display=False) as counter:
        model(ids, torch.ones_like(ids, dtype=torch.bool))
    counts = counter.get_flop_counts()["Global"]
    linear = counts.get(torch.ops.aten.addmm, 0) + counts.get(torch.ops.aten.mm, 0)
    assert linear == bench_cases.forward_flops(model.config, 40, 0, 40)
    last = model.blocks[-1]
    layers = (last.attention_out, last.mlp_in, last.mlp_out)
    avoidable = 28 * sum(2 * layer.weight.numel() for layer in layers)
    assert bench_cases.forward_flops(model.config, 40, 0, 12) == linear - avoidable
