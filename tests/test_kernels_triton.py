"""The Triton kernels: on a GPU as they are; without one in Triton's interpreter, and compiled for two GPUs unseen.

The interpreter shows that a kernel computes the right numbers, the compiler's output that it can be fast. Neither shows
races (the kernels have none: every program writes its own part of the output) or speed.

Run as a program, this file compiles every kernel for one architecture and prints what the machine code holds, as JSON.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from test_kernels import check_logprobs, check_returns, example

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (pip install triton==3.7.1): GPU kernels untested", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget

from minirlhf.kernels import discounted_returns, logprob_triton, returns_triton, token_logprobs

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
OPERANDS = [(torch.float32, 1e-5), (torch.float16, 2e-3)] + ([(torch.bfloat16, 2e-2)] if GPU else [])
only_interpreter = pytest.mark.skipif(GPU, reason="about the interpreter, which a machine with a GPU does not use")


@pytest.fixture(autouse=True)
def poison():
    """Fresh memory holds NaN, so that an element that no program writes cannot pass."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("dtype, tolerance", OPERANDS)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1, 2.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 2), (4, 3, 3), (7, 16, 4), (9, 8, 5), (130, 70, 261)])
def test_logprobs_entropy_and_gradients_equal_the_reference(shape, temperature, entropy, dtype, tolerance):
    check_logprobs(shape, temperature, entropy, dtype, tolerance, "triton", DEVICE)


@pytest.mark.parametrize("dtype, tolerance", OPERANDS)
def test_gradient_tiles_smaller_than_the_problem_add_up(monkeypatch, dtype, tolerance):
    monkeypatch.setattr(logprob_triton, "ROWS", 128)
    monkeypatch.setattr(logprob_triton, "COLUMNS", 128)
    check_logprobs((200, 20, 300), 1.0, True, dtype, tolerance, "triton", DEVICE)


def test_more_row_tiles_than_one_group(monkeypatch):
    """Programs are numbered in groups of 8 row tiles; a last group of another size must not skip or repeat a tile."""
    monkeypatch.setattr(logprob_triton, "FLOAT32", {**logprob_triton.FLOAT32, "BLOCK_N": 16, "BLOCK_V": 16})
    check_logprobs((16 * 11, 4, 70), 1.0, False, torch.float32, 1e-5, "triton", DEVICE)


