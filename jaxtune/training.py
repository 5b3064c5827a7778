"""A run from its configuration to the folders it exports, told in the order things happen."""

import contextlib
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxtune import adapters, agreement, assembly, blueprint, card, choosing, hosts, hub, planned
from jaxtune.config import Config
from jaxtune.convert.folder import read_config
from jaxtune.convert.writing import check_space
from jaxtune.exporting import export
from jaxtune.faults import Watchdog
from jaxtune.inputs import Inputs, count_steps, open_inputs
from jaxtune.loop import Loop, Outcome
from jaxtune.memory import memory_explained
from jaxtune.metrics import MetricsLog, SilentLog, Terminal, duration
from jaxtune.optimizer import warmup_steps
from jaxtune.run_folder import RunFolder, open_run_folder
from jaxtune.saving.checkpoint import Checkpoints, Patience
from jaxtune.saving.rollbacks import Rollbacks
from jaxtune.sharding import create_on_mesh, make_mesh, mesh_words, use_compilation_cache
from jaxtune.step import (
    TrainState,
    compile_eval_step,
    initial_state,
    make_eval_step,
    state_shardings,
)

FEW_STEPS = 20  # fewer updates than these hardly move a model


class Result(NamedTuple):
    """How a run ended. `loss` and `eval_loss` are the last ones, in nats; None where there was none."""

    exit_code: int
    step: int
    loss: float | None
    eval_loss: float | None
    output: str
    hf: str | None
    adapter: str | None


def run(config: Config) -> Result:
    """Runs a configuration to its end, on all hosts of the run together; see `jaxtune.train.train`."""
    hosts.start()
    terminal = Terminal(quiet=hosts.index() > 0)
    use_compilation_cache()
    agreement.check_command(config)
    folder = open_run_folder(config.output, say=terminal.say)
    try:
        config = _settled(config, terminal)
        with jax.set_mesh(make_mesh(config.mesh.model_dump())):
            return _run(config, folder, terminal)
    finally:
        folder.release()


def _settled(config: Config, terminal: Terminal) -> Config:
    """Returns the configuration with mesh, remat and rows at once chosen where they were left to us."""
    with hosts.together():
        path = hub.resolve_config(config.model.path, config.model.revision)
        choice = choosing.choose(config, read_config(path), jax.devices(), where=path, say=terminal.say)
    said = hosts.from_first(choice._asdict() if choice is not None else None)
    return choosing.Choice(**said).of(config) if said is not None else config


def _run(config: Config, folder: RunFolder, terminal: Terminal) -> Result:
    mesh = jax.sharding.get_mesh()
    blueprint.check_rows(config, mesh)
    with hosts.together():
        inputs, config = open_inputs(config, str(folder.local), terminal)
    agreement.check_inputs(inputs.base.fingerprint, {"data": inputs.stream, "evaluation": inputs.eval_stream})
    agreement.check_counted(config, inputs.stream)

    checkpoints = _open_checkpoints(config, folder, terminal)
    with checkpoints:
        newest, saved, rollbacks = _find_saved(config, folder, inputs, checkpoints, terminal)
        steps = count_steps(config, inputs.stream, saved)
        if saved and saved["step"] > steps:
            raise ValueError(
                f"train.steps: found {steps}, but {folder.path} is at step {saved['step']}; expected at least as many"
            )
        drawn = blueprint.draw(
            config,
            inputs.base.config,
            mesh,
            where=inputs.base.path,
            steps=steps,
            sources=len(inputs.stream.source_names) if inputs.stream is not None else 1,
        )
        plan = drawn.model
        terminal.say(_describe_plan(drawn, steps, inputs))
        with hosts.together():
            if hosts.index() == 0:
                folder.write_config(config)
            _check_disk(config, plan, inputs, folder)

        start = saved["step"] if saved else 0
        if start < steps and config.model.param_dtype == "file":
            assembly.refuse_float16(plan, inputs.base)
        state, frozen = _load_state(drawn, inputs, checkpoints, newest, terminal)
        checkpoints.check_local_room(state)
        if start < steps:
            train_step, eval_step = _compile(drawn, state, frozen, inputs, terminal)
            checkpoints.begin_local(start)
            state, outcome = _train(
                config,
                plan,
                inputs,
                train_step,
                eval_step,
                state,
                frozen,
                checkpoints,
                folder,
                terminal,
                steps,
                saved,
                rollbacks,
            )
        else:
            if saved and start not in checkpoints.finished():
                checkpoints.save(start, state, run=saved, wait=True)  # so far on the hosts' own disks alone
            if saved:
                terminal.say(f"{folder.path} is already at step {steps}; raise train.steps or train.epochs to go on")
            outcome = Outcome(start, loss=None, eval_loss=saved.get("eval_loss") if saved else None, exit_code=0)
        if not outcome.exit_code:
            checkpoints.drop_local()
    if outcome.exit_code:
        terminal.say(f"stopped at step {outcome.step} of {steps}, saved; the same command goes on from there")
        return Result(outcome.exit_code, outcome.step, outcome.loss, outcome.eval_loss, config.output, None, None)
    text = card.model_card(config, inputs.base, inputs.stream, outcome)
    with hosts.together():
        folder.check_lock()
        if hosts.index() == 0:
            (folder.path / "README.md").write_text(text, encoding="utf-8")
    hf, adapter = export(
        config, inputs.base, inputs.template, state.trainable, frozen, str(folder.path), readme=text, terminal=terminal
    )
    terminal.say(_summary(outcome, hf, adapter))
    if hosts.index() == 0:
        told = planned.compared(
            folder.path,
            device_kind=drawn.device_kind,
            devices=mesh.size,
            tokens=drawn.tokens,
            seconds=outcome.step_seconds,
        )
        if told is not None:
            terminal.say(told)
    return Result(0, outcome.step, outcome.loss, outcome.eval_loss, config.output, hf, adapter)


