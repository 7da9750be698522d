"""
Capacity and drops
==================

Many mixtures of experts give every expert a buffer of a fixed size. An expert then has a
*capacity*: the most slots that it keeps, where a slot is one choice of one token. The router knows
nothing of it, so some slots find their expert full.

This tutorial asks what happens then, one question at a time: how large a capacity is, who is served
first, what becomes of the rest, whether later tokens matter to earlier ones, and what drops do to
weights, to gradients and to a task's loss. :doc:`/capacity` has all options in one place.
"""

# %%
# How large is a capacity?
# ------------------------
#
# With T tokens, E experts and K choices for each token it is ``ceil(factor * K * T / E)``, so a
# factor of 1 is just enough room when the tokens spread evenly. The formula is simple to get
# wrong by one. A product of floats may land a little above a whole number, and the ceiling then
# adds a slot. Here a factor stands for the nearest simple fraction (1.1 is 11/10), and the rest is
# integer arithmetic.

import math

import matplotlib.pyplot as plt
import torch

from torchmoe import expert_capacity, ops
from torchmoe.nn import Assistance, Capacity, MoE, Router

torch.set_num_threads(1)  # layers this small are not faster with more

print("factor   tokens   experts   with floats   exact")
for factor, tokens, experts in [(1, 200, 4), (1.1, 200, 4), (1.25, 100, 8)]:
    floats = math.ceil(factor * 2 * tokens / experts)
    exact = expert_capacity(tokens, experts, top_k=2, capacity_factor=factor)
    print(f"{factor:<6}   {tokens:6}   {experts:7}   {floats:11}   {exact:5}")
# sphinx_gallery_start_ignore
assert (expert_capacity(200, 4, 2, 1.1), math.ceil(1.1 * 2 * 200 / 4)) == (110, 111)
plt.rcParams["figure.constrained_layout.use"] = True
# sphinx_gallery_end_ignore

# %%
# In the second row 1.1 * 2 * 200 / 4 is 110, and floats make 111 of it. One slot matters where two
# programs must agree on the size of a buffer.
#
# Who is served first?
# --------------------
#
# Six tokens choose two of four experts each. Every token wants expert 0, which has room for three.

logits = torch.tensor(
    [
        [2.0, 1.0, 0.0, -1.0],
        [0.5, 2.0, -1.0, 0.0],
        [1.5, 0.2, 1.2, -0.5],
        [2.2, 1.4, 0.1, 0.6],
        [1.8, 0.0, -0.6, 1.3],
        [2.5, 0.3, 1.6, -1.0],
    ]
)
chosen = ops.select_experts(logits, 2)  # [T, K], best first
weights = ops.gate_weights(
    logits, chosen, score_function="softmax", normalize="topk", estimator="exact"
)
capacity = expert_capacity(6, num_experts=4, top_k=2, capacity_factor=1)
print("slots that ask for experts 0 to 3:", torch.bincount(chosen.flatten()).tolist())
print("capacity of each:", capacity)
# sphinx_gallery_start_ignore
assert capacity == 3
assert (chosen == 0).any(1).all()
# sphinx_gallery_end_ignore

# %%
# A picture will show who gets what: a cell for each slot, in the colour of its expert.


def show_slots(results, title):
    colours = ["#0072b2", "#e69f00", "#009e73", "#cc79a7"]
    figure, axes = plt.subplots(1, len(results), figsize=(2.3 * len(results), 3.8))
    for axis, (name, ids) in zip(axes, results.items(), strict=True):
        for token, slot in torch.cartesian_prod(torch.arange(6), torch.arange(2)).tolist():
            wanted, got = int(chosen[token, slot]), int(ids[token, slot])
            face, name_got = (colours[got], got) if got >= 0 else ("white", "none")
            axis.add_patch(plt.Rectangle((slot, token), 0.94, 0.9, fc=face, ec="black"))
            text = f"{wanted}" if got == wanted else f"{wanted} → {name_got}"
            colour = "white" if got == 0 else "black"
            axis.text(slot + 0.47, token + 0.45, text, ha="center", va="center", color=colour)
        axis.set(xlim=(-0.1, 2.05), ylim=(6, -0.1), xlabel="choice", ylabel="token")
        axis.set_title(name, fontsize=10)
        axis.set_xticks([0.47, 1.47], ["first", "second"])
        axis.set_yticks([t + 0.45 for t in range(6)], range(6))
    figure.suptitle(title)
    plt.show()


