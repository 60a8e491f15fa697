"""What fitting affine maps takes, against the reference's two recipes: all states stored and a pseudo-inverse
by numpy's SVD for each pair of layers, uncentred; and one linear layer a pair trained by Adam. Ours as `map`
does it by default (a table of all pairs from a sample, an exact map for each target layer), and with --exact.

States are synthetic: mixtures of shared latent variables whose spectrum falls as a power of the rank, with
means, a few large dimensions and noise, as states of language models have. Making them is not timed. All arms
run with the same threads, one (by CPU time) and two (by the clock). Quality is computed from predictions for
held-out rows, for all arms alike.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Ratio, options, report
from torch import Tensor

from steersman.concepts.anchors import AnchorPair
from steersman.concepts.joint_moments import JointMoments, Sides
from steersman.concepts.layer_choice import SAMPLE_ROWS, Sample, UnitRows, chosen_pairs
from steersman.concepts.regression import Fitting, held_out_moments, spreads
from steersman.concepts.solving import solve

THREADS = int(os.environ.get("OMP_NUM_THREADS", 0)) or 2
CLOCK = time.process_time if THREADS == 1 else time.perf_counter
LAYERS, SOURCE, TARGET = 8, 512, 1024
ROWS, MANY_ROWS, BLOCK, OF_TEXT = 20_000, 100_000, 1000, 25
LATENT = 384
EPOCHS, BATCH, RATE = 20, 32, 1e-4
TEXTS = (500, 5000)

Array = np.ndarray[Any, Any]


class States:
    """Blocks of rows: source states [rows, layers, 512], target states [rows, layers, 1024], float32."""

    def __init__(self, source_layers: int = LAYERS, target_layers: int = LAYERS) -> None:
        generator = torch.Generator().manual_seed(0)
        self._mix = [
            [self._layer(width, generator) for _ in range(layers)]
            for width, layers in ((SOURCE, source_layers), (TARGET, target_layers))
        ]

    @staticmethod
    def _layer(width: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        falling = torch.arange(1, LATENT + 1) ** -0.6
        mix = torch.randn(LATENT, width, generator=generator) * falling[:, None]
        size = torch.exp(0.5 * torch.randn(width, generator=generator))
        size[torch.randint(width, (3,), generator=generator)] *= 30  # the large dimensions of real models
        return mix * size, torch.randn(width, generator=generator) * size, 0.3 * size

    def block(self, number: int) -> tuple[Tensor, Tensor]:
        """Block `number`, the same every time."""
        generator = torch.Generator().manual_seed(1000 + number)
        latent = torch.randn(BLOCK, LATENT, generator=generator)
        sides = [
            torch.stack(
                [
                    latent @ mix + mean + noise * torch.randn(BLOCK, len(mean), generator=generator)
                    for mix, mean, noise in side
                ],
                dim=1,
            )
            for side in self._mix
        ]
        return sides[0], sides[1]


def texts_of(number: int) -> tuple[Tensor, Tensor]:
    """Whose text each row of a block is of, and which are held out: every fifth text."""
    texts = number * BLOCK // OF_TEXT + torch.arange(BLOCK) // OF_TEXT
    return texts, texts % 5 == 0


def stored(states: States, rows: int) -> tuple[Array, Array, Array]:
    """All states in memory as the reference keeps them, [rows, layers, width] of either; held-out rows."""
    first = states.block(0)
    kept = [np.empty((rows, *side.shape[1:]), np.float32) for side in first]
    for number in range(rows // BLOCK):
        for whole, side in zip(kept, states.block(number), strict=True):
            whole[number * BLOCK : (number + 1) * BLOCK] = side.numpy()
    held_out = torch.cat([texts_of(number)[1] for number in range(rows // BLOCK)])
    return kept[0], kept[1], held_out.numpy()


# ------------------------------------------------------------------------------------------------ the arms


def streamed(states: States, rows: int) -> tuple[float, JointMoments]:
    """Ours: moments of all pairs of layers; seconds without the making of states."""
    seconds, moments = 0.0, None
    for number in range(rows // BLOCK):
        x, y = states.block(number)
        texts, held_out = texts_of(number)
        start = CLOCK()
        if moments is None:
            sides = Sides(tuple(range(x.shape[1])), SOURCE, tuple(range(y.shape[1])), TARGET)
            moments = JointMoments(sides)
        moments.add(x, y, texts, held_out, unit=number)
        seconds += CLOCK() - start
    assert moments is not None
    start = CLOCK()
    moments.flush()
    return seconds + CLOCK() - start, moments


Maps = dict[tuple[int, int], tuple[Array, Array]]


def by_default(states: States, rows: int) -> tuple[float, Maps]:
    """Ours by default: a table of all pairs from a sample, then the chosen pairs; seconds, their W and b."""
    blocks = rows // BLOCK
    sampled = range(0, blocks, max(1, blocks * BLOCK // SAMPLE_ROWS))
    seconds, sample, moments = 0.0, None, None
    for number in sampled:
        x, y = states.block(number)
        rows_of = UnitRows(x, y, *texts_of(number), torch.ones(BLOCK, dtype=torch.bool))
        start = CLOCK()
        if sample is None:
            sample = Sample(Sides(tuple(range(x.shape[1])), SOURCE, tuple(range(y.shape[1])), TARGET))
        sample.add(number, [rows_of])
        seconds += CLOCK() - start
    assert sample is not None
    start = CLOCK()
    sides = sample.sides.of(chosen_pairs(sample.table(0)))
    moments = JointMoments(sides)
    seconds += CLOCK() - start
    for number in range(blocks):
        x, y = (None, None) if number in sampled else states.block(number)
        texts, held_out = texts_of(number)
        start = CLOCK()
        if number in sampled:
            kept = sample.unit(number, sides)
            x, y = kept.x, kept.y
        else:
            x, y = x[:, list(sides.source_layers)], y[:, list(sides.target_layers)]
        moments.add(x, y, texts, held_out, unit=number)
        seconds += CLOCK() - start
    start = CLOCK()
    maps, _ = solve(moments)
    found = {pair: (of.weight.float().numpy(), of.bias.float().numpy()) for pair, of in maps.items()}
    return seconds + CLOCK() - start, found


def solved(moments: JointMoments, kept: bool = True) -> tuple[float, Maps]:
    """Ours: every pair fitted and judged, controls included, and its W and b."""
    start, found = CLOCK(), {}
    inverse = spreads(moments)
    for source in range(len(moments.sides.source_layers)):
        fitting = Fitting(moments, source, inverse)
        for target in range(len(moments.sides.target_layers)):
            weight, bias = fitting.affine(target, fitting.pair(target).ridge)
            if kept:
                found[source, target] = weight.float().numpy(), bias.float().numpy()
    return CLOCK() - start, found


def pseudo_inverse(x: Array, y: Array) -> Array:
    """The reference's: W of one pair, [d_target, d_source]."""
    left, singular, right = np.linalg.svd(x, full_matrices=False)
    solution: Array = y.T @ left @ np.diag(1 / singular) @ right
    return solution


