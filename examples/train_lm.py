"""Trains a mixture-of-experts language model on real text and tells how well it learned.

The model reads bytes and predicts the next one. While it trains, the display shows the loss in bits
per byte, the speed, how evenly the experts are used and how much of the work was dropped. At the
end it is measured on text that it has not seen, next to n-gram models of the same text, writes some
text of its own, and draws what its experts specialized in.
"""

# Read it from top to bottom: the model, the loss, one step, the loop. training/ has what surrounds
# them: program.py first, then settings.py, corpus.py and recorder.py.

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which `python -P` leaves out

import torchmoe
from torchmoe.nn import Balance, Capacity, ExpertCommunication, Experts, Gate, MoE, MoEOutput
from training import terminal
from training.batches import Batch, next_batch, step_seed
from training.checkpoint import Checkpoint
from training.corpus import Text
from training.job import Job, begin
from training.language_model import LanguageModel, LMOutput
from training.metrics import Step
from training.parallel import ALONE, Processes
from training.program import Program
from training.recorder import Recorder
from training.routers import READS_TOKEN_IDS, ROUTERS
from training.run_folder import RunFolder
from training.settings import HEAD_SIZE, ModelConfig, Settings

EXAMPLES = """\
examples:
  train_lm.py                               three domains of text that every machine has
  train_lm.py --resume                      go on with a run that was stopped or killed
  train_lm.py --minutes 20 --layers 6       longer and deeper; the schedule follows the clock
  train_lm.py --data ~/notes src/           your own text, one domain per path
  train_lm.py --top-k 1 --estimator straight_through --capacity-factor 1.25
  train_lm.py --balance bias --capacity-factor 1 --order token --overflow next_best
  train_lm.py --config runs/lm/run.json --seed 1 --out runs/seed1   another run, one change
  train_lm.py --load runs/lm                evaluate and sample only
  train_lm.py --load runs/lm --steps 500 --out runs/longer   start a run from trained weights
  torchrun --nproc-per-node 2 train_lm.py   data-parallel, the same batch shared by two processes
"""
VOCABULARY = 256  # a token is a byte
BALANCE_WEIGHT = 0.01  # of the balancing loss
BIAS_RATE = 0.001  # by which the selection bias moves in a step
WARM_UP_STEPS, FINAL_LR_SHARE = 100, 0.1  # the cosine ends at that share of --lr
WEIGHT_DECAY, MAX_GRADIENT_NORM = 0.1, 1.0

# ---- the model: B sequences of S bytes, H hidden size, N heads of size D, E experts, K for a byte


class Attention(nn.Module):
    """Self-attention with rotary positions."""

    cos: Tensor
    sin: Tensor

    def __init__(self, hidden_size: int, context: int) -> None:
        """Makes the two projections and the table of rotations."""
        super().__init__()
        self.heads = hidden_size // HEAD_SIZE
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        frequency = 10_000 ** (-torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)  # [D/2]
        angle = torch.arange(context)[:, None] * frequency  # [context, D/2]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        nn.init.zeros_(self.out.weight)  # starts by adding nothing to the residual stream

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Lets bytes look at each other, [B, S, H] to the same.

        Each looks at itself and those before it; with token_mask [B, S], bool, at all bytes where
        that is True.
        """
        batch, length, hidden_size = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, HEAD_SIZE)  # [B, S, 3, N, D]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, N, S, D] each
        q, k = self.rotate(q), self.rotate(k)
        seen = None if token_mask is None else token_mask[:, None, None, :]  # [B, 1, 1, S]
        y = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None
        )  # [B, N, S, D]
        y = y.transpose(1, 2).reshape(batch, length, hidden_size)  # [B, S, H]
        return cast(Tensor, self.out(y))

    def rotate(self, x: Tensor) -> Tensor:
        """Turns each pair of features by an angle that grows with the position, [B, N, S, D]."""
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]  # [S, D/2]
        a, b = x.chunk(2, dim=-1)  # [B, N, S, D/2] each
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)  # [B, N, S, D]


class DenseFeedForward(nn.Module):
    """SwiGLU, as wide as the experts that a byte visits are together."""

    def __init__(self, config: ModelConfig) -> None:
        """Makes the two projections."""
        super().__init__()
        width = (config.top_k + config.shared_experts) * config.intermediate_size
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Works on each byte alone, [B, S, H] to the same."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # [B, S, width] each
        return cast(Tensor, self.down_proj(functional.silu(gate) * up))


def make_moe(config: ModelConfig, layer: int) -> MoE:
    """The experts' layer of the block with this number."""
    capacity = None
    if config.capacity_factor is not None:
        # In evaluation an expert takes all that it is asked for. Which bytes it drops in training
        # may depend on later bytes, and a held-out loss must not know those.
        capacity = Capacity(
            config.capacity_factor,
            eval_factor=config.experts,
            order=config.order,
            overflow=config.overflow,
        )
    experts = None
    if config.communication:
        experts = ExpertCommunication(
            Experts(config.hidden_size, config.intermediate_size, config.experts),
            config.hidden_size,
            config.experts,
        )
    shared = config.shared_experts * config.intermediate_size
    return MoE(
        config.hidden_size,
        config.intermediate_size,
        config.experts,
        config.top_k,
        gate=Gate(estimator=config.estimator, normalize=config.normalize),
        capacity=capacity,
        balance=Balance(
            weight=BALANCE_WEIGHT if config.balance == "loss" else 0.0,
            fraction_from="global_batch",  # of all processes
            selection_bias_rate=BIAS_RATE if config.balance == "bias" else 0.0,
        ),
        router=ROUTERS[config.router](config.hidden_size, config.experts, config.top_k, layer),
        experts=experts,
        shared_experts=torchmoe.nn.SharedExperts(config.hidden_size, shared) if shared else None,
    )


