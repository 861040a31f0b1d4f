"""The full-size networks for TPUs, as far as a machine without one can say: their programs are made."""

import pytest

from tests.distributed.lowering import CONFIG, DECODER, ONE_LEVEL, UNET, lower, mesh
from unclip_jax.models import platform


@pytest.fixture(autouse=True)
def tpu(monkeypatch):
    monkeypatch.setattr(platform, "accelerator", lambda: "tpu")


@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
def test_one_level_is_lowered_over_four_devices(gradient):
    """The attention of its down block, of the middle and of its two up blocks."""
    program = lower("tpu", ONE_LEVEL, mesh(2, 2), *UNET, gradient)
    assert program.count("call @on_each_device") == (2 if gradient else 1) * 4
    # Two of the four rows, and all five heads, which two devices do not divide.
    shares = [line for line in program.splitlines() if "@tpu_custom_call" in line]
    assert shares
    assert all("(tensor<2x5x9216x64xbf16>" in line for line in shares)


def test_one_level_uses_the_kernel():
    assert lower("tpu", ONE_LEVEL, mesh(1, 1), *UNET).count("tpu_custom_call") == 1


@pytest.mark.e2e
@pytest.mark.parametrize(("network", "shapes"), [(UNET, 2), (DECODER, 1)], ids=["unet", "decoder"])
def test_on_one_device_the_kernel_is_used(network, shapes):
    """At 768x768, tokens of the UNet's first two levels and of the decoder's middle fill the kernel's blocks."""
    assert lower("tpu", CONFIG, mesh(1, 1), *network).count("tpu_custom_call") == shapes


@pytest.mark.e2e
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
@pytest.mark.parametrize(("network", "attentions"), [(UNET, 10), (DECODER, 1)], ids=["unet", "decoder"])
def test_over_four_devices_every_such_attention_is_split(network, attentions, gradient):
    program = lower("tpu", CONFIG, mesh(2, 2), *network, gradient)
    assert program.count("call @on_each_device") == (2 if gradient else 1) * attentions
