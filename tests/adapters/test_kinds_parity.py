"""Every kind of adapter beside the library that trains it: LyCORIS and peft write the file, run it, and we merge it.

Tolerances: relative (L2), of the text encoder's states and of the UNet's output.
"""

import warnings

import numpy as np
import pytest

from convert.adapters import read_adapter, read_lora
from tests.adapters.live import CONFIG, check, predicted, wanted
from unclip_jax.adapters.changes import Decomposed, Difference, Factor, Hadamard, Kronecker, LowRank, Replacement
from unclip_jax.adapters.lora import merge_loras

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("any_release_of_peft")]

# LyCORIS: what it is told, and the kind that comes of it, beside the differences of norms.
LYCORIS = {
    "LoCon": ({}, LowRank),
    "LoCon with Tucker cores": ({"use_tucker": True}, LowRank),
    "LoCon with scalars": ({"use_scalar": True}, LowRank),
    "rank-stabilised LoCon": ({"rs_lora": True}, LowRank),
    "DoRA": ({"weight_decompose": True}, Decomposed),
    "DoRA by inputs": ({"weight_decompose": True, "wd_on_out": False}, Decomposed),
    "LoHa": ({"network_module": "loha"}, Hadamard),
    "LoHa with Tucker cores": ({"network_module": "loha", "use_tucker": True}, Hadamard),
    "LoHa with DoRA": ({"network_module": "loha", "weight_decompose": True}, Decomposed),
    "LoKr": ({"network_module": "lokr"}, Kronecker),
    "LoKr of four factors": ({"network_module": "lokr", "decompose_both": True, "dims": 1, "factor": 4}, Kronecker),
    "LoKr with Tucker cores": ({"network_module": "lokr", "use_tucker": True, "dims": 1, "factor": 4}, Kronecker),
    "LoKr of whole factors": ({"network_module": "lokr", "full_matrix": True, "factor": 2}, Kronecker),
    "LoKr with DoRA": ({"network_module": "lokr", "weight_decompose": True, "dims": 1}, Decomposed),
    "(IA)^3": ({"network_module": "ia3"}, Factor),
    "(IA)^3 of inputs": ({"network_module": "ia3", "train_on_input": True}, Factor),
    "whole differences": ({"network_module": "full"}, Difference),
}


# Layers of every kind: linear ones and convolutions of 1 and of 3, square ones and others, norms, a stacked tower's.
SOME = [r"mid_block\..*", r"down_blocks\.1\.resnets\.0\..*", r"down_blocks\.0\.downsamplers\.0\.conv", "conv_in",
        r"time_embedding\.linear_1", r".*layers\.1\..*"]  # fmt: skip


@pytest.fixture(scope="module")
def base(both):
    """Without adapters."""
    return wanted(both[2]())


