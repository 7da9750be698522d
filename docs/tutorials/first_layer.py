"""
Your first layer
================

A feed-forward network does all of its work for every token. A *mixture of experts* holds several
feed-forward networks, the experts, and a small *router* that chooses, for each token, the few that
work on it. The model has the parameters of all the experts; a token pays for those it chose.

This tutorial builds such a layer, takes its output apart, trains it in a small model and shows
where the tokens went. It takes for granted that you know PyTorch, and nothing about experts.
"""

# sphinx_gallery_start_ignore
import matplotlib.pyplot as plt

plt.rcParams["figure.constrained_layout.use"] = True
# sphinx_gallery_end_ignore
# %%
# What goes in, and what comes out?
# ---------------------------------
#
# The layer stands where a transformer has its feed-forward network. It takes any number of leading
# dimensions and a last one of ``hidden_size`` elements. Here those are 4 sequences of 32 tokens.

import torch

from torchmoe.nn import MoE

torch.manual_seed(0)
moe = MoE(hidden_size=16, intermediate_size=8, num_experts=8, top_k=2)
x = torch.randn(4, 32, 16)

hidden_states, aux_loss, routing = moe(x)

print("x            ", list(x.shape))
print("hidden_states", list(hidden_states.shape))
print("aux_loss     ", list(aux_loss.shape))
print("routing      ", ", ".join(routing._fields[:4]), "...")

# %%
# Three things come out:
#
# - ``hidden_states``, the result, in the shape of ``x``;
# - ``aux_loss``, one element to add to the loss of your task;
# - ``routing``, a record of what the router decided.
#
# Who works on a token?
# ---------------------
#
# The record has one row per token: the 4 sequences of 32 are 128 rows.

print("token   experts   weights")
for token in range(4):
    experts = routing.indices[token].tolist()
    weights = routing.weights[token].tolist()
    print(f"{token:5}   {experts!s:7}   {weights[0]:.2f}  {weights[1]:.2f}")

# %%
# With ``top_k=2`` each token has two experts, the better one first, and a weight for each. The two
# weights of a token add up to 1. Where do they come from? The router is one matrix: its product
# with a token gives a *logit* for each expert. The experts with the largest logits are chosen, and
# the weights are the softmax of those logits.
#
# Is that all?
# ------------
#
# It is, and a token's result can be had by hand. An expert is the feed-forward network of many
# language models, SwiGLU: two products with the token, one of which gates the other, and one
# product back.

token = x[0, 0]
logits = moe.router.weight @ token  # one per expert
chosen = logits.topk(2).indices
weights = logits[chosen].softmax(0)

y = torch.zeros(16)
for weight, i in zip(weights, chosen, strict=True):
    gate, up = (moe.experts.gate_up_proj[i] @ token).chunk(2)
    y += weight * (moe.experts.down_proj[i] @ (torch.nn.functional.silu(gate) * up))

torch.testing.assert_close(y, hidden_states[0, 0])
print("the layer gives the same")

# %%
# What the layer adds is that nothing is computed for experts that a token did not choose, whatever
# the number of tokens and experts.
#
# How even is the work?
# ---------------------
#
# Nothing so far makes tokens choose different experts. The record counts how many chose each.

print("tokens per expert  ", routing.tokens_per_expert.tolist())
print("sum                ", routing.tokens_per_expert.sum().item())
print("load_balancing_loss", f"{routing.losses['load_balancing_loss']:.4f}")
print("aux_loss           ", f"{aux_loss:.6f}")
# sphinx_gallery_start_ignore
assert routing.tokens_per_expert.sum() == 256
assert routing.losses["load_balancing_loss"] > 1
torch.testing.assert_close(aux_loss, 0.01 * routing.losses["load_balancing_loss"])
# sphinx_gallery_end_ignore

# %%
# Two choices of each of 128 tokens are 256, and an even share is 32. ``load_balancing_loss`` says
# in one number how uneven the choices are; it is 1 when all experts are used alike. Its derivative
# lowers the logits of busy experts. ``aux_loss`` is 0.01 times that: small enough not to disturb
# the task, and we shall see whether it is large enough to matter. The guide :doc:`/balance` has
# the formula and the other ways to keep experts busy.
#
# Something to learn
# ------------------
#
# Experts should pay where different inputs follow different rules. So let us learn a curve of
# eight pieces, each with a level, a slope and a wave of its own.

LEVELS = torch.tensor([0.8, -0.6, 0.2, -1.0, 0.9, -0.3, 0.5, -0.8])
SLOPES = torch.tensor([-0.5, 1.0, -1.5, 0.5, -1.0, 1.25, -0.75, 0.5])
PERIODS = torch.tensor([0, 1, 0, 2, 1, 0, 2, 1])


