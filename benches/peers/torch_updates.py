"""Progressive distillation, LCM and DMD2 in PyTorch and diffusers, written from their equations.

An update equals one of benches/update_times.rs: the same network, timesteps, guidance, losses and optimizer, on noised
data. `replay` repeats recorded updates and returns the differences between the two sides.
"""

import json
import pathlib

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from safetensors.torch import load_file
from torch import nn

TEACHER = pathlib.Path(__file__).resolve().parents[2] / "assets/fashion-mnist-teacher/unet"
SIDE, CLASSES, NULL_CLASS = 32, 10, 10
TIMESTEPS, STEPS, GUIDANCE = 1000, 4, 3.0
CRITIC_RATIO, GAN_WEIGHT, CRITIC_GAN_WEIGHT, CRITIC_WEIGHT_CAP = 5, 5e-3, 1e-2, 1e4


def scales():
    """`alpha` and `sigma` by timestep, with the clean end last, where an index of -1 finds it."""
    betas = torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)
    alpha_cumprod = torch.cat([(1 - betas).cumprod(0), torch.ones(1, dtype=torch.float64)])
    return alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()


ALPHA, SIGMA = scales()
ALPHA32, SIGMA32 = ALPHA.float(), SIGMA.float()


def per_sample(values):
    return values.view(-1, 1, 1, 1)


def add_noise(x0, noise, timesteps):
    return per_sample(ALPHA32[timesteps]) * x0 + per_sample(SIGMA32[timesteps]) * noise


def mean_over_sample(values):
    return values.flatten(1).mean(1)


def ddim(timesteps, ends):
    """`r` and `c` of the deterministic step `x_s = r x_t + c x0`."""
    keep = SIGMA[ends] / SIGMA[timesteps]
    return keep, ALPHA[ends] - keep * ALPHA[timesteps]


def network():
    return UNet2DModel(**UNet2DModel.load_config(TEACHER))


class Head(nn.Module):
    """DMD2's discriminator on the 96 x 4 x 4 features of the bottom level."""

    def __init__(self, channels=96, side=4, groups=12):
        super().__init__()
        conv, norm = nn.Conv2d(channels, channels, side), nn.GroupNorm(groups, channels)
        self.blocks = nn.ModuleList([nn.ModuleDict({"conv": conv, "norm": norm})])
        self.conv_out = nn.Conv2d(channels, 1, 1)

    def forward(self, features):
        for block in self.blocks:
            features = F.silu(block["norm"](block["conv"](features)))
        return self.conv_out(features).flatten()


class Denoiser:
    """A U-Net that predicts v, as an estimator of the clean data."""

    def __init__(self, unet, bfloat16):
        self.unet, self.bfloat16 = unet, bfloat16
        # Samples that passed through, and the number of those with a gradient.
        self.passes = [0, 0]

    def autocast(self):
        return torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=self.bfloat16)

    def count(self, answer, passes=None):
        passes = self.passes if passes is None else passes
        passes[0] += len(answer)
        passes[1] += len(answer) if answer.requires_grad else 0

    def output(self, x_t, timesteps, labels):
        with self.autocast():
            output = self.unet(x_t, timesteps, labels, return_dict=False)[0].float()
        self.count(output)
        return output

    def x0(self, x_t, timesteps, labels):
        v = self.output(x_t, timesteps, labels)
        return per_sample(ALPHA32[timesteps]) * x_t - per_sample(SIGMA32[timesteps]) * v

    def guided_x0(self, x_t, timesteps, labels):
        """Conditional and unconditional in one batch; clipped to the data's range."""
        both = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])
        cond, uncond = self.output(x_t.repeat(2, 1, 1, 1), timesteps.repeat(2), both).chunk(2)
        v = uncond.lerp(cond, GUIDANCE)
        x0 = per_sample(ALPHA32[timesteps]) * x_t - per_sample(SIGMA32[timesteps]) * v
        return x0.clamp(-1, 1)

    def features(self, x_t, timesteps, labels):
        """The output of the bottom level: UNet2DModel.forward without the up blocks."""
        unet = self.unet
        emb = unet.time_embedding(unet.time_proj(timesteps)) + unet.class_embedding(labels)
        hidden = unet.conv_in(x_t)
        for block in unet.down_blocks:
            hidden, _ = block(hidden_states=hidden, temb=emb)
        return unet.mid_block(hidden, emb)


