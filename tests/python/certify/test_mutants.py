"""Each law catches bugs that were reported about real layers.

The mutants that take long to be caught are left to `make certificates`, which asks every law of
every one of them.
"""

from __future__ import annotations

import pytest

from certify.mutants.references import adapter_of
from certify.mutants.registry import all_mutants
from torchmoe.testing import certify, known_laws

CAUGHT_BY = {
    "gradients": [
        "gelu_gradient_of_the_tanh_form",
        "gate_gradient_of_negative_weights",
        "transposed_gradient_misread",
    ],
    "reference": [
        "aux_not_divided_by_top_k",
        "biased_scores_as_weights",
        "down_bias_without_weight",
        "groups_scored_by_their_best",
        "interleaved_weights_read_as_halves",
        "jitter_reaches_the_experts",
        "probabilities_returned_as_logits",
        "scaling_applied_twice",
        "sequence_aux_over_the_batch",
        "weights_applied_twice",
        "weights_on_the_input",
    ],
    "router_gradient": [
        "fused_weights_without_gradient",
        "injected_aux_discarded",
        "injected_aux_times_tokens",
        "normalised_without_epsilon",
        "router_weights_detached",
        "top1_weight_always_one",
    ],
    "unrouted_tokens": [
        "aux_counts_padding",
        "dropped_tokens_keep_their_input",
        "minus_one_is_the_last_expert",
        "padding_counted_for_the_bias",
        "padding_takes_capacity",
    ],
    "accumulation": [
        "aux_added_twice",
        "backward_overwrites_x",
        "expanded_index_read_as_contiguous",
        "idle_expert_with_a_made_up_gradient",
        "padding_rows_added_to_token_0",
        "top1_normalised_over_tokens",
    ],
    "recomputation": [
        "bias_moves_with_every_micro_batch",
        "counts_twice_in_recomputation",
        "sums_in_another_order_each_time",
    ],
    "symmetry": [
        "closed_groups_filled_with_zero",
        "dx_of_one_choice_only",
        "group_mask_tiled",
        "softmax_over_the_sequence",
        "third_choices_share_slots",
    ],
    "balance": [
        "aux_constant_by_broadcast",
        "aux_of_one_token_squeezed",
        "aux_off_unless_asked_for",
        "aux_without_gradient",
        "z_loss_overflows",
    ],
    "idle_experts": [
        "aux_carried_over_from_evaluation",
        "aux_graph_kept_for_ever",
        "bias_in_bfloat16",
        "bias_never_moves",
        "counts_in_bfloat16",
        "counts_in_evaluation",
        "idle_expert_skipped",
        "idle_expert_with_an_old_gradient",
        "output_in_float32",
        "scores_rounded_before_top_k",
        "shared_gate_unused",
    ],
    "determinism": ["bias_update_leaves_the_buffer", "counts_shared_by_all_layers"],
    "higher_orders": ["forward_mode_without_the_router"],
}
MUTANTS = all_mutants()


@pytest.mark.parametrize(
    ("law", "name"), [(law, name) for law, names in CAUGHT_BY.items() for name in names]
)
def test_mutant_is_caught(law: str, name: str) -> None:
    certificate = certify(MUTANTS[name].make(0), adapter=adapter_of(MUTANTS[name]), laws=[law])
    assert {finding.law for finding in certificate.failures} == {law}
    assert all(finding.num_tokens <= 13 for finding in certificate.failures)


def test_every_law_is_tried() -> None:
    assert set(CAUGHT_BY) == {law.name for law in known_laws() if not law.on_request}
    assert sum(map(len, CAUGHT_BY.values())) >= 40
    assert len(MUTANTS) >= 90
