"""A checkpoint is whole, or it is refused by name; and no file that a stranger hands over is run."""

import errno
import hashlib
import io
import json
import os
import pickle
import random

import pytest
import torch
from tiny import contents

from minirlhf.checkpoint import (
    FORMAT,
    load_checkpoint,
    load_model,
    newest_checkpoint,
    save_checkpoint,
    save_model,
    save_step,
    write_atomically,
)
from minirlhf.config import UserError
from minirlhf.model import ModelConfig, Transformer

STATES = dict(model=dict(a=torch.arange(6.0).view(2, 3), b=torch.tensor(3)), optimizer=dict(step=[1, 2], lr=0.1))


def sealed(payload: bytes) -> bytes:
    """A forger can compute a checksum too."""
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


# ---- whole -----------------------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    """Including odd floats: a text format would round them."""
    states = dict(model=dict(x=torch.tensor([1 / 3, -0.0, float("inf"), 1e-45]), half=torch.ones(2, dtype=torch.bfloat16)))
    meta = dict(step=3, kl_coef=0.1 + 0.2, none=None, text="\u00fc\ud800")
    save_checkpoint(tmp_path / "x.pt", "policy", meta, states)
    found_meta, found = load_checkpoint(tmp_path / "x.pt", "policy")
    assert found_meta == meta
    for name, tensor in states["model"].items():
        assert found["model"][name].dtype == tensor.dtype
        assert found["model"][name].view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pt"]


def test_equal_states_make_equal_files(tmp_path):
    """So that two runs can be compared by their files."""
    for name in ("a.pt", "b.pt"):
        save_checkpoint(tmp_path / name, "policy", dict(step=1), STATES)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


@pytest.mark.parametrize("broken", ["fsync", "replace", "write"])
def test_a_write_that_fails_leaves_the_file_that_was_there(broken, tmp_path, monkeypatch):
    """A checkpoint written in place is lost, old and new, when the disk is full."""
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


def test_content_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    """Renamed before it is flushed, a file can be empty after a power cut, under its proper name."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    write_atomically(tmp_path / "x", b"content")
    assert done == ["fsync", "replace", "fsync"] and (tmp_path / "x").read_bytes() == b"content"


# ---- damaged ---------------------------------------------------------------------------------------------------------


def test_every_truncation_is_recognised(tmp_path):
    """A file cut by a full disk or a broken copy."""
    save_checkpoint(tmp_path / "x.pt", "policy", dict(step=1), STATES)
    content = (tmp_path / "x.pt").read_bytes()
    for length in [*range(0, 100), *range(100, len(content), 97), *range(len(content) - 100, len(content))]:
        torn = tmp_path / f"{length}.pt"  # a name of its own: some file systems flush a file that is written over
        torn.write_bytes(content[:length])
        assert "torn" in refusal(torn)


def test_every_flipped_bit_is_recognised(tmp_path):
    """One bit of an exponent makes a weight 10^30, and torch loads it without a word."""
    save_checkpoint(tmp_path / "x.pt", "policy", dict(step=1), STATES)
    content, rng = (tmp_path / "x.pt").read_bytes(), random.Random(0)
    for place in [*rng.sample(range(len(content)), 200), *range(len(content) - 82, len(content))]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        (tmp_path / f"{place}.pt").write_bytes(flipped)
        refusal(tmp_path / f"{place}.pt")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 500, b"PK\x03\x04" + b"\x00" * 500, archive(STATES)])
def test_a_foreign_file_is_named(content, tmp_path):
    """Another program's checkpoint, an empty file, a picture."""
    (tmp_path / "x.pt").write_bytes(content)
    assert "not a checkpoint of this program" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [
    b"", b"hello", archive(torch.zeros(3)), archive([]), archive(None), archive({}), archive(dict(kind="policy")),
    archive(dict(format=FORMAT, kind="policy", meta="{", states={})),
    archive(dict(format=FORMAT, kind="policy", meta="3", states={})),
    archive(dict(format=FORMAT, kind="policy", meta="[" * 100_000, states={})),
    archive(dict(format=FORMAT, kind="policy", meta="{}", states=[])),
    archive(dict(format="other", kind="policy", meta="{}", states={})),
    b"\x80\x02.", b"\x80\x02}q\x00", pickle.dumps(STATES["optimizer"]), archive(STATES)[:-30], b"\x80\x02cos\nsystem\n.",
], ids=range(17))
def test_a_sealed_file_of_another_content_is_refused(content, tmp_path):
    """A right checksum says that a file is whole, not that it is ours."""
    (tmp_path / "x.pt").write_bytes(sealed(content))
    assert "refused" in refusal(tmp_path / "x.pt")


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("where", ["pickle", "archive", "states", "meta"])
def test_a_pickle_with_a_payload_is_refused_and_not_executed(where, tmp_path):
    """torch.load runs whatever a file tells it to, unless it is told not to."""
    payload, ours = Payload(tmp_path / "executed"), dict(format=FORMAT, kind="policy", meta="{}", states=STATES)
    content = {"pickle": lambda: pickle.dumps(payload), "archive": lambda: archive(payload),
               "states": lambda: archive(dict(ours, states=dict(STATES, x=payload))),
               "meta": lambda: archive(dict(ours, meta=payload))}[where]()
    (tmp_path / "x.pt").write_bytes(sealed(content))
    assert "refused" in refusal(tmp_path / "x.pt")
    assert not (tmp_path / "executed").exists()
    torch.load(io.BytesIO(archive(payload)), weights_only=False)
    assert (tmp_path / "executed").exists()  # the payload works where nobody stops it


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    """The folder of a run that has not finished holds no reward.pt."""
    assert "No such file" in refusal(tmp_path / "reward.pt")
    assert "directory" in refusal(tmp_path)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    """A base model has a reward head too, one that says 0 to everything."""
    save_checkpoint(tmp_path / "base.pt", "base", {}, STATES)
    assert "holds a base model, not a reward model" in refusal(tmp_path / "base.pt", "reward")


