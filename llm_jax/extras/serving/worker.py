"""One thread that generates for all requests, one after another, as there is one device."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from llm_jax.base.errors import UserError
from llm_jax.extras.serving.requests import ApiError


class Job:
  """The items that a worker produces for one request; they wait here, so that a slow client delays nobody else."""

  def __init__(self, produce: Callable[[], Iterable[Any]]):
    self._produce, self._stopped = produce, threading.Event()
    self._loop, self._items = asyncio.get_running_loop(), asyncio.Queue[Any]()
    self.future: Future | None = None

  def run(self) -> None:
    """Produces all items, in the worker's thread."""
    try:
      for item in self._produce():
        if self._stopped.is_set():
          return
        self._put(item)
      self._put(None)
    except UserError as e:
      self._put(ApiError(str(e)))
    except Exception as e:
      traceback.print_exc(file=sys.stderr)
      self._put(ApiError(f'{type(e).__name__}: {str(e).partition(chr(10))[0]}', status=500))

  def _put(self, item: Any) -> None:
    self._loop.call_soon_threadsafe(self._items.put_nowait, item)

  async def batches(self) -> AsyncIterator[list[Any]]:
    """What is there, again and again until the end. Raises ApiError."""
    ended = False
    while not ended:
      batch = [await self._items.get()]
      while not self._items.empty():
        batch.append(self._items.get_nowait())
      for item in batch:
        if isinstance(item, ApiError):
          raise item
      ended = batch[-1] is None
      yield batch[:-1] if ended else batch

  def cancel(self, error: ApiError | None = None) -> None:
    """Takes the job from the queue, or ends it at its next item; whoever waits for items gets the error."""
    assert self.future is not None
    self._stopped.set()
    self.future.cancel()
    if error is not None:
      self._items.put_nowait(error)


def shutting_down() -> ApiError:
  return ApiError('the server is shutting down', status=503, code='shutting_down')


class Worker:
  """Runs jobs in the order in which they arrive; at most `limit` wait. Used from the thread of the event loop."""

  def __init__(self, limit: int):
    self._limit, self._jobs, self._timeouts, self._closed = limit, set[Job](), set[asyncio.Timeout](), False
    self._executor = ThreadPoolExecutor(1, 'generate')

  @property
  def waiting(self) -> int:
    return max(0, sum(not job.future.done() for job in self._jobs if job.future is not None) - 1)

  @property
  def running(self) -> bool:
    """Also true for a job that was cancelled and has not reached its next item."""
    return any(job.future.running() for job in self._jobs if job.future is not None)

  @contextlib.asynccontextmanager
  async def while_open(self, seconds: float) -> AsyncIterator[None]:
    """Ends its block with TimeoutError after that time, and with ApiError when the worker is closed."""
    timeout = asyncio.timeout(0 if self._closed else seconds)
    self._timeouts.add(timeout)
    try:
      async with timeout:
        yield
    except TimeoutError:
      raise shutting_down() if self._closed else TimeoutError from None
    finally:
      self._timeouts.discard(timeout)

  def submit(self, produce: Callable[[], Iterable[Any]]) -> Job:
    """Raises ApiError if too many jobs wait, or the worker is closed."""
    if self._closed:
      raise shutting_down()
    self._jobs = {job for job in self._jobs if job.future is not None and not job.future.done()}
    if len(self._jobs) > self._limit:
      raise ApiError(f'{len(self._jobs)} requests are running or waiting; try again later', status=503,
                     code='overloaded')
    job = Job(produce)
    job.future = self._executor.submit(job.run)
    self._jobs.add(job)
    return job

  def close(self) -> None:
    """Ends all jobs, and the blocks of `while_open`."""
    self._closed = True
    for job in self._jobs:
      job.cancel(shutting_down())
    for timeout in self._timeouts:
      if not timeout.expired():
        timeout.reschedule(0)
    self._executor.shutdown(wait=False, cancel_futures=True)
