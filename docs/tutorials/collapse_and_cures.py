"""
Collapse and its cures
======================

A router is *collapsed* when it sends every token to the same few experts. The others are in memory
and do nothing. This happens by itself: an expert that is chosen learns, so it is worth choosing.

This tutorial starts a layer in that state, looks at its gradients to see why it stays there, and
tries what is said to help: balancing losses, a bias, entropies, a z-loss, a capacity. A table at
the end says what did. For the layer itself see :doc:`first_layer`, for all settings
:doc:`/balance`.
"""

# sphinx_gallery_start_ignore
import matplotlib.pyplot as plt

plt.rcParams["figure.constrained_layout.use"] = True
# sphinx_gallery_end_ignore
# %%
# A task in which experts pay
# ---------------------------
#
# Tokens come from 16 clusters. What is to be learned is a linear map that all of them share, plus
# a smaller one of each cluster's own. A sequence of 32 tokens is about four clusters, as a text is
# about few things.

import math

import torch

CLUSTERS, SEQUENCES, LENGTH, WIDTH, OWN_SHARE = 16, 8, 32, 31, 0.1


class Task:
    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.centres = self.normal(CLUSTERS, WIDTH)
        self.common = self.normal(WIDTH, 32) / math.sqrt(2 * WIDTH)
        self.own = self.normal(CLUSTERS, WIDTH, 32) / math.sqrt(WIDTH)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def batch(self):
        topics = torch.rand(SEQUENCES, CLUSTERS, generator=self.generator).topk(4).indices
        which = torch.randint(4, (SEQUENCES, LENGTH), generator=self.generator)
        cluster = topics.gather(1, which)  # [8, 32]
        offset = self.normal(SEQUENCES, LENGTH, WIDTH)
        place = self.centres[cluster] + offset
        own = torch.einsum("bsi,bsio->bso", offset, self.own[cluster])
        target = math.sqrt(1 - OWN_SHARE) * place @ self.common + math.sqrt(OWN_SHARE) * own
        tokens = torch.cat([torch.ones(SEQUENCES, LENGTH, 1), place], dim=-1)
        return tokens, target  # [8, 32, 32] each


# %%
# A collapsed router
# ------------------
#
# The layer has eight experts, of which two work on a token. The first element of every token is 1,
# so the first column of the router's weight adds the same to the logits of all tokens. We set it
# to 6 for experts 0 and 1. It is a parameter like any other: whatever trains the router can undo
# it. (``shared_experts`` is one linear map that every token uses. It learns what the clusters have
# in common and leaves the rest to the experts.)

import torchmoe
from torchmoe.nn import Balance, Capacity, MoE

torch.set_num_threads(1)  # the products are too small to be worth sharing among threads


def make_layer(seed, *, collapsed=True, **arguments):
    torch.manual_seed(seed)
    shared = torch.nn.Linear(32, 32, bias=False)
    moe = MoE(32, 16, 8, 2, shared_experts=shared, **{"balance": Balance(0), **arguments})
    with torch.no_grad():
        moe.router.weight[:, 0] = 0
        if collapsed:
            moe.router.weight[:2, 0] = 6
    return moe


moe = make_layer(seed=0, balance=Balance(0.01, z_loss_weight=0.001))
tokens, target = Task(seed=0).batch()
output = moe(tokens)
routing = output.routing
scores = routing.logits.softmax(dim=1).mean(dim=0)

print("expert     ", *(f"{i:5}" for i in range(8)))
print("slots      ", *(f"{n:5}" for n in routing.tokens_per_expert.tolist()))
print("mean score ", *(f"{p:5.3f}" for p in scores.tolist()))
# sphinx_gallery_start_ignore
assert routing.tokens_per_expert.tolist() == [256, 256] + 6 * [0]
assert scores[2:].max() < 0.005
# sphinx_gallery_end_ignore

