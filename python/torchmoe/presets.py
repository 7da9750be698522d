"""What other libraries and papers do, as arguments of `torchmoe.nn.MoE`.

    from torchmoe import presets

    moe = presets.st_moe.layer(512, 2048, 64)
    moe = presets.st_moe.layer(512, 2048, 64, capacity=None, activation="geglu", bias=True)
    print(presets.st_moe)

A preset says how tokens are routed and balanced, and how many shared experts there are; the caller
chooses what the experts compute. Printing a preset shows every argument it sets, where they come
from, and how the layer still differs from the original. Logits are formed in float32, even if the
original forms them in a 16-bit type. Two things are converted throughout, so that the results are
the same:

- A capacity factor that the original multiplies by T / E is divided by top_k, as ours multiplies
  top_k * T / E. Ours is also exact: an original that multiplies floats can be one slot off.
- If a balancing loss is a multiple of load_balancing_loss, the multiple is in balance.weight.
"""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torchmoe._checks import check_at_least
from torchmoe.nn.balance import Balance
from torchmoe.nn.capacity import Capacity
from torchmoe.nn.gate import Gate
from torchmoe.nn.moe import MoE
from torchmoe.nn.shared_experts import SharedExperts

_TEXTS = ("name", "description", "source", "sources", "differs")
_ROUTER_OPTIONS = ("input_jitter", "logit_noise")
_SHARED_OPTIONS = ("activation", "bias", "device", "dtype")
_SIZES = ("hidden_size", "intermediate_size", "num_experts")
_WIDTH = 88
_GATE, _BALANCE = Gate(), Balance()


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named set of arguments of `MoE`; the others have the layer's defaults.

    Attributes:
        name: the name in this module.
        description: what it is, in one paragraph.
        source: the paper and the code that it follows.
        sources: for each argument that the preset sets, where the source gives its value; the
            fields of a Gate and the like are listed one by one.
        top_k: see `MoE`.
        gate: see `MoE`.
        capacity: see `MoE`.
        balance: see `MoE`.
        routed_scaling_factor: see `MoE`.
        num_shared_experts: how many experts serve every token, each as wide as a routed one; they
            are built as one `SharedExperts`.
        input_jitter: see `Router`.
        logit_noise: see `Router`.
        differs: how the layer differs from the original, a sentence or two for each difference.
    """

    name: str
    description: str
    source: str
    sources: Mapping[str, str]
    top_k: int
    gate: Gate = _GATE
    capacity: Capacity | None = None
    balance: Balance = _BALANCE
    routed_scaling_factor: float = 1.0
    num_shared_experts: int = 0
    input_jitter: float = 0.0
    logit_noise: float = 0.0
    differs: tuple[str, ...]

    def layer(
        self, hidden_size: int, intermediate_size: int | None, num_experts: int, **changes: object
    ) -> MoE:
        """A layer with the preset's arguments.

        Args:
            hidden_size: H.
            intermediate_size: the experts' inner width; may be None if `experts` are given and the
                preset builds no shared ones.
            num_experts: E.
            changes: arguments of `MoE`, num_shared_experts, and input_jitter and logit_noise of its
                router; each replaces the preset's.

        Returns:
            The layer. A `router` among the changes replaces the preset's together with its noise,
            and `shared_experts`, None included, replaces those that the preset makes.

        Raises:
            TypeError: a change is not an argument of the layer, noise is given along with a router,
                or num_shared_experts along with shared_experts.
            ValueError: num_shared_experts is below 0, or their width is not known.
        """
        options = {*_ROUTER_OPTIONS, "num_shared_experts"}
        known = ({*inspect.signature(MoE).parameters} | options) - {*_SIZES}
        if unknown := [name for name in changes if name not in known]:
            raise TypeError(
                "Preset: changes must be arguments of MoE, num_shared_experts, input_jitter or "
                f'logit_noise, got "{unknown[0]}"'
            )
        arguments = self._arguments() | changes
        num_shared = arguments.pop("num_shared_experts")
        check_at_least("Preset", "num_shared_experts", num_shared, 0)
        if "shared_experts" in changes:
            if "num_shared_experts" in changes:
                raise TypeError(
                    "Preset: num_shared_experts must not be given along with shared_experts, "
                    f"got {num_shared}"
                )
            num_shared = 0
        if num_shared and intermediate_size is None:
            raise ValueError(
                "Preset: intermediate_size must be given for the shared experts' width, or "
                "shared_experts=None, got None"
            )
        noise = {option: arguments.pop(option) for option in _ROUTER_OPTIONS}
        replaced = arguments.get("router") is not None
        if replaced and (given := [option for option in _ROUTER_OPTIONS if option in changes]):
            raise TypeError(
                f"Preset: {given[0]} must be set on the router that is given, "
                f"got {changes[given[0]]!r} along with it"
            )
        moe = MoE(hidden_size, intermediate_size, num_experts, **arguments)
        if not replaced:
            # On the router that the layer makes, which knows whether it has to keep usage.
            for option, level in noise.items():
                setattr(moe.router, option, level)
        if num_shared and intermediate_size is not None:
            # After the others, so that those draw the same values as without shared experts.
            same = {name: changes[name] for name in _SHARED_OPTIONS if name in changes}
            width = num_shared * intermediate_size
            moe.shared_experts = SharedExperts(hidden_size, width, **cast(Any, same))
        return moe

    def __str__(self) -> str:
        """Every argument with its value and where it comes from, the source and the differences."""
        lines = {name: repr(value) for name, value in _lines(self._arguments())}
        names, values = max(map(len, lines)), max(map(len, lines.values()))
        return "\n".join(
            [
                self.name,
                "",
                *textwrap.wrap(self.description, _WIDTH),
                "",
                *(
                    f"  {name:<{names}}  {value:<{values}}  {self.sources.get(name, '')}".rstrip()
                    for name, value in lines.items()
                ),
                "",
                *textwrap.wrap(f"Source: {self.source}", _WIDTH),
                "",
                "Differs from it:",
                *(
                    textwrap.fill(sentence, _WIDTH, initial_indent="- ", subsequent_indent="  ")
                    for sentence in self.differs
                ),
            ]
        )

    def _arguments(self) -> dict[str, Any]:
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if f.name not in _TEXTS}


def _lines(arguments: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values to print; those of a Gate or a Capacity follow one by one."""
    for name, value in arguments.items():
        if not dataclasses.is_dataclass(value):
            yield name, value
            continue
        for part in dataclasses.fields(value):
            if part.init:
                yield f"{name}.{part.name}", getattr(value, part.name)