def by_adam(x: Array, y: Array) -> tuple[Array, Array]:
    """The reference's other recipe: one linear layer, mean squared error, Adam."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(SOURCE, TARGET)
    optimiser = torch.optim.Adam(layer.parameters(), lr=RATE)
    source, target = torch.from_numpy(x), torch.from_numpy(y)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(source)).split(BATCH):
            optimiser.zero_grad()
            torch.nn.functional.mse_loss(layer(source[rows]), target[rows]).backward()
            optimiser.step()
    return layer.weight.detach().numpy(), layer.bias.detach().numpy()


def quality(predicted: Array, y: Array, fitted: Array) -> float:
    """R² of held-out rows over standardised dimensions about the fitted rows' mean."""
    mean, spread = fitted.mean(0, dtype=np.float64), fitted.std(0, dtype=np.float64)
    residual = (((y - predicted) / spread) ** 2).sum(dtype=np.float64)
    return float(1 - residual / (((y - mean) / spread) ** 2).sum(dtype=np.float64))


# ------------------------------------------------------------------------------------------------ measures


def all_pairs(rounds: int) -> tuple[list[Ratio], str]:
    """Time and quality of all pairs of layers, and of what is done by default."""
    states = States()
    xs, ys, held_out = stored(states, ROWS)
    exact: list[float] = []
    usual: list[float] = []
    for _ in range(rounds):
        seconds, chosen = by_default(states, ROWS)
        usual.append(seconds)
        of_moments, moments = streamed(states, ROWS)
        of_solving, found = solved(moments)
        exact.append(of_moments + of_solving)
    theirs, worst, lost, lowest = 0.0, float("inf"), 0.0, float("inf")
    for target in range(ys.shape[1]):
        own: dict[int, float] = {}
        for source in range(xs.shape[1]):
            x, y = xs[:, source], ys[:, target]
            fit_x, fit_y = x[~held_out], y[~held_out]
            start = CLOCK()
            reference = pseudo_inverse(fit_x, fit_y)
            theirs += CLOCK() - start
            weight, bias = found[source, target]
            own[source] = quality(x[held_out] @ weight.T + bias, y[held_out], fit_y)
            worst = min(worst, own[source] - quality(x[held_out] @ reference.T, y[held_out], fit_y))
        (source,) = (one for one, other in chosen if other == target)
        weight, bias = chosen[source, target]
        y = ys[:, target]
        by_sample = quality(xs[:, source][held_out] @ weight.T + bias, y[held_out], y[~held_out])
        lost = min(lost, by_sample - max(own.values()))
        lowest = min(lowest, *own.values())
    note = (
        f"{LAYERS}×{LAYERS} pairs, {ROWS} rows: by default {statistics.median(usual):.1f} s, exact "
        f"{statistics.median(exact):.1f} s, the reference {theirs:.0f} s; held-out R² from {lowest:.3f}, at "
        f"worst {worst:+.2e} against the reference's (must reach -1e-4); what the sample's choice of layers "
        f"loses against the best: {lost:+.2e} at worst"
    )
    by_time = (("default", usual, 10), ("all pairs exact", exact, 5))
    return [
        *(
            Ratio(
                f"{what}: the reference's time / ours",
                theirs / statistics.median(ours),
                theirs / max(ours),
                theirs / min(ours),
                bound=bound,
            )
            for what, ours, bound in by_time
        ),
        Ratio("all pairs: held-out R² less the reference's, worst", worst, worst, worst, bound=-1e-4),
        Ratio("default: R² less that of the best source layers", lost, lost, lost, bound=-0.01),
    ], note


