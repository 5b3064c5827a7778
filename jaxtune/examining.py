"""What `python -m jaxtune.doctor` looks at, from the versions up to the data, as every host sees it."""

import importlib.metadata
import os
import pathlib
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import packaging.requirements
import packaging.utils
from etils import epath

from jaxtune import assembly, blueprint, hosts, hub, sharding
from jaxtune.asking import Finding
from jaxtune.compat import has_chips, has_gpu
from jaxtune.config import Config
from jaxtune.convert.folder import open_folder
from jaxtune.data.chat.templates import load_template, load_tokenizer
from jaxtune.data.files.sources import open_source
from jaxtune.data.planning import evaluation_tree, training_tree
from jaxtune.saving.local_tier import own_folder

GIB = 2**30
CLOCK_SECONDS = 5.0  # a lock's heartbeat and the times of logs bear this much
FEW_FILES = 1024  # open files that thousands of sources and their workers go through
LITTLE_DISK = GIB
# libraries whose version decides what is computed or read, beside those that we require by name
ACCELERATORS = ("jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "tokamax")


class Report(NamedTuple):
    """All findings by section, and what was measured along each mesh axis, GB/s."""

    findings: dict[str, list[Finding]]
    bandwidth: dict[str, float]
    speaks: bool

    @property
    def is_fine(self) -> bool:
        """Whether nothing is wrong; warnings are not."""
        return not any(finding.level == "error" for found in self.findings.values() for finding in found)

    def as_json(self) -> dict[str, Any]:
        """Returns the report as plain values."""
        told = {section: [finding._asdict() for finding in found] for section, found in self.findings.items()}
        return {"fine": self.is_fine, "findings": told, "all_reduce_gigabytes_per_second": self.bandwidth}


def examine(config: Config | None, *, megabytes: int, say: Callable[[str], None] = print) -> Report:
    """Looks at everything, says each finding as it is made, and goes on past what is wrong.

    Args:
        config: of the run to be; None looks at the machines alone.
        megabytes: what each device holds in an all-reduce, in 10^6 bytes.
        say: told by host 0 alone.
    """
    hosts.start()
    speaks = hosts.index() == 0
    findings: dict[str, list[Finding]] = {}
    bandwidth: dict[str, float] = {}

    def section(name: str, look: Callable[[], Iterator[Finding]]) -> None:
        findings[name] = _of_all(look)
        for finding in findings[name]:
            if speaks:
                say(f"{name:9} {finding.level:8} {finding.text}")

    section("versions", _versions)
    section("hosts", lambda: _hosts(config))
    section("devices", _devices)
    mesh, problem = _mesh(config)
    section("mesh", lambda: _about_mesh(mesh, problem, config))
    if mesh is not None and problem is None:
        bandwidth = _all_reduces(mesh, megabytes)
        section("links", lambda: _about_links(mesh, bandwidth, megabytes))
    section("disks", _disks)
    if config is not None:
        section("model", lambda: _model(config))
        section("data", lambda: _data(config))
        section("output", lambda: _output(config))
        if config.checkpoint.local.path is not None:
            section("local", lambda: _local_disk(config))
    report = Report(findings, bandwidth, speaks)
    if speaks:
        say("nothing is wrong" if report.is_fine else "something is wrong: see the lines marked error")
    return report


def _of_all(look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """Every host's findings; what all of them found is told once, what some found with their names."""
    own = []
    try:
        for finding in look():
            own.append(finding)
    except (ValueError, OSError, ImportError) as error:
        own.append(Finding("error", str(error)))
    told = hosts.gather([list(finding) for finding in own])
    found: dict[Finding, list[int]] = {}
    for host, theirs in enumerate(told):
        for level, text in theirs:
            found.setdefault(Finding(level, text), []).append(host)
    merged = []
    for finding, of in found.items():
        whose = "" if len(of) == hosts.count() else f"{', '.join(hosts.names()[host] for host in of[:4])}: "
        merged.append(Finding(finding.level, whose + finding.text))
    return merged


def _versions() -> Iterator[Finding]:
    """Ours, the libraries' that we require, and whether each lies in the range that we were tested with."""
    own = _version("jaxtune")
    yield Finding("ok", f"jaxtune {own or 'not installed'}, Python {platform.python_version()}, {platform.platform()}")
    told = []
    for text in (importlib.metadata.requires("jaxtune") or ()) if own is not None else ():
        requirement = packaging.requirements.Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None:
            yield Finding("error", f"{requirement.name} is not installed; expected {requirement.specifier}")
        elif not requirement.specifier.contains(found, prereleases=True):
            yield Finding("warning", f"{requirement.name} {found} is outside the tested range {requirement.specifier}")
        else:
            told.append(f"{requirement.name} {found}")
    told += [f"{name} {found}" for name in ACCELERATORS if (found := _version(name)) is not None]
    yield Finding("ok", ", ".join(told))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(packaging.utils.canonicalize_name(name))
    except importlib.metadata.PackageNotFoundError:
        return None


def _hosts(config: Config | None) -> Iterator[Finding]:
    """How many there are, whether their clocks and configurations agree, what each may open and hold."""
    yield Finding("ok", f"{hosts.count()} host(s), {jax.local_device_count()} device(s) on this one")
    if hosts.count() > 1:
        spread = _clock_spread()
        level = "ok" if spread < CLOCK_SECONDS else "error"
        more = "" if level == "ok" else f"; expected less than {CLOCK_SECONDS:g} s: start ntp or chrony on the hosts"
        yield Finding(level, f"clocks agree within {spread:.2g} s{more}")
        hosts.refuse_differences(_must_agree(config))
        yield Finding("ok", "configuration and versions are the same on all hosts")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit < FEW_FILES:
        yield Finding("warning", f"{limit} files may be open at once; `ulimit -n 65536` before training many sources")


def _must_agree(config: Config | None) -> dict[str, Any]:
    names = ("jaxtune", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers")
    versions = {f"{name}'s version": _version(name) for name in names}
    return versions | (config.model_dump(mode="json") if config is not None else {})


def _clock_spread() -> float:
    """Returns by how many seconds the clocks differ at most: the smallest of a few looks right after a barrier."""
    spreads = []
    for attempt in range(5):
        hosts.wait_for_all(f"clocks {attempt}")
        times = hosts.gather(time.time())
        spreads.append(max(times) - min(times))
    return min(spreads)


def _devices() -> Iterator[Finding]:
    """Kinds and memory, and whether each device of this host computes the same product."""
    kinds = sorted({device.device_kind for device in jax.devices()})
    level = "ok" if len(kinds) == 1 else "error"
    yield Finding(level, f"{jax.device_count()} x {', '.join(kinds)}, {jax.default_backend()}")
    if jax.default_backend() == "cpu" and (has_chips() or has_gpu()):
        yield Finding(
            "warning",
            "an accelerator's device files are here, but jax runs on the CPU; install jaxtune[tpu] "
            "or jaxtune[cuda], and look at JAX_PLATFORMS",
        )
    rows = np.random.default_rng(0).standard_normal((256, 256), np.float32)
    results: dict[Any, float] = {}
    limits: list[int] = []
    for device in jax.local_devices():
        x = jax.device_put(rows, device)
        results[device] = np.asarray(jnp.sum(x @ x)).item()
        stats = device.memory_stats() or {}
        used, limit = stats.get("bytes_in_use", 0), stats.get("bytes_limit")
        if limit:
            limits.append(limit)
        if limit and used > limit / 10:
            yield Finding("warning", f"{device}: {used / GIB:.1f} of {limit / GIB:.1f} GiB are already taken")
    if len(set(results.values())) > 1:
        listed = ", ".join(f"{device} {value!r}" for device, value in results.items())
        yield Finding("error", f"the devices do not agree on a sum: {listed}; one of them is damaged")
    elif limits:
        yield Finding("ok", f"{min(limits) / GIB:.1f} GiB of memory on each device; all compute the same")


def _mesh(config: Config | None) -> tuple[Any, str | None]:
    """Returns the mesh (None where the sizes do not fit the devices), and what is wrong with it."""
    try:
        mesh = sharding.make_mesh(config.mesh.model_dump() if config is not None else {"fsdp": -1})
    except ValueError as error:
        return None, str(error)
    if config is not None:
        try:
            blueprint.check_rows(config, mesh)
        except ValueError as error:
            return mesh, str(error)
    return mesh, None


def _about_mesh(mesh: Any, problem: str | None, config: Config | None) -> Iterator[Finding]:
    if problem is not None:
        yield Finding("error", problem)
        return
    sizes = sharding.mesh_words(mesh.shape)
    rows = f", {config.train.batch_rows} rows a batch" if config is not None else ""
    yield Finding("ok", f"{sizes}{rows}")


def _all_reduces(mesh: Any, megabytes: int) -> dict[str, float]:
    """Returns GB/s of an all-reduce along each axis of more than one device, as a ring would send them."""
    found = {}
    for axis, ways in mesh.shape.items():
        if ways > 1:
            seconds = sharding.time_all_reduce(mesh, axis, size=megabytes * 10**6)
            found[axis] = 2 * (ways - 1) / ways * megabytes / 1e3 / seconds
    return {axis: min(values) for axis, values in ((a, [one[a] for one in hosts.gather(found)]) for a in found)}


def _about_links(mesh: Any, bandwidth: dict[str, float], megabytes: int) -> Iterator[Finding]:
    for axis, rate in bandwidth.items():
        yield Finding("ok", f"all-reduce over {axis} ({mesh.shape[axis]}): {rate:.3g} GB/s ({megabytes} MB a device)")


def _disks() -> Iterator[Finding]:
    """Whether caches can be written, and have room."""
    for what, path in (("the cache", hub.cache_dir()), ("temporary files", tempfile.gettempdir())):
        try:
            os.makedirs(path, exist_ok=True)
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(b"x")
            free = shutil.disk_usage(path).free
        except OSError as error:
            yield Finding("error", f"{what}: {path} cannot be written ({error.strerror}); set JAXTUNE_CACHE or TMPDIR")
            continue
        level = "ok" if free > LITTLE_DISK else "warning"
        yield Finding(level, f"{what}: {path}, {free / GIB:.0f} GiB free")


def _model(config: Config) -> Iterator[Finding]:
    """Whether the model's folder, its weights' headers, its tokenizer and the template can be read."""
    path = hub.resolve_folder(config.model.path, config.model.revision)
    folder = open_folder(path, needs_weights=config.model.init == "pretrained")
    model = assembly.model_config(folder)
    size = sum(info.stop - info.start for info in folder.tensors.values())
    yield Finding(
        "ok", f"{path}: {folder.config.get('model_type')}, {size / GIB:.2f} GiB in {len(folder.headers)} files"
    )
    tokenizer = load_tokenizer(path)
    if model.is_encoder_decoder and config.data.template == "auto" and not tokenizer.chat_template:
        yield Finding("ok", "template: plain")  # what training takes for such a model
    else:
        yield Finding("ok", f"template: {load_template(config.data.template, tokenizer).name}")


def _data(config: Config) -> Iterator[Finding]:
    """Whether each source can be opened on this host and gives its first row."""
    trees = [training_tree(config)[0]] if config.data.train else []
    evaluated = evaluation_tree(config)
    leaves = [leaf for tree in (*trees, *([evaluated] if evaluated is not None else [])) for leaf in tree.leaves()]
    seen: set[str | None] = set()
    rows = 0
    for leaf in leaves:
        if leaf.config.path in seen:
            continue
        seen.add(leaf.config.path)
        try:
            source = open_source(leaf.config)
            if len(source):
                source.row(0)
            rows += len(source)
        except hub.MissingSource as error:
            yield Finding("error" if config.data.missing == "error" else "warning", str(error))
        except (ValueError, OSError) as error:
            yield Finding("error", f"{leaf.name}: {error}")
    yield Finding("ok", f"{len(seen)} source(s) looked for, {rows:,} rows in those found")


def _output(config: Config) -> Iterator[Finding]:
    """Whether all hosts see one output folder or bucket, and host 0 can write there."""
    folder = epath.Path(config.output).expanduser()
    is_bucket = hub.is_url(config.output)
    there = folder if is_bucket else _nearest(pathlib.Path(folder))
    mark = epath.Path(there) / f".doctor-{hosts.from_first(os.getpid())}"
    problem, sees = None, False
    try:  # a bucket's client has types of error of its own, and no host may leave before all have looked
        if hosts.index() == 0:
            mark.write_text("seen")
    except Exception as error:
        problem = f"{there} cannot be written ({error}); expected a folder or bucket that host 0 may write to"
    problem = hosts.from_first(problem)
    try:
        sees = problem is None and mark.exists()
    except Exception as error:
        problem = f"{there} cannot be read ({error}); expected a folder or bucket that every host may read"
    hosts.wait_for_all("every host has looked for the mark")
    if hosts.index() == 0 and sees:
        mark.unlink(missing_ok=True)
    if problem is not None:
        yield Finding("error", problem)
    elif not sees:
        yield Finding("error", f"{there} is another folder here than on host 0; expected one that all hosts share")
    else:
        free = "" if is_bucket else f", {shutil.disk_usage(there).free / GIB:.0f} GiB free"
        yield Finding("ok", f"{folder}: seen by all hosts{free}")


def _local_disk(config: Config) -> Iterator[Finding]:
    """Whether this host can write where its copies of states are to be, and how much room there is."""
    assert config.checkpoint.local.path is not None
    folder = own_folder(config.checkpoint.local.path)
    there = _nearest(folder)
    with tempfile.TemporaryFile(dir=there):
        yield Finding("ok", f"{folder}: {shutil.disk_usage(there).free / GIB:.0f} GiB free")


def _nearest(folder: pathlib.Path) -> pathlib.Path:
    """The folder, or the nearest one above it that is there."""
    return folder if folder.exists() else next(parent for parent in folder.absolute().parents if parent.exists())
