"""The model to plan for, without its weights: a module tree on the meta device and the sizes that memory depends on."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

_HEAD_DIM = 128
_VOCAB = 32000


@dataclasses.dataclass(frozen=True)
class Attention:
    """What one layer keeps of each token: K and V of `width` elements together, at most `window` tokens."""

    width: int
    window: int | None = None
    # True for a decoder's keys and values of the encoder's output.
    cross: bool = False


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The sizes of a transformer that its activations and caches depend on.

    hidden, intermediate: features of the residual stream and inside one MLP.
    query, kv: features of Q, and of K (and of V), in a layer.
    norms: norms over the hidden features in one layer. norm_bytes: what one saves for backward per feature: 8 for
        RMSNorm, which transformers computes in fp32, 4 else. qk_norm: queries and keys are normed too.
    mlp_saved: 16-bit values per inner feature that an MLP saves for backward. relu: its activation is a plain ReLU.
    eager: attention scores of all pairs of tokens exist in memory (no fused kernel serves this model).
    attention: one entry for each cache; empty for a model that does not generate.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    query: int
    kv: int
    vocab: int
    gated_mlp: bool
    norms: int
    norm_bytes: int
    qk_norm: bool
    mlp_saved: int
    relu: bool
    eager: bool
    max_context: int | None
    attention: tuple[Attention, ...]

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        # One line a kind of layer, not one a layer.
        data["attention"] = [
            {**dataclasses.asdict(kind), "layers": self.attention.count(kind)} for kind in dict.fromkeys(self.attention)
        ]
        return data


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, its shape, and how Python loads the real one.

    source: what `from_pretrained` takes; None where the shape was made up from a number of parameters.
    loader: the class in transformers whose `from_pretrained` gives this model.
    """

    model: nn.Module
    shape: ModelShape
    source: str | None
    loader: str
    dtype: torch.dtype

    @property
    def parameters(self) -> int:
        """Parameters, a tied one counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def from_pretrained(source: str, dtype: torch.dtype = torch.bfloat16) -> Skeleton:
    """The skeleton of a local model folder or hub name, from its config.json alone.

    dtype: of what is not quantized. Raises ValueError for a config that no transformers class fits and for a checkpoint
    that is quantized already, OSError for a folder that transformers cannot read.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except OSError:
        raise
    except Exception as error:  # a damaged config.json fails in as many ways as there are models
        raise ValueError(f"{source}: its config.json cannot be read: {_brief(error)}") from error
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
        raise ValueError(f"{source} is quantized already ({method}); plan the floating point model that it came from")
    cls = _model_class(config)
    default = torch.get_default_dtype()
    try:
        with torch.device("meta"):
            model = cls._from_config(config, dtype=dtype)
    except Exception as error:
        raise ValueError(f"{source}: its config.json describes no {cls.__name__}: {_brief(error)}") from error
    finally:
        torch.set_default_dtype(default)
    model.tie_weights()
    _keep_in_fp32(model, dtype)
    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    loader = "AutoModelForCausalLM" if cls.__name__ in causal else cls.__name__
    return Skeleton(model, shape_of(config, model), source, loader, dtype)


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _model_class(config: Any) -> Any:
    """The class that wrote the checkpoint, as config.json says; without it, the first head that the type has."""
    import transformers

    for name in config.architectures or []:
        cls = getattr(transformers, name, None)
        if cls is not None:
            return cls
    for auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText", "AutoModel"):
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, (list, tuple)) else found
    raise ValueError(f"transformers {transformers.__version__} has no model class for model_type {config.model_type!r}")


def _keep_in_fp32(model: Any, dtype: torch.dtype) -> None:
    """What `from_pretrained` leaves in fp32 because the model says so."""
    if dtype not in (torch.float16, torch.bfloat16):
        return
    from kbit.nn.select import matches

    patterns = list(getattr(model, "_keep_in_fp32_modules_strict", None) or [])
    if dtype == torch.float16:
        patterns += list(getattr(model, "_keep_in_fp32_modules", None) or [])
    for name, parameter in model.named_parameters():
        if patterns and matches(name.rpartition(".")[0], patterns):
            parameter.data = parameter.data.float()


