"""The benchmark measures the work that it names: plain PyTorch computes the same, and every row has its figures."""

import json
import math

import pytest
import torch
from tiny import random_model

from minirlhf.advantages import gae
from minirlhf.data import pad_left
from minirlhf.kernels import token_logprobs
from minirlhf.lab import bench, bench_naive


def test_plain_pytorch_computes_what_ours_does():
    """A comparison with something that does less, or something else, flatters whoever wrote it."""
    model = random_model()
    ids, mask = pad_left([[1, 2, 3, 4], [5, 6]], 40)
    torch.testing.assert_close(bench_naive.padded_trunk(model, ids, mask)[mask], model(ids, mask)[mask], rtol=0, atol=1e-5)
    hidden, targets = torch.randn(5, 16), torch.tensor([1, 0, 10, 3, 3])
    torch.testing.assert_close(bench_naive.whole_logprobs(hidden, model.lm_weight, targets),
                               token_logprobs(hidden, model.lm_weight, targets), rtol=0, atol=1e-4)
    rewards, values = torch.randn(2, 3, 9)
    torch.testing.assert_close(bench_naive.gae_by_loop(rewards, values, 0.9, 0.8),
                               gae(rewards, values, torch.ones(3, 9, dtype=torch.bool), 0.9, 0.8), rtol=0, atol=1e-5)
    if bench_naive.available("torchrl"):
        torch.testing.assert_close(bench_naive.peer_gae(rewards, values)()[0].squeeze(-1),
                                   gae(rewards, values, torch.ones(3, 9, dtype=torch.bool), 1.0, 0.95), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_quick_form_measures_every_part(capsys):
    rows = bench.main(["--quick", "--device", "cpu", "--json"])
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["part"] for row in said] == [row["part"] for row in rows]
    for part in ("token_logprobs forward", "gae", "rollout", "reward step", "ppo iteration", "rloo iteration", "grpo iteration",
                 "rollout, batch 4", "rollout, response 64", "token_logprobs and gradients, vocabulary 8192"):
        row = next(row for row in said if row["part"] == part)
        assert row["seconds"] > 0 and row["bound"] > 0 and math.isclose(row["reached"], row["bound"] / row["seconds"])
    assert "times_plain" in next(row for row in said if row["part"] == "ppo iteration")


def test_the_table_has_a_column_for_each_figure_and_says_what_was_not_measured(capsys):
    bench.main(["--quick", "--device", "cpu", "--no-growth"])
    said = capsys.readouterr().out
    assert "not yet measured on a GPU" in said
    assert len({line.count("|") for line in said.splitlines() if line.startswith("|")}) == 1


@pytest.mark.parametrize("ours, plain, ratio", [(1.0, 3.0, 3.0), (2.0, 1.0, 0.5)])
def test_a_ratio_above_one_means_that_the_other_is_slower(monkeypatch, ours, plain, ratio):
    monkeypatch.setattr(bench, "seconds", lambda run, device: run())
    case = bench.Case("x", 10, 2.0, 0.0, lambda: ours, lambda: plain)
    row = bench.measure(case, torch.device("cpu"), 3, (4.0, 1.0))
    assert row["times_plain"] == ratio and row["bound"] == 0.5 and row["reached"] == 0.5 / ours