# ---- models ----------------------------------------------------------------------------------------------------------


SIZES = ModelConfig(vocab_size=11, table_rows=64, n_layer=1, n_head=2, d_model=8, context=6)


def test_a_model_comes_back_with_its_sizes_and_the_constants_of_its_score(tmp_path):
    """Scores whose shift and scale stay behind change kl_coef's meaning without a word."""
    model = Transformer(SIZES, seed=3)
    model.score_shift.fill_(1.5)
    model.score_scale.fill_(0.25)
    save_model(tmp_path / "reward.pt", "reward", model, dict(tokenizer="t"))
    loaded, meta = load_model(tmp_path / "reward.pt", "reward", "t")
    assert loaded.config == SIZES and meta["tokenizer"] == "t"
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert (loaded.score_shift, loaded.score_scale) == (1.5, 0.25)


def test_a_model_trained_with_another_tokenizer_is_refused(tmp_path):
    """The ids would mean other words, and everything would run."""
    save_model(tmp_path / "base.pt", "base", Transformer(SIZES), dict(tokenizer="t"))
    with pytest.raises(UserError, match="another tokenizer"):
        load_model(tmp_path / "base.pt", "base", "u")


@pytest.mark.parametrize("change", [
    dict(d_model=16), dict(n_layer=2), dict(table_rows=128), dict(context=5), dict(n_layer=0), dict(d_model="8"), dict(depth=3),
    None,
])
def test_tensors_of_another_shape_are_refused(change, tmp_path):
    """In one line, and not as the list of every tensor that does not fit."""
    model = Transformer(SIZES)
    sizes = None if change is None else {**vars(SIZES), **change}
    save_checkpoint(tmp_path / "base.pt", "base", dict(tokenizer="t", model=sizes), dict(model=model.state_dict()))
    with pytest.raises(UserError, match="do not fit") as error:
        load_model(tmp_path / "base.pt", "base", "t")
    assert str(tmp_path / "base.pt") in str(error.value) and "\n" not in str(error.value)


# ---- the checkpoints of a run ----------------------------------------------------------------------------------------


def save(folder, step, keep=2):
    save_step(folder, "policy", step, dict(kl_coef=step / 10, run="run"), STATES, keep)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept(tmp_path):
    """And those of another stage are left alone."""
    save_step(tmp_path / "c", "reward", 1, {}, STATES, 2)
    for step in (2, 9, 10, 11):
        save(tmp_path / "c", step)
    assert names(tmp_path / "c") == ["policy-00000010.pt", "policy-00000011.pt", "reward-00000001.pt"]
    assert newest_checkpoint(tmp_path / "c", "policy", "run")[0] == dict(kl_coef=1.1, run="run", step=11)
    assert newest_checkpoint(tmp_path / "c", "warmup", "run") is None
    assert newest_checkpoint(tmp_path / "nowhere", "policy", "run") is None


def test_a_torn_newest_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, capsys):
    """Nothing is worse than a run that cannot go on because its last write was cut."""
    for step in (1, 2):
        save(tmp_path / "c", step)
    newest = tmp_path / "c" / "policy-00000002.pt"
    newest.write_bytes(newest.read_bytes()[:-5])
    assert newest_checkpoint(tmp_path / "c", "policy", "run")[0]["step"] == 1
    assert "warning" in (said := capsys.readouterr().out) and str(newest) in said


@pytest.mark.parametrize("keep", [1, 2])
def test_a_torn_checkpoint_never_outlives_a_whole_one(keep, tmp_path):
    """Had the torn one of step 20 counted as the newest, the whole one of step 5 would be deleted as soon as written."""
    for step in (10, 20):
        save(tmp_path / "c", step, keep)
    for path in (tmp_path / "c").iterdir():
        path.write_bytes(b"torn")
    save(tmp_path / "c", 5, keep)
    assert newest_checkpoint(tmp_path / "c", "policy", "run")[0]["step"] == 5


def test_meta_is_json_so_that_nothing_else_can_be_in_it(tmp_path):
    """An object that only pickle can store must fail when it is saved, not when it is loaded."""
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "x.pt", "policy", dict(config=Payload(tmp_path)), {})
    assert names(tmp_path) == [] and json.dumps(dict(step=1))
