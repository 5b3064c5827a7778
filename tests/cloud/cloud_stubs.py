"""Stand-ins for gcloud, kubectl, sbatch and the like: they record how they were called and answer as a test says."""

import contextlib
import importlib.util
import io
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
CLOUD = ROOT / "cloud"
PROGRAMS = ("gcloud", "kubectl", "xpk", "sky", "sbatch", "squeue", "scancel", "srun", "scontrol", "docker")
NOT_FOUND = "echo 'ERROR: (gcloud) NOT_FOUND: Resource was not found' >&2; exit 1"

# For `Stubs.wait_until_asleep`: a shell that is interrupted while a command of its own ends would go on.
ASLEEP = ': >"$STUBS/asleep"; exec sleep 30'

# Records the words of the call, then plays the next answer of the first rule whose text is in them.
STUB = """#!/usr/bin/env bash
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n\\0'; } >>"$STUBS/calls"
line="${0##*/} $*"
for rule in "$STUBS"/rules/*/; do
  [ -e "$rule/text" ] || continue
  if [[ $line == *"$(<"$rule/text")"* ]]; then
    next=$(cat "$rule/next" 2>/dev/null || echo 0)
    [ -e "$rule/$((next + 1)).sh" ] && echo $((next + 1)) >"$rule/next"
    source "$rule/$next.sh"
    exit
  fi
done
exit 0
"""


class Stubs:
    """A folder of programs that go before the real ones in PATH, and what they were asked."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        (folder / "rules").mkdir()
        (folder / "home").mkdir()
        for program in PROGRAMS:
            (self.bin / program).write_text(STUB)
            (self.bin / program).chmod(0o755)
        self.environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(folder / "home"),
            "STUBS": str(folder),
            "PYTHON": sys.executable,
            "JAXTUNE_CLOUD_PAUSE": "0",
            "LANG": "C.UTF-8",
        }

    def answer(self, text: str, *snippets: str) -> None:
        """Calls with `text` in them run the snippets of bash one after the other, the last one again and again.

        The rule that was made first decides; without a rule a call prints nothing and succeeds.
        """
        rule = self.folder / "rules" / f"{len(list((self.folder / 'rules').iterdir())):03}"
        rule.mkdir()
        (rule / "text").write_text(text)
        for number, snippet in enumerate(snippets or ("",)):
            (rule / f"{number}.sh").write_text(snippet + "\n")

    def calls(self) -> list[list[str]]:
        """Every call so far, as a list of words."""
        recorded = self.folder / "calls"
        text = recorded.read_text() if recorded.exists() else ""
        return [call.split("\0")[:-1] for call in text.split("\n\0")[:-1]]

    def lines(self) -> list[str]:
        """Every call so far, each as one line that a shell would read."""
        return [shlex.join(call) for call in self.calls()]

    def start(self, script: str, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Starts a script of cloud/ in a session of its own, as a terminal would."""
        return subprocess.Popen(
            ["bash", str(CLOUD / script), *words],
            env=self.environment | environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell that runs the tests in the background has them ignore Ctrl-C, which bash cannot undo.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def wait_until_asleep(self, process: subprocess.Popen[str]) -> None:
        """Returns when a call plays `ASLEEP`."""
        while not (self.folder / "asleep").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)

    def run(self, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a script of cloud/ to its end."""
        process = self.start(script, *words, **environment)
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def render(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """What a renderer of cloud/ prints, without a process of its own."""
    if str(CLOUD) not in sys.path:
        sys.path.insert(0, str(CLOUD))
    spec = importlib.util.spec_from_file_location(script.replace("/", "_").removesuffix(".py"), CLOUD / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = module.main(words)
    return subprocess.CompletedProcess([script, *words], code, out.getvalue(), err.getvalue())


def dry_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The commands that a dry run printed, in the form of `Stubs.lines`."""
    assert done.returncode == 0, done.stderr
    return [shlex.join(shlex.split(line)) for line in done.stdout.splitlines()]
