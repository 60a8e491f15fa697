"""The GPU's kernels against the host's way (plain torch) on the same tables.

On a GPU, else in Triton's interpreter. They need Triton, and not vLLM.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

ON_GPU = torch.cuda.is_available()
with pytest.MonkeyPatch.context() as patch:
    if not ON_GPU:
        patch.setenv(
            "TRITON_INTERPRET", "1"
        )  # read when Triton is imported, when a kernel is defined and when it runs
    pytest.importorskip("triton", reason="Triton is not installed here: the kernels are tested where it is")
    from steersman.vllm import kernels, routing_kernel

    if not ON_GPU and not hasattr(kernels.tl.max, "rewrite"):
        pytest.skip(
            "Triton was imported before, to compile: run this file by itself", allow_module_level=True
        )

from steersman.concepts.residual import Add, Project, Step  # noqa: E402
from steersman.errors import SteeringNotApplied  # noqa: E402
from steersman.vllm.bank import Bank, Places, Room, RouterPlace  # noqa: E402
from steersman.vllm.device_state import DeviceState  # noqa: E402
from steersman.vllm.live import Span  # noqa: E402
from steersman.vllm.plan_rows import PlanRow  # noqa: E402
from steersman.vllm.routing import Rule  # noqa: E402
from steersman.vllm.worker_state import WorkerState  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPONENTS = 3
seeds = st.integers(0, 2**31)
few = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True, scope="module")
def _interpreted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def site(index: int) -> Tensor:
    return torch.tensor([index], dtype=torch.int32, device=DEVICE)


def exact(dtype: torch.dtype) -> bool:
    """Whether numbers are rounded to the nearest: Triton's interpreter cuts bfloat16 off."""
    return ON_GPU or dtype != torch.bfloat16


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn_strengths(generator: torch.Generator, experts: int, full: bool, zeros: float) -> dict[int, float]:
    """λ of some experts, each full, or any."""
    chosen = torch.rand(experts, generator=generator) >= zeros
    values = 2 * torch.rand(experts, generator=generator) - 1
    values = torch.where((values.abs() > 0.5) | torch.tensor(full), values.sign(), values)
    chosen[0] = True
    return {e: float(values[e]) for e in range(experts) if chosen[e]}


def drawn_spans(
    generator: torch.Generator, bank: Bank, tokens: int, by: tuple[float, ...], most: int = COMPONENTS
) -> list[Span]:
    """Some of a step's tokens follow up to `most` of the bank's rows."""
    spans, at = [], 0
    while at < tokens:
        length = int(torch.randint(1, 3, (), generator=generator))
        count = int(torch.randint(0, most + 1, (), generator=generator))
        rows = torch.randperm(len(bank.busy) - 1, generator=generator)[:count] + 1
        strengths = torch.randint(0, len(by), (count,), generator=generator)
        if count:
            follows = tuple((int(row), by[int(n)]) for row, n in zip(rows, strengths, strict=True))
            spans.append(Span(at, min(at + length, tokens), follows))
        at += length
    return spans


def drawn_scores(
    generator: torch.Generator, tokens: int, experts: int, kind: str, dtype: torch.dtype
) -> Tensor:
    scores = torch.randn(tokens, experts, generator=generator)
    if kind == "equal":
        scores = scores[:, :1].expand(-1, experts).clone()
    elif kind == "huge":
        scores *= 1e4 if dtype == torch.float16 else 1e15
    elif kind == "ties":
        scores = (2 * scores).round()
    elif kind == "spike":
        scores[:, 0] += 300
    return scores.to(dtype)


def states_of(bank: Bank) -> tuple[WorkerState, DeviceState]:
    """Both ways to edit by one bank: the host's has a copy of it on the host."""
    host = copy.copy(bank)
    for name, value in vars(bank).items():
        if isinstance(value, Tensor):
            setattr(host, name, value.to("cpu", copy=True))
    host.device = torch.device("cpu")
    return WorkerState(host, frozenset()), DeviceState(bank, frozenset())


