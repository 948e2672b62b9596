"""A recipe: one complete, frozen configuration, from data collection to evaluation."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from worldloom.agents import (
    METHODS,
    CloningConfig,
    GoalInverseConfig,
    MethodConfig,
    PlanMethod,
    ReactiveConfig,
    default_methods,
)
from worldloom.core.config import Config, component_of
from worldloom.core.errors import ConfigError
from worldloom.core.names import PathName
from worldloom.core.registry import nearest
from worldloom.data import DataConfig
from worldloom.guardrails import RuleLayer
from worldloom.heads import (
    BehaviourPriorConfig,
    CoarseConfig,
    DistanceConfig,
    InverseModelConfig,
    ProbeConfig,
    RefinementConfig,
)
from worldloom.models import JEPAConfig
from worldloom.training import TrainingConfig

MethodField = Annotated[SerializeAsAny[MethodConfig], BeforeValidator(component_of(METHODS))]


class CollectionConfig(Config):
    """The logs to collect: see `worldloom.data.collect`."""

    env_id: str
    env_kwargs: dict[str, Any] = Field(default_factory=dict)
    episodes: int = Field(default=1000, ge=1)
    steps: int = Field(default=100, ge=1)
    policy: str = "directed-walk"
    policy_options: dict[str, Any] = Field(default_factory=dict)
    num_envs: int = Field(default=100, ge=1)
    seed: int = 0


class LabelledProbe(ProbeConfig):
    """A probe of a label column (by default, the column with the probe's name), fitted on labelled episodes.

    `symmetric` states that the label does not change if a square picture is mirrored or turned by quarter turns. The
    probe is then fitted on each frame twice: as it is, and in another position.
    """

    label: str = ""
    episodes: int = Field(default=50, ge=4)
    symmetric: bool = False


class Recipe(Config):
    """The settings of `collect`, `train` and `evaluate`. For external data, `collection` and `protocol` are None.

    With `refinement`, the predictor is trained further on frozen latents after `training`.

    `hierarchy` contains coarser models. One step of a coarser model spans several steps of the model before it; the
    first one spans steps of the world model. `probes` decode named quantities from latents; planners use them only
    through guardrails and objectives. `goal_inverse` adds goal-conditioned inverse dynamics, and `behaviour_prior` the
    density of blocks in the logs; some methods need them.
    `rules` is the uppermost layer of the agents' rule set; lower layers may only tighten it. `methods` are the rows of
    the results table, in order; `default_method` acts unless another is chosen.
    """

    name: str
    description: str = ""
    collection: CollectionConfig | None = None
    data: DataConfig = DataConfig()
    model: JEPAConfig = JEPAConfig()
    training: TrainingConfig = TrainingConfig()
    refinement: RefinementConfig | None = None
    inverse: InverseModelConfig = InverseModelConfig()
    distance: DistanceConfig = DistanceConfig()
    hierarchy: tuple[CoarseConfig, ...] = ()
    probes: dict[PathName, LabelledProbe] = Field(default_factory=dict)
    rules: RuleLayer | None = None
    reactive: ReactiveConfig = ReactiveConfig()
    goal_inverse: GoalInverseConfig | None = None
    behaviour_prior: BehaviourPriorConfig | None = None
    cloning: CloningConfig = CloningConfig()
    methods: dict[str, MethodField] = Field(default_factory=default_methods, min_length=1)
    default_method: str = "tree search"
    protocol: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if self.default_method not in self.methods:
            raise ValueError(
                f"unknown default_method {self.default_method!r}; {nearest(self.default_method, self.methods)}"
            )
        for title, method in self.methods.items():
            if isinstance(method, PlanMethod) and method.prior and self.behaviour_prior is None:
                raise ValueError(
                    f"the method {title!r} has a prior, but the recipe has no behaviour_prior; set "
                    f"behaviour_prior={{}}, or set the method's prior to 0"
                )
        if self.refinement is not None and self.refinement.copies and self.training.symmetry is None:
            raise ValueError("refinement.copies needs training.symmetry; set it, or set refinement.copies to 0")
        return self

    def method(self, name: str | None = None, *, guarded: bool = False) -> MethodConfig:
        """Return a method, by default `default_method`; with `guarded`, the method must obey guardrails.

        Raises:
            ConfigError: no method has this name, or the method does not obey guardrails.
        """
        name = name or self.default_method
        if name not in self.methods:
            raise ConfigError(f"unknown method {name!r}; {nearest(name, self.methods)}")
        if guarded and not self.methods[name].guarded:
            able = next((title for title, other in self.methods.items() if other.guarded), None)
            raise ConfigError(
                f"the method {name!r} does not obey guardrails, but the rule set contains guardrails; "
                f"{f'choose {able!r}' if able else 'add a method that plans to the recipe'}"
            )
        return self.methods[name]
