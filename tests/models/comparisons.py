"""Live comparisons of one network with its PyTorch original: the tests run them, and break them on purpose.

Each builds the reference with random weights, converts its state by the real rule table, and returns the relative error
(L2) of what the two make of the same input.
"""

import jax
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    BitConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DPTConfig,
    DPTForDepthEstimation,
)

from convert import engine
from convert.export import diffusers_configs
from convert.readers import TensorInfo
from convert.rules import clip, depth, diffusers, unet, vae
from tests.references import disturbed
from unclip_jax.checkpoints.networks import NETWORKS, abstract_network, fill
from unclip_jax.models.configs import DepthConfig, TextConfig, UNetConfig, VAEConfig, VisionConfig
from unclip_jax.models.tiling import decode_tiled, encode_tiled

UNETS = {
    "unclip": {"class_embedding": "projection", "class_embedding_size": 48},
    "text to image": {},
    "depth": {"in_channels": 5},
    "inpainting": {"in_channels": 9},
    "upscaler": {
        "in_channels": 7,
        "class_embedding": "table",
        "class_embedding_size": 20,
        "attention_levels": (False, True, True),
        "only_cross_attention": (True, True, False),
    },
    "one level": {
        "block_out_channels": (64,),
        "attention_levels": (True,),
        "num_heads": (4,),
        "only_cross_attention": (False,),
    },
}
VAES = {"factor 8": (32, 32, 64, 64), "factor 4": (32, 64, 64)}
TOWERS = {"H": "gelu", "L": "quick_gelu"}


def relative_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def converted(component, config, table, model):
    """Our network with the reference's weights."""
    network = abstract_network(NETWORKS[component], config)
    params = {f"{component}.{name}": spec for name, spec in network.params.items()}
    rules = engine.Table(params)
    table(rules)
    state = {diffusers.canonical(f"{component}/{name}"): t.numpy() for name, t in model.state_dict().items()}
    tensors = {name: TensorInfo(array.shape, array.dtype) for name, array in state.items()}
    report = engine.check(rules.rules, params, tensors, [])
    assert not report.missing, report
    assert not report.misshapen, report
    assert not report.unknown, report
    imported = engine.import_params(rules.rules, params, tensors, state.__getitem__)
    return fill(network, lambda n: imported[f"{component}.{n}"].read(), lambda _, array: jax.device_put(array)).merge()


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def channels_first(array):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def quiet(model, size=0.03):
    """The model with everything that adds to a residual stream made small, so that norms feel their epsilons."""
    ends = ("conv_in", "conv2", "conv_shortcut", "proj_in", "samplers.0.conv")
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0].endswith(ends):
            parameter.mul_(size)
    return model


def unet_error(name="unclip", height=16, width=24, batch=2):
    reference, ours, (x, *others) = _unets(name, height, width, batch)
    want = _run(reference, x, *others)
    return relative_error(np.moveaxis(np.asarray(ours(x, *others)), -1, 1), want)


def unet_feature_errors(name="unclip", height=16, width=24, batch=2):
    """Of what every block gives, by its name."""
    reference, ours, inputs = _unets(name, height, width, batch)
    blocks = [*reference.down_blocks, reference.mid_block, *reference.up_blocks]
    wanted = {}

    def keep(block, given, output):
        wanted[block] = output[0] if isinstance(output, tuple) else output

    for block in blocks:
        block.register_forward_hook(keep)
    _run(reference, *inputs)
    features = ours.features(*inputs, layers=ours.layer_names)
    pairs = zip(features.items(), blocks, strict=True)
    return {
        layer: relative_error(np.moveaxis(np.asarray(made), -1, 1), wanted[block]) for (layer, made), block in pairs
    }


@torch.no_grad()
def _run(reference, x, timesteps, context, labels):
    """What diffusers' UNet predicts."""
    given = (channels_first(x), torch.from_numpy(timesteps), torch.from_numpy(context))
    return reference(*given, class_labels=None if labels is None else torch.from_numpy(labels)).sample


@torch.no_grad()
def _unets(name, height, width, batch):
    """diffusers' UNet, ours, and what both read."""
    small = {
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 2,
        "attention_levels": (True, True, False),
        "num_heads": (2, 4, 4),
        "cross_attention_dim": 40,
        "only_cross_attention": (False, False, False),
    }
    config = UNetConfig(**(small | UNETS[name]))
    reference = UNet2DConditionModel(
        in_channels=config.in_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.num_heads,
        cross_attention_dim=config.cross_attention_dim,
        only_cross_attention=config.only_cross_attention,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention_levels],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention_levels)],
        use_linear_projection=True,
        class_embed_type="projection" if config.class_embedding == "projection" else None,
        projection_class_embeddings_input_dim=(
            config.class_embedding_size if config.class_embedding == "projection" else None
        ),
        num_class_embeds=config.class_embedding_size if config.class_embedding == "table" else None,
    )
    quiet(disturbed(reference))
    ours = converted("unet", config, lambda t: unet.diffusers(t, "unet/", config), reference)
    x, context = normal(batch, height, width, config.in_channels), normal(batch, 77, 40)
    timesteps = np.linspace(1, 987, batch, dtype=np.float32)
    labels = {
        None: None,
        "projection": normal(batch, config.class_embedding_size or 0),
        "table": np.arange(batch) + 3,
    }[config.class_embedding]
    return reference, ours, (x, timesteps, context, labels)


