"""The engine of the live page, under Node, against the native library without AVX."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

from lablog import layout
from lablog.files import repository
from lablog.models import convert, locate
from lablog.progress import progress
from lablog.run import Run
from tools.bench_native import Decoder, random_llama
from tools.live import Bundle, Type
from tools.timing import seconds

TOKENS, ROUNDS = 100, 7
PLAIN = ("NATIVE", "AVX", "AVX2", "AVX_VNNI", "AVX512", "FMA", "F16C", "BMI2")
"""What the native library is built without, to be compared with 128 bits of SIMD."""


def missing() -> str:
    """Why nothing can be measured here, if so."""
    if not (layout.live_engine() / "live.wasm").is_file():
        return "the engine is not built: `make live` with Emscripten"
    return "" if shutil.which("node") else "there is no Node"


def plain_library() -> Path:
    """The native library without AVX, which is built once."""
    folder = layout.built("native-plain")
    sdist = next(layout.built("source").glob("llama_cpp_python-*.tar.gz"))
    subprocess.run([sys.executable, "lib/tools/native.py", str(folder), "cmake", "2", "build.log",
                    f"-DLLAMA_SDIST={sdist}", "-DCMAKE_BUILD_TYPE=Release",
                    *(f"-DGGML_{name}=OFF" for name in PLAIN)], cwd=repository(), check=True)
    return folder / "lib"


def written_per_s(program: Path, gguf: Path) -> float:
    """Tokens a second that the engine writes under Node, one thread; the second time, when Node
    has compiled what it needs."""
    window = 2 * TOKENS
    write = ("write", {"prompt": [1, 300], "seed": 1, "temperature": 1, "topP": 1,
                       "count": TOKENS})
    commands = [("open", {"model": {"file": str(gguf)}, "window": window, "sequences": 1}),
                write, write]
    done = subprocess.run(["node", "native/live/node.js", str(program)], cwd=repository(),
                          input=json.dumps(commands), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)[2]["done"]
    return float(found["tokens"] / found["seconds"])


def record(run: Run) -> None:
    """Record the rate and its ratio, for a small model in f16 and a wider one in Q8_0."""
    if why := missing():
        for name in ("tokens_per_s", "over_native_without_avx"):
            run.metric(f"live.{name}", None, "", undefined=why)
        return
    offline = locate.gguf_file("offline:laptop", layout.artifacts(layout.results("laptop")))
    wide = random_llama(run.artifacts)
    bundle = Bundle(run.artifacts)
    bundle.engine(layout.live_engine())
    library = plain_library()
    kinds: tuple[tuple[str, Path, Type], ...] = (
        ("", wide, "q8_0"), (".offline", offline, "f16"))
    for suffix, source, dtype in kinds:
        gguf = convert.quantize(source, run.artifacts / f"live{suffix}.gguf", dtype)
        decoder = Decoder(library, gguf)
        rates, ratios = [], []
        bar = progress(ROUNDS, f"live{suffix}", "round")
        for _ in range(ROUNDS):
            rates.append(written_per_s(run.artifacts / "engine.js", gguf))
            native = TOKENS / seconds(partial(decoder.run, TOKENS))
            ratios.append(rates[-1] / native)
            bar.update()
        bar.close()
        decoder.close()
        run.metric(f"live.tokens_per_s{suffix}", statistics.median(rates), "tokens/s", n=ROUNDS)
        run.metric(f"live.over_native_without_avx{suffix}", statistics.median(ratios), "ratio",
                   n=ROUNDS)
