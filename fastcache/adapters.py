"""What fastcache knows about models: class names as strings, argument names, order of returns. No torch.

A model without a row works when its blocks sit in a ModuleList under a usual name, take `hidden_states`
(or their first argument) and return a tensor or a tuple. A row is needed only where that is not so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .policies.base import flag
from .targets.spec import identifiers, names_of

# Usual names of block lists. The first six are the ones diffusers 0.42.1 walks.
LIST_NAMES = (
    "blocks",
    "transformer_blocks",
    "single_transformer_blocks",
    "layers",
    "visual_transformer_blocks",
    "temporal_transformer_blocks",
    "joint_transformer_blocks",
    "double_stream_blocks",
    "single_stream_blocks",
    "double_blocks",
    "single_blocks",
    "dit_blocks",
    "transformer_layers",
    "encoder_layers",
    "decoder_layers",
    "h",
)
HIDDEN, ENCODER = "hidden", "encoder"


@dataclass(frozen=True)
class Block:
    """How to talk to one class of block.

    hidden, encoder: argument names of the image and the text stream (encoder None: it has none).
    returns: order of the streams in the returned tuple; None finds it from shapes at the first call.
    modulation: the first normalisation with the timestep in it, as (attribute of the block, its keyword for
    the conditioning, argument of the block that holds that); None: not known. Where the block adds the
    conditioning to a table of its own, the table's name takes the keyword's place.
    """

    hidden: str | None = None
    encoder: str | None = "encoder_hidden_states"
    returns: tuple[str, ...] | None = None
    modulation: tuple[str, str, str] | None = None

    def __post_init__(self) -> None:
        for name in ("hidden", "encoder"):
            value = getattr(self, name)
            if value is not None:
                names_of("Block", name, [value])
        if self.returns is not None:
            object.__setattr__(self, "returns", names_of("Block", "returns", self.returns))
            unknown = set(self.returns) - {HIDDEN, ENCODER}
            if unknown or HIDDEN not in self.returns:
                raise ValueError(
                    f"Block: returns is {self.returns!r}, must hold {HIDDEN!r} and may hold {ENCODER!r}"
                )


@dataclass(frozen=True)
class BlockAdapter:
    """How to find and drive the blocks of one model class.

    blocks: attribute names of the block lists, in the order they run; None finds them by usual names.
    block: argument names and order of returns of its blocks. encoder_read: whether the text stream is
    read after the last block, so that a skipped step must give it too; None assumes it may be.
    attention: regular expressions of its attention modules. temporal: those that attend over time.
    """

    blocks: tuple[str, ...] | None = None
    block: Block | None = None
    encoder_read: bool | None = None
    attention: tuple[str, ...] | None = None
    temporal: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("blocks", "attention", "temporal"):
            value = getattr(self, name)
            if value is None:
                continue
            check = names_of if name == "blocks" else identifiers
            object.__setattr__(self, name, check("BlockAdapter", name, value))
        if self.encoder_read is not None:
            flag("BlockAdapter", "encoder_read", self.encoder_read)
        if self.block is not None and not isinstance(self.block, Block):
            raise TypeError(
                f"BlockAdapter: block is {self.block!r}, must be a fastcache.adapters.Block"
            )


# Order of returns of block classes whose streams cannot be told apart by shape alone.
BLOCKS: dict[str, Block] = {
    **{
        name: Block(returns=(ENCODER, HIDDEN))
        for name in (
            "FluxTransformerBlock",
            "FluxSingleTransformerBlock",
            "Flux2TransformerBlock",
            "ChromaTransformerBlock",
            "BriaTransformerBlock",
            "BriaSingleTransformerBlock",
            "BriaFiboTransformerBlock",
            "BriaFiboSingleTransformerBlock",
            "LongCatImageTransformerBlock",
            "LongCatImageSingleTransformerBlock",
            "OvisImageTransformerBlock",
            "OvisImageSingleTransformerBlock",
            "QwenImageTransformerBlock",
            "NucleusMoEImageTransformerBlock",
            "JointTransformerBlock",
            "AuraFlowJointTransformerBlock",
        )
    },
    **{
        name: Block(returns=(HIDDEN, ENCODER))
        for name in (
            "CogVideoXBlock",
            "CogView3PlusTransformerBlock",
            "CogView4TransformerBlock",
            "GlmImageTransformerBlock",
            "MochiTransformerBlock",
            "HunyuanVideoTransformerBlock",
            "HunyuanVideoSingleTransformerBlock",
            "HunyuanVideoTokenReplaceTransformerBlock",
            "HunyuanVideoTokenReplaceSingleTransformerBlock",
            "HunyuanVideo15TransformerBlock",
            "HunyuanImageTransformerBlock",
            "HunyuanImageSingleTransformerBlock",
            "MotifVideoTransformerBlock",
            "MotifVideoSingleTransformerBlock",
        )
    },
    "Kandinsky5TransformerDecoderBlock": Block(
        hidden="visual_embed", encoder="text_embed", returns=(HIDDEN,)
    ),
    "Cosmos3VLTextMoTDecoderLayer": Block(
        hidden="gen_seq", encoder="und_seq", returns=(ENCODER, HIDDEN)
    ),
}

MODELS: dict[str, BlockAdapter] = {
    **{
        name: BlockAdapter(encoder_read=False)
        for name in (
            "FluxTransformer2DModel",
            "Flux2Transformer2DModel",
            "ChromaTransformer2DModel",
            "BriaTransformer2DModel",
            "QwenImageTransformer2DModel",
            "CogView4Transformer2DModel",
            "HunyuanVideoTransformer3DModel",
            "HunyuanImageTransformer2DModel",
            "MochiTransformer3DModel",
            "SD3Transformer2DModel",
            "Kandinsky5Transformer3DModel",
        )
    },
    # holds LTX-2's audio attention for its checkpoint, and runs the video's alone
    "SanaWMLTX2RefinerTransformer3DModel": BlockAdapter(attention=(r"\.attn[12]$",)),
    "T5FilmDecoder": BlockAdapter(blocks=("decoders",)),
}
# The first normalisation with the timestep in it: (attribute, keyword or table, argument).
MODULATIONS: dict[str, tuple[str, str, str]] = {
    **dict.fromkeys(
        (
            "FluxTransformerBlock",
            "BriaTransformerBlock",
            "HunyuanVideoTransformerBlock",
            "HunyuanImageTransformerBlock",
            "JointTransformerBlock",
        ),
        ("norm1", "emb", "temb"),
    ),
    "WanTransformerBlock": ("norm1", "scale_shift_table", "temb"),
}
# Calls that fill a key/value cache for those after them, by argument: every module must run in them.
KEEPING: dict[str, tuple[str, ...]] = {
    "kv_cache_mode": ("extract", "capture_pre_rope", "inject_and_capture_post_rope"),
}
_registered: dict[str, BlockAdapter] = {}


def keeps(kwargs: dict) -> bool:
    """Whether a call of a model leaves something behind that later calls read."""
    for name, values in KEEPING.items():  # once per step: a generator takes three times as long
        if kwargs.get(name) in values:
            return True
    return False


def register_adapter(model: type | str, adapter: BlockAdapter) -> None:
    """Use `adapter` for a model class (or its name) and its subclasses, before the built-in rows."""
    name = model if isinstance(model, str) else getattr(model, "__name__", None)
    if not isinstance(name, str):
        raise TypeError(f"register_adapter: model is {model!r}, must be a class or its name")
    if not isinstance(adapter, BlockAdapter):
        raise TypeError(
            f"register_adapter: adapter is {type(adapter).__name__}, must be a BlockAdapter"
        )
    _registered[name] = adapter


def adapter_for(model: object) -> BlockAdapter:
    """The row of the model's class or of its nearest base that has one; an empty row otherwise."""
    for base in type(model).__mro__:
        for table in (_registered, MODELS):
            if base.__name__ in table:
                return table[base.__name__]
    return BlockAdapter()


