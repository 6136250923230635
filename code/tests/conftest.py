"""Fixtures shared by several test files."""

from unittest.mock import patch

import assignment
import pytest
from vae import CVAE, VAE


@pytest.fixture(params=[VAE, CVAE])
def make(request):
    """Run the test with both classes."""
    return request.param


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    """Redirect outputs/ to a temporary folder."""
    monkeypatch.setattr(assignment, "OUTPUTS", tmp_path / "outputs")
    return tmp_path / "outputs"


@pytest.fixture
def exit_argument():
    """Return a function that runs a program with flags and returns its `sys.exit` argument."""

    def run(program, flags=""):
        with patch("sys.argv", ["program.py", *flags.split()]), pytest.raises(SystemExit) as ended:
            program()
        return ended.value.code

    return run


@pytest.fixture
def figures(monkeypatch):
    """Collect the figures that would be saved, so that a test can inspect them."""
    saved = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: saved.append(figure))
    return saved
