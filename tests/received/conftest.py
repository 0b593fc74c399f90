import shutil

import pytest

from tests.received.kinds import make_kinds


@pytest.fixture(scope="session")
def kinds(tiny_experiment, tmp_path_factory):
    """A folder with one small folder of every kind that a person can be sent."""
    root = tmp_path_factory.mktemp("kinds")
    make_kinds(tiny_experiment, root)
    return root


@pytest.fixture
def received(kinds, tmp_path, monkeypatch):
    """A copy of it, which is the working folder."""
    root = tmp_path / "received"
    shutil.copytree(kinds, root)
    monkeypatch.chdir(root)
    return root
