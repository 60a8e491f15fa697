"""Fitting affine maps: one pass over each text through both models, all pairs of layers at once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from steersman.concepts.affine_map import AffineMap
from steersman.concepts.aligned_texts import AlignedText, AlignedTexts
from steersman.concepts.alignment import Reader, Rows
from steersman.concepts.concept import ConceptVector
from steersman.concepts.joint_moments import JointMoments, Sides
from steersman.concepts.norms import NormHistogram
from steersman.concepts.opening import Opened, Side
from steersman.concepts.rows import Ints, RowStates, rows_of_states, states_of_texts
from steersman.concepts.solving import choose_source, solve
from steersman.concepts.state_store import StateStore
from steersman.concepts.states import check_layers
from steersman.edits import as_layers
from steersman.errors import ModelError, PairsError, PlanError, WeightsMismatch, check_kind, whole_number
from steersman.models.same_weights import same_weights
from steersman.progress import Arrays, Progress, discard
from steersman.shards import Shard
from steersman.texts import Texts, load_texts

MOST_BYTES = 8 << 30
"""What moments may take in memory."""


def fit_affine_map(
    source: Opened | str | Path,
    target: Opened | str | Path,
    texts: str | Path | Iterable[Any],
    *,
    source_layers: Sequence[int] | None = None,
    target_layers: Sequence[int] | None = None,
    rows: Rows = "boundaries",
    concept: ConceptVector | None = None,
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
    and a control. Memory does not grow with the number of texts, but for a few numbers a text.

    Args:
        source: Model and tokenizer, or a name that `load_model` opens. The two may be on different devices.
        target: The same for the model that is mapped to.
        texts: Texts or chats, or what `load_texts` takes. About one in five, by content, is held out.
        source_layers: Default: all; with a concept, the one where it separates held-out pairs best.
        target_layers: Default: all.
        rows: `boundaries`: every position at which both tokenizers end a token, and turns of chats; `last`:
            the last token of each text (the paper).
        concept: A concept of the source; it chooses the source layer.
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
            the moments of so many layers do not fit into memory.
        WeightsMismatch: the concept is of other weights than the source.
        ArtifactError: saved progress or states are damaged, not wanted, or of another run.
        PlanError: what is given as the concept is none.

    Example:
        >>> texts = [f"please give me the {thing}" for thing in ("badge", "key", "book")] * 20
        >>> steersman.fit_affine_map("lab:source", "lab:target", texts)
        <AffineMap: lab:source → lab:target, target layers 0–3; 180 rows of 60 texts>
    """
    batch_size, seed = _checked_options(rows, batch_size, seed, concept)
    part = None if shard is None else Shard.parse(shard)
    read = load_texts(texts)
    models = (
        Side(source, sequential, source_options, "source"),
        Side(target, sequential, target_options, "target"),
    )
    sides, chosen = _sides(*models, source_layers, target_layers, concept)
    readers = models[0].reader(), models[1].reader()
    noted = [NotedChats(side.tokenizer) for side in models]
    aligned = AlignedTexts(read, *readers, rows, truncate=truncate, progress=progress)
    chats = {side: of.record for side, of in zip(("source", "target"), noted, strict=True)}
    with closing(aligned), ExitStack() as stack:
        saved = None
        if checkpoint is not None:
            run = _run_of(models, read, aligned, sides, rows, batch_size, seed, part, truncate)
            run |= _chats(chats)
            saved = Progress(checkpoint, run, _State.reader(sides, seed), resume=resume)
        if source_states is None and sequential:
            source_states = stack.enter_context(tempfile.TemporaryDirectory(prefix="steersman-states-"))
        store = None
        if source_states is not None:
            store = _store(source_states, models[0], read, aligned, sides, {"source": chats["source"]})
        reading = _Reading(models, sides, aligned, batch_size, part, store, progress)
        state = reading.run(saved, _State.empty(sides, seed), lambda number: _ids(readers[0], read, number))
    made_from: list[dict[str, Any]] = [{"kind": "texts", "name": read.name, "sha256": read.sha256}]
    if concept is not None:
        made_from.append({"kind": "concept", "name": concept.model, "source_layer": chosen})
    found = AffineMap(
        maps={},
        source=replace(models[0].identity, chat=chats["source"]),
        target=replace(models[1].identity, chat=chats["target"]),
        rows=sum(of_part.rows for of_part in state.moments.parts),
        texts=sum(state.texts),
        held_out_rows=state.moments.parts[1].rows,
        held_out_texts=state.texts[1],
        skipped=aligned.skipped + aligned.without_rows,
        alignment=rows,
        table=None,
        norms=state.norms,
        made_from=tuple(made_from),
        seed=seed,
        moments=state.moments,
        shard=None if part is None else str(part),
    )
    if part is None:
        try:
            found = _solved(found, state.moments, chosen, progress)
        except (PairsError, ModelError) as error:
            if checkpoint is not None:  # whoever went on from it would come here again
                discard(checkpoint)
            raise type(error)(f"{read.name}: {error}") from None
    for which, side in zip(("source", "target"), models, strict=True):
        if side.opened is not None:
            found.remember(which, *side.opened)
    return found


