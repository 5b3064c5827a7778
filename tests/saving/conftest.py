"""What the tests of saving share."""

import pytest

from jaxtune.saving import checkpoint


@pytest.fixture
def failing(monkeypatch):
    """failing(times): lets a checkpoint's manifest fail to be written so many times, as a full disk does."""

    def begin(times):
        left, real = [times], checkpoint.write_manifest

        def write(*args, **options):
            if left[0] > 0:
                left[0] -= 1
                raise OSError(28, "No space left on device")
            real(*args, **options)

        monkeypatch.setattr(checkpoint, "write_manifest", write)

    return begin
