"""The same training in a loop of one's own, for comparison with that of a library."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import qprune
from qprune.compression.compressor import Compressor

BATCH, STEPS_PER_EPOCH, EPOCHS = 4, 5, 6
SCHEDULE = qprune.Schedule(t_p=0, dt_p=1, n=3, t_qw=3.4, t_qf=4.4)
WINDOW = 3 * BATCH  # three steps before each event


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH * STEPS_PER_EPOCH, 6, generator=generator)
    return TensorDataset(x, torch.tanh(x[:, :3]))


class Loss(nn.Module):
    """A network that returns its loss and its prediction, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        found = {"logits": self.body(x)}
        return found if labels is None else {"loss": nn.functional.mse_loss(found["logits"], labels), **found}


def compressed(accumulate: int = 1) -> Compressor:
    """A network with operators; `accumulate` batches a step."""
    prune = qprune.PruneConfig(window=WINDOW)
    example = {"x": torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(1))}
    return qprune.compress(Loss(), example, SCHEDULE, STEPS_PER_EPOCH // accumulate, BATCH, prune)


def own_loop(compressor: Compressor) -> dict[str, Tensor]:
    """Train to the end with SGD, and return the state."""
    optimizer = torch.optim.SGD(compressor.network.parameters(), lr=0.1)
    x, y = data().tensors
    for step in range(EPOCHS * STEPS_PER_EPOCH):
        first = step % STEPS_PER_EPOCH * BATCH
        compressor.at(step)
        optimizer.zero_grad()
        compressor.network.train()(x[first : first + BATCH], y[first : first + BATCH])["loss"].backward()
        optimizer.step()
    return compressor.network.state_dict()


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that differ in a bit."""
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(found[name], value)]
