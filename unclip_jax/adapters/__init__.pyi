from .loaded import Adapters as Adapters
from .lora import Lora as Lora
from .lora import merge_loras as merge_loras
from .lora import with_lora as with_lora
from .textual_inversion import add_words as add_words
from .textual_inversion import expand_words as expand_words
