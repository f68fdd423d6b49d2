"""Kills training runs with SIGKILL and watches them go on, bit for bit.

    python tests/training/killing.py random FOLDER --kills 50        at random moments
    python tests/training/killing.py operations FOLDER               at every operation on a file, one after another
    python tests/training/killing.py command FOLDER --kills 5        the command itself, as a process

Every step of every attempt appends a digest of the loss, the parameters, the optimiser, the routing biases and numbers drawn
from torch, numpy and Python; each must be that of an uninterrupted run. Imported once and forked: an attempt costs no start.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from small_models import small_config

from linear_moe.training.checkpoint import CHECKPOINTS, MODEL_FILE, checkpoints_of, find_checkpoint, read_trainer_state
from linear_moe.training.loop import StepReport
from linear_moe.training.metrics import read_metrics
from linear_moe.training.optimizer import optimizer_state
from linear_moe.training.plan import RunPlan, TaskOptions
from linear_moe.training.run import METRICS_FILE, Run, resume_run, start_run
from linear_moe.training.settings import TrainSettings
from linear_moe.training.tasks import RecallTask

DIGESTS = "digests.txt"


class Recorder:
    """A display that writes a line of digest a step."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.file = os.open(run.folder / DIGESTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def evaluated(self, step: int, scores: Mapping[str, float]) -> None: ...

    def update(self, report: StepReport) -> None:
        digest = hashlib.sha256(repr(report).encode())
        for tensor in self.run.model.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        for name, values in optimizer_state(self.run.model, self.run.optimizer).items():
            digest.update(name.encode())
            for tensor in values.values():
                digest.update(tensor.numpy().tobytes())
        drawn = (torch.rand(3).tolist(), float(np.random.standard_normal()), random.gauss(0, 1))
        digest.update(repr(drawn).encode())
        os.write(self.file, f"{report.step} {digest.hexdigest()}\n".encode())


def plan(steps: int) -> RunPlan:
    options = TaskOptions(task="mqar", problems=("16:3",), batch_size=2)
    settings = TrainSettings(steps=steps, accumulate=2, learning_rate=1e-2, schedule="wsd")
    return RunPlan(options, settings, log_every=1, checkpoint_every=1, evaluate_every=15)


def attempt(folder: Path, steps: int) -> None:
    """Start the run of `folder`, or go on with it, to its end."""
    if checkpoints_of(folder):
        run = resume_run(folder)
    else:
        # Killed before its first checkpoint: whatever it has left is no run to go on with.
        shutil.rmtree(folder, ignore_errors=True)
        run = start_run(small_config(balance_bias_rate=0.01), plan(steps), folder)
    run.train(Recorder(run))


def forked(work: Callable[[], None]) -> int:
    """Start `work` in a process of its own; its number."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def outcome(child: int) -> int:
    """The exit code of a process that has ended, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def finished(child: int) -> bool:
    """Whether a process ended well, not by SIGKILL.

    Raises:
        RuntimeError: if it ended otherwise.
    """
    code = outcome(child)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"an attempt ended with {code}")
    return code == 0


def digests(folder: Path) -> list[tuple[int, str]]:
    """The whole lines of the digest file."""
    path = folder / DIGESTS
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(step), digest) for step, digest in (line.split() for line in lines)]


def reference(folder: Path, steps: int) -> dict[int, str]:
    """The digests of a run that nothing disturbs."""
    if not finished(forked(lambda: attempt(folder, steps))):
        raise RuntimeError("the undisturbed run was killed")
    return dict(digests(folder))


def check(folder: Path, wanted: dict[int, str], undisturbed: Path) -> None:
    """Every step of every attempt, and everything that the run leaves, is as undisturbed."""
    for step, digest in digests(folder):
        assert digest == wanted[step], f"step {step} differs"
    lines, others = (
        [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in read_metrics(path)]
        for path in (folder / METRICS_FILE, undisturbed / METRICS_FILE)
    )
    assert lines == others, "the metrics differ"
    one, other = (find_checkpoint(path) for path in (folder, undisturbed))
    assert one.name == other.name
    assert (one / MODEL_FILE).read_bytes() == (other / MODEL_FILE).read_bytes(), "the parameters differ"
    # Not by its bytes: a pickle says which of its objects were one object.
    assert same(read_trainer_state(one), read_trainer_state(other)), "the trainer's state differs"
    left = [entry.name for entry in (folder / CHECKPOINTS).iterdir() if not entry.name.startswith("step-")]
    assert not left, f"left behind: {left}"


