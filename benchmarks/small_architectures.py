"""Networks of kinds that no package offers without its weights, for `export_models.py`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Example = tuple[nn.Module, tuple[Tensor, ...]]


class Named(nn.Module):
    """One result of a model that returns several by name."""

    def __init__(self, model: nn.Module, name: str):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor) -> Tensor:
        """Return the result."""
        return self.model(x)[self.name]


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """The U-Net of segmentation: four levels, upsampling by transposed convolution or bilinear."""

    def __init__(self, width: int = 24):
        super().__init__()
        sizes = [width << level for level in range(4)]
        self.down = nn.ModuleList(
            _double(a, b) for a, b in zip([3, *sizes[:-1]], sizes, strict=True)
        )
        self.middle = _double(sizes[-1], 2 * sizes[-1])
        self.lift = nn.ModuleList(
            nn.ConvTranspose2d(2 * s, s, 2, 2) if s > width else nn.Conv2d(2 * s, s, 1)
            for s in reversed(sizes)
        )
        self.up = nn.ModuleList(_double(2 * s, s) for s in reversed(sizes))
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of each pixel."""
        kept = []
        for block in self.down:
            kept.append(block(x))
            x = F.max_pool2d(kept[-1], 2)
        x = self.middle(x)
        for lift, block in zip(self.lift, self.up, strict=True):
            if isinstance(lift, nn.Conv2d):
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            x = block(torch.cat([kept.pop(), lift(x)], 1))
        return self.head(x)


class SuperResolution(nn.Module):
    """ESPCN: convolutions, then pixels out of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 64, 5, padding=2), nn.Tanh(), nn.Conv2d(64, 64, 3, padding=1), nn.PReLU(64),
            nn.Conv2d(64, 32, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(32, 9, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return the image, three times as large."""
        return F.pixel_shuffle(self.body(x), 3)


class _ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, embedding: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(16, inputs), nn.GroupNorm(16, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.embed = nn.Linear(embedding, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = y + self.embed(F.silu(embedded))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class _Attention(nn.Module):
    def __init__(self, channels: int, context: int):
        super().__init__()
        self.norm = nn.GroupNorm(16, channels)
        self.own = nn.MultiheadAttention(channels, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(
            channels, 4, kdim=context, vdim=context, batch_first=True
        )
        self.layer1, self.layer2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.gate = nn.Linear(channels, 8 * channels)
        self.back = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        shape = x.shape
        y = self.norm(x).flatten(2).transpose(1, 2)
        z = self.layer1(y)
        y = y + self.own(z, z, z, need_weights=False)[0]
        y = y + self.cross(self.layer2(y), context, context, need_weights=False)[0]
        value, gate = self.gate(y).chunk(2, -1)
        y = y + self.back(value * F.gelu(gate))
        return x + y.transpose(1, 2).reshape(shape)


class DiffusionBlock(nn.Module):
    """A small U-Net of a latent diffusion model: time steps, group norms, cross attention."""

    def __init__(self, width: int = 64, context: int = 128):
        super().__init__()
        self.width, embedding = width, 4 * width
        self.time = nn.Sequential(
            nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.first = nn.Conv2d(4, width, 3, padding=1)
        self.down1, self.down2 = (
            _ResBlock(width, width, embedding),
            _ResBlock(width, 2 * width, embedding),
        )
        self.attention = _Attention(2 * width, context)
        self.shrink = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.up = _ResBlock(3 * width, width, embedding)
        self.last = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """Return the noise in a latent image at a time step."""
        half = self.width // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = timestep[:, None].float() * rates[None]
        embedded = self.time(torch.cat([angles.cos(), angles.sin()], -1))
        a = self.down1(self.first(x), embedded)
        b = self.attention(self.down2(self.shrink(a), embedded), context)
        b = F.interpolate(b, scale_factor=2.0, mode="nearest")
        return self.last(F.silu(self.up(torch.cat([a, b], 1), embedded)))


class Recurrent(nn.Module):
    """A recurrent network over features, and a classifier of each step."""

    def __init__(self, kind: Any, bidirectional: bool):
        super().__init__()
        self.net = kind(40, 128, num_layers=2, bidirectional=bidirectional, batch_first=True)
        self.head = nn.Linear(256 if bidirectional else 128, 32)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of each step."""
        return self.head(self.net(x)[0])


class Crnn(nn.Module):
    """A recogniser of text lines: convolutions, then a bidirectional LSTM over columns."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(128, 256, 3, padding=1), nn.BatchNorm2d(256), nn.ReLU(),
            nn.MaxPool2d((2, 2), (2, 1), (0, 1)),
            nn.Conv2d(256, 256, (4, 2)), nn.ReLU(),
        )  # fmt: skip
        self.net = nn.LSTM(256, 128, num_layers=2, bidirectional=True)
        self.head = nn.Linear(256, 97)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logarithmic probability of each letter in each column."""
        columns = self.body(x).squeeze(2).permute(2, 0, 1)
        return F.log_softmax(self.head(self.net(columns)[0]), -1)


class VoiceDetector(nn.Module):
    """The kind of silero-vad: a learned spectrum, convolutions, and an LSTM whose state is passed."""

    def __init__(self) -> None:
        super().__init__()
        self.basis = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.body = nn.Sequential(
            nn.Conv1d(129, 128, 3, padding=1), nn.ReLU(), nn.Conv1d(128, 64, 3, 2, 1), nn.ReLU(),
            nn.Conv1d(64, 64, 3, 2, 1), nn.ReLU(), nn.Conv1d(64, 128, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.cell = nn.LSTM(128, 128)
        self.head = nn.Conv1d(128, 1, 1)

    def forward(self, x: Tensor, state: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
        """Return the probability of speech and the next state."""
        spectrum = self.basis(F.pad(x[:, None], (0, 64), mode="reflect"))
        real, imaginary = spectrum[:, :129], spectrum[:, 129:]
        features = self.body(torch.sqrt(real**2 + imaginary**2)).permute(2, 0, 1)
        y, (h, c) = self.cell(features, (state[0:1], state[1:2]))
        found = torch.sigmoid(self.head(torch.relu(y.permute(1, 2, 0)))).mean(2)
        return found * torch.where(rate == 16000, 1.0, 0.5), torch.cat([h, c])


def unet() -> Example:
    """A U-Net."""
    return UNet(), (torch.randn(1, 3, 256, 256),)


def super_resolution() -> Example:
    """ESPCN."""
    return SuperResolution(), (torch.randn(1, 1, 112, 112),)


def diffusion_block() -> Example:
    """A diffusion model's network."""
    example = (torch.randn(1, 4, 32, 32), torch.tensor([17]), torch.randn(1, 16, 128))
    return DiffusionBlock(), example


def lstm() -> Example:
    """Two bidirectional LSTM layers over 50 steps."""
    return Recurrent(nn.LSTM, True), (torch.randn(1, 50, 40),)


def gru() -> Example:
    """Two GRU layers over 50 steps."""
    return Recurrent(nn.GRU, False), (torch.randn(1, 50, 40),)


def crnn() -> Example:
    """A recogniser of lines of 32 by 160 pixels."""
    return Crnn(), (torch.randn(1, 1, 32, 160),)


def voice_detector() -> Example:
    """A voice detector on 512 samples."""
    return VoiceDetector(), (torch.randn(1, 576), torch.zeros(2, 1, 128), torch.tensor(16000))
