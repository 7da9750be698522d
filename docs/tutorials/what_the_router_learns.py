r"""
What the router learns, and when it does not
============================================

A router chooses experts, and a choice has no derivative: move a logit a little, and the same
experts are chosen. How can it learn at all? Through the *weights* that the chosen experts' outputs
are added up with:

.. math:: y = \sum_j w_j E_j(x), \qquad \frac{\partial L}{\partial w_j} =
   \left\langle \frac{\partial L}{\partial y}, E_j(x) \right\rangle

The number on the right says whether more of expert j would help this token. What becomes of it on
the way to the logits is up to a *gradient estimator*. This tutorial shows a case in which nothing
arrives, what each of six estimators lets the router hear, and what that is worth where the right
choice is known. For the layer see :doc:`first_layer`, for the formulas :doc:`/estimators`.
"""

# sphinx_gallery_start_ignore
import matplotlib.pyplot as plt

plt.rcParams["figure.constrained_layout.use"] = True
# sphinx_gallery_end_ignore
# %%
# When does a router learn nothing?
# ---------------------------------
#
# Weights are often normalised: the scores of the chosen experts, divided by their sum. Now let a
# token have a single expert. Here it is in plain PyTorch:

import torch

logits = torch.tensor([[0.3, 1.2, -0.5]], requires_grad=True)
scores = logits.softmax(dim=-1)
best = scores.topk(1, dim=-1).values
weight = best / best.sum(dim=-1, keepdim=True)

(gradient,) = torch.autograd.grad(weight.sum(), logits, retain_graph=True)
print(f"score {best.item():.2f}   weight {weight.item():.2f}   gradient {gradient.abs().max():.4f}")
# sphinx_gallery_start_ignore
assert gradient.abs().max() < 1e-6
# sphinx_gallery_end_ignore

# %%
# A number divided by itself is 1, whatever it is. The weight does not depend on the logits, so the
# gradient is zero, for every token, for ever. Such a model trains without any error: its experts
# learn, and its router stays as it was drawn. The layer therefore refuses:

import textwrap

from torchmoe.nn import Balance, Gate, MoE

x, target = torch.randn(64, 16), torch.randn(64, 16)
try:
    MoE(16, 32, num_experts=8, top_k=1, gate=Gate(normalize="topk"))(x)
except ValueError as error:
    print("\n".join(textwrap.wrap(str(error), 96)))
# sphinx_gallery_start_ignore
else:
    raise AssertionError("the layer must refuse")
# sphinx_gallery_end_ignore

# %%
# The message names the ways out. Without normalisation the weight is the score, which has a
# derivative. With ``straight_through`` the output stays as it is, and the backward pass acts as if
# the weight were the score.

print("normalize   estimator          |gradient of the router|")
for normalize, estimator in (("none", "exact"), ("topk", "straight_through")):
    torch.manual_seed(0)
    gate = Gate(normalize=normalize, estimator=estimator)
    moe = MoE(16, 32, num_experts=8, top_k=1, gate=gate)
    (moe(x).hidden_states - target).square().mean().backward()
    print(f"{normalize:9}   {estimator:16}   {moe.router.weight.grad.norm():.4f}")
    # sphinx_gallery_start_ignore
    assert moe.router.weight.grad.norm() > 1e-4
    # sphinx_gallery_end_ignore

# %%
# Which is why ``Gate()``, which leaves ``normalize`` open, takes "none" for one expert per token
# and "topk" for several.
#
# What does each estimator let the router hear?
# ---------------------------------------------
#
# We ask for the derivative of one token's loss by its six logits. Experts 2 and 3 have the largest
# logits. The parameters are the same in every row; only the estimator differs. (``default_vector``
# remembers what experts gave on average, so it first gets some updates. ``SparseMixer`` comes
# twice, for a reason that we shall see.)

from torchmoe.nn import SparseMixer, known_estimators

