"""Fitting affine maps: layers chosen from a sample, then the texts through both models, pass by pass."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from steersman.chat_record import CHATS, ChatRecord
from steersman.chats.format import NotedChats
from steersman.concepts.affine_map import OF_SOURCES, PAIRED, AffineMap, LayerMap, MapTable
from steersman.concepts.aligned_texts import AlignedText, AlignedTexts
from steersman.concepts.alignment import Rows
from steersman.concepts.concept import ConceptVector
from steersman.concepts.concept_prompts import with_prompts
from steersman.concepts.joint_moments import JointMoments, Sides
from steersman.concepts.layer_choice import SAMPLE_ROWS, Sample, UnitRows, chosen_pairs
from steersman.concepts.norms import NormHistogram
from steersman.concepts.opening import Opened, Side
from steersman.concepts.passes import Pairs, passes_of
from steersman.concepts.rows import Ints, RowStates, rows_of_states, states_of_texts
from steersman.concepts.solving import Judged, by_target, choose_source, solve
from steersman.concepts.state_store import StateStore
from steersman.concepts.states import check_layers
from steersman.edits import as_layers
from steersman.errors import ModelError, PairsError, PlanError, WeightsMismatch, check_kind, whole_number
from steersman.models.same_weights import same_weights
from steersman.progress import Arrays, Progress, discard
from steersman.shards import Shard
from steersman.texts import Texts, load_texts


def fit_affine_map(
    source: Opened | str | Path,
    target: Opened | str | Path,
    texts: str | Path | Iterable[Any],
    *,
    source_layers: Sequence[int] | None = None,
    target_layers: Sequence[int] | None = None,
    rows: Rows = "boundaries",
    concept: ConceptVector | Sequence[ConceptVector] | None = None,
    concept_prompts: bool = True,
    exact: bool = False,
    sequential: bool = False,
    source_states: str | Path | None = None,
    batch_size: int = 16,
    shard: str | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    seed: int = 0,
    truncate: bool = False,
    source_options: Mapping[str, Any] | None = None,
    target_options: Mapping[str, Any] | None = None,
) -> AffineMap:
    """Fit affine maps from a source model's decoder layers to a target model's.

    ConTrans (arXiv 2405.13578), section 3.2, with rows at shared boundaries, a ridge chosen on held-out texts
    and a control. Memory does not grow with the number of texts, but for a few numbers a text; where the
    moments of all layers do not fit, the texts are read several times, which is warned of first.

    Args:
        source: Model and tokenizer, or a name that `load_model` opens. The two may be on different devices.
        target: The same for the model that is mapped to.
        texts: Texts or chats, or what `load_texts` takes. About one in five, by content, is held out.
        source_layers: Default: all; with a concept, of these the one where it separates held-out pairs best.
        target_layers: Default: all.
        rows: `boundaries`: every position at which both tokenizers end a token, and turns of chats; `last`:
            the last token of each text (the paper).
        concept: A concept of the source, which chooses the source layer; or several, of which each does.
        concept_prompts: Fit the map on half of the groups of a concept's own pairs as well (`concept_prompts`
            says which, and why); the other half is left for the gate.
        exact: Fit every pair of layers on all rows, where otherwise a sample of about 4096 rows says which
            source layer explains each target layer, and these pairs alone are fitted.
        sequential: Open one model after the other (give names): the source's states wait on disk.
        source_states: A folder that keeps the source's states, and gives them again for the next target.
        batch_size: Texts in one forward.
        shard: `"I/N"`: read part I of N. `merge_affine_maps` of all N parts is the result of one run.
        checkpoint: A folder to save progress in, at most a fiftieth of the time. It is yours to remove; where
            all was read and no map can be made of it, it is gone.
        resume: Go on from what is saved in `checkpoint`, if anything is; otherwise that is an error.
        progress: Show progress bars on stderr.
        seed: Of the control's pairings.
        truncate: Leave out texts longer than a model's context, instead of an error.
        source_options, target_options: For `load_model`, where a name is given: device, dtype, revision,
            and how chats are rendered (`chat_template` and so on).

    Raises:
        PairsError: texts cannot be read, share no row, or are too few; or an option is unknown.
        ModelError: a model cannot be opened, a layer does not exist, states are constant or not finite, or
            the moments of one target layer do not fit into memory.
        WeightsMismatch: the concept is of other weights than the source.
        ArtifactError: saved progress or states are damaged, not wanted, or of another run.
        PlanError: what is given as the concept is none.

    Example:
        >>> texts = [f"please give me the {thing}" for thing in ("badge", "key", "book")] * 20
        >>> steersman.fit_affine_map("lab:source", "lab:target", texts)
        <AffineMap: lab:source → lab:target, target layers 0–3; 180 rows of 60 texts>
    """
    concepts = _as_concepts(concept)
    batch_size, seed = _checked_options(rows, batch_size, seed)
    part = None if shard is None else Shard.parse(shard)
    given = load_texts(texts)
    read, of_concepts = with_prompts(given, concepts, prompts=concept_prompts)
    models = (
        Side(source, sequential, source_options, "source"),
        Side(target, sequential, target_options, "target"),
    )
    sides, by_concept = _sides(*models, source_layers, target_layers, concepts)
    chosen = list(dict.fromkeys(layer for layer in by_concept if layer is not None))
    readers = models[0].reader(), models[1].reader()
    noted = [NotedChats(side.tokenizer) for side in models]
    aligned = AlignedTexts(read, *readers, rows, truncate=truncate, progress=progress)
    chats = {side: of.record for side, of in zip(("source", "target"), noted, strict=True)}
    with closing(aligned), ExitStack() as stack:
        saved, sample = None, Sample(sides, checkpoint)
        stack.callback(sample.close)
        if checkpoint is not None:
            run = _run_of(models, read, aligned, sides, rows, batch_size, seed, part, truncate)
            run |= {"exact": exact, **_chats(chats)}
            saved = Progress(checkpoint, run, _State.reader(sides, seed, sample), resume=resume)
        if source_states is None and sequential:
            source_states = stack.enter_context(tempfile.TemporaryDirectory(prefix="steersman-states-"))
        store = None
        if source_states is not None:
            store = _store(source_states, models[0], read, aligned, sides, {"source": chats["source"]})

        def ids(number: int) -> Ints:
            return readers[0].ids(read[number].content, read[number].where)

        reading = _Reading(models, sides, aligned, batch_size, part, store, ids, progress)
        state = _State(sides, seed, sample)
        if saved is not None:
            state = saved.saved.get("map", state)
        with reading:
            while True:
                if not state.passes:
                    pairs = sides.pairs
                    if not (exact or chosen) and len(sides.source_layers) > 1:
                        reading.sample(state, saved)
                        with _blaming(read.name, checkpoint):
                            pairs = _choose(state, progress)
                    state.begin(_passes(sides.of(pairs), part))
                reading.run(state, saved)
                if part is not None or not _end_pass(state, chosen, read.name, checkpoint, progress):
                    break
    moments = state.moments
    assert moments is not None
    made_from: list[dict[str, Any]] = [{"kind": "texts", "name": given.name, "sha256": given.sha256}]
    for entry, layer in zip(of_concepts, by_concept, strict=True):
        made_from.append({**entry, "source_layer": layer})
    maps, others = by_target(state.maps, chosen)
    found = AffineMap(
        maps=maps,
        others=others,
        source=replace(models[0].identity, chat=chats["source"]),
        target=replace(models[1].identity, chat=chats["target"]),
        rows=sum(of_part.rows for of_part in moments.parts),
        texts=sum(state.texts),
        held_out_rows=moments.parts[1].rows,
        held_out_texts=state.texts[1],
        skipped=aligned.skipped + aligned.without_rows,
        alignment=rows,
        table=state.table,
        norms=state.norms,
        made_from=tuple(made_from),
        seed=seed,
        moments=None if part is None else moments,
        shard=None if part is None else str(part),
    )
    for which, side in zip(("source", "target"), models, strict=True):
        if side.opened is not None:
            found.remember(which, *side.opened)
    return found


def _as_concepts(given: ConceptVector | Sequence[ConceptVector] | None) -> tuple[ConceptVector, ...]:
    several = isinstance(given, Sequence) and not isinstance(given, str)
    found = tuple(given) if several else () if given is None else (given,)  # type: ignore[arg-type]
    for concept in found:
        check_kind(concept, ConceptVector, PlanError)
    return found  # type: ignore[return-value]


def _checked_options(rows: str, batch_size: int, seed: int) -> tuple[int, int]:
    if rows not in ("boundaries", "last"):
        raise PairsError(f"rows={rows!r} is unknown: use 'boundaries' or 'last'")
    batch_size, seed = (
        whole_number("batch_size", batch_size, 1, PairsError),
        whole_number("seed", seed, 0, PairsError),
    )
    if seed >= 2**63:
        raise PairsError(f"seed is {seed}: give 0 to 2^63 − 1")
    return batch_size, seed


def _sides(
    source: Side,
    target: Side,
    source_layers: Sequence[int] | None,
    target_layers: Sequence[int] | None,
    concepts: Sequence[ConceptVector],
) -> tuple[Sides, list[int | None]]:
    """The layers of either model, and the source layer that each concept chooses, if it does."""
    of_source, of_target = (
        list(side.layers if layers is None else as_layers(layers, ModelError))
        for side, layers in ((source, source_layers), (target, target_layers))
    )
    for which, side, layers in (("source", source, of_source), ("target", target, of_target)):
        try:
            check_layers(layers, len(side.layers))
        except ModelError as error:
            raise ModelError(f"{which} {side.identity.name or 'model'}: {error}") from None
        if not layers or len(set(layers)) < len(layers):
            raise ModelError(f"{which} layers {layers}: name each once, and at least one")
    chosen: list[int | None] = []
    for concept in concepts:
        if not same_weights(concept, source.identity):
            raise WeightsMismatch(
                f"the concept is of {concept.model or 'a model'} with other weights than the map's source, "
                f"{source.identity.name or 'a model'}: refine it in this source"
            )
        chosen.append(choose_source(concept, of_source))
    if concepts and None not in chosen:
        of_source = [layer for layer in of_source if layer in chosen]
    elif concepts:  # nothing says how well some separate: the best R² of the layers that all of them have
        chosen = [None] * len(chosen)
        of_source = [layer for layer in of_source if all(layer in concept.vectors for concept in concepts)]
        if not of_source:
            raise ModelError("the concepts have no layer in common: refine them at the same layers")
    return Sides(tuple(of_source), source.width, tuple(of_target), target.width), chosen


def _run_of(
    models: tuple[Side, Side],
    texts: Texts,
    aligned: AlignedTexts,
    sides: Sides,
    rows: Rows,
    batch_size: int,
    seed: int,
    part: Shard | None,
    truncate: bool,
) -> dict[str, Any]:
    """Everything that the moments depend on, by words that an error can use."""
    return {
        "weights": [side.identity.weights_id for side in models],
        "dtype": [side.dtype for side in models],
        "versions": {name: version(name) for name in ("steersman", "torch", "transformers")},
        "texts": texts.sha256,
        "tokenization": aligned.sha256,
        "source layers": list(sides.source_layers),
        "target layers": list(sides.target_layers),
        "rows": rows,
        "batch size": batch_size,
        "seed": seed,
        "shard": None if part is None else str(part),
        "truncate": truncate,
    }


def _chats(chats: Mapping[str, ChatRecord | None]) -> dict[str, Any]:
    """How chats were rendered, as a part of what is being run; empty where there were none."""
    found = {side: record.to_json() for side, record in chats.items() if record is not None}
    return {CHATS: found} if found else {}


def _store(
    folder: str | Path,
    source: Side,
    texts: Texts,
    aligned: AlignedTexts,
    sides: Sides,
    chats: Mapping[str, ChatRecord | None],
) -> StateStore:
    facts = {"weights": source.identity.weights_id, "dtype": source.dtype, "texts": texts.sha256}
    facts |= _chats(chats)
    lengths = {number: length for number, length in enumerate(aligned.source_lengths) if length}
    return StateStore(folder, facts, sides.source_layers, lengths)


@contextmanager
def _blaming(name: str, checkpoint: str | Path | None) -> Iterator[None]:
    """Say of which texts no map can be made. Whoever went on from what was saved would come here again."""
    try:
        yield
    except (PairsError, ModelError) as error:
        if checkpoint is not None:
            discard(checkpoint)
        raise type(error)(f"{name}: {error}") from None


def _choose(state: _State, progress: bool) -> Pairs:
    """The pairs of layers that are fitted, by what the sample says."""
    layers = len(state.sides.source_layers)
    with tqdm(total=layers, desc="choose", unit="layer", delay=1, leave=False, disable=not progress) as bar:
        state.table, state.chosen_by_sample = state.sample.table(state.seed, bar.update), True
    return chosen_pairs(state.table)


def _passes(sides: Sides, part: Shard | None) -> tuple[Pairs, ...]:
    passes = passes_of(sides)
    if part is not None and len(passes) > 1:
        raise ModelError(
            f"a part keeps its moments, {sides.bytes / 2**30:.1f} GiB, which do not fit into memory: name "
            "fewer layers with --source-layers and --target-layers (in Python source_layers=, target_layers=)"
        )
    return passes


def _end_pass(
    state: _State, chosen: Sequence[int], name: str, checkpoint: str | Path | None, progress: bool
) -> bool:
    """Solve what a pass has summed up; whether another follows."""
    assert state.moments is not None
    sources = len(state.moments.sides.source_layers)
    with (
        _blaming(name, checkpoint),
        tqdm(total=sources, desc="solve", unit="layer", delay=1, leave=False, disable=not progress) as bar,
    ):
        return state.end_pass(*solve(state.moments, chosen, bar.update))


@dataclass
class _State:
    """What has been read so far: whole units, in order, in one pass after the other."""

    sides: Sides
    seed: int
    sample: Sample
    norms: dict[int, NormHistogram] = field(default_factory=dict)
    texts: list[int] = field(default_factory=lambda: [0, 0])
    units: int = 0
    passes: tuple[Pairs, ...] = ()
    number: int = 0
    """Of the pass."""
    moments: JointMoments | None = None
    maps: dict[tuple[int, int], LayerMap] = field(default_factory=dict)
    table: MapTable | None = None
    chosen_by_sample: bool = False

    def begin(self, passes: tuple[Pairs, ...]) -> None:
        """Plan the passes, and begin with the first."""
        self.passes = passes
        self._begin()

    def _begin(self) -> None:
        of_pass = self.sides.of(self.passes[self.number])
        self.texts, self.units, self.moments = [0, 0], 0, JointMoments(of_pass, self.seed)
        self.norms |= {layer: NormHistogram() for layer in of_pass.target_layers}

    def end_pass(self, maps: Mapping[tuple[int, int], LayerMap], judged: Judged) -> bool:
        """Take what a pass gave; whether another follows."""
        self.maps |= maps
        if not self.chosen_by_sample:
            table = judged.table
            self.table = table if self.table is None else self.table.beside(table)
        if self.number + 1 == len(self.passes):
            return False
        self.number += 1
        self._begin()
        return True

    @classmethod
    def reader(cls, sides: Sides, seed: int, sample: Sample) -> Callable[[Arrays, dict[str, Any]], _State]:
        """What makes a state again of what was saved."""

        def read(arrays: Arrays, facts: dict[str, Any]) -> _State:
            tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

            def taken(start: str) -> dict[str, Tensor]:
                names = [name for name in tensors if name.startswith(start)]
                return {name.removeprefix(start): tensors.pop(name) for name in names}

            sample.restore(taken("sample."), facts["sample"])
            norms = {int(layer): NormHistogram.from_tensor(of) for layer, of in taken("norms.").items()}
            maps = {
                (source, target): LayerMap.from_tensors(source, rank, taken(f"maps.{source}-{target}."))
                for source, target, rank in facts["maps"]
            }
            table = None
            if facts["table"] is not None:
                sources, targets = map(tuple, facts["table"]["layers"])
                table = MapTable(sources, targets, rows=facts["table"]["rows"], **taken("table."))
            passes = tuple(tuple((one, other) for one, other in pairs) for pairs in facts["passes"])
            moments = None
            if passes:
                moments = JointMoments.from_tensors(tensors, sides.of(passes[facts["pass"]]), seed)
            return cls(
                sides=sides,
                seed=seed,
                sample=sample,
                norms=norms,
                texts=[int(count) for count in facts["texts"]],
                units=int(facts["units"]),
                passes=passes,
                number=int(facts["pass"]),
                moments=moments,
                maps=maps,
                table=table,
                chosen_by_sample=bool(facts["chosen_by_sample"]),
            )

        return read

    def to_tensors(self) -> tuple[Arrays, dict[str, Any]]:
        tensors = {} if self.moments is None else self.moments.to_tensors()
        rows, of_sample = self.sample.to_tensors()
        tensors |= {f"sample.{name}": tensor for name, tensor in rows.items()}
        tensors |= {f"norms.{layer}": norms.to_tensor() for layer, norms in self.norms.items()}
        for (source, target), of_layer in self.maps.items():
            named = of_layer.to_tensors()
            tensors |= {f"maps.{source}-{target}.{name}": tensor for name, tensor in named.items()}
        if self.table is not None:
            tensors |= {f"table.{name}": getattr(self.table, name) for name in (*PAIRED, *OF_SOURCES)}
        facts = {
            "done": max(sum(self.texts), len(self.sample)),
            "sample": of_sample,
            "texts": self.texts,
            "units": self.units,
            "passes": self.passes,
            "pass": self.number,
            "maps": [[*pair, of_layer.effective_rank] for pair, of_layer in self.maps.items()],
            "table": None
            if self.table is None
            else {
                "layers": [self.table.source_layers, self.table.target_layers],
                "rows": self.table.rows,
            },
            "chosen_by_sample": self.chosen_by_sample,
        }
        return {name: tensor.numpy() for name, tensor in tensors.items()}, facts


class _Reading:
    """The texts of a job, unit by unit, in as many passes as memory asks for.

    Args:
        models: Source and target.
        sides: All layers that are offered.
        aligned: The texts.
        batch_size: Texts in one forward.
        part: Of the job.
        store: Where the source's states are kept, if they are.
        ids: The source's token ids of a text by its number, for states that are to be kept.
        progress: Show bars.
    """

    def __init__(
        self,
        models: tuple[Side, Side],
        sides: Sides,
        aligned: AlignedTexts,
        batch_size: int,
        part: Shard | None,
        store: StateStore | None,
        ids: Callable[[int], Ints],
        progress: bool,
    ) -> None:
        self._models, self._sides, self._aligned = models, sides, aligned
        self._batch_size, self._store, self._ids, self._progress = batch_size, store, ids, progress
        every = range(len(aligned.units))
        self._units = [unit for unit in every if part is None or part.holds(unit)]
        if not self._units:
            raise PairsError(
                f"{aligned.name}: no text is left in shard {part} ({len(aligned.units)} units of texts): "
                "give fewer shards"
            )
        self._stack = ExitStack()
        self._opened: dict[int, nn.Module] = {}

    def __enter__(self) -> _Reading:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.clear()
        self._stack.close()

    def sample(self, state: _State, saved: Progress[_State] | None) -> None:
        """Read a sample of the rows with all layers, which is kept for the pass that follows."""
        units, sample = self._aligned.spread(SAMPLE_ROWS), state.sample
        left = [number for number in units if number not in sample.units]
        self._fill({*left, *self._units})
        total = sum(len(self._aligned.units[number]) for number in units)
        with self._bar("sample", total, len(sample)) as bar:
            for number in left:
                sample.add(number, self._texts(number))
                bar.update(len(self._aligned.units[number]))
                if saved is not None:
                    saved.save({"map": state})

    def run(self, state: _State, saved: Progress[_State] | None) -> None:
        """Read what is not read yet in this pass."""
        assert state.moments is not None
        moments = state.moments
        left = self._units[state.units :]
        if not left:
            return
        # Parts of a job all begin with the first unit's centres.
        first = [] if state.units else [0]
        self._fill({*first, *left})
        total = sum(len(self._aligned.units[number]) for number in self._units)
        name = "map" if len(state.passes) == 1 else f"map {state.number + 1}/{len(state.passes)}"
        with self._bar(name, total, sum(state.texts)) as bar:
            if first and left[0] != 0:
                begun = self._unit(0, moments.sides, state.sample)
                moments.begin(begun.x, begun.y)
            for number in left:
                rows = self._unit(number, moments.sides, state.sample)
                moments.add(rows.x, rows.y, rows.texts, rows.held_out, unit=number)
                self._count(number, rows, state)
                bar.update(len(self._aligned.units[number]))
                if saved is not None:
                    saved.save({"map": state})
            moments.flush()
            if saved is not None:
                saved.save({"map": state}, at_once=True)

    def _count(self, number: int, rows: UnitRows, state: _State) -> None:
        assert state.moments is not None
        state.units += 1
        for text in self._aligned.unit(number):
            state.texts[int(text.held_out)] += 1
        layers = state.moments.sides.target_layers
        for layer, norms in zip(layers, rows.y[rows.in_scope].norm(dim=-1).T, strict=True):
            state.norms[layer].add(norms)

    def _bar(self, name: str, total: int, done: int = 0) -> tqdm[Any]:
        bar: tqdm[Any] = tqdm(total=total, desc=name, unit="text", delay=1, disable=not self._progress)
        bar.update(done)
        return bar

    def _model(self, side: int) -> nn.Module:
        """A model, opened when it is first needed."""
        if side not in self._opened:
            self._opened[side] = self._stack.enter_context(self._models[side].ready())
        return self._opened[side]

    def _fill(self, units: Collection[int]) -> None:
        """Make sure that kept states are there, and let go of the source that gave them."""
        if self._store is None:
            return
        numbers = [text.number for unit in sorted(units) for text in self._aligned.unit(unit)]
        store = self._store
        with ExitStack() as stack:
            opened: list[nn.Module] = []

            def compute(members: list[Ints]) -> Iterator[Tensor]:
                if not opened:
                    opened.append(stack.enter_context(self._models[0].ready()))
                return states_of_texts(opened[0], store.layers, members, self._batch_size)

            store.fill(numbers, self._ids, compute, progress=self._progress)
            opened.clear()

    def _unit(self, number: int, sides: Sides, sample: Sample) -> UnitRows:
        """Rows of a unit, with some of the layers."""
        if number in sample.units:
            return sample.unit(number, sides)
        return UnitRows.joined([rows.of(self._sides, sides) for rows in self._texts(number)])

    def _texts(self, number: int) -> Iterator[UnitRows]:
        """Rows of a unit text by text, with all layers: which rows are usual, all of them say."""
        texts = self._aligned.unit(number)
        of_source = self._read([text.source for text in texts], texts)
        of_target = states_of_texts(
            self._model(1), self._sides.target_layers, [text.target for text in texts], self._batch_size
        )
        for place, (text, read, states) in enumerate(zip(texts, of_source, of_target, strict=True)):
            seen = rows_of_states(states, text.target_rows)
            usual = read.usual & seen.usual
            in_scope = torch.from_numpy(text.target_rows >= text.scope)[usual] & (not text.prompt)
            owner = torch.full_like(in_scope, place, dtype=torch.int64)
            held = torch.full_like(in_scope, text.held_out)
            yield UnitRows(read.states[usual], seen.states[usual], owner, held, in_scope)

    def _read(self, ids: list[Ints], texts: list[AlignedText]) -> Iterator[RowStates]:
        if self._store is None:
            states = states_of_texts(self._model(0), self._sides.source_layers, ids, self._batch_size)
        else:
            store = self._store
            states = (store.read(text.number) for text in texts)
        return (rows_of_states(of, text.source_rows) for of, text in zip(states, texts, strict=True))
