"""GPT-2's weights: read right, from every kind of file; and a hostile file is one line, never a traceback."""

import json
import os
import pickle
import random

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import as_flags, policy_config, refused, reward_config

import train_policy
import train_reward
from minirlhf.checkpoint import load_model
from minirlhf.config import PolicyConfig, RewardConfig, UserError, run_script
from minirlhf.gpt2 import MAX_HEADER, checkpoint_file, load_gpt2
from minirlhf.tokenizer import fingerprint, load_tokenizer

WIDTH, LAYERS, CONTEXT, ROWS, TABLE = 128, 2, 24, 257, 320  # 257 tokens: those of bytes.tiktoken
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL", torch.uint8: "U8",
         torch.float64: "F64"}


def gpt2_tensors(seed=0, width=WIDTH, layers=LAYERS, rows=ROWS):
    """Random weights under GPT-2's names, matrices as [in, out]; large enough for a wrong place to show."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"wte.weight": (rows, width), "wpe.weight": (CONTEXT, width), "ln_f.weight": (width,), "ln_f.bias": (width,)}
    for layer in range(layers):
        for part, inputs, outputs in (("attn.c_attn", width, 3 * width), ("attn.c_proj", width, width),
                                      ("mlp.c_fc", width, 4 * width), ("mlp.c_proj", 4 * width, width)):
            shapes |= {f"h.{layer}.{part}.weight": (inputs, outputs), f"h.{layer}.{part}.bias": (outputs,)}
        for part in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{part}.weight": (width,), f"h.{layer}.{part}.bias": (width,)}
    return {name: torch.randn(shape, generator=generator) * (0.5 if len(shape) == 1 or name == "wte.weight" else shape[0] ** -0.5)
            for name, shape in shapes.items()}


def safetensors(tensors, **changes):
    """The bytes of a .safetensors file; changes to the entry of a tensor: name="..." and what to put there."""
    header, content = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        numbers = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(content), len(content) + len(numbers)]
        header[name], content = dict(dtype=NAMES[tensor.dtype], shape=list(tensor.shape), data_offsets=offsets), content + numbers
    for name, entry in changes.items():
        header[name] = {**header[name], **entry} if isinstance(entry, dict) else entry
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


def write(folder, tensors, form="safetensors"):
    path = folder / dict(safetensors="model.safetensors", bin="pytorch_model.bin")[form]
    path.write_bytes(safetensors(tensors)) if form == "safetensors" else torch.save(tensors, path)
    return path


def load(path):
    return load_gpt2(path, ROWS, TABLE)


def refusal(path):
    """The one line with which a file is refused."""
    with pytest.raises(UserError) as error:
        load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value) and len(str(error.value)) < 500 + len(str(path))
    return str(error.value)


def published(tensors, ids):
    """The logits of ids [T] by the equations of Radford et al. (2019), one head at a time, in float64."""
    t = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * t[f"{name}.weight"] + t[f"{name}.bias"]

    def dense(x, name):
        return x @ t[f"{name}.weight"] + t[f"{name}.bias"]

    x = t["wte.weight"][ids] + t["wpe.weight"][: len(ids)]
    future = torch.ones(len(ids), len(ids)).triu(1).bool()
    for layer in range(LAYERS):
        h = f"h.{layer}"
        query, key, value = dense(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(WIDTH, dim=1)
        heads = []
        for head in range(WIDTH // 64):
            some = slice(64 * head, 64 * head + 64)
            weights = (query[:, some] @ key[:, some].T / 8).masked_fill(future, float("-inf")).softmax(-1)
            heads.append(weights @ value[:, some])
        x = x + dense(torch.cat(heads, dim=1), f"{h}.attn.c_proj")
        x = x + dense(F.gelu(dense(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"), approximate="tanh"), f"{h}.mlp.c_proj")
    return norm(x, "ln_f") @ t["wte.weight"].T


# ---- read right ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_logits_are_those_of_the_published_equations(form, tmp_path):
    """A matrix that is not transposed, where it is square, is noticed by nothing but this."""
    tensors = gpt2_tensors()
    model = load(write(tmp_path, tensors, form))
    ids = torch.randint(0, ROWS, (CONTEXT,), generator=torch.Generator().manual_seed(1))
    found = model(ids[None], torch.ones(1, CONTEXT, dtype=torch.bool))[0] @ model.lm_weight.T
    wanted = published(tensors, ids)
    assert wanted.std() > 0.5 and (found - wanted).abs().max() < 1e-4


def test_sizes_come_from_the_file_and_the_rest_starts_at_0(tmp_path):
    """Heads of 64; PAD and the rows beyond it are zeros, and so are both heads: the first preference loss is ln 2."""
    model = load(write(tmp_path, gpt2_tensors(layers=3)))
    assert vars(model.config) == dict(vocab_size=ROWS, table_rows=TABLE, n_layer=3, n_head=2, d_model=WIDTH, context=CONTEXT)
    assert model.wte.weight[ROWS:].shape == (TABLE - ROWS, WIDTH) and not model.wte.weight[ROWS:].any()
    assert not any(weight.any() for head in (model.reward_head, model.value_head) for weight in head.parameters())
    assert (model.score_shift, model.score_scale) == (0.0, 1.0)
    assert all(weight.requires_grad and weight.is_leaf and weight.dtype == torch.float32 for weight in model.parameters())


def with_everything(tensors):
    """As the program that published them writes them: a prefix, a tied head, causal masks of several kinds."""
    dressed = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    masks = {f"transformer.h.{i}.attn.{name}": mask for i, (name, mask) in enumerate((
        ("bias", torch.ones(1, 1, 5, 5).tril()), ("masked_bias", torch.tensor(-1e4)), ("bias", torch.ones(5, 5).bool()),
        ("bias", torch.ones(3, dtype=torch.uint8))))}
    return dressed | masks | {"lm_head.weight": tensors["wte.weight"].clone()}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_prefix_tied_head_and_causal_masks_change_nothing(form, tmp_path):
    """The same weights go about in all these forms."""
    plain = load(write(tmp_path, gpt2_tensors(), form)).state_dict()
    dressed = load(write(tmp_path, with_everything(gpt2_tensors()), form)).state_dict()
    assert plain.keys() == dressed.keys() and all(torch.equal(plain[name], dressed[name]) for name in plain)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_files_are_read_into_float32(dtype, form, tmp_path):
    """Exactly: a 16-bit number is a 32-bit one."""
    short = {name: tensor.to(dtype) for name, tensor in gpt2_tensors().items()}
    wanted = load(write(tmp_path, {name: tensor.float() for name, tensor in short.items()}, form)).state_dict()
    found = load(write(tmp_path, short, form)).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_parameters_as_they_are_and_a_transposed_view_will_do(tmp_path):
    """A dictionary of parameters still wants gradients; a view has strides of its own."""
    tensors = gpt2_tensors()
    wanted = load(write(tmp_path, tensors)).state_dict()
    odd = {name: torch.nn.Parameter(tensor.t().contiguous().t()) for name, tensor in tensors.items()}
    model = load(write(tmp_path, odd, "bin"))
    assert all(torch.equal(model.state_dict()[name], wanted[name]) for name in wanted)
    assert all(weight.is_leaf for weight in model.parameters())


def test_the_model_does_not_change_with_the_file(tmp_path):
    """A mapped file that is written anew under a running training would be new weights."""
    path = write(tmp_path, gpt2_tensors())
    model = load(path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_a_folder_means_the_first_of_its_known_files(tmp_path):
    """People hold the folder that they downloaded; a reward run's own folder is one too."""
    with pytest.raises(UserError, match="holds none of model.safetensors, pytorch_model.bin, base.pt"):
        checkpoint_file(tmp_path)
    for name in ("base.pt", "pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).touch()
        assert checkpoint_file(tmp_path) == tmp_path / name == checkpoint_file(tmp_path / name)


# ---- through the scripts ---------------------------------------------------------------------------------------------


def test_both_scripts_start_from_gpt2(inputs, tmp_path, capsys):
    """base.pt is the file's model, with all of its context; no warm-up; and the policy starts from it."""
    tensors = gpt2_tensors()
    write(tmp_path, tensors)
    result = train_reward.main(reward_config(inputs, tmp_path / "run", init=str(tmp_path)))
    assert "2 layers of 2 heads, width 128, context 24; the file decides, not --n-layer" in capsys.readouterr().out
    base, _ = load_model(tmp_path / "run" / "base.pt", "base", fingerprint(load_tokenizer(str(inputs / "bytes.tiktoken"))))
    assert base.config.context == CONTEXT and torch.equal(base.lm_weight, tensors["wte.weight"])
    assert torch.equal(base.blocks[1].mlp_in.weight, tensors["h.1.mlp.c_fc.weight"].T)
    stages = {row["stage"] for row in tiny.rows(tmp_path / "run" / "reward_metrics.jsonl")}
    assert stages == {"reward", "test"} and result["pairs"] == 12
    facts = json.loads((tmp_path / "run" / "config.json").read_text())["facts"]
    assert str(tmp_path / "model.safetensors") in facts
    train_policy.main(policy_config(tmp_path / "run", tmp_path / "policy"))


def test_the_commands_for_dialogues_run_on_a_smaller_model(inputs, tmp_path):
    """--preset hh-gpt2 on transcripts in HH-RLHF's form, from a file of GPT-2's; the warm-up of it included, as it says."""
    talk = "\n\nHuman: What is {0} and {0}?\n\nAssistant: A number.\n\nHuman: Which?\n\nAssistant: {1}"
    records = [dict(chosen=talk.format(i, f"It is {2 * i}."), rejected=talk.format(i, "No.")) for i in range(6)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tensors = gpt2_tensors(width=64, layers=1)
    path = write(tmp_path, {**tensors, "wpe.weight": torch.zeros(1024, 64)})
    run_script(train_reward.main, RewardConfig, [
        "--preset", "hh-gpt2", "--init", str(path), "--data", str(tmp_path / "talks.jsonl"), "--out", str(tmp_path / "reward"),
        "--tokenizer", str(inputs / "bytes.tiktoken"), "--warmup-sequences", "16", "--normalise-prompts", "2",
        "--max-response-length", "24"])
    run_script(train_policy.main, PolicyConfig, [
        "--preset", "hh-gpt2", "--reward-run", str(tmp_path / "reward"), "--out", str(tmp_path / "policy"),
        "--iterations", "1", "--batch-size", "4", "--minibatch-size", "2", "--best-of-n", "0"])
    metrics = tiny.rows(tmp_path / "reward" / "reward_metrics.jsonl")
    assert [row["stage"] for row in metrics] == ["warmup", "reward", "test"] and "probes" not in metrics[-1]
    assert not torch.equal(tiny.weights(tmp_path / "reward" / "base.pt", "base")["wte.weight"][:ROWS], tensors["wte.weight"])
    assert tiny.rows(tmp_path / "policy" / "policy_metrics.jsonl")[-1]["step"] == 1


@pytest.mark.parametrize("changes, words", [
    (dict(rows=50257), "wte.weight has 50257 rows, but the tokenizer has 257 tokens; GPT-2's weights go with --tokenizer"),
    (dict(context=30), "its context of 24 tokens is shorter than --max-prompt-length + --max-response-length"),
    (dict(file="nowhere.safetensors"), "nowhere.safetensors: No such file or directory; --init takes a checkpoint, or the"),
    (dict(file="pairs.jsonl"), "pairs.jsonl: torn, or not a checkpoint of this program"),
    (dict(file="."), "the folder holds none of model.safetensors"),
])
def test_what_does_not_go_together_is_one_line_with_the_fix(changes, words, inputs, tmp_path, capsys, monkeypatch):
    """Found out before the run folder is made."""
    monkeypatch.chdir(inputs)
    width = 64 if "rows" in changes else WIDTH
    path = changes.get("file") or write(tmp_path, gpt2_tensors(width=width, rows=changes.get("rows", ROWS)))
    config = reward_config(inputs, tmp_path / "run", init=str(path), max_response_length=changes.get("context", 5))
    assert words in refused(capsys, train_reward.main, RewardConfig, as_flags(config))
    assert not (tmp_path / "run").exists()


# ---- tensors that are wrong ------------------------------------------------------------------------------------------


def without(name):
    return lambda t: t.pop(name)


def replaced(name, change):
    return lambda t: t.update({name: change(t[name])})


def poisoned(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("change, words", [
    (without("wte.weight"), "another family's weights (it has no wte.weight, but 'h.0.attn.c_attn.bias')"),
    (without("h.1.mlp.c_fc.bias"), "h.1.mlp.c_fc.bias: is missing"),
    (without("h.1.ln_1.weight"), "'h.1.attn.c_attn.bias' is none of its tensors"),
    (lambda t: [t.pop(name) for name in list(t) if name.startswith("h.")], "h.0.ln_1.weight: is missing"),
    (replaced("h.0.mlp.c_fc.weight", lambda x: x.T), "h.0.mlp.c_fc.weight: its shape [512, 128] does not fit"),
    (replaced("h.0.attn.c_attn.weight", lambda x: x[:, :-1]), "h.0.attn.c_attn.weight: its shape [128, 383] does not fit"),
    (replaced("wpe.weight", lambda x: x[:, :64]), "wpe.weight: its shape [24, 64] does not fit"),
    (replaced("ln_f.bias", lambda x: x[None]), "ln_f.bias: is torch.float32 [1, 128], not 16- or 32-bit floats in 1 dim"),
    (replaced("wte.weight", lambda x: x[:-1]), "wte.weight has 256 rows, but the tokenizer has 257"),
    (lambda t: t.update(gpt2_tensors(width=96)), "wte.weight: its width of 96 is no multiple of 64"),
    (replaced("h.0.ln_2.bias", lambda x: x.bool()), "h.0.ln_2.bias: is torch.bool [128]"),
    (replaced("h.0.ln_2.bias", lambda x: poisoned(x, float("nan"))), "h.0.ln_2.bias: holds a number that is not finite"),
    (replaced("wte.weight", lambda x: poisoned(x, float("inf"))), "wte.weight: holds a number that is not finite"),
    (lambda t: t.update({"lm_head.weight": poisoned(t["wte.weight"], 1.0)}), "lm_head.weight: differs from wte.weight"),
    (lambda t: t.update({"score.weight": t["ln_f.bias"]}), "'score.weight' is none of its tensors"),
    (lambda t: t.update({"transformer.ln_f.bias": t["ln_f.bias"]}), "'ln_f.bias' is there with and without the prefix"),
    (lambda t: t.update({"a\nb": t["ln_f.bias"]}), r"'a\nb' is none of its tensors"),
    (lambda t: t.clear(), "missing|header"),
])
def test_a_tensor_that_does_not_belong_is_named(change, words, form, tmp_path):
    """Loaded all the same, a wrong tensor is a model that talks nonsense, and a day lost to find out why."""
    tensors = gpt2_tensors()
    change(tensors)
    said = refusal(write(tmp_path, tensors, form))
    assert any(part in said for part in words.split("|")), said


@pytest.mark.parametrize("content", [
    lambda t: t["wte.weight"], lambda t: list(t.items()), lambda t: {**t, "ln_f.bias": 3.0}, lambda t: {**t, 7: t["ln_f.bias"]},
    lambda t: {**t, "wte.weight": t["wte.weight"].to_sparse()}, lambda t: {**t, "ln_f.bias": t["ln_f.bias"].to("meta")},
    lambda t: {**t, "wte.weight": torch.zeros(1).expand(ROWS, 2 ** 45)},  # 4 bytes on disk, 10^16 in memory
    lambda t: {**t, "ln_f.bias": t["ln_f.bias"].double()}, lambda t: {"model": t}, lambda t: None,
], ids=range(10))
def test_a_pickled_file_of_another_content_is_refused(content, tmp_path):
    torch.save(content(gpt2_tensors()), tmp_path / "pytorch_model.bin")
    assert "not a whole checkpoint of GPT-2's" in refusal(tmp_path / "pytorch_model.bin")


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2))])
def test_a_payload_is_not_executed(save, tmp_path):
    """A file of weights from a stranger is a program, unless the unpickler is told not to run it."""
    path = tmp_path / "pytorch_model.bin"
    save({**gpt2_tensors(), "x": Payload(tmp_path / "executed")}, path)
    assert "UnpicklingError" in refusal(path)
    assert not (tmp_path / "executed").exists()


