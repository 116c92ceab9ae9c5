"""bf16, torch.compile and running out of memory: what they may change, and what a person is told."""

import copy
import dataclasses

import pytest
import torch
from tiny import policy_config, random_model, reward_config, weights, write_inputs

import train_policy
import train_reward
from minirlhf import flags
from minirlhf.config import PolicyConfig, RewardConfig, UserError, run_script
from minirlhf.data import pad_left, pad_right
from minirlhf.device import mixed_precision
from minirlhf.model import KVCache
from minirlhf.rollout import evaluate_actions

PAD = 40
PROMPTS, RESPONSES = pad_left([[1, 2, 3, 4], [5], [5]], PAD), pad_right([[3, 10], [4, 5, 6, 10], [7, 2]], PAD)


def figures(model, bf16):
    with mixed_precision(torch.device("cpu"), bf16):
        return evaluate_actions(model, *PROMPTS, *RESPONSES, 1.0, entropy=True)


def test_bf16_rounds_products_only_and_keeps_master_weights_and_results_in_float32():
    """Weights kept in bfloat16 lose every Adam step below 1/256 of their size; log-probs kept in it are off by percents."""
    model = random_model().requires_grad_(True)
    exact, rounded = figures(model, False), figures(model, True)
    for wanted, found in zip(exact, rounded):
        assert found.dtype == torch.float32
        assert 0 < (found - wanted).abs().max() < 0.3
    sum(part.sum() for part in rounded).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.blocks.parameters())


def test_the_step_after_a_step_sees_the_new_weights_in_bf16():
    """Autocast keeps the rounded weights for as long as its context lasts: one around a whole epoch trains on stale ones."""
    model = random_model().requires_grad_(True)
    before = figures(model, True)[0].detach()
    with torch.no_grad():
        model.blocks[0].mlp_in.weight += 0.5
    assert (figures(model, True)[0] - before).abs().max() > 0.05


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    train_reward.main(reward_config(folder, folder / "reward"))
    return folder


def test_both_scripts_train_in_bf16_to_nearly_the_same_weights(inputs, tmp_path):
    train_reward.main(reward_config(inputs, tmp_path / "r", bf16=True))
    for name in ("policy", "rounded"):
        train_policy.main(policy_config(inputs / "reward", tmp_path / name, bf16=name == "rounded"))
    for one, other, kind in ((inputs / "reward/reward.pt", tmp_path / "r/reward.pt", "reward"),
                             (tmp_path / "policy/policy.pt", tmp_path / "rounded/policy.pt", "policy")):
        exact, rounded = weights(one, kind), weights(other, kind)
        assert all(x.dtype == torch.float32 for x in rounded.values())
        assert any(not torch.equal(exact[k], rounded[k]) for k in exact)
        assert max((exact[k] - rounded[k]).abs().max() for k in exact if "score" not in k) < 0.1


def test_bf16_where_there_is_none_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(UserError, match="--bf16: this GPU has no bfloat16"):
        mixed_precision(torch.device("cuda"), True)


@pytest.mark.slow  # half a minute of C++
def test_compiled_blocks_give_the_same_figures_and_gradients_as_do_those_of_a_copy():
    """A deep copy that still calls the compiled code of its original trains one model and measures another."""
    plain, compiled = (random_model().requires_grad_(True) for _ in range(2))
    compiled.compile_blocks()
    for model in (plain, compiled):
        sum(part.sum() for part in figures(model, False)).backward()
    for a, b in zip(figures(plain, False), figures(compiled, False)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    for a, b in zip(plain.blocks.parameters(), compiled.blocks.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    ours, theirs = (copy.deepcopy(model) for model in (plain, compiled))
    for model in (ours, theirs):
        model.blocks[0].mlp_in.weight.data += 0.5
    torch.testing.assert_close(figures(ours, False)[0], figures(theirs, False)[0], rtol=0, atol=1e-5)
    cache = KVCache(compiled, PROMPTS[1])
    with torch.no_grad():
        compiled(*PROMPTS, cache)
        compiled.decode(torch.tensor([1, 2, 3]), cache)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:126] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
])
@pytest.mark.parametrize("config_class, settings, advice", [
    (PolicyConfig, {}, "--micro-batch-size 32:"), (PolicyConfig, dict(micro_batch_size=8), "--micro-batch-size 4:"),
    (RewardConfig, {}, "--micro-batch-size 4:"), (RewardConfig, dict(micro_batch_size=1), "--batch-size 4"),
])
def test_out_of_memory_names_the_flag_and_its_new_value(error, config_class, settings, advice, capsys):
    def main(config):
        assert dataclasses.is_dataclass(config)
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_script(main, config_class, [x for k, v in settings.items() for x in (f"--{k.replace('_', '-')}", str(v))])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and "out of memory" in said and advice in said


@pytest.mark.parametrize("config, count, advice", [
    (PolicyConfig(micro_batch_size=16), 8, "--micro-batch-size 4:"), (PolicyConfig(), 3, "--micro-batch-size 11:"),
    (PolicyConfig(micro_batch_size=128), 1, "--micro-batch-size 32:"), (RewardConfig(), 8, "--batch-size 4")])
def test_the_advice_is_below_what_a_process_takes_now(config, count, advice, monkeypatch):
    """Eight processes share a minibatch of 64: --micro-batch-size 8 is what each does already."""
    monkeypatch.setattr(flags, "processes", lambda: count)
    assert advice in flags.memory_advice(config)


def test_any_other_runtime_error_keeps_its_traceback():
    def main(config):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        run_script(main, PolicyConfig, [])
