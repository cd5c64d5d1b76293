"""Marks of all settings: which of them two models must share.

Every field of ETConfig and LanguageModelConfig, and every argument that Megatron makes them from,
has a mark:

- "same": it changes what the model computes from its weights, or which tensors are saved. A
  checkpoint can only be used with the value that it was trained with.
- "schedule": it changes what training does to the weights, not the model. A run resumes with
  another value only if the user overrides the checkpoint explicitly.
- "free": layout, kernels, precision of a computation, memory, logging, initial weights.

A name without a mark counts as "same", and `tests/model/test_identity.py` fails for it.
"""

from typing import Literal

Mark = Literal["same", "schedule", "free"]


def _marked(mark: Mark, names: str) -> dict[str, Mark]:
    return dict.fromkeys(names.split(), mark)


MARKS: dict[str, Mark] = {
    # Sizes, which messages name first.
    **_marked(
        "same",
        """
        num_layers hidden_size num_attention_heads group_query_attention num_query_groups
        kv_channels ffn_hidden_size vocab_size num_experts num_moe_experts moe_layer_freq
        moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_shared_expert_gate
        moe_latent_size multi_latent_attention heterogeneous_layers_config_path
        heterogeneous_block_specs hybrid_layer_pattern hybrid_override_pattern
        hybrid_attention_ratio hybrid_mlp_ratio is_hybrid_model mtp_num_layers
        mtp_use_repeated_layer mtp_hybrid_override_pattern mamba_state_dim mamba_head_dim
        mamba_num_groups mamba_num_heads mamba_layers linear_conv_kernel_dim linear_key_head_dim
        linear_value_head_dim linear_num_key_heads linear_num_value_heads
        moe_shared_expert_glu_interleave_size moe_mlp_glu_interleave_size
        """,
    ),
    # Blocks: activation, norms, biases, output.
    **_marked(
        "same",
        """
        swiglu squared_relu quick_geglu gated_linear_unit activation_func glu_linear_offset
        activation_func_clamp_value add_bias_linear add_qkv_bias normalization layernorm_epsilon
        layernorm_zero_centered_gamma apply_residual_connection_post_layernorm qk_layernorm
        qk_l2_norm untie_embeddings_and_output_weights share_embeddings_and_output_weights
        et_norm_scale et_embedding_norm et_logit_softcap use_mup mup_width_mult
        mup_base_hidden_size mup_embedding_mult mup_output_mult mup_base_head_dim
        mup_attn_scale_power
        """,
    ),
    # Attention and positions.
    **_marked(
        "same",
        """
        position_embedding_type rotary_base rotary_percent rotary_interleaved rope_type
        use_rope_scaling rope_scaling rope_scaling_factor rotary_seq_len_interpolation_factor
        seq_len_interpolation_factor no_rope_freq mrope_section rotary_scaling_factor
        yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow mscale mscale_all_dim
        yarn_correction_range_round_to_int max_position_embeddings softmax_scale softmax_type
        window_size window_attn_skip_freq attention_output_gate experimental_attention_variant
        linear_attention_freq dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk
        dsa_indexer_topk_freq dsa_indexer_skip_topk_offset dsa_indexer_rope_interleaved
        dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon
        """,
    ),
    # Routing.
    **_marked(
        "same",
        """
        router_type et_mean_experts et_threshold_estimator et_ema_decay et_gate moe_router_topk
        moe_router_topk_limited_devices moe_router_num_groups moe_router_group_topk
        moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_score_function
        moe_router_enable_expert_bias moe_apply_probs_on_input moe_router_force_load_balancing
        moe_router_force_biased
        """,
    ),
    # Training: noise, auxiliary losses, limits and rules of its steps.
    **_marked(
        "schedule",
        """
        hidden_dropout attention_dropout calculate_per_token_loss mtp_loss_scaling_factor
        mtp_detach_heads dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss
        experimental_attention_variant_loss_scale_func qk_clip qk_clip_alpha qk_clip_threshold
        et_warmup_iters et_capacity et_capacity_pool et_cutoff_pool
        moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff moe_input_jitter_eps
        moe_router_bias_update_rate moe_router_quantile_balancing_ema moe_token_dropping
        moe_expert_capacity_factor moe_token_drop_policy moe_expert_rank_capacity_factor
        """,
    ),
    # Parallel layout, pipeline and communication.
    **_marked(
        "free",
        """
        tensor_model_parallel_size tensor_parallel_num_weight_shards gtp_weight_remat_size
        pipeline_model_parallel_comm_backend pipeline_model_parallel_size
        virtual_pipeline_model_parallel_size sequence_parallel context_parallel_size
        hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank hybrid_context_parallel
        expert_model_parallel_size expert_tensor_parallel_size
        expert_tensor_parallel_num_weight_shards expert_gtp_weight_remat_size
        num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
        decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
        pipeline_model_parallel_layout account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split mtp_standalone microbatch_group_size_per_vp_stage
        num_microbatches_with_partial_activation_checkpoints pipeline_dtype variable_seq_lengths
        overlap_p2p_comm overlap_p2p_comm_warmup_flush batch_p2p_comm batch_p2p_sync
        use_ring_exchange_p2p deallocate_pipeline_outputs defer_embedding_wgrad_compute
        wgrad_deferral_limit tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad
        tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag
        tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs tp_comm_overlap_disable_qkv
        tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend
        overlap_moe_expert_parallel_comm delay_wgrad_compute
        overlap_dispatch_backward_with_experts_wgrad ep_overlap_early_attn_memory_release
        cp_comm_type symmetric_ar_type nccl_all_reduce_for_prefill high_priority_a2a_comm_stream
        parallel_output make_vocab_size_divisible_by
        should_pad_vocab padded_vocab_size
        """,
    ),
    # Dispatch of tokens to experts.
    **_marked(
        "free",
        """
        moe_token_dispatcher_type moe_enable_deepep moe_flex_dispatcher_backend
        moe_permute_fusion_into_hybridep moe_hybridep_pad_uneven_dispatch_inputs
        moe_pad_expert_input_to_capacity moe_pad_experts_for_cuda_graph_inference
        moe_router_padding_for_quantization moe_router_padding_for_fp8 moe_shared_expert_overlap
        moe_enable_routing_replay moe_flex_dispatcher_num_sms moe_deepep_num_sms
        moe_hybridep_num_sms moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute
        moe_hybridep_num_sms_preprocessing moe_ncclep_static_shape moe_ncclep_zero_copy
        et_logit_buffer_mb
        """,
    ),
    # Kernels and their precision. The precision of the weights is checked with the optimizer's
    # state, in megatron_ext.training.resharding.
    **_marked(
        "free",
        """
        transformer_impl attention_backend flash_attention_version fp16 bf16 params_dtype
        enable_autocast autocast_dtype deterministic_mode batch_invariant_mode
        fp32_residual_connection apply_query_key_layer_scaling attention_softmax_in_fp32
        disable_bf16_reduced_precision_matmul fp16_lm_cross_entropy moe_router_dtype
        dsa_kernel_backend dsa_indexer_k_norm_fp32 mamba_training_ssm_states_dtype
        gradient_accumulation_fusion cross_entropy_loss_fusion cross_entropy_fusion_impl
        bias_activation_fusion bias_gelu_fusion bias_swiglu_fusion masked_softmax_fusion
        persist_layer_norm no_persist_layer_norm memory_efficient_layer_norm bias_dropout_fusion
        apply_rope_fusion use_fused_weighted_squared_relu fused_single_qkv_rope
        fused_residual_rmsnorm use_transformer_engine_op_fuser use_te_activation_func
        use_grouped_gemm_for_shared_expert use_grouped_gemm_for_dense_mlp moe_grouped_gemm
        moe_single_grouped_weight moe_single_grouped_bias moe_permute_fusion moe_router_fusion
        use_mamba_mem_eff_path clone_scatter_output_in_embedding
        disable_parameter_transpose_cache fp8 fp8_recipe fp8_param fp8_param_gather
        fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len
        fp8_amax_compute_algo fp8_wgrad fp8_output_proj fp8_dot_product_attention
        fp8_multi_head_attention tp_only_amax_red activation_func_fp8_input_store
        first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 fp4
        fp4_recipe fp4_param fp4_param_gather fp4_quantizer_factory use_kitchen
        use_kitchen_attention kitchen_attention_backend te_precision_config_file quant_recipe
        """,
    ),
    # Memory: recomputation, offloading, graphs.
    **_marked(
        "free",
        """
        recompute_granularity recompute_method recompute_num_layers recompute_modules
        distribute_saved_activations moe_layer_recompute mlp_chunks_for_prefill
        mlp_chunks_for_training cpu_offloading cpu_offloading_num_layers _cpu_offloading_context
        cpu_offloading_activations cpu_offloading_weights cpu_offloading_double_buffering
        cpu_offloading_retain_pinned_cpu_buffers fine_grained_activation_offloading
        offload_modules min_offloaded_tensor_size delay_offload_until_cuda_graph
        delta_offload_bytes_across_pp_ranks activation_offload_fraction
        fine_grained_offloading_max_inflight_offloads moe_paged_stash moe_paged_stash_page_size
        moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu
        enable_cuda_graph external_cuda_graph cuda_graph_impl cuda_graph_modules cuda_graph_scope
        cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_warmup_steps
        """,
    ),
    # Inference, which has separate flags.
    **_marked(
        "free",
        """
        flash_decode inference_cuda_graph_scope inference_rng_tracker inference_sampling_seed
        inference_fuse_tp_communication inference_disable_triton_nvls_kernels
        inference_grouped_gemm_backend inference_moe_disable_fused_quant_kernels
        inference_moe_token_dispatcher_type use_inference_optimized_layers
        """,
    ),
    # Initial weights, logging, and what is set while the model is built.
    **_marked(
        "free",
        """
        et_init seed init_method init_method_std init_method_xavier_uniform
        output_layer_init_method embedding_init_method embedding_init_method_std
        init_model_with_meta_device perform_initialization use_cpu_initialization
        use_te_rng_tracker timers barrier_with_L1_time log_max_attention_logit
        moe_per_layer_logging config_logger_dir test_mode finalize_model_grads_func
        grad_scale_func moe_grad_scale_func mtp_grad_scale_func no_sync_func grad_sync_func
        param_sync_func hetereogenous_dist_checkpoint seq_length transformer
        hybrid_stack_spec spec restore_modelopt_state extra_checkpoint_metadata pre_wrap_hooks
        post_wrap_hooks
        """,
    ),
}