def curve(x):  # any shape, from -2 to 2
    place = 2 * (x + 2)  # 0 to 8
    piece = place.floor().clamp(0, 7).long()
    inside = place - piece - 0.5  # -0.5 to 0.5 in each piece
    wave = 0.3 * torch.sin(2 * torch.pi * PERIODS[piece] * inside)
    return LEVELS[piece] + SLOPES[piece] * inside + wave


grid = torch.linspace(-2, 2, 1001).unsqueeze(1)  # [1001, 1]
# sphinx_gallery_start_ignore
figure, axes = plt.subplots(figsize=(7, 2.8))
axes.plot(grid, curve(grid), ".", markersize=2, color="black")
axes.set(xlabel="x", ylabel="y", title="The curve to learn: eight pieces, eight rules")
plt.show()
# sphinx_gallery_end_ignore

# %%
# A model around the layer
# ------------------------
#
# The model turns the number x into a token of 16 elements, adds what the layer makes of it, and
# reads y off the sum. It returns the layer's output too: whoever trains it needs ``aux_loss`` and
# ``routing``. (The first values of ``embed`` spread the bends of the 16 tanh over the whole
# curve.)


class Model(torch.nn.Module):
    def __init__(self, moe):
        super().__init__()
        self.embed = torch.nn.Linear(1, 16)
        torch.nn.init.uniform_(self.embed.weight, -3, 3)
        torch.nn.init.uniform_(self.embed.bias, -6, 6)
        self.moe = moe
        self.head = torch.nn.Linear(16, 1)

    def forward(self, x):  # [T, 1]
        tokens = torch.tanh(self.embed(x))  # [T, 16]
        output = self.moe(tokens)
        return self.head(tokens + output.hidden_states), output


# %%
# How is it trained?
# ------------------
#
# As any model, with two more lines: ``aux_loss`` joins the loss, and ``update``, once per
# optimizer step, moves what a layer remembers between steps. (With the settings of this page that
# is nothing. With others it is a running average of the load, or a bias, so the call belongs in
# every training loop. A forward pass itself never changes the layer.)


