"""Jobs in processes."""

from __future__ import annotations

import os

import pytest
from parallel_work import work

from linear_moe.training.demo.parallel import num_cores, run_jobs


def test_jobs_are_spread_over_processes_of_one_thread() -> None:
    messages = list(run_jobs(work, [1, 2, 3], workers=2))
    results = {message.job: message.result for message in messages if message.result is not None}
    assert [results[index][0] for index in range(3)] == [1, 4, 9]
    assert all(pid != os.getpid() and threads == 1 for _, pid, threads in results.values())
    assert sum(message.done for message in messages) == 9


def test_one_worker_is_this_process() -> None:
    (message,) = run_jobs(work, [5], workers=1)
    assert message.result is not None
    assert message.result[:2] == (25, os.getpid())
    assert message.done == 3
    assert num_cores() >= 1


@pytest.mark.parametrize(("jobs", "named"), [([-1], "ValueError: no job is -1"), ([101, 1], "died with exit code 101")])
def test_a_job_that_fails_ends_the_others(jobs: list[int], named: str) -> None:
    with pytest.raises(RuntimeError, match=named):
        list(run_jobs(work, jobs, workers=2))