# %%
# The op ``limit_capacity`` serves one slot after another until an expert is full. The order is a
# choice: token by token; all first choices, then all second ones; the largest weights first; or by
# a draw. ``Capacity`` has these as its options ``order`` and ``priority``.


def limit(**options):
    return ops.limit_capacity(chosen, capacity, num_experts=4, **options)


draw = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(0))
served = {
    'order="token"': limit(order="token"),
    'order="choice"': limit(order="choice"),
    'priority="weight"': limit(priority=weights),
    'priority="random"': limit(priority=draw),
}
show_slots(served, "The expert of each slot (none = dropped)")
# sphinx_gallery_start_ignore
DROPPED = {name: [tuple(s) for s in (ids < 0).nonzero().tolist()] for name, ids in served.items()}
assert DROPPED['order="token"'] == [(3, 0), (4, 0), (5, 0)]
assert DROPPED['order="choice"'] == [(1, 1), (4, 0), (5, 0)]
assert DROPPED['priority="weight"'] == [(1, 1), (2, 0), (4, 0)]
assert all(len(slots) == 3 for slots in DROPPED.values())
FIRST = weights[chosen == 0]  # of expert 0, by token
assert set(FIRST.argsort()[:3].tolist()) == {1, 2, 4}
# sphinx_gallery_end_ignore

# %%
# Each of them drops three slots. Whose they are differs:
#
# - Token by token, the last three tokens lose their best expert, while token 1 keeps expert 0 as
#   its second choice.
# - By choice (as in GShard), that second choice has to wait until all first ones are served.
# - By weight (as in V-MoE), the three smallest weights for expert 0 lose, wherever they stand.
# - A draw prefers no place in the batch.
#
# What becomes of the rest?
# -------------------------
#
# A slot that finds its expert full is dropped, or it takes the token's next best expert that has
# room, or it goes to a backup that a table names for each expert. Here they are served token by
# token.

backup = torch.tensor([2, 3, 1, 0])  # of expert 0 it is expert 2, and so on
by_token = {"order": "token", "scores": logits}
rest = {
    'overflow="drop"': limit(order="token"),
    'overflow="next_best"': limit(overflow="next_best", **by_token),
    'overflow="backup"': limit(overflow="backup", backup=backup, **by_token),
}
show_slots(rest, "wanted → got (none = dropped)")
# sphinx_gallery_start_ignore
assert rest['overflow="next_best"'].tolist()[3:] == [[3, 1], [2, 3], [3, 2]]
assert rest['overflow="backup"'].tolist()[3:] == [[2, 1], [2, 3], [3, -1]]
assert logits[4].argsort(descending=True).tolist() == [0, 3, 1, 2]
# sphinx_gallery_end_ignore

# %%
# With ``"next_best"`` nobody is dropped, as there are as many places as slots. Look at token 4: its
# next best expert is 3, but its second slot names that one; then comes 1, which is full; so it gets
# 2. With ``"backup"`` tokens 3 and 4 go where the table sends them. Token 5 names the backup
# already, so its first slot takes the next best expert, 3. That leaves its second slot without any:
# expert 2 is full, and there is room only where the token is already.
#
# Can a later token change an earlier one?
# ----------------------------------------
#
# In a language model that would be a look into the future. So we ask the layer. We replace the last
# quarter of 256 tokens and count those of the first 192 whose output changes.

torch.manual_seed(0)
layer = MoE(16, 32, num_experts=8, top_k=2)
tokens = torch.randn(256, 16)
replaced = torch.cat([tokens[:192], torch.randn(64, 16)])


def first_outputs(inputs, capacity):
    layer.capacity = capacity
    torch.manual_seed(1)  # the same draws in every call
    with torch.no_grad():
        return layer(inputs).hidden_states[:192]


def count_changed(inputs, capacity):
    y = first_outputs(tokens, capacity)
    distance = (first_outputs(inputs, capacity) - y).abs().amax(dim=1)
    return int((distance > 1e-6).sum())  # more than rounding


# %%
# A second column gives the layer the first 192 tokens alone, as when a text is written token by
# token.

