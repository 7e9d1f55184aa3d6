"""Layers whose arithmetic is a device's own affair: ``dalle/models/kernels.py`` says which form of it runs where."""

from torch import Tensor, nn

from dalle.models.kernels import kernels_for


class Linear(nn.Linear):
    """``nn.Linear``, computed by the form of the device."""

    def forward(self, inputs: Tensor) -> Tensor:
        return kernels_for(inputs.device).linear(inputs, self.weight, self.bias)


class Dropout(nn.Dropout):
    """``nn.Dropout``, drawn by the form of the device."""

    def forward(self, inputs: Tensor) -> Tensor:
        return kernels_for(inputs.device).dropout(inputs, self.p) if self.training else inputs
