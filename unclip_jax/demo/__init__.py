"""The demo model: a tiny Stable unCLIP of 64x64 drawings that ships with the package, made by scripts/demo/train."""

from pathlib import Path


def demo_model() -> Path:
    """The path of the demo model: a converted checkpoint like any other."""
    return Path(__file__).parent / "model"


def demo_tiny_vae() -> Path:
    """The path of its tiny autoencoder, for previews or in the place of its VAE."""
    return Path(__file__).parent / "tiny-vae"


def demo_controlnet() -> Path:
    """The path of its ControlNet, which reads canny edges."""
    return Path(__file__).parent / "controlnet"


def demo_images() -> Path:
    """A folder of drawings of things whose drawings the model has not seen, 64x64 PNG."""
    return Path(__file__).parent / "pictures"
