"""Pretrained weights: read correctly for every family; a bad file is refused in one line."""

import json
import random

import train_policy
import train_reward
from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data.batches import pad_left
from minirlhf.data.tokenizer import fingerprint, load_tokenizer, pad_id
from minirlhf.model import ModelConfig, Transformer, load_pretrained
from minirlhf.model.generate import generate
from minirlhf.model.loading import load_model
from minirlhf.model.pretrained import MAX_HEADER, load_weights
from minirlhf.run.command_line import run_script
from minirlhf.run.errors import UserError
from minirlhf.tools.trained import load_trained, training_splits

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_pretrained_tokenizer import tokenizer_json
from test_pretrained_tokenizer import write as write_tokenizer
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


# ---- files ---------------------------------------------------------------------------------------


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


def gpt2_options(tensors, **changes):
    """config.json of gpt2_tensors."""
    width = tensors["wte.weight"].shape[1]
    sizes = dict(n_layer=sum(name.endswith("ln_1.weight") for name in tensors), n_embd=width)
    sizes |= dict(n_head=width // 64, n_positions=len(tensors["wpe.weight"]), n_inner=None)
    options = dict(model_type="gpt2", layer_norm_epsilon=1e-5, activation_function="gelu_new")
    return options | sizes | changes


# Families in Hugging Face's layout: (form in this project, the same in config.json)
ROPE3 = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
SCALED = dict(rope_type="llama3", original_max_position_embeddings=32) | ROPE3
FAMILIES = dict(
    llama=(
        tiny.FORMS["llama"],
        dict(rope_theta=100.0, attention_bias=False, rope_scaling=None, partial_rotary_factor=1.0),
    ),
    llama3=(tiny.FORMS["llama3"], dict(rope_parameters=dict(SCALED, rope_theta=100.0))),
    qwen2=(tiny.FORMS["qwen2"], dict(rope_theta=100.0, use_sliding_window=False, tie=False)),
    qwen3=(tiny.FORMS["qwen3"], dict(rope_theta=100.0, head_dim=6)),
)


def their_tensors(model, seed=0):
    """Random weights of a model of Llama's form, under Hugging Face's names."""
    c = model.config
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    queries, keys = c.n_head * c.head_width, c.kv_heads * c.head_width
    for i, block in enumerate(model.blocks):
        name = f"model.layers.{i}."
        for kind, weight in block.attention_in.named_parameters():
            parts = weight.split([queries, keys, keys])
            for letter, part in zip("qkv", parts):
                tensors[f"{name}self_attn.{letter}_proj.{kind}"] = part
        tensors[f"{name}self_attn.o_proj.weight"] = block.attention_out.weight
        gate, up = block.mlp_in.weight.chunk(2)
        tensors[f"{name}mlp.gate_proj.weight"] = gate
        tensors[f"{name}mlp.up_proj.weight"] = up
        tensors[f"{name}mlp.down_proj.weight"] = block.mlp_out.weight
        tensors[f"{name}input_layernorm.weight"] = block.ln_1.weight
        tensors[f"{name}post_attention_layernorm.weight"] = block.ln_2.weight
        if c.qk_norm:
            tensors[f"{name}self_attn.q_norm.weight"] = block.ln_q.weight
            tensors[f"{name}self_attn.k_norm.weight"] = block.ln_k.weight
    tensors["model.norm.weight"] = model.ln_f.weight
    tensors["model.embed_tokens.weight"] = model.wte.weight[: c.vocab_size]
    if not c.tied:
        tensors["lm_head.weight"] = model.lm_head.weight[: c.vocab_size]
    return {name: tensor.detach() for name, tensor in tensors.items()}


def family_model(family, vocab=ROWS, rows=TABLE):
    """(a model with random weights and 0 in the heads and for PAD, its tensors, config.json)."""
    form, options = FAMILIES[family]
    model = Transformer(ModelConfig(vocab, rows, 2, d_model=16, context=CONTEXT, **form))
    tensors = their_tensors(model)
    with torch.no_grad():
        for table in {model.wte.weight, model.lm_table}:
            table[vocab:] = 0.0
        for head in (model.reward_head, model.value_head):
            for weight in head.parameters():
                weight.zero_()
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    sizes |= dict(intermediate_size=24, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5)
    options = dict(options, model_type=family.removesuffix("3") if family == "llama3" else family)
    options["tie_word_embeddings"] = options.pop("tie", True)
    return model, tensors, dict(hidden_act="silu") | sizes | options


def write(folder, tensors, options=None, shards=1):
    """config.json and the tensors, in one file or in several; returns the folder."""
    folder.mkdir(exist_ok=True)
    options = gpt2_options(tensors) if options is None else options
    (folder / "config.json").write_text(json.dumps(options))
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors(tensors))
        return folder
    files = {}
    for i, name in enumerate(tensors):
        files[name] = f"model-{i * shards // len(tensors) + 1:05d}-of-{shards:05d}.safetensors"
    for file in set(files.values()):
        part = {name: tensors[name] for name in tensors if files[name] == file}
        (folder / file).write_bytes(safetensors(part))
    index = dict(metadata=dict(total_size=1), weight_map=files)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load(folder, **settings):
    return load_weights(folder, ROWS, TABLE, **settings)


