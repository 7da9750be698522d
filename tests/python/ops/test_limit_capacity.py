"""limit_capacity: who keeps its place when an expert is full."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
import torchmoe
from op_case import ErrorCase, Inputs, OpCase, altered
from op_harness import OpTests
from situations import INT64_MAX, INT64_MIN, Situation, normal

INF, NAN = math.inf, math.nan


def make(
    s: Situation,
    dtype: torch.dtype,
    order: str,
    priority: bool,
    overflow: str,
    tie_break: bool = False,
) -> Inputs:
    capacity = torch.tensor([2, 0, 3, 0, 1, 20, 7, 40, 11]).repeat(s.E // 9 + 1)[: s.E]
    backup = (torch.arange(s.E) + 2) % s.E if s.E > 2 else torch.arange(s.E).flip(0)
    if overflow == "backup" and s.E == 1:
        overflow = "next_best"  # an only expert has no other
    return {
        "indices": s.indices(),
        "capacity": capacity,
        "order": order,
        "priority": normal(s.T, s.K, dtype=dtype) if priority else None,
        "overflow": overflow,
        # Coarse, so that ties occur.
        "scores": None if overflow == "drop" else normal(s.T, s.E).mul(2).round().to(dtype),
        "backup": backup if overflow == "backup" else None,
        "tie_break": normal(s.T, s.E).round().to(dtype) if tie_break else None,
    }


class TestLimitCapacity(OpTests):
    case = OpCase(
        name="limit_capacity",
        schema=(
            'limit_capacity(Tensor indices, Tensor capacity, *, str order="choice", '
            'Tensor? priority=None, str overflow="drop", Tensor? scores=None, '
            "Tensor? backup=None, Tensor? tie_break=None) -> Tensor"
        ),
        make=make,
        reference=reference.limit_capacity,
        wrapper=lambda inputs: torchmoe.ops.limit_capacity(**inputs),
        variants=(
            {"order": "choice", "priority": True, "overflow": "backup", "tie_break": True},
            {"order": "choice", "priority": True, "overflow": "backup"},
            {"order": "token", "priority": False, "overflow": "backup"},
            {"order": "choice", "priority": False, "overflow": "next_best"},
            {"order": "token", "priority": False, "overflow": "next_best", "tie_break": True},
            {"order": "token", "priority": True, "overflow": "next_best"},
            {"order": "choice", "priority": True, "overflow": "drop"},
            {"order": "choice", "priority": False, "overflow": "drop"},
            {"order": "token", "priority": True, "overflow": "drop"},
            {"order": "token", "priority": False, "overflow": "drop"},
        ),
        errors=(
            ErrorCase("indices", altered("indices", lambda i: i[0]), r"\[2\]"),
            ErrorCase("indices", altered("indices", lambda i: i.int()), "Int"),
            ErrorCase("capacity", altered("capacity", lambda c: c[0]), r"\[\]"),
            ErrorCase("capacity", altered("capacity", lambda c: c[None]), r"\[1, 4\]"),
            ErrorCase("capacity", altered("capacity", lambda c: c.float()), "Float"),
            ErrorCase("priority", altered("priority", lambda p: p[1:]), r"\[5, 2\]"),
            ErrorCase("priority", altered("priority", lambda p: p.long()), "Long"),
            ErrorCase("order", altered("order", lambda o: "first"), '"first"', ValueError),
            ErrorCase("overflow", altered("overflow", lambda o: "spill"), '"spill"', ValueError),
            # A capacity of the wrong length shows in what else has an entry for each expert.
            ErrorCase("scores", altered("capacity", lambda c: c[1:]), r"\[6, 4\]"),
            ErrorCase("scores", altered("scores", lambda s: s[1:]), r"\[5, 4\]"),
            ErrorCase("scores", altered("scores", lambda s: s.long()), "Long"),
            ErrorCase("scores", altered("scores", lambda s: None), "None", ValueError),
            ErrorCase("scores", altered("overflow", lambda o: "drop"), r"\[6, 4\]", ValueError),
            ErrorCase("tie_break", altered("tie_break", lambda t: t[1:]), r"\[5, 4\]"),
            ErrorCase("tie_break", altered("tie_break", lambda t: t.long()), "Long"),
            ErrorCase("backup", altered("backup", lambda b: b[1:]), r"\[3\]"),
            ErrorCase("backup", altered("backup", lambda b: b.int()), "Int"),
            ErrorCase("backup", altered("backup", lambda b: None), "None", ValueError),
            ErrorCase("backup", altered("overflow", lambda o: "next_best"), r"\[4\]", ValueError),
        ),
    )

    # Four tokens that all want expert 0, and three of them expert 1. Expert 0 takes two slots,
    # expert 1 one, the others two. Worked by hand, slot by slot.
    INDICES = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 1]])
    CAPACITY = torch.tensor([2, 1, 2, 2])
    SCORES = torch.tensor(
        [[0.9, 0.8, 0.1, 0.2], [0.9, 0.8, 0.3, 0.3], [0.9, 0.1, 0.8, 0.7], [0.9, 0.8, 0.2, 0.1]]
    )
    BACKUP = torch.tensor([2, 3, 0, 0])
    LAST_FIRST = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 4.0], [7.0, 6.0]])

    @pytest.mark.parametrize(
        ("overflow", "order", "priority", "expected"),
        [
            ("drop", "token", None, [[0, 1], [0, -1], [-1, 2], [-1, -1]]),
            ("drop", "choice", None, [[0, 1], [0, -1], [-1, 2], [-1, -1]]),
            ("drop", "token", LAST_FIRST, [[-1, -1], [-1, -1], [0, 2], [0, 1]]),
            # Token 1's second choice finds a tie of 2 and 3, token 2's first may not go to 2, which
            # its second still waits for, and for token 3's second nothing is left.
            ("next_best", "token", None, [[0, 1], [0, 2], [3, 2], [3, -1]]),
            # Token 3's first choice comes before anybody's second now and gets its best, 2.
            ("next_best", "choice", None, [[0, 1], [0, 2], [3, -1], [2, 3]]),
            ("next_best", "token", LAST_FIRST, [[3, -1], [2, 3], [0, 2], [0, 1]]),
            # Token 1's second choice goes to the backup 3 of expert 1; token 2 holds the backup 2
            # of expert 0 already and goes to its best; token 3's second finds its backup full.
            ("backup", "token", None, [[0, 1], [0, 3], [3, 2], [2, -1]]),
            ("backup", "choice", None, [[0, 1], [0, 3], [3, 2], [2, -1]]),
            ("backup", "token", LAST_FIRST, [[3, -1], [2, 3], [0, 2], [0, 1]]),
        ],
    )
    def test_worked_by_hand(
        self, overflow: str, order: str, priority: torch.Tensor | None, expected: list[list[int]]
    ) -> None:
        kept = torchmoe.ops.limit_capacity(
            self.INDICES,
            self.CAPACITY,
            order=order,
            priority=priority,
            overflow=overflow,
            scores=None if overflow == "drop" else self.SCORES,
            backup=self.BACKUP if overflow == "backup" else None,
        )
        assert kept.tolist() == expected

    @pytest.mark.parametrize("scores", [[-INF, -INF, NAN, NAN], [-INF, NAN, -INF, NAN]])
    def test_no_score_is_too_low_to_be_rerouted_to(self, scores: list[float]) -> None:
        """-inf comes after every number and NaN after that, ties to the lower id."""
        kept = torchmoe.ops.limit_capacity(
            torch.tensor([[0], [0], [0], [0]]),
            torch.tensor([0, 1, 1, 1]),
            overflow="next_best",
            scores=torch.tensor([scores]).expand(4, 4),
        )
        ranked = sorted((1, 2, 3), key=lambda e: (math.isnan(scores[e]), e))
        assert kept[:, 0].tolist() == [*ranked, -1]

    def test_ties_go_to_the_larger_tie_break(self) -> None:
        """Sigmoids of these logits are 0 in float32."""
        logits = torch.tensor([[-95.0, -100.0, -99.0, -98.0]]).expand(4, 4)
        for overflow, backup in (("next_best", None), ("backup", torch.tensor([1, 0, 0, 0]))):
            kept = torchmoe.ops.limit_capacity(
                torch.zeros(4, 1, dtype=torch.int64),
                torch.tensor([1, 0, 1, 1]),
                overflow=overflow,
                scores=logits.sigmoid(),
                tie_break=logits,
                backup=backup,
            )
            assert kept[:, 0].tolist() == [0, 3, 2, -1]

    def test_a_tie_break_without_scores(self) -> None:
        with pytest.raises(ValueError, match=r"^limit_capacity: tie_break must be None without"):
            torchmoe.ops.limit_capacity(
                torch.zeros(4, 1, dtype=torch.int64),
                torch.tensor([1, 0]),
                tie_break=torch.zeros(4, 2),
            )

    @pytest.mark.cpu_only
    def test_errors_that_need_a_look_at_the_entries(self) -> None:
        good = make(Situation("any"), torch.float32, "choice", False, "backup")
        for table, entry, message in (
            ("capacity", -1, r"capacity must be >= 0 for every expert, got -1 for expert 2$"),
            ("capacity", INT64_MIN, rf"capacity must .*, got {INT64_MIN} for expert 2$"),
            ("backup", 2, r"backup must be another expert in \[0, 4\) .*, got 2 for expert 2$"),
            ("backup", 4, r"backup must be another expert in \[0, 4\) .*, got 4 for expert 2$"),
            ("backup", -1, r"backup must be another expert in \[0, 4\) .*, got -1 for expert 2$"),
        ):
            bad = good | {table: good[table].index_put((torch.tensor(2),), torch.tensor(entry))}
            for mode in (False, True):
                with (
                    torch.inference_mode(mode),
                    pytest.raises(ValueError, match=rf"^limit_capacity: {message}"),
                ):
                    torchmoe.ops.limit_capacity(**bad)

    def test_an_int_is_the_same_for_every_expert(self) -> None:
        indices = Situation("many", T=40).indices()
        expected = torchmoe.ops.limit_capacity(indices, torch.full((4,), 5))
        assert torch.equal(torchmoe.ops.limit_capacity(indices, 5, num_experts=4), expected)

    def test_int_capacity_errors(self) -> None:
        indices = Situation("any").indices()
        with pytest.raises(ValueError, match=r"^limit_capacity: num_experts must .*, got None"):
            torchmoe.ops.limit_capacity(indices, 5)
        with pytest.raises(ValueError, match=r"^limit_capacity: capacity must be .*, got -1"):
            torchmoe.ops.limit_capacity(indices, -1, num_experts=4)
        with pytest.raises(RuntimeError, match=r"^limit_capacity: capacity must .*, got .*\[4\]"):
            torchmoe.ops.limit_capacity(indices, torch.full((4,), 5), num_experts=3)

    def test_nan_priority_ranks_last(self) -> None:
        indices = torch.zeros(4, 1, dtype=torch.int64)
        priority = torch.tensor([[math.nan], [-math.inf], [0.0], [math.nan]])
        kept = [
            torchmoe.ops.limit_capacity(indices, torch.tensor([c]), priority=priority)
            for c in range(5)
        ]
        names = [(k[:, 0] == 0).nonzero()[:, 0].tolist() for k in kept]
        assert names == [[], [2], [1, 2], [0, 1, 2], [0, 1, 2, 3]]

    @pytest.mark.parametrize("overflow", ["drop", "next_best", "backup"])
    @pytest.mark.parametrize("order", ["token", "choice"])
    @pytest.mark.parametrize("priority", [False, True])
    def test_only_token_order_without_priority_is_causal(
        self, overflow: str, order: str, priority: bool
    ) -> None:
        """There nothing after a token changes its fate; everywhere else it may."""
        inputs = make(Situation("many", T=40), torch.float32, order, priority, overflow)
        inputs["capacity"] = torch.full((4,), 12)
        whole = torchmoe.ops.limit_capacity(**inputs)

        def same(tokens: int) -> bool:
            first = {
                name: inputs[name] if inputs[name] is None else inputs[name][:tokens]
                for name in ("indices", "priority", "scores", "tie_break")
            }
            return torch.equal(torchmoe.ops.limit_capacity(**(inputs | first)), whole[:tokens])

        is_causal = order == "token" and not priority
        assert all(map(same, range(41))) == is_causal

    @given(st.data())
    def test_any_indices(self, data: st.DataObject) -> None:
        num_tokens, top_k = data.draw(st.integers(0, 8)), data.draw(st.integers(1, 3))
        num_experts = data.draw(st.integers(1, 5))

        def matrix(
            element: st.SearchStrategy[Any], dtype: torch.dtype, columns: int = top_k
        ) -> torch.Tensor:
            count = num_tokens * columns
            values = data.draw(st.lists(element, min_size=count, max_size=count))
            return torch.tensor(values, dtype=dtype).reshape(num_tokens, columns)

        def table(element: st.SearchStrategy[int]) -> torch.Tensor:
            values = data.draw(st.lists(element, min_size=num_experts, max_size=num_experts))
            return torch.tensor(values)

        odd = st.sampled_from([-1, num_experts, num_experts + 7, INT64_MIN, INT64_MAX])
        indices = matrix(st.integers(0, num_experts - 1) | odd, torch.int64)
        capacity = table(st.integers(0, 6) | st.just(INT64_MAX))
        number = st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0, 2.0])
        overflows = ["drop", "next_best"] + (["backup"] if num_experts > 1 else [])
        options: Inputs = {
            "order": data.draw(st.sampled_from(["choice", "token"])),
            "priority": matrix(number, torch.float32) if data.draw(st.booleans()) else None,
            "overflow": data.draw(st.sampled_from(overflows)),
        }
        if options["overflow"] != "drop":
            options["scores"] = matrix(number, torch.float32, num_experts)
            if data.draw(st.booleans()):
                options["tie_break"] = matrix(number, torch.float32, num_experts)
        if options["overflow"] == "backup":
            steps = table(st.integers(1, num_experts - 1))
            options["backup"] = (torch.arange(num_experts) + steps) % num_experts

        torch.set_num_threads(data.draw(st.integers(1, 8)))
        kept = torchmoe.ops.limit_capacity(indices, capacity, **options)
        torch.set_num_threads(1)
        assert torch.equal(torchmoe.ops.limit_capacity(indices, capacity, **options), kept)
        assert torch.equal(kept, reference.limit_capacity(indices, capacity, **options))

        routed = (indices >= 0) & (indices < num_experts)
        assert bool((kept[~routed] == -1).all())
        asked = [int((indices == e).sum()) for e in range(num_experts)]
        given_away = [int((kept == e).sum()) for e in range(num_experts)]
        assert all(n <= int(c) for n, c in zip(given_away, capacity, strict=True))
        # An expert that could serve all who asked serves them, and a full one is full.
        for n, a, c in zip(given_away, asked, capacity, strict=True):
            assert n >= min(a, int(c))
        if options["overflow"] == "drop":
            assert bool(((kept == indices) | (kept == -1)).all())
            return
        for token in range(num_tokens):
            wanted = indices[token][routed[token]].tolist()
            got = [e for e in kept[token].tolist() if e >= 0]
            if len(set(wanted)) == len(wanted):
                assert len(set(got)) == len(got), "twice on one expert"
            if len(got) < len(wanted):
                others = set(range(num_experts)) - set(got)
                room = [e for e in others if given_away[e] < int(capacity[e])]
                assert not room, "dropped while an expert has room"

    def test_equal_priorities_keep_their_order(self) -> None:
        """More slots than the 16 that an unstable sort may order by insertion."""
        indices = torch.zeros(100, 1, dtype=torch.int64)
        priority = torch.arange(100).remainder(3).float().unsqueeze(1)
        capacity = torch.tensor([50])
        kept = torchmoe.ops.limit_capacity(indices, capacity, priority=priority)
        assert torch.equal(kept, reference.limit_capacity(indices, capacity, priority=priority))
