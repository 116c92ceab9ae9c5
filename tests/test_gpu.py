"""What only a GPU shows: equal results on CPU and CUDA, bfloat16, reproducible runs.

Everything is skipped without CUDA. `pytest -m gpu` also runs the tests of the Triton kernels.
"""

import copy
import dataclasses

import train_policy
import train_reward
from minirlhf.data.batches import pad_left
from minirlhf.model.cache import KVCache
from minirlhf.model.generate import generate, sample_tokens
from minirlhf.rl.rollout import evaluate_actions

import pytest
import torch
from tiny import assert_same_weights, make_samples, policy_config, random_model, reward_config, rows
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
EOS, PAD, LIMIT = 10, 11, 8  # of tiny.random_model
PROMPTS = pad_left([[1, 2, 3, 4], [5], [5], [6, 7], [8, 1, 2]] * 8, PAD)
UNIFORMS = torch.rand(40, LIMIT, generator=torch.Generator().manual_seed(0))


class CountCasts(TorchDispatchMode):
    """Counts the casts of tensors with at least `smallest` elements."""

    def __init__(self, smallest: int):
        super().__init__()
        self.smallest = smallest
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_cast = function is torch.ops.aten._to_copy.default
        self.count += is_cast and args[0].numel() >= self.smallest
        return function(*args, **(kwargs or {}))


def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same model on the CPU and on the GPU."""
    model = random_model().requires_grad_(True)
    return model, copy.deepcopy(model).cuda()


def decode(model, uniforms=None) -> tuple[torch.Tensor, torch.Tensor]:
    device = model.wte.weight.device
    ids, mask = (x.to(device) for x in PROMPTS)
    uniforms = None if uniforms is None else uniforms.to(device)
    response_ids, response_mask = generate(model, ids, mask, LIMIT, EOS, PAD, uniforms)
    return response_ids.cpu(), response_mask.cpu()


def samples_on(device: str, response_ids, response_mask):
    return make_samples(*(x.to(device) for x in (*PROMPTS, response_ids, response_mask)))


def test_greedy_tokens_are_equal():
    on_cpu, on_gpu = models()
    for ours, theirs in zip(decode(on_gpu), decode(on_cpu)):
        assert torch.equal(ours, theirs)


def test_sampled_tokens_are_equal_for_equal_random_numbers():
    """Rows leave the batch every token on the CPU, every few tokens on the GPU."""
    on_cpu, on_gpu = models()
    ours, our_mask = decode(on_gpu, UNIFORMS)
    theirs, their_mask = decode(on_cpu, UNIFORMS)
    assert ours.shape == theirs.shape and our_mask.any(1).all()
    equal_rows = (ours == theirs).all(1) & (our_mask == their_mask).all(1)
    assert equal_rows.float().mean() > 0.9  # a uniform may be next to a boundary


def test_log_probs_values_and_gradients_are_equal():
    on_cpu, on_gpu = models()
    response = [x.clone() for x in decode(on_cpu, UNIFORMS)]
    results = []
    for model, device in ((on_cpu, "cpu"), (on_gpu, "cuda")):
        parts = evaluate_actions(model, samples_on(device, *response), 0.7, entropy=True)
        sum(part.sum() for part in parts).backward()
        results.append([part.detach().cpu() for part in parts])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for (name, ours), theirs in zip(on_gpu.named_parameters(), on_cpu.parameters()):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_a_token_of_probability_zero_is_never_drawn():
    """A float32 cumsum on CUDA need not be monotone."""
    logits = torch.full((4096, 50257), float("-inf"), device="cuda")
    logits[:, ::7] = torch.randn(4096, 7180, device="cuda")
    tokens = sample_tokens(logits, torch.rand(4096, device="cuda"))
    assert (tokens % 7 == 0).all()


def test_bf16_decoding_casts_no_weight():
    """Weights are cast once for each rollout, not once for each token."""
    model = random_model().cuda()
    model.bf16 = True
    decoder = model.for_decoding()
    ids, mask = (x.cuda() for x in PROMPTS)
    with torch.no_grad():
        cache = KVCache(decoder.config, mask, LIMIT, decoder.wte.weight.dtype)
        decoder(ids, mask, cache)
        with CountCasts(smallest=256) as casts:
            decoder.decode(torch.ones(len(ids), dtype=torch.long, device="cuda"), cache)
    assert cache.kv[0].dtype == torch.bfloat16
    assert casts.count == 0


def test_a_bf16_run_trains_with_finite_float32_weights(inputs, tmp_path):
    reward = reward_config(inputs, tmp_path / "reward", device="cuda", bf16=True)
    train_reward.main(reward)
    train_policy.main(policy_config(tmp_path / "reward", tmp_path / "p", device="cuda", bf16=True))
    metrics = rows(tmp_path / "p" / "policy_metrics.jsonl")[1:]
    assert all(abs(row["loss"]) < 1e3 and row["grad_norm"] < 1e3 for row in metrics)


def test_deterministic_runs_and_their_resume_are_bit_identical(inputs, tmp_path):
    train_reward.main(reward_config(inputs, tmp_path / "reward", device="cuda"))
    settings = dict(device="cuda", deterministic=True, lr_decay=False, iterations=4)
    for name in ("one", "two"):
        train_policy.main(policy_config(tmp_path / "reward", tmp_path / name, **settings))
    half = policy_config(tmp_path / "reward", tmp_path / "half", **settings | dict(iterations=2))
    train_policy.main(half)
    train_policy.main(dataclasses.replace(half, iterations=4, resume=True))
    torch.use_deterministic_algorithms(False)
    for name in ("two", "half"):
        assert_same_weights(tmp_path / "one/policy.pt", tmp_path / name / "policy.pt", "policy")


def test_compiled_blocks_give_the_same_log_probs():
    _, plain = models()
    compiled = copy.deepcopy(plain)
    compiled.compile_blocks()
    samples = samples_on("cuda", *(x.clone() for x in decode(plain, UNIFORMS)))
    with torch.no_grad():
        ours, _, _ = evaluate_actions(compiled, samples, 1.0)
        theirs, _, _ = evaluate_actions(plain, samples, 1.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