def _checked_options(rows: str, batch_size: int, seed: int, concept: object) -> tuple[int, int]:
    if rows not in ("boundaries", "last"):
        raise PairsError(f"rows={rows!r} is unknown: use 'boundaries' or 'last'")
    batch_size, seed = (
        whole_number("batch_size", batch_size, 1, PairsError),
        whole_number("seed", seed, 0, PairsError),
    )
    if seed >= 2**63:
        raise PairsError(f"seed is {seed}: give 0 to 2^63 − 1")
    if concept is not None:
        check_kind(concept, ConceptVector, PlanError)
    return batch_size, seed


def _sides(
    source: Side,
    target: Side,
    source_layers: Sequence[int] | None,
    target_layers: Sequence[int] | None,
    concept: ConceptVector | None,
) -> tuple[Sides, int | None]:
    """The layers of either model, and the source layer that the concept chooses."""
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
    chosen = None
    if concept is not None:
        if not same_weights(concept, source.identity):
            raise WeightsMismatch(
                f"the concept is of {concept.model or 'a model'} with other weights than the map's source, "
                f"{source.identity.name or 'a model'}: refine it in this source"
            )
        chosen = choose_source(concept, of_source)
        if source_layers is None:
            of_source = list(concept.layers) if chosen is None else [chosen]
    sides = Sides(tuple(of_source), source.width, tuple(of_target), target.width)
    if sides.bytes > MOST_BYTES:
        raise ModelError(
            f"{len(of_source)} source layers × {len(of_target)} target layers need "
            f"{sides.bytes / 2**30:.0f} GiB of memory for their moments, of {MOST_BYTES >> 30} allowed: name "
            "fewer with --source-layers and --target-layers, or give --concept, which chooses the source "
            "layer (in Python source_layers=, target_layers=, concept=)"
        )
    return sides, chosen


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


def _ids(reader: Reader, texts: Texts, number: int) -> Ints:
    return reader.ids(texts[number].content, texts[number].where)


def _solved(found: AffineMap, moments: JointMoments, chosen: int | None, progress: bool) -> AffineMap:
    sources = len(moments.sides.source_layers)
    with tqdm(total=sources, desc="solve", unit="layer", delay=1, leave=False, disable=not progress) as bar:
        maps, table = solve(moments, chosen, bar.update)
    return replace(found, maps=maps, table=table, moments=None)


@dataclass
class _State:
    """What has been read so far: whole units, in order."""

    moments: JointMoments
    norms: dict[int, NormHistogram]
    texts: list[int] = field(default_factory=lambda: [0, 0])
    units: int = 0

    @classmethod
    def empty(cls, sides: Sides, seed: int) -> _State:
        return cls(JointMoments(sides, seed), {layer: NormHistogram() for layer in sides.target_layers})

    @staticmethod
    def reader(sides: Sides, seed: int) -> Any:
        def read(arrays: Arrays, facts: dict[str, Any]) -> _State:
            tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
            norms = {
                layer: NormHistogram.from_tensor(tensors.pop(f"norms.{layer}"))
                for layer in sides.target_layers
            }
            moments = JointMoments.from_tensors(tensors, sides, seed)
            return _State(moments, norms, [int(count) for count in facts["texts"]], int(facts["units"]))

        return read

    def to_tensors(self) -> tuple[Arrays, dict[str, Any]]:
        tensors = self.moments.to_tensors()
        tensors |= {f"norms.{layer}": norms.to_tensor() for layer, norms in self.norms.items()}
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        return arrays, {"done": sum(self.texts), "texts": self.texts, "units": self.units}


