"""Nothing here asks a hub for anything, nor draws progress bars."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