def shifted(x: Any, table: Any, given: Any) -> Any:
    """x [B, S, D], shifted and scaled by the first two rows of table [1, n, D] + given [B, n, D] or [B, S, n, D]."""
    shift, scale = (table + given.float()).unbind(-2)[:2]
    if given.dim() == 3:  # one for all tokens
        shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)
    return x * (1 + scale) + shift


class BlockIO:
    """Reads the streams of one block's call and return, and builds such a return.

    The order of returns is the row's; without one it is found at the first computed call: by which
    entry the model hands to the next block as what, else by shape, else (hidden, encoder).
    """

    def __init__(self, block: Any, row: Block | None = None) -> None:
        known = row or next(
            (BLOCKS[b.__name__] for b in type(block).__mro__ if b.__name__ in BLOCKS), None
        )
        names = parameter_names(type(block).forward)
        known = known or Block()
        self.name = type(block).__name__
        self.hidden = known.hidden or (
            "hidden_states" if "hidden_states" in names or not names else names[0]
        )
        self.encoder = known.encoder
        self.hidden_at = names.index(self.hidden) if self.hidden in names else 0
        self.encoder_at = names.index(self.encoder) if self.encoder in names else None
        self.returns = known.returns
        self.declared = declared(known.returns or ())
        self.found: tuple[int, int | None] | None = None  # places that a recording call has seen
        self.modulation = known.modulation or next(
            (MODULATIONS[b.__name__] for b in type(block).__mro__ if b.__name__ in MODULATIONS),
            None,
        )
        self.names = names

    def read(self, args: tuple, kwargs: dict) -> tuple[Any, Any]:
        """(hidden, encoder) of a call; encoder is None where the block takes none."""
        if self.hidden in kwargs:
            hidden = kwargs[self.hidden]
        elif len(args) > self.hidden_at:
            hidden = args[self.hidden_at]
        else:
            raise ValueError(
                f"{self.name}: its call has no {self.hidden!r}; declare the argument with "
                "fastcache.BlockAdapter(block=fastcache.adapters.Block(hidden=...))"
            )
        if self.encoder in kwargs:
            return hidden, kwargs[self.encoder]
        at = self.encoder_at
        return hidden, args[at] if at is not None and len(args) > at else None

    def modulated(self, block: Any, args: tuple, kwargs: dict) -> Any:
        """The block's normalised, timestep-modulated input, for this call."""
        attribute, keyword, argument = self.modulation or ("", "", "")
        given = kwargs[argument] if argument in kwargs else args[self.names.index(argument)]
        hidden, norm = self.read(args, kwargs)[0], getattr(block, attribute)
        table = getattr(block, keyword, None)
        if table is not None:
            return shifted(norm(hidden.float()), table, given).type_as(hidden)
        value = norm(hidden, **{keyword: given})
        return value[0] if isinstance(value, tuple) else value

    def positions(self, output: Any, hidden: Any, encoder: Any) -> tuple[int | None, int | None]:
        """Where the image and the text stream are in a returned tuple; (None, None) for a bare tensor."""
        if not isinstance(output, tuple | list):
            return None, None
        if self.returns is not None:
            whole = len(output) >= len(self.returns)
            return self.declared if whole else declared(self.returns[: len(output)])
        if self.found is not None and max(self.found[0], self.found[1] or 0) < len(output):
            return self.found
        shaped = [i for i, v in enumerate(output) if getattr(v, "shape", None) == hidden.shape]
        texts = [
            i
            for i, v in enumerate(output)
            if encoder is not None and getattr(v, "shape", None) == encoder.shape
        ]
        first = shaped[0] if shaped else 0
        rest = [i for i in texts if i != first]
        return first, rest[0] if rest else None


def declared(returns: tuple[str, ...]) -> tuple[int, int | None]:
    """The places of the image and the text stream in a tuple of these."""
    at = {name: i for i, name in enumerate(returns)}
    return at.get(HIDDEN, 0), at.get(ENCODER)


def parameter_names(function: Callable) -> list[str]:
    """Names of the positional parameters after `self`; empty where the signature tells nothing."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
