"""What all tests share: an offline environment, the optional real data, and a sample book."""

import os
import shutil
from pathlib import Path

import hypothesis
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
if not torch.cuda.device_count():  # then Triton's kernels run in Python; it looks when imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples on every machine, and no deadline: a busy machine is not a wrong program.
hypothesis.settings.register_profile("book", derandomize=True, deadline=None)
hypothesis.settings.load_profile("book")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text and tasks for development, beside the repository; absent on most machines."""
    path = Path(os.environ.get("NANOCHAT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("real data is not here; set NANOCHAT_SHARED_DATA to its folder")
    return path


SAMPLE = {
    "book.toml": """
title = "a sample book"
version = "0.0.1"
seconds = 60
memory_mb = 2000

[[chapter]]
name = "00_circle"
title = "Circles"
builds = "the area of a circle"
parameters = { radius = 2 }
modules = { circle = "Circles and their areas" }

[[chapter]]
name = "01_ring"
title = "Rings"
builds = "the area of a ring"
modules = { ring = "Rings", cut = "Cutting" }
""",
    "chapters/00_circle.py": '''
# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# Circles

The area is $\\pi r^2$, and a line that ends in a backslash: \\\\
"""

# %%
#| default_exp circle

# %% tags=["parameters"]
radius = 1

# %%
import tempfile

# %%
#| export
import math
import os
from collections.abc import Iterable


# %%
def area(r):
    return 3 * r * r


# %%
#| export
# Twice pi.
TAU = 2 * math.pi


def area(r: float) -> float:
    """The area of a circle of radius `r`."""
    return TAU / 2 * r**2


# %%
#| export
def areas(radii: Iterable[float]) -> list[float]:
    return [area(r) for r in radii]


# %%
#| test
assert area(1.0) == math.pi

# %%
print("half", end="\\r")
print("done", round(area(radius), 3))
print(os.getcwd(), tempfile.mkdtemp())

# %%
object()
''',
    "chapters/01_ring.py": '''
# %% [markdown]
r"""
# Rings
"""

# %%
#| default_exp ring
from nanochat.circle import area

round(area(1), 2)

# %%
#| export cut
def cut(outer: float, inner: float) -> float:
    return outer - inner


# %%
#| export
from nanochat.circle import area


def ring(outer: float, inner: float) -> float:
    return cut(area(outer), area(inner))


if __name__ == "__main__" and "__file__" in globals():
    print(ring(2, 1))

# %%
#| test
assert ring(1, 1) == 0

# %%
round(ring(2, 1), 3)
''',
    "exercises/00_circle.py": '''
# %% [markdown]
r"""
# Exercises on circles
"""

# %%
#| given
import math

# %%
from book.graded import check, hint, progress


# %%
#| exercise id=00-square points=2 minutes=5 level=1 answer=square
def square(x: float) -> float:
    """The square of x."""
    # BEGIN SOLUTION
    return x * x
    # END SOLUTION


# %%
check("00-square", square)


# %%
#| checks 00-square
@says("squares numbers", "A square is a number times itself.")
def _(square):
    assert close(square(3.0), 9.0)


@says("is never negative", "Minus times minus is plus.")
def _(square):
    assert square(-2.0) >= 0


# %%
#| hints 00-square
hints = ["What is an area?", "Multiply.", "`x * x`"]


# %%
#| wrong 00-square: squares numbers
def square(x):
    return abs(x) * 2


# %%
#| wrong 00-square: is never negative
def square(x):
    return x * abs(x)


# %%
#| right 00-square
def square(x):
    return math.pow(x, 2)


# %%
progress()
''',
}


def write_sample(folder: Path) -> Path:
    for name, text in SAMPLE.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip("\n"), encoding="utf-8")
    return folder


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """The folder of a small book with two chapters and a sheet, nothing derived yet."""
    return write_sample(tmp_path / "sample")


@pytest.fixture(scope="session")
def printed_once(tmp_path_factory) -> Path:
    from book.manuscript import load_book
    from book.printing import print_book

    folder = write_sample(tmp_path_factory.mktemp("printed") / "sample")
    print_book(load_book(folder), [])
    return folder


@pytest.fixture
def printed(printed_once: Path, tmp_path: Path) -> Path:
    """A copy of the sample book with everything derived and fresh."""
    return Path(shutil.copytree(printed_once, tmp_path / "printed"))
