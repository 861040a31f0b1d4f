"""Every reader of files that come from elsewhere, as a function of a file's bytes: for scripts/fuzz and the tests."""

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from convert.adapters import read_lora, read_textual_inversion
from convert.architecture import tiny_vae
from convert.architecture.controlnet import from_config
from convert.architecture.diffusers import from_folder
from convert.architecture.original import from_yaml
from convert.architecture.prior import from_folder as prior_from_folder
from convert.architecture.prior import from_karlo_yaml
from convert.readers import load_pickle, open_tensors
from convert.statistics import read_statistics
from convert.tokenizer import tokenizer_json_from_folder
from tests.convert.broken_files import VALID
from tests.convert.diffusers_folder import CONFIG, FILES
from tests.convert.torch_files import torch_bytes
from unclip_jax.checkpoints.config import read_config
from unclip_jax.checkpoints.strict_json import read_object
from unclip_jax.conditioning.tokenizer import Tokenizer
from unclip_jax.image_files import read_recipe

CORPUS = Path(__file__).parent / "corpus"


def outcome(reader: str, content: bytes) -> str:
    """What a reader says of a file: nothing, or its refusal. Raises whatever it should not."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of numbers that are none
        try:
            READERS[reader](Path(folder), content)
        except (ValueError, OSError) as error:
            if isinstance(error, UnicodeError):
                raise
            text = str(error)
            assert text.strip(), "a refusal that says nothing"
            assert "\n" not in text.strip(), "a refusal of more than one line"
            return text.replace(folder, "").replace(Path(folder).name, "")
    return ""


def _tensors(name: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, content: bytes) -> None:
        (folder / "one.bin").write_bytes(VALID["a.pt"])
        (folder / name).write_bytes(content)
        with open_tensors(folder / name) as file:
            for key, info in file.tensors.items():
                array = file.read(key)
                assert (array.shape, array.dtype) == info
                array.tobytes()

    return read


def _pickle(folder: Path, content: bytes) -> None:
    (folder / "a.pt").write_bytes(content)
    load_pickle(folder / "a.pt")


def _code(folder: Path, content: bytes) -> None:
    """A pickle in a file whose checksums are right."""
    _pickle(folder, torch_bytes(content))


def _yaml(folder: Path, content: bytes) -> None:
    (folder / "a.yaml").write_bytes(content)
    from_yaml(folder / "a.yaml", {})


def _statistics(folder: Path, content: bytes) -> None:
    (folder / "a.npz").write_bytes(content)
    read_statistics(folder / "a.npz")


def _config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    read_config(read_object(folder / "config.json"))


def _tokenizer(folder: Path, content: bytes) -> None:
    Tokenizer.from_json(content.decode("utf-8", "replace"), "transformers", 77)(["a cat"])


def _vocabulary(name: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, content: bytes) -> None:
        for other in VOCABULARY:
            (folder / other).write_bytes(content if other == name else VOCABULARY[other])
        Tokenizer.from_json(tokenizer_json_from_folder(folder), "transformers", 77)(["a cat"])

    return read


def _part(name: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, content: bytes) -> None:
        for other, data in FILES.items():
            (folder / other).parent.mkdir(exist_ok=True)
            (folder / other).write_bytes(content if other == name else json.dumps(data).encode())
        from_folder(folder)
        shutil.rmtree(folder, ignore_errors=True)

    return read


def _karlo(folder: Path, content: bytes) -> None:
    (folder / "a.yaml").write_bytes(content)
    from_karlo_yaml(folder / "a.yaml")


PRIOR: dict[str, object] = {
    "prior/config.json": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "embedding_dim": 16},
    "prior_scheduler/scheduler_config.json": {"_class_name": "UnCLIPScheduler", "prediction_type": "sample"},
    "prior_text_encoder/config.json": {"hidden_size": 16, "projection_dim": 16},
}


def _prior(name: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, content: bytes) -> None:
        for other, data in PRIOR.items():
            (folder / other).parent.mkdir(exist_ok=True)
            (folder / other).write_bytes(content if other == name else json.dumps(data).encode())
        prior_from_folder(folder)
        shutil.rmtree(folder, ignore_errors=True)

    return read


def _controlnet(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    from_config(folder / "config.json")


def _tiny_vae(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    tiny_vae.from_config(folder / "config.json")


def _recipe(folder: Path, content: bytes) -> None:
    (folder / "a.png").write_bytes(content)
    read_recipe(folder / "a.png")


def _lora(folder: Path, content: bytes) -> None:
    (folder / "a.safetensors").write_bytes(content)
    read_lora(folder / "a.safetensors", CONFIG)


def _peft(folder: Path, content: bytes) -> None:
    """Settings beside a file of peft's."""
    module = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = {f"{module}.lora_A.weight": np.zeros((1, 64), np.float32)}
    pair |= {f"{module}.lora_B.weight": np.zeros((64, 1), np.float32)}
    (folder / "adapter_model.safetensors").write_bytes(save(pair))
    (folder / "adapter_config.json").write_bytes(content)
    read_lora(folder, CONFIG)


def _word(folder: Path, content: bytes) -> None:
    (folder / "a.pt").write_bytes(content)
    read_textual_inversion(folder / "a.pt", CONFIG)


VOCABULARY = {
    "vocab.json": json.dumps({"a</w>": 0, "c": 1, "at</w>": 2, "cat</w>": 3, "a": 4, "t</w>": 5,
                              "<|startoftext|>": 6, "<|endoftext|>": 7}).encode(),
    "merges.txt": b"#version: 0.2\na t</w>\nc at</w>\n",
    "special_tokens_map.json": b'{"pad_token": "<|endoftext|>"}',
}  # fmt: skip
READERS: dict[str, Callable[[Path, bytes], None]] = {
    **{name: _tensors(name) for name in VALID},
    "pickle": _pickle,
    "pickle-code": _code,
    "original.yaml": _yaml,
    "statistics.npz": _statistics,
    "config.json": _config,
    "tokenizer.json": _tokenizer,
    **{f"tokenizer-{name}": _vocabulary(name) for name in VOCABULARY},
    **{name.replace("/", "-"): _part(name) for name in FILES if not name.startswith("image_normalizer")},
    "karlo.yaml": _karlo,
    **{name.replace("/", "-"): _prior(name) for name in PRIOR},
    "controlnet-config.json": _controlnet,
    "tiny-vae-config.json": _tiny_vae,
    "recipe.png": _recipe,
    "lora.safetensors": _lora,
    "lora.pt": _lora,
    "adapter_config.json": _peft,
    "textual-inversion": _word,
}