def same(one: Any, other: Any) -> bool:
    """Whether two nested things hold the same bits."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def good_step(folder: Path) -> int:
    """The step of the newest checkpoint, which must be undamaged."""
    if not checkpoints_of(folder):
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return int(find_checkpoint(folder).name.removeprefix("step-"))


def kill_at_random(root: Path, kills: int, seed: int, steps: int = 30, pause: float = 0.15) -> None:
    wanted = reference(root / "undisturbed", steps)
    draw = random.Random(seed)
    done = runs = 0
    while done < kills:
        folder = root / f"run-{runs}"
        runs += 1
        reached = 0
        while True:
            child = forked(functools.partial(attempt, folder, steps))
            if done < kills:
                time.sleep(draw.uniform(0.0, pause))
                os.kill(child, signal.SIGKILL)
            if finished(child):
                break
            done += 1
            now = good_step(folder)
            assert now >= reached, f"step {reached} was saved, {now} is left"
            reached = now
        check(folder, wanted, root / "undisturbed")
    print(f"{done} kills in {runs} runs, every step after each as undisturbed")


def kill_at_operations(root: Path, steps: int = 3) -> None:
    wanted = reference(root / "undisturbed", steps)
    folder, number, reached = root / "run", 0, 0

    def work(last: int) -> None:
        left = last

        def counted(original: Callable[..., Any]) -> Callable[..., Any]:
            def operation(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                # Half of them after the deed, so that both sides of it are seen.
                if left == 0 and last % 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    return original(*arguments, **options)
                finally:
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            return operation

        for module, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")):
            setattr(module, name, counted(getattr(module, name)))
        attempt(folder, steps)

    while True:
        number += 1
        if finished(forked(functools.partial(work, number))):
            break
        now = good_step(folder)
        assert now >= reached, f"step {reached} was saved, {now} is left"
        reached = now
    check(folder, wanted, root / "undisturbed")
    print(f"killed at {number - 1} operations on files, every step after each as undisturbed")


def kill_the_command(root: Path, kills: int, seed: int) -> None:
    """The command itself, from its start: most of an attempt is Python's imports."""
    draw = random.Random(seed)
    command = [sys.executable, "-m", "linear_moe", "train"]
    new = ["recall-single", "--task", "mqar", "--problem", "16:3", "--batch-size", "2", "--steps", "1500"]
    new += ["--checkpoint-every", "1", "--log-every", "1", "--device", "cpu", "--threads", "1", "--output"]
    undisturbed, folder = root / "undisturbed", root / "run"
    began = time.monotonic()
    with subprocess.Popen([*command, *new, undisturbed], stdout=subprocess.DEVNULL) as process:
        while not checkpoints_of(undisturbed):
            time.sleep(0.01)
        until_first = time.monotonic() - began
    assert process.returncode == 0
    done = 0
    while True:
        again = ["--resume", folder, "--device", "cpu", "--threads", "1"]
        if not checkpoints_of(folder):
            shutil.rmtree(folder, ignore_errors=True)
        arguments = again if folder.exists() else [*new, folder]
        with subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL) as process:
            if done < kills:
                # Most of it is Python's imports, which a machine with other work takes its time for.
                time.sleep(until_first * draw.uniform(0.7, 2.5))
                process.kill()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.returncode
        done += 1
        good_step(folder)
    check(folder, {}, undisturbed)
    print(f"{done} kills of the command, the same files as undisturbed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["random", "operations", "both", "command"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30, help="of a run, for random")
    parser.add_argument("--pause", type=float, default=0.15, help="seconds before a random kill, at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # A thousand held-out problems would take most of the time.
    RecallTask.__init__.__kwdefaults__["held_out_size"] = 40
    # What is imported on first use, once for all.
    attempt(options.folder / "warm", 1)
    if options.mode in ("operations", "both"):
        kill_at_operations(options.folder / "operations")
    if options.mode in ("random", "both"):
        kill_at_random(options.folder / "random", options.kills, options.seed, options.steps, options.pause)
    if options.mode == "command":
        kill_the_command(options.folder, options.kills, options.seed)


if __name__ == "__main__":
    main()