@pytest.mark.parametrize("entropy", [False, True])
def test_strided_operands_and_a_slice_of_a_table(entropy):
    hidden, table, targets, upstream = example(12, 6, 40, torch.float32, DEVICE)
    results = []
    for impl, h in (("torch", hidden), ("triton", hidden.detach().T.contiguous().T.requires_grad_())):
        got = token_logprobs(h, table[3:], targets.clamp(max=26), 0.7, entropy, impl, vocab_size=27)
        loss = sum((x * g).sum() for x, g in zip(got, upstream.float())) if entropy else got.sum()
        results.append(torch.autograd.grad(loss, (h, table)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [dtype for dtype, _ in OPERANDS])
@pytest.mark.parametrize("gamma", [0, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (6, 64), (2, 257)])
def test_returns_equal_the_reference_whatever_lies_beyond_the_mask(shape, gamma, dtype):
    check_returns(shape, gamma, dtype, 1e-5, "triton", DEVICE)


def test_returns_carry_from_block_to_block(monkeypatch):
    monkeypatch.setattr(returns_triton, "MAX_BLOCK_R", 16)
    check_returns((6, 50), 0.99, torch.float32, 1e-5, "triton", DEVICE)


def test_kernels_write_nothing_outside_their_outputs():
    """A store masked by a condition that holds for rows beyond the last (-1 // 128 is 0 in Triton) corrupts memory."""
    n, d, v = 5, 4, 6
    hidden, weight, targets, _ = example(n, d, v, torch.float32, DEVICE)
    hidden, weight = hidden.detach(), weight.detach()

    def output(*shape):
        """A tensor inside a larger one that holds 7 everywhere, and the larger one."""
        guarded = torch.full((2000,), 7.0, device=DEVICE)
        return guarded[512:512 + torch.Size(shape).numel()].view(shape), guarded

    outputs = [output(n), output(1, n), output(1, n), output(n, v), output(n, d)]
    target_logit, lse, entropies, dz, returns = (inside for inside, _ in outputs)
    sizes, row = (n, d, v, d, d), torch.ones(n, device=DEVICE)
    logprob_triton.statistics_kernel[1, 1](
        hidden, weight, targets, target_logit, lse, entropies, *sizes, 1.0, **logprob_triton.FLOAT32)
    logprob_triton.gradient_kernel[1, 1](
        hidden, weight, targets, lse[0], row, row, row, dz, *sizes, v, 1.0, **logprob_triton.FLOAT32)
    returns_triton.scan_kernel[(1,)](
        hidden, torch.ones_like(hidden, dtype=torch.bool), returns, n, d, 0.9, BLOCK_B=16, BLOCK_R=16)
    for inside, guarded in outputs:
        assert (inside != 7).all()
        assert (guarded == 7).sum() == guarded.numel() - inside.numel()


def test_float64_is_refused():
    with pytest.raises(ValueError, match="float64"):
        token_logprobs(*(x.detach() for x in example(2, 2, 2, torch.float64, DEVICE)[:3]), impl="triton")


@only_interpreter
def test_bfloat16_is_refused_in_the_interpreter():
    """It takes bfloat16 for 16-bit integers and returns numbers around 1e10."""
    hidden, weight, targets, _ = example(2, 2, 2, torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16"):
        token_logprobs(hidden, weight, targets, impl="triton")
    with pytest.raises(ValueError, match="bfloat16"):
        discounted_returns(hidden.detach(), torch.ones(2, 2), 0.9, impl="triton")


def test_cpu_tensors_are_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="needs CUDA tensors.*cpu"):
        discounted_returns(torch.ones(2, 2), torch.ones(2, 2), 0.9, impl="triton")


@pytest.fixture(scope="module", params=[80, 90], ids=["sm_80", "sm_90"])
def machine_code(request):
    """{kernel: what its machine code holds}, compiled for an A100 or an H100/H200, which need not be there."""
    return request.param, json.loads(run_without_interpreter(__file__, str(request.param)))


def test_no_kernel_spills_registers_or_outgrows_shared_memory(machine_code):
    architecture, kernels = machine_code
    for name, code in kernels.items():
        assert code["spills"] == 0, name
        assert code["shared"] <= {80: 163, 90: 227}[architecture] * 1024, name


def test_half_precision_products_use_the_matrix_units(machine_code):
    architecture, kernels = machine_code
    half = {name: code for name, code in kernels.items() if "bf16" in name}
    assert len(half) == 4
    for name, code in half.items():
        assert code["HGMMA" if architecture == 90 else "HMMA"] > 0, name
        if architecture == 90 and name != "gradient bf16 entropy":  # two programs of 256 threads on one multiprocessor
            assert code["registers"] <= 128 and 2 * code["shared"] <= 227 * 1024, name


def test_loads_and_stores_are_128_bits_wide(machine_code):
    _, kernels = machine_code
    for name, code in kernels.items():
        assert code["wide loads"] > 0, name
        assert code["wide stores"] > 0 or "statistics" in name, name  # which stores one number a row


def run_without_interpreter(*arguments):
    """Output of a Python process in which the kernels are compiled, not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compile_all(architecture):
    """{kernel: what its machine code holds} for the launch configurations of the project, at sizes divisible by 16."""
    kernels = {}
    half, full = ("*bf16", logprob_triton.HALF), ("*fp32", logprob_triton.FLOAT32)
    for suffix, (matrix, config), optional in (  # optional: the entropies, or their gradient
        ("bf16", half, None), ("bf16 entropy", half, "*fp32"), ("fp32 entropy", full, "*fp32"),
    ):
        kernels[f"statistics {suffix}"] = compile_one(
            architecture, logprob_triton.statistics_kernel, config,
            [matrix, matrix, "*i64", "*fp32", "*fp32", optional, *["i32"] * 5, "fp32"])
        kernels[f"gradient {suffix}"] = compile_one(
            architecture, logprob_triton.gradient_kernel, config,
            [matrix, matrix, "*i64", "*fp32", "*fp32", "*fp32", optional, matrix, *["i32"] * 6, "fp32"])
    config = dict(BLOCK_B=2, BLOCK_R=1024, num_warps=4)
    kernels["scan"] = compile_one(
        architecture, returns_triton.scan_kernel, config, ["*fp32", "*i1", "*fp32", "i32", "i32", "fp32"])
    return kernels


def compile_one(architecture, kernel, config, types):
    """Compile for sm_`architecture`; types: of the run-time arguments in order, None for an argument that is None."""
    options = {k: v for k, v in config.items() if k.startswith("num_")}
    constants = {k: v for k, v in config.items() if k not in options}
    constants |= {name: None for name, type_ in zip(kernel.arg_names, types) if type_ is None}
    signature = {**dict(zip(kernel.arg_names, types)), **dict.fromkeys(constants, "constexpr")}
    position = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    aligned = {position[name]: [["tt.divisibility", 16]] for name, t in signature.items() if t[0] == "*" or t == "i32"}
    source = triton.compiler.ASTSource(
        kernel, signature, constexprs={position[name]: value for name, value in constants.items()}, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
                       for flag in ("-res-usage", "-sass"))
    count = {name: len(re.findall(pattern, sass)) for name, pattern in {
        "spills": r"\b(LDL|STL)\b", "HGMMA": r"\bHGMMA\b", "HMMA": r"\bHMMA\b",
        "wide loads": r"\bLDG(STS)?\.[\w.]*128\b", "wide stores": r"\bSTG\.[\w.]*128\b"}.items()}
    return {**count, "registers": int(re.search(r"REG:(\d+)", usage)[1]), "shared": compiled.metadata.shared}


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