class Block(nn.Module):
    """Attention, then the feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Makes the two halves and their norms."""
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size)
        self.attention = Attention(config.hidden_size, config.context)
        self.feed_forward_norm = nn.RMSNorm(config.hidden_size)
        is_dense = config.feed_forward == "dense"
        self.feed_forward = DenseFeedForward(config) if is_dense else make_moe(config, layer)
        self.routes_by_id = not is_dense and config.router in READS_TOKEN_IDS

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, MoEOutput | None]:
        """Gives the new residual stream [B, S, H] and what an experts' layer reports."""
        x = x + self.attention(self.attention_norm(x))
        inputs = {"router_input": tokens} if self.routes_by_id else {}
        output = self.feed_forward(self.feed_forward_norm(x), **inputs)
        if isinstance(output, Tensor):
            return x + output, None
        return x + output.hidden_states, output


class ByteLM(LanguageModel):
    """Predicts each next byte from up to `context` bytes before it."""

    def __init__(self, config: ModelConfig) -> None:
        """Makes the layers and draws their parameters from torch's default generator."""
        super().__init__(config)
        self.embedding = nn.Embedding(VOCABULARY, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, VOCABULARY, bias=False)
        nn.init.zeros_(self.head.weight)  # starts with even odds, 8 bits per byte

    def forward(self, tokens: Tensor) -> LMOutput:
        """Scores every next byte; `tokens` is int64 [B, S] with S at most `context`."""
        x = self.embedding(tokens)  # [B, S, H]
        outputs = []
        for block in self.blocks:
            x, output = block(x, tokens)
            if output is not None:
                outputs.append(output)
        logits = self.head(self.norm(x))  # [B, S, VOCABULARY]
        losses = [output.aux_loss for output in outputs]
        aux_loss = torch.stack(losses).sum() if losses else logits.new_zeros(())
        return LMOutput(logits, aux_loss, [output.routing for output in outputs])

    def loss_per_row(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats per byte of each row: [B]; logits [B, S, V], targets int64 [B, S]."""
        losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape).mean(dim=1)


# ---- training


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW that lets matrices decay and leaves the norms' scales alone."""
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() >= 2]
    scales = [(name, p) for name, p in model.named_parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": scales, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def learning_rate(job: Job, share: float) -> float:
    """Of the next step: a linear warm-up, then half a cosine over the share of the run."""
    steps = job.settings.steps
    warm_up_steps = min(WARM_UP_STEPS, steps // 10) if steps else WARM_UP_STEPS
    warm_up = min(1.0, (job.steps_done + 1) / (warm_up_steps + 1))
    cosine = (1 + math.cos(math.pi * min(share, 1.0))) / 2
    return job.settings.lr * warm_up * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


def optimizer_step(job: Job, learner: nn.Module, batch: Batch, lr: float, group: Processes) -> Step:
    """Moves the weights once; `learner` is the job's model, compiled or parallel."""
    settings, model = job.settings, job.model
    for parameters in job.optimizer.param_groups:
        parameters["lr"] = lr
    torch.manual_seed(step_seed("noise", settings.seed, job.progress.step, group.rank))
    with torch.autocast(settings.device, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
        output: LMOutput = learner(batch.inputs)
    losses = model.loss_per_row(output.logits, batch.targets)  # [B]
    loss = losses.mean() + output.aux_loss
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    job.optimizer.step()
    job.optimizer.zero_grad()
    model.update(output.routings)  # once per optimizer step, never in a forward pass
    job.progress.count(settings.rows * settings.context)
    return Step(losses.detach(), batch.domains, output, norm)


def train(job: Job, text: Text, folder: RunFolder, group: Processes) -> bool:
    """Trains until the steps or the minutes are over, or until somebody asks it to stop.

    Leaves a checkpoint of the last step. Gives whether it was asked to stop.
    """
    learner = group.wrap(job.learner)
    learner.train()
    with Recorder(job, text, folder, group) as recorder:
        while not recorder.is_over:
            lr = learning_rate(job, recorder.share)
            batch = next_batch(text, job.progress.step, job.settings, group)
            recorder.add(optimizer_step(job, learner, batch, lr, group), lr)
    return recorder.share < 1


# ---- the program


def check(settings: Settings) -> None:
    """Raises SettingsError where a layer refuses what the settings make of it."""
    with settings.naming_options(), torch.device("meta"):
        make_moe(settings.model(), 0)


def new_job(
    settings: Settings,
    start: Checkpoint | None = None,
    resumes: bool = False,
    group: Processes = ALONE,
) -> Job:
    """A model and its optimizer, as a checkpoint has them where there is one."""
    torch.manual_seed(settings.seed)
    model = ByteLM(settings.model())
    return begin(model, make_optimizer, settings, start, resumes, group)


PROGRAM = Program("train_lm.py", __doc__ or "", EXAMPLES, check, new_job, train)


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line, trains, and tells what was learned."""
    return PROGRAM.main(arguments)


if __name__ == "__main__":
    terminal.run(main)
