"""What the tests of both programs share."""

import assignment
import pytest


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    """No test writes to the project's own outputs/."""
    monkeypatch.setattr(assignment, "OUTPUTS", tmp_path / "outputs")
    return tmp_path / "outputs"


@pytest.fixture
def ending(monkeypatch):
    """Runs a program with flags; what it ends with, as `sys.exit` takes it."""

    def ending(program, flags=""):
        monkeypatch.setattr("sys.argv", ["program.py", *flags.split()])
        with pytest.raises(SystemExit) as ended:
            program()
        return ended.value.code

    return ending


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, to be read without their pixels."""
    saved = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: saved.append(figure))
    return saved