def _first(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these settings that the config has. A list (one value a layer) counts as its largest."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value):
            value = max(value)
        if value is not None and not isinstance(value, (list, tuple, dict)):
            return value
    return default


def shape_of(config: Any, model: nn.Module) -> ModelShape:
    """Read a transformers config; names differ from model to model."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    hidden = _first(text, "hidden_size", "d_model", "n_embd", default=1)
    heads = _first(text, "num_attention_heads", "decoder_attention_heads", "n_head", "num_heads", default=1)
    layers = _first(text, "decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", default=1)
    kv_heads = _first(text, "num_key_value_heads", "n_head_kv", default=None)
    if kv_heads is None:
        kv_heads = 1 if getattr(text, "multi_query", False) else heads
    head_dim = _first(text, "head_dim", "d_kv", default=hidden // heads)
    intermediate = _first(
        text,
        "intermediate_size",
        "ffn_dim",
        "decoder_ffn_dim",
        "d_ff",
        "n_inner",
        "ffn_hidden_size",
        default=4 * hidden,
    )
    experts = _first(text, "num_experts_per_tok", "num_experts_per_token")
    if experts:  # every token runs through this many MLPs
        intermediate = experts * _first(text, "moe_intermediate_size", default=intermediate)
    gated = any("gate" in name.rsplit(".", 1)[-1] or name.endswith("wi_1") for name, _ in model.named_modules())
    generates = bool(getattr(model, "can_generate", lambda: False)())
    encoder_layers = 0
    if getattr(config, "is_encoder_decoder", False):
        encoder_layers = _first(config, "encoder_layers", "num_layers", default=layers)
    norms = sum("norm" in type(m).__name__.lower() and _numel(m) == hidden for m in model.modules())
    activation = str(_first(text, "hidden_act", "activation_function", "dense_act_fn", "hidden_activation", default=""))
    # Written out in torch operators, each of which saves something, where others are one fused function.
    spelled_out = 3 if activation in ("gelu_new", "gelu_fast") else 0
    return ModelShape(
        layers=layers + encoder_layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        query=heads * head_dim,
        kv=kv_heads * head_dim,
        vocab=_first(text, "vocab_size", default=0),
        gated_mlp=gated,
        norms=max(1, round((norms - 1) / (layers + encoder_layers))),
        norm_bytes=8 if any(_is_rms_norm(module) for module in model.modules()) else 4,
        qk_norm=any(name.endswith(("q_norm", "query_norm", "q_layernorm")) for name, _ in model.named_modules()),
        mlp_saved=(4 if gated else 1 if activation == "relu" else 2) + spelled_out,
        relu=activation == "relu" and not gated,
        eager=getattr(text, "_attn_implementation", None) == "eager",
        max_context=_first(text, "max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"),
        attention=_caches(text, layers, heads, kv_heads * head_dim, encoder_layers > 0) if generates else (),
    )


def _is_rms_norm(module: nn.Module) -> bool:
    name = type(module).__name__
    return "RMSNorm" in name or name == "T5LayerNorm"


def _numel(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return weight.numel() if isinstance(weight, torch.Tensor) else 0


def _caches(text: Any, layers: int, heads: int, kv: int, cross: bool) -> tuple[Attention, ...]:
    width = 2 * kv
    if getattr(text, "kv_lora_rank", None) and getattr(text, "qk_rope_head_dim", None):
        # Multi-head latent attention: transformers caches the expanded keys and values of every head.
        width = heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim)
    window = getattr(text, "sliding_window", None)
    chunk = getattr(text, "attention_chunk_size", None)
    types = getattr(text, "layer_types", None)
    if types is None:
        sliding = window is not None and getattr(text, "use_sliding_window", True)
        types = ["sliding_attention" if sliding else "full_attention"] * layers
    caches = []
    for kind in types[:layers]:
        if kind == "sliding_attention":
            caches.append(Attention(width, window))
        elif kind == "chunked_attention":
            caches.append(Attention(width, chunk))
        elif kind == "full_attention":
            caches.append(Attention(width))
        # Linear attention and state space layers keep a state that does not grow with the context.
    if cross:
        caches += [Attention(width, cross=True)] * layers
    return tuple(caches)


class _LlamaLike(nn.Module):
    """The module tree of a LLaMA, in plain torch: names and shapes only, no forward."""

    def __init__(self, vocab: int, hidden: int, intermediate: int, layers: int, kv: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            layer = nn.Module()
            for name, (k, n) in {
                "q_proj": (hidden, hidden),
                "k_proj": (hidden, kv),
                "v_proj": (hidden, kv),
                "o_proj": (hidden, hidden),
                "gate_proj": (hidden, intermediate),
                "up_proj": (hidden, intermediate),
                "down_proj": (intermediate, hidden),
            }.items():
                layer.add_module(name, nn.Linear(k, n, bias=False))
            layer.add_module("input_layernorm", nn.RMSNorm(hidden))
            layer.add_module("post_attention_layernorm", nn.RMSNorm(hidden))
            self.layers.append(layer)
        self.norm = nn.RMSNorm(hidden)
        self.lm_head = nn.Linear(hidden, vocab, bias=False)


def from_params(parameters: int, dtype: torch.dtype = torch.bfloat16) -> Skeleton:
    """A LLaMA of about that many parameters (within 1%): its proportions, untied head, one K and V per head up to 20B
    parameters and eight of them above. Raises ValueError below a million.
    """
    if parameters < 1_000_000:
        raise ValueError(f"{parameters} parameters are fewer than any language model has; write for example 7B or 350M")
    small, large = parameters < 500_000_000, parameters > 20_000_000_000

    def sizes(hidden: int) -> tuple[int, int, int, int]:
        """(layers, K features, vocabulary, parameters outside the MLPs) of a model this wide."""
        layers = max(2, round(hidden / (64 if small else 100 if large else 128)))
        kv = min(hidden, 8 * _HEAD_DIM) if large else hidden
        # A small model has a small vocabulary, or its table would be most of it.
        vocab = min(_VOCAB, max(256, parameters // (8 * hidden) // 64 * 64))
        return layers, kv, vocab, layers * 2 * hidden * (hidden + kv + 1) + (2 * vocab + 1) * hidden

    def distance(hidden: int) -> float:
        layers, _, _, others = sizes(hidden)
        return abs(others + layers * 8 * hidden * hidden - parameters)  # 8 = 3 matrices of 8/3 hidden

    step = 64 if small else _HEAD_DIM
    hidden = min(range(step, 32769, step), key=distance)
    layers, kv, vocab, others = sizes(hidden)
    # What the widths leave over goes into the MLP, the freest of these sizes.
    width = max(16, round((parameters - others) / (layers * 3 * hidden) / 16) * 16)
    with torch.device("meta"):
        model = _LlamaLike(vocab, hidden, width, layers, kv).to(dtype)
    shape = ModelShape(
        layers=layers,
        hidden=hidden,
        intermediate=width,
        heads=max(1, hidden // _HEAD_DIM),
        query=hidden,
        kv=kv,
        vocab=vocab,
        gated_mlp=True,
        norms=2,
        norm_bytes=8,
        qk_norm=False,
        mlp_saved=4,
        relu=False,
        eager=False,
        max_context=None,
        attention=(Attention(2 * kv),) * layers,
    )
    return Skeleton(model, shape, None, "AutoModelForCausalLM", dtype)
