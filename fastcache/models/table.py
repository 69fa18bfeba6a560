# SPDX-License-Identifier: Apache-2.0
"""What is known about models: one row each."""

from __future__ import annotations

from .adapter import ENCODER, HIDDEN, Block, BlockAdapter

# Usual names of block lists. The first six are the ones diffusers 0.42.1 walks.
LIST_NAMES = (
    "blocks",
    "transformer_blocks",
    "single_transformer_blocks",
    "layers",
    "visual_transformer_blocks",
    "temporal_transformer_blocks",
    "joint_transformer_blocks",
    "joint_blocks",
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
    # of FLUX's, HunyuanVideo's and SD3's own code, and of ComfyUI, which keeps their names
    "DoubleStreamBlock": Block(hidden="img", encoder="txt", returns=(HIDDEN, ENCODER)),
    "JointBlock": Block(hidden="x", encoder="context", returns=(ENCODER, HIDDEN)),
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
            "Flux",
            "HunyuanVideo",
            "MMDiT",
        )
    },
    # it holds LTX-2's audio attention for its checkpoint, and runs the attention of the video alone
    "SanaWMLTX2RefinerTransformer3DModel": BlockAdapter(attention=(r"\.attn[12]$",)),
    # the text of Cosmos 3 is normalised too, and never read
    "Cosmos3OmniTransformer": BlockAdapter(encoder_read=False, norm="norm_moe_gen"),
    "T5FilmDecoder": BlockAdapter(blocks=("decoders",)),
}


# The first normalisation with the timestep in it: see `Block`. Of the rows of a class the first holds that names what
# the block has.
_EMB = ("norm1", "emb", "temb")
_TABLE = ("norm1", "scale_shift_table", "temb")
_TEXT = ("norm1", "encoder_hidden_states", "encoder_hidden_states", "temb", "temb")
_TIMESTEP = ("norm1", "scale_shift_table", "timestep")
_LABELS = (
    "norm1",
    *("timestep",) * 2,
    *("class_labels",) * 2,
    "hidden_dtype",
    "hidden_states.dtype",
)
MODULATIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(
        (
            "FluxTransformerBlock",
            "AuraFlowJointTransformerBlock",
            "BriaTransformerBlock",
            "BriaFiboTransformerBlock",
            "HunyuanDiTBlock",
            "HunyuanVideoTransformerBlock",
            "HunyuanVideo15TransformerBlock",
            "HunyuanImageTransformerBlock",
            "JointTransformerBlock",
            "LongCatImageTransformerBlock",
            "Lumina2TransformerBlock",
            "LuminaNextDiTBlock",
            "MochiTransformerBlock",
            "MotifVideoTransformerBlock",
            "OvisImageTransformerBlock",
        ),
        (_EMB,),
    ),
    **dict.fromkeys(
        (
            "WanTransformerBlock",
            "AllegroTransformerBlock",
            "AnyFlowTransformerBlock",
            "HeliosTransformerBlock",
            "LTXVideoTransformerBlock",
            "SkyReelsV2TransformerBlock",
        ),
        (_TABLE,),
    ),
    # of PixArt, and of DiT
    "BasicTransformerBlock": (_TIMESTEP, _LABELS),
    **dict.fromkeys(("SanaTransformerBlock", "SanaVideoTransformerBlock"), (_TIMESTEP,)),
    **dict.fromkeys(
        (
            "CogVideoXBlock",
            "CogView4TransformerBlock",
            "ConsisIDBlock",
            "EasyAnimateTransformerBlock",
            "GlmImageTransformerBlock",
        ),
        (_TEXT,),
    ),
    "CogView3PlusTransformerBlock": (("norm1", "context", "encoder_hidden_states", "emb", "emb"),),
    "AceStepTransformerBlock": (("self_attn_norm", "scale_shift_table", "temb"),),
    "ChromaTransformerBlock": (("norm1.norm", "temb", "temb"),),
    "Flux2TransformerBlock": (("norm1", "temb_mod_img", "temb_mod_img"),),
    "HiDreamBlock": (("block.norm1_i", "block.adaLN_modulation", "temb"),),
    "Kandinsky5TransformerDecoderBlock": (
        ("self_attention_norm", "visual_modulation", "time_embed"),
    ),
    "QwenImageTransformerBlock": (("img_norm1", "img_mod", "temb"),),
}


# Normalisations of diffusers whose first two rows of linear(silu(emb)) are the shift and the scale of their `norm`.
ADALN = frozenset(("AdaLayerNormZero", "AdaLayerNormZeroSingle", "SD35AdaLayerNormZeroX"))


# Arguments, and their values, of calls that fill a key/value cache for later calls: every module must run.
KEEPING: dict[str, tuple[str, ...]] = {
    "kv_cache_mode": ("extract", "capture_pre_rope", "inject_and_capture_post_rope"),
}


# Models whose pipelines in diffusers count time from noise at 0 up to the picture, where most count down to it.
RISING = frozenset(
    (
        "Ideogram4Transformer2DModel",
        "LongCatAudioDiTTransformer",
        "Lumina2Transformer2DModel",
        "LuminaNextDiT2DModel",
        "MiniMaxMusic3Transformer1DModel",
        "MochiTransformer3DModel",
        "OmniGenTransformer2DModel",
        "ZImageTransformer2DModel",
    )
)
