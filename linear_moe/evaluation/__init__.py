"""Looking at what a trained model can do, and at what happens inside it."""

from linear_moe.evaluation.decode_speed import decoding_by_context
from linear_moe.evaluation.inspection import Inspection, inspect_text
from linear_moe.evaluation.needle import needle_in_a_haystack
from linear_moe.evaluation.page import page_of
from linear_moe.evaluation.perplexity import perplexity_by_position
from linear_moe.evaluation.recall import published_problems, recall_by_size
from linear_moe.evaluation.result import Result
from linear_moe.evaluation.segments import Sizes
from linear_moe.evaluation.suites import SUITES, EvaluationOptions, run_suite
from linear_moe.evaluation.twin import attention_twin

__all__ = [
    "SUITES",
    "EvaluationOptions",
    "Inspection",
    "Result",
    "Sizes",
    "attention_twin",
    "decoding_by_context",
    "inspect_text",
    "needle_in_a_haystack",
    "page_of",
    "perplexity_by_position",
    "published_problems",
    "recall_by_size",
    "run_suite",
]