print("Capacity(1, ...)                      replaced   alone")
for options in [
    {"order": "token"},
    {"order": "token", "overflow": "next_best"},
    {"order": "choice"},
    {"order": "choice", "overflow": "next_best"},
    {"priority": "weight"},
    {"priority": "random"},
]:
    one = Capacity(1, **options)
    name = ", ".join(f'{key}="{value}"' for key, value in options.items())
    changed, alone = count_changed(replaced, one), count_changed(tokens[:192], one)
    print(f"{name:<36}  {changed:8}   {alone:5}")
    # sphinx_gallery_start_ignore
    assert (changed == 0) == (options.get("order") == "token"), (options, changed)
    assert alone > 0
    # sphinx_gallery_end_ignore

# %%
# Only ``order="token"`` is causal, with either overflow. In every other order a later token can
# take the place that an earlier one would have had.
#
# The last column is a trap of another kind. The capacity follows the number of tokens in the call,
# so even the causal order gives other outputs in a shorter call. Where that matters, evaluate
# without a limit: ``moe.capacity = None``.
#
# How much is dropped?
# --------------------
#
# That depends on the router as much as on the factor. We compare a router whose load is about even
# with a skewed one, which has a bias towards the first experts.

E, K = 8, 2
torch.manual_seed(0)
x = torch.randn(4096, 16)


def skewed_router(skew, **options):
    torch.manual_seed(0)
    router = Router(16, E, bias=True, **options)
    with torch.no_grad():
        router.bias.copy_(torch.linspace(skew, -skew, E))
    return router


def dropped_share(moe):
    """The dropped share of the slots, in percent."""
    with torch.no_grad():
        routing = moe(x).routing
    asked, kept = routing.tokens_per_expert.sum(), routing.kept_per_expert.sum()
    return 100 - 100 * int(kept) / int(asked)


# %%
# Each of the two is given more and more room, and the skewed one also a chance to reroute.

factors = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0]
shares = {}
for name, skew, overflow in [
    ("skewed router, drop", 0.75, "drop"),
    ("even router, drop", 0.0, "drop"),
    ("skewed router, next_best", 0.75, "next_best"),
]:
    moe = MoE(16, 8, E, K, router=skewed_router(skew))
    shares[name] = []
    for factor in factors:
        moe.capacity = Capacity(factor, overflow=overflow)
        shares[name].append(dropped_share(moe))

# %%
# The curves:

figure, axis = plt.subplots(figsize=(7, 3.8))
styles = {"o-": "#d55e00", "s-": "#0072b2", "^--": "#009e73"}
for (name, share), (style, colour) in zip(shares.items(), styles.items(), strict=True):
    axis.plot(factors, share, style, color=colour, label=name)
axis.set(title="Dropped slots", xlabel="capacity factor", ylabel="share of all slots (%)")
axis.grid(alpha=0.3)
axis.legend()
plt.show()
# sphinx_gallery_start_ignore
skewed, even, rerouted = (dict(zip(factors, share, strict=True)) for share in shares.values())
assert all(48 < curve[0.5] < 52 for curve in (even, rerouted))
assert 0 < even[1.0] < 15
assert even[1.5] == 0
assert all(skewed[factor] > 5 for factor in factors if factor <= 2)
assert skewed[4.0] == 0
assert all(rerouted[factor] < 0.1 for factor in factors if factor >= 1)
# sphinx_gallery_end_ignore

# %%
# Below a factor of 1 there are fewer places than slots, and no router can help. Above it the even
# router soon drops nothing, while the skewed one still drops slots at a factor of 2, where the
# buffers are twice as large as the work.
#
# With rerouting even the skewed router loses hardly any slot from a factor of 1 on. That evens the
# work, not the router: many tokens now have an expert that they did not choose. How a router
# becomes even is another topic, see :doc:`/balance`.
#
# Room where the load has been
# ----------------------------
#
# With ``dynamic=True`` the capacity of an expert follows its history, ``router.usage``: a running
# average of its share of the slots, which ``moe.update`` moves. So we call that as often as a
# training loop would.

dynamic = Capacity(1, dynamic=True)
moe = MoE(16, 8, E, K, router=skewed_router(0.75, track_usage=True), capacity=dynamic)
print("expert       ", "".join(f"{expert:6}" for expert in range(E)), "     sum   dropped")
for updates in (0, 100, 400):
    with torch.no_grad():
        for _ in range(updates):
            moe.update(moe(x).routing)
        asked = moe(x).routing.tokens_per_expert
    slots = dynamic.slots(len(x), E, K, training=True, usage=moe.router.usage)
    row = "".join(f"{n:6}" for n in slots.tolist()) + f"   {int(slots.sum()):6}"
    print(f"+{updates:3} updates  {row}   {dropped_share(moe):5.1f} %")
    # sphinx_gallery_start_ignore
    if updates == 0:
        assert set(slots.tolist()) == {1024}
        assert dropped_share(moe) > 20
    # sphinx_gallery_end_ignore
