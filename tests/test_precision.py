"""bf16, torch.compile and running out of memory."""

import copy

import train_policy
import train_reward
from minirlhf.config import PolicyConfig
from minirlhf.data.batches import pad_left, pad_right
from minirlhf.model import Transformer
from minirlhf.model.cache import KVCache
from minirlhf.model.fast_decode import fast_linear_layers
from minirlhf.model.loading import load_model, save_model
from minirlhf.model.transformer import sequence_scores
from minirlhf.rl.rollout import evaluate_actions
from minirlhf.run.checkpoint import restore
from minirlhf.run.command_line import run_script
from minirlhf.run.device import pick_device
from minirlhf.run.errors import UserError

import pytest
import torch
from tiny import (
    assert_same_weights,
    make_samples,
    policy_config,
    random_model,
    reward_config,
    weights,
    write_inputs,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PAD = 40
PROMPT_IDS, PROMPT_MASK = pad_left([[1, 2, 3, 4], [5], [5]], PAD)
RESPONSE_IDS, RESPONSE_MASK = pad_right([[3, 10], [4, 5, 6, 10], [7, 2]], PAD)
SAMPLES = make_samples(PROMPT_IDS, PROMPT_MASK, RESPONSE_IDS, RESPONSE_MASK)


def evaluate(model: Transformer, bf16: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, values and entropies of SAMPLES."""
    model.bf16 = bf16
    with model.autocast():
        return evaluate_actions(model, SAMPLES, 1.0, entropy=True)


# ---- bf16 ----------------------------------------------------------------------------------------


def test_bf16_rounds_matrix_products_only(form):
    """Weights, gradients and results stay float32.

    A bfloat16 weight would lose Adam steps below 1/256 of its size.
    """
    model = random_model().requires_grad_(True)
    exact = evaluate(model, False)
    rounded = evaluate(model, True)
    for expected, actual in zip(exact, rounded):
        assert actual.dtype == torch.float32
        assert 0 < (actual - expected).abs().max() < 0.3
    sum(part.sum() for part in rounded).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.blocks.parameters())


def test_a_bf16_forward_pass_uses_the_weights_after_the_last_step():
    """One autocast context over several steps would keep the old rounded weights."""
    model = random_model().requires_grad_(True)
    old, _, _ = evaluate(model, True)
    with torch.no_grad():
        model.blocks[0].mlp_in.weight += 0.5
    new, _, _ = evaluate(model, True)
    assert (new - old).detach().abs().max() > 0.05


def test_frozen_matrices_in_bfloat16_change_no_result(form):
    """They are stored as autocast would round them; norms, tables and heads stay float32."""
    model = random_model()
    expected = evaluate(model, True)
    with model.autocast():
        expected_scores = sequence_scores(model, PROMPT_IDS, PROMPT_MASK)
    model.freeze_matrices()
    assert {p.dtype for p in model.blocks.parameters()} == {torch.bfloat16, torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "blocks" not in n} == {torch.float32}
    assert all(map(torch.equal, evaluate(model, True), expected))
    with model.autocast():
        assert torch.equal(sequence_scores(model, PROMPT_IDS, PROMPT_MASK), expected_scores)
    kept = random_model()
    kept.freeze_matrices()  # without bf16
    assert {p.dtype for p in kept.parameters()} == {torch.float32}


class CountCasts(TorchDispatchMode):
    """Counts the casts of tensors with at least 256 elements: weights, not activations."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_cast = function is torch.ops.aten._to_copy.default
        self.count += is_cast and args[0].numel() >= 256
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("bf16", [False, True])
def test_a_decoding_step_casts_no_weight(bf16, form):
    """Autocast would cast all weights and the whole cache again for each token."""
    model = random_model()
    model.bf16 = bf16
    decoder = model.for_decoding()
    assert (decoder is model) == (not bf16)
    with torch.no_grad(), fast_linear_layers(decoder, 3) as lm_head:
        cache = KVCache(decoder.config, PROMPT_MASK, 1, decoder.wte.weight.dtype)
        decoder(PROMPT_IDS, PROMPT_MASK, cache)
        with CountCasts() as casts:
            lm_head(decoder.decode(torch.tensor([1, 2, 3]), cache))
    assert casts.count == 0
    assert cache.kv[0].dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert model.wte.weight.dtype == torch.float32


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    train_reward.main(reward_config(folder, folder / "reward"))
    return folder


def test_both_scripts_train_in_bf16_to_nearly_the_same_weights(inputs, tmp_path, monkeypatch):
    """Saved weights are float32, differ from those without bf16, and differ little.

    They do not depend on how the frozen models are stored.
    """
    reward_run = inputs / "reward"
    train_reward.main(reward_config(inputs, tmp_path / "reward", bf16=True))
    train_policy.main(policy_config(reward_run, tmp_path / "exact"))
    train_policy.main(policy_config(reward_run, tmp_path / "rounded", bf16=True))
    for exact_path, rounded_path, kind in (
        (reward_run / "reward.pt", tmp_path / "reward/reward.pt", "reward"),
        (tmp_path / "exact/policy.pt", tmp_path / "rounded/policy.pt", "policy"),
    ):
        exact = weights(exact_path, kind)
        rounded = weights(rounded_path, kind)
        assert all(x.dtype == torch.float32 for x in rounded.values())
        assert any(not torch.equal(exact[name], rounded[name]) for name in exact)
        names = [name for name in exact if "score" not in name]
        assert max((exact[name] - rounded[name]).abs().max() for name in names) < 0.1
    monkeypatch.setattr(Transformer, "freeze_matrices", lambda model: None)
    train_policy.main(policy_config(reward_run, tmp_path / "float32", bf16=True))
    assert_same_weights(tmp_path / "float32/policy.pt", tmp_path / "rounded/policy.pt", "policy")


def test_bf16_without_support_is_one_error_line(monkeypatch):
    """The error names the flag and what to do."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(UserError, match="--bf16: this GPU has no bfloat16.*leave the flag out"):
        pick_device("cuda", bf16=True)
    assert pick_device("cuda").type == "cuda"


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.slow  # half a minute of C++
def test_compiled_blocks_and_their_copies_give_the_same_results_and_gradients(form):
    """Catches a deep copy that still calls the compiled code of its original."""
    plain = random_model().requires_grad_(True)
    compiled = random_model().requires_grad_(True)
    compiled.compile_blocks()
    for model in (plain, compiled):
        sum(part.sum() for part in evaluate(model, False)).backward()
    for actual, expected in zip(evaluate(compiled, False), evaluate(plain, False)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    for actual, expected in zip(compiled.blocks.parameters(), plain.blocks.parameters()):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-4)
    plain_copy = copy.deepcopy(plain)
    compiled_copy = copy.deepcopy(compiled)
    for model in (plain_copy, compiled_copy):
        model.blocks[0].mlp_in.weight.data += 0.5
    actual = evaluate(compiled_copy, False)[0]
    expected = evaluate(plain_copy, False)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        caches = []
        for model in (plain, compiled):
            cache = KVCache(model.config, PROMPT_MASK, 1, torch.float32)
            model(PROMPT_IDS, PROMPT_MASK, cache)
            caches.append(model.decode(torch.tensor([1, 2, 3]), cache))
    torch.testing.assert_close(*caches, rtol=0, atol=1e-5)


# ---- out of memory -------------------------------------------------------------------------------

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:126] err == 0. "
        "DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    RuntimeError("CUDA error: out of memory"),  # another program has filled the GPU
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.distributed.DistBackendError("NCCL error: Cuda failure 2 'out of memory'"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_is_one_line_that_names_the_flag(error, capsys):
    """The exit status is 2."""

    def main(config):
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_script(main, PolicyConfig, [])
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.count("\n") == 1
    assert "out of memory" in message and "--micro-batch-size 1" in message


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_file_is_not_blamed_if_memory_runs_out(error, tmp_path, monkeypatch):
    """To delete it, or to train again, would be wrong advice."""

    def fail(*arguments, **keywords):
        raise error

    model = random_model()
    optimizer = torch.optim.AdamW(model.parameters())
    states = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
    path = tmp_path / "base.pt"
    save_model(path, "base", model, dict(tokenizer="t"))
    monkeypatch.setattr(Transformer, "load_state_dict", fail)
    with pytest.raises(type(error)):
        restore((dict(step=1), states), model, optimizer)
    with pytest.raises(type(error)):
        load_model(path, "base", "t")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)):
        load_model(path, "base", "t")


def test_any_other_runtime_error_keeps_its_traceback():
    """A defect of the program is not reported as a mistake of the user."""

    def main(config):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        run_script(main, PolicyConfig, [])