class Trained:
    """Parameters with their own optimizer."""

    def __init__(self, parameters, learning_rate):
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0, fused=True)

    def settle(self):
        """Creates the optimizer's state now, as the other side does, by a step with zero gradients, which changes nothing."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, loss):
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        value = loss.item()
        if not (torch.isfinite(norm) and value == value):
            raise SystemExit(f"the loss is {value}, the norm of its gradient {norm.item()}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value


class Average:
    """A moving average of parameters."""

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self.updates = 0

    @torch.no_grad()
    def update(self):
        decay = min(0.999, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)
        self.updates += 1


class Batch:
    """States, real samples, and the source of later draws."""

    def __init__(self, x_t, timesteps, labels, real_x0, real_labels, student_draws=None, critic_draws=None):
        self.x_t, self.timesteps, self.labels = x_t, timesteps, labels
        self.real_x0, self.real_labels = real_x0, real_labels
        self.student_draws, self.critic_draws = student_draws, critic_draws


class Data:
    """Fixed random data, with new noise for each update."""

    def __init__(self, grid, batch):
        self.grid = torch.tensor(grid)
        self.x0 = torch.randn(batch, 1, SIDE, SIDE).clamp(-1, 1)
        self.labels = torch.randint(0, CLASSES, (batch,))

    def noised(self):
        timesteps = self.grid[torch.randint(0, len(self.grid), self.labels.shape)]
        x_t = add_noise(self.x0, torch.randn_like(self.x0), timesteps)
        return Batch(x_t, timesteps, self.labels, self.x0, self.labels)


class Method:
    """The common part of the three methods: a frozen teacher, a student, its optimizer and its average."""

    EXTRA = ()

    def __init__(self, bfloat16=False, channels_last=False, compiled=False, learning_rate=1e-4, folder=None):
        self.networks = {name: Denoiser(network(), bfloat16) for name in ("teacher", "student", *self.EXTRA)}
        self.head = Head() if "critic" in self.EXTRA else None
        self.fill(folder)
        for name, denoiser in self.networks.items():
            trained = name in ("student", "critic")
            denoiser.unet.train(trained).requires_grad_(trained)
            if channels_last:
                denoiser.unet.to(memory_format=torch.channels_last)
            if compiled:
                denoiser.unet.compile()
        self.teacher, self.student = self.networks["teacher"], self.networks["student"]
        self.trained = Trained(self.student.unet.parameters(), learning_rate)
        self.average = Average(self.student.unet.parameters())
        self.learning_rate = learning_rate

    def fill(self, folder):
        """Weights from files; by default the teacher's for all."""
        teacher = self.networks["teacher"].unet.state_dict()
        for name, denoiser in self.networks.items():
            weights = load_file(folder / f"{name}.safetensors") if folder else teacher
            denoiser.unet.load_state_dict(weights)
        if folder and self.head:
            self.head.load_state_dict(load_file(folder / "head.safetensors"))

    def settle(self):
        self.trained.settle()

    def passes(self):
        return {name: denoiser.passes for name, denoiser in self.networks.items()}

    def update(self, step, batch):
        """The loss of each phase."""
        loss = self.trained.step(self.loss(batch))
        self.average.update()
        return [loss]


