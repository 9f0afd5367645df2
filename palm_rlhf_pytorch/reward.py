"""The reward model: a PaLM that gives a prompt and response a rating."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from palm_rlhf_pytorch.checkpoint import load_weights, read_config, save_weights
from palm_rlhf_pytorch.ops import has_token_after_padding, lengths_to_mask, masked_mean, scatter_to_mask
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.precision import Unrounded, UnroundedLinear
from palm_rlhf_pytorch.pretrained import PretrainedReward
from palm_rlhf_pytorch.utils import eval_decorator, gumbel_sample


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin), mean over pairs (b,). Ouyang et al., 2203.02155, eq. 1; the
    margin is Touvron et al., 2307.09288, eq. 2.
    """
    return -F.logsigmoid(chosen - rejected - margin).mean()


class RewardModel(PretrainedReward, Unrounded):
    """A copy of `palm` with a head on its mean embedding: ratings in bins (cross-entropy) or a scalar (MSE).

    With `use_lora` only adapters, the prompt/response embeddings and the head are trained. Beyond the reference:
    `bin_values`, what each bin is worth (default 0, 1, ... as the reference's class indices). On a palm in half
    precision head, embeddings and what bins are worth stay float32.
    """

    @beartype
    def __init__(
        self,
        palm: PaLM,
        dropout: int | float = 0.1,
        num_binned_output: int | float = 0,
        use_lora: bool = True,
        lora_r: int = 8,
        reward_lora_scope: str = "reward",
        sample_from_bins: bool | None = None,
        sample_temperature: int | float = 1.0,
        *,
        bin_values: Sequence[int | float] | None = None,
    ):
        super().__init__()
        bins = int(num_binned_output)
        if bins == 1 or bins < 0:
            raise ValueError(f"num_binned_output is 0 for a scalar or at least 2 bins, got {num_binned_output}")
        self.binned_output = bins > 1
        self.sample_from_bins = self.binned_output if sample_from_bins is None else sample_from_bins
        self.sample_temperature = sample_temperature
        self.config = dict(
            dropout=dropout,
            num_binned_output=bins,
            use_lora=use_lora,
            lora_r=lora_r,
            reward_lora_scope=reward_lora_scope,
            sample_from_bins=sample_from_bins,
            sample_temperature=sample_temperature,
            bin_values=None if bin_values is None else list(bin_values),
        )

        self.palm = deepcopy(palm).set_dropout(dropout)
        self.reward_lora_scope = reward_lora_scope if use_lora else None
        self.palm.requires_grad_(not use_lora)
        if use_lora:
            if reward_lora_scope not in self.palm.finetune_modules:
                self.palm.add_finetune_params(reward_lora_scope, lora_r)
            self.palm.finetune_modules[reward_lora_scope].requires_grad_(True)

        dim = palm.dim
        self.prompt_embed = nn.Parameter(torch.zeros(1, 1, dim))
        self.response_embed = nn.Parameter(torch.zeros(1, 1, dim))
        if self.binned_output:
            self.to_pred = UnroundedLinear(dim, bins)
        else:
            self.to_pred = nn.Sequential(UnroundedLinear(dim, 1, bias=False), Rearrange("... 1 -> ..."))
        values = torch.arange(bins).float() if bin_values is None else torch.tensor(bin_values).float()
        if self.binned_output and values.numel() != bins:
            raise ValueError(f"bin_values needs one value for each of the {bins} bins, got {values.numel()}")
        self.register_buffer("bin_values", values, persistent=False)
        self.to(palm.device, palm.token_emb.weight.dtype)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> RewardModel:
        """The model that `save` wrote, sizes and all."""
        config = read_config(path)
        return cls(PaLM(**config.pop("palm")), **config).load(path)

    @property
    def whole_config(self) -> dict:
        """The constructor's keywords that make this model, its PaLM's among them."""
        return {**self.config, "palm": self.palm.whole_config}

    def save(self, path: str | Path) -> None:
        """Write weights and constructor keywords as safetensors, atomically."""
        save_weights(path, self.state_dict(), self.whole_config, self.pretrained)

    def load(self, path: str | Path, generation: str | None = None) -> RewardModel:
        """Load .safetensors or .pt weights of ours or of the reference; see `PaLM.load`."""
        config = load_weights(self, path, generation)
        if config is not None and config.get("bin_values"):  # what the bins are worth belongs to the weights
            self.bin_values.copy_(torch.tensor(config["bin_values"]))
            self.config["bin_values"] = config["bin_values"]
        return self

    def finetune_parameters(self) -> list[nn.Parameter]:
        """All that training should change: adapters (or the whole PaLM), both embeddings and the head."""
        scope = self.reward_lora_scope
        trunk = self.palm.palm_parameters() if scope is None else self.palm.finetune_parameters(scope)
        return [*trunk, self.prompt_embed, self.response_embed, *self.to_pred.parameters()]

    def predict(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        disable_lora: bool = False,
    ) -> Tensor:
        """The head's output on the mean over `mask` (b, n): bin logits (b, bins) or scalars (b,).

        Ids below 0 are padding, seen by no other token.
        """
        pooled = None if mask is None else mask.expand_as(x)
        return self.to_pred(masked_mean(self._embeds(x, prompt_mask, pooled, disable_lora), pooled, dim=1))

    def _embeds(
        self, x: Tensor, prompt_mask: Tensor | None, pooled: Tensor | None = None, disable_lora: bool = False
    ) -> Tensor:
        """Embeddings (b, n, d) of x, its prompt and response told apart where there is a prompt_mask; 0 outside of
        pooled (b, n) where that is given.
        """
        real = x >= 0
        extra_embed = None
        if prompt_mask is not None:
            extra_embed = torch.where(rearrange(prompt_mask, "b n -> b n 1"), self.prompt_embed, self.response_embed)
        embeds = self.palm(
            x,
            places=pooled,
            extra_embed=extra_embed,
            extra_kinds=prompt_mask,
            return_only_embedding=True,
            disable_lora=disable_lora,
            finetune_scope=self.reward_lora_scope,
            mask=real if torch.compiler.is_compiling() or has_token_after_padding(real) else None,  # no look in a graph
        )
        return embeds if pooled is None else scatter_to_mask(embeds, pooled)

    def rate(self, x: Tensor, prompt_mask: Tensor, mask: Tensor | None = None) -> Tensor:
        """The rating (b,) of each response, differentiable: the expected one where ratings are binned.

        x and both masks (b, n); mask is True for real tokens (None: ids of 0 or more). Only response tokens are
        pooled, and what the mask hides (padding, all after EOS) cannot reach the result.
        """
        mask = x >= 0 if mask is None else mask
        return self._rating(self.predict(x.masked_fill(~mask, -1), mask & ~prompt_mask, prompt_mask))

    def _rating(self, pred: Tensor) -> Tensor:
        """The head's output as one number, float32."""
        if not self.binned_output:
            return pred.float()
        return (pred.float().softmax(dim=-1) * self.bin_values.float()).sum(dim=-1)  # autocast would round a product

    @torch.no_grad()
    @eval_decorator
    def score(self, x: Tensor, prompt_mask: Tensor, mask: Tensor | None = None) -> Tensor:
        """`rate` without gradient and without dropout: the same input always gives the same score (b,)."""
        return self.rate(x, prompt_mask, mask)

    @torch.no_grad()
    @eval_decorator
    def prefix_scores(self, x: Tensor, prompt_mask: Tensor, mask: Tensor | None = None) -> Tensor:
        """`score` of every prefix, in one pass: (b, n), place t of what ends with token t. A prompt's own is the head's
        answer to no response at all.
        """
        if not self.palm.causal:
            raise ValueError("scores of prefixes need a causal reward model, got an encoder: it sees what is to come")
        mask = x >= 0 if mask is None else mask
        pooled = mask & ~prompt_mask
        totals = self._embeds(x.masked_fill(~mask, -1), prompt_mask, pooled).float().cumsum(dim=1)
        means = totals / pooled.cumsum(dim=1).clamp(min=1)[..., None]
        return self._rating(self.to_pred(means))

    def pair_loss(
        self,
        chosen: tuple[Tensor, Tensor, Tensor],
        rejected: tuple[Tensor, Tensor, Tensor],
        margin: Tensor | float = 0.0,
    ) -> Tensor:
        """Bradley-Terry loss of pairs, each side (x, prompt_mask, mask), all (b, n)."""
        return bradley_terry_loss(self.rate(*chosen), self.rate(*rejected), margin)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        labels: Tensor | None = None,
        disable_lora: bool = False,
        sample: bool | None = None,
        sample_temperature: float | None = None,
    ) -> Tensor:
        """The reference's interface: x (b, n) -> prediction, or with labels (b,) the loss.

        The mean is over `mask` (b, n), all positions without it. Binned predictions are drawn classes (b,), or with
        sample=False (here or as sample_from_bins) bin logits (b, bins). For training a policy use `score`.
        """
        if prompt_mask is not None and prompt_lengths is not None:
            raise ValueError("give prompt_mask or prompt_lengths, not both")
        if prompt_lengths is not None:
            prompt_mask = lengths_to_mask(prompt_lengths, x.shape[1])
        pred = self.predict(x, mask, prompt_mask, disable_lora)
        if labels is not None:
            return self.loss(pred, labels)
        if self.binned_output and (self.sample_from_bins if sample is None else sample):
            temperature = self.sample_temperature if sample_temperature is None else sample_temperature
            return gumbel_sample(pred, temperature)
        return pred

    def loss(self, pred: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of bins, or mean squared error, against labels (b,)."""
        if not self.binned_output:
            return F.mse_loss(pred.float(), labels.float())
        if labels.is_floating_point():
            raise TypeError("labels of a binned reward model are bin indices (integers); see data.bin_ratings")
        bins = pred.shape[-1]
        unseen = labels.is_cuda or torch.compiler.is_compiling()
        if not unseen and not 0 <= int(labels.min()) <= int(labels.max()) < bins:
            found = f"{int(labels.min())} to {int(labels.max())}"
            raise ValueError(
                f"labels are bin indices from 0 to {bins - 1}, got {found}: ratings 1 to 5 are bins 0 to 4"
            )
        return F.cross_entropy(pred.float(), labels)
