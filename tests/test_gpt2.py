"""GPT-2's weights: read correctly from every kind of file; a bad file is refused in one line."""

import json
import os
import pickle
import random

import train_policy
import train_reward
from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data.tokenizer import fingerprint, load_tokenizer
from minirlhf.model.gpt2 import MAX_HEADER, checkpoint_file, load_gpt2
from minirlhf.model.loading import load_model
from minirlhf.run.command_line import run_script
from minirlhf.run.errors import UserError

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import as_flags, policy_config, refused, reward_config

WIDTH = 128
LAYERS = 2
CONTEXT = 24
ROWS = 257  # the tokens of bytes.tiktoken
TABLE = 320
NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.float64: "F64",
}


def gpt2_tensors(seed=0, width=WIDTH, layers=LAYERS, rows=ROWS):
    """Random weights with GPT-2's names, matrices as [in, out]; large enough to show any error."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "wte.weight": (rows, width),
        "wpe.weight": (CONTEXT, width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    for layer in range(layers):
        for part, inputs, outputs in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            shapes |= {
                f"h.{layer}.{part}.weight": (inputs, outputs),
                f"h.{layer}.{part}.bias": (outputs,),
            }
        for part in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{part}.weight": (width,), f"h.{layer}.{part}.bias": (width,)}
    return {
        name: torch.randn(shape, generator=generator)
        * (0.5 if len(shape) == 1 or name == "wte.weight" else shape[0] ** -0.5)
        for name, shape in shapes.items()
    }


def safetensors(tensors, changes=None):
    """The bytes of a .safetensors file. changes: name of a tensor -> changes to its entry."""
    header = {"__metadata__": {"format": "pt"}}
    content = b""
    for name, tensor in tensors.items():
        numbers = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(content), len(content) + len(numbers)]
        header[name] = dict(
            dtype=NAMES[tensor.dtype], shape=list(tensor.shape), data_offsets=offsets
        )
        content += numbers
    for name, entry in (changes or {}).items():
        header[name] = {**header[name], **entry} if isinstance(entry, dict) else entry
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


def write(folder, tensors, form="safetensors"):
    if form == "safetensors":
        path = folder / "model.safetensors"
        path.write_bytes(safetensors(tensors))
    else:
        path = folder / "pytorch_model.bin"
        torch.save(tensors, path)
    return path


def load(path):
    return load_gpt2(path, ROWS, TABLE)


def assert_equal_tensors(tensors, expected):
    assert tensors.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []


def refusal(path):
    """The error message for a file: one line that names it."""
    with pytest.raises(UserError) as error:
        load(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    assert len(message) < 500 + len(str(path))
    return message


def published_logits(tensors, ids):
    """The logits of ids [T] by the equations of Radford et al. (2019), in float64."""
    t = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    def dense(x, name):
        return x @ t[f"{name}.weight"] + t[f"{name}.bias"]

    x = t["wte.weight"][ids] + t["wpe.weight"][: len(ids)]
    future = torch.ones(len(ids), len(ids)).triu(1).bool()
    for layer in range(LAYERS):
        h = f"h.{layer}"
        query, key, value = dense(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(WIDTH, dim=1)
        heads = []
        for head in range(WIDTH // 64):
            columns = slice(64 * head, 64 * head + 64)
            scores = query[:, columns] @ key[:, columns].T / 8
            weights = scores.masked_fill(future, float("-inf")).softmax(-1)
            heads.append(weights @ value[:, columns])
        x = x + dense(torch.cat(heads, dim=1), f"{h}.attn.c_proj")
        inner = F.gelu(dense(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"), approximate="tanh")
        x = x + dense(inner, f"{h}.mlp.c_proj")
    return norm(x, "ln_f") @ t["wte.weight"].T


# ---- files that are read -------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_logits_are_those_of_the_published_equations(form, tmp_path):
    """No shape check can detect that a square matrix is not transposed."""
    tensors = gpt2_tensors()
    model = load(write(tmp_path, tensors, form))
    ids = torch.randint(0, ROWS, (CONTEXT,), generator=torch.Generator().manual_seed(1))
    logits = model(ids[None], torch.ones(1, CONTEXT, dtype=torch.bool))[0] @ model.lm_weight.T
    expected = published_logits(tensors, ids)
    assert expected.std() > 0.5
    assert (logits - expected).abs().max() < 1e-4


def test_sizes_come_from_the_file_and_all_other_weights_are_0(tmp_path):
    """Rows from PAD on are 0, and so are reward and value head: the first loss is ln 2."""
    model = load(write(tmp_path, gpt2_tensors(layers=3)))
    assert vars(model.config) == dict(
        vocab_size=ROWS, table_rows=TABLE, n_layer=3, n_head=2, d_model=WIDTH, context=CONTEXT
    )
    additional_rows = model.wte.weight[ROWS:]
    assert additional_rows.shape == (TABLE - ROWS, WIDTH)
    assert not additional_rows.any()
    for head in (model.reward_head, model.value_head):
        assert not any(weight.any() for weight in head.parameters())
    assert (model.score_shift, model.score_scale) == (0.0, 1.0)
    for weight in model.parameters():
        assert weight.requires_grad and weight.is_leaf
        assert weight.dtype == torch.float32


def with_everything(tensors):
    """The same weights with a prefix, a tied head and causal masks, as some programs write them."""
    prefixed = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 5, 5).tril(),
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
        "transformer.h.2.attn.bias": torch.ones(5, 5).bool(),
        "transformer.h.3.attn.bias": torch.ones(3, dtype=torch.uint8),
    }
    return prefixed | masks | {"lm_head.weight": tensors["wte.weight"].clone()}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_prefix_tied_head_and_causal_masks_change_nothing(form, tmp_path):
    """Public files of the same weights differ in these details."""
    expected = load(write(tmp_path, gpt2_tensors(), form)).state_dict()
    loaded = load(write(tmp_path, with_everything(gpt2_tensors()), form)).state_dict()
    assert_equal_tensors(loaded, expected)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_files_are_converted_exactly_to_float32(dtype, form, tmp_path):
    """Every 16-bit number is also a 32-bit number."""
    short = {name: tensor.to(dtype) for name, tensor in gpt2_tensors().items()}
    as_float32 = {name: tensor.float() for name, tensor in short.items()}
    expected = load(write(tmp_path, as_float32, form)).state_dict()
    loaded = load(write(tmp_path, short, form)).state_dict()
    assert_equal_tensors(loaded, expected)


def test_parameters_and_transposed_views_are_accepted(tmp_path):
    """A parameter requires gradients, and a view has other strides."""
    tensors = gpt2_tensors()
    expected = load(write(tmp_path, tensors)).state_dict()
    views = {
        name: torch.nn.Parameter(tensor.t().contiguous().t()) for name, tensor in tensors.items()
    }
    model = load(write(tmp_path, views, "bin"))
    assert_equal_tensors(model.state_dict(), expected)
    assert all(weight.is_leaf for weight in model.parameters())


def test_the_model_does_not_change_with_the_file(tmp_path):
    """The weights must be a copy: memory-mapped weights would change with the file."""
    path = write(tmp_path, gpt2_tensors())
    model = load(path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert_equal_tensors(model.state_dict(), before)


def test_a_folder_stands_for_the_first_of_its_known_files(tmp_path):
    """--init accepts a downloaded folder and the folder of a reward run."""
    message = "has none of model.safetensors, pytorch_model.bin, base.pt"
    with pytest.raises(UserError, match=message):
        checkpoint_file(tmp_path)
    for name in ("base.pt", "pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).touch()
        assert checkpoint_file(tmp_path) == tmp_path / name == checkpoint_file(tmp_path / name)


# ---- both scripts --------------------------------------------------------------------------------


def test_both_scripts_start_from_gpt2(inputs, tmp_path, capsys):
    """Without --sft-init, base.pt has exactly the file's weights and its full context."""
    tensors = gpt2_tensors()
    write(tmp_path, tensors)
    result = train_reward.main(reward_config(inputs, tmp_path / "run", init=str(tmp_path)))
    assert (
        "2 layers of 2 heads, width 128, context 24; --n-layer, --n-head and --d-model are ignored"
        in capsys.readouterr().out
    )
    encoding = load_tokenizer(str(inputs / "bytes.tiktoken"))
    base, _ = load_model(tmp_path / "run" / "base.pt", "base", fingerprint(encoding))
    assert base.config.context == CONTEXT
    assert torch.equal(base.lm_weight, tensors["wte.weight"])
    assert torch.equal(base.blocks[1].mlp_in.weight, tensors["h.1.mlp.c_fc.weight"].T)
    stages = {row["stage"] for row in tiny.rows(tmp_path / "run" / "reward_metrics.jsonl")}
    assert stages == {"reward", "test"}
    assert result["pairs"] == 12
    facts = json.loads((tmp_path / "run" / "config.json").read_text())["facts"]
    assert str(tmp_path / "model.safetensors") in facts
    train_policy.main(policy_config(tmp_path / "run", tmp_path / "policy"))