print(f"{'estimator':24}   chosen  ", *(f"{f'expert {i}':>9}" for i in range(6)))
heard = {}
for estimator in (*known_estimators(), SparseMixer(jitter=1.0)):
    torch.manual_seed(0)
    token, wanted = torch.randn(1, 16), torch.randn(1, 16)
    torch.manual_seed(1)
    moe = MoE(16, 32, num_experts=6, top_k=2, gate=Gate(estimator=estimator), balance=Balance(0))
    if estimator == "default_vector":
        for _ in range(200):
            moe.update(moe(torch.randn(64, 16)).routing)
    torch.manual_seed(2)
    output = moe(token)
    loss = (output.hidden_states - wanted).square().sum()
    (gradient,) = torch.autograd.grad(loss, output.routing.logits)

    name = estimator if isinstance(estimator, str) else "SparseMixer(jitter=1.0)"
    cells = (f"{value:+9.3f}" if value else f"{'0':>9}" for value in gradient[0].tolist())
    heard[name] = gradient[0]
    print(f"{name:24}   {output.routing.indices[0].tolist()}  ", *cells)
# sphinx_gallery_start_ignore
assert (heard["exact"] != 0).tolist() == [False, False, True, True, False, False]
assert heard["exact"].sum().abs() < 1e-5
assert heard["sparsemixer"].abs().max() == 0
for _name in heard.keys() - {"exact", "sparsemixer"}:
    assert (heard[_name] != 0).all()
assert heard["straight_through"][[0, 1, 4, 5]].abs().max() < 0.01
# sphinx_gallery_end_ignore

# %%
# - ``exact`` knows the two chosen experts only, and because their weights add up to 1 it can only
#   move weight from one to the other: the two entries are opposite.
# - ``straight_through`` judges each of the two by itself. The others move a little, all in one
#   direction: in a softmax, what one score loses the rest gain. Nothing is known of *them*.
# - ``straight_through_dense`` computes all experts in the backward pass, and tells some of those
#   not chosen up and some down. It pays for that.
# - ``default_vector`` has an opinion about all too, from each expert's average output. It is
#   cheap, and it need not agree with the row above.
# - ``gumbel_straight_through`` and ``sparsemixer`` draw the experts, so one that is not the best
#   gets its turn. With its default setting, ``sparsemixer`` has nothing to say about this token.
#
# A problem in which the right choice is known
# --------------------------------------------
#
# Tokens come from eight clusters, and there are eight experts: fixed linear maps, none of which
# learns. The target of a token of cluster c is what expert c makes of it. The router has to find
# that out, with one expert per token. So the share of tokens that go to their cluster's expert is
# an accuracy, and guessing gives one eighth.

from torchmoe.nn import ExpertList

CLUSTERS, WIDTH, BATCH = 8, 16, 256


class Problem:
    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.centres = torch.randn(CLUSTERS, WIDTH, generator=self.generator)
        shape = CLUSTERS, WIDTH, WIDTH
        self.maps = torch.randn(shape, generator=self.generator) / WIDTH**0.5

    def batch(self):
        cluster = torch.randint(CLUSTERS, (BATCH,), generator=self.generator)
        noise = torch.randn(BATCH, WIDTH, generator=self.generator)
        x = self.centres[cluster] + 0.5 * noise
        return x, torch.einsum("ti,toi->to", x, self.maps[cluster]), cluster

    def experts(self):
        experts = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(CLUSTERS)]
        for expert, weight in zip(experts, self.maps, strict=True):
            expert.weight = torch.nn.Parameter(weight, requires_grad=False)
        return ExpertList(experts)


# %%
# Training is as ever, for the router alone. No balancing loss: here we want to see the estimator.


