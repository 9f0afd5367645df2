"""PaLM (Chowdhery et al., 2204.02311): a language model, or an encoder, of parallel blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from palm_rlhf_pytorch import generation, native_step
from palm_rlhf_pytorch.attention import added_to_scores, causal_key_mask, narrowed, segment_mask, window_mask
from palm_rlhf_pytorch.blocks import LayerNorm, ParallelTransformerBlock, Residual, SwiGLU
from palm_rlhf_pytorch.checkpoint import adopt_reference_weights, load_weights, read_config, save_weights
from palm_rlhf_pytorch.first_layer import FirstLayer, KnownTokens
from palm_rlhf_pytorch.freed_memory import keep_freed_memory
from palm_rlhf_pytorch.kv_cache import KVCache, Memory
from palm_rlhf_pytorch.lora import LoraOptions
from palm_rlhf_pytorch.packed_step import hooked
from palm_rlhf_pytorch.places import Places, worth_it
from palm_rlhf_pytorch.pretrained import PretrainedMixin
from palm_rlhf_pytorch.products import Linear, only_computed
from palm_rlhf_pytorch.repeated_tokens import RepeatedTokens, repeated_tokens
from palm_rlhf_pytorch.rotary import RotaryEmbedding
from palm_rlhf_pytorch.utils import eval_decorator, top_k
from palm_rlhf_pytorch.vocabulary import Lookup, as_computed, linear_cross_entropy

__all__ = ["LayerNorm", "PaLM", "ParallelTransformerBlock", "RotaryEmbedding", "SwiGLU"]


class PaLM(PretrainedMixin, nn.Module):
    """A PaLM language model, or with `causal=False` an encoder in which ids below 0 are padding.

    The first keywords are the reference's. Beyond it: `kv_heads` (key/value heads, a divisor of heads),
    `rotary_theta`, `use_xpos` (None: on when causal), `ff_inner_dim` (None: dim * ff_mult), `norm_eps`, `logit_scale`,
    `gradient_checkpointing` (layers are computed again for the backward pass instead of being kept), `qk_layernorm`
    (queries and keys are normalised head by head), `sliding_window` (layers see so many tokens, themselves included),
    `global_layers` (these see everything all the same, and do not rotate), `lora_alpha` (None: the rank),
    `lora_rslora` (scaled by alpha / sqrt(r)), `lora_ff` (adapters beside the feedforward too); `finetune_scopes` may
    map names to LoRA ranks, or to keywords of `add_finetune_params`.
    """

    first_layer: FirstLayer | None = None  # while it is kept
    _version = 2  # in state dicts: weights of ours need no guess at the generation

    @beartype
    def __init__(
        self,
        *,
        dim: int,
        num_tokens: int,
        depth: int,
        causal: bool = True,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int | float = 4,
        attn_dropout: int | float = 0.0,
        ff_dropout: int | float = 0.0,
        qk_rmsnorm: bool = False,
        lora_r: int = 8,
        rotary_xpos_scale_base: int | float = 512,
        flash_attn: bool = False,
        finetune_scopes: list[str] | tuple[str, ...] | dict[str, int | dict[str, Any]] = (),
        cross_entropy_ignore_index: int = 0,
        kv_heads: int = 1,
        rotary_theta: int | float = 10000,
        use_xpos: bool | None = None,
        ff_inner_dim: int | None = None,
        norm_eps: float = 1e-5,
        logit_scale: int | float = 1.0,
        gradient_checkpointing: bool = False,
        qk_layernorm: bool = False,
        sliding_window: int | None = None,
        global_layers: list[int] | tuple[int, ...] = (),
        lora_alpha: int | float | None = None,
        lora_rslora: bool = False,
        lora_ff: bool = False,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__", "finetune_scopes")}
        check_sizes(dim=dim, num_tokens=num_tokens, depth=depth, heads=heads, kv_heads=kv_heads, dim_head=dim_head)
        check_window(sliding_window, global_layers, depth, causal)
        self.dim, self.num_tokens, self.dim_head, self.heads, self.causal = (
            dim,
            num_tokens,
            dim_head,
            heads,
            causal,
        )
        self.kv_heads, self.lora_r, self.logit_scale = kv_heads, lora_r, logit_scale
        self.sliding_window = sliding_window
        self.config["global_layers"] = list(global_layers)  # as JSON gives it back
        self.windowed = [sliding_window is not None and i not in global_layers for i in range(depth)]
        self.cross_entropy_ignore_index = cross_entropy_ignore_index
        self.gradient_checkpointing = gradient_checkpointing

        self.token_emb = nn.Embedding(num_tokens, dim)
        xpos = causal if use_xpos is None else use_xpos
        # one object under every layer's name: computed once a pass, stored as the reference stores it
        rotary_emb = RotaryEmbedding(dim_head, rotary_xpos_scale_base, xpos, rotary_theta)
        block = partial(
            ParallelTransformerBlock,
            dim,
            dim_head,
            causal,
            heads,
            qk_rmsnorm,
            ff_mult,
            attn_dropout,
            ff_dropout,
            flash_attn=flash_attn,
            kv_heads=kv_heads,
            ff_inner_dim=ff_inner_dim,
            norm_eps=norm_eps,
            rotary_emb=rotary_emb,
            qk_layernorm=qk_layernorm,
        )
        self.layers = nn.ModuleList([Residual(block(rotates=i not in global_layers)) for i in range(depth)])
        self.norm = LayerNorm(dim, norm_eps)
        self.to_logits = Linear(dim, num_tokens, bias=False)
        self.to_logits.weight = self.token_emb.weight
        nn.init.normal_(self.token_emb.weight, std=0.02)

        self.finetune_modules = nn.ModuleDict()
        self.lora_options: dict[str, LoraOptions] = {}
        scopes = finetune_scopes if isinstance(finetune_scopes, dict) else dict.fromkeys(finetune_scopes)
        for scope, options in scopes.items():
            self.add_finetune_params(scope, **(options if isinstance(options, dict) else {"lora_r": options}))
        self.register_load_state_dict_pre_hook(adopt_reference_weights)

    @property
    def device(self) -> torch.device:
        return self.token_emb.weight.device

    @property
    def rotary_emb(self) -> RotaryEmbedding:
        return self.layers[0].fn.rotary_emb

    # weights

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> PaLM:
        """The model that `save` wrote, sizes and all."""
        return cls(**read_config(path)).load(path)

    @property
    def whole_config(self) -> dict:
        """The constructor's keywords that make this model, adapters of every kind included."""
        scopes = {}
        for scope in self.finetune_modules:
            made = self.lora_options[scope]
            like_the_model = made == replace(self.lora_defaults, r=made.r)
            scopes[scope] = made.r if like_the_model else {f"lora_{k}": v for k, v in asdict(made).items()}
        return {**self.config, "finetune_scopes": scopes}

    def save(self, path: str | Path) -> None:
        """Write weights and constructor keywords as safetensors, atomically."""
        save_weights(path, self.state_dict(), self.whole_config, self.pretrained)

    def load(self, path: str | Path, generation: str | None = None) -> PaLM:
        """Load .safetensors or .pt weights of ours or of the reference; no code in them is ever run.

        The reference's generation is told by its gammas and reported; `generation` '0.2' or '0.8' overrides.
        """
        load_weights(self, path, generation)
        return self

    # dropout and adapters

    def set_dropout(self, dropout: float) -> PaLM:
        """Set every dropout of the model, the attention's too."""
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be from 0 to 1, got {dropout}")
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        return self

    def set_causal(self, causal: bool) -> PaLM:
        """Let tokens see the past only, or everything; xpos follows unless `use_xpos` says otherwise."""
        check_window(self.sliding_window, (), len(self.layers), causal)
        self.causal = self.config["causal"] = causal
        for layer in self.layers:
            layer.fn.attend.causal = causal
        xpos = self.config["use_xpos"]
        self.rotary_emb.use_xpos = causal if xpos is None else xpos
        return self

    @property
    def lora_defaults(self) -> LoraOptions:
        """How adapters are made unless `add_finetune_params` is told otherwise."""
        config = self.config
        return LoraOptions(self.lora_r, config["lora_alpha"], config["lora_rslora"], config["lora_ff"])

    def add_finetune_params(
        self,
        scope: str,
        lora_r: int | None = None,
        *,
        lora_alpha: float | None = None,
        lora_rslora: bool | None = None,
        lora_ff: bool | None = None,
    ) -> None:
        """Add LoRA adapters under a new name, with the model's own options where None. They are float32 at least."""
        if scope in self.finetune_modules:
            raise ValueError(f"the finetune scope {scope!r} is already there; remove or merge it first")
        given = {"r": lora_r, "alpha": lora_alpha, "rslora": lora_rslora, "ff": lora_ff}
        options = replace(self.lora_defaults, **{k: v for k, v in given.items() if v is not None})
        lora = nn.ModuleList([layer.fn.new_lora(options) for layer in self.layers])
        self.finetune_modules[scope] = lora.to(self.device, self.token_emb.weight.dtype)
        self.lora_options[scope] = options

    def remove_finetune_params(self, scope: str) -> None:
        """Drop the adapters of a scope."""
        self._lora(scope)
        del self.finetune_modules[scope], self.lora_options[scope]

    @torch.no_grad()
    def merge_finetune_params(self, scope: str) -> None:
        """Make the adapters of a scope part of the weights for good, and drop the scope."""
        for layer, lora in zip(self.layers, self._lora(scope), strict=True):
            layer.fn.merge_lora(lora)
        self.first_layer = None if self.first_layer is None else FirstLayer()  # these were other weights
        self.remove_finetune_params(scope)

    @contextmanager
    def merged(self, scope: str | None) -> Iterator[None]:
        """Adapters of a scope merged into the weights while the context lasts; the weights come back bit by bit."""
        if scope is None:
            yield
            return
        saved = []
        kept, self.first_layer = self.first_layer, None
        try:
            with torch.no_grad():
                for layer, lora in zip(self.layers, self._lora(scope), strict=True):
                    saved += [(rows, rows.clone()) for rows, _ in layer.fn.adapted(lora)]
                    layer.fn.merge_lora(lora)
            yield
        finally:
            for weight, before in saved:
                weight.copy_(before)
            self.first_layer = kept

    @contextmanager
    def first_layer_kept(self) -> Iterator[None]:
        """While the context lasts, what a frozen first layer makes of each token is computed once, if there are few:
        nobody may write to `.data` of its weights.
        """
        before, self.first_layer = self.first_layer, FirstLayer()
        try:
            yield
        finally:
            self.first_layer = before

    def _lora(self, scope: str) -> nn.ModuleList:
        if scope not in self.finetune_modules:
            raise KeyError(f"there is no finetune scope {scope!r}; this model has {list(self.finetune_modules)}")
        return self.finetune_modules[scope]

    def finetune_parameters(self, scope: str = "default") -> list[nn.Parameter]:
        """The adapters of a scope."""
        return list(self._lora(scope).parameters())

    def palm_parameters(self) -> list[nn.Parameter]:
        """All but the adapters, always in the same order."""
        adapters = {id(p) for p in self.finetune_modules.parameters()}
        return [p for p in self.parameters() if id(p) not in adapters]

    # the computation

    def new_cache(self, batch: int, max_len: int, static: bool = False) -> KVCache:
        """An empty cache for `batch` rows, in the weights' dtype; it grows past max_len on demand, unless static."""
        weight = self.token_emb.weight
        depth = len(self.layers)
        return KVCache(depth, batch, self.kv_heads, max_len, self.dim_head, weight.dtype, weight.device, static)

    def _apply(self, *args: Any, **kwargs: Any) -> PaLM:
        native_step.forget(self)
        return super()._apply(*args, **kwargs)

    def logits_of(self, embeds: Tensor) -> Tensor:
        """Final embeddings (..., d) -> logits (..., v)."""
        logits = self.to_logits(embeds)
        return logits if self.logit_scale == 1.0 else logits * self.logit_scale

    def forward(
        self,
        x: Tensor,
        return_loss: bool = False,
        disable_lora: bool = False,
        finetune_scope: str | None = None,
        extra_embed: Tensor | None = None,
        return_only_embedding: bool = False,
        return_logits_with_embedding: bool = False,
        *,
        mask: Tensor | None = None,
        cache: Memory | None = None,
        segment_ids: Tensor | None = None,
        places: Tensor | None = None,
        extra_kinds: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Token ids (b, n) -> logits (b, n, v); or the next-token loss; or embeddings (b, n, d); or both.

        extra_embed (b, n, d) is added to the token embeddings; extra_kinds (b, n), integers from 0, say where it is the
        same, so that what the first layer makes of a token is computed once for each of them. mask (b, n) bool is False
        for padding; a causal model needs it only where padding stands on the left, an encoder takes ids below 0 as
        padding without it. Padding adds nothing to the loss. With a cache, x are the tokens that follow those in it
        (mask: padding on the right of a first, ragged batch).

        segment_ids (b, n) number the documents of packed rows, from 0: attention and loss stay inside each, as if it
        stood alone. They make one mask (b, 1, n, n) for all layers; `flex_attention`, which could skip what is masked,
        would pay on a GPU alone, and there in rows of thousands of tokens.

        places (b, n) bool, with return_only_embedding: only embeddings at its m True places are wanted, (m, d) in the
        order of the mask. The last layer is not computed elsewhere, but for its keys and values.
        """
        if places is not None:
            check_places(places, x, return_only_embedding)
        if torch.is_grad_enabled() and only_computed(x):
            native_step.forget(self)
            if self.training and x.device.type == "cpu":
                keep_freed_memory()
        if segment_ids is not None and cache is not None:
            raise ValueError("a key/value cache holds one document a row, so segment_ids cannot go with it")
        if return_loss:
            labels = next_tokens(x, mask, segment_ids, self.cross_entropy_ignore_index)
            whole, n = (x, mask, extra_embed, segment_ids, extra_kinds), labels.shape[1]
            x, mask, extra_embed, segment_ids, extra_kinds = (None if t is None else t[:, :n] for t in whole)
        lora = None if disable_lora or finetune_scope is None else self._lora(finetune_scope)
        if segment_ids is not None:
            apart = segment_ids.masked_fill(~real_tokens(x, mask), -1)  # padding is a document of its own
            (mask,) = as_computed(added_to_scores(segment_mask(apart, self.causal), self.token_emb.weight.dtype))
        elif mask is None and not self.causal:
            mask = x >= 0
        ids, tied = x.clamp(min=0), None
        if return_loss and not return_logits_with_embedding and Lookup.usable(x, self.token_emb.weight):
            tied = []
            embeds = Lookup.apply(ids, self.token_emb.weight, tied)
        else:
            embeds = self.token_emb(ids)
        if extra_embed is not None:
            embeds = embeds + extra_embed.to(embeds.dtype)
        alike = ids if extra_kinds is None else ids + self.num_tokens * extra_kinds
        told = extra_embed is None or extra_kinds is not None
        repeated = None
        if told and self._begins_by_token():
            if extra_embed is None and self.first_layer is not None:
                repeated = self.first_layer.known(self, ids, None if lora is None else lora[0])
            if repeated is None:
                repeated = repeated_tokens(alike)
        chosen = self._apart(places, repeated)
        if cache is None:
            embeds = self._layers(embeds, mask, lora, repeated, chosen)
        else:
            embeds = self._cached(embeds, mask, lora, cache, repeated, chosen)
        embeds = self.norm(embeds)

        if return_only_embedding:
            return embeds if places is None or chosen is not None else embeds[places]
        if return_loss and not return_logits_with_embedding:
            embeds, labels = rearrange(embeds, "b n d -> (b n) d"), labels.reshape(-1)
            ignored = self.cross_entropy_ignore_index
            return linear_cross_entropy(embeds, self.to_logits.weight, labels, self.logit_scale, ignored, tied)
        logits = self.logits_of(embeds)
        return (logits, embeds) if return_logits_with_embedding else logits

    def _begins_by_token(self) -> bool:
        """Whether the first layer's input depends on nothing but the token, and it is as it was made: others may add
        something by place, and hooks may look at places; dropout drops other features in every one.
        """
        first = self.layers[0].fn
        made = type(self.token_emb) is nn.Embedding and type(first) is ParallelTransformerBlock
        return made and not first.drops and not hooked(self.token_emb) and not hooked(self.layers[0])

    def _apart(self, wanted: Tensor | None, repeated: RepeatedTokens | KnownTokens | None) -> Places | None:
        """The True places of wanted (b, n), where the last layer and the norm can be computed there alone: both as they
        were made, for others and hooks may look at every place. A layer that is the first as well reads each token
        once instead.
        """
        last = self.layers[-1]
        if wanted is None or (repeated is not None and last is self.layers[0]):
            return None
        made = type(last) is Residual and type(last.fn) is ParallelTransformerBlock and type(self.norm) is LayerNorm
        if not made or hooked(last) or hooked(self.norm) or not only_computed(*last.parameters()):
            return None
        return worth_it(wanted)

    def _layers(
        self,
        x: Tensor,
        mask: Tensor | None,
        lora: nn.ModuleList | None,
        repeated: RepeatedTokens | KnownTokens | None,
        places: Places | None,
    ) -> Tensor:
        n = x.shape[1]
        rotation = self.rotary_emb(n).over(self.heads, self.kv_heads)
        if mask is not None and mask.ndim == 2 and self.causal:
            (mask,) = as_computed(added_to_scores(causal_key_mask(mask), x.dtype))  # once, and not in every layer
        near = mask
        if self._reaches_beyond(n):
            positions = torch.arange(n, device=x.device)[None]
            (near,) = as_computed(narrowed(mask, window_mask(positions, n, self.sliding_window), x.dtype))
        for i, layer in enumerate(self.layers):
            visible = near if self.windowed[i] else mask
            own = lora[i] if lora is not None else None
            x = self._run(layer, x, visible, own, rotation=rotation, **self._alone(i, repeated, places))
        return x

    def _alone(self, i: int, repeated: RepeatedTokens | KnownTokens | None, places: Places | None) -> dict[str, Any]:
        """What layer i alone is told: the first, where tokens are the same; the last, which places are wanted."""
        told = {} if repeated is None or i > 0 else {"repeated": repeated}
        return told if places is None or i < len(self.layers) - 1 else {**told, "places": places}

    def _run(self, layer: nn.Module, *args: Any, recomputable: bool = True, **kwargs: Any) -> Tensor:
        """A layer, which is computed again for the backward pass where that is wanted."""
        if recomputable and self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False, **kwargs)
        return layer(*args, **kwargs)

    def _reaches_beyond(self, n: int) -> bool:
        """Whether n tokens are more than a layer's window, if there is one."""
        return self.sliding_window is not None and n > self.sliding_window

    def _cached(
        self,
        x: Tensor,
        mask: Tensor | None,
        lora: nn.ModuleList | None,
        cache: Memory,
        repeated: RepeatedTokens | KnownTokens | None,
        places: Places | None,
    ) -> Tensor:
        if not self.causal:
            raise ValueError("an encoder (causal=False) sees the future and cannot use a key/value cache")
        n = x.shape[1]
        cache.reserve(n)
        x = self._after(x, lora, cache, first=cache.filled == 0, repeated=repeated, places=places)
        cache.advance(n if mask is None else mask.sum(dim=-1), n)
        return x

    def _after(
        self,
        x: Tensor,
        lora: nn.ModuleList | None,
        cache: Memory,
        first: bool = False,
        repeated: RepeatedTokens | KnownTokens | None = None,
        places: Places | None = None,
    ) -> Tensor:
        """The layers on x (b, n, d), which follows what is cached; their keys and values are stored."""
        n = x.shape[1]
        positions = cache.lengths[:, None] + torch.arange(n, device=x.device)
        rotation = self.rotary_emb(positions, cache.centre).over(self.heads, self.kv_heads)
        slots = n if first else cache.span(n)
        far = None  # a first pass is plainly causal: padding on the right is never in anyone's past
        if not first:
            unseen = torch.arange(slots, device=x.device) > positions[..., None]
            # added to the scores, made once for all layers
            (far,) = as_computed(torch.zeros_like(unseen, dtype=x.dtype).masked_fill_(unseen, -torch.inf)[:, None])
        near = far
        if self._reaches_beyond(slots):
            rows = positions[:1] if first else positions  # at first all begin at 0
            (near,) = as_computed(added_to_scores(window_mask(rows, slots, self.sliding_window), x.dtype))
        for i, layer in enumerate(self.layers):
            visible = near if self.windowed[i] else far
            remember = partial(cache.extend, i, positions=positions, first=first)
            own = lora[i] if lora is not None else None
            keywords = {"rotation": rotation, "remember": remember, "recomputable": cache.recomputable}
            x = self._run(layer, x, visible, own, **keywords, **self._alone(i, repeated, places))
        return x

    def next_logits(
        self, tokens: Tensor, cache: KVCache, finetune_scope: str | None = None, disable_lora: bool = False
    ) -> Tensor:
        """Tokens (b,) that follow what is cached -> logits (b, v). Stores keys and values, but counts nothing: the
        shapes and addresses of a static cache stay the same, so that this may be compiled and replayed.
        """
        lora = None if disable_lora or finetune_scope is None else self._lora(finetune_scope)
        embeds = self._after(self.token_emb(tokens[:, None]), lora, cache)
        return self.logits_of(self.norm(embeds)[:, 0])

    # generation

    def stream(
        self,
        seq_len: int,
        prompt: Tensor,
        prompt_lengths: Tensor | None = None,
        pad_value: int = 0,
        eos_token: int | Sequence[int] | None = None,
        seed: int | None = None,
        temperature: float = 1.0,
        filter_logits_fn: Callable[..., Tensor] | None = top_k,
        filter_thres: float = 0.9,
        top_k: int | None = None,
        top_p: float | None = None,
        **kwargs,
    ) -> Iterator[Tensor]:
        """The tokens that `generate` draws, as they come, each of the prompt's leading shape; `pad_value` for rows
        that have ended. The last kwargs go to forward (`finetune_scope`)."""
        prompts, leading = generation.as_batch(prompt.to(self.device))
        lengths = lengths_of(prompts, prompt_lengths)
        sampling = sampling_of(temperature, filter_logits_fn, filter_thres, top_k, top_p)
        generation.check_prompts(prompts, lengths, self.num_tokens)
        keywords = {**kwargs, "eos_token": eos_token, "generator": seeded(seed, self.device)}

        def tokens() -> Iterator[Tensor]:  # a function of its own, so that bad arguments are refused at the call
            was_training = self.training
            self.eval()
            try:
                for step in generation.stream(self, prompts, lengths, seq_len, sampling, pad_value, **keywords):
                    yield step.reshape(leading)
            finally:
                self.train(was_training)

        return tokens()

    @torch.no_grad()
    @eval_decorator
    def generate(
        self,
        seq_len: int,
        prompt: Tensor | None = None,
        temperature: float = 1.0,
        filter_logits_fn: Callable[..., Tensor] | None = top_k,
        filter_thres: float = 0.9,
        pad_value: int | float = 0,
        eos_token: int | Sequence[int] | None = None,
        return_seq_without_prompt: bool = True,
        use_tqdm: bool = False,
        *,
        prompt_lengths: Tensor | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        return_log_probs: bool = False,
        finetune_scope: str | None = None,
        max_batch: int | None = None,
        decoder: str = "auto",
        **kwargs,
    ) -> Tensor | generation.Generation:
        """Draw up to seq_len tokens, the prompt's included, after prompt (n,) or (..., n); at least one is drawn.

        filter_logits_fn(logits, thres=filter_thres) is the reference's filter; top_k (a count) and top_p (a mass to
        keep) are the usual ones and replace it. prompt_lengths (b,) makes the prompts ragged (right padded).
        Generation stops when every row has met `eos_token` (an id or several); what follows a row's EOS is
        `pad_value`. With return_log_probs the result is a `Generation`, whose log_probs are of the distribution
        sampled from (at temperature 0: of the model's). Without a prompt a random token starts, and is returned too.
        Of more than `max_batch` prompts the others wait and take the places of those that end. decoder: 'plain' steps,
        'packed' weights (a CPU's), 'compiled' steps with CUDA graphs (compiling takes its time, once for each size and
        batch), or 'auto': see `decoder.choose`.
        """
        whole = not return_seq_without_prompt or prompt is None
        generator = generator or seeded(seed, self.device)
        if prompt is None:
            prompt = torch.randint(0, self.num_tokens, (1, 1), device=self.device, generator=generator)
        prompts, leading = generation.as_batch(prompt.to(self.device))
        lengths = lengths_of(prompts, prompt_lengths)
        scope = None if kwargs.get("disable_lora") else finetune_scope
        with self.merged(scope):
            out = generation.generate(
                self,
                prompts,
                lengths,
                seq_len,
                sampling_of(temperature, filter_logits_fn, filter_thres, top_k, top_p),
                int(pad_value),
                use_tqdm,
                eos_token=eos_token,
                generator=generator,
                return_log_probs=return_log_probs,
                max_batch=max_batch,
                how=decoder,
                **kwargs,
            )
        if return_log_probs:
            return out
        tokens = out.sequence if whole else out.responses(int(pad_value))
        return tokens.reshape(*leading, -1)


# helpers


def real_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Which ids (b, n) are no padding: those that the mask says, or without it ids from 0."""
    return x >= 0 if mask is None else mask


def next_tokens(x: Tensor, mask: Tensor | None, segment_ids: Tensor | None, ignored: int) -> Tensor:
    """What to predict at each place but the last, (b, n) -> (b, n - 1). Padding is neither predicted nor predicted
    from, nor is a document's first token from the one before: `ignored` stands there.
    """
    real = real_tokens(x, mask)
    counted = real[:, 1:] & real[:, :-1]
    if segment_ids is not None:
        counted = counted & (segment_ids[:, 1:] == segment_ids[:, :-1])
    return x[:, 1:].masked_fill(~counted, ignored)


def check_places(places: Tensor, x: Tensor, return_only_embedding: bool) -> None:
    if not return_only_embedding:
        raise ValueError("places choose among final embeddings: they go with return_only_embedding=True")
    if places.shape != x.shape or places.dtype != torch.bool:
        got = f"{places.dtype} of shape {tuple(places.shape)}"
        raise ValueError(f"places are bool, one for each of the ids {tuple(x.shape)}, got {got}")


def check_sizes(heads: int, kv_heads: int, dim_head: int, **sizes: int) -> None:
    for name, size in {**sizes, "heads": heads, "kv_heads": kv_heads, "dim_head": dim_head}.items():
        if size < 1:
            raise ValueError(f"{name} must be 1 or more, got {size}")
    if heads % kv_heads:
        raise ValueError(f"heads ({heads}) must be a multiple of kv_heads ({kv_heads})")
    if dim_head % 2:
        raise ValueError(f"dim_head must be even for rotary embeddings, got {dim_head}")


def check_window(sliding_window: int | None, global_layers: Sequence[int], depth: int, causal: bool) -> None:
    if sliding_window is None:
        if global_layers:
            raise ValueError("without sliding_window every layer is global: leave global_layers empty")
        return
    if sliding_window < 1:
        raise ValueError(f"sliding_window counts the tokens a layer sees and must be 1 or more, got {sliding_window}")
    if not causal:
        raise ValueError(
            "an encoder (causal=False) sees past and future, a sliding_window only the past: drop one of them"
        )
    if any(not 0 <= i < depth for i in global_layers):
        raise ValueError(f"global_layers are numbers of layers from 0 to {depth - 1}, got {list(global_layers)}")


def lengths_of(prompts: Tensor, lengths: Tensor | None) -> Tensor:
    """Lengths given (...), or else those of whole rows (b, n) -> (b,)."""
    if lengths is None:
        return torch.full(prompts.shape[:1], prompts.shape[1], device=prompts.device)
    return lengths.to(prompts.device).reshape(-1)


def sampling_of(
    temperature: float, filter_logits_fn: Callable | None, filter_thres: float, top_k: int | None, top_p: float | None
) -> generation.Sampling:
    """The usual top_k and top_p take the place of the reference's filter."""
    explicit = top_k is not None or top_p is not None or filter_logits_fn is None
    filter_logits = None if explicit else partial(filter_logits_fn, thres=filter_thres)
    return generation.Sampling(temperature, filter_logits, top_k, top_p)


def seeded(seed: int | None, device: torch.device) -> torch.Generator | None:
    return None if seed is None else torch.Generator(device).manual_seed(seed)