# ---- safetensors files that are wrong --------------------------------------------------------------------------------


def entry(**changes):
    return safetensors(gpt2_tensors(), **{"ln_f.bias": changes})


def headed(text, content=b"\0" * 8, length=None):
    text = text if isinstance(text, bytes) else text.encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + content


WHOLE = safetensors(gpt2_tensors())
START = json.loads(WHOLE[8:8 + int.from_bytes(WHOLE[:8], "little")])["ln_f.bias"]["data_offsets"][0]
ONE = '{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'


BROKEN = {
    "empty file": [b""],
    "states a header of": [
        b"\0" * 7, WHOLE[:100], WHOLE[1:], headed("{}", b""), headed("{}", length=2 ** 63), headed("{}", length=2 ** 64 - 1),
        headed(" " * MAX_HEADER + "{}")],
    "Expecting|decode|Extra data|recursion|4300 digits": [
        b"\0" * 9, headed("{"), headed(b"\xff\xfe{}"), headed("{}", length=3), headed("[" * 100_000), headed('{"a": ' * 100_000),
        headed('{"a": ' + "9" * 5000 + "}")],
    "header is no JSON object": [headed("[]"), headed("null"), headed("3")],
    "an object holds one key twice": [headed('{"wte.weight": ' + ONE + ', "wte.weight": ' + ONE + "}")],
    "belong to no tensor": [headed("{}"), WHOLE + b"\0"],
    "overlap others, leave a gap, or are not there": [
        WHOLE[:-1], headed('{"wte.weight": ' + ONE + "}", b"\0" * 7), headed('{"a": ' + ONE + ', "b": ' + ONE + "}"),
        entry(data_offsets=[0, 4 * WIDTH]), entry(data_offsets=[START + 1, START + 1 + 4 * WIDTH])],
    "malformed, empty, or of another type": [
        headed('{"a": ' + text + "}") for text in (
            "{}", "3", "NaN", '"x\\ny"', "[1, 2, 3]", ONE.replace("[2]", f"[{'9' * 4000}]"), ONE.replace("[2]", "[2, 0]"),
            ONE.replace("[2]", str([1] * 99 + [2])), ONE.replace("[0, 8]", "[8, 0]"), ONE.replace("[0, 8]", "[0, 0]"))] + [
        entry(**change) for change in (
            dict(dtype="F64"), dict(dtype="I8"), dict(dtype=3), dict(dtype=None), dict(dtype=["F32"]), dict(shape=[WIDTH + 1]),
            dict(shape=[-WIDTH]), dict(shape=[float(WIDTH)]), dict(shape=[True]), dict(shape="128"), dict(shape=None),
            dict(shape=[[WIDTH]]), dict(data_offsets=[START]), dict(data_offsets=[START, 2 ** 60]), dict(data_offsets=None),
            dict(data_offsets=[-4 * WIDTH, 0]), dict(data_offsets=[START, START]), dict(data_offsets={"0": 1}))],
}
CASES = [(words, content) for words, contents in BROKEN.items() for content in contents]