def _find_saved(
    config: Config, folder: RunFolder, inputs: Inputs, checkpoints: Checkpoints, terminal: Terminal
) -> tuple[int | None, dict[str, Any] | None, Rollbacks]:
    """Returns the newest intact step with its JSON, None where nothing was saved, and the times the run went back.

    Raises:
        ValueError: what is there is of another configuration, base model or data.
    """
    has_saved = checkpoints.has_saved()
    with hosts.together():
        folder.check_resume(config, has_saved=has_saved)
    newest = checkpoints.newest_usable(terminal.warn)
    rollbacks = Rollbacks(folder.path, start=newest or 0)
    if newest is None:
        return None, None, rollbacks
    saved = rollbacks.resumed(checkpoints.read_run(newest))
    if saved["base"] != inputs.base.fingerprint:
        raise ValueError(
            f"{inputs.base.path} is not the model that {folder.path} began with: its files have changed since. "
            "Put the old files back, or give another output="
        )
    if inputs.stream is None:
        return newest, saved, rollbacks
    try:
        inputs.stream.refuse_other(saved["stream"])
    except ValueError as error:
        if config.checkpoint.changed_data == "refuse":
            raise
        changes = str(error).partition(". Go back")[0]
        terminal.warn(f"{changes}; step {newest} goes on with the new data from its start (checkpoint.changed_data)")
        saved |= {"data": inputs.stream.initial_state(), "seen": None}
    return newest, saved, rollbacks


def _open_checkpoints(config: Config, folder: RunFolder, terminal: Terminal) -> Checkpoints:
    keys = config.checkpoint
    patience = Patience(keys.retries, keys.retry_seconds, keys.save_seconds)
    checkpoints = Checkpoints(str(folder.path / "checkpoints"), keep=keys.keep, patience=patience, say=terminal.say)
    if keys.local.path is not None:
        checkpoints.open_local(keys.local.path, jax.sharding.get_mesh())
    else:
        checkpoints.forget_local()
    return checkpoints


def _check_disk(config: Config, plan: assembly.ModelPlan, inputs: Inputs, folder: RunFolder) -> None:
    """Raises ValueError when the disk cannot hold what the run will write: a full disk at the end wastes the run."""
    trainable = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(plan.trainable))
    frozen = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(plan.frozen))
    files = sum(info.stop - info.start for info in inputs.base.tensors.values()) or trainable + frozen
    # A checkpoint holds weights and two moments; beside those kept there are the best one and one being written.
    checkpoints = 3 * trainable * (config.checkpoint.keep + 2) if config.train.steps != 0 else 0
    check_space(str(folder.path), checkpoints + (files if config.export.hf else 0))


def _compile(
    drawn: blueprint.Blueprint, state: TrainState, frozen: nnx.State, inputs: Inputs, terminal: Terminal
) -> tuple[Any, Any]:
    """Returns the compiled update, and the compiled evaluation where there is something to evaluate."""
    with memory_explained(drawn.config, None):
        with terminal.working("compiling the training step"):
            train_step = blueprint.compile_update(drawn, state, frozen)
        if inputs.eval_stream is None:
            return train_step, None
        with terminal.working("compiling the evaluation"):
            sources = len(inputs.eval_stream.source_names)
            evaluation = make_eval_step(drawn.model.graph, drawn.compute._replace(sources=sources))
            eval_step = compile_eval_step(
                evaluation, state.trainable, frozen, drawn.batch, device_kind=drawn.device_kind
            )
    return train_step, eval_step