@pytest.mark.parametrize("case", LYCORIS)
def test_files_of_lycoris_change_the_network_as_there(both, base, tmp_path, case):
    """Beside its own run of the network; not beside its merge, which in release 4 scales LoHa and LoKr twice."""
    import torch
    from safetensors.torch import save_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lycoris.wrapper import LycorisNetwork

    LycorisNetwork.apply_preset({"target_module": [], "target_name": SOME})
    networks, _, open_theirs = both
    settings, kind = LYCORIS[case]
    dims = settings.get("dims", 3)
    options = {"lora_dim": dims, "conv_lora_dim": dims, "alpha": 2, "conv_alpha": 2, "train_norm": True}
    options |= {name: value for name, value in settings.items() if name != "dims"}
    pipe = open_theirs()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for network, prefix in ((pipe.unet, "lora_unet"), (pipe.text_encoder, "lora_te")):
        adapted = LycorisNetwork(network, **options)
        adapted.apply_to()
        for name, parameter in adapted.named_parameters():
            amount = 1.0 if name.endswith("scalar") else 0.1
            parameter.data += amount * torch.randn(parameter.shape, generator=generator)
        state |= {name.replace("lycoris_", f"{prefix}_"): value.contiguous().clone()
                  for name, value in adapted.state_dict().items()}  # fmt: skip
    save_file(state, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors", CONFIG)
    assert {type(change) for change in lora.values()} == {kind, Difference}
    assert {name.split(".")[0] for name in lora} == {"unet", "text_encoder"}
    check(predicted(merge_loras(networks, [lora], [1.0])), wanted(pipe), base)


LINEAR = ["to_q", "to_k", "ff.net.0.proj", "proj_in"]
LAYERS = [*LINEAR, "conv1", "conv_shortcut", "downsamplers.0.conv", "conv_in"]
UNET = {"conv_out", "time_embedding"}
TEXT_LAYERS = ["q_proj", "out_proj", "fc1"]
# peft: the class of its settings, what they are beside the targets, and the kind that comes of it.
PEFT = {
    "patterns": ("LoraConfig", {"r": 3, "lora_alpha": 5, "rank_pattern": {"to_k": 2, "conv1": 4, "fc1": 1},
                                "alpha_pattern": {"to_k": 7, "mid_block.resnets.0.conv1": 1}}, LowRank),
    "rank-stabilised": ("LoraConfig", {"r": 3, "lora_alpha": 5, "use_rslora": True, "fan_in_fan_out": True}, LowRank),
    "DoRA": ("LoraConfig", {"r": 3, "lora_alpha": 5, "use_dora": True}, Decomposed),
    "modules to save": ("LoraConfig", {"r": 3, "modules_to_save": ["conv_out", "time_embedding", "fc2"]}, Replacement),
    "biases": ("LoraConfig", {"r": 3, "bias": "all"}, Replacement),
    "LoHa": ("LoHaConfig", {"r": 2, "alpha": 3, "use_effective_conv2d": True}, Hadamard),
    "LoHa without cores": ("LoHaConfig", {"r": 2, "alpha": 3, "rank_pattern": {"conv1": 3}}, Hadamard),
    "LoKr": ("LoKrConfig", {"r": 1, "alpha": 3, "use_effective_conv2d": True, "decompose_both": True}, Kronecker),
    "LoKr of whole factors": ("LoKrConfig", {"r": 16, "alpha": 3, "rank_pattern": {"conv1": 32}}, Kronecker),
    "(IA)^3": ("IA3Config", {"feedforward_modules": ["ff.net.0.proj", "conv1", "conv_in", "fc1"]}, Factor),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of peft, of patterns that are the other network's; of its releases' age
@pytest.mark.parametrize("case", PEFT)
def test_folders_of_peft_change_the_network_as_there(both, base, tmp_path, case):
    import peft
    import torch

    networks, _, open_theirs = both
    name, settings, kind = PEFT[case]
    pipe = open_theirs()
    generator = torch.Generator().manual_seed(0)
    for network, targets in (("unet", LAYERS), ("text_encoder", TEXT_LAYERS)):
        # Of the two networks' modules those that this one has.
        own = {"feedforward_modules": set(targets), "modules_to_save": {"fc2"} if network == "text_encoder" else UNET}
        narrowed = {key: [m for m in settings[key] if m in names] for key, names in own.items() if key in settings}
        config = getattr(peft, name)(target_modules=targets, **(settings | narrowed))
        adapted = peft.get_peft_model(getattr(pipe, network), config)
        for key, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.data += (0.1 if "bias" not in key else 0.02) * torch.randn(
                    parameter.shape, generator=generator
                )
        adapted.save_pretrained(tmp_path / network)
        setattr(pipe, network, adapted.eval())
    lora = read_lora(tmp_path, CONFIG)
    kinds = {type(change) for change in lora.values()}
    assert kinds == ({kind, LowRank} if kind is Replacement else {kind})
    assert read_lora(tmp_path / "unet", CONFIG).keys() == {name for name in lora if name.startswith("unet.")}
    check(predicted(merge_loras(networks, [lora], [1.0])), wanted(pipe), base)


def test_state_dicts_of_tensors():
    import torch

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        state = {f"{module}.lora_A.weight": torch.arange(128, dtype=dtype).reshape(2, 64)}
        state |= {f"{module}.lora_B.weight": torch.ones(64, 2, dtype=dtype)}
        (change,) = read_lora(state, CONFIG).values()
        assert change.down.dtype.name == str(dtype).removeprefix("torch.")
        np.testing.assert_array_equal(change.down.astype(np.float32).T, np.arange(128).reshape(2, 64))


@pytest.mark.parametrize("extended", [False, True])
def test_numbered_files_are_read_in_their_order(both, base, tmp_path, extended):
    """In the order in which its code finds the modules, in this release of diffusers."""
    import json

    import torch
    from safetensors.torch import save_file

    networks, _, open_theirs = both
    pipe = open_theirs()
    generator = torch.Generator().manual_seed(0)
    classes = {
        "unet": ["Attention", "GEGLU", *(["ResnetBlock2D"] if extended else [])],
        "text_encoder": ["CLIPAttention"],
    }
    tensors, metadata = {"<cat>": torch.ones(2, 32)}, {"<cat>": "<embed>"}
    for name in classes:
        metadata[name] = json.dumps(classes[name])
        ancestors = [m for m in getattr(pipe, name).modules() if type(m).__name__ in classes[name]]
        layers = [layer for ancestor in ancestors for layer in ancestor.modules()
                  if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]  # fmt: skip
        for index, layer in enumerate(layers):
            shape, rank = layer.weight.shape, 1 + index % 3
            up = 0.1 * torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)
            down = torch.randn(rank, *shape[1:], generator=generator)
            layer.weight.data += (up.reshape(shape[0], rank) @ down.reshape(rank, -1)).reshape(shape)
            tensors |= {f"{name}:{index}:up": up, f"{name}:{index}:down": down}
            metadata[f"{name}:{index}:rank"] = str(rank)
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    lora, words = read_adapter(tmp_path / "a.safetensors", CONFIG)
    check(predicted(merge_loras(networks, [lora], [1.0])), wanted(pipe), base)
    np.testing.assert_array_equal(words["<cat>"], np.ones((2, 32)))
    for name in classes:  # torch files say nothing of the network
        numbered = {key: value for key, value in tensors.items() if key.startswith(f"{name}:")}
        pairs = [numbered[f"{name}:{i}:{end}"] for i in range(len(numbered) // 2) for end in ("up", "down")]
        torch.save(pairs, tmp_path / "a.pt")
        again = read_lora(tmp_path / "a.pt", CONFIG)
        assert again.keys() == {key for key in lora if key.startswith(name)}
        assert all(np.array_equal(again[key].up, lora[key].up) for key in again)
