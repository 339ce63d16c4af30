"""A JupyterLab server for browser tests, with settings and state of its own."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def serve_lab(folder: Path, *paths: Path) -> Iterator[tuple[str, str]]:
    """Serve `folder`, with `paths` as PYTHONPATH; yields (address, token)."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port, token = sock.getsockname()[1], secrets.token_hex(8)
    state = folder.parent / "lab-state"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
        env[f"JUPYTER_{name}"] = str(state / name)
    for name in ("SETTINGS_DIR", "WORKSPACES_DIR"):
        env[f"JUPYTERLAB_{name}"] = str(state / name)
    for name, text in {
        "apputils-extension/notification": '{"fetchNews": "false"}',
        "notebook-extension/tracker": '{"windowingMode": "none"}',  # all cells are in the page
    }.items():
        path = state / "SETTINGS_DIR" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--expose-app-in-browser"]
    command += [f"--port={port}", f"--IdentityProvider.token={token}", f"--notebook-dir={folder}"]
    command += ["--allow-root", "--ServerApp.port_retries=0", "--LabApp.check_for_updates_class="]
    command[-1] += "jupyterlab.handlers.announcements.NeverCheckForUpdate"
    with open(state / "log.txt", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
    url, end = f"http://127.0.0.1:{port}", time.perf_counter() + 60
    try:
        while True:
            try:
                urllib.request.urlopen(url + f"/api?token={token}").close()
                break
            except OSError:
                assert server.poll() is None, (state / "log.txt").read_text()
                assert time.perf_counter() < end, "JupyterLab did not start in a minute"
                time.sleep(0.1)
        yield url, token
    finally:
        server.terminate()
        server.wait(20)
