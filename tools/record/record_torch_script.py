#!/usr/bin/env python3
"""Records a small TorchScript network and its output for tests/models/torch_script.rs.

    python3 -m venv .venv
    .venv/bin/pip install torch==2.13.0 safetensors numpy
    .venv/bin/python tools/record/record_torch_script.py    # writes tests/golden/models/torch_script
"""

import json
import pathlib

import torch
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "models" / "torch_script"


class Network(torch.nn.Module):
    """A linear layer on the sample, shifted by timestep and class, with dropout in training."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        shift = (timesteps.to(x_t.dtype) / 1000 + class_labels.to(x_t.dtype)).unsqueeze(1)
        return self.dropout(self.linear(x_t) + shift)


def main():
    torch.manual_seed(0)
    network = Network().eval()
    x_t, timesteps, labels = torch.randn(3, 2), torch.tensor([999, 500, 0]), torch.tensor([0, 1, 2])
    output = network(x_t, timesteps, labels)
    output.square().sum().backward()
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.jit.script(network).save(str(FOLDER / "model.pt"))
    config = {"_class_name": "TorchScript", "file": "model.pt", "class_labels": True}
    (FOLDER / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    recorded = {"x_t": x_t, "timesteps": timesteps, "class_labels": labels, "output": output.detach()}
    recorded["grad.linear.weight"] = network.linear.weight.grad
    save_file(recorded, FOLDER / "expected.safetensors")


if __name__ == "__main__":
    main()
