"""The benchmark for one GPU: its processes, what it reads out of programs and traces, its bounds; stages on a CPU."""

import functools
import runpy
import time
from pathlib import Path

import pytest

from gpu_stages import attention, correctness, facts, peer, picture, profile, unet
from gpu_stages.program import program_facts
from gpu_stages.report import PREDICTED_MS, gates, markdown
from gpu_stages.run import Run, read, write
from gpu_stages.stages import Stage, run_stages
from tests.scripts import sides

SMALL = {"width": 32, "steps": 4, "rounds": 1, "calls": 1}


def test_a_stage_that_fails_or_is_cut_leaves_the_others(tmp_path):
    write(tmp_path, {"stages": {}})
    named = {"broken": sides.broken, "killed": sides.killed, "endless": sides.endless, "measured": sides.measured}
    started = time.time()
    stages = {name: Stage(measure, 1 if name == "endless" else 10) for name, measure in named.items()}
    run_stages(stages, Run(tmp_path), 60)
    assert time.time() - started < 60
    report = read(tmp_path)["stages"]
    states = {"broken": "failed", "killed": "failed", "endless": "cut", "measured": "done"}
    assert {name: stage["state"] for name, stage in report.items()} == states
    assert {name: len(stage["rows"]) for name, stage in report.items()} == {**dict.fromkeys(states, 1), "killed": 0}
    assert report["broken"]["error"] == "ValueError: no device"
    assert report["killed"]["error"] == "the process ended with status 3"
    # What a stage has started ends with it.
    status = Path(f"/proc/{report['endless']['rows'][0]['pid']}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


PROGRAM = """HloModule jit_step

%wrapped_transpose_computation (param_0.1: bf16[3,3,4,8]) -> bf16[8,3,3,4] {
  %param_0.1 = bf16[3,3,4,8]{3,2,1,0} parameter(0)
  ROOT %transpose.9 = bf16[8,3,3,4]{3,2,1,0} transpose(%param_0.1), dimensions={3,0,1,2}
}

%fused_norm (param_0.2: bf16[2,8]) -> f32[2,8] {
  %param_0.2 = bf16[2,8]{1,0} parameter(0)
  ROOT %convert.1 = f32[2,8]{1,0} convert(%param_0.2)
}

%body (arg: (s32[], bf16[3,3,4,8], bf16[2,8])) -> (s32[], bf16[3,3,4,8], bf16[2,8]) {
  %arg = (s32[], bf16[3,3,4,8]{3,2,1,0}, bf16[2,8]{1,0}) parameter(0)
  %kernel = bf16[3,3,4,8]{3,2,1,0} get-tuple-element(%arg), index=1
  %x = bf16[2,8]{1,0} get-tuple-element(%arg), index=2
  %wrapped_transpose = bf16[8,3,3,4]{3,2,1,0} fusion(%kernel), kind=kInput, calls=%wrapped_transpose_computation
  %conv = (bf16[2,8]{1,0}, u8[0]{0}) custom-call(%x, %wrapped_transpose), custom_call_target="__cudnn$convForward"
  %norm = f32[5000,4096]{1,0} fusion(%conv), kind=kLoop, calls=%fused_norm
  %copy.3 = f32[5000,4096]{0,1} copy(%norm)
  %fmha = (bf16[2,8]{1,0}, u8[0]{0}) custom-call(%copy.3), custom_call_target="__cudnn$fmhaSoftmax"
  %gemm = (bf16[2,8]{1,0}, s8[4]{0}) custom-call(%fmha), custom_call_target="__cublas$lt$matmul"
  ROOT %tuple = (s32[], bf16[3,3,4,8]{3,2,1,0}, bf16[2,8]{1,0}) tuple(%arg, %kernel, %gemm)
}

%cond (arg.1: (s32[], bf16[3,3,4,8], bf16[2,8])) -> pred[] {
  %arg.1 = (s32[], bf16[3,3,4,8]{3,2,1,0}, bf16[2,8]{1,0}) parameter(0)
  %zero = s32[] constant(0)
  %number = s32[] get-tuple-element(%arg.1), index=0
  ROOT %less = pred[] compare(%number, %zero), direction=LT
}

ENTRY %main (a: bf16[3,3,4,8]) -> bf16[2,8] {
  %a = bf16[3,3,4,8]{3,2,1,0} parameter(0)
  %copy.1 = bf16[3,3,4,8]{2,3,1,0} copy(%a)
  %again = bf16[3,3,4,8]{3,2,1,0} copy(%copy.1)
  ROOT %while = (s32[], bf16[3,3,4,8]{3,2,1,0}, bf16[2,8]{1,0}) while(%again), condition=%cond, body=%body
}
"""


def test_what_a_program_holds():
    """Copies count where they are of what is given, and not of what is computed."""
    assert program_facts(PROGRAM) == {
        "convolutions": 1,
        "attentions": 1,
        "products": 1,
        "fusions": 2,
        "kernels": 9,
        "moved_weights_mib": 2 * 2 * 3 * 3 * 4 * 8 / 2**20,
        "large_float32": 2,
    }


def event(pid, tid, name, ts, dur):
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": ts, "dur": dur, "args": {}}


def test_a_profile_counts_kernels_by_kind_and_the_time_between_them():
    trace = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "pid": 2, "name": "process_name", "args": {"name": "/host:CPU"}},
        {"ph": "M", "pid": 1, "tid": 7, "name": "thread_name", "args": {"name": "Stream #13(Compute)"}},
        {"ph": "M", "pid": 1, "tid": 8, "name": "thread_name", "args": {"name": "XLA Modules"}},
        event(1, 8, "jit_step", 0, 10_000),
        event(2, 1, "dispatch", 0, 10_000),
        event(1, 7, "sm90_xmma_fprop_implicit_gemm_bf16", 1000, 4000),
        event(1, 7, "cudnn_generated_fort_native_sdpa_flash_fprop", 4000, 2000),
        event(1, 7, "nvjet_tst_128x256", 8000, 1000),
    ]
    rows = {row["what"]: row for row in profile.summary(profile.kernels(trace), 2)}
    assert {name: row["ms"] for name, row in rows.items() if not name.startswith("kernel ")} == {
        "convolution": 2.0,
        "attention": 1.0,
        "product": 0.5,
        "nothing runs": 1.0,
    }
    assert rows["nothing runs"]["share"] == 0.25
    assert rows["kernel nvjet_tst_128x256"]["ms"] == 0.5


