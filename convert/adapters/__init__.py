"""Reads adapters that other tools wrote, LoRA and its kin and learnt words.

Only with the readers of `convert.readers`: nothing that a file names is run. What a file holds must all be understood
and fit the checkpoint, or the file is refused in one line: an adapter read by halves would make other images.
"""

from convert.adapters.changes import parameter
from convert.adapters.lora import Adapter, read_adapter, read_lora
from convert.adapters.peft import METADATA
from convert.adapters.sources import LORA_FILES, WORD_FILES, Source
from convert.adapters.textual_inversion import read_textual_inversion

__all__ = [
    "LORA_FILES",
    "METADATA",
    "WORD_FILES",
    "Adapter",
    "Source",
    "parameter",
    "read_adapter",
    "read_lora",
    "read_textual_inversion",
]
