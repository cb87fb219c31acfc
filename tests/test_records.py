"""Records: what is valid, what is refused, and that writing leaves old or new, never between."""

import fcntl
import hashlib
import json
import math
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lablog.files import atomic_folder, atomic_write, scratch_folder, sweep, write_if_changed
from lablog.intervals import Interval
from lablog.provenance import CloneState, FileHash, Machine, available_memory_bytes, machine
from lablog.record import Failure, FigureFile, Metric, Record, ReportText, Stage
from lablog.report import ReportError
from lablog.run import Run

SOURCE = CloneState(commit="0" * 40, dirty=False, library_sha256="1", patch_sha256="2")
MACHINE = Machine(python="3.11", platform="Linux", cpu="any", threads=2, device="cpu", packages={})


def record(**fields: object) -> Record:
    base = {"notebook": "01_alpha", "profile": "smoke", "status": "ok", "parameters": {},
            "seeds": (), "started": datetime(2026, 1, 2, tzinfo=UTC), "seconds": 1.5,
            "source": SOURCE, "machine": MACHINE}
    return Record(**(base | fields))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- metrics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["value", "numerator", "denominator", "low", "high"])
def test_a_number_that_is_not_finite_is_refused_wherever_it_stands(place: str, bad: float):
    fields = {"value": 0.5, "numerator": 1.0, "denominator": 2.0}
    ends = {"low": 0.1, "high": 0.9} | ({place: bad} if place in ("low", "high") else {})
    fields |= {place: bad} if place in fields else {}
    with pytest.raises(ValidationError, match=r"metric m is not finite .*undefined=<reason>"):
        Metric(name="m", unit="", interval=(ends["low"], ends["high"]), interval_method="t",
               **fields)


def test_an_undefined_metric_has_a_reason_instead_of_a_value():
    metric = Metric(name="m", value=None, unit="", undefined="no samples")
    assert metric.value is None
    for fields in ({"value": None}, {"value": 1.0, "undefined": "no samples"}):
        with pytest.raises(ValidationError, match="exactly one of value and undefined"):
            Metric(name="m", unit="", **fields)


@pytest.mark.parametrize("fields", [
    {"interval": (0.0, 1.0)}, {"interval_method": "t"},
])
def test_an_interval_and_its_method_come_together(fields: dict):
    with pytest.raises(ValidationError, match="an interval needs its method"):
        Metric(name="m", value=0.5, unit="", **fields)


@pytest.mark.parametrize(("field", "value"), [
    ("name", "two words"), ("name", ""), ("name", "Upper"), ("name", "{braces}"), ("n", -1),
    ("unit", None), ("value", [1.0]), ("interval", (0.0,)), ("seeds", ("a",)), ("surprise", 1),
])
def test_fields_that_do_not_fit_are_refused(field: str, value: object):
    fields = {"name": "m", "value": 0.5, "unit": "", "interval_method": None}
    with pytest.raises(ValidationError, match=field):
        Metric(**(fields | {field: value}))


def test_a_truth_value_and_a_class_stay_what_they_are():
    written = record(metrics=(
        Metric(name="flag", value=True, unit=""), Metric(name="count", value=1, unit="count"),
        Metric(name="word", value="repetitive", unit="class"),
        Metric(name="real", value=1.0, unit=""),
    ))
    read = Record.model_validate_json(written.model_dump_json())
    assert [type(m.value) for m in read.metrics] == [bool, int, str, float]


def test_names_that_occur_twice_are_refused():
    metric = Metric(name="m", value=1, unit="")
    figure = FigureFile(name="f", svg="f.svg", csv="f.csv", caption="")
    with pytest.raises(ValidationError, match="metric recorded twice: m"):
        record(metrics=(metric, Metric(name="n", value=1, unit=""), metric))
    with pytest.raises(ValidationError, match="figure recorded twice: f"):
        record(figures=(figure, figure))


def test_a_missing_metric_is_named_with_its_notebook():
    held = record(metrics=(Metric(name="m", value=1, unit=""),))
    assert held.metric("m").value == 1
    with pytest.raises(KeyError, match=r"01_alpha \(smoke\) holds no metric 'loss'"):
        held.metric("loss")


def test_a_record_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        record().seconds = 2.0
    with pytest.raises(ValidationError, match="status"):
        record(status="fine")


def test_a_metric_takes_ends_level_and_method_of_its_interval():
    metric = Metric.of("m", 0.5, "fraction", interval=Interval(0.1, 0.9, "t", 0.8), n=3)
    assert metric == Metric(name="m", value=0.5, unit="fraction", interval=(0.1, 0.9), n=3,
                            interval_method="t", interval_level=0.8)
    assert Metric.of("m", 1, "count") == Metric(name="m", value=1, unit="count")


