"""
Unit-testing the gradients of a router of your own
==================================================

A wrong gradient seldom looks wrong. The program runs, the loss goes down, and the model is a little
worse than it could be. This tutorial writes a router, plants a fault of a kind that is easily made,
and finds it: with ``gradcheck`` while the router is written, with ``check_surrogate`` where a
gradient is meant to differ from the derivative, and with ``certify`` for the layer as a whole. It
ends with a certificate that passes, and with the lines that keep it so.

Everything is shown here in the order in which one would do it; :doc:`/testing_gradients` and
:doc:`/certificates` are the reference.
"""

# %%
# A router
# --------
#
# A router maps tokens [T, H] to logits [T, E]. Ours compares directions: tokens are projected to a
# few dimensions and normalised, and the logit of an expert is the cosine with its own direction,
# times a scale that is learnt. There are many tokens, so the normalisation is an autograd function
# that keeps no more than it needs.

import shutil
import sys
import tempfile
import textwrap
from pathlib import Path
from subprocess import run

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import mse_loss, normalize

from torchmoe.nn import MoE
from torchmoe.testing import certify, check_surrogate, gradcheck

torch.set_num_threads(1)  # layers this small are not faster with more


class Unit(torch.autograd.Function):
    """v / |v|."""

    @staticmethod
    def forward(ctx, v):
        length = v.norm(dim=-1, keepdim=True)
        ctx.save_for_backward(length)
        return v / length

    @staticmethod
    def backward(ctx, grad):
        (length,) = ctx.saved_tensors
        return grad / length


# %%
# The router itself takes the normalisation as an argument, so that we can try others.


class DirectionRouter(nn.Module):
    def __init__(self, hidden_size, num_experts, projection_size, unit):
        super().__init__()
        self.unit = unit
        self.project = nn.Linear(hidden_size, projection_size, bias=False)
        self.directions = nn.Parameter(torch.randn(num_experts, projection_size))
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        cosine = self.unit(self.project(x)) @ normalize(self.directions).T
        return self.log_scale.exp() * cosine


# %%
# Does it train?
# --------------
#
# We let a layer learn eight linear maps, one for each cluster of tokens, with our router and with
# one that uses ``torch.nn.functional.normalize``.

torch.manual_seed(0)
centres, maps = torch.randn(8, 16), torch.randn(8, 16, 16) / 4


def train(unit):
    torch.manual_seed(1)
    moe = MoE(16, 16, num_experts=8, top_k=2, router=DirectionRouter(16, 8, 4, unit))
    optimizer = torch.optim.Adam(moe.parameters(), lr=3e-3)
    losses = []
    for _ in range(300):
        cluster = torch.randint(8, (256,))
        x = centres[cluster] + 0.5 * torch.randn(256, 16)
        y, aux_loss, _ = moe(x)
        loss = mse_loss(y, torch.einsum("ti,tij->tj", x, maps[cluster]))
        optimizer.zero_grad()
        (loss + aux_loss).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %%
# Both losses, step by step:

losses = {"torch's normalize": train(normalize), "our Unit": train(Unit.apply)}
figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
for (name, values), colour, style in zip(
    losses.items(), ["#0072b2", "#d55e00"], ["-", "--"], strict=True
):
    axis.plot(values, style, color=colour, label=name)
axis.set(title="Training with either router", xlabel="step", yscale="log")
axis.set_ylabel("mean squared error")
axis.grid(alpha=0.3)
axis.legend()
plt.show()
# sphinx_gallery_start_ignore
ENDS = [sum(values[-50:]) / 50 for values in losses.values()]
assert all(end < 0.1 * values[0] for end, values in zip(ENDS, losses.values(), strict=True))
assert abs(ENDS[1] / ENDS[0] - 1) < 0.2
# sphinx_gallery_end_ignore

# %%
# It does: the two curves lie on each other. Would you look for a mistake?
#
# Is the gradient the derivative?
# -------------------------------
#
# ``gradcheck`` takes the router and some tokens, of any dtype, and compares the gradient of every
# tensor with finite differences. (Long lines are wrapped for this page.)


def show(text):
    for line in str(text).splitlines():
        print(line if line.startswith((" ", "|")) else textwrap.fill(line, 84))


torch.manual_seed(0)
tokens = torch.randn(12, 8)
router = DirectionRouter(8, 4, 3, Unit.apply)
try:
    gradcheck(router, tokens)
except RuntimeError as error:
    show(error)
    # sphinx_gallery_start_ignore
    message = str(error)
    assert "gradient of inputs[0], project.weight must be" in message
    assert "Found nothing wrong with directions, log_scale." in message
    assert "a path from the tensor to the output is missing" in message
else:
    raise AssertionError
    # sphinx_gallery_end_ignore

