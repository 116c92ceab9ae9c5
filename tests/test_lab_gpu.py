"""The GPU script on a CPU: its parts, its errors, and what a failing part does to the others."""

import json
import sys

from minirlhf.lab import gpu, gpu_parts
from minirlhf.lab.gpu import GpuConfig, main
from minirlhf.lab.gpu_parts import MEASUREMENTS, Row, Variant, one_row

import pytest
import torch
from tiny import refused


def command(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_every_part_has_a_time_limit_and_a_measurement():
    """The limits together are longer than the total, because parts rarely need all their time."""
    assert set(gpu.LIMITS) == {*MEASUREMENTS, "tests"}
    assert max(gpu.LIMITS.values()) < gpu.TOTAL_SECONDS <= 360


def test_a_failing_or_slow_part_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    commands = dict(
        machine=command("print('hello'); raise SystemExit('broken')"),
        kernels=command("import time; print('begin', flush=True); time.sleep(60)"),
        decode=command("print('fine')"),
    )
    monkeypatch.setattr(gpu, "command_of", lambda part, folder, dry_run: commands[part])
    monkeypatch.setattr(gpu, "LIMITS", dict(machine=5, kernels=0.1, decode=5))
    config = GpuConfig(out=str(tmp_path / "out"), parts="machine,kernels,decode", dry_run=True)
    with pytest.raises(gpu.UserError, match="failed: machine, kernels;.*gpu.md"):
        main(config)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("machine: failed with status 1") and lines[0].endswith(": broken")
    assert lines[1].startswith("kernels: stopped after 1 s")
    assert lines[2].startswith("decode: ok")
    results = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert results["about"]["device"] and results["about"]["date"] and results["about"]["torch"]
    assert results["parts"]["machine"]["last_lines"] == ["hello", "broken"]
    assert "broken" in (tmp_path / "out" / "gpu.md").read_text()


@pytest.mark.slow
def test_a_measurement_runs_in_its_own_process_and_its_rows_are_in_the_results(tmp_path):
    main(GpuConfig(out=str(tmp_path), parts="update", dry_run=True))
    result = json.loads((tmp_path / "gpu.json").read_text())["parts"]["update"]
    assert result["status"] == "ok" and result["seconds"] > 0
    assert [row["name"] for row in result["rows"]] == [
        f"update, {variant.name}" for variant in gpu_parts.VARIANTS
    ]
    assert all(row["bound"] > 0 and row["milliseconds"] > 0 for row in result["rows"])
    page = (tmp_path / "gpu.md").read_text()
    assert "| update, bf16 |" in page and "update: ok" in page


def test_a_failed_check_is_an_error(tmp_path, monkeypatch):
    """Exit status 0 would hide a wrong kernel."""
    code = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
    row = json.dumps(Row("scan", ok=False, note="error 1")._asdict()) + "\n"
    monkeypatch.setattr(
        gpu,
        "command_of",
        lambda part, folder, dry_run: [*command(code), str(folder / f"{part}.jsonl"), row],
    )
    with pytest.raises(gpu.UserError, match="failed: machine"):
        main(GpuConfig(out=str(tmp_path), parts="machine", dry_run=True))
    assert "| scan |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize(
    "arguments, words",
    [([], "--out is missing"), (["--out", "x", "--parts", "kernel"], "did you mean kernels")],
)
def test_bad_input_is_one_line(arguments, words, capsys):
    assert words in refused(capsys, main, GpuConfig, arguments)


def test_no_gpu_and_existing_results_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in refused(capsys, main, GpuConfig, ["--out", str(tmp_path)])
    (tmp_path / "gpu.json").write_text("{}")
    error = refused(capsys, main, GpuConfig, ["--out", str(tmp_path), "--dry-run"])
    assert "already exists" in error


def test_a_device_without_triton_bfloat16_or_memory_gives_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(gpu_parts, "HAS_TRITON", False)
    (row,) = MEASUREMENTS["kernels"](True)
    assert "triton is not installed" in row.note and row.ok is None

    def exhausted(variant: Variant) -> Row:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert "too little memory" in one_row("decode", Variant("float32"), exhausted).note
    monkeypatch.setattr(gpu_parts, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    row = one_row("decode", Variant("bf16", bf16=True), exhausted)
    assert row.name == "decode, bf16" and "no bfloat16" in row.note