def test_the_dialogue_preset_runs_with_a_smaller_model(inputs, tmp_path):
    """--preset hh-gpt2 with transcripts as in HH-RLHF and a GPT-2 file, which it fine-tunes."""
    dialogue = (
        "\n\nHuman: What is {0} and {0}?\n\nAssistant: A number.\n\nHuman: Which?\n\nAssistant: {1}"
    )
    records = [
        dict(chosen=dialogue.format(i, f"It is {2 * i}."), rejected=dialogue.format(i, "No."))
        for i in range(6)
    ]
    data = tmp_path / "dialogues.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    tensors = gpt2_tensors(width=64, layers=1)
    path = write(tmp_path, {**tensors, "wpe.weight": torch.zeros(1024, 64)})
    flags = f"--preset hh-gpt2 --init {path} --data {data} --out {tmp_path / 'reward'}"
    flags += f" --tokenizer {inputs / 'bytes.tiktoken'} --sft-sequences 16"
    flags += " --normalize-prompts 2 --max-response-length 24"
    run_script(train_reward.main, RewardConfig, flags.split())
    flags = f"--preset hh-gpt2 --reward-run {tmp_path / 'reward'} --out {tmp_path / 'policy'}"
    flags += " --iterations 1 --batch-size 4 --minibatch-size 2 --best-of-n 0"
    run_script(train_policy.main, PolicyConfig, flags.split())
    metrics = tiny.rows(tmp_path / "reward" / "reward_metrics.jsonl")
    assert [row["stage"] for row in metrics] == ["sft", "reward", "test"]
    assert "probes" not in metrics[-1]
    base = tiny.weights(tmp_path / "reward" / "base.pt", "base")
    assert not torch.equal(base["wte.weight"][:ROWS], tensors["wte.weight"])
    assert tiny.rows(tmp_path / "policy" / "policy_metrics.jsonl")[-1]["step"] == 1


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            dict(rows=50257),
            "wte.weight has 50257 rows, but the tokenizer has 257 tokens; "
            "GPT-2's weights need --tokenizer gpt2",
        ),
        (
            dict(context=30),
            "its context of 24 tokens is shorter than --max-prompt-length + --max-response-length",
        ),
        (
            dict(file="nowhere.safetensors"),
            "nowhere.safetensors: No such file or directory; --init takes a checkpoint, or the",
        ),
        (dict(file="pairs.jsonl"), "pairs.jsonl: incomplete, or not a checkpoint of this program"),
        (dict(file="."), "the folder has none of model.safetensors"),
    ],
)
def test_a_start_model_that_does_not_fit_is_refused_before_any_work(
    changes, words, inputs, tmp_path, capsys, monkeypatch
):
    """One line names the problem and the fix, and no run folder is made."""
    monkeypatch.chdir(inputs)
    width = 64 if "rows" in changes else WIDTH
    path = changes.get("file") or write(
        tmp_path, gpt2_tensors(width=width, rows=changes.get("rows", ROWS))
    )
    config = reward_config(
        inputs, tmp_path / "run", init=str(path), max_response_length=changes.get("context", 5)
    )
    assert words in refused(capsys, train_reward.main, RewardConfig, as_flags(config))
    assert not (tmp_path / "run").exists()