_WHOLE_CALL = (
    "Capacity, f and P are those of all tokens of the call, not of groups of tokens (sequences, "
    "or shares of a device) one by one."
)

switch = Preset(
    name="switch",
    description=(
        "Switch Transformer: one expert per token, its output times its probability; an expert "
        "takes up to 1.25 times the even share of the tokens, first come first served, and drops "
        "the rest. The router sees slightly perturbed tokens in training."
    ),
    source=(
        "Fedus et al., arXiv 2101.03961; mesh_tensorflow/transformer/moe.py (MoE1D with "
        'moe_gating="switch": _switch_gating).'
    ),
    sources={
        "top_k": "section 2.1",
        "gate.normalize": "equation 2: y = sum of p_i E_i(x)",
        "capacity.factor": "moe_capacity_factor_train",
        "capacity.eval_factor": "moe_capacity_factor_eval",
        "capacity.minimum": "moe_min_expert_capacity",
        "capacity.rounding": "_switch_gating: int()",
        "balance.weight": "section 2.2: alpha = 10^-2",
        "input_jitter": "moe_switch_jitter",
    },
    top_k=1,
    gate=Gate(normalize="none"),
    capacity=Capacity(1.25, eval_factor=2.0, minimum=4, rounding="down"),
    input_jitter=0.01,
    differs=(
        _WHOLE_CALL,
        "Padding counts in f there, and in the number of tokens of the loss's means.",
        'Another gating of Mesh TensorFlow, "ntlb", offers an overflowing token to its next three '
        'choices, once all first choices are placed; Capacity(overflow="next_best") reroutes at '
        "once and tries all experts.",
        "The port in Transformers has a fixed capacity (64) for every sequence, also in "
        "evaluation, takes 0.001 as coefficient, forms one loss from the pooled tokens of all "
        "layers, and in float32 multiplies the experts' input by the jitter too.",
    ),
)

gshard = Preset(
    name="gshard",
    description=(
        "GShard: two experts per token, weighted by their probabilities over the sum of both; an "
        "expert takes up to twice the even share of the tokens, all first choices before any "
        "second one. The balancing loss counts first choices only."
    ),
    source=(
        "Lepikhin et al., arXiv 2006.16668, algorithm 1; lingvo/core/gshard_layers.py "
        "(Top2GatingOnLogits) and gshard_builder.py (aux_loss_coef)."
    ),
    sources={
        "top_k": "algorithm 1",
        "gate.normalize": "algorithm 1: g_i / (g_1 + g_2)",
        "capacity.factor": "algorithm 1: 2 S / E, over top_k",
        "capacity.rounding": "Top2GatingOnLogits: integer division",
        "balance.weight": "aux_loss_coef",
        "balance.fraction_choices": "algorithm 1: c_e of first choices",
    },
    top_k=2,
    gate=Gate(normalize="topk"),
    # C = 2 S / E for the S tokens of a group: top_k times 1.
    capacity=Capacity(1.0, rounding="down"),
    balance=Balance(fraction_choices="first"),
    differs=(
        _WHOLE_CALL,
        "Padding counts in the number of tokens of the loss's means in Lingvo, not with "
        "legacy_mtf_behavior=False.",
        "A second expert is always used; the paper dispatches to it with probability "
        'min(1, 2 * weight), and Lingvo does with second_expert_policy="random" (its default is '
        '"all").',
        "Lingvo rounds a capacity up to a multiple of 4, and with legacy_mtf_behavior=False "
        'normalises after dropping: Capacity(normalize="after_drop").',
        "The paper writes the loss as 1 / E * sum f P; the code, as here, as E * sum f P.",
    ),
)