def learn_to_route(gate, seed, steps=300):
    problem = Problem(seed)
    torch.manual_seed(seed)
    moe = MoE(WIDTH, None, CLUSTERS, 1, gate=gate, experts=problem.experts(), balance=Balance(0))
    optimizer = torch.optim.Adam(moe.router.parameters(), lr=0.01)
    accuracy = []
    for _ in range(steps):
        x, target, cluster = problem.batch()
        output = moe(x)
        (output.hidden_states - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        moe.update(output.routing)
        accuracy.append((output.routing.logits.argmax(1) == cluster).float().mean())
    return torch.stack(accuracy).view(-1, 10).mean(1)  # means of 10 steps


torch.set_num_threads(1)  # the products are too small to be worth sharing among threads
GATES = {
    "exact": lambda: Gate(),
    "straight_through": lambda: Gate(normalize="topk", estimator="straight_through"),
    "straight_through_dense": lambda: Gate(estimator="straight_through_dense"),
    "default_vector": lambda: Gate(estimator="default_vector"),
    "sparsemixer": lambda: Gate(estimator="sparsemixer"),
    "SparseMixer(jitter=1.0)": lambda: Gate(estimator=SparseMixer(jitter=1.0)),
    "gumbel_straight_through": lambda: Gate(estimator="gumbel_straight_through"),
}
SEEDS = range(5)
curves = {
    name: torch.stack([learn_to_route(gate(), seed) for seed in SEEDS])
    for name, gate in GATES.items()
}  # [5, 30] each

# %%
# Who learns to route, and how fast?
# ----------------------------------
#
# (``straight_through`` has normalised weights here, as a single expert's weights without
# normalisation would make it the same as ``exact``.)


def first_step_at(curve, level=0.9):
    reached = (curve >= level).nonzero()
    return 10 * int(reached[0]) + 10 if len(reached) else None


print(f"{'':24}   steps to 90 %, by seed    accuracy at the end, by seed")
for name, curve in curves.items():
    steps = [first_step_at(one) for one in curve]
    cells = " ".join(f"{'-' if step is None else step:>4}" for step in steps)
    print(f"{name:24}   {cells}   ", "  ".join(f"{value:.2f}" for value in curve[:, -1]))
# sphinx_gallery_start_ignore
STEPS_TO = {name: [first_step_at(one) for one in curve] for name, curve in curves.items()}
assert None not in STEPS_TO["exact"] + STEPS_TO["straight_through_dense"]
for _dense, _exact in zip(STEPS_TO["straight_through_dense"], STEPS_TO["exact"], strict=True):
    assert 1.3 * _dense < _exact
assert curves["exact"][:, -1].min() > 0.95
assert curves["straight_through_dense"][:, -1].min() > 0.95
assert curves["sparsemixer"][:, -1].max() < 0.6
assert curves["default_vector"][:, -1].mean() < 0.9
assert None not in STEPS_TO["straight_through"]
assert curves["straight_through"][:, 15:].min() < 0.85
assert curves["SparseMixer(jitter=1.0)"][:, -1].mean() > 0.9


def draw_accuracy(panel, names, title):
    colours = {
        "exact": "black",
        "straight_through": "#0072b2",
        "gumbel_straight_through": "#e69f00",
        "straight_through_dense": "#009e73",
        "default_vector": "#cc79a7",
        "sparsemixer": "#d55e00",
        "SparseMixer(jitter=1.0)": "#56b4e9",
    }
    steps = torch.arange(10, 301, 10)
    for name in names:
        curve = curves[name]
        panel.plot(steps, curve.mean(0), color=colours[name], label=name)
        panel.fill_between(
            steps, curve.amin(0), curve.amax(0), color=colours[name], alpha=0.13, linewidth=0
        )
    panel.axhline(1 / 8, color="0.5", linestyle=":", linewidth=1)
    panel.set(xlabel="step", ylim=(0, 1.03), title=title)
    panel.legend(fontsize=8, loc="lower right")


figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
draw_accuracy(
    panels[0],
    ("exact", "straight_through", "straight_through_dense", "default_vector"),
    "The best expert is chosen",
)
draw_accuracy(
    panels[1],
    ("exact", "gumbel_straight_through", "sparsemixer", "SparseMixer(jitter=1.0)"),
    "The expert is drawn, compared with exact",
)
panels[0].set_ylabel("share of tokens at the right expert")
figure.suptitle(
    "Accuracy of the routing: mean of five seeds, band from least to most; dots: guessing"
)
plt.show()
# sphinx_gallery_end_ignore

# %%
# ``exact`` gets there by trial and error. It hears of one expert per token: if that one is wrong,
# its score falls until another is best, and that one is tried. ``straight_through_dense`` hears of
# all eight at once, and is faster in every one of the seeds.
#
# Three rows have not found all of it in the 300 steps.
#
# - ``straight_through`` is fast, and in some seeds loses part of what it had. With weight 1 the
#   output of the right expert is the target itself, so a token that is where it belongs has no
#   loss, and no gradient that would hold it there while others move the router.
# - ``default_vector`` judges an expert that was not chosen by what it gave other tokens. Here that
#   says little: expert 3's average, over the tokens that it serves, is not what it would make of
#   this one.
# - ``sparsemixer`` with its default setting does not get there. Why?
#
# A draw needs something to draw from
# -----------------------------------
#
# SparseMixer lets an expert compete only if its logit is close to the largest: closer than ``2 *
# jitter`` of the size of the two. If nobody is, the best expert is alone, its weight is 1, and we
# are back at the first question of this page. How often is that so in a new layer?

for jitter in (0.01, 0.1, 1.0):
    torch.manual_seed(0)
    problem = Problem(seed=0)
    gate = Gate(estimator=SparseMixer(jitter=jitter))
    moe = MoE(WIDTH, None, CLUSTERS, 1, gate=gate, experts=problem.experts()).eval()
    weights = moe(problem.batch()[0]).routing.weights
    alone = (weights == 1).float().mean()
    print(f"jitter {jitter:4}   tokens whose best expert is alone: {alone:4.0%}")
    # sphinx_gallery_start_ignore
    if jitter == 0.01:
        assert alone > 0.8
    if jitter == 1.0:
        assert alone < 0.01
# sphinx_gallery_end_ignore

# %%
# With the default setting, most tokens tell the router nothing here. The logits of this small
# layer are too far apart, compared with their size. With ``jitter=1.0`` nobody is alone, and the
# table above shows what that does.
#
# How good is the gradient itself?
# --------------------------------
#
# Training mixes many things. ``compare_estimators`` looks at one gradient: that of the router,
# compared with what it would be if the layer computed all experts. A cosine of 1 is the same
# direction. An estimator that draws gets five draws; ``bias`` is what remains of the error when
# they are averaged, and ``deviation`` what the draws differ by, both over the length of the dense
# gradient.

from torchmoe.testing import compare_estimators

problem = Problem(seed=0)
torch.manual_seed(0)
moe = MoE(WIDTH, None, CLUSTERS, 1, experts=problem.experts())
comparison = compare_estimators(
    moe,
    [problem.batch() for _ in range(4)],
    lambda y, batch: (y - batch[1]).square().mean(),
    estimators=[*known_estimators(), SparseMixer(jitter=1.0)],
)
print(f"{'':24}   cosine   norm ratio   bias   deviation")
for name, result in zip(
    (*known_estimators(), "SparseMixer(jitter=1.0)"), comparison.results, strict=True
):
    print(
        f"{name:24}   {result.cosine:6.2f}   {result.norm_ratio:10.2f}   {result.bias:4.2f}"
        f"   {result.deviation:9.2f}"
    )
# sphinx_gallery_start_ignore
COSINE = {result.name: result.cosine for result in comparison.results}
assert COSINE["exact"] == COSINE["straight_through"]
assert COSINE["straight_through_dense"] == max(COSINE.values())
# sphinx_gallery_end_ignore

# %%
# ``straight_through`` has the row of ``exact`` here, since the weights are not normalised. The
# dense one is nearest, as it should be. The last two rows, which draw, have short gradients in the
# right direction, and a learning rate makes up for length: Adam divides by it. None of this says
# how training ends.
#
# And when the experts learn too?
# -------------------------------
#
# Fixed experts made the right choice known, and they are not what people train. So the same
# problem once more, with experts that learn, from scratch, and a balancing loss as usual. There is
# no right expert for a cluster now, so we measure two other things on new tokens: the loss, as a
# share of the target's own size, and what a token's expert tells about its cluster, 0 for nothing
# and 1 for everything (the mutual information of the two over the entropy of the clusters).


def told(expert, cluster):
    pairs = torch.bincount(8 * expert + cluster, minlength=64).view(8, 8) / len(cluster)
    entropy = [torch.special.entr(p).sum() for p in (pairs, pairs.sum(0), pairs.sum(1))]
    return ((entropy[1] + entropy[2] - entropy[0]) / entropy[1]).item()


def learn_everything(gate, seed, steps=600):
    problem = Problem(seed)
    torch.manual_seed(seed)
    moe = MoE(WIDTH, 16, CLUSTERS, 1, gate=gate)
    optimizer = torch.optim.Adam(moe.parameters(), lr=3e-3)
    for _ in range(steps):
        x, target, _ = problem.batch()
        output = moe(x)
        ((output.hidden_states - target).square().mean() + output.aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        moe.update(output.routing)
    batches = zip(*(problem.batch() for _ in range(8)), strict=True)
    x, target, cluster = map(torch.cat, batches)
    output = moe.eval()(x)  # without draws
    loss = (output.hidden_states - target).square().mean() / target.square().mean()
    return loss.item(), told(output.routing.indices[:, 0], cluster)


learned = {
    name: torch.tensor([learn_everything(gate(), seed) for seed in SEEDS])
    for name, gate in GATES.items()
}  # [5, 2] each

# %%
# Five seeds are few, so the difference from ``exact`` comes with an interval. It is formed from
# the five differences at equal seed, and is wide enough that all six intervals hold together with
# 95 % (Student's t with four degrees of freedom, 4.85 standard errors).

DEVIATIONS = 4.85
print(f"{'':24}   told   loss by seed                    above exact, and interval")
intervals = {}
for name, values in learned.items():
    losses, (_, mean_told) = values[:, 0], values.mean(0)
    cells = " ".join(f"{value:.3f}" for value in losses)
    above = losses - learned["exact"][:, 0]
    mean, half = above.mean(), DEVIATIONS * above.std() / len(SEEDS) ** 0.5
    intervals[name] = (mean - half, mean + half)
    interval = "" if name == "exact" else f"{mean:+.3f}  ({mean - half:+.3f} to {mean + half:+.3f})"
    print(f"{name:24}   {mean_told:.2f}   {cells}   {interval}")
# sphinx_gallery_start_ignore
for _name in ("SparseMixer(jitter=1.0)", "gumbel_straight_through"):
    assert intervals[_name][0] > 0.01
    assert learned[_name][:, 0].mean() > 2 * learned["exact"][:, 0].mean()
for _name in ("straight_through", "straight_through_dense", "default_vector", "sparsemixer"):
    assert intervals[_name][0] < 0.01
    assert intervals[_name][1] > -0.01

figure, axes = plt.subplots(figsize=(8, 3.3))
for place, values in enumerate(learned.values()):
    axes.plot(values[:, 0], [place] * len(SEEDS), "o", color="#0072b2", alpha=0.6)
    axes.plot(values[:, 0].mean(), place, "|", color="#d55e00", markersize=20, markeredgewidth=2)
axes.set_yticks(range(len(learned)), list(learned))
axes.invert_yaxis()
axes.set_xlim(left=0)
axes.set(
    xlabel="loss on new tokens (1 = a layer that gives 0)",
    title="With experts that learn: five seeds and their mean",
)
plt.show()
# sphinx_gallery_end_ignore

# %%
# The order is another one.
#
# - The two that draw among many experts routed perfectly when experts were fixed, and are now
#   clearly worse than ``exact``. A draw sends tokens to experts that are not theirs, and now those
#   experts learn from them.
# - ``sparsemixer`` with its default setting was the worst at finding fixed experts, and here it is
#   about as good as ``exact``: experts can come to the router, too.
# - For ``sparsemixer`` and the other three, any difference from ``exact`` may be below 0.01. Five
#   seeds of this problem show no larger one, not even for the dense gradient, which costs all
#   experts in the backward pass.
#
# What to remember
# ----------------
#
# - One expert per token with normalised weights teaches the router nothing. Leave the weights
#   unnormalised, or take ``straight_through``.
# - Estimators differ in whom the router hears of, and that decides how fast it finds experts that
#   are there already.
# - Where experts learn too, a gradient closer to the dense one need not end in a lower loss.
#   Compare on your own task, with several seeds; :doc:`/estimators` says how, and has the results
#   for a language model.
#
# What else can go wrong with a router is the subject of :doc:`collapse_and_cures`.