# ---- wrong tensors -------------------------------------------------------------------------------


def without(name):
    return lambda t: t.pop(name)


def replaced(name, change):
    return lambda t: t.update({name: change(t[name])})


def with_last_value(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "change, words",
    [
        (
            without("wte.weight"),
            "the weights of another model family (no wte.weight, but 'h.0.attn.c_attn.bias')",
        ),
        (without("h.1.mlp.c_fc.bias"), "h.1.mlp.c_fc.bias: is missing"),
        (without("h.1.ln_1.weight"), "'h.1.attn.c_attn.bias' is not a tensor of GPT-2"),
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith("h.")],
            "h.0.ln_1.weight: is missing",
        ),
        (
            replaced("h.0.mlp.c_fc.weight", lambda x: x.T),
            "h.0.mlp.c_fc.weight: its shape [512, 128] does not fit",
        ),
        (
            replaced("h.0.attn.c_attn.weight", lambda x: x[:, :-1]),
            "h.0.attn.c_attn.weight: its shape [128, 383] does not fit",
        ),
        (
            replaced("wpe.weight", lambda x: x[:, :64]),
            "wpe.weight: its shape [24, 64] does not fit",
        ),
        (
            replaced("ln_f.bias", lambda x: x[None]),
            "ln_f.bias: is torch.float32 [1, 128], not 16- or 32-bit floats in 1 dim",
        ),
        (
            replaced("wte.weight", lambda x: x[:-1]),
            "wte.weight has 256 rows, but the tokenizer has 257",
        ),
        (
            lambda t: t.update(gpt2_tensors(width=96)),
            "wte.weight: its width of 96 is not a multiple of 64",
        ),
        (replaced("h.0.ln_2.bias", lambda x: x.bool()), "h.0.ln_2.bias: is torch.bool [128]"),
        (
            replaced("h.0.ln_2.bias", lambda x: with_last_value(x, float("nan"))),
            "h.0.ln_2.bias: contains a number that is not finite",
        ),
        (
            replaced("wte.weight", lambda x: with_last_value(x, float("inf"))),
            "wte.weight: contains a number that is not finite",
        ),
        (
            lambda t: t.update({"lm_head.weight": with_last_value(t["wte.weight"], 1.0)}),
            "lm_head.weight: differs from wte.weight",
        ),
        (
            lambda t: t.update({"score.weight": t["ln_f.bias"]}),
            "'score.weight' is not a tensor of GPT-2",
        ),
        (
            lambda t: t.update({"transformer.ln_f.bias": t["ln_f.bias"]}),
            "'ln_f.bias' occurs with and without the prefix",
        ),
        (lambda t: t.update({"a\nb": t["ln_f.bias"]}), r"'a\nb' is not a tensor of GPT-2"),
        (lambda t: t.clear(), "missing|header"),
    ],
)
def test_a_wrong_tensor_is_named(change, words, form, tmp_path):
    """A wrong tensor that loads would give a model of nonsense without any error."""
    tensors = gpt2_tensors()
    change(tensors)
    message = refusal(write(tmp_path, tensors, form))
    assert any(part in message for part in words.split("|")), message