def assert_equal_tensors(tensors, expected):
    assert tensors.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []


def refusal(folder):
    """The error message for a folder: one line that names it."""
    with pytest.raises(UserError) as error:
        load(folder)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    assert len(message) < 500 + len(str(folder))
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


def test_logits_of_gpt2_are_those_of_the_published_equations(tmp_path):
    """No shape check can detect that a square matrix is not transposed."""
    tensors = gpt2_tensors()
    model = load(write(tmp_path, tensors))
    ids = torch.randint(0, ROWS, (CONTEXT,), generator=torch.Generator().manual_seed(1))
    logits = model(ids[None], torch.ones(1, CONTEXT, dtype=torch.bool))[0] @ model.lm_weight.T
    expected = published_logits(tensors, ids)
    assert expected.std() > 0.5
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_read_in_its_form(family, shards, tmp_path):
    """Sizes, options and every weight, from one file or several; see also test_parity."""
    expected, tensors, options = family_model(family)
    model = load(write(tmp_path, tensors, options, shards))
    assert model.config == expected.config
    assert_equal_tensors(model.state_dict(), expected.state_dict() | {})
    assert all(weight.requires_grad and weight.is_leaf for weight in model.parameters())


def test_sizes_come_from_the_file_and_all_other_weights_are_0(tmp_path):
    """Rows from PAD on are 0, and so are reward and value head: the first loss is ln 2."""
    model = load(write(tmp_path, gpt2_tensors(layers=3)))
    sizes = dict(n_layer=3, n_head=2, d_model=WIDTH, context=CONTEXT)
    assert model.config == ModelConfig(vocab_size=ROWS, table_rows=TABLE, **sizes)
    additional_rows = model.wte.weight[ROWS:]
    assert additional_rows.shape == (TABLE - ROWS, WIDTH)
    assert not additional_rows.any()
    for head in (model.reward_head, model.value_head):
        assert not any(weight.any() for weight in head.parameters())
    assert (model.score_shift, model.score_scale) == (0.0, 1.0)
    for weight in model.parameters():
        assert weight.requires_grad and weight.is_leaf
        assert weight.dtype == torch.float32


def test_a_table_with_more_rows_than_tokens_keeps_them_outside_the_softmax(tmp_path):
    """Qwen's tables have hundreds of unused rows. PAD is the first of them."""
    tensors = gpt2_tensors(rows=384)
    model = load(write(tmp_path, tensors))
    assert (model.config.vocab_size, model.config.table_rows) == (ROWS, 384)
    assert torch.equal(model.wte.weight, tensors["wte.weight"])
    assert model.lm_weight.shape == (ROWS, WIDTH)