def a_report(**changes):
    """Of a GPU that holds every bound. changes: of the row of the fair test."""
    fair = {"latents": 64, "batch": 8, "ms": 32.0, "gflop": 12804.8, "one_by_one_ms": 32.5, "moved_weights_mib": 0.0}
    rows = {
        "facts": [
            {"what": "platform", "value": "gpu"},
            {"what": "device", "value": "NVIDIA H200"},
            {"what": "products, TFLOP/s, bfloat16", "value": 800.2},
        ],
        "attention": [
            {"shape": "s", "rows": 2, "wants_kernel": True, "kernel": "cudnn", "relative_l2": 1e-3, "bound": 5e-3}
        ],
        "unet": [fair | changes, {"latents": 96, "batch": 32, "left_out": "no time left", "gflop": 1.0}],
        "torch": [{"what": "UNet, compiled", "latents": 64, "rows": 16, "ms": 30.0}],
    }
    stages = {name: {"rows": given, "state": "done", "seconds": 1.0} for name, given in rows.items()}
    return {"commit": "abc", "begun": "today", "width": 320, "dtype": "bfloat16", "stages": stages}


def failed(report):
    return [gate.what for gate in gates(report) if gate.verdict == "FAILED"]


def test_a_report_has_predictions_shares_and_what_was_left_out():
    text = markdown(a_report())
    assert "# NVIDIA H200" in text
    assert f"| 64 | 8 | 32 | {PREDICTED_MS[64, 8]:.0f} | 0.404 | 0.5 |" in text
    assert "no time left" in text
    assert failed(a_report()) == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"gflop": 3201.2}, "MFU"),
        ({"one_by_one_ms": 36.0}, "watched"),
        ({"moved_weights_mib": 1077.0}, "moved"),
        ({"ms": 36.0, "one_by_one_ms": 37.0}, "torch.compile"),
    ],
)
def test_each_bound_of_speed_can_fail(changes, what):
    first, *others = failed(a_report(**changes))
    assert what in first
    assert not others


