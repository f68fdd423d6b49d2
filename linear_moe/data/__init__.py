"""What models are trained on: multi-query associative recall, and text, in memory or streamed, as bytes or tokens."""

from linear_moe.data.batch import IGNORE_INDEX, Batch
from linear_moe.data.mqar import MQAR, mqar_batch
from linear_moe.data.text import TextCorpus, read_text, standard_library_text
from linear_moe.data.text_batches import PackedText
from linear_moe.data.text_stream import HubStream, PackedStream
from linear_moe.data.tokenizer import BYTES, ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "BYTES",
    "IGNORE_INDEX",
    "MQAR",
    "Batch",
    "ByteTokenizer",
    "FileTokenizer",
    "HubStream",
    "PackedStream",
    "PackedText",
    "TextCorpus",
    "Tokenizer",
    "load_tokenizer",
    "mqar_batch",
    "read_text",
    "standard_library_text",
]