def router_bank(place: RouterPlace, rows: list[PlanRow], tokens: int) -> Bank:
    bank = Bank(Places((place,), (), 4), Room(len(rows), 1, 1, COMPONENTS, tokens), DEVICE)
    for slot, row in enumerate(rows):
        bank.write(slot, (row, row, row))
    return bank


KINDS = ("normal", "equal", "huge", "ties", "spike")


@few
@given(
    seeds,
    st.sampled_from((2, 3, 8, 16, 60, 64, 128, 384)),
    st.sampled_from(DTYPES),
    st.sampled_from(KINDS),
    st.booleans(),
    st.booleans(),
)
def test_scores_are_edited_as_on_the_host(
    seed: int, experts: int, dtype: torch.dtype, kind: str, full: bool, softmax_first: bool
) -> None:
    generator = random(seed)
    rows = [PlanRow({0: drawn_strengths(generator, experts, full, 0.6)}, {}) for _ in range(2)]
    bank = router_bank(RouterPlace(0, experts, None, softmax_first), rows, 8)
    host, device = states_of(bank)
    spans = drawn_spans(generator, bank, 4, (1.0,) if full else (1.0, 0.5, -0.3), 1 if full else COMPONENTS)
    given_ = drawn_scores(generator, 6, experts, kind, dtype)
    expected, edited = given_.clone(), given_.to(DEVICE, copy=True)
    for state in (host, device):
        state.follow(spans, 4)
    host.edit_scores(expected, torch.tensor([0]))
    device.edit_scores(edited, site(0))
    edited = edited.cpu()
    if full and exact(dtype):
        assert torch.equal(edited, expected)
    else:
        size = expected.float().abs().amax().clamp(min=1)
        assert ((edited.float() - expected.float()).abs() <= 8 * torch.finfo(dtype).eps * size).all()
    steered = torch.zeros(6, dtype=torch.bool)
    for span in spans:
        steered[span.first : span.end] = True
    assert torch.equal(edited[~steered], given_[~steered])
    assert bank.ran.tolist() == [1]


