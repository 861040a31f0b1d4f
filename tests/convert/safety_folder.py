"""A small `safety_checker` folder written by hand, as diffusers leaves one."""

import json

import numpy as np
from safetensors.numpy import save_file

WIDTH, LAYERS, SIDE, PATCH, SPACE = 32, 2, 28, 14, 16
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
CONFIG = {
    "architectures": ["StableDiffusionSafetyChecker"],
    "model_type": "clip",
    "projection_dim": SPACE,
    "text_config": {},
    "vision_config": TOWER,
}
PREPROCESSOR = {
    "crop_size": SIDE,
    "size": SIDE,
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def random_tensors():
    """name -> float32 array, under the names of transformers before 5."""
    model = "vision_model.vision_model"
    shapes = {
        f"{model}.embeddings.class_embedding": (WIDTH,),
        f"{model}.embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
        f"{model}.embeddings.position_embedding.weight": ((SIDE // PATCH) ** 2 + 1, WIDTH),
        "visual_projection.weight": (SPACE, WIDTH),
        "concept_embeds": (17, SPACE),
        "special_care_embeds": (3, SPACE),
        "concept_embeds_weights": (17,),
        "special_care_embeds_weights": (3,),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{model}.{norm}.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}
    for layer in (f"{model}.encoder.layers.{index}" for index in range(LAYERS)):
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{norm}.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}
        linear = {f"self_attn.{p}_proj": (WIDTH, WIDTH) for p in ("q", "k", "v", "out")}
        linear |= {"mlp.fc1": (64, WIDTH), "mlp.fc2": (WIDTH, 64)}
        for name, shape in linear.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
    rng = np.random.default_rng(0)
    return {name: 0.3 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_safety_checker(folder, tensors=None):
    """Writes `folder` with its configuration and weights, and returns it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(random_tensors() if tensors is None else tensors, folder / "model.safetensors")
    return folder
