"""Files for hosts that are not at hand here: they name what is there, and nothing else."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TARGETS = set(re.findall(r"(?m)^([a-z-]+):.*##", (ROOT / "Makefile").read_text()))
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())


def test_the_workflow_types_what_a_newcomer_types():
    steps = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
    typed = [step["run"] for step in steps if "run" in step]
    assert typed == ["make test PYTHON=python"]
    assert all("@v" in step["uses"] for step in steps if "uses" in step)
    versions = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"]
    asked = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"',
                      (ROOT / "pyproject.toml").read_text())
    assert versions == [f"3.{minor}" for minor in range(int(asked[1]), int(asked[2]))]


def test_hooks_run_what_is_installed_and_nothing_from_elsewhere():
    assert [each["repo"] for each in HOOKS] == ["local"]
    for hook in HOOKS[0]["hooks"]:
        program = ROOT / hook["entry"].split()[0]
        assert hook["language"] == "fail" or program.name in ("ruff", "mypy", "python")


@pytest.mark.parametrize("name", ["a.ipynb", "w/x.gguf", "m.safetensors", "model.bin"])
def test_outputs_and_weights_are_kept_out(name):
    (kept_out,) = (hook for hook in HOOKS[0]["hooks"] if hook["id"] == "outputs")
    assert re.search(kept_out["files"], name)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                             check=False).stdout.splitlines()
    assert not [path for path in tracked if re.search(kept_out["files"], path)]


def test_machines_are_made_by_the_make_targets_that_exist():
    texts = [(ROOT / name).read_text() for name in (
        "Dockerfile", ".devcontainer/devcontainer.json", "binder/postBuild")]
    command = re.compile(r'(?m)(?:`|RUN |"|^)make ([a-z-]+)')
    named = {target for text in texts for target in command.findall(text)}
    assert named <= TARGETS
    assert "setup" in named
    devcontainer = json.loads(texts[1])["build"]
    assert (ROOT / ".devcontainer" / devcontainer["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert os.access(ROOT / "binder/postBuild", os.X_OK)
    ours, theirs = (yaml.safe_load((ROOT / name).read_text())["dependencies"]
                    for name in ("environment.yml", "binder/environment.yml"))
    assert ours == theirs


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert citation["license"] == "MIT"
