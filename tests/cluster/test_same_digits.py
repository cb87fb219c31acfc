"""A chapter's record says the same to the last digit, wherever its tasks ran."""

import shutil
import subprocess
import sys

from lablog.files import repository
from lablog.profiles import load
from lablog.record import Record
from lablog.runner import difference, figure_differences

NAME = "02_lambda_calibration"
SETTING = "02.seeds=[1, 2]"  # as it is: results in a folder of their own, beside other tests


def test_a_chapter_on_two_workers_leaves_the_record_of_one_machine(two):
    root = repository()
    here = root / "build" / load("smoke", [SETTING]).name
    there = here.with_name(f"{here.name}-elsewhere")
    for folder in (here, there):
        shutil.rmtree(folder, ignore_errors=True)
    runner = [sys.executable, "-m", "lablog.runner"]
    for command in (["plan", "--profile", "smoke", "--set", SETTING, "--", "02"],
                    ["run", str(here), NAME]):
        subprocess.run([*runner, *command], cwd=root, check=True, capture_output=True)
    shutil.copytree(here / "parameters", there / "parameters")
    (there / "artifacts").mkdir()
    for made in (here / "artifacts").glob("dialogue-*"):  # the model, and no row of the sweep
        (shutil.copytree if made.is_dir() else shutil.copy)(made, there / "artifacts" / made.name)
    subprocess.run([*runner, "run", str(there), NAME, "--cluster", two.address], cwd=root,
                   check=True, capture_output=True)
    one, other = (Record.read(folder / "records" / f"{NAME}.json") for folder in (here, there))
    assert difference(one, other) == []
    assert figure_differences(here / "figures" / NAME, there / "figures" / NAME) == []
    places = {place.worker for place in other.tasks}
    assert len(places) == 2
    assert all("tcp://127.0.0.1" in place for place in places)
    assert {place.kind for place in other.tasks} == {"sweep", "calibration"}
    for folder in (here, there):
        shutil.rmtree(folder)
