"""Finding a browser for the tests: Playwright's own Chromium, else the one of the system."""

import os
import shutil
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def launch(playwright):
    """Start Chromium without a window; skips the test when there is none on this machine.

    Expectations may then take a minute, on a machine that does much else.
    """
    pytest.importorskip("playwright.sync_api").expect.set_options(timeout=60_000)
    own = playwright.chromium.executable_path
    paths = [os.environ.get("CHROMIUM"), own, *(shutil.which(name) for name in NAMES)]
    for path in paths:
        if path and Path(path).exists():
            return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
    pytest.skip("no Chromium here: `playwright install chromium`, or set $CHROMIUM to one")


def shot(page, name):
    """Keep a picture when $SCREENSHOTS names a folder."""
    if os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(os.environ["SCREENSHOTS"]) / f"{name}.png")