def test_metrics_are_recorded_in_order_under_the_name_that_the_notebook_gives(tmp_path: Path):
    run = Run("01_alpha", "smoke", tmp_path, tmp_path, {})
    found = [Metric(name="m", value=True, unit=""), Metric(name="n", value=2, unit="count", n=4)]
    run.metrics(found)
    run.metrics((metric for metric in found), under="trained.seed1")
    run.metric("last", 0.5, "")
    kept = run.record().metrics
    assert [m.name for m in kept] == ["m", "n", "trained.seed1.m", "trained.seed1.n", "last"]
    assert [m.model_copy(update={"name": "n"}) for m in kept[1:4:2]] == [found[1], found[1]]
    assert kept[2].value is True
    with pytest.raises(ValidationError, match="name"):
        run.metrics(found, under="Two words")


def test_a_mean_over_seeds_has_an_interval_unless_the_seed_is_single():
    plain = Metric.over_seeds("m", [1.0, 3.0], "", [7, 8])
    assert (plain.value, plain.seeds, plain.n) == (2, (7, 8), 2)
    assert plain.interval_method == "t over 2 seeds"
    log = Metric.over_seeds("m", [1.0, 4.0], "", [7, 8], log=True)
    assert log.value == pytest.approx(2)
    assert log.interval_method == "log-t over 2 seeds"
    assert Metric.over_seeds("m", [1.0], "", [7]).interval is None


def test_a_table_shows_what_was_recorded(tmp_path: Path):
    run = Run("01_alpha", "smoke", tmp_path, tmp_path, {})
    run.metric("a.share", 0.5, "fraction", numerator=2, denominator=4)
    run.metric("a.size", 3, "count")
    run.metric("b.share", 0.25, "fraction")
    shown = run.table(["b", "a"], ["size", "share"])
    assert shown.index.tolist() == ["b", "a"]
    assert shown.to_dict("list") == {"size": ["", "3"], "share": ["25.0%", "50.0% (2/4)"]}
    assert run.table(["a"], ["share"], style="value").loc["a", "share"] == "50.0%"


# --- writing and reading --------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
NAME = st.text(st.characters(codec="utf-8", exclude_characters='<>"`|\n'), max_size=20)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
METRICS = st.builds(
    lambda name, value, counts, n, seeds, interval: Metric(
        name=name, unit="" if value is not None else "nats", n=n, seeds=seeds,
        value=value, undefined=None if value is not None else "no samples",
        numerator=counts and counts[0], denominator=counts and counts[1],
        interval=interval, interval_method=interval and "bootstrap",
    ),
    st.from_regex(r"[a-z0-9][a-zA-Z0-9_.+\-]{0,20}", fullmatch=True),
    st.none() | FINITE | st.integers() | st.booleans() | TEXT,
    st.none() | st.tuples(FINITE, FINITE), st.none() | st.integers(0),
    st.none() | st.lists(st.integers(), max_size=3).map(tuple),
    st.none() | st.tuples(FINITE, FINITE),
)
PARAMETERS = st.dictionaries(
    NAME, st.none() | st.integers() | FINITE | TEXT | st.booleans() | st.lists(FINITE, max_size=3)
)
RECORDS = st.builds(
    record, metrics=st.lists(METRICS, max_size=4, unique_by=lambda m: m.name).map(tuple),
    parameters=PARAMETERS, seeds=st.lists(st.integers(), max_size=3).map(tuple),
    started=st.datetimes(timezones=st.just(UTC)), seconds=FINITE,
    stages=st.lists(st.builds(Stage, name=NAME, seconds=FINITE), max_size=2).map(tuple),
    files=st.lists(st.builds(FileHash, path=TEXT, sha256=TEXT, bytes=st.integers(0)),
                   max_size=2).map(tuple),
    status=st.sampled_from(["ok", "failed", "interrupted", "timeout"]),
    report=st.none() | st.builds(ReportText, en=TEXT, ja=TEXT),
    failure=st.none() | st.builds(Failure, kind=TEXT, message=TEXT),
)


@given(written=RECORDS)
def test_what_is_read_is_what_was_written(written: Record, tmp_path_factory):
    path = written.write(tmp_path_factory.getbasetemp() / "round trip" / "record.json")
    assert Record.read(path) == written
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@given(written=RECORDS)
def test_the_exported_schema_describes_every_record(written: Record):
    schema = json.loads(json.dumps(Record.model_json_schema()))
    checker = jsonschema.Draft202012Validator(schema)
    checker.validate(json.loads(written.model_dump_json()))


