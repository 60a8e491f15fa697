"""What memory detection takes: the peak of a fresh process with 10 000 pairs, over one with 1 000.

Pairs come from a file, as on the command line; each process is measured alone, several times.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from detection import model, pairs, tokenizer
from measuring import options, ratio, report

SIZES = (1000, 10_000)
WIDTH = 32


def write(path: Path, number: int) -> None:
    """A file of so many pairs, the shortest and longest of which are alike in both sizes."""
    with path.open("w", encoding="utf-8") as stream:
        for start in range(0, number, 1000):
            for pair in pairs(1000, seed=start, longest=40):
                stream.write(json.dumps({"positive": pair.positive, "negative": pair.negative}) + "\n")


def detect(folder: str, file: str) -> None:
    """What a measured process does: the command line's own steps."""
    from steersman import detect_experts, load_model, load_pairs

    of, read = load_model(folder)
    detect_experts(of, read, load_pairs(file), checkpoint=f"{file}.partial")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def peak(folder: Path, file: Path) -> float:
    """Peak resident memory of a fresh process, in MiB."""
    command = [sys.executable, __file__, "measure", str(folder), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for path in Path(f"{file}.partial").iterdir():
        path.unlink()
    Path(f"{file}.partial").rmdir()
    return int(done.stdout.split()[-1]) / 1024


def main() -> None:
    """Print the ratio."""
    given = options(__doc__ or "")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        model(WIDTH).save_pretrained(place / "model")
        tokenizer().save_pretrained(place / "model")
        files = {number: place / f"{number}.jsonl" for number in SIZES}
        for number, file in files.items():
            write(file, number)
        peaks: dict[int, list[float]] = {number: [] for number in SIZES}
        for _ in range(given.rounds or 3):
            for number, file in files.items():
                peaks[number].append(peak(place / "model", file))
    few, many = (sorted(peaks[number]) for number in SIZES)
    spread = max(few[-1] / few[0], many[-1] / many[0])
    report(
        f"Memory of detection, OLMoE of width {WIDTH}",
        [
            ratio("peak memory, 10 000 pairs / 1 000 pairs", many, few, bound=1.05),
            ratio("(noise: 1 000 pairs, the most / the least)", few[-1:], few[:1]),
        ],
        notes=f"peaks {few[len(few) // 2]:.0f} and {many[len(many) // 2]:.0f} MiB, of which Python and torch "
        f"take most; the same process again differs by up to {spread - 1:.1%}.",
        name="memory",
        save=given.save,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        detect(*sys.argv[2:])
    else:
        main()
