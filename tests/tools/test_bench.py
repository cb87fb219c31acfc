"""`make bench`: what it times, what it prints, and targets that stand once."""

import re
from pathlib import Path

import pytest
from tiny_gguf import write_tiny

from lablog.claims import load_claims
from lablog.profiles import load
from lablog.record import Metric, Record
from lablog.run import Run
from lablog.speed_page import TARGETS
from tools import bench, bench_cvfp, bench_pretrained, bench_qlora


def test_a_line_shows_value_and_target():
    metric = Metric(name="arianna.packing.mb_per_s", value=7.5, unit="MB/s")
    assert bench.told(metric) == "arianna.packing.mb_per_s: 7.5 MB/s (target: at least 5)"
    other = Metric(name="arianna.train.f32.tokens_per_s", value=7.5, unit="tokens/s")
    assert bench.told(other) == "arianna.train.f32.tokens_per_s: 7.5 tokens/s"


def test_a_stopped_run_goes_on_with_the_stage_that_it_was_in(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    made = []

    def first(run: Run) -> None:
        made.append("first")
        run.metric("native.first", len(made), "count")

    def second(run: Run) -> None:
        made.append("second")
        if len(made) == 2:
            raise KeyboardInterrupt
        run.metric("scale.second", len(made), "count")

    monkeypatch.setattr(bench, "STAGES", {"one": first, "two": second})
    monkeypatch.setattr("lablog.layout.built", lambda *names: tmp_path.joinpath(*names))
    with pytest.raises(KeyboardInterrupt):
        bench.main()
    assert not (tmp_path / "bench.json").exists()
    assert bench.main() == 0
    assert made == ["first", "second", "second"]
    record = Record.read(tmp_path / "bench.json")
    assert [(metric.name, metric.value) for metric in record.metrics] == [
        ("native.first", 1), ("scale.second", 3)]
    assert [stage.name for stage in record.stages] == ["one", "two"]
    bench.main()  # a finished run is measured anew
    assert made[3:] == ["first", "second"]


def test_targets_stand_in_one_file():
    numbers = {re.search(r"[\d.]+$", target)[0] for target in TARGETS.values()}
    for path in sorted(Path(bench.__file__).parent.glob("bench*.py")):
        assert not re.search(r"\btarget\b\W+\d", path.read_text()), path
    assert {"0.97", "0.70", "23"} <= numbers


def test_training_is_timed_at_the_sizes_of_chapter_3(monkeypatch: pytest.MonkeyPatch):
    laptop = load("laptop").parameters["03_qlora_commitment"]
    plan = bench_qlora._plan(laptop["k"], "nf4")
    assert (plan.lora.r, plan.lora.alpha) == (laptop["lora_rank"], laptop["lora_alpha"])
    assert plan.lora.targets == laptop["targets"]
    assert plan.training.batch_size == laptop["batch_size"]
    assert (plan.schedule.beta, plan.schedule.cells) == (laptop["beta"], laptop["cells"])
    monkeypatch.setattr(bench_qlora, "SETTINGS", {**laptop, "lora_rank": 3})
    assert bench_qlora._plan(12, "none").lora.r == 3


def test_every_ratio_of_cvfp_is_measured():
    size = bench_cvfp.Size(width=16, layers=2, tokens=200, slice=4, repeats=1, growth=(50, 100),
                           rollout_tokens=40, lengths=(50, 100))
    rows = {name: value for name, value, _, _ in bench_cvfp.measured(size)}
    assert {row.measure for row in load_claims() if row.notebook == "bench"} <= rows.keys()
    times = [rows[f"cvfp.ten_iterations.{name}.seconds"] for name in ("parallel", "sequential")]
    assert times[1] / times[0] == pytest.approx(rows["cvfp.train.parallel_over_sequential"])
    assert {"cvfp.parallel_step.fraction_of_gemm", "cvfp.train.parallel_over_sequential",
            "cvfp.train.true_pass_over_parallel", "cvfp.rollout.fraction_of_gemv",
            "cvfp.rollout.best_over_sequential.trained",
            "cvfp.rollout.shooting_over_sequential.true_pass.100",
            "cvfp.growth.seconds_per_token.100"} <= rows.keys()
    assert {name for name in TARGETS if name.startswith("cvfp.")} <= rows.keys()
    assert all(value > 0 for value in rows.values())


def test_probing_is_not_defined_without_the_model(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_pretrained, "fetched", lambda: None)
    run = Run("bench", "bench", tmp_path, tmp_path, {})
    bench_pretrained.record(run)
    (ratio, rate) = run.record().metrics
    assert ratio.value is None
    assert "PROFILE=pretrained" in rate.undefined


def test_probing_together_is_compared_with_one_by_one(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """On a tiny model: both ways are timed, and weights of all types read and write."""
    gguf = write_tiny(tmp_path / "tiny.F32.gguf")
    monkeypatch.setattr(bench_pretrained, "fetched", lambda: gguf)
    for name, value in (("ITEMS", 1), ("PAIRS", 1)):
        monkeypatch.setattr(bench_pretrained, name, value)
    run = Run("bench", "bench", tmp_path, tmp_path / "artifacts", {})
    bench_pretrained.record(run)
    found = {metric.name: metric.value for metric in run.record().metrics}
    assert "native.probes.together_over_one_by_one.pretrained" in found
    assert {name.rpartition(".")[2] for name in found if "prefill" in name} == {
        "f32", "f16", "q8_0"}
    assert all(value > 0 for value in found.values())