st_moe = Preset(
    name="st_moe",
    description=(
        "ST-MoE: GShard's choice of two with a capacity of 1.25 * T / E, counted without top_k, so "
        "that a good third of all slots is dropped even in balance; weights are normalised before "
        "dropping. The router z-loss keeps the logits small."
    ),
    source=(
        "Zoph et al., arXiv 2202.08906; mesh_tensorflow/transformer/moe.py (MoE1D with "
        'moe_gating="top_2": _top_2_gating); st-moe-pytorch (TopNGating).'
    ),
    sources={
        "top_k": 'moe_gating="top_2"',
        "gate.normalize": "_top_2_gating: gates over their sum",
        "capacity.factor": "1.25 in training, over top_k",
        "capacity.eval_factor": "2.0 in evaluation, over top_k",
        "capacity.minimum": "moe_min_expert_capacity",
        "capacity.rounding": "_top_2_gating: int()",
        "balance.weight": "moe_loss_coef",
        "balance.z_loss_weight": "the paper: c_z = 0.001",
        "balance.fraction_choices": "_top_2_gating: density_1",
    },
    top_k=2,
    gate=Gate(normalize="topk"),
    # 1.25 and 2.0 of T / E, over top_k = 2.
    capacity=Capacity(0.625, eval_factor=1.0, minimum=4, rounding="down"),
    balance=Balance(z_loss_weight=0.001, fraction_choices="first"),
    differs=(
        _WHOLE_CALL,
        "Padding counts in the number of tokens of the loss's means in Mesh TensorFlow, which has "
        "the router z-loss in its switch gating only.",
        "A second expert is always used; the original dispatches to it with probability "
        "min(1, weight / 0.2).",
        "The capacity factors hold for top_k=2: with another top_k they are 1.25 / top_k and "
        "2.0 / top_k.",
        "st-moe-pytorch counts f after dropping (Mesh TensorFlow before, as here), lets the router "
        "learn from the tokens that an expert receives as if they were multiplied by the weights "
        "(straight_through_dispatch_tensor=True), and has no losses in evaluation.",
    ),
)

megatron = Preset(
    name="megatron",
    description=(
        "Megatron-Core's TopKRouter with token dropping: softmax over the chosen logits; an expert "
        "keeps its even share of all slots times the factor, those with the largest weights, "
        "whoever comes first. The balancing loss counts all choices."
    ),
    source=(
        "megatron/core/transformer/moe/moe_utils.py (topk_routing_with_score_function, "
        "apply_router_token_dropping, switch_load_balancing_loss_func) and router.py."
    ),
    sources={
        "top_k": "moe_router_topk",
        "gate.normalize": "softmax of the chosen logits",
        "capacity.factor": "moe_expert_capacity_factor",
        "capacity.priority": "moe_token_drop_policy: probs",
        "balance.weight": "moe_aux_loss_coeff",
    },
    top_k=2,
    gate=Gate(normalize="topk"),
    capacity=Capacity(1.0, priority="weight"),
    differs=(
        "Megatron-Core drops nothing until moe_expert_capacity_factor is given (capacity=None is "
        "that) and has no balancing loss until moe_aux_loss_coeff is; 1.0 and 1e-2 are the values "
        "its documentation names.",
        'f is that of this process; with a process_group Balance(fraction_from="global_batch") adds'
        " the counts of tensor- and context-parallel processes, as Megatron-Core does.",
        "Of equal weights the earlier slot is kept; Megatron-Core leaves that to torch.topk.",
        'moe_token_drop_policy="position" keeps arbitrary slots there, as a top-k over equal '
        'values; Capacity(priority=None, order="token") keeps the first.',
    ),
)

