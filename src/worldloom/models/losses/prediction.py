"""The prediction error in representation space."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from worldloom.models.distributed import mean_over_ranks
from worldloom.models.losses.loss import LOSSES, Formula, LossInputs


@LOSSES.register("prediction")
class Prediction(Formula):
    """Mean squared error of the open-loop predictions.

    With `stop_gradient`, the gradient flows to the encoder only through the context frames, not through the targets.
    """

    name: Literal["prediction"] = "prediction"
    stop_gradient: bool = False

    def compute(self, inputs: LossInputs) -> Float[Tensor, ""]:
        """Return the mean squared error."""
        targets = inputs.targets.detach() if self.stop_gradient else inputs.targets
        return mean_over_ranks(functional.mse_loss(inputs.predictions, targets))
