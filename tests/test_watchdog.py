"""A process that does nothing for too long says where it stands and ends, whatever it hangs in."""

import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
HANGS = """
import pathlib, re, sys, time
from jaxtune.faults import Watchdog
with Watchdog(1.0, pathlib.Path(sys.argv[1])) as watchdog:
    watchdog.beat()
    {hang}
"""


def hang_in(what: str, file: pathlib.Path) -> subprocess.CompletedProcess:
    words = [sys.executable, "-c", HANGS.format(hang=what), str(file)]
    return subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY, timeout=120)


def test_a_hang_ends_the_process_with_every_threads_stack_on_stderr_and_in_a_file(tmp_path):
    done = hang_in("time.sleep(100)", tmp_path / "hang.txt")
    assert done.returncode == 1
    for told in (done.stderr, (tmp_path / "hang.txt").read_text()):
        assert "nothing was done for 1 s (train.hang_seconds)" in told and 'File "<string>", line 6' in told


def test_a_hang_in_which_python_itself_does_not_run_ends_too(tmp_path):
    """A pattern that backtracks for ever holds the interpreter's lock: no thread of Python's can end the process."""
    done = hang_in("re.match('(a+)+$', 'a' * 64 + 'b')", tmp_path / "hang.txt")
    assert done.returncode == 1 and "Timeout" in done.stderr and 'File "<string>", line 6' in done.stderr


@pytest.mark.parametrize("what", ["[(time.sleep(0.3), watchdog.beat()) for _ in range(8)]", "pass"])
def test_who_works_is_left_alone(tmp_path, what):
    done = hang_in(what, tmp_path / "hang.txt")
    assert (done.returncode, done.stderr) == (0, "") and not (tmp_path / "hang.txt").exists()
