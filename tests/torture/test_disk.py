"""A small disk: a short part of ``make torture``."""

import shutil
from pathlib import Path

import pytest

from torture import disk
from torture.disk import chosen, may_mount, mounted, on_a_small_disk
from torture.results import SmallClone

mounts = pytest.mark.skipif(not may_mount(), reason="this process may not mount file systems")


@mounts
def test_a_run_without_room_ends_in_words_and_the_next_one_is_whole(tmp_path: Path):
    with on_a_small_disk(SmallClone(tmp_path)) as small:
        trial = small.trial(0.97)
        assert not trial.fault, trial


@mounts
@pytest.mark.parametrize("share", [0.0, 0.7])
def test_there_is_room_for_the_share_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
):
    """A run that ends well where there is no room for its results is a fault."""
    made = SmallClone(tmp_path)
    monkeypatch.setattr(made, "wrong_afterwards", lambda: "")
    with on_a_small_disk(made) as small:
        free: list[int] = []
        made.command = ("true",)
        start = made.start
        monkeypatch.setattr(made, "start", lambda: (
            free.append(shutil.disk_usage(made.built).free), start())[1])
        assert small.trial(share).fault == "it ended well, without the room for its results"
        assert 0 <= share * small.taken - free[0] <= 4096
        assert small.taken > 50_000


@mounts
def test_the_disk_is_small_and_gone_afterwards(tmp_path: Path):
    folder = tmp_path / "disk"
    with mounted(folder, 2**20):
        assert shutil.disk_usage(folder).total == 2**20
        with pytest.raises(OSError, match="No space left"):
            (folder / "file").write_bytes(bytes(2**21))
        assert str(folder) not in Path("/proc/1/mounts").read_text(), "others see it"
    assert not list(folder.iterdir())


def test_without_the_right_to_mount_it_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not disk.may_mount.__wrapped__()


def test_shares_are_spread_evenly():
    shares = chosen(10, 0)
    assert [int(10 * share) for share in shares] == list(range(10))
    assert shares == chosen(10, 0) != chosen(10, 1)
    assert chosen(0, 0) == []
