"""Choices come from memory, a shipped table, the user's file or a measurement, in this order and bounded."""

import logging
import multiprocessing
import string
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hrwkv.kernels import tuning
from hrwkv.kernels.tuning import (
    BUDGET_SECONDS,
    SHIPPED,
    Config,
    Entry,
    Tuner,
    candidates_of,
    dump,
    parse,
)

DEVICE = torch.device("cuda", 0)
SLOW, FAST, FASTEST = (Config(num_warps=warps, BV=32) for warps in (8, 4, 2))
CANDIDATES = (SLOW, FAST, FASTEST)
ENTRY = Entry("wkv7_forward", (64, "bf16"))


class Bench:
    """A device whose launches take as long as told and a clock that advances with each measurement."""

    def __init__(self, times: Mapping[Config, float | Exception], *, seconds: float = 1.0) -> None:
        self.times, self.seconds = times, seconds
        self.now, self.measured = 0.0, []

    def run(self, config: Config) -> None:
        self.measured.append(config)

    def milliseconds(self, launch: Callable[[], None], device: torch.device) -> float:
        assert device == DEVICE
        self.now += self.seconds
        launch()
        outcome = self.times[self.measured[-1]]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def tuner(self, cache: Path | None, *, chip: str = "Test Chip", shipped: Path | None = None) -> Tuner:
        return Tuner(
            cache_directory=cache,
            chip_of=lambda device: chip,
            milliseconds=self.milliseconds,
            clock=lambda: self.now,
            shipped_directory=shipped or Path("absent"),
        )

    def choose(self, tuner: Tuner, entry: Entry = ENTRY) -> Config:
        return tuner.choose(entry, CANDIDATES, self.run, device=DEVICE)


@pytest.fixture
def bench() -> Bench:
    return Bench({SLOW: 3.0, FAST: 2.0, FASTEST: 1.0})


def test_on_a_cpu_the_first_candidate_is_taken_and_nothing_runs(bench: Bench) -> None:
    key = ("sizes", 3)
    device = torch.device("cpu")
    assert tuning.choose("kernel", key, CANDIDATES, bench.run, device=device) is SLOW
    assert bench.measured == []


def test_the_fastest_is_measured_once_and_remembered(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    tuner = bench.tuner(None)
    with caplog.at_level(logging.INFO, logger=tuning.__name__):
        assert [bench.choose(tuner) for _ in range(3)] == [FASTEST] * 3
    assert bench.measured == [*CANDIDATES]
    (record,) = caplog.records
    assert "wkv7_forward [64, bf16]: Config(num_warps=2, BV=32) takes 1.000 ms" in record.getMessage()
    assert "3 of 3 candidates, in 3.0 s" in record.getMessage()


def test_other_keys_and_devices_are_measured_apart(bench: Bench) -> None:
    tuner = bench.tuner(None)
    bench.choose(tuner)
    bench.choose(tuner, Entry(ENTRY.name, (96, "bf16")))
    bench.choose(tuner, Entry("wkv7_backward", ENTRY.key))
    assert len(bench.measured) == 9


def test_equals_go_to_the_earlier_candidate() -> None:
    bench = Bench(dict.fromkeys(CANDIDATES, 1.0))
    assert bench.choose(bench.tuner(None)) == SLOW


def test_a_single_candidate_is_not_measured(bench: Bench, tmp_path: Path) -> None:
    assert bench.tuner(tmp_path).choose(ENTRY, [FAST], bench.run, device=DEVICE) is FAST
    assert bench.measured == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("seconds", "measured"),
    [(BUDGET_SECONDS / 2, 2), (BUDGET_SECONDS * 2, 1), (BUDGET_SECONDS / 4, 3)],
    ids=["two-fit", "the-first-always-runs", "all-fit"],
)
def test_measuring_stops_when_the_budget_is_spent(bench: Bench, seconds: float, measured: int) -> None:
    bench.seconds = seconds
    assert bench.choose(bench.tuner(None)) == CANDIDATES[measured - 1]
    assert len(bench.measured) == measured