def test_errors_inexact_values_and_what_was_not_measured_fail():
    report = a_report()
    report["stages"]["unet"]["rows"][:1] = [{"latents": 64, "batch": 8, "error": "OOM"}]
    report["stages"]["attention"]["rows"][0] |= {"relative_l2": 6e-3, "kernel": "none"}
    exact, speed = failed(report)[:2], failed(report)[2:]
    assert exact == ["attention: s, 2", "unet: errors"]
    assert [what.split()[0] for what in speed] == ["attention:", *["unet,"] * 4]


def test_on_a_cpu_only_exactness_is_judged():
    report = a_report(ms=1e6)
    report["stages"]["facts"]["rows"][0]["value"] = "cpu"
    assert failed(report) == []
    report["stages"]["attention"]["rows"][0]["relative_l2"] = 1.0
    assert failed(report) == ["attention: s, 2"]


def rows_of(measure, tmp_path, **options):
    rows = []
    measure(Run(tmp_path, **{**SMALL, **options}), rows.append)
    assert not [row["error"] for row in rows if "error" in row]
    return rows


def test_the_ceilings(tmp_path):
    rows = {row["what"]: row["value"] for row in rows_of(facts.measure, tmp_path)}
    assert rows["platform"] == "cpu"
    assert rows["copy, GB/s"] > 0
    assert rows["products, TFLOP/s, bfloat16"] > 0


def test_attention_is_exact_in_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "shapes", lambda run: [(16, 77, 2, 80)])
    rows = rows_of(attention.measure, tmp_path)
    assert [row["shape"] for row in rows] == [*["16x77, 2 heads of 80"] * 2, "vmap over queries"]
    assert all(0 < row["relative_l2"] < row["bound"] for row in rows if row["rows"] == 2 and "kernel" in row)
    assert rows[-1]["relative_l2"] < rows[-1]["bound"]
    assert {row["kernel"] for row in rows[:-1]} == {"none"}


def test_without_torch_and_at_the_end_of_the_time_the_rest_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "torch is not installed" in rows_of(peer.measure, tmp_path)[0]["left_out"]
    assert {row.get("left_out") for row in rows_of(attention.measure, tmp_path, until=0.0)[:-1]} == {"no time left"}


@pytest.mark.e2e
def test_the_stages_of_networks(tmp_path, monkeypatch):
    """A small UNet on 8x8 latents: its step, its pictures, its profile; a recorded run."""
    monkeypatch.setattr(unet, "GROUPS", (((64, 1),),))
    monkeypatch.setattr(picture, "SIZES", ((64, 1),))
    monkeypatch.setattr(profile, "BATCH", 1)
    of = functools.partial(rows_of, tmp_path=tmp_path)
    (step,) = of(unet.measure)
    assert {"ms", "one_by_one_ms", "trace_s", "compile_s", "temporaries_gib", "kernels"} <= step.keys()
    assert step["arguments_gib"] > 0
    assert step["temporaries_gib"] > 0
    (whole,) = of(picture.measure)
    assert whole["images_per_s"] > 0
    shares = [row["share"] for row in of(profile.measure) if not row["what"].startswith("kernel ")]
    assert len(shares) > 3
    exact = of(correctness.measure)
    assert [row["relative_l2"] < row["bound"] for row in exact if "bound" in row] == [True]
    assert exact[-1]["left_out"]


@pytest.mark.e2e
def test_the_command_writes_both_reports(tmp_path, monkeypatch):
    main = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "benchmarks" / "gpu"))["main"]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    for name in ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_DISABLE_MOST_OPTIMIZATIONS"):
        monkeypatch.setenv(name, "1")  # what the command sets is not to stay
    assert main(["--out", str(tmp_path), "--width", "32", "--seconds", "60", "--stages", "facts"]) == 0
    assert read(tmp_path)["stages"]["facts"]["state"] == "done"
    assert "| copy, GB/s |" in (tmp_path / "gpu.md").read_text("utf-8")