def train(model, steps=2000):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        x = 4 * torch.rand(512, 1) - 2
        y, output = model(x)
        loss = (y - curve(x)).square().mean()
        (loss + output.aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        model.moe.update(output.routing)


# %%
# We train two models. The first has eight experts with an inner width of 8, two of which work on a
# token. The second has a single expert with an inner width of 16 that every token uses, which
# makes it an ordinary feed-forward network, with as many products per token as two small experts.
# ``watch`` follows the layers of a model while it trains; we shall look at what it saw further
# down.

import torchmoe

torch.set_num_threads(1)  # the products are too small to be worth sharing among threads
torch.manual_seed(1)
mixture = Model(MoE(16, 8, num_experts=8, top_k=2))
with torchmoe.watch(mixture) as watcher:
    train(mixture)

torch.manual_seed(1)
dense = Model(MoE(16, 16, num_experts=1, top_k=1))
train(dense)


# %%
# Did it learn?
# -------------


@torch.no_grad()
def error(model):
    return (model(grid)[0] - curve(grid)).square().mean().sqrt().item()


print("             root mean square error")
print(f"dense        {error(dense):.2f}")
print(f"mixture      {error(mixture):.2f}")
# sphinx_gallery_start_ignore
assert error(mixture) < 0.85 * error(dense)

figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
for panel, model, name, colour in zip(
    panels,
    (dense, mixture),
    ("dense", "mixture of 8 experts, 2 at work"),
    ("#e69f00", "#0072b2"),
    strict=True,
):
    panel.plot(grid, curve(grid), ".", markersize=2, color="black", label="the curve")
    panel.plot(grid, model(grid)[0].detach(), color=colour, linewidth=1.8, label="the model")
    panel.set(xlabel="x", title=name)
    panel.legend(fontsize=8)
panels[0].set_ylabel("y")
plt.show()
# sphinx_gallery_end_ignore

# %%
# Neither follows the curve exactly, and the mixture is closer at the same cost for each token:
# where the dense model bends one function through all the pieces, a router can change hands.
#
# Where did the tokens go?
# ------------------------
#
# The record tells. Each row of the map is an expert, and its colour the expert's weight at that x.

with torch.no_grad():
    routing = mixture(grid)[1].routing
weight_of = torch.zeros(1001, 8).scatter(1, routing.indices, routing.weights)  # [1001, 8]
# sphinx_gallery_start_ignore
_used = (weight_of > 0).int()
_places = _used[0] + (_used.diff(dim=0) > 0).sum(0)  # [8], how many intervals
assert _places.max() > 1
assert _places.float().mean() < 4

figure, (above, below) = plt.subplots(2, 1, figsize=(8, 4.8), sharex=True, height_ratios=(1, 1.3))
above.plot(grid, curve(grid), ".", markersize=2, color="black")
above.plot(grid, mixture(grid)[0].detach(), color="#0072b2")
above.set(ylabel="y", title="The curve (black), the mixture (blue), and the experts at work")
image = below.imshow(
    weight_of.T,
    aspect="auto",
    origin="lower",
    extent=(-2, 2, -0.5, 7.5),
    cmap="Blues",
    vmin=0,
    interpolation="nearest",
)
for place in torch.arange(-1.5, 2, 0.5).tolist():
    above.axvline(place, color="0.6", linewidth=0.8, zorder=0)
    below.axvline(place, color="#d55e00", linewidth=1)
below.set(xlabel="x (the rule changes at the lines)", ylabel="expert", yticks=range(8))
figure.colorbar(image, ax=below, label="weight")
plt.show()
# sphinx_gallery_end_ignore

# %%
# Nobody told the router where the rules change. Neighbouring tokens have similar logits, so each
# expert took intervals of x, and some experts work in several places. What an expert is for is
# whatever lowers the loss; it need not be what we would have chosen.
#
# Was every expert busy?
# ----------------------
#
# ``watch`` kept the counts of every step. In numbers, as means over all steps:

watcher.summary()

# %%
# MaxVio is the load of the busiest expert over the mean load, minus 1: 0 when all are used alike,
# 7 if one of eight took every token. And as a picture, by step (``watcher.plot`` draws its own to
# a file):


def load_by_step(watcher):
    records = watcher.to_records()  # one for each step
    load = torch.tensor([record["tokens_per_expert"] for record in records])
    share = load * 8 / load.sum(1, keepdim=True)  # [2000, 8], 1 = the even share
    return share.view(-1, 20, 8).mean(1)  # means of 20 steps


# sphinx_gallery_start_ignore
def draw_load(watchers):
    figure, panels = plt.subplots(
        1, len(watchers), figsize=(2 + 4 * len(watchers), 3), squeeze=False
    )
    for panel, (name, one) in zip(panels[0], watchers.items(), strict=True):
        image = panel.imshow(
            load_by_step(one).T,
            aspect="auto",
            origin="lower",
            extent=(0, 2000, -0.5, 7.5),
            cmap="PuOr_r",
            interpolation="nearest",
            vmin=0,
            vmax=2,
        )
        panel.set(xlabel="step", ylabel="expert", yticks=range(8), title=name)
    figure.colorbar(image, ax=panels, label="load (1 = the even share)", extend="max")
    plt.show()


draw_load({"Load of each expert": watcher})
assert load_by_step(watcher)[-5:].min() > 0.1
# sphinx_gallery_end_ignore

# %%
# In the first steps some experts get next to nothing. In the end all eight have work, though not
# equal shares of it.
#
# Was that aux_loss?
# ------------------
#
# The way to know is to leave it out. ``Balance(0)`` sets its weight to 0, and all else stays the
# same. One run may be luck, so let us take three first values for each.

from torchmoe.nn import Balance


def train_new(seed, balance):
    torch.manual_seed(seed)
    model = Model(MoE(16, 8, num_experts=8, top_k=2, balance=balance))
    with torchmoe.watch(model) as watcher:
        train(model)
    with torch.no_grad():
        statistics = torchmoe.routing_statistics(model(grid)[1].routing)
    print(
        f"{balance.weight:6}   {seed:4}   {statistics.max_violation:6.1f}"
        f"   {statistics.dead_experts:15}   {error(model):5.2f}"
    )
    return statistics, error(model), watcher


print("weight   seed   MaxVio   without a token   error")
balanced = [train_new(seed, Balance(0.01)) for seed in (1, 2, 3)]
unbalanced = [train_new(seed, Balance(0)) for seed in (1, 2, 3)]
# sphinx_gallery_start_ignore
torch.testing.assert_close(balanced[0][1], error(mixture))
assert all(statistics.dead_experts <= 1 for statistics, *_ in balanced)
assert all(statistics.dead_experts >= 2 for statistics, *_ in unbalanced)
assert max(value for _, value, _ in balanced) > min(value for _, value, _ in unbalanced)

draw_load({"weight 0.01, seed 1": balanced[0][2], "weight 0, seed 1": unbalanced[0][2]})
# sphinx_gallery_end_ignore

# %%
# Without it, several of the eight experts end with no token at all. The errors overlap from seed
# to seed, so three seeds do not say what that costs; the idle experts' parameters are paid for in
# any case. And they stay idle: an expert that nobody chooses learns nothing, so nobody has a
# reason to choose it. Why that is so, and what brings them back, is the subject of
# :doc:`collapse_and_cures`.
#
# Where next
# ----------
#
# - :doc:`/quick_start` has the layer's arguments and the training loop in one place;
# - :doc:`what_the_router_learns` asks how a router can learn from a choice at all;
# - :doc:`/watching` explains every statistic that ``watch`` gives.