@few
@given(seeds, st.sampled_from(((12, 4, 2), (64, 8, 3), (16, 1, 1), (60, 0, 0), (256, 8, 4))), st.data())
def test_experts_are_chosen_as_on_the_host(
    seed: int, shape: tuple[int, int, int], data: st.DataObject
) -> None:
    experts, groups, kept = shape
    generator = random(seed)
    within = experts // groups * kept if groups else experts
    rule = Rule(
        top_k=data.draw(st.sampled_from([k for k in (1, 2, 3, 4, 8, 22) if k <= within // 2])),
        scoring=data.draw(st.sampled_from(("softmax", "sigmoid", "sqrtsoftplus"))),
        renormalised=data.draw(st.booleans()),
        groups=(groups, kept) if groups else None,
        group_score=data.draw(st.sampled_from(("max", "top2"))),
        bias=torch.randn(experts, generator=generator) if data.draw(st.booleans()) else None,
        scaling=data.draw(st.sampled_from((1.0, 2.5))),
    )
    forced = {0: 1.0, experts - 1: -1.0} if data.draw(st.booleans()) and rule.top_k > 1 else {}
    weak = dict.fromkeys(range(1, experts - 1, 5), -0.5) if not forced or data.draw(st.booleans()) else {}
    bank = router_bank(RouterPlace(0, experts, rule), [PlanRow({0: {**weak, **forced}}, {})] * 2, 8)
    host, device = states_of(bank)
    spans = drawn_spans(generator, bank, 4, (1.0,), 1)
    scores = drawn_scores(
        generator, 5, experts, data.draw(st.sampled_from(("normal", "spike"))), torch.float32
    )
    # The engine's own choice, recognisable.
    ids = torch.full((5, rule.top_k), -7, dtype=data.draw(st.sampled_from((torch.int32, torch.int64))))
    weights = torch.full((5, rule.top_k), -7.0)
    expected = weights.clone(), ids.clone()
    for state in (host, device):
        state.follow(spans, 4)
    if 0 in host.bank.sites({row for span in spans for row, _ in span.follows}):
        host.choose(scores, *expected, torch.tensor([0]))
    made = weights.to(DEVICE, copy=True), ids.to(DEVICE, copy=True)
    device.choose(scores.to(DEVICE), *made, site(0))
    ours, theirs = (as_shares(w.cpu(), i.cpu(), experts) for w, i in (made, expected))
    same = [token for token in range(5) if torch.equal(ours[token] > 0, theirs[token] > 0)]
    for token in set(range(5)) - set(same):  # where two scores are a rounding apart, either may be chosen
        assert (ours[token] > 0).sum() == (theirs[token] > 0).sum()
        assert (ours[token] - theirs[token]).abs().max() < 1e-5
    torch.testing.assert_close(ours[same], theirs[same], rtol=2e-5, atol=1e-7)
    for span in spans:
        for token in range(span.first, span.end):
            if forced and bank.busy[span.follows[0][0]]:
                assert 0 in made[1][token].tolist()
                assert experts - 1 not in made[1][token].tolist()


def as_shares(weights: Tensor, ids: Tensor, experts: int) -> Tensor:
    """[tokens, experts]; of tokens that are as the engine left them, zeros."""
    left = (ids < 0).any(-1, keepdim=True)
    assert bool(((weights == -7) == left).all())
    return torch.zeros(len(ids), experts).scatter_(
        1, ids.long().clamp(min=0), weights.masked_fill(left, 0).clamp(min=1e-30).masked_fill(left, 0)
    )


def drawn_steps(generator: torch.Generator, width: int, count: int) -> list[Step]:
    steps: list[Step] = []
    for _ in range(count):
        vector = torch.randn(width, generator=generator)
        if torch.rand((), generator=generator) < 0.5:
            steps.append(Project(vector / vector.norm(), torch.rand((), generator=generator)))
        elif not steps or not isinstance(steps[-1], Add):
            steps.append(Add(vector))
    return steps


@few
@given(
    seeds, st.sampled_from((1, 7, 32, 100, 128)), st.sampled_from(DTYPES), st.integers(0, 4), st.booleans()
)
def test_states_are_edited_as_on_the_host(
    seed: int, width: int, dtype: torch.dtype, count: int, with_residual: bool
) -> None:
    generator = random(seed)
    rows = [PlanRow({}, {5: drawn_steps(generator, width, count)}) for _ in range(3)]
    bank = Bank(Places((), (4, 5), width), Room(3, 16, 8, COMPONENTS, 8), DEVICE)
    for slot, row in enumerate(rows):
        bank.write(slot, (row, row, row))
    host, device = states_of(bank)
    spans = drawn_spans(generator, bank, 5, (1.0, 0.5, -0.7))
    given_ = torch.randn(6, width, generator=generator).to(dtype)
    residual = torch.randn(6, width, generator=generator).to(dtype) if with_residual else None
    expected, edited = given_.clone(), given_.to(DEVICE, copy=True)
    for state in (host, device):
        state.follow(spans, 5)
    host.edit_states(expected, residual, torch.tensor([1]))
    device.edit_states(edited, None if residual is None else residual.to(DEVICE), site(1))
    # The host rounds after each step, the kernel once.
    steps = 1 + COMPONENTS * bank.room.slots
    size = torch.cat((expected, given_)).float().abs().amax() * width**0.5
    room = steps * torch.finfo(dtype).eps * max(1.0, float(size))
    torch.testing.assert_close(edited.cpu().float(), expected.float(), rtol=0, atol=room)
    edits = any(bank.busy[row] for span in spans for row, _ in span.follows)
    held = {token for span in spans for token in range(span.first, span.end)} if edits else set()
    untouched = [token for token in range(6) if token not in held]
    assert torch.equal(edited.cpu()[untouched], given_[untouched])
    assert bank.ran.tolist() == [0, 1]


def test_a_vector_is_added_to_the_bit() -> None:
    vector = torch.randn(48, generator=random(1))
    row = PlanRow({}, {0: [Add(vector)]})
    bank = Bank(Places((), (0,), 48), Room(1, 2, 1, 2, 8), DEVICE)
    bank.write(0, (row, row, row))
    state = DeviceState(bank, frozenset())
    state.follow([Span(1, 3, ((bank.row(0, 0), 1.0),))], 4)
    for dtype in DTYPES:
        hidden = torch.randn(4, 48, generator=random(2)).to(dtype)
        edited = hidden.to(DEVICE, copy=True)
        state.edit_states(edited, None, site(0))
        expected = hidden.clone()
        expected[1:3] = (hidden[1:3] + vector).to(dtype)
        assert torch.equal(edited.cpu(), expected) or not exact(dtype)


def test_tokens_beyond_the_table_follow_nothing() -> None:
    row = PlanRow({0: {0: 1.0}}, {})
    bank = router_bank(RouterPlace(0, 4), [row], tokens=2)
    state = DeviceState(bank, frozenset())
    state.follow([Span(0, 2, ((bank.row(0, 0), 1.0),))], 2)
    scores = torch.zeros(6, 4, device=DEVICE)
    state.edit_scores(scores, site(0))
    assert (scores[:2, 0] > 0).all()
    assert not scores[2:].any()
    with pytest.raises(SteeringNotApplied, match="a step has 3 tokens"):
        state.follow([Span(0, 3, ((bank.row(0, 0), 1.0),))], 3)


def test_a_step_forgets_the_one_before() -> None:
    bank = router_bank(RouterPlace(0, 4), [PlanRow({0: {0: 1.0}}, {})], tokens=8)
    state = DeviceState(bank, frozenset())
    follows = ((bank.row(0, 0), 1.0),)
    for spans in ([Span(0, 7, follows)], [Span(2, 3, follows)], [], [Span(6, 8, follows)]):
        state.follow(spans, 8)
        steered = {token for span in spans for token in range(span.first, span.end)}
        assert {token for token in range(8) if bank.token_rows[token].any()} == steered


def test_a_choice_of_another_size_is_refused() -> None:
    rule = Rule(2, "sigmoid", True)
    bank = router_bank(RouterPlace(0, 8, rule), [PlanRow({0: {0: 1.0}}, {})], 4)
    state = DeviceState(bank, frozenset())
    with pytest.raises(ValueError, match="known are 2 experts a token"):
        state.choose(
            torch.zeros(2, 8, device=DEVICE),
            torch.zeros(2, 1, device=DEVICE),
            torch.zeros(2, 1, dtype=torch.int32, device=DEVICE),
            site(0),
        )


def test_other_numbers_are_refused() -> None:
    bank = router_bank(RouterPlace(0, 8), [PlanRow({0: {0: 1.0}}, {})], 4)
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        kernels.edit_scores(torch.zeros(2, 8, dtype=torch.float64), site(0), bank, torch.zeros(1))


def test_rules_of_all_routers_lie_in_one_table() -> None:
    rule = Rule(2, "sigmoid", True, (4, 2), "top2", torch.arange(8.0), 2.5)
    places = (
        RouterPlace(0, 8, rule),
        RouterPlace(1, 12, None, True),
        RouterPlace(2, 8, replace(rule, bias=None)),
    )
    table = routing_kernel.rule_table(Bank(Places(places, (), 4), Room(1, 1, 1, 1, 4), DEVICE))
    assert table.numbers.tolist() == [[1, 1, 4, 2, 1, 2], [0] * 6, [1, 1, 4, 2, 1, 2]]
    assert table.scaling.tolist() == [2.5, 1, 2.5]
    assert table.bias.sum(dim=1).tolist() == [28, 0, 0]
    assert (table.most, table.softmax_first.tolist()) == (2, [0, 1, 0])
