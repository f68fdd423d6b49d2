"""A job for worker processes, in a module that they can import."""

from __future__ import annotations

import os

import torch

from linear_moe.training.demo.parallel import Report


def work(job: int, report: Report) -> tuple[int, int, int]:
    """The square of the job, who made it, and with how many threads."""
    if job < 0:
        raise ValueError(f"no job is {job}")
    if job > 100:
        os._exit(job)
    report(2)
    report(1)
    return job * job, os.getpid(), torch.get_num_threads()
