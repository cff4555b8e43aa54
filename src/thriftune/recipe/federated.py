"""The recipe's section `federated`: options and defaults of the `federate` verbs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from thriftune.recipe.section import Positive, Section


class FederatedRecipe(Section):
    """Of the `federate` verbs only; the data stay at the sites, the adapter goes round."""

    rounds: Positive = Field(10, description="times that the sites' adapters are made one")
    local_steps: Positive = Field(20, description="optimizer steps of a site in a round")
    aggregation: Literal["svd", "rolora", "ffa", "fedit"] = Field(
        "svd", description="how updates are made one: exactly and cut to lora.r; B and A in turn; B only; B and A apart"
    )
    quorum: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="share of the sites that a round needs")
    round_timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        3600.0, description="seconds after which a round goes on without those that have not answered"
    )
    send_dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="type of the factors on their way")
    largest_change: Annotated[float, Field(gt=1, allow_inf_nan=False)] = Field(
        10.0, description="an update is refused when its change is so many times the usual one"
    )
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="norm that each site's change is cut to, with aggregation rolora or ffa"
    )
    noise_multiplier: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="standard deviation of the noise on the sum of the changes, in units of clip_norm"
    )
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(1e-5, description="for which the privacy loss epsilon is given")

    def contradictions(self) -> list[str]:
        """Options that are fine alone and wrong together; the `federate` verbs ask."""
        problems = []
        if self.clip_norm and self.aggregation not in ("rolora", "ffa"):
            problems.append(
                f"federated.clip_norm with aggregation {self.aggregation}, where noise on A and B would multiply; "
                "use federated.aggregation rolora or ffa"
            )
        if self.noise_multiplier and not self.clip_norm:
            problems.append("federated.noise_multiplier is in units of federated.clip_norm; give that as well")
        return problems