@torch.no_grad()
def vae_errors(name="factor 8", height=48, width=64):
    """Of the encoder's mean, of its log-variance, and of the decoded image."""
    channels = VAES[name]
    config = VAEConfig(block_out_channels=channels)
    levels = len(channels)
    reference = disturbed(
        AutoencoderKL(
            block_out_channels=channels,
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
        ),
        size=0.02,
    )
    ours = converted("vae", config, lambda t: vae.diffusers(t, "vae/", config), reference)
    picture, latents = normal(2, height, width, 3), normal(2, height // config.factor, width // config.factor, 4)
    wanted, made = reference.encode(channels_first(picture)).latent_dist, ours.encode(picture)
    decoded = reference.decode(channels_first(latents)).sample
    return (
        relative_error(np.moveaxis(np.asarray(made.mean), -1, 1), wanted.mean),
        relative_error(np.moveaxis(np.asarray(made.logvar), -1, 1), wanted.logvar),
        relative_error(np.moveaxis(np.asarray(ours.decode(latents)), -1, 1), decoded),
    )


@torch.no_grad()
def tiling_errors(height, width, tile):
    """Of a tiled decoding and of a tiled encoding's mean against diffusers' own. In latent cells."""
    channels = (32, 32, 64)
    config = VAEConfig(block_out_channels=channels, layers_per_block=1)
    reference = disturbed(
        AutoencoderKL(
            block_out_channels=channels,
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            sample_size=4 * tile,
        ),
        size=0.02,
    )
    reference.enable_tiling()
    ours = converted("vae", config, lambda t: vae.diffusers(t, "vae/", config), reference)
    latents, picture = normal(2, height, width, 4), normal(1, 4 * height, 4 * width, 3)
    decoded = reference.decode(channels_first(latents)).sample
    encoded = reference.encode(channels_first(picture)).latent_dist.mean
    return (
        relative_error(np.moveaxis(np.asarray(decode_tiled(ours, latents, tile)), -1, 1), decoded),
        relative_error(np.moveaxis(np.asarray(encode_tiled(ours, picture, 4 * tile).mean), -1, 1), encoded),
    )


@torch.no_grad()
def text_error(name="H"):
    config = TextConfig(width=48, layers=3, heads=4, mlp_width=200, activation=TOWERS[name], vocab_size=1000)
    reference = disturbed(
        CLIPTextModel(
            CLIPTextConfig(
                hidden_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=200,
                hidden_act=config.activation,
                vocab_size=1000,
                eos_token_id=2,
            )
        )
    )
    tokens = np.random.default_rng(0).integers(0, 1000, (2, 77))
    table = lambda t: clip.transformers_text(t, "text_encoder/", config)  # noqa: E731
    ours = converted("text_encoder", config, table, reference)
    return relative_error(ours(tokens), reference(torch.from_numpy(tokens)).last_hidden_state)


@torch.no_grad()
def vision_error(name="H"):
    config = VisionConfig(
        image_size=56, width=64, layers=3, heads=4, mlp_width=200, activation=TOWERS[name], projection_dim=40
    )
    reference = disturbed(
        CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=200,
                hidden_act=config.activation,
                image_size=56,
                patch_size=14,
                projection_dim=40,
            )
        )
    )
    pixels = normal(2, 56, 56, 3)
    table = lambda t: clip.transformers_vision(t, "image_encoder/", config)  # noqa: E731
    ours = converted("image_encoder", config, table, reference)
    return relative_error(ours(pixels), reference(channels_first(pixels)).image_embeds)


TINY_DEPTH = DepthConfig(
    image_size=64,
    stem_width=16,
    stage_widths=(32, 64, 128),
    stage_depths=(2, 1, 2),
    norm_groups=8,
    width=32,
    layers=4,
    heads=4,
    mlp_width=80,
    norm_epsilon=1e-12,
    taps=(1, 3),
    reassemble_widths=(48, 40),
    fusion_width=32,
)


def depth_reference(config=TINY_DEPTH):
    """transformers' class for a configuration of ours."""
    settings = diffusers_configs._depth(config, "float32")
    del settings["torch_dtype"], settings["model_type"]
    backbone = BitConfig(**settings.pop("backbone_config"))
    return DPTForDepthEstimation(DPTConfig(**settings, backbone_config=backbone))


@torch.no_grad()
def depth_error(config=TINY_DEPTH):
    reference = disturbed(depth_reference(config), size=0.1).eval()
    pixels = normal(2, config.image_size, config.image_size, 3)
    # The last ReLU would hide most of what random weights make: lifted above it, and compared without the lift.
    lift = reference.head.head[-2].bias.fill_(100.0)
    ours = converted("depth_estimator", config, lambda t: depth.transformers(t, "depth_estimator/", config), reference)
    want = reference(channels_first(pixels)).predicted_depth
    assert (want > 0).all()
    return relative_error(ours(pixels) - lift.item(), want - lift)


TOLERANCE = 1e-5  # measured: 4e-6
