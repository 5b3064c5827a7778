"""What holds for every test: CPU with 8 fake devices, no network, a compilation cache that outlives the run."""

import os
import pathlib
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "jaxtune-test-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from jaxtune.compat import prepare_environment

prepare_environment()  # before jax: threads for the 8 devices

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real records and checkpoints beside the repository; tests that ask for it skip without it."""
    if not (SHARED / "data" / "DATA.md").is_file():
        pytest.skip("no ../shared/data beside the repository")
    return SHARED / "data"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes and length passes of a test never come from, or go to, the user's own cache."""
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "jaxtune-cache"))
