"""What models are trained on: multi-query associative recall, and text as bytes."""

from linear_moe.data.batch import IGNORE_INDEX, Batch
from linear_moe.data.mqar import MQAR, mqar_batch
from linear_moe.data.text import TextCorpus, read_text, standard_library_text
from linear_moe.data.text_batches import PackedText

__all__ = [
    "IGNORE_INDEX",
    "MQAR",
    "Batch",
    "PackedText",
    "TextCorpus",
    "mqar_batch",
    "read_text",
    "standard_library_text",
]
