"""Independent jobs spread over the cores: one process each, one thread each."""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.queues import Queue
from typing import Any, Generic, NamedTuple, TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")
Report = Callable[[int], None]

POLL_S = 0.5
"""Between two looks at whether the processes still live."""


class Message(NamedTuple, Generic[Result]):
    """What a job sends: units of work done since the last message, or its result."""

    job: int
    done: int = 0
    result: Result | None = None
    error: str | None = None


def num_cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_jobs(
    function: Callable[[Job, Report], Result], jobs: Sequence[Job], *, workers: int
) -> Iterator[Message[Result]]:
    """Run `function(job, report)` for every job, and yield what the jobs send as it comes.

    Args:
        function: at a module's top level, so that a fresh process finds it; it calls `report(units)` as it goes.
        jobs: picklable, the longest first.
        workers: processes; 1 runs the jobs here.

    Raises:
        RuntimeError: with the traceback, if a job fails; or if a process dies. The others are ended.
    """
    if workers <= 1:
        yield from _run_here(function, jobs)
        return
    # A forked process inherits locks that torch's threads may hold.
    context = multiprocessing.get_context("spawn")
    waiting: Queue[Any] = context.Queue()
    messages: Queue[Any] = context.Queue()
    for item in enumerate(jobs):
        waiting.put(item)
    processes = [
        context.Process(target=_work, args=(function, waiting, messages), daemon=True)
        for _ in range(min(workers, len(jobs)))
    ]
    for process in processes:
        waiting.put(None)
        process.start()
    finished = 0
    try:
        while finished < len(jobs):
            try:
                message: Message[Result] = messages.get(timeout=POLL_S)
            except queue.Empty:
                dead = [process.exitcode for process in processes if process.exitcode]
                if dead:
                    raise RuntimeError(f"a worker process died with exit code {dead[0]}") from None
                continue
            if message.error is not None:
                raise RuntimeError(f"job {message.job} failed:\n{message.error}")
            finished += message.result is not None
            yield message
    finally:
        for process in processes:
            if finished < len(jobs):
                process.terminate()
            process.join()


def _run_here(function: Callable[[Job, Report], Result], jobs: Sequence[Job]) -> Iterator[Message[Result]]:
    for index, job in enumerate(jobs):
        done: list[int] = []
        result = function(job, done.append)
        yield Message(index, sum(done), result)


def _work(function: Callable[[Any, Report], Any], waiting: Queue[Any], messages: Queue[Any]) -> None:
    """A worker process: jobs until there is no more."""
    # Ctrl-C reaches every process of a terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    while (item := waiting.get()) is not None:
        index, job = item
        try:
            result = function(job, functools.partial(_send, messages, index))
            messages.put(Message(index, result=result))
        except BaseException:
            messages.put(Message(index, error=traceback.format_exc()))


def _send(messages: Queue[Any], index: int, units: int) -> None:
    messages.put(Message(index, units))