class _Reading:
    """One pass over the texts of a job, unit by unit."""

    def __init__(
        self,
        models: tuple[Side, Side],
        sides: Sides,
        aligned: AlignedTexts,
        batch_size: int,
        part: Shard | None,
        store: StateStore | None,
        progress: bool,
    ) -> None:
        self._models, self._sides, self._aligned = models, sides, aligned
        self._batch_size, self._store, self._progress = batch_size, store, progress
        every = range(len(aligned.units))
        self._units = [unit for unit in every if part is None or part.holds(unit)]
        if not self._units:
            raise PairsError(
                f"{aligned.name}: no text is left in shard {part} ({len(aligned.units)} units of texts): "
                "give fewer shards"
            )

    def run(self, saved: Progress[_State] | None, empty: _State, ids: Any) -> _State:
        """Read what is not read yet.

        Args:
            ids: The source's token ids of a text by its number, for states that are to be kept.
        """
        state = empty if saved is None else saved.saved.get("map", empty)
        left = self._units[state.units :]
        if not left:
            return state
        # Parts of a job all begin with the first unit's centres.
        first = [] if state.units else [0]
        if self._store is not None:
            self._fill(self._store, sorted({*first, *left}), ids)
        with self._source() as source, self._models[1].ready() as target, self._bar(state) as bar:
            if first and left[0] != 0:
                state.moments.begin(*self._unit(0, source, target, None)[:2])
            for number in left:
                x, y, owners, held_out = self._unit(number, source, target, state)
                state.moments.add(x, y, owners, held_out, unit=number)
                state.units += 1
                bar.update(len(self._aligned.units[number]))
                if saved is not None:
                    saved.save({"map": state})
            state.moments.flush()
            if saved is not None:
                saved.save({"map": state}, at_once=True)
        return state

    def _bar(self, state: _State) -> tqdm[Any]:
        total = sum(len(self._aligned.units[number]) for number in self._units)
        bar: tqdm[Any] = tqdm(total=total, desc="map", unit="text", delay=1, disable=not self._progress)
        bar.update(sum(state.texts))
        return bar

    @contextmanager
    def _source(self) -> Iterator[nn.Module | None]:
        """The source model, where states are not kept on disk."""
        if self._store is not None:
            yield None
            return
        with self._models[0].ready() as model:
            yield model

    def _fill(self, store: StateStore, units: Sequence[int], ids: Any) -> None:
        numbers = [text.number for unit in units for text in self._aligned.unit(unit)]
        with ExitStack() as stack:
            opened: list[nn.Module] = []

            def compute(members: list[Ints]) -> Iterator[Tensor]:
                if not opened:
                    opened.append(stack.enter_context(self._models[0].ready()))
                return states_of_texts(opened[0], store.layers, members, self._batch_size)

            store.fill(numbers, ids, compute, progress=self._progress)
            opened.clear()

    def _unit(
        self, number: int, source: nn.Module | None, target: nn.Module, state: _State | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows of a unit: states of source and target, whose text each is of, and whether it is held out."""
        texts = self._aligned.unit(number)
        of_source = self._read(source, self._sides.source_layers, [text.source for text in texts], texts)
        of_target = states_of_texts(
            target, self._sides.target_layers, [text.target for text in texts], self._batch_size
        )
        parts: list[tuple[Tensor, ...]] = []
        for place, (text, read, states) in enumerate(zip(texts, of_source, of_target, strict=True)):
            seen = rows_of_states(states, text.target_rows)
            usual = read.usual & seen.usual
            in_scope = torch.from_numpy(text.target_rows >= text.scope)
            owner = torch.full_like(in_scope, place, dtype=torch.int64)
            held = torch.full_like(in_scope, text.held_out)
            parts.append(tuple(each[usual] for each in (read.states, seen.states, owner, in_scope, held)))
        x, y, owners, in_scope, held_out = (torch.cat(each) for each in zip(*parts, strict=True))
        if state is not None:
            for text in texts:
                state.texts[int(text.held_out)] += 1
            for layer, norms in zip(self._sides.target_layers, y[in_scope].norm(dim=-1).T, strict=True):
                state.norms[layer].add(norms)
        return x, y, owners, held_out

    def _read(
        self, source: nn.Module | None, layers: Sequence[int], ids: list[Ints], texts: list[AlignedText]
    ) -> Iterator[RowStates]:
        if source is not None:
            states = states_of_texts(source, layers, ids, self._batch_size)
        else:
            assert self._store is not None
            store = self._store
            states = (store.read(text.number) for text in texts)
        return (rows_of_states(of, text.source_rows) for of, text in zip(states, texts, strict=True))