class Progressive(Method):
    """[Salimans and Ho 2022], two teacher steps per student step, weight max(SNR, 1)."""

    GRID = tuple(TIMESTEPS * (STEPS - n) // STEPS - 1 for n in range(STEPS))

    def __init__(self, **options):
        super().__init__(**options)
        starts = torch.tensor(self.GRID)
        ends = torch.tensor([*self.GRID[1:], -1])
        middles = (starts + ends) // 2
        middles[-1] = (starts[-1] + 1) // 2 - 1
        self.row = torch.zeros(TIMESTEPS, dtype=torch.long)
        self.row[starts] = torch.arange(STEPS)
        self.middles = middles
        self.steps = [[part.float() for part in ddim(*pair)] for pair in ((starts, middles), (middles, ends))]
        root_snr = [ALPHA[t] / SIGMA[t] for t in (starts, middles, ends)]
        # One step equals both with this share of the second prediction; only the second if the end is clean data.
        second = (root_snr[2] - root_snr[1]) / (root_snr[2] - root_snr[0])
        self.second = torch.where(ends == -1, 1.0, second).float()
        self.weights = (ALPHA[starts] / SIGMA[starts]).square().clamp(min=1).float()

    @torch.no_grad()
    def target(self, batch, row):
        x, timesteps, predictions = batch.x_t, batch.timesteps, []
        for keep, gain in self.steps:
            predictions.append(self.teacher.guided_x0(x, timesteps, batch.labels))
            x = per_sample(keep[row]) * x + per_sample(gain[row]) * predictions[-1]
            timesteps = self.middles[row]
        return predictions[0].lerp(predictions[1], per_sample(self.second[row]))

    def loss(self, batch):
        row = self.row[batch.timesteps]
        target = self.target(batch, row)
        x0 = self.student.x0(batch.x_t, batch.timesteps, batch.labels)
        return (self.weights[row] * mean_over_sample((x0 - target).square())).mean()


class LatentConsistency(Method):
    """[Luo et al. 2023] on 50 timesteps, pseudo-Huber with c = 0.001, target average with decay 0.95."""

    EXTRA = ("target",)
    GRID = tuple(range(999, 0, -20))

    def __init__(self, **options):
        super().__init__(**options)
        self.target_network = self.networks["target"]
        starts, ends = torch.tensor(self.GRID), torch.tensor([*self.GRID[1:], 0])
        self.row = torch.zeros(TIMESTEPS, dtype=torch.long)
        self.row[starts] = torch.arange(len(self.GRID))
        self.ends = ends
        self.keep, self.gain = (part.float() for part in ddim(starts, ends))
        scaled = torch.arange(TIMESTEPS, dtype=torch.float64) * 10
        total = scaled.square() + 0.25
        self.skip, self.out = (0.25 / total).float(), (scaled / total.sqrt()).float()

    def consistent(self, x0, x_t, timesteps):
        return per_sample(self.out[timesteps]) * x0 + per_sample(self.skip[timesteps]) * x_t

    @torch.no_grad()
    def target(self, batch):
        row = self.row[batch.timesteps]
        x0 = self.teacher.guided_x0(batch.x_t, batch.timesteps, batch.labels)
        x_end, ends = per_sample(self.keep[row]) * batch.x_t + per_sample(self.gain[row]) * x0, self.ends[row]
        x0 = self.target_network.x0(x_end, ends, batch.labels).clamp(-1, 1)
        return self.consistent(x0, x_end, ends)

    def loss(self, batch, c=1e-3):
        target = self.target(batch)
        x0 = self.student.x0(batch.x_t, batch.timesteps, batch.labels)
        difference = self.consistent(x0, batch.x_t, batch.timesteps) - target
        return (torch.sqrt(difference.square() + c * c) - c).mean()

    def update(self, step, batch):
        losses = super().update(step, batch)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target_network.unet.parameters()), self.trained.parameters, 1 - 0.95)
        return losses