# %%
# One screen, to be read from the top:
#
# 1. Which tensors: the tokens and ``project.weight``. ``directions`` and ``log_scale`` are right.
#    So the fault is between ``project`` and the cosine, and that is ``Unit``.
# 2. How wrong: *got* is another multiple of *expected* in each row. A factor that was lost would
#    be the same in all.
# 3. What it usually means: a formula that is not the derivative, or a path that is missing.
#
# A path is missing: the length depends on v, too. With u = v / \|v\| and the incoming gradient g,
# the derivative takes away what points along u::
#
#     dL/dv = (g - u <u, g>) / |v|
#
# The missing term points along v. For a token by itself moving there changes no cosine, so it is
# no wonder that the loss did not tell.


class MendedUnit(torch.autograd.Function):
    """v / |v|, with its derivative."""

    @staticmethod
    def forward(ctx, v):
        length = v.norm(dim=-1, keepdim=True)
        ctx.save_for_backward(v / length, length)
        return v / length

    @staticmethod
    def backward(ctx, grad):
        u, length = ctx.saved_tensors
        return (grad - u * (u * grad).sum(dim=-1, keepdim=True)) / length


router = DirectionRouter(8, 4, 3, MendedUnit.apply)
layer = MoE(8, 6, num_experts=4, top_k=2, router=router)
print("the router:", gradcheck(router, tokens))
print("the layer: ", gradcheck(layer, tokens))

# %%
# The layer chooses experts, and a step of a finite difference might change a choice. ``gradcheck``
# sees to it that none does.
#
# What if the gradient is not meant to be the derivative?
# -------------------------------------------------------
#
# A variant: tokens as binary codes, of which only the signs count. The derivative of a sign is 0,
# so the gradient is declared to be that of a tanh. This is a straight-through estimator.


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return v.sign()

    @staticmethod
    def backward(ctx, grad):
        (v,) = ctx.saved_tensors
        return grad * (1 - v.tanh() ** 2)


class BinaryRouter(nn.Module):
    def __init__(self, hidden_size, num_experts, num_bits):
        super().__init__()
        self.project = nn.Linear(hidden_size, num_bits, bias=False)
        self.directions = nn.Parameter(torch.randn(num_experts, num_bits))

    def forward(self, x):
        return Sign.apply(self.project(x)) @ self.directions.T


# %%
# Differences of the output cannot confirm such a gradient. They are 0:

torch.manual_seed(0)
binary = BinaryRouter(8, 4, 6)
try:
    gradcheck(binary, tokens)
except RuntimeError as error:
    show(error)
    # sphinx_gallery_start_ignore
    message = str(error)
    assert "where 0 is expected" in message
    assert "on which the output does not depend." in message
else:
    raise AssertionError
    # sphinx_gallery_end_ignore

# %%
# What can be tested is the declaration. A *surrogate* is a function of the same arguments whose
# ordinary derivative is the gradient that we mean. What it detaches is held constant: here the
# codes have the values of the signs, and move as the tanh does.


def surrogate(router, x):
    v = router.project(x)
    codes = v.sign().detach() + v.tanh() - v.tanh().detach()
    return codes @ router.directions.T


print("tanh:    ", check_surrogate(binary, tokens, surrogate=surrogate))

# %%
# The check shares no backward pass with ``Sign``: it takes differences of the surrogate. And it can
# fail. Declared as a clamp, which is another popular choice, the same gradient is refused:


def clamped(router, x):
    v = router.project(x)
    codes = v.sign().detach() + v.clamp(-1, 1) - v.clamp(-1, 1).detach()
    return codes @ router.directions.T


right = check_surrogate(binary, tokens, surrogate=clamped, raise_exception=False)
print("clamp:   ", right)
# sphinx_gallery_start_ignore
assert not right
# sphinx_gallery_end_ignore

# %%
# A router may also carry its surrogate as a method of that name.
#
# Is the layer right?
# -------------------
#
# Back to the router of directions, whose gradient is right now. A layer has more to keep than that:
# masked tokens, micro-batches, checkpointing, second derivatives. ``certify`` asks. We begin with
# three of the laws, which takes less time than all.

torch.manual_seed(0)
layer = MoE(8, 6, num_experts=4, top_k=2, router=DirectionRouter(8, 4, 3, MendedUnit.apply))
laws = ["gradients", "unrouted_tokens", "higher_orders"]
certificate = certify(layer, laws=laws)

# %%
# A finding names a clause of the law, a tensor, and the least number of tokens that shows it. We
# print the first one of each law that is broken.

for law in laws:
    findings = [f for f in certificate.failures if f.law == law]
    print(f"{certificate.held(law):<6}  {law}, findings: {len(findings)}")
    for f in findings[:1]:
        expected, got = f.expected.split(",")[0], f.got.split(",")[0]
        print(f"        {f.clause}")
        print(f"        {f.where} must be {expected}, got {got}")
        print(f"        fewest tokens: {f.num_tokens}")
