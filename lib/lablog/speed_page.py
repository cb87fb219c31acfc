"""The book's page of speed: what ``make bench`` measured, beside the targets, and a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lablog import figures
from lablog.markdown import plain
from lablog.record import Record
from lablog.report import format_metric

TARGETS = {
    "native.decode.committed_over_stock.offline": "at least 0.97",
    "native.decode.committed_over_stock.offline.per_sequence": "at least 0.97",
    "native.decode.committed_over_stock.50m": "at least 0.97",
    "native.decode.committed_over_stock.50m.per_sequence": "at least 0.97",
    "qlora.step.commitment_over_lora": "at most 1.10",
    "cvfp.parallel_step.fraction_of_gemm": "at least 0.70",
    "cvfp.train.parallel_over_sequential": "at least 23",
    "cvfp.rollout.fraction_of_gemv": "at least 0.85",
    "cvfp.rollout.best_over_sequential.true_pass": "at least 1",
    "arianna.train.f32_compiled.mfu": "at least 0.60",
    "arianna.packing.mb_per_s": "at least 5",
    "scale.efficiency.two_workers": "at least 0.9",
    "scale.trainings.tasks_over_pool": "at least 1.0",
    "scale.efficiency.simulated": "at least 0.95",
    "live.over_native_without_avx": "at least 0.3",
}
TITLES = {"native": "llama.cpp with a commitment", "qlora": "Training the commitment",
          "cvfp": "CVFP", "arianna": "Arianna", "scale": "Many workers",
          "live": "In a browser's engine"}
MEANINGS = {
    "native.build_seconds": "building the patched library",
    "native.decode.committed_over_stock": "writing with a commitment: speed over stock llama.cpp's",
    "native.decode.tokens_per_s": "writing with a commitment",
    "native.decode.tokens_per_s.pretrained": "writing",
    "native.prefill.tokens_per_s.pretrained": "reading",
    "native.probes.together_over_one_by_one": "forks asked together: speed over one by one",
    "native.probes_per_s": "forks asked together",
    "qlora.step.commitment_over_lora": "a step with commitment: time over that of LoRA alone",
    "qlora.step.nf4_over_f32": "a step in 4 bits: time over that in f32",
    "qlora.step.compiled_over_eager": "a step with compiled layers: time over one without",
    "qlora.memory.nf4_over_f32": "the base's weights in 4 bits: memory over that in f32",
    "qlora.forks_per_s": "forked choices evaluated in PyTorch",
    "cvfp.parallel_step.fraction_of_gemm": "a parallel step: speed over its matrix products'",
    "cvfp.parallel_step.fraction_of_gemm.bf16.relative_deviation":
        "a parallel step in bf16: how far its contexts are from those in f32",
    "cvfp.ten_iterations.parallel": "ten iterations over 6,400 tokens, parallel",
    "cvfp.ten_iterations.sequential": "ten iterations over 6,400 tokens, sequential, from a slice",
    "cvfp.train.true_pass_over_parallel": "a true pass with a step, read by the loop: time "
                                          "over a parallel one's",
    "cvfp.train.true_pass_over_parallel.contracting": "a true pass with a step, read by shooting, "
                                                      "in the tenth iteration: time over a "
                                                      "parallel one's",
    "cvfp.train.sequential": "sequential training",
    "cvfp.train.parallel_over_sequential": "parallel training: speed over sequential training's",
    "cvfp.train.parallel_over_sequential.sequential_fraction_of_memory_bound":
        "sequential training: speed over that at which memory gives its bytes",
    "cvfp.rollout.fraction_of_gemv": "the loop: speed over that of its matrix-vector products",
    "cvfp.rollout.bf16_over_f32": "the loop in bf16: speed over that in f32",
    "cvfp.rollout.bf16_over_f32.relative_deviation": "how far its contexts are from those in f32",
    "cvfp.rollout.best_over_sequential": "the fastest parallel reading of 1,600 tokens: speed over "
                                         "the loop's",
    "cvfp.rollout.shooting_over_sequential.true_pass": "reading so many tokens by shooting after "
                                                       "true passes: speed over the loop's",
    "cvfp.growth.seconds_per_token": "a parallel step over so many tokens: time for each",
    "arianna.train": "training",
    "arianna.packing": "tokenising and packing text",
    "arianna.generate.pytorch": "writing by transformers, with its cache",
    "arianna.generate.llama_cpp_f32": "writing by llama.cpp, f32",
    "arianna.generate.llama_cpp_q8_0": "writing by llama.cpp, Q8_0",
    "scale.startup_s": "starting a cluster of processes",
    "scale.tasks_per_s": "empty tasks handed out",
    "scale.overhead_per_task_ms": "an empty task",
    "scale.efficiency.two_workers": "a sweep by two workers: speed over twice one worker's",
    "scale.trainings.tasks_over_pool": "three trainings as tasks: speed over a pool of processes'",
    "scale.efficiency.simulated": "64 simulated workers: share of the time that they work",
    "scale.simulated.memory": "memory that they take",
    "live.tokens_per_s": "writing, 51 M parameters in Q8_0",
    "live.tokens_per_s.offline": "writing, 0.6 M parameters in f16",
    "live.over_native_without_avx": "51 M parameters: speed over the native one's, without AVX",
    "live.over_native_without_avx.offline": "0.6 M parameters: speed over the native one's",
}
"""What a measure says, by the beginning of its name; the rest of the name is a case of it."""
CASES = {
    "tokens_per_s": "", "seconds": "", "mb_per_s": "",
    "mfu": "share of the fastest product's rate",
    "q4_1": "weights in Q4_1", "q8_0": "weights in Q8_0", "f16": "weights in f16",
    "offline": "0.6 M parameters", "50m": "51 M parameters", "pretrained": "SmolLM2-135M",
    "per_sequence": "a commitment for each of several sequences", "all_threads": "all threads",
    "true_pass": "after true passes", "trained": "after parallel passes",
}
"""What the rest of a name says; what is not here is said as it is."""


def meaning(name: str) -> str:
    """What a measure says, in words."""
    known = max((start for start in MEANINGS if f"{name}.".startswith(f"{start}.")), key=len,
                default="")
    rest = [part for part in name[len(known):].split(".") if part]
    if not known:
        return name
    cases = [CASES.get(part, f"{int(part):,} tokens" if part.isdigit() else part.replace("_", " "))
             for part in rest]
    return ", ".join([MEANINGS[known], *filter(None, cases)])


def rates(record: Record) -> tuple[Figure, pd.DataFrame]:
    """Tokens a second for each way in which Arianna is trained and speaks."""
    rows = []
    for metric in record.metrics:
        parts = metric.name.split(".")
        if parts[0] == "arianna" and parts[-1] == "tokens_per_s":
            rows.append({"work": parts[1], "mode": parts[2].replace("_", " "),
                         "tokens_per_s": metric.value})
    data = pd.DataFrame(rows, columns=["work", "mode", "tokens_per_s"])
    drawn, panels = plt.subplots(1, 2, figsize=(8.4, 2.6))
    for axes, work, title, colour in zip(panels, ("train", "generate"), ("training", "generation"),
                                         figures.COLOURS, strict=False):
        part = data[data["work"] == work]
        bars = axes.barh(part["mode"], part["tokens_per_s"], color=colour)
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, color=figures.GREY)
        axes.set(title=title, xlabel="tokens / s")
        axes.margins(x=0.2)
        axes.invert_yaxis()
    return drawn, data


def page(record: Record | None, folder: Path) -> str:
    """Markdown of the page; its picture and the numbers behind it are written into `folder`."""
    parts = [
        "# Speed\n",
        "Measured by `make bench`, as ratios within one process wherever there is something to "
        "compare with: a median over pairs that run in turns. A clone that has run it shows its "
        "own numbers here, others the published ones.\n",
    ]
    if record is None:
        return "\n".join([*parts, "Nothing has been measured yet.\n"])
    machine = record.machine
    parts.append(
        f"Commit `{record.source.commit[:10]}`"
        f"{' with uncommitted changes' if record.source.dirty else ''}, on {machine.processor} "
        f"with {machine.threads} threads ({machine.device}), PyTorch "
        f"{machine.packages.get('torch', 'none')}.\n"
    )
    for room, title in TITLES.items():
        here = [metric for metric in record.metrics if metric.name.startswith(f"{room}.")]
        if not here:
            continue
        parts.append(f"## {title}\n\n| measure | value | target |\n|---|---|---|")
        parts += [f"| {plain(meaning(m.name))}<br>`{m.name}` | {plain(format_metric(m))} | "
                  f"{TARGETS.get(m.name, '')} |" for m in here]
        if room == "arianna":
            figures.use_style()
            svg, csv = figures.save(*rates(record), folder, "tokens_per_s")
            caption = "Tokens a second for each way in which Arianna is trained and speaks."
            parts.append(f"\n![{caption}]({svg.name})\n\n{caption} "
                         f"{{download}}`data (CSV) <{csv.name}>`")
        parts.append("")
    return "\n".join(parts)
