"""Which fields of a Hugging Face ``config.json`` are read, which are fixed, which do not matter."""

from collections.abc import Mapping
from typing import Any

FAMILIES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Values of ``model_type`` that are implemented, with the model's class."""

SCORE_FAMILIES: Mapping[str, str] = {
    family: name.replace("ForCausalLM", "ForSequenceClassification")
    for family, name in FAMILIES.items()
}
"""Their classes with a scalar head, as reward models have it."""

READ = frozenset(
    """model_type hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim vocab_size max_position_embeddings rms_norm_eps
    tie_word_embeddings initializer_range rope_theta rope_scaling rope_parameters sliding_window
    use_sliding_window max_window_layers layer_types dtype torch_dtype
    architectures auto_map id2label num_labels""".split()
)
"""Fields that are read."""

REQUIRED_VALUES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "hidden_dropout": (0, 0.0),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1, 1.0),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
}
"""Fields that would change the mathematics, with the values that leave it as implemented."""

HARMLESS = frozenset(
    """bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id
    unk_token_id mask_token_id decoder_start_token_id transformers_version use_cache _name_or_path
    name_or_path return_dict output_hidden_states output_attentions return_dict_in_generate
    torchscript use_bfloat16 label2id problem_type finetuning_task
    tokenizer_class prefix task_specific_params _attn_implementation _attn_implementation_autoset
    attn_implementation is_llama_config transformers.js_config unsloth_version unsloth_fixed
    _commit_hash language license
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens pruned_heads
    tf_legacy_loss cross_attention_hidden_size""".split()
)
"""Fields that describe tokens, outputs, generation or provenance, not the mathematics."""

ROPE_FIELDS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
}
"""RoPE types that are implemented, with their parameters."""
