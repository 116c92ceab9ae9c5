"""Checkpoints: a file is complete or refused in one line that names it, and never executed."""

import errno
import hashlib
import io
import json
import os
import pickle
import random

import minirlhf
from minirlhf.model.loading import load_model, save_model
from minirlhf.model.transformer import ModelConfig, Transformer
from minirlhf.run.checkpoint import (
    FORMAT,
    SEAL_LENGTH,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    save_step,
)
from minirlhf.run.errors import UserError
from minirlhf.run.files import write_atomically

import pytest
import torch
from tiny import contents

STATES = dict(
    model=dict(a=torch.arange(6.0).view(2, 3), b=torch.tensor(3)),
    optimizer=dict(step=[1, 2], lr=0.1),
)


def sealed(payload: bytes) -> bytes:
    """The payload with a valid checksum, which a malicious file can have as well."""
    return payload + f"\nminirlhf sha256 {hashlib.sha256(payload).hexdigest()}".encode()


def archive(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def refusal(path, kind="policy") -> str:
    with pytest.raises(UserError) as error:
        load_checkpoint(path, kind)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


# ---- complete files ------------------------------------------------------------------------------


def test_loaded_states_equal_saved_states_bit_for_bit(tmp_path):
    """Special floats must not change. A text format would round them."""
    states = dict(
        model=dict(
            x=torch.tensor([1 / 3, -0.0, 3e38, 1e-45]), half=torch.ones(2, dtype=torch.bfloat16)
        )
    )
    meta = dict(step=3, kl_coef=0.1 + 0.2, none=None, text="\u00fc\ud800")
    save_checkpoint(tmp_path / "x.pt", "policy", meta, states)
    loaded_meta, loaded = load_checkpoint(tmp_path / "x.pt", "policy")
    assert loaded_meta == meta
    for name, tensor in states["model"].items():
        other = loaded["model"][name]
        assert other.dtype == tensor.dtype
        assert other.view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pt"]


def test_equal_states_make_equal_files(tmp_path):
    """Two runs can then be compared by their files."""
    for name in ("a.pt", "b.pt"):
        save_checkpoint(tmp_path / name, "policy", dict(step=1), STATES)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


@pytest.mark.parametrize("broken", ["fsync", "replace", "write"])
def test_a_write_that_fails_keeps_the_old_file(broken, tmp_path, monkeypatch):
    """If the file were overwritten in place, a full disk would destroy the old checkpoint too."""
    path = tmp_path / "x.pt"
    save_checkpoint(path, "policy", dict(step=1), STATES)
    before = contents(tmp_path)

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    class FullDisk(io.FileIO):
        def write(self, content):
            super().write(content[: len(content) // 2])
            fail()

    if broken == "write":
        monkeypatch.setattr("builtins.open", lambda path, mode: FullDisk(path, mode))
    else:
        monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError):
        save_checkpoint(path, "policy", dict(step=2), STATES)
    assert contents(tmp_path) == before


def test_content_is_flushed_before_the_file_is_renamed(tmp_path, monkeypatch):
    """In the other order, a power cut could leave an empty file under the final name."""
    calls = []
    fsync = os.fsync
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write_atomically(tmp_path / "x", b"content")
    assert calls == ["fsync", "replace", "fsync"]
    assert (tmp_path / "x").read_bytes() == b"content"


# ---- damaged files -------------------------------------------------------------------------------


def test_every_truncation_is_detected(tmp_path):
    """A full disk or an interrupted copy can cut a file at any byte."""
    save_checkpoint(tmp_path / "x.pt", "policy", dict(step=1), STATES)
    content = (tmp_path / "x.pt").read_bytes()
    for length in [
        *range(0, 100),
        *range(100, len(content), 97),
        *range(len(content) - 100, len(content)),
    ]:
        cut = tmp_path / f"{length}.pt"  # a new file: some file systems flush an overwritten one
        cut.write_bytes(content[:length])
        assert "incomplete" in refusal(cut)


def test_every_flipped_bit_is_detected(tmp_path):
    """One bit of an exponent can make a weight 10^30, and torch.load would accept it."""
    save_checkpoint(tmp_path / "x.pt", "policy", dict(step=1), STATES)
    content = (tmp_path / "x.pt").read_bytes()
    rng = random.Random(0)
    for index in [*rng.sample(range(len(content)), 200), *range(len(content) - 82, len(content))]:
        flipped = bytearray(content)
        flipped[index] ^= 1 << rng.randrange(8)
        (tmp_path / f"{index}.pt").write_bytes(flipped)
        refusal(tmp_path / f"{index}.pt")


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x00" * 500, b"PK\x03\x04" + b"\x00" * 500, archive(STATES)]
)
def test_a_file_of_another_program_is_refused(content, tmp_path):
    """Examples are an empty file, an image, or a checkpoint without the seal."""
    (tmp_path / "x.pt").write_bytes(content)
    assert "not a checkpoint of this program" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        archive(torch.zeros(3)),
        archive([]),
        archive(None),
        archive({}),
        archive(dict(kind="policy")),
        archive(dict(format=FORMAT, kind="policy", meta="{", states={})),
        archive(dict(format=FORMAT, kind="policy", meta="3", states={})),
        archive(dict(format=FORMAT, kind="policy", meta="[" * 100_000, states={})),
        archive(dict(format=FORMAT, kind="policy", meta="{}", states=[])),
        archive(dict(format=3, kind="policy", meta="{}", states={})),
        b"\x80\x02.",
        b"\x80\x02}q\x00",
        pickle.dumps(STATES["optimizer"]),
        archive(STATES)[:-30],
        b"\x80\x02cos\nsystem\n.",
    ],
    ids=range(17),
)
def test_a_file_with_a_valid_checksum_and_other_content_is_refused(content, tmp_path):
    """A valid checksum shows that a file is complete, not that this program wrote it."""
    (tmp_path / "x.pt").write_bytes(sealed(content))
    assert "refused" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "file_format, version",
    [("minirlhf 1", "1"), ("minirlhf 1.0.5", "1.0.5"), ("minirlhf 9", "9")],
)
def test_a_checkpoint_of_another_version_is_refused_with_both_versions(
    file_format, version, tmp_path
):
    """Weights and states could have another meaning in another version."""
    content = archive(dict(format=file_format, kind="policy", meta="{}", states=STATES))
    (tmp_path / "x.pt").write_bytes(sealed(content))
    expected = f"written by minirlhf {version}, but this is minirlhf {minirlhf.__version__};"
    assert expected in refusal(tmp_path / "x.pt")


