"""DeepCache against diffusers' modules, with the method's first branch written out by hand."""

import numpy as np
import pytest
import torch

from tests.pipelines import family

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # within diffusers
]


def cached(unet, every):
    """The UNet's forward pass as DeepCache makes it: what the last resnet reads from below stays for some calls."""
    block, whole, calls, kept = unet.up_blocks[-1], unet.forward, [0], {}
    width = unet.config.block_out_channels[0]

    def keep(module, given):
        kept["deep"] = given[0][:, :-width]

    block.resnets[-1].register_forward_pre_hook(keep)

    def forward(sample, timestep, encoder_hidden_states, **others):
        calls[0] += 1
        if (calls[0] - 1) % every == 0:
            return whole(sample, timestep, encoder_hidden_states, **others)
        deep = kept["deep"]
        emb = unet.time_embedding(unet.time_proj(timestep.expand(len(sample))).to(sample.dtype))
        x = block.resnets[-1](torch.cat([deep, unet.conv_in(sample)], dim=1), emb)
        kept["deep"] = deep  # the hook has seen this call, too
        x = block.attentions[-1](x, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]
        return (unet.conv_out(unet.conv_act(unet.conv_norm_out(x))),)

    unet.forward = forward


@pytest.mark.parametrize(("scheduler", "every"), [("DDIMScheduler", 3), ("EulerDiscreteScheduler", 2)])
def test_images(scheduler, every, tmp_path):
    """Measured: 1e-5."""
    kind = family.KINDS["text to image"]
    folder = family.build(kind, tmp_path, scheduler)
    theirs, ours = family.open_both(kind, folder)
    latents = np.random.default_rng(0).standard_normal((1, 16, 16, 4)).astype(np.float32)
    call = {"prompt": "a fox", "num_inference_steps": 7, "guidance_scale": 5.0, "height": 32, "width": 32}
    exact = ours(**call, latents=latents, output_type="np").images
    cached(theirs.unet, every)
    given = torch.from_numpy(latents.transpose(0, 3, 1, 2))
    expected = theirs(**call, latents=given, output_type="np").images
    made = ours(**call, latents=latents, output_type="np", deep_cache=every).images
    np.testing.assert_allclose(made, expected, atol=1e-3)
    assert np.abs(made - exact).max() > 1e-3
