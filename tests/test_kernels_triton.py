"""The Triton kernels: on a GPU, or without one in Triton's interpreter and compiled for two GPUs.

The interpreter shows that a kernel computes the right numbers. The machine code shows that it uses
the fast instructions. Neither shows speed or races; there are no races, because each program writes
its own part of the output.

As a script, this file compiles all kernels for one architecture and prints counts of instructions
and registers as JSON.
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
    pytest.skip(
        "triton is not installed (pip install triton==3.7.1): GPU kernels untested",
        allow_module_level=True,
    )

from minirlhf.kernels import discounted_returns, logprob_triton, returns_triton, token_logprobs

import triton
from triton.backends.compiler import GPUTarget

pytestmark = pytest.mark.gpu
GPU = torch.cuda.is_available()
# Shared memory of one program by compute capability (CUDA C++ Programming Guide)
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
DEVICE = "cuda" if GPU else "cpu"
OPERANDS = [(torch.float32, 1e-5), (torch.float16, 2e-3)]  # dtype, tolerance
if GPU:
    OPERANDS.append((torch.bfloat16, 2e-2))
only_interpreter = pytest.mark.skipif(
    GPU, reason="tests the interpreter, which is not used on a machine with a GPU"
)


@pytest.fixture(autouse=True)
def poison():
    """New memory is NaN, so that an element that no program writes makes a test fail."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("dtype, tolerance", OPERANDS)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1, 2.0])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 5, 2), (4, 3, 3), (7, 16, 4), (9, 8, 5), (130, 70, 261)]
)
def test_logprobs_entropy_and_gradients_equal_the_reference(
    shape, temperature, entropy, dtype, tolerance
):
    """Covers shapes of one row or column and shapes that are no multiple of a tile."""
    check_logprobs(shape, temperature, entropy, dtype, tolerance, "triton", DEVICE)


@pytest.mark.parametrize("dtype, tolerance", OPERANDS)
def test_the_gradients_of_several_tiles_add_up(monkeypatch, dtype, tolerance):
    """The real tiles are larger than any shape in these tests."""
    monkeypatch.setattr(logprob_triton, "ROWS", 128)
    monkeypatch.setattr(logprob_triton, "COLUMNS", 128)
    check_logprobs((200, 20, 300), 1.0, True, dtype, tolerance, "triton", DEVICE)


def test_more_row_tiles_than_one_group(monkeypatch):
    """Programs form groups of 8 row tiles; a smaller last group must not skip or repeat a tile."""
    small_tiles = logprob_triton.FLOAT32 | dict(BLOCK_N=16, BLOCK_V=16)
    monkeypatch.setattr(logprob_triton, "FLOAT32", small_tiles)
    check_logprobs((16 * 11, 4, 70), 1.0, False, torch.float32, 1e-5, "triton", DEVICE)


@pytest.mark.parametrize("entropy", [False, True])
def test_strided_operands_and_a_slice_of_a_table(entropy):
    """The gradients equal those of the PyTorch version."""
    hidden, table, targets, upstream = example(12, 6, 40, torch.float32, DEVICE)
    targets = targets.clamp(max=26)
    strided = hidden.detach().T.contiguous().T.requires_grad_()
    gradients = []
    for impl, h in (("torch", hidden), ("triton", strided)):
        result = token_logprobs(h, table[3:], targets, 0.7, entropy, impl, vocab_size=27)
        if entropy:
            loss = sum((x * g).sum() for x, g in zip(result, upstream.float()))
        else:
            loss = result.sum()
        gradients.append(torch.autograd.grad(loss, (h, table)))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [dtype for dtype, _ in OPERANDS])
@pytest.mark.parametrize("gamma", [0, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (6, 64), (2, 257)])
def test_returns_equal_the_reference_for_any_padding(shape, gamma, dtype):
    """Covers one column, one block, and empty rows."""
    check_returns(shape, gamma, dtype, 1e-5, "triton", DEVICE)


def test_returns_of_several_blocks_equal_the_reference(monkeypatch):
    """Catches a wrong carry from a block to the block before it."""
    monkeypatch.setattr(returns_triton, "MAX_BLOCK_R", 16)
    check_returns((6, 50), 0.99, torch.float32, 1e-5, "triton", DEVICE)


def test_kernels_write_nothing_outside_their_outputs():
    """Catches a store whose mask is also true after the last row (-1 // 128 is 0 in Triton)."""
    n, d, v = 5, 4, 6
    hidden, weight, targets, _ = example(n, d, v, torch.float32, DEVICE)
    hidden, weight = hidden.detach(), weight.detach()

    def output(*shape):
        """A tensor inside a larger one that is 7 everywhere, and the larger one."""
        guarded = torch.full((2000,), 7.0, device=DEVICE)
        return guarded[512 : 512 + torch.Size(shape).numel()].view(shape), guarded

    outputs = [output(n), output(1, n), output(1, n), output(n, v), output(n, d)]
    target_logit, lse, entropies, dz, returns = (inside for inside, _ in outputs)
    sizes = (n, d, v, d, d)
    row = torch.ones(n, device=DEVICE)
    logprob_triton.statistics_kernel[1, 1](
        hidden, weight, targets, target_logit, lse, entropies, *sizes, 1.0, **logprob_triton.FLOAT32
    )
    logprob_triton.gradient_kernel[1, 1](
        hidden, weight, targets, lse[0], row, row, row, dz, *sizes, v, 1.0, **logprob_triton.FLOAT32
    )
    returns_triton.scan_kernel[(1,)](
        hidden,
        torch.ones_like(hidden, dtype=torch.bool),
        returns,
        n,
        d,
        0.9,
        BLOCK_B=16,
        BLOCK_R=16,
    )
    for inside, guarded in outputs:
        assert (inside != 7).all()
        assert (guarded == 7).sum() == guarded.numel() - inside.numel()


