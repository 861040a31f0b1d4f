"""Which module each tensor of a LoRA file belongs to, and which part of its change it is. Names only, no data."""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from convert.readers import CheckpointError
from convert.rules.lora import Module, Network, find
from convert.tensor_file import quoted

LONGEST_NAME = 500

# The end of a tensor's name -> its role. Longer ends come first.
ROLES = {
    **dict.fromkeys(
        (".lora_A.weight", ".lora_down.weight", ".lora.down.weight", ".lora_linear_layer.down.weight",
         "_lora.down.weight", ".lora_A"),
        "down",
    ),
    **dict.fromkeys(
        (".lora_B.weight", ".lora_up.weight", ".lora.up.weight", ".lora_linear_layer.up.weight",
         "_lora.up.weight", ".lora_B"),
        "up",
    ),
    ".lora_mid.weight": "mid",
    **dict.fromkeys((".lora_B.bias", ".lora_up.bias"), "up_bias"),
    ".lora_embedding_A": "embedding_down",
    ".lora_embedding_B": "embedding_up",
    **dict.fromkeys(("_lora.alpha", ".alpha"), "alpha"),
    ".scalar": "scalar",
    ".dora_scale": "dora_scale",
    **dict.fromkeys((".lora_magnitude_vector.weight", ".lora_magnitude_vector"), "magnitude"),
    **{f".{role}": role for role in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{f".lokr_{role}": f"lokr_{role}" for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f".{role}": role for role in ("ia3_l", "on_input", "diff", "set_weight", "w_norm")},
    **dict.fromkeys((".diff_b", ".b_norm"), "diff_b"),
    ".weight": "weight",
    ".bias": "bias",
}  # fmt: skip
# Any of these shows the kind of a module's change: what it must have, and what it may have besides.
FACTORED = {"alpha", "scalar", "dora_scale", "magnitude"}
KINDS: dict[str, tuple[set[str], set[str]]] = {
    "LoRA": ({"down", "up"}, {"mid", "up_bias"} | FACTORED),
    "LoRA of an embedding": ({"embedding_down", "embedding_up"}, {"alpha"}),
    "LoHa": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2"} | FACTORED),
    "LoKr": (set(), {f"lokr_{role}" for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")} | FACTORED),
    "peft's (IA)^3": ({"ia3_l"}, set()),
    "(IA)^3": ({"weight", "on_input"}, set()),
    "a difference": ({"diff"}, {"alpha"}),
    "a norm": ({"w_norm"}, set()),
    "a replacement": ({"set_weight"}, set()),
    "a whole weight": ({"weight"}, set()),
}
BIAS = {"diff_b", "bias"}  # which every kind may have beside it, or stand alone
# What a tensor's name shows to be of a kind that is not read: a pattern of its end, and what to call it.
OTHER_KINDS = {
    r"oft_(blocks|diag|r|R)(\..*)?|rescale": "OFT (orthogonal finetuning)",
    r"boft_[a-zA-Z]+(\..*)?": "BOFT (butterfly orthogonal finetuning)",
    r"(a1|a2|b1|b2|bm)\.weight|glora_.*": "GLoRA (generalised LoRA)",
    r"(lambda_layer|[qp]_layer\.weight)": "T-LoRA",
    r"vera_.*": "VeRA",
    r"lora_E|ranknum": "AdaLoRA",
    r"hra_u": "HRA",
    r"fourierft_spectrum": "FourierFT",
    r"(randlora|waveft|shira|road|c3a|vblora|hira|delora|miss|bone|lily)_.*": "a kind of peft's",
    r"ln_tuning_layers\..*": "LN tuning",
    r"bias_(indices|values|size)": "LoCon with sparse biases",
    r"reshape_weight": "a change of a weight's shape",
}


@dataclasses.dataclass
class Found:
    """A module of a file. keys: role -> the tensor's name; name: the module's, as in the file."""

    name: str
    keys: dict[str, str] = dataclasses.field(default_factory=dict)

    def kind(self) -> str | None:
        """The kind of change of its weight; None if only its bias changes.

        Raises:
            CheckpointError: A factor is missing, or one does not belong to this kind.
        """
        roles = self.keys.keys() - BIAS
        if not roles and self.keys:
            return None
        for kind, (needed, _) in KINDS.items():
            if needed <= roles and (needed or any(role.startswith("lokr_") for role in roles)):
                if strange := roles - needed - KINDS[kind][1]:
                    raise CheckpointError(f"{quoted(self.keys[min(strange)])}: stands beside {kind}, which has no such")
                return kind
        # The kind that is there in part says what is missing.
        kind = next((kind for kind, (needed, _) in KINDS.items() if needed & roles), "LoRA")
        missing = min(KINDS[kind][0] - roles)
        raise CheckpointError(f"{quoted(self.name)}: {kind}, but its {missing} factor is missing")


def modules_of(tensors: Iterable[str], modules: Mapping[str, Module], network: Network | None) -> dict[str, Found]:
    """A file's tensors by their modules' canonical names, or the file's own names of unknown ones.

    network: the one that all belong to, if known.

    Raises:
        CheckpointError: A tensor's name is not understood.
    """
    found: dict[str, Found] = {}
    strange = []
    for key in tensors:
        if len(key) > LONGEST_NAME:
            raise CheckpointError(f"{quoted(key)}: {len(key)} characters; no tensor of a LoRA file has such a name")
        for pattern, kind in OTHER_KINDS.items():
            if re.fullmatch(rf".*\.({pattern})", key, re.DOTALL):
                raise CheckpointError(f"{quoted(key)}: is {kind}, which is not supported")
        plain = re.sub(r"\.default(?=\.|$)", "", key)  # peft's name of an adapter
        end = next((end for end in ROLES if plain.endswith(end)), None)
        if end is None:
            strange.append(key)
            continue
        name = plain.removesuffix(end)
        module = found.setdefault(find(name, modules, network) or name, Found(name))
        if ROLES[end] in module.keys:
            raise CheckpointError(f"{quoted(key)}: the same module is there twice, under different names")
        module.keys[ROLES[end]] = key
    if strange:
        raise CheckpointError(f"{quoted(strange[0])}: not a name of a LoRA file's tensors ({len(strange)} are not)")
    return found
