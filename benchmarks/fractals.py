"""Time fractal images: milliseconds an image on one thread.

    python -m benchmarks.fractals --out benchmarks/results/fractals.json

Takes under a minute. Numpy renders on one thread whatever the machine has. The thread's CPU time
stands beside the wall time: where the machine is busy with other work, the two part.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from benchmarks import measure
from trex_models.data.fractals import FractalSource

_IMAGES = {32: 400, 64: 400, 224: 80}


def milliseconds(size: int, num_images: int) -> tuple[list[float], list[float]]:
    """Return wall and CPU times of images spread over 40 classes already drawn."""
    source = FractalSource(num_classes=40, images_per_class=150, size=size)
    for label in range(40):  # draws the classes' systems, once a process
        source.read(label * 150)
    wall, cpu = [], []
    for i in range(num_images):
        wall_start, cpu_start = time.perf_counter(), time.thread_time()
        source.read(i * len(source) // num_images)
        cpu.append((time.thread_time() - cpu_start) * 1000)
        wall.append((time.perf_counter() - wall_start) * 1000)
    return wall, cpu


def main() -> None:
    """Time, print and record."""
    out: Path = measure.parser("fractals", __doc__).parse_args().out
    rows = []
    for size, num_images in _IMAGES.items():
        wall, cpu = milliseconds(size, num_images)
        row = {
            "size": size,
            "images": num_images,
            "median_ms": round(statistics.median(wall), 2),
            "median_cpu_ms": round(statistics.median(cpu), 2),
        }
        rows.append(row)
        print(f"{size:4d} px: {row['median_ms']} ms an image, CPU {row['median_cpu_ms']} ms")
    start = time.thread_time()
    for label in range(1000, 1200):
        FractalSource(num_classes=1, size=1, first_class=label).read(0)
    class_ms = round((time.thread_time() - start) / 200 * 1000, 2)
    print(f"a class's system: CPU {class_ms} ms, once a process")
    facts = measure.machine()
    print(f"{facts['processor']}, Python {facts['python']}, numpy {facts['numpy']}")
    measure.record(out, {"machine": facts, "render": rows, "class_cpu_ms": class_ms})


if __name__ == "__main__":
    main()