def test_a_checkpoint_has_the_version_in_its_format(tmp_path):
    """Another version of the program needs it for its error message."""
    assert FORMAT == f"minirlhf {minirlhf.__version__}"
    save_checkpoint(tmp_path / "x.pt", "policy", {}, STATES)
    content = (tmp_path / "x.pt").read_bytes()
    assert torch.load(io.BytesIO(content[:-SEAL_LENGTH]), weights_only=True)["format"] == FORMAT


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("where", ["pickle", "archive", "states", "meta"])
def test_a_pickle_with_a_payload_is_refused_and_not_executed(where, tmp_path):
    """torch.load without weights_only executes what a file contains."""
    payload = Payload(tmp_path / "executed")
    checkpoint = dict(format=FORMAT, kind="policy", meta="{}", states=STATES)
    content = {
        "pickle": lambda: pickle.dumps(payload),
        "archive": lambda: archive(payload),
        "states": lambda: archive(dict(checkpoint, states=dict(STATES, x=payload))),
        "meta": lambda: archive(dict(checkpoint, meta=payload)),
    }[where]()
    (tmp_path / "x.pt").write_bytes(sealed(content))
    assert "refused" in refusal(tmp_path / "x.pt")
    assert not (tmp_path / "executed").exists()
    # without the restriction the payload works
    torch.load(io.BytesIO(archive(payload)), weights_only=False)
    assert (tmp_path / "executed").exists()


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    """The folder of an unfinished run has no reward.pt."""
    assert "No such file" in refusal(tmp_path / "reward.pt")
    assert "directory" in refusal(tmp_path)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    """A base model has a reward head too, but its scores are all 0."""
    save_checkpoint(tmp_path / "base.pt", "base", {}, STATES)
    assert "contains a base model, not a reward model" in refusal(tmp_path / "base.pt", "reward")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["model", "optimizer"])
