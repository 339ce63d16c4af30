"""The environment: one list of dependencies, and files that agree with it."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
WANTED = [Requirement(r) for r in PROJECT["dependencies"] + EXTRAS["serve"] + EXTRAS["test"]]


def pins(name):
    """{package: [requirement, ...]} of a constraints file."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def test_the_conda_environment_is_python_pip_and_this_package():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "nanochat" and environment["channels"] == ["conda-forge"]
    python, pip, rest = environment["dependencies"]
    assert pip == "pip" and rest == {"pip": ["-e .[serve,test]"]}
    conda = Requirement(python).specifier
    assert conda == Requirement(f"python{PROJECT['requires-python']}").specifier
    assert {"serve", "test"} <= set(EXTRAS)


@pytest.mark.parametrize("requirement", WANTED, ids=lambda r: r.name)
def test_constraints_pin_every_dependency_within_its_bounds(requirement):
    exact = pins("constraints.txt")[canonicalize_name(requirement.name)]
    lowest = pins("constraints-lowest.txt")[canonicalize_name(requirement.name)]
    for pin in [*exact, *lowest]:
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and "+" not in specifier.version
        assert requirement.specifier.contains(specifier.version)
    bound = re.search(r">=([\d.]+)", str(requirement.specifier))[1]
    low = next(iter(lowest[0].specifier)).version
    assert re.match(rf"{re.escape(bound)}(\.\d+)*$", low), f"{low} is not the bound {bound}"


def test_constraints_hold_no_local_paths_and_no_gpu_libraries():
    for name in ("constraints.txt", "constraints-lowest.txt"):
        text = (ROOT / name).read_text()
        assert not re.search(r"^(nvidia|cuda)|file:|@|\+cpu", text, re.MULTILINE)
    assert str(pins("constraints.txt")["torch"][0].specifier) == "==2.13.0"


def test_the_extras_are_those_of_the_readme():
    assert set(EXTRAS) == {"fast", "gpu", "serve", "docs", "nbgrader", "eval-hf", "track", "test"}


def test_installed_packages_satisfy_the_project():
    for requirement in WANTED:
        if requirement.marker is None or requirement.marker.evaluate():
            found = importlib.metadata.version(requirement.name)
            assert requirement.specifier.contains(found, prereleases=True), (requirement, found)


def make(*arguments, **environment):
    outer = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments],
        cwd=ROOT,
        env={**outer, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="make and sh")
def test_a_python_that_is_too_old_is_one_sentence(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\ncase "$1" in --version) echo Python 3.8.9;; *) exit 1;; esac\n')
    old.chmod(0o755)
    done = make("env", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}")
    assert done.returncode != 0
    sentence = done.stderr.splitlines()[0]
    assert sentence.startswith("nanochat needs Python 3.10 to 3.13 with venv; found: Python 3.8.9.")
    assert not (tmp_path / "venv").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="make and sh")
def test_the_verbs_are_there_and_chapter_asks_which(tmp_path):
    (tmp_path / ".nanochat-ready").touch()
    shown = make("help").stdout
    for verb in (
        "capstone",
        "chat",
        "lab",
        "chapter N=03",
        "chapters",
        "test",
        "check",
        "grade DIR",
    ):
        assert f"make {verb}" in shown
    venv = [f"VENV={tmp_path}"]
    os.utime(tmp_path / ".nanochat-ready", (4e9, 4e9))
    done = make("chapter", *venv)
    assert done.returncode != 0 and "which chapter? make chapter N=03" in done.stderr
    done = make("grade", *venv)
    assert done.returncode != 0 and "which folder? make grade DIR=submissions" in done.stderr
    dry = make("-n", "capstone", *venv)
    plain = f"{tmp_path}/bin/python -m nanochat capstone --profile laptop"
    assert dry.stdout.strip() == plain
    mine = make("-n", "capstone", "MINE=1", *venv).stdout.strip()
    assert mine == f"{plain} --set mine=work --set name=laptop-mine"


def test_git_ignores_what_is_made_by_running():
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"/work/", "/runs/", "/.venv/", "__pycache__/"} <= set(ignored)
