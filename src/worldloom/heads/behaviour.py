"""How the logs act: a density of blocks of actions, given the latents before them."""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldloom.core.actions import project
from worldloom.core.config import Sizes
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seams import WorldModel
from worldloom.core.seeds import seeded_weights, torch_generator
from worldloom.core.types import ActionBounds, Context, ModelSpec
from worldloom.heads.head import ConfigT, FitConfig, Head
from worldloom.heads.latent_episodes import LatentEpisodes
from worldloom.models import MLP

_SPREADS = (-3.5, 1.0)  # bounds of the logarithm of a component's standard deviation

# The log weights (B, M), means (B, M, N) and log standard deviations (B, M, N) of M components.
Mixture = tuple[Tensor, Tensor, Tensor]


class BlockDensityConfig(FitConfig):
    """The network of a density of blocks: a mixture of `modes` Gaussians."""

    hidden: Sizes = Field(default=(256, 256), min_length=1)
    modes: int = Field(default=4, ge=1)
    steps: int = Field(default=2000, ge=1)
    batch: int = Field(default=256, ge=1)


class BlockDensity(Head[ConfigT]):
    """A mixture density network (Bishop, 1994) over the next `chunk` blocks, given a context and `given` more values.

    A mixture, because logs may contain several ways to act in one state, and their mean may be none of them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ModelSpec, config: ConfigT, *, chunk: int, given: int = 0) -> None:
        super().__init__()
        assert isinstance(config, BlockDensityConfig)
        self.spec, self.config = spec, config
        self.chunk, self.modes, self.outputs = chunk, config.modes, chunk * spec.block_size
        inputs = spec.context * spec.latent_dim + (spec.context - 1) * spec.block_size + given
        self.network = MLP((inputs, *config.hidden, config.modes * (1 + 2 * self.outputs)))
        bounds = ActionBounds.of(spec)
        self.register_buffer("mean", (bounds.low + bounds.high) / 2)
        self.register_buffer("std", (bounds.high - bounds.low) / 2)

    def scale(self, episodes: LatentEpisodes) -> None:
        """Normalise actions by their mean and standard deviation in the episodes."""
        _, blocks, _ = episodes.transitions()
        self.mean.copy_(blocks.mean(0))
        self.std.copy_(torch.maximum(blocks.std(0), 0.02 * self.std))

    def mixture_of(self, context: Context, *given: Float[Tensor, "B _"]) -> Mixture:
        """Return the components for each context, in normalised actions."""
        now = context.latents[:, -1]
        before = (context.latents[:, :-1] - now[:, None]).flatten(1)
        taken = ((context.actions - self.mean) / self.std).flatten(1)
        out: Tensor = self.network(torch.cat([now, *given, before, taken], dim=-1))
        weights, parts = out[:, : self.modes], out[:, self.modes :].view(len(out), self.modes, 2, self.outputs)
        return weights.log_softmax(1), parts[:, :, 0], parts[:, :, 1].clamp(*_SPREADS)

    def log_density(
        self, mixture: Mixture, blocks: Float[Tensor, "B T A"], counted: Float[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B"]:
        """Return the log density of blocks in environment units, up to a constant; `counted` weights the blocks."""
        weights, means, spreads = mixture
        target = ((blocks - self.mean) / self.std).flatten(1)
        error = ((target[:, None] - means) / spreads.exp()).square() / 2 + spreads
        if counted is not None:
            error = error * counted.repeat_interleave(self.spec.block_size, dim=1)[:, None]
        return (weights - error.sum(-1)).logsumexp(1)

    def in_bounds(self, values: Float[Tensor, "*axes _"]) -> Float[Tensor, "*axes T A"]:
        """Return normalised values as blocks in environment units, within bounds."""
        blocks = self.mean + self.std * values.unflatten(-1, (self.chunk, self.spec.block_size))
        return project(blocks, self.spec, ActionBounds.of(self.spec, blocks.device))


class BehaviourPriorConfig(BlockDensityConfig):
    """The configuration of `BehaviourPrior`."""


class BehaviourPrior(BlockDensity[BehaviourPriorConfig]):
    """The log density of one block given the context, as the logs act; without a goal.

    A search exploits the errors of a model, and a model errs most where its logs never act. `typical` is the median log
    density of the logs' own blocks: an action that is at least as probable is ordinary.
    """

    kind = "behaviour-prior"
    config_type = BehaviourPriorConfig
    typical: Tensor

    def __init__(self, spec: ModelSpec, config: BehaviourPriorConfig) -> None:
        super().__init__(spec, config, chunk=1)
        self.register_buffer("typical", torch.zeros(()))

    def forward(self, context: Context, block: Float[Tensor, "B A"]) -> Float[Tensor, "B"]:
        """Return the log density of each block minus the typical one."""
        surplus: Tensor = self.log_density(self.mixture_of(context), block[:, None]) - self.typical
        return surplus


def fit_behaviour_prior(
    model: WorldModel,
    episodes: LatentEpisodes,
    config: BehaviourPriorConfig,
    *,
    seed: int,
    progress: Progress = SILENT,
) -> BehaviourPrior:
    """Fit the density on the episodes by maximum likelihood."""
    device = episodes.latents.device
    generator = torch_generator(seed, "behaviour-prior", device=device)
    with seeded_weights(seed, "behaviour-prior", "weights"):
        prior = BehaviourPrior(model.spec, config).to(device)
    prior.scale(episodes)

    def densities(count: int) -> Tensor:
        episode = torch.randint(len(episodes), (count,), generator=generator, device=device)
        share = torch.rand(count, generator=generator, device=device)
        frame = (share * (episodes.lengths[episode] - 1)).long()
        context = episodes.context(episode, frame, model.spec.context)
        found: Tensor = prior(context, episodes.blocks[episode, frame])
        return found

    prior.fit(lambda step: -densities(config.batch).mean(), progress)
    with torch.no_grad():
        prior.typical.copy_(densities(8192).median())
    return prior
