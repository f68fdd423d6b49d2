"""`ffn:` in a block: what each token goes through by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt
from torch import nn

from linear_moe.layers.feed_forward import SwiGLU, swiglu_width
from linear_moe.layers.mixture_of_experts import MixtureOfExperts
from linear_moe.models.errors import Problem
from linear_moe.models.mixer_config import BuildContext, NonNegative, router_problems
from linear_moe.models.rule_config import STRICT


class NoFeedForward(BaseModel):
    """No feed-forward: the block is its mixer alone."""

    model_config = STRICT

    type: Literal["none"] = Field(description="No feed-forward.")

    def problems(self, hidden_size: int) -> Iterator[Problem]:
        """Nothing can be wrong."""
        yield from ()

    def build(self, context: BuildContext) -> nn.Module | None:
        """Nothing."""
        return None

    def summary(self, hidden_size: int) -> str:
        """A few words for a table."""
        return "none"


class _SwiGLUWidth(BaseModel):
    model_config = STRICT

    ratio: PositiveFloat | None = Field(
        default=None,
        description="Width of a plain feed-forward of as many parameters, over hidden_size: the inner width is 2/3 of "
        "ratio * hidden_size, rounded up to a multiple of 256. 4 unless it or width is given.",
    )
    width: PositiveInt | None = Field(default=None, description="The inner width itself, in place of ratio.")

    def problems(self, hidden_size: int) -> Iterator[Problem]:
        """Options that would be ignored; paths are below the feed-forward."""
        if self.ratio is not None and self.width is not None:
            yield Problem("ratio", f"would be ignored beside width = {self.width}; give one of the two")


class SwiGLUConfig(_SwiGLUWidth):
    """A dense gated feed-forward."""

    type: Literal["swiglu"] = Field(description="A dense gated feed-forward.")

    def build(self, context: BuildContext) -> nn.Module | None:
        """The layer."""
        return SwiGLU(
            context.hidden_size,
            ratio=self.ratio,
            width=self.width,
            impl=context.impl,
            device=context.device,
            dtype=context.dtype,
        )

    def summary(self, hidden_size: int) -> str:
        """A few words for a table."""
        return f"swiglu {swiglu_width(hidden_size, self.ratio, self.width)}"


class MoEConfig(_SwiGLUWidth):
    """A mixture of experts, each a SwiGLU; no token is dropped."""

    type: Literal["moe"] = Field(description="A mixture of experts.")
    num_experts: PositiveInt = Field(default=8, description="E, shared experts not counted.")
    top_k: PositiveInt = Field(default=2, description="Experts picked a token, at most num_experts.")
    num_shared_experts: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Experts that every token uses with weight 1."
    )
    router_score: Literal["softmax", "sigmoid"] = Field(default="softmax", description="How logits become scores.")
    renormalize: bool = Field(
        default=True,
        description="Whether the picked weights are made to sum to 1. With one picked of several they never are.",
    )
    balance_weight: NonNegative = Field(
        default=0.01, description="Coefficient of this layer's load-balance loss, which is 1 at balance."
    )
    z_loss_weight: NonNegative = Field(default=0.0, description="Coefficient of the router's z-loss.")
    balance_bias_rate: NonNegative = Field(
        default=0.0, description="Step of the selection bias that balances without a loss; 0 for none."
    )

    def problems(self, hidden_size: int) -> Iterator[Problem]:
        """Options that don't go together or would be ignored; paths are below the feed-forward."""
        yield from super().problems(hidden_size)
        yield from router_problems(self, "num_experts", self.num_experts)

    def build(self, context: BuildContext) -> nn.Module | None:
        """The layer."""
        return MixtureOfExperts(
            context.hidden_size,
            num_experts=self.num_experts,
            top_k=self.top_k,
            num_shared_experts=self.num_shared_experts,
            ratio=self.ratio,
            width=self.width,
            router_score=self.router_score,
            renormalize=self.renormalize,
            balance_weight=self.balance_weight,
            z_loss_weight=self.z_loss_weight,
            balance_bias_rate=self.balance_bias_rate,
            auxiliary=context.auxiliary,
            impl=context.impl,
            device=context.device,
            dtype=context.dtype,
        )

    def summary(self, hidden_size: int) -> str:
        """A few words for a table."""
        shared = f" + {self.num_shared_experts} shared" if self.num_shared_experts else ""
        width = swiglu_width(hidden_size, self.ratio, self.width)
        return f"moe, {self.top_k} of {self.num_experts}{shared}, swiglu {width}"


FeedForwardConfig = Annotated[SwiGLUConfig | MoEConfig | NoFeedForward, Field(discriminator="type")]