@pytest.mark.parametrize(
    "content",
    [
        lambda t: t["wte.weight"],
        lambda t: list(t.items()),
        lambda t: {**t, "ln_f.bias": 3.0},
        lambda t: {**t, 7: t["ln_f.bias"]},
        lambda t: {**t, "wte.weight": t["wte.weight"].to_sparse()},
        lambda t: {**t, "ln_f.bias": t["ln_f.bias"].to("meta")},
        # 4 bytes on disk, 10^16 in memory
        lambda t: {**t, "wte.weight": torch.zeros(1).expand(ROWS, 2**45)},
        lambda t: {**t, "ln_f.bias": t["ln_f.bias"].double()},
        lambda t: {"model": t},
        lambda t: None,
    ],
    ids=range(10),
)
def test_a_pickled_file_with_other_content_is_refused(content, tmp_path):
    torch.save(content(gpt2_tensors()), tmp_path / "pytorch_model.bin")
    assert "not a complete GPT-2 checkpoint" in refusal(tmp_path / "pytorch_model.bin")


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2))]
)
def test_a_payload_is_not_executed(save, tmp_path):
    """An unrestricted unpickler executes what a file of weights contains."""
    path = tmp_path / "pytorch_model.bin"
    save({**gpt2_tensors(), "x": Payload(tmp_path / "executed")}, path)
    assert "UnpicklingError" in refusal(path)
    assert not (tmp_path / "executed").exists()


# ---- wrong safetensors files ---------------------------------------------------------------------


def with_entry(changes):
    """A file in which the header's entry of ln_f.bias is changed."""
    return safetensors(gpt2_tensors(), {"ln_f.bias": changes})


def headed(text, content=b"\0" * 8, length=None):
    text = text if isinstance(text, bytes) else text.encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + content


COMPLETE = safetensors(gpt2_tensors())
HEADER_LENGTH = int.from_bytes(COMPLETE[:8], "little")
HEADER = json.loads(COMPLETE[8 : 8 + HEADER_LENGTH])
START = HEADER["ln_f.bias"]["data_offsets"][0]
ONE = '{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'


