"""The layouts of whole checkpoints: where each part's tensors are, and under whose names.

A part's names (`convert.rules.unet` and the like) do not depend on what holds them. A layout gives each part a place:
the prefix of its tensors, and a dialect. Two layouts are written, `convert.rules.ldm` and `convert.rules.diffusers`.
`locate` finds the places in what other programs wrote. The tensors of folders are called "folder/name" here.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from convert.engine import Dialect, Table, Unused
from convert.readers import CheckpointError
from convert.rules import clip, controlnet, depth, tiny_vae, unet, vae
from convert.rules.flax import with_flax
from convert.tensor_file import quoted
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.models.configs import AutoencoderTinyConfig, ControlNetConfig, UNetConfig, VAEConfig, VisionConfig


def _statistics(t: Table, prefix: str, width: int) -> None:
    for name in ("mean", "std"):
        t.tensor(f"image_normalizer.{name}", f"{prefix}{name}", "row")


_AUTOENCODERS = {VAEConfig: "AutoencoderKL", AutoencoderTinyConfig: "AutoencoderTiny"}


def _of(kind: type, dialects: Mapping[str, Dialect]) -> dict[str, Dialect]:
    """The dialects of one kind of autoencoder, which refuse to be read as those of the other."""

    def checked(dialect: Dialect) -> Dialect:
        def table(t: Table, prefix: str, config: Any) -> None:
            if not isinstance(config, kind):
                held, wanted = _AUTOENCODERS[kind], _AUTOENCODERS[type(config)]
                raise CheckpointError(f"vae: the weights are an {held}'s; want those of an {wanted}")
            dialect.table(t, prefix, config)

        return dataclasses.replace(dialect, table=table)

    return {name: checked(dialect) for name, dialect in dialects.items()}


# The parts that files hold, and the dialects of each; the first of them is the original's, where it has one.
PARTS: dict[str, dict[str, Dialect]] = {
    "unet": with_flax(unet.DIALECTS, "diffusers"),
    "vae": {
        **_of(VAEConfig, with_flax(vae.DIALECTS, "diffusers")),
        **_of(AutoencoderTinyConfig, tiny_vae.DIALECTS),
    },
    "text_encoder": with_flax(clip.TEXT_DIALECTS, "transformers"),
    "image_encoder": with_flax(clip.VISION_DIALECTS, "transformers"),
    "image_normalizer": {"diffusers": Dialect(_statistics, r"mean|std")},
    "depth_estimator": depth.DIALECTS,
    "controlnet": with_flax(controlnet.DIALECTS, "diffusers"),
}


class Place(NamedTuple):
    """Where a part's tensors are: the prefix of all of their names, and the dialect of the rest."""

    prefix: str
    dialect: str


Places = Mapping[str, Place]

# What wrapped networks have in their names: torch's parallel and compiled modules.
_WRAPPER = re.compile(r"(?:(?<=\.)|(?<=/)|^)(?:module|_orig_mod|_forward_module|_fsdp_wrapped_module)\.")
# The roots of each part in single files. sgm numbers its embedders; a tower shows by its own names which one it is.
_EMBEDDER = r"(?:cond_stage_model|conditioner\.embedders\.\d{1,2})\."
_VISUAL = r"(?=(?:\w+\.){0,2}(?:visual|vision_model|visual_projection)\.)"
_ROOTS = {
    "unet": r"(?:model\.)?diffusion_model\.|unet\.",
    "vae": r"first_stage_model\.|vae\.",
    "image_encoder": rf"{_EMBEDDER}{_VISUAL}|embedder\.|image_encoder\.",
    "text_encoder": rf"{_EMBEDDER}|text_encoder\.",
    "depth_estimator": r"depth_model\.|depth_estimator\.",
    "controlnet": r"control_model\.|controlnet\.",
}
_SCHEDULE = (
    r"betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod"
    r"|log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod"
    r"|posterior_variance|posterior_log_variance_clipped|posterior_mean_coef1|posterior_mean_coef2|logvar|lvlb_weights"
)
# Empty tensors by which ComfyUI and others mark what a UNet predicts, and that its schedule ends without signal.
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
OF_ANY_RUN = [
    Unused(rf"(noise_augmentor\.|low_scale_model\.)?({_SCHEDULE})", "noise schedule: recomputed from its betas"),
    Unused(r"denoiser\.(sigmas|log_sigmas)", "noise schedule: recomputed from its betas"),
    Unused(r"scale_factor|global_step", "part of the configuration, or of a training run"),
]
BESIDE = [
    *OF_ANY_RUN,
    Unused(r"noise_augmentor\.data_(mean|std)", "statistics of image embeddings: read from a file of their own"),
    Unused(rf"{V_PREDICTION}|{ZERO_SNR}", "marks of what the UNet predicts"),
    Unused(r"model_ema\..*", "EMA of the UNet's weights: read with ema"),
]
# What the tower's last layer is called, of which Stable Diffusion 2 reads the layer before.
_LAYERS = {
    "open_clip": r"transformer\.resblocks",
    **dict.fromkeys(("transformers", "flax"), r"text_model\.encoder\.layers"),
}

# Of any size: enough to ask for the names of tensors that every size has.
_SETTINGS: dict[str, Any] = {
    "unet": UNetConfig(),
    "image_encoder": VisionConfig(),
    "controlnet": ControlNetConfig(),
}