row = "".join(f"{n:6}" for n in asked.tolist()) + f"   {int(asked.sum()):6}"
print(f"asked         {row}")
# sphinx_gallery_start_ignore
assert ((slots > 1024) == (asked > 1024)).all()
assert dropped_share(moe) < 2
assert int(slots.sum()) > 1.2 * int(asked.sum())
# sphinx_gallery_end_ignore

# %%
# At first the usage is even, and so is the room. In the end the experts in demand have about what
# they are asked for, the others keep the even share, and hardly anything is dropped. The price is
# in the sum: more places than there are slots.
#
# A helper for an expert under load
# ---------------------------------
#
# ``Assistance`` adds an expert instead of room. When the usage of an expert has been above a
# threshold for some updates in a row, each token that is routed to it gets one more slot, with the
# expert's backup. There is always one column more, so that no shape depends on the state.

print("                    assisted   slots           tokens without")
print("                    experts    added    kept   any expert")
for name, one in {
    'order="choice"': Capacity(1),
    'priority="weight"': Capacity(1, priority="weight"),
}.items():
    assistance = Assistance([7, 6, 5, 4, 3, 2, 1, 0], threshold=1.5, patience=10)
    router = skewed_router(0.75, track_usage=True)
    moe = MoE(16, 8, E, K, router=router, capacity=one, assistance=assistance)
    for update in range(201):
        with torch.no_grad():
            routing = moe(x).routing
        helped = assistance.assisted.nonzero().flatten().tolist()
        added = (routing.selected[:, K] >= 0).sum()
        alone = (routing.indices < 0).all(dim=1).sum()
        if update in (0, 200):
            row = f"{added:5}   {routing.kept_per_expert.sum():5}   {alone:10}"
            print(f"{name if update == 0 else '':<18}  {helped!s:<8}   {row}")
        # sphinx_gallery_start_ignore
        if update == 0:
            assert added == 0
            assert not helped
            KEPT_AND_ALONE = int(routing.kept_per_expert.sum()), int(alone)
        # sphinx_gallery_end_ignore
        moe.update(routing)
    # sphinx_gallery_start_ignore
    assert helped == [0, 1]
    assert added > 2000
    assert routing.kept_per_expert.sum() > 1.2 * KEPT_AND_ALONE[0]
    if one.priority == "weight":
        assert alone < KEPT_AND_ALONE[1] / 3
    else:
        assert alone == KEPT_AND_ALONE[1] > 200
    # sphinx_gallery_end_ignore

# %%
# After 200 updates experts 0 and 1 are assisted and many more slots are kept, at the same capacity:
# the backups had room. Whether this reaches the tokens that had no expert at all is again a
# question of who is served first. By choice the added slots of early tokens, which have experts
# already, take the backups' room; by weight most of the forsaken tokens get one. (The added slots
# do not count in the usage, else the help would switch itself off.)
#
# What do weights and gradients see?
# ----------------------------------
#
# A dropped slot adds nothing to the output. What of the token's other slot? By default weights are
# formed before slots are dropped, so it keeps its weight. With ``normalize="after_drop"`` they
# are formed over the slots that are left. We give the layer a gradient from its output alone, and
# sort the tokens by how many slots they keep.


def per_token(normalize):
    moe = MoE(16, 8, E, K, router=skewed_router(0.75))
    moe.capacity = Capacity(1, order="token", normalize=normalize)
    inputs = x[:512].clone().requires_grad_()
    y, _, routing = moe(inputs)
    routing.logits.retain_grad()
    y.square().sum().backward()
    kept = routing.indices >= 0
    total = routing.weights.detach().where(kept, 0).sum(1)
    return kept.sum(1), total, inputs.grad.norm(dim=1), routing.logits.grad.norm(dim=1)


