"""What changes a network's weights from outside: low-rank adapters (LoRA), and learnt words (textual inversion)."""
