"""Deep deterministic policy gradient (Lillicrap et al. 2016) for one action in [0, 1], with the numbers of AMC's code."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

ACTOR_RATE, CRITIC_RATE = 1e-4, 1e-3
HIDDEN, BATCH, FOLLOWING = 300, 64, 0.01
"""Units of both hidden layers, transitions in an update, and the rate at which target networks follow."""
AVERAGING = 0.5
"""Rate of the moving average of rewards, which is subtracted."""

TINY = 1e-12


class Ddpg:
    """An actor, a critic, their target networks and the transitions seen; discount 1.

    Args:
        features: Length of a state.
        memory: Transitions that are remembered.
        seed: Seed of the initial weights and of all draws.
    """

    def __init__(self, features: int, *, memory: int, seed: int) -> None:
        self.generator, self.memory = torch.Generator().manual_seed(seed), memory
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor = nn.Sequential(_layers(features), nn.Sigmoid())
            self.critic = _layers(features + 1)
        self.follower, self.judge = deepcopy(self.actor), deepcopy(self.critic)
        self._optimizers = (
            torch.optim.Adam(self.actor.parameters(), ACTOR_RATE),
            torch.optim.Adam(self.critic.parameters(), CRITIC_RATE),
        )
        self._seen: list[tuple[Tensor, float, float, Tensor, bool]] = []
        self._average: float | None = None

    @torch.no_grad()
    def act(self, state: Tensor, deviation: float, low: float, high: float) -> float:
        """Returns the actor's action with noise of a normal distribution that is truncated to [low, high].

        Args:
            state: (features,).
            deviation: Standard deviation of the noise.
            low: Least action.
            high: Largest action.
        """
        mean = float(self.actor(state))
        ends = torch.special.ndtr((torch.tensor([low, high], dtype=torch.float64) - mean) / deviation)
        if float(ends[1] - ends[0]) < TINY:  # the bounds lie in one tail
            return min(high, max(low, mean))
        place = ends[0] + (ends[1] - ends[0]) * torch.rand((), generator=self.generator, dtype=torch.float64)
        return min(high, max(low, float(mean + deviation * torch.special.ndtri(place))))

    def random(self, low: float, high: float) -> float:
        """Returns a uniform action."""
        return low + (high - low) * float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def remember(self, states: list[Tensor], actions: list[float], reward: float) -> None:
        """Keeps the transitions of an episode, whose reward comes after its last action."""
        rate = AVERAGING if self._average is not None else 1.0
        self._average = (self._average or 0.0) + rate * (reward - (self._average or 0.0))
        for number, (state, action) in enumerate(zip(states, actions, strict=True)):
            last = number + 1 == len(states)
            self._seen.append((state, action, reward if last else 0.0, states[-1 if last else number + 1], last))
        del self._seen[: -self.memory]

    def update(self) -> None:
        """Takes one step of critic and actor along a batch of remembered transitions."""
        rows = torch.randint(len(self._seen), (BATCH,), generator=self.generator).tolist()
        parts = list(zip(*(self._seen[row] for row in rows), strict=True))
        state, following = torch.stack(list(parts[0])), torch.stack(list(parts[3]))
        action, reward, last = (torch.tensor(part, dtype=torch.float32)[:, None] for part in (parts[1], parts[2], parts[4]))
        with torch.no_grad():
            reward = reward - last * (self._average or 0.0)
            wanted = reward + (1 - last) * _value(self.judge, following, self.follower(following))
        judged = (_value(self.critic, state, action) - wanted).square().mean()
        self._step(1, judged)
        self._step(0, -_value(self.critic, state, self.actor(state)).mean())
        with torch.no_grad():
            for own, target in ((self.actor, self.follower), (self.critic, self.judge)):
                for new, old in zip(own.parameters(), target.parameters(), strict=True):
                    old.lerp_(new, FOLLOWING)

    def _step(self, number: int, loss: Tensor) -> None:
        optimizer = self._optimizers[number]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _layers(inputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)
    )  # fmt: skip


def _value(critic: nn.Module, states: Tensor, actions: Tensor) -> Tensor:
    value: Tensor = critic(torch.cat([states, actions], 1))
    return value
