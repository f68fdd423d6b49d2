"""Training: a model, a task, settings; runs that can be stopped and gone on with; the demo's study."""

from linear_moe.training.checkpoint import DamagedCheckpointError, DamagedCheckpointWarning, load_model
from linear_moe.training.divergence import DivergedError
from linear_moe.training.files import DiskFullError
from linear_moe.training.loop import StepReport, optimise
from linear_moe.training.optimizer import build_optimizer, parameter_groups
from linear_moe.training.plan import RunPlan, TaskOptions, build_task
from linear_moe.training.run import Outcome, Run, resume_run, start_run
from linear_moe.training.settings import TrainSettings
from linear_moe.training.tasks import RecallTask, StreamTask, Task, TextTask

__all__ = [
    "DamagedCheckpointError",
    "DamagedCheckpointWarning",
    "DiskFullError",
    "DivergedError",
    "Outcome",
    "RecallTask",
    "Run",
    "RunPlan",
    "StepReport",
    "StreamTask",
    "Task",
    "TaskOptions",
    "TextTask",
    "TrainSettings",
    "build_optimizer",
    "build_task",
    "load_model",
    "optimise",
    "parameter_groups",
    "resume_run",
    "start_run",
]
