"""The EMA weights of an original file's UNet."""

from collections.abc import Mapping

from convert import engine
from convert.layouts import Places
from convert.readers import CheckpointError, TensorInfo


def ema_names(
    rules: list[engine.Rule], tensors: Mapping[str, TensorInfo], places: Places, where: str
) -> dict[str, str]:
    """The name of each UNet tensor -> that of its EMA: the same without dots, after "model_ema."."""
    if not any(name.startswith("model_ema.") for name in tensors):
        raise CheckpointError(f"{where} has no EMA weights (model_ema.*)")
    twins = {}
    for name in dict.fromkeys(rule.foreign for rule in rules if rule.ours.startswith("unet.")):
        twin = "model_ema.diffusion_model" + name.removeprefix(places["unet"].prefix).replace(".", "")
        if twin not in tensors or tensors[twin].shape != tensors[name].shape:
            raise CheckpointError(f"{where}: {name} has no EMA {twin} of its shape")
        twins[name] = twin
    return twins
