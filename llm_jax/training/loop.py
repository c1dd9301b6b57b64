"""The training loop: build the program, open a session, advance it step by step, and do what is due between steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from llm_jax.base.batch import as_batch
from llm_jax.base.builder import to_dict
from llm_jax.base.devices import peak_flops
from llm_jax.base.errors import Interrupted
from llm_jax.base.files import check_no_link, latest_step
from llm_jax.base.loggers import LoggedRun
from llm_jax.base.multihost import barrier, from_first
from llm_jax.base.profiling import Profiler
from llm_jax.base.progress import Progress
from llm_jax.base.redaction import public
from llm_jax.base.sharding import make_mesh, put_batch, use_mesh
from llm_jax.base.stopping import StopSignal
from llm_jax.base.storage import place_of
from llm_jax.config import Config
from llm_jax.data import pipeline
from llm_jax.training import run
from llm_jax.training.checkpoint import Checkpoints
from llm_jax.training.console import Console
from llm_jax.training.custom import Custom, with_custom, with_named_callbacks
from llm_jax.training.event import Event, Rewind
from llm_jax.training.log import Logs, MetricsWriter
from llm_jax.training.program import Program, build_program
from llm_jax.training.resume import first_state
from llm_jax.training.rewind import go_back, stages_of
from llm_jax.training.session import Session
from llm_jax.training.stages import Stage
from llm_jax.training.status import Status
from llm_jax.training.throughput import Goodput, Throughput, work_left


class Due(NamedTuple):
  """What to do between a step and the next one."""

  evaluate: bool
  save: bool
  sample: bool
  settle: bool  # whether to wait for the step to finish


def due(step: int, config: Config, *, end: int, has_val: bool, first: bool = False, stopping: bool = False,
        traced: bool = False) -> Due:
  """What is due after `step`. A pure function.

  `end`: the stage's last step; `has_val`: whether there is a validation part; `first`: whether this is the first step
  of this process; `stopping`: whether a signal arrived or a save was put off; `traced`: whether a profile begins or
  ends here.
  """
  last = step == config.num_steps
  evaluate = has_val and config.eval.every > 0 and (step % config.eval.every == 0 or last)
  save = step % config.checkpoint.every == 0 or last or step == end or stopping
  histograms = config.log.histograms_every and step % config.log.histograms_every == 0
  return Due(evaluate, save, evaluate, evaluate or save or first or traced or bool(histograms))


def train(config: Config, workdir: Path, custom: Custom) -> Generator[Event, None, None]:
  """Trains to `num_steps` from the newest checkpoint in `workdir`, each stage like a resumed run with another config;
  yields each logged step. Raises Interrupted after a signal, and UserErrors."""
  goodput, config = Goodput(), with_custom(config, custom)
  custom = with_named_callbacks(custom, config)
  with run.open_training(workdir, config) as status:
    while True:
      try:
        return (yield from train_stages(stages_of(workdir, config), workdir, custom, status, goodput))
      except Rewind as rewind:
        go_back(workdir, rewind)


def train_stages(stages: list[Stage], workdir: Path, custom: Custom, status: Status,
                 goodput: Goodput) -> Generator[Event, None, None]:
  """Trains the stages that are not done."""
  for stage in stages:
    done = stage is not stages[-1] and from_first(latest_step(workdir)) >= stage.end
    if not done and (yield from train_stage(stage, workdir, custom, status, goodput)):
      break


def train_stage(stage: Stage, workdir: Path, custom: Custom, status: Status,
                goodput: Goodput) -> Generator[Event, None, str]:
  """Trains one stage. Returns why the run ended early, or ''."""
  mesh = make_mesh(stage.config.mesh)
  with use_mesh(mesh, stage.config.mesh), contextlib.ExitStack() as stack:  # everything is traced under the mesh
    goodput.starting()
    with Progress('preparing data and model', shown=jax.process_index() == 0):
      program = build_program(stage, workdir, mesh, custom)
    session = open_session(program, custom, workdir, mesh, stack, status, goodput)
    config, end, console, has_val = program.config, program.stage.end, session.console, bool(program.data.val)
    profiler = stack.enter_context(Profiler(config.profile, workdir, session.begin, console.line))
    missed = due(session.begin, config, end=end, has_val=has_val).evaluate and session.evaluated_at != session.begin
    if session.begin and missed:
      session.catch_up()
    announce(session, end)
    profiler.begin_after(session.begin)

    while session.step < end and not session.best.over:
      session.advance()
      yield from session.events(custom.callbacks)
      step, first, stopping = session.step, session.step == session.begin + 1, session.stop.reached()
      now = due(step, config, end=end, has_val=has_val, first=first, stopping=stopping or session.skips.late,
                traced=profiler.due(step))
      if not now.settle:
        yield from session.events(custom.callbacks)
        continue
      if first:
        goodput.started()
      session.settle()
      profiler.end_after(step)
      if first:
        stack.enter_context(session.stop)  # from here on a signal saves what was trained
        console.started(time.perf_counter() - session.step_started)
        run.write_files(program, workdir, status, session.begin)
        session.save_now() if status.hurried else None
      if now.save:
        session.save()  # first, so that an evaluation that ends the process costs nothing
      if now.evaluate:
        session.evaluate()
      if session.stop.requested or session.best.over or (session.improved and config.checkpoint.keep_best):
        session.save()
      if now.sample:
        session.sample()
      session.report()
      yield from session.events(custom.callbacks)
      over, unevaluated = step == config.num_steps or session.best.over, now.evaluate and session.score is None
      if unevaluated or ((stopping or session.stop.requested) and not over):
        session.save()  # if the request came after the save above
        session.wait()
        saved = 'not saved, as its update was skipped' if session.skips.late else f'saved in {place_of(workdir)}'
        raise Interrupted(f'stopped at step {step} of {config.num_steps}, {saved}; '
                          f'repeat the command to {"evaluate that step" if over else "resume"}')
      profiler.begin_after(step)
      session.throughput.restart('evaluation' if now.evaluate else 'save' if now.save else '')
    if session.best.over and session.step > session.begin:
      console.line(f'step {session.step}: the run ends: {session.best.over}')
    session.wait()
    barrier('end')
    return session.best.over


def open_session(program: Program, custom: Custom, workdir: Path, mesh: Mesh, stack: contextlib.ExitStack,
                 status: Status, goodput: Goodput) -> Session:
  """The session of a stage, with its state, logs and batches; `stack` closes them."""
  config = program.config
  checkpoints = stack.enter_context(Checkpoints(check_no_link(workdir / 'checkpoints'), config.checkpoint))
  with Progress('initializing the state', shown=jax.process_index() == 0):
    state, meta = first_state(program, checkpoints, mesh)
  begin = int(state.step)
  writer = MetricsWriter(LoggedRun(workdir, begin, public(to_dict(config))), config.log)
  console = Console(config.num_steps, begin, config.log)
  stack.callback(writer.close)
  stack.callback(console.close)
  stack.push(goodput.ending)
  run.print_summary(program, state, workdir, console, custom.summary)
  batches = stack.enter_context(contextlib.closing(open_own_batches(program, custom, begin, meta.get('stream_states'))))
  # In a single process the step takes NumPy rows directly: ten times as fast as creating sharded arrays here.
  put = as_batch if jax.process_count() == 1 else partial(
      put_batch, rows=program.rows, num_rows=config.rows_per_batch, mesh=mesh)
  session = Session(program, state, meta, batches, checkpoints, Logs(writer, console, status, goodput),
                    Throughput(program.flops_per_token, peak_flops(jax.devices()), partial(
                        work_left, num_steps=config.num_steps, save_every=config.checkpoint.every,
                        eval_every=config.eval.every if program.data.val else 0)),
                    StopSignal(), put)
  status.update(state='training', step=begin, num_steps=config.num_steps, monitor=config.eval.monitor,
                best=session.best.best_value, state_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
  return session


def open_own_batches(program: Program, custom: Custom, begin: int, states: list[dict] | None) -> pipeline.Batches:
  """This process's rows of batches begin, begin + 1, ..."""
  config = program.config
  if custom.batches is not None:
    return custom.batches.open(program.rows, begin, states, jax.process_index())
  return pipeline.open_batches(
      config.data, program.data, config.rows_per_batch, program.rows, config.seed, begin, program.stage.first_row,
      states, jax.process_index(), jax.process_count())


def announce(session: Session, end: int) -> None:
  """Prints that the first step is compiled, or why there is nothing left to train."""
  if session.best.over:
    session.console.line(f'the run is over: {session.best.over}; to continue, change that setting')
  elif session.begin >= end:
    session.console.line(f'already at step {session.begin} of {session.config.num_steps}; to continue, raise '
                         '--config.num_steps')
  else:
    session.console.begin()
