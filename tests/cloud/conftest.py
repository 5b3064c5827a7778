import pathlib

import pytest
from cloud_stubs import Stubs


@pytest.fixture
def stubs(tmp_path: pathlib.Path) -> Stubs:
    """Stand-ins for every cloud program; nothing of the user's environment reaches the scripts."""
    return Stubs(tmp_path / "stubs")
