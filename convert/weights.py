"""Finds a component's weights in a diffusers folder."""

from pathlib import Path

from convert.readers import CheckpointError


def weights_file(folder: Path, variant: str | None) -> Path:
    """The weights of one component: safetensors before torch files before Flax's, whole before sharded.

    Names are looked up only in `folder`. Symlinks are followed, since the hub's cache consists of them. A component
    without files of the variant falls back to its plain ones, as in diffusers.

    Args:
        folder: The component's folder.
        variant: Such as "fp16"; None for the plain weights.

    Returns:
        The file's path.

    Raises:
        CheckpointError: There are none. The message lists what the folder holds.
    """
    if variant is not None and not variant.replace("-", "").replace("_", "").isalnum():
        raise CheckpointError(f"variant is {variant!r}; want a short name such as 'fp16'")
    stems = (
        ("diffusion_pytorch_model", "safetensors"),
        ("model", "safetensors"),
        ("diffusion_pytorch_model", "bin"),
        ("pytorch_model", "bin"),
        ("diffusion_flax_model", "msgpack"),
        ("flax_model", "msgpack"),
    )
    for dotted in dict.fromkeys((f".{variant}" if variant else "", "")):
        for stem, suffix in stems:
            for name in (
                f"{stem}{dotted}.{suffix}",
                f"{stem}.{suffix}.index{dotted}.json",
                f"{stem}{dotted}.{suffix}.index.json",
            ):
                if (folder / name).is_file():
                    return folder / name
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    raise CheckpointError(
        f"{folder.name}: no weights{f' of variant {variant!r}' if variant else ''}; "
        f"the folder holds {', '.join(found[:8]) if found else 'nothing'}"
    )
