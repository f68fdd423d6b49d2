"""The search for launch parameters that are faster on this GPU than the frozen tables' (`linear-moe tune`)."""

from linear_moe.tuning.run import tune
from linear_moe.tuning.search import BrokenDeviceError, Entry, Outcome, Work, search
from linear_moe.tuning.store import store_outcome

__all__ = ["BrokenDeviceError", "Entry", "Outcome", "Work", "search", "store_outcome", "tune"]
