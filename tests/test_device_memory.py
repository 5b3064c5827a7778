"""Which errors are a lack of device memory."""

import jax
import pytest

from jaxtune.memory import is_out_of_memory


@pytest.mark.parametrize(
    ("text", "is_lack"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.00TiB", True),
        ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory ...", True),
        ("RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: Ran out of memory in memory space vmem", False),
        ("INVALID_ARGUMENT: No such compile option", False),
    ],
)
def test_vector_memory_is_no_device_memory(text: str, is_lack: bool) -> None:
    assert is_out_of_memory(jax.errors.JaxRuntimeError(text)) is is_lack
    assert not is_out_of_memory(ValueError(text))