BROKEN = {
    "empty file": [b""],
    "states a header of": [
        b"\0" * 7,
        COMPLETE[:100],
        COMPLETE[1:],
        headed("{}", b""),
        headed("{}", length=2**63),
        headed("{}", length=2**64 - 1),
        headed(" " * MAX_HEADER + "{}"),
    ],
    "Expecting|decode|Extra data|recursion|4300 digits": [
        b"\0" * 9,
        headed("{"),
        headed(b"\xff\xfe{}"),
        headed("{}", length=3),
        headed("[" * 100_000),
        headed('{"a": ' * 100_000),
        headed('{"a": ' + "9" * 5000 + "}"),
    ],
    "header is not a JSON object": [headed("[]"), headed("null"), headed("3")],
    "an object has one key twice": [
        headed('{"wte.weight": ' + ONE + ', "wte.weight": ' + ONE + "}")
    ],
    "belong to no tensor": [headed("{}"), COMPLETE + b"\0"],
    "overlap others, leave a gap, or do not exist": [
        COMPLETE[:-1],
        headed('{"wte.weight": ' + ONE + "}", b"\0" * 7),
        headed('{"a": ' + ONE + ', "b": ' + ONE + "}"),
        with_entry(dict(data_offsets=[0, 4 * WIDTH])),
        with_entry(dict(data_offsets=[START + 1, START + 1 + 4 * WIDTH])),
    ],
    "malformed, empty, or of a type other than": [
        headed('{"a": ' + text + "}")
        for text in (
            "{}",
            "3",
            "NaN",
            '"x\\ny"',
            "[1, 2, 3]",
            ONE.replace("[2]", f"[{'9' * 4000}]"),
            ONE.replace("[2]", "[2, 0]"),
            ONE.replace("[2]", str([1] * 99 + [2])),
            ONE.replace("[0, 8]", "[8, 0]"),
            ONE.replace("[0, 8]", "[0, 0]"),
        )
    ]
    + [
        with_entry(change)
        for change in (
            dict(dtype="F64"),
            dict(dtype="I8"),
            dict(dtype=3),
            dict(dtype=None),
            dict(dtype=["F32"]),
            dict(shape=[WIDTH + 1]),
            dict(shape=[-WIDTH]),
            dict(shape=[float(WIDTH)]),
            dict(shape=[True]),
            dict(shape="128"),
            dict(shape=None),
            dict(shape=[[WIDTH]]),
            dict(data_offsets=[START]),
            dict(data_offsets=[START, 2**60]),
            dict(data_offsets=None),
            dict(data_offsets=[-4 * WIDTH, 0]),
            dict(data_offsets=[START, START]),
            dict(data_offsets={"0": 1}),
        )
    ],
}
CASES = [(words, content) for words, contents in BROKEN.items() for content in contents]


@pytest.mark.parametrize("words, content", CASES, ids=range(len(CASES)))
def test_a_safetensors_file_that_breaks_the_format_is_refused(words, content, tmp_path):
    """Every length and offset must be checked before memory is allocated or read."""
    (tmp_path / "x.safetensors").write_bytes(content)
    message = refusal(tmp_path / "x.safetensors")
    assert "not a complete GPT-2 checkpoint" in message
    assert any(part in message for part in words.split("|")), message


def test_offsets_need_not_be_aligned(tmp_path):
    """The header can have any length, so numbers can start at any byte."""
    expected = load(write(tmp_path, gpt2_tensors())).state_dict()
    for blanks in range(1, 4):
        header = COMPLETE[8 : 8 + HEADER_LENGTH] + b" " * blanks
        numbers = COMPLETE[8 + HEADER_LENGTH :]
        path = tmp_path / "x.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + numbers)
        assert_equal_tensors(load(path).state_dict(), expected)


@pytest.mark.parametrize("form, rounds", [("safetensors", 400), ("bin", 150)])
def test_a_damaged_file_loads_or_is_refused_in_one_line(form, rounds, tmp_path):
    """Bytes are changed, deleted, repeated or cut off, most of them in the header."""
    path = write(tmp_path, gpt2_tensors(width=64, layers=1), form)
    complete = path.read_bytes()
    rng = random.Random(0)
    refusals = 0
    structure = 8 + int.from_bytes(complete[:8], "little") if form == "safetensors" else 3000
    for _ in range(rounds):
        content = bytearray(complete)
        for _ in range(rng.choice((1, 1, 3))):
            in_structure = rng.random() < 0.9
            start = rng.randrange(structure if in_structure else len(content))
            if form == "bin" and rng.random() < 0.3:
                start = len(content) - 1 - start  # the directory of a zip file is at its end
            action = rng.randrange(5)
            size = rng.choice((1, 1, 4, 40))
            if action == 0:
                del content[start : start + size]
            elif action == 1:
                content[start:start] = content[start : start + size]
            elif action == 2 and rng.random() < 0.2:
                del content[start:]
            else:
                byte = rng.choice((0, 255, rng.randrange(256), *b'0123456789"[]{},:'))
                content[start : start + 1] = bytes([byte])
        path.write_bytes(content)
        try:
            load(path)
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error)
            assert len(str(error)) < 500 + len(str(path))
    assert rounds / 2 < refusals < rounds