def _train(
    config: Config,
    plan: assembly.ModelPlan,
    inputs: Inputs,
    train_step: Any,
    eval_step: Any,
    state: TrainState,
    frozen: nnx.State,
    checkpoints: Checkpoints,
    folder: RunFolder,
    terminal: Terminal,
    steps: int,
    saved: dict[str, Any] | None,
    rollbacks: Rollbacks,
) -> tuple[TrainState, Outcome]:
    """Does the updates that are left, logging as they go."""
    stream = inputs.stream
    assert stream is not None  # without data there are no steps, and nobody comes here
    start = saved["step"] if saved else 0
    log: MetricsLog = SilentLog()
    if hosts.index() == 0:
        log = MetricsLog(
            folder.local,
            resumed_step=start,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            config=config.model_dump(mode="json"),
        )
    for sentence in (*stream.warnings, *(inputs.eval_stream.warnings if inputs.eval_stream else ())):
        terminal.warn(sentence)
    if config.train.steps is None and steps < FEW_STEPS:
        terminal.warn(
            f"only {steps} updates: the data fills few batches of {config.train.batch_rows} rows; a smaller "
            "train.batch_rows or data.max_length, or more train.epochs, gives the model more of them"
        )
    loop = Loop(
        config=config,
        steps=steps,
        train_step=train_step,
        eval_step=eval_step,
        stream=stream,
        eval_stream=inputs.eval_stream,
        checkpoints=checkpoints,
        log=log,
        terminal=terminal,
        check_folder=folder.check_lock,
        watchdog=Watchdog(config.train.hang_seconds, folder.local / f"hang-host{hosts.index()}.txt"),
        mesh=jax.sharding.get_mesh(),
        flops_per_token=blueprint.flops_per_token(config, plan),
        base_fingerprint=inputs.base.fingerprint,
        rollbacks=rollbacks,
    )
    data_state = saved["data"] if saved else stream.initial_state()
    with contextlib.closing(log):
        seen = saved["seen"] if saved else None
        return loop.run(state, frozen, data_state, start=start, best=checkpoints.best_loss(), seen=seen)


def _describe_plan(drawn: blueprint.Blueprint, steps: int, inputs: Inputs) -> str:
    config, plan, mesh = drawn.config, drawn.model, drawn.mesh
    trainable, total = adapters.count(plan.trainable), adapters.count((plan.trainable, plan.frozen))
    split = mesh_words(mesh.shape)
    room = inputs.stream.maker.rows.room if inputs.stream else (config.data.max_length or 0,)
    tokens = config.train.batch_rows * sum(room)
    width = f"{room[0]}" if len(room) == 1 else f"({' + '.join(map(str, room))})"
    method = f"lora r {config.tuning.rank} on {', '.join(plan.adapted)}" if plan.adapted else "full"
    return "\n".join(
        [
            f"model {inputs.base.path}: {total:,} parameters, {trainable:,} of them trained "
            f"({trainable / total:.2%}; {method})",
            f"devices {mesh.devices.size} x {mesh.devices.flat[0].device_kind} ({split}); {drawn.why_attention}",
            f"{steps:,} steps of {config.train.batch_rows} rows x {width} = {tokens:,} tokens; "
            f"{config.optimizer.name}, learning rate {config.learning_rate:g} {config.optimizer.schedule}, "
            f"warm-up {warmup_steps(config, steps)} steps",
            f"writes to {config.output}",
        ]
    )


def _load_state(
    drawn: blueprint.Blueprint, inputs: Inputs, checkpoints: Checkpoints, newest: int | None, terminal: Terminal
) -> tuple[TrainState, nnx.State]:
    """Returns (state, frozen weights); the state as it was at step `newest`, if there is one."""
    config, plan, mesh, optimizer = drawn.config, drawn.model, drawn.mesh, drawn.optimizer
    loading: dict[str, Any] = {
        "mesh": mesh,
        "init": config.model.init,
        "keep_file_dtypes": config.model.param_dtype == "file",
    }
    shardings = state_shardings(optimizer, plan.trainable, mesh)
    with terminal.counting("loading the model", unit="bytes") as progress:
        frozen = assembly.load_frozen(plan, inputs.base, **loading, progress=progress)
        if newest is None:
            trainable = assembly.load_trainable(plan, inputs.base, **loading, progress=progress)
            state = create_on_mesh(lambda tree: initial_state(optimizer, tree), shardings, trainable)
            return state, frozen
    trainable = assembly.trainable_specs(plan, inputs.base, keep_file_dtypes=loading["keep_file_dtypes"])
    abstract = jax.eval_shape(lambda tree: initial_state(optimizer, tree), trainable)
    where = " from the hosts' own disks" if checkpoints.is_local(newest) else ""
    with terminal.working(f"restoring step {newest}{where}"):
        restored = checkpoints.restore(newest, blueprint.placed(abstract, shardings))
    return restored.state, frozen


def _summary(outcome: Outcome, hf: str | None, adapter: str | None) -> str:
    numbers = [f"done at step {outcome.step}"]
    if outcome.loss is not None:
        numbers.append(f"loss {outcome.loss:.4f}")
    if outcome.eval_loss is not None:
        numbers.append(f"held-out loss {outcome.eval_loss:.4f}")
    if outcome.seconds:
        numbers.append(f"{outcome.tokens:,} tokens in {duration(outcome.seconds)}")
    written = [path for path in (hf, adapter) if path]
    lines = ["; ".join(numbers), *(f"wrote {path}" for path in written)]
    if written:
        lines.append(f"ask it: python -m jaxtune.chat {written[0]}")
    return "\n".join(lines)