def test_prefix_tied_head_and_causal_masks_change_nothing(tmp_path):
    """Public files of the same weights differ in these details."""
    tensors = gpt2_tensors()
    expected = load(write(tmp_path / "plain", tensors)).state_dict()
    others = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    others |= {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 5, 5).tril(),
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
        "transformer.h.2.attn.bias": torch.ones(5, 5).bool(),
        "transformer.h.3.attn.bias": torch.ones(3, dtype=torch.uint8),
        "lm_head.weight": tensors["wte.weight"].clone(),
    }
    loaded = load(write(tmp_path / "others", others, gpt2_options(tensors))).state_dict()
    assert_equal_tensors(loaded, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_files_are_converted_exactly(dtype, tmp_path):
    """Every 16-bit number is also a 32-bit number; and weights may stay in 16 bits."""
    short = {name: tensor.to(dtype) for name, tensor in gpt2_tensors().items()}
    as_float32 = {name: tensor.float() for name, tensor in short.items()}
    expected = load(write(tmp_path / "float32", as_float32)).state_dict()
    folder = write(tmp_path / "short", short)
    assert_equal_tensors(load(folder).state_dict(), expected)
    kept = load(folder, dtype=dtype).state_dict()
    assert {tensor.dtype for tensor in kept.values()} == {dtype}
    assert_equal_tensors({name: x.float() for name, x in kept.items()}, expected)


def test_the_model_does_not_change_with_the_file(tmp_path):
    """The weights must be a copy: memory-mapped weights would change with the file."""
    path = write(tmp_path, gpt2_tensors()) / "model.safetensors"
    model = load(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert_equal_tensors(model.state_dict(), before)


# ---- both scripts --------------------------------------------------------------------------------


def pretrained_folder(folder, **changes):
    """A folder with a tokenizer of 264 tokens and a model of 264 rows."""
    model, tensors, options = family_model("qwen3", vocab=264)
    write(folder, tensors, options | changes)
    write_tokenizer(folder, tokenizer_json())
    return model


def test_load_pretrained_gives_model_and_tokenizer(tmp_path):
    """The interface for other programs: logits of a text, and sampling."""
    expected = pretrained_folder(tmp_path)
    model, encoding = load_pretrained(tmp_path)
    assert (encoding.n_vocab, pad_id(encoding)) == (264, 264)
    ids, mask = pad_left([encoding.encode_ordinary("the end"), [5]], pad_id(encoding))
    logits = model(ids, mask) @ model.lm_weight.T
    assert torch.equal(logits[mask], (expected(ids, mask) @ expected.lm_weight.T)[mask])
    response, _ = generate(model, ids, mask, 3, encoding.eot_token, pad_id(encoding))
    assert response.shape[0] == 2


@pytest.mark.parametrize("by_file", [False, True])
def test_both_scripts_start_from_a_pretrained_folder(by_file, inputs, tmp_path, capsys):
    """With its tokenizer. Without --sft-init, base.pt has exactly its weights and full context."""
    folder = tmp_path / "qwen3"
    expected = pretrained_folder(folder)
    init = str(folder / "model.safetensors" if by_file else folder)
    config = reward_config(inputs, tmp_path / "run", init=init, tokenizer="auto")
    result = train_reward.main(config)
    assert f"{folder}: 2 layers of 4 heads, width 16, context 24" in capsys.readouterr().out
    encoding = load_tokenizer(str(folder))
    base, _ = load_model(tmp_path / "run" / "base.pt", "base", fingerprint(encoding))
    assert base.config == expected.config
    assert_equal_tensors(base.state_dict(), expected.state_dict())
    stages = {row["stage"] for row in tiny.rows(tmp_path / "run" / "reward_metrics.jsonl")}
    assert stages == {"reward", "test"}
    assert result["pairs"] == 12
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    assert content["settings"]["tokenizer"] == str(folder)
    files = [content["facts"][f"initial model {number}"] for number in (1, 2)]
    assert files[0].endswith(f"  {folder / 'config.json'}")
    assert files[1].endswith(f"  {folder / 'model.safetensors'}")
    train_policy.main(policy_config(tmp_path / "run", tmp_path / "policy"))
    # a later run that starts from this one has the same tokenizer without being told
    again = dict(init=str(tmp_path / "run"), tokenizer="auto")
    train_reward.main(reward_config(inputs, tmp_path / "again", **again))


@pytest.mark.parametrize("kind", ["model", "rank file"])
def test_a_copied_run_needs_no_file_outside_its_folder(kind, tmp_path, capsys):
    """It has a copy of its tokenizer. Data is large, so the user puts it into inputs/."""
    source = tmp_path / "source"
    source.mkdir()
    tiny.write_inputs(source)
    pretrained_folder(source / "qwen3")
    changes = dict(task="none", test_data=(str(source / "pairs.jsonl"),))
    if kind == "model":
        changes |= dict(init=str(source / "qwen3"), tokenizer="auto")
    train_reward.main(reward_config(source, tmp_path / "reward", **changes))
    source.rename(tmp_path / "elsewhere")
    flags = as_flags(policy_config(tmp_path / "reward", tmp_path / "policy", task=""))
    inputs = tmp_path / "reward" / "inputs"
    message = refused(capsys, train_policy.main, PolicyConfig, flags)
    assert f"{source / 'pairs.jsonl'}: cannot be read (No such file or directory)" in message
    assert f"if it has moved, put a copy or a link into {inputs}\n" in message
    (inputs / "pairs.jsonl").symlink_to(tmp_path / "elsewhere" / "pairs.jsonl")
    train_policy.main(policy_config(tmp_path / "reward", tmp_path / "policy", task=""))
    trained = load_trained(str(tmp_path / "policy"), torch.device("cpu"), "")
    assert len(training_splits(trained).test) == 40


def test_the_dialogue_preset_runs_with_a_smaller_model(inputs, tmp_path):
    """--preset hh with transcripts as in HH-RLHF and a GPT-2 file, which it fine-tunes."""
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
    path = write(tmp_path / "gpt2", {**tensors, "wpe.weight": torch.zeros(1024, 64)})
    flags = f"--preset hh --init {path} --data {data} --out {tmp_path / 'reward'}"
    flags += f" --tokenizer {inputs / 'bytes.tiktoken'} --sft-sequences 16"
    flags += " --normalize-prompts 2 --max-response-length 24"
    run_script(train_reward.main, RewardConfig, flags.split())
    flags = f"--preset hh --reward-run {tmp_path / 'reward'} --out {tmp_path / 'policy'}"
    flags += " --iterations 1 --batch-size 4 --minibatch-size 2 --best-of-n 0"
    run_script(train_policy.main, PolicyConfig, flags.split())
    metrics = tiny.rows(tmp_path / "reward" / "reward_metrics.jsonl")
    assert [row["stage"] for row in metrics] == ["sft", "reward", "test"]
    assert "probes" not in metrics[-1]
    base = tiny.weights(tmp_path / "reward" / "base.pt", "base")
    assert not torch.equal(base["wte.weight"][:ROWS], tensors["wte.weight"])
    assert tiny.rows(tmp_path / "policy" / "policy_metrics.jsonl")[-1]["step"] == 1


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            dict(tokenizer="helpdesk"),
            "has 257 rows, but the tokenizer has 689 tokens; use the model's own tokenizer",
        ),
        (
            dict(max_response_length=30),
            "of 24 tokens is shorter than --max-prompt-length + --max-response-length = 36; lower",
        ),
        (dict(tokenizer="auto"), "contains no tokenizer.json and no tokenizer.model"),
        (dict(n_layer=3), "--n-layer 3: the sizes are those of --init; leave it out"),
        (dict(d_model=64), "--d-model 64: the sizes are those of --init"),
        (dict(init="nowhere"), "--init nowhere: no such file or folder; download a model first"),
        (dict(init="nowhere/model.safetensors"), "nowhere: contains neither model.safetensors nor"),
        (dict(init="pairs.jsonl"), "pairs.jsonl: incomplete, or not a checkpoint of this program"),
        (dict(init="."), "contains neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_a_start_model_that_does_not_fit_is_refused_before_any_work(
    settings, words, inputs, tmp_path, capsys, monkeypatch
):
    """One line names the problem and the fix, and no run folder is made."""
    monkeypatch.chdir(inputs)
    init = str(write(tmp_path / "gpt2", gpt2_tensors()))
    config = reward_config(inputs, tmp_path / "run", **{**dict(init=init), **settings})
    assert words in refused(capsys, train_reward.main, RewardConfig, as_flags(config))
    assert not (tmp_path / "run").exists()


# ---- wrong options -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model_type="gemma"), "model_type is 'gemma', which is not supported; use a model of"),
        (dict(model_type="qwen3_moe"), "model_type is 'qwen3_moe'"),
        (dict(model_type=None), "model_type is None"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu', which is not supported"),
        (dict(attention_bias=True), "attention_bias is True"),
        (dict(mlp_bias=True), "mlp_bias is True"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
        (dict(activation_function="relu"), "activation_function is 'relu'"),
        (dict(scale_attn_weights=False), "scale_attn_weights is False"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
        (dict(use_sliding_window=True), "use_sliding_window is True"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "some layer_types are not"),
        (dict(quantization_config=dict(bits=4)), "quantization_config is {'bits': 4}"),
        (dict(rope_scaling=dict(type="yarn")), "rope_scaling of type 'yarn' is not supported"),
        (dict(rope_parameters=dict(rope_type="linear")), "rope_scaling of type 'linear'"),
        (dict(rope_scaling=dict(rope_type="llama3")), "factor is None, not a positive float"),
        (dict(rope_scaling=8), "rope_scaling is 8"),
        (dict(num_hidden_layers=3), "layers.2.input_layernorm.weight: is missing"),
        (dict(num_hidden_layers=1), "'layers.1.input_layernorm.weight' is not a tensor of this"),
        (dict(num_attention_heads=2), "layers.0.self_attn.q_proj.weight: its shape [24, 16] does"),
        (dict(num_key_value_heads=4), "layers.0.self_attn.k_proj.weight: its shape [12, 16] does"),
        (dict(num_key_value_heads=3), "4 heads of width 6 do not fit 3 key-value heads"),
        (dict(head_dim=5), "4 heads of width 5 do not fit"),
        (dict(head_dim=2**23), "4 heads of width 8388608 do not fit"),
        (dict(hidden_size=32), "embed_tokens.weight: its shape [257, 16] does not fit"),
        (dict(hidden_size="16"), "hidden_size is '16', not a positive int"),
        (dict(hidden_size=2**40), "hidden_size is 1099511627776, not a positive int"),
        (dict(intermediate_size=16.0), "intermediate_size is 16.0, not a positive int"),
        (dict(max_position_embeddings=True), "max_position_embeddings is True"),
        (dict(rms_norm_eps=-1e-6), "rms_norm_eps is -1e-06, not a positive float"),
        (dict(rope_theta=None), "rope_theta is None"),
        (dict(tie_word_embeddings=False), "lm_head.weight: is missing"),
        (dict(vocab_size=258), "its 257 rows are fewer than config.json's vocab_size"),
    ],
    ids=str,
)
def test_an_option_that_is_not_supported_or_does_not_fit_is_named(changes, words, tmp_path):
    """Another activation, attention or position would give a model of nonsense without an error."""
    _, tensors, options = family_model("qwen3")
    assert words in refusal(write(tmp_path, tensors, options | changes))


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"a": ' * 100_000])
def test_a_config_file_that_is_not_an_object_is_refused(text, tmp_path):
    write(tmp_path, gpt2_tensors())
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in refusal(tmp_path)


def test_a_folder_without_one_of_its_files_is_refused(tmp_path):
    """Each message names the file that is missing."""
    folder = write(tmp_path, gpt2_tensors(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors: No such file or directory" in refusal(folder)
    (folder / "config.json").unlink()
    (folder / "model.safetensors.index.json").unlink()
    message = refusal(folder)
    assert "contains neither model.safetensors nor model.safetensors.index" in message
    assert "merge a LoRA adapter first" in message
    (folder / "model.safetensors").write_bytes(safetensors(gpt2_tensors()))
    assert "config.json: no such file" in refusal(folder)


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"weight_map": 3}', "its weight_map does not name files of this folder"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "its weight_map does not name files"),
        ('{"weight_map": {"a": 3}}', "its weight_map does not name files"),
        ("{}", "contains neither model.safetensors nor"),
        ("{", "cannot be read as JSON"),
        ('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}', "is also in another file"),
    ],
)
def test_a_wrong_index_is_refused(content, words, tmp_path):
    tensors = gpt2_tensors()
    (tmp_path / "config.json").write_text(json.dumps(gpt2_options(tensors)))
    (tmp_path / "model.safetensors.index.json").write_text(content)
    for number in (1, 2):
        (tmp_path / f"{number}.safetensors").write_bytes(safetensors(tensors))
    assert words in refusal(tmp_path)


# ---- wrong tensors -------------------------------------------------------------------------------


def without(name):
    return lambda t: t.pop(name)


def replaced(name, change):
    return lambda t: t.update({name: change(t[name])})


def with_last_value(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


@pytest.mark.parametrize(
    "change, words",
    [
        (without("wte.weight"), "wte.weight: is missing"),
        (without("h.1.mlp.c_fc.bias"), "h.1.mlp.c_fc.bias: is missing"),
        (without("h.1.ln_1.weight"), "h.1.ln_1.weight: is missing"),
        (replaced("h.0.mlp.c_fc.weight", lambda x: x.T), "its shape [512, 128] does not fit"),
        (
            replaced("h.0.attn.c_attn.weight", lambda x: x[:, :-1]),
            "h.0.attn.c_attn.weight: its shape [128, 383] does not fit",
        ),
        (replaced("wpe.weight", lambda x: x[:, :64]), "wpe.weight: its shape [24, 64] does not"),
        (replaced("ln_f.bias", lambda x: x[None]), "ln_f.bias: its shape [1, 128] does not fit"),
        (replaced("ln_f.bias", lambda x: x[0]), "ln_f.bias: is torch.float32 [], not a vector"),
        (replaced("wte.weight", lambda x: x[0, 0]), "wte.weight: is missing"),
        (replaced("wte.weight", lambda x: x[:, 0]), "wte.weight: its shape [257] does not fit"),
        (replaced("wte.weight", lambda x: x[:-1]), "wte.weight has 256 rows, but the tokenizer"),
        (
            replaced("wte.weight", lambda x: x.repeat(5, 1)),
            "wte.weight has 1285 rows, but the tokenizer has 257 tokens",
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
            "lm_head.weight: differs from the token table, but config.json says that they are tied",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["wte.weight"].half()}),
            "lm_head.weight: differs from the token table",
        ),
        (
            lambda t: t.update({"score.weight": t["ln_f.bias"]}),
            "'score.weight' is not a tensor of this model family",
        ),
        (
            lambda t: t.update({"transformer.ln_f.bias": t["ln_f.bias"]}),
            "'ln_f.bias' occurs with and without the prefix",
        ),
        (lambda t: t.update({"a\nb": t["ln_f.bias"]}), r"'a\nb' is not a tensor of this"),
        (lambda t: t.clear(), "states a header of"),
    ],
)
def test_a_wrong_tensor_is_named(change, words, tmp_path):
    """A wrong tensor that loads would give a model of nonsense without any error."""
    tensors = gpt2_tensors()
    options = gpt2_options(tensors)
    change(tensors)
    assert words in refusal(write(tmp_path, tensors, options))


