"""bench/estimate_accuracy.py: the criterion's figures, no leak from a cell into itself, and odd files."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("numpy")
BENCH = Path(__file__).resolve().parents[3] / "bench"
sys.path.insert(0, str(BENCH))

import crossvalidate  # noqa: E402
import estimate_accuracy  # noqa: E402
import fit_throughput  # noqa: E402
import runs_file  # noqa: E402
import throughput_fit  # noqa: E402

from cost.performance.roofline import Constants  # noqa: E402
from cost.performance.throughput import Calibration, default_calibration  # noqa: E402

RUNS = estimate_accuracy.CALIBRATION_RUNS
WHOLE_ROW = {
    "id": "new", "group": "ours", "n_layers": "16", "d_model": "2048", "n_heads": "16", "d_ff": "8192",
    "mlp": "gelu", "vocab": "50304", "seq_len": "2048", "gpu": "A100-SXM", "gpu_mem_gb": "80", "n_gpus": "8",
    "micro_batch_seqs": "8", "grad_accum": "4", "precision": "bf16", "framework": "brand new", "tok_s_total": "160000",
}  # fmt: skip


def table() -> list[dict[str, str]]:
    return list(csv.DictReader(RUNS.read_text(encoding="utf-8").splitlines()))


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def run(path: Path, capsys) -> dict:
    assert estimate_accuracy.main([str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def rows() -> list[throughput_fit.Row]:
    return [throughput_fit.Row.of(run) for run in runs_file.read_runs(RUNS)[0]]


@pytest.fixture(scope="module")
def whole(rows) -> throughput_fit.Fit:
    return throughput_fit.fit(rows)


def test_the_calibration_rows_meet_the_criterion_and_every_row_is_counted(capsys):
    found = run(RUNS, capsys)
    assert found["overall"]["n"] == len(table()) == sum(group["n"] for group in found["by_group"].values())
    assert found["overall"]["n"] == sum(gpu["n"] for gpu in found["by_gpu"].values())
    assert found["overall"]["median"] <= 0.08
    assert found["overall"]["p90"] <= 0.25
    assert found["leave_one_gpu_out"]["overall"]["median"] <= 0.15
    assert found["file_only"]["overall"] == found["overall"]
    assert found["memory"]["overall"]["median"] <= 0.12
    assert found["memory"]["impossible"] == []
    assert found["skipped"] == []


def test_the_text_says_the_same_as_the_json(tmp_path, capsys):
    few = write(tmp_path / "few.csv", [row for row in table() if row["group"] == "torchtitan"])
    figures = run(few, capsys)["overall"]
    assert estimate_accuracy.main([str(few)]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [f"{figures[name]:.1%}" for name in ("median", "mean", "p90")]
    assert lines[1].split()[-4:] == [str(figures["n"]), *shown]


def cell_errors(rows, whole, cell, shift=0.0) -> dict[str, float]:
    """The cell's rows, moved by `shift` in log tokens per second, predicted from all others."""
    moved = [dataclasses.replace(row, log_actual=row.log_actual + shift) for row in rows if row.run.cell == cell]
    others = [row for row in rows if row.run.cell != cell]
    return crossvalidate.leave_out(moved, [*others, *moved], lambda row: row.run.cell, whole)


def test_a_cell_never_sees_its_own_rows_neither_the_files_nor_the_projects(rows, whole):
    cell = ("A100", "1.2e+09")
    honest, shifted = cell_errors(rows, whole, cell), cell_errors(rows, whole, cell, shift=2.0)
    assert len(honest) > 10
    assert shifted == pytest.approx({name: error - 2.0 for name, error in honest.items()})


def test_a_neighbouring_cell_is_seen(rows, whole):
    cell = ("A100", "1.2e+09")
    faster = {row.run.id for row in rows if row.run.gpu_type == "A100" and row.run.cell != cell}
    moved = [dataclasses.replace(row, log_actual=row.log_actual + 0.3 * (row.run.id in faster)) for row in rows]
    before, after = cell_errors(rows, whole, cell), cell_errors(moved, whole, cell)
    assert all(after[name] > before[name] + 0.1 for name in before)


