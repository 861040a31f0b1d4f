"""Reads adapters that other tools wrote: LoRA and related kinds, and textual inversion embeddings.

It uses only the readers of `convert.readers`: nothing that a file names is run. Everything in a file must be understood
and fit the checkpoint, or the file is refused in one line. An adapter read in part would make other images.
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