def test_the_exported_schema_refuses_what_the_model_refuses():
    schema = Record.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    checker = jsonschema.Draft202012Validator(schema)
    good = json.loads(record(metrics=(Metric(name="m", value=1, unit=""),)).model_dump_json())
    assert checker.is_valid(good)
    for change in ({"surprise": 1}, {"status": "fine"}, {"schema_version": 2}, {"notebook": None}):
        assert not checker.is_valid(good | change)
    assert not checker.is_valid({k: v for k, v in good.items() if k != "seeds"})


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"schema_version": 2}'])
def test_a_file_that_is_no_record_is_refused_by_name(content: bytes, tmp_path: Path):
    path = tmp_path / "01_alpha.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"01_alpha\.json is not a record of schema 1"):
        Record.read(path)


def test_results_leave_out_times_and_nothing_that_was_computed():
    one = record(metrics=(Metric(name="m", value=1, unit=""),))
    times = record(metrics=one.metrics, seconds=9.0, started=datetime(2027, 1, 1, tzinfo=UTC),
                   stages=(Stage(name="s", seconds=1.0),), peak_memory_bytes=7)
    assert times.results() == one.results()
    for change in ({"seeds": (1,)}, {"parameters": {"k": 1}}, {"metrics": ()},
                   {"files": (FileHash(path="a", sha256="b", bytes=1),)},
                   {"figures": (FigureFile(name="f", svg="s", csv="c", caption="t"),)},
                   {"report": ReportText(en="a", ja="b")}):
        assert one.model_copy(update=change).results() != one.results()


def test_files_are_told_by_where_they_lie(tmp_path: Path):
    from lablog.files import repository

    artifact = tmp_path / "artifacts" / "a" / "m.gguf"
    artifact.parent.mkdir(parents=True)
    artifact.write_bytes(b"weights")
    told = FileHash.of(artifact, tmp_path / "artifacts")
    assert (told.path, told.bytes) == ("artifacts/a/m.gguf", 7)
    assert told.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert FileHash.of(repository() / "pyproject.toml", tmp_path).path == "pyproject.toml"
    assert FileHash.of(artifact, tmp_path / "elsewhere").path == "m.gguf"


