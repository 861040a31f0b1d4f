"""The demo model: a tiny Stable unCLIP of 64x64 drawings that comes with the package, made by scripts/demo/train."""

from pathlib import Path


def demo_model() -> Path:
    """Where it is: a converted checkpoint, as any other."""
    return Path(__file__).parent / "model"


def demo_pictures() -> Path:
    """A folder of drawings of things that the model has not seen drawn, 64x64 PNG."""
    return Path(__file__).parent / "pictures"