@pytest.mark.parametrize("words, content", CASES, ids=range(len(CASES)))
def test_a_safetensors_file_that_breaks_the_format_is_refused(words, content, tmp_path):
    """Lengths and offsets are a stranger's numbers: each is checked before memory is asked for or read."""
    (tmp_path / "x.safetensors").write_bytes(content)
    said = refusal(tmp_path / "x.safetensors")
    assert "not a whole checkpoint of GPT-2's" in said and any(part in said for part in words.split("|")), said


def test_offsets_need_not_be_aligned(tmp_path):
    """The header's length is the writer's choice: numbers may begin at any byte."""
    tensors = gpt2_tensors()
    wanted = load(write(tmp_path, tensors)).state_dict()
    for blanks in range(1, 4):
        length = int.from_bytes(WHOLE[:8], "little")
        (tmp_path / "x.safetensors").write_bytes((length + blanks).to_bytes(8, "little") + WHOLE[8:8 + length] + b" " * blanks
                                                 + WHOLE[8 + length:])
        found = load(tmp_path / "x.safetensors").state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("form, rounds", [("safetensors", 400), ("bin", 150)])
def test_a_damaged_file_loads_or_is_refused_in_one_line(form, rounds, tmp_path):
    """Bytes changed, cut out, doubled or lost at the end, most of them where the structure is."""
    path = write(tmp_path, gpt2_tensors(width=64, layers=1), form)
    whole, chance, refusals = path.read_bytes(), random.Random(0), 0
    structure = 8 + int.from_bytes(whole[:8], "little") if form == "safetensors" else 3000
    for _ in range(rounds):
        content = bytearray(whole)
        for _ in range(chance.choice((1, 1, 3))):
            place = chance.randrange(structure) if chance.random() < 0.9 else chance.randrange(len(content))
            if form == "bin" and chance.random() < 0.3:
                place = len(content) - 1 - place  # the directory of a zip file is at its end
            action, size = chance.randrange(5), chance.choice((1, 1, 4, 40))
            if action == 0:
                del content[place:place + size]
            elif action == 1:
                content[place:place] = content[place:place + size]
            elif action == 2 and chance.random() < 0.2:
                del content[place:]
            else:
                content[place:place + 1] = bytes([chance.choice((0, 255, chance.randrange(256), *b'0123456789"[]{},:'))])
        path.write_bytes(content)
        try:
            load(path)
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error) and len(str(error)) < 500 + len(str(path))
    assert rounds / 2 < refusals < rounds