def table(config: CheckpointConfig, params: Mapping[str, Any], places: Places) -> Table:
    """The rules for one architecture; `params` as from `unclip_jax.checkpoints.networks.abstract_params`."""
    t = Table(params)
    for part, place in places.items():
        if (settings := _settings(config, part)) is not None:
            PARTS[part][place.dialect].table(t, place.prefix, settings)
    return t


def file_params(config: CheckpointConfig, without: Collection[str] = ()) -> dict[str, Any]:
    """The parameters that an original file holds: all but the statistics of image embeddings, and omitted parts."""
    left_out = {*without, "image_normalizer"}
    return {name: spec for name, spec in abstract_params(config).items() if name.split(".")[0] not in left_out}


def unused(config: CheckpointConfig, places: Places, without: Collection[str] = ()) -> list[Unused]:
    """What a checkpoint may hold that no network reads. without: parts that come from elsewhere."""
    found = list(BESIDE)
    for part, place in places.items():
        within = list(PARTS[part][place.dialect].unused)
        if part == "text_encoder":
            last = rf"{_LAYERS[place.dialect]}\.{config.text_encoder.layers}\..*"
            within.append(Unused(last, "the last text block: the penultimate layer's states are used"))
        if _settings(config, part) is None:
            within.append(Unused(".*", f"the {part.replace('_', ' ')}: this UNet is not conditioned by it"))
        if part in without:
            within.append(Unused(".*", f"the checkpoint's own {part}: another one is used"))
        found += [Unused(f"{re.escape(place.prefix)}({item.pattern})", item.reason) for item in within]
    return found


def _settings(config: CheckpointConfig, part: str) -> Any:
    return config.image_embedding_dim if part == "image_normalizer" else getattr(config, part)


def locate(names: Iterable[str], layout: Places) -> tuple[dict[str, Place], dict[str, str]]:
    """Finds the parts among tensors of these names.

    Args:
        names: Of a file, or "folder/name" of a folder's files.
        layout: The places of parts that are not there.

    Returns:
        The parts' places, and the table's name of every tensor -> its own.

    Raises:
        CheckpointError: Two names mean one tensor.
    """
    parts: dict[str, list[tuple[str, str, str]]] = defaultdict(list)  # part -> (root, name within, own name)
    found: dict[str, str] = {}
    for name in names:
        bare = _WRAPPER.sub("", name)
        part, root = _root(bare)
        if part in layout:
            parts[part].append((root, bare.removeprefix(root), name))
        else:
            _add(found, bare, name)
    places = {}
    for part, place in layout.items():
        places[part], canonical = _place(PARTS[part], place, parts[part])
        for within, name in canonical:
            _add(found, f"{places[part].prefix}{within}", name)
    return places, found


def part_of(name: str) -> str:
    """The part that a tensor belongs to, by the root of its name; "" for a name without one."""
    return _root(_WRAPPER.sub("", name))[0]


def _root(name: str) -> tuple[str, str]:
    """The part that a tensor belongs to, and where the part's names begin; "" for no part."""
    folder, slash, _ = name.partition("/")
    if slash and folder in PARTS:
        inner = re.match(rf"{re.escape(folder)}/(?:{_ROOTS.get(folder, '')})?", name)
        return folder, inner[0] if inner else f"{folder}/"
    for part, pattern in _ROOTS.items():
        if match := re.match(pattern, name):
            return part, match[0]
    return "", ""


def _place(
    dialects: Mapping[str, Dialect], default: Place, tensors: list[tuple[str, str, str]]
) -> tuple[Place, list[tuple[str, str]]]:
    """A part's place, from the names of most of its tensors, and the tensors as (canonical name within, own name)."""
    best, signs = default.dialect, 0
    for name, dialect in dialects.items():
        count = sum(bool(re.fullmatch(dialect.sign, dialect.canonical(within))) for _, within, _ in tensors)
        if count > signs:
            best, signs = name, count
    canonical = [(root, within, dialects[best].canonical(within), own) for root, within, own in tensors]
    prefixes = Counter(
        f"{root}{within.removesuffix(name)}"
        for root, within, name, _ in canonical
        if within.endswith(name) and re.fullmatch(dialects[best].sign, name)
    )
    # Where no name is its own canonical form, messages have the root and the canonical name.
    roots = Counter(root for root, *_ in canonical)
    common = (prefixes or roots).most_common(1)
    return Place(common[0][0] if common else default.prefix, best), [(name, own) for _, _, name, own in canonical]


def _add(found: dict[str, str], name: str, own: str) -> None:
    if name in found:
        raise CheckpointError(f"one tensor is there twice, in two dialects: {quoted(found[name])} and {quoted(own)}")
    found[name] = own


def foreign_names(part: str, places: Places, params: Mapping[str, int]) -> dict[str, str]:
    """The names of the tensors of some parameters of a part: name within ours -> theirs.

    params: name -> its number of axes. For stacked layers it is the first one's tensor.
    """
    place, config = places[part], _SETTINGS[part]
    t = Table({f"{part}.{name}": np.broadcast_to(np.empty((), np.int8), (1,) * axes) for name, axes in params.items()})
    PARTS[part][place.dialect].table(t, place.prefix, config)
    return {rule.ours.removeprefix(f"{part}."): rule.foreign for rule in reversed(t.rules)}