# --- atomic writing -------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = atomic_write(tmp_path / "record.json", "old")

    def broken(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["record.json"]


KILLED = """
import sys
from pathlib import Path
from lablog.files import atomic_write

print("begin", flush=True)
while True:
    for letter in "ab":
        atomic_write(Path(sys.argv[1]), letter * 200_000)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path):
    path = tmp_path / "record.json"
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        seen = set()
        while len(seen) < 2:  # reading meanwhile finds whole contents, too
            if path.exists():
                text = path.read_text()
                assert text in ("a" * 200_000, "b" * 200_000)
                seen.add(text[0])
        child.kill()
        child.wait()
        assert path.read_text() in ("a" * 200_000, "b" * 200_000)


def test_an_unchanged_content_is_not_written_again(tmp_path: Path):
    path = tmp_path / "a"
    assert write_if_changed(path, "one")
    stamp = path.stat().st_mtime_ns
    assert not write_if_changed(path, "one")
    assert path.stat().st_mtime_ns == stamp
    assert write_if_changed(path, "two")
    assert path.read_text() == "two"


def test_what_a_container_may_have_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dask.system.cpu_count", lambda: 3)
    monkeypatch.setattr("distributed.system.memory_limit", lambda: 1 << 20)
    assert machine().threads == 3
    assert available_memory_bytes() == 1 << 20


def test_nobody_sweeps_what_is_being_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    replace = Path.replace

    def swept(self: Path, target: Path) -> Path:
        sweep(tmp_path)  # as another process that starts at this moment
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", swept)
    assert atomic_write(tmp_path / "record", "whole").read_text() == "whole"


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "model"

    def fill(fail: bool) -> None:
        with atomic_folder(target) as scratch:
            (scratch / "weights").write_text("half" if fail else "whole")
            assert scratch != target
            if fail:
                raise RuntimeError("planted")

    for before in ([], ["model"]):
        with pytest.raises(RuntimeError, match="planted"):
            fill(True)
        assert names(tmp_path) == before
        fill(False)
        assert (target / "weights").read_text() == "whole"
        assert names(tmp_path) == ["model"]


HOLDING = """
import sys
from pathlib import Path
from lablog.files import scratch_folder

with scratch_folder(Path(sys.argv[1])) as scratch:
    (scratch / "inner").mkdir()
    (scratch / "inner" / "half").write_text("half")
    print("begin", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holding():
    """Starts processes that are making a path; all end with the test."""
    running = []

    def start(path: Path) -> subprocess.Popen:
        child = subprocess.Popen([sys.executable, "-c", HOLDING, str(path)],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        running.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == b"begin\n"
        return child

    yield start
    for child in running:
        child.kill()
        child.wait()


def test_what_a_killed_process_left_goes_with_the_next_that_makes_it(tmp_path: Path, holding):
    """And what a living one is making stays, also when another makes the same."""
    holding(tmp_path / "model").kill()
    other = holding(tmp_path / "other")
    living = holding(tmp_path / "model")
    of_model = list(tmp_path.glob(".model.scratch-*"))
    assert len(of_model) == 1, "that of the killed one is gone"
    with scratch_folder(tmp_path / "model") as scratch:
        assert {*tmp_path.glob(".model.scratch-*")} == {scratch, *of_model}
    assert (of_model[0] / "inner" / "half").read_text() == "half"
    living.communicate()
    other.kill()
    other.wait()
    assert [name[:15] for name in names(tmp_path)] == [".other.scratch-"], "of another name"
    atomic_write(tmp_path / "other", "whole")
    assert names(tmp_path) == ["other"]


def test_a_sweep_takes_what_nobody_makes_wherever_it_lies(tmp_path: Path, holding):
    deep = tmp_path / "artifacts" / "cvfp"
    holding(deep / "contexts").kill()
    living = holding(tmp_path / "artifacts" / "model")
    (deep / ".contexts.scratch-file").write_text("half")
    kept = [".contexts.lock", ".contexts.work", "contexts.scratch-mine"]
    for name in kept:
        (deep / name).write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (deep / ".link.scratch-a").symlink_to(elsewhere)
    sweep(tmp_path)
    assert names(deep) == sorted([*kept, ".link.scratch-a"])
    assert len(names(tmp_path / "artifacts")) == 2
    living.communicate()
    assert names(tmp_path / "artifacts") == ["cvfp"]


def test_a_scratch_that_is_swept_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch):
    """A maker and a sweeper at once: the folder is there, whoever came first."""
    swept = []
    locked = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        if not swept and how == fcntl.LOCK_EX:
            swept.append(descriptor)
            sweep(tmp_path)
        locked(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with scratch_folder(tmp_path / "model") as scratch:
        assert scratch.is_dir()
    swept.clear()
    atomic_write(tmp_path / "model", "whole")
    assert (tmp_path / "model").read_text() == "whole"
    assert names(tmp_path) == ["model"]


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command, which the small disk needs")
    if made.returncode:
        pytest.skip(f"mounting a small disk needs root: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_old_record_and_says_what_to_do(small_disk: Path):
    path = small_disk / "records" / "01_alpha.json"
    old = record()
    old.write(path)
    long = record(parameters={"text": "x" * 200_000})
    with pytest.raises(OSError, match=r"the disk is full: .*01_alpha\.json.*free some space"):
        long.write(path)
    assert Record.read(path) == old
    assert names(path.parent) == ["01_alpha.json"]
    # Nothing was leaked: the space is there for what fits.
    newer = record(seconds=2.0)
    newer.write(path)
    assert Record.read(path) == newer


# --- prose from the record ------------------------------------------------------------------------


def test_prose_takes_its_numbers_from_the_record(tmp_path: Path):
    run = Run("01_alpha", "smoke", tmp_path, tmp_path, {})
    run.metric("untrained.seed1.rank", 0.5, "fraction", numerator=2, denominator=4)
    said = run.say("Before: {bare.rank:value} ({untrained.seed1.rank:counts}).",
                   bare="untrained.seed1")
    assert said.data == "Before: 50.0% (2/4)."
    with pytest.raises(ReportError, match=r"untrained\.seed1\.loss"):
        run.say("{bare.loss}", bare="untrained.seed1")
    with pytest.raises(ReportError, match="judgement 'EXCELLENT'"):
        run.say("{untrained.seed1.rank}: EXCELLENT")


def test_a_record_names_the_instructions_that_its_digits_depend_on():
    found = machine()
    assert found.instructions == torch.backends.cpu.get_cpu_capability()
    assert found.processor == f"{found.cpu} ({found.instructions})"
    assert MACHINE.processor == "any", "older records do not name them"
