"""The files of an evaluation: `results.json`, `results.md`, and two plots."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unclip_jax.checkpoints.atomic import replaced_file

HEADINGS = {
    "guidance_scale": "guidance",
    "noise_level": "noise level",
    "fid": "FID",
    "clip_fid": "CLIP-FID",
    "cmmd": "CMMD",
    "clip_score": "CLIP score",
    "retention": "retention",
    "diversity": "diversity",
}


def write_report(results: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Writes the results of one or more checkpoints.

    Args:
        results: From `unclip_jax.evaluation.protocol.evaluate`.
        folder: Where to write.

    Returns:
        The files' paths.

    Raises:
        ModuleNotFoundError: matplotlib is missing. The message says what to install.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("results.json", "results.md", "pareto.png", "noise-levels.png")]
    texts = [json.dumps(list(results), indent=2) + "\n", tables(results)]
    for path, text in zip(paths[:2], texts, strict=True):
        with replaced_file(path) as partial:
            partial.write_text(text, "utf-8")
    for path, figure in zip(paths[2:], (_pareto(results), _levels(results)), strict=True):
        with replaced_file(path) as partial:
            figure.savefig(partial, format="png", dpi=120, bbox_inches="tight")
    return paths


def tables(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as Markdown, one section per checkpoint."""
    parts = []
    for result in results:
        how = f"{result['count']} images, {result['steps']} {result['scheduler']} steps"
        parts.append(f"## {result['model']}\n\n{how}\n")
        for rows in (result["guidance"], result["by_noise_level"]):
            if rows:
                columns = [name for name in HEADINGS if name in rows[0]]
                lines = [" | ".join(HEADINGS[name] for name in columns), " | ".join("---:" for _ in columns)]
                lines += [" | ".join(_shown(row[name]) for name in columns) for row in rows]
                parts.append("\n".join(f"| {line} |" for line in lines) + "\n")
    return "\n".join(parts)


def _shown(value: float) -> str:
    return f"{value:.4g}"


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("evaluate: plots need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(6, 4.2))


def _pareto(results: Sequence[Mapping[str, Any]]) -> Any:
    """Distance against agreement, one line per checkpoint, with points labelled by guidance."""
    figure = _figure()
    axes = figure.subplots()
    distance = "fid" if all("fid" in row for result in results for row in result["guidance"]) else "clip_fid"
    for result in results:
        rows = result["guidance"]
        x, y = ([row[name] for row in rows] for name in ("clip_score", distance))
        axes.plot(x, y, marker="o", label=result["model"])
        for row, at in zip(rows, zip(x, y, strict=True), strict=True):
            axes.annotate(f"{row['guidance_scale']:g}", at, textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set_xlabel("CLIP score (cosine; more is better)")
    axes.set_ylabel(f"{HEADINGS[distance]} (less is better)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _levels(results: Sequence[Mapping[str, Any]]) -> Any:
    """How much variations keep, and how much they differ, against the noise level."""
    figure = _figure()
    axes = figure.subplots()
    for result in results:
        rows = result["by_noise_level"]
        levels = [row["noise_level"] for row in rows]
        kept = [row["retention"] for row in rows]
        (line,) = axes.plot(levels, kept, marker="o", label=f"{result['model']}: retention")
        axes.plot(
            levels,
            [row["diversity"] for row in rows],
            marker="s",
            linestyle="--",
            color=line.get_color(),
            label=f"{result['model']}: diversity",
        )
    axes.set_xlabel("noise level")
    axes.set_ylabel("cosine (retention), 1 - cosine (diversity)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
