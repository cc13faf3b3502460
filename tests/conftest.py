"""What tests share: none leaves a tap that is still looked at; the site is built once for all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moddiff.hooks import live_handles


@pytest.fixture(autouse=True)
def no_tap_stays_live():
    yield
    left = live_handles()
    assert not left, f"this test left sessions open on {left}"


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the documentation site, built as `mkdocs build` does it, with no way to the network."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    told = os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1"}
    told.pop("REPOSITORY", None)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=told, capture_output=True, text=True)
    said = done.stdout + done.stderr
    # A warning stops the build; with --quiet it would pass unseen, and the last word too.
    assert done.returncode == 0 and "WARNING" not in said and "Documentation built" in said, said
    return folder
