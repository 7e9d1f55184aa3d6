"""The autoregressive transformer that writes image codes after a caption (DALL-E, arXiv 2102.12092, section 2.2).

One stream of S = T + N slots (T text, N image): a *prefix* of the text and one start token, then the image codes in
raster order, the last of which is only ever a target. Two layouts:

- ``bos``: inputs [start, t1..tT, z1..z(N-1)], targets [t1..tT, z1..zN]
- ``boi``: inputs [t1..tT, start, z1..z(N-1)], targets [t2..tT, none, z1..zN]

Either way the first T slots feed the text head and the other N the image head, and each head scores only its own slots.
An empty text slot p (id 0) holds a learned pad of its own, id V + p, which is attended to and is a legal target.

Deviations from the paper, where it is silent: biases on, tanh GELU, weights N(0, 0.02) with the projections back into
the residual stream scaled by 1 / sqrt(2 * depth). Later pieces (RMSNorm, gated feed-forward, rotary positions,
query-key norm, sandwich norm, token shift) are fields of the config.
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle.models.attention import Attention, AttentionConstants
from dalle.models.base import FREE, ModelConfig, PretrainedModel
from dalle.models.blocks import Block, FeedForward, MlpName, SubLayer, TokenShift
from dalle.models.kernels import Backend
from dalle.models.layers import Dropout
from dalle.models.losses import IGNORED_TARGET, Head
from dalle.models.norms import NormName, make_norm
from dalle.models.patterns import AttentionPattern, ConvMode, PatternName, layer_patterns
from dalle.models.precision import compute_dtype

INITIAL_STD = 0.02


class TransformerArchitecture(ModelConfig):
    """Everything about a transformer that does not follow from its codec and its tokenizer."""

    dim: int = Field(default=512, ge=1, description="features of a slot")
    depth: int = Field(default=12, ge=1, description="blocks, one upon the other")
    heads: int = Field(default=8, ge=1, description="attention heads of a block")
    head_dim: int | None = Field(default=None, ge=1, description="width of a head; dim / heads where it is not given")
    layout: Literal["bos", "boi"] = Field(default="bos", description="where the start token stands: before the text "
                                          "(bos) or before the picture (boi)")
    attention: Literal["dalle", "full", "row", "column", "conv"] | tuple[PatternName, ...] = Field(
        default="dalle", description="which earlier image slots a slot sees: one pattern for all blocks, a sequence "
        "that is repeated, or the paper's order of row, column and conv (dalle)")
    conv_kernel: int = Field(default=11, ge=1, description="side of the window of conv, in image slots; odd")
    conv_mode: ConvMode = Field(default="flat", description="the window of conv at a row's ends: runs on into the next "
                                "row (flat), is cut off (clamp), comes in on the other side (torus)")
    norm: NormName = Field(default="layernorm", description="norm before each half of a block and before the heads")
    mlp: MlpName = Field(default="gelu_tanh", description="activation of the feed-forward half; swiglu and geglu are "
                         "gated")
    mlp_ratio: float = Field(default=4.0, gt=0, description="hidden width / dim; rounded up to a multiple of 8")
    positions: Literal["learned", "rotary"] = Field(
        default="learned", description="how a slot knows its place: vectors added to the embeddings, or turned queries "
        "and keys")
    qk_norm: bool = Field(default=False, description="RMS norm of each head's queries and keys")
    bias: bool = Field(default=True, description="whether layers and norms of the blocks have biases")
    sandwich_norm: bool = Field(default=False, description="a second norm at the end of each half of a block (CogView)")
    token_shift: bool = Field(default=False, description="take a quarter of the features from the slot before, and one "
                              "from the slot above, ahead of each half of a block")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of features dropped, of the embeddings and of "
                           "each half of a block", json_schema_extra=FREE)
    zero_init_heads: bool = Field(default=False, description="start with heads of zeros: every token equally likely")
    embedding_std: float = Field(default=INITIAL_STD, gt=0, description="first scale of the embeddings")
    embedding_gradient: float = Field(default=1.0, gt=0, le=1,
                                      description="share of the gradient that reaches the embeddings (CogView: 0.1)",
                                      json_schema_extra=FREE)
    checkpointing: bool | NonNegativeInt = Field(
        default=False, description="recompute blocks in the backward pass: all, none, or so many from the first on",
        json_schema_extra=FREE)
    attention_backend: Backend = Field(default="auto", description="form of attention; auto: by device, pattern "
                                       "and length", json_schema_extra=FREE)

    @model_validator(mode="after")
    def _fits_together(self):
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}; give head_dim")
        if self.positions == "rotary" and self.width_of_head % 4:
            raise ValueError(f"rotary positions need a head width that is a multiple of 4, not {self.width_of_head}")
        if self.token_shift and self.dim % 4:
            raise ValueError(f"token_shift moves quarters of the features: dim {self.dim} is not a multiple of 4")
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel is odd, so that it has a centre; got {self.conv_kernel}")
        if not self.attention:
            raise ValueError("attention names at least one pattern")
        return self

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.dim // self.heads

    @property
    def recomputed_blocks(self) -> int:
        """The first ones: when their turn comes in the backward pass, what the others kept is gone."""
        return self.depth * self.checkpointing if isinstance(self.checkpointing, bool) \
            else min(self.checkpointing, self.depth)

    @property
    def hidden(self) -> int:
        return math.ceil(round(self.mlp_ratio * self.dim, 6) / 8) * 8


class TransformerConfig(TransformerArchitecture):
    """A whole transformer: its architecture, and what its codec and its tokenizer say."""

    text_length: int = Field(ge=1, description="text slots, in tokens")
    num_text_tokens: int = Field(ge=2, description="the tokenizer's vocabulary V, id 0 ('unfilled') included")
    grid: tuple[PositiveInt, PositiveInt] = Field(description="rows and columns of image codes")
    num_codes: int = Field(ge=1, description="codes of the codec")

    @property
    def num_image_slots(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> int:
        """Slots before the first image code: the text and the start token."""
        return self.text_length + 1

    @property
    def length(self) -> int:
        """S, the slots of the training stream."""
        return self.text_length + self.num_image_slots


def _preset(dim: int, depth: int, heads: int, text_length: int, side: int) -> TransformerConfig:
    return TransformerConfig(dim=dim, depth=depth, heads=heads, text_length=text_length, grid=(side, side),
                             num_text_tokens=16_384, num_codes=8192)


PRESETS: dict[str, TransformerConfig] = {
    "debug": _preset(64, 4, 2, 16, 4),
    "tiny": _preset(256, 8, 4, 64, 16),
    "small": _preset(512, 12, 8, 128, 32),
    "base": _preset(768, 12, 12, 256, 32),
    "medium": _preset(1024, 24, 16, 256, 32),
    "large": _preset(1536, 24, 24, 256, 32),
    "xl": _preset(2048, 24, 32, 256, 32),
    "2.8b": _preset(1920, 64, 30, 256, 32),    # arXiv 2102.12092, table 1
    "5.6b": _preset(2688, 64, 42, 256, 32),    # the same
    "12b": _preset(3968, 64, 62, 256, 32),     # the same
}
PRESETS |= {f"{name}-128": PRESETS[name].model_copy(update={"heads": PRESETS[name].dim // 128})
            for name in ("xl", "2.8b", "5.6b", "12b")}    # the same matrices, in half as many heads of twice the width
MODERN: dict[str, Any] = {"norm": "rmsnorm", "mlp": "swiglu", "mlp_ratio": 8 / 3, "positions": "rotary",
                          "qk_norm": True, "bias": False}
PRESETS |= {f"{name}-modern": config.model_copy(update=MODERN) for name, config in PRESETS.items()}


class TextToImageTransformer(PretrainedModel):
    """Scores the text ids and image codes of a stream, each slot against its own kind only."""

    model_type = "text_to_image_transformer"
    Config = TransformerConfig

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        dim, num_texts = config.dim, config.num_text_tokens + config.text_length
        self.text_embedding = nn.Embedding(num_texts, dim)
        self.code_embedding = nn.Embedding(config.num_codes, dim)
        self.start = nn.Parameter(torch.empty(dim))
        if config.positions == "learned":
            self.text_position = nn.Parameter(torch.empty(config.text_length, dim))
            self.row_position = nn.Parameter(torch.empty(config.grid[0], 1, dim))
            self.column_position = nn.Parameter(torch.empty(1, config.grid[1], dim))
        self.dropout = Dropout(config.dropout) if config.dropout else None
        self.blocks = nn.ModuleList(make_block(config, pattern) for pattern in attention_patterns(config))
        self.norm = make_norm(config.norm, dim, config.bias)
        self.text_head = Head(dim, num_texts)
        self.image_head = Head(dim, config.num_codes)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif not name.startswith(("blocks.", "norm.", "text_head.", "image_head.")):
                parameter.normal_(std=self.config.embedding_std)
            elif "norm" not in name:
                into_residual = name.endswith(("body.out.weight", "body.down.weight"))
                parameter.normal_(std=INITIAL_STD / math.sqrt(2 * self.config.depth) if into_residual else INITIAL_STD)
        if self.config.zero_init_heads:
            self.text_head.weight.zero_()
            self.image_head.weight.zero_()

    def forward(self, text: Tensor, codes: Tensor, text_targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits in fp32, (text [B, T, V + T], image [B, N, K]), from text ids [B, T] (0: unfilled) and codes [B, N].

        The text logits at slot p score ``text_targets(text)[:, p]``, the image logits at slot i score ``codes[:, i]``.
        With ``text_targets`` [B, T] (-100: not scored) it gives the sums of the two cross-entropies instead, fp32
        scalars, and the logits are never whole in memory: what a loss calls.
        Raises ``ValueError`` when the shapes do not fit the config.
        """
        expected = (self.config.text_length, self.config.num_image_slots)
        if (text.shape[1], codes.shape[1]) != expected:
            raise ValueError(f"text {tuple(text.shape)} and codes {tuple(codes.shape)} do not fit a stream of "
                             f"{expected[0]} text and {expected[1]} image slots")
        hidden = self.norm(self._run_blocks(self.embed(text, codes[:, :-1])))
        text_hidden, image_hidden = hidden[:, :self.config.text_length], hidden[:, self.config.text_length:]
        if text_targets is None:
            return self.text_head(text_hidden), self.image_head(image_hidden)
        return self.text_head(text_hidden, text_targets), self.image_head(image_hidden, codes)

    def compiled_parts(self) -> list[nn.Module]:
        """What is worth compiling besides the blocks: the heads, each with its cross-entropy."""
        return [self.text_head, self.image_head]

    def text_targets(self, text: Tensor) -> Tensor:
        """Targets of the text head [B, T]: ids, with V + p for an empty slot p, and -100 where nothing is due."""
        ids = self._fill_pads(text)
        return ids if self.config.layout == "bos" else nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED_TARGET)

    def _fill_pads(self, text: Tensor) -> Tensor:
        pads = torch.arange(text.shape[1], device=text.device) + self.config.num_text_tokens
        return torch.where(text == 0, pads, text)

    def embed(self, text: Tensor, codes: Tensor) -> Tensor:
        """The stream [B, T + 1 + n, dim] of text ids [B, T] and the first n codes [B, n]."""
        start = self.start.expand(len(text), 1, -1)
        text_slots = self.text_embedding(self._fill_pads(text))
        image_slots = self.code_embedding(codes)
        if self.config.positions == "learned":
            text_slots = text_slots + self.text_position
            image_slots = image_slots + self.image_positions()[:codes.shape[1]]
        prefix = [start, text_slots] if self.config.layout == "bos" else [text_slots, start]
        stream = torch.cat([*prefix, image_slots], dim=1)
        share = self.config.embedding_gradient
        if share != 1.0:  # arXiv 2105.13290, section 2.3
            stream = stream * share + stream.detach() * (1 - share)
        return stream if self.dropout is None else self.dropout(stream)

    def image_positions(self) -> Tensor:
        """[N, dim]: a learned vector for the row and one for the column of each image slot."""
        return (self.row_position + self.column_position).flatten(0, 1)

    def _run_blocks(self, hidden: Tensor) -> Tensor:
        constants = self.attention_constants(hidden.shape[1], hidden.device, compute_dtype(hidden), whole=True)
        recomputed = self.config.recomputed_blocks if torch.is_grad_enabled() else 0
        for index, (block, layer) in enumerate(zip(self.blocks, constants, strict=True)):
            if index < recomputed:
                hidden = checkpoint(block, hidden, layer, use_reentrant=False)
            else:
                hidden = block(hidden, layer)
        return hidden

    @torch.compiler.disable
    def attention_constants(self, length: int, device: torch.device, dtype: torch.dtype,
                            whole: bool = False) -> list[AttentionConstants]:
        # Outside of the graph, where the masks would be built anew at every call; one object for a pattern's layers.
        made: dict[AttentionPattern, AttentionConstants] = {}
        for block in self.blocks:
            attention = block.attention.body
            if attention.pattern not in made:
                made[attention.pattern] = attention.constants(length, device, dtype, whole)
        return [made[block.attention.body.pattern] for block in self.blocks]

    def embedding_parameters(self) -> list[str]:
        """Names of the position tables, which an optimiser treats as the embeddings that they are added to."""
        learned = self.config.positions == "learned"
        return ["text_position", "row_position", "column_position"] if learned else []

    def matrix_parameters(self) -> list[str]:
        """Names of the weight matrices inside the blocks: those that an orthogonalising optimiser may take."""
        return [name for name, parameter in self.named_parameters()
                if name.startswith("blocks.") and parameter.ndim == 2]

    def flops_per_sample(self) -> float:
        """Floating-point operations of training on one sample: three times the products of a forward pass.

        Counted is what the model is defined to need: each head's columns for its own slots, and only the pairs that a
        pattern permits (two products of 2 * head width operations each); not norms, softmax or recomputation.
        """
        config = self.config
        inner = config.heads * config.width_of_head
        matrices = sum(parameter.numel() for parameter in self.blocks.parameters() if parameter.ndim == 2)
        text_head = config.text_length * self.text_head.weight.numel()
        image_head = config.num_image_slots * self.image_head.weight.numel()
        pairs = sum(pattern.pairs(config.length) for pattern in attention_patterns(config))
        return 3.0 * (2 * matrices * config.length + 2 * (text_head + image_head) + 4 * inner * pairs)


def attention_patterns(config: TransformerConfig) -> list[AttentionPattern]:
    """The attention pattern of each layer."""
    return [AttentionPattern(name, config.prefix, config.grid, config.conv_kernel, config.conv_mode)
            for name in layer_patterns(config.attention, config.depth)]


def make_block(config: TransformerConfig, pattern: AttentionPattern) -> Block:
    attention = Attention(config.dim, config.heads, config.width_of_head, pattern, bias=config.bias,
                          qk_norm=config.qk_norm, rotary=config.positions == "rotary",
                          backend=config.attention_backend)
    feed_forward = FeedForward(config.dim, config.hidden, config.mlp, config.bias)

    def sub_layer(body: nn.Module) -> SubLayer:
        norm_out = make_norm(config.norm, config.dim, config.bias) if config.sandwich_norm else None
        shift = TokenShift(config.prefix, config.grid[1]) if config.token_shift else None
        return SubLayer(body, make_norm(config.norm, config.dim, config.bias), norm_out, shift, config.dropout)

    return Block(sub_layer(attention), sub_layer(feed_forward))