print("                             means over these tokens of")
print("normalize     kept   tokens   sum of weights   |dL/dx|   |dL/dlogits|")
for normalize in ("before_drop", "after_drop"):
    kept, *values = per_token(normalize)
    for number in (2, 1, 0):
        total, dx, dlogits = (float(value[kept == number].mean()) for value in values)
        row = f"{normalize:<11}   {number:4}   {int((kept == number).sum()):6}"
        print(f"{row}   {total:14.2f}   {dx:7.4f}   {dlogits:12.4f}")
        # sphinx_gallery_start_ignore
        if number == 0:
            assert total == dx == dlogits == 0
        elif number == 1:
            assert (total == 1) == (dlogits == 0) == (normalize == "after_drop")
            assert dx > 0
        # sphinx_gallery_end_ignore

# %%
# A token that keeps no slot has an output of 0 and a gradient of exactly 0. For it the layer is not
# there; in a transformer the residual connection carries it on.
#
# The rows with one slot tell why the default is ``"before_drop"``. After dropping, the one weight
# that is left is 1 whatever the logits are, and the router learns nothing from the token. Before
# dropping, the weight depends on the logits of both choices, and the router gets a gradient.
#
# Does it hurt the task?
# ----------------------
#
# In the end this is what counts. A small regression: tokens come from eight clusters, some more
# often than others, and each cluster has a linear map of its own to be learnt.

torch.manual_seed(0)
centres, maps = 2 * torch.randn(8, 16), torch.randn(8, 16, 16) / 4
frequency = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05])


def batch(size=512):
    cluster = torch.multinomial(frequency, size, replacement=True)
    inputs = centres[cluster] + torch.randn(size, 16)
    return inputs, inputs + torch.einsum("ti,tij->tj", inputs, maps[cluster])


# %%
# The layer has a residual connection around it, and the usual balancing loss.


def train(capacity, seed):
    torch.manual_seed(seed)
    moe = MoE(16, 32, num_experts=8, top_k=2, capacity=capacity)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-2)
    losses = []
    for _ in range(400):
        inputs, targets = batch()
        y, aux_loss, _ = moe(inputs)
        loss = torch.nn.functional.mse_loss(inputs + y, targets)
        optimizer.zero_grad()
        (loss + aux_loss).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %%
# Three seeds for each capacity:

limits = {
    "factor 0.5, drop": Capacity(0.5),
    'factor 0.5, priority="weight"': Capacity(0.5, priority="weight"),
    "factor 1, drop": Capacity(1),
    "factor 1, next_best": Capacity(1, overflow="next_best"),
    "no limit": None,
}
colours = ["#d55e00", "#cc79a7", "#e69f00", "#009e73", "#0072b2"]
results = {
    name: torch.tensor([train(capacity, seed) for seed in range(3)])
    for name, capacity in limits.items()
}

# %%
# Lines are running means over 20 steps, bands the range of the seeds.

figure, axis = plt.subplots(figsize=(9, 4))
for (name, losses), colour in zip(results.items(), colours, strict=True):
    means, steps = losses.unfold(1, 20, 1).mean(2), range(20, 401)  # [seeds, steps]
    axis.plot(steps, means.mean(0), color=colour, label=name)
    axis.fill_between(steps, means.amin(0), means.amax(0), color=colour, alpha=0.2)
axis.set(title="The task under each capacity: mean and range of three seeds")
axis.set(xlabel="step", ylabel="mean squared error", yscale="log")
axis.grid(alpha=0.3)
axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %%
# The same as numbers:

final = {name: losses[:, -50:].mean(1) for name, losses in results.items()}
print("mean squared error, last 50 steps   mean    least   greatest")
for name, losses in final.items():
    print(f"{name:<34}  {losses.mean():5.2f}   {losses.min():5.2f}   {losses.max():8.2f}")
# sphinx_gallery_start_ignore
assert final["factor 1, next_best"].mean() < 1.5 * final["no limit"].mean()
assert final["factor 1, drop"].min() > 1.3 * final["no limit"].max()
assert final["factor 0.5, drop"].min() > 2 * final['factor 0.5, priority="weight"'].max()
assert final['factor 0.5, priority="weight"'].min() > final["factor 1, drop"].mean()
# sphinx_gallery_end_ignore

# %%
# A factor of 1 with drops costs accuracy here, though the balancing loss is at work; with rerouting
# it costs next to nothing. With room for half of the slots the loss is far higher, and less so
# where the slots with the largest weights are the ones that are kept. These are the numbers of one
# small task. They show the questions to ask of yours: how much is dropped, whose slots they are,
# and whether the routing may look ahead. :doc:`/watching` shows how to follow the dropped share
# while a model trains.
