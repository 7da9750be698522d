"""Help for experts whose load has been high for a long time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchmoe._checks import Fixed, check_at_least, check_backup, check_number
from torchmoe.nn._buffers import Remembering
from torchmoe.nn._table import Table


class Assistance(Remembering):
    """A backup for an expert under sustained load, in one extra slot in addition to the top_k.

        usage_i > threshold / E for `patience` updates in a row   backup[i] begins to assist i
        usage_i < lower_threshold / E                             it stops

    While expert i is assisted, each token routed to i gets one extra slot, for backup[i]. This slot
    is weighted and subject to capacity like any other, as the token's last choice. If several of a
    token's choices are assisted, the backup of the best of them is used; if the token has chosen
    that backup already, the slot stays empty. There are always top_k + 1 columns, so no shape
    depends on the state.

    The state changes in `MoE.update` only, from the router's `usage`, the running share of the
    router's own choices. The extra slots do not count in usage; otherwise assistance would lower
    the value that switches it on and off.

    Args:
        backup: another expert for each expert.
        threshold: in multiples of the even share 1 / E; below E / K, the load of an expert that
            every token chooses. None is 2, or halfway between 1 and E / K if that is at most 2.
        lower_threshold: in the same unit; at most `threshold`. The gap prevents flickering. None is
            1.5, or halfway between 1 and threshold if that is None or below 1.5.
        patience: how many updates in a row usage must be above the threshold.

    Attributes:
        threshold: see above; if it was None, the layer sets a number.
        lower_threshold: the same.
        assisted: [E] buffer, 1 for the experts that are assisted, else 0. In an average of models
            (`torch.optim.swa_utils.AveragedModel`) an expert is assisted if it was in most of them.
        updates_above: [E] buffer, updates in a row with usage above the threshold. Both buffers are
            float32 or wider, so that they can be averaged.

    Raises:
        TypeError: patience or an entry of backup is not an int.
        ValueError: a value is out of range.
    """

    wide_buffers = ("assisted", "updates_above")
    num_experts = Fixed[int]()
    threshold = Fixed[float]()
    lower_threshold = Fixed[float]()
    patience = Fixed[int]()
    assisted: Tensor
    updates_above: Tensor

    def __init__(
        self,
        backup: Sequence[int],
        *,
        threshold: float | None = None,
        lower_threshold: float | None = None,
        patience: int = 100,
    ) -> None:
        super().__init__()
        self._table = Table(check_backup("Assistance", backup))
        self.num_experts = len(self.backup)
        for name, value in (("threshold", threshold), ("lower_threshold", lower_threshold)):
            if value is not None:
                check_number("Assistance", name, value)
        if threshold is not None and not 0 < threshold < self.num_experts:
            raise ValueError(
                f"Assistance: threshold must be in (0, {self.num_experts}), up to the load of an "
                f"expert that gets every slot, got {threshold}"
            )
        check_at_least("Assistance", "patience", patience, 1)
        self._given = threshold, lower_threshold
        self.bind(1)
        self.patience = patience
        for name in self.wide_buffers:
            self.register_buffer(name, torch.zeros(self.num_experts, dtype=torch.float32))

    @property
    def backup(self) -> tuple[int, ...]:
        """Another expert for each expert."""
        return self._table.entries

    def bind(self, top_k: int) -> Assistance:
        """Sets the thresholds that were left open; `MoE` calls it.

        Args:
            top_k: the least number of experts that a token has.

        Raises:
            ValueError: lower_threshold is out of range.
        """
        given, lower = self._given
        most = self.num_experts / top_k
        threshold = (2.0 if most > 2 else (1 + most) / 2) if given is None else given
        if lower is None:
            halfway = min((1 + threshold) / 2, threshold)
            lower = halfway if given is None or threshold < 1.5 else 1.5
        if not 0 < lower <= threshold:
            raise ValueError(
                f"Assistance: lower_threshold must be in (0, threshold] = (0, {threshold}], "
                f"got {lower}"
            )
        # Values that the layer has set cannot be changed.
        self._threshold, self._lower_threshold = threshold, lower
        return self

    def reset_parameters(self) -> None:
        """Resets the state: no expert is assisted."""
        nn.init.zeros_(self.assisted)
        nn.init.zeros_(self.updates_above)

    def forward(self, selected: Tensor) -> Tensor:
        """The slots with one more column.

        Args:
            selected: [T, K] int64, best first; an id outside [0, E) is not routed.

        Returns:
            [T, K + 1], the last column -1 for tokens without an assisted choice.
        """
        routed = (selected >= 0) & (selected < self.num_experts)
        is_assisted = self._is_assisted()[selected.where(routed, 0)] & routed  # [T, K]
        # argmax gives the first of equal values, so the best choice.
        best = is_assisted.to(torch.uint8).argmax(dim=1, keepdim=True)  # [T, 1]
        expert = selected.gather(1, best).clamp(0, self.num_experts - 1)
        helper = self._table.on(selected.device)[expert]  # [T, 1]
        is_new = (selected != helper).all(dim=1, keepdim=True)
        joins = is_assisted.any(dim=1, keepdim=True) & is_new
        return torch.cat([selected, helper.where(joins, -1)], dim=1)

    @torch.no_grad()
    def update(self, usage: Tensor, num_slots: Tensor) -> None:
        """Begins and ends assistance; `MoE.update` calls it once per optimizer step.

        Args:
            usage: [E], already updated for this step.
            num_slots: integer scalar: the slots of the step; if it is 0 nothing changes.
        """
        load = usage * self.num_experts
        updates_above, assisted = self.widened("updates_above"), self.widened("assisted")
        above = (updates_above + 1).where(load > self.threshold, 0)
        begins, ends = above >= self.patience, load < self.lower_threshold
        counts = num_slots > 0
        updates_above.copy_(above.where(counts, updates_above))
        assisted.copy_(((self._is_assisted() | begins) & ~ends).where(counts, assisted))

    def _is_assisted(self) -> Tensor:
        return self.assisted > 0.5  # [E]

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"backup={self.backup}, threshold={self.threshold}, "
            f"lower_threshold={self.lower_threshold}, patience={self.patience}"
        )