def test_a_number_that_is_not_finite_is_neither_saved_nor_loaded(place, number, tmp_path):
    """A resumed run would repeat the error, and a later run would start from NaN."""
    moments = {0: dict(exp_avg=torch.zeros(2))}
    states = dict(model=dict(a=torch.zeros(2, 3)), optimizer=dict(state=moments))
    (states["model"]["a"][1] if place == "model" else moments[0]["exp_avg"])[1] = number
    name = dict(model="model a", optimizer="optimizer state 0 exp_avg")[place]
    with pytest.raises(UserError, match=f"not saved, because {name} is not finite"):
        save_checkpoint(tmp_path / "x.pt", "policy", {}, states)
    assert list(tmp_path.iterdir()) == []
    content = dict(format=FORMAT, kind="policy", meta="{}", states=states)
    (tmp_path / "x.pt").write_bytes(sealed(archive(content)))
    assert f"{name} is not finite" in refusal(tmp_path / "x.pt")


# ---- models --------------------------------------------------------------------------------------


SIZES = ModelConfig(vocab_size=11, table_rows=64, n_layer=1, n_head=2, d_model=8, context=6)


def test_a_loaded_model_has_its_sizes_and_the_scale_of_its_scores(tmp_path):
    """Without shift and scale, kl_coef would have another meaning."""
    model = Transformer(SIZES, seed=3)
    model.score_shift.fill_(1.5)
    model.score_scale.fill_(0.25)
    save_model(tmp_path / "reward.pt", "reward", model, dict(tokenizer="t"))
    loaded, meta = load_model(tmp_path / "reward.pt", "reward", "t")
    assert loaded.config == SIZES
    assert meta["tokenizer"] == "t"
    states = loaded.state_dict()
    assert all(torch.equal(tensor, states[name]) for name, tensor in model.state_dict().items())
    assert (loaded.score_shift, loaded.score_scale) == (1.5, 0.25)


def test_a_model_trained_with_another_tokenizer_is_refused(tmp_path):
    """The run would work, but every id would mean another word."""
    save_model(tmp_path / "base.pt", "base", Transformer(SIZES), dict(tokenizer="t"))
    with pytest.raises(UserError, match="another tokenizer"):
        load_model(tmp_path / "base.pt", "base", "u")


@pytest.mark.parametrize(
    "change",
    [
        dict(d_model=16),
        dict(n_layer=2),
        dict(table_rows=128),
        dict(context=5),
        dict(n_layer=0),
        dict(n_layer=10**9),
        dict(n_head=0),
        dict(n_head=3),
        dict(n_head=True, d_model=None),
        dict(n_head=True),
        dict(vocab_size=True),
        dict(n_kv_head=3),
        dict(d_model=2**40),
        dict(vocab_size="11"),
        dict(vocab_size=65),
        dict(vocab_size=0),
        dict(context=-1),
        dict(norm_eps=float("nan")),
        dict(norm_eps="1"),
        dict(rope_scaling=(1.0,)),
        dict(rope_scaling=("a", "b", "c", "d")),
        dict(biases=3),
        dict(d_model="8"),
        dict(depth=3),
        None,
    ],
)
def test_tensors_of_another_shape_are_refused(change, tmp_path):
    """The error is one line, not PyTorch's list of all tensors that do not fit."""
    model = Transformer(SIZES)
    sizes = None if change is None else {**vars(SIZES), **change}
    save_checkpoint(
        tmp_path / "base.pt",
        "base",
        dict(tokenizer="t", model=sizes),
        dict(model=model.state_dict()),
    )
    with pytest.raises(UserError, match="do not fit") as error:
        load_model(tmp_path / "base.pt", "base", "t")
    assert str(tmp_path / "base.pt") in str(error.value) and "\n" not in str(error.value)