def test_candidates_that_fail_are_skipped_until_one_has_run(caplog: pytest.LogCaptureFixture) -> None:
    """The budget ends nothing before there is a choice."""
    failing = {SLOW: RuntimeError("out of resource: shared memory"), FAST: ValueError("no"), FASTEST: 1.0}
    bench = Bench(failing, seconds=BUDGET_SECONDS)
    with caplog.at_level(logging.DEBUG, logger=tuning.__name__):
        assert bench.choose(bench.tuner(None)) == FASTEST
    skipped = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    assert len(skipped) == 2
    assert "Config(num_warps=8, BV=32): RuntimeError: out of resource: shared memory" in skipped[0]


def test_when_all_fail_every_reason_is_told(tmp_path: Path) -> None:
    bench = Bench({candidate: RuntimeError(f"reason {i}") for i, candidate in enumerate(CANDIDATES)})
    with pytest.raises(RuntimeError, match=r"none of the candidates.*reason 0.*reason 1.*reason 2"):
        bench.choose(bench.tuner(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_the_device_is_not_skipped() -> None:
    bench = Bench({SLOW: 1.0, FAST: torch.AcceleratorError("illegal memory access"), FASTEST: 1.0})
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        bench.choose(bench.tuner(None))


def test_the_next_process_reads_what_this_one_measured(bench: Bench, tmp_path: Path) -> None:
    other = Entry("other", (1,))
    for entry in (ENTRY, other):
        bench.choose(bench.tuner(tmp_path / "new"), entry)
    (path,) = (tmp_path / "new").iterdir()
    assert path.name == f"test_chip-{tuning.source_version()}.json"
    assert parse(path.read_text()) == {ENTRY: FASTEST, other: FASTEST}
    bench.measured.clear()
    assert bench.choose(bench.tuner(tmp_path / "new")) == FASTEST
    assert bench.measured == []


def test_another_chip_or_other_sources_do_not_read_it(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.choose(bench.tuner(tmp_path))
    bench.choose(bench.tuner(tmp_path, chip="Other"))
    monkeypatch.setattr(tuning, "source_version", lambda: "changed")
    bench.choose(bench.tuner(tmp_path))
    assert len(bench.measured) == 9
    assert len(list(tmp_path.iterdir())) == 3


def test_a_shipped_choice_comes_before_the_users(bench: Bench, tmp_path: Path) -> None:
    chip, shipped, cache = "NVIDIA H200", tmp_path / "shipped", tmp_path / "cache"
    bench.choose(bench.tuner(cache, chip=chip))
    shipped.mkdir()
    (shipped / "nvidia_h100_h200.json").write_text(dump({ENTRY: FAST}))
    bench.measured.clear()
    assert bench.choose(bench.tuner(cache, chip=chip, shipped=shipped)) == FAST
    assert bench.measured == []


def test_a_stored_choice_that_is_no_candidate_is_passed_over(bench: Bench, tmp_path: Path) -> None:
    chip, shipped, cache = "NVIDIA H200", tmp_path / "shipped", tmp_path / "cache"
    shipped.mkdir()
    (shipped / "nvidia_h100_h200.json").write_text(dump({ENTRY: Config(num_warps=64, BV=1)}))
    for _ in range(2):  # the second time the user's file has it
        assert bench.choose(bench.tuner(cache, chip=chip, shipped=shipped)) == FASTEST
    assert bench.measured == [*CANDIDATES]


@pytest.mark.parametrize(
    "text",
    ['[{"kernel": "wkv7', "{}x", "7", '[{"kernel": 1}]', '[{"kernel": "a", "key": [1], "config": 3}]', "\0"],
    ids=["cut", "syntax", "number", "no-key", "no-config", "binary"],
)
def test_a_damaged_file_costs_one_warning_and_a_measurement(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    bench.choose(bench.tuner(tmp_path))
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    bench.measured.clear()
    with caplog.at_level(logging.WARNING, logger=tuning.__name__):
        assert bench.choose(bench.tuner(tmp_path)) == FASTEST
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [f"{path} cannot be read"]
    assert bench.measured == [*CANDIDATES]
    assert parse(path.read_text()) == {ENTRY: FASTEST}


def test_a_directory_that_cannot_be_written_costs_one_warning(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING, logger=tuning.__name__):
        assert bench.choose(bench.tuner(tmp_path / "file" / "below")) == FASTEST
    assert "cannot be written" in caplog.text


sizes = st.integers(-(2**40), 2**40)
keys = st.lists(sizes | st.text(max_size=5), max_size=4).map(tuple)
names = st.text(string.ascii_letters + "_", min_size=1, max_size=8)
configs = st.dictionaries(names, sizes, max_size=4).map(lambda values: Config(**values))
tables = st.dictionaries(st.builds(Entry, st.text(max_size=8), keys), configs, max_size=4)


@given(tables)
def test_a_table_survives_its_file(table: tuning.Table) -> None:
    assert parse(dump(table)) == table


@given(configs, configs)
def test_equal_configs_have_equal_hashes(left: Config, right: Config) -> None:
    turned = Config(**dict(reversed(list(left.items()))))
    assert turned == left
    assert hash(turned) == hash(left)
    assert (left == right) == (dict(left) == dict(right))


def test_each_vendor_has_its_own_candidates() -> None:
    nvidia, amd = [Config(num_warps=2, maxnreg=160)], [Config(num_warps=1, waves_per_eu=2)]
    assert candidates_of(nvidia=nvidia, amd=amd, hip=None) == tuple(nvidia)
    assert candidates_of(nvidia=nvidia, amd=amd, hip="6.4") == tuple(amd)


@pytest.mark.parametrize(("vendor", "option"), [("amd", "maxnreg"), ("nvidia", "matrix_instr_nonkdim")])
def test_an_option_of_one_vendor_is_refused_for_the_other(vendor: str, option: str) -> None:
    lists = {"nvidia": [SLOW], "amd": [SLOW]} | {vendor: [SLOW, Config(num_warps=2, **{option: 16})]}
    with pytest.raises(AssertionError, match=option):
        candidates_of(**lists)


@pytest.mark.parametrize("table", SHIPPED)
def test_the_shipped_tables_can_be_read(table: str) -> None:
    parse((tuning.KERNELS / "tables" / f"{table}.json").read_text())


@pytest.mark.parametrize(
    ("chip", "table"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia_h100_h200"),
        ("NVIDIA H200", "nvidia_h100_h200"),
        ("NVIDIA GH200 480GB", "nvidia_h100_h200"),
        ("AMD Instinct MI300X gfx942:sramecc+:xnack-", "amd_mi300x"),
        ("AMD Radeon Graphics gfx942:sramecc+:xnack-", "amd_mi300x"),
        ("NVIDIA H20", None),
        ("NVIDIA A100-SXM4-80GB", None),
    ],
    ids=lambda value: str(value).replace(" ", "-"),
)
def test_shipped_tables_serve_their_chips(chip: str, table: str | None) -> None:
    assert [name for name, chips in SHIPPED.items() if chips.search(chip)] == ([table] if table else [])


def write_choices(cache: Path, name: str, start) -> None:
    bench = Bench({SLOW: 3.0, FAST: 2.0, FASTEST: 1.0})
    tuner = bench.tuner(cache)
    start.wait()
    for i in range(40):
        bench.choose(tuner, Entry(name, (i,)))


def test_two_processes_writing_leave_a_whole_file(tmp_path: Path) -> None:
    """Readers meet no part of a file; a choice may be lost to the other writer, never spoilt."""
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    writers = [context.Process(target=write_choices, args=(tmp_path, name, start)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        for path in tmp_path.glob("*.json"):
            parse(path.read_text())
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    (path,) = tmp_path.iterdir()
    table = parse(path.read_text())
    assert set(table.values()) == {FASTEST}
    assert table.keys() <= {Entry(name, (i,)) for name in "ab" for i in range(40)}
    assert table.keys() & {Entry(name, (39,)) for name in "ab"}  # the last write of all