def one_pair() -> tuple[list[Ratio], str]:
    """Time and quality of one pair, against Adam."""
    states = States(1, 1)
    xs, ys, held_out = stored(states, ROWS)
    times = []
    for _ in range(3):
        of_moments, moments = streamed(states, ROWS)
        of_solving, found = solved(moments)
        times.append(of_moments + of_solving)
    fit_x, fit_y = xs[:, 0][~held_out], ys[:, 0][~held_out]
    start = CLOCK()
    trained, bias = by_adam(fit_x, fit_y)
    seconds = CLOCK() - start
    adam = quality(xs[:, 0][held_out] @ trained.T + bias, ys[:, 0][held_out], fit_y)
    weight, own_bias = found[0, 0]
    own = quality(xs[:, 0][held_out] @ weight.T + own_bias, ys[:, 0][held_out], fit_y)
    ratio = seconds / statistics.median(times)
    note = (
        f"one pair: {statistics.median(times):.2f} s against {seconds:.1f} s; R² {own:.4f} against {adam:.4f}"
    )
    return [
        Ratio("one pair: Adam's time / ours", ratio, seconds / max(times), seconds / min(times), bound=50),
        Ratio("one pair: held-out R² less Adam's", own - adam, own - adam, own - adam, bound=0),
    ], note