def test_a_model_of_another_version_is_refused_with_both_versions(tmp_path):
    """base.pt and reward.pt are read from other runs, possibly of another version."""
    states = dict(model=Transformer(SIZES).state_dict())
    meta = json.dumps(dict(tokenizer="t", model=vars(SIZES)))
    content = archive(dict(format="minirlhf 1", kind="base", meta=meta, states=states))
    (tmp_path / "base.pt").write_bytes(sealed(content))
    with pytest.raises(UserError) as error:
        load_model(tmp_path / "base.pt", "base", "t")
    message = str(error.value)
    assert f"minirlhf 1, but this is minirlhf {minirlhf.__version__};" in message
    assert str(tmp_path / "base.pt") in message
    assert "\n" not in message


# ---- the checkpoints of a run --------------------------------------------------------------------


def save(folder, step, keep=2):
    save_step(folder, "policy", dict(step=step, kl_coef=step / 10, run="run"), STATES, keep)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_checkpoints_are_kept(tmp_path):
    """Older ones of the same stage are deleted; those of other stages are not."""
    save_step(tmp_path / "c", "reward", dict(step=1), STATES, 2)
    for step in (2, 9, 10, 11):
        save(tmp_path / "c", step)
    assert names(tmp_path / "c") == [
        "policy-00000010.pt",
        "policy-00000011.pt",
        "reward-00000001.pt",
    ]
    meta, _ = newest_checkpoint(tmp_path / "c", "policy", "run")
    assert meta == dict(kl_coef=1.1, run="run", step=11)
    assert newest_checkpoint(tmp_path / "c", "sft", "run") is None
    assert newest_checkpoint(tmp_path / "nowhere", "policy", "run") is None


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(tmp_path, capsys):
    """A run must be able to resume although its last write was interrupted."""
    for step in (1, 2):
        save(tmp_path / "c", step)
    newest = tmp_path / "c" / "policy-00000002.pt"
    newest.write_bytes(newest.read_bytes()[:-5])
    assert newest_checkpoint(tmp_path / "c", "policy", "run")[0]["step"] == 1
    output = capsys.readouterr().out
    assert "warning" in output
    assert str(newest) in output


def test_a_checkpoint_of_another_run_is_skipped_with_a_warning(tmp_path, capsys):
    """A checkpoint of a run with other settings or data must not be resumed."""
    save(tmp_path / "c", 1)
    assert newest_checkpoint(tmp_path / "c", "policy", "another run") is None
    assert "belongs to a run with other settings or data" in capsys.readouterr().out


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_checkpoint_is_deleted_before_a_complete_one(keep, tmp_path):
    """If the damaged one of step 20 counted as the newest, the one of step 5 would be deleted."""
    for step in (10, 20):
        save(tmp_path / "c", step, keep)
    for path in (tmp_path / "c").iterdir():
        path.write_bytes(b"damaged")
    save(tmp_path / "c", 5, keep)
    assert newest_checkpoint(tmp_path / "c", "policy", "run")[0]["step"] == 5


def test_meta_that_is_not_json_is_refused_when_it_is_saved(tmp_path):
    """An object that only pickle can store would fail only when it is loaded."""
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "x.pt", "policy", dict(config=Payload(tmp_path)), {})
    assert names(tmp_path) == []
