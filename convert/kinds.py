"""Recognises files that are not what was asked for, and names them for the user, with advice.

Only names and shapes are read. Kinds are distinguished by tensors that a kind cannot lack.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from convert import layouts
from convert.readers import TensorInfo
from unclip_jax.checkpoints.strict_json import read_object

Tensors = Mapping[str, TensorInfo]
# The width of the text that a UNet reads, by the family that has it.
TEXT_WIDTHS = {
    768: "Stable Diffusion 1",
    1280: "the refiner of Stable Diffusion XL",
    2048: "Stable Diffusion XL",
}
OTHER_FAMILY = "these networks are Stable Diffusion 2's"
# The parts that a checkpoint may have, and how each is given by itself.
PART_NAMES = {"unet": "a UNet", "vae": "a VAE", "text_encoder": "a text encoder", "image_encoder": "an image encoder"}
_WHOLE = "give the whole checkpoint that it belongs to"
GIVE = {
    "unet": "give the checkpoint that it belongs to as the source, and this as unet=",
    "vae": "give the checkpoint that it belongs to as the source, and this as vae=",
    "text_encoder": _WHOLE,
    "image_encoder": _WHOLE,
}
LORA, WORD, CONTROLNET = "a LoRA or another adapter", "a textual inversion", "a ControlNet"
SDXL, SD3, FLUX, CASCADE = "Stable Diffusion XL", "Stable Diffusion 3", "Flux", "Stable Cascade"
BY_TWO, CHECKER = "Stable Diffusion's upscaler by two (x2 latent)", "a safety checker"
DEPTH, PRIOR = "a depth estimator (DPT)", "a text-to-image prior"
ADVICE = {
    **dict.fromkeys((SDXL, SD3, FLUX, CASCADE, "a video model"), OTHER_FAMILY),
    LORA: "give the checkpoint that it changes as the source, and load this with load_lora_weights",
    WORD: "give a checkpoint as the source, and load this with load_textual_inversion",
    CONTROLNET: "give the checkpoint that it controls as the source, and this as controlnet=",
    "an estimator of intrinsic images": "intrinsic images are not supported",
    "an IP-Adapter": "IP-Adapters are not supported",
    "a T2I-Adapter": "T2I-Adapters are not supported",
    BY_TWO: "use the upscaler by four, stabilityai/stable-diffusion-x4-upscaler",
    CHECKER: "give it with convert.safety.open_safety_checker",
    DEPTH: _WHOLE,
    PRIOR: "open it with open_prior, or give it as prior=",
    "an image upscaler (ESRGAN)": "image upscalers of other kinds are not supported",
    **{f"{name} on its own": GIVE[part] for part, name in PART_NAMES.items()},
}

# What the name of some tensor begins with, by kind; first the kinds that hold what looks like another.
TENSORS = {
    LORA: r".*[._](lora_(down|up|mid|A|B|linear_layer)|lora\.(down|up)|hada_w\d.*|lokr_w\d.*|lora_magnitude_vector"
    r"|dora_scale|oft_blocks|oft_diag|on_input)\b|lora_unet_|lora_te\d?_|lora_(unet|text_encoder)(:|$)|bundle_emb\.",
    WORD: r"(emb_params|string_to_param|string_to_token|clip_[lg])$",
    CONTROLNET: r"(.*\.)?(input_hint_block|zero_convs|controlnet_(cond_embedding|down_blocks|mid_block))[._]",
    "an IP-Adapter": r"(ip_adapter|image_proj)\.",
    "a T2I-Adapter": r"(adapter\.)?body\.\d+\.(block|resnets|in_conv)",
    SD3: r"(model\.diffusion_model\.|transformer\.)?joint_(transformer_)?blocks\.",
    FLUX: r"(model\.diffusion_model\.)?(double_blocks|single_transformer_blocks)\.",
    CASCADE: r"(model\.diffusion_model\.)?clip_(txt|img)_mapper\.",
    SDXL: r"conditioner\.embedders\.1\.(model|transformer)\.(?!visual\.)",
    BY_TWO: r"(.*\.)?(low_res_noise_embed|u_net\.[du]_blocks)\.|.*resnets\.\d+\.norm1\.linear\.",
    "a video model": r".*\.(time_stack|temporal_transformer_blocks|motion_modules)\.",
    CHECKER: r"(vision_model\.)*(concept_embeds|special_care_embeds)",
    DEPTH: r"(dpt|neck|pretrained|scratch)\.",
    PRIOR: r"model\.prd_emb$",
    "an image upscaler (ESRGAN)": r"(params(_ema)?\.)?(conv_first|model\.\d+\.sub\.\d+|body\.\d+\.rdb1)\.",
}
# A network has more tensors than this.
FEWEST = 20
# The classes that a folder's model_index.json or config.json may name.
CLASSES = {
    SDXL: r"StableDiffusion.*XL.*",
    SD3: r"(StableDiffusion3|SD3).*",
    FLUX: r"Flux(?!.*StableDiffusion).*",
    BY_TWO: r"StableDiffusionLatentUpscale.*",
    CONTROLNET: r".*ControlNet.*",
    "an estimator of intrinsic images": r"MarigoldIntrinsics.*",
    CASCADE: r"StableCascade.*|Wuerstchen.*",
    PRIOR: r"UnCLIPPipeline|PriorTransformer",
    CHECKER: r"StableDiffusionSafetyChecker",
    DEPTH: r"DPT.*|dpt",
    "a UNet on its own": r"(Flax)?UNet2DConditionModel",
    "a VAE on its own": r"(Flax)?AutoencoderKL|AutoencoderTiny",
    "a text encoder on its own": r"CLIPTextModel.*|clip_text_model",
    "an image encoder on its own": r"CLIPVisionModel.*|clip_vision_model",
}
FILES = {
    LORA: r"adapter_config\.json|pytorch_lora_weights\.(safetensors|bin)",
    WORD: r"learned_embeds\.(safetensors|bin)",
}


def kind_of(tensors: Tensors, without: Collection[str] = ()) -> str:
    """One sentence on what a file holds and what to do with it; "" if it is unknown or looks right.

    without: parts of a checkpoint that it need not have.
    """
    names = list(tensors)
    if marked := kind_by_mark(names):
        return _sentence(marked)
    if family := family_of(tensors):
        return f"is of {family}: {OTHER_FAMILY}"
    held = parts_of(names)
    missing = [part for part in ("unet", "vae", "text_encoder") if part not in (*held, *without)]
    if len(held) == 1 and missing:
        return _sentence(f"{PART_NAMES[held[0]]} on its own")
    if held and missing:
        lacking = " and ".join(part.replace("_", " ").replace("vae", "VAE").replace("unet", "UNet") for part in missing)
        options = [f"{part}=" for part in missing if part in ("unet", "vae")]
        advice = f"give {' and '.join(options)}" if len(options) == len(missing) else "give the whole checkpoint"
        return f"is a checkpoint without its {lacking}: {advice}"
    if len(names) == 1 and len(tensors[names[0]].shape) <= 2:
        return "holds one small tensor, as a textual inversion does: load it with load_textual_inversion"
    return ""


def other_than(kind: str, tensors: Tensors) -> str:
    """As `kind_of`, if a file of this kind was wanted; a whole checkpoint is named as well.

    A few tensors are not a network: they are a broken file of the wanted kind.
    """
    if len(tensors) < FEWEST:
        marked = kind_by_mark(tensors)
        return _sentence(marked) if marked not in ("", kind) else ""
    said = kind_of(tensors)
    if not said and {"unet", "vae", "text_encoder"} <= set(parts_of(tensors)):
        return "is a whole checkpoint: give it as the source"
    return "" if said.startswith(f"is {kind}") else said


def kind_by_mark(names: Iterable[str]) -> str:
    """The first kind whose mark is in some name; "" if there is none."""
    names = list(names)
    return next((kind for kind, pattern in TENSORS.items() if any(map(re.compile(pattern).match, names))), "")


def family_of(tensors: Tensors) -> str:
    """The family of a UNet, from the width of the text that it reads; "" for Stable Diffusion 2 and unknown ones."""
    keys = re.compile(r".*\.attn2\.to_k\.weight")
    widths = {info.shape[1] for name, info in tensors.items() if keys.fullmatch(name) and len(info.shape) == 2}
    return next((family for width, family in TEXT_WIDTHS.items() if widths == {width}), "")


def parts_of(names: Iterable[str]) -> list[str]:
    """The parts of a checkpoint that these tensor names belong to, with a root of their own or bare."""
    names = list(names)
    rooted = {layouts.part_of(name) for name in names}
    return [part for part, is_of in _BARE.items() if part in rooted or any(map(is_of, names))]


def _signed(part: str) -> Callable[[str], bool]:
    """Whether a name without a root belongs to this part, in any of its dialects."""

    def is_of(name: str) -> bool:
        return any(re.fullmatch(d.sign, d.canonical(name)) for d in layouts.PARTS[part].values())

    return is_of


_BARE = {part: _signed(part) for part in PART_NAMES}


def kind_of_folder(folder: Path) -> str:
    """What a folder holds that is not a checkpoint, and what to do with it; "" if it is unknown."""
    for name in ("model_index.json", "config.json"):
        try:
            data = read_object(folder / name)
        except ValueError:
            continue
        classes = [data.get("_class_name"), data.get("model_type")]
        classes += data["architectures"] if isinstance(data.get("architectures"), list) else []
        for kind, pattern in CLASSES.items():
            if any(isinstance(text, str) and re.fullmatch(pattern, text) for text in classes):
                return _sentence(kind)
    names = [path.name for path in folder.iterdir()]
    return next((_sentence(k) for k, p in FILES.items() if any(map(re.compile(p).fullmatch, names))), "")


def _sentence(kind: str) -> str:
    return f"is {kind}: {ADVICE[kind]}"