# %%
# All 256 tokens choose experts 0 and 1. A slot is one choice of one token, so there are 512; an
# even share would be 64. MaxVio, the largest load over the mean load minus 1, is 3 here, and
# cannot be larger where a token has two different experts of eight. The other six have scores of
# about 0.002.
#
# Why does it stay?
# -----------------
#
# Let us ask for derivatives by two things: the experts' own weights, and the first column of the
# router's weight, each expert's offset, which holds the collapse.

loss = (output.hidden_states - target).square().mean()
terms = {
    "task": loss,
    "z-loss": routing.losses["router_z_loss"],
    "balancing": routing.losses["load_balancing_loss"],
}
(gradient,) = torch.autograd.grad(loss, moe.experts.down_proj, retain_graph=True)
of_experts = gradient.flatten(1).norm(dim=1)
columns = {
    name: torch.autograd.grad(term, moe.router.weight, retain_graph=True)[0][:, 0]
    for name, term in terms.items()
}

print("expert                     ", *(f"{i:6}" for i in range(8)))
print("|task by expert's weights| ", *(f"{v:6.0e}" if v else "     0" for v in of_experts.tolist()))
for name, column in columns.items():
    cells = (f"{v:+6.0e}" if v else "     0" for v in column.tolist())
    print(f"{name + ' by its offset':27}", *cells)
# sphinx_gallery_start_ignore
assert of_experts[2:].max() == 0
assert columns["task"][2:].abs().max() == 0
assert columns["task"][:2].abs().min() > 0
assert columns["z-loss"].min() > 0
assert columns["balancing"][:2].min() > 0
assert columns["balancing"][2:].max() < 0
# sphinx_gallery_end_ignore

# %%
# The zeros are exact. For experts that no token chose the task has no gradient: not for their own
# weights, since they computed nothing, and not for the router, since their scores are not in the
# output. The task cannot bring them back.
#
# The last two rows have all scores in them, so they reach everyone. An optimizer steps against the
# sign: the z-loss lowers all eight, the balancing loss lowers the busy two and raises the idle
# six.
#
# How to try a cure
# -----------------
#
# A cure is an argument or two of the layer. All else is equal at equal seed: the first values, the
# collapse, the tokens. ``watch`` gives the means over 20 steps, and we write down three of them.

STEPS, RECORD, SEEDS = 800, 20, (0, 1, 2)


def train(seed, **arguments):
    moe, task = make_layer(seed, **arguments), Task(seed)
    optimizer = torch.optim.Adam(moe.parameters(), lr=3e-3)
    rows, losses = [], []
    with torchmoe.watch(moe) as watcher:
        for step in range(1, STEPS + 1):
            tokens, target = task.batch()
            output = moe(tokens)
            loss = (output.hidden_states - target).square().mean()
            (loss + output.aux_loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            moe.update(output.routing)
            losses.append(loss.item() / OWN_SHARE)
            if step % RECORD == 0:
                (seen,) = watcher.collect().values()
                rows.append([seen.max_violation, seen.dead_experts, sum(losses) / RECORD])
                losses.clear()
    return torch.tensor(rows).T  # [3, records]: MaxVio, experts without a token, task loss


# %%
# The task's loss is in units of what the clusters have of their own: 1 is a layer that has learned
# what they share and nothing else. Two runs frame all others: the collapsed layer left alone, and
# the same layer that never was collapsed.

results = {}


def try_out(name, **arguments):
    results[name] = torch.stack([train(seed, **arguments) for seed in SEEDS])  # [3, 3, records]


try_out("no cure")
try_out("never collapsed", collapsed=False)


# sphinx_gallery_start_ignore
def draw(*names):
    colours = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
    looks = {
        "no cure": {"color": "0.7", "linewidth": 5},
        "never collapsed": {"color": "black", "linestyle": ":"},
        **{name: {"color": colour} for name, colour in zip(names, colours, strict=False)},
    }
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.4))
    steps = torch.arange(RECORD, STEPS + 1, RECORD)
    for row, panel in ((0, panels[0]), (2, panels[1])):
        for name, look in looks.items():
            values = results[name][:, row]
            panel.plot(steps, values.mean(0), label=name, **look)
            panel.fill_between(
                steps, values.amin(0), values.amax(0), color=look["color"], alpha=0.12, linewidth=0
            )
    panels[0].set(xlabel="step", ylabel="MaxVio (0 = even)", ylim=(0, 3.1), title="Balance")
    panels[1].set(xlabel="step", ylabel="task loss", ylim=(0.3, 1.4), title="Task")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    plt.show()


