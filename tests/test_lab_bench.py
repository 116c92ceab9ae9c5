"""The benchmark measures the work that it names: plain PyTorch and other libraries compute the same, and rows hold."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import random_model
from torch.utils.flop_counter import FlopCounterMode

from minirlhf.advantages import gae
from minirlhf.data import pad_left
from minirlhf.flags import UserError, keep_freed_memory
from minirlhf.generate import generate
from minirlhf.kernels import discounted_returns, token_logprobs
from minirlhf.lab import bench, bench_cases, bench_machine, bench_naive, bench_peers
from minirlhf.lab.bench import BenchConfig
from minirlhf.model import Transformer

CPU, CUDA = torch.device("cpu"), SimpleNamespace(type="cuda")
TINY = bench_cases.SHAPES["tiny"]


def installed(name):
    pytest.importorskip(name)
    return bench_peers


# ---- the same work ---------------------------------------------------------------------------------------------------


def test_plain_pytorch_computes_what_ours_does():
    """A comparison with something that does less, or something else, flatters whoever wrote it."""
    model = random_model()
    ids, mask = pad_left([[1, 2, 3, 4], [5, 6]], 40)
    torch.testing.assert_close(bench_naive.padded_trunk(model, ids, mask)[mask], model(ids, mask)[mask], rtol=0, atol=1e-5)
    hidden, targets = torch.randn(5, 16), torch.tensor([1, 0, 10, 3, 3])
    torch.testing.assert_close(bench_naive.whole_logprobs(hidden, model.lm_weight, targets),
                               token_logprobs(hidden, model.lm_weight, targets), rtol=0, atol=1e-4)
    rewards, values = torch.randn(2, 3, 9)
    whole = torch.ones(3, 9, dtype=torch.bool)
    torch.testing.assert_close(bench_naive.gae_by_loop(rewards, values, 0.9, 0.8), gae(rewards, values, whole, 0.9, 0.8),
                               rtol=0, atol=1e-5)
    torch.testing.assert_close(bench_naive.gae_by_loop(rewards, torch.zeros(3, 9), 0.9, 1.0),
                               discounted_returns(rewards, whole, 0.9), rtol=0, atol=1e-5)


def test_rows_end_where_the_geometric_case_says():
    model, lengths = Transformer(TINY.config, 0), torch.tensor([1, 6, 3, 2])
    ids, mask = bench_cases.prompts(TINY, CPU)
    uniforms = bench_cases.ending_after(lengths, TINY.response)
    _, response_mask = generate(model, ids, mask, TINY.response, bench_cases.EOS, bench_cases.PAD, uniforms)
    assert response_mask.sum(1).tolist() == lengths.tolist()


def test_ragged_prompts_are_padded_on_the_left():
    torch.manual_seed(0)
    ids, mask = bench_cases.prompts(TINY._replace(batch=64), CPU, ragged=True)
    assert mask[:, -1].all() and mask.sum(1).unique().tolist() == [1, 2, 3, 4]
    assert (mask.int().diff(dim=1) >= 0).all() and (ids[~mask] == bench_cases.PAD).all()


def test_other_libraries_compute_what_ours_does():
    peers = installed("torchrl")
    rewards, values = torch.randn(2, 3, 9)
    torch.testing.assert_close(peers.gae(rewards, values)["torchrl"]()[0].squeeze(-1),
                               gae(rewards, values, torch.ones(3, 9, dtype=torch.bool), 1.0, 0.95), rtol=0, atol=1e-4)
    installed("transformers")
    model, (ids, mask) = random_model(), pad_left([[1, 2, 3, 4], [5, 6, 7, 8]], 40)
    torch.testing.assert_close(peers.gpt2(model)(ids).logits, model(ids, mask) @ model.lm_weight.T, rtol=0, atol=1e-4)
    lengths = torch.tensor([2, 4])
    sampled = peers.rollout(model, ids, mask, 5, lengths)["transformers"]()[:, 4:]
    assert (sampled == 0).int().argmax(1).tolist() == [1, 3]
    installed("trl")
    hidden, targets = torch.randn(5, 16), torch.tensor([1, 0, 10, 3, 3])
    torch.testing.assert_close(peers.logprobs()["TRL"](hidden, model.lm_weight, targets),
                               token_logprobs(hidden, model.lm_weight, targets), rtol=0, atol=1e-4)


def test_a_library_that_is_missing_is_one_hint(capsys):
    for _ in range(2):
        assert bench_peers.find("no_such_library", "thing") is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install no_such_library" in said


# ---- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_quick_form_measures_every_part(capsys):
    rows = bench.main(BenchConfig(quick=True, device="cpu", json=True))
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["part"] for row in said] == [row["part"] for row in rows]
    for part in ("token_logprobs forward", "gae 64 x 64", "rollout, fixed", "rollout, ragged", "rollout, geometric",
                 "reward-model step, ragged pairs", "policy update, 4 x 10 tokens", "ppo iteration", "rloo iteration",
                 "grpo iteration", "rollout, fixed, batch 4", "rollout, fixed, response 64",
                 "token_logprobs forward and backward, vocabulary 8192"):
        row = next(row for row in said if row["part"] == part)
        assert row["seconds"] > 0 and row["bound"] > 0 and math.isclose(row["reached"], row["bound"] / row["seconds"])
    assert "plain" in next(row for row in said if row["part"] == "ppo iteration")["ratios"]


def test_the_table_has_a_column_for_each_figure_and_says_what_was_not_measured(capsys):
    rows = bench.main(BenchConfig(quick=True, device="cpu", only="64 x 64"))
    captured = capsys.readouterr()
    assert [row["part"] for row in rows] == ["discounted_returns 64 x 64", "gae 64 x 64"]
    assert "not yet measured on a GPU" in captured.out and "left" in captured.err
    assert len({line.count("|") for line in captured.out.splitlines() if line.startswith("|")}) == 1


@pytest.mark.parametrize("ours, plain, ratio", [(1.0, 3.0, 3.0), (2.0, 1.0, 0.5)])
def test_a_ratio_above_one_means_that_the_other_is_slower(monkeypatch, ours, plain, ratio):
    monkeypatch.setattr(bench, "seconds", lambda run, device, repeat=1: run())
    case = bench_cases.Case("x", 10, 2.0, 0.0, lambda: ours, lambda: plain)
    row = bench.measure(case, CPU, 3, (4.0, 1.0))
    assert row["ratios"] == {"plain": ratio} and row["bound"] == 0.5 and row["reached"] == 0.5 / ours
    assert len(row["rounds"]["ours"]) == 3


def test_we_take_our_turn_between_the_steps_of_a_trainer(monkeypatch):
    order = []
    monkeypatch.setattr(bench, "seconds", lambda run, device, repeat=1: run() or 1.0)

    def train(rounds, between):
        for _ in range(rounds):
            order.append("theirs")
            between(4.0)

    case = bench_cases.Case("x", 10, 2.0, 0.0, lambda: order.append("ours"), trainer=("TRL", train))
    times, _ = bench.take_turns(case, CPU, 3, (4.0, 1.0))
    assert times == {"ours": [1.0] * 3, "TRL": [4.0] * 3} and order == ["theirs", "ours"] * 4


def test_what_would_take_too_long_or_not_fit_is_named_and_not_run(monkeypatch):
    case = bench_cases.Case("x", 10, 100.0, 0.0, lambda: None, lambda: 1 / 0)
    row = bench.measure(case, CPU, 1, (1.0, 1.0))
    assert "plain PyTorch left out" in row["skipped"] and row["skipped"] in bench.table([row])
    monkeypatch.setattr(bench, "free_bytes", lambda device: 0.0)
    rows = bench.growth(TINY, CPU, (1.0, 1.0), True)
    assert len(rows) == 6 and all("not free" in row["skipped"] for row in rows) and "not free" in bench.table(rows)


def test_peak_memory_counts_what_a_run_holds_at_once():
    if math.isnan(bench_machine.peak_bytes(lambda: None, CPU)):
        pytest.skip("no high-water mark on this system")
    keep_freed_memory()
    for _ in range(2):  # what the first run freed must count again in the second
        assert 60 < bench_machine.peak_bytes(lambda: [torch.ones(2**22) for _ in range(4)], CPU) / 2**20 < 80


@pytest.mark.parametrize("settings, said", [(dict(only="nonsense"), "--only 'nonsense': no part has such a name"),
                                            (dict(rounds=0), "--rounds"), (dict(shape="L"), "--shape 'L' is not known")])
def test_a_bad_flag_is_one_line(settings, said):
    with pytest.raises(UserError) as caught:
        bench.main(BenchConfig(**{"quick": True, "device": "cpu", **settings}))
    assert said in str(caught.value) and "\n" not in str(caught.value)


# ---- what only a GPU does, with a GPU that is not there --------------------------------------------------------------


def test_on_a_gpu_times_wait_for_the_device_and_memory_is_the_allocators(monkeypatch):
    said = []
    fake = dict(synchronize=lambda: said.append("wait"), reset_peak_memory_stats=lambda: said.append("reset"),
                memory_allocated=lambda: 100, max_memory_allocated=lambda: 350, mem_get_info=lambda: (7, 9))
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert bench_machine.seconds(lambda: said.append("run"), CUDA) > 0 and said == ["wait", "run", "wait"]
    assert bench_machine.peak_bytes(lambda: said.append("run"), CUDA) == 250 and said[3:] == ["reset", "run"]
    assert bench_machine.free_bytes(CUDA) == 7 and bench_cases.number_bytes(CUDA) == 2


def test_the_targets_of_a_gpu_are_measured_and_judged():
    """The same code with shapes that a processor can do."""
    rows = bench.targets(CPU, (1e9, 1e9), bench_cases.shape(1, 2, 16, 300, 1, 4, 4), 8)
    assert [row["part"].split(",")[0] for row in rows] == ["token_logprobs forward and backward"] * 2 + [
        "gae 256 x 32", "rollout", "policy update"]
    assert "seconds 0.01: met" in rows[0]["target"] and "tokens_per_second 170000: missed" in rows[3]["target"]
    assert rows[0]["target"] in bench.table(rows)


@pytest.mark.slow
def test_every_part_runs_in_bfloat16(monkeypatch):
    """Autocast on the processor stands for that of a GPU."""
    for module in (bench_naive, bench_cases, bench_peers):
        monkeypatch.setattr(module, "half", lambda device: torch.autocast("cpu", torch.bfloat16))
    rows = bench.main(BenchConfig(quick=True, device="cpu", growth=False))
    assert all(math.isfinite(row["seconds"]) for row in rows) and len(rows) == 14


def test_the_arithmetic_counted_is_that_of_the_products_that_are_made():
    """Torch's own counter, on a pass of which only some tokens' states are read; all tokens differ, so none is shared."""
    model, ids = Transformer(TINY.config), torch.randperm(40).view(4, 10)
    mask, wanted = torch.ones_like(ids, dtype=torch.bool), torch.arange(10).expand(4, 10) >= 7
    with FlopCounterMode(display=False) as counter:
        model(ids, mask, wanted=wanted)
    linear = counter.get_flop_counts()["Global"][torch.ops.aten.addmm]
    assert linear == bench_cases.trunk_flops(TINY.config, 40, 0, 12) < bench_cases.trunk_flops(TINY.config, 40, 0, 40)