# sphinx_gallery_start_ignore
assert [certificate.held(law) for law in laws] == ["held", "broken", "broken"]
MASKED = [f for f in certificate.failures if f.law == "unrouted_tokens"]
assert MASKED[0].clause.startswith("finite differences with a mask")
assert all("nan" in f.got for f in MASKED)
assert {f.num_tokens for f in MASKED} == {2}
assert {f.clause for f in certificate.failures if f.law == "higher_orders"} <= {
    "double backward, router",
    "double backward, x",
}
# sphinx_gallery_end_ignore

# %%
# Two laws are broken, and both findings lead to a line.
#
# **unrouted_tokens.** The gradient is NaN as soon as there are two tokens, one of which is masked.
# To the router a masked token is a row of zeros. Its length is 0, and ``forward`` divides by it. So
# one token of padding is enough to ruin the weights in the next step:

mask = torch.ones(12, dtype=torch.bool)
mask[-1] = False
layer(tokens, token_mask=mask).hidden_states.sum().backward()
print("router.project.weight.grad[0]:", layer.router.project.weight.grad[0].tolist())
# sphinx_gallery_start_ignore
assert layer.router.project.weight.grad.isnan().all()
# sphinx_gallery_end_ignore

# %%
# **higher_orders.** A second derivative is silently wrong. ``save_for_backward`` keeps the graph
# of inputs and outputs alone, and ``u`` and ``length`` were saved as values in between: to a second
# backward pass they are constants. So we save v and form them again.
#
# This is the router as a file of its own.

folder = Path(tempfile.mkdtemp())
written = (folder / "direction_router.py").write_text('''\
import torch
from torch import nn
from torch.nn.functional import normalize
from torchmoe.nn import MoE


class Unit(torch.autograd.Function):
    """v / |v|, and 0 for a token of zeros."""

    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return v / v.norm(dim=-1, keepdim=True).clamp(min=1e-9)

    @staticmethod
    def backward(ctx, grad):
        (v,) = ctx.saved_tensors
        length = v.norm(dim=-1, keepdim=True).clamp(min=1e-9)
        u = v / length
        return (grad - u * (u * grad).sum(dim=-1, keepdim=True)) / length


class DirectionRouter(nn.Module):
    def __init__(self, hidden_size, num_experts, projection_size):
        super().__init__()
        self.project = nn.Linear(hidden_size, projection_size, bias=False)
        self.directions = nn.Parameter(torch.randn(num_experts, projection_size))
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        cosine = Unit.apply(self.project(x)) @ normalize(self.directions).T
        return self.log_scale.exp() * cosine


def make_layer():
    torch.manual_seed(0)
    return MoE(8, 6, num_experts=4, top_k=2, router=DirectionRouter(8, 4, 3))
''')

# %%
# What does the certificate say now?
# ----------------------------------
#
# We ask all the laws. ``to_markdown`` gives what one would put into a report or a comment on a
# change.

sys.path.insert(0, str(folder))
from direction_router import make_layer

certificate = certify(make_layer())
show(certificate.to_markdown())
# sphinx_gallery_start_ignore
assert certificate.passed
assert [gap.law for gap in certificate.not_asked] == ["balance", "replicas"]
# sphinx_gallery_end_ignore

# %%
# It passes. What was not asked stands below the table with the reason, so that a certificate never
# says more than was looked at.
#
# How does it stay right?
# -----------------------
#
# By a test. The gradient of the router takes a moment; of the laws one may ask those that the code
# is in danger of breaking.

written = (folder / "test_direction_router.py").write_text("""\
import torch
from direction_router import DirectionRouter, make_layer
from torchmoe.testing import certify, gradcheck


def test_the_gradient():
    torch.manual_seed(0)
    assert gradcheck(DirectionRouter(8, 4, 3), torch.randn(12, 8))


def test_the_laws():
    certificate = certify(make_layer(), laws=["unrouted_tokens", "recomputation"])
    assert certificate, certificate
""")


def shell(*arguments):
    done = run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
    show(done.stdout)
    print("exit code:", done.returncode)
    # sphinx_gallery_start_ignore
    assert done.returncode == 0, done.stdout + done.stderr
    # sphinx_gallery_end_ignore


shell("-m", "pytest", "-q", "test_direction_router.py")

# %%
# Or from a shell, without a test: ``python -m torchmoe.testing`` takes the path of a class or
# function that makes the layer. The exit code is 1 where the certificate does not pass, as a CI job
# expects.

laws = ["--laws", "unrouted_tokens,symmetry"]
shell("-m", "torchmoe.testing", "direction_router:make_layer", *laws)
shutil.rmtree(folder)

# %%
# In short: ``gradcheck`` while a gradient is written, ``check_surrogate`` where it is a
# declaration, ``certify`` before others use the layer.
