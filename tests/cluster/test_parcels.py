"""Paths mean the same on both sides; files arrive whole, where they belong, or not at all."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lablog.cluster.parcels import Entry, Parcel, listed, pack, put, unload, unpack

NAMES = st.lists(st.sampled_from(["a", "b", "c.d", "é f"]), max_size=3)


def places(root: Path) -> dict[str, Path]:
    return {"artifacts": root / "clone" / "build" / "artifacts", "clone": root / "clone"}


@given(place=st.sampled_from(["artifacts", "clone"]), inner=NAMES, value=st.integers())
def test_a_path_below_a_place_is_told_from_there(place, inner, value):
    here, there = places(Path("/here")), places(Path("/there"))
    path = here[place].joinpath(*inner)
    data, paths = pack({"path": path, "value": [value, (path,)]}, here)
    assert paths == [path, path]
    expected = there[place].joinpath(*inner)
    assert unpack(data, there) == {"path": expected, "value": [value, (expected,)]}


def test_a_path_elsewhere_stays_as_it_is(tmp_path):
    data, _ = pack(Path("/elsewhere/x"), places(tmp_path))
    assert unpack(data, places(Path("/there"))) == Path("/elsewhere/x")


def test_what_is_read_is_listed_with_its_hash(tmp_path):
    here = places(tmp_path)
    folder = here["artifacts"] / "model"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"1")
    digest = hashlib.sha256(b"1").hexdigest()
    assert listed([folder], here) == {
        Entry("artifacts", "model/weights", digest): folder / "weights"}
    with pytest.raises(FileNotFoundError, match="is missing: a task reads it"):
        listed([folder / "other"], here)
    with pytest.raises(ValueError, match="outside the clone"):
        listed([Path("/etc/hostname")], here)


def test_damaged_foreign_and_escaping_files_are_refused(tmp_path):
    here = places(tmp_path)
    digest = hashlib.sha256(b"1").hexdigest()
    put(Entry("clone", "x", digest), b"1", here)
    assert (here["clone"] / "x").read_bytes() == b"1"
    with pytest.raises(ValueError, match="arrived damaged"):
        put(Entry("clone", "y", digest), b"2", here)
    with pytest.raises(ValueError, match="leads out of"):
        put(Entry("clone", "../y", digest), b"1", here)
    other = hashlib.sha256(b"2").hexdigest()
    with pytest.raises(OSError, match="other contents"):
        put(Entry("clone", "x", other), b"2", here)
    assert (here["clone"] / "x").read_bytes() == b"1"
    assert not (here["clone"] / "y").exists()


def test_a_folder_comes_whole_or_not_at_all(tmp_path):
    here = places(tmp_path)
    path = here["artifacts"] / "made"
    good, digest = b"x", hashlib.sha256(b"x").hexdigest()
    entries = {Entry("artifacts", "made/a", digest): good, Entry("artifacts", "made/b/c", digest):
               b"damaged"}
    parcel = Parcel(pack(path, here)[0], 1.0, "worker", entries)
    with pytest.raises(ValueError, match="made/b/c arrived damaged"):
        unload(parcel, here)
    assert list(here["artifacts"].iterdir()) == []
    entries[Entry("artifacts", "made/b/c", digest)] = good
    assert unload(parcel, here) == path
    assert (path / "b" / "c").read_bytes() == good