class DistributionMatching(Method):
    """[Yin et al. 2024]: the student in one of five updates, the critic and its discriminator in each."""

    EXTRA = ("critic",)
    GRID = Progressive.GRID

    def __init__(self, **options):
        super().__init__(**options)
        self.critic = self.networks["critic"]
        parameters = [*self.critic.unet.parameters(), *self.head.parameters()]
        self.trained_critic = Trained(parameters, self.learning_rate)
        self.judged_passes = [0, 0]
        self.critic_weights = (ALPHA32 / SIGMA32)[:-1].square().clamp(max=CRITIC_WEIGHT_CAP)

    def settle(self):
        super().settle()
        self.trained_critic.settle()

    def passes(self):
        return super().passes() | {"discriminator": self.judged_passes}

    @staticmethod
    def noised(x0, draws, low=0, high=TIMESTEPS):
        timesteps = torch.randint(low, high, x0.shape[:1], generator=draws)
        return add_noise(x0, torch.randn(x0.shape, generator=draws), timesteps), timesteps

    def logits(self, x0, labels, draws):
        x_t, timesteps = self.noised(x0, draws)
        with self.critic.autocast():
            logits = self.head(self.critic.features(x_t, timesteps, labels).float()).float()
        self.critic.count(logits, self.judged_passes)
        return logits

    @torch.no_grad()
    def gradient(self, x0, batch):
        x_t, timesteps = self.noised(x0, batch.student_draws, 20, 981)
        fake = self.critic.x0(x_t, timesteps, batch.labels).clamp(-1, 1)
        real = self.teacher.guided_x0(x_t, timesteps, batch.labels)
        return (fake - real) / per_sample(mean_over_sample((x0 - real).abs()) + 1e-6)

    def student_loss(self, batch):
        x0 = self.student.x0(batch.x_t, batch.timesteps, batch.labels)
        target = x0.detach() - self.gradient(x0, batch)
        loss = 0.5 * mean_over_sample((x0 - target).square())
        adversarial = F.softplus(-self.logits(x0, batch.labels, batch.student_draws))
        return (loss + GAN_WEIGHT * adversarial).mean(), x0.detach()

    def critic_loss(self, batch, x0):
        x_t, timesteps = self.noised(x0, batch.critic_draws)
        guess = self.critic.x0(x_t, timesteps, batch.labels)
        loss = self.critic_weights[timesteps] * mean_over_sample((guess - x0).square())
        made = self.logits(x0, batch.labels, batch.critic_draws)
        real = self.logits(batch.real_x0, batch.real_labels, batch.critic_draws)
        return (loss + CRITIC_GAN_WEIGHT * (F.softplus(made) + F.softplus(-real))).mean()

    def open_critic(self, on):
        for parameter in self.trained_critic.parameters:
            parameter.requires_grad_(on)

    def update(self, step, batch):
        losses, x0 = [], None
        if step % CRITIC_RATIO == 0:
            self.open_critic(False)
            loss, x0 = self.student_loss(batch)
            losses.append(self.trained.step(loss))
            self.average.update()
        self.open_critic(True)
        if x0 is None:
            with torch.no_grad():
                x0 = self.student.x0(batch.x_t, batch.timesteps, batch.labels)
        losses.append(self.trained_critic.step(self.critic_loss(batch, x0)))
        return losses


METHODS = {"PD": Progressive, "LCM": LatentConsistency, "DMD2": DistributionMatching}


def recorded(folder, step, said):
    """A batch recorded on the other side, and its later draws."""
    tensors = load_file(folder / f"update_{step}.safetensors")
    draws = {
        f"{who}_draws": torch.Generator().manual_seed(said[f"{who}_seed"]) for who in ("student", "critic")
    }
    return Batch(**tensors, **draws)


def relative(found, expected):
    return abs(found - expected) / max(abs(expected), 1e-12)


def weights_apart(method, folder):
    """The distance of student and average from the other side's, as a share of the distance moved."""
    apart = {}
    names = [name for name, _ in method.student.unet.named_parameters()]
    start = load_file(folder / "before/student.safetensors")
    for what, values in (("student", method.trained.parameters), ("ema", method.average.averages)):
        end = load_file(folder / f"after/{what}.safetensors")
        off = sum((value - end[name]).square().sum() for name, value in zip(names, values))
        way = sum((end[name] - start[name]).square().sum() for name in names)
        apart[what] = (off / way).sqrt().item()
    return apart


def replay(folder):
    """Repeats recorded updates: differences of losses and weights, and passes if they differ."""
    folder = pathlib.Path(folder)
    record = json.loads((folder / "record.json").read_text())
    name, bfloat16 = record["method"], record["precision"] == "bfloat16"
    method = METHODS[name](bfloat16=bfloat16, learning_rate=record["learning_rate"], folder=folder / "before")
    worst = 0.0
    for step, said in enumerate(record["updates"]):
        losses = method.update(step, recorded(folder, step, said))
        if len(losses) != len(said["losses"]):
            raise SystemExit(f"error: {name}, update {step}: {len(losses)} phases here, {len(said['losses'])} there")
        worst = max(worst, *(relative(*pair) for pair in zip(losses, said["losses"])))
    here = {role: count for role, count in method.passes().items() if record["passes"][role] != count}
    return {
        "name": f"{name}, {record['precision']}",
        "precision": record["precision"],
        "loss": worst,
        **weights_apart(method, folder),
        "passes_here": here,
        "passes_there": {role: record["passes"][role] for role in here},
    }