def by_anchors() -> tuple[list[Ratio], str]:
    """The anchor-space variant beside the affine map, one pair of layers, on the same held-out rows: a
    thousand anchors against all rows; how well each explains states, and twenty of the latent variables.
    """
    states, directions = States(1, 1), range(0, LATENT, LATENT // 20)
    xs, ys, held_out = stored(states, ROWS)
    x, y = torch.from_numpy(xs[:, 0]), torch.from_numpy(ys[:, 0])
    few = torch.arange(BLOCK)
    _, moments = streamed(states, ROWS)
    _, found = solved(moments)
    held = held_out_moments(moments, 0, 0)
    pair = AnchorPair(x[few], y[few], torch.from_numpy(held_out)[few], 0)
    results = {}
    for name, (weight, bias) in {
        "affine": found[0, 0],
        "anchors": [p.numpy() for p in pair.affine()],
    }.items():
        r2 = quality(xs[:, 0][held_out] @ weight.T + bias, ys[:, 0][held_out], ys[:, 0][~held_out])
        mix, _, _ = states._mix[0][0]
        shares = [held.share(torch.from_numpy(weight), mix[direction]) for direction in directions]
        results[name] = r2, statistics.median(shares)
    lines = [
        Ratio(f"anchors: {what}, anchors' / affine's", *[results["anchors"][at] / results["affine"][at]] * 3)
        for at, what in enumerate(("held-out R²", "share explained (median of 20 concepts)"))
    ]
    note = "; ".join(f"{name}: R² {r2:.3f}, share {share:.3f}" for name, (r2, share) in results.items())
    return lines, f"{BLOCK} anchors against {ROWS} rows: {note}"


def grown(arm: str, *arguments: object) -> float:
    """How much a fresh process grew over its size after import, in MiB, at its peak."""
    command = [sys.executable, __file__, arm, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.split()[-1])


def memory(rounds: int) -> tuple[list[Ratio], str]:
    """Growth of memory, all pairs, many rows; the reference's after its first pair, which needs the most."""
    ours = [grown("grow-ours", MANY_ROWS) for _ in range(rounds)]
    theirs = grown("grow-reference", MANY_ROWS)
    middle = statistics.median(ours) / theirs
    return [
        Ratio(
            "memory, 100 000 rows: ours / the reference's",
            middle,
            min(ours) / theirs,
            max(ours) / theirs,
            0.2,
        )
    ], f"{MANY_ROWS} rows: {statistics.median(ours):.0f} MiB against {theirs:.0f} MiB"


def more_texts(rounds: int) -> tuple[list[Ratio], str]:
    """Peak memory of fit_affine_map with ten times the texts."""
    peaks: dict[int, list[float]] = {number: [] for number in TEXTS}
    with tempfile.TemporaryDirectory() as name:
        for number in TEXTS:
            write_texts(Path(name) / f"{number}.jsonl", number)
        for _ in range(rounds):
            for number, found in peaks.items():
                found.append(grown("peak-fit", Path(name) / f"{number}.jsonl"))
    few, many = (sorted(peaks[number]) for number in TEXTS)
    middle = statistics.median(many) / statistics.median(few)
    return [
        Ratio("peak memory, 5000 texts / 500 texts", middle, many[0] / few[-1], many[-1] / few[0], bound=1.05)
    ], f"peaks {statistics.median(few):.0f} and {statistics.median(many):.0f} MiB"


def resident() -> float:
    """Peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def grow_ours(rows: int) -> float:
    before = resident()
    _, moments = streamed(States(), rows)
    solved(moments, kept=False)
    return resident() - before


def grow_reference(rows: int) -> float:
    before = resident()
    xs, ys, held_out = stored(States(), rows)
    pseudo_inverse(xs[:, 0][~held_out], ys[:, 0][~held_out])
    return resident() - before


# ------------------------------------------------------------------------------------------- texts and models


def words() -> list[str]:
    """A small vocabulary."""
    return [f"{a}{b}" for a in "bcdfghklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er", "ing")]


def write_texts(path: Path, number: int) -> None:
    """Texts whose lengths are alike in every file."""
    drawn = np.random.default_rng(0)
    with path.open("w") as stream:
        for _ in range(number):
            chosen = drawn.choice(words(), 40)
            stream.write(json.dumps({"text": " ".join(chosen)}) + "\n")


def peak_of_fit(file: str) -> float:
    """Peak memory of a process that fits tiny models."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import steersman

    backend = Tokenizer(WordLevel({word: at for at, word in enumerate(["?", *words()])}, unk_token="?"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    models = []
    for width in (32, 48):
        torch.manual_seed(width)
        config = LlamaConfig(
            vocab_size=200,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=2,
        )
        models.append((LlamaForCausalLM(config).eval(), tokenizer))
    steersman.fit_affine_map(models[0], models[1], file)
    return resident()


def timed(rounds: int) -> str:
    """All times with this process's threads, as JSON."""
    ratios: list[Ratio] = []
    notes: list[str] = []
    for more, note in (all_pairs(rounds), one_pair()):
        ratios += more
        notes.append(note)
    return json.dumps([[vars(line) for line in ratios], ". ".join(notes)])


def with_threads(threads: int, rounds: int) -> tuple[list[Ratio], str]:
    """All times with so many threads, in a process of their own: numpy's are fixed when it is loaded."""
    command = [sys.executable, __file__, "timed", str(rounds)]
    given = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=given)
    if done.returncode:
        raise SystemExit(done.stderr)
    lines, note = json.loads(done.stdout.splitlines()[-1])
    named = f"{threads} thread{'s' if threads > 1 else ''}"
    return [Ratio(**{**line, "name": f"{line['name']}, {named}"}) for line in lines], f"{named}: {note}"


MEASURED: dict[str, Callable[[str], object]] = {
    "grow-ours": lambda rows: grow_ours(int(rows)),
    "grow-reference": lambda rows: grow_reference(int(rows)),
    "peak-fit": peak_of_fit,
    "timed": lambda rounds: timed(int(rounds)),
}


def main() -> None:
    """Print the ratios."""
    given = options(__doc__ or "")
    rounds = given.rounds or 3
    ratios: list[Ratio] = []
    notes: list[str] = []
    for measure in (
        lambda: with_threads(1, rounds),
        lambda: with_threads(2, rounds),
        by_anchors,
        lambda: memory(rounds),
        lambda: more_texts(rounds),
    ):
        more, note = measure()
        ratios += more
        notes.append(note)
        print(*more, note, sep="\n  ", flush=True)
    title = f"Affine maps, {SOURCE} → {TARGET} dimensions; a ratio's interval: all rounds"
    report(title, ratios, notes=". ".join(notes), name="affine_map", save=given.save)


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    if sys.argv[1:2] and sys.argv[1] in MEASURED:
        print(MEASURED[sys.argv[1]](sys.argv[2]))
    else:
        main()