@pytest.mark.parametrize("part", ["mlp.gate_proj", "mlp.up_proj", "self_attn.v_proj"])
def test_only_the_tensor_that_is_not_finite_is_named(part, tmp_path):
    """Several tensors of a file become one of this model."""
    _, tensors, options = family_model("qwen3")
    name = f"model.layers.1.{part}.weight"
    tensors[name] = with_last_value(tensors[name], float("nan"))
    message = refusal(write(tmp_path, tensors, options))
    assert f"({name.removeprefix('model.')}: contains a number that is not finite)" in message


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
    "has a dtype other than F32, F16, BF16, BOOL, U8, such as quantized weights": [
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
    write(tmp_path, gpt2_tensors())
    (tmp_path / "model.safetensors").write_bytes(content)
    message = refusal(tmp_path)
    assert "model.safetensors: " in message or "damaged, incomplete or unsupported" in message
    assert any(part in message for part in words.split("|")), message


def test_offsets_need_not_be_aligned(tmp_path):
    """The header can have any length, so numbers can start at any byte."""
    expected = load(write(tmp_path, gpt2_tensors())).state_dict()
    for blanks in range(1, 4):
        header = COMPLETE[8 : 8 + HEADER_LENGTH] + b" " * blanks
        numbers = COMPLETE[8 + HEADER_LENGTH :]
        content = len(header).to_bytes(8, "little") + header + numbers
        (tmp_path / "model.safetensors").write_bytes(content)
        assert_equal_tensors(load(tmp_path).state_dict(), expected)


@pytest.mark.parametrize("name, rounds", [("model.safetensors", 400), ("config.json", 200)])
def test_a_damaged_file_loads_or_is_refused_in_one_line(name, rounds, tmp_path):
    """Bytes are changed, deleted, repeated or cut off, most of them in the header."""
    _, tensors, options = family_model("llama3")
    path = write(tmp_path, tensors, options) / name
    complete = path.read_bytes()
    rng = random.Random(0)
    refusals = 0
    structure = len(complete)
    if name == "model.safetensors":
        structure = 8 + int.from_bytes(complete[:8], "little")
    for _ in range(rounds):
        content = bytearray(complete)
        for _ in range(rng.choice((1, 1, 3))):
            in_structure = rng.random() < 0.9
            start = rng.randrange(structure if in_structure else len(content))
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
            load(tmp_path)
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error)
            assert len(str(error)) < 500 + len(str(tmp_path))
    assert rounds / 2 < refusals < rounds