def test_float64_is_an_error():
    """The Triton kernels compute in float32 at most."""
    hidden, weight, targets, _ = example(2, 2, 2, torch.float64, DEVICE)
    with pytest.raises(ValueError, match="float64"):
        token_logprobs(hidden.detach(), weight.detach(), targets, impl="triton")


@only_interpreter
def test_bfloat16_is_an_error_in_the_interpreter():
    """The interpreter treats bfloat16 as 16-bit integers and returns numbers around 1e10."""
    hidden, weight, targets, _ = example(2, 2, 2, torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16"):
        token_logprobs(hidden, weight, targets, impl="triton")
    with pytest.raises(ValueError, match="bfloat16"):
        discounted_returns(hidden.detach(), torch.ones(2, 2), 0.9, impl="triton")


def test_cpu_tensors_are_an_error_outside_the_interpreter(monkeypatch):
    """The message names the device."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="needs CUDA tensors.*cpu"):
        discounted_returns(torch.ones(2, 2), torch.ones(2, 2), 0.9, impl="triton")


@pytest.fixture(
    scope="module", params=list(SHARED_KIB), ids=lambda architecture: f"sm_{architecture}"
)
def machine_code(request):
    """(architecture, {kernel: counts of its machine code}) of an A100 and of an H100 or H200.

    The compiler does not need the GPU.
    """
    return request.param, json.loads(run_without_interpreter(__file__, str(request.param)))


def test_no_kernel_spills_registers_or_exceeds_shared_memory(machine_code):
    """Spilled registers make a kernel slow; too much shared memory prevents its start."""
    architecture, kernels = machine_code
    for name, code in kernels.items():
        assert code["spills"] == 0, name
        assert code["shared"] <= SHARED_KIB[architecture] * 1024, name


def test_half_precision_products_use_the_matrix_units(machine_code):
    """On an H100, two programs of 256 threads must also fit on one multiprocessor."""
    architecture, kernels = machine_code
    half = {name: code for name, code in kernels.items() if "bf16" in name}
    assert len(half) == 4
    for name, code in half.items():
        assert code["HGMMA" if architecture == 90 else "HMMA"] > 0, name
        if architecture == 90 and name != "gradient bf16 entropy":
            assert code["registers"] <= 128 and 2 * code["shared"] <= 227 * 1024, name


def test_loads_and_stores_are_128_bits_wide(machine_code):
    """The statistics kernels store one number per row, so their stores are narrow."""
    _, kernels = machine_code
    for name, code in kernels.items():
        assert code["wide loads"] > 0, name
        if "statistics" not in name:
            assert code["wide stores"] > 0, name


def run_without_interpreter(*arguments):
    """The output of a Python process in which the kernels are compiled, not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def compile_all(architecture):
    """{kernel: counts of its machine code} of the project's launches, at multiples of 16."""
    kernels = {}
    half = ("*bf16", logprob_triton.HALF)
    full = ("*fp32", logprob_triton.FLOAT32)
    for suffix, (matrix, config), optional in (  # of the entropies or their gradient
        ("bf16", half, None),
        ("bf16 entropy", half, "*fp32"),
        ("fp32 entropy", full, "*fp32"),
    ):
        inputs = [matrix, matrix, "*i64"]  # hidden, weight, targets
        types = [*inputs, "*fp32", "*fp32", optional, *["i32"] * 5, "fp32"]
        kernel = logprob_triton.statistics_kernel
        kernels[f"statistics {suffix}"] = compile_one(architecture, kernel, config, types)
        types = [*inputs, "*fp32", "*fp32", "*fp32", optional, matrix, *["i32"] * 6, "fp32"]
        kernel = logprob_triton.gradient_kernel
        kernels[f"gradient {suffix}"] = compile_one(architecture, kernel, config, types)
    config = dict(BLOCK_B=2, BLOCK_R=1024, num_warps=4)
    types = ["*fp32", "*i1", "*fp32", "i32", "i32", "fp32"]
    kernels["scan"] = compile_one(architecture, returns_triton.scan_kernel, config, types)
    return kernels


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_one(architecture, kernel, config, types):
    """Compile a kernel for sm_`architecture` and count what its machine code contains.

    types: of the run-time arguments in order; None for an argument that is None.
    """
    options = {k: v for k, v in config.items() if k.startswith("num_")}
    constants = {k: v for k, v in config.items() if k not in options}
    constants |= {name: None for name, type_ in zip(kernel.arg_names, types) if type_ is None}
    signature = dict(zip(kernel.arg_names, types)) | dict.fromkeys(constants, "constexpr")
    position = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    aligned = {
        position[name]: [["tt.divisibility", 16]]
        for name, t in signature.items()
        if t[0] == "*" or (t == "i32" and name not in kernel.do_not_specialize)
    }
    source = triton.compiler.ASTSource(
        kernel,
        signature,
        constexprs={position[name]: value for name, value in constants.items()},
        attrs=aligned,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = output_of(tool, "-res-usage", file.name)
        sass = output_of(tool, "-sass", file.name)
    patterns = {
        "spills": r"\b(LDL|STL)\b",
        "HGMMA": r"\bHGMMA\b",
        "HMMA": r"\bHMMA\b",
        "wide loads": r"\bLDG(STS)?\.[\w.]*128\b",
        "wide stores": r"\bSTG\.[\w.]*128\b",
    }
    counts = {name: len(re.findall(pattern, sass)) for name, pattern in patterns.items()}
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    return counts | dict(registers=registers, shared=compiled.metadata.shared)


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