deepspeed = Preset(
    name="deepspeed",
    description=(
        "DeepSpeed-MoE with its defaults: one expert per token, its output times its probability; "
        "an expert takes its even share of the tokens, at least 4, and drops random ones of the "
        "rest (random token selection)."
    ),
    source=(
        "Rajbhandari et al., arXiv 2201.05596; deepspeed/moe/sharded_moe.py (top1gating, "
        "top2gating, topkgating)."
    ),
    sources={
        "top_k": "k",
        "capacity.factor": "capacity_factor",
        "capacity.minimum": "min_capacity",
        "capacity.priority": "use_rts",
        "capacity.normalize": "top2gating: after the mask of locations",
        "balance.weight": "moe-loss-coeff of the examples",
    },
    top_k=1,
    capacity=Capacity(1.0, minimum=4, priority="random", normalize="after_drop"),
    differs=(
        "DeepSpeed leaves the coefficient of its loss to the training script; 0.01 is that of "
        "Megatron-DeepSpeed's examples.",
        "DeepSpeed drops random tokens in evaluation too, where the layer goes by token order.",
        "The capacity is that of all counted tokens; DeepSpeed counts tokens that used_token masks "
        "out for the capacity and in the loss's means.",
        "With top_k=2 DeepSpeed drops late tokens and counts first choices: Capacity(priority="
        'None) and fraction_choices="first" here. It also adds Gumbel noise to the logits of the '
        "second choice, which has no counterpart (top2_2nd_expert_sampling=False turns it off).",
        'With top_k > 2 it keeps the slots of largest probability. Capacity(priority="weight") '
        "ranks by the normalised weights instead, which can keep others.",
    ),
)

mixtral_hf = Preset(
    name="mixtral_hf",
    description=(
        "Mixtral as in Hugging Face Transformers: two experts per token, weighted by their "
        "probabilities over the sum of both, no capacity. Its balancing loss counts all choices of "
        "a token as tokens, so that f sums to 2 and the loss is twice ours."
    ),
    source=(
        "Jiang et al., arXiv 2401.04088; transformers/models/mixtral/modeling_mixtral.py "
        "(MixtralSparseMoeBlock, load_balancing_loss_func)."
    ),
    sources={
        "top_k": "num_experts_per_tok",
        "gate.normalize": "MixtralSparseMoeBlock: over their sum",
        "balance.weight": "router_aux_loss_coef 0.001, times top_k",
    },
    top_k=2,
    gate=Gate(normalize="topk"),
    # router_aux_loss_coef = 0.001, times top_k.
    balance=Balance(0.002),
    differs=(
        "One loss per layer, to be added up; Transformers pools the tokens of all layers into one "
        "f and one P, where layers that collapse onto different experts look balanced.",
        "balance.weight holds for top_k=2: with another top_k it is 0.001 * top_k. Transformers "
        "adds its loss only with output_router_logits=True, which is not its default.",
        "Transformers' router_jitter_noise (0 by default) also perturbs what the experts see, in "
        "place; input_jitter concerns the router alone.",
    ),
)

deepseek_v3 = Preset(
    name="deepseek_v3",
    description=(
        "DeepSeek-V3: eight of the experts in the best four of eight groups, chosen by sigmoid "
        "scores plus a bias that moves against the load, weighted by the scores over their sum "
        "times 2.5; no capacity. One more of the same width serves every token, unscaled. A small "
        "balancing loss looks at each sequence."
    ),
    source=(
        "DeepSeek-AI, arXiv 2412.19437; inference/model.py of DeepSeek-V3 (Gate, MoE) and "
        "config_671B.json; transformers/models/deepseek_v3/modeling_deepseek_v3.py (DeepseekV3MoE)."
    ),
    sources={
        "top_k": "n_activated_experts",
        "gate.score_function": "score_func",
        "gate.normalize": "Gate: weights over their sum",
        "gate.num_groups": "n_expert_groups",
        "gate.top_groups": "n_limited_groups",
        "balance.weight": "section 4.2: alpha",
        "balance.fraction_from": "equation 17",
        "balance.selection_bias_rate": "section 4.2: gamma",
        "routed_scaling_factor": "route_scale",
        "num_shared_experts": "n_shared_experts",
    },
    top_k=8,
    gate=Gate(score_function="sigmoid", normalize="topk", num_groups=8, top_groups=4),
    balance=Balance(0.0001, fraction_from="sequence", selection_bias_rate=0.001),
    routed_scaling_factor=2.5,
    num_shared_experts=1,
    differs=(
        "f counts the experts that a token uses; the paper's balancing loss counts the top_k of "
        "its scores without bias and groups.",
        "The bias moves when moe.update is called and the rate stays; the paper sets it to 0 for "
        "the last 500 billion of 14.8 trillion tokens.",
        "A group that is not chosen is out, as in DeepSeek's own code; versions of Transformers "
        "that mask with 0.0 instead of -inf use it where a biased score is negative.",
    ),
)

#: The presets by name.
PRESETS = {
    preset.name: preset
    for preset in (switch, gshard, st_moe, megatron, deepspeed, mixtral_hf, deepseek_v3)
}

__all__ = ["PRESETS", "Preset", *PRESETS]