def test_half_of_the_cells_predict_the_other_half(rows):
    cells = sorted({row.run.cell for row in rows})
    for seed in range(2):
        kept = set(random.Random(seed).sample(cells, len(cells) // 2))
        fitted = throughput_fit.fit([row for row in rows if row.run.cell in kept])
        errors = [fitted.log_tokens_per_second(row) - row.log_actual for row in rows if row.run.cell not in kept]
        assert crossvalidate.summary(errors)["median"] <= 0.10


def test_the_repository_holds_what_a_refit_gives(rows, whole):
    written = Calibration.from_json(json.dumps(fit_throughput.document(rows, whole)))
    kept = default_calibration()
    assert written.pairs == kept.pairs
    for name in throughput_fit.NAMES:
        assert getattr(written.constants, name) == pytest.approx(getattr(kept.constants, name), rel=0.005)
    for field in ("framework_speed", "framework_attention", "accelerator_speed"):
        assert getattr(written, field) == pytest.approx(getattr(kept, field), abs=0.005)
    for basis, interval in kept.intervals.items():
        again = written.intervals[basis]
        assert (again.low, again.high) == pytest.approx((interval.low, interval.high), abs=0.01)


def test_a_fit_moves_no_constant_far_from_its_prior(whole):
    constants = whole.named_constants()
    for name, prior in throughput_fit.PRIORS.items():
        assert abs(math.log(getattr(constants, name) / prior.value)) < 2.5 * prior.spread, name


def test_a_fit_finds_the_constants_that_made_its_rows(rows):
    truth = throughput_fit.Fit(throughput_fit.prior_fit().constants + 0.05, {"llmq": 0.2}, {}, {"L40S": -0.1})
    made = [
        throughput_fit.Row(row.run, row.framework, row.accelerator, row.need, truth.log_tokens_per_second(row))
        for row in rows
    ]
    found = throughput_fit.fit(made)
    errors = [found.log_tokens_per_second(row) - row.log_actual for row in made]
    assert crossvalidate.summary(errors)["p90"] < 0.01
    assert isinstance(found.named_constants(), Constants)


def test_a_single_row_of_a_new_framework_on_an_unknown_gpu_is_predicted(tmp_path, capsys):
    rows = [{**WHOLE_ROW, "gpu": "Tensor-9000", "gpu_mem_gb": "80"}]
    found = run(write(tmp_path / "one.csv", rows), capsys)
    assert found["overall"]["n"] == 1
    assert found["rows"][0]["predicted"] > 0
    assert found["as_shipped"]["overall"]["n"] == 1


@pytest.mark.parametrize(
    ("spelling", "memory", "name"),
    [
        ("A100-SXM", "80", "A100-80GB-SXM"),
        ("nvidia a100 sxm4 40gb", "40", "A100-40GB"),
        ("A100-PCIe", "80", "A100-80GB-PCIe"),
        ("H100", "80", "H100-SXM"),
        ("NVIDIA H100 80GB HBM3", "80", "H100-SXM"),
        ("H100-96GB-HBM2e-500W", "96", "H100-SXM-500W"),
        ("RTX 4090", "24", "RTX4090"),
        ("GeForce RTX 5060 Ti", "16", "RTX5060TI"),
        ("RTX-PRO-6000-Blackwell", "96", "RTXPRO6000"),
    ],
)
def test_spellings_of_gpus(spelling, memory, name):
    parsed = runs_file.parse_row({**WHOLE_ROW, "gpu": spelling, "gpu_mem_gb": memory})
    assert isinstance(parsed, runs_file.Run)
    assert parsed.accelerator.name == name


def test_all_forms_of_a_chip_are_one_type():
    types = {
        runs_file.parse_row({**WHOLE_ROW, "gpu": gpu, "gpu_mem_gb": memory}).gpu_type
        for gpu, memory in (("A100-SXM", "40"), ("A100-SXM", "80"), ("A100-PCIe", "80"))
    }
    assert types == {"A100"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tok_s_total": ""}, "no throughput"),
        ({"tok_s_total": "-5"}, "no throughput"),
        ({"gpu": ""}, "no GPU"),
        ({"d_model": ""}, "no shape: d_model missing"),
        ({"n_layers": "many"}, "no shape: n_layers missing"),
        ({"id": "tl-4090x2-issue"}, "named as odd by the data's README"),
        ({"id": "llmc-125M-2048-a100"}, "named as odd by the data's README"),
        ({"id": "openlm-1b"}, "named as odd by the data's README"),
    ],
)
def test_each_skipped_row_says_why(tmp_path, capsys, change, reason):
    rows = [WHOLE_ROW, {**WHOLE_ROW, "id": "second", **change}]
    found = run(write(tmp_path / "runs.csv", rows), capsys)
    assert found["skipped"] == [{"id": rows[1]["id"], "reason": reason}]


def test_cells_may_be_empty_and_numbers_written_as_people_do(tmp_path, capsys):
    sparse = {name: WHOLE_ROW[name] for name in ("id", "n_layers", "d_model", "seq_len", "gpu")}
    rows = [{**sparse, "tok_s_per_gpu": "~20.1k"}, {**sparse, "id": "b", "tok_s_per_gpu": "20,100"}]
    found = run(write(tmp_path / "sparse.csv", rows), capsys)
    assert [row["actual"] for row in found["rows"]] == [20100.0, 20100.0]


def test_files_of_other_systems_read_the_same(tmp_path, capsys):
    rows = [{**WHOLE_ROW, "note": "two\nlines, and a comma"}, {**WHOLE_ROW, "id": "second"}]
    plain = run(write(tmp_path / "plain.csv", rows), capsys)
    windows = tmp_path / "windows.csv"
    text = (tmp_path / "plain.csv").read_text(encoding="utf-8").replace("lines, and", "lines,\n and")
    windows.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert run(windows, capsys) == plain


def test_what_a_row_tells_is_what_is_estimated():
    text = {**WHOLE_ROW, "sharding": "FULL_SHARD", "act_ckpt": "1", "compile": "1", "attention": "FA3 sliding window",
            "optimizer": "Muon+AdamW", "precision": "amp_fp8", "n_gpus": "16",
            "interconnect": "400Gb/s RDMA per GPU"}  # fmt: skip
    parsed = runs_file.parse_row(text)
    assert isinstance(parsed, runs_file.Run)
    assert (parsed.layout.num_nodes, parsed.layout.gpus_per_node, parsed.layout.sharding) == (2, 8, "zero3")
    assert (parsed.layout.activation_checkpointing, parsed.layout.precision) == (True, "fp8")
    assert (parsed.software.fused, parsed.software.attention, parsed.software.optimizer) == (True, "flash3", "muon")
    assert parsed.software.attention_share == runs_file.SLIDING_WINDOW_SHARE
    assert parsed.node_network_bytes_per_second == 8 * 400e9 / 8
    assert parsed.layout.grad_accumulation == 4


def test_a_run_that_cannot_have_kept_fp32_state_everywhere_kept_less():
    roomy = runs_file.parse_row(WHOLE_ROW)
    tight = runs_file.parse_row({**WHOLE_ROW, "d_model": "4096", "n_heads": "32", "d_ff": "11008", "n_layers": "32",
                                 "micro_batch_seqs": "1", "mlp": "swiglu"})  # fmt: skip
    larger = runs_file.parse_row({**WHOLE_ROW, "d_model": "5120", "n_layers": "40", "d_ff": "20480"})
    assert (roomy.layout.sharding, roomy.software.weight_bytes) == ("replicated", 4.0)
    assert (tight.layout.sharding, tight.software.weight_bytes) == ("replicated", 2.0)
    assert (larger.layout.sharding, larger.software.weight_bytes) == ("zero3", 4.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column id, gpu, n_layers, d_model, seq_len, tok_s_total or tok_s_per_gpu"),
        ("id,gpu,n_layers,d_model,seq_len\n", "has no column tok_s_total or tok_s_per_gpu"),
        ("id,gpu,n_layers,d_model,seq_len,tok_s_total\n", "can be used (it has no rows)"),
        ("id,gpu,n_layers,d_model,seq_len,tok_s_total\na,,1,1,1,5\n", "can be used (no GPU)"),
    ],
)
def test_a_file_that_is_none_of_runs_gets_a_message(tmp_path, capsys, text, message):
    path = tmp_path / "odd.csv"
    path.write_text(text, encoding="utf-8")
    assert estimate_accuracy.main([str(path)]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_a_missing_or_binary_file_gets_a_message(tmp_path, capsys):
    assert estimate_accuracy.main([str(tmp_path / "absent.csv")]) == 2
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    assert estimate_accuracy.main([str(binary)]) == 2
    assert capsys.readouterr().err.count("cannot read") == 2


def test_refitting_another_file_writes_constants_that_load(tmp_path, capsys):
    added = tmp_path / "runs.csv"
    added.write_text(RUNS.read_text(encoding="utf-8"), encoding="utf-8")
    new = write(tmp_path / "new.csv", [{**WHOLE_ROW, "source": "a test"}])
    out = tmp_path / "calibration.json"
    assert fit_throughput.main([str(added), "--add", str(new), "--out", str(out)]) == 0
    assert "added 1 rows" in capsys.readouterr().out
    loaded = Calibration.from_json(out.read_text(encoding="utf-8"))
    assert loaded.basis("brand new", "A100-80GB-SXM") == "measured"
    assert loaded.intervals["pooled"].num_rows == len(table()) + 1
