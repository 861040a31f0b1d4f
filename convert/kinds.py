"""What a file of tensors is that is not what was asked for: named for the person who gave it, with what to do.

Only names and shapes are looked at. The kinds are told apart by tensors that a kind cannot do without.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from convert import layouts
from convert.readers import TensorInfo

Tensors = Mapping[str, TensorInfo]
# The width of the text that a UNet reads, by the family that has it.
TEXT_WIDTHS = {
    768: "Stable Diffusion 1",
    1280: "the refiner of Stable Diffusion XL",
    2048: "Stable Diffusion XL",
}
OTHER_FAMILY = "these networks are Stable Diffusion 2's"
# The parts that every checkpoint has, and how each is given by itself.
PART_NAMES = {"unet": "a UNet", "vae": "a VAE", "text_encoder": "a text encoder", "image_encoder": "an image encoder"}
GIVE = {
    "unet": "give the checkpoint that it belongs to as the source, and this file as unet=",
    "vae": "give the checkpoint that it belongs to as the source, and this file as vae=",
    "text_encoder": "give the whole checkpoint that it belongs to",
    "image_encoder": "give the whole checkpoint that it belongs to",
}


class Kind(NamedTuple):
    """name: what to call it. pattern: matches the beginning of a name that it must have. advice: what to do with it."""

    name: str
    pattern: str
    advice: str


# In this order: a checkpoint of another program may hold what looks like a smaller kind.
KINDS = [
    Kind(
        "a LoRA or another adapter",
        r".*[._](lora_(down|up|mid|A|B|linear_layer)|lora\.(down|up)|hada_w\d.*|lokr_w\d.*|lora_magnitude_vector|"
        r"dora_scale|oft_blocks|oft_diag|on_input)\b|lora_unet_|lora_te\d?_|lora_(unet|text_encoder)(:|$)|bundle_emb\.",
        "give the checkpoint that it changes as the source, and load this with load_lora_weights",
    ),
    Kind(
        "a textual inversion",
        r"(emb_params|string_to_param|string_to_token|clip_[lg])$",
        "give a checkpoint as the source, and load this with load_textual_inversion",
    ),
    Kind(
        "a ControlNet",
        r"(control_model|controlnet)\.|(module\.)?controlnet_(cond_embedding|down_blocks|mid_block)\.|input_hint_block\.|"
        r"zero_convs\.",
        "ControlNets are not supported",
    ),
    Kind("an IP-Adapter", r"(ip_adapter|image_proj)\.", "IP-Adapters are not supported"),
    Kind("a T2I-Adapter", r"(adapter\.)?body\.\d+\.(block|resnets|in_conv)", "T2I-Adapters are not supported"),
    Kind("Stable Diffusion 3", r"(model\.diffusion_model\.|transformer\.)?joint_(transformer_)?blocks\.", OTHER_FAMILY),
    Kind("Flux", r"(model\.diffusion_model\.)?(double_blocks|single_transformer_blocks)\.", OTHER_FAMILY),
    Kind("Stable Cascade", r"(model\.diffusion_model\.)?clip_(txt|img)_mapper\.", OTHER_FAMILY),
    Kind("Stable Diffusion XL", r"conditioner\.embedders\.1\.(model|transformer)\.(?!visual\.)", OTHER_FAMILY),
    Kind(
        "Stable Diffusion's upscaler by two (x2 latent)",
        r"(.*\.)?(low_res_noise_embed|u_net\.[du]_blocks)\.|.*resnets\.\d+\.norm1\.linear\.",
        "use the upscaler by four, stabilityai/stable-diffusion-x4-upscaler",
    ),
    Kind("a video model", r".*\.(time_stack|temporal_transformer_blocks|motion_modules)\.", OTHER_FAMILY),
    Kind(
        "a safety checker",
        r"(vision_model\.)*(concept_embeds|special_care_embeds)",
        "give it with convert.safety.open_safety_checker",
    ),
    Kind(
        "a depth estimator (DPT)",
        r"(dpt\.|neck\.)|(pretrained|scratch)\.",
        "give the whole checkpoint that it belongs to",
    ),
    Kind("Karlo's prior", r"model\.prd_emb$", "open it with open_prior, or give it as prior="),
    Kind(
        "an image upscaler (ESRGAN)",
        r"(params(_ema)?\.)?(conv_first|model\.\d+\.sub\.\d+|body\.\d+\.rdb1)\.",
        "image upscalers of other kinds are not supported",
    ),
]  # fmt: skip


def kind_of(tensors: Tensors, without: Collection[str] = ()) -> str:
    """What a file holds and what to do with it, in one sentence; "" for what is not known or looks right.

    without: parts of a checkpoint that it need not have.
    """
    names = list(tensors)
    for kind in KINDS:
        if any(map(re.compile(kind.pattern).match, names)):
            return f"is {kind.name}: {kind.advice}"
    if family := family_of(tensors):
        return f"is of {family}: {OTHER_FAMILY}"
    held = parts_of(names)
    missing = [part for part in ("unet", "vae", "text_encoder") if part not in (*held, *without)]
    if len(held) == 1 and missing:
        return f"is {PART_NAMES[held[0]]} on its own: {GIVE[held[0]]}"
    if held and missing:
        lacking = " and ".join(part.replace("_", " ").replace("vae", "VAE").replace("unet", "UNet") for part in missing)
        options = [f"{part}=" for part in missing if part in ("unet", "vae")]
        advice = f"give {' and '.join(options)}" if len(options) == len(missing) else "give the whole checkpoint"
        return f"is a checkpoint without its {lacking}: {advice}"
    if len(names) == 1 and len(tensors[names[0]].shape) <= 2:
        return "holds one small tensor, as a textual inversion does: load it with load_textual_inversion"
    return ""


def family_of(tensors: Tensors) -> str:
    """The family of a UNet by the width of the text that it reads; "" for Stable Diffusion 2 and unknown ones."""
    keys = re.compile(r".*\.attn2\.to_k\.weight")
    widths = {info.shape[1] for name, info in tensors.items() if keys.fullmatch(name) and len(info.shape) == 2}
    return next((family for width, family in TEXT_WIDTHS.items() if widths == {width}), "")


def parts_of(names: Iterable[str]) -> list[str]:
    """The parts of a checkpoint that tensors of these names are of, with a root of their own or bare."""
    names = list(names)
    rooted = {layouts.part_of(name) for name in names}
    return [part for part, is_of in _BARE.items() if part in rooted or any(map(is_of, names))]


def _signed(part: str) -> Callable[[str], bool]:
    """Whether a name without a root is one of this part's, in any of its dialects."""

    def is_of(name: str) -> bool:
        return any(re.fullmatch(d.sign, d.canonical(name)) for d in layouts.PARTS[part].values())

    return is_of


_BARE = {part: _signed(part) for part in PART_NAMES}
