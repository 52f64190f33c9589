"""Compare import time, and time and memory of loading weights, with timm's ResNet-50.

    OMP_WAIT_POLICY=passive python -m benchmarks.loading

Each measurement runs in a new process. `import`: time of ``import trex_models`` after ``import
timm``, with compiled bytecode. `create`: time of the first ``timm.create_model`` and growth of the
peak resident memory (the weights are 94 MB, once in the model and once in the mapped file):

    timm        resnet50 from a safetensors file
    file        trex_resnet50 from the same file (also checks keys, shapes and finite values)
    cache       trex_resnet50, pretrained=True, from the cache (also checks the SHA-256)
    untrained   resnet50 without weights: only the initialization, which all others include

Takes four minutes on two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from benchmarks import measure

_IMPORT = """
import json, sys, time
start = time.perf_counter()
import timm
between, known = time.perf_counter(), set(sys.modules)
import trex_models
end, added = time.perf_counter(), sorted(set(sys.modules) - known)
print(json.dumps({"timm": between - start, "ours": end - between, "added": added}))
"""

_CREATE = """
import json, time
from pathlib import Path
import timm, torch, trex_models

def megabytes(name):
    line = Path("/proc/self/status").read_text().partition(name + ":")[2]
    return int(line.split()[0]) * 1024 / 1e6

torch.set_num_threads({threads})
before = megabytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
start, cpu = time.perf_counter(), time.process_time()
model = timm.create_model({model})
cpu, seconds = time.process_time() - cpu, time.perf_counter() - start
grown = megabytes("VmHWM") - before
print(json.dumps({{"cpu": cpu, "seconds": seconds, "megabytes": grown}}))
"""

_MODELS = {
    "timm": '"resnet50", True, num_classes=0, pretrained_cfg_overlay=dict(file={file!r}, '
    "num_classes=0)",
    "file": '"trex_resnet50", True, pretrained_cfg_overlay=dict(file={file!r})',
    "cache": '"trex_resnet50", True',
    "untrained": '"resnet50", num_classes=0',
}


def fresh(code: str, environment: Mapping[str, str]) -> Any:
    """Run code in a new process and return the JSON value that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def imports(environment: Mapping[str, str], rounds: int) -> dict[str, Any]:
    """Time the imports of timm and trex_models in seconds, and list the modules that ours adds."""
    fresh(_IMPORT, environment)  # compiles the missing bytecode
    runs = [fresh(_IMPORT, environment) for _ in range(rounds)]
    return {
        "timm": measure.spread([run["timm"] for run in runs]),
        "ours": measure.spread([run["ours"] for run in runs]),
        "added": runs[0]["added"],
    }


def creation(file: Path, environment: Mapping[str, str], rounds: int) -> dict[str, Any]:
    """Measure time and memory of ``create_model`` for each variant."""
    others: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "megabytes": []} for name in _MODELS
    }

    def variant(name: str) -> Callable[[], float]:
        code = _CREATE.format(
            threads=torch.get_num_threads(), model=_MODELS[name].format(file=str(file))
        )

        def run() -> float:
            found = fresh(code, environment)
            for key, values in others[name].items():
                values.append(found[key])
            return float(found["cpu"])

        return run

    times = measure.alternate({name: variant(name) for name in _MODELS}, rounds)
    found: dict[str, Any] = {
        name: {
            "cpu": measure.spread(times[name]),
            **{key: measure.spread(values[-rounds:]) for key, values in others[name].items()},
        }
        for name in _MODELS
    }
    ratios = {name: measure.ratios(times[name], times["timm"]) for name in ("file", "cache")}
    return {**found, "ratios": ratios}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = measure.parser("loading", __doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parsed = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        environment = {
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "",
            "TREX_MODELS_CACHE": str(cache),
            "TREX_MODELS_NO_NOTICE": "1",
        }
        weights = timm.create_model("resnet50", num_classes=0).state_dict()
        file = Path(folder) / "model.safetensors"
        save_file(weights, file)
        (cache / "naver").mkdir(parents=True)
        torch.save(weights, cache / "naver" / "trex.pth")  # converted in the warm-up round
        imported = imports(environment, parsed.rounds)
        created = creation(file, environment, parsed.rounds)
    print(f"import timm: {measure.format_spread(imported['timm'], ' s')}")
    print(f"trex_models: {measure.format_spread(imported['ours'], ' s')}, {imported['added']}")
    for name in _MODELS:
        for key, unit in (("cpu", " s of CPU"), ("seconds", " s"), ("megabytes", " MB")):
            print(f"{name}: {measure.format_spread(created[name][key], unit)}")
    for name, ratio in created["ratios"].items():
        print(f"{name}, CPU time relative to timm: {measure.format_spread(ratio)}")
    result = {
        "machine": measure.machine(),
        "import_ms": round(1000 * imported["ours"]["median"], 2),
        "ratio": created["ratios"]["file"]["median"],
        "ratio_cache": created["ratios"]["cache"]["median"],
        "import": imported,
        "create": created,
    }
    measure.record(parsed.out, result)


if __name__ == "__main__":
    main()
