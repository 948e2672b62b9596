"""A recipe: one complete, frozen configuration, from collecting to evaluating."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from worldloom.agents import METHODS, CloningConfig, MethodConfig, ReactiveConfig, default_methods
from worldloom.core.config import Config, component_of
from worldloom.core.errors import ConfigError
from worldloom.core.registry import nearest
from worldloom.data import DataConfig
from worldloom.guardrails import RuleLayer
from worldloom.heads import CoarseConfig, DistanceConfig, InverseModelConfig, ProbeConfig
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
    """A probe of a label column (by default the one of its own name), fitted on so many labelled episodes."""

    label: str = ""
    episodes: int = Field(default=50, ge=4)


class Recipe(Config):
    """What `collect`, `train` and `evaluate` do. `collection` and `protocol` are None if the data come from elsewhere.

    `hierarchy` are coarser models. Each predicts several steps of the one before it, the first of the world model.
    `probes` read named quantities off latents; planners use them only through guardrails and objectives.
    `rules` is the uppermost layer of the rule set of its agents; lower layers may only tighten it.
    `methods` are the rows of the table, in order; `default_method` is the one to act with.
    """

    name: str
    description: str = ""
    collection: CollectionConfig | None = None
    data: DataConfig = DataConfig()
    model: JEPAConfig = JEPAConfig()
    training: TrainingConfig = TrainingConfig()
    inverse: InverseModelConfig = InverseModelConfig()
    distance: DistanceConfig = DistanceConfig()
    hierarchy: tuple[CoarseConfig, ...] = ()
    probes: dict[str, LabelledProbe] = Field(default_factory=dict)
    rules: RuleLayer | None = None
    reactive: ReactiveConfig = ReactiveConfig()
    cloning: CloningConfig = CloningConfig()
    methods: dict[str, MethodField] = Field(default_factory=default_methods, min_length=1)
    default_method: str = "tree search"
    protocol: str | None = None

    @model_validator(mode="after")
    def _check_default(self) -> "Recipe":
        if self.default_method not in self.methods:
            raise ValueError(f"default_method {self.default_method!r}; {nearest(self.default_method, self.methods)}")
        return self

    def method(self, name: str | None = None, *, guarded: bool = False) -> MethodConfig:
        """Return a method, by default `default_method`; with `guarded` it must obey the guardrails of a rule set.

        Raises:
            ConfigError: there is no such method, or it obeys no guardrails.
        """
        name = name or self.default_method
        if name not in self.methods:
            raise ConfigError(f"unknown method {name!r}; {nearest(name, self.methods)}")
        if guarded and not self.methods[name].guarded:
            able = next((title for title, other in self.methods.items() if other.guarded), None)
            raise ConfigError(
                f"the method {name!r} does not obey guardrails, and the rule set has some; "
                f"{f'choose {able!r}' if able else 'no method of the recipe does: add one that plans'}"
            )
        return self.methods[name]