def at_end(name, row):
    return results[name][:, row, -5:].mean().item()  # the last 100 steps, all seeds


draw()
assert results["no cure"][:, 1].min() == 6
assert results["no cure"][:, 0].min() == 3
assert results["never collapsed"][:, 1, -5:].max() < 0.5
assert at_end("never collapsed", 2) < 0.85 * at_end("no cure", 2)
# sphinx_gallery_end_ignore

# %%
# Lines are means over three seeds, and bands go from the smallest to the largest. Left alone, the
# router never leaves its state, and the layer ends with the larger loss. That is the gap to close.
#
# The balancing loss
# ------------------
#
# ``load_balancing_loss`` multiplies each expert's share of the slots by its mean score and adds
# up, times the number of experts. Its gradient flows through the scores alone: it lowers those of
# the busy experts. The shares are a plain count, and one may choose of what: this batch, each
# sequence on its own, or the running average that ``update`` keeps.

for source in ("batch", "sequence", "history"):
    try_out(f"loss: {source}", balance=Balance(0.01, fraction_from=source))
# sphinx_gallery_start_ignore

BALANCING = ("loss: batch", "loss: sequence", "loss: history")
draw(*BALANCING)


def alive_from(name):
    """The step of each seed from which, in means of 20 steps, no expert is without tokens."""
    steps = []
    for seed in range(len(SEEDS)):
        dead = (results[name][seed, 1] >= 1).nonzero()
        last = int(dead.max()) + 1 if len(dead) else 0
        steps.append(None if last == STEPS // RECORD else last * RECORD)
    return steps


for _name in BALANCING:
    assert None not in alive_from(_name)
    assert at_end(_name, 2) < 0.9 * at_end("no cure", 2)
# sphinx_gallery_end_ignore

# %%
# All three bring the router back, and the task's loss falls as far as that of a layer that was
# never collapsed. For some tens of steps MaxVio stays where it is: the logits of two experts have
# to come down, and those of six to rise, before anyone else is chosen, and only then do the others
# begin to learn. In this task the source makes little difference. Where it matters is a question
# of micro-batches and of long sequences; see :doc:`/balance`.
#
# A bias that only ranks
# ----------------------
#
# A selection bias is added to the scores when experts are ranked, and to nothing else. After each
# step ``update`` raises it by 0.001 for experts below the mean load and lowers it by as much for
# those above. It needs no gradient at all.

try_out("selection bias", balance=Balance(0, selection_bias_rate=0.001))
# sphinx_gallery_start_ignore
draw("loss: batch", "selection bias")
assert all(100 <= step <= 300 for step in alive_from("selection bias"))
assert at_end("selection bias", 0) < at_end("loss: batch", 0)
assert (results["selection bias"] - results["no cure"])[:, 2].mean(0).max() > 0.05
assert at_end("loss: batch", 2) < at_end("selection bias", 2) < 0.95 * at_end("no cure", 2)
# sphinx_gallery_end_ignore

# %%
# How long should it take? The two busy experts have mean scores of about 0.5 and the others of
# about 0. A gap closes by 0.002 per step, 0.001 from either side: after 250 steps for a score of
# 0.5, and sooner for tokens that were less sure of their second expert. In every seed all experts
# have tokens from some step between 100 and 300 on. That moves many tokens at once to experts that
# have learned nothing yet, and for a while the task's loss is above that of no cure. The load ends
# more even than with the loss.
#
# Capacity
# --------
#
# A capacity limits what an expert takes. Does that help? It depends on what becomes of the rest.
# ``Capacity(1)`` drops the slots beyond the even share. With ``overflow="next_best"`` they go to
# the token's best expert that has room.

try_out("capacity: drop", capacity=Capacity(1))
try_out("capacity: next best", capacity=Capacity(1, overflow="next_best"))
# sphinx_gallery_start_ignore
draw("capacity: drop", "capacity: next best")
assert results["capacity: drop"][:, 1].min() > 5
assert at_end("capacity: drop", 2) > at_end("no cure", 2)
assert at_end("capacity: next best", 2) < 0.9 * at_end("no cure", 2)
assert at_end("capacity: next best", 1) < 1
assert at_end("capacity: next best", 0) > at_end("loss: batch", 0) + 0.1
assert at_end("capacity: next best", 2) < 1.15 * at_end("never collapsed", 2)
# sphinx_gallery_end_ignore

# %%
# MaxVio counts what the router wants, before capacity. Dropping does not change it: dropped slots
# teach nobody, and the task's loss ends above that of no cure. With rerouting, all experts compute
# and learn from the first step, and the task's loss ends close to that of a healthy layer. The
# router follows as their outputs become worth choosing, but slowly: rerouting evens the work and
# does not ask the router to be even. Use a balancing term.
#
# Entropy
# -------
#
# Three terms measure the router's scores in nats. ``global_entropy_loss`` asks that the mean
# scores be even. ``local_entropy_loss`` asks that each token be certain.
# ``mutual_information_loss`` asks for both.

for term in ("global_entropy_loss", "local_entropy_loss", "mutual_information_loss"):
    try_out(term, balance=Balance(0, losses=[(term, 0.01)]))
# sphinx_gallery_start_ignore
ENTROPIES = ("global_entropy_loss", "local_entropy_loss", "mutual_information_loss")
draw(*ENTROPIES)
assert results["local_entropy_loss"][:, 1].min() > 5
for _name in ("global_entropy_loss", "mutual_information_loss"):
    assert None not in alive_from(_name)
    assert at_end(_name, 2) < 0.9 * at_end("no cure", 2)
    assert at_end(_name, 0) > at_end("loss: batch", 0)
# sphinx_gallery_end_ignore

# %%
# The two that look at the mean revive every expert and reach the loss of a healthy layer. They
# leave the load less even than ``load_balancing_loss`` does: even mean scores are not even counts,
# because a count takes the two best of each token only. Certainty alone cures nothing, since a
# collapsed router is already certain.
#
# The z-loss
# ----------
#
# ``router_z_loss`` keeps logits small, for the sake of numbers in 16 bits. A collapsed router has
# large logits. Does it help?

try_out("z-loss", balance=Balance(0, z_loss_weight=0.001))
# sphinx_gallery_start_ignore
draw("z-loss")
assert results["z-loss"][:, 1].min() > 5
# sphinx_gallery_end_ignore

# %%
# It does not. It lowers all of them, as the signs above say, and the same two experts stay ahead.
#
# What to remember
# ----------------
#
# Numbers are means over the last 100 steps and three seeds. All experts count as alive after the
# step from which, in means of 20 steps, fewer than one of them is without tokens.

print(f"{'':23}   {'all alive after':>17}   {'idle':>4}   {'MaxVio':>6}   {'task loss':>9}")
for name in results:
    steps = alive_from(name)
    alive = "no" if None in steps else f"{min(steps)} to {max(steps)} steps"
    if name == "never collapsed":
        alive = "-"
    violation, idle, loss = (at_end(name, row) for row in range(3))
    print(f"{name:23}   {alive:>17}   {idle:4.1f}   {violation:6.1f}   {loss:9.2f}")

# %%
# - A collapsed router stays collapsed, because the task has no gradient for experts that nobody
#   chose.
# - What brings it back looks at all experts: a balancing loss, whichever counts it takes, a
#   selection bias, or an entropy of the mean scores.
# - Rerouting lets all experts learn from the start, but brings a collapsed router back only slowly;
#   use a balancing term. Dropping, certainty and the z-loss do not bring it back.
#
# This is one task with one learning rate and the coefficients of the papers. :doc:`/balance` says
# which cure goes with what, and :doc:`/watching` how to see a collapse while it happens.
